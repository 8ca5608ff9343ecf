"""The text of an answer while it is written, token by token: no half characters, and nothing of a
stop string or beyond."""

from collections.abc import Sequence


class Text:
    """Worked example, stop string "END": tokens "a", "b E", "ND c" show "a", "b ", "" and `stopped`
    is True: "ab " is the answer.

    The pieces shown, joined, are the decoding of all tokens at once (special tokens left out), up
    to a stop string. A character that spans several tokens is shown with its last one; what may be
    the beginning of a stop string is held back until the next token tells.
    """

    def __init__(self, tokenizer, stops: Sequence[str] = ()) -> None:
        self.tokenizer, self.stops, self.stopped = tokenizer, stops, False
        # the window that is decoded: tokens that are shown, for what stands before a token changes
        # its text, and new ones
        self.ids: list[int] = []
        self.known, self.held = 0, ""  # how many of them are shown; text that is not

    def add(self, token: int) -> str:
        """Return what can be shown once this token is written."""
        self.ids.append(token)
        before, now = self.decode(self.ids[: self.known]), self.decode(self.ids)
        # a special token adds nothing, and must not become what stands before
        if now == before or now.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        # nor does it say anything of the blank that some tokenizers drop at the beginning
        if len(now) > len(before):
            self.ids, self.known = self.ids[self.known :], len(self.ids) - self.known
        return self.show(now[len(before) :], False)

    def end(self) -> str:
        """Return what is left once no more tokens come."""
        return self.show(self.decode(self.ids)[len(self.decode(self.ids[: self.known])) :], True)

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def show(self, text: str, last: bool) -> str:
        if self.stopped:
            return ""
        text = self.held + text
        if found := [at for stop in self.stops if (at := text.find(stop)) >= 0]:
            self.stopped, self.held = True, ""
            return text[: min(found)]
        longest = max((len(stop) for stop in self.stops), default=1) - 1
        keep = 0 if last else min(longest, len(text))
        while keep and not any(stop.startswith(text[-keep:]) for stop in self.stops):
            keep -= 1
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]
