"""Requests in OpenAI's form, their jobs (lib/chat/engine.py), and the answers in that form, whole
or as a stream of server-sent events.

Contract: lib/chat/openapi.json says what is asked and answered; a body is checked against it before
anything else happens. What it does not name is ignored, and the answer's header says so; what would
change the answer and cannot be done stands there as NotSupported. Whatever is wrong with a request
raises Refused, whose body is {"error": {"message", "type", "param", "code"}}, as OpenAI's clients
expect.
"""

import dataclasses
import json
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from urllib.parse import quote

from lib import generate, template
from lib.chat.engine import Engine, Event, Job

# least time between two writes of one stream: nobody reads faster, and a small model is not held up
# by its own announcements
PACE_S = 0.02
VALUES = 10_000  # most values in a body; to check one against the schema takes 0.1 ms
NOT_DONE = "Not supported"  # so the schema describes what would change the answer and is not done
# what a message may hold beside its text, as lib/template.py writes it
BESIDE_TEXT = ("name", "reasoning_content", "tool_calls", "tool_call_id")
WATCH_S = 0.5  # how often an answer that waits looks whether its client is still there


class Refused(Exception):
    """A request that gets an error."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        **headers: str,
    ) -> None:
        kind = {
            401: "authentication_error",
            403: "permission_error",
            404: "not_found_error",
            429: "rate_limit_error",
        }.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.status, self.headers, self.body = (
            status,
            headers,
            {"error": {"message": message, "type": kind, "param": param, "code": code}},
        )


@dataclass(frozen=True)
class ServedModel:
    """A model that is served. chat: model.Chat."""

    role: str
    id: str
    chat: object
    engine: Engine

    def describe(self, created: int) -> dict:
        module = self.chat.module
        return {
            "id": self.id,
            "object": "model",
            "created": created,
            "owned_by": "distil",
            "role": self.role,
            "context": self.chat.context,
            "parameters": sum(p.numel() for p in module.parameters()),
            "memory_bytes": self.engine.memory_bytes(),
            "device": str(module.device),
            "dtype": str(module.dtype).removeprefix("torch."),
        }

    def sampling(self, body: dict) -> generate.Sampling:
        """Return how a request wants to be answered; what it leaves out is the checkpoint's own
        way, or chat.py's flags."""
        how = self.engine.how
        if body.get("temperature") is not None or body.get("top_p") is not None:
            temperature = body.get("temperature")
            # nothing but the likeliest token; the division would overflow
            cold = temperature is not None and temperature < 1e-4
            how = self.chat.sampling(0.0 if cold else temperature, body.get("top_p"))
        names = ("top_k", "min_p", "repetition_penalty", "min_tokens")
        more = {name: max(0, body[name]) for name in names if name in body}  # top_k -1: off
        stops = () if body.get("ignore_eos") else how.stops
        return dataclasses.replace(how, stops=(*stops, *body.get("stop_token_ids", ())), **more)


@dataclass(frozen=True)
class Asked:
    """A request that is understood. chat: whether it is a chat, or the older completion. prompts:
    their tokens; jobs: the answers, n for each prompt; dropped: messages that `fit` left out;
    usage: whether a stream is to say what it cost.
    """

    side: ServedModel
    chat: bool
    prompts: list[list[int]]
    jobs: list[Job]
    dropped: int = 0
    usage: bool = False
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def head(self, kind: str) -> dict:
        """Return what each object of the answer begins with."""
        return {
            "id": self.jobs[0].name,
            "object": kind,
            "created": self.created,
            "model": self.side.id,
        }

    def cost(self) -> dict:
        """Return what the answers cost: OpenAI's `usage`, and ours: `speed` (of the first of
        several answers) and the messages `dropped` by `fit`."""
        read, written = sum(map(len, self.prompts)), sum(job.count for job in self.jobs)
        return {
            "usage": {
                "prompt_tokens": read,
                "completion_tokens": written,
                "total_tokens": read + written,
            },
            "speed": self.jobs[0].speed() | {"memory_bytes": self.side.engine.memory_bytes()},
        } | ({"dropped": self.dropped} if self.dropped else {})


# --- requests


def outline(body: object) -> object:
    """Return a body as the schema is to see it: three or more whole numbers (a prompt's tokens) are
    their smallest and their largest there. Raises Refused where it has too many values
    nevertheless."""
    left = VALUES

    def cut(value: object) -> object:
        nonlocal left
        left -= 1
        if left < 0:
            raise Refused(400, f"the body has more than {VALUES:,} values")
        if isinstance(value, dict):
            return {name: cut(inner) for name, inner in value.items()}
        if isinstance(value, list):
            return (
                [min(value), max(value)]
                if len(value) > 2 and {*map(type, value)} == {int}
                else [cut(inner) for inner in value]
            )
        return value

    return cut(body)


