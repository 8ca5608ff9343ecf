"""Tiny tokenizers, data sets, models and logits, made in the test: 61 tokens, width 32, two layers;
and scripts run in-process."""

import argparse
import gc
import importlib
import json
import multiprocessing
import os
import signal
import socket
import sys
import threading
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from lib import checkpoints, data, files, template
from lib.prepare import demo
from lib.teacher import logits

V = 61


def tokenizer(prefix: str = "w", size: int = V) -> PreTrainedTokenizerFast:
    words = ["<unk>", "<user>", "<assistant>", "<end>", *(f"{prefix}{i}" for i in range(size - 4))]
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", eos_token="<end>", pad_token="<end>"
    )
    made.chat_template = (
        "{% for m in messages %}{{ '<user> ' if m.role == 'user' else '<assistant> ' }}{{ m.content"
        " }}{{ ' <end> ' }}{% endfor %}{% if add_generation_prompt %}{{ '<assistant> ' }}{%"
        " endif %}"
    )
    return made


def dataset(
    folder: Path,
    rows: int = 40,
    val: int = 8,
    rows_per_chunk: int = 20000,
    seed: int = 0,
    longest: int = 20,
    maker=None,
) -> data.Dataset:
    """Write a prepared data set of random rows (no prepare_data.py): the last third or so of each
    row are targets, ended by <end>."""
    rng, folder = np.random.default_rng(seed), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    made = maker or tokenizer()
    counts, targets = {}, {}
    for name, count in (("train", rows), ("val", val)):
        tokens, answer, records, start, first = [], [], np.zeros(count, data.ROW), 0, 0
        for i in range(count):
            length = int(rng.integers(6, longest + 1))
            ids = rng.integers(4, len(made), length)
            # a pattern that can be learnt: each target repeats the first token
            cut = length - int(rng.integers(2, max(3, length // 2)))
            ids[cut:] = ids[0]
            ids[-1] = 3
            mask = np.arange(length) >= cut
            records[i] = (start, length, first, mask.sum(), 0)
            start, first = start + length, first + int(mask.sum())
            tokens.append(ids)
            answer.append(mask)

        def join(parts, dtype):
            return np.concatenate(parts).astype(dtype) if parts else np.zeros(0, dtype)

        np.save(folder / f"{name}.tokens.npy", join(tokens, np.uint32))
        np.save(folder / f"{name}.answer.npy", join(answer, bool))
        np.save(folder / f"{name}.rows.npy", records)
        counts[name], targets[name] = count, first
    made.save_pretrained(folder / "tokenizer")
    parts = [
        folder / f"{name}.{part}.npy"
        for name in ("train", "val")
        for part in ("tokens", "answer", "rows")
    ]
    files.write_json(
        folder / "meta.json",
        {
            "format": data.FORMAT,
            "identities": template.identities(made) | {"data": files.sha256(*parts)},
            "rows": counts,
            "targets": targets,
            "sources": [],
            "rows_per_chunk": rows_per_chunk,
            "seed": seed,
        },
    )
    return data.Dataset(folder)


def config(vocab: int = V, width: int = 32, layers: int = 2, **more) -> LlamaConfig:
    options = dict(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=3,
        pad_token_id=3,
    )
    return LlamaConfig(**options | more)


def model(folder: Path, seed: int = 0, scale: float = 8.0, with_tokenizer=True, **options) -> Path:
    """Save a random model whose logits are spread enough (times `scale`) that its softmax is far
    from flat."""
    torch.manual_seed(seed)
    made = AutoModelForCausalLM.from_config(config(**options))
    with torch.no_grad():
        made.get_input_embeddings().weight *= scale
    made.save_pretrained(folder)
    if with_tokenizer:
        (tokenizer() if with_tokenizer is True else with_tokenizer).save_pretrained(folder)
    return Path(folder)


# A run whose outcome is certain on every machine, whatever its kernels round:
TOO_FAST = ("--lr", 3, "--warmup", 0)  # each step moves each weight by about 3: all gets worse
NO_STEP = 1e-30  # a learning rate that changes no bit of a weight
# all rows in every step, and steps so short that each of them goes downhill
DOWNHILL = "--steps 8 --tokens-per-step 10000 --lr 1e-3 --warmup 0".split()


def assert_falls(losses: list[float]) -> None:
    """Assert that a loss falls at each of the steps of a run that goes DOWNHILL, by far more than
    its rounding."""
    steps = np.diff(losses) / losses[0]
    assert len(steps) > 1 and (steps < -1e-4).all(), losses


def chat_run(folder: Path, picture: bytes) -> Path:
    """Write a run's folder, stage2/ and teacher/: random models of the demo's tokens, their weights
    large enough that their answers wander."""
    for seed, name in enumerate(("stage2", "teacher")):
        torch.manual_seed(seed)
        made = demo.config(
            {
                "num_hidden_layers": 2,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
            }
        )
        made.initializer_range = 0.3
        AutoModelForCausalLM.from_config(made).save_pretrained(folder / name / "best")
        demo.tokenizer().save_pretrained(folder / name / "best")
    (folder / "stage2" / "history.jsonl").write_text("{}\n")
    (folder / "stage2" / "curves.png").write_bytes(picture)
    (folder / "comparison.html").write_text("<title>comparison</title>")
    return folder


CPU = (
    "--device",
    "cpu",
    "--threads",
    "1",
)  # two threads only wait for one another on models this small
QUICK = (
    "--samples",
    "0",
    "--tokens-per-step",
    "128",
    "--tokens-per-microbatch",
    "64",
    "--lr",
    "1e-2",
    "--log-every",
    "1",
    *CPU,
)  # ten rows a step


def call(main, *argv) -> None:
    """Run a script's main(argv) in this process, and let go of its lock and signal handlers
    afterwards, however it ends."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        main([str(word) for word in argv])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        gc.collect()


def ends(main, *argv) -> tuple[int, str]:
    """Run a script that is to end by SystemExit: return its exit code, and its last words if they
    are its code."""
    try:
        call(main, *argv)
    except SystemExit as end:
        words, code = (end.code, 1) if isinstance(end.code, str) else ("", end.code or 0)
    else:
        raise AssertionError(f"{main.__module__} {argv} ran to its end")
    gc.collect()
    return code, words


def world(folder: Path, **options) -> Path:
    """Write data/, student/ (seed 1) and teacher/ (seed 2) into a folder."""
    dataset(folder / "data", **options)
    model(folder / "student", seed=1)
    model(folder / "teacher", seed=2)
    return folder


def sourced(folder: Path, bounds=(0, 30), names=("general", "finance"), **more) -> Path:
    """Make the rows of a `world` those of named sources: source j begins at row bounds[j] of train;
    val rows take turns."""
    for name in ("train", "val"):
        rows = np.load(folder / "data" / f"{name}.rows.npy")
        count = np.arange(len(rows))
        rows["source"] = (
            np.searchsorted(bounds, count, side="right") - 1
            if name == "train"
            else count % len(names)
        )
        np.save(folder / "data" / f"{name}.rows.npy", rows)
    meta = files.read_json(folder / "data" / "meta.json")
    files.write_json(
        folder / "data" / "meta.json", meta | {"sources": [{"name": name} for name in names]} | more
    )
    return folder


def own_text(folder: Path, bounds=(0, 30), writer: str = "student", **more) -> Path:
    """Make the rows of a `world` from bounds[1] on of train, and every other one of val, the text of
    a source `mine` that `writer` wrote, as prepare_data.py --answers student leaves it."""
    about = {
        "student": str(folder / writer),
        "weights": checkpoints.identity(folder / writer),
        "sampling": {"temperature": 1.0},
        "generations": 1,
        "mean_tokens": 4.0,
        "ended": 1.0,
        "entropy": 2.0,
    }
    sourced(folder, bounds, ("given", "mine"), own=["mine"], student=about, **more)
    module = AutoModelForCausalLM.from_pretrained(folder / writer)
    for name in ("train", "val"):
        split = data.Split(folder / "data", name)
        logp = np.full(len(split.rows), np.nan, np.float32)
        for row in np.flatnonzero(split.rows["source"] == 1).tolist():
            ids, answer = split.row(row)
            with torch.no_grad():
                known = module(torch.tensor(ids.astype(np.int64))[None]).logits[0].log_softmax(-1)
            logp[row] = sum(known[at - 1, ids[at]].item() for at in np.flatnonzero(answer))
        np.save(folder / "data" / f"{name}.logp.npy", logp)
    return folder


def stage1(folder: Path, *more, out: str = "stage1") -> list:
    """Return stage1_sft.py's arguments for a `world`."""
    return [
        "--data",
        folder / "data",
        "--student",
        folder / "student",
        "--out",
        folder / out,
        *QUICK,
        *more,
    ]


def dump(folder: Path, *more, out: str = "logits") -> list:
    """Return dump_logits.py's arguments for a `world`."""
    return [
        "--data",
        folder / "data",
        "--teacher",
        folder / "teacher",
        "--out",
        folder / out,
        "--k",
        8,
        *CPU,
        *more,
    ]


def stage2(folder: Path, *more, out: str = "stage2", logits: str = "logits") -> list:
    """Return stage2_kd.py's arguments for a `world`."""
    return [
        "--data",
        folder / "data",
        "--logits",
        folder / logits,
        "--student",
        folder / "student",
        "--out",
        folder / out,
        *QUICK,
        *more,
    ]


def live(folder: Path, *more, out: str = "live") -> list:
    """Return stage2_kd.py's arguments for a `world` whose teacher runs beside the student."""
    return [
        "--data",
        folder / "data",
        "--teacher",
        folder / "teacher",
        "--student",
        folder / "student",
        "--out",
        folder / out,
        *QUICK,
        *more,
    ]


TIMES = {"tok_per_s", "left_s", "time_s", "own_time"}


def store(
    folder: Path, temperature: float | None = 2.0, name: str = "logits", **options
) -> logits.Records:
    """Open the dump of a world."""
    return logits.Records(folder / name, data.Dataset(folder / "data"), temperature, **options)


def plan_args(**settings) -> argparse.Namespace:
    """Return what lib/plan.py asks of a trainer's flags."""
    plain = dict(
        seed=0, tokens_per_microbatch=4096, epochs=1.0, steps=0, attn="sdpa", no_pack=False
    )
    return argparse.Namespace(**plain | settings)


def history(folder: Path, event: str | None = None) -> list[dict]:
    """Return a run's log lines without what is a matter of time."""
    lines = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if name not in TIMES}
        for line in lines
        if event in (None, line["event"])
    ]


def processes():
    """Return a context whose processes are forked, in milliseconds, from one that has imported
    everything and run nothing."""
    context = multiprocessing.get_context("forkserver")
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
    )
    context.set_forkserver_preload(
        [
            "make",
            "stage1_sft",
            "stage2_kd",
            "dump_logits",
            "chat",
            "transformers.models.llama.modeling_llama",
            "lib.options.shard",
        ]
    )
    return context


