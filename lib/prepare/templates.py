"""The chat template that the data is written with, and that every later stage and reader of best/
has: the tokenizer's own, one that --chat-template names, or a plain one; its date pinned, its
arguments set (--template-args).

Contract: all of it is text at the head of the template, which save_pretrained keeps: whoever
renders with the saved tokenizer (plain transformers, vLLM, a server) renders the same, on any
day.
"""

import datetime
import json
import os
import re
from pathlib import Path

import jinja2

from lib import files, template

# For a tokenizer without a template of its own: plain headings, and eos_token as the end of an
# assistant's turn. Every heading ends in a line break, which no common tokenizer merges with the
# word after it. `{bos}` becomes bos_token where the tokenizer adds one.
FALLBACK = (
    "{bos}{% for message in messages %}{{ {'system': 'System', 'user': 'User', 'assistant':"
    " 'Assistant', 'tool': 'Tool'}[message['role']] + ':\\n' + message['content'] }}{% if"
    " message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n\\n' }}{% endfor %}{% if"
    " add_generation_prompt %}{{ 'Assistant:\\n' }}{% endif %}"
)
# names of templates that may be given to a base model whose vocabulary has their tokens: what comes
# before and after the role, what ends a turn, the assistant's role
TURNS = {
    "chatml": ("<|im_start|>", "\\n", "<|im_end|>\\n", "assistant"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>\\n\\n", "<|eot_id|>", "assistant"),
    "gemma": ("<start_of_turn>", "\\n", "<end_of_turn>\\n", "model"),
}
TURN = (
    "{% for message in messages %}{{ 'BEFORE' + ('ASSISTANT' if message['role'] == 'assistant' else"
    " message['role']) + 'AFTER' + message['content'] + 'END' }}{% endfor %}{% if"
    " add_generation_prompt %}{{ 'BEFOREASSISTANTAFTER' }}{% endif %}"
)
DAY = datetime.date(2025, 1, 1)  # of a template that writes a date and has none of its own
UNDATED = "{% set strftime_now = nothing_of_this_name %}"
PINNED = re.compile(r"^\{% (?:macro|set) strftime_now\b.*\n", re.MULTILINE)
# what a chat template may take for two words
TEMPLATE_BYTES, TEMPLATE_SECONDS = 2 << 30, 5


def ensure_template(tokenizer) -> bool:
    """Give the tokenizer the `FALLBACK` template if it has none, and return whether that was so;
    save_pretrained keeps it."""
    if tokenizer.chat_template is not None:
        try:
            tokenizer.get_chat_template()
        except ValueError as several:
            files.fail(
                f"the tokenizer {tokenizer.name_or_path} has several chat templates",
                seen=several,
                wanted="one named default",
            )
        check_template(tokenizer)
        return False
    if tokenizer.eos_token is None:
        files.fail(
            f"the tokenizer {tokenizer.name_or_path} cannot end an answer",
            seen="neither a chat template nor an eos_token",
            wanted="one of them in tokenizer_config.json",
            mend="--tokenizer of an instruct model of the same family",
        )
    tokenizer.chat_template = FALLBACK.replace(
        "{bos}", "{{ bos_token }}" if template.adds_bos(tokenizer) else ""
    )
    return True


def make_ready(
    tokenizer, chat_template: str | None = None, args: dict | None = None, beside: bool = False
) -> tuple[list[str], str]:
    """Give a tokenizer the chat template that all stages and whoever reads best/ are to have: the
    one named (--chat-template), its own, or the plain one; the date in it pinned, its arguments set
    (--template-args). Return what is to be said of it, and the line of the text that has the
    date. beside: the flags are about another tokenizer: this one keeps the template that it has,
    and is given the arguments that it knows."""
    notes, args = [], args or {}
    if beside:
        chat_template = chat_template if tokenizer.chat_template is None else None
        source = str(tokenizer.chat_template)
        args = {name: args[name] for name in args if re.search(rf"\b{name}\b", source)}
    if chat_template is not None:
        tokenizer.chat_template = find_template(tokenizer, chat_template)
    if ensure_template(tokenizer):
        notes.append(
            "the tokenizer has no chat template; the plain one of lib/prepare/templates.py is used"
            " and saved with it"
        )
        if fitting := [name for name in TURNS if has_turns(tokenizer, name)]:
            notes[-1] += f" (--chat-template {fitting[0]} would use the turn tokens that it has)"
    if dated := pin_date(tokenizer):
        notes.append(f"the chat template writes a date; it is pinned, for good: {dated!r}")
    set_arguments(tokenizer, args)
    try:
        text = template.render(tokenizer, [{"role": "user", "content": "x"}], True)
        named = dict.fromkeys(re.findall(r"<\|[^<>|\s]+\|>", text))
        if unknown := [name for name in named if name not in tokenizer.get_vocab()]:
            notes.append(
                f"the chat template writes {' '.join(unknown)}, no token of the tokenizer: it is"
                " learnt letter by letter (a --chat-template with the tokenizer's own tokens)"
            )
    except jinja2.TemplateSyntaxError as broken:
        files.fail(
            f"the chat template of {tokenizer.name_or_path} cannot be read",
            f"line {broken.lineno}: {broken}",
            "a Jinja template",
            "--chat-template FILE",
        )
    except (jinja2.TemplateError, TypeError):
        pass  # it wants other messages: each row is tried
    return notes, dated


def has_turns(tokenizer, name: str) -> bool:
    """Return whether a tokenizer has the turn tokens of a template of `TURNS`."""
    known = tokenizer.get_vocab()
    return all(token in known for token in re.findall(r"<[^<>]+>", "".join(TURNS[name])))


def find_template(tokenizer, name: str) -> str:
    """Return the chat template that --chat-template names: one of the tokenizer's own, one of
    `TURNS`, a file, or that of another tokenizer (a folder or a hub id)."""
    own = tokenizer.chat_template
    text: object = None
    if isinstance(own, dict) and name in own:
        return own[name]
    if name in TURNS:
        if not has_turns(tokenizer, name):
            files.fail(
                f"the tokenizer {tokenizer.name_or_path} has not the turn tokens of {name}",
                wanted=" ".join(re.findall(r"<[^<>]+>", "".join(TURNS[name]))),
                mend="--chat-template with another name, or a file",
            )
        before, after, end, assistant = TURNS[name]
        bos = "{{ bos_token }}" if tokenizer.bos_token and name != "chatml" else ""
        return bos + TURN.replace("BEFORE", before).replace("AFTER", after).replace(
            "END", end
        ).replace("ASSISTANT", assistant)
    path = Path(name)
    if path.is_file():
        try:
            read = path.read_text(encoding="utf-8")
            text = json.loads(read).get("chat_template") if path.suffix == ".json" else read
        except (OSError, ValueError, AttributeError) as broken:
            files.fail(f"--chat-template {name} cannot be read", broken, "a UTF-8 Jinja file")
    elif path.is_dir() or re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        text = template.load_tokenizer(name).chat_template
        text = text.get("default") if isinstance(text, dict) else text
    else:
        known = [*TURNS, *(own if isinstance(own, dict) else ())]
        files.fail(
            f"there is no chat template {name}",
            wanted=f"a file, a folder or hub id of a model that has one, or {', '.join(known)}",
        )
    if not isinstance(text, str):
        files.fail(f"{name} holds no chat template", wanted="a template as text")
    return text


def _change(tokenizer, head: str) -> None:
    """Put a line before the chat template, or each of several. Jinja drops the line end after a
    tag, so that what follows is rendered as before."""
    own = tokenizer.chat_template
    if isinstance(own, dict):
        tokenizer.chat_template = {name: f"{head}\n{text}" for name, text in own.items()}
    else:
        tokenizer.chat_template = f"{head}\n{own}"


def _said_by(tokenizer, head: str = "") -> list[str | None]:
    """Return what the chat template makes of a few conversations, without its date pinned below a
    line of ours; None where it refuses one."""
    system, asked = ({"role": role, "content": "x"} for role in ("system", "user"))
    tool = {"name": "x", "description": "x", "parameters": {"type": "object", "properties": {}}}
    tools, texts = [{"type": "function", "function": tool}], []
    own = tokenizer.get_chat_template()
    shown = f"{head}\n{PINNED.sub('', own)}" if head else own
    for talk, with_tools in (([asked], None), ([system, asked], None), ([asked], tools)):
        try:
            text = tokenizer.apply_chat_template(
                talk, tools=with_tools, chat_template=shown, tokenize=False
            )
        except (jinja2.TemplateError, TypeError):
            text = None
        texts.append(text)
    return texts


def _on_day(day: datetime.date) -> str:
    """Return a line that makes a template's strftime_now say this day, in any format."""
    codes = "".join(f" | replace('%{c}', '{day.strftime('%' + c)}')" for c in "YymdBbAajHMSIpFe")
    days = f" | replace('%-d', '{day.day}') | replace('%-m', '{day.month}')"
    return "{% macro strftime_now(format) %}{{ format" + days + codes + " }}{% endmacro %}"


def pin_date(tokenizer) -> str:
    """Have a chat template that writes today's date (strftime_now) write one and the same for ever:
    its own default where it has one, else DAY. Return the line of the text that has it, "" where
    there is none or it was pinned before.

    A line before the template does it (it takes the name), so that every reader of the template
    does the same: later stages, best/ under plain transformers or vLLM, a server.
    """
    templates = tokenizer.chat_template
    source = "\n".join(templates.values()) if isinstance(templates, dict) else templates
    if "strftime_now" not in source:
        return ""
    other = _said_by(tokenizer, _on_day(datetime.date(1999, 11, 22)))
    if not PINNED.search(source):
        texts, own = (_said_by(tokenizer, head) for head in (_on_day(DAY), UNDATED))
        # where it can do without, it has a default of its own
        bare = all(text is not None for text, dated in zip(own, texts) if dated is not None)
        _change(tokenizer, UNDATED if bare else _on_day(DAY))
    for text, another in zip(_said_by(tokenizer), other):
        lines = set((another or "").splitlines())
        if said := [line for line in (text or "").splitlines() if line not in lines]:
            return said[0].strip()[-100:]
    return "a date"


def set_arguments(tokenizer, args: dict) -> None:
    """Make arguments of the chat template its defaults (enable_thinking, reasoning_effort,
    date_string, ...); one line where it looks at none of that name."""
    templates = tokenizer.chat_template
    source = "\n".join(templates.values()) if isinstance(templates, dict) else templates
    for name in args:
        if not re.search(rf"\b{name}\b", source):
            words = sorted(set(re.findall(r"\b(\w+) is (?:not )?defined", source)))
            files.fail(
                f"the chat template of {tokenizer.name_or_path} has no argument {name}",
                wanted=f"one that it looks at ({', '.join(words) or 'none is known'})",
                mend="another --template-args, or none",
            )
    told = [
        f"{{% if {n} is not defined %}}{{% set {n} = {_literal(v)} %}}{{% endif %}}"
        for n, v in args.items()
    ]
    if told:
        _change(tokenizer, "".join(told))


def _literal(value: object) -> str:
    """Return a value from JSON as Jinja writes it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_literal(n)}: {_literal(v)}" for n, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def check_template(tokenizer) -> None:
    """Refuse a chat template that takes more than TEMPLATE_BYTES or TEMPLATE_SECONDS of processor
    time for two words: it is tried in a child, which may be killed."""
    if not hasattr(os, "fork"):  # Windows
        return
    import resource

    child = os.fork()
    if not child:
        code = 1
        try:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            most = pages * resource.getpagesize() + TEMPLATE_BYTES
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
            resource.setrlimit(resource.RLIMIT_CPU, (TEMPLATE_SECONDS, TEMPLATE_SECONDS))
            template.render(
                tokenizer, [{"role": role, "content": "x"} for role in ("user", "assistant")]
            )
            code = 0
        except (jinja2.TemplateError, TypeError) as refused:  # which is told where rows are read
            code = 2 if "MemoryError" in str(refused) else 0
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 2:
        long = os.WIFSIGNALED(status)
        files.fail(
            f"the chat template of {tokenizer.name_or_path} does not end",
            f"more than {TEMPLATE_SECONDS} s"
            if long
            else f"{files.human(TEMPLATE_BYTES)} and more",
            "a conversation of two words rendered at once",
            "another chat_template in tokenizer_config.json (or chat_template.jinja)",
        )
