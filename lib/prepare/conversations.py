"""What a row says, in any of the shapes that people have, as one conversation.

Contract: everything that a row says reaches the conversation, or its name is noted in File.unused;
what carries meaning and has no place ends the program with one line. A conversation is a list of
{"role", "content"}, with what else lib/template.py knows of a message: reasoning_content,
tool_calls, tool_call_id, name, "learn": False (an answer that is context only), and in the first
message the conversation's tools.
"""

import ast
import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator
from decimal import Decimal

from lib import files, template
from lib.prepare import schema

ROLE_NAMES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "llm": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "claude": "assistant",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "function_response": "tool",
    "function response": "tool",
    "function_result": "tool",
    "tool_result": "tool",
    "tool_results": "tool",
    "tool_output": "tool",
    "ipython": "tool",
    "developer": "system",
}
CALLS = ("function_call", "tool_call")  # roles of ShareGPT and ms-swift whose text is a call
ROLE = ("role", "from", "speaker", "author")
CONTENT = ("content", "value", "text", "message", "utterance")
# of a turn without a role: who says what its keys hold (XTuner, Firefly)
SPEAKERS = {
    "system": ("system", "system_prompt"),
    "user": ("input", "human", "user", "question", "prompt", "instruction", "query"),
    "assistant": ("output", "assistant", "gpt", "bot", "response", "answer", "completion"),
}
SPOKEN = "(Human|Assistant|SYSTEM|USER|ASSISTANT|FUNCTION RESPONSE): ?"  # ... in one text
# of a list as numpy prints it: texts, and what stands between its items; what is no Python literal
PRINTED = re.compile(
    r"""('(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|[}\]])(\s+(?=['"{[]))?"""
    r"""|\barray\(|,\s*dtype=\w+\)|(?<=\])\)|\bnan\b"""
)
OF_INPUT = {"messages", "tools"}  # what OpenAI's preferences say in their input
PASSED = ("name", "tool_call_id")  # as they are; a template may write them
WANTED = "a list of {role, content}, of {from, value}, of {input, output}, or of pairs"


def characters(row: list[dict] | str | tuple[str, str]) -> int:
    """Return how long a row is, to cut many into pieces of like work."""
    if isinstance(row, str):
        return len(row)
    if isinstance(row, tuple):
        return len(row[0])
    more = sum(len(str(template.beside_text(message))) for message in row)
    return more + sum(len(message["content"] or "") for message in row)


def parsed(value: object) -> object:
    """Return what a text that is JSON (or a Python literal) says; csv, and some parquet files, hold
    lists so."""
    if isinstance(value, str) and value.strip().startswith(("[", "{", "array(")):
        for read in (json.loads, printed, ast.literal_eval):
            try:
                return read(value.strip())
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                pass
    return value


def printed(text: str) -> object:
    """Return what a Python literal says, also as pandas writes a list that numpy holds: no comma
    between its items, array(...) within, and nan for what is not there."""

    def mended(found: re.Match) -> str:
        return (found[1] or "None" * (found[0] == "nan")) + "," * bool(found[2])

    return ast.literal_eval(PRINTED.sub(mended, text))


def without_none(value: object) -> object:
    """Return a value without the fields that are null: an arrow struct gives every tool the
    parameters of all others."""
    if isinstance(value, dict):
        return {name: without_none(inner) for name, inner in value.items() if inner is not None}
    return [without_none(inner) for inner in value] if isinstance(value, list) else value


