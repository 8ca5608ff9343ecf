"""The teacher's records on disk as a `Teacher` (lib/teacher/__init__.py): the finished chunks of a
logits folder, checked against the data and read by target number (record.py says what they hold).
"""

import argparse
import collections
import hashlib
import itertools
import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.lib.recfunctions import require_fields

from lib import data, files, flags, losses, models, plan
from lib.head import ABSENT
from lib.teacher import basis, record
from lib.teacher.basis import Basis

GUESS_LIMIT = 0.01  # mean error of a tail's mass that is computed instead of read (a share of 1)
# what chunks that are read together share
ALIKE = (
    "teacher",
    "k",
    "temperatures",
    "values",
    "vocab",
    "tail_rank",
    "tail_bytes",
    "apart",
    "counted",
    "joint",
    "across",
    "only",
)


def dump_command(meta: dict, dataset: data.Dataset, out: Path, more: str) -> str:
    """Return the command that dumps what a meta.json describes once more."""
    given = {
        "k": meta.get("k"),
        "temperatures": ",".join(f"{t:g}" for t in meta.get("temperatures", [])),
        "values": meta.get("values"),
        "vocab": meta.get("vocab"),
        "tail-rank": meta.get("tail_rank"),
        "tail-bytes": meta.get("tail_bytes"),
    }
    teacher = ["--teacher", meta.get("teacher_folder")]
    if meta.get("dtype") == record.SERVED:
        teacher = ["--teacher-url", "URL", "--teacher-model", meta["teacher_folder"]]
    if origin := meta.get("imported"):
        teacher = ["--import", *origin["paths"], "--format", origin["format"]]
        if meta["teacher_folder"] != " ".join(origin["paths"]):
            teacher += ["--teacher-model", meta["teacher_folder"]]
    words = ["--data", dataset.folder, *teacher, "--out", out]
    for name, value in given.items():
        words += [f"--{name}", value] if value not in (None, "") else []
    if only := [dataset.sources[number] for number in meta.get("only", ())]:
        words += ["--only", *only]
    if "across" in meta:
        words += ["--align", "bytes"] if meta.get("joint") else ["--map-vocabulary"]
    return f"{files.command('dump_logits.py', *words)} {more}"


class Chunk:
    """One finished chunk (or val) of a logits folder, checked against the data it is to be used
    with."""

    def __init__(
        self, folder: Path, chunk: int | str, dataset: data.Dataset, verify: bool = False
    ) -> None:
        self.folder, path = folder, folder / "meta.json"
        what = f"--chunk {chunk} --fresh"
        self.meta = files.read_json(path, f"dump_logits.py with {what}")
        if self.meta.get("format") != record.FORMAT:
            files.fail(f"{folder} has another format", self.meta.get("format"), record.FORMAT, what)
        files.expect(path, self.meta, record.CHUNK_META, f"dump_logits.py with {what}")
        if self.meta["tail_rank"]:
            files.expect(path, self.meta, {"basis": str, "tail_bytes": int}, what)
        again = dump_command(self.meta, dataset, folder.parent, what)
        if self.meta["chunk"] != chunk:
            files.fail(f"{folder} holds another chunk", self.meta["chunk"], chunk, again)
        own, wanted = self.meta["identities"], dataset.identities
        for name, what in (("data", "other data"), ("vocabulary", "data of another tokenizer")):
            if own[name] != wanted[name]:
                files.fail(
                    f"{folder} was dumped from {what}",
                    f"{name} {own[name][:12]}",
                    f"{wanted[name][:12]} of {dataset.folder}",
                    again,
                )
        size, size_wanted = self.meta["rows_per_chunk"], dataset.meta["rows_per_chunk"]
        if chunk != "val" and size != size_wanted:
            files.fail(
                f"{folder} was cut otherwise than the data",
                f"{size} rows a chunk",
                size_wanted,
                again,
            )
        rows = dataset.val.rows
        if chunk != "val":
            rows = dataset.train.rows[dataset.chunk_rows(int(chunk))]
        self._open(int(rows["targets"].sum()), again, verify)
        # (rows,): which have records; None: all
        self.there = self.done(again)["done"] if self.meta.get("left_out") else None
        if self.there is not None and len(self.there) != len(rows):
            files.fail(f"{folder}/done.npy is not whole", len(self.there), len(rows), again)
        self.counts = rows["targets"]

    def done(self, again: str = "make logits") -> np.ndarray:
        """Return what done.npy holds (rows,): which rows are there, and the teacher's score."""
        return files.read_npy(self.folder / "done.npy", record.DONE, again)

    @property
    def numbers(self) -> np.ndarray:
        """The numbers of the records that there are."""
        there = np.arange(len(self.records))
        return there if self.there is None else there[np.repeat(self.there, self.counts)]

    def _open(self, targets: int, again: str, verify: bool) -> None:
        """Map the records; refuse those that are broken, and name the command `again`."""
        path = self.folder / "topk.npy"
        self.records = files.read_npy(path, record.dtype_of(self.meta), again)
        there = len(self.records)
        if {there, self.meta["targets"]} != {targets}:
            files.fail(f"{path} is not whole", f"{there} records", targets, again)
        self.checked = files.check(self.folder, self.meta, verify, again)
        if not self.checked and verify and files.sha256(path) != self.meta["sha256"]:
            files.fail(f"{path} is damaged", "another checksum than its meta.json", mend=again)
        if wrong := record.impossible(self.records, self.meta["vocab"]):
            files.fail(f"{path} holds what no teacher says", wrong, mend=again)


