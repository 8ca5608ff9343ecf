"""Compare a student with its teacher, and with what else was trained. Reads history, evaluation and
score files only: no model, no torch.

    # all that is measured there; `make compare NAME=demo`
    python -m lib.measure.compare runs/demo
    python -m lib.measure.compare --out comparison teacher=runs/demo/teacher-eval \
        runs/demo/stage1 runs/demo/stage2 --fail-under retention=0.8

RUN     a stage's folder (runs/demo/stage2: its history.jsonl and config.json, and the evaluation
        folder beside it, runs/demo/stage2-eval), an evaluation folder, or a folder of stages: of
        these all that have an evaluation. NAME=RUN says what to call it.
Roles   teacher: what is called so, or --teacher; student: stage2, else the last one, or --student;
        before: base, else stage1, or --before; control: what is called so, the student's start
        trained on the answers alone, at best for as many steps
Writes  OUT.json, OUT.md, OUT.png and OUT.html (one file, no outside resources). docs/compare.md
        says how to read them.

retention   student / teacher where higher is better, teacher / student for ce and ppl; of kl, rkl,
            ece and agree there is none
"""

import argparse
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from lib import files
from lib.measure import page, panels, results, runs
from lib.measure.results import HIGHER, LOWER, OF_ANSWERS, PRIMARY, ROWS, at, say, share, signed

ORDER = (
    "teacher",
    "base",
    "stage1",
    "control",
)  # of a folder of stages; then the others, by the time they were finished
FAIR = {
    "student identity": "start",
    "data identity": "data set",
    "tokens_per_step": "number of tokens a step",
    "lr": "learning rate",
}
NO_RETENTION = (
    "kl",
    "rkl",
    "ece",
    "agree",
)  # distances to the teacher, and the calibration error, which is near 0 by luck
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


def plain(name: str) -> str:
    """Return a name as roles know it: plain("Stage 2") == "stage2"."""
    return re.sub(r"[\s_-]", "", name.lower())


# --- what to compare


def find(
    entries: Sequence[str], parser: argparse.ArgumentParser
) -> dict[str, tuple[Path | None, Path]]:
    """Return {name: (run's folder or None, evaluation folder)} of the command line's [NAME=]RUN, in
    the order of the table."""
    found = []  # (name, run, evaluation, whether the user named it)
    for entry in entries:
        name, equals, path = entry.partition("=")
        if not equals or Path(entry).exists():
            name, path = "", entry
        if equals and not Path(entry).exists() and not (name and path):
            parser.error(f"{entry} is not NAME=RUN")
        folder = Path(path)
        beside = folder.with_name(folder.name + "-eval") if folder.name else folder
        if results.there(folder):
            run = folder.with_name(folder.name.removesuffix("-eval"))
            found.append(
                (
                    name or run.name,
                    run if run != folder and run.is_dir() and runs.is_run(run) else None,
                    folder,
                    bool(name),
                )
            )
        elif folder.name and results.there(beside):
            found.append(
                (
                    name or folder.name,
                    folder if folder.is_dir() and runs.is_run(folder) else None,
                    beside,
                    bool(name),
                )
            )
        elif not folder.is_dir():
            files.fail(
                f"{folder} is no folder",
                wanted="a stage's folder, an evaluation folder, or a folder of stages",
            )
        elif runs.is_run(folder):
            files.fail(
                f"{folder} has no evaluation",
                f"no {beside}/eval.json",
                "its measures on held-out rows",
                evaluation_command(folder),
            )
        else:
            stages = stages_of(folder)
            if name and len(stages) > 1:
                parser.error(f"{entry} is a folder of {len(stages)} stages; a NAME belongs to one")
            found += [
                (name or stage, run, evaluation, bool(name)) for stage, run, evaluation in stages
            ]
    shown = [name for name, *_ in found]
    names = [
        name if given or shown.count(name) == 1 else f"{where.absolute().parent.name}/{name}"
        for name, _, where, given in found
    ]
    if twice := [name for name in names if names.count(name) > 1]:
        parser.error(f"two runs are called {twice[0]}; give them names: NAME=RUN")
    return {name: (run, where) for name, (_, run, where, _) in zip(names, found)}


