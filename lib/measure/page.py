"""The comparison as text for people: OUT.md, and OUT.html by comparison.html.jinja, one file with
table, pictures, curves and answers side by side; light, dark, narrow or on paper.

What models and data wrote is text of others: the template escapes all of it, and the page's own
policy lets nothing run or load.
"""

import json
import re
import shlex
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from lib.measure import panels, results
from lib.measure.results import HIGHER, LOWER, ROWS, share, shown, signed, value_of

PROMPTS = 8  # that are shown with their answers
MOST_CLASSES = 30  # above which a confusion matrix is no picture any more


# --- OUT.md, and what both have


def markdown(result: dict) -> str:
    """Return the comparison as OUT.md holds it."""
    models, compared = result["models"], result["comparison"]
    rows = []
    for measure in results.present(models):
        values = [shown(measure, value_of(model, measure)) for model in models.values()]
        rows.append([ROWS[measure][0], *values])
    parts = [[result["verdict"]], results.table([["", *models], *rows])]
    if result["control"]:
        parts.append([f"{result['roles']['control']}: {result['control']}."])
    parts.append([f"- {line}" for line in result["starts"]])
    if compared:
        rows = [["", "teacher", "student", "difference", "retention"]]
        for measure, one in compared.items():
            both = [shown(measure, one[role]) for role in ("teacher", "student")]
            change = [signed(measure, one["difference"]), share(one["retention"])]
            rows.append([ROWS[measure][0], *both, *change])
        parts.append(results.table(rows))
    parts.append([f"- {line}" for line in paired_lines(result)])
    if rows := source_table(models):
        parts.append(results.table(rows, left=(0, 1)))
    if rows := class_table(models):
        parts.append(results.table(rows))
    return "\n\n".join("\n".join(lines) for lines in parts if lines) + "\n"


def paired_lines(result: dict) -> list[str]:
    """Return one line a measure and a model: the student less what it began from, the control or
    the teacher, with its interval."""
    roles, lines = {"began": result["began"]} | result["roles"], []
    for against, pairs in result["paired"].items():
        for measure, one in pairs.items():
            lines.append(
                f"{roles['student']} less {roles[against]}, {ROWS[measure][0]}:"
                f" {one['difference']:+.3f} (95 %: {one['low']:+.3f} to {one['high']:+.3f};"
                f" p = {one['p']:.3g}; {one['n']:,} prompts)"
            )
    return lines


def source_table(models: dict[str, dict]) -> list[list[str]]:
    """Return the table by source: source, measure, a value a model; [] where there is none."""
    rows = []
    for source in dict.fromkeys(name for model in models.values() for name in model["by_source"]):
        own = {name: model["by_source"].get(source, {}) for name, model in models.items()}
        for i, measure in enumerate(results.present(own)):
            values = [shown(measure, value_of(one, measure)) for one in own.values()]
            rows.append(["" if i else source, ROWS[measure][0], *values])
    return [["source", "", *models], *rows] if rows else []


def class_table(models: dict[str, dict]) -> list[list[str]]:
    """Return the table by class: class, its held-out rows, F1 of each model; [] where there is
    none."""
    of_each, rows = [model.get("per_class", {}) for model in models.values()], []
    for name in dict.fromkeys(name for classes in of_each for name in classes):
        scores = [classes.get(name, {}) for classes in of_each]
        support = next(one["support"] for one in scores if one)
        rows.append([name, f"{support:,}", *(shown("macro_f1", one.get("f1")) for one in scores)])
    return [["class", "rows", *(f"F1 {name}" for name in models)], *rows] if rows else []


def settings_table(result: dict) -> list[list[str]]:
    """Return the table of the settings that differ; a model that has none of their kind has an
    empty cell. [] where there is none."""
    names, rows = result["models"], []
    for key, values in result["settings_that_differ"].items():
        texts = [setting_text(values[name]) if name in values else "" for name in names]
        rows.append([key, *texts])
    return [["", *names], *rows] if rows else []


def setting_text(value) -> str:
    """Return a setting as text; hashes are cut."""
    if isinstance(value, str):
        return value[:12] if re.fullmatch("[0-9a-f]{64}", value) else value
    return "–" if value is None else json.dumps(value)


# --- OUT.html


def html(result: dict, read: dict, rows: dict[str, list[dict]]) -> str:
    """Return the page. result: what OUT.json holds; read: what the runs' folders say; rows:
    answered prompts."""
    models, roles = result["models"], result["roles"]
    both = "student" in roles and "teacher" in roles
    curves = panels.training_curves(read, models, roles)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("comparison.html.jinja").render(
        **result,
        title=f"{roles['student']} and its teacher" if both else ", ".join(models),
        role_words=role_words(result),
        role_colours=panels.ROLE_COLOURS,
        colours=page_colours(result),
        measures={measure: ROWS[measure][0] for measure in results.present(models)},
        notes=[line for line in notes(result) if line],
        bars=panels.bar_panels(result),
        curves=curves,
        curve_panels=panels.curve_panels(curves),
        sources=source_table(models),
        classes=class_table(models),
        settings=settings_table(result),
        heats={name: model for name, model in models.items() if is_heat(model)},
        cards=side_by_side(result, rows),
        prompts=max(map(len, rows.values())),
        runs=read,
        # functions
        value_of=value_of,
        shown=shown,
        signed=signed,
        share=share,
        best_of=best_of,
        is_number=re.compile("[-+.,0-9]*").fullmatch,
        quote=shlex.quote,
        made_with=made_with,
    )