class Records:
    """The finished chunks of a logits folder, read by target number at one temperature, or at those
    from `temperature`'s first to its second.

    `temperature=None` is for measuring alone: val is enough then. `chunks` are the numbers of the
    train chunks that are there, `missing` those that are not; `val` is a Chunk or None.
    """

    model = None  # no teacher is here, but what it said (live.py)

    def __init__(
        self,
        folder: str | Path,
        dataset: data.Dataset,
        temperature: float | tuple[float, float] | None,
        verify: bool = False,
    ) -> None:
        self.folder, self.dataset, self.temperature = Path(folder), dataset, temperature
        self._open(verify)
        every = [*self.parts.values(), *([self.val] if self.val else [])]
        if not every or temperature is not None and not self.parts:
            files.fail(
                f"{folder} holds no finished chunk of {dataset.folder}",
                seen=f"0 of {dataset.chunks}",
                mend=self.mend(every),
            )
        check_alike(every)
        self.meta = every[0].meta
        self.vocab, self.temperatures = self.meta["vocab"], self.meta["temperatures"]
        # nothing is left for a tail: any temperature is exact
        self.whole = self.meta["k"] == self.vocab and not self.meta.get("counted")
        self.shape = self._basis(every if temperature is not None or not self.val else [self.val])
        self.leave_out(())
        self.placed: torch.device | None = None  # the device that it has been moved to
        # (temperature, mean, max): how far the tail's mass is off where it is computed and not
        # read, measured
        self.guess = None if temperature is None else self._worst_guess(every[0], temperature)
        first = dataset.train.rows["first_target"]
        self.starts = {c: int(first[dataset.chunk_rows(c).start]) for c in self.parts}

    def _open(self, verify: bool) -> None:
        """Open the chunks that are finished, and val."""
        if not self.folder.is_dir():
            files.fail(f"{self.folder} is missing", mend=self.mend([]))
        found: dict[int | str, Chunk] = {}
        for chunk in (*range(self.dataset.chunks), "val"):
            folder = record.chunk_folder(self.folder, chunk)
            if (folder / "meta.json").exists():
                found[chunk] = Chunk(folder, chunk, self.dataset, verify)
        if not all(part.checked for part in found.values()):
            files.say_none(self.folder)
        self.val = found.pop("val", None)
        self.parts = {int(chunk): part for chunk, part in found.items()}
        self.missing = [c for c in range(self.dataset.chunks) if c not in self.parts]

    def _basis(self, parts: list[Chunk]) -> Basis | None:
        """Return the folder's basis, refused where a chunk's coefficients were made with another
        one; None for dumps without."""
        if not self.meta["tail_rank"]:
            return None
        path = self.folder / basis.FILE
        again = dump_command(self.meta, self.dataset, self.folder, "--fresh")
        shape, _ = basis.load(path, f"the {basis.FILE} of the dump, copied to {path}, or {again}")
        seen = files.sha256(path)
        for part in parts:
            if part.meta["basis"] != seen:
                more = f"--chunk {part.meta['chunk']} --fresh"
                files.fail(
                    f"{path} does not belong to {part.folder}",
                    f"basis {seen[:12]}",
                    part.meta["basis"][:12],
                    f"its own {basis.FILE}, or"
                    f" {dump_command(part.meta, self.dataset, self.folder, more)}",
                )
        return shape

    def _worst_guess(
        self, part: Chunk, temperature: float | tuple[float, float]
    ) -> tuple[float, float, float] | None:
        """Return the worst of the guesses (`_can_guess`) that training at a temperature, or at
        those from its first to its second, has to make; None where it has to make none."""
        first, last = flags.ends(temperature)
        if self.whole:
            return None
        if first != last and self.shape is None:
            files.fail(
                f"--temperature {first:g}->{last:g} passes by temperatures that were not dumped",
                f"{self.folder}, without a basis",
                "a dump with one (--tail-rank above 0), or the teacher itself",
                "--teacher instead of --logits",
            )
        inside = [t for t in self.temperatures if min(first, last) < t < max(first, last)]
        passed = sorted({first, *inside, last})
        middles = [math.sqrt(a * b) for a, b in itertools.pairwise(passed)]
        wanted = sorted({first, last, *middles} - {*self.temperatures})
        guesses = [self._can_guess(part, t) for t in wanted]
        return max(guesses, key=lambda guess: guess[1], default=None)

    def _can_guess(self, part: Chunk, wanted: float) -> tuple[float, float, float]:
        """Measure how well the tail's mass at one dumped temperature follows from the others and
        the basis; refuse where it cannot be told.

        The temperature left out is the one nearest to what is wanted, which leaves a wider gap than
        the one to be bridged.
        """
        dumped = self.temperatures
        below, above = [t for t in dumped if t < wanted], [t for t in dumped if t > wanted]
        again = f"--temperature {dumped[0]:g}, or "
        if self.meta.get("dtype") == record.SERVED:
            again += "a teacher that is loaded here: of another T a server says nothing"
        elif self.meta.get("joint"):
            again += "a teacher of the student's tokenizer: a product says nothing of another T"
        elif self.meta.get("dtype") == record.IMPORTED:
            again += "a teacher that is loaded here: of another T the imported file says nothing"
        else:
            again += f"dump_logits.py --temperatures with {wanted:g} among them and --fresh"
        if self.shape is None or len(dumped) < 3 or not below or above and above[0] > 2 * below[-1]:
            files.fail(
                f"temperature {wanted:g} was not dumped",
                f"{self.folder} with {', '.join(f'{t:g}' for t in dumped)}",
                "one of these (with a basis and three of them, also a higher one, or one between"
                " two that lie within a factor of 2)",
                again,
            )
        left = min(dumped[1:], key=lambda t: abs(1 / t - 1 / wanted))
        others = [i for i, t in enumerate(dumped) if t != left]
        numbers = part.numbers
        records = part.records[numbers[:: max(1, len(numbers) // 512)][:512]]
        shape = self.shape.to(torch.device("cpu"))
        topk = record.unpack(records, self.vocab, dumped.index(left), shape)
        tails, known = record.tails_of(records)[:, others], [dumped[i] for i in others]
        computed = between(topk, tails, known, left)
        error = (record.rest_mass(computed, left) - record.rest_mass(topk, left)).abs()
        mean, worst = error.mean().item(), error.max().item()
        if not mean <= GUESS_LIMIT:  # nor NaN
            files.fail(
                f"temperature {wanted:g} was not dumped, and the basis cannot tell the tail's mass",
                f"a mean error of {mean:.3f} where T={left:g} is computed from the others",
                f"at most {GUESS_LIMIT:g}",
                again,
            )
        return left, mean, worst

    def leave_out(self, more: Iterable[int]) -> None:
        """Leave out of every distribution what the dump did, and `more` ids, of which the top k may
        hold some; their mass in a tail cannot be told from the others'."""
        dumped = {*self.meta.get("apart", [])}
        self.apart = tuple(sorted({*more} | dumped))
        self.unforeseen = torch.tensor(sorted({*more} - dumped), dtype=torch.int64)
        none = {id for id in (*self.apart, *self.meta.get("no_mass", ())) if id < self.vocab}
        if self.shape is not None and none:
            self.shape = replace(self.shape, apart=torch.tensor(sorted(none)))

    @property
    def name(self) -> str:
        """The teacher's folder, or hub id."""
        return self.meta["teacher_folder"]

    @property
    def each(self) -> list[tuple[str, str]]:
        """The teacher's name and identity; "" where nobody knows the weights: of a served one, and
        of an imported one."""
        elsewhere = self.meta.get("dtype") in (record.SERVED, record.IMPORTED)
        return [(self.name, "" if elsewhere else self.meta["teacher"])]

    @property
    def compares(self) -> bool:
        """Whether val rows can be compared with the teacher: a val dump is there with some record,
        and T=1 is in it."""
        if self.val is None or self.val.there is not None and not self.val.there.any():
            return False
        return 1 in self.temperatures or self.whole

    @property
    def over(self) -> str:
        """What KL is summed over."""
        if self.shape is not None:
            return f"all {self.vocab:,} tokens, those outside the top k in the basis' shape"
        if self.whole:
            return f"all {self.vocab:,} tokens"
        return f"the top {self.meta['k']} and one bucket of all others (a lower bound)"

    @property
    def chunks(self) -> list[int]:
        return sorted(self.parts)

    def memory_bytes(self, device: torch.device, targets: int) -> int:
        """Return what the basis takes on a device, with the temporaries of a divergence over all
        tokens."""
        if self.shape is None:
            return 0
        each = 2 if device.type == "cuda" else 4
        return each * self.shape.rows.numel() + losses.dense_bytes(device, 4 * targets * self.vocab)

    def identity(self) -> dict:
        """Return what a run that is continued must find again: the teacher, and the train records
        that are there."""
        hashes = "".join(self.parts[chunk].meta["sha256"] for chunk in self.chunks)
        records = hashlib.sha256(hashes.encode()).hexdigest()
        return {"teacher": self.meta["teacher"], "chunks": self.chunks, "records": records}

    def join(
        self,
        student: models.Model,
        args: argparse.Namespace,
        amp: torch.dtype | None,
        rows: plan.Rows | None = None,
    ) -> models.Model:
        """Return the student cut to the records' tokens; refuse one that lacks some of them."""
        if student.vocab < self.vocab:
            more = f"--student {args.student} --fresh"
            files.fail(
                f"{student.folder} knows fewer tokens than the logits",
                f"{student.vocab:,}",
                f"at least {self.vocab:,}",
                dump_command(self.meta | {"vocab": None}, self.dataset, self.folder, more),
            )
        self.leave_out(student.apart)
        return replace(student, limit=self.vocab, apart=self.apart)

    def say(self) -> None:
        """Print what the teacher is, how much of it is there, and what is missing."""
        inside = "  ".join(f"T={t} {share:.1%}" for t, share in self.meta["coverage"].items())
        print(
            f"teacher: {self.meta['teacher_folder']}, top {self.meta['k']} of {self.vocab:,}, which"
            f" hold {inside}"
        )
        if self.shape is not None:
            print(
                f"the rest: its exact mass, in a shape of {len(self.shape.bits)} dimensions"
                f" ({self.meta['tail_bytes']} bytes a target)"
            )
        elif self.meta.get("dtype") == record.SERVED:
            print("the rest: one bucket, at T=1 alone: a server filled these records")
        elif self.meta.get("dtype") == record.IMPORTED:
            print("the rest: one bucket, at T=1 alone: these records are another tool's")
        if self.guess:
            t, mean, worst = self.guess
            print(
                f"the rest: not every T of {self.temperature} was dumped, and its mass is computed;"
                f" T={t:g}, computed from the others in the same way, is off by {mean:.4f} on"
                f" average, {worst:.4f} at most (shares of 1)"
            )
        if self.missing and self.temperature is not None:
            print(
                f"logits: chunks {', '.join(map(str, self.missing))} are missing and will not be"
                f" trained on; {self.mend([*self.parts.values()])}"
            )
        for why, count in self._left_out().items():
            print(f"logits: {count:,} rows have no record ({why})")
        if self.compares:
            assert self.val is not None
            known = record.said_at(self.val.records, self.val.numbers)["known"]
            all_of = self.dataset.val.targets
            some = "" if known == all_of else f", at {known:,} of {all_of:,} targets"
            print(f"val: kl and rkl are over {self.over}{some}")
        elif not len(self.dataset.val.rows):
            print("logits: the data has no val rows, so no KL to the teacher")
        else:
            print(
                "logits: no val dump with T=1, so no KL to the teacher; "
                + dump_command(self.meta, self.dataset, self.folder, "--chunk val")
                + ("" if 1 in self.temperatures else " (with --temperatures that have 1, and all)")
            )

    def _left_out(self) -> dict[str, int]:
        """Return how many rows of all chunks have no record, by the reason."""
        found: collections.Counter[str] = collections.Counter()
        for part in (*self.parts.values(), *([self.val] if self.val else [])):
            found.update(part.meta.get("left_out", {}))
        return dict(found)

    def val_measures(self) -> dict | None:
        """Return the teacher's own measures on val, as far as the dump tells them, if val was
        dumped."""
        if self.val is None:
            return None
        ce, acc1 = self.val.meta["teacher_ce"], self.val.meta["teacher_acc1"]
        targets = sum(record.said_at(self.val.records, self.val.numbers).values())
        return {"ce": ce, "ppl": math.exp(min(ce, 700.0)), "acc1": acc1, "targets": targets}

    @property
    def answers(self) -> dict[str, list[int]] | None:
        """What the teacher answered to a few val prompts, if val was dumped with that."""
        return self.val.meta.get("answers") if self.val else None

    def mend(self, there: list[Chunk]) -> str:
        """Return the command that brings what is missing, with the teacher and the flags of what is
        there."""
        which = f"--chunk {self.missing[0]}" if there and len(self.missing) == 1 else "--chunk all"
        meta = there[0].meta if there else {"teacher_folder": "TEACHER"}
        return dump_command(meta, self.dataset, self.folder, which)

    def rows(self) -> np.ndarray:
        """Return the numbers of all train rows that have records."""
        found = []
        for chunk in self.chunks:
            rows, there = np.asarray(self.dataset.chunk_rows(chunk)), self.parts[chunk].there
            found.append(rows if there is None else rows[there])
        return np.concatenate(found)

    def at(self, batch: data.Batch, temperature: float) -> losses.TopK:
        """Return the teacher at a train batch's targets and a temperature, on the device of its
        labels."""
        size, numbers = self.dataset.meta["rows_per_chunk"], batch.numbers.numpy()
        slices, at = [] if batch.rows else [next(iter(self.parts.values())).records[:0]], 0
        for row in batch.rows:  # a row is one slice of one chunk
            count, chunk = int(self.dataset.train.rows[row]["targets"]), row // size
            start = int(numbers[at]) - self.starts[chunk] if count else 0
            slices.append(self.parts[chunk].records[start : start + count])
            at += count
        widest = max((part.dtype for part in slices), key=lambda dtype: dtype.itemsize)
        # chunks of older dumps lack a field: as if it were 0
        slices = [part if part.dtype == widest else require_fields(part, widest) for part in slices]
        return self._topk(np.concatenate(slices), temperature, batch)

    def val_at(self, batch: data.Batch, temperature: float) -> losses.TopK | None:
        """Return the teacher at a val batch's targets and a temperature, or None if it was not
        dumped."""
        if self.val is None or temperature not in self.temperatures and not self.whole:
            return None
        topk = self._topk(self.val.records[batch.numbers.numpy()], temperature, batch)
        if self.val.there is None:
            return topk
        there = np.repeat(self.val.there[batch.rows], self.val.counts[batch.rows])
        count = torch.from_numpy(there).to(topk.ids.device) * topk.ids.shape[1]
        return replace(topk, count=count if topk.count is None else count.minimum(topk.count))

    def _topk(self, records: np.ndarray, temperature: float, batch: data.Batch) -> losses.TopK:
        """Return unpacked records on the device of the batch's labels. The tail at a temperature
        that was not dumped is computed from the others."""
        device = batch.labels.device
        if self.shape is not None and self.placed != device:  # once
            self.shape, self.placed = self.shape.to(device), device
        dumped = temperature in self.temperatures
        # the nearest one says where there is no shape
        nearest = min(self.temperatures, key=lambda t: abs(1 / t - 1 / temperature))
        column = self.temperatures.index(nearest)
        topk = record.unpack(records, self.vocab, column, self.shape)
        if len(self.unforeseen):
            other, unknown = torch.isin(topk.ids, self.unforeseen), topk.unknown
            gap = topk.gap.masked_fill(other, -ABSENT)
            if unknown is not None:  # these stay the last
                gap = gap.masked_fill(unknown, -2 * ABSENT)
            gap, order = gap.sort(dim=1, stable=True)
            topk = replace(topk, ids=topk.ids.gather(1, order), gap=gap)

        def move(tensor):
            return tensor.to(batch.labels.device, non_blocking=True)

        topk = replace(topk, ids=move(topk.ids), gap=move(topk.gap), tail=move(topk.tail))
        if topk.shapeless is not None:
            topk = replace(topk, shapeless=move(topk.shapeless))
        if topk.count is not None:
            topk = replace(topk, count=move(topk.count))
        if topk.joint is not None:
            topk = replace(topk, joint=move(topk.joint))
        if dumped or self.whole:
            return topk
        return between(topk, move(record.tails_of(records)), self.temperatures, temperature)


def between(
    topk: losses.TopK, tails: torch.Tensor, dumped: list[float], temperature: float
) -> losses.TopK:
    """Return the teacher at a temperature that was not dumped; tails (n, len(dumped)) are known."""
    assert isinstance(topk.basis, Basis) and topk.coef is not None, f"T={temperature}: no basis"
    tail = basis.tail_between(topk.basis, topk.ids, topk.coef, tails, dumped, temperature)
    return replace(topk, tail=tail)


def check_alike(parts: list[Chunk]) -> None:
    """Refuse chunks that were dumped with different settings."""
    first = parts[0]
    for part in parts[1:]:
        for name in ALIKE:
            if part.meta.get(name) != first.meta.get(name):
                files.fail(
                    f"{part.folder} and {first.folder} do not belong together",
                    f"{name} {part.meta.get(name)}",
                    first.meta.get(name),
                    "python dump_logits.py --fresh for one of them, with the other's flags",
                )
