"""Files that are whole or absent: atomic writes, folders published by rename, checksums, what is
read held against a schema, locks, one-line errors (also of the disk).

    python -m lib.files data/demo logits/demo runs/demo     # `make verify`: every byte that has a
                                                            # checksum; exit code 1 if one is wrong

Contract: every write goes to a temporary name beside its target and is renamed; a reader sees the
old file or the new one, never a half. A folder is complete when its `meta.json` / `config.json`,
written last, exists.

Checksums: a sealed JSON file (`write_json`) holds those of the files beside it, {"checksums":
{NAME: {"bytes": N, "crc32": 8 hex digits a BLOCK}}}, and as its last line its own: "seal", the
CRC-32 of the text before. Whoever reads such a file (`read_json`) checks the seal; `check` the
files: small ones whole, of large ones some blocks, or every byte. "seal": null says that somebody
edited the file and means it; a file without both was made before there were any.
"""

import contextlib
import errno
import functools
import hashlib
import importlib.util
import json
import math
import os
import random
import re
import shlex
import shutil
import sys
import threading
import time
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

# inside a folder: what neither --fresh nor a new version of the folder deletes, for a teacher's
# answers cost money
NEVER_DELETED = "answers"
POINTER = b"version https://git-lfs.github.com/spec/"  # how such a file begins
LOCK = ".lock"
TOLD_EVERY_S = 8.0  # of what takes long
LOOK_S = 0.5  # before a folder that is held is refused
KEPT = "keep"  # inside a run: older resume states, each a folder one deeper than last/
WHOLE = ("meta.json", "config.json")  # written last: that a folder is complete
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)  # as flock says it
BLOCK = 1 << 22  # bytes that one checksum stands for
WHOLE_UP_TO = 64_000_000  # bytes up to which a file is checked whole wherever it is read
BLOCKS_LOOKED_AT = 8  # blocks that are checked of a larger one, beside its first and its last
LINE_SUM = b', "crc32": "'  # begins the last field of a line that holds its own checksum
SEAL = ',\n  "seal": "'
SUMS = {...: {"bytes": range(1 << 62), "crc32": str, "grows?": bool}}  # a schema: see `misfit`


def fail(
    wrong: str, seen: object = None, wanted: object = None, mend: str | None = None
) -> NoReturn:
    """End the program with exit code 1 and one line: what is wrong, what was seen, what was wanted,
    what mends it."""
    parts = [f"error: {wrong}"]
    if seen is not None:
        parts.append(f"saw {seen}")
    if wanted is not None:
        parts.append(f"wanted {wanted}")
    if mend is not None:
        parts.append(f"mend it with: {mend}")
    raise SystemExit("; ".join(" ".join(part.split()) for part in parts))


def command(name: str, *words: object) -> str:
    """Return a command line for one of our scripts that works when it is pasted here."""
    here, root = Path.cwd(), Path(__file__).parents[1]
    places = [Path(sys.executable), root / name]
    near = [
        str(place.relative_to(here)) if here in place.parents else str(place) for place in places
    ]
    return shlex.join([*near, *map(str, words)])


