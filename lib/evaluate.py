"""Measures on the val targets: cross-entropy, accuracy, calibration, and where the teacher is known
the distance to it.

Sums and counts over all targets, never a mean of means: batch size, padding and row order change
nothing.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lib import checkpoints, data, files, losses, plan
from lib.models import Model

# what is summed over targets
COLUMNS = ("count", "ce", "acc1", "acc5", "own_ce", "known", "kl", "rkl", "agree")
OF_TEACHER = ("kl", "rkl", "agree")  # over the targets that it knows
# of confidence, for the expected calibration error (Guo et al., arXiv:1706.04599, eq. 3)
BINS = 15
MOST_CONFUSED = 200  # classes, beyond which no table of all pairs of them is written
MANY_SOURCES = 16  # above which none is measured by itself: log lines are to be read


class ComparedTeacher(Protocol):
    """What evaluation asks of a teacher (lib/teacher/)."""

    @property
    def compares(self) -> bool:
        """Whether it is known at the val targets at T=1."""

    def val_at(self, batch: data.Batch, temperature: float) -> losses.Distribution | None:
        """Return the teacher at the targets of a val batch."""


class Peers(Protocol):
    """The processes that train and measure together (lib/options/ranks.py), each a part of the
    batches."""

    rank: int
    world: int

    def mine(self, batches: Iterable[data.Batch]) -> Iterable[data.Batch]: ...

    def total(self, *tensors: Tensor) -> None:
        """Sum tensors over all of them, in place."""

    def of_each(self, value: Any) -> list[Any]:
        """Return what each of them has of a small value, in their order."""


def evaluate(
    model: Model,
    split: data.Split,
    vocab: int,
    tokens_per_microbatch: int,
    amp: torch.dtype | None = None,
    teacher: ComparedTeacher | None = None,
    sources: Sequence[str] = (),
    peers: Peers | None = None,
) -> dict:
    """Return what `measure` does as one log line holds it: of the sources, ce_NAME and kl_NAME
    alone."""
    how = tokens_per_microbatch, amp, teacher, sources, peers
    return flat(measure(model, split, vocab, *how))


@torch.no_grad()
@files.telling("measuring on val")
def measure(
    model: Model,
    split: data.Split,
    vocab: int,
    tokens_per_microbatch: int,
    amp: torch.dtype | None = None,
    teacher: ComparedTeacher | None = None,
    sources: Sequence[str] = (),
    peers: Peers | None = None,
) -> dict:
    """Return the measures (docs/measures.md says what each means) over all targets of a split;
    `kl`, `rkl` and `agree` where the teacher is known there at T=1; `own_ce` where the output layer
    has more rows than those that all others are over; "by_source": {NAME: the same}
    where the rows come from several of the `sources`; of rows with a class each "predicted": the
    class numbers (rows,)."""
    if not split.targets:
        return {"targets": 0}
    training = model.module.training
    model.module.eval()
    head, tally = model.head(vocab).whole(model.device), Tally(split)
    beyond = head.beyond()
    if teacher is not None and not teacher.compares:
        teacher = None
    batches = val_batches(split, tokens_per_microbatch)
    for batch in peers.mine(batches) if peers else batches:
        batch = batch.to(model.device)
        with torch.autocast(model.device.type, amp, enabled=amp is not None):
            hidden = model.hidden(batch)
        known = None if teacher is None else teacher.val_at(batch, 1)
        hidden = hidden.to(amp) if amp else hidden
        for part, z in head.chunks(hidden):
            more = None
            if beyond:
                more = torch.cat([other.logsumexp(1) for _, other in beyond.chunks(hidden[part])])
            of_teacher = None if known is None else known[part]
            values, top = at_targets(z, batch.labels[part], of_teacher, more)
            if not torch.isfinite(values).all():
                files.fail(
                    "the model's logits on val are not finite",
                    f"rows {batch.rows[:8]}",
                    "numbers",
                    "--amp off, or a checkpoint from before",
                )
            tally.add(batch.numbers[part], values, top)
    model.module.train(training)
    if peers:
        peers.total(tally.sums, tally.bins, tally.predicted)
    absent = set() if beyond else {"own_ce"}
    absent |= {*OF_TEACHER} if teacher is None else set()
    return tally.measures(vocab, sources, absent)


def val_batches(split: data.Split, tokens_per_microbatch: int) -> Iterator[data.Batch]:
    """Yield all rows of a split, one a line, in batches of about so many tokens."""
    lengths = split.rows["length"]
    longest = int(lengths.max())
    size = max(tokens_per_microbatch, longest)
    for lines in plan.microbatches(np.arange(len(lengths)), lengths, size, longest, pack=False):
        yield split.batch(lines)


def at_targets(
    z: Tensor, labels: Tensor, teacher: losses.Distribution | None, beyond: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return at n targets the COLUMNS (without the teacher's, where there is none) and last the
    confidence, (n, columns) on the CPU in float64, and the likeliest token (n,). z (n, V), the
    logits, is overwritten; beyond (n,): the log-sum-exp of those above V, where there are some."""
    label = labels[:, None]
    z -= (most := z.amax(1, keepdim=True))
    at_label = z.gather(1, label)
    rank = (z > at_label).sum(1)
    top = z.argmax(1)
    distances = []
    if teacher is None:
        total = z.exp_().sum(1)
    else:
        kl, rkl, teachers, total = losses.distance(z, teacher)
        known = torch.ones_like(kl) if teacher.silent is None else (~teacher.silent).to(kl)
        distances = [known, kl, rkl, (top == teachers) * known]
    confidence, ce = 1 / total, total.log() - at_label[:, 0]
    own = ce
    if beyond is not None:
        own = torch.logaddexp(total.log(), beyond - most[:, 0]) - at_label[:, 0]
    columns = [torch.ones_like(ce), ce, top == labels, rank < 5, own, *distances, confidence]
    values = torch.stack([column.to(ce.dtype) for column in columns], 1)
    return values.cpu().double(), top


