"""LoRA by `peft`: an adapter trained inside frozen weights. (Reading, merging and saving one:
lib/checkpoints.py.)

W x becomes W x + alpha / rank * B A x with B = 0 at first: the untouched model is its base, bit for
bit. Source: Hu et al., arXiv:2106.09685, section 4.1.
"""

import argparse
from pathlib import Path

import torch
from torch import nn

from lib import checkpoints, files, flags, models, train


def add_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("LoRA (needs peft)")
    flags.option(
        group,
        "--lora-rank",
        type=int,
        default=0,
        metavar="R",
        help=(
            "train a LoRA adapter of this rank, the weights frozen; 0 = off, train all weights"
            " (default: %(default)s)"
        ),
    )
    flags.option(
        group,
        "--lora-alpha",
        type=float,
        default=32.0,
        help="the adapter's output is multiplied by alpha / rank (default: %(default)s)",
    )
    flags.option(
        group,
        "--lora-dropout",
        type=float,
        default=0.0,
        help="dropout on the adapter's input (default: %(default)s)",
    )
    flags.option(
        group,
        "--lora-targets",
        default="all-linear",
        metavar="NAMES",
        help="layers that get one: all-linear, or names like q_proj,v_proj (default: %(default)s)",
    )
    flags.option(
        group,
        "--merge",
        action="store_true",
        help=(
            "best/ and final/: whole weights with the adapter merged, it itself in adapter/"
            " (default: it alone)"
        ),
    )


def check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse (exit code 2) values that cannot work."""
    flags.not_negative(parser, args, "lora_rank")
    flags.positive(parser, args, "lora_alpha")
    if not 0 <= args.lora_dropout < 1:
        parser.error(f"--lora-dropout is {args.lora_dropout}, wanted a share below 1")
    if not all(args.lora_targets.split(",")):
        parser.error(
            f"--lora-targets is {args.lora_targets!r}, wanted all-linear, or names like"
            " q_proj,v_proj"
        )
    if args.merge and not args.lora_rank:
        parser.error(
            "--merge needs --lora-rank: without an adapter best/ holds whole weights already"
        )


def check_start(args, source: Path) -> None:
    """Refuse to train an adapter on anything but whole weights on the disk: what its folder names
    as its base must be what it was trained on. Without one, refuse weights that cannot be trained,
    and a disk that has no room for all of them."""
    if not args.lora_rank:
        checkpoints.check_whole(source)
        if not args.eval_only and not getattr(args, "keep_layers", None):
            train.check_space_of(args.out, source)
        return
    if checkpoints.is_adapter(source):
        files.fail(
            f"--lora-rank cannot start from {source}",
            "an adapter, which would be no base for a second one",
            "whole weights",
            "--merge in the run that made it, or train without --lora-rank",
        )
    if not checkpoints.has_weights(source):
        files.fail(
            f"--lora-rank cannot start from {source}",
            "config.json alone",
            "weights to freeze",
            "the same command without --lora-rank",
        )
    checkpoints.peft_library()


def check_targets(module: nn.Module, targets: list[str]) -> None:
    """Refuse names of layers that are not there, or that are the output layer or the embeddings:
    the output layer is read as one matrix (lib/head.py), often that of the embeddings."""
    layers = dict(module.named_modules())
    whole = (module.get_input_embeddings(), module.get_output_embeddings())
    linear = {n for n, layer in layers.items() if isinstance(layer, nn.Linear)}
    able = sorted({name.rsplit(".", 1)[-1] for name in linear if layers[name] not in whole})
    for target in targets:
        hit = [layer for name, layer in layers.items() if f".{name}".endswith(f".{target}")]
        if not hit or any(layer in whole for layer in hit):
            files.fail(
                "--lora-targets does not fit the model",
                target,
                f"all-linear, or names among {', '.join(able)}",
            )


def attach(args, student: models.Model) -> None:
    """Freeze a model, and put an adapter of --lora-rank into its layers, in place; nothing at
    rank 0."""
    if not args.lora_rank:
        return
    peft, module, targets = checkpoints.peft_library(), student.module, args.lora_targets
    if targets != "all-linear":
        targets = targets.split(",")
        check_targets(module, targets)
    # of a hub id the name: that of its snapshot is of no use elsewhere
    local = Path(args.student).is_dir()
    config = peft.LoraConfig(
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(student.folder.resolve()) if local else args.student,
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
