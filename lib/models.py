"""Models in memory: a Hugging Face causal LM as a body (tokens -> hidden states at targets) and a
head (hidden states -> logits).

Contract: `load` takes what lib/checkpoints.py finds. It refuses weights that are missing or not
finite, a vocabulary that is not the data's, and (by a probe: eight tokens through body and head,
and through the model itself) an architecture whose logits our head would not reproduce or whose
packed rows would see each other. An adapter is merged into its base in memory.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lib import checkpoints, data, files, generate
from lib.head import Head


@dataclass(frozen=True)
class Model:
    """module: the Hugging Face model. body: its decoder (compiled on request). folder: where it
    came from. limit: how many of its tokens are compared with a teacher's (None: all)."""

    module: Any
    body: Any
    folder: Path
    limit: int | None = field(default=None, kw_only=True)

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.module.parameters())

    @property
    def trained(self) -> int:
        """Parameters that get gradients: where an adapter is trained, its own alone."""
        return sum(p.numel() for p in self.module.parameters() if p.requires_grad)

    @property
    def vocab(self) -> int:
        """Rows of the output layer: at least the tokenizer's tokens, often padded above them."""
        return self.module.get_output_embeddings().weight.shape[0]

    def hidden(self, batch: data.Batch) -> Tensor:
        """Return the last hidden states (N, D) at the positions that predict the batch's targets;
        no logits are made."""
        output = self.body(input_ids=batch.tokens, position_ids=batch.positions, use_cache=False)
        return output.last_hidden_state.flatten(0, 1)[batch.where]

    def head(self, vocab: int | None = None) -> Head:
        """Return the output layer, cut to the first `vocab` tokens (default: `limit`, else all)."""
        config, layer = self.module.config.get_text_config(), self.module.get_output_embeddings()
        # Cohere multiplies, Granite divides
        scale = getattr(config, "logit_scale", None) or 1.0
        scale /= getattr(config, "logits_scaling", None) or 1.0
        softcap = getattr(config, "final_logit_softcapping", None) or 0.0
        bias = getattr(layer, "bias", None)
        return Head(layer.weight, bias, vocab or self.limit or self.vocab, scale, softcap)


def load(
    name: str,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    dataset: data.Dataset | None = None,
    attn: str = "sdpa",
    compiled: bool = False,
    from_scratch: bool = False,
    keep_layers: list[int] | None = None,
    pack: bool = True,
    seed: int = 0,
    amp: torch.dtype | None = None,
    trust_remote_code: bool = False,
    placing: dict | None = None,
) -> Model:
    """Load a causal LM, check it, and put it on a device.

    dataset       it must know the tokens of; without one the tokenizer is not looked at
    from_scratch  a folder with a config.json and no weights is allowed: a new model
    pack          rows will be packed: refuse a model in which they would see each other
    placing       options of from_pretrained (quantization_config, device_map) that put it where
                  it belongs by themselves
    """
    from transformers import AutoModelForCausalLM

    folder = checkpoints.local_folder(name, trust_remote_code)
    base = checkpoints.base_of(folder)
    if dataset is not None:
        words = checkpoints.with_tokenizer(folder)
        checkpoints.check_vocabulary(words, dataset, trust_remote_code)
    check_attention(attn, amp or dtype)
    options: dict[str, Any] = dict(attn_implementation=attn, trust_remote_code=trust_remote_code)
    options |= {"dtype": dtype} | (placing or {})
    module, loaded = read(
        AutoModelForCausalLM, folder, "a causal LM", seed=seed if from_scratch else None, **options
    )
    check_complete(base, loaded["missing_keys"])
    if base != folder:
        module = checkpoints.merge_adapter(module, folder, base)
    keep_only_layers(module, keep_layers)
    check_finite(folder, checkpoints.stored(base) if placing else module.named_parameters())
    if not placing:
        module.to(device)
    module.eval()
    model = Model(module, module.base_model, folder)
    if dataset is not None and model.vocab < (tokens := len(dataset.tokenizer())):
        files.fail(
            f"{folder} is too small for the data's tokenizer",
            f"{model.vocab} rows of its output layer",
            f"at least {tokens}",
        )
    probe(model, pack, amp)
    if compiled:
        model = Model(module, torch.compile(module.base_model, dynamic=True), folder)
    return model