class Tally:
    """What is summed over the targets of a split, apart for each of the S sources that have rows;
    of rows with a class each, `predicted` (rows,)."""

    def __init__(self, split: data.Split) -> None:
        self.split = split
        self.there, of_row = np.unique(split.rows["source"], return_inverse=True)
        of_target = np.repeat(of_row, split.rows["targets"]).astype(np.int64)
        self.of_target = torch.from_numpy(of_target)  # (targets of the split,)
        self.sums = torch.zeros(len(self.there), len(COLUMNS), dtype=torch.float64)
        # confidence, right
        self.bins = torch.zeros(len(self.there) * BINS, 2, dtype=torch.float64)
        self.predicted = torch.zeros(len(split.rows), dtype=torch.int64)

    def add(self, numbers: Tensor, values: Tensor, top: Tensor) -> None:
        """Add n targets, by their numbers in the split (n,): what `at_targets` returned."""
        if self.split.labels is not None:
            self.predicted[numbers] = top.cpu()
        source = self.of_target[numbers]
        self.sums[:, : values.shape[1] - 1].index_add_(0, source, values[:, :-1])
        place = source * BINS + (values[:, -1] * BINS).long().clamp_max(BINS - 1)
        self.bins.index_add_(0, place, values[:, [-1, 2]])

    def measures(self, vocab: int, sources: Sequence[str], absent: set[str]) -> dict:
        """Return what `measure` does, without those that are `absent`."""
        bins = self.bins.view(len(self.there), BINS, 2)
        whole, by_source = shares(self.sums.sum(0), bins.sum(0), absent), {}
        for number, name in sources_apart(self.split, sources):
            place = np.searchsorted(self.there, number)
            by_source[name] = shares(self.sums[place], bins[place], absent)
        if self.split.labels is not None:
            for measures in (whole, *by_source.values()):
                del measures["ppl"], measures["acc5"]
            predicted = self.predicted.numpy()
            macro_f1 = classification(self.split.labels, predicted, vocab)["macro_f1"]
            first = {"ce": whole["ce"], "acc1": whole["acc1"], "macro_f1": macro_f1}
            whole = first | whole | {"predicted": predicted}
        return whole | ({"by_source": by_source} if by_source else {})


