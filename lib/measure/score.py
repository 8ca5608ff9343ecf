r"""Scores of answers against references: exact match, BLEU, ROUGE, accuracy and macro-F1, with
bootstrap intervals and a paired test.

    # a table
    python -m lib.measure.score runs/demo/stage2-eval/answers.jsonl
    # is the second better than the first?
    python -m lib.measure.score runs/demo/control-eval/answers.jsonl \\
        runs/demo/stage2-eval/answers.jsonl

Reads   .jsonl files, one object a line with "reference" and "answer": chat.py --score writes them,
        and so may anybody. A reference may be a list of texts, of which any is right: a row's score
        is that of the best by each metric (BLEU: sacrebleu's of several references, which takes
        n-grams of any)

All measures are shares from 0 to 1. Corpus BLEU is no mean over rows, and macro-F1 neither, so
every metric is a function of the rows' weights (`measures`): how often a bootstrap sample drew each
of them.

Exact match compares final answers (`final_answer`): what follows the last `####`, or stands in the
last \boxed{}, or follows "Answer:" or "the answer is"; without one of them the last number where
the reference is a number, else the whole text. Numbers compare by value (1,234 = $1234.00); what
the reference has in a box as LaTeX without its spaces; other text as in SQuAD (arXiv:1606.05250):
case, articles, punctuation and blanks do not count.

BLEU is sacrebleu's (13a tokens, exp smoothing; its "zh" tokens where most letters of the references
are Chinese), ROUGE the F-measure of rouge-score without its stemmer. rouge-score's own tokenizer
knows a-z and 0-9 alone, so that any two Chinese texts score 0; `words` gives the same tokens for
Latin script, a token a character where words have no spaces between them, and a token a word
elsewhere.

Accuracy and macro-F1 take the whole texts as labels. A written answer that no row has as its
reference falls into the class `OTHER`.
"""

import json
import logging
import re
import string
import unicodedata
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from lib import files, flags
from lib.measure import results

METRICS = ("exact", "bleu", "rouge1", "rouge2", "rougeL", "accuracy", "macro_f1")
ROUGE = ("rouge1", "rouge2", "rougeL")
OTHER = "(other)"
MARK = re.compile(r"####[ \t]*(\S[^\n]*)")
PHRASE = re.compile(
    r"\banswer(?:\s+is\s*[:：]?|\s*[:：])\s*(?!not\b)(\S[^\n]*?)(?=\.?\s*\n|\.\s|\.?\s*$)"
    r"|答案(?:是|为)?\s*[:：]?\s*([^\n。]+)",
    re.I,
)
# a minus behind a letter, a digit or a bracket subtracts: 78-22 holds 78 and 22. Bounded, for a
# model may write digits without end
NUMBER = re.compile(
    r"(?:(?<![\w.)\]])-)?(?:\d{1,300}(?:\.\d{1,300})?|(?<![\w.])\.\d{1,300})(?:/0{0,9}[1-9]\d{0,300})?"
)
BARE, UNIT = r"\s*%?\.?", r"\s*%?(?:(?!(?i:hundred|thousand|[mbt]r?illion)\b)[^\W\d]+)?\.?"
HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
CHINESE = re.compile(f"[{HAN}]")
UNSPACED = f"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff{HAN}"  # Thai to Khmer, CJK
# as rouge-score, none for é
WORD = re.compile(rf"[a-z0-9]+|[{UNSPACED}]|[^\W\d_a-z\u00c0-\u024f\u1e00-\u1eff{UNSPACED}]+")


def references_of(row: dict) -> list[str]:
    """Return what is accepted as the answer of a row, numbers as text; [] where it says nothing of
    that kind. references_of({"reference": ["four", 4]}) == ["four", "4"]"""
    given = row.get("reference")
    texts = given if isinstance(given, list) else [given]
    plain = all(isinstance(text, str | int | float) for text in texts)
    return [text if isinstance(text, str) else json.dumps(text) for text in texts] if plain else []


