"""What other tools find in best/: every file they read, the end of an answer, and weights that
another user may read."""

import os
import re
import stat
from pathlib import Path

import make
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import stage1_sft
from lib import checkpoints, files, models

TEXT = (Path(__file__).parents[2] / "docs" / "deploy.md").read_text(encoding="utf-8")
FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "checksums.json",
    "README.md",
}


def trained(folder, umask, *more):
    """Return best/ and final/ of one step of stage 1, made under a umask."""
    before = os.umask(umask)
    try:
        make.call(stage1_sft.main, *make.stage1(make.world(folder), "--steps", 1, *more))
    finally:
        os.umask(before)
    return folder / "stage1" / "best", folder / "stage1" / "final"


@pytest.fixture(scope="module")
def best(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("open"), 0o022)[0]


def test_best_holds_every_file_that_is_read_elsewhere(best):
    assert {path.name for path in best.iterdir()} == FILES
    assert all(name in TEXT for name in FILES), "docs/deploy.md names them"


def test_the_end_of_an_answer_stands_where_each_tool_looks_for_it(best):
    ours, config = (
        make.tokenizer(),
        files.read_json(best / "generation_config.json"),
    )  # transformers, vLLM, TRL
    tokens = files.read_json(
        best / "tokenizer_config.json"
    )  # llama.cpp's converter: this one, and the template, go into the GGUF file
    assert (
        ours.eos_token_id in config["eos_token_id"] and config["pad_token_id"] == ours.pad_token_id
    )
    assert tokens["eos_token"] == ours.eos_token and tokens["pad_token"] == ours.pad_token
    assert (best / "chat_template.jinja").read_text(encoding="utf-8") == ours.chat_template


@pytest.mark.parametrize(
    "umask, mode, more",
    ((0o022, 0o644, ()), (0o027, 0o640, ("--lora-rank", 2)), (0o077, 0o600, ())),
)
def test_a_server_of_another_user_may_read_the_weights_where_the_umask_says_so(
    tmp_path, umask, mode, more
):
    """safetensors writes its files for their owner alone, whatever the umask."""
    for folder in trained(tmp_path, umask, *more):
        assert {path.name: oct(stat.S_IMODE(path.stat().st_mode)) for path in folder.iterdir()} == {
            path.name: oct(mode) for path in folder.iterdir()
        }


ROPES = (
    {"rope_type": "default", "rope_theta": 12345.0},
    {
        "rope_type": "llama3",
        "rope_theta": 12345.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
)


@pytest.mark.parametrize("rope", ROPES)
def test_readers_of_the_older_fields_find_them_and_transformers_5_reads_the_same_model(
    tmp_path, rope
):
    """mlx-lm 0.32 and transformers 4.57 know neither rope_parameters nor TokenizersBackend; both
    take a rope_theta of 10,000 and say nothing."""
    student, best, prompt = (
        make.model(tmp_path / "student", rope_parameters=rope),
        tmp_path / "best",
        torch.arange(4, 44)[None],
    )
    checkpoints.save(models.load(str(student), torch.device("cpu")).module, make.tokenizer(), best)
    config = files.read_json(best / "config.json")
    assert config["rope_theta"] == 12345.0 and config.get("rope_scaling") == (
        None if rope["rope_type"] == "default" else rope
    )
    assert (
        files.read_json(best / "tokenizer_config.json")["tokenizer_class"]
        == "PreTrainedTokenizerFast"
    )
    before, after = (
        AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (student, best)
    )
    assert after.config.rope_parameters == before.config.rope_parameters == rope
    with torch.no_grad():
        assert torch.equal(after(prompt).logits, before(prompt).logits)
    assert (
        AutoTokenizer.from_pretrained(best)("w1 w2 w3")["input_ids"]
        == make.tokenizer()("w1 w2 w3")["input_ids"]
    )


def test_a_model_whose_kinds_of_layers_turn_differently_keeps_its_fields(tmp_path):
    config = {
        "rope_parameters": {
            "full_attention": {"rope_theta": 1e6},
            "sliding_attention": {"rope_theta": 1e4},
        }
    }
    files.write_json(tmp_path / "config.json", config)
    files.write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": "Qwen2Tokenizer"})
    checkpoints.for_other_readers(tmp_path)
    assert files.read_json(tmp_path / "config.json") == config
    assert files.read_json(tmp_path / "tokenizer_config.json") == {
        "tokenizer_class": "Qwen2Tokenizer"
    }


def test_the_lines_for_trl_are_python():
    """TRL itself is not among the tests' packages: its lines were run by hand; what can be held
    here is that they are Python."""
    (lines,) = (
        block for block in re.findall(r"```\n(.*?)```", TEXT, re.S) if "DPOTrainer" in block
    )
    compile(lines, "docs/deploy.md", "exec")
