"""What a user can get wrong: exit code 1 for files, 2 for arguments, and one line that says what
mends it."""

import argparse
import errno
import json
import shutil
import threading

import make
import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import chat
import dump_logits
import prepare_data
import stage1_sft
import stage2_kd
from lib import checkpoints, data, files, flags, models
from lib.measure import plots
from lib.run import Run
from lib.teacher import writer

SCRIPTS = {
    "prepare": prepare_data,
    "stage1": stage1_sft,
    "dump": dump_logits,
    "stage2": stage2_kd,
    "chat": chat,
}
ARGUMENTS = {"stage1": make.stage1, "dump": make.dump, "stage2": make.stage2}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = make.world(tmp_path_factory.mktemp("world"), rows=24, rows_per_chunk=16)
    make.call(dump_logits.main, *make.dump(folder))
    return folder


@pytest.fixture
def world(whole, tmp_path, monkeypatch):
    """Return a copy of a whole world that a test may break."""
    monkeypatch.setattr(plots, "curves", lambda *_: None)
    return shutil.copytree(whole, tmp_path / "world")


def refused(name, world, *more, of=()):
    """Run a script that must end with exit code 1 and one line, which says all of `of`."""
    code, words = make.ends(SCRIPTS[name].main, *ARGUMENTS[name](world, *more))
    assert code == 1 and words.startswith("error: ") and "\n" not in words, (code, words)
    for part in of:
        assert part in words, (part, words)
    return words


def usage(name, argv, capsys):
    """Run a script that must end with exit code 2, and return the last line of what it said."""
    assert make.ends(SCRIPTS[name].main, *argv) == (2, "")
    return capsys.readouterr().err.splitlines()[-1]


# --- files: exit code 1


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_missing_data_folder(world, name):
    shutil.rmtree(world / "data")
    refused(name, world, of=["data/meta.json is missing", "make data"])


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_data_folder_that_was_not_finished(world, name):
    (world / "data" / "meta.json").unlink()
    refused(name, world, of=["data/meta.json is missing", "make data"])


def test_a_data_folder_whose_meta_json_is_cut_short(world):
    (world / "data" / "meta.json").write_text("{")
    refused("stage1", world, of=["data/meta.json is not readable JSON", "make data"])


DAMAGES = (
    (lambda path: path.write_bytes(path.read_bytes()[:-9]), "cannot be read"),
    (lambda path: path.unlink(), "cannot be read"),
    (lambda path: np.save(path, np.zeros(3, bool)), "do not fit together"),
)


@pytest.mark.parametrize("change, words", DAMAGES)
def test_data_files_that_are_damaged(world, change, words):
    change(world / "data" / "train.answer.npy")
    refused("stage1", world, of=[words, "make data"])


@pytest.mark.parametrize(
    "name, model", (("stage1", "student"), ("dump", "teacher"), ("stage2", "student"))
)
def test_a_model_that_is_missing(world, name, model):
    shutil.rmtree(world / model)
    refused(name, world, of=[f"/{model} is missing", "a folder, or a hub id like"])


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    "name, model", (("stage1", "student"), ("dump", "teacher"), ("stage2", "student"))
)
@pytest.mark.parametrize("value", (np.nan, np.inf))
def test_weights_that_are_not_finite(world, name, model, value):
    change_weights(
        world / model, lambda weights: weights["model.norm.weight"].__setitem__(3, value)
    )
    refused(name, world, of=["weights that are not finite", "model.norm.weight"])


@pytest.mark.parametrize(
    "name, model", (("stage1", "student"), ("dump", "teacher"), ("stage2", "student"))
)
def test_safetensors_that_are_cut_short(world, name, model):
    path = world / model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(
        name,
        world,
        of=[f"/{model}/model.safetensors cannot be read", "*.safetensors that belong together"],
    )


@pytest.mark.parametrize(
    "name, model", (("stage1", "student"), ("dump", "teacher"), ("stage2", "student"))
)
def test_a_checkpoint_that_lacks_a_tensor_is_not_filled_with_random_numbers(world, name, model):
    change_weights(
        world / model, lambda weights: weights.pop("model.layers.1.self_attn.q_proj.weight")
    )
    refused(name, world, of=["model.layers.1.self_attn.q_proj.weight"])


