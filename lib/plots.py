"""Pictures of runs, by matplotlib: the curves of one run's history.jsonl."""
import json
from pathlib import Path

PANELS = ("ce", "kl", "acc1", "loss")  # what a run's picture shows, where its history has it


def pyplot():
    """Return matplotlib.pyplot without a display, or None after one line that says how to get it."""
    try:
        import matplotlib
    except ImportError:
        print("no picture: matplotlib is missing (pip install matplotlib)")
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def curves(history: Path, out: Path, title: str) -> None:
    """Draw the measures of history.jsonl over steps: evaluations as dotted lines, the training loss raw and thin."""
    if (plt := pyplot()) is None:
        return
    lines = [json.loads(line) for line in history.read_text(encoding="utf-8").splitlines()]
    panels = [p for p in PANELS if any(p in line for line in lines)]
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3.2), squeeze=False, layout="constrained")
    for axis, name in zip(axes[0], panels):
        for event, style in (("train", dict(color="#8a93a3", lw=0.8)), ("eval", dict(color="#3b7dd8", marker="o", ms=3))):
            points = [(line["step"], line[name]) for line in lines if line["event"] == event and name in line]
            if points:
                axis.plot(*zip(*points), label="held out" if event == "eval" else "training step", **style)
        axis.set(xlabel="optimizer step", title=name)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize=8)
    figure.suptitle(title)
    figure.savefig(out, dpi=110)
    plt.close(figure)
