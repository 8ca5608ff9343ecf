"""Names of runs (--tag), and the sweep: what is finished stays, what was killed goes on, what
differs is another run."""

import os
import re
import shlex
import signal
import subprocess
import types
from pathlib import Path

import make
import pytest

import dump_logits
import stage1_sft
import stage2_kd
from lib import checkpoints, files
from lib.measure import plots
from lib.options import tags

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = make.world(tmp_path_factory.mktemp("world"), rows=30, val=4)
    make.call(dump_logits.main, *make.dump(folder))
    return folder


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(plots, "curves", lambda *_: None)


@pytest.fixture
def at(monkeypatch):
    """Return a function that sets the date that --tag auto sees."""
    return lambda date: monkeypatch.setattr(
        tags, "time", types.SimpleNamespace(strftime=lambda _: f"20261121-{date:06d}")
    )


def stopped(monkeypatch, script, argv):
    """Run a script up to SIGTERM in its first step."""
    with monkeypatch.context() as patch:
        plain = script.train.update
        patch.setattr(
            script.train,
            "update",
            lambda *args: os.kill(os.getpid(), signal.SIGTERM) or plain(*args),
        )
        assert make.ends(script.main, *argv)[0] == 143


@pytest.mark.parametrize(
    "script, arguments, more, name",
    (
        (stage1_sft, make.stage1, (), "lr0.01"),
        (stage1_sft, make.stage1, ("--lr", "2e-5"), "lr2e-05"),
        (stage2_kd, make.stage2, (), "T2.0-a0.9"),
        (stage2_kd, make.stage2, ("--temperature", "4->2", "--alpha", "0.9->0.5"), "T4-2-a0.9-0.5"),
    ),
)
def test_a_dated_name_says_what_tells_runs_apart(script, arguments, more, name):
    assert (
        tags.method(script.parse_args([str(word) for word in arguments(Path("x"), *more)])) == name
    )


def test_a_tag_of_ones_own_is_a_run_beside_the_others(world, tmp_path, capsys):
    argv = make.stage2(world, "--steps", 1, "--tag", "colder", "--out", f"{tmp_path}/stage2/")
    make.call(stage2_kd.main, *argv)
    assert [path.name for path in tmp_path.iterdir()] == [
        "stage2-colder"
    ] and f"wrote {tmp_path}/stage2-colder/best" in capsys.readouterr().out
    assert (
        make.ends(stage2_kd.main, *argv) == (0, "")
        and "already finished" in capsys.readouterr().out
    )
    assert (
        checkpoints.local_folder(str(tmp_path / "stage2-colder")) == tmp_path / "stage2-colder/best"
    )
    make.call(
        stage2_kd.main,
        *argv,
        "--eval-only",
        "--student",
        tmp_path / "stage2-colder",
        "--tag",
        "colder-eval",
    )
    assert files.read_json(tmp_path / "stage2-colder-eval/eval.json")["student"] == str(
        tmp_path / "stage2-colder/best"
    )


def test_a_tag_is_no_setting_of_the_run(world, tmp_path):
    make.call(
        stage1_sft.main, *make.stage1(world, "--steps", 1, "--tag", "a", "--out", tmp_path / "run")
    )
    assert make.ends(
        stage1_sft.main, *make.stage1(world, "--steps", 1, "--out", tmp_path / "run-a")
    ) == (0, "")


@pytest.mark.parametrize(
    "script, arguments, how",
    ((stage1_sft, make.stage1, "lr0.01"), (stage2_kd, make.stage2, "T4-2-a0.9")),
)
def test_auto_continues_the_unfinished_run_of_the_same_settings_and_no_other(
    world, tmp_path, monkeypatch, capsys, at, script, arguments, how
):
    moving = ("--temperature", "4->2") if script is stage2_kd else ()
    argv = arguments(world, *moving, "--steps", 3, "--tag", "auto", "--out", tmp_path / "run")

    def name(date):
        return tmp_path / f"run-{how}-20261121-{date:06d}"

    at(1)
    stopped(monkeypatch, script, argv)
    assert files.read_json(name(1) / "last/state.json")["step"] == 1
    at(2)
    other = [*argv, "--seed", 1]
    stopped(monkeypatch, script, other)  # newer, of the same name, and with other settings
    at(3)
    capsys.readouterr()
    make.call(script.main, *argv)
    said = capsys.readouterr().out
    assert (
        f"--tag auto goes on in {name(1)}" in said
        and f"continues {name(1)} at step 1" in said
        and f"wrote {name(1)}/best" in said
    )
    make.call(script.main, *argv)  # that one is finished: a new one
    assert {path.name for path in tmp_path.iterdir()} == {
        name(date).name for date in (1, 2, 3)
    } and (name(3) / "config.json").exists()
    assert (name(1) / "final/model.safetensors").read_bytes() == (
        name(3) / "final/model.safetensors"
    ).read_bytes()
    assert make.history(name(1)) == make.history(name(3)) and not (name(2) / "config.json").exists()
    at(4)
    make.call(script.main, *other, "--fresh")
    assert (name(4) / "config.json").exists() and not (name(2) / "config.json").exists(), (
        "--fresh leaves what is there and begins another"
    )


