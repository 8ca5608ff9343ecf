"""Rows that have a class each: prepared in proportion, learnt with a head, dumped by row, distilled
by the same loss with V = classes."""

import json
import shutil

import make
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    DistilBertConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

import chat
import dump_logits
import prepare_data
import stage1_sft
import stage2_kd
from lib import data, files, losses
from lib.options import classifier
from lib.prepare import classes
from lib.teacher import logits, record

WORDS = [f"w{i}" for i in range(40)]
CPU = torch.device("cpu")


def encoder_tokenizer(words=WORDS):
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    inner = Tokenizer(
        WordLevel(
            {word: number for number, word in enumerate([*special, *words])}, unk_token="[UNK]"
        )
    )
    inner.pre_tokenizer = WhitespaceSplit()
    inner.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=64,
    )


def config(kind: str, vocab: int, width: int = 32, **more):
    if kind == "bert":
        return BertConfig(
            vocab_size=vocab,
            hidden_size=width,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=2 * width,
            max_position_embeddings=64,
            pad_token_id=0,
            **more,
        )
    if kind == "distilbert":
        return DistilBertConfig(
            vocab_size=vocab,
            dim=width,
            n_layers=2,
            n_heads=4,
            hidden_dim=2 * width,
            max_position_embeddings=64,
            **more,
        )
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=2 * width,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=3,
        **more,
    )


def rows(count: int, seed: int = 0, names=("bad", "good", "so")) -> list[dict]:
    """Return texts whose class is told by their words: w0..w9 bad, w10..w19 good, w20..w29 so; 60,
    30 and 10 in a hundred."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        label = int(rng.choice(3, p=[0.6, 0.3, 0.1]))
        own, other = (
            rng.integers(10 * label, 10 * label + 10, 3),
            rng.integers(30, 40, int(rng.integers(2, 9))),
        )
        made.append(
            {
                "text": " ".join(f"w{i}" for i in rng.permutation([*own, *other])),
                "label": names[label],
            }
        )
    return made


def prepare(folder, source, *more, tokenizer="tok", out="data"):
    make.call(
        prepare_data.main,
        "--source",
        source,
        "--tokenizer",
        folder / tokenizer,
        "--out",
        folder / out,
        "--task",
        "classify",
        *more,
    )
    return data.Dataset(folder / out)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Rows; a student's and a teacher's tokenizer that differ; the config of a small BERT; a
    teacher trained for a moment."""
    folder = tmp_path_factory.mktemp("classes")
    from lib.measure import plots

    kept, plots.prepared = plots.prepared, lambda folder: None
    pq.write_table(pa.Table.from_pylist(rows(400)), folder / "rows.parquet")
    for name, words in (("tok", WORDS), ("tok-teacher", WORDS[::-1])):
        encoder_tokenizer(words).save_pretrained(folder / name)
    for name, tok, width in (("student", "tok", 16), ("big", "tok-teacher", 32)):
        config("bert", 44, width).save_pretrained(folder / name)
        shutil.copytree(folder / tok, folder / name, dirs_exist_ok=True)
    prepare(folder, folder / "rows.parquet", "--val", "80")
    prepare(
        folder, folder / "rows.parquet", "--val", "80", tokenizer="tok-teacher", out="data-teacher"
    )
    common = (
        "--steps",
        120,
        "--tokens-per-step",
        512,
        "--tokens-per-microbatch",
        512,
        "--lr",
        "1e-2",
        "--eval-every",
        120,
        *make.CPU,
    )
    make.call(
        stage1_sft.main,
        "--data",
        folder / "data-teacher",
        "--student",
        folder / "big",
        "--out",
        folder / "teacher",
        *common,
    )
    make.call(
        stage1_sft.main,
        "--data",
        folder / "data",
        "--student",
        folder / "student",
        "--out",
        folder / "stage1",
        *("--steps", 4),
        *common[2:],
    )
    make.call(
        dump_logits.main,
        "--data",
        folder / "data",
        "--teacher",
        folder / "teacher",
        "--out",
        folder / "logits",
        *make.CPU,
    )
    plots.prepared = kept
    return folder


