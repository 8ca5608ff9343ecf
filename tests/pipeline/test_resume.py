"""Killed anywhere and started again, a run or a dump ends with the very bytes of one that was left
alone."""

import errno
import os
import re
import shutil
import signal

import make
import numpy as np
import pytest

import dump_logits
import stage1_sft
from lib import files
from lib import run as runs

RUN = ["--steps", 30, "--eval-every", 5, "--save-every", 3]
KILL, TERM = signal.SIGKILL, signal.SIGTERM


@pytest.fixture(scope="module")
def processes():
    return make.processes()


@pytest.fixture(scope="module")
def run(processes, tmp_path_factory):
    """Return a function that runs a script in a process of its own: (name, argv, hook) -> (exit
    code, what it said)."""
    log = tmp_path_factory.mktemp("logs") / "log"

    def run(name, argv, hook=None):
        log.write_text("")
        process = processes.Process(
            target=make.script, args=(name, [str(word) for word in argv], log, hook)
        )
        process.start()
        process.join()
        return process.exitcode, log.read_text()

    return run


@pytest.fixture(scope="module")
def world(tmp_path_factory, run):
    """Return a folder with a dump, a stage 1 and a stage 2 that nobody disturbed."""
    folder = make.world(tmp_path_factory.mktemp("world"), rows=60, rows_per_chunk=35)
    for name, argv in (
        ("stage1_sft", make.stage1(folder, *RUN)),
        ("dump_logits", make.dump(folder, "--tokens-per-microbatch", 40)),
        ("stage2_kd", make.stage2(folder, *RUN)),
    ):
        code, said = run(name, argv)
        assert code == 0, said
    return folder


def assert_same_run(run, straight):
    """Weights and models bit for bit, and every figure ever logged."""
    for name in ("final", "best"):
        assert (run / name / "model.safetensors").read_bytes() == (
            straight / name / "model.safetensors"
        ).read_bytes(), name
    assert make.history(run) == make.history(straight)
    seen, wanted = (files.read_json(folder / "config.json") for folder in (run, straight))
    for name in ("settings", "steps", "updates", "best", "final"):
        assert seen[name] == wanted[name], name
    assert {path.name for path in run.iterdir()} == {path.name for path in straight.iterdir()}, (
        "no half of anything is left"
    )


def assert_same_dump(dump, straight):
    assert (dump / "basis.safetensors").read_bytes() == (
        straight / "basis.safetensors"
    ).read_bytes()
    assert {path.name for path in dump.iterdir()} == {path.name for path in straight.iterdir()}, (
        "no half of anything is left"
    )
    for part in ("chunk-0000", "chunk-0001", "val"):
        assert (dump / part / "topk.npy").read_bytes() == (
            straight / part / "topk.npy"
        ).read_bytes(), part
        assert files.read_json(dump / part / "meta.json") == files.read_json(
            straight / part / "meta.json"
        ), part
        names = {path.name for path in (dump / part).iterdir()} - {
            "settings.json"
        }  # a kill after the last rename leaves it
        assert names == {path.name for path in (straight / part).iterdir()}


ARGUMENTS = {"stage1_sft": make.stage1, "stage2_kd": make.stage2}
STRAIGHT = {"stage1_sft": "stage1", "stage2_kd": "stage2"}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_run_killed_again_and_again_at_any_moment_ends_as_one_left_alone(
    world, run, tmp_path, name
):
    argv, rng, codes = (
        ARGUMENTS[name](world, *RUN, "--out", tmp_path / "run"),
        np.random.default_rng(),
        [],
    )
    for delay in (*rng.uniform(0.01, 0.3, 6), None):
        code, said = run(
            name, argv, delay and dict(where="lib.train.update", number=1, signal=KILL, delay=delay)
        )
        codes.append(code)
        assert code in (0, -KILL), said
    assert codes[-1] == 0 and codes.count(-KILL) >= 1, codes
    assert_same_run(tmp_path / "run", world / STRAIGHT[name])


