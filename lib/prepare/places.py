"""Files wherever they lie: on this disk, behind a URI that pyarrow.fs understands (s3://, gs://,
hdfs://, ...), on the Hugging Face hub.

Contract: `find` turns what a user wrote into `Place`s, `read` and `seek` open one as a stream
(nothing remote is copied to the disk; the hub's files come through its cache), `write_table` writes
a parquet file whole or not at all. No name, message or record made here holds a secret: what passes
through `redact` may be printed and stored.
"""

import glob
import io
import lzma
import os
import re
import urllib.parse
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from lib import files
from lib.prepare import hub

SUFFIXES = (".parquet", ".json", ".jsonl", ".csv")
PACKED = (".gz", ".bz2", ".zst", ".xz")  # behind the suffix of a json, jsonl or csv file
READ = f"{', '.join(SUFFIXES)} (all but parquet also with {', '.join(PACKED)})"
BUFFER = 1 << 20
# gs:// would try again for a quarter of an hour
PATIENCE = {"gs": "retry_limit_seconds=20", "gcs": "retry_limit_seconds=20"}
LOCAL = fs.LocalFileSystem()
BROKEN = (
    pa.ArrowException,
    OSError,
    EOFError,
    lzma.LZMAError,
)  # what reading a broken file, or one that is cut short, may raise


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
        found = hub.suffix(self.path)
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


def connect(uri: str) -> tuple[fs.FileSystem, str]:
    """Return the file system of a URI and the path on it; one line where pyarrow knows no such
    thing or it does not answer."""
    scheme = uri.partition("://")[0]
    if scheme in PATIENCE and "retry_limit_seconds" not in uri:
        uri += ("&" if "?" in uri else "?") + PATIENCE[scheme]
    try:
        return fs.FileSystem.from_uri(uri)
    except (pa.ArrowException, OSError, ValueError) as problem:
        _refuse(uri, problem)


def _refuse(where: object, problem: Exception, todo: str = "reached"):
    """End with one line for what a file system said, without secrets and without the pages that
    some say."""
    mend = None
    if any(
        word in str(problem)
        for word in (
            "ACCESS_DENIED",
            "InvalidAccessKeyId",
            "SignatureDoesNotMatch",
            "HTTP status 403",
            "HTTP status 401",
        )
    ):
        mend = (
            "credentials that may (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; gcloud auth"
            " application-default login)"
        )
    files.fail(f"{redact(where)} cannot be {todo}", seen=redact(problem)[:300], mend=mend)


def _inside(system: fs.FileSystem, root: str) -> list[fs.FileInfo]:
    """Return the data files under a folder of a file system, hidden ones left out, in the order of
    their names."""

    def hidden(path):
        return any(part[:1] in "._" for part in path[len(root) :].strip("/").split("/"))

    found = [
        info for info in system.get_file_info(fs.FileSelector(root, recursive=True)) if info.is_file
    ]
    return sorted(
        (info for info in found if hub.suffix(info.path) in SUFFIXES and not hidden(info.path)),
        key=lambda info: info.path,
    )


def _pattern(text: str) -> re.Pattern:
    """Return a glob as a regular expression over a whole path: * within a name, ** across
    folders."""
    words = {r"\*\*/": "(?:.*/)?", r"\*\*": ".*", r"\*": "[^/]*"}
    return re.compile(
        re.sub(r"\\\*\\\*/|\\\*\\\*|\\\*", lambda match: words[match[0]], re.escape(text))
    )


def _find_uri(uri: str) -> list[Place]:
    body, question, query = uri.partition("?")
    fixed = body[: body.rfind("/", 0, body.find("*")) + 1] if "*" in body else body
    system, path = connect(fixed + question + query)

    def name(found):
        return (
            found
            if isinstance(system, fs.LocalFileSystem)
            else f"{uri.partition('://')[0]}://{found}"
        )

    try:
        info = system.get_file_info(path)
        inside = (
            [info]
            if info.is_file
            else _inside(system, path.rstrip("/"))
            if info.type == fs.FileType.Directory
            else []
        )
        if "*" in body:
            wanted = _pattern(path.rstrip("/") + "/" + urllib.parse.unquote(body[len(fixed) :]))
            inside = [found for found in inside if wanted.fullmatch(found.path)]
    except (pa.ArrowException, OSError) as problem:
        _refuse(uri, problem)
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