def same(one: object, other: object) -> bool:
    """Return whether two settings are equal, or name the same place on the disk: relative or
    absolute, by a link, with a slash at the end, also behind NAME=."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    if one == other or not (isinstance(one, str) and isinstance(other, str) and one and other):
        return one == other
    (*name, path), (*its, there) = one.split("=", 1), other.split("=", 1)
    return name == its and os.path.realpath(path) == os.path.realpath(there)


AGAIN = "then the same command: it goes on from what was whole"
MEND = {  # what a file system may answer to anyone at any moment, and what mends it
    "ENOSPC EDQUOT": f"more room on that disk, {AGAIN}",
    "EFBIG": f"a larger limit (ulimit -f), or a disk that takes larger files, {AGAIN}",
    "EROFS EACCES EPERM": "a place that this user may write to, or its rights changed",
    "EIO ESTALE ENXIO ENODEV ETIMEDOUT": f"a look at that disk or network drive, {AGAIN}",
    "ENAMETOOLONG ENOTDIR EISDIR EEXIST ELOOP EILSEQ": "another name",
    "EBUSY EXDEV": "a folder below it: what is mounted cannot be renamed",
    "EMFILE ENFILE": f"a larger limit of open files (ulimit -n), {AGAIN}",
    "EPIPE": f"a reader that stays, {AGAIN}",
}
MENDS = {getattr(errno, name): mend for names, mend in MEND.items() for name in names.split()}


def disk_error(error: Exception) -> tuple[str, str, str] | None:
    """Return (what is wrong, what was seen, what mends it) of an error that the disk made, or None
    for any other: a bug must show its traceback. The libraries in Rust say it by words alone,
    pyarrow names the file in words, and numpy says how much of an array was written."""
    code = None
    if isinstance(error, OSError) and error.errno:
        named = re.search(r"local file '(.+?)'", str(error))
        number, name = error.errno, error.filename or (named and named[1])
    else:
        code = re.search(r"\(os error (\d+)\)", str(error))
        half = re.search(r"\d+ requested and \d+ written", str(error))
        number, name = int(code[1]) if code else errno.ENOSPC if half else 0, None
    what = "a file" if name is None else os.fsdecode(name)
    gone = code if name is None else not Path(what).absolute().parent.exists()
    gone = gone or what.endswith(".part")  # ours, while it is being filled
    if number == errno.ENOENT and gone:
        return f"{what} is out of reach", "that its folder is gone", f"that folder, {AGAIN}"
    if number not in MENDS:
        return None
    what = "the standard output" if number == errno.EPIPE else what
    return f"{what} cannot be read or written", os.strerror(number), MENDS[number]


def lost_process(error: Exception) -> tuple[str, str, str] | None:
    """Return the same of what is raised where another process of a run under torchrun is gone."""
    gone = r"gloo.*(closed by peer|reset by peer|timed out|refused|broken pipe)"
    named = type(error).__name__ in ("DistNetworkError", "DistBackendError")
    if not isinstance(error, RuntimeError) or not named and not re.search(gone, str(error), re.I):
        return None
    said = str(error).strip().splitlines()[-1]
    return "this process has lost another one", said, "see what that one said"


def script(main: Callable[..., Any]) -> Callable[..., Any]:
    """Make of a script's main one that ends in one line where the disk or another process fails it:
    the one place where that is done, for it may happen in any line. Words that a terminal cannot
    show (a file name that is not UTF-8) are printed with escapes."""

    @functools.wraps(main)
    def guarded(argv: list[str] | None = None) -> Any:
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
        before = {*Lock.held}
        try:
            return main(argv)
        except Exception as error:
            if (found := disk_error(error) or lost_process(error)) is None:
                raise
            if isinstance(error, BrokenPipeError):  # else Python complains once more when it ends
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            wrong, seen, mend = found
            fail(wrong, seen, mend=mend)
        finally:  # a caller in this process may keep what was raised, and its frames hold locks
            for held in {*Lock.held} - before:
                held.release()

    return guarded


@contextlib.contextmanager
def telling(what: str, every_s: float | None = None) -> Iterator[None]:
    """While what is inside runs, say so every few seconds on stderr: nobody should ask whether it
    hangs. Also a function's decorator."""
    ended, begun = threading.Event(), time.monotonic()

    def tell() -> None:
        while not ended.wait(every_s or TOLD_EVERY_S):
            # above a progress bar, if there is one
            tqdm.write(f"{what}: {time.monotonic() - begun:.0f} s so far", file=sys.stderr)
            sys.stderr.flush()

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        ended.set()
        teller.join()


def need(package: str, what: str) -> None:
    """Refuse `what` where the package that it needs is not installed."""
    if importlib.util.find_spec(package) is None:
        fail(f"{what} needs {package}", "no such package", mend=f"pip install {package}")


def refuse_pointers(*places: Path) -> None:
    """Refuse a file, or a file in a folder, that only says where Git LFS has the real one."""
    for place in places:
        for path in sorted(place.glob("*")) if os.path.isdir(place) else [place]:
            if os.path.isfile(path) and path.stat().st_size < 1000:
                with open(path, "rb") as file:
                    if file.read(len(POINTER)) == POINTER:
                        fail(f"{path} is a Git LFS pointer, not the file", mend="git lfs pull")


