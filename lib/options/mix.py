"""Shares of the sources in training: `--mix "general:0.7->0.3 finance:0.3->0.7"`, read, held
against a data folder, said and measured.

Shares are of TOKENS (whole rows, prompt and answer), not of rows and not of targets. A share moves
in a straight line from the first step to the last. Names are those in meta.json's list of sources;
one that is not named has share 0. Which rows a step takes is lib/plan.py's matter, and known for
the whole run before it begins: shares are figures of the plan, so a run that is continued logs the
same.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lib import data, files

MANY = 5  # passes over a source above which its answers are learnt by heart: worth a warning


@dataclass(frozen=True)
class Part:
    """One source of a mix: its number and name in meta.json, the rows of it that can be trained on,
    its shares at the first and the last step."""

    number: int
    name: str
    rows: np.ndarray
    first: float
    last: float


def parse(text: str) -> dict[str, tuple[float, float]]:
    """Read --mix: name -> (share at the first step, share at the last).

    parse("general:0.7->0.3 finance:0.3->0.7") == {"general": (0.7, 0.3), "finance": (0.3, 0.7)};
    parse("a:1") == {"a": (1.0, 1.0)}. Raises ValueError, one line.
    """
    shares: dict[str, tuple[float, float]] = {}
    for item in text.split():
        name, _, value = item.rpartition(":")
        first, arrow, last = value.partition("->")
        try:
            pair = float(first), float(last if arrow else first)
        except ValueError:
            name = ""
        if not name:
            raise ValueError(f"{item!r} is neither NAME:SHARE nor NAME:FIRST->LAST")
        if not all(0 <= share <= 1 for share in pair):  # nor nan
            raise ValueError(f"{item!r} has a share that is not from 0 to 1")
        if name in shares:
            raise ValueError(f"{name} is there twice")
        shares[name] = pair
    if not shares:
        raise ValueError("no source is named")
    for end, each in zip(("first", "last"), zip(*shares.values())):
        if abs(sum(each) - 1) > 1e-6:
            raise ValueError(f"the shares at the {end} step sum to {sum(each):.7g}, not to 1")
    return shares


def chosen(text: str | None, dataset: data.Dataset) -> str | None:
    """Return the mix of a run: --mix, else the one that prepare_data.py stored; None = off, every
    row once an epoch."""
    text = dataset.meta.get("mix") if text is None else text
    return None if text in (None, "off") else text


def natural(dataset: data.Dataset, rows_there: np.ndarray) -> list[Part]:
    """Return every source with its part of all tokens for a share."""
    rows = dataset.train.rows[rows_there]
    if int(rows["source"].max()) >= len(dataset.sources):  # data of an older prepare_data.py
        files.fail(
            "--eval-sampling cannot weigh the sources",
            f"no names of them in {dataset.folder}/meta.json",
            "two or more named sources",
            "prepare_data.py with several named sources, or no --eval-sampling",
        )
    tokens = np.bincount(rows["source"], rows["length"])
    shares = (tokens / tokens.sum()).tolist()
    return [
        Part(number, dataset.sources[number], rows_there[rows["source"] == number], share, share)
        for number, share in enumerate(shares)
        if share
    ]


def divide(
    text: str | None, dataset: data.Dataset, rows_there: np.ndarray
) -> tuple[np.ndarray, list[Part]]:
    """Return those of `rows_there` that are trained on, and the sources that have a share, each
    with its own; all of them and [] without a mix.

    Refused: a name that the data folder does not have, and a source with a share and no row.
    """
    if text is None:
        return rows_there, []
    try:
        shares = parse(text)
    except ValueError as wrong:  # of the stored one: the flag has been looked at
        files.fail(f"the mix of {dataset.folder} cannot be read", wrong, mend="--mix")
    names = dataset.sources
    if unknown := sorted(set(shares) - set(names)):
        files.fail(
            f"the mix names a source that is not in {dataset.folder}",
            ", ".join(unknown),
            f"names among {', '.join(names) or '(none there)'}",
            "--mix, or --mix off",
        )
    source, parts = dataset.train.rows["source"], []
    source_there = source[rows_there]
    for name, (first, last) in shares.items():
        number = names.index(name)
        rows = rows_there[source_there == number]
        if not first and not last:
            continue
        if not len(rows):
            chunks = np.unique(np.flatnonzero(source == number) // dataset.meta["rows_per_chunk"])
            seen = (
                "all its rows in chunks without logits:"
                f" {', '.join(map(str, chunks[:4]))}{' ...' * (len(chunks) > 4)}"
            )
            make = (
                f"make logits NAME={dataset.folder.name} CHUNK={chunks[0]}"
                if len(chunks)
                else "prepare_data.py with more of it"
            )
            files.fail(
                f"{name} has a share in the mix and no row to train on",
                seen if len(chunks) else "no row of it in train",
                mend=f"{make}, or a --mix without it",
            )
        parts.append(Part(number, name, rows, first, last))
    return np.concatenate([part.rows for part in parts]), parts


def identity(parts: Sequence[Part]) -> dict[str, str]:
    """Return the hash of which rows belong to which source: the data's own identity, of token ids
    and masks, does not say that."""
    text = "".join(
        f"{part.name} {hashlib.sha256(part.rows.astype('<i8')).hexdigest()} " for part in parts
    )
    return {"sources": hashlib.sha256(text.encode()).hexdigest()} if parts else {}


def tokens_of(
    parts: Sequence[Part], dataset: data.Dataset, steps_of_rows: Sequence[np.ndarray]
) -> np.ndarray:
    """Return the tokens that steps take from each part."""
    taken = dataset.train.rows[np.concatenate(steps_of_rows)]
    return np.bincount(taken["source"], taken["length"], len(dataset.sources))[
        [part.number for part in parts]
    ]


def realised(
    parts: Sequence[Part], dataset: data.Dataset, steps_of_rows: Sequence[np.ndarray]
) -> dict[str, float]:
    """Return each part's share of the tokens of some steps, as share_NAME (log lines: of the steps
    since the one before); {} without a mix."""
    if not parts:
        return {}
    tokens = tokens_of(parts, dataset, steps_of_rows)
    return {
        f"share_{part.name}": share for part, share in zip(parts, (tokens / tokens.sum()).tolist())
    }


def say(parts: Sequence[Part], dataset: data.Dataset, steps_of_rows: Sequence[np.ndarray]) -> None:
    """Print a line for each source: rows, tokens, share, passes over it this run; nothing without a
    mix."""
    if not parts:
        return
    lengths = dataset.train.rows["length"]
    for part, taken in zip(parts, tokens_of(parts, dataset, steps_of_rows)):
        tokens = int(lengths[part.rows].sum(dtype=np.int64))
        share = f"{part.first:g}" if part.first == part.last else f"{part.first:g} -> {part.last:g}"
        warning = (
            "; WARNING: so many passes are learnt by heart: a smaller share, fewer steps, or more"
            " rows"
            if taken / tokens > MANY
            else ""
        )
        print(
            f"mix: {part.name}: {len(part.rows):,} rows, {tokens:,} tokens, share of the tokens"
            f" {share}, {taken / tokens:.1f} passes{warning}"
        )
    for name in dataset.sources:
        if name not in {part.name for part in parts}:
            print(f"mix: {name}: share 0, not trained on")
