"""How much memory prepare_data.py needs for data that is large in one place: the peak of its
processes, or the one line that it ends in.

    python bench/data/hostile.py --tokenizer DIR --out out/hostile         # 3 GB of disk
    python bench/data/hostile.py --tokenizer DIR --out out/hostile --scale 0.01

Each case is written, prepared, and deleted: a row of 100 MB (jsonl, json, csv, plain text), a gz of
1 GB that is one line and one of 54,000 lines, a parquet file of one row group of 1 GB, 1,000,000
tiny rows.
"""

import argparse
import gzip
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).parents[2]
# a small process between: a child's peak is never below what its parent held when it began
MEASURED = """import resource, subprocess, sys
done = subprocess.run(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(done.returncode)"""
PAIR = '{"prompt": "question", "answer": "reply"}\n'


def huge_row(path, size):
    with open(path, "w") as file:
        file.write(PAIR + '{"prompt": "huge", "answer": "')
        for _ in range(size // 1000):
            file.write("a word or two of " * 59)
        file.write('"}\n')


def huge_item(path, size):
    huge_row(path, size)
    path.write_text("[" + path.read_text().strip().replace("}\n{", "},\n{") + "]")


def huge_cell(path, size):
    path.write_text(
        "prompt,answer\nquestion,reply\nhuge," + "a word or two of " * (size // 17) + "\n"
    )


def huge_text(path, size):
    path.write_text(json.dumps({"text": "a word or two of " * (size // 17)}) + "\n")


def bomb_line(path, size):
    with gzip.open(path, "wt") as file:
        file.write(PAIR + '{"prompt": "huge", "answer": "')
        for _ in range(size // 100_000):
            file.write("x" * 100_000)
        file.write('"}\n')


# of ten rows nine are too long for --max-len: to tokenize a gigabyte would take an hour
ANSWERS = ["a word or two of " * 1200] * 9 + ["a word or two of " * 50]


def bomb_lines(path, size):
    block = "".join(json.dumps({"prompt": "question", "answer": one}) + "\n" for one in ANSWERS)
    with gzip.open(path, "wt", compresslevel=1) as file:
        for _ in range(size // len(block)):
            file.write(block)


def row_group(path, size):
    answers = ANSWERS * (size // sum(map(len, ANSWERS)))
    table = pa.table({"prompt": [f"p{i}" for i in range(len(answers))], "answer": answers})
    pq.write_table(
        table, path, row_group_size=len(answers), use_dictionary=False, compression="zstd"
    )


def tiny_rows(path, size):
    with open(path, "w") as file:
        for i in range(size // 1000):
            file.write(f'{{"prompt": "p{i}", "answer": "{i}"}}\n')


CASES = {
    "a row of 100 MB.jsonl": (huge_row, 100e6),
    "a row of 100 MB.json": (huge_item, 100e6),
    "a row of 100 MB.csv": (huge_cell, 100e6),
    "a text of 100 MB.jsonl": (huge_text, 100e6),
    "1 GB in one line.jsonl.gz": (bomb_line, 1e9),
    "1 GB in 54,000 lines.jsonl.gz": (bomb_lines, 1e9),
    "1 GB in one row group.parquet": (row_group, 1e9),
    "1,000,000 tiny rows.jsonl": (tiny_rows, 1e9),
}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--out", default="out/hostile")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--only", default="", help="cases with these words in their names")
    args = parser.parse_args(argv)
    folder = Path(args.out)
    for name, (make, size) in CASES.items():
        if args.only not in name:
            continue
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        make(folder / name, int(size * args.scale))
        words = ["--source", folder / name, "--tokenizer", args.tokenizer, "--out", folder / "data"]
        command = [sys.executable, ROOT / "prepare_data.py", *words, "--workers", "2"]
        command = [sys.executable, "-c", MEASURED, *command]
        begun = time.time()
        done = subprocess.run([*map(str, command)], capture_output=True, text=True)
        *said, peak = done.stdout.splitlines()
        last = (done.stderr.strip().splitlines() or said)[-1][:160]
        line = {"case": name, "rc": done.returncode, "largest_gb": round(int(peak) / 1e6, 2)}
        print(json.dumps(line | {"time_s": round(time.time() - begun), "last": last}), flush=True)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
