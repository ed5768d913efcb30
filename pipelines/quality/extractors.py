"""Images as features, by a network that knows something of images: what the distances between sets are measured on.

- ``classifier``: the run's own classifier (`pipelines.classify`), each of its residual maps averaged over the picture.
  It knows what tells the classes of this data apart, and the edges and textures on the way there.
- ``codec``: the run's own codec, each level's encoder map before it is quantised, averaged over the picture. It needs
  no labels; but it knows what it was trained to keep, and no more.
- ``inception``: the network and the weights of published Frechet distances. It knows photographs.

A map's mean over the picture says what is in it, not where, in few enough numbers that 1,000 images say something of
them. The run's own networks have no natural zero and unit, on which KID depends; so over some reconstructed training
images each of their features has the mean 0, and those of a map the mean variance 1. Inception's are as published.

Figures of two extractors, or of one extractor with other weights, cannot be held against each other; so an extractor
goes by a fingerprint of its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from einops import reduce
from torch import Tensor, nn

from pipelines.classify import run_classifier
from pipelines.code_sources import decoded
from pipelines.processes import join
from pipelines.quality.inception import WIDTH, open_inception
from pipelines.run_codes import open_store
from vqgen.checkpoint import preserved_random_state
from vqgen.classifier import ImageClassifier
from vqgen.code_store import CodeStore
from vqgen.codec import HierarchicalVQVAE
from vqgen.console import Console
from vqgen.errors import InputError, did_you_mean
from vqgen.hub import fingerprint
from vqgen.image_split import spread
from vqgen.images import to_float
from vqgen.run_folder import RunFolder

EXTRACTORS = ("classifier", "codec", "inception")

READ_AT_ONCE = 100
"""Pictures in one pass."""

SCALE_IMAGES = 200
"""Reconstructed training images that say what is 0 and what is 1 in the run's own networks."""

Read = Callable[[Tensor], Sequence[Tensor]]
"""uint8 (B, C, H, W) on the CPU to one (B, F_i) for each map, without gradients."""


@dataclass(frozen=True, eq=False)
class Extractor:
    """A network that turns images into features."""

    name: str
    """One of `EXTRACTORS`."""
    fingerprint: str
    """SHA-256 of its weights."""
    width: int
    """F, the numbers it gives for each image."""
    read: Read = field(repr=False)
    zero: Tensor = field(repr=False)
    """(F,) float64: taken off the features."""
    unit: Tensor = field(repr=False)
    """(F,) float64: what they are then divided by, the same for all of a map."""
    console: Console = field(repr=False, default=Console(silent=True))

    def features(self, images: Tensor) -> Tensor:
        """Features (B, F) float32 on the CPU of images (B, C, H, W) uint8; none depends on the images beside it."""
        found = torch.zeros(len(images), self.width)
        with self.console.progress(f"features: {self.name}", len(images), "images") as progress:
            for start in range(0, len(images), READ_AT_ONCE):
                part = torch.cat(_read(self.read, images[start : start + READ_AT_ONCE]), dim=1)
                found[start : start + READ_AT_ONCE] = (part.double() - self.zero) / self.unit
                progress.advance(len(part))
        return found


def check_extractor(name: str | None) -> None:
    """Refuse a name that is none of `EXTRACTORS`.

    Raises:
        InputError: naming those there are, and the nearest.
    """
    if name is not None and name not in EXTRACTORS:
        hint = f"{did_you_mean(name, EXTRACTORS)} Known: {', '.join(EXTRACTORS)}.".strip()
        raise InputError(f"There is no extractor '{name}'.", hint)


def open_extractor(
    name: str | None, run: RunFolder, codec: HierarchicalVQVAE, console: Console, *, source: str | None = None
) -> Extractor:
    """The extractor ``name``; without a name, ``classifier`` where the images of ``run`` are labelled, else ``codec``.

    Args:
        codec: of the run, on the device where it is to be used.
        source: where the run's images are now, if they were moved; read where the run has no classifier yet.

    Raises:
        InputError: an unknown name, a classifier of unlabelled images, or Inception cannot be had here.
        MismatchError: the run's classifier, or the images it would be trained on, are not of this run.
    """
    check_extractor(name)
    store = open_store(run)
    labelled = bool(store.info.class_names)
    if name == "classifier" and not labelled:
        raise InputError(
            f"The extractor 'classifier' needs labels, and the images of {run.path} have none.",
            "Take the extractor 'codec', which needs none.",
        )
    if name == "inception":
        return inception_extractor(*open_inception(console), console)
    if name == "codec" or not labelled:
        return own_extractor("codec", fingerprint(run.codec), codec_reader(codec), codec, store, console)
    with preserved_random_state():  # a network is drawn before its weights are loaded
        model = run_classifier(run, console, source=source)
    return own_extractor("classifier", fingerprint(run.classifier), classifier_reader(model), codec, store, console)


def own_extractor(
    name: str, weights: str, read: Read, codec: HierarchicalVQVAE, store: CodeStore, console: Console
) -> Extractor:
    """An extractor of the run's own networks, its scale taken from reconstructed training images."""
    train = store.split("train")
    chosen = spread(np.arange(len(train)), SCALE_IMAGES)
    batches = []
    with console.progress("scale of the features", len(chosen), "images") as progress:
        for start in range(0, len(chosen), READ_AT_ONCE):
            codes = train.__getitems__(chosen[start : start + READ_AT_ONCE])["codes"]
            batches.append(_read(read, decoded(codec, codes)))
            progress.advance(len(codes[0]))
    maps = [torch.cat(parts).double() for parts in zip(*batches, strict=True)]
    zero = torch.cat([part.mean(dim=0) for part in maps])
    units = [part.var(dim=0, unbiased=False).mean().sqrt() for part in maps]
    units = [torch.where(unit > 0, unit, 1.0) for unit in units]  # 0 for a map that says the same of every image
    unit = torch.cat([unit.expand(part.shape[1]) for unit, part in zip(units, maps, strict=True)])
    return Extractor(name, weights, len(zero), read, zero, unit, console)


def classifier_reader(model: ImageClassifier) -> Read:
    """The residual maps of a classifier, finest first, each averaged over the picture."""
    model.eval()
    device = model.head.weight.device
    return lambda images: [
        reduce(residual, "b c h w -> b c", "mean") for residual in model.residual_maps(to_float(images).to(device))
    ]


def codec_reader(codec: HierarchicalVQVAE) -> Read:
    """The encoder maps of a codec, coarse to fine, each averaged over the picture."""
    codec.eval()
    device = next(codec.parameters()).device
    return lambda images: [
        reduce(level, "b c h w -> b c", "mean") for level in codec.encoder_maps(to_float(images).to(device))
    ]


def inception_extractor(network: nn.Module, weights: str, console: Console) -> Extractor:
    """The pooled features of Inception v3; grey images are shown as colour, and alpha is left out."""
    device = join().device
    network.to(device)

    def read(images: Tensor) -> Sequence[Tensor]:
        colour = images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)
        maps: Sequence[Tensor] = network(colour.to(device))
        return maps

    return Extractor(
        "inception", weights, WIDTH, read, torch.zeros(WIDTH).double(), torch.ones(WIDTH).double(), console
    )


@torch.no_grad()
def _read(read: Read, images: Tensor) -> list[Tensor]:
    return [part.float().cpu() for part in read(images)]
