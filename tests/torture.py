"""Kill, starve and disturb every stage, run the same command again, and hold what it leaves against
what a run left alone leaves: byte for byte, besides times.

    python tests/torture.py --rounds 200          # of each stage, and 1,000 flips, 400 mutations
    python tests/torture.py --rounds 100 --kinds twice --flips 0 --mutations 0   # two at once
    python tests/torture.py --stages dump --rounds 20 --seed 7 -v
    python tests/torture.py --rounds 0 --flips 1000

A round: a stage of a tiny world is forked off (everything is imported once), disturbed in one of
the KINDS of ways, and started again. A table at the end counts, for each stage and kind, rounds,
differences, tracebacks (also crashes, and errors of other than one line) and hangs; exit code 1
where there are any. The seed decides every place and moment: a line that reports a fault names the
command that shows it again (but for moments).

    write   SIGKILL at a write: each in turn (half of its bytes are written), rename, removal, fsync
    moment  SIGKILL at a random moment
    fault   from a write on, each fails: no space, over quota, read-only, input/output error
    full    a disk of which a random share is free (a tmpfs of its own; else as `limit`)
    limit   a limit on the size of files
    gone    the output's folder vanishes at a write, and is there again for the second run
    fresh   SIGKILL at a write, and at one of the same command with --fresh
    twice   a second copy starts: it is refused, or waits
    stop    SIGSTOP at a random moment, a second copy meanwhile, SIGCONT
    several four workers of `shared` at once, of which one is killed and one stopped past its lease,
            each while it holds one

Flips are of files of every kind (readers.py), one after the other: a bit, a byte, a block of zeros.
Whether `files.verify` notices, and the script that reads the file; none may be used in silence.
Mutations (damage.py) are of our own json, npy and safetensors, with their checksums and with all
checksums taken away: no traceback and no hang.
"""

import argparse
import builtins
import collections
import contextlib
import ctypes
import errno
import functools
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")

import damage  # noqa: E402
import make  # noqa: E402
import numpy as np  # noqa: E402
import readers  # noqa: E402
import safetensors.torch  # noqa: E402
import torch  # noqa: E402
import transformers.models.llama.modeling_llama  # noqa: E402, F401

import chat  # noqa: E402
import dump_logits  # noqa: E402
import prepare_data  # noqa: E402
import stage1_sft  # noqa: E402
import stage2_kd  # noqa: E402
from lib import files  # noqa: E402
from lib.measure import plots, prompts  # noqa: E402
from lib.teacher import shared, writer  # noqa: E402

HANG_S = 120
LEAVE_S = 10  # that a script has to end after a signal
SHARED_LEASE_S = 2.0
FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
# of a result: of the machine, of the tree's moment, and the sums of what holds such
NOT_OURS = ("trained_s", "dumped_s", "written_s", "speed", "git", "seal", "sizes")
BUSY = "is being written by another process"
WRONG = ("difference", "traceback", "hang")
ALIVE: set[int] = set()  # processes that were started and have not ended
ENDS = (signal.SIGTERM, signal.SIGINT)
STEPS = "--steps 6 --eval-every 3 --save-every 2 --samples 1 --threads 1 --keep 2".split()


# --- the world, and the stages


@dataclass(frozen=True)
class Stage:
    """A command; `out`: what it writes, below the folder of the round; reads: its inputs."""

    main: Callable
    argv: tuple[str, ...]
    out: str
    reads: tuple[str, ...]


