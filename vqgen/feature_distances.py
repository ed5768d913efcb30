"""How far two sets of images lie apart, each image being a row of features: one number for a set, none for an image.

A set is a tensor (N, F), one image per row; who made the features says what the numbers mean, and figures of different
features have nothing to say to each other. Images become features in `pipelines.quality.extractors`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vqgen.errors import InputError

NEIGHBOURS = 5
"""k of `precision_recall_density_coverage`, as Naeem et al. 2020 recommend."""

ROWS = 1024
"""Distances of so many images to all others are in memory at once."""


@dataclass(frozen=True)
class KernelDistance:
    """What `kernel_distance` found."""

    value: float
    """Squared maximum mean discrepancy; without bias, so that it may be a little below 0 for sets that are alike."""
    standard_error: float | None
    """Of ``value`` over the draw of the two sets; None where a subset is a whole set."""


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Frechet distance of two sets of features (N, F) and (M, F), each taken as a Gaussian; at least 0.

    |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) with the unbiased covariances (Heusel et al. 2017, eq. 6,
    arXiv 1706.08500), in float64. With S = R^T R, the eigenvalues of S_a S_b are the squared singular values of
    R_a R_b^T: exact also where there are fewer samples than features, where the root of a near-zero eigenvalue is
    mostly rounding. Few samples still overstate the distance.

    Raises:
        InputError: fewer than two samples, features of different widths, or features that are not finite numbers.
    """
    _check(a, b, 2)
    means, roots = zip(*(_mean_and_root(features) for features in (a, b)), strict=True)
    shift = (means[0] - means[1]).square().sum()
    spread = sum(root.square().sum() for root in roots)  # tr(S) = |R|^2
    shared = torch.linalg.svdvals(roots[0] @ roots[1].T).sum()
    return max(float(shift + spread - 2 * shared), 0.0)


def kernel_distance(real: Tensor, fake: Tensor, *, subsets: int, subset_size: int, seed: int) -> KernelDistance:
    """Kernel distance (KID) of two sets of features (N, F) and (M, F): unbiased in the number of images.

    The squared maximum mean discrepancy under the kernel (x y^T / F + 1)^3 (Binkowski et al. 2018, sec. 4, arXiv
    1801.01401), as torchmetrics computes it, in float64: the mean over ``subsets`` pairs of subsets of
    ``subset_size`` images each, drawn without replacement from a generator of ``seed``.

    The standard error is that of the delete-d jackknife (Shao & Wu 1989): the spread over the subsets, times
    sqrt(m / (n - m)) for subsets of m of n images, n being the smaller set. Where the sets are alike it is too large,
    never too small.

    Raises:
        InputError: torchmetrics is not installed, a set is smaller than a subset, subsets of fewer than two images,
            features of different widths, or features that are not finite numbers.
    """
    try:
        from torchmetrics.image.kid import poly_mmd
    except ImportError as error:
        raise InputError(
            "The kernel distance needs torchmetrics, which is not installed.",
            "Install it with: pip install 'vqgen[metrics]'",
        ) from error
    if subsets < 1 or subset_size < 2:
        raise InputError(f"Expected at least one subset of at least two images, got {subsets} of {subset_size}.")
    _check(real, fake, subset_size)
    real, fake = _prepared(real), _prepared(fake)
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed)))
    found = torch.empty(subsets, dtype=torch.float64)
    for number in range(subsets):
        drawn = [torch.from_numpy(generator.choice(len(features), subset_size, False)) for features in (real, fake)]
        found[number] = poly_mmd(real[drawn[0]], fake[drawn[1]])
    fewest = min(len(real), len(fake))
    standard_error = None
    if subsets > 1 and subset_size < fewest:
        standard_error = float(found.std()) * math.sqrt(subset_size / (fewest - subset_size))
    return KernelDistance(float(found.mean()), standard_error)


def precision_recall_density_coverage(real: Tensor, fake: Tensor, neighbours: int = NEIGHBOURS) -> dict[str, float]:
    """How two sets of features (N, F) and (M, F) cover each other, by balls that reach to the k-th nearest neighbour.

    ``precision``: share of the fakes inside the ball of any real image; ``recall``: share of the reals inside the ball
    of any fake (Kynkaanniemi et al. 2019, sec. 2, arXiv 1904.06991). ``density``: in how many balls of reals a fake
    lies, over k, on average, which may exceed 1; ``coverage``: share of the reals whose ball holds a fake (Naeem et
    al. 2020, sec. 3, arXiv 2002.09797). The same numbers as the authors' package ``prdc``, in float64; memory grows
    with N + M, not with N * M.

    Raises:
        InputError: no more images than ``neighbours``, features of different widths, or features that are not finite.
    """
    if neighbours < 1:
        raise InputError(f"Expected at least one neighbour, got {neighbours}.")
    _check(real, fake, neighbours + 1)
    real, fake = _prepared(real), _prepared(fake)
    real_radii, fake_radii = _radii(real, neighbours), _radii(fake, neighbours)
    balls = torch.zeros(len(fake), dtype=torch.int64)  # of reals, around each fake
    recalled, covered = 0, 0
    for start in range(0, len(real), ROWS):
        distances = _distances(real[start : start + ROWS], fake)
        radii = real_radii[start : start + ROWS]
        balls += (distances < radii[:, None]).sum(dim=0)
        recalled += int((distances < fake_radii).any(dim=1).sum())
        covered += int((distances.min(dim=1).values < radii).sum())
    return {
        "precision": float((balls > 0).double().mean()),
        "recall": recalled / len(real),
        "density": float(balls.double().mean()) / neighbours,
        "coverage": covered / len(real),
    }


def _radii(features: Tensor, neighbours: int) -> Tensor:
    """(N,): distance of each row to its k-th nearest other one."""
    parts = []
    for part in torch.split(features, ROWS):
        nearest = _distances(part, features).topk(neighbours + 1, dim=1, largest=False).values  # itself among them
        parts.append(nearest.max(dim=1).values)
    return torch.cat(parts)


def _distances(a: Tensor, b: Tensor) -> Tensor:
    # By differences, not by a matrix product: equal images are then exactly 0 apart, and no ball of radius 0 holds one.
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def _mean_and_root(features: Tensor) -> tuple[Tensor, Tensor]:
    """(F,) mean and (min(N, F), F) root R of the covariance R^T R, float64 on the CPU."""
    features = _prepared(features)
    mean = features.mean(dim=0)
    _, root = torch.linalg.qr((features - mean) / math.sqrt(len(features) - 1), mode="r")
    return mean, root


def _prepared(features: Tensor) -> Tensor:
    """float64 on the CPU."""
    features = features.detach().cpu().double()
    if not features.isfinite().all():
        raise InputError("The features have values that are not finite numbers.")
    return features


def _check(a: Tensor, b: Tensor, least: int) -> None:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < least:
        count = {2: "two"}.get(least, least)
        raise InputError(
            f"Expected two sets of at least {count} features of the same width, got {list(a.shape)} and "
            f"{list(b.shape)}."
        )
