"""Run the tests that train as other machines would: other instructions, other libraries' kernels,
other numbers of threads, another order of the files. One line a machine, with its time.

    python tests/machines.py                 # all machines: about 14 minutes on 2 CPU cores
    python tests/machines.py threads avx2    # those whose names begin so
"""

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
MACHINES = {  # a name, and the environment that makes this machine another one
    "default": {"ATEN_CPU_CAPABILITY": "default"},  # torch's kernels without vector instructions
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2"},
    "mkl": {"MKL_CBWR": "COMPATIBLE"},  # products in the order that every processor can follow
    "threads": {"TEST_THREADS": "4"},
    "reverse": {"TEST_ORDER": "reverse"},
    "onednn-sse41": {"ONEDNN_MAX_CPU_ISA": "SSE41"},
    "onednn-avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2"},
}
ONEDNN = ("-k", "half or fp16 or bf16 or float16 or dtype or autocast")  # all that it multiplies
# the rooms whose tests hold figures and weights against each other; and their files that kill, read
# flags or time instead, which is the same on every machine
TESTS = ("tests/core", "tests/teacher", "tests/options", "tests/pipeline")
SAME = "bench deploy domain errors imports readme resume tags track".split()
PYTEST = "-n auto --dist loadfile --no-loadscope-reorder -q --no-header -p no:cacheprovider"


def run(name: str, environment: dict[str, str]) -> tuple[bool, str]:
    """Run the tests as a machine does: whether they passed, and what pytest said at its end."""
    chosen = [f"--ignore-glob=*/test_{file}.py" for file in SAME]
    chosen += ONEDNN if name.startswith("onednn") else ()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *TESTS, *chosen, *PYTEST.split()],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    lines = done.stdout.splitlines() or done.stderr.splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return done.returncode == 0, "\n".join([*lines[-1:], *failed])


def main(wanted: list[str]) -> int:
    good = True
    for name, environment in MACHINES.items():
        if wanted and not name.startswith(tuple(wanted)):
            continue
        start = time.monotonic()
        passed, said = run(name, environment)
        good = good and passed
        variables = " ".join(f"{key}={value}" for key, value in environment.items())
        print(f"{name:13} {variables:28} {time.monotonic() - start:5.0f} s  {said}", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