def stages_of(folder: Path) -> list[tuple[str, Path | None, Path]]:
    """Return (name, run's folder or None, evaluation folder) of the stages in a folder that were
    measured, in the table's order."""
    inside = sorted(
        path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")
    )
    found, left = [], []
    for path in inside:
        if path.name.endswith("-eval") and results.there(path):
            stage = path.with_name(path.name.removesuffix("-eval"))
            run = stage if stage.is_dir() and runs.is_run(stage) else None
            finished = (
                (run or path) / "config.json" if run and (run / "config.json").exists() else path
            )
            place = ORDER.index(plain(stage.name)) if plain(stage.name) in ORDER else len(ORDER)
            found.append((place, finished.stat().st_mtime, stage.name, run, path))
        elif runs.is_run(path) and not results.there(path.with_name(path.name + "-eval")):
            left.append(path)
    if not found:
        files.fail(
            f"{folder} holds no evaluation",
            ", ".join(f"the run {path.name}" for path in left) or "no run either",
            "STAGE-eval/eval.json",
            (
                evaluation_command(left[-1])
                if left
                else "make eval NAME=... CKPT=" + str(folder / "STAGE")
            ),
        )
    for path in left:
        print(f"report: {path} is left out, for it was not measured; {evaluation_command(path)}")
    return [(name, run, path) for _, _, name, run, path in sorted(found, key=lambda one: one[:3])]


def evaluation_command(folder: Path, data: str | None = None) -> str:
    """Return the command that measures a run on the held-out rows of its own data."""
    settings = runs.read(folder)["settings"]
    of_teacher = next(
        ([f"--{name}", settings[name]] for name in ("logits", "teacher") if settings.get(name)), []
    )
    script = "stage2_kd.py" if of_teacher else "stage1_sft.py"
    words = [
        "--data",
        data or settings.get("data", "data/NAME"),
        *of_teacher,
        "--student",
        str(folder),
        "--out",
        f"{folder}-eval",
        "--eval-only",
    ]
    return shlex.join(["python", script, *words])


def roles_of(
    names: list[str], args: argparse.Namespace, parser: argparse.ArgumentParser
) -> dict[str, str]:
    """Return which model is the teacher, the student before, the control and the student; a role
    that nobody has is left out."""
    for flag in ("teacher", "before", "student"):
        if (given := getattr(args, flag)) is not None and given not in names:
            parser.error(f"--{flag} {given}: there is no such model here, but {', '.join(names)}")

    def called(role, among):
        return next((name for name in among if plain(name.rpartition("/")[2]) == role), None)

    teacher = args.teacher or called("teacher", names)
    others = [name for name in names if name != teacher]
    control = called(
        "control", [name for name in others if name not in (args.student, args.before)]
    )
    left = [name for name in others if name != control]
    student = args.student or called("stage2", left) or next(iter(reversed(left)), None)
    before = (
        args.before
        or called("base", [n for n in left if n != student])
        or called("stage1", [n for n in left if n != student])
    )
    roles = {"teacher": teacher, "before": before, "control": control, "student": student}
    if len(set(filter(None, roles.values()))) < sum(name is not None for name in roles.values()):
        parser.error(
            "one model has two roles: "
            + ", ".join(f"{role} {name}" for role, name in roles.items() if name)
        )
    return {role: name for role, name in roles.items() if name}


def stale(model: dict, run: dict | None, where: Path) -> list[str]:
    """Return what of an evaluation folder is of another checkpoint than the rest of it, or than the
    run's, in words."""
    scored, found = model.get("scored_weights"), []
    if scored and model.get("weights") and scored != model["weights"]:
        found.append(
            f"{where}: eval.json and answers.scores.json are of different weights; measure both"
            " again"
        )
    if (
        run
        and model.get("data") == run["settings"].get("data identity")
        and Path(str(model.get("student"))).name == "best"
    ):
        seen, own = model.get("ce"), run["at_best"].get("ce")
        if (
            seen and own and abs(seen - own) > 0.02 * own
        ):  # the history was made under the run's own --amp, perhaps
            found.append(
                f"{where}: its CE {seen:.4f} is not that of best/ in the run's own history,"
                f" {own:.4f}: was the run made anew since? "
                + evaluation_command(Path(run["folder"]))
            )
    return found


