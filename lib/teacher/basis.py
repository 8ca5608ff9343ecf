"""The shape of the teacher's tail: R coefficients a target over one basis of the vocabulary, fitted
once per logits folder.

    logits/NAME/basis.safetensors   mean (V,), rows (R, V) float16, step (R,), bits (R,) uint8,
                                    center (D,), encoder (D, R); the rest float32 metadata: FORMAT
                                    and what it was fitted to (teacher, data, V, k, rank, bytes,
                                    targets)

A teacher's logits are z = W h + bias: however many tokens it has, they move in D dimensions, and
mostly in few of these. With c the coefficients of a target, the logits of its tail (all tokens but
the k stored ones) are

    z_tail = mean + c @ rows,   c = (h - center) @ encoder

The rows are the R directions of largest variance (principal components) of logits whose tokens
weigh as much as they hold of the tail's softened mass, on average at T = 2: squared error there is
what KL sees of it, to second order. A coefficient is stored in 0 to 8 bits, where each bit went to
the coefficient whose error it lowers most (transform coding: Gersho & Gray, Vector Quantization and
Signal Compression, 1992, chapter 8). Fitted to a fixed sample of the training rows; every chunk's
meta.json holds the file's hash.
"""

import json
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lib import files
from lib.head import CHUNK_BYTES, Head, matmul

FORMAT = 1
NAME = "basis.safetensors"
SAMPLE = 8192  # targets that the basis is fitted to
# of the tail's mass: a row's entry is at most share^-1/2 = 3.2e4 in size, and float16 ends at 6.5e4
LEAST_SHARE = 1e-9
LIGHTEST = -100.0  # log of a tail mass below float32's least number
WEIGHED = 1024  # of these, how many tell how much of the tail each token holds (whole softmaxes)
MOST_BITS = 8
GAUSSIAN_STEP = (
    1.596,
    0.9957,
    0.5860,
    0.3352,
    0.1881,
    0.1041,
    0.0569,
    0.0308,
)  # of each number of bits, in deviations; Max, IRE IT-6 (1960)
# temperature of that: T=1 gains 0.1 degrees at T=1 and loses as much at T=4 (docs/fidelity.md)
WEIGH_AT = 2.0


@dataclass(frozen=True)
class Basis:
    """mean (V,), rows (R, V): the tail's logits before the soft cap. bits (R,), step (R,): how a
    coefficient is stored (`pack`).

    center (D,), encoder (D, R): from the teacher's hidden states to coefficients; a student needs
    neither. softcap as in `Head`.
    """

    mean: Tensor
    rows: Tensor
    bits: Tensor
    step: Tensor
    center: Tensor
    encoder: Tensor
    softcap: float = 0.0

    def encode(self, hidden: Tensor) -> Tensor:
        """Return the coefficients (n, R) of the teacher's hidden states (n, D)."""
        return (hidden.to(self.center.dtype) - self.center) @ self.encoder

    def logits(self, coef: Tensor, out: Tensor | None = None) -> Tensor:
        """Return the logits (n, V), in `out` if given, that coefficients (n, R) stand for: good for
        a tail, not for the top k."""
        z = matmul(coef.to(self.rows.dtype), self.rows, out)
        if out is not None and z is not out:  # half-precision products have no `out`
            z = out.copy_(z)
        z += self.mean
        return z.div_(self.softcap).tanh_().mul_(self.softcap) if self.softcap else z

    def pack(self, coef: Tensor) -> np.ndarray:
        """Return coefficients (n, R) as bytes (n, B): the number of the step each lies in, bit
        after bit, the lowest first."""
        half = 2.0 ** (self.bits.float() - 1)
        number = (
            (coef / self.step)
            .floor()
            .clamp(-half, half - 1)
            .add(half)
            .to(torch.uint8)
            .cpu()
            .numpy()
        )
        owner, place = self.layout
        return np.packbits((number[:, owner] >> place) & 1, axis=1, bitorder="little")

    def unpack(self, packed: np.ndarray) -> Tensor:
        """Return what bytes (n, B) stand for: coefficients (n, R), each the middle of its step. A
        linear map of the bits."""
        bits = torch.from_numpy(
            np.unpackbits(packed, axis=1, count=len(self.layout[0]), bitorder="little")
        ).to(self.step.device, non_blocking=True)
        values, least = self.values
        return torch.addmm(least, bits.float(), values)

    @cached_property
    def layout(self) -> tuple[np.ndarray, np.ndarray]:
        """Which coefficient each stored bit belongs to, and its place in it."""
        bits = self.bits.cpu().numpy()
        return np.repeat(np.arange(len(bits)), bits), np.concatenate(
            [np.arange(b, dtype=np.uint8) for b in bits]
        )

    @cached_property
    def values(self) -> tuple[Tensor, Tensor]:
        """What each stored bit (8 B, R) adds to the coefficients, and what they are when no bit is
        set (R,)."""
        owner, place = (torch.from_numpy(part.astype(np.int64)) for part in self.layout)
        step = self.step.cpu()
        values = torch.zeros(len(owner), len(step)).index_put_(
            (torch.arange(len(owner)), owner), step[owner] * 2.0**place
        )
        return values.to(self.step.device), (
            step * (0.5 - 2.0 ** (self.bits.cpu().float() - 1))
        ).to(self.step.device)

    def to(self, device: torch.device) -> "Basis":
        """Return it on a device: rows in float16 on CUDA, where products of halves are summed in
        float32, else in float32."""
        moved = replace(
            self,
            **{
                f.name: getattr(self, f.name).to(device)
                for f in fields(self)
                if f.name != "softcap"
            },
        )
        return (
            moved
            if device.type == "cuda" or self.rows.dtype != torch.float16
            else replace(moved, rows=moved.rows.float())
        )


