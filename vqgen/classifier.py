"""A small image classifier: which class does a picture show?

It judges samples (do they show the class they were drawn for?) and chooses among them (`pipelines.rejection`), so it
is small enough to be trained beside every run, on its own images. A residual network (He et al. 2016, with the ReLU
before each convolution) on maps of a half, a quarter and an eighth of the picture's size. Groups of channels are
normalised (Wu & He 2018), never the batch, so that what is said of one picture depends on no other. Accuracy beyond
what judging samples needs is not sought. How it is trained is `pipelines.classify`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from vqgen.codes import ImageSpec
from vqgen.config import Settings
from vqgen.hub import HubModel
from vqgen.images import to_float

READ_AT_ONCE = 250
"""Pictures in one pass of `ImageClassifier.probabilities`."""

MAP = 16
"""Pictures are halved, at least once, until no side is longer than this; there the residual blocks begin."""

GROUPS = 8
"""Groups of channels that are normalised together."""


class ClassifierConfig(Settings):
    """Architecture of the classifier."""

    width: int = Field(32, ge=8, multiple_of=8)
    """Channels of the first convolution; the last one has four times as many."""
    largest: int = Field(64, ge=8)
    """Larger pictures are shrunk until no side is longer than this many pixels."""


@dataclass(frozen=True)
class ClassifierSpec:
    """What a classifier reads, and what it can say."""

    image: ImageSpec
    class_names: tuple[str, ...]
    data_fingerprint: str
    """Of the data set it was trained on, as in `vqgen.data.ImageData`."""


class _Residual(nn.Module):
    """``x + conv3x3(relu(norm(x)))``, (B, width, h, w) to the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.GroupNorm(GROUPS, width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1))

    def forward(self, maps: Tensor) -> Tensor:
        residual: Tensor = self.layers(maps)
        return maps + residual


def _halving(width: int, wider: int) -> nn.Module:
    """(B, width, h, w) to (B, wider, h / 2, w / 2), rounded up."""
    return nn.Sequential(nn.GroupNorm(GROUPS, width), nn.ReLU(), nn.Conv2d(width, wider, 3, stride=2, padding=1))


def shrunk(image: ImageSpec, largest: int) -> tuple[int, int]:
    """Height and width of pictures after they were shrunk, in proportion, until no side is longer than ``largest``."""
    share = min(largest / max(image.height, image.width), 1.0)
    return max(round(image.height * share), 1), max(round(image.width * share), 1)


class ImageClassifier(HubModel):
    """Pictures (B, C, H, W) float in [-1, 1] to class logits (B, classes).

    The last layer sees where in the picture its features are: their mean over the picture would take many times the
    training. Pictures of another size than those of ``spec`` are brought to it.
    """

    kind = "classifier"
    name = "classifier"
    Config = ClassifierConfig
    Spec = ClassifierSpec
    config: ClassifierConfig
    spec: ClassifierSpec

    def __init__(self, config: ClassifierConfig | Mapping[str, Any], spec: ClassifierSpec) -> None:
        super().__init__(config, spec)
        width = self.config.width
        self.read_size = shrunk(spec.image, self.config.largest)
        further = max(math.ceil(math.log2(max(self.read_size) / MAP)) - 1, 0)
        positions = math.prod(math.ceil(side / 2 ** (further + 3)) for side in self.read_size)
        self.body = nn.Sequential(
            nn.Conv2d(spec.image.channels, width, 5, stride=2, padding=2),
            *[_halving(width, width) for _ in range(further)],
            _Residual(width),
            _halving(width, 2 * width),
            _Residual(2 * width),
            _halving(2 * width, 4 * width),
            _Residual(4 * width),
            nn.GroupNorm(GROUPS, 4 * width),
            nn.ReLU(),
        )
        self.head = nn.Linear(4 * width * positions, len(spec.class_names))

    def features(self, images: Tensor) -> Tensor:
        """What the last layer sees: the last map as it is, (B, F) float."""
        flat: Tensor = rearrange(self.body(self._sized(images)), "b c h w -> b (c h w)")
        return flat

    def residual_maps(self, images: Tensor) -> list[Tensor]:
        """What the residual blocks give, finest first: (B, C_i, h_i, w_i) float each."""
        maps = self._sized(images)
        found = []
        for layer in self.body:
            maps = layer(maps)
            if isinstance(layer, _Residual):
                found.append(maps)
        return found

    def forward(self, images: Tensor) -> Tensor:
        """Class logits (B, classes) of images (B, C, H, W) in [-1, 1]."""
        logits: Tensor = self.head(self.features(images))
        return logits

    def card(self) -> str:
        return super().card().replace("unconditional-image-generation", "image-classification")

    @torch.no_grad()
    def probabilities(self, images: Tensor) -> Tensor:
        """(B, C, H, W) uint8 to (B, classes) float64 on the CPU, each row summing to 1.

        Float64, so that two pictures which are both read as good as surely can still be told apart.
        """
        device = self.head.weight.device
        parts = [self(to_float(part.to(device))).cpu().double() for part in torch.split(images, READ_AT_ONCE)]
        return torch.cat(parts).softmax(1)

    def _sized(self, images: Tensor) -> Tensor:
        """Images of the size that the network reads."""
        return images if images.shape[-2:] == self.read_size else F.interpolate(images, self.read_size, mode="area")
