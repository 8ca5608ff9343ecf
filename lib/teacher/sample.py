"""Which targets the basis is fitted to (fit.py): a fixed sample of the train rows. Each source has
an equal share of it, whatever its size, and no row gives more than A_ROW targets: those of one text
are alike, and two dozen long rows would leave out what is one row in fifty."""

import numpy as np
import torch
from torch import Tensor

from lib import data, files, models, plan

SAMPLE = 8192  # targets that the basis is fitted to, about
A_ROW = 64  # of these from one row, at most


@torch.inference_mode()
def hidden_states(split: data.Split, teacher: models.Model, tokens: int) -> Tensor:
    """Return the teacher's hidden states (about SAMPLE, D) at the targets of the sample of a split;
    `tokens` a forward pass."""
    parts = []
    rows, lengths = sampled_rows(split), split.rows["length"]
    for lines in plan.microbatches(rows, lengths, tokens, int(lengths.max()), pack=False):
        batch = split.batch(lines)
        hidden, start = teacher.hidden(batch.to(teacher.device)), 0
        for row in batch.rows:
            count = int(split.rows[row]["targets"])
            parts.append(hidden[start + evenly(np.arange(count), A_ROW)])
            start += count
    hidden = torch.cat(parts)
    if not torch.isfinite(hidden).all():
        files.fail(
            "the teacher's hidden states are not finite",
            seen="NaN or infinity",
            mend="--dtype float32 (some models overflow float16)",
        )
    return hidden


def sampled_rows(split: data.Split, wanted: int = SAMPLE) -> np.ndarray:
    """Return row numbers, ascending, whose targets, A_ROW a row at most, are about `wanted` (all
    rows, where there are fewer): evenly spread over each source. What a small source leaves of its
    share goes to the larger ones.

    Worked example: of 8,192, sources of 1,000 and 1,000,000 targets give 1,000 and 7,192.
    """
    taken = np.minimum(split.rows["targets"], A_ROW).astype(int)
    sources = [
        np.flatnonzero((split.rows["source"] == source) & (taken > 0))
        for source in np.unique(split.rows["source"])
    ]
    sources = sorted((rows for rows in sources if len(rows)), key=lambda rows: taken[rows].sum())
    chosen, left = [], wanted
    for number, rows in enumerate(sources):
        share = left // (len(sources) - number)
        chosen.append(evenly(rows, max(1, round(share / taken[rows].mean()))))
        left -= int(taken[chosen[-1]].sum())
    return np.sort(np.concatenate(chosen))


def evenly(numbers: np.ndarray, count: int) -> np.ndarray:
    """Return `count` of numbers at even places, the first and the last among them; all, where there
    are fewer."""
    if len(numbers) <= count:
        return numbers
    return numbers[np.linspace(0, len(numbers) - 1, count).astype(int)]
