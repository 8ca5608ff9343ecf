"""The shape of the tail: the loss over all tokens against dense references written out here, the
fit against plain linear algebra, the files."""

import itertools
import json
import math
import re
import shutil
from dataclasses import replace

import make
import numpy as np
import pytest
import torch
from references import (
    BETAS,
    TEMPERATURES,
    all_close,
    angle,
    gradients,
    keep,
    ours,
    power,
    problem,
    reference_divergence,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_logits import teacher_logits

import dump_logits
import stage2_kd
from lib import checkpoints, data, files, losses, models, plan
from lib import head as heads
from lib.head import Head
from lib.losses import Method, TopK
from lib.measure import plots
from lib.teacher import basis, fit, logits, record, sample, writer
from lib.teacher.basis import Basis

KINDS = losses.DIVERGENCES
HEADS = {
    "plain": {},
    "softcap": dict(softcap=4.0),
    "scale": dict(scale=0.3),
    "bias": dict(bias=True),
    "all": dict(softcap=4.0, scale=0.3, bias=True),
}


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(plots, "curves", lambda *_: None)


def draws(seed):
    made = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=made, dtype=torch.float64)


def any_basis(v, rank, n, seed=1, softcap=0.0):
    """Return a basis of random numbers in float64, fitted to nothing, and coefficients (n, rank):
    what the loss promises, it promises for these."""
    draw = draws(seed)
    return Basis(
        2 * draw(v),
        draw(rank, v),
        torch.full((rank,), 8, dtype=torch.uint8),
        torch.ones(rank, dtype=torch.float64),
        torch.zeros(1, dtype=torch.float64),
        torch.zeros(1, rank, dtype=torch.float64),
        softcap,
    ), draw(n, rank)


def shaped(z, k, t, rank=3, **options):
    """Return the top k and exact tail of teacher logits z (n, V), with a random shape of the
    tail."""
    shape, coef = any_basis(z.shape[1], rank, len(z), **options)
    return replace(keep(z, k, t), coef=coef, basis=shape)


def dense(kept, t):
    """Return the teacher (n, V) that a TopK with a basis stands for: exact at the top k, the tail's
    exact mass by softmax of the basis' logits."""
    z = kept.basis.mean + kept.coef @ kept.basis.rows
    z = kept.basis.softcap * torch.tanh(z / kept.basis.softcap) if kept.basis.softcap else z
    rows = []
    for ids, gap, tail, logit in zip(kept.ids, kept.gap, kept.tail, z, strict=True):
        outside = [j for j in range(len(logit)) if j not in ids.tolist()]
        p = torch.zeros(len(logit), dtype=torch.float64)
        p[ids] = torch.exp(-gap / t)
        if outside:
            p[outside] = torch.softmax(logit[outside] / t, 0) * tail.exp()
        rows.append(p / p.sum())
    return torch.stack(rows)


def dense_loss(p, s, labels, method):
    """Return the loss of student logits s (n, V) against teacher probabilities p (n, V), by its
    definition."""
    t = method.temperature
    kd = reference_divergence(p, torch.softmax(s / t, 1), method.divergence, method.beta).sum()
    ce = torch.nn.functional.cross_entropy(s, labels, reduction="sum")
    return method.alpha * power(method.divergence, t) * kd + (1 - method.alpha) * ce


def teacher(n=600, v=97, d=12, seed=3, bias=False, **head):
    """Return a teacher's head and its hidden states (n, d), float32: few directions of large
    variance, and a mean that is not zero."""
    draw = draws(seed)
    rotation = torch.linalg.qr(draw(d, d))[0]
    hidden = (draw(n, d) * 1.2 * 0.75 ** torch.arange(d)) @ rotation + draw(d)
    head = dict(scale=1.0) | head
    return (
        Head((draw(v, d) / head["scale"]).float(), draw(v).float() if bias else None, v, **head),
        hidden.float(),
    )


def logits_of(head, hidden):
    """Return a teacher's logits (n, V) in float64, written out."""
    z = hidden.double() @ head.weight.double()[: head.vocab].t()
    z = head.scale * (z if head.bias is None else z + head.bias.double())
    return head.softcap * torch.tanh(z / head.softcap) if head.softcap else z


def token_shares(z, k):
    """Return how much of the tails' mass at T=2 each token holds (V,): top k left out, summed over
    all targets."""
    p = torch.softmax(z / 2, 1)
    for row, ids in zip(p, z.topk(k, 1).indices, strict=True):
        row[ids] = 0.0
    return p.sum(0) / p.sum()


def double(shape):
    return replace(
        shape, **{name: getattr(shape, name).double() for name in basis.TENSORS if name != "bits"}
    )


def fitted(k=5, rank=12, size=12, **options):
    """Return a teacher's logits (n, V), what a dump would keep of them before rounding, at T = 2,
    and the basis, in float64."""
    head, hidden = teacher(**options)
    shape, z = double(fit.fit_basis(head, hidden, k, rank, size)[0]), logits_of(head, hidden)
    return z, replace(keep(z, k, 2.0), coef=shape.encode(hidden), basis=shape), shape


# --- the loss over all tokens


