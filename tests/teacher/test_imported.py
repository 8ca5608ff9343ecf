"""Other tools' dumps as our records (dump_logits.py --import): each format's bytes, written here by
its published layout, against the divergence that its own numbers give in float64."""

import json
import math
import os
import random
import signal
import sys
import types

import make
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import dump_logits
import stage2_kd
from lib import data, files, losses
from lib.teacher import foreign, imported, logits, record, truncated

K, ROWS, VAL = 8, 40, 6
FORMS = ["easydistill", "axolotl", "distillkit", "verl"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make.world(tmp_path_factory.mktemp("imported"), rows=ROWS, val=VAL, rows_per_chunk=25)


@pytest.fixture(scope="module")
def told(folder):
    """What a teacher says of each row of train, then of val: (ids, answer mask, the top K ids and
    log-probabilities at each place but the first: of the token there; all logits)."""
    module, dataset = AutoModelForCausalLM.from_pretrained(folder / "teacher"), open_data(folder)
    found = []
    for split in (dataset.train, dataset.val):
        for row in range(len(split.rows)):
            ids, answer = split.row(row)
            with torch.no_grad():
                z = module(torch.tensor(ids.astype(np.int64))[None]).logits[0].double()
            best = z.log_softmax(-1)[:-1].topk(K)
            top, logp = best.indices.numpy(), best.values.numpy().astype(np.float32)
            row = ids.astype(int).tolist(), np.array(answer), top, logp.astype(float), z[:-1]
            found.append(row)
    return found


def open_data(folder):
    return data.Dataset(folder / "data")


# --- what each tool writes


def easydistill(row):
    """Its infer.py: of each generated token {id: probability}, greedily, on behind the end. Here
    the token that is there has to be the likeliest, as it is where greedy decoding wrote it."""
    ids, answer, top, logp, _ = row
    entries = []
    for place in np.flatnonzero(answer):
        names, values = top[place - 1].tolist(), logp[place - 1].tolist()
        if ids[place] in names:  # the token itself first, as the likeliest
            at = names.index(ids[place])
            names[0], names[at] = names[at], names[0]
        else:
            names[0] = ids[place]
        entries.append({str(id): math.exp(value) for id, value in zip(names, values)})
    return [*entries, {"7": 0.9, "8": 0.05}, {"9": 1.0}]


def axolotl(row, lead=1):
    ids, answer, top, logp, _ = row
    names, values, none = top.tolist(), logp.tolist(), ([*range(K)], [-math.inf] * K)
    names = [*names, none[0]] if lead else [none[0], *names]
    values = [*values, none[1]] if lead else [none[1], *values]
    labels = [id if own else -100 for id, own in zip(ids, answer.tolist())]
    return {
        "input_ids": ids,
        "labels": labels,
        "target_token_ids": names,
        "target_logprobs": values,
        "target_mask": [[int(own)] * K for own in answer.tolist()],
    }


CONFIG = {
    "d": make.V + 1,
    "k": K,
    "exact_k": K,
    "exact_dtype": "float32",
    "polynomial_terms": None,
    "residual_bins": [],
    "delta_encoding": False,
}


def bit_packed(numbers, bits):
    """Return numbers (n, count) as bytes (n, B), highest bit first."""
    single = numbers[:, :, None] >> np.arange(bits - 1, -1, -1) & 1
    return np.packbits(single.reshape(len(numbers), -1).astype(np.uint8), axis=1)


def distillkit(row, config=CONFIG):
    """Its sampler: no entry of the first token, ids in 6 bits, the values' bytes."""
    ids, _, top, logp, _ = row
    stored = {
        "input_ids": ids,
        "bytepacked_indices": bit_packed(top, 6).tolist(),
        "compressed_logprobs": logp.astype("<f4").view(np.uint8).tolist(),
    }
    assert config is CONFIG
    return stored


def padded(rows, value, before, behind):
    return np.pad(rows, ((before, behind), (0, 0)), constant_values=value).tolist()


def verl(row):
    """Its batches: prompts padded on the left, responses on the right, an entry of each."""
    ids, answer, top, logp, _ = row
    cut = int(np.flatnonzero(answer)[0])
    left, right = 3, 2
    return {
        "prompts": [3] * left + ids[:cut],
        "responses": ids[cut:] + [3] * right,
        "attention_mask": [0] * left + [1] * len(ids) + [0] * right,
        "teacher_ids": padded(top, 0, left, right + 1),
        "teacher_logprobs": padded(logp, 0.0, left, right + 1),
    }


WRITE = {"easydistill": easydistill, "axolotl": axolotl, "distillkit": distillkit, "verl": verl}


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_table(path, rows, group=7):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=group)
    return path


