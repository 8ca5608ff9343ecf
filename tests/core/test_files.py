"""Damaged files are noticed, and foreign ones refused in one line: whatever happens to a file of
ours, nobody trains on it in silence, and nothing ends in a traceback."""

import json
import shutil
import zlib

import damage
import make
import numpy as np
import pytest
from safetensors.torch import load_file

import dump_logits
import prepare_data
import stage1_sft
import stage2_kd
from lib import data, files, run
from lib.measure import compare, panels, plots, results, runs

RUN = ("--steps", 4, "--eval-every", 2, "--save-every", 2)
NOT_COVERED = ("samples.md", "README.md", ".lock")  # for people: no program reads them


class Killed(Exception):
    """What ends a run after a save, as a kill would."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return a folder with everything in it: data, logits, a run that was killed, a finished one
    and its evaluation."""
    folder = make.world(tmp_path_factory.mktemp("whole"), rows=24, rows_per_chunk=16)
    meta = folder / "data" / "meta.json"
    told = files.read_json(meta)
    meta.unlink()
    files.write_json(meta, told | {"checksums": files.checksums(folder / "data")})
    make.call(dump_logits.main, *make.dump(folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "curves", lambda *_: None)
        make.call(stage2_kd.main, *make.stage2(folder, *RUN, out="runs/stage2"))
        argv = make.stage2(folder, "--eval-only", out="runs/stage2-eval")
        make.call(stage2_kd.main, *argv, "--student", folder / "runs/stage2")
        save = run.Run.save

        def killed(self, step, *more):
            save(self, step, *more)
            if step:
                raise Killed

        patch.setattr(run.Run, "save", killed)
        with pytest.raises(Killed):
            make.call(stage1_sft.main, *make.stage1(folder, *RUN, out="runs/half"))
    return folder


@pytest.fixture
def world(whole):
    """Return the same folder, whose files a test may break: they are mended afterwards. (A copy
    would be another run: its paths are among its settings.)"""
    there = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    yield whole
    for path in set(whole.rglob("*")) - set(there):
        if path.is_file():
            path.unlink()
    for path, content in there.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def said(main, *argv):
    """Return the one line that a script ends with, or "" where it goes to its end."""
    try:
        make.call(main, *argv)
    except SystemExit as end:
        words = end.code if isinstance(end.code, str) else ""
        assert "\n" not in words and (not end.code or words.startswith("error: ")), words
        return words
    return ""


def refusal(door, *args):
    """Return the one line that a reader refuses by, or ""."""
    try:
        door(*args)
    except SystemExit as end:
        assert isinstance(end.code, str) and "\n" not in end.code, end.code
        return end.code
    return ""


def opened(world):
    """Open the data as every script does."""
    return refusal(lambda: data.Dataset(world / "data").check_tokens(61, world))


def stored(world):
    """Open the logits as stage 2 does, and read of them."""

    def read():
        records = make.store(world)
        records.identity(), records.val_measures(), records.say()
        records.at(records.dataset.train.batch([[3], [20]]), 2.0)

    return refusal(read)


def resumed(world):
    return said(stage1_sft.main, *make.stage1(world, *RUN, out="runs/half"))


def trained(world, *more):
    return said(stage2_kd.main, *make.stage2(world, *RUN, *more, out="runs/new"))


def dumped(world, *more):
    return said(dump_logits.main, *make.dump(world, *more))


def covered(folder):
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in NOT_COVERED and path.parts[-2] != "student"
    ]


# --- checksums


def test_every_flip_in_every_file_is_noticed_by_verify(whole):
    rng, counts = np.random.default_rng(0), {}
    for top in ("data", "logits", "runs"):
        for path in covered(whole / top):
            good = path.read_bytes()
            for _ in range(6 if path.suffix == ".json" else 2):
                what = damage.flip(path, rng)
                _, _, wrong = files.verify(whole / top, set())
                path.write_bytes(good)
                assert wrong, (path, what)
                counts[path.name] = counts.get(path.name, 0) + 1
        assert not files.verify(whole / top, set())[2]
    assert {"meta.json", "topk.npy", "basis.safetensors", "state.json"} <= set(counts), counts


