"""The losses beside the logits, attention maps and gradient balancing, on tiny models in memory."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import make
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    Qwen3Config,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lib import losses, models, train
from lib.options import attention, beside
from lib.options.beside import Beside
from lib.options.gradnorm import Balance

ALL = dict(
    feature=1.0,
    feature_layers="0:0,last:last",
    attention=1.0,
    attention_layers="0:0,last:last",
    contrastive=1.0,
)
EACH = {
    "feature": {"feature": 1.0},
    "cosine": {"feature": 1.0, "feature_kind": "cosine"},
    "attention": {"attention": 1.0},
    "contrastive": {"contrastive": 1.0},
}
SMALL = dict(
    vocab_size=make.V,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=256,
    bos_token_id=None,
    eos_token_id=3,
    pad_token_id=3,
)
KINDS = {
    "llama": (make.config, {}),
    "qwen3": (Qwen3Config, SMALL),
    "gemma2": (
        Gemma2Config,
        SMALL | dict(sliding_window=4, attn_logit_softcapping=0.5, query_pre_attn_scalar=1),
    ),
    "gemma3": (
        Gemma3TextConfig,
        SMALL | dict(sliding_window=4, layer_types=["sliding_attention", "full_attention"]),
    ),
}


def net(
    seed=0, kind="llama", attn="sdpa", dtype=torch.float64, spread=4.0, **options
) -> models.Model:
    """Return a random model in memory whose attention is far from flat."""
    maker, base = KINDS[kind]
    torch.manual_seed(seed)
    module = AutoModelForCausalLM.from_config(
        maker(**base | options), attn_implementation=attn, dtype=dtype
    )
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                parameter *= spread
            if "embed" in name:
                parameter *= 20
    return models.as_model(module.eval(), Path("nowhere"))


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    return make.dataset(tmp_path_factory.mktemp("data")).train


def tokens_in(batch) -> int:
    return int((batch.row_of >= 0).sum())


def passes(both, student, teacher, batch) -> torch.Tensor:
    """Run both models under watch; return the student's hidden states at targets."""
    with torch.inference_mode(), both.watch("teacher"):
        teacher.hidden(batch)
    with both.watch("student"):
        return student.hidden(batch)


def whole(both, student, teacher, batches) -> dict:
    """Return the terms of a step that is cut into `batches`, as the loop computes them."""
    tokens, rows, pooled, offset, found = (
        sum(map(tokens_in, batches)),
        sum(len(b.rows) for b in batches),
        [],
        0,
        {},
    )
    if "contrastive" in both.weights:
        for batch in batches:
            with torch.inference_mode(), both.watch("teacher"):
                teacher.hidden(batch)
            pooled.append(both.pool(batch))
    for batch in batches:
        passes(both, student, teacher, batch)
        for name, term in both.terms(
            batch, tokens, rows, torch.cat(pooled) if pooled else None, offset
        ).items():
            found[name] = found.get(name, 0) + term
        offset += len(batch.rows)
    return found


def gradients(both, student, teacher, batches) -> tuple[dict, dict]:
    """Return the terms of a step, and the gradient of their sum at the student and the
    projections."""
    for module in (student.module, both):
        module.zero_grad()
    found = whole(both, student, teacher, batches)
    sum(found.values()).backward()
    named = [*student.module.named_parameters(), *both.named_parameters()]
    return {name: term.item() for name, term in found.items()}, {
        n: p.grad.clone() for n, p in named if p.grad is not None
    }


def same(seen, wanted, limit=1e-9):
    (terms, grads), (other_terms, other_grads) = seen, wanted
    assert terms == pytest.approx(other_terms, rel=limit, abs=limit) and set(grads) == set(
        other_grads
    )
    for name in grads:
        torch.testing.assert_close(grads[name], other_grads[name], rtol=limit, atol=limit, msg=name)


def error_of(call) -> str:
    with pytest.raises(SystemExit) as ended:
        call()
    assert "\n" not in str(ended.value)
    return str(ended.value)


# --- the small functions


