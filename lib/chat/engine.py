"""A model that answers many requests at once: one thread that decodes, a bounded queue before it.

Contract: `Engine.ask` never waits. It takes jobs (or raises Busy), and the jobs' events come by
their own queue, in order, the last one with a `finish`. A job may be given up at any time
(`job.cancelled = True`): it ends at its next token, or is never begun. Each answer is what
lib/generate.py promises: the same alone and in company. Several engines share one `Turns`, so that
their models' passes take turns instead of fighting for the same cores; each counts only its own
time.
"""

import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from queue import SimpleQueue

import torch

from lib import generate
from lib.chat.text import Text


class Busy(Exception):
    """The queue is full."""


class Turns:
    """A lock that goes to whoever has waited longest. (A plain Lock mostly goes back to the thread
    that has just let go of it.)"""

    def __init__(self) -> None:
        self.inner, self.taken, self.waiting = threading.Lock(), False, deque()

    def __enter__(self) -> None:
        with self.inner:
            if not self.taken:
                self.taken = True
                return
            mine = threading.Lock()
            mine.acquire()
            self.waiting.append(mine)
        mine.acquire()

    def __exit__(self, *_) -> None:
        with self.inner:
            if self.waiting:
                self.waiting.popleft().release()
            else:
                self.taken = False


@dataclass(frozen=True)
class WrittenToken:
    """A token. offset: where its text begins in the answer."""

    id: int
    offset: int
    likely: generate.Likely | None


@dataclass(frozen=True)
class Event:
    """text: what can be shown now; tokens: those that begin in it. finish: stop, length, or error
    (then `error` says what); None: more comes."""

    index: int
    text: str = ""
    tokens: tuple[WrittenToken, ...] = ()
    finish: str | None = None
    error: str | None = None


@dataclass(eq=False)
class Job:
    """One answer that is asked for. ids: the prompt; limit: most tokens; deadline: by
    time.monotonic(), when it is cut; events: where it is heard of (several jobs may share one
    queue: `index` tells them apart)."""

    ids: list[int]
    limit: int
    how: generate.Sampling
    seed: int
    deadline: float
    events: SimpleQueue
    index: int = 0
    stops: tuple[str, ...] = ()
    top: int | None = None
    cancelled: bool = False
    # what the engine notes: tokens written, characters shown, cut by its deadline; when it was
    # asked and had its first token; and
    # the engine's busy seconds when it was begun, had its first token, and its last
    count: int = 0
    shown: int = 0
    late: bool = False
    asked: float = field(default_factory=time.monotonic)
    first: float | None = None
    begun: float = 0.0
    read: float = 0.0
    last: float = 0.0

    def speed(self) -> dict[str, float | None]:
        """Return tokens a second after the first, seconds of reading the prompt, and seconds until
        the first token (waiting counts)."""
        return {
            "tok_per_s": (self.count - 1) / (self.last - self.read) if self.count > 1 else None,
            "prompt_s": None if self.first is None else self.read - self.begun,
            "first_token_s": None if self.first is None else self.first - self.asked,
        }


