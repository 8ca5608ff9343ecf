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

from collections.abc import Sequence

import numpy as np

from lib import data, evaluate, files, plan
from lib.options.mix import Part

RATE = 10.0
BOUND = 3.0


class Sampler:
    """The plan of a run whose shares follow its evaluations. state: {"before": ce of each part at
    the last evaluation, "factors": [[from this step, factor of each part], ...]}, as JSON; it is
    changed in place."""

    def __init__(
        self,
        parts: Sequence[Part],
        dataset: data.Dataset,
        seed: int,
        tokens_per_step: int,
        steps: int,
        state: dict,
    ) -> None:
        there = {dataset.sources[number] for number in np.unique(dataset.val.rows["source"])}
        lacking = [part.name for part in parts if part.name not in there]
        if len(parts) < 2 or lacking or len(there) > evaluate.MANY_SOURCES:
            seen = (
                f"no val rows of {', '.join(lacking)}"
                if lacking
                else f"{len(parts)} sources with a share, {len(there)} in val"
            )
            files.fail(
                "--eval-sampling cannot weigh the sources",
                seen,
                f"2 to {evaluate.MANY_SOURCES} sources, each with a share and val rows",
                "prepare_data.py with several named sources and --val, or no --eval-sampling",
            )
        longest = sum(int(dataset.train.rows["length"][part.rows].max()) for part in parts)
        if tokens_per_step < longest:  # whatever the shares become, a step holds a row
            files.fail(
                "the steps are too small for --eval-sampling",
                f"--tokens-per-step {tokens_per_step}",
                f"at least {longest}: the longest row of each source",
                f"--tokens-per-step {longest}",
            )
        self.parts, self.lengths, self.seed, self.tokens_per_step = (
            parts,
            dataset.train.rows["length"],
            seed,
            tokens_per_step,
        )
        self.asked, self.state = plan.asked(parts, steps), state
        state.setdefault("before", None)
        state.setdefault("factors", [])

    def shares(self) -> np.ndarray:
        """Return the shares (steps, parts) that the factors make of those asked for."""
        factors = np.ones_like(self.asked)
        for step, values in self.state["factors"]:
            factors[step:] = values
        return self.asked * factors / (self.asked * factors).sum(1, keepdims=True)

    def steps_of_rows(self) -> list[np.ndarray]:
        """Return the rows of every optimizer step, as far as one can know by now."""
        return plan.mixed_run(
            self.parts, self.lengths, self.seed, self.tokens_per_step, self.shares()
        )

    def hear(self, step: int, measures: dict) -> dict[str, float]:
        """Take an evaluation's ce_NAME; what it changes holds from `step` on. Return the factors as
        factor_NAME."""
        ce, before = [measures[f"ce_{part.name}"] for part in self.parts], self.state["before"]
        self.state["before"] = ce
        factors = np.array(
            self.state["factors"][-1][1] if self.state["factors"] else [1.0] * len(ce)
        )
        if before is not None:
            gain = 1 - np.array(ce) / np.array(before)
            factors = (factors * np.exp(-RATE * (gain - gain.mean()))).clip(1 / BOUND, BOUND)
            self.state["factors"].append([step, factors.tolist()])
        return {f"factor_{part.name}": value for part, value in zip(self.parts, factors.tolist())}
