"""A model on the disk: found by its name, checked, identified, and saved.

Contract: a checkpoint is a Hugging Face folder (config.json and *.safetensors), a GGUF file, or an
adapter: a folder of PEFT's whose config names the weights below it. A stage folder stands for its
best/. No pickle is read. What is saved here, plain `from_pretrained` reads, and llama.cpp, vLLM
and mlx-lm.

An adapter folder holds

    adapter_config.json adapter_model.safetensors    PEFT's own format:
                                                     AutoPeftModelForCausalLM.from_pretrained reads
                                                     the folder as it is
    base.json                                        the hash of the weights it was trained on,
                                                     which adapter_config.json names
    generation_config.json, README.md, tokenizer     as in a whole checkpoint
"""

import copy
import re
import shutil
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lib import data, files, generate, template

WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth")
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ADAPTER_BASE = "base.json"
CHECKSUMS = "checksums.json"
# what a model that sees reads its images and videos with
PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
OTHER_GGUF = "a GGUF file of a model with the same tokens"
GGUF_UNUSED = 5  # the kind of a token that llama.cpp invented, which no text has
ADAPTER = "default"  # PEFT's own name of the only adapter


def local_folder(name: str, trust_remote_code: bool = False, unfinished: bool = False) -> Path:
    """Return the folder of a model: `name` itself, or the downloaded snapshot of a hub id. A GGUF
    file is its own folder.

    A stage folder gives its best/; one whose run is not finished is refused, unless `unfinished`
    allows a look at it.
    """
    path = Path(name)
    files.refuse_pointers(path, path / "best", path / "final")
    if is_gguf(path):
        files.need("gguf", f"the GGUF file {name}")
        return path
    if path.is_dir():
        run = (path / "history.jsonl").exists()

        def holds_model(folder):
            return (folder / "config.json").exists() or is_adapter(folder)

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
    # of weights that lie there twice: Mistral's and gpt-oss's own form beside transformers'
    twice = ["consolidated*.safetensors", "*/*.safetensors"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=twice))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as missing:
        files.fail(
            f"the model {name} is neither a folder here nor to be had from the hub",
            str(missing)[:200],
            mend=f"hf download {name}",
        )


def is_gguf(path: Path) -> bool:
    return path.suffix == ".gguf" and path.is_file()


def to_train(name: str, out: str, trust_remote_code: bool = False, verify: bool = False) -> Path:
    """Return the folder of a model that is to be trained, refused where --out is that folder, or
    where it cannot be trained. verify: every byte of it is checked, if it has checksums."""
    source = local_folder(name, trust_remote_code)
    check_apart(out, source)
    if verify:
        check_written(source, verify)
    check_trainable(source)
    return source


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


def gguf_window(path: Path) -> int | None:
    """Return the most tokens that a GGUF file's model was made for."""
    reader = gguf_reader(path)
    kind = reader.get_field("general.architecture")
    field = kind and reader.get_field(f"{kind.contents()}.context_length")
    return int(field.contents()) if field else None


def has_weights(folder: Path) -> bool:
    return is_gguf(folder) or any(next(folder.glob(pattern), None) for pattern in WEIGHTS)


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a folder that transformers reads: others (Mistral's
    consolidated.safetensors) are the same weights once more."""
    index = folder / "model.safetensors.index.json"
    if (whole := folder / "model.safetensors").exists():
        return [whole]
    if index.exists():
        named = files.read_json(index)
        places = named.get("weight_map") if isinstance(named, dict) else None
        if not isinstance(places, dict):
            files.fail(f"{index} names no weights", wanted="a weight_map")
        return [folder / name for name in sorted({*map(str, places.values())})]
    return sorted(folder.glob("*.safetensors"))


def quantised(folder: Path) -> str | None:
    """Return the method that a checkpoint's weights are quantised by, or None."""
    if is_gguf(folder):
        return None
    config = files.read_json(base_of(folder) / "config.json")
    how = config.get("quantization_config") or {} if isinstance(config, dict) else {}
    how = how if isinstance(how, dict) else {"quant_method": how}
    return str(how.get("quant_method", "an unknown method")) if how else None


def widening(folder: Path) -> dict[str, Any]:
    """Return the options by which transformers widens weights of 8 or 4 bits to whole ones, where
    it can."""
    from transformers.utils.quantization_config import FineGrainedFP8Config, Mxfp4Config

    kinds = {"fp8": FineGrainedFP8Config, "mxfp4": Mxfp4Config}
    kind = kinds.get(quantised(folder) or "")
    return {"quantization_config": kind(dequantize=True)} if kind else {}


