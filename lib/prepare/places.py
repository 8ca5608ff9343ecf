"""Files wherever they lie: on this disk, or behind a URI that pyarrow.fs understands (s3://, gs://,
hdfs://, ...); those of the Hugging Face hub are in its cache on this disk (lib/prepare/hub.py).

Contract: `find_by_uri` and `find_by_path` turn what a user wrote into `Place`s, `open_stream` and
`open_seekable` open one (nothing remote is copied to the disk), `write_table` writes a parquet file
whole or not at all. No name, message or record made here holds a secret: what passes through
`redact` may be printed and stored.
"""

import contextlib
import glob
import io
import lzma
import os
import re
import urllib.parse
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from lib import files

SUFFIXES = (".parquet", ".json", ".jsonl", ".csv")
PACKED = (".gz", ".bz2", ".zst", ".xz")  # behind the suffix of a json, jsonl or csv file
READ = f"{', '.join(SUFFIXES)} (all but parquet also with {', '.join(PACKED)})"
BUFFER = 1 << 20
# gs:// would try again for a quarter of an hour
PATIENCE = {"gs": "retry_limit_seconds=20", "gcs": "retry_limit_seconds=20"}
LOCAL = fs.LocalFileSystem()
# what reading a broken file, or one that is cut short, may raise
UNREADABLE = (pa.ArrowException, OSError, EOFError, lzma.LZMAError, UnicodeDecodeError)
FORBIDDEN = (
    "ACCESS_DENIED",
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "HTTP status 403",
    "HTTP status 401",
)


def suffix(path: str) -> str:
    """Return the suffix that says how a file is read: suffix("a.jsonl.gz") == ".jsonl"."""
    name = path.rsplit("/", 1)[-1]
    stem = re.sub(r"\.(gz|bz2|zst|xz)$", "", name)
    end = Path(stem).suffix.lower()
    return "" if end == ".parquet" != Path(name).suffix.lower() else end


@dataclass(frozen=True)
class Place:
    """A file: its name for people and records (no secrets in it), the file system, the path there;
    of a hub's file the commit."""

    name: str
    system: fs.FileSystem
    path: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def suffix(self) -> str:
        """What it is, packed or not: ".jsonl" of a.jsonl.gz; "" of a kind that is not read."""
        found = suffix(self.path)
        return found if found in SUFFIXES else ""

    @property
    def is_local(self) -> bool:
        return isinstance(self.system, fs.LocalFileSystem)

    @property
    def key(self) -> str:
        """Equal for the same file reached in two ways."""
        return os.path.realpath(self.path) if self.is_local and not self.revision else self.name


def redact(text: object) -> str:
    """Return the text without the secrets that URIs in it carry.

    redact("s3://KEY:se/cret@bucket/a?region=x&secret_key=y") ==
    "s3://bucket/a?region=x&secret_key=***"
    """
    # secrets of S3 hold slashes that people forget to escape, so the last @ counts; hdfs has a port
    # there, and no secrets
    text = re.sub(r"(?<=://)(?<!hdfs://)(?<!viewfs://)[^\s/?#:@]*:[^\s?#]*@", "", str(text))
    return re.sub(
        r"([?&][^\s=&]*(?:key|secret|token|password|credential|sig)[^\s=&]*=)[^\s&#'\"]+",
        r"\1***",
        text,
        flags=re.IGNORECASE,
    )


def is_uri(where: str | os.PathLike) -> bool:
    return re.match(r"[A-Za-z][\w.+-]+://", str(where)) is not None and not str(where).startswith(
        "hf://"
    )


def said_by_system(problem: Exception, todo: str) -> tuple[str, str | None, str | None]:
    """Return what a file system said (without secrets and the pages that some say), None for what
    was wanted, and what mends it."""
    forbidden = any(word in str(problem) for word in FORBIDDEN)
    mend = (
        "credentials that may (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; gcloud auth"
        " application-default login)"
    )
    return redact(problem)[:300], None, mend if forbidden else None


