"""What was measured of a model: its evaluation folder, read as one flat dict, and how its numbers
are called and printed.

    runs/NAME/STAGE-eval/eval.json              token measures, overall and by source, and sizes
                                                (stage1_sft.py or stage2_kd.py --eval-only)
                         answers.jsonl          prompts, references, answers (chat.py --score;
                                                --prompts leaves no scores)
                         answers.scores.json    measures of the answers with their intervals, and
                                                the model's speed (chat.py --score, written last)

Any of the files may be missing: a measure that is not there is left out, never guessed.
"""

from collections.abc import Sequence
from pathlib import Path

from lib import files

# measure -> (what tables call it, digits); measures of other measures are reached by a dot
ROWS = {
    "parameters": ("parameters", 0),
    "bytes": ("size of the weights", None),
    "ce": ("CE, nats a target", 4),
    "own_ce": ("CE over its own tokens too", 4),
    "ppl": ("perplexity", 3),
    "acc1": ("acc@1", 4),
    "acc5": ("acc@5", 4),
    "kl": ("KL to the teacher, nats", 4),
    "rkl": ("reverse KL, nats", 4),
    "agree": ("same likeliest token as the teacher", 4),
    "ece": ("calibration error", 4),
    "exact": ("exact match of the answer", 3),
    "accuracy": ("accuracy", 3),
    "macro_f1": ("macro-F1", 3),
    "bleu": ("BLEU", 3),
    "rouge1": ("ROUGE-1", 3),
    "rouge2": ("ROUGE-2", 3),
    "rougeL": ("ROUGE-L", 3),
    "speed.prompt_tok_per_s": ("prompt tokens/s", 0),
    "speed.tok_per_s": ("generated tokens/s", 1),
    "speed.memory_bytes": ("memory while generating", None),
    "training.steps": ("optimizer steps", 0),
    "training.trained_s": ("seconds of training", 0),
    "training.tok_per_s": ("training tokens/s", 0),
    "cost.written_tokens": ("tokens written for its data", 0),
    "cost.written_s": ("seconds of writing", 0),
    "cost.dumped_s": ("seconds of dumping", 0),
    "cost.record_bytes": ("size of its teacher's records", None),
}
OF_ANSWERS = ("exact", "accuracy", "macro_f1", "bleu", "rouge1", "rouge2", "rougeL")
# measures that are better when they are higher, and when they are lower; what is in neither (sizes,
# speed) has no best
HIGHER = ("acc1", "acc5", "agree", *OF_ANSWERS)
LOWER = ("ce", "own_ce", "ppl", "kl", "rkl", "ece")
# the first of these that was measured stands for a model's quality
MEASURED = {f"{name}?": float for name in ROWS if "." not in name}
EVALUATION = MEASURED | {
    "by_source?": {...: {...: float}},
    "data?": str,
    "weights?": str,
    "targets?": int,
}  # of eval.json
ANSWER = {
    "answer?": str,
    "reference?": (str, float, None, [(str, float)]),
} | {  # a line of answers.jsonl
    "scores?": (dict, None),
    "messages?": ([dict], None),
    "logp?": (dict, None),
}
SCORES = {  # answers.scores.json
    "metrics": {...: {"value": float, "low": float, "high": float, "n": int}},
    "count": range(1 << 62),
    "settings?": dict,
    "speed?": {"prompt_tok_per_s?": float, "tok_per_s?": float, "memory_bytes?": float},
    "labels?": [str],
    "confusion?": [[int]],
    "per_class?": {...: {"precision": float, "recall": float, "f1": float, "support": int}},
    "prompts?": (None, str),
    "weights?": str,
}
PRIMARY = ("exact", "accuracy", "rougeL", "acc1")


def value_of(model: dict, measure: str):
    """Return a measure by its name in ROWS, or None. Worked example: value_of({"speed":
    {"tok_per_s": 9.0}}, "speed.tok_per_s") == 9.0"""
    for part in measure.split("."):
        model = model.get(part) if isinstance(model, dict) else None
    return model


def shown(measure: str, value: float | None) -> str:
    """Return a value as tables print it: shown("ce", 0.13907) == "0.1391"; shown("bytes", 388112)
    == "388.1 kB"."""
    digits = ROWS[measure][1] if measure in ROWS else 4
    if value is None:
        return ""
    if digits is None:
        return files.human(value)
    return f"{round(value, digits) + 0:,.{digits}f}"  # + 0: a KL of rounding size is no -0.0000


