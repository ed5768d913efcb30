from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vqgen.errors import DivergedError, InputError
from vqgen.losses import (
    SCALES,
    discretized_gaussian_log_probs,
    discretized_gaussian_nats,
    fit_scale,
    reconstruction_error,
)


def gaussian_mass(low: float, high: float, mean: float, scale: float) -> float:
    """Trapezoid integral of the Gaussian density, cut off where it is 0."""
    low, high = max(low, mean - 12 * scale), min(high, mean + 12 * scale)
    x = torch.linspace(low, high, 200_001, dtype=torch.float64)
    density = torch.exp(-((x - mean) ** 2) / (2 * scale**2)) / (scale * math.sqrt(2 * math.pi))
    return float(torch.trapezoid(density, x))


@pytest.mark.parametrize("scale", [1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0])
def test_the_256_probabilities_sum_to_one(scale: float) -> None:
    mean = torch.tensor([-3.0, -1.1, -1.0, -0.999, -0.5, 0.0, 1 / 255, 0.3, 1.0, 1.02, 4.0]).view(1, 1, 1, -1)
    log_probs = discretized_gaussian_log_probs(mean, torch.tensor([scale]))
    assert log_probs.shape == (1, 1, 1, 11, 256)
    assert log_probs.dtype == torch.float64
    assert torch.isfinite(log_probs).all()  # the plain difference of distribution functions gives log 0 here
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(1, 1, 1, 11, dtype=torch.float64))


def test_nats_are_those_of_the_256_probabilities() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4, 3, 5, 6), dtype=torch.uint8, generator=generator)
    images[:, :, 0, :2] = torch.tensor([0, 255], dtype=torch.uint8)
    mean = torch.randn(4, 3, 5, 6, generator=generator)
    scale = torch.tensor([0.03, 0.2, 1.5])
    nats = discretized_gaussian_nats(images, mean, scale)
    picked = discretized_gaussian_log_probs(mean, scale).gather(-1, images.long()[..., None])
    assert nats.shape == (4,)
    assert nats.dtype == torch.float64
    torch.testing.assert_close(nats, -picked.flatten(1).sum(1))


@pytest.mark.parametrize("scale", [0.005, 0.1, 2.0])
@pytest.mark.parametrize("value", [0, 1, 100, 254, 255])
def test_nats_equal_an_integral_of_the_density(value: int, scale: float) -> None:
    centre = value / 127.5 - 1
    mean = centre + 0.7 * min(scale, 0.05)
    low = -100.0 if value == 0 else centre - 1 / 255
    high = 100.0 if value == 255 else centre + 1 / 255
    image = torch.full((1, 1, 1, 1), value, dtype=torch.uint8)
    means = torch.full((1, 1, 1, 1), mean, dtype=torch.float64)
    nats = discretized_gaussian_nats(image, means, torch.tensor([scale], dtype=torch.float64))
    assert math.exp(-float(nats)) == pytest.approx(gaussian_mass(low, high, mean, scale), rel=1e-7)


def test_a_tiny_scale_far_away_is_finite_and_right() -> None:
    # 200 standard deviations from the bin: about -z^2 / 2, far below the least double.
    image = torch.full((1, 1, 1, 1), 128, dtype=torch.uint8)
    edge = 128 / 127.5 - 1 + 1 / 255
    scale = torch.tensor([1e-3], dtype=torch.float64)
    for side in (edge + 0.2, edge - 2 / 255 - 0.2):
        nats = float(discretized_gaussian_nats(image, torch.full((1, 1, 1, 1), side, dtype=torch.float64), scale))
        z = 200.0
        assert nats == pytest.approx(z * z / 2 + math.log(z * math.sqrt(2 * math.pi)), rel=1e-4)


def test_nats_need_a_fitted_scale() -> None:
    image = torch.zeros(1, 1, 2, 2, dtype=torch.uint8)
    for scale in (math.nan, 0.0, -1.0, math.inf):
        with pytest.raises(InputError, match="must be positive"):
            discretized_gaussian_nats(image, torch.zeros(1, 1, 2, 2), torch.tensor([scale]))


