"""Measure what several processes bring: throughput of two over one, and what each of them holds.

    python bench/speed/ranks.py throughput --data DATA --model DIR     # two processes on two cores
                                                     # over one on one: stage 1, and the dump
    python bench/speed/ranks.py memory --data DATA --model DIR --ranks 4     # of a student divided
                                                     # by --shard fsdp: each one's resident memory

DATA is a folder of prepare_data.py. throughput pins one process to core 0 and two to cores 0 and 1,
each with one thread; the sides take turns (--rounds), and the ratio is the median over the turns.
Training: tokens a second of the steps after the first. Dump: targets a second of each worker
(--shared), added. memory samples five times a second what each rank holds, files that are mapped
apart (RssAnon), and tells the most and the median, beside 16 bytes a weight (weights, gradients,
AdamW's two moments) over the ranks.
"""

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
STEP = "--device cpu --samples 0 --log-every 1 --tokens-per-step 2048 --eval-every 1000".split()


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["throughput", "memory"])
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--micro", default="1024", help="tokens a micro-batch")
    return parser.parse_args(argv)


def started(cores: str, script: str, *words, ranks: int = 0) -> subprocess.Popen:
    """Start a script of the project on these cores, one thread a process."""
    alone = [sys.executable, script]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    line = [*torchrun, "--nproc-per-node", ranks, script] if ranks else alone
    process = subprocess.Popen(
        ["taskset", "-c", cores, *map(str, line), *map(str, words)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdout=(said := tempfile.TemporaryFile("w+")),  # a pipe that nobody reads would fill
        stderr=subprocess.STDOUT,
    )
    process.stdout = said
    return process


def output(process: subprocess.Popen) -> str:
    process.wait()
    process.stdout.seek(0)
    told = process.stdout.read()
    if process.returncode:
        sys.exit(f"{' '.join(process.args)}: {process.returncode}\n{told[-3000:]}")
    return told


def training(args, out: Path, ranks: int) -> float:
    """Return tokens a second of stage 1, its first step left out."""
    words = ["--data", args.data, "--student", args.model, "--out", out, *STEP]
    words += ["--steps", args.steps, "--tokens-per-microbatch", args.micro]
    output(started("0,1" if ranks else "0", "stage1_sft.py", *words, ranks=ranks))
    lines = map(json.loads, (out / "history.jsonl").read_text().splitlines())
    speeds = [line["tok_per_s"] for line in lines if line["event"] == "train"][1:]
    return statistics.harmonic_mean(speeds)


def dumping(args, out: Path, workers: int) -> float:
    """Return targets a second of all workers; a chunk for each of them."""
    words = ["--data", args.data, "--teacher", args.model, "--student", args.model, "--out", out]
    words += ["--device", "cpu", "--tail-rank", 0, "--shared"]
    at_work = [started(str(core), "dump_logits.py", *words) for core in range(workers)]
    told = "\n".join(map(output, at_work))
    speeds = re.findall(r"done, (\d+) targets/s", told)
    return statistics.mean(map(float, speeds)) * workers


def throughput(args) -> None:
    ratios = {training: [], dumping: []}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(args.rounds):
            for side, seen in ratios.items():
                one, two = (
                    side(args, Path(folder, f"{side.__name__}{turn}-{n}"), n)
                    for n in ((0, 2) if side is training else (1, 2))
                )
                seen.append(two / one)
                print(f"{side.__name__}: {one:.1f} -> {two:.1f} a second, {two / one:.2f}x")
    for side, seen in ratios.items():
        low, middle, high = min(seen), statistics.median(seen), max(seen)
        print(f"{side.__name__}: {middle:.2f}x ({low:.2f} to {high:.2f})")


def anonymous(process: Path) -> int:
    """Return what a process holds in bytes, mapped files apart; 0 of one that has ended."""
    try:
        lines = (process / "status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


def ranks_of(torchrun: int) -> list[Path]:
    children = Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text().split()
    return [Path("/proc", one) for one in children]


def memory(args) -> None:
    from safetensors import safe_open

    weights = 0
    for path in Path(args.model).glob("*.safetensors"):
        with safe_open(path, "pt") as opened:
            shapes = [opened.get_slice(name).get_shape() for name in opened.keys()]
            weights += sum(math.prod(shape) for shape in shapes)
    state = 16 * weights / args.ranks
    with tempfile.TemporaryDirectory() as folder:
        words = ["--data", args.data, "--student", args.model, "--out", folder, *STEP]
        words += ["--steps", args.steps, "--tokens-per-microbatch", args.micro]
        words += ["--shard", "fsdp", "--checkpointing", "--tokens-per-step", 512]
        process = started("0,1", "stage1_sft.py", *words, ranks=args.ranks)
        seen = {}
        while process.poll() is None:
            for rank in ranks_of(process.pid):
                if held := anonymous(rank):
                    seen.setdefault(rank, []).append(held / 1e9)
            time.sleep(0.2)
        print(output(process)[-1500:])
    print(f"{weights:,} weights; 16 bytes each over {args.ranks} ranks: {state / 1e9:.2f} GB")
    for rank, held in seen.items():
        print(f"{rank.name}: {max(held):.2f} GB at most, {statistics.median(held):.2f} the median")


if __name__ == "__main__":
    arguments = parse_args()
    {"throughput": throughput, "memory": memory}[arguments.what](arguments)
