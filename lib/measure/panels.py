"""Pictures of a comparison, by matplotlib: one panel a measure. OUT.png for a README, and the same
panels as SVG for a page, light or dark.

Colours are those of Okabe and Ito, or greys, told apart by the colour-blind and in print; a model
has one colour in all pictures.
"""

import io
import re
import textwrap
from pathlib import Path

from lib.measure import plots
from lib.measure.results import LOWER, ROWS, at

BARS = (
    "ce",
    "kl",
    "acc1",
    "accuracy",
    "macro_f1",
    "exact",
    "bleu",
    "rouge1",
    "rougeL",
    "parameters",
)
CURVES = ("ce", "kl", "acc1", "accuracy", "macro_f1")
ROLES = {"teacher": "#4c566a", "before": "#b3bac6", "control": "#e69f00", "student": "#0072b2"}
OTHERS = ("#009e73", "#cc79a7", "#56b4e9", "#d55e00")
INK = "#123456"  # stands for the page's own colour of text until the SVG is written
MOST = 6  # bars of a panel; of more models those with a role are drawn, and the last ones
WIDE = 14.0  # inches of panels side by side that a README's width still shows legibly


def colours(names, roles: dict[str, str]) -> dict[str, str]:
    """Return a colour for each model: its role's, or the next of the others."""
    role_of, others = (
        {name: role for role, name in roles.items()},
        [name for name in names if name not in roles.values()],
    )
    return {
        name: ROLES[role_of[name]] if name in role_of else OTHERS[others.index(name) % len(OTHERS)]
        for name in names
    }


def drawn(result: dict) -> tuple[list[str], list[str]]:
    """Return the models that are drawn as bars, in the table's order, and the measures: those which
    two of these models have."""
    roles = result["roles"].values()
    others = [name for name in result["models"] if name not in roles][-(MOST - len(roles)) :]
    names = [name for name in result["models"] if name in roles or name in others]
    return names, [
        m for m in BARS if sum(at(result["models"][name], m) is not None for name in names) > 1
    ]


def panel_width(names: list[str]) -> float:
    """Return how many inches a panel of so many bars needs."""
    return max(2.7, 0.55 * len(names) + 0.6)


def short(measure: str, value: float) -> str:
    """Return a value as it stands over a bar: short("parameters", 685056) == "685k"."""
    if measure != "parameters":
        return f"{value + 0:.3f}".replace("-0.000", "0.000")
    for unit in ("", "k", "M", "B"):
        if value < 999.5:
            return f"{value:.3g}{unit}" if value < 99.95 else f"{value:.0f}{unit}"
        value /= 1000
    return f"{value * 1000:,.0f}B"


def bars(axis, measure: str, result: dict, names: list[str]) -> None:
    """Draw one bar a model, with its 95 % interval where there is one."""
    colour = colours(result["models"], result["roles"])
    values = [at(result["models"][name], measure) for name in names]
    there = [
        (i, max(0.0, value) if measure in LOWER else value, name)
        for i, (name, value) in enumerate(zip(names, values))
        if value is not None
    ]
    top = 0.0
    for i, value, name in there:
        low, high = (result["models"][name].get("intervals") or {}).get(measure, (value, value))
        axis.bar(i, value, color=colour[name], width=0.75)
        if high > low:
            around = [[max(0, value - low)], [max(0, high - value)]]
            axis.errorbar(
                i, value, around, fmt="none", ecolor=axis.title.get_color(), elinewidth=1, capsize=3
            )
        axis.annotate(
            short(measure, value),
            (i, max(value, high)),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            fontsize=8.5,
        )
        top = max(top, value, high)
    for i in set(range(len(names))) - {i for i, *_ in there}:
        axis.annotate("–", (i, 0), xytext=(0, 3), textcoords="offset points", ha="center")
    axis.set_xticks(
        range(len(names)),
        ["\n".join(textwrap.wrap(name.replace("-", "- "), 10)[:4]) for name in names],
        fontsize=8.5,
    )
    axis.set_xlim(-0.6, len(names) - 0.4)
    axis.set_ylim(0, top * 1.12 or 1)
    better = (
        ""
        if measure == "parameters"
        else f"\n({'lower' if measure in LOWER else 'higher'} is better)"
    )
    axis.set_title(f"{ROWS[measure][0]}{better}", fontsize=9.5)
    axis.tick_params(axis="y", labelsize=8.5)
    axis.tick_params(axis="x", length=0)
    axis.yaxis.set_major_locator(_ticks())
    if measure == "parameters":
        axis.yaxis.set_major_formatter(lambda value, _: short(measure, value) if value else "0")
    axis.spines[["top", "right"]].set_visible(False)


