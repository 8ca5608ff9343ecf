"""The loss of both stages: cross-entropy, and a divergence to the teacher at temperature T, in one
pass over the output layer.

Teacher and student are compared over k+1 categories: the teacher's k largest tokens S, and one
bucket for all the others, whose teacher mass at T is exact (it was summed over the whole vocabulary
when the teacher ran). With d_i = z_i - z_max:

    log p_i = d_i/T - log Z,   log p_rest = tail_T - log Z,   log Z = logaddexp(logsumexp over S of
                               d_i/T, tail_T)
    log q_i = s_i/T - logsumexp(s/T over ALL V tokens),   q_rest = the sum of the others, never 1 -
                                                          sum

    loss = alpha * T^2 * D(p, q) + (1 - alpha) * CE      summed over targets, in nats

The T^2 keeps gradients of one size over T (Hinton et al., arXiv:1503.02531, section 2). Since every
divergence here is a function of the k+1 log q_c, with g_c = dD / d log q_c and G = sum_c g_c the
gradient at ALL V logits is closed:

    T * dD/ds_j = g_j - q_j G  for j in S;    q_j (g_rest / q_rest - G)  for j not in S

So the gradient is computed in the forward pass, chunk by chunk of targets: no (targets, V) tensor
for the batch, nothing recomputed.

One bucket cannot say where in the vocabulary the tail lies. Where the teacher's dump has a basis
(lib/teacher/basis.py), the categories are all V tokens: the top k as before, and the bucket's exact
mass spread over the others like softmax(basis logits / T). The gradient is then T * dD/ds_j = g_j -
q_j G everywhere: T (q - p) for the forward KL. So it is where a live teacher is taken whole:
softmax(z / T).
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lib.head import CHUNK_BYTES, Head, compute_dtype, matmul, wide

FLOOR = (
    -70.0
)  # log of the bucket's least mass, on both sides alike: below it exp underflows in float32
DIVERGENCES = ("fkl", "rkl", "jsd", "skl", "tvd")
PIECE_BYTES = {
    "cpu": 1 << 24
    # of a chunk, what a divergence over all V tokens is computed on at once: what stays in a CPU's
    # cache, or
}
PIECE_BYTES_ELSEWHERE = (
    1 << 26
)  # few enough kernels on a GPU; it takes about six temporaries of this size


@dataclass(frozen=True)
class TopK:
    """What a logits file keeps of the teacher at N targets: ids (N, K) int64, gap (N, K) = z_max -
    z_i >= 0, tail (N,) at one T.

    With a `basis`, coef (N, R) are the tail's coefficients over it; without one, the tail is a
    bucket.
    """

    ids: Tensor
    gap: Tensor
    tail: Tensor
    coef: Tensor | None = None
    basis: Any = None  # lib/teacher/basis.py's

    def __getitem__(self, part: slice) -> "TopK":
        return TopK(
            self.ids[part],
            self.gap[part],
            self.tail[part],
            None if self.coef is None else self.coef[part],
            self.basis,
        )

    @property
    def dense(self) -> bool:
        """Whether it says something of every token by itself."""
        return self.basis is not None

    def logits(self, out: Tensor) -> Tensor:
        """Put the basis' logits of these targets into out (n, V): good for the tail alone."""
        return self.basis.logits(self.coef, out)

    def logp_all(self, z: Tensor, temperature: float) -> Tensor:
        """Return the log-probabilities (n, V) at T over all tokens. z (n, V), its basis' logits, is
        overwritten."""
        logp = teacher_logp(self, temperature)
        shape = (
            z.div_(temperature).scatter_(1, self.ids, -torch.inf).log_softmax(1)
        )  # of the tail alone
        return shape.add_(logp[:, -1:]).scatter_(1, self.ids, logp[:, :-1])


@dataclass(frozen=True)
class Whole:
    """A live teacher at N targets with its whole distribution: hidden (N, D') and its output layer,
    both on the student's device.

    The logits are made where they are needed, a chunk at a time.
    """

    hidden: Tensor
    head: Head
    dense = True

    def __getitem__(self, part: slice) -> "Whole":
        return Whole(self.hidden[part], self.head)

    def logits(self, out: Tensor) -> Tensor:
        """Put the logits of these targets into out (n, V)."""
        weight = self.head.operand(self.hidden.dtype)
        return out.copy_(
            self.head.logits(self.hidden.to(weight.dtype), weight, out)
        )  # half-precision products have no `out`

    def logp_all(self, z: Tensor, temperature: float) -> Tensor:
        """Return the log-probabilities (n, V) at T over all tokens. z (n, V), the logits, is
        overwritten."""
        return z.div_(temperature).log_softmax(1)


