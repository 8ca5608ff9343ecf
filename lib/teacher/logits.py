"""The teacher's top-k logits on disk: one memory-mapped record per target, in target order.

    logits/NAME/chunk-0003/topk.npy   structured (targets of the chunk,); fields of `record_dtype`
                           done.npy   DONE (rows of the chunk,): which rows are written, with the
                                      teacher's own score on them
                           meta.json  written last: identities, k, temperatures, V, sha256 of
                                      topk.npy, the teacher's figures
    logits/NAME/val/       the same for the val split
    logits/NAME/basis.safetensors    the basis that all of them share, unless --tail-rank is 0
                                     (lib/teacher/basis.py)

A record keeps, largest logit first: the k token ids (16 low bits, and the high bits packed where V
> 65,536), `gap` = z_max - z_i (float16, or uint8 with one scale a record), for every dumped T
`tail` = log of the sum over the other V - k tokens of exp((z_j - z_max)/T), float32, and `coef`,
the shape of the tail: coefficients over the basis, packed as the basis says. Never raw logits:
float16 of z costs 1.7e-3 nats of KL, float16 of z_max - z 4e-7.

Worked example: V = 151,936, three temperatures: k = 32, float16, no basis 64 + 8 + 64 + 12 = 148
bytes a target; k = 24, uint8 and 104 bytes of coefficients 48 + 6 + 24 + 2 + 104 + 12 = 196.
"""

import hashlib
import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from lib import data, files, flags, losses, models
from lib.teacher import basis
from lib.teacher.basis import Basis

FORMAT = 1
DONE = np.dtype([("done", "?"), ("ce_sum", "<f8"), ("hits", "<u4")])
LARGEST_GAP = 60_000.0  # float16 ends at 65,504
GUESS_LIMIT = 0.01  # mean error of a tail's mass that is computed instead of read (a share of 1)


def high_bits(vocab: int) -> int:
    """Return the bits an id needs above its low 16: 0, 2 (V up to 262,144) or 4 (up to
    1,048,576)."""
    return 0 if vocab <= 1 << 16 else 2 if vocab <= 1 << 18 else 4