def check_whole(source: Path) -> None:
    """Refuse to train weights that stay quantised: those of 8 or 4 bits that transformers widens
    are whole in memory, and saved whole."""
    if (how := quantised(source)) not in (None, "fp8", "mxfp4"):
        files.fail(
            f"{source} cannot be trained",
            f"weights quantised by {how}",
            "whole weights, or FP8 or MXFP4, which are widened",
            "the checkpoint that it was made of as --student",
        )


def is_adapter(folder: Path) -> bool:
    return (folder / ADAPTER_CONFIG).exists()


def base_of(folder: Path) -> Path:
    """Return the folder of the weights below an adapter, whose config.json tells of the model; a
    whole checkpoint is its own."""
    if not is_adapter(folder):
        return folder
    config = folder / ADAPTER_CONFIG
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
    if is_adapter(base) or not (base / "config.json").exists():
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
    base = base_of(folder)
    there = [folder / ADAPTER_CONFIG, folder / ADAPTER_WEIGHTS] if is_adapter(folder) else []
    weights = filter(Path.exists, weight_files(base))
    return files.sha256(*filter(Path.exists, there), base / "config.json", *weights)


def write_checksums(folder: Path) -> None:
    """Write the last file of a checkpoint that a trainer exports: the checksums of all others that
    a program reads."""
    made = files.checksums(folder)
    read = {name: made[name] for name in made if not name.endswith(".md")}
    files.write_json(folder / CHECKSUMS, {"checksums": read})


def check_written(folder: Path, verify: bool = False) -> None:
    """Refuse weights, and name other files, that are not as a trainer of ours wrote them; what was
    made elsewhere has no checksums. verify: look at every byte."""
    path, edited = folder / CHECKSUMS, []
    meant = f"the folder as it was written; if you changed its weights yourself: rm {path}"
    if is_gguf(folder) or not path.exists():
        return
    for name, known in files.read_json(path, meant, {"checksums": {}})["checksums"].items():
        if not (seen := files.damage(folder / name, known, verify)):
            continue
        if name.endswith(".safetensors"):
            files.fail(f"{folder / name} is damaged", seen, mend=meant)
        edited.append(name)
    if edited:
        print(f"{folder}: changed since it was written: {', '.join(edited)}", flush=True)


def weight_bytes(folder: Path) -> int:
    """Return the bytes of a checkpoint's weights on the disk; an adapter's with those of its
    base."""
    if is_gguf(folder):
        return folder.stat().st_size
    adapter = [folder / ADAPTER_WEIGHTS] if is_adapter(folder) else []
    return sum(
        path.stat().st_size
        for path in filter(Path.exists, [*adapter, *weight_files(base_of(folder))])
    )


def shards(folder: Path) -> Iterator:
    """Yield a checkpoint's safetensors files, each opened."""
    from safetensors import SafetensorError

    for path in weight_files(folder):
        try:
            with safe_open(path, "pt") as file:
                yield file
        except (SafetensorError, OSError) as broken:
            files.fail(
                f"{path} cannot be read",
                broken,
                "config.json and *.safetensors that belong together",
            )


