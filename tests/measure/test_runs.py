"""The list of runs: which folders are runs, how far they came, and their best numbers."""

import json
import subprocess
import sys
from pathlib import Path

import folders
import pytest

from lib import files
from lib.measure import runs


def listed(folder, capsys, *argv) -> list[dict]:
    runs.main([str(folder), "--json", *argv])
    return json.loads(capsys.readouterr().out)


def test_runs_are_found_three_folders_deep_and_checkpoints_are_none(tmp_path, capsys):
    for place in ("a", "g/b", "g/sweep/T1-a0.5", "g/h/i/too-deep"):
        folders.run(tmp_path / place)
    folders.write(tmp_path / "a" / "best" / "config.json", {"model_type": "llama"})
    folders.write(tmp_path / "model" / "config.json", {"model_type": "llama"})
    folders.evaluation(tmp_path / "a-eval")
    assert {run["name"] for run in listed(tmp_path, capsys)} == {"a", "g/b", "g/sweep/T1-a0.5"}


def test_a_run_itself_can_be_named(tmp_path, capsys):
    assert [run["name"] for run in listed(folders.run(tmp_path / "x"), capsys)] == ["x"]


@pytest.mark.parametrize(
    "options,state,steps",
    [
        (dict(), "finished", 20),
        (dict(taken=10), "stopped early at 10 of 20", 10),
        (dict(taken=10, finished=False), "stopped at step 10 of 20", 10),
        (dict(taken=10, finished=False, steps=0), "stopped at step 10", 10),
    ],
)  # by epochs: how many steps that is, is not written down
def test_the_state_says_how_far_a_run_came(tmp_path, capsys, options, state, steps):
    folders.run(tmp_path / "x", **options)
    (run,) = listed(tmp_path, capsys)
    assert (
        run["state"] == state
        and run["steps"] == steps
        and run["finished"] == ("finished" in state or "early" in state)
    )


def test_a_run_that_was_killed_before_it_saved_begins_at_0(tmp_path, capsys):
    folders.run(tmp_path / "x", finished=False)
    (tmp_path / "x" / "last" / "state.json").unlink()
    (run,) = listed(tmp_path, capsys)
    assert run["state"] == "stopped at step 0" and run["ce"] == 0.3


def test_a_run_that_goes_on_is_running_and_is_not_disturbed(tmp_path, capsys):
    folders.run(tmp_path / "x", taken=10, finished=False)
    held = files.lock(tmp_path / "x")
    (run,) = listed(tmp_path, capsys)
    assert run["state"] == "running, saved at step 10 of 20"
    held.release()
    assert listed(tmp_path, capsys)[0]["state"] == "stopped at step 10 of 20"


def test_the_numbers_are_those_of_best_from_the_evaluation_folder_or_else_from_the_history(
    tmp_path, capsys
):
    folders.run(tmp_path / "measured", when=1)
    folders.run(tmp_path / "unmeasured", when=2)
    folders.evaluation(tmp_path / "measured-eval")
    folders.answers(tmp_path / "measured-eval")
    measured, unmeasured = listed(tmp_path, capsys)
    assert (measured["ce"], measured["kl"], measured["exact"]) == (0.14, 0.031, 0.816)
    assert (unmeasured["ce"], unmeasured["kl"], unmeasured["exact"]) == (
        0.3,
        0.15,
        None,
    )  # of the evaluation at step 10, not of the last one
    assert measured["best"] == 0.3 and measured["best_by"] == "ce" and measured["tok_per_s"] == 20.0


@pytest.mark.parametrize("best_by,step", [("ce", 10), ("acc1", 10), ("kl", 10), ("nothing", 20)])
def test_best_is_the_lowest_loss_or_the_highest_accuracy(tmp_path, best_by, step):
    assert (
        runs.best_line(runs.read_run(folders.run(tmp_path / "x"))["history"], best_by)["step"]
        == step
    )


@pytest.mark.parametrize(
    "by,order",
    [
        ("when", ["b", "c", "a"]),
        ("ce", ["c", "a", "b"]),
        ("exact", ["a", "c", "b"]),
        ("name", ["a", "b", "c"]),
    ],
)
def test_sorted_by_time_or_by_a_measure_the_best_first_and_the_unmeasured_last(
    tmp_path, capsys, by, order
):
    for name, when, ce, exact in (("a", 30, 0.4, 0.9), ("b", 10, None, None), ("c", 20, 0.2, 0.5)):
        history = [{"event": "eval", "step": 0, "ce": ce, "targets": 1}] if ce else []
        folders.run(tmp_path / name, when=when, history=history)
        if exact:
            folders.write(
                tmp_path / f"{name}-eval" / "answers.scores.json",
                {"count": 1, "metrics": {"exact": {"value": exact, "low": 0, "high": 1, "n": 1}}},
            )
    assert [run["name"] for run in listed(tmp_path, capsys, "--sort", by)] == order


def test_the_teachers_line_and_a_line_that_is_being_written_are_no_evaluations(tmp_path, capsys):
    folders.run(
        tmp_path / "x",
        history=[
            {"event": "teacher", "step": 0, "ce": 0.01},
            {"event": "eval", "step": 0, "ce": 0.5, "targets": 1},
        ],
    )
    with open(tmp_path / "x" / "history.jsonl", "a") as log:
        log.write('{"event": "eval", "step": 5, "c')
    assert listed(tmp_path, capsys)[0]["ce"] == 0.5


def test_the_table_marks_the_unfinished_in_yellow_on_a_terminal_alone_and_says_how_to_go_on(
    tmp_path, capsys, monkeypatch
):
    folders.run(tmp_path / "done", when=1)
    folders.run(tmp_path / "half", taken=10, finished=False)
    runs.main([str(tmp_path)])
    plain = capsys.readouterr().out
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    runs.main([str(tmp_path)])
    coloured = capsys.readouterr().out
    assert (
        "\033" not in plain and coloured.replace(runs.YELLOW, "").replace(runs.PLAIN, "") == plain
    )
    (line,) = [line for line in coloured.splitlines() if "\033" in line]
    assert (
        "half" in line
        and "stopped at step 10 of 20" in line
        and "1 unfinished: the command that began a run continues it" in plain
    )


def test_no_folder_is_an_error_and_no_run_is_none(tmp_path, capsys):
    with pytest.raises(SystemExit, match="is no folder"):
        runs.main([str(tmp_path / "nowhere")])
    runs.main([str(tmp_path)])
    assert capsys.readouterr().out == f"no runs under {tmp_path}\n"


def test_it_runs_without_torch():
    code = "import sys; from lib.measure import runs; sys.exit('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
    )