def test_verify_as_a_command_says_what_is_damaged_and_exits_with_1(world, capsys):
    folders = [str(world / name) for name in ("data", "logits", "runs")]
    with pytest.raises(SystemExit) as end:
        files.main(folders)
    assert not end.value.code and "0 damaged" in capsys.readouterr().out
    damage.flip(world / "data/val.tokens.npy", np.random.default_rng(0))
    with pytest.raises(SystemExit) as end:
        files.main(folders)
    assert end.value.code and "val.tokens.npy is damaged" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, door",
    (
        ("data/train.tokens.npy", opened),
        ("data/train.tokens.npy", trained),
        ("data/val.answer.npy", opened),
        ("data/val.answer.npy", dumped),
        ("data/tokenizer/tokenizer.json", opened),
        ("data/meta.json", opened),
        ("logits/chunk-0001/topk.npy", stored),
        ("logits/chunk-0001/topk.npy", dumped),
        ("logits/val/done.npy", stored),
        ("logits/basis.safetensors", stored),
        ("logits/val/meta.json", stored),
        ("runs/half/last/weights.safetensors", resumed),
        ("runs/half/last/optimizer.safetensors", resumed),
        ("runs/half/last/state.json", resumed),
        ("runs/half/history.jsonl", resumed),
    ),
)
def test_a_flip_is_refused_at_the_door(world, name, door):
    path, rng = world / name, np.random.default_rng(1)
    good = path.read_bytes()
    for _ in range(10 if door in (opened, stored) else 1):
        damage.flip(path, rng)
        words = door(world)
        assert path.stem in words, words
        path.write_bytes(good)


def test_weights_of_a_checkpoint_are_refused_and_its_other_files_named(world, capsys):
    best = world / "runs/stage2/best"
    settings = files.read_json(best / "generation_config.json")
    files.write_json(best / "generation_config.json", settings | {"max_length": 7})
    student = ("--student", world / "runs/stage2", "--eval-only")
    assert not trained(world, *student)
    assert "changed since it was written: generation_config.json" in capsys.readouterr().out
    damage.flip(best / "model.safetensors", np.random.default_rng(0))
    assert "model.safetensors is damaged" in trained(world, *student)


def test_of_a_large_file_samples_are_looked_at_and_all_of_it_by_verify(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "BLOCK", 16)
    monkeypatch.setattr(files, "WHOLE_UP_TO", 100)
    path = tmp_path / "large"
    path.write_bytes(bytes(range(256)) * 4)
    known = files.sums(path)
    assert known["bytes"] == 1024 and known["crc32"][:8] == f"{zlib.crc32(bytes(range(16))):08x}"
    with open(path, "r+b") as file:
        file.seek(512)
        file.write(b"\xff")
    seen = [files.damage(path, known) for _ in range(200)]
    assert None in seen and "another checksum at byte 512" in seen
    assert files.damage(path, known, whole=True) == "another checksum at byte 512"


def test_an_edit_by_hand_is_refused_with_what_to_do_and_done_so_it_is_read(world):
    path = world / "data/meta.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
    words = opened(world)
    assert "meta.json is damaged" in words and '"seal": null' in words
    lines = path.read_text().splitlines()
    lines[-2] = '  "seal": null'
    path.write_text("\n".join(lines))
    assert not opened(world)


def test_folders_without_checksums_are_read_with_one_line_each(world, capsys):
    for path in [world / "data/meta.json", *(world / "logits").glob("*/meta.json")]:
        unsealed(path)
    assert not stored(world)
    assert capsys.readouterr().out.count("has no checksums") == 2
    with pytest.raises(SystemExit):
        files.main([str(world / "data")])
    assert "has no checksums" in capsys.readouterr().out


