"""Rows from data files: parquet, json, jsonl and csv, read as streams, with the schema found from
the names of the columns.

Contract: `named` tells a source's name from where it lies, `look` says how one of its files is to
be read, `rows` yields a conversation (a list of {"role", "content"}), a plain text or a labelled
one for every row of the file, in order, holding a few megabytes at a time, wherever the file is
(lib/prepare/places.py). A file that cannot be read, or a column of the wrong type, ends the program
with one line; a row that is merely useless (blank, an unknown role) is yielded all the same, for
the caller to count.
"""

import glob
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from lib import files
from lib.prepare import hub, places
from lib.prepare.places import Place

JSON = (".json", ".jsonl")
BLOCK = 1 << 20  # characters of JSON read at once
CSV_BLOCK = 4 << 20  # bytes of csv read at once; no row may be longer
BATCH_BYTES = 8 << 20  # of a parquet file decoded at once

# name, then the part a column plays -> the names it is known by; the first schema whose columns are
# all there is taken
SCHEMAS = {
    "messages": {"messages": ("messages",)},
    "conversations": {"messages": ("conversations", "conversation")},
    "instruction/output": {
        "prompt": ("instruction",),
        "answer": ("output", "response", "completion", "answer"),
    },
    "prompt/completion": {
        "prompt": ("prompt",),
        "answer": ("completion", "response", "answer", "output"),
    },
    "question/answer": {"prompt": ("question", "query"), "answer": ("answer", "response")},
    "text": {"text": ("text",)},
}
LABELLED = {
    "text/label": {
        "text": ("text", "sentence", "content"),
        "label": ("label", "labels", "class", "category"),
    }
}  # for --task classify
OPTIONAL = {
    "input": "prompt",
    "system": None,
}  # `input` is read beside a prompt only, `system` in every conversation
KNOWN = (
    "messages; conversations; instruction[+input]+output; prompt+completion|response|answer;"
    " question+answer; text"
)
COLUMNS_HELP = (
    "[SOURCE:]prompt=COL,answer=COL[,input=COL][,system=COL], or messages=COL[,system=COL], or"
    " text=COL; to classify: text=COL,label=COL"
)

ROLE_NAMES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function": "tool",
    "observation": "tool",
    "developer": "system",
}


@dataclass(frozen=True)
class File:
    """One file: the schema it follows, in words too, which column plays which part (prompt, ...),
    and its rows if the file says.

    names: of the labels, where the file's are numbers and it says what they mean (the ClassLabel of
    Hugging Face's data sets).
    """

    place: Place
    schema: str
    described: str
    columns: dict[str, str]
    count: int | None
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source:
    """What one --source names: its name, where it lies (without secrets), and its files in
    order."""

    name: str
    where: str
    files: list[File]

    @property
    def described(self) -> str:
        return "; ".join(dict.fromkeys(file.described for file in self.files))


def named(text: str) -> tuple[str, str]:
    """Tell NAME from WHERE in a --source: named("fin=a/b.jsonl.gz") == ("fin", "a/b.jsonl.gz").

    Without NAME= it is the last part of WHERE that says something, suffixes and globs left out:
    "b", and "a" for a/*.parquet. What exists as it stands is a WHERE, though it has a "=" in it.
    """
    found = re.fullmatch(r"([\w.+-]+)=(.+)", text, re.DOTALL)
    if found and not Path(text).exists() and not glob.glob(text, recursive=True):
        return found[1], found[2]
    if (found := hub.ID.fullmatch(text)) and places.is_hub_id(text):
        return found["repo"].split("/")[1], text
    path = (
        text.partition("?")[0].partition("://")[2]
        if places.is_uri(text)
        else str(Path(text).absolute())
    )
    for part in reversed(path.split("/")):
        part = re.sub(r"(\.(gz|bz2|zst|xz))?$", "", part)
        part = part.removesuffix(hub.suffix(part)) if hub.suffix(part) in places.SUFFIXES else part
        if name := re.sub(r"[^\w.+-]+", "-", part.split("@")[-1]).strip("-."):
            return name, text
    return "data", text


