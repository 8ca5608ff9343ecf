"""What was measured of a model: its evaluation folder, read as one flat dict, and how its numbers
are called and printed.

    runs/NAME/STAGE-eval/eval.json              token measures, overall and by source, and sizes
                                                (stage1_sft.py or stage2_kd.py --eval-only)
                         answers.jsonl          prompts, references, answers (chat.py --score;
                                                --prompts leaves no scores)
                         answers.scores.json    measures of the answers with their intervals, and
                                                the model's speed (chat.py --score, written last)

Any of the files may be missing or older than what is read here: a measure that is not there is left
out, never guessed.
"""

import json
from pathlib import Path

from lib import files

# measure -> (what tables call it, digits); measures of other measures are reached by a dot
ROWS = {
    "parameters": ("parameters", 0),
    "bytes": ("size of the weights", None),
    "ce": ("CE, nats a target", 4),
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
}
HIGHER = (
    "acc1",
    "acc5",
    "agree",
    "exact",
    "accuracy",
    "macro_f1",
    "bleu",
    "rouge1",
    "rouge2",
    "rougeL",
)
LOWER = (
    "ce",
    "ppl",
    "kl",
    "rkl",
    "ece",
)  # measures that are better when they are lower; what is in neither (sizes, speed) has no best
PRIMARY = (
    "exact",
    "accuracy",
    "rougeL",
    "acc1",
)  # the first of these that was measured stands for a model's quality
OF_ANSWERS = ("exact", "accuracy", "macro_f1", "bleu", "rouge1", "rouge2", "rougeL")


def at(model: dict, measure: str):
    """Return a measure by its name in ROWS, or None. Worked example: at({"speed": {"tok_per_s":
    9.0}}, "speed.tok_per_s") == 9.0"""
    for part in measure.split("."):
        model = model.get(part) if isinstance(model, dict) else None
    return model


def say(measure: str, value: float | None) -> str:
    """Return a value as tables print it: say("ce", 0.13907) == "0.1391"; say("bytes", 388112) ==
    "388.1 kB"."""
    digits = ROWS[measure][1] if measure in ROWS else 4
    if value is None:
        return ""
    return (
        files.human(value) if digits is None else f"{round(value, digits) + 0:,.{digits}f}"
    )  # + 0: a KL of rounding size is no -0.0000


def signed(measure: str, difference: float | None) -> str:
    """Return a difference with its sign, as tables print it; "" where there is none."""
    digits = ROWS[measure][1]
    return "" if difference is None else f"{round(difference, digits) + 0:+,.{digits}f}"


def share(value: float | None) -> str:
    """Return a share as tables print it: share(0.8193) == "81.9 %"; "" where there is none."""
    return "" if value is None else f"{100 * value:.1f} %"


def present(models: dict[str, dict]) -> list[str]:
    """Return the rows of a table of these models: the measures that one of them has at least."""
    return [name for name in ROWS if any(at(model, name) is not None for model in models.values())]


def there(folder: Path) -> bool:
    """Return whether a folder holds measures of a model."""
    return any(
        (folder / name).exists() for name in ("eval.json", "answers.jsonl", "answers.scores.json")
    )


def lines(path: Path) -> list[dict]:
    """Return the objects of a .jsonl file; what follows the last line end is still being written,
    and left out."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], 1):
        try:
            found.append(json.loads(line))
        except ValueError as broken:
            files.fail(f"{path} line {number} is not JSON", seen=f"{line[:60]!r} ({broken})")
    return found


def answers(folder: Path) -> list[dict]:
    """Return the answered prompts of an evaluation folder, in their order; none where there are
    none."""
    path = Path(folder) / "answers.jsonl"
    return lines(path) if path.exists() else []


def read(folder: Path) -> dict:
    """Return what an evaluation folder holds: every measure by its name, and beside them
    "intervals" {measure: [low, high]} (95 %), "by_source", "labels", "confusion", "per_class",
    "speed", "settings" of the answers, and "answers", how many there are.
    """
    folder = Path(folder)
    model = files.read_json(folder / "eval.json") if (folder / "eval.json").exists() else {}
    if model.get("accuracy") is not None and model.get("accuracy") == model.get("acc1"):
        del model["acc1"]  # of classes it is the same, under the name people look for
    if "by_source" not in model:  # older folders name a source's measures ce_NAME and kl_NAME
        older = [name for name in model if name[:3] in ("ce_", "kl_")]
        sources = dict.fromkeys(name[3:] for name in older)
        model["by_source"] = {
            source: {name[:2]: model[name] for name in older if name[3:] == source}
            for source in sources
        }
        model = {name: value for name, value in model.items() if name not in older}
    scores, made = folder / "answers.scores.json", folder / "answers.jsonl.meta.json"
    if scores.exists():
        scored = files.read_json(scores)
        metrics, count = scored["metrics"], scored["count"]
        model |= {
            name: scored[name]
            for name in ("labels", "confusion", "per_class", "speed")
            if name in scored
        }
        how, model["prompts"], model["scored_weights"] = (
            scored.get("settings", {}),
            scored.get("prompts"),
            scored.get("weights"),
        )
    elif (rows := answers(folder)) and all("reference" in row for row in rows):
        metrics, count = summarise(rows), len(rows)
        how = files.read_json(made) if made.exists() else {}
        model["prompts"] = how.get("prompts")
    else:
        return model
    model["settings"] = {
        name: value for name, value in how.items() if name not in ("ckpt", "weights", "prompts")
    }
    model |= {name: one["value"] for name, one in metrics.items()} | {"answers": count}
    return model | {
        "intervals": {
            name: [one["low"], one["high"]] for name, one in metrics.items() if "low" in one
        }
    }


def summarise(rows: list[dict]) -> dict:
    """Return the exact matches of answers that chat.py wrote without scoring them, as
    lib/measure/score.py counts them."""
    from lib.measure import score  # here, not above: most folders need none of it

    return score.summarise(rows, ["exact"])
