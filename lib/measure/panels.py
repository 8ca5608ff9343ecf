"""Pictures of a comparison, a panel a measure: bars of all models, and curves over training. What a
panel shows is worked out here; the page's template draws it, and matplotlib draws the bars into
OUT.png for a README.

Colours are those of Okabe and Ito, or greys, told apart by the colour-blind and in print; a model
has one colour in all pictures.
"""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

from lib.measure import plots, runs
from lib.measure.results import LOWER, ROWS, value_of

CURVES = ("ce", "kl", "acc1", "accuracy", "macro_f1")
BARS = (*CURVES, "exact", "bleu", "rouge1", "rougeL", "parameters")
ROLE_COLOURS = {
    "teacher": "#4c566a",
    "before": "#b3bac6",
    "control": "#e69f00",
    "student": "#0072b2",
}
OTHERS = ("#009e73", "#cc79a7", "#56b4e9", "#d55e00")
MOST_BARS = 6  # of a panel; of more models those with a role are drawn, and the last ones
WIDE = 14.0  # inches of panels side by side that a README's width still shows legibly


def model_colours(result: dict) -> dict[str, str]:
    """Return a colour for each model: its role's, or the next of the others."""
    role_of = {name: role for role, name in result["roles"].items()}
    others = [name for name in result["models"] if name not in role_of]
    colours = {name: OTHERS[i % len(OTHERS)] for i, name in enumerate(others)}
    return colours | {name: ROLE_COLOURS[role] for name, role in role_of.items()}


def short(measure: str, value: float) -> str:
    """Return a value as it stands over a bar: short("parameters", 685056) == "685k"."""
    if measure != "parameters":
        return f"{value + 0:.3f}".replace("-0.000", "0.000")
    for unit in ("", "k", "M", "B"):
        if value < 999.5:
            return f"{value:.3g}{unit}" if value < 99.95 else f"{value:.0f}{unit}"
        value /= 1000
    return f"{value * 1000:,.0f}B"


# --- bars


def drawn(result: dict) -> tuple[list[str], list[str]]:
    """Return the models that are drawn as bars, in the table's order, and the measures: those which
    two of these models have."""
    models, roles = result["models"], result["roles"].values()
    others = [name for name in models if name not in roles][-(MOST_BARS - len(roles)) :]
    names = [name for name in models if name in roles or name in others]

    def having(measure):
        return sum(value_of(models[name], measure) is not None for name in names)

    return names, [measure for measure in BARS if having(measure) > 1]


def bar_panel(measure: str, result: dict, names: Sequence[str]) -> dict:
    """Return one panel: "title", "better" (which way), "top" and "ticks" (value, text) of the axis
    from 0 up, and "bars", one a model: "model", "name" in lines, and where it has a value "value",
    "text", and "low" and "high", the ends of its 95 % interval.
    """
    bars = []
    for name in names:
        model, lines = result["models"][name], textwrap.wrap(name.replace("-", "- "), 10)[:4]
        bars.append({"model": name, "name": lines})
        if (value := value_of(model, measure)) is not None:
            value = max(0.0, value) if measure in LOWER else value
            low, high = model.get("intervals", {}).get(measure, (value, value))
            bars[-1] |= {"value": value, "text": short(measure, value)}
            bars[-1] |= {"low": min(low, value), "high": max(high, value)}
    sizes = measure == "parameters"
    top = 1.12 * max(bar.get("high", 0.0) for bar in bars) or 1.0
    at = [value for value in ticks(0.0, top) if value <= top]
    return {
        "title": ROWS[measure][0],
        "better": "" if sizes else f"({'lower' if measure in LOWER else 'higher'} is better)",
        "top": top,
        "ticks": [(value, short(measure, value) if sizes else f"{value:g}") for value in at],
        "bars": bars,
    }


def bar_panels(result: dict) -> list[dict]:
    """Return the panels of bars."""
    names, measures = drawn(result)
    return [bar_panel(measure, result, names) for measure in measures]


def draw_bars(axis, panel: dict, colours: dict[str, str]) -> None:
    """Draw one bar a model, with its 95 % interval where there is one."""
    above = dict(xytext=(0, 3), textcoords="offset points", ha="center")
    for i, bar in enumerate(panel["bars"]):
        if "value" not in bar:
            axis.annotate("–", (i, 0), **above)
            continue
        value, low, high = bar["value"], bar["low"], bar["high"]
        axis.bar(i, value, color=colours[bar["model"]], width=0.75)
        if high > low:
            around = [[value - low], [high - value]]
            axis.errorbar(i, value, around, fmt="none", ecolor="black", elinewidth=1, capsize=3)
        axis.annotate(bar["text"], (i, high), **above, fontsize=8.5)
    names = ["\n".join(bar["name"]) for bar in panel["bars"]]
    axis.set_title(f"{panel['title']}\n{panel['better']}".rstrip(), fontsize=9.5)
    axis.set(xlim=(-0.6, len(names) - 0.4), ylim=(0, panel["top"]))
    axis.set_xticks(range(len(names)), names, fontsize=8.5)
    axis.set_yticks(*zip(*panel["ticks"]), fontsize=8.5)
    axis.tick_params(axis="x", length=0)
    axis.spines[["top", "right"]].set_visible(False)


