"""A run's log lines in TensorBoard or Weights & Biases (--track): the same numbers as in
history.jsonl, under the names of `named`.

    OUT/tensorboard/   written anew from history.jsonl whenever the run is continued: a kill loses
                       nothing and shows nothing twice
    OUT/wandb/         what wandb keeps on this machine; the run's id is in the resume state, so
                       that a continued run is one run there. Project: the name of the folder OUT
                       lies in. WANDB_MODE=offline needs no account and no network

Contract: `start` gives two functions, one to call with every log line, one at the end. Neither
package is imported unless it is asked for.
"""

import json
import re
import secrets
import shutil
from collections.abc import Callable

from lib import files

PACKAGES = ("tensorboard", "wandb")


def start(run) -> tuple[Callable[[str, int, dict], None], Callable[[], None]]:
    """Return `line(event, step, values)` and `end()` for a run whose history holds what was logged
    so far."""
    return (
        {"tensorboard": tensorboard, "wandb": wandb}[run.args.track](run)
        if run.args.track
        else (lambda *_: None, lambda: None)
    )


def check(package: str) -> None:
    """Refuse a package that is not installed, before anything is loaded."""
    if package:
        files.need(package, f"--track {package}")


def named(event: str, values: dict) -> dict:
    """Return a log line's numbers by their names there: named("eval", {"ce": 2, "ce_news": 3}) ==
    {"eval/ce": 2, "eval/ce_by_source/news": 3}."""
    return {
        f"{event}/" + re.sub("^(ce|kl)_", r"\1_by_source/", name): value
        for name, value in values.items()
        if isinstance(value, int | float)
    }


def lines(run) -> list[dict]:
    """Return what history.jsonl holds, in order."""
    return (
        [json.loads(line) for line in run.history.read_text(encoding="utf-8").splitlines()]
        if run.history.exists()
        else []
    )


def again(run, line: Callable[[str, int, dict], None]) -> None:
    """Give `line` what was logged so far."""
    for values in lines(run):
        line(
            values.pop("event"),
            values.pop("step"),
            {name: value for name, value in values.items() if name != "time_s"},
        )


def tensorboard(run):
    from torch.utils.tensorboard import SummaryWriter

    shutil.rmtree(run.out / "tensorboard", ignore_errors=True)
    writer = SummaryWriter(run.out / "tensorboard", flush_secs=10)
    writer.add_text(
        "settings", "\n".join(f"    {name}: {value}" for name, value in run.settings.items())
    )  # indented: as it is, in Markdown

    def line(event, step, values):
        for name, value in named(event, values).items():
            writer.add_scalar(name, value, step)

    again(run, line)
    return line, writer.close


def wandb(run):
    import wandb

    known = "wandb" in run.more
    try:
        there = wandb.init(
            project=run.out.resolve().parent.name,
            name=run.out.name,
            dir=run.out,
            config=run.settings,
            resume="allow",
            id=run.more.setdefault("wandb", secrets.token_hex(4)),
        )
    except wandb.errors.Error as refused:
        files.fail(
            "wandb does not start",
            str(refused)[:200],
            "a login",
            "wandb login, or WANDB_MODE=offline in the environment",
        )

    def line(event, step, values):
        return there.log(named(event, values), step=step)

    if not known:
        again(run, line)
    return line, there.finish