class SourceRow:
    """One row of a file (sources.File). parts: part -> value, blank ones left out."""

    def __init__(self, file, parts: dict, number: int) -> None:
        self.file, self.parts, self.number = file, parts, number

    def wrong(self, part: str, seen: object, wanted: str, mend: str = "") -> None:
        column = self.file.columns.get(part, part)
        files.fail(
            f"{self.file.place}, row {self.number}: column {column} is not {wanted}",
            seen=repr(seen)[:60],
            wanted=wanted,
            mend=mend or f"--columns {schema.COLUMNS_HELP}",
        )

    def unused(self, names: Iterable[str], kind: str = "message keys") -> None:
        """Note names that are not used; end the program where one carries meaning."""
        for name in names:
            if name in schema.MEANING and name not in self.file.ignored:
                schema.refuse(f"{self.file.place}, row {self.number}", name)
            self.file.unused[kind, name] = None

    def text(self, part: str) -> str:
        value = self.parts.get(part)
        if isinstance(value, list) and part.startswith("context"):
            if all(isinstance(item, str) for item in value):
                return "\n\n".join(value)
            if listed(value):
                return "\n\n".join("\n".join(self.words(part, item)) for item in value)
        if part in schema.MAY_BE_NUMBERS and isinstance(value, bool | int | float | Decimal):
            return str(value)
        if value is not None and not isinstance(value, str):
            column = self.file.columns.get(part, part)
            files.fail(
                f"{self.file.place}, row {self.number}: column {column} is not text",
                seen=type(value).__name__,
                wanted="a string",
                mend=f"--columns {schema.COLUMNS_HELP}",
            )
        return value or ""

    def words(self, part: str, item: dict) -> list[str]:
        """Return what the fields of a context say (title, text)."""
        said = [value for value in item.values() if value is not None]
        if not all(isinstance(value, str | int | float) for value in said):
            self.wrong(part, item, "text, or a list of texts")
        return list(map(str, said))

    # --- the whole row

    def plain_text(self) -> str | list[dict]:
        """Return the row's text; one that is not to be learnt as an answer that is not."""
        marked = "rendered" in self.file.columns
        text = template.Marked(self.text("rendered")) if marked else self.text("text")
        if self.is_learnt():
            return text
        return [{"role": "assistant", "content": text, "learn": False}]

    def is_learnt(self) -> bool:
        """Return whether the row's own columns say that it is learnt; what else they hold (a share,
        the name of a class) is no mark."""
        result = True
        for part in schema.LEARN_MARKS:
            value, column = self.parts.get(part), self.file.columns.get(part)
            if isinstance(value, list):
                schema.refuse(f"{self.file.place}, row {self.number}", str(column))
            if part in self.parts and (mark := mark_of(part[7:], value)) is None:
                self.file.unused["columns", f"{column} (not 0 or 1)"] = None
            elif part in self.parts:
                result &= bool(mark)
        return result

    def conversation(self, system: str | None) -> list[dict]:
        """Return the row's messages; `system` opens those that have no system message."""
        if "messages" in self.parts or "messages" in self.file.columns:
            messages = self.with_reply(self.messages("messages"))
        else:
            messages = [*self.messages("history"), *self.question_and_answer()]
        if (thought := self.reasoning()) and messages and messages[-1]["role"] == "assistant":
            messages[-1].setdefault("reasoning_content", thought)
        own = self.text("system").removeprefix("SYSTEM: ")  # as Glaive has it
        if own.strip() and messages and messages[0]["role"] == "system":
            if messages[0]["content"] != own:  # said twice, in two ways
                column = self.file.columns.get("system", "system")
                self.file.unused["columns", f"{column} (beside a system message)"] = None
        elif (own.strip() or system) and messages:
            messages.insert(0, {"role": "system", "content": own if own.strip() else system})
        tools = self.tools(self.parts.get("tools")) if messages else []
        names = [json.dumps(tool.get("function", tool).get("name")) for tool in tools]
        if tools and all(name in str(messages[0]["content"]) for name in names):
            column = self.file.columns["tools"]
            self.file.unused["columns", f"{column} (the system message has them)"] = None
        elif tools:
            messages[0]["tools"] = tools
        if not self.is_learnt():
            messages = [message | {"learn": False} for message in messages]
        return messages

    def with_reply(self, messages: list[dict]) -> list[dict]:
        """Return messages with the answer that stands in a column beside them, where they end in a
        question."""
        reply = parsed_messages(self.parts.get("reply"))
        if reply is None:
            return messages
        column = self.file.columns["reply"]
        if not messages or messages[-1]["role"] not in ("user", "tool"):
            self.file.unused["columns", f"{column} (the messages have their answer)"] = None
            return messages
        if not listed(reply):
            reply = [{"role": "assistant", "content": self.text("reply")}]
        more = self.messages_of("reply", reply)
        whole = any(message["role"] == "user" for message in more)
        return more if whole else messages + more

    def reasoning(self) -> str:
        """Return the trace in a column of its own; a mere switch ("on", "high") is none."""
        value = self.parts.get("reasoning")
        if value is None:
            return ""
        if isinstance(value, bool) or str(value).strip().lower() in schema.SWITCHES:
            column = self.file.columns.get("reasoning", "reasoning")
            self.file.unused["columns", f"{column} (a switch)"] = None
            return ""
        self.file.passed["assistant", "reasoning_content"] = None
        self.parts["reasoning"] = self.first("reasoning", value)
        return self.text("reasoning")

    def tools(self, value: object) -> list[dict]:
        """Return tools as {"type": "function", "function": {...}}, whatever they are wrapped in."""
        value = parsed(value)
        if isinstance(value, dict):
            value = [value]
        if value is None or value == "":
            return []
        if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
            self.wrong("tools", value, "a list of tools")
        found = []
        for tool in value if self.file.exact else without_none(value):
            bare = "function" not in tool and "name" in tool
            found.append({"type": "function", "function": tool} if bare else tool)
            self.file.passed["user", "tools"] = None
        return found

    # --- a prompt and its answer

    def question_and_answer(self) -> list[dict]:
        """Return the messages of a prompt, what stands beside it, and its answer; each may be
        messages itself, as TRL has them."""
        prompt, answer = (parsed_messages(self.parts.get(part)) for part in ("prompt", "answer"))
        also = [self.file.columns[part] for part in self.parts if part.startswith("also ")]
        self.file.unused.update({("columns", column): None for column in also})
        if isinstance(prompt, dict) and listed(prompt.get("messages")):  # OpenAI's preferences
            self.parts.setdefault("tools", prompt.get("tools"))
            self.unused(f"{self.file.columns['prompt']}.{n}" for n in {*prompt} - OF_INPUT)
            prompt = prompt["messages"]
        if self.parts.get("tools") and is_calls(parsed(answer)):
            answer = [{"role": "assistant", "content": "", "tool_calls": parsed(answer)}]
        if listed(answer) and not any({*ROLE} & {*item} for item in answer):
            # answers in parquet: a list of {text, ...} for lists of each
            answer = {name: [item.get(name) for item in answer] for name in answer[0]}
        whole = self.messages_of("answer", answer) if listed(answer) else None
        if whole and any(message["role"] == "user" for message in whole):
            # `chosen` with its question, as TRL's preference rows may have it
            said = [message["content"] for message in whole]
            if isinstance(prompt, str) and not any(prompt.strip() in text for text in said if text):
                self.wrong(
                    "prompt", prompt, "in the conversation beside it", "--columns messages=COL"
                )
            return whole
        options = options_of(self.choices())
        if listed(prompt):
            asked = self.messages_of("prompt", prompt)
            more = self.beside_prompt(options)
            if more and asked:
                last = asked[-1]
                last["content"] = "\n\n".join(filter(None, [last["content"], *more]))
        else:
            texts = [self.text("prompt"), *self.beside_prompt(options)]
            content = "\n\n".join(text for text in texts if text.strip())
            self.same_prompts(content)
            asked = [{"role": "user", "content": content}]
        if whole is None:
            whole = [{"role": "assistant", "content": self.answer(answer, options)}]
        return asked + whole

    def first(self, part: str, value: object) -> object:
        """Return the first of several texts that would each do."""
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            return value
        if len(set(value)) > 1:
            self.file.unused["columns", f"{self.file.columns[part]} past the first"] = None
        return value[0] if value else ""

    def same_prompts(self, content: str) -> None:
        """Refuse another column of the prompt that says more."""
        for part, other in self.parts.items():
            if part.startswith("also ") and isinstance(other, str) and other.strip():
                column, prompt = self.file.columns[part], self.text("prompt").strip()
                if other.strip() not in content and prompt not in other:
                    self.wrong(
                        part,
                        other,
                        f"the prompt that {self.file.columns['prompt']} is",
                        f"--columns input={column}, or ignore={column}",
                    )

    def beside_prompt(self, options: list[tuple[str, str]] | str) -> list[str]:
        """Return what follows the prompt: its input, its context, its choices."""
        contexts = [part for part in self.parts if part.startswith("context")]
        told = [self.text(part) for part in ("input", *contexts)]
        if isinstance(options, list):
            options = "\n".join(f"{label}. {text}" for label, text in options)
        return [text for text in (*told, options) if text.strip()]

    def choices(self) -> object:
        letters = {part: self.parts[part] for part in schema.LETTERS if part in self.parts}
        return letters if "A" in letters and "B" in letters else self.parts.get("choices")

    def answer(self, value: object, options: list[tuple[str, str]] | str) -> str:
        """Return the answer's text: an index among choices becomes their label (the first is 0)."""
        if isinstance(value, dict) and "text" in value:  # SQuAD's answers
            self.unused(f"{self.file.columns['answer']}.{name}" for name in value if name != "text")
            value = value["text"]
        index = value = self.first("answer", value)
        if isinstance(value, str) and value.strip().isdecimal() and isinstance(options, list):
            known = [word for option in options for word in option]
            index = value if value.strip() in known else int(value)
        if isinstance(options, list) and options and type(index) is int:
            if not 0 <= index < len(options):
                self.wrong(
                    "answer", value, f"an index of {len(options)} choices, the first being 0"
                )
            return options[index][0]
        self.parts["answer"] = value
        return self.text("answer")

    # --- messages

    def messages(self, part: str) -> list[dict]:
        return self.messages_of(part, content_of(parsed(self.parts.get(part))))

    def messages_of(self, part: str, value: object) -> list[dict]:
        """Bring conversations of all known shapes to one form; content that is not text becomes
        None."""
        columns = list(value.values()) if isinstance(value, dict) else []
        if columns and all(isinstance(v, list) and len(v) == len(columns[0]) for v in columns):
            value = [dict(zip(value, item)) for item in zip(*columns)]  # of a list
        if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
            value = items if listed(items := [*map(parsed_message, value)]) else [value]
        if not isinstance(value, list | None):
            self.wrong(part, value, f"a conversation: {WANTED}")
        messages: list[dict] = []
        for item in value or []:
            item = parsed_message(item)
            if isinstance(item, list | tuple) and all(isinstance(t, str | None) for t in item):
                for place, text in enumerate(item):  # [question, answer]
                    role = ("user", "assistant")[place % 2]
                    messages.append({"role": role, "content": text})
            elif not isinstance(item, dict):
                self.wrong(part, value, f"a conversation: {WANTED}")
            elif any(item.get(name) is not None for name in ROLE):
                messages.append(self.message(item))
            else:
                messages += self.turn(item)
        for message in messages[1:]:
            if "tools" in message:
                messages[0].setdefault("tools", []).extend(message.pop("tools"))
        return messages

    def turn(self, item: dict) -> list[dict]:
        """Return the messages of a turn whose keys say who speaks, {"input": ..., "output": ...};
        what else it says belongs to the last of them."""
        spoken = {}
        for role, names in SPEAKERS.items():
            if name := next((name for name in names if item.get(name) is not None), None):
                spoken[name] = {"role": role, "content": item[name]}
        rest = {name: value for name, value in item.items() if name not in spoken}
        *first, last = [*spoken.values()] or [{}]
        return [self.message(message) for message in (*first, rest | last)]

    def message(self, item: dict) -> dict:
        """Return one message of whatever keys; content that is not text becomes None."""
        rest = {name: value for name, value in item.items() if value not in (None, "", [], {})}

        def take(names: Iterable[str]) -> object:
            found = next((name for name in names if name in rest), None)
            return None if found is None else rest.pop(found)

        said = str(take(ROLE) or "").strip()
        role = self.file.roles.get(said) or ROLE_NAMES.get(said.lower(), said.lower())
        content = next((item[name] for name in CONTENT if item.get(name) is not None), None)
        take(CONTENT)
        text, thoughts = self.content(content)
        if role == "tool" and text is None and content is not None:  # a result that is no text
            text = json.dumps(content, ensure_ascii=False)
        message = {"role": role, "content": text}
        calls = take(["tool_calls"]) or take(["function_call"])
        if role in CALLS:
            message["role"] = role = "assistant"
            calls = parsed(text)
            if not isinstance(calls, dict | list):  # learnt as it stands
                calls = None
        if calls := self.calls(calls):
            message["tool_calls"] = calls
            if role in CALLS or said.lower() in CALLS or text is None:
                message["content"] = ""
        thought = take(schema.PARTS["reasoning"]) or thoughts
        if isinstance(thought, str) and thought.strip():
            message["reasoning_content"] = thought
            message["content"] = message["content"] or ""
            self.file.passed["assistant", "reasoning_content"] = None
        elif thought:
            self.wrong("messages", thought, "a conversation whose reasoning is text")
        for name in PASSED:
            if isinstance(value := take([name]), str):
                message[name] = value
                self.file.passed[role, name] = None
        if tools := self.tools(take(["tools", "functions"])):
            message["tools"] = tools
        for name in {*schema.LEARNT} & {*item} - self.file.ignored:
            if role == "assistant" and not self.learnt(name, item[name]):
                message["learn"] = False
            if role == "assistant" or mark_of(name, item[name]) is False:
                rest.pop(name, None)  # what is no answer is not learnt anyway
        self.unused(rest)
        return message

    def content(self, value: object) -> tuple[str | None, str]:
        """Return (text, reasoning) of a message's content; None where a part of it is no text."""
        if not isinstance(value, list):
            number = isinstance(value, bool | int | float)
            return str(value) if number or isinstance(value, str) else None, ""
        text, thoughts = [], []
        for part in value:
            part = {"text": part} if isinstance(part, str) else part
            if not isinstance(part, dict):
                return None, ""
            part = without_none(part)
            for name in {*schema.LEARNT} & {*part} - self.file.ignored:
                if not self.learnt(name, part.pop(name)):
                    mend = f"--columns ignore={name}"
                    self.wrong("messages", part, f"a conversation of one {name} an answer", mend)
            if part.get("type") in ("thinking", "reasoning"):
                name = next(
                    (name for name in ("thinking", "reasoning", "text") if name in part), ""
                )
                thoughts.append(part.pop(name, None))
            else:
                text.append(part.pop("text", None))
            part.pop("type", None)
            if all(isinstance(said, str) for said in (*text, *thoughts)):
                self.unused(f"content.{name}" for name in part)
        if not all(isinstance(said, str) for said in (*text, *thoughts)):
            return None, ""
        return "".join(text), "".join(thoughts)

    def calls(self, value: object) -> list[dict]:
        """Return calls as {"type": "function", "function": {"name", "arguments"}, ...}."""
        value = parsed(value)
        value = [value] if isinstance(value, dict) else value
        if not value:
            return []
        if not isinstance(value, list) or not all(isinstance(call, dict) for call in value):
            self.wrong("messages", value, "a conversation whose tool calls are objects")
        found = []
        for call in value if self.file.exact else without_none(value):
            if not isinstance(call.get("function"), dict):
                call = {"type": "function", "function": call}
            self.file.passed["assistant", "tool_calls"] = None
            for name in call.keys() - {"type", "function"}:
                self.file.passed["assistant", f"tool_calls.{name}"] = None
            self.unused(f"tool_calls.{n}" for n in call["function"].keys() - {"name", "arguments"})
            found.append(call)
        return found

    def learnt(self, name: str, value: object) -> bool:
        """Return whether a mark says that an answer is learnt; a share of an answer cannot be."""
        mark = True if value is None else mark_of(name, value)
        if mark is None:
            self.wrong(
                "messages",
                f"{name} {value!r}",
                f"a conversation whose {name} is 0 or 1, true or false",
                f"--columns ignore={name}",
            )
        return bool(mark)


