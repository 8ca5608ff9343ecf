"""What a trainer says of memory before the first step, and what it takes."""

import re
import shlex
import subprocess
import time
from pathlib import Path

import make
import numpy as np
import pytest
from safetensors.torch import load_file

import chat
import dump_logits
import prepare_data
import stage1_sft
import stage2_kd
from lib import files, train


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
