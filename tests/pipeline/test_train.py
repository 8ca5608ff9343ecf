"""The two training loops, the measures, and what a run leaves behind; whole scripts, run in-process
on tiny models."""

import copy
import dataclasses
import functools
import json
import math
import os
import shutil
import signal
import types

import make
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import dump_logits
import stage1_sft
import stage2_kd
from lib import checkpoints, data, evaluate, files, losses, models, plan
from lib.losses import Method
from lib.measure import plots
from lib.run import Run
from lib.teacher import logits, worth

CPU = torch.device("cpu")
KD = Method(0.7, 2.0)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(plots, "curves", lambda *_: None)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = make.world(tmp_path_factory.mktemp("world"), rows=40, val=12)
    make.call(dump_logits.main, *make.dump(folder))
    return folder


@pytest.fixture(scope="module")
def dataset(world):
    return data.Dataset(world / "data")


@pytest.fixture(scope="module")
def store(world, dataset):
    return logits.Records(world / "logits", dataset, 2.0)


@pytest.fixture
def student(world):
    return models.load(str(world / "student"), CPU)


@functools.cache
def doubled(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


def own_logits(folder, split, row):
    """Return a row's tokens, answer mask and logits (L, V) in float64, by transformers alone."""
    module = doubled(folder)
    ids, answer = split.row(row)
    ids = torch.from_numpy(ids.astype(np.int64))
    with torch.no_grad():
        return ids, torch.from_numpy(answer.copy()), module(input_ids=ids[None]).logits[0]


def own_loss(folder, split, rows):
    """Return the mean cross-entropy over the targets of rows, by transformers' own loss with labels
    of -100."""
    total, count = 0.0, 0
    module = AutoModelForCausalLM.from_pretrained(folder).eval()
    for row in rows:
        ids, answer = (torch.from_numpy(part.astype(np.int64))[None] for part in split.row(row))
        with torch.no_grad():
            total += (
                module(input_ids=ids, labels=ids.masked_fill(answer == 0, -100)).loss.item()
                * answer.sum().item()
            )
        count += answer.sum().item()
    return total / count


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- batches


def worked_example():
    """The docstring of Split.batch: rows A (3 tokens, the last 2 are targets) and B (2 tokens, the
    last is a target)."""
    split = data.Split.__new__(data.Split)
    split.tokens, split.answer = (
        np.array([10, 11, 12, 20, 21], np.uint32),
        np.array([0, 1, 1, 0, 1], bool),
    )
    split.rows = np.array([(0, 3, 0, 2, 0), (3, 2, 2, 1, 0)], data.ROW)
    return split


def test_trap_10_position_t_minus_1_predicts_token_t_in_a_packed_line():
    batch = worked_example().batch([[0, 1]])
    assert batch.tokens.tolist() == [[10, 11, 12, 20, 21]] and batch.positions.tolist() == [
        [0, 1, 2, 0, 1]
    ]
    assert (
        batch.where.tolist() == [0, 1, 3]
        and batch.labels.tolist() == [11, 12, 21]
        and batch.numbers.tolist() == [0, 1, 2]
    )


def test_trap_10_position_t_minus_1_predicts_token_t_in_padded_lines():
    batch = worked_example().batch([[1], [0]], pad_to=4)
    assert batch.tokens.tolist() == [
        [20, 21, 0, 0],
        [10, 11, 12, 0],
    ] and batch.positions.tolist() == [[0, 1, 0, 1], [0, 1, 2, 0]]
    assert (
        batch.where.tolist() == [0, 4, 5]
        and batch.labels.tolist() == [21, 11, 12]
        and batch.numbers.tolist() == [2, 0, 1]
    )


@pytest.mark.parametrize("pack", (True, False))
def test_trap_10_every_target_is_the_token_after_the_position_that_predicts_it(dataset, pack):
    lengths, seen = dataset.train.rows["length"], {}
    for lines in plan.microbatches(np.arange(40), lengths, 64, 64, pack):
        batch = dataset.train.batch(lines)
        assert torch.equal(batch.tokens.flatten()[batch.where + 1], batch.labels)
        assert (
            batch.positions.flatten()[batch.where + 1] == batch.positions.flatten()[batch.where] + 1
        ).all(), "both in one row"
        seen |= dict(zip(batch.numbers.tolist(), batch.labels.tolist()))
    assert [seen[number] for number in range(dataset.train.targets)] == dataset.train.tokens[
        dataset.train.answer
    ].tolist()


def test_trap_15_packed_rows_have_the_hidden_states_of_rows_alone(dataset, student):
    by_number = {}
    for row in range(8):
        batch = dataset.train.batch([[row]])
        by_number |= dict(zip(batch.numbers.tolist(), student.hidden(batch)))
    for lines in ([[0, 1, 2, 3], [4, 5, 6, 7]], [[7, 3, 1]], [[5], [2, 0]]):
        batch = dataset.train.batch(lines)
        torch.testing.assert_close(
            student.hidden(batch),
            torch.stack([by_number[n] for n in batch.numbers.tolist()]),
            rtol=1e-4,
            atol=1e-5,
        )


# --- the gradient of a step


def gradient(student, dataset, store, steps, method):
    """Return the gradient of micro-batches `steps` (lists of lines) of one optimizer step, summed
    as the loops sum it."""
    student.module.zero_grad()
    targets = sum(
        int(dataset.train.rows["targets"][row]) for lines in steps for line in lines for row in line
    )
    for lines in steps:
        batch = dataset.train.batch(lines)
        loss = losses.head_loss(
            student.hidden(batch),
            student.head(),
            batch.labels,
            store.at(batch, method.temperature) if method.alpha else None,
            method,
        )[0]
        (loss / targets).backward()
    return torch.cat([p.grad.flatten() for p in student.module.parameters()])


CUTS = {
    "1x8": [[[row] for row in range(8)]],
    "2x4": [[[0], [1], [2], [3]], [[4], [5], [6], [7]]],
    "8x1": [[[row]] for row in range(8)],
    "uneven": [[[7]], [[0], [3], [5], [1], [2]], [[6], [4]]],
    "packed": [[[0, 3, 5], [7, 1]], [[2, 4, 6]]],
    "one line": [[[7, 6, 5, 4, 3, 2, 1, 0]]],
}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("method", (Method(), KD), ids=("ce", "kd"))
def test_trap_8_the_gradient_does_not_depend_on_how_the_step_is_cut_and_packed(
    dataset, store, student, cut, method
):
    whole, parts = (
        gradient(student, dataset, store, steps, method) for steps in (CUTS["1x8"], CUTS[cut])
    )
    assert whole.norm() > 0.1 and (whole - parts).norm() < 2e-6 * whole.norm()


@pytest.mark.parametrize("method", (Method(), KD), ids=("ce", "kd"))
def test_trap_8_two_ranks_of_two_micro_batches_of_two_rows_sum_to_one_gradient(
    dataset, store, student, method
):
    whole, summed = gradient(student, dataset, store, CUTS["1x8"], method), 0
    targets = dataset.train.rows["targets"]
    for rank in ([[[0], [1]], [[2], [3]]], [[[4], [5]], [[6], [7]]]):
        own = sum(int(targets[line[0]]) for lines in rank for line in lines)
        summed = summed + gradient(student, dataset, store, rank, method) * own / int(
            targets[:8].sum()
        )  # divided by the targets of all ranks
    assert (whole - summed).norm() < 2e-6 * whole.norm()


@pytest.mark.parametrize("script, arguments", ((stage1_sft, make.stage1), (stage2_kd, make.stage2)))
def test_trap_8_a_script_logs_the_same_loss_and_gradient_however_the_step_is_cut(
    world, tmp_path, script, arguments
):
    seen = []
    for number, more in enumerate(
        (
            ("--tokens-per-microbatch", 20),
            ("--tokens-per-microbatch", 20, "--no-pack"),
            ("--tokens-per-microbatch", 4096),
        )
    ):
        still = ("--steps", 2, "--lr", make.NO_STEP)  # what differs is rounding alone
        make.call(script.main, *arguments(world, *more, *still, "--out", tmp_path / str(number)))
        seen.append(
            [
                (line["loss"], line["grad_norm"], line["targets"])
                for line in make.history(tmp_path / str(number), "train")
            ]
        )
    assert len(seen[0]) == 2
    np.testing.assert_allclose(seen[0], seen[2], rtol=1e-4)
    np.testing.assert_allclose(seen[1], seen[2], rtol=1e-4)


# --- what is logged


def test_trap_26_the_logged_loss_is_the_raw_loss_of_the_steps_own_rows(world, dataset, tmp_path):
    still = ("--steps", 3, "--lr", make.NO_STEP)
    make.call(stage1_sft.main, *make.stage1(world, *still, "--out", tmp_path / "run"))
    steps = plan.whole_run(range(40), dataset.train.rows["length"], 0, 128, 3.0, 3)
    for line, rows in zip(make.history(tmp_path / "run", "train"), steps, strict=True):
        assert line["loss"] == pytest.approx(
            own_loss(world / "student", dataset.train, rows), rel=1e-5
        )
        assert line["targets"] == dataset.train.rows["targets"][rows].sum()


@pytest.mark.parametrize("alpha, t", ((0.9, 2.0), (1.0, 4.0), (0.0, 1.0)))
def test_trap_9_the_logged_loss_is_made_of_its_two_logged_parts_over_one_count(
    world, tmp_path, alpha, t
):
    make.call(
        stage2_kd.main,
        *make.stage2(
            world, "--steps", 2, "--alpha", alpha, "--temperature", t, "--out", tmp_path / "run"
        ),
    )
    for line in make.history(tmp_path / "run", "train"):
        assert (
            line["kd"] > 0.001
            and abs(line["loss"] - alpha * t * t * line["kd"] - (1 - alpha) * line["ce"]) < 1e-5
        )


def test_alpha_0_trains_as_stage_1_does(world, tmp_path):
    make.call(stage1_sft.main, *make.stage1(world, "--steps", 3, "--out", tmp_path / "one"))
    make.call(
        stage2_kd.main, *make.stage2(world, "--steps", 3, "--alpha", 0, "--out", tmp_path / "two")
    )
    one, two = (make.history(tmp_path / name, "train") for name in ("one", "two"))
    for name in ("loss", "ce", "grad_norm", "lr", "targets"):
        np.testing.assert_allclose(
            [line[name] for line in two], [line[name] for line in one], rtol=1e-3
        )


@pytest.mark.parametrize(
    "script, arguments, loss", ((stage1_sft, make.stage1, "ce"), (stage2_kd, make.stage2, "kd"))
)
def test_a_student_learns(world, tmp_path, script, arguments, loss):
    make.call(script.main, *arguments(world, *make.DOWNHILL, "--out", tmp_path / "run"))
    make.assert_falls([line[loss] for line in make.history(tmp_path / "run", "train")])


def test_trap_25_a_teacher_that_cannot_be_read_ends_the_run_instead_of_leaving_cross_entropy(
    world, tmp_path
):
    broken = shutil.copytree(world / "logits", tmp_path / "logits")
    (broken / "chunk-0000" / "topk.npy").write_bytes(
        (world / "logits" / "chunk-0000" / "topk.npy").read_bytes()[:-40]
    )
    code, words = make.ends(
        stage2_kd.main, *make.stage2(world, "--logits", broken, "--out", tmp_path / "run")
    )
    assert code == 1 and "cannot be read" in words and not (tmp_path / "run").exists()


def test_trap_25_a_divergence_that_is_not_finite_ends_the_run_and_names_step_and_rows(
    world, tmp_path, monkeypatch
):
    plain = logits.Records.at

    def broken(*given):
        known = plain(*given)
        return dataclasses.replace(known, tail=known.tail * math.nan)

    monkeypatch.setattr(logits.Records, "at", broken)
    code, words = make.ends(stage2_kd.main, *make.stage2(world, "--out", tmp_path / "run"))
    assert (
        code == 1
        and "the loss of step 0 is not finite; saw nan on rows" in words
        and not make.history(tmp_path / "run", "train")
    )


# --- measures


def test_a_student_with_more_tokens_than_the_teacher_knows_is_measured_over_its_own_too(
    world, tmp_path, capsys
):
    """ce is over those that both know, alone; own_ce is what transformers says of the checkpoint."""
    wide = make.model(tmp_path / "wide", seed=3, vocab=make.V + 7)
    argv = ["--data", world / "data", "--student", wide, "--logits", world / "logits", *make.CPU]
    make.call(stage2_kd.main, *argv, "--eval-only", "--out", tmp_path / "eval")
    seen, val = files.read_json(tmp_path / "eval" / "eval.json"), data.Dataset(world / "data").val
    assert f"over the first 61 of its {make.V + 7} tokens; own_ce" in capsys.readouterr().out
    known = own = 0.0
    for row in range(12):
        ids, answer, s = own_logits(wide, val, row)
        places = answer.nonzero()[:, 0]
        label = ids[places].long()
        for logits_ in (s, s[:, : make.V]):
            ce = torch.nn.functional.cross_entropy(logits_[places - 1], label, reduction="sum")
            own, known = (own + ce, known) if logits_ is s else (own, known + ce)
    assert seen["own_ce"] == pytest.approx(own.item() / val.targets, rel=1e-5)
    assert seen["ce"] == pytest.approx(known.item() / val.targets, rel=1e-5)
    assert seen["own_ce"] > seen["ce"] + 1e-3
    student = models.load(str(wide), CPU)
    assert "own_ce" not in evaluate.evaluate(student, val, student.vocab, 64)


@pytest.mark.parametrize("tokens", (1, 50, 4096))
def test_measures_equal_plain_ones_whatever_the_batch_size(world, dataset, store, student, tokens):
    seen = evaluate.evaluate(student, dataset.val, make.V, tokens, teacher=store)
    ce, hits, hits5, kl, rkl, agree, confidences = [], [], [], [], [], [], []
    for row in range(12):
        ids, answer, s = own_logits(world / "student", dataset.val, row)
        z = own_logits(world / "teacher", dataset.val, row)[2]
        for t in answer.nonzero()[:, 0].tolist():
            logq, logp = torch.log_softmax(s[t - 1], 0), torch.log_softmax(z[t - 1], 0)
            p, q = logp.exp(), logq.exp()  # over all tokens: the dump has a basis
            ce.append(-logq[ids[t]].item())
            hits.append(float(logq.argmax() == ids[t]))
            hits5.append(float(ids[t] in logq.topk(5).indices))
            kl.append((p * (p / q).log()).sum().item())
            rkl.append((q * (q / p).log()).sum().item())
            agree.append(float(logq.argmax() == logp.argmax()))
            confidences.append(logq.max().exp().item())
    hits, confidences = np.array(hits), np.array(confidences)
    bins = np.minimum((confidences * 15).astype(int), 14)
    ece = sum(abs((hits[bins == b] - confidences[bins == b]).sum()) for b in range(15)) / len(hits)
    wanted = {
        "ce": np.mean(ce),
        "ppl": np.exp(np.mean(ce)),
        "acc1": hits.mean(),
        "acc5": np.mean(hits5),
        "ece": ece,
    }
    wanted |= {"kl": np.mean(kl), "rkl": np.mean(rkl), "agree": np.mean(agree)}
    assert seen.pop("targets") == len(ce) == dataset.val.targets
    # coefficients of the basis are stored in 8 bits
    both = {name: seen.pop(name) for name in ("kl", "rkl")}
    assert both == pytest.approx({name: wanted.pop(name) for name in both}, rel=5e-3)
    assert seen == pytest.approx(wanted, rel=2e-4, abs=2e-4) and both["kl"] > 0.02
    assert seen["ce"] == pytest.approx(
        own_loss(world / "student", dataset.val, range(12)), rel=1e-5
    )


@pytest.mark.parametrize("tokens", (1, 4096))
def test_measures_by_source_are_those_of_its_own_targets_alone(
    world, dataset, store, student, tokens
):
    split = copy.copy(dataset.val)
    split.rows = split.rows.copy()
    split.rows["source"] = np.where(np.arange(12) < 5, 2, 0)
    seen = evaluate.evaluate(
        student, split, make.V, tokens, teacher=store, sources=("a", "b", "c", "d")
    )
    for name, rows in (("a", range(5, 12)), ("c", range(5))):
        kl = []
        for row in rows:
            (_, answer, s), z = (
                own_logits(world / "student", split, row),
                own_logits(world / "teacher", split, row)[2],
            )
            q, p = (torch.softmax(x[answer.nonzero()[:, 0] - 1], 1) for x in (s, z))
            kl += (p * (p / q).log()).sum(1).tolist()
        assert seen[f"ce_{name}"] == pytest.approx(
            own_loss(world / "student", split, rows), rel=1e-5
        )
        assert seen[f"kl_{name}"] == pytest.approx(
            np.mean(kl), rel=5e-3
        )  # the dump rounds its logits
    assert abs(seen["ce_a"] - seen["ce_c"]) > 0.01 and {name for name in seen if "_" in name} == {
        "ce_a",
        "ce_c",
        "kl_a",
        "kl_c",
    }
    assert "ce_a" not in evaluate.evaluate(
        student, dataset.val, make.V, tokens, teacher=store, sources=("a", "b")
    ), "val holds one source alone"


def test_a_teacher_has_no_distance_to_its_own_dump(world, dataset, store):
    teacher = models.load(str(world / "teacher"), CPU)
    seen = evaluate.evaluate(teacher, dataset.val, make.V, 64, teacher=store)
    assert (
        0 <= seen["kl"] < 2e-4
        and seen["agree"] == 1
        and seen["ce"] == pytest.approx(store.val.meta["teacher_ce"], rel=1e-5)
    )


class Oracle(torch.nn.Module):
    """A model that sees one token ahead and puts exactly `rank` others above it, each e^50 less
    likely than the last."""

    def __init__(self, rank):
        super().__init__()
        token = torch.arange(make.V)
        self.lm_head = torch.nn.Linear(make.V, make.V, bias=False)
        self.lm_head.weight.data = -50.0 * (
            (token[:, None] - token[None] + rank) % make.V
        )  # [other token, next token]
        self.config = make.config()

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, **_):
        return types.SimpleNamespace(
            last_hidden_state=torch.nn.functional.one_hot(input_ids.roll(-1, 1), make.V).float()
        )


