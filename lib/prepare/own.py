"""Answers that the student wrote itself (--answers student): sampled token ids, learnt as they are.

On-policy data is what the model says, not what its text would be tokenized to: of such a row the
ids of the prompt and those that were sampled are kept (lib/prepare/store.py), and nothing is
rendered or tokenized again, here or where these files are a source later. Nothing is judged but
what is empty: refusals, loops and equal answers stay, each as often as it was sampled, for a mean
over the rows is a mean over what the student says. An answer that was cut has no end of turn; one
that ended has the token that ended it.
"""

import argparse
import collections
import dataclasses
import itertools
import urllib.parse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lib import checkpoints, files, generate, models, template
from lib.prepare import formats, store, templates

OF_FILES = ("prompt", "answer", "reference", "finish_reason", "prompt_ids", "answer_ids", "logp")


class Sampled(list):
    """A conversation whose last answer the student sampled: a list of messages, and

    ids (L,), answer (L,): the tokens of prompt and answer, and which of them are the answer's;
    logp: the sum of their log-probabilities, nats, as they were sampled."""

    ids: list[int]
    answer: list[bool]
    logp: float


def wanted_of(args) -> bool:
    """Return whether the student is to write."""
    return args.answers == "student"


def check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse (exit code 2) what would change the student's text."""
    if args.task != "language":
        parser.error(f"--answers student writes text: it does not go with --task {args.task}")
    if args.think != "keep":
        parser.error(
            f"--think {args.think} changes what is learnt of an answer: the student's own is learnt"
            " as it was sampled"
        )
    if args.max_new_tokens is None:  # a row is no longer than --max-len
        args.max_new_tokens = args.max_len if args.student else min(args.max_len, 1024)


def own_settings(args) -> dict:
    """Return all that the student's answers depend on; the tokenizer is its own unless --tokenizer
    names one."""
    common = {"max_len": args.max_len, "max_new_tokens": args.max_new_tokens, "seed": args.seed}
    temperature = 1.0 if args.teacher_temperature is None else args.teacher_temperature
    top_p = 1.0 if args.teacher_top_p is None else args.teacher_top_p
    made: dict[str, Any] = {"student": args.teacher_model or args.student}
    stops: tuple[int, ...] = ()
    vocabulary = None
    if args.writer:
        folder = checkpoints.local_folder(args.writer, args.trust_remote_code)
        check_context(args, folder)
        place = checkpoints.with_tokenizer(folder)
        args.tokenizer = args.tokenizer or str(place)
        theirs = template.load_tokenizer(place, args.trust_remote_code)
        vocabulary = template.identities(theirs)["vocabulary"]
        stops = stops_of(folder, theirs, args.trust_remote_code)
        made["weights"] = checkpoints.identity(folder)
    else:
        made["host"] = urllib.parse.urlsplit(args.teacher_url).hostname
    if not args.tokenizer:
        files.fail(
            "--tokenizer is missing", "a server's student", "its tokenizer", "--tokenizer DIR"
        )
    mine = template.load_tokenizer(args.tokenizer, args.trust_remote_code)
    templates.make_ready(mine, args.chat_template, args.template_args)
    told = template.identities(mine)
    if vocabulary not in (None, told["vocabulary"]):
        files.fail(
            f"{args.writer} has another tokenizer than the data",
            f"vocabulary {vocabulary[:12]}, --tokenizer {args.tokenizer} has"
            f" {told['vocabulary'][:12]}",
            "one tokenizer: the ids that the student samples are what is learnt",
            "the same without --tokenizer: the student's own is taken",
        )
    how = dataclasses.asdict(generate.Sampling(temperature, top_p=top_p, stops=stops))
    made |= {"tokenizer": told["tokenizer"], "vocabulary": told["vocabulary"]}
    return made | {"sampling": how | {"stops": list(stops)}} | common


