"""Talk to a checkpoint, or let it answer one prompt or a file of them.

    python chat.py --ckpt runs/qwen/stage2                                          # a conversation; /help inside
    python chat.py --ckpt runs/demo/stage2 --device cpu --greedy --prompt "Ann has 38 apples. She buys 45 more. How many apples does Ann have now?"
    python chat.py --ckpt runs/demo/stage2 --device cpu --greedy --prompts data/demo/val.prompts.jsonl --out runs/answers.jsonl
    python chat.py --ckpt runs/demo/stage2 --device cpu --score data/demo --out runs/demo/stage2-eval/answers.jsonl    # answers, and their scores

Reads   --ckpt: a stage folder (its best/, else its final/), any Hugging Face checkpoint folder, or a hub id
        --prompts: one JSON object a line, {"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]}; its other fields are carried over
        --score: the same, or a data folder (its val.prompts.jsonl); every line has a "reference" as well
Writes  --out: the lines of --prompts in their order, each with "answer" added. Until all are there they lie in OUT.part, and the same command
        continues there; OUT.meta.json holds the settings they were made with. A sampled batch's seed is --seed + its first line's number,
        so that a continued file is the file of a straight run.
        With --score each line has "scores" too (lib/score.py says of what), with --labels "logp" of every label (lib/labels.py), and
        OUT.scores.json (answers.scores.json beside answers.jsonl), written last, the metrics over all lines with their intervals, and the speed.
"""
import argparse
import copy
import json
import os
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm
from transformers.generation.streamers import BaseStreamer

from lib import classifier, files, flags, labels, models, score, template
from lib.run import clock