def check_attention(attn: str, dtype: torch.dtype) -> None:
    """Refuse a kernel that does not compute in a dtype."""
    if attn == "flash_attention_2" and dtype == torch.float32:
        files.fail(
            "flash_attention_2 computes in half precision only",
            "float32",
            "half precision",
            "--amp fp16 or bf16 (a model that is only run: --dtype, --teacher-dtype)",
        )


def read(
    auto: Any,
    folder: Path,
    what: str,
    *,
    seed: int | None = None,
    config: Any = None,
    lenient: bool = False,
    **options: Any,
) -> tuple[Any, dict]:
    """Return a module of the transformers class `auto`, and what from_pretrained says of its
    tensors. Of an adapter it is the base.

    seed     of a new model, where the folder has no weights; None: such a folder is refused
    config   instead of the folder's own
    lenient  tensors of another size than the config's are left out, and listed
    """
    from transformers import AutoConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    base = checkpoints.base_of(folder)
    new = not checkpoints.has_weights(base)
    if new and seed is None:
        files.fail(
            f"{folder} has no weights",
            "config.json alone",
            "*.safetensors beside it",
            "make stage1 (stage1_sft.py makes a new model from a config.json)",
        )
    try:
        if new:
            print(
                f"model: {folder} has no weights: a new model is made from its config.json,"
                f" seed {seed}"
            )
            torch.manual_seed(seed)
            trust = options["trust_remote_code"]
            config = config or AutoConfig.from_pretrained(folder, trust_remote_code=trust)
            return auto.from_config(config, **options), {"missing_keys": ()}
        if checkpoints.is_gguf(folder):
            from transformers import modeling_gguf_pytorch_utils as gguf

            gguf.tqdm = partial(tqdm, disable=None)  # no bar in a log
            base, options = folder.parent, options | {"gguf_file": folder.name}
        if lenient:
            options["ignore_mismatched_sizes"] = True
        return auto.from_pretrained(
            base, config=config, use_safetensors=True, output_loading_info=True, **options
        )
    # safetensors, JSON, OSError, missing shards or kernels, code that is not trusted: each says
    # what it saw
    except Exception as broken:
        refuse_broken(base, what, broken)


def refuse_broken(folder: Path, what: str, broken: Exception) -> NoReturn:
    """Say why transformers cannot load a checkpoint, and what may mend it."""
    text, mend = str(broken), None
    if "trust_remote_code" in text or "custom code" in text:
        mend = "--trust-remote-code, if you trust that folder's Python"
    elif "attn_implementation" in text:
        mend = "--attn eager"
    files.fail(
        f"{folder} cannot be loaded as {what}",
        f"{type(broken).__name__}: {text[:300]}",
        "config.json and *.safetensors that belong together",
        mend,
    )


def check_complete(folder: Path, missing: Iterable[str]) -> None:
    """Refuse a checkpoint that lacks tensors, which transformers would fill with random numbers."""
    if missing := sorted(missing):
        files.fail(
            f"{folder} lacks weights",
            ", ".join(missing[:3]) + " missing",
            "every tensor of its config.json",
        )


