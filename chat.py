"""Talk to a checkpoint, in the terminal or on a page, or let it answer one prompt, a file of them,
or programs that speak OpenAI's API.

    # a conversation; /help inside
    python chat.py --ckpt runs/qwen/stage2
    # both answer; /diff shows where they differ
    python chat.py --ckpt runs/demo/stage2 --teacher runs/demo/teacher
    # the same on a page, http://127.0.0.1:8000, and OpenAI's API
    python chat.py --ckpt runs/demo/stage2 --teacher runs/demo/teacher --serve
    python chat.py --ckpt runs/demo/stage2 --device cpu --greedy --prompt "Ann has 38 apples. \
        She buys 45 more. How many apples does Ann have now?"
    python chat.py --ckpt runs/demo/stage2 --device cpu --greedy --prompts \
        data/demo/val.prompts.jsonl --out runs/answers.jsonl
    # answers, and their scores
    python chat.py --ckpt runs/demo/stage2 --device cpu --score data/demo --out \
        runs/demo/stage2-eval/answers.jsonl

Reads   --ckpt: a stage folder (its best/, else its final/), any Hugging Face checkpoint folder, or
        a hub id --teacher: the same, or a GGUF file of the student's tokens --prompts: one JSON
        object a line, {"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]}; its
        other fields are carried over --score: the same, or a data folder (its val.prompts.jsonl);
        every line has a "reference" as well
Writes  --out: the lines of --prompts in their order, each with "answer" added. Until all are there
        they lie in OUT.part, and the same command continues there; OUT.meta.json holds the settings
        they were made with. A sampled batch's seed is --seed + its first line's number, so that a
        continued file is the file of a straight run. With --score each line has "scores" too
        (lib/measure/score.py says of what), with --labels "logp" of every label
        (lib/measure/labels.py), and OUT.scores.json (answers.scores.json beside answers.jsonl),
        written last, the metrics over all lines with their intervals, and the speed. On a terminal,
        what is typed is kept in ~/.local/state/distil/chat_history ($XDG_STATE_HOME; the last 1,000
        lines, for no other user).
"""

