"""Detection measures: equal to scikit-learn's, ties included, and their standard errors to a plain bootstrap."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.random import Generator, Philox
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.metrics import roc_curve as sklearn_roc_curve

from vqgen.detection import auroc, average_precision, detection, fpr_at_recall, roc_curve, tally
from vqgen.errors import InputError


def drawn(seed: int, levels: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores with few distinct values (many ties) or with many."""
    generator = Generator(Philox(seed))
    sizes = generator.integers(1, 60, 2)
    inliers = generator.integers(0, levels, sizes[0]) / 7
    outliers = generator.integers(0, levels, sizes[1]) / 7 + generator.choice([0.0, 1.0, -0.5])
    return inliers, outliers


def as_sklearn(inliers: np.ndarray, outliers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    truth = np.concatenate([np.zeros(len(inliers)), np.ones(len(outliers))])
    return truth, np.concatenate([inliers, outliers])


@pytest.mark.parametrize("levels", [1, 2, 5, 10_000])
@pytest.mark.parametrize("seed", range(25))
def test_all_three_are_scikit_learns(seed: int, levels: int) -> None:
    inliers, outliers = drawn(seed, levels)
    truth, scores = as_sklearn(inliers, outliers)
    assert auroc(inliers, outliers) == pytest.approx(roc_auc_score(truth, scores), abs=1e-12)
    assert average_precision(inliers, outliers) == pytest.approx(average_precision_score(truth, scores), abs=1e-12)
    alarms, caught, _ = sklearn_roc_curve(truth, scores, drop_intermediate=False)
    for recall in (0.5, 0.95, 1.0):
        expected = alarms[np.argmax(caught >= recall - 1e-12)]
        assert fpr_at_recall(inliers, outliers, recall) == pytest.approx(expected, abs=1e-12)
    ours = roc_curve(inliers, outliers)
    np.testing.assert_allclose(ours[0], alarms, atol=1e-12)
    np.testing.assert_allclose(ours[1], caught, atol=1e-12)


def test_known_values() -> None:
    assert auroc([0, 1, 2], [3, 4]) == 1
    assert auroc([3, 4], [0, 1, 2]) == 0
    assert auroc([1, 1], [1, 1, 1]) == 0.5
    assert average_precision([1, 1], [1, 1, 1]) == pytest.approx(3 / 5)
    assert fpr_at_recall([1, 1], [1, 1, 1]) == 1
    # 19 of 20 outliers lie above every inlier, so the twentieth may be missed at 95 % recall, not at 96 %
    outliers = [*range(1, 20), -1]
    assert fpr_at_recall([0] * 5, outliers) == 0
    assert fpr_at_recall([0] * 5, outliers, 0.96) == 1


@pytest.mark.parametrize("seed", range(5))
def test_a_rising_function_of_the_scores_changes_nothing(seed: int) -> None:
    inliers, outliers = drawn(seed, 20)
    assert detection(inliers, outliers, resamples=20) == detection(np.exp(inliers), np.exp(outliers), resamples=20)
    assert auroc(-inliers, -outliers) == pytest.approx(1 - auroc(inliers, outliers))


def test_standard_errors_are_those_of_a_plain_bootstrap() -> None:
    generator = Generator(Philox(3))
    inliers, outliers = generator.normal(0, 1, 80), generator.normal(1, 1.5, 50)
    found = detection(inliers, outliers, resamples=400, seed=1)
    other = Generator(Philox(99))
    areas, precisions, alarms = [], [], []
    for _ in range(1500):
        first, second = other.choice(inliers, 80), other.choice(outliers, 50)
        areas.append(auroc(first, second))
        precisions.append(average_precision(first, second))
        alarms.append(fpr_at_recall(first, second))
    # the standard deviation of 400 draws is itself known to 1 / sqrt(800), some 4 %
    assert found.auroc_standard_error == pytest.approx(np.std(areas), rel=0.15)
    assert found.average_precision_standard_error == pytest.approx(np.std(precisions), rel=0.15)
    assert found.fpr_at_recall_standard_error == pytest.approx(np.std(alarms), rel=0.2)
    # Hanley and McNeil's bound for the AUROC: no error is above sqrt(A (1 - A) / min(N, M))
    assert found.auroc_standard_error < math.sqrt(found.auroc * (1 - found.auroc) / 50)


def test_a_seed_draws_the_same_and_the_global_generator_is_left_alone() -> None:
    inliers, outliers = drawn(1, 10_000)
    before = np.random.get_state()[1].copy()
    first = detection(inliers, outliers, resamples=50, seed=4)
    assert (np.random.get_state()[1] == before).all()
    assert first == detection(inliers, outliers, resamples=50, seed=4)
    assert first != detection(inliers, outliers, resamples=50, seed=5)


def test_resamples_in_parts_are_those_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    inliers, outliers = drawn(2, 10_000)
    whole = detection(inliers, outliers, resamples=30)
    monkeypatch.setattr("vqgen.detection._CELLS", 7 * len(tally(inliers, outliers).inliers))  # 7 of 30 at a time
    assert detection(inliers, outliers, resamples=30) == whole


def test_one_image_has_no_standard_error() -> None:
    found = detection([1.0], [2.0, 3.0])
    assert found.auroc == 1
    assert found.auroc_standard_error is None


@pytest.mark.parametrize("bad", [[], [math.nan], [math.inf]])
def test_scores_that_cannot_be_ranked_are_refused(bad: list[float]) -> None:
    for pair in ((bad, [1.0]), ([1.0], bad)):
        with pytest.raises(InputError):
            auroc(*pair)
