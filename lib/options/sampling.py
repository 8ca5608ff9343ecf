"""Evaluation-driven sampling: sources whose val loss falls least are drawn more often from then on
(--eval-sampling).

The rule. At every evaluation after the first, with gain_i = 1 - ce_i(now) / ce_i(the evaluation
before) of every source in the mix,

    factor_i <- factor_i * exp(-RATE * (gain_i - mean gain)), kept between 1/BOUND and BOUND;
    share_i = asked_i * factor_i / sum_j asked_j * factor_j

where asked_i is what --mix asks for at that step (without --mix: the source's part of all tokens).
Worked example: two sources at 0.5 each; one falls by 6 %, the other by 2 %: the factors become
exp(-0.2) and exp(0.2), the shares 0.40 and 0.60.

What was drawn before an evaluation does not change by it (lib/plan.py), and the factors go into the
resume state: a run that is continued draws the same rows. The idea of weighing domains by how they
learn: DoReMi (arXiv:2305.10429) and Sheared LLaMA (arXiv:2310.06694, section 2.2, dynamic batch
loading); the rule here is simpler than theirs: it has no reference loss.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np

from lib import data, evaluate, files, flags, plan
from lib.options import mix

RATE = 10.0
BOUND = 3.0


def add_flags(parser: argparse.ArgumentParser) -> None:
    flags.option(
        parser.add_argument_group("shares that follow the evaluations"),
        "--eval-sampling",
        action="store_true",
        help=(
            "at every evaluation, give more weight to the sources whose val loss fell least since"
            " the one before (lib/options/sampling.py says the rule)"
        ),
    )


def check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Nothing can be wrong with it before the data is open."""


class SampledRows(mix.MixedRows):
    """The plan of a run whose shares follow its evaluations. state: {"before": ce of each part at
    the last evaluation, "factors": [[from this step, factor of each part], ...]}, as JSON; it is
    changed in place."""

    def __init__(self, args, dataset: data.Dataset, parts: Sequence[mix.Part]) -> None:
        check_parts(args, dataset, parts)
        self.state: dict[str, Any] = {"before": None, "factors": []}
        super().__init__(args, dataset, parts)

    def wanted_shares(self) -> np.ndarray:
        """Return the shares (steps, parts) that the factors make of those asked for."""
        asked = super().wanted_shares()
        factors = np.ones_like(asked)
        for step, values in self.state["factors"]:
            factors[step:] = values
        return asked * factors / (asked * factors).sum(1, keepdims=True)

    def resume(self, more: dict[str, Any]) -> None:
        self.state = more.setdefault("sampling", self.state)
        super().resume(more)

    def hear(self, step: int, measures: dict[str, Any]) -> dict[str, float]:
        """Take an evaluation's ce_NAME; what it changes holds from `step` on. Return the factors as
        factor_NAME."""
        ce, before = [measures[f"ce_{part.name}"] for part in self.parts], self.state["before"]
        history = self.state["factors"]
        factors = np.array(history[-1][1] if history else [1.0] * len(ce))
        if before is not None:
            gain = 1 - np.array(ce) / np.array(before)
            factors = (factors * np.exp(-RATE * (gain - gain.mean()))).clip(1 / BOUND, BOUND)
            history.append([step, factors.tolist()])
        self.state["before"] = ce
        self.steps_of_rows = self.choose()  # as far as one can know by now
        return {f"factor_{part.name}": value for part, value in zip(self.parts, factors.tolist())}


def check_parts(args, dataset: data.Dataset, parts: Sequence[mix.Part]) -> None:
    """Refuse sources that cannot be weighed: one alone, without val rows, or in too small steps."""
    there = {dataset.sources[number] for number in np.unique(dataset.val.rows["source"])}
    lacking = [part.name for part in parts if part.name not in there]
    if len(parts) < 2 or lacking or len(there) > evaluate.MANY_SOURCES:
        seen = f"{len(parts)} sources with a share, {len(there)} in val"
        files.fail(
            "--eval-sampling cannot weigh the sources",
            f"no val rows of {', '.join(lacking)}" if lacking else seen,
            f"2 to {evaluate.MANY_SOURCES} sources, each with a share and val rows",
            "prepare_data.py with several named sources and --val, or no --eval-sampling",
        )
    longest = sum(int(dataset.train.rows["length"][part.rows].max()) for part in parts)
    if args.tokens_per_step < longest:  # whatever the shares become, a step holds a row
        files.fail(
            "the steps are too small for --eval-sampling",
            f"--tokens-per-step {args.tokens_per_step}",
            f"at least {longest}: the longest row of each source",
            f"--tokens-per-step {longest}",
        )


def open_rows(args, dataset: data.Dataset, there: np.ndarray | None = None) -> plan.Rows:
    """Return the plan of a run over the rows that are `there` (default: all): one that follows the
    evaluations, if that is wanted, else as lib/options/mix.py says."""
    if not args.eval_sampling:
        return mix.open_rows(args, dataset, there)
    there = np.arange(len(dataset.train.rows)) if there is None else there
    text = mix.wanted(args, dataset)
    logits = getattr(args, "logits", None)
    parts = mix.divide(text, dataset, there, logits) if text else mix.natural(dataset, there)
    return SampledRows(args, dataset, parts)
