"""prepare_data.py from file to folder: every schema and format, the split, the drops, reruns, and
each error a user can cause."""

import csv
import json
import os
import shlex
import types
from pathlib import Path

import make
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_tokenizers as tiny

import prepare_data
import stage1_sft
from lib import data, files, template
from lib.prepare import formats, places, sources, split, workers

PAIRS = [{"prompt": f"question {i}", "answer": f"reply {i}"} for i in range(30)]


@pytest.fixture
def prepare(tmp_path, tokenizer_dir, no_picture):
    """Return a function that runs the script on rows (written as rows.jsonl) or on --source flags,
    and opens what it wrote."""

    def run(rows=None, *more, out="out", tokenizer=tokenizer_dir):
        if rows is not None:
            more = ("--source", str(write(tmp_path / "rows.jsonl", rows)), *more)
        prepare_data.main(
            [*more, "--tokenizer", str(tokenizer), "--out", str(tmp_path / out), "--workers", "1"]
        )
        return data.Dataset(tmp_path / out)

    return run


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
        )
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(
                {
                    name: value if isinstance(value, str) else json.dumps(value)
                    for name, value in row.items()
                }
                for row in rows
            )
    return path


def texts(dataset, split="train"):
    """Return (whole row, its targets) as text for every row."""
    tokenizer, rows = dataset.tokenizer(), getattr(dataset, split)
    return [
        (tokenizer.decode(ids), tokenizer.decode(ids[answer]))
        for ids, answer in map(rows.row, range(len(rows.rows)))
    ]