def never_ends(module: str, owner: str, method: str, name: str, argv: list, log: Path) -> None:
    """Run a script in which a method of lib/`module` computes for ever."""

    def forever(*_):
        while True:
            torch.rand(300, 300) @ torch.rand(300, 300)

    setattr(getattr(importlib.import_module(f"lib.{module}"), owner), method, forever)
    script(name, argv, log)


def script(name: str, argv: list, log: Path, hook: dict | None = None) -> None:
    """Run a script in a process of `processes()`, its words into `log`.

    hook: `where` "module.function", `number` n, `signal`, `after` False, `source` "", `delay` 0:
    the process sends itself the signal at the n-th call (before the call, or after it, or so many
    seconds later; of calls on a path that ends in `source`, if it is given).
    """
    from lib.measure import plots
    from lib.options import shard
    from lib.teacher import writer

    sys.stdout = sys.stderr = open(log, "a", buffering=1)
    torch.set_num_threads(int(os.environ.get("TEST_THREADS", 1)))
    plots.curves, writer.FLUSH_S, shard.FILE_BYTES = lambda *_: None, 0.0, 1 << 12
    if hook:
        module, function = hook["where"].rsplit(".", 1)
        module, count = importlib.import_module(module), 0
        plain = getattr(module, function)

        def counted(*args, **options):
            nonlocal count
            count += not hook.get("source") or Path(args[0]).as_posix().endswith(
                "/" + hook["source"]
            )
            now = count == hook["number"]
            if now and hook.get("delay"):
                threading.Timer(hook["delay"], os.kill, (os.getpid(), hook["signal"])).start()
            elif now and not hook.get("after"):
                os.kill(os.getpid(), hook["signal"])
            value = plain(*args, **options)
            if now and hook.get("after"):
                os.kill(os.getpid(), hook["signal"])
            return value

        setattr(module, function, counted)
    importlib.import_module(name).main([str(word) for word in argv])


def as_rank(rank, port, several, name, argv, log, hook):
    """What a process of torchrun's does."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(several),
        LOCAL_WORLD_SIZE=str(several),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        GLOO_SOCKET_IFNAME="lo",  # whatever the machine's name resolves to
    )
    script(name, argv, log, hook)


def together(several, name, argv, log: Path, hooks=()):
    """Run a script in several ranks; hooks: of some, by their number. Return their exit codes."""
    hooks, logs = dict(hooks), [log.with_name(f"{log.name}-{rank}") for rank in range(several)]
    return at_once(
        as_rank, [(several, name, argv, logs[rank], hooks.get(rank)) for rank in range(several)]
    )


def at_once(target, words):
    """Run target(rank, port, *words[rank]) in as many processes; return their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = processes()
    started = [
        context.Process(target=target, args=(rank, port, *words[rank]))
        for rank in range(len(words))
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
        process.kill()
    return [process.exitcode for process in started]
