"""Files as they lie about: split names, hidden folders, other encodings, separators and types, what
is no data at all; long texts and rows, a limit over several sources, a run that goes on."""

import contextlib
import gzip
import json
import os
import shutil

import make
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import prepare_data
from lib import checkpoints, data, files, template
from lib.prepare import formats, kinds, places, rows, schema, sources, split

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{7:064}\nsize 988097824\n"
TAR = b"0.json".ljust(257, b"\0") + b"ustar\0" + b"00" + bytes(1000)
PAIR = {"prompt": "question", "answer": "reply"}
PAIR_AS_MESSAGES = {
    "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
}


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def lines(values):
    return "".join(json.dumps(value) + "\n" for value in values)


def names(where):
    return [os.path.basename(place.path) for place in sources.locate(str(where))]


def read(path, columns=("prompt", "answer"), encoding=None):
    place = kinds.recognised(places.on_disk(path), encoding)
    there = formats.columns_of(place).types
    return list(formats.records(place, [name for name in columns if name in there]))


@pytest.fixture
def prepare(tmp_path, tokenizer_dir, no_picture):
    def run(*words, out="out"):
        make.call(
            prepare_data.main,
            *("--tokenizer", tokenizer_dir, "--out", tmp_path / out, "--workers", 1, *words),
        )
        return data.Dataset(tmp_path / out)

    return run


def said_by(dataset, part="train"):
    """Return the answers of all rows."""
    tokenizer, split = dataset.tokenizer(), getattr(dataset, part)
    found = map(split.row, range(len(split.rows)))
    return [tokenizer.decode(ids[answer]).removesuffix("<|im_end|>") for ids, answer in found]


# --- which files of a folder are data


@pytest.mark.parametrize(
    ("there", "taken"),
    [
        (["data/train-0.jsonl", "data/test-0.jsonl"], ["train-0.jsonl"]),
        (["train/0.jsonl", "test/0.jsonl", "test/train.jsonl"], ["train.jsonl", "0.jsonl"]),
        (["x_train.csv", "x_dev.csv", "more.csv"], ["x_train.csv"]),
        (["train_sft-0-of-2.parquet", "test_sft-0.parquet"], ["train_sft-0-of-2.parquet"]),
        (["a.jsonl", "a_test.jsonl"], ["a.jsonl"]),
        (["test-0.jsonl", "test-1.jsonl"], ["test-0.jsonl", "test-1.jsonl"]),
        (["web-dev-talk.jsonl", "b.jsonl"], ["b.jsonl", "web-dev-talk.jsonl"]),
        (["x.train.jsonl.gz", "x.test.jsonl.gz"], ["x.train.jsonl.gz"]),
        (["x_v1.5_train.csv", "x_v1.5_test.csv"], ["x_v1.5_train.csv"]),
        (["x_2024_train_01.csv", "x_2024_test_01.csv"], ["x_2024_train_01.csv"]),
        (["x_train_en.csv", "x_test_en.csv"], ["x_train_en.csv"]),
        (["train1.csv", "test1.csv"], ["train1.csv"]),
        (["train-0-of-1-6ef3.parquet", "test-0-of-1-6ef3.parquet"], ["train-0-of-1-6ef3.parquet"]),
    ],
)
def test_of_a_folder_with_split_names_train_is_taken_alone(tmp_path, there, taken, capsys):
    for name in there:
        put(tmp_path / "in" / name, "x")
    assert sorted(names(tmp_path / "in")) == sorted(taken)
    assert ("left out" in capsys.readouterr().out) == (len(taken) < len(there))
    assert names(f"file://{tmp_path}/in") == names(tmp_path / "in")
    assert len(names(f"{tmp_path}/in:all")) == len(there)