def sync(path: Path) -> None:
    """Force a file or folder to the disk, so that a power cut cannot reorder it after a later
    rename."""
    if os.name == "nt" and path.is_dir():  # where a folder cannot be opened
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def link(source: str, target: str) -> None:
    """Give a file a second name, or copy it where the disk has no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    path = Path(path)
    partial = path.with_name(path.name + ".part")
    # a lone surrogate (of a file name, of a prompt) becomes the escape by which JSON writes it
    partial.write_text(text, encoding="utf-8", errors="backslashreplace")
    sync(partial)
    os.replace(partial, path)


def write_json(path: Path, value: object) -> None:
    """Write JSON whole or not at all; an object that holds `checksums` is sealed."""
    if not isinstance(value, dict) or "checksums" not in value:
        return write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
    value = {key: one for key, one in value.items() if key != "seal"}
    body = json.dumps(value, indent=2, ensure_ascii=False).removesuffix("\n}")
    write_text(path, body + SEAL + _seal(body))


def read_json(path: Path, mend: str | None = None, schema: Any = None) -> dict:
    """Read a JSON file that holds an object; a missing or broken one, one that is not as it was
    sealed, or not as a schema (`misfit`) wants it, is a one-line error that names `mend`."""
    try:
        text = Path(path).read_bytes().decode("utf-8")
        value = json.loads(text)
    except FileNotFoundError:
        fail(f"{path} is missing", mend=mend)
    except (OSError, ValueError, RecursionError) as broken:
        fail(f"{path} is not readable JSON", broken, mend=mend)
    if not isinstance(value, dict):
        fail(f"{path} is not readable JSON", f"{text[:40]!r}", "an object: {...}", mend)
    if ("seal" in value or "checksums" in value) and value.get("seal", "") is not None:
        body, _, end = text.rpartition(SEAL)
        if end != _seal(body):
            meant = 'where somebody edited it and means it: "seal": null in place of its last line'
            seen = "another text than its seal (its last line) was made of"
            fail(f"{path} is damaged", seen, mend=f"{mend}; {meant}" if mend else meant)
    if "checksums" in value:
        expect(path, value, {"checksums": SUMS}, mend)
    if schema is not None:
        expect(path, value, schema, mend)
    return value


def expect(path: Path, value: object, schema: Any, mend: str | None = None) -> None:
    """Refuse what a file holds where it is not as a schema wants it."""
    if wrong := misfit(value, schema):
        fail(f"{path} holds what no script of ours wrote", *wrong, mend)


def misfit(value: Any, schema: Any, name: str = "") -> tuple[str, str] | None:
    """Return (what was seen, what was wanted) where a JSON value is not as a schema wants it, None
    where it is. A schema: a type (float: a finite number), a range or set of values, a tuple of
    schemas one of which must fit, [of each item], {key: of its value}, or a function of the value;
    a key that may be missing ends in "?", and `...` is every key.

    Worked example: {"k": range(1, 99), "mix?": (str, None)} fits {"k": 16}, and {"k": True} not.
    """
    if isinstance(schema, tuple):
        found = [misfit(value, one, name) for one in schema]
        return None if None in found else found[0]
    inside: list[tuple[Any, Any]] = []
    if isinstance(schema, dict):
        fits = isinstance(value, dict)
        for key, inner in schema.items() if fits else ():
            if key is ...:
                inside += [(one, inner) for one in value]
            elif (plain := key.rstrip("?")) in value:
                inside.append((plain, inner))
            elif key == plain:
                return f"no {f'{name}.{key}'.lstrip('.')}", "that key"
    elif isinstance(schema, list):
        fits = isinstance(value, list)
        inside = [(place, schema[0]) for place in range(len(value))] if fits else []
    elif schema in (int, float):  # no bool is one
        fits = type(value) is int and abs(value) < 1 << 63
        fits = fits or schema is float and type(value) is float and math.isfinite(value)
    elif schema is str:  # no half of a surrogate pair, which nothing can write
        fits = isinstance(value, str) and value.encode("utf-8", "ignore").decode() == value
    elif isinstance(schema, range):  # of a text it would look at every number
        fits = type(value) is int and value in schema
    elif isinstance(schema, set):
        fits = type(value) in (int, str) and value in schema
    elif schema is None or isinstance(schema, type):
        fits = value is None if schema is None else isinstance(value, schema)
    else:
        fits = schema(value)
    if not fits:
        kind = "an object" if isinstance(schema, dict) else getattr(schema, "__name__", str(schema))
        return f"{name or 'it'}: {str(value)[:40]!r}", kind
    found = [misfit(value[key], inner, f"{name}.{key}".lstrip(".")) for key, inner in inside]
    return next(filter(None, found), None)


def is_number(value: object) -> bool:
    """Return whether a JSON value is a number that a float holds; NaN and infinity may be one."""
    return type(value) is float or type(value) is int and abs(value) < 1 << 63


def read_npy(path: Path, dtype: np.dtype | type, mend: str | None = None) -> np.memmap:
    """Map a one-dimensional .npy file; one that cannot be read, or holds anything but that dtype,
    byte order included, is a one-line error."""
    dtype = np.dtype(dtype)
    try:
        array = np.lib.format.open_memmap(path, mode="r")
        size = os.path.getsize(path)
    except Exception as broken:  # numpy reads a header as Python source: any that Python has
        fail(f"{path} cannot be read", broken, "an array as our scripts write it", mend)
    if array.dtype != dtype or array.ndim != 1:
        seen = f"{array.dtype} of shape {array.shape}"
        fail(f"{path} holds another kind of array", seen, f"{dtype}, one-dimensional", mend)
    if size != array.offset + array.nbytes:
        seen = f"{size} bytes"
        fail(f"{path} is not whole", seen, array.offset + array.nbytes, mend)
    return array


# --- checksums


def _seal(body: str) -> str:
    """Return what follows SEAL in a sealed file."""
    return f'{zlib.crc32(body.encode("utf-8")):08x}"\n}}\n'


def sums(path: Path, digest: Any = None, size: int | None = None) -> dict:
    """Return the checksums of a file, or of its first `size` bytes, in one pass, which also feeds
    `digest` (of hashlib), if given."""
    size = path.stat().st_size if size is None else size
    starts, at_once, found = range(0, size, BLOCK), 16, []
    bar = tqdm(
        total=size,
        desc=f"checksums of {path.name}",
        unit="B",
        unit_scale=True,
        disable=size < 16 * WHOLE_UP_TO or not sys.stderr.isatty(),
    )
    with open(path, "rb") as source, ThreadPoolExecutor() as pool, bar:
        for first in range(0, len(starts), at_once):
            some = starts[first : first + at_once]
            blocks = [source.read(min(BLOCK, size - start)) for start in some]
            made = pool.map(zlib.crc32, blocks)
            for block in blocks if digest else ():
                digest.update(block)
            found += [f"{one:08x}" for one in made]
            bar.update(sum(map(len, blocks)))
    return {"bytes": size, "crc32": "".join(found)}


def with_sum(line: bytes) -> bytes:
    """Return an object's JSON with its own checksum as its last field."""
    body = line.removesuffix(b"}")
    return body + LINE_SUM + f'{zlib.crc32(body):08x}"}}'.encode()


