"""Sample quality in a comparison: every row's samples against held-out images, and the anchors that give the scale.

The figures themselves are `pipelines.quality`; here is what they are measured on. The reference is test images. Each
row's samples stand against the same ones, and so do three anchors: training images (what a perfect model would score,
as they come from the same distribution), their reconstructions (what the codec leaves of that), and the same training
images with shuffled labels, for the classification accuracy score alone. The row ``neighbour`` goes one step further
down the same ladder: it is measured on the codes of these very training images, each replaced by its nearest other.
(Made of the test images, it would be held against its own originals.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.code_sources import decoded, neighbour_codes
from pipelines.comparison_rows import empty_row
from pipelines.likelihood import HeldOut, has_torchmetrics
from pipelines.quality.cas import MINIMUM_IMAGES as CAS_MINIMUM
from pipelines.quality.cas import classification_accuracy_score
from pipelines.quality.extractors import Extractor
from pipelines.quality.measures import KID_SUBSETS, kid_subset_size, measure, shortfall
from pipelines.sample import Samples
from vqgen.classifier import ClassifierSpec
from vqgen.code_store import CodeStore
from vqgen.codec import HierarchicalVQVAE
from vqgen.codes import Codes
from vqgen.console import Console
from vqgen.errors import InputError
from vqgen.feature_distances import NEIGHBOURS
from vqgen.image_split import spread
from vqgen.run_folder import RunFolder

SAMPLES = 1000
"""Images drawn from each row where nothing else is said."""
SHOWN = 64
"""Images of each row that are there to be looked at, and all that are drawn where quality is not measured."""
MOST_CAS_TEST = 5000
"""Test images that the classifiers of the classification accuracy score are tested on, at most."""

TRAINING, RECONSTRUCTIONS, SHUFFLED = "training images", "reconstructions", "shuffled labels"
"""The anchors, in their order."""


@dataclass(frozen=True)
class QualityRequest:
    """What is to be measured of samples, as it was asked for."""

    samples: int | None = None
    """Images drawn from each row that covers every level; None: `SAMPLES`, or `SHOWN` where nothing is measured. Where
    that is so because there are too few images, no more than `SHOWN` are drawn."""
    extractor: str | None = None
    """None: the one that fits the run, and no figures, with a notice, where they cannot be had."""
    cas: bool | None = None
    """Whether the classification accuracy score is measured; None: where the run has labels."""
    measured: bool = True
    """Whether anything is measured of the samples at all."""


@dataclass(frozen=True)
class QualityPlan:
    """What will be measured of samples, and on how many images."""

    samples: int
    test_images: int
    """Held against the samples; as many as these where there are so many."""
    training_images: int
    """Of the anchors; as many as samples where there are so many."""
    features: bool
    """Whether the figures that rest on an extractor's features are measured."""
    cas: bool
    notices: tuple[str, ...] = ()
    """What is left out, and why, a sentence each."""

    @property
    def measured(self) -> bool:
        return self.features or self.cas


@dataclass(frozen=True)
class Reference:
    """What samples are held against."""

    plan: QualityPlan
    extractor: Extractor | None
    features: Tensor | None
    """(N, F) float32 of the test images."""
    test_images: Tensor
    """(T, C, H, W) uint8, for the classification accuracy score; none where it is not measured."""
    test_labels: Tensor
    """(T,) int64."""
    training: Tensor
    """(M, C, H, W) uint8 training images, evenly spread over the split, not mirrored."""
    training_codes: Codes
    training_labels: Tensor | None
    """(M,) int64."""
    spec: ClassifierSpec
    seed: int