def everything(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


SCHEMAS = {
    "instruction/output": {"instruction": "Ask", "output": "Say"},
    "instruction+input": {"instruction": "Ask", "input": "this", "output": "Say"},
    "prompt/completion": {"prompt": "Ask", "completion": "Say"},
    "prompt/response": {"prompt": "Ask", "response": "Say"},
    "prompt/answer": {"prompt": "Ask", "answer": "Say"},
    "question/answer": {"question": "Ask", "answer": "Say"},
    "messages": {
        "messages": [{"role": "user", "content": "Ask"}, {"role": "assistant", "content": "Say"}]
    },
    "conversations": {
        "conversations": [{"from": "human", "value": "Ask"}, {"from": "gpt", "value": "Say"}]
    },
}


@pytest.mark.parametrize("suffix", [".parquet", ".json", ".jsonl", ".csv"])
@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_schema_is_found_in_every_format(tmp_path, schema, suffix):
    path = write(tmp_path / f"data{suffix}", [{"id": "7", **SCHEMAS[schema]}] * 2)
    rows = list(sources.rows(sources.look(places.on_disk(path))))
    prompt = "Ask\n\nthis" if "input" in SCHEMAS[schema] else "Ask"
    assert rows == 2 * [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": "Say"}]
    ]


@pytest.mark.parametrize("suffix", [".parquet", ".json", ".jsonl", ".csv"])
def test_plain_text_is_learnt_whole_in_every_format(tmp_path, prepare, suffix):
    path = write(tmp_path / f"data{suffix}", [{"text": f"line {i}"} for i in range(5)])
    made = prepare(None, "--source", str(path), "--val", "0")
    assert texts(made)[3] == ("line 3<|im_end|>", "ine 3<|im_end|>")
    assert (
        made.meta["schema"] == "text (text=text)"
        and not (made.folder / "val.prompts.jsonl").exists()
    )


def test_the_folder_holds_what_the_format_says(prepare):
    made = prepare(PAIRS, "--val", "6", "--rows-per-chunk", "10")
    assert made.meta["format"] == data.FORMAT and made.meta["chunks"] == made.chunks == 3
    for name, part in (("train", made.train), ("val", made.val)):
        lengths, targets = (
            part.rows["length"].astype(np.int64),
            part.rows["targets"].astype(np.int64),
        )
        assert part.tokens.dtype == np.uint32 and part.answer.dtype == bool
        assert np.array_equal(part.rows["start"], np.cumsum(lengths) - lengths)
        assert np.array_equal(part.rows["first_target"], np.cumsum(targets) - targets)
        assert [part.row(row)[1].sum() for row in range(len(lengths))] == targets.tolist()
        assert (
            made.meta["rows"][name] == len(lengths)
            and made.meta["tokens"][name] == len(part.tokens) == lengths.sum()
        )
        assert made.meta["targets"][name] == part.targets == part.answer.sum()
    parts = [
        made.folder / f"{split}.{part}.npy"
        for split in ("train", "val")
        for part in ("tokens", "answer", "rows")
    ]
    assert made.identities == template.identities(made.tokenizer()) | {"data": files.sha256(*parts)}
    (source,) = made.meta["sources"]
    path = made.folder.parent / "rows.jsonl"
    assert source == {
        "name": "rows",
        "where": str(path),
        "rows": {"train": 24, "val": 6},
        "read": 30,
        "dropped": {},
        "files": [{"name": str(path), "sha256": files.sha256(path), "rows": 30}],
    }
    assert not list(made.folder.glob("staged*")) and not list(made.folder.parent.glob("*.part*"))


def test_rows_keep_the_order_of_the_source(prepare):
    assert [targets for _, targets in texts(prepare(PAIRS, "--val", "0"))] == [
        f"reply {i}<|im_end|>" for i in range(30)
    ]


def test_val_prompts_are_the_val_rows_in_order_without_their_last_answer(prepare):
    rows = [
        {"messages": tiny.chat(f"one {i}", "two", f"three {i}", f"four {i}", "unanswered")}
        for i in range(20)
    ]
    made = prepare(rows, "--val", "5")
    lines = list(
        map(
            json.loads, (made.folder / "val.prompts.jsonl").read_text(encoding="utf-8").splitlines()
        )
    )
    assert len(lines) == len(made.val.rows) == 5
    for line, (whole, targets) in zip(lines, texts(made, "val")):
        assert line["messages"][-1]["content"].startswith("three") and line["reference"] in whole
        assert targets == f"two<|im_end|>{line['reference']}<|im_end|>"


def test_system_text_opens_the_conversations_that_have_none(prepare):
    rows = [{"prompt": "a", "answer": "b", "system": "own"}, {"prompt": "c", "answer": "d"}]
    (first, _), (second, _) = texts(prepare(rows, "--val", "0", "--system", "common"))
    assert first.startswith("<|im_start|>system\nown<|im_end|>") and second.startswith(
        "<|im_start|>system\ncommon<|im_end|>"
    )


def test_columns_override_what_would_be_found(prepare):
    rows = [
        {"prompt": f"p{i}", "answer": f"a{i}", "q": f"q{i}", "r": f"r{i}", "more": "m"}
        for i in range(3)
    ]
    made = prepare(rows, "--val", "0", "--columns", "prompt=q,answer=r,input=more")
    assert texts(made)[0] == (
        "<|im_start|>user\nq0\n\nm<|im_end|>\n<|im_start|>assistant\nr0<|im_end|>\n",
        "r0<|im_end|>",
    )


def test_a_list_of_text_parts_is_joined_and_other_parts_are_dropped_as_not_text(prepare):
    def part(text):
        return [{"type": "text", "text": text}]

    image = [{"type": "image", "url": "x"}]
    rows = [
        {
            "messages": [
                {"role": "user", "content": part("a")},
                {"role": "assistant", "content": part("b")},
            ]
        },
        {"messages": [{"role": "user", "content": image}, {"role": "assistant", "content": "b"}]},
    ]
    made = prepare(rows, "--val", "0")
    assert [targets for _, targets in texts(made)] == ["b<|im_end|>"] and made.meta["dropped"] == {
        "not text": 1
    }


def test_csv_values_may_hold_line_breaks_quotes_and_commas(tmp_path, prepare):
    path = write(
        tmp_path / "data.csv",
        [{"prompt": 'a\nb, "c"', "answer": "x\n\ny"}, {"prompt": "7", "answer": "42"}],
    )
    made = prepare(None, "--source", str(path), "--val", "0")
    assert texts(made)[0] == (
        '<|im_start|>user\na\nb, "c"<|im_end|>\n<|im_start|>assistant\nx\n\ny<|im_end|>\n',
        "x\n\ny<|im_end|>",
    )
    assert texts(made)[1][1] == "42<|im_end|>"


def test_csv_rows_with_line_breaks_are_read_alike_through_a_small_window(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "CSV_BLOCKS", (100,))
    rows = [{"text": f"{i}\n\n" * (i % 9 + 1)} for i in range(200)]
    assert list(sources.rows(sources.look(places.on_disk(write(tmp_path / "data.csv", rows))))) == [
        row["text"] for row in rows
    ]


@pytest.mark.parametrize("layout", ["list", "indented list", "one after the other"])
def test_json_is_read_alike_in_any_layout(tmp_path, layout):
    rows = [
        {"text": f'é 🙂 [{{"\\, {i}', "deep": [{"n": -1.5e3, "t": True}, None]} for i in range(5)
    ]
    text = {
        "list": json.dumps(rows),
        "indented list": "\ufeff \n" + json.dumps(rows, indent=2, ensure_ascii=False) + "\n",
        "one after the other": "\n".join(json.dumps(row, indent=1) for row in rows),
    }[layout]
    path = tmp_path / "data.json"
    path.write_text(text, encoding="utf-8")
    assert list(formats.records(places.on_disk(path), [])) == rows


def test_files_folders_and_globs_are_read_in_order(tmp_path, prepare):
    (tmp_path / "in").mkdir()
    for name in ("b.jsonl", "a.csv", "c.parquet"):
        write(tmp_path / "in" / name, [{"prompt": name, "answer": name}])
    write(tmp_path / "z.json", [{"prompt": "z", "answer": "z"}])
    (tmp_path / "more").mkdir()
    write(tmp_path / "more" / "d.csv", [{"prompt": "d", "answer": "d"}])
    made = prepare(
        None,
        "--source",
        str(tmp_path / "z.json"),
        str(tmp_path / "in"),
        "--source",
        str(tmp_path / "more" / "*.csv"),
        "--val",
        "0",
    )
    assert [targets.removesuffix("<|im_end|>") for _, targets in texts(made)] == [
        "z",
        "a.csv",
        "b.jsonl",
        "c.parquet",
        "d",
    ]
    assert made.train.rows["source"].tolist() == [0, 1, 1, 1, 2]
    assert [
        (source["name"], source["rows"]["train"], len(source["files"]))
        for source in made.meta["sources"]
    ] == [("z", 1, 1), ("in", 3, 3), ("more", 1, 1)]


def test_columns_of_one_source_leave_the_others_alone(tmp_path, tokenizer_dir, no_picture):
    write(
        tmp_path / "a.jsonl",
        [
            {"q": f"question {i}", "r": f"one {i}", "prompt": "not this", "answer": "nor this"}
            for i in range(3)
        ],
    )
    write(
        tmp_path / "b.jsonl", [{"prompt": f"question {i}", "answer": f"two {i}"} for i in range(3)]
    )
    argv = [
        "--source",
        f"a={tmp_path / 'a.jsonl'}",
        f"b={tmp_path / 'b.jsonl'}",
        "--columns",
        "a:prompt=q,answer=r",
        "--tokenizer",
        tokenizer_dir,
        "--val",
        0,
        "--workers",
        1,
        "--export",
        tmp_path / "rows",
        "--out",
        tmp_path / "out",
    ]
    make.call(prepare_data.main, *argv)
    rows = pq.read_table(tmp_path / "rows" / "train.parquet").to_pylist()
    assert sorted(row["messages"][1]["content"] for row in rows) == [
        "one 0",
        "one 1",
        "one 2",
        "two 0",
        "two 1",
        "two 2",
    ]
    code, _ = make.ends(prepare_data.main, *argv, "--columns", "c:prompt=q,answer=r")
    assert code == 2
    code, _ = make.ends(prepare_data.main, *argv, "--columns", "a:prompt=r,answer=q")
    assert code == 2


def test_only_the_needed_columns_of_a_parquet_file_are_read(tmp_path):
    path = write(
        tmp_path / "data.parquet", [{"prompt": "p", "answer": "a", "embedding": [0.5] * 9}]
    )
    place = places.on_disk(path)
    assert list(formats.records(place, list(sources.look(place).columns.values()))) == [
        {"prompt": "p", "answer": "a"}
    ]


def test_rows_are_dropped_by_reason_and_counted(prepare):
    good = tiny.chat("a", "b")
    rows = [
        {"messages": good},
        {"messages": good},
        {"messages": []},
        {"messages": [good[0], {"role": "assistant", "content": " "}]},
        {"messages": [{"role": "judge", "content": "?"}, *good]},
        {"messages": [good[0], {"role": "assistant", "content": "x" * 90}]},
        {"messages": [good[1]]},
    ]
    made = prepare(rows, "--val", "0", "--max-len", "60")
    assert made.meta["dropped"] == {
        "empty": 2,
        "duplicate": 1,
        "unknown role judge": 1,
        "too long": 1,
        "no target": 1,
    }
    assert len(made.train.rows) == 1


def test_a_longer_row_is_dropped_or_cut_as_asked(prepare):
    rows = [
        {"prompt": "a", "answer": "x" * 90},
        {"prompt": "y" * 90, "answer": "b"},
        {"prompt": "c", "answer": "d"},
    ]
    assert prepare(rows, "--val", "0", "--max-len", "60").meta["dropped"] == {"too long": 2}
    cut = prepare(rows, "--val", "0", "--max-len", "60", "--long", "truncate", out="cut")
    assert cut.train.rows["length"].max() == 60 and cut.meta["dropped"] == {"no target": 1}
    assert set(texts(cut)[0][1]) == {"x"}


def test_a_template_that_refuses_some_rows_is_counted(tmp_path, prepare):
    tiny.tiny(tiny.STRICT, eos="</s>").save_pretrained(tmp_path / "strict")
    made = prepare(
        [{"prompt": "a", "answer": "b", "system": "s"}, {"prompt": "a", "answer": "b"}],
        "--val",
        "0",
        tokenizer=tmp_path / "strict",
    )
    assert made.meta["dropped"] == {"refused by the chat template (System role not supported)": 1}


def test_a_tokenizer_without_template_gets_one_that_later_stages_find(tmp_path, prepare, capsys):
    tiny.tiny(None, eos="</s>").save_pretrained(tmp_path / "plain")
    made = prepare(PAIRS, "--val", "0", tokenizer=tmp_path / "plain")
    assert made.tokenizer().chat_template and texts(made)[0][1] == "reply 0</s>"
    assert "no chat template" in capsys.readouterr().out


# --- the split


def val_prompts(made):
    return {whole.split("<|im_end|>")[0] for whole, _ in texts(made, "val")}


def test_rows_added_later_change_no_other_rows_side(prepare):
    few, many = (
        prepare(PAIRS, "--val", "0.4"),
        prepare(
            [*PAIRS, *({"prompt": f"new {i}", "answer": "x"} for i in range(30))],
            "--val",
            "0.4",
            out="many",
        ),
    )
    assert 0 < len(few.val.rows) < 30
    old = {prompt for prompt in val_prompts(many) if "question" in prompt}
    assert old == val_prompts(few)


@pytest.mark.parametrize("val", ["0.5", "12"])
def test_one_prompt_is_never_on_both_sides(prepare, val):
    made = prepare(
        [{"prompt": f"question {i % 10}", "answer": f"reply {i}"} for i in range(50)], "--val", val
    )
    train = {whole.split("<|im_end|>")[0] for whole, _ in texts(made)}
    assert train and val_prompts(made) and not train & val_prompts(made)


def test_conversations_that_a_greeting_opens_are_split_by_what_the_user_asks(prepare):
    greeting = {"role": "assistant", "content": "Welcome"}
    made = prepare(
        [{"messages": [greeting, *tiny.chat(f"question {i}", "reply")]} for i in range(30)],
        "--val",
        "0.4",
    )
    assert 5 < len(made.val.rows) < 25


def test_the_split_depends_on_the_seed_and_not_on_the_tokenizer(tmp_path, prepare):
    tiny.tiny(tiny.LLAMA3, eos="<|eot|>").save_pretrained(tmp_path / "other")
    one, two = (
        prepare(PAIRS, "--val", "0.4"),
        prepare(PAIRS, "--val", "0.4", out="two", tokenizer=tmp_path / "other"),
    )
    seeded = prepare(PAIRS, "--val", "0.4", "--seed", "1", out="three")

    def questions(made):
        return [
            line["messages"] for line in map(json.loads, open(made.folder / "val.prompts.jsonl"))
        ]

    assert questions(one) == questions(two) != questions(seeded)


@pytest.mark.parametrize("count", [1, 7, 29])
def test_a_count_takes_that_many_rows(prepare, count):
    made = prepare(PAIRS, "--val", str(count))
    assert len(made.val.rows) == count and len(made.train.rows) == 30 - count
    assert len((made.folder / "val.prompts.jsonl").read_text().splitlines()) == count


def test_an_empty_val_is_a_warning(prepare, capsys):
    assert prepare(PAIRS, "--val", "0").meta["rows"] == {"train": 30, "val": 0}
    assert "warning: val is empty" in capsys.readouterr().out


def test_a_limit_keeps_the_first_rows_that_are_good(prepare):
    rows = [{"prompt": "", "answer": "x"}, *PAIRS]
    made = prepare(rows, "--val", "0", "--limit", "4")
    assert [targets for _, targets in texts(made)] == [f"reply {i}<|im_end|>" for i in range(4)]
    assert (
        made.meta["sources"][0]["read"] == 5
        and made.meta["sources"][0]["dropped"] == {"empty": 1}
        and made.meta["dropped"] == {"empty": 1}
    )


def test_seen_knows_every_hash_it_was_given(monkeypatch):
    seen, values = (
        split.Seen(),
        np.random.default_rng(0).integers(0, 2**64, 105_000, np.uint64).tolist(),
    )
    assert all(map(seen.add, values)) and not any(map(seen.add, values[::1000]))
    assert len(seen.old) > 100_000 and seen.new  # some were merged, some not yet


# --- again, killed, in parallel


def test_one_worker_and_two_write_the_same_bytes(tmp_path, tokenizer_dir, monkeypatch):
    pools, real = [], workers.concurrent.futures.ProcessPoolExecutor
    monkeypatch.setattr(
        workers.concurrent.futures, "ProcessPoolExecutor", lambda *a: pools.append(a[0]) or real(*a)
    )
    rows = [{"prompt": f"q {i % 2500}", "answer": "a" * (i % 7)} for i in range(2600)]
    common = [
        "--source",
        str(write(tmp_path / "rows.jsonl", rows)),
        "--tokenizer",
        str(tokenizer_dir),
        "--val",
        "0.1",
    ]
    for count in (1, 2):
        prepare_data.main(
            [*common, "--out", str(tmp_path / f"out{count}"), "--workers", str(count)]
        )
    assert everything(tmp_path / "out1") == everything(tmp_path / "out2") and pools == [2]


def test_the_same_command_on_a_finished_folder_says_so_and_touches_nothing(prepare, capsys):
    made = prepare(PAIRS)
    before = {path: path.stat().st_mtime_ns for path in made.folder.rglob("*")}
    capsys.readouterr()
    prepare(PAIRS)
    assert "finished already" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in made.folder.rglob("*")}


