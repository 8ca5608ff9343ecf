"""The rows of a data set as a teacher of another tokenizer reads them: its own template, its own
tokens, and which of these stand for the same bytes as which targets.

The prompt is what the teacher's template makes of the row's messages (data/NAME/rows, which
prepare_data.py --export keeps); the answers are the student's very tokens, as text. Behind the
prompt they are tokenized alone, as they are where a model writes them; a turn ends in the token
that ends it for each. Both ways to cut an answer are held against each other in bytes: `groups` are
the shortest stretches that begin and end together.

Worked example: "unhappy!" as un|happy|! and as un|hap|py|!: the groups are un - un, happy - hap py,
! - !.
"""

import itertools
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import jinja2
import numpy as np
from pyarrow import parquet

from lib import data, files, template
from lib.teacher import translate

Seam = tuple[str, str, tuple[str, str]]
Group = tuple[int, int, int, int]  # the first and last + 1 of our tokens, and of theirs
OPENED_EMPTY = re.compile(r"\s*<think>\s*</think>\s*")  # before an answer that does not think
LEAST_ALIKE, FAR = 4, 32  # bytes that are one text again, and how far behind a difference
OPENED = re.compile(r"<think>\s*$")  # by a generation prompt: an answer that thinks opens it itself
PLAIN = {"role", "content", "reasoning_content", "name", "tool_call_id"}  # of a message: texts
TEXTS = {"train": "train", "val": "validation"}  # the files of data/NAME/rows
GROUP_OF_ROWS = 256


def groups(ours: list[bytes], theirs: list[bytes]) -> list[Group]:
    """Return the shortest stretches of tokens that stand for the same bytes. A blank more before
    the text (SentencePiece writes one) is none; where two texts part (another case, a character
    composed otherwise), nothing is paired, and again from where both go on alike.

    groups([b"un", b"happy"], [b"un", b"hap", b"py"]) == [(0, 1, 0, 1), (1, 2, 1, 3)].
    """
    one, other = b"".join(ours), b"".join(theirs)
    blanks = [len(text) - len(text.lstrip(b" ")) for text in (one, other)]
    more = [own - min(blanks) for own in blanks]
    mine, others = token_ends(ours, more[0]), token_ends(theirs, more[1])
    found = []
    for a, b, size in alike(one[more[0] :], other[more[1] :]):
        shared = [at for at in range(size + 1) if a + at in mine and b + at in others]
        for begin, end in itertools.pairwise(shared):
            found.append((mine[a + begin], mine[a + end], others[b + begin], others[b + end]))
    return found


def token_ends(tokens: list[bytes], blank: int) -> dict[int, int]:
    """Return how many tokens there are before each place where one begins or the last one ends; of
    empty ones the last counts. blank: bytes of the first that are none."""
    at = np.concatenate([[blank], np.cumsum([len(token) for token in tokens], dtype=np.int64)])
    return {int(place) - blank: number for number, place in enumerate(at) if place >= blank}


def alike(one: bytes, other: bytes) -> list[tuple[int, int, int]]:
    """Return (place, place, length) of the stretches that two texts have in common, in order. Where
    they part they go on at the nearest LEAST_ALIKE bytes that are the same, at most FAR bytes on.

    alike(b"caffe latte", b"cafe latte") == [(0, 0, 3), (4, 3, 7)].
    """
    found, a, b = [], 0, 0
    while True:
        if size := len(os.path.commonprefix([one[a:], other[b:]])):
            found.append((a, b, size))
        a, b = a + size, b + size
        jump = next(
            (
                (i, total - i)
                for total in range(1, FAR)
                for i in range(total + 1)
                if (ahead := one[a + i : a + i + LEAST_ALIKE])
                == other[b + total - i : b + total - i + LEAST_ALIKE]
                and len(ahead) == LEAST_ALIKE
            ),
            None,
        )
        if jump is None:
            return found
        a, b = a + jump[0], b + jump[1]


