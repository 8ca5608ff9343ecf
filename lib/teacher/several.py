"""Several teachers, each a folder of records (stage2_kd.py --logits NAME=DIR NAME=DIR): the rows of
a source learn from its own, or all rows from what the teachers say together (--combine).

    no --combine   NAME is a source: its rows, of train and val, are taught by that folder's teacher
    best           of each row the teacher that finds it likelier (the lower cross-entropy)
    mean           the average of the softened probabilities, over all teachers
    product        the normalised geometric mean: the average of the softened logits

Every teacher's record is read as if it stood alone (logits.Records). A target's distribution over
all V tokens is made of it where the loss is (`Mixed`): the rest of a record without a shape goes as
the student's own tail does, which is one bucket exactly (losses.TopK.logits).
"""

import argparse
import hashlib
import math
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lib import data, files, flags, losses, models, plan
from lib.teacher.logits import Chunk, Records

HOW = ("best", "mean", "product")
Way = Callable[[data.Batch, float], losses.TopK | None]  # Records.at, Records.val_at


def add_flags(group: argparse._ArgumentGroup) -> None:
    """Add how several teachers are combined; what names them is --logits."""
    group.add_argument(
        "--combine",
        choices=HOW,
        help=(
            "of several --logits NAME=DIR, each over the same rows: the teacher that finds a row"
            " likeliest, or the average of their probabilities, or of their logits (default: each"
            " NAME is a source, and teaches its rows)"
        ),
    )


def check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse (exit code 2) flags that cannot work together; put --logits into one word."""
    words = args.logits or []
    if len(words) == 1:
        words = parts_of_flag(words[0])  # make's LOGITS="a=DIR b=DIR"
    if len(words) > 1 and (wrong := [word for word in words if not all(name_and_folder(word))]):
        parser.error(f"--logits has several folders, and {wrong[0]!r} is not NAME=DIR")
    names = [name_and_folder(word)[0] for word in words]
    if len(words) > 1 and len({*names}) < len(names):
        parser.error(f"--logits names one twice: {', '.join(names)}")
    args.logits = None if not words else words[0] if len(words) == 1 else shlex.join(words)
    if args.combine and len(words) < 2:
        parser.error("--combine needs two or more --logits NAME=DIR")


def parts_of_flag(text: str) -> list[str]:
    """Return the words of --logits as one text: of a folder alone, it."""
    if Path(text).exists() or "=" not in text:
        return [text]
    try:
        return shlex.split(text)
    except ValueError:  # a quote without its other half
        return [text]


def name_and_folder(word: str) -> tuple[str, str]:
    """Return the two parts of NAME=DIR; of a folder alone, no name."""
    name, is_named, folder = word.partition("=")
    return (name, folder) if is_named and not Path(word).exists() else ("", word)


def folders_of(text: str) -> dict[str, str]:
    """Return the folders of --logits by name; of a single one without a name, none."""
    found = [name_and_folder(word) for word in parts_of_flag(text)]
    return {name: folder for name, folder in found if name}


@dataclass(frozen=True)
class Mixed:
    """Several teachers at N targets. parts: of each, which targets it teaches (ascending numbers,
    None: all), and what it says of them. how: "" where each target has one teacher, or mean,
    product."""

    parts: list[tuple[np.ndarray | None, losses.Distribution]]
    how: str = ""

    def __getitem__(self, part: slice) -> "Mixed":
        found: list[tuple[np.ndarray | None, losses.Distribution]] = []
        for numbers, known in self.parts:
            if numbers is None:
                found.append((None, known[part]))
                continue
            first, last = np.searchsorted(numbers, [part.start, part.stop])
            if first < last:
                found.append((numbers[first:last] - part.start, known[slice(first, last)]))
        return Mixed(found, self.how)

    @property
    def silent(self) -> Tensor | None:
        """The targets (N,) of which one of them says nothing."""
        found = None
        for numbers, known in self.parts:
            if known.silent is None:
                continue
            if found is None:
                size = sum(len(own) for own, _ in self.parts if own is not None)
                found = known.silent.new_zeros(size or len(known.silent))
            at = slice(None) if numbers is None else torch.from_numpy(numbers).to(found.device)
            found[at] |= known.silent
        return found

    def logits(self, out: Tensor, student: Tensor) -> Tensor:
        """Put into out (n, V) what `logp_all` begins with: the student's logits."""
        return out.copy_(student)

    def logp_all(self, z: Tensor, temperature: float) -> Tensor:
        """Return the log-probabilities (n, V) at T over all tokens. z (n, V), the student's logits,
        is overwritten."""
        if not self.how:
            for numbers, known in self.parts:
                at = torch.from_numpy(numbers).to(z.device)
                z[at] = of_one(known, z[at], temperature)
            return z
        said = [of_one(known, z, temperature) for _, known in self.parts]
        if self.how == "mean":
            return torch.logsumexp(torch.stack(said), 0) - math.log(len(said))
        return (sum(said[1:], said[0]) / len(said)).log_softmax(1)

    def likeliest(self, z: Tensor) -> Tensor:
        """Return the likeliest token (n,) at T = 1. z (n, V): the student's logits."""
        return torch.cat(
            [self[at].logp_all(z[at].clone(), 1.0).argmax(1) for at in losses.pieces(z)]
        )


