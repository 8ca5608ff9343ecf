"""Which column plays which part: the schemas that are known by the names of their columns, what
else may stand beside them, and the --columns that a user writes for others."""

import re
import string
from collections.abc import Iterable
from typing import NoReturn

import pyarrow as pa

from lib import files
from lib.prepare.places import Place

# name, then the part a column plays -> the names it is known by; the first schema whose columns are
# all there is taken
SCHEMAS = {
    "messages": {"messages": ("messages",)},
    "conversations": {"messages": ("conversations", "conversation", "chat")},
    "instruction/output": {
        "prompt": ("instruction",),
        "answer": ("output", "response", "completion", "answer"),
    },
    "prompt/completion": {
        "prompt": ("prompt",),
        "answer": ("completion", "response", "answer", "output"),
    },
    "question/answer": {
        "prompt": ("question", "query"),
        "answer": ("answer", "response", "answers", "answerKey"),
    },
    "prompt/chosen": {
        "prompt": ("prompt", "question", "instruction", "query", "input"),
        "answer": ("chosen",),
    },
    "chosen": {"messages": ("chosen",)},
    "problem/solution": {"prompt": ("problem",), "answer": ("solution", "answer")},
    "user/assistant": {"prompt": ("user", "human"), "answer": ("assistant", "gpt", "bot")},
    "input/output": {
        "prompt": ("input", "inputs"),
        "answer": (
            *("output", "outputs", "target", "targets", "response", "answer", "completion"),
            *("content", "preferred_output"),
        ),
    },
    "text": {"text": ("text",)},
}
# of data whose rows are the messages of trees (OASST): the columns that these are read from
TREE = ("message_tree_id", "message_id", "parent_id", "role", "text", "rank", "deleted")
# for --task classify
LABELLED = {
    "text/label": {
        "text": ("text", "sentence", "content"),
        "label": ("label", "labels", "class", "category"),
    }
}
# what chat templates write before a turn, or after it
MARKUP = re.compile(
    r"<\|(im_start|start_header_id|user|assistant|start|turn)\|?>|\[/INST\]|<start_of_turn>"
    r"|<｜(User|Assistant)｜>|### (Human|Assistant):"
)
LETTERS = string.ascii_uppercase  # of choices, also in columns of their own
# whether an answer is learnt, of a message or a whole row: 0 or 1, true or false
LEARNT = (
    *("weight", "train", "training", "trainable", "loss", "learn", "loss_mask"),
    *("output_with_loss", "masked"),
)
OF_ROWS = ("label", "kto_tag")  # ... of a row alone, where it is true or false (TRL's KTO)
CHOICE = ("option", "option_", "choice", "choice_")
# what may stand beside a schema -> its names. All belong to a prompt, and these to messages too
PARTS = {
    "input": ("input",),
    **{
        f"context {name}": (name,)
        for name in (
            *("context", "contexts", "passage", "passages", "document", "documents", "article"),
            *("paragraph", "background", "knowledge"),
        )
    },
    "choices": ("choices", "options"),
    **{
        letter: (
            *(letter, letter.lower(), f"op{letter.lower()}"),
            *(f"{word}{name}" for word in CHOICE for name in (letter.lower(), place)),
        )
        for place, letter in enumerate(LETTERS, 1)
    },
    "system": ("system", "system_prompt", "system_message"),
    "reasoning": (
        *("reasoning_content", "reasoning", "thinking", "thinking_content", "thought", "thoughts"),
        *("chain_of_thought", "cot", "complex_cot", "Complex_CoT", "rationale", "think"),
        "reasoning_trace",
    ),
    "tools": ("tools", "functions"),
    "history": ("history",),
    # another prompt: it has to be the same one in other words
    **{f"also {n}": (n,) for n in ("question", "query", "instruction", "prompt", "problem")},
    **{f"learnt {name}": (name,) for name in (*LEARNT, *OF_ROWS)},
}
# beside messages; reply: their answer, where they end in a question
REPLY = {"reply": ("chosen", "completion", "response", "answer", "output")}
BESIDE_MESSAGES = ("system", "reasoning", "tools")
MAY_BE_NUMBERS = ("answer", "reply", "input")  # what may be a number, or true and false
LEARN_MARKS = tuple(part for part in PARTS if part.startswith("learnt "))
# what a row cannot be without: not used, it ends the program unless --columns ignores it
PICTURES = ("images", "image", "videos", "video", "audios", "audio")
MEANING = {
    *(name for part in PARTS for name in PARTS[part] if part.split()[0] in ("context", "choices")),
    *(name for letter in LETTERS[:4] for name in PARTS[letter] if len(name) > 2),
    *(name for part in (*BESIDE_MESSAGES, "history") for name in PARTS[part]),
    *("tool_calls", "function_call", "refusal", "train_detail", "training_detail", *PICTURES),
}
MEANING_OF_TEXT = {"role", "parent_id", *PICTURES}
SWITCHES = ("on", "off", "true", "false", "yes", "no", "low", "medium", "high")
KNOWN = (
    "messages; conversations; instruction[+input]+output; prompt+completion|response|answer;"
    " question+answer; problem+solution; input+output|target; user+assistant; prompt+chosen; text"
)
SPOKEN_BY = ("user", "assistant")  # what a role of the data is called here
COLUMNS_HELP = (
    "[SOURCE:]prompt=COL,answer=COL or messages=COL, with any of input, context, choices, system,"
    " reasoning, tools, history=COL; or text=COL, or rendered=COL (a conversation as the"
    " chat template wrote it); to classify: text=COL,label=COL; ignore=NAME"
    " leaves a column or message key out, user=NAME,assistant=NAME name the speakers"
)