def runs(answer: np.ndarray) -> list[tuple[int, int]]:
    """Return the (start, end) of each stretch of targets of a row; answer (L,)."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], answer, [False]]).astype(np.int8)))
    return [(int(start), int(end)) for start, end in edges.reshape(-1, 2)]


class Reader:
    """Reads rows with a teacher's tokenizer."""

    def __init__(self, dataset: data.Dataset, teacher, table: translate.Table) -> None:
        self.ours, self.theirs, self.table = dataset.tokenizer(), teacher, table
        self.mine, self.other = translate.bytes_of(self.ours), translate.bytes_of(teacher)
        self.special, self.end = template.special_ids(self.ours), ""
        if teacher.chat_template:
            *_, self.end = template.marks(teacher, str(teacher.chat_template))
        for known, one in ((self.mine, self.ours), (self.other, teacher)):
            names = template.token_names(one)
            known |= {id: names[id].encode() for id in template.special_ids(one)}
        self.think = dataset.meta.get("args", {}).get("think")
        self.bos = [teacher.bos_token_id] if template.adds_bos(teacher) else []

    def shown(self, messages: list[dict], answered: bool = False) -> str:
        """Return messages as their template writes them; without an answer at the end the prompt to
        it, in which no trace is open."""
        some = template.without_think(messages) if self.think == "drop" else messages
        text = template.render(self.theirs, some, add_generation_prompt=not answered)
        return text if answered else OPENED.sub("", text)

    def tokens(self, text: str) -> list[int]:
        return self.theirs(text, add_special_tokens=False, verbose=False)["input_ids"]

    def answer(self, ids: list[int], lead: str = "") -> tuple[list[int], list[Group]]:
        """Return an answer in their tokens, and its groups. ids: ours, with the end of turn; lead:
        a blank that their template writes before it."""
        end, said = ids[-1:], ids[:-1]
        if end and end[0] not in self.special:
            end, said = [], ids
        text = self.ours.decode(said, clean_up_tokenization_spaces=False)
        theirs = self.tokens(lead + text)
        found = groups([self.mine[id] for id in said], [self.other[id] for id in theirs])
        ended = [int(id) for id in self.table.theirs[end] if id >= 0]
        if ended:
            found.append((len(said), len(said) + 1, len(theirs), len(theirs) + 1))
        return theirs + ended, found

    def text(self, ids: np.ndarray, answer: np.ndarray) -> tuple[list[int], list[Group]]:
        """Return a plain text in their tokens, and its groups by the places of both."""
        head = int(int(ids[0]) in self.special)  # bos
        theirs, found = self.answer(ids[head:].tolist())
        ahead = len(self.bos)
        moved = [(a + head, b + head, c + ahead, d + ahead) for a, b, c, d in found]
        return self.bos + theirs, [one for one in moved if one[0] > 0 and one[2] > 0]

    def turns(
        self, messages: list[dict], ids: np.ndarray, stretches: list[tuple[int, int]]
    ) -> list[tuple[int, int]] | None:
        """Return which message each stretch of targets of a row answers, and where in the row its
        prompt ends: by our own template's prompts. None where these do not lie in the row."""
        answers = [
            turn for turn, message in enumerate(messages) if turn and template.is_answer(message)
        ]
        if len(answers) == len(stretches) and self.think != "mask":
            return [(turn, start) for turn, (start, _) in zip(answers, stretches)]
        found: list[tuple[int, int]] = []
        places = []
        shown = template.without_think(messages) if self.think == "drop" else messages
        for turn in answers:
            prompt = template.prompt_ids(self.ours, shown[:turn])
            if ids[: len(prompt)].tolist() == prompt:
                places.append((turn, len(prompt)))
        for start, _ in stretches:
            before = [place for place in places if place[1] <= start]
            if not before or before[-1] in found:
                return None
            found.append(before[-1])
        return found

    def conversation(
        self, messages: list[dict], ids: np.ndarray, answer: np.ndarray
    ) -> tuple[list[int], list[Group]] | str:
        """Return a conversation in their tokens, and its groups by the places of both; or why it
        cannot be read."""
        if not self.theirs.chat_template:
            files.fail(
                "the teacher's tokenizer has no chat template",
                wanted="one, to read the rows as the teacher was taught to",
                mend="a chat_template.jinja in the teacher's folder",
            )
        stretches = runs(answer)
        if (turns := self.turns(messages, ids, stretches)) is None:
            return "answers that are not told apart"
        whole: list[int] = []
        found: list[Group] = []
        text = rest = ""  # of their template, up to the last answer's end, and behind it
        for (turn, before), (start, end) in zip(turns, stretches):
            lead = self.ours.decode(ids[before:start], clean_up_tokenization_spaces=False)
            said = self.ours.decode(ids[start:end], skip_special_tokens=True)
            try:
                asked = self.shown(messages[:turn])
                seam = self.seam(asked, self.shown(messages[: turn + 1], True), lead + said)
                if seam is None:  # Mistral writes the system message into the last question alone
                    one = self.shown(messages[turn - 1 : turn])
                    both = self.shown(messages[turn - 1 : turn + 1], True)
                    seam = (self.seam(one, both, lead + said) or ("", ""))[:2] + (("", ""),)
            except (jinja2.TemplateError, TypeError):
                return "refused by the teacher's template"
            if not text or not asked.startswith(text + rest):
                # they show an earlier answer otherwise: what was said of it is lost
                whole, text, rest, found = [], "", "", []
            between, blank, closed = seam
            whole += self.tokens(asked[len(text) :] + between + lead)
            theirs, own = self.answer(ids[start:end].tolist(), blank)
            at = len(whole)
            found += [(start + a, start + b, at + c, at + d) for a, b, c, d in own if at + c > 0]
            whole += theirs
            text, rest = closed
        return whole, found

    def seam(self, asked: str, shown: str, said: str) -> Seam | None:
        """Return what their template writes between the prompt and an answer: what belongs to the
        prompt (an empty trace, line breaks), and a blank that belongs to the answer (Mistral); and
        its text up to the end of the turn, and from there on ("" where it shows another answer).
        None where the answered conversation does not begin with the prompt."""
        if not shown.startswith(asked):
            return None
        behind, end = shown[len(asked) :], self.end
        trace = OPENED_EMPTY.match(behind)
        between = trace.group() if trace and not said.lstrip().startswith(template.OPEN) else ""
        behind = behind[len(between) :]
        blanks = behind[: len(behind) - len(behind.lstrip())]
        own = said[: len(said) - len(said.lstrip())]
        blanks = blanks.removesuffix(own)
        between, blank = (between, blanks) if blanks == " " else (between + blanks, "")
        stop = behind.rfind(end) if end else -1
        if stop < 0 or behind[:stop].strip() != said.strip():
            return between, blank, ("", "")
        closed = len(shown) - len(behind) + stop + len(end)
        return between, blank, (shown[:closed], shown[closed:])


