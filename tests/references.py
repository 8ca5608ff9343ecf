"""The mathematics of the loss written out independently of lib/: whole vocabulary, float64,
autograd, the definitions of the papers; and what compares ours with it."""

import math

import torch

from lib import losses
from lib.head import Head
from lib.losses import Method, TopK

BETAS = {"fkl": 0.5, "rkl": 0.5, "jsd": 0.3, "skl": 0.1, "srkl": 0.1, "tvd": 0.5}
TEMPERATURES = (1.0, 2.0, 4.0)
CE = Method()


def problem(n=6, v=23, d=5, seed=0, dtype=torch.float64, spread=1.5):
    """Return hidden (n, d), weight (v, d), labels (n,) and teacher logits (n, v)."""
    made = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=made, dtype=torch.float64).to(dtype)

    return (
        draw(n, d),
        spread * draw(v, d),
        torch.randint(v, (n,), generator=made),
        2 * spread * draw(n, v),
    )


def keep(z, k, t):
    """Return the k largest of teacher logits z (n, V) and the exact tail at t, without
    lib/head.py."""
    values, ids = z.sort(dim=1, descending=True)
    d = values - values[:, :1]
    return TopK(ids[:, :k], -d[:, :k], (d[:, k:] / t).logsumexp(1))


def reference_divergence(p, q, kind, beta):
    """Return D(p, q) (n,) from probabilities (n, C), by the definitions in the papers."""

    def kl(a, b):
        return torch.special.xlogy(a, a).sum(1) - torch.special.xlogy(a, b).sum(1)

    mixture = beta * p + (1 - beta) * q
    return {
        "fkl": lambda: kl(p, q),
        "rkl": lambda: kl(q, p),
        "jsd": lambda: beta * kl(p, mixture) + (1 - beta) * kl(q, mixture),
        "skl": lambda: kl(p, mixture),
        "srkl": lambda: kl(q, beta * q + (1 - beta) * p),
        "tvd": lambda: (p - q).abs().sum(1) / 2,
    }[kind]()


def power(kind, t):
    """Return what the divergence is multiplied by: T^2, of total variation T."""
    return t if kind == "tvd" else t * t


def bucket(p, ids):
    """Return probabilities (n, k+1): those at `ids`, then the sum of all the others."""
    others = torch.ones_like(p).scatter(1, ids, 0.0)
    return torch.cat([p.gather(1, ids), (p * others).sum(1, keepdim=True)], 1)


def reference_loss(z, s, labels, k, method):
    """Return (loss, ce, kd) summed over targets: the k+1 bucket loss over the whole vocabulary, in
    float64."""
    t = method.temperature
    p, q = (torch.softmax(x.double() / t, 1) for x in (z, s))
    ids = z.topk(k, 1).indices
    kd = reference_divergence(bucket(p, ids), bucket(q, ids), method.divergence, method.beta).sum()
    ce = torch.nn.functional.cross_entropy(s.double(), labels, reduction="sum")
    return method.alpha * power(method.divergence, t) * kd + (1 - method.alpha) * ce, ce, kd


def gradients(loss_of, *tensors):
    """Return the loss and its gradients with respect to copies of `tensors`."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    loss = loss_of(*leaves)
    loss.backward()
    return loss.detach(), *[leaf.grad for leaf in leaves]


def ours(hidden, weight, labels, teacher=None, method=CE, bias=None, **head):
    """Return (loss, gradient of hidden, gradient of weight) of head_loss."""
    options = {"vocab": len(weight)} | head
    return gradients(
        lambda h, w: losses.head_loss(h, Head(w, bias, **options), labels, teacher, method)[0],
        hidden,
        weight,
    )


def all_close(seen, wanted, **limits):
    for a, b in zip(seen, wanted, strict=True):
        torch.testing.assert_close(a, b, **{"rtol": 1e-9, "atol": 1e-9} | limits)


def angle(a, b):
    """Return the angle between two gradients, in degrees."""
    return math.degrees(
        math.acos(
            min(1.0, torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).item())
        )
    )