def mark_of(name: str, value: object) -> bool | None:
    """Return whether a mark of that name says that an answer is learnt; None where it is none."""
    if isinstance(value, str):
        value = {"true": True, "false": False}.get(value.strip().lower(), value)
        value = float(value) if value in ("0", "1", "0.0", "1.0") else value
    if name in schema.OF_ROWS and not isinstance(value, bool):
        return None
    if not isinstance(value, bool | int | float) or value not in (0, 1):
        return None
    return not value if name == "masked" else bool(value)


def is_calls(value: object) -> bool:
    """Return whether a value is calls of tools, [{"name": ..., "arguments": ...}, ...]."""
    return listed(value) and all({"name", "arguments"} <= {*call} for call in value)


def listed(value: object) -> bool:
    """Return whether a value is a list of objects, as messages are."""
    return isinstance(value, list) and bool(value) and all(isinstance(x, dict) for x in value)


def parsed_messages(value: object) -> object:
    """Return a prompt or an answer; messages where it is JSON text of some, one alone, or a
    conversation as one text."""
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        found = parsed(value)
        if isinstance(found, list) and all(
            isinstance(item, dict) and {*ROLE} & {*item} for item in found
        ):
            return found
    if isinstance(value, dict) and {*ROLE} & {*value}:
        return [value]
    return content_of(value)


