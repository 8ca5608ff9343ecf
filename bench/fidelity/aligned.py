"""What is a teacher with another tokenizer worth (dump_logits.py --align bytes)? From one start and
for equal steps, with its control and its rival, on held-out rows.

    # real/ holds smollm2, qwen-0.5b, stdlib.parquet, debian.parquet (docs/real-models.md)
    python bench/fidelity/aligned.py --real real --out out/aligned
    # the same in small, for the harness alone: the figures mean nothing
    python bench/fidelity/aligned.py --real real --out out/smoke --rows 8 --val 2 --steps 1

given, labels       cross-entropy on the answers that are given: the control
given, aligned      the teacher's records over them, --align bytes, beside the labels (alpha 0.5)
written, labels     cross-entropy on answers that the teacher wrote to the same prompts (greedy)
written, aligned    the teacher's records over these

Each is measured on the held-out rows of both kinds: cross-entropy of the given answers and of the
teacher's (the student's tokens, so that all are comparable), and the distance to the teacher where
both write one token. Runs the scripts, a process each; what is there is not run again, and
--results keeps what was measured elsewhere. Prints the table: mean over the seeds, and the
difference to the control, paired by seed, with its 95 % interval. About two hours on a CPU core.
"""

import argparse
import json
import math
import random
import statistics
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).with_name("results-aligned.json")
CONDITIONS = {
    "given, labels": ("stage1_sft.py", ""),
    "given, aligned": ("stage2_kd.py", ""),
    "written, labels": ("stage1_sft.py", "-written"),
    "written, aligned": ("stage2_kd.py", "-written"),
}
TRAIN = "--tokens-per-step 1024 --tokens-per-microbatch 1024 --lr 5e-5 --warmup 0.1 --samples 0"
STUDENT_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # 97.5 %, by the number of seeds


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--real", type=Path, default=Path("real"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--sets", nargs="+", default=["stdlib", "debian"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", type=int, default=250)
    parser.add_argument("--val", type=int, default=30)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--longest", type=int, default=80, help="tokens of a written answer")
    return parser.parse_args()


def source(args, name: str) -> Path:
    """Write short rows of a set, and return where: stdlib's code, Debian's descriptions."""
    path = args.out / f"{name}.parquet"
    if path.exists():
        return path
    every = pq.read_table(args.real / f"{name}.parquet").to_pylist()
    if name == "debian":
        ask = "Describe the Debian package {package}: {synopsis}."
        every = [{"instruction": ask.format(**row), "output": row["description"]} for row in every]
    rows = [row for row in every if 60 < len(row["output"]) < 320]
    random.Random(0).shuffle(rows)
    kept = [{key: row[key] for key in ("instruction", "output")} for row in rows[: args.rows]]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(kept), path)
    return path


def run(args, log: str, script: str, *words) -> None:
    """Run a script of the project; what it says goes to a log."""
    place = args.out / "logs" / log
    place.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, ROOT / script, *words, "--threads", 1]
    print("+", script, *words, flush=True)
    with place.open("w") as file:
        ended = subprocess.run([str(word) for word in command], stdout=file, stderr=file)
    if ended.returncode:
        raise SystemExit(f"{place}: {place.read_text().strip().splitlines()[-1]}")


def prepare(args, name: str) -> None:
    """Make both kinds of data, and the teacher's records over them."""
    student, teacher = args.real / "smollm2", args.real / "qwen-0.5b"
    words = ["--source", source(args, name), "--tokenizer", student, "--export", "--max-len", 256]
    words += ["--val", args.val, "--workers", 1]
    written = ["--answers", "teacher", "--teacher", teacher, "--teacher-temperature", 0]
    written += ["--keep-truncated", "--max-new-tokens", args.longest]
    for kind, more in (("", []), ("-written", written)):
        data = args.out / "data" / f"{name}{kind}"
        if not (data / "meta.json").exists():
            run(args, f"data-{name}{kind}", "prepare_data.py", *words, *more, "--out", data)
        logits = args.out / "logits" / f"{name}{kind}"
        if not (logits / "val" / "meta.json").exists():
            dump = ["--data", data, "--teacher", teacher, "--student", student, "--out", logits]
            run(args, f"logits-{name}{kind}", "dump_logits.py", *dump, "--align", "bytes")


