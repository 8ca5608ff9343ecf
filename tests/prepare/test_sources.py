"""Sources with names from every place: packed files, a real S3 server on loopback, a fake hub;
their errors; the way out again."""

import bz2
import gzip
import io
import json
import lzma
import os
import re
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_hub import Hub
from huggingface_hub import constants
from pyarrow import fs

import prepare_data
from lib import data, files
from lib.options import mix
from lib.prepare import export, hub, places, sources

pytestmark = pytest.mark.usefixtures("no_picture")
KEY, SECRET = "AKIDKEY", "vErY/sEcReT+9"
PAIRS = [{"prompt": f"question {i}", "answer": f"reply {i}"} for i in range(30)]


@pytest.fixture
def prepare(tmp_path, tokenizer_dir):
    """Return a function that runs the script on --source values, and opens what it wrote."""

    def run(*words, out="out"):
        prepare_data.main(
            [
                str(word)
                for word in (
                    "--tokenizer",
                    tokenizer_dir,
                    "--out",
                    tmp_path / out,
                    "--workers",
                    "1",
                    *words,
                )
            ]
        )
        return data.Dataset(tmp_path / out)

    return run


@pytest.fixture
def refused(tmp_path, tokenizer_dir):
    """Return a function that runs the script, which must end with exit code 1 and one line, and
    returns the line."""

    def run(*words, of=(), never=(SECRET, "vErY", "sEcReT"), out="refused"):
        with pytest.raises(SystemExit) as end:
            prepare_data.main(
                [
                    str(word)
                    for word in (
                        "--tokenizer",
                        tokenizer_dir,
                        "--out",
                        tmp_path / out,
                        "--workers",
                        "1",
                        *words,
                    )
                ]
            )
        line = end.value.code  # a text as code is printed, and the exit code is 1
        assert (
            isinstance(line, str)
            and line.startswith("error: ")
            and "\n" not in line
            and len(line) < 800
        ), line
        assert not [word for word in of if word not in line] and not [
            word for word in never if word in line
        ], line
        return line

    return run


def usage(capsys, *words):
    with pytest.raises(SystemExit) as end:
        prepare_data.parse_args(["--tokenizer", "t", "--out", "o", *words])
    assert end.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def packed(rows, suffix):
    """Return rows as the bytes of a file of that suffix, made without pyarrow's codecs where the
    standard library has them."""
    end = suffix.split(".")[1]
    if end == "parquet":
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), sink)
        return sink.getvalue()
    lines = {
        "jsonl": lambda: "".join(json.dumps(row) + "\n" for row in rows),
        "json": lambda: json.dumps(rows, indent=1),
        "csv": (
            lambda: (
                "prompt,answer\n" + "".join(f"{row['prompt']},{row['answer']}\n" for row in rows)
            )
        ),
    }[end]()
    pack = {
        "gz": gzip.compress,
        "bz2": bz2.compress,
        "xz": lzma.compress,
        "zst": lambda whole: pa.Codec("zstd").compress(whole, asbytes=True),
    }.get(suffix.split(".")[-1], bytes)
    half = len(lines) // 2
    return b"".join(
        pack(part.encode()) for part in (lines[:half], lines[half:])
    )  # two members, as pigz and friends write them


def put(path, rows=PAIRS):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(packed(rows, re.search(r"\.(parquet|jsonl?|csv).*", path.name)[0]))
    return path


def some(letter, count=10):
    return [
        {"prompt": f"question {letter}{i}", "answer": f"reply {letter}{i}"} for i in range(count)
    ]


def targets(made, split="train"):
    tokenizer, rows = made.tokenizer(), getattr(made, split)
    return [
        tokenizer.decode(ids[answer]).removesuffix("<|im_end|>")
        for ids, answer in map(rows.row, range(len(rows.rows)))
    ]


# --- packed files, names


@pytest.mark.parametrize("packing", [".gz", ".bz2", ".zst", ".xz"])
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv"])
def test_packed_files_hold_the_same_rows(tmp_path, kind, packing):
    plain, small = (
        places.on_disk(put(tmp_path / f"data{suffix}")) for suffix in (kind, kind + packing)
    )
    assert list(sources.rows(sources.look(small))) == list(sources.rows(sources.look(plain)))
    assert os.path.getsize(small.path) < os.path.getsize(plain.path)