def written(path, form, told, **options):
    """Write a format's file of all rows, in another order than the data's."""
    rows = [WRITE[form](row, **options) for row in told]
    random.Random(1).shuffle(rows)
    if form == "distillkit":
        (path / "compression_config.yaml").parent.mkdir(parents=True, exist_ok=True)
        (path / "compression_config.yaml").write_text(yaml.safe_dump(CONFIG))
        return write_table(path / "data_0.parquet", rows).parent
    return write_lines(path / "dump.jsonl", rows)


def importing(folder, path, form, *more, out):
    words = make.dump(folder, "--import", path, "--format", form, *more, out=out)
    at = words.index("--teacher")
    del words[at : at + 2]
    at = words.index("--k")
    del words[at : at + 2]
    return words


# --- the divergence that a format's numbers give, and that of our records


def student(rows, far=0.5):
    """Return logits (n, V) at the targets of rows, that far from the teacher's."""
    z = torch.cat([row[4][np.flatnonzero(row[1]) - 1] for row in rows])
    return z + far * torch.randn(z.shape, generator=torch.Generator().manual_seed(0))


def direct(entries, z, rounded=False):
    """Return KL (n,) over the tokens of mass of each entry {id: p} and a bucket of all others;
    rounded: with z_max - z_i in float16, as our records keep it."""
    logq, found = z.log_softmax(-1), []
    for entry, q in zip(entries, logq):
        ids = torch.tensor([int(id) for id, p in entry.items() if p > 0])
        p = torch.tensor([p for p in entry.values() if p > 0]).double()
        rest = torch.tensor(max(1 - p.sum().item(), truncated.LEAST_REST)).double()
        if rounded:
            p = (p.max().log() - (p.max() / p).log().half().double()).exp()
        p, others = torch.cat([p, rest[None]]), (1 - q[ids].exp().sum()).log()
        p /= p.sum()
        found.append((p * (p.log() - torch.cat([q[ids], others[None]]))).sum().item())
    return np.array(found)


def ours(part, rows, z):
    """Return KL (n,) of a chunk's records of some rows, one after the other."""
    counts = part.counts.astype(int)
    ends = np.cumsum(counts)
    numbers = np.concatenate([np.arange(ends[row] - counts[row], ends[row]) for row in rows])
    known = record.unpack(part.records[numbers], part.meta["vocab"], 0)
    return losses.distance(z - z.amax(-1, keepdim=True), known)[0].numpy()


def entries_of(row, form):
    """Return {id: p} of the targets of a row, as its format holds them."""
    _, answer, top, logp, _ = row
    if form == "easydistill":
        return easydistill(row)[: int(answer.sum())]
    return [
        dict(zip(top[at - 1].tolist(), np.exp(logp[at - 1]).tolist()))
        for at in np.flatnonzero(answer)
    ]


def chunks_of(folder, out):
    dataset = open_data(folder)
    return {
        chunk: logits.Chunk(record.chunk_folder(folder / out, chunk), chunk, dataset)
        for chunk in (0, 1, "val")
    }


def rows_in(chunk, told):
    return {0: told[:25], 1: told[25:ROWS], "val": told[ROWS:]}[chunk]


