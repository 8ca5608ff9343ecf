"""What a data file holds, whatever its format: the columns of a parquet, arrow, csv, tsv, json,
jsonl or txt file, and its records.

Contract: `columns_of` opens a file far enough to know its columns, `records` yields its rows as
{column: value}, in order. All are streams: a few megabytes are held at a time, and one row. A
broken file raises one of places.UNREADABLE, or ends the program with one line.
"""

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, NoReturn

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from lib import files
from lib.prepare import places
from lib.prepare.places import Place

TABLES = (".parquet", ".arrow")
SEPARATED = (".csv", ".tsv")
SEPARATORS = ",;\t|"
JSON = (".json", ".jsonl")  # their later rows may have columns that the first one lacks
CSV_BLOCKS = (4 << 20, 1 << 28)  # bytes of csv read at once; the larger one where a row is longer
CHARACTERS = 1 << 20  # of a json file read at once
FIRST_ROWS = 100  # of json, whose columns are known by them
LONGEST = 1 << 27  # characters of one row
BATCH_BYTES = 8 << 20  # of a parquet file decoded at once


@dataclass(frozen=True)
class Columns:
    """types: of each column its arrow type, None where the format declares none. count: rows, if
    the file says. features: what Hugging Face's data sets note of the columns."""

    types: dict[str, pa.DataType | None]
    count: int | None = None
    features: dict = field(default_factory=dict)


class NoRow(SystemExit):
    """A file without a row: it ends the program with one line, unless it is one of several."""

    def __init__(self, line: object, place: Place) -> None:
        super().__init__(line)
        self.place = place


def columns_of(place: Place) -> Columns:
    """Return the columns of a file; one line where it has no row or cannot be read."""
    try:
        if place.suffix == ".parquet":
            columns = _parquet_columns(place)
        elif place.suffix == ".arrow":
            kinds, batches = _arrow_batches(place)
            columns = _columns(kinds, None if any(len(batch) for batch in batches) else 0)
        elif place.suffix in SEPARATED:
            columns = Columns(dict.fromkeys(_csv_names(place), pa.string()))
        else:
            first = itertools.islice(map(tuple, filter(None, records(place, []))), FIRST_ROWS)
            columns = Columns(dict.fromkeys(itertools.chain.from_iterable(first)))
    except places.UNREADABLE as broken:
        cannot_be_read(place, "", broken)
    if not columns.types or columns.count == 0:
        no_row(place)
    return columns


def records(place: Place, columns: list[str]) -> Iterator[dict]:
    """Yield the rows of a file, of tables the given columns alone."""
    if place.suffix in TABLES:
        return _table_records(place, columns)
    if place.suffix in SEPARATED:
        return _csv_records(place, columns)
    return _lines(place) if place.suffix == ".txt" else _json_records(place)


def says(place: Place, column: str) -> bool:
    """Return whether a column of a table holds anything in some row."""
    try:
        if place.suffix in SEPARATED:
            return any(not hollow(row.get(column)) for row in _csv_records(place, [column]))
        batches = _table_batches(place, [column])
        return any(not hollow(value.as_py()) for batch in batches for value in batch.column(0))
    except places.UNREADABLE as broken:
        cannot_be_read(place, f", column {column}", broken)


def hollow(value: object) -> bool:
    """Return whether a value says nothing: null, blank, or made of such alone."""
    if isinstance(value, dict | list):
        inside = value.values() if isinstance(value, dict) else value
        return all(map(hollow, inside))
    return value is None or value == ""


def cannot_be_read(place: Place, where: str, broken: Exception) -> NoReturn:
    """End with one line for what places.UNREADABLE names."""
    ragged = "Expected" in str(broken) and "columns, got" in str(broken)
    quoted = 'values with a separator in them in double quotes, and a quote in those doubled: ""'
    files.fail(
        f"{place} cannot be read{where}",
        seen=places.redact(broken)[:300],
        wanted=quoted if ragged else f"a whole {place.suffix[1:]} file",
    )


def no_row(place: Place, wrong: str = "holds no row", seen: str | None = None) -> NoReturn:
    try:
        files.fail(f"{place} {wrong}", seen, "a file with rows")
    except SystemExit as one:
        raise NoRow(one.code, place) from None


# --- tables with types


def _columns(schema: pa.Schema, count: int | None = None) -> Columns:
    noted = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    types = {field.name: plain_type(field.type) for field in schema}
    return Columns(types, count, noted.get("info", {}).get("features", {}))


def plain_type(kind: pa.DataType) -> pa.DataType:
    """Return the type of a column's values once `plain` has been there: what other tools write as
    bytes, lists of a fixed size, structs of lists (datasets' Sequence) or maps is text, lists of
    structs, structs."""
    listed = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if pa.types.is_dictionary(kind):
        return plain_type(kind.value_type)
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
        return pa.string()
    if listed or pa.types.is_fixed_size_list(kind) or pa.types.is_list_view(kind):
        return pa.list_(plain_type(kind.value_type))
    if pa.types.is_map(kind):
        return pa.struct([])
    if _struct_of_lists(kind):
        return pa.list_(pa.struct([(f.name, plain_type(f.type.value_type)) for f in kind]))
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, plain_type(field.type)) for field in kind])
    return kind


