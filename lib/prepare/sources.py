"""Rows from data files, with the schema found from the names of the columns.

Contract: `name_and_where` tells a source's name from where it lies, `look` says how one of its
files is to be read, `rows` yields a conversation (a list of {"role", "content"}), a plain text or a
labelled one for every row of the file, in order, wherever the file is (lib/prepare/places.py, hub)
and whatever its format (lib/prepare/formats.py). A file that cannot be read, or a column of the
wrong type, ends the program with one line; a row that is merely useless (blank, an unknown role) is
yielded all the same, for the caller to count.
"""

import argparse
import codecs
import collections
import dataclasses
import os
import re
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lib import data, files
from lib.prepare import conversations, formats, hub, kinds, own, places, schema, split
from lib.prepare.places import Place

MOST_SHAPES = 1000  # sets of columns of JSON rows that are remembered, and names that are noted


@dataclass(frozen=True)
class File:
    """One file: the schema it follows, in words too, which column plays which part (prompt, ...),
    and its rows if the file says.

    names: of the labels, where the file's are numbers and it says what they mean (the ClassLabel of
    Hugging Face's data sets). found: columns that only later rows have are looked for too. ignored,
    roles: see schema.aside. unused: (kind, name) of what was met and is not used; passed: (role,
    key) of what a template may write or not; both grow as rows are read.
    """

    place: Place
    schema: str
    described: str
    columns: dict[str, str]
    count: int | None
    names: tuple[str, ...] = ()
    found: bool = False
    ignored: frozenset[str] = frozenset()
    roles: dict[str, str] = field(default_factory=dict)
    unused: dict[tuple[str, str], None] = field(default_factory=dict, compare=False)
    passed: dict[tuple[str, str], None] = field(default_factory=dict, compare=False)

    @property
    def is_text(self) -> bool:
        """Whether its rows are learnt as they stand, and not rendered."""
        return bool({"text", "rendered"} & {*self.columns})

    @property
    def exact(self) -> bool:
        """Whether what is null in it was written so (arrow's structs have nulls of their own)."""
        return self.place.suffix in formats.JSON


@dataclass(frozen=True)
class Source:
    """What one --source names: its name, where it lies (without secrets), and its files in
    order."""

    name: str
    where: str
    files: list[File]

    @property
    def commit(self) -> str | None:
        """Of a data set of the hub."""
        return self.files[0].place.revision

    @property
    def described(self) -> str:
        return "; ".join(dict.fromkeys(file.described for file in self.files))


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add --source and --columns."""
    parser.add_argument(
        "--source",
        nargs="+",
        action="extend",
        required=True,
        metavar="[NAME=]WHERE",
        help=(
            "a file, folder or glob, a hub id org/name[:split][@revision], or a URI (may be given"
            " again)"
        ),
    )
    parser.add_argument(
        "--encoding",
        metavar="NAME",
        help="how text files are written: gb18030, cp1252, ... (default: utf-8, or as found)",
    )
    parser.add_argument(
        "--columns",
        action="append",
        metavar="MAP",
        help=(
            f"{schema.COLUMNS_HELP}; may be given again for another SOURCE (default: found from"
            " the column names)"
        ),
    )


def check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse (exit code 2) sources of one name, and columns of no source. Sets args.wanted, (name,
    where) of each source with its secrets, and args.named, the columns by source name ("": of the
    others); args.source and args.columns become what is stored."""
    try:
        codecs.lookup(args.encoding or "utf-8")
    except LookupError:
        parser.error(f"--encoding is {args.encoding}, wanted one that Python knows")
    args.wanted = [name_and_where(text) for text in args.source]
    names = [name for name, _ in args.wanted]
    for name, count in collections.Counter(names).items():
        if count > 1:
            parser.error(
                f"--source: the name {name} is given {count} times, wanted a name of its own for"
                " each: --source NAME=WHERE"
            )
    try:
        maps = [
            schema.parse_columns(text, args.answers == "given", args.task == "classify")
            for text in args.columns or ()
        ]
    except ValueError as wrong:
        parser.error(f"--columns: {wrong}")
    args.named = dict(maps)
    if len(args.named) < len(maps) or not set(args.named) <= {"", *names}:
        told = ", ".join(name or "all sources" for name, _ in maps)
        parser.error(
            f"--columns: saw maps for {told}, wanted at most one for each of {', '.join(names)},"
            " and one for all others"
        )
    if args.columns and len(args.columns) == 1:
        args.columns = args.columns[0]
    args.source = [places.redact(text) for text in args.source]