@pytest.mark.parametrize("loss", (beside.feature_mse, beside.feature_cosine))
def test_feature_loss_is_what_it_says_and_its_gradient_is_right(loss):
    student, teacher = (
        torch.randn(5, 7, dtype=torch.float64, requires_grad=True),
        3 * torch.randn(5, 7, dtype=torch.float64),
    )
    wanted = {
        "feature_mse": (student - teacher).norm(dim=1) ** 2 / teacher.norm(dim=1) ** 2,
        "feature_cosine": 1 - torch.cosine_similarity(student, teacher),
    }[loss.__name__]
    torch.testing.assert_close(loss(student, teacher), wanted)
    torch.autograd.gradcheck(lambda s: loss(s, teacher), student)
    torch.testing.assert_close(loss(10 * student, 10 * teacher), wanted)
    assert beside.feature_mse(torch.zeros(5, 7), teacher.float()).tolist() == pytest.approx([1] * 5)


@pytest.mark.parametrize("heads", (4, 2))
def test_attention_kl_is_what_it_says_and_its_gradient_is_right(heads):
    masked = torch.ones(6, 6, dtype=torch.bool).triu(1)

    def logs(scores):
        return scores.masked_fill(masked, torch.finfo(scores.dtype).min).log_softmax(-1)

    teacher, scores = (
        logs(torch.randn(2, 4, 6, 6, dtype=torch.float64)),
        torch.randn(2, heads, 6, 6, dtype=torch.float64, requires_grad=True),
    )
    p, q = teacher.exp(), logs(scores).exp()
    if heads != 4:
        p, q = p.mean(1, keepdim=True), q.mean(1, keepdim=True)
    wanted = (torch.special.xlogy(p, p) - torch.special.xlogy(p, q)).sum(-1).mean(1)
    torch.testing.assert_close(beside.attention_kl(teacher, logs(scores)), wanted)
    torch.autograd.gradcheck(lambda s: beside.attention_kl(teacher, logs(s)), scores)
    assert (wanted[:, 1:] > 1e-3).all()


def test_a_key_that_only_the_student_masks_costs_a_finite_number_of_nats():
    scores = torch.zeros(1, 1, 1, 4, requires_grad=True)
    narrow = scores.masked_fill(
        torch.tensor([True, False, False, False]), torch.finfo(torch.float32).min
    ).log_softmax(-1)
    loss = beside.attention_kl(torch.zeros(1, 1, 1, 4).log_softmax(-1), narrow).sum()
    loss.backward()
    assert 10 < loss < -losses.FLOOR and torch.isfinite(scores.grad).all()


def test_contrast_is_infonce_less_the_teachers_own_and_its_gradient_is_right():
    teacher, student = (
        torch.randn(5, 3, dtype=torch.float64),
        torch.randn(2, 3, dtype=torch.float64, requires_grad=True),
    )

    def similar(rows):
        return torch.cosine_similarity(rows[:, None], teacher[None], dim=-1) / 0.2

    def cross(rows):
        return torch.nn.functional.cross_entropy(
            similar(rows), torch.tensor([2, 3]), reduction="none"
        )

    torch.testing.assert_close(
        beside.contrast(student, teacher, 2, 0.2), cross(student) - cross(teacher[2:4])
    )
    torch.autograd.gradcheck(lambda s: beside.contrast(s, teacher, 2, 0.2), student)
    assert not beside.contrast(teacher[2:4], teacher, 2, 0.2).any()


def test_rows_are_pooled_over_their_own_tokens():
    hidden, row_of = (
        torch.randn(2, 5, 3, dtype=torch.float64),
        torch.tensor([[0, 0, 1, 1, -1], [2, 2, 2, -1, -1]]),
    )
    wanted = torch.stack([hidden[0, :2].mean(0), hidden[0, 2:4].mean(0), hidden[1, :3].mean(0)])
    torch.testing.assert_close(beside.pool(hidden, row_of, 3), wanted)


def test_layer_pairs_are_read_as_written():
    assert beside.layer_pairs("0:0, 3:7,last:last", 4, 8) == [(0, 0), (3, 7)]
    assert beside.layer_pairs("even:2", 4, 8) == [(1, 3), (3, 7)]
    assert beside.layer_pairs("even:3", 24, 28) == [(7, 8), (15, 17), (23, 27)]
    assert beside.layer_pairs("even:1", 2, 4) == beside.layer_pairs("last:last", 2, 4) == [(1, 3)]


# --- the whole


