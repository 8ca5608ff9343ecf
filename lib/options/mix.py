"""Shares of the sources in training: `--mix "general:0.7->0.3 finance:0.3->0.7"`, read, held
against a data folder, said and measured.

Shares are of TOKENS (whole rows, prompt and answer), not of rows and not of targets. A share moves
in a straight line from the first step to the last. Names are those in meta.json's list of sources;
one that is not named has share 0. Each source is an endless stream of its rows, and a step takes
from it what its share asks for: a pure function of (lengths, the sources' rows and shares, seed,
number of steps), known for the whole run before it begins; a continued run logs the same.
"""

import argparse
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np

from lib import data, files, flags, plan

MANY_PASSES = 5  # over a source, above which its answers are learnt by heart: worth a warning


def add_flags(parser: argparse.ArgumentParser) -> None:
    flags.option(
        parser.add_argument_group("shares of the sources"),
        "--mix",
        default=None,
        metavar="TEXT",
        help=(
            "shares of the sources in a step's tokens: 'a:0.7 b:0.3', or 'a:0.7->0.3 b:0.3->0.7'"
            " from first step to last; off = every row once an epoch (default: what prepare_data.py"
            " stored, else off)"
        ),
    )


def check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    try:
        if args.mix not in (None, "off"):
            parse(args.mix)
    except ValueError as wrong:
        parser.error(f"--mix: {wrong}")


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


def divide(
    text: str, dataset: data.Dataset, there: np.ndarray, logits: str | None = None
) -> list[Part]:
    """Return the sources that have a share, each with those of its rows that are `there`, in
    `logits`.

    Refused: a name that the data folder does not have, and a source with a share and no row.
    """
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
    for name, (first, last) in shares.items():
        if not first and not last:
            continue
        number = names.index(name)
        rows = there[source[there] == number]
        if not len(rows):
            refuse_without_rows(name, number, dataset, logits)
        parts.append(Part(number, name, rows, first, last))
    return parts


