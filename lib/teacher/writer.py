"""Writing the records of one chunk: what dump_logits.py makes of the teacher, batch after batch
(record.py says what lies on the disk)."""

import argparse
import errno
import hashlib
import math
import os
import time
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from lib import checkpoints, data, files, flags, losses, models, plan, train
from lib import head as heads
from lib.run import versions
from lib.teacher import basis, fit, placed, record, sample
from lib.teacher.basis import Basis

DUMP_ANEW = "--fresh to dump it anew"
# that a folder is a chunk's
COST_FILE = "cost.json"  # dumped_s: the seconds that a chunk took
CHUNK_FILES = ("meta.json", "settings.json", "topk.npy", "done.npy", COST_FILE, files.LOCK)
FLUSH_S = 5.0  # seconds of work that a power cut may cost
K, TEMPERATURES = 16, "1,2,4"  # unless flags say otherwise
RANK = 512  # of the basis, unless --tail-rank says otherwise
# the default rank is lowered where the basis would be larger than so many bytes, and than so many
# times all records of the data
SMALL_BASIS, TIMES_RECORDS = 1 << 24, 4
# nats times T^-2 (so do small errors fall with T) of a tail's softmax from the stored one's, above
# which the tail of a student near the teacher is nearer than what is stored (docs/fidelity.md)
WORSE = 1.0
MOST_SHAPELESS = 0.2  # of a source's records, above which it is warned of; a few are in any data
OTHER_SOURCE = "of another source"
WINDOW = 4096  # rows that are sorted by length at once
# settings that a finished chunk may have otherwise: they change records by rounding at most, or
# (errors) older ones have none
MAY_DIFFER = ("teacher_folder", "dtype", "tokens_per_microbatch", "errors")


def add_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flags that say what a record holds."""
    group.add_argument(
        "--k",
        type=int,
        help=f"logits kept a target (default: {K}; of a served teacher 20, of an import all)",
    )
    group.add_argument(
        "--temperatures",
        metavar=TEMPERATURES,
        help=(
            f"temperatures training may use later (default: {TEMPERATURES}; of a served teacher,"
            " and an import, 1)"
        ),
    )
    group.add_argument(
        "--only",
        nargs="+",
        metavar="SOURCE",
        help="rows of these sources alone; the others get no record (default: all)",
    )
    group.add_argument(
        "--values",
        choices=["fp16", "u8"],
        help="format of z_max - z (default: u8; of a server and an import fp16)",
    )
    group.add_argument(
        "--tail-rank",
        type=int,
        default=None,
        metavar="R",
        help=(
            "dimensions kept of the shape of the rest; 0 = its mass alone, one bucket (default:"
            f" {RANK}, fewer where the basis would outweigh the records)"
        ),
    )
    group.add_argument(
        "--tail-bytes",
        type=int,
        default=128,
        metavar="B",
        help=(
            "bytes a target for these, spent where they tell most; at most R (default: %(default)s)"
        ),
    )


def check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse (exit code 2) flags that cannot work; read the temperatures."""
    args.k = K if args.k is None else args.k
    args.temperatures = TEMPERATURES if args.temperatures is None else args.temperatures
    args.values = args.values or "u8"
    flags.positive(parser, args, "k", "tokens_per_microbatch")
    try:
        args.temperatures = sorted({float(t) for t in args.temperatures.split(",")})
    except ValueError:
        parser.error(f"--temperatures is {args.temperatures}, wanted numbers like 1,2,4")
    if min(args.temperatures) <= 0 or not all(map(math.isfinite, args.temperatures)):
        parser.error("--temperatures must be above 0")
    if (args.tail_rank or 0) < 0 or args.tail_rank != 0 and args.tail_bytes < 1:
        parser.error(
            f"--tail-rank is {args.tail_rank} and --tail-bytes {args.tail_bytes}, wanted 0 or more,"
            " and at least 1"
        )