def of_one(known: losses.Distribution, student: Tensor, temperature: float) -> Tensor:
    """Return what one teacher says (n, V), log-probabilities at T; student (n, V): logits."""
    return known.logp_all(known.logits(torch.empty_like(student), student), temperature)


class Several:
    """Several `Records` as one teacher (lib/teacher/__init__.py, class Teacher)."""

    model = None  # none is here, but what they said

    def __init__(self, args: argparse.Namespace, dataset: data.Dataset, folders: dict) -> None:
        self.of = {
            name: Records(folder, dataset, temperature_of(args, name), args.verify)
            for name, folder in folders.items()
        }
        self.dataset, self.how = dataset, args.combine or ""
        every = [*self.of.values()]
        self.vocab = every[0].vocab
        for name, one in self.of.items():
            if one.vocab != self.vocab:
                files.fail(
                    "the teachers of --logits know different tokens",
                    f"{one.vocab:,} in {name}",
                    f"{self.vocab:,} as in {next(iter(self.of))}",
                    "dump_logits.py --vocab, or --student, the same for each",
                )
        self.owner = {split: self._owners(split) for split in ("train", "val")}

    def _owners(self, name: str) -> np.ndarray:
        """Return the number of the teacher of each row of a split, -1 where it has none."""
        split, number = getattr(self.dataset, name), {n: i for i, n in enumerate(self.of)}
        if self.how == "best":
            return likelier_of([row_ce(one, name) for one in self.of.values()])
        if self.how:
            return np.zeros(len(split.rows), np.int64)
        names = self.dataset.sources
        if unknown := sorted({*self.of} - {*names}):
            files.fail(
                f"--logits names a source that is not in {self.dataset.folder}",
                ", ".join(unknown),
                f"names among {', '.join(names) or '(none there)'}",
                "--logits SOURCE=DIR, or --combine mean over the same rows",
            )
        there = np.union1d(self.dataset.train.rows["source"], self.dataset.val.rows["source"])
        if without := [names[i] for i in there.tolist() if names[i] not in number]:
            files.fail(
                "a source has no teacher",
                ", ".join(without),
                "a folder for each source",
                f"--logits {without[0]}=DIR beside the others",
            )
        by_source = np.array([number.get(source, -1) for source in names])
        return by_source[split.rows["source"]]

    @property
    def name(self) -> str:
        return ", ".join(f"{one.name} ({name})" for name, one in self.of.items())

    @property
    def compares(self) -> bool:
        return all(one.compares for one in self.of.values())

    @property
    def over(self) -> str:
        return "; ".join(f"{name}: {one.over}" for name, one in self.of.items())

    @property
    def each(self) -> list[tuple[str, str]]:
        return [about for one in self.of.values() for about in one.each]

    def identity(self) -> dict:
        own = {name: one.identity() for name, one in self.of.items()}

        def joined(what: str) -> str:
            text = " ".join(f"{name}={one[what]}" for name, one in own.items())
            return hashlib.sha256(f"{self.how} {text}".encode()).hexdigest()

        chunks = {name: one["chunks"] for name, one in own.items()}
        return {"teacher": joined("teacher"), "chunks": chunks, "records": joined("records")}

    def rows(self) -> np.ndarray:
        """Return the train rows that have their teacher, or all teachers that are combined."""
        there = [
            np.isin(np.arange(len(self.owner["train"])), one.rows()) for one in self.of.values()
        ]
        if self.how:
            return np.flatnonzero(np.all(there, 0))
        owner = self.owner["train"]
        return np.flatnonzero(np.any([(owner == i) & one for i, one in enumerate(there)], 0))

    def join(
        self,
        student: models.Model,
        args: argparse.Namespace,
        amp: torch.dtype | None,
        rows: plan.Rows | None = None,
    ) -> models.Model:
        for one in self.of.values():
            student = one.join(student, args, amp, rows)
        apart = student.apart  # of all together
        for one in self.of.values():
            one.leave_out(apart)
        return student

    def say(self) -> None:
        said = self.how or "each source's rows learn from their own"
        print(f"teachers: {len(self.of)}, {said}")
        for name, one in self.of.items():
            print(f"--- {name}:")
            one.say()
        own = self.owner["train"][self.owner["train"] >= 0]
        if self.how == "best" and len(own):
            share = np.bincount(own, minlength=len(self.of)) / len(own)
            print(
                "best: "
                + ", ".join(f"{n} {part:.1%} of the rows" for n, part in zip(self.of, share))
            )

    def memory_bytes(self, device: torch.device, targets: int) -> int:
        each = [one.memory_bytes(device, targets) for one in self.of.values()]
        return sum(each) + len(each) * losses.dense_bytes(device, 4 * targets * self.vocab)

    def at(self, batch: data.Batch, temperature: float) -> losses.Distribution:
        known = self._known(batch, "train", temperature, [one.at for one in self.of.values()])
        assert known is not None
        return known

    def val_at(self, batch: data.Batch, temperature: float) -> losses.Distribution | None:
        return self._known(batch, "val", temperature, [one.val_at for one in self.of.values()])

    def _known(
        self, batch: data.Batch, name: str, temperature: float, ways: list[Way]
    ) -> losses.Distribution | None:
        """Return what the teachers say at a batch's targets; ways: how each is asked. A batch of
        one teacher's rows is as if that teacher were alone."""
        parts: list[tuple[np.ndarray | None, losses.Distribution]] = []
        rows = np.array(batch.rows)
        owner = self.owner[name][rows]
        counts = getattr(self.dataset, name).rows["targets"][rows].astype(int)
        together = self.how in ("mean", "product")
        for number in range(len(ways)) if together else np.unique(owner).tolist():
            own = np.ones(len(rows), bool) if together else owner == number
            targets = np.flatnonzero(np.repeat(own, counts))
            known = ways[number](part_of(batch, own, targets), temperature)
            if known is None:
                return None
            if own.all() and not together:
                return known
            parts.append((None if together else targets, known))
        return Mixed(parts, self.how if together else "")

    @property
    def answers(self) -> dict[str, list[int]] | None:
        if self.how:
            return None
        found = {}
        for number, one in enumerate(self.of.values()):
            for row, tokens in (one.answers or {}).items():
                if self.owner["val"][int(row)] == number:
                    found[row] = tokens
        return found or None

    def val_measures(self) -> dict | None:
        """Return the teachers' own cross-entropy and accuracy, each on the rows that it teaches;
        None of an average, which no dump has measured."""
        vals = [one.val for one in self.of.values() if one.val is not None]
        if self.how in ("mean", "product") or len(vals) < len(self.of):
            return None
        counts, owner = self.dataset.val.rows["targets"].astype(int), self.owner["val"]
        ce, hits, targets = 0.0, 0, 0
        for number, val in enumerate(vals):
            done, own = val.done(), owner == number
            ce, hits = ce + float(done["ce_sum"][own].sum()), hits + int(done["hits"][own].sum())
            targets += int(counts[own & done["done"]].sum())
        if not targets:
            return None
        ce /= targets
        figures = {"ce": ce, "ppl": math.exp(min(ce, 700.0)), "acc1": hits / targets}
        return figures | {"targets": targets}


