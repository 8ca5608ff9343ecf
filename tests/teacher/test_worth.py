"""The teacher as a row of a run's history and picture, and what is said in red before training: it
has nothing to give."""

import collections
import math
import os
import shutil
import signal
import sys

import make
import numpy as np
import pytest
import torch

import dump_logits
import stage2_kd
from lib import data, evaluate, files, models
from lib.measure import plots
from lib.teacher import worth


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Return a world of random models whose targets are mostly one token: to know the frequencies
    alone is worth much."""
    folder = make.sourced(make.world(tmp_path_factory.mktemp("world"), rows=60, val=14))
    rng = np.random.default_rng(0)
    for name in ("train", "val"):
        tokens, answer = (
            np.load(folder / f"data/{name}.{part}.npy") for part in ("tokens", "answer")
        )
        np.save(
            folder / f"data/{name}.tokens.npy",
            np.where(answer & (rng.random(len(tokens)) < 0.9), 7, tokens).astype(np.uint32),
        )
    make.call(dump_logits.main, *make.dump(folder))
    return folder


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch, request):
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(plots, "curves", lambda *_: None)


def counted_by_hand(train, val):
    counts = collections.Counter(train.tokens[train.answer].tolist())
    total = sum(counts.values()) + make.V
    return np.mean(
        [-math.log((counts[token] + 1) / total) for token in val.tokens[val.answer].tolist()]
    )


def test_chance_is_what_the_frequencies_of_the_train_targets_are_worth_on_val(world, monkeypatch):
    dataset = data.Dataset(world / "data")
    seen = worth.unigram_ce(dataset.train, dataset.val, make.V)
    assert seen == pytest.approx(
        counted_by_hand(dataset.train, dataset.val), rel=1e-12
    ) and seen < 0.5 * math.log(make.V)
    pieces = [worth.target_counts(dataset.train, make.V, piece) for piece in (7, 1 << 24)]
    assert (pieces[0] == pieces[1]).all() and pieces[0].sum() == dataset.train.targets


@pytest.mark.parametrize("arguments", (make.stage2, make.live))
@pytest.mark.parametrize("terminal", (True, False))
def test_a_random_teacher_is_said_to_be_no_better_than_chance_in_red_on_a_terminal(
    world, tmp_path, capsys, monkeypatch, arguments, terminal
):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    make.call(stage2_kd.main, *arguments(world, "--steps", 1, "--out", tmp_path / "run"))
    said, dataset = capsys.readouterr().out, data.Dataset(world / "data")
    (ce,) = (line["ce"] for line in make.history(tmp_path / "run", "teacher"))
    chance = counted_by_hand(dataset.train, dataset.val)
    text = (
        f"WARNING: the teacher is no better than chance: its val cross-entropy is {ce:.4f}, that of"
        f" the train targets' frequencies alone {chance:.4f}"
    )
    assert ce > chance and (f"\n\033[31m{text}\033[0m\n" if terminal else f"\n{text}\n") in said
    assert terminal or "\033" not in said


@pytest.mark.parametrize(
    "teacher, student, chance, words",
    (
        (1.0, 2.0, 3.0, "val cross-entropy: teacher 1.0000, student 2.0000"),
        (
            2.5,
            2.0,
            3.0,
            (
                "val cross-entropy: teacher 2.5000, student 2.0000; WARNING: the teacher is no"
                " better than the student"
            ),
        ),
        (
            math.nan,
            2.0,
            3.0,
            "no better than the student|no better than chance: its val cross-entropy is nan",
        ),
        (3.0, 4.0, 3.0, "student 4.0000|no better than chance"),
    ),
)
def test_a_teacher_is_compared_with_the_student_and_with_chance(teacher, student, chance, words):
    said = []
    worth.teacher_can_teach({"ce": teacher}, {"ce": student}, chance, said.append)
    assert len(said) == len(words.split("|")) and all(
        word in line for word, line in zip(words.split("|"), said)
    ), said


def test_the_student_itself_as_its_teacher_is_no_better_than_the_student(
    world, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    make.call(
        stage2_kd.main,
        *make.live(world, "--teacher", world / "student", "--steps", 1, "--out", tmp_path / "run"),
    )
    assert (
        "\033[31m; WARNING: the teacher is no better than the student\033[0m"
        in capsys.readouterr().out
    )


def test_history_begins_with_the_student_and_then_the_teacher(world, tmp_path):
    dataset = data.Dataset(world / "data")
    wanted = evaluate.evaluate(
        models.load(str(world / "teacher"), torch.device("cpu")),
        dataset.val,
        make.V,
        64,
        sources=dataset.sources,
    )
    for name, arguments, there in (
        ("disk", make.stage2, {"ce", "ppl", "acc1", "targets"}),
        ("live", make.live, set(wanted)),
    ):
        make.call(
            stage2_kd.main,
            *arguments(world, "--steps", 2, "--eval-every", 1, "--out", tmp_path / name),
        )
        lines = make.history(tmp_path / name)
        assert [line["event"] for line in lines] == [
            "eval",
            "teacher",
            "train",
            "eval",
            "train",
            "eval",
        ]
        assert (
            lines[1].pop("event") == "teacher"
            and lines[1].pop("step") == 0
            and lines[1] == pytest.approx({n: wanted[n] for n in there}, rel=1e-4)
        )


def test_without_a_val_dump_there_is_no_teacher_in_the_history(world, tmp_path, capsys):
    shutil.copytree(world / "logits", tmp_path / "logits", ignore=shutil.ignore_patterns("val"))
    make.call(
        stage2_kd.main,
        *make.stage2(
            world, "--logits", tmp_path / "logits", "--steps", 1, "--out", tmp_path / "run"
        ),
    )
    assert (
        not make.history(tmp_path / "run", "teacher")
        and "val cross-entropy" not in capsys.readouterr().out
    )


def test_a_run_stopped_in_its_first_evaluation_goes_on_with_one_teacher_line(
    world, tmp_path, monkeypatch
):
    argv = make.stage2(world, "--steps", 2, "--out", tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(worth, "teacher_can_teach", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        assert make.ends(stage2_kd.main, *argv)[0] == 143
    assert [line["event"] for line in make.history(tmp_path / "run")] == ["eval", "teacher"]
    make.call(stage2_kd.main, *argv)
    assert [line["event"] for line in make.history(tmp_path / "run")] == [
        "eval",
        "teacher",
        "train",
        "eval",
        "train",
        "eval",
    ]


# --- its answers


def test_rouge_l_is_that_of_the_library():
    from rouge_score import rouge_scorer

    scorer, rng = rouge_scorer.RougeScorer(["rougeL"]), np.random.default_rng(0)
    for _ in range(20):
        said, wanted = (rng.integers(0, 6, rng.integers(1, 12)).tolist() for _ in range(2))
        text = [" ".join(f"w{token}" for token in ids) for ids in (wanted, said)]
        assert worth.rouge_l(said, wanted) == pytest.approx(scorer.score(*text)["rougeL"].fmeasure)
    assert worth.rouge_l([], [1]) == worth.rouge_l([1], []) == worth.rouge_l([], []) == 0


@pytest.mark.parametrize("good", ("teacher", "student"))
def test_a_teacher_whose_answers_are_worse_than_the_students_is_told(world, monkeypatch, good):
    """It may know every next token better, and repeat the prompt when it is asked."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    dataset, said = data.Dataset(world / "data"), []
    asked = {str(row): worth.prompt_of(dataset.val, row) for row in range(8)}
    fine = {row: wanted for row, (_, wanted) in asked.items()}
    repeats = {row: prompt for row, (prompt, _) in asked.items()}
    pair = (fine, repeats) if good == "teacher" else (repeats, fine)
    worth.compare_answers(*pair, dataset, dataset.tokenizer(), said.append)
    assert ("\033[31m; WARNING: the teacher's are further" in said[0]) == (good == "student")
    assert "the teacher says" in said[1] and "the reference is" in said[1]
    silent = dict.fromkeys(asked, [])
    worth.compare_answers(silent, silent, dataset, dataset.tokenizer(), said.append)
    assert "have nothing of the references" in said[2]


