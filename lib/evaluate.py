"""Measures on the val targets: cross-entropy, accuracy, calibration, and where the teacher is known
the distance to it.

Sums and counts over all targets, never a mean of means: batch size, padding and row order change
nothing.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from lib import data, files, losses, models, plan
from lib.models import Model

COLUMNS = ("count", "ce", "acc1", "acc5", "kl", "rkl", "agree")  # what is summed over targets
# of confidence, for the expected calibration error (Guo et al., arXiv:1706.04599, eq. 3)
BINS = 15
MOST_CONFUSED = 200  # classes, beyond which no table of all pairs of them is kept
# sources above which none is measured by itself: log lines are to be read, and older data counts
# each file as a source
MANY = 16


def evaluate(
    model: Model,
    split: data.Split,
    vocab: int,
    tokens_per_microbatch: int,
    amp: torch.dtype | None = None,
    store=None,
    sources: Sequence[str] = (),
) -> dict:
    """Return what `measure` does as one log line holds it: of the sources, ce_NAME and kl_NAME
    alone."""
    return flat(measure(model, split, vocab, tokens_per_microbatch, amp, store, sources))


@torch.no_grad()
def measure(
    model: Model,
    split: data.Split,
    vocab: int,
    tokens_per_microbatch: int,
    amp: torch.dtype | None = None,
    store=None,
    sources: Sequence[str] = (),
) -> dict:
    """Return the measures (README says what each means) over all targets of a split; `kl`, `rkl`
    and `agree` where `store`, a logits.Store or a live.Teacher, knows the teacher there at T=1;
    "by_source": {NAME: the same} where the rows come from several of the `sources`; of rows with a
    class each "predicted": the class numbers (rows,)."""
    if not split.targets:
        return {"targets": 0}
    training = model.module.training
    model.module.eval()
    head, device = model.head(vocab), model.device
    there, of_row = np.unique(split.rows["source"], return_inverse=True)  # S sources have rows
    of_target = torch.from_numpy(
        np.repeat(of_row, split.rows["targets"]).astype(np.int64)
    )  # (targets of the split,)
    sums = torch.zeros(len(there), len(COLUMNS), dtype=torch.float64)
    bins = torch.zeros(len(there) * BINS, 2, dtype=torch.float64)  # confidence, right
    predicted = None if split.labels is None else np.zeros(len(split.rows), np.int64)
    lengths = split.rows["length"]
    compared = store is not None and store.compares
    longest = int(lengths.max())
    for lines in plan.microbatches(
        np.arange(len(split.rows)),
        lengths,
        max(tokens_per_microbatch, longest),
        longest,
        pack=False,
    ):
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
                kl, rkl, teachers, total = losses.distance(z, kept[part])
                distances = [kl, rkl, top == teachers]
            else:
                total, distances = z.exp_().sum(1), []
            confidence, ce = 1 / total, total.log() - at_label[:, 0]
            columns = [torch.ones_like(ce), ce, right, rank < 5, *distances, confidence]
            values = (
                torch.stack([column.to(ce.dtype) for column in columns], 1).cpu().double()
            )  # (n, columns)
            if not torch.isfinite(values).all():
                files.fail(
                    "the model's logits on val are not finite",
                    f"rows {batch.rows[:8]}",
                    "numbers",
                    "--amp off, or a checkpoint from before",
                )
            number = of_target[batch.numbers[part]]
            if predicted is not None:
                predicted[batch.numbers[part].numpy()] = top.cpu().numpy()
            sums[:, : values.shape[1] - 1].index_add_(0, number, values[:, :-1])
            bins.index_add_(
                0,
                number * BINS + (values[:, -1] * BINS).long().clamp_max(BINS - 1),
                values[:, [-1, 2]],
            )
    model.module.train(training)
    bins = bins.view(len(there), BINS, 2)
    apart_there = {name: np.searchsorted(there, number) for number, name in apart(split, sources)}
    by_source = {
        name: shares(sums[place], bins[place], compared) for name, place in apart_there.items()
    }
    whole = shares(sums.sum(0), bins.sum(0), compared)
    if predicted is not None:
        for measures in (whole, *by_source.values()):
            del measures["ppl"], measures["acc5"]
        of_classes = classification(split.labels, predicted, vocab)
        whole = {
            "ce": whole.pop("ce"),
            "acc1": whole.pop("acc1"),
            "macro_f1": of_classes["macro_f1"],
            **whole,
            "predicted": predicted,
        }
    return whole | ({"by_source": by_source} if by_source else {})


def shares(sums: torch.Tensor, bins: torch.Tensor, compared: bool) -> dict:
    """Return the measures of one set of targets. sums (columns,) over them, in the order of
    COLUMNS; bins (BINS, 2) confidence, right."""
    n = int(sums[0])
    result = dict(zip(COLUMNS[1:], (sums[1:] / n).tolist()))
    ce, distances = result["ce"], {name: result.pop(name) for name in ("kl", "rkl", "agree")}
    ece = (bins[:, 0] - bins[:, 1]).abs().sum().item() / n
    return {
        "ce": ce,
        "ppl": math.exp(min(ce, 700.0)),
        **result,
        "ece": ece,
        **(distances if compared else {}),
        "targets": n,
    }


def confusion(
    reference: np.ndarray, predicted: np.ndarray, classes: int, weights: np.ndarray | None = None
) -> np.ndarray:
    """Return how often each class (a row) was predicted to be each class (a column), (classes,
    classes)."""
    cells = np.asarray(reference, np.int64) * classes + np.asarray(predicted, np.int64)
    return np.bincount(cells, weights, classes * classes).reshape(classes, classes)


def class_scores(table: np.ndarray) -> tuple[float, float, np.ndarray]:
    """Return accuracy, macro-F1, and (3, classes) precision, recall and F1 of a confusion table.

    As scikit-learn has them: 0 where there is nothing to divide by, and the mean is over classes
    that were asked for or predicted.
    """
    right, said, true = np.diag(table), table.sum(0), table.sum(1)
    f1 = 2 * right / np.maximum(said + true, 1)
    each = np.stack([right / np.maximum(said, 1), right / np.maximum(true, 1), f1])
    return (
        float(right.sum() / max(table.sum(), 1)),
        float(f1[said + true > 0].mean()) if table.any() else 0.0,
        each,
    )


def classification(
    reference: np.ndarray, predicted: np.ndarray, labels: int | Sequence[str]
) -> dict:
    """Return accuracy, macro_f1, labels, confusion (row = reference, column = predicted) and
    per_class of two arrays of class numbers (N,).

    labels: the classes' names, or how many they are (then they are named by their numbers).
    """
    names = [str(i) for i in range(labels)] if isinstance(labels, int) else list(labels)
    table = confusion(reference, predicted, len(names))
    accuracy, macro_f1, each = class_scores(table)
    rows = zip(names, *each.tolist(), table.sum(1).tolist())
    return {
        "accuracy": accuracy,
        "macro_f1": macro_f1,
        "labels": names,
        "confusion": table.tolist(),
        "per_class": {
            name: dict(zip(("precision", "recall", "f1", "support"), row)) for name, *row in rows
        },
    }


def flat(measures: dict) -> dict:
    """Return measures as one log line holds them: of the sources, ce_NAME and kl_NAME alone."""
    by_source, whole = (
        measures.get("by_source", {}),
        {name: value for name, value in measures.items() if name not in ("by_source", "predicted")},
    )
    targets = whole.pop("targets")
    return (
        whole
        | {
            f"{name}_{source}": own[name]
            for name in ("ce", "kl")
            for source, own in by_source.items()
            if name in own
        }
        | {"targets": targets}
    )


def alone(
    args,
    model: Model,
    dataset: data.Dataset,
    vocab: int,
    amp: torch.dtype | None,
    store=None,
    **about,
) -> None:
    """--eval-only: measure a checkpoint on val, write eval.json to args.out, and say it. about:
    what else eval.json is to hold."""
    measures = measure(
        model, dataset.val, vocab, args.tokens_per_microbatch, amp, store, dataset.sources
    )
    about = {
        "student": str(model.folder),
        "weights": models.identity(model.folder),
        "parameters": model.parameters,
        "bytes": models.weight_bytes(model.folder),
        "data": dataset.identities["data"],
        **about,
    }
    Path(args.out).mkdir(parents=True, exist_ok=True)
    of_classes = (
        classification(dataset.val.labels, measures["predicted"], dataset.labels)
        if dataset.labels and dataset.val.targets
        else {}
    )
    if len(dataset.labels) > MOST_CONFUSED:
        of_classes.pop("confusion", None)
    files.write_json(
        Path(args.out) / "eval.json",
        about | flat(measures) | of_classes | {"by_source": measures.get("by_source", {})},
    )
    print(f"eval {model.folder}: " + "  ".join(f"{k} {v:.4g}" for k, v in flat(measures).items()))


def apart(split: data.Split, sources: Sequence[str]) -> list[tuple[int, str]]:
    """Return the number and name of the sources that are measured by themselves."""
    there = [
        (number, sources[number])
        for number in np.unique(split.rows["source"]).tolist()
        if number < len(sources)
    ]
    return there if 1 < len(there) <= MANY else []


def check_best(best: str, dataset: data.Dataset, patience: int = 0) -> None:
    """Refuse a --best by a source that is not measured by itself, and a --patience with nothing to
    look at."""
    if patience and not dataset.val.targets:
        files.fail(
            "--patience has nothing to look at",
            f"no val rows in {dataset.folder}",
            "val rows",
            "prepare_data.py with a larger --val",
        )
    if best == "macro_f1":
        if not dataset.labels:
            files.fail(
                f"--best macro_f1 does not go with the rows of {dataset.folder}",
                "rows of language",
                "rows with a class each",
                "--best ce",
            )
        return
    measure, _, source = best.partition("_")
    names = [name for _, name in apart(dataset.val, dataset.sources)]
    if source and source not in names:
        files.fail(
            f"--best {best} names no source of the val rows of {dataset.folder}",
            source,
            ", ".join(f"{measure}_{name}" for name in names)
            or f"{measure}: val does not hold 2 to {MANY} named sources",
        )