def parsed_message(item: object) -> object:
    """Return a message; JSON text of one as an object, names of fields in small letters."""
    if isinstance(item, str) and item.lstrip()[:1] == "{":
        read = parsed(item)
        item = read if isinstance(read, dict) else item
    if isinstance(item, dict) and not {*ROLE} & {*item}:
        return {name.strip().casefold(): value for name, value in item.items()}
    return item


def content_of(value: object) -> object:
    """Return a conversation in one text as messages, without a last turn that is blank:
    "\n\nHuman: ...\n\nAssistant: ..." (HH-RLHF), the same on lines of their own (BELLE), behind
    "### " (Guanaco), "USER: ..." (Glaive)."""
    begin = re.match(r"\s*(### )?(Human|SYSTEM|USER):", value) if isinstance(value, str) else None
    if begin is None or not re.search(r"(^|### )assistant:", value, re.I | re.M):
        return value  # a question that begins so is no conversation
    lines = "\n\n" if re.search(r"\n\nassistant:", value, re.IGNORECASE) else "\n"
    _, *parts = re.split(f"(?:^|{begin[1] or lines}){SPOKEN}", value.lstrip())
    turns = []
    for role, text in zip(parts[::2], parts[1::2]):
        text = text.strip().removesuffix("<|endoftext|>").rstrip()
        call = text.removeprefix("<functioncall>")
        if call != text and isinstance(parsed(call), dict):
            role, text = "function_call", call
        turns.append({"role": role, "content": text})
    return turns if turns[-1]["content"] else turns[:-1]


