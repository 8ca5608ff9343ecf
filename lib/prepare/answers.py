"""Answers written by a teacher, for prepare_data.py: asked for once, kept for good
(lib/prepare/store.py), checked, and handed on as rows.

Contract: the teacher sees a conversation up to the turn to answer and never its reference answer.
Every (prompt, generation) is asked for until the store has its answer, and never again.
"""

import argparse
import collections
import dataclasses
import hashlib
import json
import signal
import sys
import time
import urllib.parse
from collections.abc import Iterator

import jinja2
from tqdm import tqdm

from lib import checkpoints, files, flags, template
from lib.prepare import ask, quality, sources, split
from lib.prepare.store import ABOUT, Store, name_of

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


def settings(args) -> dict | None:
    """Return all that an answer depends on (its hash names the answers' folder), or None with the
    answers given. No model is loaded for it."""
    if args.answers == "given":
        return None
    common = {"max_new_tokens": args.max_new_tokens, "seed": args.seed}
    if args.teacher_url:
        how = {"temperature": args.teacher_temperature, "top_p": args.teacher_top_p}
        return {
            "teacher": args.teacher_model,
            "host": urllib.parse.urlsplit(args.teacher_url).hostname,
            "sampling": how,
        } | common
    from transformers import AutoConfig, GenerationConfig

    from lib import generate

    folder = checkpoints.local_folder(args.teacher, args.trust_remote_code)
    tokenizer = template.load_tokenizer(checkpoints.with_tokenizer(folder), args.trust_remote_code)
    template.ensure_template(tokenizer)
    if (folder / "generation_config.json").exists():
        try:
            own = GenerationConfig.from_pretrained(folder)
        except (OSError, ValueError) as broken:
            files.fail(
                f"{folder}/generation_config.json cannot be read",
                " ".join(str(broken).split())[:200],
                "JSON",
                "a whole one, or none",
            )
    else:
        own = GenerationConfig.from_model_config(
            AutoConfig.from_pretrained(
                checkpoints.base_of(folder), trust_remote_code=args.trust_remote_code
            )
        )
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
    return {"answers": made and name_of(made)} | {
        name: made and getattr(args, name) for name in names
    }


def key_of(prompt: list[dict]) -> str:
    """Return 64 bits of a prompt, in hex."""
    text = json.dumps(
        [[message["role"], message["content"]] for message in prompt], ensure_ascii=False
    )
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


# --- what is asked


@dataclasses.dataclass(frozen=True)
class Question:
    """place: the numbers of the source and of the file in it. ids: the prompt as the tokenizer
    renders it."""

    key: str
    place: tuple[int, int]
    prompt: list[dict]
    reference: str | None
    ids: list[int]


def questions(
    inputs: list[sources.Source],
    args,
    tokenizer,
    longest: int,
    lost: collections.Counter,
    read: collections.Counter,
) -> Iterator[Question]:
    """Yield every different prompt of at most `longest` tokens once, for --limit answers at most;
    others are counted by (source, reason)."""
    seen, count = split.Seen(), 0
    for number, source in enumerate(inputs):
        for place, row in (
            ((number, f), row)
            for f, file in enumerate(source.files)
            for row in sources.rows(file, args.system)
        ):
            if args.limit and count * args.generations >= args.limit:
                return
            read[place] += 1
            prompt, reference = (
                (row[:-1], row[-1]["content"])
                if row and row[-1]["role"] == "assistant"
                else (row, None)
            )
            if reason := template.fault([*prompt, {"role": "assistant", "content": "."}]):
                lost[number, reason] += 1
                continue
            if (
                not any(message["role"] == "user" for message in prompt)
                or prompt[-1]["role"] == "assistant"
            ):
                lost[number, "no question"] += 1
                continue
            key = key_of(prompt)
            if not seen.add(int(key, 16)):
                lost[number, "prompt asked already"] += 1
                continue
            try:
                text = template.render(tokenizer, prompt, add_generation_prompt=True)
            except (jinja2.TemplateError, TypeError) as refused:
                lost[
                    number, f"refused by the chat template ({' '.join(str(refused).split())[:80]})"
                ] += 1
                continue
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            if len(ids) > longest:
                lost[number, "prompt too long"] += 1
                continue
            count += 1
            yield Question(key, place, prompt, reference or None, ids)


