"""From a row as its source has it (lib/prepare/sources.py) to an encoded row: token ids, which of
them are targets, and what else decides whether it is kept and on which side.

Contract: `encode_batch` may run in a process of its own; what it returns depends on the rows and
the flags alone.
"""

import argparse
import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lib import data, files, flags, template
from lib.prepare import conversations, export, own, sources, split, templates

LEAST = 1 << 20  # characters: a shorter row is tokenized as it is, whatever --max-len
AT_ONCE = 1 << 17  # of a longer text, tokenized at once: a token takes 300 bytes there


class Encoded(NamedTuple):
    """ids (L,) uint32; answer (L,) bool: the targets. prompt: the hash that decides the side, the
    same for equal prompts; digest: of the ids, the same for duplicates. reference: the last answer,
    of a conversation; the text of a piece of a text, to export it. digest 0: what the student
    sampled is no duplicate of anything; its logp: see data.Split."""

    ids: np.ndarray
    answer: np.ndarray
    prompt: int
    digest: int
    reference: str = ""
    logp: float = math.nan


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
        choices=["drop", "truncate", "pack"],
        default=None,
        help=(
            "what happens to a longer row; pack: a plain text becomes several full rows, a"
            " conversation is dropped (default: pack; to classify: truncate)"
        ),
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
    args.long = args.long or ("truncate" if args.task == "classify" else "pack")
    if args.task == "classify" and args.long == "pack":
        parser.error("--long pack is about plain texts: it does not go with --task classify")


