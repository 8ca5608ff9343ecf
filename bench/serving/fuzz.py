"""Does chat.py --serve live through what nobody should send? Hostile requests, many at once, beside
one good one that must be answered the same every time.

    python bench/serving/fuzz.py --ckpt runs/demo/stage2 --teacher runs/demo/teacher
    python bench/serving/fuzz.py --ckpt runs/demo/stage2 --requests 500 --seed 3

Starts the server and sends --requests requests from --clients threads: floats where integers belong
(1e18, 5.0, 1e308, -0.0), huge and tiny sizes, wrong types at every place of a body, nested JSON,
integers of 5,000 digits, half characters, bytes that are no JSON, bodies that end too early,
clients that leave at once. Prints what came back by kind, the memory of the server after a quarter
and at the end, the slowest request, and exits with 1 where the server or one of its models has
ended, a good request was answered otherwise, a status of 500 or above came (but 503, which says
"busy"), a request took more than --longest-s, or memory grew by more than --grown-mb.
"""

import argparse
import collections
import copy
import http.client
import json
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
NUMBERS = """0 1 2 3 -1 16 17 1000 5.0 1.5 -0.0 1e2 1e9 1e18 -1e18 1e19 1e300 1e308 1e999 -1e999
    9007199254740992.0 9007199254740993.0 9223372036854775807 9223372036854775808 1e-320 0.1 0.999
    NaN Infinity true false null""".split()
FIELDS = """temperature top_p top_k min_p repetition_penalty max_tokens max_completion_tokens seed n
    logprobs top_logprobs frequency_penalty presence_penalty stop stream stream_options fit tools
    logit_bias user best_of echo suffix response_format metadata store messages prompt model answer
    finished unknown chat_template_kwargs min_tokens ignore_eos stop_token_ids""".split()
ROUTES = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "How many?"}]},
    "/v1/completions": {"prompt": "Ann has"},
    "/v1/heatmap": {"messages": [{"role": "user", "content": "How many?"}], "answer": "8"},
}


def raw(value: object) -> str:
    """Return JSON in which a Raw stands as it is."""
    if isinstance(value, dict):
        return (
            "{" + ", ".join(f"{json.dumps(name)}: {raw(one)}" for name, one in value.items()) + "}"
        )
    if isinstance(value, list):
        return "[" + ", ".join(map(raw, value)) + "]"
    return str(value) if isinstance(value, Raw) else json.dumps(value)


class Raw(str):
    """JSON as it is written, 1e18 say, which Python would write otherwise."""


def number(rng: random.Random) -> Raw:
    return Raw(rng.choice(NUMBERS))


def size(rng: random.Random) -> int:
    return rng.choice([0, 1, 2, 16, 17, 100, 1000, 10_001, 60_000])


def text(rng: random.Random) -> str:
    words = ["How many eggs? ", "a", " ", "\n", "\0", "\u2028", "\ud800", "é🙂", "<|end|>", "\\"]
    return rng.choice(words) * rng.choice([0, 1, 2, 30, 1000, 20_000])


def value(rng: random.Random) -> object:
    """Return anything that a field could be given."""
    kind = rng.randrange(8)
    if kind < 3:
        return number(rng)
    if kind == 3:
        return text(rng)
    if kind == 4:
        return [number(rng)] * size(rng)
    if kind == 5:
        depth = rng.choice([1, 50, 300, 900, 990, 1000, 5000])
        return Raw("[" * depth + "]" * depth)
    if kind == 6:
        return Raw(rng.choice(["9" * 5000, "-" + "9" * 4000, "1" * 4000 + ".0", "0." + "1" * 9000]))
    return {str(place): number(rng) for place in range(min(2000, size(rng)))}


