"""Talk to a checkpoint: in the terminal, on a page, by OpenAI's API, or with a file of prompts.

    # a conversation; /help inside
    python chat.py --ckpt runs/qwen/stage2
    # both answer; /diff shows where they differ
    python chat.py --ckpt runs/demo/stage2 --teacher runs/demo/teacher
    # the same on a page, http://127.0.0.1:8000, and OpenAI's API
    python chat.py --ckpt runs/demo/stage2 --teacher runs/demo/teacher --serve
    python chat.py --ckpt runs/demo/stage2 --device cpu --greedy --prompt "What is 38 plus 45?"
    # answers to a file, and their scores
    python chat.py --ckpt runs/demo/stage2 --prompts data/demo/val.prompts.jsonl --out answers.jsonl
    python chat.py --ckpt runs/demo/stage2 --score data/demo --out runs/demo/answers.jsonl

Reads   --ckpt     a stage folder (its best/, else its final/), any Hugging Face checkpoint folder,
                   or a hub id
        --teacher  the same, or a GGUF file of the student's tokens
        --prompts  a file of prompts of any kind and shape that prepare_data.py reads, as
                   {"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]}; other
                   fields are carried over
        --score    the same, or a data folder (its val.prompts.jsonl); every row has a "reference"
                   (a text, or a list of which any is right), or an answer, which is taken for it
Writes  --out: the rows of --prompts in their order as .jsonl, each with "answer" added. Until all
        are there they lie in OUT.part, and the same command continues there; OUT.meta.json holds
        the settings they were made with. A sampled answer's seed is --seed + its row's number, so
        that a continued file is the file of a straight run. With --score each line has "scores" too
        (lib/measure/score.py says of what), with --labels "logp" of every label
        (lib/measure/labels.py), and OUT.scores.json (answers.scores.json beside answers.jsonl),
        written last, the metrics over all lines with their intervals, and the speed. On a terminal,
        what is typed is kept in ~/.local/state/distil/chat_history ($XDG_STATE_HOME; the last 1,000
        lines, for no other user).
"""

import argparse
import functools

import torch

from lib import checkpoints, files, flags, template
from lib.chat import model, serve, talk
from lib.measure import prompts
from lib.options import classifier
from lib.prepare import asked, templates


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
        "--system", metavar="TEXT", help="system prompt (default: the chat template's own)"
    )
    flags.add(parser, "--chat-template", "--template-args")
    # a file of prompts; how tokens are chosen; a server
    prompts.add_flags(parser)
    model.add_flags(parser)
    serve.add_flags(parser)
    # the run
    flags.add(
        parser,
        "--seed",
        "--device",
        "--dtype",
        "--threads",
        "--fresh",
        "--dry-run",
        "--trust-remote-code",
    )
    args = parser.parse_args(argv)

    doors = ("prompt", "prompts", "score", "serve")
    given = [f"--{name}" for name in doors if getattr(args, name) not in (None, False)]
    if len(given) > 1:
        parser.error(f"{' and '.join(given)} exclude each other")
    if args.teacher is not None and args.out is not None:
        parser.error(
            "--teacher goes with a conversation, --prompt or --serve, not with a file of prompts:"
            " wanted a run each"
        )
    model.check_flags(parser, args)
    prompts.check_flags(parser, args)
    serve.check_flags(parser, args)
    for name in ("prompt", "system", "labels", "api_key"):
        if template.BROKEN.search(getattr(args, name) or ""):
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)!r}, wanted UTF-8")
    return args


@files.script
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
    folder = local_folder(args, args.ckpt)
    if classifier.is_classifier(folder):
        return classify(args, folder)
    if args.dry_run:
        return model.preflight(args, templates.make_ready)
    if args.out is not None:
        load = functools.partial(model.load, ready=templates.make_ready)
        return prompts.answer_file(args, load, asked.rows_asked)
    # a port that is taken is said before the models are loaded
    listening = serve.open_socket(args) if args.serve else None
    if args.teacher is not None and classifier.is_classifier(local_folder(args, args.teacher)):
        files.fail(
            f"{local_folder(args, args.teacher)} cannot answer beside {args.ckpt}",
            "a classifier",
            "a language model",
            "another --teacher",
        )
    student, teacher = model.both(args, templates.make_ready)
    if args.serve:
        chats = {"student": student} | ({"teacher": teacher} if teacher else {})
        return serve.serve(args, chats, folder, listening)
    torch.manual_seed(args.seed)
    if args.prompt is None:
        talk.converse(args, student, teacher)
    elif not talk.answer_message(talk.Conversation(student, teacher, args), args.prompt):
        raise SystemExit(1)


def classify(args, folder):
    """Print the classes of what is typed, or of --prompt; or write those of --prompts."""
    if args.serve:
        files.fail(f"--serve does not go with {folder}", "a classifier", "a language model")
    read, device = classifier.reader(args, folder)
    if args.out is None:
        talk.classify_lines(args, read, device)
    else:
        prompts.classify_file(args, read, folder, asked.rows_asked)


def local_folder(args, name):
    """Return the folder of a checkpoint, which may still be in training."""
    return checkpoints.local_folder(name, args.trust_remote_code, unfinished=True)


if __name__ == "__main__":
    main()
