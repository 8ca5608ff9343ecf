"""Making the basis that all chunks of a logits folder share (lib/teacher/basis.py says what it is):
by the first of its dumps, fitted to a fixed sample of the train rows."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lib import data, files, models
from lib.head import Head, lower, top_of
from lib.run import clock
from lib.teacher import basis, sample
from lib.teacher.basis import Basis
from lib.teacher.record import differing

# of the tail's mass: a row's entry is at most share^-1/2 = 3.2e4 in size, and float16 ends at 6.5e4
LEAST_SHARE = 1e-9
WEIGHED = (
    1024  # of the sample, how many tell how much of the tail each token holds (whole softmaxes)
)
# temperature of that: T=1 gains 0.1 degrees at T=1 and loses as much at T=4 (docs/fidelity.md)
WEIGH_AT = 2.0
# rows of the output layer, and hidden states, that are widened at once: all may not fit
PIECE = 8192
SPENT_BY = 4096  # hidden states that tell where bits are spent, if there are so many
MOST_WEIGHT = 64.0  # of a row that a basis tells badly, where most rows have 1
ODD = 4.0  # the weight of a row that gives more targets
MOST_BITS = 8
# of each number of bits, in deviations: Max, IRE IT-6 (1960)
GAUSSIAN_STEP = (1.596, 0.9957, 0.5860, 0.3352, 0.1881, 0.1041, 0.0569, 0.0308)
FITTED_TO = ("teacher", "data", "vocab", "k", "tail_rank", "tail_bytes")  # of a dump's settings
ANEW = "--fresh with --chunk all"


def check_basis(out: Path, settings: dict, missing: list, anew: bool) -> bool:
    """Return whether the basis of a logits folder is there, for the chunks `missing`. Refused: one
    that was fitted to something else, and finished chunks of another one, or of one that is lost;
    unless all chunks are made `anew`."""
    if anew:
        return False
    path = out / basis.FILE
    metas = {meta.parent: files.read_json(meta) for meta in sorted(out.glob("*/meta.json"))}
    finished = {
        folder: meta
        for folder, meta in metas.items()
        if "basis" in meta and meta["chunk"] not in missing
    }
    if not path.exists():
        if finished:
            files.fail(
                f"{path} is missing",
                f"{min(finished)}, which was dumped with it",
                "that file",
                f"copy it there, or {ANEW}",
            )
        return False
    _, seen = basis.load(path, ANEW)
    if differ := differing(seen, {name: settings[name] for name in FITTED_TO}):
        files.fail(
            f"{path} was fitted to something else",
            differ,
            "what this dump is of",
            f"another --out, or {ANEW}",
        )
    this = files.sha256(path)
    for folder, meta in finished.items():
        if meta["basis"] != this:
            files.fail(
                f"{folder} was dumped with another basis than {path}",
                meta["basis"][:12],
                this[:12],
                f"its own {basis.FILE} there, or --chunk {meta['chunk']} --fresh",
            )
    return True


def shared_basis(
    out: Path, split: data.Split, teacher: models.Model, settings: dict, missing: list, anew: bool
) -> tuple[Basis, str]:
    """Return the basis of a logits folder as `load_basis` does: the one that is there, or a new
    one. Of several dumps, the first makes it."""
    parts = teacher.head().parts
    holding = None if parts.rank else files.lock(out, wait=True)
    if not parts.lead(check_basis, out, settings, missing, anew):
        make_basis(out / basis.FILE, split, teacher, settings)
    made = load_basis(out, teacher)
    if holding:
        holding.release()
    return made


def load_basis(out: Path, teacher: models.Model) -> tuple[Basis, str]:
    """Return the basis of a logits folder, of the teacher's part of the tokens, on its device, and
    its file's hash."""
    shape, _ = basis.load(out / basis.FILE, ANEW)
    shape = replace(teacher.head().parts.own(shape), apart=teacher.head().apart)
    return shape.to(teacher.device), files.sha256(out / basis.FILE)