@pytest.mark.parametrize(
    "name, model", (("stage1", "student"), ("dump", "teacher"), ("stage2", "student"))
)
def test_trap_17_a_tokenizer_of_the_same_size_with_other_words(world, name, model):
    make.tokenizer("x").save_pretrained(world / model)
    refused(
        name,
        world,
        of=[f"/{model} has another tokenizer than", "vocabulary", "prepare_data.py --tokenizer"],
    )


def test_trap_17_other_templates_on_the_same_vocabulary_are_no_difference(world):
    other = make.tokenizer()
    other.chat_template = "{{ messages[0].content }}"
    other.save_pretrained(world / "student")
    make.call(stage1_sft.main, *make.stage1(world, "--steps", 1))


def test_a_model_with_fewer_tokens_than_the_tokenizer(world):
    make.model(world / "student", vocab=50)
    refused("stage1", world, of=["holds tokens that", "/student", "token 60", "0 to 49"])


def test_stage_2_makes_no_new_model_of_a_config(world):
    (world / "student" / "model.safetensors").unlink()
    refused("stage2", world, of=["student has no weights", "make stage1"])


def test_pickled_weights_are_never_loaded(world):
    torch.save(
        load_file(world / "student" / "model.safetensors"), world / "student" / "pytorch_model.bin"
    )
    (world / "student" / "model.safetensors").unlink()
    refused("stage1", world, of=["cannot be loaded as a causal LM", "*.safetensors"])


def test_logits_of_other_data(world):
    shutil.rmtree(world / "data")
    make.dataset(world / "data", rows=24, rows_per_chunk=16, seed=5)
    refused("stage2", world, of=["was dumped from other data", "dump_logits.py --data", "--fresh"])


def test_logits_that_were_not_finished(world):
    for part in ("chunk-0000", "chunk-0001"):
        (world / "logits" / part / "meta.json").unlink()
    refused(
        "stage2",
        world,
        of=["holds no finished chunk", "0 of 2", "dump_logits.py --data", "--chunk all"],
    )


def test_logits_that_are_missing(world):
    shutil.rmtree(world / "logits")
    refused("stage2", world, of=["logits is missing", "dump_logits.py --data"])


def test_logits_that_are_damaged_are_found_by_verify(world):
    records = np.load(world / "logits" / "chunk-0001" / "topk.npy", mmap_mode="r+")
    records["tail"][0] += 1
    records.flush()
    refused("stage2", world, "--verify", of=["chunk-0001/topk.npy is damaged", "--fresh"])


def test_a_temperature_that_was_not_dumped(world):
    refused(
        "stage2",
        world,
        "--temperature",
        0.5,
        of=["temperature 0.5 was not dumped", "1, 2, 4", "--temperature 1,"],
    )


def test_a_temperature_that_was_not_dumped_without_a_basis(world):
    make.call(dump_logits.main, *make.dump(world, "--tail-rank", 0, out="bucket"))
    refused(
        "stage2",
        world,
        "--logits",
        world / "bucket",
        "--temperature",
        1.5,
        of=["temperature 1.5 was not dumped", "1, 2, 4", "--temperature 1,"],
    )


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_disk_too_small(world, name, monkeypatch):
    monkeypatch.setattr(files, "free_bytes", lambda folder: 100)
    refused(
        name,
        world,
        "--out",
        world / "new",
        of=["the disk of", "is too small", "saw 100 B free", "mend it with"],
    )
    assert not list((world / "new").rglob("*.npy")) and not list(
        (world / "new").rglob("*.safetensors")
    )


def test_more_logits_kept_than_there_are_tokens(world):
    refused("dump", world, "--k", 62, "--out", world / "new", of=["--k 62", "at most V = 61"])


def test_a_chunk_that_does_not_exist(world):
    refused(
        "dump", world, "--chunk", 2, of=["chunk 2 does not exist", "2 chunks", "0 to 1, val or all"]
    )