def all_references(rows: Sequence[dict]) -> list[str]:
    return [text for row in rows for text in references_of(row)]


# --- exact match


def boxed(text: str) -> str | None:
    r"""Return what stands in the last \boxed{}, whatever braces it holds: boxed(r"so
    \boxed{\frac{1}{2}}.") == r"\frac{1}{2}"."""
    start = text.rfind("\\boxed{")
    depth = 0
    for place in range(start + 6, len(text)) if start >= 0 else ():
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if not depth:
            return text[start + 7 : place]
    return None


def final_answer(text: str) -> str | None:
    """Return the final answer that a text marks as such, or None: final_answer("... makes
    56.\\n#### 56") == "56"."""
    if found := MARK.findall(text):
        return found[-1].strip()
    if (found := boxed(text)) is not None:
        return found.strip()
    found = PHRASE.findall(text)
    return "".join(found[-1]).strip() if found else None


def digits(text: str) -> str:
    r"""Return the text with its numbers as `NUMBER` reads them: digits("\$1,234 or \frac{3}{4}") ==
    "1234 or 3/4"."""
    text = unicodedata.normalize("NFKC", text).replace("\u2212", "-")
    text = re.sub(r"\\[dt]?frac\{(-?\d+)\}\{(\d+)\}", r"\1/\2", text)
    text = re.sub(r"\\?[$€£¥] ?", "", text)
    return re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)


def normalised(text: str) -> str:
    """Return a text without case, articles, punctuation and spare blanks (SQuAD's rule); one that
    is nothing else stays as it is.

    Unlike SQuAD's, what tells numbers and names apart stays: normalised("In C++, 3.5 is not 35.")
    == "in c++ 3.5 is not 35".
    """
    text = re.sub(
        r"(?<=\d),(?=\d{3}(?!\d))", "", unicodedata.normalize("NFKC", text).lower().strip()
    )
    telling = r"(?<=\d)[.,:/-](?=\d)|(?<=[^\W_])#|(?<=[^\W_])\+|(?<=[^\W_]\+)\+"
    stays = {found.start() for found in re.finditer(telling, text)}

    def punctuation(c):
        return c in string.punctuation or unicodedata.category(c).startswith("P")

    kept = "".join(c for i, c in enumerate(text) if i in stays or not punctuation(c))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split()) or " ".join(kept.split()) or text


def latex(text: str) -> str:
    """Return a formula without what does not change its value: spaces, \\left, \\text{}, the d of
    \\dfrac, a last full stop."""
    text = re.sub(r"\\(?:text|mathrm|textbf|mathbf)\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\(?:left|right|[!,;: ])|[\s$]|\.$", "", text)
    return text.replace("dfrac", "frac").replace("tfrac", "frac")


def number(text: str, unit: bool = False) -> Fraction | None:
    """Return the value of a text that is a number and nothing else (with `unit`: and one word
    behind it), or None."""
    whole = re.fullmatch(f"({NUMBER.pattern}){UNIT if unit else BARE}", digits(text).strip())
    return Fraction(whole[1]) if whole else None


def exact_match(reference: str, answer: str) -> bool:
    """Return whether the final answers agree (see the module). An answer that marks none is judged
    by its last number, or as a whole."""
    marked, said = final_answer(reference), final_answer(answer)
    value = number(reference if marked is None else marked, marked is not None)
    if value is not None:
        found = NUMBER.findall(digits(answer if said is None else said.rpartition("=")[2]))
        return bool(found) and Fraction(found[-1 if said is None else 0]) == value
    compared = latex if boxed(reference) is not None else normalised
    return compared(reference if marked is None else marked) == compared(
        answer if said is None else said
    )


# --- BLEU and ROUGE, by the libraries


