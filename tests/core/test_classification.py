"""Accuracy, precision, recall, F1 and the confusion table of class numbers are scikit-learn's."""

import json

import numpy as np
import pytest
from sklearn import metrics

from lib import evaluate


@pytest.mark.parametrize("classes, asked, said", [(4, 4, 4), (6, 3, 5), (2, 1, 1), (3, 1, 2)])
def test_classification_is_scikit_learns(classes, asked, said):
    rng = np.random.default_rng(classes)
    reference, predicted = rng.integers(0, asked, 200), rng.integers(0, said, 200)
    made = evaluate.classification(reference, predicted, classes)
    assert made["accuracy"] == pytest.approx(
        metrics.accuracy_score(reference, predicted), abs=1e-12
    )
    assert made["macro_f1"] == pytest.approx(
        metrics.f1_score(reference, predicted, average="macro", zero_division=0), abs=1e-12
    )
    assert (
        made["confusion"]
        == metrics.confusion_matrix(reference, predicted, labels=range(classes)).tolist()
    )
    wanted = metrics.precision_recall_fscore_support(
        reference, predicted, labels=range(classes), zero_division=0
    )
    np.testing.assert_allclose(
        [list(row.values()) for row in made["per_class"].values()], np.array(wanted).T, atol=1e-12
    )
    json.dumps(made)