def plan_quality(request: QualityRequest, run: RunFolder, store: CodeStore, images: int | None) -> QualityPlan:
    """What of ``request`` can be measured; ``images`` as in `pipelines.compare.compare`. Nothing is read or made.

    Raises:
        InputError: what was asked for by name cannot be measured, and what it needs.
    """
    if not request.measured:
        if request.extractor or request.cas:
            other = "--extractor" if request.extractor else "--cas"
            raise InputError(f"--no-quality and {other} do not go together.", "Leave one of them out.")
        return QualityPlan(request.samples or SHOWN, 0, 0, features=False, cas=False)
    if request.cas and not store.labelled:
        raise InputError(
            f"--cas: the images of {run.path} have no labels, and the score is the accuracy of a classifier that "
            "learned them from samples.",
            "Compare without --cas.",
        )
    samples = request.samples or SAMPLES
    test = min(samples, images or samples, store.info.splits["test"])
    training = min(samples, store.info.splits["train"])
    notices = []
    lacking, hint = shortfall(test, min(samples, training)), "Give more with -n and --samples."
    if shortfall(store.info.splits["test"], SAMPLES):
        hint = f"The run's test split has only {store.info.splits['test']:,} images."
    if not has_torchmetrics():
        lacking = "Sample quality needs torchmetrics, which is not installed."
        hint = "Install it with: pip install 'vqgen[metrics]'"
    if lacking and request.extractor:
        raise InputError(lacking, hint)
    if lacking:
        measured = "Of the samples' quality only CAS is measured." if request.cas else "Sample quality is not measured."
        notices.append(f"{measured} {lacking} {hint}")
    cas = store.labelled and not lacking if request.cas is None else request.cas
    if cas and training < CAS_MINIMUM:
        raise InputError(
            f"{training:,} images are too few for the classification accuracy score; at least {CAS_MINIMUM:,} are "
            "needed.",
            "Draw more with --samples, or compare without --cas.",
        )
    if lacking and not cas:
        samples = min(samples, SHOWN)  # nothing would come of the others
    return QualityPlan(samples, test, training, features=not lacking, cas=cas, notices=tuple(notices))


def labels_in_turn(store: CodeStore, count: int) -> tuple[int, ...]:
    """Classes of ``count`` samples: the first `SHOWN` in turn, as they are shown; the others as in the training split.

    Samples of a class that is rare among the images are as rare among the samples, so that a set of samples is not
    far from the images for its shares of classes alone. None where unlabelled.
    """
    classes = len(store.info.class_names)
    if not classes:
        return ()
    turns = [place % classes for place in range(min(count, SHOWN))]
    labels = store.split("train").labels()
    assert labels is not None
    shares = np.bincount(labels, minlength=classes) / len(labels)
    wanted = np.maximum(shares * count - np.bincount(turns, minlength=classes), 0)
    left = count - len(turns)
    if left:
        wanted *= left / wanted.sum()
    own = np.floor(wanted).astype(np.int64)
    own[np.argsort(own - wanted, kind="stable")[: left - own.sum()]] += 1  # the largest remainders
    return (*turns, *np.repeat(np.arange(classes), own).tolist())


def read_reference(
    plan: QualityPlan,
    extractor: Extractor | None,
    store: CodeStore,
    held_out: HeldOut,
    seed: int,
) -> Reference:
    """Test and training images of ``plan``, and the features of the test images."""
    measured = np.asarray(held_out.indices)
    test = held_out.data.splits["test"]
    features = None
    if extractor is not None:
        features = extractor.features(test.__getitems__(spread(measured, plan.test_images))["images"])
    cas_test = test.__getitems__(spread(measured, MOST_CAS_TEST if plan.cas else 0))
    train = held_out.data.splits["train"]
    train.set_epoch(None)  # as they were encoded
    chosen = spread(np.arange(len(train)), plan.training_images)
    batch = train.__getitems__(chosen)
    info = store.info
    return Reference(
        plan=plan,
        extractor=extractor,
        features=features,
        test_images=cas_test["images"],
        test_labels=cas_test.get("label", torch.zeros(0, dtype=torch.int64)),
        training=batch["images"],
        training_codes=store.split("train").__getitems__(chosen)["codes"],
        training_labels=batch.get("label"),
        spec=ClassifierSpec(info.image, info.class_names, info.data_fingerprint),
        seed=seed,
    )