def name_and_where(text: str) -> tuple[str, str]:
    """Tell NAME from WHERE in a --source: "fin=a/b.jsonl.gz" is ("fin", "a/b.jsonl.gz").

    Without NAME= it is the last part of WHERE that says something, suffixes and globs left out:
    "b", and "a" for a/*.parquet. What exists as it stands is a WHERE, though it has a "=" in it.
    """
    found = re.fullmatch(r"([\w.+-]+)=(.+)", text, re.DOTALL)
    if found and not os.path.exists(text) and not places.matches(text):
        return found[1], found[2]
    if hub.is_id(text):
        return hub.ID.fullmatch(text)["repo"].split("/")[1], text
    path = Path(text).absolute().as_posix()
    if places.is_uri(text):
        path = text.partition("?")[0].partition("://")[2]
    for part in reversed(path.split("/")):
        part = re.sub(r"\.(gz|bz2|zst|xz)$", "", part)
        if (end := places.suffix(part)) in places.SUFFIXES:
            part = part.removesuffix(end)
        if name := re.sub(r"[^\w.+-]+", "-", part.split("@")[-1]).strip("-."):
            return name, text
    return "data", text


def locate(where: str) -> list[Place]:
    """Return the data files that `where` names (a file, a folder, a glob, a hub id, a URI), in
    order; one line where there are none."""
    if places.is_uri(where):
        return places.find_by_uri(where)
    return hub.download(where) if hub.is_id(where) else places.find_by_path(where)


def open_all(args: argparse.Namespace) -> list[Source]:
    """Find and look at the files of every --source; one line where two sources share a file."""
    most = np.iinfo(data.ROW["source"]).max
    if len(args.wanted) > most:
        files.fail("there are too many sources", seen=len(args.wanted), wanted=f"at most {most}")
    result, owners = [], {}
    for name, where in args.wanted:
        found = locate(where)
        for place in found:
            if (other := owners.setdefault(place.key, name)) != name:
                files.fail(
                    f"{place} is reached by two sources",
                    seen=f"{other} and {name}",
                    wanted="every file in one source",
                )
        columns, looked, empty = args.named.get(name, args.named.get("")), [], []
        for place in found:
            try:
                place = kinds.recognised(place, args.encoding)
                looked.append(
                    look(place, columns, args.answers == "given", args.task == "classify")
                )
            except formats.NoRow as one:
                empty.append(one)
        if not looked:
            raise empty[0]
        if empty:
            print(f"prepare left out of {name}: {len(empty)} without a row ({empty[0].place})")
        result.append(Source(name, places.redact(where), looked))
    return result


def look(
    path: Place,
    columns: dict[str, str] | None = None,
    need_answer: bool = True,
    labelled: bool = False,
) -> File:
    """Open a file far enough to know its columns and find its schema, or check the `columns` that
    the user named.

    Without need_answer, prompts alone will do: their conversations end in a blank answer. labelled:
    rows of a text and its label are wanted.
    """
    found = formats.columns_of(path)
    name = "--columns"
    columns, ignored, roles = schema.aside(columns or {})
    guessed = not {"prompt", "messages", "text", "rendered"} & {*columns}
    if not labelled and (looked := look_at_own(path, found, guessed, need_answer)):
        return looked
    if guessed and not labelled and {*schema.TREE[:5]} <= {*found.types}:
        name, columns = "trees", {"messages": "messages"}
        found.types["messages"] = None
    elif guessed:
        name, known = schema.guess(path, found.types, need_answer, labelled)
        columns = known | columns
    columns |= schema.find_beside(columns, found.types, ignored, guessed)
    for part, column in columns.items():
        # the first object of a JSON file need not show the optional columns that later ones have
        later = part in schema.PARTS and path.suffix in formats.JSON
        if column not in found.types and not later:
            files.fail(
                f"{path} has no column {column}",
                seen=", ".join(found.types),
                mend=f"--columns {schema.COLUMNS_HELP}",
            )
        chosen = bool({"choices", "A"} & {*columns})
        schema.check_type(path, part, column, found.types.get(column), chosen)
    names = (found.features.get(columns.get("label")) or {}).get("names") or ()
    there = {part: column for part, column in columns.items() if column in found.types}
    described = f"{name} ({schema.in_words(there)})"
    if name == "trees":
        described = "trees of messages (of each the replies that were ranked first)"
    looked = File(
        *(path, name, described, columns, found.count, tuple(names), guessed, ignored, roles)
    )
    if name == "trees" or not looked.exact:
        used = schema.TREE if name == "trees" else ()
        note_unused(looked, [column for column in found.types if column not in used])
    say_rendered(looked)
    return looked