@pytest.mark.parametrize("form", FORMS)
def test_the_divergence_is_that_of_the_formats_own_numbers(folder, told, form, tmp_path):
    path = written(tmp_path / "dump", form, told)
    make.call(dump_logits.main, *importing(folder, path, form, out=f"of-{form}"))
    for chunk, part in chunks_of(folder, f"of-{form}").items():
        numbers = np.arange(len(part.counts))  # an answer to two prompts has no record
        numbers = numbers if part.there is None else numbers[part.there]
        assert len(numbers) == len(part.counts) or form == "easydistill" and len(numbers)
        rows = [rows_in(chunk, told)[number] for number in numbers]
        entries = [entry for row in rows for entry in entries_of(row, form)]
        for far in (0.5, 5.0):
            z = student(rows, far)
            wanted, seen = direct(entries, z), ours(part, numbers, z)
            assert seen.mean() == pytest.approx(wanted.mean(), rel=1e-5, abs=1e-5)
            assert seen == pytest.approx(direct(entries, z, rounded=True), rel=1e-6, abs=1e-6)


def test_the_order_of_rows_and_what_else_a_file_holds_do_not_matter(folder, told, tmp_path):
    straight = write_lines(tmp_path / "a.jsonl", [verl(row) for row in told])
    make.call(dump_logits.main, *importing(folder, straight, "verl", out="straight"))
    # backwards, with rows of nobody's and one again, as several files, one of them a table
    others = [verl(([5, 6, 7, 9], np.array([0, 0, 1, 1], bool), *told[0][2:4], None))]
    others[0]["teacher_ids"] = others[0]["teacher_ids"][:9]
    others[0]["teacher_logprobs"] = others[0]["teacher_logprobs"][:9]
    rows = [verl(row) for row in told[::-1]]
    write_lines(tmp_path / "b" / "1.jsonl", [*others, *rows[:20], rows[3]])
    write_table(tmp_path / "b" / "2.parquet", rows[20:])
    make.call(dump_logits.main, *importing(folder, tmp_path / "b", "verl", out="other"))
    for chunk in ("chunk-0000", "chunk-0001", "val"):
        for name in ("topk.npy", "done.npy"):
            right = (folder / "straight" / chunk / name).read_bytes()
            assert (folder / "other" / chunk / name).read_bytes() == right


def test_rows_that_are_not_there_get_no_record_and_are_counted(folder, told, tmp_path, capsys):
    rows = [axolotl(row) for row in told]
    rows[4]["target_logprobs"][len(rows[4]["labels"]) - 2] = [-math.inf] * K  # its last target
    path = write_lines(tmp_path / "dump.jsonl", rows[1:25])
    make.call(dump_logits.main, *importing(folder, path, "axolotl", out="few"))
    said = capsys.readouterr().out
    assert "23 of 24 rows are the data's (1: no distribution at a target)" in said
    assert "23 of the data's 46 rows get no record" in said
    meta = files.read_json(folder / "few/chunk-0000/meta.json")
    assert meta["left_out"] == {imported.SILENT: 1, imported.MISSING: 1}
    assert not (folder / "few/chunk-0001").exists() and not (folder / "few/val").exists()
    known = make.store(folder, 1.0, name="few")
    assert known.rows().tolist() == [1, 2, 3, *range(5, 25)] and known.val is None


@pytest.mark.parametrize("share, code", [(0.08, 0), (0.2, 1)])
def test_rows_that_do_not_match_are_refused_above_the_limit(
    folder, told, tmp_path, capsys, share, code
):
    rows = [verl(row) for row in told]
    for row in rows[: int(share * len(rows))]:
        row["responses"][0] += 1
    path, argv = write_lines(tmp_path / "dump.jsonl", rows), None
    argv = importing(folder, path, "verl", out=f"some-{code}")
    if not code:
        make.call(dump_logits.main, *argv)
        assert f"(3: {imported.NO_ROW})" in capsys.readouterr().out
        return
    ended, said = make.ends(dump_logits.main, *argv)
    assert ended == 1 and f"9 of 46 rows without their like (9: {imported.NO_ROW})" in said
    assert "at most 4 of either (10% of the fewer)" in said and "--chat-template" in said
    assert not (folder / "some-1").exists()


def test_another_tokenizers_ids_are_refused_with_both(folder, told, tmp_path):
    rows = [verl(([(id + 1) % make.V for id in row[0]], *row[1:])) for row in told]
    path = write_lines(tmp_path / "dump.jsonl", rows)
    code, said = make.ends(dump_logits.main, *importing(folder, path, "verl", out="wrong"))
    first, own = rows[0]["prompts"][3:6], told[0][0][:3]
    assert code == 1 and "46 of 46 rows" in said
    assert f"line 1 begins {first[0]} {first[1]} {first[2]}" in said
    assert f"the data's first {own[0]} {own[1]} {own[2]}" in said


