"""Which rows are kept and on which side: duplicates, the stable train / val split, and the copying
of staged rows to both sides."""

import collections
import hashlib
import heapq
import json
import math
import os
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import numpy as np

from lib import data, files

FILES = ("tokens.npy", "answer.npy", "rows.npy")  # of each side
COUNTED = ("read", "lost")
NOTED = "staged.json"  # in a folder that is not finished: how far it has come
BLOCK_TOKENS = 1 << 22  # tokens copied at once
# one row before it has a side; prompt: its hash; logp: see data.Split
STAGED = np.dtype(
    [("length", "<u4"), ("targets", "<u4"), ("source", "<u2"), ("prompt", "<u8"), ("logp", "<f4")]
)


def hash64(value: bytes, seed: int | None = None) -> int:
    """Return 64 bits of some bytes, others for every seed."""
    key = b"" if seed is None else str(seed).encode()
    return int.from_bytes(hashlib.blake2b(value, digest_size=8, key=key).digest(), "little")


class NpyWriter:
    """A one-dimensional .npy file that grows by `append`; its length enters the header at `close`.

    numpy pads its header for a growing first axis, so that the header can be written again in
    place.
    """

    def __init__(self, path: Path, dtype: np.dtype, count: int = 0) -> None:
        """Begin a file, or go on with one after its first `count` values. sum: the values' CRC-32,
        as they are on the disk."""
        self.dtype, self.count, self.sum = np.dtype(dtype), count, 0
        self.file = open(path, "r+b" if count else "wb")
        self._header()
        left = count * self.dtype.itemsize
        while left and (block := self.file.read(min(files.BLOCK, left))):
            self.sum, left = zlib.crc32(block, self.sum), left - len(block)
        self.file.seek(left, os.SEEK_CUR)
        self.file.truncate()

    def _header(self) -> None:
        self.file.seek(0)
        kind = np.lib.format.dtype_to_descr(self.dtype)
        told = {"descr": kind, "fortran_order": False, "shape": (self.count,)}
        np.lib.format.write_array_header_1_0(self.file, told)

    def append(self, values: np.ndarray) -> None:
        content = np.ascontiguousarray(values, dtype=self.dtype).tobytes()
        self.file.write(content)
        self.sum = zlib.crc32(content, self.sum)
        self.count += len(values)

    def close(self) -> None:
        end = self.file.tell()
        self._header()
        assert end == self.file.tell() + self.count * self.dtype.itemsize, (end, self.count)
        self.file.close()


@dataclass
class Staged:
    """Rows that were read and tokenized into a folder, and which of them are validation rows.

    rows (N,) STAGED; is_val (N,) bool; read: rows of the sources by (source, file); lost: those
    dropped by (source, reason); cut: texts longer than --max-len, and the rows they became;
    labels: the names of the classes, for rows that have one each.
    """

    rows: np.ndarray
    is_val: np.ndarray
    read: collections.Counter
    lost: collections.Counter
    cut: list[int] = field(default_factory=lambda: [0, 0])
    labels: list[str] = field(default_factory=list)