# --- the data


def test_quotas_are_by_largest_remainders_and_never_more_than_there_is():
    assert classes.quota(np.array([50, 30, 20]), 7).tolist() == [4, 2, 1]
    assert classes.quota(np.array([1, 3]), 10).tolist() == [1, 3]
    for total in range(0, 61, 7):
        given = classes.quota(np.array([40, 15, 5]), total)
        assert given.sum() == total and (abs(given - np.array([40, 15, 5]) * total / 60) < 1).all()


def test_train_and_val_hold_every_class_in_its_share(world):
    dataset = data.Dataset(world / "data")
    there = [np.bincount(split.labels, minlength=3) for split in (dataset.train, dataset.val)]
    assert there[1].sum() == 80
    assert np.abs(there[1] / 80 - there[0] / there[0].sum()).max() < 1 / 80 + 1e-9
    assert dataset.labels == ["bad", "good", "so"] and dataset.meta["classes"]["so"] == {
        "train": int(there[0][2]),
        "val": int(there[1][2]),
    }


def test_limit_keeps_the_shares_of_the_classes(world, tmp_path, no_picture):
    dataset = prepare(
        world, world / "rows.parquet", "--limit", "50", "--val", "0.2", out=tmp_path / "small"
    )
    whole = np.bincount(
        np.concatenate(
            [
                split.labels
                for split in (data.Dataset(world / "data").train, data.Dataset(world / "data").val)
            ]
        )
    )
    mine = np.bincount(np.concatenate([dataset.train.labels, dataset.val.labels]))
    assert mine.sum() == 50 and (abs(mine - whole * 50 / whole.sum()) < 1).all()


def test_a_batch_holds_the_row_as_it_is_tokenized_and_its_class(world):
    dataset = data.Dataset(world / "data")
    batch = dataset.train.batch([[3], [7]])
    texts = pq.read_table(world / "data/train.texts.parquet").to_pylist()
    tokenizer = AutoTokenizer.from_pretrained(world / "tok")
    for line, row in enumerate((3, 7)):
        assert (
            batch.tokens[line][batch.row_of[line] >= 0].tolist()
            == tokenizer(texts[row]["text"])["input_ids"]
        )
        assert dataset.labels[batch.labels[line]] == texts[row]["label"]
    assert batch.numbers.tolist() == [3, 7] and len(batch.labels) == 2


def test_a_text_that_comes_twice_is_on_one_side_only_whatever_its_label(
    tmp_path, world, no_picture
):
    made = rows(60)
    pq.write_table(
        pa.Table.from_pylist(made + [row | {"label": "so"} for row in made]),
        tmp_path / "twice.parquet",
    )
    dataset = prepare(world, tmp_path / "twice.parquet", "--val", "20", out=tmp_path / "twice")
    sides = [
        set(pq.read_table(dataset.folder / f"{side}.texts.parquet")["text"].to_pylist())
        for side in ("train", "val")
    ]
    assert not sides[0] & sides[1] and dataset.meta["dropped"]["duplicate"] >= 60


def test_numbers_take_the_names_that_the_file_declares_and_else_their_own_order(
    tmp_path, world, no_picture
):
    made = [
        {"sentence": row["text"], "label": -1 if number == 5 else number % 3}
        for number, row in enumerate(rows(60))
    ]  # -1: held back
    table = pa.Table.from_pylist(made)
    features = {
        "info": {"features": {"label": {"names": ["zero", "one", "two"], "_type": "ClassLabel"}}}
    }
    pq.write_table(
        table.replace_schema_metadata({"huggingface": json.dumps(features)}),
        tmp_path / "named.parquet",
    )
    assert prepare(world, tmp_path / "named.parquet", out=tmp_path / "named").labels == [
        "zero",
        "one",
        "two",
    ]
    pq.write_table(
        pa.table(
            {
                "text": [row["text"] for row in rows(60)],
                "label": [(2, 10, 1)[i % 3] for i in range(60)],
            }
        ),
        tmp_path / "plain.parquet",
    )
    assert prepare(world, tmp_path / "plain.parquet", out=tmp_path / "plain").labels == [
        "1",
        "2",
        "10",
    ]