import argparse
import copy
import os

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from lib import checkpoints, files, flags, models, template
from lib.chat import serve, talk
from lib.measure import labels, prompts, score
from lib.options import classifier


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    # read and write
    parser.add_argument(
        "--ckpt", required=True, metavar="DIR", help="stage folder, checkpoint folder or hub id"
    )
    parser.add_argument(
        "--teacher",
        metavar="DIR",
        help=(
            "a second model that answers beside the first, with which /diff compares it: as --ckpt,"
            " or a GGUF file (default: none)"
        ),
    )
    parser.add_argument(
        "--prompt", metavar="TEXT", help="answer this and exit (default: a conversation)"
    )
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help="answer every line of this .jsonl file into --out (default: a conversation)",
    )
    parser.add_argument(
        "--score",
        metavar="FILE|DIR",
        help=(
            "answer as with --prompts, greedily unless a flag below samples, and score the answers"
            " against each line's reference; of a data folder its val prompts (default: a"
            " conversation)"
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
        "--system", metavar="TEXT", help="system prompt (default: the chat template's own)"
    )
    # scores
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
            "with --labels: choose by log p of the label, by that a "
            "token, or less its log p without the prompt's content (default: %(default)s)"
        ),
    )
    # sampling; None leaves it to the checkpoint's generation_config
    parser.add_argument("--greedy", action="store_true", help="always take the likeliest token")
    parser.add_argument(
        "--temperature",
        type=float,
        metavar="T",
        help="sample at this temperature; 0 = --greedy (default: the checkpoint's own)",
    )
    parser.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="sample among the likeliest tokens of this mass (default: the checkpoint's own)",
    )
    parser.add_argument(
        "--top-k",
        type=int,
        metavar="K",
        help="sample among this many tokens; 0 = off (default: the checkpoint's own)",
    )
    parser.add_argument(
        "--repetition-penalty",
        type=float,
        metavar="X",
        help="1 = off (default: the checkpoint's own)",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="longest answer (default: the checkpoint's own, else 512)",
    )
    # a server
    serve.add_flags(parser)
    # the run
    parser.add_argument(
        "--batch-size",
        type=int,
        default=32,
        metavar="N",
        help="prompts answered at a time, of a file (default: %(default)s)",
    )
    flags.add(
        parser, "--seed", "--device", "--dtype", "--threads", "--fresh", "--trust-remote-code"
    )
    args = parser.parse_args(argv)

    flags.positive(parser, args, "batch_size")
    given = [
        f"--{name}"
        for name in ("prompt", "prompts", "score", "serve")
        if getattr(args, name) not in (None, False)
    ]
    if len(given) > 1:
        parser.error(f"{' and '.join(given)} exclude each other")
    if args.teacher is not None and args.out is not None:
        parser.error(
            "--teacher goes with a conversation, --prompt or --serve, not with a file of prompts:"
            " wanted a run each"
        )
    if (args.out is None) != (given in ([], ["--prompt"], ["--serve"])):
        parser.error("--prompts FILE or --score FILE, and --out FILE belong together")
    if args.limit < 0 or args.limit and args.out is None:
        parser.error(f"--limit is {args.limit}, wanted 0 or more, and with --prompts or --score")
    if args.labels is not None and (
        args.score is None
        or args.metrics != "auto"
        or not all(name.strip() for name in args.labels.split(","))
    ):
        parser.error(
            f"--labels is {args.labels!r}, wanted auto, or names like pos,neg, with --score and"
            " without --metrics"
        )
    if (
        args.calibrate != "off"
        and args.labels is None
        or args.metrics != "auto"
        and args.score is None
    ):
        parser.error("--metrics belongs to --score, and --calibrate to --labels")
    serve.check_flags(parser, args)
    try:
        score.chosen(args.metrics, ())
    except ValueError as wrong:
        parser.error(f"--metrics: {wrong}")
    for name in ("temperature", "top_p", "top_k"):
        if args.greedy and getattr(args, name) is not None:
            parser.error(f"--greedy and --{name.replace('_', '-')} exclude each other")
    flags.positive(
        parser,
        args,
        *(
            name
            for name in ("top_p", "repetition_penalty", "max_new_tokens")
            if getattr(args, name) is not None
        ),
    )
    for name in ("temperature", "top_k"):
        if getattr(args, name) is not None and getattr(args, name) < 0:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}, wanted 0 or more")
    if args.top_p is not None and args.top_p > 1:
        parser.error(f"--top-p is {args.top_p}, wanted at most 1")
    if (
        args.score is not None
        and args.temperature is None
        and args.top_p is None
        and args.top_k is None
    ):
        args.greedy = True
    return args


def load(args, name=None, other=None):
    """Return the model `name` (None: --ckpt) and its tokenizer. A GGUF file's is the `other` one,
    the student's, if it has its tokens."""
    device = models.pick_device(args.device, args.threads)
    folder = checkpoints.local_folder(name or args.ckpt, args.trust_remote_code, unfinished=True)
    if other is not None and checkpoints.is_gguf(folder):
        checkpoints.check_gguf_vocabulary(folder, other, args.ckpt)
        tokenizer = other
    else:
        tokenizer = template.load_tokenizer(
            checkpoints.with_tokenizer(folder), args.trust_remote_code
        )
        template.ensure_template(tokenizer)
    dtype = models.pick_dtype(args.dtype, device, folder)
    return (
        models.load(
            str(folder), device, dtype, pack=False, trust_remote_code=args.trust_remote_code
        ),
        tokenizer,
    )


def both(args):
    """Return the Chat of --ckpt, and that of --teacher or None."""
    if args.teacher is not None and classifier.is_classifier(
        folder := checkpoints.local_folder(args.teacher, args.trust_remote_code, unfinished=True)
    ):
        files.fail(
            f"{folder} cannot answer beside {args.ckpt}",
            "a classifier",
            "a language model",
            "another --teacher",
        )
    student = Chat(args, *load(args))
    return student, (
        None if args.teacher is None else Chat(args, *load(args, args.teacher, student.tokenizer))
    )