def threads(messages: Iterable[dict]) -> Iterator[dict]:
    """Yield a conversation of each tree of messages, whose rows follow each other (OASST): where it
    branches, the reply that was ranked first."""
    for _, tree in itertools.groupby(messages, key=lambda message: message.get("message_tree_id")):
        replies: dict[str | None, list[dict]] = {}
        for message in tree:
            if not mark_of("deleted", message.get("deleted")):  # a csv has it as text
                replies.setdefault(message["parent_id"] or None, []).append(message)
        talk, at = [], None
        while at in replies:
            best = min(replies.pop(at), key=_rank)
            talk.append({"role": best["role"], "content": best["text"]})
            at = best["message_id"]
        yield {"messages": talk}


def _rank(reply: dict) -> float:
    try:
        return float(reply.get("rank") or 0)
    except (TypeError, ValueError):  # no number: behind all that have one
        return math.inf


def options_of(value: object) -> list[tuple[str, str]] | str:
    """Return the (label, text) of choices; a text that is no list stays a text.

    options_of(["wood", "iron"]) == [("A", "wood"), ("B", "iron")], and so are {"A": "wood", ...},
    {"label": ["A", ...], "text": ["wood", ...]} and [{"label": "A", "text": "wood"}, ...].
    """
    value = parsed(value)
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, dict) and isinstance(value.get("text"), list):
        labels, texts = value.get("label") or [], value["text"]
        labels = labels if len(labels) == len(texts) else letters(len(texts))
    elif isinstance(value, dict):
        value = without_none(value)
        labels, texts = list(value), list(value.values())
    else:
        value = [option for option in value if option is not None]
        labels, texts = letters(len(value)), []
        for place, option in enumerate(value):
            if isinstance(option, dict):
                labels[place] = next((option[n] for n in ("label", "key", "id") if n in option), "")
                option = next((option[n] for n in ("text", "value", "content") if n in option), "")
            texts.append(option)
    pairs = zip(labels, texts, strict=True)
    return [(str(label), str(text)) for label, text in pairs if text is not None]


def letters(count: int) -> list[str]:
    """Return the labels of so many choices."""
    return [*schema.LETTERS[:count], *map(str, range(len(schema.LETTERS) + 1, count + 1))]
