"""The losses beside the logits inside stage2_kd.py: what is logged and saved, that a killed run
goes on exactly, and what is refused."""

import json
import signal

import make
import numpy as np
import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import dump_logits
import stage2_kd
from lib import data
from lib.measure import plots
from lib.options import samples

ALL = (
    "--feature-weight",
    1,
    "--feature-layers",
    "even:2",
    "--attention-weight",
    2,
    "--contrastive-weight",
    0.5,
    "--steps",
    12,
    "--eval-every",
    4,
    "--save-every",
    3,
)
MOVING = (
    "--balance",
    "gradnorm",
    "--balance-every",
    2,
    "--temperature",
    "4->2",
    "--alpha",
    "0.9->0.5",
)
TERMS = ("feature", "attention", "contrastive")


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(plots, "curves", lambda *_: None)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Return a world whose teacher is wider than its student and has more layers and heads."""
    folder = make.world(tmp_path_factory.mktemp("world"), rows=40)
    make.model(folder / "teacher", seed=2, width=48, layers=4, num_attention_heads=6)
    return folder


def train(world, out, *more):
    make.call(stage2_kd.main, *make.live(world, *ALL, *more, "--out", out))
    return make.history(out, "train")


def test_each_loss_is_logged_apart(world, tmp_path, capsys):
    log = train(world, tmp_path / "run", "--steps", 4)
    said = capsys.readouterr().out
    assert (
        "feature: mse of the outputs of layers 0:1 1:3 (student:teacher), through a learned"
        " projection" in said
    )
    assert (
        "attention: maps of layers 1:3 (student:teacher), means over heads, 4 and 6" in said
        and "contrastive: InfoNCE" in said
    )
    assert all(line[name] > 0 for line in log for name in ("feature", "attention"))
    assert all(np.isfinite(line["contrastive"]) for line in log)
    assert not {"weight_feature", "pull_feature", "alpha", "temperature"} & set(log[0])


def test_what_moves_is_logged_and_weights_move_only_where_they_are_measured(world, tmp_path):
    log = train(world, tmp_path / "run", *MOVING)
    assert [line["temperature"] for line in log] == pytest.approx(
        [4 - 2 * step / 11 for step in range(12)]
    )
    assert [line["alpha"] for line in log] == pytest.approx(
        [0.9 - 0.4 * step / 11 for step in range(12)]
    )
    assert [line["step"] for line in log if "weight_feature" in line] == [0, 2, 4, 6, 8, 10]
    for line in log[::2]:
        assert sum(line[f"pull_{name}"] for name in ("logits", *TERMS)) == pytest.approx(1)
    spread = [
        max(pulls) / min(pulls)
        for pulls in (
            [line[f"pull_{name}"] for name in ("logits", *TERMS)] for line in (log[0], log[10])
        )
    ]
    assert spread[1] < spread[0] / 3


def test_a_line_is_logged_at_every_measurement_whatever_log_every_says(world, tmp_path):
    log = train(
        world, tmp_path / "run", "--balance", "gradnorm", "--balance-every", 5, "--log-every", 3
    )
    assert [line["step"] for line in log] == [0, 3, 5, 6, 9, 10]


def test_the_step_does_not_depend_on_how_it_is_cut(world, tmp_path):
    still = ("--steps", 3, "--lr", make.NO_STEP)  # what differs is rounding alone
    one, many = (
        train(world, tmp_path / size, *MOVING, *still, "--tokens-per-microbatch", size)
        for size in ("400", "40")
    )
    for a, b in zip(one, many, strict=True):
        assert a.pop("event") == b.pop("event") and a == pytest.approx(b, rel=2e-3)


def test_a_killed_run_goes_on_to_the_same_weights_with_its_projections_and_weights(world, tmp_path):
    processes, log = make.processes(), tmp_path / "log"
    for out, hooks in (
        ("straight", [None]),
        ("killed", [dict(where="lib.train.update", number=8, signal=signal.SIGKILL), None]),
    ):
        for hook in hooks:
            argv = [str(word) for word in make.live(world, *ALL, *MOVING, "--out", tmp_path / out)]
            process = processes.Process(target=make.script, args=("stage2_kd", argv, log, hook))
            process.start()
            process.join()
            assert process.exitcode == (-signal.SIGKILL if hook else 0), log.read_text()
            if hook:
                saved = load_file(tmp_path / "killed/last/weights.safetensors")
                assert {name for name in saved if "projection" in name}  # in the resume state
                assert (
                    json.loads((tmp_path / "killed/last/state.json").read_text())["more"][
                        "balance"
                    ]["weights"]["feature"]
                    != 1
                )
    assert f"continues {tmp_path / 'killed'} at step 6" in log.read_text()
    assert make.history(tmp_path / "killed") == make.history(tmp_path / "straight")
    for name in ("final/model.safetensors", "best/model.safetensors"):
        assert (tmp_path / "killed" / name).read_bytes() == (
            tmp_path / "straight" / name
        ).read_bytes()
        assert not any(
            "projection" in name for name in load_file(tmp_path / "killed" / name)
        )  # and in no checkpoint


def test_the_checkpoint_is_an_ordinary_model(world, tmp_path):
    train(world, tmp_path / "run", "--steps", 2)
    module = AutoModelForCausalLM.from_pretrained(tmp_path / "run/best")
    assert (
        module.config._attn_implementation == "sdpa"
        and "watched" not in (tmp_path / "run/best/config.json").read_text()
    )


def test_weights_of_zero_leave_the_run_as_it_is_without_them(world, tmp_path):
    argv = make.live(world, "--steps", 4)
    make.call(stage2_kd.main, *argv, "--out", tmp_path / "plain")
    make.call(
        stage2_kd.main,
        *argv,
        "--feature-weight",
        0,
        "--attention-weight",
        0,
        "--contrastive-weight",
        0,
        "--feature-layers",
        "even:2",
        "--out",
        tmp_path / "zero",
    )
    assert make.history(tmp_path / "plain") == make.history(tmp_path / "zero")
    assert (tmp_path / "plain/final/model.safetensors").read_bytes() == (
        tmp_path / "zero/final/model.safetensors"
    ).read_bytes()


def test_a_term_of_tiny_weight_is_logged_and_changes_nearly_nothing(world, tmp_path):
    argv = make.live(world, "--steps", 4)
    make.call(stage2_kd.main, *argv, "--out", tmp_path / "plain")
    make.call(stage2_kd.main, *argv, "--feature-weight", 1e-12, "--out", tmp_path / "tiny")
    plain, tiny = (make.history(tmp_path / name, "train") for name in ("plain", "tiny"))
    for name in ("loss", "kd", "ce", "grad_norm"):
        assert [line[name] for line in tiny] == pytest.approx(
            [line[name] for line in plain], rel=1e-3
        )
    assert tiny[-1]["feature"] > 0


def test_samples_show_the_teacher_beside_the_student_at_every_evaluation(world, tmp_path):
    train(world, tmp_path / "run", "--steps", 4, "--eval-every", 2, "--samples", 2)
    text = (tmp_path / "run/samples.md").read_text()
    assert (
        text.count("### Step") == 6
        and text.count("teacher:") == 6
        and text.count("reference:") == 2
    )


def test_a_teachers_answers_are_judged_before_they_are_learnt(world, capsys, monkeypatch):
    dump = make.dump(world, "--chunk", "val", "--samples", 2)
    make.call(dump_logits.main, *dump)
    said = capsys.readouterr().out
    assert "teacher: asked " in said and "its answers to 2 val prompts overlap with" in said
    held = data.Split(world / "data", "val")

    def answers(self, model, amp=None):
        rows = [held.row(row) for row in range(2)]
        return [self.text(ids[answer]) for ids, answer in rows] if perfect else [self.text([])] * 2

    monkeypatch.setattr(samples.Samples, "answers", answers)
    for perfect in (False, True):
        make.call(dump_logits.main, *dump, "--fresh")
        assert ("WARNING: the teacher's answers" in capsys.readouterr().out) is not perfect


@pytest.mark.parametrize(
    "more, words",
    (
        (("--feature-weight", -1), "--feature-weight is -1.0, wanted 0 or more"),
        (("--balance", "gradnorm"), "has nothing to balance"),
        (("--attention-weight", 1, "--balance-every", 0), "--balance-every is 0"),
        (
            ("--contrastive-weight", 1, "--contrastive-temperature", 0),
            "--contrastive-temperature is 0.0",
        ),
        (
            ("--attention-weight", 1, "--attn", "flash_attention_2"),
            "--attn flash_attention_2 does not give",
        ),
        (("--temperature", "2->inf"), "--temperature is (2.0, inf)"),
        (("--temperature", "4->0"), "--temperature is (4.0, 0.0)"),
        (("--alpha", "0.5->1.5"), "--alpha is (0.5, 1.5)"),
    ),
)
def test_values_that_cannot_work(world, tmp_path, capsys, more, words):
    assert make.ends(stage2_kd.main, *make.live(world, *more, "--out", tmp_path / "run"))[0] == 2
    assert words in capsys.readouterr().err


def test_the_losses_beside_the_logits_need_the_teacher(world, tmp_path, capsys):
    assert (
        make.ends(
            stage2_kd.main, *make.stage2(world, "--attention-weight", 1, "--out", tmp_path / "run")
        )[0]
        == 2
    )
    assert "--attention-weight needs the teacher live" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more, words",
    (
        (
            ("--feature-weight", 1, "--feature-layers", "2:0"),
            "the student has 2 layers, the teacher 4",
        ),
        (
            ("--attention-weight", 1, "--attention-layers", "0:4"),
            "--attention-layers 0:4 names no layers that are there",
        ),
        (("--feature-weight", 1, "--compile"), "a compiled model does not show its layers"),
    ),
)
def test_what_cannot_be_watched_is_one_line(world, tmp_path, more, words):
    code, said = make.ends(stage2_kd.main, *make.live(world, *more, "--out", tmp_path / "run"))
    assert code == 1 and words in said and "\n" not in said.strip()
    assert not (tmp_path / "run/history.jsonl").exists()


@pytest.mark.parametrize(
    "targets, more, words",
    (
        (
            "up_proj",
            ["--attention-weight", 1, "--attention-layers", "0:0"],
            "--attention-layers: nothing that is trained changes layer 0",
        ),
        (
            "1.self_attn.q_proj",
            ["--feature-weight", 1, "--feature-layers", "0:0"],
            "--feature-layers: nothing that is trained changes layer 0",
        ),
        (
            "o_proj",
            ["--attention-weight", 1, "--balance", "gradnorm"],
            "--balance gradnorm has nothing to measure on in layer 1",
        ),
    ),
)
def test_an_adapter_that_a_loss_does_not_reach_is_one_line(world, tmp_path, targets, more, words):
    """It ended in a RuntimeError of autograd, or in an assertion."""
    argv = make.live(
        world,
        "--steps",
        2,
        "--lora-rank",
        2,
        "--lora-targets",
        targets,
        *more,
        "--out",
        tmp_path / "out",
    )
    code, said = make.ends(stage2_kd.main, *argv)
    assert code == 1 and words in said