def test_what_a_teacher_answers_is_in_the_val_dump_and_told_before_the_first_step(
    world, tmp_path, capsys
):
    dataset = data.Dataset(world / "data")
    teacher = models.load(str(world / "teacher"), torch.device("cpu"), pack=False)
    said = make.store(world).answers
    assert said == worth.answered(teacher, dataset) and len(said) == worth.ASKED
    for row, ids in said.items():
        prompt, wanted = worth.prompt_of(dataset.val, int(row))
        tokens, answer = dataset.val.row(int(row))
        assert prompt == tokens[~answer].tolist() and wanted == tokens[answer].tolist()
        plain = teacher.module.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=worth.LONGEST, pad_token_id=3
        )[0, len(prompt) :].tolist()
        assert ids == [token for token in plain if token != 3]
    lines = []
    for arguments in (make.stage2, make.live):
        make.call(stage2_kd.main, *arguments(world, "--steps", 1, "--out", tmp_path / "run"))
        spoken = capsys.readouterr().out.splitlines()
        lines.append([line for line in spoken if line.startswith("val answers:")])
        shutil.rmtree(tmp_path / "run")
    assert lines[0] == lines[1] and len(lines[0]) == 2


def test_of_several_sources_each_is_asked():
    assert worth.in_turn(np.array([0, 0, 0, 2, 2, 1])) == [0, 3, 5, 1, 4, 2]