def test_another_split_is_asked_for_by_name(tmp_path):
    for name in ("train-0.jsonl", "test-0.jsonl", "val-0.jsonl"):
        put(tmp_path / "in" / name, "x")
    assert names(f"{tmp_path}/in:test") == ["test-0.jsonl"]
    assert names(f"{tmp_path}/in:validation") == ["val-0.jsonl"]
    with pytest.raises(SystemExit, match=r"has no split nope; saw"):
        names(f"{tmp_path}/in:nope")
    for word in ("train_sft", "train_gen"):  # as UltraChat's are called
        put(tmp_path / "named" / word / f"{word}.jsonl", "x")
    assert names(f"{tmp_path}/named:train_gen") == ["train_gen.jsonl"]


def test_a_glob_over_several_splits_takes_them_and_says_so(tmp_path, capsys):
    for name in ("train/0.jsonl", "test/0.jsonl", "test/1.jsonl"):
        put(tmp_path / "in" / name, "x")
    for where in (f"{tmp_path}/in/*/*.jsonl", f"file://{tmp_path}/in/*/*.jsonl"):
        assert len(names(where)) == 3
        assert "takes files of several splits: test, train" in capsys.readouterr().out
    names(f"{tmp_path}/in/test/*")
    assert "several" not in capsys.readouterr().out


def test_files_that_are_not_read_are_named(tmp_path, capsys):
    for name in ("a.jsonl", "b.jsonl.lz4", "c.xlsx", "part-00000", "README.md", "_SUCCESS"):
        put(tmp_path / "in" / name, "x")
    assert names(tmp_path / "in") == ["a.jsonl"]
    assert "3 of a kind that is not read" in capsys.readouterr().out


def test_hidden_folders_metadata_and_text_beside_data_are_left_out_and_said(tmp_path, capsys):
    others = (
        *(".ipynb_checkpoints/a-checkpoint.jsonl", ".cache/p.jsonl", ".git/x.json"),
        *("__MACOSX/._a.jsonl", "dataset_info.json", "state.json", "notes.txt"),
    )
    for name in ("a.jsonl", *others):
        put(tmp_path / "in" / name, "x")
    assert names(tmp_path / "in") == names(f"file://{tmp_path}/in") == ["a.jsonl"]
    said = capsys.readouterr().out
    for word in (".ipynb_checkpoints", ".cache", ".git", "__MACOSX", "metadata", "text beside"):
        assert word in said
    assert names(tmp_path / "in" / "state.json") == ["state.json"]  # who names it gets it


def test_a_glob_over_a_loop_of_links_ends(tmp_path):
    put(tmp_path / "in" / "deep" / "a.jsonl", "x")
    put(tmp_path / "in" / ".cache" / "b.jsonl", "x")
    for name in ("one", "two"):
        (tmp_path / "in" / name).symlink_to(tmp_path / "in")
    assert names(f"{tmp_path}/in/**/*.jsonl") == ["a.jsonl"]
    assert names(f"{tmp_path}/in/**/d*p/**/*.jsonl") == ["a.jsonl"]
    assert names(f"file://{tmp_path}/in/**/*.jsonl") == names(tmp_path / "in") == ["a.jsonl"]
    assert sources.name_and_where(f"n={tmp_path}/in/**/*.jsonl")[0] == "n"


