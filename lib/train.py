"""What both trainers set up: AdamW with decay on matrices only, linear warm-up, cosine to zero,
clipping, and fp16's scaler; and before the first step, whether it will fit in memory and on disk.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lib import checkpoints, data, evaluate, files, head, models, plan

PROBE_TOKENS = 512  # of a line by which it is measured what a forward pass keeps
# on the CPU: pages of code that a first step touches (oneDNN, torch._dynamo), and what the C
# library's heap takes for what is kept, holes between it included (tests/pipeline/test_memory.py)
CODE_BYTES, HEAP = 60_000_000, 1.5


def available_bytes(device: torch.device) -> int:
    """Return the memory that is free now on the device (CPU: of the machine)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return files.free_memory()


@dataclass(frozen=True)
class Largest:
    """The largest micro-batch of a run: its tokens, its targets (on average; of text that is yet to
    be written at most), and how many of them there are in a step."""

    tokens: int
    targets: int
    batches: int


def largest(args, rows: plan.Rows) -> Largest:
    """Return the Largest of a run."""
    part = min(1.0, args.tokens_per_step / max(1, int(rows.lengths.sum(dtype=np.int64))))
    most = Largest(0, 0, 0)
    for there, longest, share in rows.kinds():
        step = max(longest, round(part * there))
        tokens = min(args.tokens_per_microbatch, step)
        targets, batches = math.ceil(tokens * share), math.ceil(step / tokens)
        most = Largest(max(most.tokens, tokens), max(most.targets, targets), most.batches + batches)
    return most


def kept_bytes(model: models.Model, split: data.Split, amp: torch.dtype | None) -> float:
    """Return how many bytes a token a forward pass keeps for the backward one, beside the weights:
    measured, by passes over one line of tokens and over two."""
    module, training = model.module, model.module.training
    plain = replace(model, body=getattr(model.body, "_orig_mod", model.body))  # not compiled
    weights = {head.local(p).untyped_storage().data_ptr() for p in module.parameters()}
    seen: dict[int, Tensor] = {}  # by where it lies

    def keep(tensor: Tensor) -> Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    line = split.batch([[0]])
    length, sizes, nothing = min(PROBE_TOKENS, line.tokens.shape[1]), [], line.where[:0]
    parts = [part[:, :length] for part in (line.tokens, line.positions, line.row_of)]
    module.train()
    for lines in (1, 2):
        tokens, positions, row_of = (part.repeat(lines, 1) for part in parts)
        batch = data.Batch(tokens, positions, nothing, nothing, nothing, [0] * lines, row_of)
        batch = batch.to(model.device)
        with (
            models.on_text_alone(module),
            torch.random.fork_rng(enabled=model.device.type == "cpu"),
            torch.autocast(model.device.type, amp, enabled=amp is not None),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        ):
            plain.hidden(batch)
        new = [t.untyped_storage() for t in seen.values()]
        sizes.append(sum(one.nbytes() for one in new if one.data_ptr() not in weights))
        seen.clear()
    module.train(training)
    return (sizes[1] - sizes[0]) / length


def training_bytes(
    model: models.Model,
    most: Largest,
    each: float,
    amp: torch.dtype | None,
    checkpointing: str | None,
) -> int:
    """Return about how many more bytes training takes once float32 weights are loaded: gradients,
    AdamW, activations (`each`: bytes a token), the head's buffers."""
    config, half = model.module.config.get_text_config(), 2 if amp else 4
    if checkpointing:  # the states between layers, and one layer that is recomputed
        layers = max(1, config.num_hidden_layers)
        there = 1 if is_offloaded(model, checkpointing) else layers
        each = each / layers + there * config.hidden_size * 4  # float32, as the sums of layers are
    trained = [p for p in model.module.parameters() if p.requires_grad]
    parts = [part for part in map(head.local, trained) if part.device.type == model.device.type]
    held = sum(part.numel() for part in parts)  # not what lies in the CPU's memory (--cpu-offload)
    gradients, moments = 4 * held, 8 * held
    kept = int(most.tokens * each * (HEAP if model.device.type == "cpu" else 1))
    if (output := model.module.get_output_embeddings()) is None:  # a classifier
        return moments + gradients + kept
    weight = output.weight
    # in float32, beside what is there of it; and the operand of the products
    kept += weight.numel() * (4 * weight.requires_grad + half * bool(amp))
    if head.is_divided(weight):  # what is gathered: it, its gradient twice as embedding, two layers
        layer = model.parameters // max(1, config.num_hidden_layers)
        kept += 4 * (3 * weight.numel() + 4 * layer)
    kept += min(head.CHUNK_BYTES, 4 * most.targets * len(weight))
    # gradients grow while activations go, unless those of earlier micro-batches are there
    return moments + (gradients + kept if most.batches > 1 else max(gradients, kept))


def is_offloaded(model: models.Model, checkpointing: str | None) -> bool:
    """Return whether --checkpointing takes states off the device; the CPU's are where they are."""
    return checkpointing == "offload" and model.device.type == "cuda"


def checkpoint(model: models.Model, checkpointing: str) -> None:
    """Switch gradient checkpointing on."""
    model.module.activation_checkpointing_enable(
        {"use_reentrant": False}, offload=is_offloaded(model, checkpointing)
    )


def loading(args, dataset: data.Dataset, amp: torch.dtype | None) -> dict[str, Any]:
    """Return what loading a student asks of the flags."""
    return dict(
        dataset=dataset,
        attn=args.attn,
        compiled=args.compile,
        amp=amp,
        pack=not args.no_pack,
        trust_remote_code=args.trust_remote_code,
    )