def heads(paths: Iterable[Path]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors in safetensors files by name, read from their heads."""
    found: dict[str, tuple[int, ...]] = {}
    for path in paths:
        with safe_open(path, "pt") as file:
            found |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    return found


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
    held: list[Path] = []
    for model in (source.resolve(), base_of(source).resolve()):
        held += [model, *model.parents[: 1 + (model.name == "adapter")]]
    if Path(out).resolve() in held:
        files.fail(
            f"--out {out} holds the {what} that is read", source, "another folder", "another --out"
        )


def gguf_names(path: Path, tokenizer) -> tuple[dict[int, str], dict[int, str]] | None:
    """Return what a GGUF file calls its tokens, by id, and what a tokenizer does, both with blanks
    as they are meant (of sentencepiece's, U+2581, llama.cpp writes some so); None where the file
    names none. Names that were invented to fill its output layer up are left out."""
    reader = gguf_reader(path)
    fields = [reader.get_field(f"tokenizer.ggml.{name}") for name in ("tokens", "token_type")]
    tokens, kinds = (field.contents() if field else None for field in fields)
    if tokens is None:
        return None
    named = zip(tokens, kinds or [None] * len(tokens))
    own = {i: token for i, (token, kind) in enumerate(named) if kind != GGUF_UNUSED}
    of_file, of_tokenizer = (
        {i: token.replace("\u2581", " ") for i, token in names.items()}
        for names in (own, template.token_names(tokenizer))
    )
    return of_file, of_tokenizer


def check_gguf_tokenizer(path: Path, tokenizer, whose: object) -> None:
    """Refuse a GGUF file that calls one of a tokenizer's tokens otherwise."""
    names, known = gguf_names(path, tokenizer) or ({}, {})
    if wrong := [id for id in template.named_apart(names, known) if id in known]:
        refuse_tokenizer(path, whose, wrong, names, known, OTHER_GGUF)


def refuse_tokenizer(
    folder: Path, whose: object, wrong: list[int], names: dict, known: dict, mend: str
) -> NoReturn:
    """Say that a model calls tokens `wrong` otherwise than it is to."""
    more = f", and {len(wrong) - 1} more are others" if wrong[1:] else ""
    seen, wanted = (
        repr(some[wrong[0]]) if wrong[0] in some else "no token" for some in (names, known)
    )
    files.fail(
        f"{folder} has another tokenizer than {whose}",
        f"{seen} as token {wrong[0]}{more}",
        wanted,
        mend,
    )


def check_vocabulary(
    folder: Path, dataset: data.Dataset, trust_remote_code: bool = False, teacher: bool = False
) -> list[int]:
    """Return the ids that are one token to the data's tokenizer and another, or none, to that of a
    model, and say how many. (A model without a tokenizer has the data's.) Refused: a model for
    which the rows hold one of them; equal sizes prove nothing."""
    pair = gguf_names(folder, dataset.tokenizer()) if is_gguf(folder) else None
    if pair is None:
        folder = folder.parent if is_gguf(folder) else folder
        if not any((folder / name).exists() for name in TOKENIZERS):
            return []
        tokenizer = template.load_tokenizer(folder, trust_remote_code)
        if template.identities(tokenizer)["vocabulary"] == dataset.identities["vocabulary"]:
            return []
        pair = template.token_names(tokenizer), template.token_names(dataset.tokenizer())
    apart = template.named_apart(*pair)
    if held := sorted({*apart} & {*dataset.used()} if apart else ()):
        mend = f"python prepare_data.py --tokenizer {folder} --out another folder"
        if is_gguf(folder):
            mend = OTHER_GGUF
        elif teacher:  # to prepare with its tokenizer would only have the student refused
            mend = (
                "dump_logits.py --map-vocabulary (the teacher's tokenizer differs in a few tokens)"
                " or --align bytes (it cuts text otherwise); or learn the text that it writes:"
                " python prepare_data.py --tokenizer"
                f" {dataset.folder / 'tokenizer'} --answers teacher --teacher {folder} --source"
                " SOURCE --out another folder"
            )
        mend += " (teacher and student must share one vocabulary)"
        refuse_tokenizer(folder, dataset.folder, held, *pair, mend)
    if apart:
        print(
            f"vocabulary: that of {folder} is the data's in all tokens that its rows hold, and"
            f" differs in {len(apart)} others"
            + (": what the teacher says of these is left out" if teacher else "")
        )
    return apart


def peft_library():
    """Return the module peft; the one-line error where it is missing."""
    try:
        import peft
    except ImportError as missing:
        files.fail(
            "LoRA adapters need the package peft", missing, "peft 0.21 or newer", "pip install peft"
        )
    return peft


def adapter_of(module: Any):
    """Return the configuration of the adapter that is trained in a model, or None."""
    return getattr(module, "peft_config", {}).get(ADAPTER)


def merged_state(module: Any) -> dict[str, Tensor]:
    """Return the state dict of the ordinary model that a model with an adapter amounts to; the
    model itself stays as it is."""
    state = {}
    for name, tensor in module.state_dict().items():
        layer, _, part = name.rpartition(".base_layer.")
        if part == "weight":
            tensor = tensor + module.get_submodule(layer).get_delta_weight(ADAPTER)
        if f".{ADAPTER}." not in name:  # its own matrices
            state[name.replace(".base_layer.", ".")] = tensor
    return state


def check_base(folder: Path, base: Path) -> None:
    """Refuse an adapter whose base is not what it was trained on (adapters made elsewhere do not
    say)."""
    if not (folder / ADAPTER_BASE).exists():
        return
    written, seen = files.read_json(folder / ADAPTER_BASE), identity(base)
    known = isinstance(written, dict) and written.get("identity") or "no identity in it"
    if known != seen:
        files.fail(
            f"the base of the adapter {folder} has changed",
            f"{base} with weights {seen[:12]}",
            known[:12],
            "the weights it was trained on, named as base_model_name_or_path in"
            f" {folder / ADAPTER_CONFIG}",
        )


def grown(folder: Path) -> dict[str, int]:
    """Return how many rows an adapter's own weights have, by the layer that they are of: of a base
    that was resized before it was trained, PEFT writes embeddings and output layer down whole."""
    whole = re.compile(r"base_model\.model\.(.+?)(\.token_adapter)?(\.base_layer)?\.weight")
    found = {}
    for name, shape in heads([folder / ADAPTER_WEIGHTS]).items():
        if (layer := whole.fullmatch(name)) and len(shape) == 2 and ".lora_" not in name:
            found[layer[1]] = shape[0]
    return found


def tokens_of(folder: Path) -> int:
    """Return how many tokens a checkpoint knows, by its files: an adapter may bring more than its
    base has."""
    config = files.read_json(base_of(folder) / "config.json")
    rows = [config.get("text_config", config)["vocab_size"]]
    own = grown(folder) if is_adapter(folder) else {}
    return max(rows + [own[layer] for layer in own if re.search("embed|lm_head", layer)])


def grow(module: Any, folder: Path) -> None:
    """Give a base the rows that its adapter's own embeddings have: it was resized before it was
    trained, as PEFT wants it done again."""
    layers = {layer: name for name, layer in module.named_modules()}
    inner, outer = module.get_input_embeddings(), module.get_output_embeddings()
    held, rows = grown(folder), inner.weight.shape[0]
    if (more := held.get(layers[inner], rows)) == rows:
        return
    if outer.weight is not inner.weight and layers[outer] not in held:  # they would be random
        raise ValueError(f"{more} embeddings, and no output layer of as many rows")
    print(f"adapter: {folder} holds {more:,} tokens, so its base of {rows:,} gets as many")
    module.resize_token_embeddings(more, mean_resizing=False)


@torch.no_grad()
def some_logits(module: Any) -> Tensor:
    """Return a model's logits of eight tokens, the first and the last that it knows."""
    vocab = module.config.get_text_config().vocab_size
    tokens = torch.arange(-4, 4, device=module.device)[None] % vocab
    return module(input_ids=tokens, use_cache=False).logits.float()


def difference(seen: Tensor, wanted: Tensor) -> float:
    """Return the relative difference of two tensors."""
    seen, wanted = seen.float(), wanted.float()
    return ((seen - wanted).norm() / wanted.norm().clamp_min(1e-9)).item()


def part(adapted: Any, shared: Tensor) -> None:
    """Give each layer of an adapted model that holds the shared (tied) weight one of its own: PEFT
    would merge what it adds to one of them into all."""
    owners = [m for m in adapted.modules() if m._parameters.get("weight") is shared]
    for layer in owners[1:]:
        layer.weight = nn.Parameter(shared.detach().clone(), requires_grad=False)


def tie_again(module: Any) -> None:
    """Tie embeddings and output layer where they are still equal; else say, and write into the
    configuration, that they are two."""
    inner, outer = module.get_input_embeddings(), module.get_output_embeddings()
    if tied := torch.equal(inner.weight, outer.weight):
        outer.weight = inner.weight
    else:
        print("adapter: it parts the tied embeddings and output layer, which are two from here on")
    for config in (module.config, module.config.get_text_config()):
        config.tie_word_embeddings = tied  # PEFT has written that they are two


def in_float32(module: Any) -> dict[str, torch.dtype]:
    """Make a model in half precision one in float32, where memory allows that: a small adapter that
    is merged wrongly would hide in half precision's rounding. Return the dtypes of before."""
    own = {name: p.dtype for name, p in module.named_parameters()}
    whole = 4 * sum(p.numel() for p in module.parameters())
    if module.dtype == torch.float32 or whole > files.free_memory() // 2:
        return {}
    module.float()
    return own


def as_before(module: Any, own: dict[str, torch.dtype]) -> None:
    """Give weights that were brought to float32 their own dtypes again, and new ones the
    commonest."""
    most = max(own.values(), key=[*own.values()].count, default=None)
    for name, p in module.named_parameters():
        p.data = p.data.to(own.get(name, most))


def merge_adapter(module: Any, folder: Path, base: Path) -> Any:
    """Return the ordinary model that a base model and the adapter in a folder amount to: its logits
    are PEFT's own."""
    check_base(folder, base)
    peft = peft_library()
    if not (folder / ADAPTER_WEIGHTS).exists():  # PEFT would read a pickle instead
        files.fail(
            f"{folder} has no weights", f"{ADAPTER_CONFIG} alone", f"{ADAPTER_WEIGHTS} beside it"
        )
    # merged into few bits it is rounded; flash attention needs the device
    compared = not getattr(module, "is_quantized", False)
    compared = compared and module.config._attn_implementation in ("sdpa", "eager")
    halves = in_float32(module) if compared else {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # PEFT would leave them random
            warnings.filterwarnings("error", message="Found missing adapter keys")
            grow(module, folder)
            inner, outer = module.get_input_embeddings(), module.get_output_embeddings()
            tied = outer is not None and outer.weight is inner.weight
            adapted = peft.PeftModel.from_pretrained(module, folder).eval()
            own = some_logits(adapted) if compared else None
            tied = tied and (module.get_input_embeddings(), module.get_output_embeddings()) != (
                inner,
                outer,
            )
            if tied:
                part(adapted, inner.weight)
            module = adapted.merge_and_unload()
            if tied:
                tie_again(module)
            module.requires_grad_(True)  # PEFT froze them
            error = difference(some_logits(module), own) if own is not None else 0.0
            limit = 1e-3 if module.dtype == torch.float32 else 0.1
            if halves:
                as_before(module, halves)
        if how := generate.read_config(folder):
            module.generation_config = how
    # safetensors, JSON, sizes, kinds of adapters that do not merge: each says what it saw
    except Exception as broken:
        files.fail(
            f"the adapter {folder} cannot be put on its base",
            f"{type(broken).__name__}: {str(broken)[:300]}",
            f"{ADAPTER_CONFIG} and {ADAPTER_WEIGHTS} that belong together",
        )
    if error > limit:  # NaN is refused with the name of its tensor (models.check_finite)
        files.fail(
            f"the adapter {folder} cannot be merged into its base",
            f"logits that differ from PEFT's own by {error:.2g}",
            f"at most {limit:g}",
            "merge it with PEFT (merge_and_unload) and give that folder",
        )
    return module


def save_adapter(
    module: Any, tokenizer, folder: Path, dtype: torch.dtype, base: str
) -> dict[str, Tensor]:
    """Write an adapter folder, and return what its weights are; `base` is the identity of the
    weights below."""
    config = copy.copy(adapter_of(module))
    config.target_modules = sorted(config.target_modules)  # a set: another order in each process
    config.inference_mode = True
    config.save_pretrained(folder)
    state = {}
    for name, tensor in peft_library().get_peft_model_state_dict(module).items():
        state[f"base_model.model.{name}"] = tensor.to(dtype).contiguous()
    save_file(state, folder / ADAPTER_WEIGHTS, {"format": "pt"})
    files.write_json(folder / ADAPTER_BASE, {"identity": base})
    module.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return state


def save(
    module, tokenizer, folder: Path, dtype: torch.dtype = torch.float32, weights: bool = True
) -> dict[str, Tensor]:
    """Save a model, with its adapter merged, and its tokenizer so that plain `from_pretrained`
    reads them, and return what its weights are. Without `weights`: all else."""
    state: dict[str, Tensor] = {}
    cast: dict[tuple, Tensor] = {}
    if weights:
        state = merged_state(module) if adapter_of(module) else module.state_dict()
    for name, tensor in state.items():
        if tensor.is_floating_point():  # tied weights stay one
            place = tensor.data_ptr(), tensor.shape
            state[name] = cast[place] = cast[place] if place in cast else tensor.to(dtype)
    try:
        module.save_pretrained(folder, state_dict=state)
        in_memory = module.config.dtype
        module.config.dtype = dtype  # save_pretrained wrote down that of the weights in memory
        module.config.save_pretrained(folder)
        module.config.dtype = in_memory
        tokenizer.save_pretrained(folder)
        if module.config.get_text_config() is not module.config:
            for path in filter(Path.exists, map(Path(module.name_or_path).joinpath, PROCESSORS)):
                shutil.copyfile(path, folder / path.name)
    except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError) as refused:
        files.fail(
            f"transformers cannot save this {type(module).__name__}",
            f"{type(refused).__name__}: {' '.join(str(refused).split())[:300]}",
            "a model, its configuration and its tokenizer that can be written",
            "the files of --student that this is about",
        )
    for_other_readers(folder)
    template.say_misread(tokenizer, folder, module.config.model_type)
    return state


def same_weights(folder: Path, state: dict[str, Tensor]) -> bool:
    """Refuse saved weights that are not, bit for bit, those of `state`, which was to be saved;
    return whether all of them are there by these names (transformers renames some; of tied ones it
    writes one)."""
    left, named = dict(state), True
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():
                seen, wanted = file.get_tensor(name), left.pop(name, None)
                if wanted is None:
                    named = False
                elif seen.dtype != wanted.dtype or not torch.equal(seen, wanted.cpu()):
                    files.fail(
                        f"{path} is not the model in memory",
                        f"another {name}",
                        "the weights that were written",
                        "another disk: this one changes what it is given",
                    )
    there = {(t.data_ptr(), t.shape) for name, t in state.items() if name not in left}
    return named and all((t.data_ptr(), t.shape) in there for t in left.values())


@torch.no_grad()
def check_saved(module: Any, folder: Path, amp: torch.dtype | None, dtype: torch.dtype) -> None:
    """Refuse a saved checkpoint from which plain transformers would not read the model that is in
    memory: loaded from its file it must give the same logits of eight tokens.

    At an evaluation there are no gradients: it takes no more than their memory. Where there are few
    (an adapter is trained), what was saved is read on the CPU.
    """
    attn, training = module.config._attn_implementation, module.training
    loading = dict(output_loading_info=True, use_safetensors=True, attn_implementation=attn)
    again, info = type(module).from_pretrained(folder, dtype=module.dtype, **loading)
    other = [name for kind in info.values() for name in kind]
    if not other:
        module.eval()
        if adapter_of(module):
            amp = None
        else:
            again.to(module.device)
        again.eval()
        with torch.autocast(module.device.type, amp, enabled=amp is not None):
            error = difference(some_logits(again).to(module.device), some_logits(module))
        module.train(training)
    if other or not error <= (1e-3 if dtype == torch.float32 else 0.1):
        files.fail(
            f"{folder} is not the model in memory: {type(module).__name__} cannot be saved",
            f"{other[0]}, which does not belong" if other else f"logits that differ by {error:.2g}",
            "a checkpoint that transformers reads as it was evaluated",
            "another student, or another version of transformers",
        )


def check_adapter_saved(module: Any, folder: Path) -> None:
    """Refuse a saved adapter whose tensors are not those that PEFT looks for: it would leave others
    as they are, in silence."""
    peft = peft_library()
    with torch.device("meta"):
        plain = type(module)(module.config)
        adapted = peft.get_peft_model(plain, peft.PeftConfig.from_pretrained(folder))
    wanted = peft.get_peft_model_state_dict(adapted)
    seen = heads([folder / ADAPTER_WEIGHTS])
    if seen != {name: tuple(tensor.shape) for name, tensor in wanted.items()}:
        other = sorted({*seen} ^ {*wanted}) or ["another shape"]
        files.fail(
            f"{folder} is not the adapter in memory: PEFT would not read it",
            other[0],
            f"the {len(wanted)} tensors that PEFT reads",
            "another version of peft, or --merge",
        )


def for_other_readers(folder: Path) -> None:
    """Write the positions' settings and the tokenizer's class as transformers 4 and mlx-lm read
    them too, beside what transformers 5 has saved.

    Where there is no `rope_theta` at the top of config.json they take their own default and say
    nothing: the model then writes other text.
    """
    config = files.read_json(folder / "config.json")
    rope = config.get("rope_parameters") or {}
    for name in ("rope_theta", "partial_rotary_factor"):
        if name in rope:  # it is not where kinds of layers have their own
            config[name] = rope[name]
    if "rope_theta" in rope and rope.get("rope_type", "default") != "default":
        config["rope_scaling"] = rope
    files.write_json(folder / "config.json", config)
    words = folder / "tokenizer_config.json"
    tokens = files.read_json(words)
    # what transformers 5 calls it, which also knows the old name
    if tokens.get("tokenizer_class") == "TokenizersBackend":
        files.write_json(words, tokens | {"tokenizer_class": "PreTrainedTokenizerFast"})