def model_of(run: dict | None, where: Path) -> dict:
    """Return one model of OUT.json: its measures, sizes, speed, and how it was trained."""
    model = {"folder": str(where)} | results.read(where)
    if run:
        training = {
            "steps": run["updates"] if run["updates"] is not None else run["step"],
            "planned_steps": run["steps"],
            "stopped_early": run["stopped_early"],
            "trained_s": run["trained_s"],
            "tok_per_s": run["tok_per_s"],
        }
        model["training"] = {name: value for name, value in training.items() if value is not None}
    return model


def check_same_rows(models: dict[str, dict], rows: dict[str, list[dict]], against: str) -> None:
    """Refuse models that were measured on other held-out rows, or answered other prompts, than the
    one called `against`."""
    mine = models[against]
    for name, model in models.items():
        for key, what in (("data", "data set"), ("targets", "number of held-out targets")):
            if key in model and key in mine and model[key] != mine[key]:

                def short(value):
                    return value[:12] if isinstance(value, str) else f"{value:,}"

                files.fail(
                    f"{name} and {against} were not measured on the same held-out rows",
                    f"{what} {short(model[key])} of {model['folder']}",
                    f"{short(mine[key])}, as {mine['folder']}",
                    "--eval-only once more, with the --data of the other",
                )
        if rows[name] and rows[against] and asked(rows[name]) != asked(rows[against]):

            def sha(one):
                return f" (sha256 {one['prompts'][:12]})" if one.get("prompts") else ""

            files.fail(
                f"{name} and {against} did not answer the same prompts",
                f"{len(rows[name]):,} prompts in {model['folder']}{sha(model)}",
                f"the {len(rows[against]):,} of {mine['folder']}{sha(mine)}",
                "chat.py --score once more, with one file of prompts for both",
            )


def asked(rows: list[dict]) -> list:
    """Return what identifies answered prompts: the prompts themselves, and their references."""
    return [(row.get("messages", row.get("prompt")), row.get("reference")) for row in rows]


# --- the comparison


def retention(measure: str, teacher: float, student: float) -> float | None:
    """Return the share of the teacher's quality that the student has; None where there is no such
    thing."""
    over, under = (student, teacher) if measure in HIGHER else (teacher, student)
    return (
        over / under
        if measure not in NO_RETENTION and measure in (*HIGHER, *LOWER) and under > 0
        else None
    )


def compare(teacher: dict, student: dict) -> dict[str, dict]:
    """Return {measure: {"teacher", "student", "difference", "retention"}} of the measures of
    quality that both have."""
    shared = [
        name for name in ROWS if name in (*HIGHER, *LOWER) and name in teacher and name in student
    ]
    return {
        name: {
            "teacher": teacher[name],
            "student": student[name],
            "difference": student[name] - teacher[name],
            "retention": retention(name, teacher[name], student[name]),
        }
        for name in shared
    }


def ratios(over: dict, under: dict, names: Sequence[str]) -> dict[str, float]:
    """Return over / under of the measures that both have. Worked example: of parameters 10 and 4 it
    is {"parameters": 2.5}."""
    return {
        name.rpartition(".")[2]: at(over, name) / at(under, name)
        for name in names
        if at(over, name) and at(under, name)
    }


def paired(models: dict, rows: dict, roles: dict) -> dict[str, dict]:
    """Return {"control": {measure: {"difference": student - control, "low", "high", "p", "n"}},
    "teacher": ...} by bootstrap over the prompts."""
    found, student = {}, roles["student"]
    from lib.measure import score  # here, not above: most comparisons of losses need none of it

    for role in ("control", "teacher"):
        if role in roles and rows[roles[role]] and rows[student]:
            shared = [
                name
                for name in OF_ANSWERS
                if all(name in models[one].get("intervals", {}) for one in (roles[role], student))
            ]
            if shared:
                found[role] = score.paired(rows[roles[role]], rows[student], shared)
    return found


