"""What docs/scale.md says on paper: its tables are the program's, its bytes lib's, and what is
simulated agrees with what is known in closed form."""

import math
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest

from lib import data, files, flags
from lib.teacher import record, shared

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "bench"))
import scale  # noqa: E402


def test_the_tables_of_the_document_are_those_that_the_program_prints(capsys):
    scale.main(["--table"])
    document = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    tables = capsys.readouterr().out.strip().split("\n\n")
    assert len(tables) == 3
    for table in tables:
        assert table in document, table


def test_bytes_and_defaults_are_those_of_lib():
    errors = True
    dtype = record.record_dtype(16, [1.0, 2.0, 4.0], 151_936, "u8", 128, errors)
    assert dtype.itemsize == scale.TARGET_BYTES and data.ROW.itemsize == scale.ROW_BYTES
    assert np.dtype(np.uint32).itemsize + np.dtype(bool).itemsize == scale.TOKEN_BYTES
    looked_at = (2 + files.BLOCKS_LOOKED_AT) * files.BLOCK + record.LOOKED_AT_BYTES
    assert looked_at == scale.OPEN_BYTES
    assert (shared.PART_TARGETS, shared.LEASE_S / 3600) == (scale.SHARED_PART, scale.LEASE)
    assert flags.SHARED["--tokens-per-step"]["default"] == scale.Job.step


def test_without_failures_the_simulation_takes_the_time_of_the_arithmetic():
    ideal = scale.costs(scale.JOBS[1])["dump"]  # 8 GPUs
    end, lost = scale.dump(8, 400, 8 * ideal / 400, 0)
    assert end == pytest.approx(ideal) and lost == 0
    assert scale.dump(8, 50, 1.0, 0) == (7.0, 0.0)  # a last round of two parts


@pytest.mark.parametrize("mtbf", (100.0, 50.0, 25.0))
def test_the_work_that_a_dump_loses_grows_as_it_does_to_first_order(mtbf):
    """Of a part of t hours a death costs t/2, and t/MTBF of the parts meet one. About 500 deaths at
    least, of which the sum is known to 5 %."""
    lost = [scale.dump(50, 2500, 1.0, seed, mtbf)[1] / 2500 for seed in range(20)]
    assert statistics.mean(lost) == pytest.approx(1 / (2 * mtbf), rel=0.15)


def test_a_part_whose_worker_died_is_done_again_by_the_one_in_its_place():
    end, lost = scale.dump(1, 1, 2.0, 0, mtbf=1.0)
    deaths = (end - 2.0 - lost) / scale.REPLACE
    assert lost > 0 and deaths >= 1 and deaths == pytest.approx(round(deaths))


def test_a_slow_worker_ends_its_last_part_late():
    assert scale.dump(4, 4, 1.0, 0, slow=1.0) == (scale.SLOW, 0.0)


@pytest.mark.parametrize("gpus", (256, 2048, 16384))
@pytest.mark.parametrize("saves", (10, 200))
def test_a_training_that_fails_takes_as_long_as_expected(gpus, saves):
    words = 100.0, saves, 0.003, scale.REPLACE, scale.GPU_MTBF / gpus
    times = [scale.training(*words, seed) for seed in range(400)]
    error = statistics.stdev(times) / math.sqrt(len(times))
    assert abs(statistics.mean(times) - scale.expected(*words)) < 4 * error


def test_what_a_training_loses_is_to_first_order_saves_half_an_interval_and_starts():
    saves, save, restart, mtbf = 100, 0.003, 1 / 6, 100.0
    lost = scale.expected(100.0, saves, save, restart, mtbf) / 100.0 - 1
    first = save / 1.0 + (1.0 / 2 + restart) / mtbf
    assert lost == pytest.approx(first, rel=0.05)


@pytest.mark.parametrize(("mtbf_min", "best_min"), ((24 * 60, 117), (6 * 60, 57), (15, 9.1)))
def test_the_best_interval_is_the_published_one(mtbf_min, best_min):
    """Daly 2006, figures 3 to 5: saves of 5 minutes, starts of 10, runs of 500 hours."""
    every = np.arange(1, 300, 0.05)
    hours = [scale.expected(30_000, 30_000 / t, 5, 10, mtbf_min) for t in every]
    assert every[int(np.argmin(hours))] == pytest.approx(best_min, rel=0.01)
    if mtbf_min > 60:  # to first order, less 5
        assert math.sqrt(2 * 5 * mtbf_min) - 5 == pytest.approx(best_min, rel=0.04)


def test_the_same_seed_gives_the_same_figures():
    words = 16, 300, 1.0
    runs = [scale.dump(*words, seed, mtbf=20.0, slow=0.1) for seed in (3, 3, 4)]
    assert runs[0] == runs[1] != runs[2]
    times = [scale.training(100.0, 20, 0.01, 0.1, 5.0, seed) for seed in (3, 3, 4)]
    assert times[0] == times[1] != times[2]