def look_at_own(path: Place, found, guessed: bool, need_answer: bool) -> File | None:
    """Return the File of answers that the student wrote (lib/prepare/own.py), None of any other.
    found: its columns; guessed: no flag says what they are."""
    if guessed and own.is_torn(found.types):
        files.fail(
            f"{path} holds answers of the student that are not whole yet",
            ", ".join(found.types),
            "answers as prepare_data.py --answers student leaves them at its end",
            "the command that writes them: it continues",
        )
    if not own.is_file(found.types):
        return None
    if not guessed:
        files.fail(
            f"--columns would have {path} read as given answers",
            "the student's own, their tokens as they were sampled",
            "a map for the other sources alone",
            "--columns SOURCE:MAP",
        )
    kind, told = "sampled", "the student's own answers, their tokens as they were sampled"
    if not need_answer:
        kind, told = "asked again", "the prompts of the student's own answers"
    named = {name: name for name in own.OF_FILES}
    return File(path, kind, told, named, found.count)


def say_rendered(file: File) -> None:
    """Say it where the first row holds what a chat template writes, and would be learnt as it
    stands, or rendered once more."""
    columns = [file.columns[part] for part in ("text", "prompt", "answer") if part in file.columns]
    try:
        row = next(formats.records(file.place, columns), {}) if columns else {}
    except places.UNREADABLE:
        return  # which is told where the rows are read
    for name in columns if "label" not in file.columns else ():
        if found := schema.MARKUP.search(str(row.get(name))):
            part = "messages" if found[0][0] == "#" else "rendered"
            told = f"is learnt whole: --columns {part}={name} learns its answers alone"
            if "text" not in file.columns:
                told = "is rendered once more: it should be the plain words"
            print(
                f"prepare warning: {file.place}: column {name} holds conversations that are"
                f" rendered already ({found[0]}), and {told}",
                flush=True,
            )


def note_unused(file: File, names: Iterable[str], where: str = "") -> None:
    """Note which of these columns are not used; end the program where one of them carries what a
    conversation cannot be without."""
    used = {*file.columns.values()}
    for name in names:
        if name not in used and ("columns", name) not in file.unused:
            if schema.carries(name, file.columns, file.ignored):
                if file.exact or formats.says(file.place, name):
                    schema.refuse(f"{file.place}{where}", name)
            if len(file.unused) < MOST_SHAPES:
                file.unused["columns", name] = None


def rows(source: File, system: str | None = None) -> Iterator[list[dict] | str | tuple[str, str]]:
    """Yield every row of a source as a conversation, a plain text, or a (text, label) where it has
    labels (one left blank is "").

    `system` opens the conversations that have no system message.
    """
    number = 0
    records = formats.records(source.place, list(dict.fromkeys(source.columns.values())))
    if source.schema == "trees":
        records = conversations.threads(formats.records(source.place, list(schema.TREE)))
    known: dict[tuple[str, ...], File] = {}  # by the columns that a JSON row has
    try:
        for number, record in enumerate(records, 1):
            if source.schema in ("sampled", "asked again"):
                read = own.of_file if source.schema == "sampled" else own.asked_of_file
                yield read(record)
                continue
            file = source
            if source.exact:
                there = tuple(name for name, value in record.items() if said(value))
                if there not in known:
                    known = known if len(known) < MOST_SHAPES else {}
                    known[there] = of_row(source, there, number)
                file = known[there]
            parts = {part: record.get(column) for part, column in file.columns.items()}
            yield _row(file, parts, number, system)
    except places.UNREADABLE as broken:
        formats.cannot_be_read(source.place, f" past row {number}", broken)
    if not number:
        formats.no_row(source.place)