class Words:
    """The tokenizer that rouge-score asks for."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)


def words(text: str) -> list[str]:
    """Return ROUGE's tokens (see the module): words("Ein Café 自然") == ["ein", "caf", "自",
    "然"]."""
    return WORD.findall(text.lower())


def bleu_of(references: Sequence[str]):
    """Return sacrebleu's BLEU for these references, counting n-grams a sentence at a time."""
    files.need("sacrebleu", "BLEU")
    from sacrebleu.metrics import BLEU

    letters = sum(c.isalpha() for text in references for c in text)
    chinese = sum(len(CHINESE.findall(text)) for text in references)
    return BLEU(tokenize="zh" if 2 * chinese > letters else "13a", effective_order=True)


def rouge_of():
    """Return rouge-score's scorer of ROUGE-1, -2 and -L."""
    files.need("rouge_score", "ROUGE")
    from rouge_score import rouge_scorer

    logging.getLogger("absl").setLevel(logging.WARNING)
    return rouge_scorer.RougeScorer(ROUGE, tokenizer=Words())


# --- classification


def classes_of(
    rows: Sequence[dict], labels: Sequence[str] | None = None
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Return the class numbers of references and answers, (N,) each, and the names: `labels`, else
    those that rows were chosen among ("logp"), else the references, sorted; and `OTHER` at need."""
    names = list(
        labels or rows[0].get("logp") or sorted({text.strip() for text in all_references(rows)})
    )
    place = {name: i for i, name in enumerate(names)}
    pairs = []
    for row in rows:
        right, answer = [text.strip() for text in references_of(row)], row["answer"].strip()
        # of several that are right, the one that was said
        pairs.append([place.get(x, len(place)) for x in (min(right, key=answer.__ne__), answer)])
    reference, predicted = np.array(pairs, np.int64).T
    if max(reference.max(), predicted.max()) == len(place):
        names.append(OTHER)
    return reference, predicted, names


def by_class(rows: Sequence[dict], labels: Sequence[str] | None = None) -> dict:
    """Return evaluate.classification of references and answers, whole texts as labels."""
    from lib import evaluate  # here, not above: it brings torch

    return evaluate.classification(*classes_of(rows, labels))


# --- many rows


def chosen(metrics: str, references: Sequence[str]) -> list[str]:
    """Return the metrics of a list like "bleu,rougeL". "auto": exact where most references mark a
    final answer or are numbers, else BLEU and ROUGE.

    Raises ValueError for an unknown name.
    """
    if metrics == "auto":
        exact = sum(
            final_answer(text) is not None or number(text) is not None for text in references
        )
        return ["exact"] if 2 * exact > len(references) else ["bleu", *ROUGE]
    names = [name.strip() for name in metrics.split(",")]
    if unknown := [name for name in names if name not in METRICS]:
        raise ValueError(f"no metric {unknown[0]!r}, wanted auto, or names of {', '.join(METRICS)}")
    return list(dict.fromkeys(names))


def scorer(
    metrics: Sequence[str], references: Sequence[str]
) -> Callable[[Sequence[str], str], dict[str, float]]:
    """Return the function (a row's references, its answer) -> {metric: the row's own score, by the
    best of them}; a row's bleu is its sentence BLEU. `references`: of all rows."""
    bleu = bleu_of(references) if "bleu" in metrics else None
    rouge = rouge_of() if set(metrics) & set(ROUGE) else None

    def scores(right: Sequence[str], answer: str) -> dict[str, float]:
        parts = rouge.score_multi(right, answer) if rouge else {}
        found = {name: parts[name].fmeasure for name in metrics if name in parts}
        if bleu:
            found["bleu"] = bleu.sentence_score(answer, right).score / 100
        if "exact" in metrics:
            found["exact"] = float(any(exact_match(text, answer) for text in right))
        if set(metrics) & {"accuracy", "macro_f1"}:
            found["accuracy"] = float(answer.strip() in [text.strip() for text in right])
        return {name: found[name] for name in METRICS if name in found}

    return scores


def measures(
    rows: Sequence[dict], metrics: Sequence[str]
) -> dict[str, Callable[[np.ndarray], float]]:
    """Return for each metric the function from how often each row counts, (N,) of whole numbers, to
    the metric's value."""
    found: dict[str, Callable[[np.ndarray], float]] = {}
    references = all_references(rows)

    def mean(column):
        return lambda weights: float(weights @ column / weights.sum())

    if simple := [name for name in metrics if name not in ("bleu", "macro_f1")]:
        score = scorer(simple, references)
        each = [score(references_of(row), row["answer"]) for row in rows]
        found |= {name: mean(np.array([row[name] for row in each])) for name in simple}
    if "bleu" in metrics:
        bleu = bleu_of(references)
        parts = [bleu.sentence_score(row["answer"], references_of(row)) for row in rows]
        counts = np.array(
            [[part.sys_len, part.ref_len, *part.counts, *part.totals] for part in parts], np.int64
        )  # (N, 10)

        def corpus(weights: np.ndarray) -> float:
            answer, reference, *grams = (weights @ counts).tolist()
            return bleu.compute_bleu(grams[:4], grams[4:], answer, reference, "exp").score / 100

        found["bleu"] = corpus
    if "macro_f1" in metrics:
        from lib import evaluate  # here, not above: it brings torch, and the others need none

        reference, predicted, names = classes_of(rows)

        def macro_f1(weights: np.ndarray) -> float:
            table = evaluate.confusion(reference, predicted, len(names), weights)
            return evaluate.class_scores(table)[1]

        found["macro_f1"] = macro_f1
    return {name: found[name] for name in metrics}


def samples(count: int, seed: int, rounds: int):
    """Yield how often each of `count` rows is in a bootstrap sample, (count,), `rounds` times."""
    rng = np.random.default_rng(seed)
    for _ in range(rounds):
        yield np.bincount(rng.integers(count, size=count), minlength=count)


def summarise(
    rows: Sequence[dict], metrics: Sequence[str], seed: int = 0, rounds: int = 1000
) -> dict[str, dict]:
    """Return {metric: {"value", "low", "high", "n"}} of rows with a reference and an answer; low
    and high: the percentile bootstrap's 95 %."""
    found = measures(rows, metrics)
    often = samples(len(rows), seed, rounds)
    drawn = np.array([[value(weights) for value in found.values()] for weights in often])
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0).tolist()  # drawn (rounds, metrics)
    whole = np.ones(len(rows), np.int64)
    return {
        name: {"value": value(whole), "low": low[i], "high": high[i], "n": len(rows)}
        for i, (name, value) in enumerate(found.items())
    }


