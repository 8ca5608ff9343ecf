"""The output layer of a language model: hidden states to float32 logits, a chunk of targets at a
time.

Contract: logits are always float32 (float64 for float64 inputs) over the first `vocab` tokens, with
the model's own scale and soft cap applied. No function here or above holds logits for more than one
chunk.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

# log of a mass that float32's exp can still tell from 0; a bucket that is empty counts as so light
FLOOR = -70.0
ABSENT = -1e9  # logit of a token that is left out: no mass at any temperature, and still a number
CHUNK_BYTES = 1 << 27  # one buffer of (chunk, V) logits: 128 MiB, 220 targets at V = 151,936


class Parts:
    """Where a vocabulary's logits (n, V) lie: here, all of them, so that every sum and largest
    value over it is this process's own. Where processes have `world` parts of it, one each
    (lib/teacher/parallel.py), what is said of z (n, V) holds of the part (n, tokens) from the
    token `first` on, and all call this together."""

    first, rank, world = 0, 0, 1

    def most(self, x: Tensor) -> Tensor:
        """Return the largest that any part has of x."""
        return x

    def total(self, x: Tensor) -> Tensor:
        """Return the sum of x over the parts."""
        return x

    def merged(self, values: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return the k largest values (n, k) of the k largest of each part, and their ids."""
        return values, ids

    def whole(self, x: Tensor) -> Tensor:
        """Return x (..., V) of all parts, of each part's (..., tokens)."""
        return x

    def softmax(self, z: Tensor) -> Tensor:
        """Return this part of the softmax over all parts of logits (n, tokens)."""
        return z.softmax(1)

    def own(self, shape: Any) -> Any:
        """Return the part of a basis (lib/teacher/basis.py) that is of this part's tokens."""
        return shape

    def told(self, value: Any = None) -> Any:
        """Return what the first part's process has of a small value."""
        return value

    def lead(self, do: Callable[..., Any], *words: Any) -> Any:
        """Return what is done by the first part's process alone, before any other goes on."""
        return do(*words)


ALONE = Parts()