UNEVEN = {"input_ids": [1, 2], "target_token_ids": [[1], [2]], "target_logprobs": [[-1.0]]}


@pytest.mark.parametrize(
    "form, line, words",
    [
        ("verl", '{"input_ids": [1, 2', "line 3 is no row of verl's; saw Expecting"),
        ("verl", "[1, 2]", "line 3 is no row of verl's; saw no object with columns"),
        ("axolotl", '{"input_ids": [1, 2]}', "line 3 has no column 'target_token_ids'"),
        ("axolotl", json.dumps(UNEVEN), "line 3 is no row of axolotl's; saw token ids and"),
        ("axolotl", '{"input_ids": ["a"], "target_token_ids": []}', "that are no token ids"),
        ("easydistill", '[{"a": 0.5}]', "line 3 is no row of easydistill's; saw invalid literal"),
        ("easydistill", '{"5": 0.5}', "saw no list of {token id: probability}"),
        ("easydistill", '[{"5": "x"}]', "line 3 is no row of easydistill's"),
        ("distillkit", '{"input_ids": [5]}', "line 3 has no column 'compressed_logprobs'"),
        ("verl", "\xff\xfe", "line 3 is no row of verl's"),
    ],
)
def test_a_broken_line_is_one_line_with_its_number(folder, told, tmp_path, form, line, words):
    whole = [json.dumps(WRITE[form](row)) for row in told[:2]]
    if form == "distillkit":
        (tmp_path / "compression_config.yaml").write_text(yaml.safe_dump(CONFIG))
    (tmp_path / "dump.jsonl").write_bytes("\n".join([*whole, line, ""]).encode("latin-1"))
    argv = importing(folder, tmp_path / "dump.jsonl", form, out="broken")
    code, said = make.ends(dump_logits.main, *argv)
    assert code == 1 and words in said and "\n" not in said.strip(), said
    assert str(tmp_path / "dump.jsonl") in said and not (folder / "broken").exists()


def test_what_is_no_table_or_not_there_is_one_line(folder, tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "empty").mkdir()
    for form, name, words in (
        ("verl", "a.parquet", "cannot be read"),
        ("easydistill", "a.parquet", "is a table; wanted JSON lines"),
        ("verl", "empty", "holds nothing to import"),
        ("verl", "no.jsonl", "holds nothing to import"),
    ):
        argv = importing(folder, tmp_path / name, form, out="none")
        code, said = make.ends(dump_logits.main, *argv)
        assert code == 1 and words in said, said


@pytest.mark.parametrize("lead", [0, 1])
def test_what_an_entry_of_axolotls_is_of_is_measured(folder, tmp_path, lead, capsys, told):
    """Its trainer takes entry j for the token behind it, its chat template writes it for the
    token itself; here the teacher knows the data's tokens, as a teacher does."""
    known = []
    for ids, answer, top, logp, z in told:
        top = top.copy()
        for at, id in enumerate(ids[1:]):
            if id not in top[at]:
                top[at, -1] = id
        known.append((ids, answer, top, logp, z))
    path = write_lines(tmp_path / "dump.jsonl", [axolotl(row, lead) for row in known])
    out = f"lead-{lead}"
    make.call(dump_logits.main, *importing(folder, path, "axolotl", out=out))
    said = capsys.readouterr().out
    assert f"of token j + {lead}: so the data's own token is told of at 100.0%" in said
    path = write_lines(tmp_path / "same.jsonl", [verl(row) for row in known])
    make.call(dump_logits.main, *importing(folder, path, "verl", out=f"{out}-verl"))
    for chunk, part in chunks_of(folder, out).items():
        same = chunks_of(folder, f"{out}-verl")[chunk]
        assert np.array_equal(part.records, same.records)


