"""Measure what this project promises, each figure a ratio of two things timed side by side in one
run.

    python bench/speed/bench.py                 # all; about 10 minutes on 2 CPU cores
    python bench/speed/bench.py head --quick    # one of step, dump, head, host; --quick: a
                                                # small vocabulary, seconds, for the tests

step  one optimizer step of stage 2 over one of stage 1, at T=1 and T=2: with a bucket (k=32), a
      basis of 32 dimensions (k=32), and one of 384 dimensions (k=16)                       goal
      1.10 and 1.20; a basis of 32 over the bucket 1.10
dump  a bare teacher forward (body and head, nothing kept) over dump_logits.py      goal 0.90
head  head and loss over F.cross_entropy on full logits: time and extra memory      goal 1.0 and 0.2
host  what one core does beside a GPU in stage 2: records that lie in the page cache read at random,
      a row at a time, and unpacked; a chunk opened; an epoch planned (figures, no ratio; for
      docs/scale.md)

The model has the shape of Qwen2.5-0.5B (width 896, 24 layers, 151,936 tokens) and random weights:
speed does not depend on them. The two sides of a ratio take turns, and the ratio is the median over
the turns, so that a busy machine bends both alike.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))
from lib import data, files, head, losses, models, plan, train  # noqa: E402
from lib.teacher import basis, record, writer  # noqa: E402

TEMPERATURES = [1.0, 2.0, 4.0]
BUCKET, RANK32, DEFAULT = (
    (32, 0, 0),
    (32, 32, 32),
    (16, 384, 128),
)  # k, dimensions of the basis, bytes of coefficients


def shape(quick: bool) -> dict:
    if quick:
        return dict(V=8192, D=64, layers=2, rows=4, length=64, targets=512)
    return dict(V=151_936, D=896, layers=24, rows=4, length=128, targets=2048)


def model(s: dict, device: torch.device) -> models.Model:
    from transformers import AutoModelForCausalLM, Qwen2Config

    config = Qwen2Config(
        vocab_size=s["V"],
        hidden_size=s["D"],
        intermediate_size=s["D"] * 38 // 7,
        num_hidden_layers=s["layers"],
        num_attention_heads=s["D"] // 64,
        num_key_value_heads=max(1, s["D"] // 448),
        tie_word_embeddings=True,
    )
    module = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(device)
    return models.as_model(module, Path("random"))


def batch(s: dict, device: torch.device) -> data.Batch:
    """Return rows of which the second half are targets, as in instruction data."""
    tokens = torch.randint(0, s["V"], (s["rows"], s["length"]))
    where = (
        torch.arange(s["rows"])[:, None] * s["length"]
        + torch.arange(s["length"] // 2 - 1, s["length"] - 1)
    ).flatten()
    positions = torch.arange(s["length"]).expand(s["rows"], -1).contiguous()
    return data.Batch(
        tokens,
        positions,
        where,
        tokens.flatten()[where + 1],
        torch.arange(len(where)),
        list(range(s["rows"])),
        torch.arange(s["rows"])[:, None].expand_as(tokens),
    ).to(device)


def random_basis(s: dict, rank: int, size: int) -> basis.Basis | None:
    """Return a basis of `rank` rows, its coefficients in `size` bytes; None for rank 0."""
    if not rank:
        return None
    bits = torch.full((rank,), 8 * size // rank, dtype=torch.uint8)
    bits[: 8 * size - int(bits.sum())] += 1
    rows = (torch.randn(rank, s["V"]) / rank**0.5).half()
    return basis.Basis(
        torch.randn(s["V"]),
        rows,
        bits,
        torch.full((rank,), 0.5),
        torch.zeros(s["D"]),
        torch.randn(s["D"], rank),
    )


def kept(
    s: dict, count: int, k: int, shape: basis.Basis | None, size: int, errors: bool = False
) -> np.ndarray:
    """Return records as dump_logits.py writes them, of random teacher logits."""
    ids, gaps, tails = head.topk_and_tails(torch.randn(64, s["V"]) * 3, k, TEMPERATURES)
    coef = shape and shape.pack(torch.randn(64, len(shape.bits)))
    records = record.pack(
        ids.numpy(),
        gaps.numpy(),
        tails.numpy(),
        record.record_dtype(k, TEMPERATURES, s["V"], "u8", size, errors),
        s["V"],
        coef,
    )
    return np.resize(records, count)


def turns(sides: dict, rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Time each side once a round, in turn, after one round of warm-up; seconds by side."""
    seconds = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, side in sides.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            side()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: dict, above: str, below: str) -> float:
    return statistics.median(a / b for a, b in zip(seconds[above], seconds[below]))