def test_trap_10_a_model_that_knows_each_next_token_measures_a_cross_entropy_of_zero(dataset):
    seen = evaluate.evaluate(models.Model(Oracle(0), Oracle(0), None), dataset.val, make.V, 64)
    assert seen["ce"] < 1e-6 and seen["acc1"] == 1


@pytest.mark.parametrize("rank, acc1, acc5", ((0, 1, 1), (1, 0, 1), (4, 0, 1), (5, 0, 0)))
def test_the_fifth_likeliest_token_is_among_the_five_and_the_sixth_is_not(
    dataset, rank, acc1, acc5
):
    seen = evaluate.evaluate(
        models.Model(Oracle(rank), Oracle(rank), None), dataset.val, make.V, 64
    )
    assert (seen["acc1"], seen["acc5"]) == (acc1, acc5) and seen["ce"] == pytest.approx(
        50 * rank, abs=1e-6
    )


def test_eval_only_measures_and_writes_nothing_else(world, dataset, store, student, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in (world / "student").iterdir()}
    make.call(stage2_kd.main, *make.stage2(world, "--eval-only", "--out", tmp_path / "measured"))
    assert [path.name for path in (tmp_path / "measured").iterdir()] == ["eval.json"]
    seen, wanted = (
        files.read_json(tmp_path / "measured" / "eval.json"),
        evaluate.evaluate(student, dataset.val, make.V, 4096, teacher=store),
    )
    assert {name: seen[name] for name in wanted} == pytest.approx(wanted, rel=1e-5)
    assert before == {path: path.stat().st_mtime_ns for path in (world / "student").iterdir()}