def temperature_of(args: argparse.Namespace, name: str) -> flags.Moving | None:
    """Return the temperatures that a teacher's records are read at: of a source's own teacher, its
    own."""
    if args.eval_only:
        return None
    asked = args.temperature
    own = isinstance(asked, dict) and not args.combine and name in asked
    return flags.span(asked[name] if own else asked)


def part_of(batch: data.Batch, rows: np.ndarray, targets: np.ndarray) -> data.Batch:
    """Return what a teacher reads of some rows of a batch; rows (rows,) bool, targets: places."""
    at = torch.from_numpy(targets)
    return replace(
        batch,
        rows=[row for row, own in zip(batch.rows, rows) if own],
        numbers=batch.numbers[at],
        labels=batch.labels[at.to(batch.labels.device)],
    )


def row_ce(one: Records, name: str) -> np.ndarray:
    """Return the teacher's cross-entropy of each row of a split, summed; infinite where it has
    no record."""
    dataset = one.dataset
    if name == "val":
        none = np.full(len(dataset.val.rows), np.inf)
        return none if one.val is None else ce_of(one.val)
    found = np.full(len(dataset.train.rows), np.inf)
    for chunk, part in one.parts.items():
        rows = np.asarray(dataset.chunk_rows(chunk))
        found[rows] = ce_of(part)
    return found


def ce_of(part: Chunk) -> np.ndarray:
    """Return the teacher's cross-entropy of each row of a chunk (rows,), summed; infinite where it
    has no record."""
    done = part.done()
    return np.where(done["done"], done["ce_sum"], np.inf)


def likelier_of(ce: list[np.ndarray]) -> np.ndarray:
    """Return for each row the number of the teacher with the lowest cross-entropy, the first of
    several; -1 where none knows it."""
    stacked = np.stack(ce)
    return np.where(np.isinf(stacked).all(0), -1, stacked.argmin(0))
