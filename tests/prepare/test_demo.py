import random
import re

import pyarrow.parquet
import pytest

from lib import template
from lib.measure import score
from lib.prepare import demo

SIZES = ["--teacher-rows", "400", "--student-rows", "60"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "demo"
    demo.main(["--out", str(out), *SIZES])
    return out


def rows(folder, name):
    return pyarrow.parquet.read_table(folder / f"{name}.parquet").to_pylist()


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def expected(question):
    """Solve a generated problem from its words alone, by other means than the generator."""
    found = re.findall(r"(\w+) (\d+)", question)  # each number with the word before it
    (_, total), *changes = [(word, int(number)) for word, number in found]
    if "How many more" in question:
        return total - changes[0][1]
    for word, number in changes:
        gained = word in [*demo.GAINS, "puts"] or "together" in question
        assert gained != (word in [*demo.DROPS, "takes"]), question
        total += number if gained else -number
    return total


def test_the_same_seed_gives_the_same_bytes(folder, tmp_path):
    demo.main(["--out", str(tmp_path), *SIZES])
    assert contents(tmp_path) == contents(folder)


def test_another_seed_gives_other_problems(folder, tmp_path):
    demo.main(["--out", str(tmp_path), *SIZES, "--seed", "1"])
    assert rows(tmp_path, "teacher") != rows(folder, "teacher")


def test_no_problem_occurs_twice_in_or_across_the_files(folder):
    found = [row["instruction"] for name in ("teacher", "student") for row in rows(folder, name)]
    assert len(found) == 460 == len(set(found))


def test_tokenizer_gives_every_text_back(folder):
    tokenizer = template.load_tokenizer(folder / "tokenizer")
    for row in rows(folder, "teacher"):
        for text in row.values():
            ids = tokenizer(text).input_ids
            assert tokenizer.unk_token_id not in ids, text
            assert tokenizer.decode(ids) == text


def test_vocabulary_knows_the_words_of_problems_it_has_not_seen():
    rng, known = random.Random(99), demo.vocabulary()
    unknown = {
        piece
        for _ in range(3000)
        for text in demo.problem(rng)
        for piece in re.findall(demo.PIECES, text)
    } - set(known)
    assert not unknown


def test_digits_are_tokens_of_their_own(folder):
    assert template.load_tokenizer(folder / "tokenizer").tokenize("buys 405.") == [
        "buys",
        " ",
        "4",
        "0",
        "5",
        ".",
    ]


def test_every_final_answer_is_right():
    rng = random.Random(5)
    for _ in range(2000):
        question, answer = demo.problem(rng)
        assert score.final_answer(answer) == str(expected(question)), (question, answer)


def test_every_equation_in_the_working_holds():
    rng = random.Random(6)
    for _ in range(2000):
        _, answer = demo.problem(rng)
        for left, right in re.findall(r"([\d+-]*\d)=(\d+)", answer):
            assert eval(left) == int(right), answer  # digits, + and - only


def test_the_working_leads_to_the_final_answer():
    rng = random.Random(8)
    for _ in range(2000):
        _, answer = demo.problem(rng)
        ones, tens = (int(right) for right in re.findall(r"=(\d+)", answer)[-2:])
        # digit by digit, or, in the style that jumps along the number line, the last equation
        # itself
        assert int(score.final_answer(answer)) in (10 * tens + ones % 10, tens), answer


def test_styles_occur_as_often_as_their_weights_say():
    rng, openings = random.Random(7), {"Ones": 45, "Add": 12.5, "Subtract": 12.5}
    answers = [demo.problem(rng)[1] for _ in range(4000)]
    for opening, percent in openings.items():
        assert sum(answer.startswith(opening) for answer in answers) == pytest.approx(
            len(answers) * percent / 100, rel=0.15
        ), opening


def test_rows_fit_the_context(folder):
    tokenizer = template.load_tokenizer(folder / "tokenizer")
    talks = [
        [
            {"role": "user", "content": row["instruction"]},
            {"role": "assistant", "content": row["output"]},
        ]
        for row in rows(folder, "teacher")
    ]
    lengths = [len(tokenizer(template.render(tokenizer, talk)).input_ids) for talk in talks]
    assert 40 <= min(lengths) and max(lengths) <= 95 < demo.CONTEXT


def test_configs_make_models_of_the_promised_sizes(folder):
    from transformers import AutoConfig, AutoModelForCausalLM

    configs = [
        AutoConfig.from_pretrained(folder / f"{name}-config") for name in ("teacher", "student")
    ]
    teacher, student = (
        AutoModelForCausalLM.from_config(config).num_parameters() for config in configs
    )
    assert 340_000 < teacher < 370_000 and student < teacher / 3.5
