"""Put the figures of evidence.py into docs/on-policy.md.

    python bench/onpolicy/evidence_tables.py --results bench/onpolicy/results-*.json \\
        --doc docs/on-policy.md

Reads   what evidence.py wrote, a file a setting.
Writes  the text between `<!-- NAME SETTING -->` and `<!-- end -->` of the document, for NAME =
        measures (mean and 95 % interval over the seeds), paired (differences to condition (a) of
        the same seed, likewise), cost.
"""

import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import document  # noqa: E402

from lib import files  # noqa: E402

# two-sided 95 % of Student's t by degrees of freedom, one less than the seeds
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
BASE = "given"
MEASURES = {
    "score": "{score}",
    "kl_given": "KL, given",
    "rkl_given": "reverse KL, given",
    "kl_own": "KL, own",
}
COSTS = {  # title, what a value is divided by, its format
    "rows": ("rows to train on", 1, ",.0f"),
    "written_tokens": ("tokens written", 1, ",.0f"),
    "write_s": ("writing, s", 1, ".0f"),
    "dump_s": ("teacher's records, s", 1, ".0f"),
    "record_bytes": ("records, MB", 1e6, ".1f"),
    "train_s": ("training, s", 1, ".0f"),
}
SCORES = {"exact": "exact match", "rougeL": "ROUGE-L"}


def interval(values: list[float]) -> tuple[float, float | None]:
    """Return the mean and half the width of its 95 % interval by Student's t, None of one value.
    interval([1, 2, 3]) == (2.0, 2.484...): 4.303 * 1 / sqrt(3)."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return mean, None
    spread = statistics.stdev(values) / len(values) ** 0.5
    return mean, T95[len(values) - 1] * spread


def shown(values: list[float], signed: bool = False) -> str:
    """Return mean ± half-width as a cell: shown([1, 2, 3]) == "2.000 ± 2.484"."""
    if not values:
        return ""
    mean, half = interval(values)
    told = f"{mean:+.3f}" if signed else f"{mean:.3f}"
    return told if half is None else f"{told} ± {half:.3f}"


def table(head: list[str], lines: list[list[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def in_order(result: dict) -> dict[str, dict[str, dict]]:
    """Return {condition: {seed: what was kept}} in the order of the labels."""
    found = {}
    for name in result["labels"]:
        by_seed = {seed: kept[name] for seed, kept in result["seeds"].items() if name in kept}
        if by_seed:
            found[name] = by_seed
    return found


def titles(result: dict) -> list[str]:
    score = SCORES[result["settings"]["score"]]
    return [title.format(score=score) for title in MEASURES.values()]


def measures(result: dict) -> str:
    """Return the table of means, a line a condition."""
    lines = []
    for name, by_seed in in_order(result).items():
        each = [kept["measures"] for kept in by_seed.values()]
        cells = [shown([one[measure] for one in each]) for measure in MEASURES]
        lines.append([result["labels"][name], *cells, str(len(each))])
    return table(["", *titles(result), "seeds"], lines)


def paired(result: dict) -> str:
    """Return the table of differences to BASE of the same seed, a line a trained condition."""
    found, lines = in_order(result), []
    base = found.get(BASE, {})
    for name, by_seed in found.items():
        seeds = [seed for seed in by_seed if seed in base]
        if name in (BASE, "teacher") or not seeds:
            continue
        cells = []
        for measure in MEASURES:
            pairs = [(by_seed[seed]["measures"], base[seed]["measures"]) for seed in seeds]
            cells.append(shown([one[measure] - other[measure] for one, other in pairs], True))
        lines.append([result["labels"][name], *cells, str(len(seeds))])
    return table(["less (a)", *titles(result), "seeds"], lines)


def cost(result: dict) -> str:
    """Return the table of costs, means over the seeds, a line a trained condition."""
    lines = []
    for name, by_seed in in_order(result).items():
        each = [kept["cost"] for kept in by_seed.values()]
        if not any(each):
            continue
        cells = []
        for part, (_, unit, form) in COSTS.items():
            values = [one[part] / unit for one in each if part in one]
            cells.append(format(statistics.mean(values), form) if values else "")
        lines.append([result["labels"][name], *cells])
    return table(["", *(title for title, _, _ in COSTS.values())], lines)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--results", required=True, nargs="+")
    parser.add_argument("--doc", required=True)
    args = parser.parse_args(argv)
    blocks = {}
    for path in args.results:
        result = files.read_json(Path(path))
        for name, make in (("measures", measures), ("paired", paired), ("cost", cost)):
            blocks[f"{name} {result['setting']}"] = make(result)
    document.fill(Path(args.doc), blocks)


if __name__ == "__main__":
    main()
