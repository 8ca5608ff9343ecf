"""A client of any OpenAI-compatible endpoint: many requests at a time, and a server that is busy,
broken or restarted is waited for.

Contract: `ask` yields one answer for each request, in the order in which they come. A request is
one POST to URL/PATH; the path, the body and how the reply is read are its own (`ChatRequest` here,
`ScoreRequest` of lib/teacher/served.py). 429 (its Retry-After is honoured), 5xx, a hung or closed
connection and an unreadable reply are tried again, with a pause that doubles, up to `LONGEST`
seconds, and is drawn at random. The program ends with one line where no request at all succeeded
for `patience` seconds, and at once where trying again cannot help: no or a wrong key, an unknown
model, a URL that is no such endpoint, errors and nothing else.

The key comes from the environment, goes into the header of a request and nowhere else: a server
that quotes it is quoted without it.
"""

import json
import os
import queue
import random
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, ClassVar, NoReturn, Protocol

from lib import files, template

KEYS = ("TEACHER_API_KEY", "OPENAI_API_KEY")
FIRST, LONGEST = 0.5, 30.0  # seconds of pause
TRIES = 8  # of one request that fails while others succeed
IDLE_S = 1.0
REFUSED = 16  # requests that the server may refuse (400) before it has answered any


@dataclass(frozen=True)
class ChatRequest:
    """key: handed back with the answer. messages: the conversation up to the turn to answer."""

    path: ClassVar[str] = "chat/completions"
    key: Hashable
    messages: list[dict]
    seed: int = 0

    def mend(self, said: str) -> str:
        return "other --teacher-model or sampling flags"

    def body(self) -> dict:
        return spoken(self.messages) | {"seed": self.seed % 2**31}

    def read(self, client: "Client", value: dict) -> "Reply":
        """Return what a reply says; a KeyError or the like where it is no chat completion."""
        choice, usage = value["choices"][0], value.get("usage") or {}
        message = choice["message"]
        text = message.get("content") or ""
        if isinstance(text, list):  # of parts
            text = "".join(part["text"] for part in text if part.get("type", "text") == "text")
        if thought := message.get("reasoning_content") or message.get("reasoning"):
            # as the teacher wrote it, before the server took it apart
            text = f"<think>\n{thought.strip()}\n</think>\n\n{text}"
        finish = choice.get("finish_reason") or "stop"
        if not isinstance(text, str) or not isinstance(finish, str):
            raise TypeError(f"content {type(text).__name__}, finish_reason {type(finish).__name__}")
        counts = usage.get("prompt_tokens"), usage.get("completion_tokens")
        known = [count if type(count) is int else None for count in counts]
        sampled = sampled_tokens(client.url, value) if client.how.get("return_token_ids") else None
        return Reply(self, text, finish, *known, sampled=sampled)


class ServerRequest(Protocol):
    """What is asked of a server: URL/`path`, the body beside the model's name and what the client
    adds (`Client.how`), and how a reply of status 200 is read. Of a reply that is read `request` is
    this, and `finish` neither "refused" nor "failed"."""

    path: ClassVar[str]

    def body(self) -> dict: ...

    def mend(self, said: str) -> str:
        """Return what mends that the server refuses it, and said so."""

    def read(self, client: "Client", value: dict) -> Any: ...


@dataclass(frozen=True)
class Reply:
    """finish: the server's finish_reason, "refused" (the server would not take the prompt), or
    "failed" (errors only; worth asking again)."""

    request: Any
    text: str
    finish: str
    prompt_tokens: int | None = None
    answer_tokens: int | None = None
    said: str = ""
    sampled: "Tokens | None" = None


@dataclass(frozen=True)
class Tokens:
    """Tokens as a server sampled them, where it was asked for them (vLLM's `return_token_ids`): of
    the prompt as it rendered it, of the answer with the one that ended it; logp: of each of these,
    nats."""

    prompt_ids: list[int]
    answer_ids: list[int]
    logp: list[float]


class Down(Exception):
    """This try failed; another may succeed. after: seconds the server asked for. down: no server
    was reached. busy: it will pass (429, 502-504)."""

    def __init__(
        self, said: str, after: float = 0.0, busy: bool = False, down: bool = False
    ) -> None:
        super().__init__(said)
        self.after, self.busy, self.down = after, busy, down


def key() -> str | None:
    """Return the key from the environment, or None."""
    found = next(
        (os.environ[name].strip() for name in KEYS if os.environ.get(name, "").strip()), None
    )
    if found and not (found.isascii() and found.isprintable() and " " not in found):
        files.fail(
            f"{' or '.join(KEYS)} is no key",
            seen="characters that no key has",
            wanted="one line of printable ASCII",
        )
    return found


