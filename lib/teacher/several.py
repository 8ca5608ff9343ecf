"""Several teachers as one, each a folder of records (stage2_kd.py --logits NAME=DIR NAME=DIR) or
each live (--teacher NAME=DIR NAME=DIR): the rows of a source learn from its own, or all rows from
what the teachers say together (--combine).

    no --combine   NAME is a source: its rows, of train and val, are taught by that folder's teacher
    best           of each row the teacher that finds it likelier (the lower cross-entropy, which a
                   dump has noted: not of live ones)
    mean           the average of the softened probabilities, over all teachers
    product        the normalised geometric mean: the average of the softened logits

Every teacher is asked as if it stood alone (logits.Records, live.LiveTeacher), and no more than it
has to teach: a live one reads the lines of its own rows, and a train micro-batch holds rows of one
source alone. A target's distribution over all V tokens is made of it where the loss is (`Mixed`):
the rest of a record without a shape goes as the student's own tail does, which is one bucket
exactly (losses.TopK.logits).
"""

import argparse
import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lib import data, evaluate, files, flags, losses, models, plan
from lib.teacher import record
from lib.teacher.live import LiveTeacher, output_layer, rooms_of
from lib.teacher.logits import Chunk, Records

HOW = ("best", "mean", "product")
# at or val_at of one teacher
Way = Callable[[data.Batch, float], losses.Distribution | None]


def add_flags(group: argparse._ArgumentGroup) -> None:
    """Add how several teachers are combined; what names them is --logits or --teacher."""
    group.add_argument(
        "--combine",
        choices=HOW,
        help=(
            "of several NAME=DIR of --logits or --teacher, each over the same rows: the teacher"
            " that finds a row likeliest (--logits), or the average of their probabilities, or of"
            " their logits (default: each NAME is a source, and teaches its rows)"
        ),
    )


def check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse (exit code 2) flags that cannot work together; put --logits and --teacher into one
    word each."""
    named = [flags.join_folders(parser, args, name) for name in ("logits", "teacher")]
    if args.combine and max(map(len, named)) < 2:
        parser.error("--combine needs two or more NAME=DIR of --logits or --teacher")
    if args.combine == "best" and args.teacher:
        parser.error(
            "--combine best goes by each row's cross-entropy, which a dump has noted: wanted"
            " --logits, or with --teacher mean or product"
        )


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


class Together:
    """Several teachers as one (lib/teacher/__init__.py, class Teacher): what does not depend on
    where they are. of: each, by its name; owner: the number of the teacher of each row of a split,
    -1 where it has none."""

    model: None = None  # none is all of them
    of: Mapping[str, Records | LiveTeacher]
    flag: str  # that names them
    vocab: int

    def __init__(self, args: argparse.Namespace, dataset: data.Dataset) -> None:
        self.dataset, self.how = dataset, args.combine or ""
        self.owner = {split: self._owners(split) for split in ("train", "val")}

    def _owners(self, name: str) -> np.ndarray:
        """Return the number of the teacher of each row of a split, -1 where it has none."""
        rows = getattr(self.dataset, name).rows
        return np.zeros(len(rows), np.int64) if self.how else self._by_source()[rows["source"]]

    def _by_source(self) -> np.ndarray:
        """Return the number of the teacher of each source, -1 of those without rows; refuse names
        that are no sources, and sources without a teacher."""
        names, number = self.dataset.sources, {n: i for i, n in enumerate(self.of)}
        if unknown := sorted({*self.of} - {*names}):
            files.fail(
                f"{self.flag} names a source that is not in {self.dataset.folder}",
                ", ".join(unknown),
                f"names among {', '.join(names) or '(none there)'}",
                f"{self.flag} SOURCE=DIR, or --combine mean over the same rows",
            )
        there = np.union1d(self.dataset.train.rows["source"], self.dataset.val.rows["source"])
        if without := [names[i] for i in there.tolist() if names[i] not in number]:
            files.fail(
                "a source has no teacher",
                ", ".join(without),
                "a folder for each source",
                f"{self.flag} {without[0]}=DIR beside the others",
            )
        return np.array([number.get(source, -1) for source in names])

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

    def joined(self, what: str) -> str:
        """Return one hash of what the teachers' identities hold under a name."""
        text = " ".join(f"{name}={one.identity()[what]}" for name, one in self.of.items())
        return hashlib.sha256(f"{self.how} {text}".encode()).hexdigest()

    def rows(self) -> np.ndarray:
        """Return the train rows that have their teacher, or all teachers that are combined."""
        there = [
            np.isin(np.arange(len(self.owner["train"])), one.rows()) for one in self.of.values()
        ]
        if self.how:
            return np.flatnonzero(np.all(there, 0))
        owner = self.owner["train"]
        return np.flatnonzero(np.any([(owner == i) & one for i, one in enumerate(there)], 0))

    def say(self) -> None:
        said = self.how or "each source's rows learn from their own"
        print(f"teachers: {len(self.of)}, {said}")
        for name, one in self.of.items():
            print(f"--- {name}:")
            one.say()

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
        rows = np.array(batch.rows, int)
        owner = self.owner[name][rows]
        counts = getattr(self.dataset, name).rows["targets"][rows].astype(int)
        together = self.how in ("mean", "product")
        for number in range(len(ways)) if together else np.unique(owner).tolist() or [0]:
            own = np.ones(len(rows), bool) if together else owner == number
            targets = np.flatnonzero(np.repeat(own, counts))
            known = ways[number](part_of(batch, own, targets), temperature)
            if known is None:
                return None
            if own.all() and not together:
                return known
            parts.append((None if together else targets, known))
        return Mixed(parts, self.how if together else "")