# --- how a run goes


def test_trap_19_training_calls_the_body_alone_and_keeps_no_other_layers_hidden_states(
    world, tmp_path, monkeypatch
):
    calls, plain = [], models.load

    def load(*args, **options):
        model = plain(*args, **options)  # its probe calls the whole model; from here on nothing may
        model.body.register_forward_hook(
            lambda _, args, kwargs, output: calls.append((kwargs, output)), with_kwargs=True
        )
        for module in (model.module, model.module.lm_head):
            module.register_forward_pre_hook(
                lambda module, _: pytest.fail(f"{type(module).__name__} was called")
            )
        return model

    monkeypatch.setattr(models, "load", load)
    # who writes answers, and who compares a saved checkpoint, calls all of it
    monkeypatch.setattr(worth, "answered", lambda *_: {})
    monkeypatch.setattr(checkpoints, "some_logits", lambda _: torch.zeros(1))
    make.call(stage2_kd.main, *make.stage2(world, "--steps", 2, "--out", tmp_path / "run"))
    assert len(calls) > 4
    for kwargs, output in calls:
        assert not kwargs.get("output_hidden_states") and kwargs["use_cache"] is False
        assert output.hidden_states is None and output.past_key_values is None


def test_trap_21_a_run_that_was_stopped_goes_on_with_the_rows_that_were_next(
    world, tmp_path, monkeypatch
):
    seen, plain = [], plan.microbatches

    def spy(rows, *args, **options):
        if options.get("pack") is not False:  # evaluation asks for pack=False by name
            seen.append(rows.tolist())
            if len(seen) == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
        return plain(rows, *args, **options)

    monkeypatch.setattr(plan, "microbatches", spy)
    stop_at = None
    make.call(stage1_sft.main, *make.stage1(world, "--steps", 8, "--out", tmp_path / "straight"))
    straight, stop_at = seen[:], 4
    seen.clear()
    code, _ = make.ends(
        stage1_sft.main, *make.stage1(world, "--steps", 8, "--out", tmp_path / "stopped")
    )
    assert code == 143 and len(seen) == 4, (
        "the step under way is finished, and no other one is begun"
    )
    stop_at = None
    make.call(stage1_sft.main, *make.stage1(world, "--steps", 8, "--out", tmp_path / "stopped"))
    assert seen == straight and len({tuple(rows) for rows in straight}) == 8
    assert same(weights(tmp_path / "straight" / "final"), weights(tmp_path / "stopped" / "final"))


