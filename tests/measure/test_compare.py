"""The comparison: what it reads, what it computes of it, what it refuses, and what a browser
shows."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import folders
import pytest

from lib import files
from lib.measure import compare, entries, panels, results, runs

ROOT = Path(__file__).parents[2]


@pytest.fixture
def demo(tmp_path):
    return folders.demo(tmp_path / "runs" / "demo")


@pytest.fixture
def no_pictures(monkeypatch):
    """Compare without matplotlib, which takes a second."""
    monkeypatch.setattr(panels, "png", lambda *_: None)


def run(*argv) -> None:
    compare.main(list(map(str, argv)))


def compared(out: Path, *argv) -> dict:
    """Run the report and return OUT.json."""
    run(*argv, "--out", out)
    return json.loads(Path(f"{out}.json").read_text())


def refused(*argv) -> str:
    """Return the one line with which the report ends; such an end has the exit code 1."""
    with pytest.raises(SystemExit) as end:
        run(*argv)
    assert isinstance(end.value.code, str) and "\n" not in end.value.code, end.value.code
    return end.value.code


def misused(capsys, *argv) -> str:
    """Return what the report says of arguments that it refuses with 2."""
    with pytest.raises(SystemExit) as end:
        run(*argv)
    assert end.value.code == 2
    return capsys.readouterr().err


# --- what it reads


def test_a_folder_of_stages_is_compared_in_the_order_teacher_base_stage1_control_and_then_by_time(
    tmp_path, no_pictures
):
    group = tmp_path / "g"
    for name, when in (
        ("late", 300),
        ("early", 100),
        ("control", 900),
        ("stage1", 800),
        ("teacher", 700),
    ):
        folders.run(group / name, when=when)
        folders.evaluation(group / f"{name}-eval", "teacher" if name == "teacher" else "stage2")
    folders.evaluation(group / "base-eval", "stage1")  # a model from elsewhere: no run beside it
    folders.run(group / "unmeasured")
    folders.run(group / "deep" / "stage1")
    folders.evaluation(group / "deep" / "stage1-eval")
    made = compared(tmp_path / "out", group)
    assert list(made["models"]) == ["teacher", "base", "stage1", "control", "early", "late"]
    assert made["roles"] == {
        "teacher": "teacher",
        "before": "base",
        "control": "control",
        "student": "late",
    }


def test_what_is_left_out_is_said_with_the_command_that_measures_it(
    demo, tmp_path, no_pictures, capsys
):
    folders.run(demo / "live", stage="stage2", teacher="runs/demo/teacher")
    compared(tmp_path / "out", demo)
    assert f"{demo}/live is left out" in (said := capsys.readouterr().out)
    assert (
        f"python stage2_kd.py --data data/x --teacher runs/demo/teacher --student {demo}/live --out"
        f" {demo}/live-eval --eval-only" in said
    )


def test_stage_folder_evaluation_folder_and_name_are_the_same_model(demo, tmp_path, no_pictures):
    by_stage = compared(tmp_path / "a", demo / "teacher", demo / "stage2")
    by_eval = compared(tmp_path / "b", demo / "teacher-eval", demo / "stage2-eval")
    named = compared(tmp_path / "c", f"teacher={demo}/teacher-eval", f"stage 2={demo}/stage2-eval")
    assert by_stage == by_eval and by_stage["models"]["stage2"]["training"]["steps"] == 30
    assert (
        list(named["models"]) == ["teacher", "stage 2"]
        and named["models"]["stage 2"] == by_stage["models"]["stage2"]
    )


def test_runs_of_one_name_in_two_folders_are_told_apart_by_their_folders(
    demo, tmp_path, no_pictures
):
    other = folders.demo(tmp_path / "runs" / "seed1")
    made = compared(tmp_path / "out", demo / "teacher", demo / "stage2", other / "stage2")
    assert (
        list(made["models"]) == ["teacher", "demo/stage2", "seed1/stage2"]
        and made["roles"]["student"] == "demo/stage2"
    )


def test_without_out_it_writes_beside_the_stages(demo, no_pictures):
    run(demo)
    assert {path.name for path in demo.iterdir() if path.is_file()} == {
        "comparison.json",
        "comparison.md",
        "comparison.html",
    }


def test_a_prefix_with_a_dot_keeps_it(demo, tmp_path, no_pictures):
    compared(tmp_path / "stage2-T2.0-a0.9", demo)
    assert (tmp_path / "stage2-T2.0-a0.9.md").exists()


def test_answers_without_scores_are_scored_and_sources_have_a_table(tmp_path, no_pictures):
    sources = {"news": {"ce": 1.5, "kl": 0.25}, "code": {"ce": 0.5, "kl": 0.125}}
    folders.evaluation(tmp_path / "s-eval", bytes=None, data=None, by_source=sources)
    folders.answers(tmp_path / "s-eval", scored=False)
    (model,) = compared(tmp_path / "out", tmp_path / "s-eval")["models"].values()
    assert model["exact"] == 0.8 and model["answers"] == 10
    assert model["intervals"]["exact"][0] < 0.8 < model["intervals"]["exact"][1]
    text = (tmp_path / "out.md").read_text()
    assert re.search(r"\| news +\| CE, nats a target +\| +1\.5000 \|", text)


def test_it_starts_without_torch():
    code = (
        "import sys; from lib.measure import compare, runs, score;"
        " sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# --- what it computes


def test_the_numbers_are_those_of_the_files_and_the_comparison_is_arithmetic(
    demo, tmp_path, no_pictures
):
    made = compared(tmp_path / "out", demo)
    for name, (ce, _, acc1, _, kl, exact) in folders.MEASURES.items():
        model = made["models"][name]
        assert (model["ce"], model["acc1"], model["kl"], model["exact"]) == (
            ce,
            acc1,
            kl,
            exact,
        ) and model["intervals"]["exact"][0] == exact - 0.03
    ce, exact, kl = (made["comparison"][name] for name in ("ce", "exact", "kl"))
    assert (ce["teacher"], ce["student"], ce["difference"], ce["retention"]) == (
        0.11,
        0.14,
        pytest.approx(0.03),
        pytest.approx(11 / 14),
    )
    assert exact["retention"] == pytest.approx(0.816 / 0.996) and exact[
        "difference"
    ] == pytest.approx(-0.18)
    assert kl["retention"] is None and kl["difference"] == 0.031
    assert made["compression"] == {
        "parameters": pytest.approx(685056 / 96512),
        "bytes": pytest.approx(2740224 / 386048),
    }
    assert (
        made["speedup"]["tok_per_s"] == 2.5
        and made["data"] == folders.DATA
        and made["primary"] == "exact"
    )
    training = made["models"]["stage2"]["training"]
    assert training == {
        "steps": 30,
        "planned_steps": 30,
        "trained_s": 12.5,
        "tok_per_s": 20.0,
    }  # the median of 10, 20 and 30


@pytest.mark.parametrize(
    "measure,teacher,student,kept",
    [
        ("acc1", 0.8, 0.6, 0.75),
        ("macro_f1", 0.5, 0.6, 1.2),
        ("bleu", 0.4, 0.1, 0.25),
        ("ce", 1.0, 2.0, 0.5),
        ("ppl", 3.0, 4.0, 0.75),
        ("kl", 0.1, 0.2, None),
        ("rkl", 0.1, 0.2, None),
        ("ece", 0.1, 0.2, None),
        ("agree", 1.0, 0.9, None),
        ("exact", 0.0, 0.5, None),
    ],
)
def test_retention_is_the_students_share_where_higher_is_better_and_the_other_way_round_for_losses(
    measure, teacher, student, kept
):
    assert compare.retention(measure, teacher, student) == (
        kept if kept is None else pytest.approx(kept)
    )


def test_no_speedup_between_two_devices(demo, tmp_path, no_pictures):
    folders.answers(
        demo / "teacher-eval", "teacher", speed={"tok_per_s": 100.0, "device": "cuda", "threads": 1}
    )
    made = compared(tmp_path / "out", demo)
    assert made["speedup"] == {} and "times its speed" not in made["verdict"]


def test_without_a_teacher_there_is_neither_difference_nor_retention(demo, tmp_path, no_pictures):
    made = compared(tmp_path / "out", demo / "stage1", demo / "control", demo / "stage2")
    assert made["comparison"] == made["compression"] == {} and made["roles"] == {
        "before": "stage1",
        "control": "control",
        "student": "stage2",
    }
    assert (
        made["verdict"].startswith("stage2 has exact match of the answer 0.816.")
        and "retention" not in (tmp_path / "out.md").read_text()
    )


def test_the_roles_can_be_given(demo, tmp_path, no_pictures):
    made = compared(
        tmp_path / "out", demo, "--teacher", "stage2", "--student", "control", "--before", "teacher"
    )
    assert made["roles"] == {"teacher": "stage2", "before": "teacher", "student": "control"}


def test_the_verdict_says_quality_size_and_speed(demo, tmp_path, no_pictures):
    said = compared(tmp_path / "out", demo)["verdict"]
    assert (
        said
        == "stage2 keeps 81.9 % of the teacher's exact match of the answer (0.816 of 0.996) with"
        " 14.1 % of its parameters, at 2.5 times its speed, at a KL of 0.0310 nats to it. Before"
        " (stage1): 0.122. Answers alone (control): 0.608."
    )


def test_a_failure_is_the_headline(demo, tmp_path, no_pictures):
    for name, exact in (("teacher", 0.094), ("stage1", 0.372), ("stage2", 0.162)):
        path = demo / f"{name}-eval" / "answers.scores.json"
        made = json.loads(path.read_text())
        made["metrics"]["exact"] |= {"value": exact}
        path.write_text(json.dumps(made))
    said = compared(tmp_path / "out", demo)["verdict"]
    assert said.startswith(
        "FAILED: teacher is below stage1 in exact match of the answer, 0.094 against 0.372: it has"
        " nothing to teach. FAILED: stage2 is below stage1 in exact match of the answer, 0.162"
        " against 0.372. FAILED: stage2 is below control in exact match of the answer, 0.162"
        " against 0.608. stage2 keeps 172.3 %"
    )
    path = demo / "teacher-eval" / "answers.scores.json"
    made = json.loads(path.read_text())
    made["metrics"]["exact"] |= {"value": 0}
    path.write_text(json.dumps(made))
    said = compared(tmp_path / "out", demo)["verdict"]
    assert said.startswith("FAILED: teacher has exact match of the answer 0.000: nothing to")


def test_a_control_whose_best_is_its_start_is_said_with_its_final(demo, tmp_path, no_pictures):
    history = demo / "control" / "history.jsonl"
    lines = [json.loads(line) for line in history.read_text().splitlines()]
    evaluations = [line for line in lines if line["event"] == "eval"]
    assert len(evaluations) > 1
    for number, line in enumerate(evaluations):
        line["ce"] = 1.0 + number
    history.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (said,) = compared(tmp_path / "out", demo)["starts"]
    assert said.startswith("control: its best/") and "step 0, the model it began from" in said
    assert f"CE, nats a target {len(evaluations)}.0000 (best/ 1.0000)" in said
    assert said in (tmp_path / "out.md").read_text()
    assert "is step 0, the model it began from" in (tmp_path / "out.html").read_text()


@pytest.mark.parametrize(
    "steps,taken,says",
    [
        (30, 30, "CE only at equal steps (30)"),
        (50, 50, "CE only, steps NOT equal: 50; stage2 30"),
        (50, 20, "CE only, steps NOT equal: 20, stopped early; stage2 30"),
        (50, 30, "CE only at equal steps (30)"),
    ],
)
def test_the_control_says_whether_its_steps_are_the_students(
    demo, tmp_path, no_pictures, steps, taken, says
):
    folders.run(demo / "control", steps=steps, taken=taken)
    assert compared(tmp_path / "out", demo)["control"] == says
    assert f"control: {says}." in (tmp_path / "out.md").read_text()


def test_a_control_of_another_start_is_no_fair_one(demo, tmp_path, no_pictures):
    folders.run(demo / "control", steps=30, lr=5.0, **{"student identity": "other"})
    assert (
        compared(tmp_path / "out", demo)["control"]
        == "CE only at equal steps (30); but another start, learning rate than stage2"
    )


def test_a_round_is_held_against_what_it_began_from(demo, tmp_path, no_pictures):
    """own1 goes on from stage2: the control is fair to stage2, and the gain of the round is own1
    less stage2, by prompt."""
    folders.run(demo / "own1", steps=30, student="runs/demo/stage2", **{"data identity": "other"})
    folders.evaluation(demo / "own1-eval", "stage2")
    folders.answers(demo / "own1-eval", "stage2")
    made = compared(tmp_path / "out", demo)
    assert made["roles"]["student"] == "own1" and made["began"] == "stage2"
    assert list(made["paired"]) == ["began", "control", "teacher"]
    assert made["control"] == "against stage2: CE only at equal steps (30)"
    told = (tmp_path / "out.md").read_text()
    assert "- own1 less stage2, exact match of the answer: +0.000" in told
    folders.run(demo / "own1", steps=30, student="runs/other/stage2")  # no stage2 of these
    assert compared(tmp_path / "out", demo)["began"] is None


def test_the_control_of_a_student_that_is_no_round_is_held_against_the_student(
    demo, tmp_path, no_pictures
):
    """Also where it began from a model without a role: the control is fair to it or not."""
    folders.run(demo / "warm", steps=7)
    folders.evaluation(demo / "warm-eval", "stage1")
    folders.answers(demo / "warm-eval", "stage1")
    folders.run(demo / "stage2", steps=30, student="runs/demo/warm", stage="stage2")
    made = compared(tmp_path / "out", demo)
    assert made["began"] is None and made["control"].startswith("CE only at equal steps (30)")


def test_distances_that_are_not_to_one_teacher_are_told(demo, tmp_path, no_pictures, capsys):
    folders.evaluation(demo / "stage1-eval", "stage1", kl_is_to="runs/demo/teacher")
    compared(tmp_path / "out", demo)
    assert "the KLs are not" not in capsys.readouterr().out
    folders.evaluation(demo / "stage2-eval", "stage2", kl_is_to="A (a), B (b)")
    compared(tmp_path / "out", demo)
    said = capsys.readouterr().out
    assert "the KLs are not to one teacher: of stage1 to runs/demo/teacher; of stage2 to A" in said


def test_an_evaluation_of_other_weights_is_told(demo, tmp_path, no_pictures, capsys):
    folders.evaluation(demo / "stage1-eval", "stage1", weights="a" * 64)
    folders.answers(demo / "stage1-eval", "stage1", weights="b" * 64)
    folders.evaluation(
        demo / "stage2-eval", "stage2", student="stage2/best"
    )  # CE 0.14, where the run's history has 0.3
    folders.evaluation(demo / "control-eval", "control", student="control/best", ce=0.3001)
    compared(tmp_path / "out", demo)
    said = capsys.readouterr().out
    assert (
        "stage1-eval: eval.json and answers.scores.json are of different weights" in said
        and "control-eval" not in said
    )
    assert (
        "stage2-eval: its CE 0.1400 is not that of best/ in the run's own history, 0.3000" in said
    )


def test_retention_is_not_met_where_the_teachers_answers_are_missing(demo, tmp_path, no_pictures):
    for name in ("answers.jsonl", "answers.scores.json"):
        (demo / "teacher-eval" / name).unlink()
    with pytest.raises(SystemExit, match="retention: it was not measured of both"):
        compare.main([str(demo), "--out", str(tmp_path / "out"), "--fail-under", "retention=0.5"])


def test_settings_that_differ_leave_out_what_does_nothing(demo, tmp_path, no_pictures):
    folders.answers(demo / "stage1-eval", "stage1", settings={"greedy": True, "max_new_tokens": 9})
    made = compared(tmp_path / "out", demo)["settings_that_differ"]
    assert (
        made["alpha"] == {"teacher": None, "stage1": None, "control": None, "stage2": 0.9}
        and "temperature" in made
        and "steps" in made
    )
    assert not {"feature_weight", "feature_layers", "beta", "lr", "data", "answers: greedy"} & set(
        made
    )  # off, or the same everywhere
    assert made["answers: max_new_tokens"]["stage1"] == 9 and "answers: ckpt" not in made


def test_curves_begin_where_the_stage_before_was_at_its_best_and_leave_out_other_held_out_rows(
    demo, tmp_path
):
    names = ("teacher", "stage1", "control", "stage2")
    read = {name: runs.read_run(demo / name) for name in names}
    lines = panels.training_curves(
        read, {"teacher": {"ce": 0.11}}, {"teacher": "teacher", "student": "stage2"}
    )
    assert lines["left"] == ["teacher"] and lines["level"] == {"ce": 0.11}
    assert {name: [step for step, _ in points] for name, points in lines["runs"].items()} == {
        "stage1": [0, 10, 20],
        "control": [10, 25, 40],
        "stage2": [10, 25, 40],
    }


def test_runs_that_name_each_other_as_their_start_do_not_go_round_for_ever(tmp_path):
    for name, other in (("a", "b"), ("b", "a")):
        folders.run(tmp_path / "g" / name, student=f"runs/g/{other}")
    read = {name: runs.read_run(tmp_path / "g" / name) for name in "ab"}
    assert set(panels.first_steps(read, "ab")) == {"a", "b"}


# --- tables


def test_tables_by_source_and_by_class_stand_where_there_are_such_measures(tmp_path, no_pictures):
    for name, f1 in (("teacher", 0.9), ("stage2", 0.7)):
        folders.evaluation(
            tmp_path / f"{name}-eval",
            name,
            accuracy=f1,
            macro_f1=f1,
            labels=["neg", "pos"],
            confusion=[[3, 1], [0, 6]],
            by_source={"news": {"ce": f1, "targets": 3}},
            per_class={
                "neg": {"precision": 1.0, "recall": 0.75, "f1": f1, "support": 4},
                "pos": {"precision": 0.9, "recall": 1.0, "f1": f1, "support": 6},
            },
        )
    made = compared(tmp_path / "out", tmp_path / "teacher-eval", tmp_path / "stage2-eval")
    text, page = ((tmp_path / f"out.{end}").read_text() for end in ("md", "html"))
    assert re.search(r"\| news +\| CE, nats a target +\| +0\.9000 \| +0\.7000 \|", text)
    assert re.search(r"\| neg +\| +4 \| +0\.900 \| +0\.700 \|", text)
    assert made["primary"] == "accuracy" and page.count('class="heat"') == 2 and ">6</td>" in page


def test_a_name_with_a_bar_does_not_break_the_table(tmp_path, no_pictures):
    folders.evaluation(tmp_path / "s-eval")
    compared(tmp_path / "out", f"a|b={tmp_path}/s-eval")
    assert "a\\|b" in (tmp_path / "out.md").read_text()


# --- --fail-under


@pytest.mark.parametrize(
    "demands,says",
    [
        (["retention=0.8"], None),
        (["retention.acc1=0.99", "exact=0.8", "ce=0.15"], None),
        (
            ["retention=0.95"],
            (
                "error: --fail-under retention: saw 0.8193 (exact 0.816 of 0.996), wanted at least"
                " 0.95"
            ),
        ),
        (
            ["retention.ce=0.9"],
            "error: --fail-under retention.ce: saw 0.7857 (ce 0.14 of 0.11), wanted at least 0.9",
        ),
        (
            ["exact=0.9", "ce=0.1", "acc1=0.9"],
            (
                "error: --fail-under exact: saw 0.8160, wanted at least 0.9; ce: saw 0.1400, wanted"
                " at most 0.1"
            ),
        ),
        (["bleu=0.1"], "error: --fail-under bleu: it was not measured, wanted 0.1"),
    ],
)
def test_fail_under_ends_with_1_after_everything_is_written(
    demo, tmp_path, no_pictures, demands, says
):
    argv = [
        demo,
        "--out",
        tmp_path / "out",
        *(word for demand in demands for word in ("--fail-under", demand)),
    ]
    if says is None:
        run(*argv)
    else:
        assert refused(*argv) == says
    assert all((tmp_path / f"out.{end}").exists() for end in ("json", "md", "html"))


def test_a_measure_that_is_no_number_fails():
    nan = {
        "roles": {"student": "s"},
        "models": {"s": {"ce": float("nan")}},
        "comparison": {},
        "primary": None,
    }
    assert compare.unmet(nan, [("ce", 1.0)]) and compare.unmet(nan, [("retention", 0.1)])


@pytest.mark.parametrize(
    "demand", ["retention", "speed=3", "retention.kl=0.9", "retention.=1", "acc1=much", "targets=1"]
)
def test_a_demand_that_cannot_be_meant_is_refused_before_anything_is_read(demo, demand, capsys):
    assert "--fail-under" in misused(capsys, demo, "--fail-under", demand)


# --- what it refuses


def test_other_held_out_rows_are_refused_and_named(demo, tmp_path):
    folders.evaluation(demo / "stage1-eval", "stage1", data="e" * 64)
    said = refused(demo, "--out", tmp_path / "out")
    assert (
        "stage1 and stage2 were not measured on the same held-out rows" in said
        and "e" * 12 in said
        and "d" * 12 in said
    )
    assert not (tmp_path / "out.json").exists()


def test_another_number_of_targets_is_refused_where_no_identity_is_known(demo):
    folders.evaluation(demo / "control-eval", "control", data=None, targets=7)
    assert "control and stage2" in (said := refused(demo)) and "7 of" in said and "19,473" in said


def test_answers_to_other_prompts_are_refused(demo):
    folders.answers(demo / "teacher-eval", "teacher", count=9, prompts="6" * 64)
    said = refused(demo)
    assert (
        "teacher and stage2 did not answer the same prompts" in said
        and "9 prompts" in said
        and "6" * 12 in said
        and "5" * 12 in said
    )


@pytest.mark.parametrize(
    "settings,script",
    [
        (dict(logits="logits/x", stage="stage2"), "stage2_kd.py --data data/x --logits logits/x"),
        (dict(), "stage1_sft.py --data data/x"),
    ],
)
def test_a_run_without_evaluation_is_refused_with_the_command_that_makes_it(
    tmp_path, settings, script
):
    at = folders.run(tmp_path / "a b", **settings)
    assert (
        f"mend it with: python {script} --student '{at}' --out '{at}-eval' --eval-only"
        in refused(at)
    )


def test_a_folder_without_any_evaluation_is_refused(tmp_path):
    folders.run(tmp_path / "g" / "stage1")
    assert (
        "holds no evaluation; saw the run stage1" in (said := refused(tmp_path / "g"))
        and "stage1_sft.py" in said
    )
    (tmp_path / "empty").mkdir()
    assert "holds no evaluation" in refused(tmp_path / "empty") and "is no folder" in refused(
        tmp_path / "nowhere"
    )


@pytest.mark.parametrize(
    "argv,says",
    [
        (
            ["--student", "stage9"],
            "stage9: there is no such model here, but teacher, stage1, control, stage2",
        ),
        (["--teacher", "stage2", "--student", "stage2"], "one model has two roles"),
        (["x="], "is not NAME=RUN"),
    ],
)
def test_roles_and_names_that_do_not_exist_are_refused(demo, argv, says, capsys):
    assert says in misused(capsys, demo, *argv)


def test_one_name_for_two_runs_is_refused(demo, capsys):
    assert "two runs are called a" in misused(capsys, f"a={demo}/stage1", f"a={demo}/stage2")


def test_a_broken_line_of_answers_is_named(demo):
    (demo / "stage1-eval" / "answers.jsonl").write_text(
        '{"answer": "a", "reference": "b"}\n{"answ\n{"x": 1}'
    )
    assert "answers.jsonl line 2 is not JSON" in refused(demo)


# --- pictures


def test_the_bars_are_the_values_and_their_error_bars_the_intervals(demo):
    from matplotlib import pyplot as plt

    models = {
        name: results.read_evaluation(demo / f"{name}-eval") for name in ("teacher", "stage2")
    }
    result = {"models": models, "roles": {"teacher": "teacher", "student": "stage2"}}
    names, measures = panels.drawn(result)
    assert measures == ["ce", "kl", "acc1", "exact", "parameters"]
    panel = panels.bar_panel("exact", result, names)
    _, axis = plt.subplots()
    panels.draw_bars(axis, panel, panels.model_colours(result))
    assert [bar.get_height() for bar in axis.patches] == [0.996, 0.816]
    ends = [
        [point[1] for point in segment]
        for lines in axis.collections
        for segment in lines.get_segments()
    ]
    assert ends == [pytest.approx([0.966, 1.0]), pytest.approx([0.786, 0.846])]
    plt.close("all")


def test_the_bars_of_the_page_are_as_high_as_their_values(demo, tmp_path):
    """rect and interval in the template's units: 150 high, from y = 184 up."""
    made = compared(tmp_path / "out", demo / "teacher", demo / "stage2")
    drawing = (tmp_path / "out.html").read_text().split("<svg")[4]
    assert "exact match of the answer: the numbers are in the table" in drawing
    top = panels.bar_panel("exact", made, ["teacher", "stage2"])["top"]
    high = [float(text) for text in re.findall(r' height="([\d.]+)"', drawing)]
    assert high == pytest.approx([150 * 0.996 / top, 150 * 0.816 / top], abs=0.01)
    ends = re.findall(r'd="M[\d.]+ ([\d.]+)h6m-3 0V([\d.]+)m', drawing)
    for pair, interval in zip(ends, ([0.966, 1.0], [0.786, 0.846]), strict=True):
        low, up = ((184 - float(y)) * top / 150 for y in reversed(pair))
        assert (low, up) == pytest.approx(tuple(interval), abs=1e-3)


