"""The whole pipeline, script after script, as a user walks it: on the demo's data made small, and on
real weights where they are."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import chat
import dump_logits
import prepare_data
import stage1_sft
import stage2_kd
from lib.measure import compare, score
from lib.prepare import demo

ROOT = Path(__file__).parents[2]
REAL = Path(
    os.environ.get("REAL_MODELS", "real")
)  # made by ../shared/real_models.py: smollm2, and stdlib.parquet beside it
TRAIN = [
    "--lr",
    "3e-3",
    "--tokens-per-step",
    "1024",
    "--samples",
    "1",
    "--sample-tokens",
    "8",
    "--warmup",
    "0.05",
    "--device",
    "cpu",
]


def last_eval(run: Path) -> dict:
    return [
        line
        for line in map(json.loads, (run / "history.jsonl").read_text().splitlines())
        if line["event"] == "eval"
    ][-1]


def stage1_flags(out):
    return [
        "--data",
        str(out / "data-student"),
        "--student",
        str(out / "demo/student-config"),
        "--out",
        str(out / "stage1"),
        "--steps",
        "20",
        *TRAIN,
    ]


def dump_flags(out):
    return [
        "--data",
        str(out / "data-student"),
        "--teacher",
        str(out / "teacher"),
        "--student",
        str(out / "demo/student-config"),
        "--out",
        str(out / "logits"),
    ]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """Walk it once: demo data -> teacher -> stage 1 -> logits -> stage 2 -> evaluation ->
    answers."""
    out = tmp_path_factory.mktemp("pipeline")

    def at(name):
        return str(out / name)

    demo.main(
        ["--out", at("demo"), "--teacher-rows", "600", "--student-rows", "150", "--seed", "1"]
    )
    for name in ("teacher", "student"):
        prepare_data.main(
            [
                "--source",
                at(f"demo/{name}.parquet"),
                "--tokenizer",
                at("demo/tokenizer"),
                "--out",
                at(f"data-{name}"),
                "--val",
                "30",
                "--rows-per-chunk",
                "50",
            ]
        )
    stage1_sft.main(
        [
            "--data",
            at("data-teacher"),
            "--student",
            at("demo/teacher-config"),
            "--out",
            at("teacher"),
            "--steps",
            "60",
            *TRAIN,
        ]
    )
    stage1_sft.main(stage1_flags(out))
    dump_logits.main(dump_flags(out))
    student = ["--data", at("data-student"), "--logits", at("logits")]
    stage2_kd.main(
        [*student, "--student", at("stage1"), "--out", at("stage2"), "--steps", "30", *TRAIN]
    )
    for name in ("teacher", "stage2"):
        stage2_kd.main(
            [*student, "--student", at(name), "--out", at(f"{name}-eval"), "--eval-only"]
        )
        chat.main(
            [
                "--ckpt",
                at(name),
                "--prompts",
                at("data-student/val.prompts.jsonl"),
                "--out",
                at(f"{name}-eval/answers.jsonl"),
                "--greedy",
                "--max-new-tokens",
                "20",
            ]
        )
    return out


def test_stage_2_brings_the_student_nearer_to_its_teacher(pipeline):
    lines = [
        json.loads(line) for line in (pipeline / "stage2/history.jsonl").read_text().splitlines()
    ]
    evals = [line for line in lines if line["event"] == "eval"]
    assert evals[-1]["kl"] < 0.8 * evals[0]["kl"] and evals[-1]["ce"] < evals[0]["ce"]


def test_stage_2_starts_where_stage_1_ended(pipeline):
    first = json.loads((pipeline / "stage2/history.jsonl").read_text().splitlines()[0])
    assert first["ce"] == pytest.approx(last_eval(pipeline / "stage1")["ce"], abs=1e-5)


def test_one_record_per_target_of_the_chunk_is_on_disk(pipeline):
    rows = np.load(pipeline / "data-student/train.rows.npy")
    records = np.load(pipeline / "logits/chunk-0001/topk.npy", mmap_mode="r")
    assert (
        len(records) == rows["targets"][50:100].sum()
        and records.dtype["gap"].shape == (16,)
        and records.dtype["coef"].shape[0] > 0
    )


def test_a_run_leaves_what_the_design_promises(pipeline):
    assert {path.name for path in (pipeline / "stage2").iterdir()} >= {
        "best",
        "final",
        "history.jsonl",
        "samples.md",
        "curves.png",
        "config.json",
    }
    assert (pipeline / "stage2/best/README.md").exists() and not (pipeline / "stage2/last").exists()


def test_best_answers_in_plain_transformers_as_in_chat(pipeline):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    answers = [
        json.loads(line)
        for line in (pipeline / "stage2-eval/answers.jsonl").read_text().splitlines()
    ]
    tokenizer = AutoTokenizer.from_pretrained(pipeline / "stage2/best")
    model = AutoModelForCausalLM.from_pretrained(pipeline / "stage2/best")
    for line in answers[:5]:
        ids = tokenizer.apply_chat_template(
            line["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        made = model.generate(**ids, do_sample=False, max_new_tokens=20)[
            0, ids["input_ids"].shape[1] :
        ]
        assert tokenizer.decode(made, skip_special_tokens=True).strip() == line["answer"].strip()


def test_the_report_counts_exact_matches_and_draws_the_picture(pipeline, capsys):
    compare.main([str(pipeline), "--out", str(pipeline / "comparison")])
    made = json.loads((pipeline / "comparison.json").read_text())["models"]
    lines = [
        json.loads(line)
        for line in (pipeline / "teacher-eval/answers.jsonl").read_text().splitlines()
    ]
    right = [score.exact_match(line["reference"], line["answer"]) for line in lines]
    assert (
        made["teacher"]["exact"] == pytest.approx(np.mean(right))
        and made["teacher"]["kl"] < 1e-5
        and list(made) == ["teacher", "stage2"]
    )
    assert (
        pipeline / "comparison.png"
    ).stat().st_size > 5000 and "KL to the teacher" in capsys.readouterr().out


def test_all_of_it_runs_again_without_doing_anything(pipeline, capsys):
    with pytest.raises(SystemExit) as ended:
        stage1_sft.main(stage1_flags(pipeline))
    dump_logits.main(dump_flags(pipeline))
    assert (
        ended.value.code in (0, None) and capsys.readouterr().out.count("already finished") == 5
    )  # stage 1, three chunks, val


@pytest.mark.skipif(
    not (REAL / "smollm2/model.safetensors").exists(),
    reason="no real weights: REAL_MODELS=DIR with smollm2/ and stdlib.parquet",
)
def test_the_pipeline_on_a_real_model_and_real_data(tmp_path):
    def at(name):
        return str(tmp_path / name)

    prepare_data.main(
        [
            "--source",
            str(REAL / "stdlib.parquet"),
            "--tokenizer",
            str(REAL / "smollm2"),
            "--out",
            at("data"),
            "--limit",
            "24",
            "--val",
            "4",
            "--max-len",
            "160",
        ]
    )
    common = [
        "--data",
        at("data"),
        "--tokens-per-step",
        "512",
        "--tokens-per-microbatch",
        "512",
        "--samples",
        "0",
        "--lr",
        "5e-5",
        "--steps",
        "3",
    ]
    stage1_sft.main(
        [
            *common,
            "--student",
            str(REAL / "smollm2"),
            "--keep-layers",
            "0,10,20,29",
            "--out",
            at("stage1"),
        ]
    )
    dump_logits.main(
        [
            "--data",
            at("data"),
            "--teacher",
            str(REAL / "smollm2"),
            "--out",
            at("logits"),
            "--tokens-per-microbatch",
            "512",
        ]
    )
    stage2_kd.main(
        [*common, "--student", at("stage1"), "--logits", at("logits"), "--out", at("stage2")]
    )
    evals = [
        line
        for line in map(json.loads, (tmp_path / "stage2/history.jsonl").read_text().splitlines())
        if line["event"] == "eval"
    ]
    assert evals[-1]["kl"] < evals[0]["kl"]
    chat.main(
        [
            "--ckpt",
            at("stage2"),
            "--prompt",
            "What does `len` do?",
            "--max-new-tokens",
            "4",
            "--greedy",
        ]
    )
    assert torch.isfinite(torch.tensor(evals[-1]["ce"]))
