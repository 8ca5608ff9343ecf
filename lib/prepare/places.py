"""Files wherever they lie: on this disk, or behind a URI that pyarrow.fs understands (s3://, gs://,
hdfs://, ...); those of the Hugging Face hub are in its cache on this disk (lib/prepare/hub.py).

Contract: `find_by_uri` and `find_by_path` turn what a user wrote into `Place`s, `open_stream` and
`open_seekable` open one (nothing remote is copied to the disk), `write_table` writes a parquet file
whole or not at all. No name, message or record made here holds a secret: what passes through
`redact` may be printed and stored.
"""

import contextlib
import fnmatch
import glob
import io
import itertools
import lzma
import os
import re
import urllib.parse
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from lib import files

SAME = {".ndjson": ".jsonl", ".feather": ".arrow"}  # two names of one kind
STREAMS = (".json", ".jsonl", ".csv", ".tsv", ".txt")
SUFFIXES = (".parquet", *STREAMS, ".arrow", *SAME)
PACKED = (".gz", ".bz2", ".zst", ".xz")  # behind the suffix of one of STREAMS
READ = f"{', '.join(SUFFIXES)} (text also with {', '.join(PACKED)})"
# what data sets and other tools leave beside the data: no rows are in them
METADATA = re.compile(
    r"(dataset_(infos?|dict)|state|meta|config|croissant|schema|package|readme|license"
    r"|(tokenizer|generation|special_tokens|preprocessor)\w*|requirements\S*|vocab|merges)"
    r"\.(json|txt)",
    re.IGNORECASE,
)
# beside answers that prepare_data.py had written (lib/prepare/store.py), and there alone
BESIDE_ANSWERS = re.compile(r"(settings|checksums|cost)\.json")
ANSWERS = re.compile(r"part-\d{5}\.parquet|journal\.jsonl")
SPLIT_WORDS = {
    "train": {"train", "training", "trainset"},
    "test": {"test", "testing", "testset", "holdout", "heldout"},
    "validation": {"validation", "valid", "val", "dev", "devset", "eval", "evaluation"},
}
SPLIT_OF = {word: split for split, words in SPLIT_WORDS.items() for word in words}
# beside data, what nobody takes for data
NO_DATA = re.compile(
    r"(readme|license|notice|citation|_success|makefile|dockerfile)\b.*|.*\.(md|py|sh|ya?ml|lock|crc)",
    re.IGNORECASE,
)
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
    return "" if stem != name and end not in STREAMS and end not in SAME else end


@dataclass(frozen=True)
class Place:
    """A file: its name for people and records (no secrets in it), the file system, the path there;
    of a hub's file the commit; how its text is written, and what it is where its name says another
    thing (lib/prepare/kinds.py)."""

    name: str
    system: fs.FileSystem
    path: str
    revision: str | None = None
    encoding: str = "utf-8-sig"
    kind: str | None = None
    packed: str | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def suffix(self) -> str:
        """What it is, packed or not: ".jsonl" of a.jsonl.gz; "" of a kind that is not read."""
        found = self.kind or suffix(self.path)
        return SAME.get(found, found) if found in SUFFIXES else ""

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


