"""Flags that several scripts share: one name, one default, one text each, so that they cannot drift
apart."""

import argparse
import re

from lib import files
from lib.options import mix, track

SHARED = {
    "--data": dict(required=True, metavar="DIR", help="the folder prepare_data.py wrote"),
    "--out": dict(
        required=True,
        metavar="DIR",
        help="where to write; running the same command again continues there",
    ),
    "--student": dict(
        required=True,
        metavar="DIR|ID",
        help="the model to train: a folder, a stage folder (its best/), or a hub id",
    ),
    "--eval-only": dict(
        action="store_true", help="measure --student on val, write eval.json to --out, and stop"
    ),
    "--lr": dict(type=float, default=2e-5, help="peak learning rate (default: %(default)s)"),
    "--epochs": dict(type=float, default=3.0, help="passes over the data (default: %(default)s)"),
    "--steps": dict(
        type=int,
        default=0,
        metavar="N",
        help=(
            "exactly this many optimizer steps instead of --epochs; 0 = off (default: %(default)s)"
        ),
    ),
    "--mix": dict(
        default=None,
        metavar="TEXT",
        help=(
            "shares of the sources in a step's tokens: 'a:0.7 b:0.3', or 'a:0.7->0.3 b:0.3->0.7'"
            " from first step to last; off = every row once an epoch (default: what prepare_data.py"
            " stored, else off)"
        ),
    ),
    "--eval-sampling": dict(
        action="store_true",
        help=(
            "at every evaluation, give more weight to the sources whose val loss fell least since"
            " the one before (lib/options/sampling.py says the rule)"
        ),
    ),
    "--tokens-per-step": dict(
        type=int,
        default=16384,
        metavar="N",
        help="tokens of one optimizer step, about (default: %(default)s)",
    ),
    "--warmup": dict(
        type=float,
        default=0.1,
        help=(
            "share of the steps over which the rate rises; then a cosine to 0 (default:"
            " %(default)s)"
        ),
    ),
    "--lora-rank": dict(
        type=int,
        default=0,
        metavar="R",
        help=(
            "train a LoRA adapter of this rank, the weights frozen; 0 = off, train all weights "
            "(default: %(default)s)"
        ),
    ),
    "--lora-alpha": dict(
        type=float,
        default=32.0,
        help="the adapter's output is multiplied by alpha / rank (default: %(default)s)",
    ),
    "--lora-dropout": dict(
        type=float, default=0.0, help="dropout on the adapter's input (default: %(default)s)"
    ),
    "--lora-targets": dict(
        default="all-linear",
        metavar="NAMES",
        help="layers that get one: all-linear, or names like q_proj,v_proj (default: %(default)s)",
    ),
    "--merge": dict(
        action="store_true",
        help=(
            "best/ and final/: whole weights with the adapter merged, it itself in adapter/"
            " (default: it alone)"
        ),
    ),
    "--weight-decay": dict(
        type=float, default=0.05, help="AdamW's decay, on matrices only (default: %(default)s)"
    ),
    "--beta2": dict(type=float, default=0.95, help="AdamW's second beta (default: %(default)s)"),
    "--clip": dict(
        type=float, default=1.0, help="largest norm of the gradient; 0 = off (default: %(default)s)"
    ),
    "--checkpointing": dict(
        action="store_true",
        help=(
            "gradient checkpointing: less memory, a third more time (on by itself when memory is"
            " short)"
        ),
    ),
    "--no-pack": dict(
        action="store_true",
        help=(
            "one row a line instead of several (for models whose packed rows would see each other)"
        ),
    ),
    "--eval-every": dict(
        type=int,
        default=0,
        metavar="N",
        help="steps between evaluations; 0 = ten over the run (default: %(default)s)",
    ),
    "--patience": dict(
        type=int,
        default=0,
        metavar="N",
        help=(
            "stop after this many evaluations in a row without a better --best; 0 = off "
            "(default: %(default)s)"
        ),
    ),
    "--save-every": dict(
        type=int,
        default=0,
        metavar="N",
        help="steps between resume states; 0 = at every evaluation (default: %(default)s)",
    ),
    "--log-every": dict(
        type=int, default=10, metavar="N", help="steps between log lines (default: %(default)s)"
    ),
    "--samples": dict(
        type=int,
        default=3,
        metavar="N",
        help="val prompts answered at each evaluation (samples.md); 0 = off (default: %(default)s)",
    ),
    "--sample-tokens": dict(
        type=int, default=64, metavar="N", help="longest sample (default: %(default)s)"
    ),
    "--save-dtype": dict(
        choices=["float32", "bfloat16", "float16"],
        default="float32",
        help="of weights in best/ and final/ (default: %(default)s)",
    ),
    "--tokens-per-microbatch": dict(
        type=int,
        default=4096,
        metavar="N",
        help="tokens of one forward pass, as memory allows (default: %(default)s)",
    ),
    "--seed": dict(type=int, default=0, help="seed of every random choice (default: %(default)s)"),
    "--device": dict(default="auto", help="auto, cpu, cuda, cuda:1, mps (default: %(default)s)"),
    "--dtype": dict(
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16"],
        help=(
            "of a model that is only run; auto: its own on CUDA, else float32 (default:"
            " %(default)s)"
        ),
    ),
    "--amp": dict(
        default="auto",
        choices=["auto", "fp16", "bf16", "off"],
        help="mixed precision; auto: fp16 on CUDA (default: %(default)s)",
    ),
    "--attn": dict(
        choices=["sdpa", "eager", "flash_attention_2", "flex_attention"],
        default="sdpa",
        help="attention kernel (default: %(default)s)",
    ),
    "--compile": dict(action="store_true", help="torch.compile the model's body"),
    "--tag": dict(
        default="",
        metavar="TEXT",
        help=(
            "write to OUT-TEXT; auto: to OUT-METHOD-DATE, continuing the newest such run that is"
            " not finished (default: to OUT)"
        ),
    ),
    "--track": dict(
        choices=track.PACKAGES,
        default="",
        help="show the log in TensorBoard (OUT/tensorboard) or in Weights & Biases (default: off)",
    ),
    "--fresh": dict(
        action="store_true",
        help="throw away what --out holds and start anew (default: continue it)",
    ),
    "--trust-remote-code": dict(
        action="store_true", help="let a model folder run its own Python code (default: refuse)"
    ),
    "--threads": dict(
        type=int,
        default=0,
        metavar="N",
        help="CPU threads; 0 = torch's own choice (default: %(default)s)",
    ),
}