@pytest.mark.parametrize("name", ("stage1", "stage2"))
def test_a_second_process_on_the_same_folder(world, name):
    (world / "new").mkdir()
    held = files.lock(world / "new")
    refused(
        name,
        world,
        "--out",
        world / "new",
        of=["new is being written by another process", "another --out"],
    )
    held.release()
    make.call(SCRIPTS[name].main, *ARGUMENTS[name](world, "--out", world / "new", "--steps", 1))


def test_a_second_dump_of_the_same_chunk(world):
    (world / "new" / "chunk-0001").mkdir(parents=True)
    held = files.lock(world / "new" / "chunk-0001")
    refused(
        "dump", world, "--out", world / "new", of=["chunk-0001 is being written by another process"]
    )
    held.release()


@pytest.mark.parametrize("name", ("stage1", "stage2"))
def test_fresh_does_not_delete_what_another_process_is_writing(world, name):
    (world / "new").mkdir()
    held = files.lock(world / "new")
    (world / "new" / "history.jsonl").write_text("hours of work\n")
    refused(
        name,
        world,
        "--out",
        world / "new",
        "--fresh",
        of=["new is being written by another process"],
    )
    assert (world / "new" / "history.jsonl").exists()
    held.release()


@pytest.mark.parametrize("name", ("stage1", "stage2"))
@pytest.mark.parametrize("content", ("thesis.tex", "config.json"))
def test_fresh_refuses_to_delete_a_folder_that_is_not_ours(world, name, content):
    """A folder with a config.json alone may be a model: one of ours has a history, or a lock."""
    (world / "mine").mkdir()
    (world / "mine" / content).write_text("{}")
    refused(
        name,
        world,
        "--out",
        world / "mine",
        "--fresh",
        of=["--fresh would delete", "a folder that no script of ours made"],
    )
    assert (world / "mine" / content).exists()


def test_a_run_into_the_folder_of_a_model_is_refused(world):
    refused("stage1", world, "--out", world / "teacher", of=["teacher", "another --out"])


def test_fresh_dump_refuses_to_delete_a_folder_that_is_not_ours(world):
    (world / "new" / "chunk-0000").mkdir(parents=True)
    (world / "new" / "chunk-0000" / "thesis.tex").write_text("")
    refused(
        "dump",
        world,
        "--out",
        world / "new",
        "--fresh",
        of=["--fresh would delete", "a folder that no script of ours made"],
    )


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_row_that_does_not_fit_in_a_micro_batch(world, name):
    longest = int(data.Dataset(world / "data").train.rows["length"].max())
    refused(
        name,
        world,
        "--tokens-per-microbatch",
        longest - 1,
        "--out",
        world / "new",
        of=["the longest row does not fit", f"--tokens-per-microbatch {longest}", "--max-len"],
    )


def test_layers_that_the_model_does_not_have(world):
    refused(
        "stage1",
        world,
        "--keep-layers",
        "0,2",
        of=["--keep-layers does not fit the model", "0,2", "different numbers from 0 to 1"],
    )


def test_a_device_that_is_not_there(world):
    refused("stage1", world, "--device", "cuda:99", of=["--device cuda:99 cannot be used"])
    refused("stage1", world, "--device", "meta", of=["--device meta cannot be used"])


@pytest.mark.parametrize(
    "name, argv",
    (
        ("prepare", ["--source", "rows.jsonl", "--tokenizer", "m.gguf", "--out", "out"]),
        ("chat", ["--ckpt", "m.gguf", "--prompt", "hello"]),
    ),
)
def test_a_gguf_file_is_no_tokenizer_nor_a_model_to_talk_to(tmp_path, monkeypatch, name, argv):
    pytest.importorskip("gguf")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    code, words = make.ends(SCRIPTS[name].main, *argv)
    assert code == 1 and "m.gguf is a GGUF file" in words and "\n" not in words.strip()


