"""Which rows go where: a pure function of (lengths, seed, epoch), so that resuming needs the step
number alone.

An epoch is a list of optimizer steps; a step is a list of micro-batches; a micro-batch is a list of
lines; a line holds rows end to end. Rows on one line never see each other (position ids restart),
so packing changes speed, not results.

With a mix (lib/options/mix.py) there are no epochs: each source is an endless stream of its rows,
and a step takes from it what its share asks for: a pure function of (lengths, the sources' rows and
shares, seed, number of steps).
"""

import math
from collections.abc import Sequence

import numpy as np

from lib import files
from lib.options.mix import Part


def steps(
    rows: np.ndarray, lengths: np.ndarray, seed: int, epoch: int, tokens_per_step: int
) -> list[np.ndarray]:
    """Shuffle `rows` and cut them into optimizer steps of about `tokens_per_step` tokens: every row
    once, no step empty.

    Cuts lie at even shares of the epoch's tokens, so that the last step is as large as the others.
    """
    order = np.random.default_rng([seed, epoch]).permutation(np.asarray(rows))
    ends = np.cumsum(lengths[order].astype(np.int64))
    count = max(1, round(int(ends[-1]) / tokens_per_step))
    step_of = np.minimum((ends - 1) * count // int(ends[-1]), count - 1)
    return [part for part in np.split(order, np.flatnonzero(np.diff(step_of)) + 1) if len(part)]


def check(lengths: np.ndarray, tokens_per_microbatch: int) -> None:
    """Refuse a micro-batch that the longest row does not fit in."""
    if lengths.max() > tokens_per_microbatch:
        files.fail(
            "the longest row does not fit in a micro-batch",
            f"{lengths.max()} tokens, --tokens-per-microbatch {tokens_per_microbatch}",
            mend=(
                f"--tokens-per-microbatch {lengths.max()}, or prepare_data.py with a smaller"
                " --max-len"
            ),
        )


def line_length(lengths: np.ndarray, tokens_per_microbatch: int, attn: str) -> int:
    """Return how long lines may be: four rows of mean length, which pack with a few percent of
    padding, and the longest row at least.

    No longer, since attention is computed over whole lines; flash_attention_2 takes one line of any
    length (its kernel skips what lies between rows).
    """
    longest = int(lengths.max())
    assert longest <= tokens_per_microbatch, (longest, tokens_per_microbatch)
    if attn == "flash_attention_2":
        return tokens_per_microbatch
    return min(tokens_per_microbatch, max(longest, 4 * int(lengths.mean())))


def microbatches(
    rows: np.ndarray, lengths: np.ndarray, tokens_per_microbatch: int, line: int, pack: bool = True
) -> list[list[list[int]]]:
    """Cut one step's rows into micro-batches of at most `tokens_per_microbatch` tokens with
    padding, longest first.

    pack=True: first-fit decreasing into lines of `line` tokens (at most 11/9 of the fewest lines
    possible, Johnson 1973); pack=False: one row a line.
    """
    order = sorted((int(row) for row in rows), key=lambda row: (-int(lengths[row]), row))
    lines, used = [], []
    for row in order:
        size = int(lengths[row])
        fit = (
            next((i for i, tokens in enumerate(used) if tokens + size <= line), None)
            if pack
            else None
        )
        if fit is None:
            lines.append([row])
            used.append(size)
        else:
            lines[fit].append(row)
            used[fit] += size
    batches, width = [], 0
    for i in sorted(range(len(lines)), key=lambda i: (-used[i], i)):
        width = width or used[i]  # the first line of a micro-batch is its longest
        if batches and width * (len(batches[-1]) + 1) <= tokens_per_microbatch:
            batches[-1].append(lines[i])
        else:
            batches.append([lines[i]])
            width = used[i]
    return batches


def stream(
    rows: np.ndarray, lengths: np.ndarray, seed: int, source: int, tokens: float
) -> np.ndarray:
    """Return a source's rows pass after pass, each pass in an order of its own, until they hold at
    least `tokens` tokens."""
    passes = max(1, math.ceil(tokens / int(lengths[rows].sum(dtype=np.int64))))
    return np.concatenate(
        [
            np.random.default_rng([seed, number, source]).permutation(rows)
            for number in range(passes)
        ]
    )


def asked(parts: Sequence[Part], count: int) -> np.ndarray:
    """Return the shares (count, parts) that a mix asks for at every step."""
    return np.stack([np.linspace(part.first, part.last, count) for part in parts], 1)


def mixed_run(
    parts: Sequence[Part], lengths: np.ndarray, seed: int, tokens_per_step: int, shares: np.ndarray
) -> list[np.ndarray]:
    """Return the rows of every optimizer step, with the parts' `shares` (steps, parts) of the
    tokens.

    A row belongs to the step that asks for its middle token: after every step, each source is off
    by half a row at most from what was asked of it until then. Worked example: rows of 10 tokens,
    half of steps of 16 tokens: asked 8, 16, 24, 32; taken 10, 20, 20, 30. Shares of later steps do
    not change what earlier steps take.
    """
    count = len(shares)
    rows, step_of = [], []
    for part, share in zip(parts, shares.T):
        until = tokens_per_step * np.cumsum(share)  # tokens until the end of each step
        order = stream(part.rows, lengths, seed, part.number, until[-1])
        size = lengths[order].astype(np.int64)
        step = np.searchsorted(until, np.cumsum(size) - size / 2, side="right")
        rows.append(order[step < count])
        step_of.append(step[step < count])
    rows, step_of = np.concatenate(rows), np.concatenate(step_of)
    order = np.argsort(step_of, kind="stable")
    run = np.split(rows[order], np.searchsorted(step_of[order], np.arange(1, count)))
    if empty := sum(not len(step) for step in run):
        files.fail(
            "the steps are too small to be mixed",
            f"--tokens-per-step {tokens_per_step}: {empty:,} of {count:,} steps hold no row",
            mend=(
                f"--tokens-per-step {sum(int(lengths[part.rows].max()) for part in parts)}, or more"
            ),
        )
    return run


def whole_run(
    rows: np.ndarray,
    lengths: np.ndarray,
    seed: int,
    tokens_per_step: int,
    epochs: float,
    count: int = 0,
    parts: Sequence[Part] = (),
) -> list[np.ndarray]:
    """Return the rows of every optimizer step of a run: of `epochs` passes over `rows`, or of
    exactly `count` steps where it is above 0.

    With the parts of a mix, `epochs` is as many tokens as so many passes over all of their rows
    hold.
    """
    if parts:
        tokens = sum(int(lengths[part.rows].sum(dtype=np.int64)) for part in parts)
        return mixed_run(
            parts,
            lengths,
            seed,
            tokens_per_step,
            asked(parts, count or max(1, round(epochs * tokens / tokens_per_step))),
        )
    run, epoch = [], 0
    while count and len(run) < count or not count and epoch < epochs:
        part = steps(rows, lengths, seed, epoch, tokens_per_step)
        if not count and epochs - epoch < 1:
            part = part[: max(1, round(len(part) * (epochs - epoch)))]
        run += part
        epoch += 1
    return run[:count] if count else run