def parse_columns(
    text: str, need_answer: bool = True, labelled: bool = False
) -> tuple[str, dict[str, str]]:
    """Read one --columns: parse_columns("fin:prompt=q,answer=a") == ("fin", {"prompt": "q",
    "answer": "a"}); "" where no source is named. What is ignored is under "ignore NAME", and who
    speaks under "user NAME": both leave the columns to be found.

    Raises ValueError, one line. Where no answer is needed (a teacher will write it), prompt=COL
    alone will do; labelled: text and label it is.
    """
    owner, colon, rest = text.partition(":")
    owner, rest = (owner.strip(), rest) if colon and "=" not in owner else ("", text)
    columns, pairs = {}, [part.partition("=")[::2] for part in rest.split(",")]
    for part, column in pairs:
        part, column = part.strip(), column.strip()
        columns[f"{part} {column}" if part in ("ignore", *SPOKEN_BY) else part] = column
    named = {part for part in columns if part.partition(" ")[0] not in ("ignore", *SPOKEN_BY)}
    beside = {"context", *(part for part in PARTS if " " not in part)}
    allowed = (
        ({"prompt", "answer"} if need_answer else {"prompt"}, {"answer"} | beside),
        ({"messages"}, {*BESIDE_MESSAGES}),
        ({"text"}, set()),
        ({"rendered"}, set()),
        (set(), beside),  # the rest is found
    )
    allowed = (({"text", "label"}, set()),) if labelled else allowed
    if (
        len(columns) != len(pairs)
        or not all(columns.values())
        or (named and not any(need <= named <= need | may for need, may in allowed))
    ):
        raise ValueError(f"saw {text!r}, wanted {COLUMNS_HELP}")
    return owner, columns


def among(names: Iterable[str], there: Iterable[str]) -> str | None:
    """Return the first column that has one of the names: as it stands, else whatever its case and
    the blanks around it."""
    names, plain = list(names), {}
    for name in (there := list(there)):
        plain.setdefault(name.strip().casefold(), name)
    exact = next((name for name in names if name in there), None)
    folded = (plain.get(name.casefold()) for name in names)
    return exact if exact is not None else next(filter(None, folded), None)


def aside(columns: dict[str, str]) -> tuple[dict[str, str], frozenset[str], dict[str, str]]:
    """Take a --columns apart: the columns, the names ignored, and what its speakers are called."""
    kept, ignored, roles = {}, set(), {}
    for part, column in columns.items():
        word = part.split()[0]
        if word == "ignore":
            ignored.add(column)
        elif word in SPOKEN_BY:
            roles[column] = word
        else:
            kept["context context" if part == "context" else part] = column
    return kept, frozenset(ignored), roles


def parts_beside(columns: dict[str, str]) -> tuple[str, ...]:
    """Return the parts that may stand beside these."""
    if "prompt" in columns:
        return tuple(PARTS)
    if "messages" in columns:
        return (*BESIDE_MESSAGES, *REPLY, *LEARN_MARKS)
    return (
        tuple(part for part in LEARN_MARKS if part[7:] in LEARNT) if "label" not in columns else ()
    )


