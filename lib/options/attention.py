"""Attention maps of chosen layers: an attention for transformers that computes these layers itself,
in float32, and hands them out.

Contract: `listen` gives a model this attention under the name NAME; all layers but the chosen ones
go to sdpa as before (those with a soft cap, which sdpa does not know, are computed here too, and
not kept). A chosen layer is computed here wherever there is a gradient, watched or not: activation
checkpointing runs it a second time in backward, and must find the same operations there. An
attention that computes something else than softmax(soft cap(q k^T * scaling) + mask) v is refused
by a probe of eight tokens.
"""

import weakref

import torch
from torch import Tensor, nn

from lib import files, models
from lib.head import wide

NAME = "watched"  # and no name with sdpa, flash or flex in it, which transformers takes for these
# an attention module of a chosen layer -> (its Ear, the layer's number)
PLACES = weakref.WeakKeyDictionary()


class Ear:
    """The maps of one model's chosen layers: while `on`, maps[layer] is (B, heads, L, L), the
    log-probabilities of the last forward pass."""

    def __init__(self) -> None:
        self.on, self.maps = False, {}


def log_map(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None = None,
    causal: bool = True,
) -> Tensor:
    """Return the attention's log-probabilities (B, H, L, S), float32 or wider, with about -3e38
    where a key is masked.

    query (B, H, L, D), key (B, H', S, D) with H a multiple of H'; mask (B or 1, 1, L, S): bool,
    True = attend, or to be added; None = causal.
    """
    dtype = wide(query.dtype)
    scores = (
        query.to(dtype)
        @ key.to(dtype).repeat_interleave(query.shape[1] // key.shape[1], 1).transpose(2, 3)
        * scaling
    )
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is None and causal:
        mask = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = (
            scores.masked_fill(~mask, torch.finfo(dtype).min)
            if mask.dtype == torch.bool
            else scores + mask
        )
    return scores.log_softmax(-1)


def attend(
    module, query, key, value, attention_mask, dropout=0.0, scaling=None, softcap=None, **more
):
    """The attention function, as transformers' AttentionInterface calls it; returns (output (B, L,
    H, D), None)."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if more.get("s_aux") is not None or more.get("position_bias") is not None:
        raise NotImplementedError("attention sinks or a position bias")
    ear, layer = PLACES.get(module, (None, None))
    on = ear is not None and ear.on
    if softcap is None and not on and (ear is None or not torch.is_grad_enabled()):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **more
        )
    causal = more.get("is_causal")
    causal = query.shape[2] > 1 and (
        getattr(module, "is_causal", True) if causal is None else causal
    )
    with torch.autocast(query.device.type, enabled=False):
        logp = log_map(
            query,
            key,
            attention_mask,
            query.shape[-1] ** -0.5 if scaling is None else scaling,
            softcap,
            causal,
        )
        if on:
            ear.maps[layer] = logp
        weights = nn.functional.dropout(logp.exp(), dropout, training=dropout > 0).to(value.dtype)
        output = weights @ value.repeat_interleave(query.shape[1] // value.shape[1], 1)
    return output.transpose(1, 2).contiguous(), None


@torch.no_grad()
def listen(model: models.Model, layers: nn.ModuleList, chosen: list[int], flag: str) -> Ear:
    """Give a model this attention and return the Ear for its chosen layers; refuse a model whose
    attention it would change or not see."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    module, kind = model.module, type(model.module).__name__
    before = module.config.get_text_config()._attn_implementation
    if before not in ("sdpa", "eager", NAME):
        files.fail(f"{flag}: {before} gives no attention maps", mend="--attn sdpa")
    ear, tokens = Ear(), torch.arange(1, 9, device=model.device)[None] % model.vocab  # (1, 8)

    def hidden():
        return model.body(
            input_ids=tokens,
            position_ids=torch.arange(8, device=model.device)[None],
            use_cache=False,
        ).last_hidden_state.float()

    training = module.training
    module.eval()  # dropout would make two passes differ
    plain, seen, problem = hidden(), None, None
    module.set_attn_implementation(NAME)
    for part in layers.modules():  # of an earlier call
        PLACES.pop(part, None)
    for number in chosen:
        PLACES.update((part, (ear, number)) for part in layers[number].modules())
    ear.on = True
    try:
        seen = hidden()
    except NotImplementedError as unknown:
        problem = str(unknown)
    ear.on = False
    module.train(training)
    half = next(module.parameters()).dtype in (torch.float16, torch.bfloat16)
    limit = 0.1 if half else 1e-3  # relative, as in models.probe
    if seen is not None and (error := ((seen - plain).norm() / plain.norm()).item()) > limit:
        problem = f"hidden states that differ by {error:.2g} when its attention is computed here"
    elif seen is not None and (
        silent := [i for i in chosen if i not in ear.maps or ear.maps[i].shape[2:] != (8, 8)]
    ):
        problem = f"no maps of layers {', '.join(map(str, silent))}"
    if problem:
        module.set_attn_implementation(before)
        files.fail(
            f"{flag}: the attention of {kind} gives no maps that this project knows",
            problem,
            "softmax attention through transformers' AttentionInterface",
            "--attention-weight 0, or layers that have maps",
        )
    return ear