@pytest.mark.parametrize("options", EACH.values(), ids=EACH)
def test_a_student_equal_to_its_teacher_has_no_loss_and_where_that_is_the_least_no_gradient(
    split, options
):
    student, teacher = net(0), net(0)
    terms, grads = gradients(
        Beside(student, teacher, **options), student, teacher, [split.batch([[0, 1], [2]])]
    )
    assert abs(sum(terms.values())) < 1e-12 and grads
    assert "contrastive" in terms or all(
        g.abs().max() < 1e-9 for g in grads.values()
    )  # InfoNCE would have rows still further apart


@pytest.mark.parametrize("options", EACH.values(), ids=EACH)
def test_the_gradient_at_the_weights_is_that_of_finite_differences(split, options, monkeypatch):
    def wide_norm(norm, x):
        return norm.weight * x * (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()

    monkeypatch.setattr(LlamaRMSNorm, "forward", wide_norm)  # transformers' own rounds to float32
    student, teacher = (
        net(0),
        net(1, num_hidden_layers=3, hidden_size=24, num_attention_heads=2, head_dim=12),
    )
    both, batches = Beside(student, teacher, **options).double(), [split.batch([[0, 1], [2]])]
    terms, grads = gradients(both, student, teacher, batches)
    assert list(terms) == list(both.weights) and abs(sum(terms.values())) > 1e-3
    weights = dict(student.module.named_parameters()) | dict(both.named_parameters())
    for name in [
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.1.self_attn.q_proj.weight",
        *dict(both.named_parameters()),
    ]:
        weight, toward = weights[name], torch.randn_like(weights[name])
        ends = []
        with torch.no_grad():
            for way in (1e-6, -1e-6):
                weight += way * toward
                ends.append(sum(whole(both, student, teacher, batches).values()).item())
                weight -= way * toward
        assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(
            (grads[name] * toward).sum().item(), rel=1e-5, abs=1e-9
        ), name


def test_packing_padding_row_order_and_the_cut_of_the_step_change_nothing(split):
    student, teacher = net(0), net(1, hidden_size=24, num_attention_heads=2, head_dim=12)
    both = Beside(student, teacher, **ALL).double()
    wanted = gradients(both, student, teacher, [split.batch([[0], [1], [2], [3], [4]])])
    assert all(abs(term) > 1e-3 for term in wanted[0].values())
    for lines in (
        [[[0, 1, 2], [3, 4]]],
        [[[4, 2], [0, 3, 1]]],
        [[[3], [1]], [[0, 2, 4]]],
        [[[0]], [[1]], [[2]], [[3]], [[4]]],
    ):
        same(gradients(both, student, teacher, [split.batch(cut) for cut in lines]), wanted)
    same(gradients(both, student, teacher, [split.batch([[0, 1, 2], [3, 4]], pad_to=97)]), wanted)


@pytest.mark.parametrize(
    "kind, attn", (("llama", "sdpa"), ("qwen3", "sdpa"), ("gemma3", "sdpa"), ("gemma2", "eager"))
)
def test_maps_are_those_of_transformers_own_eager_attention(split, kind, attn):
    student, plain = net(0, kind, attn), net(0, kind, "eager")
    both = Beside(student, net(1, kind, attn), attention=1.0, attention_layers="0:0,1:1")
    for row in range(3):
        batch = split.batch([[row]])
        wanted = plain.body(
            input_ids=batch.tokens,
            position_ids=batch.positions,
            use_cache=False,
            output_attentions=True,
        )
        with both.watch("student"):
            seen = student.body(
                input_ids=batch.tokens, position_ids=batch.positions, use_cache=False
            )
        for layer in range(2):
            torch.testing.assert_close(
                both.sides["student"].ear.maps[layer].exp(),
                wanted.attentions[layer].double(),
                rtol=1e-5,
                atol=1e-6,
            )
        torch.testing.assert_close(
            seen.last_hidden_state, wanted.last_hidden_state, rtol=1e-5, atol=1e-5
        )
    assert wanted.attentions[0][..., -2, :].std() > 0.01, "a flat map would prove nothing"


def test_maps_of_a_packed_line_are_blocks_and_those_of_its_rows(split):
    student = net(0, "gemma3")
    both = Beside(student, net(1, "gemma3"), attention=1.0, attention_layers="0:0,1:1")
    found = []
    for lines in ([[0, 1]], [[0]], [[1]]):
        with both.watch("student"):
            student.hidden(split.batch(lines))
        found.append(both.sides["student"].ear.maps)
    first = found[1][0].shape[-1]
    for layer in range(2):
        packed = found[0][layer].exp()
        torch.testing.assert_close(packed[..., :first, :first], found[1][layer].exp())
        torch.testing.assert_close(packed[..., first:, first:], found[2][layer].exp())
        assert not packed[..., first:, :first].any()


def test_an_output_with_maps_equals_plain_sdpa_and_only_chosen_layers_are_computed_apart(
    split, monkeypatch
):
    student, plain, batch, made = (
        net(0, num_hidden_layers=3),
        net(0, num_hidden_layers=3),
        split.batch([[0, 1], [2]]),
        [],
    )
    both = Beside(student, net(1), attention=1.0, attention_layers="1:1")
    whole_map = attention.log_map
    monkeypatch.setattr(attention, "log_map", lambda *args: made.append(1) or whole_map(*args))
    with both.watch("student"):
        seen = student.hidden(batch)
    torch.testing.assert_close(seen, plain.hidden(batch), rtol=1e-5, atol=1e-5)
    assert len(made) == 1 and list(both.sides["student"].ear.maps) == [1]
    with torch.no_grad():  # evaluation and generation use plain sdpa everywhere
        assert torch.equal(student.hidden(batch), plain.hidden(batch)) and len(made) == 1
        asked = dict(max_new_tokens=5, do_sample=False, pad_token_id=3)
        assert torch.equal(
            student.module.generate(batch.tokens[:1, :6], **asked),
            plain.module.generate(batch.tokens[:1, :6], **asked),
        )


def test_gradient_checkpointing_gives_the_same_gradients(split):
    student, teacher, batches = net(0), net(1), [split.batch([[0, 1], [2]]), split.batch([[3, 4]])]
    both = Beside(student, teacher, **ALL)
    student.module.train()
    wanted = gradients(both, student, teacher, batches)
    student.module.activation_checkpointing_enable({"use_reentrant": False})
    calls, run = (
        [],
        student.body.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1)),
    )
    same(gradients(both, student, teacher, batches), wanted)
    run.remove()
    assert (
        len(calls) == 4 and not both.sides["student"].hidden and not both.sides["student"].ear.maps
    ), "each layer runs twice, and keeps nothing"