def check_finite(folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse a checkpoint with NaN or infinity in one of its tensors, (name, tensor)."""
    for name, tensor in tensors:
        if not torch.isfinite(tensor).all():
            files.fail(
                f"{folder} holds weights that are not finite",
                f"NaN or infinity in {name}",
                "a whole checkpoint",
            )


def keep_only_layers(module: Any, keep: list[int] | None) -> None:
    """Keep the decoder layers numbered `keep` (None or none: all), in that order: a plain start for
    a student, made of its teacher."""
    if not keep:
        return
    body, config = module.base_model, module.config.get_text_config()
    bert, distilbert = getattr(body, "encoder", None), getattr(body, "transformer", None)
    places = ((body, "layers"), (bert, "layer"), (distilbert, "layer"))
    there = [(place, name) for place, name in places if hasattr(place, name)]
    holder, attribute = there[0] if there else (None, "")
    layers = getattr(holder, attribute, None)
    if layers is None or not all(0 <= i < len(layers) for i in keep) or len(set(keep)) != len(keep):
        wanted = "a body with .layers"
        if layers is not None:
            wanted = f"different numbers from 0 to {len(layers) - 1}"
        files.fail("--keep-layers does not fit the model", ",".join(map(str, keep)), wanted)
    setattr(holder, attribute, nn.ModuleList(layers[i] for i in keep))
    for number, layer in enumerate(getattr(holder, attribute)):
        for part in layer.modules():
            if hasattr(part, "layer_idx"):
                part.layer_idx = number
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in keep]
    config.num_hidden_layers = len(keep)
    with torch.device("meta"):
        again = type(module)(module.config)  # what from_pretrained will make of it
    if other := sorted({*again.state_dict()} ^ {*module.state_dict()}):
        files.fail(
            f"--keep-layers does not fit {type(module).__name__}: its layers are not alike",
            f"{other[0]} on one side only",
            "layers that may take each other's place",
            "others, the first among them",
        )


def stop_at(model: Model, end_tokens: list[int], tokenizer) -> None:
    """Make the model's own generation stop at the tokens that end the data's answers, beside those
    it knows."""
    if not model.module.can_generate():  # a classifier writes nothing
        return
    config = model.module.generation_config
    if not config.do_sample:  # set beside do_sample=False they make save_pretrained refuse
        config.temperature = config.top_p = config.top_k = None
    config.eos_token_id = generate.end_tokens(config, *end_tokens)
    config.pad_token_id = generate.pad_token(config, tokenizer)


@torch.no_grad()
def probe(model: Model, pack: bool, amp: torch.dtype | None = None) -> None:
    """Run eight tokens through the model both ways; refuse it where our head or packed rows would
    not give its own logits."""
    tokens = torch.arange(1, 9, device=model.device)[None] % model.vocab  # (1, 8)
    exact = (
        amp is None
        and next(model.module.parameters()).dtype == torch.float32
        and not getattr(model.module, "is_quantized", False)
    )
    # relative; a leak or a forgotten scale is far above it, half-precision rounding far below
    limit = 1e-3 if exact else 0.1

    def far(a, b):
        return ((a.float() - b.float()).norm() / b.float().norm().clamp_min(1e-9)).item()

    def body(ids: Tensor, positions: Tensor) -> Tensor:
        with torch.autocast(model.device.type, amp, enabled=amp is not None):
            return model.body(
                input_ids=ids, position_ids=positions, use_cache=False
            ).last_hidden_state[0]

    straight = torch.arange(8, device=model.device)[None]
    hidden = body(tokens, straight)
    with torch.autocast(model.device.type, amp, enabled=amp is not None):
        own = model.module(input_ids=tokens, position_ids=straight, use_cache=False).logits[0]
    _, ours = next(model.head().chunks(hidden))
    if (error := far(ours, own[: len(ours)])) > limit:
        files.fail(
            f"{type(model.module).__name__} changes its logits in a way this project does not know",
            f"a relative difference of {error:.2g}",
            f"at most {limit:g}",
        )
    alone = torch.cat([body(tokens[:, :5], straight[:, :5]), body(tokens[:, 5:], straight[:, :3])])
    packed = body(tokens, torch.cat([straight[:, :5], straight[:, :3]], 1))
    if pack and (error := far(packed, alone)) > limit:
        files.fail(
            f"packed rows see each other in {type(model.module).__name__}",
            f"a relative difference of {error:.2g}",
            f"at most {limit:g}",
            "the same command with --no-pack",
        )


def pick_device(name: str, threads: int = 0) -> torch.device:
    """Return the device: `auto` takes CUDA, then MPS, then the CPU."""
    if threads:
        torch.set_num_threads(threads)
    if name == "auto":
        there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        name = next((kind for kind, usable in there.items() if usable), "cpu")
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()  # of "meta" there is nothing to read
    except (RuntimeError, AssertionError) as missing:
        files.fail(
            f"--device {name} cannot be used",
            str(missing).splitlines()[0],
            "auto, cpu, cuda, cuda:1 or mps",
        )
    return device


def pick_dtype(name: str, device: torch.device, folder: Path) -> torch.dtype:
    """Return the dtype of a model that is only run: `auto` is float32 on the CPU, and on CUDA the
    checkpoint's own.

    A GPU older than Ampere (V100) only emulates bfloat16: float16 there.
    """
    if name != "auto":
        return getattr(torch, name)
    if device.type != "cuda":
        return torch.float32
    config = (
        {}
        if checkpoints.is_gguf(folder)
        else files.read_json(checkpoints.base_of(folder) / "config.json")
    )
    own = getattr(torch, config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    return (
        torch.float16
        if own == torch.bfloat16 and torch.cuda.get_device_capability(device)[0] < 8
        else own
    )


def pick_amp(name: str, device: torch.device) -> torch.dtype | None:
    """Return autocast's dtype, or None for plain float32."""
    if name == "auto":
        name = "fp16" if device.type == "cuda" else "off"
    return {"fp16": torch.float16, "bf16": torch.bfloat16, "off": None}[name]
