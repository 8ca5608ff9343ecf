"""Flags that several scripts share: one name, one default, one text each, so that they cannot drift
apart. An option (lib/options) brings its own: `add_flags(parser)`, `check_flags(parser, args)`.
"""

import argparse
import json
import shlex
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lib import template

Moving = float | tuple[float, float]  # a number, or one that moves from the first step to the last


def template_args(text: str) -> dict[str, Any]:
    """Read --template-args."""
    try:
        read = json.loads(text)
    except (ValueError, RecursionError):
        read = None
    if fault := template.bad_arguments(read):
        raise argparse.ArgumentTypeError(
            f'saw {text[:60]!r} ({fault}), wanted JSON like {{"enable_thinking": false}}'
        )
    return read


SHARED: dict[str, dict[str, Any]] = {
    "--data": dict(required=True, metavar="DIR", help="the folder prepare_data.py wrote"),
    "--out": dict(
        required=True,
        metavar="DIR",
        help="where to write; running the same command again continues there",
        free=True,
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
    "--weight-decay": dict(
        type=float, default=0.05, help="AdamW's decay, on matrices only (default: %(default)s)"
    ),
    "--beta2": dict(type=float, default=0.95, help="AdamW's second beta (default: %(default)s)"),
    "--clip": dict(
        type=float, default=1.0, help="largest norm of the gradient; 0 = off (default: %(default)s)"
    ),
    "--checkpointing": dict(
        nargs="?",
        const="on",
        choices=["on", "offload"],
        help=(
            "gradient checkpointing: less memory, a third more time (on by itself when memory is"
            " short); offload: the states between layers wait in the CPU's memory (default: off;"
            " without a word: on)"
        ),
        free=True,
    ),
    "--no-pack": dict(
        action="store_true",
        help=(
            "one row a line instead of several (by itself for models whose packed rows would see"
            " each other)"
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
        free=True,
    ),
    "--keep": dict(
        type=int,
        default=0,
        metavar="N",
        help=(
            "keep the newest N resume states in keep/step-STEP/, to go back to (docs/files.md;"
            " default: %(default)s)"
        ),
        free=True,
    ),
    "--log-every": dict(
        type=int,
        default=10,
        metavar="N",
        help="steps between log lines (default: %(default)s)",
        free=True,
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
        help=(
            "tokens of one forward pass, as memory allows; results differ by rounding (bf16's or"
            " fp16's with --amp), and in a model with dropout, by what is drawn (default:"
            " %(default)s)"
        ),
        free=True,
    ),
    "--chat-template": dict(
        metavar="FILE|NAME",
        help=(
            "chat template: a file, chatml, llama3 or gemma (of the turn tokens that the vocabulary"
            " has), one of several by name, or a model that has one (default: the tokenizer's own)"
        ),
    ),
    "--template-args": dict(
        type=template_args,
        metavar="JSON",
        help=(
            'arguments of the chat template, {"enable_thinking": false} (default: what the'
            " template does without)"
        ),
    ),
    "--seed": dict(type=int, default=0, help="seed of every random choice (default: %(default)s)"),
    "--concurrency": dict(
        type=int,
        default=64,
        metavar="N",
        help="requests in flight to a server (default: %(default)s)",
    ),
    "--timeout": dict(
        type=float,
        default=600.0,
        metavar="S",
        help="seconds a server may take for an answer (default: %(default)s)",
    ),
    "--retry-for": dict(
        type=float,
        default=600.0,
        metavar="S",
        help=(
            "seconds for which a server that is down or busy is tried again (default: %(default)s)"
        ),
    ),
    "--device": dict(
        default="auto", help="auto, cpu, cuda, cuda:1, mps (default: %(default)s)", free=True
    ),
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
        choices=["auto", "sdpa", "eager", "flash_attention_2", "flex_attention"],
        default="auto",
        help=(
            "attention kernel; auto: sdpa, or eager where a model has none (default: %(default)s)"
        ),
        free=True,
    ),
    "--compile": dict(action="store_true", help="torch.compile the model's body"),
    "--dry-run": dict(
        action="store_true",
        help=(
            "print what a run would read, take and need (memory, disk), and stop; nothing is"
            " written"
        ),
        free=True,
    ),
    "--fresh": dict(
        action="store_true",
        help="throw away what --out holds and start anew (default: continue it)",
        free=True,
    ),
    "--verify": dict(
        action="store_true",
        help=(
            "check every byte of what is read by its checksum first (default: of files above 64 MB"
            " some blocks)"
        ),
        free=True,
    ),
    "--trust-remote-code": dict(
        action="store_true", help="let a model folder run its own Python code (default: refuse)"
    ),
    "--threads": dict(
        type=int,
        default=0,
        metavar="N",
        help="CPU threads; 0 = torch's own choice (default: %(default)s)",
        free=True,
    ),
}

TRAINER = {  # the trainers' flags under the headings they appear with, in this order
    "the optimizer step": """--lr --epochs --steps --tokens-per-step --tokens-per-microbatch
        --warmup --weight-decay --beta2 --clip""",
    "the run": """--eval-every --patience --save-every --keep --log-every --save-dtype --seed
        --fresh --verify --dry-run""",
    "the machine": """--device --threads --amp --attn --compile --checkpointing --no-pack
        --trust-remote-code""",
}


class Arguments(argparse.Namespace):
    """What was parsed. free: names of flags that may differ when a run is continued, since they
    change results by rounding at most (--tokens-per-microbatch: also which numbers dropout draws);
    defaults: of every flag."""

    __slots__ = ("free", "defaults")
    free: frozenset[str]
    defaults: dict[str, Any]


def option(group, name: str, *, free: bool = False, **settings: Any) -> None:
    """Add one flag. free: it may differ when a run is continued."""
    group.add_argument(name, **settings).free = free


def add(group, *names: str) -> None:
    """Add the shared flags `names` to a parser or a group of one, in that order."""
    for name in names:
        option(group, name, **SHARED[name])


def new_parser(doc: str | None) -> argparse.ArgumentParser:
    """Return a script's parser, whose --help begins with the script's docstring."""
    return argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )


