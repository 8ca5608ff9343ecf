"""Models in memory: a Hugging Face causal LM as a body (tokens -> hidden states at targets) and a
head (hidden states -> logits).

Contract: `load` takes what lib/checkpoints.py finds. It refuses weights that are missing or not
finite, a vocabulary that is not the data's, and (by a probe: two rows on one line, through body and
head and through the model itself) an architecture whose logits our head would not reproduce, or
that reads what follows a token. Where packed rows would see each other it says so, and they are not
packed (`Model.packs`). An adapter is merged into its base in memory.
"""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers.modeling_outputs import BaseModelOutput

from lib import checkpoints, data, files, generate
from lib.head import Head

# what other tokens on its line may change of a row, relative: nothing in a sound model (4e-7 is
# float32's rounding), 9e-4 and more in those that leak: docs/models.md
LEAK = 3e-5
QUANTISED_BY = {  # what transformers needs to read weights that are quantised by a method
    "awq": "gptqmodel",
    "gptq": "gptqmodel optimum",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "torchao": "torchao",
    "hqq": "hqq",
    "aqlm": "aqlm",
    "quanto": "optimum-quanto",
    "eetq": "eetq",
    "auto-round": "auto-round",
    "vptq": "vptq",
}
# tensors inside layers that older checkpoints hold, and that say nothing: buffers made anew
HARMLESS = re.compile(
    r"inv_freq|masked_bias|attn\.bias$|attention\.bias$|_scale|rotary|position_ids"
)


@dataclass(frozen=True)
class Model:
    """module: the Hugging Face model. body: its decoder (compiled on request). folder: where it
    came from. limit: how many of its tokens are compared with a teacher's (None: all, with none).
    apart: ids that its tokenizer and the data's do not call the same, left out where there is a
    limit. packs: rows on one line do not see each other. scale, softcap: what it does to its output
    layer's logits (`Head`). on: where it computes, if its weights may lie elsewhere. `as_model`
    makes one of a module."""

    module: Any
    body: Any
    folder: Path
    limit: int | None = field(default=None, kw_only=True)
    apart: tuple[int, ...] = field(default=(), kw_only=True)
    packs: bool = field(default=True, kw_only=True)
    scale: float = field(default=1.0, kw_only=True)
    softcap: float = field(default=0.0, kw_only=True)
    on: torch.device | None = field(default=None, kw_only=True)

    @property
    def device(self) -> torch.device:
        return self.on or next(self.module.parameters()).device

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
        layer = self.module.get_output_embeddings()
        vocab = vocab or self.limit or self.vocab
        apart = [id for id in self.apart if id < vocab] if self.limit else []
        ids = torch.tensor(apart, device=self.device) if apart else None
        bias = getattr(layer, "bias", None)
        return Head(layer.weight, bias, vocab, self.scale, self.softcap, ids)


