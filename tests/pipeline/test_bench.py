"""The benches run, and print the ratios that the README quotes (small shapes here: the figures mean
nothing)."""

import json
import re
import subprocess
import sys
from pathlib import Path

import make
import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "bench" / name) for name in ("fidelity", "serving")]


def test_every_bench_prints_its_ratios():
    result = subprocess.run(
        [sys.executable, str(ROOT / "bench/speed/bench.py"), "--quick", "--rounds", "1"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    lines = {line["bench"]: line for line in map(json.loads, result.stdout.splitlines())}
    assert (
        lines["step"]["default_T2_over_stage1"] > 0
        and lines["dump"]["bare_over_dump"] > 0
        and lines["head"]["ours_over_plain_time"] > 0
        and lines["host"]["targets_per_s"] > 0
    )


def test_refilling_writes_the_answers_of_sorted_batches(tmp_path, capsys):
    import refill

    pq.write_table(
        pa.table({"instruction": [f"w{i} w{i + 1}" * (1 + i % 3) for i in range(12)]}),
        tmp_path / "rows.parquet",
    )
    made = make.model(tmp_path / "model", scale=2.0)
    make.call(
        refill.main,
        "--model",
        made,
        "--source",
        tmp_path / "rows.parquet",
        "--prompts",
        12,
        "--rows",
        4,
        "--max-new-tokens",
        12,
    )
    assert "12 of 12 the same" in capsys.readouterr().out


def test_make_fidelity_in_small_fills_the_document_and_draws_the_picture(tmp_path):
    import fidelity
    import outcome
    import tables

    world = make.world(tmp_path, rows=60)
    teacher = ["--data", world / "data", "--teacher", world / "teacher"]
    make.call(
        fidelity.main,
        *teacher,
        "--student",
        f"far={world / 'student'}",
        "--student",
        f"near={world / 'teacher'}:0",
        "--quick",
        "--tried",
        "--out",
        tmp_path / "out" / "tiny",
    )
    rows = json.loads((tmp_path / "out" / "tiny" / "angles.json").read_text())["rows"]
    found = {(row["student"], row["method"], row["T"]): row["angle"] for row in rows}
    # the whole width at 8 bits is nearly exact, and a bucket is not
    assert (
        found["far", "top 16, rank 32 in 32 bytes", 2.0]
        < 1
        < found["far", "top 16, exact bucket", 2.0]
    )

    for seeds, methods in (
        ("0", "ce,renormalised,bucket,rank,live"),
        ("0,1", "rank,live"),
    ):  # what is there is not run again
        make.call(
            outcome.main,
            *teacher,
            "--student",
            world / "student",
            "--out",
            tmp_path / "out" / "outcome-tiny",
            "--steps",
            2,
            "--seeds",
            seeds,
            "--methods",
            methods,
            "--temperatures",
            "2",
            "--k",
            4,
            "--threads",
            1,
        )
    doc = tmp_path / "doc.md"
    doc.write_text(
        "before\n"
        + "".join(
            f"<!-- {name} -->\nold\n<!-- end -->\nbetween\n"
            for name in ("angles tiny", "tried tiny", "outcome tiny")
        )
    )
    make.call(tables.main, "--results", tmp_path / "out", "--doc", doc)
    text = doc.read_text()
    assert (
        "old" not in text
        and text.count("between") == 3
        and "| top 16, exact bucket |" in text
        and "| the rest inferred from the top k |" in text
    )
    assert (
        "| 2 | rank | " in text and len(re.findall(r"^\| 2 \|.* 2 \|$", text, re.M)) == 2
    )  # two of the methods have two seeds
    assert doc.with_suffix(".png").stat().st_size > 10_000
