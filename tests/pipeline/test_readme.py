"""README, docs/ and the map are true as far as a machine can tell: commands parse, targets and
pages exist, every file of lib/ has its line."""

import ast
import importlib
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SHOWN = "\n".join([TEXT, *(page.read_text(encoding="utf-8") for page in PAGES)])
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
    for line in re.sub(r"\\+\n *", "", text).splitlines()
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


WHERE = ("SOURCE", "TEACHER", "STUDENT", "TOKENIZER", "DATA", "LOGITS", "RUNS")
STEPS = "data stage1 logits verify stage2 control sweep domain eval measure compare chat serve"


def words_of_make(target, folder, quote=""):
    """Return the words of every command of a target, its files in a folder that is there."""
    for name in WHERE:
        (folder / name.lower() / "stage1").mkdir(parents=True, exist_ok=True)
    (folder / "runs/stage1/config.json").write_text('{"keep_layers": [1]}', encoding="utf-8")
    told = [f"{name}={quote}{folder}/{name.lower()}{quote}" for name in WHERE]
    command = ["make", "-n", "-o", ".venv/ready", target, *told]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    lines = [shlex.split(line) for line in said.splitlines() if line.strip()]
    for line in lines:
        if line[0] == "echo":  # the next command, as it is to be pasted
            pasted = {word.replace("='", "=").removesuffix(quote) for word in shlex.split(line[1])}
            assert {word.replace("='", "=").removesuffix(quote) for word in told} <= pasted
    return [line for line in lines if line[0] != "echo"]


@pytest.mark.parametrize("name", ["My Drive", "Ann's", """a 'q' "r" it's #1:2 `é` (x);&*\\"""])
@pytest.mark.parametrize("target", STEPS.split())
def test_a_path_with_a_blank_is_one_word_to_make(tmp_path, target, name):
    plain = words_of_make(target, tmp_path / "Drive")
    wanted = [
        [word.replace(f"{tmp_path}/Drive", f"{tmp_path}/{name}") for word in line] for line in plain
    ]
    assert any(name in word for line in wanted for word in line)
    assert words_of_make(target, tmp_path / name) == wanted
    if "'" not in name:
        assert words_of_make(target, tmp_path / name, "'") == wanted


def test_the_tree_names_every_script_and_room():
    tree = TEXT.split("## The tree")[1]
    scripts = {path.name for path in ROOT.glob("*.py")}
    assert scripts == set(re.findall(r"\w+\.py\b", tree)) - {"__init__.py"}
    rooms = {path.parent.name for path in (ROOT / "lib").glob("*/__init__.py")}
    assert rooms == set(re.findall(r"lib/(\w+)/", tree))


def stems(folder):
    return {path.stem for path in folder.glob("*.py")} - {"__init__"}


def docstring(folder):
    return ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8")))


@pytest.mark.parametrize("room", ("", "options", "prepare", "measure", "chat"))
def test_the_map_has_a_line_for_every_file_and_for_no_other(room):
    lines = docstring(ROOT / "lib" / room).split("Rooms:")[0]
    assert set(re.findall(r"^ *(\w+)  +\S", lines, re.M)) == stems(ROOT / "lib" / room)


def test_the_map_names_the_files_of_every_room():
    rooms = docstring(ROOT / "lib").split("Rooms:")[1].split("THE RULE")[0]
    for name, files in re.findall(r"^    (\w+)/(.*(?:\n     .*)*)", rooms, re.M):
        missing = stems(ROOT / "lib" / name) - set(re.findall(r"\w+", files))
        assert not missing, (name, missing)


def test_what_the_map_points_to_is_there():
    lines = docstring(ROOT / "lib")
    classes = re.findall(r"(\w+/\w+\.py),\s+class (\w+)", lines)
    assert len(classes) >= 3
    for path, name in classes:
        assert f"\nclass {name}" in (ROOT / "lib" / path).read_text(encoding="utf-8"), (path, name)
    for module, name in re.findall(r"\b(losses)\.(\w+)", lines):
        assert hasattr(importlib.import_module(f"lib.{module}"), name), (module, name)


def test_pages_that_are_pointed_to_exist():
    for page in {*re.findall(r"(?:docs|recipes|bench|lib|tests)/[\w./-]+\.\w+", SHOWN)}:
        assert (ROOT / page).exists(), page


def test_no_figure_is_still_to_come():
    assert not re.search(r"\b[A-Z]{4,}_[A-Z_]+\b", TEXT.replace("REAL_MODELS", "")), "a placeholder"


def test_every_test_that_the_table_of_faults_names_is_there():
    table = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    tests = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "tests").rglob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", table))
    assert len(named) > 100
    assert not [name for name in sorted(named) if f"def {name}(" not in tests]


def test_make_says_where_to_begin_where_nothing_is_there(tmp_path):
    """A missing file was all that it said."""
    shutil.copy(ROOT / "Makefile", tmp_path)

    def said(*words):
        command = ["make", "-o", ".venv/ready", *words]
        made = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        return made.returncode, made.stdout

    for words in ([], ["data"], ["stage1"], ["logits"], ["stage2"]):
        code, text = said(*words)
        assert (code == 0) == (not words), text
        for door in ("make demo", "make data NAME=mine", "--answers teacher"):
            assert door in text
        assert not words or "is missing" in text
    assert "Where to begin" not in said("data", "SOURCE=mine.jsonl")[1]  # the script says it