def measure_quality(
    reference: Reference, codec: HierarchicalVQVAE, drawn: Mapping[str, Samples], console: Console
) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]], int | None]:
    """Quality of each row of ``drawn`` and of the sources that are no priors, and the anchors' rows.

    ``random`` has the figures of ``uniform``, whose samples are the same images.

    Returns:
        Columns by row name; the rows of the anchors; and the steps that each classifier of the classification
        accuracy score was trained for, None without one.
    """
    codes, labels = reference.training_codes, reference.training_labels
    sets: dict[str, tuple[Tensor, Tensor | None]] = {
        **{name: (samples.images, samples.labels) for name, samples in drawn.items()},
        "neighbour": (decoded(codec, neighbour_codes(codec, codes)), labels),
        TRAINING: (reference.training, labels),
        RECONSTRUCTIONS: (decoded(codec, codes), labels),
    }
    found: dict[str, dict[str, Any]] = {}
    steps = None
    with console.progress("sample quality", len(sets) + reference.plan.cas, "sets") as progress:
        for name, (images, own) in sets.items():
            found[name] = {"samples": len(images), **_distances(images, reference)}
            score, steps = _score(images, own, reference, console, name)
            found[name] |= score
            progress.advance()
        if reference.plan.cas and labels is not None:
            score, steps = _score(reference.training, _shuffled(labels, reference.seed), reference, console, SHUFFLED)
            found[SHUFFLED] = {"samples": len(labels), **score}
            progress.advance()
    found["random"] = found["uniform"]
    anchors = [
        empty_row(name, "all") | found.pop(name) for name in (TRAINING, RECONSTRUCTIONS, SHUFFLED) if name in found
    ]
    return found, anchors, steps


def _distances(images: Tensor, reference: Reference) -> dict[str, float]:
    if reference.extractor is None or reference.features is None:
        return {}
    return measure(reference.features, reference.extractor.features(images), seed=reference.seed)


def _score(
    images: Tensor, labels: Tensor | None, reference: Reference, console: Console, title: str
) -> tuple[dict[str, float], int | None]:
    """The columns of the classification accuracy score, and the steps of the training behind it."""
    if labels is None or not reference.plan.cas:
        return {}, None
    result = classification_accuracy_score(
        images,
        labels,
        reference.test_images,
        reference.test_labels,
        reference.spec,
        seed=reference.seed,
        console=console,
        title=title,
    )
    return {"cas": result.accuracy, "cas_standard_error": result.standard_error}, result.steps


def _shuffled(labels: Tensor, seed: int) -> Tensor:
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, len(labels)])))
    return labels[torch.from_numpy(generator.permutation(len(labels)))]


def quality_provenance(reference: Reference, steps: int | None) -> dict[str, Any]:
    """What the quality figures rest on; null what was not measured."""
    plan, extractor = reference.plan, reference.extractor
    return {
        "extractor": extractor and extractor.name,
        "weights": extractor and extractor.fingerprint,
        "width": extractor and extractor.width,
        "samples": plan.samples,
        "test_images": plan.test_images,
        "training_images": plan.training_images,
        "neighbours": NEIGHBOURS if plan.features else None,
        "kid_subsets": KID_SUBSETS if plan.features else None,
        "kid_subset_size": kid_subset_size(plan.test_images, plan.samples) if plan.features else None,
        "seed": reference.seed,
        "cas_images": plan.samples if plan.cas else None,
        "cas_test_images": len(reference.test_images) if plan.cas else None,
        "cas_steps": steps,
    }


def fill_quality(rows: Sequence[dict[str, Any]], found: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the figures of each set of samples into its row."""
    for row in rows:
        if row["level"] == "all":
            row |= found.get(row["prior"], {})