def test_string_ids_logarithms_and_tokens_of_no_mass(folder, told, tmp_path):
    """Others took over EasyDistill's form with log-probabilities; a zero, -inf, a null or -1e9 is
    padding: no token of the top k."""
    plain = [easydistill(row) for row in told]
    logs = [[{id: math.log(p) for id, p in entry.items()} for entry in row] for row in plain]
    for row in plain:
        row[0] |= {"60": 0.0} if "60" not in row[0] else {}
    for row in logs:
        for pad in (-math.inf, -1e9, None):
            row[0] |= {"60": pad} if "60" not in row[0] else {}
    for name, rows in (("plain", plain), ("logs", logs)):
        path = write_lines(tmp_path / f"{name}.jsonl", rows)
        make.call(dump_logits.main, *importing(folder, path, "easydistill", out=name))
    for chunk, part in chunks_of(folder, "plain").items():
        other = chunks_of(folder, "logs")[chunk]
        assert part.meta["k"] == other.meta["k"] == K
        one, two = (record.unpack(each.records, make.V, 0) for each in (part, other))
        assert torch.equal(one.ids, two.ids) and torch.allclose(one.gap, two.gap, atol=2e-3)
        assert torch.allclose(one.tail, two.tail, atol=1e-5)


def test_targets_of_fewer_tokens_are_kept_as_they_are(folder, told, tmp_path):
    """A top p has as many as it takes: the mass of all others is that of the bucket."""
    rows = [verl(row) for row in told]
    for row in rows:
        for at in range(1, len(row["teacher_ids"]), 2):
            row["teacher_ids"][at][3:] = [0, 0]
            row["teacher_logprobs"][at][3:] = [-math.inf, None]
    path = write_lines(tmp_path / "dump.jsonl", rows)
    make.call(dump_logits.main, *importing(folder, path, "verl", out="ragged"))
    part = chunks_of(folder, "ragged")[0]
    assert {*part.records["count"].tolist()} == {3, K}
    entries = []
    for _, answer, top, logp, _ in told[:25]:
        for at in np.flatnonzero(answer):
            keep = 3 if (at - 1 + 3) % 2 else K
            entries.append(dict(zip(top[at - 1][:keep].tolist(), np.exp(logp[at - 1][:keep]))))
    z = student(told[:25])
    seen = ours(part, range(25), z)
    assert seen == pytest.approx(direct(entries, z, rounded=True), rel=1e-6, abs=1e-6)


def test_k_may_be_lowered_and_the_rest_goes_to_the_bucket(folder, told, tmp_path):
    path = write_lines(tmp_path / "dump.jsonl", [verl(row) for row in told])
    make.call(dump_logits.main, *importing(folder, path, "verl", "--k", 3, out="lower"))
    part = chunks_of(folder, "lower")[0]
    entries = [dict([*entry.items()][:3]) for row in told[:25] for entry in entries_of(row, "verl")]
    z = student(told[:25])
    assert part.meta["k"] == 3
    seen = ours(part, range(25), z)
    assert seen == pytest.approx(direct(entries, z, rounded=True), rel=1e-6, abs=1e-6)


def test_k_beyond_what_the_file_has_is_refused(folder, told, tmp_path):
    path = write_lines(tmp_path / "dump.jsonl", [verl(row) for row in told])
    argv = importing(folder, path, "verl", "--k", K + 1, out="higher")
    code, said = make.ends(dump_logits.main, *argv)
    assert code == 1 and f"k does not fit; saw {K + 1}" in said and f"--k {K}" in said