def _ticks():
    from matplotlib import ticker

    return ticker.MaxNLocator(5)


def curve(axis, measure: str, lines: dict, result: dict) -> None:
    """Draw a measure over the optimizer steps of all runs, a point an evaluation, and the teacher's
    own level, dashed."""
    colour, seen = colours(result["models"], result["roles"]), []
    for name, points in lines["runs"].items():
        points = [(step, line[measure]) for step, line in points if measure in line]
        if points:
            axis.plot(*zip(*points), color=colour[name], marker="o", ms=3.5, lw=1.5, label=name)
            seen += [value for _, value in points]
    if (
        level := lines["level"].get(measure)
    ) is not None and level > 1e-4:  # its KL to itself is no level to see
        axis.axhline(level, color=ROLES["teacher"], ls="--", lw=1.2)
        seen.append(level)
    if measure in LOWER and min(seen) > 0 and max(seen) > 8 * min(seen):
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.yaxis.set_minor_formatter(
            lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in "25" else ""
        )
    axis.set_title(f"{ROWS[measure][0]}, held out", fontsize=9.5)
    axis.set_xlabel(
        "optimizer steps" + (", those of the stage before included" if lines["shifted"] else ""),
        fontsize=8.5,
    )
    axis.tick_params(which="both", labelsize=8.5)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def png(result: dict, out: Path) -> None:
    """Draw OUT.png: the panels of bars in one row, or in two."""
    names, measures = drawn(result)
    if not measures or (plt := plots.pyplot()) is None:
        return
    width = panel_width(names)
    rows = -(-len(measures) // int(WIDE / width))
    wide = -(-len(measures) // rows)
    with plt.rc_context({"text.parse_math": False}):  # a name may hold dollars
        figure, axes = plt.subplots(
            rows, wide, figsize=(width * wide, 3.1 * rows), squeeze=False, layout="constrained"
        )
        for axis in axes.flat[len(measures) :]:
            axis.remove()
        for axis, measure in zip(axes.flat, measures):
            bars(axis, measure, result, names)
        figure.savefig(out, dpi=120)
    plt.close(figure)


def svgs(result: dict, lines: dict) -> tuple[list[str], list[str]]:
    """Return the panels of bars, and those of curves, as SVG elements whose text takes the page's
    colour; none where matplotlib is missing."""
    names, measures = drawn(result)
    charts = [
        m
        for m in CURVES
        if any(m in line for points in lines["runs"].values() for _, line in points)
    ]
    if not (measures or charts) or (plt := plots.pyplot()) is None:
        return [], []
    return (
        [
            _svg(plt, (panel_width(names), 2.9), m, lambda axis, m=m: bars(axis, m, result, names))
            for m in measures
        ],
        [_svg(plt, (4.2, 3.1), m, lambda axis, m=m: curve(axis, m, lines, result)) for m in charts],
    )


def _svg(plt, size: tuple[float, float], measure: str, draw) -> str:
    style = {
        name: INK
        for name in (
            "text.color",
            "axes.edgecolor",
            "axes.labelcolor",
            "xtick.color",
            "ytick.color",
        )
    }
    with plt.rc_context(
        style | {"text.parse_math": False, "svg.fonttype": "none", "svg.hashsalt": measure}
    ):
        figure, axis = plt.subplots(figsize=size, layout="constrained")
        draw(axis)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
        plt.close(figure)
    drawing = text.getvalue()
    drawing = re.sub(r"<metadata>.*?</metadata>", "", drawing[drawing.index("<svg") :], flags=re.S)
    drawing = re.sub(r'<g id="[^"]*"', "<g", drawing).replace(INK, "currentColor")
    drawing = re.sub(
        r"font(-family)?: ([^;']*)'[^;]*(?=[;\"])", r"font\1: \2system-ui, sans-serif", drawing
    )
    for role, colour in ROLES.items():
        drawing = drawing.replace(colour, f"var(--{role})")
    label = f"{ROWS[measure][0]}: the numbers are in the table"
    return re.sub(
        r'<svg [^>]*?(viewBox="[^"]*")[^>]*>',
        rf'<svg \1 role="img" aria-label="{label}">',
        drawing,
        count=1,
    )
