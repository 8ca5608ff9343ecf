"""Kill things while a teacher answers, and count: every prompt answered exactly --generations
times, nothing asked twice but what was in flight.

    python bench/serving/answers.py --model real/smollm2 --source real/stdlib.parquet \\
        --out out/answers
    python bench/serving/answers.py --model real/smollm2 --source real/stdlib.parquet \\
        --out out/answers --server "transformers serve --port 8765 {model}"

Without --server the teacher is run by prepare_data.py, which is sent SIGKILL twice; with it, the
server is, and is started again each time. The server must take the chat completions of OpenAI at
--url; {model} stands for --model.
"""

import argparse
import collections
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parents[2]


def written(out):
    """Return the answers on disk, in parts and in the journal, as (key, generation)."""
    rows = [
        row
        for path in out.glob("answers/*/part-*.parquet")
        for row in pq.read_table(path).to_pylist()
    ]
    for path in out.glob("answers/*/journal.jsonl"):
        rows += [
            json.loads(line)
            for line in path.read_bytes().splitlines(keepends=True)
            if line.endswith(b"\n")
        ]
    return [(row["key"], row["generation"]) for row in rows]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--source", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument(
        "--server", help="its command (default: none, the model is run by prepare_data.py)"
    )
    parser.add_argument("--url", default="http://127.0.0.1:8765/v1")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--generations", type=int, default=2)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--concurrency", type=int, default=8)
    args = parser.parse_args()
    out, total = Path(args.out), args.prompts * args.generations
    command = [
        sys.executable,
        str(ROOT / "prepare_data.py"),
        "--source",
        args.source,
        "--tokenizer",
        args.model,
        "--out",
        str(out),
        "--limit",
        str(total),
        "--answers",
        "teacher",
        "--generations",
        str(args.generations),
        "--max-new-tokens",
        str(args.max_new_tokens),
        "--keep-truncated",
        "--teacher-temperature",
        "0.8",
        "--workers",
        "1",
    ]
    if args.server:
        command += [
            "--teacher-url",
            args.url,
            "--teacher-model",
            args.model,
            "--concurrency",
            str(args.concurrency),
        ]
    else:
        command += ["--teacher", args.model]

    def serve():
        return subprocess.Popen(
            shlex.split(args.server.format(model=args.model)),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    begun, server = time.time(), serve() if args.server else None
    asking = subprocess.Popen(command)
    try:
        for share in (0.25, 0.6):
            while len(written(out)) < share * total:
                assert asking.poll() is None, "prepare_data.py ended early"
                time.sleep(0.5)
            before = written(out)
            if server:
                os.killpg(server.pid, signal.SIGKILL)
                server.wait()
                time.sleep(3)
                server = serve()
            else:
                asking.kill()
                asking.wait()
                asking = subprocess.Popen(command)
            print(
                f"bench: killed {'the server' if server else 'prepare_data.py'} after {len(before)}"
                f" of {total} answers",
                flush=True,
            )
        code = asking.wait()
    finally:
        asking.kill()
        if server:
            os.killpg(server.pid, signal.SIGKILL)
    times = collections.Counter(collections.Counter(written(out)).values())
    per_prompt = collections.Counter(collections.Counter(key for key, _ in written(out)).values())
    print(
        f"bench: exit code {code}; {len(written(out))} answers; each (prompt, generation) so many"
        f" times: {dict(times)}; prompts with so many answers: {dict(per_prompt)};"
        f" {time.time() - begun:.0f} s"
    )
    sys.exit(code or times != {1: total} or per_prompt != {args.generations: args.prompts})


if __name__ == "__main__":
    main()