def add(parser: argparse.ArgumentParser | argparse._ArgumentGroup, *names: str) -> None:
    """Add the shared flags `names` to a parser, in that order."""
    for name in names:
        parser.add_argument(name, **SHARED[name])


TRAINER = {  # the trainers' flags under the headings they appear with, in this order
    "the optimizer step": (
        "--lr",
        "--epochs",
        "--steps",
        "--mix",
        "--eval-sampling",
        "--tokens-per-step",
        "--tokens-per-microbatch",
        "--warmup",
        "--weight-decay",
        "--beta2",
        "--clip",
    ),
    "LoRA (needs peft)": (
        "--lora-rank",
        "--lora-alpha",
        "--lora-dropout",
        "--lora-targets",
        "--merge",
    ),
    "the run": (
        "--eval-every",
        "--patience",
        "--save-every",
        "--log-every",
        "--samples",
        "--sample-tokens",
        "--save-dtype",
        "--seed",
        "--tag",
        "--track",
        "--fresh",
    ),
    "the machine": (
        "--device",
        "--threads",
        "--amp",
        "--attn",
        "--compile",
        "--checkpointing",
        "--no-pack",
        "--trust-remote-code",
    ),
}


def add_trainer(parser: argparse.ArgumentParser) -> None:
    """Add what both trainers share beside their own method, each group under its heading."""
    for title, names in TRAINER.items():
        add(parser.add_argument_group(title), *names)


