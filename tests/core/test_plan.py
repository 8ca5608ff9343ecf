import argparse
from types import SimpleNamespace

import make
import numpy as np
import pytest

from lib import files, plan

LENGTHS = np.random.default_rng(1).integers(3, 200, 500).astype(np.uint32)
ROWS = np.arange(500)


def flat(batches):
    return [row for lines in batches for line in lines for row in line]


@pytest.mark.parametrize("tokens_per_step", (1, 64, 1000, 4096, 10**9))
def test_every_row_is_in_an_epoch_exactly_once(tokens_per_step):
    steps = plan.steps(ROWS, LENGTHS, 0, 0, tokens_per_step)
    assert sorted(np.concatenate(steps)) == ROWS.tolist() and all(len(step) for step in steps)


def test_an_epoch_of_some_rows_holds_these_alone():
    some = np.array([7, 400, 3, 99])
    assert sorted(np.concatenate(plan.steps(some, LENGTHS, 0, 0, 100))) == [3, 7, 99, 400]


def test_the_plan_is_a_pure_function_of_rows_lengths_seed_and_epoch():
    once = plan.steps(ROWS, LENGTHS, 3, 2, 1000)
    np.random.seed(99)
    np.random.default_rng(99).random(10)
    again = plan.steps(ROWS.copy(), LENGTHS.copy(), 3, 2, 1000)
    assert [step.tolist() for step in once] == [step.tolist() for step in again]


@pytest.mark.parametrize("other", ((4, 2), (3, 3)))
def test_seeds_and_epochs_have_orders_of_their_own(other):
    assert not np.array_equal(
        np.concatenate(plan.steps(ROWS, LENGTHS, 3, 2, 1000)),
        np.concatenate(plan.steps(ROWS, LENGTHS, *other, 1000)),
    )


def test_steps_are_balanced_the_last_one_too():
    sizes = [int(LENGTHS[step].sum()) for step in plan.steps(ROWS, LENGTHS, 0, 0, 4096)]
    assert len(sizes) == round(LENGTHS.sum() / 4096)
    assert (
        max(sizes) - min(sizes) <= 2 * LENGTHS.max()
        and abs(sizes[-1] - np.mean(sizes)) <= LENGTHS.max()
    )


@pytest.mark.parametrize("pack", (True, False))
@pytest.mark.parametrize("tokens, line", ((200, 200), (1024, 512), (4096, 1024), (777, 777)))
def test_packing_never_exceeds_its_budgets_and_loses_no_row(pack, tokens, line):
    step = ROWS[:150]
    batches = plan.microbatches(step, LENGTHS, tokens, line, pack)
    assert sorted(flat(batches)) == step.tolist()
    for lines in batches:
        widths = [sum(int(LENGTHS[row]) for row in each) for each in lines]
        assert max(widths) <= line and max(widths) * len(lines) <= tokens, (
            widths
        )  # with the padding
        assert pack or all(len(each) == 1 for each in lines)


def test_packing_leaves_little_padding():
    batches = plan.microbatches(ROWS, LENGTHS, 4096, 1024)
    computed = sum(
        len(lines) * max(sum(int(LENGTHS[row]) for row in line) for line in lines)
        for lines in batches
    )
    assert computed < 1.03 * LENGTHS.sum()


def test_first_fit_decreasing_by_hand():
    lengths = np.array([5, 4, 3, 2, 1])
    assert plan.microbatches(np.arange(5), lengths, 12, 6) == [[[0, 4], [1, 3]], [[2]]]
    assert plan.microbatches(np.arange(5), lengths, 12, 6, pack=False) == [
        [[0], [1]],
        [[2], [3], [4]],
    ]


