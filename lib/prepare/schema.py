"""Which column plays which part: the schemas that are known by the names of their columns, and the
--columns that a user writes for others."""

from collections.abc import Iterable

import pyarrow as pa

from lib import files
from lib.prepare import formats
from lib.prepare.places import Place

# name, then the part a column plays -> the names it is known by; the first schema whose columns are
# all there is taken
SCHEMAS = {
    "messages": {"messages": ("messages",)},
    "conversations": {"messages": ("conversations", "conversation")},
    "instruction/output": {
        "prompt": ("instruction",),
        "answer": ("output", "response", "completion", "answer"),
    },
    "prompt/completion": {
        "prompt": ("prompt",),
        "answer": ("completion", "response", "answer", "output"),
    },
    "question/answer": {"prompt": ("question", "query"), "answer": ("answer", "response")},
    "text": {"text": ("text",)},
}
# for --task classify
LABELLED = {
    "text/label": {
        "text": ("text", "sentence", "content"),
        "label": ("label", "labels", "class", "category"),
    }
}
# `input` is read beside a prompt only, `system` in every conversation
OPTIONAL = {"input": "prompt", "system": None}
KNOWN = (
    "messages; conversations; instruction[+input]+output; prompt+completion|response|answer;"
    " question+answer; text"
)
COLUMNS_HELP = (
    "[SOURCE:]prompt=COL,answer=COL[,input=COL][,system=COL], or messages=COL[,system=COL], or"
    " text=COL; to classify: text=COL,label=COL"
)


def parse_columns(
    text: str, need_answer: bool = True, labelled: bool = False
) -> tuple[str, dict[str, str]]:
    """Read one --columns: parse_columns("fin:prompt=q,answer=a") == ("fin", {"prompt": "q",
    "answer": "a"}); "" where no source is named.

    Raises ValueError, one line. Where no answer is needed (a teacher will write it), prompt=COL
    alone will do; labelled: text and label it is.
    """
    owner, colon, rest = text.partition(":")
    owner, rest = (owner.strip(), rest) if colon and "=" not in owner else ("", text)
    pairs = [part.partition("=")[::2] for part in rest.split(",")]
    columns = {part.strip(): column.strip() for part, column in pairs}
    allowed = (
        ({"prompt", "answer"} if need_answer else {"prompt"}, {"input", "system", "answer"}),
        ({"messages"}, {"system"}),
        ({"text"}, set()),
    )
    allowed = (({"text", "label"}, set()),) if labelled else allowed
    if (
        len(columns) != len(pairs)
        or not all(columns.values())
        or not any(need <= set(columns) <= need | may for need, may in allowed)
    ):
        raise ValueError(f"saw {text!r}, wanted {COLUMNS_HELP}")
    return owner, columns


def among(names: Iterable[str], there: Iterable[str]) -> str | None:
    """Return the first column that has one of the names: as it stands, else whatever its case and
    the blanks around it."""
    plain = {name.strip().casefold(): name for name in there}
    plain |= {name: name for name in there}
    return next((plain[name] for name in names if name in plain), None)


def guess(
    path: Place, kind: dict, need_answer: bool = True, labelled: bool = False
) -> tuple[str, dict[str, str]]:
    """Return the first schema whose columns are all among those of a file (`kind`: their types),
    and the column of each of its parts."""
    known = dict(LABELLED if labelled else SCHEMAS)
    if not need_answer and not labelled:
        for parts in SCHEMAS.values():
            if "prompt" in parts:
                known[f"{parts['prompt'][0]} only"] = {"prompt": parts["prompt"]}
    for schema, parts in sorted(known.items(), key=lambda item: item[0] == "text"):
        columns = {}
        for part, names in parts.items():
            columns[part] = among(names, kind)
        if None in columns.values():
            continue
        for part, beside in OPTIONAL.items() if schema != "text" else ():
            if beside in (None, *columns) and (part in kind or path.suffix in formats.JSON):
                columns[part] = part
        return schema, columns
    files.fail(
        f"{path} follows no schema known here",
        seen=f"columns {', '.join(kind)}",
        wanted="text and label" if labelled else f"one of: {KNOWN}",
        mend="--columns text=COL,label=COL" if labelled else f"--columns {COLUMNS_HELP}",
    )


def check_type(path: Place, part: str, column: str, kind) -> None:
    """Refuse a column whose declared (arrow) type cannot hold its part; JSON declares none and is
    checked row by row."""
    if kind is None or pa.types.is_null(kind):
        return
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    text = (
        pa.types.is_string(value)
        or pa.types.is_large_string(value)
        or pa.types.is_string_view(value)
    )
    text |= part == "label" and (pa.types.is_integer(value) or pa.types.is_boolean(value))
    listed = (
        part == "messages"
        and (pa.types.is_list(kind) or pa.types.is_large_list(kind))
        and pa.types.is_struct(kind.value_type)
    )
    if not text and not listed:
        wanted = {
            "messages": "a list of {role, content} or {from, value}",
            "label": "text, whole numbers or true and false",
        }.get(part, "text")
        files.fail(
            f"{path}: column {column} cannot be the {part}",
            seen=f"type {kind}",
            wanted=wanted,
            mend=f"--columns {COLUMNS_HELP}",
        )