def check_trainer(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse (exit code 2) trainer values that cannot work."""
    positive(
        parser,
        args,
        "lr",
        "epochs",
        "tokens_per_step",
        "tokens_per_microbatch",
        "log_every",
        "lora_alpha",
    )
    if not 0 <= args.warmup <= 1:
        parser.error(f"--warmup is {args.warmup}, wanted a share from 0 to 1")
    for name in (
        "steps",
        "clip",
        "weight_decay",
        "eval_every",
        "save_every",
        "samples",
        "sample_tokens",
        "seed",
        "lora_rank",
        "patience",
    ):
        if getattr(args, name) < 0:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}, wanted 0 or more")
    for name in ("beta2", "lora_dropout"):
        if not 0 <= getattr(args, name) < 1:
            parser.error(
                f"--{name.replace('_', '-')} is {getattr(args, name)}, wanted a share below 1"
            )
    if not all(args.lora_targets.split(",")):
        parser.error(
            f"--lora-targets is {args.lora_targets!r}, wanted all-linear, or names like"
            " q_proj,v_proj"
        )
    if args.merge and not args.lora_rank:
        parser.error(
            "--merge needs --lora-rank: without an adapter best/ holds whole weights already"
        )
    if not re.fullmatch(r"[\w.,=+-]*", args.tag):
        parser.error(
            f"--tag is {args.tag!r}, wanted a part of a folder's name: letters, digits and . , ="
            " + - _"
        )
    if args.tag == "auto" and args.eval_only:
        parser.error(
            "--tag auto names a run, and --eval-only makes none: another --out, or a --tag of"
            " your own"
        )
    if args.tag not in ("", "auto"):  # that of auto is known once the run's settings are
        args.out = f"{args.out.rstrip('/')}-{args.tag}"
    try:
        args.mix in (None, "off") or mix.parse(args.mix)
    except ValueError as wrong:
        parser.error(f"--mix: {wrong}")


def check_labelled(args: argparse.Namespace, dataset) -> None:
    """Set what follows for a trainer from rows that have a class each; refuse what does not go with
    them."""
    if not dataset.labels:
        return
    args.no_pack, args.samples = True, 0
    for name, value in (("lora_rank", args.lora_rank), ("teacher", getattr(args, "teacher", None))):
        if value:
            mend = (
                "dump_logits.py, and --logits: a record holds all class logits, so nothing is lost"
                if name == "teacher"
                else None
            )
            files.fail(
                f"--{name.replace('_', '-')} does not go with {dataset.folder}",
                "rows with a class each",
                "rows of language",
                mend,
            )


def measure(*names: str):
    """Return the reader of --best: one of `names`, or that of a source (those that are there are
    known once the data is open)."""

    def read(text: str) -> str:
        by_source = [f"{name}_" for name in names if name in ("ce", "kl")]
        if text not in names and (text in by_source or not text.startswith(tuple(by_source))):
            own = " or ".join(f"{name}NAME" for name in by_source)
            raise argparse.ArgumentTypeError(
                f"invalid choice: {text!r} (choose from {', '.join(names)}, or {own} of a source)"
            )
        return text

    return read


def moving(text: str) -> float | tuple[float, float]:
    """Read a number, or FIRST->LAST: one that moves in a straight line from the first step to the
    last."""
    first, arrow, last = text.partition("->")
    return (float(first), float(last)) if arrow else float(first)


def ends(value: float | tuple[float, float]) -> tuple[float, float]:
    """Return what a number of `moving` is at the first step and at the last."""
    return value if isinstance(value, tuple) else (value, value)


def at(value: float | tuple[float, float], step: int, steps: int) -> float:
    """Return what a number of `moving` is at step `step` of `steps`."""
    first, last = ends(value)
    return first + (last - first) * min(1.0, step / max(1, steps - 1)) if first != last else first


def positive(parser: argparse.ArgumentParser, args: argparse.Namespace, *names: str) -> None:
    """Refuse (exit code 2) a value that is not above zero, for each attribute in `names`."""
    for name in names:
        if not all(0 < end < float("inf") for end in ends(getattr(args, name))):
            parser.error(
                f"--{name.replace('_', '-')} is {getattr(args, name)}, wanted a number above 0"
            )
