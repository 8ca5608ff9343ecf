"""Measures on the val targets: cross-entropy, accuracy, calibration, and where the teacher is known the distance to it.

Sums and counts over all targets, never a mean of means: batch size, padding and row order change nothing.
"""
import math
from collections.abc import Sequence

import numpy as np
import torch

from lib import data, files, losses, plan
from lib.models import Model

BINS = 15  # of confidence, for the calibration error
MANY = 16  # sources above which none is measured by itself: log lines are to be read, and older data counts each file as a source

GLOSSARY = {
    "ce": "cross-entropy of the reference token, nats a target",
    "ppl": "perplexity, exp(ce)",
    "acc1": "share of targets where the likeliest token is the reference token",
    "acc5": "share of targets whose reference token is among the five likeliest",
    "ece": "expected calibration error, 15 bins (Guo et al., arXiv:1706.04599, eq. 3)",
    "kl": "KL(teacher || student) at T=1 over the teacher's top k and one bucket for the others (live with --k 0: over all tokens), nats a target",
    "agree": "share of targets where student and teacher have the same likeliest token",
    "ce_NAME": "ce over the targets of one source, where val holds several; kl_NAME likewise",
}


@torch.no_grad()
def evaluate(model: Model, split: data.Split, vocab: int, tokens_per_microbatch: int, amp: torch.dtype | None = None,
             store=None, sources: Sequence[str] = ()) -> dict:
    """Return the measures of GLOSSARY over all targets of a split; `kl` and `agree` where `store`, a logits.Store or a live.Teacher, knows the
    teacher there at T=1; ce_NAME and kl_NAME where its rows come from several of the `sources`."""
    if not split.targets:
        return {"targets": 0}
    training = model.module.training
    model.module.eval()
    head, device = model.head(vocab), model.device
    sums = torch.zeros(5, dtype=torch.float64)  # ce, acc1, acc5, kl, agree
    bins = torch.zeros(3, BINS, dtype=torch.float64)  # count, confidence, accuracy
    source_of = torch.from_numpy(np.repeat(split.rows["source"], split.rows["targets"]).astype(np.int64))  # (targets of the split,)
    by_source = torch.zeros(3, max(int(source_of.max()) + 1, len(sources)), dtype=torch.float64)  # count, ce, kl
    lengths = split.rows["length"]
    compared = store is not None and store.compares
    longest = int(lengths.max())
    for lines in plan.microbatches(np.arange(len(split.rows)), lengths, max(tokens_per_microbatch, longest), longest, pack=False):
        batch = split.batch(lines).to(device)
        with torch.autocast(device.type, amp, enabled=amp is not None):
            hidden = model.hidden(batch)
        kept = store.val_at(batch, 1) if compared else None
        for part, z in head.chunks(hidden.to(amp) if amp else hidden):
            label = batch.labels[part, None]
            z -= z.amax(1, keepdim=True)
            at_label = z.gather(1, label)
            rank = (z > at_label).sum(1)
            top = z.argmax(1)
            right = top == label[:, 0]
            if kept is not None:
                kl, teachers, total = losses.distance(z, kept[part])
                sums[3] += kl.sum().cpu().double()
                sums[4] += (top == teachers).sum().cpu()
            else:
                total = z.exp_().sum(1)
            confidence, ce = 1 / total, total.log() - at_label[:, 0]
            sums[0] += ce.sum().cpu().double()
            sums[1] += right.sum().cpu()
            sums[2] += (rank < 5).sum().cpu()
            if not torch.isfinite(sums).all():
                files.fail("the model's logits on val are not finite", f"rows {batch.rows[:8]}", "numbers", "--amp off, or a checkpoint from before")
            bin_of = (confidence * BINS).long().clamp_max(BINS - 1).cpu()
            for i, values in enumerate((torch.ones_like(confidence), confidence, right)):
                bins[i].index_add_(0, bin_of, values.cpu().double())
            for i, values in enumerate((torch.ones_like(ce), ce, kl) if compared else (torch.ones_like(ce), ce)):
                by_source[i].index_add_(0, source_of[batch.numbers[part]], values.cpu().double())
    model.module.train(training)
    n = split.targets
    ce, acc1, acc5, kl, agree = (sums / n).tolist()
    result = {"ce": ce, "ppl": math.exp(min(ce, 700.0)), "acc1": acc1, "acc5": acc5, "ece": ((bins[1] - bins[2]).abs().sum() / n).item()}
    if compared:
        result |= {"kl": kl, "agree": agree}
    for i, measure in enumerate(("ce", "kl") if compared else ("ce",), 1):
        result |= {f"{measure}_{name}": (by_source[i, number] / by_source[0, number]).item() for number, name in apart(split, sources)}
    return result | {"targets": n}


def apart(split: data.Split, sources: Sequence[str]) -> list[tuple[int, str]]:
    """Return the number and name of the sources that are measured by themselves."""
    there = [(number, sources[number]) for number in np.unique(split.rows["source"]).tolist() if number < len(sources)]
    return there if 1 < len(there) <= MANY else []


def check_best(best: str, dataset: data.Dataset, patience: int = 0) -> None:
    """Refuse a --best by a source that is not measured by itself, and a --patience with nothing to look at."""
    if patience and not dataset.val.targets:
        files.fail("--patience has nothing to look at", f"no val rows in {dataset.folder}", "val rows", "prepare_data.py with a larger --val")
    measure, _, source = best.partition("_")
    names = [name for _, name in apart(dataset.val, dataset.sources)]
    if source and source not in names:
        files.fail(f"--best {best} names no source of the val rows of {dataset.folder}", source,
                   ", ".join(f"{measure}_{name}" for name in names) or f"{measure}: val does not hold 2 to {MANY} named sources")
