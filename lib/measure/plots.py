"""Pictures, by matplotlib: the curves of one run's history.jsonl, and what a prepared data set
holds."""

import warnings
from pathlib import Path

import numpy as np

from lib import files

# what a run's picture shows, where its history has it
PANELS = ("ce", "kl", "acc1", "loss", "feature", "attention", "contrastive")
GREY, BLUE, AMBER, RED = "#8a93a3", "#3b7dd8", "#e0b46c", "#c8584e"
SPLIT_COLOURS = {"train": BLUE, "val": AMBER}


def pyplot():
    """Return matplotlib.pyplot without a display, or None after one line that says how to get
    it."""
    try:
        import matplotlib
    except ImportError:
        print("no picture: matplotlib is missing (pip install matplotlib)")
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def curves(history: Path, out: Path, title: str) -> None:
    """Draw the measures of history.jsonl over steps: evaluations as dotted lines, training steps
    raw and thin, the teacher as a dashed line."""
    if (plt := pyplot()) is None:
        return
    lines = files.read_jsonl(history)
    panels = [p for p in PANELS if any(p in line for line in lines)]
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4 * len(panels), 3.2), squeeze=False, layout="constrained"
    )
    for axis, name in zip(axes[0], panels):
        there = [line for line in lines if name in line]
        for event, style in (
            ("train", dict(label="training step", color=GREY, lw=0.8)),
            ("eval", dict(label="held out", color=BLUE, marker="o", ms=3)),
        ):
            points = [(line["step"], line[name]) for line in there if line["event"] == event]
            if points:
                axis.plot(*zip(*points), **style)
        for line in there:
            if line["event"] == "teacher":
                axis.axhline(line[name], label="teacher, held out", color=AMBER, ls="--", lw=1.2)
        axis.set(xlabel="optimizer step", title=name)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize=8)
    figure.suptitle(title)
    figure.savefig(out, dpi=110)
    plt.close(figure)


def prepared(folder: Path) -> None:
    """Draw a prepared data set (see lib/data.py) into its report.png: lengths and classes above,
    rows by source and drops by reason below."""
    if (plt := pyplot()) is None:
        return
    meta = files.read_json(folder / "meta.json")
    split = [np.load(folder / f"{name}.rows.npy") for name in ("train", "val")]
    sources, drops = _sources(meta, *split), _drops(meta)
    places = max(len(sources), len(drops), 2)
    height = 4.6 + 0.3 * places  # inches: the lengths take 2.6, the bars 0.3 each
    figure = plt.figure(figsize=(11, height))

    def pair(top: float, bottom: float, **spare):
        """Return two axes side by side, between so many inches from below."""
        grid = figure.add_gridspec(
            1, 2, top=top / height, bottom=bottom / height, right=0.97, **spare
        )
        return [figure.add_subplot(grid[place]) for place in (0, 1)]

    spare = 0.35 if meta.get("classes") else 0.12
    _draw_lengths(pair(height - 0.85, height - 3.3, left=0.04, wspace=spare), meta, *split)
    below = pair(0.2 + 0.3 * places, 0.2, left=0.2, wspace=0.6)
    _bars(below[0], sources, "rows by source", SPLIT_COLOURS, places)
    _bars(below[1], drops, _dropped_of(meta, *split), {"dropped": RED}, places)
    figure.suptitle(_title(meta, *split), y=1 - 0.2 / height)
    with warnings.catch_warnings():
        # a source's name may hold characters that the font lacks
        warnings.filterwarnings("ignore", "Glyph")
        figure.savefig(folder / "report.png", dpi=110)
    plt.close(figure)


def _sources(meta: dict, train: np.ndarray, val: np.ndarray) -> list[tuple[str, list[int]]]:
    """Return each source's rows, (name, [train, val])."""
    names = [_short(source["name"]) for source in meta["sources"]]
    counts = [np.bincount(part["source"], minlength=len(names)) for part in (train, val)]
    return _largest(list(zip(names, np.transpose(counts).tolist())), "sources")


def _drops(meta: dict) -> list[tuple[str, list[int]]]:
    """Return how many rows were dropped, (reason, [count])."""
    return _largest([(_short(why), [count]) for why, count in meta["dropped"].items()], "reasons")


def _dropped_of(meta: dict, train: np.ndarray, val: np.ndarray) -> str:
    """Return how many rows were dropped, and of how many, in words."""
    lost = sum(meta["dropped"].values())
    read = f"of {len(train) + len(val) + lost:,} rows read"
    return f"{lost:,} {'prompts and answers' if meta.get('teacher') else read} were dropped"


def _title(meta: dict, train: np.ndarray, val: np.ndarray) -> str:
    """Return how many rows and tokens there are to learn, in words."""
    learnt, tokens = (
        sum(int(part[field].sum(dtype=np.int64)) for part in (train, val))
        for field in ("targets", "length")
    )
    of = f"{learnt:,} of {tokens:,} tokens are learnt"
    if labels := meta.get("classes"):
        of = f"one class of {len(labels)} a row"
    return f"{len(train):,} rows to train on, {len(val):,} held out; {of}"


