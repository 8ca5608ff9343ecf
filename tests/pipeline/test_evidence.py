"""bench/onpolicy/: what it computes, and that a finished command is not run again. (The whole of it
in small: `python bench/onpolicy/evidence.py --smoke`.)"""

import sys
from pathlib import Path

import make
import pytest

import prepare_data
from lib import data
from lib.prepare import demo

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "bench/onpolicy"))


def result(setting="demo"):
    """Two seeds of three conditions, of which one has been run for one seed."""

    def kept(score, kl, **cost):
        measures = {"score": score, "kl_given": kl, "rkl_given": 2 * kl, "kl_own": 3 * kl}
        return {"measures": measures, "cost": cost}

    labels = {"start": "the start", "given": "(a) given", "own-fkl": "(c) own", "wider": "(g)"}
    first = {"start": kept(0.5, 0.4), "given": kept(0.6, 0.3, train_s=10.0)}
    own = {"train_s": 12.0, "rows": 3200, "written_tokens": 1000, "record_bytes": 2_500_000}
    second = {"given": kept(0.8, 0.1, train_s=20.0), "own-fkl": kept(0.9, 0.2, **own)}
    seeds = {"0": first | {"own-fkl": kept(0.7, 0.2, **own)}, "1": second}
    return {"setting": setting, "settings": {"score": "exact"}, "labels": labels, "seeds": seeds}


def test_the_interval_is_students_t_on_so_few_seeds():
    from evidence_tables import interval

    mean, half = interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.303 / 3**0.5)  # of scipy.stats.t.ppf(0.975, 2)
    assert interval([5.0]) == (5.0, None)


def test_differences_are_taken_within_a_seed_and_before_the_mean():
    import evidence_tables as tables

    line = next(x for x in tables.paired(result()).splitlines() if x.startswith("| (c)"))
    # scores +0.1 and +0.1, so no spread; KL -0.1 and +0.1
    assert "| +0.100 ± 0.000 | +0.000 ± 1.271 |" in line and line.endswith("| 2 |")
    told = tables.measures(result())
    assert "| the start | 0.500 |" in told and "(g)" not in told  # one seed: no interval
    assert "| (c) own | 3,200 | 1,000 |  |  | 2.5 | 12 |" in tables.cost(result())


def test_the_document_is_filled_between_its_marks(tmp_path, capsys):
    import evidence_tables as tables

    from lib import files

    doc, path = tmp_path / "doc.md", tmp_path / "results-demo.json"
    doc.write_text(
        "a\n<!-- measures demo -->\nold\n<!-- end -->\nb\n<!-- cost demo -->\n<!-- end -->\n"
    )
    files.write_json(path, result())
    for _ in range(2):  # again: the same
        tables.main(["--results", str(path), "--doc", str(doc)])
        text = doc.read_text()
        assert "old" not in text and "\nb\n" in text and text.count("| (c) own |") == 2
    assert f"paired demo: {doc} has no place for it" in capsys.readouterr().out


def test_the_start_has_seen_no_row_that_is_held_out_whatever_the_seed(tmp_path):
    """`make demo SEED=1` splits as seed 0 does: by its own --seed the evidence held out other rows,
    on which the start had been trained (0.844 exact where it has 0.710)."""
    import evidence

    demo.main(["--out", str(tmp_path / "demo"), "--teacher-rows", "5", "--student-rows", "40"])
    given = ["--source", tmp_path / "demo/student.parquet"]
    given += ["--tokenizer", tmp_path / "demo/tokenizer"]
    make.call(prepare_data.main, *given, "--out", tmp_path / "data", "--val", 12)
    flags = evidence.SETTINGS["demo"]["prepare"].replace("data/{demo}", str(tmp_path / "data"))
    again = [*given, "--out", tmp_path / "again", "--seed", 1, *flags.split()]
    make.call(prepare_data.main, *again)
    held, there = (data.Dataset(tmp_path / name).val for name in ("data", "again"))
    sets = [{bytes(split.row(i)[0]) for i in range(len(split.rows))} for split in (held, there)]
    assert len(sets[0]) == 12 and sets[0] == sets[1]


def test_a_finished_command_is_not_run_again_and_a_killed_one_is_run_anew(tmp_path):
    import evidence

    (tmp_path / "script.py").write_text(
        "import sys\nopen(sys.argv[1], 'a').write(' '.join(sys.argv[2:]) + '|')\n"
        "raise SystemExit('bad' in sys.argv)\n"
    )
    script, seen = str(tmp_path / "script.py"), tmp_path / "seen"
    steps = evidence.Steps(tmp_path / "out")
    for _ in range(2):
        steps.run("one", script, seen, "x")
    assert seen.read_text() == "x|"
    with pytest.raises(SystemExit, match="another command"):
        steps.run("one", script, seen, "y")
    for told in ("bad|", "bad|bad --fresh|"):  # not finished: from its beginning
        with pytest.raises(SystemExit, match="ended with 1"):
            steps.run("two", script, seen, "bad")
        assert seen.read_text() == f"x|{told}"
    assert evidence.Steps(tmp_path / "out").keep("c", lambda: {"measures": {}, "cost": {}})
    assert evidence.Steps(tmp_path / "out").keep("c", lambda: 1 / 0)["cost"] == {}


def test_seeds_of_another_machine_stay_beside_those_measured_here(tmp_path):
    import evidence

    from lib import files

    def made(out, seed, score):
        measures = {"measures": {"score": score}, "cost": {}}
        evidence.Steps(out / seed).keep("given", lambda: measures)

    about, results = {"setting": "demo", "settings": {"steps": 500}}, tmp_path / "results.json"
    for seed, score in (("0", 0.1), ("1", 0.2)):
        made(tmp_path / "there", seed, score)
    files.write_json(results, evidence.collected(tmp_path / "there", about, results))
    for seed, score in (("1", 0.3), ("3", 0.4)):
        made(tmp_path / "here", seed, score)
    seeds = evidence.collected(tmp_path / "here", about, results)["seeds"]
    found = {seed: each["given"]["measures"]["score"] for seed, each in seeds.items()}
    assert found == {"0": 0.1, "1": 0.3, "3": 0.4}
    with pytest.raises(SystemExit, match="other settings"):
        evidence.collected(tmp_path / "here", about | {"settings": {"steps": 9}}, results)


def test_answers_of_equal_cost():
    import evidence

    assert evidence.equal_cost(800, 4, 685_056 / 96_512) == (451, 1)
    assert evidence.equal_cost(100, 4, 4) == (100, 1)
    assert evidence.equal_cost(60, 2, 1.2) == (50, 2)  # 100 answers
    assert evidence.added({"a": 1}, {}, {"a": 2, "b": 3}) == {"a": 3, "b": 3}
