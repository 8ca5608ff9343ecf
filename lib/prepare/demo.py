"""Embedded data of `make demo`: grade-school word problems with worked answers, a tokenizer for
them, two small model configs.

    python -m lib.prepare.demo --out demo --seed 0
    # a second or two
    python -m lib.prepare.demo --out /tmp/demo --teacher-rows 200 --student-rows 50

Writes, in --out (the same flags give the same bytes):

    teacher.parquet          instruction, output: what the teacher is trained on
    student.parquet          the same columns, other problems, far fewer: the data set that is
                             distilled on, and held-out rows
    prompts.parquet          instruction alone, other problems again: prompts without an answer
    tokenizer/               one token a word, a digit or a mark; closed: it knows every generated
                             word
    teacher-config/config.json, student-config/config.json
    meta.json                written last: the flags, the counts

A problem and three of the answers it may get:

    Ann has 38 apples. She buys 45 more. How many apples does Ann have now?

    Ones: 8+5=13, carry 1. Tens: 3+4+1=8. So Ann has 83 apples.
    #### 83

    Add the ones, 8+5=13, then the tens, 3+4+1=8. That makes 83.
    #### 83

    38+40=78, 78+5=83. The answer is 83.
    #### 83

Style and wording are drawn at random, with the weights below; given these,
the arithmetic is forced. So a teacher that has learned the data is certain at some places and soft
at others: a sampled answer shows the student one throw of the dice, the teacher's distribution
shows it all of them.
"""

import argparse
import os
import random
import re
from pathlib import Path

from lib import files, flags

