"""Which rows go where: a pure function of (lengths, seed, epoch), so that resuming needs the step
number alone.

An epoch is a list of optimizer steps; a step is a list of micro-batches; a micro-batch is a list of
lines; a line holds rows end to end. Rows on one line never see each other (position ids restart),
so packing changes speed, not results.

`Rows` is the plan of one run. What chooses rows in another way (lib/options) makes such a one too.
"""

import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from lib import data, files

# tokens of the longest line that holds several rows: the mask that keeps them apart has L x L
# entries, which sdpa holds for each layer; a longer row lies alone, and is causal without a mask
MASKED = 2048
FEW_STEPS = 20  # of a run that nobody gave a number of steps: a word is said


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


def check_lengths(lengths: np.ndarray, tokens_per_microbatch: int) -> None:
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
    """Return how long lines of several rows may be: four rows of mean length, which pack with a few
    percent of padding, and the longest row at least, up to MASKED tokens.

    No longer, since attention is computed over whole lines; flash_attention_2 takes one line of any
    length (its kernel skips what lies between rows).
    """
    longest = int(lengths.max())
    assert longest <= tokens_per_microbatch, (longest, tokens_per_microbatch)
    if attn == "flash_attention_2":
        return tokens_per_microbatch
    return min(tokens_per_microbatch, MASKED, max(longest, 4 * int(lengths.mean())))


def microbatches(
    rows: np.ndarray, lengths: np.ndarray, tokens_per_microbatch: int, line: int, pack: bool = True
) -> list[list[list[int]]]:
    """Cut one step's rows into micro-batches of at most `tokens_per_microbatch` tokens with
    padding, longest first.

    pack=True: first-fit decreasing into lines of `line` tokens (at most 11/9 of the fewest lines
    possible, Johnson 1973); pack=False: one row a line. A row that is longer has a line of its own,
    and a line above MASKED tokens a micro-batch: it needs no mask, not even for padding.
    """
    order = sorted((int(row) for row in rows), key=lambda row: (-int(lengths[row]), row))
    lines: list[list[int]] = []
    used: list[int] = []  # tokens of each line
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
    batches: list[list[list[int]]] = []
    width = 0
    for i in sorted(range(len(lines)), key=lambda i: (-used[i], i)):
        width = width or used[i]  # the first line of a micro-batch is its longest
        if width <= MASKED and batches and width * (len(batches[-1]) + 1) <= tokens_per_microbatch:
            batches[-1].append(lines[i])
        else:
            batches.append([lines[i]])
            width = used[i]
    return batches


def whole_run(
    rows: np.ndarray,
    lengths: np.ndarray,
    seed: int,
    tokens_per_step: int,
    epochs: float,
    count: int = 0,
) -> list[np.ndarray]:
    """Return the rows of every optimizer step of a run: of `epochs` passes over `rows`, or of
    exactly `count` steps where it is above 0."""
    run: list[np.ndarray] = []
    epoch = 0
    while count and len(run) < count or not count and epoch < epochs:
        part = steps(rows, lengths, seed, epoch, tokens_per_step)
        if not count and epochs - epoch < 1:
            part = part[: max(1, round(len(part) * (epochs - epoch)))]
        run += part
        epoch += 1
    return run[:count] if count else run


def in_groups(
    rows: np.ndarray,
    lengths: np.ndarray,
    groups: np.ndarray | None,
    tokens_per_microbatch: int,
    line: int,
    pack: bool,
) -> list[list[list[int]]]:
    """Return the micro-batches of a step, none of which holds rows of two groups. groups: the group
    of each row (by its number); None: all are one."""
    parts = [rows]
    if groups is not None:
        parts = [rows[groups[rows] == group] for group in np.unique(groups[rows])]
    return [
        lines
        for part in parts
        for lines in microbatches(part, lengths, tokens_per_microbatch, line, pack)
    ]


