"""What it costs that a teacher is run in 8 or 4 bits (dump_logits.py --teacher-quant): KL of its
distribution from the whole model's, in nats a target, at ROWS_ASKED train rows.

For that the whole model is loaded before the quantised one, where it fits, and let go again: one
more load, and one more pass over these rows. The figures are printed, and stored in each chunk's
meta.json as `quantised`.
"""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lib import checkpoints, data, files, losses, models, train
from lib.head import CHUNK_BYTES, Head
from lib.teacher import placed, sample

ROWS_ASKED = 200
A_ROW_ASKED = 32  # targets of each, at most


@dataclass(frozen=True)
class States:
    """A model's hidden states (N, D) at targets of `rows` rows, and its output layer."""

    hidden: Tensor
    head: Head
    rows: int


def has_room(
    folder: Path, device: torch.device, dtype: torch.dtype, args: argparse.Namespace
) -> bool:
    """Return whether a whole model has room on a device, by its files; say so where it has none."""
    shapes = checkpoints.shapes(checkpoints.base_of(folder))
    need = sum(math.prod(shape) for shape in shapes) * dtype.itemsize
    need += placed.activation_bytes(shapes, args.tokens_per_microbatch, dtype)
    need += need // 20 + 5 * CHUNK_BYTES  # what an allocator leaves between; logits
    if need <= (have := train.available_bytes(device)):
        return True
    print(
        f"teacher: what --teacher-quant costs is not known: whole, it takes {files.human(need)},"
        f" and {files.human(have)} are free on {device}"
    )
    return False


def states_at_rows(teacher: models.Model, split: data.Split, tokens: int) -> States:
    """Return what a model makes of ROWS_ASKED rows, evenly spread; `tokens` a forward pass."""
    rows = sample.evenly(np.flatnonzero(split.rows["targets"]), ROWS_ASKED)
    taken = sample.hidden_states(split, teacher, tokens, rows, A_ROW_ASKED)
    return States(taken.hidden, teacher.head(), len(rows))


@torch.inference_mode()
def nats_lost(bits: str, whole: States, ours: States, temperatures: list[float]) -> dict:
    """Return KL(whole || ours) by temperature, its mean and 99th percentile over targets, in nats;
    and print it."""
    found = []
    for (_, z), (_, other) in zip(whole.head.chunks(whole.hidden), ours.head.chunks(ours.hidden)):
        for some in losses.pieces(z):
            kl = []
            for t in temperatures:
                p, q = (x[some].div(t).log_softmax(1) for x in (z, other))
                kl.append((p.exp() * (p - q)).sum(1))
            found.append(torch.stack(kl, 1).cpu())
    nats = torch.cat(found).double()
    kl_at = {
        f"{t:g}": {"mean": float(column.mean()), "p99": float(column.quantile(0.99))}
        for t, column in zip(temperatures, nats.t())
    }
    means, p99s = ("/".join(f"{kl_at[t][name]:.2g}" for t in kl_at) for name in ("mean", "p99"))
    print(
        f"teacher: in {bits}, KL(whole || {bits}) is {means} nats a target at T={'/'.join(kl_at)}"
        f" in the mean, {p99s} at the 99th percentile ({whole.rows} rows, {len(nats)} targets)",
        flush=True,
    )
    return {"kl": kl_at, "rows": whole.rows, "targets": len(nats)}
