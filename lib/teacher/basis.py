"""The shape of the teacher's tail: R coefficients a target over one basis of the vocabulary, fitted
once per logits folder.

    logits/NAME/basis.safetensors   mean (V,), rows (R, V) float16, step (R,), bits (R,) uint8,
                                    center (D,), encoder (D, R); the rest float32. Metadata: FORMAT
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
Signal Compression, 1992, chapter 8). Fitted by the folder's first dump (fit.py); every chunk's
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
from lib.head import ABSENT, CHUNK_BYTES, matmul

FORMAT = 1
FILE = "basis.safetensors"
LIGHTEST = -100.0  # log of a tail mass below float32's least number


@dataclass(frozen=True)
class Basis:
    """mean (V,), rows (R, V): the tail's logits before the soft cap. bits (R,), step (R,): how a
    coefficient is stored (`pack`).

    center (D,), encoder (D, R): from the teacher's hidden states to coefficients; a student needs
    neither. softcap and apart as in `Head`; the file does not hold apart, which the student has a
    part in.
    """

    mean: Tensor
    rows: Tensor
    bits: Tensor
    step: Tensor
    center: Tensor
    encoder: Tensor
    softcap: float = 0.0
    apart: Tensor | None = None

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
        z = z.div_(self.softcap).tanh_().mul_(self.softcap) if self.softcap else z
        return z if self.apart is None else z.index_fill_(1, self.apart, ABSENT)

    def pack(self, coef: Tensor) -> np.ndarray:
        """Return coefficients (n, R) as bytes (n, B): the number of the step each lies in, bit
        after bit, the lowest first."""
        half = 2.0 ** (self.bits.float() - 1)
        number = (coef / self.step).floor().clamp(-half, half - 1).add(half)
        owner, place = self.layout
        bits = (number.to(torch.uint8).cpu().numpy()[:, owner] >> place) & 1
        return np.packbits(bits, axis=1, bitorder="little")

    def unpack(self, packed: np.ndarray) -> Tensor:
        """Return what bytes (n, B) stand for: coefficients (n, R), each the middle of its step. A
        linear map of the bits."""
        bits = np.unpackbits(packed, axis=1, count=len(self.layout[0]), bitorder="little")
        values, least = self.values
        there = torch.from_numpy(bits).to(self.step.device, non_blocking=True)
        return torch.addmm(least, there.float(), values)

    @cached_property
    def layout(self) -> tuple[np.ndarray, np.ndarray]:
        """Which coefficient each stored bit belongs to, and its place in it."""
        bits = self.bits.cpu().numpy()
        places = [np.arange(count, dtype=np.uint8) for count in bits]
        return np.repeat(np.arange(len(bits)), bits), np.concatenate(places)

    @cached_property
    def values(self) -> tuple[Tensor, Tensor]:
        """What each stored bit (8 B, R) adds to the coefficients, and what they are when no bit is
        set (R,)."""
        owner, place = (torch.from_numpy(part.astype(np.int64)) for part in self.layout)
        step, device = self.step.cpu(), self.step.device
        values = torch.zeros(len(owner), len(step))
        values[torch.arange(len(owner)), owner] = step[owner] * 2.0**place
        least = step * (0.5 - 2.0 ** (self.bits.cpu().float() - 1))
        return values.to(device), least.to(device)

    def to(self, device: torch.device) -> "Basis":
        """Return it on a device: rows in float16 on CUDA, where products of halves are summed in
        float32, else in float32."""
        moved = replace(self, **{name: getattr(self, name).to(device) for name in TENSORS})
        if self.apart is not None:
            moved = replace(moved, apart=self.apart.to(device))
        if device.type == "cuda" or self.rows.dtype != torch.float16:
            return moved
        return replace(moved, rows=moved.rows.float())


TENSORS = [field.name for field in fields(Basis) if field.name not in ("softcap", "apart")]


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

    system = torch.stack([power(t) for t in dumped]).t()
    weights = torch.linalg.solve(system, power(temperature))  # (len(dumped),)
    out = torch.empty_like(tails[:, 0], dtype=shape.mean.dtype)
    size = max(1, CHUNK_BYTES // (4 * shape.rows.shape[1]))
    for start in range(0, len(out), size):
        part = slice(start, start + size)
        z = shape.logits(coef[part]).scatter_(1, ids[part], -torch.inf)  # (n, V)
        z -= (top := z.amax(1, keepdim=True))

        def mass(t, z=z, top=top):
            return (z / t).exp_().sum(1).log_() + top[:, 0] / t

        errors = [tails[part, i] - mass(t) for i, t in enumerate(dumped)]
        error = torch.stack(errors, 1).cpu().double()
        # where a tail is too light for float32, -z_max/T is nearly all of e
        above = torch.full_like(error[:, 0], LIGHTEST)
        for i in reversed(range(len(dumped))):
            error[:, i] = torch.where(error[:, i].isinf(), above, error[:, i])
            above = error[:, i] * (dumped[i] / dumped[i - 1])
        out[part] = mass(temperature) + (error @ weights).to(out)
    return out


def tail_mass(gaps: Tensor, tails: Tensor, temperatures: list[float]) -> Tensor:
    """Return the mass (n, len(temperatures)), a share of 1, outside a top k with gaps (n, k), of
    which tails (n, len(temperatures)) is the log, unnormalised."""
    inside = torch.stack([(-gaps / t).logsumexp(1) for t in temperatures], 1)
    return (tails - torch.logaddexp(inside, tails)).exp()


def file_bytes(rank: int, vocab: int, width: int) -> int:
    """Return the size of the file of a basis: rows in float16, the rest in float32; 0 where there
    is none."""
    return rank * (2 * vocab + 4 * width + 5) + 4 * (vocab + width) if rank else 0


def save(basis: Basis, path: Path, about: dict) -> None:
    """Write a basis whole or not at all. `about` says what it was fitted to; `load` wants the
    same."""
    tensors = {name: getattr(basis, name).contiguous().cpu() for name in TENSORS}
    tensors["rows"] = tensors["rows"].half()
    assert all(torch.isfinite(part).all() for part in tensors.values()), "a basis is not finite"
    about = {"format": FORMAT, "softcap": basis.softcap, **about}
    partial = path.with_name(f".{path.name}.part")
    save_file(tensors, partial, metadata={"about": json.dumps(about, sort_keys=True)})
    files.sync(partial)
    partial.replace(path)
    files.sync(path.parent)


def load(path: Path, mend: str) -> tuple[Basis, dict]:
    """Return the basis of a logits folder, on the CPU, and what it was fitted to."""
    try:
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["about"])
            tensors = {name: file.get_tensor(name) for name in TENSORS}
        shapes = [tuple(tensor.shape) for tensor in tensors.values()]
        (vocab,), (width,) = tensors["mean"].shape, tensors["center"].shape
        rank = len(tensors["bits"])
        if shapes != [(vocab,), (rank, vocab), (rank,), (rank,), (width,), (width, rank)]:
            raise ValueError(f"tensors of shapes {shapes}")
    except FileNotFoundError:
        files.fail(
            f"{path} is missing",
            "coefficients without their basis",
            "the file that the dump made, or copied",
            mend,
        )
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as broken:
        files.fail(f"{path} is not a basis", broken, mend=mend)
    files.expect(path, about, {"format": int, "softcap": float}, mend)
    if about["format"] != FORMAT:
        files.fail(f"{path} has another format", about["format"], FORMAT, mend)
    return Basis(softcap=about["softcap"], **tensors), about
