"""--track: what TensorBoard's own reader, and wandb's, find is what history.jsonl holds, each step
once, killed or not."""

import importlib.machinery
import importlib.util
import json
import struct
import sys
import types

import make
import pytest

import dump_logits
import stage1_sft
import stage2_kd
from lib import files
from lib.measure import plots
from lib.options import track

SMALL = ("--steps", 6, "--eval-every", 2, "--save-every", 3, "--track")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = make.sourced(
        make.world(tmp_path_factory.mktemp("world"), rows=30, val=4), names=("news", "code")
    )
    make.call(dump_logits.main, *make.dump(folder))
    return folder


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(plots, "curves", lambda *_: None)


def crash(monkeypatch, script, argv, at=5):
    """Run a script that falls over in its `at`-th update, with log lines that no saved state knows
    of."""
    updates = []
    with monkeypatch.context() as patch:
        plain = script.train.update
        patch.setattr(
            script.train,
            "update",
            lambda *args: (
                plain(*args)
                if len(updates) < at - 1 and not updates.append(0)
                else sys.exit("killed")
            ),
        )
        assert make.ends(script.main, *argv) == (1, "killed")


def due(run):
    """Return {name: [(step, number)]} as history.jsonl has it, by names written out here."""
    found = {}
    for line in make.history(run):
        event, step = line.pop("event"), line.pop("step")
        for name, value in line.items():
            for measure in ("ce", "kl"):
                name = name.replace(f"{measure}_news", f"{measure}_by_source/news").replace(
                    f"{measure}_code", f"{measure}_by_source/code"
                )
            found.setdefault(f"{event}/{name}", []).append((step, value))
    return found