@files.telling("loading a model")
def load(
    name: str,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    dataset: data.Dataset | None = None,
    attn: str = "auto",
    compiled: bool = False,
    from_scratch: bool = False,
    keep_layers: list[int] | None = None,
    pack: bool = True,
    seed: int = 0,
    amp: torch.dtype | None = None,
    trust_remote_code: bool = False,
    placing: dict | None = None,
    apart: Sequence[int] | None = None,
) -> Model:
    """Load a causal LM, check it, and put it on a device.

    dataset       it must know the tokens of; without one the tokenizer is not looked at
    from_scratch  a folder with a config.json and no weights is allowed: a new model
    pack          rows are to be packed, unless they would see each other in this model
    placing       options of from_pretrained (quantization_config, device_map) that put it where
                  it belongs by themselves
    apart         what `check_fits` returned, where it has been asked already
    """
    from transformers import AutoModelForCausalLM

    check_attention(attn, amp or dtype)
    folder = checkpoints.local_folder(name, trust_remote_code)
    base = checkpoints.base_of(folder)
    if dataset is not None and apart is None:
        apart = check_fits(folder, dataset, trust_remote_code)
    options: dict[str, Any] = dict(attn=attn, trust_remote_code=trust_remote_code)
    options |= {"dtype": dtype} | (placing or {})
    module, loaded = read(
        AutoModelForCausalLM, folder, "a causal LM", seed=seed if from_scratch else None, **options
    )
    check_complete(base, loaded["missing_keys"])
    check_used(module, base, loaded.get("unexpected_keys", ()))
    if not placing:
        with on_text_alone(module):
            check_tie(module, base)
    if base != folder:
        module = checkpoints.merge_adapter(module, folder, base)
    keep_only_layers(module, keep_layers)
    check_finite(folder, checkpoints.stored(base) if placing else module.named_parameters())
    if not placing:
        module.to(device)
    module.eval()
    with on_text_alone(module):
        model = replace(as_model(module, folder, amp), apart=tuple(apart or ()))
        if dataset is not None:
            dataset.check_tokens(model.vocab, folder)
            if (above := len(dataset.tokenizer()) - model.vocab) > 0:
                print(f"vocabulary: {above} tokens above {folder}'s are in no row of the data")
        probe(model, amp)
    model = replace(model, packs=pack and packs(model, amp))
    return replace(model, body=torch.compile(model.body, dynamic=True)) if compiled else model


def check_fits(
    folder: Path, dataset: data.Dataset, trust_remote_code: bool = False, teacher: bool = False
) -> list[int]:
    """Refuse a model that cannot read a data set, by its files alone, before weights are loaded:
    rows longer than its positions, or with other tokens. Return the ids that are another token to
    it than to the data's tokenizer."""
    splits = (dataset.train, dataset.val)
    longest = max(int(split.rows["length"].max(initial=0)) for split in splits)
    check_window(folder, longest, trust_remote_code)
    words = checkpoints.with_tokenizer(folder)
    return checkpoints.check_vocabulary(words, dataset, trust_remote_code, teacher)


def config_of(folder: Path, trust_remote_code: bool = False) -> Any:
    """Return the configuration of a checkpoint (of an adapter: its base's), or the one-line error
    when it cannot be read."""
    from transformers import AutoConfig

    base = checkpoints.base_of(folder)
    try:
        config = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
    except Exception as broken:  # as in `read`: each library has its own
        refuse_broken(base, "a model", broken)
    pads_above(config)
    return config


def pads_above(config: Any) -> bool:
    """Take the padding token off a configuration where the embedding has no row for it (with which
    transformers builds none), and return whether that was so: how rows are padded is ours."""
    text = config.get_text_config()
    above = (getattr(text, "pad_token_id", None) or 0) >= getattr(text, "vocab_size", math.inf)
    if above:
        text.pad_token_id = None
    return above


def check_window(folder: Path, longest: int, trust_remote_code: bool = False) -> None:
    """Refuse rows that are longer than a model's learned positions; say where they are longer than
    what it was made for, which its rotations of positions follow all the same."""
    from transformers import AutoModelForCausalLM

    follows = True
    if checkpoints.is_gguf(folder):
        most = checkpoints.gguf_window(folder)
    else:
        config = config_of(folder, trust_remote_code)
        most = generate.window(config)
        if most and longest > most:
            with torch.device("meta"):
                module = AutoModelForCausalLM.from_config(
                    config, trust_remote_code=trust_remote_code
                )
            follows = any(name.endswith("inv_freq") for name, _ in module.named_buffers())
    if most is None or longest <= most:
        return
    shorter = f"prepare_data.py --max-len {most}"
    if not follows:
        files.fail(
            f"{folder} has {most} positions, and no more",
            f"a row of {longest} tokens",
            mend=f"{shorter}, or a model of rotary positions",
        )
    print(
        f"model: WARNING, {folder} was made for {most} tokens, and the longest row has {longest}:"
        f" beyond them it knows nothing yet ({shorter} leaves longer rows out)"
    )