def find_beside(
    columns: dict[str, str], there, ignored: frozenset[str], guessed: bool
) -> dict[str, str]:
    """Return the columns among the names `there` that stand beside those known already; where a
    user named these, marks of what is learnt alone."""
    found, taken = {}, {*columns.values(), *ignored}
    small = {"a", "b", "c"} <= {*there}  # "a" alone is no "A"
    for part in parts_beside(columns):
        if part not in columns and (guessed or part in LEARN_MARKS):
            free = [name for name in there if name not in taken]
            if part in LETTERS:
                plain = (part, part.lower()) if small else (part,)
                free = [name for name in free if len(name.strip()) > 1 or name in plain]
            name = among((PARTS | REPLY)[part], free)
            if name is not None:
                found[part] = name
    if not {"A", "B"} <= found.keys() | columns.keys():
        found = {part: name for part, name in found.items() if part not in LETTERS}
    return found


def in_words(columns: dict[str, str]) -> str:
    """Return in words which column plays which part, and where a context stands."""
    told = []
    for part, column in columns.items():
        word = part.partition(" ")[0]
        if word == "learnt":
            told.append(f"{column} says which are learnt")
        elif word == "reply":
            told.append(f"{column} where the messages end in a question")
        elif word != "also":
            told.append(f"{word}={column}{' after the prompt' * (word in ('context', 'choices'))}")
    return ", ".join(told)


def carries(name: str, columns: dict[str, str], ignored: frozenset[str]) -> bool:
    """Return whether a column that is not used is one that a row of these cannot be without."""
    known = MEANING if {"prompt", "messages"} & {*columns} else MEANING_OF_TEXT
    return "label" not in columns and name not in ignored and among(known, [name]) is not None


def refuse(where: object, name: str) -> NoReturn:
    files.fail(
        f"{where}: {name} carries meaning, and would not be used",
        wanted="a part that it plays, or that it is left out",
        mend=f"--columns with PART={name}, or ignore={name} ({COLUMNS_HELP})",
    )


def guess(
    path: Place, kind: dict, need_answer: bool = True, labelled: bool = False
) -> tuple[str, dict[str, str]]:
    """Return the first schema whose columns are all among those of a file (`kind`: their types),
    and the column of each of its parts."""
    known = dict(LABELLED if labelled else SCHEMAS)
    if not need_answer and not labelled:
        for parts in SCHEMAS.values():
            if "prompt" in parts and "user" not in parts["prompt"]:  # that may be a name
                known.setdefault(f"{parts['prompt'][0]} only", {"prompt": parts["prompt"]})
    for schema, parts in sorted(known.items(), key=lambda item: item[0] == "text"):
        columns = {}
        for part, names in parts.items():
            columns[part] = among(names, kind)
        if None not in columns.values():
            return schema, columns
    mend = "--columns text=COL,label=COL" if labelled else f"--columns {COLUMNS_HELP}"
    if not labelled and all(among(names, kind) for names in LABELLED["text/label"].values()):
        mend = f"--task classify, where a row is a text with its class; {mend}"
    files.fail(
        f"{path} follows no schema known here",
        seen=f"columns {', '.join(kind)}",
        wanted="text and label" if labelled else f"one of: {KNOWN}",
        mend=mend,
    )


def check_type(path: Place, part: str, column: str, kind, chosen: bool = False) -> None:
    """Refuse a column whose declared (arrow) type cannot hold its part; JSON declares none and is
    checked row by row. chosen: the answer is among choices, and may be a number."""
    word = part.partition(" ")[0]
    if kind is None or pa.types.is_null(kind) or word in ("learnt", "also"):
        return
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    good = (
        pa.types.is_string(value)
        or pa.types.is_large_string(value)
        or pa.types.is_string_view(value)
    )
    if part == "label":
        good |= pa.types.is_integer(value) or pa.types.is_boolean(value)
    elif part == "reasoning" or chosen and part == "answer":
        good |= pa.types.is_integer(value) or pa.types.is_boolean(value)
    elif part in LETTERS:
        good |= pa.types.is_integer(value) or pa.types.is_floating(value)
    elif part in MAY_BE_NUMBERS:
        good |= pa.types.is_integer(value) or pa.types.is_floating(value)
        good |= pa.types.is_boolean(value) or pa.types.is_decimal(value)
    listed = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if part == "prompt":
        good |= listed and pa.types.is_struct(kind.value_type)  # messages
        good |= pa.types.is_struct(kind)
    elif part not in ("text", "rendered", "label", "input", "system"):
        good |= listed or pa.types.is_struct(kind)
    if not good:
        wanted = {
            "messages": "a list of {role, content} or {from, value}",
            "label": "text, whole numbers or true and false",
        }.get(part, "text")
        files.fail(
            f"{path}: column {column} cannot be the {part.split()[0]}",
            seen=f"type {kind}",
            wanted=wanted,
            mend=f"--columns {COLUMNS_HELP}",
        )
