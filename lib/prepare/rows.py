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
    same for equal prompts; digest: of the ids, the same for duplicates."""

    ids: np.ndarray
    answer: np.ndarray
    prompt: int
    digest: int


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


def make_template_ready(tokenizer, inputs: list[sources.Source], turns: str) -> None:
    """Give a tokenizer that has no chat template the plain one, and warn of this and of a template
    that leaves earlier answers out."""
    every = [file.columns for source in inputs for file in source.files]
    if any("text" not in columns for columns in every) and template.ensure_template(tokenizer):
        print(
            "prepare warning: the tokenizer has no chat template; the plain one of lib/template.py"
            " is used and saved with it",
            flush=True,
        )
    conversations = any("messages" in columns for columns in every)
    if turns == "all" and conversations and template.rewrites(tokenizer):
        print(
            "prepare warning: the chat template rewrites earlier answers: of each conversation only"
            " the last one is learnt",
            flush=True,
        )


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