def test_a_long_row_is_cut_and_keeps_its_last_special_token(tmp_path, world, no_picture):
    pq.write_table(pa.Table.from_pylist(rows(60)), tmp_path / "rows.parquet")
    dataset = prepare(world, tmp_path / "rows.parquet", "--max-len", "6", out=tmp_path / "short")
    ends = {int(dataset.train.row(row)[0][-1]) for row in range(len(dataset.train.rows))}
    assert dataset.train.rows["length"].max() == 6 and ends == {3}


# --- the model and its loss


@pytest.mark.parametrize("kind", ["bert", "distilbert", "llama"])
def test_the_logits_of_a_row_are_those_of_plain_transformers_alone(kind, world, tmp_path):
    dataset = data.Dataset(world / "data")
    torch.manual_seed(0)
    made = AutoModelForSequenceClassification.from_config(
        config(kind, 44, num_labels=3, id2label=dict(enumerate(["so", "bad", "good"])))
    )
    made.save_pretrained(tmp_path / "model")
    model = classifier.load(str(tmp_path / "model"), CPU, dataset=dataset)
    batch = dataset.val.batch([[row] for row in range(9)])
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        ours = model.hidden(batch)
        for row in range(9):
            ids = torch.from_numpy(dataset.val.row(row)[0].astype(np.int64))[None]
            torch.testing.assert_close(
                ours[row], plain(input_ids=ids).logits[0][[1, 2, 0]], rtol=1e-4, atol=1e-5
            )  # in the data's order


def test_the_loss_is_that_of_torch_over_the_classes(world):
    dataset = data.Dataset(world / "data")
    model = classifier.load(str(world / "stage1"), CPU, dataset=dataset)
    store = logits.Records(world / "logits", dataset, 2.0)
    batch = dataset.train.batch([[row] for row in range(12)])
    z = model.hidden(batch).detach().double().requires_grad_()
    loss, ce, _ = losses.head_loss(
        z, model.head(), batch.labels, store.at(batch, 2.0), losses.Method(0.7, 2.0)
    )
    loss.backward()
    teacher = classifier.load(
        str(world / "teacher"),
        CPU,
        dataset=dataset,
        rows=[
            data.retokenized(
                dataset.folder, name, AutoTokenizer.from_pretrained(world / "tok-teacher"), 64
            )
            for name in ("train", "val")
        ],
    )
    view = data.retokenized(
        dataset.folder, "train", AutoTokenizer.from_pretrained(world / "tok-teacher"), 64
    )
    with torch.no_grad():
        p = (teacher.hidden(view.batch([[row] for row in range(12)])).double() / 2).softmax(-1)
    s = z.detach().clone().requires_grad_()
    plain = 0.3 * torch.nn.functional.cross_entropy(s, batch.labels, reduction="sum")
    plain = plain + 0.7 * 4 * torch.nn.functional.kl_div(
        (s / 2).log_softmax(-1), p, reduction="sum"
    )
    plain.backward()
    assert loss.item() == pytest.approx(plain.item(), rel=2e-3)  # gaps are float16
    torch.testing.assert_close(z.grad, s.grad, rtol=5e-3, atol=2e-3)


