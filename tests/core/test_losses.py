"""The loss against references that hold none of the code under test (tests/references.py)."""

import dataclasses
import math

import pytest
import torch
from references import (
    BETAS,
    TEMPERATURES,
    all_close,
    angle,
    bucket,
    gradients,
    keep,
    ours,
    power,
    problem,
    reference_divergence,
    reference_loss,
)

from lib import head as heads
from lib import losses
from lib.head import Head
from lib.losses import Method, TopK

# --- what the loss is


@pytest.mark.parametrize("kind", losses.DIVERGENCES)
@pytest.mark.parametrize("t", TEMPERATURES)
def test_k_equal_to_v_is_the_divergence_over_the_full_vocabulary(kind, t):
    hidden, weight, labels, z = problem()
    method = Method(1.0, t, kind, BETAS[kind])

    def full(h, w):
        return (
            power(kind, t)
            * reference_divergence(
                torch.softmax(z / t, 1), torch.softmax(h @ w.t() / t, 1), kind, BETAS[kind]
            ).sum()
        )

    all_close(
        ours(hidden, weight, labels, keep(z, len(weight), t), method),
        gradients(full, hidden, weight),
    )


@pytest.mark.parametrize("kind", losses.DIVERGENCES)
@pytest.mark.parametrize("t", TEMPERATURES)
def test_loss_and_gradient_equal_a_bucket_loss_written_out_over_the_full_vocabulary(kind, t):
    hidden, weight, labels, z = problem()
    method = Method(0.7, t, kind, BETAS[kind])
    wanted = gradients(
        lambda h, w: reference_loss(z, h @ w.t(), labels, 4, method)[0], hidden, weight
    )
    all_close(ours(hidden, weight, labels, keep(z, 4, t), method), wanted)


def test_cross_entropy_alone_equals_torch():
    hidden, weight, labels, _ = problem()
    wanted = gradients(
        lambda h, w: torch.nn.functional.cross_entropy(h @ w.t(), labels, reduction="sum"),
        hidden,
        weight,
    )
    all_close(ours(hidden, weight, labels), wanted)


@pytest.mark.parametrize("kind", losses.DIVERGENCES)
@pytest.mark.parametrize("k", (1, 4, 23))
def test_a_student_equal_to_its_teacher_has_no_divergence_and_no_gradient(kind, k):
    hidden, weight, labels, _ = problem()
    loss, *grads = ours(
        hidden,
        weight,
        labels,
        keep(hidden @ weight.t(), k, 2.0),
        Method(1.0, 2.0, kind, BETAS[kind]),
    )
    assert abs(loss) < 1e-12
    assert kind == "tvd" or all(
        grad.abs().max() < 1e-12 for grad in grads
    )  # |p - q| has a kink there: any slope is right


@pytest.mark.parametrize("kind", losses.DIVERGENCES)
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
def test_no_divergence_is_ever_below_zero(kind, dtype):
    for seed, near in ((seed, near) for seed in range(20) for near in (0.0, 1e-3, 1.0)):
        hidden, weight, _, noise = problem(seed=seed, dtype=dtype)
        s = hidden @ weight.t()
        teacher = keep(s + near * noise, 3, 2.0)
        logq = losses.student_logq(less := s - s.amax(1, keepdim=True), teacher, 2.0, less)[0]
        divergence = losses.divergence(losses.teacher_logp(teacher, 2.0), logq, kind, BETAS[kind])
        assert divergence.min() >= -8 * torch.finfo(dtype).eps, (seed, near, divergence.min())


def knowing(z, counts, t):
    """Return a teacher of logits z (n, V) that knows of each target its `counts` largest, and of
    all others the mass."""
    largest, k = keep(z, max(counts), t), max(counts)
    tails = [
        keep(row[None], count, t).tail if count else row.new_zeros(1)
        for row, count in zip(z, counts)
    ]
    return TopK(largest.ids, largest.gap[:, :k], torch.cat(tails), count=torch.tensor(counts))


