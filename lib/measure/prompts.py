"""A file of prompts, answered into a file of answers and scored: chat.py --prompts and --score.

Contract: OUT has a line of JSON for each row of the prompts in their order, with "answer" added; of
what shape the rows are, a reader that is handed over knows (lib/prepare/asked.py). Until all are
there they lie in OUT.part, and the same command continues there, to the file of a straight run:
each prompt has a seed of its own, and is answered the same beside any others (up to the rounding of
kernels, see lib/generate.py). OUT.meta.json holds the settings, and a file made with others is
refused.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from tqdm import tqdm

from lib import checkpoints, files, flags, generate, template
from lib.measure import labels, results, score
from lib.run import clock


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the file of prompts, and the one of answers."""
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help=(
            "answer every row of this file, of any kind and names that prepare_data.py knows, into"
            " --out (default: a conversation)"
        ),
    )
    parser.add_argument(
        "--score",
        metavar="FILE|DIR",
        help=(
            "answer as with --prompts, greedily unless a flag below samples, and score the answers"
            " against each row's reference, or the nearest of several; of a data folder its val"
            " prompts (default: a conversation)"
        ),
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="where the answers to --prompts go; running the same command again continues there",
    )
    parser.add_argument(
        "--limit",
        type=int,
        default=0,
        metavar="N",
        help="the first N prompts alone; 0 = off, all (default: %(default)s)",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        default=32,
        metavar="N",
        help="prompts answered at a time, of a file (default: %(default)s)",
    )
    add_score_flags(parser)


def add_score_flags(parser: argparse.ArgumentParser) -> None:
    """Add what --score scores by."""
    parser.add_argument(
        "--metrics",
        default="auto",
        metavar="NAMES",
        help=(
            f"of --score: names of {', '.join(score.METRICS)}; auto: exact where the references"
            " mark a final answer or are numbers, else bleu,rouge1,rouge2,rougeL (default:"
            " %(default)s)"
        ),
    )
    parser.add_argument(
        "--labels",
        metavar="A,B|auto",
        help=(
            "with --score, choose the likeliest of these labels instead of writing an answer; auto:"
            " the references' (default: off)"
        ),
    )
    parser.add_argument(
        "--calibrate",
        choices=labels.CALIBRATIONS,
        default="off",
        help=(
            "with --labels: choose by log p of the label, by that a token, or less its log p"
            " without the prompt's content (default: %(default)s)"
        ),
    )


