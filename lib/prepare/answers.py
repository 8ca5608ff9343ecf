"""Answers written by a teacher, for prepare_data.py: asked for once, kept for good
(lib/prepare/store.py), checked (quality.py), and handed on as rows.

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
from lib.prepare import ask, quality, questions, sources, templates
from lib.prepare.store import ABOUT, Store, folder_name

SAY_EVERY_S = 30.0


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add what --answers teacher needs, under its own heading."""
    group = parser.add_argument_group("answers written by a teacher")
    group.add_argument(
        "--answers",
        choices=["given", "teacher"],
        default="given",
        help=(
            "the sources' own, or a teacher's, which are kept in OUT/answers (default: %(default)s)"
        ),
    )
    group.add_argument("--teacher", metavar="DIR|ID", help="a model that is run here")
    group.add_argument(
        "--teacher-url",
        metavar="URL",
        help=(
            f"an OpenAI-compatible server, up to and with /v1; its key: {' or '.join(ask.KEYS)} "
            "in the environment"
        ),
    )
    group.add_argument("--teacher-model", metavar="NAME", help="the model's name on that server")
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
        default=1024,
        metavar="N",
        help="tokens of the longest answer (default: %(default)s)",
    )
    group.add_argument(
        "--max-prompt",
        type=int,
        default=1024,
        metavar="N",
        help="tokens of the longest prompt asked (default: %(default)s)",
    )
    group.add_argument(
        "--teacher-temperature",
        type=float,
        metavar="T",
        help="0 = greedy (default: the teacher's own, or its server's)",
    )
    group.add_argument(
        "--teacher-top-p",
        type=float,
        metavar="P",
        help="sample among the likeliest tokens of this mass (default: likewise)",
    )
    group.add_argument(
        "--keep-truncated",
        action="store_true",
        help="keep answers cut at --max-new-tokens; their cut is not learnt as an end",
    )
    _add_speed_flags(group)


def _add_speed_flags(group: argparse._ArgumentGroup) -> None:
    """Add what changes no answer: how many are asked for at once, and how long they are waited
    for."""
    group.add_argument(
        "--teacher-batch",
        type=int,
        default=32,
        metavar="N",
        help="answers in work at once with --teacher (default: %(default)s)",
    )
    group.add_argument(
        "--concurrency",
        type=int,
        default=64,
        metavar="N",
        help="requests in flight with --teacher-url (default: %(default)s)",
    )
    group.add_argument(
        "--timeout",
        type=float,
        default=600.0,
        metavar="S",
        help="seconds a server may take for an answer (default: %(default)s)",
    )
    group.add_argument(
        "--retry-for",
        type=float,
        default=600.0,
        metavar="S",
        help=(
            "seconds for which a server that is down or busy is tried again (default: %(default)s)"
        ),
    )
    flags.add(group, "--device", "--dtype", "--threads")


