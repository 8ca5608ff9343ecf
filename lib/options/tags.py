"""Names of runs: --tag TEXT puts a run beside the others at OUT-TEXT, --tag auto at
OUT-T2.0-a0.9-20261121-135045 (stage 1: OUT-lr2e-05-DATE).

Contract: a dated name is a new one each time, but for a run that was left unfinished: its command
continues it, for what tells two runs apart is their settings and not their names. A tagged folder
is a run like any other.
"""

import argparse
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lib import files, flags
from lib.run import differing_settings, run_settings

AUTO = "auto"


def add_flags(parser: argparse.ArgumentParser) -> None:
    flags.option(
        parser.add_argument_group("the run's name"),
        "--tag",
        default="",
        metavar="TEXT",
        help=(
            "write to OUT-TEXT; auto: to OUT-METHOD-DATE, continuing the newest such run that is"
            " not finished (default: to OUT)"
        ),
        free=True,
    )


def check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse (exit code 2) what cannot be a folder's name; put a plain tag into --out."""
    if not re.fullmatch(r"[\w.,=+-]*", args.tag):
        parser.error(
            f"--tag is {args.tag!r}, wanted a part of a folder's name: letters, digits and . , ="
            " + - _"
        )
    if args.tag == AUTO and args.eval_only:
        parser.error(
            "--tag auto names a run, and --eval-only makes none: another --out, or a --tag of"
            " your own"
        )
    if args.tag not in ("", AUTO):  # that of auto is known once the run's settings are
        args.out = f"{args.out.rstrip('/')}-{args.tag}"


def choose_out(args, stage: str, identities: dict[str, Any]) -> None:
    """--tag auto: set --out to the folder of the run with these settings."""
    if args.tag == AUTO:
        settings = run_settings(args, stage, identities)

        def same(seen: dict[str, Any]) -> bool:
            return not differing_settings(seen, settings, args)

        args.out = str(folder(Path(args.out), method(args), same, args.fresh))


def method(args) -> str:
    """Return what the name of a run says of its method: T2.0-a0.9, T4-2-a0.9-0.5 where they move;
    of stage 1 lr2e-05."""

    def text(value: flags.Moving | dict[str, flags.Moving]) -> str:
        if isinstance(value, dict):
            return "-".join(f"{name}{text(one)}" for name, one in value.items())
        return f"{value[0]:g}-{value[1]:g}" if isinstance(value, tuple) else str(value)

    if hasattr(args, "temperature"):
        return f"T{text(args.temperature)}-a{text(args.alpha)}"
    return f"lr{args.lr}"


def folder(out: Path, how: str, same: Callable[[dict], bool], fresh: bool = False) -> Path:
    """Return the folder of --tag auto: the newest unfinished one of this name whose settings are
    the `same`, or that was killed before it saved any; else a new one, dated now. fresh: a new
    one."""
    pattern = re.compile(re.escape(f"{out.name}-{how}") + r"-\d{8}-\d{6}")
    there = [path for path in out.parent.glob(f"{out.name}-*") if pattern.fullmatch(path.name)]
    for path in () if fresh else sorted(there, reverse=True):
        if not (path / "config.json").exists() and goes_on(path, same):
            print(f"--tag auto goes on in {path}, which is not finished")
            return path
    return out.with_name(f"{out.name}-{how}-{time.strftime('%Y%m%d-%H%M%S')}")


def goes_on(path: Path, same: Callable[[dict], bool]) -> bool:
    """Return whether an unfinished run is of the `same` settings, or died before it saved any."""
    for name in ("last", ".last.old"):
        if (state := path / name / "state.json").exists():
            return same(files.read_json(state, schema={"settings": object})["settings"])
    return (path / ".lock").exists() and not files.locked(path)
