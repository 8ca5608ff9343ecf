"""The rows that were kept, as text: an ordinary parquet data set for a folder, a URI or the hub.

On disk, in data/NAME/rows/ when --export or --push-to-hub asked for it: train.parquet and, if there
are any, validation.parquet, with the columns

    messages  list<struct<role, content>>   or, of plain texts: text. What messages say beside
              their text (reasoning_content, tool_calls, tools, ...) has fields of its own, JSON
              where it is no text
    source    the name of the row's source
    split     train or validation, like the file

and where a teacher wrote the last message those of store.ABOUT: reference, generation,
finish_reason, token counts, teacher, sampling.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lib import files
from lib.prepare import conversations, hub, places, sources, store

SPLITS = ("train", "validation")
GROUP_ROWS, GROUP_CHARACTERS = 1024, 1 << 22  # one row group ends at whichever comes first
MADE_HERE = {b"made by": b"prepare_data.py"}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add where the rows kept are also written to."""
    parser.add_argument(
        "--export",
        nargs="?",
        const="",
        metavar="DIR|URI",
        help=(
            "also write the rows kept, as train.parquet and validation.parquet in this folder;"
            " without one: beside the data, in --out's rows/"
        ),
    )
    parser.add_argument(
        "--push-to-hub",
        metavar="REPO",
        help="also push the rows kept to this data set of the hub (private)",
    )
    parser.add_argument(
        "--public",
        action="store_true",
        help="make the data set of --push-to-hub for all to see, if it is new",
    )


