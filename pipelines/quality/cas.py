"""Classification accuracy score: how well does a classifier read real images that learned from samples alone?

A classifier is trained on samples and the labels they were drawn for, and tested on real images (Ravuri & Vinyals
2019, arXiv 1905.10887; VQ-VAE-2, sec. 5.3). It is low where samples do not show their label, and also where they show
too few of the ways that label can look, which no judgement of single samples finds. The network is that of
`vqgen.classifier`, as everywhere in a run; the recipe is the same for every set of samples.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import Dataset

from pipelines.classify import BATCH, ClassifierTask
from vqgen.checkpoint import preserved_random_state, seed_random_state
from vqgen.classifier import READ_AT_ONCE, ClassifierConfig, ClassifierSpec, ImageClassifier
from vqgen.config import TrainingSettings
from vqgen.console import Console
from vqgen.errors import InputError, Interrupted
from vqgen.sampler import Batch
from vqgen.training import fit

MINIMUM_IMAGES = 100
"""Labelled images below which no classifier is trained."""
STEPS, EPOCHS = 1500, 10
"""The budget: so many steps, and of few images no more than so many passes: in more, 1,000 are learned by heart."""


@dataclass(frozen=True)
class CasResult:
    """What `classification_accuracy_score` found."""

    accuracy: float
    """Share of the test images that are read as their label."""
    standard_error: float
    """Of the accuracy, for so many test images (binomial); another training of the classifier is not in it."""
    images: int
    """Images that the classifier learned from."""
    steps: int
    seconds: float
    """Of the training."""


class LabelledImages(Dataset[Batch]):
    """Images (N, C, H, W) uint8 and labels (N,) int64 in memory, as the training loop reads them."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        return {"images": self.images[indices], "label": self.labels[indices]}


class _Watched(ClassifierTask):
    """Keeps the last weights, and says when a step is done: the loop's own lines would be too many.

    Choosing the weights on a tenth of 1,000 samples kept early ones by chance, which read test images worse.
    """

    settled = 1.0

    def __init__(self, model: ImageClassifier, done: Callable[[], None]) -> None:
        super().__init__(model)
        self._done = done

    def after_step(self, player: str, step: int) -> dict[str, Tensor]:
        self._done()
        return {}


def classification_accuracy_score(
    images: Tensor,
    labels: Tensor,
    test_images: Tensor,
    test_labels: Tensor,
    spec: ClassifierSpec,
    *,
    seed: int,
    console: Console,
    title: str,
) -> CasResult:
    """Train a new classifier on ``images`` (N, C, H, W) uint8 with ``labels`` (N,) int64 alone; test it on real images.

    Nothing of the test images reaches the training, and no choice is made: the last weights are tested. ``title`` names
    the images on the progress line. The global random generators are put back.

    Raises:
        InputError: too few images, or labels that do not fit the images or the classes.
        Interrupted: SIGINT or SIGTERM; nothing is kept.
    """
    _check(images, labels, spec, "images")
    _check(test_images, test_labels, spec, "test images")
    if len(images) < MINIMUM_IMAGES:
        raise InputError(
            f"{len(images):,} samples are too few for the classification accuracy score; "
            f"at least {MINIMUM_IMAGES:,} are needed.",
            "Draw more with --samples, or leave it out with --no-cas.",
        )
    if not len(test_images):
        raise InputError("The classification accuracy score needs test images, and there are none.")
    with preserved_random_state():
        seed_random_state(seed, 0)
        model = ImageClassifier(ClassifierConfig(), spec)
    train = LabelledImages(images, labels)
    settings = training_settings(len(train))
    assert settings.steps is not None
    with (
        tempfile.TemporaryDirectory(prefix="vqgen-") as folder,
        console.progress(f"CAS: {title}", settings.steps, "steps") as progress,
    ):
        try:
            result = fit(
                _Watched(model, progress.advance),
                train,
                train,  # read once, at the end, and for nothing: the loop wants some images to evaluate on
                settings,
                Path(folder),
                seed=seed,
                identity={},
                accelerator=Accelerator(),
                console=Console(silent=True),
                description="CAS",
            )
        except Interrupted as error:
            raise Interrupted(
                f"The training of a classifier on {title} was stopped.", "Give the command again."
            ) from error
    right = 0
    for start in range(0, len(test_images), READ_AT_ONCE):
        read = model.probabilities(test_images[start : start + READ_AT_ONCE]).argmax(dim=1)
        right += int((read == test_labels[start : start + READ_AT_ONCE]).sum())
    accuracy = right / len(test_images)
    standard_error = math.sqrt(accuracy * (1 - accuracy) / len(test_images))
    return CasResult(accuracy, standard_error, len(images), result.steps, result.seconds)


def training_settings(images: int) -> TrainingSettings:
    """The fixed recipe for so many images: some 10 s of one core for 1,000 pictures of 32x32."""
    steps = min(STEPS, EPOCHS * max(images // BATCH, 1))
    return TrainingSettings(
        steps=steps,
        batch_size=BATCH,
        learning_rate=2e-3,
        weight_decay=0.02,
        schedule="cosine",
        warmup=0.05,
        clip=1.0,
        evaluate_every=steps,
        evaluate_images=BATCH,
        checkpoint_every=steps,
        log_every=steps,
        preview_every=steps,
        keep=1,
    )


def _check(images: Tensor, labels: Tensor, spec: ClassifierSpec, what: str) -> None:
    if images.ndim != 4 or images.dtype != torch.uint8 or labels.shape != images.shape[:1]:
        raise InputError(
            f"Expected {what} as uint8 (N, C, H, W) with one label each, got {images.dtype} {list(images.shape)} and "
            f"{list(labels.shape)} labels."
        )
    classes = len(spec.class_names)
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise InputError(f"Labels of {what} must be in [0, {classes}), got {int(labels.min())} to {int(labels.max())}.")
