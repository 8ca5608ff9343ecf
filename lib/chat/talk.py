"""A conversation in a terminal, or in a pipe: messages come from stdin, answers go to stdout while
they are written.

Contract: where stdin or stdout is no terminal, stdout holds the answers (beside a teacher labelled)
and what commands say, and nothing else: no colour, no prompt, no numbers. On a terminal no control
character of a model reaches it (lib/chat/terminal.py).
"""

import argparse
import glob
import json
import math
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lib import files, template
from lib.chat import heat, terminal

HELP = """/help         this text
/reset        forget the conversation
/system TEXT  set the system prompt; without TEXT, remove it
/retry        answer the last message again; where tokens are sampled the answer is another
/save FILE    write the conversation as JSON
/load FILE    go on with what /save wrote, or with the first line of a .jsonl file of
              {"messages": [...]}
/temp X       sample at this temperature, 0 = greedy; without X, say it
/tokens N     the longest answer, in tokens; without N, say it
/diff         the last answer beside the teacher (--teacher): how far apart they are at each token,
              in nats of KL(teacher || student)
/exit         leave, as Ctrl-D does
A line that ends in a backslash goes on in the next one; a block between two lines of \"\"\" is one
message. Ctrl-C stops an answer. With --teacher both answer each question, after one history, whose
answers are the student's; Ctrl-C stops one of the two."""
COMMANDS = [line.split()[0] for line in HELP.splitlines() if line.startswith("/")]
# nats of KL, and the background (of 256 colours) from there on: pale to red
RAMP = ((0.0, None), (0.1, 224), (0.5, 217), (1.0, 210), (2.0, 203))
MARKED = 0.5  # nats above which a token is marked where there are no colours


@dataclass
class Conversation:
    """student, teacher: model.Chat, the second or None. args: how they sample. asked: the messages
    up to the last question, which /retry takes. said: (messages sent, prompt's tokens, tokens
    written) of the student's last answer. terminal: whether a person reads along.
    """

    student: object
    teacher: object
    args: argparse.Namespace
    terminal: bool = False
    system: str | None = None
    messages: list[dict] = field(default_factory=list)
    asked: list[dict] = field(default_factory=list)
    said: tuple[list[dict], list[int], list[int]] | None = None

    def __post_init__(self) -> None:
        self.system = self.args.system


# --- the conversation


def completions(line: str, word: str) -> list[str]:
    """Return what Tab offers for the last word of a line: commands, and file names behind /save and
    /load."""
    command, space, _ = line.partition(" ")
    if not space:
        return [name for name in COMMANDS if name.startswith(word or "/")]
    if command not in ("/save", "/load"):
        return []
    found = sorted(glob.glob(glob.escape(os.path.expanduser(word)) + "*"))
    return [name + "/" * os.path.isdir(name) for name in found]


def converse(args, student, teacher=None):
    """Read messages and answer them until the user leaves."""
    here = Conversation(student, teacher, args, terminal=terminal.both_ways())
    keep = None
    if here.terminal:
        # one that is not UTF-8 shows a ? for what it does not know
        sys.stdout.reconfigure(errors="replace")
        keep = terminal.line_editing(completions)
        print(
            f"{args.ckpt} on {student.device}{f', beside {args.teacher}' if teacher else ''}; /help"
            " for help, Ctrl-D to leave"
        )
    ask, more = terminal.prompts()
    while True:
        try:
            message = terminal.read_message(ask, more)
            if keep:
                keep()
            if message is None:
                print(end="\n" if here.terminal else "")
                return
            if message.split()[:1] == ["/exit"] and message.startswith("/"):
                return
            obey(here, message)
        except UnicodeDecodeError:
            print("that was no UTF-8")
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /exit leaves)")


