"""Scores equal the libraries' and written-out references; intervals and the paired test behave as
statistics says; errors are one line."""

import collections
import importlib.util
import json
import re
import string

import numpy as np
import pytest
from rouge_score import rouge_scorer
from sacrebleu import corpus_bleu, sentence_bleu
from scipy import stats
from sklearn import metrics

from lib.measure import results, score

ENGLISH = [
    ("the cat sat on the mat", "the cat is on the mat"),
    ("Debian's kernel, version 6.1, is stable.", "Debian's kernel is stable."),
    ("a", "a"),
    ("Cafés déjà vu in Zürich", "Cafés in Zürich déjà vu"),
    ("one two three four five six", "one two three four five seven eight"),
    ("nothing in common", "wholly other words here"),
]
CHINESE = [
    ("自然语言处理很有趣", "自然语言很有趣"),
    ("今天天气很好", "今天的天气不好"),
    ("机器学习", "机器学习"),
]


def rows_of(pairs):
    return [{"reference": reference, "answer": answer} for reference, answer in pairs]


# --- exact match


@pytest.mark.parametrize(
    "reference, answer",
    [
        ("... #### 1,234", "It costs $1,234.00."),
        ("#### 42", "#### 42 apples"),
        ("#### -3 apples", "so #### -3"),
        ("22", "78-22"),
        ("42", "41, no, 42."),
        ("The answer is 56 coins.", "#### 56"),
        ("Answer: 12", "12%"),
        (r"\boxed{\frac{1}{2}}", "The answer is 0.5"),
        ("1/2", ".5"),
        ("-5", "\u22125"),
        (r"so \boxed{x^{2}-1}", r"thus $\boxed{ x^{2} - 1 }$ and more"),
        (r"\boxed{\text{odd}}", r"\boxed{odd}"),
        (r"\boxed{\dfrac{\pi}{4}}", r"\boxed{\frac{\pi}{4}}"),
        ("Answer: A", "The answer is (a)."),
        ("Paris", "The answer is Paris. It lies there."),
        ("The Beatles!", "beatles"),
        ("答案是42。", "42"),
        ("#### 18", "#### 3 + 15 = 18"),
        ("1234567", "1,234,567"),
    ],
)
def test_answers_that_mean_the_same_match(reference, answer):
    assert score.exact_match(reference, answer)


@pytest.mark.parametrize(
    "reference, answer",
    [
        ("#### 42", "#### 43"),
        ("#### 42", "#### none"),
        ("#### 42", ""),
        ("#### 42", "#### 41, not 42"),
        ("-22", "78-22"),
        ("22", "-22"),
        ("1.5", "15"),
        ("?", "!"),
        (r"\boxed{x-1}", r"\boxed{x1}"),
        (r"\boxed{x-1}", r"\boxed{x+1}"),
        ("Answer: 2 May 1990", "Answer: 2 June 1990"),
        ("Answer: A", "Answer: the"),
        ("Paris", "The answer is London, not Paris"),
        ("The answer is a bore", "The answer is the boredom"),
        ("4/5", "45"),
        ("3", "9" * 5000),
        ("1.5 million", "15 million"),
        ("3,5 kg", "35 kg"),
        ("10:30", "1030"),
        ("C", "C++"),
        ("C#", "C++"),
        ("#### 1.5 million", "1.5 billion"),
        ("#### 5", "The answer is not 5 but 6."),
    ],
)
def test_answers_that_mean_something_else_do_not(reference, answer):
    assert not score.exact_match(reference, answer)


@pytest.mark.parametrize(
    "text, answer",
    [
        ("so 56.\n#### 56", "56"),
        ("#### 1\n#### 2", "2"),
        ("####7", "7"),
        ("56", None),
        (r"\boxed{\frac{1}{2}} or \boxed{a{b}{c}}", "a{b}{c}"),
        (r"\boxed{never closed", None),
        ("**Answer:** Rome\nmore", "** Rome"),
        ("The answer is: 3.5. Or so", "3.5"),
        ("no answer here", None),
    ],
)
def test_final_answer_is_what_a_text_marks_as_such_last(text, answer):
    assert score.final_answer(text) == answer


