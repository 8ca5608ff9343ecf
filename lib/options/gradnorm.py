"""Balance of losses by their gradients, so that no term drowns the others.

Every n steps each term's gradient on the last layer that all terms share is measured (the norm of
the whole step's gradient: vectors are summed over micro-batches first), and the weights move half
of the way, in logs, to where all terms pull equally hard:

    w_i <- w_i^(1-b) * (n_logits / n_i)^b        n_i the norm before weighting, b = 0.5; the logits'
                                                 weight stays 1

In the spirit of GradNorm (arXiv:1711.02257, section 3: gradient norms on the last shared layer,
drawn to one another), without its training rates (its alpha = 0) and without an optimizer of its
own for the weights: their rest point is known.
"""

import math

import torch
from torch import Tensor, nn

SPEED = 0.5  # b: of the way in logs; a factor of 1,000 is down to 1 % off after ten measurements
LEAST, MOST = 1e-6, 1e6  # a term that has vanished must not get an endless weight


class Balance:
    """Weights of the terms beside the logits, moved toward equal shares of the gradient every
    `every` steps (0: never). `weights` holds "logits", always 1, too.

    weights  where they start: {"feature": 0.1, ...}
    shared   Beside.shared(): the parameters that gradients are measured on
    state    of the run to continue, as JSON, exact

    The fused loss of the logits can be differentiated once only, so it is measured through the
    hidden states: a backward on a detached leaf gives d loss / d hidden, which stands for the loss
    from there on (`Step.cut` and `Step.backward` of lib/options/beside.py). After the step, `move`
    where it is `due`; the weights hold from the next step on. A loss scale cancels, as long as all
    terms have it.
    """

    def __init__(
        self,
        weights: dict[str, float],
        every: int,
        shared: list[nn.Parameter],
        state: dict | None = None,
    ) -> None:
        assert every >= 0 and "logits" not in weights, (every, weights)
        self.weights = {"logits": 1.0} | (state["weights"] if state else weights)
        assert set(self.weights) == {"logits", *weights}, (state, weights)
        self.every, self.shared, self.sums = every, shared, {}

    @property
    def state(self) -> dict:
        """What continuing needs, between steps."""
        return {"weights": dict(self.weights)}

    def due(self, step: int) -> bool:
        return self.every > 0 and step % self.every == 0

    def backward(
        self, hidden: Tensor, gradient: Tensor, terms: dict[str, Tensor], step: int
    ) -> None:
        """Send a micro-batch's gradients into the student: that of the logits at hidden (N, D), and
        the weighted terms', scalars; measure them first where the step is due."""
        if self.due(step):
            self.measure(
                {"logits": (hidden, gradient)}
                | {name: (term, None) for name, term in terms.items()}
            )
        torch.autograd.backward(
            [hidden, sum(self.weights[name] * term for name, term in terms.items())],
            [gradient, None],
        )

    def measure(self, terms: dict[str, tuple[Tensor, Tensor | None]]) -> None:
        """Add one micro-batch's gradients: terms {name: (tensor, its gradient, or None for a
        scalar)}, unweighted. The graph stays."""
        for name, (tensor, gradient) in terms.items():
            if gradient is None:
                # the size that backward has, which is what fp16 was scaled for
                gradient = torch.full_like(tensor, self.weights[name])
            found = torch.autograd.grad(
                tensor, self.shared, gradient, retain_graph=True, allow_unused=True
            )
            found = [torch.zeros_like(p) if g is None else g for p, g in zip(self.shared, found)]
            known = self.sums.get(name)
            self.sums[name] = found if known is None else [a + b for a, b in zip(known, found)]

    def measured(self) -> list[Tensor]:
        """Return what was measured of this step, for processes to sum in place."""
        return [gradient for found in self.sums.values() for gradient in found]

    def move(self) -> dict[str, float]:
        """Move the weights by what the whole step showed. Returns for the log pull_NAME, each
        term's share of the (weighted) gradient norms as measured, and weight_NAME from now on. A
        term whose gradient is 0 or not finite (fp16 overflow) keeps its weight.
        """
        assert set(self.sums) == set(self.weights), (
            f"measured {sorted(self.sums)}, wanted {sorted(self.weights)}"
        )
        pull = {}  # w_i * n_i
        for name, found in self.sums.items():
            pull[name] = torch.stack([g.double().norm() for g in found]).norm().item()
        self.sums, whole, log = {}, sum(pull.values()), {}
        if 0 < whole < math.inf:
            log = {f"pull_{name}": norm / whole for name, norm in pull.items()}
        if 0 < pull["logits"] < math.inf:
            for name, norm in pull.items():
                if 0 < norm < math.inf:
                    self.weights[name] = min(
                        MOST, max(LEAST, self.weights[name] * (pull["logits"] / norm) ** SPEED)
                    )
        return log | {
            f"weight_{name}": weight for name, weight in self.weights.items() if name != "logits"
        }
