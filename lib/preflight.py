"""Before the first step: will it fit in memory and on disk, and can the teacher teach? One screen, then the loop."""
import os
from pathlib import Path

import torch

from lib import files, head, models

ACTIVATION_WIDTHS = 34  # floats kept a token and layer, in hidden widths (Korthikanti et al., arXiv:2205.05198, section 4; no attention maps)


def available_bytes(device: torch.device) -> int:
    """Return the memory that is free now on the device (CPU: of the machine)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def training_bytes(model: models.Model, tokens: int, amp: torch.dtype | None, checkpointing: bool) -> int:
    """Return about how many more bytes training takes once float32 weights are loaded: gradients, AdamW, activations, the head's buffers."""
    config, half = model.module.config.get_text_config(), 2 if amp else 4
    widths = 1 if checkpointing else ACTIVATION_WIDTHS
    layers = config.num_hidden_layers + (ACTIVATION_WIDTHS if checkpointing else 0)  # the layer being recomputed is whole
    activations = tokens * config.hidden_size * widths * half * layers
    if (output := model.module.get_output_embeddings()) is None:  # a classifier
        return 12 * model.trained + activations
    layer = output.weight
    return 12 * model.trained + activations + 3 * head.CHUNK_BYTES + layer.numel() * (4 * layer.requires_grad + half * bool(amp))


def checkpointing_needed(model: models.Model, args, amp: torch.dtype | None, more: int = 0) -> bool:
    """Return whether to checkpoint gradients: on request, or when memory is short without. Says what is needed and there; `more` bytes on top."""
    have = available_bytes(model.device)
    plain, saved = (more + training_bytes(model, args.tokens_per_microbatch, amp, c) for c in (False, True))
    use = args.checkpointing or plain > have
    if plain > have and not args.checkpointing:
        print("memory: short, so gradient checkpointing is on (or lower --tokens-per-microbatch)")
    need = saved if use else plain
    print(f"memory: about {files.human(need)} more needed, {files.human(have)} free on {model.device}")
    if need > have:
        print("memory: WARNING, this may not fit: lower --tokens-per-microbatch, or use --amp")
    return use


def disk(out, model: models.Model, saved_bytes: int = 4, whole: bool = True) -> None:
    """Refuse to start when the checkpoints would not fit: last/ twice (old and new) at 12 bytes a trained weight, best/ and final/ at 4 a
    weight; of these the trained ones alone, unless the `whole` model is saved."""
    there = [path for name in ("last", "best", "final") for path in (Path(out) / name).rglob("*") if path.is_file()]
    saved = model.parameters if whole else model.trained
    need, have = 2 * 12 * model.trained + 3 * saved_bytes * saved, files.free_bytes(out) + sum(path.stat().st_size for path in there)
    print(f"disk: {files.human(need)} needed for checkpoints, {files.human(have)} free at {out}")
    if need > have:
        files.fail(f"the disk of {out} is too small", files.human(have) + " free", files.human(need), "another --out, or delete old runs")


def teacher_can_teach(store, measures: dict) -> None:
    """Compare teacher and untouched student on val; a teacher that is no better has nothing to give."""
    if "ce" not in measures or (teacher := store.val_ce()) is None:
        return
    student = measures["ce"]
    warning = "" if teacher < student else "; WARNING: the teacher is no better than the student"
    print(f"val cross-entropy: teacher {teacher:.4f}, student {student:.4f}{warning}")
