"""Several teachers as one: folders of records (stage2_kd.py --logits NAME=DIR NAME=DIR), or models
that run beside the student (--teacher NAME=DIR NAME=DIR)."""

import argparse
import json
import signal

import make
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import dump_logits
import stage2_kd
from lib import checkpoints, data, evaluate, files, losses, models, plan, train
from lib import head as heads
from lib import teacher as teachers
from lib.teacher import live, several, written
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


def whole_logits(folder, name, dataset, batch, dtype=None):
    """Return a model's own logits (n, V) at a batch's targets, float64, row by row."""
    module = AutoModelForCausalLM.from_pretrained(folder / name, dtype=dtype)
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
    (told,) = make.history(folder / "taught", "teacher")
    assert told["name"] == f"{folder}/teacher (general), {folder}/other (finance)" and told["ce"]
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
    assert about["kl_is_to"] == f"{folder}/teacher (a), {folder}/other (b)"
    argv[at : at + 2] = [word for one in both for word in ("--logits", one)]  # the flag twice
    assert stage2_kd.parse_args([str(word) for word in argv]).logits == about["logits"]


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
    assert capsys.readouterr().out.count("rows have no record (of another source)") == 2
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


# --- live


MODELS = {"general": "teacher", "finance": "other"}


def live_argv(folder, *more, names=("general", "finance"), out="live"):
    both = [f"{name}={folder / place}" for name, place in zip(names, MODELS.values())]
    return make.live(folder, "--teacher", *both, *more, out=out)


def beside(folder, argv, dtype="float64", rows_of=None):
    """Return (student, teacher, dataset) of a command's flags, loaded in one dtype; rows_of: takes
    the plan of the rows."""
    args, dataset = stage2_kd.parse_args([str(w) for w in argv]), data.Dataset(folder / "data")
    args.teacher_dtype = dtype
    teacher, rows = teachers.open_teacher(args, dataset), None
    student = models.load(
        str(folder / "student"), torch.device("cpu"), getattr(torch, dtype), dataset=dataset
    )
    if rows_of is not None:
        rows = plan.Rows(args, dataset, teacher.rows())
        rows.resume({})
        rows_of.append(rows)
    return teacher.join(student, args, None, rows), teacher, dataset


def each_alone(folder, *more):
    """Return the two teachers, each by itself."""
    return [
        beside(folder, make.live(folder, "--teacher", folder / place, *more))[1]
        for place in MODELS.values()
    ]


@pytest.mark.parametrize("k", (0, 8))
@pytest.mark.parametrize("t", (1.0, 2.0))
def test_of_live_teachers_each_says_of_its_rows_what_it_says_alone(folder, k, t):
    _, teacher, dataset = beside(folder, live_argv(folder, "--k", k))
    alone = each_alone(folder, "--k", k)
    for split, way, cut in (
        (dataset.train, "at", batches(dataset.train, range(60))),  # on one line
        (dataset.val, "val_at", evaluate.val_batches(dataset.val, 60)),  # each on its own
    ):
        mixed = 0
        for batch in cut:
            known = getattr(teacher, way)(batch, t)
            mixed += isinstance(known, several.Mixed)
            z = torch.randn(len(batch.labels), make.V, dtype=torch.float64)
            source = split.rows["source"][batch.rows]
            of_target = np.repeat(source, split.rows["targets"][batch.rows].astype(int))
            own = [said(getattr(one, way)(batch, t), z, t) for one in alone]
            wanted = torch.where(torch.from_numpy(of_target == 0)[:, None], *own)
            torch.testing.assert_close(said(known, z.clone(), t), wanted, atol=1e-9, rtol=1e-9)
        assert mixed