@pytest.mark.parametrize("packing", [".gz", ".bz2", ".zst", ".xz"])
def test_a_packed_file_that_is_cut_short_is_one_line(tmp_path, refused, packing):
    path = put(
        tmp_path / f"data.jsonl{packing}",
        [{"prompt": os.urandom(9).hex(), "answer": "a"} for _ in range(3000)],
    )
    path.write_bytes(path.read_bytes()[:-200])
    refused("--source", path, of=[f"data.jsonl{packing} cannot be read", "a whole jsonl file"])


@pytest.mark.parametrize(
    ("text", "name", "where"),
    [
        ("fin=a/b.jsonl.gz", "fin", "a/b.jsonl.gz"),
        ("a/b.jsonl.gz", "b", "a/b.jsonl.gz"),
        ("x/a/*.parquet", "a", "x/a/*.parquet"),
        ("x/part-*.csv", "part", "x/part-*.csv"),
        ("there=1.csv", "there-1", "there=1.csv"),
        ("n=there=1.csv", "n", "there=1.csv"),
        ("org/set-2.0:test@main", "set-2.0", "org/set-2.0:test@main"),
        ("q=org/set", "q", "org/set"),
        ("hf://datasets/org/set", "set", "hf://datasets/org/set"),
        ("s3://bucket/a/fin.parquet?region=x", "fin", "s3://bucket/a/fin.parquet?region=x"),
        ("s3://k:s@bucket/*.csv", "bucket", "s3://k:s@bucket/*.csv"),
        ("金融=a.csv", "金融", "a.csv"),
        ("./folder.v2/", "folder.v2", "./folder.v2/"),
    ],
)
def test_a_source_is_named_by_its_user_or_by_where_it_lies(
    tmp_path, monkeypatch, text, name, where
):
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "there=1.csv")
    assert sources.name_and_where(text) == (name, where)


def test_rows_are_numbered_and_counted_by_named_source(tmp_path, prepare, capsys):
    put(tmp_path / "a" / "1.jsonl", some("a"))
    put(tmp_path / "a" / "2.csv.gz", some("b"))
    put(tmp_path / "c.parquet", [*some("c"), *some("c", 2), {"prompt": "x", "answer": ""}])
    made = prepare(
        "--source", tmp_path / "a", "--source", f"finance={tmp_path / 'c.parquet'}", "--val", "6"
    )
    first, second = made.meta["sources"]
    for split in ("train", "val"):
        numbers, said = getattr(made, split).rows["source"].tolist(), targets(made, split)
        assert [int("reply c" in text) for text in said] == numbers
        assert [first["rows"][split], second["rows"][split]] == [numbers.count(0), numbers.count(1)]
    assert (first["name"], first["read"], first["dropped"]) == ("a", 20, {})
    assert (second["name"], second["read"], second["dropped"]) == (
        "finance",
        13,
        {"duplicate": 2, "empty": 1},
    )
    assert [
        (os.path.basename(file["name"]), file["rows"], file["sha256"] == files.sha256(file["name"]))
        for file in first["files"]
    ] == [("1.jsonl", 10, True), ("2.csv.gz", 10, True)]
    said = capsys.readouterr().out
    assert re.search(r"^source +finance +train \d+ +val \d+ +dropped 3 +of 13 read$", said, re.M)
    assert made.meta["dropped"] == {"duplicate": 2, "empty": 1} and made.meta["mix"] is None


def test_one_name_for_two_sources_is_refused(tmp_path, capsys):
    assert "the name a is given 2 times" in usage(capsys, "--source", "a=x.csv", "a=y.csv")
    assert "the name train is given 2 times" in usage(
        capsys, "--source", "x/train.csv", "--source", "y/train.parquet"
    )


