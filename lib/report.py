"""The table and the picture that compare models on held-out rows. Reads evaluation and answer files only.

    python -m lib.report --out runs/demo/comparison "teacher=runs/demo/eval-teacher" "stage 1=runs/demo/eval-stage1"

Reads   for each NAME=DIR: DIR/eval.json (stage2_kd.py --eval-only) and, if it is there, DIR/answers.jsonl (chat.py --prompts ... --out)
Writes  OUT.json, OUT.md and OUT.png
"""
import argparse
import json
import math
from pathlib import Path

from lib import demo, files, plots

ROWS = {  # measure -> (what the table calls it, digits, whether higher is better)
    "parameters": ("parameters", 0, None),
    "ce": ("CE, nats a target", 4, False),
    "ppl": ("perplexity", 3, False),
    "acc1": ("acc@1", 4, True),
    "acc5": ("acc@5", 4, True),
    "kl": ("KL to the teacher, nats", 4, False),
    "exact_match": ("exact match of the answer", 3, True),
}
PANELS = ("ce", "kl", "acc1", "exact_match")


def exact_match(path: Path) -> dict:
    """Return the share of answers whose final number is the reference's, how many there are, and half of the 95 % interval."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    right = sum(demo.final_answer(line["answer"]) == demo.final_answer(line["reference"]) for line in lines)
    share = right / len(lines)
    return {"exact_match": share, "answers": len(lines), "exact_match_half_interval": 1.96 * math.sqrt(share * (1 - share) / len(lines))}


def markdown(models: dict[str, dict]) -> str:
    """Return the comparison as a Markdown table, one model a column, aligned so that it reads in a terminal too."""
    table = [["", *models]]
    for name, (label, digits, _) in ROWS.items():
        if any(name in measures for measures in models.values()):
            table.append([label, *(f"{round(m[name], digits) + 0:,.{digits}f}" if name in m else "" for m in models.values())])
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = ["| " + " | ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))) + " |" for row in table]
    lines.insert(1, "| " + " | ".join("-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)) + " |")
    return "\n".join(lines)


def picture(models: dict[str, dict], out: Path) -> None:
    """Draw one panel of bars a measure, one bar a model."""
    if (plt := plots.pyplot()) is None:
        return
    panels = [name for name in PANELS if all(name in m for m in models.values())]
    figure, axes = plt.subplots(1, len(panels), figsize=(3.1 * len(panels), 3.4), squeeze=False, layout="constrained")
    colours = ["#4c566a", "#b8c0cc", "#e0b46c", "#3b7dd8", "#5aa27c", "#b06a9b"]
    for axis, name in zip(axes[0], panels):
        values = [m[name] if abs(m[name]) > 1e-6 else 0.0 for m in models.values()]  # a KL of rounding size may have either sign
        errors = [m.get(f"{name}_half_interval", 0) for m in models.values()]
        bars = axis.bar(range(len(values)), values, color=[colours[i % len(colours)] for i in range(len(values))], width=0.75,
                        yerr=errors if any(errors) else None, ecolor="#333333", capsize=3)
        axis.bar_label(bars, [f"{v:.3f}" for v in values], fontsize=8, padding=3)
        axis.set_xticks(range(len(values)), [name.replace(" ", "\n", 1) for name in models], fontsize=8)
        label, _, higher = ROWS[name]
        axis.set_title(f"{label}\n({'higher' if higher else 'lower'} is better)", fontsize=9)
        axis.set_ylim(0, max(v + e for v, e in zip(values, errors)) * 1.15 or 1)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=120)
    plt.close(figure)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("models", nargs="+", metavar="NAME=DIR", help="what the table calls a model, and the folder of its measures")
    parser.add_argument("--out", required=True, type=Path, help="path without ending: .json, .md and .png are written")
    args = parser.parse_args(argv)
    models = {}
    for entry in args.models:
        name, _, folder = entry.partition("=")
        if not folder:
            parser.error(f"{entry} is not NAME=DIR")
        measures = files.read_json(Path(folder) / "eval.json", mend="stage2_kd.py --eval-only --out " + folder)
        if (answers := Path(folder) / "answers.jsonl").exists():
            measures |= exact_match(answers)
        models[name] = measures
    args.out.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(args.out.with_suffix(".json"), models)
    files.write_text(args.out.with_suffix(".md"), markdown(models) + "\n")
    picture(models, args.out.with_suffix(".png"))
    targets, answers = (sorted({str(m[key]) for m in models.values() if key in m}) for key in ("targets", "answers"))
    answered = f", {'/'.join(answers)} answers" if answers else ""
    print(f"\nHeld out: {'/'.join(targets)} targets{answered}. Picture: {args.out.with_suffix('.png')}")
    print(f"\n{markdown(models)}\n")


if __name__ == "__main__":
    main()
