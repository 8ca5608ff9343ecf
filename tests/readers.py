"""Every kind of file that our scripts write, and a script that reads it: what tests/torture.py
damages, and where that must be noticed.

A file is damaged where all is whole, `files.verify` looks at its folder, and the script that reads
it runs: it refuses the file, says of it what it does about it, or has used it in silence.
"""

import contextlib
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import chat
import prepare_data
import stage1_sft
import stage2_kd
from lib import files, run
from lib.measure import compare, panels
from lib.prepare import store

FOR_PEOPLE = ("README.md", "samples.md", ".png", ".lock", ".html")  # no program reads them
SAID = ("damaged", "changed since", "torn")  # in the words of a script that goes on


@dataclass(frozen=True)
class Reader:
    """A script that reads; out: what it writes, which is made as it was before each time."""

    main: Callable
    argv: tuple[str, ...]
    out: Path


@dataclass(frozen=True)
class Kind:
    """A kind of file: where they lie, below `folder`, by patterns; and what reads them."""

    name: str
    folder: Path
    patterns: tuple[str, ...]
    reader: Reader

    def top(self, world: Path) -> Path:
        """Return the folder that `make verify` would be given."""
        return world / self.folder.relative_to(world).parts[0]

    def paths(self) -> list[Path]:
        found = [path for pattern in self.patterns for path in sorted(self.folder.glob(pattern))]
        return [path for path in found if path.is_file() and not path.name.endswith(FOR_PEOPLE)]


def killed_at(owner: type, name: str, number: int, main: Callable) -> Callable:
    """Return a script that kills itself after so many calls of a method."""
    plain, count = getattr(owner, name), [0]

    def counted(*args):
        plain(*args)
        count[0] += 1
        if count[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def killed(argv):
        setattr(owner, name, counted)
        main(argv)

    return killed


def report(argv: list[str]) -> None:
    """Run lib/measure/compare.py without its picture."""
    panels.png = lambda *_: None
    compare.main(argv)


def kinds(world: Path, stages: dict) -> list[Kind]:
    """Return the kinds of files of a world that `build` has filled. stages: as tests/torture.py has
    them, each with its main and argv, which ends in its --out."""

    def reader(stage: str, out: Path, *more) -> Reader:
        argv = stages[stage].argv[:-1] + (str(out), *map(str, more))
        return Reader(stages[stage].main, argv, out)

    new, ran, evaluated = (world / name for name in ("new", "ran", "ran-eval"))
    answered, asking, half = (world / name for name in ("answered", "asking", "half"))
    stage2, resumed = reader("stage2", new), reader("stage1", half)
    compared = Reader(report, (str(ran), "--out", str(new / "comparison")), new)
    again = ("--out", evaluated / "answers.jsonl", "--ckpt", ran)
    weights = ("*.json", "*.safetensors", "*.jinja")
    return [
        Kind("data", world / "data", ("*.npy", "*.jsonl", "meta.json"), reader("stage1", new)),
        Kind("tokenizer", world / "data/tokenizer", ("*",), reader("dump", new)),
        Kind("logits", world / "logits", ("*/*.npy", "*/meta.json"), stage2),
        Kind("basis", world / "logits", ("basis.safetensors",), stage2),
        Kind("last/", half, ("last/*",), resumed),
        Kind("history, resumed", half, ("history.jsonl",), resumed),
        Kind("best/", ran / "best", weights, reader("eval", new, "--student", ran)),
        Kind("final/", ran / "final", weights, reader("eval", new, "--student", ran / "final")),
        Kind("run, reported", ran, ("config.json", "history.jsonl"), compared),
        Kind("evaluation", evaluated, ("eval.json", "answers.jsonl", "*.scores.json"), compared),
        Kind("answers, scored", evaluated, ("answers.*",), reader("score", evaluated, *again)),
        Kind("answers", answered, ("answers/*/*",), reader("answers", answered, "--fresh")),
        Kind("journal", asking, ("answers/*/*",), reader("answers", asking)),
    ]


def build(world: Path, stages: dict, ended: Callable[[Callable, tuple], int]) -> None:
    """Fill a world with every kind of file: finished, or killed in the middle. ended: runs a script
    and returns how it ended."""
    asking, half = (world / name for name in ("asking", "half"))
    ran, asked = str(world / "ran"), str(world / "asked.jsonl")
    out = {name: stages[name].argv[:-1] for name in ("stage1", "stage2", "eval", "answers")}
    scored = (*stages["score"].argv[:-1], f"{ran}-eval/answers.jsonl", "--ckpt", ran)
    slow = killed_at(store.Store, "add", 12, prepare_data.main)
    saved = killed_at(run.Run, "save", 2, stage1_sft.main)
    for main, argv, wanted in (
        (stage2_kd.main, (*out["stage2"], ran), 0),
        (stage2_kd.main, (*out["eval"], f"{ran}-eval", "--student", ran), 0),
        (chat.main, (*scored, "--score", asked), 0),
        (prepare_data.main, (*out["answers"], str(world / "answered")), 0),
        (slow, (*out["answers"], str(asking)), -signal.SIGKILL),
        (saved, (*out["stage1"], str(half)), -signal.SIGKILL),
    ):
        assert (code := ended(main, argv)) == wanted, (main, argv, code)


class Damage:
    """Files of a world, damaged one at a time; all is as it was after each."""

    def __init__(self, world: Path, every: list[Kind]) -> None:
        self.world, self.every = world, every
        self.there = {path: path.read_bytes() for kind in every for path in kind.paths()}
        sealed = [path for path in world.rglob("*.json") if "seal" in files.read_json(path)]
        self.sealed = {path: path.read_bytes() for path in sealed}
        for kind in every:
            if kind.reader.out.exists():
                shutil.copytree(kind.reader.out, self.kept(kind), dirs_exist_ok=True)
            assert not files.verify(kind.top(world), set())[2], kind

    def kept(self, kind: Kind) -> Path:
        return self.world / "kept" / kind.reader.out.name

    def as_before(self, kind: Kind) -> None:
        """Put what the reader wrote away, and what was there back."""
        out = kind.reader.out
        shutil.rmtree(out, ignore_errors=True)
        if self.kept(kind).exists():
            shutil.copytree(self.kept(kind), out)
        elif kind.reader.main is report:
            out.mkdir()

    def strip(self) -> None:
        """Take the checksums away, as in folders of an older state."""
        for path in self.sealed:
            told = files.read_json(path)
            path.unlink()
            if path.name != "checksums.json":
                left = {k: told[k] for k in told if k not in ("seal", "checksums")}
                files.write_json(path, left)

    @contextlib.contextmanager
    def one(self, kind: Kind, how: Callable, rng, bare: bool = False, ending: tuple = ("",)):
        """Damage a file of a kind, `bare`: where nothing has a checksum. Yield it, and what was
        done to it."""
        self.as_before(kind)
        if bare:
            self.strip()
        there = [path for path in kind.paths() if path.name.endswith(ending)]
        victim = there[rng.integers(len(there))]
        try:
            yield victim, how(victim, rng)
        finally:
            self.as_before(kind)
            for path, content in (self.sealed if bare else {}).items():
                path.write_bytes(content)
            victim.write_bytes(self.there[victim])