def test_names_that_no_file_can_have_are_one_line(tmp_path):
    for where in ("x" * 5000, f"n={'y' * 300}", "a\0b.jsonl"):
        _, place = sources.name_and_where(where)
        with pytest.raises(SystemExit, match="is missing"):
            sources.locate(place)
    put(tmp_path / "in" / "a\udcff.jsonl", lines([PAIR]))
    with pytest.raises(SystemExit, match=r"not UTF-8.*another name"):
        sources.locate(str(tmp_path / "in"))


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "csv", "arrow"])
def test_an_empty_part_is_skipped_and_counted(tmp_path, prepare, capsys, suffix):
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist([PAIR]), put(tmp_path / "in" / "0.parquet", ""))
        none = pa.table({"prompt": pa.array([], pa.string()), "answer": pa.array([], pa.string())})
        pq.write_table(none, tmp_path / "in" / "1.parquet")
    elif suffix == "arrow":
        for number, rows_there in enumerate(([PAIR], [])):
            table = pa.Table.from_pylist(
                rows_there, pa.schema({name: pa.string() for name in PAIR})
            )
            path = put(tmp_path / "in" / f"{number}.arrow", "")
            with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as out:
                out.write_table(table)
    else:
        header = "prompt,answer\n" if suffix == "csv" else "\n"
        put(tmp_path / "in" / f"1.{suffix}", header)
        whole = "prompt,answer\nquestion,reply\n" if suffix == "csv" else lines([PAIR])
        put(tmp_path / "in" / f"0.{suffix}", whole)
    put(tmp_path / "in" / f"2.{suffix}", "")
    made = prepare("--source", tmp_path / "in", "--val", 0)
    assert said_by(made) == ["reply"] and len(made.meta["sources"][0]["files"]) == 1
    assert "2 without a row" in capsys.readouterr().out
    (tmp_path / "in" / f"0.{suffix}").unlink()
    code, line = make.ends(
        *(prepare_data.main, "--source", tmp_path / "in", "--tokenizer", "x", "--out", "o")
    )
    assert code == 1 and "row" in line


# --- what a file is


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("a.parquet", POINTER, "git lfs pull"),
        ("a.jsonl", POINTER, "git lfs pull"),
        ("a.csv", POINTER, "git lfs pull"),
        ("a.json.gz", POINTER, "git lfs pull"),
        ("a.jsonl", "<!DOCTYPE html><html>", "web page"),
        ("a.csv", b"PK\3\4\x14\0", "spreadsheet"),
        ("a.csv", b"\xd0\xcf\x11\xe0\xa1", ".xls"),
        ("a.json", b"SQLite format 3\0", "SQLite"),
        ("a.json", b"\x80\4\x95", "pickle"),
        ("a.txt", b"\x93NUMPY\1\0", "numpy"),
        ("a.parquet", b"", "empty"),
        ("a.jsonl", '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "not JSON"),
        ("a.json", '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "broken JSON"),
        ("a.jsonl", '{"a": ' + "7" * 5000 + "}", "not JSON"),
        ("a.json", '{"a": ' + "7" * 5000 + "}", "broken JSON"),
        ("a.jsonl", b'{"a": "\x81\x8d\x8f"}', "--encoding"),
        ("a.csv", "prompt,answer\na,b, c\n", "double quotes"),
        ("a.tar", TAR, "tar -xf"),
        ("a.jsonl", TAR, "tar -xf"),
        ("a.tar.gz", gzip.compress(TAR, mtime=0), "tar -xf"),
        ("a.xlsx", b"PK\3\4\x14\0", "save it as .csv"),
        ("a.sqlite", b"SQLite format 3\0", "a table of it as .csv"),
        ("a.yaml", "- prompt: x\n", "of a kind that is not read; saw .yaml"),
        ("a.parquet.gz", gzip.compress(b"PAR1", mtime=0), "unpack it"),
        ("a.jsonl", "é".encode() * 30 + b"\xff", "iconv"),
        ("a.csv", b"prompt,answer\n" + "é,ù\n".encode() * 30 + b"\xe2\x80,b\n", "iconv"),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path, name, content, word):
    path = put(tmp_path / name, content)
    with pytest.raises(SystemExit) as end:
        read(path)
    assert word in end.value.code and "\n" not in end.value.code


def test_a_pointer_in_place_of_a_model_is_named(tmp_path, tokenizer_dir):
    for name in ("tokenizer.json", "model.safetensors", "best/model.safetensors", "x.gguf"):
        folder = tmp_path / name.replace("/", "-")
        put(folder / "config.json", "{}")
        path = put(folder / name, POINTER)
        with pytest.raises(SystemExit, match="git lfs pull"):
            checkpoints.local_folder(str(path if name == "x.gguf" else folder))
    with pytest.raises(SystemExit, match="git lfs pull"):
        template.load_tokenizer(tmp_path / "tokenizer.json")


def arrow(stream):
    sink = pa.BufferOutputStream()
    table = pa.Table.from_pylist([PAIR])
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def parquet():
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist([PAIR]), sink)
    return sink.getvalue().to_pybytes()