def check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse (exit code 2) flags that cannot work together."""
    for name in ("teacher", "teacher_url", "teacher_model", "teacher_temperature", "teacher_top_p"):
        if args.answers == "given" and getattr(args, name) is not None:
            parser.error(f"--{name.replace('_', '-')} needs --answers teacher")
    if args.answers == "given":
        return
    if (args.teacher is None) == (args.teacher_url is None):
        parser.error("--answers teacher wants exactly one of --teacher DIR and --teacher-url URL")
    if (args.teacher_url is None) != (args.teacher_model is None):
        parser.error("--teacher-url URL and --teacher-model NAME belong together")
    flags.positive(
        parser,
        args,
        "generations",
        "max_new_tokens",
        "max_prompt",
        "teacher_batch",
        "concurrency",
        "timeout",
        "retry_for",
    )
    if args.teacher_temperature is not None and not args.teacher_temperature >= 0:
        parser.error(f"--teacher-temperature is {args.teacher_temperature}, wanted 0 or more")
    if args.teacher_top_p is not None and not 0 < args.teacher_top_p <= 1:
        parser.error(f"--teacher-top-p is {args.teacher_top_p}, wanted a share above 0, at most 1")
    if args.teacher_url is not None:
        try:
            url = urllib.parse.urlsplit(args.teacher_url)
            usable = url.scheme in ("http", "https") and url.hostname and url.port != 0
        except ValueError:
            usable = False
        if not usable:
            parser.error("--teacher-url is no URL, wanted http://HOST:PORT/v1")
        if url.username or url.password or url.query or url.fragment:
            parser.error(
                "--teacher-url holds a name, a key or a query, wanted http://HOST:PORT/v1 (a key"
                f" comes from {' or '.join(ask.KEYS)})"
            )


def teacher_here(args) -> tuple:
    """Return the folder of --teacher and its tokenizer, with a chat template; no model is
    loaded."""

    folder = checkpoints.local_folder(args.teacher, args.trust_remote_code)
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
    common = {"max_new_tokens": args.max_new_tokens, "seed": args.seed}
    if args.teacher_url:
        how = {"temperature": args.teacher_temperature, "top_p": args.teacher_top_p}
        host = urllib.parse.urlsplit(args.teacher_url).hostname
        if args.template_args:
            how["chat_template_kwargs"] = args.template_args
        return {"teacher": args.teacher_model, "host": host, "sampling": how} | common
    from lib import generate

    folder, tokenizer = teacher_here(args)
    own = own_sampling(folder, args.trust_remote_code)
    how = dataclasses.asdict(
        generate.sampling_of(own, tokenizer, args.teacher_temperature, args.teacher_top_p)
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
    """Return the tokens of the longest prompt asked, which leaves a teacher that is run here room
    in its context."""
    if not args.teacher:
        return args.max_prompt
    folder = checkpoints.local_folder(args.teacher, args.trust_remote_code)
    config = models.config_of(folder, args.trust_remote_code).get_text_config()
    context = getattr(config, "max_position_embeddings", None) or args.max_prompt + 1
    return min(args.max_prompt, context - 1)


def answer_all(store: Store, inputs: list[sources.Source], args, tokenizer) -> AnsweredRows:
    """Ask the teacher for every answer that the store lacks, then read and judge them all.
    tokenizer: the data set's."""
    refuse_texts(inputs)
    longest = longest_prompt(args)
    if args.teacher:  # the prompt is written as the teacher knows it
        _, tokenizer = teacher_here(args)
    numbers = range(args.generations)

    def asked(lost, read):
        return questions.questions(inputs, args, tokenizer, longest, lost, read)

    lost, read = collections.Counter(), collections.Counter()
    wanted = {question.key: question.place for question in asked(lost, read)}
    total = len(wanted) * args.generations
    done = sum(name in store.have for name in itertools.product(wanted, numbers))
    print(
        f"answers: {len(wanted):,} prompts, {args.generations} each: {total:,}; {done:,} are there"
        f" already ({store.folder})",
        flush=True,
    )
    if done < total:
        known = set(store.have)
        again = asked(collections.Counter(), collections.Counter())
        pairs = ((question, number) for question in again for number in numbers)
        missing = (pair for pair in pairs if (pair[0].key, pair[1]) not in known)
        if args.teacher:
            answers = questions.by_model(args, store.made, missing, tokenizer)
        else:
            answers = questions.by_server(args, missing)
        collect(store, answers, done, total)
    store.close()
    good, dropped = judge(store, wanted, args)
    meta = store.made | {
        "generations": args.generations,
        "prompts": len(wanted),
        "answers": total,
        "folder": f"{files.NEVER_DELETED}/{store.folder.name}",
    }
    rows = handed_on(store, good, wanted)
    return AnsweredRows(rows, sum(good), read, lost + dropped, meta)


def judge(store: Store, wanted: dict, args) -> tuple[list[bool], collections.Counter]:
    """Return which answers of the store are good, and how many of those to the prompts `wanted`
    are not, by (source, reason)."""
    good, dropped = [], collections.Counter()
    found: list[tuple[int, str | None] | None] = []  # (source, reason); None: not asked for
    duplicates = quality.Duplicates(several=args.generations > 1)
    for row in store.rows():
        if row["key"] not in wanted or row["generation"] >= args.generations:
            found.append(None)
            continue
        reason = quality.rejection(row["answer"], row["finish_reason"], args.keep_truncated)
        found.append((wanted[row["key"]][0], reason))
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
        yield wanted[row["key"]], [*row["prompt"], answer]


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
        if not isinstance(end.code, str):
            print(
                f"answers: stopped with {done + fresh} of {total}, all of them kept; the same"
                " command continues",
                flush=True,
            )
        raise
    time_s = time.monotonic() - begun
    print(
        f"answers: {fresh:,} written in {time_s:.1f} s, {tokens:,} tokens, {tokens / time_s:.1f}"
        " tokens/s",
        flush=True,
    )