def test_no_traceback_hides_in_an_error(world):
    shutil.rmtree(world / "data")
    with pytest.raises(SystemExit) as end:
        stage1_sft.main([str(word) for word in make.stage1(world)])
    assert end.value.__cause__ is None and isinstance(
        end.value.code, str
    )  # Python prints the text to stderr and exits with 1


# --- arguments: exit code 2


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_unknown_flag(name, capsys):
    parser = SCRIPTS_PARSERS[name]
    needed = [action for action in parser._actions if action.required and action.option_strings]
    needed += [
        group._group_actions[0] for group in parser._mutually_exclusive_groups if group.required
    ]
    required = [word for action in needed for word in (action.option_strings[0], "x")]
    assert "unrecognized arguments: --learning-rate" in usage(
        name, [*required, "--learning-rate", "1"], capsys
    )


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_abbreviated_flag(name, whole, capsys):
    assert "unrecognized arguments: --see" in usage(
        name, [*ARGUMENTS[name](whole), "--see", "3"], capsys
    )


@pytest.mark.parametrize(
    "name, argv, words",
    (
        ("stage1", ["--lr", "0"], "--lr is 0.0, wanted a number above 0"),
        ("stage1", ["--warmup", "2"], "--warmup is 2.0, wanted a share"),
        ("stage1", ["--steps", "-1"], "--steps is -1"),
        ("stage1", ["--keep-layers", "a"], "--keep-layers is a, wanted numbers like"),
        ("stage1", ["--tokens-per-step", "0"], "--tokens-per-step is 0"),
        ("stage1", ["--best", "kl"], "invalid choice: 'kl'"),
        ("stage1", ["--best", "ce_"], "invalid choice: 'ce_'"),
        ("stage2", ["--alpha", "1.5"], "--alpha is 1.5, wanted a share from 0 to 1"),
        ("stage2", ["--beta", "1"], "--beta is 1.0"),
        ("stage2", ["--temperature", "0"], "--temperature is 0.0"),
        ("stage2", ["--divergence", "mse"], "invalid choice: 'mse'"),
        ("dump", ["--k", "0"], "--k is 0"),
        ("dump", ["--temperatures", "1,x"], "--temperatures is 1,x"),
        ("dump", ["--temperatures", "0"], "must be above 0"),
        ("dump", ["--chunk", "first"], "--chunk is first, wanted a number, all or val"),
    ),
)
def test_a_value_that_cannot_work(name, argv, words, whole, capsys):
    assert words in usage(name, [*ARGUMENTS[name](whole), *argv], capsys)


def parsers():
    """Return each script's parser, caught when it is about to parse."""
    caught, plain = {}, argparse.ArgumentParser.parse_args
    for name, script in SCRIPTS.items():

        def catch(self, *_, name=name, **__):
            caught[name] = self
            raise EOFError

        argparse.ArgumentParser.parse_args = catch
        try:
            script.parse_args([])
        except EOFError:
            pass
        finally:
            argparse.ArgumentParser.parse_args = plain
    return caught


SCRIPTS_PARSERS = parsers()


ACTIONS = [
    (name, flag, action)
    for name, parser in SCRIPTS_PARSERS.items()
    for action in parser._actions
    for flag in action.option_strings
]
FLAGS = sorted({flag for _, flag, _ in ACTIONS} - {"-h", "--help"})
OWN = {
    ("dump", "--student"),
    ("prepare", "--student"),
    ("chat", "--out"),
    ("prepare", "--mix"),
    ("dump", "--verify"),
}
# not the model to train; not a folder; stored, not used; instead of dumping


@pytest.mark.parametrize("flag", flags.SHARED)
def test_a_shared_flag_has_one_default_and_one_text_in_all_scripts(flag):
    shared = flags.SHARED[flag]
    seen = {
        name: action for name, other, action in ACTIONS if other == flag and (name, flag) not in OWN
    }
    assert seen
    for name, action in seen.items():
        assert action.help == shared["help"] and action.required == shared.get("required", False), (
            name
        )
        assert action.default == shared.get("default", False if "action" in shared else None), name


