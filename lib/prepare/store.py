"""The answers that a teacher wrote: each kept exactly once, named by (prompt key, generation),
whatever is killed when.

Answers made with other settings lie in another folder, and --fresh of prepare_data.py deletes none.
OUT/answers/HASH/ (HASH of the settings, all that an answer depends on) holds
- settings.json   the teacher, its weights' hash or (of the first run) its server's host, the
                  sampling settings, the seed; sealed (lib/files.py)
- checksums.json  of all parts
- cost.json       written_s, the seconds it took to write them
- part-NNNNN.parquet   `SCHEMA`, 1,000 rows each as they came; an ordinary data set
- journal.jsonl   the newest answers, one a line with its CRC-32, until they are a part; its last
                  line may be torn by a kill, and is then ignored, as a damaged one is
"""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from lib import files

PART_ROWS = 1000
COST = "cost.json"
ASK_AGAIN = f"move it away; its {PART_ROWS} are asked again"
JOURNAL_LINE = {"key": str, "generation": range(1 << 31), "prompt": list, "answer": str}
MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])
# more: as JSON what a message says beside its text, in parts that have such messages
MESSAGE_AND_MORE = pa.struct([*MESSAGE, ("more", pa.string())])
# an answer, for those it is passed on to
ABOUT = pa.schema(
    [
        ("reference", pa.string()),
        ("generation", pa.int32()),
        ("finish_reason", pa.string()),
        ("prompt_tokens", pa.int32()),
        ("answer_tokens", pa.int32()),
        ("teacher", pa.string()),
        ("sampling", pa.string()),
    ]
)
SCHEMA = pa.schema(
    [
        ("source", pa.string()),
        ("prompt", pa.list_(MESSAGE)),
        ("answer", pa.string()),
        *ABOUT,
        ("key", pa.string()),
    ]
)


def flattened(messages: list[dict]) -> list[dict]:
    """Return messages as columns of texts."""
    found = []
    for message in messages:
        own = {"role": message["role"], "content": message["content"]}
        if more := {n: message[n] for n in message if n not in (*own, "written")}:
            own["more"] = json.dumps(more, ensure_ascii=False)
        found.append(own)
    return found


def unflattened(messages: list[dict]) -> list[dict]:
    """Return messages as `flattened` had them."""
    found = []
    for message in messages:
        more = message.pop("more", None)
        found.append(message | json.loads(more) if more else message)
    return found


WITH_MORE = SCHEMA.set(1, pa.field("prompt", pa.list_(MESSAGE_AND_MORE)))
# what the student sampled (lib/prepare/own.py): the ids of the prompt and of the answer, with the
# token that ended it, if one did; the sum of their log-probabilities, nats; of what weights, and
# whose ids these are
SAMPLED = (
    ("prompt_ids", pa.list_(pa.uint32())),
    ("answer_ids", pa.list_(pa.uint32())),
    ("logp", pa.float64()),
    ("weights", pa.string()),
    ("vocabulary", pa.string()),
)


def part_schema(own: bool, more: bool = True) -> pa.Schema:
    """Return the columns of a part, of the student's own text or not."""
    every = WITH_MORE if more else SCHEMA
    return pa.schema([*every, *(pa.field(*one) for one in SAMPLED)]) if own else every


def folder_name(made: dict) -> str:
    """Return the name of the settings' folder. Where the teacher lies or is served does not matter:
    its weights, or its name there, do."""
    where = ("teacher", "student") if "weights" in made else ("host",)
    told = {name: value for name, value in made.items() if name not in where}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]


def read_part(path: Path, columns: list[str] | None = None, own: bool = False) -> pa.Table:
    """Return a part; one that is none is a one-line error."""
    every = part_schema(own)
    try:
        return pq.read_table(path, columns=columns or every.names, schema=every)
    except (pa.ArrowException, OSError, KeyError) as broken:
        files.fail(
            f"{path} cannot be read", broken, "answers as this program wrote them", ASK_AGAIN
        )


def read_line(line: bytes, summed: bool) -> dict | None:
    """Return a line of the journal, None where it is damaged. summed: lines have checksums, which
    older journals have not."""
    try:
        row = json.loads(line.decode("utf-8"))  # of bytes it would take UTF-16 as well
    except (ValueError, RecursionError):
        return None
    if files.misfit(row, JOURNAL_LINE):
        return None
    if summed and not files.is_whole(line):
        return None
    row.pop("crc32", None)
    return row


