"""Several ranks of torchrun train as one process does: the same plan, the same losses, the same
weights; killed and signalled, they go on. Each rank is a process here, with torchrun's variables
(and once torchrun itself)."""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import make
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import test_classify
import torch
from make import together
from safetensors.torch import load_file

import dump_logits
import stage1_sft
import stage2_kd
from lib import plan
from lib.measure import plots
from lib.options import ranks

STEPS = (
    "--steps 9 --eval-every 6 --save-every 2 --log-every 1 --samples 1 --sample-tokens 3".split()
)
STEPS += "--tokens-per-step 150 --tokens-per-microbatch 50 --lr 1e-2 --device cpu".split()
MAINS = {"stage1_sft": stage1_sft.main, "stage2_kd": stage2_kd.main}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = make.world(tmp_path_factory.mktemp("ranks"))
    (folder / "own").mkdir()
    make.own_text(make.world(folder / "own"))
    make.model(folder / "untied", seed=1, tie_word_embeddings=False)
    make.call(dump_logits.main, *make.dump(folder, "--tail-rank", 8, "--tail-bytes", 8))
    return folder


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classes")
    pq.write_table(pa.Table.from_pylist(test_classify.rows(60)), folder / "rows.parquet")
    test_classify.encoder_tokenizer().save_pretrained(folder / "tok")
    none = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)  # masks are each rank's
    test_classify.config("bert", 44, 16, **none).save_pretrained(folder / "student")
    test_classify.encoder_tokenizer().save_pretrained(folder / "student")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(plots, "prepared", lambda folder: None)
        test_classify.prepare(folder, folder / "rows.parquet", "--val", "20")
    return folder


def words_of(world, kind):
    """Return the script of a kind of run, and its arguments but --out."""
    data = ["--data", world / "data", "--student", world / "student", *STEPS]
    live = ["--teacher", world / "teacher"]
    if kind == "sft":
        return "stage1_sft", data
    if kind == "untied":
        return "stage1_sft", ["--data", world / "data", "--student", world / "untied", *STEPS]
    if kind == "lora":
        return "stage1_sft", [*data, "--lora-rank", 2]
    if kind == "disk":
        return "stage2_kd", [*data, "--logits", world / "logits"]
    if kind == "few":  # rows in a step, fewer than ranks
        return "stage2_kd", [*data, "--logits", world / "logits", "--tokens-per-step", 12]
    if kind == "own":  # of two sources, one of them the student's own text; live
        own = world / "own"
        data = ["--data", own / "data", "--student", own / "student", *STEPS]
        return "stage2_kd", [*data, "--teacher", own / "teacher"]
    if kind in ("live", "tp"):
        return "stage2_kd", [*data, *live]
    if kind == "tp and k":  # an output layer of its own; steps with fewer rows than ranks
        few = ["--k", 5, "--tokens-per-step", 12]
        return "stage2_kd", [*data, "--teacher", world / "untied", *few]
    if kind == "policy":
        return "stage2_kd", [*data, *live, "--on-policy", 0.6]
    beside = ["--feature-weight", 1, "--attention-weight", 1, "--contrastive-weight", 0.5]
    if kind == "balanced":
        beside += ["--balance", "gradnorm", "--balance-every", 2]
    return "stage2_kd", [*data, *live, *beside]


def weights(run):
    return load_file(next((run / "final").glob("*.safetensors")))