@pytest.mark.parametrize("flag", FLAGS)
def test_flags_of_one_name_have_one_default_and_one_type(flag):
    if flag not in (
        "--k",
        "--temperature",
        "--best",
        "--out",
        "--student",
        "--tokenizer",
        "--system",
        "--max-new-tokens",
        "--verify",
    ):  # these mean two things
        assert (
            len(
                {
                    (action.default, action.type, str(action.choices))
                    for _, other, action in ACTIONS
                    if other == flag
                }
            )
            == 1
        )


@pytest.mark.parametrize("name", SCRIPTS)
def test_abbreviations_are_off(name):
    assert not SCRIPTS_PARSERS[name].allow_abbrev


def test_identity_of_a_model_changes_with_one_bit(world):
    before = checkpoints.identity(world / "student")
    change_weights(world / "student", lambda weights: weights["model.norm.weight"].add_(1e-6))
    assert checkpoints.identity(world / "student") != before
    assert json.loads((world / "logits" / "val" / "meta.json").read_text())[
        "teacher"
    ] == checkpoints.identity(world / "teacher")


# --- what a hostile reader of the code found


@pytest.mark.parametrize("name", ("stage2", "dump"))
def test_logits_of_the_same_data_cut_into_other_chunks(world, name):
    meta = files.read_json(world / "data/meta.json")
    files.write_json(world / "data/meta.json", meta | {"rows_per_chunk": 8})
    refused(name, world, of=["16", "8", "--fresh"])


@pytest.mark.parametrize(
    "name, flag, kept",
    (
        ("dump", "--teacher", "logits/chunk-0000/topk.npy"),
        ("stage1", "--student", "stage1/history.jsonl"),
    ),
)
def test_fresh_deletes_nothing_when_the_rest_of_the_command_is_wrong(world, name, flag, kept):
    if name == "stage1":
        make.call(stage1_sft.main, *make.stage1(world, "--steps", 1))
    before = (world / kept).read_bytes()
    refused(name, world, "--fresh", flag, world / "no-such-model", of=["missing"])
    assert (world / kept).read_bytes() == before


def test_a_stage_that_is_not_finished_is_no_student_and_no_teacher(world):
    make.call(stage1_sft.main, *make.stage1(world, "--steps", 2))
    (world / "stage1/config.json").unlink()
    refused(
        "stage2",
        world,
        "--student",
        world / "stage1",
        of=["is not finished", "its own command again", "best by name"],
    )
    refused("dump", world, "--teacher", world / "stage1", of=["is not finished"])


def test_another_student_under_the_same_name_is_no_finished_run(world):
    argv = make.stage1(world, "--steps", 1)
    make.call(stage1_sft.main, *argv)
    make.model(world / "student", seed=77, layers=1)
    refused(
        "stage1",
        world,
        "--steps",
        1,
        of=["is finished with other settings", "student identity", "--fresh"],
    )


def test_a_run_does_not_write_over_its_own_student(world):
    make.call(stage1_sft.main, *make.stage1(world, "--steps", 1))
    before = (world / "stage1/best/model.safetensors").read_bytes()
    refused(
        "stage2",
        world,
        "--student",
        world / "stage1",
        "--out",
        world / "stage1",
        "--fresh",
        of=["holds the student that is read"],
    )
    assert (world / "stage1/best/model.safetensors").read_bytes() == before


def test_a_gradient_that_is_not_finite_ends_the_run_before_it_reaches_the_weights(
    world, monkeypatch
):
    from lib import train

    monkeypatch.setattr(train, "gradient_norm", lambda *_: float("nan"))
    monkeypatch.setattr(train, "update", lambda *_: pytest.fail("the step was taken"))
    refused("stage1", world, of=["the gradient of step 0 is not finite", "rows"])


def test_an_evaluation_that_is_not_finite_is_one_line(world, monkeypatch):
    monkeypatch.setattr(
        models.Model,
        "hidden",
        lambda self, batch: torch.full((len(batch.labels), 32), float("nan")),
    )
    refused("stage1", world, of=["logits on val are not finite"])


