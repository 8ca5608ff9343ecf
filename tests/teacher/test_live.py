"""The teacher beside the student: the same loss, gradient and run as from its logits on disk, and
as written out here over all tokens."""

import argparse
import json
import shutil
import signal

import make
import numpy as np
import pytest
import torch
from gguf_files import WORDS, to_gguf
from references import (
    BETAS,
    TEMPERATURES,
    all_close,
    bucket,
    gradients,
    ours,
    power,
    problem,
    reference_divergence,
    reference_loss,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import dump_logits
import stage1_sft
import stage2_kd
from lib import data, evaluate, files, head, losses, models, train
from lib.head import Head
from lib.losses import Method, TopK, Whole
from lib.measure import plots
from lib.teacher import live, logits, placed, record

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make.world(tmp_path_factory.mktemp("world"), rows=24, val=8, rows_per_chunk=16)


@pytest.fixture(scope="module")
def dataset(world):
    return data.Dataset(world / "data")


@pytest.fixture(scope="module")
def pair(world, dataset):
    """Return (student, teacher), both in float64, for tests that change neither."""
    return both(world, dataset)


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    monkeypatch.setattr(plots, "curves", lambda *_: None)


def both(world, dataset, *more, dtype="float64", student="student"):
    """Return (student, teacher), both loaded in one dtype."""
    args = stage2_kd.parse_args([str(word) for word in make.live(world, *more)])
    args.teacher_dtype = dtype
    teacher, pupil = (
        live.LiveTeacher(args, dataset),
        models.load(str(world / student), CPU, getattr(torch, dtype), dataset=dataset),
    )
    return teacher.join(pupil, args, None), teacher


def row_logits(folder, batch, split):
    """Return a model's logits (N, V) at a batch's targets, float64, row by row without packing, by
    transformers alone."""
    module, out = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval(), []
    for row in batch.rows:
        ids, answer = (torch.from_numpy(np.array(part).astype(np.int64)) for part in split.row(row))
        out.append(module(input_ids=ids[None]).logits[0][answer.nonzero()[:, 0] - 1].detach())
    return torch.cat(out)


def loss_and_gradient(student, batch, kept, method):
    """Return loss, cross-entropy and divergence summed over a batch, and the loss' gradient at
    every weight of the student."""
    student.module.zero_grad()
    loss, ce, kd = losses.head_loss(
        student.hidden(batch),
        student.head(teacher_vocab(kept, student)),
        batch.labels,
        kept,
        method,
    )
    loss.backward()
    return [
        loss.detach(),
        ce,
        kd,
        torch.cat([p.grad.flatten() for p in student.module.parameters()]),
    ]


def teacher_vocab(kept, student):
    return kept.head.vocab if isinstance(kept, Whole) else min(student.vocab, make.V)


def written_out(student, batch, z, method, vocab=make.V):
    """Return the same over the whole vocabulary, without any of our loss: softmax, the definitions
    of the papers, autograd."""
    student.module.zero_grad()
    s = (student.hidden(batch) @ student.module.get_output_embeddings().weight.t())[:, :vocab]
    t, (p, q) = (
        method.temperature,
        (torch.softmax(x / method.temperature, 1) for x in (z[:, :vocab], s)),
    )
    kd = reference_divergence(p, q, method.divergence, method.beta).sum()
    ce = torch.nn.functional.cross_entropy(s, batch.labels, reduction="sum")
    loss = method.alpha * power(method.divergence, t) * kd + (1 - method.alpha) * ce
    loss.backward()
    return [
        loss.detach(),
        ce.detach(),
        kd.detach(),
        torch.cat([p.grad.flatten() for p in student.module.parameters()]),
    ]


LINES = [[0, 3, 5], [7, 1]]


# --- the loss of a whole teacher


def whole(z, vocab=None, **more):
    """Return a teacher whose head makes exactly the logits z (n, V'): what is hidden is the logits
    themselves."""
    return Whole(z, Head(torch.eye(z.shape[1], dtype=z.dtype), None, vocab or z.shape[1], **more))


@pytest.mark.parametrize("kind", losses.DIVERGENCES)
@pytest.mark.parametrize("t", TEMPERATURES)
def test_a_whole_teacher_gives_the_divergence_over_all_tokens(kind, t):
    hidden, weight, labels, z = problem()
    method = Method(0.7, t, kind, BETAS[kind])

    def full(h, w):
        s = h @ w.t()
        kd = reference_divergence(
            torch.softmax(z / t, 1), torch.softmax(s / t, 1), kind, BETAS[kind]
        ).sum()
        ce = torch.nn.functional.cross_entropy(s, labels, reduction="sum")
        return 0.7 * power(kind, t) * kd + 0.3 * ce

    all_close(ours(hidden, weight, labels, whole(z), method), gradients(full, hidden, weight))


@pytest.mark.parametrize("kind", losses.DIVERGENCES)
@pytest.mark.parametrize("t", TEMPERATURES)
def test_the_gradient_agrees_with_finite_differences_through_both_heads(kind, t):
    """Both heads have a scale, a cap and a bias, and the teacher's knows more tokens; what is
    differenced is the loss that is printed."""
    hidden, weight, labels, _ = problem(n=3, v=11, d=4)
    made = torch.Generator().manual_seed(5)

    def draw(*shape):
        return torch.randn(*shape, generator=made, dtype=torch.float64)

    teacher = Whole(draw(3, 6), Head(2 * draw(14, 6), draw(14), 11, 0.7, 4.0))
    method = Method(0.8, t, kind, BETAS[kind])

    def loss_of(h, w):
        return losses.head_loss(
            h,
            Head(w, torch.linspace(-1, 1, 11, dtype=torch.float64), 11, 1.3, 5.0),
            labels,
            teacher,
            method,
        )[0]

    _, *grads = gradients(loss_of, hidden, weight)
    for place, (tensor, grad) in enumerate(zip((hidden, weight), grads)):
        for at in torch.randint(tensor.numel(), (8,), generator=made).tolist():
            step = (
                torch.zeros_like(tensor)
                .flatten()
                .index_fill(0, torch.tensor([at]), 1e-5)
                .view_as(tensor)
            )
            moved = [
                [
                    tensor + sign * step if i == place else other
                    for i, other in enumerate((hidden, weight))
                ]
                for sign in (1, -1)
            ]
            difference = (loss_of(*moved[0]) - loss_of(*moved[1])) / 2e-5
            torch.testing.assert_close(grad.flatten()[at], difference, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", losses.DIVERGENCES)
def test_a_student_equal_to_its_whole_teacher_has_no_divergence_and_no_gradient(kind):
    hidden, weight, labels, _ = problem()
    loss, *grads = ours(
        hidden,
        weight,
        labels,
        Whole(hidden, Head(weight, None, len(weight))),
        Method(1.0, 2.0, kind, BETAS[kind]),
    )
    assert abs(loss) < 1e-12
    assert kind == "tvd" or all(grad.abs().max() < 1e-12 for grad in grads)


def test_tokens_that_the_teacher_alone_knows_are_cut_before_its_softmax():
    hidden, weight, labels, z = problem()
    wide = torch.cat(
        [z, torch.full((len(z), 9), 50.0, dtype=z.dtype)], 1
    )  # nearly all of its mass is there
    method = Method(0.6, 2.0)
    all_close(
        ours(hidden, weight, labels, whole(wide, len(weight)), method),
        ours(hidden, weight, labels, whole(z), method),
    )


def test_how_targets_are_cut_into_chunks_and_pieces_changes_nothing(monkeypatch):
    hidden, weight, labels, z = problem(n=23)
    method, sizes, plain = Method(0.6, 2.0, "jsd", 0.3), [], Whole.logits
    wanted = ours(hidden, weight, labels, whole(z), method)
    monkeypatch.setattr(
        Whole, "logits", lambda self, out, _: sizes.append(tuple(out.shape)) or plain(self, out, _)
    )
    monkeypatch.setattr(head, "CHUNK_BYTES", 4 * 23 * 5)
    monkeypatch.setattr(losses, "PIECE_BYTES", {"cpu": 8 * 23 * 2})
    all_close(ours(hidden, weight, labels, whole(z), method), wanted)
    assert sizes == [(5, 23)] * 4 + [(3, 23)], (
        "no more than a chunk of the teacher's logits is ever there"
    )


def test_what_a_bucket_does_not_see_is_the_divergence_inside_it():
    """KL(p || q) = KL over the k+1 categories + p_rest KL(p in the rest || q in the rest): the
    error that the bucket makes, and all of it."""
    hidden, weight, labels, z = problem()
    t, k = 2.0, 4
    ids, gap, tail = head.topk_and_tails(z.clone(), k, [t])
    method = Method(1.0, t)
    seen = (
        ours(hidden, weight, labels, whole(z), method)[0]
        - ours(hidden, weight, labels, TopK(ids, gap, tail[:, 0]), method)[0]
    )
    p, q = (torch.softmax(x / t, 1).scatter(1, ids, 0.0) for x in (z, hidden @ weight.t()))
    inside = [x / x.sum(1, keepdim=True) for x in (p, q)]
    wanted = t * t * (p.sum(1) * reference_divergence(*inside, "fkl", 0.5)).sum()
    torch.testing.assert_close(seen, wanted, rtol=1e-9, atol=1e-9)
    assert wanted > 0.1


# --- the teacher and its dumps


@pytest.mark.parametrize("kind", losses.DIVERGENCES)
@pytest.mark.parametrize("t", TEMPERATURES)
def test_a_live_teacher_gives_the_loss_and_gradient_that_are_written_out_over_all_tokens(
    world, pair, dataset, kind, t
):
    student, teacher = pair
    batch, method = dataset.train.batch(LINES), Method(0.6, t, kind, BETAS[kind])
    seen = loss_and_gradient(student, batch, teacher.at(batch, t), method)
    all_close(
        seen,
        written_out(student, batch, row_logits(world / "teacher", batch, dataset.train), method),
        rtol=1e-6,
        atol=1e-6,
    )


@pytest.mark.parametrize("t", TEMPERATURES)
def test_a_live_teacher_and_all_of_its_logits_kept_give_one_loss_and_gradient(
    world, pair, dataset, t
):
    """Its dump with k = V, but for the rounding of a file: what dump_logits.py computes, in
    float64."""
    student, teacher = pair
    batch, method = dataset.train.batch(LINES), Method(0.6, t)
    ids, gap, tails = head.topk_and_tails(
        row_logits(world / "teacher", batch, dataset.train), make.V, [t]
    )
    wanted = loss_and_gradient(student, batch, TopK(ids, gap, tails[:, 0]), method)
    all_close(
        loss_and_gradient(student, batch, teacher.at(batch, t), method),
        wanted,
        rtol=1e-6,
        atol=1e-6,
    )


@pytest.mark.parametrize("k, rank", ((8, 0), (make.V, 0)))
@pytest.mark.parametrize("t", TEMPERATURES)
def test_a_live_top_k_is_that_of_the_disk(world, dataset, tmp_path, monkeypatch, k, rank, t):
    """A real dump, whose gaps are float32 for once: their rounding to float16 is the one thing that
    live logits do not share."""
    plain, kind = (
        record.record_dtype,
        lambda dtype, name: ("<f4" if name == "gap" else dtype[name].base, dtype[name].shape),
    )

    def wide(*args):
        return np.dtype([(name, *kind(plain(*args), name)) for name in plain(*args).names])

    monkeypatch.setattr(record, "record_dtype", wide)
    make.call(
        dump_logits.main,
        *make.dump(
            world, "--k", k, "--tail-rank", rank, "--values", "fp16", "--out", tmp_path / "logits"
        ),
    )
    store = logits.Records(tmp_path / "logits", dataset, t)
    student, teacher = both(world, dataset, "--k", 0 if k == make.V else k, dtype="float32")
    batch, method = dataset.train.batch(LINES), Method(0.6, t)
    seen, wanted = (
        loss_and_gradient(student, batch, source.at(batch, t), method)
        for source in (teacher, store)
    )
    n = len(batch.labels)
    all_close([x / n for x in seen], [x / n for x in wanted], rtol=1e-5, atol=1e-5)


def test_a_live_top_k_gives_the_bucket_loss_that_is_written_out(world, dataset):
    student, teacher = both(world, dataset, "--k", 8)
    batch, method = dataset.train.batch(LINES), Method(0.6, 2.0)
    z = row_logits(world / "teacher", batch, dataset.train)
    loss, ce, kd, _ = loss_and_gradient(student, batch, teacher.at(batch, 2.0), method)
    s = student.hidden(batch) @ student.module.get_output_embeddings().weight.t()
    all_close(
        (loss, ce, kd), reference_loss(z, s.detach(), batch.labels, 8, method), rtol=1e-6, atol=1e-6
    )
    assert isinstance(teacher.at(batch, 2.0), TopK) and teacher.at(batch, 2.0).ids.shape == (
        len(batch.labels),
        8,
    )


@pytest.mark.parametrize("k", (0, 8))
@pytest.mark.parametrize("student_rows, teacher_rows", ((61, 70), (70, 61)))
def test_output_layers_of_two_sizes_are_cut_to_the_smaller_one(
    world, dataset, tmp_path, student_rows, teacher_rows, k
):
    (tmp_path / "data").symlink_to(world / "data")
    make.model(tmp_path / "student", seed=1, vocab=student_rows)
    make.model(tmp_path / "teacher", seed=2, vocab=teacher_rows)
    student, teacher = both(tmp_path, dataset, "--k", k)
    assert teacher.vocab == 61
    batch, method = dataset.train.batch(LINES), Method(0.6, 2.0)
    z = row_logits(tmp_path / "teacher", batch, dataset.train)[:, :61]
    seen = loss_and_gradient(student, batch, teacher.at(batch, 2.0), method)
    if not k:
        return all_close(seen, written_out(student, batch, z, method), rtol=1e-6, atol=1e-6)
    s = (student.hidden(batch) @ student.module.get_output_embeddings().weight.t())[:, :61].detach()
    all_close(seen[:3], reference_loss(z, s, batch.labels, k, method), rtol=1e-6, atol=1e-6)


def test_evaluation_compares_with_a_live_teacher_over_all_tokens(world, pair, dataset):
    student, teacher = pair
    seen = evaluate.evaluate(student, dataset.val, teacher.vocab, 64, teacher=teacher)
    batch = dataset.val.batch([[row] for row in range(8)])
    z, s = (row_logits(world / name, batch, dataset.val) for name in ("teacher", "student"))
    kl = reference_divergence(torch.softmax(z, 1), torch.softmax(s, 1), "fkl", 0.5).mean().item()
    assert (
        seen["kl"] == pytest.approx(kl, rel=1e-6)
        and seen["agree"] == (z.argmax(1) == s.argmax(1)).double().mean().item()
    )
    assert {name: seen[name] for name in ("ce", "acc1", "ece")} == pytest.approx(
        {
            name: value
            for name, value in evaluate.evaluate(student, dataset.val, 61, 64).items()
            if name in ("ce", "acc1", "ece")
        },
        rel=1e-9,
    )
    assert teacher.val_measures()["ce"] == pytest.approx(
        torch.nn.functional.cross_entropy(z, batch.labels).item(), rel=1e-6
    )


def test_evaluation_with_a_live_top_k_compares_over_a_bucket(world, dataset):
    student, teacher = both(world, dataset, "--k", 8)
    batch = dataset.val.batch([[row] for row in range(8)])
    z, s = (row_logits(world / name, batch, dataset.val) for name in ("teacher", "student"))
    ids = z.topk(8).indices
    kl = (
        reference_divergence(*(bucket(torch.softmax(x, 1), ids) for x in (z, s)), "fkl", 0.5)
        .mean()
        .item()
    )
    assert evaluate.evaluate(student, dataset.val, teacher.vocab, 64, teacher=teacher)[
        "kl"
    ] == pytest.approx(kl, rel=1e-6)


# --- the run


def test_a_live_run_is_a_run_on_the_dump_of_all_tokens(world, tmp_path, capsys):
    make.call(
        dump_logits.main,
        *make.dump(
            world, "--k", make.V, "--values", "fp16", "--tail-rank", 0, "--out", tmp_path / "logits"
        ),
    )
    few = ("--steps", 4, "--lr", 1e-4)  # the two teachers differ by float16, and so do the steps
    make.call(
        stage2_kd.main,
        *make.stage2(world, *few, "--logits", tmp_path / "logits", "--out", tmp_path / "disk"),
    )
    capsys.readouterr()
    make.call(stage2_kd.main, *make.live(world, *few, "--out", tmp_path / "live"))
    said = capsys.readouterr().out
    assert "all of its 61 tokens, at any T" in said and "the teacher's weights take about" in said
    seen, wanted = (make.history(tmp_path / name) for name in ("live", "disk"))
    for a, b in zip(seen, wanted, strict=True):
        shared = {
            name: value for name, value in a.items() if name in b
        }  # of a teacher that is live more is known
        assert shared.pop("event") == b.pop("event") and shared == pytest.approx(
            b, rel=5e-3, abs=5e-4
        )
    teacher_ce = files.read_json(tmp_path / "logits" / "val" / "meta.json")["teacher_ce"]
    assert f"val cross-entropy: teacher {teacher_ce:.4f}" in said


def test_any_temperature_is_allowed_and_may_move(world, tmp_path, monkeypatch):
    asked, plain = [], live.LiveTeacher.at
    monkeypatch.setattr(
        live.LiveTeacher, "at", lambda self, batch, t: asked.append(t) or plain(self, batch, t)
    )
    make.call(
        stage2_kd.main,
        *make.live(
            world, "--steps", 5, "--temperature", "3.3->0.7", "--k", 8, "--out", tmp_path / "live"
        ),
    )
    assert [
        line["temperature"] for line in make.history(tmp_path / "live", "train")
    ] == pytest.approx([3.3, 2.65, 2.0, 1.35, 0.7])
    assert {round(t, 6) for t in asked} == {3.3, 2.65, 2.0, 1.35, 0.7, 1.0}, "1 is for evaluation"


def test_the_teacher_is_frozen_in_eval_mode_and_runs_once_a_micro_batch(
    world, tmp_path, monkeypatch
):
    passes, plain, batches = [], live.LiveTeacher.at, []

    def watched(self, batch, temperature):
        if not batches:
            self.model.body.register_forward_hook(lambda *_: passes.append(1))
            self.before = [p.clone() for p in self.model.module.parameters()]
        batches.append(self)
        before = len(passes)
        kept = plain(self, batch, temperature)
        assert (
            len(passes) == before + 1
            and not kept.hidden.requires_grad
            and not kept.hidden.is_inference()
            and not self.model.module.training
        )
        return kept

    monkeypatch.setattr(live.LiveTeacher, "at", watched)
    make.call(
        stage2_kd.main,
        *make.live(world, "--steps", 3, "--eval-every", 99, "--out", tmp_path / "live"),
    )
    teacher = batches[0]
    assert len(batches) >= 6
    assert all(
        p.grad is None and not p.requires_grad and torch.equal(p, q)
        for p, q in zip(teacher.model.module.parameters(), teacher.before)
    )


def test_eval_only_measures_against_a_live_teacher(world, tmp_path):
    make.call(stage2_kd.main, *make.live(world, "--eval-only", "--out", tmp_path / "eval"))
    seen = json.loads((tmp_path / "eval" / "eval.json").read_text())
    assert seen["kl"] > 0 and seen["teacher"] == str(world / "teacher") and seen["k"] == 0


def test_a_live_run_that_was_killed_ends_as_one_left_alone(world, tmp_path):
    argv, processes = (
        make.live(world, "--steps", 14, "--eval-every", 5, "--save-every", 3),
        make.processes(),
    )
    for name, hook in (
        ("straight", None),
        ("killed", dict(where="lib.train.update", number=9, signal=signal.SIGKILL)),
        ("killed", None),
    ):
        words = [str(word) for word in [*argv, "--out", tmp_path / name]]
        process = processes.Process(
            target=make.script, args=("stage2_kd", words, tmp_path / "log", hook)
        )
        process.start()
        process.join()
        assert process.exitcode == (-signal.SIGKILL if hook else 0), (tmp_path / "log").read_text()
    assert "continues" in (tmp_path / "log").read_text()
    for part in ("final", "best"):
        assert (tmp_path / "killed" / part / "model.safetensors").read_bytes() == (
            tmp_path / "straight" / part / "model.safetensors"
        ).read_bytes()
    assert make.history(tmp_path / "killed") == make.history(tmp_path / "straight")


# --- where the teacher's weights are, and in what


def test_layers_that_do_not_fit_wait_on_disk_and_change_nothing(
    world, dataset, monkeypatch, tmp_path
):
    _, teacher = both(world, dataset)
    batch = dataset.train.batch(LINES)
    wanted = teacher.at(batch, 2.0).hidden
    monkeypatch.setattr(train, "available_bytes", lambda device: 0)
    _, teacher = both(world, dataset, "--teacher-offload", "--out", tmp_path / "run")
    assert next(teacher.model.module.model.layers.parameters()).is_meta
    torch.testing.assert_close(teacher.at(batch, 2.0).hidden, wanted, rtol=0, atol=0)


def test_layers_fill_the_places_in_order_and_all_else_is_where_the_model_runs(
    tmp_path, monkeypatch
):
    model = AutoModelForCausalLM.from_pretrained(make.model(tmp_path / "deep", layers=4))
    layer = 4 * sum(p.numel() for p in model.model.layers[0].parameters())
    rest = 4 * (make.V * 32 + 32)

    def where(room, cpu, device="cuda:0"):
        monkeypatch.setattr(train, "available_bytes", lambda _: cpu)
        made = placed.spread(tmp_path / "deep", torch.float32, torch.device(device), room)
        assert made["lm_head"] == made["model.embed_tokens"] == made["model.norm"] == device
        places = [made[f"model.layers.{i}"] for i in range(4)]
        assert places == sorted(places, key=[device, "cpu", "disk"].index)
        assert places.count(device) * layer <= max(0, room - rest)
        assert device == "cpu" or places.count("cpu") * layer <= cpu
        return places

    assert where(rest + 5 * layer, 0) == ["cuda:0"] * 4
    # a place keeps room for a layer that is there for its turn only
    assert where(rest + 3 * layer, 9 * layer) == ["cuda:0", "cuda:0", "cpu", "cpu"]
    assert where(rest + 2 * layer, 2 * layer) == ["cuda:0", "cpu", "disk", "disk"]
    assert where(rest + 2 * layer - 1, 0) == where(0, 0) == ["disk"] * 4
    assert where(rest + 3 * layer, 0, "cpu") == ["cpu", "cpu", "disk", "disk"]


def test_layers_lie_over_all_cards_as_far_as_there_is_room(tmp_path, monkeypatch, capsys):
    model = AutoModelForCausalLM.from_pretrained(make.model(tmp_path / "deep", layers=6))
    layer = 4 * sum(p.numel() for p in model.model.layers[0].parameters())
    rest = 4 * (make.V * 32 + 32)

    def where(room, others, device="cuda"):
        free = {1: others[0], 2: others[1]}
        monkeypatch.setattr(train, "available_bytes", lambda card: free[card.index])
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
        monkeypatch.setattr(placed, "numbered", lambda _: torch.device("cuda:0"))
        words = tmp_path / "deep", torch.float32, torch.device(device), room, layer
        return placed.over_cards(*words)["device_map"]

    # of each other card a layer's bytes are left; this one keeps room for a layer in its turn
    made = where(rest + 3 * layer, [4 * layer, 3 * layer])
    assert made["lm_head"] == made["model.embed_tokens"] == made["model.norm"] == 0
    each = [made[f"model.layers.{i}"] for i in range(6)]
    assert each == [0, 0, 1, 1, 1, 2]
    with pytest.raises(SystemExit) as end:
        where(rest - 1, [9 * layer, 9 * layer])
    assert "no room for its embeddings on cuda:0" in str(end.value)
    with pytest.raises(SystemExit) as end:
        where(rest + 3 * layer, [3 * layer, 2 * layer])
    assert "does not fit on 3 card(s)" in str(end.value) and "all but" in str(end.value)
    assert "layers on 0 2, 1 3, 2 1" in capsys.readouterr().out


def test_one_card_takes_all_layers(world, dataset, tmp_path):
    _, teacher = both(world, dataset)
    batch = dataset.train.batch(LINES)
    wanted = teacher.at(batch, 2.0).hidden
    _, teacher = both(world, dataset, "--device-map", "auto", "--out", tmp_path / "run")
    torch.testing.assert_close(teacher.at(batch, 2.0).hidden, wanted, rtol=0, atol=0)


def test_weights_that_are_not_finite_are_found_where_they_wait_on_disk(mine, monkeypatch):
    monkeypatch.setattr(train, "available_bytes", lambda device: 0)
    spoil(mine / "teacher", "model.layers.1.mlp.up_proj.weight")
    refused(
        mine,
        "--teacher-offload",
        of=["teacher holds weights that are not finite", "layers.1.mlp.up_proj"],
    )


def test_memory_that_is_too_small_is_a_warning_with_figures(world, dataset, monkeypatch, capsys):
    monkeypatch.setattr(train, "available_bytes", lambda device: 50_000)
    both(world, dataset, dtype="float32")
    said = capsys.readouterr().out
    assert (
        "memory: the teacher's weights take about 82.2 kB" in said
        and "WARNING" in said
        and "50.0 kB on cpu: --teacher-quant" in said
    )


def test_the_estimate_of_the_weights_is_their_size(world, dataset):
    _, teacher = both(world, dataset, dtype="float32")
    assert teacher.weight_bytes() == sum(p.numel() * 4 for p in teacher.model.module.parameters())


@pytest.mark.parametrize("bits", ("4bit", "8bit"))
def test_a_quantised_teacher_is_near_itself(world, dataset, bits):
    pytest.importorskip("bitsandbytes")
    batch = dataset.train.batch(LINES)
    _, teacher = both(world, dataset, dtype="float32")
    wanted = teacher.at(batch, 2.0).hidden
    _, teacher = both(world, dataset, "--teacher-quant", bits, dtype="float32")
    error = (teacher.at(batch, 2.0).hidden - wanted).norm() / wanted.norm()
    assert 0 < error < 0.1


@pytest.mark.parametrize("tokens", (WORDS, None, [*WORDS, "[PAD61]"]))
def test_a_gguf_file_is_the_teacher_that_it_was_made_of(world, dataset, tmp_path, tokens):
    pytest.importorskip("gguf")
    path = to_gguf(world / "teacher", tmp_path / "teacher.gguf", tokens)
    batch = dataset.train.batch(LINES)
    wanted = both(world, dataset, dtype="float32")[1].at(batch, 2.0).hidden
    teacher = both(world, dataset, "--teacher", path, dtype="float32")[1]
    torch.testing.assert_close(teacher.at(batch, 2.0).hidden, wanted, rtol=1e-5, atol=1e-5)
    assert teacher.identity()["teacher"] == files.sha256(path)
    make.call(
        stage2_kd.main,
        *make.live(world, "--teacher", path, "--steps", 1, "--out", tmp_path / "run"),
    )


@pytest.mark.parametrize("more", ([], ["--lora-rank", "2"]))
def test_a_gguf_file_is_no_student(world, tmp_path, more):
    """It trained: whole weights ended in a traceback at the first save, an adapter in a folder
    whose base nothing can read."""
    pytest.importorskip("gguf")
    path = to_gguf(world / "student", tmp_path / "student.gguf", WORDS)
    for main, teacher in (
        (stage1_sft.main, []),
        (stage2_kd.main, ["--teacher", world / "teacher"]),
    ):
        argv = [
            "--data",
            world / "data",
            *teacher,
            "--student",
            path,
            "--out",
            tmp_path / "out",
            *make.QUICK,
            *more,
        ]
        code, words = make.ends(main, *argv)
        assert code == 1 and "student.gguf cannot be trained" in words
        assert not (tmp_path / "out").exists()


def test_a_gguf_file_with_other_tokens_is_refused(world, tmp_path):
    pytest.importorskip("gguf")
    other = [*WORDS[:7], WORDS[8], WORDS[7], *WORDS[9:]]
    refused(
        world,
        "--teacher",
        to_gguf(world / "teacher", tmp_path / "teacher.gguf", other),
        of=["teacher.gguf has another tokenizer than", "'w4' as token 7", "wanted 'w3'"],
    )
    refused(
        world,
        "--teacher",
        to_gguf(world / "teacher", tmp_path / "short.gguf", WORDS[:60]),
        of=["short.gguf has another tokenizer", "saw no token as token 60"],
    )


def test_a_gguf_file_without_tokens_is_judged_by_the_tokenizer_beside_it(world, tmp_path):
    pytest.importorskip("gguf")
    make.tokenizer("x").save_pretrained(tmp_path)
    refused(
        world,
        "--teacher",
        to_gguf(world / "teacher", tmp_path / "teacher.gguf", None),
        of=["has another tokenizer than"],
    )


# --- what a user can get wrong


def refused(world, *more, of=()):
    """Run stage2_kd.py with a live teacher: it must end with exit code 1 and one line, which says
    all of `of`."""
    code, words = make.ends(stage2_kd.main, *make.live(world, "--steps", 1, *more))
    assert (
        code == 1
        and words.startswith("error: ")
        and "\n" not in words
        and all(part in words for part in of)
    ), words


def spoil(folder, name, value=float("nan")):
    weights = load_file(folder / "model.safetensors")
    weights[name].view(-1)[3] = value
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    "drop, more, words",
    (
        (("--teacher",), [], "one of the arguments --logits --teacher is required"),
        ((), ["--logits", "x"], "not allowed with argument"),
        ((), ["--k", -1], "--k is -1, wanted 0 or more"),
        ((), ["--teacher-quant", "2bit"], "invalid choice: '2bit'"),
        ((), ["--teacher-quant", "4bit", "--teacher-offload"], "do not go together"),
        ((), ["--tp", "--device-map", "auto"], "do not go together"),
        ((), ["--teacher-device", "cpu", "--device-map", "auto"], "do not go together"),
        ((), ["--tp", "--feature-weight", "1"], "--tp does not go with --feature-weight"),
        (
            ("--teacher",),
            ["--teacher", "x.gguf", "--teacher-quant", "4bit"],
            "a GGUF file is read as a whole",
        ),
        (
            ("--teacher",),
            ["--logits", "x", "--k", 8],
            "--k is of a live teacher: it goes with --teacher",
        ),
        (
            ("--teacher",),
            ["--logits", "x", "--teacher-offload"],
            "--teacher-offload is of a live teacher",
        ),
    ),
)
def test_flags_that_cannot_work_together_end_with_exit_code_2(world, capsys, drop, more, words):
    argv = make.live(world)
    for flag in drop:
        at = argv.index(flag)
        del argv[at : at + 2]
    assert (
        make.ends(stage2_kd.main, *argv, *more) == (2, "")
        and words in capsys.readouterr().err.splitlines()[-1]
    )


def test_a_run_on_logits_has_no_settings_of_a_live_teacher():
    """So that runs from before there was one go on, and are found finished."""
    args = stage2_kd.parse_args(["--data", "a", "--logits", "b", "--student", "c", "--out", "d"])
    assert isinstance(args, argparse.Namespace) and all(
        getattr(args, name) is None for name in ("teacher", *live.OWN)
    )


def test_a_teacher_of_another_tokenizer_is_refused(mine):
    make.tokenizer("x").save_pretrained(mine / "teacher")
    refused(
        mine,
        of=["/teacher has another tokenizer than", "teacher and student must share one vocabulary"],
    )


def test_a_teacher_that_is_missing_or_broken_is_one_line(mine):
    refused(mine, "--teacher", mine / "nothing", of=["nothing is missing"])
    refused(mine, "--teacher", mine / "nothing.gguf", of=["nothing.gguf is missing"])
    path = mine / "teacher" / "model.safetensors"
    whole_file = path.read_bytes()
    path.write_bytes(whole_file[:-100])
    refused(mine, of=["teacher", "config.json and *.safetensors that belong together"])
    path.write_bytes(whole_file)
    spoil(mine / "teacher", "model.norm.weight")
    refused(mine, of=["teacher holds weights that are not finite", "model.norm.weight"])


def test_a_file_that_is_no_gguf_is_one_line(world, tmp_path):
    pytest.importorskip("gguf")
    (tmp_path / "teacher.gguf").write_bytes(b"no gguf at all")
    refused(world, "--teacher", tmp_path / "teacher.gguf", of=["teacher.gguf", "GGUF"])


def test_more_tokens_than_there_are(world):
    refused(world, "--k", 62, of=["k does not fit", "--k 62", "at most V = 61", "--k 61, or 0"])


@pytest.mark.parametrize(
    "package, more",
    (
        ("bitsandbytes", ["--teacher-quant", "4bit"]),
        ("accelerate", ["--teacher-offload"]),
        ("gguf", None),
    ),
)
def test_a_package_that_is_missing_is_one_line_with_its_pip_install(
    world, tmp_path, monkeypatch, package, more
):
    plain = files.importlib.util.find_spec
    monkeypatch.setattr(
        files.importlib.util,
        "find_spec",
        lambda name, *rest: None if name == package else plain(name, *rest),
    )
    if more is None:
        (tmp_path / "teacher.gguf").write_bytes(b"GGUF")
        more = ["--teacher", tmp_path / "teacher.gguf"]
    refused(world, *more, of=[f"needs {package}", f"pip install {package}"])


def test_a_run_into_the_teachers_folder_is_refused(world):
    refused(
        world,
        "--out",
        world / "teacher",
        "--fresh",
        of=["holds the teacher that is read", "another --out"],
    )
    assert (world / "teacher" / "model.safetensors").exists()


@pytest.mark.parametrize(
    "more, words",
    (
        (["--k", 8], "k 0 (now 8)"),
        (["--teacher-dtype", "bfloat16"], "teacher_dtype 'auto' (now 'bfloat16')"),
        ([], "teacher identity"),
    ),
)
def test_a_run_is_not_continued_with_another_teacher(mine, more, words):
    make.call(stage2_kd.main, *make.live(mine, "--steps", 1))
    if not more:
        shutil.rmtree(mine / "teacher")
        make.model(mine / "teacher", seed=9)
    refused(mine, *more, of=["is finished with other settings", words])


def test_a_teacher_whose_numbers_overflow_is_told_from_a_student_that_does(world, monkeypatch):
    plain = live.LiveTeacher.join

    def join(self, *args):
        student = plain(self, *args)
        self.model.module.model.norm.weight.fill_(float("inf"))
        return student

    monkeypatch.setattr(live.LiveTeacher, "join", join)
    refused(world, of=["the teacher's hidden states are not finite", "--teacher-dtype float32"])


def test_the_teacher_is_run_over_val_once_and_not_at_every_evaluation(
    world, tmp_path, monkeypatch, capsys
):
    seen, plain = [], live.LiveTeacher.at
    monkeypatch.setattr(
        live.LiveTeacher,
        "at",
        lambda self, batch, temperature: seen.append(batch.rows) or plain(self, batch, temperature),
    )
    make.call(
        stage2_kd.main,
        *make.live(world, "--steps", 4, "--eval-every", 1, "--out", tmp_path / "kept"),
    )
    kept = len(seen)
    monkeypatch.setattr(live, "VAL_BYTES", 0)
    make.call(
        stage2_kd.main,
        *make.live(world, "--steps", 4, "--eval-every", 1, "--out", tmp_path / "anew"),
    )
    assert len(seen) - kept > kept and make.history(tmp_path / "kept") == make.history(
        tmp_path / "anew"
    )


def test_a_teacher_is_at_a_distance_of_exactly_zero_from_itself(world):
    dataset = data.Dataset(world / "data")
    teacher = models.load(str(world / "teacher"), torch.device("cpu"))
    with torch.no_grad():
        hidden = teacher.hidden(dataset.val.batch([[row] for row in range(8)]))
        ((_, z),) = teacher.head().chunks(hidden)
        kl, _, top, _ = losses.distance(z - z.amax(1, keepdim=True), Whole(hidden, teacher.head()))
    assert (kl == 0).all() and torch.equal(top, z.argmax(1))


def test_a_moving_temperature_with_a_dump_without_a_basis_is_refused_in_the_users_words(
    world, tmp_path
):
    make.call(dump_logits.main, *make.dump(world, "--tail-rank", 0, "--out", tmp_path / "logits"))
    code, said = make.ends(
        stage2_kd.main,
        *make.stage2(
            world,
            "--temperature",
            "4->2",
            "--logits",
            tmp_path / "logits",
            "--out",
            tmp_path / "run",
        ),
    )
    assert (
        code == 1
        and "--temperature 4->2 passes by temperatures that were not dumped" in said
        and "--teacher instead" in said
    )


@pytest.mark.parametrize("bits", ("4bit", "8bit"))
def test_a_dump_says_what_quantising_its_teacher_costs(world, bits, capsys):
    pytest.importorskip("bitsandbytes")
    words = ["--tail-rank", 0, "--chunk", "val", "--teacher-quant", bits]
    make.call(dump_logits.main, *make.dump(world, *words, out=bits))
    found = files.read_json(world / bits / "val" / "meta.json")
    said = found["quantised"]
    assert said["rows"] > 0 and all(0 < said["kl"][t]["mean"] < 1 for t in ("1", "2", "4"))
    mean = said["kl"]["1"]["mean"]
    assert (
        found["teacher_quant"] == bits
        and f"KL(whole || {bits}) is {mean:.2g}/" in capsys.readouterr().out
    )
    with pytest.raises(SystemExit, match="teacher_quant"):  # the whole one's are others
        make.call(dump_logits.main, *make.dump(world, "--tail-rank", 0, "--chunk", "val", out=bits))