def is_whole(line: bytes) -> bool:
    """Return whether a line is as `with_sum` made it."""
    return with_sum(line.rpartition(LINE_SUM)[0]) == line


def checksums(folder: Path) -> dict:
    """Return the checksums of all files below a folder, by name, but what is hidden."""
    there = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name[0] != ".")
    return {path.relative_to(folder).as_posix(): sums(path) for path in there}


def damage(path: Path, known: dict, whole: bool = False) -> str | None:
    """Return what tells a file from the one that its checksums are of, None where nothing does. Of
    a file above WHOLE_UP_TO bytes blocks here and there alone are looked at, unless it is asked for
    `whole`."""
    if not path.is_file():
        return "no such file"
    size, blocks = path.stat().st_size, -(-known["bytes"] // BLOCK)
    if known.get("grows"):  # as a log does: what was there must be there still
        size = min(size, known["bytes"])
    if size != known["bytes"] or 8 * blocks != len(known["crc32"]):
        return f"{size} bytes instead of {known['bytes']}"
    wanted = [known["crc32"][8 * n : 8 * n + 8] for n in range(blocks)]
    if whole or size <= WHOLE_UP_TO:
        made = sums(path, size=size)["crc32"]
        seen = {n: made[8 * n : 8 * n + 8] for n in range(blocks)}
    else:
        seen, dice = {}, random.Random()  # other blocks every time
        with open(path, "rb") as source:
            for n in {0, blocks - 1, *dice.sample(range(blocks), min(BLOCKS_LOOKED_AT, blocks))}:
                source.seek(n * BLOCK)
                seen[n] = f"{zlib.crc32(source.read(BLOCK)):08x}"
    wrong = min((n for n in seen if seen[n] != wanted[n]), default=None)
    return None if wrong is None else f"another checksum at byte {wrong * BLOCK:,}"


def check(folder: Path, sealed: dict, whole: bool, mend: str | None) -> bool:
    """Refuse files in a folder that are not as they were when `sealed` was written; return whether
    it holds checksums at all. (What lies outside the folder, or somebody may have moved away, its
    reader checks.)"""
    for name, known in sealed.get("checksums", {}).items():
        if name.startswith("../") or name.startswith("rows/") and not (folder / name).exists():
            continue
        if seen := damage(folder / name, known, whole):
            fail(f"{folder / name} is damaged", seen, "the file as it was written", mend)
    return "checksums" in sealed


def say_none(folder: Path) -> None:
    """Say that a folder has no checksums."""
    print(f"{folder} has no checksums, for it was made before there were any: not checked")


def json_lines(
    lines: Iterable[str], name: object, wanted: str | None = None
) -> Iterator[tuple[int, object]]:
    """Yield (line number from 1, value) of JSON lines, blank ones left out; one that is broken is
    a one-line error that names `name`, its number, and what was `wanted`."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as broken:
            fail(f"{name} line {number} is not JSON", f"{line[:60].rstrip()!r} ({broken})", wanted)


def read_jsonl(path: Path, torn: bool = False) -> list:
    """Return the values of a .jsonl file. torn: what follows the last line end is still being
    written, and left out."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as broken:
        fail(f"{path} cannot be read", broken, "a UTF-8 file of one JSON object a line")
    return [value for _, value in json_lines(lines[:-1] if torn else lines, path)]


def sha256(*paths: Path) -> str:
    """Return the sha256 of the files' bytes, one after the other (hex)."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as source:
            while block := source.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def beside(folder: Path, what: str) -> Path:
    """Return the hidden name beside a folder for its unfinished (part) or replaced (old) self: no
    backup of a user's has it."""
    return folder.with_name(f".{folder.name}.{what}")


def _drop(old: Path, folder: Path) -> None:
    """Delete the replaced self of `folder`, once what is NEVER_DELETED has moved on from it."""
    if (old / NEVER_DELETED).exists():
        os.replace(old / NEVER_DELETED, folder / NEVER_DELETED)
    shutil.rmtree(old, ignore_errors=True)


def publish(partial: Path, folder: Path) -> None:
    """Put the finished folder `partial` in the place of `folder`; `recover` mends a kill between
    the renames."""
    # what the umask leaves: safetensors writes for its owner alone
    readers = partial.stat().st_mode & 0o444
    for path in (*partial.rglob("*"), partial):
        mode = path.stat().st_mode
        if path.is_file() and readers & ~mode:  # else untouched: some drives refuse any chmod
            path.chmod(mode | readers)
        sync(path)
    old = beside(folder, "old")
    _drop(old, folder)
    if folder.exists():
        os.replace(folder, old)
    os.replace(partial, folder)
    sync(folder.parent)
    _drop(old, folder)


def recover(folder: Path, state: str | None = None) -> None:
    """Finish or undo a `publish` that was killed: after it, `folder` is whole (the older one, if
    need be) or absent. An unfinished self that holds the file `state` stays."""
    old = beside(folder, "old")
    if not folder.exists() and old.exists():
        os.replace(old, folder)
    _drop(old, folder)
    if state is None or not (beside(folder, "part") / state).exists():
        shutil.rmtree(beside(folder, "part"), ignore_errors=True)


def partial_folder(folder: Path) -> Path:
    """Return an empty folder beside `folder`, to be filled and then given to `publish`."""
    partial = beside(folder, "part")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()  # a parent that is gone took what lay there with it: no new one in silence
    return partial


def refuse_foreign(folder: Path, marks: tuple[str, ...]) -> None:
    """Refuse to delete a folder that no script of ours made: one that holds none of `marks`, but
    something."""
    inside = (
        [path for path in folder.iterdir() if path.name != NEVER_DELETED] if folder.exists() else []
    )
    if inside and not any((folder / mark).exists() for mark in marks):
        fail(
            f"--fresh would delete {folder}",
            seen="a folder that no script of ours made",
            wanted=f"one that holds {' or '.join(marks)}",
        )


def remove_ours(folder: Path, marks: tuple[str, ...]) -> None:
    """Empty a folder that one of our scripts made (see `refuse_foreign`), and whose lock, which
    stays, the caller holds; what is NEVER_DELETED stays as well."""
    refuse_foreign(folder, marks)
    inside = list(folder.iterdir()) if folder.exists() else []
    # what says that it is whole goes first, and what says that it is ours last: killed in between,
    # it is an unfinished one of ours
    for path in sorted(inside, key=lambda path: (path.name not in WHOLE, path.name in marks)):
        if path.name in (LOCK, NEVER_DELETED):
            continue
        if path.is_dir() and not path.is_symlink():
            gone = beside(path, "part")  # at once, not file by file
            shutil.rmtree(gone, ignore_errors=True)  # what a kill left there
            os.replace(path, gone)
            shutil.rmtree(gone)
        else:
            path.unlink()


class Lock:
    """A lock file that this process holds until `release`, or until it ends, however it ends; as a
    context until its block ends. what: it is for; passing: the file goes with its release."""

    held: weakref.WeakSet = weakref.WeakSet()

    def __init__(self, path: Path, what: Path, wait: bool = False, passing: bool = False) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # `locked` holds it too, for the time of a look
        inner = FileLock(path, timeout=LOOK_S, thread_local=False, fallback_to_soft=False)
        try:
            inner.acquire()
        except Timeout:
            busy = f"{what} is being written by another process"
            if not wait:
                mend = "wait for it, or choose another --out"
                fail(busy, wanted="one process a folder or file", mend=mend)
            print(f"{busy}: waiting for it", flush=True)
            inner.acquire(timeout=-1)
        except OSError as broken:
            if broken.errno not in NO_LOCKS:
                raise
            _say_no_locks(path.parent, broken.strerror)
        self.release = weakref.finalize(self, _let_go, inner, path if passing else None)
        self.held.add(self)

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *_) -> None:
        self.release()


