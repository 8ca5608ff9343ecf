"""The benches run, and print the ratios that the README quotes (small shapes here: the figures mean nothing)."""
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_bench_prints_its_ratios():
    result = subprocess.run([sys.executable, str(ROOT / "bench/bench.py"), "--quick", "--rounds", "1"], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr[-2000:]
    lines = {line["bench"]: line for line in map(json.loads, result.stdout.splitlines())}
    assert lines["step"]["default_T2_over_stage1"] > 0 and lines["dump"]["bare_over_dump"] > 0 and lines["head"]["ours_over_plain_time"] > 0
