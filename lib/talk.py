"""A conversation in a terminal, or in a pipe: messages come from stdin, answers go to stdout while they are written."""
import sys
from pathlib import Path

from transformers.generation.streamers import BaseStreamer

from lib import files, template

HELP = """/help         this text
/reset        forget the conversation
/system TEXT  set the system prompt; without TEXT, remove it
/save FILE    write the conversation as JSON
/exit         leave, as Ctrl-D does
A line that ends in a backslash goes on in the next one; a block between two lines of \"\"\" is one message. Ctrl-C stops an answer."""


def read_message(ask, more):
    """Return one message of the user, which may span lines (see HELP); None at the end of the input."""
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


def save(path, messages):
    """Write the conversation; a path that cannot be written is said, and the conversation goes on."""
    try:
        files.write_json(Path(path), {"messages": messages})
        print(f"saved {len(messages)} messages in {path}")
    except OSError as refused:
        print(f"not saved: {refused}")


def converse(args, chat):
    """Read messages and answer them until the user leaves."""
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if terminal:
        try:
            import readline  # noqa: F401  input() gets a history and line editing by its mere presence
        except ImportError:
            pass
        print(f"{args.ckpt} on {chat.device}; /help for help, Ctrl-D to leave")
    # readline must know which characters take no room on the line: \001 ... \002
    ask, more = ("\001\033[1;32m\002>\001\033[0m\002 ", ". ") if terminal else ("", "")
    system, history = args.system, []
    while True:
        try:
            message = read_message(ask, more)
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /exit leaves)")
            continue
        if message is None:
            print(end="\n" if terminal else "")
            return
        command, _, rest = message.strip().partition(" ")
        rest = rest.strip()
        if not command:
            continue
        if command == "/exit":
            return
        if command == "/help":
            print(HELP)
        elif command == "/reset":
            history = []
            print("the conversation is forgotten")
        elif command == "/system":
            system = rest or None
            print(f"system prompt: {system}" if system else "no system prompt of yours")
        elif command == "/save":
            save(rest, template.with_system(history, system)) if rest else print("/save needs a file name")
        elif message.startswith("/"):
            print(f"unknown command {command}; /help lists them (a space before it sends it to the model)")
        else:
            history = say(chat, system, [*history, {"role": "user", "content": message}])


def say(chat, system, history):
    """Print the answer to the last message and return the history with it; without that message where nothing could be answered."""
    try:
        ids, dropped = chat.fit(template.with_system(history, system))
    except SystemExit as refused:  # the chat template's one-line error must not end the conversation
        print(refused)
        return history[:-1]
    history = history[dropped:]
    if chat.context and len(ids) >= chat.context:
        print(f"this message is too long: {len(ids)} tokens, and the model sees {chat.context}")
        return history[:-1]
    if dropped:
        print(f"(the {dropped} oldest messages no longer fit into {chat.context} tokens and are forgotten)")
    printer = Printer(chat.tokenizer)
    try:
        text = chat.answer([ids], printer)[0]
    except KeyboardInterrupt:
        print(" (stopped)", flush=True)
        text = printer.text
        if not text:
            return history[:-1]
    return [*history, {"role": "assistant", "content": text}]


class Printer(BaseStreamer):
    """Prints an answer while it is written. `text` is what stands there: the decoding of all tokens so far, less an unfinished character."""

    def __init__(self, tokenizer):
        self.tokenizer, self.tokens, self.text = tokenizer, None, ""

    def put(self, value):
        if self.tokens is None:  # the first call brings the prompt
            self.tokens = []
            return
        self.tokens += value.flatten().tolist()
        text = self.tokenizer.decode(self.tokens, skip_special_tokens=True)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self.show(text)

    def end(self):
        self.show(self.tokenizer.decode(self.tokens or [], skip_special_tokens=True))
        print(flush=True)

    def show(self, text):
        print(text[len(self.text):], end="", flush=True)
        self.text = text


def classify(args, read, device):
    """Print the classes of --prompt, or of every message that is typed, the likeliest first. read: see classifier.reader."""
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if terminal and args.prompt is None:
        print(f"{args.ckpt} on {device}, a classifier: a line of text is answered with its classes; Ctrl-D to leave")
    typed = iter(lambda: read_message("> " if terminal else "", ". " if terminal else ""), None)
    for text in typed if args.prompt is None else [args.prompt]:
        if text.strip():
            print("   ".join(f"{entry['label']} {entry['score']:.3f}" for entry in read([text])[0][:5]))