def obey(here: Conversation, message: str) -> None:
    """Do what a line asks: a command, or a message to be answered."""
    command, _, rest = message.strip().partition(" ")
    rest = rest.strip()
    if not command:
        return
    if template.BROKEN.search(message):  # a byte that is no UTF-8, as Python reads it
        print("that was no UTF-8")
    elif not message.startswith("/"):
        answer_message(here, message)
    elif command == "/help":
        print(HELP)
    elif command == "/reset":
        here.messages, here.asked, here.said = [], [], None
        print("the conversation is forgotten")
    elif command == "/system":
        here.system = rest or None
        print(f"system prompt: {here.system}" if here.system else "no system prompt of yours")
    elif command == "/retry":
        answer_last(here, here.asked) if here.asked else print("there is nothing to answer again")
    elif command in ("/save", "/load") and not rest:
        print(f"{command} needs a file name")
    elif command == "/save":
        save_conversation(rest, template.with_system(here.messages, here.system))
    elif command == "/load":
        load_conversation(here, rest)
    elif command == "/temp":
        change(
            here,
            "temperature",
            rest,
            float,
            lambda x: math.isfinite(x) and x >= 0,
            "a number of 0 (greedy) or more, like 0.7",
            sampling,
        )
    elif command == "/tokens":
        change(
            here,
            "max_new_tokens",
            rest,
            int,
            lambda n: n > 0,
            "a whole number above 0",
            lambda chat: f"at most {chat.how.max_new_tokens} tokens",
        )
    elif command == "/diff":
        diff(here)
    else:
        print(
            f"unknown command {command}; /help lists them (a space before it sends it to the model)"
        )


def answer_message(here: Conversation, message: str) -> bool:
    """Print the answer to a message, and return whether there is one."""
    return answer_last(here, [*here.messages, {"role": "user", "content": message}])


def answer_last(here: Conversation, asked: list[dict]) -> bool:
    """Print the answer to the last of these messages, below the teacher's if there is one, and go
    on from it; return whether the student gave one. Where it gave none, the conversation is as it
    was before."""
    here.asked = asked
    sent = template.with_system(asked, here.system)
    ids, dropped = fitted(here.student, sent)
    if ids is None:
        return False
    if dropped:
        print(
            f"(the {dropped} oldest messages no longer fit into {here.student.context} tokens and"
            " are forgotten)"
        )
        sent = template.with_system(asked[dropped:], here.system)
    if here.teacher is not None:
        print(terminal.paint("teacher:", "1;35"))
        known, _ = fitted(here.teacher, sent)
        if known is not None:
            stream_answer(here, here.teacher, known)
        print(terminal.paint("student:", "1;36"))
    printer = stream_answer(here, here.student, ids)
    if printer.stopped and not printer.text:
        return False
    here.messages = [*asked[dropped:], {"role": "assistant", "content": printer.text}]
    here.said = (sent, ids, printer.tokens or [])
    return True


def fitted(chat, sent: list[dict]) -> tuple[list[int] | None, int]:
    """Return the prompt's tokens and how many messages had to go; no tokens where a model cannot
    take the messages, which is said."""
    try:
        ids, dropped = chat.fit(sent)
    except SystemExit as refused:  # a chat template's refusal must not end the conversation
        print(terminal.visible(str(refused)))
        return None, 0
    if chat.context and len(ids) >= chat.context:
        print(f"this message is too long: {len(ids)} tokens, and the model sees {chat.context}")
        return None, 0
    return ids, dropped


def stream_answer(here: Conversation, chat, ids: list[int]) -> terminal.Printer:
    """Print a model's answer while it is written, until Ctrl-C stops it; below it, for a person,
    its numbers."""
    printer = terminal.Printer(chat.tokenizer)
    try:
        printer.text = chat.answer(ids, printer)
    except KeyboardInterrupt:
        printer.stopped = True
        print(" (stopped)", flush=True)
    except torch.OutOfMemoryError as full:
        printer.stopped = True
        print(
            f"\n{chat.device} has too little memory for this conversation"
            f" ({str(full).splitlines()[0][:100]}); /reset, or /save"
        )
    if here.terminal and printer.tokens:
        print(terminal.paint(footnote(chat, ids, printer), "2"))
    return printer


