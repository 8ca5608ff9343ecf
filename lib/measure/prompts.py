"""A file of prompts, answered into a file of answers and scored: chat.py --prompts and --score.

Contract: OUT has the lines of the prompts in their order, each with "answer" added. Until all are
there they lie in OUT.part, and the same command continues there, to the bytes of a straight run;
OUT.meta.json holds the settings, and a file made with others is refused.
"""

import json
import os
import time
from pathlib import Path

import torch
from tqdm import tqdm

from lib import files, models, template
from lib.measure import labels, score
from lib.run import clock


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


def read_prompts(path, system):
    """Return [(line number, fields, messages)]; the first line that is not one of the two forms
    ends the program, by its number."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as broken:
        files.fail(
            f"the prompts {path} cannot be read",
            seen=broken,
            wanted='a UTF-8 file of lines like {"prompt": "..."}',
        )
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue

        def broken(seen):
            return files.fail(
                f"{path} line {number}",
                seen,
                '{"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]}',
            )

        try:
            fields = json.loads(line)
        except ValueError as error:
            broken(f"{line[:60]!r}, which is not JSON ({error})")
        if not isinstance(fields, dict) or ("prompt" in fields) == ("messages" in fields):
            broken(f"{line[:60]!r}")
        if "answer" in fields:
            broken('a field "answer", which the answer would overwrite')
        messages = (
            fields["messages"]
            if "messages" in fields
            else [{"role": "user", "content": fields["prompt"]}]
        )
        if not template.is_conversation(messages):
            broken(f"{line[:60]!r}")
        if messages[-1]["role"] == "assistant":
            broken("messages that end with an answer")
        found.append((number, fields, template.with_system(messages, system)))
    if not found:
        files.fail(f"{path} holds no prompt", wanted="at least one line")
    return found


def what_to_score(args, path, prompts):
    """Return (metrics, labels or None) of --score; a line without a reference, or with one that is
    no label, ends the program by its number."""
    for number, fields, _ in prompts:
        if not isinstance(fields.get("reference"), str) or not fields["reference"].strip():
            files.fail(
                f"{path} line {number} has no reference to score against",
                seen=f"the fields {', '.join(fields)}",
                wanted='{"prompt": "...", "reference": "..."}',
                mend="--prompts, which asks for none",
            )
    references = [fields["reference"].strip() for _, fields, _ in prompts]
    if args.labels is None:
        return score.chosen(args.metrics, references), None
    names = labels.names(args.labels, references, path)
    for (number, _, _), reference in zip(prompts, references):
        if reference not in names:
            files.fail(
                f"{path} line {number}: the reference is no label",
                seen=repr(reference[:60]),
                wanted=", ".join(names[:20]),
                mend="--labels auto, or all labels in --labels",
            )
    if len(set(references)) == 1:
        print(
            f"chat: WARNING: every reference is {references[0]!r}: with one class only, accuracy"
            " says little and nothing was told apart"
        )
    return ["accuracy", "macro_f1"], names


def open_out(out, settings, fresh):
    """Return the lines that are there already, of a file made with the same settings, or None if it
    is finished; refuse another one."""
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
        if differing := [name for name in settings if seen.get(name) != settings[name]]:
            values = [
                "; ".join(f"{name} {source.get(name)}" for name in differing)
                for source in (seen, settings)
            ]
            made = out if out.exists() else part
            files.fail(
                f"{made} was made with other settings",
                *values,
                mend="the same command with --fresh, or another --out",
            )
    if out.exists():
        return None
    out.parent.mkdir(parents=True, exist_ok=True)
    if not part.exists():
        files.write_json(meta, settings)
        part.touch()
    return part.read_bytes().split(b"\n")[:-1]  # what follows the last line end is a torn line


def answer(args, make):
    """Answer every line of --prompts or --score into --out, and score it. make() loads the Chat
    that answers, once it is known to be needed."""
    path, out = prompts_file(args), Path(args.out)
    prompts = read_prompts(path, args.system)[: args.limit or None]
    metrics, names = what_to_score(args, path, prompts) if args.score else (None, None)
    folder = models.local_folder(args.ckpt, args.trust_remote_code, unfinished=True)
    if not models.has_weights(folder):
        files.fail(f"{folder} has no weights", wanted="*.safetensors beside config.json")
    chosen = (
        "ckpt",
        "system",
        "greedy",
        "temperature",
        "top_p",
        "top_k",
        "repetition_penalty",
        "max_new_tokens",
        "seed",
        "batch_size",
        "dtype",
    )
    settings = {name: getattr(args, name) for name in chosen} | {
        "weights": models.identity(folder),
        "prompts": files.sha256(path),
    }
    # None where it is not in use, as in files that were made before these were
    settings |= {
        "limit": args.limit or None,
        "metrics": metrics,
        "labels": names,
        "calibrate": args.calibrate if names else None,
    }
    lines, summary = open_out(out, settings, args.fresh), out.with_suffix(".scores.json")
    if lines is None and (not args.score or summary.exists()):
        print(f"chat: {out} is finished already; nothing to do (--fresh starts anew)")
        if args.score:
            say_scores(out, files.read_json(summary, mend="delete it, and the same command"))
        raise SystemExit(0)
    chat = make()
    # the prompts' token ids; with --labels each with its labels' (lib/measure/labels.py)
    ready = []
    for number, _, messages in prompts:
        try:
            ready.append(
                labels.encode(chat.tokenizer, messages, names) if names else chat.ids(messages)
            )
        except SystemExit as refused:
            files.fail(f"{path} line {number}", seen=str(refused).removeprefix("error: "))
        length = (
            len(ready[-1][0]) + max(len(ids) for ids, _ in ready[-1][1]) - 1
            if names
            else len(ready[-1])
        )
        if chat.context and length >= chat.context:
            files.fail(
                f"{path} line {number} leaves no room for an answer",
                f"{length} tokens",
                f"fewer than {chat.context}",
            )
    if lines is not None:
        write_answers(args, chat, prompts, ready, metrics, names, lines, out)
    if args.score:
        rows = score.read_answers(out)
        classes = score.by_class(rows, names) if names else {}
        made = {
            "ckpt": args.ckpt,
            "weights": settings["weights"],
            "prompts": settings["prompts"],
            "count": len(rows),
            "settings": settings,
            "metrics": score.summarise(rows, metrics),
        } | {name: classes[name] for name in ("labels", "confusion", "per_class") if classes}
        files.write_json(summary, made | {"speed": speed(chat, ready[0][0] if names else ready[0])})
        say_scores(out, made)


def write_answers(args, chat, prompts, ready, metrics, names, lines, out):
    """Answer the prompts that have no line yet, a batch at a time, and publish the file."""
    scores = (
        score.scorer(metrics, [fields["reference"] for _, fields, _ in prompts])
        if args.score
        else None
    )
    prior = (
        labels.priors(chat.module, chat.tokenizer, [messages for _, _, messages in prompts], names)
        if args.calibrate == "prior"
        else None
    )

    def answers(part):
        """Return the fields that a batch of prompts gets."""
        if not names:
            return [{"answer": text} for text in chat.answer(ready[part])]
        found = labels.logp(chat.module, ready[part], args.batch_size)
        best = labels.calibrated(
            found, ready[part], args.calibrate, None if prior is None else prior[part]
        ).argmax(1)
        return [
            {"answer": names[place], "logp": dict(zip(names, row.round(6).tolist()))}
            for place, row in zip(best, found)
        ]

    # only whole batches are kept, so that every answer is made beside the same neighbours as in a
    # straight run
    start = (
        len(lines) // args.batch_size * args.batch_size
        if len(lines) < len(prompts)
        else len(prompts)
    )
    part = out.with_name(out.name + ".part")
    os.truncate(part, sum(len(line) + 1 for line in lines[:start]))
    if start:
        print(f"chat: continues {out} after {start} of {len(prompts)} answers", flush=True)
    began = time.perf_counter()
    with (
        open(part, "ab") as part_file,
        tqdm(
            total=len(prompts), initial=start, unit=" answers", disable=None, dynamic_ncols=True
        ) as bar,
    ):
        for at in range(start, len(prompts), args.batch_size):
            torch.manual_seed(args.seed + at)
            done = []
            for (_, fields, _), made in zip(prompts[at:], answers(slice(at, at + args.batch_size))):
                row = {**fields, **made} | (
                    {"scores": scores(fields["reference"], made["answer"])} if scores else {}
                )
                done.append(json.dumps(row, ensure_ascii=False) + "\n")
            part_file.write("".join(done).encode())
            part_file.flush()
            bar.update(len(done))
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
    held += [
        value
        for layer in getattr(made.past_key_values, "layers", ())
        for value in vars(layer).values()
        if isinstance(value, torch.Tensor)
    ]
    memory = (
        torch.cuda.max_memory_allocated(device)
        if device.type == "cuda"
        else sum(value.nbytes for value in held)
    )
    return {
        "prompt_tok_per_s": prompt.shape[1] / best[0],
        "tok_per_s": new / best[1],
        "memory_bytes": memory,
        "device": str(device),
        "threads": torch.get_num_threads(),
    }


def classify(args, read, folder):
    """Write the classes of every line of --prompts into --out, the likeliest as its answer. read:
    see classifier.reader."""
    prompts, out = read_prompts(Path(args.prompts), None)[: args.limit or None], Path(args.out)
    made = {
        "ckpt": args.ckpt,
        "weights": models.identity(folder),
        "prompts": files.sha256(Path(args.prompts)),
        "limit": args.limit,
    }
    if open_out(out, made, args.fresh) is None:
        print(f"chat: {out} is finished already; nothing to do (--fresh starts anew)")
        return
    answers = read([messages[-1]["content"] for _, _, messages in prompts])
    lines = [
        {
            **fields,
            "answer": classes[0]["label"],
            "p": {entry["label"]: round(entry["score"], 6) for entry in classes},
        }
        for (_, fields, _), classes in zip(prompts, answers)
    ]
    files.write_text(out, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    out.with_name(out.name + ".part").unlink(missing_ok=True)
    print(f"chat: {len(lines)} classes in {args.out}")
