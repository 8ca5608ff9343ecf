"""Evaluation-driven sampling: the rule, its bounds, what it leaves alone, and that a killed run
draws the same rows."""

import signal

import make
import numpy as np
import pytest

import dump_logits
import stage1_sft
import stage2_kd
from lib import data
from lib.measure import plots
from lib.options import mix, sampling

STAGES = {"stage1_sft": (stage1_sft, make.stage1), "stage2_kd": (stage2_kd, make.stage2)}
SAMPLED = ("--eval-sampling", "--mix", "general:0.5 finance:0.5", "--steps", 12, "--eval-every", 2)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(plots, "curves", lambda *_: None)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = make.sourced(make.world(tmp_path_factory.mktemp("world"), rows=40))
    make.call(dump_logits.main, *make.dump(folder))
    return folder


def sampler(world, steps=10, text="general:0.5 finance:0.5"):
    args = make.plan_args(tokens_per_step=128, steps=steps, mix=text, eval_sampling=True)
    rows = sampling.open_rows(args, data.Dataset(world / "data"))
    rows.resume({})
    return rows


def ce(general, finance):
    return {"ce_general": general, "ce_finance": finance}


def test_the_worked_example_of_the_rule(world):
    one = sampler(world)
    assert one.hear(0, ce(2.0, 3.0)) == {"factor_general": 1.0, "factor_finance": 1.0}
    factors = one.hear(4, ce(2.0 * 0.94, 3.0 * 0.98))
    assert factors == pytest.approx({"factor_general": np.exp(-0.2), "factor_finance": np.exp(0.2)})
    assert one.wanted_shares()[:4].tolist() == [[0.5, 0.5]] * 4
    np.testing.assert_allclose(one.wanted_shares()[4:], [[0.4013, 0.5987]] * 6, atol=1e-4)


def test_equal_gains_change_nothing_whatever_their_size(world):
    one = sampler(world)
    one.hear(0, ce(2.0, 3.0))
    assert one.hear(3, ce(1.0, 1.5)) == {"factor_general": 1.0, "factor_finance": 1.0}


def test_factors_are_bounded_however_long_a_source_stands_still(world):
    one, value = sampler(world, 200), 2.0
    for step in range(100):
        factors = one.hear(step, ce(value, 3.0))
        value *= 0.9
    assert factors == {"factor_general": 1 / sampling.BOUND, "factor_finance": sampling.BOUND}
    assert one.wanted_shares()[-1].tolist() == pytest.approx([0.1, 0.9])


def test_a_share_of_zero_stays_zero_and_a_schedule_is_still_followed(world):
    one = sampler(world, 10, text="general:1->0 finance:0->1")
    one.hear(0, ce(2.0, 3.0))
    one.hear(1, ce(1.0, 3.0))
    shares = one.wanted_shares()
    assert (
        shares[0].tolist() == [1, 0]
        and shares[-1].tolist() == [0, 1]
        and (np.diff(shares[:, 1]) > 0).all()
    )
    assert (shares[1:-1, 1] > mix.asked(one.parts, 10)[1:-1, 1]).all()


def test_steps_before_an_evaluation_keep_their_rows_and_later_ones_follow_the_shares(world):
    one = sampler(world, 60)
    before = [rows.tolist() for rows in one.steps_of_rows]
    one.hear(0, ce(2.0, 3.0))
    one.hear(20, ce(1.0, 3.0))
    after = one.steps_of_rows
    assert [rows.tolist() for rows in after[:20]] == before[:20] and [
        rows.tolist() for rows in after[20:]
    ] != before[20:]
    shares = [one.shares(*part)["share_finance"] for part in ((0, 20), (20, 60))]
    assert shares == pytest.approx([0.5, one.wanted_shares()[-1, 1]], abs=0.03) and shares[1] > 0.8


@pytest.mark.parametrize("name", STAGES)
def test_a_killed_run_samples_the_same_rows_to_the_same_weights(world, tmp_path, name):
    processes, log = make.processes(), tmp_path / "log"
    for out, hooks in (
        ("straight", [None]),
        ("killed", [dict(where="lib.train.update", number=8, signal=signal.SIGKILL), None]),
    ):
        for hook in hooks:
            argv = [
                str(word)
                for word in STAGES[name][1](
                    world, *SAMPLED, "--save-every", 3, "--out", tmp_path / out
                )
            ]
            process = processes.Process(target=make.script, args=(name, argv, log, hook))
            process.start()
            process.join()
            assert process.exitcode == (-signal.SIGKILL if hook else 0), log.read_text()
    assert f"continues {tmp_path / 'killed'} at step 6" in log.read_text()
    evals = make.history(tmp_path / "killed", "eval")
    assert make.history(tmp_path / "killed") == make.history(tmp_path / "straight")
    assert (tmp_path / "killed/final/model.safetensors").read_bytes() == (
        tmp_path / "straight/final/model.safetensors"
    ).read_bytes()
    assert evals[0]["factor_general"] == 1 != evals[1]["factor_general"]


def test_without_a_mix_the_sources_start_from_their_part_of_the_tokens(world, tmp_path, capsys):
    make.call(
        stage1_sft.main,
        *make.stage1(
            world, "--eval-sampling", "--steps", 4, "--eval-every", 2, "--out", tmp_path / "out"
        ),
    )
    lengths = data.Dataset(world / "data").train.rows["length"]
    share = f"{lengths[:30].sum() / lengths.sum():g}"
    assert (
        f"mix: general: 30 rows, {lengths[:30].sum():,} tokens, share of the tokens {share}"
        in capsys.readouterr().out
    )
    assert "factor_finance" in make.history(tmp_path / "out", "eval")[0]


@pytest.mark.parametrize(
    "text, val, words",
    (
        ("general:1 finance:0", None, "1 sources with a share"),
        ("general:0.5 finance:0.5", 0, "no val rows of finance"),
        ("general:0.95 finance:0.05 ", None, "--tokens-per-step 25; wanted at least 3"),
    ),
)
def test_what_cannot_be_weighed_is_refused_in_one_line(tmp_path, text, val, words):
    folder = make.sourced(make.world(tmp_path))
    if val is not None:
        rows = np.load(folder / "data" / "val.rows.npy")
        rows["source"] = val
        np.save(folder / "data" / "val.rows.npy", rows)
    code, said = make.ends(
        stage1_sft.main,
        *make.stage1(
            folder,
            "--eval-sampling",
            "--mix",
            text,
            "--steps",
            4,
            *(["--tokens-per-step", 25] if text[-1] == " " else []),
        ),
    )
    assert code == 1 and words in said and "\n" not in said.strip()


def test_data_that_names_no_sources_is_refused(tmp_path):
    world = make.world(tmp_path)
    code, said = make.ends(stage1_sft.main, *make.stage1(world, "--eval-sampling", "--steps", 4))
    assert code == 1 and "no names of them" in said
    assert "--eval-sampling cannot weigh the sources" in said
