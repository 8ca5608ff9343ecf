"""Rows that have a class each: read, tokenized, chosen and divided so that every class keeps its
share (prepare_data.py --task classify).

Contract: `stage` leaves in a folder what lib/prepare/split.py divides into train and val, and
`divide` adds what such rows have beside tokens:

    SPLIT.labels.npy      uint32 (rows,)   the class of each row, a number in meta.json's `labels`
    SPLIT.texts.parquet   text, label      the rows themselves, in their order: a teacher may have
                          another tokenizer

A row is what the tokenizer makes of the text, special tokens included; its last position is its
only target. A text that comes twice is kept once, with the label it had first, so that no text is
on both sides.
"""

import collections
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lib import files
from lib.prepare import split

BATCH = 1024  # rows tokenized at once: enough for the tokenizer's own threads
FILES = ("labels.npy", "texts.parquet")


def quota(counts: np.ndarray, total: int) -> np.ndarray:
    """Divide `total` among classes of `counts` rows in proportion, by largest remainders, each at
    most what it has.

    Worked example: counts 50, 30, 20 and a total of 7 ask for 3.5, 2.1, 1.4 and get 4, 2, 1.
    """
    total = min(total, int(counts.sum()))
    asked = counts * (total / max(1, counts.sum()))
    given = np.floor(asked).astype(np.int64)
    given[np.argsort(given - asked, kind="stable")[: total - int(given.sum())]] += 1
    return given


def chosen(labels: np.ndarray, hashes: np.ndarray, total: int, leave: int = 0) -> np.ndarray:
    """Return the mask of about `total` rows, of each class its share: those with its smallest
    hashes. `leave`: rows a class keeps at least."""
    counts = np.bincount(labels)
    mask = np.zeros(len(labels), bool)
    for number, count in enumerate(np.minimum(quota(counts, total), np.maximum(counts - leave, 0))):
        mine = np.flatnonzero(labels == number)
        mask[mine[np.argsort(hashes[mine], kind="stable")[:count]]] = True
    return mask


def names_of(found: set[str], declared: list[tuple[str, ...]]) -> list[str]:
    """Return the names of the classes in their order: the one that the data declares, else numbers
    by size, else by the alphabet."""
    for names in declared:
        if found <= set(names):
            return [name for name in names if name in found]
    number = all(re.fullmatch(r"-?[0-9]+", name) for name in found)
    return sorted(found, key=(lambda name: (int(name), name)) if number else None)


def encoded(tokenizer, texts: list[str], max_len: int, truncate: bool) -> list[list[int]]:
    """Return the token ids of texts, special tokens included; with `truncate` at most `max_len`,
    special tokens included."""
    return tokenizer(texts, truncation=truncate, max_length=max_len if truncate else None)[
        "input_ids"
    ]


def batches(rows: Iterator, size: int) -> Iterator[list]:
    batch = []
    for row in rows:
        batch.append(row)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def stage(
    partial: Path, numbered: Iterator, declared: list[tuple[str, ...]], tokenizer, args
) -> tuple:
    """Tokenize rows ((source, file), (text, label)) into `partial` and choose which are kept and
    which of these are validation rows.

    Return the staged records, the mask of validation rows, the names of the classes, rows read by
    (source, file) and dropped by (source, reason).
    """
    read, dropped, seen = collections.Counter(), collections.Counter(), split.Seen()
    texts, labels, ids, sources, hashes = [], [], [], [], []
    longest = min(args.max_len, tokenizer.model_max_length)
    for batch in batches(numbered, BATCH):
        for (number, (text, label)), tokens in zip(
            batch,
            encoded(tokenizer, [row[0] for _, row in batch], longest, args.long == "truncate"),
        ):
            read[number] += 1
            digest = int.from_bytes(
                hashlib.blake2b(text.encode(), digest_size=8, key=str(args.seed).encode()).digest(),
                "little",
            )
            reason = (
                "empty"
                if not text.strip() or not tokens
                else (
                    "no label"
                    if not label
                    else (
                        "too long"
                        if len(tokens) > longest
                        else "duplicate"
                        if not seen.add(digest)
                        else None
                    )
                )
            )
            if reason:
                dropped[number[0], reason] += 1
                continue
            texts.append(text)
            labels.append(label)
            ids.append(np.array(tokens, np.uint32))
            sources.append(number[0])
            hashes.append(digest)
    names = names_of(set(labels), declared)
    place = {name: number for number, name in enumerate(names)}
    labels, hashes = (
        np.array([place[label] for label in labels], np.int64),
        np.array(hashes, np.uint64),
    )
    kept = chosen(labels, hashes, args.limit) if args.limit else np.ones(len(labels), bool)
    there = set(labels[kept].tolist())
    if not there:
        reasons = (
            ", ".join(f"{reason} {count}" for reason, count in split.by_reason(dropped).items())
            or "nothing dropped"
        )
        files.fail(
            "no row is left",
            f"{read.total()} rows, dropped: {reasons}",
            "rows with a text and a label, within --max-len",
        )
    if len(there) < 2:
        files.fail(
            "there is nothing to tell apart",
            f"{names[there.pop()]!r} alone",
            "rows of two classes or more",
            "--columns text=COL,label=COL",
        )
    if lost := [name for number, name in enumerate(names) if number not in there]:
        files.fail(
            "--limit leaves classes without a row",
            ", ".join(lost[:5]),
            f"rows of all {len(names)} classes",
            "a larger --limit",
        )
    index = np.flatnonzero(kept)
    total = round(args.val * len(index)) if args.val < 1 else int(args.val)
    is_val = chosen(labels[index], hashes[index], total, leave=1)

    tokens, answers = (
        files.NpyWriter(partial / f"staged.{part}.npy", dtype)
        for part, dtype in (("tokens", np.uint32), ("answer", bool))
    )
    staged = np.zeros(len(index), split.STAGED)
    for number, row in enumerate(index):
        tokens.append(ids[row])
        answers.append(np.arange(len(ids[row])) == len(ids[row]) - 1)
        staged[number] = (len(ids[row]), 1, sources[row], hashes[row])
    for writer in (tokens, answers):
        writer.close()
    (partial / "staged.prompts.jsonl").touch()
    for side, mask in (("train", ~is_val), ("val", is_val)):
        mine = index[mask]
        np.save(partial / f"{side}.labels.npy", labels[mine].astype(np.uint32))
        pq.write_table(
            pa.table(
                {
                    "text": [texts[row] for row in mine],
                    "label": pa.array([names[labels[row]] for row in mine], pa.string()),
                }
            ),
            partial / f"{side}.texts.parquet",
        )
    return staged, is_val, names, read, dropped


def counts(folder: Path, names: list[str]) -> dict[str, dict[str, int]]:
    """Return the rows of every class on both sides of a data folder."""
    sides = {
        side: np.bincount(np.load(folder / f"{side}.labels.npy"), minlength=len(names))
        for side in ("train", "val")
    }
    return {
        name: {side: int(count[number]) for side, count in sides.items()}
        for number, name in enumerate(names)
    }