@dataclass(frozen=True)
class Method:
    """alpha weighs the teacher (0 = cross-entropy alone). `beta`: jsd's weight of the teacher,
    skl's share of the teacher in the mixture."""

    alpha: float = 0.0
    temperature: float = 1.0
    divergence: str = "fkl"
    beta: float = 0.5


def divergence(logp: Tensor, logq: Tensor, kind: str, beta: float = 0.5) -> Tensor:
    """Return D(p, q) (n,) in nats from log-probabilities (n, C); zero exactly where p == q, never
    below.

    fkl KL(p||q) | rkl KL(q||p) | jsd generalised Jensen-Shannon, beta KL(p||m) + (1-beta) KL(q||m),
    m = beta p + (1-beta) q (GKD, arXiv:2306.13649, eq. 1) | skl skewed KL(p || beta p + (1-beta) q)
    (DistiLLM, arXiv:2402.03898, eq. 2) | tvd total variation, half the sum of |p - q|.
    """

    def kl(a, b):
        return (a.exp() * (a - b)).sum(-1)

    if kind == "fkl":
        return kl(logp, logq)
    if kind == "rkl":
        return kl(logq, logp)
    if kind == "tvd":
        return (logp.exp() - logq.exp()).abs().sum(-1) / 2
    mixture = torch.logaddexp(
        logp + math.log(beta), logq + math.log(1 - beta)
    )  # of logs: where both underflow, log(0) would be NaN
    if kind == "skl":
        return kl(logp, mixture)
    assert kind == "jsd", kind
    return beta * kl(logp, mixture) + (1 - beta) * kl(logq, mixture)


def teacher_logp(kept: TopK, temperature: float) -> Tensor:
    """Return the teacher's log-probabilities (N, K+1) at T over its K tokens and, last, the bucket
    of all others."""
    d = -kept.gap / temperature
    log_z = torch.logaddexp(d.logsumexp(-1), kept.tail)
    return torch.cat([d - log_z[:, None], (kept.tail - log_z)[:, None].clamp_min(FLOOR)], -1)


