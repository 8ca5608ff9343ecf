"""What is said of the student's own text where it goes wrong over a run (lib/options/drift.py)."""

import json

import make
import pytest

import stage2_kd
from lib import generate
from lib.options import drift, onpolicy

FIRST = {"mean_tokens": 40.0, "ended": 0.9, "entropy": 1.0}


@pytest.mark.parametrize(
    "now, names",
    [
        ({}, set()),
        ({"mean_tokens": 59.0, "ended": 0.46, "entropy": 0.11}, set()),
        ({"mean_tokens": 61.0}, {"length"}),
        ({"mean_tokens": 26.0}, {"length"}),
        ({"ended": 0.44}, {"ended"}),
        ({"entropy": 0.09}, {"entropy"}),
        ({"mean_tokens": 0.0, "ended": 0.0, "entropy": 0.0}, {"length", "ended", "entropy"}),
        ({"entropy": 30.0, "ended": 1.0}, set()),
    ],
)
def test_what_goes_wrong_is_named_beyond_its_bound_and_not_before(now, names):
    assert {*generate.drifted(FIRST, FIRST | now)} == names


@pytest.mark.parametrize("now", ({"mean_tokens": 1.9}, {"ended": 0.0}))
def test_what_is_small_at_first_is_not_noise_that_is_warned_of(now):
    first = {"mean_tokens": 1.0, "ended": 0.08, "entropy": 0.0}
    assert not generate.drifted(first, first | now)


def test_no_single_step_is_compared_but_the_means_over_a_window(monkeypatch):
    """Steps of four answers, in turn of 2 and of 20 tokens, are alike; then all are of 20."""
    watch = drift.Drift(more := {})
    said = []
    for step in range(192):
        length = 20 if step % 2 else 2
        said += watch.add([length] * 4, 4, [-1.0] * 4 * length)
    assert not said and more["drift"]["first"]["mean_tokens"] == pytest.approx(11, abs=0.2)
    for _ in range(200):
        said += watch.add([20] * 4, 4, [-1.0] * 80)
    assert len(said) == 1 and "grow: 20.0 tokens on average, 11.0 before" in said[0]


def test_each_is_said_once_and_a_run_that_goes_on_says_what_a_straight_one_does():
    steps = [([9] * 100, 90, [-0.7] * 1000)] * 3 + [([2] * 100, 10, [-1e-3] * 300)] * 9
    straight, watch = [], drift.Drift({})
    for step in steps:
        straight.append(watch.add(*step))
    broken, more = [], {}
    for step in steps:  # killed and continued at every step
        broken.append(drift.Drift(more).add(*step))
        more = json.loads(json.dumps(more))
    assert broken == straight and sum(map(len, straight)) == 3
    assert json.dumps(more["drift"]) == json.dumps(watch.state)


def test_a_run_stopped_in_the_middle_says_the_rest_of_what_a_straight_one_does(
    tmp_path, monkeypatch, capsys
):
    folder = make.sourced(make.world(tmp_path))
    monkeypatch.setattr(
        drift, "IN_A_WINDOW", 4
    )  # a step's answers; each window has a line of its own
    monkeypatch.setattr(
        generate, "drifted", lambda first, now: {json.dumps(now): f"was {first}, is {now}"}
    )
    more = "--on-policy", "0.6", "--steps", "6", "--save-every", "2"

    def warnings():
        said = capsys.readouterr().out.splitlines()
        return [line for line in said if line.startswith("on-policy: WARNING")]

    make.call(stage2_kd.main, *make.live(folder, *more, out="straight"))
    straight, write = warnings(), onpolicy.OwnRows.write

    def killed(rows, step, numbers):
        if step == 3:
            raise KeyboardInterrupt
        return write(rows, step, numbers)

    monkeypatch.setattr(onpolicy.OwnRows, "write", killed)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        make.call(stage2_kd.main, *make.live(folder, *more, out="stopped"))
    before = warnings()
    monkeypatch.setattr(onpolicy.OwnRows, "write", write)
    make.call(stage2_kd.main, *make.live(folder, *more, out="stopped"))
    after = warnings()
    again = len(before) + len(after) - len(straight)  # step 2 is run twice, and said twice
    assert len(straight) == 5 and again == 1 and before[:-1] + after == straight