def test_lines_are_long_enough_to_pack_well_and_no_longer():
    assert plan.line_length(LENGTHS, 4096, "sdpa") == max(LENGTHS.max(), 4 * int(LENGTHS.mean()))
    assert plan.line_length(np.array([60, 60, 90]), 4096, "sdpa") == 280
    assert plan.line_length(np.array([2000] + 20 * [10]), 4096, "sdpa") == 2000
    assert plan.line_length(LENGTHS, 250, "sdpa") == 250
    assert plan.line_length(LENGTHS, 4096, "flash_attention_2") == 4096
    assert plan.line_length(np.array([30000, 40]), 32768, "sdpa") == plan.MASKED
    assert plan.line_length(np.array([30000, 40]), 32768, "flash_attention_2") == 32768


@pytest.mark.parametrize("pack", (True, False))
def test_a_row_that_is_too_long_for_a_mask_shares_neither_line_nor_micro_batch(pack):
    lengths = np.array([plan.MASKED + 1, 7, 2 * plan.MASKED, plan.MASKED, 9])
    line = plan.line_length(lengths, 4 * plan.MASKED, "sdpa")
    batches = plan.microbatches(np.arange(5), lengths, 4 * plan.MASKED, line, pack)
    short = [[[3], [4, 1]]] if pack else [[[3], [4], [1]]]
    assert batches == [[[2]], [[0]], *short]


def test_a_run_of_whole_epochs_is_these_epochs_one_after_the_other():
    run = plan.whole_run(ROWS, LENGTHS, 0, 1000, epochs=3)
    wanted = [step for epoch in range(3) for step in plan.steps(ROWS, LENGTHS, 0, epoch, 1000)]
    assert [step.tolist() for step in run] == [step.tolist() for step in wanted]


@pytest.mark.parametrize("epochs, share", ((0.5, 0.5), (1.25, 1.25), (0.001, 0)))
def test_a_part_of_an_epoch_is_its_first_steps_and_at_least_one(epochs, share):
    whole = [step for epoch in range(2) for step in plan.steps(ROWS, LENGTHS, 0, epoch, 1000)]
    run = plan.whole_run(ROWS, LENGTHS, 0, 1000, epochs)
    assert len(run) == max(1, round(share * len(whole) / 2))
    assert [step.tolist() for step in run] == [step.tolist() for step in whole[: len(run)]]


@pytest.mark.parametrize("count", (1, 7, 120))
def test_a_run_of_so_many_steps_has_them_whatever_the_epochs(count):
    run = plan.whole_run(ROWS, LENGTHS, 0, 1000, 0.1, count)
    assert len(run) == count
    assert [step.tolist() for step in run] == [
        step.tolist() for step in plan.whole_run(ROWS, LENGTHS, 0, 1000, 9, count)
    ]


@pytest.mark.parametrize("every_s, told", [(-1.0, 3), (1e9, 0)])
def test_a_step_that_takes_long_says_how_far_it_is(monkeypatch, capsys, every_s, told):
    monkeypatch.setattr(files, "TOLD_EVERY_S", every_s)
    split = SimpleNamespace(
        rows={"length": np.full(3, 8)}, batch=lambda lines: SimpleNamespace(to=lambda _: lines)
    )
    args = SimpleNamespace(no_pack=False, tokens_per_microbatch=8)
    rows = plan.Rows(args, SimpleNamespace(train=split))
    rows.line, rows.steps_of_rows = 8, [np.arange(3)]
    assert len(list(rows.batches(0, None))) == 3
    assert capsys.readouterr().err.count("of 3 micro-batches") == told


@pytest.mark.parametrize(
    "steps, tokens, warns", [(0, 10**6, True), (3, 10**6, False), (0, 100, False)]
)
def test_few_steps_are_said_by_who_knows_them(tmp_path, capsys, steps, tokens, warns):
    """prepare_data.py guessed them, and was wrong of every run with --tokens-per-step."""
    dataset = make.dataset(tmp_path / "data", rows=400)
    flags = {
        "tokens_per_step": tokens,
        "steps": steps,
        "epochs": 1,
        "seed": 0,
        "no_pack": False,
        "attn": "auto",
    }
    rows = plan.Rows(argparse.Namespace(**flags, tokens_per_microbatch=4096), dataset)
    rows.resume({})
    rows.say(10)
    assert ("few steps" in capsys.readouterr().out) == warns