def png(result: dict, out: Path) -> None:
    """Draw OUT.png: the panels of bars in one row, or in two."""
    panels = bar_panels(result)
    if not panels or (plt := plots.pyplot()) is None:
        return
    width = max(2.7, 0.55 * len(panels[0]["bars"]) + 0.6)  # inches
    colours, rows = model_colours(result), -(-len(panels) // int(WIDE / width))
    wide = -(-len(panels) // rows)
    with plt.rc_context({"text.parse_math": False}):  # a name may hold dollars
        figure, axes = plt.subplots(
            rows, wide, figsize=(width * wide, 3.1 * rows), squeeze=False, layout="constrained"
        )
        for axis in axes.flat[len(panels) :]:
            axis.remove()
        for axis, panel in zip(axes.flat, panels):
            draw_bars(axis, panel, colours)
        figure.savefig(out, dpi=120)
    plt.close(figure)


# --- curves


def first_steps(read: dict[str, dict], names: Sequence[str]) -> dict[str, int]:
    """Return after how many steps of stages before it each run began: those up to the checkpoint of
    a compared run that it started from."""

    def start(name, left):
        before = runs.parent(name, read, names)
        if not before or not left:  # `left` ends what would go in a circle
            return 0
        return start(before, left - 1) + read[before]["at_best"].get("step", 0)

    return {name: start(name, len(names)) for name in names}


def training_curves(read: dict[str, dict], models: dict[str, dict], roles: dict[str, str]) -> dict:
    """Return {"runs": {name: [(step, evaluation)]}, "level": the teacher's measures, "left": runs
    whose curves are of other held-out rows, "shifted": whether a run begins above step 0}."""

    def held(name):
        return read[name]["settings"].get("data identity")

    student = roles.get("student")
    data = held(student if student in read else next(iter(read))) if read else None
    lines = {name: runs.evaluations(read[name]["history"]) for name in read if held(name) == data}
    lines = {name: found for name, found in lines.items() if found}
    begin = first_steps(read, list(lines))
    # what stage 2 knows of its teacher
    told = [line for run in read.values() for line in run["history"] if line["event"] == "teacher"]
    level = models[roles["teacher"]] if "teacher" in roles else told[-1] if told else {}
    return {
        "runs": {
            name: [(begin[name] + line["step"], line) for line in found]
            for name, found in lines.items()
        },
        "level": level,
        "left": [name for name in read if name not in lines],
        "shifted": any(begin.values()),
    }


def curve_panels(curves: dict) -> list[dict]:
    """Return the panels of `training_curves`: a panel a measure that a run has."""
    found = {}
    for measure in CURVES:
        lines = {
            name: [(step, line[measure]) for step, line in points if measure in line]
            for name, points in curves["runs"].items()
        }
        if any(lines.values()):
            found[measure] = {name: points for name, points in lines.items() if points}
    return [curve_panel(measure, lines, curves) for measure, lines in found.items()]


def curve_panel(measure: str, lines: dict[str, list], curves: dict) -> dict:
    """Return one panel, its places as shares of the axes, from the left and from below: "title",
    "under" (what the steps are), "lines" {model: points}, "level" (the teacher's own, or None),
    "across" and "up" (ticks: place, text)."""
    steps, values = zip(*(point for points in lines.values() for point in points))
    level = curves["level"].get(measure)
    if level is not None and level <= 1e-4:  # its KL to itself is no level to see
        level = None
    seen = [*values, level] if level is not None else values
    log = measure in LOWER and min(seen) > 0 and max(seen) > 8 * min(seen)
    place, up = axis_of(min(seen), max(seen), log)
    across, steps_at = axis_of(min(steps), max(steps))
    before = ", those of the stage before included" if curves["shifted"] else ""
    return {
        "title": f"{ROWS[measure][0]}, held out",
        "under": f"optimizer steps{before}",
        "lines": {
            name: [(across(step), place(value)) for step, value in points]
            for name, points in lines.items()
        },
        "level": None if level is None else place(level),
        "across": [(across(step), f"{step:g}") for step in steps_at],
        "up": [(place(value), f"{value:g}") for value in up],
    }


def axis_of(low: float, high: float, log: bool = False):
    """Return the function from a value to its place on an axis, a share of its length, and the
    values of its ticks. The axis is a little longer than from `low` to `high`."""
    scale = math.log10 if log else float
    first, last = scale(low), scale(high)
    spare = 0.05 * (last - first) or 0.5

    def place(value):
        return (scale(value) - first + spare) / (last - first + 2 * spare)

    found = ticks(low, high)
    if log:
        powers = range(math.floor(first), math.ceil(last) + 1)
        found = [m * 10.0**power for power in powers for m in (1, 2, 5)]
    return place, [value for value in found if 0 <= place(value) <= 1]


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return round numbers between and around two: ticks(0.1, 0.34) == [0.1, 0.15, 0.2, 0.25, 0.3,
    0.35]."""
    if low == high:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if high - low <= most * m * power)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [float(f"{i * step:.6g}") for i in range(first, last + 1)]
