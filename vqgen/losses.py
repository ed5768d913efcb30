"""Reconstruction losses, and the likelihood of an image given its codes.

The likelihood is a discretised Gaussian: the probability of an 8-bit value is the Gaussian mass of its bin. Bins
are 2/255 wide on [-1, 1], and the first and the last take the whole tail, so that the 256 probabilities sum to 1.
Its logarithm is computed in float64, as a difference of logarithms on the negative side, because the plain
difference of two distribution functions is log 0 as soon as the scale is small.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from einops import rearrange
from torch import Tensor

from vqgen.errors import DivergedError, InputError

SCALES = (1e-4, 10.0)
"""Least and greatest scale that `fit_scale` returns."""

_REACH = 4.0  # residuals are counted on [-4, 4]; means on [-1, 1] never leave [-2, 2]
_CELLS = 2**18  # cells of that count: each 1/257 of a pixel value's bin
_GOLDEN = (math.sqrt(5) - 1) / 2


def reconstruction_error(images: Tensor, targets: Tensor, kind: str) -> Tensor:
    """(B,) mean squared (``mse``) or absolute (``l1``) error of (B, C, H, W) images, at least in float32."""
    dtype = torch.promote_types(torch.promote_types(images.dtype, targets.dtype), torch.float32)
    error = images.to(dtype) - targets.to(dtype)
    error = error.abs() if kind == "l1" else error.square()
    return error.flatten(1).mean(dim=1)


def discretized_gaussian_nats(images: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """-log p(images | mean, scale) in nats per image, (B,) float64.

    Args:
        images: (B, C, H, W) uint8.
        mean: (B, C, H, W) float on the scale of [-1, 1]; the work is done where it lies.
        scale: (C,) standard deviations on the scale of [-1, 1].

    Raises:
        InputError: a scale is not a positive number, as before calibration.
    """
    mean = _double(mean)
    images = images.to(mean.device)
    lower = (images.double() - 0.5) / 127.5 - 1
    log_probs = _log_mass(lower, images == 0, images == 255, mean, _per_channel(scale, mean))
    return -log_probs.flatten(1).sum(dim=1)


def discretized_gaussian_log_probs(mean: Tensor, scale: Tensor) -> Tensor:
    """log p of all 256 values, (B, C, H, W, 256) float64, for a (B, C, H, W) mean and (C,) scales.

    Raises:
        InputError: a scale is not a positive number.
    """
    mean = _double(mean)
    values = torch.arange(256, dtype=torch.float64, device=mean.device)
    lower = (values - 0.5) / 127.5 - 1
    return _log_mass(lower, values == 0, values == 255, mean[..., None], _per_channel(scale, mean)[..., None])


def fit_scale(pairs: Iterable[tuple[Tensor, Tensor]], channels: int) -> Tensor:
    """The scale of each channel under which the images are most likely: (C,) float64 on the CPU.

    The likelihood maximised is the discretised one itself, bins and tails included. It depends on an image and its
    mean through their difference, and on whether the value is the first, the last or another one; so it is enough
    to count differences, in memory that does not grow with the number of images. Counting moves a difference by
    at most 1/500 of the bin of a pixel value.

    Args:
        pairs: batches of (B, C, H, W) uint8 images and float means on the scale of [-1, 1].
        channels: C.

    Raises:
        InputError: there are no images.
        DivergedError: a mean is not a finite number.
    """
    # Of each channel: differences of values that are the first (0), another (1), the last (2).
    counts = torch.zeros(channels, 3, _CELLS, dtype=torch.int64)
    for images, mean in pairs:
        counts += _count_differences(images.cpu(), mean.cpu().double())
    if not counts.any():
        raise InputError("There are no images to fit the decoder's scale to.")
    return torch.tensor([_most_likely_scale(channel) for channel in counts], dtype=torch.float64)


def _double(mean: Tensor) -> Tensor:
    # Apple's GPUs have no float64.
    return (mean.cpu() if mean.device.type == "mps" else mean).double()


def _per_channel(scale: Tensor, mean: Tensor) -> Tensor:
    """(C, 1, 1) float64 beside ``mean``."""
    scale = scale.detach().cpu().double()
    if not (scale > 0).all() or not scale.isfinite().all():
        raise InputError(
            f"The decoder's scale must be positive numbers, got {scale.tolist()}.",
            "It is fitted at the end of the training of the codec.",
        )
    return scale.to(mean.device)[:, None, None]


def _log_mass(lower: Tensor, first: Tensor, last: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """log of the Gaussian mass of the bins that start at ``lower``; ``first`` and ``last`` ones are open-ended."""
    a = ((lower - mean) / scale).masked_fill(first, -torch.inf)
    b = ((lower + 2 / 255 - mean) / scale).masked_fill(last, torch.inf)
    # By symmetry the mass of [a, b] is that of [-b, -a]: take the one on the negative side, where log_ndtr is exact.
    positive = a + b > 0
    a, b = torch.where(positive, -b, a), torch.where(positive, -a, b)
    log_a, log_b = torch.special.log_ndtr(a), torch.special.log_ndtr(b)
    log_mass: Tensor = log_b + torch.log(-torch.expm1(log_a - log_b))
    return log_mass


def _count_differences(images: Tensor, mean: Tensor) -> Tensor:
    """(C, 3, cells) counts of the differences value - mean of one batch."""
    if not mean.isfinite().all():
        raise DivergedError("The decoder's output has values that are not finite numbers.")
    channels = images.shape[1]
    difference = (images.double() / 127.5 - 1 - mean).clamp(-_REACH, _REACH)
    cell = ((difference + _REACH) * (_CELLS / (2 * _REACH))).long().clamp(max=_CELLS - 1)
    kind = torch.ones_like(cell).masked_fill(images == 0, 0).masked_fill(images == 255, 2)
    row = rearrange(torch.arange(channels), "c -> c 1 1") * 3 + kind
    return torch.bincount((row * _CELLS + cell).flatten(), minlength=channels * 3 * _CELLS).view(channels, 3, _CELLS)


def _most_likely_scale(counts: Tensor) -> float:
    """Maximum-likelihood scale of one channel from its (3, cells) counts.

    A grid finds the right valley, golden sections its bottom, both over the logarithm of the scale.
    """
    kind, cell = counts.nonzero(as_tuple=True)
    weight = counts[kind, cell].double()
    difference = (cell.double() + 0.5) * (2 * _REACH / _CELLS) - _REACH

    def cost(log_scale: float) -> float:
        scale = torch.tensor(math.exp(log_scale), dtype=torch.float64)
        # A value whose bin starts 1/255 below 0, around a mean that is its difference away.
        nats = -_log_mass(torch.tensor(-1 / 255, dtype=torch.float64), kind == 0, kind == 2, -difference, scale)
        return float(nats @ weight)

    low, high = (math.log(scale) for scale in SCALES)
    step = (high - low) / 23
    grid = [low + i * step for i in range(24)]
    best = min(grid, key=cost)
    low, high = max(low, best - step), min(high, best + step)
    left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    left_cost, right_cost = cost(left), cost(right)
    for _ in range(32):
        if left_cost <= right_cost:
            high, right, right_cost = right, left, left_cost
            left = high - _GOLDEN * (high - low)
            left_cost = cost(left)
        else:
            low, left, left_cost = left, right, right_cost
            right = low + _GOLDEN * (high - low)
            right_cost = cost(right)
    return math.exp((low + high) / 2)