def messages(rng: random.Random) -> list:
    """Return a conversation, long or strange."""
    count = rng.choice([1, 1, 2, 3, 40, 999, 1001])
    longest = 900_000 // count
    said = [text(rng)[: min(longest, 1000)] for _ in range(3)]
    if rng.random() < 0.05:
        said = ["apples and eggs " * (longest // 16)]
    roles = ["user", "assistant"] if rng.random() < 0.9 else ["system", "robot", "developer"]
    return [
        {"role": roles[place % len(roles)], "content": rng.choice(said)} for place in range(count)
    ]


def request(rng: random.Random, models: list[str]) -> tuple[str, str, bytes]:
    """Return (kind, path, body)."""
    path = rng.choice([*ROUTES, *list(ROUTES)[:2]])
    body = {"model": rng.choice(models)} | copy.deepcopy(ROUTES[path])
    if path == "/v1/heatmap":
        del body["model"]
    kind = rng.choice(["numbers", "numbers", "field", "sizes", "bytes"])
    if kind == "numbers":
        body |= {"stream": rng.random() < 0.3, "temperature": rng.choice([0, 1, 1.5])}
        names = ["seed", "max_tokens", "n", "top_k", rng.choice(FIELDS[:12])]
        body |= {name: number(rng) for name in rng.sample(names, rng.choice([1, 1, 1, 2]))}
        if path == "/v1/completions" and rng.random() < 0.5:
            body["prompt"] = [number(rng) for _ in range(rng.choice([1, 2, 3, 50]))]
    elif kind == "field":
        body |= {name: value(rng) for name in rng.sample(FIELDS, rng.randint(1, 3))}
    elif kind == "sizes":
        body |= {"fit": rng.random() < 0.7} if path != "/v1/completions" else {}
        if "messages" in body:
            body["messages"] = messages(rng)
        else:
            one = rng.choice([text(rng), [5] * max(1, size(rng)), [text(rng)[:100]] * 16])
            body["prompt"] = one
        if "answer" in body:
            body["answer"] = text(rng)
    data = raw(body).encode("utf-8", "surrogatepass")
    if kind == "bytes":
        cut = rng.randrange(len(data))
        junk = rng.choice([b"", b"\xff", b"\0", b"[" * 9000, b'{"a":', b"1e999", rng.randbytes(99)])
        data = data[:cut] + junk + data[cut + rng.choice([0, 1, 9]) :]
    return kind, path, data


def send(place: str, path: str, data: bytes, leave: str | None, patience: float):
    """Send a request and return its status and text; None where the client leaves at once."""
    connection = http.client.HTTPConnection(place, timeout=patience)
    try:
        connection.putrequest("POST", path)
        connection.putheader("Content-Type", "application/json")
        connection.putheader("Content-Length", str(len(data) + 9 * (leave == "early")))
        connection.endheaders()
        connection.send(data)
        if leave:
            return None, ""
        answer = connection.getresponse()
        return answer.status, answer.read().decode("utf-8", "replace")
    finally:
        connection.close()


def memory_mb(pid: int | str) -> float:
    """Return a process's resident memory."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status).group(1)) / 1024


class Fuzz:
    """Sends `count` requests to a server, and notes what is wrong."""

    def __init__(self, place: str, seed: int, count: int, patience: float = 60.0) -> None:
        self.place, self.patience, self.count, self.seed = place, patience, count, seed
        self.lock, self.next, self.seen = threading.Lock(), 0, collections.Counter()
        self.slowest, self.wrong, self.halted = (0.0, "", 0), [], threading.Event()
        connection = http.client.HTTPConnection(place, timeout=patience)
        connection.request("GET", "/v1/models")
        listed = json.loads(connection.getresponse().read())["data"]
        self.models = [entry["id"] for entry in listed]
        good = {"model": self.models[0], "prompt": "Ann has", "max_tokens": 8, "temperature": 0}
        self.good, self.goods = json.dumps(good).encode(), 0
        self.wanted = self.good_answer()

    def good_answer(self) -> object:
        for _ in range(400):  # it may be told that the server is busy
            status, said = send(self.place, "/v1/completions", self.good, None, self.patience)
            if status != 429:
                break
            time.sleep(0.1)
        return (
            [choice["text"] for choice in json.loads(said)["choices"]] if status == 200 else status
        )

    def client(self) -> None:
        while not self.halted.is_set():
            with self.lock:
                number, self.next = self.next, self.next + 1
            if number >= self.count:
                return
            rng = random.Random(f"{self.seed} {number}")
            kind, path, data = request(rng, self.models)
            leave = rng.choice(["early", "gone"]) if rng.random() < 0.05 else None
            began = time.monotonic()
            try:
                status, said = send(self.place, path, data, leave, self.patience)
            except OSError as broken:
                status, said = f"{type(broken).__name__}", ""
            took = time.monotonic() - began
            with self.lock:
                self.seen["left" if leave else kind, status] += 1
                self.slowest = max(self.slowest, (took, f"{kind} {path} {status}", number))
                bad = not leave and (not isinstance(status, int) or status >= 500 and status != 503)
                if bad or "server_error" in said and status == 200:
                    self.wrong.append(f"request {number} ({kind} {path}): {status} {said[:200]}")

    def canary(self) -> None:
        """Ask the good request over and over."""
        while not self.halted.wait(0.05):
            try:
                said = self.good_answer()
            except (OSError, ValueError) as broken:
                said = repr(broken)
            self.goods += 1
            if said != self.wanted:
                self.wrong.append(f"the good request was answered {said!r}")

    def run(self, clients: int, quarter=lambda: None) -> None:
        threads = [threading.Thread(target=self.client) for _ in range(clients)]
        watch = threading.Thread(target=self.canary)
        for thread in [*threads, watch]:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            if self.next >= self.count // 4:
                quarter()
                quarter = lambda: None  # noqa: E731
            if len(self.wrong) > 20:
                self.halted.set()
            time.sleep(0.05)
        self.halted.set()
        watch.join()


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--ckpt", required=True)
    parser.add_argument("--teacher")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest-s", type=float, default=60.0)
    parser.add_argument("--grown-mb", type=float, default=200.0)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    command = [sys.executable, "chat.py", "--ckpt", args.ckpt, "--serve", "--port", "0"]
    command += ["--device", "cpu", "--threads", "1", "--longest", "32"]
    command += ["--teacher", args.teacher] if args.teacher else []
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    said = ""
    while "Ctrl-C" not in said:
        said += (line := server.stdout.readline())
        if not line:
            sys.exit(f"error: the server did not start\n{said}")
    place, marks = re.search(r"http://([\d.:]+)", said).group(1), {}
    fuzz = Fuzz(place, args.seed, args.requests, args.longest_s)
    marks["start"], began = memory_mb(server.pid), time.monotonic()
    fuzz.run(args.clients, lambda: marks.update(quarter=memory_mb(server.pid)))
    time.sleep(12)  # the server gives free memory back every 10 s
    alive = server.poll() is None
    marks["end"] = memory_mb(server.pid) if alive else 0.0
    server.send_signal(signal.SIGTERM)
    code = server.wait(30)
    print(f"{sum(fuzz.seen.values())} requests in {time.monotonic() - began:.0f} s")
    for kind in sorted({kind for kind, _ in fuzz.seen}):
        each = {str(s): count for (k, s), count in sorted(fuzz.seen.items(), key=str) if k == kind}
        print(f"  {kind:8} " + "  ".join(f"{s}: {count}" for s, count in each.items()))
    print(f"good requests beside them: {fuzz.goods}; engine alive: {alive}; exit code {code}")
    print("memory, MB: " + ", ".join(f"{name} {mb:.0f}" for name, mb in marks.items()))
    print(f"slowest: {fuzz.slowest[0]:.1f} s, number {fuzz.slowest[2]} ({fuzz.slowest[1]})")
    if (grown := marks["end"] - marks["start"]) > args.grown_mb:
        fuzz.wrong.append(f"memory grew by {grown:.0f} MB")
    if not alive or code:
        fuzz.wrong.append("the server ended")
    print("\n".join(fuzz.wrong[:20]) or "nothing wrong")
    sys.exit(bool(fuzz.wrong))


if __name__ == "__main__":
    main()
