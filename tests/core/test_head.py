"""The output layer: the same logits as the model's own, the exact tails, and never a (targets, V)
tensor."""

import dataclasses
import math
import subprocess
import sys

import make
import pytest
import torch
import transformers
from conftest import ROOT

from lib import head, models
from lib.head import Head

SIZES = dict(
    vocab_size=make.V,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    pad_token_id=3,
    bos_token_id=None,
    eos_token_id=3,
)
FAMILIES = {
    "llama": transformers.LlamaConfig(**SIZES, tie_word_embeddings=False),
    "qwen2": transformers.Qwen2Config(
        **{name: value for name, value in SIZES.items() if name != "head_dim"}
    ),
    "gemma2": transformers.Gemma2Config(**SIZES, final_logit_softcapping=2.0),
    "cohere": transformers.CohereConfig(**SIZES, logit_scale=0.25),
    "granite": transformers.GraniteConfig(**SIZES, logits_scaling=4.0),
    "gpt2": transformers.GPT2Config(
        vocab_size=make.V,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=128,
        bos_token_id=3,
        eos_token_id=3,
    ),
    "phi": transformers.PhiConfig(
        **{name: value for name, value in SIZES.items() if name != "head_dim"}
    ),  # its output layer has a bias
}
FORGOTTEN = {
    "gemma2": {"softcap": 0.0},
    "cohere": {"scale": 1.0},
    "granite": {"scale": 1.0},
    "phi": {"bias": None},
}


def family(name):
    """Return a Model of random weights, its logits spread as a trained model's are."""
    torch.manual_seed(0)
    module = transformers.AutoModelForCausalLM.from_config(FAMILIES[name]).eval()
    with torch.no_grad():
        module.get_output_embeddings().weight *= 20
        if module.get_output_embeddings().bias is not None:
            module.get_output_embeddings().bias.normal_()
    return models.as_model(module, None)


