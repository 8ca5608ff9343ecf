"""Prompts, and what is accepted as their answers, from one file of any kind that is read here:
chat.py hands `rows_asked` to lib/measure/prompts.py.

Contract: a row is turned into messages as it would be for training (lib/prepare/conversations.py),
by the names that lib/prepare/schema.py knows. Its references: the field "reference" (or
"references"), else its answer, which may be a list of those that are accepted, else the turn of an
assistant that ends it.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from lib import files
from lib.prepare import conversations, formats, kinds, places, schema, sources


def rows_asked(path: Path) -> Iterator[tuple[dict, list[dict]]]:
    """Yield of each row of a file its fields and its messages up to the turn to answer. Of the
    fields "messages" are these, unless "prompt" alone says them, and "reference" is a text or a
    list of texts; the others are as they were. The first row that cannot be asked ends the
    program."""
    kind = None if places.suffix(path.name) in places.SUFFIXES else ".jsonl"
    place = kinds.recognised(places.Place(str(path), places.LOCAL, str(path), kind=kind))
    known: dict[tuple[str, ...], sources.File] = {}
    number, names = 0, list(formats.columns_of(place).types)
    try:
        for number, record in enumerate(formats.records(place, names), 1):
            there = tuple(name for name, value in record.items() if value is not None)
            try:
                known[there] = known.get(there) or file_of(place, there)
                yield asked_row(known[there], record, number)
            except SystemExit as refused:  # in the words of prepare_data.py, but for its flags
                said = str(refused).partition("; mend it with")[0].replace(f"{place}", "it")
                files.fail(
                    f"{place} row {number}: {re.sub('^error: (it, row [0-9]+: )?', '', said)}"
                )
    except places.UNREADABLE as broken:
        formats.cannot_be_read(place, f" past row {number}", broken)


def file_of(place: places.Place, there: tuple[str, ...]) -> sources.File:
    """Return a file as a row with these columns shows it."""
    _, columns = schema.guess(place, dict.fromkeys(there), need_answer=False)
    columns |= schema.find_beside(columns, there, frozenset(), True)
    for name in there:
        if name not in columns.values() and name in schema.PICTURES:
            files.fail(f"{name} would not be asked", wanted="prompts of text alone")
    return sources.File(place, "", "", columns, None)


def asked_row(file: sources.File, record: dict, number: int) -> tuple[dict, list[dict]]:
    """Return a row's fields and messages (see `rows_asked`)."""
    fields, columns = dict(record), file.columns
    parts = {part: record[name] for part, name in columns.items() if sources.said(record[name])}
    given = fields.get("reference", fields.pop("references", None))
    several = accepted(file, given if given is not None else parts.get("answer"))
    if given is None and several:
        parts["answer"] = several[0]
    row = conversations.SourceRow(file, parts, number)
    if "text" in columns:
        messages = [{"role": "user", "content": row.text("text")}]
    else:
        messages = row.conversation(None)
    if messages and messages[-1]["role"] == "assistant":
        *messages, last = messages
        if given is None:
            given = last["content"]
            several = several if several and len(several) > 1 else None
            fields.pop(columns.get("answer", columns.get("reply")), None)
        elif "messages" in columns:
            files.fail("messages that end with an answer, beside a reference", wanted="one of them")
    if columns.get("messages") != "messages":
        fields.pop(columns.get("messages"), None)
    if messages != [{"role": "user", "content": fields.get("prompt")}]:
        fields["messages"] = messages
    if given:
        fields["reference"] = several if several and len(several) > 1 else (several or [given])[0]
    return fields, messages


def accepted(file: sources.File, value: object) -> list[str] | None:
    """Return the texts of a reference, or of a list of accepted ones; None where it is no such
    thing. accepted(file, {"text": ["Rome", "roma"]}) == ["Rome", "roma"], as SQuAD has it."""
    if file.place.suffix in formats.SEPARATED:
        value = conversations.parsed(value)
    value = value.get("text") if isinstance(value, dict) else value
    items = value if isinstance(value, list) else [value]
    items = [one.get("text") if isinstance(one, dict) else one for one in items]
    texts = [one if isinstance(one, str) else json.dumps(one) for one in items if one is not None]
    plain = all(isinstance(one, str | int | float) for one in items if one is not None)
    return texts if texts and plain else None
