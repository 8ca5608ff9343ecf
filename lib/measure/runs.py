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

import datetime
import json
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from lib import files, flags
from lib.measure import results

DEPTH = 3  # folders below the given one in which runs are looked for
SORTS = ("when", "name", "steps", "ce", "kl", "exact", "tok_per_s")
INSIDE = ("best", "final", "last")  # of a run: checkpoints, no runs
HEAD = ["run", "stage", "state", "steps", "best", "ce", "kl", "exact", "tokens/s", "when"]
RUN_SETTINGS = dict.fromkeys(("data?", "logits?", "teacher?"), (str, None)) | {
    "stage?": str,
    "best?": str,
    "steps?": range(1 << 62),
}
CONFIG = {  # of a run's config.json, or of last/state.json
    "settings": RUN_SETTINGS,
    "best_by?": str,
    "best?": (None, files.is_number),
    "steps?": range(1 << 62),
    "step?": range(1 << 62),
    "stopped_early?": range(1 << 62),
    "updates?": range(1 << 62),
    "trained_s?": float,
    "versions?": dict,
    "command?": (None, [str]),
    "git?": (str, None),
}
LINE = {"event": str, "step": range(1 << 62), "tok_per_s?": float} | {
    f"{name}?": (None, files.is_number) for name in results.ROWS
}
YELLOW, PLAIN = "\033[33m", "\033[0m"


def is_run(folder: Path) -> bool:
    """Return whether a trainer wrote here: any model has a config.json, a run's alone has
    settings."""
    config = folder / "config.json"
    written = (folder / "history.jsonl").exists()
    return written or config.is_file() and "settings" in files.read_json(config)


def evaluations(history: list[dict]) -> list[dict]:
    return [line for line in history if line["event"] == "eval"]


def best_line(history: list[dict], best_by: str) -> dict:
    """Return the evaluation that best/ was written at; {} before the first one, the last one where
    nothing was measured."""
    lines = evaluations(history)
    ranked = [line for line in lines if best_by in line]
    if not ranked:
        return lines[-1] if lines else {}
    best = max if best_by in results.HIGHER else min
    return best(ranked, key=lambda line: line[best_by])  # the first of equals, as trainers keep it


def read_run(folder: Path) -> dict:
    """Return what a run's folder says: stage, state, step (taken) and steps (planned; None: not
    known before the end), best and best_by, at_best (the evaluation of best/), trained_s,
    tok_per_s, settings, command, versions, git, history, when (seconds since 1970).
    """

    def read_there(name, reader, missing):
        return reader(folder / name) if (folder / name).exists() else missing

    folder = Path(folder)
    config = read_there("config.json", files.read_json, {})
    config = config if "settings" in config else {}
    known = config or read_there("last/state.json", files.read_json, {})
    if known:
        where = folder / ("config.json" if config else "last/state.json")
        files.expect(where, known, CONFIG)
        sums, log = known.get("checksums", {}), folder / "history.jsonl"
        logged = sums.get("history.jsonl" if config else "../history.jsonl")
        if logged and log.exists() and (seen := files.damage(log, logged, True)):
            files.fail(f"{log} is damaged", seen, mend="the file as it was, or delete it")
    history = read_there("history.jsonl", lambda path: files.read_jsonl(path, torn=True), [])
    files.expect(folder / "history.jsonl", history, [LINE])
    settings = known.get("settings", {})
    best_by = config.get("best_by") or settings.get("best") or "ce"
    if not config and not any(best_by in line for line in evaluations(history)):
        # what a trainer follows where the measure cannot be had; a finished run has said so
        best_by = "ce"
    steps = config.get("steps") or settings.get("steps") or None
    step = config.get("stopped_early", steps) if config else known.get("step", 0)
    if config:
        now = f"stopped early at {step} of {steps}" if "stopped_early" in config else "finished"
    else:
        now = "running, saved" if files.locked(folder) else "stopped"
        now += f" at step {step}" + (f" of {steps}" if steps else "")
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
        "updates": known.get("updates", 0),
        "best_by": best_by,
        "best": known.get("best", at_best.get(best_by)),
        "at_best": at_best,
        "trained_s": known.get("trained_s"),
        "tok_per_s": statistics.median_low(paces) if paces else None,
        "settings": settings,
        "command": config.get("command"),
        "versions": config.get("versions", {}),
        "git": config.get("git"),
        "history": history,
        "when": newest.stat().st_mtime if newest.exists() else 0.0,
    }