def body_of(module: Any) -> Any:
    """Return a causal LM's decoder, which makes hidden states. The classes of some (Llama 4's text
    model) call it otherwise than they say."""
    body = module.base_model
    if body is not module:
        return body
    for part in module.children():
        if hasattr(part, "layers"):
            return part
    files.fail(
        f"{type(module).__name__} has no body that this project knows",
        "neither .base_model nor a part with .layers",
        "a decoder and an output layer",
    )


class UpToHead(nn.Module):
    """A causal LM up to its output layer, as its body: in some, more lies before that layer than
    the decoder (BERT's transform, MiniCPM's scale)."""

    class Reached(Exception):
        """Carries what the output layer is given, and leaves the layer undone."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, **inputs: Any) -> BaseModelOutput:
        def stop(_layer, given):
            raise self.Reached(given[0])

        hook = self.module.get_output_embeddings().register_forward_pre_hook(stop)
        try:
            self.module(**inputs)
        except self.Reached as reached:
            return BaseModelOutput(last_hidden_state=reached.args[0])
        finally:
            hook.remove()
        raise AssertionError(f"{type(self.module).__name__} does not call its output layer")


@contextmanager
def on_text_alone(module: Any) -> Iterator[None]:
    """End with one line where a model cannot run on tokens alone: it wants an image, or its
    configuration fits no weights."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as no:
        inner, outer = module.config.get_text_config().model_type, module.config.model_type
        files.fail(
            f"{type(module).__name__} does not run on text alone",
            f"{type(no).__name__}: {' '.join(str(no).split())[:200]}",
            "a decoder that is given tokens",
            f"a checkpoint of the language model inside it ({inner})" if inner != outer else None,
        )


def as_model(module: Any, folder: Path, amp: torch.dtype | None = None) -> Model:
    """Return the Model whose body and head are the module's own: what follows its output layer is
    measured, and what precedes it is the decoder, or all there is."""
    scale, softcap = after_head(module)
    model = Model(module, body_of(module), folder, scale=scale, softcap=softcap)
    whole = replace(model, body=UpToHead(module))
    return whole if head_error(model, amp) > 1 >= head_error(whole, amp) else model


@torch.no_grad()
def after_head(module: Any) -> tuple[float, float]:
    """Return the (scale, softcap) that a model applies to its output layer's logits, whatever its
    configuration calls them: small logits in their place come out scaled (Cohere, Granite,
    Falcon-H1), large ones as the cap (Gemma 2)."""
    small, large = 2.0**-20, 2.0**30
    layer, ratios = module.get_output_embeddings(), []
    if layer is None:
        raise ValueError("it has no output layer")
    token = torch.ones((1, 1), dtype=torch.long, device=next(module.parameters()).device)
    for value in (small, large):
        met: list[Tensor] = []

        def replaced(_layer, _given, logits):
            met.append(logits)
            return torch.full_like(logits, value, dtype=torch.float32)  # noqa: B023

        hook = layer.register_forward_hook(replaced)
        try:
            logits = module(input_ids=token, use_cache=False).logits
        finally:
            hook.remove()
        if not met:
            return 1.0, 0.0
        ratios.append(logits.float().amax().item() / value)
    scale = ratios[0] if abs(ratios[0] - 1) > 1e-5 else 1.0
    return scale, 0.0 if ratios[1] > scale / 2 else ratios[1] * large


