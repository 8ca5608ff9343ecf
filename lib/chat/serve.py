"""The page and the API of `chat.py --serve`: Flask's routes over one engine a model
(lib/chat/engine.py), served by waitress.

Contract: lib/chat/openapi.json says which routes there are; lib/chat/api.py what is asked and
answered. No part of a request names a file: the paths of what is sent are fixed at the start.
Without an API key only this machine's own names are answered to, and no page of another site (one
that the browser has open could ask otherwise).
"""

import argparse
import base64
import dataclasses
import hashlib
import hmac
import ipaddress
import json
import logging
import math
import os
import re
import secrets
import signal
import socket
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import torch

from lib import files, flags, generate
from lib.chat import api, heat
from lib.chat.api import Refused, Side
from lib.chat.engine import Busy, Engine, Job, Turns

HERE = Path(__file__).parent
BODY_BYTES = 1 << 20  # largest body of a request
HEAT_TOKENS = 4096  # longest prompt and answer of a heat-map
HEATS = 4  # heat-maps that may be in work or wait: each holds one of the server's threads
PATIENCE_S = 2.0  # what open streams get to say that the server is stopping
FIRST_TOKEN_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)  # buckets of the metric
DEFAULTS = {
    "host": "127.0.0.1",
    "port": 8000,
    "api_key": None,
    "slots": 16,
    "queue": 64,
    "longest": 4096,
    "time_limit": 300.0,
}
POLICY = (
    "default-src 'none'; connect-src 'self'; img-src 'self' blob: data:; frame-src 'self' blob:;"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
OF_RUN = {"curves.png": "image/png", "comparison.html": "text/html", "samples.md": "text/markdown"}
FRAMED = (
    "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'self'"
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add --serve and what belongs to it; all of it is None unless it was given."""
    parser.add_argument(
        "--serve",
        action="store_true",
        help="serve a web page and OpenAI's API until Ctrl-C (default: a conversation here)",
    )
    parser.add_argument(
        "--host",
        metavar="ADDRESS",
        help=(
            "address to listen on; one that others can reach demands --api-key (default:"
            f" {DEFAULTS['host']})"
        ),
    )
    parser.add_argument(
        "--port",
        type=int,
        metavar="N",
        help=f"port to listen on; 0 = any free one (default: {DEFAULTS['port']})",
    )
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        help=(
            "what clients must send as Authorization: Bearer KEY (default: $DISTIL_API_KEY, else"
            " none)"
        ),
    )
    parser.add_argument(
        "--slots",
        type=int,
        metavar="N",
        help=f"answers written at once, of each model (default: {DEFAULTS['slots']})",
    )
    parser.add_argument(
        "--queue",
        type=int,
        metavar="N",
        help=f"answers that may wait; more are told to come again (default: {DEFAULTS['queue']})",
    )
    parser.add_argument(
        "--longest",
        type=int,
        metavar="N",
        help=(
            "most tokens of an answer, whatever a request asks for (default:"
            f" {DEFAULTS['longest']})"
        ),
    )
    parser.add_argument(
        "--time-limit",
        type=float,
        metavar="S",
        help=f"seconds after which an answer is cut (default: {DEFAULTS['time_limit']})",
    )


def check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse (exit code 2) flags that cannot work, and put in the defaults where there is a
    server."""
    if not args.serve:
        if given := next((name for name in DEFAULTS if getattr(args, name) is not None), None):
            parser.error(f"--{given.replace('_', '-')} belongs to --serve")
        return
    for name, default in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    args.api_key = args.api_key or os.environ.get("DISTIL_API_KEY")
    flags.positive(parser, args, "slots", "longest", "time_limit")
    if args.queue < 0 or not 0 <= args.port < 1 << 16:
        parser.error(
            f"--queue is {args.queue} and --port {args.port}, wanted 0 or more, and a port below"
            " 65,536"
        )
    if not is_local(args.host) and not args.api_key:
        parser.error(
            f"--host {args.host} can be reached by others: give --api-key KEY (or $DISTIL_API_KEY)"
            " as well"
        )
    for package in ("flask", "waitress", "jsonschema"):
        files.need(package, "--serve")


# --- what is counted


class Counts:
    """What /metrics says, beside what the engines count themselves."""

    def __init__(self) -> None:
        self.lock, self.requests, self.waits, self.waited_s = (
            threading.Lock(),
            Counter(),
            Counter(),
            0.0,
        )

    def request(self, path: str, status: int) -> None:
        with self.lock:
            self.requests[path, status] += 1

    def first_token(self, jobs: list[Job]) -> None:
        with self.lock:
            for job in jobs:
                if job.first is not None:
                    wait = job.first - job.asked
                    self.waited_s += wait
                    self.waits[
                        next((bound for bound in FIRST_TOKEN_S if wait <= bound), math.inf)
                    ] += 1

    def text(self, sides: list[Side]) -> str:
        """Return the text format of Prometheus, version 0.0.4."""
        lines = []

        def metric(name: str, kind: str, what: str, values: list[tuple[str, float]]) -> None:
            lines.extend([f"# HELP distil_{name} {what}", f"# TYPE distil_{name} {kind}"])
            lines.extend(f"distil_{name}{labels} {value}" for labels, value in values)

        def of(value):
            return [(f'{{model="{side.role}"}}', value(side.engine)) for side in sides]

        with self.lock:
            answered = [
                (f'{{path="{path}",status="{status}"}}', count)
                for (path, status), count in sorted(self.requests.items())
            ]
            metric("requests_total", "counter", "Requests answered", answered)
            bounds, below = [*FIRST_TOKEN_S, math.inf], 0
            waits = [
                (
                    f'_bucket{{le="{"+Inf" if b == math.inf else b}"}}',
                    below := below + self.waits[b],
                )
                for b in bounds
            ]
            waits += [("_sum", self.waited_s), ("_count", below)]
            metric(
                "first_token_seconds",
                "histogram",
                "Seconds from a request to its first token",
                waits,
            )
        metric(
            "prompt_tokens_total",
            "counter",
            "Prompt tokens read",
            of(lambda engine: engine.prompt_tokens),
        )
        metric(
            "answer_tokens_total",
            "counter",
            "Tokens written",
            of(lambda engine: engine.answer_tokens),
        )
        metric(
            "busy_seconds_total",
            "counter",
            "Seconds in which the model ran",
            of(lambda engine: engine.busy_s),
        )
        metric(
            "answers_working", "gauge", "Answers in work", of(lambda engine: len(engine.working))
        )
        metric(
            "answers_waiting", "gauge", "Answers that wait", of(lambda engine: len(engine.waiting))
        )
        metric(
            "memory_bytes",
            "gauge",
            "Weights and cache in memory",
            of(lambda engine: engine.memory_bytes()),
        )
        return "\n".join(lines) + "\n"


# --- the routes


def host_of(text: str) -> str:
    """Return the host of host:port: `localhost:8000` is localhost, `[::1]:80` is ::1."""
    return text[1:].partition("]")[0] if text.startswith("[") else text.rpartition(":")[0] or text


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


def application(args, sides: list[Side], folder: Path):
    """Return the Flask application. folder: the student's checkpoint."""
    import flask
    import jsonschema

    described = json.loads((HERE / "openapi.json").read_text(encoding="utf-8"))
    page = (HERE / "chat.html").read_text(encoding="utf-8")
    policy, created, counts, student = page_policy(page), int(time.time()), Counts(), sides[0]
    apart = "there is no teacher: chat.py --serve --teacher DIR"
    if len(sides) > 1:
        apart = heat.apart(student.chat.tokenizer, sides[1].chat.tokenizer)
    # schemas name one another by #/components/schemas/NAME: they are read from the whole file
    validators = {
        name: jsonschema.Draft202012Validator(
            {"$ref": f"#/components/schemas/{name}", "components": described["components"]}
        )
        for name in ("ChatRequest", "CompletionRequest", "HeatmapRequest")
    }
    app = flask.Flask("distil", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = BODY_BYTES
    app.json.sort_keys = False
    guard(app, args, counts)
    answer_routes(app, args, sides, counts, validators)
    heatmap_route(app, args, sides, apart, validators["HeatmapRequest"])
    run_routes(app, args, folder)

    @app.get("/")
    def index():
        return flask.Response(
            page, mimetype="text/html", headers={"Content-Security-Policy": policy}
        )

    @app.get("/openapi.json")
    def openapi():
        return described

    @app.get("/healthz")
    def health():
        if any(side.engine.dead for side in sides):
            raise Refused(503, "the model failed; the server's log says how")
        return {"status": "ok"}

    @app.get("/metrics")
    def metrics():
        return flask.Response(
            counts.text(sides), content_type="text/plain; version=0.0.4; charset=utf-8"
        )

    @app.get("/v1/models")
    def models():
        how = student.engine.how
        return {
            "object": "list",
            "data": [side.describe(created) for side in sides],
            "heatmap": apart is None,
            "defaults": {
                "temperature": how.temperature,
                "top_p": how.top_p,
                "max_tokens": min(student.chat.how.max_new_tokens, args.longest),
            },
            "limits": {"max_tokens": args.longest},
        }

    return app


def guard(app, args, counts: Counts) -> None:
    """Say who may ask, what every answer carries, and what an error looks like."""
    import flask
    from werkzeug.exceptions import HTTPException

    @app.before_request
    def admit() -> None:
        request = flask.request
        if args.api_key:
            given = request.headers.get("Authorization", "").removeprefix("Bearer ")
            if request.path not in ("/", "/healthz", "/openapi.json") and not hmac.compare_digest(
                given.encode(), args.api_key.encode()
            ):
                raise Refused(
                    401,
                    "the API key is missing or wrong: Authorization: Bearer KEY",
                    code="invalid_api_key",
                    **{"WWW-Authenticate": "Bearer"},
                )
            return
        if not is_local(host_of(request.host)):
            raise Refused(
                403,
                f"this server answers to localhost, not to {request.host[:100]}: start it with"
                " --api-key KEY",
            )
        if (origin := request.headers.get("Origin")) and origin.partition("//")[2] != request.host:
            raise Refused(403, f"a page of {origin[:100]} may not ask here")

    @app.after_request
    def sign(response):
        response.headers.setdefault("Cache-Control", "no-store")
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "no-referrer"
        counts.request(
            flask.request.url_rule.rule if flask.request.url_rule else "other", response.status_code
        )
        return response

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


def answer_routes(app, args, sides: list[Side], counts: Counts, validators: dict) -> None:
    """Add the two routes of answers."""
    import flask

    by_id = {side.id: side for side in sides}

    def answer(body: dict, chat: bool):
        """Answer a chat (messages) or completion (prompt) request, at once or as a stream."""
        side = by_id.get(body["model"])
        if side is None:
            raise Refused(
                404,
                f"there is no model {body['model'][:100]!r} here, but {', '.join(by_id)}",
                "model",
                "model_not_found",
            )
        if chat:
            ids, _, dropped = api.prompt_of(
                side, body["messages"], args.system, body.get("fit", False)
            )
            prompts = [ids]
        else:
            prompts, dropped = api.prompts_of(side, body["prompt"]), 0
        if chat and body.get("top_logprobs") and not body.get("logprobs"):
            raise Refused(400, "top_logprobs is given, and logprobs is not true", "top_logprobs")
        top = (
            (body.get("top_logprobs", 0) if body.get("logprobs") else None)
            if chat
            else body.get("logprobs")
        )
        jobs = api.jobs_of(side, args, body, prompts, top, "messages" if chat else "prompt")
        try:
            side.engine.ask(jobs)
        except Busy:
            if side.engine.closed or side.engine.dead:
                raise Refused(503, "the server is stopping") from None
            raise Refused(
                429,
                f"{args.slots} answers may be in work and {args.queue} wait, and they are: come"
                " again later",
                code="queue_full",
                **{"Retry-After": "1"},
            ) from None
        head = {
            "id": ("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12),
            "object": "",
            "created": int(time.time()),
            "model": side.id,
        }

        def cost():
            return api.numbers(side, jobs, prompts, dropped)

        gone = flask.request.environ.get("waitress.client_disconnected", lambda: False)
        if body.get("stream"):
            usage = bool((body.get("stream_options") or {}).get("include_usage"))
            response = flask.Response(
                api.stream(side, chat, head, jobs, cost, usage, gone),
                mimetype="text/event-stream",
                headers={"X-Accel-Buffering": "no"},
            )  # nginx is to pass it on at once
            response.call_on_close(
                lambda: (api.give_up(jobs), counts.first_token(jobs))
            )  # a generator that was never begun is not closed either
            return response
        made = api.whole(side, chat, head, jobs, cost, gone)
        counts.first_token(jobs)
        return made if made is not None else ("", 499)

    @app.post("/v1/chat/completions")
    def chat_completions():
        return answer(api.checked(flask.request, validators["ChatRequest"]), True)

    @app.post("/v1/completions")
    def completions():
        return answer(api.checked(flask.request, validators["CompletionRequest"]), False)


def heatmap_route(app, args, sides: list[Side], apart: str | None, validator) -> None:
    """Add the route of student beside teacher. apart: why there is none of them, or None."""
    import flask

    student, teacher = sides[0], sides[-1]
    looking, heats = threading.Lock(), threading.BoundedSemaphore(HEATS)

    @app.post("/v1/heatmap")
    def heatmap():
        body = api.checked(flask.request, validator)
        if apart is not None:
            raise Refused(400, apart)
        tokenizer = student.chat.tokenizer
        mine, kept, _ = api.prompt_of(
            student, body["messages"], args.system, body.get("fit", False)
        )
        prompts = [mine, api.prompt_of(teacher, kept, None)[0]]
        ids = tokenizer(body["answer"], add_special_tokens=False).input_ids
        if body.get("finished") and student.engine.how.stops:
            ids.append(
                tokenizer.eos_token_id
                if tokenizer.eos_token_id in student.engine.how.stops
                else student.engine.how.stops[0]
            )
        most = min(HEAT_TOKENS, *(side.chat.context or HEAT_TOKENS for side in (student, teacher)))
        if not ids or (length := max(map(len, prompts)) + len(ids)) > most:
            raise Refused(
                400,
                (
                    f"prompt and answer have {length} tokens, wanted at most {most}"
                    if ids
                    else "the answer has no token"
                ),
                "answer",
            )
        if not heats.acquire(blocking=False):
            raise Refused(
                429,
                f"{HEATS} heat-maps are asked for already: come again later",
                code="queue_full",
                **{"Retry-After": "1"},
            )
        try:
            with looking, student.engine.turns:  # one at a time: its memory is that of a pass
                places = heat.places(
                    student.chat.module,
                    teacher.chat.module,
                    tokenizer,
                    prompts[0],
                    ids,
                    teacher_prompt=prompts[1],
                )
        except torch.OutOfMemoryError:
            raise Refused(
                503,
                f"{student.chat.device} has too little memory for a heat-map of {length} tokens",
            ) from None
        except SystemExit as refused:  # a token that only one of the models knows
            raise Refused(400, str(refused).removeprefix("error: "), "answer") from None
        finally:
            heats.release()
        return {
            "tokens": [
                {name: value for name, value in dataclasses.asdict(place).items() if name != "id"}
                for place in places
            ]
        }


def run_routes(app, args, folder: Path) -> None:
    """Add what the run of a checkpoint has: its pictures and texts."""
    import flask

    of_run = run_files(folder)

    @app.get("/run.json")
    def run():
        return {"ckpt": args.ckpt} | {
            name.partition(".")[0]: name in of_run and of_run[name].exists() for name in OF_RUN
        }

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


def is_local(host: str) -> bool:
    """Whether a name means this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


# --- the server


def listen(args) -> socket.socket:
    """Return a socket on --host and --port, before any model is loaded; one line where it cannot be
    had."""
    try:
        return socket.create_server(
            (args.host, args.port),
            family=socket.AF_INET6 if ":" in args.host else socket.AF_INET,
            backlog=1024,
        )
    except OSError as refused:
        files.fail(
            f"{args.host}:{args.port} cannot be listened on",
            refused.strerror or refused,
            "a free port of this machine",
            "--port with another number, or 0 for any free one",
        )


class Server:
    """The application behind waitress, in threads of its own; `url` is where it is. stop() ends it
    at once: open streams are told so."""

    def __init__(
        self, args, chats: dict[str, object], folder: Path, listening: socket.socket
    ) -> None:
        """chats: by role, the student first."""
        import waitress

        turns = Turns()
        ids = {
            "student": args.ckpt,
            "teacher": args.teacher if args.teacher != args.ckpt else f"{args.teacher} (teacher)",
        }
        ways = {
            role: generate.sampling_of(
                chat.how, chat.tokenizer, None if chat.how.do_sample else 0.0
            )
            for role, chat in chats.items()
        }
        engines = {
            role: Engine(chat.module, chat.tokenizer, ways[role], args.slots, args.queue, turns)
            for role, chat in chats.items()
        }
        self.sides = [Side(role, ids[role], chat, engines[role]) for role, chat in chats.items()]
        self.app = application(args, self.sides, folder)
        # one for each answer that may be in work or wait, and some for who is told that the queue
        # is full
        threads = len(self.sides) * (args.slots + args.queue) + 8
        self.server = waitress.create_server(
            self.app,
            sockets=[listening],
            threads=threads,
            ident="distil",
            connection_limit=4 * threads + 100,
            channel_timeout=60,
            cleanup_interval=5,
            max_request_body_size=16 * BODY_BYTES,
            inbuf_overflow=BODY_BYTES,
            channel_request_lookahead=1,
            clear_untrusted_proxy_headers=True,
            asyncore_use_poll=True,
        )
        self.server.adj.asyncore_loop_timeout = 0.1  # how soon the loop sees that it is to end
        self.url = f"http://{f'[{args.host}]' if ':' in args.host else args.host}:{listening.getsockname()[1]}"
        self.thread = threading.Thread(target=self.server.run, name="waitress", daemon=True)
        self.thread.start()

    def failed(self) -> bool:
        return any(side.engine.dead for side in self.sides)

    def stop(self) -> None:
        for side in self.sides:
            side.engine.close()
        until = time.monotonic() + PATIENCE_S

        def busy():
            return any(
                channel.total_outbufs_len or channel.requests
                for channel in self.server.active_channels.copy().values()
            )

        while busy() and time.monotonic() < until:
            time.sleep(0.01)
        self.server.task_dispatcher.shutdown(timeout=0.5)
        for channel in [*self.server.active_channels.values()]:
            channel.will_close = True
        self.server.close()
        for side in self.sides:
            side.engine.thread.join(PATIENCE_S)
        self.thread.join(PATIENCE_S)


def serve(args, chats: dict[str, object], folder: Path, listening: socket.socket) -> None:
    """Serve until SIGINT or SIGTERM."""
    logging.getLogger("waitress.queue").setLevel(
        logging.ERROR
    )  # that requests wait is what /metrics says
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    server = Server(args, chats, folder, listening)
    print(
        f"chat: {args.ckpt}{f', beside {args.teacher},' if args.teacher else ''} on"
        f" {server.sides[0].chat.device}\n  page     {server.url}\n  API      {server.url}/v1  "
        f" (OpenAI's; described in {server.url}/openapi.json)\n  health   {server.url}/healthz,"
        f" {server.url}/metrics\nCtrl-C ends it",
        flush=True,
    )
    while not stop.wait(0.2):
        if server.failed():
            server.stop()
            sys.exit("error: the model failed; see above")
    server.stop()
    print("chat: stopped", flush=True)
    if any(side.engine.thread.is_alive() for side in server.sides):
        os._exit(
            0
            # a pass that is longer than our patience: Python would abort when its thread comes back
            # from torch
        )