def record_dtype(
    k: int, temperatures: list[float], vocab: int, values: str, tail_bytes: int = 0
) -> np.dtype:
    """Return the dtype of one target's record; its itemsize is the bytes a target takes."""
    fields = [("id_low", "<u2", (k,))]
    if bits := high_bits(vocab):
        fields.append(("id_high", "u1", (-(-k * bits // 8),)))
    fields += (
        [("gap", "<f2", (k,))] if values == "fp16" else [("gap", "u1", (k,)), ("scale", "<f2")]
    )
    if tail_bytes:
        fields.append(("coef", "u1", (tail_bytes,)))
    return np.dtype(fields + [("tail", "<f4", (len(temperatures),))])


def encode(
    ids: np.ndarray,
    gaps: np.ndarray,
    tails: np.ndarray,
    dtype: np.dtype,
    vocab: int,
    coef: np.ndarray | None = None,
) -> np.ndarray:
    """Return records (n,) of ids (n, k), gaps (n, k), tails (n, temperatures) and packed
    coefficients (n, bytes)."""
    records = np.zeros(len(ids), dtype)
    records["id_low"] = ids & 0xFFFF
    if bits := high_bits(vocab):
        per = 8 // bits
        high = np.zeros((len(ids), dtype["id_high"].shape[0] * per), np.uint8)
        high[:, : ids.shape[1]] = ids >> 16
        records["id_high"] = (
            high.reshape(len(ids), -1, per) << (bits * np.arange(per, dtype=np.uint8))
        ).sum(-1)
    if "scale" in dtype.names:
        scale = (gaps.max(1).clip(max=LARGEST_GAP) / 255).astype(np.float16)
        scale = np.where(
            scale.astype(np.float32) * 255 < gaps.max(1),
            np.nextafter(scale, np.float16(np.inf)),
            scale,
        )  # never round the range down
        records["scale"] = scale
        records["gap"] = np.rint(gaps / np.maximum(scale.astype(np.float32), 1e-12)[:, None]).clip(
            0, 255
        )
    else:
        records["gap"] = gaps.clip(max=LARGEST_GAP)
    if coef is not None:
        records["coef"] = coef
    records["tail"] = tails
    return records


def decode(records: np.ndarray, vocab: int, column: int, shape: Basis | None = None) -> losses.TopK:
    """Return what the loss needs of records (n,), on the CPU: ids, gaps, and the tail at dumped
    temperature number `column`; with the folder's basis also the coefficients, on its device."""
    ids = records["id_low"].astype(np.int64)
    if bits := high_bits(vocab):
        shifts = bits * np.arange(8 // bits, dtype=np.uint8)
        high = (records["id_high"][:, :, None] >> shifts) & ((1 << bits) - 1)
        ids |= high.reshape(len(records), -1)[:, : ids.shape[1]].astype(np.int64) << 16
    gap = records["gap"].astype(np.float32)
    if "scale" in records.dtype.names:
        gap *= records["scale"].astype(np.float32)[:, None]
    kept = losses.TopK(
        torch.from_numpy(ids),
        torch.from_numpy(gap),
        torch.from_numpy(records["tail"][:, column].astype(np.float32)),
    )
    return kept if shape is None else replace(kept, coef=shape.unpack(records["coef"]), basis=shape)


def rest_mass(kept: losses.TopK, temperature: float) -> torch.Tensor:
    """Return the teacher's mass (n,) outside its top k at a temperature: what `tail` says, as a
    share of 1."""
    return losses.teacher_logp(kept, temperature)[:, -1].exp()


def chunk_folder(folder: Path, chunk: int | str) -> Path:
    """Return the folder of a chunk number, or of "val"."""
    return Path(folder) / ("val" if chunk == "val" else f"chunk-{chunk:04d}")


def dump_command(meta: dict, dataset: data.Dataset, out: Path, more: str) -> str:
    """Return the command that dumps what a meta.json describes once more."""
    flags = {
        "k": meta.get("k"),
        "temperatures": ",".join(f"{t:g}" for t in meta.get("temperatures", [])),
        "values": meta.get("values"),
        "vocab": meta.get("vocab"),
        "tail-rank": meta["tail_rank"],
        "tail-bytes": meta.get("tail_bytes"),
    }
    flags = " ".join(
        f"--{name} {value}" for name, value in flags.items() if value not in (None, "")
    )
    return (
        f"python dump_logits.py --data {dataset.folder} --teacher {meta.get('teacher_folder')}"
        f" --out {out} {flags} {more}"
    )


class Chunk:
    """One finished chunk (or val) of a logits folder, checked against the data it is to be used
    with."""

    def __init__(self, folder: Path, dataset: data.Dataset, verify: bool = False) -> None:
        self.folder, self.meta = (
            folder,
            {"tail_rank": 0} | files.read_json(folder / "meta.json"),
        )  # before there was a basis
        again = dump_command(
            self.meta, dataset, folder.parent, f"--chunk {self.meta.get('chunk')} --fresh"
        )
        if self.meta.get("format") != FORMAT:
            files.fail(f"{folder} has another format", self.meta.get("format"), FORMAT, again)
        for name, what in (
            ("data", "other data"),
            ("vocabulary", "a teacher with another vocabulary"),
        ):
            if self.meta["identities"][name] != dataset.identities[name]:
                files.fail(
                    f"{folder} was dumped from {what}",
                    f"{name} {self.meta['identities'][name][:12]}",
                    f"{dataset.identities[name][:12]} of {dataset.folder}",
                    again,
                )
        if (
            self.meta["chunk"] != "val"
            and self.meta["rows_per_chunk"] != dataset.meta["rows_per_chunk"]
        ):
            files.fail(
                f"{folder} was cut otherwise than the data",
                f"{self.meta['rows_per_chunk']} rows a chunk",
                f"{dataset.meta['rows_per_chunk']}",
                again,
            )
        try:
            self.records = np.load(folder / "topk.npy", mmap_mode="r")
        except (OSError, ValueError) as broken:
            files.fail(f"{folder}/topk.npy cannot be read", broken, mend=again)
        if len(self.records) != self.meta["targets"]:
            files.fail(
                f"{folder}/topk.npy is not whole",
                f"{len(self.records)} records",
                f"{self.meta['targets']}",
                again,
            )
        if verify and files.sha256(folder / "topk.npy") != self.meta["sha256"]:
            files.fail(
                f"{folder}/topk.npy is damaged", "another checksum than its meta.json", mend=again
            )


class Records:
    """The finished chunks of a logits folder, read by target number at one temperature, or at those
    from `temperature`'s first to its second.

    `temperature=None` is for measuring alone: val is enough then. `chunks` are the numbers of the
    train chunks that are there, `missing` those that are not; `val` is a Chunk or None.
    """

    model = None  # no teacher is here, but what it said (lib/teacher/live.py)

    def __init__(
        self,
        folder: str | Path,
        dataset: data.Dataset,
        temperature: float | tuple[float, float] | None,
        verify: bool = False,
    ) -> None:
        self.folder, self.dataset = Path(folder), dataset
        if not self.folder.is_dir():
            files.fail(
                f"{folder} is missing",
                mend=f"make logits NAME={dataset.folder.name} (python dump_logits.py --help)",
            )
        whole = [
            c
            for c in range(dataset.chunks)
            if (chunk_folder(self.folder, c) / "meta.json").exists()
        ]
        self.missing = sorted(set(range(dataset.chunks)) - set(whole))
        self.parts = {c: Chunk(chunk_folder(self.folder, c), dataset, verify) for c in whole}
        val = chunk_folder(self.folder, "val")
        self.val = Chunk(val, dataset, verify) if (val / "meta.json").exists() else None
        every = [*self.parts.values(), *([self.val] if self.val else [])]
        if temperature is not None and not self.parts or not every:
            files.fail(
                f"{folder} holds no finished chunk of {dataset.folder}",
                seen=f"0 of {dataset.chunks}",
                mend=self.mend(),
            )
        self.meta = every[0].meta
        for part in every[1:]:
            for name in (
                "teacher",
                "k",
                "temperatures",
                "values",
                "vocab",
                "tail_rank",
                "tail_bytes",
            ):
                if part.meta.get(name) != self.meta.get(name):
                    files.fail(
                        f"{part.folder} and {every[0].folder} do not belong together",
                        f"{name} {part.meta.get(name)}",
                        self.meta.get(name),
                        "python dump_logits.py --fresh for one of them, with the other's flags",
                    )
        self.vocab, self.temperatures = self.meta["vocab"], self.meta["temperatures"]
        self.whole = (
            self.meta["k"] == self.vocab
        )  # nothing is left for a tail: any temperature is exact
        self.shape = (
            None if temperature is None else self._basis(every)
        )  # measuring asks for the top k and their rest alone
        self.placed = None  # the device that it has been moved to
        self.temperature = temperature
        # (temperature, mean, max): how far the tail's mass is off where it is computed and not
        # read, measured
        self.guess = None
        if temperature is not None:
            first, last = flags.ends(temperature)
            if first != last and self.shape is None and not self.whole:
                files.fail(
                    f"--temperature {first:g}->{last:g} passes by temperatures that were not"
                    " dumped",
                    f"{folder}, without a basis",
                    "a dump with one (--tail-rank above 0), or the teacher itself",
                    "--teacher instead of --logits",
                )
            inside = [t for t in self.temperatures if min(first, last) < t < max(first, last)]
            between = [
                math.sqrt(a * b) for a, b in itertools.pairwise(sorted({first, *inside, last}))
            ]
            guesses = [
                self._can_guess(every[0], t)
                for t in sorted({first, last, *between})
                if t not in self.temperatures and not self.whole
            ]
            self.guess = max(guesses, key=lambda guess: guess[1], default=None)
        first = dataset.train.rows["first_target"]
        self.starts = {c: int(first[dataset.chunk_rows(c).start]) for c in self.parts}

    def _basis(self, parts: list[Chunk]) -> Basis | None:
        """Return the folder's basis, refused where a chunk's coefficients were made with another
        one; None for dumps without."""
        if not self.meta["tail_rank"]:
            return None
        path = self.folder / basis.NAME
        mend = (
            f"the {basis.NAME} of the dump, copied to {path}, or"
            f" {dump_command(self.meta, self.dataset, self.folder, '--fresh')}"
        )
        shape, _ = basis.load(path, mend)
        seen = files.sha256(path)
        for part in parts:
            if part.meta["basis"] != seen:
                files.fail(
                    f"{path} does not belong to {part.folder}",
                    f"basis {seen[:12]}",
                    part.meta["basis"][:12],
                    f"its own {basis.NAME}, or"
                    f" {dump_command(part.meta, self.dataset, self.folder, '')}--chunk"
                    f" {part.meta['chunk']} --fresh",
                )
        return shape

    def _can_guess(self, part: Chunk, wanted: float) -> tuple[float, float, float]:
        """Measure how well the tail's mass at one dumped temperature follows from the others and
        the basis; refuse where it cannot be told.

        The temperature left out is the one nearest to what is wanted, which leaves a wider gap than
        the one to be bridged.
        """
        dumped = self.temperatures
        below, above = [t for t in dumped if t < wanted], [t for t in dumped if t > wanted]
        again = (
            f"--temperature {dumped[0]:g}, or dump_logits.py --temperatures with {wanted:g} among"
            " them and --fresh"
        )
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
        records = part.records[:: max(1, len(part.records) // 512)][:512]
        shape = self.shape.to(torch.device("cpu"))
        kept = decode(records, self.vocab, dumped.index(left), shape)
        computed = basis.tail_between(
            shape,
            kept.ids,
            kept.coef,
            tails_of(records)[:, others],
            [dumped[i] for i in others],
            left,
        )
        error = (rest_mass(replace(kept, tail=computed), left) - rest_mass(kept, left)).abs()
        mean, worst = error.mean().item(), error.max().item()
        if not mean <= GUESS_LIMIT:  # nor NaN
            files.fail(
                f"temperature {wanted:g} was not dumped, and the basis cannot tell the tail's mass",
                f"a mean error of {mean:.3f} where T={left:g} is computed from the others",
                f"at most {GUESS_LIMIT:g}",
                again,
            )
        return left, mean, worst

    @property
    def compares(self) -> bool:
        """Whether val rows can be compared with the teacher: a val dump is there, and T=1 is in
        it."""
        return self.val is not None and (1 in self.temperatures or self.whole)

    @property
    def chunks(self) -> list[int]:
        return sorted(self.parts)

    @property
    def records(self) -> str:
        """Hash of the train records that are there: a run that is continued must read what it began
        with."""
        return hashlib.sha256(
            "".join(self.parts[c].meta["sha256"] for c in self.chunks).encode()
        ).hexdigest()

    def memory_bytes(self, device: torch.device) -> int:
        """Return what the basis takes on a device, with the temporaries of a divergence over all
        tokens."""
        if self.shape is None:
            return 0
        return self.shape.rows.numel() * (2 if device.type == "cuda" else 4) + losses.dense_bytes(
            device
        )

    def identity(self) -> dict:
        """Return what a run that is continued must find again: the teacher, and the train records
        that are there."""
        return {"teacher": self.meta["teacher"], "chunks": self.chunks, "records": self.records}

    def join(self, student: models.Model, args, amp: torch.dtype | None) -> models.Model:
        """Return the student cut to the records' tokens; refuse one that lacks some of them."""
        if student.vocab < self.vocab:
            files.fail(
                f"{student.folder} knows fewer tokens than the logits",
                f"{student.vocab:,}",
                f"at least {self.vocab:,}",
                dump_command(
                    self.meta | {"vocab": None},
                    self.dataset,
                    self.folder,
                    f"--student {args.student} --fresh",
                ),
            )
        return replace(student, limit=self.vocab)

    def say(self) -> None:
        """Print what the teacher is, how much of it is kept, and what is missing."""
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
                f" trained on; {self.mend()}"
            )
        if not self.compares:
            print(
                "logits: no val dump with T=1, so no KL to the teacher; make logits CHUNK=val, with"
                " 1 in TEMPERATURES"
            )

    def val_measures(self) -> dict | None:
        """Return the teacher's own measures on val, as far as the dump tells them, if val was
        dumped."""
        meta = self.val and self.val.meta
        return meta and {
            "ce": meta["teacher_ce"],
            "ppl": math.exp(min(meta["teacher_ce"], 700.0)),
            "acc1": meta["teacher_acc1"],
            "targets": len(self.val.records),
        }

    def mend(self) -> str:
        """Return the make lines that bring what is missing."""
        make = f"make logits NAME={self.dataset.folder.name}"
        rest = f" ... ({len(self.missing)} in all: {make})" if len(self.missing) > 4 else ""
        return "; ".join(f"{make} CHUNK={c}" for c in self.missing[:4]) + rest

    def rows(self) -> np.ndarray:
        """Return the numbers of all train rows whose chunk is there."""
        return np.concatenate([np.asarray(self.dataset.chunk_rows(c)) for c in self.chunks])

    def at(self, batch: data.Batch, temperature: float) -> losses.TopK:
        """Return the teacher at a train batch's targets and a temperature, on the device of its
        labels."""
        size, numbers = self.dataset.meta["rows_per_chunk"], batch.numbers.numpy()
        out, at = [], 0
        for row in batch.rows:  # a row is one slice of one chunk
            count, chunk = int(self.dataset.train.rows[row]["targets"]), row // size
            start = int(numbers[at]) - self.starts[chunk] if count else 0
            out.append(self.parts[chunk].records[start : start + count])
            at += count
        if self.shape is not None and self.placed != batch.labels.device:  # once
            self.shape, self.placed = self.shape.to(batch.labels.device), batch.labels.device
        return self._kept(np.concatenate(out), temperature, batch, self.shape)

    def val_at(self, batch: data.Batch, temperature: float) -> losses.TopK | None:
        """Return the teacher at a val batch's targets and a temperature, or None if it was not
        dumped."""
        if self.val is None or temperature not in self.temperatures and not self.whole:
            return None
        return self._kept(self.val.records[batch.numbers.numpy()], temperature, batch, None)

    def _kept(
        self, records: np.ndarray, temperature: float, batch: data.Batch, shape: Basis | None
    ) -> losses.TopK:
        """Return decoded records on the device of the batch's labels. The tail at a temperature
        that was not dumped is computed from the others."""
        dumped = temperature in self.temperatures or self.whole
        column = self.temperatures.index(temperature) if temperature in self.temperatures else 0
        device, kept = batch.labels.device, decode(records, self.vocab, column, shape)

        def move(tensor):
            return tensor.to(device, non_blocking=True)

        kept = losses.TopK(move(kept.ids), move(kept.gap), move(kept.tail), kept.coef, shape)
        if dumped:
            return kept
        return replace(
            kept,
            tail=basis.tail_between(
                shape, kept.ids, kept.coef, move(tails_of(records)), self.temperatures, temperature
            ),
        )


def tails_of(records: np.ndarray) -> torch.Tensor:
    """Return the log tail masses (n, temperatures) of records."""
    return torch.from_numpy(records["tail"].astype(np.float32))


def coverage(
    records: np.ndarray, temperatures: list[float], vocab: int, sample: int = 20_000
) -> dict[str, float]:
    """Return the share of the teacher's softened mass that lies inside its top k, by temperature,
    over an even sample of records."""
    records = records[:: max(1, len(records) // sample)]
    shares = {}
    for column, t in enumerate(temperatures):
        kept = decode(records, vocab, column)
        shares[f"{t:g}"] = 1 - rest_mass(kept, t).mean().item() if len(records) else 0.0
    return shares