def test_a_teacher_of_another_tokenizer_is_dumped_by_row(world):
    dataset = data.Dataset(world / "data")
    assert (
        dataset.identities["vocabulary"]
        != data.Dataset(world / "data-teacher").identities["vocabulary"]
    )
    records = np.load(world / "logits/val/topk.npy")
    assert (
        len(records) == 80
        and record.unpack(records, 3, 0).ids.sort().values.tolist() == [[0, 1, 2]] * 80
    )
    plain = AutoModelForSequenceClassification.from_pretrained(world / "teacher/best").eval()
    tokenizer = AutoTokenizer.from_pretrained(world / "teacher/best")
    for row, text in enumerate(
        pq.read_table(world / "data/val.texts.parquet")["text"].to_pylist()[:10]
    ):
        with torch.no_grad():
            z = plain(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).logits[0]
        kept = record.unpack(records[row : row + 1], 3, 0)
        seen = torch.empty(3).scatter_(0, kept.ids[0], -kept.gap[0])
        torch.testing.assert_close(seen, z - z.max(), rtol=2e-3, atol=2e-3)


def test_a_teacher_whose_labels_come_in_another_order_is_put_right(world, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(world / "teacher/best")
    order = [2, 0, 1]
    with torch.no_grad():
        model.classifier.weight.copy_(model.classifier.weight[order].clone())
        model.classifier.bias.copy_(model.classifier.bias[order].clone())
    names = ["bad", "good", "so"]
    model.config.id2label = {i: names[n].upper() for i, n in enumerate(order)}
    model.config.label2id = {name: i for i, name in model.config.id2label.items()}
    model.save_pretrained(tmp_path / "teacher")
    AutoTokenizer.from_pretrained(world / "teacher/best").save_pretrained(tmp_path / "teacher")
    make.call(
        dump_logits.main,
        "--data",
        world / "data",
        "--teacher",
        tmp_path / "teacher",
        "--out",
        tmp_path / "logits",
        "--chunk",
        "val",
        *make.CPU,
    )
    assert np.array_equal(
        np.load(tmp_path / "logits/val/topk.npy"), np.load(world / "logits/val/topk.npy")
    )


# --- the pipeline


def test_stage_2_brings_the_student_nearer_to_its_teacher_and_plain_transformers_reads_it(
    world, tmp_path
):
    make.call(
        stage2_kd.main,
        "--data",
        world / "data",
        "--logits",
        world / "logits",
        "--student",
        world / "stage1",
        "--out",
        tmp_path / "stage2",
        "--steps",
        80,
        "--tokens-per-step",
        512,
        "--lr",
        "2e-2",
        "--eval-every",
        80,
        *make.CPU,
    )
    evals = make.history(tmp_path / "stage2", "eval")
    assert evals[-1]["kl"] < 0.5 * evals[0]["kl"] and evals[-1]["acc1"] > evals[0]["acc1"]
    assert "ppl" not in evals[0] and evals[0]["macro_f1"] <= 1
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "stage2/best")
    assert plain.config.id2label == {0: "bad", 1: "good", 2: "so"}
    assert "text-classification" in (tmp_path / "stage2/best/README.md").read_text()


def test_eval_only_writes_what_scikit_learn_says(world, tmp_path):
    from sklearn import metrics

    make.call(
        stage2_kd.main,
        "--data",
        world / "data",
        "--logits",
        world / "logits",
        "--student",
        world / "stage1",
        "--out",
        tmp_path / "eval",
        "--eval-only",
        *make.CPU,
    )
    seen, dataset = files.read_json(tmp_path / "eval/eval.json"), data.Dataset(world / "data")
    model = classifier.load(str(world / "stage1"), CPU, dataset=dataset)
    with torch.no_grad():
        predicted = model.hidden(dataset.val.batch([[row] for row in range(80)])).argmax(-1).numpy()
    wanted = dataset.val.labels
    assert seen["accuracy"] == pytest.approx(metrics.accuracy_score(wanted, predicted))
    assert seen["macro_f1"] == pytest.approx(
        metrics.f1_score(wanted, predicted, average="macro", zero_division=0)
    )
    assert (
        seen["confusion"] == metrics.confusion_matrix(wanted, predicted, labels=range(3)).tolist()
    )
    assert seen["labels"] == ["bad", "good", "so"] and seen["per_class"]["so"]["support"] == int(
        (wanted == 2).sum()
    )