def shares(sums: torch.Tensor, bins: torch.Tensor, absent: set[str]) -> dict:
    """Return the measures of one set of targets, without those that are `absent`. sums (columns,)
    over them, in the order of COLUMNS; bins (BINS, 2) confidence, right."""
    n = int(sums[0])
    result = dict(zip(COLUMNS[1:], (sums[1:] / n).tolist()))
    if not (known := result.pop("known")):
        absent = absent | {*OF_TEACHER}
    elif known < 1:
        result |= {name: result[name] / known for name in OF_TEACHER}
    result["ppl"] = math.exp(min(result["ce"], 700.0))
    result["ece"] = (bins[:, 0] - bins[:, 1]).abs().sum().item() / n
    order = ("ce", "ppl", "acc1", "acc5", "own_ce", "ece", "kl", "rkl", "agree")
    return {name: result[name] for name in order if name not in absent} | {"targets": n}


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
    per_class = {}
    for name, *row in zip(names, *each.tolist(), table.sum(1).tolist()):
        per_class[name] = dict(zip(("precision", "recall", "f1", "support"), row))
    return {
        "accuracy": accuracy,
        "macro_f1": macro_f1,
        "labels": names,
        "confusion": table.tolist(),
        "per_class": per_class,
    }


def flat(measures: dict) -> dict:
    """Return measures as one log line holds them: of the sources, ce_NAME and kl_NAME alone."""
    line = dict(measures)
    line.pop("predicted", None)
    by_source, targets = line.pop("by_source", {}), line.pop("targets")
    for name in ("ce", "kl"):
        for source, own in by_source.items():
            if name in own:
                line[f"{name}_{source}"] = own[name]
    return line | {"targets": targets}


def alone(
    args,
    model: Model,
    dataset: data.Dataset,
    vocab: int,
    amp: torch.dtype | None,
    teacher: ComparedTeacher | None = None,
    /,
    **about,
) -> None:
    """--eval-only: measure a checkpoint on val, write eval.json to args.out, and say it. about:
    what else eval.json is to hold."""
    if args.dry_run:
        print(
            f"eval: {model.folder}, {model.parameters:,} parameters, {model.vocab:,} tokens, on"
            f" {len(dataset.val.rows):,} val rows, {dataset.val.targets:,} targets; --dry-run:"
            f" nothing was written to {args.out}"
        )
        raise SystemExit(0)
    measures = measure(
        model, dataset.val, vocab, args.tokens_per_microbatch, amp, teacher, dataset.sources
    )
    about = {
        "student": str(model.folder),
        "weights": checkpoints.identity(model.folder),
        "parameters": model.parameters,
        "bytes": checkpoints.weight_bytes(model.folder),
        "data": dataset.identities["data"],
        **about,
    }
    line, of_classes = flat(measures), {}
    if dataset.val.labels is not None and dataset.val.targets:
        of_classes = classification(dataset.val.labels, measures["predicted"], dataset.labels)
        if len(dataset.labels) > MOST_CONFUSED:
            del of_classes["confusion"]
    by_source = {"by_source": measures.get("by_source", {})}
    sealed = by_source | {"checksums": {}}
    files.write_json(Path(args.out) / "eval.json", about | line | of_classes | sealed)
    if "own_ce" in line:
        print(f"eval: {tokens_measured(model)}; own_ce is over all its rows")
    if own := dataset.val_described():
        print(own)
    print(f"eval {model.folder}: " + "  ".join(f"{name} {line[name]:.4g}" for name in line))


def tokens_measured(model: Model) -> str:
    """Return in words which of a model's tokens are measured and trained, where these are not all;
    else ""."""
    limit = model.limit or model.vocab
    apart = sum(id < limit for id in model.apart) if model.limit else 0
    if limit >= model.vocab and not apart:
        return ""
    return f"ce and all else is over the first {limit:,} of its {model.vocab:,} tokens" + (
        f" but {apart}, which are not the same to teacher, student and data" if apart else ""
    )


def sources_apart(split: data.Split, sources: Sequence[str]) -> list[tuple[int, str]]:
    """Return the number and name of the sources that are measured by themselves."""
    numbers = np.unique(split.rows["source"]).tolist()
    there = [(number, sources[number]) for number in numbers if number < len(sources)]
    return there if 1 < len(there) <= MANY_SOURCES else []


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
    names = [name for _, name in sources_apart(dataset.val, dataset.sources)]
    if source and source not in names:
        files.fail(
            f"--best {best} names no source of the val rows of {dataset.folder}",
            source,
            ", ".join(f"{measure}_{name}" for name in names)
            or f"{measure}: val does not hold 2 to {MANY_SOURCES} named sources",
        )
