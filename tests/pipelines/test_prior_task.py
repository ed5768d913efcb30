"""A prior as the training loop sees it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from pipelines.train_prior import PriorTask
from priors.base import Density, Prior, PriorSpec
from priors.pixelcnn import PixelCNN
from priors.sampling import Noise
from vqgen.codes import LevelSpec


def preview(prior: Prior) -> Image.Image:
    raise AssertionError


class Late(PixelCNN):
    """A prior whose training settles after three quarters."""

    @property
    def settled(self) -> float:
        return 0.75


def test_a_prior_says_when_its_training_has_settled() -> None:
    spec = PriorSpec(LevelSpec("top", 2, 2, 4, 2))
    settled = [PriorTask(kind({"width": 8, "blocks": 1}, spec), 0, 0, preview).settled for kind in (PixelCNN, Late)]
    assert settled == [0.0, 0.75]


class Noted(PixelCNN):
    """A prior that notes which images its noise is of."""

    def log_prob(self, codes: Tensor, *given: Any, noise: Noise | None = None, **more: Any) -> Density:
        assert noise is not None
        self.noted = [*getattr(self, "noted", []), *zip(noise.indices, codes[:, 0, 0].tolist(), strict=True)]
        return super().log_prob(codes, *given, noise=noise, **more)


def test_the_noise_of_an_evaluation_is_of_the_image_whatever_the_batches_and_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Image i has code i. Of n processes, r evaluates the images r, r + n, ..."""
    spec = PriorSpec(LevelSpec("top", 2, 2, 16, 2))

    def evaluated(size: int, rank: int = 0, processes: int = 1) -> set[tuple[int, int]]:
        monkeypatch.setattr("pipelines.train_prior.place", lambda: (rank, processes))
        task = PriorTask(Noted({"width": 8, "blocks": 1}, spec), 0, 0, preview)
        own = torch.arange(16)[rank::processes].view(-1, 1, 1).expand(-1, 2, 2)
        task.evaluate([{"codes": (part,)} for part in own.split(size)], lambda sums: sums)
        return set(task.model.noted)  # type: ignore[arg-type]

    assert evaluated(5) == evaluated(3) == {(image, image) for image in range(16)}
    assert evaluated(3, 0, 2) | evaluated(3, 1, 2) == evaluated(16)
