"""Which targets the basis is fitted to (fit.py): a fixed sample of the train rows. Each source has
an equal share of it, whatever its size, and no row gives more than a few targets: those of one text
are alike, and two dozen long rows would leave out what is one row in fifty. It grows with the data
(`size`), so that what is one row in fifty gives it enough rows; and of rows that a first fit tells
badly (fit.odd_rows) it takes more targets."""

import copy
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lib import data, files, models, plan

# targets that the basis is fitted to, about: one in SHARE of those that rows may give, within these
LEAST, MOST, SHARE = 8192, 32768, 4
A_ROW = 32  # of these from one row, at most, unless the data is small (`of_a_row`)
AN_ODD_ROW = 256  # from a row that a first fit tells badly


@dataclass(frozen=True)
class Sample:
    """The teacher's hidden states (N, D) at targets of some rows, row after row; counts: how many
    each of them gave."""

    hidden: Tensor
    rows: list[int]
    counts: list[int]


def take(
    split: data.Split, teacher: models.Model, tokens: int, only: list[int] | None = None
) -> Sample:
    """Return the sample of a split, about `size` targets; `tokens` a forward pass; only: of these
    sources."""
    split = split if only is None else of_sources_alone(split, only)
    return hidden_states(split, teacher, tokens, sampled_rows(split), of_a_row(split))


def with_more(
    taken: Sample, rows: np.ndarray, split: data.Split, teacher: models.Model, tokens: int
) -> Sample:
    """Return a sample in which `rows` of it give up to AN_ODD_ROW targets."""
    more = hidden_states(split, teacher, tokens, rows, AN_ODD_ROW)
    kept = ~np.isin(taken.rows, rows)
    states = torch.from_numpy(np.repeat(kept, taken.counts)).to(taken.hidden.device)
    return Sample(
        torch.cat([taken.hidden[states], more.hidden]),
        [row for row, one in zip(taken.rows, kept) if one] + more.rows,
        [count for count, one in zip(taken.counts, kept) if one] + more.counts,
    )


@torch.inference_mode()
def hidden_states(
    split: data.Split, teacher: models.Model, tokens: int, rows: np.ndarray, most: int
) -> Sample:
    """Return the teacher's hidden states at `most` targets a row, at even places; `tokens` a
    forward pass."""
    parts: list[Tensor] = []
    lengths, numbers = split.rows["length"], []
    for lines in plan.microbatches(rows, lengths, tokens, int(lengths.max()), pack=False):
        batch = split.batch(lines)
        hidden, start = teacher.hidden(batch.to(teacher.device)), 0
        for row in batch.rows:
            count = int(split.rows[row]["targets"])
            parts.append(hidden[start + evenly(np.arange(count), most)])
            numbers.append(row)
            start += count
    hidden = torch.cat(parts)
    if not torch.isfinite(hidden).all():
        files.fail(
            "the teacher's hidden states are not finite",
            seen="NaN or infinity",
            mend="--dtype float32 (some models overflow float16)",
        )
    return Sample(hidden, numbers, [len(part) for part in parts])


def of_sources_alone(split: data.Split, only: list[int]) -> data.Split:
    """Return a split in which rows of other sources have no target."""
    split = copy.copy(split)
    split.rows = split.rows.copy()
    split.rows["targets"][~np.isin(split.rows["source"], only)] = 0
    return split


def of_a_row(split: data.Split) -> int:
    """Return how many targets a row may give: A_ROW; twice, four times, ... as many where all rows
    together would give fewer than LEAST."""
    targets, most = split.rows["targets"], A_ROW
    while most < targets.max(initial=0) and np.minimum(targets, most).sum() < LEAST:
        most *= 2
    return most


def given(split: data.Split) -> np.ndarray:
    """Return how many targets each row (rows,) may give."""
    return np.minimum(split.rows["targets"], of_a_row(split)).astype(int)


def size(split: data.Split) -> int:
    """Return about how many targets the sample has.

    Worked example: 4,000 rows of 50 targets may give 32 each; 128,000 / 4 = 32,000.
    """
    there = int(given(split).sum())
    return min(there, max(LEAST, min(MOST, there // SHARE)))


def sampled_rows(split: data.Split, wanted: int | None = None) -> np.ndarray:
    """Return row numbers, ascending, whose targets, `of_a_row` at most, are about `wanted`, or
    `size` of them (all rows, where there are fewer): evenly spread over each source. What a small
    source leaves of its share goes to the larger ones.

    Worked example: of 8,192, sources of 1,000 and 1,000,000 targets give 1,000 and 7,192.
    """
    taken = given(split)
    sources = [
        np.flatnonzero((split.rows["source"] == source) & (taken > 0))
        for source in np.unique(split.rows["source"])
    ]
    sources = sorted((rows for rows in sources if len(rows)), key=lambda rows: taken[rows].sum())
    chosen, left = [], size(split) if wanted is None else wanted
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
