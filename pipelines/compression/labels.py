"""Which label the priors are given for each image.

Where the images have labels of the run's classes, these are stored: a class costs log2(classes) bits and saves more.
Where they have none, the priors are given none, if all of them know what to do without (unlabelled runs, baselines, and
priors trained with label dropout). Else each image gets the class under which its codes take the fewest bits, which is
stored as if it were its own; it says nothing about the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from priors.base import Prior
from priors.baselines import IndependentPrior
from vqgen.codes import Codes
from vqgen.data import ImageData
from vqgen.errors import InputError


class Labelling(NamedTuple):
    """What is done about labels."""

    kind: Literal["stored", "none", "chosen"]
    numbers: Tensor | None = None
    """(c,) int64: for each class of the data its number in the run, where labels are stored."""
    notice: str = ""

    def labels(self, priors: Sequence[Prior], codes: Codes, given: Tensor | None) -> Tensor | None:
        """(N,) int64 label of each image of a batch, by the run's numbers; ``given`` by the data's."""
        if self.kind == "none":
            return None
        if self.kind == "chosen":
            return fewest_bits(priors, codes)
        assert given is not None
        assert self.numbers is not None
        return self.numbers[given]


def knows_no_label(prior: Prior) -> bool:
    """Whether a prior has a density for images without a label."""
    dropout = float(getattr(prior, "label_dropout", 0.0))
    return not prior.spec.classes or isinstance(prior, IndependentPrior) or dropout > 0


def labelling(priors: Sequence[Prior], data: ImageData, wanted: bool) -> Labelling:
    """What is done about the labels of ``data``; ``wanted`` is false for --no-labels.

    Raises:
        InputError: --no-labels with a prior that was never shown an image without its label.
    """
    known = priors[0].spec.class_names
    if not known:
        return Labelling("none")
    lost = [prior for prior in priors if not knows_no_label(prior)]
    if not wanted and lost:
        prior = lost[0]
        raise InputError(
            f"--no-labels: the {prior.name} prior of level '{prior.spec.target.name}' was trained without label "
            "dropout, so it knows no images without a label.",
            f"Leave --no-labels out, or train it with --set priors.{prior.name}.label_dropout=0.1.",
        )
    if not wanted:
        return Labelling("none")
    if data.class_names and set(data.class_names) <= set(known):
        return Labelling("stored", torch.tensor([known.index(name) for name in data.class_names]))
    why = "are not of the run's classes" if data.class_names else "have no labels"
    if not lost:
        return Labelling("none", notice=f"The images {why}: they are coded without.")
    return Labelling("chosen", notice=f"The images {why}: each takes the label under which it needs the fewest bits.")


def fewest_bits(priors: Sequence[Prior], codes: Codes) -> Tensor:
    """(N,) int64: for each image of codes (N, h, w) per level the label under which they are most likely."""
    count, classes = len(codes[0]), priors[0].spec.classes
    nats = torch.zeros(classes, count, dtype=torch.float64)
    for value in range(classes):
        label = torch.full((count,), value)
        for level, prior in enumerate(priors):
            nats[value] += prior.log_prob(codes[level], codes[:level], label).nats
    return nats.argmax(0)