@dataclass(frozen=True)
class Head:
    """weight (V', D), bias (V',) or None; logits = softcap(scale * (hidden @ weight[:vocab].T +
    bias)).

    `softcap` c maps z to c * tanh(z / c) (Gemma 2, eq. in section 2 of arXiv:2408.00118); 0 = none.
    `vocab` = V tokens both models know; apart (n,): ids among them that are another token to one of
    them, whose logits are ABSENT in both, so that neither's distribution has them. parts: where
    the layer has more rows than `weight` (and bias, and apart), which are one part's.
    """

    weight: Tensor
    bias: Tensor | None
    vocab: int
    scale: float = 1.0
    softcap: float = 0.0
    apart: Tensor | None = None
    parts: Parts = ALONE

    @property
    def tokens(self) -> int:
        """How many of the V tokens have their rows here."""
        return min(self.vocab, len(self.weight))

    def chunk(self) -> int:
        """Return how many targets one buffer of logits holds."""
        return max(1, CHUNK_BYTES // (4 * self.vocab))

    def logits(self, hidden: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
        """Return logits (n, V) of hidden (n, D), in `out` if given; `weight` is
        `self.operand(...)`."""
        z = matmul(hidden, weight.t(), out)
        if self.bias is not None:
            z += self.bias[: self.vocab]
        if self.scale != 1.0:
            z *= self.scale
        if self.softcap:
            z.div_(self.softcap).tanh_().mul_(self.softcap)
        return z if self.apart is None else z.index_fill_(1, self.apart, ABSENT)

    def operand(self, dtype: torch.dtype) -> Tensor:
        """Return the weight (V, D) in the dtype that products are computed in: made once, used for
        every chunk.

        A half-precision product gives float32 logits on CUDA only (its sums and its output are
        float32 there); elsewhere the operands are widened first, since logits rounded to bfloat16
        cost 2.3e-2 nats of KL.
        """
        weight = self.weight.detach()[: self.vocab]
        return weight.to(compute_dtype(dtype, weight.device))

    def whole(self, device: torch.device) -> "Head":
        """Return the layer as one, on a device, where it lies divided among processes (a DTensor):
        the gradients that each sends back are summed over them. All call this together."""
        if not is_divided(self.weight):
            return self
        from torch.distributed.tensor import Partial

        def gathered(part: Any) -> Any:
            if part is not None:
                return part.to(device).full_tensor(grad_placements=[Partial()])

        return replace(self, weight=gathered(self.weight), bias=gathered(self.bias))

    def beyond(self) -> "Head | None":
        """Return the layer's other rows, those from `vocab` on and those apart, as a head of their
        own; None without."""

        def others(rows: Tensor) -> Tensor:
            above = rows[self.vocab :]
            return above if self.apart is None else torch.cat([above, rows[self.apart]])

        if not (more := len(weight := others(self.weight))):
            return None
        bias = None if self.bias is None else others(self.bias)
        return replace(self, weight=weight, bias=bias, vocab=more, apart=None)

    @torch.no_grad()
    def chunks(self, hidden: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield (which targets, their logits (n, V)); the logits' buffer is used again for the next
        chunk."""
        weight = self.operand(hidden.dtype)
        buffer = None
        for start in range(0, len(hidden), self.chunk()):
            part = slice(start, min(start + self.chunk(), len(hidden)))
            rows = hidden[part].to(weight.dtype)
            if buffer is None:
                buffer = torch.empty(
                    len(rows), len(weight), dtype=wide(weight.dtype), device=hidden.device
                )
            yield part, self.logits(rows, weight, buffer[: len(rows)])


def is_divided(tensor: Tensor) -> bool:
    """Return whether a tensor lies divided among processes (a DTensor)."""
    return hasattr(tensor, "full_tensor")


def local(tensor: Any) -> Tensor:
    """Return the part of a tensor that lies in this process: all of it, unless it is divided."""
    return tensor.to_local() if is_divided(tensor) else tensor


def undivided(tensor: Any) -> Tensor:
    """Return a tensor whole, wherever it lies divided among processes, which call this together."""
    return tensor.full_tensor() if is_divided(tensor) else tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of logits, losses and sums: float64 stays, all others become float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def compute_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype for matrix products: `dtype` itself on CUDA, at least float32 elsewhere."""
    return dtype if device.type == "cuda" else wide(dtype)


def matmul(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """Return a @ b summed and stored in float32 or wider, whatever the operands' (common) dtype;
    half operands need CUDA."""
    if a.dtype in (torch.float16, torch.bfloat16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b, out=out)


def lift(z: Tensor, least: float = FLOOR, parts: Parts = ALONE) -> Tensor:
    """Add to each row of z (n, V), log-masses, what brings its largest to 0 where that is below
    `least`, so that exp does not underflow, and return what was added (n,): mostly 0."""
    top = parts.most(z.amax(1))
    raised = torch.where((top < least) & ~top.isinf(), -top, 0.0)
    z.add_(raised[:, None])
    return raised


def topk_and_tails(z: Tensor, k: int, temperatures: list[float]) -> tuple[Tensor, Tensor, Tensor]:
    """Summarise teacher logits z (n, V), which are overwritten, by the k largest and the exact mass
    of the others.

    Returns ids (n, k) int64 and gaps (n, k) = z_max - z_i >= 0, largest logit first, and tails (n,
    len(temperatures)): log of the sum over the other V - k tokens of exp((z_j - z_max) / T), -inf
    where there is none.
    """
    ids, gaps = take_top(z, k)
    return ids, gaps, tails_and_errors(z, temperatures)[0]


def take_top(z: Tensor, k: int, parts: Parts = ALONE) -> tuple[Tensor, Tensor]:
    """Return the ids and gaps of `topk_and_tails`; z (n, V) becomes z - z_max of the others, -inf
    at the ids. (Of equal logits at the k-th place, which is taken may hang on the parts.)"""
    ids, values = top_of(z, k, parts)
    top = values[:, :1]
    lower(z.sub_(top), ids, -torch.inf, parts)
    return ids, top - values


def top_of(z: Tensor, k: int, parts: Parts = ALONE) -> tuple[Tensor, Tensor]:
    """Return the ids (n, k) of the k largest of z (n, V), the largest first, and their values."""
    values, ids = z.topk(min(k, z.shape[1]), dim=1)
    values, ids = parts.merged(values, ids + parts.first, k)
    return ids, values


def lower(z: Tensor, ids: Tensor, value: float, parts: Parts = ALONE) -> Tensor:
    """Lower z (n, V) at ids (n, k) to a value, where they lie in this part, and return it."""
    inside, own = here(z, ids, parts)
    return z.scatter_reduce_(1, own, z.new_full(own.shape, value).where(inside, torch.inf), "amin")


def at_ids(z: Tensor, ids: Tensor, parts: Parts = ALONE) -> Tensor:
    """Return z (n, V) at one id a target (n,), whichever part it lies in; 0 where it is none's."""
    inside, own = here(z, ids[:, None], parts)
    return parts.total(z.gather(1, own).where(inside, 0.0)[:, 0])


def here(z: Tensor, ids: Tensor, parts: Parts) -> tuple[Tensor, Tensor]:
    """Return which ids are columns of this part z, and each id's column (any, where it is not)."""
    own, last = ids - parts.first, z.shape[1] - 1
    return (own >= 0) & (own <= last), own.clamp(0, last)


def tails_and_errors(
    z: Tensor, temperatures: list[float], stored: Tensor | None = None, parts: Parts = ALONE
) -> tuple[Tensor, Tensor]:
    """Return the tails of `topk_and_tails`, z (n, V) being what `take_top` leaves, and for logits
    that are stored of these tails (n, V) their errors (n, len(temperatures)): KL, in nats, of a
    tail's own softmax at T from the stored one's; 0 where there is no tail. Both are overwritten.
    """
    if stored is not None:
        top = z.isneginf()
        stored.masked_fill_(top, -torch.inf)
        stored -= parts.most(stored.amax(1, keepdim=True)).nan_to_num_(neginf=0.0)
        away = (z - stored).masked_fill_(top, 0.0)
    raised = lift(z, FLOOR * min(temperatures), parts)
    tails, errors = z.new_zeros(2, len(z), len(temperatures))
    # exp once, at the highest temperature; lower ones are powers of it: a square where T halves
    order = sorted(range(len(temperatures)), key=lambda i: -temperatures[i])
    above = None
    for i in order:
        t = temperatures[i]

        def powered(x, above=above, t=t):
            return x.div_(t).exp_() if above is None else x.pow_(above / t)

        z, above = powered(z), t
        mass = parts.total(z.sum(1))
        tails[:, i] = mass.log() - raised / t
        if stored is not None:
            # the mean under p of log p - log q, with p = z / mass and q = stored / its sum
            mean = parts.total(torch.linalg.vecdot(z, away)) / mass
            errors[:, i] = mean / t - tails[:, i] + parts.total(powered(stored).sum(1)).log()
    return tails, errors.nan_to_num_(0.0).clamp_min_(0.0)