def parent(name: str, read: dict[str, dict], names: Sequence[str]) -> str | None:
    """Return the run of `names` that the run `name` began from, by the last two parts of its
    folder (runs/mine/stage2 is not runs/other/stage2, wherever both have been copied)."""
    path = Path(str(read[name]["settings"].get("student", "")))
    path = path.parent if path.name in INSIDE else path
    others = [one for one in names if one != name and one in read and len(path.parts) > 1]
    return next(
        (one for one in others if Path(read[one]["folder"]).parts[-2:] == path.parts[-2:]), None
    )


def cost_of(settings: dict) -> dict[str, float]:
    """Return what a run's data and records took, of what is still there: written_tokens and
    written_s of answers that the student wrote, dumped_s and record_bytes of the teacher's
    records."""
    found: dict[str, float] = {}
    meta = Path(settings.get("data") or "", "meta.json")
    if settings.get("data") and meta.exists():
        if told := files.read_json(meta).get("student"):
            found["written_tokens"] = told["answers"] * told["mean_tokens"]
            cost = meta.parent / str(told.get("folder")) / "cost.json"
            found |= {"written_s": files.read_json(cost)["written_s"]} if cost.exists() else {}
    logits = str(settings.get("logits") or "")
    # "" where there are none; of several teachers NAME=DIR NAME=DIR
    several = flags.folders_of(logits).values()
    records = [Path(folder) for folder in several] or [Path(logits)] * bool(logits)
    if records and all(folder.is_dir() for folder in records):
        paths = [path for folder in records for path in folder.rglob("*") if path.is_file()]
        if costs := [files.read_json(path) for path in paths if path.name == "cost.json"]:
            found["dumped_s"] = sum(cost["dumped_s"] for cost in costs)
        found["record_bytes"] = sum(path.stat().st_size for path in paths)
    return found


def runs_under(folder: Path, depth: int = DEPTH) -> list[Path]:
    """Return the runs under a folder, itself included."""
    found = [folder] if is_run(folder) else []
    for path in sorted(folder.iterdir()) if depth else ():
        if path.is_dir() and path.name not in INSIDE and not path.name.startswith("."):
            found += runs_under(path, depth - 1)
    return found


def summary(folder: Path, under: Path) -> dict:
    """Return one line of the list."""
    run, beside = read_run(folder), folder.with_name(folder.name + "-eval")
    model = results.read_evaluation(beside) if results.there(beside) else {}
    return {
        "name": str(folder.relative_to(under)) if folder != under else folder.name,
        "stage": run["stage"],
        "state": run["state"],
        "finished": run["finished"],
        "steps": run["step"],
        "best_by": run["best_by"],
        "best": run["best"],
        "ce": model.get("ce", run["at_best"].get("ce")),
        "kl": model.get("kl", run["at_best"].get("kl")),
        "exact": model.get("exact"),
        "tok_per_s": run["tok_per_s"],
        "when": datetime.datetime.fromtimestamp(run["when"]).isoformat(" ", "seconds"),
    }


def ordered(runs: list[dict], by: str) -> list[dict]:
    """Return the lines sorted: by time the newest last, by a measure the best first, and those
    without it at the end."""
    falling = by in (*results.HIGHER, "tok_per_s")
    having = [run for run in runs if run[by] is not None]
    having.sort(key=lambda run: run[by], reverse=falling)
    return having + [run for run in runs if run[by] is None]


def printed_row(run: dict) -> list[str]:
    """Return a run's row of the printed list, below HEAD."""
    best = "" if run["best"] is None else results.shown(run["best_by"], run["best"])
    return [
        *(run[name] for name in ("name", "stage", "state")),
        f"{run['steps']:,}",
        best and f"{run['best_by']} {best}",
        *(results.shown(name, run[name]) for name in ("ce", "kl", "exact")),
        results.shown("training.tok_per_s", run["tok_per_s"]),
        run["when"][:16],
    ]


@files.script
def main(argv=None):
    parser = flags.new_parser(__doc__)
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
    args.folder = results.with_name(args.folder)
    under = [summary(folder, args.folder) for folder in runs_under(args.folder)]
    runs = ordered(under, args.sort)
    if args.json:
        return print(json.dumps(runs, indent=2))
    if not runs:
        return print(f"no runs under {args.folder}")
    table = results.table([HEAD, *map(printed_row, runs)], left=(0, 1, 2, 4))
    coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for line, run in zip(table, [None, None, *runs]):
        print(f"{YELLOW}{line}{PLAIN}" if coloured and run and not run["finished"] else line)
    if unfinished := sum(not run["finished"] for run in runs):
        print(
            f"{unfinished} unfinished: the command that began a run continues it where it was saved"
        )


if __name__ == "__main__":
    main()