def measured(args, student: Path, name: str, log: str) -> dict[str, float]:
    """Return the measures of a model on the held-out rows of both kinds."""
    found = {}
    for kind, called in (("", "given"), ("-written", "written")):
        where = args.out / "evals" / f"{log}{kind}"
        words = [
            "--data",
            args.out / "data" / f"{name}{kind}",
            "--student",
            student,
            "--out",
            where,
        ]
        words += ["--logits", args.out / "logits" / f"{name}{kind}", "--temperature", 1]
        run(args, f"eval-{log}{kind}", "stage2_kd.py", *words, "--eval-only")
        made = json.loads((where / "eval.json").read_text())
        found |= {f"ce_{called}": made["ce"], f"kl_{called}": made["kl"]}
    return found


def condition(args, name: str, called: str, seed: int) -> dict[str, float]:
    """Train one student, and return its measures."""
    script, kind = CONDITIONS[called]
    log = f"{name}-{called.replace(', ', '-')}-{seed}"
    out = args.out / "runs" / log
    words = ["--data", args.out / "data" / f"{name}{kind}", "--student", args.real / "smollm2"]
    words += ["--out", out, "--seed", seed, "--steps", args.steps, "--eval-every", args.steps]
    if script == "stage2_kd.py":
        words += ["--logits", args.out / "logits" / f"{name}{kind}"]
        words += ["--temperature", 1, "--alpha", 0.5]
    run(args, log, script, *words, *TRAIN.split())
    made = measured(args, out / "final", name, log)
    for part in out.glob("**/*.safetensors"):
        part.unlink()
    return made


def line(name: str, found: list[dict], control: list[dict] | None) -> str:
    """Return a row of the table; control: what each is compared with, by seed."""
    cells = [name]
    for measure in ("ce_given", "ce_written", "kl_given", "kl_written"):
        values = [one[measure] for one in found]
        cell = f"{statistics.mean(values):.3f}"
        if control and len(values) > 1:
            apart = [a - b[measure] for a, b in zip(values, control)]
            spread = statistics.stdev(apart) / math.sqrt(len(apart)) * STUDENT_T[len(apart)]
            cell += f" ({statistics.mean(apart):+.3f} ± {spread:.3f})"
        cells.append(cell)
    return "| " + " | ".join([*cells, str(len(found))]) + " |"


def table(results: dict, name: str) -> None:
    """Print what is known of a set."""
    print(f"\n{name}\n")
    print("| | CE, given | CE, written | KL, given | KL, written | seeds |")
    print("| --- | --- | --- | --- | --- | --- |")
    if start := results.get(f"{name}/start"):
        print(line("untrained", [start], None))
    for called in CONDITIONS:
        seeds = [key.rpartition("/")[2] for key in results if key.startswith(f"{name}/{called}/")]
        both = [seed for seed in seeds if f"{name}/given, labels/{seed}" in results]
        if both:
            own = [results[f"{name}/{called}/{seed}"] for seed in both]
            control = [results[f"{name}/given, labels/{seed}"] for seed in both]
            print(line(called, own, None if called == "given, labels" else control))


def main():
    args = parse_args()
    results = json.loads(args.results.read_text()) if args.results.exists() else {}

    def keep(key: str, made) -> None:
        if key not in results:
            results[key] = made()
            args.results.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")

    for name in args.sets:
        prepare(args, name)
        keep(f"{name}/start", lambda: measured(args, args.real / "smollm2", name, f"{name}-start"))
        for seed in args.seeds:
            for called in CONDITIONS:
                key = f"{name}/{called}/{seed}"
                keep(key, lambda: condition(args, name, called, seed))
        table(results, name)


if __name__ == "__main__":
    main()