def make_basis(path: Path, split: data.Split, teacher: models.Model, settings: dict) -> None:
    """Write a basis fitted to train rows as the teacher reads them (`split`)."""
    started, size, parts = clock(teacher.device), settings["tail_bytes"], teacher.head().parts
    print(f"basis {path}: is fitted, once for all chunks", flush=True)
    with files.telling("basis, the teacher over a sample of rows"):
        tokens = settings["tokens_per_microbatch"]
        taken = sample.take(split, teacher, tokens, settings.get("only"))
    k, rank = settings["k"], settings["tail_rank"]
    with files.telling("basis, fitting"):
        odd = parts.told(odd_rows(teacher.head(), taken, k, rank, split))
        if len(odd):
            taken = sample.with_more(taken, odd, split, teacher, tokens)
        hidden = taken.hidden
        shape, held = fit_basis(teacher.head(), hidden, k, rank, size, taken.counts)
    about = {name: settings[name] for name in FITTED_TO}
    parts.lead(basis.save, shape, path, about | {"targets": len(hidden), "variance": held})
    print(
        f"basis {path}: {len(shape.bits)} of {hidden.shape[1]} dimensions, in {size}"
        f" bytes a target, hold {held:.1%} of the variance of the tail's logits in its sample;"
        f" fitted to {len(hidden):,} targets in {clock(teacher.device) - started:.0f} s",
        flush=True,
    )


@torch.no_grad()
def fit_basis(
    head: Head, hidden: Tensor, k: int, rank: int, size: int, counts: list[int] | None = None
) -> tuple[Basis, float]:
    """Return the basis of at most `rank` rows for the tails outside the top k, with coefficients of
    `size` bytes a target, fitted to a teacher's hidden states (N, D); and the share of the logits'
    weighted variance that the stored coefficients hold. counts: of the states, how many each row
    gave; with it, rows that would be told badly weigh more (`row_weights`).

    With G = W' diag(w) W the tokens' weighted Gram matrix (D, D), w-centred, and C the covariance
    of the hidden states, the logits' principal components are the eigenvectors v of sqrt(G) C
    sqrt(G): encoder = sqrt(G) v, rows = v' sqrt(G)^-1 W'. Products in float32, what is (D, D) in
    float64.
    """
    middle, gram = weighted_gram(head, tail_shares(head, hidden, k))
    root, inverse = powers_of(gram)
    weight = torch.ones(len(hidden), device=hidden.device)
    if counts is not None:
        weight = row_weights(hidden, root, rank, counts)
    center, covariance = moments(hidden, weight)

    variance, components = torch.linalg.eigh(root @ covariance @ root)
    components = components.flip(1)[:, :rank]
    largest = components.gather(0, components.abs().argmax(0, keepdim=True))
    components = components * largest.sign()  # an eigenvector's sign is free: fix it
    encoder = (root @ components).float().to(hidden.device)
    some = hidden[places_of(weight, SPENT_BY)].float() - center
    bits, step, error = spend_bits((some @ encoder).cpu(), 8 * size)
    lost = error.sum() + variance.flip(0)[rank:].sum()
    held = 1 - float(lost / variance.sum().clamp_min(1e-30))

    stored = bits > 0
    decoder = (inverse @ components[:, stored]).float()
    decoder = head.parts.told(decoder.cpu()).to(hidden.device)  # (D, R)
    mean, rows = decoded(head, center, middle, decoder)
    bits, step = (part[stored].to(hidden.device) for part in (bits, step))
    encoder = encoder[:, stored.to(hidden.device)].contiguous()
    return Basis(mean, rows, bits, step, center, encoder, head.softcap), held