def test_one_file_in_two_sources_is_refused(tmp_path, refused):
    path = put(tmp_path / "in" / "a.jsonl")
    (tmp_path / "link.jsonl").symlink_to(path)
    for again in (tmp_path / "in", tmp_path / "link.jsonl", f"file://{path}"):
        refused(
            "--source",
            f"one={path}",
            f"two={again}",
            of=["is reached by two sources", "one and two"],
        )


def test_a_source_with_a_file_more_that_changed_is_named(tmp_path, prepare):
    for name in "ab":
        put(tmp_path / "in" / f"{name}.jsonl", some(name))
    prepare("--source", tmp_path / "in", "--val", "0")
    put(tmp_path / "in" / "b.jsonl", some("c"))
    with pytest.raises(SystemExit, match="in/b.jsonl has changed"):
        prepare("--source", tmp_path / "in", "--val", "0")


# --- weights


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("a:0.7 b:0.2", "sum to 0.9"),
        ("a:0.7 c:0.3", "a, b"),
        ("a:1", "a, b"),
        ("a:x b:1", "NAME:SHARE"),
        ("a:0.5 b:0.5->0.6", "sum"),
        ("a:0.7 b:-0.3", "b:-0.3"),
    ],
)
def test_weights_that_do_not_fit_are_refused(capsys, text, word):
    line = usage(capsys, "--source", "a=x.csv", "b=y.csv", "--mix", text)
    assert "--mix" in line and word in line


def test_weights_are_kept_for_the_trainers(tmp_path, prepare):
    put(tmp_path / "a.csv", some("a"))
    put(tmp_path / "b.csv", some("b"))
    made = prepare(
        "--source",
        tmp_path / "a.csv",
        tmp_path / "b.csv",
        "--mix",
        "a:0.7->0.2 b:0.3->0.8",
        "--val",
        "0",
    )
    assert mix.parse(made.meta["mix"]) == {"a": (0.7, 0.2), "b": (0.3, 0.8)}


# --- secrets


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"s3://{KEY}:{SECRET}@bucket/a.csv?region=x", "s3://bucket/a.csv?region=x"),
        (f"name=s3://{KEY}:sEcReT@b/c", "name=s3://b/c"),
        (
            f"s3://b/c?access_key={KEY}&secret_key={SECRET}&region=x",
            "s3://b/c?access_key=***&secret_key=***&region=x",
        ),
        (f"Cannot parse URI: 's3://{KEY}:{SECRET}@b/a b'", "Cannot parse URI: 's3://b/a b'"),
        ("s3://b/a:b@c.csv", "s3://b/a:b@c.csv"),
        ("hdfs://user@host:8020/a@b", "hdfs://user@host:8020/a@b"),
        (
            "s3://b/c?scheme=http&endpoint_override=127.0.0.1:9",
            "s3://b/c?scheme=http&endpoint_override=127.0.0.1:9",
        ),
    ],
)
def test_secrets_are_left_out_and_nothing_else(text, shown):
    assert places.redact(text) == shown


# --- a real S3 server


@pytest.fixture(scope="session")
def s3_server():
    server = pytest.importorskip("moto.server")
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    yield running.get_host_and_port()[1]
    running.stop()