def test_other_arguments_are_refused_by_name_and_fresh_accepts_them(prepare):
    before = everything(prepare(PAIRS, "--val", "5").folder)
    with pytest.raises(SystemExit, match=r"val 5.0 -> 6.0, seed 0 -> 3.*--fresh"):
        prepare(PAIRS, "--val", "6", "--seed", "3")
    assert everything(prepare(PAIRS, "--val", "5").folder) == before
    assert len(prepare(PAIRS, "--val", "6", "--fresh").val.rows) == 6


def test_fresh_with_another_tokenizer_uses_that_one(tmp_path, prepare):
    tiny.tiny(tiny.LLAMA3, eos="<|eot|>").save_pretrained(tmp_path / "other")
    assert texts(prepare(PAIRS, "--val", "0"))[0][1] == "reply 0<|im_end|>"
    assert (
        texts(prepare(PAIRS, "--val", "0", "--fresh", tokenizer=tmp_path / "other"))[0][1]
        == "reply 0<|eot|>"
    )


@pytest.mark.parametrize("block", [1, 100])
def test_the_size_of_the_copied_blocks_does_not_show(prepare, monkeypatch, block):
    whole = everything(prepare(PAIRS, "--val", "9", out="whole").folder)
    monkeypatch.setattr(split, "BLOCK_TOKENS", block)
    assert everything(prepare(PAIRS, "--val", "9").folder) == whole