def signed(measure: str, difference: float | None) -> str:
    """Return a difference with its sign, as tables print it; "" where there is none."""
    digits = ROWS[measure][1]
    return "" if difference is None else f"{round(difference, digits) + 0:+,.{digits}f}"


def share(value: float | None) -> str:
    """Return a share as tables print it: share(0.8193) == "81.9 %"; "" where there is none."""
    return "" if value is None else f"{100 * value:.1f} %"


def table(
    rows: Sequence[Sequence[str]], left: Sequence[int] = (0,), markdown: bool = True
) -> list[str]:
    """Return a table's lines, in Markdown or without its bars; aligned, so that either reads in a
    terminal. The first row is the head, `left` are columns of words."""
    if markdown:
        rows = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    widths = [max(3 if markdown else 0, *map(len, column)) for column in zip(*rows)]

    def aligned(row):
        return [
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths))
        ]

    if not markdown:
        return ["  ".join(aligned(row)).rstrip() for row in rows]
    rule = ["-" * w if i in left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return [f"| {' | '.join(aligned(row))} |" for row in (rows[0], rule, *rows[1:])]


def present(models: dict[str, dict]) -> list[str]:
    """Return the rows of a table of these models: the measures that one of them has at least."""
    return [
        name for name in ROWS if any(value_of(model, name) is not None for model in models.values())
    ]


def with_name(folder: Path) -> Path:
    """Return a folder by a path that ends in its name: with_name(".") is the current folder's."""
    return folder if folder.name not in ("", "..") else folder.resolve()


def there(folder: Path) -> bool:
    """Return whether a folder holds measures of a model."""
    measured = ("eval.json", "answers.jsonl", "answers.scores.json")
    return any((folder / name).exists() for name in measured)


def answers_in(folder: Path) -> list[dict]:
    """Return the answered prompts of an evaluation folder, in their order; none where there are
    none."""
    path = Path(folder) / "answers.jsonl"
    rows = files.read_jsonl(path, torn=True) if path.exists() else []
    files.expect(path, rows, [ANSWER])
    return rows


def question(row: dict) -> tuple:
    """Return what identifies an answered prompt: the prompt itself, and its reference."""
    return row.get("messages", row.get("prompt")), row.get("reference")


def read_evaluation(folder: Path) -> dict:
    """Return what an evaluation folder holds: every measure by its name, and beside them
    "intervals" {measure: [low, high]} (95 %), "by_source", "labels", "confusion", "per_class",
    "speed", "settings" of the answers, and "answers", how many there are.
    """
    folder, model = Path(folder), {}
    if (measured := folder / "eval.json").exists():
        model = files.read_json(measured, "--eval-only once more", EVALUATION)
        for name in ("seal", "checksums"):
            model.pop(name, None)
    if "accuracy" in model and model["accuracy"] == model.get("acc1"):
        del model["acc1"]  # of classes it is the same, under the name people look for
    model.setdefault("by_source", {})
    if not (scored := read_scores(folder)):
        return model
    metrics, how = scored["metrics"], scored.get("settings", {})
    more = ("labels", "confusion", "per_class", "speed", "prompts")
    model |= {name: scored[name] for name in more if name in scored}
    if "weights" in scored:
        model["scored_weights"] = scored["weights"]
    hidden = ("ckpt", "weights", "prompts", "checksums", "seal")
    model["settings"] = {name: value for name, value in how.items() if name not in hidden}
    model |= {name: one["value"] for name, one in metrics.items()}
    model["answers"] = scored["count"]
    model["intervals"] = {
        name: [one["low"], one["high"]]
        for name, one in metrics.items()
        if {"low", "high"} <= {*one}
    }
    return model


def read_scores(folder: Path, name: str = "answers.scores.json") -> dict:
    """Return what answers.scores.json holds; of answers that chat.py --prompts wrote, unscored, the
    exact matches where all have a reference; else {}."""
    scores, made = folder / name, folder / "answers.jsonl.meta.json"
    if scores.exists():
        mend = "delete it, and the same chat.py --score"
        known = files.read_json(scores, mend, SCORES)
        files.check(folder, known, False, "chat.py --score with --fresh")
        return known
    rows = answers_in(folder)
    if not rows or not all("reference" in row for row in rows):
        return {}
    from lib.measure import score  # here, not above: most folders need none of it

    how = files.read_json(made) if made.exists() else {}
    metrics = score.summarise(rows, ["exact"])
    return {"metrics": metrics, "count": len(rows), "settings": how, "prompts": how.get("prompts")}