def test_a_plain_text_is_not_asked(world, monkeypatch):
    """Its prompt is its first token."""
    dataset, plain = data.Dataset(world / "data"), worth.prompt_of
    monkeypatch.setattr(worth, "prompt_of", lambda *of: (plain(*of)[0][:1], plain(*of)[1]))
    teacher = models.load(world / "teacher", torch.device("cpu"), pack=False)
    assert worth.answered(teacher, dataset) == {}


def test_where_answers_are_not_looked_at_a_line_says_so(world, tmp_path, capsys):
    shutil.copytree(world / "logits", tmp_path / "logits")
    path = tmp_path / "logits/val/meta.json"
    meta = files.read_json(path)
    del meta["answers"]  # as older dumps have it
    files.write_json(path, meta)
    more = ("--logits", tmp_path / "logits", "--steps", 1, "--out", tmp_path / "run")
    make.call(stage2_kd.main, *make.stage2(world, *more))
    assert "none of the teacher's are known" in capsys.readouterr().out


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Return the figure of a live run with the losses beside the logits."""
    plt = plots.pyplot()
    plt.close("all")  # what other tests of this process left
    monkeypatch.setattr(plt, "close", lambda figure: None)

    def draw(world, *more):
        make.call(stage2_kd.main, *make.live(world, "--steps", 2, *more, "--out", tmp_path / "run"))
        return {
            axis.get_title(): {line.get_label(): line for line in axis.lines}
            for axis in plt.figure(plt.get_fignums()[-1]).axes
        }

    yield draw
    monkeypatch.undo()
    plt.close("all")


def test_the_picture_shows_the_teacher_as_a_dashed_line_and_the_losses_beside_the_logits(
    world, tmp_path, drawn
):
    axes = drawn(world, "--feature-weight", 1, "--contrastive-weight", 1)
    assert list(axes) == ["ce", "kl", "acc1", "loss", "feature", "contrastive"]
    (teacher,) = make.history(tmp_path / "run", "teacher")
    for name in ("ce", "acc1"):
        line = axes[name]["teacher, held out"]
        assert set(line.get_ydata()) == {teacher[name]} and line.get_linestyle() == "--"
    assert all(
        "teacher, held out" not in axes[name] for name in ("kl", "loss", "feature", "contrastive")
    )
    steps = make.history(tmp_path / "run", "train")
    assert axes["feature"]["training step"].get_ydata().tolist() == [
        line["feature"] for line in steps
    ]
