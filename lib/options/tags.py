"""Names of runs: --tag TEXT puts a run beside the others at OUT-TEXT, --tag auto at
OUT-T2.0-a0.9-20261121-135045 (stage 1: OUT-lr2e-05-DATE).

Contract: a dated name is a new one each time, but for a run that was left unfinished: its command
continues it, for what tells two runs apart is their settings and not their names. A tagged folder
is a run like any other.
"""

import re
import time
from collections.abc import Callable
from pathlib import Path

from lib import files

AUTO = "auto"


def method(args) -> str:
    """Return what the name of a run says of its method: T2.0-a0.9, T4-2-a0.9-0.5 where they move;
    of stage 1 lr2e-05."""

    def text(value):
        return f"{value[0]:g}-{value[1]:g}" if isinstance(value, tuple) else str(value)

    return (
        f"T{text(args.temperature)}-a{text(args.alpha)}"
        if hasattr(args, "temperature")
        else f"lr{args.lr}"
    )


def folder(out: Path, how: str, same: Callable[[dict], bool], fresh: bool = False) -> Path:
    """Return the folder of --tag auto: the newest unfinished one of this name whose settings are
    the `same`, or that was killed before it saved any; else a new one, dated now. fresh: a new
    one."""
    pattern = re.compile(re.escape(f"{out.name}-{how}") + r"-\d{8}-\d{6}")
    there = (
        sorted(
            (path for path in out.parent.glob(f"{out.name}-*") if pattern.fullmatch(path.name)),
            reverse=True,
        )
        if not fresh
        else ()
    )
    for path in there:
        state = next(
            (
                state
                for name in ("last", ".last.old")
                if (state := path / name / "state.json").exists()
            ),
            None,
        )
        unsaved = state is None and (path / ".lock").exists() and not files.locked(path)
        if not (path / "config.json").exists() and (
            unsaved or state and same(files.read_json(state)["settings"])
        ):
            print(f"--tag auto goes on in {path}, which is not finished")
            return path
    return out.with_name(f"{out.name}-{how}-{time.strftime('%Y%m%d-%H%M%S')}")
