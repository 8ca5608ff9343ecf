"""Damage to files, each kind by one function: what a disk, a copy, another program or a hand may do
to them. Each changes one file in place, by `rng` (np.random.default_rng(seed)), and returns what it
did, in words for a report.

    flip(path, rng)                one bit, one byte, or a block of zeros
    mutate_json(path, rng)         a value of JSON or JSON lines that is none of ours, or no JSON
    mutate_npy(path, rng)          another dtype, byte order, shape; cut, empty, a zip, other values
    mutate_safetensors(path, rng)  a header that lies, or none; tensors gone or of another shape
"""

import json
import struct
from pathlib import Path

import numpy as np

HOSTILE = (
    None,
    True,
    -1,
    0,
    1.5,
    float("nan"),
    float("inf"),
    1e308,
    2**70,
    10**400,
    "",
    "x",
    "\x00",
    "\ud800",
    "../../..",
    [],
    {},
    [[[[]]]],
    [None],
    {"": None},
    list(range(100)),
)


def damage(path: Path, rng: np.random.Generator) -> str:
    """Change a file by what its ending says, or else by a flip."""
    kinds = {
        ".json": mutate_json,
        ".jsonl": mutate_json,
        ".npy": mutate_npy,
        ".safetensors": mutate_safetensors,
    }
    return kinds.get(Path(path).suffix, flip)(path, rng)


def flip(path: Path, rng: np.random.Generator) -> str:
    """Change one bit, one byte, or up to 4,096 bytes to zeros (what a power cut leaves): at least
    one byte is another one afterwards. An empty file gains a byte."""
    content = bytearray(Path(path).read_bytes())
    if not content:
        Path(path).write_bytes(b"\0")
        return "a byte where there was none"
    at, kind = int(rng.integers(len(content))), int(rng.integers(3))
    if kind == 2 and any(content[at : at + 4096]):
        size = min(4096, len(content) - at)
        content[at : at + size] = bytes(size)
        said = f"zeros from byte {at} to {at + size}"
    else:
        mask = 1 << int(rng.integers(8)) if kind == 0 else int(rng.integers(1, 256))
        content[at] ^= mask
        said = f"byte {at} ^ {mask:#04x}"
    Path(path).write_bytes(content)
    return f"{said} of {len(content)}"


def places(value: object, here: tuple = ()) -> list[tuple]:
    """Return the way to every value inside a JSON value, itself included."""
    found = [here]
    inside = value.items() if isinstance(value, dict) else ()
    inside = enumerate(value) if isinstance(value, list) else inside
    for name, one in list(inside)[:200]:
        found += places(one, (*here, name))
    return found


def changed(value: object, way: tuple, rng: np.random.Generator) -> tuple[object, str]:
    """Return a JSON value with another one at a place, or without it; and what was done."""
    if not way:
        other = HOSTILE[rng.integers(len(HOSTILE))]
        return other, f"all of it {str(other)[:20]!r}"
    owner = value
    for name in way[:-1]:
        owner = owner[name]
    where = ".".join(map(str, way))
    kind = int(rng.integers(6))
    if kind == 0:
        del owner[way[-1]]
        return value, f"{where} is gone"
    if kind == 1:
        owner[way[-1]] = [owner[way[-1]]]
        return value, f"{where} in a list"
    if kind == 2 and isinstance(owner, dict):
        owner[f"{way[-1]}x"] = owner.pop(way[-1])
        return value, f"{where} under another name"
    others = [other for other in HOSTILE if repr(other) != repr(owner[way[-1]])]
    owner[way[-1]] = others[rng.integers(len(others))]
    return value, f"{where} is {str(owner[way[-1]])[:20]!r}"