KINDS = {
    "a.ndjson": lines([PAIR]),
    "a.tsv": "prompt\tanswer\nquestion\treply\n",
    "stream.arrow": arrow(True),
    "file.arrow": arrow(False),
    "a.feather": arrow(False),
    "list.jsonl": json.dumps([PAIR], indent=1),
    "lines.txt": lines([PAIR]),
    "lines.csv": lines([PAIR]),
    "plain.jsonl.gz": lines([PAIR]),
    "table.jsonl": parquet(),
    "table.arrow": parquet(),
    "commas.jsonl": lines([PAIR]).rstrip("\n") + ",\n",
    "several lines.jsonl": json.dumps(PAIR, indent=1) + "\n",
    "carriage return.jsonl": lines([PAIR, PAIR]).replace("\n", "\r"),
    "carriage return.csv": "prompt,answer\rquestion,reply\r",
    "dos.jsonl": lines([PAIR]).replace("\n", "\r\n"),
    "no suffix": parquet(),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_file_is_read_as_what_it_is(tmp_path, name):
    found = read(put(tmp_path / name, KINDS[name]))
    assert found[:1] == [PAIR] and found[1:] in ([], [PAIR])


def test_every_line_of_a_text_file_is_a_row(tmp_path):
    path = put(tmp_path / "a.txt", "one line\nanother, é\n")
    assert read(path) == [{"text": "one line"}, {"text": "another, é"}]
    put(path, "a few NULs are dirt\nand no UTF-\0 16\n")
    assert [row["text"] for row in read(path)] == ["a few NULs are dirt", "and no UTF-\0 16"]


CHINESE = "说出一种颜色,绿色\r\n说出一种水果,梨\r\n"
FRENCH = "Nomme une saison,été\r\nNomme un plat,crêpe\r\n"


@pytest.mark.parametrize(
    ("encoding", "found", "text"),
    [
        ("gbk", "gb18030", CHINESE),
        ("utf-16", "utf-16", CHINESE),
        ("utf-16-le", "utf-16-le", FRENCH),
        ("utf-8-sig", "utf-8-sig", CHINESE),
        ("cp1252", "cp1252", FRENCH),
        ("utf-8", "utf-8-sig", FRENCH),
    ],
)
def test_the_encoding_is_found_and_said(tmp_path, capsys, encoding, found, text):
    path = put(tmp_path / "a.csv", ("prompt,answer\r\n" + text).encode(encoding))
    wanted = [line.split(",")[1] for line in text.splitlines()]
    assert [row["answer"] for row in read(path)] == wanted
    assert ("--encoding" in capsys.readouterr().out) == (found != "utf-8-sig")


@pytest.mark.parametrize("encoding", ["cp1251", "shift_jis", "euc_kr", "big5"])
def test_an_encoding_that_is_not_plain_is_asked_for(tmp_path, encoding):
    word = {
        "cp1251": "привет мир",
        "shift_jis": "こんにちは",
        "euc_kr": "안녕하세요",
        "big5": "顏色",
    }
    path = put(tmp_path / "a.csv", f"prompt,answer\nx,{word[encoding]}\n".encode(encoding))
    with pytest.raises(SystemExit, match="--encoding NAME"):
        read(path)
    assert read(path, encoding=encoding)[0]["answer"] == word[encoding]


def test_another_letter_far_down_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(kinds, "TRIED", 100)
    text = "prompt,answer\n" + "a,b\n" * 100 + FRENCH
    assert read(put(tmp_path / "a.csv", text.encode("cp1252")))[-1]["answer"] == "crêpe"


@pytest.mark.parametrize(
    "text",
    [
        "prompt;answer\nquestion;reply\n",
        "prompt|answer\nquestion|reply\n",
        "prompt\tanswer\nquestion\treply\n",
        "prompt, answer\nquestion, reply\n",
        "sep=;\nprompt;answer\nquestion;reply\n",
        "# made by hand\n\nprompt,answer\nquestion,reply\n",
        '#,prompt,answer\n1,question,"reply"\n',
    ],
)
def test_the_layout_of_a_csv_file_is_found(tmp_path, text):
    assert read(put(tmp_path / "a.csv", text)) == [PAIR]


def test_a_csv_row_longer_than_a_block_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "CSV_BLOCKS", (64, 1 << 20))
    wanted = [{"prompt": f"p{i}", "answer": "a" * (500 if i == 20 else 3)} for i in range(40)]
    text = "prompt,answer\n" + "".join(f"{row['prompt']},{row['answer']}\n" for row in wanted)
    assert read(put(tmp_path / "a.csv", text)) == wanted


