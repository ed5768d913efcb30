"""The figures of sample quality together: their order, their seed, and too few images."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from pipelines.quality import measures
from pipelines.quality.measures import MINIMUM_IMAGES, kid_subset_size, measure, shortfall
from vqgen.errors import InputError
from vqgen.feature_distances import frechet_distance, kernel_distance, precision_recall_density_coverage

KEYS = {"frechet", "kid", "kid_standard_error", "precision", "recall", "density", "coverage"}


def features(count: int, seed: int, width: int = 8) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def test_each_figure_is_that_of_its_function() -> None:
    real, fake = features(150, 0), features(130, 1) * 1.2 + 0.2
    found = measure(real, fake, seed=4)
    assert set(found) == KEYS
    kid = kernel_distance(real, fake, subsets=measures.KID_SUBSETS, subset_size=65, seed=4)
    assert (found["kid"], found["kid_standard_error"]) == (kid.value, kid.standard_error)
    assert found["frechet"] == frechet_distance(real, fake)
    assert precision_recall_density_coverage(real, fake).items() <= found.items()
    assert all(isinstance(value, float) for value in found.values())


def test_what_is_further_off_is_worse_by_every_figure() -> None:
    real = features(400, 0)
    sets = [features(400, 1) + shift for shift in (0.0, 0.5, 1.5)]
    near, off, far = (measure(real, fake, seed=0) for fake in sets)
    for key in ("frechet", "kid"):
        assert near[key] < off[key] < far[key]
    for key in ("precision", "recall", "density", "coverage"):
        assert near[key] > off[key] > far[key]
    assert off["kid"] > 4 * off["kid_standard_error"]
    assert abs(near["kid"]) < 4 * near["kid_standard_error"]


def test_it_is_a_function_of_its_seed_and_leaves_the_global_generators_alone() -> None:
    real, fake = features(120, 0), features(120, 1)
    before, numpys = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]
    first = measure(real, fake, seed=1)
    assert measure(real, fake, seed=1) == first
    assert measure(real, fake, seed=2)["kid"] != first["kid"]
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpys).all()  # type: ignore[index]


def test_too_few_images_say_how_many_are_needed() -> None:
    enough = max(MINIMUM_IMAGES.values())
    assert shortfall(enough, enough) is None
    measure(features(enough, 0), features(enough, 1), seed=0)
    assert shortfall(enough - 1, 5000) == (
        f"{enough - 1} test images are too few for the Fréchet distance and KID; at least {enough} are needed."
    )
    problem = shortfall(1000, 6)
    assert problem == (
        "6 samples are too few for the Fréchet distance, KID, precision, recall, density and coverage; at least "
        f"{enough} are needed."
    )
    with pytest.raises(InputError) as caught:
        measure(features(1000, 0), features(6, 1), seed=0)
    assert caught.value.message == problem
    assert "--samples" in caught.value.hint


@pytest.mark.parametrize(("counts", "size"), [((1000, 1000), 500), ((100, 5000), 50), ((9000, 3000), 500)])
def test_subsets_of_kid_are_at_most_half_of_a_set(counts: tuple[int, int], size: int) -> None:
    assert kid_subset_size(*counts) == size


def test_without_torchmetrics_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics.image.kid", None)
    with pytest.raises(InputError, match="needs torchmetrics") as caught:
        measure(features(100, 0), features(100, 1), seed=0)
    assert "pip install 'vqgen[metrics]'" in caught.value.hint