def mutate_json(path: Path, rng: np.random.Generator) -> str:
    """Change one value of a JSON file (of .jsonl, of one line) into what no program of ours wrote:
    missing, null, of another type, huge, NaN; or the file into no JSON: cut, empty, not UTF-8,
    nested 100,000 deep, a number of 5,000 digits."""
    path = Path(path)
    content = path.read_bytes()
    cut = content[: int(rng.integers(len(content) + 1))]
    broken = {
        "cut": cut,
        "empty": b"",
        "not UTF-8": content + b"\xff\xfe",
        "UTF-16": b"\xff\xfe" + content.decode("utf-8", "replace").encode("utf-16-le"),
        "deep": b"[" * 100_000 + b"]" * 100_000,
        "a long number": b"1" * 5000,
        "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\nsize 1\n",
        "NUL bytes": bytes(len(content)),
    }
    if rng.random() < 0.2:
        name = list(broken)[rng.integers(len(broken))]
        path.write_bytes(broken[name])
        return name
    lines = content.decode().splitlines() if path.suffix == ".jsonl" else [content.decode()]
    number = int(rng.integers(len(lines))) if lines else 0
    value = json.loads(lines[number]) if lines else {}
    ways = places(value)
    value, said = changed(value, ways[rng.integers(len(ways))], rng)
    lines[number : number + 1] = [json.dumps(value)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return said


def mutate_npy(path: Path, rng: np.random.Generator) -> str:
    """Change a .npy file into one of another kind, or into none."""
    path = Path(path)
    content, array = path.read_bytes(), np.atleast_1d(np.load(path))
    plain = array.dtype.names is None
    fields = [(name, array.dtype[name]) for name in array.dtype.names or ()]
    wide = [(name, "<i8", kind.shape) if kind.shape else (name, "<i8") for name, kind in fields]
    made = {
        "float64": array.astype(np.float64) if plain else array.astype(wide),
        "big-endian": array.astype(array.dtype.newbyteorder(">")),
        "one axis more": array[:, None],
        "no axis": array[0].copy().reshape(()) if len(array) else np.array(0),
        "half of it": array[: len(array) // 2],
        "twice": np.concatenate([array, array]),
        "none of it": array[:0],
        "int8": np.zeros(len(array), np.int8),
        "text": np.full(len(array), "x"),
        "Fortran's order": np.asfortranarray(np.zeros((max(2, len(array)), 2), np.uint32)),
        "second half zeros": np.concatenate(
            [array[: len(array) // 2], np.zeros_like(array[len(array) // 2 :])]
        ),
        "all ones": np.frombuffer(b"\xff" * array.nbytes, array.dtype) if array.nbytes else array,
    }
    if not plain:
        made["a field less"] = array[[name for name, _ in fields[:-1]]].copy()
        made["fields called otherwise"] = array.astype(
            [
                (f"{name}x", *kind.subdtype) if kind.subdtype else (f"{name}x", kind)
                for name, kind in fields
            ]
        )
    header = content.find(b"\n") + 1
    broken = {
        "cut": content[: int(rng.integers(len(content)))],
        "empty": b"",
        "a header alone": content[:header],
        "begins with PK": b"PK\x03\x04" + content[4:],
        "begins like a pickle": b"\x80\x04" + content[2:],
        "a header that lies": content[:header].replace(b"(", b"(9", 1) + content[header:],
        "a header that is no dict": content[:10] + b"x" * (header - 10) + content[header:],
        "a header of 4 GB": b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + content[10:],
        "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\nsize 1\n",
        "bytes after its end": content + b"\0" * 64,
    }
    names = [*made, *broken]
    name = names[rng.integers(len(names))]
    if name in made:
        with open(path, "wb") as target:
            np.save(target, made[name], allow_pickle=False)
    else:
        path.write_bytes(broken[name])
    # a mask has no byte order, and half of nothing is nothing
    return name if path.read_bytes() != content else flip(path, rng)


def mutate_safetensors(path: Path, rng: np.random.Generator) -> str:
    """Change the header of a .safetensors file, or the file into none."""
    path = Path(path)
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    head, body = json.loads(content[8 : 8 + size]), content[8 + size :]
    names = [name for name in head if name != "__metadata__"]
    name = names[rng.integers(len(names))]
    one = head[name]

    def with_head(changed: object) -> bytes:
        raw = json.dumps(changed).encode()
        return struct.pack("<Q", len(raw)) + raw + body

    def but(**more) -> bytes:
        return with_head(head | {name: one | more})

    others = {other: value for other, value in head.items() if other != name}
    first, last = one["data_offsets"]
    made = {
        "cut": content[: int(rng.integers(len(content)))],
        "empty": b"",
        "a header of 2^60 bytes": struct.pack("<Q", 1 << 60) + content[8:],
        "a header that is no JSON": content[:8] + b"x" * size + body,
        "a header that is a list": with_head([head]),
        "no tensor": struct.pack("<Q", 2) + b"{}",
        f"{name} is gone": with_head(others),
        f"{name} is called otherwise": with_head(others | {f"{name}x": one}),
        f"{name} of another dtype": but(dtype="I8"),
        f"{name} of an unknown dtype": but(dtype="X99"),
        f"{name} of another shape": but(shape=[*one["shape"], 1]),
        f"{name} of a huge shape": but(shape=[2**62, 4]),
        f"{name} of a negative shape": but(shape=[-1]),
        f"{name} outside the file": but(data_offsets=[first, last + (1 << 40)]),
        f"{name} turned round": but(data_offsets=[last, first]),
        f"{name} without offsets": with_head(head | {name: {"dtype": one["dtype"]}}),
        f"{name} is null": with_head(head | {name: None}),
        "no metadata": with_head({other: head[other] for other in names}),
        "metadata of numbers": with_head(head | {"__metadata__": {"about": 1}}),
        "metadata that is no JSON": with_head(head | {"__metadata__": {"about": "{"}}),
        "a pickle": b"PK\x03\x04" + content[4:],
        "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\nsize 1\n",
    }
    kind = list(made)[rng.integers(len(made))]
    path.write_bytes(made[kind])
    return kind
