from __future__ import annotations

import math
import sys
from collections import Counter

import pytest
import torch

from vqgen.errors import InputError
from vqgen.metrics import CodeUsage, PixelCounts, bits_per_dim, mse, nats_to_bits, nmse, pixel_variance, psnr, ssim


def test_usage_over_a_split_equals_a_brute_force_count() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(0, 40, (size, 3, 5), generator=generator) for size in (7, 7, 2)]
    usage = CodeUsage(50)
    for codes in batches:
        usage.add(codes)

    counted = Counter(int(code) for codes in batches for code in codes.flatten())
    total = sum(counted.values())
    entropy = -sum(n / total * math.log(n / total) for n in counted.values())
    assert usage.counts.tolist() == [counted[code] for code in range(50)]
    assert usage.perplexity == pytest.approx(math.exp(entropy), rel=1e-12)
    assert usage.entropy_bits == pytest.approx(entropy / math.log(2), rel=1e-12)
    assert usage.dead == 50 - len(counted)
    assert usage.usage == pytest.approx(len(counted) / 50)


def test_perplexity_counts_equally_used_codes() -> None:
    usage = CodeUsage(8)
    assert usage.perplexity == usage.entropy_bits == 0
    assert usage.verdict("top") == "top: no codes counted."
    usage.add(torch.zeros(0, 2, 2, dtype=torch.int64))
    assert usage.perplexity == 0
    usage.add(torch.tensor([[1, 3], [5, 7]]))
    assert usage.perplexity == pytest.approx(4)
    assert usage.usage == 0.5


@pytest.mark.parametrize(
    ("size", "codes", "word"),
    [
        (64, torch.arange(64).repeat(10), "healthy"),
        (64, torch.arange(20).repeat(10), "fair"),
        (64, torch.arange(6).repeat(100), "poor"),
        (64, torch.full((500,), 3), "collapsed"),
        (2, torch.zeros(500, dtype=torch.int64), "collapsed"),
        (1, torch.zeros(500, dtype=torch.int64), "healthy"),
        (512, torch.arange(50), "healthy"),  # 50 codes cannot use more than 50 entries
    ],
)
def test_verdict_names_the_state_and_a_cure(size: int, codes: torch.Tensor, word: str) -> None:
    usage = CodeUsage(size)
    usage.add(codes)
    verdict = usage.verdict("bottom")
    assert verdict.startswith(f"bottom: {word}, perplexity {usage.perplexity:.1f} of {size}")
    assert (";" in verdict) == (word != "healthy")


def test_mse_and_psnr_are_on_the_scale_of_zero_to_one() -> None:
    black = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    grey = torch.full_like(black, 51)
    assert mse(black, grey).tolist() == pytest.approx([0.04, 0.04])
    assert psnr(black, grey).tolist() == pytest.approx([10 * math.log10(25)] * 2, rel=1e-5)
    # The same images as floats on [-1, 1], and one of each kind.
    assert mse(black / 127.5 - 1, grey / 127.5 - 1).tolist() == pytest.approx([0.04, 0.04], rel=1e-5)
    assert mse(black, grey / 127.5 - 1).tolist() == pytest.approx([0.04, 0.04], rel=1e-5)
    assert psnr(black, black).tolist() == [math.inf, math.inf]


def test_bits() -> None:
    assert nats_to_bits(math.log(8)) == pytest.approx(3)
    # 3,072 values, each one of 256 equally likely: 8 bits per value.
    assert bits_per_dim(3072 * math.log(256), 3072) == pytest.approx(8)


def pictures(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def windowed_ssim(a: torch.Tensor, b: torch.Tensor, reach: int, sigma: float) -> float:
    """SSIM of two (H, W) float64 images on [0, 1], place by place, by the paper's formulas."""
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float64)
    bell = torch.exp(-offsets.square() / (2 * sigma**2))
    window = torch.outer(bell, bell) / bell.sum() ** 2
    a, b = (
        torch.nn.functional.pad(image[None, None], (reach,) * 4, mode="reflect" if reach else "constant")[0, 0]
        for image in (a, b)
    )
    found = []
    for row in range(a.shape[0] - 2 * reach):
        for column in range(a.shape[1] - 2 * reach):
            x, y = (image[row : row + 2 * reach + 1, column : column + 2 * reach + 1] for image in (a, b))
            mx, my = (window * x).sum(), (window * y).sum()
            vx, vy = (window * (x - mx).square()).sum(), (window * (y - my).square()).sum()
            both = (window * (x - mx) * (y - my)).sum()
            top = (2 * mx * my + 0.01**2) * (2 * both + 0.03**2)
            found.append(top / ((mx**2 + my**2 + 0.01**2) * (vx + vy + 0.03**2)))
    return float(torch.stack(found).mean())