def test_killed_and_run_again_gives_the_same_weights(world, tmp_path):
    argv = [
        "--data",
        world / "data",
        "--logits",
        world / "logits",
        "--student",
        world / "stage1",
        "--steps",
        8,
        "--tokens-per-step",
        128,
        "--save-every",
        3,
        "--lr",
        "1e-3",
        *make.CPU,
    ]
    make.call(stage2_kd.main, *argv, "--out", tmp_path / "straight")
    process = make.processes().Process(
        target=make.script,
        args=(
            "stage2_kd",
            [*map(str, argv), "--out", str(tmp_path / "killed")],
            tmp_path / "log",
            {"where": "lib.train.update", "number": 6, "signal": 9},
        ),
    )
    process.start()
    process.join()
    assert process.exitcode == -9 and (tmp_path / "killed/last").exists()
    make.call(stage2_kd.main, *argv, "--out", tmp_path / "killed")
    assert (tmp_path / "killed/final/model.safetensors").read_bytes() == (
        tmp_path / "straight/final/model.safetensors"
    ).read_bytes()


def test_a_dump_killed_midway_goes_on_to_the_same_bytes(world, tmp_path):
    argv = [
        "--data",
        world / "data",
        "--teacher",
        world / "teacher",
        "--tokens-per-microbatch",
        64,
        *make.CPU,
    ]
    make.call(dump_logits.main, *argv, "--out", tmp_path / "straight")
    hook = {"where": "lib.teacher.writer.teacher_records", "number": 9, "signal": 9}
    process = make.processes().Process(
        target=make.script,
        args=(
            "dump_logits",
            [*map(str, argv), "--out", str(tmp_path / "killed")],
            tmp_path / "log",
            hook,
        ),
    )
    process.start()
    process.join()
    assert process.exitcode == -9 and not (tmp_path / "killed/chunk-0000/meta.json").exists()
    make.call(dump_logits.main, *argv, "--out", tmp_path / "killed")
    for part in ("chunk-0000", "val"):
        assert (tmp_path / f"killed/{part}/topk.npy").read_bytes() == (
            tmp_path / f"straight/{part}/topk.npy"
        ).read_bytes()


def test_layers_of_an_encoder_can_be_kept(world, tmp_path):
    make.call(
        stage1_sft.main,
        "--data",
        world / "data-teacher",
        "--student",
        world / "teacher",
        "--out",
        tmp_path / "cut",
        "--keep-layers",
        "1",
        "--steps",
        1,
        *make.CPU,
    )
    assert files.read_json(tmp_path / "cut/best/config.json")["num_hidden_layers"] == 1


# --- what a user may get wrong


@pytest.mark.parametrize(
    "table, seen",
    [
        ({"text": ["a b", "c d"], "label": ["x", "x"]}, "'x' alone"),
        ({"text": ["a b", "c d"], "label": [1.5, 2.0]}, "type double"),
        (
            {"text": ["a b", "c d"], "label": ["", None]},
            "no row is left; saw 2 rows, dropped: no label 2",
        ),
        ({"text": ["a b", "c d"], "topic": ["x", "y"]}, "columns text, topic"),
    ],
)
def test_rows_that_cannot_be_learnt_are_one_line(table, seen, world, tmp_path):
    pq.write_table(pa.table(table), tmp_path / "rows.parquet")
    code, words = make.ends(
        prepare_data.main,
        "--source",
        tmp_path / "rows.parquet",
        "--tokenizer",
        world / "tok",
        "--out",
        tmp_path / "data",
        "--task",
        "classify",
    )
    assert code == 1 and words.count("\n") == 0 and seen in words, words
    assert [path.name for path in tmp_path.iterdir()] == ["rows.parquet"]


