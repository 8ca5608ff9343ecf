"""SIGTERM and SIGINT as a flag that a loop looks at: save, then leave. A second signal leaves at once."""
import signal
from collections.abc import Callable


class Interrupt:
    """Catch both signals from now on; `number` is the one that came, or 0."""

    def __init__(self, say: Callable[[str], None] = print) -> None:
        self.number, self.say = 0, say
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, _frame) -> None:
        if self.number:
            raise SystemExit(128 + number)
        self.number = number
        self.say(f"{signal.Signals(number).name}: saving, then leaving (once more: leave at once)")

    def leave(self, said: str) -> None:
        """End the program with the shell's code for the signal (143 or 130), if one came."""
        if self.number:
            self.say(said)
            raise SystemExit(128 + self.number)