def test_a_backup_beside_a_folder_is_left_alone(world):
    make.call(stage1_sft.main, *make.stage1(world, "--steps", 2))
    for name in ("best.old", "best.part", "last.old"):
        (world / "stage1" / name).mkdir()
    (world / "stage1/config.json").unlink()
    make.call(stage1_sft.main, *make.stage1(world, "--steps", 2))
    assert all((world / "stage1" / name).exists() for name in ("best.old", "best.part", "last.old"))


@pytest.mark.parametrize(
    "flag, value",
    (
        ("--clip", -1),
        ("--seed", -1),
        ("--beta2", 1),
        ("--weight-decay", -0.1),
        ("--eval-every", -1),
    ),
)
def test_values_that_would_do_silent_harm(world, capsys, flag, value):
    assert flag in usage("stage1", make.stage1(world, flag, value), capsys)


def test_patience_without_val_rows_is_refused(tmp_path):
    folder = make.world(tmp_path, val=0)
    refused(
        "stage1", folder, "--patience", 1, of=["--patience has nothing to look at", "no val rows"]
    )


def test_a_broken_config_is_one_line(world):
    (world / "student/config.json").write_text('{"model_type": "llama", ')
    refused("stage1", world, of=["student", "config.json"])


def test_memory_flags_may_change_when_a_run_is_continued(world, capsys):
    make.call(stage1_sft.main, *make.stage1(world, "--steps", 1))
    code, said = make.ends(
        stage1_sft.main,
        *make.stage1(world, "--steps", 1, "--tokens-per-microbatch", 64, "--checkpointing"),
    )
    assert code == 0 or "already finished" in capsys.readouterr().out, said


# --- what a disk does


def ends_with(error):
    @files.script
    def main(argv=None):
        raise error

    return main


@pytest.mark.parametrize(
    "error, words",
    (
        (
            OSError(errno.ENOSPC, "full", "runs/x"),
            ["runs/x cannot be", "No space left", "more room"],
        ),
        (OSError(errno.EDQUOT, "full"), ["quota", "more room"]),
        (OSError(errno.EFBIG, "large"), ["File too large", "ulimit -f"]),
        (OSError(errno.EROFS, "ro", b"x"), ["Read-only", "may write to"]),
        (PermissionError(errno.EACCES, "no", "x"), ["Permission denied", "may write to"]),
        (OSError(errno.EIO, "broken"), ["Input/output error", "a look at that disk"]),
        (NotADirectoryError(errno.ENOTDIR, "no", "a/b"), ["a/b", "another name"]),
        (FileNotFoundError(errno.ENOENT, "no", "gone/x"), ["gone/x is out of reach"]),
        (FileNotFoundError(errno.ENOENT, "no", ".data.part"), [".data.part is out of reach"]),
        (
            FileNotFoundError(errno.ENOENT, "Failed to open local file 'gone/y.part'. Detail: no"),
            ["gone/y.part is out of reach"],  # pyarrow's
        ),
        (Exception("No such file or directory (os error 2)"), ["a file is out of reach"]),
        (OSError("5 requested and 3 written"), ["No space left"]),  # numpy's
        (SafetensorError("I/O error: No space left on device (os error 28)"), ["No space left"]),
        (Exception("Read-only file system (os error 30)"), ["Read-only"]),  # tokenizers'
    ),
)
def test_what_a_disk_does_ends_any_script_in_one_line(error, words):
    code, said = make.ends(ends_with(error))
    assert code == 1 and said.startswith("error: ") and "\n" not in said
    assert all(word in said for word in words), said


@pytest.mark.parametrize(
    "bug", (KeyError("x"), OSError("x"), FileNotFoundError(errno.ENOENT, "no", __file__ + "x"))
)
def test_a_bug_keeps_its_traceback(bug):
    with pytest.raises(type(bug)):
        ends_with(bug)()


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_is_within_that_boundary(name):
    assert SCRIPTS[name].main.__wrapped__


