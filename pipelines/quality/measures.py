"""The figures of sample quality that rest on features: a set of samples against as many held-out images.

What the features are is `pipelines.quality.extractors`, what the figures are `vqgen.feature_distances`; docs/metrics.md
says how to read them. Every figure but KID depends on the number of images, so that only rows measured with the same
counts can be held against each other.
"""

from __future__ import annotations

from torch import Tensor

from vqgen.errors import InputError
from vqgen.feature_distances import NEIGHBOURS, frechet_distance, kernel_distance, precision_recall_density_coverage

MINIMUM_IMAGES = {"frechet": 100, "kid": 100, "precision": 50, "recall": 50, "density": 50, "coverage": 50}
"""Images that each set must have. Below it, the noise of the figure is as large as what is to be told apart."""

NAMES = {
    "frechet": "the Fréchet distance",
    "kid": "KID",
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
}

KID_SUBSETS = 100
KID_SUBSET_SIZE = 500
"""Most images in a subset; half of the smaller set where that is less, so that the subsets differ."""


def kid_subset_size(real_count: int, fake_count: int) -> int:
    """Images in each subset of KID for sets of so many images."""
    return min(KID_SUBSET_SIZE, min(real_count, fake_count) // 2)


def shortfall(real_count: int, fake_count: int) -> str | None:
    """What is to be said where so many images and samples are too few for `measure`; None where they are enough."""
    count = min(real_count, fake_count)
    lacking = {key: least for key, least in MINIMUM_IMAGES.items() if count < least}
    if not lacking:
        return None
    *first, last = (NAMES[key] for key in lacking)
    what = f"{', '.join(first)} and {last}" if first else last
    kind = "test images" if real_count <= fake_count else "samples"
    return f"{count:,} {kind} are too few for {what}; at least {max(lacking.values()):,} are needed."


def measure(real: Tensor, fake: Tensor, *, seed: int) -> dict[str, float]:
    """Every figure of features of samples ``fake`` (M, F) against those of held-out images ``real`` (N, F).

    Keys: frechet, kid, kid_standard_error, precision, recall, density, coverage. ``seed`` is of KID's subsets. No
    global random generator is touched.

    Raises:
        InputError: too few images, torchmetrics is not installed, or features that do not fit each other.
    """
    problem = shortfall(len(real), len(fake))
    if problem is not None:
        raise InputError(problem, "Give more test images with -n and more samples with --samples.")
    size = kid_subset_size(len(real), len(fake))
    kid = kernel_distance(real, fake, subsets=KID_SUBSETS, subset_size=size, seed=seed)
    assert kid.standard_error is not None, "a subset is at most half of a set"
    return {
        "frechet": frechet_distance(real, fake),
        "kid": kid.value,
        "kid_standard_error": kid.standard_error,
        **precision_recall_density_coverage(real, fake, NEIGHBOURS),
    }