def test_half_precision_passes_give_float32_losses_near_those_of_float32(split):
    student, teacher, batch = (
        net(0, dtype=torch.float32),
        net(1, dtype=torch.float32),
        split.batch([[0, 1], [2]]),
    )
    both = Beside(student, teacher, **ALL)
    wanted = gradients(both, student, teacher, [batch])
    with torch.autocast("cpu", torch.bfloat16):
        passes(both, student, teacher, batch)
        assert both.sides["student"].ear.maps[1].dtype == torch.float32
        found = whole(both, student, teacher, [batch])
    assert {term.dtype for term in found.values()} == {torch.float32}
    assert {name: term.item() for name, term in found.items()} == pytest.approx(
        wanted[0], rel=0.1, abs=0.02
    )
    sum(found.values()).backward()
    half = net(1, dtype=torch.bfloat16)  # a teacher that is kept in half precision
    both = Beside(student, half, **ALL)
    passes(both, student, half, batch)
    assert both.sides["teacher"].ear.maps[1].dtype == torch.float32
    found = whole(both, student, half, [batch])
    assert {name: term.item() for name, term in found.items()} == pytest.approx(
        wanted[0], rel=0.1, abs=0.02
    )


def test_terms_are_float32_even_under_autocast(split):
    student, teacher = (
        net(0, dtype=torch.float32),
        net(1, dtype=torch.float32, hidden_size=24, num_attention_heads=2, head_dim=12),
    )
    both, batch, seen = Beside(student, teacher, **ALL), split.batch([[0, 1], [2]]), []
    for half in (False, True):
        passes(both, student, teacher, batch)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            seen.append(both.terms(batch, tokens_in(batch), 3, both.pool(batch)))
    assert seen[0] == seen[1]