def only_sources(args: argparse.Namespace, dataset: data.Dataset) -> dict[str, list[int]]:
    """Return the numbers of the sources of --only as a dump's settings hold them; nothing without
    it. Refused: a name that no source has."""
    if not args.only:
        return {}
    if unknown := sorted({*args.only} - {*dataset.sources}):
        files.fail(
            f"--only names no source of {dataset.folder}",
            ", ".join(unknown),
            ", ".join(dataset.sources) or "(data without named sources)",
        )
    return {"only": sorted({dataset.sources.index(name) for name in args.only})}


def has_rows(dataset: data.Dataset, chunk: int | str, only: list[int] | None) -> bool:
    """Return whether a chunk has rows of the sources `only` (None: of any)."""
    split = dataset.val if chunk == "val" else dataset.train
    sources = split.rows["source"][rows_of(dataset, chunk)]
    return len(sources) > 0 if only is None else bool(np.isin(sources, only).any())


def is_one(temperatures: str | None) -> bool:
    """Return whether --temperatures, if given, is T = 1 alone."""
    return temperatures is None or temperatures.strip() in ("1", "1.0")


def dump_settings(
    args: argparse.Namespace,
    dataset: data.Dataset,
    identity: str,
    teacher: models.Model,
    dtype: torch.dtype,
) -> dict:
    """Return what a chunk must have been made with to be continued, or read beside others; of args,
    --tail-rank and --tail-bytes are cut to what there is."""
    head = teacher.head()
    # a rest of one token has no shape; logits move in no more dimensions than hidden states have
    most = 0 if args.k >= head.vocab - 1 else min(head.weight.shape[1], head.vocab - 1)
    if args.tail_rank is None:
        args.tail_rank = min(RANK, most)
        if (fits := rank_that_fits(args, dataset, head)) < args.tail_rank:
            print(
                f"dump: the data is small, so its basis has rank {fits} and not {args.tail_rank}"
                " (--tail-rank says otherwise)"
            )
            args.tail_rank = fits
    if args.tail_rank > most:
        print(f"dump: --tail-rank {args.tail_rank} is cut to {most}: no more is there to be kept")
        args.tail_rank = most
    args.tail_bytes = min(args.tail_bytes, args.tail_rank)  # at most 8 bits a dimension
    settings = {
        "teacher": identity,
        "teacher_folder": str(args.teacher),
        "data": dataset.identities["data"],
        "k": args.k,
        "rows_per_chunk": dataset.meta["rows_per_chunk"],
        "temperatures": args.temperatures,
        "values": args.values,
        "vocab": head.vocab,
        "tail_rank": args.tail_rank,
        "dtype": str(dtype),
        "tokens_per_microbatch": args.tokens_per_microbatch,
    }
    if apart := [id for id in teacher.apart if id < head.vocab]:  # older folders, and most: none
        settings["apart"] = apart
    more = {"tail_bytes": args.tail_bytes, "errors": True}
    if args.teacher_quant:
        settings["teacher_quant"] = args.teacher_quant
    return settings | only_sources(args, dataset) | (more if args.tail_rank else {})


