"""tests/torture.py in short: every stage disturbed in a few ways, and the same command again."""

import subprocess
import sys
from pathlib import Path

TORTURE = Path(__file__).parents[1] / "torture.py"


def test_every_stage_killed_starved_and_disturbed_ends_as_one_left_alone():
    """In a process of its own, which has started no thread."""
    command = [sys.executable, str(TORTURE), "--rounds", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "16 rounds, 0 faults" in done.stdout
    for kind in "write moment fault full limit gone twice stop".split():
        assert f" {kind} " in done.stdout, kind