def test_a_teacher_without_a_trained_head_is_refused(world, tmp_path):
    code, words = make.ends(
        dump_logits.main,
        "--data",
        world / "data",
        "--teacher",
        world / "big",
        "--out",
        tmp_path / "logits",
        *make.CPU,
    )
    assert code == 1 and "no classification head" in words and "stage1_sft.py" in words
    torch.manual_seed(0)
    config("llama", 44).architectures = None
    make.model(tmp_path / "lm", vocab=44, with_tokenizer=encoder_tokenizer())
    code, words = make.ends(
        dump_logits.main,
        "--data",
        world / "data",
        "--teacher",
        tmp_path / "lm",
        "--out",
        tmp_path / "logits",
        *make.CPU,
    )
    assert code == 1 and "no classification head" in words


def test_a_teacher_of_other_labels_is_refused(world, tmp_path):
    shutil.copytree(world / "teacher/best", tmp_path / "teacher")
    meta = files.read_json(tmp_path / "teacher/config.json")
    files.write_json(
        tmp_path / "teacher/config.json",
        meta | {"id2label": {"0": "bad", "1": "good", "2": "ugly"}},
    )
    code, words = make.ends(
        dump_logits.main,
        "--data",
        world / "data",
        "--teacher",
        tmp_path / "teacher",
        "--out",
        tmp_path / "logits",
        *make.CPU,
    )
    assert code == 1 and "ugly" in words and "so" in words and words.count("\n") == 0


def test_a_student_of_other_labels_gets_a_new_head_and_says_so(world, tmp_path, capsys):
    shutil.copytree(world / "stage1/best", tmp_path / "other")
    meta = files.read_json(tmp_path / "other/config.json")
    files.write_json(
        tmp_path / "other/config.json",
        meta | {"id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": {"a": 0, "b": 1, "c": 2}},
    )
    make.call(
        stage1_sft.main,
        "--data",
        world / "data",
        "--student",
        tmp_path / "other",
        "--out",
        tmp_path / "run",
        "--steps",
        1,
        *make.CPU,
    )
    assert "a head for other labels (a, b, c)" in capsys.readouterr().out
    plain = AutoModelForSequenceClassification.from_pretrained(
        world / "stage1/best"
    ).classifier.weight
    new = classifier.load(
        str(tmp_path / "other"), CPU, dataset=data.Dataset(world / "data")
    ).module.classifier.weight
    assert (
        new - plain
    ).abs().max() > 1e-3 and new.std() < 0.1  # and not the old one under new names


@pytest.mark.parametrize(
    "own, wanted, order",
    [
        (["b", "a"], ["a", "b"], [1, 0]),
        (["B", "a"], ["a", "b"], [1, 0]),
        (["A", "a"], ["a", "A"], [1, 0]),
        (["A", "a"], ["a", "b"], None),
        (["LABEL_0", "LABEL_1"], ["x", "y"], [0, 1]),
        (["LABEL_1", "LABEL_0"], ["x", "y"], None),
        (["a", "b", "c"], ["a", "b"], None),
    ],
)
def test_labels_are_matched_by_name(own, wanted, order):
    assert classifier.matched(own, wanted) == order


def test_names_of_labels_may_be_numbers_and_count_from_one(tmp_path):
    files.write_json(
        tmp_path / "config.json",
        {
            "architectures": ["XForSequenceClassification"],
            "id2label": {"2": 20, "1": True, "10": "x"},
        },
    )
    assert classifier.own_labels(tmp_path) == ["True", "20", "x"]


def test_a_random_teacher_is_told_before_training(world, tmp_path, capsys):
    torch.manual_seed(3)
    made = AutoModelForSequenceClassification.from_config(
        config("bert", 44, num_labels=3, id2label=dict(enumerate(["bad", "good", "so"])))
    )
    made.save_pretrained(tmp_path / "random")
    AutoTokenizer.from_pretrained(world / "tok-teacher").save_pretrained(tmp_path / "random")
    make.call(
        dump_logits.main,
        "--data",
        world / "data",
        "--teacher",
        tmp_path / "random",
        "--out",
        tmp_path / "logits",
        *make.CPU,
    )
    make.call(
        stage2_kd.main,
        "--data",
        world / "data",
        "--logits",
        tmp_path / "logits",
        "--student",
        world / "stage1",
        "--out",
        tmp_path / "run",
        "--steps",
        1,
        *make.CPU,
    )
    out = capsys.readouterr().out
    assert "WARNING: the teacher is no better than always saying 'bad'" in out