def assert_same(one, other, exactly=False):
    """One run's losses and weights are the other's: bit for bit, or to float32's rounding."""
    lines = [make.history(run) for run in (one, other)]
    assert [(a["event"], a["step"]) for a in lines[0]] == [
        (b["event"], b["step"]) for b in lines[1]
    ]
    for a, b in zip(*lines):
        for name in {*a} - {"event", "step", "time_s", "tok_per_s", "left_s"}:
            assert (
                a[name] == b[name]
                if exactly
                else a[name] == pytest.approx(b[name], rel=2e-5, abs=1e-6)
            ), (a, b)
        assert a.get("targets") == b.get("targets")
    first, second = weights(one), weights(other)
    for name, tensor in first.items():
        if exactly:
            assert torch.equal(tensor, second[name]), name
        else:
            torch.testing.assert_close(tensor, second[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("several", (1, 2, 3, 7))
def test_each_row_of_a_step_is_one_ranks_and_all_have_alike(several):
    draw = np.random.default_rng(several)
    lengths = draw.integers(1, 90, 400).astype(np.uint32)
    rows = draw.permutation(400)[:120]
    parts = [plan.dealt_to(rows, lengths, number, several) for number in range(several)]
    assert sorted(np.concatenate(parts).tolist()) == sorted(rows.tolist())
    tokens = [int(lengths[part].sum()) for part in parts]
    assert max(tokens) - min(tokens) <= 90


def test_the_example_of_part_of():
    lengths = np.array([5, 4, 3, 3], np.uint32)
    assert plan.dealt_to(np.arange(4), lengths, 0, 2).tolist() == [0, 3]
    assert len(plan.dealt_to(np.arange(1), lengths, 1, 2)) == 0


@pytest.mark.parametrize(
    "kind, several, shard",
    [
        ("disk", 4, "none"),
        ("few", 3, "none"),
        ("lora", 2, "none"),
        ("balanced", 2, "none"),
        ("policy", 3, "none"),
        ("untied", 2, "fsdp"),
        ("disk", 3, "fsdp"),
        ("few", 3, "fsdp --cpu-offload"),
        ("own", 2, "fsdp --checkpointing"),
        ("lora", 2, "fsdp"),
        ("beside", 2, "fsdp"),
        ("tp", 2, "none"),
        ("tp", 2, "fsdp"),
        ("tp and k", 2, "none"),
    ],
)
def test_several_ranks_train_as_one_process(world, tmp_path, kind, several, shard):
    name, argv = words_of(world, kind)
    make.call(MAINS[name], *argv, "--out", tmp_path / "one")
    argv = [*argv, *["--tp"] * kind.startswith("tp"), "--shard", *shard.split()]
    codes = together(several, name, [*argv, "--out", tmp_path / "all"], tmp_path / "log")
    said = (tmp_path / "log-0").read_text()
    assert codes == [0] * several, said + (tmp_path / "log-1").read_text()
    assert_same(tmp_path / "one", tmp_path / "all")
    assert (tmp_path / "one" / "samples.md").exists() and (tmp_path / "all" / "samples.md").exists()
    assert "eval step 9" in said and "eval" not in (tmp_path / "log-1").read_text()


def test_ranks_train_a_classifier_as_one_process(classes, tmp_path):
    argv = ["--data", classes / "data", "--student", classes / "student", *STEPS]
    make.call(stage1_sft.main, *argv, "--out", tmp_path / "one")
    argv = [*argv, "--shard", "fsdp", "--out", tmp_path / "all"]
    assert together(2, "stage1_sft", argv, tmp_path / "log") == [0, 0]
    assert_same(tmp_path / "one", tmp_path / "all")


@pytest.mark.parametrize("shard", ("none", "fsdp"))
def test_a_killed_rank_ends_the_others_and_they_go_on_to_the_same_bits(world, tmp_path, shard):
    name, argv = words_of(world, "disk")
    argv += ["--shard", shard]
    straight, killed = (
        [*argv, "--out", tmp_path / "straight"],
        [*argv, "--out", tmp_path / "killed"],
    )
    assert together(2, name, straight, tmp_path / "log") == [0, 0]
    hook = dict(where="lib.train.update", number=6, signal=signal.SIGKILL)
    codes = together(2, name, killed, tmp_path / "log-killed", {1: hook})
    assert codes[1] == -signal.SIGKILL and codes[0] == 1
    assert "has lost another one" in (tmp_path / "log-killed-0").read_text()
    assert (tmp_path / "killed" / "last").exists()
    whole = (tmp_path / "killed" / "last" / "weights.safetensors").exists()
    assert whole == (shard == "none")
    assert whole or len([*(tmp_path / "killed" / "last").glob("*.safetensors")]) > 8
    assert together(2, name, killed, tmp_path / "log-again") == [0, 0]
    assert_same(tmp_path / "straight", tmp_path / "killed", exactly=True)


@pytest.mark.parametrize("shards", (("fsdp", "none"), ("none", "fsdp")))
def test_a_signal_to_one_rank_saves_and_another_number_of_ranks_goes_on(world, tmp_path, shards):
    name, argv = words_of(world, "disk")
    argv = [*argv, "--out", tmp_path / "run"]
    make.call(MAINS[name], *argv[:-1], tmp_path / "one")
    hook = dict(where="lib.train.update", number=3, signal=signal.SIGTERM)
    four = [*argv, "--shard", shards[0]]
    codes = together(4, name, four, tmp_path / "log", {2: hook})
    assert codes[0] == 128 + signal.SIGTERM, (tmp_path / "log-0").read_text()
    assert "saved at step" in (tmp_path / "log-0").read_text()
    hook = dict(where="lib.train.update", number=3, signal=signal.SIGTERM)
    two = [*argv, "--shard", shards[1]]
    codes = together(2, name, two, tmp_path / "more", {0: hook})
    assert codes[0] == 128 + signal.SIGTERM, (tmp_path / "more-0").read_text()
    make.call(MAINS[name], *argv)
    assert_same(tmp_path / "one", tmp_path / "run")


def test_signals_to_all_ranks_and_a_folder_named_by_the_date(world, tmp_path):
    name, argv = words_of(world, "disk")
    make.call(MAINS[name], *argv, "--out", tmp_path / "one")
    argv = [*argv, "--out", tmp_path / "run", "--tag", "auto"]
    hook = dict(where="lib.train.update", number=4, signal=signal.SIGTERM)
    codes = together(2, name, argv, tmp_path / "log", {0: hook, 1: hook})
    assert codes[0] == 128 + signal.SIGTERM, (tmp_path / "log-0").read_text()
    assert together(2, name, argv, tmp_path / "more") == [0, 0], (tmp_path / "more-1").read_text()
    (run,) = tmp_path.glob("run-*")
    assert_same(tmp_path / "one", run)


@pytest.mark.parametrize("shard", ("none", "fsdp"))
def test_in_float16_a_rank_without_rows_takes_the_same_steps(world, tmp_path, shard):
    name, argv = words_of(world, "few")
    argv = [*argv, "--amp", "fp16", "--steps", 4, "--samples", 0, "--shard", shard]
    make.call(MAINS[name], *argv, "--out", tmp_path / "one")
    assert together(3, name, [*argv, "--out", tmp_path / "all"], tmp_path / "log") == [0, 0, 0]
    first, second = (make.history(tmp_path / run, "train") for run in ("one", "all"))
    assert [a["loss"] for a in first] == pytest.approx([b["loss"] for b in second], rel=1e-2)


def test_a_finished_run_is_finished_for_all(world, tmp_path):
    name, argv = words_of(world, "sft")
    argv = [*argv, "--out", tmp_path / "run"]
    assert together(2, name, argv, tmp_path / "log") == [0, 0]
    assert together(2, name, argv, tmp_path / "again") == [0, 0]
    assert "already finished" in (tmp_path / "again-0").read_text()


@pytest.mark.parametrize(
    "more",
    [
        "--eval-only",
        "--on-policy 0.5 --shard fsdp",
        "--balance gradnorm --feature-weight 1 --shard fsdp",
        "--device cpu:0",
        "--compile --shard fsdp",
        "--teacher-offload",
        "--device-map auto",
    ],
)
def test_what_one_process_alone_does_is_refused_in_one_line(world, tmp_path, monkeypatch, more):
    for variable, value in dict(WORLD_SIZE=2, RANK=0, LOCAL_RANK=0, LOCAL_WORLD_SIZE=2).items():
        monkeypatch.setenv(variable, str(value))
    name, argv = words_of(world, "live")
    code, said = make.ends(MAINS[name], *argv, "--out", tmp_path / "run", *more.split())
    assert code == 1 and f"{more.split()[0]}" in said and "without torchrun" in said


KILLS = int(os.environ.get("RANK_KILLS", 0))  # of four ranks; none: one kill, of two


@pytest.mark.parametrize("turn", range(max(1, KILLS)))
def test_torchrun_starts_again_what_a_kill_has_ended(world, tmp_path, turn):
    several, random = 4 if KILLS else 2, np.random.default_rng(turn)
    name, argv = words_of(world, "disk")
    argv += ["--shard", ("fsdp", "none")[turn % 2], "--save-every", 2]
    assert together(several, name, [*argv, "--out", tmp_path / "one"], tmp_path / "log")[0] == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts", 1]
    command += ["--local-addr", "127.0.0.1", "--nproc-per-node", several]
    script = Path(__file__).parents[2] / f"{name}.py"
    words = [*command, script, *argv, "--out", tmp_path / "all", "--threads", 1]
    env = os.environ | {"GLOO_SOCKET_IFNAME": "lo"}
    with open(tmp_path / "said", "w") as said:
        run = subprocess.Popen([*map(str, words)], stdout=said, stderr=said, env=env)
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children")
        log, at = tmp_path / "all" / "history.jsonl", int(random.integers(2, 8))
        while run.poll() is None and not (log.exists() and f'"step": {at}' in log.read_text()):
            time.sleep(0.01)
        assert run.poll() is None, (tmp_path / "said").read_text()
        time.sleep(random.uniform(0, 0.3))
        killed = int(random.integers(several))
        os.kill(int(children.read_text().split()[killed]), signal.SIGKILL)
        assert run.wait(300) == 0, (tmp_path / "said").read_text()
    assert (tmp_path / "said").read_text().count("eval step 9") == 1
    assert_same(tmp_path / "one", tmp_path / "all", exactly=True)
    print(f"rank {killed} of {several} ({argv[-3]}) killed after step {at}: the same bits")


def test_a_process_alone_has_no_others():
    alone = ranks.Ranks(argparse.Namespace(shard="fsdp"))
    assert not alone.shards
    assert alone.rank == 0 and [*alone.mine([1, 2, 3])] == [1, 2, 3]
