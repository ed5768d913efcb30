"""Measures: how codes are used, how near images come, likelihoods in bits.

Everything here is over a whole split: the use of a codebook in one batch says little about the codebook.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from vqgen.errors import InputError

BOOTSTRAP_VALUES = 2**21
"""Values of the resamples that are held at once."""


class CodeUsage:
    """How often each code of a codebook of ``codebook_size`` is used, counted batch by batch over a split."""

    def __init__(self, codebook_size: int) -> None:
        self.counts = torch.zeros(codebook_size, dtype=torch.int64)
        """(K,) int64 on the CPU; may be replaced by the sum over processes."""

    def add(self, codes: Tensor) -> None:
        """Count codes of any shape, int64 in [0, K)."""
        self.counts += torch.bincount(codes.flatten(), minlength=len(self.counts)).cpu()

    @property
    def perplexity(self) -> float:
        """exp of the entropy of code use: the number of codes that, used equally, would say as much; 0 if none."""
        counts = self.counts[self.counts > 0].double()
        if not len(counts):
            return 0.0
        shares = counts / counts.sum()
        return math.exp(-float(shares @ shares.log()))

    @property
    def entropy_bits(self) -> float:
        """Entropy of code use in bits per code: what a code takes where each is coded by how often it occurs."""
        return math.log2(self.perplexity) if self.perplexity else 0.0

    @property
    def dead(self) -> int:
        """Codes never used."""
        return int((self.counts == 0).sum())

    @property
    def usage(self) -> float:
        """Share of the codes that are used at all."""
        return 1 - self.dead / len(self.counts)

    def verdict(self, name: str) -> str:
        """One line on the state of the codebook of level ``name``: healthy, fair, poor or collapsed, and the cure.

        Few codes cannot have a high perplexity, so it is held against what that many codes could reach.
        """
        total = int(self.counts.sum())
        if not total:
            return f"{name}: no codes counted."
        most = min(total, len(self.counts))
        share = (self.perplexity - 1) / (most - 1) if most > 1 else 1.0  # 0 where one code is used, 1 where all are
        if share >= 0.5:
            word, cure = "healthy", ""
        elif share >= 0.2:
            word, cure = "fair", "; a smaller codebook_size would cost little"
        elif share >= 0.05:
            word, cure = "poor", "; lower codec.training.learning_rate, train longer or lower codec.codebook_size"
        else:
            word, cure = "collapsed", "; use an ema codebook with revival, or lower codec.training.learning_rate"
        return (
            f"{name}: {word}, perplexity {self.perplexity:.1f} of {len(self.counts)}, "
            f"{self.usage:.1%} of the codes used{cure}."
        )


def mse(images: Tensor, targets: Tensor) -> Tensor:
    """(B,) mean squared error on the scale of [0, 1], of (B, C, H, W) images: uint8, or float in [-1, 1]."""
    return (_unit(images) - _unit(targets)).square().flatten(1).mean(dim=1)


def psnr(images: Tensor, targets: Tensor) -> Tensor:
    """(B,) peak signal-to-noise ratio in dB of images as `mse` takes them; infinite where they are equal."""
    return -10 * mse(images, targets).log10()


def ssim(images: Tensor, targets: Tensor) -> Tensor:
    """(B,) structural similarity of images as `mse` takes them, the mean over channels; 1 where they are equal.

    Wang et al. 2004, sec. III-B, on the scale of [0, 1], by torchmetrics: a Gaussian window of 11x11 (sigma 1.5),
    reflected at the borders. Images of fewer than 11 pixels on a side get the largest window that fits into them,
    its sigma smaller in proportion, so that figures of images of different sizes are then not comparable.

    Raises:
        InputError: torchmetrics is not installed.
    """
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except ImportError as error:
        raise InputError(
            "SSIM needs torchmetrics, which is not installed.", "Install it with: pip install 'vqgen[metrics]'"
        ) from error
    reach = min(5, (min(images.shape[-2:]) - 1) // 2)  # pixels of the window on either side of its middle
    sigma = 0.3 * reach if reach else 0.1  # 0.1: a window of one pixel
    found = structural_similarity_index_measure(
        _unit(images), _unit(targets), sigma=sigma, data_range=1.0, reduction="none"
    )
    assert isinstance(found, Tensor)
    return found.reshape(-1)


class PixelCounts:
    """How often each of the 256 values occurs in images, counted batch by batch."""

    def __init__(self) -> None:
        self.counts = torch.zeros(256, dtype=torch.int64)

    def add(self, images: Tensor) -> None:
        """Count the values of uint8 images of any shape.

        Raises:
            InputError: the images are not uint8.
        """
        if images.dtype != torch.uint8:
            raise InputError(f"Expected uint8 images, got {images.dtype} of shape {list(images.shape)}.")
        self.counts += torch.bincount(images.flatten().cpu(), minlength=256)

    @property
    def variance(self) -> float:
        """Variance of all values about their one mean on the scale of [0, 1]: the error of showing that mean grey
        for every image; nan where nothing was counted."""
        shares = self.counts.double() / self.counts.sum()
        values = torch.arange(256, dtype=torch.float64) / 255
        return float(shares @ (values - shares @ values).square())


def pixel_variance(images: Tensor) -> float:
    """`PixelCounts.variance` of uint8 images of any shape.

    Raises:
        InputError: the images are not uint8.
    """
    counted = PixelCounts()
    counted.add(images)
    return counted.variance


def nmse(mse: float, variance: float) -> float:
    """Mean squared error over the `pixel_variance` of the same images: 0 is perfect, 1 is the mean grey.

    As the reference code of van den Oord et al. 2017 (arXiv 1711.00937) normalises. Images of one grey have nothing
    to explain: then any error is infinite, and no error is nan.
    """
    if variance > 0:
        return mse / variance
    return math.inf if mse > 0 else math.nan


def nats_to_bits(nats: float) -> float:
    return nats / math.log(2)


def bits_per_dim(nats_per_image: float, dims: int) -> float:
    """Bits per value of an image, from nats per image and its number of values C * H * W."""
    return nats_to_bits(nats_per_image) / dims


def bootstrap_standard_error(values: Tensor, resamples: int = 1000, seed: int = 0) -> float | None:
    """Standard error of the mean of ``values`` (N,), from resamples of them; None for fewer than two.

    The standard deviation of the means of ``resamples`` draws of N values with replacement (Efron 1979), by a generator
    of its own, so that the same values give the same figure.
    """
    if len(values) < 2:
        return None
    own = values.detach().cpu().double().numpy()
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, len(own)])))
    at_once = max(1, BOOTSTRAP_VALUES // len(own))
    means = [
        own[generator.integers(len(own), size=(min(at_once, resamples - done), len(own)), dtype=np.int32)].mean(axis=1)
        for done in range(0, resamples, at_once)
    ]
    return float(np.concatenate(means).std(ddof=1))


def _unit(images: Tensor) -> Tensor:
    if images.dtype == torch.uint8:
        return images.float() / 255
    return (images.float() + 1) / 2
