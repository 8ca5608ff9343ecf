"""Files that are whole or absent: atomic writes, folders published by rename, growing .npy files,
hashes, locks, one-line errors, also for what a disk may do at any moment.

Contract: every write goes to a temporary name beside its target and is renamed; a reader sees the
old file or the new one, never a half. A folder is complete when its `meta.json` / `config.json`,
written last, exists.
"""

import contextlib
import errno
import functools
import hashlib
import importlib.util
import json
import os
import re
import shutil
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from filelock import FileLock, Timeout

# inside a folder: what neither --fresh nor a new version of the folder deletes, for a teacher's
# answers cost money
NEVER_DELETED = "answers"
LOCK = ".lock"
LOOK_S = 0.5  # before a folder that is held is refused
WHOLE = ("meta.json", "config.json")  # written last: that a folder is complete
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)  # as flock says it


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
    for any other: a bug must show its traceback. The libraries in Rust say it by words alone, and
    numpy says how much of an array was written."""
    if isinstance(error, OSError) and error.errno:
        number, name = error.errno, error.filename
    else:
        code = re.search(r"\(os error (\d+)\)", str(error))
        half = re.search(r"\d+ requested and \d+ written", str(error))
        number, name = int(code[1]) if code else errno.ENOSPC if half else 0, None
    what = "a file" if name is None else os.fsdecode(name)
    if number == errno.ENOENT and name is not None and not Path(what).absolute().parent.exists():
        return f"{what} is out of reach", "that its folder is gone", f"that folder, {AGAIN}"
    if number not in MENDS:
        return None
    what = "the standard output" if number == errno.EPIPE else what
    return f"{what} cannot be read or written", os.strerror(number), MENDS[number]


def script(main: Callable[..., Any]) -> Callable[..., Any]:
    """Make of a script's main one that ends in one line where the disk fails it: the one place
    where that is done, for it may happen in any line. Words that a terminal cannot show (a file
    name that is not UTF-8) are printed with escapes."""

    @functools.wraps(main)
    def guarded(argv: list[str] | None = None) -> Any:
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
        try:
            return main(argv)
        except Exception as error:
            if (found := disk_error(error)) is None:
                raise
            if isinstance(error, BrokenPipeError):  # else Python complains once more when it ends
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            wrong, seen, mend = found
            fail(wrong, seen, mend=mend)

    return guarded


def need(package: str, what: str) -> None:
    """Refuse `what` where the package that it needs is not installed."""
    if importlib.util.find_spec(package) is None:
        fail(f"{what} needs {package}", "no such package", mend=f"pip install {package}")


def sync(path: Path) -> None:
    """Force a file or folder to the disk, so that a power cut cannot reorder it after a later
    rename."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    path = Path(path)
    partial = path.with_name(path.name + ".part")
    # a lone surrogate (of a file name, of a prompt) becomes the escape by which JSON writes it
    partial.write_text(text, encoding="utf-8", errors="backslashreplace")
    sync(partial)
    os.replace(partial, path)


def write_json(path: Path, value: object) -> None:
    """Write JSON whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path, mend: str | None = None) -> dict:
    """Read a JSON file; a missing or broken one is a one-line error that names `mend`."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        fail(f"{path} is missing", mend=mend)
    except (OSError, ValueError) as broken:
        fail(f"{path} is not readable JSON", seen=broken, mend=mend)


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
        except ValueError as broken:
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
    for path in partial.rglob("*"):
        if path.is_file():
            mode = path.stat().st_mode
            if readers & ~mode:  # else untouched: some mounted drives refuse any chmod
                path.chmod(mode | readers)
            sync(path)
    old = beside(folder, "old")
    _drop(old, folder)
    if folder.exists():
        os.replace(folder, old)
    os.replace(partial, folder)
    sync(folder.parent)
    _drop(old, folder)


def recover(folder: Path) -> None:
    """Finish or undo a `publish` that was killed: after it, `folder` is whole (the older one, if
    need be) or absent."""
    old = beside(folder, "old")
    if not folder.exists() and old.exists():
        os.replace(old, folder)
    _drop(old, folder)
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
            os.replace(path, beside(path, "part"))  # gone at once, not file by file
            shutil.rmtree(beside(path, "part"))
        else:
            path.unlink()


class Lock:
    """A lock file that this process holds until `release`, or until it ends, however it ends; as a
    context until its block ends. what: it is for; passing: the file goes with its release."""

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


def free_bytes(folder: Path) -> int:
    """Return the free bytes of the disk that holds `folder` (or its nearest parent that exists)."""
    folder = Path(folder).absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def human(size: float) -> str:
    """Return a byte count for people: human(2_500_000) == '2.5 MB'."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} TB"


class NpyWriter:
    """A one-dimensional .npy file that grows by `append`; its length enters the header at `close`.

    numpy pads its header for a growing first axis, so that the header can be written again in
    place.
    """

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        self.dtype, self.count = np.dtype(dtype), 0
        self.file = open(path, "wb")
        self._header()

    def _header(self) -> None:
        self.file.seek(0)
        np.lib.format.write_array_header_1_0(
            self.file,
            {
                "descr": np.lib.format.dtype_to_descr(self.dtype),
                "fortran_order": False,
                "shape": (self.count,),
            },
        )

    def append(self, values: np.ndarray) -> None:
        values = np.ascontiguousarray(values, dtype=self.dtype)
        self.file.write(values.tobytes())
        self.count += len(values)

    def close(self) -> None:
        end = self.file.tell()
        self._header()
        assert end == self.file.tell() + self.count * self.dtype.itemsize, (
            end,
            self.file.tell(),
            self.count,
        )
        self.file.close()
