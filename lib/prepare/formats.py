"""What a data file holds, whatever its format: the columns of a parquet, csv, json or jsonl file,
and its records.

Contract: `columns_of` opens a file far enough to know its columns, `records` yields its rows as
{column: value}, in order. Parquet, csv and jsonl are streams: a few megabytes are held at a time. A
.json file (one list of objects, or objects one after the other) is read into memory whole. A broken
file raises one of places.UNREADABLE, or ends the program with one line.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NoReturn

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from lib import files
from lib.prepare import places
from lib.prepare.places import Place

JSON = (".json", ".jsonl")  # their later rows may have columns that the first one lacks
CSV_BLOCK = 4 << 20  # bytes of csv read at once; no row may be longer
BATCH_BYTES = 8 << 20  # of a parquet file decoded at once


@dataclass(frozen=True)
class Columns:
    """types: of each column its arrow type, None where the format declares none. count: rows, if
    the file says. features: what Hugging Face's data sets note of the columns."""

    types: dict[str, pa.DataType | None]
    count: int | None = None
    features: dict = field(default_factory=dict)


def columns_of(place: Place) -> Columns:
    """Return the columns of a file; one line where it has no row or cannot be read."""
    try:
        if place.suffix == ".parquet":
            columns = _parquet_columns(place)
        elif place.suffix == ".csv":
            with _open_csv(place) as file:
                columns = Columns(dict.fromkeys(file.schema.names, pa.string()))
        else:
            columns = Columns(dict.fromkeys(next(_json_records(place), {})))
    except places.UNREADABLE as broken:
        cannot_be_read(place, "", broken)
    if not columns.types or columns.count == 0:
        no_row(place)
    return columns


def records(place: Place, columns: list[str]) -> Iterator[dict]:
    """Yield the rows of a file, of parquet and csv the given columns alone."""
    if place.suffix == ".parquet":
        return _parquet_records(place, columns)
    return _csv_records(place, columns) if place.suffix == ".csv" else _json_records(place)


def cannot_be_read(place: Place, where: str, broken: Exception) -> NoReturn:
    """End with one line for what places.UNREADABLE names."""
    files.fail(
        f"{place} cannot be read{where}",
        seen=places.redact(broken)[:300],
        wanted=f"a whole {place.suffix[1:]} file",
    )


def no_row(place: Place) -> NoReturn:
    files.fail(f"{place} holds no row", wanted="a file with rows")


def _parquet_columns(place: Place) -> Columns:
    with pq.ParquetFile(places.open_seekable(place)) as file:
        schema = file.schema_arrow
        noted = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        types = {field.name: field.type for field in schema}
        features = noted.get("info", {}).get("features", {})
        return Columns(types, file.metadata.num_rows, features)


def _parquet_records(place: Place, columns: list[str]) -> Iterator[dict]:
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
        for batch in file.iter_batches(batch_rows, columns=columns, use_threads=False):
            yield from batch.to_pylist()


def _open_csv(place: Place, columns: list[str] | None = None) -> pa.csv.CSVStreamingReader:
    convert = pa.csv.ConvertOptions(
        include_columns=columns,
        column_types=dict.fromkeys(columns or [], pa.string()),
        strings_can_be_null=False,
    )
    return pa.csv.open_csv(
        places.open_stream(place),
        pa.csv.ReadOptions(block_size=CSV_BLOCK),
        pa.csv.ParseOptions(newlines_in_values=True),
        convert,
    )


def _csv_records(place: Place, columns: list[str]) -> Iterator[dict]:
    with _open_csv(place, columns) as file:
        for batch in file:
            yield from batch.to_pylist()


def _json_records(place: Place) -> Iterator[dict]:
    values = _json_lines(place) if place.suffix == ".jsonl" else _json_values(place)
    try:
        for number, value in enumerate(values, 1):
            if isinstance(value, list) and value:  # a conversation without a name
                value = {"messages": value}
            if not isinstance(value, dict):
                files.fail(
                    f"{place}, row {number} is not an object",
                    seen=repr(value)[:60],
                    wanted='{"column": value, ...}',
                )
            yield value
    except UnicodeDecodeError as broken:
        files.fail(f"{place} is not UTF-8 text", seen=broken)


def _json_lines(place: Place) -> Iterator[object]:
    with places.open_text(place, newline="\n") as file:
        for _, value in files.json_lines(file, place, "one object a line"):
            yield value


def _json_values(place: Place) -> Iterator[object]:
    """Yield the items of one list, or objects one after the other, of a file read whole."""
    with places.open_text(place) as file:
        text = file.read()
    decoder, between = json.JSONDecoder(), re.compile(r"[\s,]*")
    at = between.match(text).end()
    while at < len(text):
        try:
            value, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as broken:
            files.fail(
                f"{place}, line {broken.lineno} is broken JSON",
                seen=broken.msg,
                wanted="one list of objects, or objects (read whole; .jsonl is read line by line)",
            )
        yield from value if isinstance(value, list) else [value]
        at = between.match(text, end).end()