def test_tokens_that_the_student_has_not_are_cut(folder, told, tmp_path):
    """As of a teacher that is run here: their mass goes to all others in proportion, and where all
    that is told is of such tokens, the target teaches nothing."""
    rows = [verl(row) for row in told]
    known = [(row[0], row[1], *likely(*row[2:4]), None) for row in told]
    strange = [100 + i for i in range(K + 1)]
    place = 3 + int(np.flatnonzero(told[0][1])[1]) - 1  # row 0's second target, behind the padding
    for row, (_, _, top, logp, _) in zip(rows, known):
        row["teacher_ids"][3 : 3 + len(top)] = top.tolist()
        row["teacher_logprobs"][3 : 3 + len(top)] = logp.tolist()
    rows[0]["teacher_ids"][place] = strange
    path = write_lines(tmp_path / "dump.jsonl", rows)
    make.call(dump_logits.main, *importing(folder, path, "verl", out="cut"))
    part, entries = chunks_of(folder, "cut")[0], []
    for _, answer, top, logp, _ in known[:25]:
        for at in np.flatnonzero(answer):
            entry = dict(zip(top[at - 1].tolist(), np.exp(logp[at - 1])))
            lost = entry.pop(make.V + 5)
            entries.append({id: p / (1 - lost) for id, p in entry.items()})
    z = student(told[:25])
    seen, wanted = ours(part, range(25), z), direct(entries, z, rounded=True)
    assert part.records["count"][1] == 0 and seen[1] == pytest.approx(0, abs=1e-6)
    others = np.arange(len(wanted)) != 1
    assert seen[others] == pytest.approx(wanted[others], rel=1e-6, abs=1e-6)
    assert {*part.records["count"][others].tolist()} == {K}


def likely(top, logp):
    """Return a top k to which a token beyond the vocabulary belongs, as the likeliest."""
    top, logp = np.pad(top, ((0, 0), (1, 0)), constant_values=make.V + 5), logp + np.log(0.7)
    return top, np.pad(logp, ((0, 0), (1, 0)), constant_values=np.log(0.3))


def test_rows_are_found_by_what_a_file_begins_with():
    """Answers without prompts: the longest one that is there, whoever's; what is
    between two turns is held against them too."""
    rows = [
        ([1, 2, 7, 8], [0, 0, 1, 1]),
        ([1, 3, 7, 8], [0, 0, 1, 1]),
        ([1, 4, 7, 8, 9], [0, 0, 1, 1, 1]),
        ([1, 7, 2, 8], [0, 1, 0, 1]),
        ([1, 2, 7, 8, 6], [0, 0, 1, 1, 0]),  # as row 0 up to its last target
    ]
    split = data.Split.of([(np.array(ids), np.array(own, bool), 0) for ids, own in rows])
    dataset = types.SimpleNamespace(train=split, val=data.Split.of([split.row(0) + (0,)]))
    index = imported.Index(dataset, alone=True)
    assert sorted(index.find(np.array([7, 8, 5, 5]))) == [0, 1, 4, 5]  # 5: of val
    assert index.find(np.array([7, 8, 9, 1])) == [2] and index.find(np.array([7, 2, 8])) == [3]
    assert not index.find(np.array([7])) and not index.find(np.array([8, 7]))
    assert index.entries(2, 0).tolist() == [0, 1, 2]
    index = imported.Index(dataset, alone=False)
    assert sorted(index.find(np.array([1, 2, 7, 8, 0]))) == [0, 4, 5]
    assert index.find(np.array([1, 7, 2, 8])) == [3] and not index.find(np.array([1, 7, 2]))
    assert index.entries(3, 1).tolist() == [0, 2]


def test_a_chunk_killed_and_continued_is_that_of_one_left_alone(folder, told, tmp_path):
    path = written(tmp_path / "dump", "axolotl", told)
    make.call(dump_logits.main, *importing(folder, path, "axolotl", out="steady"))
    context, log = make.processes(), tmp_path / "log"
    for where, number, after in (
        ("lib.teacher.writer.Placed.write", 9, False),
        ("lib.teacher.writer.Writer.flush", 4, True),
        ("lib.teacher.imported.records_of", 30, False),
        ("lib.files.write_json", 2, True),
    ):
        out = f"killed-{where.split('.')[-1]}-{number}"
        argv = importing(folder, path, "axolotl", out=out)
        for _ in range(2 if number in (4, 9) else 1):  # killed, and killed again on the way on
            one = context.Process(target=killed, args=(argv, log, where, number, after))
            one.start()
            one.join(120)
            assert one.exitcode == -signal.SIGKILL, log.read_text()
        make.call(dump_logits.main, *argv)
        for chunk in ("chunk-0000", "chunk-0001", "val"):
            for name in ("topk.npy", "done.npy", "meta.json"):
                right = (folder / "steady" / chunk / name).read_bytes()
                assert (folder / out / chunk / name).read_bytes() == right, (where, chunk, name)


