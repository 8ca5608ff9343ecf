"""Run and evaluation folders written by hand, as the trainers and chat.py leave them: JSON alone,
no model."""

import json
import os
from pathlib import Path

DATA, SHA = "d" * 64, "5" * 64
MEASURES = {  # ce, ppl, acc1, acc5, kl, exact of a small comparison
    "teacher": (0.11, 1.116, 0.95, 0.99, 0.0, 0.996),
    "stage1": (0.31, 1.363, 0.89, 0.98, 0.2, 0.122),
    "control": (0.22, 1.246, 0.937, 0.994, 0.165, 0.608),
    "stage2": (0.14, 1.150, 0.943, 0.992, 0.031, 0.816),
}


def write(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def jsonl(path: Path, lines: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def run(
    folder: Path,
    steps: int = 20,
    taken: int | None = None,
    finished: bool = True,
    when: float | None = None,
    history=None,
    **settings,
) -> Path:
    """Write a run: an evaluation at its begin, its middle and its end, of which the middle one is
    the best by CE."""
    taken = steps if taken is None else taken
    settings = {
        "data": "data/x",
        "student": "base",
        "steps": steps,
        "stage": "stage1",
        "best": "ce",
        "lr": 0.001,
        "data identity": DATA,
    } | settings
    ce = {0: 0.9, taken // 2: 0.3, taken: 0.4}
    lines = [
        {
            "event": "eval",
            "step": step,
            "ce": value,
            "acc1": 1 - value,
            "kl": value / 2,
            "targets": 7,
        }
        for step, value in ce.items()
    ]
    lines += [
        {"event": "train", "step": step, "loss": 1.0, "ce": 1.0, "tok_per_s": pace}
        for step, pace in ((0, 10.0), (1, 20.0), (2, 30.0))
    ]
    jsonl(folder / "history.jsonl", lines if history is None else history)
    if finished:
        early = {"stopped_early": taken} if taken < steps else {}
        write(
            folder / "config.json",
            {
                "settings": settings,
                "command": ["stage1_sft.py", "--out", str(folder), "--data", "data/x"],
                "steps": steps,
                **early,
                "updates": taken,
                "best": 0.3,
                "best_by": "ce",
                "trained_s": 12.5,
                "final": {},
                "git": "abc",
                "versions": {"python": "3.11", "torch": "2.13"},
            },
        )
    else:
        write(
            folder / "last" / "state.json",
            {
                "step": taken,
                "updates": taken,
                "best": 0.3,
                "trained_s": 3.0,
                "measures": {},
                "settings": settings,
            },
        )
    if when is not None:
        os.utime(folder / ("config.json" if finished else "history.jsonl"), (when, when))
    return folder


def evaluation(folder: Path, name: str = "stage2", **changed) -> dict:
    """Write eval.json with the MEASURES called `name`; a value of None leaves a measure out. Return
    it."""
    ce, ppl, acc1, acc5, kl, _ = MEASURES[name]
    big = name == "teacher"
    made = {
        "student": str(folder),
        "parameters": 685056 if big else 96512,
        "bytes": 2740224 if big else 386048,
        "data": DATA,
        "ce": ce,
        "ppl": ppl,
        "acc1": acc1,
        "acc5": acc5,
        "ece": 0.01,
        "kl": kl,
        "agree": 1 - kl,
        "targets": 19473,
    } | changed
    made = {key: value for key, value in made.items() if value is not None}
    write(folder / "eval.json", made)
    return made


def answers(
    folder: Path, name: str = "stage2", count: int = 10, scored: bool = True, **changed
) -> None:
    """Write answers.jsonl, right for the first of `count` prompts, as many as MEASURES say; and
    with `scored` what chat.py --score writes."""
    exact = MEASURES[name][5]
    right = round(exact * count)
    rows = [
        {
            "messages": [{"role": "user", "content": f"What is {i} + 1?"}],
            "reference": f"#### {i + 1}",
            "answer": f"#### {i + (1 if i < right else 2)}",
        }
        for i in range(count)
    ]
    if scored:
        rows = [row | {"scores": {"exact": float(i < right)}} for i, row in enumerate(rows)]
        pace = 100.0 if name == "teacher" else 250.0
        speed = {
            "prompt_tok_per_s": 9000.0,
            "tok_per_s": pace,
            "memory_bytes": 550016,
            "device": "cpu",
            "threads": 1,
        }
        write(
            folder / "answers.scores.json",
            {
                "ckpt": str(folder),
                "prompts": SHA,
                "count": count,
                "settings": {"greedy": True, "ckpt": str(folder)},
                "speed": speed,
                "metrics": {
                    "exact": {
                        "value": exact,
                        "low": exact - 0.03,
                        "high": min(1.0, exact + 0.03),
                        "n": count,
                    }
                },
            }
            | changed,
        )
    jsonl(folder / "answers.jsonl", rows)


def demo(folder: Path) -> Path:
    """Write teacher, stage1, control and stage2 with their runs, evaluations and scored answers, as
    `make demo` leaves them."""
    at = folder.name
    run(folder / "teacher", steps=40, **{"data identity": "e" * 64})
    run(folder / "stage1", steps=20)
    run(folder / "control", steps=30, student=f"runs/{at}/stage1")
    kd = dict(
        stage="stage2",
        alpha=0.9,
        temperature=2.0,
        feature_weight=0.0,
        feature_layers="last:last",
        divergence="fkl",
        beta=0.5,
    )
    run(
        folder / "stage2", steps=30, student=f"runs/{at}/stage1", logits="logits/x", best="kl", **kd
    )
    for name in MEASURES:
        evaluation(folder / f"{name}-eval", name)
        answers(folder / f"{name}-eval", name)
    return folder