def bench_step(s: dict, rounds: int, device: torch.device, amp) -> dict:
    student, micro = model(s, device), batch(s, device)
    student.module.train()
    optimizer = train.adamw(student.module, 1e-6, 0.05, 0.95, device)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
    layer = student.head()
    shapes = {sides: random_basis(s, *sides[1:]) for sides in (BUCKET, RANK32, DEFAULT)}
    records = {
        sides: kept(s, len(micro.labels), sides[0], shape, sides[2])
        for sides, shape in shapes.items()
    }
    shapes = {sides: shape and shape.to(device) for sides, shape in shapes.items()}

    def step(sides=None, temperature=1.0):
        teacher = None
        if sides:
            teacher = record.unpack(
                records[sides], s["V"], TEMPERATURES.index(temperature), shapes[sides]
            )
            teacher = replace(
                teacher,
                ids=teacher.ids.to(device),
                gap=teacher.gap.to(device),
                tail=teacher.tail.to(device),
            )
        with torch.autocast(device.type, amp, enabled=amp is not None):
            hidden = student.hidden(micro)
        loss, _, _ = losses.head_loss(
            hidden,
            layer,
            micro.labels,
            teacher,
            losses.Method(0.9 if sides else 0.0, temperature),
            amp,
        )
        scaler.scale(loss / len(micro.labels)).backward()
        train.gradient_norm(optimizer, scaler, student.module, 1.0)
        train.update(optimizer, scaler, 1e-6)

    sides = {
        "stage1": step,
        "bucket_T1": lambda: step(BUCKET, 1.0),
        "bucket_T2": lambda: step(BUCKET, 2.0),
        "rank32_T2": lambda: step(RANK32, 2.0),
        "default_T1": lambda: step(DEFAULT, 1.0),
        "default_T2": lambda: step(DEFAULT, 2.0),
    }
    seconds = turns(sides, rounds, device)
    return {
        "stage1_step_s": statistics.median(seconds["stage1"]),
        "tokens": s["rows"] * s["length"],
        "targets": len(micro.labels),
        **{f"{name}_over_stage1": ratio(seconds, name, "stage1") for name in list(sides)[1:]},
        "rank32_over_bucket_T2": ratio(seconds, "rank32_T2", "bucket_T2"),
        "default_over_bucket_T2": ratio(seconds, "default_T2", "bucket_T2"),
    }


@torch.inference_mode()
def bench_dump(s: dict, rounds: int, device: torch.device, amp) -> dict:
    teacher, micro = model(s, device), batch(s, device)
    if amp:
        teacher.module.to(amp)
    teacher.module.eval()
    k, rank, size = DEFAULT
    layer, dtype, shape = (
        teacher.head(),
        record.record_dtype(k, TEMPERATURES, s["V"], "u8", size),
        random_basis(s, rank, size).to(device),
    )
    weight = layer.operand(next(teacher.module.parameters()).dtype)

    def bare():
        head.matmul(teacher.hidden(micro).to(weight.dtype), weight.t())

    seconds = turns(
        {
            "bare": bare,
            "dump": lambda: writer.teacher_records(
                teacher, layer, micro, k, TEMPERATURES, dtype, shape
            ),
        },
        rounds,
        device,
    )
    return {
        "targets_per_s": len(micro.labels) / statistics.median(seconds["dump"]),
        "bytes_per_target": dtype.itemsize,
        "bare_over_dump": ratio(seconds, "bare", "dump"),
    }


def head_inputs(s: dict, count: int, device: torch.device):
    torch.manual_seed(0)
    hidden = torch.randn(count, s["D"], device=device, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(s["V"], s["D"], device=device) / s["D"] ** 0.5)
    return hidden, weight, torch.randint(0, s["V"], (count,), device=device)


def taught(kind: str, s: dict, count: int, device: torch.device) -> losses.TopK | None:
    """Return the teacher that a kind of head needs: "ours with a bucket", "ours with a basis", or
    none."""
    k, rank, size = {"ours with a bucket": BUCKET, "ours with a basis": DEFAULT}.get(
        kind, (0, 0, 0)
    )
    if not k:
        return None
    shape = random_basis(s, rank, size)
    teacher = record.unpack(kept(s, count, k, shape, size), s["V"], 1, shape and shape.to(device))
    return replace(
        teacher,
        ids=teacher.ids.to(device),
        gap=teacher.gap.to(device),
        tail=teacher.tail.to(device),
    )


def head_side(kind: str, s: dict, hidden, weight, labels, teacher=None) -> None:
    if kind == "plain":
        loss = F.cross_entropy(hidden @ weight.t(), labels, reduction="sum")
    else:
        method = losses.Method(0.9, 2.0) if teacher else losses.Method()
        loss, _, _ = losses.head_loss(
            hidden, head.Head(weight, None, s["V"]), labels, teacher, method
        )
    loss.backward()
    weight.grad = hidden.grad = None


def bench_head(s: dict, rounds: int, device: torch.device, amp) -> dict:
    inputs = head_inputs(s, s["targets"], device)
    seconds = turns(
        {kind: lambda kind=kind: head_side(kind, s, *inputs) for kind in ("plain", "ours")},
        rounds,
        device,
    )
    result = {
        "targets": s["targets"],
        "plain_s": statistics.median(seconds["plain"]),
        "ours_over_plain_time": ratio(seconds, "ours", "plain"),
    }
    for kind in ("plain", "ours", "ours with a bucket", "ours with a basis"):
        result[f"{kind} extra GB, {s['targets']} targets"] = memory(kind, s["targets"], s, device)
    result["ours_over_plain_memory"] = (
        result[f"ours extra GB, {s['targets']} targets"]
        / result[f"plain extra GB, {s['targets']} targets"]
    )
    for kind in ("ours", "ours with a bucket", "ours with a basis", "plain"):
        result[f"{kind} extra GB, {4 * s['targets']} targets"] = memory(
            kind, 4 * s["targets"], s, device
        )
    return result


