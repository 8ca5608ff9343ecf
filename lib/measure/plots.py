"""Pictures, by matplotlib: the curves of one run's history.jsonl, and what a prepared data set
holds."""

import json
import warnings
from pathlib import Path

import numpy as np

PANELS = (
    "ce",
    "kl",
    "acc1",
    "loss",
    "feature",
    "attention",
    "contrastive",
)  # what a run's picture shows, where its history has it
GREY, BLUE, AMBER, RED = "#8a93a3", "#3b7dd8", "#e0b46c", "#c8584e"


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
    lines = [json.loads(line) for line in history.read_text(encoding="utf-8").splitlines()]
    panels = [p for p in PANELS if any(p in line for line in lines)]
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4 * len(panels), 3.2), squeeze=False, layout="constrained"
    )
    for axis, name in zip(axes[0], panels):
        for event, style in (
            ("train", dict(color=GREY, lw=0.8)),
            ("eval", dict(color=BLUE, marker="o", ms=3)),
        ):
            points = [
                (line["step"], line[name])
                for line in lines
                if line["event"] == event and name in line
            ]
            if points:
                axis.plot(
                    *zip(*points), label="held out" if event == "eval" else "training step", **style
                )
        for line in lines:
            if line["event"] == "teacher" and name in line:
                axis.axhline(line[name], label="teacher, held out", color=AMBER, ls="--", lw=1.2)
        axis.set(xlabel="optimizer step", title=name)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize=8)
    figure.suptitle(title)
    figure.savefig(out, dpi=110)
    plt.close(figure)


def prepared(folder: Path) -> None:
    """Draw a prepared data set (see lib/data.py) into its report.png: lengths, rows by source,
    drops by reason."""
    if (plt := pyplot()) is None:
        return
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    train, val = (np.load(folder / f"{split}.rows.npy") for split in ("train", "val"))
    rows = np.concatenate([train, val])
    targets, lengths = rows["targets"].astype(np.int64), rows["length"].astype(np.int64)

    counts = zip(
        *(
            np.bincount(part["source"], minlength=len(meta["sources"])).tolist()
            for part in (train, val)
        )
    )
    sources = _largest(
        [(_short(source["name"]), list(both)) for source, both in zip(meta["sources"], counts)],
        "sources",
    )
    drops = _largest(
        [(_short(reason), [count]) for reason, count in meta["dropped"].items()], "reasons"
    )

    places = max(len(sources), len(drops), 2)
    height = 4.6 + 0.3 * places  # inches: the lengths take 2.6, the bars 0.3 each

    def inch(*values):
        return [value / height for value in values]

    figure = plt.figure(figsize=(11, height))
    lengths_at = dict(
        zip(("top", "bottom"), inch(height - 0.85, height - 3.3)),
        left=0.04,
        right=0.97,
        wspace=0.12,
    )
    bars_at = dict(
        zip(("top", "bottom"), inch(0.2 + 0.3 * places, 0.2)), left=0.2, right=0.97, wspace=0.6
    )
    low, high = (
        max(1, min(targets.min(), (lengths - targets).min())),
        max(2, targets.max(), (lengths - targets).max()),
    )
    lengths_of = (
        (0, lengths - targets, "prompt: how many tokens of a row are not learnt", GREY),
        (1, targets, "answer: how many tokens of a row are learnt", BLUE),
    )
    if labels := meta.get("classes"):
        lengths_of, low = ((0, lengths, "tokens of a row", GREY),), max(1, lengths.min())
        there = _largest(
            [(_short(name), [count["train"], count["val"]]) for name, count in labels.items()],
            "classes",
            8,
        )
        axis = figure.add_subplot(figure.add_gridspec(1, 2, **lengths_at | {"wspace": 0.35})[1])
        _bars(
            axis,
            there,
            f"rows of {len(labels)} classes",
            {"train": BLUE, "val": AMBER},
            max(4, len(there)),
        )
    for place, values, label, colour in lengths_of:
        _histogram(
            figure.add_subplot(figure.add_gridspec(1, 2, **lengths_at)[place]),
            values,
            label,
            colour,
            low,
            high,
        )
    axes = [figure.add_subplot(figure.add_gridspec(1, 2, **bars_at)[place]) for place in (0, 1)]
    _bars(axes[0], sources, "rows by source", {"train": BLUE, "val": AMBER}, places)
    lost = sum(meta["dropped"].values())
    of = "prompts and answers" if meta.get("teacher") else f"of {len(rows) + lost:,} rows read"
    _bars(axes[1], drops, f"{lost:,} {of} were dropped", {"dropped": RED}, places)
    learnt = (
        f"one class of {len(labels)} a row"
        if labels
        else f"{targets.sum():,} of {lengths.sum():,} tokens are learnt"
    )
    figure.suptitle(
        f"{len(train):,} rows to train on, {len(val):,} held out; {learnt}", y=1 - 0.2 / height
    )
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Glyph"
        )  # a source's name may hold characters that the font lacks
        figure.savefig(folder / "report.png", dpi=110)
    plt.close(figure)


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
