"""From a row as its source has it (lib/prepare/sources.py) to an encoded row: token ids, which of
them are targets, and what else decides whether it is kept and on which side.

Contract: `encode_batch` may run in a process of its own; what it returns depends on the rows and
the flags alone.
"""

import argparse
import functools
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lib import flags, template
from lib.prepare import sources, split


class Encoded(NamedTuple):
    """ids (L,) uint32; answer (L,) bool: the targets. prompt: the hash that decides the side, the
    same for equal prompts; digest: of the ids, the same for duplicates. reference: the last answer,
    of a conversation."""

    ids: np.ndarray
    answer: np.ndarray
    prompt: int
    digest: int
    reference: str = ""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add what decides how a row is encoded."""
    parser.add_argument(
        "--system",
        metavar="TEXT",
        help="system message of every conversation that has none (default: what the template does)",
    )
    parser.add_argument(
        "--max-len",
        type=int,
        default=1024,
        metavar="N",
        help="tokens of the longest row kept (default: %(default)s)",
    )
    parser.add_argument(
        "--long",
        choices=["drop", "truncate"],
        default=None,
        help="what happens to a longer row (default: drop; to classify: truncate)",
    )
    parser.add_argument(
        "--turns",
        choices=["all", "last"],
        default="all",
        help="answers of a conversation to learn (default: %(default)s)",
    )
    parser.add_argument(
        "--think",
        choices=["keep", "drop", "mask"],
        default="keep",
        help=(
            "reasoning traces <think>...</think> of the answers: learnt like the rest, taken out,"
            " or in the text but not learnt (default: %(default)s)"
        ),
    )


def check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse (exit code 2) a length that no row has; --long gets its default."""
    flags.positive(parser, args, "max_len")
    args.long = args.long or ("truncate" if args.task == "classify" else "drop")


def make_template_ready(tokenizer, inputs: list[sources.Source], args) -> str:
    """Give a tokenizer the chat template that the data is written with, and tell what was done to
    it, and of one that leaves earlier answers out. Return the line that has its date, or ""."""
    every = [file.columns for source in inputs for file in source.files]
    turns, dated = args.turns, ""
    if any("text" not in columns for columns in every):
        notes, dated = template.make_ready(tokenizer, args.chat_template, args.template_args)
        for note in notes:
            print(f"prepare warning: {note}", flush=True)
    conversations = any("messages" in columns for columns in every)
    if turns == "all" and conversations and template.rewrites(tokenizer):
        print(
            "prepare warning: the chat template rewrites earlier answers: of each conversation only"
            " the last one is learnt",
            flush=True,
        )
    return dated


def told_of(tokenizer, inputs: list[sources.Source]) -> dict:
    """Return what meta.json says of what the rows say: `unused`, the names of columns and message
    keys that do not reach the text; `spelled_out`, what the template does not write and the content
    has instead."""
    unused: dict[str, dict[str, None]] = {}
    spelled = {}
    for file in (file for source in inputs for file in source.files):
        for kind, name in file.unused:
            unused.setdefault(kind, {})[name] = None
        for role, name in file.passed:
            if template.writes(tokenizer, role, name):
                continue
            if name in template.SPELLED_OUT:
                spelled[name] = None
            else:
                unused.setdefault("message keys", {})[f"{name} (the template has none)"] = None
    told = {"unused": {kind: list(names) for kind, names in unused.items()}}
    told["spelled_out"] = list(spelled)
    return {name: value for name, value in told.items() if value}


@functools.cache
def saved_tokenizer(folder: Path, trust_remote_code: bool):
    """Load the tokenizer that this run saved, once a process."""
    return template.load_tokenizer(folder, trust_remote_code)


def prompt_hash(row: list[dict] | str, seed: int) -> int:
    """Return 64 bits of what comes before the first answer (all of a plain text): equal prompts
    share one side of the split."""
    if not isinstance(row, str):
        first = next(
            place for place, message in enumerate(row) if place and message["role"] == "assistant"
        )
        row = [[message["role"], message["content"]] for message in row[:first]]
    return split.hash64(json.dumps(row).encode(), seed)


def was_cut(row: list[dict] | str) -> bool:
    """Return whether a teacher's answer ends where its length ran out."""
    if isinstance(row, str):
        return False
    return row[-1].get("written", {}).get("finish_reason") == "length"


def encode_batch(folder: Path, args: argparse.Namespace, rows: list) -> list[Encoded | str]:
    """Encode a batch of rows in a worker: of each the encoded row, or the reason it is dropped.
    folder: of the tokenizer."""
    tokenizer = saved_tokenizer(folder, args.trust_remote_code)
    result = []
    for row, encoded in zip(rows, template.encode(tokenizer, rows, args.turns, args.think)):
        if not isinstance(encoded, str):
            encoded = _finish(row, *encoded, args)
        if isinstance(encoded, Encoded) and not isinstance(row, str):
            shown = template.without_think(row) if args.think == "drop" else row
            encoded = encoded._replace(reference=template.reference(tokenizer, shown))
        result.append(encoded)
    return result


def _finish(row, ids: np.ndarray, answer: np.ndarray, args) -> Encoded | str:
    last = np.flatnonzero(answer)
    if was_cut(row) and len(last):
        # the end of turn that the template wrote is not where the teacher ended
        answer[last[-1]] = False
    if len(ids) > args.max_len and args.long == "truncate":
        ids, answer = ids[: args.max_len], answer[: args.max_len]
    if len(ids) > args.max_len:
        return "too long"
    if not answer.any():
        return "no target"  # the cut took them all
    return Encoded(ids, answer, prompt_hash(row, args.seed), split.hash64(ids.tobytes()))
