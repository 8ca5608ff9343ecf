"""The loss of both stages: cross-entropy, and a divergence to the teacher at temperature T, in one
pass over the output layer.

Teacher and student are compared over k+1 categories: the teacher's k largest tokens S, and one
bucket for all the others, whose teacher mass at T is exact (it was summed over the whole vocabulary
when the teacher ran). With d_i = z_i - z_max:

    log p_i = d_i/T - log Z    log p_rest = tail_T - log Z
              log Z = logaddexp(logsumexp over S of d_i/T, tail_T)
    log q_i = s_i/T - logsumexp(s/T over ALL V tokens)
              q_rest = the sum of the others, never 1 - sum

    loss = alpha * T^2 * D(p, q) + (1 - alpha) * CE      summed over targets, in nats

The T^2 keeps gradients of one size over T (Hinton et al., arXiv:1503.02531, section 2): one T for
the chain rule through s/T, one since p and q come together as 1/T. Total variation has T^1: its
slope does not shrink with the distance. Since every divergence here is a function of the k+1
log q_c, with g_c = dD / d log q_c and G = sum_c g_c the gradient at ALL V logits is closed:

    T * dD/ds_j = g_j - q_j G                 for j in S
                  q_j (g_rest / q_rest - G)   for j not in S

So the gradient is computed in the forward pass, chunk by chunk of targets: no (targets, V) tensor
for the batch, nothing recomputed.

One bucket cannot say where in the vocabulary the tail lies. Where the teacher's records have a
basis (lib/teacher/basis.py), the categories are all V tokens: the top k as before, and the bucket's
exact mass spread over the others like softmax(basis logits / T). The gradient is then
T * dD/ds_j = g_j - q_j G everywhere: T (q - p) for the forward KL. So it is where a live teacher is
taken whole: softmax(z / T).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from lib.data import Batch
from lib.flags import Moving
from lib.head import CHUNK_BYTES, FLOOR, Head, compute_dtype, lift, matmul, wide

DIVERGENCES = ("fkl", "rkl", "jsd", "skl", "srkl", "tvd")
BETA = {"skl": 0.1, "srkl": 0.1}  # the beta of those for which it is not 0.5
# Of a chunk, what a divergence over all V tokens is computed on at once: what stays in a CPU's
# cache, or few enough kernels on a GPU. It takes about six temporaries of this size.
PIECE_BYTES = {"cpu": 1 << 24}
PIECE_BYTES_ELSEWHERE = 1 << 26
NONE = -1e9  # log of no mass, and still a number

AddGradient = Callable[[Tensor, float], None]  # (d (n, V), weight): adds weight * a gradient to d


class TailShape(Protocol):
    """What the shape of a tail answers (lib/teacher/basis.py)."""

    def logits(self, coef: Tensor, out: Tensor | None = None) -> Tensor:
        """Return the logits (n, V), in `out` if given, that coefficients (n, R) stand for."""


class Distribution(Protocol):
    """A teacher at N targets: `TopK`, `Whole`, or several of them (lib/teacher/several.py)."""

    def __getitem__(self, part: slice) -> "Distribution": ...

    @property
    def silent(self) -> Tensor | None:
        """The targets (N,) of which it says nothing, None where there is none: there its divergence
        from any student is 0."""

    def logits(self, out: Tensor, student: Tensor) -> Tensor:
        """Put into out (n, V) what `logp_all` begins with; student (n, V): its logits."""

    def logp_all(self, z: Tensor, temperature: float) -> Tensor:
        """Return the log-probabilities (n, V) at T over all tokens. z (n, V), of `logits`, is
        overwritten."""

    def likeliest(self, z: Tensor) -> Tensor:
        """Return the likeliest token (n,). z (n, V): of `logits`."""


@dataclass(frozen=True)
class TopK:
    """The teacher at N targets as records hold it: ids (N, K) int64, gap (N, K) = z_max - z_i >= 0,
    tail (N,) at one T.

    count (N,), if given: how many of a target's K ids are known. All others' mass is in its tail,
    so that of a target with 0 known the divergence is 0. joint (N,), if given: above 0 where so
    many targets from here on, of which nothing else is known, are compared by the product of their
    labels' probabilities, and tail says what is beside it.

    With a `basis`, coef (N, R) are the tail's coefficients over it; without one, the tail is a
    bucket, and so it is at targets of `shapeless` (N,), whose coefficients are worse than none.
    """

    ids: Tensor
    gap: Tensor
    tail: Tensor
    coef: Tensor | None = None
    basis: TailShape | None = None
    shapeless: Tensor | None = None
    count: Tensor | None = None
    joint: Tensor | None = None

    def __getitem__(self, part: slice) -> "TopK":
        return TopK(
            self.ids[part],
            self.gap[part],
            self.tail[part],
            None if self.coef is None else self.coef[part],
            self.basis,
            None if self.shapeless is None else self.shapeless[part],
            None if self.count is None else self.count[part],
            None if self.joint is None else self.joint[part],
        )

    @property
    def unknown(self) -> Tensor | None:
        """Which of the ids (N, K) are none that it knows; None: it knows them all."""
        if self.count is None:
            return None
        return torch.arange(self.ids.shape[1], device=self.ids.device) >= self.count[:, None]

    @property
    def silent(self) -> Tensor | None:
        """The targets (N,) of which it knows nothing."""
        return None if self.count is None else self.count == 0

    def logits(self, out: Tensor, student: Tensor) -> Tensor:
        """Put the basis' logits of these targets into out (n, V): good for the tail alone. Where
        there is no shape, those of the student (n, V): with r = p_rest / q_rest the teacher is then
        r q in the tail, and each divergence here, a sum of q f(p / q), is q_rest f(r) there: value
        and gradient are those of one bucket."""
        if self.basis is None:
            return out.copy_(student)
        assert self.coef is not None
        z = self.basis.logits(self.coef, out)
        if self.shapeless is not None:
            z[self.shapeless] = student[self.shapeless]
        return z

    def logp_all(self, z: Tensor, temperature: float) -> Tensor:
        """Return the log-probabilities (n, V) at T over all tokens. z (n, V), its basis' logits, is
        overwritten."""
        logp, unknown, z = teacher_logp(self, temperature), self.unknown, z.div_(temperature)
        emptied, known = torch.full_like(logp[:, :-1], -torch.inf), logp[:, :-1]
        if unknown is not None:
            emptied = torch.where(unknown, z.gather(1, self.ids), emptied)
        # a token that the teacher has not, and the student has: light, and no infinity
        tail = z.scatter_(1, self.ids, emptied).log_softmax(1).clamp_min_(FLOOR).add_(logp[:, -1:])
        if unknown is not None:
            known = torch.where(unknown, tail.gather(1, self.ids), known)
        return tail.scatter_(1, self.ids, known)

    def likeliest(self, z: Tensor) -> Tensor:
        """Return the likeliest token (n,). z (n, V): of `logits`."""
        return self.ids[:, 0]


@dataclass(frozen=True)
class Whole:
    """A live teacher at N targets with its whole distribution: hidden (N, D') and its output layer,
    both on the student's device.

    The logits are made where they are needed, a chunk at a time.
    """

    hidden: Tensor
    head: Head
    silent: ClassVar[None] = None

    def __getitem__(self, part: slice) -> "Whole":
        return Whole(self.hidden[part], self.head)

    def logits(self, out: Tensor, student: Tensor) -> Tensor:
        """Put the logits of these targets into out (n, V). (The student's are not asked.)"""
        weight = self.head.operand(self.hidden.dtype)
        # half-precision products have no `out`
        return out.copy_(self.head.logits(self.hidden.to(weight.dtype), weight, out))

    def logp_all(self, z: Tensor, temperature: float) -> Tensor:
        """Return the log-probabilities (n, V) at T over all tokens. z (n, V), the logits, is
        overwritten."""
        return z.div_(temperature).log_softmax(1)

    def likeliest(self, z: Tensor) -> Tensor:
        """Return the likeliest token (n,). z (n, V): of `logits`."""
        return z.argmax(1)


@dataclass(frozen=True)
class Method:
    """alpha weighs the teacher (0 = cross-entropy alone). `beta`: jsd's weight of the teacher,
    skl's share of the teacher in the mixture, srkl's of the student. reference: whether the labels
    are one; where they are not, their cross-entropy is no figure (0), and alpha is 1."""

    alpha: float = 0.0
    temperature: float = 1.0
    divergence: str = "fkl"
    beta: float = 0.5
    reference: bool = True

    @property
    def slope(self) -> float:
        """alpha times the power of T, less one, that keeps the divergence's gradient of one size:
        what multiplies T times the gradient."""
        return self.alpha if self.divergence == "tvd" else self.alpha * self.temperature


@dataclass(frozen=True)
class Schedule:
    """The Method of each step of a run: `method = schedule(step)`. alpha and temperature: a number,
    or (first, last), and then it moves in a straight line from the first step to the last."""

    alpha: Moving = 0.0
    temperature: Moving = 1.0
    divergence: str = "fkl"
    beta: float = 0.5
    steps: int = 1

    def __call__(self, step: int, batch: Batch | None = None) -> Method:
        """Return the method of step `step`, counted from 0; it is the same for all its batches."""
        share = min(1.0, step / max(1, self.steps - 1))
        alpha, temperature = interpolated(self.alpha, share), interpolated(self.temperature, share)
        return Method(alpha, temperature, self.divergence, self.beta)

    def moving(self, step: int) -> dict[str, float]:
        """Return by name what moves over the run, as it is at a step: for the log."""
        method, moved = self(step), {}
        for name in ("alpha", "temperature"):
            if isinstance(getattr(self, name), tuple):
                moved[name] = getattr(method, name)
        return moved

    def figures(self, step: int, sums: Tensor, targets: int, beside: dict) -> dict[str, float]:
        """Return what the log says of a step: loss, divergence and cross-entropy a target, what was
        had beside them, and what moves. sums (3,): of loss, cross-entropy, divergence."""
        loss, ce, kd = (sums / targets).tolist()
        return {"loss": loss, "kd": kd, "ce": ce, **beside, **self.moving(step)}


def interpolated(value: Moving, share: float) -> float:
    """Return a number as it is, and of (first, last) what lies at `share` of the way."""
    if not isinstance(value, tuple):
        return value
    first, last = value
    return first + (last - first) * share


def divergence(logp: Tensor, logq: Tensor, kind: str, beta: float = 0.5) -> Tensor:
    """Return D(p, q) (n,) in nats from log-probabilities (n, C); zero exactly where p == q, never
    below.

    fkl KL(p||q) | rkl KL(q||p) | jsd generalised Jensen-Shannon, beta KL(p||m) + (1-beta) KL(q||m),
    m = beta p + (1-beta) q (GKD, arXiv:2306.13649, eq. 1) | skl skewed KL(p || beta p + (1-beta) q)
    (DistiLLM, arXiv:2402.03898, eq. 2) | srkl skewed reverse KL(q || (1-beta) p + beta q) (there,
    section 3.1; on the student's own text in DistiLLM-2, arXiv:2503.07067) | tvd total variation,
    half the sum of |p - q|.
    """

    def kl(a, b):
        return (a.exp() * (a - b)).sum(-1)

    if kind == "fkl":
        return kl(logp, logq)
    if kind == "rkl":
        return kl(logq, logp)
    if kind == "tvd":
        return (logp.exp() - logq.exp()).abs().sum(-1) / 2
    if kind == "srkl":
        return kl(logq, torch.logaddexp(logp + math.log(1 - beta), logq + math.log(beta)))
    # of logs: where both underflow, log(0) would be NaN
    mixture = torch.logaddexp(logp + math.log(beta), logq + math.log(1 - beta))
    if kind == "skl":
        return kl(logp, mixture)
    assert kind == "jsd", kind
    return beta * kl(logp, mixture) + (1 - beta) * kl(logq, mixture)


def divergence_and_gradient(logp: Tensor, logq: Tensor, method: Method) -> tuple[Tensor, Tensor]:
    """Return the divergence summed over targets, nats, and g (n, C), its gradient at logq."""
    with torch.enable_grad():
        leaf = logq.detach().requires_grad_()
        kd = divergence(logp, leaf, method.divergence, method.beta).sum()
        (g,) = torch.autograd.grad(kd, leaf)
    return kd.detach(), g


def teacher_logp(teacher: TopK, temperature: float) -> Tensor:
    """Return the teacher's log-probabilities (N, K+1) at T over its K tokens (NONE of those that it
    does not know) and, last, the bucket of all others."""
    d, unknown = -teacher.gap / temperature, teacher.unknown
    if unknown is not None:
        d = d.masked_fill(unknown, NONE)
    log_z = torch.logaddexp(d.logsumexp(-1), teacher.tail)
    logp, rest = d - log_z[:, None], (teacher.tail - log_z)[:, None]
    # no mass is known: a light one, and no heavier than the least that is
    least = logp if unknown is None else logp.masked_fill(unknown, 0.0)
    light = least.amin(-1, keepdim=True).clamp_max(FLOOR)
    return torch.cat([logp, torch.where(rest.isinf(), light, rest)], -1)


def all_logp(teacher: Distribution, z: Tensor, logq: Tensor, temperature: float) -> Tensor:
    """Return a teacher's log-probabilities (n, V) at T over all tokens: where it says nothing, the
    student's own, logq (n, V). z (n, V), of its `logits`, is overwritten."""
    logp, silent = teacher.logp_all(z, temperature), teacher.silent
    return logp if silent is None else torch.where(silent[:, None], logq, logp)


def student_logq(
    z: Tensor, teacher: TopK, temperature: float, out: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the student's log-probabilities (n, K+1) at T over the same categories, and the sums
    of exp((s - s_max)/T) over the others, times exp(raised), and over all, each (n,); and raised
    (n,), which is 0 but where the others are too light for float32 (head.lift).

    z (n, V) holds s - s_max; out (n, V), which may be z, becomes exp((s - s_max)/T + raised) with
    zeros at the teacher's ids.
    """
    inside, unknown = z.gather(1, teacher.ids) / temperature, teacher.unknown
    emptied = torch.full_like(inside, -torch.inf)
    if unknown is not None:
        emptied = torch.where(unknown, inside, emptied)
        inside = inside.masked_fill(unknown, NONE)
    torch.div(z, temperature, out=out).scatter_(1, teacher.ids, emptied)
    raised = lift(out)
    # of S nothing is in it, so that the bucket is a sum and never 1 - sum
    rest = out.exp_().sum(1).clamp_min(math.exp(FLOOR))
    total = inside.exp().sum(1) + rest * (-raised).exp()
    log_total = total.log()
    bucket = (rest.log() - raised - log_total)[:, None]
    return torch.cat([inside - log_total[:, None], bucket], -1), rest, total, raised


def piece_bytes(device: torch.device) -> int:
    """Return the size of what a divergence over all tokens is computed on at once."""
    return PIECE_BYTES.get(device.type, PIECE_BYTES_ELSEWHERE)


def pieces(z: Tensor, vocab: int | None = None) -> list[slice]:
    """Cut the targets of a chunk of logits (n, V) so that what is computed over all tokens has
    small temporaries. vocab: V, where z is a part: all parts are cut alike."""
    size = max(1, piece_bytes(z.device) // (z.element_size() * (vocab or z.shape[1])))
    return [slice(start, min(start + size, len(z))) for start in range(0, len(z), size)]


def dense_bytes(device: torch.device, logits: int) -> int:
    """Return the memory that a divergence over all tokens takes beside the student's logits: a
    second buffer, and a piece's temporaries. logits: of all targets of a micro-batch, in bytes."""
    chunk = min(CHUNK_BYTES, logits)
    return 6 * min(piece_bytes(device), chunk) + chunk * (2 if device.type == "cuda" else 1)


def distance(z: Tensor, teacher: Distribution) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return KL(teacher || student) and KL(student || teacher) at T=1 in nats, the teacher's
    likeliest token, and the sum of exp(z) over all tokens, each (n,).

    z (n, V) holds s - s_max and is overwritten. Over the top k and a bucket, or, with a basis or a
    teacher that is there whole, over all tokens.
    """
    if isinstance(teacher, TopK) and teacher.basis is None:
        logp, (logq, _, total, _) = teacher_logp(teacher, 1.0), student_logq(z, teacher, 1.0, z)
        kl, rkl = divergence(logp, logq, "fkl"), divergence(logp, logq, "rkl")
        return kl, rkl, teacher.ids[:, 0], total
    other = teacher.logits(torch.empty_like(z), z)
    top = teacher.likeliest(other)
    total, kl, rkl = z.new_empty(3, len(z))
    for piece in pieces(z):
        logq = z[piece].log_softmax(1)
        logp = all_logp(teacher[piece], other[piece], logq, 1.0)
        student = z[piece].exp_()  # of its tokens, times their sum: the one exp serves both
        total[piece] = student.sum(1)
        apart = logp - logq
        kl[piece] = (logp.exp_() * apart).sum(1)
        rkl[piece] = -(student * apart).sum(1) / total[piece]
    return kl, rkl, top, total


def divergence_over_bucket(
    z: Tensor, teacher: TopK, method: Method, out: Tensor
) -> tuple[Tensor, AddGradient]:
    """Return the divergence summed over targets, nats, over the top k and one bucket, and what adds
    T times its gradient at s. z (n, V) holds s - s_max; out (n, V) is a buffer."""
    ids, t = teacher.ids, method.temperature
    logq, rest, total, raised = student_logq(z, teacher, t, soft := out)
    kd, g = divergence_and_gradient(teacher_logp(teacher, t), logq, method)  # (), (n, K+1)
    g_sum = g.sum(1)
    of_soft = g[:, -1] / rest - g_sum / total * (-raised).exp()

    # soft is zero at S; the bucket's tokens share its gradient in proportion to their mass
    def add_gradient(d: Tensor, weight: float) -> None:
        d.addcmul_(soft, (weight * of_soft)[:, None])
        d.scatter_add_(1, ids, weight * (g[:, :-1] - logq[:, :-1].exp() * g_sum[:, None]))

    return kd, add_gradient


def divergence_over_all(
    z: Tensor, teacher: Distribution, method: Method, out: Tensor
) -> tuple[Tensor, AddGradient]:
    """Return the divergence summed over targets, nats, over all V tokens, and what adds T times its
    gradient at s. z (n, V) holds s - s_max.

    out (n, V), a buffer, takes the teacher's (or its basis') logits first, and then the gradient:
    piece by piece, so that temporaries stay small.
    """
    teacher.logits(out, z)
    kd_sum = torch.zeros((), dtype=z.dtype, device=z.device)
    for piece in pieces(z):
        logq = (z[piece] / method.temperature).log_softmax(1)
        logp = all_logp(teacher[piece], out[piece], logq, method.temperature)
        kd, g = divergence_and_gradient(logp, logq, method)
        kd_sum += kd
        torch.addcmul(g, logq.exp_(), g.sum(1, keepdim=True), value=-1, out=out[piece])

    def add_gradient(d: Tensor, weight: float) -> None:
        d.add_(out, alpha=weight)

    return kd_sum, add_gradient


def divergence_over_products(
    z: Tensor, labels: Tensor, teacher: TopK, method: Method
) -> tuple[Tensor, AddGradient]:
    """Return the divergence summed over the groups of several targets (`TopK.joint`), nats, and
    what adds its gradient at s: of each group the probability of its labels one after the other,
    and of all else (the chain rule; T = 1). z (n, V) holds s - s_max."""
    assert method.temperature == 1 and teacher.joint is not None, method.temperature
    first = teacher.joint.nonzero()[:, 0]
    size = teacher.joint[first]
    group = torch.arange(len(first), device=z.device).repeat_interleave(size)
    member = torch.arange(len(group), device=z.device) + (first + size - size.cumsum(0))[group]
    logp = z[member].log_softmax(1)  # (members, V)
    at, place = labels[member][:, None], torch.zeros(len(first), dtype=z.dtype, device=z.device)
    product = place.index_add(0, group, logp.gather(1, at)[:, 0])
    p = -torch.nn.functional.softplus(teacher.tail[first].to(z.dtype))
    known = torch.stack([p, teacher.tail[first] + p], 1)
    with torch.enable_grad():
        leaf = product.detach().requires_grad_()
        rest = (-torch.expm1(leaf)).clamp_min(math.exp(FLOOR)).log()
        logq = torch.stack([leaf, rest], 1)
        kd = divergence(known, logq, method.divergence, method.beta).sum()
        (g,) = torch.autograd.grad(kd, leaf)
    slope, soft = g[group], logp.exp_()

    def add_gradient(d: Tensor, weight: float) -> None:
        d.index_add_(0, member, soft * slope[:, None], alpha=-weight)
        d[member] = d[member].scatter_add_(1, at, weight * slope[:, None])

    return kd.detach(), add_gradient


def chunks_of(count: int, size: int, teacher: Distribution | None) -> Iterator[slice]:
    """Yield `count` targets in chunks of at most `size`, none of which ends inside a group."""
    inside = torch.zeros(count + 1, dtype=torch.bool)
    if isinstance(teacher, TopK) and teacher.joint is not None:
        joint = teacher.joint.cpu()
        for first in joint.nonzero()[:, 0].tolist():
            inside[first + 1 : first + int(joint[first])] = True
    start = 0
    while start < count:
        end = min(start + size, count)
        while inside[end]:
            end -= 1
        assert end > start, f"a group of more than {size} targets"
        yield slice(start, end)
        start = end


def cross_entropy(z: Tensor, labels: Tensor, weight: float) -> Tensor:
    """Return the cross-entropy summed over targets, nats. z (n, V) holds s - s_max and becomes
    `weight` times its gradient at s: softmax(s) - 1 at the label (n,)."""
    label = labels[:, None]
    at_label = z.gather(1, label)[:, 0]
    total = z.exp_().sum(1)
    z.mul_((weight / total)[:, None])
    z.scatter_add_(1, label, torch.full_like(label, -weight, dtype=z.dtype))
    return (total.log() - at_label).sum()


def loss_of_logits(
    z: Tensor, labels: Tensor, teacher: Distribution | None, method: Method, out: Tensor
) -> tuple[Tensor, Tensor]:
    """Return cross-entropy and divergence summed over targets, nats. z (n, V) holds the student's
    logits s and becomes the loss' gradient at them; out (n, V) is a buffer."""
    z -= z.amax(1, keepdim=True)
    if teacher is None:
        return cross_entropy(z, labels, 1 - method.alpha), z.new_zeros(())
    if isinstance(teacher, TopK) and teacher.basis is None:
        kd, add_gradient = divergence_over_bucket(z, teacher, method, out)
    else:
        kd, add_gradient = divergence_over_all(z, teacher, method, out)
    adding = [add_gradient]
    if isinstance(teacher, TopK) and teacher.joint is not None:
        of_groups, add_gradient = divergence_over_products(z, labels, teacher, method)
        kd, adding = kd + of_groups, [*adding, add_gradient]
    ce = cross_entropy(z, labels, 1 - method.alpha)
    for add_gradient in adding:
        add_gradient(z, method.slope)
    return ce, kd


class _Gradients:
    """Gradients at the hidden states, the weight and the bias, summed over chunks in float32 or
    wider. operand (V, D): the weight in the dtype of the products."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, operand: Tensor
    ) -> None:
        self.operand = operand
        # fp16 holds q - p of a flat tail (1/V = 7e-6) to two digits only: lift by 2^10 for the
        # products, and lower the sums again
        self.lift = 1024.0 if operand.dtype == torch.float16 else 1.0

        def zeros(tensor: Tensor) -> Tensor:
            return torch.zeros(tensor.shape, dtype=wide(operand.dtype), device=hidden.device)

        self.hidden = zeros(hidden)
        self.weight = zeros(weight) if weight.requires_grad else None
        self.bias = zeros(bias) if bias is not None and bias.requires_grad else None

    def add(self, part: slice, rows: Tensor, d: Tensor) -> None:
        """Add what follows from d (n, V), the gradient at rows @ weight.T + bias, which is
        overwritten; rows (n, D) are the hidden states of the targets `part`."""
        vocab = d.shape[1]
        if self.bias is not None:
            self.bias[:vocab] += d.sum(0)
        if self.lift != 1:
            d.mul_(self.lift).clamp_(-65504.0, 65504.0)
        d = d.to(self.operand.dtype)
        self.hidden[part] = matmul(d, self.operand)
        if self.weight is None:
            return
        if d.dtype == self.weight.dtype:
            self.weight[:vocab].addmm_(d.t(), rows)
        else:
            self.weight[:vocab] += matmul(d.t(), rows)

    def lowered(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the three, no longer lifted."""
        if self.lift != 1:
            self.hidden /= self.lift
            if self.weight is not None:
                self.weight /= self.lift
        return self.hidden, self.weight, self.bias


class _HeadLoss(torch.autograd.Function):
    """Loss and its gradients together; backward only scales them. See the module's docstring for
    the mathematics."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, head: Head, labels, teacher, method, dtype, grad: bool):
        operand, device = head.operand(dtype), hidden.device
        ce_sum, kd_sum = (torch.zeros((), dtype=wide(dtype), device=device) for _ in range(2))
        gradients = _Gradients(hidden, weight, bias, operand) if grad else None
        size = min(head.chunk(), max(len(labels), 1))
        buffer = torch.empty(size, head.vocab, dtype=wide(operand.dtype), device=device)
        second = torch.empty_like(buffer if teacher is not None else buffer[:0])
        for part in chunks_of(len(labels), size, teacher):
            rows = hidden[part].to(operand.dtype)
            z = head.logits(rows, operand, buffer[: len(rows)])  # (n, V)
            slope = 1 - (z / head.softcap) ** 2 if head.softcap else None
            known = None if teacher is None else teacher[part]
            ce, kd = loss_of_logits(z, labels[part], known, method, second[: len(rows)])
            ce_sum += ce if method.reference else 0.0
            kd_sum += kd
            if gradients is None:
                continue
            if slope is not None:
                z *= slope
            if head.scale != 1:
                z *= head.scale
            gradients.add(part, rows, z)

        ctx.grads = gradients and gradients.lowered()
        ctx.dtypes = (hidden.dtype, weight.dtype, weight.dtype)
        loss = (1 - method.alpha) * ce_sum + method.slope * method.temperature * kd_sum
        ctx.mark_non_differentiable(ce_sum, kd_sum)
        return loss, ce_sum, kd_sum

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, scale, _ce, _kd):
        assert ctx.grads, "the head's gradients were computed with grad off, or used twice"
        grads, ctx.grads = ctx.grads, None  # scaled in place: a second backward would do it twice
        scaled = []
        for grad, dtype in zip(grads, ctx.dtypes):
            scaled.append(None if grad is None else grad.mul_(scale).to(dtype))
        return *scaled, *[None] * 6


def head_loss(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    teacher: Distribution | None = None,
    method: Method = Method(),
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (loss_sum, ce_sum, kd_sum): the loss of N targets, differentiable, and its two parts
    in nats (kd without its power of T, alpha).

    hidden (N, D)  the body's last hidden states at the positions that predict the targets; only
                   these reach the head
    labels (N,)    the target tokens, all < head.vocab
    teacher        the teacher at these targets, over the head's V tokens; None = cross-entropy
                   alone, and then method.alpha must be 0
    dtype          of the matrix products (default: hidden's); logits, losses and sums are float32
                   or wider whatever it is

    All sums, never means: the caller divides once, by the targets of the whole optimizer step. N =
    0 gives 0 and zero gradients.
    """
    assert teacher is not None or method.alpha == 0, f"alpha {method.alpha} without a teacher"
    if isinstance(teacher, Whole):
        assert teacher.head.vocab == head.vocab, (teacher.head.vocab, head.vocab)
    assert hidden.dim() == 2 and labels.shape == hidden.shape[:1], (hidden.shape, labels.shape)
    dtype = compute_dtype(dtype or hidden.dtype, hidden.device)
    head = head.whole(hidden.device)
    grad = torch.is_grad_enabled() and (hidden.requires_grad or head.weight.requires_grad)
    with torch.autocast(hidden.device.type, enabled=False):
        return _HeadLoss.apply(
            hidden, head.weight, head.bias, head, labels, teacher, method, dtype, grad
        )
