"""The runs under a folder, with their best numbers. Reads JSON only: no model, no torch.

    python -m lib.measure.runs                      # all under runs/, the newest last; `make runs`
    python -m lib.measure.runs runs/demo --sort ce
    python -m lib.measure.runs --json

Reads   of every run: config.json (a finished one) or last/state.json, history.jsonl, and its
        evaluation folder STAGE-eval, if there is one
Writes  nothing

Columns: steps taken; best, the measure that best/ follows; ce, kl, exact: of best/, held out, from
the evaluation folder if it has them, else from the run's own history; tokens/s: the median of the
logged ones.
"""

import argparse
import datetime
import json
import os
import statistics
import sys
from pathlib import Path

from lib import files
from lib.measure import results

DEPTH = 3  # folders below the given one in which runs are looked for
SORTS = ("when", "name", "steps", "ce", "kl", "exact", "tok_per_s")
INSIDE = ("best", "final", "last")  # of a run: checkpoints, no runs
YELLOW, PLAIN = "\033[33m", "\033[0m"


def is_run(folder: Path) -> bool:
    """Return whether a trainer wrote here: any model has a config.json, a run's alone has
    settings."""
    if (folder / "history.jsonl").exists():
        return True
    return (folder / "config.json").exists() and "settings" in files.read_json(
        folder / "config.json"
    )


def evaluations(history: list[dict]) -> list[dict]:
    return [line for line in history if line["event"] == "eval"]


def best_line(history: list[dict], best_by: str) -> dict:
    """Return the evaluation that best/ was written at; {} before the first one, the last one where
    nothing was measured."""
    lines = evaluations(history)
    ranked = [line for line in lines if best_by in line]
    if not ranked:
        return lines[-1] if lines else {}
    return (max if best_by in results.HIGHER else min)(
        ranked, key=lambda line: line[best_by]
    )  # the first of equals, as the trainers keep it


def read(folder: Path) -> dict:
    """Return what a run's folder says: stage, state, step (taken) and steps (planned; None: not
    known before the end), best and best_by, at_best (the evaluation of best/), trained_s,
    tok_per_s, settings, command, versions, git, history, when (seconds since 1970).
    """
    folder = Path(folder)
    config = files.read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    config = config if "settings" in config else {}
    saved = folder / "last" / "state.json"
    state = files.read_json(saved) if not config and saved.exists() else {}
    history = results.lines(folder / "history.jsonl") if (folder / "history.jsonl").exists() else []
    settings = config.get("settings") or state.get("settings") or {}
    best_by = config.get("best_by") or settings.get("best") or "ce"
    if not config and not any(best_by in line for line in evaluations(history)):
        # what a trainer follows where the measure cannot be had; a finished run has said so
        best_by = "ce"
    steps = config.get("steps") or settings.get("steps") or None
    step = config.get("stopped_early", steps) if config else state.get("step", 0)
    if config:
        now = f"stopped early at {step} of {steps}" if "stopped_early" in config else "finished"
    else:
        now = (
            f"{'running, saved' if files.locked(folder) else 'stopped'} at step"
            f" {step}{f' of {steps}' if steps else ''}"
        )
    paces = [line["tok_per_s"] for line in history if "tok_per_s" in line]
    newest = folder / ("config.json" if config else "history.jsonl")
    at_best = best_line(history, best_by)
    return {
        "folder": str(folder),
        "stage": settings.get("stage", folder.name),
        "state": now,
        "finished": bool(config),
        "step": step,
        "steps": steps,
        "stopped_early": config.get("stopped_early"),
        "updates": config.get("updates", state.get("updates")),
        "best_by": best_by,
        "best": config.get("best", state.get("best", at_best.get(best_by))),
        "at_best": at_best,
        "trained_s": config.get("trained_s", state.get("trained_s")),
        "tok_per_s": statistics.median_low(paces) if paces else None,
        "settings": settings,
        "command": config.get("command"),
        "versions": config.get("versions", {}),
        "git": config.get("git"),
        "history": history,
        "when": newest.stat().st_mtime if newest.exists() else 0.0,
    }