def paired(
    a: Sequence[dict], b: Sequence[dict], metrics: Sequence[str], seed: int = 0, rounds: int = 1000
) -> dict[str, dict]:
    """Return {metric: {"difference": b - a, "low", "high", "p", "n"}} of two models' answers to the
    same prompts in the same order.

    Every sample draws the same prompts for both. p, two-sided: twice the share of samples in which
    the difference is 0 or has the other sign, and never 0: (count + 1) / (rounds + 1), nor below
    2^(1-N), the least that N signs can say. Source: Koehn 2004, "Statistical significance tests for
    machine translation evaluation".
    """
    seen = f"{len(a)} and {len(b)} answers" if len(a) != len(b) else None
    for number, (old, new) in enumerate(zip(a, b), 1):
        if not seen and results.question(old) != results.question(new):
            seen = f"others in answer {number} of {len(a)}"
    if seen:
        wanted = "the same prompts in the same order"
        files.fail("the answers are to different prompts", seen, wanted)
    pairs = list(zip(measures(a, metrics).values(), measures(b, metrics).values()))
    often = samples(len(a), seed, rounds)
    drawn = np.array([[new(weights) - old(weights) for old, new in pairs] for weights in often])
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0).tolist()  # drawn (rounds, metrics)
    p = np.minimum(1, 2 * (np.minimum((drawn <= 0).sum(0), (drawn >= 0).sum(0)) + 1) / (rounds + 1))
    p = np.maximum(p, 2.0 ** (1 - len(a))).tolist()
    whole = np.ones(len(a), np.int64)
    found = {}
    for name, (old, new), *rest in zip(metrics, pairs, low, high, p):
        found[name] = {"difference": new(whole) - old(whole)}
        found[name] |= dict(zip(("low", "high", "p"), rest)) | {"n": len(a)}
    return found


