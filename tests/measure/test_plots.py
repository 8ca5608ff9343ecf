"""The picture of a prepared data set: what its bars say, and that it can be drawn of any."""

import json
import sys

import numpy as np
import pytest
import tiny_tokenizers as tiny

import prepare_data
from lib import data
from lib.measure import plots
from lib.prepare import describe


def folder_of(folder, targets, prompts, source, names, dropped, val=0):
    """Write what the picture reads: row records (the first `val` of them held out) and a part of
    meta.json."""
    records = np.zeros(len(targets), data.ROW)
    records["targets"], records["length"], records["source"] = (
        targets,
        np.add(targets, prompts),
        source,
    )
    np.save(folder / "val.rows.npy", records[:val])
    np.save(folder / "train.rows.npy", records[val:])
    (folder / "meta.json").write_text(
        json.dumps({"sources": [{"name": name} for name in names], "dropped": dropped})
    )
    return folder


@pytest.fixture
def drawn(monkeypatch):
    """Return a function that draws a folder's picture and returns the figure: lengths of prompts,
    of answers, sources, drops."""
    plt = plots.pyplot()
    monkeypatch.setattr(plt, "close", lambda figure: None)

    def draw(folder):
        plots.prepared(folder)
        assert (folder / "report.png").read_bytes().startswith(b"\x89PNG") and (
            folder / "report.png"
        ).stat().st_size > 10_000
        figure = plt.figure(plt.get_fignums()[-1])
        names = [label.get_text() for label in figure.axes[2].get_yticklabels()]
        bars = [[bar.get_width() for bar in bars] for bars in figure.axes[2].containers]
        drops = dict(
            zip(
                (label.get_text() for label in figure.axes[3].get_yticklabels()),
                (bar.get_width() for bar in figure.axes[3].patches),
            )
        )
        return figure, dict(zip(names, zip(*bars))), drops

    yield draw
    monkeypatch.undo()
    plt.close("all")


def test_the_bars_are_the_rows_by_source_on_both_sides_and_the_drops_by_reason(tmp_path, drawn):
    folder = folder_of(
        tmp_path,
        [5] * 6,
        [7] * 6,
        [0, 2, 0, 0, 2, 2],
        ["data/a.jsonl", "silent", "finance"],
        {"too long": 3, "empty": 1},
        val=2,
    )
    figure, sources, drops = drawn(folder)
    assert sources == {"a.jsonl": (2, 1), "silent": (0, 0), "finance": (2, 1)} and drops == {
        "too long": 3,
        "empty": 1,
    }
    assert figure.axes[3].get_title(loc="left") == "4 of 10 rows read were dropped"
    assert figure.get_suptitle() == "4 rows to train on, 2 held out; 30 of 72 tokens are learnt"


@pytest.mark.parametrize("longest", [1, 2, 3, 9, 1000, 40_000])
def test_every_row_is_in_both_histograms_and_areas_are_shares(tmp_path, drawn, longest):
    targets = np.unique(np.geomspace(1, longest, 200).astype(int))
    figure, _, _ = drawn(folder_of(tmp_path, targets, targets[::-1], 0, ["x"], {}))
    for axis in figure.axes[:2]:
        heights, edges, _ = axis.patches[0].get_data()
        assert edges[0] == 0.5 and edges[-1] > longest
        assert (heights * np.diff(np.log(edges))).sum() == pytest.approx(len(targets))
        assert f"longest {longest:,}" in axis.get_title(loc="left")


def test_the_median_and_the_99th_percentile_are_those_of_meta_json(tmp_path, drawn):
    figure, _, _ = drawn(folder_of(tmp_path, range(1, 1001), [40] * 1000, 0, ["x"], {}))
    assert (
        figure.axes[1].get_title(loc="left")
        == "median 501 (line), 99th percentile 990 (dotted), longest 1,000"
    )
    assert [describe.percentiles(np.arange(1, 1001))[point] for point in ("p50", "p99")] == [
        501,
        990,
    ]
    assert [line.get_xdata()[0] for line in figure.axes[1].lines] == [501, 990]


@pytest.mark.parametrize(
    ("rows", "names", "dropped"),
    [
        (1, ["a.jsonl"], {}),
        (40, [f"source {i}" for i in range(8)], {f"reason {i}": i + 1 for i in range(9)}),
        (3, ["\u6570\u636e" * 30], {"x" * 90: 1}),
    ],
)
def test_one_row_or_many_sources_no_drop_or_many_are_drawn_without_a_warning(
    tmp_path, drawn, rows, names, dropped, recwarn
):
    _, sources, drops = drawn(
        folder_of(
            tmp_path, [9] * rows, [1] * rows, [i % len(names) for i in range(rows)], names, dropped
        )
    )
    assert (
        len(sources) == len(names)
        and len(drops) == len(dropped)
        and not [w for w in recwarn if "Glyph" in str(w.message)]
    )


def test_of_a_hundred_sources_the_largest_are_named_and_the_others_summed(tmp_path, drawn):
    source = np.repeat(np.arange(100), np.arange(1, 101))
    _, sources, _ = drawn(
        folder_of(
            tmp_path,
            [3] * len(source),
            [4] * len(source),
            source,
            [f"part-{i}" for i in range(100)],
            {},
        )
    )
    assert (
        list(sources)[0] == "part-99"
        and len(sources) == 10
        and sources["91 other sources"] == (sum(range(1, 92)), 0)
    )


@pytest.mark.parametrize("installed", [True, False])
def test_prepare_draws_its_picture_where_matplotlib_is_installed_and_says_where_it_is_not(
    tmp_path, monkeypatch, capsys, installed
):
    tiny.tiny().save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"prompt": f"p{i}", "answer": f"a{i}"}) + "\n" for i in range(9))
    )
    if not installed:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
    prepare_data.main(
        [
            "--source",
            str(tmp_path / "rows.jsonl"),
            "--tokenizer",
            str(tmp_path / "tokenizer"),
            "--out",
            str(tmp_path / "out"),
            "--workers",
            "1",
        ]
    )
    assert (tmp_path / "out" / "report.png").exists() == installed and data.Dataset(
        tmp_path / "out"
    ).meta["dropped"] == {}
    assert ("no picture: matplotlib is missing" in capsys.readouterr().out) != installed