def tensorboard_of(run):
    """Return the same as TensorBoard's reader finds it, and the settings' text."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    found = {
        name: [(event.step, event.value) for event in reader.Scalars(name)]
        for name in reader.Tags()["scalars"]
    }
    (text,) = reader.Tensors("settings/text_summary")
    timed = {f"train/{name}" for name in make.TIMES}
    return {
        name: points for name, points in found.items() if name not in timed
    }, text.tensor_proto.string_val[0]


def assert_same_points(seen, wanted):
    assert seen.keys() == wanted.keys() and "eval/ce_by_source/news" in seen
    for name, points in wanted.items():
        assert [step for step, _ in seen[name]] == [step for step, _ in points], name
        assert [value for _, value in seen[name]] == pytest.approx(
            [value for _, value in points], rel=1e-6
        ), name


@pytest.mark.parametrize("script, arguments", ((stage1_sft, make.stage1), (stage2_kd, make.stage2)))
def test_tensorboard_holds_the_history_each_step_once_though_the_run_was_killed(
    world, tmp_path, monkeypatch, script, arguments
):
    argv = arguments(world, *SMALL, "tensorboard", "--out", tmp_path / "run")
    crash(monkeypatch, script, argv)
    assert files.read_json(tmp_path / "run/last/state.json")["step"] == 3
    make.call(script.main, *argv)
    seen, text = tensorboard_of(tmp_path / "run")
    assert_same_points(seen, due(tmp_path / "run"))
    assert [step for step, _ in seen["train/loss"]] == [*range(6)] and [
        step for step, _ in seen["eval/ce"]
    ] == [0, 2, 4, 6]
    assert ("teacher/ce" in seen) == (script is stage2_kd) and b"    lr: 0.01" in text


def test_tracking_may_begin_when_a_run_is_continued_and_fresh_forgets_what_was_tracked(
    world, tmp_path, monkeypatch
):
    argv = make.stage1(world, *SMALL[:-1], "--out", tmp_path / "run")
    crash(monkeypatch, stage1_sft, argv)
    make.call(stage1_sft.main, *argv, "--track", "tensorboard")
    assert_same_points(tensorboard_of(tmp_path / "run")[0], due(tmp_path / "run"))
    make.call(stage1_sft.main, *argv, "--fresh", "--steps", 1, "--track", "tensorboard")
    assert_same_points(tensorboard_of(tmp_path / "run")[0], due(tmp_path / "run"))
    assert [step for step, _ in tensorboard_of(tmp_path / "run")[0]["eval/ce"]] == [0, 1]
    make.call(stage1_sft.main, *argv, "--fresh", "--steps", 1)
    assert not (tmp_path / "run/tensorboard").exists()


@pytest.mark.parametrize("package", track.PACKAGES)
def test_a_package_that_is_missing_is_one_line_before_anything_is_written(
    world, tmp_path, monkeypatch, package
):
    monkeypatch.setitem(sys.modules, package, None)
    code, said = make.ends(
        stage1_sft.main, *make.stage1(world, "--track", package, "--out", tmp_path / "run")
    )
    assert (
        code == 1
        and said
        == f"error: --track {package} needs {package}; saw no such package; mend it with: pip"
        f" install {package}"
    )
    assert not (tmp_path / "run").exists()


def test_nothing_is_imported_that_was_not_asked_for(world, tmp_path, monkeypatch):
    for package in (*track.PACKAGES, "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, package, None)  # to import one is an error
    make.call(stage1_sft.main, *make.stage1(world, "--steps", 1, "--out", tmp_path / "run"))


def test_what_wandb_is_told_and_that_a_continued_run_is_the_same_run_there(
    world, tmp_path, monkeypatch
):
    calls, logged = [], []
    fake = types.ModuleType("wandb")
    fake.__spec__, fake.errors = (
        importlib.machinery.ModuleSpec("wandb", None),
        types.SimpleNamespace(Error=ZeroDivisionError),
    )
    there = types.SimpleNamespace(
        log=lambda values, step: logged.append((step, values)),
        finish=lambda: logged.append("finished"),
    )
    fake.init = lambda **options: calls.append(options) or there
    monkeypatch.setitem(sys.modules, "wandb", fake)
    argv = make.stage1(world, *SMALL, "wandb", "--out", tmp_path / "demo/stage1")
    crash(monkeypatch, stage1_sft, argv)
    make.call(stage1_sft.main, *argv)
    first, second = calls
    assert (
        first["id"] == second["id"]
        and len(first["id"]) == 8
        and first["resume"] == second["resume"] == "allow"
    )
    assert (first["project"], first["name"], first["dir"]) == (
        "demo",
        "stage1",
        tmp_path / "demo/stage1",
    ) and first["config"]["lr"] == 0.01
    assert logged[-1] == "finished" and logged.count("finished") == 1
    steps = [
        (step, sorted(name.split("/")[0] for name in values)[0]) for step, values in logged[:-1]
    ]
    lost = [
        (3, "train"),
        (4, "eval"),
    ]  # to the saved state, not to wandb, which leaves out steps that it has
    kept = [(0, "eval"), (0, "train"), (1, "train"), (2, "eval"), (2, "train")]
    assert steps == kept + lost + lost + [(4, "train"), (5, "train"), (6, "eval")]
    make.call(stage1_sft.main, *argv, "--fresh")
    assert calls[2]["id"] != first["id"]

    fake.init = lambda **_: 1 / 0
    code, said = make.ends(stage1_sft.main, *argv, "--fresh")
    assert (
        code == 1
        and "wandb does not start; saw division by zero" in said
        and "WANDB_MODE=offline" in said
    )


def records(path):
    """Yield the records of a .wandb file: 7 bytes, then blocks of 32 KiB with pieces of (crc u32,
    length u16, type u8: 1 whole, 4 last)."""
    raw, at, whole = path.read_bytes(), 7, b""
    while at < len(raw):
        if at % 32768 > 32768 - 7:  # no piece's head fits
            at += -at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", raw, at)
        whole += raw[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield whole
            whole = b""


def wandb_of(run):
    """Return [(step, {name: number})] of all sessions that wandb kept on this machine, in order,
    and the runs' names and ids."""
    from wandb.proto import wandb_internal_pb2

    found, runs = [], set()
    for path in sorted((run / "wandb").glob("offline-run-*/*.wandb")):
        for data in records(path):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.run.run_id:
                runs.add((record.run.project, record.run.display_name, record.run.run_id))
            items = {
                item.key or ".".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            if items:
                found.append(
                    (
                        record.history.step.num,
                        {name: value for name, value in items.items() if not name.startswith("_")},
                    )
                )
    return found, runs


@pytest.mark.skipif(
    importlib.util.find_spec("wandb") is None, reason="wandb is not installed (pip install wandb)"
)
def test_wandb_offline_holds_the_history_as_one_run_though_it_was_killed(
    world, tmp_path, monkeypatch
):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    argv = make.stage1(world, *SMALL, "wandb", "--out", tmp_path / "demo/stage1")
    crash(monkeypatch, stage1_sft, argv)
    import wandb

    wandb.finish()  # what the end of a process does
    make.call(stage1_sft.main, *argv)
    found, runs = wandb_of(tmp_path / "demo/stage1")
    ((project, name, number),) = runs
    assert (project, name) == ("demo", "stage1") and len(number) == 8
    for name, points in due(tmp_path / "demo/stage1").items():
        seen = {
            step: values[name] for step, values in found if name in values
        }  # the second session logs two steps once more
        assert seen == dict(points), name
