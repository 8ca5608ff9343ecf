"""Does the text that the student writes while it learns (onpolicy.py) go wrong over the run? Its
length, how often it ends, its entropy: means over windows of answers, beside those of the run's
first. What is wrong is said once (generate.drifted)."""

from typing import Any

from lib import generate

# answers of a window: with fewer the mean length of answers, which scatter by their own length, is
# off by more than a tenth by chance; whole steps
IN_A_WINDOW = 256
EMPTY_WINDOW = {"answers": 0, "tokens": 0, "ended": 0, "drawn": 0, "surprise": 0.0}


class Drift:
    """state, as JSON, changed in place: {"first": the first window's means or None, "sums": of the
    one that is being filled, "said": what has been said}. `more`: the run's, which keeps it."""

    def __init__(self, more: dict[str, Any]) -> None:
        empty = {"first": None, "sums": {**EMPTY_WINDOW}, "said": []}
        self.state = more.setdefault("drift", empty)

    def add(self, tokens: list[int], ended: int, logp: list[float]) -> list[str]:
        """Take a step's answers; return what is to be said now. tokens: of each answer; ended: how
        many did; logp: nats, of each token drawn."""
        sums = self.state["sums"]
        new = (len(tokens), sum(tokens), ended, len(logp), -sum(logp))
        for name, value in zip(EMPTY_WINDOW, new):
            sums[name] += value
        if sums["answers"] < IN_A_WINDOW:
            return []
        means = {
            "mean_tokens": sums["tokens"] / sums["answers"],
            "ended": sums["ended"] / sums["answers"],
            "entropy": sums["surprise"] / max(1, sums["drawn"]),
        }
        self.state["sums"] = {**EMPTY_WINDOW}
        if self.state["first"] is None:
            self.state["first"] = means
            return []
        found = generate.drifted(self.state["first"], means)
        fresh = [name for name in found if name not in self.state["said"]]
        self.state["said"] += fresh
        return [found[name] for name in fresh]