@torch.no_grad()
def head_error(model: Model, amp: torch.dtype | None) -> float:
    """Return how far our head's logits of eight tokens are from the model's own, relative to what
    rounding may be: at most 1 in a model whose body and head we know."""
    row = rows_to_probe(model)[0][:8]
    positions = torch.arange(len(row), device=model.device)[None]
    head = model.head().whole(model.device)  # for once, where it lies divided
    hidden = states(model, amp, [row])[0]
    with torch.autocast(model.device.type, amp, enabled=amp is not None):
        own = model.module(input_ids=row[None], position_ids=positions, use_cache=False)
    if hidden.shape[1] != head.weight.shape[1]:
        return math.inf
    ours = next(head.chunks(hidden))[1]
    error = checkpoints.difference(ours, own.logits[0, : len(ours)])
    return error / (1e-3 if is_exact(model, amp) else 0.1)


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
    attn: str = "auto",
    **options: Any,
) -> tuple[Any, dict]:
    """Return a module of the transformers class `auto`, and what from_pretrained says of its
    tensors. Of an adapter it is the base.

    seed    of a new model, where the folder has no weights; None: such a folder is refused
    config  instead of the folder's own
    attn    auto: sdpa, or eager where a model has none
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    base = checkpoints.base_of(folder)
    for one in {folder, base}:
        checkpoints.check_written(one)
    if not checkpoints.has_weights(base):
        if seed is None:
            files.fail(
                f"{folder} has no weights",
                "config.json alone",
                "*.safetensors beside it",
                "make stage1 (stage1_sft.py makes a new model from a config.json)",
            )
        print(
            f"model: {folder} has no weights: a new model is made from its config.json, seed {seed}"
        )
    options["attn_implementation"] = "sdpa" if attn == "auto" else attn
    try:
        try:
            return made(auto, base, seed, config, options)
        except ValueError as lacking:  # said before anything is read
            if attn != "auto" or "scaled_dot_product_attention" not in str(lacking):
                raise
            print(f"model: {folder} has no sdpa attention: eager, as with --attn eager")
            return made(auto, base, seed, config, options | {"attn_implementation": "eager"})
    # safetensors, JSON, OSError, missing shards or kernels, code that is not trusted: each says
    # what it saw
    except Exception as broken:
        refuse_broken(base, what, broken)


def made(auto: Any, base: Path, seed: int | None, config: Any, options: dict) -> tuple[Any, dict]:
    """Return what `read` does: new, or with the weights of a folder or a GGUF file."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    if not checkpoints.has_weights(base):
        torch.manual_seed(seed)
        trust = options["trust_remote_code"]
        config = config or config_of(base, trust)
        return auto.from_config(config, **options), {"missing_keys": ()}
    if checkpoints.is_gguf(base):
        from transformers import modeling_gguf_pytorch_utils as gguf

        gguf.tqdm = partial(tqdm, disable=None)  # no bar in a log
        base, options = base.parent, options | {"gguf_file": base.name}
    else:
        options = options | {"generation_config": generate.read_config(base)}
        if options["dtype"] == torch.float32:  # in half precision its own kernels read them
            options = checkpoints.widening(base) | options
    if auto is AutoModelForCausalLM and "gguf_file" not in options:
        trust = options["trust_remote_code"]
        told = AutoConfig.from_pretrained(base, trust_remote_code=trust)
        causal: Any = auto._model_mapping
        whole = AutoModelForImageTextToText._model_mapping
        # read whole and with text alone, where there is no causal LM of it that can be read again
        known = type(told)
        if known in whole and (
            known not in causal or getattr(causal[known], "config_class", known) not in causal
        ):
            auto = AutoModelForImageTextToText
        if pads_above(told):
            config = config or told
    module, loaded = auto.from_pretrained(
        base, config=config, use_safetensors=True, output_loading_info=True, **options
    )
    if not getattr(module, "is_quantized", False) and hasattr(module, "_weight_conversions"):
        if checkpoints.quantised(base):
            del module._weight_conversions  # save_pretrained would quantise the weights again
    return module, loaded


def refuse_broken(folder: Path, what: str, broken: Exception) -> NoReturn:
    """Say why transformers cannot load a checkpoint, and what may mend it."""
    # what follows is a list of all the classes there are
    text, mend = str(broken).split(" Model type should be one of")[0], None
    if needs := QUANTISED_BY.get(checkpoints.quantised(folder) or ""):
        mend = f"pip install {needs}"
    if "trust_remote_code" in text or "custom code" in text:
        mend = "--trust-remote-code, if you trust that folder's Python"
    elif "attn_implementation" in text:
        mend = "--attn auto"
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


