"""The README is true as far as a machine can tell: its commands parse, its targets exist, its tree
is the tree."""

import importlib
import re
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = ("data", "methods", "domain", "experiments", "compare", "tasks", "chat", "deploy")
SHOWN = TEXT + "".join((ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in PAGES)
BLOCKS = [
    line.split("   #")[0].strip()
    for block in re.findall(r"```\n(.*?)```", SHOWN, re.S)
    for line in block.splitlines()
]
DOCSTRINGS = {path: path.read_text(encoding="utf-8").split('"""')[1] for path in ROOT.glob("*.py")}
COMMANDS = [line for line in BLOCKS if re.match(r"(\.venv/bin/)?python \w+\.py ", line)]
COMMANDS += [
    line.split("   #")[0].strip()
    for text in DOCSTRINGS.values()
    for line in text.splitlines()
    if line.strip().startswith("python ")
]
TARGETS = sorted(
    {
        word
        for line in BLOCKS
        if line.startswith("make")
        for word in shlex.split(line, comments=True)[1:]
        if "=" not in word
    }
)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_or_of_a_docstring_has_flags_that_exist(command):
    _, script, *argv = shlex.split(command)
    importlib.import_module(script.removesuffix(".py")).parse_args(argv)


def test_commands_were_found():
    assert len(COMMANDS) >= 11 and {"demo", "data", "stage1", "logits", "stage2", "chat"} <= set(
        TARGETS
    ), (COMMANDS, TARGETS)


@pytest.mark.parametrize("target", TARGETS)
def test_a_make_target_of_the_readme_exists(target):
    result = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("recipe", sorted(path.stem for path in (ROOT / "recipes").glob("*.mk")))
@pytest.mark.parametrize("role", ("", "teacher"))
@pytest.mark.parametrize("target", ("data", "stage1", "logits", "stage2", "control", "measure"))
def test_a_recipe_gives_each_stage_flags_that_exist(recipe, target, role):
    command = ["make", "-n", target, f"RECIPE={recipe}", f"ROLE={role}", "CHUNK=3"]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    commands = [
        line.strip()
        for line in lines.splitlines()
        if re.match(r"\s*\.venv/bin/python \w+\.py", line)
    ]
    assert len(commands) == 1 or target == "measure" and commands
    for command in commands:
        _, script, *argv = shlex.split(command)
        importlib.import_module(script.removesuffix(".py")).parse_args(argv)


def test_the_tree_names_every_module_and_no_other():
    tree = TEXT.split("## The tree")[1]
    assert set(re.findall(r"lib/(\w+)\.py", tree)) == {
        path.stem for path in (ROOT / "lib").glob("*.py")
    } - {"__init__"}
    assert {path.name for path in ROOT.glob("*.py")} <= set(re.findall(r"\w+\.py", tree))


def test_no_figure_is_still_to_come():
    assert not re.search(r"\b[A-Z]{4,}_[A-Z_]+\b", TEXT.replace("REAL_MODELS", "")), "a placeholder"