def dealt_to(rows: np.ndarray, lengths: np.ndarray, number: int, several: int) -> np.ndarray:
    """Return the rows of a step that process `number` of `several` takes: dealt out longest first,
    each to the one that has the fewest tokens.

    Worked example: rows of 5 4 3 3 tokens go to 0 1 1 0.
    """
    if several == 1:
        return rows
    order = np.lexsort((rows, -lengths[rows].astype(np.int64)))
    tokens, taken = np.zeros(several, np.int64), np.zeros(len(rows), bool)
    for place in order:
        least = int(tokens.argmin())
        tokens[least] += int(lengths[rows[place]])
        taken[place] = least == number
    return rows[taken]


def targets_of(rows: np.ndarray, without: Iterable[int] = ()) -> int:
    """Return how many targets rows have, but those of some sources."""
    return int(rows["targets"][~np.isin(rows["source"], [*without])].sum())


def told(
    step: int, parts: list[list[list[int]]], split: data.Split, device: torch.device
) -> Iterator[data.Batch]:
    """Yield the micro-batches `parts` of a step, on a device; of a step that takes long, say how
    far it has come."""
    said_at = time.monotonic()
    for done, lines in enumerate(parts):
        if time.monotonic() - said_at > files.TOLD_EVERY_S:
            said_at = time.monotonic()
            said = f"step {step}: {done} of {len(parts)} micro-batches"
            tqdm.write(said, file=sys.stderr)  # above the progress bar, if there is one
        yield split.batch(lines).to(device)


class OneProcess:
    """The processes that share a step's rows, where there is one: the contract of
    lib/options/ranks.py, class Ranks."""

    rank, world = 0, 1

    def even(self, count: int) -> int:
        """Return how many micro-batches this process takes in a step, where it has rows for so
        many."""
        return count

    def of_each(self, value: Any) -> list[Any]:
        """Return what each process has of a small value, in their order."""
        return [value]


