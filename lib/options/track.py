"""A run's log lines in TensorBoard or Weights & Biases (--track): the same numbers as in
history.jsonl, under the names of `named`.

    OUT/tensorboard/   written anew from history.jsonl whenever the run is continued: a kill loses
                       nothing and shows nothing twice
    OUT/wandb/         what wandb keeps on this machine; the run's id is in the resume state, so
                       that a continued run is one run there. Project: the name of the folder OUT
                       lies in. WANDB_MODE=offline needs no account and no network

Contract: `start` adds a listener (lib/run.py) to a run. Neither package is imported unless it is
asked for.
"""

import argparse
import re
import secrets
import shutil
from typing import Any

from lib import files, flags
from lib.run import Run

PACKAGES = ("tensorboard", "wandb")


def add_flags(parser: argparse.ArgumentParser) -> None:
    flags.option(
        parser.add_argument_group("the log elsewhere"),
        "--track",
        choices=PACKAGES,
        default="",
        help="show the log in TensorBoard (OUT/tensorboard) or in Weights & Biases (default: off)",
        free=True,
    )


def check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse a package that is not installed, before anything is loaded."""
    if args.track and not args.eval_only:
        files.need(args.track, f"--track {args.track}")


def start(run: Run, package: str) -> None:
    """Let TensorBoard or Weights & Biases hear of every log line of a run from now on, and of those
    that its history holds."""
    if package:
        run.listeners.append({"tensorboard": TensorBoard, "wandb": WandB}[package](run))


def named(event: str, values: dict[str, Any]) -> dict[str, float]:
    """Return a log line's numbers by their names there: named("eval", {"ce": 2, "ce_news": 3}) ==
    {"eval/ce": 2, "eval/ce_by_source/news": 3}."""
    return {
        f"{event}/" + re.sub("^(ce|kl)_", r"\1_by_source/", name): value
        for name, value in values.items()
        if isinstance(value, int | float)
    }


def replay(run: Run, listener) -> None:
    """Tell a listener what was logged so far."""
    for values in files.read_jsonl(run.history) if run.history.exists() else ():
        del values["time_s"]
        listener.line(values.pop("event"), values.pop("step"), values)


class TensorBoard:
    def __init__(self, run: Run) -> None:
        from torch.utils.tensorboard import SummaryWriter

        shutil.rmtree(run.out / "tensorboard", ignore_errors=True)
        self.writer = SummaryWriter(run.out / "tensorboard", flush_secs=10)
        # indented: as it is, in Markdown
        settings = [f"    {name}: {value}" for name, value in run.settings.items()]
        self.writer.add_text("settings", "\n".join(settings))
        replay(run, self)

    def line(self, event: str, step: int, values: dict[str, Any]) -> None:
        for name, value in named(event, values).items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class WandB:
    def __init__(self, run: Run) -> None:
        import wandb

        known = "wandb" in run.more
        try:
            self.run = wandb.init(
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
        if not known:
            replay(run, self)

    def line(self, event: str, step: int, values: dict[str, Any]) -> None:
        self.run.log(named(event, values), step=step)

    def close(self) -> None:
        self.run.finish()
