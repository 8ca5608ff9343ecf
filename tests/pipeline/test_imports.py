"""Every script starts where Python has no module of Unix alone, as on Windows."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
UNIX = ("fcntl", "resource", "termios", "readline")


@pytest.mark.parametrize("script", sorted(path.stem for path in ROOT.glob("*.py")))
def test_a_script_is_imported_where_modules_of_unix_are_missing(script):
    code = f"import sys; sys.modules.update(dict.fromkeys({UNIX})); import {script}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
