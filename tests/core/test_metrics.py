"""The measures on held-out targets against references: transformers' own loss, float64 over all
tokens, an example by hand."""

import copy
import json
import types

import make
import numpy as np
import pytest
import torch
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM

import dump_logits
import stage1_sft
import stage2_kd
from lib import data, evaluate, files, losses, models
from lib.head import topk_and_tails
from lib.options import ranks
from lib.teacher import live

CPU, DOUBLE = torch.device("cpu"), torch.float64


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Return a world whose val rows take turns between two sources, general and finance."""
    return make.sourced(make.world(tmp_path_factory.mktemp("world"), rows=40, val=13))


@pytest.fixture(scope="module")
def val(world):
    return data.Dataset(world / "data").val


@pytest.fixture(scope="module")
def pair(world):
    """Return student and teacher in float64."""
    return [models.load(str(world / name), CPU, DOUBLE) for name in ("student", "teacher")]


def beside(teacher, k=0):
    """Return what evaluate asks of a store, with a teacher that is there whole, or as its top k and
    a bucket."""

    def val_at(batch, temperature):
        hidden, head = teacher.hidden(batch), teacher.head()
        if not k:
            return losses.Whole(hidden, head)
        ((_, z),) = head.chunks(hidden)
        ids, gap, tails = topk_and_tails(z, k, [temperature])
        return losses.TopK(ids, gap, tails[:, 0])

    return types.SimpleNamespace(compares=True, val_at=torch.no_grad()(val_at))


def logp(folder, split, rows):
    """Return log-probabilities (targets of rows, V) in float64, by transformers alone, a row at a
    time."""
    module, out = AutoModelForCausalLM.from_pretrained(folder, dtype=DOUBLE).eval(), []
    for row in rows:
        ids, answer = (torch.from_numpy(part.astype(np.int64)) for part in split.row(row))
        with torch.no_grad():
            out.append(
                module(input_ids=ids[None]).logits[0, answer.nonzero()[:, 0] - 1].log_softmax(1)
            )
    return torch.cat(out)


def with_rows(split, order):
    """Return a split that holds these of its rows, in this order."""
    made = copy.copy(split)
    made.rows = split.rows[list(order)]
    made.rows["first_target"] = np.cumsum(made.rows["targets"]) - made.rows["targets"]
    return made


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
def test_perplexity_is_that_of_transformers_own_loss(world, val, dtype):
    module, total = (
        AutoModelForCausalLM.from_pretrained(world / "student", dtype=DOUBLE).eval(),
        0.0,
    )
    for row in range(13):
        ids, answer = (torch.from_numpy(part.astype(np.int64))[None] for part in val.row(row))
        with torch.no_grad():
            total += (
                module(input_ids=ids, labels=ids.masked_fill(answer == 0, -100)).loss.item()
                * answer.sum().item()
            )
    seen = evaluate.evaluate(models.load(str(world / "student"), CPU, dtype), val, make.V, 64)
    assert seen["ppl"] == pytest.approx(
        np.exp(total / val.targets), rel=1e-6
    )  # its loss is float32 whatever the model is


@pytest.mark.parametrize("k", (0, make.V))
def test_both_kls_over_all_tokens_are_those_of_torch(world, val, pair, k):
    student, teacher = pair
    seen = evaluate.evaluate(student, val, make.V, 64, teacher=beside(teacher, k))
    logq, logp_ = (logp(world / name, val, range(13)) for name in ("student", "teacher"))
    assert seen["kl"] == pytest.approx(
        kl_div(logq, logp_, reduction="batchmean", log_target=True).item(), rel=1e-9
    )
    assert seen["rkl"] == pytest.approx(
        kl_div(logp_, logq, reduction="batchmean", log_target=True).item(), rel=1e-9
    )
    assert abs(seen["kl"] - seen["rkl"]) > 0.001, "the example must tell them apart"


def test_both_kls_of_a_model_to_itself_are_exactly_zero(val, pair):
    seen = evaluate.evaluate(pair[1], val, make.V, 64, teacher=beside(pair[1]))
    assert (seen["kl"], seen["rkl"], seen["agree"]) == (0, 0, 1)


class Said(torch.nn.Module):
    """A model that says, at each token that predicts a target, exactly the probabilities it is
    given, over 4 tokens."""

    def __init__(self, probabilities):
        super().__init__()
        self.said, self.config = torch.tensor(probabilities, dtype=DOUBLE), make.config()
        self.lm_head = torch.nn.Linear(4, 4, bias=False, dtype=DOUBLE)
        self.lm_head.weight.data = torch.eye(4, dtype=DOUBLE)

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, **_):
        return types.SimpleNamespace(last_hidden_state=self.said.log()[None, : input_ids.shape[1]])


def test_the_calibration_error_is_that_of_an_example_by_hand():
    split = data.Split.__new__(data.Split)
    split.tokens, split.answer = (
        np.array([0, 1, 1, 2, 3], np.uint32),
        np.array([0, 1, 1, 1, 1], bool),
    )
    split.rows = np.array([(0, 5, 0, 4, 0)], data.ROW)
    said = [
        [0.05, 0.9, 0.03, 0.02],  # sure at 0.90 (bin 13 of 15), and right
        [0.82, 0.1, 0.05, 0.03],  # 0.82 (bin 12), wrong: token 1 was due
        [0.24, 0.23, 0.3, 0.23],  # 0.30 (bin 4), right
        [0.21, 0.23, 0.24, 0.32],  # 0.32 (bin 4), right
        [0.25, 0.25, 0.25, 0.25],
    ]
    model = models.Model(Said(said), Said(said), None)
    seen = evaluate.evaluate(model, split, 4, 64)
    assert seen["ece"] == pytest.approx(
        (abs(0.9 - 1) + abs(0.82 - 0) + abs(0.3 + 0.32 - 2)) / 4
    )  # 0.575
    assert (
        seen["ce"] == pytest.approx(-np.log([0.9, 0.1, 0.3, 0.32]).mean()) and seen["acc1"] == 0.75
    )


@pytest.mark.parametrize("tokens", (1, 40, 4096))
@pytest.mark.parametrize(
    "order",
    (range(13), range(12, -1, -1), (7, 3, 12, 0, 5, 1, 9, 2, 11, 4, 8, 6, 10)),
    ids=("as it is", "backwards", "mixed"),
)
def test_batch_size_padding_and_row_order_change_nothing(world, val, pair, tokens, order):
    student, teacher = pair

    def measured(split, tokens):
        return evaluate.measure(
            student,
            split,
            make.V,
            tokens,
            teacher=beside(teacher, 8),
            sources=("general", "finance"),
        )

    seen, wanted = measured(with_rows(val, order), tokens), measured(val, 64)
    seen_apart, wanted_apart = seen.pop("by_source"), wanted.pop("by_source")
    assert (
        seen == pytest.approx(wanted, rel=1e-9)
        and wanted["targets"] == val.targets
        and seen_apart.keys() == wanted_apart.keys()
    )
    for name, own in seen_apart.items():
        assert own == pytest.approx(wanted_apart[name], rel=1e-9), name


def test_every_measure_of_a_source_is_that_of_its_rows_alone_and_all_sum_up_to_the_whole(val, pair):
    student, teacher = pair
    options = dict(teacher=beside(teacher, 8), sources=("general", "finance"))
    whole = evaluate.measure(student, val, make.V, 64, **options)
    parts = whole.pop("by_source")
    assert list(parts) == ["general", "finance"]
    for number, own in enumerate(parts.values()):
        assert own == pytest.approx(
            evaluate.measure(student, with_rows(val, range(number, 13, 2)), make.V, 64, **options),
            rel=1e-9,
        )
        assert own.keys() == whole.keys()
    assert sum(own["targets"] for own in parts.values()) == whole["targets"] == val.targets
    for name in ("ce", "acc1", "acc5", "kl", "rkl", "agree"):
        assert sum(
            own[name] * own["targets"] for own in parts.values()
        ) / val.targets == pytest.approx(whole[name], rel=1e-9), name
    assert parts["general"]["targets"] != parts["finance"]["targets"], (
        "a mean of means must be seen"
    )


SCRIPTS = {
    "stage1": (stage1_sft, make.stage1),
    "stage2": (stage2_kd, make.stage2),
    "live": (stage2_kd, make.live),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_eval_only_writes_what_the_contract_says(world, tmp_path, name, monkeypatch):
    script, arguments = SCRIPTS[name]
    monkeypatch.setattr(ranks.Ranks, "open", lambda *_: pytest.fail("a run was opened"))
    if name == "stage2":
        make.call(dump_logits.main, *make.dump(world, "--chunk", "val"))
    make.call(script.main, *arguments(world, "--eval-only", "--out", tmp_path / "eval"))
    assert [path.name for path in (tmp_path / "eval").iterdir()] == ["eval.json"]
    seen, student = (
        files.read_json(tmp_path / "eval/eval.json"),
        models.load(str(world / "student"), CPU),
    )
    dataset = data.Dataset(world / "data")
    store = (
        None
        if name == "stage1"
        else (
            make.store(world, None)
            if name == "stage2"
            else beside(models.load(str(world / "teacher"), CPU))
        )
    )
    wanted = evaluate.measure(
        student, dataset.val, make.V, 64, teacher=store, sources=dataset.sources
    )
    for own, due in (
        (seen, wanted),
        *(
            (seen["by_source"][source], wanted["by_source"][source])
            for source in ("general", "finance")
        ),
    ):
        for measure in due.keys() - {"by_source"}:
            assert own[measure] == pytest.approx(due[measure], rel=1e-5), measure
    assert seen["ce_finance"] == seen["by_source"]["finance"]["ce"] and ("rkl" in seen) == (
        "kl_general" in seen
    ) == (name != "stage1")
    assert seen["student"] == str(world / "student") and seen["parameters"] == student.parameters
    assert (
        seen["bytes"] == (world / "student/model.safetensors").stat().st_size
        and seen["data"] == dataset.identities["data"]
    )
    assert ({"stage1": None, "stage2": "logits", "live": "teacher"}[name] or "ce") in seen


def test_eval_only_of_stage_1_measures_a_checkpoint_as_it_is(world, tmp_path, capsys):
    (tmp_path / "config").mkdir()
    (tmp_path / "config/config.json").write_text((world / "student/config.json").read_text())
    code, said = make.ends(
        stage1_sft.main,
        *make.stage1(
            world, "--eval-only", "--student", tmp_path / "config", "--out", tmp_path / "eval"
        ),
    )
    assert code == 1 and "has no weights" in said and not (tmp_path / "eval/eval.json").exists()
    code, _ = make.ends(stage1_sft.main, *make.stage1(world, "--eval-only", "--keep-layers", "0"))
    assert code == 2 and "exclude each other" in capsys.readouterr().err


def test_log_lines_hold_no_table_and_an_older_run_goes_on_without_eval_only(
    world, tmp_path, capsys
):
    argv = make.stage1(world, "--steps", 1, "--out", tmp_path / "run")
    make.call(stage1_sft.main, *argv)
    first = make.history(tmp_path / "run", "eval")[0]
    assert "by_source" not in first and {name for name in first if "_" in name} == {
        "ce_general",
        "ce_finance",
    }
    config = json.loads((tmp_path / "run/config.json").read_text())
    del config["settings"]["eval_only"]
    files.write_json(tmp_path / "run/config.json", config)
    assert (
        make.ends(stage1_sft.main, *argv) == (0, "")
        and "already finished" in capsys.readouterr().out
    )


def test_a_live_teachers_val_measures_are_remembered_in_the_shape_that_evaluate_takes(world):
    args = stage2_kd.parse_args([str(word) for word in make.live(world, "--k", 8)])
    dataset = data.Dataset(world / "data")
    student, teacher = models.load(str(world / "student"), CPU), live.LiveTeacher(args, dataset)
    teacher.join(student, args, None)
    seen = evaluate.evaluate(student, dataset.val, make.V, 64, teacher=teacher)
    q, p = (logp(world / name, dataset.val, range(13)).exp() for name in ("student", "teacher"))
    ids = p.topk(8).indices
    p, q = (
        torch.cat([x.gather(1, ids), x.scatter(1, ids, 0).sum(1, keepdim=True)], 1) for x in (p, q)
    )
    assert seen["rkl"] == pytest.approx((q * (q / p).log()).sum(1).mean().item(), rel=1e-5)