def check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse (exit code 2) places that are none."""
    if args.public and not args.push_to_hub:
        parser.error("--public is about --push-to-hub REPO, which is not given")
    if args.push_to_hub and not hub.REPO.fullmatch(args.push_to_hub):
        parser.error(f"--push-to-hub is {args.push_to_hub}, wanted org/name")
    if args.export and args.export.partition("?")[0].endswith(".parquet"):
        parser.error(f"--export is {places.redact(args.export)}, wanted a folder")


def keeps_text(args: argparse.Namespace) -> bool:
    """Return whether the rows are also kept as text."""
    return args.export is not None or bool(args.push_to_hub)


def schema(plain_text: bool, written: bool) -> pa.Schema:
    """Return the columns of conversations, or of plain texts; of answers `written` by a teacher."""
    first = ("text", pa.string()) if plain_text else ("messages", pa.list_(store.MESSAGE_AND_MORE))
    return pa.schema(
        [first, ("source", pa.string()), ("split", pa.string()), *(store.ABOUT if written else ())],
        metadata=MADE_HERE,
    )


class RowWriter:
    """A parquet file of rows as they come, before they have a side (`split` is empty)."""

    def __init__(self, path: Path, inputs: list[sources.Source], written: bool) -> None:
        plain_text = inputs[0].files[0].is_text
        self.schema, self.rows, self.size = schema(plain_text, written), [], 0
        self.keys: set[str] = set()  # of messages, beside role and content
        self.file = pq.ParquetWriter(path, self.schema, compression="zstd")

    def append(self, row: list[dict] | str, source: str) -> None:
        about = {} if isinstance(row, str) else row[-1].get("written", {})
        if not isinstance(row, str):
            row, whole = store.flattened(row), row
            for message in whole:
                self.keys |= message.keys() - {"role", "content", "written"}
        self.rows.append({self.schema.names[0]: row, "source": source, **about})
        self.size += conversations.characters(row)
        if len(self.rows) == GROUP_ROWS or self.size > GROUP_CHARACTERS:
            self.flush()

    def flush(self) -> None:
        if self.rows:
            self.file.write_table(pa.Table.from_pylist(self.rows, self.schema))
            self.rows, self.size = [], 0

    def close(self) -> None:
        self.flush()
        self.file.close()


def _with_keys(messages: list[dict], keys: list[str]) -> list[dict]:
    """Return messages with what they say beside their text in fields of its own, JSON where it is
    no text."""
    found = []
    for message in store.unflattened(messages):
        for name in keys:
            if not isinstance(value := message.get(name), str | None):
                message[name] = json.dumps(value, ensure_ascii=False)
        found.append(message)
    return found


def _side(path: Path, mask: np.ndarray, split: str, keys: list[str]) -> Iterator[pa.RecordBatch]:
    with pq.ParquetFile(path, pre_buffer=False, buffer_size=places.BUFFER) as file:
        start = 0
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, use_threads=False)
            kept = table.filter(pa.array(mask[start : start + len(table)]))
            start += len(table)
            if kept.schema.names[0] == "messages":
                own = [_with_keys(row, keys) for row in kept["messages"].to_pylist()]
                kept = kept.set_column(0, "messages", pa.array(own, _messages(keys)))
            yield kept.set_column(
                2, file.schema_arrow.field("split"), pa.array([split] * len(kept), pa.string())
            )
    assert start == len(mask), (start, len(mask))


def _messages(keys: list[str]) -> pa.DataType:
    return pa.list_(pa.struct([*store.MESSAGE, *((name, pa.string()) for name in keys)]))


def write_splits(staged: Path, folder: Path, is_val: np.ndarray, keys: list[str]) -> None:
    """Turn the staged rows into `folder`/{train,validation}.parquet, a row group at a time. keys:
    of their messages, beside role and content."""
    folder.mkdir()
    wanted = pq.read_schema(staged)
    if wanted.names[0] == "messages":
        wanted = wanted.set(0, pa.field("messages", _messages(keys)))
    for split, mask in zip(SPLITS, (~is_val, is_val)):
        if mask.any():
            places.write_table(
                _side(staged, mask, split, keys), wanted, str(folder / f"{split}.parquet")
            )
    staged.unlink()


def begin(args: argparse.Namespace, inputs: list[sources.Source]) -> None:
    """Refuse, before any work is done, what could not be delivered: to a place that does not
    answer or holds files of these names that are not ours; rows of two kinds."""
    for split in SPLITS if args.export else ():
        target = places.join(args.export, f"{split}.parquet")
        metadata = places.parquet_metadata(target)
        if metadata is not None and not MADE_HERE.items() <= metadata.items():
            files.fail(
                f"{places.redact(target)} is in the way",
                seen="a file that prepare_data.py did not make",
                mend="another --export",
            )
    if args.push_to_hub:
        hub.create(args.push_to_hub, args.public)
    if not keeps_text(args):
        return
    if len({file.is_text for source in inputs for file in source.files}) > 1:
        files.fail(
            "one table cannot hold these sources",
            seen="conversations and plain texts",
            wanted="one kind",
            mend="no --export and no --push-to-hub",
        )


def deliver(folder: Path, args: argparse.Namespace) -> None:
    """Write the rows of a finished data set (data/NAME/rows) where --export and --push-to-hub
    say."""
    if not keeps_text(args):
        return
    parts = [folder / f"{split}.parquet" for split in SPLITS]
    if not any(part.exists() for part in parts):
        files.fail(
            f"{folder} is missing",
            seen="a data set that was prepared without --export",
            mend="the same command with --fresh",
        )
    for part in parts if args.export else ():
        target = places.join(args.export, part.name)
        if not part.exists():  # rows of an earlier data set must not stay beside the new ones
            places.remove(target)
            continue
        with pq.ParquetFile(part, pre_buffer=False, buffer_size=places.BUFFER) as file:
            groups = (
                file.read_row_group(group, use_threads=False)
                for group in range(file.num_row_groups)
            )
            rows = places.write_table(groups, file.schema_arrow, target)
        print(f"prepare export={places.redact(target)} rows={rows}", flush=True)
    if args.push_to_hub:
        hub.create(args.push_to_hub, args.public)
        print(f"prepare pushed={hub.push(folder, args.push_to_hub)}", flush=True)
