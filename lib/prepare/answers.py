"""Answers written by a teacher, or by the student itself, for prepare_data.py: asked for once, kept
for good (lib/prepare/store.py), a teacher's checked (quality.py), and handed on as rows.

Contract: every (prompt, generation) of lib/prepare/questions.py is asked for until the store has
its answer, and never again.
"""

import argparse
import collections
import dataclasses
import itertools
import sys
import time
import urllib.parse
from collections.abc import Iterator

from tqdm import tqdm

from lib import checkpoints, files, flags, generate, models, run, template
from lib.prepare import ask, own, quality, questions, sources, split, templates
from lib.prepare import rows as prepared
from lib.prepare.store import ABOUT, Store, folder_name

SAY_EVERY_S = 30.0
ANSWER_TOKENS = 1024  # tokens of an answer, where nobody says
OF_EITHER = ("teacher_url", "teacher_model", "teacher_temperature", "teacher_top_p")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add what --answers teacher and --answers student need, under a heading of their own."""
    group = parser.add_argument_group("answers written by a teacher, or by the student")
    group.add_argument(
        "--answers",
        choices=["given", "teacher", "student"],
        default="given",
        help=(
            "the sources' own; a teacher's; or the student's own text, whose tokens are learnt as"
            " they were sampled. Both are kept in OUT/answers (default: %(default)s)"
        ),
    )
    group.add_argument("--teacher", metavar="DIR|ID", help="a teacher that is run here")
    group.add_argument("--student", metavar="DIR|ID", help="the student, run here")
    group.add_argument(
        "--teacher-url",
        "--student-url",
        metavar="URL",
        help=(
            f"an OpenAI-compatible server, up to and with /v1; its key: {' or '.join(ask.KEYS)} "
            "in the environment"
        ),
    )
    group.add_argument(
        "--teacher-model", "--student-model", metavar="NAME", help="the model's name on that server"
    )
    group.add_argument(
        "--generations",
        type=int,
        default=1,
        metavar="N",
        help="answers to each prompt (default: %(default)s)",
    )
    group.add_argument(
        "--max-new-tokens",
        type=int,
        default=None,
        metavar="N",
        help=f"tokens of the longest answer (default: {ANSWER_TOKENS}; of a student, --max-len's)",
    )
    group.add_argument(
        "--max-prompt",
        type=int,
        default=1024,
        metavar="N",
        help="tokens of the longest prompt asked (default: %(default)s)",
    )
    _add_sampling_flags(group)
    _add_speed_flags(group)


def _add_sampling_flags(group: argparse._ArgumentGroup) -> None:
    """Add how an answer's tokens are chosen, and whether it may be cut."""
    group.add_argument(
        "--teacher-temperature",
        "--student-temperature",
        type=float,
        metavar="T",
        help="0 = greedy (default: the teacher's own, or its server's; of a student 1)",
    )
    group.add_argument(
        "--teacher-top-p",
        "--student-top-p",
        type=float,
        metavar="P",
        help="sample among the likeliest tokens of this mass (default: likewise)",
    )
    group.add_argument(
        "--keep-truncated",
        action="store_true",
        help="keep answers cut at --max-new-tokens; their cut is not learnt as an end",
    )


def _add_speed_flags(group: argparse._ArgumentGroup) -> None:
    """Add what changes no answer: how many are asked for at once, and how long they are waited
    for."""
    group.add_argument(
        "--teacher-batch",
        "--student-batch",
        type=int,
        default=32,
        metavar="N",
        help="answers in work at once of a model run here (default: %(default)s)",
    )
    flags.add(group, "--concurrency", "--timeout", "--retry-for")
    flags.add(group, "--device", "--dtype", "--threads")


