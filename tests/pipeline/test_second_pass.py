"""A second pass on the original answers: the commands of recipes/second-pass.mk, run as they stand
there on tiny data."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import make
import numpy as np
import pytest

import prepare_data
import stage1_sft
from lib import checkpoints, data, files, models
from lib.measure import plots

ROOT = Path(__file__).parents[2]
RECIPE = (ROOT / "recipes" / "second-pass.mk").read_text(encoding="utf-8")
HEADER = [shlex.split(line[1:]) for line in RECIPE.splitlines() if re.match(r"#   make ", line)]
SCRIPTS = {"prepare_data.py": prepare_data, "stage1_sft.py": stage1_sft}


def scripts(line, *variables):
    """Return what `make -n` of a line of the recipe's header runs: a script's name and its
    arguments each."""
    said = subprocess.run(
        ["make", "-n", *line[1:], *variables], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    return [
        shlex.split(command)[1:]
        for command in said.splitlines()
        if re.match(r"\.venv/bin/python \w+\.py", command)
    ]


def answers(path, answer):
    """Write 60 questions of three words, with answers that differ from file to file."""
    words = np.random.default_rng(0).integers(0, 57, (60, 3))
    rows = (
        {"prompt": " ".join(f"w{word}" for word in row), "answer": f"w{row[0]} w{answer}"}
        for row in words
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def passes(tmp_path_factory):
    """Return a folder where both passes have been made, by the recipe's commands."""
    folder = tmp_path_factory.mktemp("passes")
    make.model(folder / "student", seed=1)
    answers(folder / "qa.jsonl", 5)
    answers(folder / "by-teacher.jsonl", 9)
    quick = f"STAGE1_ARGS={' '.join(make.QUICK)} --steps 8 --eval-every 2 --lr"
    first, second, _ = HEADER
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(plots, "curves", lambda *_: None)
        for line, *variables in (
            # one step moves every weight by 3: the best is the model that no step has touched
            (first, "SOURCE=by-teacher.jsonl", "STUDENT=student", f"{quick} 3"),
            (second, "SOURCE=qa.jsonl", f"{quick} 0.03"),
        ):
            for script, *argv in scripts(line, "DATA_ARGS=--val 0.2", *variables):
                make.call(SCRIPTS[script].main, *argv)
    return folder


def test_the_second_pass_starts_from_the_best_of_the_first_and_trains_on_the_originals(passes):
    first, second = passes / "runs/qa-teacher/stage1", passes / "runs/qa/stage1"
    settings = files.read_json(second / "config.json")["settings"]
    measured = [line["ce"] for line in make.history(first, "eval")]
    assert min(measured[1:]) > measured[0], "best/ and final/ must be two models"
    assert settings["student identity"] == checkpoints.identity(first / "best")
    assert settings["student identity"] != checkpoints.identity(first / "final")
    assert (
        settings["data identity"]
        == data.Dataset(passes / "data/qa").identities["data"]
        != data.Dataset(passes / "data/qa-teacher").identities["data"]
    )
    assert len(make.history(second, "train")) == 8


def test_its_step_0_measures_what_the_first_pass_exported(passes):
    import torch

    from lib import evaluate

    dataset = data.Dataset(passes / "data/qa")
    best = models.load(str(passes / "runs/qa-teacher/stage1/best"), torch.device("cpu"))
    seen = make.history(passes / "runs/qa/stage1", "eval")[0]["ce"]
    assert seen == pytest.approx(evaluate.evaluate(best, dataset.val, make.V, 64)["ce"], rel=1e-5)


def test_the_tokenizers_are_one_and_the_same_prompts_are_held_out(passes):
    first, second = (data.Dataset(passes / "data" / name) for name in ("qa-teacher", "qa"))
    assert (
        first.identities["tokenizer"] == second.identities["tokenizer"]
        and first.identities["data"] != second.identities["data"]
    )
    prompts = [
        [tuple(split.row(row)[0][:4]) for row in range(len(split.rows))]
        for split in (first.val, second.val, first.train)
    ]
    assert (
        prompts[0] == prompts[1] and len(prompts[0]) > 3 and not set(prompts[1]) & set(prompts[2])
    )


def test_a_first_pass_that_is_not_finished_is_refused(passes, tmp_path):
    (tmp_path / "first" / "best").mkdir(parents=True)
    (tmp_path / "first" / "best" / "config.json").write_text("{}")
    (tmp_path / "first" / "history.jsonl").write_text("")
    code, words = make.ends(
        stage1_sft.main,
        "--data",
        passes / "data/qa",
        "--student",
        tmp_path / "first",
        "--out",
        tmp_path / "out",
        *make.QUICK,
    )
    assert code == 1 and "first is not finished" in words and "\n" not in words