PLACES = {  # where the kill comes, and the step that the same command goes on from
    "before the first step": (dict(where="lib.train.update", number=1), None),
    "in a step after a save": (dict(where="lib.train.update", number=11), 9),
    "before the renames of last/": (dict(where="os.replace", source="last", number=2), 6),
    "between the two renames of last/": (
        dict(where="os.replace", source=".last.part", number=3),
        6,
    ),
    "after the renames of last/": (
        dict(where="os.replace", source=".last.part", number=4, after=True),
        12,
    ),
    "between the two renames of best/": (
        dict(where="os.replace", source=".best.part", number=2),
        3,
    ),
    "after best/ and before the next save": (
        dict(where="os.replace", source=".best.part", number=2, after=True),
        3,
    ),
    "before final/ is there": (dict(where="os.replace", source=".final.part", number=1), 30),
    "after final/ and before config.json": (
        dict(where="os.replace", source=".final.part", number=1, after=True),
        30,
    ),
    "before config.json is there": (
        dict(where="os.replace", source="run/config.json.part", number=1),
        30,
    ),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_run_killed_at_the_worst_places_goes_on_from_its_last_save_and_ends_as_one_left_alone(
    world, run, tmp_path, place
):
    argv, (hook, step) = make.stage1(world, *RUN, "--out", tmp_path / "run"), PLACES[place]
    assert run("stage1_sft", argv, hook | {"signal": KILL})[0] == -KILL, "the hook must be reached"
    code, said = run("stage1_sft", argv)
    assert code == 0, said
    assert (
        "continues" not in said
        if step is None
        else f"continues {tmp_path / 'run'} at step {step}\n" in said
    ), said
    assert_same_run(tmp_path / "run", world / "stage1")


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_killed_run_loses_its_patience_where_one_left_alone_does(world, run, tmp_path, name):
    more = [
        "--steps",
        20,
        "--eval-every",
        1,
        "--save-every",
        2,
        "--lr",
        make.NO_STEP,  # so that no evaluation is better than the first
        "--patience",
        4,
    ]
    assert run(name, ARGUMENTS[name](world, *more, "--out", tmp_path / "straight"))[0] == 0
    end = files.read_json(tmp_path / "straight/config.json")["stopped_early"]
    assert end == 4
    argv = ARGUMENTS[name](world, *more, "--out", tmp_path / "run")
    for where, number, step in (
        ("lib.train.update", end, None),
        ("os.replace", 1, (end - 1) // 2 * 2),
    ):
        hook = dict(where=where, number=number, signal=KILL) | (
            {"source": ".final.part"} if where == "os.replace" else {}
        )
        code, said = run(name, argv, hook)
        assert code == -KILL and (step is None or f"at step {step}\n" in said), said
    code, said = run(name, argv)  # the state of the last step is saved, and final/ is not there
    assert code == 0 and f"at step {end}\n" in said and f"stopped at step {end} of 20" in said, said
    assert_same_run(tmp_path / "run", tmp_path / "straight")
    assert files.read_json(tmp_path / "run/config.json")["stopped_early"] == end


def test_a_run_killed_while_its_resume_state_is_removed_is_finished(world, run, tmp_path):
    argv = make.stage1(world, *RUN, "--out", tmp_path / "run")
    assert (
        run("stage1_sft", argv, dict(where="shutil.rmtree", source="last", number=1, signal=KILL))[
            0
        ]
        == -KILL
    )
    code, said = run("stage1_sft", argv)
    assert code == 0 and "already finished" in said
    assert (tmp_path / "run" / "final" / "model.safetensors").read_bytes() == (
        world / "stage1" / "final" / "model.safetensors"
    ).read_bytes()


IN_STEP_7, IN_FIRST_EVALUATION = (
    dict(where="lib.train.update", number=8),
    dict(where="lib.evaluate.evaluate", number=1),
)


@pytest.mark.parametrize(
    "name, place, step",
    (
        ("stage1_sft", IN_STEP_7, 8),
        ("stage2_kd", IN_STEP_7, 8),
        ("stage1_sft", IN_FIRST_EVALUATION, 0),
    ),
)
@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGINT))
def test_a_signal_saves_and_leaves_with_its_code_and_the_same_command_goes_on_from_that_step(
    world, run, tmp_path, name, place, step, number
):
    argv = ARGUMENTS[name](world, *RUN, "--out", tmp_path / "run")
    code, said = run(name, argv, place | {"signal": number})
    assert code == 128 + number and f"saved at step {step}; the same command continues" in said, (
        said
    )
    assert files.read_json(tmp_path / "run" / "last" / "state.json")["step"] == step
    code, said = run(name, argv)
    assert code == 0 and f"at step {step}" in said, said
    assert_same_run(tmp_path / "run", world / STRAIGHT[name])


def test_a_dump_killed_again_and_again_ends_as_one_left_alone(world, run, tmp_path):
    argv, killed = make.dump(world, "--tokens-per-microbatch", 40, "--out", tmp_path / "logits"), 0
    for number in (1, 2, 5, 3, 7, None):
        hook = number and dict(
            where="lib.teacher.writer.teacher_records",
            number=number,
            signal=KILL,
            after=number % 2 == 0,
        )
        code, said = run("dump_logits", argv, hook)
        killed += code == -KILL
    assert code == 0 and killed == 5, said
    assert re.search(r"[1-9]\d* of \d+ batches are there", said) or "already finished" in said
    assert_same_dump(tmp_path / "logits", world / "logits")


