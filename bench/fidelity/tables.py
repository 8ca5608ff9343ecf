"""Put the figures of fidelity.py and outcome.py into docs/fidelity.md and draw
docs/fidelity.png.

    python bench/fidelity/tables.py --results out/fidelity --doc docs/fidelity.md

Reads   RESULTS/ANYTHING/angles.json (fidelity.py) and RESULTS/outcome-ANYTHING/METHOD-T-SEED.json
        (outcome.py).
Writes  the text between `<!-- NAME -->` and `<!-- end -->` of the document, for NAME = angles
        FOLDER, tried FOLDER, outcome FOLDER; and beside it a picture of the same name: angle over
        bytes a target.
"""

import argparse
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[number]) for number in (0, 1, 2)]
import document  # noqa: E402
import outcome  # noqa: E402

from lib import files  # noqa: E402


def angles(result: dict, tried: bool) -> str:
    """Return one markdown table for each student: angle and norm ratio by temperature, and KL(P ||
    P')."""
    lines = []
    for student, about in (
        (name, about) for name, about in result["about"].items() if isinstance(about, dict)
    ):
        rows = [
            row
            for row in result["rows"]
            if row["student"] == student and bool(row.get("tried")) == tried
        ]
        temperatures = sorted({row["T"] for row in rows})
        some = [t for t in temperatures if t in (1, 2, 4)]
        layers = f", {len(about['layers'])} of its layers" if about["layers"] else ""
        head = ["tried (rank 64, k 16, not packed)"] if tried else ["record", "bytes"]
        head += [f"T={t:g}" for t in temperatures] + [
            f"KL at T={', '.join(f'{t:g}' for t in some)}"
        ]
        lines += [
            (
                f"{result['about']['teacher']} -> {student}: {about['student']}{layers}, KL"
                f" {about['kl']:.2f} nats; {result['about']['targets']:,} targets, basis fitted to"
                f" {result['about']['fitted_to']:,} others."
            ),
            "",
            f"| {' | '.join(head)} |",
            "|" + " --- |" * len(head),
        ]
        for method in dict.fromkeys(row["method"] for row in rows):
            by = {row["T"]: row for row in rows if row["method"] == method}
            kl = " / ".join("inf" if by[t]["kl"] is None else f"{by[t]['kl']:.3f}" for t in some)
            lines.append(
                f"| {method} |"
                + (f" {by[some[0]]['bytes']} |" if not tried else "")
                + "".join(f" {by[t]['angle']:.1f} (x{by[t]['ratio']:.2f}) |" for t in temperatures)
                + f" {kl} |"
            )
        lines.append("")
    return "\n".join(lines)


FAMILIES = {  # the kind of a method: the color of its line, and what the legend says of it
    "renormalised": ("tab:red", "top k renormalised"),
    "bucket": ("tab:blue", "top k and exact bucket"),
    "sampling": ("tab:gray", "random sampling, 50 rounds"),
    None: ("tab:green", "top k, exact mass and basis"),
}
STYLES = ("-", "--", ":", "-.")


def picture(results: dict[str, dict], path: Path) -> None:
    """Draw the angle over the bytes of a target, a panel for each of T = 1, 2, 4; one line a family
    of methods and student."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(13, 4.2), sharey=True)
    sides = [
        (folder, student)
        for folder, result in results.items()
        for student, about in result["about"].items()
        if isinstance(about, dict)
    ]
    for panel, t in zip(panels, (1, 2, 4)):
        for (folder, student), style in zip(sides, STYLES):
            rows = [
                row
                for row in results[folder]["rows"]
                if row["student"] == student and row["T"] == t and not row.get("tried")
            ]
            for kind, (color, _) in FAMILIES.items():
                points = sorted(
                    (row["bytes"], row["angle"]) for row in rows if row.get("kind") == kind
                )
                best = [
                    (size, angle)
                    for i, (size, angle) in enumerate(points)
                    if angle <= min(a for _, a in points[: i + 1])
                ]
                panel.plot(
                    *zip(*points),
                    "x" if kind == "sampling" else ".",
                    color=color,
                    markersize=6 if kind == "sampling" else 4,
                )
                panel.plot(*zip(*best), style, color=color, linewidth=1.6)
        panel.set(title=f"T = {t}", xlabel="bytes a target", yscale="log")
        panel.grid(alpha=0.3, which="both", linewidth=0.5)
        panel.axvline(200, color="black", linewidth=0.6)
    panels[0].set_ylabel("degrees to full-vocabulary distillation")
    lines = [pyplot.Line2D([], [], color=color, label=label) for color, label in FAMILIES.values()]
    lines += [
        pyplot.Line2D(
            [],
            [],
            color="black",
            linestyle=style,
            label=f"{results[folder]['about']['teacher']}, {student}",
        )
        for (folder, student), style in zip(sides, STYLES)
    ]
    figure.legend(handles=lines, loc="lower center", ncol=4, frameon=False)
    figure.tight_layout(rect=(0, 0.13, 1, 1))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--results", required=True)
    parser.add_argument("--doc", required=True)
    args = parser.parse_args(argv)
    folder, doc = Path(args.results), Path(args.doc)
    found = {
        path.parent.name: files.read_json(path) for path in sorted(folder.glob("*/angles.json"))
    }
    blocks = {f"angles {name}": angles(result, False) for name, result in found.items()}
    blocks |= {
        f"tried {name}": angles(result, True)
        for name, result in found.items()
        if any(row.get("tried") for row in result["rows"])
    }
    blocks |= {
        f"outcome {path.name.removeprefix('outcome-')}": outcome.table(path)
        for path in sorted(folder.glob("outcome-*"))
    }
    document.fill(doc, blocks)
    if found:
        picture(found, doc.with_suffix(".png"))


if __name__ == "__main__":
    main()
