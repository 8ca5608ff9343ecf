"""Which rows are kept and on which side: duplicates, the stable train / val split, and the copying
of staged rows to both sides."""

import collections
import heapq
import json
from pathlib import Path

import numpy as np

from lib import data, files

BLOCK_TOKENS = 1 << 22  # tokens copied at once
STAGED = np.dtype(
    [("length", "<u4"), ("targets", "<u4"), ("source", "<u2"), ("prompt", "<u8")]
)  # one row before it has a side; prompt: its hash


class Seen:
    """A set of 64-bit hashes at about 8 bytes each: a sorted array, and a small set of those that
    are not merged into it yet."""

    def __init__(self):
        self.old, self.new = np.empty(0, np.uint64), set()

    def add(self, value):
        """Add a hash; return whether it is new."""
        place = np.searchsorted(self.old, np.uint64(value))
        if value in self.new or place < len(self.old) and self.old[place] == value:
            return False
        self.new.add(value)
        if len(self.new) > max(100_000, len(self.old) // 8):
            self.old = np.union1d(self.old, np.fromiter(self.new, np.uint64, len(self.new)))
            self.new = set()
        return True


class ValRows:
    """Which rows are validation rows: those whose prompts have the smallest hashes, up to a share
    of all hashes or a count of rows."""

    def __init__(self, val):
        self.val, self.smallest = (
            val,
            [],
        )  # a heap of negated hashes: its top is the largest of the `val` smallest so far

    def candidate(self, prompt):
        """Return False for a row that can no longer become a validation row, whatever follows."""
        if self.val < 1:
            return prompt < int(self.val * 2**64)
        if len(self.smallest) < self.val:
            heapq.heappush(self.smallest, -prompt)
            return True
        heapq.heappushpop(self.smallest, -prompt)
        return prompt <= -self.smallest[0]

    def chosen(self, prompts):
        """Return the mask of validation rows. A count takes whole groups of equal prompts, so that
        it may stay a little below."""
        if self.val < 1:
            return prompts < np.uint64(int(self.val * 2**64))
        values, counts = np.unique(prompts, return_counts=True)
        groups = np.searchsorted(np.cumsum(counts), self.val, side="right")
        return np.isin(prompts, values[:groups])


def by_reason(lost: collections.Counter) -> dict[str, int]:
    """Return how many rows were dropped for each reason, the commonest first; lost counts them by
    (source, reason)."""
    dropped = collections.Counter()
    for (_, reason), count in lost.items():
        dropped[reason] += count
    return dict(dropped.most_common())


def divide(partial: Path, staged: np.ndarray, is_val: np.ndarray) -> None:
    """Copy the staged rows to train and val, a block at a time, and write the row records."""
    for part, dtype in (("tokens", np.uint32), ("answer", bool)):
        # plain reads: the pages of a memory map would count as this process's memory
        with open(partial / f"staged.{part}.npy", "rb") as source:
            version = np.lib.format.read_magic(source)
            assert version == (1, 0), version
            np.lib.format.read_array_header_1_0(source)
            writers = [
                files.NpyWriter(partial / f"{split}.{part}.npy", dtype)
                for split in ("train", "val")
            ]
            ends = np.cumsum(staged["length"], dtype=np.int64)
            row = 0
            while row < len(staged):
                done = ends[row - 1] if row else 0
                stop = max(row + 1, int(np.searchsorted(ends, done + BLOCK_TOKENS, side="right")))
                block = np.fromfile(source, dtype, int(ends[stop - 1] - done))
                side = np.repeat(is_val[row:stop], staged["length"][row:stop])
                writers[0].append(block[~side])
                writers[1].append(block[side])
                row = stop
        for writer in writers:
            writer.close()
    for split, mask in (("train", ~is_val), ("val", is_val)):
        mine = staged[mask]
        records = np.zeros(len(mine), data.ROW)
        for name in ("length", "targets", "source"):
            records[name] = mine[name]
        for name, counted in (("start", "length"), ("first_target", "targets")):
            records[name][1:] = np.cumsum(mine[counted][:-1], dtype=np.uint64)
        writer = files.NpyWriter(partial / f"{split}.rows.npy", data.ROW)
        writer.append(records)
        writer.close()
    if (partial / "staged.prompts.jsonl").stat().st_size:
        with (
            open(partial / "staged.prompts.jsonl", encoding="utf-8") as source,
            open(partial / "val.prompts.jsonl", "w", encoding="utf-8") as target,
        ):
            for number, prompt in map(json.loads, source):
                if is_val[number]:
                    target.write(json.dumps(prompt, ensure_ascii=False) + "\n")
    for path in partial.glob("staged.*"):
        path.unlink()