def test_a_source_that_changed_is_refused(prepare):
    prepare(PAIRS)
    with pytest.raises(SystemExit, match=r"rows.jsonl has changed.*--fresh"):
        prepare(PAIRS[1:])


MOMENTS = {
    "while staging": (split.Seen, "add"),
    "while dividing": (np, "repeat"),
    "before the rename": (files, "publish"),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_anywhere_the_rerun_gives_the_same_bytes(prepare, monkeypatch, moment):
    whole = everything(prepare(PAIRS, "--val", "5", out="whole").folder)
    with monkeypatch.context() as patch:

        def die(*_, **__):
            raise KeyboardInterrupt

        patch.setattr(*MOMENTS[moment], die)
        with pytest.raises(KeyboardInterrupt):
            prepare(PAIRS, "--val", "5")
    assert everything(prepare(PAIRS, "--val", "5").folder) == whole


def test_fresh_never_deletes_a_folder_that_is_not_ours(tmp_path, prepare):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "meta.json").write_text("{}")
    for flag in ([], ["--fresh"]):
        with pytest.raises(SystemExit, match="in the way"):
            prepare(PAIRS, *flag)
    assert (tmp_path / "out" / "meta.json").read_text() == "{}"


def test_fresh_throws_the_old_folder_away_before_it_writes(prepare, monkeypatch):
    old = prepare(PAIRS).folder
    monkeypatch.setattr(
        prepare_data,
        "stage",
        lambda *_: pytest.fail("stop here") if not any(old.iterdir()) else None,
    )
    with pytest.raises(pytest.fail.Exception, match="stop here"):
        prepare(PAIRS, "--fresh")