@functools.cache
def _say_no_locks(folder: Path, why: str) -> None:
    print(
        f"WARNING: the file system of {folder} keeps no locks (flock: {why}): see to it that one"
        " process alone writes there"
    )


def _let_go(inner: FileLock, gone: Path | None) -> None:
    if gone:
        with contextlib.suppress(OSError):  # a file that stays does no harm
            gone.unlink()
    inner.release()


def lock(folder: Path, wait: bool = False) -> Lock:
    """Hold a folder, made if need be, for this process; a second process is refused, or waits. Keep
    the value that is returned."""
    return Lock(folder / LOCK, folder, wait)


def lock_beside(path: Path) -> Lock:
    """Hold a file or folder that is put in its place by renames: its lock lies beside it."""
    return Lock(beside(Path(os.path.abspath(path)), "lock"), path, passing=True)


def locked(folder: Path) -> bool:
    """Return whether a process holds a folder by `lock`."""
    if not (folder / LOCK).exists():
        return False
    try:
        with FileLock(folder / LOCK, timeout=0, fallback_to_soft=False):
            return False
    except Timeout:
        return True
    except OSError:  # a file system without locks, or one that may not be written to
        return False


def check_out(out: str | Path, file: bool = False) -> None:
    """Refuse an --out that no folder (or `file`) can be made at, before anything is computed for
    it."""
    seen, wanted, what = None, "a file" if file else "a new folder", "cannot be written"
    try:
        path = Path(str(out).encode("utf-8").decode()).resolve()
        there = next(one for one in (path, *path.parents) if os.path.lexists(one))
        if not path.name:
            seen = "the root of the disk"
        elif max(len(os.fsencode(part)) for part in path.parts) > 200:  # others get longer ones
            seen = "a name of more than 200 bytes"
        elif there != path and not there.is_dir():
            seen = f"{there}, which is no folder"
        elif there == path and there.is_dir() == file:
            seen, what = "a folder" if file else "something that is no folder", "is in the way"
        elif not os.access(there, os.W_OK):
            seen = f"{there}, which may not be written"
    except UnicodeEncodeError:
        out, seen, wanted = ascii(str(out)), "a name that is not UTF-8", f"{wanted}, in UTF-8"
    except (OSError, RuntimeError, ValueError) as broken:  # a loop of links; a NUL
        seen = str(broken)
    if seen:
        fail(f"--out {out} {what}", seen, wanted, "another --out")