class Client:
    """A connection pool to one endpoint. how: temperature, top_p, max_tokens; those that are None
    are the server's to choose."""

    def __init__(self, url: str, model: str, how: dict, concurrency: int, timeout: float) -> None:
        import httpx2

        self.errors = httpx2
        self.url, self.model = url.rstrip("/"), model
        self.how = {name: value for name, value in how.items() if value is not None}
        self.key = key()
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        self.http = httpx2.Client(
            headers=headers,
            timeout=httpx2.Timeout(timeout, connect=min(timeout, 10.0)),
            limits=httpx2.Limits(
                max_connections=concurrency, max_keepalive_connections=concurrency
            ),
        )
        self.renamed = False  # newer models of OpenAI's want max_completion_tokens
        self.answered = False  # once it has answered, what it refuses is the prompt

    def clean(self, text: object) -> str:
        """Return a server's words as one short line without the key."""
        text = " ".join(str(text).split())
        return (text.replace(self.key, "***") if self.key else text)[:300]

    def models(self) -> str:
        """Return the names of the models that the server has, for an error's line."""
        try:
            names = [entry["id"] for entry in self.http.get(f"{self.url}/models").json()["data"]]
        except (self.errors.HTTPError, ValueError, KeyError, TypeError):
            return "a server that does not list its models"
        return self.clean(
            f"the models {', '.join(names[:20])}" if names else "a server that lists no model"
        )

    def stop(self, path: str, status: int, said: str) -> None:
        """End the program for a status that another try cannot mend; return for any other."""
        at = f"{self.url}/{path}"
        if status in (401, 402, 403):
            files.fail(
                f"{at} refuses {'the key' if self.key else 'a request without a key'} ({status})",
                said,
                "a key that may use the model",
                f"export {KEYS[0]}=...",
            )
        if status == 404 or status == 400 and "model" in said and self.model in said:
            files.fail(
                f"{at} has no model {self.model}, or is no such endpoint ({status})",
                f"{said}; {self.models()}",
                "a URL up to and with /v1, and a model that it serves",
                "--teacher-url, --teacher-model",
            )
        if status < 400 or status in (405, 410):
            files.fail(
                f"{at} is no such endpoint ({status})",
                said,
                "a URL up to and with /v1",
                "--teacher-url",
            )

    def refuses_all(self, refused: "Reply") -> NoReturn:
        files.fail(
            f"{self.url} refuses every request",
            seen=refused.said,
            wanted="a server that takes these settings",
            mend=refused.request.mend(refused.said),
        )

    def once(self, request: ServerRequest) -> Any:
        """Ask once. Raises Down where another try may succeed."""
        body = {"model": self.model, **request.body(), **self.how}
        if self.renamed:
            body["max_completion_tokens"] = body.pop("max_tokens")
        reply = self._post(request.path, body)
        status = reply.status_code
        if status == 200:
            return self._read(request, reply)
        said = self.clean(reply.text) or reply.reason_phrase
        if status in (408, 409, 425, 429) or status >= 500:
            raise Down(
                f"{status}: {said}",
                retry_after(reply.headers.get("retry-after")),
                busy=status in (429, 502, 503, 504),
            )
        if status == 400 and "max_completion_tokens" in said and "max_tokens" in body:
            self.renamed = True
            return self.once(request)
        if not (self.answered and status in (400, 403)):
            self.stop(request.path, status, said)
        return Reply(request, "", "refused", said=f"{status}: {said}")

    def _post(self, path: str, body: dict):
        """Send a request, and return the http reply of whatever status."""
        try:
            return self.http.post(f"{self.url}/{path}", json=body)
        except (
            self.errors.UnsupportedProtocol,
            self.errors.InvalidURL,
            self.errors.LocalProtocolError,
        ) as wrong:
            files.fail(
                f"--teacher-url {self.url} is no URL to ask",
                self.clean(wrong),
                "http://HOST:PORT/v1",
            )
        except self.errors.RequestError as broken:
            down = isinstance(broken, self.errors.ConnectError | self.errors.ConnectTimeout)
            raise Down(self.clean(f"{type(broken).__name__}: {broken}"), down=down) from None

    def _read(self, request: ServerRequest, reply) -> Any:
        """Return what the http reply says. Raises Down where it is no answer to the request."""
        try:
            return request.read(self, reply.json())
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as garbage:
            raise Down(
                f"a reply that is no answer to {request.path} ({type(garbage).__name__}):"
                f" {self.clean(reply.text)[:80]!r}"
            ) from None


def sampled_tokens(url: str, value: dict) -> Tokens:
    """Return the tokens of a reply, each with its log-probability; end the program where the server
    says none."""
    choice = value["choices"][0]
    ids = value.get("prompt_token_ids"), choice.get("token_ids")
    told = (choice.get("logprobs") or {}).get("content") or []
    if not all(isinstance(part, list) for part in ids) or len(told) != len(ids[1]):
        files.fail(
            f"{url} does not say which tokens it sampled",
            f"prompt_token_ids {type(ids[0]).__name__}, token_ids {type(ids[1]).__name__},"
            f" {len(told)} log-probabilities",
            "a server that knows return_token_ids and logprobs (vLLM 0.10.2 and later)",
            "the student run here: --student DIR",
        )
    return Tokens(*ids, [float(token["logprob"]) for token in told])