def test_wrong_input_with_fresh_leaves_the_old_folder(prepare):
    before = everything(prepare(PAIRS).folder)
    with pytest.raises(SystemExit):
        prepare([{"unknown": 1}], "--fresh")
    assert everything(prepare(PAIRS).folder) == before


def test_a_folder_that_another_process_fills_is_refused(tmp_path, prepare):
    with files.lock_beside(tmp_path / "out"), pytest.raises(SystemExit, match="another process"):
        prepare(PAIRS)
    assert len(prepare(PAIRS).train.rows)
    assert not list(tmp_path.glob(".*")), "the lock goes with its release"


def test_show_marks_the_targets(prepare, capsys):
    prepare(PAIRS, "--val", "0", "--show", "2")
    first, shown = capsys.readouterr().out.split("\nrow 0 of 30", 1)
    assert first.count("<|im_start|>assistant\n[reply ") == 2, "before all are tokenized"
    shown = f"row 0 of 30{shown}"
    assert (
        "row 0 of 30 from" in shown
        and " tokens, 8 targets\n" in shown
        and "row 29 of 30 from" in shown
    )
    assert (
        shown.count("<|im_start|>assistant\n[reply ") == 2
        and "[reply 29<|im_end|>]\n\n" in shown
        and "\x1b" not in shown
    )


