"""The teacher on disk: what a record holds, what is read back from it, and what is refused."""

import json
import math
import re
import shlex
import shutil
import types

import make
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import dump_logits
from lib import data, evaluate, files, losses, models
from lib.head import Head
from lib.losses import Method
from lib.teacher import basis, logits, record, writer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Return a folder with a data set of three chunks, a teacher, and its full logits (k = V,
    float16) and top 8 (the defaults) on disk."""
    folder = make.world(tmp_path_factory.mktemp("world"), rows=40, rows_per_chunk=16)
    make.call(dump_logits.main, *make.dump(folder, "--k", make.V, "--values", "fp16", out="full"))
    make.call(dump_logits.main, *make.dump(folder))
    return folder


def teacher_logits(folder, batch, name="teacher"):
    """Return the teacher's logits (N, V) in float64 at a batch's targets, by transformers alone,
    one row at a time."""
    module = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float64).eval()
    with torch.no_grad():
        return module(
            input_ids=batch.tokens, position_ids=batch.positions, use_cache=False
        ).logits.flatten(0, 1)[batch.where]


def plain(kept_logits, k, t):
    """Return ids, gaps and the tail of logits (N, V), written out."""
    values, ids = kept_logits.sort(dim=1, descending=True)
    d = values - values[:, :1]
    return ids[:, :k], -d[:, :k], (d[:, k:] / t).logsumexp(1)


def random_records(vocab, k, values="fp16", n=200, spread=6.0, temperatures=(1.0, 2.0)):
    """Return (z (n, 4k) float64, its ids in `vocab`, the records, their dtype)."""
    rng = np.random.default_rng(0)
    z = -np.sort(-spread * rng.standard_normal((n, 4 * k)), axis=1)
    ids = np.stack([rng.choice(vocab, k, replace=False) for _ in range(n)])
    ids[0, :2], ids[1, 0] = (vocab - 1, 0), min(vocab - 1, 1 << 16)
    d = torch.from_numpy(z - z[:, :1])
    tails = torch.stack([(d[:, k:] / t).logsumexp(1) for t in temperatures], 1).numpy()
    dtype = record.record_dtype(k, list(temperatures), vocab, values)
    return d, ids, record.pack(ids, -d[:, :k].numpy(), tails, dtype, vocab), dtype


# --- records


@pytest.mark.parametrize(
    "k, temperatures, values, size",
    ((32, [1, 2, 4], "fp16", 148), (32, [1, 2, 4], "u8", 118), (16, [1], "u8", 58)),
)
def test_a_record_takes_the_bytes_that_the_design_promises(k, temperatures, values, size):
    assert record.record_dtype(k, temperatures, 151_936, values).itemsize == size


def test_a_record_of_the_defaults_takes_197_bytes_at_the_vocabulary_of_qwen():
    args = dump_logits.parse_args(["--data", "data", "--teacher", "teacher", "--out", "logits"])
    assert (args.k, args.temperatures, args.values, args.tail_rank, args.tail_bytes) == (
        16,
        [1, 2, 4],
        "u8",
        None,
        128,
    )
    assert writer.RANK == 512
    assert (
        record.record_dtype(
            args.k, args.temperatures, 151_936, args.values, args.tail_bytes, errors=True
        ).itemsize
        == 197
    )


@pytest.mark.parametrize("vocab", (61, 60_000, 65_536, 65_537, 151_936, 262_144, 300_000))
@pytest.mark.parametrize("k", (1, 7, 16, 33))
@pytest.mark.parametrize("values", ("fp16", "u8"))
def test_ids_gaps_and_tails_come_back_from_a_record(vocab, k, values):
    d, ids, records, _ = random_records(vocab, min(k, 61) if k > 1 else 2, values)
    k = ids.shape[1]
    for column, t in enumerate((1.0, 2.0)):
        kept = record.unpack(records, vocab, column)
        assert (kept.ids.numpy() == ids).all() and kept.ids.dtype == torch.int64
        torch.testing.assert_close(
            kept.tail.double(), (d[:, k:] / t).logsumexp(1), rtol=1e-6, atol=1e-6
        )
        limit = 1e-3 * -d[:, :k] if values == "fp16" else 0.51 / 255 * -d[:, k - 1 : k] + 1e-2
        assert ((kept.gap + d[:, :k]).abs() <= limit + 1e-6).all() and (kept.gap[:, 0] == 0).all()


@pytest.mark.parametrize("values, limit", (("fp16", 1e-5), ("u8", 5e-3)))
@pytest.mark.parametrize("t", (1.0, 2.0))
def test_rounding_of_the_gaps_costs_next_to_no_kl(values, limit, t):
    d, _, records, _ = random_records(151_936, 32, values, n=1000, spread=3.0)
    kept = record.unpack(records, 151_936, int(t) - 1)
    exact = losses.TopK(kept.ids, -d[:, :32], (d[:, 32:] / t).logsumexp(1))
    p, q = (
        losses.teacher_logp(exact, t),
        losses.teacher_logp(losses.TopK(kept.ids, kept.gap.double(), kept.tail.double()), t),
    )
    assert 0 < losses.divergence(p, q, "fkl").mean() < limit


@pytest.mark.parametrize("values", ("fp16", "u8"))
@pytest.mark.parametrize("far", (65_000.0, 1e8, math.inf))
def test_a_gap_beyond_float16_is_held_at_its_end_and_stays_finite(values, far):
    dtype = record.record_dtype(3, [1.0], 61, values)
    records = record.pack(
        np.array([[5, 6, 7]]), np.array([[0.0, 1.0, far]]), np.array([[-200.0]]), dtype, 61
    )
    kept = record.unpack(records, 61, 0)
    assert torch.isfinite(kept.gap).all() and kept.gap[0, 0] == 0 and kept.gap[0, 2] > 50_000
    assert torch.isfinite(losses.teacher_logp(kept, 1.0)).all()


# --- the dump


@pytest.mark.parametrize("rounded, limit", ((True, 1e-6), (False, 1e-4)))
def test_a_teacher_on_disk_equals_the_teacher_live(world, rounded, limit):
    """k = V: a live teacher, its gaps rounded to float16 as on disk, gives the same loss and
    gradient to 1e-6; unrounded, to 1e-4."""
    full = make.store(world, name="full")
    batch = full.dataset.train.batch([[row] for row in (3, 20, 39, 0)])
    ids, gaps, tail = plain(teacher_logits(world, batch).float(), make.V, 2.0)
    live = losses.TopK(ids, gaps.half().float() if rounded else gaps, tail)
    student = models.load(str(world / "student"), CPU)
    seen = []
    for kept in (full.at(batch, 2.0), live):
        hidden = student.hidden(batch).detach().requires_grad_()
        loss = losses.head_loss(hidden, student.head(), batch.labels, kept, Method(0.9, 2.0))[
            0
        ] / len(batch.labels)
        loss.backward()
        seen.append((loss.item(), hidden.grad))
    (disk, disk_grad), (live, live_grad) = seen
    assert (
        live > 0.1
        and abs(disk - live) < 3 * limit * max(1, live)
        and (disk_grad - live_grad).norm() < 10 * limit * live_grad.norm()
    )


@pytest.mark.parametrize("t", (1.0, 2.0, 4.0))
def test_records_hold_the_top_k_and_the_exact_tail_of_the_teachers_own_logits(world, t):
    top = make.store(world, t)
    batch = top.dataset.train.batch([[row] for row in (3, 20, 39, 0)])
    kept, (ids, gaps, tail) = top.at(batch, t), plain(teacher_logits(world, batch), 8, t)
    assert (kept.ids == ids).all()
    assert ((kept.gap - gaps).abs() <= 0.51 / 255 * gaps.amax(1, keepdim=True)).all()  # half a step
    torch.testing.assert_close(kept.tail.double(), tail, rtol=1e-5, atol=1e-5)


def listed(kept):
    return list(zip(*(tensor.tolist() for tensor in (kept.ids, kept.gap, kept.tail))))


def test_trap_22_records_follow_target_numbers_whatever_order_and_packing_the_rows_come_in(world):
    top = make.store(world)
    train = top.dataset.train
    by_number = {}
    for row in range(len(train.rows)):
        batch = train.batch([[row]])
        by_number |= dict(zip(batch.numbers.tolist(), listed(top.at(batch, 2.0))))
    assert sorted(by_number) == list(range(train.targets))
    for lines in ([[39, 0], [17, 16, 15], [2]], [[2, 15], [0], [39, 16, 17]], [[31], [32]]):
        batch = train.batch(lines)
        assert [by_number[n] for n in batch.numbers.tolist()] == listed(top.at(batch, 2.0))


def test_a_dump_does_not_depend_on_the_size_of_its_batches(world, tmp_path):
    make.call(
        dump_logits.main,
        *make.dump(world, "--out", tmp_path, "--tokens-per-microbatch", 40, "--chunk", 1),
    )
    once, again = (
        np.load(folder / "chunk-0001" / "topk.npy") for folder in (world / "logits", tmp_path)
    )
    assert (once["id_low"] == again["id_low"]).all()
    np.testing.assert_allclose(once["tail"], again["tail"], rtol=1e-5, atol=1e-5)


def test_trap_16_a_padded_teacher_is_cut_to_the_students_tokens_before_softmax_and_top_k(
    world, tmp_path
):
    make.model(tmp_path / "padded", seed=2, vocab=70)
    module = AutoModelForCausalLM.from_pretrained(tmp_path / "padded")
    with torch.no_grad():
        module.lm_head.weight[61:] *= (
            10  # what lies above the student's tokens is likely, and must not count
        )
    module.save_pretrained(tmp_path / "padded")
    make.call(
        dump_logits.main,
        *make.dump(
            world,
            "--teacher",
            tmp_path / "padded",
            "--student",
            world / "student",
            "--out",
            tmp_path / "logits",
        ),
    )
    top = logits.Records(tmp_path / "logits", data.Dataset(world / "data"), 2.0)
    assert top.vocab == make.V
    batch = top.dataset.train.batch([[5], [30]])
    z = teacher_logits(tmp_path, batch, "padded")
    assert z.shape[1] == 70 and (z.topk(8, 1).indices >= 61).any()
    kept, (ids, _, tail) = top.at(batch, 2.0), plain(z[:, :61], 8, 2.0)
    assert (kept.ids == ids).all()
    torch.testing.assert_close(kept.tail.double(), tail, rtol=1e-5, atol=1e-5)


def test_trap_24_a_teacher_with_dropout_is_dumped_without_it(world, tmp_path):
    make.model(tmp_path / "teacher", seed=2, attention_dropout=0.5)
    for out in ("once", "again"):
        make.call(
            dump_logits.main,
            *make.dump(
                world, "--teacher", tmp_path / "teacher", "--out", tmp_path / out, "--chunk", 0
            ),
        )
    once, again, without = (
        (folder / "chunk-0000" / "topk.npy").read_bytes()
        for folder in (tmp_path / "once", tmp_path / "again", world / "logits")
    )
    assert once == again == without


@pytest.mark.parametrize("part", ("chunk-0000", "chunk-0002", "val"))
def test_the_teachers_own_score_is_the_models_cross_entropy_and_accuracy(world, part):
    dataset = data.Dataset(world / "data")
    split, rows = (
        (dataset.val, range(8))
        if part == "val"
        else (dataset.train, dataset.chunk_rows(int(part[-1])))
    )
    batch = split.batch([[row] for row in rows])
    z, meta = teacher_logits(world, batch), files.read_json(world / "logits" / part / "meta.json")
    assert meta["teacher_ce"] == pytest.approx(
        torch.nn.functional.cross_entropy(z, batch.labels).item(), rel=1e-5
    )
    assert abs(meta["teacher_acc1"] - (z.argmax(1) == batch.labels).double().mean().item()) < 1e-9


@pytest.mark.parametrize("t", (1.0, 2.0, 4.0))
def test_coverage_is_the_softened_mass_inside_the_top_k(world, t):
    dataset = data.Dataset(world / "data")
    z = teacher_logits(world, dataset.train.batch([[row] for row in dataset.chunk_rows(1)]))
    wanted = torch.softmax(z / t, 1).topk(8, 1).values.sum(1).mean().item()
    assert (
        abs(
            files.read_json(world / "logits" / "chunk-0001" / "meta.json")["coverage"][f"{t:g}"]
            - wanted
        )
        < 1e-4
    )


def test_a_finished_dump_says_so_and_touches_nothing(world, capsys):
    before = {path: path.stat().st_mtime_ns for path in (world / "logits").rglob("*.npy")}
    make.call(dump_logits.main, *make.dump(world))
    assert capsys.readouterr().out.count("already finished; nothing to do") == 4
    assert before == {path: path.stat().st_mtime_ns for path in (world / "logits").rglob("*.npy")}


def test_a_finished_dump_with_other_settings_is_refused(world):
    code, words = make.ends(dump_logits.main, *make.dump(world, "--values", "fp16"))
    assert (
        code == 1
        and "finished with other settings; saw values 'u8' (now 'fp16')" in words
        and "--fresh" in words
    )


# --- the door


def refused(*args, **options):
    with pytest.raises(SystemExit) as end:
        make.store(*args, **options)
    assert isinstance(end.value.code, str) and "\n" not in end.value.code
    return end.value.code


def edit(path, **changes):
    files.write_json(path, json.loads(path.read_text()) | changes)


def test_a_temperature_that_was_not_dumped_is_refused_with_the_list(world):
    words = refused(world, 0.5)
    assert (
        "temperature 0.5 was not dumped" in words
        and "1, 2, 4" in words
        and "--temperature 1," in words
    )


def test_logits_of_other_data_are_refused(mine):
    shutil.rmtree(mine / "data")
    make.dataset(mine / "data", rows=40, rows_per_chunk=16, seed=1)
    assert re.search(
        "dumped from other data; saw data [0-9a-f]{12}; wanted [0-9a-f]{12}.*dump_logits.py",
        refused(mine),
    )


def test_trap_17_logits_of_another_vocabulary_of_the_same_size_are_refused(mine):
    other = make.dataset(mine / "other", maker=make.tokenizer("x")).identities
    edit(
        mine / "data" / "meta.json",
        identities=data.Dataset(mine / "data").identities
        | {name: other[name] for name in ("vocabulary", "tokenizer")},
    )
    assert "dumped from data of another tokenizer" in refused(mine)


def test_a_damaged_record_is_found_by_verify(mine):
    path = mine / "logits" / "chunk-0001" / "topk.npy"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    assert "chunk-0001/topk.npy is damaged" in refused(mine)  # a small file: at the door too
    assert "chunk-0001/topk.npy is damaged" in refused(mine, verify=True) and "--fresh" in refused(
        mine, verify=True
    )


def test_a_topk_file_cut_short_is_refused(mine):
    path = mine / "logits" / "chunk-0001" / "topk.npy"
    path.write_bytes(path.read_bytes()[:-200])
    assert "chunk-0001/topk.npy cannot be read" in refused(mine)


def test_chunks_of_two_teachers_are_refused(mine):
    edit(mine / "logits" / "chunk-0002" / "meta.json", teacher="0" * 64)
    assert "do not belong together" in refused(mine)


def test_missing_chunks_are_named_with_the_lines_that_bring_them_and_their_rows_are_left_out(mine):
    for chunk in (0, 2):
        (mine / "logits" / f"chunk-{chunk:04d}" / "meta.json").unlink()
    some = make.store(mine)
    assert some.missing == [0, 2] and some.chunks == [1]
    argv = some.mend([*some.parts.values()]).split("dump_logits.py ")[1]
    args = dump_logits.parse_args(shlex.split(argv))
    assert (args.data, args.out, args.k) == (str(mine / "data"), str(mine / "logits"), 8)
    assert args.chunk == "all" and args.temperatures == some.temperatures
    assert some.rows().tolist() == list(range(16, 32))
    batch = some.dataset.train.batch([[31], [16]])
    full = make.store(mine, name="full")
    assert (some.at(batch, 2.0).ids == full.at(batch, 2.0).ids[:, :8]).all()


def without(folder, chunk, rows, name="logits"):
    """Dump a chunk again, without records of some of its rows, from the records that there are."""
    part = record.chunk_folder(folder / name, chunk)
    records, done = np.load(part / "topk.npy"), np.load(part / "done.npy")
    meta, dataset = files.read_json(part / "meta.json"), data.Dataset(folder / "data")
    split = dataset.val if chunk == "val" else dataset.train
    names = ("teacher", "teacher_folder", "data", "k", "rows_per_chunk", "temperatures", "values")
    names += ("vocab", "tail_rank", "tail_bytes", "errors", "dtype", "tokens_per_microbatch")
    settings = {name: meta[name] for name in (*names, "basis") if name in meta}
    shutil.rmtree(part)
    part.mkdir()
    every = writer.rows_of(dataset, chunk)
    made = writer.Writer(part, chunk, split, every, settings)
    made.leave_out(rows[:1], "too long")
    made.leave_out(rows[1:], "of other tokens")
    first, counts = split.rows["first_target"], split.rows["targets"]
    for row in np.setdiff1d(every, rows):
        start, one = int(first[row]) - int(first[every[0]]), done[row - every[0]]
        own = records[start : start + counts[row]]
        ce, hits = np.full(len(own), one["ce_sum"] / len(own)), np.arange(len(own)) < one["hits"]
        made.add(np.array([row]), own, ce, hits)
    return made.finish(dataset.identities, dataset.sources)


def test_a_chunk_may_lack_rows_and_they_are_neither_taught_nor_measured(mine, capsys):
    meta = without(mine, 1, np.array([17, 20, 31]))
    assert meta["left_out"] == {"too long": 1, "of other tokens": 2}
    without(mine, "val", np.array([0, 2]))
    some, full = make.store(mine), make.store(mine, name="full")
    assert some.rows().tolist() == [row for row in range(40) if row not in (17, 20, 31)]
    some.say()
    assert "2 rows have no record (too long)" in capsys.readouterr().out
    own = files.read_json(mine / "logits" / "val" / "meta.json")
    dataset = some.dataset
    split, there = dataset.val, [row for row in range(len(dataset.val.rows)) if row not in (0, 2)]
    kept = data.Split.of([(*split.row(row), 0) for row in there])
    assert own["teacher_ce"] == pytest.approx(full.val.done()["ce_sum"][there].sum() / kept.targets)
    assert some.val_measures()["targets"] == kept.targets
    model = models.load(str(mine / "student"), CPU)
    model = some.join(model, types.SimpleNamespace(student="student"), None)

    class OfKept:
        """The same records, by the rows that there are."""

        compares = True

        def val_at(self, batch, t):
            return some.val_at(split.batch([[there[row]] for row in batch.rows]), t)

    measured = evaluate.measure(model, split, some.vocab, 64, teacher=some)
    wanted = evaluate.measure(model, kept, some.vocab, 64, teacher=OfKept())
    assert wanted["kl"] > 0.1 and measured["targets"] == split.targets
    for name in ("kl", "rkl", "agree"):
        assert measured[name] == pytest.approx(wanted[name], rel=1e-5)


def test_a_row_that_is_missing_and_not_left_out_ends_no_chunk(mine):
    with pytest.raises(AssertionError, match="rows are missing"):
        part = record.chunk_folder(mine / "logits", 1)
        meta = files.read_json(part / "meta.json")
        dataset, settings = data.Dataset(mine / "data"), {**meta}
        shutil.rmtree(part)
        part.mkdir()
        made = writer.Writer(part, 1, dataset.train, writer.rows_of(dataset, 1), settings)
        made.leave_out(made.rows[1:], "too long")
        made.finish(dataset.identities, [])


def test_a_folder_without_one_finished_chunk_is_refused(mine):
    for chunk in range(3):
        (mine / "logits" / f"chunk-{chunk:04d}" / "meta.json").unlink()
    words = refused(mine)
    assert (
        "holds no finished chunk" in words and "dump_logits.py" in words and "--teacher " in words
    )
    assert make.store(mine, temperature=None).compares


def test_a_missing_folder_is_refused(world):
    assert "nowhere is missing; mend it with: " in refused(world, name="nowhere")


def test_the_basis_does_not_outweigh_small_data(world, capsys):
    """262,144 tokens and 2,200 targets: 203 MB of basis for 0.43 MB of records it was."""
    dataset, head = data.Dataset(world / "data"), Head(torch.empty(262144, 640), None, 262144)
    args = dump_logits.parse_args(["--data", "d", "--teacher", "t", "--out", "o"])
    rank = writer.rank_that_fits(args, dataset, head)
    assert 0.9 * writer.SMALL_BASIS < basis.file_bytes(rank, 262144, 640) <= writer.SMALL_BASIS
    teacher = types.SimpleNamespace(apart=(), head=lambda: head)
    settings = writer.dump_settings(args, dataset, "hash", teacher, torch.float32)
    assert settings["tail_rank"] == rank and f"rank {rank} and not 512" in capsys.readouterr().out
    args.tail_rank = 512
    settings = writer.dump_settings(args, dataset, "hash", teacher, torch.float32)
    assert settings["tail_rank"] == 512, "what was asked for is not lowered"
    many = types.SimpleNamespace(targets=10**6)
    dataset.train = dataset.val = many
    assert writer.rank_that_fits(args, dataset, head) > 512