def find(folder: Path, depth: int = DEPTH) -> list[Path]:
    """Return the runs under a folder, itself included."""
    found = [folder] if is_run(folder) else []
    if depth:
        inside = sorted(
            path
            for path in folder.iterdir()
            if path.is_dir() and path.name not in INSIDE and not path.name.startswith(".")
        )
        found += [run for path in inside for run in find(path, depth - 1)]
    return found


def summary(folder: Path, under: Path) -> dict:
    """Return one line of the list."""
    run, beside = read(folder), folder.with_name(folder.name + "-eval")
    model = results.read(beside) if results.there(beside) else {}

    def value(name):
        return model.get(name, run["at_best"].get(name))

    name = str(folder.relative_to(under)) if folder != under else folder.name
    return {
        "name": name,
        "stage": run["stage"],
        "state": run["state"],
        "finished": run["finished"],
        "steps": run["step"],
        "best_by": run["best_by"],
        "best": run["best"],
        "ce": value("ce"),
        "kl": value("kl"),
        "exact": model.get("exact"),
        "tok_per_s": run["tok_per_s"],
        "when": datetime.datetime.fromtimestamp(run["when"]).isoformat(" ", "seconds"),
    }


def ordered(runs: list[dict], by: str) -> list[dict]:
    """Return the lines sorted: by time the newest last, by a measure the best first, and those
    without it at the end."""
    having = sorted(
        (run for run in runs if run[by] is not None),
        key=lambda run: run[by],
        reverse=by in (*results.HIGHER, "tok_per_s"),
    )
    return having + [run for run in runs if run[by] is None]


def columns(table: list[list[str]], left: tuple[int, ...] = (0,)) -> list[str]:
    """Return a table's lines in Markdown, aligned so that they read in a terminal too; the first
    row is its head, `left` are columns of words."""
    table = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in table]
    widths = [max(3, *(len(row[i]) for row in table)) for i in range(len(table[0]))]
    drawn = [
        "| "
        + " | ".join(
            cell.ljust(w) if i in left else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths))
        )
        + " |"
        for row in table
    ]
    rule = (
        "| "
        + " | ".join("-" * w if i in left else "-" * (w - 1) + ":" for i, w in enumerate(widths))
        + " |"
    )
    return [drawn[0], rule, *drawn[1:]]


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "folder",
        nargs="?",
        default="runs",
        type=Path,
        metavar="FOLDER",
        help="where to look (default: runs)",
    )
    parser.add_argument(
        "--sort", choices=SORTS, default="when", help="by what (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    args = parser.parse_args(argv)
    if not args.folder.is_dir():
        files.fail(
            f"{args.folder} is no folder", mend="make demo, or the folder where your runs are"
        )
    runs = ordered([summary(folder, args.folder) for folder in find(args.folder)], args.sort)
    if args.json:
        return print(json.dumps(runs, indent=2))
    if not runs:
        return print(f"no runs under {args.folder}")

    def say(run, name):
        return results.say(name, run[name])

    rows = [
        [
            run["name"],
            run["stage"],
            run["state"],
            f"{run['steps']:,}",
            (
                ""
                if run["best"] is None
                else f"{run['best_by']} {results.say(run['best_by'], run['best'])}"
            ),
            say(run, "ce"),
            say(run, "kl"),
            say(run, "exact"),
            results.say("training.tok_per_s", run["tok_per_s"]),
            run["when"][:16],
        ]
        for run in runs
    ]
    head = ["run", "stage", "state", "steps", "best", "ce", "kl", "exact", "tokens/s", "when"]
    table = columns([head, *rows], left=(0, 1, 2, 4))
    coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for line, run in zip(table, [None, None, *runs]):
        print(f"{YELLOW}{line}{PLAIN}" if coloured and run and not run["finished"] else line)
    if unfinished := sum(not run["finished"] for run in runs):
        print(
            f"{unfinished} unfinished: the command that began a run continues it where it was saved"
        )


if __name__ == "__main__":
    main()
