"""Rows that the student answers anew while it learns (lib/options/onpolicy.py)."""

import json
from types import SimpleNamespace

import make
import numpy as np
import pytest
import torch

import stage2_kd
from lib import data, generate, losses, models, train
from lib.options import bysource, onpolicy

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make.sourced(make.world(tmp_path_factory.mktemp("onpolicy")))


def opened(folder, share=0.5, **more):
    """Return the plan of a run, its student and its arguments."""
    plain = dict(
        on_policy=share,
        max_new_tokens=None,
        mix="off",
        eval_sampling=False,
        tokens_per_step=256,
        amp="off",
        divergence="fkl",
        alpha=0.9,
        temperature=1.0,
        beta=None,
    )
    args = make.plan_args(**plain | more)
    dataset = data.Dataset(folder / "data")
    rows = onpolicy.open_rows(args, dataset)
    rows.resume({})
    student = models.load(str(folder / "student"), CPU)
    models.stop_at(student, dataset.train.end_tokens(), dataset.tokenizer())
    rows.lay(student, {})
    return rows, student, args


def test_a_share_of_the_rows_keeps_its_prompts_and_gets_the_students_answers(folder):
    rows, student, _ = opened(folder)
    own = given = 0
    for step in range(rows.steps):
        split, numbers = rows.of_step(step), rows.of(step).tolist()
        assert len(split.rows) == len(numbers)
        left = {tuple(rows.dataset.train.row(n)[0]): n for n in numbers}
        prompts = sorted(onpolicy.before_answer(*rows.dataset.train.row(n)) for n in numbers)
        found = []
        for place, source in enumerate(split.rows["source"].tolist()):
            ids, answer = split.row(place)
            found.append(onpolicy.before_answer(ids, answer) if answer.any() else ids.tolist())
            if source == len(rows.sources) - 1:
                own += 1
                assert answer[int(np.argmax(answer)) :].all() and len(ids) <= rows.longest()
            else:
                given += 1
                assert tuple(ids) in left
        assert sorted(found) == prompts
        targets = sum(int(split.row(place)[1].sum()) for place in range(len(split.rows)))
        assert (targets, len(split.tokens)) == (rows.targets(step), rows.tokens(step))
    assert abs(own - given) <= rows.steps  # half of each step's, up to one by chance


def test_the_tokens_are_drawn_from_the_students_own_distribution_at_each_place(folder):
    """Each place's uniform number, read off the answer, is the one that its seed has."""
    rows, student, args = opened(folder, 1.0)
    number = int(rows.of(0)[0])
    [(ids, answer)] = rows.write(0, [number])
    prompt = int(np.argmax(answer))
    tokens = torch.tensor(ids.astype(np.int64))[None]
    with torch.no_grad():
        p = student.module.eval()(tokens).logits[0].softmax(-1).double()
    seed = (args.seed << 64) + number
    uniform = np.random.default_rng(seed).random(len(ids))
    for place in range(prompt, len(ids)):
        mass = p[place - 1].cumsum(0)
        below = mass[ids[place] - 1].item() if ids[place] else 0.0
        drawn = uniform[place - prompt]
        assert below - 1e-4 <= drawn * mass[-1].item() <= mass[ids[place]].item() + 1e-4


def test_the_entropy_of_the_log_is_that_of_the_tokens_drawn(folder, monkeypatch):
    """Each answer is read again by the student: of its tokens and the one that ends it."""
    rows, student, _ = opened(folder, 1.0)
    made, plain = [], generate.generate

    def kept(*args):
        for answer in plain(*args):
            made.append(answer)
            yield answer

    monkeypatch.setattr(generate, "generate", kept)
    rows.of_step(0)
    logp = []
    for answer in made:
        told = answer.ids + ([] if answer.end is None else [answer.end])
        ids = torch.tensor([answer.request.ids + told])
        with torch.no_grad():
            known = student.module.eval()(ids).logits[0].double().log_softmax(-1)
        first = len(answer.request.ids)
        logp += [known[at - 1, ids[0, at]].item() for at in range(first, len(ids[0]))]
    assert any(answer.end is not None for answer in made)
    said = rows.shares(0, 1)
    assert said["own_entropy"] == pytest.approx(-sum(logp) / len(logp), rel=1e-4)
    assert said["own_tokens"] == pytest.approx(sum(len(a.ids) for a in made) / len(made))
    assert rows.shares(0, 1) == {}  # it is said once


