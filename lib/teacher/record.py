"""The teacher's top-k logits on disk: one memory-mapped record a target, in target order.

    logits/NAME/chunk-0003/topk.npy   structured (targets of the chunk,); fields of `record_dtype`
                           done.npy   DONE (rows of the chunk,): which rows are written, with the
                                      teacher's own score on them
                           meta.json  written last and sealed (lib/files.py): identities, k,
                                      temperatures, V, the teacher's figures, sha256 of topk.npy;
                                      checksums of both, and of the basis; of val also what the
                                      teacher answers to a few of its prompts (worth.py)
    logits/NAME/val/       the same for the val split
    logits/NAME/basis.safetensors    the basis that all of them share, unless --tail-rank is 0
                                     (lib/teacher/basis.py)

writer.py writes them, logits.py reads them. A record holds, largest logit first: the k token ids
(16 low bits, and the high bits packed where V > 65,536), `gap` = z_max - z_i (float16, or uint8
with one scale a record), for every dumped T `tail` = log of the sum over the other V - k tokens of
exp((z_j - z_max)/T), float32, and `coef`, the shape of the tail: coefficients over the basis,
packed as the basis says; then also for every T `error`, how far that shape is from the teacher's
own (uint8, `error_code`), of which the highest says that it is worse than none: a bucket. Where
whoever fills it may know fewer than k tokens of a target, `count` says how many (0: it says nothing
of this target); `joint`, where a record without known tokens is of so many targets together, the
probability of their tokens' product (across.py); and rows of a chunk that have no record at all are
those that done.npy lacks, counted in meta.json's `left_out`.

Never raw logits: float16 of z costs 1.7e-3 nats of KL, float16 of z_max - z 4e-7.

Worked example: V = 151,936, three temperatures: k = 32, float16, no basis 64 + 8 + 64 + 12 = 148
bytes a target; k = 16, uint8 and 128 bytes of coefficients 32 + 4 + 16 + 2 + 128 + 3 + 12 = 197.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from lib import losses
from lib.teacher.basis import Basis

FORMAT = 1
DONE = np.dtype([("done", "?"), ("ce_sum", "<f8"), ("hits", "<u4")])
LARGEST_GAP = 60_000.0  # float16 ends at 65,504
LEAST_ERROR, OCTAVE = 2.0**-20, 8  # error_code: nats of its 0, and codes a factor of two
SHAPELESS = 255  # of an error
SERVED = "served"  # the dtype of records that a server filled
IMPORTED = "imported"  # and of those that were read from another tool's files
CHUNK_META = {  # of meta.json
    "identities": {"data": str, "vocabulary": str},
    "chunk": (range(1 << 62), {"val"}),
    "targets": range(1 << 62),
    "rows_per_chunk": range(1, 1 << 62),
    "k": range(1, (1 << 20) + 1),
    "temperatures": [float],
    "values": {"u8", "fp16"},
    "vocab": range(1, (1 << 20) + 1),
    "tail_rank": range(1 << 20),
    "tail_bytes?": range(1 << 20),
    "errors?": bool,
    "counted?": bool,
    "joint?": bool,
    "across?": str,
    "only?": [range(1 << 16)],
    "no_mass?": [range(1 << 20)],
    "known?": range(1 << 62),
    "grouped?": range(1 << 62),
    "left_out?": {...: range(1 << 62)},
    "error?": {...: {...: {"mean": float, "p99": float, "shapeless": float}}},
    "basis?": str,
    "teacher": str,
    "teacher_folder": str,
    "imported?": {"paths": [str], "format": str},
    "teacher_ce": float,
    "teacher_acc1": float,
    "coverage": {...: float},
    "apart?": [range(1 << 20)],
    "teacher_quant?": {"8bit", "4bit"},
    "quantised?": {"kl": {...: {"mean": float, "p99": float}}, "rows": int, "targets": int},
    "answers?": {...: [range(1 << 20)]},
    "sha256": str,
}
LOOKED_AT_BYTES = (
    1 << 24
)  # bytes of records up to which every one is looked at when a chunk is opened


def high_bits(vocab: int) -> int:
    """Return the bits an id needs above its low 16: 0, 2 (V up to 262,144) or 4 (up to
    1,048,576)."""
    return 0 if vocab <= 1 << 16 else 2 if vocab <= 1 << 18 else 4


def record_dtype(
    k: int,
    temperatures: list[float],
    vocab: int,
    values: str,
    tail_bytes: int = 0,
    errors: bool = False,
    counted: bool = False,
    joint: bool = False,
) -> np.dtype:
    """Return the dtype of one target's record; its itemsize is the bytes a target takes."""
    fields: list[tuple] = [("id_low", "<u2", (k,))]
    if bits := high_bits(vocab):
        fields.append(("id_high", "u1", (-(-k * bits // 8),)))
    if values == "fp16":
        fields.append(("gap", "<f2", (k,)))
    else:
        fields += [("gap", "u1", (k,)), ("scale", "<f2")]
    if counted:
        fields.append(("count", "<u2"))
    if joint:
        fields.append(("joint", "u1"))
    if tail_bytes:
        fields.append(("coef", "u1", (tail_bytes,)))
    if errors:
        fields.append(("error", "u1", (len(temperatures),)))
    return np.dtype([*fields, ("tail", "<f4", (len(temperatures),))])


def dtype_of(settings: dict) -> np.dtype:
    """Return the dtype of the records that a dump's settings, or a meta.json, tell of."""
    k, temperatures, vocab = (settings[name] for name in ("k", "temperatures", "vocab"))
    names = ("tail_bytes", "errors", "counted", "joint")
    more = [settings.get(name, 0) for name in names]  # some have none
    return record_dtype(k, temperatures, vocab, settings["values"], *more)


def error_code(nats: np.ndarray) -> np.ndarray:
    """Return errors as they are stored, to 4.5 %: error_code([2**-20, 2**-19]) == [0, 8]."""
    steps = OCTAVE * np.log2(np.maximum(nats, LEAST_ERROR) / LEAST_ERROR)
    return np.rint(steps).clip(0, SHAPELESS - 1).astype(np.uint8)


def error_of(code: np.ndarray) -> np.ndarray:
    """Return the nats that stored errors stand for (those that are SHAPELESS too: infinite)."""
    nats = LEAST_ERROR * 2.0 ** (code.astype(float) / OCTAVE)
    return np.where(code == SHAPELESS, np.inf, np.where(code == 0, 0.0, nats))


def error_figures(code: np.ndarray) -> dict[str, float]:
    """Return the mean and the 99th percentile, in nats, of stored errors (n,) of records that have
    a shape, and the share of those that have none."""
    worse = code == SHAPELESS
    nats = error_of(code[~worse]) if not worse.all() else np.zeros(1)
    figures = {"mean": float(nats.mean()), "p99": float(np.percentile(nats, 99))}
    return figures | {"shapeless": float(worse.mean()) if len(worse) else 0.0}


def impossible(records: np.ndarray, vocab: int) -> str | None:
    """Return what no teacher can have said, in words, among records (their first LOOKED_AT_BYTES);
    None where there is nothing."""
    size = max(1, (1 << 22) // records.dtype.itemsize)
    for start in range(0, min(len(records), LOOKED_AT_BYTES // records.dtype.itemsize), size):
        part = records[start : start + size]
        known = unpack(part, vocab, 0)
        if int(known.ids.max()) >= vocab:
            return f"token {int(known.ids.max())} of {vocab}"
        falls = known.gap[:, 0].any() or (known.gap.diff(dim=1) < 0).any()
        if falls or not torch.isfinite(known.gap).all():
            return "logits that are no numbers, or not in their order"
        if np.isnan(part["tail"]).any() or np.isposinf(part["tail"]).any():
            return "a tail that is no number"
    return None


def pack(
    ids: np.ndarray,
    gaps: np.ndarray,
    tails: np.ndarray,
    dtype: np.dtype,
    vocab: int,
    coef: np.ndarray | None = None,
    error: np.ndarray | None = None,
    count: np.ndarray | None = None,
    joint: np.ndarray | None = None,
) -> np.ndarray:
    """Return records (n,) of ids (n, k), gaps (n, k), tails (n, temperatures), packed coefficients
    (n, bytes), codes of their errors (n, temperatures), and how many of the ids are known (n,):
    the others are any that differ from these, their gaps no smaller; joint (n,): of how many
    targets it holds the product, if of several."""
    records = np.zeros(len(ids), dtype)
    if not len(ids):  # nothing has a shape that follows from the others
        return records
    records["id_low"] = ids & 0xFFFF
    if bits := high_bits(vocab):
        per = 8 // bits
        high = np.zeros((len(ids), dtype["id_high"].shape[0] * per), np.uint8)
        high[:, : ids.shape[1]] = ids >> 16
        places = bits * np.arange(per, dtype=np.uint8)
        records["id_high"] = (high.reshape(len(ids), -1, per) << places).sum(-1)
    if "scale" in (dtype.names or ()):
        largest = gaps.max(1)
        scale = (largest.clip(max=LARGEST_GAP) / 255).astype(np.float16)
        above = np.nextafter(scale, np.float16(np.inf))  # never round the range down
        scale = np.where(scale.astype(np.float32) * 255 < largest, above, scale)
        steps = gaps / np.maximum(scale.astype(np.float32), 1e-12)[:, None]
        records["scale"], records["gap"] = scale, np.rint(steps).clip(0, 255)
    else:
        records["gap"] = gaps.clip(max=LARGEST_GAP)
    if coef is not None:
        records["coef"] = coef
    if error is not None and "error" in (dtype.names or ()):
        records["error"] = error
    if "count" in (dtype.names or ()):
        records["count"] = ids.shape[1] if count is None else count
    if joint is not None and "joint" in (dtype.names or ()):
        records["joint"] = joint
    records["tail"] = tails
    return records


def unpack(records: np.ndarray, vocab: int, column: int, shape: Basis | None = None) -> losses.TopK:
    """Return what the loss needs of records (n,), on the CPU: ids, gaps, and the tail at dumped
    temperature number `column`; with the folder's basis also the coefficients, on its device."""
    ids = records["id_low"].astype(np.int64)
    if bits := high_bits(vocab):
        places = bits * np.arange(8 // bits, dtype=np.uint8)
        high = (records["id_high"][:, :, None] >> places) & ((1 << bits) - 1)
        ids |= high.reshape(len(records), -1)[:, : ids.shape[1]].astype(np.int64) << 16
    gap = records["gap"].astype(np.float32)
    if "scale" in (records.dtype.names or ()):
        gap *= records["scale"].astype(np.float32)[:, None]
    tail = records["tail"][:, column].astype(np.float32)
    topk = losses.TopK(torch.from_numpy(ids), torch.from_numpy(gap), torch.from_numpy(tail))
    if "count" in (records.dtype.names or ()) and (records["count"] < ids.shape[1]).any():
        topk = replace(topk, count=torch.from_numpy(records["count"].astype(np.int64)))
    if "joint" in (records.dtype.names or ()) and records["joint"].any():
        topk = replace(topk, joint=torch.from_numpy(records["joint"].astype(np.int64)))
    if shape is None:
        return topk
    topk = replace(topk, coef=shape.unpack(records["coef"]), basis=shape)
    if "error" not in (records.dtype.names or ()):
        return topk
    worse = records["error"][:, column] == SHAPELESS
    return replace(topk, shapeless=torch.from_numpy(worse)) if worse.any() else topk


def said_at(records: np.ndarray, numbers: np.ndarray | None = None) -> dict[str, int]:
    """Return at how many targets something is told by records (`numbers`: of those that there are,
    if not all): `known`, alone, and `grouped`, together with others (`joint`)."""
    names = records.dtype.names or ()
    count = len(records) if numbers is None else len(numbers)
    if "count" not in names:
        return {"known": count, "grouped": 0}
    there = slice(None) if numbers is None else numbers
    known = int((records["count"][there] > 0).sum())
    return {"known": known, "grouped": int(records["joint"].sum()) if "joint" in names else 0}


def heard_of_rows(records: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return at how many targets of each row (rows,) something is told; counts: their targets."""
    names = records.dtype.names or ()
    if "count" not in names:
        return counts.astype(np.int64)
    each = (records["count"] > 0).astype(np.int64)
    if "joint" in names:
        each += records["joint"]
    ends = np.concatenate([[0], np.cumsum(each)])
    last = np.cumsum(counts, dtype=np.int64)
    return ends[last] - ends[last - counts]


def tails_of(records: np.ndarray) -> torch.Tensor:
    """Return the log tail masses (n, temperatures) of records."""
    return torch.from_numpy(records["tail"].astype(np.float32))


def rest_mass(topk: losses.TopK, temperature: float) -> torch.Tensor:
    """Return the teacher's mass (n,) outside its top k at a temperature: what `tail` says, as a
    share of 1."""
    return losses.teacher_logp(topk, temperature)[:, -1].exp()


def coverage(
    records: np.ndarray,
    temperatures: list[float],
    vocab: int,
    numbers: np.ndarray | None = None,
    sample: int = 20_000,
) -> dict[str, float]:
    """Return the share of the teacher's softened mass that lies inside its top k, by temperature,
    over an even sample of records; numbers: of those that there are (default: all)."""
    numbers = np.arange(len(records)) if numbers is None else numbers
    records = records[numbers[:: max(1, len(numbers) // sample)]]
    if "count" in (records.dtype.names or ()):
        records = records[records["count"] > 0]
    shares = {}
    for column, t in enumerate(temperatures):
        rest = rest_mass(unpack(records, vocab, column), t)
        shares[f"{t:g}"] = 1 - rest.mean().item() if len(records) else 0.0
    return shares


def chunk_folder(folder: Path | str, chunk: int | str) -> Path:
    """Return the folder of a chunk number, or of "val"."""
    return Path(folder) / ("val" if chunk == "val" else f"chunk-{chunk:04d}")


def differing(seen: dict, wanted: dict) -> str:
    """Return what differs between two sets of settings, for people."""
    other = [name for name, value in wanted.items() if seen.get(name) != value]
    return "; ".join(f"{name} {seen.get(name)!r} (now {wanted[name]!r})" for name in other)
