"""The table of docs/models.md: what bench/models/families.py tells apart, on a type of each kind."""

import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "bench/models"))
import families  # noqa: E402


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("families")
    doc = out / "models.md"
    doc.write_text(f"# Models\n\n{families.BEGIN}\n\nof before\n")
    families.main(["--out", str(out), "--doc", str(doc), "qwen3", "qwen3_5_text", "bert", "blip"])
    lines = (out / "results.jsonl").read_text().splitlines()
    return [families.json.loads(line) for line in lines], doc.read_text()


def test_a_type_of_each_kind_goes_through_the_pipeline(results):
    found, text = results
    seen = [(one["type"], "is_decoder" in one, families.outcome(one)) for one in found]
    assert seen == [
        ("qwen3", False, "works"),
        ("qwen3_5_text", False, "unpacked"),
        ("bert", False, "refused"),
        ("bert", True, "unpacked"),
        ("blip", False, "refused"),
    ]
    assert "attends to later tokens" in found[2]["refused"] and "of before" not in text
    assert "4 types: 1 work, 2 work with one row a line, 1 are refused" in text


def test_what_is_wrong_is_seen(tmp_path, monkeypatch):
    """A head that forgets its scale: the probe is switched off, the sweep's own figures are not."""
    monkeypatch.setattr(families.stage1_sft.models, "after_head", lambda module: (1.0, 0.0))
    monkeypatch.setattr(families.stage1_sft.models, "probe", lambda model, amp: None)
    monkeypatch.setitem(families.OWN, "hyperclovax", {"logits_scaling": 3.0})
    families.main(["--out", str(tmp_path), "hyperclovax"])
    (found,) = map(families.json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert families.outcome(found) == "wrong" and "cross-entropy before" in found["wrong"][0]
