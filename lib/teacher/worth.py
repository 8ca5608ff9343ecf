"""Can this teacher teach? What it knows of the val targets beside the untouched student and beside
chance; said before the first step."""

import re
import sys

import numpy as np

from lib import data
from lib.run import Run
from lib.teacher import Teacher


def best_by(measure: str, teacher: Teacher) -> str:
    """Return the measure that best/ follows: the one asked for, or, where the teacher is not known
    on val, the cross-entropy in its place."""
    if teacher.compares:
        return measure
    found = re.sub("^(kl|agree)", "ce", measure)
    if found != measure:
        print(f"best/ follows {found}, for there is no val dump with T=1 to measure {measure}")
    return found


def report(
    run: Run, step: int, teacher: Teacher, dataset: data.Dataset, measures: dict, vocab: int
) -> None:
    """At step 0, log the teacher's own measures on val, as far as they are known, and say whether
    it has something to give. measures: the untouched student's."""
    if step or not dataset.val.targets or not (own := teacher.val_measures()):
        return
    run.log("teacher", 0, **own)
    teacher_can_teach(own, measures, unigram_ce(dataset.train, dataset.val, vocab), run.say)
    if dataset.labels:
        classifier_can_teach(own, measures, dataset, run.say)


def teacher_can_teach(teacher: dict, student: dict, chance: float, say=print) -> None:
    """Say the val cross-entropies of teacher, untouched student and chance; in red where the
    teacher has nothing to give, for it is no better."""
    own = teacher["ce"]
    warning = (
        "" if own < student["ce"] else red("; WARNING: the teacher is no better than the student")
    )
    say(f"val cross-entropy: teacher {own:.4f}, student {student['ce']:.4f}{warning}")
    if not own < chance:
        say(
            red(
                "WARNING: the teacher is no better than chance: its val cross-entropy is"
                f" {own:.4f}, that of the train targets' frequencies alone {chance:.4f}"
            )
        )


def classifier_can_teach(teacher: dict, student: dict, dataset: data.Dataset, say=print) -> None:
    """Say the val accuracies of a teacher that classifies, of the untouched student, and of who
    always says train's commonest class."""
    commonest = int(target_counts(dataset.train, len(dataset.labels)).argmax())
    chance = float(np.mean(dataset.val.labels == commonest))
    say(
        f"val accuracy: teacher {teacher['acc1']:.4f}, student {student['acc1']:.4f}, always"
        f" {dataset.labels[commonest]!r} {chance:.4f}"
    )
    if not teacher["acc1"] > chance:
        say(
            red(
                "WARNING: the teacher is no better than always saying"
                f" {dataset.labels[commonest]!r}: is its head trained, and for these labels?"
            )
        )


def unigram_ce(train: data.Split, val: data.Split, vocab: int) -> float:
    """Return the cross-entropy on val, nats a target, of who knows only how often each token is a
    target of train, counted from one: log p(token) = log((count + 1) / (targets + V)). What is
    worse has learnt nothing, or speaks of other tokens.
    """
    train_counts, val_counts = (target_counts(split, vocab) for split in (train, val))
    surprise = np.log(train_counts.sum() + vocab) - np.log(train_counts + 1)
    return float((val_counts * surprise).sum() / val_counts.sum())


def target_counts(split: data.Split, vocab: int, piece: int = 1 << 24) -> np.ndarray:
    """Return how often each token is a target, (V,); a piece of the memory maps at a time."""
    if split.labels is not None:
        return np.bincount(split.labels, minlength=vocab)
    parts = (slice(start, start + piece) for start in range(0, len(split.tokens), piece))
    return sum(
        (np.bincount(split.tokens[part][split.answer[part]], minlength=vocab) for part in parts),
        np.zeros(vocab),
    )


def red(text: str) -> str:
    """Return a text that a terminal shows in red; anywhere else it stays as it is."""
    return f"\033[31m{text}\033[0m" if sys.stdout.isatty() else text
