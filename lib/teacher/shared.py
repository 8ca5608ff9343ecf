"""Many workers that dump into one folder (--shared), on one host or several with a shared disk.

    logits/NAME/.shared/HOST-PID-xxxx.json   a worker's heartbeat, written anew every BEAT_S
                        basis.lease          who fits the basis
                        chunk-0003/          until the chunk is finished:
                            plan.json        settings, and the targets of each part
                            00007-TAG.npy    a part: consecutive batches, about PART_TARGETS targets
                            00007.lease      who makes it; merge.lease: who makes the chunk of them

Contract: what is right never hangs on a lease, a clock or flock (which NFS may not pass on). A part
is written to a file of its worker's own and gets its name by link(), which is atomic and never
replaces: of two that made the same part the first wins, and the other's bytes are dropped. TAG is
that of the settings, so that whoever wakes up after a dump made anew adds nothing to it. A chunk is
put together from its parts in a folder of its own, and published by one rename that fails where the
chunk is there. So a worker may be killed or stopped anywhere, and be taken for dead while it lives:
at most it does work that another has done.

Leases save that work. A lease is a hard link to its owner's heartbeat, as it was then: it names the
owner. The owner is dead when its process is gone (on this machine), or when others have seen the
same heartbeat for LEASE_S, by their own clock: clocks of two hosts are never compared.

Worked example: chunk 0 has parts 0 to 2, and workers A and B. A takes 0, B takes 1; A is killed. B
takes 2, finds nothing free, watches A's heartbeat, takes 0 from it, and merges all three.
"""

import argparse
import contextlib
import hashlib
import json
import os
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lib import data, files, flags, models
from lib.run import Interrupt
from lib.teacher import basis, fit, record, writer

HOME = ".shared"
PART_TARGETS = 1 << 14  # what a killed worker loses: seconds on a GPU
BEAT_S, LEASE_S = 5.0, 120.0  # an NFS client may take an old file for the newest for 60 s
LOOK_AGAIN_S, WAITING_S = 2.0, 60.0  # of a worker that waits; it says so after the second
MERGE = -1  # in place of a part's number


def check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse (exit code 2) what does not go with --shared."""
    for name in ("fresh", "verify", "teacher_url", "import_", "tp"):
        if getattr(args, name) is not None and getattr(args, name) is not False:  # --verify is 0
            parser.error(f"--shared does not go with {flags.spelled(name.strip('_'))}")


def check_begun(out: Path, chunks: list, shared: bool) -> None:
    """Refuse chunks that were begun the other way: with --shared, or without."""
    for chunk in chunks:
        place = record.chunk_folder(out, chunk)
        if not shared and (parts := out / HOME / place.name).exists():
            mend = f"the same command with --shared, or, where no worker is left: rm -r {parts}"
            files.fail(f"{place} was begun with --shared", f"parts in {parts}", mend=mend)
        inside = {path.name for path in place.glob("*")} - {files.LOCK}
        if shared and (inside or files.locked(place)) and "meta.json" not in inside:
            mend = "the same command without --shared"
            files.fail(f"{place} was begun alone", sorted(inside) or "its writer", mend=mend)


def told_by(path: Path) -> dict:
    """Return what a heartbeat, or a lease, says; {} where it is gone or torn."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}