def test_a_step_that_the_scaler_skips_changes_no_weight_and_does_not_advance_the_schedule(
    world, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(
        torch.amp,
        "GradScaler",
        functools.partial(torch.amp.GradScaler, init_scale=2.0**40, backoff_factor=2.0**-40),
    )
    make.call(
        stage1_sft.main,
        *make.stage1(
            world, "--steps", 4, "--amp", "fp16", "--warmup", 0.5, "--out", tmp_path / "run"
        ),
    )
    first, second, *_ = make.history(tmp_path / "run", "train")
    before, after = make.history(tmp_path / "run", "eval")[:2]
    assert "grad_norm" not in first and np.isfinite(second["grad_norm"]), (
        "the example must overflow once"
    )
    assert first["lr"] == second["lr"] and before["ce"] == after["ce"]
    config = files.read_json(tmp_path / "run" / "config.json")
    assert config["updates"] == 3 and config["skipped"] == 1
    said = capsys.readouterr().out
    assert "1 of 4 steps were skipped" in said
    assert "grad_norm nan" in said or "grad_norm inf" in said


def no_constant(word):
    raise AssertionError(f"{word} is no JSON")


@pytest.fixture
def overflowing(monkeypatch):
    """Scale the loss so that no gradient fits into float16, whatever is taken back."""
    scaler = functools.partial(torch.amp.GradScaler, init_scale=2.0**120, backoff_factor=0.999)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    monkeypatch.setattr(Run, "export", lambda *_: None)


@pytest.mark.parametrize("script, arguments", ((stage1_sft, make.stage1), (stage2_kd, make.stage2)))
def test_a_run_whose_steps_are_all_skipped_stops_after_twenty(
    world, tmp_path, script, arguments, overflowing
):
    out = tmp_path / "run"
    argv = arguments(world, "--steps", 50, "--amp", "fp16", "--eval-every", 15, "--out", out)
    code, words = make.ends(script.main, *argv)
    assert code == 1 and "skipped 20 optimizer steps in a row, up to step 19;" in words
    assert "float16" in words and "--amp" in words and not (out / "config.json").exists()
    for line in (out / "history.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=no_constant)
    # last/ is of step 15: what was skipped before it counts
    code, words = make.ends(script.main, *argv)
    assert code == 1 and "in a row, up to step 19;" in words


def test_a_short_run_that_took_no_step_does_not_end_as_a_success(world, tmp_path, overflowing):
    argv = make.stage1(world, "--steps", 4, "--amp", "fp16", "--out", tmp_path / "run")
    for _ in range(2):
        code, words = make.ends(stage1_sft.main, *argv)
        assert code == 1 and "has learnt nothing; saw 4 of 4 steps were skipped" in words
        assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize("amp", ("fp16", "bf16"))
def test_trap_18_half_precision_trains_as_float32_does(world, tmp_path, amp):
    for name in ("off", amp):
        make.call(
            stage2_kd.main,
            *make.stage2(
                world, "--steps", 3, "--lr", 1e-4, "--amp", name, "--out", tmp_path / name
            ),
        )
    full, half = (
        [(line["loss"], line["grad_norm"]) for line in make.history(tmp_path / name, "train")]
        for name in ("off", amp)
    )
    np.testing.assert_allclose(half, full, rtol=0.05)
    assert {tensor.dtype for tensor in weights(tmp_path / amp / "final").values()} == {
        torch.float32
    }


def test_gradient_checkpointing_changes_nothing(world, tmp_path):
    for number, more in enumerate(((), ("--checkpointing",))):
        make.call(
            stage1_sft.main,
            *make.stage1(world, "--steps", 2, *more, "--out", tmp_path / str(number)),
        )
    plain, saved = (
        [
            (line["loss"], line["grad_norm"])
            for line in make.history(tmp_path / str(number), "train")
        ]
        for number in range(2)
    )
    np.testing.assert_allclose(saved, plain, rtol=1e-4)


def test_running_a_finished_run_again_says_so_and_exits_0(world, tmp_path, capsys):
    for script, arguments in ((stage1_sft, make.stage1), (stage2_kd, make.stage2)):
        argv = arguments(world, "--steps", 1, "--out", tmp_path / script.__name__)
        make.call(script.main, *argv)
        before = {path: path.stat().st_mtime_ns for path in (tmp_path / script.__name__).rglob("*")}
        # also where a row would not fit any more: the plan is no matter of a finished run
        for more in ((), ("--tokens-per-microbatch", 10)):
            assert make.ends(script.main, *argv, *more) == (0, "")
            said = capsys.readouterr().out
            assert "already finished; nothing to do (--fresh starts anew)" in said
        assert before == {
            path: path.stat().st_mtime_ns for path in (tmp_path / script.__name__).rglob("*")
        }
        code, words = make.ends(script.main, *argv, "--lr", "3e-3")
        assert (
            code == 1
            and "is finished with other settings; saw lr 0.01 (now 0.003)" in words
            and "--fresh" in words
        )


def test_fresh_starts_a_finished_run_anew(world, tmp_path):
    make.call(stage1_sft.main, *make.stage1(world, "--steps", 1, "--out", tmp_path / "run"))
    make.call(
        stage1_sft.main, *make.stage1(world, "--steps", 2, "--fresh", "--out", tmp_path / "run")
    )
    assert (
        files.read_json(tmp_path / "run" / "config.json")["steps"] == 2
        and len(make.history(tmp_path / "run", "train")) == 2
    )


# --- the end of a run


@pytest.fixture(scope="module")
def two_sources(world, tmp_path_factory):
    """Return a world whose val rows come from the sources a and b by turns."""
    folder = tmp_path_factory.mktemp("sources") / "world"
    shutil.copytree(world, folder)
    rows = np.load(folder / "data/val.rows.npy")
    rows["source"] = np.arange(len(rows)) % 2
    np.save(folder / "data/val.rows.npy", rows)
    files.write_json(
        folder / "data/meta.json",
        files.read_json(folder / "data/meta.json") | {"sources": [{"name": "a"}, {"name": "b"}]},
    )
    return folder


PATIENT = ("--steps", 12, "--eval-every", 1)
SCORES = (5.0, 4.0, 3.0, 3.5, 2.0, 2.5, 2.0, 1.0)  # the sixth evaluation after the first is a tie


@pytest.mark.parametrize(
    "script, arguments, measure", ((stage1_sft, make.stage1, "ce"), (stage2_kd, make.stage2, "kl"))
)
def test_patience_stops_after_so_many_evaluations_without_a_better_one_and_leaves_that_state(
    world, tmp_path, capsys, monkeypatch, script, arguments, measure
):
    plain, asked = evaluate.evaluate, []

    def told(*args, **options):
        """Measure, but for the measure that is followed: that one is written above."""
        asked.append(1)
        return plain(*args, **options) | {measure: (*SCORES, *[9.0] * 9)[len(asked) - 1]}

    monkeypatch.setattr(evaluate, "evaluate", told)
    for name, more in (("whole", ()), ("stopped", ("--patience", 2))):
        asked.clear()
        make.call(script.main, *arguments(world, *PATIENT, *more, "--out", tmp_path / name))
    whole, stopped = (make.history(tmp_path / name, "eval") for name in ("whole", "stopped"))
    at = 6  # 2.5 and 2.0 are no better than the 2.0 of step 4
    assert [line[measure] for line in whole][: len(SCORES)] == list(SCORES)
    assert stopped == whole[: at + 1] and len(make.history(tmp_path / "stopped", "train")) == at
    said = files.read_json(tmp_path / "stopped/config.json")
    assert (
        said["stopped_early"] == at == said["updates"]
        and said["steps"] == 12
        and said["best"] == 2.0
    )
    assert said["stopped_because"] == f"2 evaluations in a row without a better {measure}" and said[
        "final"
    ]["ce"] == pytest.approx(whole[at]["ce"])
    assert f"stopped at step {at} of 12: 2 evaluations in a row" in capsys.readouterr().out
    assert "stopped_early" not in files.read_json(tmp_path / "whole/config.json")
    final = models.load(str(tmp_path / "stopped/final"), CPU)
    left = plain(final, data.Dataset(world / "data").val, make.V, 64)["ppl"]
    assert left == pytest.approx(whole[at]["ppl"], rel=1e-3)
    assert not (tmp_path / "stopped/last").exists() and make.ends(
        script.main, *arguments(world, *PATIENT, "--patience", 2, "--out", tmp_path / "stopped")
    ) == (0, "")


def test_patience_counts_only_evaluations_in_a_row():
    run = Run.__new__(Run)
    run.best, run.best_by, run.more, run.args = None, "ce", {}, types.SimpleNamespace(patience=2)
    seen = []
    for value in (3.0, 3.5, 2.0, 2.5, 2.0):  # an equal one is no better one
        run.is_better({"ce": value})
        seen.append(run.gives_up)
    assert seen == [False, False, False, False, True]
    run.args.patience = 0
    assert not run.gives_up


@pytest.mark.parametrize(
    "script, arguments, best",
    (
        (stage1_sft, make.stage1, "ce_b"),
        (stage2_kd, make.stage2, "ce_a"),
        (stage2_kd, make.stage2, "kl_b"),
    ),
)
def test_best_follows_the_measure_of_one_source(two_sources, tmp_path, script, arguments, best):
    make.call(
        script.main,
        *arguments(
            two_sources,
            "--lr",
            0.1,
            "--steps",
            6,
            "--eval-every",
            1,
            "--best",
            best,
            "--out",
            tmp_path / "run",
        ),
    )
    lines, said = (
        make.history(tmp_path / "run", "eval"),
        files.read_json(tmp_path / "run/config.json"),
    )
    assert said["best_by"] == best and said["best"] == pytest.approx(
        min(line[best] for line in lines), rel=1e-6
    )
    step = min(lines, key=lambda line: line[best])["step"]
    assert f"best (step {step})" in (tmp_path / "run/best/README.md").read_text()


def test_best_by_a_source_that_is_not_measured_is_refused_before_anything_is_loaded(
    world, two_sources, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        checkpoints, "local_folder", lambda *_: pytest.fail("a model was looked for")
    )
    for script, arguments, folder, best, words in (
        (stage1_sft, make.stage1, two_sources, "ce_c", "saw c; wanted ce_a, ce_b"),
        (stage2_kd, make.stage2, two_sources, "kl_x", "wanted kl_a, kl_b"),
        (stage1_sft, make.stage1, world, "ce_a", "val does not hold 2 to 16 named sources"),
    ):
        code, said = make.ends(
            script.main, *arguments(folder, "--best", best, "--out", tmp_path / "run")
        )
        assert code == 1 and words in said, said


def test_best_by_a_kl_that_no_dump_gives_follows_the_cross_entropy_of_that_source(
    two_sources, tmp_path, monkeypatch
):
    monkeypatch.setattr(logits.Records, "compares", property(lambda self: False))
    for best, followed in (("kl_b", "ce_b"), ("agree", "ce"), ("acc1", "acc1")):
        make.call(
            stage2_kd.main,
            *make.stage2(two_sources, "--steps", 1, "--best", best, "--out", tmp_path / best),
        )
        assert files.read_json(tmp_path / best / "config.json")["best_by"] == followed


# --- what a run leaves


def test_best_and_final_load_in_plain_transformers_with_the_weights_and_measures_they_claim(
    world, dataset, tmp_path, monkeypatch
):
    loaded, plain = [], models.load
    monkeypatch.setattr(
        models,
        "load",
        lambda *args, **options: loaded.append(plain(*args, **options)) or loaded[-1],
    )
    make.call(
        stage1_sft.main,
        *make.stage1(world, "--steps", 6, *make.TOO_FAST, "--out", tmp_path / "run"),
    )
    assert same(weights(tmp_path / "run" / "final"), loaded[0].module.state_dict())
    measured = [line["ce"] for line in make.history(tmp_path / "run", "eval")]
    assert min(measured) < 0.5 * measured[-1], "the example must overshoot"
    for name, ce in (("best", min(measured)), ("final", measured[-1])):
        assert own_loss(tmp_path / "run" / name, dataset.val, range(12)) == pytest.approx(
            ce, rel=1e-4
        )
        assert (
            AutoTokenizer.from_pretrained(tmp_path / "run" / name).chat_template
            == make.tokenizer().chat_template
        )
        assert f"{ce:.4f}" in (tmp_path / "run" / name / "README.md").read_text()
    assert checkpoints.local_folder(str(tmp_path / "run")) == tmp_path / "run" / "best"
    assert not (tmp_path / "run" / "last").exists()


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_save_dtype_halves_the_checkpoints(world, tmp_path, dtype):
    make.call(
        stage1_sft.main,
        *make.stage1(
            world, "--steps", 1, "--save-dtype", str(dtype)[6:], "--out", tmp_path / "run"
        ),
    )
    module = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")
    assert {p.dtype for p in module.parameters()} == {dtype} and module.config.dtype == dtype


def test_the_tokens_that_end_answers_reach_the_generation_config(world, tmp_path):
    make.model(tmp_path / "student", eos_token_id=1, pad_token_id=None)
    make.call(
        stage1_sft.main,
        *make.stage1(
            world, "--student", tmp_path / "student", "--steps", 1, "--out", tmp_path / "run"
        ),
    )
    for name in ("best", "final"):
        assert GenerationConfig.from_pretrained(tmp_path / "run" / name).eos_token_id == [1, 3]


def test_kept_layers_start_as_a_model_cut_by_hand(world, tmp_path):
    make.model(tmp_path / "deep", layers=4)
    module = AutoModelForCausalLM.from_pretrained(tmp_path / "deep")
    cut = AutoModelForCausalLM.from_config(make.config(layers=2))
    kept = {
        name: tensor
        for name, tensor in module.state_dict().items()
        if "layers.1." not in name and "layers.3." not in name
    }
    cut.load_state_dict(
        {name.replace("layers.2.", "layers.1."): tensor for name, tensor in kept.items()}
    )
    cut.save_pretrained(tmp_path / "cut")
    make.call(
        stage1_sft.main,
        *make.stage1(
            world,
            "--student",
            tmp_path / "deep",
            "--keep-layers",
            "0,2",
            "--steps",
            2,
            "--out",
            tmp_path / "kept",
        ),
    )
    make.call(
        stage1_sft.main,
        *make.stage1(
            world, "--student", tmp_path / "cut", "--steps", 2, "--out", tmp_path / "by hand"
        ),
    )
    assert make.history(tmp_path / "kept") == make.history(tmp_path / "by hand")
    assert same(weights(tmp_path / "kept" / "final"), weights(tmp_path / "by hand" / "final"))


def test_a_folder_with_a_config_alone_makes_a_new_model_of_the_seed(world, tmp_path, capsys):
    make.config().save_pretrained(tmp_path / "config")
    for name, seed in (("one", 5), ("two", 5), ("other", 6)):
        make.call(
            stage1_sft.main,
            *make.stage1(
                world,
                "--student",
                tmp_path / "config",
                "--seed",
                seed,
                "--steps",
                1,
                "--out",
                tmp_path / name,
            ),
        )
    assert (
        "has no weights: a new model is made from its config.json, seed 5"
        in capsys.readouterr().out
    )
    one, two, other = (weights(tmp_path / name / "final") for name in ("one", "two", "other"))
    assert same(one, two) and not same(one, other)


def test_samples_answer_the_same_prompts_at_each_evaluation(world, tmp_path):
    make.call(
        stage1_sft.main,
        *make.stage1(
            world,
            "--steps",
            2,
            "--eval-every",
            1,
            "--samples",
            2,
            "--sample-tokens",
            4,
            "--out",
            tmp_path / "run",
        ),
    )
    text = (tmp_path / "run" / "samples.md").read_text()
    assert text.count("## Prompt ") == 2 and [
        text.count(f"### Step {step}, prompt ") for step in range(3)
    ] == [2, 2, 2]


def test_config_json_says_what_was_run(world, tmp_path):
    make.call(stage2_kd.main, *make.stage2(world, "--steps", 1, "--out", tmp_path / "run"))
    said = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (
        said["settings"]["alpha"] == 0.9
        and said["settings"]["temperature"] == 2.0
        and said["settings"]["seed"] == 0
    )
    assert said["settings"]["data identity"] == data.Dataset(world / "data").identities["data"]
    assert (
        said["settings"]["teacher identity"] == checkpoints.identity(world / "teacher")
        and said["versions"]["torch"] == torch.__version__
    )
    assert said["final"]["kl"] == pytest.approx(
        make.history(tmp_path / "run", "eval")[-1]["kl"], rel=1e-6
    )