def data_files(
    paths: list[str], root: str, split: str | None = None, hidden: str = "."
) -> list[str]:
    """Return the data files among the paths below a folder: none that is hidden or holds metadata,
    plain text only where there is nothing else, and of files whose names say a split those of
    `split` ("all": of every one; None: train, where some other is said) alone. What is left out is
    said."""
    left: dict[str, list[str]] = {}
    groups: dict[str | None, list[str]] = {}
    data = [path for path in paths if suffix(path) in SUFFIXES]
    only_text = all(suffix(path) == ".txt" for path in data)
    twins = splits_of_twins([os.path.relpath(path, root) for path in data])
    answers = {os.path.dirname(path) for path in data if ANSWERS.fullmatch(path.split("/")[-1])}
    for path in paths:
        *folders, name = (inside := os.path.relpath(path, root)).split("/")
        aside = next((part for part in folders if part[:1] in "._"), None)
        if suffix(path) not in SUFFIXES:
            if not aside and name[:1] not in "._" and not NO_DATA.fullmatch(name):
                left.setdefault("of a kind that is not read", []).append(path)
        elif aside:
            left.setdefault(f"in {aside}", []).append(path)
        elif name[:1] in hidden:
            left.setdefault("hidden", []).append(path)
        elif METADATA.fullmatch(name) or (
            os.path.dirname(path) in answers and BESIDE_ANSWERS.fullmatch(name)
        ):
            left.setdefault("metadata", []).append(path)
        elif suffix(name) == ".txt" and not only_text:
            left.setdefault("text beside data", []).append(path)
        else:
            found = split_of([*folders, name]) or twins.get(inside)
            groups.setdefault(found, []).append(path)
    told = [name for name in groups if name]
    wanted = split or ("train" if "train" in groups else None)
    if split and split != "all" and split not in groups:  # train_sft, as a folder or file is called
        named = [path for path in data if re.search(rf"[/]{re.escape(split)}[/.-]", path)]
        groups = {split: named} if named else groups
    if split and split != "all" and split not in groups:
        seen = ", ".join(told) or "no file whose name says one"
        files.fail(f"{redact(root)} has no split {split}", seen, "one that its file names say")
    if split != "all" and len(groups) > 1:
        for name in [name for name in groups if name != wanted]:
            left[f"split {name}" if name else "of no split"] = groups.pop(name)
    if left:
        said = [f"{len(paths)} {why} ({paths[0]})" for why, paths in left.items()]
        hint = f"; {root}:all takes every split" if any("split" in why for why in left) else ""
        print(f"prepare left out of {redact(root)}: {', '.join(said)}{hint}", flush=True)
    kept = {path for inside in groups.values() for path in inside}
    return [path for path in data if path in kept]


def say_splits(where: str, paths: list[str]) -> None:
    """Say where a glob takes files of several splits: who writes one, gets what it matches."""
    root = os.path.commonpath(paths) if len(paths) > 1 else ""
    inside = [os.path.relpath(path, root or ".").split("/") for path in paths]
    told = dict.fromkeys(filter(None, map(split_of, inside)))
    if len(told) > 1:
        print(
            f"prepare warning: {redact(where)} takes files of several splits: {', '.join(told)}",
            flush=True,
        )


def split_of(parts: list[str]) -> str | None:
    """Return the split that a path's name says, or its folders: "train" of ["data",
    "train-00000-of-00002.parquet"] and ["train", "0.parquet"], "test" of ["gsm8k_test.jsonl"] and
    ["gsm8k.test.jsonl"]; the name goes first. Only the first and the last word of a name count."""
    for part in reversed(parts):
        words = words_of(part)
        found = {SPLIT_OF[word] for word in (words[0], words[-1]) if word in SPLIT_OF}
        if len(found) == 1:
            return found.pop()
    return None


def words_of(name: str) -> list[str]:
    """Return the words of a file's or folder's name, in small letters, without its suffixes, the
    numbers at its end and those that words end in."""
    stem = re.sub(r"\.(gz|bz2|zst|xz)$", "", name.lower())
    stem = stem.removesuffix(suffix(name)) if suffix(name) in SUFFIXES else stem
    words = [word.rstrip("0123456789") for word in re.split(r"[\s._-]+", stem)]
    while len(words) > 1 and words[-1] in ("", "of"):
        del words[-1]
    return words


def splits_of_twins(paths: list[str]) -> dict[str, str]:
    """Return the split of files whose names differ from another's by a split's word alone, wherever
    it stands: {"a_train_x.csv": "train", "a_test_x.csv": "test"}."""
    twins: dict[tuple[str, ...], dict[str, str]] = {}
    for path in paths:
        folder, _, name = path.rpartition("/")
        words = words_of(name)
        for place, word in enumerate(words):
            if word in SPLIT_OF:
                key = (folder, *words[:place], "", *words[place + 1 :])
                twins.setdefault(key, {})[path] = SPLIT_OF[word]
    return {
        path: split
        for group in twins.values()
        if len(set(group.values())) > 1
        for path, split in group.items()
    }


def _walk(folder: str) -> Iterator[str]:
    """Yield the files below a folder, each real folder once: links may lead in circles."""
    seen: set[tuple[int, int]] = set()
    for at, folders, names in os.walk(folder, followlinks=True):
        here = os.stat(at)
        if (here.st_dev, here.st_ino) in seen:
            folders.clear()
            continue
        seen.add((here.st_dev, here.st_ino))
        folders.sort()
        for name in sorted(names):
            yield os.path.join(at, name)