def row_weights(hidden: Tensor, root: Tensor, rank: int, counts: list[int]) -> Tensor:
    """Return the weight of each hidden state (N,) in the fit, the same for all of a row: 1, and up
    to MOST_WEIGHT where a basis of equal weights leaves more of the row than of most.

    A few rows of another kind of text are a few per cent of the variance, and principal components
    leave them out. Weighed by the square of what is left, squared error over the median row's. (A
    weight for each state brings out the odd states of every kind, and is worse than none.)
    """
    center, covariance = moments(hidden, torch.ones(len(hidden), device=hidden.device))
    _, components = torch.linalg.eigh(root @ covariance @ root)  # the smallest first
    beyond = components[:, : max(0, components.shape[1] - rank)]
    beyond = (root @ beyond).float().to(hidden.device)
    parts = [((part.float() - center) @ beyond).square().sum(1) for part in hidden.split(PIECE)]
    left = torch.stack([of_row.mean() for of_row in torch.cat(parts).split(counts)])  # (rows,)
    weight = (left / left.median().clamp_min(1e-30)).square().clamp(1.0, MOST_WEIGHT)
    return weight.repeat_interleave(torch.tensor(counts, device=hidden.device))


@torch.no_grad()
def odd_rows(head: Head, taken: sample.Sample, k: int, rank: int, split: data.Split) -> np.ndarray:
    """Return the rows of a sample, ascending, that a fit to it tells badly (a weight above ODD) and
    that have more targets to give; those told worst, where they would give more than sample.MOST.

    What is lacking of a rare kind of text is not weight but targets: thirty rows of 32 say less of
    512 dimensions than the same rows whole (bench/fidelity/domains.py).
    """
    _, gram = weighted_gram(head, tail_shares(head, taken.hidden, k))
    weight = row_weights(taken.hidden, powers_of(gram)[0], rank, taken.counts).cpu().numpy()
    weight, rows = weight[np.cumsum(taken.counts) - 1], np.array(taken.rows)
    there = np.minimum(split.rows["targets"][rows], sample.AN_ODD_ROW).astype(int)
    odd = (weight > ODD) & (there > taken.counts)
    worst = np.argsort(-weight[odd], kind="stable")
    few = np.cumsum(there[odd][worst]) <= sample.MOST
    return np.sort(rows[odd][worst][few])