class Chat:
    """A model, its tokenizer and how to sample. context: most tokens of prompt and answer together,
    or None."""

    def __init__(self, args, model, tokenizer):
        self.module, self.device, self.tokenizer = model.module, model.device, tokenizer
        self.context = getattr(
            self.module.config.get_text_config(), "max_position_embeddings", None
        )
        self.past = ([], DynamicCache())  # tokens of the last turn of a conversation, and its cache
        self.choose(args)

    def choose(self, args):
        """Sample as these arguments say, and where they say nothing as the checkpoint's
        generation_config does."""
        how, tokenizer = copy.deepcopy(self.module.generation_config), self.tokenizer
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
        how.eos_token_id = (
            list(
                dict.fromkeys(stop for stop in [*stops, tokenizer.eos_token_id] if stop is not None)
            )
            or None
        )
        if how.pad_token_id is None:
            how.pad_token_id = (
                tokenizer.pad_token_id
                if tokenizer.pad_token_id is not None
                else (how.eos_token_id or [0])[0]
            )
        self.how = how

    def ids(self, messages):
        """Return the prompt's token ids, ready for the answer."""
        return template.prompt_ids(self.tokenizer, messages)

    def fit(self, messages):
        """Return (prompt ids, messages dropped): the oldest turns go, until a quarter of the
        context, or the longest answer, has room.

        Worked example: system, user, assistant, user becomes system, user. The system prompt and
        the last message stay.
        """
        kept, first = list(messages), int(messages[0]["role"] == "system")
        ids = self.ids(kept)
        while (
            self.context
            and len(ids) + min(self.how.max_new_tokens, self.context // 4) > self.context
            and len(kept) > first + 2
        ):
            del kept[first : first + 2]
            ids = self.ids(kept)
        return ids, len(messages) - len(kept)

    def remembered(self, ids):
        """Return the cache of the turn before, cut to the tokens that `ids` begins with as well: a
        conversation is not read anew at every turn. None where a model's memory is more than keys
        and values of every token, which cannot be cut (sliding windows, Mamba).
        """
        if any(
            type(layer) is not DynamicLayer
            for layer in DynamicCache(config=self.module.config.get_text_config()).layers
        ):
            return None
        known, cache = self.past
        # one token is left to be read: its logits are wanted. A layer may be one token longer than
        # others, if Ctrl-C came in between
        held = min(
            [
                len(os.path.commonprefix([known, ids])),
                len(ids) - 1,
                *(layer.get_seq_length() for layer in cache.layers),
            ]
        )
        for layer in cache.layers:
            layer.crop(held - layer.get_seq_length())
        self.past = (ids, cache)
        return cache

    @torch.inference_mode()
    def answer(self, prompts, streamer=None):
        """Return the answers to a list of prompts' token ids, padded on the left to one length;
        with a streamer, to one, of a conversation."""
        width = max(map(len, prompts))
        tokens = torch.tensor(
            [[self.how.pad_token_id] * (width - len(prompt)) + prompt for prompt in prompts]
        )  # (B, L)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        how = copy.deepcopy(self.how)
        if self.context:
            how.max_new_tokens = min(how.max_new_tokens, self.context - width)
        tokens, mask = tokens.to(self.device), mask.to(self.device)
        cache = self.remembered(prompts[0]) if streamer is not None else None
        written = self.module.generate(
            input_ids=tokens,
            attention_mask=mask,
            generation_config=how,
            streamer=streamer,
            past_key_values=cache,
        )  # (B, L + answer)
        if cache is not None:
            self.past = (written[0].tolist(), cache)
        return [
            self.tokenizer.decode(line, skip_special_tokens=True)
            for line in written[:, width:].tolist()
        ]


def main(argv=None):
    args = parse_args(argv)
    try:
        run(args)
    except KeyboardInterrupt:
        print("\nchat: stopped" + "; the same command continues" * (args.out is not None))
        raise SystemExit(130) from None


def run(args):
    """Do what the flags ask for: classes, answers to a file, a server, one answer, or a
    conversation."""
    folder = checkpoints.local_folder(args.ckpt, args.trust_remote_code, unfinished=True)
    if classifier.is_classifier(folder):
        if args.serve:
            files.fail(f"--serve does not go with {folder}", "a classifier", "a language model")
        read, device = classifier.reader(args, folder)
        return (
            talk.classify(args, read, device)
            if args.out is None
            else prompts.classify(args, read, folder)
        )
    if args.out is not None:
        return prompts.answer(args, lambda: Chat(args, *load(args)))
    listening = (
        serve.listen(args) if args.serve else None
    )  # a port that is taken is said before the models are loaded
    student, teacher = both(args)
    if args.serve:
        return serve.serve(
            args,
            {"student": student} | ({"teacher": teacher} if teacher else {}),
            folder,
            listening,
        )
    torch.manual_seed(args.seed)
    if args.prompt is None:
        talk.converse(args, student, teacher)
    elif not talk.say(talk.Conversation(student, teacher, args), args.prompt):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