@pytest.mark.parametrize("kind", beside.FEATURES)
def test_a_float16_teacher_with_massive_activations_gives_a_finite_exact_loss(split, kind):
    """300 squared is infinite in float16."""
    student, teacher, batch = (
        net(0, dtype=torch.float32),
        net(1, dtype=torch.float16),
        split.batch([[0, 1]]),
    )
    both = Beside(student, teacher, feature=1.0, feature_kind=kind)
    passes(both, student, teacher, batch)
    massive = both.sides["teacher"].hidden[1].float()
    massive[..., 5] = 3000.0
    both.sides["teacher"].hidden[1] = massive.half()
    own, other = (side.hidden[1].detach().double().flatten(0, 1) for side in both.sides.values())
    wanted = both.measure(own, other).sum().item() / tokens_in(batch)
    assert both.terms(batch, tokens_in(batch), 2)["feature"].item() == pytest.approx(
        wanted, rel=1e-5
    )


@pytest.mark.parametrize("options", EACH.values(), ids=EACH)
def test_the_loss_decreases_and_projections_are_learned(split, options):
    student, teacher = (
        net(0, dtype=torch.float32),
        net(1, dtype=torch.float32, hidden_size=24, num_attention_heads=2, head_dim=12),
    )
    both, batches = Beside(student, teacher, **options), [split.batch([[0, 1], [2, 3]])]
    before = [p.clone() for p in both.parameters()]
    assert len(before) == (0 if "attention" in options else 1) and all(
        p.dtype == torch.float32 for p in before
    )
    optimizer = torch.optim.AdamW(
        [*student.module.parameters(), *both.parameters()], lr=1e-3, weight_decay=0.0
    )
    seen = []
    for _ in range(8):
        loss = sum(whole(both, student, teacher, batches).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    make.assert_falls(seen)
    assert all(not torch.equal(a, b) for a, b in zip(before, both.parameters()))


def test_weight_0_leaves_model_and_training_as_they_are_bit_for_bit(split):
    def steps(with_beside):
        student, teacher, batch = (
            net(0, dtype=torch.float32),
            net(1, dtype=torch.float32),
            split.batch([[0, 1], [2]]),
        )
        both = Beside(student, teacher) if with_beside else None
        optimizer = train.adamw(
            torch.nn.ModuleList([student.module, both] if both else [student.module]),
            1e-2,
            0.1,
            0.95,
            torch.device("cpu"),
        )
        for _ in range(3):
            hidden = passes(both, student, teacher, batch) if both else student.hidden(batch)
            loss = losses.head_loss(hidden, student.head(), batch.labels)[0]
            (loss + sum(both.terms(batch, 1, 1).values()) if both else loss).backward()
            optimizer.step()
            optimizer.zero_grad()
        return student, both

    (plain, _), (student, both) = steps(False), steps(True)
    assert all(
        torch.equal(a, b) for a, b in zip(plain.module.parameters(), student.module.parameters())
    )
    assert (
        student.module.config._attn_implementation == "sdpa"
        and not list(both.parameters())
        and not both.say()
        and both.weights == {}
    )


def test_a_loss_that_is_off_hooks_nothing_and_computes_nothing(split, monkeypatch):
    student, teacher, batch = net(0), net(1), split.batch([[0, 1]])
    for off in ("attention_kl", "contrast", "pool"):
        monkeypatch.setattr(beside, off, None)
    both = Beside(student, teacher, feature=1.0, feature_layers="0:0")
    with both.watch("student"):
        assert [len(layer._forward_hooks) for layer in student.body.layers] == [
            1,
            0,
        ] and not student.body._forward_hooks
        student.hidden(batch)
    assert not any(part._forward_hooks for part in student.module.modules())
    with both.watch("teacher"):
        teacher.hidden(batch)
    assert (
        list(both.terms(batch, 10, 2)) == ["feature"]
        and student.module.config._attn_implementation == "sdpa"
    )


def test_what_is_captured_is_let_go(split):
    student, teacher, batch = net(0), net(1), split.batch([[0, 1]])
    both = Beside(student, teacher, **ALL)
    whole(both, student, teacher, [batch])
    for side in both.sides.values():
        assert not side.hidden and side.last is None and not side.ear.maps


def test_projections_depend_on_the_seed_and_the_checkpoint_does_not_hold_them():
    student, teacher = net(0), net(1, hidden_size=24, num_attention_heads=2, head_dim=12)
    made = [
        Beside(student, teacher, feature=1.0, feature_layers="even:2", contrastive=1.0, seed=seed)
        for seed in (1, 1, 2)
    ]
    first, again, other = ([p.detach() for p in both.parameters()] for both in made)
    assert (
        [p.shape for p in first] == [(24, 32)] * 3
        and all(map(torch.equal, first, again))
        and not any(map(torch.equal, first, other))
    )
    assert set(made[0].state_dict()) == {
        "feature_projections.0.weight",
        "feature_projections.1.weight",
        "contrastive_projection.weight",
    }
    assert not any("projection" in name for name in student.module.state_dict())


def test_an_exported_config_does_not_name_our_attention(tmp_path):
    student = net(0)
    Beside(student, net(1), **ALL)
    student.module.save_pretrained(tmp_path)
    assert attention.NAME not in (tmp_path / "config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def test_what_is_computed_is_said():
    said = Beside(
        net(0),
        net(1, num_hidden_layers=3, num_attention_heads=2, head_dim=12, hidden_size=24),
        **ALL,
    ).say()
    assert (
        said[0]
        == "feature: mse of the outputs of layers 0:0 1:2 (student:teacher), through a learned"
        " projection"
    )
    assert (
        said[1]
        == "attention: maps of layers 0:0 1:2 (student:teacher), means over heads, 4 and 2; eager"
        " attention there alone"
    )
    assert said[2].startswith("contrastive: InfoNCE at temperature 0.1")


# --- errors


@pytest.mark.parametrize(
    "text", ("2:0", "0:3", "-1:0", "0", "0:0:0", "a:b", "even:3", "even:0", "even", "")
)
def test_layers_that_do_not_exist_are_a_one_line_error_that_says_how_many_there_are(text):
    words = error_of(
        lambda: Beside(net(0), net(1, num_hidden_layers=3), feature=1.0, feature_layers=text)
    )
    assert (
        words.startswith("error: --feature-layers")
        and "the student has 2 layers, the teacher 3" in words
        and "even:N, N from 1 to 2" in words
    )
    assert error_of(
        lambda: Beside(net(0), net(1), attention=1.0, attention_layers="9:0")
    ).startswith("error: --attention-layers 9:0")


def test_an_attention_that_gives_no_maps_is_a_one_line_error(monkeypatch):
    flash = net(0)
    flash.module.config._attn_implementation_internal = "flash_attention_2"
    assert "flash_attention_2 gives no attention maps; mend it with: --attn sdpa" in error_of(
        lambda: Beside(flash, net(1), attention=1.0)
    )
    monkeypatch.setitem(
        KINDS,
        "sinks",
        (GptOssConfig, SMALL | dict(num_local_experts=2, num_experts_per_tok=1, sliding_window=4)),
    )
    words = error_of(lambda: Beside(net(0, "sinks", "eager", torch.float32), net(1), attention=1.0))
    assert "GptOssForCausalLM gives no maps" in words and "attention sinks" in words
    deaf = net(0)
    deaf.body.layers[1].self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    assert "no maps of layers 1" in error_of(
        lambda: Beside(deaf, net(1), attention=1.0, attention_layers="0:0,1:1")
    )
    own = net(0)
    project, strange = own.body.layers[1].self_attn.v_proj.forward, own.body.layers[1].self_attn
    strange.v_proj.forward = lambda x: (
        project(x) * (1 if strange.config._attn_implementation == "sdpa" else 2)
    )
    assert "hidden states that differ by" in error_of(lambda: Beside(own, net(1), attention=1.0))
    assert own.module.config._attn_implementation == "sdpa"


def test_a_compiled_model_is_a_one_line_error():
    student = net(0)
    body = torch.nn.Module()
    body._orig_mod = (
        student.body
    )  # as torch.compile leaves it, without the seconds that importing a compiler takes
    compiled = models.Model(student.module, body, student.folder)
    assert "does not show its layers; saw --compile" in error_of(
        lambda: Beside(compiled, net(1), feature=1.0)
    )


# --- balance


def logits_and_terms(
    both, student, teacher, batch, pooled, offset, targets, tokens, rows, scale=1.0
):
    """Return what the loop has of one micro-batch: hidden, d loss / d hidden, and the terms."""
    hidden = passes(both, student, teacher, batch)
    leaf = hidden.detach().requires_grad_()
    (scale * losses.head_loss(leaf, student.head(), batch.labels)[0] / targets).backward()
    return (
        hidden,
        leaf.grad,
        {
            name: scale * term
            for name, term in both.terms(batch, tokens, rows, pooled, offset).items()
        },
    )


def balanced_step(balance, both, student, teacher, batches, step=0, scale=1.0, louder=None):
    """Run the loop body of Balance's docstring; return the log of `move`."""
    targets, tokens, rows = (
        sum(len(b.labels) for b in batches),
        sum(map(tokens_in, batches)),
        sum(len(b.rows) for b in batches),
    )
    pooled, offset = [], 0
    for batch in batches:
        with torch.inference_mode(), both.watch("teacher"):
            teacher.hidden(batch)
        pooled.append(both.pool(batch))
    for batch in batches:
        hidden, gradient, terms = logits_and_terms(
            both, student, teacher, batch, torch.cat(pooled), offset, targets, tokens, rows, scale
        )
        terms = {name: term * (louder or {}).get(name, 1) for name, term in terms.items()}
        balance.backward(hidden, gradient, terms, step)
        offset += len(batch.rows)
    return balance.move() if balance.due(step) else {}


def test_a_step_with_balance_has_the_gradient_of_a_plain_one(split):
    student, teacher, batch = net(0), net(1), split.batch([[0, 1], [2]])
    both = Beside(student, teacher, **ALL)
    balanced_step(
        Balance({"feature": 0.5, "attention": 2.0, "contrastive": 1.0}, 1, both.shared()),
        both,
        student,
        teacher,
        [batch],
    )
    seen = {n: p.grad.clone() for n, p in student.module.named_parameters()}
    student.module.zero_grad()
    with torch.inference_mode(), both.watch("teacher"):
        teacher.hidden(batch)
    pooled = both.pool(batch)
    hidden = passes(both, student, teacher, batch)
    terms = both.terms(batch, tokens_in(batch), len(batch.rows), pooled)
    logits = losses.head_loss(hidden, student.head(), batch.labels)[0] / len(batch.labels)
    (logits + 0.5 * terms["feature"] + 2.0 * terms["attention"] + terms["contrastive"]).backward()
    for name, parameter in student.module.named_parameters():
        torch.testing.assert_close(seen[name], parameter.grad, rtol=1e-9, atol=1e-11)


def test_the_shared_layer_is_the_highest_that_every_term_reaches():
    student, teacher = net(0, num_hidden_layers=4), net(1, num_hidden_layers=6)
    name_of = {p: n for n, p in student.module.named_parameters()}

    def names(**options):
        return [
            name_of[p].removeprefix("model.layers.")
            for p in Beside(student, teacher, **options).shared()
        ]

    assert {n[0] for n in names(contrastive=1.0)} == {"3"}
    assert {n[0] for n in names(feature=1.0, feature_layers="0:0,2:4")} == {"2"} and len(
        names(feature=1.0, feature_layers="0:0,2:4")
    ) == 9
    assert names(feature=1.0, attention=1.0, attention_layers="1:1") == [
        "1.self_attn.q_proj.weight",
        "1.self_attn.k_proj.weight",
        "1.input_layernorm.weight",
    ]
    assert {n[0] for n in names(feature=1.0, feature_layers="1:1", attention=1.0)} == {"1"}
    student.body.layers[3].requires_grad_(False).self_attn.q_proj.requires_grad_(
        True
    )  # as with LoRA
    assert names(contrastive=1.0) == ["3.self_attn.q_proj.weight"]


@pytest.mark.parametrize("louder", ("feature", "attention", "contrastive"))
def test_a_loss_scaled_by_1000_is_back_at_an_equal_share_in_50_steps(split, louder):
    student, teacher = net(0, dtype=torch.float32), net(1, dtype=torch.float32)
    both = Beside(student, teacher, **ALL)
    balance, batches = Balance(both.weights, 5, both.shared()), [split.batch([[0, 1], [2, 3]])]
    optimizer, logs = torch.optim.AdamW(student.module.parameters(), lr=1e-4), []
    for step in range(51):
        log = balanced_step(balance, both, student, teacher, batches, step, louder={louder: 1000.0})
        logs += [log] if log else []
        optimizer.step()
        optimizer.zero_grad()
    assert len(logs) == 11 and logs[0][f"pull_{louder}"] > 0.9
    shares = [value for name, value in logs[-1].items() if name.startswith("pull_")]
    assert (
        len(shares) == 4
        and sum(shares) == pytest.approx(1)
        and all(abs(share - 0.25) < 0.05 for share in shares)
    ), logs[-1]
    assert (
        balance.weights["logits"] == 1 and logs[-1][f"weight_{louder}"] == balance.weights[louder]
    )


def test_balance_does_not_depend_on_the_cut_of_the_step_nor_on_the_loss_scale(split):
    student, teacher = net(0), net(1, hidden_size=24, num_attention_heads=2, head_dim=12)
    both, seen = Beside(student, teacher, **ALL).double(), []
    for cut, scale in (
        ([[[0, 1, 2], [3, 4]]], 1.0),
        ([[[0]], [[1, 3], [2]], [[4]]], 1.0),
        ([[[0, 1, 2], [3, 4]]], 65536.0),
    ):
        balance = Balance(both.weights, 1, both.shared())
        balanced_step(
            balance, both, student, teacher, [split.batch(lines) for lines in cut], scale=scale
        )
        seen.append(balance.weights)
    assert seen[0] != {name: 1.0 for name in seen[0]}
    assert seen[1] == pytest.approx(seen[0], rel=1e-9) and seen[2] == pytest.approx(
        seen[0], rel=1e-9
    )


def test_a_restored_balance_continues_exactly(split):
    student, teacher, batches = (
        net(0, dtype=torch.float32),
        net(1, dtype=torch.float32),
        [split.batch([[0, 1], [2]])],
    )
    both = Beside(student, teacher, **ALL)
    straight = Balance(both.weights, 2, both.shared())
    for step in range(2):
        balanced_step(straight, both, student, teacher, batches, step)
    restored = Balance(both.weights, 2, both.shared(), json.loads(json.dumps(straight.state)))
    assert restored.weights == straight.weights != Balance(both.weights, 2, both.shared()).weights
    assert [
        balanced_step(straight, both, student, teacher, batches, step) for step in (2, 3, 4)
    ] == [balanced_step(restored, both, student, teacher, batches, step) for step in (2, 3, 4)]


def test_weights_go_half_of_the_way_in_logs_at_each_measurement():
    shared = [torch.nn.Parameter(torch.ones(2))]
    balance, seen = Balance({"feature": 1.0}, 5, shared), []
    assert [step for step in range(12) if balance.due(step)] == [0, 5, 10]
    for _ in range(3):
        balance.measure(
            {"logits": (shared[0].sum(), None), "feature": (16 * shared[0].sum(), None)}
        )
        seen.append(balance.move())
    assert [log["weight_feature"] for log in seen] == pytest.approx(
        [16**-0.5, 16**-0.75, 16**-0.875]
    )
    assert [log["pull_feature"] for log in seen] == pytest.approx([16 / 17, 4 / 5, 2 / 3])
    assert balance.weights["logits"] == 1


def test_weights_are_bounded_and_a_term_without_a_finite_gradient_keeps_its_weight():
    shared = [torch.nn.Parameter(torch.ones(2))]
    for factor, wanted in ((1.0, 1.0), (0.0, 1.0), (math.inf, 1.0), (1e-30, 1e6), (1e30, 1e-6)):
        balance = Balance({"feature": 1.0}, 1, shared)
        balance.measure(
            {
                "logits": (shared[0].sum(), None),
                "feature": (shared[0].double().sum() * factor, None),
            }
        )
        balance.move()
        assert balance.weights == {"logits": 1.0, "feature": wanted}, factor


def test_checkpointing_does_not_change_what_is_measured(split):
    student, teacher, batches, seen = net(0), net(1), [split.batch([[0, 1], [2]])], []
    both = Beside(student, teacher, **ALL)
    student.module.train()
    for on in (False, True):
        if on:
            student.module.activation_checkpointing_enable({"use_reentrant": False})
        balance = Balance(both.weights, 1, both.shared())
        student.module.zero_grad()
        balanced_step(balance, both, student, teacher, batches)
        seen.append(
            (balance.weights, {n: p.grad.clone() for n, p in student.module.named_parameters()})
        )
    same(seen[1], seen[0])


def test_sides_take_any_object_with_a_module_and_a_body():
    teacher = net(1)
    live = SimpleNamespace(
        module=teacher.module, body=teacher.body, device=teacher.device, vocab=teacher.vocab
    )
    assert Beside(net(0), live, **ALL).attention_pairs == [(0, 0), (1, 1)]
