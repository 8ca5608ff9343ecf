"""Who wrote the rows, said before the first step (lib/teacher/written.py)."""

import re

import make
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import dump_logits
import stage2_kd
from lib import checkpoints, data, files, models
from lib.teacher import written

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = make.own_text(make.world(tmp_path_factory.mktemp("written"), rows=120, val=6))
    make.call(dump_logits.main, *make.dump(folder))
    return folder


def line_of(folder, dataset=None, weights=None):
    """Return the line and the warning about own text, for the student of a world."""
    args = make.plan_args(student=str(folder / "student"), amp="off")
    student = models.load(str(folder / "student"), CPU)
    source = weights or checkpoints.identity(folder / "student")
    return written.own_text(args, dataset or data.Dataset(folder / "data"), student, source)


def test_text_that_this_student_wrote_is_said_to_be_fresh(folder):
    line, warning = line_of(folder)
    assert line.startswith("own text: written by this student; KL 0.000 nats a token"), line
    assert line.endswith("effective sample size 64.0 of 64") and not warning
    line, warning = line_of(folder, weights="0" * 64)
    assert "another model than the student" in line and "KL 0.000" in line and not warning


@pytest.mark.parametrize("nats", (0.02, 0.08, -0.08, 400.0))
def test_kl_and_sample_size_are_those_of_the_log_probabilities_and_stale_text_is_warned_of(
    folder, nats
):
    """Log-probabilities noted when the text was written: `nats` a token above those of now, and of
    every other row a nat less."""
    dataset = data.Dataset(folder / "data")
    rows, now = dataset.train.rows, np.array(dataset.train.logp, np.float64)
    own = np.flatnonzero(np.isfinite(now))
    chosen = own[np.linspace(0, len(own) - 1, 64).astype(int)]
    apart = nats * rows["targets"].astype(float) - (np.arange(len(rows)) % 2)
    dataset.train.logp = now + apart
    line, warning = line_of(folder, dataset)
    kl = apart[chosen].sum() / rows["targets"][chosen].sum()
    weight = np.exp(apart[chosen].min() - apart[chosen])
    size = weight.sum() ** 2 / (weight**2).sum()
    seen = re.search(r"KL (\S+) nats .* size (\S+) of 64", line).groups()
    assert [float(word) for word in seen] == pytest.approx([kl, size], abs=0.06, rel=1e-3)
    assert bool(warning) == (abs(kl) > written.STALE)
    assert not warning or "WARNING: stale" in warning and "--answers student" in warning


def test_the_worked_example():
    kl, size = written.drift(np.array([-2.0, -4]), np.array([-3.0, -4]), np.array([2, 2]))
    assert (kl, size) == (0.25, pytest.approx(1.65, abs=0.005))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_rounding_to_half_precision_makes_no_text_stale(folder, dtype):
    dataset = data.Dataset(folder / "data")
    module = AutoModelForCausalLM.from_pretrained(folder / "student", dtype=dtype)
    logp = np.full(len(dataset.train.rows), np.nan)
    for row in np.flatnonzero(dataset.train.rows["source"] == 1).tolist():
        ids, answer = dataset.train.row(row)
        with torch.no_grad():
            known = module(torch.tensor(ids.astype(np.int64))[None]).logits[0].float()
        known = known.log_softmax(-1)
        logp[row] = sum(known[at - 1, ids[at]].item() for at in np.flatnonzero(answer))
    dataset.train.logp = logp
    line, warning = line_of(folder, dataset)
    assert not warning, line
    assert abs(float(re.search(r"KL (\S+)", line)[1])) < written.STALE / 2, line


@pytest.mark.parametrize("arguments", (make.stage2, make.live))
def test_stage_2_says_it_once_before_the_first_step(folder, tmp_path, capsys, arguments):
    more = "--steps", 2, "--out", tmp_path / "run"
    make.call(stage2_kd.main, *arguments(folder, *more))
    said = capsys.readouterr().out
    assert said.count("own text: written by this student; KL 0.000") == 1
    assert said.index("own text:") < said.index("train step 0")