def refuse_without_rows(
    name: str, number: int, dataset: data.Dataset, logits: str | None
) -> NoReturn:
    """Say why a source has no row to train on, and what brings some."""
    rows = np.flatnonzero(dataset.train.rows["source"] == number)
    seen, make = "no row of it in train", "prepare_data.py with more of it"
    if len(rows):
        chunks = np.unique(rows // dataset.meta["rows_per_chunk"])
        some = ", ".join(map(str, chunks[:4])) + " ..." * (len(chunks) > 4)
        seen = f"all its rows in chunks without logits: {some}"
        dumped = next(Path(logits or "").glob("*/meta.json"), None)
        teacher = files.read_json(dumped).get("teacher_folder") if dumped else "TEACHER"
        words = ["--data", dataset.folder, "--teacher", teacher, "--out", logits or "LOGITS"]
        make = files.command("dump_logits.py", *words, "--chunk", chunks[0])
    files.fail(
        f"{name} has a share in the mix and no row to train on",
        seen,
        mend=f"{make}, or a --mix without it",
    )


def natural(dataset: data.Dataset, rows_there: np.ndarray) -> list[Part]:
    """Return every source with its part of all tokens for a share."""
    rows = dataset.train.rows[rows_there]
    if not dataset.sources:
        files.fail(
            "--eval-sampling cannot weigh the sources",
            f"no names of them in {dataset.folder}/meta.json",
            "two or more named sources",
            "prepare_data.py with several named sources, or no --eval-sampling",
        )
    tokens = np.bincount(rows["source"], rows["length"])
    parts = []
    for number, share in enumerate((tokens / tokens.sum()).tolist()):
        if share:
            own = rows_there[rows["source"] == number]
            parts.append(Part(number, dataset.sources[number], own, share, share))
    return parts


def stream(
    rows: np.ndarray, lengths: np.ndarray, seed: int, source: int, tokens: float
) -> np.ndarray:
    """Return a source's rows pass after pass, each pass in an order of its own, until they hold at
    least `tokens` tokens."""
    passes = max(1, math.ceil(tokens / int(lengths[rows].sum(dtype=np.int64))))
    orders = [np.random.default_rng([seed, number, source]) for number in range(passes)]
    return np.concatenate([order.permutation(rows) for order in orders])


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


class MixedRows(plan.Rows):
    """The plan of a run whose steps hold the shares of a mix."""

    def __init__(self, args, dataset: data.Dataset, parts: Sequence[Part]) -> None:
        self.parts = parts
        super().__init__(args, dataset, np.concatenate([part.rows for part in parts]))

    def choose(self) -> list[np.ndarray]:
        args = self.args
        return mixed_run(
            self.parts, self.lengths, args.seed, args.tokens_per_step, self.wanted_shares()
        )

    def wanted_shares(self) -> np.ndarray:
        """Return the shares (steps, parts) of every step: --epochs is as many tokens as so many
        passes over all rows of the parts hold."""
        args, count = self.args, self.args.steps
        if not count:
            tokens = sum(int(self.lengths[part.rows].sum(dtype=np.int64)) for part in self.parts)
            count = max(1, round(args.epochs * tokens / args.tokens_per_step))
        return asked(self.parts, count)

    def identity(self) -> dict[str, str]:
        """Return the hash of which rows belong to which source: the data's own identity, of token
        ids and masks, does not say that."""
        each = [(part.name, hashlib.sha256(part.rows.astype("<i8"))) for part in self.parts]
        text = "".join(f"{name} {rows.hexdigest()} " for name, rows in each)
        return {"sources": hashlib.sha256(text.encode()).hexdigest()}

    def tokens_taken(self, first: int, end: int) -> np.ndarray:
        """Return the tokens (parts,) that the steps from `first` to before `end` take."""
        taken = self.split.rows[np.concatenate(self.steps_of_rows[first:end])]
        tokens = np.bincount(taken["source"], taken["length"], len(self.dataset.sources))
        return tokens[[part.number for part in self.parts]]

    def shares(self, first: int, end: int) -> dict[str, float]:
        """Return each part's share of the tokens of some steps, as share_NAME."""
        tokens = self.tokens_taken(first, end)
        shares = (tokens / tokens.sum()).tolist()
        return {f"share_{part.name}": share for part, share in zip(self.parts, shares)}

    def say(self, eval_every: int) -> None:
        """Print also a line for each source: rows, tokens, share, passes over it this run."""
        super().say(eval_every)
        for part, taken in zip(self.parts, self.tokens_taken(0, self.steps)):
            tokens = int(self.lengths[part.rows].sum(dtype=np.int64))
            share, passes, warning = f"{part.first:g}", taken / tokens, ""
            if part.first != part.last:
                share += f" -> {part.last:g}"
            if passes > MANY_PASSES:
                warning = (
                    "; WARNING: so many passes are learnt by heart: a smaller share, fewer steps,"
                    " or more rows"
                )
            print(
                f"mix: {part.name}: {len(part.rows):,} rows, {tokens:,} tokens, share of the tokens"
                f" {share}, {passes:.1f} passes{warning}"
            )
        for name in self.dataset.sources:
            if name not in {part.name for part in self.parts}:
                print(f"mix: {name}: share 0, not trained on")


def wanted(args, dataset: data.Dataset) -> str | None:
    """Return the mix of a run, and put it into its arguments: --mix, else the one that
    prepare_data.py stored; None = off."""
    text = dataset.meta.get("mix") if args.mix is None else args.mix
    args.mix = None if text in (None, "off") else text
    return args.mix


def open_rows(args, dataset: data.Dataset, there: np.ndarray | None = None) -> plan.Rows:
    """Return the plan of a run over the rows that are `there` (default: all): mixed, if a mix is
    wanted."""
    there = np.arange(len(dataset.train.rows)) if there is None else there
    if text := wanted(args, dataset):
        parts = divide(text, dataset, there, getattr(args, "logits", None))
        return MixedRows(args, dataset, parts)
    return plan.Rows(args, dataset, there)
