"""The rows of a data set as a teacher of another tokenizer reads them: its own template, its own
tokens, and which of these stand for the same bytes as which targets.

The prompt is what the teacher's template makes of the row's messages (data/NAME/rows, which
prepare_data.py --export keeps); the answers are the student's very tokens, as text. Behind the
prompt they are tokenized alone, as they are where a model writes them; a turn ends in the token
that ends it for each. Both ways to cut an answer are held against each other in bytes: `groups` are
the shortest stretches that begin and end together. Where the texts part, nothing is known of what
follows.

Worked example: "unhappy!" as un|happy|! and as un|hap|py|!: the groups are un - un, happy - hap py,
! - !.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import jinja2
import numpy as np
from pyarrow import parquet

from lib import data, files, template
from lib.teacher import translate

Group = tuple[int, int, int, int]  # the first and last + 1 of our tokens, and of theirs
OPENED = re.compile(r"<think>\s*$")  # by a generation prompt: an answer that thinks opens it itself
PLAIN = {"role", "content", "reasoning_content", "name", "tool_call_id"}  # of a message: texts
TEXTS = {"train": "train", "val": "validation"}  # the files of data/NAME/rows
GROUP_OF_ROWS = 256


def groups(ours: list[bytes], theirs: list[bytes]) -> list[Group]:
    """Return the shortest stretches of tokens that stand for the same bytes, up to where two texts
    part. A blank before the text that only one of them has (SentencePiece writes one) is none.

    groups([b"un", b"happy"], [b"un", b"hap", b"py"]) == [(0, 1, 0, 1), (1, 2, 1, 3)].
    """
    one, other = b"".join(ours), b"".join(theirs)
    before = [0, 0]
    if one[:1] != other[:1]:
        before = [int(text[:1] == b" ") for text in (one, other)]
    one, other = one[before[0] :], other[before[1] :]
    same = (
        len(one)
        if other.startswith(one)
        else next(
            (i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other))
        )
    )

    def ends(tokens: list[bytes], blank: int) -> dict[int, int]:
        """The number of tokens up to each place where one ends: the last, where some are empty."""
        at = np.cumsum([len(token) for token in tokens]) - blank
        return {int(place): number + 1 for number, place in enumerate(at)}

    mine, others = ends(ours, before[0]), ends(theirs, before[1])
    found, last = [], (0, 0)
    for place in sorted(mine.keys() & others.keys()):
        if 0 < place <= same:
            found.append((last[0], mine[place], last[1], others[place]))
            last = mine[place], others[place]
    return found


def runs(answer: np.ndarray) -> list[tuple[int, int]]:
    """Return the (start, end) of each stretch of targets of a row; answer (L,)."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], answer, [False]]).astype(np.int8)))
    return [(int(start), int(end)) for start, end in edges.reshape(-1, 2)]


def turns_of(messages: list[dict], said: list[str]) -> list[int] | None:
    """Return which messages the answers of a row are, given what they say; None where that cannot
    be told (some of them are no targets, and none of them matches)."""
    answers = [
        turn for turn, message in enumerate(messages) if turn and template.is_answer(message)
    ]

    def is_said(turn: int, text: str) -> bool:
        if template.beside_text(messages[turn]):
            return len(said) == len(answers)
        begin = min(24, *(len(part.strip()) for part in (text, messages[turn]["content"])))
        return text.strip()[:begin] in messages[turn]["content"]

    for turns in (answers[: len(said)], answers[-len(said) :]):
        if len(turns) == len(said) and all(map(is_said, turns, said)):
            return turns
    return None


class Reader:
    """Reads rows with a teacher's tokenizer."""

    def __init__(self, dataset: data.Dataset, teacher, table: translate.Table) -> None:
        self.ours, self.theirs, self.table = dataset.tokenizer(), teacher, table
        if not teacher.chat_template and dataset.tokenizer().chat_template:
            files.fail(
                "the teacher's tokenizer has no chat template",
                wanted="one, to read the rows as the teacher was taught to",
                mend="a chat_template.jinja in the teacher's folder",
            )
        self.mine, self.other = translate.bytes_of(self.ours), translate.bytes_of(teacher)
        self.special = template.special_ids(self.ours)
        for known, one in ((self.mine, self.ours), (self.other, teacher)):
            names = template.token_names(one)
            known |= {id: names[id].encode() for id in template.special_ids(one)}
        self.think = dataset.meta.get("args", {}).get("think")
        self.bos = [teacher.bos_token_id] if template.adds_bos(teacher) else []

    def asked(self, messages: list[dict]) -> str:
        """Return the prompt as their template writes it."""
        shown = template.without_think(messages) if self.think == "drop" else messages
        text = template.render(self.theirs, shown, add_generation_prompt=True)
        return OPENED.sub("", text)

    def tokens(self, text: str) -> list[int]:
        return self.theirs(text, add_special_tokens=False, verbose=False)["input_ids"]

    def answer(self, ids: list[int]) -> tuple[list[int], list[Group]]:
        """Return an answer in their tokens, and its groups. ids: ours, with the end of turn."""
        end, said = ids[-1:], ids[:-1]
        if end[0] not in self.special:
            end, said = [], ids
        text = self.ours.decode(said, clean_up_tokenization_spaces=False)
        theirs = self.tokens(text)
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

    def conversation(
        self, messages: list[dict], ids: np.ndarray, answer: np.ndarray
    ) -> tuple[list[int], list[Group]] | str:
        """Return a conversation in their tokens, and its groups by the places of both; or why it
        cannot be read."""
        stretches = runs(answer)
        said = [
            self.ours.decode(ids[start:end].tolist(), skip_special_tokens=True)
            for start, end in stretches
        ]
        if (turns := turns_of(messages, said)) is None:
            return "answers that are not told apart"
        whole: list[int] = []
        found: list[Group] = []
        text = ""
        for turn, (start, end) in zip(turns, stretches):
            try:
                asked = self.asked(messages[:turn])
            except (jinja2.TemplateError, TypeError):
                return "refused by the teacher's template"
            if self.think == "mask":  # what the answer has before its targets
                before = len(template.prompt_ids(self.ours, messages[:turn]))
                asked += self.ours.decode(ids[before:start], clean_up_tokenization_spaces=False)
            if not asked.startswith(text):  # it shows an earlier answer otherwise: that one is lost
                whole, text, found = [], "", []
            whole += self.tokens(asked[len(text) :])
            theirs, own = self.answer(ids[start:end].tolist())
            at = len(whole)
            found += [(start + a, start + b, at + c, at + d) for a, b, c, d in own if at + c > 0]
            whole += theirs
            text = asked + self.theirs.decode(theirs, clean_up_tokenization_spaces=False)
        return whole, found


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
            made = f"longer than {max_len} of the teacher's tokens"
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
    return np.stack([mine[own[:, 0]], mine[own[:, 1]], other[own[:, 2]], other[own[:, 3]]], 1)
