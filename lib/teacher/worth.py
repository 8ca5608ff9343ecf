"""Can this teacher teach? What it knows of the val targets beside the untouched student and beside
chance, and a few of its answers beside the student's; said before the first step. (A base model may
know every next token, and write nothing of use when it is asked.)"""

import re
import sys

import numpy as np
import torch

from lib import data, generate, models
from lib.run import Run
from lib.teacher import Teacher, written

ASKED = 8  # val prompts that are answered
PROMPT, LONGEST = 1024, 48  # tokens of a prompt, and of an answer, at most


def best_by(measure: str, teacher: Teacher) -> str:
    """Return the measure that best/ follows: the one asked for, or, where the teacher is not known
    on val, the cross-entropy in its place."""
    if teacher.compares:
        return measure
    found = re.sub("^(kl|agree)", "ce", measure)
    if found != measure:
        print(f"best/ follows {found}, for there is no val dump with T=1 to measure {measure}")
    return found


def report(
    run: Run,
    step: int,
    teacher: Teacher,
    dataset: data.Dataset,
    measures: dict,
    student: models.Model,
    tokenizer,
) -> None:
    """At step 0, say who wrote the rows, log the teacher's own measures on val, as far as they are
    known, and say whether it has something to give. measures: the untouched student's."""
    if step:
        return
    if dataset.train.logp is not None:
        source = run.identities["student"]
        line, warning = written.own_text(run.args, dataset, student, source)
        run.say(line + (warning and red(warning)))
    if other := written.other_teacher(dataset, teacher.each):
        run.say(red(other))
    own = teacher.val_measures() if dataset.val.targets else None
    names = {"name": teacher.name} if len(teacher.each) > 1 else {}
    if names or own:
        run.log("teacher", 0, **names, **(own or {}))
    if not own:
        return
    if dataset.val_own.any():  # who wrote a text finds it likelier than who is to teach
        both = f"teacher {own['ce']:.4f}, student {measures['ce']:.4f}"
        run.say(f"val cross-entropy, of the student's own text too: {both}")
    else:
        chance = unigram_ce(dataset.train, dataset.val, student.head().vocab)
        teacher_can_teach(own, measures, chance, run.say)
    if dataset.labels:
        return classifier_can_teach(own, measures, dataset, run.say)
    said = answered(teacher.model, dataset, run.say) if teacher.model else teacher.answers
    if said is None:
        again = (
            " (of a teacher that is run here, with the data's tokenizer, a val dump made again has"
            " a few: dump_logits.py --chunk val --fresh)"
        )
        again = again if run.args.logits else ""
        return run.say(f"val answers: none of the teacher's are known{again}")
    compare_answers(said, answered(student, dataset, run.say), dataset, tokenizer, run.say)


def prompt_of(split: data.Split, row: int) -> tuple[list[int], list[int]]:
    """Return the tokens of a row before its first answer, and those of that answer, LONGEST at
    most."""
    ids, answer = split.row(row)
    first = int(answer.argmax())
    end = first + int(np.argmin(np.append(answer[first:], False)))
    return ids[:first].tolist(), ids[first : min(end, first + LONGEST)].tolist()


def in_turn(source: np.ndarray) -> list[int]:
    """Return the numbers of rows, of each source one after the other: of rows of the sources
    [0, 0, 0, 1], [0, 3, 1, 2]."""
    turn = np.zeros(len(source), np.int64)  # of a row among those of its source
    for number in np.unique(source):
        turn[source == number] = np.arange(np.sum(source == number))
    return np.argsort(turn, kind="stable").tolist()


@torch.no_grad()
def answered(model: models.Model, dataset: data.Dataset, say=print) -> dict[str, list[int]]:
    """Return what a model answers, greedily, to the first ASKED val prompts that are not long, of
    each source in turn, by the row's number; none, and a line that says why, where it cannot be
    asked in a few passes."""
    module, split = model.module, dataset.val
    longest = min(PROMPT, (generate.context_of(module) or PROMPT) - LONGEST - 1)
    asked: list[generate.Request] = []
    for row in in_turn(split.rows["source"]):
        prompt, wanted = prompt_of(split, row)
        # a plain text's first token is no prompt
        if wanted and 1 < len(prompt) <= longest and len(asked) < ASKED:
            asked.append(generate.Request(str(row), prompt, LONGEST))
    ends = generate.end_tokens(module.generation_config, *dataset.train.end_tokens())
    training, greedy = module.training, generate.Sampling(stops=tuple(ends))
    module.eval()
    written = list(generate.generate(module, asked, greedy, slots=ASKED))
    module.train(training)
    said = {str(answer.request.key): answer.ids for answer in written}
    return {str(one.key): said[str(one.key)] for one in asked}