def check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse (exit code 2) flags that cannot work together."""
    who, other = args.answers, "teacher" if args.answers == "student" else "student"
    for name in ("teacher", "student", *OF_EITHER):
        if getattr(args, name) is not None and (who == "given" or name == other):
            wanted = "teacher" if name in OF_EITHER else name
            parser.error(f"{flags.spelled(name)} needs --answers {wanted}")
    if who == "given":
        args.max_new_tokens = args.max_new_tokens or ANSWER_TOKENS
        return
    args.writer = getattr(args, who)
    if (args.writer is None) == (args.teacher_url is None):
        parser.error(f"--answers {who} wants exactly one of --{who} DIR and --{who}-url URL")
    if (args.teacher_url is None) != (args.teacher_model is None):
        parser.error(f"--{who}-url URL and --{who}-model NAME belong together")
    if who == "teacher":
        args.max_new_tokens = ANSWER_TOKENS if args.max_new_tokens is None else args.max_new_tokens
    else:
        own.check_flags(parser, args)
    flags.positive(parser, args, "generations", "max_new_tokens", "max_prompt", "teacher_batch")
    if args.teacher_temperature is not None and not args.teacher_temperature >= 0:
        parser.error(f"--teacher-temperature is {args.teacher_temperature}, wanted 0 or more")
    if args.teacher_top_p is not None and not 0 < args.teacher_top_p <= 1:
        parser.error(f"--teacher-top-p is {args.teacher_top_p}, wanted a share above 0, at most 1")
    if args.teacher_url is not None:
        flags.check_server(parser, args, ask.KEYS)


def writer_here(args) -> tuple:
    """Return the folder of --teacher or --student and its tokenizer, with a chat template; no model
    is loaded."""

    folder = checkpoints.local_folder(args.writer, args.trust_remote_code)
    tokenizer = template.load_tokenizer(checkpoints.with_tokenizer(folder), args.trust_remote_code)
    templates.make_ready(tokenizer, args.chat_template, args.template_args, beside=True)
    return folder, tokenizer


def own_sampling(folder, trust_remote_code: bool):
    """Return how a model's folder says that it is sampled."""
    from transformers import GenerationConfig

    if how := generate.read_config(folder):
        return how
    return GenerationConfig.from_model_config(models.config_of(folder, trust_remote_code))


def settings(args) -> dict | None:
    """Return all that an answer depends on (its hash names the answers' folder), or None with the
    answers given. No model is loaded for it."""
    if args.answers == "given":
        return None
    if args.answers == "student":
        return own.own_settings(args)
    common = {"max_new_tokens": args.max_new_tokens, "seed": args.seed}
    if args.teacher_url:
        how = {"temperature": args.teacher_temperature, "top_p": args.teacher_top_p}
        host = urllib.parse.urlsplit(args.teacher_url).hostname
        if args.template_args:
            how["chat_template_kwargs"] = args.template_args
        return {"teacher": args.teacher_model, "host": host, "sampling": how} | common
    folder, tokenizer = writer_here(args)
    usual = own_sampling(folder, args.trust_remote_code)
    how = dataclasses.asdict(
        generate.sampling_of(usual, tokenizer, args.teacher_temperature, args.teacher_top_p)
    )
    return {
        "teacher": args.teacher,
        "weights": checkpoints.identity(folder),
        "tokenizer": template.identities(tokenizer)["tokenizer"],
        "sampling": how | {"stops": list(how["stops"])},
    } | common


def shaping(args, made: dict | None) -> dict:
    """Return what the data depends on beside the sources and prepare_data.py's own flags; all None
    with the answers given."""
    names = (
        "teacher_model",
        "generations",
        "max_new_tokens",
        "max_prompt",
        "teacher_temperature",
        "teacher_top_p",
        "keep_truncated",
    )
    return {"answers": made and folder_name(made)} | {
        name: made and getattr(args, name) for name in names
    }


@dataclasses.dataclass(frozen=True)
class AnsweredRows:
    """rows: (place, conversation) of every good answer, `count` of them; the last message says in
    "written" what ABOUT names.

    read: rows of the sources by place. lost: prompts and answers that are not among them, by
    (source, reason).
    """

    rows: Iterator[tuple[tuple[int, int], list[dict]]]
    count: int
    read: collections.Counter
    lost: collections.Counter
    meta: dict


def refuse_texts(inputs: list[sources.Source]) -> None:
    for file in (file for source in inputs for file in source.files):
        if file.is_text:
            files.fail(
                f"{file.place} holds no prompt to answer",
                seen=file.described,
                wanted="prompts or conversations",
                mend="--answers given",
            )


def longest_prompt(args) -> int:
    """Return the tokens of the longest prompt asked, which leaves a model that is run here room in
    its context, and the student's row room in --max-len."""
    longest = min(args.max_prompt, args.max_len - 1) if own.wanted_of(args) else args.max_prompt
    if not args.writer:
        return longest
    folder = checkpoints.local_folder(args.writer, args.trust_remote_code)
    config = models.config_of(folder, args.trust_remote_code).get_text_config()
    context = getattr(config, "max_position_embeddings", None) or longest + 1
    return min(longest, context - 1)


