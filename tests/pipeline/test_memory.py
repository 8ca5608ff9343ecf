"""What a trainer says of memory before the first step, and what it takes."""

import re
import shlex
import subprocess
import time
from pathlib import Path

import make
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, modeling_utils

import chat
import dump_logits
import prepare_data
import stage1_sft
import stage2_kd
from lib import data, files, losses, models, plan, train


def resident(key: str) -> int:
    """Return a figure of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def measured(argv: list, log: Path, out: Path) -> None:
    """Run two steps, and write by how many bytes the process grew at most, from the moment on that
    the figures were said."""
    from lib.run import Run

    plain = train.check_space
    base = []

    def noted(*args, **more):
        plain(*args, **more)
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
        base.append(resident("VmRSS"))

    train.check_space = noted
    Run.save = Run.export = lambda *_: None  # what is under test is the steps
    make.script("stage1_sft", argv, log)
    out.write_text(str(resident("VmHWM") - base[0]))


def test_memory_is_told_to_within_a_fifth_before_the_first_step(tmp_path):
    words = make.tokenizer(size=8192)
    make.dataset(tmp_path / "data", rows=160, val=2, longest=60, maker=words)
    shape = dict(vocab=8192, width=256, layers=4, intermediate_size=682)
    make.config(**shape).save_pretrained(tmp_path / "student")
    words.save_pretrained(tmp_path / "student")
    size = ("--steps", 2, "--tokens-per-step", 4096, "--tokens-per-microbatch", 2048)
    argv, log, peak = make.stage1(tmp_path, *size), tmp_path / "log", tmp_path / "peak"
    process = make.processes().Process(target=measured, args=(argv, log, peak))
    process.start()
    process.join()
    (said,) = re.findall(r"memory: about ([0-9.]+) MB more needed", log.read_text())
    assert 0.8 < float(said) * 1e6 / int(peak.read_text()) < 1.2, (said, peak.read_text())


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = make.world(tmp_path_factory.mktemp("world"))
    make.call(dump_logits.main, *make.dump(folder))
    (folder / "rows.jsonl").write_text('{"instruction": "w1 w2", "output": "w3"}\n')
    return folder


def state(folder: Path) -> dict:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize("fresh", ((), ("--fresh",)))
def test_a_dry_run_says_the_figures_and_writes_nothing(world, capsys, fresh):
    before, new = state(world), ("--out", world / "new")
    prepare = ["--source", world / "rows.jsonl", "--tokenizer", world / "student", *new]
    for main, argv, wanted in (
        (prepare_data.main, prepare, "prepare rows="),
        (stage1_sft.main, make.stage1(world, "--steps", 2), "memory: about"),
        (dump_logits.main, make.dump(world, *new), "memory: about"),
        (stage2_kd.main, make.stage2(world, "--steps", 2), "memory: about"),
        (stage2_kd.main, make.live(world, "--eval-only"), "--dry-run"),
        (chat.main, ["--ckpt", world / "student", *make.CPU, "--serve"], "memory: "),
    ):
        try:
            make.call(main, *argv, "--dry-run", *fresh)
        except SystemExit as end:
            assert not end.code
        said = capsys.readouterr().out
        assert wanted in said and "--dry-run: nothing" in said, said
        assert state(world) == before, main.__module__


def test_the_disk_that_a_dry_run_says_is_what_the_dump_takes(world, capsys):
    argv = make.dump(world, "--out", world / "exact")
    make.call(dump_logits.main, *argv, "--dry-run")
    said = capsys.readouterr().out
    make.call(dump_logits.main, *argv)
    taken = sum(np.load(path).nbytes for path in (world / "exact").rglob("topk.npy"))
    taken += sum(one.nbytes for one in load_file(world / "exact" / "basis.safetensors").values())
    size = taken  # but for the files' heads
    assert f"disk: {files.human(size)} to be written" in said, (size, said)


def test_what_a_stage_says_comes_next_is_a_command_that_works(world, capsys):
    out = world / "named" / "stage1"
    make.call(stage1_sft.main, *make.stage1(world, "--steps", 1, "--out", out))
    said = capsys.readouterr().out.splitlines()[-1]
    dump, train2 = re.findall(r"python \w+\.py (.*?)(?:, then|; or talk)", said)
    args = dump_logits.parse_args(shlex.split(dump))
    assert (args.data, args.student) == (str(world / "data"), str(out))
    args = stage2_kd.parse_args(shlex.split(train2))
    assert (args.student, args.logits) == (str(out), "logits/data")
    make.call(
        stage1_sft.main,
        *make.stage1(world, "--steps", 1, "--student", out, "--out", world / "named" / "control"),
    )
    assert "Next:" not in capsys.readouterr().out, "a control has no use for logits"
    make.call(dump_logits.main, *make.dump(world, "--student", out, "--chunk", "val"))
    argv = capsys.readouterr().out.split("stage2_kd.py ")[1]
    args = stage2_kd.parse_args(shlex.split(argv))
    assert (args.student, args.logits) == (str(out), str(world / "logits"))


def test_make_says_where_args_goes_and_help_names_every_variable():
    root = Path(__file__).parents[2]

    def made(*words):
        return subprocess.run(["make", "-n", *words], cwd=root, capture_output=True, text=True)

    assert "goes to each of: stage1 stage2" in made("stage1", "stage2", "ARGS=--lr 1").stdout
    assert "goes to each of" not in made("stage1", "ARGS=--lr 1").stdout
    text = (root / "Makefile").read_text()
    said = made("help").stdout
    for name in {*re.findall(r"\$\((\w+_ARGS)\)", text), "MODELS", "RUNS", "SCORE"}:
        assert name in said, name


def test_what_takes_long_says_so_again_and_again(capsys):
    with files.telling("fitting", every_s=0.01):
        time.sleep(0.2)
    assert capsys.readouterr().err.count("fitting: 0 s so far") > 1


class Sizes(TorchDispatchMode):
    """Notes the largest tensor that an operation returns, in elements."""

    largest = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        made = operation(*args, **(kwargs or {}))
        for one in made if isinstance(made, tuple | list) else (made,):
            if isinstance(one, torch.Tensor):
                self.largest = max(self.largest, one.numel())
        return made


def tiny(seed: int = 0, **options) -> models.Model:
    torch.manual_seed(seed)
    module = AutoModelForCausalLM.from_config(make.config(**options), attn_implementation="sdpa")
    return models.Model(module.train(), module.base_model, Path("random"))


def rows_of(*lengths: int) -> data.Split:
    random = np.random.default_rng(0)
    return data.Split.of(
        [(random.integers(0, make.V, n).astype(np.uint32), np.arange(n) > 0, 0) for n in lengths]
    )


def backward(student: models.Model, batch: data.Batch) -> list[torch.Tensor]:
    student.module.zero_grad()
    losses.head_loss(student.hidden(batch), student.head(), batch.labels)[0].backward()
    return [p.grad.clone() for p in student.module.parameters()]


@pytest.mark.parametrize("pack", (True, False))
def test_no_tensor_grows_with_the_square_of_a_row(monkeypatch, pack):
    monkeypatch.setattr(plan, "MASKED", 128)

    def largest(longest: int) -> int:
        split = rows_of(longest, longest * 3 // 4, 128, 100, 60, 30, 20)
        lengths, tokens = split.rows["length"], 2 * longest
        line = plan.line_length(lengths, tokens, "sdpa") if pack else longest
        with Sizes() as sizes:
            for lines in plan.microbatches(np.arange(7), lengths, tokens, line, pack):
                backward(tiny(), split.batch(lines))
        return sizes.largest

    one, two = largest(512), largest(1024)
    assert two <= 2 * one and two < 1024**2 / 8, (one, two)


@pytest.mark.parametrize("lines", ([[0]], [[1, 2], [3]]), ids=("alone", "packed"))
def test_checkpointing_in_the_cpus_memory_gives_the_same_gradient_bit_for_bit(monkeypatch, lines):
    moved = []

    class Moving(torch.autograd.graph.saved_tensors_hooks):
        """As torch's own, which needs a GPU: what it would move is noted."""

        def __init__(self, pin_memory, device_type):
            super().__init__(
                lambda kept: moved.append(kept.clone()) or moved[-1], lambda kept: kept
            )

    monkeypatch.setattr(modeling_utils, "save_on_cpu", Moving)
    batch, gradients = rows_of(90, 40, 30, 20).batch(lines), {}
    for how in (None, "on", "offload"):
        student = tiny(layers=3)
        with monkeypatch.context() as patch:
            patch.setattr(models.Model, "device", torch.device("cuda"))
            if how:
                train.checkpoint(student, how)
        moved.clear()
        gradients[how] = backward(student, batch)
        assert len(moved) == (3 if how == "offload" else 0), "the states before each layer, no more"
    assert all(kept.shape == (*batch.tokens.shape, 32) for kept in moved)
    for how in ("on", "offload"):
        assert all(map(torch.equal, gradients[how], gradients[None])), how


def test_on_the_cpu_nothing_is_moved_and_what_is_said_of_memory_counts_what_stays(monkeypatch):
    student, most = tiny(layers=4), train.Largest(1 << 20, 8, 1)
    assert not train.is_offloaded(student, "offload")
    train.checkpoint(student, "offload")  # torch would refuse to pin memory here
    backward(student, rows_of(30).batch([[0]]))
    monkeypatch.setattr(models.Model, "device", torch.device("cuda"))
    on, off = (train.training_bytes(student, most, 0, None, how) for how in ("on", "offload"))
    assert on - off == (1 << 20) * 3 * 32 * 4, "of four layers' states one is there"


def test_the_word_behind_checkpointing_may_be_left_out():
    def said(*words):
        argv = ["--data", "d", "--student", "s", "--out", "o", *words, "--lr", "1"]
        return stage1_sft.parse_args(argv).checkpointing

    assert (said(), said("--checkpointing")) == (None, "on")
    assert said("--checkpointing", "offload") == "offload"