@pytest.mark.parametrize(
    ("side", "reach", "sigma"), [(13, 5, 1.5), (11, 5, 1.5), (10, 4, 1.2), (5, 2, 0.6), (3, 1, 0.3), (1, 0, 0.1)]
)
def test_ssim_by_the_formulas_also_of_images_smaller_than_its_window(side: int, reach: int, sigma: float) -> None:
    images, targets = pictures((2, 1, side, side + 2), 0), pictures((2, 1, side, side + 2), 1)
    expected = [
        windowed_ssim(a[0].double() / 255, b[0].double() / 255, reach, sigma)
        for a, b in zip(images, targets, strict=True)
    ]
    assert ssim(images, targets).tolist() == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_ssim_is_of_each_image_and_the_mean_over_its_channels(channels: int) -> None:
    images, noise = pictures((5, channels, 16, 12), 0), pictures((5, channels, 16, 12), 1)
    blurred = (images.float() * 0.8 + noise.float() * 0.2).to(torch.uint8)
    found = ssim(images, blurred)
    assert found.shape == (5,)
    assert ssim(images, images).tolist() == pytest.approx([1] * 5, abs=1e-6)
    assert (found < 1).all()
    assert (found > ssim(images, noise)).all()
    assert ssim(images[2:3], blurred[2:3]).tolist() == pytest.approx([float(found[2])], abs=1e-6)
    apart = torch.stack([ssim(images[:, c : c + 1], blurred[:, c : c + 1]) for c in range(channels)]).mean(0)
    assert found.tolist() == pytest.approx(apart.tolist(), abs=1e-6)
    assert ssim(images.float() / 127.5 - 1, blurred).tolist() == pytest.approx(found.tolist(), abs=1e-5)


def test_ssim_is_that_of_torchmetrics() -> None:
    image_metrics = pytest.importorskip("torchmetrics.image")
    images, targets = pictures((6, 3, 32, 32), 0), pictures((6, 3, 32, 32), 1)
    theirs = image_metrics.StructuralSimilarityIndexMeasure(data_range=1.0)(images / 255, targets / 255)
    assert float(ssim(images, targets).mean()) == pytest.approx(float(theirs), abs=1e-6)


def test_ssim_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.image", None)
    with pytest.raises(InputError, match="torchmetrics") as caught:
        ssim(pictures((1, 1, 16, 16), 0), pictures((1, 1, 16, 16), 1))
    assert "vqgen[metrics]" in str(caught.value)


def test_pixel_variance_is_about_one_mean() -> None:
    images = pictures((7, 3, 5, 4), 0)
    assert pixel_variance(images) == pytest.approx(float((images.double() / 255).var(unbiased=False)), rel=1e-12)
    assert pixel_variance(torch.tensor([0, 255], dtype=torch.uint8)) == 0.25
    assert pixel_variance(torch.full((2, 1, 3, 3), 7, dtype=torch.uint8)) == pytest.approx(0, abs=1e-30)
    counted = PixelCounts()
    for batch in images.split(3):
        counted.add(batch)
    assert counted.variance == pixel_variance(images)
    assert math.isnan(PixelCounts().variance)
    with pytest.raises(InputError, match="uint8"):
        pixel_variance(torch.zeros(1, 1, 2, 2))


def test_nmse_is_one_for_the_mean_grey() -> None:
    images = pictures((50, 3, 6, 6), 3)
    grey = (images.double() / 127.5 - 1).mean().float()
    error = float(mse(grey.expand(images.shape), images).mean())
    assert nmse(error, pixel_variance(images)) == pytest.approx(1, rel=1e-5)
    assert nmse(0, 0.1) == 0
    assert nmse(0.1, 0) == math.inf
    assert math.isnan(nmse(0, 0))