def test_names_of_columns_match_whatever_their_case(tmp_path):
    path = put(tmp_path / "a.csv", " Instruction ,OUTPUT\nAsk,Say\n")
    columns = sources.look(kinds.recognised(places.on_disk(path))).columns
    assert {columns["prompt"].strip(), columns["answer"].strip()} == {"Instruction", "OUTPUT"}
    assert schema.among(("text", "Text"), ["Text", "TEXT"]) == "Text"


MESSAGES = [{"role": "user", "content": "Ask"}, {"role": "assistant", "content": "Say"}]
PLAIN = pa.struct([("role", pa.string()), ("content", pa.string())])
LISTS = pa.struct([("role", pa.list_(pa.string())), ("content", pa.list_(pa.string()))])
IN_LISTS = {"role": ["user", "assistant"], "content": ["Ask", "Say"]}
MAPS = pa.list_(pa.map_(pa.string(), pa.string()))


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (IN_LISTS, LISTS),
        (IN_LISTS | {"name": None}, pa.struct([*LISTS, ("name", pa.list_(pa.string()))])),
        (MESSAGES, pa.list_(PLAIN, 2)),
        (MESSAGES, pa.large_list(PLAIN)),
        ([list(message.items()) for message in MESSAGES], MAPS),
        (MESSAGES, pa.list_(pa.struct([("role", pa.binary()), ("content", pa.string())]))),
    ],
)
def test_types_that_other_tools_write_are_read(tmp_path, suffix, value, kind):
    table, path = pa.table({"messages": pa.array([value], kind)}), tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_stream(str(path), table.schema) as writer:
            writer.write_table(table)
    (row,) = sources.rows(sources.look(places.on_disk(path)))
    assert [(one["role"], one["content"]) for one in row] == [("user", "Ask"), ("assistant", "Say")]


