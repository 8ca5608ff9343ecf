"""Models: a Hugging Face causal LM as a body (tokens -> hidden states at targets) and a head
(hidden states -> logits).

Contract: `load` accepts a local folder or a hub id, safetensors only, or a GGUF file (with the gguf
package); it refuses weights that are not finite, a vocabulary that is not the data's, and (by a
probe: eight tokens through both roads) an architecture whose logits our head would not reproduce or
whose packed rows would see each other. A folder with an adapter (lib/options/lora.py) is its base
with the adapter merged in memory.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from lib import data, files, template
from lib.head import Head
from lib.options import lora

WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth")
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


def local_folder(name: str, trust_remote_code: bool = False, unfinished: bool = False) -> Path:
    """Return the folder of a model: `name` itself, or the downloaded snapshot of a hub id. A GGUF
    file is its own folder.

    A stage folder gives its best/; one whose run is not finished is refused, unless `unfinished`
    allows a look at it.
    """
    path = Path(name)
    if is_gguf(path):
        files.need("gguf", f"the GGUF file {name}")
        return path
    if path.is_dir():
        run = (path / "history.jsonl").exists()

        def holds_model(folder):
            return (folder / "config.json").exists() or lora.is_adapter(folder)

        best = next(
            (path / stage for stage in ("best", "final") if holds_model(path / stage)), None
        )
        if run and not unfinished and not (path / "config.json").exists():
            files.fail(
                f"{name} is not finished",
                "a run without its config.json",
                "a finished stage",
                "its own command again" + (f", or {best} by name" if best else ""),
            )
        if best and (run or not (path / "config.json").exists()):
            return best
        if not holds_model(path):
            files.fail(
                f"{name} is no model",
                "a folder without config.json",
                "a Hugging Face checkpoint, an adapter, or a stage folder with best/",
            )
        return path
    if path.exists() or str(name).startswith((".", "/")) or str(name).count("/") != 1:
        files.fail(
            f"the model {name} is missing",
            wanted="a folder, or a hub id like Qwen/Qwen2.5-0.5B-Instruct",
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"] + [
        "*.py"
    ] * trust_remote_code
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as missing:
        files.fail(
            f"the model {name} is neither a folder here nor to be had from the hub",
            str(missing)[:200],
            mend=f"hf download {name}",
        )


def is_gguf(path: Path) -> bool:
    return path.suffix == ".gguf" and path.is_file()


def check_trainable(source: Path) -> None:
    """Refuse to train a GGUF file: transformers reads one and cannot save it again, nor would an
    adapter find it as its base."""
    if is_gguf(source):
        files.fail(
            f"{source} cannot be trained",
            "a GGUF file",
            "a folder with config.json and *.safetensors",
            "the checkpoint that it was made of as --student (as --teacher a GGUF file is welcome)",
        )


def gguf_reader(path: Path):
    """Return a GGUF file, opened: its fields, and the heads of its tensors."""
    from gguf import GGUFReader

    try:
        return GGUFReader(path)
    except (ValueError, IndexError, OSError) as broken:
        files.fail(f"{path} cannot be read", broken, "a whole GGUF file")


def has_weights(folder: Path) -> bool:
    return is_gguf(folder) or any(next(folder.glob(pattern), None) for pattern in WEIGHTS)


def base_of(folder: Path) -> Path:
    """Return the folder of the weights below an adapter, whose config.json tells of the model; a
    whole checkpoint is its own."""
    if not lora.is_adapter(folder):
        return folder
    config = folder / lora.CONFIG
    settings = files.read_json(config)
    name = str(settings.get("base_model_name_or_path") or "") if isinstance(settings, dict) else ""
    mend = f"the right folder or hub id as base_model_name_or_path in {config}"
    here = bool(name) and Path(name).is_dir()
    if not here and (name.startswith("/") or name.count("/") != 1):
        files.fail(
            f"the base of the adapter {folder} is missing",
            name,
            "the folder of the model that it was trained on",
            mend,
        )
    base = Path(name) if here else local_folder(name)
    if lora.is_adapter(base) or not (base / "config.json").exists():
        files.fail(
            f"the base of the adapter {folder} is no model",
            base,
            "config.json and *.safetensors",
            mend,
        )
    return base


def with_tokenizer(folder: Path) -> Path:
    """Return the folder that holds a checkpoint's tokenizer: an adapter of others may leave it to
    its base."""
    return folder if any((folder / name).exists() for name in TOKENIZERS) else base_of(folder)


def identity(folder: Path) -> str:
    """Return the hash of a checkpoint's configuration and weights; an adapter's is of its base's as
    well."""
    if is_gguf(folder):
        return files.sha256(folder)
    there = [folder / lora.CONFIG, folder / lora.WEIGHTS] if lora.is_adapter(folder) else []
    return files.sha256(
        *filter(Path.exists, there),
        (base := base_of(folder)) / "config.json",
        *sorted(base.glob("*.safetensors")),
    )


def weight_bytes(folder: Path) -> int:
    """Return the bytes of a checkpoint's weights on the disk; an adapter's with those of its
    base."""
    if is_gguf(folder):
        return folder.stat().st_size
    adapter = [folder / lora.WEIGHTS] if lora.is_adapter(folder) else []
    return sum(
        path.stat().st_size
        for path in [*filter(Path.exists, adapter), *base_of(folder).glob("*.safetensors")]
    )


@dataclass(frozen=True)
class Model:
    """module: the Hugging Face model. body: its decoder (compiled on request). folder: where it
    came from. limit: how many tokens its head is cut to (None = all): those its teacher knows."""

    module: nn.Module
    body: nn.Module
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
        """Parameters that get gradients: with LoRA those of the adapter alone."""
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
        """Return the output layer, cut to the first `vocab` tokens (default: `limit`, or all)."""
        config, layer = self.module.config.get_text_config(), self.module.get_output_embeddings()
        scale = (getattr(config, "logit_scale", None) or 1.0) / (
            getattr(config, "logits_scaling", None) or 1.0
        )  # Cohere; Granite
        return Head(
            layer.weight,
            getattr(layer, "bias", None),
            vocab or self.limit or self.vocab,
            scale,
            getattr(config, "final_logit_softcapping", None) or 0.0,
        )


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
    """Load a causal LM, check it, and put it on a device. `from_scratch` allows a folder with a
    config.json and no weights. `placing`: options of from_pretrained (quantization_config,
    device_map) that put it where it belongs by themselves.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = local_folder(name, trust_remote_code)
    base, words = base_of(folder), with_tokenizer(folder)
    if dataset is not None:
        check_vocabulary(words, dataset, trust_remote_code)
    options = dict(attn_implementation=attn, trust_remote_code=trust_remote_code) | (placing or {})
    if attn == "flash_attention_2" and dtype == torch.float32 and amp is None:
        files.fail(
            "flash_attention_2 computes in half precision only",
            "float32",
            "half precision",
            "--amp fp16 or bf16 (a model that is only run: --dtype, --teacher-dtype)",
        )
    weights = has_weights(base)
    if not weights and not from_scratch:
        files.fail(
            f"{folder} has no weights",
            "config.json alone",
            "*.safetensors beside it",
            "make stage1 (stage1_sft.py makes a new model from a config.json)",
        )
    try:
        if weights:
            where, options = (
                (folder.parent, options | {"gguf_file": folder.name})
                if is_gguf(folder)
                else (base, options)
            )
            module, loaded = AutoModelForCausalLM.from_pretrained(
                where, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
            )
        else:
            print(
                f"model: {folder} has no weights: a new model is made from its config.json, seed"
                f" {seed}"
            )
            torch.manual_seed(seed)
            config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
            module, loaded = (
                AutoModelForCausalLM.from_config(config, dtype=dtype, **options),
                {"missing_keys": ()},
            )
    # safetensors, JSON, OSError, missing shards or kernels, code that is not trusted: each says
    # what it saw
    except Exception as broken:
        text = str(broken)
        mend = (
            "--trust-remote-code, if you trust that folder's Python"
            if "trust_remote_code" in text or "custom code" in text
            else None
        )
        files.fail(
            f"{base} cannot be loaded as a causal LM",
            f"{type(broken).__name__}: {text[:300]}",
            "config.json and *.safetensors that belong together",
            mend,
        )
    if loaded["missing_keys"]:  # transformers would fill them with random numbers
        files.fail(
            f"{base} lacks weights",
            ", ".join(sorted(loaded["missing_keys"])[:3]) + " missing",
            "every tensor of its config.json",
        )
    if base != folder:
        written = (
            files.read_json(folder / lora.BASE)
            if (folder / lora.BASE).exists()
            else {"identity": None}
        )  # others write none
        known = (
            written.get("identity", "no identity in it")
            if isinstance(written, dict)
            else "no identity in it"
        )
        if known not in (None, seen := identity(base)):
            files.fail(
                f"the base of the adapter {folder} has changed",
                f"{base} with weights {seen[:12]}",
                known[:12],
                "the weights it was trained on, named as base_model_name_or_path in"
                f" {folder / lora.CONFIG}",
            )
        module = lora.merge(module, folder)
    if keep_layers:
        keep_only_layers(module, keep_layers)
    broken = next(
        (
            n
            for n, p in (stored(base) if placing else module.named_parameters())
            if not torch.isfinite(p).all()
        ),
        None,
    )
    if broken:
        files.fail(
            f"{folder} holds weights that are not finite",
            f"NaN or infinity in {broken}",
            "a whole checkpoint",
        )
    (module if placing else module.to(device)).eval()
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