def student_logq(
    z: Tensor, ids: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the student's log-probabilities (n, K+1) at T over the same categories. z (n, V) holds
    s - s_max and is overwritten.

    Also returned, for the gradient: z itself, now exp((s - s_max)/T) with zeros at `ids`, its sum
    over the others (n,) and over all (n,).
    """
    kept = z.gather(1, ids) / temperature
    z.div_(temperature).exp_().scatter_(
        1, ids, 0.0
    )  # zeros at S, so that the bucket is a sum and never 1 - sum
    rest = z.sum(1).clamp_min(math.exp(FLOOR))  # and no smaller: the gradient divides by it
    total = kept.exp().sum(1) + rest
    log_total = total.log()
    return (
        torch.cat(
            [kept - log_total[:, None], (rest.log() - log_total)[:, None].clamp_min(FLOOR)], -1
        ),
        z,
        rest,
        total,
    )


def pieces(z: Tensor) -> list[slice]:
    """Cut the targets of a chunk of logits (n, V) so that what is computed over all tokens has
    small temporaries."""
    size = max(
        1, PIECE_BYTES.get(z.device.type, PIECE_BYTES_ELSEWHERE) // (z.element_size() * z.shape[1])
    )
    return [slice(start, min(start + size, len(z))) for start in range(0, len(z), size)]


def distance(z: Tensor, kept: TopK | Whole) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return KL(teacher || student) and KL(student || teacher) at T=1 in nats, the teacher's
    likeliest token, and the sum of exp(z) over all tokens, each (n,).

    z (n, V) holds s - s_max and is overwritten. Over the top k and a bucket, or, with a teacher
    that is there whole, over all tokens.
    """
    if isinstance(kept, TopK):
        logp, (logq, _, _, total) = teacher_logp(kept, 1.0), student_logq(z, kept.ids, 1.0)
        return divergence(logp, logq, "fkl"), divergence(logp, logq, "rkl"), kept.ids[:, 0], total
    other = kept.logits(torch.empty_like(z))
    top, (total, kl, rkl) = other.argmax(1), z.new_empty(3, len(z))
    for piece in pieces(z):
        logp, logq = kept.logp_all(other[piece], 1.0), z[piece].log_softmax(1)
        student = z[piece].exp_()  # of its tokens, times their sum: the one exp serves both
        total[piece] = student.sum(1)
        apart = logp - logq
        kl[piece] = (logp.exp_() * apart).sum(1)
        rkl[piece] = -(student * apart).sum(1) / total[piece]
    return kl, rkl, top, total


def dense_bytes(device: torch.device) -> int:
    """Return the memory that a divergence over all tokens takes beside the student's logits: a
    second buffer, and a piece's temporaries."""
    return 6 * PIECE_BYTES.get(device.type, PIECE_BYTES_ELSEWHERE) + 2 * CHUNK_BYTES


def divergence_over_all(z: Tensor, kept: TopK | Whole, method: Method, out: Tensor) -> Tensor:
    """Return the divergence summed over targets, nats, over all V tokens; put T times its gradient
    at s into out (n, V).

    z (n, V) holds s - s_max; out, a buffer, takes the teacher's (or its basis') logits first. Piece
    by piece, so that temporaries stay small.
    """
    kept.logits(out)
    kd_sum = torch.zeros((), dtype=z.dtype, device=z.device)
    for piece in pieces(z):
        logp = kept[piece].logp_all(out[piece], method.temperature)
        logq = (z[piece] / method.temperature).log_softmax(1)
        with torch.enable_grad():
            kd = divergence(logp, logq.requires_grad_(), method.divergence, method.beta).sum()
            (g,) = torch.autograd.grad(kd, logq)
        kd_sum += kd.detach()
        torch.addcmul(g, logq.detach().exp_(), g.sum(1, keepdim=True), value=-1, out=out[piece])
    return kd_sum


class _HeadLoss(torch.autograd.Function):
    """Loss and its gradients together; backward only scales them. See the module's docstring for
    the mathematics."""

    @staticmethod
    def forward(
        ctx,
        hidden,
        weight,
        bias,
        head: Head,
        labels,
        kept: TopK | Whole | None,
        method: Method,
        dtype,
        grad: bool,
    ):
        n_all, device = len(labels), hidden.device
        operand = head.operand(dtype)
        alpha, t = method.alpha, method.temperature
        ce_sum, kd_sum = (torch.zeros((), dtype=wide(dtype), device=device) for _ in range(2))
        grad_hidden = torch.zeros(hidden.shape, dtype=wide(dtype), device=device) if grad else None
        grad_weight = (
            torch.zeros(weight.shape, dtype=wide(dtype), device=device)
            if grad and weight.requires_grad
            else None
        )
        grad_bias = (
            torch.zeros(bias.shape, dtype=wide(dtype), device=device)
            if grad and bias is not None and bias.requires_grad
            else None
        )
        # fp16 holds q - p of a flat tail (1/V = 7e-6) to two digits only: lift by 2^10 for the
        # products, and lower the sums again
        lift = 1024.0 if operand.dtype == torch.float16 else 1.0

        size = min(head.chunk(), max(n_all, 1))
        buffer = torch.empty(size, head.vocab, dtype=wide(operand.dtype), device=device)
        second = torch.empty_like(buffer) if kept is not None else None
        for start in range(0, n_all, size):
            part = slice(start, min(start + size, n_all))
            n = part.stop - part.start
            rows, label = hidden[part].to(operand.dtype), labels[part, None]
            z = head.logits(rows, operand, buffer[:n])  # (n, V)
            slope = 1 - (z / head.softcap) ** 2 if head.softcap else None
            z -= z.amax(1, keepdim=True)
            at_label = z.gather(1, label)[:, 0]

            dense = kept is not None and kept.dense
            if dense:
                kd_sum += divergence_over_all(z, kept[part], method, second[:n])
                one = z.exp_()
            elif kept is not None:
                one = z if t == 1 else second[:n].copy_(z)
                logq, soft, rest, total = student_logq(
                    second[:n].copy_(z) if t == 1 else z, kept.ids[part], t
                )
                one = one.exp_()
            else:
                one = z.exp_()
            one_sum = one.sum(1)
            ce_sum += (one_sum.log() - at_label).sum()

            if kept is not None and not dense:
                with torch.enable_grad():
                    logq.requires_grad_()
                    kd = divergence(
                        teacher_logp(kept[part], t), logq, method.divergence, method.beta
                    ).sum()
                    (g,) = torch.autograd.grad(kd, logq)  # (n, K+1)
                kd_sum += kd.detach()
            if not grad:
                continue

            d = one.mul_(((1 - alpha) / one_sum)[:, None])  # d loss / d s, (n, V)
            d.scatter_add_(1, label, torch.full_like(label, -(1 - alpha), dtype=d.dtype))
            if dense:
                d.add_(second[:n], alpha=alpha * t)
            elif kept is not None:
                total_g = g.sum(1)
                # soft is zero at S; the bucket's tokens share its gradient in proportion to their
                # mass
                d.addcmul_(soft, (alpha * t * (g[:, -1] / rest - total_g / total))[:, None])
                d.scatter_add_(
                    1,
                    kept.ids[part],
                    alpha * t * (g[:, :-1] - logq.detach()[:, :-1].exp() * total_g[:, None]),
                )
            if slope is not None:
                d *= slope
            if head.scale != 1:
                d *= head.scale
            if grad_bias is not None:
                grad_bias[: head.vocab] += d.sum(0)
            d = (
                d.mul_(lift).clamp_(-65504.0, 65504.0).to(operand.dtype)
                if lift != 1
                else d.to(operand.dtype)
            )
            grad_hidden[part] = matmul(d, operand)
            if grad_weight is not None:
                if d.dtype == grad_weight.dtype:
                    grad_weight[: head.vocab].addmm_(d.t(), rows)
                else:
                    grad_weight[: head.vocab] += matmul(d.t(), rows)
        if lift != 1 and grad:
            grad_hidden /= lift
            if grad_weight is not None:
                grad_weight /= lift

        ctx.grads = (grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = (hidden.dtype, weight.dtype)
        loss = (1 - alpha) * ce_sum + alpha * t * t * kd_sum
        ctx.mark_non_differentiable(ce_sum, kd_sum)
        return loss, ce_sum, kd_sum

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, scale, _ce, _kd):
        hidden, weight, bias = ctx.grads
        assert hidden is not None, "the head's gradients were computed with grad off, or used twice"
        ctx.grads = (None, None, None)  # scaled in place: a second backward would scale them twice
        scaled = [
            g if g is None else g.mul_(scale).to(dtype)
            for g, dtype in zip((hidden, weight, bias), (*ctx.dtypes, ctx.dtypes[1]))
        ]
        return *scaled, *[None] * 6


def head_loss(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    kept: TopK | Whole | None = None,
    method: Method = Method(),
    dtype: torch.dtype | None = None,
):
    """Return (loss_sum, ce_sum, kd_sum): the loss of N targets, differentiable, and its two parts
    in nats (kd without T^2, alpha).

    hidden (N, D)  the body's last hidden states at the positions that predict the targets; only
                   these reach the head
    labels (N,)    the target tokens, all < head.vocab
    kept           the teacher at these targets, over the head's V tokens; None = cross-entropy
                   alone, and then method.alpha must be 0
    dtype          of the matrix products (default: hidden's); logits, losses and sums are float32
                   or wider whatever it is

    All sums, never means: the caller divides once, by the targets of the whole optimizer step. N =
    0 gives 0 and zero gradients.
    """
    assert (kept is not None) or method.alpha == 0, f"alpha {method.alpha} without a teacher"
    assert not isinstance(kept, Whole) or kept.head.vocab == head.vocab, (
        kept.head.vocab,
        head.vocab,
    )
    assert hidden.dim() == 2 and labels.shape == hidden.shape[:1], (hidden.shape, labels.shape)
    dtype = compute_dtype(dtype or hidden.dtype, hidden.device)
    grad = torch.is_grad_enabled() and (hidden.requires_grad or head.weight.requires_grad)
    with torch.autocast(hidden.device.type, enabled=False):
        return _HeadLoss.apply(
            hidden, head.weight, head.bias, head, labels, kept, method, dtype, grad
        )