def settings_that_differ(read: dict[str, dict], models: dict[str, dict]) -> dict[str, dict]:
    """Return {setting: {name: value}} of what was not the same in all runs; what a run does not
    know, or does nothing in it, counts as off."""
    live = {}
    for name, model in models.items():
        settings = dict(read[name]["settings"]) if name in read else {}
        for setting, switch in IDLE.items():
            if settings.get(switch) in OFF:
                settings.pop(setting, None)
        if settings.get("divergence") not in ("jsd", "skl"):
            settings.pop("beta", None)
        live[name] = settings | {
            f"answers: {key}": value for key, value in model.get("settings", {}).items()
        }
    names = list(dict.fromkeys(name for settings in live.values() for name in settings))
    those = {
        setting: {
            name: settings.get(setting)
            for name, settings in live.items()
            if any(
                key.startswith("answers: ") == setting.startswith("answers: ") for key in settings
            )
        }
        for setting in names
    }

    def same(a, b):
        return a == b or a in OFF and b in OFF

    return {
        setting: values
        for setting, values in those.items()
        if not all(same(value, next(iter(values.values()))) for value in values.values())
    }


def control_says(models: dict, roles: dict, read: dict[str, dict]) -> str | None:
    """Return how the control was trained, against the student: the comparison is fair at equal
    steps from one start alone."""
    if "control" not in roles:
        return None
    both = [read[roles[role]]["settings"] for role in ("control", "student") if roles[role] in read]
    if both and both[0].get("alpha"):
        return f"NOT on the answers alone: trained by stage 2, alpha {both[0]['alpha']}"
    other = [
        words
        for setting, words in FAIR.items()
        if len(both) == 2 and both[0].get(setting) != both[1].get(setting)
    ]
    return steps_of_control(models, roles) + (
        f"; but another {', '.join(other)} than {roles['student']}" if other else ""
    )


def steps_of_control(models: dict, roles: dict) -> str:
    """Return what `control_says` says of steps."""
    taken = [at(models[roles[role]], "training.steps") for role in ("control", "student")]
    if None in taken:
        return "CE only"
    if taken[0] == taken[1]:
        return f"CE only at equal steps ({taken[0]:,})"
    early = [
        "" if at(models[roles[role]], "training.stopped_early") is None else ", stopped early"
        for role in ("control", "student")
    ]
    return (
        f"CE only, steps NOT equal: {taken[0]:,}{early[0]}; {roles['student']}"
        f" {taken[1]:,}{early[1]}"
    )


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
        return (
            "No measure of quality is known of"
            f" {' and of '.join(roles[role] for role in ('student', 'teacher') if role in roles) or 'a student'}."
        )

    def value(role):
        return say(name, models[roles[role]][name])

    label, student = ROWS[name][0], roles["student"]
    if "teacher" in roles:
        kept = result["comparison"][name]["retention"]
        text = (
            f"{student} keeps {share(kept)} of the teacher's {label} ({value('student')} of"
            f" {value('teacher')})"
            if kept is not None
            else f"{student} has {label} {value('student')}, the teacher {value('teacher')}"
        )
        if "parameters" in result["compression"]:
            text += f" with {share(1 / result['compression']['parameters'])} of its parameters"
        if "tok_per_s" in result["speedup"]:
            text += f", at {result['speedup']['tok_per_s']:.1f} times its speed"
    else:
        text = f"{student} has {label} {value('student')}"
    others = [
        f"{words} ({roles[role]}): {value(role)}."
        for role, words in (("before", "Before"), ("control", "Answers alone"))
        if role in roles and name in models[roles[role]]
    ]
    return " ".join([text + ".", *others])


def build(
    read: dict[str, dict],
    models: dict[str, dict],
    rows: dict[str, list[dict]],
    roles: dict[str, str],
) -> dict:
    """Return what OUT.json holds. read: of the models with a run's folder, what it says; rows: the
    answered prompts."""
    teacher, student = (models.get(roles.get(role)) for role in ("teacher", "student"))
    both = teacher is not None and student is not None
    alike = both and all(
        at(teacher, f"speed.{key}") == at(student, f"speed.{key}") for key in ("device", "threads")
    )
    result = {
        "models": models,
        "roles": roles,
        "primary": primary(models, roles) if student else None,
        "comparison": compare(teacher, student) if both else {},
        "compression": ratios(teacher, student, ("parameters", "bytes")) if both else {},
        "speedup": (
            ratios(student, teacher, ("speed.prompt_tok_per_s", "speed.tok_per_s")) if alike else {}
        ),
        "paired": paired(models, rows, roles) if student else {},
        "control": control_says(models, roles, read) if student else None,
        "settings_that_differ": settings_that_differ(read, models),
        "data": next((m["data"] for m in models.values() if "data" in m), None),
    }
    return result | {"verdict": verdict(result)}


