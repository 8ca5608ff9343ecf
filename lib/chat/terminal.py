"""A terminal, or a pipe: what is shown there, and what is typed.

Contract: on a terminal no control character of a model reaches it (`visible`); colours only where
they are wanted (`takes_colours`). What is typed is kept over starts, for its user alone.
"""

import os
import sys
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path

from transformers.generation.streamers import BaseStreamer

from lib.chat.text import Text

HISTORY_LINES = 1000  # kept over starts
CONTROL = (
    {number: chr(0x2400 + number) for number in range(32) if number not in b"\n\t"}
    | {127: "\u2421"}
    | {number: f"\\x{number:02x}" for number in range(128, 160)}
)


# --- what is shown


def takes_colours() -> bool:
    """Return whether stdout takes colours: a terminal that is not dumb, and nobody who wants none
    (no-color.org)."""
    return (
        sys.stdout.isatty()
        and not os.environ.get("NO_COLOR")
        and os.environ.get("TERM", "dumb") != "dumb"
    )


def both_ways() -> bool:
    """Return whether a person types and reads: stdin and stdout are terminals."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def paint(text: str, code: str) -> str:
    """Return the text in a colour (the numbers of an escape sequence), where there are colours."""
    return f"\033[{code}m{text}\033[0m" if text and takes_colours() else text


def visible(text: str) -> str:
    """Return a model's text with its control characters, line ends and tabs apart, as pictures:
    visible("\\x1b[2J") == "\u241b[2J".

    An escape sequence of a model could clear the screen, rename the window, or, in some terminals,
    type.
    """
    return text.translate(CONTROL)


class Printer(BaseStreamer):
    """Prints an answer while it is written. `text` is what stands there, of `tokens`. times: when
    the prompt was given, when the first token came, and when the last. stopped: whether it is cut
    off."""

    def __init__(self, tokenizer):
        self.writing, self.text, self.tokens = Text(tokenizer), "", None
        self.times, self.stopped = [], False
        self.shown = visible if sys.stdout.isatty() else str

    def put(self, value):
        self.times = [*self.times[:2], time.perf_counter()]
        if self.tokens is None:  # the first call brings the prompt
            self.tokens = []
            return
        for token in value.flatten().tolist():
            self.tokens.append(token)
            self.show(self.writing.add(token))

    def end(self):
        self.show(self.writing.end())
        print(flush=True)

    def show(self, piece):
        print(self.shown(piece), end="", flush=True)
        self.text += piece


def width(text: str) -> int:
    """Return the columns that a text takes in a terminal."""
    return sum(
        0 if unicodedata.combining(letter) else 1 + (unicodedata.east_asian_width(letter) in "WF")
        for letter in text
    )


# --- what is read


def prompts(coloured: bool = True) -> tuple[str, str]:
    """Return what stands before a message, and before the lines that it goes on in."""
    if not both_ways():
        return "", ""
    # readline must know which characters take no room on the line: \\001 ... \\002
    green = "\001\033[1;32m\002>\001\033[0m\002 "
    return green if coloured and takes_colours() else "> ", ". "


def read_message(ask: str, more: str) -> str | None:
    """Return one message of the user, None at the end of the input. It goes on in the next line
    after a backslash, and up to the second of two \"\"\"."""
    try:
        line = input(ask)
        if line.startswith('"""'):
            block = line[3:]
            while not block.endswith('"""'):
                block += "\n" + input(more)
            return block[:-3].strip("\n")
        while line.endswith("\\"):
            line = line[:-1] + "\n" + input(more)
        return line
    except EOFError:
        return None


def history_file() -> Path:
    """Return where typed lines are kept over starts (the XDG rules: a relative folder counts as
    none)."""
    state = os.environ.get("XDG_STATE_HOME", "")
    return Path(
        state if os.path.isabs(state) else os.path.expanduser("~/.local/state"),
        "distil",
        "chat_history",
    )


def line_editing(complete: Callable[[str, str], list[str]]) -> Callable[[], None]:
    """Give input() line editing, Tab, and the lines of earlier starts. Return what keeps the newest
    lines: called after each, nothing is lost however the program ends. Where the file cannot be
    had, that is said once, and the conversation goes on. complete(line, word): what Tab offers.
    """
    try:
        import readline
    except ImportError:
        return lambda: None
    path = history_file()
    readline.set_completer(
        lambda word, state: dict(enumerate(complete(readline.get_line_buffer(), word))).get(state)
    )
    readline.set_completer_delims(" ")
    readline.parse_and_bind(
        "bind ^I rl_complete" if "libedit" in (readline.__doc__ or "") else "tab: complete"
    )
    readline.set_history_length(HISTORY_LINES)
    kept = None  # lines of the history that the file holds; None: there is no file

    def keep():
        nonlocal kept
        if kept is None:
            return
        now = readline.get_current_history_length()
        fresh, kept = now - kept, now
        try:
            # what another conversation wrote meanwhile stays
            if fresh and hasattr(readline, "append_history_file"):
                readline.append_history_file(fresh, path)
            elif fresh:
                readline.write_history_file(path)
        except OSError as refused:
            print(f"(what you type is no longer kept: {refused})")
            kept = None

    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.fchmod(handle, 0o600)  # what is asked is nobody else's business
        finally:
            os.close(handle)
        readline.read_history_file(path)
        kept = readline.get_current_history_length()
    except OSError as refused:
        print(f"(what you type is not kept: {refused})")
    return keep
