"""Teachers and students of one family whose tokenizers differ in a few tokens that no row holds:
what is taught is the distribution over the tokens that are the same to all, and no other."""

import json

import make
import pytest
import torch
from references import BETAS, power, reference_divergence
from safetensors.torch import load_file

import dump_logits
import prepare_data
import stage1_sft
import stage2_kd
from lib import checkpoints, data, files, losses, models
from lib.head import Head
from lib.losses import Method
from lib.teacher import live, logits
from lib.teacher.basis import Basis

CPU = torch.device("cpu")
LINES = [[0, 3, 5], [2, 1]]
LAST = make.V + 2  # the last row of both output layers, which the data's tokenizer does not name


def rename(folder, *numbers, more=()):
    """Give tokens of a folder's tokenizer other names, and add some behind them."""
    told = json.loads((folder / "tokenizer.json").read_text())
    words = told["model"]["vocab"]
    names = {number: word for word, number in words.items()}
    for number in numbers:
        words[f"<other{number}>"] = words.pop(names[number])
    words.update({f"<more{number}>": number for number in more})
    (folder / "tokenizer.json").write_text(json.dumps(told))


@pytest.fixture
def world(tmp_path):
    """A teacher that calls one token otherwise, and has one more; rows hold neither."""
    dataset = make.dataset(tmp_path / "data", rows=8, val=4, longest=10)
    for seed, name in enumerate(("student", "teacher")):
        make.model(tmp_path / name, seed=seed, vocab=LAST + 1)
    rename(tmp_path / "teacher", free(dataset)[0], more=[LAST])
    return tmp_path


def free(dataset):
    """Return the tokens that no row holds."""
    return sorted({*range(4, make.V)} - {*dataset.used()})


def said(folder, batch):
    """Return (student, teacher): logits at a batch's targets over the tokens that are the same to
    both, by transformers alone; those of the student with a gradient."""
    other = [free(data.Dataset(folder / "data"))[0], LAST]
    same = [id for id in range(LAST + 1) if id not in other]
    out = []
    for name in ("student", "teacher"):
        model = models.load(str(folder / name), CPU, torch.float64)
        z = model.module(batch.tokens, position_ids=batch.positions, use_cache=False).logits
        out.append((model.module, z.flatten(0, 1)[batch.where][:, same]))
    return out


def taught(folder, *more, dtype="float64", t=2.0, given=None):
    """Return (student, what the teacher says of a batch, the batch, and which ids are left out)."""
    dataset = data.Dataset(folder / "data")
    argv = make.stage2(folder, *more) if given else make.live(folder, *more)
    args = stage2_kd.parse_args([str(word) for word in argv])
    args.teacher_dtype = dtype
    teacher = given or live.LiveTeacher(args, dataset)
    student = models.load(str(folder / "student"), CPU, getattr(torch, dtype), dataset=dataset)
    student, batch = teacher.join(student, args, None), dataset.train.batch(LINES)
    return student, teacher.at(batch, t), batch


def gradients(module):
    return torch.cat([p.grad.flatten() for p in module.parameters()])


@pytest.mark.parametrize("kind", BETAS)
@pytest.mark.parametrize("reverse", (False, True))
def test_a_live_teacher_is_compared_over_the_tokens_that_are_the_same_to_both(world, kind, reverse):
    """reverse: the data is made with the teacher's tokenizer, and the student's is the other."""
    if reverse:
        turn(world)
    method = Method(0.6, 2.0, kind, BETAS[kind])
    student, known, batch = taught(world)
    loss, ce, kd = losses.head_loss(
        student.hidden(batch), student.head(), batch.labels, known, method
    )
    loss.backward()
    (module, s), (_, z) = said(world, batch)
    same = [id for id in range(LAST + 1) if id not in student.apart]
    labels = torch.tensor([same.index(label) for label in batch.labels])
    p, q = (torch.softmax(x / 2.0, 1) for x in (z.detach(), s))
    wanted = reference_divergence(p, q, kind, method.beta).sum()
    entropy = torch.nn.functional.cross_entropy(s, labels, reduction="sum")
    (0.6 * power(kind, 2.0) * wanted + 0.4 * entropy).backward()
    assert student.apart == (free(data.Dataset(world / "data"))[0], LAST)
    torch.testing.assert_close(torch.stack([ce, kd]), torch.stack([entropy, wanted]).detach())
    torch.testing.assert_close(gradients(student.module), gradients(module))


def turn(world):
    """Give the data the teacher's tokenizer."""
    folder = world / "data"
    (folder / "tokenizer/tokenizer.json").write_text((world / "teacher/tokenizer.json").read_text())
    meta = files.read_json(folder / "meta.json")
    told = checkpoints.template.identities(data.Dataset(folder).tokenizer())
    files.write_json(folder / "meta.json", meta | {"identities": meta["identities"] | told})