def test_show_leaves_a_masked_trace_outside_the_brackets(prepare, capsys):
    talk = tiny.chat("one", "<think>hm</think>\n\ntwo", "three", "<think>so</think>\n\nfour")
    prepare([{"messages": talk}], "--val", "0", "--show", "1", "--think", "mask")
    shown = capsys.readouterr().out
    assert (
        "<think>hm</think>\n\n[two<|im_end|>]\n" in shown
        and "<think>so</think>\n\n[four<|im_end|>]\n" in shown
    )


# --- turns and reasoning traces

TRACED = [
    {
        "messages": tiny.chat(
            f"ask {i}",
            f"<think>a {i}</think>\n\nyes {i}",
            "more",
            f"<think>b {i}</think>\n\nno {i}",
        )
    }
    for i in range(8)
]


def test_turns_and_think_decide_what_is_learnt_and_nothing_is_lost_by_default(prepare):
    def targets(*flags):
        return texts(prepare(TRACED, "--val", "0", *flags, "--fresh"))[3][1]

    one, two, end = "<think>a 3</think>\n\nyes 3", "<think>b 3</think>\n\nno 3", "<|im_end|>"
    assert targets() == f"{one}{end}{two}{end}" and targets("--turns", "last") == f"{two}{end}"
    assert targets("--think", "drop") == targets("--think", "mask") == f"yes 3{end}no 3{end}"
    assert targets("--think", "mask", "--turns", "last") == f"no 3{end}"


def test_a_masked_trace_stays_in_the_text_and_a_dropped_one_does_not(prepare):
    shown = {
        think: texts(prepare(TRACED, "--val", "0", "--think", think, out=think))[3][0]
        for think in ("keep", "drop", "mask")
    }
    assert (
        shown["keep"] == shown["mask"]
        and "<think>b 3</think>" in shown["mask"]
        and "think" not in shown["drop"]
    )


@pytest.mark.parametrize("think", ["keep", "drop", "mask"])
def test_val_prompts_and_references_lose_their_traces_where_the_rows_do(prepare, think):
    made = prepare(TRACED, "--val", "4", "--think", think)
    lines = list(
        map(
            json.loads, (made.folder / "val.prompts.jsonl").read_text(encoding="utf-8").splitlines()
        )
    )
    assert len(lines) == len(made.val.rows) == 4
    for line, (whole, _) in zip(lines, texts(made, "val")):
        assert (
            template.render(
                made.tokenizer(),
                [*line["messages"], {"role": "assistant", "content": line["reference"]}],
            )
            == whole
        )
        assert (
            ("<think>" in line["reference"])
            == ("<think>" in line["messages"][1]["content"])
            == (think != "drop")
        )


def test_the_side_of_a_row_does_not_depend_on_turns_or_think(prepare):
    def asked(made):
        return {whole.split("ask ")[1][0] for whole, _ in texts(made, "val")}

    settings = [], ["--turns", "last"], ["--think", "drop"]
    made = [
        prepare(TRACED, "--val", "0.4", *flags, out=f"out{number}")
        for number, flags in enumerate(settings)
    ]
    assert 0 < len(asked(made[0])) < 8 and asked(made[0]) == asked(made[1]) == asked(made[2])


def test_traces_without_end_are_counted_and_rows_that_differ_in_their_traces_alone_are_duplicates_once_those_are_dropped(
    prepare,
):
    rows = [
        {"prompt": "a", "answer": "<think>x"},
        {"prompt": "a", "answer": "<think>x</think>"},
        {"prompt": "a", "answer": "<think>x</think>b"},
        {"prompt": "a", "answer": "<think>y</think>b"},
    ]

    def dropped(think):
        return prepare(rows, "--val", "0", "--think", think, out=think).meta["dropped"]

    assert dropped("drop") == {"unclosed think": 1, "empty": 1, "duplicate": 1} and dropped(
        "mask"
    ) == {"unclosed think": 1, "empty": 1}
    assert dropped("keep") == {}


def test_other_turns_or_traces_are_another_data_set(prepare):
    prepare(TRACED, "--val", "0")
    with pytest.raises(SystemExit, match=r"turns 'all' -> 'last', think 'keep' -> 'mask'.*--fresh"):
        prepare(TRACED, "--val", "0", "--turns", "last", "--think", "mask")


def test_a_template_that_rewrites_earlier_answers_is_a_warning_where_there_are_some(
    tmp_path, prepare, capsys
):
    tiny.model("qwen3").save_pretrained(tmp_path / "qwen3")
    for warned, rows, *flags in (
        (True, TRACED),
        (False, PAIRS),
        (False, TRACED, "--turns", "last"),
    ):
        prepare(rows, "--val", "0", *flags, "--fresh", tokenizer=tmp_path / "qwen3")
        assert ("only the last one is learnt" in capsys.readouterr().out) == warned