@pytest.mark.parametrize("log", [False, True])
def test_an_axis_holds_its_ends_and_its_ticks_are_round_numbers_in_their_places(log):
    place, ticks = panels.axis_of(0.1, 3.4, log)
    assert 0 < place(0.1) < 0.06 and 0.94 < place(3.4) < 1
    assert ticks == ([0.1, 0.2, 0.5, 1.0, 2.0] if log else [0.0, 1.0, 2.0, 3.0])
    middle = 0.1 * 34**0.5 if log else 1.75
    assert place(middle) == pytest.approx(0.5)


@pytest.mark.parametrize(
    "low,high,wanted",
    [
        (0.0, 0.34, [0.0, 0.1, 0.2, 0.3, 0.4]),
        (5, 5, [5]),
        (0, 1100, [0, 200, 400, 600, 800, 1000, 1200]),
        (-0.2, 0.09, [-0.2, -0.15, -0.1, -0.05, 0.0, 0.05, 0.1]),
    ],
)
def test_ticks_are_round(low, high, wanted):
    assert panels.ticks(low, high) == wanted


def test_the_curves_of_the_page_have_a_point_an_evaluation(demo, tmp_path):
    compared(tmp_path / "out", demo)
    curves = (tmp_path / "out.html").read_text().split("<h2>Over training</h2>")[1]
    drawing = curves.split("<svg")[1]
    assert "CE, nats a target, held out" in drawing and "optimizer steps, those of the" in drawing
    points = re.findall(r'<polyline points="([^"]*)"', drawing)
    assert [len(line.split()) for line in points] == [3, 3, 3] and 'class="level"' in drawing