def open_all(
    wanted: Iterable[tuple[str, str]],
    columns: dict[str, dict[str, str]],
    need_answer: bool = True,
    labelled: bool = False,
) -> list[Source]:
    """Find and look at the files of every (name, where); one line where two sources share a file.
    columns: by source name, "" for the others."""
    result, owners = [], {}
    for name, where in wanted:
        found = places.find(where)
        for place in found:
            if (other := owners.setdefault(place.key, name)) != name:
                files.fail(
                    f"{place} is reached by two sources",
                    seen=f"{other} and {name}",
                    wanted="every file in one source",
                )
        result.append(
            Source(
                name,
                places.redact(where),
                [
                    look(place, columns.get(name, columns.get("")), need_answer, labelled)
                    for place in found
                ],
            )
        )
    return result


def parse_columns(
    text: str, need_answer: bool = True, labelled: bool = False
) -> tuple[str, dict[str, str]]:
    """Read one --columns: parse_columns("fin:prompt=q,answer=a") == ("fin", {"prompt": "q",
    "answer": "a"}); "" where no source is named.

    Raises ValueError, one line. Where no answer is needed (a teacher will write it), prompt=COL
    alone will do; labelled: text and label it is.
    """
    owner, colon, rest = text.partition(":")
    owner, rest = (owner.strip(), rest) if colon and "=" not in owner else ("", text)
    pairs = [part.partition("=")[::2] for part in rest.split(",")]
    columns = {part.strip(): column.strip() for part, column in pairs}
    allowed = (
        ({"prompt", "answer"} if need_answer else {"prompt"}, {"input", "system", "answer"}),
        ({"messages"}, {"system"}),
        ({"text"}, set()),
    )
    allowed = (({"text", "label"}, set()),) if labelled else allowed
    if (
        len(columns) != len(pairs)
        or not all(columns.values())
        or not any(need <= set(columns) <= need | may for need, may in allowed)
    ):
        raise ValueError(f"saw {text!r}, wanted {COLUMNS_HELP}")
    return owner, columns


