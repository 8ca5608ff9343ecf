"""The server of `chat.py --serve`: the routes (lib/chat/routes.py) behind waitress, one engine a
model (lib/chat/engine.py)."""

import argparse
import ctypes
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from lib import files, flags
from lib.chat import routes
from lib.chat.api import ServedModel
from lib.chat.engine import Engine, Turns
from lib.run import Interrupt

PATIENCE_S = 2.0  # what open streams get to say that the server is stopping
TRIM_S = 10.0  # how often memory that is free is given back
DEFAULTS = {
    "host": "127.0.0.1",
    "port": 8000,
    "api_key": None,
    "slots": 16,
    "queue": 64,
    "longest": 4096,
    "time_limit": 300.0,
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add --serve and what belongs to it; all of it is None unless it was given."""
    parser.add_argument(
        "--serve",
        action="store_true",
        help="serve a web page and OpenAI's API until Ctrl-C (default: a conversation here)",
    )
    parser.add_argument(
        "--host",
        metavar="ADDRESS",
        help=(
            "address to listen on; one that others can reach demands --api-key (default:"
            f" {DEFAULTS['host']})"
        ),
    )
    parser.add_argument(
        "--port",
        type=int,
        metavar="N",
        help=f"port to listen on; 0 = any free one (default: {DEFAULTS['port']})",
    )
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        help=(
            "what clients must send as Authorization: Bearer KEY (default: $DISTIL_API_KEY, else"
            " none)"
        ),
    )
    parser.add_argument(
        "--slots",
        type=int,
        metavar="N",
        help=f"answers written at once, of each model (default: {DEFAULTS['slots']})",
    )
    parser.add_argument(
        "--queue",
        type=int,
        metavar="N",
        help=f"answers that may wait; more are told to come again (default: {DEFAULTS['queue']})",
    )
    parser.add_argument(
        "--longest",
        type=int,
        metavar="N",
        help=(
            "most tokens of an answer, whatever a request asks for (default:"
            f" {DEFAULTS['longest']})"
        ),
    )
    parser.add_argument(
        "--time-limit",
        type=float,
        metavar="S",
        help=f"seconds after which an answer is cut (default: {DEFAULTS['time_limit']})",
    )


def check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse (exit code 2) flags that cannot work, and put in the defaults where there is a
    server."""
    if not args.serve:
        if given := next((name for name in DEFAULTS if getattr(args, name) is not None), None):
            parser.error(f"--{given.replace('_', '-')} belongs to --serve")
        return
    for name, default in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    args.api_key = args.api_key or os.environ.get("DISTIL_API_KEY")
    flags.positive(parser, args, "slots", "longest", "time_limit")
    if args.queue < 0 or not 0 <= args.port < 1 << 16:
        parser.error(
            f"--queue is {args.queue} and --port {args.port}, wanted 0 or more, and a port below"
            " 65,536"
        )
    if not routes.is_local(args.host) and not args.api_key:
        parser.error(
            f"--host {args.host} can be reached by others: give --api-key KEY (or $DISTIL_API_KEY)"
            " as well"
        )
    for package in ("flask", "waitress", "jsonschema"):
        files.need(package, "--serve")


def open_socket(args) -> socket.socket:
    """Return a socket on --host and --port, before any model is loaded; one line where it cannot be
    had."""
    try:
        return socket.create_server(
            (args.host, args.port),
            family=socket.AF_INET6 if ":" in args.host else socket.AF_INET,
            backlog=1024,
        )
    except OSError as refused:
        files.fail(
            f"{args.host}:{args.port} cannot be listened on",
            refused.strerror or refused,
            "a free port of this machine",
            "--port with another number, or 0 for any free one",
        )


def files_that_may_be_open() -> int:
    """Return how many files and connections the system lets this process have."""
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return 512
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


class Server:
    """The application behind waitress, in threads of its own; `url` is where it is. stop() ends it
    at once: open streams are told so."""

    def __init__(
        self, args, chats: dict[str, object], folder: Path, listening: socket.socket
    ) -> None:
        """chats: by role, the student first."""
        import waitress

        ids = {"student": args.ckpt, "teacher": args.teacher}
        if args.teacher == args.ckpt:
            ids["teacher"] += " (teacher)"
        turns, self.sides = Turns(), []
        for role, chat in chats.items():
            how = chat.sampling()
            engine = Engine(chat.module, chat.tokenizer, how, args.slots, args.queue, turns)
            self.sides.append(ServedModel(role, ids[role], chat, engine))
        self.app = routes.application(args, self.sides, folder)
        # one for each answer that may be in work or wait, and some for who is told that the queue
        # is full
        threads = len(self.sides) * (args.slots + args.queue) + 8
        self.server = waitress.create_server(
            self.app,
            sockets=[listening],
            threads=threads,
            ident="distil",
            connection_limit=min(4 * threads + 100, max(64, files_that_may_be_open() - 200)),
            channel_timeout=60,
            cleanup_interval=1,
            max_request_body_size=16 * routes.BODY_BYTES,
            inbuf_overflow=routes.BODY_BYTES,
            channel_request_lookahead=1,
            clear_untrusted_proxy_headers=True,
            asyncore_use_poll=True,
        )
        self.server.maintenance = self.close_idle  # instead of waitress's own, at every interval
        self.server.adj.asyncore_loop_timeout = 0.1  # how soon the loop sees that it is to end
        host = f"[{args.host}]" if ":" in args.host else args.host
        self.url = f"http://{host}:{listening.getsockname()[1]}"
        self.thread = threading.Thread(target=self.server.run, name="waitress", daemon=True)
        self.thread.start()

    def close_idle(self, now: float) -> None:
        """Close connections that have said nothing for long; where more than half of those that may
        be open are, a second is long for the oldest."""
        adj, channels = self.server.adj, [*self.server.active_channels.values()]
        idle = [one for one in channels if not one.requests and not one.total_outbufs_len]
        idle.sort(key=lambda channel: channel.last_activity)
        spare = len(channels) - adj.connection_limit // 2
        for number, channel in enumerate(idle):
            long = 1 if number < spare else adj.channel_timeout
            if now - channel.last_activity > long:
                channel.will_close = True

    def failed(self) -> bool:
        """Return whether a thread that all depend on has ended."""
        threads = [self.thread, *(side.engine.thread for side in self.sides)]
        return not all(thread.is_alive() for thread in threads)

    def stop(self) -> None:
        for side in self.sides:
            side.engine.close()
        until = time.monotonic() + PATIENCE_S

        def busy():
            return any(
                channel.total_outbufs_len or channel.requests
                for channel in self.server.active_channels.copy().values()
            )

        while busy() and time.monotonic() < until:
            time.sleep(0.01)
        self.server.task_dispatcher.shutdown(timeout=0.5)
        for channel in [*self.server.active_channels.values()]:
            channel.will_close = True
        self.server.close()
        for side in self.sides:
            side.engine.thread.join(PATIENCE_S)
        self.thread.join(PATIENCE_S)


def few_heaps() -> Callable[[int], object]:
    """Let all threads share two heaps, and what is large come from the system and go back to it;
    return what gives back what is free in the heaps. glibc gives each thread its own, returns
    little of it, and takes for small what it has seen freed once, up to 32 MB: 10,000 requests
    left 2 GB, all of it free."""
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(-8, 2)  # M_ARENA_MAX
        libc.mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD
        return libc.malloc_trim
    except (OSError, TypeError, AttributeError):  # another libc
        return lambda _: None


def serve(args, chats: dict[str, object], folder: Path, listening: socket.socket) -> None:
    """Serve until SIGINT or SIGTERM."""
    # that requests wait is what /metrics says
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)
    trim, due = few_heaps(), 0.0
    interrupt = Interrupt(say=lambda _: None)  # there is nothing to save
    server = Server(args, chats, folder, listening)
    print(
        f"chat: {args.ckpt}{f', beside {args.teacher},' if args.teacher else ''} on"
        f" {server.sides[0].chat.device}\n  page     {server.url}\n  API      {server.url}/v1  "
        f" (OpenAI's; described in {server.url}/openapi.json)\n  health   {server.url}/healthz,"
        f" {server.url}/metrics\nCtrl-C ends it",
        flush=True,
    )
    while not interrupt.number:
        time.sleep(0.1)
        if time.monotonic() > due:
            trim(0)
            due = time.monotonic() + TRIM_S
        if server.failed():
            server.stop()
            sys.exit("error: the server's thread or a model failed; see above")
    server.stop()
    print("chat: stopped", flush=True)
    if any(side.engine.thread.is_alive() for side in server.sides):
        # a pass that is longer than our patience: Python would abort when its thread comes back
        # from torch
        os._exit(0)