def memory(kind: str, count: int, s: dict, device: torch.device) -> float:
    """Return the peak memory (GB) of head and loss over its inputs and the weight's own gradient,
    in a process of its own."""
    here = str(Path(__file__).parent)
    code = (
        f"import sys; sys.path.insert(0, {here!r}); import bench; bench.report_memory({kind!r},"
        f" {count}, {s!r}, {str(device)!r})"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if result.returncode and not (
        result.returncode in (-9, 137)
        or "OutOfMemory" in result.stderr
        or "can't allocate memory" in result.stderr
    ):
        raise SystemExit(result.stderr)
    return float("inf") if result.returncode else float(result.stdout)  # inf: more than there is


def report_memory(kind: str, count: int, s: dict, device: str) -> None:
    tiny = s | {"V": 64}
    head_side(
        kind,
        tiny,
        *head_inputs(tiny, 8, torch.device(device)),
        taught(kind, tiny, 8, torch.device(device)),
    )  # libraries' own
    inputs = (
        *head_inputs(s, count, torch.device(device)),
        taught(kind, s, count, torch.device(device)),
    )
    gradient = inputs[1].numel() * 4
    if device.startswith("cuda"):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        head_side(kind, s, *inputs)
        print((torch.cuda.max_memory_allocated() - before - gradient) / 1e9)
        return
    with open(
        "/proc/self/clear_refs", "w"
    ) as reset:  # VmHWM starts again (ru_maxrss would be the parent's: exec inherits it)
        reset.write("5")
    before = status_bytes("VmRSS")
    head_side(kind, s, *inputs)
    print((status_bytes("VmHWM") - before - gradient) / 1e9)


def status_bytes(name: str) -> int:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def bench_host(s: dict, rounds: int, device: torch.device, amp) -> dict:
    """Return what one core does, in its own seconds (a busy machine bends them less): targets a
    second, read and also unpacked; seconds of opening a chunk; microseconds, and bytes held and at
    the peak, of plan.whole_run a row."""
    quick, row = s["V"] < 1 << 16, 256
    count, rows = (1 << 14, 100_000) if quick else (1 << 20, 5_000_000)
    known = kept(s, count, 16, random_basis(s, 512, 128), 128, errors=True)
    order = np.random.default_rng(0).permutation(count // row).reshape(-1, 8)
    lengths = np.random.default_rng(0).integers(100, 900, rows).astype("<u4")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "topk.npy")
        np.save(path, known)
        records, sums = files.read_npy(path, known.dtype), files.sums(path)

        def read():
            return [np.concatenate([records[r * row : (r + 1) * row] for r in rs]) for rs in order]

        def unpack():
            for part in read():
                record.unpack(part, s["V"], 1)
                np.unpackbits(part["coef"], axis=1, bitorder="little")  # the GPU does the rest

        def plan_epoch():
            return plan.whole_run(np.arange(rows), lengths, 0, 16384, 1)

        def opened():
            return files.damage(path, sums), record.impossible(records, s["V"])

        sides, took = (read, unpack, opened, plan_epoch), {}
        for side in sides:
            side()
            begun = time.process_time()
            for _ in range(rounds):
                side()
            took[side] = (time.process_time() - begun) / rounds
    tracemalloc.start()
    held = plan_epoch()
    now, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held
    found = {"record_bytes": known.itemsize, "read_targets_per_s": count / took[read]}
    found |= {"targets_per_s": count / took[unpack], "open_chunk_s": took[opened]}
    found |= {"plan_us_a_row": 1e6 * took[plan_epoch] / rows}
    return found | {"plan_bytes_a_row": now / rows, "plan_peak_bytes_a_row": peak / rows}


BENCHES = {"step": bench_step, "dump": bench_dump, "head": bench_head, "host": bench_host}


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("what", nargs="*", help=f"any of {', '.join(BENCHES)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="small shapes, to see that it runs")
    parser.add_argument(
        "--rounds", type=int, default=3, help="turns of each side (default: %(default)s)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda (default: %(default)s)")
    parser.add_argument("--amp", choices=["auto", "fp16", "bf16", "off"], default="auto")
    args = parser.parse_args(argv)
    if unknown := set(args.what) - set(BENCHES):
        parser.error(f"no such bench: {', '.join(unknown)}; wanted any of {', '.join(BENCHES)}")
    device = models.pick_device(args.device)
    amp = models.pick_amp(args.amp, device)
    for name in args.what or BENCHES:
        result = BENCHES[name](shape(args.quick), args.rounds, device, amp)
        rounded = {k: round(v, 3) if isinstance(v, float) else v for k, v in result.items()}
        print(
            json.dumps(
                {
                    "bench": name,
                    "device": str(device),
                    "threads": torch.get_num_threads(),
                    **rounded,
                }
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