def described(student: models.Model, amp: torch.dtype | None) -> str:
    """Return a line that says what the student is."""
    line = (
        f"student: {student.folder}, {student.parameters:,} parameters, {student.vocab:,} tokens,"
        f" on {student.device}, {amp or 'float32'}"
    )
    config = student.module.config.get_text_config()
    weight = getattr(config, "router_aux_loss_coef", None)
    if weight and getattr(config, "output_router_logits", False):
        line += (
            "\nstudent: its config.json asks for the router's load-balancing loss (times"
            f" {weight:g}) in training: it is not added here"
        )
    cut = evaluate.tokens_measured(student)
    return line + (cut and f"\nstudent: {cut}, those the teacher knows too; own_ce is over all")


def make_room(
    args,
    model: models.Model,
    amp: torch.dtype | None,
    rows: plan.Rows,
    *more: int,
    merge: bool = False,
) -> None:
    """Say what memory and disk are needed and there; switch gradient checkpointing on, on request
    or when memory is short without. With --dry-run that is all, and the program ends.

    more   bytes that are taken beside the student's own
    merge  whole weights are saved, even where few are trained
    """
    have = available_bytes(model.device)
    most, each = largest(args, rows), kept_bytes(model, rows.split, amp)
    more += (CODE_BYTES,) if model.device.type == "cpu" else ()
    how = args.checkpointing or "on"
    plain, saved = (sum(more) + training_bytes(model, most, each, amp, on) for on in (None, how))
    use = args.checkpointing or plain > have
    if plain > have and not args.checkpointing:
        print("memory: short, so gradient checkpointing is on (or lower --tokens-per-microbatch)")
    need = saved if use else plain
    print(
        f"memory: about {files.human(need)} more needed, {files.human(have)} free on {model.device}"
    )
    if need > have:
        print("memory: WARNING, this may not fit: lower --tokens-per-microbatch, or use --amp")
    if use:
        checkpoint(model, how)
    check_space(args.out, model, merge or model.trained == model.parameters, args.keep)
    if args.dry_run:
        print("--dry-run: nothing was written")
        raise SystemExit(0)


def check_space(out: str, model: models.Model, whole: bool = True, keep: int = 0) -> None:
    """Say what room the checkpoints take, and refuse to start when they would not fit: last/ twice
    (old and new) and the states to `keep` at 12 bytes a trained weight, best/ and final/ at 4 a
    weight; of these the trained ones alone, unless the `whole` model is saved."""
    saved = model.parameters if whole else model.trained
    need, have = (2 + keep) * 12 * model.trained + 3 * 4 * saved, room(out)
    print(f"disk: {files.human(need)} needed for checkpoints, {files.human(have)} free at {out}")
    refuse_short(out, need, have)


def check_space_of(out: str, source: Path) -> None:
    """Refuse a disk that is too small for a run that trains all weights of a checkpoint, by the
    heads of its files, before they are hashed and loaded; what lies there twice (tied) counts
    once. A finished run needs none."""
    finished = (Path(out) / "config.json").exists()
    if finished or not checkpoints.has_weights(source) or checkpoints.quantised(source):
        return
    shapes = checkpoints.shapes(checkpoints.base_of(source))
    largest = max(map(math.prod, shapes), default=0)
    sizes = [math.prod(shape) for shape in shapes if math.prod(shape) < largest]
    refuse_short(out, (2 * 12 + 3 * 4) * (sum(sizes) + largest), room(out))


def room(out: str) -> int:
    """Return the bytes that checkpoints can take: what is there already will be replaced."""
    there = {}  # a file may have two names
    for name in ("last", "best", "final", files.KEPT):
        for stat in (path.stat() for path in (Path(out) / name).rglob("*") if path.is_file()):
            there[stat.st_dev, stat.st_ino] = stat.st_size
    return files.free_bytes(Path(out)) + sum(there.values())


def refuse_short(out: str, need: int, have: int) -> None:
    """Refuse a disk that is too small."""
    if need > have:
        files.fail(
            f"the disk of {out} is too small",
            files.human(have) + " free",
            files.human(need),
            "another --out, or delete old runs",
        )


def adamw(
    module: nn.Module, lr: float, weight_decay: float, beta2: float, device: torch.device
) -> torch.optim.AdamW:
    """Return AdamW (arXiv:1711.05101): fused where there is a fused kernel; vectors (norms, biases)
    are not decayed."""
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]],
        lr=lr,
        betas=(0.9, beta2),
        eps=1e-8,
        fused=device.type in ("cpu", "cuda"),
    )


def cosine(update: int, updates: int, lr: float, warmup: float) -> float:
    """Return the learning rate of update number `update` of `updates`: a linear rise over the first
    share `warmup`, then a cosine to 0."""
    rise = max(1, round(warmup * updates))
    if update < rise:
        return lr * (update + 1) / rise
    return lr * 0.5 * (1 + math.cos(math.pi * min(1.0, (update - rise) / max(1, updates - rise))))


def gradient_norm(
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, module: nn.Module, clip: float
) -> float:
    """Unscale the gradient, return its norm, and clip it to the norm `clip` (0 = not at all)."""
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(module.parameters(), clip if clip else math.inf)
    return head.undivided(norm).item()


def update(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, lr: float) -> bool:
    """Step with the gradient that `gradient_norm` has unscaled and clipped. Returns whether the
    step was taken.

    A step that fp16 overflow makes the scaler skip is not taken, and must not advance the schedule.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    before = scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return scaler.get_scale() >= before