def rows_file(path: Path, count: int = 30) -> None:
    rows = [
        {"instruction": f"w{i % 7} w{i}", "output": f"w{i % 9} w5 w{i % 3}"} for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def stages(world: Path, place: Path) -> dict[str, Stage]:
    """Return the stages; place: of the folder of a round."""
    data, student, teacher = (str(world / name) for name in ("data", "student", "teacher"))
    rows, asked, out = str(world / "rows.jsonl"), str(world / "asked.jsonl"), str(place / "out")
    prepare = ("--source", rows, "--tokenizer", student, "--val", "4", "--workers", "1")
    train = (*make.QUICK, *STEPS)
    cpu = ("--device", "cpu", "--threads", "1")
    answered = ("--answers", "teacher", "--teacher", teacher, "--max-new-tokens", "6")
    answered += ("--keep-truncated", "--teacher-batch", "1", "--teacher-temperature", "3", *cpu)
    own = ("--source", f"own={rows}", "--val", "4", "--workers", "1", "--generations", "2")
    own += ("--answers", "student", "--student", student, "--max-new-tokens", "6")
    own += ("--student-batch", "1", "--student-temperature", "3", *cpu)
    talk = ("--ckpt", student, "--max-new-tokens", "6", "--greedy", "--batch-size", "1", *cpu)
    dump = ("--data", data, "--teacher", teacher, "--k", "8", "--tokens-per-microbatch", "60", *cpu)
    together = ("--shared", "--chunk", "0", "--tokens-per-microbatch", "20")  # a part a row
    stage1 = ("--data", data, "--student", student, *train)
    stage2 = (*stage1, "--logits", str(world / "logits"))
    round2 = ("--data", str(world / "own"), "--logits", str(world / "own-logits"))
    round2 += ("--student", student, *train)
    live = (*stage1, "--teacher", teacher, "--on-policy", "0.5", "--max-new-tokens", "6")
    lines = ("data", "student")
    made = {
        "prepare": (prepare_data.main, prepare, "out", ("rows.jsonl", "student")),
        "answers": (prepare_data.main, prepare + answered, "out", ("rows.jsonl", "teacher")),
        "stage1": (stage1_sft.main, stage1, "out", lines),
        "dump": (dump_logits.main, dump, "out", ("data", "teacher")),
        "shared": (dump_logits.main, (*dump, *together), "out", ("data", "teacher")),
        "stage2": (stage2_kd.main, stage2, "out", (*lines, "logits")),
        "own": (prepare_data.main, own, "out", ("rows.jsonl", "student")),
        "round": (stage2_kd.main, round2, "out", ("own", "own-logits", "student")),
        "live": (stage2_kd.main, live, "out", (*lines, "teacher")),
        "eval": (stage2_kd.main, (*stage2, "--eval-only"), "out", (*lines, "logits")),
        "prompts": (
            chat.main,
            ("--prompts", asked, *talk),
            "out/a.jsonl",
            ("asked.jsonl", "student"),
        ),
        "score": (
            chat.main,
            ("--score", asked, "--metrics", "exact", *talk),
            "out/a.jsonl",
            ("asked.jsonl", "student"),
        ),
    }
    return {
        name: Stage(main, (*map(str, argv), "--out", str(Path(out).parent / where)), where, reads)
        for name, (main, argv, where, reads) in made.items()
    }


def build(world: Path, log: Path) -> None:
    """Write what the stages read. Nothing is trained in this process: it forks the others."""
    make.world(world, rows=40, rows_per_chunk=24, val=6)
    meta = world / "data/meta.json"
    told = files.read_json(meta)
    meta.unlink()
    files.write_json(meta, told | {"checksums": files.checksums(world / "data")})
    rows_file(world / "rows.jsonl")
    asked = [{"prompt": f"w{i} w{i + 1}", "reference": f"w{i}"} for i in range(8)]
    (world / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    made = stages(world, world)
    dump = ("--data", str(world / "own"), *made["dump"].argv[2:-1], str(world / "own-logits"))
    for main, argv in (
        (dump_logits.main, (*made["dump"].argv[:-1], str(world / "logits"))),
        (prepare_data.main, (*made["own"].argv[:-1], str(world / "own"))),
        (dump_logits.main, dump),
    ):
        code, said = finish(start(main, argv, log), log)
        assert code == 0, said


def everything(folder: Path) -> dict[str, bytes]:
    """Return what a stage left, by name, without times and the speed of this machine."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir():
            found[name] = b""
            continue
        if path.name.endswith(".lock"):  # of a kill before its release: no harm
            continue
        content = path.read_bytes()
        if path.name == "history.jsonl":
            rows = [json.loads(line) for line in content.splitlines()]
            kept = [{k: v for k, v in row.items() if k not in make.TIMES} for row in rows]
            content = json.dumps(kept).encode()
        elif path.suffix == ".json":
            value = json.loads(content)
            if isinstance(value, dict):
                sums = ("checksums",) * (path.name in ("config.json", "state.json"))
                value = {k: v for k, v in value.items() if k not in (*NOT_OURS, *sums)}
            content = json.dumps(value).encode()
        found[name] = content
    return found


# --- a child process, and what is done to it from within


class Disturbance:
    """Counts the writes of this process, as Python sees them, and acts at the `at`-th: `act` is
    "kill", "gone" (with the folder to move away), or the number of an error, which every write
    gives from then on."""

    def __init__(self, at: int, act: object, tell: Path | None = None, gone: Path | None = None):
        self.at, self.act, self.tell, self.gone, self.count = at, act, tell, gone, 0
        self.pid = os.getpid()

    def tick(self, half: Callable[[], object] = lambda: None, frees: bool = False) -> None:
        """Count one write. half: does half of it; frees: it needs no room."""
        if os.getpid() != self.pid:
            return
        self.count += 1
        if self.tell:
            return self.tell.write_text(str(self.count)) and None
        if self.count < self.at:
            return
        if self.act == "kill":
            half()
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.act == "gone":
            if self.count == self.at and self.gone.exists():
                os.rename(self.gone, self.gone.with_name("elsewhere"))
        elif not (frees and self.act in (errno.ENOSPC, errno.EDQUOT)):
            if self.count == self.at:
                half()
            raise OSError(self.act, os.strerror(self.act))

    def install(self, below: str) -> None:
        """See the writes below a folder: files as they are opened and written, renames, removals."""
        tick, quiet = self.tick, {"open": open, "pwrite": os.pwrite}

        def mine(path) -> bool:
            return isinstance(path, str | os.PathLike) and os.path.abspath(path).startswith(below)

        class File(io.FileIO):
            def write(self, content):
                tick(lambda: io.FileIO.write(self, bytes(content)[: len(content) // 2]))
                return super().write(content)

        def opened(file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, **more):
            if not (mine(file) and set(mode) & set("wax+")):
                return quiet["open"](file, mode, buffering, encoding, errors, newline, **more)
            tick()
            raw = File(file, mode.translate({ord("b"): None, ord("t"): None}))
            if buffering == 0:
                return raw
            buffer = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
            return buffer if "b" in mode else io.TextIOWrapper(buffer, encoding, errors, newline)

        def wrapped(module, name, frees=False):
            plain = getattr(module, name)

            def counted(*args, **options):
                if any(isinstance(arg, int) or mine(arg) for arg in args[:2]):
                    tick(frees=frees)
                return plain(*args, **options)

            setattr(module, name, counted)

        builtins.open = io.open = opened
        for name in ("rename", "replace", "unlink", "remove", "rmdir"):
            wrapped(os, name, frees=True)
        for name in ("mkdir", "fsync", "truncate", "ftruncate", "pwrite", "posix_fallocate"):
            wrapped(os, name)
        removed = shutil.rmtree

        def rmtree(folder, *args, **options):
            def half():
                there = [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]
                for path in there[: len(there) // 2]:
                    path.unlink()

            if mine(folder) and Path(folder).exists():
                tick(half, frees=True)
            removed(folder, *args, **options)

        shutil.rmtree = rmtree
        plain = safetensors.torch.serialize_file

        def serialized(tensors, path, *more, **options):
            def half():
                plain(tensors, path, *more, **options)
                os.truncate(path, os.stat(path).st_size // 2)

            try:
                tick(half)
            except OSError as error:  # in the words of the library
                raise safetensors.SafetensorError(
                    f"Error while serializing: I/O error: {error.strerror} (os error {error.errno})"
                ) from None
            plain(tensors, path, *more, **options)

        safetensors.torch.serialize_file = serialized


def fork() -> int:
    """Fork, and return the child's number, to the child 0. A signal waits until the child is known
    to be alive: one that comes inside os.fork() is lost, with the child."""
    sys.stdout.flush()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDS)
    try:
        if child := os.fork():
            ALIVE.add(child)
            return child
        ALIVE.clear()
        for number in ENDS:
            signal.signal(number, signal.SIG_DFL)
        return 0
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start(
    main,
    argv,
    log: Path,
    disturbance=None,
    below: str = "",
    limit: int = 0,
    team: int = 0,
    sends: int = 0,
) -> int:
    """Fork a process that runs a script, its words into `log`; team: of so many workers, none of
    which makes a record before all have begun, and all slowly; sends: the signal that it sends
    itself while it makes its first. Return its number."""
    if child := fork():
        return child
    code = 70
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.setsid()
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout = sys.stderr = open(1, "w", buffering=1, closefd=False)
        torch.set_num_threads(1)
        writer.FLUSH_S, prepare_data.SHARD_ROWS = 0.0, 7
        shared.PART_TARGETS, shared.LOOK_AGAIN_S = 1, 0.05
        shared.LEASE_S, shared.BEAT_S = SHARED_LEASE_S, SHARED_LEASE_S / 10
        plain = writer.teacher_records

        def slow(*args):
            nonlocal sends, team
            while len(list(Path(below).glob("*/.shared/*.json"))) < team:
                time.sleep(0.005)
            team = 0  # from now on some may leave
            time.sleep(0.2)
            if sends:
                sends, _ = 0, os.kill(os.getpid(), sends)
            return plain(*args)

        writer.teacher_records = slow if team else plain
        plots.curves = plots.prepared = lambda *_: None
        prompts.speed = lambda *_: {}
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        if disturbance:
            disturbance.pid = os.getpid()
            disturbance.install(below)
        main(list(argv))
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        if isinstance(end.code, str):
            print(end.code)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os._exit(code)


def ended(child: int, seconds: float) -> int | None:
    """Wait for a child: its exit code, -N of a signal, None of a hang (it is ended)."""
    until = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done or time.monotonic() > until:
            break
        time.sleep(0.003)
    if not done:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    ALIVE.discard(child)
    return os.waitstatus_to_exitcode(status) if done else None


def finish(child: int, log: Path, seconds: float = HANG_S) -> tuple[int | None, str]:
    """Wait for a child: how it `ended`, and its words."""
    return ended(child, seconds), log.read_text(errors="replace")


# --- a round


@dataclass
class Bench:
    """A stage ready to be disturbed: what it leaves when left alone, its writes and its seconds."""

    name: str
    stage: Stage
    world: Path
    place: Path  # of the round's folder, emptied before each
    disk: Path | None  # where a small disk is mounted: `place` lies in it
    straight: dict[str, bytes]
    writes: int
    seconds: float
    bytes: int

    @property
    def log(self) -> Path:
        return self.world.with_name(f"log-{self.name}")

    def clear(self) -> None:
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir()
        self.log.write_text("")

    def start(self, told: str = "", more: tuple[str, ...] = (), **options) -> int:
        log, argv = told or self.log, self.stage.argv + more
        return start(self.stage.main, argv, log, below=str(self.place), **options)

    def finish(self, child: int) -> tuple[int | None, str]:
        return finish(child, self.log)


def fault_in(code: int | None, said: str, allowed: tuple[int, ...]) -> str | None:
    """Return what is wrong with how a disturbed run ended: "hang", "traceback", or None."""
    if code is None:
        return "hang"
    if "Traceback (most recent" in said or code not in allowed:
        return "traceback"
    if code == 1:
        last = said.rstrip().rpartition("\n")[2]
        return None if last.startswith("error: ") else "traceback"
    return None


def write(bench: Bench, rng: random.Random, turn: int):
    act = Disturbance(1 + turn % bench.writes, "kill")
    yield bench.finish(bench.start(disturbance=act)), (0, -signal.SIGKILL)


def moment(bench: Bench, rng: random.Random, turn: int):
    child = bench.start()
    time.sleep(rng.uniform(0, bench.seconds))
    os.kill(child, signal.SIGKILL)
    yield bench.finish(child), (0, -signal.SIGKILL)


def fault(bench: Bench, rng: random.Random, turn: int):
    number = FAULTS[turn % len(FAULTS)]
    act = Disturbance(1 + turn // len(FAULTS) * 7 % bench.writes, number)
    yield bench.finish(bench.start(disturbance=act)), (0, 1)


def full(bench: Bench, rng: random.Random, turn: int):
    if bench.disk is None:
        yield from limit(bench, rng, turn)
        return
    ballast, free = bench.disk / "ballast", rng.randrange(2 * bench.bytes)
    room = os.statvfs(bench.disk)
    with open(ballast, "wb") as file:
        size = room.f_bavail * room.f_frsize - free
        os.posix_fallocate(file.fileno(), 0, max(1, size))
    ended = bench.finish(bench.start())
    ballast.unlink()
    yield ended, (0, 1)


def limit(bench: Bench, rng: random.Random, turn: int):
    largest = max(map(len, bench.straight.values()))
    words = open(bench.log, "ab")  # of another process: the limit is on this file as well
    cat = subprocess.Popen("cat", stdin=subprocess.PIPE, stdout=words)
    child = bench.start(limit=rng.randrange(1, 2 * largest), told=f"/dev/fd/{cat.stdin.fileno()}")
    cat.stdin.close()
    code, _ = bench.finish(child)
    cat.wait()
    words.close()
    yield (code, bench.log.read_text(errors="replace")), (0, 1)


def gone(bench: Bench, rng: random.Random, turn: int):
    folder = bench.place / Path(bench.stage.out).parts[0]
    act = Disturbance(1 + turn * 5 % bench.writes, "gone", gone=folder)
    yield bench.finish(bench.start(disturbance=act)), (0, 1)
    if (back := folder.with_name("elsewhere")).exists():
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(back, folder)


def fresh(bench: Bench, rng: random.Random, turn: int):
    for more in ((), ("--fresh",)):
        act = Disturbance(rng.randrange(1, 5 * bench.writes // 4 + 2), "kill")
        yield bench.finish(bench.start(more=more, disturbance=act)), (0, -signal.SIGKILL)


def twice(bench: Bench, rng: random.Random, turn: int):
    first = bench.start()
    time.sleep(rng.choice((0.0, rng.uniform(0, bench.seconds))))
    second = bench.start()
    codes = [bench.finish(child)[0] for child in (first, second)]
    said = bench.log.read_text(errors="replace")
    if None in codes or 0 not in codes or any(codes) and BUSY not in said:
        yield (None if None in codes else 70, f"codes {codes}\n{said}"), (0,)
    yield (0, said), (0,)


def stop(bench: Bench, rng: random.Random, turn: int):
    first = bench.start()
    time.sleep(rng.uniform(0, bench.seconds))
    os.kill(first, signal.SIGSTOP)
    second = bench.start()
    time.sleep(0.05)
    os.kill(first, signal.SIGCONT)
    codes = [bench.finish(child)[0] for child in (first, second)]
    said = bench.log.read_text(errors="replace")
    if None in codes or 0 not in codes or any(codes) and BUSY not in said:
        yield (None if None in codes else 70, f"codes {codes}\n{said}"), (0,)
    yield (0, said), (0,)


def several(bench: Bench, rng: random.Random, turn: int):
    roles = [signal.SIGKILL, signal.SIGSTOP, 0, 0]
    rng.shuffle(roles)
    four = [bench.start(team=4, sends=role) for role in roles]
    stopped = four[roles.index(signal.SIGSTOP)]
    codes = {child: bench.finish(child)[0] for child in four if child != stopped}
    state = Path(f"/proc/{stopped}/stat").read_text().rpartition(")")[2].split()[0]
    os.kill(stopped, signal.SIGCONT)  # the others have not waited for it
    codes[stopped] = bench.finish(stopped)[0]
    wanted = [-9 if role == signal.SIGKILL else 0 for role in roles]
    right = state == "T" and [codes[child] for child in four] == wanted
    said = f"{bench.log.read_text(errors='replace')}\nstate {state}, codes {codes}, {roles}"
    yield (0 if right else 70, said), (0,)


KINDS = {
    kind.__name__: kind
    for kind in (write, moment, fault, full, limit, gone, fresh, twice, stop, several)
}
# how often each comes in a round of rounds: what has most places most often
TURNS = "write fault moment write fresh full gone fault twice write limit fresh moment write stop"
TURNS = [*TURNS.split(), "fault"]
SHARED_TURNS = "write fault moment write stop gone full write several twice limit".split()


def torture(bench: Bench, kind: str, turn: int, seed: int) -> tuple[str | None, str]:
    """One round: return what went wrong ("difference", "traceback", "hang", or None), and words
    about it."""
    rng = random.Random(f"{seed} {bench.name} {kind} {turn}")
    bench.clear()
    for (code, said), allowed in KINDS[kind](bench, rng, turn):
        if wrong := fault_in(code, said, allowed):
            return wrong, f"exit code {code}\n{said[-1500:]}"
    bench.log.write_text("--- again\n")
    code, again = bench.finish(bench.start())
    if wrong := fault_in(code, again, (0,)):
        return wrong, f"the same command again: exit code {code}\n{said[-700:]}\n{again[-1500:]}"
    left = everything(bench.place)
    if left != bench.straight:
        names = {*left, *bench.straight}
        differ = [name for name in sorted(names) if left.get(name) != bench.straight.get(name)]
        return "difference", f"in {differ[:6]}\n{said[-700:]}\n{again[-700:]}"
    return None, said


def prepared(name: str, stage: Stage, world: Path, place: Path, disk: Path | None) -> Bench:
    """Run a stage twice undisturbed: to know what it leaves, and how many writes that takes."""
    bench = Bench(name, stage, world, place, disk, {}, 0, 0.0, 0)
    bench.clear()
    told = bench.log.with_name(f"writes-{name}")
    told.write_text("0")
    code, said = bench.finish(bench.start(disturbance=Disturbance(0, "count", tell=told)))
    assert code == 0, said
    bench.straight, bench.writes = everything(place), int(told.read_text())
    bench.clear()
    begun = time.monotonic()
    code, said = bench.finish(bench.start())
    bench.seconds = time.monotonic() - begun
    assert code == 0 and everything(place) == bench.straight, (
        f"{name} is not the same twice\n{said}"
    )
    bench.bytes = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
    return bench


# --- jobs: each a process of its own, which returns (table, line of it, what was counted)

Counted = list[tuple[str, str, dict[str, int]]]


def rounds_of(name: str, args, work: Path) -> Counted:
    """Disturb a stage --rounds times."""
    usual = SHARED_TURNS if name == "shared" else TURNS
    turns = args.kinds.split(",") if args.kinds else usual
    table: collections.Counter = collections.Counter()
    with small_disk(work / f"disk-{name}") as disk:
        place = (disk or work) / f"round-{name}"
        wanted = stages(work / "world", place)
        bench = prepared(name, wanted[name], work / "world", place, disk)
        begun, seen = time.monotonic(), collections.Counter()
        for number in range(args.rounds + args.first):
            # so that few see all
            kind = turns[(number + list(wanted).index(name) * args.rounds) % len(turns)]
            turn, seen[kind] = seen[kind], seen[kind] + 1
            if number < args.first:
                continue
            wrong, said = torture(bench, kind, turn, args.seed)
            table.update({"rounds": 1, kind: 1, wrong or "right": 1})
            if args.verbose or wrong:
                print(f"{name} {kind} {turn}: {wrong or 'right'}", flush=True)
            if wrong:
                again = f"--stages {name} --kinds {kind} --first {turn} --rounds 1"
                print(f"{said}\n    (again: {again} --seed {args.seed})", flush=True)
        pace = 60 * args.rounds / (time.monotonic() - begun)
    print(
        f"{name}: {bench.writes} writes, {bench.seconds:.1f} s left alone, {args.rounds} rounds at"
        f" {pace:.0f} a minute, {sum(table[wrong] for wrong in WRONG)} faults",
        flush=True,
    )
    return [("stage", name, table)]


def everywhere(work: Path, name: str) -> tuple[readers.Damage, dict[Path, object], Callable]:
    """Build a world with every kind of file: return what damages it, what each reader leaves when
    nothing is damaged, and a function that runs a reader: (how it ended, what it said)."""
    world, log = work / name, work / f"{name}.log"
    with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):
        with contextlib.redirect_stderr(quiet):
            build(world, log)
    made = stages(world, world)

    def ended(main: Callable, argv: tuple) -> tuple[int | None, str]:
        log.write_text("")
        return finish(start(main, argv, log), log)

    readers.build(world, made, lambda main, argv: ended(main, argv)[0])
    damage_to = readers.Damage(world, readers.kinds(world, made))
    straight = {}
    for kind in damage_to.every:
        if (out := kind.reader.out, kind.reader.argv) not in straight:
            damage_to.as_before(kind)
            code, said = ended(kind.reader.main, kind.reader.argv)
            assert code == 0, (kind.name, said)
            straight[out, kind.reader.argv] = everything(out)
            damage_to.as_before(kind)
    return damage_to, straight, ended


def flips(name: str, args, work: Path) -> Counted:
    """Damage --flips files, of each kind as many."""
    damage_to, straight, ended = everywhere(work, name)
    begun, count = time.monotonic(), {kind.name: collections.Counter() for kind in damage_to.every}
    for number in range(args.first, args.first + args.flips):
        rng = np.random.default_rng([args.seed, number])
        kind = damage_to.every[number % len(damage_to.every)]
        table, reader = count[kind.name], kind.reader
        with damage_to.one(kind, damage.flip, rng) as (victim, what):
            verified = bool(files.verify(kind.top(damage_to.world), set())[2])
            code, said = ended(reader.main, reader.argv)
            same = code == 0 and everything(reader.out) == straight[reader.out, reader.argv]
        wrong = fault_in(code, said, (0, 1))
        told = code == 0 and any(word in said for word in readers.SAID)
        how = wrong or ("refused" if code else "told" if told else "same end" if same else "silent")
        table.update({"flips": 1, "verified": int(verified), how: 1})
        if how not in ("refused", "told") or not verified:
            missed = "" if verified else ", not noticed by verify"
            print(f"flip {number}: {victim}: {what}: {how}{missed}\n{said[-1500:]}", flush=True)
        elif args.verbose:
            print(f"flip {number}: {victim}: {what}: {how}", flush=True)
    pace = 60 * args.flips / (time.monotonic() - begun)
    print(f"{name}: {args.flips} at {pace:.0f} a minute", flush=True)
    return [("flip", kind, table) for kind, table in count.items()]


def mutations(name: str, args, work: Path) -> Counted:
    """Write --mutations other values into files of ours, half of them where there are no
    checksums."""
    damage_to, _, ended = everywhere(work, name)
    begun = time.monotonic()
    count: dict[str, collections.Counter] = {}
    have = {
        ending: [
            kind for kind in damage_to.every if any(p.name.endswith(ending) for p in kind.paths())
        ]
        for ending in (".json", ".npy", ".safetensors", ".jsonl")
    }
    for number in range(args.first, args.first + args.mutations):
        rng = np.random.default_rng([args.seed, number])
        ending, bare = list(have)[number % 4], bool(number // 4 % 2)
        kind = have[ending][rng.integers(len(have[ending]))]
        with damage_to.one(kind, damage.damage, rng, bare, (ending,)) as (victim, what):
            code, said = ended(kind.reader.main, kind.reader.argv)
        wrong = fault_in(code, said, (0, 1))
        line = f"{ending[1:]}, {'no' if bare else 'with'} checksums"
        table = count.setdefault(line, collections.Counter())
        table.update({"mutations": 1, wrong or ("refused" if code else "read"): 1})
        if wrong or args.verbose:
            print(f"mutation {number}: {victim}: {what}: {wrong}\n{said[-1500:]}", flush=True)
    pace = 60 * args.mutations / (time.monotonic() - begun)
    print(f"{name}: {args.mutations} at {pace:.0f} a minute", flush=True)
    return [("mutate", line, table) for line, table in count.items()]


TABLES = {  # the columns of each: how many, what came of it, and what must not be
    "stage": (("rounds", *KINDS), WRONG),
    "flip": (("flips", "verified", "refused", "told"), ("same end", "silent", *WRONG[1:])),
    "mutate": (("mutations", "refused", "read"), WRONG[1:]),
}


def print_tables(lines: Counted) -> int:
    """Print what was counted, a table a kind of job; return the number of faults."""
    faults, told = 0, []
    for title, (good, bad) in TABLES.items():
        own = [(name, collections.Counter(table)) for kind, name, table in lines if kind == title]
        if not own:
            continue
        total = sum((table for _, table in own), collections.Counter())
        print(
            f"\n| {' | '.join([title, *good, *bad])} |\n" + "| --- " * (1 + len(good + bad)) + "|"
        )
        for name, table in [*own, ("all", total)]:
            print(f"| {' | '.join([name, *(str(table[column]) for column in good + bad)])} |")
        faults += sum(total[wrong] for wrong in bad)
        faults += total["flips"] - total["verified"]
        told.append(f"{total[good[0]]} {good[0]}")
    print(f"\n{', '.join(told)}: {faults} faults")
    return faults


# --- the command


def own_mounts() -> None:
    """Give this process mounts of its own, where it may: they end with it, however it ends."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_namespace, private, recursive = 0x20000, 1 << 18, 1 << 14
    if os.geteuid() == 0 and libc.unshare(new_namespace) == 0:
        libc.mount(b"none", b"/", None, private | recursive, None)


@contextlib.contextmanager
def small_disk(folder: Path):
    """Mount a disk of its own at a folder, where this user may: yield it, or None."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield folder if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def sweep() -> None:
    """Remove what a killed torture left: its disks, its folders."""
    for folder in Path(tempfile.gettempdir()).glob("torture-*"):
        owner = folder.name.split("-")[1]
        if not Path("/proc", owner).exists():
            for disk in folder.glob("disk-*"):
                subprocess.run(["umount", "-l", str(disk)], capture_output=True)
            shutil.rmtree(folder, ignore_errors=True)


def leave(place: Path | None, number: int, _frame) -> None:
    """End at a signal with all that was started, and with the folder `place`. At once: an exception
    of a handler is lost where it comes in a callback of the interpreter."""
    for end in ENDS:
        signal.signal(end, signal.SIG_IGN)
    for child in ALIVE:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGTERM)
            os.kill(child, signal.SIGCONT)
    for child in [*ALIVE]:
        with contextlib.suppress(ChildProcessError):
            ended(child, LEAVE_S if place is None else 2 * LEAVE_S)
    if place:
        shutil.rmtree(place, ignore_errors=True)
    os._exit(128 + number)


def in_a_process(job: Callable, name: str, args, work: Path) -> None:
    """Fork a process that does a job and writes what it counted into work/NAME.json."""
    if fork():
        return
    code = 1
    try:
        for number in ENDS:
            signal.signal(number, functools.partial(leave, None))
        own_mounts()
        (work / f"{name}.json").write_text(json.dumps(job(name, args, work)))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=14, help="of each stage (%(default)s)")
    parser.add_argument("--stages", default="all", help="names, with commas (%(default)s)")
    parser.add_argument("--kinds", default="", help=f"of {', '.join(KINDS)} (all)")
    parser.add_argument("--flips", type=int, help="damaged files (5 a round; --stages: none)")
    parser.add_argument("--mutations", type=int, help="(2 a round; --stages: none)")
    parser.add_argument("--first", type=int, default=0, help="number of the first round (0)")
    parser.add_argument("--seed", type=int, default=0, help="of places and moments (%(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="at once (one a core)")
    parser.add_argument("-v", "--verbose", action="store_true", help="a line for each round")
    args = parser.parse_args(argv)
    few = args.stages != "all" or args.kinds
    args.flips = (0 if few else 5 * args.rounds) if args.flips is None else args.flips
    args.mutations = (0 if few else 2 * args.rounds) if args.mutations is None else args.mutations
    return args


def main(argv=None) -> int:
    args, begun, failed = parse_args(argv), time.monotonic(), False
    torch.set_num_threads(1)
    sweep()
    lines: Counted = []
    with tempfile.TemporaryDirectory(prefix=f"torture-{os.getpid()}-") as place:
        work = Path(place)
        for number in ENDS:
            signal.signal(number, functools.partial(leave, work))
        names = list(stages(work, work)) if args.stages == "all" else args.stages.split(",")
        slow = ("answers", "stage2", "stage1")  # first: they take longest
        names.sort(key=lambda name: name not in slow)
        jobs = [(rounds_of, name) for name in names if args.rounds]
        jobs += [(flips, "flips")] * bool(args.flips)
        jobs += [(mutations, "mutations")] * bool(args.mutations)
        with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):
            with contextlib.redirect_stderr(quiet):  # transformers' bars
                build(work / "world", work / "log")
        left = list(jobs)
        while left or ALIVE:
            while left and len(ALIVE) < args.jobs:
                in_a_process(*left.pop(0), args, work)
            child, status = os.wait()
            ALIVE.discard(child)
            failed = failed or status != 0
        for _, name in jobs:
            if (told := work / f"{name}.json").exists():
                lines += json.loads(told.read_text())
    faults = print_tables(lines)
    if failed:
        print("a job did not come to its end: see above")
    print(f"{(time.monotonic() - begun) / 60:.0f} minutes, {args.jobs} at once")
    return 1 if faults or failed else 0


if __name__ == "__main__":
    sys.exit(main())
