"""tests/torture.py in short: every stage disturbed in a few ways, and the same command again."""

import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TORTURE = Path(__file__).parents[1] / "torture.py"
KINDS = "write moment fault full limit gone fresh twice stop several"


def torture(*argv) -> tuple[str, dict[str, list[str]]]:
    """Run it in a process of its own, which has started no thread: what it said, and the lines of
    its tables by their first words."""
    command = [sys.executable, str(TORTURE), *argv]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    lines = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    return done.stdout, {line[0]: line[1:] for line in lines}


def test_every_stage_killed_starved_and_disturbed_ends_as_one_left_alone():
    said, table = torture("--rounds", "2", "--flips", "0", "--mutations", "0")
    assert "24 rounds: 0 faults" in said
    kinds = dict(zip(table["| stage"], table["| all"]))
    assert all(int(kinds[kind]) for kind in KINDS.split()), kinds


def test_a_flip_in_a_file_of_any_kind_is_noticed_and_a_mutation_is_one_line():
    said, table = torture("--rounds", "0", "--flips", "13", "--mutations", "8")
    assert "13 flips, 8 mutations: 0 faults" in said
    assert len(table) >= 13 + 8 and table["| last/"][:2] == ["1", "1"], table


def test_what_a_signal_ends_leaves_nothing():
    command = [sys.executable, str(TORTURE), "--rounds", "99", "--stages", "eval"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as tool:
        place = Path(tempfile.gettempdir())
        while not list(place.glob(f"torture-{tool.pid}-*/log-eval")):
            assert tool.poll() is None
            time.sleep(0.05)
        tool.send_signal(signal.SIGTERM)
        assert tool.wait(60) == 143
    assert not list(place.glob(f"torture-{tool.pid}-*"))
    assert f"torture-{tool.pid}-" not in Path("/proc/mounts").read_text()
