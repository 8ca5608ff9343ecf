"""Compare a student with its teacher, and with what else was trained. Reads history, evaluation and
score files only: no model, no torch.

    # all that is measured there; `make compare NAME=demo`
    python -m lib.measure.compare runs/demo
    python -m lib.measure.compare --out comparison teacher=runs/demo/teacher-eval \\
        runs/demo/stage1 runs/demo/stage2 --fail-under retention=0.8

RUN     a stage's folder (runs/demo/stage2: its history.jsonl and config.json, and the evaluation
        folder beside it, runs/demo/stage2-eval), an evaluation folder, or a folder of stages: of
        these all that have an evaluation. NAME=RUN says what to call it.
Roles   teacher: what is called so, or --teacher; student: the last round on its own text (own1,
        own2, ...), else stage2, else the last one, or --student;
        before: base, else stage1, or --before; control: what is called so, the student's start
        trained on the answers alone, at best for as many steps
Writes  OUT.json, OUT.md, OUT.png and OUT.html (one file, no outside resources). docs/compare.md
        says how to read them.

retention   student / teacher where higher is better, teacher / student for ce and ppl; of kl, rkl,
            ece and agree there is none
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from lib import files, flags
from lib.measure import entries, page, panels, results, runs
from lib.measure.results import HIGHER, LOWER, OF_ANSWERS, PRIMARY, ROWS, share, shown, value_of

# distances to the teacher, and the calibration error, which is near 0 by luck
NO_RETENTION = ("kl", "rkl", "ece", "agree")
FAIR = {
    "student identity": "start",
    "data identity": "data set",
    "tokens_per_step": "number of tokens a step",
    "lr": "learning rate",
}
# setting -> the one that, off, leaves it without effect
IDLE = {
    "feature_layers": "feature_weight",
    "feature_loss": "feature_weight",
    "attention_layers": "attention_weight",
    "balance_every": "balance",
    "contrastive_temperature": "contrastive_weight",
    "lora_alpha": "lora_rank",
    "lora_dropout": "lora_rank",
    "lora_targets": "lora_rank",
}
OFF = (None, 0, False, "none", "", [])  # settings that do nothing


def measured_of(run: dict | None, where: Path) -> dict:
    """Return one model of OUT.json: its measures, sizes, speed, and how it was trained."""
    model = {"folder": str(where)} | results.read_evaluation(where)
    if run:
        training = {
            "steps": run["updates"],
            "planned_steps": run["steps"],
            "stopped_early": run["stopped_early"],
            "trained_s": run["trained_s"],
            "tok_per_s": run["tok_per_s"],
        }
        model["training"] = {name: value for name, value in training.items() if value is not None}
        model["cost"] = runs.cost_of(run["settings"])
    return model


# --- student and teacher


def retention(measure: str, teacher: float, student: float) -> float | None:
    """Return the share of the teacher's quality that the student has; None where there is no such
    thing."""
    over, under = (student, teacher) if measure in HIGHER else (teacher, student)
    known = measure in (*HIGHER, *LOWER) and measure not in NO_RETENTION
    return over / under if known and under > 0 else None


def compare(teacher: dict, student: dict) -> dict[str, dict]:
    """Return {measure: {"teacher", "student", "difference", "retention"}} of the measures of
    quality that both have."""
    found = {}
    for name in ROWS:
        if name in (*HIGHER, *LOWER) and name in teacher and name in student:
            found[name] = {
                "teacher": teacher[name],
                "student": student[name],
                "difference": student[name] - teacher[name],
                "retention": retention(name, teacher[name], student[name]),
            }
    return found


def ratios(over: dict, under: dict, names: Sequence[str]) -> dict[str, float]:
    """Return over / under of the measures that both have. Worked example: of parameters 10 and 4 it
    is {"parameters": 2.5}."""
    pairs = {name: (value_of(over, name), value_of(under, name)) for name in names}
    return {name.rpartition(".")[2]: a / b for name, (a, b) in pairs.items() if a and b}


def began_from(roles: dict[str, str], read: dict[str, dict], names: Sequence[str]) -> str | None:
    """Return the model that the student's round began from (of own1 that is stage2), where it is
    among those compared and has no role that says so; None of a student that is no round."""
    if not entries.role_word(roles.get("student", "")).startswith("own"):
        return None
    name = runs.parent(roles["student"], read, names) if roles["student"] in read else None
    return None if name in roles.values() else name


def differences_by_prompt(models: dict, rows: dict, student: str, against: dict) -> dict[str, dict]:
    """Return {role: {measure: {"difference": student - the role's model, "low", "high", "p", "n"}}}
    for each role of `against` (role: model), by bootstrap over the prompts."""
    found = {}
    from lib.measure import score  # here, not above: most comparisons of losses need none of it

    for role, name in against.items():
        if rows[name] and rows[student]:
            both = [models[one].get("intervals", {}) for one in (name, student)]
            shared = [name for name in OF_ANSWERS if all(name in known for known in both)]
            if shared:
                found[role] = score.paired(rows[name], rows[student], shared)
    return found


# --- how they were trained


def settings_in_use(run: dict | None, model: dict) -> dict:
    """Return the settings of a run that have an effect in it, and under "answers: NAME" those its
    answers were written with."""
    settings = dict(run["settings"]) if run else {}
    for setting, switch in IDLE.items():
        if settings.get(switch) in OFF:
            settings.pop(setting, None)
    if settings.get("divergence") in ("fkl", "rkl", "tvd"):
        settings.pop("beta", None)
    return settings | {f"answers: {key}": value for key, value in model.get("settings", {}).items()}


def settings_that_differ(read: dict[str, dict], models: dict[str, dict]) -> dict[str, dict]:
    """Return {setting: {name: value}} of what was not the same in all runs; what a run does not
    know, or does nothing in it, counts as off."""

    def of_answers(setting):
        return setting.startswith("answers: ")

    live = {name: settings_in_use(read.get(name), model) for name, model in models.items()}
    names = dict.fromkeys(name for settings in live.values() for name in settings)
    found = {}
    for setting in names:
        values = {
            name: settings.get(setting)
            for name, settings in live.items()
            if any(of_answers(key) == of_answers(setting) for key in settings)
        }
        first = next(iter(values.values()))
        if not all(one == first or one in OFF and first in OFF for one in values.values()):
            found[setting] = values
    return found


def control_says(models: dict, roles: dict, read: dict[str, dict], began: str | None) -> str | None:
    """Return how the control was trained, against the student, or against `began`, the model whose
    training the student has continued: the comparison is fair at equal steps from one start
    alone."""
    if "control" not in roles:
        return None
    if began:
        says = control_says(models, roles | {"student": began}, read, None)
        return f"against {began}: {says}"
    both = [read[roles[role]]["settings"] for role in ("control", "student") if roles[role] in read]
    if both and both[0].get("alpha"):
        return f"NOT on the answers alone: trained by stage 2, alpha {both[0]['alpha']}"
    says = steps_of_control(models, roles)
    if len(both) == 2:
        other = [words for name, words in FAIR.items() if both[0].get(name) != both[1].get(name)]
        says += f"; but another {', '.join(other)} than {roles['student']}" if other else ""
    return says


def steps_of_control(models: dict, roles: dict) -> str:
    """Return what `control_says` says of steps."""
    control, student = (models[roles[role]].get("training", {}) for role in ("control", "student"))
    if "steps" not in control or "steps" not in student:
        return "CE only"
    if control["steps"] == student["steps"]:
        return f"CE only at equal steps ({control['steps']:,})"

    def taken(training):
        early = ", stopped early" if "stopped_early" in training else ""
        return f"{training['steps']:,}{early}"

    return f"CE only, steps NOT equal: {taken(control)}; {roles['student']} {taken(student)}"


# --- the comparison


def primary(models: dict, roles: dict) -> str | None:
    """Return the measure that stands for quality: the first of PRIMARY that the student has, and
    the teacher, if there is one."""
    those = [models[roles[role]] for role in ("student", "teacher") if role in roles]
    return next((name for name in PRIMARY if all(name in model for model in those)), None)


def verdict(result: dict) -> str:
    """Return the comparison in words: how much of the teacher's quality, at which size and speed,
    and what the others have."""
    models, roles, name = result["models"], result["roles"], result["primary"]
    if name is None:
        those = [roles[role] for role in ("student", "teacher") if role in roles]
        return f"No measure of quality is known of {' and of '.join(those) or 'a student'}."

    def value(role):
        return shown(name, models[roles[role]][name])

    label, student = ROWS[name][0], roles["student"]
    text = f"{student} has {label} {value('student')}"
    if "teacher" in roles:
        kept = result["comparison"][name]["retention"]
        if kept is None:
            text += f", the teacher {value('teacher')}"
        else:
            text = (
                f"{student} keeps {share(kept)} of the teacher's {label} ({value('student')} of"
                f" {value('teacher')})"
            )
        if "parameters" in result["compression"]:
            text += f" with {share(1 / result['compression']['parameters'])} of its parameters"
        if "tok_per_s" in result["speedup"]:
            text += f", at {result['speedup']['tok_per_s']:.1f} times its speed"
    if "teacher" in roles and "kl" in models[student]:
        text += f", at a KL of {shown('kl', models[student]['kl'])} nats to it"
    text += "."
    for role, words in (("before", "Before"), ("control", "Answers alone")):
        if role in roles and name in models[roles[role]]:
            text += f" {words} ({roles[role]}): {value(role)}."
    return " ".join([*failures(models, roles, name), text])


def failures(models: dict, roles: dict, name: str) -> list[str]:
    """Return in words what makes a praise of the student wrong, by the measure `name`: a teacher
    that is below what it was to teach, or has nothing, a student below what it began from, or below
    the control."""
    first = next((one for one in models if entries.role_word(one) == "stage1"), None)
    student, said = roles["student"], []
    started = dict.fromkeys([first, roles.get("before"), roles.get("control")])
    of_teacher = {roles.get("teacher"): [first or roles.get("before")]}
    if "teacher" in roles and name in HIGHER and not models[roles["teacher"]].get(name, True):
        value = shown(name, 0.0)
        said.append(f"FAILED: {roles['teacher']} has {ROWS[name][0]} {value}: nothing to teach.")
    for below, others in (of_teacher | {student: list(started)}).items():
        for other in others:
            pair = [models[one].get(name) for one in (below, other) if one in models]
            if below == other or len(pair) < 2 or None in pair:
                continue
            worse = pair[0] < pair[1] if name in HIGHER else pair[0] > pair[1]
            if worse:
                values = " against ".join(shown(name, value) for value in pair)
                cannot = "" if below == student else ": it has nothing to teach"
                said.append(
                    f"FAILED: {below} is below {other} in {ROWS[name][0]}, {values}{cannot}."
                )
    return said


def starts(models: dict, read: dict[str, dict]) -> list[str]:
    """Return a line for each run whose best/ is its start, since no step improved on it: what was
    measured is then the model that it began from; and what its final/ has."""
    lines = []
    for name in models:
        run = read.get(name)
        evaluations = runs.evaluations(run["history"]) if run else []
        best = run["at_best"].get("step") if run else None
        if len(evaluations) < 2 or best != 0 or models[name].get("ckpt") == "final":
            continue
        last = evaluations[-1]
        known = [one for one in ("ce", "acc1", "kl") if one in last and one in evaluations[0]]
        pairs = (
            f"{ROWS[one][0]} {shown(one, last[one])} (best/ {shown(one, evaluations[0][one])})"
            for one in known
        )
        lines.append(
            f"{name}: its best/, which is measured here, is step 0, the model it began from, for no"
            f" evaluation had a better {run['best_by']}. Its final/, step {last['step']:,}, has"
            f" {', '.join(pairs)}."
        )
    return lines


def comparison(
    read: dict[str, dict],
    models: dict[str, dict],
    rows: dict[str, list[dict]],
    roles: dict[str, str],
) -> dict:
    """Return what OUT.json holds. read: of the models with a run's folder, what it says; rows: the
    answered prompts."""
    teacher, student = (models.get(roles.get(role)) for role in ("teacher", "student"))
    both = teacher is not None and student is not None
    machine = ("speed.device", "speed.threads")
    alike = both and all(value_of(teacher, one) == value_of(student, one) for one in machine)
    speeds = ("speed.prompt_tok_per_s", "speed.tok_per_s")
    began = began_from(roles, read, list(models))
    against = {role: roles[role] for role in ("control", "teacher") if role in roles}
    against = {"began": began, **against} if began else against
    result = {
        "models": models,
        "roles": roles,
        "primary": primary(models, roles) if student else None,
        "comparison": compare(teacher, student) if both else {},
        "compression": ratios(teacher, student, ("parameters", "bytes")) if both else {},
        "speedup": ratios(student, teacher, speeds) if alike else {},
        "began": began,
        "paired": differences_by_prompt(models, rows, roles["student"], against) if student else {},
        "control": control_says(models, roles, read, began) if student else None,
        "starts": starts(models, read),
        "settings_that_differ": settings_that_differ(read, models),
        "data": next((m["data"] for m in models.values() if "data" in m), None),
    }
    return result | {"verdict": verdict(result)}


# --- --fail-under


def demand(text: str) -> tuple[str, float]:
    """Parse one --fail-under: demand("retention.acc1=0.95") == ("retention.acc1", 0.95)."""
    name, _, value = text.partition("=")
    measure = name.removeprefix("retention.")
    allowed = [m for m in ROWS if m in (*HIGHER, *LOWER)]
    senseless = name != measure and measure in NO_RETENTION
    if name != "retention" and (measure not in allowed or senseless):
        raise argparse.ArgumentTypeError(
            f"{name!r} is neither retention, retention.MEASURE nor one of {', '.join(allowed)}"
        )
    try:
        return name, float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r}: wanted a number, as in retention=0.95"
        ) from None


def unmet(result: dict, demands: list[tuple[str, float]]) -> list[str]:
    """Return what of the demands is not met, in words. A measure that is not there does not meet
    any."""
    models, roles = result["models"], result["roles"]
    student, teacher = (models.get(roles.get(role), {}) for role in ("student", "teacher"))
    failed = []
    for name, wanted in demands:
        measure, kept = name.removeprefix("retention."), name.startswith("retention")
        if name == "retention":  # what only one of them has was not compared
            measure = next((m for m in PRIMARY if m in student or m in teacher), None)
        one = result["comparison"].get(measure) or {}
        seen = one.get("retention") if kept else student.get(measure)
        lower = not kept and measure in LOWER
        if seen is None:
            of = " of both teacher and student" if kept else ""
            failed.append(f"{name}: it was not measured{of}, wanted {wanted:g}")
        elif not (seen <= wanted if lower else seen >= wanted):
            of = f" ({measure} {one['student']:.4g} of {one['teacher']:.4g})" if kept else ""
            bound = "most" if lower else "least"
            failed.append(f"{name}: saw {seen:.4f}{of}, wanted at {bound} {wanted:g}")
    return failed


def parse_args(argv=None):
    parser = flags.new_parser(__doc__)
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="[NAME=]RUN",
        help="a stage's folder, an evaluation folder, or a folder of stages",
    )
    parser.add_argument(
        "--out",
        metavar="PREFIX",
        help=(
            "path without ending: .json, .md, .png and .html are written (default: comparison,"
            " beside the stages)"
        ),
    )
    parser.add_argument(
        "--teacher",
        metavar="NAME",
        help="the model that is the teacher (default: the one called teacher)",
    )
    parser.add_argument(
        "--student",
        metavar="NAME",
        help="the model that is the student (default: own9 to own1, stage2, else the last one)",
    )
    parser.add_argument(
        "--before", metavar="NAME", help="the student before (default: base, else stage1)"
    )
    parser.add_argument(
        "--fail-under",
        type=demand,
        action="append",
        default=[],
        metavar="WHAT=X",
        help=(
            "exit with 1, after writing, where the student is worse than X: retention (of exact,"
            " else accuracy, rougeL, acc1), retention.MEASURE, or a MEASURE of its own (ce, ppl,"
            " kl, rkl, ece: where it is above X); may be repeated"
        ),
    )
    return parser, parser.parse_args(argv)


@files.script
def main(argv=None):
    parser, args = parse_args(argv)
    folders = entries.named_models(args.runs, parser)
    roles = entries.roles_of(list(folders), args, parser)
    read = {name: runs.read_run(run) for name, (run, _) in folders.items() if run}
    models = {name: measured_of(read.get(name), where) for name, (_, where) in folders.items()}
    rows = {name: results.answers_in(where) for name, (_, where) in folders.items()}
    for name, (_, where) in folders.items():
        for line in entries.stale(models[name], read.get(name), where):
            print(f"report: WARNING: {line}")
    for line in entries.apart_teachers(models):
        print(f"report: WARNING: {line}")
    entries.check_same_rows(models, rows, roles.get("student", next(iter(models))))
    result = comparison(read, models, rows, roles)

    first = next(iter(folders.values()))[1]
    out = Path(args.out) if args.out else first.parent / "comparison"
    files.check_out(f"{out}.html", file=True)
    text = page.markdown(result)
    with files.lock_beside(out):
        files.write_json(Path(f"{out}.json"), result)
        files.write_text(Path(f"{out}.md"), text)
        panels.png(result, Path(f"{out}.png"))
        files.write_text(Path(f"{out}.html"), page.html(result, read, rows))
    print(f"{text}\nreport: {out}.html, .md, .png and .json")
    if failed := unmet(result, args.fail_under):
        raise SystemExit("error: --fail-under " + "; ".join(failed))


if __name__ == "__main__":
    main()