def test_the_time_of_the_log_is_the_share_of_the_step_that_was_spent_writing(folder, monkeypatch):
    rows, _, _ = opened(folder, 1.0)
    clock = iter([100.0, 106.0, 108.0])  # the step begins, its answers are written, it ends
    monkeypatch.setattr(onpolicy.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(rows, "write", lambda step, numbers: [])
    monkeypatch.setattr(data.Split, "of", lambda rows: rows)
    rows.figures = {"own_tokens": 1.0}
    rows.of_step(0)
    assert rows.shares(0, 1)["own_time"] == 0.75


def test_a_step_without_own_answers_says_nothing_of_those_before_it(folder):
    rows, _, _ = opened(folder)
    rows.figures = {"own_tokens": 1.0}
    rows.write(0, [])
    assert rows.figures == {}


def test_what_is_written_follows_from_seed_step_row_and_weights_alone(folder):
    one, _, _ = opened(folder)
    two, _, _ = opened(folder)
    two.of_step(0)
    assert (one.of_step(1).tokens == two.of_step(1).tokens).all()


def test_own_rows_have_micro_batches_and_a_method_of_their_own(folder):
    rows, _, args = opened(folder, divergence={"general": "fkl", "finance": "fkl", "own": "rkl"})
    schedule = bysource.open_schedule(args, rows.dataset, rows, rows.steps)
    kinds = set()
    for batch in rows.batches(0, CPU):
        method = schedule(0, batch)
        is_own = batch.source == len(rows.sources) - 1
        kinds.add((is_own, method.divergence, method.alpha, method.reference))
    assert kinds == {(False, "fkl", 0.9, True), (True, "rkl", 1.0, False)}


def test_an_answer_ends_before_the_first_token_that_the_teacher_does_not_know(folder):
    rows, student, _ = opened(folder)
    rows.student = SimpleNamespace(head=lambda: SimpleNamespace(vocab=50), apart=(7,))
    request = SimpleNamespace(ids=[4, 5])
    answer = SimpleNamespace(request=request, ids=[6, 49, 50, 6], end=3)
    assert rows.row_of(answer)[0].tolist() == [4, 5, 6, 49]
    answer = SimpleNamespace(request=request, ids=[6, 7, 6], end=3)
    assert rows.row_of(answer)[0].tolist() == [4, 5, 6]
    answer = SimpleNamespace(request=request, ids=[6], end=3)
    ids, mask = rows.row_of(answer)
    assert ids.tolist() == [4, 5, 6, 3] and mask.tolist() == [False, False, True, True]


def test_the_gradient_is_that_of_the_divergence_at_the_text_as_it_stands(folder):
    """By finite differences in float64 along a random direction: no gradient flows through
    sampling."""
    rows, _, args = opened(folder, 1.0, divergence="rkl")
    schedule = bysource.open_schedule(args, rows.dataset, rows, rows.steps)
    student = models.load(str(folder / "student"), CPU, torch.float64)
    teacher = models.load(str(folder / "teacher"), CPU, torch.float64)
    batch = next(rows.batches(0, CPU))

    def loss():
        with torch.no_grad():
            known = losses.Whole(teacher.hidden(batch), teacher.head())
        method = schedule(0, batch)
        hidden = student.hidden(batch)
        return losses.head_loss(hidden, student.head(), batch.labels, known, method)[0]

    loss().backward()
    generator = torch.Generator().manual_seed(0)
    parameters = list(student.module.parameters())
    way = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
    slope = sum((p.grad * d).sum().item() for p, d in zip(parameters, way))
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, d in zip(parameters, way):
                p.add_(d, alpha=sign * 1e-3)
            ends.append(loss().item())
            for p, d in zip(parameters, way):
                p.sub_(d, alpha=sign * 1e-3)
    assert slope == pytest.approx((ends[0] - ends[1]) / 2e-3, rel=1e-2)


def test_a_run_stopped_in_the_middle_goes_on_bit_for_bit(folder, tmp_path, monkeypatch):
    more = "--on-policy", "0.5", "--steps", "6", "--save-every", "2", "--log-every", "1"
    make.call(stage2_kd.main, *make.live(folder, *more, out=tmp_path / "straight"))
    write, count = onpolicy.OwnRows.write, []

    def killed(rows, step, numbers):
        count.append(step)
        if step == 3:
            raise KeyboardInterrupt
        return write(rows, step, numbers)

    monkeypatch.setattr(onpolicy.OwnRows, "write", killed)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        make.call(stage2_kd.main, *make.live(folder, *more, out=tmp_path / "stopped"))
    monkeypatch.setattr(onpolicy.OwnRows, "write", write)
    make.call(stage2_kd.main, *make.live(folder, *more, out=tmp_path / "stopped"))
    straight, stopped = (
        (tmp_path / name / "final/model.safetensors").read_bytes()
        for name in ("straight", "stopped")
    )
    assert straight == stopped and 3 in count
    assert make.history(tmp_path / "straight") == make.history(tmp_path / "stopped")
    train = make.history(tmp_path / "straight", "train")
    assert all(0 <= line["own_ended"] <= 1 and line["own_tokens"] >= 0 for line in train)
    assert all(line["own_entropy"] > 0 and "own_time" not in line for line in train)
    lines = (tmp_path / "straight/history.jsonl").read_text().splitlines()
    times = [line["own_time"] for line in map(json.loads, lines) if line["event"] == "train"]
    assert len(times) == 6 and all(0 < share < 1 for share in times)


@pytest.mark.parametrize("share", (0.5, 1.0))
@pytest.mark.parametrize("more", ({}, {"max_new_tokens": 4}))
def test_the_estimate_of_memory_covers_micro_batches_of_own_answers(folder, share, more):
    """Answers that all go to their limit: so do those of a student that never ends."""
    rows, student, args = opened(folder, share, tokens_per_microbatch=64, **more)
    student.module.generation_config.eos_token_id = None
    bysource.open_schedule(args, rows.dataset, rows, rows.steps)
    most, own = train.largest(args, rows), []
    for step in range(rows.steps):
        batches = [b for b in rows.batches(step, CPU) if b.source == len(rows.sources) - 1]
        own += [(len(batch.labels), batch.tokens.numel()) for batch in batches]
    targets, tokens = (max(sizes) for sizes in zip(*own))
    assert targets <= most.targets and tokens <= most.tokens
    plain = train.largest(args, rows.rows)  # rows as they are given do not cover them
    assert more or targets > plain.targets


@pytest.mark.parametrize(
    "more",
    [
        ["--on-policy", "1.5"],
        ["--max-new-tokens", "9"],
        ["--on-policy", "1", "--max-new-tokens", "0"],
    ],
)
def test_flags_that_cannot_work_are_an_error_of_usage(folder, tmp_path, more, capsys):
    code, _ = make.ends(stage2_kd.main, *make.live(folder, *more, out=tmp_path / "out"))
    assert code == 2 and "--" in capsys.readouterr().err


def test_answers_beyond_the_context_are_one_line(folder, tmp_path):
    more = "--on-policy", "1", "--max-new-tokens", "5000"
    code, said = make.ends(stage2_kd.main, *make.live(folder, *more, out=tmp_path / "o"))
    assert code == 1 and said.startswith("error: --max-new-tokens is beyond the student's context")
    assert "\n" not in said


BESIDE = {
    "lora": "--lora-rank 2",
    "hidden states and rows": "--feature-weight 1 --contrastive-weight 1",
    "attention": "--attention-weight 1",
    "gradnorm": "--feature-weight 1 --balance gradnorm --balance-every 2",
}


@pytest.mark.parametrize("name", BESIDE)
def test_adapters_and_losses_beside_the_logits_go_with_own_rows(folder, tmp_path, name):
    more = "--on-policy", "0.5", "--steps", "3", "--log-every", "1", *BESIDE[name].split()
    make.call(stage2_kd.main, *make.live(folder, *more, out=tmp_path / "out"))
    train = make.history(tmp_path / "out", "train")
    assert len(train) == 3 and all("own_tokens" in line for line in train)
    assert all(np.isfinite(line["loss"]) for line in train)
    if "feature" in BESIDE[name]:
        assert all(line["feature"] > 0 for line in train)


def test_it_wants_the_teacher_live(folder, tmp_path, capsys):
    code, _ = make.ends(
        stage2_kd.main, *make.stage2(folder, "--on-policy", "1", out=tmp_path / "o")
    )
    assert code == 2 and "--teacher" in capsys.readouterr().err


def test_a_given_source_of_the_name_is_refused(tmp_path):
    """It would be taken for text that the student wrote, and lose its cross-entropy."""
    folder = make.sourced(make.world(tmp_path), names=("general", "own"))
    with pytest.raises(SystemExit, match="calls what the student writes own"):
        opened(folder)