def role_words(result: dict) -> dict[str, str]:
    """Return what stands under the models' names: their roles, where they are not called so; of the
    control how it was trained."""
    words = {"teacher": "teacher", "before": "student before", "student": "student"}
    words["control"] = result["control"]
    named = {name: words[role] for role, name in result["roles"].items()}
    return {name: word for name, word in named.items() if word and word != name}


def page_colours(result: dict) -> dict[str, str]:
    """Return the models' colours as CSS: a role's follows light and dark."""
    of_roles = {name: f"var(--{role})" for role, name in result["roles"].items()}
    return panels.model_colours(result) | of_roles


def best_of(measure: str, models: dict, teacher: str | None) -> set[str]:
    """Return which models, the teacher apart, have the best value of a row; none where nothing is
    better or all are alike."""
    values = {name: value_of(model, measure) for name, model in models.items() if name != teacher}
    values = {name: value for name, value in values.items() if value is not None}
    if measure not in (*HIGHER, *LOWER) or len(set(values.values())) < 2:
        return set()
    top = (max if measure in HIGHER else min)(values.values())
    return {name for name, value in values.items() if value == top}


def notes(result: dict) -> list[str]:
    """Return the lines under the table: what it was measured on, how to read it, and the paired
    differences."""
    models, about = result["models"].values(), []
    counts = []
    for what, key in (("held-out targets", "targets"), ("held-out prompts", "answers")):
        counts += [f"{model[key]:,} {what}" for model in models if key in model][:1]
    if counts:
        about.append(f"{', '.join(counts)}.")
    if len(models) > 1:
        apart = ", the teacher apart" if "teacher" in result["roles"] else ""
        about.append(f"Bold: the best of a row{apart}.")
    if any(model.get("intervals") for model in models):
        about.append("Small numbers: 95 % intervals.")
    speeds = [model["speed"] for model in models if model.get("speed")]
    if where := {f"{one.get('device')}, threads {one.get('threads')}" for one in speeds}:
        machines = " / ".join(sorted(where))
        about.append(f"Speed: one prompt at a time, {machines}; what else the machine did shows.")
    return [" ".join(about), *result["starts"], *(f"{line}." for line in paired_lines(result))]


def is_heat(model: dict) -> bool:
    """Return whether a model has a confusion matrix that can be shown."""
    return bool(model.get("confusion")) and 0 < len(model["labels"]) <= MOST_CLASSES


def side_by_side(result: dict, rows: dict[str, list[dict]]) -> list[dict]:
    """Return the first prompts, "asked", each with its "reference", if it has one, and the
    "answers" (model, text, whether it is right or None) of the models with a role; of all, where
    nobody has one."""
    having = [name for name in rows if rows[name]]
    with_role = [name for name in having if name in result["roles"].values()]
    shown_models = with_role or having
    cards = []
    for answered in list(zip(*(rows[name] for name in shown_models)))[:PROMPTS]:
        card = {"asked": prompt_text(answered[0]), "answers": []}
        if "reference" in answered[0]:
            right = answered[0]["reference"]
            card["reference"] = " | ".join(map(str, right)) if isinstance(right, list) else right
        for name, row in zip(shown_models, answered):
            card["answers"].append((name, row.get("answer", ""), is_right(row)))
        cards.append(card)
    return cards


def is_right(row: dict) -> bool | None:
    """Return whether an answer was scored as right; None where that is not known."""
    scores = row.get("scores") or {}
    marks = [scores[name] for name in ("exact", "accuracy") if name in scores]
    return next((mark >= 1 for mark in marks if isinstance(mark, (int, float))), None)


def prompt_text(row: dict) -> str:
    """Return a prompt as text: the words of its messages, with their roles where there are
    several."""
    messages = row.get("messages")
    if not isinstance(messages, list):
        return str(row.get("prompt", ""))
    if len(messages) == 1:
        return str(messages[0].get("content"))
    return "\n".join(f"{one.get('role')}: {one.get('content')}" for one in messages)


def made_with(run: dict) -> str:
    """Return the versions that a run was made with, and its commit."""
    known = [f"{name} {value}" for name, value in run["versions"].items() if value is not None]
    return ", ".join([*known, f"commit {run['git']}"] if run["git"] else known)
