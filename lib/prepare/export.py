"""The rows that were kept, as text: an ordinary parquet data set for a folder, a URI or the hub.

On disk, in data/NAME/rows/ when --export or --push-to-hub asked for it: train.parquet and, if there
are any, validation.parquet, with the columns

    messages  list<struct<role, content>>   or, of plain texts: text
    source    the name of the row's source
    split     train or validation, like the file

and where a teacher wrote the last message those of store.ABOUT: reference, generation,
finish_reason, token counts, teacher, sampling.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lib import files
from lib.prepare import hub, places, store

SPLITS = ("train", "validation")
BATCH_ROWS, BATCH_CHARACTERS = 1024, 1 << 22  # one row group ends at whichever comes first
MARK = {b"made by": b"prepare_data.py"}
MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


def schema(plain_text: bool, written: bool) -> pa.Schema:
    """Return the columns of conversations, or of plain texts; of answers `written` by a teacher."""
    first = ("text", pa.string()) if plain_text else ("messages", MESSAGES)
    return pa.schema(
        [first, ("source", pa.string()), ("split", pa.string()), *(store.ABOUT if written else ())],
        metadata=MARK,
    )


class RowWriter:
    """A parquet file of rows as they come, before they have a side (`split` is empty)."""

    def __init__(self, path: Path, plain_text: bool, written: bool = False) -> None:
        self.schema, self.rows, self.size = schema(plain_text, written), [], 0
        self.file = pq.ParquetWriter(path, self.schema, compression="zstd")

    def append(self, row: list[dict] | str, source: str) -> None:
        about = {} if isinstance(row, str) else row[-1].get("written", {})
        self.rows.append({self.schema.names[0]: row, "source": source, **about})
        self.size += (
            len(row) if isinstance(row, str) else sum(len(message["content"]) for message in row)
        )
        if len(self.rows) == BATCH_ROWS or self.size > BATCH_CHARACTERS:
            self.flush()

    def flush(self) -> None:
        if self.rows:
            self.file.write_table(pa.Table.from_pylist(self.rows, self.schema))
            self.rows, self.size = [], 0

    def close(self) -> None:
        self.flush()
        self.file.close()


def _side(path: Path, mask: np.ndarray, split: str) -> Iterator[pa.RecordBatch]:
    with pq.ParquetFile(path, pre_buffer=False, buffer_size=places.BUFFER) as file:
        start = 0
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, use_threads=False)
            kept = table.filter(pa.array(mask[start : start + len(table)]))
            start += len(table)
            yield kept.set_column(
                2, file.schema_arrow.field("split"), pa.array([split] * len(kept), pa.string())
            )
    assert start == len(mask), (start, len(mask))


def divide(staged: Path, folder: Path, is_val: np.ndarray) -> None:
    """Turn the staged rows into `folder`/{train,validation}.parquet, a row group at a time."""
    folder.mkdir()
    wanted = pq.read_schema(staged)
    for split, mask in zip(SPLITS, (~is_val, is_val)):
        if mask.any():
            places.write_table(_side(staged, mask, split), wanted, str(folder / f"{split}.parquet"))
    staged.unlink()


def check(where: str) -> None:
    """Refuse, before any work is done, a folder or URI that does not answer, or that holds files of
    these names that are not ours."""
    for split in SPLITS:
        target = places.join(where, f"{split}.parquet")
        metadata = places.parquet_metadata(target)
        if metadata is not None and not MARK.items() <= metadata.items():
            files.fail(
                f"{places.redact(target)} is in the way",
                seen="a file that prepare_data.py did not make",
                mend="another --export",
            )


def deliver(folder: Path, where: str | None, repo: str | None, public: bool) -> None:
    """Write the rows of a finished data set (data/NAME/rows) to a folder or URI, and push them to
    the hub."""
    parts = [
        folder / f"{split}.parquet" for split in SPLITS if (folder / f"{split}.parquet").exists()
    ]
    if not parts:
        files.fail(
            f"{folder} is missing",
            seen="a data set that was prepared without --export",
            mend="the same command with --fresh",
        )
    if where:
        # a split that this data set does not have: rows of an earlier one must not stay beside the
        # new ones
        for split in SPLITS:
            if not (folder / f"{split}.parquet").exists():
                places.remove(places.join(where, f"{split}.parquet"))
    for part in parts if where else ():
        with pq.ParquetFile(part, pre_buffer=False, buffer_size=places.BUFFER) as file:
            groups = (
                file.read_row_group(group, use_threads=False)
                for group in range(file.num_row_groups)
            )
            rows = places.write_table(groups, file.schema_arrow, places.join(where, part.name))
        print(
            f"prepare export={places.redact(places.join(where, part.name))} rows={rows}", flush=True
        )
    if repo:
        hub.create(repo, public)
        print(f"prepare pushed={hub.push(folder, repo)}", flush=True)