def messages_of(path: Path) -> Iterator[list[dict] | str]:
    """Yield the rows that a parquet file of data/NAME/rows holds, as the templates want them."""
    with parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(GROUP_OF_ROWS):
            for row in batch.column(0).to_pylist():
                if isinstance(row, str):
                    yield row
                    continue
                yield [
                    {
                        name: value if name in PLAIN else json.loads(value)
                        for name, value in message.items()
                        if value is not None
                    }
                    for message in row
                ]


class Reread(data.Split):
    """A split as the teacher reads it: the same rows in the same order, their targets the tokens of
    all groups. groups: of each row (n, 4), as `Group` counts, but among the row's targets alone;
    lost: {why: rows}, which have no target."""

    groups: list[np.ndarray]
    lost: dict[str, np.ndarray]


def reread(dataset: data.Dataset, name: str, reader: Reader, max_len: int) -> Reread:
    """Return a split (train or val) as the teacher reads it. The targets of a row are the tokens of
    all its groups; a row of which nothing can be told, or that is longer than `max_len` tokens, has
    none and stands among the `lost`."""
    split, folder = getattr(dataset, name), dataset.folder / "rows"
    path = folder / f"{TEXTS[name]}.parquet"
    if len(split.rows) and not path.exists():
        files.fail(
            f"{path} is missing",
            "a data set without its rows as text",
            "the messages, for the teacher's own template",
            "prepare_data.py with --export and --fresh",
        )
    rows, found = [], []
    lost: dict[str, list[int]] = {}
    for number, row in enumerate(messages_of(path) if len(split.rows) else ()):
        ids, answer = split.row(number)
        made = (
            reader.text(ids, answer)
            if isinstance(row, str)
            else reader.conversation(row, ids, answer)
        )
        if not isinstance(made, str) and len(made[0]) > max_len:
            made = f"longer than --tokens-per-microbatch {max_len} of the teacher's tokens"
        if not isinstance(made, str) and not made[1]:
            made = "no answer token in common"
        if isinstance(made, str):
            lost.setdefault(made, []).append(number)
            made = [0], []
        theirs, own = np.array(made[0], np.uint32), np.array(made[1], np.int64).reshape(-1, 4)
        mask = np.zeros(len(theirs), bool)
        for _, _, first, last in own:
            mask[first:last] = True
        rows.append((theirs, mask, int(split.rows[number]["source"])))
        found.append(among_targets(own, answer, mask))
    if len(rows) != len(split.rows):
        files.fail(f"{path} does not fit the rows", len(rows), len(split.rows), data.MAKE_AGAIN)
    if not rows:
        rows = [(np.zeros(1, np.uint32), np.zeros(1, bool), 0)]
    result = Reread.of(rows)
    assert isinstance(result, Reread)
    result.groups, result.lost = found, {why: np.array(some) for why, some in lost.items()}
    return result


def among_targets(own: np.ndarray, answer: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Return groups (n, 4) of places as groups of target numbers; answer, theirs: the masks."""
    mine, other = (np.concatenate([[0], np.cumsum(mask)]) for mask in (answer, theirs))
    made = np.stack([mine[own[:, 0]], mine[own[:, 1]], other[own[:, 2]], other[own[:, 3]]], 1)
    return made.astype(np.int32)