# --- OUT.md


def table(models: dict[str, dict], teacher: str | None = None) -> list[str]:
    """Return the measures in Markdown, one model a column."""
    return runs.columns(
        [
            ["", *models],
            *(
                [ROWS[m][0], *(say(m, at(model, m)) for model in models.values())]
                for m in results.present(models)
            ),
        ]
    )


def markdown(result: dict) -> str:
    """Return the comparison as OUT.md holds it."""
    models, roles, lines = result["models"], result["roles"], []
    lines += [result["verdict"], "", *table(models)]
    if result["control"]:
        lines += ["", f"{roles['control']}: {result['control']}."]
    if result["comparison"]:
        rows = [
            [
                ROWS[m][0],
                say(m, c["teacher"]),
                say(m, c["student"]),
                signed(m, c["difference"]),
                share(c["retention"]),
            ]
            for m, c in result["comparison"].items()
        ]
        lines += ["", *runs.columns([["", "teacher", "student", "difference", "retention"], *rows])]
    if result["paired"]:
        lines += ["", *(f"- {line}" for line in paired_lines(result))]
    if rows := sources(models):
        lines += ["", *runs.columns([["source", "", *models], *rows], left=(0, 1))]
    if rows := classes(models):
        lines += ["", *runs.columns([["class", "rows", *(f"F1 {name}" for name in models)], *rows])]
    return "\n".join(lines) + "\n"


def paired_lines(result: dict) -> list[str]:
    """Return one line a measure and a model: the student less control or teacher, with its
    interval."""
    roles = result["roles"]
    return [
        f"{roles['student']} less {roles[against]}, {ROWS[m][0]}: {one['difference']:+.3f} (95 %:"
        f" {one['low']:+.3f} to {one['high']:+.3f}; p = {one['p']:.3g}; {one['n']:,} prompts)"
        for against, pairs in result["paired"].items()
        for m, one in pairs.items()
    ]


def sources(models: dict[str, dict]) -> list[list[str]]:
    """Return the rows of the table by source: source, measure, a value a model."""
    names = dict.fromkeys(
        name for model in models.values() for name in model.get("by_source") or {}
    )

    def value(model, name, measure):
        return at(model, "by_source").get(name, {}).get(measure) if at(model, "by_source") else None

    def there(name):
        return [
            m for m in ROWS if any(value(model, name, m) is not None for model in models.values())
        ]

    return [
        [
            name if m == there(name)[0] else "",
            ROWS[m][0],
            *(say(m, value(model, name, m)) for model in models.values()),
        ]
        for name in names
        for m in there(name)
    ]


def classes(models: dict[str, dict]) -> list[list[str]]:
    """Return the rows of the table by class: class, its held-out rows, F1 of each model."""
    names = dict.fromkeys(
        name for model in models.values() for name in model.get("per_class") or {}
    )

    def of(model, name):
        return (model.get("per_class") or {}).get(name, {})

    def rows(name):
        return next(of(model, name)["support"] for model in models.values() if of(model, name))

    return [
        [
            name,
            f"{rows(name):,}",
            *(say("macro_f1", of(model, name).get("f1")) for model in models.values()),
        ]
        for name in names
    ]


# --- --fail-under


