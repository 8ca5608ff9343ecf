"""Talk to a checkpoint, or let it answer one prompt or a file of them.

    python chat.py --ckpt runs/qwen/stage2                                          # a conversation; /help inside
    python chat.py --ckpt runs/demo/stage2 --device cpu --greedy --prompt "Ann has 38 apples. She buys 45 more. How many apples does Ann have now?"
    python chat.py --ckpt runs/demo/stage2 --device cpu --greedy --prompts data/demo/val.prompts.jsonl --out runs/answers.jsonl

Reads   --ckpt: a stage folder (its best/, else its final/), any Hugging Face checkpoint folder, or a hub id
        --prompts: one JSON object a line, {"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]}; its other fields are carried over
Writes  --out: the lines of --prompts in their order, each with "answer" added. Until all are there they lie in OUT.part, and the same command
        continues there; OUT.meta.json holds the settings they were made with. A sampled batch's seed is --seed + its first line's number,
        so that a continued file is the file of a straight run.
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

from lib import files, flags, models, template

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
    parser.add_argument("--out", metavar="FILE", help="where the answers to --prompts go; running the same command again continues there")
    parser.add_argument("--system", metavar="TEXT", help="system prompt (default: the chat template's own)")
    # sampling; None leaves it to the checkpoint's generation_config
    parser.add_argument("--greedy", action="store_true", help="always take the likeliest token")
    parser.add_argument("--temperature", type=float, metavar="T", help="sample at this temperature; 0 = --greedy (default: the checkpoint's own)")
    parser.add_argument("--top-p", type=float, metavar="P", help="sample among the likeliest tokens of this mass (default: the checkpoint's own)")
    parser.add_argument("--top-k", type=int, metavar="K", help="sample among this many tokens; 0 = off (default: the checkpoint's own)")
    parser.add_argument("--repetition-penalty", type=float, metavar="X", help="1 = off (default: the checkpoint's own)")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="longest answer (default: the checkpoint's own, else 512)")
    # the run
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="prompts answered at a time with --prompts (default: %(default)s)")
    flags.add(parser, "--seed", "--device", "--dtype", "--threads", "--fresh", "--trust-remote-code")
    args = parser.parse_args(argv)

    flags.positive(parser, args, "batch_size")
    if args.prompt is not None and args.prompts is not None:
        parser.error("--prompt and --prompts exclude each other")
    if (args.prompts is None) != (args.out is None):
        parser.error("--prompts FILE and --out FILE belong together")
    for name in ("temperature", "top_p", "top_k"):
        if args.greedy and getattr(args, name) is not None:
            parser.error(f"--greedy and --{name.replace('_', '-')} exclude each other")
    flags.positive(parser, args, *(name for name in ("top_p", "repetition_penalty", "max_new_tokens") if getattr(args, name) is not None))
    for name in ("temperature", "top_k"):
        if getattr(args, name) is not None and getattr(args, name) < 0:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}, wanted 0 or more")
    if args.top_p is not None and args.top_p > 1:
        parser.error(f"--top-p is {args.top_p}, wanted at most 1")
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


def read_prompts(path, system):
    """Return [(line number, fields, messages)]; the first line that is not one of the two forms ends the program, by its number."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as broken:
        files.fail(f"--prompts {path} cannot be read", seen=broken, wanted='a UTF-8 file of lines like {"prompt": "..."}')
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
        files.fail(f"--prompts {path} holds no prompt", wanted="at least one line")
    return found


def open_out(out, settings, fresh):
    """Return the lines that are there already, of a file made with the same settings; refuse another one; leave if it is finished."""
    part, meta = out.with_name(out.name + ".part"), out.with_name(out.name + ".meta.json")
    if out.is_dir() or (out.exists() and not meta.exists()):
        files.fail(f"--out {out} exists and was not written by chat.py", wanted="a new name, or a file with its .meta.json beside it")
    if fresh:
        for path in (out, part, meta):
            path.unlink(missing_ok=True)
    if out.exists() or part.exists():
        seen = files.read_json(meta, mend="the same command with --fresh")
        if differing := [name for name in settings if seen.get(name) != settings[name]]:
            values = ["; ".join(f"{name} {source.get(name)}" for name in differing) for source in (seen, settings)]
            made = out if out.exists() else part
            files.fail(f"{made} was made with other settings", *values, mend="the same command with --fresh, or another --out")
    if out.exists():
        print(f"chat: {out} is finished already; nothing to do (--fresh starts anew)")
        raise SystemExit(0)
    out.parent.mkdir(parents=True, exist_ok=True)
    if not part.exists():
        files.write_json(meta, settings)
        part.touch()
    return part.read_bytes().split(b"\n")[:-1]  # what follows the last line end is a torn line


def answer_file(args):
    """Answer every line of --prompts into --out."""
    prompts, out = read_prompts(args.prompts, args.system), Path(args.out)
    folder = models.local_folder(args.ckpt, args.trust_remote_code, unfinished=True)
    if not models.has_weights(folder):
        files.fail(f"{folder} has no weights", wanted="*.safetensors beside config.json")
    chosen = ("ckpt", "system", "greedy", "temperature", "top_p", "top_k", "repetition_penalty", "max_new_tokens", "seed", "batch_size", "dtype")
    settings = {name: getattr(args, name) for name in chosen} | {"weights": models.identity(folder), "prompts": files.sha256(Path(args.prompts))}
    lines = open_out(out, settings, args.fresh)
    chat = Chat(args, *load(args))
    ready = []
    for number, _, messages in prompts:
        try:
            ready.append(chat.ids(messages))
        except SystemExit as refused:
            files.fail(f"{args.prompts} line {number}", seen=str(refused).removeprefix("error: "))
        if chat.context and len(ready[-1]) >= chat.context:
            files.fail(f"{args.prompts} line {number} leaves no room for an answer", f"{len(ready[-1])} tokens", f"fewer than {chat.context}")

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
            answers = chat.answer(ready[at:at + args.batch_size])
            done = [json.dumps({**fields, "answer": answer}, ensure_ascii=False) + "\n" for (_, fields, _), answer in zip(prompts[at:], answers)]
            part_file.write("".join(done).encode())
            part_file.flush()
            bar.update(len(done))
    files.sync(part)
    os.replace(part, out)
    now, time_s = len(prompts) - start, time.perf_counter() - began
    print(f"chat: {len(prompts)} answers in {out}; {now} of them now, in {time_s:.1f} s ({now / time_s:.1f} answers/s)")


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
    if args.prompts is not None:
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