def shards(folder: Path) -> Iterator:
    """Yield a checkpoint's safetensors files, each opened."""
    from safetensors import SafetensorError, safe_open

    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                yield file
        except (SafetensorError, OSError) as broken:
            files.fail(
                f"{path} cannot be read",
                broken,
                "config.json and *.safetensors that belong together",
            )


def stored(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield a checkpoint's tensors with their names as they are on the disk, one after the
    other."""
    return ((name, file.get_tensor(name)) for file in shards(folder) for name in file.keys())


def shapes(folder: Path) -> list[tuple[int, ...]]:
    """Return the shapes of a checkpoint's tensors, read from the files' heads alone."""
    if is_gguf(folder):
        return [tuple(map(int, tensor.shape)) for tensor in gguf_reader(folder).tensors]
    return [
        tuple(file.get_slice(name).get_shape()) for file in shards(folder) for name in file.keys()
    ]


def check_apart(out: str, source: Path, what: str = "student") -> None:
    """Refuse to write over the model that is read, be it in a stage folder, the adapter beside
    merged weights, or the base of an adapter."""
    held = [
        folder
        for model in (source, base_of(source))
        for folder in (model.resolve(), *model.resolve().parents[: 1 + (model.name == "adapter")])
    ]
    if Path(out).resolve() in held:
        files.fail(
            f"--out {out} holds the {what} that is read", source, "another folder", "another --out"
        )


def check_gguf_vocabulary(folder: Path, tokenizer, whose: object) -> bool:
    """Refuse a GGUF file that gives other ids to a tokenizer's tokens; return whether it names its
    tokens at all."""
    field = gguf_reader(folder).get_field("tokenizer.ggml.tokens")
    tokens = field.contents() if field else None
    if tokens is None:
        return False
    for token, number in sorted(
        tokenizer.get_vocab().items(), key=lambda item: item[1]
    ):  # padded with invented tokens, often
        if number >= len(tokens) or tokens[number] != token:
            files.fail(
                f"{folder} has another tokenizer than {whose}",
                (
                    f"{tokens[number]!r} as token {number}"
                    if number < len(tokens)
                    else f"{len(tokens)} tokens"
                ),
                repr(token),
                "a GGUF file of a model with the same vocabulary",
            )
    return True


def check_vocabulary(folder: Path, dataset: data.Dataset, trust_remote_code: bool = False) -> None:
    """Refuse a model whose tokenizer, if it has one, gives other ids to tokens than the data's:
    equal sizes prove nothing."""
    if is_gguf(folder):
        if check_gguf_vocabulary(folder, dataset.tokenizer(), dataset.folder):
            return
        folder = folder.parent
    if not any(
        (folder / name).exists()
        for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
    ):
        return
    seen, wanted = (
        template.identities(template.load_tokenizer(folder, trust_remote_code))["vocabulary"],
        dataset.identities["vocabulary"],
    )
    if seen != wanted:
        files.fail(
            f"{folder} has another tokenizer than {dataset.folder}",
            f"vocabulary {seen[:12]}",
            wanted[:12],
            f"python prepare_data.py --tokenizer {folder} --out another folder (teacher and student"
            " must share one vocabulary)",
        )


def keep_only_layers(module: nn.Module, keep: list[int]) -> None:
    """Keep the decoder layers numbered `keep`, in that order: a plain start for a student, made of
    its teacher."""
    body, config = module.base_model, module.config.get_text_config()
    places = (
        (body, "layers"),
        (getattr(body, "encoder", None), "layer"),
        (getattr(body, "transformer", None), "layer"),
    )  # BERT; DistilBERT
    holder, attribute = next(
        ((place, name) for place, name in places if hasattr(place, name)), (None, "")
    )
    layers = getattr(holder, attribute, None)
    if layers is None or not all(0 <= i < len(layers) for i in keep) or len(set(keep)) != len(keep):
        wanted = (
            "a body with .layers"
            if layers is None
            else f"different numbers from 0 to {len(layers) - 1}"
        )
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
    known = (
        config.eos_token_id
        if isinstance(config.eos_token_id, list)
        else [config.eos_token_id] * (config.eos_token_id is not None)
    )
    config.eos_token_id = known + [token for token in end_tokens if token not in known]
    if config.pad_token_id is None:
        config.pad_token_id = (
            tokenizer.pad_token_id if tokenizer.pad_token_id is not None else config.eos_token_id[0]
        )


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
    limit = (
        1e-3 if exact else 0.1
    )  # relative; a leak or a forgotten scale is far above it, half-precision rounding far below

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
        name = (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
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
    config = {} if is_gguf(folder) else files.read_json(base_of(folder) / "config.json")
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
