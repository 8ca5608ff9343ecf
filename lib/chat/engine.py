"""A model that answers many requests at once: one thread that decodes, a bounded queue before it.

Contract: `Engine.ask` never waits. It takes jobs (or raises Busy), and the jobs' events come by
their own queue, in order, the last one with a `finish`. A job may be given up at any time
(`job.cancelled = True`): it ends at its next token, or is never begun. Each answer is what
lib/generate.py promises: the same alone and in company. A pass that fails ends only the job whose
fault it is, which is found by running those in question alone; the others go on behind what they
have written. A model that cannot take one token any more ends the thread. Several engines share one
`Turns`, so that their models' passes take turns instead of fighting for the same cores; each counts
only its own time.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from queue import SimpleQueue

import torch

from lib import generate
from lib.chat import heat
from lib.chat.text import Text

log = logging.getLogger("distil")


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
    (then `error` says what, with its HTTP status); None: more comes."""

    index: int
    text: str = ""
    tokens: tuple[WrittenToken, ...] = ()
    finish: str | None = None
    error: str | None = None
    status: int = 503


@dataclass(eq=False)
class Job:
    """One answer that is asked for. ids: the prompt; limit: most tokens; deadline: by
    time.monotonic(), when it is cut; events: where it is heard of (several jobs may share one
    queue: `index` tells them apart); name: of its request, for the log; echo: the prompt's text,
    where it is to stand before the answer."""

    ids: list[int]
    limit: int
    how: generate.Sampling
    seed: int
    deadline: float
    events: SimpleQueue
    index: int = 0
    stops: tuple[str, ...] = ()
    top: int | None = None
    name: str = ""
    echo: str | None = None
    cancelled: bool = False
    # what the engine notes: its text so far, once it is begun; its tokens, how many they are, those
    # whose text is not shown yet, characters shown; cut by its deadline; to be in work with no
    # other; when it was asked and had its first token; and the engine's busy seconds when it was
    # begun, had its first token, and its last
    text: Text | None = None
    written: list[int] = field(default_factory=list)
    count: int = 0
    hidden: list[WrittenToken] = field(default_factory=list)
    shown: int = 0
    late: bool = False
    alone: bool = False
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
        self.module, self.tokenizer, self.how = module, tokenizer, how
        self.batch = generate.in_flight(module, how, slots)
        self.slots, self.room, self.turns = self.batch.slots, room, turns
        if self.slots < slots:
            memory = generate.unknown_cache(module)
            print(f"chat: one answer at a time, for the model's memory is {memory}", flush=True)
        self.waiting: deque[Job] = deque()
        self.working: list[Job] = []
        self.fresh: set[Job] = set()  # those in work that have not had a pass yet
        self.more, self.closed, self.dead = threading.Condition(), False, False
        self.busy_s, self.prompt_tokens, self.answer_tokens = 0.0, 0, 0
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
                except Exception as broken:  # one request must not end the others
                    full, suspects = self.suspect(broken)
                else:
                    continue
                # by now the failed pass's tensors are gone
                self.batch = generate.in_flight(self.module, self.how, self.slots)
                if not full:
                    self.probe()
                self.again(suspects)
        except Exception:
            log.critical("error: the model failed", exc_info=True)
        # where it was not closed, nobody may wait for an answer
        finally:
            self.dead = True
            self.fail("the model failed; the server's log says how")

    def suspect(self, broken: Exception) -> tuple[bool, list[Job]]:
        """Return whether memory was too little for a pass, and whose fault it may be: those that
        came with it, or else all. One that is alone with that is ended."""
        full = isinstance(broken, torch.OutOfMemoryError)
        suspects = [job for job in self.working if job in self.fresh] or [*self.working]
        if not suspects:
            raise broken
        if len(suspects) == 1:
            self.blame(suspects[0], broken)
        else:
            names = ", ".join(dict.fromkeys(job.name for job in suspects))
            log.error("a pass failed (%s); each alone, to see whose fault it is: %s", broken, names)
        return full, suspects

    def blame(self, job: Job, broken: Exception) -> None:
        """End one job, for its own fault."""
        log.error("%s failed (%d tokens)", job.name, len(job.ids) + job.count, exc_info=broken)
        job.cancelled = True
        said, status = f"the answer failed; the server's log says how, under {job.name}", 500
        if isinstance(broken, torch.OutOfMemoryError):
            said, status = f"{self.module.device} is out of memory", 503
        job.events.put(Event(job.index, finish="error", error=said, status=status))

    def probe(self) -> None:
        """Raise what ends the thread where the model cannot take a single token any more (a GPU
        after an assertion)."""
        with torch.inference_mode(), self, generate.one_memory_error():
            try:
                self.module(
                    input_ids=torch.zeros((1, 1), dtype=torch.long, device=self.module.device)
                )
            except torch.OutOfMemoryError:
                pass

    def again(self, suspects: list[Job]) -> None:
        """Let all that is in work go on behind what it has written, the suspects one by one."""
        with self.more:
            others = [job for job in self.working if job not in suspects]
            for job in suspects:
                job.alone = True
            self.waiting.extendleft(reversed(others + suspects))
            self.working, self.fresh = [], set()

    def __enter__(self) -> None:
        self.turns.__enter__()
        self.entered = time.perf_counter()

    def __exit__(self, *_) -> None:
        self.busy_s += time.perf_counter() - self.entered
        self.turns.__exit__()

    def requests(self) -> Iterator[generate.Request | None]:
        """Yield what waits; None while nothing does, or what does must be alone, and other answers
        are in work; block while there is nothing at all."""
        while True:
            with self.more:
                while not (self.waiting or self.working or self.closed):
                    self.more.wait()
                if self.closed:
                    return
                while self.waiting and self.waiting[0].cancelled:
                    self.waiting.popleft()
                job = self.waiting[0] if self.waiting else None
                if job and self.working and (job.alone or self.working[0].alone):
                    job = None
                if job:
                    self.working.append(self.waiting.popleft())
                    self.fresh.add(job)
            if job:
                if job.text is None:
                    if job.echo is not None:
                        self.say_prompt(job)
                    job.text, job.begun = Text(self.tokenizer, job.stops), self.busy_s
                    self.prompt_tokens += len(job.ids)
                written = tuple(job.written)
                made = generate.Request(
                    job, job.ids, job.limit, job.seed, job.how, job.top, written
                )
                if job.limit:
                    yield made
                else:
                    self.finish(generate.Answer(made, [], "length"))
            elif self.working:
                yield None

    def say_prompt(self, job: Job) -> None:
        """Put an event for the prompt, which becomes the beginning of the answer."""
        told, offset, text = [], 0, Text(self.tokenizer)
        if job.top is not None:
            with self:
                likely = heat.likely_tokens(self.module, job.ids, job.top)
            for token, one in zip(job.ids, likely):
                told.append(WrittenToken(token, offset, one))
                offset += len(text.add(token))
        job.shown = len(job.echo)
        job.events.put(Event(job.index, job.echo, tuple(told)))

    def token(self, request: generate.Request, token: int, likely: generate.Likely | None) -> bool:
        """Hear of a token; True ends its answer."""
        job, now = request.key, time.monotonic()
        self.fresh.discard(job)
        if job.cancelled:
            return True
        if job.first is None:
            job.first, job.read = now, self.busy_s
        job.written.append(token)
        job.count, job.last, job.late = job.count + 1, self.busy_s, now > job.deadline
        self.answer_tokens += 1
        try:
            job.hidden.append(WrittenToken(token, job.shown + len(job.text.held), likely))
            self.tell(job, job.text.add(token))
        except Exception as broken:  # one request must not end the others
            self.blame(job, broken)
        return job.text.stopped or job.late or job.cancelled

    def tell(self, job: Job, shown: str, finish: str | None = None, every: bool = False) -> None:
        """Put an event for what is shown now, with the tokens that begin in it, or with every one
        (special tokens have no text)."""
        job.shown += len(shown)
        ready = [token for token in job.hidden if every or token.offset < job.shown]
        job.hidden = [token for token in job.hidden if token.offset >= job.shown]
        if shown or finish:
            job.events.put(Event(job.index, shown, tuple(ready), finish))

    def finish(self, answer: generate.Answer) -> None:
        job = answer.request.key
        with self.more:
            self.working.remove(job)
            self.fresh.discard(job)
        if job.cancelled:
            return
        try:
            rest = job.text.end()
            if answer.end is not None and job.echo is not None:  # as OpenAI's has it
                job.hidden.append(WrittenToken(answer.end, job.shown + len(rest), answer.likely))
            finish = "stop" if job.text.stopped else "length" if job.late else answer.finish
            self.tell(job, rest, finish, every=not job.text.stopped)
        except Exception as broken:  # one request must not end the others
            self.blame(job, broken)
