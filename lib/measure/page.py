"""The comparison as one HTML file: table, pictures, curves, answers side by side. No script,
nothing from outside; light, dark, narrow or on paper.

What models and data wrote is text of others: all of it is escaped, and the page's own policy lets
nothing run or load.
"""

import json
import re
import shlex
from html import escape

from lib.measure import panels, results
from lib.measure.results import HIGHER, LOWER, ROWS, at, say

PROMPTS = 8  # that are shown with their answers
MANY = 30  # classes above which a confusion matrix is no picture any more
CSS = """
:root { color-scheme: light dark; --ink: #1f2530; --soft: #5d6778; --line: #dde1e8; --paper: #fff; --shade: #f4f6f9; --good: #0a6b4f;
  --bad: #a33a2c; --teacher: #4c566a; --before: #b3bac6; --control: #e69f00; --student: #0072b2; --heat: 0, 114, 178 }
@media screen and (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --soft: #9aa4b5; --line: #333b48; --paper: #14181f; --shade: #1c222c;
  --good: #5ccba5; --bad: #f08f80; --teacher: #a3aec2; --before: #657084; --control: #e69f00; --student: #4aa3df; --heat: 74, 163, 223 } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1.5rem clamp(.8rem, 3vw, 2.5rem) 4rem; max-width: 76rem;
  font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper) }
h1 { font-size: 1.15rem; font-weight: 600; color: var(--soft); margin: 0 0 .4rem }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .7rem }
.verdict { font-size: clamp(1.15rem, 2.6vw, 1.55rem); line-height: 1.35; margin: 0 0 .6rem; max-width: 56rem; text-wrap: pretty }
.note { color: var(--soft); font-size: .9rem; margin: .5rem 0; max-width: 60rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem }
th, td { padding: .32rem .8rem; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top; white-space: nowrap }
tbody th, th:first-child { text-align: left; font-weight: 400 }
thead th { font-weight: 600; vertical-align: bottom; border-bottom: 2px solid var(--line); white-space: normal; max-width: 10rem }
thead small, td small { display: block; font-weight: 400; color: var(--soft); font-size: .76rem }
.wide tbody th:first-child, .wide thead th:first-child { position: sticky; left: 0; background: var(--paper) }
.teacher { background: var(--shade) }
.gap { border-left: 2px solid var(--line) }
td.best { font-weight: 700 }
.words th { text-align: left }
.words td { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 8rem; max-width: 22rem }
.chip { display: inline-block; width: .75em; height: .75em; border-radius: 2px; margin-right: .4em }
.panels { display: grid; gap: 1rem; --least: 13.4rem; --share: calc((100% - (var(--columns) - 1) * 1rem - 1px) / var(--columns));
  grid-template-columns: repeat(auto-fit, minmax(min(100%, max(var(--least), var(--share))), 1fr)) }
.panels.broad { --least: 21rem }
.panels svg { width: 100%; height: auto; max-height: 22rem; overflow: visible }
.legend span { margin-right: 1.2em; white-space: nowrap }
.dash { display: inline-block; width: 1.6em; border-top: 2px dashed var(--teacher); vertical-align: middle; margin-right: .4em }
article { border: 1px solid var(--line); border-radius: 8px; padding: .8rem 1rem; margin: 0 0 1rem }
.text { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; font: inherit }
.asked { font-weight: 500; margin-bottom: .7rem }
article .text { max-height: 18rem; overflow-y: auto }
.answers { display: grid; gap: .9rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 12.5rem), 1fr)) }
.answers h3 { margin: 0 0 .15rem; font-size: .82rem; font-weight: 600; color: var(--soft) }
.answers .text { font-size: .9rem }
.right { color: var(--good) } .wrong { color: var(--bad) }
.heat { font-size: .8rem }
.heat td, .heat th { text-align: center; padding: .2rem .4rem }
td.word { text-align: left }
.heats { display: flex; flex-wrap: wrap; gap: 1.5rem 2.5rem }
code { font: .84rem/1.5 ui-monospace, monospace; overflow-wrap: anywhere }
code span { display: inline-block; max-width: 100% }
dt { font-weight: 600; margin-top: .7rem } dd { margin: 0 }
@media (max-width: 40rem) { th, td { padding: .3rem .5rem } .wide tbody th:first-child { white-space: normal; min-width: 7.5rem } }
@media print { .chip, .heat td, .teacher { print-color-adjust: exact } body { max-width: none; padding: 0; font-size: 11px }
  table { font-size: 7pt } thead small, td small { font-size: 6pt } th, td { padding: .15rem .3rem }
  .verdict { font-size: 13pt } .note, code { font-size: 8pt } .wide tbody th:first-child { white-space: normal }
  article, svg, tr { break-inside: avoid } h2 { break-after: avoid } .wide, article .text { overflow: visible; max-height: none } }
"""