def test_auto_takes_the_newest_of_several_that_fit(tmp_path, at):
    for date, state, more in (
        (1, "fits", ()),
        (2, "fits", ()),
        (3, "other", ()),
        (4, "fits", ("config.json",)),
    ):
        (tmp_path / f"run-x-20261121-00000{date}/last").mkdir(parents=True)
        files.write_json(
            tmp_path / f"run-x-20261121-00000{date}/last/state.json", {"settings": state}
        )
        for name in more:
            (tmp_path / f"run-x-20261121-00000{date}" / name).touch()
    for name in (
        "run-x-2026",
        "run-x-20261121-000009-eval",
        "run-xx-20261121-000009",
    ):  # not of this name
        (tmp_path / name / "last").mkdir(parents=True)
        files.write_json(tmp_path / name / "last/state.json", {"settings": "fits"})
    at(7)
    assert tags.folder(tmp_path / "run", "x", "fits".__eq__).name == "run-x-20261121-000002"
    assert tags.folder(tmp_path / "run", "x", "none".__eq__).name == "run-x-20261121-000007"
    os.rename(
        tmp_path / "run-x-20261121-000002/last", tmp_path / "run-x-20261121-000002/.last.old"
    )  # killed between two renames
    assert tags.folder(tmp_path / "run", "x", "fits".__eq__).name == "run-x-20261121-000002"


def test_auto_takes_up_a_run_killed_before_it_saved_anything_but_not_one_that_is_at_it(
    tmp_path, at
):
    left = tmp_path / "run-x-20261121-000001"
    left.mkdir()
    at(2)
    lock = files.lock(left)
    assert tags.folder(tmp_path / "run", "x", lambda _: True).name == "run-x-20261121-000002"
    lock.release()
    assert tags.folder(tmp_path / "run", "x", lambda _: True) == left
    (left / ".lock").unlink()
    assert tags.folder(tmp_path / "run", "x", lambda _: True).name == "run-x-20261121-000002", (
        "no folder of ours"
    )


@pytest.mark.parametrize(
    "more, words",
    (
        (("--tag", "a/b"), "wanted a part of a folder's name"),
        (("--tag", "a b"), "wanted a part"),
        (("--tag", "auto", "--eval-only"), "--eval-only makes none"),
    ),
)
@pytest.mark.parametrize("script, arguments", ((stage1_sft, make.stage1), (stage2_kd, make.stage2)))
def test_a_tag_that_cannot_be_is_refused(world, capsys, script, arguments, more, words):
    assert (
        make.ends(script.main, *arguments(world, *more))[0] == 2
        and words in capsys.readouterr().err
    )


# --- make sweep


def sweep(*variables):
    """Return the commands of `make sweep` as lists of words."""
    said = subprocess.run(
        ["make", "-n", "sweep", *variables], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    return [
        shlex.split(line) for line in said.splitlines() if re.match(r"\.venv/bin/python ", line)
    ]


def test_a_sweep_is_every_pair_one_after_the_other_and_then_the_list():
    *runs, last = sweep(
        "NAME=x",
        "T=1 4->2",
        "ALPHA=0.5 0.9",
        "STAGE2_ARGS=--lr 1e-4",
        "ARGS=--steps 7",
        "LOGITS=elsewhere",
    )
    args = [stage2_kd.parse_args(argv[2:]) for argv in runs]
    assert [(one.temperature, one.alpha) for one in args] == [
        (1, 0.5),
        (1, 0.9),
        ((4, 2), 0.5),
        ((4, 2), 0.9),
    ]
    assert [one.out for one in args] == [
        f"runs/x/sweep/{name}" for name in ("T1-a0.5", "T1-a0.9", "T4-2-a0.5", "T4-2-a0.9")
    ]
    assert {(one.student, one.data, one.logits, one.lr, one.steps) for one in args} == {
        ("runs/x/stage1", "data/x", "elsewhere", 1e-4, 7)
    }
    assert last[1:] == ["-m", "lib.measure.runs", "runs/x/sweep"]
    assert len(sweep()) == 2, "with a single T and ALPHA it is one run"


def test_a_sweep_killed_in_its_third_run_finishes_when_run_again_and_leaves_the_first_two_alone(
    world, tmp_path, monkeypatch
):
    runs = [
        argv[2:]
        for argv in sweep(
            f"DATA={world / 'data'}",
            f"LOGITS={world / 'logits'}",
            f"RUNS={tmp_path}",
            "T=1 2",
            "ALPHA=0.5 0.9",
            f"ARGS={' '.join(make.QUICK)} --steps 4 --eval-every 2 --save-every 1",
        )[:-1]
    ]
    (tmp_path / "stage1").symlink_to(world / "student")
    for argv in runs[:2]:
        make.call(stage2_kd.main, *argv)
    hook = dict(where="lib.train.update", number=3, signal=signal.SIGKILL)
    process = make.processes().Process(
        target=make.script, args=("stage2_kd", runs[2], tmp_path / "log", hook)
    )
    process.start()
    process.join()
    names = ["T1-a0.5", "T1-a0.9", "T2-a0.5", "T2-a0.9"]
    assert process.exitcode == -signal.SIGKILL and {
        path.name for path in (tmp_path / "sweep").iterdir()
    } == set(names[:3])

    def times():
        return {
            path: path.stat().st_mtime_ns
            for name in names[:2]
            for path in (tmp_path / "sweep" / name).rglob("*")
        }

    before = times()
    assert [make.ends(stage2_kd.main, *argv) for argv in runs[:2]] == [
        (0, ""),
        (0, ""),
    ] and times() == before
    for argv in runs[2:]:
        make.call(stage2_kd.main, *argv)
    make.call(stage2_kd.main, *runs[2], "--out", tmp_path / "unbroken")
    third, unbroken = tmp_path / "sweep/T2-a0.5", tmp_path / "unbroken"
    for name in ("final", "best"):
        assert (third / name / "model.safetensors").read_bytes() == (
            unbroken / name / "model.safetensors"
        ).read_bytes()
    assert (
        make.history(third) == make.history(unbroken)
        and (tmp_path / "sweep/T2-a0.9/config.json").exists()
    )