def test_a_live_teacher_reads_no_line_without_a_row_of_its_own(folder, monkeypatch):
    _, teacher, dataset = beside(folder, live_argv(folder))
    read, plain = [], models.Model.hidden
    monkeypatch.setattr(
        models.Model,
        "hidden",
        lambda self, batch: read.append((self.folder.name, batch)) or plain(self, batch),
    )
    for _ in range(2):  # the second time it is remembered
        for batch in evaluate.val_batches(dataset.val, 60):
            teacher.val_at(batch, 1)
    assert all(len(batch.tokens) == len(batch.rows) for _, batch in read)
    for number, name in enumerate(MODELS.values()):
        own = np.flatnonzero(dataset.val.rows["source"] == number).tolist()
        assert sorted(row for who, b in read if who == name for row in b.rows) == own


def test_a_part_of_a_batch_is_its_rows_on_their_lines(folder):
    _, dataset = opened(folder, "bucket")
    batch = dataset.train.batch([[0, 40], [41], [1, 2]])
    counts = dataset.train.rows["targets"][batch.rows].astype(int)
    own = np.array([True, False, False, False, True])  # rows 0 and 2
    part = several.part_of(batch, own, np.flatnonzero(np.repeat(own, counts)))
    assert part.rows == [0, 2] and torch.equal(part.tokens, batch.tokens[[0, 2]])
    assert torch.equal(part.positions, batch.positions[[0, 2]])
    right = dataset.train.batch([[0], [2]])
    for name in ("labels", "numbers"):
        assert torch.equal(getattr(part, name), getattr(right, name))
    for place, row in enumerate(part.rows):
        ids, answer = dataset.train.row(row)
        mine = part.row_of == place
        assert part.tokens[mine].tolist() == ids.tolist()
        at = part.where[torch.isin(part.where, mine.flatten().nonzero()[:, 0])]
        assert part.tokens.flatten()[at].tolist() == ids[np.flatnonzero(answer) - 1].tolist()
    assert set(part.row_of.unique().tolist()) == {-1, 0, 1}


def total_loss(student, teacher, some):
    """Return the loss summed over batches, and its gradient at all weights of the student."""
    student.module.zero_grad()
    sums = 0.0
    for batch in some:
        loss, _, _ = losses.head_loss(
            student.hidden(batch),
            student.head(),
            batch.labels,
            teacher.at(batch, 2.0),
            losses.Method(0.7, 2.0),
        )
        loss.backward()
        sums += loss.item()
    return sums, torch.cat([p.grad.flatten() for p in student.module.parameters()])


@pytest.mark.parametrize("k", (0, 8))
def test_a_step_is_the_sum_of_each_live_teachers_rows_and_one_runs_at_a_time(
    folder, monkeypatch, k
):
    asked, plain, found = [], live.LiveTeacher.at, []
    student, teacher, dataset = beside(folder, live_argv(folder, "--k", k), rows_of=found)
    monkeypatch.setattr(
        live.LiveTeacher, "at", lambda self, *rest: asked.append(self.number) or plain(self, *rest)
    )
    rows, cpu = found[0], torch.device("cpu")
    step = [*rows.batches(0, cpu)]
    sources = [{*dataset.train.rows["source"][batch.rows].tolist()} for batch in step]
    assert all(len(own) == 1 for own in sources) and {0, 1} == set.union(*sources)
    loss, gradient = total_loss(student, teacher, step)
    assert asked == [number for own in sources for number in own]
    wanted, gradients = 0.0, 0.0
    for number, one in enumerate(each_alone(folder, "--k", k)):
        own = rows.of(0)[dataset.train.rows["source"][rows.of(0)] == number]
        # another cut, of these rows alone
        one_loss, one_gradient = total_loss(student, one, batches(dataset.train, own))
        wanted, gradients = wanted + one_loss, gradients + one_gradient
    assert loss == pytest.approx(wanted, rel=1e-5)
    torch.testing.assert_close(gradient, gradients, atol=1e-5, rtol=1e-5)


def bucketed(logp, z, t, k):
    """Return (n, V): a teacher's k likeliest as they are, the rest's mass where the student's
    logits z have it."""
    top = logp.topk(k, dim=1).indices
    inside = torch.zeros_like(logp, dtype=torch.bool).scatter(1, top, True)
    rest = logp.exp().masked_fill(inside, 0.0).sum(1, keepdim=True)
    shape = (z / t).masked_fill(inside, -torch.inf).softmax(1)
    return torch.where(inside, logp.exp(), rest * shape).log()