def squad(text):
    """normalize_answer of the official SQuAD script (evaluate-v1.1.py)."""
    text = "".join(c for c in text.lower() if c not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


@pytest.mark.parametrize(
    "text", ["The  Cat's; a (dog)!", "An apple a day", "in 1,990\tA.D.", "theatre - another"]
)
def test_plain_text_is_normalised_as_squad_does(text):
    assert score.normalised(text) == squad(text) != ""


# --- BLEU and ROUGE


@pytest.mark.parametrize(
    "pairs, tokens",
    [(ENGLISH, "13a"), (CHINESE, "zh"), (ENGLISH[:1], "13a"), (ENGLISH[-1:], "13a")],
)
def test_bleu_is_sacrebleus(pairs, tokens):
    rows, (references, answers) = rows_of(pairs), zip(*pairs)
    assert score.summarise(rows, ["bleu"], rounds=1)["bleu"]["value"] == pytest.approx(
        corpus_bleu(answers, [references], tokenize=tokens).score / 100, abs=1e-12
    )
    one = score.scorer(["bleu"], references)
    for reference, answer in pairs:
        assert one([reference], answer)["bleu"] == pytest.approx(
            sentence_bleu(answer, [reference], tokenize=tokens).score / 100, abs=1e-12
        )


def test_a_drawn_corpus_is_scored_as_sacrebleu_scores_its_rows():
    value, often = score.measures(rows_of(ENGLISH), ["bleu"])["bleu"], np.array([2, 0, 1, 3, 0, 1])
    references, answers = zip(*[pair for pair, count in zip(ENGLISH, often) for _ in range(count)])
    assert value(often) == pytest.approx(corpus_bleu(answers, [references]).score / 100, abs=1e-12)


def test_rouge_is_the_librarys_for_latin_script():
    library, ours = rouge_scorer.RougeScorer(score.ROUGE), score.scorer(score.ROUGE, [])
    for reference, answer in ENGLISH:
        assert ours([reference], answer) == {
            name: made.fmeasure for name, made in library.score(reference, answer).items()
        }


def test_of_several_references_the_best_counts_by_each_metric():
    right, answer = ["Rome", "the city of Rome in Italy", "roma"], "Rome in Italy"
    row = {"reference": right, "answer": answer}
    each = score.scorer(score.METRICS, right)
    alone = [each([reference], answer) for reference in right]
    best = each(right, answer)
    for name in ("exact", *score.ROUGE, "accuracy"):
        assert best[name] == max(one[name] for one in alone)
    sacre = sentence_bleu(answer, right).score / 100
    assert best["bleu"] == pytest.approx(sacre, abs=1e-12)
    made = score.summarise([row, row], ["bleu", "macro_f1"], rounds=1)
    assert made["bleu"]["value"] == pytest.approx(
        corpus_bleu([answer] * 2, [[text] * 2 for text in right]).score / 100, abs=1e-12
    )
    said = {"reference": ["4", 4.0, "four"], "answer": "four"}
    assert score.classes_of([said, {"reference": "4", "answer": "4"}])[0].tolist() == [2, 0]
    assert score.references_of({"reference": None}) == []


def test_rouge_of_other_scripts_is_the_librarys_on_the_same_tokens_spelt_in_latin():
    library, ours = rouge_scorer.RougeScorer(score.ROUGE), score.scorer(score.ROUGE, [])
    spell = collections.defaultdict(lambda: f"w{len(spell)}")
    for reference, answer in CHINESE:
        latin = [" ".join(spell[c] for c in text) for text in (reference, answer)]
        assert ours([reference], answer) == {
            name: made.fmeasure for name, made in library.score(*latin).items()
        }
        assert (
            library.score(reference, answer)["rouge1"].fmeasure
            == 0
            < ours([reference], answer)["rouge1"]
        )
    assert score.words("Das Kernel-Modul 内核 для ядра 6.1") == [
        "das",
        "kernel",
        "modul",
        "内",
        "核",
        "для",
        "ядра",
        "6",
        "1",
    ]


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for metric, package in (("bleu", "sacrebleu"), ("rouge1", "rouge_score")):
        with pytest.raises(SystemExit, match=f"pip install {package}"):
            score.summarise(rows_of(ENGLISH), [metric])


# --- classification


def test_labels_of_texts_are_scored_as_scikit_learn_scores_them():
    reference, answer = (
        ["pos", "neg", "pos", "neg", "pos"],
        [" pos\n", "pos", "maybe", "neg", "perhaps"],
    )
    made = score.summarise(rows_of(zip(reference, answer)), ["accuracy", "macro_f1"], rounds=10)
    folded = ["pos", "pos", "x", "neg", "x"]  # what is no label is one class
    assert made["accuracy"]["value"] == metrics.accuracy_score(reference, folded)
    assert score.classes_of(rows_of(zip(reference, answer)))[2] == ["neg", "pos", score.OTHER]
    assert made["macro_f1"]["value"] == pytest.approx(
        metrics.f1_score(reference, folded, average="macro", zero_division=0), abs=1e-12
    )


def test_labels_that_were_chosen_among_are_classes_even_where_no_reference_has_them():
    reference, answer = ["a", "b", "a", "b"], ["c", "d", "a", "b"]
    rows = [row | {"logp": dict.fromkeys("abcd", 0.0)} for row in rows_of(zip(reference, answer))]
    made = score.summarise(rows, ["macro_f1"], rounds=10)["macro_f1"]["value"]
    assert made == pytest.approx(
        metrics.f1_score(reference, answer, average="macro", zero_division=0), abs=1e-12
    )
    assert score.classes_of(rows)[2] == list("abcd")


# --- intervals, and two models


def coins(right, seed=0):
    """Answers of which these shares are right, one number a model, to the same 400 prompts."""
    drawn = np.random.default_rng(seed).random(400)
    return [
        [
            {"prompt": str(i), "reference": "#### 1", "answer": f"#### {int(x < share)}"}
            for i, x in enumerate(drawn)
        ]
        for share in right
    ]


def test_the_interval_is_scipys_percentile_bootstrap_and_the_same_each_time():
    (rows,) = coins([0.7])
    made = score.summarise(rows, ["exact"], rounds=4000)
    column = np.array([row["answer"] == "#### 1" for row in rows], float)
    wanted = stats.bootstrap(
        (column,), np.mean, method="percentile", n_resamples=5000, rng=1
    ).confidence_interval
    assert made["exact"]["value"] == column.mean() and made["exact"]["n"] == 400
    assert (made["exact"]["low"], made["exact"]["high"]) == pytest.approx(tuple(wanted), abs=0.006)
    assert made["exact"]["high"] - made["exact"]["low"] == pytest.approx(
        wanted[1] - wanted[0], rel=0.07
    )  # 90 % would be 16 % narrower
    assert (
        score.summarise(rows, ["exact"])
        == score.summarise(rows, ["exact"])
        != score.summarise(rows, ["exact"], seed=1)
    )


def test_the_paired_test_agrees_with_mcnemars_exact_one():
    for shares in ([0.70, 0.71], [0.70, 0.73], [0.73, 0.70]):
        a, b = coins(shares)
        flip = np.random.default_rng(2).random(400) < 0.08  # answers that change for no reason
        b = [
            {**row, "answer": "#### 0" if row["answer"] == "#### 1" else "#### 1"} if f else row
            for row, f in zip(b, flip)
        ]
        right = [np.array([row["answer"] == "#### 1" for row in rows]) for rows in (a, b)]
        gained, lost = int((~right[0] & right[1]).sum()), int((right[0] & ~right[1]).sum())
        made = score.paired(a, b, ["exact"], rounds=4000)["exact"]
        assert (
            made["difference"] == pytest.approx((gained - lost) / 400, abs=1e-12)
            and made["low"] < made["difference"] < made["high"]
        )
        assert made["p"] == pytest.approx(stats.binomtest(gained, gained + lost).pvalue, abs=0.12)
        assert (
            score.paired(b, a, ["exact"], rounds=4000)["exact"]["difference"] == -made["difference"]
        )


def test_the_same_answers_do_not_differ_and_far_ones_surely_do():
    a, b = coins([0.5, 0.8])
    same, far = score.paired(a, a, ["exact"])["exact"], score.paired(a, b, ["exact"])["exact"]
    assert (same["difference"], same["low"], same["high"], same["p"]) == (0, 0, 0, 1)
    assert far["p"] == 2 / 1001 and far["low"] > 0.2


def test_pairing_makes_the_interval_of_a_difference_narrower_than_those_of_its_sides():
    a, b = coins([0.50, 0.55])  # every prompt that a answers, b answers too

    def width(made):
        return made["exact"]["high"] - made["exact"]["low"]

    assert width(score.paired(a, b, ["exact"])) < 0.6 * width(score.summarise(a, ["exact"]))


def test_answers_to_other_prompts_are_not_paired():
    (a,) = coins([0.5])
    for b in (
        a[:-1],
        [*a[:-1], {**a[-1], "reference": "#### 2"}],
        [{**a[0], "prompt": "other"}, *a[1:]],
    ):
        with pytest.raises(SystemExit, match="different prompts.*; wanted the same prompts"):
            score.paired(a, b, ["exact"])


@pytest.mark.parametrize(
    "references, wanted",
    [
        (["#### 1", "#### 2", "text"], ["exact"]),
        (["42", "$3"], ["exact"]),
        ([r"\boxed{x}", "The answer is x"], ["exact"]),
        (["a summary of 3 lines", "#### 1"], ["bleu", *score.ROUGE]),
    ],
)
def test_auto_is_exact_where_most_references_hold_a_final_answer(references, wanted):
    assert score.chosen("auto", references) == wanted


# --- the command


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def refused(*argv):
    """Run the command, which must end: return its exit code, or its last words."""
    with pytest.raises(SystemExit) as end:
        score.main([str(word) for word in argv])
    return end.value.code


def test_two_files_are_shown_and_compared(tmp_path, capsys):
    a, b = (write(tmp_path / f"{i}.jsonl", rows) for i, rows in enumerate(coins([0.5, 0.8])))
    score.main([str(a), str(b), "--rounds", "50"])
    said = capsys.readouterr().out
    values = [
        score.summarise(score.read_answers(path), ["exact"], rounds=50)["exact"] for path in (a, b)
    ]
    for value in values:
        assert f"exact {value['value']:.4f} {value['low']:.4f} {value['high']:.4f} 400" in re.sub(
            " +", " ", said
        )
    assert (
        f"{values[1]['value'] - values[0]['value']:+.4f}" in said and "0.039" in said
    )  # p = 2 / 51


@pytest.mark.parametrize(
    "line, words",
    [
        ('{"answer": "x"}', "line 2 has no reference"),
        ('{"reference": "x"}', "line 2 has no answer"),
        ("{", "line 2 is not JSON"),
        ("[]", "line 2 has no reference"),
        ('{"reference": {}, "answer": "3"}', "line 2 has no reference"),
    ],
)
def test_a_broken_file_is_refused_by_line_number(tmp_path, line, words):
    path = tmp_path / "answers.jsonl"
    path.write_text('{"reference": "1", "answer": "1"}\n' + line)
    assert words in refused(path)


def test_files_that_hold_nothing_and_bad_arguments(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", [])
    assert "holds no answer" in refused(path) and "cannot be read" in refused(tmp_path / "none")
    write(path, rows_of(ENGLISH))
    for more in (["--metrics", "blue"], ["--rounds", "0"], [path, path]):
        assert refused(path, *more) == 2
    assert "no metric 'blue'" in capsys.readouterr().err


@pytest.mark.parametrize("lost", ["value", "low", "high", "n"])
def test_scores_that_lack_what_their_table_shows_are_one_line(tmp_path, lost):
    whole = {"value": 0.5, "low": 0.1, "high": 0.9, "n": 3}
    made = {"metrics": {"exact": {k: v for k, v in whole.items() if k != lost}}, "count": 3}
    (tmp_path / "answers.scores.json").write_text(json.dumps(made))
    with pytest.raises(SystemExit, match=f"no metrics.exact.{lost}"):
        results.read_scores(tmp_path, "answers.scores.json")