@contextlib.contextmanager
def one_line_error(
    what: object,
    todo: str = "reached",
    failures: tuple[type[Exception], ...] = (pa.ArrowException, OSError),
    told: Callable[[Exception, str], tuple] = said_by_system,
):
    """End the program with one line, "WHAT cannot be TODO", where what is done inside fails.
    told(problem, todo): what was seen, what was wanted, what mends it."""
    try:
        yield
    except failures as problem:
        files.fail(f"{redact(what)} cannot be {todo}", *told(problem, todo))


def connect(uri: str) -> tuple[fs.FileSystem, str]:
    """Return the file system of a URI and the path on it; one line where pyarrow knows no such
    thing or it does not answer."""
    scheme, address = uri.partition("://")[0], uri
    if scheme in PATIENCE and "retry_limit_seconds" not in uri:
        address += ("&" if "?" in uri else "?") + PATIENCE[scheme]
    with one_line_error(uri, failures=(pa.ArrowException, OSError, ValueError)):
        return fs.FileSystem.from_uri(address)


def _inside(system: fs.FileSystem, root: str) -> list[fs.FileInfo]:
    """Return the data files under a folder of a file system, hidden ones left out, in the order of
    their names."""

    def hidden(path):
        return any(part[:1] in "._" for part in path[len(root) :].strip("/").split("/"))

    there = system.get_file_info(fs.FileSelector(root, recursive=True))
    found = [info for info in there if info.is_file and suffix(info.path) in SUFFIXES]
    found = [info for info in found if not hidden(info.path)]
    return sorted(found, key=lambda info: info.path)


def _pattern(text: str) -> re.Pattern:
    """Return a glob as a regular expression over a whole path: * within a name, ** across
    folders."""
    words = {r"\*\*/": "(?:.*/)?", r"\*\*": ".*", r"\*": "[^/]*"}
    return re.compile(
        re.sub(r"\\\*\\\*/|\\\*\\\*|\\\*", lambda match: words[match[0]], re.escape(text))
    )


def find_by_uri(uri: str) -> list[Place]:
    """Return the data files at a URI (a file, a folder, or a glob), in order; one line where there
    are none."""
    body, question, query = uri.partition("?")
    fixed = body[: body.rfind("/", 0, body.find("*")) + 1] if "*" in body else body
    system, path = connect(fixed + question + query)

    def name(found):
        local = isinstance(system, fs.LocalFileSystem)
        return found if local else f"{uri.partition('://')[0]}://{found}"

    inside = []
    with one_line_error(uri):
        info = system.get_file_info(path)
        if info.is_file:
            inside = [info]
        elif info.type == fs.FileType.Directory:
            inside = _inside(system, path.rstrip("/"))
    if "*" in body:
        wanted = _pattern(path.rstrip("/") + "/" + urllib.parse.unquote(body[len(fixed) :]))
        inside = [found for found in inside if wanted.fullmatch(found.path)]
    if not inside:
        files.fail(
            f"{redact(uri)} is missing",
            seen="no such file, folder of data or match",
            wanted="data: a file, a folder or a glob with *",
        )
    for found in inside:
        if not found.size:
            files.fail(f"{name(found.path)} is empty", seen="0 bytes", wanted="a file with rows")
    return [Place(name(found.path), system, found.path) for found in inside]


def find_by_path(where: str) -> list[Place]:
    """Return the data files of this disk that `where` names (a file, a folder, or a glob), in
    order; one line where there are none."""
    path = Path(where)
    if path.is_dir():
        shown = (p for p in path.rglob("*") if not p.name.startswith("."))
        inside = sorted(p for p in shown if suffix(p.name) in SUFFIXES and p.is_file())
        if not inside:
            files.fail(f"the folder {path} holds no data file", wanted=f"one that ends in {READ}")
    elif path.exists():
        inside = [path]
    else:
        inside = sorted(p for p in map(Path, glob.glob(where, recursive=True)) if p.is_file())
        if not inside:
            files.fail(
                f"{where} is missing",
                seen="no such file, folder or match",
                wanted="data: a file, a folder, a glob, a hub id or a URI",
            )
    for file in inside:
        if suffix(file.name) in SUFFIXES and not file.stat().st_size:
            files.fail(f"{file} is empty", seen="0 bytes", wanted="a file with rows")
    return [on_disk(path) for path in inside]