def check_val(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Read --val: a number, or else a folder, which stays a text. Refuse (exit code 2) others."""
    try:
        args.val = float(args.val)
    except ValueError:
        if args.task == "classify":
            parser.error(f"--val is {args.val}: of rows with a class, wanted a share or a count")
        return
    if not args.val >= 0 or args.val >= 1 and args.val % 1:
        parser.error(
            f"--val is {args.val}, wanted a share below 1, a whole number of rows, or a prepared"
            " folder"
        )


def held_out(args) -> float | frozenset[int]:
    """Return --val as it is used: of another prepared folder the hashes of the prompts that it
    holds out; args.val becomes what is stored of it."""
    if not isinstance(args.val, str):
        return args.val
    folder = Path(args.val)
    dataset = data.Dataset(folder, args.trust_remote_code)
    if not (path := folder / "val.prompts.jsonl").exists():
        files.fail(
            f"--val {folder} holds out no prompt",
            f"no {path.name}",
            "conversations that prepare_data.py prepared, or a share or a count",
        )
    args.val = f"that of data {dataset.identities['data'][:12]}"
    prompts = [line["messages"] for line in files.read_jsonl(path)]
    if texts := len(dataset.val.rows) - len(prompts):
        print(
            f"prepare warning: {texts:,} rows that {folder} holds out are no conversations: they"
            " cannot be told here, and would be learnt from a source that has them too",
            flush=True,
        )
    before, found = dataset.meta["args"].get("system"), set()
    for messages in prompts:
        forms = _forms(messages, before, args.system)
        found.update(prompt_hash(form, args.seed) for form in forms)
    args.held_out = len({prompt_hash(messages, args.seed) for messages in prompts})
    return frozenset(found)


def _forms(messages: list[dict], before: str | None, system: str | None) -> list[list[dict]]:
    """Return a prompt as it is, without the system message that --system gave it `before`, and with
    the one that it gives now: whichever it has, it is held out."""
    first = messages[0]
    given = before and first["role"] == "system" and first["content"] == before
    plain = messages[1:] if given else messages
    found = [messages, plain]
    if system and plain[0]["role"] != "system":
        found.append([{"role": "system", "content": system}, *plain])
    return found


def say_held_out(args, staged: split.Staged) -> None:
    """Warn where prompts that --val FOLDER holds out are in none of the rows: the same questions
    may be there in other words (--columns, another system message), and would be learnt."""
    there = len(np.unique(staged.rows["prompt"][staged.is_val]))
    if there < getattr(args, "held_out", 0):
        print(
            f"prepare warning: of the {args.held_out:,} prompts that the --val folder holds out"
            f" {there:,} are among these rows; another --columns, --system or source?",
            flush=True,
        )


def make_template_ready(tokenizer, inputs: list[sources.Source], args) -> str:
    """Give a tokenizer the chat template that the data is written with, and tell what was done to
    it, and of one that leaves earlier answers out. Return the line that has its date, or ""."""
    own.check_ids(inputs, tokenizer)
    every = [file.columns for source in inputs for file in source.files]
    turns, dated = args.turns, ""
    if any("text" not in columns for columns in every):
        notes, dated = templates.make_ready(tokenizer, args.chat_template, args.template_args)
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
        answers = (n for n, message in enumerate(row) if n and message["role"] == "assistant")
        first = next(answers, None)
        row = [[message["role"], message["content"]] for message in row[:first]]
    return split.hash64(json.dumps(row).encode(), seed)


def was_cut(row: list[dict] | str) -> bool:
    """Return whether a teacher's answer ends where its length ran out."""
    if isinstance(row, str):
        return False
    return row[-1].get("written", {}).get("finish_reason") == "length"


def short_of(numbered: Iterator[tuple], tokenizer, args: argparse.Namespace) -> Iterator[tuple]:
    """Yield (number, row); of a row that cannot fit in --max-len, whatever its tokens, no more than
    what is to be made of it: None where it is dropped, for a tokenizer would need 80 times its
    size."""
    longest = max(map(len, tokenizer.get_vocab()))
    most = max(args.max_len * longest, LEAST) + 1000
    for number, row in numbered:
        if isinstance(row, own.Sampled):
            yield number, row
            continue
        if isinstance(row, list) and len(row) > args.max_len:  # every turn is a token at least
            row = row[: args.max_len] if args.long == "truncate" else None
        if row is not None and conversations.characters(row) > most:
            if args.think == "drop" and isinstance(row, list):
                row = template.without_think(row)
            if isinstance(row, tuple):
                row = row[0][:most], row[1]
            elif isinstance(row, str):
                kept = row if is_text(row) else None
                row = {"drop": None, "truncate": type(row)(row[:most]), "pack": kept}[args.long]
            elif args.long == "truncate":
                row = [one | {"content": (one["content"] or "")[:most]} for one in row]
            elif conversations.characters(row) > most:
                row = None
        yield number, row


def encode_text(tokenizer, text: str) -> tuple[np.ndarray, np.ndarray] | str:
    """Encode a plain text of any length piece by piece; the ends of pieces are no ends of text."""
    bos = tokenizer.bos_token_id if template.adds_bos(tokenizer) else None
    whole, start = bytearray(), 0
    while start < len(text):
        stop = start + AT_ONCE
        if stop < len(text):  # where a word begins, for most tokenizers put the blank before it
            stop = (
                max(text.rfind(" ", start + 1, stop), text.rfind("\n", start + 1, stop), 0) or stop
            )
        (found,) = template.encode(tokenizer, [text[start:stop]])
        if not isinstance(found, str):
            ids = found[0]
            ids = ids[1:] if start and ids[0] == bos else ids
            last = stop >= len(text)
            whole += (ids if last or ids[-1] != tokenizer.eos_token_id else ids[:-1]).tobytes()
        start = stop
    ids = np.frombuffer(whole, np.uint32)
    answer = np.ones(len(ids), bool)
    answer[:1] = False
    return (ids, answer) if len(ids) > 1 else "empty"


def encode_batch(
    folder: Path, args: argparse.Namespace, rows: list
) -> list[Encoded | list[Encoded] | str]:
    """Encode a batch of rows in a worker: of each the encoded row, several of a long text, or the
    reason it is dropped. folder: of the tokenizer."""
    tokenizer = saved_tokenizer(folder, args.trust_remote_code)
    result = []
    texts = [
        row
        for row in rows
        if row is not None and not isinstance(row, own.Sampled) and not _is_long(row)
    ]
    usual = iter(template.encode(tokenizer, texts, args.turns, args.think))
    for row in rows:
        if row is None:
            result.append("too long")
            continue
        if isinstance(row, own.Sampled):
            result.append(_verbatim(row, args))
            continue
        encoded = encode_text(tokenizer, row) if _is_long(row) else next(usual)
        if not isinstance(encoded, str):
            if is_text(row) and args.long == "pack" and len(encoded[0]) > args.max_len:
                result.append(_pieces(tokenizer, row, *encoded, args))
                continue
            encoded = _finish(row, *encoded, args)
        if isinstance(encoded, Encoded) and not isinstance(row, str):
            shown = template.without_think(row) if args.think == "drop" else row
            encoded = encoded._replace(reference=template.reference(tokenizer, shown))
        result.append(encoded)
    return result


def _verbatim(row: own.Sampled, args) -> Encoded | str:
    """Return the row of an answer that the student sampled: its tokens as they are."""
    if len(row.ids) > args.max_len:
        return "too long"
    ids, answer = np.array(row.ids, np.uint32), np.array(row.answer)
    if own.is_empty(ids[answer].tolist(), row[-1]["written"]["finish_reason"]):
        return "empty"
    prompt = prompt_hash(row, args.seed)
    return Encoded(ids, answer, prompt, 0, own.reference_of(row), row.logp)


def prompt_of_row(row: list[dict]) -> list[dict]:
    """Return the messages before the last answer."""
    return row[:-1] if isinstance(row, own.Sampled) else row[: template.last_answer(row)]


def is_text(row: object) -> bool:
    """Return whether a row is plain text, that may be cut anywhere."""
    return isinstance(row, str) and not isinstance(row, template.Marked)


def _is_long(row: list[dict] | str) -> bool:
    return is_text(row) and len(row) > LEAST


def _pieces(tokenizer, row: str, ids: np.ndarray, answer: np.ndarray, args) -> list[Encoded]:
    """Cut a text into rows of --max-len tokens, all on the side of the split that the whole of it
    is on; of those that are exported the text too."""
    prompt, found = prompt_hash(row, args.seed), []
    for start in range(0, len(ids), args.max_len):
        mine = ids[start : start + args.max_len]
        learnt = answer[start : start + args.max_len] & (np.arange(len(mine)) > 0)
        text = ""
        if export.keeps_text(args):
            text = tokenizer.decode(mine, skip_special_tokens=True)
        if learnt.any():
            found.append(Encoded(mine, learnt, prompt, split.hash64(mine.tobytes()), text))
    return found


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
    prompt = prompt_hash(row, args.seed)
    if isinstance(row, template.Marked):
        prompt = split.hash64(ids[: answer.argmax()].tobytes(), args.seed)
    return Encoded(ids, answer, prompt, split.hash64(ids.tobytes()))