def moments(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean (D,), in float32, and the covariance (D, D) of hidden states (N, D), each of
    which counts `weight` (N,). They stay in their dtype; PIECE of them are widened at once
    (mean(0, dtype=...) would copy them all, on the CPU)."""
    width, count = hidden.shape[1], float(weight.double().sum())
    pieces = list(zip(hidden.split(PIECE), weight.split(PIECE)))
    total = torch.zeros(width, dtype=torch.float64)
    for part, each in pieces:
        total += exact(each @ part.float())
    center = (total / count).float().to(hidden.device)
    covariance = torch.zeros(width, width, dtype=torch.float64)
    for part, each in pieces:
        away = part.float() - center
        covariance += exact(away.t() @ (away * each[:, None]))
    return center, covariance / count


def places_of(weight: Tensor, count: int) -> Tensor:
    """Return `count` places (all, where there are fewer and of one weight) at even steps of the
    weights' (N,) running sum: of weights 1 1 2, all four are 0 1 2 2."""
    ends = weight.double().cumsum(0)
    count = min(count, int(ends[-1]))
    steps = (torch.arange(count, device=weight.device) + 0.5) * (ends[-1] / count)
    return torch.searchsorted(ends, steps).clamp_max(len(weight) - 1)


def exact(made: Tensor) -> Tensor:
    """Return a sum of products where (D, D) algebra is done: on the CPU in float64, so that every
    device gives nearly the same basis."""
    return made.cpu().double()


def tail_shares(head: Head, hidden: Tensor, k: int) -> Tensor:
    """Return how much each token (V,) holds of the tails' softened mass, on average over a sample
    of hidden states (N, D); none less than LEAST_SHARE."""
    mass, parts = torch.zeros(head.tokens, dtype=torch.float64), head.parts
    count, device = min(WEIGHED, len(hidden)), hidden.device
    some = torch.linspace(0, len(hidden) - 1, count, device=device).long()
    for _, z in head.chunks(hidden[some]):
        ids, _ = top_of(z, min(k, head.vocab - 1), parts)
        held = parts.softmax(z / WEIGH_AT)
        mass += exact(lower(held, ids, 0.0, parts).sum(0))
    share = (mass / parts.total(mass.sum()).clamp_min(1e-30)).clamp_min(LEAST_SHARE)
    return (share / parts.total(share.sum())).float().to(device)


def widened(head: Head) -> Iterator[tuple[slice, Tensor]]:
    """Yield (which tokens, their rows of the output layer (n, D) in float32, scaled), PIECE tokens
    at a time."""
    for start in range(0, head.tokens, PIECE):
        part = slice(start, min(start + PIECE, head.tokens))
        yield part, head.weight.detach()[part].float() * head.scale


def weighted_gram(head: Head, share: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean (D,) of the output layer's rows, weighted by `share` (V,), and their weighted
    Gram matrix (D, D) around it."""
    width = head.weight.shape[1]
    total = torch.zeros(width, dtype=torch.float64)
    for part, rows in widened(head):
        total += exact(share[part] @ rows)
    middle = head.parts.total(total).float().to(share.device)
    gram = torch.zeros(width, width, dtype=torch.float64)
    for part, rows in widened(head):
        away = rows - middle
        gram += exact(away.t() @ (away * share[part, None]))
    return middle, head.parts.total(gram)


def powers_of(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return sqrt(G) and its inverse (D, D). Where there are fewer tokens than dimensions, some
    directions of h reach no logit: these are 0 in both."""
    values, vectors = torch.linalg.eigh(gram)
    there = values > values[-1] * 1e-10
    root, inverse = (
        vectors * torch.where(there, values.clamp_min(0) ** power, 0.0) @ vectors.t()
        for power in (0.5, -0.5)
    )
    return root, inverse


def decoded(head: Head, center: Tensor, middle: Tensor, decoder: Tensor) -> tuple[Tensor, Tensor]:
    """Return a basis' mean (V,) and rows (R, V): the output layer of the states `center` and
    `decoder` (D, R). What all tokens of a row share is left out (`middle`, their mean row): a
    softmax does not see it, a soft cap would."""
    mean = torch.empty(head.tokens, dtype=torch.float32, device=center.device)
    rows = torch.empty(decoder.shape[1], head.tokens, dtype=torch.float32, device=center.device)
    constant = 0.0 if head.softcap else middle @ decoder  # (R,)
    for part, wide in widened(head):
        rows[:, part] = (wide @ decoder - constant).t()
        mean[part] = wide @ center
    if head.bias is not None:
        mean += head.bias.detach()[: head.vocab].float() * head.scale
    return head.parts.whole(mean), head.parts.whole(rows)


def spend_bits(coef: Tensor, budget: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return bits (R,) uint8, step (R,) and the squared error (R,) of coefficients, of which a
    sample (n, R) is given, in `budget` bits.

    The best step for each number of bits is looked for among multiples of the Gaussian's; then
    every bit goes where it saves most.
    """
    deviation = coef.square().mean(0).sqrt().clamp_min(1e-12)
    error = torch.full((MOST_BITS + 1, coef.shape[1]), torch.inf)
    step = torch.ones(MOST_BITS + 1, coef.shape[1])
    error[0] = coef.square().mean(0)
    for bits in range(1, MOST_BITS + 1):
        for factor in (0.7, 0.85, 1.0, 1.15, 1.3, 1.5, 1.75, 2.0, 2.5):
            tried = deviation * (GAUSSIAN_STEP[bits - 1] * factor)
            half = 2 ** (bits - 1)
            stored = (coef / tried).floor_().clamp_(-half, half - 1).add_(0.5).mul_(tried)
            loss = (stored - coef).square_().mean(0)
            better = loss < error[bits]
            error[bits] = torch.where(better, loss, error[bits])
            step[bits] = torch.where(better, tried, step[bits])
    spent = torch.zeros(coef.shape[1], dtype=torch.long)
    saved = error[:-1] - error[1:]  # (MOST_BITS, R) by the next bit
    for _ in range(min(budget, MOST_BITS * len(spent))):
        gain = saved.gather(0, spent.clamp_max(MOST_BITS - 1)[None])[0]
        spent[gain.masked_fill(spent == MOST_BITS, -torch.inf).argmax()] += 1

    def chosen(table):
        return table.gather(0, spent[None])[0]

    return spent.to(torch.uint8), chosen(step), chosen(error)
