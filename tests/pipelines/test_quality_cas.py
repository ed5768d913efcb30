"""The classification accuracy score: high for samples that show their labels, at chance where labels mean nothing."""

from __future__ import annotations

import math
import os
import signal
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipelines.classify import ClassifierTask
from pipelines.quality import cas
from pipelines.quality.cas import CasResult, classification_accuracy_score, training_settings
from vqgen.classifier import ClassifierSpec
from vqgen.codes import ImageSpec
from vqgen.console import Console
from vqgen.errors import InputError, Interrupted

CONSOLE = Console(quiet=True)
SPEC = ClassifierSpec(ImageSpec(1, 10, 12), ("a", "b", "c", "d"), "0" * 64)


def quadrants(count: int, seed: int, classes: int = 4) -> tuple[Tensor, Tensor]:
    """Noise of 10x12 pixels in which one quadrant, the label, is brighter than the rest."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, count)
    pixels = generator.integers(0, 150, (count, 1, 10, 12), dtype=np.uint8)
    for image, label in zip(pixels[:, 0], labels, strict=True):
        image[5 * (label // 2) :][:5, 6 * (label % 2) :][:, :6] += 100
    return torch.from_numpy(pixels), torch.from_numpy(labels)


TEST = quadrants(300, 100)


def score(images: Tensor, labels: Tensor, *, seed: int = 0, console: Console = CONSOLE) -> CasResult:
    return classification_accuracy_score(images, labels, *TEST, SPEC, seed=seed, console=console, title="samples")


def test_real_images_score_high_and_shuffled_labels_are_at_chance() -> None:
    images, labels = quadrants(400, 0)
    real = score(images, labels)
    assert real.accuracy > 0.95
    assert real.standard_error == pytest.approx(math.sqrt(real.accuracy * (1 - real.accuracy) / 300))
    assert (real.images, real.steps) == (400, 10 * (400 // 64))
    assert real.seconds > 0
    shuffled = score(images, labels[torch.randperm(400, generator=torch.Generator().manual_seed(0))])
    assert abs(shuffled.accuracy - 0.25) < 0.12


def test_samples_that_miss_a_class_lose_its_share() -> None:
    missing = score(*quadrants(400, 1, classes=3))
    share = float((TEST[1] == 3).float().mean())
    assert missing.accuracy == pytest.approx(1 - share, abs=0.05)


def test_it_is_a_function_of_its_seed_and_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cas, "EPOCHS", 2)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    images, labels = quadrants(200, 2)
    torch.manual_seed(1)
    before, numpys = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]
    first = score(images, labels, seed=3, console=Console())
    torch.manual_seed(1)
    torch.rand(5)
    second = score(images, labels, seed=3)
    assert (first.accuracy, first.steps) == (second.accuracy, second.steps)
    assert score(images, labels, seed=4).steps == first.steps
    torch.set_rng_state(before)
    score(images, labels, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpys).all()  # type: ignore[index]
    assert list(tmp_path.iterdir()) == []
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "loss" not in captured.err  # no lines of the training loop


def test_no_test_image_is_in_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = quadrants(200, 5)
    seen: list[int] = []
    forward = ClassifierTask.forward

    def watched(
        task: ClassifierTask, batch: Mapping[str, Any], player: str, progress: float, step: int
    ) -> dict[str, Tensor]:
        seen.extend(hash(image.numpy().tobytes()) for image in batch["images"])
        return forward(task, batch, player, progress, step)

    monkeypatch.setattr(ClassifierTask, "forward", watched)
    score(images, labels)
    assert set(seen) == {hash(image.numpy().tobytes()) for image in images}  # all of them, and nothing else


def test_the_recipe_is_shorter_where_there_are_few_images() -> None:
    assert [training_settings(images).steps for images in (90, 640, 100_000)] == [10, 100, cas.STEPS]


def test_an_interrupted_training_says_what_was_stopped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def interrupted(*arguments: object) -> dict[str, Tensor]:
        os.kill(os.getpid(), signal.SIGINT)
        return {}

    monkeypatch.setattr(ClassifierTask, "after_step", interrupted)
    monkeypatch.setattr(cas._Watched, "after_step", interrupted)
    with pytest.raises(Interrupted, match="training of a classifier on samples was stopped"):
        score(*quadrants(200, 0))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("images", "labels", "said"),
    [
        (*quadrants(99, 0), "99 samples are too few for the classification accuracy score; at least 100"),
        (quadrants(120, 0)[0].float(), quadrants(120, 0)[1], "uint8"),
        (quadrants(120, 0)[0], quadrants(121, 0)[1], "one label each"),
        (quadrants(120, 0)[0], quadrants(120, 0)[1] + 1, r"must be in \[0, 4\), got 1 to 4"),
    ],
)
def test_what_cannot_be_scored_is_refused(images: Tensor, labels: Tensor, said: str) -> None:
    with pytest.raises(InputError, match=said):
        score(images, labels)


def test_test_images_are_needed() -> None:
    images, labels = quadrants(120, 0)
    with pytest.raises(InputError, match="needs test images"):
        classification_accuracy_score(
            images, labels, TEST[0][:0], TEST[1][:0], SPEC, seed=0, console=CONSOLE, title="samples"
        )