def colour(name: str, result: dict) -> str:
    """Return a model's colour as CSS: a role's follows light and dark."""
    role = next((role for role, other in result["roles"].items() if other == name), None)
    return f"var(--{role})" if role else panels.colours(result["models"], result["roles"])[name]


def chip(name: str, result: dict) -> str:
    return f'<i class="chip" style="background:{colour(name, result)}"></i>'


def best_of(measure: str, models: dict, teacher: str | None) -> set[str]:
    """Return which models, the teacher apart, have the best value of a row; none where nothing is
    better or all are alike."""
    values = {
        name: at(model, measure)
        for name, model in models.items()
        if name != teacher and at(model, measure) is not None
    }
    if measure not in (*HIGHER, *LOWER) or len(values) < 2 or len(set(values.values())) == 1:
        return set()
    top = (max if measure in HIGHER else min)(values.values())
    return {name for name, value in values.items() if value == top}


def big_table(result: dict) -> str:
    """Return the table of all measures: a model a column, then what the student has of the
    teacher."""
    models, roles, compared = result["models"], result["roles"], result["comparison"]
    teacher, said = (
        roles.get("teacher"),
        {
            "teacher": "teacher",
            "before": "student before",
            "control": result["control"],
            "student": "student",
        },
    )
    role_of = {name: said[role] for role, name in roles.items()}

    def small(text):
        return f"<small>{escape(text)}</small>" if text else ""

    head = "".join(
        f'<th scope="col"{_class(teacher=name == teacher)}>{chip(name, result)}{escape(name)}'
        f"{small(role_of.get(name, '') if role_of.get(name) != name else '')}</th>"
        for name in models
    )
    head += (
        '<th scope="col" class="gap">difference<small>student less teacher</small></th><th'
        ' scope="col">retention</th>'
        if compared
        else ""
    )
    body = []
    for measure in results.present(models):
        best, cells = best_of(measure, models, teacher), ""
        for name, model in models.items():
            between = (model.get("intervals") or {}).get(measure)
            cells += (
                f'<td data-measure="{measure}"'
                f' data-model="{escape(name)}"{_class(teacher=name == teacher, best=name in best)}>'
                f"{say(measure, at(model, measure))}{small(f'{between[0]:.3f} to {between[1]:.3f}' if between else '')}</td>"
            )
        if compared:
            one = compared.get(measure, {})
            for part, text in (
                ("difference", results.signed(measure, one.get("difference"))),
                ("retention", results.share(one.get("retention"))),
            ):
                cells += (
                    f'<td{_class(gap=part == "difference")} data-measure="{measure}"'
                    f' data-part="{part}">{text}</td>'
                )
        body.append(f'<tr><th scope="row">{ROWS[measure][0]}</th>{cells}</tr>')
    return (
        '<div class="wide"><table'
        f' id="measures"><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'
    )


def _class(**those: bool) -> str:
    names = " ".join(name for name, on in those.items() if on)
    return f' class="{names}"' if names else ""