def matches(where: str) -> list[str]:
    """Return the files that a local glob names, in order (a ** that meets a loop of links ends)."""
    parts = where.split("/")
    if "**" not in parts:
        return sorted(path for path in glob.glob(where) if os.path.isfile(path))
    first = parts.index("**")
    wanted = [part for part, _ in itertools.groupby(parts[first:])]
    begin, found = "/".join(parts[:first]), set()
    for root in glob.glob(begin) if begin else ["/" if first else "."]:
        for path in _walk(root):
            inside = os.path.relpath(path, root)
            if _fits(inside.split("/"), wanted):
                found.add(os.path.join(root, inside) if first else inside)
    return sorted(found)


def _fits(parts: list[str], wanted: list[str]) -> bool:
    if not wanted:
        return not parts
    if wanted[0] == "**":
        shown = [*itertools.takewhile(lambda part: part[:1] != ".", parts)]
        return any(_fits(parts[place:], wanted[1:]) for place in range(len(shown) + 1))
    hidden = parts[:1] and parts[0][:1] == "." != wanted[0][:1]
    named = parts and not hidden and fnmatch.fnmatchcase(parts[0], wanted[0])
    return bool(named) and _fits(parts[1:], wanted[1:])


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
            inside = [path]
        elif info.type == fs.FileType.Directory:
            if isinstance(system, fs.LocalFileSystem):
                inside = list(_walk(path))
            else:
                there = system.get_file_info(fs.FileSelector(path, recursive=True))
                inside = [info.path for info in there if info.is_file]
            if "*" in body:
                wanted = _pattern(path.rstrip("/") + "/" + urllib.parse.unquote(body[len(fixed) :]))
                inside = sorted(found for found in inside if _matched(found, path, wanted))
                say_splits(uri, inside)
            else:
                inside = data_files(sorted(inside), path.rstrip("/"), hidden="._")
    if not inside:
        files.fail(
            f"{redact(uri)} is missing",
            seen="no such file, folder of data or match",
            wanted="data: a file, a folder or a glob with *",
        )
    return [Place(name(found), system, found) for found in inside]


def _matched(path: str, root: str, wanted: re.Pattern) -> bool:
    """Return whether a path below a folder is data, not hidden, and matches."""
    inside = path[len(root) :].strip("/").split("/")
    shown = not any(part[:1] in "._" for part in inside)
    return shown and suffix(path) in SUFFIXES and wanted.fullmatch(path) is not None


def find_by_path(where: str) -> list[Place]:
    """Return the data files of this disk that `where` names (a file, a folder, or a glob), in
    order; one line where there are none."""
    folder, colon, split = where.rpartition(":")
    if not os.path.exists(where) and colon and os.path.isdir(folder):
        split = split if split == "all" else SPLIT_OF.get(split, split)
    else:
        folder, split = where, None
    if os.path.isdir(folder):
        folder = str(Path(folder))
        every = sorted(Path(at, name) for at, _, names in os.walk(folder) for name in names)
        inside = data_files([str(path) for path in every if path.is_file()], folder, split)
        if not inside:
            files.fail(f"the folder {folder} holds no data file", wanted=f"one that ends in {READ}")
    elif os.path.exists(where):
        inside = [where]
    else:
        inside = matches(where)
        if not inside:
            files.fail(
                f"{where[:200]} is missing",
                seen="no such file, folder or match",
                wanted="data: a file, a folder, a glob, a hub id or a URI",
            )
        say_splits(where, inside)
    for path in inside:
        if re.search("[\ud800-\udfff]", path):  # it could stand in no record of what was read
            files.fail(f"the name of {path!r} is not UTF-8", mend="another name for that file")
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
    packed = os.path.splitext(place.path)[1].lower() if place.packed is None else place.packed
    codec = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}.get(packed)
    stream = place.system.open_input_stream(place.path, compression=codec, buffer_size=BUFFER)
    return lzma.open(stream) if packed == ".xz" else stream


def open_text(place: Place, newline: str | None = None) -> io.TextIOWrapper:
    """Open a text file (UTF-8 with or without a byte order mark, unless another was found)."""
    return io.TextIOWrapper(open_stream(place), encoding=place.encoding, newline=newline)


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
