"""The house, as lib/__init__.py draws it: who imports whom, how long a function may be, which flags
there are. A rule that is in the way may be changed, here and on purpose."""

import argparse
import ast
import difflib
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIB = sorted((ROOT / "lib").rglob("*.py"))
SCRIPTS = ("prepare_data", "stage1_sft", "dump_logits", "stage2_kd", "chat")
ROOMS = ("teacher", "options", "prepare", "measure", "chat")
FLAT = [path for path in LIB if path.parent.name == "lib" and path.stem != "__init__"]
SOURCES = [*LIB, *(ROOT / f"{name}.py" for name in SCRIPTS)]
# words that mean the same in every file that has them
SHARED = {"main", "parse_args", "add_flags", "check_flags", "FORMAT", "load", "save", "open_rows"}


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def place(path: Path) -> str:
    return str(path.relative_to(ROOT))


def room_of(path: Path) -> str:
    """Return the room of a file of lib/; "" for a flat one."""
    inside = path.relative_to(ROOT / "lib").parts
    return inside[0] if len(inside) > 1 else ""


def imported(path: Path) -> set[str]:
    """Return the dotted names that a file imports, also inside its functions."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{place(path)}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def functions(path: Path):
    return (node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef))


def test_at_most_13_files_lie_flat():
    assert len(FLAT) <= 13, [path.name for path in FLAT]


@pytest.mark.parametrize("path", LIB, ids=place)
def test_a_flat_file_imports_flat_files_and_a_room_also_itself(path):
    own = room_of(path)
    for name in imported(path):
        top, _, rest = name.partition(".")
        assert top not in SCRIPTS, f"{place(path)} imports the script {name}"
        room = rest.split(".")[0] if top == "lib" else ""
        assert room not in ROOMS or room == own, f"{place(path)} imports {name}"


@pytest.mark.parametrize("path", SOURCES, ids=place)
def test_a_function_is_at_most_60_lines(path):
    long = {node.name: node.end_lineno - node.lineno + 1 for node in functions(path)}
    assert not {name for name, lines in long.items() if lines > 60} - {"main", "parse_args"}, long


@pytest.mark.parametrize("path", SOURCES, ids=place)
def test_a_lambda_has_no_name(path):
    for node in ast.walk(tree(path)):
        value = getattr(node, "value", None)
        named = isinstance(node, ast.Assign | ast.AnnAssign | ast.NamedExpr)
        assert not (named and isinstance(value, ast.Lambda)), f"{place(path)}:{node.lineno}"


def test_the_trainers_differ_by_distillation_alone():
    mains = []
    for name in ("stage1_sft", "stage2_kd"):
        (main,) = (f for f in functions(ROOT / f"{name}.py") if f.name == "main")
        mains.append(ast.unparse(main).splitlines())
    lines = list(difflib.unified_diff(*mains, lineterm="", n=0))[2:]
    differing = [line for line in lines if line[0] in "+-"]
    assert len(differing) <= 35, "\n".join(differing)


def test_one_name_is_one_thing():
    homes: dict[str, list[str]] = {}
    for path in LIB:
        for node in tree(path).body:
            names = [getattr(node, "name", None)]
            if isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = [getattr(target, "id", None) for target in targets]
            for name in {*names} - {None, *SHARED}:
                homes.setdefault(name, []).append(place(path))
    assert not {name: paths for name, paths in homes.items() if len(paths) > 1}


def flags_of(add_flags) -> set[str]:
    """Return the attributes of what a parser returns once `add_flags` has been there."""
    parser = argparse.ArgumentParser(add_help=False)
    add_flags(parser)
    return {action.dest for action in parser._actions}


def test_no_flat_file_knows_an_option():
    names = {path.stem for path in LIB if room_of(path) == "options"} - {"__init__"}
    of_options = set()
    for name in names:
        if add_flags := getattr(importlib.import_module(f"lib.options.{name}"), "add_flags", None):
            of_options |= flags_of(add_flags)
    assert {"mix", "lora_rank", "balance", "samples", "track", "tag"} <= of_options
    for path in FLAT:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value).endswith("args"):
                assert node.attr not in of_options, f"{place(path)}:{node.lineno} args.{node.attr}"
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert node.value not in of_options, f"{place(path)}:{node.lineno} {node.value!r}"


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_new_flag_is_listed_on_purpose(name, capsys):
    with pytest.raises(SystemExit):
        importlib.import_module(name).parse_args(["--help"])
    usage = capsys.readouterr().out.split("\n\n")[0]
    seen = set(re.findall(r"--[a-z][a-z0-9-]*", usage))
    listed = (Path(__file__).parent / "flags.txt").read_text(encoding="utf-8").splitlines()
    wanted = {flag for line in listed if line.startswith(f"{name}:") for flag in line.split()[1:]}
    assert seen == wanted, f"not listed: {sorted(seen - wanted)}, gone: {sorted(wanted - seen)}"