class Staging:
    """The rows that are kept, written to a folder as they come (`staged.*`), before they have a
    side. What `save` noted, a later process goes on with."""

    def __init__(self, folder: Path, state: dict | None = None) -> None:
        self.folder = folder
        begun = state or {"rows": 0, "tokens": 0, "prompts": 0}
        self.tokens, self.answer, self.rows = (
            NpyWriter(folder / f"staged.{part}.npy", dtype, begun[size])
            for part, dtype, size in (
                *(("tokens", np.uint32, "tokens"), ("answer", bool, "tokens")),
                ("rows", STAGED, "rows"),
            )
        )
        self.prompts = open(folder / "staged.prompts.jsonl", "r+b" if state else "wb")
        self.prompts.truncate(begun["prompts"])
        self.prompt_sum = 0
        while state and (block := self.prompts.read(files.BLOCK)):
            self.prompt_sum = zlib.crc32(block, self.prompt_sum)
        if self.sums != begun.get("sums", self.sums):
            seen = "other rows staged than were written"
            files.fail(f"{folder} is damaged", seen, mend=f"rm -r {folder}, then the same command")
        self.kept: collections.Counter = collections.Counter()  # by source

    @property
    def sums(self) -> list[int]:
        return [self.tokens.sum, self.answer.sum, self.rows.sum, self.prompt_sum]

    def save(self, progress: "Progress") -> None:
        """Note how far it has come, for a process that is killed from here on."""
        if not progress.key:
            return
        for file in (self.tokens.file, self.answer.file, self.rows.file, self.prompts):
            file.flush()
            os.fsync(file.fileno())
        sizes = {"rows": self.count, "tokens": self.tokens.count, "prompts": self.prompts.tell()}
        noted = {"sizes": sizes | {"sums": self.sums}} | progress.told()
        line = files.with_sum(json.dumps(noted).encode())
        files.write_text(self.folder / NOTED, line.decode())

    def replay(self, seen: "Seen", val_rows: "ValRows") -> None:
        """Tell both of the rows that are there already."""
        with open(self.rows.file.name, "rb") as rows, open(self.tokens.file.name, "rb") as tokens:
            for file in (rows, tokens):
                np.lib.format.read_magic(file)
                np.lib.format.read_array_header_1_0(file)
            for row in np.fromfile(rows, STAGED, self.count):
                ids = np.fromfile(tokens, np.uint32, row["length"])
                if np.isnan(row["logp"]):
                    seen.add(hash64(ids.tobytes()))
                val_rows.candidate(int(row["prompt"]))
                self.kept[int(row["source"])] += 1

    @property
    def count(self) -> int:
        return self.rows.count

    def append(
        self, ids: np.ndarray, answer: np.ndarray, source: int, prompt: int, logp: float = math.nan
    ) -> None:
        self.tokens.append(ids)
        self.answer.append(answer)
        self.kept[source] += 1
        self.rows.append(np.array([(len(ids), answer.sum(), source, prompt, logp)], STAGED))

    def append_prompt(self, prompt: list[dict], reference: str) -> None:
        """Note the messages before the answer and the reference of the row appended last: it may
        become a validation row."""
        shown = []
        for message in prompt:
            shown.append({name: value for name, value in message.items() if name != "learn"})
        said = {"messages": shown, "reference": reference}
        line = json.dumps([self.count - 1, said], ensure_ascii=False) + "\n"
        content = line.encode()
        self.prompts.write(content)
        self.prompt_sum = zlib.crc32(content, self.prompt_sum)

    def close(self) -> np.ndarray:
        """Return the records of all rows, (N,) STAGED."""
        for writer in (self.tokens, self.answer, self.rows, self.prompts):
            writer.close()
        return np.load(self.folder / "staged.rows.npy")