def answer_all(
    store: Store, inputs: list[sources.Source], args, tokenizer, val: split.ValRows
) -> AnsweredRows:
    """Ask the teacher, or the student, for every answer that the store lacks, then read and judge
    them all. tokenizer: the data set's. Prompts that another data set holds out (--val FOLDER) are
    asked once, whatever --generations."""
    refuse_texts(inputs)
    longest = longest_prompt(args)
    if args.teacher:  # the prompt is written as the teacher knows it
        _, tokenizer = writer_here(args)

    def asked(lost, read):
        return questions.questions(inputs, args, tokenizer, longest, lost, read)

    def numbers(question):
        return range(1 if val.known and is_held_out(question, val, args) else args.generations)

    lost, read = collections.Counter(), collections.Counter()
    wanted: dict[tuple[str, int], tuple[int, int]] = {}  # (key, generation) -> place
    prompts, done = 0, 0
    for question in asked(lost, read):
        prompts += 1
        for number in numbers(question):
            wanted[question.key, number] = question.place
            done += (question.key, number) in store.have
    total = len(wanted)
    print(
        f"answers: {prompts:,} prompts, {args.generations} each: {total:,}; {done:,} are there"
        f" already ({store.folder})",
        flush=True,
    )
    if done < total:
        known = set(store.have)
        again = asked(collections.Counter(), collections.Counter())
        pairs = ((question, number) for question in again for number in numbers(question))
        missing = (pair for pair in pairs if (pair[0].key, pair[1]) not in known)
        if args.writer:  # run here
            answers = questions.by_model(args, store.made, missing, tokenizer)
        else:
            answers = questions.by_server(args, missing)
        collect(store, answers, done, total)
    store.close()
    good, dropped = (own.all_wanted if own.wanted_of(args) else judge)(store, wanted, args)
    meta = store.made | {
        "generations": args.generations,
        "prompts": prompts,
        "answers": total,
        "folder": f"{files.NEVER_DELETED}/{store.folder.name}",
    }
    if own.wanted_of(args):
        meta |= own.facts(itertools.compress(store.rows(), good))
    rows = handed_on(store, good, wanted)
    return AnsweredRows(rows, sum(good), read, lost + dropped, meta)


def is_held_out(question: questions.Question, val: split.ValRows, args) -> bool:
    """Return whether a prompt is on the side that is not trained on."""
    return val.candidate(prepared.prompt_hash(question.prompt, args.seed))


def judge(store: Store, wanted: dict, args) -> tuple[list[bool], collections.Counter]:
    """Return which answers of the store are good, and how many of those `wanted` are not, by
    (source, reason)."""
    good, dropped = [], collections.Counter()
    found: list[tuple[int, str | None] | None] = []  # (source, reason); None: not asked for
    duplicates = quality.Duplicates(several=args.generations > 1)
    for row in store.rows():
        name = row["key"], row["generation"]
        if name not in wanted:
            found.append(None)
            continue
        reason = quality.rejection(row["answer"], row["finish_reason"], args.keep_truncated)
        found.append((wanted[name][0], reason))
        if reason is None:
            prompt = "\n".join(message["content"] for message in row["prompt"])
            duplicates.add(prompt, row["answer"], int(row["key"], 16))
    repeats = iter(duplicates.found().tolist())
    for source, reason in (pair or (None, "not asked for") for pair in found):
        if reason is None and next(repeats):
            reason = "near duplicate"
        good.append(reason is None)
        if reason and source is not None:
            dropped[source, reason] += 1
    return good, dropped


def handed_on(store: Store, good: list[bool], wanted: dict) -> Iterator[tuple]:
    """Yield (place, conversation) of the good answers."""
    for row in itertools.compress(store.rows(), good):
        written = {field.name: row[field.name] for field in ABOUT}
        answer = {"role": "assistant", "content": row["answer"], "written": written}
        said = [*row["prompt"], answer]
        place = wanted[row["key"], row["generation"]]
        yield place, own.sampled(row, said) if store.own else said


def collect(store: Store, answers: Iterator[dict], done: int, total: int) -> None:
    """Keep answers as they come, and tell how it goes: a bar on a terminal, a line now and then
    elsewhere."""
    begun, said, fresh, tokens = time.monotonic(), time.monotonic(), 0, 0
    bar = tqdm(
        total=total, initial=done, unit="answer", desc="answers", disable=not sys.stderr.isatty()
    )
    try:
        with run.Interrupt(at_once=True), bar:
            for row in answers:
                store.add(row)
                fresh, tokens = fresh + 1, tokens + (row["answer_tokens"] or 0)
                time_s = time.monotonic() - begun
                bar.update()
                bar.set_postfix_str(f"{tokens / time_s:,.0f} tokens/s", refresh=False)
                if bar.disable and time.monotonic() - said > SAY_EVERY_S:
                    said = time.monotonic()
                    print(
                        f"answers done={done + fresh} of={total} tokens={tokens}"
                        f" tok_per_s={tokens / time_s:.1f}"
                        f" left_s={(total - done - fresh) * time_s / fresh:.0f}",
                        flush=True,
                    )
    except SystemExit as end:
        store.spent(time.monotonic() - begun)
        if not isinstance(end.code, str):
            print(
                f"answers: stopped with {done + fresh} of {total}, all of them kept; the same"
                " command continues",
                flush=True,
            )
        raise
    store.spent(time_s := time.monotonic() - begun)
    print(
        f"answers: {fresh:,} written in {time_s:.1f} s, {tokens:,} tokens, {tokens / time_s:.1f}"
        " tokens/s",
        flush=True,
    )