def columns(panels: int) -> int:
    """Return how many panels stand side by side where there is room: columns(6) == 3, so that no
    row is nearly empty."""
    return -(-panels // -(-panels // 5))


def plain_table(head: list[str], rows: list[list[str]], words: bool = False) -> str:
    """Return a table of text; all of it is escaped. The first cell of a row is its head; what is no
    number stands at the left."""

    def cell(text):
        return f"<td{_class(word=not re.fullmatch('[-+.,0-9]*', text))}>{escape(text)}</td>"

    def line(cells, tag):
        return "".join(f"<{tag}>{escape(text)}</{tag}>" for text in cells)

    body = "".join(
        f"<tr><th>{escape(row[0])}</th>{''.join(map(cell, row[1:]))}</tr>" for row in rows
    )
    return (
        "<div"
        f' class="wide{" words" if words else ""}"><table><thead><tr>{line(head, "th")}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def prompt_of(row: dict) -> str:
    """Return a prompt as text: the words of its messages, with their roles where there are
    several."""
    messages = row.get("messages")
    if not isinstance(messages, list):
        return str(row.get("prompt", ""))
    return "\n".join(
        (f"{m.get('role')}: " if len(messages) > 1 else "") + str(m.get("content"))
        for m in messages
    )


def samples(result: dict, rows: dict[str, list[dict]]) -> str:
    """Return the first prompts with the reference and the answers of the models with a role; of
    all, where nobody has one."""
    shown = [name for name in result["roles"].values() if rows[name]] or [
        name for name in rows if rows[name]
    ]
    shown = [name for name in rows if name in shown]  # in the table's order
    if not shown:
        return ""
    cards = []
    for number in range(min(PROMPTS, len(rows[shown[0]]))):
        first = rows[shown[0]][number]
        answers = (
            [
                "<div><h3>reference</h3><p"
                f' class="text">{escape(str(first.get("reference", "")))}</p></div>'
            ]
            if "reference" in first
            else []
        )
        for name in shown:
            row = rows[name][number]
            scores = row.get("scores") or {}
            marked = next(
                (
                    scores[m]
                    for m in ("exact", "accuracy")
                    if isinstance(scores.get(m), (int, float))
                ),
                None,
            )
            mark = (
                ""
                if marked is None
                else (
                    ' <span class="right">✓ right</span>'
                    if marked >= 1
                    else ' <span class="wrong">✗ wrong</span>'
                )
            )
            answers.append(
                f"<div><h3>{chip(name, result)}{escape(name)}{mark}</h3><p"
                f' class="text">{escape(str(row.get("answer", "")))}</p></div>'
            )
        cards.append(
            f'<article><p class="text asked">{escape(prompt_of(first))}</p><div'
            f' class="answers">{"".join(answers)}</div></article>'
        )
    of = f"The first {len(cards)} of {len(rows[shown[0]]):,} held-out prompts, not chosen."
    return f'<h2>Answers side by side</h2><p class="note">{of}</p>{"".join(cards)}'


def confusion(name: str, model: dict) -> str:
    """Return a confusion matrix as a heat map: a row a reference, a column a prediction, shaded by
    the share of its row."""
    labels, counts = model["labels"], model["confusion"]

    def shade(count, row):
        return (
            f' style="background:rgba(var(--heat), {0.85 * count / max(1, sum(row)):.3f})"'
            if count
            else ""
        )

    def cells(row):
        return "".join(f"<td{shade(count, row)}>{count:,}</td>" for count in row)

    body = "".join(
        f"<tr><th>{escape(str(label))}</th>{cells(row)}</tr>" for label, row in zip(labels, counts)
    )
    head = "".join(f"<th>{escape(str(label))}</th>" for label in labels)
    return (
        '<div class="wide"><table'
        f' class="heat"><thead><tr><th>{escape(name)}</th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def setting(value) -> str:
    """Return a setting as text; hashes are cut."""
    if value is None:
        return "–"
    if isinstance(value, str):
        return (
            value[:12] if len(value) == 64 and not set(value) - set("0123456789abcdef") else value
        )
    return json.dumps(value)


def html(
    result: dict,
    read: dict,
    rows: dict,
    lines: dict,
    sources: list[list[str]],
    classes: list[list[str]],
    paired: list[str],
) -> str:
    """Return the page. result: what OUT.json holds; read: what the runs' folders say; rows:
    answered prompts; lines: report.curves; sources, classes, paired: rows of tables and lines of
    text, as report.markdown has them."""
    models, roles = result["models"], result["roles"]
    names = list(models)
    parts = [big_table(result)]
    counts = [
        f"{value:,} {what}"
        for what, key in (("held-out targets", "targets"), ("held-out prompts", "answers"))
        if (value := next((m[key] for m in models.values() if key in m), None)) is not None
    ]
    apart = ", the teacher apart" if "teacher" in roles else ""
    where = {
        f"{m['speed'].get('device')}, threads {m['speed'].get('threads')}"
        for m in models.values()
        if m.get("speed")
    }
    notes = [
        f"{', '.join(counts)}." if counts else "",
        f"Bold: the best of a row{apart}." if len(models) > 1 else "",
        (
            "Small numbers: 95 % intervals."
            if any(m.get("intervals") for m in models.values())
            else ""
        ),
        (
            f"Speed: one prompt at a time, {' / '.join(sorted(where))}; what else the machine did"
            " shows."
            if where
            else ""
        ),
    ]
    parts.append(f'<p class="note">{escape(" ".join(filter(None, notes)))}</p>')
    parts += [f'<p class="note">{escape(text)}.</p>' for text in paired]
    bars, curves = panels.svgs(result, lines)
    if bars:
        parts.append(
            '<h2>Measures</h2><div class="panels"'
            f' style="--columns:{columns(len(bars))}">{"".join(bars)}</div>'
        )
    if curves:
        legend = "".join(
            f"<span>{chip(name, result)}{escape(name)}</span>" for name in lines["runs"]
        )
        legend += '<span><i class="dash"></i>the teacher’s level</span>' if lines["level"] else ""
        left = (
            "Not drawn, for they were evaluated on other held-out rows, or never:"
            f" {', '.join(lines['left'])}."
            if lines["left"]
            else ""
        )
        left = f'<p class="note">{escape(left)}</p>' if left else ""
        wide = (
            '<div class="panels broad"'
            f' style="--columns:{min(3, len(curves))}">{"".join(curves)}</div>'
        )
        parts.append(f'<h2>Over training</h2><p class="legend">{legend}</p>{wide}{left}')
    if sources:
        parts.append("<h2>By source</h2>" + plain_table(["source", "", *names], sources))
    if classes:
        parts.append(
            "<h2>By class</h2>"
            + plain_table(["class", "rows", *(f"F1 {name}" for name in names)], classes)
        )
    heats = [
        confusion(name, model)
        for name, model in models.items()
        if 0 < len(model.get("labels") or ()) <= MANY and model.get("confusion")
    ]
    if heats:
        parts.append(
            '<p class="note">Rows are references, columns what was predicted; the stronger the'
            " colour, the larger the share of its row.</p><div"
            f' class="heats">{"".join(heats)}</div>'
        )
    parts.append(samples(result, rows))
    if result["settings_that_differ"]:

        def value(values, name):
            return setting(values[name]) if name in values else ""

        table = [
            [key, *(value(values, name) for name in names)]
            for key, values in result["settings_that_differ"].items()
        ]
        parts.append("<h2>Settings that differ</h2>" + plain_table(["", *names], table, words=True))
    if read:
        made = [
            f"<dt>{chip(name, result)}{escape(name)}</dt><dd><code>{command(run)}</code></dd><dd"
            f" class=note>{escape(versions(run))}</dd>"
            for name, run in read.items()
        ]
        parts.append(f"<h2>How they were made</h2><dl>{''.join(made)}</dl>")
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    title = (
        f"{roles['student']} and its teacher"
        if {"student", "teacher"} <= set(roles)
        else ", ".join(names)
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta'
        f' http-equiv="Content-Security-Policy" content="{policy}"><meta name="viewport"'
        ' content="width=device-width,'
        f' initial-scale=1"><title>{escape(title)}</title><style>{CSS}</style></head>\n<body><h1>{escape(title)}</h1><p'
        f' class="verdict">{escape(result["verdict"])}</p>\n'
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def command(run: dict) -> str:
    """Return the command line that made a run, as HTML whose lines break between words alone; what
    is known of one that is not finished."""
    if not run["command"]:
        return escape(f"{run['state']} ({run['folder']})")
    return " ".join(
        f"<span>{escape(shlex.quote(word))}</span>" for word in ["python", *run["command"]]
    )


def versions(run: dict) -> str:
    known = [f"{name} {value}" for name, value in run["versions"].items() if value is not None]
    return ", ".join([*known, f"commit {run['git']}"] if run["git"] else known)