def check_used(module: Any, folder: Path, unexpected: Iterable[str]) -> None:
    """Refuse a checkpoint with tensors that its config.json gives no place inside the layers that
    the model has: more layers, a bias, other norms. Name what else is left out: a part that the
    model does not have at all (a tower for images, heads that guess further tokens)."""

    def kind(name: str) -> str:
        return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1N", name)

    config, known = module.config.get_text_config(), {kind(n) for n, _ in module.named_modules()}
    layers = config.num_hidden_layers
    guessing = range(layers, layers + (getattr(config, "num_nextn_predict_layers", None) or 0))
    aside = []
    for name in sorted(unexpected):
        layer = re.search(r"(.*\.layers?|.*\.h|.*\.blocks)\.(\d+)\.", f".{name}")
        inside = layer is not None and kind(layer[0].strip(".")) in known
        if layer is None or not inside or HARMLESS.search(name) or int(layer[2]) in guessing:
            aside.append(name)
        elif not getattr(module, "is_quantized", False):
            files.fail(
                f"{folder} holds weights that its config.json gives no place",
                name,
                f"a config.json of these weights (it asks for {layers} layers of"
                f" {type(module).__name__})",
            )
    if aside:
        print(f"model: {len(aside)} tensors of {folder} are not used: {', '.join(aside[:3])} ...")


def check_tie(module: Any, folder: Path) -> None:
    """Say, and write into the configuration, that embeddings and output layer are two, where
    config.json ties them and the weights hold two: other readers than transformers go by
    config.json alone, and would write other text."""
    inner, outer = module.get_input_embeddings(), module.get_output_embeddings()
    configs = (module.config, module.config.get_text_config())
    tied = any(getattr(config, "tie_word_embeddings", False) for config in configs)
    if not tied or outer is None or outer.weight is inner.weight:
        return
    if outer.weight.shape == inner.weight.shape and getattr(module, "_tied_weights_keys", None):
        print(
            f"model: WARNING, config.json of {folder} ties embeddings and output layer, and the"
            " weights hold two that differ: they stay two, and best/ will say so"
        )
        for config in configs:
            config.tie_word_embeddings = False