HELP = """/help         this text
/reset        forget the conversation
/system TEXT  set the system prompt; without TEXT, remove it
/save FILE    write the conversation as JSON
/exit         leave, as Ctrl-D does
A line that ends in a backslash goes on in the next one; a block between two lines of \"\"\" is one message. Ctrl-C stops an answer."""


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    # read and write
    parser.add_argument("--ckpt", required=True, metavar="DIR", help="stage folder, checkpoint folder or hub id")
    parser.add_argument("--prompt", metavar="TEXT", help="answer this and exit (default: a conversation)")
    parser.add_argument("--prompts", metavar="FILE", help="answer every line of this .jsonl file into --out (default: a conversation)")
    parser.add_argument("--score", metavar="FILE|DIR", help="answer as with --prompts, greedily unless a flag below samples, and score the answers "
                        "against each line's reference; of a data folder its val prompts (default: a conversation)")
    parser.add_argument("--out", metavar="FILE", help="where the answers to --prompts go; running the same command again continues there")
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="the first N prompts alone; 0 = off, all (default: %(default)s)")
    parser.add_argument("--system", metavar="TEXT", help="system prompt (default: the chat template's own)")
    # scores
    parser.add_argument("--metrics", default="auto", metavar="NAMES", help=f"of --score: names of {', '.join(score.METRICS)}; auto: exact where the "
                        "references mark a final answer or are numbers, else bleu,rouge1,rouge2,rougeL (default: %(default)s)")
    parser.add_argument("--labels", metavar="A,B|auto", help="with --score, choose the likeliest of these labels instead of writing an answer; auto: "
                        "the references' (default: off)")
    parser.add_argument("--calibrate", choices=labels.CALIBRATIONS, default="off", help="with --labels: choose by log p of the label, by that a "
                        "token, or less its log p without the prompt's content (default: %(default)s)")
    # sampling; None leaves it to the checkpoint's generation_config
    parser.add_argument("--greedy", action="store_true", help="always take the likeliest token")
    parser.add_argument("--temperature", type=float, metavar="T", help="sample at this temperature; 0 = --greedy (default: the checkpoint's own)")
    parser.add_argument("--top-p", type=float, metavar="P", help="sample among the likeliest tokens of this mass (default: the checkpoint's own)")
    parser.add_argument("--top-k", type=int, metavar="K", help="sample among this many tokens; 0 = off (default: the checkpoint's own)")
    parser.add_argument("--repetition-penalty", type=float, metavar="X", help="1 = off (default: the checkpoint's own)")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="longest answer (default: the checkpoint's own, else 512)")
    # the run
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="prompts answered at a time, of a file (default: %(default)s)")
    flags.add(parser, "--seed", "--device", "--dtype", "--threads", "--fresh", "--trust-remote-code")
    args = parser.parse_args(argv)

    flags.positive(parser, args, "batch_size")
    given = [f"--{name}" for name in ("prompt", "prompts", "score") if getattr(args, name) is not None]
    if len(given) > 1:
        parser.error(f"{' and '.join(given)} exclude each other")
    if (args.out is None) != (given in ([], ["--prompt"])):
        parser.error("--prompts FILE or --score FILE, and --out FILE belong together")
    if args.limit < 0 or args.limit and args.out is None:
        parser.error(f"--limit is {args.limit}, wanted 0 or more, and with --prompts or --score")
    if args.labels is not None and (args.score is None or args.metrics != "auto" or not all(name.strip() for name in args.labels.split(","))):
        parser.error(f"--labels is {args.labels!r}, wanted auto, or names like pos,neg, with --score and without --metrics")
    if args.calibrate != "off" and args.labels is None or args.metrics != "auto" and args.score is None:
        parser.error("--metrics belongs to --score, and --calibrate to --labels")
    try:
        score.chosen(args.metrics, ())
    except ValueError as wrong:
        parser.error(f"--metrics: {wrong}")
    for name in ("temperature", "top_p", "top_k"):
        if args.greedy and getattr(args, name) is not None:
            parser.error(f"--greedy and --{name.replace('_', '-')} exclude each other")
    flags.positive(parser, args, *(name for name in ("top_p", "repetition_penalty", "max_new_tokens") if getattr(args, name) is not None))
    for name in ("temperature", "top_k"):
        if getattr(args, name) is not None and getattr(args, name) < 0:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}, wanted 0 or more")
    if args.top_p is not None and args.top_p > 1:
        parser.error(f"--top-p is {args.top_p}, wanted at most 1")
    if args.score is not None and args.temperature is None and args.top_p is None and args.top_k is None:
        args.greedy = True
    return args


def load(args):
    """Return the model and its tokenizer."""
    device = models.pick_device(args.device, args.threads)
    folder = models.local_folder(args.ckpt, args.trust_remote_code, unfinished=True)
    tokenizer = template.load_tokenizer(models.with_tokenizer(folder), args.trust_remote_code)
    template.ensure_template(tokenizer)
    dtype = models.pick_dtype(args.dtype, device, folder)
    return models.load(str(folder), device, dtype, pack=False, trust_remote_code=args.trust_remote_code), tokenizer