def stops_of(folder: Path, tokenizer, trust_remote_code: bool) -> tuple[int, ...]:
    """Return the tokens at which the student stops wherever it is run (chat.py): those of its
    generation_config.json, else of its config.json, and its tokenizer's."""
    from transformers import GenerationConfig

    how = generate.read_config(folder) or generate.read_config(checkpoints.base_of(folder))
    how = how or GenerationConfig.from_model_config(models.config_of(folder, trust_remote_code))
    return tuple(generate.end_tokens(how, tokenizer.eos_token_id))


def check_context(args, folder: Path) -> None:
    """Refuse answers that the student has no room for."""
    context = generate.window(models.config_of(folder, args.trust_remote_code))
    if context and args.max_new_tokens >= context and args.max_new_tokens != args.max_len:
        files.fail(
            "--max-new-tokens is beyond the student's context",
            f"{args.max_new_tokens} tokens, {folder} sees {context}",
            "fewer, for the prompt has to fit too",
            "a smaller --max-new-tokens",
        )


# --- rows


def is_file(types: Iterable[str]) -> bool:
    """Return whether a file with these columns holds such rows."""
    return {"prompt", "answer", "key", *(name for name, _ in store.SAMPLED)} <= {*types}


def is_torn(types: Iterable[str]) -> bool:
    """Return whether a file holds such rows before they are whole: the journal of a killed run."""
    return {"prompt_ids", "answer_ids"} <= {*types} and not is_file(types)


def asked_of_file(record: dict) -> list[dict]:
    """Return the prompt of such a record, with the answer that the data had for it, if it had one:
    what the student wrote is none."""
    prompt = store.unflattened(record["prompt"])
    return [*prompt, {"role": "assistant", "content": record["reference"] or ""}]


def sampled(record: dict, said: list[dict]) -> Sampled:
    """Return the row that a stored answer is; said: its messages."""
    row = Sampled(said)
    prompt, answer = record["prompt_ids"], record["answer_ids"]
    row.ids, row.logp = prompt + answer, record["logp"]
    row.answer = [False] * len(prompt) + [True] * len(answer)
    return row


def of_file(record: dict) -> Sampled:
    """Return the row of a record of a file of such rows."""
    written = {"finish_reason": record["finish_reason"], "reference": record["reference"]}
    answer = {"role": "assistant", "content": record["answer"] or "", "written": written}
    return sampled(record, [*store.unflattened(record["prompt"]), answer])


def reference_of(row: Sampled) -> str:
    """Return the answer that the data had for this prompt, "" where it had none: what the student
    wrote is no reference."""
    return row[-1]["written"].get("reference") or ""


def check_ids(inputs: list, tokenizer) -> None:
    """Refuse files of ids that another tokenizer gives other tokens, and a source that the student
    wrote in part; warn of one whose files were sampled in several ways."""
    mine = template.identities(tokenizer)["vocabulary"]
    for source in inputs:
        kinds = {file.schema == "sampled": file.place for file in source.files}
        if len(kinds) > 1:
            files.fail(
                f"--source {source.name} is the student's own text in part",
                f"{kinds[True]}, and {kinds[False]}",
                "a source for either: own text has no reference, and is learnt otherwise",
                "--source own=WHERE --source given=WHERE",
            )
    columns, ways = ["vocabulary", "teacher", "sampling"], collections.defaultdict(set)
    every = [(source.name, file) for source in inputs for file in source.files]
    for name, file in ((name, file) for name, file in every if file.schema == "sampled"):
        record = next(formats.records(file.place, columns), {"vocabulary": mine})
        ways[name].add((record.get("teacher"), record.get("sampling")))
        if record["vocabulary"] != mine:
            files.fail(
                f"{file.place} holds the ids of another tokenizer",
                f"vocabulary {str(record['vocabulary'])[:12]}, --tokenizer has {mine[:12]}",
                "the tokenizer of the student that wrote them",
                "--tokenizer with the student's folder",
            )
    for name, found in ways.items():
        if len(found) > 1:
            told = "; ".join(sorted(f"{who}, {how}" for who, how in found))
            print(
                f"prepare warning: the answers of {name} were sampled in {len(found)} ways, and all"
                f" of them are learnt ({told}): --source with one folder of answers/ is one",
                flush=True,
            )