class Several(Together):
    """Several `Records` as one teacher."""

    of: dict[str, Records]
    flag = "--logits"

    def __init__(self, args: argparse.Namespace, dataset: data.Dataset, folders: dict) -> None:
        self.of = {
            name: Records(folder, dataset, temperature_of(args, name), args.verify)
            for name, folder in folders.items()
        }
        first, *others = self.of
        self.vocab = self.of[first].vocab
        self.joint = any(one.meta.get("joint") for one in self.of.values())
        if self.joint and args.combine == "best":
            files.fail(
                "--combine best does not go with records of --align bytes",
                "groups of tokens, which belong to one teacher's rows",
                "mean or product, or a teacher for each source",
            )
        for name in others:
            check_same_tokens(
                self, name, first, "dump_logits.py --vocab, or --student, the same for each"
            )
        super().__init__(args, dataset)

    def _owners(self, name: str) -> np.ndarray:
        if self.how == "best":
            return likelier_of([row_ce(one, name) for one in self.of.values()])
        return super()._owners(name)

    def identity(self) -> dict:
        chunks = {name: one.chunks for name, one in self.of.items()}
        return {
            "teacher": self.joined("teacher"),
            "chunks": chunks,
            "records": self.joined("records"),
        }

    def join(
        self,
        student: models.Model,
        args: argparse.Namespace,
        amp: torch.dtype | None,
        rows: plan.Rows | None = None,
    ) -> models.Model:
        for one in self.of.values():
            student = one.join(student, args, amp, rows)
        if self.joint and not self.how and rows is not None:
            rows.keep_apart(self._by_source())  # groups of tokens are compared by a teacher alone
        apart = student.apart  # of all together
        for one in self.of.values():
            one.leave_out(apart)
        return student

    def say(self) -> None:
        super().say()
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
        owner = self.owner["val"]
        ce, hits, targets = 0.0, 0, 0
        for number, val in enumerate(vals):
            done, own = val.done(), owner == number
            ce, hits = ce + float(done["ce_sum"][own].sum()), hits + int(done["hits"][own].sum())
            targets += int(heard_by_row(val)[own & done["done"]].sum())
        if not targets:
            return None
        ce /= targets
        figures = {"ce": ce, "ppl": math.exp(min(ce, 700.0)), "acc1": hits / targets}
        return figures | {"targets": targets}