@pytest.mark.parametrize("t", TEMPERATURES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_agrees_with_finite_differences_through_softcap_scale_and_bias(kind, t):
    hidden, weight, labels, z = problem(n=3, v=11, d=4)
    bias, kept, method = (
        torch.linspace(-1, 1, 11, dtype=torch.float64),
        shaped(z, 3, t, softcap=6.0),
        Method(0.6, t, kind, BETAS[kind]),
    )

    def loss_of(h, w, b):
        return losses.head_loss(h, Head(w, b, 11, scale=0.7, softcap=5.0), labels, kept, method)[0]

    leaves = (hidden, weight, bias)
    _, *grads = gradients(loss_of, *leaves)
    for number, grad in enumerate(grads):
        for place in range(grad.numel()):
            ends = []
            for step in (1e-5, -1e-5):
                moved = [leaf.clone() for leaf in leaves]
                moved[number].view(-1)[place] += step
                ends.append(loss_of(*moved).item())
            assert (
                abs((ends[0] - ends[1]) / 2e-5 - grad.flatten()[place].item())
                < 2e-8 * max(1, abs(ends[0])) + 1e-7
            ), (number, place)


@pytest.mark.parametrize("softcap", (0.0, 3.0))
@pytest.mark.parametrize("t", TEMPERATURES)
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient_equal_a_dense_teacher_written_out_over_the_full_vocabulary(
    kind, t, softcap
):
    hidden, weight, labels, z = problem()
    kept, method = shaped(z, 4, t, softcap=softcap), Method(0.7, t, kind, BETAS[kind])
    p = dense(kept, t)
    all_close(
        ours(hidden, weight, labels, kept, method),
        gradients(lambda h, w: dense_loss(p, h @ w.t(), labels, method), hidden, weight),
    )


def test_the_two_parts_of_the_loss_are_a_divergence_and_a_cross_entropy_in_nats():
    hidden, weight, labels, z = problem()
    kept, s = shaped(z, 4, 2.0), hidden @ weight.t()
    loss, ce, kd = losses.head_loss(hidden, Head(weight, None, 23), labels, kept, Method(0.3, 2.0))
    wanted = reference_divergence(dense(kept, 2.0), torch.softmax(s / 2, 1), "fkl", 0.5).sum()
    all_close(
        (loss, ce, kd),
        (
            0.3 * 4 * wanted + 0.7 * ce,
            torch.nn.functional.cross_entropy(s, labels, reduction="sum"),
            wanted,
        ),
    )


@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("t", TEMPERATURES)
@pytest.mark.parametrize("kind", KINDS)
def test_as_many_dimensions_as_the_hidden_states_have_give_the_divergence_over_the_full_vocabulary(
    kind, t, options
):
    z, kept, _ = fitted(n=80, **options)
    kept, method = (
        replace(keep(z, 5, t), coef=kept.coef, basis=kept.basis),
        Method(1.0, t, kind, BETAS[kind]),
    )
    hidden, weight, labels, _ = problem(n=80, v=97, d=7, spread=1.0)
    full = gradients(
        lambda h, w: dense_loss(torch.softmax(z / t, 1), h @ w.t(), labels, method), hidden, weight
    )
    for seen, wanted in zip(ours(hidden, weight, labels, kept, method), full, strict=True):
        assert (seen - wanted).norm() < 1e-5 * wanted.norm()


@pytest.mark.parametrize("t", TEMPERATURES)
@pytest.mark.parametrize("kind", KINDS)
def test_k_equal_to_v_is_the_divergence_over_the_full_vocabulary_whatever_the_basis(kind, t):
    hidden, weight, labels, z = problem()
    method = Method(1.0, t, kind, BETAS[kind])
    wanted = gradients(
        lambda h, w: dense_loss(torch.softmax(z / t, 1), h @ w.t(), labels, method), hidden, weight
    )
    all_close(ours(hidden, weight, labels, shaped(z, 23, t), method), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_equal_to_its_target_has_no_divergence_and_no_gradient(kind):
    _, _, labels, z = problem()
    kept = shaped(z, 4, 2.0)
    s = 2 * dense(kept, 2.0).log()
    loss, *grads = ours(
        s, torch.eye(23, dtype=s.dtype), labels, kept, Method(1.0, 2.0, kind, BETAS[kind])
    )
    assert abs(loss) < 1e-12
    assert kind == "tvd" or all(
        grad.abs().max() < 1e-12 for grad in grads
    )  # |p - q| has a kink there


@pytest.mark.parametrize("t", TEMPERATURES)
@pytest.mark.parametrize("kind", KINDS)
def test_targets_whose_shape_is_worse_than_none_are_a_bucket(kind, t):
    """In loss and gradient, beside others that keep their shape."""
    hidden, weight, labels, z = problem()
    kept, method = shaped(z, 4, t), Method(0.7, t, kind, BETAS[kind])
    shapeless = torch.arange(len(z)) % 3 == 1
    seen = ours(hidden, weight, labels, replace(kept, shapeless=shapeless), method)
    wanted = [torch.zeros_like(part) for part in seen]
    for some, teacher in ((shapeless, keep(z, 4, t)), (~shapeless, kept)):
        part = torch.nonzero(some)[:, 0]
        picked = TopK(*(getattr(teacher, name)[part] for name in ("ids", "gap", "tail")))
        if teacher.basis:
            picked = replace(picked, coef=teacher.coef[part], basis=teacher.basis)
        loss, grad, grad_weight = ours(hidden[part], weight, labels[part], picked, method)
        wanted[0] += loss
        wanted[1][part] = grad
        wanted[2] += grad_weight
    all_close(seen, wanted)


def test_measures_too_take_targets_without_a_shape_as_a_bucket():
    z = problem(n=13)[3]
    kept, student = shaped(z, 4, 1.0), 2 * torch.randn(13, 23, dtype=torch.float64)
    student -= student.amax(1, keepdim=True)
    shapeless = torch.arange(13) % 2 == 0
    seen = losses.distance(student.clone(), replace(kept, shapeless=shapeless))
    bucket = losses.distance(student.clone(), keep(z, 4, 1.0))
    plain = losses.distance(student.clone(), kept)
    for made, one, other in zip(seen, bucket, plain, strict=True):
        all_close([made], [torch.where(shapeless, one, other)])


def test_a_constant_in_the_tails_logits_changes_nothing_and_more_categories_tell_more():
    hidden, weight, labels, z = problem()
    kept, method = shaped(z, 4, 2.0), Method(0.7, 2.0)
    moved = replace(kept, basis=replace(kept.basis, mean=kept.basis.mean + 500))
    all_close(
        ours(hidden, weight, labels, moved, method), ours(hidden, weight, labels, kept, method)
    )
    assert (
        ours(hidden, weight, labels, kept, method)[0]
        > ours(hidden, weight, labels, keep(z, 4, 2.0), method)[0] + 0.1
    )


@pytest.mark.parametrize("targets", (1, 4, 1000))
@pytest.mark.parametrize("kind", KINDS)
def test_the_chunk_size_changes_nothing(kind, targets, monkeypatch):
    hidden, weight, labels, z = problem(n=13)
    kept, method = shaped(z, 4, 2.0), Method(0.7, 2.0, kind, BETAS[kind])
    whole = ours(hidden, weight, labels, kept, method)
    monkeypatch.setattr(heads, "CHUNK_BYTES", 4 * len(weight) * targets)
    assert Head(weight, None, len(weight)).chunk() == targets
    all_close(ours(hidden, weight, labels, kept, method), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("targets", (0.5, 1, 4, 12))
@pytest.mark.parametrize("kind", KINDS)
def test_the_piece_size_changes_nothing(kind, targets, monkeypatch):
    hidden, weight, labels, z = problem(n=13)
    kept, method = shaped(z, 4, 2.0), Method(0.7, 2.0, kind, BETAS[kind])
    whole = ours(hidden, weight, labels, kept, method)
    pieces, plain = [], losses.TopK.logp_all
    monkeypatch.setattr(
        losses.TopK, "logp_all", lambda kept, z, t: pieces.append(len(z)) or plain(kept, z, t)
    )
    monkeypatch.setitem(losses.PIECE_BYTES, "cpu", int(8 * len(weight) * targets))
    all_close(ours(hidden, weight, labels, kept, method), whole, rtol=1e-12, atol=1e-12)
    assert sum(pieces) == 13 and max(pieces) == max(1, targets), pieces


@pytest.mark.parametrize("targets", (1, 4, 12))
def test_the_piece_size_changes_no_measure(targets, monkeypatch):
    """At V = 262,144 a piece is 16 targets: a chunk of val has several."""
    z = problem(n=13)[3]
    kept, students = shaped(z, 4, 1.0), z - z.amax(1, keepdim=True)
    whole = losses.distance(students.clone(), kept)
    monkeypatch.setitem(losses.PIECE_BYTES, "cpu", 8 * z.shape[1] * targets)
    for part, all_at_once in zip(losses.distance(students.clone(), kept), whole):
        all_close([part], [all_at_once])


def test_a_batch_without_targets_has_loss_zero_and_backward_works():
    hidden, weight, labels, z = problem(n=0)
    kept = TopK(
        torch.zeros(0, 4, dtype=torch.long),
        torch.zeros(0, 4),
        torch.zeros(0),
        torch.zeros(0, 3),
        any_basis(23, 3, 0)[0],
    )
    loss, grad, grad_weight = ours(hidden, weight, labels, kept, Method(0.5, 2.0))
    assert (
        loss == 0
        and grad.shape == (0, 5)
        and grad_weight.shape == weight.shape
        and not grad_weight.any()
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("tail", (-200.0, -math.inf))
@pytest.mark.parametrize("far", (30.0, 3000.0, 60000.0))
@pytest.mark.parametrize("t", (1.0, 8.0))
def test_a_confident_teacher_and_a_confident_student_give_no_nan(kind, dtype, tail, far, t):
    shape = any_basis(9, 2, 1)[0]
    shape = replace(
        double(shape), mean=torch.linspace(-far, far, 9).to(dtype), rows=shape.rows.to(dtype)
    )
    kept = TopK(
        torch.tensor([[3, 1, 4]]),
        torch.tensor([[0.0, far, far]], dtype=dtype),
        torch.tensor([tail], dtype=dtype),
        torch.tensor([[1.0, far]], dtype=dtype),
        shape,
    )
    for first, others in (
        (3, 0.0),
        (3, -far),
        (1, -far),
        (7, -far),
    ):  # flat; sure of the same; sure of another in S; sure of one outside S
        s = torch.full((1, 9), others, dtype=dtype)
        s[0, first] = 0.0
        loss, grad, _ = ours(
            s, torch.eye(9, dtype=dtype), torch.tensor([3]), kept, Method(1.0, t, kind, BETAS[kind])
        )
        assert torch.isfinite(loss) and torch.isfinite(grad).all(), (first, others, loss, grad)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_gives_the_gradient_of_float64(kind):
    hidden, weight, labels, z = problem(n=40, v=97)
    kept, method = shaped(z, 4, 2.0), Method(0.7, 2.0, kind, BETAS[kind])
    shape = replace(kept.basis, mean=kept.basis.mean.float(), rows=kept.basis.rows.float())
    single = TopK(kept.ids, kept.gap.float(), kept.tail.float(), kept.coef.float(), shape)
    all_close(
        [x.double() for x in ours(hidden.float(), weight.float(), labels, single, method)],
        ours(hidden, weight, labels, kept, method),
        rtol=1e-4,
        atol=1e-4,
    )


# --- the fit


@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
def test_rows_are_orthonormal_under_the_tokens_weights_and_centred_where_no_soft_cap_could_see_a_constant(
    options,
):
    head, hidden = teacher(**options)
    rows, share = (
        double(fit.fit_basis(head, hidden, 5, 7, 7)[0]).rows,
        token_shares(logits_of(head, hidden), 5),
    )
    centred = rows - (rows @ share)[:, None]
    all_close(
        [(centred * share) @ centred.t()], [torch.eye(7, dtype=torch.float64)], rtol=0, atol=1e-4
    )
    assert options.get("softcap") or (rows @ share).abs().max() < 1e-5


def test_rows_and_coefficients_are_the_principal_components_of_the_weighted_logits():
    head, hidden = teacher(bias=True)
    shape, z = double(fit.fit_basis(head, hidden, 5, 6, 6)[0]), logits_of(head, hidden)
    share = token_shares(z, 5)
    away = z - z.mean(0)
    away = away - (away @ share)[:, None]
    u, s, v = torch.linalg.svd(away * share.sqrt(), full_matrices=False)
    coef, rows = u[:, :6] * s[:6], v[:6] / share.sqrt()
    signs = (rows * shape.rows * share).sum(1).sign()
    all_close(
        (shape.encode(hidden) * signs, shape.rows * signs[:, None]), (coef, rows), rtol=0, atol=2e-3
    )


@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
def test_as_many_dimensions_as_the_hidden_states_have_give_the_logits_back(options):
    z, kept, shape = fitted(**options)
    seen = shape.logits(kept.coef)
    if "softcap" not in options:  # up to a constant a target, which no softmax sees
        seen, z = (x - x.mean(1, keepdim=True) for x in (seen, z))
    assert (seen - z).abs().max() < 1e-4 * z.abs().max()


def test_fewer_tokens_than_dimensions_are_no_trouble():
    z, kept, shape = fitted(v=9, k=3)
    assert torch.isfinite(shape.rows).all() and torch.isfinite(kept.coef).all()
    seen = shape.logits(kept.coef)
    assert ((seen - z) - (seen - z).mean(1, keepdim=True)).abs().max() < 1e-3


def test_more_dimensions_never_fit_worse():
    head, hidden = teacher()
    z, k = logits_of(head, hidden), 5
    share, errors, held_by = token_shares(z, k), [], []
    for rank in range(1, 13):
        shape, held = fit.fit_basis(head, hidden, k, rank, rank)
        off = double(shape).logits(shape.encode(hidden).double()) - z
        errors.append(((off - (off @ share)[:, None]) ** 2 @ share).mean().item())
        held_by.append(held)
    assert (
        all(after < before for before, after in itertools.pairwise(errors))
        and errors[-1] < 1e-6 * errors[0]
    ), errors
    assert (
        all(after > before for before, after in itertools.pairwise(held_by))
        and 0 < held_by[0]
        and 0.999 < held_by[-1] <= 1
    ), held_by


@pytest.mark.parametrize("size", (1, 3, 12))
def test_the_share_of_variance_that_is_reported_is_what_the_packed_coefficients_hold(size):
    head, hidden = teacher()
    (shape, held), z = fit.fit_basis(head, hidden, 5, 12, size), logits_of(head, hidden)
    share = token_shares(z, 5)

    def variance(x):
        return ((x - (x @ share)[:, None]) ** 2 @ share).mean()

    off = double(shape).logits(shape.unpack(shape.pack(shape.encode(hidden))).double()) - z
    assert abs(held - (1 - variance(off) / variance(z - z.mean(0)))) < 1e-3


def test_two_fits_are_equal_bit_for_bit():
    once, again = (fit.fit_basis(*teacher(), 5, 7, 4)[0] for _ in range(2))
    for name in basis.TENSORS:
        assert torch.equal(*(getattr(shape, name) for shape in (once, again))), name


def test_a_basis_comes_back_from_its_file_with_rows_in_half_and_all_else_exact(tmp_path):
    shape = fit.fit_basis(*teacher(softcap=4.0), 5, 7, 4)[0]
    basis.save(shape, tmp_path / "basis.safetensors", {"teacher": "me"})
    back, about = basis.load(tmp_path / "basis.safetensors", "nothing")
    assert back.softcap == shape.softcap
    for name in basis.TENSORS:
        a, b = (getattr(each, name) for each in (shape, back))
        assert torch.equal(a.half() if name == "rows" else a, b), name
    assert about["teacher"] == "me" and [path.name for path in tmp_path.iterdir()] == [
        "basis.safetensors"
    ]


def test_a_teacher_whose_tails_all_underflow_has_a_basis_all_the_same():
    head, hidden = teacher(bias=True)
    head.bias[17] = 1000.0
    shape = fit.fit_basis(head, hidden, 5, 3, 3)[0]
    assert torch.isfinite(shape.rows).all() and torch.isfinite(shape.encode(hidden)).all()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_the_covariance_in_pieces_is_the_whole_one(dtype, monkeypatch):
    hidden, weight = teacher(n=1003)[1].to(dtype), 1.0 + torch.arange(1003) % 3
    monkeypatch.setattr(fit, "PIECE", 100)
    center, covariance = fit.moments(hidden, weight)
    whole = hidden.double().repeat_interleave(weight.long(), 0)
    assert center.dtype == torch.float32
    torch.testing.assert_close(center.double(), whole.mean(0), rtol=0, atol=1e-6)
    wanted = whole.t().cov(correction=0)
    torch.testing.assert_close(covariance, wanted, rtol=1e-5, atol=1e-6)


def test_a_few_rows_of_another_kind_weigh_more_and_are_told_better():
    """Thirty rows whose states move in six of twelve directions, and one that moves in the other
    six, by less than any of these."""
    head, draw = teacher()[0], draws(4)
    common, rare = draw(30 * 20, 12).float(), draw(20, 12).float()
    common[:, 6:], rare[:, :6] = 0.05 * common[:, 6:], 0.05 * rare[:, :6]
    hidden = torch.cat([common, rare])
    counts = [20] * 31
    weight = fit.row_weights(hidden, torch.eye(12, dtype=torch.float64), 6, counts)
    assert weight[-20:].eq(weight[-1]).all() and weight[-1] == fit.MOST_WEIGHT
    assert weight[:-20].max() < 3 and weight.min() == 1

    def left(counts):
        shape, _ = fit.fit_basis(head, hidden, 5, 6, 6, counts)
        off = double(shape).logits(shape.encode(rare).double()) - logits_of(head, rare)
        return (off - off.mean(1, keepdim=True)).square().mean()

    assert left(counts) < 0.8 * left(None)


def test_rows_told_badly_are_those_of_the_rare_kind_that_have_more_to_give(monkeypatch):
    head, draw = teacher()[0], draws(4)
    kinds = draw(33 * 20, 12).float()
    kinds[: 30 * 20, 6:] *= 0.05
    kinds[30 * 20 :, :6] *= 0.05
    targets = [20] * 30 + [90, 20, 70]  # the rare ones: 30, 31, 32
    split = data.Split.of([(np.zeros(n + 1, np.uint32), np.arange(n + 1) > 0, 0) for n in targets])
    order = [*range(32, -1, -1)]
    states = torch.cat([kinds[20 * row : 20 * row + 20] for row in order])
    taken = sample.Sample(states, order, [20] * 33)
    assert fit.odd_rows(head, taken, 5, 6, split).tolist() == [30, 32]
    monkeypatch.setattr(sample, "MOST", 100)  # both have 160 to give
    assert len(fit.odd_rows(head, taken, 5, 6, split)) == 1


def test_even_places_of_a_running_sum():
    weight = torch.tensor([1.0, 1.0, 2.0, 0.5])
    assert fit.places_of(weight, 4).tolist() == [0, 1, 2, 2]
    assert fit.places_of(torch.ones(5), 99).tolist() == [0, 1, 2, 3, 4]
    assert fit.places_of(torch.ones(100), 10).tolist() == [*range(4, 100, 10)]


# --- bits


@pytest.mark.parametrize("bits, distortion", ((1, 0.3634), (2, 0.1188), (3, 0.03744), (4, 0.01154)))
def test_the_error_of_a_gaussian_is_that_of_the_best_uniform_quantizer(bits, distortion):
    """Max, IRE Trans. IT-6 (1960), table II."""
    spent, _, error = fit.spend_bits(3 * draws(0)(200_000, 1).float(), bits)
    assert spent.tolist() == [bits] and abs(error.item() / 9 / distortion - 1) < 0.02


def columns(n=2000, seed=5):
    return (draws(seed)(n, 3) * torch.tensor([3.0, 1.0, 0.2])).float()


@pytest.mark.parametrize("budget", range(25))
def test_bits_are_spent_as_the_best_of_all_ways_spends_them(budget):
    coef = columns()
    alone = [
        [fit.spend_bits(coef[:, [i]], bits)[2].item() for bits in range(9)] for i in range(3)
    ]  # what b bits leave of a column's error
    best = min(
        sum(alone[i][b] for i, b in enumerate(bits))
        for bits in itertools.product(range(9), repeat=3)
        if sum(bits) == budget
    )
    bits, _, error = fit.spend_bits(coef, budget)
    assert bits.sum() == budget and bits.max() <= 8
    assert abs(error.sum().item() - best) <= 1e-6 * best, (bits, best)


@pytest.mark.parametrize(
    "budget, spent", ((0, 0), (1, 1), (23, 23), (24, 24), (25, 24), (1000, 24))
)
def test_the_budget_is_spent_to_the_bit_and_no_coefficient_has_more_than_eight(budget, spent):
    bits = fit.spend_bits(columns(), budget)[0]
    assert bits.sum() == spent and bits.max() <= 8 and bits.dtype == torch.uint8


@pytest.mark.parametrize("budget", (1, 7, 13, 24))
def test_the_error_that_is_reported_is_the_error_of_what_comes_back(budget):
    coef = columns()
    bits, step, error = fit.spend_bits(coef, budget)
    shape = replace(any_basis(5, 3, 1)[0], bits=bits, step=step)
    torch.testing.assert_close(
        (shape.unpack(shape.pack(coef)) - coef).square().mean(0), error, rtol=1e-4, atol=1e-9
    )


@pytest.mark.parametrize(
    "bits", ([1], [3, 5], [8, 7, 1], [1] * 11, [2, 3, 5, 7, 8, 8, 6, 1, 4], [8] * 4, [0, 3, 0, 8])
)
def test_what_is_packed_comes_back_to_half_a_step(bits):
    bits = torch.tensor(bits, dtype=torch.uint8)
    shape = replace(
        any_basis(5, len(bits), 1)[0], bits=bits, step=torch.linspace(0.01, 2, len(bits))
    )
    ends = shape.step * 2.0 ** (bits.float() - 1)
    coef = (
        (2 * torch.rand(500, len(bits), generator=torch.Generator().manual_seed(0)) - 1)
        * ends
        * 0.9999
    )
    packed = shape.pack(coef)
    assert packed.dtype == np.uint8 and packed.shape == (500, -(-int(bits.sum()) // 8))
    there = bits > 0
    assert ((shape.unpack(packed) - coef).abs() <= 0.5001 * shape.step)[:, there].all()
    assert (shape.unpack(packed)[:, ~there] == 0).all()


def test_a_coefficient_beyond_its_range_is_held_at_the_last_step():
    shape = replace(
        any_basis(5, 2, 1)[0],
        bits=torch.tensor([3, 8], dtype=torch.uint8),
        step=torch.tensor([0.5, 0.25]),
    )
    back = shape.unpack(shape.pack(torch.tensor([[1e9, -1e9], [-1e9, 1e9]])))
    assert back.tolist() == [[3.5 * 0.5, -127.5 * 0.25], [-3.5 * 0.5, 127.5 * 0.25]]


def test_packing_has_a_golden_that_old_files_hold_us_to():
    shape = replace(
        any_basis(5, 3, 1)[0],
        bits=torch.tensor([3, 8, 5], dtype=torch.uint8),
        step=torch.tensor([1.0, 0.5, 2.0]),
    )
    coef = torch.tensor(
        [[-3.5, 10.4, 5.8]]
    )  # steps 0 (of 8), 148 (of 256), 18 (of 32), lowest bits first
    assert shape.pack(coef).tolist() == [[(148 << 3) & 255, 148 >> 5 | 18 << 3]]
    assert shape.unpack(shape.pack(coef)).tolist() == [[-3.5, 10.25, 5.0]]


@pytest.mark.parametrize(
    "rank, size", ((12, 1), (12, 3), (12, 5), (12, 12), (5, 5), (5, 2), (1, 1))
)
def test_a_fit_spends_its_bytes_to_the_last_bit(rank, size):
    head, hidden = teacher()
    shape = fit.fit_basis(head, hidden, 5, rank, size)[0]
    assert shape.bits.sum() == 8 * size and shape.pack(shape.encode(hidden)).shape == (
        len(hidden),
        size,
    )
    assert (
        len(shape.bits) == len(shape.rows) == len(shape.step) == shape.encoder.shape[1] <= rank
        and shape.bits.min() > 0
    )
    assert shape.rows.shape == (len(shape.bits), 97) and shape.mean.shape == (97,)


# --- on a tiny teacher, from disk

SMALL = ("--tail-rank", 8, "--tail-bytes", 4)
NONE = ("--tail-rank", 0)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Return a folder with a data set of three chunks and four dumps: all 32 dimensions, 8 in 4
    bytes, none, and another teacher's."""
    folder = make.world(tmp_path_factory.mktemp("world"), rows=40, rows_per_chunk=16)
    make.model(folder / "other", seed=9)
    for out, more in (
        ("logits", ()),
        ("small", SMALL),
        ("none", NONE),
        ("others", ("--teacher", folder / "other")),
    ):
        make.call(dump_logits.main, *make.dump(folder, *more, out=out))
    return folder


def some(folder, split="train"):
    return getattr(data.Dataset(folder / "data"), split).batch(
        [[row] for row in ((3, 20, 39, 0, 17, 25) if split == "train" else range(8))]
    )


def wide(kept):
    """Return a TopK in float64."""
    return TopK(
        kept.ids, kept.gap.double(), kept.tail.double(), kept.coef.double(), double(kept.basis)
    )


def kl(p, q):
    return reference_divergence(p, q, "fkl", 0.5)


@pytest.mark.parametrize("t", TEMPERATURES)
@pytest.mark.parametrize("name, share", (("small", 0.9), ("logits", 0.02)))
def test_the_target_is_nearer_to_the_teacher_than_one_whose_tail_is_spread_evenly(
    world, t, name, share
):
    batch = some(world)
    p, kept = (
        torch.softmax(teacher_logits(world, batch) / t, 1),
        wide(make.store(world, t, name).at(batch, t)),
    )
    even = replace(
        kept,
        coef=torch.zeros(len(p), 1, dtype=torch.float64),
        basis=replace(
            kept.basis,
            mean=torch.zeros(make.V, dtype=torch.float64),
            rows=torch.zeros(1, make.V, dtype=torch.float64),
        ),
    )
    seen, flat = kl(p, dense(kept, t)).mean(), kl(p, dense(even, t)).mean()
    assert seen < share * flat and flat > 0.005, (seen, flat)


@pytest.mark.parametrize("t", (2.0, 4.0))
@pytest.mark.parametrize("name, share", (("small", 0.9), ("logits", 0.1)))
def test_the_gradient_of_a_student_far_from_its_teacher_is_nearer_to_full_distillation_than_the_buckets(
    world, t, name, share
):
    batch, student = some(world), models.load(str(world / "student"), torch.device("cpu"))
    hidden, weight = (
        student.hidden(batch).detach().double(),
        student.head().weight.detach().double(),
    )
    p, kept, method = (
        torch.softmax(teacher_logits(world, batch) / t, 1),
        wide(make.store(world, t, name).at(batch, t)),
        Method(1.0, t),
    )
    full = gradients(lambda h, w: dense_loss(p, h @ w.t(), batch.labels, method), hidden, weight)
    shape, bucket = (
        ours(hidden, weight, batch.labels, each, method)
        for each in (kept, replace(kept, coef=None, basis=None))
    )
    for place in (1, 2):  # of hidden, of weight
        seen, coarse = (angle(each[place], full[place]) for each in (shape, bucket))
        assert seen < share * coarse and coarse > 5, (seen, coarse)


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_on_disk_with_all_its_dimensions_gives_the_loss_of_the_teacher_live(world, kind):
    batch, student, method = (
        some(world),
        models.load(str(world / "student"), torch.device("cpu")),
        Method(0.9, 2.0, kind, BETAS[kind]),
    )
    hidden, weight = student.hidden(batch).detach(), student.head().weight.detach()
    seen = ours(hidden, weight, batch.labels, make.store(world).at(batch, 2.0), method)
    p = torch.softmax(teacher_logits(world, batch) / 2, 1)
    wanted = gradients(
        lambda h, w: dense_loss(p, h @ w.t(), batch.labels, method),
        hidden.double(),
        weight.double(),
    )
    for a, b in zip(seen, wanted, strict=True):
        assert (a - b).norm() < (0.05 if kind == "tvd" else 0.02) * b.norm(), (
            a - b
        ).norm() / b.norm()  # a kink of |p - q| may lie between


@pytest.mark.parametrize("name", ("logits", "small"))
def test_coefficients_on_disk_follow_target_numbers_and_are_the_teachers_own(world, name):
    whole, batch = make.store(world, name=name), some(world)
    teacher = models.load(str(world / "teacher"), torch.device("cpu"))
    kept = whole.at(batch, 2.0)
    wanted = whole.shape.encode(teacher.hidden(batch).detach())
    ends = whole.shape.step * 2.0 ** (whole.shape.bits.float() - 1)
    off = (kept.coef - wanted.clamp(-ends, ends)).abs()
    assert (
        kept.coef.shape == (len(batch.labels), len(whole.shape.bits))
        and (off <= 0.51 * whole.shape.step).all()
    )
    assert (kept.coef[0] != kept.coef[-1]).any()


def test_val_and_train_targets_are_shaped_by_the_same_basis(world):
    whole = make.store(world)
    kept = record.unpack(
        whole.val.records[some(world, "val").numbers.numpy()],
        make.V,
        1,
        whole.shape.to(torch.device("cpu")),
    )
    p = torch.softmax(teacher_logits(world, some(world, "val")) / 2, 1)
    assert kl(p, dense(wide(kept), 2.0)).mean() < 1e-3


# --- the dump

PARTS = ("chunk-0000", "chunk-0001", "chunk-0002", "val")


def metas(folder):
    """Return what the parts of a dump say of themselves, but for the path the teacher was read
    from."""
    return [
        {
            name: value
            for name, value in files.read_json(folder / part / "meta.json").items()
            if name not in ("teacher_folder", "seal")
        }
        for part in PARTS
    ]


def same_dump(seen, wanted):
    for path in ("basis.safetensors", *(f"{part}/topk.npy" for part in PARTS)):
        assert (seen / path).read_bytes() == (wanted / path).read_bytes(), path
    assert metas(seen) == metas(wanted)


@pytest.mark.parametrize("name", ("logits", "small", "others"))
def test_all_parts_of_a_dump_hold_the_hash_of_one_basis(world, name):
    assert {meta["basis"] for meta in metas(world / name)} == {
        files.sha256(world / name / "basis.safetensors")
    }


def test_the_basis_says_what_it_was_fitted_to(world):
    _, about = basis.load(world / "small" / "basis.safetensors", "")
    meta = metas(world / "small")[0]
    assert {
        name: about[name] for name in ("teacher", "data", "vocab", "k", "tail_rank", "tail_bytes")
    } == {
        "teacher": checkpoints.identity(world / "teacher"),
        "data": meta["data"],
        "vocab": 61,
        "k": 8,
        "tail_rank": 8,
        "tail_bytes": 4,
    }
    assert (
        about["targets"] == data.Dataset(world / "data").train.targets and 0 < about["variance"] < 1
    )


@pytest.mark.parametrize("worse", (0.02, 1.0))
def test_a_record_says_how_far_it_is_from_the_teacher(world, tmp_path, monkeypatch, worse):
    """Its error is the KL written out over all tokens, to the 4.5 % of its code and what gaps lose
    in a byte; those beyond WORSE / T^2 in the tail say that they have no shape, and meta.json has
    the figures of the rest."""
    monkeypatch.setattr(writer, "WORSE", worse)
    make.call(dump_logits.main, *make.dump(world, *SMALL, "--chunk", "val", out=tmp_path / "made"))
    dataset = data.Dataset(world / "data")
    reader = logits.Records(tmp_path / "made", dataset, None)
    batch, meta = (
        dataset.val.batch([[row] for row in range(len(dataset.val.rows))]),
        reader.val.meta,
    )
    records, z = reader.val.records[batch.numbers.numpy()], teacher_logits(world, batch)
    for column, t in enumerate(meta["temperatures"]):
        known, shape = record.unpack(records, make.V, column, reader.shape), double(reader.shape)
        known = replace(known, **{part: getattr(known, part).double() for part in ("gap", "tail")})
        logq = known.logp_all(shape.logits(known.coef.double()), t)
        logp = (z / t).log_softmax(1)
        wanted = (logp.exp() * (logp - logq)).sum(1)
        codes = records["error"][:, column]
        shapeless = codes == record.SHAPELESS
        assert (known.shapeless is None and not shapeless.any()) or torch.equal(
            known.shapeless, torch.from_numpy(shapeless)
        )
        inside = torch.zeros_like(z, dtype=torch.bool).scatter(1, known.ids, True)
        tails = [each.masked_fill(inside, -torch.inf).log_softmax(1) for each in (z / t, logq)]
        within = (tails[0].exp() * (tails[0] - tails[1])).nan_to_num(0.0).sum(1)
        assert ((within > writer.WORSE / t**2).numpy() == shapeless).mean() > 0.98
        seen = torch.from_numpy(record.error_of(codes))
        there = torch.from_numpy(~shapeless)
        torch.testing.assert_close(seen[there], wanted[there].double(), rtol=0.06, atol=2e-3)
        said = meta["error"]["0"][f"{t:g}"]
        assert said["shapeless"] == pytest.approx(shapeless.mean())
        if there.any():
            assert said["mean"] == pytest.approx(seen[there].mean().item())
            assert said["p99"] == pytest.approx(np.percentile(seen[there].numpy(), 99))
    assert (worse < 1) == shapeless.any()


def test_codes_of_errors_come_back_to_4_5_percent_and_have_a_golden():
    nats = np.geomspace(2.0**-19, 100.0, 500)
    back = record.error_of(record.error_code(nats))
    assert (np.abs(back / nats - 1) < 0.045).all()
    assert record.error_code(np.array([0.0, 2.0**-20, 2.0**-19, 1.0, 1e30])).tolist() == [
        0, 0, 8, 160, 254,
    ]  # fmt: skip
    assert record.error_of(np.array([0, 255], np.uint8)).tolist() == [0.0, np.inf]


def test_a_source_that_the_basis_does_not_fit_is_warned_of_and_trains_as_a_bucket(
    world, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(writer, "WORSE", 0.0)
    make.call(dump_logits.main, *make.dump(world, *SMALL, out=tmp_path / "logits"))
    said = capsys.readouterr().out
    assert "WARNING: the basis does not fit 0: 100.0% of its records fall back" in said
    dataset = data.Dataset(world / "data")
    bad, none = (logits.Records(at, dataset, 2.0) for at in (tmp_path / "logits", world / "none"))
    batch = dataset.train.batch([[3, 7]])
    hidden, weight, labels, _ = problem(n=len(batch.labels), v=make.V, d=5)
    hidden, weight = hidden.float(), weight.float()
    ours_, bucket = (
        ours(hidden, weight, labels, each.at(batch, 2.0), Method(0.7, 2.0)) for each in (bad, none)
    )
    all_close(ours_, bucket, rtol=1e-6, atol=1e-6)


def test_older_chunks_whose_records_have_no_errors_go_with_newer_ones(world, tmp_path, monkeypatch):
    plain = writer.dump_settings
    monkeypatch.setattr(writer, "WORSE", 0.02)
    make.call(dump_logits.main, *make.dump(world, *SMALL, out=tmp_path / "new"))

    def older(*args):
        return {name: value for name, value in plain(*args).items() if name != "errors"}

    argv = make.dump(world, *SMALL, out=tmp_path / "logits")
    monkeypatch.setattr(writer, "dump_settings", older)
    make.call(dump_logits.main, *argv, "--chunk", 1)
    monkeypatch.setattr(writer, "dump_settings", plain)
    make.call(dump_logits.main, *argv)
    dataset = data.Dataset(world / "data")
    mixed, new = (
        logits.Records(at, dataset, 2.0) for at in (tmp_path / "logits", tmp_path / "new")
    )
    assert "error" not in mixed.parts[1].records.dtype.names
    batch = dataset.train.batch([[3], [17], [35]])
    seen, wanted = mixed.at(batch, 2.0), new.at(batch, 2.0)
    for name in ("ids", "gap", "tail", "coef"):
        assert torch.equal(getattr(seen, name), getattr(wanted, name)), name
    old = torch.from_numpy(np.isin(batch.numbers, new_numbers(dataset, 17)))
    assert not seen.shapeless[old].any()
    assert torch.equal(seen.shapeless[~old], wanted.shapeless[~old])


def new_numbers(dataset, row):
    first = int(dataset.train.rows["first_target"][row])
    return np.arange(first, first + int(dataset.train.rows["targets"][row]))


@pytest.mark.parametrize("order", ((2, "val", 0, 1), ("val", 1, 0, 2)))
def test_a_dump_does_not_depend_on_which_chunk_came_first_and_makes_its_basis_once(
    world, tmp_path, capsys, order
):
    times = set()
    for chunk in order:
        make.call(
            dump_logits.main, *make.dump(world, "--chunk", chunk, "--out", tmp_path / "logits")
        )
        times.add((tmp_path / "logits" / "basis.safetensors").stat().st_mtime_ns)
    said = capsys.readouterr().out
    assert (
        len(times) == 1
        and len(
            re.findall(r"^basis .* 32 of 32 dimensions, in 32 bytes a target, hold ", said, re.M)
        )
        == 1
    ), said
    same_dump(tmp_path / "logits", world / "logits")


def trains(world, tmp_path, name, *more):
    """Train a student on a dump, downhill, and return the log of its steps."""
    more = (*make.DOWNHILL, "--alpha", 1, *more, "--out", tmp_path / "run")
    make.call(stage2_kd.main, *make.stage2(world, *more, logits=name))
    lines = make.history(tmp_path / "run", "train")
    make.assert_falls([line["loss"] for line in lines])
    return lines


def test_a_dump_without_a_basis_has_none_and_trains(world, tmp_path):
    assert not (world / "none" / "basis.safetensors").exists() and not any(
        "basis" in meta for meta in metas(world / "none")
    )
    kept = make.store(world, name="none").at(some(world), 2.0)
    assert kept.coef is None and kept.basis is None
    trains(world, tmp_path, "none", "--temperature", 2)


def test_a_finished_dump_without_a_basis_counts_as_such(mine, capsys):
    make.call(dump_logits.main, *make.dump(mine, *NONE, out="none"))
    assert capsys.readouterr().out.count("already finished; nothing to do") == 4
    code, words = make.ends(dump_logits.main, *make.dump(mine, out="none"))
    assert code == 1 and "finished with other settings; saw tail_rank 0 (now 32)" in words


def test_a_student_trains_on_a_dump_with_a_basis(world, tmp_path):
    trains(world, tmp_path, "small", "--temperature", 2)


@pytest.mark.parametrize("rank, size", ((32, 32), (8, 4), (20, 3)))
def test_the_preflight_names_the_size_of_the_basis_and_the_file_is_no_larger(
    world, tmp_path, capsys, rank, size
):
    make.call(
        dump_logits.main,
        *make.dump(
            world,
            "--tail-rank",
            rank,
            "--tail-bytes",
            size,
            "--chunk",
            "val",
            "--out",
            tmp_path / "logits",
        ),
    )
    wanted = basis.file_bytes(rank, make.V, 32)
    assert f"and {files.human(wanted)} of basis for all chunks" in capsys.readouterr().out
    assert (tmp_path / "logits" / "basis.safetensors").stat().st_size <= wanted + 4096
    if len(basis.load(tmp_path / "logits" / "basis.safetensors", "")[0].bits) == rank:
        assert wanted <= (tmp_path / "logits" / "basis.safetensors").stat().st_size


def test_a_disk_with_room_for_the_records_alone_is_too_small_until_the_basis_is_there(
    world, tmp_path, monkeypatch
):
    targets, dtype = (
        data.Dataset(world / "data").val.targets,
        record.record_dtype(8, [1.0, 2.0, 4.0], make.V, "u8", 32, errors=True),
    )
    monkeypatch.setattr(files, "free_bytes", lambda _: targets * dtype.itemsize)
    argv = make.dump(world, "--chunk", "val", "--out", tmp_path / "logits")
    code, words = make.ends(dump_logits.main, *argv)
    assert (
        code == 1
        and "is too small" in words
        and "--tail-rank" in words
        and not (tmp_path / "logits").exists()
    )
    (tmp_path / "logits").mkdir()
    shutil.copy(world / "logits" / "basis.safetensors", tmp_path / "logits")
    make.call(dump_logits.main, *argv)


def test_a_rank_above_the_teachers_width_is_cut_and_said(world, tmp_path, capsys):
    make.call(
        dump_logits.main,
        *make.dump(
            world,
            "--tail-rank",
            33,
            "--tail-bytes",
            200,
            "--chunk",
            0,
            "--out",
            tmp_path / "logits",
        ),
    )
    assert "--tail-rank 33 is cut to 32" in capsys.readouterr().out
    assert (tmp_path / "logits" / "chunk-0000" / "topk.npy").read_bytes() == (
        world / "logits" / "chunk-0000" / "topk.npy"
    ).read_bytes()


@pytest.mark.parametrize("k", (make.V - 1, make.V))
def test_a_tail_of_one_token_or_none_has_no_basis(world, tmp_path, k):
    make.call(dump_logits.main, *make.dump(world, "--k", k, "--out", tmp_path / "logits"))
    assert not (tmp_path / "logits" / "basis.safetensors").exists() and {
        meta["tail_rank"] for meta in metas(tmp_path / "logits")
    } == {0}
    whole = logits.Records(tmp_path / "logits", data.Dataset(world / "data"), 2.0)
    assert whole.shape is None and whole.at(some(world), 2.0).coef is None


def test_a_tail_of_two_tokens_has_a_basis(world, tmp_path):
    make.call(dump_logits.main, *make.dump(world, "--k", make.V - 2, "--out", tmp_path / "logits"))
    batch, t = some(world), 2.0
    kept = logits.Records(tmp_path / "logits", data.Dataset(world / "data"), t).at(batch, t)
    assert (
        kl(torch.softmax(teacher_logits(world, batch) / t, 1), dense(wide(kept), t)).mean() < 1e-3
    )


# --- refused


def refused(*args, **options):
    with pytest.raises(SystemExit) as end:
        make.store(*args, **options)
    assert isinstance(end.value.code, str) and "\n" not in end.value.code
    return end.value.code


def dump_refused(folder, *more, **options):
    code, words = make.ends(dump_logits.main, *make.dump(folder, *more, **options))
    assert (
        code == 1
        and words.startswith("error: ")
        and "\n" not in words
        and "mend it with: " in words
    ), (code, words)
    return words


def rewrite(path, **changes):
    """Change what a basis says of itself."""
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["about"])
    save_file(load_file(path), path, metadata={"about": json.dumps(about | changes)})


def spoil(path, how):
    if how == "missing":
        path.unlink()
    elif how == "cut short":
        path.write_bytes(path.read_bytes()[:-100])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "of no format":
        save_file(load_file(path), path)
    elif how == "of a later format":
        rewrite(path, format=2)


SPOILT = {
    "missing": "basis.safetensors is missing",
    "cut short": "is not a basis",
    "empty": "is not a basis",
    "of no format": "is not a basis",
    "of a later format": "basis.safetensors has another format; saw 2; wanted 1",
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_spoilt_basis_is_refused_with_what_mends_it(mine, how):
    spoil(mine / "logits" / "basis.safetensors", how)
    words = refused(mine)
    assert SPOILT[how] in words and "--tail-rank 32" in words and "--fresh" in words, words


@pytest.mark.parametrize("source", ("small", "others"))
def test_another_basis_under_the_same_name_is_refused(mine, source):
    shutil.copy(mine / source / "basis.safetensors", mine / "logits")
    words, seen = refused(mine), files.sha256(mine / "others" / "basis.safetensors")
    assert (
        "does not belong to" in words
        and "--fresh" in words
        and (source == "small" or f"saw basis {seen[:12]}" in words)
    ), words


def test_another_basis_is_found_in_every_part_and_not_in_the_first_alone(mine):
    path = mine / "logits" / "val" / "meta.json"
    files.write_json(path, files.read_json(path) | {"basis": "0" * 64})
    assert f"does not belong to {mine / 'logits' / 'val'}" in refused(
        mine
    ) and "wanted 000000000000" in refused(mine)


@pytest.mark.parametrize(
    "more, differ",
    (
        (("--teacher", "other"), "teacher '"),
        (("--tail-rank", 8), "tail_rank 32 (now 8)"),
        (("--tail-bytes", 5), "tail_bytes 32 (now 5)"),
        (("--k", 4), "k 8 (now 4)"),
    ),
)
@pytest.mark.parametrize("fresh", ((), ("--fresh",)))
def test_a_chunk_of_something_else_does_not_enter_a_folder_that_has_a_basis_and_nothing_is_deleted(
    mine, more, differ, fresh
):
    if not fresh:
        shutil.rmtree(mine / "logits" / "chunk-0001")
    before = {path: path.stat().st_mtime_ns for path in (mine / "logits").rglob("*.*")}
    more = [mine / word if word == "other" else word for word in more]
    words = dump_refused(mine, *more, "--chunk", 1, *fresh)
    assert (
        "basis.safetensors was fitted to something else" in words
        and differ in words
        and "another --out, or --fresh with --chunk all" in words
    )
    assert before == {path: path.stat().st_mtime_ns for path in (mine / "logits").rglob("*.*")}


def test_a_spoilt_basis_stops_a_dump_before_anything_is_deleted(mine):
    spoil(mine / "logits" / "basis.safetensors", "cut short")
    words = dump_refused(mine, "--chunk", 1, "--fresh")
    assert (
        "is not a basis" in words
        and "--fresh with --chunk all" in words
        and (mine / "logits" / "chunk-0001" / "meta.json").exists()
    )


@pytest.mark.parametrize("how", ("cut short", "of no format", "of a later format"))
def test_a_spoilt_basis_is_mended_by_the_command_that_the_refusal_names(mine, world, how):
    spoil(mine / "logits" / "basis.safetensors", how)
    make.call(dump_logits.main, *make.dump(mine, "--fresh"))
    same_dump(mine / "logits", world / "logits")


def test_chunks_with_and_without_a_basis_do_not_belong_together(mine):
    shutil.rmtree(mine / "logits" / "chunk-0002")
    shutil.copytree(mine / "none" / "chunk-0002", mine / "logits" / "chunk-0002")
    words = refused(mine)
    assert "do not belong together; saw tail_rank 0; wanted 32" in words and "--fresh" in words


def test_a_fresh_chunk_keeps_the_basis(mine):
    path = mine / "logits" / "basis.safetensors"
    before, chunk = (
        path.stat().st_mtime_ns,
        (mine / "logits" / "chunk-0001" / "topk.npy").stat().st_mtime_ns,
    )
    make.call(dump_logits.main, *make.dump(mine, "--fresh", "--chunk", 1))
    assert (
        path.stat().st_mtime_ns == before
        and (mine / "logits" / "chunk-0001" / "topk.npy").stat().st_mtime_ns > chunk
    )
    make.store(mine, verify=True)


def test_all_made_anew_replaces_the_basis_of_another_teacher(mine, world):
    make.call(dump_logits.main, *make.dump(mine, "--fresh", out="others"))
    same_dump(mine / "others", world / "logits")


@pytest.mark.parametrize("flags", (("--tail-rank", -1), ("--tail-bytes", 0), ("--tail-bytes", -3)))
def test_a_rank_or_size_below_what_makes_sense_is_an_error_of_arguments(world, capsys, flags):
    assert make.ends(dump_logits.main, *make.dump(world, *flags)) == (2, "")
    assert "--tail-rank is" in capsys.readouterr().err


# --- temperatures that were not dumped


def mass_outside(world, batch, k, t):
    """Return the teacher's mass (N,) outside its top k, from all its logits."""
    return 1 - torch.softmax(teacher_logits(world, batch) / t, 1).topk(k, 1).values.sum(1)


@pytest.mark.parametrize("name", ("logits", "small"))
@pytest.mark.parametrize("column", (0, 1, 2))
def test_the_tail_at_a_dumped_temperature_is_the_one_that_was_dumped(world, name, column):
    whole, records = make.store(world, name=name), make.store(world, name=name).val.records
    kept = record.unpack(records, make.V, column, whole.shape.to(torch.device("cpu")))
    seen = basis.tail_between(
        kept.basis,
        kept.ids,
        kept.coef,
        record.tails_of(records),
        [1.0, 2.0, 4.0],
        (1.0, 2.0, 4.0)[column],
    )
    torch.testing.assert_close(seen, kept.tail, rtol=0, atol=1e-5)


@pytest.mark.parametrize("t", (1.5, 3.0, 8.0))
@pytest.mark.parametrize("name", ("logits", "small"))
def test_a_tail_that_is_computed_is_within_the_error_that_was_measured(world, name, t):
    whole, batch = make.store(world, t, name), some(world)
    _, mean, worst = whole.guess
    seen, truth = record.rest_mass(whole.at(batch, t), t), mass_outside(world, batch, 8, t)
    assert (
        (seen - truth).abs().mean() <= mean + 1e-3
        and (seen - truth).abs().max() <= worst + 1e-3
        and mean < logits.GUESS_LIMIT
    )


def test_the_error_that_is_measured_is_that_of_the_temperature_left_out(world):
    """T = 3 asked, T = 4 left out: what T = 1 and 2 tell of T = 4 is compared with what was
    dumped."""
    whole, batch = (
        make.store(world, 3.0, "small"),
        data.Dataset(world / "data").train.batch([[row] for row in range(16)]),
    )
    left, mean, worst = whole.guess
    at = {t: make.store(world, t, "small").at(batch, t) for t in (1.0, 2.0, 4.0)}
    tails = torch.stack([at[1.0].tail, at[2.0].tail], 1)
    made = basis.tail_between(
        whole.shape.to(torch.device("cpu")), at[1.0].ids, at[1.0].coef, tails, [1.0, 2.0], 4.0
    )
    off = (
        record.rest_mass(replace(at[4.0], tail=made), 4.0) - mass_outside(world, batch, 8, 4.0)
    ).abs()
    assert (
        left == 4.0
        and abs(off.mean() - mean) < 1e-3 * mean + 1e-4
        and abs(off.max() - worst) < 1e-3 * worst + 3e-3
    )


def test_a_dumped_temperature_needs_no_guess(world):
    assert make.store(world, 4.0).guess is None


@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("t", (1.0, 1.5, 3.0, 16.0))
def test_as_many_dimensions_as_the_hidden_states_have_make_a_computed_tail_exact(options, t):
    z, kept, shape = fitted(**options)
    tails = torch.stack([keep(z, 5, dumped).tail for dumped in (1.0, 4.0)], 1)
    seen = basis.tail_between(shape, kept.ids, kept.coef, tails, [1.0, 4.0], t)
    torch.testing.assert_close(seen, keep(z, 5, t).tail, rtol=0, atol=1e-4)


def test_what_a_basis_does_not_hold_is_bridged_by_what_was_dumped():
    """A basis that is a constant knows nothing of T; two dumped tails do, and the polynomial
    between them beats either."""
    z, kept, shape = fitted()
    nothing = replace(shape, mean=torch.zeros_like(shape.mean), rows=torch.zeros_like(shape.rows))
    tails = {t: keep(z, 5, t).tail for t in (2.0, 3.0, 4.0)}
    seen = basis.tail_between(
        nothing, kept.ids, kept.coef, torch.stack([tails[2.0], tails[4.0]], 1), [2.0, 4.0], 3.0
    )
    off = (seen - tails[3.0]).abs().mean()
    assert off < 0.2 * min((tails[t] - tails[3.0]).abs().mean() for t in (2.0, 4.0)), off


@pytest.mark.parametrize("t", (1.5, 3.0, 8.0))
def test_a_tail_that_underflows_at_one_temperature_spoils_no_other(t):
    head, hidden = teacher(bias=True)
    head.bias[17] = 150.0  # certain of one token
    shape, z = double(fit.fit_basis(head, hidden, 5, 12, 12)[0]), logits_of(head, hidden)
    ids, _, tails = heads.topk_and_tails(z.float(), 5, [1.0, 2.0, 4.0])
    assert (tails[:, 0] < -104).all() and (tails[:, 1] > -104).all()
    tails[:, 0] = -torch.inf  # as a dump has it that was made before lib/head.py lifted
    seen = basis.tail_between(shape, ids, shape.encode(hidden), tails, [1.0, 2.0, 4.0], t)
    torch.testing.assert_close(seen, keep(z, 5, t).tail, rtol=0, atol=1e-2)


def test_a_measured_error_that_is_no_number_is_refused(world, monkeypatch):
    monkeypatch.setattr(
        basis, "tail_between", lambda shape, ids, *_: torch.full((len(ids),), math.nan)
    )
    assert "temperature 3 was not dumped" in refused(world, 3.0)


@pytest.mark.parametrize("t", (1.5, 3.0))
def test_computed_tails_do_not_depend_on_the_chunk_size(world, t, monkeypatch):
    batch, whole = some(world), make.store(world, t)
    wanted = whole.at(batch, t).tail
    monkeypatch.setattr(heads, "CHUNK_BYTES", 4 * make.V * 5)
    torch.testing.assert_close(whole.at(batch, t).tail, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "name, t", (("logits", 0.5), ("small", 0.99), ("none", 1.5), ("none", 3.0))
)
def test_a_temperature_below_the_lowest_or_a_dump_without_a_basis_is_refused_with_the_list(
    world, name, t
):
    words = refused(world, t, name)
    assert (
        f"temperature {t:g} was not dumped; saw" in words
        and "1, 2, 4" in words
        and "--temperature 1," in words
        and "--fresh" in words
    )


@pytest.mark.parametrize("t", (1.0, 3.0))
def test_a_dump_of_one_temperature_has_no_other(world, tmp_path, t):
    make.call(
        dump_logits.main,
        *make.dump(world, "--temperatures", 2, "--chunk", 0, "--out", tmp_path / "logits"),
    )
    with pytest.raises(SystemExit, match=f"temperature {t:g} was not dumped.* with 2; wanted"):
        logits.Records(tmp_path / "logits", data.Dataset(world / "data"), t)


def test_a_basis_too_poor_to_tell_is_refused_with_the_error_that_was_measured(
    world, tmp_path, monkeypatch
):
    make.call(
        dump_logits.main,
        *make.dump(
            world,
            "--tail-rank",
            1,
            "--tail-bytes",
            1,
            "--temperatures",
            "0.5,1,4",
            "--out",
            tmp_path / "logits",
        ),
    )
    _, mean, _ = logits.Records(tmp_path / "logits", data.Dataset(world / "data"), 0.75).guess
    monkeypatch.setattr(logits, "GUESS_LIMIT", 0.9 * mean)
    with pytest.raises(
        SystemExit,
        match=(
            f"temperature 0.75 was not dumped, and the basis cannot tell .*mean error of {mean:.3f}"
            " where T=1 "
        ),
    ):
        logits.Records(tmp_path / "logits", data.Dataset(world / "data"), 0.75)


@pytest.mark.parametrize("dumped, wanted", [("1,4", 2), ("1,4", 8), ("1,4,8", 2)])
def test_two_temperatures_or_two_far_apart_tell_nothing_of_a_third(world, tmp_path, dumped, wanted):
    """The check at the door would look well there: it can only leave out a high temperature, where
    nearly all mass is in the tail."""
    make.call(
        dump_logits.main,
        *make.dump(world, "--temperatures", dumped, "--chunk", 0, "--out", tmp_path / "logits"),
    )
    with pytest.raises(
        SystemExit, match=f"temperature {wanted} was not dumped; .*within a factor of 2"
    ):
        logits.Records(tmp_path / "logits", data.Dataset(world / "data"), wanted)


def test_a_student_trains_at_a_temperature_that_was_not_dumped(world, tmp_path):
    lines = trains(world, tmp_path, "logits", "--temperature", 3)
    args, dataset = (
        files.read_json(tmp_path / "run" / "config.json")["settings"],
        data.Dataset(world / "data"),
    )
    lengths = dataset.train.rows["length"]
    first = plan.whole_run(
        np.arange(len(lengths)), lengths, args["seed"], args["tokens_per_step"], args["epochs"], 8
    )[0]
    student, batch = (
        models.load(str(world / "student"), torch.device("cpu")),
        dataset.train.batch([[int(row)] for row in first]),
    )
    p, s = torch.softmax(teacher_logits(world, batch) / 3, 1), student.head().weight.double()
    wanted = kl(p, torch.softmax(student.hidden(batch).double() @ s.t() / 3, 1)).mean().item()
    assert abs(lines[0]["kd"] - wanted) < 2e-3 * wanted, (
        "the first step's loss is that of the whole teacher at T = 3"
    )


# --- what a review found


@pytest.mark.parametrize("kind", ("fkl", "rkl"))
def test_half_precision_products_that_ignore_their_buffer_change_nothing(kind, monkeypatch):
    """On CUDA rows are float16 and torch.mm(out_dtype=...) makes a new tensor: the target was once
    read from the empty buffer."""
    head, hidden = teacher()
    shape = double(fit.fit_basis(head, hidden, 5, 8, 8)[0])
    ids, gaps, tails = heads.topk_and_tails(logits_of(head, hidden)[:40].clone(), 5, [2.0])
    kept = TopK(ids, gaps, tails[:, 0], shape.encode(hidden[:40]), shape)
    made = torch.Generator().manual_seed(3)
    s, w = (
        torch.randn(40, 6, generator=made, dtype=torch.float64),
        torch.randn(head.vocab, 6, generator=made, dtype=torch.float64).requires_grad_(),
    )

    def loss():
        return losses.head_loss(
            s,
            Head(w, None, head.vocab),
            torch.zeros(40, dtype=torch.long),
            kept,
            Method(1.0, 2.0, kind),
        )[0]

    (plain,) = torch.autograd.grad(loss(), w)
    monkeypatch.setattr(basis, "matmul", lambda a, b, out=None: a @ b)
    (other,) = torch.autograd.grad(loss(), w)
    torch.testing.assert_close(other, plain, rtol=0, atol=1e-12)


def test_a_token_that_no_tail_ever_reaches_keeps_its_row_within_float16(tmp_path):
    made = torch.Generator().manual_seed(0)
    weight, hidden = torch.randn(400, 16, generator=made), torch.randn(300, 16, generator=made)
    weight[:, 0], hidden[:, 0] = 0.0, 1.0 + 1e-3 * hidden[:, 0]
    weight[:2] *= 0.01
    weight[:2, 0] = -60.0  # far below all others, in a direction of their own
    shape, _ = fit.fit_basis(Head(weight, None, 400), hidden, 5, 16, 16)
    assert shape.rows.abs().max() < 4e4
    basis.save(shape, tmp_path / "basis.safetensors", {})
    assert torch.isfinite(basis.load(tmp_path / "basis.safetensors", "")[0].rows).all()


def test_measuring_asks_for_the_basis_as_training_does(world, tmp_path):
    """kl and rkl are over all tokens, those outside the top k in its shape."""
    shutil.copytree(world / "logits", tmp_path / "logits")
    (tmp_path / "logits" / "basis.safetensors").unlink()
    argv = (tmp_path / "logits", data.Dataset(world / "data"), None)
    code, words = make.ends(lambda _: logits.Records(*argv))
    assert code == 1 and "basis.safetensors is missing" in words


def test_a_dump_beside_chunks_whose_basis_is_lost_or_another_is_refused_before_the_first_forward_pass(
    world, tmp_path
):
    shutil.copytree(world / "logits", tmp_path / "logits")
    path = tmp_path / "logits" / "basis.safetensors"
    shutil.rmtree(tmp_path / "logits" / "chunk-0001")
    content = path.read_bytes()
    path.unlink()
    code, words = make.ends(
        dump_logits.main, *make.dump(world, "--chunk", 1, "--out", tmp_path / "logits")
    )
    assert (
        code == 1
        and "basis.safetensors is missing; saw" in words
        and "chunk-0000, which was dumped with it" in words
    )
    path.write_bytes(content)
    meta = files.read_json(tmp_path / "logits" / "chunk-0002" / "meta.json")
    files.write_json(tmp_path / "logits" / "chunk-0002" / "meta.json", meta | {"basis": "0" * 64})
    code, words = make.ends(dump_logits.main, *make.dump(world, "--out", tmp_path / "logits"))
    assert (
        code == 1
        and "chunk-0002 was dumped with another basis" in words
        and "--chunk 2 --fresh" in words
    )
    assert not (tmp_path / "logits" / "chunk-0001").exists()
    make.call(
        dump_logits.main, *make.dump(world, "--chunk", 2, "--fresh", "--out", tmp_path / "logits")
    )  # what the message says mends it
    make.call(dump_logits.main, *make.dump(world, "--out", tmp_path / "logits"))
    assert len(make.store(world).chunks) == 3


def test_fresh_without_a_basis_takes_the_old_one_away(world, tmp_path):
    shutil.copytree(world / "logits", tmp_path / "logits")
    make.call(
        dump_logits.main,
        *make.dump(world, "--tail-rank", 0, "--fresh", "--out", tmp_path / "logits"),
    )
    assert not (tmp_path / "logits" / "basis.safetensors").exists()
    assert logits.Records(tmp_path / "logits", data.Dataset(world / "data"), 2.0).shape is None
