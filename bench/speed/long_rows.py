"""Measure memory and time of rows of 1k to 32k tokens, each length in a process of its own.

    python bench/speed/long_rows.py --checkpointing     # hours on 2 CPU cores: attention of 32k
    python bench/speed/long_rows.py --checkpointing --dry             # its memory alone, minutes
    python bench/speed/long_rows.py 512 1024 --layers 2               # seconds

A model of SmolLM2-135M's shape (width 576, 30 layers, 9 heads, 3 of keys and values, 49,152 tokens,
tied) with random weights takes one optimizer step of stage 2 on one row, as the loop does: body,
head_loss with 16 kept tokens a target, backward, AdamW, whose moments are there from a step before
on a short row. --forward: what a dump takes of it, body and head's logits alone.

peak_gb is the process' resident size at most, all included; grown_gb what of it came with the steps
(or passes), said_gb what a trainer would have said of that before (train.training_bytes).
--dry leaves out products and attention, but makes and keeps what they would return: the same memory
but for the kernels' own, in minutes, and no time is told.
"""

import argparse
import json
import subprocess
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[2]))
from lib import data, losses, models, train  # noqa: E402

KEPT = 16


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tokens", type=int, nargs="*", default=[1024, 4096, 16384, 32768])
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rows", type=int, default=1, help="on the line, all of one length")
    parser.add_argument("--forward", action="store_true")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--here", action="store_true", help="in this process (for the script)")
    return parser.parse_args(argv)


def resident(key: str) -> int:
    """Return a figure of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


class WithoutProducts(TorchDispatchMode):
    """Leaves out what takes the time, and none of the memory: products and attention return tensors
    of their size, each page of which is written."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        aten, kwargs = torch.ops.aten, kwargs or {}
        if operation is aten.mm.default:
            return args[0].new_full((args[0].shape[0], args[1].shape[1]), 1e-3)
        if operation is aten.mm.out:
            return kwargs["out"].fill_(1e-3)
        if operation is aten.addmm_.default:
            return args[0]
        if operation is aten._scaled_dot_product_flash_attention_for_cpu.default:
            return of_size(args[0]), of_size(args[0])[..., 0].clone()
        if operation is aten._scaled_dot_product_flash_attention_for_cpu_backward.default:
            return tuple(of_size(one) for one in args[1:4])
        return operation(*args, **kwargs)


def of_size(heads: torch.Tensor) -> torch.Tensor:
    """Return a tensor (B, H, L, D) that lies as attention's kernel leaves it: (B, L, H, D)."""
    return torch.full_like(heads.transpose(1, 2), 1e-3, memory_format=CONTIGUOUS).transpose(1, 2)


CONTIGUOUS = torch.contiguous_format


def model(layers: int) -> models.Model:
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    return models.Model(made, made.base_model, Path("random"))


def split_of(lengths: list[int]) -> data.Split:
    """Return rows of random tokens; all but the first of each is a target."""
    random, rows = np.random.default_rng(0), []
    for length in lengths:
        ids = random.integers(0, 49152, length).astype(np.uint32)
        rows.append((ids, np.arange(length) > 0, 0))
    return data.Split.of(rows)


def records(targets: int, vocab: int) -> losses.TopK:
    ids = torch.randint(vocab - KEPT, (targets, 1)) + torch.arange(KEPT)
    return losses.TopK(ids, torch.rand(targets, KEPT).sort(1).values * 8, torch.ones(targets))


def step(student: models.Model, optimizer, batch: data.Batch) -> None:
    head, method = student.head(), losses.Method(alpha=0.9)
    hidden = student.hidden(batch)
    teacher = records(len(batch.labels), head.vocab)
    loss_sum, _, _ = losses.head_loss(hidden, head, batch.labels, teacher, method)
    (loss_sum / len(batch.labels)).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@torch.inference_mode()
def forward(teacher: models.Model, batch: data.Batch) -> None:
    for _, z in teacher.head().chunks(teacher.hidden(batch)):
        z.topk(KEPT, dim=1)


def measured(args) -> dict:
    (tokens,), student = args.tokens, model(args.layers)
    split = split_of([64] + args.rows * [tokens // args.rows])
    batch, short = split.batch([[*range(1, args.rows + 1)]]), split.batch([[0]])
    how = "on" if args.checkpointing else None
    one = partial(forward, student)
    if not args.forward:
        student.module.train()
        if how:
            train.checkpoint(student, how)
        one = partial(step, student, train.adamw(student.module, 1e-4, 0.05, 0.95, student.device))
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    with WithoutProducts() if args.dry else nullcontext():
        one(short)
        started = time.process_time()
        one(batch)
    taken, peak = time.process_time() - started, resident("VmHWM")
    figures = {"grown_gb": round((peak - before) / 1e9, 3), "peak_gb": round(peak / 1e9, 3)}
    if not args.dry:
        figures["cpu_ms_per_token"] = round(1e3 * taken / tokens, 2)
    if not args.forward:
        student.module.activation_checkpointing_disable()
        each = train.kept_bytes(student, split_of([tokens]), None)
        most = train.Largest(tokens, len(batch.labels), 1)
        said = train.training_bytes(student, most, each, None, how) + train.CODE_BYTES
        figures["said_gb"] = round(said / 1e9, 3)
    return figures


def main(argv=None):
    args = parse_args(argv)
    if args.here:
        print(json.dumps(vars(args) | {"tokens": args.tokens[0]} | measured(args)), flush=True)
        return
    options = [f"--{name}" for name in ("forward", "checkpointing", "dry") if vars(args)[name]]
    options += ["--layers", str(args.layers), "--rows", str(args.rows), "--here"]
    for tokens in args.tokens:
        subprocess.run([sys.executable, __file__, str(tokens), *options], check=True)


if __name__ == "__main__":
    main()