@dataclass
class Progress:
    """How far the rows of the sources are staged, for a process that goes on with them.

    read, lost, cut: as in Staged; full: sources that --limit takes no more of, ended: those that
    have no more; quotas: see sources.passes; key: of all that the rows depend on ("": nothing is
    noted); sizes: of the staged files, None at the beginning.
    """

    key: str
    read: collections.Counter = field(default_factory=collections.Counter)
    lost: collections.Counter = field(default_factory=collections.Counter)
    cut: list[int] = field(default_factory=lambda: [0, 0])
    full: set[int] = field(default_factory=set)
    ended: set[int] = field(default_factory=set)
    quotas: list[int] = field(default_factory=list)
    sizes: dict | None = None

    @classmethod
    def found(cls, partial: Path, key: str) -> "Progress":
        """Return what a killed process of that key noted in its folder, or a beginning."""
        try:
            noted = json.loads(line := (partial / NOTED).read_bytes())
            if not key or noted["key"] != key or not files.is_whole(line):
                return cls(key)
            counts = (collections.Counter({(a, b): n for a, b, n in noted[x]}) for x in COUNTED)
            sets = ({*noted[name]} for name in ("full", "ended"))
            return cls(key, *counts, noted["cut"], *sets, noted["quotas"], noted["sizes"])
        except (OSError, ValueError, KeyError, TypeError):
            return cls(key)

    def told(self) -> dict:
        counts = {}
        for name in COUNTED:
            counts[name] = [[*place, count] for place, count in getattr(self, name).items()]
        counts |= {"full": sorted(self.full), "ended": sorted(self.ended)}
        return {"key": self.key, **counts, "cut": self.cut, "quotas": self.quotas}


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
    of all hashes or a count of rows; or those whose prompts have one of a set of hashes."""

    def __init__(self, val: float | frozenset[int]):
        # a heap of negated hashes: its top is the largest of the `val` smallest so far
        self.val, self.smallest = val, []
        self.known = isinstance(val, frozenset)  # from the beginning

    def candidate(self, prompt):
        """Return False for a row that can no longer become a validation row, whatever follows."""
        if isinstance(self.val, frozenset):
            return prompt in self.val
        if self.val < 1:
            return prompt < int(self.val * 2**64)
        if len(self.smallest) < self.val:
            heapq.heappush(self.smallest, -prompt)
            return True
        heapq.heappushpop(self.smallest, -prompt)
        return prompt <= -self.smallest[0]

    def mask(self, prompts):
        """Return the mask of validation rows. A count takes whole groups of equal prompts, so that
        it may stay a little below."""
        if isinstance(self.val, frozenset):
            return np.isin(prompts, np.array([*self.val], np.uint64))
        if self.val < 1:
            return prompts < np.uint64(int(self.val * 2**64))
        values, counts = np.unique(prompts, return_counts=True)
        groups = np.searchsorted(np.cumsum(counts), self.val, side="right")
        return np.isin(prompts, values[:groups])


def on_both_sides(folder: Path, names: tuple[str, ...]) -> list[Path]:
    """Return the files of those names of train and val."""
    return [folder / f"{side}.{name}" for side in ("train", "val") for name in names]


def by_reason(lost: collections.Counter) -> dict[str, int]:
    """Return how many rows were dropped for each reason, the commonest first; lost counts them by
    (source, reason)."""
    dropped = collections.Counter()
    for (_, reason), count in lost.items():
        dropped[reason] += count
    return dict(dropped.most_common())


def none_left(read: collections.Counter, lost: collections.Counter, wanted: str) -> NoReturn:
    """End with one line that says why no row was kept."""
    counted = by_reason(lost)
    reasons = [f"{reason} {count}" for reason, count in counted.items()]
    unknown = any(reason.startswith("unknown role ") for reason in counted)
    files.fail(
        "no row is left",
        seen=f"{read.total()} rows, dropped: {', '.join(reasons) or 'nothing dropped'}",
        wanted=wanted,
        mend="--columns user=NAME,assistant=NAME" if unknown else None,
    )


def refuse_empty(staged: Staged) -> None:
    """Refuse rows that nothing can be trained on, and warn where nothing can be evaluated."""
    if not len(staged.rows):
        none_left(staged.read, staged.lost, "rows with a prompt and an answer, within --max-len")
    if staged.is_val.all():
        files.fail(
            "no row is left to train on",
            seen=f"{len(staged.rows)} rows, all of them in val",
            wanted="more rows, or a smaller --val",
        )
    if not staged.is_val.any():
        print(
            "prepare warning: val is empty: nothing can be evaluated; give more rows or a larger"
            " --val",
            flush=True,
        )


def write_sides(partial: Path, staged: Staged) -> None:
    """Write the staged rows as train and val, their records and the prompts of val, and delete what
    was staged."""
    for part, dtype in (("tokens", np.uint32), ("answer", bool)):
        _copy(partial, part, dtype, staged)
    own = not np.isnan(staged.rows["logp"]).all()
    for side, mask in (("train", ~staged.is_val), ("val", staged.is_val)):
        mine = staged.rows[mask]
        records = np.zeros(len(mine), data.ROW)
        for name in ("length", "targets", "source"):
            records[name] = mine[name]
        for name, counted in (("start", "length"), ("first_target", "targets")):
            records[name][1:] = np.cumsum(mine[counted][:-1], dtype=np.uint64)
        told = {"rows": records} | ({"logp": mine["logp"]} if own else {})
        for part, values in told.items():
            writer = NpyWriter(partial / f"{side}.{part}.npy", values.dtype)
            writer.append(values)
            writer.close()
    if (partial / "staged.prompts.jsonl").stat().st_size:
        with (
            open(partial / "staged.prompts.jsonl", encoding="utf-8") as source,
            open(partial / "val.prompts.jsonl", "w", encoding="utf-8") as target,
        ):
            for number, prompt in map(json.loads, source):
                if staged.is_val[number]:
                    target.write(json.dumps(prompt, ensure_ascii=False) + "\n")
    (partial / NOTED).unlink(missing_ok=True)  # first: it speaks of the others
    for path in partial.glob("staged.*"):
        path.unlink()


def _copy(partial: Path, part: str, dtype, staged: Staged) -> None:
    """Copy the staged tokens or answers to both sides, a block at a time."""
    train, val = (NpyWriter(partial / f"{side}.{part}.npy", dtype) for side in ("train", "val"))
    lengths = staged.rows["length"]
    ends = np.cumsum(lengths, dtype=np.int64)
    # plain reads: the pages of a memory map would count as this process's memory
    with open(partial / f"staged.{part}.npy", "rb") as source:
        version = np.lib.format.read_magic(source)
        assert version == (1, 0), version
        np.lib.format.read_array_header_1_0(source)
        row = 0
        while row < len(lengths):
            done = ends[row - 1] if row else 0
            stop = max(row + 1, int(np.searchsorted(ends, done + BLOCK_TOKENS, side="right")))
            block = np.fromfile(source, dtype, int(ends[stop - 1] - done))
            side = np.repeat(staged.is_val[row:stop], lengths[row:stop])
            train.append(block[~side])
            val.append(block[side])
            row = stop
    train.close()
    val.close()