def check_finite(folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse a checkpoint with NaN or infinity in one of its tensors, (name, tensor)."""
    for name, tensor in tensors:
        if not torch.isfinite(tensor).all():
            files.fail(
                f"{folder} holds weights that are not finite",
                f"NaN or infinity in {name}",
                "a whole checkpoint",
            )


def keep_only_layers(module: Any, keep: list[int] | int | None) -> None:
    """Keep the decoder layers numbered `keep` (None or none: all), in that order, or so many of
    them, evenly: a plain start for a student, made of its teacher."""
    if not keep:
        return
    body, config = body_of(module), module.config.get_text_config()
    bert, distilbert = getattr(body, "encoder", None), getattr(body, "transformer", None)
    places = ((body, "layers"), (bert, "layer"), (distilbert, "layer"))
    there = [(place, name) for place, name in places if hasattr(place, name)]
    holder, attribute = there[0] if there else (None, "")
    layers = getattr(holder, attribute, None)
    if isinstance(keep, int):
        gap = (len(layers or ()) - 1) / max(1, keep - 1)
        keep = [round(number * gap) for number in range(keep)]
        print(f"layers: {','.join(map(str, keep))} are kept")
    if layers is None or not all(0 <= i < len(layers) for i in keep) or len(set(keep)) != len(keep):
        wanted = "a body with .layers"
        if layers is not None:
            wanted = f"different numbers from 0 to {len(layers) - 1}"
        files.fail("--keep-layers does not fit the model", ",".join(map(str, keep)), wanted)
    keep_in_config(config, keep, len(layers))
    setattr(holder, attribute, nn.ModuleList(layers[i] for i in keep))
    for number, layer in enumerate(getattr(holder, attribute)):
        for part in layer.modules():
            if hasattr(part, "layer_idx"):
                part.layer_idx = number
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


def keep_in_config(config: Any, keep: list[int], count: int) -> None:
    """Make what a configuration says of each of its `count` layers fit those kept: lists with an
    entry a layer, lists of layers' numbers, and patterns (each n-th layer attends to all) where one
    fits; else it is said, for other programs read it."""
    for name, value in config.to_dict().items():
        if "token" in name or "label" in name or name in ("architectures", "transformers_version"):
            continue
        if isinstance(value, list) and len(value) == count:
            setattr(config, name, [value[i] for i in keep])
        elif isinstance(value, list) and "layers" in name and all(type(i) is int for i in value):
            setattr(config, name, [new for new, old in enumerate(keep) if old in value])
        elif name == "max_window_layers" and isinstance(value, int):
            setattr(config, name, sum(i < value for i in keep))
    kinds = getattr(config, "layer_types", None)
    for name in ("sliding_window_pattern", "_sliding_window_pattern", "full_attention_interval"):
        if not kinds or not isinstance(getattr(config, name, None), int):
            continue
        full = [kind == "full_attention" for kind in kinds]
        for every in range(1, len(kinds) + 2):
            if full == [(i + 1) % every == 0 for i in range(len(kinds))]:
                setattr(config, name, every)
                break
        else:
            print(
                f"layers: WARNING, {name} cannot say which of those kept attend to all; a program"
                " that reads it and not layer_types will write other text"
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
    config.pad_token_id = generate.pad_token(config, tokenizer, model.vocab)
    if (tokenizer.pad_token_id or 0) >= model.vocab:  # what reads best/ would pad with it
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(config.pad_token_id)


@torch.no_grad()
def probe(model: Model, amp: torch.dtype | None = None) -> None:
    """Run two rows on one line through the model; refuse it where our head would not give its own
    logits, or where what follows a row, padding or another one, changes what is known of it."""
    first, _, second = rows_to_probe(model)
    config, name = model.module.config.get_text_config(), type(model.module).__name__
    switch = next((s for s in ("is_decoder", "causal") if getattr(config, s, None) is False), None)
    mend = f'"{switch}": true in its config.json, if it was trained as one' if switch else None
    padding = torch.zeros_like(second)
    row, beside, other = (row[: len(row) // 2] for row in (first, second, padding))
    error = influence(model, amp, first, second, padding, behind=True)
    if (
        error := max(error, influence(model, amp, row, beside, other, behind=True, one=True))
    ) > LEAK:
        files.fail(
            f"{name} attends to later tokens",
            f"a row of {len(first)} that moves by {error:.2g} with what stands behind it",
            f"at most {LEAK:g}: a decoder",
            mend,
        )
    straight = torch.arange(8, device=model.device)[None]
    with torch.autocast(model.device.type, amp, enabled=amp is not None):
        counted, own = (  # of few tokens: these are logits, of 2,112 of them gigabytes
            model.module(input_ids=first[None, :8], use_cache=False, **more).logits
            for more in (dict(position_ids=straight), {})
        )
    if (error := checkpoints.difference(counted, own)) > (1e-3 if is_exact(model, amp) else 0.1):
        files.fail(
            f"{name} does not count its positions from 0, as transformers' generation does",
            f"logits that differ by {error:.2g} without position_ids",
            "one way to count (RoBERTa's kin begin behind their padding token's number)",
        )
    if (error := head_error(model, amp)) > 1:
        files.fail(
            f"{name} changes its logits in a way this project does not know",
            f"a difference that is {error:.2g} times what rounding may be",
        )


@torch.no_grad()
def packs(model: Model, amp: torch.dtype | None = None) -> bool:
    """Return whether rows on one line are apart: the second must not move with the first's tokens,
    and must be what it is alone. Say so where they are not."""
    first, other, second = rows_to_probe(model)
    moved = influence(model, amp, second, first, other)
    flash = model.module.config._attn_implementation == "flash_attention_2"  # never in float32
    if amp is not None and not flash and is_exact(model, None):
        moved = max(moved, influence(model, None, second, first, other))
    packed = states(model, amp, [first, second])[0, len(first) :]
    apart = checkpoints.difference(packed, states(model, amp, [second])[0])
    if moved <= LEAK and apart <= (1e-3 if is_exact(model, amp) else 0.1):
        return True
    print(
        f"model: packed rows would see each other in {type(model.module).__name__} (a relative"
        f" difference of {max(moved, apart):.2g}): one row a line, as with --no-pack"
    )
    return False


def influence(
    model: Model,
    amp: torch.dtype | None,
    row: Tensor,
    beside: Tensor,
    other: Tensor,
    behind: bool = False,
    one: bool = False,
) -> float:
    """Return how far a row moves, relative, when what lies before it on its line (or `behind` it)
    is `other` and not `beside` (`one`: as one row with it); less ten times what that changes on a
    line of its own, where it cannot be seen (experts' sums are cut otherwise, and half precision
    rounds them otherwise)."""

    def seen(neighbour: Tensor, apart: bool) -> Tensor:
        if apart:
            return states(model, amp, [row], [neighbour])[0]
        line = [row, neighbour] if behind else [neighbour, row]
        line = [torch.cat(line)] if one else line
        return states(model, amp, line)[0].split(len(row))[0 if behind else 1]

    moved = checkpoints.difference(seen(other, False), seen(beside, False))
    if moved <= LEAK:
        return moved
    return max(0.0, moved - 10 * checkpoints.difference(seen(other, True), seen(beside, True)))


def rows_to_probe(model: Model) -> list[Tensor]:
    """Return three rows of random tokens, all (L,), none of them padding: of 64 tokens each, or
    where attention is to a selection alone, of so many that two of them are beyond it."""
    config = model.module.config.get_text_config()

    def most(*names: str) -> int:
        known = [getattr(config, name, None) or 0 for name in names]
        every = [[*value.values()] if isinstance(value, dict) else [value] for value in known]
        return max(value for values in every for value in values if isinstance(value, int))

    rate = max(1, most("compress_rates", "index_kpool", "indexer_compress_ratio"))
    block = max(1, most("index_block_size"))
    reach = max(rate * 2, block * most("index_topk_blocks"), most("index_topk", "indexer_budget"))
    size = min(2112, max(64, most("block_size"), reach // 2 + 64 if reach > 2 else 0))
    size = min(size, generate.window(config) or size)
    random = torch.Generator().manual_seed(0)
    shape, known = (3, size), model.module.get_input_embeddings().weight.shape[0]
    return [*torch.randint(1, min(known, model.vocab), shape, generator=random).to(model.device)]


def states(model: Model, amp: torch.dtype | None, *lines: list[Tensor]) -> Tensor:
    """Return the hidden states (B, L, D) of lines, all of them of equally many tokens: each holds
    rows end to end."""
    positions = torch.cat([torch.arange(len(row), device=model.device) for row in lines[0]])
    with torch.autocast(model.device.type, amp, enabled=amp is not None):
        output = model.body(
            input_ids=torch.stack([torch.cat(rows) for rows in lines]),
            position_ids=positions.repeat(len(lines), 1),
            use_cache=False,
        )
    return output.last_hidden_state


def is_exact(model: Model, amp: torch.dtype | None) -> bool:
    """Return whether a model computes in float32: half precision's rounding is far above its."""
    whole = next(model.module.parameters()).dtype == torch.float32
    return amp is None and whole and not getattr(model.module, "is_quantized", False)


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