class Rows:
    """Which rows a run trains on, and in which step: here every row once an epoch.

    An option that chooses otherwise is a subclass with another `steps_of_rows` (one entry a step,
    the numbers of its rows), and what it has to say of them.

    there   the numbers of the rows that can be trained on (default: all)
    line    how long a line may be (`line_length`)
    groups  the group of each row of the split, where rows of two must not share a micro-batch
    peers   the processes that share a step's rows; this one's alone are given

    Which row comes when is known from `resume` on: a run that is finished needs none of it.
    """

    line: int
    steps_of_rows: list[np.ndarray]
    groups: np.ndarray | None = None
    peers: Any = OneProcess()

    def __init__(self, args, dataset: data.Dataset, there: np.ndarray | None = None) -> None:
        self.args, self.dataset, self.split = args, dataset, dataset.train
        self.lengths, self.pack = self.split.rows["length"], not args.no_pack
        self.there = np.arange(len(self.lengths)) if there is None else there

    def check(self) -> None:
        """Refuse a row that no line holds, before weights are hashed; a finished run needs no
        plan."""
        if not (Path(self.args.out) / "config.json").exists():
            check_lengths(self.lengths[self.there], self.args.tokens_per_microbatch)

    def choose(self) -> list[np.ndarray]:
        """Return the rows of every step."""
        args = self.args
        return whole_run(
            self.there, self.lengths, args.seed, args.tokens_per_step, args.epochs, args.steps
        )

    @property
    def steps(self) -> int:
        return len(self.steps_of_rows)

    @property
    def sources(self) -> list[str]:
        """The names of the sources; that of a batch is a place in this list."""
        return self.dataset.sources or ["data"]

    @property
    def own(self) -> set[str]:
        """The names of the sources that the student wrote itself."""
        return {*self.dataset.meta.get("own", ())}

    def trained(self) -> list[int]:
        """Return the numbers of the sources that are trained on."""
        return np.unique(self.split.rows["source"][self.there]).tolist()

    def keep_apart(self, group: np.ndarray) -> None:
        """Let no micro-batch hold rows of two groups, nor of two that were kept apart before.
        group: of each source, -1 or more."""
        groups = group[self.split.rows["source"]]
        if self.groups is not None:  # a number for each pair
            groups = groups + self.groups * (int(group.max()) + 2)
        self.groups = groups

    def identity(self) -> dict[str, str]:
        """Return what a run that is continued must find again, beside the data's own identity."""
        return {}

    def resume(self, more: dict[str, Any]) -> None:
        """Make the plan of all steps. Take over, and from now on keep up to date, what the run's
        state holds of it."""
        lengths, tokens = self.lengths[self.there], self.args.tokens_per_microbatch
        check_lengths(lengths, tokens)  # of --fresh over a finished run
        self.line = line_length(lengths, tokens, self.args.attn)
        self.steps_of_rows = self.choose()

    def lay(self, student: Any, more: dict[str, Any]) -> None:
        """Pack rows or not, as the models allow it (`student.packs`); a run that began with one row
        a line goes on so: its state says `packed`."""
        self.pack = self.pack and student.packs and more.get("packed", True)
        if not self.pack:
            more["packed"] = False

    def hear(self, step: int, measures: dict[str, Any]) -> dict[str, float]:
        """Take an evaluation before `step`; return what it changes of the plan, for the log."""
        return {}

    def shares(self, first: int, end: int) -> dict[str, float]:
        """Return for the log what the sources' shares of the tokens of some steps are; {} where
        none was asked for."""
        return {}

    def kinds(self) -> list[tuple[float, int, float]]:
        """Return of each kind of rows, those that share no micro-batch with another one's: how many
        tokens there are of it in an epoch, in its longest row, and how many targets a token."""
        tokens = int(self.lengths.sum(dtype=np.int64))
        return [(tokens, int(self.lengths.max(initial=1)), self.split.targets / max(1, tokens))]

    def say(self, eval_every: int) -> None:
        """Print what is trained on, and in how many steps."""
        train, val = self.split.rows["targets"][self.there], self.dataset.val
        print(
            f"data: {len(self.there):,} rows, {int(train.sum()):,} targets;"
            f" val {len(val.rows):,} rows, {val.targets:,} targets"
        )
        if own := self.dataset.val_described():
            print(own)
        print(
            f"plan: {self.steps} steps of about {self.args.tokens_per_step:,} tokens,"
            f" evaluation every {eval_every}"
        )
        if self.steps < FEW_STEPS and not self.args.steps:
            tokens = int(self.lengths[self.there].sum(dtype=np.int64))
            smaller = max(256, tokens // 50)
            mend = f"--tokens-per-step {smaller} or " * (smaller < self.args.tokens_per_step)
            print(f"plan: WARNING: few steps for so little data: {mend}more --epochs help")

    def of(self, step: int) -> np.ndarray:
        """Return the numbers of a step's rows."""
        return self.steps_of_rows[step]

    def batches(self, step: int, device: torch.device) -> Iterator[data.Batch]:
        """Yield this process's micro-batches of a step, on a device."""
        return self.dealt(step, self.of(step), self.split, self.groups, device)

    def dealt(
        self,
        step: int,
        rows: np.ndarray,
        split: data.Split,
        groups: np.ndarray | None,
        device: torch.device,
    ) -> Iterator[data.Batch]:
        """Yield this process's micro-batches of a step of some `rows` of a split; the last of them
        are empty where it is to take more than it has rows for."""
        tokens, lengths = self.args.tokens_per_microbatch, split.rows["length"]
        mine = dealt_to(rows, lengths, self.peers.rank, self.peers.world)
        parts = in_groups(mine, lengths, groups, tokens, self.line, self.pack)
        empty = self.peers.even(len(parts)) - len(parts)
        yield from told(step, parts, split, device)
        for _ in range(empty):
            yield data.Batch.empty(int(split.rows["source"][rows[0]])).to(device)

    def deal(self, peers: Any) -> None:
        """Deal each step's rows out among processes."""
        self.peers = peers

    def targets(self, step: int, without: Iterable[int] = ()) -> int:
        """Return how many targets a step has: what its sums are divided by, once; `without` those
        of some sources."""
        return targets_of(self.split.rows[self.of(step)], without)

    def tokens(self, step: int) -> int:
        """Return how many tokens a step has."""
        return int(self.lengths[self.of(step)].sum())
