"""What `chat.py --serve` answers to: Flask's routes over one engine a model (lib/chat/engine.py).

Contract: lib/chat/openapi.json says which routes there are; lib/chat/api.py what is asked and
answered. No part of a request names a file: the paths of what is sent are fixed at the start.
Without an API key only this machine's own names are answered to, and no page of another site (one
that the browser has open could ask otherwise).
"""

import base64
import dataclasses
import hashlib
import hmac
import ipaddress
import json
import math
import re
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import jinja2
import torch

from lib import files, template
from lib.chat import api, heat
from lib.chat.api import Refused, ServedModel
from lib.chat.engine import Busy, Job, log

HERE = Path(__file__).parent
BODY_BYTES = 1 << 20  # largest body of a request
HEAT_TOKENS = 4096  # longest prompt and answer of a heat-map
SAID = 100  # sets of ignored fields that the log names
HEATS = 4  # heat-maps that may be in work or wait: each holds one of the server's threads
FIRST_TOKEN_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)  # buckets of the metric
ENGINE_METRICS = (
    ("prompt_tokens_total", "counter", "Prompt tokens read"),
    ("answer_tokens_total", "counter", "Tokens written"),
    ("busy_seconds_total", "counter", "Seconds in which the model ran"),
    ("answers_working", "gauge", "Answers in work"),
    ("answers_waiting", "gauge", "Answers that wait"),
    ("memory_bytes", "gauge", "Weights and cache in memory"),
)
POLICY = (
    "default-src 'none'; connect-src 'self'; img-src 'self' blob: data:; frame-src 'self' blob:;"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
OF_RUN = {"curves.png": "image/png", "comparison.html": "text/html", "samples.md": "text/markdown"}
SAMPLES_CHARS = 100_000  # of samples.md, where the prompts of the first evaluation stand
PROMPT_SAMPLED = r"^## Prompt \d+\n\n(.*?)\n\n(?=reference:|###)"
FOR_ALL = ("/", "/health", "/healthz", "/openapi.json")  # without a key, too
# with a key: whoever has it may ask, from any page
ANY_PAGE = {
    "Access-Control-Allow-Origin": "*",
    "Access-Control-Allow-Methods": "GET, POST",
    "Access-Control-Allow-Headers": "Authorization, *",
    "Access-Control-Expose-Headers": "Retry-After, X-Ignored-Fields",
    "Access-Control-Max-Age": "600",
}
FRAMED = (
    "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'self'"
)


class Counts:
    """What /metrics says, beside what the engines count themselves."""

    def __init__(self) -> None:
        self.lock, self.requests = threading.Lock(), Counter()
        self.waits, self.waited_s = Counter(), 0.0  # by bucket; all together

    def request(self, path: str, status: int) -> None:
        with self.lock:
            self.requests[path, status] += 1

    def first_token(self, jobs: list[Job]) -> None:
        with self.lock:
            for job in jobs:
                if job.first is not None:
                    wait = job.first - job.asked
                    self.waited_s += wait
                    bound = next((bound for bound in FIRST_TOKEN_S if wait <= bound), math.inf)
                    self.waits[bound] += 1

    def text(self, sides: list[ServedModel]) -> str:
        """Return the text format of Prometheus, version 0.0.4."""
        lines = []

        def metric(name: str, kind: str, what: str, values: dict[str, float]) -> None:
            lines.extend([f"# HELP distil_{name} {what}", f"# TYPE distil_{name} {kind}"])
            lines.extend(f"distil_{name}{labels} {value}" for labels, value in values.items())

        with self.lock:
            answered, waits, below = {}, {}, 0
            for (path, status), count in sorted(self.requests.items()):
                answered[f'{{path="{path}",status="{status}"}}'] = count
            for bound in (*FIRST_TOKEN_S, math.inf):
                below += self.waits[bound]
                waits[f'_bucket{{le="{"+Inf" if bound == math.inf else bound}"}}'] = below
            waits |= {"_sum": self.waited_s, "_count": below}
        metric("requests_total", "counter", "Requests answered", answered)
        what = "Seconds from a request to its first token"
        metric("first_token_seconds", "histogram", what, waits)
        counted = {f'{{model="{side.role}"}}': side.engine.counted() for side in sides}
        for name, kind, what in ENGINE_METRICS:
            metric(name, kind, what, {label: of[name] for label, of in counted.items()})
        return "\n".join(lines) + "\n"


def application(args, sides: list[ServedModel], folder: Path):
    """Return the Flask application. folder: the student's checkpoint."""
    import flask
    from werkzeug.routing import PathConverter

    described = json.loads((HERE / "openapi.json").read_text(encoding="utf-8"))
    # schemas name one another by #/components/schemas/NAME: they are read from the whole file
    validators = {}
    for name in ("ChatRequest", "CompletionRequest", "HeatmapRequest"):
        schema = {"$ref": f"#/components/schemas/{name}", "components": described["components"]}
        validators[name] = api.validator(schema)
    without = "there is no teacher: chat.py --serve --teacher DIR"
    if len(sides) > 1:
        without = heat.incomparable(*(side.chat.tokenizer for side in sides))
    app, counts = flask.Flask("distil", static_folder=None), Counts()
    app.config["MAX_CONTENT_LENGTH"] = BODY_BYTES
    app.json.sort_keys = False
    # an id may be a path: it is read as it stands, and a slash at the end is none too many
    app.url_map.merge_slashes = app.url_map.strict_slashes = False
    any_path = type("AnyPath", (PathConverter,), {"regex": ".+", "part_isolating": False})
    app.url_map.converters["id"] = any_path
    guard(app, args, counts)
    page_routes(app, described)
    state_routes(app, args, sides, counts, without)
    answer_routes(app, args, sides, counts, validators)
    heatmap_route(app, args, sides, without, validators["HeatmapRequest"])
    run_routes(app, args, sides[0].chat.tokenizer, folder)
    return app


# --- who may ask


def is_local(host: str) -> bool:
    """Whether a name means this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def host_of(text: str) -> str:
    """Return the host of host:port: `localhost:8000` is localhost, `[::1]:80` is ::1."""
    return text[1:].partition("]")[0] if text.startswith("[") else text.rpartition(":")[0] or text


def guard(app, args, counts: Counts) -> None:
    """Say who may ask, and what every answer carries."""
    import flask

    said: set[str] = set()

    @app.before_request
    def admit():
        request = flask.request
        if args.api_key:
            # a browser asks so, without the key, before a page may send it
            if request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers:
                return "", 204
            given = request.headers.get("Authorization", "").removeprefix("Bearer ")
            if request.path not in FOR_ALL and not hmac.compare_digest(
                given.encode(), args.api_key.encode()
            ):
                raise Refused(
                    401,
                    "the API key is missing or wrong: Authorization: Bearer KEY",
                    code="invalid_api_key",
                    **{"WWW-Authenticate": "Bearer"},
                )
            return None
        if not is_local(host_of(request.host)):
            raise Refused(
                403,
                f"this server answers to localhost, not to {request.host[:100]}: start it with"
                " --api-key KEY",
            )
        if (origin := request.headers.get("Origin")) and origin.partition("//")[2] != request.host:
            raise Refused(403, f"a page of {origin[:100]} may not ask here")
        return None

    @app.after_request
    def sign(response):
        response.headers.setdefault("Cache-Control", "no-store")
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "no-referrer"
        if ignored := ", ".join(flask.g.get("ignored", ())):
            response.headers["X-Ignored-Fields"] = ignored
            if ignored not in said and len(said) < SAID:
                said.add(ignored)
                log.warning("ignored in requests to %s: %s", flask.request.path, ignored)
        if args.api_key:
            response.headers.extend(ANY_PAGE)
        counts.request(
            flask.request.url_rule.rule if flask.request.url_rule else "other", response.status_code
        )
        return response

    error_answers(app)


def error_answers(app) -> None:
    """Say what an error looks like."""
    import flask
    from werkzeug.exceptions import HTTPException

    @app.errorhandler(Refused)
    def refuse(refused: Refused):
        return refused.body, refused.status, refused.headers

    @app.errorhandler(HTTPException)
    def wrong(error: HTTPException):
        says = {
            404: f"there is no {flask.request.path[:100]}; /openapi.json lists what there is",
            413: f"the body is larger than {files.human(BODY_BYTES)}",
        }
        refused = Refused(error.code, says.get(error.code, error.description))
        return (
            refused.body,
            error.code,
            [pair for pair in error.get_headers() if pair[0] == "Allow"],
        )


# --- the routes


def page_routes(app, described: dict) -> None:
    """Add the page, and what describes the API."""
    import flask

    page = (HERE / "chat.html").read_text(encoding="utf-8")
    headers = {"Content-Security-Policy": page_policy(page)}

    @app.get("/")
    def index():
        return flask.Response(page, mimetype="text/html", headers=headers)

    @app.get("/openapi.json")
    def openapi():
        return described


def page_policy(html: str) -> str:
    """Return a Content-Security-Policy under which the page's own script and style run, and nothing
    else."""

    def hashes(tag):
        return " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
            for text in re.findall(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        )

    return (
        f"{POLICY}; script-src {hashes('script') or chr(39) + 'none' + chr(39)}; style-src"
        f" {hashes('style') or chr(39) + 'none' + chr(39)}"
    )


def state_routes(app, args, sides: list[ServedModel], counts: Counts, without: str | None) -> None:
    """Add what there is, and how it fares. without: why there is no heat-map, or None."""
    import flask

    student, created = sides[0], int(time.time())

    @app.get("/health")  # vLLM's, which clients wait for
    @app.get("/healthz")
    def health():
        if any(side.engine.dead for side in sides):
            raise Refused(503, "the model failed; the server's log says how")
        return {"status": "ok"}

    @app.get("/metrics")
    def metrics():
        kind = "text/plain; version=0.0.4; charset=utf-8"
        return flask.Response(counts.text(sides), content_type=kind)

    @app.get("/v1/models/<id:name>")
    def model(name: str):
        return one_of(sides, name).describe(created)

    @app.get("/v1/models")
    def models():
        how = student.engine.how
        return {
            "object": "list",
            "data": [side.describe(created) for side in sides],
            "heatmap": without is None,
            "defaults": {
                "temperature": how.temperature,
                "top_p": how.top_p,
                "max_tokens": min(student.chat.how.max_new_tokens, args.longest),
            },
            "limits": {"max_tokens": args.longest},
        }


def one_of(sides: list[ServedModel], name: str) -> ServedModel:
    """Return the model of this id. Raises Refused."""
    for side in sides:
        if side.id == name:
            return side
    ids = ", ".join(side.id for side in sides)
    said = f"there is no model {name[:100]!r} here, but {ids}"
    raise Refused(404, said, "model", "model_not_found")


def asked_body(validator) -> dict:
    """Return the request's body, and note what of it is ignored. Raises Refused."""
    import flask

    body, flask.g.ignored = api.checked(flask.request, validator)
    return body


def answer_routes(app, args, sides: list[ServedModel], counts: Counts, validators: dict) -> None:
    """Add the two routes of answers: to a chat (messages), and to prompts."""
    import flask

    def answer(schema: str, chat: bool):
        gone = flask.request.environ.get("waitress.client_disconnected", lambda: False)
        if gone():  # while its request waited for a thread
            return "", 499
        body = asked_body(validators[schema])
        side = one_of(sides, body.get("model", sides[0].id))
        asked = api.asked_of(side, args, body, chat)
        enqueue(asked, args)
        if not body.get("stream"):
            made = api.whole(asked, gone)
            counts.first_token(asked.jobs)
            return made if made is not None else ("", 499)
        response = flask.Response(
            api.event_stream(asked, gone),
            mimetype="text/event-stream",
            headers={"X-Accel-Buffering": "no"},  # nginx is to pass it on at once
        )

        def close():  # a generator that was never begun is not closed either
            api.give_up(asked.jobs)
            counts.first_token(asked.jobs)

        response.call_on_close(close)
        return response

    @app.post("/v1/chat/completions")
    def chat_completions():
        return answer("ChatRequest", True)

    @app.post("/v1/completions")
    def completions():
        return answer("CompletionRequest", False)


def enqueue(asked: api.Asked, args) -> None:
    """Give jobs to their engine. Raises Refused where that takes none."""
    engine = asked.side.engine
    try:
        engine.ask(asked.jobs)
    except Busy:
        if engine.closed or engine.dead:
            raise Refused(503, "the server is stopping") from None
        raise Refused(
            429,
            f"{args.slots} answers may be in work and {args.queue} wait, and they are: come"
            " again later",
            code="queue_full",
            **{"Retry-After": "1"},
        ) from None


def heatmap_route(app, args, sides: list[ServedModel], without: str | None, validator) -> None:
    """Add the route of student beside teacher. without: why there is none of them, or None."""
    student, teacher = sides[0], sides[-1]
    # one thread for all: each that runs a model keeps megabytes of scratch memory to its end
    looking, heats = ThreadPoolExecutor(1, "heatmap"), threading.BoundedSemaphore(HEATS)

    def compared(prompts: list[list[int]], ids: list[int]) -> list[heat.ComparedToken]:
        modules = student.chat.module, teacher.chat.module
        with student.engine.turns:
            return heat.compare_tokens(
                *modules, student.chat.tokenizer, prompts[0], ids, teacher_prompt=prompts[1]
            )

    @app.post("/v1/heatmap")
    def heatmap():
        body = asked_body(validator)
        if without is not None:
            raise Refused(400, without)
        prompts, ids = heatmap_tokens(student, teacher, args, body)
        if not heats.acquire(blocking=False):
            raise Refused(
                429,
                f"{HEATS} heat-maps are asked for already: come again later",
                code="queue_full",
                **{"Retry-After": "1"},
            )
        try:
            found = looking.submit(compared, prompts, ids).result()
        except torch.OutOfMemoryError:
            length = max(map(len, prompts)) + len(ids)
            raise Refused(
                503,
                f"{student.chat.device} has too little memory for a heat-map of {length} tokens",
            ) from None
        except SystemExit as refused:  # a token that only one of the models knows
            raise Refused(400, str(refused).removeprefix("error: "), "answer") from None
        finally:
            heats.release()
        if not all(math.isfinite(token.kl) for token in found):  # JSON knows no NaN
            raise Refused(500, "logits are not finite: a model is broken, or its dtype too small")
        tokens = [dataclasses.asdict(token) for token in found]
        for token in tokens:
            del token["id"]
        return {"tokens": tokens}


def heatmap_tokens(
    student: ServedModel, teacher: ServedModel, args, body: dict
) -> tuple[list[list[int]], list[int]]:
    """Return the prompt as each of the two has it, and the answer's tokens. Raises Refused where
    that is too much."""
    messages, fit = body["messages"], body.get("fit", False)
    more = api.template_arguments(body)
    mine, kept, _ = api.chat_prompt(student, messages, args.system, fit, more)
    prompts = [mine, api.chat_prompt(teacher, kept, None, template_args=more)[0]]
    tokenizer, stops = student.chat.tokenizer, student.engine.how.stops
    ids = tokenizer(body["answer"], add_special_tokens=False, verbose=False).input_ids
    if body.get("finished") and stops:
        ids.append(tokenizer.eos_token_id if tokenizer.eos_token_id in stops else stops[0])
    if not ids:
        raise Refused(400, "the answer has no token", "answer")
    length = max(map(len, prompts)) + len(ids)
    most = min(HEAT_TOKENS, *(side.chat.context or HEAT_TOKENS for side in (student, teacher)))
    if length > most:
        said = f"prompt and answer have {length} tokens, wanted at most {most}"
        raise Refused(400, said, "answer")
    return prompts, ids


def run_files(folder: Path) -> dict[str, Path]:
    """Return where the pictures and texts of a checkpoint's run would be. folder: the checkpoint's,
    RUN/STAGE/best."""
    folder = folder.absolute()  # "." and "best" are folders of a run, too
    stage = folder.parent
    if folder.name not in ("best", "final") or not (stage / "history.jsonl").exists():
        return {}
    return {
        "curves.png": stage / "curves.png",
        "comparison.html": stage.parent / "comparison.html",
        "samples.md": stage / "samples.md",
    }


def sampled_prompts(path: Path, tokenizer) -> list[dict]:
    """Return the prompts of samples.md as they were asked, {"user"} or {"system", "user"}: the file
    has them as the chat template wrote them, without its special tokens, and whoever sends them so
    has them wrapped twice. One that is not found back so is left out."""
    special = {tokenizer.convert_ids_to_tokens(token) for token in template.special_ids(tokenizer)}
    forms = []  # what the template writes around a user's message, and one of the system before it
    for roles in (["user"], ["system", "user"]):
        said = [{"role": role, "content": "\x02"} for role in roles]
        try:
            text = template.render(tokenizer, said, add_generation_prompt=True)
        except (jinja2.TemplateError, TypeError):  # it takes no system message
            continue
        for token in sorted(special, key=len, reverse=True):
            text = text.replace(token, "")
        parts = [part.strip() for part in text.split("\x02")]
        if len(parts) == len(roles) + 1:
            form = r"\s*(.*?)\s*".join(map(re.escape, parts))
            forms.append((re.compile(form, re.DOTALL), f"\n{parts[-1]}\n"))
    with open(path, encoding="utf-8", errors="replace") as source:
        text = source.read(SAMPLES_CHARS)
    found = []
    for match in islice(re.finditer(PROMPT_SAMPLED, text, re.DOTALL | re.MULTILINE), 3):
        for form, answers in forms:
            asked = form.fullmatch(match[1])
            # of several turns there is no one message
            if asked and not (answers.strip() and answers in asked[asked.lastindex]):
                found.append(dict(zip(("user", "system"), reversed(asked.groups()))))
                break
    return found


def run_routes(app, args, tokenizer, folder: Path) -> None:
    """Add what the run of a checkpoint has: its pictures and texts."""
    import flask

    of_run = run_files(folder)

    @app.get("/run.json")
    def run():
        there = {name: name in of_run and of_run[name].exists() for name in OF_RUN}
        made = {"ckpt": args.ckpt} | {name.partition(".")[0]: is_ for name, is_ in there.items()}
        if there["samples.md"]:
            made["prompts"] = sampled_prompts(of_run["samples.md"], tokenizer)
        return made

    def sender(name: str, kind: str):
        def send():
            if name not in of_run or not of_run[name].exists():
                raise Refused(404, f"this run has no {name}")
            return flask.Response(
                of_run[name].read_bytes(),
                mimetype=kind,
                headers={"Content-Security-Policy": FRAMED},
            )

        return send

    for name, kind in OF_RUN.items():
        app.add_url_rule(f"/run/{name}", name, sender(name, kind))