# --- tables, and the command


def show(metrics: dict[str, dict], per_class: dict[str, dict] | None = None) -> str:
    """Return the table of `summarise`, or of `paired`, and one of the classes where there are
    any."""
    compared = any("p" in m for m in metrics.values())
    first, sign, more = ("difference", "+", ["p"]) if compared else ("value", "", [])
    rows = [["metric", first, "95 % from", "to", *more, "rows"]]
    for name, m in metrics.items():
        values = [f"{m[field]:{sign}.4f}" for field in (first, "low", "high")]
        rows.append([name, *values, *(f"{m[field]:.3f}" for field in more), f"{m['n']:,}"])
    lines = results.table(rows, markdown=False)
    if per_class:
        fields = ("precision", "recall", "f1")
        rows = [["class", *fields, "rows"]]
        for name, scores in per_class.items():
            rows.append([name, *(f"{scores[f]:.4f}" for f in fields), f"{scores['support']:,}"])
        lines += ["", *results.table(rows, markdown=False)]
    return "\n".join(lines)


def read_answers(path: str) -> list[dict]:
    """Return the lines of a file of answers; the first one without a reference or an answer ends
    the program, by its number."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as broken:
        wanted = 'a UTF-8 file of lines like {"reference": "...", "answer": "..."}'
        files.fail(f"{path} cannot be read", broken, wanted)
    rows = []
    for number, row in files.json_lines(lines, path):
        for field in ("reference", "answer"):
            found = isinstance(row, dict) and (
                references_of(row) if field == "reference" else isinstance(row.get(field), str)
            )
            if not found:
                seen, wanted = lines[number - 1][:60], f'a text in the field "{field}"'
                files.fail(f"{path} line {number} has no {field}", seen, wanted)
        rows.append(row)
    if not rows:
        files.fail(f"{path} holds no answer", wanted="at least one line")
    return rows


@files.script
def main(argv=None):
    parser = flags.new_parser(__doc__)
    parser.add_argument(
        "answers",
        nargs="+",
        metavar="FILE.jsonl",
        help="one file of answers, or two to the same prompts",
    )
    parser.add_argument(
        "--metrics",
        default="auto",
        metavar="NAMES",
        help=f"auto, or names of {', '.join(METRICS)} (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the bootstrap (default: %(default)s)"
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=1000,
        metavar="N",
        help="samples of the bootstrap (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    if len(args.answers) > 2:
        parser.error(f"{len(args.answers)} files, wanted one or two")
    if args.rounds < 1 or args.seed < 0:
        parser.error("--rounds must be above 0 and --seed 0 or more")
    sets = [read_answers(path) for path in args.answers]
    metrics = ["accuracy", "macro_f1"]
    if args.metrics != "auto" or not all("logp" in row for row in sets[0]):
        # else they were chosen among labels (lib/measure/labels.py)
        try:
            metrics = chosen(args.metrics, all_references(sets[0]))
        except ValueError as wrong:
            parser.error(f"--metrics: {wrong}")
    of_classes = {"accuracy", "macro_f1"} & set(metrics)
    for path, rows in zip(args.answers, sets):
        classes = by_class(rows)["per_class"] if of_classes else None
        print(f"{path}\n{show(summarise(rows, metrics, args.seed, args.rounds), classes)}\n")
    if len(sets) == 2:
        made = paired(*sets, metrics, args.seed, args.rounds)
        print(f"the second less the first, over the same prompts\n{show(made)}")


if __name__ == "__main__":
    main()