def process_of(pid: int) -> str:
    """Return what tells a process from all others: the boot of its machine, its container, and when
    it began; "" where there is none, or no /proc."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        state, *more = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if state in "ZX" else f"{boot} {os.readlink('/proc/self/ns/pid')} {more[18]}"
    except OSError:
        return ""


def is_gone(who: dict) -> bool:
    """Return whether a worker is known to have ended: one of this machine, without its process."""
    here, there = process_of(os.getpid()), who.get("process", "")
    return here.split()[:2] == there.split()[:2] != [] and process_of(who["pid"]) != there


def publish_first(own: Path, final: Path) -> None:
    """Give a whole file its final name, or drop it where there is one of that name."""
    files.sync(own)
    with contextlib.suppress(FileExistsError):
        os.link(own, final)
    own.unlink()
    files.sync(final.parent)


class Worker:
    """This process among those that share a dump: its heartbeat, and the leases that it holds. As a
    context: what it holds is given back at its end."""

    def __init__(self, out: Path, interrupt: Interrupt) -> None:
        self.out, self.home, self.interrupt, self.warm = out, out / HOME, interrupt, False
        self.name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(2)}"
        self.file = self.home / f"{self.name}.json"
        me = {"worker": self.name, "pid": os.getpid(), "process": process_of(os.getpid())}
        self.told: dict[str, Any] = me | {"beats": 0, "targets": 0, "seconds": 0.0, "doing": ""}
        self.seen: dict[str, tuple[bytes, float]] = {}  # of others: a heartbeat, since when
        while not self.file.exists():  # the last one to leave may take the folder away
            out.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                self._beat()
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._beats, daemon=True)
        self.thread.start()

    def _beat(self) -> None:
        self.told["beats"] += 1
        self.home.mkdir(exist_ok=True)
        files.write_json(self.file, self.told)

    def _beats(self) -> None:
        while not self.ended.wait(BEAT_S):
            with contextlib.suppress(OSError):  # what does not pass, the work itself will meet
                self._beat()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()
        with contextlib.suppress(OSError):  # another takes a finished chunk away
            for lease in self.home.glob("**/*.lease"):
                self.give(lease)
        with contextlib.suppress(OSError):  # another does the same, or chunks are left
            for path in self.home.glob("*.json"):
                if path == self.file or is_gone(told_by(path)):
                    path.unlink()
            if not any(self.home.glob("*.json")):
                for path in self.home.glob("*.*"):
                    path.unlink()
                self.home.rmdir()

    def take(self, lease: Path) -> bool:
        """Return whether a lease is ours now: it was free, or its owner is dead."""
        try:
            os.link(self.file, lease)
        except FileExistsError:
            if told_by(lease).get("worker") == self.name:  # NFS may say no to what it has done
                return True
            if self.alive(lease):
                return False
            mine = lease.with_name(f"{self.name}.{lease.name}")
            os.link(self.file, mine)
            os.replace(mine, lease)  # two may think that it is theirs, and do the work twice
        return True

    def give(self, lease: Path) -> None:
        """Give a lease back, if it is still ours."""
        if told_by(lease).get("worker") == self.name:
            lease.unlink(missing_ok=True)

    def alive(self, lease: Path) -> bool:
        """Return whether the owner of a lease may be at work, as far as we have watched it."""
        who = told_by(lease)
        if is_gone(who):
            return False
        name, now = who.get("worker", ""), b""
        with contextlib.suppress(OSError):
            now = (self.home / f"{name}.json").read_bytes()
        before, since = self.seen.get(name, (None, 0.0))
        if now == before:
            return time.monotonic() - since < LEASE_S
        self.seen[name] = now, time.monotonic()
        return True

    def until(self, look: Callable[[], Any], what: str) -> Any:
        """Return what `look` finds, as soon as it finds something."""
        if (found := look()) is not None:
            return found
        with files.telling(f"{self.name} waits: {what}", WAITING_S):
            self.told["doing"] = f"waits: {what}"
            while (found := look()) is None:
                self.leave()
                time.sleep(LOOK_AGAIN_S)
        return found

    def leave(self) -> None:
        """End the program if a signal has asked for it."""
        self.interrupt.leave(f"dump: {self.name} gives back what it held; the same command goes on")

    @contextlib.contextmanager
    def unless_finished(self, place: Path) -> Iterator[None]:
        """Let work on a chunk fail where it is finished, for then its parts were taken away."""
        try:
            yield
        except (OSError, SystemExit):
            if self.interrupt.number or not (place / "meta.json").exists():
                raise

    def count(self, targets: int, seconds: float) -> None:
        """Count a batch; the first one says nothing of the worker's speed."""
        self.told["targets"] += targets * self.warm
        self.told["seconds"] += seconds * self.warm
        self.warm = True

    @property
    def speed(self) -> str:
        return f"{self.told['targets'] / max(self.told['seconds'], 1e-9):.0f} targets/s here"

    def shared_basis(
        self, split: data.Split, teacher: models.Model, settings: dict, missing: list
    ) -> tuple[basis.Basis, str]:
        """Return the basis as fit.shared_basis does: made by one worker, the others wait."""
        path, lease = self.out / basis.FILE, self.home / "basis.lease"

        def look() -> str | None:
            return "there" if path.exists() else "ours" if self.take(lease) else None

        with Interrupt(at_once=True):
            if self.until(look, "another worker fits the basis") == "ours" and not path.exists():
                self.told["doing"] = "fits the basis"
                own = self.home / f"{self.name}.safetensors"
                fit.make_basis(own, split, teacher, settings)
                publish_first(own, path)
        lease.unlink(missing_ok=True)  # whoever held it: the basis is there
        fit.check_basis(self.out, settings, missing, False)
        return fit.load_basis(self.out, teacher)


