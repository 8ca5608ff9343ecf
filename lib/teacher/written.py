"""Who wrote the rows, said before the first step: is the student's own text (prepare_data.py
--answers student) still what it would write, and are a teacher's answers (--answers teacher) those
of the teacher that teaches?"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from lib import data, evaluate, files, models

READ_AGAIN = 64  # own rows that are read again
# nats a token by which own text is another's. Half precision rounds each token's log-probability by
# a few hundredths, up or down: of the mean over thousands of tokens less than 0.002 are left
STALE = 0.05


def own_text(args, dataset: data.Dataset, student: models.Model, source: str) -> tuple[str, str]:
    """Return a line about the student's own text: who wrote it, and how far the student is from
    that now; and a warning behind it, "" where there is none. source: the identity of the
    checkpoint that the student comes from.

    Of the effective sample size no warning is made: for a row's weight is a product over its
    tokens, and over a thousand of them rounding alone brings it down.
    """
    about, split = dataset.meta.get("student", {}), dataset.train
    assert split.logp is not None
    own = np.flatnonzero(np.isfinite(split.logp) & (split.rows["targets"] > 0))
    chosen = own[np.linspace(0, max(0, len(own) - 1), min(READ_AGAIN, len(own))).astype(int)]
    who = f"another model than the student ({about.get('student', 'unknown')})"
    if about.get("weights") == source:
        who = "this student"
    if not len(chosen):
        return f"own text: none in train; that of val was written by {who}", ""
    now = logp_of(student, split, chosen, args)
    kl, size = drift(split.logp[chosen], now, split.rows["targets"][chosen])
    line = (
        f"own text: written by {who}; KL {round(kl, 3) + 0:.3f} nats a token from then to now,"
        f" effective sample size {size:.1f} of {len(chosen)}"
    )
    if abs(kl) <= STALE:
        return line, ""
    again = files.command("prepare_data.py", "--answers", "student", "--student", args.student)
    return line, f"; WARNING: stale: the student has changed since then; anew: {again}"


def other_teacher(dataset: data.Dataset, teachers: list[tuple[str, str]]) -> str:
    """Return a line where the answers are not those of a teacher of these names and identities, ""
    where they are, or nobody knows who wrote them. Of a server's model the name alone is known: its
    identity is "".

    Source: teacher consistency, arXiv:2604.13010: where stage 1's answers are one teacher's and the
    distribution another's, what the student ends in is biased, however long it trains.
    """
    about = dataset.meta.get("teacher", {})
    by, weights = about.get("teacher"), about.get("weights")
    if not by or weights and weights in [identity for _, identity in teachers]:
        return ""
    one_for_both = "one for both is better (docs/methods.md, teacher consistency)"
    name = ", ".join(called for called, _ in teachers)
    if weights and all(identity for _, identity in teachers):
        return (
            f"answers: WARNING: {by} wrote them, and the teacher is another model, {name}:"
            f" {one_for_both}"
        )
    known = [
        Path(called).name.casefold() for called, identity in teachers if not (weights and identity)
    ]
    if Path(by).name.casefold() in known:
        return ""
    on = f" on {about['host']}" if about.get("host") else ""
    return (
        f"answers: {by}{on} wrote them, and the teacher is {name}: if these are"
        f" two models, {one_for_both}"
    )


def drift(then: np.ndarray, now: np.ndarray, tokens: np.ndarray) -> tuple[float, float]:
    """Return how far a model has gone from the one that wrote n rows: KL(then || now) in nats a
    token, estimated on these rows (below 0 where it has learnt just them), and the effective sample
    size of their weights exp(now - then), from 1 to n. then, now (n,): log p of each row; tokens
    (n,) in each.

    Worked example: log p -2 and -4 then, -3 and -4 now, 2 tokens each: KL 0.25, weights 0.37 and 1,
    size 1.65.
    """
    moved = np.asarray(now, np.float64) - np.asarray(then, np.float64)
    weight = np.exp(moved - moved.max())
    return float(-moved.sum() / tokens.sum()), float(weight.sum() ** 2 / (weight**2).sum())


@torch.no_grad()
@files.telling("reading own text again")
def logp_of(student: models.Model, split: data.Split, rows: np.ndarray, args) -> np.ndarray:
    """Return log p (n,) of the targets of some rows under a model, nats at T=1: over its whole
    output layer, and in float32, as far as its attention can."""
    part = data.Split.of([(*split.row(row), 0) for row in rows.tolist()])
    module, training = student.module, student.module.training
    flash = module.config._attn_implementation == "flash_attention_2"  # never in float32
    amp = models.pick_amp(args.amp, student.device) if flash else None
    head = replace(student, limit=None).head().whole(student.device)
    found = np.zeros(part.targets)
    module.eval()
    for batch in evaluate.val_batches(part, args.tokens_per_microbatch):
        batch = batch.to(student.device)
        with torch.autocast(student.device.type, amp, enabled=amp is not None):
            hidden = student.hidden(batch)
        for some, z in head.chunks(hidden):
            logp = z.log_softmax(1).gather(1, batch.labels[some, None])[:, 0]
            found[batch.numbers[some].numpy()] = logp.double().cpu().numpy()
    module.train(training)
    return np.add.reduceat(found, part.rows["first_target"].astype(np.int64))