def killed(argv, log, where, number, after):
    """Import, and kill this process at the n-th call of a function (of this process)."""
    sys.stdout = sys.stderr = open(log, "a", buffering=1)
    from lib.teacher import writer

    writer.FLUSH_S = 0.0
    *path, name = where.split(".")
    owner = sys.modules.get(".".join(path)) or getattr(sys.modules[".".join(path[:-1])], path[-1])
    plain, calls = getattr(owner, name), 0

    def counted(*args, **options):
        nonlocal calls
        calls += 1
        if calls == number and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        value = plain(*args, **options)
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return value

    setattr(owner, name, counted)
    dump_logits.main([str(word) for word in argv])


def test_stage_2_learns_from_it_at_t_1_and_says_why_at_no_other(folder, told, tmp_path, capsys):
    path = write_lines(tmp_path / "it's.jsonl", [verl(row) for row in told[:44]])
    argv = importing(folder, path, "verl", "--teacher-model", "big", out="taught")
    make.call(dump_logits.main, *argv)
    words = make.stage2(folder, "--steps", 2, "--temperature", 1, logits="taught", out="learnt")
    make.call(stage2_kd.main, *words)
    said = capsys.readouterr().out
    assert "one bucket, at T=1 alone: these records are another tool's" in said
    assert "2 rows have no record (not in the file)" in said
    words = make.stage2(folder, "--steps", 2, "--temperature", 2, logits="taught", out="no")
    code, said = make.ends(stage2_kd.main, *words)
    assert code == 1 and "temperature 2 was not dumped" in said and "imported file says" in said
    make.call(dump_logits.main, *argv)
    assert capsys.readouterr().out.count("already finished") == 3
    (folder / "taught/chunk-0001/topk.npy").unlink()
    words = make.stage2(folder, "--steps", 2, "--temperature", 1, logits="taught", out="no")
    code, said = make.ends(stage2_kd.main, *words)
    assert code == 1 and "--format verl --teacher-model big" in said and "--import" in said


def test_a_renormalised_top_k_is_warned_of(folder, told, tmp_path, capsys):
    """axolotl's kd_normalize_topk, and a vLLM that masks before it takes logarithms."""
    rows = []
    for ids, answer, top, logp, z in told:
        logp = logp - np.logaddexp.reduce(logp, axis=1)[:, None]
        rows.append(axolotl((ids, answer, top, logp, z)))
    path = write_lines(tmp_path / "dump.jsonl", rows)
    make.call(dump_logits.main, *importing(folder, path, "axolotl", out="renormalised"))
    assert "WARNING: at nearly all targets the k probabilities sum to 1" in capsys.readouterr().out


def test_logits_are_no_log_probabilities(folder, told, tmp_path):
    rows = [verl(row) for row in told]
    for row in rows:
        row["teacher_logprobs"] = [[v + 9.0 for v in one] for one in row["teacher_logprobs"]]
    path = write_lines(tmp_path / "dump.jsonl", rows)
    code, said = make.ends(dump_logits.main, *importing(folder, path, "verl", out="logits-no"))
    assert code == 1 and f"46: {imported.NO_MASSES}" in said


