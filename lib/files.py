"""Files that are whole or absent: atomic writes, folders published by rename, growing .npy files,
hashes, one-line errors.

Contract: every write goes to a temporary name beside its target and is renamed; a reader sees the
old file or the new one, never a half. A folder is complete when its `meta.json` / `config.json`,
written last, exists.
"""

import hashlib
import importlib.util
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NoReturn

import numpy as np
from filelock import FileLock, Timeout

# inside a folder: what neither --fresh nor a new version of the folder deletes, for a teacher's
# answers cost money
NEVER_DELETED = "answers"


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
    # half a surrogate pair becomes \udc00, which is its name in JSON
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
    except (OSError, ValueError, RecursionError) as broken:
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
    partial.mkdir(parents=True)
    return partial


def remove_ours(folder: Path, marks: tuple[str, ...]) -> None:
    """Delete a folder that one of our scripts made (it holds one of `marks`, or nothing), all but
    what is NEVER_DELETED; refuse any other one."""
    if not folder.exists():
        return
    inside = [path for path in folder.iterdir() if path.name != NEVER_DELETED]
    if inside and not any((folder / mark).exists() for mark in marks):
        fail(
            f"--fresh would delete {folder}",
            seen="a folder that no script of ours made",
            wanted=f"one that holds {' or '.join(marks)}",
        )
    if (folder / ".lock").exists():
        lock(folder).release()  # refused while another process writes there
    if (folder / NEVER_DELETED).exists():
        old = beside(folder, "old")
        os.replace(folder, old)  # a kill in between is undone by `recover`
        folder.mkdir()
        _drop(old, folder)
    else:
        shutil.rmtree(folder)


def lock(folder: Path, wait: bool = False) -> FileLock:
    """Hold a folder for this process until it ends or calls `.release()`; a second process is
    refused, or waits. Keep the value that is returned."""
    holding = FileLock(folder / ".lock", timeout=-1 if wait else 0)
    try:
        holding.acquire()
    except Timeout:
        fail(
            f"{folder} is being written by another process",
            wanted="one process a folder",
            mend="wait for it, or choose another --out",
        )
    return holding


def locked(folder: Path) -> bool:
    """Return whether a process holds a folder by `lock`."""
    if not (folder / ".lock").exists():
        return False
    try:
        with FileLock(folder / ".lock", timeout=0):
            return False
    except Timeout:
        return True


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
