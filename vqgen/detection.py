"""How well a score tells outliers from what a model was trained on.

Outliers are the positives and a higher score means more of an outlier. All three measures are functions of how many
images of each kind have each distinct score, so that equal scores are one threshold (never an order by chance), and
a bootstrap needs no more than new counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numpy.random import Generator, Philox, SeedSequence

from vqgen.errors import InputError

Array = npt.NDArray[Any]

RECALL = 0.95
"""Share of the outliers that a threshold must catch where the false alarms are counted."""
RESAMPLES = 1000
_CELLS = 2**22
"""Counts held at once by the bootstrap."""


class Tally(NamedTuple):
    """Images of each kind at each of U distinct scores, ascending; any leading axes are separate samples."""

    inliers: Array
    """(..., U) counts."""
    outliers: Array
    """(..., U) counts."""


class Detection(NamedTuple):
    """One score's measures and their bootstrap standard errors (None where a set has one image only)."""

    auroc: float
    auroc_standard_error: float | None
    average_precision: float
    average_precision_standard_error: float | None
    fpr_at_recall: float
    fpr_at_recall_standard_error: float | None


def auroc(inliers: npt.ArrayLike, outliers: npt.ArrayLike) -> float:
    """Area under the ROC curve of scores (N,) and (M,): P(outlier > inlier) + P(equal) / 2; 0.5 is guessing.

    Raises:
        InputError: a set without scores, or a score that is not a finite number.
    """
    return float(tally_auroc(tally(inliers, outliers)))


def average_precision(inliers: npt.ArrayLike, outliers: npt.ArrayLike) -> float:
    """Sum over thresholds of precision times the gain in recall, of scores (N,) and (M,); guessing gives M / (N + M).

    Raises like `auroc`.
    """
    return float(tally_average_precision(tally(inliers, outliers)))


def fpr_at_recall(inliers: npt.ArrayLike, outliers: npt.ArrayLike, recall: float = RECALL) -> float:
    """Share of inliers (N,) flagged at the highest threshold that flags at least ``recall`` of the outliers (M,).

    A score at the threshold is flagged. Raises like `auroc`.
    """
    return float(tally_fpr(tally(inliers, outliers), recall))


def detection(
    inliers: npt.ArrayLike, outliers: npt.ArrayLike, *, resamples: int = RESAMPLES, seed: int = 0
) -> Detection:
    """All three measures of scores (N,) and (M,), with standard errors.

    An error is the standard deviation of the measure over ``resamples`` bootstrap samples, each kind drawn with
    replacement from its own images. Equal ``seed`` and set sizes draw the same images, whatever the score.

    Raises like `auroc`.
    """
    whole = tally(inliers, outliers)
    measures = (tally_auroc, tally_average_precision, tally_fpr)
    errors: list[float | None] = [None] * len(measures)
    sizes = [np.asarray(values).size for values in (inliers, outliers)]
    if min(sizes) > 1 and resamples > 1:
        found = [[measure(part) for measure in measures] for part in _resampled(inliers, outliers, resamples, seed)]
        errors = [float(np.concatenate(values).std(ddof=1)) for values in zip(*found, strict=True)]
    values = [float(measure(whole)) for measure in measures]
    pairs = [figure for pair in zip(values, errors, strict=True) for figure in pair]
    return Detection(*pairs)  # type: ignore[arg-type]


def roc_curve(inliers: npt.ArrayLike, outliers: npt.ArrayLike) -> tuple[Array, Array]:
    """False-positive rate and recall, each (U + 1,) ascending from 0 to 1, one point for each distinct score."""
    counts = tally(inliers, outliers)
    rates = [np.concatenate([[0.0], _from_above(part)[::-1] / part.sum()]) for part in counts]
    return rates[0], rates[1]


def tally(inliers: npt.ArrayLike, outliers: npt.ArrayLike) -> Tally:
    """Counts of both kinds at each distinct score; raises like `auroc`."""
    parts = [np.asarray(values, dtype=np.float64).ravel() for values in (inliers, outliers)]
    for values, kind in zip(parts, ("inliers", "outliers"), strict=True):
        if not values.size:
            raise InputError(f"There are no scores of {kind} to compare.")
        if not np.isfinite(values).all():
            raise InputError(f"The scores of the {kind} have values that are not finite numbers.")
    levels = np.unique(np.concatenate(parts))
    return Tally(*(np.bincount(np.searchsorted(levels, values), minlength=len(levels)) for values in parts))


def tally_auroc(counts: Tally) -> Array:
    """(...) area under the ROC curve: Mann and Whitney's U over the number of pairs."""
    below = counts.inliers.cumsum(-1) - counts.inliers / 2
    pairs = counts.inliers.sum(-1) * counts.outliers.sum(-1)
    area: Array = (counts.outliers * below).sum(-1) / pairs
    return area


def tally_average_precision(counts: Tally) -> Array:
    """(...) average precision, no interpolation between thresholds."""
    caught, alarms = _from_above(counts.outliers), _from_above(counts.inliers)
    precision = caught / np.maximum(caught + alarms, 1)
    mean: Array = (precision * counts.outliers).sum(-1) / counts.outliers.sum(-1)
    return mean


def tally_fpr(counts: Tally, recall: float = RECALL) -> Array:
    """(...) share of inliers flagged at the highest threshold with at least ``recall``."""
    caught = _from_above(counts.outliers)
    enough = caught >= recall * counts.outliers.sum(-1)[..., None] - 1e-9  # 0.95 x 20 is 19, not 19.0000001
    threshold = enough.shape[-1] - 1 - enough[..., ::-1].argmax(-1)  # the last, so the highest, score that does
    flagged = np.take_along_axis(_from_above(counts.inliers), threshold[..., None], -1)[..., 0]
    share: Array = flagged / counts.inliers.sum(-1)
    return share


def _from_above(counts: Array) -> Array:
    """Images at each score or above it."""
    summed: Array = counts[..., ::-1].cumsum(-1)[..., ::-1]
    return summed


def _resampled(inliers: npt.ArrayLike, outliers: npt.ArrayLike, resamples: int, seed: int) -> Iterator[Tally]:
    """Counts of bootstrap samples, (part, U) each, in parts that fit the memory; the parts change no sample."""
    kinds = [np.asarray(values, dtype=np.float64).ravel() for values in (inliers, outliers)]
    levels = np.unique(np.concatenate(kinds))
    places = [np.searchsorted(levels, values) for values in kinds]
    generators = [Generator(Philox(SeedSequence([seed, kind]))) for kind in range(len(kinds))]
    size = max(_CELLS // max(len(levels), *map(len, kinds)), 1)
    for start in range(0, resamples, size):
        count = min(size, resamples - start)
        offset = np.arange(count)[:, None] * len(levels)
        counts = []
        for place, generator in zip(places, generators, strict=True):
            chosen = place[generator.integers(0, len(place), (count, len(place)))]
            cells = np.bincount((chosen + offset).ravel(), minlength=count * len(levels))
            counts.append(cells.reshape(count, len(levels)))
        yield Tally(*counts)