def test_the_last_lines_are_a_table_and_the_next_command(prepare, capsys, monkeypatch):
    monkeypatch.delenv("MAKELEVEL", raising=False)  # a Makefile says its own
    prepare([*PAIRS, PAIRS[0]], "--val", "5", "--rows-per-chunk", "10")
    table = capsys.readouterr().out
    for line in ("train 25   val 5", "duplicate 1", "chunks    3 of 10 rows"):
        assert line in table
    argv = table.splitlines()[-1].split("stage1_sft.py ")[1]
    args = stage1_sft.parse_args(shlex.split(argv))
    assert Path(args.data).name == "out" and args.out == "runs/out/stage1"


def test_answers_that_end_in_no_special_token_are_a_warning(tmp_path, prepare, capsys):
    plain = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}{% if"
        " add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    tiny.tiny(plain).save_pretrained(tmp_path / "plain")
    prepare(PAIRS, tokenizer=tmp_path / "plain")
    assert "will not learn where to stop" in capsys.readouterr().out
    prepare(PAIRS, out="good")
    assert "will not learn where to stop" not in capsys.readouterr().out


def test_of_several_sources_each_has_the_end_of_its_own_answers():
    """Conversations end with <end_of_turn>, texts beside them with <eos>: both are learnt."""
    rows = np.zeros(2000, data.ROW)
    rows["source"][1200:] = 1
    ends = np.where(rows["source"] == 0, 7, 8)
    ends[::20] = 9
    split = types.SimpleNamespace(
        rows=rows, row=lambda n: (np.array([3, ends[n]]), np.array([False, True]))
    )
    assert data.Split.end_tokens(split) == [7, 8]


# --- errors: one line, 1 for files and 2 for arguments


def put(name, content):
    def make(folder):
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return name

    return make


def rows_of(name, rows):
    return lambda folder: write(folder / name, rows).name


def broken_parquet(folder):
    whole = write(folder / "whole.parquet", PAIRS).read_bytes()
    (folder / "broken.parquet").write_bytes(whole[: len(whole) // 2])
    return "broken.parquet"


def no_rows(folder):
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), folder / "a.parquet")
    return "a.parquet"


BAD_FILES = {
    "missing": (lambda folder: "nothing.jsonl", ["nothing.jsonl", "missing"]),
    "glob without a match": (lambda folder: "*.parquet", ["*.parquet", "missing"]),
    "empty": (put("a.jsonl", ""), ["a.jsonl", "empty"]),
    "blank": (put("a.jsonl", "\n\n"), ["a.jsonl", "no row"]),
    "empty list": (put("a.json", "[]"), ["a.json", "no row"]),
    "header only": (put("a.csv", "prompt,answer\n"), ["a.csv", "no row"]),
    "no rows": (no_rows, ["a.parquet", "no row"]),
    "other kind": (put("a.xyz", "x"), ["a.xyz", ".parquet, .json, .jsonl, .csv"]),
    "folder without data": (
        lambda folder: (folder / "void").mkdir() or "void",
        ["void", "no data file", ".parquet"],
    ),
    "broken parquet": (broken_parquet, ["broken.parquet", "cannot be read"]),
    "parquet of zeros": (put("a.parquet", bytes(100)), ["a.parquet", "cannot be read"]),
    "broken first line": (put("a.jsonl", '{"text": "x"\n'), ["a.jsonl", "line 1", "not JSON"]),
    "broken later line": (
        put("a.jsonl", '{"text": "x"}\n\n{"text": }\n{"text": "y"}\n'),
        ["a.jsonl", "line 3", "not JSON"],
    ),
    "broken object in a list": (
        put("a.json", '[{"text": "x"},\n\n {"text" "z"},\n' + '{"text": "y"},' * 9),
        ["a.json", "line 3", "broken JSON"],
    ),
    "list without end": (
        put("a.json", '[{"text": "x"},\n {"text": "y"}'),
        ["a.json", "line 2", "list of objects"],
    ),
    "stray bracket": (put("a.json", '{"text": "x"}\n]'), ["a.json", "line 2", "broken JSON"]),
    "object without end": (put("a.json", '{"text": "x'), ["a.json", "line 1", "broken JSON"]),
    "not objects": (put("a.json", "[1, 2, 3]"), ["a.json", "row 1", "not an object"]),
    "not UTF-8": (put("a.jsonl", b'{"text": "\xff\xfe"}'), ["a.jsonl", "UTF-8"]),
    "ragged csv": (
        put("a.csv", "prompt,answer\na,b\na,b,c\n"),
        ["a.csv", "cannot be read", "Expected 2 columns"],
    ),
    "unknown schema": (
        rows_of("a.jsonl", [{"foo": "1", "bar": "2"}]),
        ["a.jsonl", "foo, bar", "question+answer", "conversations", "--columns"],
    ),
    "text as messages": (
        rows_of("a.parquet", [{"messages": "hello"}]),
        ["a.parquet", "row 1", "messages", "role, content"],
    ),
    "numbers as messages": (
        rows_of("a.parquet", [{"messages": [1, 2]}]),
        ["a.parquet", "messages", "role, content"],
    ),
    "lists as prompts in parquet": (
        rows_of("a.parquet", [{"prompt": ["p"], "answer": "a"}]),
        ["a.parquet", "prompt", "list<", "text"],
    ),
    "objects as prompts in json": (
        rows_of("a.jsonl", [{"prompt": {"p": 1}, "answer": "a"}]),
        ["a.jsonl", "row 1", "prompt", "dict"],
    ),
    "one message as messages": (
        rows_of("a.jsonl", [{"messages": {"role": "user", "content": "x"}}]),
        ["row 1", "messages", "a list of"],
    ),
    "no assistant's turn": (
        rows_of("a.jsonl", [{"messages": tiny.chat("x")}] * 2),
        ["no row is left", "empty 2"],
    ),
    "no user's turn": (
        rows_of("a.jsonl", [{"messages": tiny.chat("x", "y")[1:]}]),
        ["no row is left", "no target 1"],
    ),
    "no role": (
        rows_of("a.jsonl", [{"messages": [{"content": "x"}]}]),
        ["no row is left", "unknown role 1"],
    ),
    "a column of nulls": (
        rows_of("a.parquet", [{"prompt": None, "answer": "a"}]),
        ["no row is left", "empty 1"],
    ),
    "only unclosed traces": (
        rows_of("a.jsonl", [{"prompt": "p", "answer": "<think>a"}]),
        ["no row is left", "unclosed think 1"],
        "--think",
        "mask",
    ),
    "nothing left": (
        rows_of("a.jsonl", [{"prompt": "p", "answer": ""}] * 3),
        ["no row is left", "empty 3"],
    ),
    "all in val": (
        rows_of("a.jsonl", [{"prompt": "p", "answer": "a"}]),
        ["to train on", "smaller --val"],
        "--val",
        "1",
    ),
    "no such column": (
        rows_of("a.jsonl", PAIRS),
        ["no column nope", "prompt, answer"],
        "--columns",
        "prompt=prompt,answer=nope",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_one_line_that_names_what_is_needed(
    tmp_path, monkeypatch, tokenizer_dir, capsys, case
):
    monkeypatch.chdir(tmp_path)
    make, words, *more = BAD_FILES[case]
    with pytest.raises(SystemExit) as end:
        prepare_data.main(
            ["--source", make(tmp_path), "--tokenizer", str(tokenizer_dir), "--out", "out", *more]
        )
    message = end.value.code  # a text as code is printed, and the exit code is 1
    assert isinstance(message, str) and message.startswith("error: ") and "\n" not in message
    assert not [word for word in words if word not in message], message
    assert not os.path.exists("out")


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--columns", "prompt=a"], "prompt=COL,answer=COL"),
        (["--columns", "text=a,input=b"], "text=COL"),
        (["--columns", "nonsense"], "text=COL"),
        (["--val", "-1"], "--val"),
        (["--val", "2.5"], "--val"),
        (["--val", "nan"], "--val"),
        (["--val", "inf"], "--val"),
        (["--max-len", "0"], "--max-len"),
        (["--rows-per-chunk", "0"], "--rows-per-chunk"),
        (["--workers", "-1"], "--workers"),
        (["--limit", "-5"], "--limit"),
        (["--long", "wrap"], "truncate"),
        (["--turns", "first"], "last"),
        (["--think", "hide"], "mask"),
        (["--max", "5"], "--max"),
    ],
)
def test_a_bad_argument_exits_with_2_and_names_it(capsys, flags, word):
    with pytest.raises(SystemExit) as end:
        prepare_data.parse_args(["--source", "x", "--tokenizer", "t", "--out", "o", *flags])
    assert end.value.code == 2 and word in capsys.readouterr().err


def test_a_tokenizer_that_is_not_there_is_one_line(tmp_path, prepare):
    with pytest.raises(SystemExit, match="no tokenizer could be loaded from .*nowhere"):
        prepare(PAIRS, tokenizer=tmp_path / "nowhere")


def test_a_tokenizer_that_cannot_end_an_answer_is_one_line(tmp_path, prepare):
    tiny.tiny(None, eos=None).save_pretrained(tmp_path / "endless")
    with pytest.raises(SystemExit, match="neither a chat template nor an eos_token"):
        prepare(PAIRS, tokenizer=tmp_path / "endless")
