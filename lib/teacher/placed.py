"""Where a teacher's weights lie, and in what, if not all of them as they are on one device: in 8 or
4 bits, over several cards, or waiting in the CPU's memory and on disk. (Among several processes:
parallel.py.)"""

import argparse
import collections
import logging
from pathlib import Path

import torch

from lib import checkpoints, files, flags, models, train
from lib.head import CHUNK_BYTES

# a weight of the layers; 4bit: and a float32 scale for each 64 of them
QUANT_BYTES = {"8bit": 1.0, "4bit": 0.5625}


def add_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flags of a teacher that is quantised, or lies on several cards."""
    group.add_argument(
        "--teacher-quant",
        choices=list(QUANT_BYTES),
        default=None,
        help="its layers in 8 or 4 bits (bitsandbytes; default: off)",
    )
    flags.option(
        group,
        "--device-map",
        free=True,
        choices=["auto"],
        default=None,
        help="auto: its layers over all cards that this process sees (accelerate; default: off)",
    )


def in_bits(quant: str, device: torch.device, dtype: torch.dtype) -> dict:
    """Return how from_pretrained quantises a model on a device; `dtype` is what it computes in."""
    from transformers import BitsAndBytesConfig

    # it would say at every product that 8 bits are multiplied in float16
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if quant == "8bit":
        bits = BitsAndBytesConfig(load_in_8bit=True)
    else:
        bits = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    return {"quantization_config": bits, "device_map": {"": device}}


NEEDS = {"teacher_quant": ("bitsandbytes", "accelerate"), "device_map": ("accelerate",)}


def check_packages(args: argparse.Namespace) -> None:
    """Refuse --teacher-quant and --device-map without the packages that they take."""
    for name, packages in NEEDS.items():
        for package in packages if getattr(args, name) else ():
            files.need(package, f"{flags.spelled(name)} {getattr(args, name)}")


def check_placing(args: argparse.Namespace, folder: Path) -> None:
    """Refuse them for a model that is not a folder of whole weights."""
    for name in NEEDS:
        if not getattr(args, name):
            continue
        if name == "device_map" and (how := checkpoints.quantised(folder)):
            wanted = "whole weights, whose layers have a size that is known"
            files.fail(f"{folder} is quantised, and --device-map does not take it", how, wanted)
        if checkpoints.is_adapter(folder) or checkpoints.is_gguf(folder):
            files.fail(
                f"{flags.spelled(name)} does not take it",
                folder,
                "a folder with all of a model's weights",
                "a run with --merge, its best/",
            )


def cards(args: argparse.Namespace, device: torch.device) -> int:
    """Return how many cards --device-map spreads a model over."""
    return torch.cuda.device_count() if args.device_map and device.type == "cuda" else 1


def output_layer(shapes: list) -> tuple[int, int]:
    """Return about how many rows and columns a model's output layer has, by its tensors' shapes."""
    matrices = [shape for shape in shapes if len(shape) == 2]
    vocab = max(map(max, matrices), default=0)
    return vocab, max((min(shape) for shape in matrices if vocab in shape), default=0)


def activation_bytes(shapes: list, tokens: int, dtype: torch.dtype) -> int:
    """Return about how many bytes one layer's activations take: nothing is kept for a backward
    pass."""
    vocab, width = output_layer(shapes)
    others = (max(shape) for shape in shapes if len(shape) == 2 and vocab not in shape)
    return tokens * (6 * width + 3 * max(others, default=0)) * dtype.itemsize


def spread(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    room: int,
    trust_remote_code: bool = False,
    cards: dict[int, int] | None = None,
) -> dict[str, int | str | None]:
    """Return which part of a model goes where: all that is not a layer to `device`, which also
    runs the layers that wait elsewhere; the layers, in order, into the rest of its `room` (bytes),
    then to other `cards` (number: bytes) or, without, to CPU memory, and then to disk, as
    accelerate places them."""
    from accelerate import infer_auto_device_map
    from transformers import AutoModelForCausalLM

    config = models.config_of(folder, trust_remote_code)
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=trust_remote_code
        )
    body = models.body_of(module)
    prefix = next(name for name, part in module.named_modules() if part is body)
    if not hasattr(body, "layers"):
        files.fail(
            f"no places are known for the layers of {type(module).__name__}",
            "no .layers",
            "a body with .layers",
            "--teacher-quant, or --logits",
        )

    def size(part):
        return sum(p.numel() * p.element_size() for p in part.parameters())

    own = device.index if device.type == "cuda" else device.type  # as accelerate calls it
    if cards is not None and room < size(module) - size(body.layers):
        files.fail(
            f"{folder} has no room for its embeddings on {device}",
            f"{files.human(max(0, room))} for weights",
            f"{files.human(size(module) - size(body.layers))}",
            "--tp under torchrun, or --logits (dump_logits.py), where it is alone",
        )
    rooms: dict[int | str | None, int] = {own: room - size(module) + size(body.layers)}
    rooms.update((cards or {}).items())
    if own != "cpu" and cards is None:
        rooms["cpu"] = train.available_bytes(torch.device("cpu"))
    whole = sorted({type(layer).__name__ for layer in body.layers})
    layers = infer_auto_device_map(body.layers, rooms, whole, clean_result=False)
    others = [name for name, part in module.named_children() if part is not body]
    others += [f"{prefix}.{name}" for name, part in body.named_children() if name != "layers"]
    here = str(device) if cards is None else own  # one name for it, beside other cards
    where: dict[str, int | str | None] = dict.fromkeys(others, here)
    for number, place in layers.items():
        where[f"{prefix}.layers.{number}"] = here if place == own else place
    return where


def numbered(device: torch.device) -> torch.device:
    """Return a device with its number: cuda is cuda:0, and equal to it."""
    return torch.empty(0, device=device).device


def over_cards(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    room: int,
    beside: int,
    trust_remote_code: bool = False,
) -> dict:
    """Return how from_pretrained puts a model on all cards (--device-map auto): `device` has `room`
    bytes for weights; of each other, `beside` bytes of what is free are left."""
    device = numbered(device)
    others = range(torch.cuda.device_count()) if device.type == "cuda" else ()
    cards = {
        number: train.available_bytes(torch.device("cuda", number)) - beside
        for number in others
        if number != device.index
    }
    where = spread(checkpoints.base_of(folder), dtype, device, room, trust_remote_code, cards)
    counts = collections.Counter(where[name] for name in where if ".layers." in name)
    if "disk" in counts:
        free = files.human(max(0, room) + sum(cards.values()))
        files.fail(
            f"{folder} does not fit on {1 + len(cards)} card(s)",
            f"room for all but {counts['disk']} layers in the {free} that are free",
            mend="--tp under torchrun, --teacher-quant 8bit or 4bit, or more cards",
        )
    print(f"teacher: layers on {said_of(counts)}")
    return {"device_map": where}


def said_of(counts: collections.Counter) -> str:
    return ", ".join(f"{place} {count}" for place, count in counts.items())


def beside_bytes(shapes: list, tokens: int, dtype: torch.dtype) -> int:
    """Return about how many bytes a pass of a dump takes beside the weights: `tokens` of them."""
    return activation_bytes(shapes, tokens, dtype) + 5 * CHUNK_BYTES
