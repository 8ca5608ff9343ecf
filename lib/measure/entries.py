"""What `compare` compares: which evaluation folders its words name, what each model is called,
which one is the teacher, and whether all were measured on the same held-out rows."""

import argparse
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from lib import files
from lib.measure import results, runs

# of a folder of stages; then the others, by the time they were finished
ORDER = ("teacher", "base", "stage1", "control")


def role_word(name: str) -> str:
    """Return a name as roles know it: role_word("Stage 2") == "stage2"."""
    return re.sub(r"[\s_-]", "", name.lower())


def evaluation_folder(folder: Path) -> Path:
    """Return where the measures of a stage's folder lie: evaluation_folder("runs/a/stage2") is
    runs/a/stage2-eval."""
    return folder.with_name(folder.name + "-eval")


def run_beside(where: Path) -> Path | None:
    """Return the run whose evaluation folder this is; None where there is no run beside it."""
    run = where.with_name(where.name.removesuffix("-eval"))
    return run if run != where and runs.is_run(run) else None


def evaluation_command(folder: Path) -> str:
    """Return the command that measures a run on the held-out rows of its own data."""
    settings = runs.read_run(folder)["settings"]
    teacher = next((name for name in ("logits", "teacher") if settings.get(name)), None)
    words = ["python", "stage2_kd.py" if teacher else "stage1_sft.py"]
    words += ["--data", settings.get("data", "data/NAME")]
    words += [f"--{teacher}", settings[teacher]] if teacher else []
    words += ["--combine", settings["combine"]] if settings.get("combine") else []
    words += ["--student", str(folder), "--out", str(evaluation_folder(folder)), "--eval-only"]
    return shlex.join(words)


# --- [NAME=]RUN


def named_models(
    entries: Sequence[str], parser: argparse.ArgumentParser
) -> dict[str, tuple[Path | None, Path]]:
    """Return {name: (run's folder or None, evaluation folder)} of the command line's [NAME=]RUN, in
    the order of the table. Two of one name are told apart by the folders they lie in."""
    found, given = [], []
    for entry in entries:
        name, folder = split_entry(entry, parser)
        stages = models_in(folder)
        if name and len(stages) > 1:
            parser.error(f"{entry} is a folder of {len(stages)} stages; a NAME belongs to one")
        found += [(name or stage, run, where) for stage, run, where in stages]
        given += [bool(name)] * len(stages)
    own = [name for name, _, _ in found]
    models = {}
    for (name, run, where), by_user in zip(found, given):
        if not by_user and own.count(name) > 1:
            name = f"{where.absolute().parent.name}/{name}"
        if name in models:
            parser.error(f"two runs are called {name}; give them names: NAME=RUN")
        models[name] = (run, where)
    return models


def split_entry(entry: str, parser: argparse.ArgumentParser) -> tuple[str, Path]:
    """Return NAME ("" where there is none) and RUN of a word; a path may hold an = itself."""
    name, equals, path = entry.partition("=")
    if not equals or Path(entry).exists():
        return "", Path(entry)
    if not (name and path):
        parser.error(f"{entry} is not NAME=RUN")
    return name, Path(path)


def models_in(folder: Path) -> list[tuple[str, Path | None, Path]]:
    """Return (name, run's folder or None, evaluation folder) of the models that a RUN stands for:
    one, or those of a folder of stages."""
    folder = results.with_name(folder)
    beside = evaluation_folder(folder) if folder.name else folder
    where = folder if results.there(folder) else beside
    if results.there(where):
        return [(where.name.removesuffix("-eval"), run_beside(where), where)]
    if not folder.is_dir():
        wanted = "a stage's folder, an evaluation folder, or a folder of stages"
        files.fail(f"{folder} is no folder", wanted=wanted)
    if runs.is_run(folder):
        files.fail(
            f"{folder} has no evaluation",
            f"no {beside}/eval.json",
            "its measures on held-out rows",
            evaluation_command(folder),
        )
    return stages_of(folder)


def stages_of(folder: Path) -> list[tuple[str, Path | None, Path]]:
    """Return (name, run's folder or None, evaluation folder) of the stages in a folder that were
    measured, in the table's order."""
    inside = [path for path in folder.iterdir() if path.is_dir() and path.name[0] != "."]
    found, left = [], []
    for path in sorted(inside):
        if path.name.endswith("-eval") and results.there(path):
            run, stage = run_beside(path), path.name.removesuffix("-eval")
            finished = run / "config.json" if run and (run / "config.json").exists() else path
            known = role_word(stage) in ORDER
            place = ORDER.index(role_word(stage)) if known else len(ORDER)
            found.append((place, finished.stat().st_mtime, stage, run, path))
        elif runs.is_run(path) and not results.there(evaluation_folder(path)):
            left.append(path)
    if not found:
        files.fail(
            f"{folder} holds no evaluation",
            ", ".join(f"the run {path.name}" for path in left) or "no run either",
            "STAGE-eval/eval.json",
            (
                evaluation_command(left[-1])
                if left
                else f"make eval NAME=... CKPT={folder / 'STAGE'}"
            ),
        )
    for path in left:
        print(f"report: {path} is left out, for it was not measured; {evaluation_command(path)}")
    return [(stage, run, path) for _, _, stage, run, path in sorted(found, key=lambda one: one[:3])]