def test_distillkits_compression_by_its_layout():
    """bfloat16 exact values, a polynomial of the rank in float32, residuals in 5 bits and in 1 bit
    with a float16 scale each, all as differences."""
    config = {
        "d": 1000,
        "k": 9,
        "exact_k": 2,
        "exact_dtype": "bfloat16",
        "polynomial_terms": [0, 1, "sqrt"],
        "residual_bins": [
            {"scale_dtype": "float16", "element_bits": 5, "num_elements": 4},
            {"scale_dtype": "float16", "element_bits": 1, "num_elements": 2},
        ],
    }
    top = np.array([[999, 0, 512, 7, 8, 9, 10, 11, 12]])
    exact = np.array([[-0.5, -1.25]], np.float32)
    factors = np.array([[-0.1, 0.01, -0.02]], np.float32)
    five, one, at = np.array([[31, 0, 16, 15]]), np.array([[1, 0]]), np.arange(7)
    parts = [
        (exact.view("<u4") >> 16).astype("<u2").view(np.uint8),
        factors.astype("<f4").view(np.uint8),
        np.array([[0.25]], "<f2").view(np.uint8),
        bit_packed(five, 5),
        np.array([[0.125]], "<f2").view(np.uint8),
        bit_packed(one, 1),
    ]
    row = {
        "input_ids": [1, 2],
        "bytepacked_indices": bit_packed(top, 10).tolist(),
        "compressed_logprobs": np.concatenate(parts, axis=1).tolist(),
    }
    fit = factors[0, 0] + factors[0, 1] * at + factors[0, 2] * np.sqrt(at)
    fit[:4] += 0.25 * (five[0] - 16)
    fit[4:6] += 0.125 * np.array([1, -1])
    (said,) = foreign.distillkit(row, config)
    assert said.top.tolist() == top.tolist()
    assert said.logp[0] == pytest.approx(np.cumsum([*exact[0], *fit]), abs=1e-6)
    row["compressed_logprobs"][0].append(0)
    with pytest.raises(ValueError, match="more than"):
        foreign.distillkit(row, config)


def test_distillkits_older_compression_and_rows_packed_into_one():
    """Ids of 10 bits, six to a word, lowest first; a polynomial of 1 / rank; two rows and padding
    in one."""
    config = {"vocab_size": 1000, "k": 7, "exact_k": 5, "polynomial_degree": 1}
    top = np.array([[999, 0, 512, 7, 8, 9, 10], [1, 2, 3, 4, 5, 6, 7], [9, 8, 7, 6, 5, 4, 3]])
    words = [[sum(int(id) << 10 * i for i, id in enumerate(ids[:6])), int(ids[6])] for ids in top]
    exact = [[-0.5, -1.5, -3.0, -4.0, -5.0]] * 3
    row = {
        "input_ids": [5, 6, 7],
        "packed_indices": words,
        "exact_values": exact,
        "coeffs": [[-6.0, 1.0]] * 3,
        "attention_mask": [1, 2, 2],
    }
    one, two = foreign.distillkit(row, config)
    assert one.ids.tolist() == [5] and two.ids.tolist() == [6, 7]
    assert np.concatenate([one.top, two.top]).tolist() == top.tolist()
    assert two.logp[0].tolist() == pytest.approx([*exact[0], -5.0, -5.5])


def test_a_data_set_that_datasets_saved_is_read(folder, told, tmp_path):
    table = pa.Table.from_pylist([axolotl(row) for row in told])
    with pa.OSFile(str(tmp_path / "data-00000-of-00001.arrow"), "wb") as sink:
        with pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table, max_chunksize=5)
    (tmp_path / "state.json").write_text("{}")
    make.call(dump_logits.main, *importing(folder, tmp_path, "axolotl", out="arrow"))
    path = write_lines(tmp_path / "lines.jsonl", [axolotl(row) for row in told])
    make.call(dump_logits.main, *importing(folder, path, "axolotl", out="lines"))
    for chunk, part in chunks_of(folder, "arrow").items():
        assert np.array_equal(part.records, chunks_of(folder, "lines")[chunk].records)


@pytest.mark.parametrize(
    "more, words",
    [
        (["--teacher", "x"], "takes the place of a teacher: no --teacher"),
        (["--teacher-url", "http://x:1/v1"], "no --teacher-url"),
        (["--temperatures", "1,2"], "wanted 1: the file holds probabilities"),
        (["--tail-rank", 8], "says nothing of the rest's shape"),
        (["--verify", 5], "--verify N needs --teacher DIR"),
    ],
)
def test_flags_that_cannot_work(folder, more, words, capsys):
    argv = importing(folder, "x.jsonl", "verl", *more, out="none")
    with pytest.raises(SystemExit) as end:
        dump_logits.main([str(word) for word in argv])
    assert end.value.code == 2 and words in capsys.readouterr().err


def test_import_and_format_belong_together(folder, capsys):
    for more in (["--format", "verl"], ["--import", "x.jsonl"]):
        with pytest.raises(SystemExit):
            dump_logits.main([str(word) for word in make.dump(folder, *more)])
        assert "--import PATH and --format NAME belong together" in capsys.readouterr().err