def test_the_page_has_its_pictures_without_matplotlib(demo, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    compared(tmp_path / "out", demo)
    assert (tmp_path / "out.html").read_text().count("<svg") == 5 + 3
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize(
    "value,said",
    [
        (12, "12"),
        (96512, "96.5k"),
        (685056, "685k"),
        (999_999, "1M"),
        (134_515_008, "135M"),
        (7_615_616_512, "7.62B"),
    ],
)
def test_sizes_over_bars_are_short(value, said):
    assert panels.short("parameters", value) == said


@pytest.mark.parametrize("count", [1, 2, 9])
def test_pictures_of_any_number_of_models_with_any_names_can_be_drawn(tmp_path, count):
    names = ["<script>$x^2$", "stage2-T2.0-a0.9-20261121-135045", *map(str, range(count))][:count]
    for i in range(count):
        folders.evaluation(tmp_path / f"{i}-eval")
    compared(tmp_path / "out", *(f"{name}={tmp_path}/{i}-eval" for i, name in enumerate(names)))
    assert (tmp_path / "out.png").exists() == (count > 1) and "<script" not in (
        tmp_path / "out.html"
    ).read_text()


# --- the page, in a browser


CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
EVIL = (
    "<script>document.title = 'owned'</script><img src=https://example.com/x.png onerror=alert(1)>"
)
READ = """() => [...document.querySelectorAll('#measures td')].map(cell => [cell.dataset.measure, cell.dataset.model || cell.dataset.part,
    [...cell.childNodes].filter(node => node.nodeType === 3).map(node => node.textContent).join('')])"""


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="no playwright: pip install playwright"
    )
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    with playwright.sync_playwright() as running:
        opened = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