@pytest.fixture
def s3(s3_server, monkeypatch):
    """Return (a file system, a function from a path to its URI with the secret in it) of an empty
    bucket."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    system = fs.S3FileSystem(
        access_key=KEY,
        secret_key=SECRET,
        scheme="http",
        endpoint_override=f"127.0.0.1:{s3_server}",
        region="us-east-1",
        allow_bucket_creation=True,
        allow_bucket_deletion=True,
    )
    if system.get_file_info("bucket").type != fs.FileType.NotFound:
        system.delete_dir_contents("bucket")
    system.create_dir("bucket")

    def uri(path, port=s3_server):
        return f"s3://{KEY}:{SECRET.replace('/', '%2F')}@{path}?scheme=http&endpoint_override=127.0.0.1:{port}&region=us-east-1"

    def upload(path, rows):
        with system.open_output_stream(
            path, compression=None
        ) as file:  # "detect" would pack what is packed already
            file.write(packed(rows, re.search(r"\.(parquet|jsonl?|csv).*", path)[0]))

    return system, uri, upload


def secrets_in(folder):
    return [
        path.name
        for path in folder.rglob("*")
        if path.is_file() and re.search(rb"vErY|sEcReT|AKIDKEY", path.read_bytes())
    ]


@pytest.mark.parametrize(
    "suffix", [".parquet", ".json", ".jsonl.gz", ".jsonl.xz", ".csv.zst", ".csv"]
)
def test_s3_files_are_read_like_local_ones(s3, suffix):
    _, uri, upload = s3
    upload(f"bucket/in/data{suffix}", PAIRS)
    (place,) = sources.locate(uri(f"bucket/in/data{suffix}"))
    assert [row[1]["content"] for row in sources.rows(sources.look(place))] == [
        row["answer"] for row in PAIRS
    ]


def test_s3_folders_and_globs_leave_hidden_and_other_files_out(s3):
    _, uri, upload = s3
    for name in (
        "b.csv",
        "a.parquet",
        "deep/c.jsonl.gz",
        "_tmp/x.csv",
        ".hidden.csv",
        "deep/fox.csv",
    ):
        upload(f"bucket/in/{name}", some(name[0]))

    def found(path):
        return [place.name.removeprefix("s3://bucket/in/") for place in sources.locate(uri(path))]

    assert (
        found("bucket/in")
        == ["a.parquet", "b.csv", "deep/c.jsonl.gz", "deep/fox.csv"]
        == found("bucket/in/")
    )
    assert found("bucket/in/*.csv") == ["b.csv"] and found("bucket/in/**/*.csv") == [
        "b.csv",
        "deep/fox.csv",
    ]


def test_from_s3_to_a_folder_and_back_without_a_secret_on_the_disk(tmp_path, s3, prepare, capfd):
    system, uri, upload = s3
    for name in "ab":
        upload(f"bucket/in/{name}.parquet", some(name))
    made = prepare(
        "--source",
        f"mine={uri('bucket/in/*.parquet')}",
        "--export",
        uri("bucket/out"),
        "--val",
        "5",
    )
    (source,) = made.meta["sources"]
    assert [file["name"] for file in source["files"]] == [
        "s3://bucket/in/a.parquet",
        "s3://bucket/in/b.parquet",
    ]
    assert all(file["size"] and file["mtime"] and file["rows"] == 10 for file in source["files"])
    assert made.meta["args"]["source"] == [f"mine={source['where']}"] and source[
        "where"
    ].startswith("s3://bucket/in/*.parquet?scheme=http")
    assert not secrets_in(tmp_path) and not re.search(
        "vErY|sEcReT|AKIDKEY", "".join(capfd.readouterr())
    )
    assert sorted(info.path for info in system.get_file_info(fs.FileSelector("bucket/out"))) == [
        "bucket/out/train.parquet",
        "bucket/out/validation.parquet",
    ]
    again = prepare("--source", uri("bucket/out/train.parquet"), "--val", "0", out="again")
    assert targets(again) == targets(made)


def test_the_same_command_says_finished_until_a_file_on_s3_changes(s3, prepare, capsys):
    _, uri, upload = s3
    upload("bucket/in/a.csv", PAIRS)
    words = ("--source", uri("bucket/in/a.csv"), "--val", "0")
    prepare(*words)
    prepare(*words)
    assert "finished already" in capsys.readouterr().out
    upload("bucket/in/a.csv", PAIRS[2:])
    with pytest.raises(SystemExit, match="s3://bucket/in/a.csv has changed"):
        prepare(*words)


def test_wrong_places_on_s3_are_one_line_and_quick(s3, refused):
    _, uri, upload = s3
    begun = time.time()
    refused("--source", uri("bucket/none.csv"), of=["s3://bucket/none.csv", "is missing"])
    refused("--source", uri("bucket/*.csv"), of=["is missing", "match"])
    refused("--source", uri("nobucket/a.csv"), of=["s3://nobucket/a.csv"])
    refused(
        "--source",
        uri("bucket/a.csv", port=1),
        of=["s3://bucket/a.csv", "cannot be reached", "127.0.0.1"],
    )
    refused(
        "--source",
        uri("bucket/a.csv") + "&secret_key=vErYsEcReT",
        of=["s3://bucket/a.csv", "secret_key"],
    )
    refused("--source", f"s3://{KEY}:{SECRET}@bucket/a b.csv", of=["cannot be reached"])
    refused("--source", "nosuch://bucket/a.csv", of=["nosuch://bucket/a.csv", "cannot be reached"])
    upload("bucket/a.parquet", PAIRS)
    refused(
        "--source",
        uri("bucket/a.parquet"),
        "--export",
        uri("bucket/out", port=1),
        of=["s3://bucket/out", "cannot be reached"],
    )
    assert time.time() - begun < 40


def test_a_write_that_breaks_leaves_no_file_under_its_name(tmp_path, s3):
    system, uri, _ = s3
    wanted = pa.schema([("text", pa.string())])

    def batches():
        yield pa.table({"text": ["a"] * 1000})
        raise KeyboardInterrupt

    for where, there in (
        (uri("bucket/w/a.parquet"), lambda: system.get_file_info("bucket/w/a.parquet").is_file),
        (str(tmp_path / "w" / "a.parquet"), (tmp_path / "w" / "a.parquet").exists),
    ):
        with pytest.raises(KeyboardInterrupt):
            places.write_table(batches(), wanted, where)
        assert not there()
        assert (
            places.write_table(
                [pa.table({"text": ["a"]}), pa.record_batch({"text": ["b", "c"]})], wanted, where
            )
            == 3
        )
        assert there()
    assert pq.read_table(tmp_path / "w" / "a.parquet")["text"].to_pylist() == ["a", "b", "c"]
    assert sources.locate(uri("bucket/w"))[0].name == "s3://bucket/w/a.parquet"


# --- the rows kept, as a data set


def test_exported_rows_are_those_kept_with_source_and_split(tmp_path, prepare):
    put(tmp_path / "a.csv", [*some("a"), *some("a", 3)])
    put(tmp_path / "b.csv", some("b"))
    made = prepare(
        "--source",
        tmp_path / "a.csv",
        tmp_path / "b.csv",
        "--export",
        tmp_path / "shared",
        "--val",
        "7",
        "--system",
        "S",
    )
    seen = {}
    for split, name in (("train", "train"), ("val", "validation")):
        rows = pq.read_table(tmp_path / "shared" / f"{name}.parquet").to_pylist()
        assert [row["messages"][-1]["content"] for row in rows] == targets(made, split)
        assert [row["source"] for row in rows] == [
            made.meta["sources"][number]["name"] for number in getattr(made, split).rows["source"]
        ]
        assert {row["split"] for row in rows} == {name} and {
            row["messages"][0]["content"] for row in rows
        } == {"S"}
        seen[split] = len(rows)
    assert seen == {"train": 13, "val": 7} and sorted(os.listdir(tmp_path / "shared")) == [
        "train.parquet",
        "validation.parquet",
    ]


def test_an_export_without_held_out_rows_takes_those_of_an_earlier_one_away(tmp_path, prepare):
    put(tmp_path / "a.csv", some("a"))
    for val, names in ((3, ["train.parquet", "validation.parquet"]), (0, ["train.parquet"])):
        prepare(
            "--source", tmp_path / "a.csv", "--export", tmp_path / "shared", "--val", val, "--fresh"
        )
        assert (
            sorted(os.listdir(tmp_path / "shared")) == names
        )  # else rows of train would be held out as well


def test_a_dropped_trace_is_not_exported(tmp_path, prepare):
    (tmp_path / "a.jsonl").write_text(
        "".join(
            json.dumps({"prompt": f"question {i}", "answer": f"<think>hm {i}</think>reply {i}"})
            + "\n"
            for i in range(20)
        )
    )
    prepare(
        "--source",
        tmp_path / "a.jsonl",
        "--export",
        tmp_path / "shared",
        "--val",
        3,
        "--think",
        "drop",
    )
    for name in ("train", "validation"):
        assert {
            row["messages"][-1]["content"][:5]
            for row in pq.read_table(tmp_path / "shared" / f"{name}.parquet").to_pylist()
        } == {"reply"}


def test_an_out_that_is_a_link_stays_one(tmp_path, prepare):
    put(tmp_path / "a.csv", some("a"))
    (tmp_path / "disk").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "disk" / "x")
    made = prepare("--source", tmp_path / "a.csv", "--val", 3, out="linked")
    assert (
        (tmp_path / "linked").is_symlink()
        and (tmp_path / "disk" / "x" / "meta.json").exists()
        and len(made.val.rows) == 3
    )


def test_plain_texts_are_exported_as_such_and_row_groups_do_not_show(
    tmp_path, prepare, monkeypatch
):
    monkeypatch.setattr(export, "GROUP_ROWS", 7)
    put(tmp_path / "a.jsonl", [{"text": f"line {i}"} for i in range(30)])
    made = prepare(
        "--source", tmp_path / "a.jsonl", "--export", tmp_path / "shared", "--val", "0.3"
    )
    rows = {
        name: pq.read_table(tmp_path / "shared" / f"{name}.parquet").to_pylist()
        for name in export.SPLITS
    }
    assert sorted(row["text"] for part in rows.values() for row in part) == sorted(
        f"line {i}" for i in range(30)
    )
    assert len(rows["validation"]) == len(made.val.rows) > 0


def test_an_export_can_be_asked_for_again_but_not_afterwards(tmp_path, prepare, refused):
    put(tmp_path / "a.csv")
    prepare("--source", tmp_path / "a.csv", "--export", tmp_path / "one")
    prepare("--source", tmp_path / "a.csv", "--export", tmp_path / "two")
    assert (tmp_path / "one" / "train.parquet").read_bytes() == (
        tmp_path / "two" / "train.parquet"
    ).read_bytes()
    prepare("--source", tmp_path / "a.csv", "--fresh")
    refused(
        "--source",
        tmp_path / "a.csv",
        "--export",
        tmp_path / "three",
        of=["rows is missing", "without --export", "--fresh"],
        out="out",
    )


def test_an_export_never_writes_over_a_file_of_somebody_else(tmp_path, refused):
    path = put(tmp_path / "in" / "train.parquet")
    before = path.read_bytes()
    refused("--source", path, "--export", tmp_path / "in", of=["in/train.parquet is in the way"])
    assert path.read_bytes() == before and not (tmp_path / "refused").exists()


def test_wrong_words_about_the_export(tmp_path, capsys, refused):
    assert "--public" in usage(capsys, "--source", "a", "--public")
    assert "org/name" in usage(capsys, "--source", "a", "--push-to-hub", "noslash")
    assert "a folder" in usage(capsys, "--source", "a", "--export", "x.parquet")
    one, two = put(tmp_path / "a.csv"), put(tmp_path / "b.jsonl", [{"text": "x"}])
    refused(
        "--source", one, two, "--export", tmp_path / "shared", of=["conversations and plain texts"]
    )


# --- the hub


@pytest.fixture
def fake_hub(tmp_path, monkeypatch):
    server = Hub()
    for name, value in {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": False,
        "HF_TOKEN_PATH": str(tmp_path / "no token"),
        "HF_HUB_DISABLE_XET": True,
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield server
    server.shutdown()
    server.server_close()


def parquet(letter, count=10):
    return packed(some(letter, count), ".parquet")


def test_the_parquet_of_the_split_is_taken_at_its_commit(fake_hub, prepare, capsys):
    fake_hub.repos["org/set", "main"] = {
        "data/train-00000-of-00002.parquet": parquet("a"),
        "data/train-00001-of-00002.parquet": parquet("b"),
        "data/test-00000-of-00001.parquet": parquet("c"),
        "README.md": b"x",
        "train.jsonl": b"{}",
    }
    made = prepare("--source", "org/set", "t=org/set:test", "--val", "0")
    commit = Hub.commit("org/set", "main")
    first, second = made.meta["sources"]
    assert [text[6] for text in targets(made)] == ["a"] * 10 + ["b"] * 10 + ["c"] * 10
    assert (first["name"], first["commit"], second["name"]) == ("set", commit, "t")
    assert [file["name"] for file in first["files"]] == [
        f"org/set/data/train-0000{i}-of-00002.parquet@{commit[:12]}" for i in range(2)
    ]
    assert first["files"][0]["sha256"] and commit in capsys.readouterr().out
    assert not [line for line in fake_hub.requests if "train.jsonl" in line or "README" in line]


def test_without_parquet_the_hubs_own_conversion_is_taken_and_without_that_jsonl(fake_hub, prepare):
    fake_hub.repos["org/set", "main"] = {
        "train.jsonl.gz": packed(some("j"), ".jsonl.gz"),
        "test.jsonl": packed(some("t"), ".jsonl"),
    }
    assert targets(prepare("--source", "org/set", "--val", "0"))[0] == "reply j0"
    fake_hub.repos["org/set", hub.CONVERTED] = {
        "default/train/0000.parquet": parquet("p"),
        "default/partial-train/0000.parquet": parquet("x"),
    }
    assert targets(prepare("--source", "org/set", "--val", "0", out="two"))[0] == "reply p0"
    # a revision was asked for: its own files, not a conversion of another one
    assert targets(prepare("--source", "org/set@main", "--val", "0", out="three"))[0] == "reply j0"


def test_a_file_called_after_no_split_is_train_unless_another_is_called_so(
    fake_hub, prepare, refused
):
    fake_hub.repos["org/set", "main"] = {"alpaca_data.json": packed(some("j"), ".json")}
    assert len(prepare("--source", "org/set", "--val", "0").train.rows) == 10
    fake_hub.repos["org/two", "main"] = {
        "data/train_sft-00000-of-00001.parquet": parquet("a"),
        "data/test_sft-00000-of-00001.parquet": parquet("a"),
    }
    refused(
        "--source",
        "org/two",
        of=["org/two has no one split train", "test_sft, train_sft", "org/two:SPLIT"],
    )
    assert len(prepare("--source", "org/two:train_sft", "--val", "0", out="three").train.rows) == 10


def test_one_of_several_configurations_has_to_be_named(fake_hub, prepare, refused):
    fake_hub.repos["org/set", "main"] = {
        "en/train-00000-of-00001.parquet": parquet("e"),
        "fr/train/0000.parquet": parquet("f"),
    }
    refused("--source", "org/set", of=["en/train, fr/train"])
    assert targets(prepare("--source", "org/set:fr/train", "--val", "0"))[0] == "reply f0"


def test_a_download_that_was_cut_goes_on_where_it_broke(fake_hub, prepare, monkeypatch):
    monkeypatch.setattr(
        constants, "DOWNLOAD_CHUNK_SIZE", 1 << 14
    )  # what was written in whole chunks (10 MB) is not fetched again
    whole = packed(
        [{"prompt": os.urandom(300).hex(), "answer": f"reply {i}"} for i in range(400)], ".parquet"
    )
    fake_hub.repos["org/set", "main"], fake_hub.cut_after = {"data/train.parquet": whole}, 100_000
    assert len(prepare("--source", "org/set", "--val", "0", "--max-len", "2000").train.rows) == 400
    ranges = [line for line in fake_hub.requests if "train.parquet bytes=" in line]
    assert len(ranges) == 1 and 0 < int(re.search(r"bytes=(\d+)-", ranges[0])[1]) <= 100_000


def test_a_filled_cache_is_enough_offline(fake_hub, prepare, refused, monkeypatch):
    fake_hub.repos["org/set", "main"] = {"train.parquet": parquet("a")}
    fake_hub.repos["org/conv", "main"] = {"train.jsonl": b"{}"}
    fake_hub.repos["org/conv", hub.CONVERTED] = {"default/train/0000.parquet": parquet("b")}
    prepare("--source", "org/set", "org/conv")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    fake_hub.requests.clear()
    assert len(prepare("--source", "org/set", "org/conv", "--val", "0", out="two").train.rows) == 20
    refused("--source", "org/other", of=["org/other", "HF_HUB_OFFLINE is set"])
    refused("--source", "org/set:test", of=["no one split test", "saw train"])
    assert not fake_hub.requests


def test_wrong_sets_tokens_splits_and_revisions_are_one_line(
    fake_hub, refused, prepare, monkeypatch
):
    fake_hub.repos["org/set", "main"] = {
        "data/train-0.parquet": parquet("a"),
        "data/test-0.parquet": parquet("b"),
    }
    for name in ("private", "gated"):
        fake_hub.repos[f"org/{name}", "main"] = {"train.parquet": parquet("a")}
        getattr(fake_hub, name).add(f"org/{name}")
    refused("--source", "org/set:dev", of=["no one split dev", "test, train"])
    refused("--source", "org/set@v9", of=["org/set@v9", "no such revision"])
    refused("--source", "org/nothing", of=["org/nothing", "401", "HF_TOKEN"])
    refused("--source", "org/private", of=["org/private", "401", "HF_TOKEN"])
    refused("--source", "org/gated", of=["org/gated", "gated", "accept its terms"])
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    refused("--source", "org/private", of=["401"], never=["hf_wrong"])
    monkeypatch.setenv("HF_TOKEN", fake_hub.token)
    assert len(prepare("--source", "org/private", "--val", "0").train.rows) == 10


def test_an_unreachable_hub_is_one_line_and_quick(fake_hub, refused, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    begun = time.time()
    refused("--source", "org/set", of=["127.0.0.1:1 did not answer", "HF_HUB_OFFLINE=1"])
    assert time.time() - begun < 20


def test_a_local_file_that_is_missing_is_never_looked_for_on_the_hub(
    tmp_path, fake_hub, refused, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for where in ("data/alpaca", "other/train.jsonl", "nothing", "a/b/c"):
        refused("--source", where, of=[f"{where} is missing"])
    assert not fake_hub.requests


def test_the_rows_kept_are_pushed_private_unless_public(
    tmp_path, fake_hub, prepare, refused, monkeypatch
):
    path = put(tmp_path / "a.csv")
    refused(
        "--source", path, "--push-to-hub", "me/mine", of=["me/mine", "cannot be written", "401"]
    )
    assert not (tmp_path / "refused").exists()
    monkeypatch.setenv("HF_TOKEN", fake_hub.token)
    made = prepare("--source", path, "--push-to-hub", "me/mine", "--val", "5")
    prepare("--source", path, "--push-to-hub", "me/open", "--public", "--val", "5")
    assert {
        (asked["type"], asked["organization"], asked["name"], asked["visibility"])
        for asked in fake_hub.created
    } == {("dataset", "me", "mine", "private"), ("dataset", "me", "open", "public")}
    assert sorted(name for repo, name in fake_hub.pushed if repo == "me/mine") == [
        "data/train.parquet",
        "data/validation.parquet",
    ]
    train = pq.read_table(io.BytesIO(fake_hub.pushed["me/mine", "data/train.parquet"])).to_pylist()
    assert [row["messages"][-1]["content"] for row in train] == targets(made)
    prepare(
        "--source", path, "--push-to-hub", "me/mine", "--val", "0", "--fresh"
    )  # the rows that were held out are train's now
    assert [name for repo, name in fake_hub.pushed if repo == "me/mine"] == ["data/train.parquet"]


# --- wrong rows, wherever they lie


@pytest.mark.parametrize(
    ("name", "rows", "words"),
    [
        ("a.csv.gz", [{"prompt": "", "answer": ""}][:0], ["a.csv.gz", "holds no row"]),
        ("a.parquet", [{"prompt": 1.5, "answer": "b"}], ["a.parquet", "prompt", "double", "text"]),
        (
            "a.jsonl.xz",
            [{"prompt": "a", "answer": {"b": 1}}],
            ["a.jsonl.xz, row 1", "answer", "dict"],
        ),
        ("a.jsonl.bz2", [{"who": "a", "what": "b"}], ["a.jsonl.bz2", "who, what", "--columns"]),
    ],
)
def test_wrong_rows_on_s3_are_one_line(s3, refused, name, rows, words):
    _, uri, upload = s3
    upload(f"bucket/{name}", rows)
    refused("--source", uri(f"bucket/{name}"), of=["s3://bucket/", *words])