@pytest.mark.parametrize("t", TEMPERATURES)
@pytest.mark.parametrize("kind", losses.DIVERGENCES)
def test_of_a_target_only_the_tokens_that_are_known_are_compared(kind, t):
    hidden, weight, labels, z = problem()
    counts, method = [4, 1, 0, 3, 0, 4], Method(0.7, t, kind, BETAS[kind])
    seen = ours(hidden, weight, labels, knowing(z, counts, t), method)
    wanted = [
        torch.zeros((), dtype=hidden.dtype),
        torch.zeros_like(hidden),
        torch.zeros_like(weight),
    ]
    for i, count in enumerate(counts):
        one, alone = slice(i, i + 1), keep(z[i : i + 1], count, t) if count else None
        # nothing known: the cross-entropy, at its weight, is all there is
        own = method if count else Method(0.0)
        loss, at_hidden, at_weight = ours(hidden[one], weight, labels[one], alone, own)
        share = 1.0 if count else 1 - method.alpha
        wanted[0] += share * loss
        wanted[1][one] += share * at_hidden
        wanted[2] += share * at_weight
    all_close(seen, wanted)


@pytest.mark.parametrize("kind", losses.DIVERGENCES)
def test_over_all_tokens_too_only_what_is_known_is_taken_from_the_record(kind):
    """With a shape: a target of which nothing is known has no divergence and no gradient, and of
    one known token the rest has the shape of the basis."""
    hidden, weight, labels, z = problem()

    class Shape:
        def logits(self, coef, out=None):
            return out.copy_(coef)

    counts, method = [4, 1, 0, 3, 0, 4], Method(1.0, 2.0, kind, BETAS[kind])
    teacher = dataclasses.replace(knowing(z, counts, 2.0), coef=z.flip(1), basis=Shape())
    seen = ours(hidden, weight, labels, teacher, method)
    logq = (hidden @ weight.t() / 2).log_softmax(1)
    p = teacher.logp_all(z.flip(1).clone(), 2.0).exp()
    for i, count in enumerate(counts):
        exact, own = (z[i] / 2).softmax(0), teacher.ids[i, :count]
        rest = torch.full((z.shape[1],), True).index_fill(0, own, False)
        assert torch.allclose(p[i, own], exact[own])
        shape = (z.flip(1)[i, rest] / 2).softmax(0)
        assert torch.allclose(p[i, rest], (exact[rest].sum() if count else 1.0) * shape)
    heard = torch.tensor([count > 0 for count in counts])
    wanted = reference_divergence(p, logq.exp(), kind, BETAS[kind])[heard].sum()
    assert math.isclose(seen[0].item(), power(kind, 2.0) * wanted.item(), rel_tol=1e-9)
    assert not seen[1][~heard].abs().gt(1e-12).any() or kind == "tvd"


@pytest.mark.parametrize("t", TEMPERATURES)
@pytest.mark.parametrize("kind", losses.DIVERGENCES)
def test_gradient_agrees_with_finite_differences_through_softcap_scale_and_bias(kind, t):
    """Trap 5: a T^2 in the printed loss alone would show here, since the printed loss is what is
    differenced."""
    hidden, weight, labels, z = problem(n=3, v=11, d=4)
    bias, teacher, method = (
        torch.linspace(-1, 1, 11, dtype=torch.float64),
        keep(z, 3, t),
        Method(0.6, t, kind, BETAS[kind]),
    )

    def loss_of(h, w):
        return losses.head_loss(
            h, Head(w, bias, 11, scale=0.7, softcap=5.0), labels, teacher, method
        )[0]

    _, *grads = gradients(loss_of, hidden, weight)
    for number, grad in enumerate(grads):
        for place in range(grad.numel()):
            ends = []
            for step in (1e-5, -1e-5):
                moved = [hidden.clone(), weight.clone()]
                moved[number].view(-1)[place] += step
                ends.append(loss_of(*moved).item())
            assert (
                abs((ends[0] - ends[1]) / 2e-5 - grad.flatten()[place].item())
                < 2e-8 * max(1, abs(ends[0])) + 1e-7
            )


def test_a_constant_added_to_all_logits_changes_nothing():
    hidden, weight, labels, z = problem()
    method = Method(0.5, 2.0)
    constant = torch.full((len(weight),), 300.0, dtype=torch.float64)
    all_close(
        ours(hidden, weight, labels, keep(z + 700, 4, 2.0), method, bias=constant),
        ours(hidden, weight, labels, keep(z, 4, 2.0), method),
    )


