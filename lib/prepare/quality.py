"""What is wrong with a written answer: refusals, loops, and near duplicates.

Contract: `rejection` judges an answer by itself. `Duplicates` takes all rows, at 600 bytes each
(200,000 rows: 120 MB, and as much again for the second or two in which they are compared), and then
says which ones repeat an earlier one.

Near duplicates are found by MinHash (Broder 1997): words hashed in threes, the smallest of each of
64 random orders kept; two texts of Jaccard similarity s agree in a share s of them. Rows whose 64
agree in eight places of the same band of eight are compared. Texts whose numbers differ are never
duplicates: "Ann has 38 apples" and "Ann has 45 apples" are two exercises.
"""

import re
import zlib

import numpy as np

SIMILAR = 0.9  # estimated similarity from which a row is a near duplicate
ORDERS, BAND = 64, 8  # random orders; those of one band
LONG = 8  # words: a shorter text is compared as a whole only
DRAWN = np.random.default_rng(0).integers(0, 2**63, (2, 1, ORDERS), np.uint64)
MULTIPLY, ADD = DRAWN * np.uint64(2) + np.uint64(1)  # odd: a permutation

SORRY = (
    r"(?:(?:i'?m|i am|we'?re|we are)\s+(?:\w+\s+)?(?:sorry|afraid)|sorry|(?:my |i"
    r" )?apologi[sz]e?s?|apologies|unfortunately|regrettably)"
)
UNABLE = (
    r"(?:can(?:'t|not| not)|could(?:n't| not)|(?:am|'m|are|'re) (?:unable|not able|not"
    r" allowed)|won't|will not)"
)
DO = (
    r"(?:\s+\w+ly)?(?:\s+to)?\s+(?:help|assist|provide|fulfill?|comply|answer|do"
    r" (?:that|this|so)|generate|write|create|engage|support|discuss|"
    r"continue|share|give|offer|respond|process|complete|access|browse)\b"
)
MACHINE = (
    r"as an? (?:\w+[ -]){0,2}(?:ai|artificial intelligence|language"
    r" model|chatbot)\b[^.!?]{0,40}?,?\s+"
)
CANNOT, ACT = (
    "(?:无法|不能|没有办法|没办法|没法|不可以)",
    "回答|提供|帮助|协助|完成|满足|生成|讨论|处理|为[您你]|给[您你]|执行|参与",
)
REFUSAL = re.compile(
    "|".join(
        (
            rf"{SORRY}\b[\s,.!:;-]*(?:but\s+)?(?:{MACHINE})?(?:i|we)\s*{UNABLE}{DO}",
            (
                rf"{SORRY}\b[\s,.!:;-]*(?:but\s+)?(?:that|this|it)(?:'s|"
                rf" is)\s+(?:\w+\s+){{0,2}}(?:something )?(?:i|we)\s*{UNABLE}"
            ),
            rf"(?:i|we)\s*{UNABLE}{DO}\s+(?:\w+\s+)?(?:you\b|with\s+(?:that|this|your)|that\b|this\b|your\b|to\b|on\b|in\b|instructions|content|information|advice|any\b)",
            rf"{MACHINE}(?:i|we)\s*{UNABLE}",
            rf"(?:非常|十分|很|真的|实在)?(?:抱歉|对不起|不好意思|遗憾)[\s,，。!！、"
            rf":：]*(?:但是?)?(?:作为[^。！？\n]{{0,20}}[,，]\s*)?"
            rf"(?:(?:我|本人|本模型)[^。！？\n]{{0,6}}{CANNOT}|{CANNOT}(?:{ACT}))",
            rf"(?:我|本人)(?:目前|暂时|现在)?{CANNOT}(?:{ACT})",
            (
                r"作为(?:一个|一名|一款)?[^。！？,，"
                r"\n]{0,8}(?:人工智能|ai|语言模型|聊天机器人)(?:助手|模型|程序|系统)*[,，]?\s*我[^。"
                rf"！？\n]{{0,4}}{CANNOT}"
            ),
        )
    ),
    re.IGNORECASE,
)
# of a reasoning model; what it says to the user comes after
THOUGHTS = re.compile(r"\s*<think>.*?</think>", re.DOTALL)
WORDS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\d_]+|\d+|[^\w\s]")
NUMBERS = re.compile(r"\d+")


def refusal(answer: str) -> bool:
    """Return whether the answer begins by declining, in English or Chinese; to be sorry, or to say
    "I cannot stress enough", is not that."""
    said = THOUGHTS.sub("", answer, count=1).lstrip(" \t\r\n\"'*#>").replace("\u2019", "'")
    return REFUSAL.match(said) is not None