def on_disk(path: str | os.PathLike) -> Place:
    return Place(str(path), LOCAL, str(path))


def stamp(place: Place) -> dict:
    """Return what tells a file from a changed one: the sha256 of its bytes, or, where reading them
    again costs a network, size and time."""
    if place.is_local:
        return {"sha256": files.sha256(Path(place.path))}
    info = place.system.get_file_info(place.path)
    return {"size": info.size, "mtime": info.mtime.isoformat() if info.mtime else None}


def changed(where: str, recorded: list[dict]) -> list[str]:
    """Return the names of a source's recorded files that are others now; one that is gone, or of a
    fixed commit, is no change."""
    system = connect(where)[0] if is_uri(where) else LOCAL
    result = []
    for before in recorded:
        name = before["name"]
        place = Place(
            name,
            system,
            name if isinstance(system, fs.LocalFileSystem) else name.partition("://")[2],
        )
        with one_line_error(name):
            there = system.get_file_info(place.path).is_file
        now = stamp(place) if there else {}
        if any(before.get(key) != value for key, value in now.items()):
            result.append(name)
    return result


def open_seekable(place: Place) -> pa.NativeFile:
    """Open a file to be read at any place (parquet)."""
    return place.system.open_input_file(place.path)


def open_stream(place: Place) -> BinaryIO:
    """Open a file to be read from its beginning, unpacked if its name says that it is packed. A
    broken one raises one of `UNREADABLE`."""
    packed = os.path.splitext(place.path)[1].lower()
    codec = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}.get(packed)
    stream = place.system.open_input_stream(place.path, compression=codec, buffer_size=BUFFER)
    return lzma.open(stream) if packed == ".xz" else stream


def open_text(place: Place, newline: str | None = None) -> io.TextIOWrapper:
    """Open a text file (UTF-8, with or without a byte order mark)."""
    return io.TextIOWrapper(open_stream(place), encoding="utf-8-sig", newline=newline)


# --- writing


def join(where: str, name: str) -> str:
    """Return the place of a file in a folder: join("s3://bucket/a?region=x", "b") ==
    "s3://bucket/a/b?region=x"."""
    body, question, query = str(where).partition("?") if is_uri(where) else (str(where), "", "")
    return f"{body.rstrip('/')}/{name}{question}{query}"


def _target(where: str) -> tuple[fs.FileSystem, str]:
    return connect(where) if is_uri(where) else (LOCAL, str(where))


def parquet_metadata(where: str) -> dict[bytes, bytes] | None:
    """Return the notes in the schema of a parquet file ({} if it is none), or None where there is
    no file; one line if the place does not answer."""
    system, path = _target(where)
    with one_line_error(where):
        try:
            if not system.get_file_info(path).is_file:
                return None
            return pq.read_schema(path, filesystem=system).metadata or {}
        except pa.ArrowInvalid:
            return {}


def write_table(batches: Iterable[pa.RecordBatch | pa.Table], schema: pa.Schema, where: str) -> int:
    """Write batches as one parquet file at a path or URI; return its rows. Holds one batch at a
    time, and one row group of pages.

    The file has a temporary name beside its own until it is whole (a stream to S3 that breaks would
    else leave a half one under its name). On an object store the move is a copy, which S3 does up
    to 5 GB.
    """
    system, path = _target(where)
    folder, _, name = path.rpartition("/")
    partial, rows = f"{folder}/.{name}.part" if folder else f".{name}.part", 0
    with one_line_error(where, "written"):
        if folder:
            system.create_dir(folder, recursive=True)
        with pq.ParquetWriter(partial, schema, filesystem=system, compression="zstd") as writer:
            for batch in batches:
                writer.write(batch)
                rows += batch.num_rows
        if isinstance(system, fs.LocalFileSystem):
            files.sync(Path(partial))
        system.move(partial, path)
    return rows


def remove(where: str) -> None:
    """Delete the file at a path or URI, if there is one."""
    system, path = _target(where)
    with one_line_error(where, "removed"):
        if system.get_file_info(path).is_file:
            system.delete_file(path)