@pytest.mark.parametrize("kind", losses.DIVERGENCES)
@pytest.mark.parametrize("targets", (1, 4, 1000))
def test_loss_and_gradient_do_not_depend_on_the_chunk_size(kind, targets, monkeypatch):
    hidden, weight, labels, z = problem(n=13)
    teacher, method = keep(z, 4, 2.0), Method(0.7, 2.0, kind, BETAS[kind])
    whole = ours(hidden, weight, labels, teacher, method)
    monkeypatch.setattr(heads, "CHUNK_BYTES", 4 * len(weight) * targets)
    assert Head(weight, None, len(weight)).chunk() == targets
    all_close(ours(hidden, weight, labels, teacher, method), whole, rtol=1e-12, atol=1e-12)


# --- what is far below: gaps of more than 70 T, where float32's exp comes to its end


@pytest.mark.parametrize("kind", losses.DIVERGENCES)
@pytest.mark.parametrize("t", (1.0, 2.0))
@pytest.mark.parametrize("sure", ("teacher", "student", "both"))
@pytest.mark.parametrize("below", (75.0, 110.0, 300.0))
def test_what_is_far_below_counts_exactly_in_the_top_k_and_in_the_bucket(kind, t, sure, below):
    """In float32, from a record made in float32, as the definition in float64 has it."""
    hidden, weight, labels, z = problem(n=8)
    s, method = hidden @ weight.t(), Method(0.7, t, kind, BETAS[kind])
    for name, logits, place in (("teacher", z, 3), ("student", s, 5)):
        if sure in (name, "both"):
            # sure of one token; in half of the rows only those outside the top k are so low
            logits[:4, :] -= t * below
            logits[4:, torch.arange(z.shape[1]) % 4 > 1] -= t * below
            logits[:, place] = logits.amax() + 5
    z, s = z.float(), s.float()
    ids, gap, tails = heads.topk_and_tails(z.clone(), 4, [1.0, t])
    seen = ours(s, torch.eye(z.shape[1]), labels, TopK(ids, gap, tails[:, 1]), method)[:2]
    wanted = gradients(lambda x: reference_loss(z.double(), x, labels, 4, method)[0], s.double())
    all_close([x.double() for x in seen], wanted, rtol=2e-5, atol=2e-5)


def test_the_bucket_of_a_record_whose_tail_was_lost_is_no_heavier_than_its_lightest_token():
    """An older dump has -inf where float32 had come to its end."""
    gap = torch.tensor([[0.0, 3.0, 120.0], [0.0, 3.0, 5.0]])
    teacher = TopK(torch.tensor([[0, 1, 2]] * 2), gap, torch.full((2,), -math.inf))
    logp = losses.teacher_logp(teacher, 1.0)
    assert logp[0, -1] == logp[0, -2] < -119 and logp[1, -1] == heads.FLOOR


@pytest.mark.parametrize("kind", losses.DIVERGENCES)
def test_the_gradient_does_not_grow_with_the_temperature(kind):
    """The power of T keeps it of one size: towards high T, where it has settled, four times T
    changes it by little. (T^2 for total variation: by a factor of four.)"""
    hidden, weight, labels, z = problem()
    norms = []
    for t in (64.0, 256.0):
        teacher, method = keep(z, len(weight), t), Method(1.0, t, kind, BETAS[kind])
        norms.append(ours(hidden, weight, labels, teacher, method)[1].norm().item())
    assert norms[1] == pytest.approx(norms[0], rel=0.2), norms


# --- traps


def test_trap_1_a_renormalised_top_k_is_blind_to_student_mass_outside_it_and_ours_is_not():
    hidden, weight, labels, z = problem()
    ids = z.topk(4, 1).indices
    s = z + 3.0 * torch.ones_like(z).scatter(
        1, ids, 0.0
    )  # the same ratios inside S, much more mass outside
    eye = torch.eye(z.shape[1], dtype=z.dtype)
    renormalised = reference_divergence(
        torch.softmax(z.gather(1, ids), 1), torch.softmax(s.gather(1, ids), 1), "fkl", 0.5
    ).sum()
    loss, grad, _ = ours(s, eye, labels, keep(z, 4, 1.0), Method(1.0, 1.0))
    assert abs(renormalised) < 1e-12 and loss > 0.1
    assert (
        grad.masked_select(torch.ones_like(grad, dtype=torch.bool).scatter(1, ids, False)) > 0
    ).all(), "mass outside S must be pushed down"


