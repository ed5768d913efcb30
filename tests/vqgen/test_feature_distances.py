"""Distances between sets of features: closed forms, torchmetrics, the prdc package, and slow twins."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vqgen import feature_distances
from vqgen.errors import InputError
from vqgen.feature_distances import frechet_distance, kernel_distance, precision_recall_density_coverage


def normal(count: int, width: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    drawn: Tensor = torch.randn(count, width, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    return drawn


def gaussian_with(mean: torch.Tensor, covariance: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """(count, F) samples whose own mean and covariance are exactly these."""
    draws = torch.randn(count, len(mean), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    draws -= draws.mean(dim=0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(draws.T.cov()), draws.T, upper=False).T
    shaped: torch.Tensor = white @ torch.linalg.cholesky(covariance).T + mean
    return shaped


def test_frechet_distance_of_commuting_covariances_is_the_closed_form() -> None:
    generator = torch.Generator().manual_seed(3)
    basis, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=generator))
    first, second = (torch.rand(6, dtype=torch.float64, generator=generator) + 0.1 for _ in range(2))
    shift = torch.linspace(-1, 2, 6, dtype=torch.float64)
    a = gaussian_with(torch.zeros(6, dtype=torch.float64), basis @ first.diag() @ basis.T, 50, seed=0)
    b = gaussian_with(shift, basis @ second.diag() @ basis.T, 80, seed=1)
    expected = float(shift.square().sum() + (first.sqrt() - second.sqrt()).square().sum())
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_by_the_eigenvalues_of_the_product() -> None:
    generator = torch.Generator().manual_seed(4)
    a = torch.randn(60, 5, generator=generator)
    b = torch.randn(40, 5, generator=generator) @ torch.randn(5, 5, generator=generator) + 0.3
    covariances = [features.double().T.cov() for features in (a, b)]
    shared = torch.linalg.eigvals(covariances[0] @ covariances[1]).real.sqrt().sum()
    shift = (a.double().mean(0) - b.double().mean(0)).square().sum()
    expected = shift + covariances[0].trace() + covariances[1].trace() - 2 * shared
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("count", [4, 300])
def test_frechet_distance_of_few_and_many_samples(count: int) -> None:
    generator = torch.Generator().manual_seed(5)
    a, b = torch.randn(count, 32, generator=generator), torch.randn(count + 1, 32, generator=generator)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-11)
    assert frechet_distance(a, a + 2) == pytest.approx(4 * 32, rel=1e-6)  # a shift, and nothing else
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-12)
    assert frechet_distance(a, a[torch.randperm(count, generator=generator)]) == pytest.approx(0, abs=1e-11)
    turn, _ = torch.linalg.qr(torch.randn(32, 32, generator=generator))
    assert frechet_distance(a @ turn, b @ turn) == pytest.approx(frechet_distance(a, b), rel=1e-4)


@pytest.mark.parametrize(
    ("a", "b", "said"),
    [
        (torch.zeros(5, 3), torch.zeros(5, 4), "same width"),
        (torch.zeros(1, 3), torch.zeros(5, 3), "at least two"),
        (torch.zeros(5), torch.zeros(5), "two sets"),
        (torch.full((5, 3), math.nan), torch.zeros(5, 3), "not finite"),
    ],
)
def test_frechet_distance_refuses(a: torch.Tensor, b: torch.Tensor, said: str) -> None:
    with pytest.raises(InputError, match=said):
        frechet_distance(a, b)


class Features(nn.Module):
    """Takes features for images, so that torchmetrics' own metrics can be asked about them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        return features


def torchmetrics_of(name: str, width: int, a: Tensor, b: Tensor, **options: int) -> Tensor | tuple[Tensor, Tensor]:
    """What a metric of torchmetrics says of two sets of features, in float64."""
    module = pytest.importorskip(f"torchmetrics.image.{name}")
    kind = {"fid": "FrechetInceptionDistance", "kid": "KernelInceptionDistance"}[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it keeps all features
        metric = getattr(module, kind)(feature=Features(width), **options).set_dtype(torch.float64)
        metric.update(a, real=True)
        metric.update(b, real=False)
        found: Tensor | tuple[Tensor, Tensor] = metric.compute()
    return found


@pytest.mark.parametrize(("width", "count"), [(3, 50), (32, 200), (64, 1000)])
def test_frechet_distance_is_that_of_torchmetrics(width: int, count: int) -> None:
    a = normal(count, width, 0)
    b = 0.7 * normal(count + 7, width, 1) @ normal(width, width, 2) + 0.2
    theirs = torchmetrics_of("fid", width, a, b)
    assert isinstance(theirs, Tensor)
    assert frechet_distance(a, b) == pytest.approx(float(theirs), rel=1e-6)


def test_frechet_distance_is_exact_where_there_are_fewer_images_than_features() -> None:
    # In 200 dimensions, 20 images span 19: the covariances live on few axes, chosen here so that the answer is known.
    a = torch.zeros(20, 200, dtype=torch.float64)
    b = torch.zeros(20, 200, dtype=torch.float64)
    a[:, :19] = gaussian_with(torch.zeros(19, dtype=torch.float64), torch.eye(19, dtype=torch.float64), 20, seed=0)
    b[:, 10:29] = 3 * gaussian_with(
        torch.zeros(19, dtype=torch.float64), torch.eye(19, dtype=torch.float64), 20, seed=1
    )
    expected = 10 * 1 + 9 * (3 - 1) ** 2 + 10 * 9  # axes of a alone, of both, of b alone
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)