def look(
    path: Place,
    columns: dict[str, str] | None = None,
    need_answer: bool = True,
    labelled: bool = False,
) -> File:
    """Open a file far enough to know its columns and find its schema, or check the `columns` that
    the user named.

    Without need_answer, prompts alone will do: their conversations end in a blank answer. labelled:
    rows of a text and its label are wanted.
    """
    kind, count, features = {}, None, {}
    try:
        if path.suffix == ".parquet":
            with pq.ParquetFile(places.seek(path)) as file:
                kind, count = (
                    {field.name: field.type for field in file.schema_arrow},
                    file.metadata.num_rows,
                )
                features = (
                    json.loads((file.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
                    .get("info", {})
                    .get("features", {})
                )
        elif path.suffix == ".csv":
            with _open_csv(path) as file:
                kind = {name: pa.string() for name in file.schema.names}
        else:
            kind = dict.fromkeys(next(_json_records(path), {}))
    except places.BROKEN as broken:
        files.fail(
            f"{path} cannot be read",
            seen=places.redact(broken)[:300],
            wanted=f"a whole {path.suffix[1:]} file",
        )
    if not kind or count == 0:
        files.fail(f"{path} holds no row", wanted="a file with rows")
    schema, columns = (
        ("--columns", columns) if columns else _guess(path, kind, need_answer, labelled)
    )
    for part, column in columns.items():
        # the first object of a JSON file need not show the optional columns that later ones have
        if column not in kind and not (part in OPTIONAL and path.suffix in JSON):
            files.fail(
                f"{path} has no column {column}",
                seen=", ".join(kind),
                mend=f"--columns {COLUMNS_HELP}",
            )
        _check_type(path, part, column, kind.get(column))
    described = (
        f"{schema}"
        f" ({', '.join(f'{part}={column}' for part, column in columns.items() if column in kind)})"
    )
    names = (features.get(columns.get("label")) or {}).get("names") or ()
    return File(path, schema, described, columns, count, tuple(names))


def _guess(
    path: Place, kind: dict, need_answer: bool = True, labelled: bool = False
) -> tuple[str, dict[str, str]]:
    prompts = (
        {}
        if need_answer
        else {
            f"{parts['prompt'][0]} only": {"prompt": parts["prompt"]}
            for parts in SCHEMAS.values()
            if "prompt" in parts
        }
    )
    for schema, parts in sorted(
        (LABELLED if labelled else SCHEMAS | prompts).items(), key=lambda item: item[0] == "text"
    ):
        columns = {
            part: next((name for name in names if name in kind), None)
            for part, names in parts.items()
        }
        if None in columns.values():
            continue
        if schema != "text":
            columns |= {
                part: part
                for part, beside in OPTIONAL.items()
                if beside in (None, *columns) and (part in kind or path.suffix in JSON)
            }
        return schema, columns
    files.fail(
        f"{path} follows no schema known here",
        seen=f"columns {', '.join(kind)}",
        wanted="text and label" if labelled else f"one of: {KNOWN}",
        mend="--columns text=COL,label=COL" if labelled else f"--columns {COLUMNS_HELP}",
    )


def _check_type(path: Place, part: str, column: str, kind) -> None:
    """Refuse a column whose declared (arrow) type cannot hold its part; JSON declares none and is
    checked row by row."""
    if kind is None or pa.types.is_null(kind):
        return
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    text = (
        pa.types.is_string(value)
        or pa.types.is_large_string(value)
        or pa.types.is_string_view(value)
    )
    text |= part == "label" and (pa.types.is_integer(value) or pa.types.is_boolean(value))
    listed = (
        part == "messages"
        and (pa.types.is_list(kind) or pa.types.is_large_list(kind))
        and pa.types.is_struct(kind.value_type)
    )
    if not text and not listed:
        wanted = {
            "messages": "a list of {role, content} or {from, value}",
            "label": "text, whole numbers or true and false",
        }.get(part, "text")
        files.fail(
            f"{path}: column {column} cannot be the {part}",
            seen=f"type {kind}",
            wanted=wanted,
            mend=f"--columns {COLUMNS_HELP}",
        )


def rows(source: File, system: str | None = None) -> Iterator[list[dict] | str | tuple[str, str]]:
    """Yield every row of a source as a conversation, a plain text, or a (text, label) where it has
    labels (one left blank is "").

    `system` opens the conversations that have no system message.
    """
    wanted = list(dict.fromkeys(source.columns.values()))
    read = {".parquet": _parquet_records, ".csv": _csv_records}.get(
        source.place.suffix, lambda path, columns: _json_records(path)
    )
    number = 0
    try:
        for number, record in enumerate(read(source.place, wanted), 1):
            yield _row(
                source,
                {part: record.get(column) for part, column in source.columns.items()},
                number,
                system,
            )
    except (*places.BROKEN, UnicodeDecodeError) as broken:
        files.fail(
            f"{source.place} cannot be read past row {number}",
            seen=places.redact(broken)[:300],
            wanted=f"a whole {source.place.suffix[1:]} file",
        )
    if not number:
        files.fail(f"{source.place} holds no row", wanted="a file with rows")


def _row(
    source: File, parts: dict, number: int, system: str | None
) -> list[dict] | str | tuple[str, str]:
    def text(part):
        value = parts.get(part)
        if value is not None and not isinstance(value, str):
            files.fail(
                f"{source.place}, row {number}: column {source.columns[part]} is not text",
                seen=type(value).__name__,
                wanted="a string",
                mend=f"--columns {COLUMNS_HELP}",
            )
        return value or ""

    if "label" in parts:
        label = parts["label"]
        if not isinstance(label, str | int | None):  # a bool is an int
            files.fail(
                f"{source.place}, row {number}: column {source.columns['label']} is no label",
                seen=repr(label)[:60],
                wanted="text, a whole number, or true and false: one class a row",
            )
        if source.names and isinstance(label, int):  # -1: held back, as in GLUE's test files
            label = source.names[label] if 0 <= label < len(source.names) else ""
        return text("text"), "" if label is None else str(label).strip()
    if "text" in parts:
        return text("text")
    if "messages" in parts:
        messages = _messages(source, parts["messages"], number)
    else:
        prompt = "\n\n".join(part for part in (text("prompt"), text("input")) if part.strip())
        messages = [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": text("answer")},
        ]
    system = text("system") if text("system").strip() else system
    if system and messages and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return messages


def _messages(source: File, value: object, number: int) -> list[dict]:
    """Bring OpenAI's (role, content) and ShareGPT's (from, value) to one form; content that is not
    text becomes None."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)  # csv, and some parquet files, hold the list as JSON text
        except ValueError:
            pass
    if not isinstance(value, list | None) or not all(
        isinstance(item, dict) for item in value or []
    ):
        files.fail(
            f"{source.place}, row {number}: column {source.columns['messages']} is not a"
            " conversation",
            seen=repr(value)[:60],
            wanted="a list of {role, content} or {from, value}",
            mend=f"--columns {COLUMNS_HELP}",
        )
    messages = []
    for item in value or []:
        role, content = (
            item.get(a) if item.get(a) is not None else item.get(b)
            for a, b in (("role", "from"), ("content", "value"))
        )
        if isinstance(content, list) and all(
            isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
        ):
            content = "".join(part["text"] for part in content)
        role = str(role).strip().lower()
        messages.append(
            {
                "role": ROLE_NAMES.get(role, role),
                "content": content if isinstance(content, str) else None,
            }
        )
    return messages


def _parquet_records(path: Place, columns: list[str]) -> Iterator[dict]:
    # pre_buffer would hold whole row groups, and many files are one row group; buffer_size makes it
    # a stream of pages
    with pq.ParquetFile(places.seek(path), pre_buffer=False, buffer_size=places.BUFFER) as file:
        meta = file.metadata
        columns = [name for name in columns if name in file.schema_arrow.names]
        groups = (meta.row_group(g) for g in range(meta.num_row_groups))
        size = sum(
            c.total_uncompressed_size
            for group in groups
            for c in map(group.column, range(group.num_columns))
            if c.path_in_schema.split(".")[0] in columns
        )
        batch_rows = max(1, min(4096, BATCH_BYTES * meta.num_rows // max(1, size)))
        for batch in file.iter_batches(batch_rows, columns=columns, use_threads=False):
            yield from batch.to_pylist()


def _open_csv(path: Place, columns: list[str] | None = None) -> pa.csv.CSVStreamingReader:
    convert = pa.csv.ConvertOptions(
        include_columns=columns,
        column_types=dict.fromkeys(columns or [], pa.string()),
        strings_can_be_null=False,
    )
    return pa.csv.open_csv(
        places.read(path),
        pa.csv.ReadOptions(block_size=CSV_BLOCK),
        pa.csv.ParseOptions(newlines_in_values=True),
        convert,
    )


def _csv_records(path: Place, columns: list[str]) -> Iterator[dict]:
    with _open_csv(path, columns) as file:
        for batch in file:
            yield from batch.to_pylist()


def _json_records(path: Place) -> Iterator[dict]:
    read = _json_lines if path.suffix == ".jsonl" else _json_objects
    try:
        for number, value in enumerate(read(path), 1):
            if not isinstance(value, dict):
                files.fail(
                    f"{path}, row {number} is not an object",
                    seen=repr(value)[:60],
                    wanted='{"column": value, ...}',
                )
            yield value
    except UnicodeDecodeError as broken:
        files.fail(f"{path} is not UTF-8 text", seen=broken)


def _json_lines(path: Place) -> Iterator[object]:
    with places.text(path, newline="\n") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except json.JSONDecodeError as broken:
                files.fail(
                    f"{path}, line {number} is broken JSON", seen=broken, wanted="one object a line"
                )


def _json_objects(path: Place) -> Iterator[object]:
    """Yield the items of one list, or objects one after the other, from a buffer that slides over
    the file."""
    decoder, between = json.JSONDecoder(), re.compile(r"[\s,]*")
    with places.text(path) as file:
        buffer, at, line, listed = "", 0, 1, None
        while True:
            start = between.match(buffer, at).end()
            line, at = line + buffer.count("\n", at, start), start
            if at == len(buffer):
                buffer, at = file.read(BLOCK), 0
                if buffer:
                    continue
                if listed:
                    files.fail(
                        f"{path}, line {line} is broken JSON",
                        seen="the end of the file inside its list",
                        wanted="a closing ]",
                    )
                return
            if listed is None:
                listed = buffer[at] == "["
                at += int(listed)
                continue
            if listed and buffer[at] == "]":
                listed, at = False, at + 1
                continue
            try:
                value, end = decoder.raw_decode(buffer, at)
            except json.JSONDecodeError as broken:
                # an error at the buffer's end, or a string without end, may only mean that the rest
                # is not read yet
                whole = len(buffer) - broken.pos > 16 and not broken.msg.startswith(
                    "Unterminated string"
                )
                more = "" if whole else file.read(max(BLOCK, len(buffer)))
                if not more:
                    line += buffer.count("\n", at, broken.pos)
                    files.fail(
                        f"{path}, line {line} is broken JSON",
                        seen=broken.msg,
                        wanted="objects, or one list of them",
                    )
                buffer, at = buffer[at:] + more, 0
                continue
            line, at = line + buffer.count("\n", at, end), end
            yield value