class SeveralLive(Together):
    """Several `LiveTeacher` as one teacher, all of them loaded beside the student; two names of one
    folder are one model."""

    of: dict[str, LiveTeacher]
    flag = "--teacher"
    answers: None = None  # of all together; each could be asked itself

    def __init__(self, args: argparse.Namespace, dataset: data.Dataset, folders: dict) -> None:
        made: dict[str, LiveTeacher] = {}
        for number, folder in enumerate(dict.fromkeys(folders.values())):
            own = argparse.Namespace(**{**vars(args), "teacher": folder})
            made[folder] = LiveTeacher(own, dataset, number)
        self.of = {name: made[folder] for name, folder in folders.items()}
        self.loaded = [*made.values()]
        super().__init__(args, dataset)

    def identity(self) -> dict:
        return {"teacher": self.joined("teacher")}

    def join(
        self,
        student: models.Model,
        args: argparse.Namespace,
        amp: torch.dtype | None,
        rows: plan.Rows | None = None,
    ) -> models.Model:
        rooms = rooms_of(self.loaded, self.memory_bytes, student, amp, rows)
        for one, room in zip(self.loaded, rooms):
            student = one.load_beside(student, room)
        first, *others = self.of
        self.vocab = self.of[first].vocab
        for name in others:
            check_same_tokens(self, name, first, "--logits, dumped with one --vocab for each")
        for one in self.loaded:
            one.leave_out(student.apart)  # of all together
        if rows is not None and not self.how:
            rows.keep_apart(self._by_source())
        return student

    def memory_bytes(self, device: torch.device, targets: int) -> int:
        """Return what each keeps beside its weights, what the largest takes in a pass (they run one
        after the other), and what it takes to compare with several at once."""
        kept = [one.kept_bytes(device) for one in self.loaded]
        passes = [one.memory_bytes(device, targets) - own for one, own in zip(self.loaded, kept)]
        vocab = max(output_layer(one.shapes)[0] for one in self.loaded)
        more = losses.dense_bytes(device, 4 * targets * vocab)
        return sum(kept) + max(passes) + more * (len(self.of) if self.how else 1)

    def val_measures(self) -> dict | None:
        """Return the teachers' own measures, each on the rows that it teaches, and the
        cross-entropy of each; None of an average, which is no model."""
        val, found = self.dataset.val, {}
        for number, (name, one) in enumerate(self.of.items()):
            own = np.flatnonzero(self.owner["val"] == number).tolist()
            if not self.how and val.rows["targets"][own].any():
                rows = [(*val.row(row), int(val.rows["source"][row])) for row in own]
                found[name] = one.measures(data.Split.of(rows))
        if not found:
            return None
        targets = sum(one["targets"] for one in found.values())
        whole = {
            column: sum(one[column] * one["targets"] for one in found.values()) / targets
            for column in ("ce", "acc1", "acc5")
        }
        ce, names = whole.pop("ce"), evaluate.sources_apart(val, self.dataset.sources)
        by_source = {f"ce_{name}": found[name]["ce"] for _, name in names if name in found}
        return {"ce": ce, "ppl": math.exp(min(ce, 700.0)), **whole, **by_source, "targets": targets}


def check_same_tokens(teachers: Together, name: str, other: str, mend: str) -> None:
    """Refuse two teachers over different tokens."""
    vocab, wanted = teachers.of[name].vocab, teachers.of[other].vocab
    if vocab != wanted:
        files.fail(
            f"the teachers of {teachers.flag} know different tokens",
            f"{vocab:,} in {name}",
            f"{wanted:,} as in {other}",
            mend,
        )


def temperature_of(args: argparse.Namespace, name: str) -> flags.Moving | None:
    """Return the temperatures that a teacher's records are read at: of a source's own teacher, its
    own."""
    if args.eval_only:
        return None
    asked = args.temperature
    own = isinstance(asked, dict) and not args.combine and name in asked
    return flags.span(asked[name] if own else asked)


def part_of(batch: data.Batch, rows: np.ndarray, targets: np.ndarray) -> data.Batch:
    """Return some rows of a batch, on the lines that hold them; rows (rows,) bool, targets: places
    of theirs. What else lies on these lines stays there, as padding does."""
    if rows.all():
        return batch
    place = np.full(len(rows) + 1, -1)  # the last one: of padding
    place[:-1][rows] = np.arange(int(rows.sum()))
    row_of = torch.from_numpy(place)[batch.row_of]
    lines, width = (row_of >= 0).any(1), row_of.shape[1]
    back = torch.arange(len(lines)) - (lines.cumsum(0) - 1)  # how many lines before it are left out
    device = batch.labels.device
    at, kept, back = (x.to(device) for x in (torch.from_numpy(targets), lines, back))
    where = batch.where[at]
    return replace(
        batch,
        tokens=batch.tokens[kept],
        positions=batch.positions[kept],
        where=where - width * back[where // width],
        labels=batch.labels[at],
        numbers=batch.numbers[torch.from_numpy(targets)],
        rows=[row for row, own in zip(batch.rows, rows) if own],
        row_of=row_of[lines],
    )


def row_ce(one: Records, name: str) -> np.ndarray:
    """Return the teacher's cross-entropy of each row of a split, a target of which it says
    something; infinite where it has no record."""
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
    """Return `row_ce` of the rows of a chunk (rows,)."""
    done, heard = part.done(), heard_by_row(part)
    return np.where(done["done"] & (heard > 0), done["ce_sum"] / np.maximum(heard, 1), np.inf)


def heard_by_row(part: Chunk) -> np.ndarray:
    """Return at how many targets of each row of a chunk its teacher says something."""
    return record.heard_of_rows(part.records, part.counts)


def likelier_of(ce: list[np.ndarray]) -> np.ndarray:
    """Return for each row the number of the teacher with the lowest cross-entropy, the first of
    several; -1 where none knows it."""
    stacked = np.stack(ce)
    return np.where(np.isinf(stacked).all(0), -1, stacked.argmin(0))
