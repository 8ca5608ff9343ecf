"""A prepared data set: what `prepare_data.py` wrote, read through memory maps, and cut into padded
or packed batches.

On disk, in data/NAME/ (SPLIT is train or val):

    SPLIT.tokens.npy   uint32 (tokens,)   all rows end to end
    SPLIT.answer.npy   bool   (tokens,)   True where the token is a target: to be predicted, and
                       trained on
    SPLIT.rows.npy     ROW    (rows,)     one record a row
    SPLIT.labels.npy   uint32 (rows,)     rows with a class each (lib/prepare/classes.py): its
                       number in meta.json's `labels`; the row's only target
    SPLIT.texts.parquet                   ... and their texts, for a teacher with another tokenizer
    SPLIT.logp.npy     float32 (rows,)    where some are the student's own text (meta.json's `own`):
                       log p of a row's targets, nats at T=1, by who wrote them; NaN of the others
    tokenizer/         the tokenizer itself, so that no later stage needs a network
    report.png         how long rows are, where they come from, why others were dropped
                       (lib/measure/plots.py; without matplotlib there is none)
    answers/ rows/     a teacher's answers (lib/prepare/answers.py), and the rows as text
                       (lib/prepare/export.py), where they were asked for
    meta.json          written last and sealed (lib/files.py): identities, counts, sources, what
                       was dropped and why; checksums of all the above but report.png and answers/

The model's output at position t-1 predicts token t; position 0 of a row is never a target. Chunk c
is the rows [c * rows_per_chunk, (c+1) * rows_per_chunk) of train; nothing is split physically.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from lib import files, template

FORMAT = 1
ROW = np.dtype(
    [
        ("start", "<u8"),  # first token's place in SPLIT.tokens.npy
        ("length", "<u4"),  # tokens in the row
        ("first_target", "<u8"),  # the first one's number among all targets of the split, in order
        ("targets", "<u4"),  # targets in the row
        ("source", "<u2"),  # number of the source in meta.json's list
    ]
)


META = {  # of meta.json, what later stages read
    "identities": {...: str, "data": str, "vocabulary": str},
    "sources": [{"name": str}],
    "rows_per_chunk": range(1, 1 << 62),
    "labels?": [str],
    "mix?": (str, None),
}
MAKE_AGAIN = "make data, with ARGS=--fresh"
LOOKED_AT = 1 << 26  # tokens up to which every one of a split is looked at when it is opened


@dataclass(frozen=True)
class Batch:
    """One micro-batch: B lines of L tokens, each line holding one or more rows end to end.

    tokens     (B, L) int64   padded with 0; padding is a row of its own, so nothing real attends to
               it
    positions  (B, L) int64   restart at 0 with every row: that is what keeps packed rows apart
    where      (N,)   int64   index into the flattened (B * L) outputs of the position that predicts
               target n
    labels     (N,)   int64   the target tokens; of rows with a class, the classes, one a row
    numbers    (N,)   int64   each target's number in its split: its record in a logits file
    rows       the row numbers, in order
    row_of     (B, L) int64   the place in `rows` of the row that a token belongs to; -1 is padding
    source     the number of the first row's source
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    where: torch.Tensor
    labels: torch.Tensor
    numbers: torch.Tensor
    rows: list[int]
    row_of: torch.Tensor
    source: int = 0

    @classmethod
    def empty(cls, source: int = 0) -> "Batch":
        """Return a batch of padding alone, as if of a source: a forward pass that teaches and
        measures nothing, for a process that must take as many as another one."""
        tokens, nothing = torch.zeros((1, 2), dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
        return cls(tokens, torch.arange(2)[None], nothing, nothing, nothing, [], tokens - 1, source)

    def to(self, device: torch.device) -> "Batch":
        """Return what a model reads of it on a device; numbers and rows stay on the CPU."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            # what comes to the CPU is read there at once
            return tensor.to(device, non_blocking=device.type == "cuda")

        return replace(
            self,
            tokens=move(self.tokens),
            positions=move(self.positions),
            where=move(self.where),
            labels=move(self.labels),
        )


class Split:
    """The rows of train or val. labels: the class of each, where they have one
    (lib/prepare/classes.py), else None; logp: log p of each one's targets when they were written,
    where the student wrote some, else None."""

    labels: np.ndarray | None = None
    logp: np.ndarray | None = None

    def __init__(self, folder: Path, name: str) -> None:
        def part(what: str, dtype: np.dtype | type) -> np.ndarray:
            return files.read_npy(folder / f"{name}.{what}.npy", dtype, MAKE_AGAIN)

        self.tokens, self.answer = part("tokens", np.uint32), part("answer", bool)
        self.rows = part("rows", ROW)
        if (folder / f"{name}.labels.npy").exists():
            self.labels = np.asarray(part("labels", np.uint32))
        if (folder / f"{name}.logp.npy").exists():
            self.logp = part("logp", np.float32)
        if wrong := self._misfit():
            files.fail(f"{folder}/{name}.*.npy do not fit together", wrong, mend=MAKE_AGAIN)

    @classmethod
    def of(cls, rows: Sequence[tuple[np.ndarray, np.ndarray, int]]) -> "Split":
        """Return rows that lie in no file: token ids (L,), answer mask (L,) and source of each."""
        made = cls.__new__(cls)
        made.tokens = np.concatenate([ids for ids, _, _ in rows])
        made.answer = np.concatenate([answer for _, answer, _ in rows])
        lengths = np.array([len(ids) for ids, _, _ in rows])
        targets = np.array([int(answer.sum()) for _, answer, _ in rows])
        made.rows = np.zeros(len(rows), ROW)
        made.rows["length"], made.rows["start"] = lengths, np.cumsum(lengths) - lengths
        made.rows["targets"], made.rows["first_target"] = targets, np.cumsum(targets) - targets
        made.rows["source"] = [source for _, _, source in rows]
        return made

    @property
    def targets(self) -> int:
        last = self.rows[-1:]
        return int(last["first_target"].sum() + last["targets"].sum())

    def _misfit(self) -> str | None:
        """Return what of rows, tokens and answers contradicts the rest: rows lie end to end, and
        each has as many targets as it says, none of them its first token."""
        count, lengths, targets = len(self.tokens), self.rows["length"], self.rows["targets"]
        if count != len(self.answer):
            return f"{count} tokens, {len(self.answer)} mask entries"
        if self.labels is not None and len(self.labels) != len(self.rows):
            return f"{len(self.labels)} labels of {len(self.rows)} rows"
        if self.logp is not None and len(self.logp) != len(self.rows):
            return f"log-probabilities of {len(self.logp)} of {len(self.rows)} rows"
        if int(lengths.sum(dtype=np.uint64)) != count or not lengths.all():
            return f"rows of {int(lengths.sum(dtype=np.uint64))} tokens, {count} tokens"
        for begin, size in (("start", lengths), ("first_target", targets)):
            if (self.rows[begin] != np.cumsum(size, dtype=np.uint64) - size).any():
                return f"a {begin} that is not where the row before ends"
        some = slice(int(np.searchsorted(self.rows["start"], LOOKED_AT)))
        starts = self.rows["start"][some].astype(np.int64)
        mask = self.answer[: int(lengths[some].sum())]
        if len(mask) and mask.view(np.uint8).max() > 1:
            return "a mask entry that is neither True nor False"
        if mask[starts].any():
            return "a target that is the first token of its row, which nothing predicts"
        if len(starts) and (np.add.reduceat(mask, starts, dtype=np.int64) != targets[some]).any():
            return "a row with another number of targets than its mask"
        return None

    @cached_property
    def largest_token(self) -> int:
        """The largest token id (of the first LOOKED_AT tokens); -1 of an empty split."""
        return int(self.tokens[:LOOKED_AT].max(initial=0)) if len(self.tokens) else -1

    def row(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a row's token ids and its answer mask, both (L,)."""
        start, length = int(self.rows[number]["start"]), int(self.rows[number]["length"])
        return self.tokens[start : start + length], self.answer[start : start + length]

    def end_tokens(self) -> list[int]:
        """Return the tokens that end nine answers in ten of a source, of each source: what a
        generator must stop at. (Beside conversations texts have an end of their own.)"""
        found = []
        for source in np.unique(self.rows["source"]):
            last = []
            for number in np.flatnonzero(self.rows["source"] == source)[:1000]:
                ids, answer = self.row(number)
                last += ids[np.flatnonzero(answer)[-1:]].tolist()
            found += [token for token in set(last) if last.count(token) >= 0.9 * len(last)]
        return list(dict.fromkeys(found))

    def batch(self, lines: list[list[int]], pad_to: int = 1) -> Batch:
        """Lay rows out as lines (see Batch). Worked example: rows A (3 tokens, the last 2 are
        targets) and B (2 tokens, the last is a target) on one line give tokens A0 A1 A2 B0 B1,
        positions 0 1 2 0 1, where 0 1 3, labels A1 A2 B1, row_of 0 0 0 1 1.
        """
        lengths = self.rows["length"]
        width = max(sum(int(lengths[row]) for row in line) for line in lines)
        width = -(-width // pad_to) * pad_to
        shape = (len(lines), width)
        tokens, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        row_of = np.full(shape, -1, np.int64)
        rows: list[int] = []
        where, labels, numbers = [], [], []
        for b, line in enumerate(lines):
            at = 0
            for row in line:
                ids, answer = self.row(row)
                here, targets = slice(at, at + len(ids)), np.flatnonzero(answer)
                tokens[b, here] = ids
                positions[b, here] = np.arange(len(ids))
                row_of[b, here] = len(rows)
                where.append(b * width + at + targets - 1)
                labels.append(ids[targets] if self.labels is None else self.labels[[row]])
                numbers.append(int(self.rows[row]["first_target"]) + np.arange(len(targets)))
                rows.append(row)
                at += len(ids)
            positions[b, at:] = np.arange(width - at)

        def join(parts: list[np.ndarray]) -> torch.Tensor:
            return torch.from_numpy(np.concatenate(parts).astype(np.int64))

        return Batch(
            torch.from_numpy(tokens),
            torch.from_numpy(positions),
            join(where),
            join(labels),
            join(numbers),
            rows,
            torch.from_numpy(row_of),
            int(self.rows[rows[0]]["source"]),
        )


class Dataset:
    """A folder that prepare_data.py finished. Raises the one-line error when it is missing,
    unfinished or of another format."""

    def __init__(
        self, folder: str | Path, trust_remote_code: bool = False, verify: bool = False
    ) -> None:
        self.folder, self.trust_remote_code = Path(folder), trust_remote_code
        path = self.folder / "meta.json"
        self.meta = files.read_json(path, mend="make data (python prepare_data.py --help)")
        if self.meta.get("format") != FORMAT:
            files.fail(
                f"{folder} has another format",
                seen=self.meta.get("format"),
                wanted=FORMAT,
                mend=MAKE_AGAIN,
            )
        files.expect(path, self.meta, META, MAKE_AGAIN)
        if not files.check(self.folder, self.meta, verify, MAKE_AGAIN):
            files.say_none(self.folder)
        self.train, self.val = Split(self.folder, "train"), Split(self.folder, "val")
        for split in (self.train, self.val):
            most = -1 if split.labels is None else int(split.labels.max(initial=0))
            if most >= len(self.labels):
                files.fail(f"{folder} holds a label without a name", most, self.labels, MAKE_AGAIN)
        if not len(self.train.rows):
            files.fail(
                f"{folder} holds no training row",
                mend="python prepare_data.py with other data or a larger --max-len",
            )

    def used(self) -> list[int]:
        """Return the tokens that the rows hold, in order."""
        there = np.zeros(0, bool)
        for split in (self.train, self.val):
            for start in range(0, len(split.tokens), 1 << 24):
                part = np.bincount(split.tokens[start : start + (1 << 24)]) > 0
                there = np.pad(there, (0, max(0, len(part) - len(there))))
                there[: len(part)] |= part
        return np.flatnonzero(there).tolist()

    @property
    def identities(self) -> dict:
        """Hashes: `data` (token ids and masks), `vocabulary` (token -> id), `tokenizer`
        (vocabulary, special ids, chat template)."""
        return self.meta["identities"]

    @property
    def sources(self) -> list[str]:
        """The names of the sources; a row's `source` is a place in this list."""
        return [source["name"] for source in self.meta["sources"]]

    @property
    def val_own(self) -> np.ndarray:
        """Whether each val row (rows,) is text that the student wrote: no reference."""
        own = [self.sources.index(name) for name in self.meta.get("own", ())]
        return np.isin(self.val.rows["source"], own)

    def val_described(self) -> str:
        """Return in words what val's measures are not, where the student wrote some of it; else
        ""."""
        if not (count := int(self.val_own.sum())):
            return ""
        return (
            f"val: {count:,} of {len(self.val_own):,} rows are the student's own text: ce, ppl and"
            " acc there are of what was sampled, no loss on references"
        )

    @property
    def labels(self) -> list[str]:
        """The names of the classes, for rows that have one each; else empty."""
        return self.meta.get("labels", [])

    @property
    def chunks(self) -> int:
        return -(-len(self.train.rows) // self.meta["rows_per_chunk"])

    def chunk_rows(self, chunk: int) -> range:
        """Return the row numbers of chunk `chunk` of train."""
        size = self.meta["rows_per_chunk"]
        return range(chunk * size, min((chunk + 1) * size, len(self.train.rows)))

    def check_tokens(self, rows: int, folder: Path) -> None:
        """Refuse rows that hold tokens which a model of so many embeddings does not know. (Those
        that the tokenizer has above them, and no row holds, are of no weight.)"""
        most = max(self.train.largest_token, self.val.largest_token)
        if most >= rows:
            # its own tokenizer may have been given them: data made anew would hold them again
            files.fail(
                f"{self.folder} holds tokens that {folder} does not know",
                f"token {most}, {self.tokenizer().convert_ids_to_tokens(most)!r}",
                f"0 to {rows - 1}",
                f"a model with a row for it (model.resize_token_embeddings({most + 1}),"
                " save_pretrained), or prepare_data.py with a --tokenizer or --chat-template"
                " without it",
            )

    def tokenizer(self):
        """Return the tokenizer that made the data."""
        return template.load_tokenizer(self.folder / "tokenizer", self.trust_remote_code)


def retokenized(folder: Path, name: str, tokenizer, max_len: int) -> Split:
    """Return the rows of a split that has texts as another model's tokenizer reads them: the same
    rows, targets and labels in the same order, of at most `max_len` tokens each."""
    from pyarrow import parquet

    own, texts = Split(folder, name), folder / f"{name}.texts.parquet"
    longest = min(max_len, tokenizer.model_max_length)
    ids: list[np.ndarray] = []
    for batch in parquet.read_table(texts, columns=["text"]).to_batches(1024):
        made = tokenizer(batch["text"].to_pylist(), truncation=True, max_length=longest)
        ids += [np.array(tokens, np.uint32) for tokens in made["input_ids"]]
    if len(ids) != len(own.rows):
        files.fail(
            f"{texts} does not fit the rows", f"{len(ids)} texts", f"{len(own.rows)}", MAKE_AGAIN
        )
    lengths = np.array([len(row) for row in ids], np.int64)
    own.rows = own.rows.copy()
    own.rows["length"], own.rows["start"] = lengths, np.cumsum(lengths) - lengths
    own.tokens = np.concatenate(ids) if ids else own.tokens
    own.answer = np.zeros(len(own.tokens), bool)
    own.answer[np.cumsum(lengths) - 1] = True
    return own