def test_kernel_distance_of_whole_sets_is_that_of_torchmetrics() -> None:
    a, b = normal(40, 6, 0), normal(40, 6, 1) * 1.3 + 0.4
    theirs = torchmetrics_of("kid", 6, a, b, subsets=3, subset_size=40)
    found = kernel_distance(a, b, subsets=3, subset_size=40, seed=0)
    assert found.value == pytest.approx(float(theirs[0]), rel=1e-10)
    assert found.standard_error is None


def test_kernel_distance_of_subsets_agrees_with_torchmetrics_within_their_spread() -> None:
    a, b = normal(400, 8, 0), normal(300, 8, 1) + 0.3
    with torch.random.fork_rng():
        torch.manual_seed(0)
        mean, spread = torchmetrics_of("kid", 8, a, b, subsets=200, subset_size=100)
    found = kernel_distance(a, b, subsets=200, subset_size=100, seed=0)
    assert found.value == pytest.approx(float(mean), abs=4 * float(spread) / math.sqrt(200))
    assert found.standard_error == pytest.approx(float(spread) * math.sqrt(100 / 200), rel=0.2)


def test_kernel_distance_by_the_definition() -> None:
    a, b = normal(7, 3, 0), normal(7, 3, 1)

    def kernel(x: Tensor, y: Tensor) -> float:
        return float((x @ y / 3 + 1) ** 3)

    own = sum(kernel(s[i], s[j]) for s in (a, b) for i in range(7) for j in range(7) if i != j) / (7 * 6)
    across = sum(kernel(x, y) for x in a for y in b) / 49
    assert kernel_distance(a, b, subsets=1, subset_size=7, seed=0).value == pytest.approx(own - 2 * across, rel=1e-10)


def test_kernel_distance_has_no_bias_and_its_error_is_one() -> None:
    # 60 repeats of the whole experiment: what the estimates scatter by is what each says it scatters by.
    shift = 0.5
    values, errors = [], []
    for seed in range(60):
        found = kernel_distance(
            normal(200, 4, 2 * seed), normal(200, 4, 2 * seed + 1) + shift, subsets=60, subset_size=100, seed=seed
        )
        assert found.standard_error is not None
        values.append(found.value)
        errors.append(found.standard_error)
    # E (x y / F + 1)^3 = 1 + 3 m^2 + 3 E(s^2) + E(s^3) for s = x y / F of independent x, y; here by sums over axes.
    expected = population_kernel_distance(4, shift)
    scatter = float(np.std(values))
    assert np.mean(values) == pytest.approx(expected, abs=3 * scatter / math.sqrt(60))
    assert np.mean(errors) == pytest.approx(scatter, rel=0.35)
    # Sets that are alike: about 0, on either side.
    alike = [kernel_distance(normal(100, 4, s), normal(100, 4, s + 500), subsets=20, subset_size=50, seed=0).value
             for s in range(40)]  # fmt: skip
    assert np.mean(alike) == pytest.approx(0, abs=3 * float(np.std(alike)) / math.sqrt(40))
    assert min(alike) < 0


def population_kernel_distance(width: int, shift: float) -> float:
    """MMD^2 of N(0, I) and N(shift, I) under (x y / F + 1)^3, by the moments of the sum of products s = x y / F."""

    def expected_kernel(mean_x: float, mean_y: float) -> float:
        # s is a mean of F independent products p = x y, x ~ N(mean_x, 1), y ~ N(mean_y, 1).
        first = mean_x * mean_y
        second = (1 + mean_x**2) * (1 + mean_y**2)
        third = (mean_x**3 + 3 * mean_x) * (mean_y**3 + 3 * mean_y)
        variance, skew = second - first**2, third - 3 * first * second + 2 * first**3
        s1 = first
        s2 = s1**2 + variance / width
        s3 = s1**3 + 3 * s1 * variance / width + skew / width**2
        return 1 + 3 * s1 + 3 * s2 + s3

    return expected_kernel(0, 0) + expected_kernel(shift, shift) - 2 * expected_kernel(0, shift)