def of_row(source: File, there: tuple[str, ...], number: int) -> File:
    """Return a JSON file as a row with these columns shows it."""
    columns = {}
    for part, name in source.columns.items():
        if part not in schema.PARTS or name in there:
            columns[part] = name
    columns |= schema.find_beside(columns, there, source.ignored, source.found)
    file = dataclasses.replace(source, columns=columns)
    note_unused(file, there, f", row {number}")
    return file


def all_rows(
    inputs: list[Source],
    system: str | None = None,
    full: Container[int] = (),
    done: Mapping[tuple[int, int], int] | None = None,
) -> Iterator[tuple]:
    """Yield ((source, file), row) of all rows of all sources, in order; both are numbers. full:
    sources of which no more are wanted; done: how many rows of each file are left out."""
    left = collections.Counter(done)
    for number, source in enumerate(inputs):
        for f, file in enumerate(source.files):
            for row in rows(file, system):
                if left[number, f]:
                    left[number, f] -= 1
                elif number in full:
                    break
                else:
                    yield (number, f), row


def passes(
    inputs: list[Source],
    args: argparse.Namespace,
    limit: int,
    progress: split.Progress,
    kept: collections.Counter,
) -> Iterator[Iterator[tuple]]:
    """Yield the rows of all sources (all_rows), and where some ended before their share of a limit,
    what the others have still, until there are so many. progress.quotas: how many rows of each
    source are wanted, -1 all of it; kept: how many there are, while the caller goes on."""
    shares = shares_of(inputs, args)
    if not progress.quotas:
        progress.quotas = divided(limit, shares) if limit else [-1] * len(inputs)
        progress.full |= {number for number, quota in enumerate(progress.quotas) if not quota}
        if limit and len(inputs) > 1:
            told = (f"{source.name} {n:,}" for source, n in zip(inputs, progress.quotas))
            print(f"prepare limit: {', '.join(told)}", flush=True)
    while True:
        yield all_rows(inputs, args.system, progress.full, progress.read)
        progress.ended |= {*range(len(inputs))} - progress.full
        left = limit - kept.total()
        going = [share * (n not in progress.ended) for n, share in enumerate(shares)]
        if left <= 0 or not any(going):
            return
        more = divided(left, going)
        progress.quotas = [kept[number] + n for number, n in enumerate(more)]
        progress.full = {number for number, n in enumerate(more) if not n}
        told = (f"{source.name} {n:,}" for source, n in zip(inputs, more) if n)
        print(f"prepare limit: other sources ended before their share: {', '.join(told)} more")


def shares_of(inputs: list[Source], args: argparse.Namespace) -> list[float]:
    """Return what part of --limit each source is to have: by --mix, else by their rows where every
    file says how many it has, else the same."""
    shares = [args.weights[source.name] for source in inputs]
    if None not in shares:
        return shares
    counts = [[file.count for file in source.files] for source in inputs]
    known = not any(None in each for each in counts)
    return [float(sum(each)) if known else 1.0 for each in counts]


def divided(total: int, shares: list[float]) -> list[int]:
    """Divide a number in these shares, whole: divided(5, [1, 1]) == [2, 3]."""
    ends = np.rint(np.cumsum(shares) / sum(shares) * total).astype(int)
    return np.diff(ends, prepend=0).tolist()


def said(value: object) -> bool:
    return value is not None and value != "" and value != [] and value != {}


def _row(
    source: File, parts: dict, number: int, system: str | None
) -> list[dict] | str | tuple[str, str]:
    parts = {part: value for part, value in parts.items() if said(value)}
    row = conversations.SourceRow(source, parts, number)
    if "label" in source.columns:
        label = parts.get("label")
        if not isinstance(label, str | int | None):  # a bool is an int
            files.fail(
                f"{source.place}, row {number}: column {source.columns['label']} is no label",
                seen=repr(label)[:60],
                wanted="text, a whole number, or true and false: one class a row",
            )
        if source.names and isinstance(label, int):  # -1: held back, as in GLUE's test files
            label = source.names[label] if 0 <= label < len(source.names) else ""
        return row.text("text"), "" if label is None else str(label).strip()
    return row.plain_text() if source.is_text else row.conversation(system)