def rouge_l(said: list[int], wanted: list[int]) -> float:
    """Return ROUGE-L over tokens (Lin 2004, eq. 2 to 4, F1): twice the longest common subsequence,
    by the tokens of both. rouge_l([1, 2, 3], [1, 3]) == 0.8."""
    before = [0] * (len(wanted) + 1)
    for token in said:
        row = [0]
        for place, other in enumerate(wanted):
            same = before[place] + 1
            row.append(same if token == other else max(before[place + 1], row[place]))
        before = row
    return 2 * before[-1] / max(1, len(said) + len(wanted))


def compare_answers(
    teacher: dict[str, list[int]],
    student: dict[str, list[int]],
    dataset: data.Dataset,
    tokenizer,
    say=print,
) -> None:
    """Say how near the answers of teacher and untouched student are to the references, in red where
    the teacher's are further away, or nowhere near; and show one of the teacher's."""
    own = dataset.val_own  # no references
    rows = [key for key in teacher if key in student and int(key) < len(own) and not own[int(key)]]
    if not rows:
        return

    def near(answers: dict[str, list[int]]) -> float:
        ends = set(dataset.train.end_tokens())
        wanted = {key: prompt_of(dataset.val, int(key))[1] for key in rows}
        ended = {key: ids[: len(ids) - (ids[-1] in ends)] for key, ids in wanted.items()}
        each = [rouge_l(answers[key], ended[key]) for key in rows]
        return float(np.mean(each))

    def words(ids: list[int]) -> str:
        text = " ".join(tokenizer.decode(ids, skip_special_tokens=True).split())
        return repr(text[:120] + "..." * (len(text) > 120))

    mine, other = near(teacher), near(student)
    prompt, reference = prompt_of(dataset.val, int(rows[0]))
    warning = ""
    if mine < other:
        warning = red("; WARNING: the teacher's are further from the references than the student's")
    elif not mine:
        warning = red("; WARNING: the teacher's have nothing of the references")
    say(
        f"val answers: ROUGE-L of the first {LONGEST} tokens to {len(rows)} prompts: teacher"
        f" {mine:.3f}, student {other:.3f}{warning}"
    )
    say(
        f"val answers: to {words(prompt[-40:])} the teacher says {words(teacher[rows[0]])}, where"
        f" the reference is {words(reference)}"
    )


def teacher_can_teach(teacher: dict, student: dict, chance: float, say=print) -> None:
    """Say the val cross-entropies of teacher, untouched student and chance; in red where the
    teacher has nothing to give, for it is no better."""
    own = teacher["ce"]
    warning = (
        "" if own < student["ce"] else red("; WARNING: the teacher is no better than the student")
    )
    say(f"val cross-entropy: teacher {own:.4f}, student {student['ce']:.4f}{warning}")
    if not own < chance:
        say(
            red(
                "WARNING: the teacher is no better than chance: its val cross-entropy is"
                f" {own:.4f}, that of the train targets' frequencies alone {chance:.4f}"
            )
        )


def classifier_can_teach(teacher: dict, student: dict, dataset: data.Dataset, say=print) -> None:
    """Say the val accuracies of a teacher that classifies, of the untouched student, and of who
    always says train's commonest class."""
    commonest = int(target_counts(dataset.train, len(dataset.labels)).argmax())
    chance = float(np.mean(dataset.val.labels == commonest))
    say(
        f"val accuracy: teacher {teacher['acc1']:.4f}, student {student['acc1']:.4f}, always"
        f" {dataset.labels[commonest]!r} {chance:.4f}"
    )
    if not teacher["acc1"] > chance:
        say(
            red(
                "WARNING: the teacher is no better than always saying"
                f" {dataset.labels[commonest]!r}: is its head trained, and for these labels?"
            )
        )


def unigram_ce(train: data.Split, val: data.Split, vocab: int) -> float:
    """Return the cross-entropy on val, nats a target, of who knows only how often each token is a
    target of train, counted from one: log p(token) = log((count + 1) / (targets + V)). What is
    worse has learnt nothing, or speaks of other tokens.
    """
    train_counts, val_counts = (target_counts(split, vocab) for split in (train, val))
    surprise = np.log(train_counts.sum() + vocab) - np.log(train_counts + 1)
    return float((val_counts * surprise).sum() / val_counts.sum())


def target_counts(split: data.Split, vocab: int, piece: int = 1 << 24) -> np.ndarray:
    """Return how often each token is a target, (V,); a piece of the memory maps at a time."""
    if split.labels is not None:
        return np.bincount(split.labels, minlength=vocab)
    parts = (slice(start, start + piece) for start in range(0, len(split.tokens), piece))
    return sum(
        (np.bincount(split.tokens[part][split.answer[part]], minlength=vocab) for part in parts),
        np.zeros(vocab),
    )


def red(text: str) -> str:
    """Return a text that a terminal shows in red; anywhere else it stays as it is."""
    return f"\033[31m{text}\033[0m" if sys.stdout.isatty() else text