@pytest.mark.parametrize("after", (False, True))
@pytest.mark.parametrize(
    "source, number", ((".basis.safetensors.part", 1), ("done.npy.part", 1), ("meta.json.part", 2))
)
def test_a_dump_killed_at_the_worst_places_ends_as_one_left_alone(
    world, run, tmp_path, source, number, after
):
    argv = make.dump(world, "--tokens-per-microbatch", 40, "--out", tmp_path / "logits")
    assert (
        run(
            "dump_logits",
            argv,
            dict(where="os.replace", source=source, number=number, after=after, signal=KILL),
        )[0]
        == -KILL
    )
    code, said = run("dump_logits", argv)
    assert code == 0, said
    assert_same_dump(tmp_path / "logits", world / "logits")


def test_a_dump_killed_while_its_basis_is_written_ends_as_one_left_alone(world, run, tmp_path):
    argv = make.dump(world, "--tokens-per-microbatch", 40, "--out", tmp_path / "logits")
    assert (
        run(
            "dump_logits",
            argv,
            dict(where="lib.files.sync", source=".basis.safetensors.part", number=1, signal=KILL),
        )[0]
        == -KILL
    )
    half = tmp_path / "logits" / ".basis.safetensors.part"
    half.write_bytes(half.read_bytes()[:-2000])
    assert not (tmp_path / "logits" / "basis.safetensors").exists()
    code, said = run("dump_logits", argv)
    assert code == 0, said
    assert_same_dump(tmp_path / "logits", world / "logits")


def test_a_dump_killed_between_its_basis_and_its_first_chunk_goes_on_with_that_basis(
    world, run, tmp_path
):
    argv = make.dump(world, "--tokens-per-microbatch", 40, "--out", tmp_path / "logits")
    assert (
        run("dump_logits", argv, dict(where="dump_logits.dump", number=1, signal=KILL))[0] == -KILL
    )
    made = (tmp_path / "logits" / "basis.safetensors").stat().st_mtime_ns
    code, said = run("dump_logits", argv)
    assert code == 0 and (tmp_path / "logits" / "basis.safetensors").stat().st_mtime_ns == made, (
        said
    )
    assert_same_dump(tmp_path / "logits", world / "logits")


def test_dumps_of_several_chunks_at_once_share_one_basis(world, processes, tmp_path):
    log, started = tmp_path / "log", []
    for chunk in (0, 1, "val"):
        argv = make.dump(
            world, "--tokens-per-microbatch", 40, "--out", tmp_path / "logits", "--chunk", chunk
        )
        started.append(
            processes.Process(
                target=make.script, args=("dump_logits", [str(word) for word in argv], log)
            )
        )
        started[-1].start()
    for process in started:
        process.join()
    assert [process.exitcode for process in started] == [0, 0, 0], log.read_text()
    assert len(re.findall(r"^basis .* hold ", log.read_text(), re.M)) == 1, log.read_text()
    assert_same_dump(tmp_path / "logits", world / "logits")


def test_a_signal_saves_a_dump_and_the_same_command_goes_on(world, run, tmp_path):
    argv = make.dump(world, "--tokens-per-microbatch", 40, "--out", tmp_path / "logits")
    code, said = run(
        "dump_logits", argv, dict(where="lib.teacher.writer.teacher_records", number=4, signal=TERM)
    )
    assert code == 143 and "the same command continues" in said
    done = np.load(tmp_path / "logits" / "chunk-0000" / "done.npy")["done"]
    assert 0 < done.sum() < len(done)
    code, said = run("dump_logits", argv)
    assert code == 0 and "4 of " in said
    assert_same_dump(tmp_path / "logits", world / "logits")


def test_a_dump_started_with_other_settings_is_not_continued(world, run, tmp_path):
    argv = make.dump(world, "--tokens-per-microbatch", 40, "--out", tmp_path / "logits")
    run(
        "dump_logits", argv, dict(where="lib.teacher.writer.teacher_records", number=4, signal=TERM)
    )
    code, said = make.ends(dump_logits.main, *argv, "--values", "fp16")
    assert (
        code == 1
        and "was started with other settings; saw values 'u8' (now 'fp16')" in said
        and "--fresh" in said
    )


# --- --keep N


KEEP = ("--steps", 8, "--eval-every", 4, "--save-every", 2, "--keep", 2)


def kept(folder):
    return sorted(path.name for path in (folder / "keep").iterdir())