def check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse (exit code 2) flags that do not go together, and have --score answer greedily where
    nothing samples."""
    flags.positive(parser, args, "batch_size")
    scored = args.score is not None
    if (args.out is None) == (scored or args.prompts is not None):
        parser.error("--prompts FILE or --score FILE, and --out FILE belong together")
    if args.limit < 0 or args.limit and args.out is None:
        parser.error(f"--limit is {args.limit}, wanted 0 or more, and with --prompts or --score")
    chosen = args.labels is not None
    named = chosen and all(name.strip() for name in args.labels.split(","))
    if chosen and not (scored and named and args.metrics == "auto"):
        parser.error(
            f"--labels is {args.labels!r}, wanted auto, or names like pos,neg, with --score and"
            " without --metrics"
        )
    if args.calibrate != "off" and not chosen or args.metrics != "auto" and not scored:
        parser.error("--metrics belongs to --score, and --calibrate to --labels")
    try:
        score.chosen(args.metrics, ())
    except ValueError as wrong:
        parser.error(f"--metrics: {wrong}")
    if scored and args.temperature is None and args.top_p is None and args.top_k is None:
        args.greedy = True


# --- the prompts


@dataclass(frozen=True)
class Prompt:
    """A row of the file. number: of the row, from 1; fields: all that it says."""

    number: int
    fields: dict
    messages: list[dict]


def prompts_file(args):
    """Return the path of the prompts: --prompts, or --score, where a data folder stands for its
    held-out ones."""
    path = Path(args.prompts or args.score)
    if not path.is_dir():
        return path
    if not (path / "val.prompts.jsonl").exists():
        files.fail(
            f"{path} holds no val.prompts.jsonl",
            wanted="a folder that prepare_data.py finished, or a .jsonl file of prompts",
        )
    return path / "val.prompts.jsonl"


def read_prompts(args, path: Path, read) -> list[Prompt]:
    """Return the prompts of a file, --limit at most; the first row that cannot be answered ends the
    program, by its number. read: path -> (fields, messages) of each row."""
    found = []
    for number, (fields, messages) in enumerate(islice(read(path), args.limit or None), 1):
        if fault := fault_of(fields, messages):
            files.fail(
                f"{path} row {number}", fault, "a prompt, or messages that end in a question"
            )
        found.append(Prompt(number, fields, template.with_system(messages, args.system)))
    return found


def fault_of(fields: dict, messages: list[dict]) -> str | None:
    """Return why a row cannot be answered, or None."""
    try:
        json.dumps(fields, default=str)  # as it will be written again, with the answer
    except RecursionError:
        return "JSON that is nested too deep"
    if "answer" in fields:
        return 'a field "answer", which the answer would overwrite'
    if not messages or not template.is_conversation(messages):
        return f"the fields {', '.join(fields)}: {json.dumps(messages)}"[:100]
    if messages[-1]["role"] == "assistant":
        return "messages that end with an answer"
    if template.BROKEN.search(json.dumps([messages, fields.get("reference")], ensure_ascii=False)):
        return f"half a character (\\ud800 to \\udfff) in {json.dumps(messages)[:60]}"
    return None


def what_to_score(args, path: Path, prompts: list[Prompt]) -> tuple[list[str], list[str] | None]:
    """Return (metrics, labels or None) of --score; a row without a reference, or with one that is
    no label, ends the program by its number."""
    for prompt in prompts:
        if not all(map(str.strip, score.references_of(prompt.fields) or [""])):
            files.fail(
                f"{path} row {prompt.number} has no reference to score against",
                seen=f"the fields {', '.join(prompt.fields)}",
                wanted='{"prompt": "...", "reference": "..."}, or a list of those that are right',
                mend="--prompts, which asks for none",
            )
    each = [score.references_of(prompt.fields) for prompt in prompts]
    references = [text.strip() for texts in each for text in texts]
    if args.labels is None:
        return score.chosen(args.metrics, references), None
    names = labels.names(args.labels, references, path)
    for prompt, texts in zip(prompts, each):
        if unknown := [text for text in texts if text.strip() not in names]:
            files.fail(
                f"{path} row {prompt.number}: the reference is no label",
                seen=repr(unknown[0][:60]),
                wanted=", ".join(names[:20]),
                mend="--labels auto, or all labels in --labels",
            )
    if len(set(references)) == 1:
        print(
            f"chat: WARNING: every reference is {references[0]!r}: with one class only, accuracy"
            " says little and nothing was told apart"
        )
    return ["accuracy", "macro_f1"], names


# --- the answers


def open_out(out, settings, fresh):
    """Return the lines that are there already, of a file made with the same settings, or None if it
    is finished; refuse another one. (Its lock is the caller's to hold.)"""
    part, meta = out.with_name(out.name + ".part"), out.with_name(out.name + ".meta.json")
    if out.is_dir() or (out.exists() and not meta.exists()):
        files.fail(
            f"--out {out} exists and was not written by chat.py",
            wanted="a new name, or a file with its .meta.json beside it",
        )
    if fresh:
        for path in (out.with_suffix(".scores.json"), out, part, meta):
            path.unlink(missing_ok=True)
    if out.exists() or part.exists():
        seen = files.read_json(meta, mend="the same command with --fresh")
        # of the checkpoint its weights count, wherever it lies
        named = [name for name in settings if name != "ckpt"]
        if differing := [name for name in named if not files.same(seen.get(name), settings[name])]:
            files.fail(
                f"{out if out.exists() else part} was made with other settings",
                "; ".join(f"{name} {seen.get(name)}" for name in differing),
                "; ".join(f"{name} {settings[name]}" for name in differing),
                mend="the same command with --fresh, or another --out",
            )
    if out.exists():
        return None
    if not part.exists():
        files.write_json(meta, settings | {"checksums": {}})
        part.touch()
    return part.read_bytes().split(b"\n")[:-1]  # what follows the last line end is a torn line


def answer_settings(args, path: Path, metrics: list[str] | None, names: list[str] | None) -> dict:
    """Return all that the answers depend on; None where something is not in use."""
    folder = checkpoints.local_folder(args.ckpt, args.trust_remote_code, unfinished=True)
    if not checkpoints.has_weights(folder):
        files.fail(f"{folder} has no weights", wanted="*.safetensors beside config.json")
    sampling = ("greedy", "temperature", "top_p", "top_k", "repetition_penalty", "max_new_tokens")
    named = ("ckpt", "system", "chat_template", "template_args", *sampling, "seed", "dtype")
    return {name: getattr(args, name) for name in named} | {
        "weights": checkpoints.identity(folder),
        "prompts": files.sha256(path),
        "limit": args.limit or None,
        "metrics": metrics,
        "labels": names,
        "calibrate": args.calibrate if names else None,
        # likelihoods of labels are rounded beside their neighbours'; answers are written alone
        "batch_size": args.batch_size if names else None,
    }


def answer_file(args, load, read) -> None:
    """Answer every row of --prompts or --score into --out, and score it. load(args): the Chat that
    answers, once it is known to be needed; read: see `read_prompts`."""
    files.check_out(args.out, file=True)
    path, out = prompts_file(args), Path(args.out)
    prompts = read_prompts(args, path, read)
    metrics, names = what_to_score(args, path, prompts) if args.score else (None, None)
    settings = answer_settings(args, path, metrics, names)
    summary = out.with_suffix(".scores.json")
    done = out.exists() and (not args.score or summary.exists()) and not args.fresh
    holding = None if done else files.lock_beside(out)
    lines = open_out(out, settings, args.fresh)
    if lines is None and (not args.score or summary.exists()):
        print(f"chat: {out} is finished already; nothing to do (--fresh starts anew)")
        if args.score:
            say_scores(out, results.read_scores(out.parent, summary.name))
        raise SystemExit(0)
    chat = load(args)
    ready = encode_prompts(chat, path, prompts, names)
    if lines is not None:
        start = len(lines)
        if not names:
            made = written(args, chat, prompts[start:], ready[start:])
        else:
            if start < len(prompts):  # whole batches alone: see answer_settings
                start -= start % args.batch_size
            made = chosen_labels(args, chat, prompts, ready, names, start)
        write_answers(prompts, made, metrics, out, lines[:start])
    if args.score:
        rows = score.read_answers(out)
        classes = score.by_class(rows, names) if names else {}
        shown = {
            "ckpt": args.ckpt,
            "weights": settings["weights"],
            "prompts": settings["prompts"],
            "count": len(rows),
            "settings": settings,
            "metrics": score.summarise(rows, metrics),
        } | {name: classes[name] for name in ("labels", "confusion", "per_class") if classes}
        timed = speed(chat, ready[0][0] if names else ready[0])
        made = {"speed": timed, "checksums": {out.name: files.sums(out)}}
        files.write_json(summary, shown | made)
        say_scores(out, shown)
    if holding:
        holding.release()


def encode_prompts(chat, path: Path, prompts: list[Prompt], names: list[str] | None) -> list:
    """Return the prompts' token ids, with labels each with its labels' (lib/measure/labels.py); one
    that leaves no room for an answer ends the program by its number."""
    ready = []
    for prompt in prompts:
        try:
            if names:
                ids, tails = labels.encode_labels(chat.tokenizer, prompt.messages, names)
                ready.append((ids, tails))
                length = len(ids) + max(len(label) for label, _ in tails) - 1
            else:
                ready.append(chat.ids(prompt.messages))
                length = len(ready[-1])
        except SystemExit as refused:
            files.fail(f"{path} row {prompt.number}", seen=str(refused).removeprefix("error: "))
        if chat.context and length >= chat.context:
            files.fail(
                f"{path} row {prompt.number} leaves no room for an answer",
                f"{length} tokens",
                f"fewer than {chat.context}",
            )
    return ready


def written(args, chat, prompts: list[Prompt], ready: list[list[int]]) -> Iterator[dict]:
    """Yield the fields that prompts get, in their order: the answer. A prompt's seed is --seed and
    its row's number: it is answered the same whatever is in work beside it."""
    seeds = [(args.seed + prompt.number) % (1 << 63) for prompt in prompts]
    strange = generate.unknown_cache(chat.module) or ", ".join(generate.unknown_settings(chat.how))
    if strange:
        print(f"chat: prompts are answered one at a time ({strange}), not --batch-size at a time")
        for ids, seed in zip(ready, seeds):
            torch.manual_seed(seed)
            yield {"answer": chat.answer(ids)}
        return
    limits = [chat.how.max_new_tokens] * len(ready)
    requests = map(generate.Request, range(len(ready)), ready, limits, seeds)
    done, due = {}, 0
    for answer in generate.generate(chat.module, requests, chat.sampling(), args.batch_size):
        # what ended it is shown where it is a word, as by the model alone
        ids = answer.ids if answer.end is None else [*answer.ids, answer.end]
        done[answer.request.key] = chat.tokenizer.decode(ids, skip_special_tokens=True)
        while due in done:
            yield {"answer": done.pop(due)}
            due += 1


def chosen_labels(args, chat, prompts: list[Prompt], ready, names, start: int) -> Iterator[dict]:
    """Yield the fields that the prompts from `start` on get, in their order: the likeliest label as
    their answer, and log p of each."""
    prior = None
    if args.calibrate == "prior":
        asked = [prompt.messages for prompt in prompts]
        prior = labels.priors(chat.module, chat.tokenizer, asked, names)
    for at in range(start, len(prompts), args.batch_size):
        part = slice(at, at + args.batch_size)
        found = labels.logp(chat.module, ready[part], args.batch_size)
        fair = labels.calibrated(
            found, ready[part], args.calibrate, None if prior is None else prior[part]
        )
        for place, row in zip(fair.argmax(1), found):
            yield {"answer": names[place], "logp": dict(zip(names, row.round(6).tolist()))}


def write_answers(
    prompts: list[Prompt],
    made: Iterator[dict],
    metrics: list[str] | None,
    out: Path,
    lines: list[bytes],
) -> None:
    """Write prompts and what they are answered behind the lines that are kept, with their scores,
    and publish the file. made: the fields of the prompts that have no line yet."""
    asked = [prompt.fields for prompt in prompts]
    scores = metrics and score.scorer(metrics, score.all_references(asked))
    part, start = out.with_name(out.name + ".part"), len(lines)
    os.truncate(part, sum(len(line) + 1 for line in lines))
    if start:
        print(f"chat: continues {out} after {start} of {len(prompts)} answers", flush=True)
    began = time.perf_counter()
    bar = tqdm(total=len(prompts), initial=start, unit=" answers", disable=None, dynamic_ncols=True)
    telling = files.telling(f"chat: answers for {out}")
    with open(part, "ab") as part_file, bar, telling:
        for prompt, fields in zip(prompts[start:], made):
            row = prompt.fields | fields
            if scores:
                row["scores"] = scores(score.references_of(row), row["answer"])
            line = json.dumps(row, ensure_ascii=False, default=str) + "\n"
            part_file.write(line.encode("utf-8", "backslashreplace"))
            part_file.flush()
            bar.update()
    files.sync(part)
    os.replace(part, out)
    now, time_s = len(prompts) - start, time.perf_counter() - began
    print(
        f"chat: {len(prompts)} answers in {out}; {now} of them now, in {time_s:.1f} s"
        f" ({now / time_s:.1f} answers/s)"
    )


def say_scores(out, made):
    """Print the metrics of a scored file, and where they are."""
    print(
        f"\n{score.show(made['metrics'], made.get('per_class'))}\n\neach answer with its scores:"
        f" {out}; these: {out.with_suffix('.scores.json')}"
    )


@torch.inference_mode()
def speed(chat, ids, new=32, rounds=3):
    """Return tokens a second of reading one prompt (128 tokens, `ids` over and over) and of writing
    `new` greedy tokens that none of them ends, each the best of `rounds`; and the bytes of weights
    and cache in memory (CUDA: torch's peak).
    """
    context, device = chat.context or 1 << 30, chat.device
    new = max(1, min(new, context // 2))
    prompt = torch.tensor([(ids * 128)[: max(1, min(128, context - new))]], device=device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    best = [float("inf")] * 2
    for _ in range(rounds):
        began = clock(device)
        made = chat.module(input_ids=prompt, use_cache=True, logits_to_keep=1)
        read = clock(device)
        for _ in range(new):
            made = chat.module(
                input_ids=made.logits[:, -1:].argmax(-1),
                past_key_values=made.past_key_values,
                use_cache=True,
            )
        best = [min(best[0], read - began), min(best[1], clock(device) - read)]
    held = [*chat.module.parameters(), *chat.module.buffers()]
    for layer in getattr(made.past_key_values, "layers", ()):
        held += [value for value in vars(layer).values() if isinstance(value, torch.Tensor)]
    memory = sum(value.nbytes for value in held)
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(device)
    return {
        "prompt_tok_per_s": prompt.shape[1] / best[0],
        "tok_per_s": new / best[1],
        "memory_bytes": memory,
        "device": str(device),
        "threads": torch.get_num_threads(),
    }


def classify_file(args, classes_of, folder, read):
    """Write the classes of every row of --prompts into --out, the likeliest as its answer.
    classes_of: see classifier.reader; read: see `read_prompts`."""
    files.check_out(args.out, file=True)
    prompts, out = read_prompts(args, Path(args.prompts), read), Path(args.out)
    made = {
        "ckpt": args.ckpt,
        "weights": checkpoints.identity(folder),
        "prompts": files.sha256(Path(args.prompts)),
        "limit": args.limit,
    }
    holding = files.lock_beside(out)
    if open_out(out, made, args.fresh) is None:
        print(f"chat: {out} is finished already; nothing to do (--fresh starts anew)")
        return
    answers = classes_of([prompt.messages[-1]["content"] for prompt in prompts])
    lines = []
    for prompt, classes in zip(prompts, answers):
        p = {entry["label"]: round(entry["score"], 6) for entry in classes}
        lines.append({**prompt.fields, "answer": classes[0]["label"], "p": p})
    texts = (json.dumps(line, ensure_ascii=False, default=str) + "\n" for line in lines)
    files.write_text(out, "".join(texts))
    out.with_name(out.name + ".part").unlink(missing_ok=True)
    holding.release()
    print(f"chat: {len(lines)} classes in {args.out}")
