"""make domain: three stages, each from the best/ of the one before, with the flags that the recipes
give."""

import re
import shlex
import subprocess
from pathlib import Path

import make
import pytest

import stage2_kd
from lib import checkpoints, files
from lib.measure import plots

ROOT = Path(__file__).parents[2]


def commands(*variables):
    """Return the arguments of every stage2_kd.py that `make domain` would run."""
    said = subprocess.run(
        ["make", "-n", "domain", *variables], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    return [
        shlex.split(line)[2:]
        for line in said.splitlines()
        if re.match(r"\.venv/bin/python stage2_kd\.py", line)
    ]


@pytest.mark.parametrize("variables", ((), ("RECIPE=finance",), ("RECIPE=stdlib", "REAL=real")))
def test_three_stages_with_flags_that_exist_and_a_falling_temperature(variables):
    args = [stage2_kd.parse_args(argv) for argv in commands(*variables)]
    assert [one.temperature for one in args] == [4, 2, 1] and [one.alpha for one in args] == sorted(
        (one.alpha for one in args), reverse=True
    )
    assert [one.lr for one in args] == sorted((one.lr for one in args), reverse=True)
    assert (
        [one.balance for one in args] == ["none", "gradnorm", "none"]
        and args[1].feature_weight
        and args[1].attention_weight
    )
    assert [one.student for one in args[1:]] == [one.out for one in args[:2]]


def test_a_stage_can_be_left_out_at_either_end():
    assert [
        argv[argv.index("--out") + 1] for argv in commands("NAME=x", "START_STAGE=2", "END_STAGE=3")
    ] == ["runs/x/domain2", "runs/x/domain3"]
    assert [
        argv[argv.index("--student") + 1]
        for argv in commands("NAME=x", "START_STAGE=2", "END_STAGE=2")
    ] == ["runs/x/domain1"]


def test_the_stages_run_one_from_the_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plots, "curves", lambda *_: None)
    folder = make.sourced(make.world(tmp_path / "data", rows=40), names=("general", "domain"))
    (tmp_path / "data" / "x").symlink_to(folder / "data")
    quick = f"DOMAIN_ARGS={' '.join(make.QUICK)} --steps 4 --eval-every 2 --samples 1"
    for argv in commands(
        "NAME=x", f"TEACHER={folder / 'teacher'}", f"STUDENT={folder / 'student'}", quick
    ):
        make.call(stage2_kd.main, *argv)
    before = folder / "student"
    for stage in (1, 2, 3):
        run = tmp_path / "runs" / "x" / f"domain{stage}"
        config = files.read_json(run / "config.json")
        assert (
            config["settings"]["student identity"] == checkpoints.identity(before)
            and (run / "samples.md").read_text().count("teacher:") == 3
        )
        before = run / "best"
    shares = [
        files.read_json(tmp_path / "runs" / "x" / f"domain{stage}" / "config.json")["shares"]
        for stage in (1, 2, 3)
    ]
    assert [set(share) for share in shares] == [
        {"share_general"},
        {"share_general", "share_domain"},
        {"share_domain"},
    ]