@pytest.mark.parametrize("arguments", (make.stage2, make.live))
def test_own_text_in_val_is_no_reference_that_the_teacher_falls_behind(
    folder, tmp_path, capsys, arguments
):
    """The line is there, the teacher is not blamed, and answers are held against the others."""
    out = tmp_path / "run"
    make.call(stage2_kd.main, *arguments(folder, "--steps", 1, "--out", out))
    said = capsys.readouterr().out
    assert "val: 3 of 6 rows are the student's own text: ce, ppl and acc there" in said
    assert "val cross-entropy, of the student's own text too: teacher" in said
    assert "no better" not in said and "to 3 prompts: teacher" in said
    make.call(stage2_kd.main, *arguments(folder, "--eval-only", "--out", tmp_path / "eval"))
    assert "no loss on references" in capsys.readouterr().out


def test_given_rows_have_no_such_line(tmp_path, capsys):
    make.call(stage2_kd.main, *make.live(make.world(tmp_path), "--steps", 1))
    assert "own text" not in capsys.readouterr().out


def test_log_probabilities_that_do_not_fit_the_rows_are_refused(tmp_path):
    folder = make.own_text(make.world(tmp_path))
    np.save(folder / "data/train.logp.npy", np.zeros(3, np.float32))
    code, said = make.ends(stage2_kd.main, *make.live(folder))
    assert code == 1 and "log-probabilities of 3 of 40 rows" in said


def test_a_row_of_the_sample_may_lie_anywhere(folder):
    dataset = data.Dataset(folder / "data")
    own = np.flatnonzero(np.isfinite(dataset.train.logp))[[0, 5, 7]]
    student = models.load(str(folder / "student"), CPU)
    args = make.plan_args(amp="off", tokens_per_microbatch=16)
    seen = written.logp_of(student, dataset.train, own, args)
    assert seen == pytest.approx(dataset.train.logp[own], rel=1e-5)
    assert files.read_json(folder / "data/meta.json")["own"] == ["mine"]


def answered_by(folder, **about):
    """Let meta.json say who wrote the answers."""
    meta = files.read_json(folder / "data/meta.json")
    files.write_json(folder / "data/meta.json", meta | {"teacher": about})


def test_the_answers_of_another_teacher_are_warned_of_in_dump_and_both_stage_2(tmp_path, capsys):
    folder = make.world(tmp_path)
    for by, count in (("student", 1), ("teacher", 0)):
        weights = checkpoints.identity(folder / by)
        answered_by(folder, teacher=str(folder / by), weights=weights)
        make.call(dump_logits.main, *make.dump(folder, "--fresh"))
        make.call(stage2_kd.main, *make.stage2(folder, "--steps", 1, "--fresh"))
        make.call(stage2_kd.main, *make.live(folder, "--steps", 1, "--fresh"))
        said = capsys.readouterr().out
        warned = f"answers: WARNING: {folder / by} wrote them, and the teacher is another model"
        assert said.count(f"{warned}, {folder / 'teacher'}: one for both is better") == 3 * count
        assert said.count("wrote them") == 3 * count


@pytest.mark.parametrize(
    "about, words",
    [
        (None, ""),
        ({"teacher": "org/Big-7B", "host": "gpu1"}, ""),  # as far as its name tells
        ({"teacher": "Other", "host": "gpu1"}, "Other on gpu1 wrote them"),
        ({"teacher": "/models/Big-7B", "weights": "a" * 64}, ""),
        ({"teacher": "/models/Big-7B", "weights": "b" * 64}, "WARNING: /models/Big-7B wrote them"),
    ],
)
def test_a_teacher_is_known_by_its_weights_and_one_of_a_server_by_its_name(folder, about, words):
    dataset = data.Dataset(folder / "data")
    dataset.meta = dataset.meta | ({"teacher": about} if about else {})
    said = written.other_teacher(dataset, [("models/big-7b", "a" * 64)])
    assert words in said and bool(words) == bool(said)
