"""The optimizer and its schedule: AdamW with decay on matrices only, linear warm-up, cosine to zero, clipping, and fp16's scaler."""
import math

import torch
from torch import nn


def adamw(module: nn.Module, lr: float, weight_decay: float, beta2: float, device: torch.device) -> torch.optim.AdamW:
    """Return AdamW (arXiv:1711.05101): fused where there is a fused kernel; vectors (norms, biases) are not decayed."""
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
              {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=(0.9, beta2), eps=1e-8, fused=device.type in ("cpu", "cuda"))


def cosine(update: int, updates: int, lr: float, warmup: float) -> float:
    """Return the learning rate of update number `update` of `updates`: a linear rise over the first share `warmup`, then a cosine to 0."""
    rise = max(1, round(warmup * updates))
    if update < rise:
        return lr * (update + 1) / rise
    return lr * 0.5 * (1 + math.cos(math.pi * min(1.0, (update - rise) / max(1, updates - rise))))


def gradient_norm(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, module: nn.Module, clip: float) -> float:
    """Unscale the gradient, return its norm, and clip it to the norm `clip` (0 = not at all)."""
    scaler.unscale_(optimizer)
    return nn.utils.clip_grad_norm_(module.parameters(), clip if clip else math.inf).item()


def update(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, lr: float) -> bool:
    """Step with the gradient that `gradient_norm` has unscaled and clipped. Returns whether the step was taken.

    A step that fp16 overflow makes the scaler skip is not taken, and must not advance the schedule.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    before = scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return scaler.get_scale() >= before