def loop(answer: str) -> bool:
    """Return whether the answer ran in circles: its end repeats one piece four times or more, over
    200 characters or half of the answer; or a long answer holds next to nothing new (zlib leaves a
    twelfth of it; prose leaves four tenths, tables and code two tenths).
    """
    text = answer.rstrip()
    tail = text[-4000:]
    back = len(tail) - 24
    before = tail.rfind(tail[-24:], 0, len(tail) - 1) if back > 0 else -1
    if before >= 0:
        period = run = back - before
        while run < len(tail) and tail[-run - 1] == tail[-run - 1 + period]:
            run += 1
        if run >= 60 and run >= 4 * period and (run >= 200 or 2 * run >= len(text)):
            return True
    data = text.encode()
    return len(data) >= 1000 and 12 * len(zlib.compress(data, 6)) < len(data)


def rejection(answer: str, finish: str, keep_truncated: bool) -> str | None:
    """Return why an answer is dropped (the reason it is counted under), or None."""
    if finish == "refused":
        return "refused by the server"
    if finish == "content_filter":
        return "stopped by the server's filter"
    if not THOUGHTS.sub("", answer, count=1).strip():
        return "empty answer" if finish != "length" else "answer cut at the limit"
    if finish == "length" and not keep_truncated:
        return "answer cut at the limit"
    if loop(answer):
        return "answer runs in circles"
    return "answer is a refusal" if refusal(answer) else None


def signature(text: str, salt: int) -> tuple[np.ndarray, int]:
    """Return the MinHash of a text, (ORDERS,) uint32, and a hash of what must be equal beside it:
    its numbers and `salt`."""
    words = WORDS.findall(text.lower())
    numbers = zlib.crc32(" ".join(NUMBERS.findall(text)).encode(), salt & 0xFFFFFFFF)
    if len(words) < LONG:
        return np.full(ORDERS, zlib.crc32(" ".join(words).encode()), np.uint32), numbers
    one = np.fromiter((zlib.crc32(word.encode()) for word in words), np.uint64, len(words))
    threes = (
        one[:-2] * np.uint64(0x9E3779B97F4A7C15)
        ^ one[1:-1] * np.uint64(0xC2B2AE3D27D4EB4F)
        ^ one[2:] * np.uint64(0x165667B19E3779F9)
    )
    threes = np.unique(threes ^ threes >> np.uint64(29))
    smallest = np.full(ORDERS, 0xFFFFFFFF, np.uint32)
    for begin in range(0, len(threes), 1024):  # an answer of any length in half a megabyte
        # (words, ORDERS), modulo 2^64; its high half is the order
        mixed = threes[begin : begin + 1024, None] * MULTIPLY + ADD
        smallest = np.minimum(smallest, (mixed >> np.uint64(32)).min(0).astype(np.uint32))
    return smallest, numbers


class Duplicates:
    """Near duplicates of whole rows, and of answers to one prompt where it has `several`.

    Of rows the answers must be alike by themselves too, or a long context that prompts share would
    make duplicates of all of them; and where an answer is short ("yes"), the prompt must be the
    same.
    """

    def __init__(self, several: bool) -> None:
        self.several, self.signatures, self.salts = several, [[], []], [[], []]

    def add(self, prompt: str, answer: str, key: int) -> None:
        """Note the next row. key: of its prompt."""
        short = len(WORDS.findall(answer)) < LONG
        for which, (text, salt) in enumerate(((f"{prompt}\n{answer}", key * short), (answer, key))):
            made, numbers = signature(text, salt)
            self.signatures[which].append(made.tobytes())
            self.salts[which].append(numbers)

    def found(self) -> np.ndarray:
        """Return which rows, (N,) bool, are near duplicates of an earlier row."""
        duplicate = np.zeros(len(self.salts[0]), bool)
        rows, answers = (
            np.frombuffer(b"".join(made), np.uint32).reshape(-1, ORDERS) for made in self.signatures
        )  # (N, ORDERS) each
        for values, numbers in ((rows, self.salts[0]), (answers, self.salts[1]))[
            : 1 + self.several
        ]:
            salts = np.array(numbers, np.uint32)[:, None]
            for band in range(0, ORDERS, BAND):
                _, first, group = np.unique(
                    np.ascontiguousarray(np.hstack([salts, values[:, band : band + BAND]])).view(
                        f"V{4 * BAND + 4}"
                    )[:, 0],
                    return_index=True,
                    return_inverse=True,
                )
                earlier = first[group]  # the first row of the same band: unique sorts stably
                later = np.flatnonzero(earlier < np.arange(len(values)))
                for kind in (values, answers):
                    later = later[(kind[later] == kind[earlier[later]]).mean(1) >= SIMILAR]
                duplicate[later] = True
        return duplicate