def test_trap_2_without_the_tail_term_kl_falls_below_zero_and_ours_does_not():
    _, _, labels, z = problem()
    s = z + 3.0 * torch.zeros_like(z).scatter(
        1, z.topk(4, 1).indices, 1.0
    )  # the student is surer of S
    ids = z.topk(4, 1).indices
    p, q = (torch.softmax(x, 1).gather(1, ids) for x in (z, s))
    assert (p * (p / q).log()).sum() < -0.1
    assert (
        ours(s, torch.eye(z.shape[1], dtype=z.dtype), labels, keep(z, 4, 1.0), Method(1.0, 1.0))[0]
        > 0.1
    )


def test_trap_3_the_tail_is_not_one_tempered_token():
    _, _, _, z = problem()
    t = 4.0
    p = torch.softmax(z, 1)
    ids = z.topk(4, 1).indices
    one_token = torch.softmax(
        bucket(p, ids).log() / t, 1
    )  # what a tail known at T=1 alone would give
    exact = bucket(torch.softmax(z / t, 1), ids)
    made = losses.teacher_logp(keep(z, 4, t), t).exp()
    torch.testing.assert_close(made, exact, rtol=1e-12, atol=1e-12)
    assert (one_token[:, -1] - exact[:, -1]).abs().min() > 0.05