@torch.no_grad()
def both(model):
    """Return the model's own logits and our head's, both (12, V)."""
    tokens = torch.randint(4, make.V, (1, 12))
    hidden = model.body(input_ids=tokens, use_cache=False).last_hidden_state[0]
    return model.module(input_ids=tokens, use_cache=False).logits[0], torch.cat(
        [z.clone() for _, z in model.head().chunks(hidden)]
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_our_logits_are_the_models_own(name, monkeypatch):
    monkeypatch.setattr(head, "CHUNK_BYTES", 4 * make.V * 5)  # three chunks
    model = family(name)
    own, ours = both(model)
    assert own.std() > 0.2
    torch.testing.assert_close(ours, own, rtol=1e-5, atol=1e-5)
    models.probe(model)
    assert models.packs(model)


BERT = {name: SIZES[name] for name in SIZES if name not in ("head_dim", "num_key_value_heads")}
LATENT = dict(q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=8)
STRANGE = {
    # Granite divides by what HyperCLOVA X multiplies with; MPT's logit_scale transformers leaves out
    "hyperclovax": transformers.HyperCLOVAXConfig(**SIZES, logits_scaling=0.25),
    "mpt": transformers.MptConfig(
        vocab_size=make.V, d_model=32, n_layers=1, n_heads=4, logit_scale=9.0
    ),
    # more than the decoder lies before the output layer
    "bert": transformers.BertConfig(**BERT, is_decoder=True),
    "electra": transformers.ElectraConfig(**BERT, embedding_size=16, is_decoder=True),
    "minicpm3": transformers.MiniCPM3Config(
        **SIZES | dict(head_dim=4, num_key_value_heads=4), **LATENT, dim_model_base=16
    ),
}


@pytest.mark.parametrize("name", STRANGE)
def test_what_lies_before_and_behind_the_output_layer_is_found_without_a_name(name, monkeypatch):
    monkeypatch.setitem(FAMILIES, name, STRANGE[name])
    model = family(name)
    own, ours = both(model)
    torch.testing.assert_close(ours, own, rtol=1e-5, atol=1e-5)
    models.probe(model)
    module, tokens = model.module, torch.arange(12)[None]
    module(input_ids=tokens, use_cache=False).logits.logsumexp(-1).sum().backward()
    wanted = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    head, hidden = model.head(), model.body(input_ids=tokens, use_cache=False).last_hidden_state[0]
    head.logits(hidden, head.weight).logsumexp(-1).sum().backward()
    for name, parameter in module.named_parameters():
        if name in wanted:
            torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name, change", FORGOTTEN.items())
def test_trap_20_the_probe_refuses_a_head_that_forgets_softcap_scale_or_bias(
    name, change, monkeypatch
):
    model, plain = family(name), models.Model.head
    monkeypatch.setattr(
        models.Model,
        "head",
        lambda self, vocab=None: dataclasses.replace(plain(self, vocab), **change),
    )
    with pytest.raises(SystemExit, match="changes its logits in a way this project does not know"):
        models.probe(model)


def test_the_probe_refuses_a_model_that_changes_its_logits_afterwards(monkeypatch):
    model = family("llama")
    forward = model.module.lm_head.forward
    monkeypatch.setattr(model.module.lm_head, "forward", lambda hidden: 1.01 * forward(hidden))
    with pytest.raises(SystemExit, match="changes its logits in a way this project does not know"):
        models.probe(model)


def test_trap_15_rows_that_would_see_each_other_are_not_packed(capsys):
    model = family("gpt2")

    def leaking(input_ids, position_ids, use_cache):
        mask = torch.ones_like(
            input_ids
        )  # a mask of ones switches the detection of packed rows off
        return model.module.base_model(
            input_ids=input_ids, position_ids=position_ids, attention_mask=mask, use_cache=use_cache
        )

    leaks = models.Model(model.module, leaking, None)
    models.probe(leaks)
    assert not models.packs(leaks)
    said = capsys.readouterr().out
    assert "packed rows would see each other in GPT2LMHeadModel" in said and "--no-pack" in said


@pytest.mark.parametrize("temperatures", ([1.0], [1.0, 2.0, 4.0], [4.0, 0.5, 3.0, 1.0]))
@pytest.mark.parametrize("k", (1, 5, 200))
@pytest.mark.parametrize("dtype, limit", ((torch.float64, 1e-12), (torch.float32, 3e-6)))
def test_top_k_and_tails_equal_a_plain_sum(temperatures, k, dtype, limit):
    z = 6 * torch.randn(9, 200, dtype=torch.float64).to(dtype)
    ids, gaps, tails = head.topk_and_tails(z.clone(), k, temperatures)
    ordered = z.double().sort(dim=1, descending=True).values
    torch.testing.assert_close(z.gather(1, ids), ordered[:, :k].to(dtype))
    torch.testing.assert_close(
        gaps.double(), ordered[:, :1] - ordered[:, :k], rtol=1e-6, atol=limit
    )
    for column, t in enumerate(temperatures):
        wanted = ((ordered[:, k:] - ordered[:, :1]) / t).logsumexp(1)
        torch.testing.assert_close(tails[:, column].double(), wanted, rtol=limit, atol=4 * limit)


@pytest.mark.parametrize("temperatures", ([1.0], [1.0, 2.0, 4.0], [4.0, 0.5, 3.0, 1.0]))
@pytest.mark.parametrize("k", (1, 5, 199, 200))
def test_the_error_of_a_stored_tail_is_its_kl_written_out(temperatures, k):
    z, off = 6 * torch.randn(9, 200, dtype=torch.float64), torch.randn(9, 200, dtype=torch.float64)
    z[0, 3], z[1, :7], off[2] = 4000.0, -1e9, 0.0  # next to no tail; tokens left out; no error
    stored = z + off + 100
    rest = z.clone()
    ids, _ = head.take_top(rest, k)
    tails, errors = head.tails_and_errors(rest, temperatures, stored.clone())
    assert torch.equal(tails, head.topk_and_tails(z.clone(), k, temperatures)[2])
    inside = torch.zeros(9, 200, dtype=torch.bool).scatter(1, ids, True)
    for column, t in enumerate(temperatures):
        logp, logq = (
            (each / t).masked_fill(inside, -torch.inf).log_softmax(1) for each in (z, stored)
        )
        wanted = (logp.exp() * (logp - logq)).nan_to_num(0.0).sum(1)
        torch.testing.assert_close(errors[:, column], wanted, rtol=1e-9, atol=1e-9)
    assert (errors[2] < 1e-9).all() and (k == 200 or errors[3].max() > 1e-3 or k == 199)


def test_nothing_outside_the_top_k_is_minus_infinity_and_next_to_nothing_is_exact():
    rows = [[0.0, -1e4, -1e4, -1e4], [9.0, 8.0, -1e4, -1e4]]
    assert (head.topk_and_tails(torch.tensor(rows), 4, [1.0, 2.0])[2] == -math.inf).all()
    _, _, tails = head.topk_and_tails(torch.tensor(rows), 2, [1.0, 2.0])
    below, two = torch.tensor([[1e4, 5e3], [10009.0, 5004.5]]), math.log(2)
    torch.testing.assert_close(tails, two - below)


def test_the_vocabulary_is_cut_before_the_softmax():
    hidden, layer = torch.randn(4, 8), Head(torch.randn(70, 8), torch.randn(70), 61)
    ((_, z),) = layer.chunks(hidden)
    torch.testing.assert_close(z, hidden @ layer.weight[:61].t() + layer.bias[:61])


PEAK = """
import resource, sys, torch
from lib import head, losses
torch.set_num_threads(1)
n, v, d = 4096, 20011, 16
head.CHUNK_BYTES = 1 << 22
hidden, weight, labels = torch.randn(n, d, requires_grad=True), torch.randn(v, d, requires_grad=True), torch.randint(v, (n,))
teacher = losses.TopK(torch.randint(v, (n, 4)), torch.rand(n, 4), torch.zeros(n))
def loss(size):
    made = losses.head_loss(hidden[:size], head.Head(weight, None, v), labels[:size], teacher[:size], losses.Method(0.5, 2.0))[0]
    made.backward()
    hidden.grad = weight.grad = None
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
loss(1)  # libraries, and buffers of one target
before = peak()
loss(n)
print(peak() - before)
"""


def test_a_loss_never_holds_targets_times_vocabulary():
    """4096 targets of 20,011 tokens: one such tensor would take 328 MB; chunks take 4 MiB each, and
    the weight's gradient 1.3 MB."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK], cwd=ROOT, capture_output=True, text=True, check=True
    )
    extra = int(done.stdout)
    assert extra < 5 * (1 << 22) + 3 * 4 * 20011 * 16 + 4 * 4096 * 16 * 3, f"{extra / 1e6:.0f} MB"