def test_the_newest_states_are_kept_and_one_of_them_is_gone_back_to(tmp_path, capsys):
    folder = make.world(tmp_path)
    make.call(stage1_sft.main, *make.stage1(folder, *KEEP))
    needed = 4 * 12 + 3 * 4  # bytes a weight: four states and three checkpoints
    assert f"disk: {files.human(needed * 20_544)} needed" in capsys.readouterr().out
    ran, straight = folder / "stage1", folder / "straight"
    assert kept(ran) == ["step-6", "step-8"] and not files.verify(ran, set())[2]
    shutil.copytree(ran, straight)

    (ran / "config.json").unlink()
    shutil.copytree(ran / "keep/step-6", ran / "last")
    shutil.rmtree(ran / "keep/step-6")  # what is kept of a past that we came back from goes
    make.call(stage1_sft.main, *make.stage1(folder, *KEEP))
    assert "at step 6\n" in capsys.readouterr().out
    assert_same_run(ran, straight)
    assert kept(ran) == kept(straight)


def test_states_later_than_the_one_gone_back_to_do_not_push_it_out(tmp_path):
    run = runs.Run.__new__(runs.Run)
    run.out, run.args = tmp_path, make.plan_args(keep=2)
    (tmp_path / "last").mkdir()
    for step in (2, 4, 6, 4):
        (tmp_path / "last/state.json").write_text(str(step))
        (tmp_path / "keep/.new").mkdir(parents=True)  # of a kill
        (tmp_path / "keep/step-of-mine").mkdir(exist_ok=True)
        run._keep(tmp_path / "last", step)
    assert kept(tmp_path) == ["step-4", "step-of-mine"]
    run._keep(tmp_path / "last", 12)
    assert kept(tmp_path) == ["step-12", "step-4", "step-of-mine"]


def test_a_kept_state_is_the_same_files_once_more_or_a_copy_where_a_disk_has_no_links(
    tmp_path, monkeypatch
):
    (tmp_path / "one").write_text("state")
    files.link(tmp_path / "one", tmp_path / "two")
    assert (tmp_path / "two").stat().st_ino == (tmp_path / "one").stat().st_ino

    def none(*_):
        raise OSError(errno.EPERM, "no such thing here")

    monkeypatch.setattr(os, "link", none)
    files.link(tmp_path / "one", tmp_path / "three")
    assert (tmp_path / "three").read_text() == "state"


def test_a_flip_in_a_kept_state_is_noticed_by_verify(tmp_path):
    folder = make.world(tmp_path)
    make.call(stage1_sft.main, *make.stage1(folder, *KEEP))
    path = folder / "stage1/keep/step-6/weights.safetensors"
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    (wrong,) = files.verify(folder / "stage1", set())[2]
    assert "step-6/weights.safetensors is damaged" in wrong
    content = (folder / "stage1/history.jsonl").read_bytes()
    (folder / "stage1/history.jsonl").write_bytes(content.replace(b'"ce"', b'"cf"', 1))
    assert any("history.jsonl is damaged" in line for line in files.verify(folder, set())[2])


# --- what a power cut or a kill leaves


def test_what_a_state_says_of_the_logs_has_reached_the_disk_before_it(tmp_path, monkeypatch):
    folder, order, sync, publish = make.world(tmp_path), [], files.sync, files.publish
    monkeypatch.setattr(files, "sync", lambda path: (order.append(path.name), sync(path)))
    monkeypatch.setattr(files, "publish", lambda *a: (order.append(a[1].name), publish(*a)))
    make.call(stage1_sft.main, *make.stage1(folder, "--steps", 1, "--samples", 1))
    before = order[: order.index("last")]
    assert {"history.jsonl", "samples.md"} <= set(before)
    assert ".last.part" in order[order.index("last") :], "and the folder's own names"


@pytest.mark.parametrize("first", (".last.part", "last"))
def test_fresh_empties_a_folder_where_a_save_was_killed(tmp_path, monkeypatch, first):
    """Whichever of the two the disk lists first."""
    for name in ("last", ".last.part"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text("")
    listed = sorted(tmp_path.iterdir(), key=lambda path: path.name != first)
    monkeypatch.setattr(type(tmp_path), "iterdir", lambda _: iter(listed))
    try:
        files.remove_ours(tmp_path, runs.MARKS)
    except FileNotFoundError:
        pass
    monkeypatch.undo()
    assert not list(tmp_path.iterdir())


def test_what_a_killed_fresh_left_of_any_folder_goes_with_the_next_start(world, tmp_path):
    """make torture: keep/ was renamed to be deleted, and no later run looked there."""
    out = tmp_path / "run"
    for name in ("keep", "tensorboard"):
        (out / f".{name}.part" / "x").mkdir(parents=True)
    make.call(stage1_sft.main, *make.stage1(world, "--steps", 1, "--out", out))
    assert not list(out.glob(".*.part"))
