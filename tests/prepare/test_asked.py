"""Prompts and their references from files as people have them (chat.py --prompts, --score)."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lib.prepare import asked


def read(path, text=None, encoding="utf-8"):
    if text is not None:
        path.write_text(text, encoding=encoding)
    return list(asked.rows_asked(path))


def user(text):
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize(
    "row, prompt, reference",
    [
        ({"prompt": "a", "reference": 4}, "a", "4"),
        ({"prompt": "a", "reference": [4, "four"]}, "a", ["4", "four"]),
        ({"prompt": "a", "references": ["b"], "response": "other"}, "a", "b"),
        ({"question": "a", "answer": 4.5}, "a", "4.5"),
        (
            {"question": "a", "answers": {"text": ["b", "c"], "answer_start": [1, 2]}},
            "a",
            ["b", "c"],
        ),
        ({"instruction": "a", "input": "b", "output": "c"}, "a\n\nb", "c"),
        ({"problem": "a", "solution": "b"}, "a", "b"),
        ({"query": "a"}, "a", None),
        ({"text": "a"}, "a", None),
        ({"question": "a", "choices": ["b", "c"], "answer": 1}, "a\n\nA. b\nB. c", "B"),
        ({"prompt": user("a"), "completion": [{"role": "assistant", "content": "b"}]}, "a", "b"),
        ({"messages": [*user("a"), {"role": "assistant", "content": "b"}]}, "a", "b"),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            "a",
            "b",
        ),
        ({"messages": [{"from": "human", "value": "a"}], "reference": "b"}, "a", "b"),
    ],
)
def test_a_row_by_the_names_of_training_data(tmp_path, row, prompt, reference):
    (made,) = read(tmp_path / "p.jsonl", json.dumps(row))
    assert made[1] == user(prompt) and made[0].get("reference") == reference
    assert "answer" not in made[0]


def test_a_row_of_our_own_is_left_as_it_is(tmp_path):
    rows = [
        {"prompt": "a", "id": 1, "reference": "b"},
        {"messages": user("a"), "note": [1]},
        {"prompt": ""},
    ]
    made = read(tmp_path / "p.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert [fields for fields, _ in made] == rows
    assert [list(fields) for fields, _ in made] == [list(row) for row in rows]


def test_files_of_every_kind_say_the_same(tmp_path):
    rows = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(3)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    wanted = [
        ({"question": f"q{i}", "messages": user(f"q{i}"), "reference": f"a{i}"}, user(f"q{i}"))
        for i in range(3)
    ]
    lines = "\n".join(map(json.dumps, rows))
    table = "question,answer\r\n" + "".join(f"q{i},a{i}\r\n" for i in range(3))
    for name, text, encoding in [
        ("p.parquet", None, None),
        ("p.jsonl", lines + "\n\n\n", "utf-8-sig"),
        ("p.json", json.dumps(rows, indent=1), "utf-8"),
        ("p.csv", table, "utf-8-sig"),
        ("p.tsv", table.replace(",", "\t"), "utf-16"),
        ("prompts", lines, "utf-8"),
    ]:
        assert read(tmp_path / name, text, encoding) == wanted, name
    (tmp_path / "l.csv").write_text('question,answer\nq,"[""a"", ""b""]"\n')
    assert read(tmp_path / "l.csv")[0][0]["reference"] == ["a", "b"]


@pytest.mark.parametrize(
    "row, says",
    [
        ({"prompt": "a", "image": "b"}, "row 1: image would not be asked"),
        (
            {"messages": [*user("a"), {"role": "assistant", "content": "b"}], "reference": "c"},
            "one of them",
        ),
        ({"id": 1, "body": "a"}, "saw columns id, body"),
    ],
)
def test_what_cannot_be_asked_is_one_line_without_flags_of_another_script(tmp_path, row, says):
    with pytest.raises(SystemExit) as end:
        read(tmp_path / "p.jsonl", json.dumps(row))
    assert says in str(end.value) and "--columns" not in str(end.value)
