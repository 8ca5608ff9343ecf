"""Another divergence, weight or temperature for each source: --divergence "given:fkl own:rkl",
--alpha "given:0.9 own:1", --temperature likewise (stage2_kd.py).

A micro-batch holds rows of one method alone (lib/plan.py), and a step's sums are divided once by
its targets: the step's loss is the sum of what each source's rows would have by themselves, each in
proportion to its targets. A source that the student wrote itself has no reference: its
cross-entropy is no loss (alpha is 1 there, whatever is asked for the others) and no figure.
"""

from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from lib import data, files, flags, losses, plan

FLAGS = ("divergence", "alpha", "temperature")


def asked_for(asked: Any, name: str, flag: str) -> Any:
    """Return what a flag asks for of a source: a value for all, or that under the source's name."""
    if not isinstance(asked, dict):
        return asked
    if name not in asked:
        files.fail(
            f"{flag} says nothing of the source {name}",
            ", ".join(asked),
            "a value for each source that has rows in training",
            f"{flag} with {name}:VALUE as well, or one value for all",
        )
    return asked[name]


def referenced(rows: plan.Rows) -> plan.Rows:
    """Return the plan of a run on references alone (stage 1); refuse one that has the student's own
    text in it."""
    if own := [name for name in map(rows.sources.__getitem__, rows.trained()) if name in rows.own]:
        folder = rows.dataset.folder
        files.fail(
            "the student's own text is no reference: cross-entropy on it teaches nothing new",
            f"{', '.join(own)} in {folder}, which the student wrote",
            "sources with answers to learn",
            f"{files.command('stage2_kd.py', '--data', folder)} ..., which asks the teacher at"
            " every token of it; or a --mix without it",
        )
    return rows


class Schedules:
    """The Method of each micro-batch, by its rows' source: `method = schedule(step, batch)`.

    of: by the source's number; own: the numbers of those that the student wrote itself.
    """

    def __init__(self, of: dict[int, losses.Schedule], rows: plan.Rows, own: set[int]) -> None:
        self.of, self.rows, self.own = of, rows, own

    def __call__(self, step: int, batch: data.Batch) -> losses.Method:
        return replace(self.of[batch.source](step), reference=batch.source not in self.own)

    def figures(self, step: int, sums: Tensor, targets: int, beside: dict) -> dict[str, float]:
        """Return what the log says of a step, as losses.Schedule does; the cross-entropy is that of
        targets with a reference, 0 where none has one."""
        loss, ce, kd = sums.tolist()
        referenced = max(1, self.rows.targets(step, self.own))
        own = {"loss": loss / targets, "kd": kd / targets, "ce": ce / referenced}
        return {**own, **beside, **self.moving(step)}

    def moving(self, step: int) -> dict[str, float]:
        """Return by name what moves over the run, as it is at a step: for the log."""
        return {
            f"{name}_{self.rows.sources[number]}": value
            for number, schedule in self.of.items()
            for name, value in schedule.moving(step).items()
        }


def open_schedule(
    args, dataset: data.Dataset, rows: plan.Rows, steps: int
) -> losses.Schedule | Schedules:
    """Return the method of every micro-batch of a run, and let `rows` keep apart what differs.
    Where all sources have one method, it is that of every step, and nothing is kept apart."""
    names = rows.sources
    asked = {name: getattr(args, name) for name in FLAGS}
    for flag, value in asked.items():
        if unknown := sorted({*value} - {*names} if isinstance(value, dict) else ()):
            files.fail(
                f"{flags.spelled(flag)} names a source that is not in {dataset.folder}",
                ", ".join(unknown),
                f"names among {', '.join(names) or '(none there)'}",
                f"{flags.spelled(flag)} with these",
            )
    own = {number for number, name in enumerate(names) if name in rows.own}
    if not own and not any(isinstance(value, dict) for value in asked.values()):
        return losses.Schedule(args.alpha, args.temperature, args.divergence, args.beta, steps)
    of = {}
    for number in rows.trained():
        kind, alpha, temperature = (
            asked_for(value, names[number], flags.spelled(flag)) for flag, value in asked.items()
        )
        beta = losses.BETA.get(kind, 0.5) if args.beta is None else args.beta
        alpha = 1.0 if number in own else alpha
        of[number] = losses.Schedule(alpha, temperature, kind, beta, steps)
    different = list(dict.fromkeys((schedule, number in own) for number, schedule in of.items()))
    group = np.full(max(of) + 1, -1)
    for number, schedule in of.items():
        group[number] = different.index((schedule, number in own))
    rows.keep_apart(group)
    return Schedules(of, rows, own)