def drawn(mean: Tensor, scale: Tensor, generator: torch.Generator) -> Tensor:
    """uint8 images drawn from the discretised Gaussian: rounding and clamping a Gaussian is just that."""
    noise = torch.randn(mean.shape, generator=generator, dtype=torch.float64)
    return ((mean + noise * scale.view(-1, 1, 1) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def test_fit_scale_recovers_the_scale_that_images_were_drawn_with() -> None:
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([0.004, 0.06, 0.7], dtype=torch.float64)
    mean = torch.rand(40, 3, 32, 32, generator=generator, dtype=torch.float64) * 2 - 1
    images = drawn(mean, scale, generator)
    fitted = fit_scale(zip(images.split(16), mean.split(16), strict=True), channels=3)
    assert fitted.shape == (3,)
    assert fitted.dtype == torch.float64
    # 41,000 values give the scale to 0.35 % (one standard error), or somewhat less where rounding or clamping bite:
    # 2.5 % is above five of them.
    torch.testing.assert_close(fitted, scale, rtol=0.025, atol=0)
    # The root mean square is no stand-in: clamping shortens it by far.
    rms = ((images.double() / 127.5 - 1) - mean).square().mean((0, 2, 3)).sqrt()
    assert rms[2] < 0.85 * scale[2]


def test_fit_scale_is_the_best_scale_for_the_exact_likelihood() -> None:
    generator = torch.Generator().manual_seed(1)
    mean = torch.rand(8, 1, 16, 16, generator=generator) * 2.2 - 1.1
    images = drawn(mean.double(), torch.tensor([0.02]), generator)
    images[0] = 255 - images[0]  # an image missed altogether, as a heavy tail
    fitted = fit_scale([(images, mean)], channels=1)
    best = discretized_gaussian_nats(images, mean, fitted).sum()
    for factor in (0.2, 0.9, 0.99, 0.999, 1.001, 1.01, 1.1, 5):
        assert discretized_gaussian_nats(images, mean, fitted * factor).sum() > best


def test_fit_scale_does_not_depend_on_the_batches() -> None:
    generator = torch.Generator().manual_seed(2)
    mean = torch.rand(12, 2, 8, 8, generator=generator) * 2 - 1
    images = drawn(mean.double(), torch.tensor([0.1, 0.2]), generator)
    whole = fit_scale([(images, mean)], channels=2)
    assert torch.equal(whole, fit_scale(zip(images.split(5), mean.split(5), strict=True), channels=2))


def test_fit_scale_of_perfect_and_of_hopeless_reconstructions() -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    perfect = float(fit_scale([(images, images / 127.5 - 1)], channels=1))
    assert SCALES[0] <= perfect < 1e-3
    assert torch.isfinite(discretized_gaussian_nats(images, images / 127.5 - 1, torch.tensor([perfect]))).all()
    hopeless = float(fit_scale([(images, torch.full(images.shape, 1e9))], channels=1))
    assert 1 < hopeless <= SCALES[1]


def test_fit_scale_refuses_nothing_and_nan() -> None:
    with pytest.raises(InputError, match="no images"):
        fit_scale([], channels=3)
    with pytest.raises(DivergedError, match="finite"):
        fit_scale([(torch.zeros(1, 1, 2, 2, dtype=torch.uint8), torch.full((1, 1, 2, 2), math.nan))], channels=1)


def test_reconstruction_error_is_a_mean_over_all_elements_of_an_image() -> None:
    images, targets = torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 4, 5)
    images[0] = 0.5
    images[1, 0] = 3
    assert reconstruction_error(images, targets, "mse").tolist() == pytest.approx([0.25, 3])
    assert reconstruction_error(images, targets, "l1").tolist() == pytest.approx([0.5, 1])
    assert reconstruction_error(images.bfloat16(), targets, "mse").dtype == torch.float32
