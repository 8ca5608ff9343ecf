"""Shares of the sources: how --mix is read, which rows the steps then take, what is said and
logged, and what a resumed run does."""

import signal
import types

import make
import numpy as np
import pytest

import dump_logits
import stage1_sft
import stage2_kd
from lib import data, files, plan
from lib.measure import plots
from lib.options import mix

LENGTHS = np.random.default_rng(1).integers(3, 200, 900).astype(np.uint32)
SOURCE = np.random.default_rng(2).choice(3, 900, p=(0.7, 0.28, 0.02))
STAGES = {"stage1_sft": make.stage1, "stage2_kd": make.stage2}
SCRIPTS = {"stage1_sft": stage1_sft, "stage2_kd": stage2_kd}


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(plots, "curves", lambda *_: None)


def parts(*shares):
    """Return the sources 0, 1, 2 of SOURCE with shares (first, last)."""
    return [
        mix.Part(number, "abc"[number], np.flatnonzero(SOURCE == number), *ends)
        for number, ends in enumerate(shares)
        if ends
    ]


def mixed_run(groups, lengths, seed, tokens_per_step, count):
    return mix.mixed_run(groups, lengths, seed, tokens_per_step, mix.asked(groups, count))


def taken(run):
    """Return the tokens (steps, sources) that each step takes of each source, counted row by
    row."""
    tokens = np.zeros((len(run), 3))
    for step, rows in enumerate(run):
        for row in rows:
            tokens[step, SOURCE[row]] += LENGTHS[row]
    return tokens


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Return a world of 40 rows: 30 general (chunks 0 and 1), 10 finance (chunk 1), with logits for
    all."""
    folder = make.sourced(make.world(tmp_path_factory.mktemp("world"), rows=40, rows_per_chunk=20))
    make.call(dump_logits.main, *make.dump(folder))
    return folder


# --- the text


@pytest.mark.parametrize(
    "text, wanted",
    (
        ("general:0.7 finance:0.3", {"general": (0.7, 0.7), "finance": (0.3, 0.3)}),
        ("general:0.7->0.3 finance:0.3->0.7", {"general": (0.7, 0.3), "finance": (0.3, 0.7)}),
        ("  a:1->0\n b:0->.5 c:0->5e-1 ", {"a": (1, 0), "b": (0, 0.5), "c": (0, 0.5)}),
        ("dir/a-1.jsonl:1", {"dir/a-1.jsonl": (1, 1)}),
        ("s3:x:1", {"s3:x": (1, 1)}),
        ("a:0.3333333 b:0.3333333 c:0.3333333", {name: (0.3333333, 0.3333333) for name in "abc"}),
    ),
)
def test_a_mix_is_read(text, wanted):
    assert mix.parse(text) == wanted


@pytest.mark.parametrize(
    "text, words",
    (
        ("", "no source is named"),
        ("general", "'general' is neither"),
        (":1", "':1' is neither"),
        ("a: 1", "'a:' is neither"),
        ("a:x", "'a:x' is neither"),
        ("a:1->", "'a:1->' is neither"),
        ("a:0.5->x b:0.5", "'a:0.5->x' is neither"),
        ("a:0.5,b:0.5", "sum to 0.5"),
        ("a:0.5 a:0.5", "a is there twice"),
        ("a:-0.5 b:1.5", "'a:-0.5' has a share"),
        ("a:nan", "'a:nan' has a share"),
        ("a:inf b:0", "'a:inf' has"),
        ("a:0.5 b:0.4", "at the first step sum to 0.9, not to 1"),
        ("a:0.5->0.4 b:0.5", "at the last step sum to 0.9, not to 1"),
        ("a:0.500002 b:0.5", "at the first step sum to 1.000002, not to 1"),
    ),
)
def test_a_mix_that_cannot_be_read_is_refused_in_one_line(text, words):
    with pytest.raises(ValueError) as refused:
        mix.parse(text)
    assert words in str(refused.value) and "\n" not in str(refused.value)


# --- the plan

CONSTANT, SCHEDULED = ((0.5, 0.5), (0.3, 0.3), (0.2, 0.2)), ((0.7, 0.1), (0.3, 0.5), (0.0, 0.4))


@pytest.mark.parametrize("shares", (CONSTANT, SCHEDULED, ((1.0, 0.0), (0.0, 1.0), None)))
def test_realised_shares_are_within_1_percent_of_asked_over_1000_steps_and_windows_of_50_follow_the_line(
    shares,
):
    tokens = taken(mixed_run(parts(*shares), LENGTHS, 0, 2000, 1000))
    line = np.array(
        [
            [a + (b - a) * step / 999 for a, b in (ends or (0, 0) for ends in shares)]
            for step in range(1000)
        ]
    )
    assert abs(tokens.sum(0) / tokens.sum() - line.mean(0)).max() < 0.0001
    for start in range(0, 1000, 50):
        window, asked = tokens[start : start + 50], line[start : start + 50].mean(0)
        assert abs(window.sum(0) / window.sum() - asked).max() < 0.01, (
            start,
            window.sum(0) / window.sum(),
            asked,
        )
    assert abs(tokens.sum(1) - 2000).max() < 600 and abs(tokens.sum() / 2000 - 1000) < 1, (
        "steps of about so many tokens"
    )


def test_after_every_step_each_source_is_off_by_half_a_row_at_most():
    tokens = taken(mixed_run(parts(*SCHEDULED), LENGTHS, 0, 700, 500)).cumsum(0)
    for number, (first, last) in enumerate(SCHEDULED):
        asked = np.cumsum([700 * (first + (last - first) * step / 499) for step in range(500)])
        assert abs(tokens[:, number] - asked).max() <= LENGTHS[SOURCE == number].max() / 2 + 1e-6


def test_the_worked_example_of_the_plan():
    lengths = np.r_[np.full(9, 10), np.ones(90, int)]
    run = mixed_run(
        [mix.Part(0, "a", np.arange(9), 0.5, 0.5), mix.Part(1, "b", np.arange(9, 99), 0.5, 0.5)],
        lengths,
        0,
        16,
        4,
    )
    assert np.cumsum([10 * int((step < 9).sum()) for step in run]).tolist() == [10, 20, 20, 30]
    assert np.cumsum([int((step >= 9).sum()) for step in run]).tolist() == [8, 16, 24, 32]


def test_every_pass_over_a_source_takes_each_row_once_before_any_twice_and_in_an_order_of_its_own():
    rows = np.concatenate(mixed_run(parts(*SCHEDULED), LENGTHS, 0, 2000, 300))
    for number in range(3):
        own, size = rows[SOURCE[rows] == number], int((SOURCE == number).sum())
        passes = [own[start : start + size].tolist() for start in range(0, len(own), size)]
        assert len(passes) > 2 and len({tuple(each) for each in passes}) == len(passes)
        assert all(
            sorted(each) == np.flatnonzero(SOURCE == number).tolist() for each in passes[:-1]
        ) and len(set(passes[-1])) == len(passes[-1])


def test_the_mixed_plan_is_a_pure_function_and_seeds_have_orders_of_their_own():
    plans = [
        [step.tolist() for step in mixed_run(parts(*SCHEDULED), LENGTHS.copy(), seed, 2000, 50)]
        for seed in (3, 3, 4)
    ]
    assert plans[0] == plans[1] != plans[2]


def test_a_longer_run_of_constant_shares_begins_with_the_shorter_one():
    short, long = (
        [step.tolist() for step in mixed_run(parts(*CONSTANT), LENGTHS, 0, 2000, count)]
        for count in (40, 90)
    )
    assert short == long[:40]


def test_a_source_of_one_row_is_repeated_as_often_as_its_share_asks_also_within_a_step():
    run = mixed_run(
        [mix.Part(0, "a", np.arange(100), 0.5, 0.5), mix.Part(1, "b", np.array([100]), 0.5, 0.5)],
        np.full(101, 10),
        0,
        100,
        20,
    )
    assert [int((step == 100).sum()) for step in run] == [5] * 20 and [
        int((step < 100).sum()) for step in run
    ] == [5] * 20


@pytest.mark.parametrize("epochs", (0.5, 1.0, 3.0))
def test_epochs_are_so_many_tokens_of_the_sources_that_are_mixed(epochs):
    mixed = parts((0.5, 0.5), None, (0.5, 0.5))
    split = types.SimpleNamespace(rows={"length": LENGTHS})
    for steps, wanted in ((0, round(epochs * int(LENGTHS[SOURCE != 1].sum()) / 2000)), (7, 7)):
        args = make.plan_args(tokens_per_step=2000, epochs=epochs, steps=steps)
        rows = mix.MixedRows(args, types.SimpleNamespace(train=split), mixed)
        rows.resume({})
        assert rows.steps == wanted


def test_without_a_mix_the_plan_is_the_one_it_was():
    run = plan.whole_run(np.arange(900), LENGTHS, 5, 2000, 1.5)
    epochs = [np.random.default_rng([5, epoch]).permutation(900) for epoch in range(2)]
    assert np.concatenate(run).tolist() == np.concatenate(epochs)[: sum(map(len, run))].tolist()


def test_steps_without_a_row_are_refused_with_a_size_that_works():
    few = parts(*CONSTANT)
    with pytest.raises(SystemExit) as refused:
        mixed_run(few, LENGTHS, 0, 30, 200)
    words = refused.value.code
    assert (
        "the steps are too small to be mixed; saw --tokens-per-step 30: " in words
        and "\n" not in words
    )
    assert all(
        len(step)
        for step in mixed_run(
            few, LENGTHS, 0, int(words.split("--tokens-per-step ")[-1].split(",")[0]), 2000
        )
    )


# --- the trainers

SCHEDULE = ("--mix", "general:0.8->0.2 finance:0.2->0.8", "--steps", 12)


@pytest.mark.parametrize("name", STAGES)
def test_a_run_says_and_logs_the_shares_it_has(world, tmp_path, capsys, name):
    make.call(
        SCRIPTS[name].main,
        *STAGES[name](world, *SCHEDULE, "--log-every", 4, "--out", tmp_path / "run"),
    )
    rows = data.Dataset(world / "data").train.rows
    groups = [
        mix.Part(0, "", np.arange(30), 0.8, 0.2),
        mix.Part(1, "", np.arange(30, 40), 0.2, 0.8),
    ]
    run = mixed_run(groups, rows["length"], 0, 128, 12)

    def general(steps):
        took = [int(rows["length"][row]) * (row < 30) for step in steps for row in step]
        return sum(took) / sum(int(rows["length"][row]) for step in steps for row in step)

    lines = make.history(tmp_path / "run", "train")
    assert [line["step"] for line in lines] == [0, 4, 8]
    for line, steps in zip(lines, (run[:1], run[1:5], run[5:9]), strict=True):
        assert (line["share_general"], line["share_finance"]) == pytest.approx(
            (general(steps), 1 - general(steps)), rel=1e-6
        )
        assert line["targets"] == rows["targets"][steps[-1]].sum()
    evaluated = make.history(tmp_path / "run", "eval")[-1]
    assert evaluated["ce_general"] != evaluated["ce_finance"] and ("kl_finance" in evaluated) == (
        name == "stage2_kd"
    )
    config, said = files.read_json(tmp_path / "run" / "config.json"), capsys.readouterr().out
    assert config["shares"] == pytest.approx(
        {"share_general": general(run), "share_finance": 1 - general(run)}
    )
    assert f"realised shares of the run's tokens: share_general {general(run):.4f}" in said
    tokens, taken = (
        int(rows["length"][30:].sum()),
        sum(int(rows["length"][row]) for step in run for row in step if row >= 30),
    )
    assert (
        f"mix: finance: 10 rows, {tokens:,} tokens, share of the tokens 0.2 -> 0.8,"
        f" {taken / tokens:.1f} passes" in said
    )


@pytest.mark.parametrize("name", STAGES)
def test_a_mixed_run_that_was_killed_goes_on_with_the_same_rows_to_the_same_weights(
    world, tmp_path, name
):
    processes, log = make.processes(), tmp_path / "log"
    for out, hooks in (
        ("straight", [None]),
        ("killed", [dict(where="lib.train.update", number=8, signal=signal.SIGKILL), None]),
    ):
        for hook in hooks:
            argv = [
                str(word)
                for word in STAGES[name](
                    world, *SCHEDULE, "--save-every", 3, "--out", tmp_path / out
                )
            ]
            process = processes.Process(target=make.script, args=(name, argv, log, hook))
            process.start()
            process.join()
            assert process.exitcode == (-signal.SIGKILL if hook else 0), log.read_text()
    assert f"continues {tmp_path / 'killed'} at step 6" in log.read_text()
    assert make.history(tmp_path / "killed") == make.history(tmp_path / "straight")
    for name in ("final/model.safetensors", "best/model.safetensors"):
        assert (tmp_path / "killed" / name).read_bytes() == (
            tmp_path / "straight" / name
        ).read_bytes()


def test_the_mix_of_the_data_folder_is_the_default_and_off_is_as_if_there_were_none(tmp_path):
    folder = make.world(tmp_path)
    make.call(stage1_sft.main, *make.stage1(folder, "--steps", 3, out="plain"))
    make.sourced(folder, mix="general:0.2 finance:0.8")
    for out, more in (
        ("stored", ()),
        ("off", ("--mix", "off")),
        ("given", ("--mix", "general:0.2 finance:0.8")),
    ):
        make.call(stage1_sft.main, *make.stage1(folder, "--steps", 3, *more, out=out))
    plain, stored, off, given = (
        (folder / out / "final" / "model.safetensors").read_bytes()
        for out in ("plain", "stored", "off", "given")
    )
    assert plain == off and make.history(folder / "plain", "train") == make.history(
        folder / "off", "train"
    )
    assert "shares" not in files.read_json(folder / "off" / "config.json")
    assert stored == given != plain and make.history(folder / "stored") == make.history(
        folder / "given"
    )
    assert make.history(folder / "stored", "train")[0]["share_finance"] > 0.6


def test_many_passes_and_unnamed_sources_are_said_and_their_rows_left_alone(tmp_path, capsys):
    folder = make.sourced(make.world(tmp_path, longest=20), (0, 1, 20), ("tiny", "code", "long"))
    rows = np.load(folder / "data" / "train.rows.npy")
    lengths = rows["length"]
    grown, end = 70 - lengths[25], rows["start"][25] + lengths[25]
    lengths[25] = 70  # does not fit in a micro-batch, and need not
    rows["start"][26:] += grown
    np.save(folder / "data" / "train.rows.npy", rows)
    for part in ("tokens", "answer"):
        path = folder / "data" / f"train.{part}.npy"
        was = np.load(path)
        np.save(path, np.concatenate([was[:end], np.zeros(grown, was.dtype), was[end:]]))
    make.call(stage1_sft.main, *make.stage1(folder, "--mix", "tiny:0.5 code:0.5", "--steps", 6))
    said = capsys.readouterr().out
    assert (
        "mix: long: share 0, not trained on" in said
        and "WARNING: so many passes are learnt by heart" in said
    )
    assert [
        line.startswith("mix: tiny")
        for line in said.splitlines()
        if "WARNING" in line and line.startswith("mix")
    ] == [True]


def test_a_run_is_not_continued_with_another_mix_or_other_sources(tmp_path):
    folder = make.sourced(make.world(tmp_path))
    make.call(stage1_sft.main, *make.stage1(folder, *SCHEDULE))
    assert "mix 'general:0.8->0.2" in refused(
        "stage1_sft", folder, "--steps", 12, "--mix", "general:0.5 finance:0.5"
    )
    make.sourced(folder, (0, 25))
    assert "sources identity" in refused("stage1_sft", folder, *SCHEDULE)


# --- what a user can get wrong


def refused(name, world, *more):
    """Run a trainer that must end with exit code 1 and one line, and return the line."""
    code, words = make.ends(SCRIPTS[name].main, *STAGES[name](world, *more))
    assert code == 1 and words.startswith("error: ") and "\n" not in words, (code, words)
    return words


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize(
    "text, words",
    (
        ("general=1", "'general=1' is neither NAME:SHARE"),
        ("general:0.5", "the first step sum to 0.5, not to 1"),
    ),
)
def test_a_text_that_is_no_mix(world, tmp_path, name, text, words, capsys):
    assert make.ends(
        SCRIPTS[name].main, *STAGES[name](world, "--mix", text, "--out", tmp_path / "run")
    ) == (2, "")
    last = capsys.readouterr().err.splitlines()[-1]
    assert "error: --mix: " in last and words in last
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", STAGES)
def test_a_name_that_the_data_does_not_have(world, tmp_path, name):
    words = refused(name, world, "--mix", "general:0.5 legal:0.5", "--out", tmp_path / "run")
    assert (
        "names a source that is not in" in words
        and "saw legal; wanted names among general, finance" in words
        and not (tmp_path / "run").exists()
    )


def test_data_whose_sources_have_no_names(tmp_path):
    assert "wanted names among (none there)" in refused(
        "stage1_sft", make.world(tmp_path), "--mix", "a:1"
    )


def test_a_stored_mix_that_cannot_be_read(tmp_path):
    assert "cannot be read; saw 'general' is neither" in refused(
        "stage1_sft", make.sourced(make.world(tmp_path), mix="general")
    )


def test_a_source_with_a_share_and_no_row(tmp_path):
    folder = make.sourced(make.world(tmp_path), (0, 30, 99), ("general", "finance", "legal"))
    words = refused("stage1_sft", folder, "--mix", "general:0.5 legal:0.5")
    assert (
        "legal has a share in the mix and no row to train on; saw no row of it in train" in words
        and "prepare_data.py" in words
    )
    make.call(
        stage1_sft.main,
        *make.stage1(folder, "--mix", "general:1 legal:0", "--steps", 1, out="without"),
    )


def test_stage_2_names_the_chunk_that_a_source_is_missing(world, tmp_path):
    make.call(dump_logits.main, *make.dump(world, "--chunk", 0, "--out", tmp_path / "logits"))
    words = refused(
        "stage2_kd",
        world,
        "--logits",
        tmp_path / "logits",
        "--mix",
        "general:0.5 finance:0.5",
        "--out",
        tmp_path / "run",
    )
    assert (
        "finance has a share in the mix and no row to train on; saw all its rows in chunks without"
        " logits: 1" in words
    )
    assert (
        f"--teacher {world / 'teacher'} --out {tmp_path / 'logits'} --chunk 1, or a --mix without it"
        in words
        and not (tmp_path / "run").exists()
    )
    make.call(
        stage2_kd.main,
        *make.stage2(
            world,
            "--logits",
            tmp_path / "logits",
            "--mix",
            "general:1",
            "--steps",
            1,
            "--out",
            tmp_path / "run",
        ),
    )


def test_a_chunk_that_is_missing_does_not_matter_where_nothing_is_trained(world, tmp_path):
    folder = make.sourced(make.world(tmp_path, rows=40, rows_per_chunk=20), mix="finance:1")
    make.call(dump_logits.main, *make.dump(folder, "--chunk", "val"))
    make.call(stage2_kd.main, *make.stage2(folder, "--eval-only"))
    assert {"ce_general", "kl_finance"} <= set(files.read_json(folder / "stage2" / "eval.json"))