def free_bytes(folder: Path) -> int:
    """Return the free bytes of the disk that holds `folder` (or its nearest parent that exists)."""
    folder = Path(folder).absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def free_memory() -> int:
    """Return the bytes of the machine's memory that are free now."""
    try:
        with open("/proc/meminfo") as lines:
            return next(
                int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")
            )
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def human(size: float) -> str:
    """Return a byte count for people: human(2_500_000) == '2.5 MB'."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} TB"


def verify(folder: Path, seen: set[Path]) -> tuple[int, int, list[str]]:
    """Check every byte that has a checksum below a folder: return how many files and bytes, and
    what is wrong of them. seen: files that need no second look."""
    count, size, wrong = 0, 0, []
    for path in sorted(folder.rglob("*.json")):
        try:
            sealed = read_json(path)
        except SystemExit as broken:
            wrong.append(str(broken).removeprefix("error: "))
            continue
        if "checksums" not in sealed:
            if path.name == "meta.json" or path.name == "config.json" and "settings" in sealed:
                say_none(path.parent)
            continue
        for name, known in {path.name: None, **sealed["checksums"]}.items():
            home = path.parent.parent if path.parent.parent.name == KEPT else path.parent
            there = (home if name.startswith("../") else path.parent) / name
            one = there.resolve()
            grows = known is not None and "grows" in known  # looked at as far as each knows of it
            if one in seen and not grows or name.startswith("rows/") and not one.exists():
                continue
            seen.add(one)
            if known and (what := damage(one, known, whole=True)):
                wrong.append(f"{there} is damaged; saw {what}")
            elif one.exists():
                count, size = count + 1, size + one.stat().st_size
    for path in folder.rglob("journal.jsonl"):  # of the newest answers, each line with its own
        *lines, torn = path.read_bytes().split(b"\n")
        count, size = count + 1, size + path.stat().st_size
        ours = any(LINE_SUM in line for line in lines)
        if torn or ours and not all(map(is_whole, lines)):
            wrong.append(f"{path} is torn or damaged: what is not whole of it is asked again")
    return count, size, wrong


@script
def main(argv: list[str] | None = None) -> None:
    """Check the folders that are named: one line each, and one for each file that is wrong."""
    folders, failed = sys.argv[1:] if argv is None else argv, False
    if not folders or folders[0].startswith("-"):
        print("usage: python -m lib.files FOLDER ...: check every byte that has a checksum")
        raise SystemExit(2)
    seen: set[Path] = set()
    for folder in map(Path, folders):
        if not folder.is_dir():
            fail(f"{folder} is no folder", wanted="one of data/, logits/ or runs/")
        count, size, wrong = verify(folder, seen)
        for line in wrong:
            print(f"error: {line}")
        failed = failed or bool(wrong)
        print(f"verify {folder}: {count} files, {human(size)}, {len(wrong)} damaged", flush=True)
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