@pytest.mark.parametrize("k, rank", ((8, 0), (8, 8), (LAST - 1, 0)))
@pytest.mark.parametrize("of_student", (False, True))
def test_records_hold_no_token_that_is_another_one_to_the_student(world, k, rank, of_student):
    """of_student: it is the student whose tokenizer differs from the data's, and the dump is told
    of it by --student."""
    argv = ["--k", k, "--tail-rank", rank, "--values", "fp16", "--temperatures", "1,2"]
    if of_student:
        turn(world)
        argv += ["--student", world / "student"]
    make.call(dump_logits.main, *make.dump(world, *argv))
    dataset = data.Dataset(world / "data")
    records = logits.Records(world / "logits", dataset, 2.0)
    other = free(dataset)[0], LAST
    assert records.meta["apart"] == list(other)
    student, known, batch = taught(world, dtype="float32", given=records)
    assert student.apart == other and not torch.isin(known.ids, torch.tensor(other)).any()
    _, (_, z) = said(world, batch)
    p = torch.softmax(z.detach() / 2, 1)
    rest = 1 - p.sort(1, descending=True).values[:, :k].sum(1)
    seen = losses.teacher_logp(known, 2.0).exp()
    torch.testing.assert_close(seen[:, -1].double(), rest, atol=1e-3, rtol=0)
    if rank:
        whole = known.logp_all(known.logits(*torch.empty(2, len(seen), LAST + 1)), 2.0).exp()
        assert (whole[:, list(other)] < 1e-30).all()
        torch.testing.assert_close(whole.sum(1), torch.ones(len(seen)))
    method = Method(1.0, 2.0, "rkl")
    loss, _, _ = losses.head_loss(
        student.hidden(batch), student.head(), batch.labels, known, method
    )
    loss.backward()
    assert loss.isfinite() and gradients(student.module).isfinite().all()
    make.call(dump_logits.main, *make.dump(world, *argv, "--verify", 5))


def test_a_token_that_the_dump_did_not_know_to_be_another_is_left_out_of_the_top_k(world):
    """The student's tokenizer differs from the data's, and the dump was not told of it."""
    turn(world)
    make.call(dump_logits.main, *make.dump(world, "--k", LAST + 1, "--values", "fp16"))
    records = logits.Records(world / "logits", data.Dataset(world / "data"), 1.0)
    assert "apart" not in records.meta
    student, known, batch = taught(world, dtype="float32", t=1.0, given=records)
    _, (_, z) = said(world, batch)
    p = torch.zeros(len(z), LAST + 1).scatter_(1, known.ids, losses.teacher_logp(known, 1.0).exp())
    same = [id for id in range(LAST + 1) if id not in student.apart]
    assert p[:, list(student.apart)].eq(0).all() and len(student.apart) == 2
    torch.testing.assert_close(p[:, same].double(), z.detach().softmax(1), atol=1e-3, rtol=0)
    assert (known.ids[:, 0] == torch.tensor(same)[z.argmax(1)]).all()
    rkl = losses.distance(
        torch.zeros_like(p).index_fill_(1, torch.tensor(student.apart), -1e9), known
    )
    assert rkl[1].isfinite().all() and (rkl[1] < 100).all()


@pytest.mark.parametrize("reverse", (False, True))
def test_every_stage_runs_with_a_teacher_of_a_few_more_tokens(world, capsys, reverse):
    if reverse:
        turn(world)
    make.call(stage1_sft.main, *make.stage1(world, "--steps", 1))
    make.call(dump_logits.main, *make.dump(world, "--student", world / "student"))
    capsys.readouterr()
    make.call(stage2_kd.main, *make.stage2(world, "--steps", 1))
    make.call(stage2_kd.main, *make.live(world, "--steps", 1, "--k", 8))
    told = capsys.readouterr().out
    assert "differs in 2 others" in told
    assert "over the first 64 of its 64 tokens but 2" in told
    for stage in ("stage2", "live"):
        first = [row for row in make.history(world / stage, "eval") if row["step"] == 0][0]
        assert first["own_ce"] >= first["ce"]
    weights = load_file(world / "stage2/best/model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_a_teacher_that_is_another_in_the_rows_tokens_is_refused_without_a_circle(world):
    """To prepare with the teacher's tokenizer, as a message said, had the student refused."""
    rename(world / "teacher", data.Dataset(world / "data").used()[-1])
    for main, argv in ((dump_logits.main, make.dump(world)), (stage2_kd.main, make.live(world))):
        code, words = make.ends(main, *argv)
        assert code == 1 and "has another tokenizer" in words and "--answers teacher" in words
        assert f"--tokenizer {world}/data/tokenizer" in words


def test_answers_of_a_teacher_with_a_few_more_tokens(world, tmp_path, capsys):
    rows = [{"prompt": f"w{i} w{i + 1}", "completion": "w1"} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    argv = ["--source", tmp_path / "rows.jsonl", "--tokenizer", world / "student", "--workers", 1]
    argv += ["--answers", "teacher", "--teacher", world / "teacher", "--out", tmp_path / "told"]
    argv += ["--max-new-tokens", 3, "--keep-truncated", "--val", 0, "--device", "cpu"]
    make.call(prepare_data.main, *argv)
    assert data.Dataset(tmp_path / "told").train.targets


def test_the_mass_of_what_is_left_out_is_in_own_ce():
    made = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 5, generator=made) for n in (3, 9))
    head = Head(weight, None, 7, apart=torch.tensor([2]))
    z = next(head.chunks(hidden))[1].logsumexp(1)
    beyond = next(head.beyond().chunks(hidden))[1].logsumexp(1)
    torch.testing.assert_close(torch.logaddexp(z, beyond), (hidden @ weight.t()).logsumexp(1))


def test_a_soft_cap_does_not_bring_back_what_is_left_out_of_a_tail():
    one = torch.ones(1)
    shape = Basis(torch.zeros(5), torch.zeros(1, 5), one, one, one, one, 4.0, torch.tensor([2]))
    assert (shape.logits(torch.ones(1, 1)) == torch.tensor([[0, 0, -1e9, 0, 0]])).all()