# 0.36M and 0.10M parameters, of two families, for teacher and student share a tokenizer alone. A
# Qwen3 norms its queries and keys, and learns in fewer steps to fetch the right digit. The student
# has four heads: with two it finds out late how a sum goes, on one seed in five
TEACHER = {
    "model_type": "qwen3",
    "head_dim": 32,
    "num_hidden_layers": 2,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
STUDENT = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
ARCHITECTURES = {"qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}
CONTEXT = 256

PEOPLE = dict.fromkeys("Ann Mia Eva Lena Sara Nora Zoe Ruth".split(), "She")
PEOPLE |= dict.fromkeys("Tom Ben Max Leo Paul Omar Ivan Hugo".split(), "He")
THINGS = (
    "apples books coins shells stamps marbles pens cards stones eggs nuts toys plums beads roses"
    " cakes"
).split()

# how often, sign, the problem
PROBLEMS = [
    (20, "+", "{P} has {a} {things}. {She} {gains} {b} more. How many {things} does {P} have now?"),
    (12, "+", "{P} has {a} {things} and {Q} has {b}. How many {things} do they have together?"),
    (
        8,
        "+",
        (
            "There are {a} {things} in a box. {P} puts {b} more into it. How many {things} are in"
            " the box?"
        ),
    ),
    (20, "-", "{P} has {a} {things}. {She} {drops} {b} of them. How many {things} are left?"),
    (12, "-", "{P} has {a} {things} and {Q} has {b}. How many more {things} does {P} have?"),
    (
        8,
        "-",
        "There are {a} {things} in a box. {P} takes {b} out. How many {things} are in the box?",
    ),
]
GAINS = ["buys", "finds", "gets", "wins", "picks"]
DROPS = ["sells", "loses", "breaks", "spends", "hides"]

# how often, the working
STYLES = [
    (45, "Ones: {ones}{carry}. Tens: {tens}."),
    (25, "{Add} the ones, {ones}, then the tens, {tens}."),
    (20, "{a}{sign}{b}: {ones}, {tens}."),
    (10, "{a}{sign}{b_tens}={between}, {between}{sign}{b_ones}={result}."),
]
ENDINGS = [(50, " So {P} has {n} {things}."), (30, " That makes {n}."), (20, " The answer is {n}.")]
ENDING_ELSEWHERE = [
    (50, " So the answer is {n}."),
    (30, " That makes {n}."),
    (20, " The answer is {n} {things}."),
]

# a word carries the space before it; a digit, a mark, a line end or a lone space is a token of its
# own
PIECES = r" ?[A-Za-z]+|####|[^A-Za-z]"
SPECIAL = ["<unk>", "<pad>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def draw(rng: random.Random, weighted: list[tuple]) -> tuple:
    """Return one of the tuples, each as likely as its first element says."""
    return rng.choices(weighted, [entry[0] for entry in weighted])[0]


def operands(rng: random.Random, sign: str) -> tuple[int, int]:
    """Return two numbers of 10..99 whose sum, or difference, is one too."""
    while True:
        a, b = rng.randint(10, 99), rng.randint(10, 99)
        if 10 <= (a + b if sign == "+" else a - b) <= 99:
            return a, b


def working(style: str, a: int, sign: str, b: int) -> str:
    """Fill a style in. Worked example: 71 - 48 has the ones 11-8=3 and, one ten being borrowed, the
    tens 7-4-1=2."""
    (a_tens, a_ones), (b_tens, b_ones) = divmod(a, 10), divmod(b, 10)
    if sign == "+":
        result, moved = a + b, a_ones + b_ones > 9
        ones = f"{a_ones}+{b_ones}={a_ones + b_ones}"
        tens = f"{a_tens}+{b_tens}{'+1' * moved}={a_tens + b_tens + moved}"
    else:
        result, moved = a - b, a_ones < b_ones
        ones = f"{a_ones + 10 * moved}-{b_ones}={a_ones + 10 * moved - b_ones}"
        tens = f"{a_tens}-{b_tens}{'-1' * moved}={a_tens - b_tens - moved}"
    return style.format(
        a=a,
        b=b,
        sign=sign,
        ones=ones,
        tens=tens,
        carry=moved * (", carry 1" if sign == "+" else ", borrow 1"),
        result=result,
        between=a + 10 * b_tens if sign == "+" else a - 10 * b_tens,
        b_tens=10 * b_tens,
        b_ones=b_ones,
        Add="Add" if sign == "+" else "Subtract",
    )


def problem(rng: random.Random) -> tuple[str, str]:
    """Return one problem and one of its answers."""
    _, sign, text = draw(rng, PROBLEMS)
    a, b = operands(rng, sign)
    person, other = rng.sample(list(PEOPLE), 2)
    words = dict(
        P=person,
        Q=other,
        She=PEOPLE[person],
        things=rng.choice(THINGS),
        gains=rng.choice(GAINS),
        drops=rng.choice(DROPS),
        a=a,
        b=b,
    )
    answer = working(draw(rng, STYLES)[1], a, sign, b)
    result = a + b if sign == "+" else a - b
    mine = text.endswith("does {P} have now?")  # else the thing counted is not what the person has
    answer += draw(rng, ENDINGS if mine else ENDING_ELSEWHERE)[1].format(n=result, **words)
    return text.format(**words), f"{answer}\n#### {result}"


def vocabulary() -> dict[str, int]:
    """Return token -> id: the special tokens, every mark of the keyboard, every word of the tables
    above with and without its space."""
    texts = [
        *PEOPLE,
        *PEOPLE.values(),
        *THINGS,
        *GAINS,
        *DROPS,
        "carry borrow Add Subtract",
        *(entry[2] for entry in PROBLEMS),
        *(entry[1] for entry in STYLES + ENDINGS + ENDING_ELSEWHERE),
    ]
    words = sorted(
        {word for text in texts for word in re.findall("[A-Za-z]+", re.sub(r"{\w+}", " ", text))}
    )
    marks = [chr(code) for code in range(32, 127) if not chr(code).isalpha()]
    tokens = [*SPECIAL, "\n", "####", *marks, *words, *(" " + word for word in words)]
    return {token: number for number, token in enumerate(tokens)}


def tokenizer():
    """Return the word-level tokenizer: decode(encode(text)) == text for every generated text."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel(vocabulary(), unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(PIECES), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="<|end|>",
        additional_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
        chat_template=TEMPLATE,
        model_max_length=CONTEXT,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def config(sizes: dict):
    """Return a model's configuration for this tokenizer; a Llama's, unless `sizes` says
    otherwise."""
    from transformers import AutoConfig

    ids, sizes = vocabulary(), {"model_type": "llama"} | sizes
    return AutoConfig.for_model(
        architectures=[ARCHITECTURES[sizes["model_type"]]],
        vocab_size=len(ids),
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        # small matrices learn from larger weights several times sooner than from the usual 0.02
        initializer_range=0.06,
        bos_token_id=None,
        eos_token_id=ids["<|end|>"],
        pad_token_id=ids["<pad>"],
        **sizes,
    )


def write_parquet(path: Path, rows: list[tuple[str, ...]]) -> None:
    """Write (instruction, output) rows, or (instruction,) ones, whole or not at all."""
    import pyarrow
    from pyarrow import parquet

    partial = path.with_name(path.name + ".part")
    columns = dict(zip(("instruction", "output"), map(list, zip(*rows))))
    parquet.write_table(pyarrow.table(columns), partial)
    os.replace(partial, path)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    flags.add(parser, "--out", "--seed")
    parser.add_argument(
        "--teacher-rows",
        type=int,
        default=20000,
        metavar="N",
        help="problems of teacher.parquet (default: %(default)s)",
    )
    parser.add_argument(
        "--student-rows",
        type=int,
        default=1000,
        metavar="N",
        help="problems of student.parquet (default: %(default)s)",
    )
    parser.add_argument(
        "--prompts",
        type=int,
        default=2500,
        metavar="N",
        help="problems of prompts.parquet (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    flags.positive(parser, args, "teacher_rows", "student_rows")
    return args


@files.script
def main(argv=None):
    args = parse_args(argv)
    out, done = Path(args.out), {key: value for key, value in vars(args).items() if key != "out"}
    if (out / "meta.json").exists() and files.read_json(out / "meta.json").get("demo") == done:
        print(f"{out} is finished already")
        return
    holding = files.lock(out)
    (out / "meta.json").unlink(missing_ok=True)

    rng, rows = random.Random(args.seed), {}
    answered = args.teacher_rows + args.student_rows
    while len(rows) < answered + args.prompts:
        rows.setdefault(*problem(rng))
    rows = list(rows.items())
    write_parquet(out / "teacher.parquet", rows[: args.teacher_rows])
    write_parquet(out / "student.parquet", rows[args.teacher_rows : answered])
    write_parquet(out / "prompts.parquet", [(prompt,) for prompt, _ in rows[answered:]])
    words = tokenizer()
    words.save_pretrained(out / "tokenizer")
    for name, sizes in (("teacher", TEACHER), ("student", STUDENT)):
        config(sizes).save_pretrained(out / f"{name}-config")
    files.write_json(out / "meta.json", {"demo": done})
    holding.release()
    lengths = [
        len(words(instruction + output).input_ids) + 3
        for instruction, output in rows[:answered][-1000:]
    ]
    print(
        f"{out}: {args.teacher_rows} problems for the teacher, {args.student_rows} for the student,"
        f" {args.prompts} prompts alone;"
        f" {len(words)} tokens in the vocabulary, {min(lengths)} to {max(lengths)} in a row,"
        f" {sum(lengths) / len(lengths):.0f} on average"
    )


if __name__ == "__main__":
    main()