class Chat:
    """A model, its tokenizer and how to sample. context: most tokens of prompt and answer together, or None."""

    def __init__(self, args, model, tokenizer):
        self.module, self.device, self.tokenizer = model.module, model.device, tokenizer
        self.context = getattr(self.module.config.get_text_config(), "max_position_embeddings", None)
        how = self.how = copy.deepcopy(self.module.generation_config)
        for name in ("temperature", "top_p", "top_k", "repetition_penalty", "max_new_tokens"):
            if getattr(args, name) is not None:
                setattr(how, name, getattr(args, name))
        if args.temperature or args.top_p is not None or args.top_k is not None:
            how.do_sample = True
        if args.greedy or args.temperature == 0:
            how.do_sample = False
        if not how.do_sample:
            how.do_sample, how.temperature, how.top_p, how.top_k = False, None, None, None
        how.max_new_tokens, how.max_length, how.num_beams = how.max_new_tokens or 512, None, 1
        stops = how.eos_token_id if isinstance(how.eos_token_id, list) else [how.eos_token_id]
        how.eos_token_id = list(dict.fromkeys(stop for stop in [*stops, tokenizer.eos_token_id] if stop is not None)) or None
        if how.pad_token_id is None:
            how.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (how.eos_token_id or [0])[0]

    def ids(self, messages):
        """Return the prompt's token ids, ready for the answer."""
        return template.prompt_ids(self.tokenizer, messages)

    def fit(self, messages):
        """Return (prompt ids, messages dropped): the oldest turns go, until a quarter of the context, or the longest answer, has room.

        Worked example: system, user, assistant, user becomes system, user. The system prompt and the last message stay.
        """
        kept, first = list(messages), int(messages[0]["role"] == "system")
        ids = self.ids(kept)
        while self.context and len(ids) + min(self.how.max_new_tokens, self.context // 4) > self.context and len(kept) > first + 2:
            del kept[first:first + 2]
            ids = self.ids(kept)
        return ids, len(messages) - len(kept)

    @torch.inference_mode()
    def answer(self, prompts, streamer=None):
        """Return the answers to a list of prompts' token ids, padded on the left to one length."""
        width = max(map(len, prompts))
        tokens = torch.tensor([[self.how.pad_token_id] * (width - len(prompt)) + prompt for prompt in prompts])  # (B, L)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        how = copy.deepcopy(self.how)
        if self.context:
            how.max_new_tokens = min(how.max_new_tokens, self.context - width)
        tokens, mask = tokens.to(self.device), mask.to(self.device)
        written = self.module.generate(input_ids=tokens, attention_mask=mask, generation_config=how, streamer=streamer)  # (B, L + answer)
        return [self.tokenizer.decode(line, skip_special_tokens=True) for line in written[:, width:].tolist()]


class Printer(BaseStreamer):
    """Prints an answer while it is written. `text` is what stands there: the decoding of all tokens so far, less an unfinished character."""

    def __init__(self, tokenizer):
        self.tokenizer, self.tokens, self.text = tokenizer, None, ""

    def put(self, value):
        if self.tokens is None:  # the first call brings the prompt
            self.tokens = []
            return
        self.tokens += value.flatten().tolist()
        text = self.tokenizer.decode(self.tokens, skip_special_tokens=True)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self.show(text)

    def end(self):
        self.show(self.tokenizer.decode(self.tokens or [], skip_special_tokens=True))
        print(flush=True)

    def show(self, text):
        print(text[len(self.text):], end="", flush=True)
        self.text = text


def with_system(messages, system):
    """Return the messages with the system prompt before them, where there is one and they bring none of their own."""
    if system and [message["role"] for message in messages[:1]] != ["system"]:
        return [{"role": "system", "content": system}, *messages]
    return messages


# --- a file of prompts


def prompts_file(args):
    """Return the path of the prompts: --prompts, or --score, where a data folder stands for its held-out ones."""
    path = Path(args.prompts or args.score)
    if not path.is_dir():
        return path
    if not (path / "val.prompts.jsonl").exists():
        files.fail(f"{path} holds no val.prompts.jsonl", wanted="a folder that prepare_data.py finished, or a .jsonl file of prompts")
    return path / "val.prompts.jsonl"


def read_prompts(path, system):
    """Return [(line number, fields, messages)]; the first line that is not one of the two forms ends the program, by its number."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as broken:
        files.fail(f"the prompts {path} cannot be read", seen=broken, wanted='a UTF-8 file of lines like {"prompt": "..."}')
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        broken = lambda seen: files.fail(f"{path} line {number}", seen, '{"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]}')
        try:
            fields = json.loads(line)
        except ValueError as error:
            broken(f"{line[:60]!r}, which is not JSON ({error})")
        if not isinstance(fields, dict) or ("prompt" in fields) == ("messages" in fields):
            broken(f"{line[:60]!r}")
        if "answer" in fields:
            broken('a field "answer", which the answer would overwrite')
        messages = fields["messages"] if "messages" in fields else [{"role": "user", "content": fields["prompt"]}]
        whole = lambda message: isinstance(message, dict) and all(isinstance(message.get(field), str) for field in ("role", "content"))
        if not isinstance(messages, list) or not messages or not all(map(whole, messages)):
            broken(f"{line[:60]!r}")
        if messages[-1]["role"] == "assistant":
            broken("messages that end with an answer")
        found.append((number, fields, with_system(messages, system)))
    if not found:
        files.fail(f"{path} holds no prompt", wanted="at least one line")
    return found


def what_to_score(args, path, prompts):
    """Return (metrics, labels or None) of --score; a line without a reference, or with one that is no label, ends the program by its number."""
    for number, fields, _ in prompts:
        if not isinstance(fields.get("reference"), str) or not fields["reference"].strip():
            files.fail(f"{path} line {number} has no reference to score against", seen=f"the fields {', '.join(fields)}",
                       wanted='{"prompt": "...", "reference": "..."}', mend="--prompts, which asks for none")
    references = [fields["reference"].strip() for _, fields, _ in prompts]
    if args.labels is None:
        return score.chosen(args.metrics, references), None
    names = labels.names(args.labels, references, path)
    for (number, _, _), reference in zip(prompts, references):
        if reference not in names:
            files.fail(f"{path} line {number}: the reference is no label", seen=repr(reference[:60]), wanted=", ".join(names[:20]),
                       mend="--labels auto, or all labels in --labels")
    if len(set(references)) == 1:
        print(f"chat: WARNING: every reference is {references[0]!r}: with one class only, accuracy says little and nothing was told apart")
    return ["accuracy", "macro_f1"], names


def open_out(out, settings, fresh):
    """Return the lines that are there already, of a file made with the same settings, or None if it is finished; refuse another one."""
    part, meta = out.with_name(out.name + ".part"), out.with_name(out.name + ".meta.json")
    if out.is_dir() or (out.exists() and not meta.exists()):
        files.fail(f"--out {out} exists and was not written by chat.py", wanted="a new name, or a file with its .meta.json beside it")
    if fresh:
        for path in (out.with_suffix(".scores.json"), out, part, meta):
            path.unlink(missing_ok=True)
    if out.exists() or part.exists():
        seen = files.read_json(meta, mend="the same command with --fresh")
        if differing := [name for name in settings if seen.get(name) != settings[name]]:
            values = ["; ".join(f"{name} {source.get(name)}" for name in differing) for source in (seen, settings)]
            made = out if out.exists() else part
            files.fail(f"{made} was made with other settings", *values, mend="the same command with --fresh, or another --out")
    if out.exists():
        return None
    out.parent.mkdir(parents=True, exist_ok=True)
    if not part.exists():
        files.write_json(meta, settings)
        part.touch()
    return part.read_bytes().split(b"\n")[:-1]  # what follows the last line end is a torn line


def answer_file(args):
    """Answer every line of --prompts or --score into --out, and score it."""
    path, out = prompts_file(args), Path(args.out)
    prompts = read_prompts(path, args.system)[:args.limit or None]
    metrics, names = what_to_score(args, path, prompts) if args.score else (None, None)
    folder = models.local_folder(args.ckpt, args.trust_remote_code, unfinished=True)
    if not models.has_weights(folder):
        files.fail(f"{folder} has no weights", wanted="*.safetensors beside config.json")
    chosen = ("ckpt", "system", "greedy", "temperature", "top_p", "top_k", "repetition_penalty", "max_new_tokens", "seed", "batch_size", "dtype")
    settings = {name: getattr(args, name) for name in chosen} | {"weights": models.identity(folder), "prompts": files.sha256(path)}
    # None where it is not in use, as in files that were made before these were
    settings |= {"limit": args.limit or None, "metrics": metrics, "labels": names, "calibrate": args.calibrate if names else None}
    lines, summary = open_out(out, settings, args.fresh), out.with_suffix(".scores.json")
    if lines is None and (not args.score or summary.exists()):
        print(f"chat: {out} is finished already; nothing to do (--fresh starts anew)")
        if args.score:
            say_scores(out, files.read_json(summary, mend="delete it, and the same command"))
        raise SystemExit(0)
    chat = Chat(args, *load(args))
    ready = []  # the prompts' token ids; with --labels each with its labels' (lib/labels.py)
    for number, _, messages in prompts:
        try:
            ready.append(labels.encode(chat.tokenizer, messages, names) if names else chat.ids(messages))
        except SystemExit as refused:
            files.fail(f"{path} line {number}", seen=str(refused).removeprefix("error: "))
        length = len(ready[-1][0]) + max(len(ids) for ids, _ in ready[-1][1]) - 1 if names else len(ready[-1])
        if chat.context and length >= chat.context:
            files.fail(f"{path} line {number} leaves no room for an answer", f"{length} tokens", f"fewer than {chat.context}")
    if lines is not None:
        write_answers(args, chat, prompts, ready, metrics, names, lines, out)
    if args.score:
        rows = score.read(out)
        classes = score.classification(*score.classes_of(rows, names)) if names else {}
        made = {"ckpt": args.ckpt, "weights": settings["weights"], "prompts": settings["prompts"], "count": len(rows), "settings": settings,
                "metrics": score.summarise(rows, metrics)} | {name: classes[name] for name in ("labels", "confusion", "per_class") if classes}
        files.write_json(summary, made | {"speed": speed(chat, ready[0][0] if names else ready[0])})
        say_scores(out, made)


def write_answers(args, chat, prompts, ready, metrics, names, lines, out):
    """Answer the prompts that have no line yet, a batch at a time, and publish the file."""
    scores = score.scorer(metrics, [fields["reference"] for _, fields, _ in prompts]) if args.score else None
    prior = labels.priors(chat.module, chat.tokenizer, [messages for _, _, messages in prompts], names) if args.calibrate == "prior" else None

    def answers(part):
        """Return the fields that a batch of prompts gets."""
        if not names:
            return [{"answer": text} for text in chat.answer(ready[part])]
        found = labels.logp(chat.module, ready[part], args.batch_size)
        best = labels.calibrated(found, ready[part], args.calibrate, None if prior is None else prior[part]).argmax(1)
        return [{"answer": names[place], "logp": dict(zip(names, row.round(6).tolist()))} for place, row in zip(best, found)]

    # only whole batches are kept, so that every answer is made beside the same neighbours as in a straight run
    start = len(lines) // args.batch_size * args.batch_size if len(lines) < len(prompts) else len(prompts)
    part = out.with_name(out.name + ".part")
    os.truncate(part, sum(len(line) + 1 for line in lines[:start]))
    if start:
        print(f"chat: continues {out} after {start} of {len(prompts)} answers", flush=True)
    began = time.perf_counter()
    with open(part, "ab") as part_file, tqdm(total=len(prompts), initial=start, unit=" answers", disable=None, dynamic_ncols=True) as bar:
        for at in range(start, len(prompts), args.batch_size):
            torch.manual_seed(args.seed + at)
            done = []
            for (_, fields, _), made in zip(prompts[at:], answers(slice(at, at + args.batch_size))):
                row = {**fields, **made} | ({"scores": scores(fields["reference"], made["answer"])} if scores else {})
                done.append(json.dumps(row, ensure_ascii=False) + "\n")
            part_file.write("".join(done).encode())
            part_file.flush()
            bar.update(len(done))
    files.sync(part)
    os.replace(part, out)
    now, time_s = len(prompts) - start, time.perf_counter() - began
    print(f"chat: {len(prompts)} answers in {out}; {now} of them now, in {time_s:.1f} s ({now / time_s:.1f} answers/s)")


def say_scores(out, made):
    """Print the metrics of a scored file, and where they are."""
    print(f"\n{score.show(made['metrics'], made.get('per_class'))}\n\neach answer with its scores: {out}; these: {out.with_suffix('.scores.json')}")


@torch.inference_mode()
def speed(chat, ids, new=32, rounds=3):
    """Return tokens a second of reading one prompt (128 tokens, `ids` over and over) and of writing `new` greedy tokens that none of them
    ends, each the best of `rounds`; and the bytes of weights and cache in memory (CUDA: torch's peak)."""
    context, device = chat.context or 1 << 30, chat.device
    new = max(1, min(new, context // 2))
    prompt = torch.tensor([(ids * 128)[:max(1, min(128, context - new))]], device=device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    best = [float("inf")] * 2
    for _ in range(rounds):
        began = clock(device)
        made = chat.module(input_ids=prompt, use_cache=True, logits_to_keep=1)
        read = clock(device)
        for _ in range(new):
            made = chat.module(input_ids=made.logits[:, -1:].argmax(-1), past_key_values=made.past_key_values, use_cache=True)
        best = [min(best[0], read - began), min(best[1], clock(device) - read)]
    held = [*chat.module.parameters(), *chat.module.buffers()]
    held += [value for layer in getattr(made.past_key_values, "layers", ()) for value in vars(layer).values() if isinstance(value, torch.Tensor)]
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else sum(value.nbytes for value in held)
    return {"prompt_tok_per_s": prompt.shape[1] / best[0], "tok_per_s": new / best[1], "memory_bytes": memory, "device": str(device),
            "threads": torch.get_num_threads()}


# --- a classifier


def classify(args, folder):
    """Say the classes of --prompt, of the lines of --prompts (into --out), or of what is typed, the likeliest first."""
    from transformers import pipeline
    from transformers.utils import logging

    logging.disable_progress_bar()
    if args.score is not None:
        files.fail(f"--score does not go with {folder}", "a classifier", "a language model",
                   "stage1_sft.py --eval-only (accuracy, macro-F1, confusion)")
    for name in ("system", "greedy", "temperature", "top_p", "top_k", "repetition_penalty", "max_new_tokens"):
        if getattr(args, name):
            files.fail(f"--{name.replace('_', '-')} does not go with {folder}", "a classifier, which writes nothing", mend="the same without it")
    device = models.pick_device(args.device, args.threads)
    known = pipeline("text-classification", model=str(folder), device=device, dtype=models.pick_dtype(args.dtype, device, folder), top_k=None,
                     trust_remote_code=args.trust_remote_code)
    if known.tokenizer.pad_token is None:
        known.tokenizer.pad_token = known.tokenizer.eos_token
    read = lambda texts: known(texts, batch_size=args.batch_size, truncation=True)
    if args.prompts is not None:
        prompts, out = read_prompts(Path(args.prompts), None)[:args.limit or None], Path(args.out)
        made = {"ckpt": args.ckpt, "weights": models.identity(folder), "prompts": files.sha256(Path(args.prompts)), "limit": args.limit}
        if open_out(out, made, args.fresh) is None:
            print(f"chat: {out} is finished already; nothing to do (--fresh starts anew)")
            return
        answers = read([messages[-1]["content"] for _, _, messages in prompts])
        lines = [{**fields, "answer": classes[0]["label"], "p": {entry["label"]: round(entry["score"], 6) for entry in classes}}
                 for (_, fields, _), classes in zip(prompts, answers)]
        files.write_text(out, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        out.with_name(out.name + ".part").unlink(missing_ok=True)
        print(f"chat: {len(lines)} classes in {args.out}")
        return
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if terminal and args.prompt is None:
        print(f"{args.ckpt} on {device}, a classifier: a line of text is answered with its classes; Ctrl-D to leave")
    typed = iter(lambda: read_message("> " if terminal else "", ". " if terminal else ""), None)
    for text in typed if args.prompt is None else [args.prompt]:
        if text.strip():
            print("   ".join(f"{entry['label']} {entry['score']:.3f}" for entry in read([text])[0][:5]))


# --- a conversation


def read_message(ask, more):
    """Return one message of the user, which may span lines (see HELP); None at the end of the input."""
    try:
        line = input(ask)
        if line.startswith('"""'):
            block = line[3:]
            while not block.endswith('"""'):
                block += "\n" + input(more)
            return block[:-3].strip("\n")
        while line.endswith("\\"):
            line = line[:-1] + "\n" + input(more)
        return line
    except EOFError:
        return None


def save(path, messages):
    """Write the conversation; a path that cannot be written is said, and the conversation goes on."""
    try:
        files.write_json(Path(path), {"messages": messages})
        print(f"saved {len(messages)} messages in {path}")
    except OSError as refused:
        print(f"not saved: {refused}")


def converse(args, chat):
    """Read messages and answer them until the user leaves."""
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if terminal:
        try:
            import readline  # noqa: F401  input() gets a history and line editing by its mere presence
        except ImportError:
            pass
        print(f"{args.ckpt} on {chat.device}; /help for help, Ctrl-D to leave")
    # readline must know which characters take no room on the line: \001 ... \002
    ask, more = ("\001\033[1;32m\002>\001\033[0m\002 ", ". ") if terminal else ("", "")
    system, history = args.system, []
    while True:
        try:
            message = read_message(ask, more)
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /exit leaves)")
            continue
        if message is None:
            print(end="\n" if terminal else "")
            return
        command, _, rest = message.strip().partition(" ")
        rest = rest.strip()
        if not command:
            continue
        if command == "/exit":
            return
        if command == "/help":
            print(HELP)
        elif command == "/reset":
            history = []
            print("the conversation is forgotten")
        elif command == "/system":
            system = rest or None
            print(f"system prompt: {system}" if system else "no system prompt of yours")
        elif command == "/save":
            save(rest, with_system(history, system)) if rest else print("/save needs a file name")
        elif message.startswith("/"):
            print(f"unknown command {command}; /help lists them (a space before it sends it to the model)")
        else:
            history = say(chat, system, [*history, {"role": "user", "content": message}])


def say(chat, system, history):
    """Print the answer to the last message and return the history with it; without that message where nothing could be answered."""
    try:
        ids, dropped = chat.fit(with_system(history, system))
    except SystemExit as refused:  # the chat template's one-line error must not end the conversation
        print(refused)
        return history[:-1]
    history = history[dropped:]
    if chat.context and len(ids) >= chat.context:
        print(f"this message is too long: {len(ids)} tokens, and the model sees {chat.context}")
        return history[:-1]
    if dropped:
        print(f"(the {dropped} oldest messages no longer fit into {chat.context} tokens and are forgotten)")
    printer = Printer(chat.tokenizer)
    try:
        text = chat.answer([ids], printer)[0]
    except KeyboardInterrupt:
        print(" (stopped)", flush=True)
        text = printer.text
        if not text:
            return history[:-1]
    return [*history, {"role": "assistant", "content": text}]


def main(argv=None):
    args = parse_args(argv)
    if classifier.is_classifier(folder := models.local_folder(args.ckpt, args.trust_remote_code, unfinished=True)):
        return classify(args, folder)
    if args.out is not None:
        try:
            return answer_file(args)
        except KeyboardInterrupt:
            print("\nchat: stopped; the same command continues")
            raise SystemExit(130) from None
    chat = Chat(args, *load(args))
    torch.manual_seed(args.seed)
    if args.prompt is None:
        converse(args, chat)
    elif not say(chat, args.system, [{"role": "user", "content": args.prompt}]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
