"""LoRA by `peft`: an adapter trained inside frozen weights, and the adapter folders that it leaves.

    adapter_config.json adapter_model.safetensors    PEFT's own format:
                                                     AutoPeftModelForCausalLM.from_pretrained reads
                                                     the folder as it is
    base.json                                        the hash of the weights it was trained on,
                                                     which adapter_config.json names
    generation_config.json, README.md, tokenizer     as in a whole checkpoint

W x becomes W x + alpha / rank * B A x with B = 0 at first: the untouched model is its base, bit for
bit. Source: Hu et al., arXiv:2106.09685, section 4.1.
"""

import copy
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lib import files

CONFIG, WEIGHTS, BASE = "adapter_config.json", "adapter_model.safetensors", "base.json"
NAME = "default"  # PEFT's own name of the only adapter


def library():
    """Return the module peft; the one-line error where it is missing."""
    try:
        import peft
    except ImportError as missing:
        files.fail(
            "LoRA adapters need the package peft", missing, "peft 0.21 or newer", "pip install peft"
        )
    return peft


def is_adapter(folder: Path) -> bool:
    return (folder / CONFIG).exists()


def check_start(args, source: Path, weights: bool) -> None:
    """Refuse to train an adapter on anything but whole weights on the disk: what its folder names
    as its base must be what it was trained on."""
    if args.lora_rank and is_adapter(source):
        files.fail(
            f"--lora-rank cannot start from {source}",
            "an adapter, which would be no base for a second one",
            "whole weights",
            "--merge in the run that made it, or train without --lora-rank",
        )
    if args.lora_rank and not weights:
        files.fail(
            f"--lora-rank cannot start from {source}",
            "config.json alone",
            "weights to freeze",
            "the same command without --lora-rank",
        )
    if args.lora_rank:
        library()


def attach(module: nn.Module, args, source: Path) -> None:
    """Freeze a model, which was read from the folder `source`, and put an adapter of --lora-rank
    into its layers, in place."""
    peft, layers = library(), dict(module.named_modules())
    base = (
        str(source.resolve()) if Path(args.student).is_dir() else args.student
    )  # else a hub id, whose snapshot's name is of no use elsewhere
    targets = args.lora_targets
    if targets != "all-linear":
        targets = targets.split(",")
        whole = (module.get_input_embeddings(), module.get_output_embeddings())
        able = sorted(
            {
                name.rsplit(".", 1)[-1]
                for name, layer in layers.items()
                if isinstance(layer, nn.Linear) and layer not in whole
            }
        )
        for target in targets:
            hit = [layer for name, layer in layers.items() if f".{name}".endswith(f".{target}")]
            if not hit or any(
                layer in whole for layer in hit
            ):  # the output layer is read as one matrix (lib/head.py), often that of the embeddings
                files.fail(
                    "--lora-targets does not fit the model",
                    target,
                    f"all-linear, or names among {', '.join(able)}",
                )
    config = peft.LoraConfig(
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
    )
    torch.manual_seed(args.seed)
    try:
        peft.inject_adapter_in_model(config, module)
    except (ValueError, TypeError) as refused:  # of a kind of layer that PEFT cannot adapt
        files.fail(
            "--lora-targets does not fit the model",
            f"{args.lora_targets}: {str(refused)[:200]}",
            "linear layers",
        )
    trained = [p.numel() for p in module.parameters() if p.requires_grad]
    print(
        f"lora: an adapter of rank {args.lora_rank} with {sum(trained):,} parameters, in"
        f" {len(trained) // 2} layers; all others are frozen"
    )


def config_of(module: nn.Module):
    """Return the configuration of the adapter that is trained in a model, or None."""
    return getattr(module, "peft_config", {}).get(NAME)


def merged(module: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of the ordinary model that a model with an adapter amounts to; the
    model itself stays as it is."""
    state = {}
    for name, tensor in module.state_dict().items():
        layer, _, part = name.rpartition(".base_layer.")
        if part == "weight":
            tensor = tensor + module.get_submodule(layer).get_delta_weight(NAME)
        if ".lora_" not in name:
            state[name.replace(".base_layer.", ".")] = tensor
    return state


def save(module: nn.Module, tokenizer, folder: Path, dtype: torch.dtype, base: str) -> None:
    """Write an adapter folder; `base` is the identity of the weights below."""
    config, state = copy.copy(config_of(module)), library().get_peft_model_state_dict(module)
    config.target_modules, config.inference_mode = (
        sorted(config.target_modules),
        True,
    )  # a set has another order in each process
    config.save_pretrained(folder)
    save_file(
        {
            f"base_model.model.{name}": tensor.to(dtype).contiguous()
            for name, tensor in state.items()
        },
        folder / WEIGHTS,
        {"format": "pt"},
    )
    files.write_json(folder / BASE, {"identity": base})
    module.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def merge(module: nn.Module, folder: Path) -> nn.Module:
    """Return the ordinary model that a base model and the adapter in a folder amount to."""
    peft = library()
    if not (folder / WEIGHTS).exists():  # PEFT would read a pickle instead
        files.fail(f"{folder} has no weights", f"{CONFIG} alone", f"{WEIGHTS} beside it")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings(
                "error", message="Found missing adapter keys"
            )  # PEFT would leave them random
            module = (
                peft.PeftModel.from_pretrained(module, folder)
                .merge_and_unload()
                .requires_grad_(True)
            )  # PEFT froze them
        if (folder / "generation_config.json").exists():
            module.generation_config = type(module.generation_config).from_pretrained(folder)
    # safetensors, JSON, sizes, kinds of adapters that do not merge: each says what it saw
    except Exception as broken:
        files.fail(
            f"the adapter {folder} cannot be put on its base",
            f"{type(broken).__name__}: {str(broken)[:300]}",
            f"{CONFIG} and {WEIGHTS} that belong together",
        )
    return module
