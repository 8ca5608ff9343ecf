"""Adapters: what is trained and what stays, the folders that are left and who reads them, resuming,
and the errors of users."""

import argparse
import shutil
import signal
import sys

import make
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import chat
import dump_logits
import stage1_sft
import stage2_kd
from lib import checkpoints, data, files, models, train
from lib import run as runs
from lib.measure import plots
from lib.options import lora
from lib.prepare import templates

CPU = torch.device("cpu")
TOKENS = torch.arange(4, 24)[None]
STAGES = ((stage1_sft, make.stage1), (stage2_kd, make.stage2))
LORA = ("--lora-rank", 4, "--steps", 6)
FAST = (*LORA, "--lr", 0.05)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(plots, "curves", lambda *_: None)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Return a world with a dump, and one stage 1 twice: `adapter`, and `merged` with --merge."""
    folder = make.world(tmp_path_factory.mktemp("world"))
    make.call(dump_logits.main, *make.dump(folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "curves", lambda *_: None)
        make.call(stage1_sft.main, *make.stage1(folder, *FAST, out="adapter"))
        make.call(stage1_sft.main, *make.stage1(folder, *FAST, "--merge", out="merged"))
    return folder


@pytest.fixture
def loaded(monkeypatch):
    """Return the list that every model which is loaded joins."""
    seen, plain = [], models.load
    monkeypatch.setattr(
        models, "load", lambda *args, **options: seen.append(plain(*args, **options)) or seen[-1]
    )
    return seen


@torch.no_grad()
def own_logits(module):
    return module.eval()(input_ids=TOKENS).logits


def logits_of(folder):
    return own_logits(models.load(str(folder), CPU).module)


def refused(main, *argv):
    """Return the one line of a script that must end with exit code 1."""
    code, words = make.ends(main, *argv)
    assert code == 1 and words.startswith("error: ") and "\n" not in words, (code, words)
    return words


# --- what is trained


@pytest.mark.parametrize("script, arguments", STAGES)
def test_an_untouched_adapter_changes_no_number_at_step_0(world, tmp_path, script, arguments):
    for name, more in (("plain", ()), ("adapter", ("--lora-rank", 4, "--lora-dropout", 0.5))):
        make.call(
            script.main,
            *arguments(
                world,
                "--steps",
                1,
                "--samples",
                2,
                "--sample-tokens",
                8,
                *more,
                "--out",
                tmp_path / name,
            ),
        )
    plain, adapter = (make.history(tmp_path / name, "eval") for name in ("plain", "adapter"))
    assert plain[0] == adapter[0]
    trained = load_file(tmp_path / "adapter/final" / checkpoints.ADAPTER_WEIGHTS)
    assert all(tensor.any() for name, tensor in trained.items() if "lora_B" in name)
    plain, adapter = (
        (tmp_path / name / "samples.md").read_text().split("### Step 1")[0]
        for name in ("plain", "adapter")
    )
    assert plain == adapter
    plain, adapter = (
        [line["loss"] for line in make.history(tmp_path / name, "train")]
        for name in ("plain", "adapter")
    )
    assert plain == adapter, "the first step's loss, dropout or not: B is zero"


def test_an_untouched_adapter_gives_the_logits_of_its_base_bit_for_bit(world):
    model = models.load(str(world / "student"), CPU)
    before = own_logits(model.module)
    args = argparse.Namespace(
        student=str(world / "student"),
        lora_rank=4,
        lora_alpha=32.0,
        lora_dropout=0.0,
        lora_targets="all-linear",
        seed=0,
    )
    lora.attach(args, model)
    assert torch.equal(own_logits(model.module), before)
    assert {p.dtype for name, p in model.module.named_parameters() if ".lora_" in name} == {
        torch.float32
    }


@pytest.mark.parametrize("script, arguments", STAGES)
def test_the_adapter_alone_gets_gradients_and_the_weights_below_stay_bit_for_bit(
    world, tmp_path, loaded, monkeypatch, script, arguments
):
    touched, plain = set(), train.gradient_norm

    def norm(step, scaler, module, clip):
        touched.update(name for name, p in module.named_parameters() if p.grad is not None)
        assert {id(p) for group in step.param_groups for p in group["params"]} == {
            id(p) for p in module.parameters() if p.grad is not None
        }
        return plain(step, scaler, module, clip)

    monkeypatch.setattr(train, "gradient_norm", norm)
    make.call(script.main, *arguments(world, *LORA, "--out", tmp_path / "run"))
    state, base = (
        loaded[0].module.state_dict(),
        AutoModelForCausalLM.from_pretrained(world / "student").state_dict(),
    )
    assert touched == {name for name in state if ".lora_" in name} and len(touched) == 2 * 7 * 2
    below = {
        name.replace(".base_layer", ""): tensor
        for name, tensor in state.items()
        if name not in touched
    }
    assert below.keys() == base.keys() and all(
        torch.equal(below[name], base[name]) for name in base
    )
    assert all(tensor.abs().max() > 0 for name, tensor in state.items() if ".lora_B" in name), (
        "all of it is trained"
    )


def test_the_seed_makes_the_adapter(world, tmp_path):
    for name, seed in (("one", 5), ("two", 5), ("other", 6)):
        make.call(
            stage1_sft.main,
            *make.stage1(
                world,
                "--lora-rank",
                4,
                "--steps",
                1,
                "--lr",
                1e-12,
                "--seed",
                seed,
                "--out",
                tmp_path / name,
            ),
        )
    one, two, other = (
        load_file(tmp_path / name / "final" / checkpoints.ADAPTER_WEIGHTS)
        for name in ("one", "two", "other")
    )
    name = next(name for name in one if "lora_A" in name)
    assert torch.equal(one[name], two[name]) and not torch.allclose(one[name], other[name])


def test_gradient_checkpointing_changes_nothing_with_an_adapter(world, tmp_path):
    make.call(
        stage1_sft.main, *make.stage1(world, *FAST, "--checkpointing", "--out", tmp_path / "run")
    )
    plain, saved = (
        [(line["loss"], line["grad_norm"]) for line in make.history(folder, "train")]
        for folder in (world / "adapter", tmp_path / "run")
    )
    np.testing.assert_allclose(saved, plain, rtol=1e-3)


def test_half_precision_trains_an_adapter_in_float32(world, tmp_path):
    make.call(
        stage2_kd.main, *make.stage2(world, *LORA, "--amp", "fp16", "--out", tmp_path / "run")
    )
    assert {
        tensor.dtype
        for tensor in load_file(tmp_path / "run/final" / checkpoints.ADAPTER_WEIGHTS).values()
    } == {torch.float32}
    assert all(line["loss"] == line["loss"] for line in make.history(tmp_path / "run", "train"))


def test_targets_by_name(world, tmp_path, capsys):
    make.call(
        stage1_sft.main,
        *make.stage1(world, *LORA, "--lora-targets", "q_proj,v_proj", "--out", tmp_path / "run"),
    )
    names = {
        name.split(".")[-3]
        for name in load_file(tmp_path / "run/final" / checkpoints.ADAPTER_WEIGHTS)
    }
    assert (
        names == {"q_proj", "v_proj"}
        and "in 4 layers; all others are frozen" in capsys.readouterr().out
    )


def test_the_figures_before_the_run_count_the_adapter_alone(world):
    args = argparse.Namespace(
        student=str(world / "student"),
        lora_rank=4,
        lora_alpha=32.0,
        lora_dropout=0.0,
        lora_targets="all-linear",
        seed=0,
    )
    model = models.load(str(world / "student"), CPU)
    most = train.Largest(tokens=64, targets=20, batches=2)
    whole, plain = model.parameters, train.training_bytes(model, most, 0.0, None, False)
    lora.attach(args, model)
    assert model.trained == 4096 and model.parameters == whole + 4096
    head = model.module.get_output_embeddings().weight.numel()
    assert (
        plain - train.training_bytes(model, most, 0.0, None, False)
        == 12 * (whole - 4096) + 4 * head
    )


@pytest.mark.parametrize(
    "more, size", (((), 4096 * 36), (("--merge",), 4096 * 24 + (20544 + 4096) * 12))
)
def test_the_disk_is_asked_for_what_is_written(world, tmp_path, capsys, more, size):
    make.call(stage1_sft.main, *make.stage1(world, *LORA, *more, "--out", tmp_path / "run"))
    assert f"disk: {files.human(size)} needed" in capsys.readouterr().out


# --- what a run leaves


@pytest.mark.parametrize("script, arguments", STAGES)
def test_the_resume_state_holds_the_adapter_alone(world, tmp_path, monkeypatch, script, arguments):
    monkeypatch.setattr(runs.Run, "finish", lambda *_: None)  # which drops last/
    make.call(script.main, *arguments(world, *LORA, "--out", tmp_path / "run"))
    saved, moments = (
        load_file(tmp_path / "run/last" / name)
        for name in ("weights.safetensors", "optimizer.safetensors")
    )
    assert (
        len(saved) == 28
        and all(".lora_" in name for name in saved)
        and sum(tensor.numel() for tensor in saved.values()) == 4096
    )
    assert (
        sum(tensor.numel() for name, tensor in moments.items() if not name.endswith(".step"))
        == 2 * 4096
    )


@pytest.mark.parametrize("name", ("best", "final"))
def test_an_adapter_folder_is_pefts_own(world, name):
    folder = world / "adapter" / name
    assert {path.name for path in folder.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "base.json",
        "README.md",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "checksums.json",
    }
    config = files.read_json(folder / checkpoints.ADAPTER_CONFIG)
    assert (
        config["base_model_name_or_path"] == str((world / "student").resolve())
        and config["r"] == 4
        and config["lora_alpha"] == 32
    )
    assert config["target_modules"] == sorted(config["target_modules"]), (
        "equal runs must leave equal files"
    )
    assert files.read_json(folder / checkpoints.ADAPTER_BASE) == {
        "identity": checkpoints.identity(world / "student")
    }
    assert AutoTokenizer.from_pretrained(folder).chat_template == make.tokenizer().chat_template
    assert "library_name: peft" in (folder / "README.md").read_text()


@pytest.mark.parametrize("tied", (True, False))
def test_merged_weights_and_plain_peft_give_the_logits_of_the_adapter(tmp_path, loaded, tied):
    from peft import AutoPeftModelForCausalLM, PeftModel

    make.dataset(tmp_path / "data")
    make.model(tmp_path / "student", seed=1, tie_word_embeddings=tied)
    make.call(stage1_sft.main, *make.stage1(tmp_path, *LORA, "--merge"))
    live, final = own_logits(loaded[0].module), tmp_path / "stage1/final"
    assert (live - logits_of(tmp_path / "student")).abs().max() > 0.05, (
        "the adapter must do something"
    )
    near = dict(rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        own_logits(AutoModelForCausalLM.from_pretrained(final)), live, **near
    )
    torch.testing.assert_close(
        own_logits(AutoPeftModelForCausalLM.from_pretrained(final / "adapter")), live, **near
    )
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    torch.testing.assert_close(
        own_logits(PeftModel.from_pretrained(base, final / "adapter")), live, **near
    )
    assert torch.equal(logits_of(final), logits_of(final / "adapter")), (
        "merged on the disk and in memory"
    )
    assert ("lm_head.weight" in load_file(final / "model.safetensors")) is not tied
    module = AutoModelForCausalLM.from_pretrained(final)
    assert (module.lm_head.weight is module.model.embed_tokens.weight) is tied and not hasattr(
        module, "peft_config"
    )


@pytest.mark.parametrize("more", ((), ("--merge",)))
def test_save_dtype_is_that_of_adapter_and_merged_weights(world, tmp_path, more):
    make.call(
        stage1_sft.main,
        *make.stage1(world, *LORA, *more, "--save-dtype", "bfloat16", "--out", tmp_path / "run"),
    )
    saved = list((tmp_path / "run/final").rglob("*.safetensors"))
    assert len(saved) == 1 + len(more) and {
        tensor.dtype for path in saved for tensor in load_file(path).values()
    } == {torch.bfloat16}


# --- who reads an adapter folder


def test_chat_answers_alike_from_an_adapter_and_from_merged_weights(world, capsys, monkeypatch):
    monkeypatch.setattr(templates, "make_ready", lambda *args: None)
    said = []
    for folder in ("adapter/final", "merged/final", "merged/final/adapter", "adapter", "merged"):
        chat.main(
            [
                "--ckpt",
                str(world / folder),
                "--greedy",
                "--max-new-tokens",
                "12",
                "--prompt",
                "w5 w7 w9",
                *make.CPU,
            ]
        )
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] == said[2] and said[3] == said[4], said
    trained, untouched = (logits_of(world / name) for name in ("adapter/final", "student"))
    assert (trained - untouched).abs().max() > 0.05, "the adapter must do something"


def test_chat_answers_a_file_from_an_adapter_as_from_merged_weights(world, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "w5 w7 w9"}\n')
    argv = ["--greedy", "--max-new-tokens", "4", "--prompts", tmp_path / "prompts.jsonl", *make.CPU]
    for name in ("adapter", "merged"):
        make.call(chat.main, "--ckpt", world / name / "final", "--out", tmp_path / name, *argv)
    assert (tmp_path / "adapter").read_text() == (tmp_path / "merged").read_text()


def test_the_tokens_that_end_answers_go_with_the_adapter(world, tmp_path):
    make.model(tmp_path / "student", eos_token_id=1, pad_token_id=None)
    make.call(
        stage1_sft.main,
        *make.stage1(
            world,
            "--student",
            tmp_path / "student",
            "--lora-rank",
            2,
            "--steps",
            1,
            "--out",
            tmp_path / "run",
        ),
    )
    assert models.load(str(tmp_path / "run"), CPU).module.generation_config.eos_token_id == [1, 3]


@pytest.mark.parametrize("script, arguments", STAGES)
def test_a_run_from_an_adapter_is_a_run_from_the_merged_weights_and_trains_all_of_them(
    world, tmp_path, loaded, script, arguments
):
    for name in ("adapter", "merged"):
        make.call(
            script.main,
            *arguments(world, "--steps", 2, "--student", world / name, "--out", tmp_path / name),
        )
    assert make.history(tmp_path / "adapter") == make.history(tmp_path / "merged")
    assert (tmp_path / "adapter/final/model.safetensors").read_bytes() == (
        tmp_path / "merged/final/model.safetensors"
    ).read_bytes()
    assert all(p.requires_grad for model in loaded for p in model.module.parameters())


def test_stage_2_puts_an_adapter_on_merged_weights_and_on_no_adapter(world, tmp_path):
    argv = make.stage2(world, *LORA, "--out", tmp_path / "run")
    words = refused(stage2_kd.main, *argv, "--student", world / "adapter")
    assert (
        "cannot start from" in words
        and "--merge in the run that made it" in words
        and not (tmp_path / "run").exists()
    )
    make.call(stage2_kd.main, *argv, "--student", world / "merged")
    assert files.read_json(tmp_path / "run/best" / checkpoints.ADAPTER_CONFIG)[
        "base_model_name_or_path"
    ] == str((world / "merged/best").resolve())
    assert make.history(tmp_path / "run", "eval")[0]["kl"] > 0


def test_eval_only_and_a_dump_take_an_adapter_as_they_take_merged_weights(world, tmp_path):
    for name in ("adapter", "merged"):
        make.call(
            stage2_kd.main,
            *make.stage2(world, "--eval-only", "--student", world / name, "--out", tmp_path / name),
        )
        make.call(
            dump_logits.main,
            *make.dump(
                world,
                "--teacher",
                world / name,
                "--student",
                world / name,
                "--out",
                tmp_path / f"{name}-logits",
            ),
        )
    its_own = dict.fromkeys(("student", "weights", "bytes", "seal"))
    seen, wanted = (
        files.read_json(tmp_path / name / "eval.json") | its_own for name in ("adapter", "merged")
    )
    assert seen == wanted
    seen, wanted = (tmp_path / f"{name}-logits" for name in ("adapter", "merged"))
    assert (seen / "val/topk.npy").read_bytes() == (wanted / "val/topk.npy").read_bytes()
    assert files.read_json(seen / "val/meta.json")["teacher"] == checkpoints.identity(
        world / "adapter/best"
    )


def test_identity_of_an_adapter_changes_with_one_bit_of_it_or_of_its_base(mine):
    config = mine / "adapter/best" / checkpoints.ADAPTER_CONFIG
    files.write_json(
        config, files.read_json(config) | {"base_model_name_or_path": str(mine / "student")}
    )
    seen = [checkpoints.identity(mine / "adapter/best")]
    for path in (
        mine / "adapter/best" / checkpoints.ADAPTER_WEIGHTS,
        mine / "student/model.safetensors",
    ):
        weights = load_file(path)
        next(iter(weights.values())).view(-1)[0] += 1e-3
        save_file(weights, path, {"format": "pt"})
        seen.append(checkpoints.identity(mine / "adapter/best"))
    assert len(set(seen)) == 3


def test_pick_dtype_reads_the_config_of_the_base(world, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert models.pick_dtype("auto", torch.device("cuda"), world / "adapter/best") == torch.float32


# --- killed and started again


@pytest.mark.parametrize(
    "name, arguments", (("stage1_sft", make.stage1), ("stage2_kd", make.stage2))
)
def test_a_killed_run_with_an_adapter_ends_as_one_left_alone(world, tmp_path, name, arguments):
    context, log = make.processes(), tmp_path / "log"
    more = (
        "--lora-rank",
        4,
        "--lora-dropout",
        0.2,
        "--merge",
        "--steps",
        12,
        "--eval-every",
        4,
        "--save-every",
        3,
    )
    hooks = [
        dict(where="lib.train.update", number=5, signal=signal.SIGKILL),
        dict(where="os.replace", source=".last.part", number=2, signal=signal.SIGKILL, after=True),
        dict(where="os.replace", source=".final.part", number=1, signal=signal.SIGKILL),
        None,
    ]
    for out, parts in (("straight", [None]), ("killed", hooks)):
        for hook in parts:
            argv = [str(word) for word in arguments(world, *more, "--out", tmp_path / out)]
            process = context.Process(target=make.script, args=(name, argv, log, hook))
            process.start()
            process.join()
            assert process.exitcode == (-signal.SIGKILL if hook else 0), log.read_text()
    killed, straight = tmp_path / "killed", tmp_path / "straight"
    assert log.read_text().count("continues") == 3 and make.history(killed) == make.history(
        straight
    )
    for path in [
        path
        for path in straight.rglob("*")
        if path.parent != straight and path.suffix in (".safetensors", ".json")
    ]:
        assert (killed / path.relative_to(straight)).read_bytes() == path.read_bytes(), path
    seen, wanted = (files.read_json(folder / "config.json") for folder in (killed, straight))
    assert all(
        seen[name] == wanted[name] for name in ("settings", "steps", "updates", "best", "final")
    )


def test_an_older_run_that_lacks_a_flag_is_the_same_run_and_one_with_others_is_not(
    world, tmp_path, capsys
):
    argv = make.stage1(world, "--steps", 1, "--out", tmp_path / "run")
    make.call(stage1_sft.main, *argv)
    said = files.read_json(tmp_path / "run/config.json")
    for name in ("lora_rank", "lora_targets", "merge", "patience", "eval_sampling", "mix"):
        del said["settings"][name]
    files.write_json(tmp_path / "run/config.json", said)
    assert make.ends(stage1_sft.main, *argv) == (0, "")
    assert "already finished" in capsys.readouterr().out
    assert "saw lora_rank 0 (now 4)" in refused(stage1_sft.main, *argv, "--lora-rank", 4)
    assert "saw patience 0 (now 3)" in refused(stage1_sft.main, *argv, "--patience", 3)


# --- errors


@pytest.mark.parametrize(
    "targets, words",
    (
        (
            "query",
            (
                "saw query; wanted all-linear, or names among down_proj, gate_proj, k_proj, o_proj,"
                " q_proj, up_proj, v_proj"
            ),
        ),
        ("q_proj,nothing", "saw nothing"),
        ("lm_head", "saw lm_head"),
        ("embed_tokens", "saw embed_tokens"),
        ("norm", "linear layers"),
    ),
)
def test_targets_that_cannot_have_an_adapter(world, tmp_path, targets, words):
    assert words in refused(
        stage1_sft.main,
        *make.stage1(world, *LORA, "--lora-targets", targets, "--out", tmp_path / "run"),
    )
    assert not (tmp_path / "run/history.jsonl").exists()


@pytest.mark.parametrize(
    "argv, words",
    (
        (["--lora-rank", "-1"], "--lora-rank is -1"),
        (["--lora-alpha", "0"], "--lora-alpha is 0.0"),
        (["--lora-dropout", "1"], "--lora-dropout is 1.0"),
        (["--lora-targets", "a,,b"], "--lora-targets is 'a,,b'"),
        (["--merge"], "--merge needs --lora-rank"),
        (
            ["--lora-rank", "4", "--keep-layers", "0"],
            "--keep-layers and --lora-rank exclude each other",
        ),
        (["--patience", "-1"], "--patience is -1"),
    ),
)
def test_values_that_cannot_work(world, capsys, argv, words):
    assert (
        make.ends(stage1_sft.main, *make.stage1(world, *argv)) == (2, "")
        and words in capsys.readouterr().err
    )


def test_a_new_model_gets_no_adapter(world, tmp_path):
    make.config().save_pretrained(tmp_path / "config")
    argv = make.stage1(world, *LORA, "--student", tmp_path / "config", "--out", tmp_path / "run")
    assert "saw config.json alone" in refused(stage1_sft.main, *argv)


@pytest.mark.parametrize("command", ((stage1_sft, *LORA), (stage2_kd, "--student", "adapter")))
def test_without_peft_the_line_that_installs_it(mine, tmp_path, monkeypatch, command):
    monkeypatch.setitem(sys.modules, "peft", None)
    script, *more = command
    argv = dict(STAGES)[script](
        mine,
        "--out",
        tmp_path / "run",
        *(mine / word if word == "adapter" else word for word in more),
    )
    assert "LoRA adapters need the package peft" in (
        words := refused(script.main, *argv)
    ) and words.endswith("pip install peft")


@pytest.fixture
def moved(mine):
    """Return a world whose adapter knows its base by the name that it has there."""
    config = mine / "adapter/best" / checkpoints.ADAPTER_CONFIG
    files.write_json(
        config, files.read_json(config) | {"base_model_name_or_path": str(mine / "student")}
    )
    return mine


def change(path, what):
    weights = load_file(path)
    what(weights)
    save_file(weights, path, {"format": "pt"})


def test_a_base_that_has_changed(moved):
    change(
        moved / "student/model.safetensors", lambda weights: weights["model.norm.weight"].add_(1e-6)
    )
    words = refused(stage2_kd.main, *make.stage2(moved, "--student", moved / "adapter"))
    assert (
        "the base of the adapter" in words
        and "has changed" in words
        and "base_model_name_or_path in" in words
    )
    assert "has changed" in refused(
        chat.main, "--ckpt", moved / "adapter", "--prompt", "w5", *make.CPU
    )


@pytest.mark.parametrize(
    "name, words",
    (
        ("/gone/student", "is missing; saw /gone/student"),
        ("", "is missing"),
        ("gone/student", "the hub"),
        ("{}/adapter/best", "is no model"),
        ("{}/data", "is no model"),
    ),
)
def test_a_base_that_is_not_there(moved, name, words):
    config = moved / "adapter/best" / checkpoints.ADAPTER_CONFIG
    files.write_json(
        config, files.read_json(config) | {"base_model_name_or_path": name.format(moved)}
    )
    adapter = moved / "adapter"
    for script, argv in (
        (stage1_sft, make.stage1(moved, "--student", adapter)),
        (dump_logits, make.dump(moved, "--teacher", adapter)),
        (chat, ["--ckpt", adapter, "--prompt", "w5", *make.CPU]),
    ):
        assert words in refused(script.main, *argv)


@pytest.mark.parametrize(
    "damage, words",
    (
        (
            lambda folder: (folder / checkpoints.ADAPTER_WEIGHTS).unlink(),
            "has no weights; saw adapter_config.json alone",
        ),
        (
            lambda folder: (folder / checkpoints.ADAPTER_WEIGHTS).rename(
                folder / "adapter_model.bin"
            ),
            "has no weights",
        ),
        (
            lambda folder: (folder / checkpoints.ADAPTER_WEIGHTS).write_bytes(
                (folder / checkpoints.ADAPTER_WEIGHTS).read_bytes()[:-9]
            ),
            "cannot be put on its base",
        ),
        (
            lambda folder: change(
                folder / checkpoints.ADAPTER_WEIGHTS,
                lambda weights: weights.pop(sorted(weights)[0]),
            ),
            "Found missing adapter keys",
        ),
        (
            lambda folder: change(
                folder / checkpoints.ADAPTER_WEIGHTS,
                lambda weights: weights.update({sorted(weights)[0]: torch.ones(3, 3)}),
            ),
            "cannot be put on",
        ),
        (
            lambda folder: change(
                folder / checkpoints.ADAPTER_WEIGHTS,
                lambda weights: weights[sorted(weights)[0]].fill_(torch.nan),
            ),
            "not finite",
        ),
        (
            lambda folder: (folder / checkpoints.ADAPTER_CONFIG).write_text('{"r": '),
            "is not readable JSON",
        ),
    ),
)
def test_an_adapter_that_is_damaged(moved, damage, words):
    best = moved / "adapter/best"
    damage(best)
    if (best / checkpoints.ADAPTER_WEIGHTS).exists() and "JSON" not in words:
        argv = make.stage2(moved, "--student", moved / "adapter")
        assert "is damaged" in refused(stage2_kd.main, *argv)
    (best / checkpoints.CHECKSUMS).unlink()  # as those made elsewhere have none
    assert words in refused(stage2_kd.main, *make.stage2(moved, "--student", moved / "adapter"))


def test_an_adapter_with_another_tokenizer(moved):
    make.tokenizer("x").save_pretrained(moved / "adapter/best")
    assert "another tokenizer" in refused(
        stage2_kd.main, *make.stage2(moved, "--student", moved / "adapter")
    )


def test_an_adapter_without_a_tokenizer_has_that_of_its_base(moved, capsys):
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (moved / "adapter/best" / name).unlink()
    assert checkpoints.with_tokenizer(moved / "adapter/best") == moved / "student"
    models.load(str(moved / "adapter"), CPU, dataset=data.Dataset(moved / "data"))
    chat.main(
        [
            "--ckpt",
            str(moved / "adapter"),
            "--greedy",
            "--max-new-tokens",
            "3",
            "--prompt",
            "w5",
            *make.CPU,
        ]
    )


def test_a_run_does_not_write_over_the_base_of_its_student(moved):
    before = (moved / "student/model.safetensors").read_bytes()
    for out, student in (("student", "adapter"), ("merged", "merged/best/adapter")):
        words = refused(
            stage2_kd.main,
            *make.stage2(moved, "--student", moved / student, "--out", moved / out, "--fresh"),
        )
        assert "holds the student that is read" in words
    assert (moved / "student/model.safetensors").read_bytes() == before


def test_an_adapter_of_others_has_no_base_json(moved, tmp_path):
    wanted = logits_of(moved / "adapter")
    (moved / "adapter/best" / checkpoints.ADAPTER_BASE).unlink()
    assert torch.equal(
        logits_of(shutil.copytree(moved / "adapter/best", tmp_path / "theirs")), wanted
    )


@pytest.mark.parametrize(
    "name, text, words",
    (
        (checkpoints.ADAPTER_CONFIG, "[]", "wanted an object"),
        (checkpoints.ADAPTER_BASE, "{}", "has changed"),
        (checkpoints.ADAPTER_BASE, "[]", "wanted an object"),
    ),
)
def test_json_that_says_nothing_is_one_line(moved, name, text, words):
    """It ended in an AttributeError, a KeyError, a TypeError."""
    (moved / "adapter/best" / name).write_text(text)
    assert words in refused(stage1_sft.main, *make.stage1(moved, "--student", moved / "adapter"))
