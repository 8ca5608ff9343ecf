"""`dump_logits.py --verify N`: what is in a logits folder, held against its checksums, and N of its
targets against the teacher, who scores them again."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lib import data, files, models
from lib.teacher import record, writer
from lib.teacher.logits import Chunk

# nats by which a logit or a tail may differ, by the coarser of both dtypes: other neighbours in the
# batch, another kernel or device round otherwise
ALLOWED = {"torch.float32": 0.01, "torch.float16": 1.0, "torch.bfloat16": 1.0}


def check_chunks(out: Path, wanted: list, dataset: data.Dataset) -> dict[int | str, Chunk]:
    """Return the finished ones of the chunks `wanted`, each checked byte by byte, and say so."""
    there = {}
    for chunk in wanted:
        folder = record.chunk_folder(out, chunk)
        if not (folder / "meta.json").exists():
            print(f"verify {folder}: not finished")
            continue
        there[chunk] = part = Chunk(folder, chunk, dataset, verify=True)
        said = "every byte is as it was written" if part.checked else "its records are whole"
        print(f"verify {folder}: {len(part.records):,} targets, {said}", flush=True)
        if not part.checked:
            files.say_none(folder)
        if (known := part.meta.get("checksums", {}).get(shared := "../basis.safetensors")) and (
            seen := files.damage(folder / shared, known, True)
        ):
            files.fail(f"{out / 'basis.safetensors'} is damaged", seen, mend="the file of the dump")
    if not there:
        files.fail(f"{out} holds no finished chunk of {dataset.folder}", mend="make logits")
    return there


def draw_targets(parts: dict[int | str, Chunk], count: int) -> dict[int | str, np.ndarray]:
    """Return `count` random targets (all, where there are fewer) as numbers in each chunk."""
    there = [part.numbers for part in parts.values()]
    sizes = [len(numbers) for numbers in there]
    ends = np.cumsum(sizes)
    some = np.arange(ends[-1])
    if count < len(some):
        some = np.random.default_rng().choice(some, count, replace=False)
    owner = np.searchsorted(ends, some, side="right")
    begins = ends - sizes
    return {chunk: there[i][np.sort(some[owner == i] - begins[i])] for i, chunk in enumerate(parts)}


def apart(z: Tensor, records: np.ndarray, meta: dict) -> tuple[Tensor, Tensor]:
    """Return how far logits z (n, V) are from what records (n,) say of them: the largest difference
    (n,) of a logit below the likeliest one's (beyond what its format rounds) or of a tail, in nats;
    and whether (n,) the likeliest token is the same."""
    known = record.unpack(records, meta["vocab"], 0)
    ids, below = known.ids.to(z.device), z.amax(1, keepdim=True) - z
    names = records.dtype.names or ()
    rounded = records["scale"].astype(np.float32) / 2 if "scale" in names else np.zeros(len(z))
    half = torch.from_numpy(rounded).to(z)[:, None] + known.gap.to(z) * 2.0**-11
    far = ((below.gather(1, ids) - known.gap.to(z)).abs() - half).clamp_min(0).amax(1)
    rest = (-below).scatter(1, ids, -torch.inf)
    for column, t in enumerate(meta["temperatures"]):
        # e^-80 and less is nothing: float32 rounds it away
        pair = [(rest / t).logsumexp(1), record.tails_of(records)[:, column].to(z)]
        seen, stored = (tail.clamp_min(-80.0) for tail in pair)
        far = torch.maximum(far, (seen - stored).abs())
    return far, z.argmax(1) == ids[:, 0]


@torch.inference_mode()
def scored_again(
    part: Chunk, numbers: np.ndarray, split: data.Split, rows: np.ndarray, teacher: models.Model
) -> tuple[float, float]:
    """Return the largest difference, and the share of targets with the same likeliest token, over
    targets of a chunk; rows: those of the chunk, in the split."""
    left_out = tuple(part.meta.get("apart", ()))
    teacher = replace(teacher, limit=part.meta["vocab"], apart=left_out)
    head, first = teacher.head(), split.rows["first_target"][rows]
    absolute = numbers + int(first[0])
    owners = np.unique(rows[np.searchsorted(first, absolute, side="right") - 1])
    far, same = [], []
    tokens = part.meta["tokens_per_microbatch"]
    for some in writer.batches_of(owners, split.rows["length"], tokens):
        batch = split.batch([[row] for row in some.tolist()]).to(teacher.device)
        chosen = torch.from_numpy(np.flatnonzero(np.isin(batch.numbers.numpy(), absolute)))
        hidden = teacher.hidden(batch)[chosen.to(teacher.device)]
        records = part.records[batch.numbers[chosen].numpy() - int(first[0])]
        for piece, z in head.chunks(hidden):
            one, other = apart(z, records[piece], part.meta)
            far.append(one.cpu())
            same.append(other.cpu())
    return torch.cat(far).max().item(), torch.cat(same).float().mean().item()


def against_teacher(
    parts: dict[int | str, Chunk],
    count: int,
    dataset: data.Dataset,
    splits: dict[str, data.Split],
    teacher: models.Model,
    identity: str,
) -> None:
    """Score `count` random targets again; end with exit code 1 where records are not this
    teacher's."""
    dtype, wrong = str(next(teacher.module.parameters()).dtype), []
    for chunk, numbers in draw_targets(parts, count).items():
        part = parts[chunk]
        if part.meta["teacher"] != identity:
            seen, wanted = identity[:12], part.meta["teacher"][:12]
            files.fail(f"{part.folder} is of another teacher", seen, wanted, "its own --teacher")
        if not len(numbers):
            continue
        split = splits["val" if chunk == "val" else "train"]
        rows = writer.rows_of(dataset, chunk)
        far, same = scored_again(part, numbers, split, rows, teacher)
        most = max(ALLOWED.get(one, 1.0) for one in (dtype, str(part.meta.get("dtype"))))
        print(
            f"verify {part.folder}: {len(numbers)} targets scored again: largest difference"
            f" {far:.2g} nats ({most:g} allowed), same likeliest token {same:.1%}",
            flush=True,
        )
        if not far <= most:
            wrong.append(f"{part.folder} {far:.3g} nats off")
    if wrong:
        files.fail(
            "records are not what the teacher says", "; ".join(wrong), mend="--fresh to dump them"
        )