def validator(schema: dict):
    """Return what finds a body's faults; a field that the schema does not name is one of
    `additionalProperties`."""
    import jsonschema

    def unknown(_, more, instance, schema):
        for name in instance if isinstance(instance, dict) else ():
            if name not in schema["properties"]:
                yield jsonschema.ValidationError(name)

    base = jsonschema.Draft202012Validator
    return jsonschema.validators.extend(base, {"additionalProperties": unknown})(schema)


def checked(request, validator) -> tuple[dict, list[str]]:
    """Return a POST's body, if it is what the schema says, without the fields that the schema does
    not name; and the names of those that say something. Raises Refused (400, 413, 415)."""
    import jsonschema

    # curl -d calls everything a form
    if request.mimetype not in ("", "application/json", "application/x-www-form-urlencoded"):
        raise Refused(
            415,
            f"the body is {request.mimetype or 'of no type'}, wanted Content-Type:"
            " application/json",
        )

    if (encoded := request.headers.get("Content-Encoding", "identity").strip()) != "identity":
        raise Refused(415, f"the body is encoded ({encoded[:100]}), wanted it as it is")

    def not_a_number(name: str) -> None:
        raise ValueError(f"{name} is no number")

    def number(text: str) -> float:  # 5.0 is a whole number to JSON Schema, and is one from here on
        value = float(text)
        return int(value) if value.is_integer() else value

    try:
        body = json.loads(
            request.get_data().decode("utf-8"), parse_constant=not_a_number, parse_float=number
        )
        # half a surrogate pair can be written in JSON, and is no text
        json.dumps(body, ensure_ascii=False).encode("utf-8")
        faults = [*validator.iter_errors(outline(body))]
    except (ValueError, RecursionError) as broken:
        raise Refused(400, f"the body is no JSON: {str(broken)[:200]}") from None
    wrong, not_done, names, unknown = [], [], set(), set()
    for fault in faults:
        place = [at for at in (*fault.absolute_path, fault.message) if type(at) is not int]
        if fault.validator == "additionalProperties":
            if not fault.absolute_path:  # nobody has looked at it: nobody reads it
                unknown.add(fault.message)
            if fault.instance[fault.message] not in (None, "", [], {}):
                names.add(quote(".".join(place))[:100])
        elif fault.schema.get("description", "").startswith(NOT_DONE):
            not_done.append(fault)
        else:
            wrong.append(fault)
    if fault := jsonschema.exceptions.best_match(not_done or wrong):
        where = ".".join(map(str, fault.absolute_path)) or None
        said = fault.schema["description"] if not_done else fault.message
        said = said if len(said) <= 200 else f"{said[:100]} ... {said[-100:]}"
        raise Refused(400, f"{where}: {said}" if where else said, where)
    known = {k: v for k, v in body.items() if v is not None and k not in unknown}
    return known, sorted(names)[:20]


def template_messages(messages: list[dict]) -> list[dict]:
    """Return messages as chat templates know them: text alone, system for developer, and what
    belongs to a call or a trace."""

    def text(content):
        if isinstance(content, list):
            return "".join(part["text"] for part in content)
        return content or ""  # a call may have none

    made = []
    for m in messages:
        role = {"developer": "system"}.get(m["role"], m["role"])
        more = {name: m[name] for name in BESIDE_TEXT if m.get(name)}
        made.append({"role": role, "content": text(m.get("content"))} | more)
    return made


def template_arguments(body: dict) -> dict:
    """Return a request's arguments for the chat template. Raises Refused."""
    args = body.get("chat_template_kwargs") or {}
    if fault := template.bad_arguments(args):
        raise Refused(400, f"chat_template_kwargs: {fault} is no argument", "chat_template_kwargs")
    effort = {"reasoning_effort": body["reasoning_effort"]} if "reasoning_effort" in body else {}
    return effort | args


def chat_prompt(
    side: ServedModel,
    messages: list[dict],
    system: str | None,
    fit: bool = False,
    template_args: dict | None = None,
    tools: list[dict] | None = None,
) -> tuple[list[int], list[dict], int]:
    """Return the prompt's tokens, the messages that they say, and how many are left out: with `fit`
    the oldest turns, if they leave no room for an answer. Raises Refused where the chat template
    does not take these messages."""
    messages = template.with_system(template_messages(messages), system)
    if tools:
        messages[-1]["tools"] = tools  # the one that is never left out
    try:
        more = template_args or {}
        ids, dropped = (
            side.chat.fit(messages, **more) if fit else (side.chat.ids(messages, **more), 0)
        )
    except SystemExit as refused:
        raise Refused(400, str(refused).removeprefix("error: "), "messages") from None
    first = int(messages[0]["role"] == "system")
    return ids, messages[:first] + messages[first + dropped :], dropped