# --- what contradicts itself, also where there are no checksums


def half_zeros(rows, answer, tokens):
    rows[len(rows) // 2 :] = 0


def target_at_0(rows, answer, tokens):
    row = rows[2]
    answer[int(row["start"])], answer[int(row["start"] + row["length"]) - 1] = True, False


def target_more(rows, answer, tokens):
    row = rows[2]
    answer[int(row["start"]) + 1 : int(row["start"] + row["length"])] = True


def token_beyond(rows, answer, tokens):
    tokens[5] = 61


CONTRADICTIONS = {
    half_zeros: "do not fit together",
    target_at_0: "first token of its row",
    target_more: "another number of targets",
    token_beyond: "holds tokens that",
}


@pytest.mark.parametrize("change", CONTRADICTIONS)
def test_data_that_contradicts_itself(tmp_path, change):
    (make.world if change is token_beyond else make.dataset)(
        tmp_path if change is token_beyond else tmp_path / "data", rows=24, rows_per_chunk=16
    )
    parts = [tmp_path / f"data/train.{name}.npy" for name in ("rows", "answer", "tokens")]
    arrays = [np.load(path) for path in parts]
    change(*arrays)
    for path, array in zip(parts, arrays):
        np.save(path, array)
    assert CONTRADICTIONS[change] in opened(tmp_path)
    if change is token_beyond:  # which the model's size alone tells
        assert "holds tokens that" in said(stage1_sft.main, *make.stage1(tmp_path, *RUN))


@pytest.mark.parametrize("part", ("tokens", "answer", "rows"))
def test_arrays_without_an_axis_or_with_two(tmp_path, part):
    path = tmp_path / f"val.{part}.npy"
    make.dataset(tmp_path)
    array = np.load(path)
    for other in (array[0].copy().reshape(()), array[:, None]):
        np.save(path, other)
        with pytest.raises(SystemExit, match="another kind of array; saw .* of shape"):
            data.Dataset(tmp_path)
        damage.mutate_npy(path, np.random.default_rng(0))


def test_any_damage_to_an_arrays_header_is_one_line(tmp_path):
    """Without checksums; numpy parses it as Python, by more than one of Python's parsers."""
    path, rng = tmp_path / "x.npy", np.random.default_rng(0)
    np.save(path, np.zeros(40, data.ROW))
    good, seen = path.read_bytes(), 0
    for n in range(1, 250):
        end = min(n + int(rng.integers(1, 90)), len(good))
        for filler in (b"\0", b"(", b"'", b"9", b" ", b"\n "):
            path.write_bytes(good[:n] + (filler * (end - n))[: end - n] + good[end:])
            seen += bool(refusal(files.read_npy, path, data.ROW))
    assert seen > 1000


@pytest.mark.parametrize("dtype", (np.float64, ">u4", np.int32, np.uint64))
def test_arrays_of_another_dtype_or_byte_order(tmp_path, dtype):
    made = make.dataset(tmp_path)
    np.save(tmp_path / "val.tokens.npy", made.val.tokens.astype(dtype))
    with pytest.raises(SystemExit, match="val.tokens.npy holds another kind of array; saw"):
        data.Dataset(tmp_path)


def unsealed(path, **changes):
    told = files.read_json(path) | changes
    files.write_json(path, {k: v for k, v in told.items() if k not in ("seal", "checksums")})


@pytest.mark.parametrize(
    "changes", ({"temperatures": [1.0, 2.0]}, {"values": "fp16"}, {"k": 7}, {"tail_bytes": 9})
)
def test_records_that_are_not_what_meta_json_says(world, changes):
    unsealed(world / "logits/val/meta.json", **changes)
    with pytest.raises(SystemExit, match="topk.npy holds another kind of array"):
        make.store(world)


def test_a_chunk_under_another_number_and_tokens_beyond_v(world):
    unsealed(world / "logits/chunk-0001/meta.json")
    path = world / "logits/chunk-0001/topk.npy"
    records = np.load(path)
    records["id_low"][3, 2] = 61
    np.save(path, records)
    with pytest.raises(SystemExit, match="what no teacher says; saw token 61 of 61"):
        make.store(world)
    shutil.rmtree(world / "logits/chunk-0001")
    shutil.copytree(world / "logits/chunk-0000", world / "logits/chunk-0001")
    with pytest.raises(SystemExit, match="chunk-0001 holds another chunk; saw 0; wanted 1"):
        make.store(world)


# --- dump_logits.py --verify N


def test_the_teacher_scores_its_records_again(world, capsys):
    assert not dumped(world, "--verify")
    assert not dumped(world, "--verify", 10**6)
    shown = capsys.readouterr().out
    assert shown.count("same likeliest token 100.0%") == 3 and "is in order" in shown
    # T=1's tail where T=2's belongs, with checksums that fit
    path = world / "logits/chunk-0001/topk.npy"
    records = np.load(path)
    records["tail"][7, 1] = records["tail"][7, 0]
    np.save(path, records)
    meta = path.with_name("meta.json")
    told = files.read_json(meta)
    told["checksums"]["topk.npy"] = files.sums(path)
    files.write_json(meta, told)
    before = meta.read_bytes()
    assert not dumped(world, "--verify")
    words = dumped(world, "--verify", 10**6)
    assert "records are not what the teacher says" in words and "chunk-0001" in words
    assert meta.read_bytes() == before and words.startswith("error: ")


# --- JSON against a schema


def test_a_schema_names_what_does_not_fit():
    schema = {"k": range(1, 99), "mix?": (str, None), "at?": [{"x": float}], "of?": {...: {1, "a"}}}
    good = {"k": 16, "mix": None, "at": [{"x": 1}, {"x": 0.5, "y": []}], "of": {"p": "a"}}
    assert files.misfit(good, schema) is None and files.misfit({"k": 1}, schema) is None
    for bad, words in (
        ({}, "no k"),
        ({"k": True}, "k: 'True'"),
        ({"k": 99}, "k: '99'"),
        ({"k": "16"}, "k: '16'"),
        ({"k": 1, "mix": 3}, "mix: '3'"),
        ({"k": 1, "at": [{"x": float("nan")}]}, "at.0.x: 'nan'"),
        ({"k": 1, "at": [{"x": 10**400}]}, "at.0.x: '1000"),
        ({"k": 1, "at": {}}, "at: '{}'"),
        ({"k": 1, "of": {"p": []}}, "of.p: '[]'"),
        ([], "it: '[]'"),
        (None, "it: 'None'"),
    ):
        assert words in files.misfit(bad, schema)[0], (bad, files.misfit(bad, schema))


@pytest.mark.parametrize(
    "content",
    (b"", b"[]", b"3", b"[" * 10**5, b"1" * 5000, b"\xff\xfe", b"nul", b"{", b'{"a": 1}{'),
)
def test_json_that_is_none(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(SystemExit, match="x.json is not readable JSON") as end:
        files.read_json(tmp_path / "x.json")
    assert "\n" not in end.value.code


DOORS = {
    "data/meta.json": opened,
    "data/train.rows.npy": opened,
    "data/train.answer.npy": opened,
    "logits/chunk-0000/meta.json": stored,
    "logits/val/topk.npy": stored,
    "logits/basis.safetensors": stored,
}


@pytest.mark.parametrize("sealed", (True, False))
@pytest.mark.parametrize("name", DOORS)
def test_mutations_of_our_own_files_end_in_one_line(world, name, sealed):
    path, rng = world / name, np.random.default_rng(3)
    for other in () if sealed else [world / "data/meta.json", *world.glob("logits/*/meta.json")]:
        unsealed(other)
    good = path.read_bytes()
    for _ in range(12):
        what = damage.damage(path, rng)
        words = DOORS[name](world)  # a traceback would end the test
        assert words or not sealed, what
        path.write_bytes(good)


def test_mutations_of_a_resume_state_without_checksums_end_in_one_line(world):
    last, rng = world / "runs/half/last", np.random.default_rng(4)
    unsealed(last / "state.json")
    for _ in range(20):
        good = (last / "state.json").read_bytes()
        damage.damage(last / "state.json", rng)
        refusal(files.read_json, last / "state.json", None, run.RESUME_STATE)
        (last / "state.json").write_bytes(good)
    for path in (last / "weights.safetensors", last / "optimizer.safetensors"):
        good = path.read_bytes()
        wanted = {name: tensor.shape for name, tensor in load_file(path).items()}
        for _ in range(40):
            what = damage.damage(path, rng)
            words = refusal(run.read_tensors, path, wanted)
            assert words or not any(part in what for part in ("shape", "gone", "cut", "LFS")), what
            path.write_bytes(good)


def test_mutations_of_what_reports_read_end_in_one_line(world, monkeypatch):
    monkeypatch.setattr(panels, "png", lambda *_: None)
    rng = np.random.default_rng(5)
    for name in ("stage2/config.json", "stage2/history.jsonl", "stage2-eval/eval.json"):
        path = world / "runs" / name
        if path.suffix == ".json":
            unsealed(path)
        good = path.read_bytes()
        for _ in range(3):
            damage.damage(path, rng)
            said(runs.main, world / "runs", "--json")
            said(compare.main, world / "runs", "--out", world / "comparison")
            path.write_bytes(good)


@pytest.mark.parametrize(
    "name, change",
    (
        ("tokenizer.json", {"model": {}}),
        ("tokenizer.json", {"added_tokens": [{"id": "x"}]}),
        ("tokenizer_config.json", {"unk_token": ["<unk>"]}),
        ("config.json", {"hidden_size": "\0"}),
        ("config.json", {"quantization_config": [1]}),
    ),
)
def test_a_models_own_json_that_no_library_reads_is_one_line(tmp_path, name, change):
    """Each of the libraries has exceptions of its own."""
    folder = make.world(tmp_path)
    path = folder / "student" / name
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert "student" in said(stage1_sft.main, *make.stage1(folder, *RUN, "--steps", 1))


def test_lines_of_answers_that_no_script_wrote(tmp_path):
    for value in ({"scores": 1e308}, {"messages": ["x"]}, {"logp": 3}, {"answer": None}):
        (tmp_path / "answers.jsonl").write_text(json.dumps(value) + "\n")
        with pytest.raises(SystemExit, match="answers.jsonl holds what no script of ours wrote"):
            results.answers_in(tmp_path)


# --- odd --out


def test_reports_from_inside_the_folder(world, monkeypatch, capsys):
    monkeypatch.chdir(world / "runs/stage2-eval")
    compare.main([".", "--out", str(world / "comparison")])
    monkeypatch.chdir(world / "runs/stage2")
    runs.main(["."])
    assert "stage2" in capsys.readouterr().out


@pytest.mark.parametrize("name", ("file", "file/below", "loop/x", "\udcff", "x" * 250, "a\0b"))
def test_an_out_that_cannot_be_is_refused_first(tmp_path, name):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    out = tmp_path / name
    nowhere = tmp_path / "nowhere"  # before anything is read
    for main, argv in (
        (prepare_data.main, ["--source", nowhere, "--tokenizer", nowhere]),
        (stage1_sft.main, ["--data", nowhere, "--student", nowhere]),
        (dump_logits.main, ["--data", nowhere, "--teacher", nowhere]),
        (stage2_kd.main, ["--data", nowhere, "--student", nowhere, "--logits", nowhere]),
    ):
        assert "--out" in said(main, *argv, "--out", out)
    if name != "file":
        with pytest.raises(SystemExit, match="cannot be written"):
            files.check_out(out, file=True)