def parse_flags(parser: argparse.ArgumentParser, argv: list[str] | None) -> Arguments:
    """Return the arguments, with what a run's folder asks of their flags."""
    args = parser.parse_args(argv, Arguments())
    args.free = frozenset(a.dest for a in parser._actions if getattr(a, "free", False))
    args.defaults = {a.dest: a.default for a in parser._actions}
    return args


def add_trainer(parser: argparse.ArgumentParser) -> None:
    """Add what both trainers share beside their own method, each group under its heading."""
    for title, names in TRAINER.items():
        add(parser.add_argument_group(title), *names.split())


def check_trainer(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse (exit code 2) trainer values that cannot work."""
    positive(parser, args, "lr", "epochs", "tokens_per_step", "tokens_per_microbatch", "log_every")
    if not 0 <= args.warmup <= 1:
        parser.error(f"--warmup is {args.warmup}, wanted a share from 0 to 1")
    not_negative(
        parser,
        args,
        "steps",
        "clip",
        "weight_decay",
        "eval_every",
        "save_every",
        "keep",
        "seed",
        "patience",
    )
    if not 0 <= args.beta2 < 1:
        parser.error(f"--beta2 is {args.beta2}, wanted a share below 1")


def best_measure(*names: str) -> Callable[[str], str]:
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


def choice_of(names: tuple[str, ...]) -> Callable[[str], str]:
    """Return a reader of one of `names`."""

    def read(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(
                f"invalid choice: {text!r} (choose from {', '.join(names)})"
            )
        return text

    return read


def moving(text: str) -> Moving:
    """Read a number, or FIRST->LAST: one that moves in a straight line from the first step to the
    last."""
    first, arrow, last = text.partition("->")
    return (float(first), float(last)) if arrow else float(first)


def by_source(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return a reader of what `read` reads, or of "NAME:VALUE NAME:VALUE", a value for each source:
    {name: value}."""

    def reader(text: str) -> Any:
        if ":" not in text:
            return read(text)
        found: dict[str, Any] = {}
        for item in text.split():
            name, _, value = item.rpartition(":")
            if not name or name in found:
                raise argparse.ArgumentTypeError(f"{item!r} is not one NAME:VALUE for each source")
            found[name] = read(value)
        return found

    return reader


def ends(value: Moving | dict[str, Moving]) -> tuple[float, ...]:
    """Return what a number of `moving` is at the first step and at the last; of several sources,
    that of each."""
    if isinstance(value, dict):
        return tuple(end for one in value.values() for end in ends(one))
    return value if isinstance(value, tuple) else (value, value)


def span(value: Moving | dict[str, Moving]) -> Moving:
    """Return what a number of several sources lies between; of one for all, that number."""
    if not isinstance(value, dict):
        return value
    least, most = min(ends(value)), max(ends(value))
    return least if least == most else (least, most)


class Folders(argparse.Action):
    """A flag of DIR or NAME=DIR NAME=DIR: given again, names are added to names; else the last
    counts, as of any flag."""

    def __call__(self, parser, namespace, values, option_string=None):
        before = getattr(namespace, self.dest) or []
        named = before and all("=" in word for word in [*before, *values])
        setattr(namespace, self.dest, [*before, *values] if named else values)


def join_folders(parser: argparse.ArgumentParser, args: argparse.Namespace, name: str) -> list[str]:
    """Put the words of a flag, DIR or NAME=DIR NAME=DIR, into one (None where it was not given);
    return them. Refuse (exit code 2) several that have no name, or the same."""
    words = getattr(args, name) or []
    if len(words) == 1:
        words = parts_of_flag(words[0])  # make's LOGITS="a=DIR b=DIR"
    if len(words) > 1 and (wrong := [word for word in words if not all(name_and_folder(word))]):
        parser.error(f"{spelled(name)} has several folders, and {wrong[0]!r} is not NAME=DIR")
    names = [name_and_folder(word)[0] for word in words]
    if len(words) > 1 and len({*names}) < len(names):
        parser.error(f"{spelled(name)} names one twice: {', '.join(names)}, wanted each once")
    one = words[0] if len(words) == 1 else shlex.join(words)
    setattr(args, name, one if words else None)
    return words


def parts_of_flag(text: str) -> list[str]:
    """Return the words of such a flag as one text: of a folder alone, it."""
    if Path(text).exists() or "=" not in text:
        return [text]
    try:
        return shlex.split(text)
    except ValueError:  # a quote without its other half
        return [text]


def name_and_folder(word: str) -> tuple[str, str]:
    """Return the two parts of NAME=DIR; of a folder alone, no name."""
    name, is_named, folder = word.partition("=")
    return (name, folder) if is_named and not Path(word).exists() else ("", word)


def folders_of(text: str | None) -> dict[str, str]:
    """Return the folders of such a flag by name; of a single one without a name, none."""
    found = [name_and_folder(word) for word in parts_of_flag(text or "")]
    return {name: folder for name, folder in found if name}


def spelled(name: str) -> str:
    """Return a flag as it is typed: spelled("log_every") == "--log-every"."""
    return f"--{name.replace('_', '-')}"


def check_server(
    parser: argparse.ArgumentParser, args: argparse.Namespace, keys: tuple[str, ...]
) -> None:
    """Refuse (exit code 2) a --teacher-url that is none, or that says a key; `keys`: the variables
    that hold one."""
    positive(parser, args, "concurrency", "timeout", "retry_for")
    try:
        url = urllib.parse.urlsplit(args.teacher_url)
        usable = url.scheme in ("http", "https") and url.hostname and url.port != 0
    except ValueError:
        usable = False
    if not usable:
        parser.error("--teacher-url is no URL, wanted http://HOST:PORT/v1")
    if url.username or url.password or url.query or url.fragment:
        parser.error(
            "--teacher-url holds a name, a key or a query, wanted http://HOST:PORT/v1 (a key comes"
            f" from {' or '.join(keys)})"
        )


def positive(parser: argparse.ArgumentParser, args: argparse.Namespace, *names: str) -> None:
    """Refuse (exit code 2) a value that is not above zero, for each attribute in `names`."""
    for name in names:
        value = getattr(args, name)
        if not all(0 < end < float("inf") for end in ends(value)):
            parser.error(f"{spelled(name)} is {value}, wanted a number above 0")


def not_negative(parser: argparse.ArgumentParser, args: argparse.Namespace, *names: str) -> None:
    """Refuse (exit code 2) a value below zero, for each attribute in `names`."""
    for name in names:
        if getattr(args, name) < 0:
            parser.error(f"{spelled(name)} is {getattr(args, name)}, wanted 0 or more")