def completion_prompts(side: ServedModel, asked) -> tuple[list[list[int]], list[str]]:
    """Return the tokens of a completion's prompts, and their texts: a text, tokens, or a list of
    either."""
    several = [asked] if isinstance(asked, str) or isinstance(asked[0], int) else asked
    ids, texts, tokenizer = [], [], side.chat.tokenizer
    for prompt in several:
        is_text = isinstance(prompt, str)
        read = tokenizer(prompt, verbose=False).input_ids if is_text else prompt
        try:
            ids.append(generate.known(side.chat.module, read, tokenizer))
        except SystemExit as refused:
            raise Refused(400, str(refused).removeprefix("error: "), "prompt") from None
        texts.append(prompt if is_text else tokenizer.decode(prompt, skip_special_tokens=True))
    return ids, texts


def asked_of(side: ServedModel, args, body: dict, chat: bool) -> Asked:
    """Return what a body of a chat, or of a completion, asks of a model. Raises Refused."""
    if not chat:
        (prompts, texts), dropped = completion_prompts(side, body["prompt"]), 0
        top, echoes = body.get("logprobs"), texts if body.get("echo") else None
    else:
        if body.get("tools") and body.get("tool_choice") != "none":
            said = (
                "tools: an answer is text, not a call; with tool_choice none the template has them"
            )
            raise Refused(400, said, "tools")
        fit = body.get("fit", False)
        more = template_arguments(body)
        tools = body.get("tools")
        ids, _, dropped = chat_prompt(side, body["messages"], args.system, fit, more, tools)
        prompts, echoes = [ids], None
        if body.get("top_logprobs") and not body.get("logprobs"):
            raise Refused(400, "top_logprobs is given, and logprobs is not true", "top_logprobs")
        top = body.get("top_logprobs", 0) if body.get("logprobs") else None
    name = ("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12)
    jobs = jobs_of(name, side, args, body, prompts, top, echoes)
    usage = bool((body.get("stream_options") or {}).get("include_usage"))
    return Asked(side, chat, prompts, jobs, dropped, usage)


def jobs_of(
    name: str,
    side: ServedModel,
    args,
    body: dict,
    prompts: list[list[int]],
    top: int | None,
    echoes: list[str] | None,
) -> list[Job]:
    """Return the jobs of a request, n for each prompt, all heard of by one queue. echoes: the texts
    of the prompts, where the answers begin with them. Raises Refused."""
    context, count = side.chat.context, body.get("n", 1)
    param = "messages" if "messages" in body else "prompt"
    if len(prompts) * count > (room := args.slots + args.queue):
        raise Refused(
            400,
            f"{len(prompts)} prompts and n = {count} are {len(prompts) * count} answers, wanted at"
            f" most {room} (--slots and --queue)",
            "n",
        )
    limit = min(
        body.get("max_completion_tokens", body.get("max_tokens", side.chat.how.max_new_tokens)),
        args.longest,
    )
    for prompt in prompts:
        if not prompt:
            raise Refused(400, "the prompt is empty", param)
        if context and len(prompt) + bool(limit) > context:
            raise Refused(
                400,
                f"the prompt has {len(prompt)} tokens, and the model sees {context} with the"
                " answer",
                param,
                "context_length_exceeded",
            )
    stops = body.get("stop", ())
    stops = (stops,) if isinstance(stops, str) else tuple(stops)
    seed = body.get("seed", secrets.randbits(32)) % (1 << 63)
    how, events, deadline = side.sampling(body), SimpleQueue(), time.monotonic() + args.time_limit
    jobs = []
    for prompt, echo in zip(prompts, echoes or [None] * len(prompts)):
        for number in range(count):
            own, index = seed + number, len(jobs)
            more = (events, index, stops, top, name, echo)
            jobs.append(Job(prompt, limit, how, own, deadline, *more))
    return jobs


def heard(jobs: list[Job], gone, pace_s: float = 0.0) -> Iterator[Event]:
    """Yield the events of jobs until each has its last, those that come within pace_s as one; give
    the jobs up when the client has gone (then nothing more is yielded)."""
    try:
        missing, due = {job.index: job for job in jobs}, 0.0
        while missing:
            if gone():
                return
            events = soon(jobs[0].events, due)
            if not events and any(
                job.first is None and time.monotonic() > job.deadline for job in missing.values()
            ):
                raise Refused(
                    503,
                    "no answer was begun in time: the server is busy",
                    code="timeout",
                    **{"Retry-After": "10"},
                )
            due = time.monotonic() + pace_s
            for event in joined(events):
                if event.error:
                    raise Refused(event.status, event.error)
                if event.finish:
                    del missing[event.index]
                yield event
    finally:
        give_up(jobs)


def soon(events: SimpleQueue, due: float) -> list[Event]:
    """Return the next event, and those that come after it until `due` (time.monotonic()) or an
    answer's end; none where none comes within WATCH_S."""
    found = []
    try:
        found.append(events.get(timeout=WATCH_S))
        while not found[-1].finish and (wait := due - time.monotonic()) > 0:
            found.append(events.get(timeout=wait))
    except Empty:
        pass
    return found


def joined(events: list[Event]) -> Iterator[Event]:
    """Yield one event for each job that has some."""
    for index in dict.fromkeys(event.index for event in events):
        own = [event for event in events if event.index == index]
        yield Event(
            index,
            "".join(event.text for event in own),
            sum((event.tokens for event in own), ()),
            own[-1].finish,
            own[-1].error,
            own[-1].status,
        )


def give_up(jobs: list[Job]) -> None:
    for job in jobs:
        job.cancelled = True


# --- answers


def token_text(side: ServedModel, token: int) -> dict:
    """Return a token's text and bytes (None where it is a part of a character)."""
    text = side.chat.tokenizer.decode([token])
    return {
        "token": text,
        "bytes": None if "\N{REPLACEMENT CHARACTER}" in text else list(text.encode()),
    }


def logprobs(asked: Asked, tokens) -> dict | None:
    """Return the log-probabilities of tokens, as OpenAI's chat or older completions have them; None
    where they were not asked for."""
    if not tokens or asked.jobs[0].top is None:
        return None

    def entry(token, logp):
        told = logp if logp is None or logp > -9999.0 else -9999.0  # JSON knows no -inf and no NaN
        return token_text(asked.side, token) | {"logprob": told}

    # before the first token of a prompt there is nothing to know it by
    likely = [(token.id, token.likely or generate.Likely(None, [])) for token in tokens]
    own = [entry(token, of.logp) for token, of in likely]
    top = [[entry(*pair) for pair in of.top] for _, of in likely]
    if asked.chat:
        return {"content": [one | {"top_logprobs": best} for one, best in zip(own, top)]}
    return {
        "tokens": [one["token"] for one in own],
        "token_logprobs": [one["logprob"] for one in own],
        "text_offset": [token.offset for token in tokens],
        # of two tokens with one text the likelier one is said
        "top_logprobs": [{t["token"]: t["logprob"] for t in reversed(best)} for best in top],
    }


def whole(asked: Asked, gone) -> dict | None:
    """Return the answers once all of them are there; None where the client has gone."""
    count = len(asked.jobs)
    text, tokens, finish = [""] * count, [[] for _ in range(count)], [None] * count
    for event in heard(asked.jobs, gone):
        text[event.index] += event.text
        tokens[event.index] += event.tokens
        finish[event.index] = event.finish
    if None in finish:
        return None
    choices = []
    for index in range(count):
        said = {"text": text[index]}
        if asked.chat:
            said = {"message": {"role": "assistant", "content": text[index]}}
        likely = logprobs(asked, tokens[index])
        choices.append({"index": index, **said, "logprobs": likely, "finish_reason": finish[index]})
    head = asked.head("chat.completion" if asked.chat else "text_completion")
    return head | {"choices": choices} | asked.cost()


def event_stream(asked: Asked, gone) -> Iterator[str]:
    """Yield server-sent events: the answers as they are written, then what they cost, then
    [DONE]."""
    chat, missing = asked.chat, len(asked.jobs)
    head = asked.head("chat.completion.chunk" if chat else "text_completion")
    if asked.usage:
        head["usage"] = None

    def line(value):  # ASCII: many a client takes U+2028 or U+0085 for the end of a line
        return f"data: {json.dumps(value)}\n\n"

    def chunk(
        index: int,
        delta: dict,
        text: str = "",
        likely: dict | None = None,
        finish: str | None = None,
    ) -> str:
        said = {"delta": delta} if chat else {"text": text}
        choice = {"index": index, **said, "logprobs": likely, "finish_reason": finish}
        return line(head | {"choices": [choice]})

    if chat:
        for job in asked.jobs:
            yield chunk(job.index, {"role": "assistant", "content": ""})
    try:
        for event in heard(asked.jobs, gone, PACE_S):
            if event.text or event.tokens:
                likely = logprobs(asked, event.tokens)
                yield chunk(event.index, {"content": event.text}, event.text, likely)
            if event.finish:
                missing -= 1
                yield chunk(event.index, {}, finish=event.finish)
        if missing:
            return
    except Refused as refused:  # too late for a status
        yield line(refused.body)
        return
    if asked.usage:
        yield line(head | {"choices": []} | asked.cost())
    yield "data: [DONE]\n\n"
