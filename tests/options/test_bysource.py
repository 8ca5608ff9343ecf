"""Another method for each source (lib/options/bysource.py)."""

import make
import numpy as np
import pytest
import torch

import dump_logits
import stage1_sft
import stage2_kd
from lib import data, losses, models, plan
from lib.options import bysource

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = make.sourced(make.world(tmp_path_factory.mktemp("bysource")), own=["finance"])
    make.call(dump_logits.main, *make.dump(folder))
    return folder


def rows_of(folder, args):
    """Return the plan of one step of all rows."""
    rows = plan.Rows(args, data.Dataset(folder / "data"))
    rows.resume({})
    return rows


def method_args(**more):
    plain = dict(divergence="fkl", alpha=0.9, temperature=2.0, beta=None, tokens_per_step=1 << 20)
    return make.plan_args(**plain | more)


def gradient(folder, rows, schedule):
    """Return the step's loss, and the gradient at every weight."""
    student = models.load(str(folder / "student"), CPU)
    teacher = make.store(folder)
    total = 0.0
    for batch in rows.batches(0, CPU):
        method = schedule(0, batch)
        known = teacher.at(batch, method.temperature)
        hidden, head = student.hidden(batch), student.head()
        loss, _, _ = losses.head_loss(hidden, head, batch.labels, known, method)
        loss.backward()
        total += loss.item()
    return total, torch.cat([p.grad.flatten() for p in student.module.parameters()])


def test_the_step_is_the_sum_of_what_each_source_would_have_alone(folder):
    by = method_args(divergence={"general": "fkl", "finance": "rkl"})
    rows = rows_of(folder, by)
    loss, slope = gradient(folder, rows, bysource.open_schedule(by, rows.dataset, rows, 1))
    loss_alone, slope_alone = 0.0, 0.0
    for source, method in enumerate(
        (losses.Method(0.9, 2.0, "fkl"), losses.Method(1.0, 2.0, "rkl"))  # it is the student's own
    ):
        alone = rows_of(folder, by)
        mine = alone.split.rows["source"] == source
        alone.steps_of_rows = [np.flatnonzero(mine)]
        one, its = gradient(folder, alone, lambda step, batch: method)
        loss_alone, slope_alone = loss_alone + one, slope_alone + its
    assert loss == pytest.approx(loss_alone, rel=1e-5)
    assert (slope - slope_alone).norm() < 1e-4 * slope_alone.norm()


def test_no_micro_batch_holds_rows_of_two_methods(folder):
    args = method_args(temperature={"general": 2.0, "finance": 4.0}, tokens_per_microbatch=256)
    rows = rows_of(folder, args)
    bysource.open_schedule(args, rows.dataset, rows, 1)
    sources = rows.split.rows["source"]
    batches = list(rows.batches(0, CPU))
    assert all({*sources[batch.rows]} == {batch.source} for batch in batches)
    assert sorted(row for batch in batches for row in batch.rows) == list(range(len(sources)))


def test_sources_of_one_method_lie_together_as_ever(folder, tmp_path):
    make.sourced(make.world(tmp_path))
    args = method_args()
    rows, plain = rows_of(tmp_path, args), rows_of(tmp_path, args)
    schedule = bysource.open_schedule(args, rows.dataset, rows, 1)
    assert isinstance(schedule, losses.Schedule) and rows.groups is None
    assert [b.rows for b in rows.batches(0, CPU)] == [b.rows for b in plain.batches(0, CPU)]


def test_the_students_own_text_has_no_cross_entropy(folder):
    rows = rows_of(folder, args := method_args())
    schedule = bysource.open_schedule(args, rows.dataset, rows, 1)
    targets = {0: 0, 1: 0}
    for batch in rows.batches(0, CPU):
        method = schedule(0, batch)
        targets[batch.source] += len(batch.labels)
        assert (method.alpha, method.reference) == ((1.0, False) if batch.source else (0.9, True))
    sums = torch.tensor([6.0, 3.0, 2.0])
    both = sum(targets.values())
    said = schedule.figures(0, sums, both, {})
    assert said == pytest.approx({"loss": 6 / both, "kd": 2 / both, "ce": 3 / targets[0]})
    hidden, head = torch.randn(4, 8), models.Head(torch.randn(5, 8), None, 5)
    known = losses.TopK(torch.zeros(4, 1, dtype=torch.long), torch.zeros(4, 1), torch.zeros(4))
    method = losses.Method(1.0, 1.0, reference=False)
    _, ce, kd = losses.head_loss(hidden, head, torch.zeros(4, dtype=torch.long), known, method)
    assert ce == 0 and kd > 0


@pytest.mark.parametrize(
    "more, words",
    [
        (["--divergence", "general:fkl sports:rkl"], "sports"),
        (["--divergence", "general:fkl"], "says nothing of the source finance"),
        (["--alpha", "general:0.5"], "--alpha with finance:VALUE"),
    ],
)
def test_a_source_that_is_unknown_or_left_out_is_named(folder, tmp_path, more, words):
    code, said = make.ends(stage2_kd.main, *make.stage2(folder, *more, out=tmp_path / "out"))
    assert code == 1 and words in said and "\n" not in said


@pytest.mark.parametrize(
    "more",
    [
        ["--divergence", "general:fkl general:rkl"],
        ["--divergence", "general:kl"],
        ["--divergence", "kl"],
        ["--alpha", "general:1.5"],
        ["--temperature", "general:0"],
        ["--alpha", ":0.5"],
    ],
)
def test_what_cannot_be_read_is_an_error_of_usage(folder, tmp_path, more, capsys):
    code, _ = make.ends(stage2_kd.main, *make.stage2(folder, *more, out=tmp_path / "out"))
    assert code == 2 and more[0] in capsys.readouterr().err


def test_a_run_by_source_goes_on_after_a_stop_as_if_there_were_none(folder, tmp_path):
    more = "--divergence", "general:fkl finance:srkl", "--alpha", "general:0.9->0.5 finance:1"
    make.call(stage2_kd.main, *make.stage2(folder, *more, out=tmp_path / "straight"))
    lines = make.history(tmp_path / "straight", "train")
    assert lines[0]["alpha_general"] == 0.9 and all("alpha_finance" not in line for line in lines)
    state = (tmp_path / "straight/config.json").read_text()
    assert '"general": "fkl"' in state


@pytest.mark.parametrize("more", ([], ["--mix", "general:0.5 finance:0.5"], ["--dry-run"]))
def test_stage_1_refuses_the_students_own_text_and_names_what_takes_it(folder, tmp_path, more):
    code, said = make.ends(stage1_sft.main, *make.stage1(folder, *more, out=tmp_path / "out"))
    assert code == 1 and "own text is no reference" in said and "\n" not in said
    assert "finance in " in said and "stage2_kd.py" in said and not (tmp_path / "out").exists()


@pytest.mark.parametrize("more", (["--mix", "general:1", "--steps", 1], ["--eval-only"]))
def test_stage_1_takes_the_sources_beside_it_and_measures_on_all(folder, tmp_path, more):
    make.call(stage1_sft.main, *make.stage1(folder, *more, out=tmp_path / "out"))