class Engine:
    """slots: answers in work at once; room: jobs that may wait."""

    def __init__(
        self, module, tokenizer, how: generate.Sampling, slots: int, room: int, turns: Turns
    ) -> None:
        generate.refuse_unknown_cache(module)
        self.module, self.tokenizer, self.how = module, tokenizer, how
        self.slots, self.room, self.turns = slots, room, turns
        self.waiting: deque[Job] = deque()
        # with the tokens whose text is not shown yet
        self.working: dict[Job, tuple[Text, list[WrittenToken]]] = {}
        self.more, self.closed, self.dead = threading.Condition(), False, False
        self.busy_s, self.prompt_tokens, self.answer_tokens = 0.0, 0, 0
        self.batch = generate.InFlight(module, how, slots)
        self.thread = threading.Thread(target=self.run, name="engine", daemon=True)
        self.thread.start()

    def ask(self, jobs: list[Job]) -> None:
        """Queue all jobs, or none of them. Raises Busy."""
        with self.more:
            self.waiting = deque(job for job in self.waiting if not job.cancelled)
            if (
                self.closed
                or self.dead
                or len(self.waiting) + len(self.working) + len(jobs) > self.slots + self.room
            ):
                raise Busy
            self.waiting.extend(jobs)
            self.more.notify()

    def close(self) -> None:
        """End all jobs now, and the thread after the pass it is in."""
        with self.more:
            self.closed = True
            self.more.notify()
        self.fail("the server is stopping")

    def fail(self, why: str) -> None:
        """End all jobs with an error."""
        with self.more:
            jobs = [*self.waiting, *self.working]
            self.waiting.clear()
        for job in jobs:
            job.cancelled = True
            job.events.put(Event(job.index, finish="error", error=why))

    def memory_bytes(self) -> int:
        """Return the bytes of weights and cache in memory."""
        held = [*self.module.parameters(), *self.module.buffers()]
        return sum(value.nbytes for value in held) + sum(
            layer.keys.nbytes + layer.values.nbytes for layer in self.batch.layers
        )

    def counted(self) -> dict[str, float]:
        """Return what /metrics says of a model, by the metric's name."""
        return {
            "prompt_tokens_total": self.prompt_tokens,
            "answer_tokens_total": self.answer_tokens,
            "busy_seconds_total": self.busy_s,
            "answers_working": len(self.working),
            "answers_waiting": len(self.waiting),
            "memory_bytes": self.memory_bytes(),
        }

    # --- in its own thread

    def run(self) -> None:
        try:
            while not self.closed:
                try:
                    for answer in generate.generate(
                        self.module,
                        self.requests(),
                        self.how,
                        self.slots,
                        self.token,
                        self,
                        self.batch,
                    ):
                        self.finish(answer)
                except torch.OutOfMemoryError:
                    self.fail(f"{self.module.device} is out of memory")
                    self.working.clear()
                    self.batch = generate.InFlight(self.module, self.how, self.slots)
        # where it was not closed, the thread ends with its traceback, and nobody may wait for an
        # answer
        finally:
            self.dead = True
            self.fail("the model failed; the server's log says how")

    def __enter__(self) -> None:
        self.turns.__enter__()
        self.entered = time.perf_counter()

    def __exit__(self, *_) -> None:
        self.busy_s += time.perf_counter() - self.entered
        self.turns.__exit__()

    def requests(self) -> Iterator[generate.Request | None]:
        """Yield what waits; None while nothing does and other answers are in work; block while
        there is nothing at all."""
        while True:
            with self.more:
                while not (self.waiting or self.working or self.closed):
                    self.more.wait()
                if self.closed:
                    return
                while self.waiting and self.waiting[0].cancelled:
                    self.waiting.popleft()
                job = self.waiting.popleft() if self.waiting else None
                if job:
                    self.working[job] = (Text(self.tokenizer, job.stops), [])
            if job:
                job.begun = self.busy_s
                self.prompt_tokens += len(job.ids)
                yield generate.Request(job, job.ids, job.limit, job.seed, job.how, job.top)
            elif self.working:
                yield None

    def token(self, request: generate.Request, token: int, likely: generate.Likely | None) -> bool:
        """Hear of a token; True ends its answer."""
        job, now = request.key, time.monotonic()
        if job.cancelled:
            return True
        text, tokens = self.working[job]
        if job.first is None:
            job.first, job.read = now, self.busy_s
        job.count, job.last = job.count + 1, self.busy_s
        self.answer_tokens += 1
        tokens.append(WrittenToken(token, job.shown + len(text.held), likely))
        self.tell(job, tokens, text.add(token))
        job.late = now > job.deadline
        return text.stopped or job.late

    def tell(
        self,
        job: Job,
        tokens: list[WrittenToken],
        shown: str,
        finish: str | None = None,
        every: bool = False,
    ) -> None:
        """Put an event for what is shown now, with the tokens that begin in it, or with every one
        (special tokens have no text)."""
        job.shown += len(shown)
        ready = [token for token in tokens if every or token.offset < job.shown]
        tokens[:] = [token for token in tokens if token.offset >= job.shown]
        if shown or finish:
            job.events.put(Event(job.index, shown, tuple(ready), finish))

    def finish(self, answer: generate.Answer) -> None:
        job = answer.request.key
        with self.more:
            text, tokens = self.working.pop(job)
        if not job.cancelled:
            rest = text.end()
            self.tell(
                job,
                tokens,
                rest,
                "stop" if text.stopped else "length" if job.late else answer.finish,
                every=not text.stopped,
            )