def test_bytes_are_text(tmp_path):
    pq.write_table(pa.table({"text": pa.array(["é".encode()])}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", ["text"]) == [{"text": "é"}]
    pq.write_table(pa.table({"text": pa.array([b"\xff"])}), tmp_path / "b.parquet")
    with pytest.raises(SystemExit, match="column text"):
        read(tmp_path / "b.parquet", ["text"])


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_the_pieces_in_which_json_is_read_do_not_show(tmp_path, monkeypatch, size):
    monkeypatch.setattr(formats, "CHARACTERS", size)
    wanted = [
        {"a": f'é [{{"\\ {i}', "b": [{"n": -1.5e3, "t": True}, None, 12345]} for i in range(9)
    ]
    for text in (json.dumps(wanted), json.dumps(wanted, indent=2), lines(wanted)):
        assert read(put(tmp_path / "a.json", text)) == wanted


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.txt"])
def test_a_row_that_no_memory_would_hold_is_one_line(tmp_path, monkeypatch, name):
    monkeypatch.setattr(formats, "LONGEST", 1000)
    monkeypatch.setattr(formats, "CHARACTERS", 100)
    with pytest.raises(SystemExit, match="longer than memory should hold"):
        read(put(tmp_path / name, '{"text": "' + "x" * 2000 + '"}\n'))


def test_a_first_row_without_fields_is_no_empty_file(tmp_path):
    assert read(put(tmp_path / "a.jsonl", lines([{}, PAIR])))[-1] == PAIR


# --- long rows


def test_the_cases_of_the_memory_bench_are_read(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(os.path.join(os.path.dirname(__file__), "../../bench/data"))
    import hostile

    for name, (write, _) in hostile.CASES.items():
        write(tmp_path / name, 400_000)
        found = read(tmp_path / name, ["prompt", "answer", "text"])
        assert len(found) >= 1 and {*found[-1]} & {"answer", "text"}, name
    assert max(len(row.get("answer", "")) for row in read(tmp_path / "a row of 100 MB.json")) > 3e5


def test_long_texts_become_rows_and_lose_nothing(tmp_path, prepare, capsys, monkeypatch):
    texts = [" ".join(f"w{d}x{i}" for i in range(n)) for d, n in enumerate((4, 90, 60))]
    path = put(tmp_path / "a.jsonl", lines({"text": text} for text in texts))
    words = ("--source", path, "--val", 0, "--max-len", 32)
    made = prepare(*words)
    whole = prepare(*words[:4], "--max-len", 10_000, out="whole")
    assert made.train.tokens.tolist() == whole.train.tokens.tolist()
    assert made.train.rows["length"].max() == 32 and len(made.train.rows) > 10
    assert made.meta["split"]["texts"] == 2 and "into" in capsys.readouterr().out
    assert len(prepare(*words, "--long", "drop", out="drop").train.rows) == 1
    monkeypatch.setattr(rows, "LEAST", 100)
    monkeypatch.setattr(rows, "AT_ONCE", 100)  # tokenized piece by piece
    pieces = prepare(*words, "--export", tmp_path / "rows", out="pieces")
    assert pieces.train.tokens.tolist() == made.train.tokens.tolist()
    exported = pq.read_table(tmp_path / "rows" / "train.parquet")["text"].to_pylist()
    assert "".join(exported) == "".join(texts)


@pytest.mark.parametrize("long", ["drop", "pack", "truncate"])
def test_what_is_longer_than_any_row_is_never_tokenized(tmp_path, prepare, monkeypatch, long):
    monkeypatch.setattr(rows, "LEAST", 1000)
    seen, encode = [], template.encode

    def spy(tokenizer, given, *more):
        seen.extend(sum(len(one["content"]) for one in row) for row in given)
        return encode(tokenizer, given, *more)

    monkeypatch.setattr(template, "encode", spy)
    huge = {"prompt": "huge", "answer": "word " * 100_000}
    path = put(tmp_path / "a.jsonl", lines([PAIR, huge]))
    made = prepare("--source", path, "--val", 0, "--long", long, "--max-len", 40)
    assert max(seen) < 10_000
    assert len(made.train.rows) == (2 if long == "truncate" else 1)
    assert made.meta["dropped"] == ({} if long == "truncate" else {"too long": 1})


def test_more_turns_than_tokens_are_never_rendered(tmp_path, prepare, monkeypatch):
    lengths, render = [], template.render

    def spy(tokenizer, messages, **more):
        lengths.append(len(messages))
        return render(tokenizer, messages, **more)

    monkeypatch.setattr(template, "render", spy)
    many = [{"role": role, "content": "x"} for role in ("user", "assistant") * 500]
    path = put(tmp_path / "a.jsonl", lines([{"messages": many}, PAIR_AS_MESSAGES]))
    made = prepare("--source", path, "--val", 0, "--max-len", 60)
    assert made.meta["dropped"] == {"too long": 1} and max(lengths) < 10
    made = prepare("--source", path, "--val", 0, "--max-len", 60, "--long", "truncate", out="cut")
    assert made.meta["rows"]["train"] == 2 and max(lengths) <= 60


# --- a limit, small data, a run that goes on


def several(tmp_path, counts):
    words = []
    for name, count in counts.items():
        pairs = [{"prompt": f"{name} {i}", "answer": f"{name}{i}"} for i in range(count)]
        words += ["--source", put(tmp_path / f"{name}.jsonl", lines(pairs))]
    return words


def test_a_limit_takes_of_every_source_its_share(tmp_path, prepare, capsys):
    words = [*several(tmp_path, {"a": 30, "b": 4, "c": 30}), "--val", 0, "--limit", 18]

    def kept(dataset):
        return [source["rows"]["train"] for source in dataset.meta["sources"]]

    assert kept(prepare(*words)) == [7, 4, 7]  # b has no more: the others make up for it
    said = capsys.readouterr().out
    assert "limit: a 6, b 6, c 6" in said and "before their share: a 1, c 1 more" in said
    assert kept(prepare(*words[:-1], 70, out="all")) == [30, 4, 30]
    shares = prepare(*words[:-1], 62, "--mix", "a:0.5 b:0 c:0.5", out="mixed")
    assert kept(shares) == [30, 0, 30]  # no share of b at all
    for name in "abc":
        table = pa.table({"prompt": [f"{name}{i}" for i in range(40 if name == "a" else 10)]})
        pq.write_table(table.append_column("answer", table["prompt"]), tmp_path / f"{name}.parquet")
    words = [("--source", tmp_path / f"{name}.parquet") for name in "abc"]
    known = prepare(*sum(words, ()), "--val", 0, "--limit", 18, out="known")
    assert kept(known) == [12, 3, 3]


def test_small_data_is_said_with_the_flags(tmp_path, prepare, capsys):
    words = several(tmp_path, {"a": 40})
    prepare(*words, "--val", 2)
    said = capsys.readouterr().out
    assert "val is 2 row(s)" in said and "--val 8" in said
    assert "--tokens-per-step" not in said, "the trainers know theirs"


def everything(folder):
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


@pytest.mark.parametrize("limit", [0, 30])
@pytest.mark.parametrize("at", [3, 17, 30, 41, "dividing"])
def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(
    tmp_path, prepare, monkeypatch, capsys, at, limit
):
    monkeypatch.setattr(prepare_data, "SHARD_ROWS", 10)
    words = [*several(tmp_path, {"a": 25, "b": 25}), "--val", 6, "--limit", limit]
    put(tmp_path / "c.jsonl", lines([{"text": "word " * 50}, {"text": "word"}, {"text": "word"}]))
    words += ["--source", tmp_path / "c.jsonl", "--max-len", 40]
    whole = everything(prepare(*words, out="whole").folder)
    capsys.readouterr()

    def dies(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        if at == "dividing":
            patch.setattr(files, "publish", dies)
        else:
            append = split.Staging.append

            def counted(self, *row):
                append(self, *row)
                if self.count == at:
                    dies()

            patch.setattr(split.Staging, "append", counted)
        prepare(*words)
    seen, encode = [], template.encode

    def spy(tokenizer, given, *more):
        seen.extend(given)
        return encode(tokenizer, given, *more)

    monkeypatch.setattr(template, "encode", spy)
    made = everything(prepare(*words).folder)
    assert made == whole
    went_on = "prepare goes on" in capsys.readouterr().out
    assert went_on == (at not in (3, "dividing") and not (limit and at == 41))
    assert not went_on or len(seen) < (83 if limit else 53)


@pytest.mark.parametrize("part", ("tokens.npy", "answer.npy", "rows.npy", "prompts.jsonl", "json"))
def test_what_was_staged_before_a_kill_is_not_used_if_it_is_damaged(
    tmp_path, prepare, monkeypatch, part
):
    monkeypatch.setattr(prepare_data, "SHARD_ROWS", 10)
    words = [*several(tmp_path, {"a": 25}), "--val", 6]
    whole = everything(prepare(*words, out="whole").folder)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(split, "refuse_empty", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        prepare(*words)
    (staged,) = tmp_path.glob(f".*/staged.{part}")
    content = bytearray(staged.read_bytes())
    content[200 if part.endswith("npy") else 12] ^= 1
    staged.write_bytes(content)
    if part != "json":  # else: as if nothing had been noted
        with pytest.raises(SystemExit, match=f"is damaged; .* rm -r {staged.parent}"):
            prepare(*words)
        shutil.rmtree(staged.parent)
    assert everything(prepare(*words).folder) == whole


def test_a_source_that_changed_meanwhile_starts_over(tmp_path, prepare, monkeypatch, capsys):
    monkeypatch.setattr(prepare_data, "SHARD_ROWS", 10)
    words = [*several(tmp_path, {"a": 25}), "--val", 0]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(split, "refuse_empty", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        prepare(*words)
    several(tmp_path, {"a": 24})
    assert len(prepare(*words).train.rows) == 24
    assert "goes on" not in capsys.readouterr().out


def test_sources_and_tokenizer_are_known_by_what_they_hold(
    tmp_path, prepare, tokenizer_dir, monkeypatch, capsys
):
    """From another working directory, or moved, they were something else; so was what a killed run
    had staged, by any other spelling."""
    monkeypatch.setattr(prepare_data, "SHARD_ROWS", 10)
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "in/rows.jsonl", lines(PAIR | {"prompt": f"q{i}"} for i in range(25)))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(split, "refuse_empty", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        prepare("--source", "in/rows.jsonl", "--val", 2)
    shutil.copytree(tokenizer_dir, tmp_path / "copied")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    prepare("--source", "../in/./rows.jsonl", "--tokenizer", "../copied/", "--val", 2)
    assert "prepare goes on" in capsys.readouterr().out
    shutil.move(tmp_path / "in", tmp_path / "moved")
    prepare("--source", "../moved/rows.jsonl", "--val", 2)
    assert "finished already" in capsys.readouterr().out
    put(tmp_path / "new/rows.jsonl", lines([PAIR] * 25))
    with pytest.raises(SystemExit, match="was prepared from something else; saw source"):
        prepare("--source", "../new/rows.jsonl", "--val", 2)
    for more in (["--chat-template", "chatml"], ["--tokenizer", str(tmp_path / "other")]):
        made = template.load_tokenizer(tokenizer_dir)
        made.chat_template = made.chat_template.replace("im_end", "im_start")
        made.save_pretrained(tmp_path / "other")
        with pytest.raises(SystemExit, match="was prepared from something else; saw"):
            prepare("--source", "../moved/rows.jsonl", "--val", 2, *more)


@pytest.mark.parametrize("more", [[], ["--dry-run"]], ids=["", "dry"])
def test_show_says_what_was_understood_before_all_rows_are_read(
    tmp_path, prepare, monkeypatch, capsys, more
):
    """It came at the very end of a long run."""

    def stops(*_):
        raise KeyboardInterrupt

    put(tmp_path / "a.jsonl", lines([PAIR_AS_MESSAGES] * 3))
    put(tmp_path / "b.csv", "instruction,output\nask,say\n")
    monkeypatch.setattr(prepare_data, "stage", stops)
    with contextlib.suppress(KeyboardInterrupt, SystemExit):
        prepare("--source", tmp_path / "a.jsonl", tmp_path / "b.csv", "--show", 3, *more)
    said = capsys.readouterr().out
    assert said.count("row 1 of a as it is read") == said.count("row 2 of a as it is read") == 1
    assert "row 3 of a" not in said and "[a<|im_end|>]" in said
    assert "ask" in said.split("row 1 of b as it is read")[1]