def number(text: str) -> float:
    value, _, unit = text.replace(",", "").partition(" ")
    return float(value) * {"": 1, "B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "%": 0.01}[unit]


def test_a_browser_reads_the_table_back_asks_for_nothing_and_runs_nothing(demo, tmp_path, browser):
    for name in ("stage2", "teacher"):
        rows = results.answers_in(demo / f"{name}-eval")
        folders.jsonl(
            demo / f"{name}-eval" / "answers.jsonl", [{**row, "answer": EVIL} for row in rows]
        )
    made = compared(tmp_path / "out", demo)
    page, asked = browser.new_page(viewport={"width": 390, "height": 844}), []
    page.on("request", lambda request: asked.append(request.url))
    page.on("dialog", lambda dialog: pytest.fail("a script ran"))
    page.goto((tmp_path / "out.html").as_uri())
    assert asked == [(tmp_path / "out.html").as_uri()] and page.title() == "stage2 and its teacher"
    assert (
        page.locator("text=<script>document.title").count() == 16
        and page.locator("script, img").count() == 0
    )
    assert (page.locator(".right").count(), page.locator(".wrong").count()) == (
        8 + 1 + 6 + 8,
        7 + 2,
    )  # of the first 8 of 10 prompts
    assert page.evaluate("document.documentElement.scrollWidth") == 390, (
        "the page itself must not scroll sideways"
    )
    assert page.locator("svg").count() == 5 + 3

    seen = {(measure, of): text for measure, of, text in page.evaluate(READ)}
    shown = 0
    for measure in results.present(made["models"]):
        for name, model in made["models"].items():
            value, text = results.value_of(model, measure), seen[measure, name]
            assert (value is None) == (text == "")
            if value is not None:
                decimals = len(text.split()[0].partition(".")[2])
                unit = (
                    number(text) / float(text.replace(",", "").split()[0])
                    if float(text.replace(",", "").split()[0])
                    else 1
                )
                assert number(text) == pytest.approx(value, abs=0.5001 * unit / 10**decimals), (
                    measure,
                    name,
                )
                shown += 1
        for part in ("difference", "retention"):
            value, text = made["comparison"].get(measure, {}).get(part), seen[measure, part]
            assert (value is None) == (text == "") and (
                value is None or number(text) == pytest.approx(value, abs=6e-4)
            ), (measure, part)
    assert (
        shown == 4 * 16
        and seen["ce", "stage2"] == "0.1400"
        and seen["bytes", "teacher"] == "2.7 MB"
    )
    page.close()


def test_the_best_of_a_row_is_bold_and_the_teacher_apart(demo, tmp_path, browser, no_pictures):
    compared(tmp_path / "out", demo)
    page = browser.new_page(color_scheme="dark")
    page.goto((tmp_path / "out.html").as_uri())
    bold = page.evaluate(
        "[...document.querySelectorAll('td.best')].map(cell => [cell.dataset.measure,"
        " cell.dataset.model])"
    )
    assert (
        ["ce", "stage2"] in bold
        and ["acc5", "control"] in bold
        and not any(of == "teacher" or what == "parameters" for what, of in bold)
    )
    background = page.evaluate(
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
    )
    assert background == ["rgb(20, 24, 31)", "rgb(230, 233, 239)"]
    page.close()


def test_the_student_is_the_last_round_on_its_own_text():
    names = ["teacher", "stage1", "control", "stage2", "own1", "own2"]
    parser, args = compare.parse_args(["x"])
    roles = entries.roles_of(names, args, parser)
    wanted = {"teacher": "teacher", "before": "stage1", "control": "control", "student": "own2"}
    assert roles == wanted
    assert entries.roles_of(names[:4], args, parser)["student"] == "stage2"


def test_what_a_round_costs_is_read_from_its_data_and_records(tmp_path):
    answers = tmp_path / "data/answers/0"
    answers.mkdir(parents=True)
    told = {"answers": 10, "mean_tokens": 7.5, "folder": "answers/0"}
    files.write_json(tmp_path / "data/meta.json", {"student": told})
    files.write_json(answers / "cost.json", {"written_s": 12.5})
    for chunk, seconds in (("chunk-0000", 3.0), ("val", 1.5)):
        (tmp_path / "logits" / chunk).mkdir(parents=True)
        (tmp_path / "logits" / chunk / "topk.npy").write_bytes(bytes(1000))
        files.write_json(tmp_path / "logits" / chunk / "cost.json", {"dumped_s": seconds})
    settings = {"data": str(tmp_path / "data"), "logits": str(tmp_path / "logits")}
    cost = runs.cost_of(settings)
    size = sum(path.stat().st_size for path in tmp_path.glob("logits/*/*"))
    assert cost == {"written_tokens": 75, "written_s": 12.5, "dumped_s": 4.5, "record_bytes": size}
    assert runs.cost_of({"data": None, "logits": "gone"}) == {}
    assert results.present({"own1": {"cost": cost}}) == [f"cost.{name}" for name in cost]