@torch.no_grad()
def fit(head: Head, hidden: Tensor, k: int, rank: int, size: int) -> tuple[Basis, float]:
    """Return the basis of at most `rank` rows for the tails outside the top k, with coefficients of
    `size` bytes a target, fitted to a teacher's hidden states (N, D); and the share of the logits'
    weighted variance that the stored coefficients hold.

    With G = W' diag(w) W the tokens' weighted Gram matrix (D, D), w-centred, and C the covariance
    of the hidden states, the logits' principal components are the eigenvectors v of sqrt(G) C
    sqrt(G): encoder = sqrt(G) v, rows = v' sqrt(G)^-1 W'. Products in float32, what is (D, D) in
    float64.
    """
    weight, device = head.weight.detach()[: head.vocab], hidden.device

    def exact(made):
        return made.cpu().double()

    mass = torch.zeros(head.vocab, dtype=torch.float64)
    for _, z in head.chunks(
        hidden[torch.linspace(0, len(hidden) - 1, min(WEIGHED, len(hidden)), device=device).long()]
    ):
        ids = z.topk(min(k, head.vocab - 1), 1).indices
        mass += exact((z / WEIGH_AT).softmax(1).scatter_(1, ids, 0.0).sum(0))
    share = (mass / mass.sum().clamp_min(1e-30)).clamp_min(LEAST_SHARE)
    share = (share / share.sum()).float().to(device)

    bias = 0.0 if head.bias is None else head.bias.detach()[: head.vocab].float()
    pieces = [slice(start, min(start + 8192, head.vocab)) for start in range(0, head.vocab, 8192)]

    def widened(part):
        return (
            weight[part].float() * head.scale
        )  # (8192, D): the whole of it in float32 may not fit

    middle = sum(exact(share[part] @ widened(part)) for part in pieces).float().to(device)  # (D,)
    gram = sum(
        exact((rows := widened(part) - middle).t() @ (rows * share[part, None])) for part in pieces
    )
    center = hidden.float().mean(0)
    away = hidden.float() - center
    covariance = exact(away.t() @ away) / len(hidden)

    # (D, D) algebra on the CPU, so that every device gives nearly the same basis
    values, vectors = torch.linalg.eigh(gram)
    keep = (
        values > values[-1] * 1e-10
    )  # fewer tokens than dimensions: some directions of h reach no logit
    root, inverse = (
        vectors * torch.where(keep, values.clamp_min(0) ** power, 0.0) @ vectors.t()
        for power in (0.5, -0.5)
    )
    variance, components = torch.linalg.eigh(root @ covariance @ root)
    components = components.flip(1)[:, :rank]
    components = (
        components * components.gather(0, components.abs().argmax(0, keepdim=True)).sign()
    )  # an eigenvector's sign is free: fix it
    encoder = (root @ components).float().to(device)
    bits, step, error = spend_bits((away[:: max(1, len(away) // 2048)] @ encoder).cpu(), 8 * size)
    held = 1 - float(
        (error.sum() + variance.flip(0)[rank:].sum()) / variance.sum().clamp_min(1e-30)
    )
    kept = bits > 0
    bits, step, encoder, components = (
        bits[kept].to(device),
        step[kept].to(device),
        encoder[:, kept.to(device)],
        components[:, kept],
    )
    decoder = (inverse @ components).float().to(device)  # (D, R)

    rows = torch.empty(len(bits), head.vocab, dtype=torch.float32, device=device)
    mean = torch.empty(head.vocab, dtype=torch.float32, device=device)
    constant = (
        0.0 if head.softcap else middle @ decoder
    )  # (R,), the same for all tokens: a softmax does not see it, a soft cap would
    for part in pieces:
        rows[:, part] = (widened(part) @ decoder - constant).t()
        mean[part] = widened(part) @ center
    return (
        Basis(
            mean + bias * head.scale, rows, bits, step, center, encoder.contiguous(), head.softcap
        ),
        held,
    )


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
            loss = (
                ((coef / tried).floor_().clamp_(-half, half - 1).add_(0.5).mul_(tried) - coef)
                .square_()
                .mean(0)
            )
            better = loss < error[bits]
            error[bits], step[bits] = (
                torch.where(better, loss, error[bits]),
                torch.where(better, tried, step[bits]),
            )
    spent = torch.zeros(coef.shape[1], dtype=torch.long)
    saved = error[:-1] - error[1:]  # (MOST_BITS, R) by the next bit
    for _ in range(min(budget, MOST_BITS * len(spent))):
        gain = saved.gather(0, spent.clamp_max(MOST_BITS - 1)[None])[0].masked_fill(
            spent == MOST_BITS, -torch.inf
        )
        spent[gain.argmax()] += 1

    def chosen(table):
        return table.gather(0, spent[None])[0]

    return spent.to(torch.uint8), chosen(step), chosen(error)


@torch.no_grad()
def tail_between(
    shape: Basis, ids: Tensor, coef: Tensor, tails: Tensor, dumped: list[float], temperature: float
) -> Tensor:
    """Return the log tail mass (n,) at a temperature that was not dumped, from those at dumped ones
    (ascending), tails (n, len(dumped)).

    The basis says how the mass goes with T, up to what it does not hold of the logits: an error
    e(T) with e = 0 at T = infinity, where every token counts 1, and a known value at each dumped T.
    Between them e is the polynomial in 1/T through these.
    """

    def power(t):
        return torch.tensor([t ** -(i + 1) for i in range(len(dumped))], dtype=torch.float64)

    weights = torch.linalg.solve(
        torch.stack([power(t) for t in dumped]).t(), power(temperature)
    )  # (len(dumped),)
    out, size = (
        torch.empty_like(tails[:, 0], dtype=shape.mean.dtype),
        max(1, CHUNK_BYTES // (4 * shape.rows.shape[1])),
    )
    for part in (slice(start, start + size) for start in range(0, len(out), size)):
        z = shape.logits(coef[part]).scatter_(1, ids[part], -torch.inf)  # (n, V)
        z -= (top := z.amax(1, keepdim=True))

        def mass(t, z=z, top=top):
            return (z / t).exp_().sum(1).log_() + top[:, 0] / t

        error = (
            torch.stack([tails[part, i] - mass(t) for i, t in enumerate(dumped)], 1).cpu().double()
        )
        for i in reversed(
            range(len(dumped))
        ):  # a tail too light for float32: -z_max/T is nearly all of e
            above = (
                error[:, i + 1] * (dumped[i + 1] / dumped[i])
                if i + 1 < len(dumped)
                else torch.full_like(error[:, i], LIGHTEST)
            )
            error[:, i] = torch.where(error[:, i].isinf(), above, error[:, i])
        out[part] = mass(temperature) + (error @ weights).to(out)
    return out


def sample_rows(targets: np.ndarray, wanted: int = SAMPLE) -> np.ndarray:
    """Return row numbers spread evenly over a split, holding about `wanted` targets (all rows,
    where there are fewer); targets (rows,)."""
    share = min(1.0, wanted / max(1, int(targets.sum())))
    return np.unique(
        np.linspace(0, len(targets) - 1, max(1, round(len(targets) * share))).astype(int)
    )


def file_bytes(rank: int, vocab: int, width: int) -> int:
    """Return the size of the file of a basis: rows in float16, the rest in float32; 0 where there
    is none."""
    return rank * (2 * vocab + 4 * width + 5) + 4 * (vocab + width) if rank else 0


def save(basis: Basis, path: Path, about: dict) -> None:
    """Write a basis whole or not at all. `about` says what it was fitted to; `load` wants the
    same."""
    tensors = {
        f.name: getattr(basis, f.name).contiguous().cpu()
        for f in fields(Basis)
        if f.name != "softcap"
    }
    tensors["rows"] = tensors["rows"].half()
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values()), (
        "a basis that is not finite"
    )
    partial = path.with_name(f".{path.name}.part")
    save_file(
        tensors,
        partial,
        metadata={
            "about": json.dumps(
                {"format": FORMAT, "softcap": basis.softcap, **about}, sort_keys=True
            )
        },
    )
    files.sync(partial)
    partial.replace(path)
    files.sync(path.parent)


def load(path: Path, mend: str) -> tuple[Basis, dict]:
    """Return the basis of a logits folder, on the CPU, and what it was fitted to."""
    try:
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["about"])
            tensors = {
                f.name: file.get_tensor(f.name) for f in fields(Basis) if f.name != "softcap"
            }
    except FileNotFoundError:
        files.fail(
            f"{path} is missing",
            "coefficients without their basis",
            "the file that the dump made, or copied",
            mend,
        )
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as broken:
        files.fail(f"{path} is not a basis", broken, mend=mend)
    if about["format"] != FORMAT:
        files.fail(f"{path} has another format", about["format"], FORMAT, mend)
    return Basis(softcap=about["softcap"], **tensors), about
