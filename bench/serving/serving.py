"""What batching is worth: speed and first token of chat.py --serve, for one client and for many.

    python bench/serving/serving.py --ckpt runs/demo/stage2
    # beside another server
    python bench/serving/serving.py --ckpt real/smollm2 --peer http://127.0.0.1:8001/v1 \\
        --peer-model real/smollm2

Starts the server, asks it greedily for answers of at most --max-tokens by its stream, and takes
turns: 1 client, 8, 32, 1, 8, 32, ... Each client asks --asks questions, one after another.
tokens/s: all tokens of all clients, over the time from the first question to the last answer. A
peer (any server of OpenAI's API) gets the same questions in turn; each chunk of its stream counts
as a token where it gives no usage.
"""

import argparse
import http.client
import json
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

ROOT = Path(__file__).parents[2]
NAMES = "Ann Tom Leo Mia Eva Sara Hugo Ruth".split()


def question(number: int) -> str:
    name, has, buys = NAMES[number % 8], 11 + 7 * number % 80, 12 + 5 * number % 60
    return f"{name} has {has} apples. She buys {buys} more. How many apples does {name} have now?"


def ask(url: str, model: str, text: str, limit: int) -> tuple[int, float]:
    """Return (tokens, seconds to the first one) of one streamed answer."""
    parts, body = (
        urlsplit(url),
        {
            "model": model,
            "messages": [{"role": "user", "content": text}],
            "stream": True,
            "temperature": 0,
            "max_tokens": limit,
            "stream_options": {"include_usage": True},
        },
    )
    began, first, pieces, used = time.perf_counter(), None, 0, None
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=600)
    connection.request(
        "POST",
        parts.path + "/chat/completions",
        json.dumps(body),
        {"Content-Type": "application/json"},
    )
    answer = connection.getresponse()
    if answer.status != 200:
        sys.exit(f"error: {url} answered {answer.status}: {answer.read()[:300]}")
    for line in answer:
        if not line.startswith(b"data: ") or b"[DONE]" in line:
            continue
        chunk = json.loads(line[6:])
        used = (chunk.get("usage") or {}).get("completion_tokens", used)
        if chunk["choices"] and chunk["choices"][0].get("delta", {}).get("content"):
            pieces += 1
            first = first or time.perf_counter() - began
    connection.close()
    return used or pieces, first or time.perf_counter() - began


def together(
    url: str, model: str, clients: int, asks: int, limit: int
) -> tuple[float, list[float]]:
    """Return (tokens a second of all clients at once, seconds to the first token of each
    answer)."""
    made, barrier = [], threading.Barrier(clients + 1)

    def client(place: int) -> None:
        barrier.wait()
        for turn in range(asks):
            made.append(ask(url, model, question(place * asks + turn), limit))

    threads = [threading.Thread(target=client, args=(place,)) for place in range(clients)]
    for thread in threads:
        thread.start()
    barrier.wait()
    began = time.perf_counter()
    for thread in threads:
        thread.join()
    return sum(count for count, _ in made) / (time.perf_counter() - began), [
        first for _, first in made
    ]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--ckpt", required=True, metavar="DIR")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32], metavar="N")
    parser.add_argument(
        "--asks",
        type=int,
        default=2,
        metavar="N",
        help="questions of each client (default: %(default)s)",
    )
    parser.add_argument("--max-tokens", type=int, default=48, metavar="N")
    parser.add_argument(
        "--rounds",
        type=int,
        default=3,
        metavar="N",
        help="the median of these is said (default: %(default)s)",
    )
    parser.add_argument("--peer", metavar="URL", help="another server, up to /v1")
    parser.add_argument("--peer-model", metavar="NAME")
    args, rest = parser.parse_known_args(
        argv
    )  # the rest is chat.py's: --threads 2, --dtype bfloat16

    command = [
        sys.executable,
        str(ROOT / "chat.py"),
        "--ckpt",
        args.ckpt,
        "--serve",
        "--port",
        "0",
        "--slots",
        "32",
        "--queue",
        "64",
        *rest,
    ]
    server = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}
    )
    try:
        said = ""
        while not (found := re.search(r"http://\S+/v1", said)):
            said = server.stdout.readline() or sys.exit("error: the server did not start")
        sides = {"chat.py --serve": (found.group(), args.ckpt)} | (
            {args.peer: (args.peer, args.peer_model or args.ckpt)} if args.peer else {}
        )
        speeds = {(side, clients): [] for side in sides for clients in args.clients}
        waits = {key: [] for key in speeds}
        for url, model in sides.values():
            together(url, model, 2, 1, 8)  # warm
        for _ in range(args.rounds):
            for clients in args.clients:
                for side, (url, model) in sides.items():
                    speed, first = together(url, model, clients, args.asks, args.max_tokens)
                    speeds[side, clients].append(speed)
                    waits[side, clients] += first
        print(
            f"{'':34} {'clients':>7} {'tokens/s':>9} {'ratio':>6} {'first token, median':>20}"
            f" {'slowest of 20':>14}"
        )
        for side in sides:
            alone = statistics.median(speeds[side, args.clients[0]])
            for clients in args.clients:
                speed, first = (
                    statistics.median(speeds[side, clients]),
                    sorted(waits[side, clients]),
                )
                middle, slow = statistics.median(first), first[len(first) * 19 // 20]
                print(
                    f"{side:34} {clients:7d} {speed:9.1f} {speed / alone:6.2f} {middle:18.3f} s"
                    f" {slow:12.3f} s"
                )
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
