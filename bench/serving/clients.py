"""Do well-known clients of OpenAI's API run against chat.py --serve untouched? The openai SDK,
lm-eval and GuideLLM, with nothing from a hub.

    python bench/serving/clients.py --ckpt runs/demo/stage2/best --venv clients-venv

Installs the three into --venv, if they are not there (it sees this Python's packages, and changes
none of them), starts the server, and prints how many requests of each client were answered, failed,
and had fields ignored. The SDK makes every round trip with what it was answered; lm-eval runs a
multiple-choice and a generation task of its own (local yaml and json), by local-completions and by
local-chat-completions, and once more by its own transformers model: the log-likelihoods must be
the same; GuideLLM asks --asks times by both routes, with synthetic prompts. Exits with 1 where one
of these failed.
"""

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]
NEEDED = ("openai", "lm_eval[api]", "guidellm")
NAMES = "Ann Tom Leo Mia Eva Sara Hugo Ruth".split()
TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
KINDS = {
    "distil_choice": """output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}]
""",
    "distil_text": """output_type: generate_until
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 16, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


def sdk(url: str, model: str) -> None:
    """Make the SDK's round trips. Runs in the clients' Python."""
    import openai

    first = [{"role": "user", "content": "How many?"}]
    asked = {"model": model, "messages": first, "max_tokens": 8, "temperature": 0}
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        said = client.chat.completions.create(**asked).choices[0].message
        for echo in (said, said.to_dict(), said.model_dump(), dict(said)):
            again = asked | {"messages": [*first, echo, *first]}
            assert client.chat.completions.create(**again).choices[0].message.content
        chunks = client.chat.completions.create(**asked, stream=True)
        pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
        assert "".join(pieces) == said.content
        with client.chat.completions.stream(**asked) as stream:
            pieces = [event.delta for event in stream if event.type == "content.delta"]
            assert "".join(pieces) == said.content
        assert client.models.retrieve(model).id == client.models.list().data[0].id
        assert client.completions.create(model=model, prompt=["a", "b"], echo=True, max_tokens=0)

    async def at_once():
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            asks = [client.chat.completions.create(**asked) for _ in range(8)]
            return [made.choices[0].message.content for made in await asyncio.gather(*asks)]

    assert asyncio.run(at_once()) == [said.content] * 8
    print(f"openai {openai.__version__}: every round trip")


def command(name: str, python: Path, argv: list[str]) -> None:
    """Run a client's own program; its last words where it fails."""
    began, alone = time.monotonic(), {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    program = [python.parent / argv[0], *argv[1:]]
    made = subprocess.run(program, capture_output=True, text=True, env=os.environ | alone)
    if made.returncode:
        said = (made.stdout + made.stderr)[-3000:]
        sys.exit(f"error: {name} ended with {made.returncode}:\n{said}")
    print(f"{name}: {time.monotonic() - began:.0f} s")


def lm_eval(python: Path, folder: Path, url: str, ckpt: str, count: int) -> None:
    """Run the two tasks by each door, and compare."""
    rows = []
    for number in range(count):
        name, has, buys = NAMES[number % 8], 11 + 7 * number % 80, 12 + 5 * number % 60
        question = f"{name} has {has} apples. She buys {buys} more. How many apples has {name}?"
        choices = [f" {has + buys}", f" {has}", f" She has {buys} apples."]
        rows.append({"question": question, "choices": choices, "answer": 0})
    (folder / "rows.json").write_text(json.dumps(rows))
    for name, kind in KINDS.items():
        task = TASK.format(name=name, data=folder / "rows.json") + kind
        (folder / f"{name}.yaml").write_text(task)
    server = f"model={ckpt},max_retries=1,max_length=512,num_concurrent=4"
    whole = f"{server},base_url={url}/completions,tokenizer={ckpt}"
    ways = {
        "local-completions": (whole, "distil_choice,distil_text", []),
        "local-completions, batches of 8": (whole, "distil_choice", ["--batch_size", "8"]),
        "local-chat-completions": (
            f"{server},base_url={url}/chat/completions",
            "distil_text",
            ["--apply_chat_template"],
        ),
        "hf": (f"pretrained={ckpt},dtype=float32,max_length=512", "distil_choice,distil_text", []),
    }
    found = {}
    for number, (way, (model_args, tasks, more)) in enumerate(ways.items()):
        out = folder / f"out{number}"
        argv = ["lm-eval", "--model", way.split(",")[0], "--model_args", model_args]
        argv += ["--tasks", tasks, "--include_path", str(folder), "--output_path", str(out)]
        device = ["--device", "cpu"] if way == "hf" else []
        command(f"lm-eval, {way}", python, [*argv, "--log_samples", *device, *more])
        for file in out.rglob("samples_*.jsonl"):
            task = "choice" if "choice" in file.name else "text"
            lines = map(json.loads, file.read_text().splitlines())
            found[way, task] = [line["resps"] for line in sorted(lines, key=lambda x: x["doc_id"])]

    def scores(way):
        return [float(pair[0][0]) for row in found[way, "choice"] for pair in row]

    for way in list(ways)[:2]:
        far = max(abs(a - b) for a, b in zip(scores(way), scores("hf"), strict=True))
        print(f"  {way}: log-likelihoods within {far:.1e} of transformers'")
        if not far < 1e-2:
            sys.exit("error: these are others")
    same = sum(a == b for a, b in zip(found["local-completions", "text"], found["hf", "text"]))
    print(f"  greedy texts as transformers': {same} of {count}")


def main(argv=None):
    if sys.argv[1:2] == ["--sdk"]:
        return sdk(*sys.argv[2:4])
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument(
        "--ckpt",
        required=True,
        metavar="DIR",
        help="RUN/STAGE/best: the clients read its tokenizer",
    )
    parser.add_argument("--venv", required=True, type=Path, metavar="DIR", help="made if need be")
    parser.add_argument("--asks", type=int, default=32, metavar="N", help="of each client and way")
    args, rest = parser.parse_known_args(argv)  # the rest is chat.py's: --threads 2
    python = args.venv.absolute() / "bin/python"
    if not python.exists():
        venv.create(args.venv, with_pip=True)
        own = next(path for path in sys.path if path.endswith("site-packages"))
        (next(args.venv.glob("lib/*/site-packages")) / "beside.pth").write_text(own)
    subprocess.run([python, "-m", "pip", "install", "-q", *NEEDED], check=True, capture_output=True)
    show = "from importlib.metadata import version as v; print(*(f'{n} {v(n)}' for n in"
    subprocess.run([python, "-c", f"{show} ('openai', 'lm_eval', 'guidellm', 'datasets')))"])
    serve = [sys.executable, str(ROOT / "chat.py"), "--ckpt", args.ckpt, "--serve", "--port", "0"]
    server = subprocess.Popen([*serve, *rest], stdout=subprocess.PIPE, text=True)
    try:
        said = ""
        while not (found := re.search(r"http://\S+/v1", said)):
            said = server.stdout.readline() or sys.exit("error: the server did not start")
        url = found.group()
        command("openai", python, ["python", __file__, "--sdk", url, args.ckpt])
        with tempfile.TemporaryDirectory() as folder:
            lm_eval(python, Path(folder), url, args.ckpt, args.asks)
            for route in ("/v1/chat/completions", "/v1/completions"):
                backend = f"kind=openai_http,target={url[:-3]},request_format={route}"
                prompts = "kind=synthetic_text,prompt_tokens=32,output_tokens=16"
                argv = ["guidellm", "run", "--backend", backend, "--data", prompts]
                argv += ["--profile", "kind=concurrent,streams=4", "--tokenizer"]
                argv += [f"kind=huggingface_auto,model={args.ckpt}"]
                argv += ["--constraint", f"kind=max_requests,count={args.asks}"]
                argv += ["--output", f"kind=json,path={folder}/guide.json", "--disable-console"]
                command(f"GuideLLM, {route}", python, argv)
                made = json.loads(Path(folder, "guide.json").read_text())["benchmarks"][0]
                print(f"  {made['metrics']['request_totals']}")
        metrics = urllib.request.urlopen(url[:-3] + "/metrics").read().decode()
        print(*re.findall(r"distil_requests_total\{.*", metrics), sep="\n")
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