def is_empty(answer_ids: list[int], finish: str) -> bool:
    """Return whether an answer has no token but its end: it is dropped, as the only kind."""
    return len(answer_ids) <= (finish == "stop")


def all_wanted(kept: store.Store, wanted: dict, args) -> tuple[list[bool], collections.Counter]:
    """Return which answers of the store are wanted, and what is dropped of these: nothing here."""
    good = [(row["key"], row["generation"]) in wanted for row in kept.rows()]
    return good, collections.Counter()


# --- what is said of them


def facts(records: Iterable[dict]) -> dict[str, Any]:
    """Return what meta.json says of the student's answers: mean_tokens of one, the share that ended
    by itself, the student's entropy (nats a token: minus the mean log-probability of what was
    sampled at T = 1), whose weights wrote them."""
    count, tokens, ended, logp = 0, 0, 0, 0.0
    weights: dict[str | None, None] = {}
    for row in records:
        if not is_empty(row["answer_ids"], row["finish_reason"]):
            count, tokens = count + 1, tokens + len(row["answer_ids"])
            ended, logp = ended + (row["finish_reason"] == "stop"), logp + row["logp"]
            weights[row["weights"]] = None
    told = {"answers": count, "mean_tokens": tokens / max(1, count), "ended": ended / max(1, count)}
    one = next(iter(weights)) if len(weights) == 1 else None
    return told | {"entropy": -logp / max(1, tokens), "weights": one}


def of_sources(inputs: list) -> dict[str, Any]:
    """Return these facts of sources that are files of such rows."""
    columns = ["answer_ids", "finish_reason", "logp", "weights"]
    every = [file for source in inputs for file in source.files if file.schema == "sampled"]
    found = (formats.records(file.place, columns) for file in every)
    return facts(itertools.chain.from_iterable(found))


def facts_of_own(inputs: list, args, written) -> dict[str, Any]:
    """Return what meta.json says of the rows that the student wrote, and say it."""
    names = [s.name for s in inputs if any(file.schema == "sampled" for file in s.files)]
    if wanted_of(args):
        names = [source.name for source in inputs]
    if not names:
        return {}
    told = written.meta if wanted_of(args) else of_sources(inputs)
    say(told, round_before(args))
    return {"own": names, "student": told}


def say(told: dict[str, Any], before: dict[str, Any] | None) -> None:
    """Print how the student writes, and what is amiss against the round before."""
    print(
        f"own text: {told['answers']:,} answers of {told['mean_tokens']:.1f} tokens,"
        f" {told['ended']:.1%} ended by themselves; the student's entropy {told['entropy']:.3f}"
        " nats a token",
        flush=True,
    )
    how = told.get("sampling") or {"temperature": 1, "top_p": 1}
    if (how["temperature"], how["top_p"]) != (1, 1):
        said = f"T = {how['temperature']:g}, top-p {how['top_p']:g}"
        print(
            f"own text: sampled at {said}: not the student's own distribution, and the entropy is"
            " that of what was sampled under it",
            flush=True,
        )
    for amiss in generate.drifted(before, told).values() if before else ():
        print(f"own text: WARNING: {amiss} (the round before): look at --show", flush=True)


def round_before(args) -> dict[str, Any] | None:
    """Return the facts of the own text that the student was trained on, if it was on some."""
    if not wanted_of(args) or not args.writer:
        return None
    folder = checkpoints.local_folder(args.writer, args.trust_remote_code)
    for place in (folder, folder.parent):
        try:
            run = files.read_json(place / "config.json")["settings"]
            return files.read_json(Path(run["data"]) / "meta.json").get("student")
        except (SystemExit, OSError, KeyError, TypeError, AttributeError):
            continue
    return None