@pytest.mark.parametrize(
    "more, seen", [(("--lora-rank", "4"), "--lora-rank"), (("--teacher", "teacher"), "--teacher")]
)
def test_what_does_not_go_with_classes_is_refused(more, seen, world, tmp_path):
    more = [world / word if word == "teacher" else word for word in more]
    source = [] if "--teacher" in more else ["--logits", world / "logits"]
    code, words = make.ends(
        stage2_kd.main,
        "--data",
        world / "data",
        *source,
        "--student",
        world / "stage1",
        "--out",
        tmp_path / "run",
        *more,
        *make.CPU,
    )
    assert code == 1 and seen in words and "rows with a class each" in words


def test_a_classifier_whose_config_asks_for_fewer_layers_than_its_weights_hold_is_refused(
    world, tmp_path
):
    folder = shutil.copytree(world / "stage1/best", tmp_path / "fewer")
    told = files.read_json(folder / "config.json")
    files.write_json(folder / "config.json", told | {"num_hidden_layers": 1})
    (folder / "checksums.json").unlink()
    code, words = make.ends(
        stage1_sft.main,
        "--data",
        world / "data",
        "--student",
        folder,
        "--out",
        tmp_path / "run",
        *make.CPU,
    )
    assert code == 1 and "config.json gives no place" in words and ".layer.1." in words


def test_a_language_model_is_no_student_of_the_data_of_another_task(world, tmp_path):
    make.dataset(tmp_path / "data")
    code, words = make.ends(
        stage1_sft.main,
        "--data",
        tmp_path / "data",
        "--student",
        world / "stage1",
        "--out",
        tmp_path / "run",
        *make.CPU,
    )
    assert code == 1 and words.count("\n") == 0
    code, _ = make.ends(
        prepare_data.main,
        "--source",
        world / "rows.parquet",
        "--tokenizer",
        world / "tok",
        "--out",
        tmp_path / "x",
        "--task",
        "classify",
        "--think",
        "drop",
    )
    assert code == 2


def test_a_teacher_of_another_tokenizer_is_measured_on_the_same_rows(world, tmp_path):
    make.call(
        stage1_sft.main,
        "--data",
        world / "data",
        "--student",
        world / "teacher",
        "--out",
        tmp_path / "eval",
        "--eval-only",
        *make.CPU,
    )
    seen, dumped = (
        files.read_json(tmp_path / "eval/eval.json"),
        files.read_json(world / "logits/val/meta.json"),
    )
    assert (
        seen["ce"] == pytest.approx(dumped["teacher_ce"], abs=1e-5)
        and seen["accuracy"] == dumped["teacher_acc1"]
    )
    make.call(
        stage1_sft.main,
        "--data",
        world / "data",
        "--student",
        world / "teacher",
        "--out",
        tmp_path / "small",
        "--eval-only",
        "--tokens-per-microbatch",
        4,
        *make.CPU,
    )  # room for no row: it is made, and no row is cut
    assert files.read_json(tmp_path / "small/eval.json")["ce"] == pytest.approx(
        seen["ce"], abs=1e-5
    )
    code, words = make.ends(
        dump_logits.main,
        "--data",
        world / "data",
        "--teacher",
        world / "teacher",
        "--out",
        tmp_path / "cut",
        "--tokens-per-microbatch",
        4,
        *make.CPU,
    )
    assert code == 1 and "the longest row does not fit" in words
    code, words = make.ends(
        stage1_sft.main,
        "--data",
        world / "data",
        "--student",
        world / "student",
        "--out",
        tmp_path / "none",
        "--eval-only",
        *make.CPU,
    )
    assert code == 1 and "cannot be measured" in words
    make.call(
        stage2_kd.main,
        "--data",
        world / "data",
        "--logits",
        world / "logits",
        "--student",
        world / "teacher",
        "--out",
        tmp_path / "with",
        "--eval-only",
        *make.CPU,
    )
    assert files.read_json(tmp_path / "with/eval.json")["kl"] == pytest.approx(0, abs=1e-5)