def demand(text: str) -> tuple[str, float]:
    """Parse one --fail-under: demand("retention.acc1=0.95") == ("retention.acc1", 0.95)."""
    name, _, value = text.partition("=")
    measure = name.removeprefix("retention.")
    allowed = [m for m in ROWS if m in (*HIGHER, *LOWER)]
    if name != "retention" and (
        measure not in allowed or name != measure and measure in NO_RETENTION
    ):
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
    failed, student = (
        [],
        (result["models"][result["roles"]["student"]] if "student" in result["roles"] else {}),
    )
    for name, wanted in demands:
        there = {
            *student,
            *result["models"].get(result["roles"].get("teacher"), {}),
        }  # what only one of them has was not compared
        measure = (
            next((m for m in PRIMARY if m in there), None)
            if name == "retention"
            else name.removeprefix("retention.")
        )
        kept = name.startswith("retention")
        seen = (
            (result["comparison"].get(measure) or {}).get("retention")
            if kept
            else at(student, measure)
        )
        lower = not kept and measure in LOWER
        if seen is None:
            failed.append(
                f"{name}: it was not measured{' of both teacher and student' if kept else ''},"
                f" wanted {wanted:g}"
            )
        elif not (seen <= wanted if lower else seen >= wanted):
            of = (
                f" ({measure} {result['comparison'][measure]['student']:.4g} of"
                f" {result['comparison'][measure]['teacher']:.4g})"
                if kept
                else ""
            )
            failed.append(
                f"{name}: saw {seen:.4f}{of}, wanted at {'most' if lower else 'least'} {wanted:g}"
            )
    return failed


# --- the curves


def starts(read: dict[str, dict], names: Sequence[str]) -> dict[str, int]:
    """Return after how many steps of stages before it each run began: those up to the checkpoint of
    a compared run that it started from."""

    def parent(name):
        path = Path(str(read[name]["settings"].get("student", "")))
        path = path.parent if path.name in runs.INSIDE else path
        return next(
            (
                other
                for other in names
                if other != name
                and len(path.parts) > 1
                and Path(read[other]["folder"]).parts[-2:] == path.parts[-2:]
            ),
            None,
        )

    def start(name, left):
        before = parent(name)
        return (
            start(before, left - 1) + read[before]["at_best"].get("step", 0)
            if before and left
            else 0
        )  # `left` ends what would go in a circle

    return {name: start(name, len(names)) for name in names}


def curves(read: dict[str, dict], models: dict[str, dict], roles: dict[str, str]) -> dict:
    """Return {"runs": {name: [(step, evaluation)]}, "level": the teacher's measures, "left": runs
    whose curves are of other held-out rows}."""

    def held(name):
        return read[name]["settings"].get("data identity")

    data = (
        held(roles["student"])
        if roles.get("student") in read
        else next((held(name) for name in read), None)
    )
    shown = [
        name for name in read if held(name) == data and runs.evaluations(read[name]["history"])
    ]
    offsets = starts(read, shown)
    lines = {
        name: [
            (offsets[name] + line["step"], line) for line in runs.evaluations(read[name]["history"])
        ]
        for name in shown
    }
    told = [
        line for run in read.values() for line in run["history"] if line["event"] == "teacher"
    ]  # what stage 2 knows of its teacher
    level = models[roles["teacher"]] if "teacher" in roles else told[-1] if told else {}
    return {
        "runs": lines,
        "level": level,
        "left": [name for name in read if name not in shown],
        "shifted": any(offsets.values()),
    }


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
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
        help="the model that is the student (default: stage2, else the last one)",
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


def main(argv=None):
    parser, args = parse_args(argv)
    folders = find(args.runs, parser)
    roles = roles_of(list(folders), args, parser)
    read = {name: runs.read(run) for name, (run, _) in folders.items() if run}
    models = {name: model_of(read.get(name), where) for name, (_, where) in folders.items()}
    rows = {name: results.answers(where) for name, (_, where) in folders.items()}
    for name, (_, where) in folders.items():
        for line in stale(models[name], read.get(name), where):
            print(f"report: WARNING: {line}")
    check_same_rows(models, rows, roles.get("student", next(iter(models))))
    result = build(read, models, rows, roles)
    lines = curves(read, models, roles)

    first = next(iter(folders.values()))[1]
    out = Path(args.out) if args.out else first.parent / "comparison"
    out.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(Path(f"{out}.json"), result)
    text = markdown(result)
    files.write_text(Path(f"{out}.md"), text)
    panels.png(result, Path(f"{out}.png"))
    files.write_text(
        Path(f"{out}.html"),
        page.html(
            result, read, rows, lines, sources(models), classes(models), paired_lines(result)
        ),
    )
    print(f"{text}\nreport: {out}.html, .md, .png and .json")
    if failed := unmet(result, args.fail_under):
        raise SystemExit("error: --fail-under " + "; ".join(failed))


if __name__ == "__main__":
    main()