class SharedChunk:
    """A chunk that several workers make. told: of which a writer.ChunkPlan is made; scored: rows ->
    records, cross-entropy and hits."""

    def __init__(self, worker: Worker, told: tuple, scored: Callable) -> None:
        self.worker, self.told, self.scored = worker, told, scored
        self.plan = writer.ChunkPlan(*told)
        self.place = record.chunk_folder(worker.out, self.plan.chunk)
        self.folder = worker.home / self.place.name
        self.parts: list[list[np.ndarray]] = []
        sizes: list[int] = []
        for batch in self.plan.batches:
            if not sizes or sizes[-1] >= PART_TARGETS:
                self.parts.append([])
                sizes.append(0)
            self.parts[-1].append(batch)
            sizes[-1] += int(self.plan.counts[batch].sum())
        self.record = np.dtype([("record", self.plan.dtype), ("ce", "<f8"), ("hit", "?")])
        # where the teacher lies may be another place on each host
        settings = self.plan.settings | {"teacher_folder": "", "part_targets": PART_TARGETS}
        self.tag = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
        self.folder.mkdir(exist_ok=True)
        path, own = self.folder / "plan.json", self.folder / f"{worker.name}.json"
        files.write_json(own, {"settings": settings, "parts": sizes})
        publish_first(own, path)
        seen = files.read_json(path, f"rm -r {self.folder}")["settings"]
        if seen != settings:
            differ, wanted = record.differing(seen, settings), "one command for all workers"
            mend = f"that of the others, or, where none is left: rm -r {self.folder}"
            files.fail(f"{self.place} was begun with other settings", differ, wanted, mend)
        check_begun(worker.out, [self.plan.chunk], True)  # again, now that others can see ours

    def part(self, number: int) -> Path:
        return self.folder / f"{number:05d}-{self.tag}.npy"

    def lease(self, number: int) -> Path:
        return self.folder / ("merge.lease" if number == MERGE else f"{number:05d}.lease")

    def take(self) -> int | None:
        """Return the number of a part that is ours to make; MERGE, where all are there and it is
        ours to merge them; None, where others are at work on what is left."""
        there = {*os.listdir(self.folder)}
        left = [i for i in range(len(self.parts)) if self.part(i).name not in there] or [MERGE]
        for number in sorted(left, key=lambda i: self.lease(i).name in there):  # free ones first
            if self.worker.take(self.lease(number)):
                over = (self.place / "meta.json").exists()
                if not over and (number == MERGE or not self.part(number).exists()):
                    return number
                self.worker.give(self.lease(number))
        return None

    def put(self, number: int, made: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> None:
        """Publish a part: of each of its batches records, cross-entropy and hits (N,)."""
        for rows, (_, ce, _) in zip(self.parts[number], made):
            writer.refuse_not_finite(rows, ce)
        whole = np.empty(sum(len(ce) for _, ce, _ in made), self.record)
        for name, arrays in zip(("record", "ce", "hit"), zip(*made)):
            whole[name] = np.concatenate(arrays)
        own = self.folder / f"{number:05d}.{self.worker.name}.part"
        with open(own, "wb") as file:
            np.lib.format.write_array(file, whole)
        publish_first(own, self.part(number))
        self.worker.give(self.lease(number))

    def merge(self) -> writer.Writer:
        """Return the Writer of the whole chunk, in a folder of our own, with all parts in it."""
        if "basis" in self.plan.settings:  # one level above the chunk, for its checksum
            with contextlib.suppress(FileExistsError):
                os.link(self.worker.out / basis.FILE, self.folder / basis.FILE)
        for left in self.folder.glob("merge.*/"):  # of a worker that was killed there
            name = left.name.removeprefix("merge.")
            who = told_by(self.worker.home / f"{name}.json")
            if name == self.worker.name or not who or is_gone(who):
                shutil.rmtree(left, ignore_errors=True)
        own = self.folder / f"merge.{self.worker.name}"
        own.mkdir()
        made = writer.Writer(own, *self.told)
        for number, batches in enumerate(self.parts):
            self.worker.leave()
            part = files.read_npy(self.part(number), self.record, f"rm {self.part(number)}")
            ends = np.cumsum([self.plan.counts[rows].sum() for rows in batches])
            assert ends[-1] == len(part), (self.part(number), ends[-1], len(part))
            for rows, some in zip(batches, np.split(part, ends[:-1])):
                made.add(rows, *(some[name].copy() for name in ("record", "ce", "hit")))
        return made

    def age_s(self, made: writer.Writer) -> float:
        """Return the seconds from the chunk's begin to this merge, by the disk's own clock."""
        now, then = made.folder / "settings.json", self.folder / "plan.json"
        return now.stat().st_mtime - then.stat().st_mtime

    def publish(self, made: writer.Writer) -> None:
        """Give a merged chunk its name, unless another worker was first."""
        (self.place / files.LOCK).unlink(missing_ok=True)
        files.sync(made.folder)
        os.rename(made.folder, self.place)  # refused where there is a chunk
        files.sync(self.worker.out)


def clear(home: Path, name: str) -> None:
    """Take away what workers made of a chunk that is finished: at once, then file by file."""
    gone = home / f"gone.{name}.{secrets.token_hex(4)}"
    with contextlib.suppress(OSError):  # another has
        os.rename(home / name, gone)
    for folder in home.glob(f"gone.{name}.*"):
        shutil.rmtree(folder, ignore_errors=True)


def tasks(
    worker: Worker, chunks: list, opening: Callable[[int | str], tuple]
) -> Iterator[tuple[SharedChunk, int]]:
    """Yield what this worker is to do next, until all chunks are finished, by whomever: a chunk,
    and a part's number or MERGE. opening: a chunk -> what opens its SharedChunk."""
    left, opened = [*chunks], dict[int | str, SharedChunk]()

    def look() -> list[tuple[SharedChunk, int]] | None:
        for chunk in [*left]:
            place = record.chunk_folder(worker.out, chunk)
            if (place / "meta.json").exists():
                left.remove(chunk)
                opened.pop(chunk, None)
                clear(worker.home, place.name)
                continue
            with worker.unless_finished(place):
                if chunk not in opened:
                    opened[chunk] = SharedChunk(worker, *opening(chunk))
                if (number := opened[chunk].take()) is not None:
                    worker.told["doing"] = f"{place.name} {'merge' if number < 0 else number}"
                    return [(opened[chunk], number)]
        return None if left else []

    while left:
        yield from worker.until(look, "others make the last parts")


def progress(out: Path, dataset: data.Dataset, chunk: int | str) -> tuple[int, int, str]:
    """Return of a chunk its targets, those that are missing, and in words how it is made."""
    place = record.chunk_folder(out, chunk)
    split = dataset.val if chunk == "val" else dataset.train
    counts = split.rows["targets"][writer.rows_of(dataset, chunk)]
    if (place / "meta.json").exists():
        return int(counts.sum()), 0, "finished"
    if sizes := told_by(out / HOME / place.name / "plan.json").get("parts", []):
        there = {path.name[:5] for path in (out / HOME / place.name).glob("*.npy")}
        missing = sum(size for i, size in enumerate(sizes) if f"{i:05d}" not in there)
        return sum(sizes), missing, f"{len(there)} of {len(sizes)} parts"
    if not (place / "done.npy").exists():
        return int(counts.sum()), int(counts.sum()), "not begun"
    missing = int(counts[~files.read_npy(place / "done.npy", record.DONE)["done"]].sum())
    return int(counts.sum()), missing, "at work" if files.locked(place) else "nobody at work"


def say_status(out: Path, dataset: data.Dataset, chunks: list) -> None:
    """Print how far a dump is, and who is at it."""
    left, speed, few = 0, 0.0, {"finished": 0, "not begun": 0}
    for chunk in chunks:
        total, missing, how = progress(out, dataset, chunk)
        left += missing
        if how in few:
            few[how] += 1
        else:
            there = f"{total - missing:,} of {total:,} targets"
            print(f"{record.chunk_folder(out, chunk)}: {there}, {how}")
    for path in sorted((out / HOME).glob("*.json")):
        with contextlib.suppress(OSError, KeyError):  # it has just left
            told = told_by(path)
            age = time.time() - path.stat().st_mtime  # for people: two clocks may differ
            dead, rate = is_gone(told) or age > LEASE_S, told["targets"] / (told["seconds"] or 1.0)
            speed += 0.0 if dead else rate
            sign = f"no sign of life for {age:.0f} s" if dead else told["doing"]
            print(f"worker {told['worker']}: {rate:,.0f} targets/s, {sign}")
    when = "nobody tells how fast" if left else "nothing to do"
    if left and speed:
        at = time.strftime("%Y-%m-%d %H:%M", time.localtime(time.time() + left / speed))
        when = f"{left / speed / 60:.1f} minutes at {speed:,.0f} a second, until {at}"
    print(f"chunks: {few['finished']} of {len(chunks)} finished, {few['not begun']} not begun")
    print(f"status: {left:,} targets left: {when}")