def footnote(chat, prompt: list[int], printer: terminal.Printer) -> str:
    """Return the line below an answer: its tokens, tokens/s after the first one, how they were
    chosen, and why it ended if it was cut."""
    count = len(printer.tokens)
    said = [f"{count} token{'s' * (count != 1)}"]
    if count > 1:
        said.append(f"{(count - 1) / (printer.times[2] - printer.times[1]):.1f} tokens/s")
    said = [", ".join(said), sampling(chat)]
    if printer.tokens[-1] not in (chat.how.eos_token_id or ()):
        if chat.context and count == chat.context - len(prompt):
            said.append(f"cut where the {chat.context} tokens that the model sees are full")
        elif count == chat.how.max_new_tokens:
            said.append(f"cut at {count} tokens; /tokens N")
    return "; ".join(said)


def sampling(chat) -> str:
    return (
        f"temperature {1.0 if chat.how.temperature is None else chat.how.temperature:g}"
        if chat.how.do_sample
        else "greedy"
    )


def save_conversation(name: str, messages: list[dict]) -> None:
    """Write the conversation; a path that cannot be written is said, and the conversation goes
    on."""
    try:
        files.write_json(Path(os.path.expanduser(name)), {"messages": messages})
        print(f"saved {len(messages)} messages in {name}")
    except (OSError, ValueError) as refused:  # ValueError: a NUL in the name
        print(f"not saved: {refused}")


def load_conversation(here: Conversation, name: str) -> None:
    """Go on with the conversation in a file; one that cannot be had is said, and the conversation
    here goes on."""
    wanted = (
        '{"messages": [{"role": "user", "content": "..."}, ...]} with a question in it, its system'
        " prompt first"
    )
    try:
        text = Path(os.path.expanduser(name)).read_text(encoding="utf-8")
        if name.endswith(".jsonl"):
            text = next((line for line in text.split("\n") if line.strip()), "")
        value = json.loads(text)
    except (OSError, ValueError, RecursionError) as broken:
        return print(f"not loaded: {' '.join(str(broken).split())}; wanted {wanted}")
    messages = value.get("messages") if isinstance(value, dict) else None
    if not template.is_conversation(messages):
        return print(f"not loaded: {name} holds no messages; wanted {wanted}")
    tools = messages[0].get("tools")
    system = messages[0]["content"] if messages[0]["role"] == "system" else None
    messages = [dict(message) for message in messages[system is not None :]]
    if tools and messages:
        messages[0]["tools"] = tools
    roles = [message["role"] for message in messages]
    if "user" not in roles or "system" in roles or not {*roles} <= {*template.ROLES}:
        return print(
            f"not loaded: {name} has the roles {', '.join(roles) or 'system'}; wanted {wanted}"
        )
    if any(map(template.BROKEN.search, [system or "", *(m["content"] for m in messages)])):
        return print(
            f"not loaded: {name} holds half a character (\\ud800 to \\udfff); wanted Unicode"
        )
    last = len(roles) - roles[::-1].index("user")
    here.system, here.asked, here.said = system, messages[:last], None
    here.messages = messages if last < len(messages) else messages[:-1]
    print(
        f"loaded {len(messages) + (system is not None)} messages from {name}"
        + "; /retry answers the last one" * (last == len(messages))
    )


def change(here: Conversation, name: str, rest: str, kind, good, wanted: str, now) -> None:
    """Give both models another setting, or say what it is where none is given."""
    try:
        value = kind(rest) if rest else None
    except ValueError:
        value = math.nan
    if value is not None and not good(value):
        return print(f"{rest!r} is not {wanted}")
    each = [chat for chat in (here.student, here.teacher) if chat is not None]
    if value is not None:
        here.args = argparse.Namespace(
            **vars(here.args) | {name: value} | ({"greedy": False} if name == "temperature" else {})
        )
        for chat in each:
            chat.choose(here.args)
    said = [now(chat) for chat in each]
    print(said[0] if len({*said}) == 1 else f"student: {said[0]}; teacher: {said[1]}")


# --- beside the teacher