def rank_that_fits(args: argparse.Namespace, dataset: data.Dataset, head: heads.Head) -> int:
    """Return the largest rank whose basis does not outweigh all records of the data."""
    size = record.record_dtype(
        args.k, args.temperatures, head.vocab, args.values, args.tail_bytes, errors=True
    )
    records = (dataset.train.targets + dataset.val.targets) * size.itemsize
    room, width = max(SMALL_BASIS, TIMES_RECORDS * records), head.weight.shape[1]
    each = basis.file_bytes(2, head.vocab, width) - basis.file_bytes(1, head.vocab, width)
    return max(1, (room - basis.file_bytes(1, head.vocab, width)) // each + 1)


def is_finished(folder: Path, settings: dict) -> bool:
    """Return whether a chunk is finished; one of other settings, or damaged, is refused."""
    if not (folder / "meta.json").exists():
        return False
    wanted = {name: value for name, value in settings.items() if name not in MAY_DIFFER}
    wanted["teacher_quant"] = settings.get("teacher_quant")  # mostly there is none
    meta = files.read_json(folder / "meta.json", DUMP_ANEW)
    if differ := record.differing(meta, wanted):
        files.fail(
            f"{folder} is finished with other settings",
            differ,
            "the same command",
            "--fresh to dump it anew, or another --out",
        )
    files.check(folder, meta, False, DUMP_ANEW)
    # a kill after the last rename may have left it
    (folder / "settings.json").unlink(missing_ok=True)
    return True


def rows_of(dataset: data.Dataset, chunk: int | str) -> np.ndarray:
    """Return the row numbers of a chunk of train, or of val."""
    return (
        np.arange(len(dataset.val.rows))
        if chunk == "val"
        else np.asarray(dataset.chunk_rows(int(chunk)))
    )


def check_disk(out: Path, dataset: data.Dataset, missing: list, settings: dict, width: int) -> None:
    """Say how many bytes the chunks `missing` will take, and refuse a disk that is too small;
    width: of the teacher's hidden states."""
    size, rank = record.dtype_of(settings).itemsize, settings["tail_rank"]
    shape = basis.file_bytes(rank, settings["vocab"], width)
    need, have = 0, files.free_bytes(out)
    if missing and not (out / basis.FILE).exists():
        need += shape
    for chunk in missing:
        split = dataset.val if chunk == "val" else dataset.train
        need += size * int(split.rows["targets"][rows_of(dataset, chunk)].sum())
        begun = record.chunk_folder(out, chunk) / "topk.npy"  # to be finished, or made anew
        have += begun.stat().st_size if begun.exists() else 0
    shared = f", and {files.human(shape)} of basis for all chunks" if rank else ""
    print(
        f"disk: {files.human(need)} to be written ({size} bytes a target{shared}),"
        f" {files.human(have)} free at {out}"
    )
    if need > have:
        refuse_disk(out, have, need)


def check_files(folder: Path, dataset: data.Dataset, wanted: list, args) -> None:
    """Refuse, by the heads of the teacher's files, before it is loaded, a k or V beyond its tokens,
    and a disk on which not even the records have room. (What is cut to the student's tokens, and
    the basis, is looked at later.)"""
    if dataset.labels:
        return
    tokens, _ = placed.output_layer(checkpoints.shapes(checkpoints.base_of(folder)))
    across = args.map_vocabulary or args.align  # V is the student's
    for name, value in (("k", args.k), ("vocab", 0 if across else args.vocab)):
        if value > tokens and not checkpoints.is_adapter(folder):  # it may bring more
            most = f"at most V = {tokens}, the tokens of {folder}"
            files.fail(f"{name} does not fit", f"--{name} {value}", most, f"--{name} {tokens}")
    out, need = Path(args.out), 0
    size = record.record_dtype(args.k, args.temperatures, tokens, args.values)
    for chunk in wanted:
        if not record.chunk_folder(out, chunk).exists():
            split = dataset.val if chunk == "val" else dataset.train
            need += size.itemsize * int(split.rows["targets"][rows_of(dataset, chunk)].sum())
    if need > (have := files.free_bytes(out)):
        refuse_disk(out, have, need)


def refuse_disk(out: Path, have: int, need: int) -> NoReturn:
    """Say that a disk is too small for the records."""
    files.fail(
        f"the disk of {out} is too small",
        f"{files.human(have)} free",
        files.human(need),
        "smaller --tail-bytes, --tail-rank or --k, --values u8, fewer --temperatures, or one"
        " --chunk at a time",
    )


def empty_chunks(out: Path, chunks: list) -> dict[int | str, files.Lock]:
    """Empty chunks, to be made anew: none, where one is not ours, or another process writes there.
    Return their locks, to be held until each is made."""
    folders = {chunk: record.chunk_folder(out, chunk) for chunk in chunks}
    for folder in folders.values():
        files.refuse_foreign(folder, CHUNK_FILES)
    held = {chunk: files.lock(folder) for chunk, folder in folders.items()}
    for folder in folders.values():
        files.remove_ours(folder, CHUNK_FILES)
    return held


def say_memory(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    args: argparse.Namespace,
    dataset: data.Dataset,
    parts: int = 1,
) -> None:
    """Say, before the teacher is loaded, about how much memory the dump takes; parts: processes
    that the teacher is divided among."""
    shapes = checkpoints.shapes(checkpoints.base_of(folder))
    vocab, width = placed.output_layer(shapes)
    each = placed.QUANT_BYTES.get(args.teacher_quant, dtype.itemsize)
    matrices = [math.prod(s) for s in shapes if len(s) == 2 and vocab not in s]
    rest = sum(math.prod(shape) for shape in shapes) - sum(matrices)
    weights = int(sum(matrices) * each + rest * dtype.itemsize) // parts
    lengths, targets = dataset.train.rows["length"], dataset.train.targets
    share = targets / max(1, int(lengths.sum()))  # of tokens that are targets
    tokens = min(args.tokens_per_microbatch, int(lengths.sum()))
    if args.map_vocabulary or args.align:  # its output layer once more, in the student's order
        weights += vocab * width * dtype.itemsize
    logits = 4 * math.ceil(tokens * share) * vocab
    more = placed.activation_bytes(shapes, tokens, dtype)
    # a chunk, sorted, and what is widened for it; what is stored of it, and the difference
    more += 5 * min(heads.CHUNK_BYTES, logits)
    if (rank := min(RANK if args.tail_rank is None else args.tail_rank, width)) > 0:
        # fitting: the rows in float32 and float16; the sample in parts and whole; what is widened
        # of it, or of the output layer, with two products of that; what is (D, D)
        more += 6 * rank * vocab + 2 * dtype.itemsize * sample.size(dataset.train) * width
        more += 3 * 4 * fit.PIECE * width + 6 * 8 * width**2
    more += train.CODE_BYTES if device.type == "cpu" else 0
    have = train.available_bytes(device)
    print(
        f"memory: about {files.human(weights)} for the teacher's weights and {files.human(more)}"
        f" more, {files.human(have)} free on {device}"
    )
    if weights + more > have:
        print("memory: WARNING, this may not fit: lower --tokens-per-microbatch or --tail-rank")


@torch.inference_mode()
def teacher_records(
    teacher: models.Model,
    head: heads.Head,
    batch: data.Batch,
    k: int,
    temperatures: list[float],
    dtype: np.dtype,
    shape: Basis | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the records of a batch's targets, the teacher's cross-entropy at each (nats) and
    whether it had it right, each (N,)."""
    return of_hidden(teacher.hidden(batch), batch.labels, head, k, temperatures, dtype, shape)


@torch.inference_mode()
def of_hidden(
    hidden: torch.Tensor,
    labels: torch.Tensor,
    head: heads.Head,
    k: int,
    temperatures: list[float],
    dtype: np.dtype,
    shape: Basis | None = None,
    others: heads.Head | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return `teacher_records` of hidden states (N, D) and labels (N,). others: the output layer of
    more tokens, none of which is to be in a record, but their mass is; a label of -1 - i is its
    token i."""
    with_one = sorted({*temperatures, 1.0})
    one, columns = with_one.index(1.0), [with_one.index(t) for t in temperatures]
    records, ce, hits, parts = [], [], [], head.parts
    for part, z in head.chunks(hidden):
        label, top = labels[part], parts.most(z.amax(1))
        at_label, more = heads.at_ids(z, label, parts) - top, None
        if others is not None:
            at_other, more = mass_beside(others, hidden[part], -1 - label, with_one, top)
            at_label = torch.where(label < 0, at_other, at_label)
        coef = stored = off = None
        if shape is not None:
            coef = shape.pack(shape.encode(hidden[part]))
            stored = shape.logits(shape.unpack(coef))
        ids, gaps = heads.take_top(z, k, parts)
        made = [  # few at once: they are gone through a dozen times, in a CPU's cache
            heads.tails_and_errors(
                z[some], with_one, None if stored is None else stored[some], parts
            )
            for some in losses.pieces(z, head.vocab)
        ]
        tails, errors = (torch.cat(each) for each in zip(*made))
        tails = tails if more is None else torch.logaddexp(tails, more)
        log_z = torch.logaddexp((-gaps).logsumexp(1), tails[:, one])
        own = tails[:, columns]
        if shape is not None:
            off = codes_of(errors[:, columns], gaps, own, temperatures)
        known = ids.cpu().numpy(), gaps.cpu().numpy(), own.cpu().numpy()
        records.append(record.pack(*known, dtype, head.vocab, coef, off))
        ce.append((log_z - at_label).cpu().double().numpy())
        hits.append((at_label == 0).cpu().numpy())
    return np.concatenate(records), np.concatenate(ce), np.concatenate(hits)


def mass_beside(
    others: heads.Head,
    hidden: torch.Tensor,
    label: torch.Tensor,
    temperatures: list[float],
    top: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return of tokens beside a head's, at n targets, the logit of one of them (n,) (any, where
    label (n,) is below 0), and the log of their mass at each T (n, temperatures), both less top
    (n,), which counts 1."""
    at_label, mass = [], []
    for part, x in others.chunks(hidden):
        x -= top[part, None]
        at_label.append(x.gather(1, label[part].clamp_min(0)[:, None])[:, 0])
        mass.append(torch.stack([(x / t).logsumexp(1) for t in temperatures], 1))
    return torch.cat(at_label), torch.cat(mass)


def codes_of(
    errors: torch.Tensor, gaps: torch.Tensor, tails: torch.Tensor, temperatures: list[float]
) -> np.ndarray:
    """Return the codes (n, T) that records keep of their errors: KL in nats from the teacher's own
    distribution, which is that of its tail (`errors`) times the tail's mass; SHAPELESS where the
    tail's is above WORSE / T^2."""
    nats = errors * basis.tail_mass(gaps, tails, temperatures)
    codes = record.error_code(nats.cpu().numpy())
    worst = torch.tensor([WORSE / t**2 for t in temperatures], device=errors.device)
    codes[(errors > worst).cpu().numpy()] = record.SHAPELESS
    return codes


def errors_said(meta: dict) -> list[str]:
    """Return in words how far a finished chunk's records are from the teacher, a line a source, and
    a warning for each source that the basis does not fit."""
    lines = []
    for source, by_temperature in meta.get("error", {}).items():
        each = by_temperature.values()
        means, p99s = ("/".join(f"{one[name]:.2g}" for one in each) for name in ("mean", "p99"))
        shapeless = max(one["shapeless"] for one in each)
        lines.append(
            f"records of {source}: {means} nats a target off at T={'/'.join(by_temperature)} in the"
            f" mean, {p99s} at the 99th percentile; {shapeless:.1%} have no shape (a bucket)"
        )
        if shapeless > MOST_SHAPELESS:
            lines.append(
                f"WARNING: the basis does not fit {source}: {shapeless:.1%} of its records fall"
                " back to one bucket. What mends it, in another --out, for all chunks of one share"
                f" a basis: --only {source}, whose basis is its own (then stage2_kd.py --logits"
                " NAME=DIR NAME=DIR); a source of its own for this kind of text (prepare_data.py"
                " --source NAME=...: each has an equal share of the sample); or a larger"
                " --tail-rank and --tail-bytes"
            )
    return lines


class ChunkPlan:
    """The rows of one chunk (or val) in the batches of its forward passes: a function of the data
    and of settings alone, so that whoever dumps it, and however often, computes the same.

    dtype: of a record; targets: of all rows; batches: the rows of each forward pass. A row that is
    to have no record is named by `leave_out`.
    """

    def __init__(
        self,
        chunk: int | str,
        split: data.Split,
        rows: np.ndarray,
        settings: dict,
        lengths: np.ndarray | None = None,
        left_out: dict[str, np.ndarray] | None = None,
    ) -> None:
        """lengths (rows of the split,): of each row as the teacher reads it, if not as the data
        has it; left_out: what `leave_out` would be told of."""
        self.chunk, self.rows, self.settings = chunk, rows, settings
        self.starts, self.counts = split.rows["first_target"], split.rows["targets"]
        self.sources = split.rows["source"][rows]
        self.targets, self.dtype = int(self.counts[rows].sum()), record.dtype_of(settings)
        self.left_out: dict[str, np.ndarray] = {}  # by the reason
        if only := settings.get("only"):
            self.leave_out(rows[~np.isin(self.sources, only)], OTHER_SOURCE)
        for why, some in (left_out or {}).items():
            self.leave_out(np.intersect1d(some, rows), why)
        lengths, tokens = (
            split.rows["length"] if lengths is None else lengths,
            settings["tokens_per_microbatch"],
        )
        wanted = np.setdiff1d(rows, np.concatenate([rows[:0], *self.left_out.values()]))
        self.batches = batches_of(wanted, lengths, tokens)

    def leave_out(self, rows: np.ndarray, why: str) -> None:
        """Let rows of the chunk have no record; said anew by whoever continues a dump."""
        if len(rows):
            before = self.left_out.get(why, np.zeros(0, np.int64))
            self.left_out[why] = np.union1d(before, np.asarray(rows, np.int64))


class Writer(ChunkPlan):
    """The records of one chunk (or val) on their way to the disk; its folder is locked by the
    caller.

    Contract: killed anywhere, a new Writer of the same settings goes on with the rows that are not
    there, and the finished file is bit for bit that of a dump left alone. For `add` writes records
    to their place, whatever came before; done.npy says that they are there only after they have
    reached the disk (`flush`); and a batch is always whole, so that what is computed does not
    depend on when we were killed. Nothing is written through a memory map: a disk that is full
    after all ends that by a signal, where a write is told.

    Worked example: rows 0 to 3 in the batches [2, 0] and [3, 1]. After `add([2, 0], ...)` done.npy
    says that no row is there; after `flush`, that rows 0 and 2 are. A Writer that is opened after a
    kill has `left` == [[3, 1]].

    topk, done: the open files; there (rows,) DONE: what done.npy holds; left: the batches that are
    missing. A row that is left out is never added.
    """

    def __init__(self, folder: Path, *plan: Any) -> None:
        """plan: what a ChunkPlan is made of."""
        super().__init__(*plan)
        self.folder = folder
        if (folder / "done.npy").exists():
            self._continue()
        else:
            self._begin()
        there = self.there["done"]
        self.left = [batch for batch in self.batches if not there[batch - self.rows[0]].all()]
        self.pending: list[tuple] = []  # what has been added since the last flush
        self.flushed = time.monotonic()

    def _continue(self) -> None:
        """Open the files of a dump that was killed, refused if its settings were others."""
        seen = files.read_json(self.folder / "settings.json", DUMP_ANEW)
        # where the teacher lies says nothing: what it is has a hash
        if seen | {"teacher_folder": self.settings["teacher_folder"]} != self.settings:
            files.fail(
                f"{self.folder} was started with other settings",
                record.differing(seen, self.settings),
                "the same command",
                "--fresh to start it anew, or another --out",
            )
        topk = files.read_npy(self.folder / "topk.npy", self.dtype, DUMP_ANEW)
        done = files.read_npy(self.folder / "done.npy", record.DONE, DUMP_ANEW)
        for array, wanted in ((topk, self.targets), (done, len(self.rows))):
            if len(array) != wanted:
                files.fail(f"{array.filename} is not whole", len(array), wanted, DUMP_ANEW)
        if not np.isfinite(done["ce_sum"]).all() or done["done"].view(np.uint8).max() > 1:
            files.fail(f"{done.filename} is damaged", "no numbers in it", mend=DUMP_ANEW)
        self.there = np.array(done)
        self.topk, self.done = Placed(topk), Placed(done)

    def _begin(self) -> None:
        """Make the files. done.npy appears last: once it is there, all three are whole."""
        files.write_json(self.folder / "settings.json", self.settings)
        topk = np.lib.format.open_memmap(
            self.folder / "topk.npy", mode="w+", dtype=self.dtype, shape=(self.targets,)
        )
        allocate(self.folder / "topk.npy")
        partial = self.folder / "done.npy.part"
        self.there = np.zeros(len(self.rows), record.DONE)
        with open(partial, "wb") as file:
            np.lib.format.write_array(file, self.there)
        files.sync(partial)
        partial.replace(self.folder / "done.npy")
        done = np.load(self.folder / "done.npy", mmap_mode="r")
        self.topk, self.done = Placed(topk), Placed(done)

    def add(self, rows: np.ndarray, records: np.ndarray, ce: np.ndarray, hits: np.ndarray) -> None:
        """Put the records of a batch of rows in their place, with the teacher's own cross-entropy
        and hits at each target, each (N,). Flushed every FLUSH_S seconds."""
        refuse_not_finite(rows, ce)
        counts = self.counts[rows].astype(int)
        ends = np.cumsum(counts)
        for row, count, end in zip(rows, counts, ends):
            place = int(self.starts[row]) - int(self.starts[self.rows[0]])
            self.topk.write(place, records[end - count : end])
        begins = ends - counts
        sums = np.add.reduceat(ce, begins), np.add.reduceat(hits.astype(int), begins)
        self.pending.append((rows - self.rows[0], *sums))
        if time.monotonic() - self.flushed > FLUSH_S:
            self.flush()

    @property
    def missing(self) -> np.ndarray:
        """The rows that are to have a record, and have none yet."""
        out = np.concatenate([self.rows[:0], *self.left_out.values()])
        return np.setdiff1d(self.rows[~self.there["done"]], out)

    def flush(self) -> None:
        """Force what was added to the disk: the records first, then the word that they are
        there."""
        if not self.pending:
            return
        self.topk.sync()
        for index, ce_sum, hits in self.pending:
            self.there["ce_sum"][index], self.there["hits"][index] = ce_sum, hits
        self.done.write(0, self.there)
        self.done.sync()
        for index, _, _ in self.pending:
            self.there["done"][index] = True
        self.done.write(0, self.there)
        self.done.sync()
        self.pending.clear()
        self.flushed = time.monotonic()

    def finish(self, identities: dict, names: list[str], **more: object) -> dict:
        """Write meta.json, which says that the chunk is whole, and return it. names: of the
        sources; more: what else it is to hold."""
        self.flush()
        done = self.there["done"]
        without = np.unique(np.concatenate([self.rows[:0], *self.left_out.values()]))
        assert np.array_equal(self.rows[~done], without), "rows are missing"
        there = None  # the numbers of the records that there are, if not all
        if len(without):
            there = np.flatnonzero(np.repeat(done, self.counts[self.rows]))
        topk = np.load(self.folder / "topk.npy", mmap_mode="r")
        settings, digest = self.settings, hashlib.sha256()
        told = record.said_at(topk, there)
        heard = sum(told.values())
        checksums = {"topk.npy": files.sums(self.folder / "topk.npy", digest)}
        for name in ("done.npy", f"../{basis.FILE}")[: 1 + ("basis" in settings)]:
            checksums[name] = files.sums(self.folder / name)
        meta = {
            "format": record.FORMAT,
            "chunk": self.chunk,
            "targets": self.targets,
            "rows": len(self.rows),
            "bytes_per_target": self.dtype.itemsize,
            **settings,
            **(told if settings.get("counted") else {}),
            "identities": identities | {"teacher": settings["teacher"]},
            "teacher_ce": float(self.there["ce_sum"].sum() / max(1, heard)),
            "teacher_acc1": float(self.there["hits"].sum() / max(1, heard)),
            "coverage": record.coverage(topk, settings["temperatures"], settings["vocab"], there),
            **(
                {"left_out": {why: len(rows) for why, rows in self.left_out.items()}}
                if len(without)
                else {}
            ),
            "sha256": digest.hexdigest(),
            "versions": versions(),
            **({"error": self.errors(topk, names, there)} if "errors" in settings else {}),
            **more,
            "checksums": checksums,
        }
        files.write_json(self.folder / "meta.json", meta)
        (self.folder / "settings.json").unlink()
        return meta

    def errors(
        self, records: np.ndarray, names: list[str], there: np.ndarray | None = None
    ) -> dict[str, dict]:
        """Return {source: {T: {"mean", "p99": nats a target, "shapeless": a share of 1}}} of
        finished records (`there`: their numbers, if not all); mean and p99 are of those that have a
        shape."""
        source, found = np.repeat(self.sources, self.counts[self.rows]), {}
        codes_of_all = records["error"]
        if there is not None:
            source, codes_of_all = source[there], codes_of_all[there]
        for number in np.unique(source):
            codes = codes_of_all[source == number]
            found[names[number] if number < len(names) else str(number)] = {
                f"{t:g}": record.error_figures(codes[:, i])
                for i, t in enumerate(self.settings["temperatures"])
            }
        return found


def refuse_not_finite(rows: np.ndarray, ce: np.ndarray) -> None:
    """End the program where the teacher's cross-entropy at the targets of `rows` is no number."""
    if not np.isfinite(ce).all():
        files.fail(
            "the teacher's logits are not finite",
            f"rows {rows[:8].tolist()}",
            "numbers",
            "--dtype float32 (some models overflow float16)",
        )


class Placed:
    """A .npy file, as it is mapped, of records that are written to their places."""

    def __init__(self, mapped: np.memmap) -> None:
        self.file = open(str(mapped.filename), "r+b", buffering=0)
        self.begin, self.dtype = mapped.offset, mapped.dtype

    def write(self, place: int, records: np.ndarray) -> None:
        assert records.dtype == self.dtype, (records.dtype, self.dtype)
        self.file.seek(self.begin + place * self.dtype.itemsize)
        left = memoryview(records.tobytes())
        while left:  # a disk takes what fits, and says only then that it is full
            left = left[self.file.write(left) :]

    def sync(self) -> None:
        os.fsync(self.file.fileno())


def batches_of(rows: np.ndarray, lengths: np.ndarray, tokens: int) -> list[np.ndarray]:
    """Return rows in batches of like length, of at most `tokens` tokens with padding."""
    batches: list[np.ndarray] = []
    if not len(rows):
        return batches
    for window in np.array_split(rows, -(-len(rows) // WINDOW)):
        for lines in plan.microbatches(window, lengths, tokens, int(lengths.max()), pack=False):
            batches.append(np.concatenate(lines))
    return batches


def allocate(path: Path) -> None:
    """Take the disk blocks of a file that was only sized, where the file system can: what does not
    fit is known before the teacher runs."""
    if not hasattr(os, "posix_fallocate"):
        return
    with open(path, "r+b") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, max(1, os.fstat(file.fileno()).st_size))
        except OSError as full:
            if full.errno in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                return
            path.unlink()  # what it has taken of a full disk helps nobody
            files.fail(
                f"{path} cannot be allocated",
                full,
                "enough free disk",
                "a smaller --k, --values u8, or one --chunk at a time",
            )