# --- who is who


def roles_of(
    names: list[str], args: argparse.Namespace, parser: argparse.ArgumentParser
) -> dict[str, str]:
    """Return which model is the teacher, the student before, the control and the student; a role
    that nobody has is left out."""
    for flag in ("teacher", "before", "student"):
        if (given := getattr(args, flag)) is not None and given not in names:
            parser.error(f"--{flag} {given}: there is no such model here, but {', '.join(names)}")

    def called(role, *taken):
        """Return the first model that is called by its role, those apart that have one already."""
        free = [name for name in names if name not in taken]
        return next((name for name in free if role_word(name.rpartition("/")[2]) == role), None)

    teacher = args.teacher or called("teacher")
    control = called("control", teacher, args.student, args.before)
    left = [name for name in names if name not in (teacher, control)]
    rounds = [called(f"own{number}", teacher, control) for number in range(9, 0, -1)]
    known = (*rounds, called("stage2", teacher, control), *reversed(left))
    student = args.student or next(filter(None, known), None)
    taken = (teacher, control, student)
    before = args.before or called("base", *taken) or called("stage1", *taken)
    roles = {"teacher": teacher, "before": before, "control": control, "student": student}
    roles = {role: name for role, name in roles.items() if name}
    if len(set(roles.values())) < len(roles):
        said = ", ".join(f"{role} {name}" for role, name in roles.items())
        parser.error(f"one model has two roles: {said}")
    return roles


# --- what does not belong together


def stale(model: dict, run: dict | None, where: Path) -> list[str]:
    """Return what of an evaluation folder is of another checkpoint than the rest of it, or than the
    run's, in words."""
    found, scored = [], model.get("scored_weights")
    if scored and model.get("weights") and scored != model["weights"]:
        found.append(
            f"{where}: eval.json and answers.scores.json are of different weights; measure both"
            " again"
        )
    own_rows = run and model.get("data") == run["settings"].get("data identity")
    if own_rows and Path(str(model.get("student"))).name == "best":
        seen, own = model.get("ce"), run["at_best"].get("ce")
        # 2 %: the history was made under the run's own --amp, perhaps
        if seen and own and abs(seen - own) > 0.02 * own:
            found.append(
                f"{where}: its CE {seen:.4f} is not that of best/ in the run's own history,"
                f" {own:.4f}: was the run made anew since? "
                + evaluation_command(Path(run["folder"]))
            )
    return found


def apart_teachers(models: dict[str, dict]) -> list[str]:
    """Return in words where the models' distances are to several teachers: no one number."""
    to = {name: model["kl_is_to"] for name, model in models.items() if model.get("kl_is_to")}
    if len({*to.values()}) < 2:
        return []
    each = "; ".join(f"of {name} to {teacher}" for name, teacher in to.items())
    return [f"the KLs are not to one teacher: {each}"]


def check_same_rows(models: dict[str, dict], rows: dict[str, list[dict]], against: str) -> None:
    """Refuse models that were measured on other held-out rows, or answered other prompts, than the
    one called `against`."""

    def short(value):
        return value[:12] if isinstance(value, str) else f"{value:,}"

    def sha(model):
        return f" (sha256 {model['prompts'][:12]})" if model.get("prompts") else ""

    mine, answered = models[against], [results.question(row) for row in rows[against]]
    for name, model in models.items():
        for key, what in (("data", "data set"), ("targets", "number of held-out targets")):
            if key in model and key in mine and model[key] != mine[key]:
                files.fail(
                    f"{name} and {against} were not measured on the same held-out rows",
                    f"{what} {short(model[key])} of {model['folder']}",
                    f"{short(mine[key])}, as {mine['folder']}",
                    "--eval-only once more, with the --data of the other",
                )
        others = [results.question(row) for row in rows[name]]
        if others and answered and others != answered:
            files.fail(
                f"{name} and {against} did not answer the same prompts",
                f"{len(others):,} prompts in {model['folder']}{sha(model)}",
                f"the {len(answered):,} of {mine['folder']}{sha(mine)}",
                "chat.py --score once more, with one file of prompts for both",
            )