def _find_local(where: str) -> list[Place]:
    path = Path(where)
    if path.is_dir():
        inside = sorted(
            p
            for p in path.rglob("*")
            if hub.suffix(p.name) in SUFFIXES and p.is_file() and not p.name.startswith(".")
        )
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
        if hub.suffix(file.name) in SUFFIXES and not file.stat().st_size:
            files.fail(f"{file} is empty", seen="0 bytes", wanted="a file with rows")
    return [local(path) for path in inside]


def local(path: str | os.PathLike) -> Place:
    return Place(str(path), LOCAL, str(path))


def is_hub_id(where: str) -> bool:
    """Tell org/name from a local file that is missing: hf:// in front, or nothing of a file's in it
    and no such folder here."""
    named = hub.ID.fullmatch(where)
    return bool(named) and (
        where.startswith("hf://")
        or not (
            Path(where).exists() or Path(where).parent.is_dir() or hub.suffix(where) in SUFFIXES
        )
    )


def find(where: str) -> list[Place]:
    """Return the data files that `where` names (a file, a folder, a glob, a hub id, a URI), in
    order; one line where there are none."""
    if is_uri(where):
        found = _find_uri(where)
    elif is_hub_id(where):
        repo, commit, inside = hub.download(where)
        found = [
            Place(f"{repo}/{path}@{commit[:12]}", LOCAL, str(path_here), commit)
            for path, path_here in inside
        ]
    else:
        found = _find_local(where)
    for place in found:
        if not place.suffix:
            files.fail(
                f"{place} is of a kind that is not read",
                seen=Path(place.path).suffix or "no suffix",
                wanted=READ,
            )
    return found


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
        try:
            there = system.get_file_info(place.path).is_file
        except OSError as problem:
            _refuse(name, problem)
        now = stamp(place) if there else {}
        if any(before[key] != value for key, value in now.items()):
            result.append(name)
    return result


def seek(place: Place) -> pa.NativeFile:
    """Open a file to be read at any place (parquet)."""
    return place.system.open_input_file(place.path)


def read(place: Place) -> BinaryIO:
    """Open a file to be read from its beginning, unpacked if its name says that it is packed. A
    broken one raises `BROKEN`."""
    packed = os.path.splitext(place.path)[1].lower()
    codec = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}.get(packed)
    stream = place.system.open_input_stream(place.path, compression=codec, buffer_size=BUFFER)
    return lzma.open(stream) if packed == ".xz" else stream


def text(place: Place, newline: str | None = None) -> io.TextIOWrapper:
    """Open a text file (UTF-8, with or without a byte order mark)."""
    return io.TextIOWrapper(read(place), encoding="utf-8-sig", newline=newline)


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
    try:
        if not system.get_file_info(path).is_file:
            return None
        return pq.read_schema(path, filesystem=system).metadata or {}
    except pa.ArrowInvalid:
        return {}
    except (pa.ArrowException, OSError) as problem:
        _refuse(where, problem)


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
    try:
        if folder:
            system.create_dir(folder, recursive=True)
        with pq.ParquetWriter(partial, schema, filesystem=system, compression="zstd") as writer:
            for batch in batches:
                writer.write(batch)
                rows += batch.num_rows
        if isinstance(system, fs.LocalFileSystem):
            files.sync(Path(partial))
        system.move(partial, path)
    except (pa.ArrowException, OSError) as problem:
        _refuse(where, problem, "written")
    return rows


def remove(where: str) -> None:
    """Delete the file at a path or URI, if there is one."""
    system, path = _target(where)
    try:
        if system.get_file_info(path).is_file:
            system.delete_file(path)
    except (pa.ArrowException, OSError) as problem:
        _refuse(where, problem, "removed")