@pytest.mark.parametrize("kind", losses.DIVERGENCES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("tail", (-200.0, -math.inf))
@pytest.mark.parametrize("far", (30.0, 3000.0, 60000.0))
@pytest.mark.parametrize("t", (1.0, 8.0))
def test_trap_4_a_confident_teacher_and_a_confident_student_give_no_nan(kind, dtype, tail, far, t):
    teacher = TopK(
        torch.tensor([[3, 1, 4]]),
        torch.tensor([[0.0, far, far]], dtype=dtype),
        torch.tensor([tail], dtype=dtype),
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
            s,
            torch.eye(9, dtype=dtype),
            torch.tensor([3]),
            teacher,
            Method(1.0, t, kind, BETAS[kind]),
        )
        assert torch.isfinite(loss) and torch.isfinite(grad).all(), (first, others, loss, grad)


@pytest.mark.parametrize("t", (1.0, 8.0, 64.0))
def test_trap_4_a_bucket_that_underflows_gives_a_finite_gradient(t):
    """The teacher's mass lies outside S, the student's all inside: g_rest / q_rest is the largest
    number of the whole loss."""
    teacher = TopK(torch.tensor([[3]]), torch.tensor([[0.0]]), torch.tensor([30.0]))
    s = torch.full((1, 9), -1e5)
    s[0, 3] = 0.0
    loss, grad, _ = ours(s, torch.eye(9), torch.tensor([3]), teacher, Method(1.0, t))
    assert torch.isfinite(loss) and torch.isfinite(grad).all(), grad


def test_trap_4_the_bucket_of_a_confident_student_is_summed_and_not_one_minus_the_rest():
    s = torch.full((1, 50), -40.0) + torch.arange(50) / 100
    s[0, 7] = 0.0
    teacher = TopK(torch.tensor([[7, 8]]), torch.tensor([[0.0, 1.0]]), torch.tensor([0.0]))
    logq = losses.student_logq(s, teacher, 1.0, s.clone())[0]
    exact = (
        torch.softmax(s.double(), 1)
        .masked_fill(torch.zeros(1, 50, dtype=torch.bool).scatter(1, teacher.ids, True), 0)
        .sum(1)
        .log()
    )
    assert 1 - torch.softmax(s, 1).gather(1, teacher.ids).sum() <= 0, (
        "the example must be one where 1 - sum is lost in float32"
    )
    torch.testing.assert_close(logq[:, -1].double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("t", TEMPERATURES)
def test_trap_5_the_square_of_the_temperature_is_in_the_gradient(t):
    hidden, weight, labels, z = problem()

    def kl(h, w):
        return reference_divergence(
            *(bucket(torch.softmax(x / t, 1), z.topk(4, 1).indices) for x in (z, h @ w.t())),
            "fkl",
            0.5,
        ).sum()

    plain = gradients(kl, hidden, weight)
    all_close(
        ours(hidden, weight, labels, keep(z, 4, t), Method(1.0, t)), [t * t * x for x in plain]
    )


def test_trap_6_the_temperature_is_used():
    hidden, weight, labels, z = problem()
    seen = [
        ours(hidden, weight, labels, keep(z, 4, t), Method(1.0, t))[0] / t**2 for t in TEMPERATURES
    ]
    wanted = [
        reference_loss(z, hidden @ weight.t(), labels, 4, Method(1.0, t))[2] for t in TEMPERATURES
    ]
    all_close(seen, wanted)
    assert seen[0] > 1.5 * seen[1] > 2 * seen[2]


def test_trap_7_no_mean_over_the_vocabulary():
    """Ten times as many tokens, the new ones impossible for both sides: the same loss, where a mean
    would be a tenth."""
    hidden, weight, labels, z = problem()
    method, impossible = Method(0.5, 2.0), torch.full((230,), 0.0, dtype=z.dtype)
    impossible[23:] = -1e6
    wide = torch.cat([weight, torch.zeros(207, weight.shape[1], dtype=z.dtype)])
    teacher = keep(torch.nn.functional.pad(z, (0, 207), value=-1e6), 4, 2.0)
    loss, grad, _ = ours(hidden, wide, labels, teacher, method, bias=impossible)
    all_close((loss, grad), ours(hidden, weight, labels, keep(z, 4, 2.0), method)[:2])


def test_trap_9_cross_entropy_and_divergence_are_both_sums_over_the_same_targets():
    hidden, weight, labels, z = problem()
    teacher, method, head = keep(z, 4, 2.0), Method(0.3, 2.0), Head(weight, None, len(weight))
    together = losses.head_loss(hidden, head, labels, teacher, method)
    each = [
        losses.head_loss(hidden[i : i + 1], head, labels[i : i + 1], teacher[i : i + 1], method)
        for i in range(len(labels))
    ]
    all_close(together, [sum(one[i] for one in each) for i in range(3)])
    loss, ce, kd = together
    torch.testing.assert_close(loss, 0.3 * 4 * kd + 0.7 * ce)
    all_close(together, reference_loss(z, hidden @ weight.t(), labels, 4, method))


@pytest.mark.parametrize("method", (Method(), Method(0.5, 2.0)))
def test_trap_16_rows_above_the_common_vocabulary_are_cut_before_softmax_and_get_no_gradient(
    method,
):
    hidden, weight, labels, z = problem(v=70)
    labels, teacher = labels % 61, keep(z[:, :61], 4, 2.0) if method.alpha else None
    loss, grad, grad_weight = ours(hidden, weight, labels, teacher, method, vocab=61)
    all_close((loss, grad, grad_weight[:61]), ours(hidden, weight[:61], labels, teacher, method))
    assert (
        grad_weight.shape == (70, 5)
        and not grad_weight[61:].any()
        and grad_weight[:61].any(1).all()
    )


@pytest.mark.parametrize("amp", (torch.float16, torch.bfloat16))
def test_trap_18_logits_and_sums_are_float32_under_half_precision(amp, monkeypatch):
    seen, plain = [], Head.logits
    monkeypatch.setattr(
        Head, "logits", lambda *args, **more: seen.append(plain(*args, **more)) or seen[-1]
    )
    hidden, weight, labels, z = problem(n=300, v=997, d=8, dtype=torch.float32)
    teacher, method = keep(z, 4, 2.0), Method(0.5, 2.0)
    hidden, weight = (6 * hidden).to(amp).float(), weight.to(amp).float()
    wanted = ours(hidden, weight, labels, teacher, method)
    with torch.autocast("cpu", amp):
        half = ours(hidden.to(amp), weight, labels, teacher, method)
        float_half = losses.head_loss(
            hidden, Head(weight, None, 997), labels, teacher, method, amp
        )[0]
    assert (
        {z.dtype for z in seen} == {torch.float32}
        and half[0].dtype == half[2].dtype == torch.float32
        and half[1].dtype == amp
    )
    all_close([x.float() for x in half], wanted, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(float_half, wanted[0], rtol=1e-4, atol=0)


def test_trap_18_a_flat_tail_of_1e_8_a_token_has_its_whole_gradient_in_float32():
    """1e-8 is 0 in float16: what pulls a million unlikely tokens, each too small for it, must not
    vanish."""
    v = 100_000
    weight = torch.randn(v, 3, generator=torch.Generator().manual_seed(0))
    teacher = TopK(torch.tensor([[0], [1]]), torch.zeros(2, 1), torch.full((2,), math.log(1e-3)))
    options = dict(
        labels=torch.tensor([0, 1]),
        teacher=teacher,
        method=Method(1.0, 1.0),
        bias=torch.zeros(v).index_fill(0, torch.tensor([0, 1]), 15.0),
    )
    loss, grad, _ = ours(torch.full((2, 3), 0.1), weight, **options)
    exact = {
        "bias": options["bias"].double(),
        "teacher": TopK(teacher.ids, teacher.gap.double(), teacher.tail.double()),
    }
    exact = ours(torch.full((2, 3), 0.1).double(), weight.double(), **options | exact)
    assert loss > 0.01
    torch.testing.assert_close(grad.double(), exact[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("softcap, scale", ((0.0, 0.25), (3.0, 1.0), (3.0, 2.0)))
def test_trap_20_softcap_and_scale_are_honoured(softcap, scale):
    hidden, weight, labels, z = problem()
    method = Method(0.6, 2.0)

    def cap(s):
        return softcap * torch.tanh(scale * s / softcap) if softcap else scale * s

    wanted = gradients(
        lambda h, w: reference_loss(z, cap(h @ w.t()), labels, 4, method)[0], hidden, weight
    )
    seen = ours(hidden, weight, labels, keep(z, 4, 2.0), method, softcap=softcap, scale=scale)
    all_close(seen, wanted)
    assert abs(seen[0] - ours(hidden, weight, labels, keep(z, 4, 2.0), method)[0]) > 0.1


def test_bias_is_honoured_and_trained():
    hidden, weight, labels, z = problem()
    bias, method, teacher = (
        torch.linspace(-2, 2, 23, dtype=torch.float64),
        Method(0.6, 2.0),
        keep(z, 4, 2.0),
    )
    wanted = gradients(
        lambda h, w, b: reference_loss(z, h @ w.t() + b, labels, 4, method)[0], hidden, weight, bias
    )
    all_close(
        gradients(
            lambda h, w, b: losses.head_loss(h, Head(w, b, 23), labels, teacher, method)[0],
            hidden,
            weight,
            bias,
        ),
        wanted,
    )


@pytest.mark.parametrize("method", (Method(), Method(0.5, 2.0)))
def test_trap_23_a_batch_without_targets_has_loss_zero_and_backward_works(method):
    hidden, weight, labels, z = problem(n=0)
    teacher = (
        TopK(torch.zeros(0, 4, dtype=torch.long), torch.zeros(0, 4), torch.zeros(0))
        if method.alpha
        else None
    )
    loss, grad, grad_weight = ours(hidden, weight, labels, teacher, method)
    assert (
        loss == 0
        and grad.shape == (0, 5)
        and grad_weight.shape == weight.shape
        and not grad_weight.any()
    )


def test_trap_25_a_teacher_that_is_missing_is_an_error_and_not_cross_entropy():
    hidden, weight, labels, _ = problem()
    with pytest.raises(AssertionError, match="without a teacher"):
        losses.head_loss(hidden, Head(weight, None, 23), labels, None, Method(0.5, 2.0))


# --- a method that moves


def test_what_moves_goes_in_a_straight_line_from_the_first_step_to_the_last():
    schedule = losses.Schedule((0.9, 0.5), 2.0, "jsd", 0.3, steps=5)
    assert [schedule(step).alpha for step in range(6)] == pytest.approx(
        [0.9, 0.8, 0.7, 0.6, 0.5, 0.5]
    )
    assert schedule(0) == Method(0.9, 2.0, "jsd", 0.3)
    assert schedule.moving(0) == {"alpha": 0.9}
    assert losses.Schedule((0.9, 0.5), (4.0, 2.0)).moving(0) == {"alpha": 0.9, "temperature": 4.0}


def test_what_does_not_move_is_the_same_at_every_step_and_not_logged():
    schedule = losses.Schedule(0.9, 2.0, "skl", 0.1, steps=5)
    assert {schedule(step) for step in range(5)} == {Method(0.9, 2.0, "skl", 0.1)}
    assert schedule.moving(3) == {}
    assert losses.Schedule()(0) == Method()


# --- the rest


def test_a_second_backward_asserts_instead_of_scaling_the_gradient_twice():
    hidden, weight, labels, _ = problem()
    loss = losses.head_loss(hidden.requires_grad_(), Head(weight, None, 23), labels)[0]
    loss.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="used twice"):
        loss.backward()


def test_the_scale_that_arrives_in_backward_multiplies_the_gradient():
    hidden, weight, labels, z = problem()
    teacher, method = keep(z, 4, 2.0), Method(0.5, 2.0)
    scaled = gradients(
        lambda h, w: 1024 * losses.head_loss(h, Head(w, None, 23), labels, teacher, method)[0] / 7,
        hidden,
        weight,
    )
    all_close(scaled, [x * 1024 / 7 for x in ours(hidden, weight, labels, teacher, method)])


def test_the_loss_is_the_same_without_gradients():
    hidden, weight, labels, z = problem()
    teacher, method = keep(z, 4, 2.0), Method(0.5, 2.0)
    with torch.no_grad():
        plain = losses.head_loss(hidden, Head(weight, None, 23), labels, teacher, method)[0]
    assert plain == ours(hidden, weight, labels, teacher, method)[0] and not plain.requires_grad


def test_the_bucket_gradient_is_nearer_to_full_kl_than_a_renormalised_top_k_at_t_2():
    hidden, weight, labels, noise = problem(n=64, v=2000, d=32, spread=0.5)
    t, k, z = 2.0, 16, hidden @ weight.t() + 0.5 * noise  # a student near its teacher
    teacher, ids = keep(z, k, t), z.topk(k, 1).indices

    def kl(a, b):
        return (
            t
            * t
            * reference_divergence(
                torch.softmax(a / t, 1), torch.softmax(b / t, 1), "fkl", 0.5
            ).sum()
        )

    full = gradients(lambda h, w: kl(z, h @ w.t()), hidden, weight)
    renormalised = gradients(
        lambda h, w: kl(z.gather(1, ids), (h @ w.t()).gather(1, ids)), hidden, weight
    )
    bucketed = ours(hidden, weight, labels, teacher, Method(1.0, t))
    for place in (1, 2):  # of hidden, of weight
        assert angle(bucketed[place], full[place]) < 0.85 * angle(renormalised[place], full[place])
        size, other = (x[place].norm() / full[place].norm() for x in (bucketed, renormalised))
        assert 0.5 < size < 1.5 and other > 2, (size, other)


@pytest.mark.parametrize("dtype, limit", ((torch.float16, 2e-3), (torch.bfloat16, 1e-2)))
@pytest.mark.parametrize("kind", losses.DIVERGENCES)
def test_half_precision_products_give_the_gradient_of_float32(monkeypatch, dtype, limit, kind):
    """A GPU's products on the CPU: operands rounded to half, sums in float32, gradients
    lifted over fp16's smallest numbers."""

    def product(a, b, out=None):
        made = a.float() @ b.float()
        return made if out is None else out.copy_(made)

    torch.manual_seed(3)
    hidden, weight, bias = torch.randn(40, 16), torch.randn(70, 16), torch.randn(70)
    labels = torch.randint(0, 61, (40,))
    ids, gap, tails = heads.topk_and_tails(torch.randn(40, 61) * 3, 8, [2.0])
    gradients = []
    for half in (False, True):
        leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight, bias)]
        with monkeypatch.context() as patch:
            if half:
                patch.setattr(losses, "compute_dtype", lambda *_: dtype)
                patch.setattr(heads, "compute_dtype", lambda *_: dtype)
                patch.setattr(losses, "matmul", product)
                patch.setattr(heads, "matmul", product)
            loss, _, _ = losses.head_loss(
                leaves[0],
                heads.Head(leaves[1], leaves[2], 61),
                labels,
                losses.TopK(ids, gap, tails[:, 0]),
                losses.Method(0.7, 2.0, kind),
            )
        loss.backward()
        gradients.append([leaf.grad for leaf in leaves])
    for plain, halved in zip(*gradients):
        assert (
            halved.dtype == torch.float32
            and ((halved - plain).norm() / plain.norm()).item() < limit
        )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_half_precision_on_a_gpu_gives_the_gradient_of_float32(dtype):
    torch.manual_seed(3)
    hidden, weight, labels = (
        torch.randn(64, 128).cuda(),
        torch.randn(512, 128).cuda(),
        torch.randint(0, 512, (64,)).cuda(),
    )
    teacher = heads.topk_and_tails(torch.randn(64, 512).cuda() * 3, 32, [2.0])
    gradients = []
    for precision in (torch.float32, dtype):
        leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
        loss, _, _ = losses.head_loss(
            leaves[0],
            heads.Head(leaves[1], None, 512),
            labels,
            losses.TopK(teacher[0], teacher[1], teacher[2][:, 0]),
            losses.Method(0.7, 2.0),
            precision,
        )
        loss.backward()
        gradients.append([leaf.grad for leaf in leaves])
    for plain, halved in zip(*gradients):
        assert ((halved - plain).norm() / plain.norm()).item() < 2e-2