@pytest.mark.parametrize("number", (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK))
def test_a_file_system_without_locks_is_said_and_worked_on(tmp_path, monkeypatch, capsys, number):
    fcntl = pytest.importorskip("fcntl")

    def none(*_):
        raise OSError(number, "not here")

    monkeypatch.setattr(fcntl, "flock", none)
    with files.lock(tmp_path / "run"):
        assert "keeps no locks (flock: not here)" in capsys.readouterr().out
    assert not files.locked(tmp_path / "run")


def test_a_look_at_a_lock_refuses_nobody(tmp_path, monkeypatch):
    """`make runs` holds a lock for the time of a look: who comes then waits that long."""
    assert files.LOOK_S > 0.1
    monkeypatch.setattr(files, "LOOK_S", 30)
    threading.Timer(0.1, files.lock(tmp_path).release).start()
    files.lock(tmp_path).release()


@pytest.mark.parametrize("name", ("stage1", "stage2"))
def test_a_second_evaluation_into_the_same_folder(world, name):
    held = files.lock_beside(world / "new" / "eval.json")
    busy = ["eval.json is being written by another process"]
    refused(name, world, "--out", world / "new", "--eval-only", of=busy)
    held.release()
    assert not list((world / "new").iterdir())


@pytest.mark.parametrize("door", ("--prompts", "--score"))
def test_a_second_process_on_the_same_answers(world, door, monkeypatch):
    monkeypatch.setattr(chat.model, "load", lambda *_: pytest.fail("loaded a model"))
    asked, out = world / "asked.jsonl", world / "answers.jsonl"
    asked.write_text('{"prompt": "w1", "reference": "w2"}\n')
    with files.lock_beside(out):
        argv = ["--ckpt", world / "student", door, asked, "--out", out, *make.CPU]
        code, words = make.ends(chat.main, *argv)
    assert code == 1 and "answers.jsonl is being written by another process" in words
    assert not list(world.glob("*answers*"))


def test_fresh_chunks_are_held_from_before_the_first_is_emptied(whole, tmp_path):
    """Else a second --fresh would replace the basis, or a chunk, under the first one's hands."""
    shutil.copytree(whole / "logits", tmp_path / "logits")
    held = files.lock(tmp_path / "logits" / "val")
    with pytest.raises(SystemExit, match="val is being written by another process"):
        writer.empty_chunks(tmp_path / "logits", [0, 1, "val"])
    assert (tmp_path / "logits" / "chunk-0000" / "meta.json").exists()
    held.release()
    locks = writer.empty_chunks(tmp_path / "logits", [0, "val"])
    assert set(locks) == {0, "val"} and files.locked(tmp_path / "logits" / "val")
    assert [path.name for path in (tmp_path / "logits" / "val").iterdir()] == [files.LOCK]


def test_a_run_that_another_process_finished_meanwhile_is_finished(world, monkeypatch, capsys):
    argv = make.stage1(world, "--steps", 1)
    make.call(stage1_sft.main, *argv)
    plain, seen = Run._leave_if_finished, []
    # the first look comes before the lock: as if the other one had not been done by then
    monkeypatch.setattr(
        Run, "_leave_if_finished", lambda run: seen and plain(run) or seen.append(1)
    )
    before = (world / "stage1" / "config.json").read_bytes()
    assert make.ends(stage1_sft.main, *argv) == (0, "")
    assert (world / "stage1" / "config.json").read_bytes() == before


def test_records_reach_a_disk_that_takes_a_part_at_a_time(tmp_path, monkeypatch):
    np.save(tmp_path / "x.npy", np.zeros(9, "<u4"))
    placed = writer.Placed(np.load(tmp_path / "x.npy", mmap_mode="r"))
    plain, pieces = placed.file, []

    class Slow:
        seek = staticmethod(plain.seek)

        def write(self, content):
            pieces.append(len(content))
            return plain.write(content[:7])

    placed.file = Slow()
    placed.write(2, np.arange(5, dtype="<u4"))
    plain.close()
    assert np.load(tmp_path / "x.npy").tolist() == [0, 0, 0, 1, 2, 3, 4, 0, 0] and len(pieces) == 3