def spoken(messages: list[dict]) -> dict:
    """Return the messages, and tools if there are some, in OpenAI's form: the arguments of a call
    are text."""
    found, tools = [], []
    for message in messages:
        own = {name: value for name, value in message.items() if name not in template.ASIDE}
        tools += own.pop("tools", [])
        if "tool_calls" in own:
            own["tool_calls"] = []
            for number, call in enumerate(message["tool_calls"]):
                inner = dict(call["function"])
                if not isinstance(inner.get("arguments", ""), str):
                    inner["arguments"] = json.dumps(inner["arguments"], ensure_ascii=False)
                named = {"id": f"call{number:05d}", "type": "function"} | call
                own["tool_calls"].append(named | {"function": inner})
        found.append(own)
    return {"messages": found} | ({"tools": tools, "tool_choice": "none"} if tools else {})


def retry_after(value: str | None) -> float:
    """Return the seconds of a Retry-After header: a number or a date."""
    try:
        return max(0.0, float(value or 0))
    except ValueError:
        try:
            return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
        except ValueError:
            return 0.0


class Asking:
    """Many threads that ask one server until it has answered; what it is known to be (up, down,
    broken) they know together."""

    def __init__(
        self, client: Client, requests: Iterable[ServerRequest], patience: float, say
    ) -> None:
        self.client, self.requests = client, iter(requests)
        self.patience, self.say = patience, say
        self.results, self.reading, self.over = queue.Queue(), threading.Lock(), threading.Event()
        # when a request last succeeded; whether one ever did; whether it was said that none does
        self.success, self.any, self.down = time.monotonic(), False, False

    def work(self) -> None:
        """Put the replies to requests into `results`, then None; a thread's whole life."""
        try:
            while not self.over.is_set():
                with self.reading:
                    request = next(self.requests, None)
                if request is None:
                    break
                if (reply := self.stubborn(request)) is not None:
                    self.results.put(reply)
        # the main thread raises it again: files.fail's one line, or a defect with its traceback
        except BaseException as end:
            self.results.put(end)
        self.results.put(None)

    def stubborn(self, request: ServerRequest) -> Any:
        """Return the reply to a request, tried again as long as that may help; None: it is over."""
        pause, tries, begun = FIRST, 0, time.monotonic()
        while not self.over.is_set():
            try:
                reply = self.client.once(request)
            except Down as failed:
                # in an outage all fail, and that is waited out
                alone = self.success > begun or not self.any
                tries = 0 if failed.down else tries + (alone and not failed.busy)
                if tries >= TRIES and self.any:
                    return Reply(request, "", "failed", said=str(failed))
                if tries >= TRIES:
                    files.fail(
                        f"{self.client.url} fails whatever is asked",
                        failed,
                        "a server that answers",
                        f"its log; {self.client.models()}",
                    )
                left = self.patience_left(failed, begun)
                self.over.wait(max(failed.after, min(random.uniform(0.5, 1) * pause, left)))
                pause = min(2 * pause, LONGEST if not failed.down else 5.0)
            else:
                self.note_success(reply)
                return reply
        return None

    def note_success(self, reply: Reply) -> None:
        if reply.finish != "refused":
            self.success, self.any = time.monotonic(), True
            self.client.answered = True
        if self.down:
            self.down = False
            self.say("the server is back")

    def patience_left(self, failed: Down, begun: float) -> float:
        """Return the seconds for which a request begun at `begun` may still be tried; end the
        program where there are none. Say once that the server is down."""
        waited = time.monotonic() - max(begun, self.success)
        if waited > self.patience or failed.after > max(self.patience, LONGEST):
            wait = f"has not answered for {waited:.0f} s"
            if failed.after > self.patience:
                wait = f"asks to wait {failed.after:.3g} s"
            files.fail(
                f"{self.client.url} {wait}",
                seen=failed,
                wanted="a server that answers",
                mend="the same command when it does: it continues (--retry-for waits longer)",
            )
        if failed.down and not self.down:
            self.down = True
            self.say(f"the server is not reached ({failed}); trying for {self.patience:.0f} s")
        return max(0.05, self.patience - waited)


def ask(
    client: Client,
    requests: Iterable[ServerRequest],
    concurrency: int,
    patience: float,
    say=print,
    idle: Callable[[], None] | None = None,
) -> Iterator[Any]:
    """Yield the replies to all requests, at most `concurrency` in flight; requests are read only as
    they are sent. idle: called where no reply has come for IDLE_S."""
    asking = Asking(client, requests, patience, say)
    for _ in range(concurrency):
        threading.Thread(target=asking.work, daemon=True).start()
    # refused prompts, until the server has answered one: one that refuses all has another fault
    held: list[Reply] = []
    running = concurrency
    try:
        while running:
            try:
                result = asking.results.get(timeout=idle and IDLE_S)
            except queue.Empty:
                assert idle is not None
                idle()
                continue
            if result is None:
                running -= 1
            elif isinstance(result, BaseException):
                raise result
            elif result.finish == "refused" and not asking.any:
                held.append(result)
                if len(held) == REFUSED:
                    client.refuses_all(result)
            else:
                yield from held
                held = []
                yield result
        if held and not asking.any:
            client.refuses_all(held[0])
        yield from held
    finally:
        asking.over.set()
        client.http.close()