def test_chat_says_the_classes_of_a_text_and_of_a_file(world, tmp_path, capsys):
    make.call(chat.main, "--ckpt", world / "teacher", "--prompt", "w12 w15 w33 w18", *make.CPU)
    assert capsys.readouterr().out.splitlines()[-1].startswith("good 0.9")
    with pytest.raises(SystemExit):
        make.call(
            chat.main,
            "--ckpt",
            world / "teacher",
            "--prompt",
            "w1",
            "--system",
            "be kind",
            *make.CPU,
        )
    (tmp_path / "texts.jsonl").write_text('{"prompt": "w1 w2 w3"}\n{"prompt": "w22 w25 w31 w27"}\n')
    make.call(
        chat.main,
        "--ckpt",
        world / "teacher",
        "--prompts",
        tmp_path / "texts.jsonl",
        "--out",
        tmp_path / "new/out.jsonl",
        *make.CPU,
    )
    lines = [json.loads(line) for line in (tmp_path / "new/out.jsonl").read_text().splitlines()]
    assert [line["answer"] for line in lines] == ["bad", "so"] and sum(
        lines[0]["p"].values()
    ) == pytest.approx(1, abs=1e-4)
    code, words = make.ends(
        chat.main,
        "--ckpt",
        world / "teacher",
        "--score",
        tmp_path / "texts.jsonl",
        "--out",
        tmp_path / "x.jsonl",
        *make.CPU,
    )
    assert code == 1 and "--eval-only" in words


def test_a_temperature_that_was_not_dumped_is_exact_all_the_same(world):
    dataset = data.Dataset(world / "data")
    batch = dataset.train.batch([[row] for row in range(9)])
    kept = logits.Records(world / "logits", dataset, (4.0, 2.5)).at(batch, 3.0)
    one = logits.Records(world / "logits", dataset, 1.0).at(batch, 1.0)
    plain = losses.teacher_logp(one, 1.0)[:, :-1].double()  # in the order of one.ids
    torch.testing.assert_close(
        losses.teacher_logp(kept, 3.0)[:, :-1].double(),
        (plain / 3).log_softmax(-1),
        rtol=0,
        atol=1e-5,
    )


def test_layers_that_are_unlike_others_cannot_take_their_place(world, tmp_path):
    from transformers import ModernBertConfig

    torch.manual_seed(0)
    made = AutoModelForSequenceClassification.from_config(
        ModernBertConfig(
            vocab_size=44,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            max_position_embeddings=64,
            pad_token_id=0,
            num_labels=3,
            id2label=dict(enumerate(["bad", "good", "so"])),
        )
    )
    made.save_pretrained(tmp_path / "model")
    dataset = data.Dataset(world / "data")
    classifier.load(str(tmp_path / "model"), CPU, dataset=dataset, keep_layers=[0, 2])
    with pytest.raises(SystemExit, match="not alike"):
        classifier.load(str(tmp_path / "model"), CPU, dataset=dataset, keep_layers=[1, 2])


def test_a_class_without_a_validation_row_is_told(world, tmp_path, capsys, no_picture):
    made = rows(60) + [{"text": "w35 w36 w37", "label": "rare"}]
    pq.write_table(pa.Table.from_pylist(made), tmp_path / "rows.parquet")
    dataset = prepare(world, tmp_path / "rows.parquet", "--val", "0.2", out=tmp_path / "rare")
    none = sum(not count["val"] for count in dataset.meta["classes"].values())
    assert (
        f"{none} of {len(dataset.labels)} classes have no validation row" in capsys.readouterr().out
    )
    assert dataset.meta["classes"]["rare"] == {"train": 1, "val": 0}
