"""What a teacher (or the student itself) is asked, and the two who may answer: a model that is run
here, or a server.

Contract: the teacher sees a conversation up to the turn to answer and never its reference answer.
`questions` yields every different prompt once; `by_model` and `by_server` yield an answer (a row of
lib/prepare/store.py) for each (question, generation) they are given, in the order in which they are
written.
"""

import collections
import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Iterator

import jinja2

from lib import files, template
from lib.prepare import ask, sources, split


@dataclasses.dataclass(frozen=True)
class Question:
    """place: the numbers of the source and of the file in it; source: its name. ids: the prompt as
    the tokenizer renders it."""

    key: str
    place: tuple[int, int]
    source: str
    prompt: list[dict]
    reference: str | None
    ids: list[int]


def key_of(prompt: list[dict]) -> str:
    """Return 64 bits of a prompt, in hex."""
    said = []
    for message in prompt:
        more = template.beside_text(message)
        said.append([message["role"], message["content"], *([more] if more else ())])
    text = json.dumps(said, ensure_ascii=False, sort_keys=True)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


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
    seen, kept, progress = split.Seen(), collections.Counter(), split.Progress("")
    limit = -(-args.limit // args.generations)
    for place, row in itertools.chain.from_iterable(
        sources.passes(inputs, args, limit, progress, kept)
    ):
        if place[0] in progress.full:
            continue
        progress.read[place] += 1
        read[place] += 1
        prompt, reference = row, None
        if row and row[-1]["role"] == "assistant":
            prompt, reference = row[:-1], row[-1]["content"]
        ids = prompt_ids_of(prompt, tokenizer, longest, seen)
        if isinstance(ids, str):
            lost[place[0], ids] += 1
            continue
        kept[place[0]] += 1
        if kept[place[0]] == progress.quotas[place[0]]:
            progress.full.add(place[0])
        yield Question(key_of(prompt), place, inputs[place[0]].name, prompt, reference or None, ids)


def prompt_ids_of(prompt: list[dict], tokenizer, longest: int, seen: split.Seen) -> list[int] | str:
    """Return a prompt's tokens, or the reason why it is not asked; note it in `seen`."""
    if reason := template.fault([*prompt, {"role": "assistant", "content": "."}]):
        return reason
    asked = any(message["role"] == "user" for message in prompt)
    if not asked or prompt[-1]["role"] == "assistant":
        return "no question"
    if not seen.add(int(key_of(prompt), 16)):
        return "prompt asked already"
    try:
        text = template.render(tokenizer, prompt, add_generation_prompt=True)
    except (jinja2.TemplateError, TypeError) as refused:
        return f"refused by the chat template ({' '.join(str(refused).split())[:80]})"
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids if len(ids) <= longest else "prompt too long"


def seed_of(seed: int, key: str, generation: int) -> int:
    """Return the seed of one answer: of nothing but the run's seed, the prompt, and the answer's
    number."""
    return split.hash64(f"{seed} {key} {generation}".encode())


def by_model(
    args, made: dict, missing: Iterator[tuple[Question, int]], tokenizer
) -> Iterator[dict]:
    """Yield the answers of a model that is run here; the student's with the ids that it sampled, up
    to the first one that is none of the tokenizer's, and their log-probability."""
    from lib import checkpoints, generate, models

    device = models.pick_device(args.device, args.threads)
    folder = checkpoints.local_folder(args.writer, args.trust_remote_code)
    dtype = models.pick_dtype(args.dtype, device, folder)
    module = models.load(
        str(folder), device, dtype, pack=False, trust_remote_code=args.trust_remote_code
    ).module
    how = generate.Sampling(**made["sampling"] | {"stops": tuple(made["sampling"]["stops"])})

    own, likely = "student" in made, collections.defaultdict(list)
    known = {*tokenizer.get_vocab().values()} if own else ()

    def requests():
        for question, number in missing:
            seed = seed_of(args.seed, question.key, number)
            ids, most = generate.known(module, question.ids, tokenizer), args.max_new_tokens
            most = min(most, args.max_len - len(ids)) if own else most
            top = 0 if own else None
            yield generate.Request((question, number), ids, most, seed, top=top)

    def hear(request, token, told):
        if own:
            likely[request.seed].append(told.logp)

    ordered = generate.by_length(requests())
    written = generate.generate(module, ordered, how, args.teacher_batch, hear)
    while (answer := within_memory(written)) is not None:
        text = tokenizer.decode(
            answer.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        if answer.finish == "length":
            text = text.rstrip("\N{REPLACEMENT CHARACTER}")  # a character that the limit cut in two
        question, number = answer.request.key
        row = row_of(question, number, text, answer.finish, len(question.ids), len(answer.ids))
        if own:
            told = likely.pop(answer.request.seed, [])
            ids = answer.ids
            if answer.end is not None:
                ids, told = [*ids, answer.end], [*told, answer.likely.logp]
            whole, ids = len(ids), list(itertools.takewhile(known.__contains__, ids))
            if len(ids) < whole:  # its end is not among them
                row["finish_reason"] = "length"
            row |= {"prompt_ids": question.ids, "answer_ids": ids, "logp": sum(told[: len(ids)])}
        yield row


def within_memory(written: Iterator):
    """Return the next answer, or None after the last one."""
    import torch

    try:
        return next(written, None)
    except torch.OutOfMemoryError as full:
        files.fail(
            "the teacher has too little memory",
            str(full).splitlines()[0],
            "room for the weights and the cache of --teacher-batch answers",
            "the same command with a smaller --teacher-batch: it continues",
        )


def by_server(args, missing: Iterator[tuple[Question, int]]) -> Iterator[dict]:
    """Yield the answers of a server."""
    how = {
        "max_tokens": args.max_new_tokens,
        "temperature": args.teacher_temperature,
        "top_p": args.teacher_top_p,
        "chat_template_kwargs": args.template_args,
    }
    if args.answers == "student":  # its own distribution, and its tokens
        plain = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
        how = {"temperature": 1.0, "top_p": 1.0} | {n: v for n, v in how.items() if v is not None}
        how |= plain | {"return_token_ids": True, "logprobs": True}
    client = ask.Client(args.teacher_url, args.teacher_model, how, args.concurrency, args.timeout)

    def requests():
        for question, number in missing:
            seed = seed_of(args.seed, question.key, number)
            yield ask.ChatRequest((question, number), question.prompt, seed)

    failed, say = 0, functools.partial(print, flush=True)

    def outage(line: str) -> None:
        say(f"answers: {line}")

    for reply in ask.ask(client, requests(), args.concurrency, args.retry_for, outage):
        question, number = reply.request.key
        if reply.finish == "failed":
            failed += 1
            say(f"answers warning: prompt {question.key} failed {ask.TRIES} times ({reply.said})")
            continue
        counts = reply.prompt_tokens, reply.answer_tokens
        row = row_of(question, number, reply.text, reply.finish, *counts)
        if args.answers == "student":
            as_sampled(row, question, reply, args)
        yield row
    if failed:
        files.fail(
            f"{failed} requests failed while others succeeded",
            wanted="an answer to each",
            mend="the same command: it asks for these alone",
        )


def as_sampled(row: dict, question: Question, reply: ask.Reply, args) -> None:
    """Add to an answer as it is stored the tokens that a server's student sampled, up to
    --max-len."""
    told = reply.sampled or ask.Tokens(question.ids, [], [])  # of a prompt that it refused
    if told.prompt_ids != question.ids:
        files.fail(
            f"{args.teacher_url} renders a prompt otherwise than --tokenizer {args.tokenizer}",
            f"{len(told.prompt_ids)} tokens, {len(question.ids)} here, of prompt {question.key}",
            "one tokenizer and one chat template for both",
            "--tokenizer with the folder that the server serves",
        )
    room = args.max_len - len(question.ids)
    if len(told.answer_ids) > room:
        row["finish_reason"] = "length"
    row |= {"prompt_ids": told.prompt_ids, "answer_ids": told.answer_ids[:room]}
    row |= {"logp": sum(told.logp[:room])}


def row_of(
    question: Question,
    generation: int,
    answer: str,
    finish: str,
    prompt_tokens: int | None,
    answer_tokens: int | None,
) -> dict:
    """Return an answer as it is stored."""
    return {
        "key": question.key,
        "generation": generation,
        "source": question.source,
        "prompt": question.prompt,
        "answer": answer,
        "reference": question.reference,
        "finish_reason": finish,
        "prompt_tokens": prompt_tokens,
        "answer_tokens": answer_tokens,
    }