@pytest.mark.parametrize("how", ("mean", "product"))
@pytest.mark.parametrize("k", (0, 8))
@pytest.mark.parametrize("t", (1.0, 2.0))
def test_mean_and_product_of_live_teachers_are_those_of_the_models(folder, how, k, t):
    argv = live_argv(folder, "--combine", how, "--k", k, names=("a", "b"))
    _, teacher, dataset = beside(folder, argv)
    for batch in batches(dataset.train, range(20, 40))[:2]:
        z = torch.randn(len(batch.labels), make.V, dtype=torch.float64)
        logp = [
            (whole_logits(folder, name, dataset, batch, torch.float64) / t).log_softmax(1)
            for name in MODELS.values()
        ]
        if k:
            logp = [bucketed(one, z, t, k) for one in logp]
        right = ((logp[0].exp() + logp[1].exp()) / 2).log()
        if how == "product":
            right = ((logp[0] + logp[1]) / 2).log_softmax(1)
        known = teacher.at(batch, t)
        torch.testing.assert_close(said(known, z.clone(), t), right, atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(said(known[slice(1, 4)], z[1:4].clone(), t), right[1:4])


def test_kl_on_val_and_the_teachers_own_measures_are_those_of_each_alone(folder):
    _, teacher, dataset = beside(folder, live_argv(folder))
    alone = each_alone(folder)
    for batch in batches(dataset.val, range(8)):
        z = torch.randn(len(batch.labels), make.V, dtype=torch.float64)
        z -= z.amax(1, keepdim=True)
        counts = dataset.val.rows["targets"][batch.rows].astype(int)
        first = torch.from_numpy(np.repeat(dataset.val.rows["source"][batch.rows], counts) == 0)
        seen = losses.distance(z.clone(), teacher.val_at(batch, 1))
        own = [losses.distance(z.clone(), one.val_at(batch, 1)) for one in alone]
        for made, *right in zip(seen, *own):
            torch.testing.assert_close(made, torch.where(first, *right), atol=1e-5, rtol=1e-5)
    measures, each = teacher.val_measures(), [one.val_measures() for one in alone]
    rows = dataset.val.rows
    weights = [rows["targets"][rows["source"] == number].sum() for number in (0, 1)]
    right = [one[f"ce_{name}"] for one, name in zip(each, MODELS)]
    assert [measures["ce_general"], measures["ce_finance"]] == pytest.approx(right)
    assert measures["ce"] == pytest.approx(np.average(right, weights=weights))
    assert measures["targets"] == sum(weights)
    averaged = beside(folder, live_argv(folder, "--combine", "mean"))[1]
    assert averaged.val_measures() is None and averaged.answers is None


def test_a_run_with_two_live_teachers_measures_by_source(folder, capsys):
    argv = live_argv(folder, "--steps", 4, "--eval-every", 2, "--samples", 1, out="two-live")
    make.call(stage2_kd.main, *argv)
    said = capsys.readouterr().out
    assert "teachers: 2, each source's rows learn from their own" in said
    assert "--- finance:\nteacher: " in said and said.count("memory: the weights of 2") == 1
    assert "dump_logits.py" not in said
    last = make.history(folder / "two-live", "eval")[-1]
    assert {"kl", "kl_general", "kl_finance", "ce_finance"} <= set(last)
    (own,) = make.history(folder / "two-live", "teacher")
    assert {"ce", "acc1", "ce_general", "ce_finance"} <= set(own)
    assert make.ends(stage2_kd.main, *argv) == (0, "")
    assert "already finished" in capsys.readouterr().out
    at = argv.index(f"finance={folder / 'other'}")
    argv[at] = f"finance={folder / 'teacher'}"
    code, words = make.ends(stage2_kd.main, *argv)
    assert code == 1 and "teacher identity" in words


def test_measuring_against_live_teachers_alone(folder):
    argv = live_argv(folder, "--eval-only", "--combine", "product", names="ab", out="measured-live")
    make.call(stage2_kd.main, *argv)
    about = files.read_json(folder / "measured-live" / "eval.json")
    both = f"a={folder}/teacher b={folder}/other"
    assert about["teacher"] == both and about["combine"] == "product" and about["kl"] > 0


@pytest.mark.parametrize("more", ([], ["--combine", "mean"], ["--alpha", "general:0.9 finance:1"]))
def test_a_run_with_live_teachers_that_was_killed_ends_as_one_left_alone(folder, tmp_path, more):
    argv = live_argv(folder, "--steps", 4, "--eval-every", 2, "--save-every", 2, *more)
    processes = make.processes()
    for name, hook in (
        ("straight", None),
        ("killed", dict(where="lib.train.update", number=3, signal=signal.SIGKILL)),
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


def test_rows_that_are_apart_for_two_reasons_are_apart_for_both(folder):
    rows = plan.Rows(make.plan_args(), data.Dataset(folder / "data"))
    source = rows.split.rows["source"]
    rows.keep_apart(np.array([3, 3]))
    rows.keep_apart(np.array([-1, 1]))
    assert len({*zip(rows.groups.tolist(), source.tolist())}) == len({*rows.groups.tolist()}) == 2
    rows.keep_apart(np.array([0, 0]))
    assert len({*zip(rows.groups.tolist(), source.tolist())}) == len({*rows.groups.tolist()}) == 2


def test_one_teacher_without_a_name_is_that_teacher_and_the_flag_a_word(folder):
    for given, wanted in (
        ([f"{folder}/teacher"], f"{folder}/teacher"),
        ([f"a={folder}/x y", "b=org/id"], f"'a={folder}/x y' b=org/id"),
        ([f"a={folder}/x b=org/id"], f"a={folder}/x b=org/id"),
    ):
        args = stage2_kd.parse_args([str(w) for w in make.live(folder, "--teacher", *given)])
        assert args.teacher == wanted
    (folder / "t=1").symlink_to(folder / "teacher")
    for place in ("teacher", "t=1"):
        _, teacher, dataset = beside(folder, make.live(folder, "--teacher", folder / place))
        assert isinstance(teacher, live.LiveTeacher)
        rows = plan.Rows(make.plan_args(), dataset)
        assert rows.groups is None


def test_the_weights_of_live_teachers_are_one_sum_and_one_folder_is_loaded_once(
    folder, monkeypatch, capsys
):
    monkeypatch.setattr(train, "available_bytes", lambda device: 100_000)
    _, teacher, _ = beside(folder, live_argv(folder), "float32")
    said = capsys.readouterr().out
    whole = sum(one.weight_bytes() for one in teacher.of.values())
    assert f"memory: the weights of 2 teachers take about {files.human(whole)}" in said
    assert "WARNING" in said and "do not fit into 100.0 kB on cpu: --teacher-quant" in said
    both = [f"{name}={folder}/teacher" for name in MODELS]
    _, teacher, _ = beside(folder, make.live(folder, "--teacher", *both), "float32")
    assert teacher.of["general"] is teacher.of["finance"] and len(teacher.loaded) == 1


def test_layers_of_live_teachers_wait_on_disk_each_in_a_place_of_its_own(
    folder, monkeypatch, tmp_path
):
    pytest.importorskip("accelerate")
    _, teacher, dataset = beside(folder, live_argv(folder, "--combine", "mean"), "float32")
    batch = dataset.train.batch([[0, 35], [40]])
    z = torch.randn(len(batch.labels), make.V)
    wanted = said(teacher.at(batch, 2.0), z.clone(), 2.0)
    monkeypatch.setattr(train, "available_bytes", lambda device: 0)
    argv = live_argv(folder, "--combine", "mean", "--teacher-offload", "--out", tmp_path / "run")
    _, teacher, _ = beside(folder, argv, "float32")
    for one in teacher.of.values():
        assert next(one.model.module.model.layers.parameters()).is_meta
    assert len({one._placing(0)["offload_folder"] for one in teacher.loaded}) == 2
    made = said(teacher.at(batch, 2.0), z.clone(), 2.0)
    torch.testing.assert_close(made, wanted, rtol=0, atol=0)


def test_what_one_live_teacher_calls_otherwise_is_left_out_of_all(tmp_path):
    folder = make.sourced(make.world(tmp_path, rows=8, val=4, longest=10), (0, 4))
    make.model(folder / "other", seed=3)
    free = sorted({*range(4, make.V)} - {*data.Dataset(folder / "data").used()})[:2]
    for name, token in zip(MODELS.values(), free):
        path = folder / name / "tokenizer.json"
        told = json.loads(path.read_text())
        words = told["model"]["vocab"]
        words[f"<other{token}>"] = words.pop(f"w{token - 4}")
        path.write_text(json.dumps(told))
    for more in ([], ["--combine", "mean"]):
        student, teacher, dataset = beside(folder, live_argv(folder, *more))
        batch = dataset.train.batch([[0, 5], [1]])
        assert student.apart == tuple(free)
        z = torch.randn(len(batch.labels), make.V, dtype=torch.float64)
        logp = said(teacher.at(batch, 2.0), z, 2.0)
        assert (logp[:, free] < -1e6).all()
        torch.testing.assert_close(logp.exp().sum(1), torch.ones(len(z), dtype=torch.float64))
        own = teacher.val_measures()
        assert own is None or own["ce_general"] > 0


@pytest.mark.parametrize(
    "given, more, code, words",
    [
        (["general={}/teacher", "{}/other"], [], 2, "is not NAME=DIR"),
        (["a={}/teacher", "a={}/other"], [], 2, "--teacher names one twice: a, a"),
        (["{}/teacher"], ["--combine", "mean"], 2, "needs two or more"),
        (None, ["--combine", "best"], 2, "wanted --logits, or with --teacher mean or product"),
        (None, ["--on-policy", 0.5], 2, "--on-policy needs one teacher"),
        (None, ["--feature-weight", 1], 2, "--feature-weight needs one teacher"),
        (None, ["--attention-weight", 1], 2, "--attention-weight needs one teacher"),
        (None, ["--contrastive-weight", 1], 2, "--contrastive-weight needs one teacher"),
        (
            ["a={}/teacher", "b=x.gguf"],
            ["--teacher-quant", "4bit"],
            2,
            "a GGUF file is read as a whole",
        ),
        (["general={}/teacher", "sport={}/other"], [], 1, "--teacher names a source that is not"),
        (["finance={}/teacher"], [], 1, "a source has no teacher"),
        (["general={}/teacher", "finance={}/nothing"], [], 1, "nothing is missing"),
    ],
)
def test_one_line_for_each_bad_input_of_live_teachers(folder, given, more, code, words, capsys):
    argv = live_argv(folder, "--steps", 1, *more, out="refused")
    if given:
        argv = make.live(folder, "--steps", 1, *more, "--teacher", *given, out="refused")
        argv = [str(word).format(folder) for word in argv]
    seen, said = make.ends(stage2_kd.main, *argv)
    said = said or capsys.readouterr().err.splitlines()[-1]
    assert words in said and seen == code and "\n" not in said, said


def test_live_teachers_of_other_tokens_are_refused(tmp_path):
    folder = make.sourced(make.world(tmp_path, rows=40, val=4))
    for seed, name in enumerate(("student", "other")):  # rows above the tokenizer's
        make.model(folder / name, seed=seed, vocab=make.V + 3)
    code, said = make.ends(stage2_kd.main, *live_argv(folder, "--steps", 1))
    assert code == 1 and "the teachers of --teacher know different tokens" in said, said
    make.tokenizer("x").save_pretrained(folder / "other")
    code, said = make.ends(stage2_kd.main, *live_argv(folder, "--steps", 1))
    assert code == 1 and "/other has another tokenizer than" in said, said
