"""What packed weights are worth (lib/packed.py): milliseconds of a decoding step of 1 to 32 answers at once, plain and packed, in turns.

    python bench/packed.py --model real/smollm2 --threads 2
"""
import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent))
from lib import generate, packed  # noqa: E402


@torch.inference_mode()
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--model", required=True, metavar="DIR")
    parser.add_argument("--threads", type=int, default=2, metavar="N")
    parser.add_argument("--rounds", type=int, default=15, metavar="N")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    sides = {name: AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval() for name in ("plain", "packed")}
    packed.pack(sides["packed"])
    print("answers at once    plain ms   packed ms    plain / packed")
    for rows in (1, 2, 4, 8, 16, 32):
        batches, times = {}, {name: [] for name in sides}
        for name, module in sides.items():
            batches[name] = generate.Batch(module, generate.Sampling(), rows)
            batches[name].admit([generate.Request(row, list(range(100, 140)), 1000) for row in range(rows)])
            batches[name].step()
        for _ in range(args.rounds):
            for name, batch in batches.items():
                began = time.perf_counter()
                batch.step()
                times[name].append(1e3 * (time.perf_counter() - began))
        plain, fast = (statistics.median(times[name]) for name in sides)
        print(f"{rows:15d} {plain:11.1f} {fast:11.1f} {plain / fast:17.2f}", flush=True)


if __name__ == "__main__":
    main()