def test_kernel_distance_is_a_function_of_its_seed_and_leaves_the_global_generators_alone() -> None:
    a, b = normal(60, 5, 0), normal(70, 5, 1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]
    first = kernel_distance(a, b, subsets=5, subset_size=20, seed=3)
    torch.manual_seed(99)
    assert kernel_distance(a, b, subsets=5, subset_size=20, seed=3) == first
    assert kernel_distance(a, b, subsets=5, subset_size=20, seed=4) != first
    torch.set_rng_state(before[0])
    kernel_distance(a, b, subsets=5, subset_size=20, seed=5)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()  # type: ignore[index]


def test_kernel_distance_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics.image.kid", None)
    with pytest.raises(InputError, match="needs torchmetrics, which is not installed") as caught:
        kernel_distance(normal(9, 2, 0), normal(9, 2, 1), subsets=2, subset_size=3, seed=0)
    assert "pip install 'vqgen[metrics]'" in caught.value.hint


@pytest.mark.parametrize(
    ("subsets", "size", "said"),
    [(0, 5, "at least one subset"), (3, 1, "at least two images"), (3, 10, "at least 10 features")],
)
def test_kernel_distance_refuses(subsets: int, size: int, said: str) -> None:
    with pytest.raises(InputError, match=said):
        kernel_distance(normal(9, 2, 0), normal(12, 2, 1), subsets=subsets, subset_size=size, seed=0)


def prdc(real: Tensor, fake: Tensor, neighbours: int, capsys: pytest.CaptureFixture[str]) -> dict[str, float]:
    package = pytest.importorskip("prdc")
    found = package.compute_prdc(real.numpy(), fake.numpy(), neighbours)
    capsys.readouterr()  # it prints
    return {key: float(value) for key, value in found.items()}


@pytest.mark.parametrize("neighbours", [1, 3, 5])
@pytest.mark.parametrize(
    ("real", "fake"),
    [
        (normal(90, 4, 0), normal(70, 4, 1)),
        (normal(60, 16, 0), normal(110, 16, 1) * 0.5 + 0.3),
        (normal(50, 3, 0), normal(50, 3, 1) + 50),  # nothing of one lies in the other
        (normal(64, 8, 0, torch.float32), normal(64, 8, 0, torch.float32)),  # each fake is a real image
        (normal(40, 2, 0), normal(40, 2, 1)[[0] * 40]),  # the fakes are one image
    ],
)
def test_precision_recall_density_and_coverage_are_those_of_the_package(
    real: Tensor, fake: Tensor, neighbours: int, capsys: pytest.CaptureFixture[str]
) -> None:
    # The package finds distances by a matrix product: it needs double precision, and says 1e-7 of equal images.
    theirs = prdc(real.double(), fake.double(), neighbours, capsys)
    assert precision_recall_density_coverage(real, fake, neighbours) == pytest.approx(theirs, abs=1e-12)


@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_chunks_change_nothing(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real, fake = normal(50, 4, 0), normal(43, 4, 1)
    whole = precision_recall_density_coverage(real, fake)
    monkeypatch.setattr(feature_distances, "ROWS", rows)
    assert precision_recall_density_coverage(real, fake) == whole


def test_what_each_of_the_four_figures_sees() -> None:
    real = normal(400, 2, 0)
    alike = precision_recall_density_coverage(real, normal(400, 2, 1))
    assert min(alike.values()) > 0.85
    collapsed = precision_recall_density_coverage(real, 0.05 * normal(400, 2, 2))  # all of them typical, and all alike
    assert collapsed["precision"] == 1
    assert collapsed["recall"] < 0.1
    assert collapsed["coverage"] < 0.1
    spread = precision_recall_density_coverage(real, 5 * normal(400, 2, 3))  # everything, and much that is not real
    assert spread["precision"] < 0.4
    assert spread["recall"] > 0.95
    # One real outlier gives precision to every fake near it, and density to none: what Naeem et al. mend.
    outliers = torch.cat([real, torch.tensor([[50.0, 0.0]], dtype=torch.float64)])
    far = precision_recall_density_coverage(outliers, 0.5 * normal(400, 2, 4) + torch.tensor([40.0, 0.0]))
    assert far["precision"] > 0.95
    assert far["density"] < 0.25


def test_a_ball_of_no_radius_holds_nothing() -> None:
    same = torch.ones(20, 3)
    assert set(precision_recall_density_coverage(same, same).values()) == {0.0}


@pytest.mark.parametrize(
    ("measure", "said"),
    [
        (lambda a, b: precision_recall_density_coverage(a, b), "at least 6 features"),
        (lambda a, b: precision_recall_density_coverage(a, b, 0), "at least one neighbour"),
        (lambda a, b: precision_recall_density_coverage(a.repeat(2, 1), math.nan * b.repeat(2, 1)), "not finite"),
        (lambda a, b: kernel_distance(a, math.inf * b, subsets=1, subset_size=2, seed=0), "not finite"),
    ],
)
def test_what_cannot_be_measured_is_refused(measure: Callable[[Tensor, Tensor], object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        measure(normal(5, 2, 0), normal(5, 2, 1))