def seed_of(seed: int, key: str, generation: int) -> int:
    """Return the seed of one answer: of nothing but the run's seed, the prompt, and the answer's
    number."""
    return int.from_bytes(
        hashlib.blake2b(f"{seed} {key} {generation}".encode(), digest_size=8).digest(), "little"
    )


def local(args, made: dict, missing: Iterator[tuple[Question, int]], tokenizer) -> Iterator[dict]:
    """Yield the answers of a model that is run here."""
    from lib import generate, models

    device = models.pick_device(args.device, args.threads)
    folder = checkpoints.local_folder(args.teacher, args.trust_remote_code)
    dtype = models.pick_dtype(args.dtype, device, folder)
    module = models.load(
        str(folder), device, dtype, pack=False, trust_remote_code=args.trust_remote_code
    ).module
    how = generate.Sampling(**made["sampling"] | {"stops": tuple(made["sampling"]["stops"])})
    requests = (
        generate.Request(
            (question, number),
            question.ids,
            args.max_new_tokens,
            seed_of(args.seed, question.key, number),
        )
        for question, number in missing
    )
    written = generate.generate(module, generate.by_length(requests), how, args.teacher_batch)
    while (answer := within_memory(written)) is not None:
        text = tokenizer.decode(
            answer.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        if answer.finish == "length":
            text = text.rstrip("\N{REPLACEMENT CHARACTER}")  # a character that the limit cut in two
        question, number = answer.request.key
        yield row_of(question, number, text, answer.finish, len(question.ids), len(answer.ids))


def within_memory(written: Iterator):
    """Return the next answer, or None after the last one."""
    import torch

    try:
        return next(written, None)
    except torch.OutOfMemoryError as full:
        files.fail(
            "the GPU has too little memory",
            str(full).splitlines()[0],
            "room for the weights and the cache of --teacher-batch answers",
            "the same command with a smaller --teacher-batch: it continues",
        )


def remote(args, missing: Iterator[tuple[Question, int]]) -> Iterator[dict]:
    """Yield the answers of a server."""
    how = {
        "max_tokens": args.max_new_tokens,
        "temperature": args.teacher_temperature,
        "top_p": args.teacher_top_p,
    }
    client = ask.Client(args.teacher_url, args.teacher_model, how, args.concurrency, args.timeout)
    requests = (
        ask.Request((question, number), question.prompt, seed_of(args.seed, question.key, number))
        for question, number in missing
    )
    failed = 0
    for answer in ask.ask(
        client, requests, args.concurrency, args.retry_for, lambda line: print(line, flush=True)
    ):
        question, number = answer.request.key
        if answer.finish == "failed":
            failed += 1
            print(
                f"answers warning: prompt {question.key} failed {ask.TRIES} times ({answer.said})",
                flush=True,
            )
        else:
            yield row_of(
                question,
                number,
                answer.text,
                answer.finish,
                answer.prompt_tokens,
                answer.answer_tokens,
            )
    if failed:
        files.fail(
            f"{failed} requests failed while others succeeded",
            wanted="an answer to each",
            mend="the same command: it asks for these alone",
        )


def row_of(
    question: Question,
    generation: int,
    answer: str,
    finish: str,
    prompt_tokens: int | None,
    answer_tokens: int | None,
) -> dict:
    return {
        "key": question.key,
        "generation": generation,
        "source": question.place,
        "prompt": question.prompt,
        "answer": answer,
        "reference": question.reference,
        "finish_reason": finish,
        "prompt_tokens": prompt_tokens,
        "answer_tokens": answer_tokens,
    }


@dataclasses.dataclass(frozen=True)
class Written:
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


def stopped(number: int, _frame) -> None:
    raise SystemExit(128 + number)


def write(store: Store, inputs: list[sources.Source], args, tokenizer) -> Written:
    """Ask the teacher for every answer that the store lacks, then read and judge them all.
    tokenizer: the data set's."""
    for file in (file for source in inputs for file in source.files):
        if "text" in file.columns:
            files.fail(
                f"{file.place} holds no prompt to answer",
                seen=file.described,
                wanted="prompts or conversations",
                mend="--answers given",
            )
    longest = args.max_prompt
    if (
        args.teacher
    ):  # the prompt is written as the teacher knows it, and leaves room in its context
        from transformers import AutoConfig

        folder = checkpoints.local_folder(args.teacher, args.trust_remote_code)
        tokenizer = template.load_tokenizer(
            checkpoints.with_tokenizer(folder), args.trust_remote_code
        )
        template.ensure_template(tokenizer)
        config = AutoConfig.from_pretrained(
            checkpoints.base_of(folder), trust_remote_code=args.trust_remote_code
        ).get_text_config()
        longest = min(
            longest, (getattr(config, "max_position_embeddings", None) or longest + 1) - 1
        )
    lost, read, wanted = collections.Counter(), collections.Counter(), {}
    for question in questions(inputs, args, tokenizer, longest, lost, read):
        wanted[question.key] = question.place
    total = len(wanted) * args.generations
    done = sum((key, number) in store.have for key in wanted for number in range(args.generations))
    print(
        f"answers: {len(wanted):,} prompts, {args.generations} each: {total:,}; {done:,} are there"
        f" already ({store.folder})",
        flush=True,
    )
    if done < total:
        known = set(store.have)
        missing = (
            (question, number)
            for question in questions(
                inputs, args, tokenizer, longest, collections.Counter(), collections.Counter()
            )
            for number in range(args.generations)
            if (question.key, number) not in known
        )

        def name(place):
            return inputs[place[0]].name

        collect(
            store,
            local(args, store.made, missing, tokenizer) if args.teacher else remote(args, missing),
            name,
            done,
            total,
        )
    store.close()

    here = [row["key"] in wanted and row["generation"] < args.generations for row in store.names()]
    reasons: list[str | None] = []
    owners = [wanted[row["key"]][0] for row, is_here in zip(store.names(), here) if is_here]
    duplicates = quality.Duplicates(several=args.generations > 1)
    for row in (row for row, is_here in zip(store.rows(), here) if is_here):
        reasons.append(quality.fault(row["answer"], row["finish_reason"], args.keep_truncated))
        if reasons[-1] is None:
            duplicates.add(
                "\n".join(message["content"] for message in row["prompt"]),
                row["answer"],
                int(row["key"], 16),
            )
    repeats = iter(duplicates.found().tolist())
    reasons = [
        ("near duplicate" if next(repeats) else None) if reason is None else reason
        for reason in reasons
    ]
    lost.update((owner, reason) for owner, reason in zip(owners, reasons) if reason)

    def rows():
        verdicts = iter(reasons)
        for row in (row for row, is_here in zip(store.rows(), here) if is_here):
            if next(verdicts) is None:
                written = {field.name: row[field.name] for field in ABOUT}
                yield (
                    wanted[row["key"]],
                    [
                        *row["prompt"],
                        {"role": "assistant", "content": row["answer"], "written": written},
                    ],
                )

    meta = store.made | {
        "generations": args.generations,
        "prompts": len(wanted),
        "answers": total,
        "folder": f"{files.NEVER_DELETED}/{store.folder.name}",
    }
    return Written(rows(), reasons.count(None), read, lost, meta)


def collect(store: Store, answers: Iterator[dict], name, done: int, total: int) -> None:
    """Keep answers as they come, and tell how it goes: a bar on a terminal, a line now and then
    elsewhere."""
    begun, said, fresh, tokens = time.monotonic(), time.monotonic(), 0, 0
    before = {number: signal.signal(number, stopped) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with tqdm(
            total=total,
            initial=done,
            unit="answer",
            desc="answers",
            disable=not sys.stderr.isatty(),
        ) as bar:
            for row in answers:
                store.add(row | {"source": name(row["source"])})
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
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    time_s = time.monotonic() - begun
    print(
        f"answers: {fresh:,} written in {time_s:.1f} s, {tokens:,} tokens, {tokens / time_s:.1f}"
        " tokens/s",
        flush=True,
    )
