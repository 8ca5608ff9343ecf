"""Rows that have a class each: read, tokenized, chosen and divided so that every class keeps its
share (prepare_data.py --task classify).

Contract: `stage` leaves in a folder what lib/prepare/split.py divides into train and val, and what
such rows have beside tokens:

    SPLIT.labels.npy      uint32 (rows,)   the class of each row, a number in meta.json's `labels`
    SPLIT.texts.parquet   text, label      the rows themselves, in their order: a teacher may have
                          another tokenizer

A row is what the tokenizer makes of the text, special tokens included; its last position is its
only target. A text that comes twice is kept once, with the label it had first, so that no text is
on both sides.
"""

import argparse
import collections
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lib import files
from lib.prepare import sources, split, workers

LABEL_FILES = ("labels.npy", "texts.parquet")  # of each side
OF_CONVERSATIONS = ("system", "answers", "turns", "think", "mix", "export", "push_to_hub")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add --task."""
    parser.add_argument(
        "--task",
        choices=["language", "classify"],
        default="language",
        help=(
            "what is learnt of a row: the tokens of its answer, or its class (default: %(default)s)"
        ),
    )


def check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse (exit code 2) what rows with a class cannot have."""
    for name in OF_CONVERSATIONS if args.task == "classify" else ():
        if getattr(args, name) != parser.get_default(name):
            parser.error(
                f"--{name.replace('_', '-')} is about conversations: it does not go with --task"
                " classify"
            )


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


def in_proportion(labels: np.ndarray, hashes: np.ndarray, total: int, leave: int = 0) -> np.ndarray:
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


@dataclass
class LabelledRows:
    """Rows with a class, in memory. numbers: of their sources; hashes: of the seed and the text."""

    texts: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    ids: list[np.ndarray] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    hashes: list[int] = field(default_factory=list)


def _read(
    numbered: Iterator, tokenizer, args, read: collections.Counter, lost: collections.Counter
) -> LabelledRows:
    """Tokenize rows ((source, file), (text, label)); count those read and those lost."""
    rows, seen = LabelledRows(), split.Seen()
    longest = min(args.max_len, tokenizer.model_max_length)
    how = {"truncation": True, "max_length": longest} if args.long == "truncate" else {}
    for batch in workers.batches(numbered):
        made = tokenizer([text for _, (text, _) in batch], **how)["input_ids"]
        for (number, (text, label)), ids in zip(batch, made):
            read[number] += 1
            digest = split.hash64(text.encode(), args.seed)
            if not text.strip() or not ids:
                lost[number[0], "empty"] += 1
            elif not label:
                lost[number[0], "no label"] += 1
            elif len(ids) > longest:
                lost[number[0], "too long"] += 1
            elif not seen.add(digest):
                lost[number[0], "duplicate"] += 1
            else:
                rows.texts.append(text)
                rows.labels.append(label)
                rows.ids.append(np.array(ids, np.uint32))
                rows.numbers.append(number[0])
                rows.hashes.append(digest)
    return rows


def _refuse_few_classes(names: list[str], labels: np.ndarray) -> None:
    """Refuse the rows that --limit left where they are of one class, or lack one of `names`."""
    there = set(labels.tolist())
    if len(there) < 2:
        files.fail(
            "there is nothing to tell apart",
            f"{names[there.pop()]!r} alone",
            "rows of two classes or more",
            "--columns text=COL,label=COL",
        )
    if lacking := [name for number, name in enumerate(names) if number not in there]:
        files.fail(
            "--limit leaves classes without a row",
            ", ".join(lacking[:5]),
            f"rows of all {len(names)} classes",
            "a larger --limit",
        )


def _write_side(partial: Path, side: str, texts: list[str], labels: np.ndarray, names: list[str]):
    np.save(partial / f"{side}.labels.npy", labels.astype(np.uint32))
    said = pa.array([names[label] for label in labels], pa.string())
    pq.write_table(pa.table({"text": texts, "label": said}), partial / f"{side}.texts.parquet")


def stage(
    partial: Path, numbered: Iterator, inputs: list[sources.Source], tokenizer, args
) -> split.Staged:
    """Tokenize rows ((source, file), (text, label)) into `partial` and choose which are kept and
    which of these are validation rows."""
    read, lost = collections.Counter(), collections.Counter()
    rows = _read(numbered, tokenizer, args, read, lost)
    if not rows.texts:
        split.none_left(read, lost, "rows with a text and a label, within --max-len")
    declared = [file.names for source in inputs for file in source.files if file.names]
    names = names_of(set(rows.labels), declared)
    place = {name: number for number, name in enumerate(names)}
    labels = np.array([place[label] for label in rows.labels], np.int64)
    hashes = np.array(rows.hashes, np.uint64)
    kept = np.arange(len(labels))
    if args.limit:
        kept = np.flatnonzero(in_proportion(labels, hashes, args.limit))
    _refuse_few_classes(names, labels[kept])
    total = round(args.val * len(kept)) if args.val < 1 else int(args.val)
    is_val = in_proportion(labels[kept], hashes[kept], total, leave=1)

    staging = split.Staging(partial)
    for row in kept:
        ids = rows.ids[row]
        last = np.arange(len(ids)) == len(ids) - 1
        staging.append(ids, last, rows.numbers[row], rows.hashes[row])
    for side, mask in (("train", ~is_val), ("val", is_val)):
        mine = kept[mask]
        _write_side(partial, side, [rows.texts[row] for row in mine], labels[mine], names)
    return split.Staged(staging.close(), is_val, read, lost, labels=names)


def facts_of_classes(folder: Path, names: list[str]) -> dict:
    """Return what meta.json says of the classes: their names, and the rows of each on both sides;
    warn where some cannot be evaluated."""
    counts = {}
    sides = {side: np.load(folder / f"{side}.labels.npy") for side in ("train", "val")}
    for number, name in enumerate(names):
        counts[name] = {side: int((labels == number).sum()) for side, labels in sides.items()}
    if lacking := sum(not count["val"] for count in counts.values()):
        print(
            f"prepare warning: {lacking} of {len(names)} classes have no validation row; give more"
            " rows or a larger --val",
            flush=True,
        )
    return {"task": "classify", "labels": names, "classes": counts}
