"""Which targets the basis is fitted to."""

import collections

import numpy as np
import pytest
import torch

from lib import data
from lib.teacher import sample


def split_of(*sources):
    """Return a split of sources (number, rows, targets a row), one after the other."""
    rows = []
    for source, count, targets in sources:
        mask = np.arange(targets + 3) >= 3
        rows += [(np.zeros(targets + 3, np.uint32), mask, source)] * count
    return data.Split.of(rows)


def by_source(split, rows):
    taken = np.minimum(split.rows["targets"][rows], sample.of_a_row(split))
    return np.bincount(split.rows["source"][rows], taken).astype(int).tolist()


def test_rows_are_spread_evenly_and_hold_as_many_targets_as_are_wanted():
    targets = np.random.default_rng(0).integers(1, 40, 5000)
    split = data.Split.of([(np.zeros(n + 1, np.uint32), np.arange(n + 1) > 0, 0) for n in targets])
    rows = sample.sampled_rows(split)
    assert 0.95 < sum(by_source(split, rows)) / sample.size(split) < 1.05
    assert rows[0] == 0 and rows[-1] == 4999 and np.ptp(np.diff(rows)) <= 1
    assert sample.sampled_rows(
        data.Split.of([(np.zeros(9, np.uint32), np.arange(9) > 3, 0)] * 30)
    ).tolist() == [*range(30)]


def test_long_rows_are_taken_from_many():
    """Two dozen whole rows of a data set of 341 targets a row were the sample: a kind that is one
    row in a hundred was not in it four times in five."""
    rows = sample.sampled_rows(split_of((0, 1000, 341)))
    assert len(rows) == sample.LEAST // sample.A_ROW


@pytest.mark.parametrize(
    "sources, wanted",
    [
        ([(0, 3, 9)], 3 * 9),  # all, where there are few
        ([(0, 24, 45)], 24 * 45),  # ... and more of a row
        ([(0, 50, 600)], sample.LEAST),
        ([(0, 300, 30)], sample.LEAST),
        ([(0, 3000, 30)], 3000 * 30 // 4),
        ([(0, 1800, 400), (1, 1800, 30)], 1800 * (32 + 30) // 4),  # of a row at most 32
        ([(0, 20_000, 40)], sample.MOST),
    ],
)
def test_the_sample_grows_with_the_data(sources, wanted):
    """A fixed size held three rows of what is one row in fifty of 5,000, now it is two dozen."""
    split = split_of(*sources)
    assert sample.size(split) == wanted
    taken = sum(by_source(split, sample.sampled_rows(split)))
    assert abs(taken / wanted - 1) < 0.02


def test_a_size_may_be_asked_for():
    split = split_of((0, 5000, 40))
    assert len(sample.sampled_rows(split, 320)) == 10


def test_each_source_has_an_equal_share_whatever_its_size_and_small_ones_all_of_theirs():
    split = split_of((4, 900, 100), (0, 300, 100), (2, 5, 30))
    small = 5 * 30
    shares = by_source(split, sample.sampled_rows(split))
    assert shares[2] == small and shares[1] == shares[3] == 0
    each = (sample.size(split) - small) / 2
    assert abs(shares[0] / each - 1) < 0.02 and abs(shares[4] / each - 1) < 0.02


def test_rows_without_targets_are_left_out_and_nothing_more():
    split = split_of((0, 6, 10))
    split.rows["targets"][3] = 0
    assert sample.sampled_rows(split).tolist() == [0, 1, 2, 4, 5]


class Counting:
    """A teacher whose hidden state at a target is (its row's first token, which target it is)."""

    device = torch.device("cpu")

    def hidden(self, batch):
        rows = [batch.tokens[line, 0].item() for line in range(len(batch.tokens))]
        found, seen = [], collections.Counter()
        for place in batch.where.tolist():
            row = rows[place // batch.tokens.shape[1]]
            found.append([float(row), float(seen[row])])
            seen[row] += 1
        return torch.tensor(found)


def numbered(*targets):
    """Return a split of rows of so many targets, whose tokens are the row's number."""
    rows = [
        (np.full(n + 2, number, np.uint32), np.arange(n + 2) >= 2, 0)
        for number, n in enumerate(targets)
    ]
    return data.Split.of(rows)


def test_rows_that_are_told_badly_give_more_targets():
    split = numbered(500, 40, 300, 7, *[60] * 300)
    taken = sample.take(split, Counting(), 1000)
    assert dict(zip(taken.rows, taken.counts))[0] == sample.A_ROW
    more = sample.with_more(taken, np.array([0, 3]), split, Counting(), 1000)
    assert sorted(more.rows) == sorted(taken.rows)
    counts = dict(zip(taken.rows, taken.counts)) | {0: sample.AN_ODD_ROW, 3: 7}
    assert dict(zip(more.rows, more.counts)) == counts
    start = 0
    for row, count in zip(more.rows, more.counts):
        states = more.hidden[start : start + count]
        there = int(split.rows[row]["targets"])
        wanted = sample.evenly(np.arange(there), count)
        assert states.tolist() == [[float(row), float(n)] for n in wanted], row
        start += count
    assert start == len(more.hidden)
