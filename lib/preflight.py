"""Before the first step: will it fit in memory and on disk, and can the teacher teach? One screen, then the loop."""
import os
import sys
from pathlib import Path

import numpy as np
import torch

from lib import data, files, head, models

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


def teacher_can_teach(teacher: dict, student: dict, chance: float, say=print) -> None:
    """Say the val cross-entropies of teacher, untouched student and chance; in red where the teacher has nothing to give, for it is no better."""
    own = teacher["ce"]
    warning = "" if own < student["ce"] else red("; WARNING: the teacher is no better than the student")
    say(f"val cross-entropy: teacher {own:.4f}, student {student['ce']:.4f}{warning}")
    if not own < chance:
        say(red(f"WARNING: the teacher is no better than chance: its val cross-entropy is {own:.4f}, that of the train targets' frequencies alone "
                f"{chance:.4f}"))


def classifier_can_teach(teacher: dict, student: dict, dataset: data.Dataset, say=print) -> None:
    """Say the val accuracies of a teacher that classifies, of the untouched student, and of who always says train's commonest class."""
    commonest = int(target_counts(dataset.train, len(dataset.labels)).argmax())
    chance = float((dataset.val.labels == commonest).mean())
    say(f"val accuracy: teacher {teacher['acc1']:.4f}, student {student['acc1']:.4f}, always {dataset.labels[commonest]!r} {chance:.4f}")
    if not teacher["acc1"] > chance:
        say(red(f"WARNING: the teacher is no better than always saying {dataset.labels[commonest]!r}: is its head trained, and for these labels?"))


def unigram_ce(train: data.Split, val: data.Split, vocab: int) -> float:
    """Return the cross-entropy on val, nats a target, of who knows only how often each token is a target of train, counted from one:
    log p(token) = log((count + 1) / (targets + V)). What is worse has learnt nothing, or speaks of other tokens."""
    train_counts, val_counts = (target_counts(split, vocab) for split in (train, val))
    surprise = np.log(train_counts.sum() + vocab) - np.log(train_counts + 1)
    return float((val_counts * surprise).sum() / val_counts.sum())


def target_counts(split: data.Split, vocab: int, piece: int = 1 << 24) -> np.ndarray:
    """Return how often each token is a target, (V,); a piece of the memory maps at a time."""
    if split.labels is not None:
        return np.bincount(split.labels, minlength=vocab)
    parts = (slice(start, start + piece) for start in range(0, len(split.tokens), piece))
    return sum((np.bincount(split.tokens[part][split.answer[part]], minlength=vocab) for part in parts), np.zeros(vocab))


def red(text: str) -> str:
    """Return a text that a terminal shows in red; anywhere else it stays as it is."""
    return f"\033[31m{text}\033[0m" if sys.stdout.isatty() else text