class Store:
    """The answers made with one set of settings; held by one process (files.lock)."""

    def __init__(self, folder: Path, made: dict) -> None:
        self.folder, self.made = folder / folder_name(made), made
        self.own = "student" in made
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = files.lock(folder)
        if (settings := self.folder / "settings.json").exists():
            files.read_json(settings, f"rm {settings}: it is written again")
        else:
            files.write_json(settings, made | {"checksums": {}})
            others = [path.parent for path in sorted(folder.glob("*/settings.json"))]
            others = [str(other) for other in others if other != self.folder]
            if others:
                print(
                    f"answers: those of other settings stay in {', '.join(others)}; these settings"
                    f" begin {self.folder}",
                    flush=True,
                )
        for path in self.folder.glob("*.part"):
            path.unlink()
        self.journal = self.folder / "journal.jsonl"
        self.have: set[tuple[str, int]] = set()
        self.parts = sorted(self.folder.glob("part-*.parquet"))
        self.sums = self._check_parts()
        for path in self.parts:
            table = read_part(path, ["key", "generation"])
            self.have.update(zip(table["key"].to_pylist(), table["generation"].to_pylist()))
        self.fresh: list[dict] = []  # what is in the journal and in no part
        self._read_journal()
        self.file = open(self.journal, "ab")

    def _check_parts(self) -> dict:
        """Return the parts' checksums, once all were checked; those without, of an older state or
        after a kill, get theirs."""
        path, known = self.folder / "checksums.json", {}
        if path.exists():
            mend = f"rm {path}: it is written again"
            known = files.read_json(path, mend, {"checksums": files.SUMS})["checksums"]
        for part in self.parts:
            if part.name in known and (seen := files.damage(part, known[part.name])):
                files.fail(
                    f"{part} is damaged", seen, "answers as this program wrote them", ASK_AGAIN
                )
        there = {part.name: known.get(part.name) or files.sums(part) for part in self.parts}
        if there != known:
            files.write_json(path, {"checksums": there})
        return there

    def _read_journal(self) -> None:
        """Take the whole lines of the journal, and cut off what a kill left of the last one; what
        is damaged among them is asked again."""
        lines = self.journal.read_bytes().split(b"\n") if self.journal.exists() else [b""]
        ours = any(files.LINE_SUM in line for line in lines)
        whole = [line for line in lines[:-1] if (row := read_line(line, ours)) and self._take(row)]
        if lost := len(lines) - len(whole) - (not lines[-1]):
            said = f"answers: {lost} lines of {self.journal} are torn or damaged: asked again"
            print(said, flush=True)
            files.write_text(self.journal, b"".join(line + b"\n" for line in whole).decode())

    def _take(self, row: dict) -> bool:
        """Keep a line of the journal, unless a part has it: the kill came between the two."""
        if (name := (row["key"], row["generation"])) not in self.have:
            self.have.add(name)
            self.fresh.append(row)
        return True

    def add(self, row: dict) -> None:
        """Keep an answer: once this returns, no kill loses it."""
        name = row["key"], row["generation"]
        assert name not in self.have, name
        # half a surrogate pair becomes "?"
        line = json.dumps(row, ensure_ascii=False).encode("utf-8", "replace")
        self.file.write(files.with_sum(line) + b"\n")
        self.file.flush()
        self.have.add(name)
        self.fresh.append(json.loads(line))
        if len(self.fresh) >= PART_ROWS:
            self.compact()

    def compact(self) -> None:
        """Turn the journal into a part."""
        if self.fresh:
            self.parts.append(path := self.folder / f"part-{len(self.parts):05d}.parquet")
            if path.exists():  # parts that were moved away leave gaps
                path = self.parts[-1] = (
                    self.folder
                    / f"part-{max(int(other.stem[5:]) for other in self.parts) + 1:05d}.parquet"
                )
            made = self.made
            who = made.get("student") or made["teacher"]
            told = f"{who}@{made.get('host') or made['weights'][:12]}"
            same = {"teacher": told, "sampling": json.dumps(made["sampling"], sort_keys=True)}
            same |= {name: made.get(name) for name in ("weights", "vocabulary")} if self.own else {}
            partial = path.with_name(path.name + ".part")
            rows = [row | same | {"prompt": flattened(row["prompt"])} for row in self.fresh]
            more = any("more" in message for row in rows for message in row["prompt"])
            table = pa.Table.from_pylist(rows, part_schema(self.own, more))
            pq.write_table(table, partial, compression="zstd")
            files.sync(partial)
            os.replace(partial, path)
            files.sync(self.folder)
            self.sums[path.name] = files.sums(path)
            files.write_json(self.folder / "checksums.json", {"checksums": self.sums})
        self.fresh = []
        os.ftruncate(self.file.fileno(), 0)

    def spent(self, seconds: float) -> None:
        """Add to the seconds that answers were waited for (a process that was killed adds none)."""
        before = files.read_json(path) if (path := self.folder / COST).exists() else {}
        written = round(before.get("written_s", 0) + seconds, 1)
        files.write_json(path, {"written_s": written, "checksums": {}})

    def close(self) -> None:
        self.compact()
        self.file.close()
        self.journal.unlink()

    def rows(self) -> Iterator[dict]:
        """Yield all answers, a part at a time. (The newest are among them once the store is
        closed.)"""
        for path in self.parts:
            for row in read_part(path, own=self.own).to_pylist():
                yield row | {"prompt": unflattened(row["prompt"])}
