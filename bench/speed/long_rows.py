"""Measure memory and time of rows of 1k to 32k tokens, each length in a process of its own.

    python bench/speed/long_rows.py --checkpointing     # hours on 2 CPU cores: attention of 32k
    python bench/speed/long_rows.py --checkpointing --local           # its memory alone, minutes
    python bench/speed/long_rows.py 512 1024 --layers 2 --local       # seconds

A model of SmolLM2-135M's shape (width 576, 30 layers, 9 heads, 3 of keys and values, 49,152 tokens,
tied) with random weights takes one optimizer step of stage 2 on one row, as the loop does: body,
head_loss with 16 kept tokens a target, backward, AdamW, whose moments are there from a step before
on a short row. --forward: what a dump takes of it, body and head's logits alone.

peak_gb is the process' largest resident size, all included; grown_gb what of it came with the step
(or pass), said_gb what the trainer would have said of that before (train.training_bytes).
--local lets a token attend to its block of 512 tokens alone, by the same kernel: what is made and
kept has the same size, without the time of L x L products (so time is not told then).
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from lib import data, losses, models, train  # noqa: E402

BLOCK, KEPT = 512, 16


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tokens", type=int, nargs="*", default=[1024, 4096, 16384, 32768])
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rows", type=int, default=1, help="on the line, all of one length")
    parser.add_argument("--forward", action="store_true")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--local", action="store_true")
    parser.add_argument("--here", action="store_true", help="in this process (for the script)")
    return parser.parse_args(argv)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def local(query, key, value, *args, **more):
    """Attention within blocks of BLOCK tokens, each by torch's own kernel."""
    parts = zip(*(part.split(BLOCK, 2) for part in (query, key, value)))
    return torch.cat([ATTENTION(*part, *args, **more) for part in parts], 2)


ATTENTION = torch.nn.functional.scaled_dot_product_attention


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
    if args.local:
        torch.nn.functional.scaled_dot_product_attention = local
    figures: dict = {}
    if args.forward:
        forward(student, short)
        before, started = resident(), time.process_time()
        forward(student, batch)
    else:
        student.module.train()
        each = train.kept_bytes(student, split_of([tokens]), None)
        if args.checkpointing:
            student.module.activation_checkpointing_enable({"use_reentrant": False})
        optimizer = train.adamw(student.module, 1e-4, 0.05, 0.95, student.device)
        most = train.Largest(tokens, len(batch.labels), 1)
        said = train.training_bytes(student, most, each, None, args.checkpointing)
        loaded = resident()
        step(student, optimizer, short)
        before, started = resident(), time.process_time()
        step(student, optimizer, batch)
        figures["said_gb"] = round((said + train.CODE_BYTES + loaded - before) / 1e9, 3)
    taken = time.process_time() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    figures |= {"grown_gb": round((peak - before) / 1e9, 3), "peak_gb": round(peak / 1e9, 3)}
    if not args.local:
        figures["cpu_ms_per_token"] = round(1e3 * taken / tokens, 2)
    return figures


def main(argv=None):
    args = parse_args(argv)
    if args.here:
        print(json.dumps(vars(args) | {"tokens": args.tokens[0]} | measured(args)), flush=True)
        return
    options = [f"--{name}" for name in ("forward", "checkpointing", "local") if vars(args)[name]]
    options += ["--layers", str(args.layers), "--rows", str(args.rows), "--here"]
    for tokens in args.tokens:
        subprocess.run([sys.executable, __file__, str(tokens), *options], check=True)


if __name__ == "__main__":
    main()