def _draw_lengths(axes, meta: dict, train: np.ndarray, val: np.ndarray) -> None:
    """Draw how long prompts and answers are; of rows with a class each how long they are, and how
    many rows each class has."""
    targets, lengths = (
        np.concatenate([train[field], val[field]]).astype(np.int64)
        for field in ("targets", "length")
    )
    prompts = lengths - targets
    high = max(2, targets.max(), prompts.max())
    if not (labels := meta.get("classes")):
        low = max(1, min(targets.min(), prompts.min()))
        of_prompts = "prompt: how many tokens of a row are not learnt"
        _histogram(axes[0], prompts, of_prompts, GREY, low, high)
        of_answers = "answer: how many tokens of a row are learnt"
        _histogram(axes[1], targets, of_answers, BLUE, low, high)
        return
    _histogram(axes[0], lengths, "tokens of a row", GREY, max(1, lengths.min()), high)
    rows = [(_short(name), [count["train"], count["val"]]) for name, count in labels.items()]
    rows = _largest(rows, "classes", 8)
    _bars(axes[1], rows, f"rows of {len(labels)} classes", SPLIT_COLOURS, max(4, len(rows)))


def _short(name: str) -> str:
    """Shorten a path or a reason to what fits beside a bar: the end of a path tells more, the
    beginning of a reason."""
    name = name if " " in name else name.rsplit("/", 1)[-1]
    return name if len(name) <= 32 else name[:31] + "…"


def _largest(
    entries: list[tuple[str, list[int]]], what: str, most: int = 10
) -> list[tuple[str, list[int]]]:
    """Keep the largest entries, in their order; the others become one."""
    if len(entries) <= most:
        return entries
    entries = sorted(entries, key=lambda entry: -sum(entry[1]))
    rest = [counts for _, counts in entries[most - 1 :]]
    return [*entries[: most - 1], (f"{len(rest)} other {what}", np.sum(rest, 0).tolist())]


def _histogram(axis, values, label: str, colour: str, low: int, high: int) -> None:
    """Draw how many tokens rows hold, on a logarithmic axis from `low` to `high`, with the median
    and the 99th percentile.

    Bars begin and end between whole numbers, so that those of short rows differ in width: their
    areas are the shares, not their heights.
    """
    from matplotlib import ticker

    edges = np.unique(np.round(10 ** np.arange(0, np.log10(high + 1) + 2 / 15, 1 / 15)))
    edges = edges[: np.searchsorted(edges, high, side="right") + 1] - 0.5
    counts, _ = np.histogram(np.maximum(values, 1), edges)
    axis.stairs(counts / np.diff(np.log(edges)), edges, fill=True, color=colour)
    median, most = (int(np.percentile(values, share, method="nearest")) for share in (50, 99))
    axis.axvline(median, color="#333333", lw=1)
    axis.axvline(most, color="#333333", lw=1, ls=":")
    axis.set_title(
        f"median {median:,} (line), 99th percentile {most:,} (dotted), longest {values.max():,}",
        fontsize=9,
        loc="left",
    )
    axis.set(
        xscale="log", xlim=(max(0.8, low / 1.2), max(high, 10 * low) * 1.2), xlabel=label, yticks=[]
    )
    axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
    axis.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))
    axis.xaxis.set_minor_locator(ticker.NullLocator())
    axis.spines[["top", "right", "left"]].set_visible(False)


def _bars(
    axis, entries: list[tuple[str, list[int]]], title: str, parts: dict[str, str], places: int
) -> None:
    """Draw one horizontal bar an entry: its parts (name -> colour) end to end, the counts behind
    it, in a frame for `places` bars."""
    left = np.zeros(len(entries))
    for part, (name, colour) in enumerate(parts.items()):
        counts = [counts[part] for _, counts in entries]
        axis.barh(range(len(entries)), counts, left=left, color=colour, height=0.7, label=name)
        left = left + counts
    for place, (_, counts) in enumerate(entries):
        axis.annotate(
            "  " + " + ".join(f"{count:,}" for count in counts),
            (sum(counts), place),
            va="center",
            fontsize=8,
        )
    axis.set_yticks(range(len(entries)), [name for name, _ in entries], fontsize=8)
    axis.set(xticks=[], xlim=(0, max(left, default=1) * 1.4), ylim=(places - 0.5, -0.5))
    axis.set_title(title, fontsize=10, loc="left")
    axis.tick_params(length=0)
    axis.spines[["top", "right", "bottom", "left"]].set_visible(False)
    if len(parts) > 1:
        axis.legend(
            loc="lower right", bbox_to_anchor=(1, 1), ncols=len(parts), frameon=False, fontsize=8
        )
