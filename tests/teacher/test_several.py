"""Several folders of records as one teacher (stage2_kd.py --logits NAME=DIR NAME=DIR)."""

import argparse

import make
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import dump_logits
import stage2_kd
from lib import checkpoints, data, files, losses, plan
from lib import head as heads
from lib.teacher import several, written
from lib.teacher.logits import Records

KINDS = {
    "shape": ["--tail-rank", 6, "--tail-bytes", 6],
    "bucket": ["--tail-rank", 0],
    "whole": ["--k", make.V, "--values", "fp16"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two sources, two teachers; each teacher's records of all rows, in three kinds."""
    folder = make.sourced(make.world(tmp_path_factory.mktemp("several"), rows=60, val=8))
    make.model(folder / "other", seed=3)
    for kind, flags in KINDS.items():
        make.call(dump_logits.main, *make.dump(folder, *flags, out=f"general-{kind}"))
        words = make.dump(folder, *flags, out=f"finance-{kind}")
        words[words.index("--teacher") + 1] = folder / "other"
        make.call(dump_logits.main, *words)
    return folder


def logits_of(folder, kind, names=("general", "finance")):
    made = (folder / f"general-{kind}", folder / f"finance-{kind}")
    return [f"{name}={place}" for name, place in zip(names, made)]


def opened(folder, kind, combine=None, names=("general", "finance")):
    dataset = data.Dataset(folder / "data")
    args = argparse.Namespace(
        eval_only=False, temperature=2.0, verify=False, combine=combine, logits=None
    )
    words = logits_of(folder, kind, names)
    return several.Several(args, dataset, dict(word.split("=", 1) for word in words)), dataset


def batches(split, rows):
    lengths = split.rows["length"]
    return [
        split.batch(lines)
        for lines in plan.microbatches(np.array(rows), lengths, 200, 200, pack=True)
    ]


def said(known, z, t):
    """Return what a teacher says (n, V) at T beside a student's logits."""
    if isinstance(known, losses.TopK) and known.basis is None:
        logp, tail = losses.teacher_logp(known, t), (z / t).scatter(1, known.ids, -torch.inf)
        whole = tail.log_softmax(1) + logp[:, -1:]
        return whole.scatter(1, known.ids, logp[:, :-1])
    return known.logp_all(known.logits(torch.empty_like(z), z), t)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("t", (1.0, 2.0))
def test_each_row_learns_from_its_sources_teacher_record_by_record(folder, kind, t):
    teacher, dataset = opened(folder, kind)
    alone = [Records(folder / f"{name}-{kind}", dataset, t) for name in ("general", "finance")]
    for split, way in ((dataset.train, "at"), (dataset.val, "val_at")):
        mixed = 0
        for batch in batches(split, range(len(split.rows))):
            known = getattr(teacher, way)(batch, t)
            mixed += isinstance(known, several.Mixed)
            z = torch.randn(len(batch.labels), make.V)
            counts = split.rows["targets"][batch.rows].astype(int)
            source = np.repeat(split.rows["source"][batch.rows], counts)
            own = [said(getattr(one, way)(batch, t), z, t) for one in alone]
            wanted = torch.where(torch.from_numpy(source == 0)[:, None], *own)
            torch.testing.assert_close(said(known, z.clone(), t), wanted, atol=1e-5, rtol=1e-5)
        assert mixed


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("divergence", losses.DIVERGENCES)
def test_loss_and_gradient_are_the_sum_of_those_of_each_teachers_rows(folder, kind, divergence):
    teacher, dataset = opened(folder, kind)
    torch.manual_seed(0)
    weight = torch.randn(make.V, 16) / 2
    head = heads.Head(weight, None, make.V)
    method = losses.Method(1.0, 2.0, divergence, losses.BETA.get(divergence, 0.5))
    hidden = {int(n): torch.randn(16) for n in range(dataset.train.targets)}

    def loss_of(batch):
        rows = torch.stack([hidden[int(n)] for n in batch.numbers]).requires_grad_()
        loss, _, _ = losses.head_loss(rows, head, batch.labels, teacher.at(batch, 2.0), method)
        loss.backward()
        return loss.item(), dict(zip(batch.numbers.tolist(), rows.grad))

    some = [*range(0, 10), *range(30, 40)]
    together = [loss_of(batch) for batch in batches(dataset.train, some)]
    assert any(isinstance(teacher.at(b, 2.0), several.Mixed) for b in batches(dataset.train, some))
    apart = [
        loss_of(batch) for own in (some[:10], some[10:]) for batch in batches(dataset.train, own)
    ]
    assert sum(one for one, _ in together) == pytest.approx(sum(one for one, _ in apart), rel=1e-5)
    there = {n: grad for _, grads in together for n, grad in grads.items()}
    for _, grads in apart:
        for number, grad in grads.items():
            torch.testing.assert_close(there[number], grad, atol=1e-5, rtol=1e-4)


def whole_logits(folder, name, dataset, batch):
    """Return a model's own logits (n, V) at a batch's targets, float64, row by row."""
    module = AutoModelForCausalLM.from_pretrained(folder / name)
    found = []
    for row in batch.rows:
        ids, answer = dataset.train.row(row)
        with torch.no_grad():
            z = module(torch.tensor(ids.astype(np.int64))[None]).logits[0].double()
        found.append(z[np.flatnonzero(answer) - 1])
    return torch.cat(found)


@pytest.mark.parametrize("t", (1.0, 2.0))
def test_mean_and_product_are_those_of_the_models_in_float64(folder, t):
    _, dataset = opened(folder, "whole")
    batch = batches(dataset.train, range(12))[0]
    logp = [
        (whole_logits(folder, n, dataset, batch) / t).log_softmax(1) for n in ("teacher", "other")
    ]
    wanted = {
        "mean": ((logp[0].exp() + logp[1].exp()) / 2).log(),
        "product": ((logp[0] + logp[1]) / 2).log_softmax(1),
    }
    z = torch.randn(len(batch.labels), make.V)
    for how, right in wanted.items():
        teacher, _ = opened(folder, "whole", how, names=("a", "b"))
        made = said(teacher.at(batch, t), z.clone(), t)
        # gaps are float16: of 16 nats to 0.008
        torch.testing.assert_close(made.double(), right, atol=2e-2, rtol=0)
        assert (made.exp() - right.exp()).abs().max() < 1e-3
        assert torch.equal(teacher.at(batch, 1.0).likeliest(z), right.argmax(1)) or t != 1


@pytest.mark.parametrize("kind", ("shape", "bucket"))
def test_mean_and_product_of_records_are_those_of_what_each_says(folder, kind):
    _, dataset = opened(folder, kind)
    batch = batches(dataset.train, range(20, 40))[0]
    alone = [Records(folder / f"{name}-{kind}", dataset, 2.0) for name in ("general", "finance")]
    z = torch.randn(len(batch.labels), make.V)
    one, other = (said(records.at(batch, 2.0), z, 2.0).double() for records in alone)
    for how, right in (
        ("mean", torch.logaddexp(one, other) - np.log(2)),
        ("product", ((one + other) / 2).log_softmax(1)),
    ):
        teacher, _ = opened(folder, kind, how, names=("a", "b"))
        made = said(teacher.at(batch, 2.0), z.clone(), 2.0)
        torch.testing.assert_close(made.double(), right, atol=1e-5, rtol=1e-5)


def test_best_is_the_teacher_that_finds_a_row_likelier(folder):
    teacher, dataset = opened(folder, "shape", "best", names=("a", "b"))
    ce = []
    for name in ("teacher", "other"):
        rows = []
        for row in range(60):
            batch = dataset.train.batch([[row]])
            logp = whole_logits(folder, name, dataset, batch).log_softmax(1)
            rows.append(-logp.gather(1, batch.labels[:, None]).sum().item())
        ce.append(rows)
    wanted = np.argmin(ce, 0)
    assert 0 < wanted.mean() < 1 and teacher.owner["train"].tolist() == wanted.tolist()
    own = teacher.val_measures()
    each = [one.val_measures()["ce"] for one in teacher.of.values()]
    assert own["ce"] <= min(each) + 1e-9


def test_kl_on_val_is_that_of_each_rows_own_teacher(folder):
    teacher, dataset = opened(folder, "shape")
    alone = [Records(folder / f"{name}-shape", dataset, 1.0) for name in ("general", "finance")]
    for batch in batches(dataset.val, range(8)):
        z = torch.randn(len(batch.labels), make.V)
        z -= z.amax(1, keepdim=True)
        counts = dataset.val.rows["targets"][batch.rows].astype(int)
        first = torch.from_numpy(np.repeat(dataset.val.rows["source"][batch.rows], counts) == 0)
        seen = losses.distance(z.clone(), teacher.val_at(batch, 1))
        own = [losses.distance(z.clone(), one.val_at(batch, 1)) for one in alone]
        for made, *right in zip(seen, *own):
            torch.testing.assert_close(made, torch.where(first, *right), atol=1e-5, rtol=1e-4)


def test_a_run_with_two_teachers_measures_by_source_and_goes_on_after_a_kill(folder, capsys):
    words = ["--steps", 6, "--eval-every", 3, "--temperature", 1, "--tokens-per-step", 400]
    argv = make.stage2(folder, *words, out="taught")
    at = argv.index("--logits")
    argv[at : at + 2] = ["--logits", *logits_of(folder, "bucket")]
    make.call(stage2_kd.main, *argv)
    said = capsys.readouterr().out
    assert "teachers: 2, each source's rows learn from their own" in said and "--- finance:" in said
    last = make.history(folder / "taught", "eval")[-1]
    assert {"kl", "kl_general", "kl_finance", "ce_finance"} <= set(last)
    assert make.ends(stage2_kd.main, *argv) == (0, "")
    assert "already finished" in capsys.readouterr().out
    argv[at + 2] = f"finance={folder}/finance-shape"
    code, words = make.ends(stage2_kd.main, *argv)
    assert code == 1 and "records identity" in words


def test_measuring_alone(folder):
    argv = make.stage2(folder, "--eval-only", out="measured")
    at = argv.index("--logits")
    both = logits_of(folder, "shape", ("a", "b"))
    argv[at : at + 2] = ["--logits", *both, "--combine", "mean"]
    make.call(stage2_kd.main, *argv)
    argv[at : at + 3] = ["--logits", " ".join(both)]  # as make hands it over
    make.call(stage2_kd.main, *argv)
    about = files.read_json(folder / "measured" / "eval.json")
    assert about["logits"] == " ".join(both) and about["kl"] > 0


@pytest.mark.parametrize(
    "more, words",
    [
        (["--logits", "general={}/general-shape", "{}/finance-shape"], "is not NAME=DIR"),
        (["--logits", "a={}/general-shape", "a={}/finance-shape"], "names one twice"),
        (["--logits", "{}/general-shape", "--combine", "mean"], "needs two or more"),
        (["--logits", "general={}/general-shape", "sport={}/finance-shape"], "sport"),
        (["--logits", "general={}/general-shape", "general2={}/finance-shape"], "general2"),
        (["--logits", "finance={}/finance-shape"], "a source has no teacher"),
    ],
)
def test_one_line_for_each_bad_input(folder, more, words, capsys):
    argv = make.stage2(folder, "--steps", 2, "--temperature", 1, out="refused")
    at = argv.index("--logits")
    argv[at : at + 2] = [word.format(folder) for word in more]
    code, said = make.ends(stage2_kd.main, *argv)
    said = said or capsys.readouterr().err
    assert words in said and code in (1, 2), said


def test_teachers_of_other_tokens_are_refused(folder):
    make.model(folder / "wider", seed=4, vocab=make.V + 3)
    words = make.dump(folder, out="wide")
    words[words.index("--teacher") + 1] = folder / "wider"
    make.call(dump_logits.main, *words)
    argv = make.stage2(folder, "--steps", 2, "--temperature", 1, out="refused")
    at = argv.index("--logits")
    argv[at : at + 2] = ["--logits", f"general={folder}/general-shape", f"finance={folder}/wide"]
    code, said = make.ends(stage2_kd.main, *argv)
    assert code == 1 and "know different tokens" in said, said


def test_the_best_of_what_is_there_when_a_chunk_is_missing(tmp_path, capsys):
    folder = make.world(tmp_path, rows=30, val=4, rows_per_chunk=10)
    make.model(folder / "other", seed=3)
    for name, chunks in (("teacher", (0, 1)), ("other", (0,))):
        for chunk in (*chunks, "val"):
            words = make.dump(folder, "--chunk", chunk, "--tail-rank", 0, out=f"of-{name}")
            words[words.index("--teacher") + 1] = folder / name
            make.call(dump_logits.main, *words)
    argv = make.stage2(folder, "--steps", 2, "--temperature", 1, out="best")
    at = argv.index("--logits")
    both = [f"a={folder}/of-teacher", f"b={folder}/of-other"]
    argv[at : at + 2] = ["--logits", *both, "--combine", "best"]
    make.call(stage2_kd.main, *argv)
    said = capsys.readouterr().out
    assert "best: a " in said and "chunks 2 are missing" in said


def test_each_source_has_a_temperature_of_its_own_with_records_of_that_alone(tmp_path):
    folder = make.sourced(make.world(tmp_path, rows=60, val=8))
    make.model(folder / "other", seed=3)
    for name, t in (("teacher", 1), ("other", 2)):
        words = make.dump(folder, "--tail-rank", 0, "--temperatures", f"1,{t}", out=f"of-{name}")
        words[words.index("--teacher") + 1] = folder / name
        make.call(dump_logits.main, *words)
    argv = make.stage2(folder, "--steps", 2, "--temperature", "general:1 finance:2", out="two")
    at = argv.index("--logits")
    argv[at : at + 2] = ["--logits", f"general={folder}/of-teacher", f"finance={folder}/of-other"]
    make.call(stage2_kd.main, *argv)


def test_answers_of_one_of_several_teachers_are_no_other_teachers(folder):
    teacher, dataset = opened(folder, "shape")
    identity = checkpoints.identity(folder / "other")
    assert identity in [one for _, one in teacher.each]
    dataset.meta["teacher"] = {"teacher": "x", "weights": identity}
    assert written.other_teacher(dataset, teacher.each) == ""
    dataset.meta["teacher"] = {"teacher": "x", "weights": "0" * 64}
    assert "WARNING: x wrote them" in written.other_teacher(dataset, teacher.each)
    dataset.meta["teacher"] = {"teacher": "org/big", "weights": "0" * 64}
    assert written.other_teacher(dataset, [("big", "")]) == ""  # served: its name alone is known


def test_a_teacher_need_not_read_the_rows_of_another_source(folder, capsys):
    """--only: each teacher's records of its own source, which are those of a dump of all rows."""
    for name in ("general", "finance"):
        words = make.dump(folder, "--tail-rank", 0, "--only", name, out=f"{name}-alone")
        if name == "finance":
            words[words.index("--teacher") + 1] = folder / "other"
        make.call(dump_logits.main, *words)
    whole, dataset = opened(folder, "bucket")
    alone, _ = opened(folder, "alone")
    capsys.readouterr()
    alone.say()
    assert "30 rows have no record (of another source)" in capsys.readouterr().out
    for name, one in alone.of.items():
        rows = dataset.train.rows["source"][one.rows()]
        assert (rows == dataset.sources.index(name)).all() and len(rows) == 30
    assert alone.rows().tolist() == whole.rows().tolist() == list(range(60))
    for split, way in ((dataset.train, "at"), (dataset.val, "val_at")):
        for batch in batches(split, range(len(split.rows))):
            z = torch.randn(len(batch.labels), make.V)
            seen, wanted = (
                said(getattr(one, way)(batch, 2.0), z.clone(), 2.0) for one in (alone, whole)
            )
            torch.testing.assert_close(seen, wanted, atol=1e-6, rtol=1e-6)
    assert alone.val_measures() == pytest.approx(whole.val_measures())


def test_a_source_that_is_not_there_and_a_chunk_without_its_rows(folder, capsys):
    code, words = make.ends(dump_logits.main, *make.dump(folder, "--only", "nobody", out="none"))
    assert code == 1 and "nobody" in words and "general, finance" in words
    some = Records(folder / "finance-alone", data.Dataset(folder / "data"), 2.0)
    assert "--only finance" in some.mend([*some.parts.values()])