def diff(here: Conversation) -> None:
    """Print the student's last answer with each token coloured by its KL, the mean, and the places
    where the two are furthest apart."""
    if here.teacher is None:
        return print("/diff needs a teacher: start with --teacher DIR")
    if here.said is None:
        return print("/diff needs an answer: nothing was answered yet")
    sent, ids, tokens = here.said
    try:
        if why := heat.incomparable(here.student.tokenizer, here.teacher.tokenizer):
            return print(f"/diff cannot be: {why}")
        before = here.teacher.ids(sent)
        if here.teacher.context and len(before) + len(tokens) > here.teacher.context:
            return print(
                f"/diff cannot be: {len(before) + len(tokens)} tokens, and the teacher sees"
                f" {here.teacher.context}"
            )
        found = heat.compare_tokens(
            here.student.module,
            here.teacher.module,
            here.student.tokenizer,
            ids,
            tokens,
            teacher_prompt=before,
        )
    except SystemExit as refused:
        return print(terminal.visible(str(refused)))
    except torch.OutOfMemoryError as full:
        return print(f"too little memory for /diff ({str(full).splitlines()[0][:100]})")
    print(heated(found))
    if terminal.takes_colours():
        print("nats: " + " ".join(shaded(f" {nats:g} ", nats) for nats, _ in RAMP))
    print(
        f"mean KL {sum(place.kl for place in found) / max(1, len(found)):.3f} nats over"
        f" {len(found)} tokens; where they differ most:"
    )
    print(furthest(found))


def shaded(text: str, kl: float) -> str:
    """Return a token with its background; where there are no colours, with its KL behind it if that
    is large."""
    if not terminal.takes_colours():
        end = len(text.rstrip("\n"))
        return f"{text[:end]}[{kl:.1f}]{text[end:]}" if kl > MARKED else text
    shade = [code for nats, code in RAMP if kl >= nats][-1]
    if shade is None:
        return text
    # a line end has no background of its own, and would give its colour to the rest of the line
    lines, colour = text.replace("\n", "\u21b5\n").split("\n"), f"38;5;16;48;5;{shade}"
    return "\n".join(terminal.paint(line, colour) for line in lines)


def heated(found: list[heat.ComparedToken]) -> str:
    """Return the answer, each token shaded by its KL; a character of several tokens by the largest
    of theirs."""
    parts, most = [], 0.0
    for place in found:
        most = max(most, place.kl)
        if place.text:
            parts.append(shaded(terminal.visible(place.text), most))
            most = 0.0
    return "".join(parts)


def furthest(found: list[heat.ComparedToken], count: int = 3) -> str:
    """Return a table of the places with the largest KL, in the order of the answer: what each of
    the two finds likeliest there."""
    worst = sorted(sorted(range(len(found)), key=lambda place: -found[place].kl)[:count])
    rows = [["", "token", "KL", "", "p", "likeliest"]]
    for number in worst:
        place = found[number]
        for who, p, best in (
            ("student", place.student_p, place.student),
            ("teacher", place.teacher_p, place.teacher),
        ):
            first = (
                [str(number + 1), repr(place.text), f"{place.kl:.2f}"]
                if who == "student"
                else ["", "", ""]
            )
            rows.append(
                [*first, who, f"{p:.2f}", *(f"{token!r} {chance:.2f}" for token, chance in best)]
            )
    widths = [0] * max(map(len, rows))
    for row in rows:
        for column, cell in enumerate(row):
            widths[column] = max(widths[column], terminal.width(cell))
    lines = []
    for row in rows:
        cells = [cell + " " * (room - terminal.width(cell)) for cell, room in zip(row, widths)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


# --- a classifier


def classify_lines(args, read, device):
    """Print the classes of --prompt, or of every message that is typed, the likeliest first. read:
    see classifier.reader."""
    texts = [args.prompt]
    if args.prompt is None:
        if terminal.both_ways():
            print(
                f"{args.ckpt} on {device}, a classifier: a line of text is answered with its"
                " classes; Ctrl-D to leave"
            )
        ask, more = terminal.prompts(coloured=False)
        texts = iter(lambda: terminal.read_message(ask, more), None)
    for text in texts:
        if text.strip():
            likeliest = read([text])[0][:5]
            print("   ".join(f"{entry['label']} {entry['score']:.3f}" for entry in likeliest))