def _struct_of_lists(kind: pa.DataType) -> bool:
    def listed(inner):
        return pa.types.is_list(inner) or pa.types.is_large_list(inner)

    return pa.types.is_struct(kind) and kind.num_fields > 0 and all(listed(f.type) for f in kind)


def plain(value: object, kind: pa.DataType) -> object:
    """Return a value as `plain_type` says."""
    if value is None:
        return None
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if pa.types.is_map(kind):
        return {str(key): plain(item, kind.item_type) for key, item in value}
    if isinstance(value, list):
        return [plain(item, kind.value_type) for item in value]
    if isinstance(value, dict):
        inside = {field.name: plain(value[field.name], field.type) for field in kind}
        if _struct_of_lists(kind):
            sizes = {len(items) for items in inside.values() if items is not None} or {0}
            if len(sizes) == 1:  # else they are no fields of the items of one list
                rows = zip(*(items or [None] * max(sizes) for items in inside.values()))
                return [dict(zip(inside, row)) for row in rows]
        return inside
    return value


def _parquet_columns(place: Place) -> Columns:
    with pq.ParquetFile(places.open_seekable(place)) as file:
        return _columns(file.schema_arrow, file.metadata.num_rows)


def _parquet_batches(place: Place, columns: list[str]) -> Iterator[pa.RecordBatch]:
    # pre_buffer would hold whole row groups, and many files are one row group; buffer_size makes it
    # a stream of pages
    with pq.ParquetFile(
        places.open_seekable(place), pre_buffer=False, buffer_size=places.BUFFER
    ) as file:
        meta = file.metadata
        columns = [name for name in columns if name in file.schema_arrow.names]
        size = 0
        for group in map(meta.row_group, range(meta.num_row_groups)):
            for column in map(group.column, range(group.num_columns)):
                if column.path_in_schema.split(".")[0] in columns:
                    size += column.total_uncompressed_size
        batch_rows = max(1, min(4096, BATCH_BYTES * meta.num_rows // max(1, size)))
        yield from file.iter_batches(batch_rows, columns=columns, use_threads=False)


def _arrow_batches(place: Place) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    """Return the columns and batches of an arrow file of either form: with an index at its end, or
    a stream (save_to_disk)."""
    seekable = places.open_seekable(place)
    indexed = seekable.read(6) == b"ARROW1"
    seekable.seek(0)
    if indexed:
        file = pa.ipc.open_file(seekable)
        return file.schema, map(file.get_batch, range(file.num_record_batches))
    stream = pa.ipc.open_stream(seekable)
    return stream.schema, iter(stream)


def _table_batches(place: Place, columns: list[str]) -> Iterator[pa.RecordBatch]:
    if place.suffix == ".parquet":
        yield from _parquet_batches(place, columns)
        return
    for batch in _arrow_batches(place)[1]:
        yield batch.select([name for name in columns if name in batch.schema.names])


def _table_records(place: Place, columns: list[str]) -> Iterator[dict]:
    for batch in _table_batches(place, columns):
        odd = {field.name: field.type for field in batch.schema if _odd(field.type)}
        for start in range(0, batch.num_rows, 1000):
            for row in batch.slice(start, 1000).to_pylist():
                for name, kind in odd.items():
                    try:
                        row[name] = plain(row[name], kind)
                    except ValueError as broken:  # bytes that are not text; lists of two lengths
                        cannot_be_read(place, f", column {name}", broken)
                yield row


def _odd(kind: pa.DataType) -> bool:
    """Return whether values of a type are not as `plain` leaves them."""
    return re.search(r"binary|map<|fixed_size|list", str(kind)) is not None


# --- tables as text


def _csv_layout(place: Place) -> tuple[str, int]:
    """Return what separates the columns of a csv file (", " where names begin with a blank), and
    how many lines stand above its header: comments, blank ones, Excel's sep=;"""
    above = 0
    with places.open_text(place) as file:
        while line := file.readline(CHARACTERS):
            outside = re.sub(r'"[^"]*"', "", line.rstrip("\r\n"))
            excel = re.fullmatch(r"sep=(.)", outside)
            counts = {sign: outside.count(sign) for sign in SEPARATORS}
            if outside.strip() and not excel and (outside[0] != "#" or any(counts.values())):
                break
            above += 1
    best = max(counts, key=counts.get) if line else ","
    best = "\t" if place.suffix == ".tsv" else best
    names = outside.split(best) if line else []
    blank = best != "\t" and len(names) > 1 and all(name[:1] == " " for name in names[1:])
    return best + " " * blank, above


def _csv_names(place: Place) -> list[str]:
    """Return the columns of a csv file with rows, and say how it is read where that is unusual."""
    first = next((batch for batch in _csv_batches(place) if batch.num_rows), None)
    separator, above = _csv_layout(place)
    if separator != ("\t" if place.suffix == ".tsv" else ",") or above:
        skipped = f", {above} lines above its header left out" if above else ""
        print(f"prepare reads {place} with the separator {separator!r}{skipped}", flush=True)
    names = first.schema.names if first else []
    return [name.strip() for name in names] if separator[1:] else names


def _csv_batches(place: Place, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a csv file, once more with a larger block where one does not fit in it."""
    separator, above = _csv_layout(place)
    convert = pa.csv.ConvertOptions(
        include_columns=columns,
        column_types=dict.fromkeys(columns or [], pa.string()),
        strings_can_be_null=False,
    )
    encoding = "utf8" if place.encoding == "utf-8-sig" else place.encoding
    done = 0
    for block in CSV_BLOCKS:
        skip = done
        try:
            with pa.csv.open_csv(
                places.open_stream(place),
                pa.csv.ReadOptions(block_size=block, skip_rows=above, encoding=encoding),
                pa.csv.ParseOptions(newlines_in_values=True, delimiter=separator[0]),
                convert,
            ) as file:
                for batch in file:
                    fresh = batch.slice(min(skip, batch.num_rows))
                    skip -= batch.num_rows - fresh.num_rows
                    done += fresh.num_rows
                    yield fresh
            return
        except pa.ArrowInvalid as broken:
            if "straddling" not in str(broken) or block == CSV_BLOCKS[-1]:
                raise


def _csv_records(place: Place, columns: list[str]) -> Iterator[dict]:
    blank = _csv_layout(place)[0][1:]  # else every value but the first would begin with one
    if blank:
        first = next(_csv_batches(place))
        columns = [name for name in first.schema.names if name.strip() in columns]
    for batch in _csv_batches(place, columns):
        for row in batch.to_pylist():
            yield {k.strip(): v.removeprefix(" ") for k, v in row.items()} if blank else row


# --- text


def _lines(place: Place) -> Iterator[dict]:
    with places.open_text(place) as file:
        for line in bounded(file, place):
            yield {"text": line.rstrip("\n")}


def bounded(file: IO[str], place: Place) -> Iterator[str]:
    """Yield the lines of a text; one that no memory would hold is an error of one line."""
    number = 0
    while line := file.readline(LONGEST):
        number += 1
        if len(line) == LONGEST:
            too_long(place, f"line {number}")
        yield line


def too_long(place: Place, where: str) -> NoReturn:
    files.fail(
        f"{place}, {where} is longer than memory should hold",
        f"more than {LONGEST:,} characters",
        "rows, each on a line of its own",
    )


def is_object(line: str) -> bool:
    """Return whether a line is an object in JSON."""
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _json_records(place: Place) -> Iterator[dict]:
    values = _json_lines(place) if place.suffix == ".jsonl" else _json_values(place)
    try:
        for number, value in enumerate(values, 1):
            if isinstance(value, list) and value:  # a conversation without a name
                value = {"messages": value}
            if not isinstance(value, dict):
                files.fail(
                    f"{place}, row {number} is not an object",
                    seen=str(value)[:60],
                    wanted='{"column": value, ...}',
                )
            yield value
    except UnicodeDecodeError as broken:
        files.fail(f"{place} is not UTF-8 text", broken, mend="--encoding NAME")


def _json_lines(place: Place) -> Iterator[object]:
    with places.open_text(place, newline="\n") as file:
        for _, value in files.json_lines(bounded(file, place), place, "one object a line"):
            yield value


def _json_values(place: Place) -> Iterator[object]:
    """Yield the items of one list, or objects one after the other, of a file read piece by
    piece."""
    decoder, between = json.JSONDecoder(), re.compile(r"[\s,]*")
    with places.open_text(place) as file:
        text, at, line, listed, ended = "", 0, 1, False, False
        while True:
            at = between.match(text, at).end()
            if at == len(text) and ended:
                if listed:
                    _broken_json(place, line + text.count("\n"), "a list without its end")
                return
            if at < len(text) and text[at] == "[" and not listed:
                at, listed = at + 1, True
                continue
            if at < len(text) and text[at] == "]" and listed:
                at, listed = at + 1, False
                continue
            try:
                value, end = decoder.raw_decode(text, at)
            except json.JSONDecodeError as broken:
                near = len(text) - broken.pos < 20 or broken.msg.startswith("Unterminated")
                if ended or not near:
                    _broken_json(place, line + broken.lineno - 1, broken.msg)
                if len(text) - at > LONGEST:
                    too_long(place, f"what begins in line {line + text.count(chr(10), 0, at)}")
                line += text.count("\n", 0, at)
                more = file.read(max(CHARACTERS, len(text) - at))
                text, at, ended = text[at:] + more, 0, not more
                continue
            except (ValueError, RecursionError) as broken:
                _broken_json(place, line + text.count("\n", 0, at), broken)
            at = end
            yield value


def _broken_json(place: Place, line: int, broken: object) -> NoReturn:
    files.fail(
        f"{place}, line {line} is broken JSON",
        seen=broken,
        wanted="one list of objects, or objects one after the other",
    )
