"""Likelihood of held-out images: the codes under a prior, and the pixels given the codes.

Rate plus distortion: -log p(codes) - log p(image | codes) is an upper bound on -log p(image), since an image could
also come from other codes than its own (van den Oord et al. 2017, sec. 4.1). Where a prior is given the label y, its
rate is -log p(codes | y); adding -log p(y) makes the sum a bound for the image alone again, as p(x) >= p(y) p(x | y).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipelines.diagnosis.codec_figures import images_at_once
from pipelines.encode import name_unreadable
from pipelines.processes import Result, join
from pipelines.run_codes import BATCH, code_batches
from pipelines.run_images import run_images
from priors.base import Density, Prior
from priors.sampling import Noise
from vqgen.code_store import CodeSplit, CodeStore
from vqgen.codec import HierarchicalVQVAE
from vqgen.console import Console
from vqgen.data import ImageData
from vqgen.image_split import spread
from vqgen.losses import discretized_gaussian_nats
from vqgen.metrics import mse, psnr, ssim
from vqgen.run_folder import RunFolder

ESTIMATOR_SAMPLES = 64
"""Draws of a bound's estimator; the count stands beside every bound."""


@dataclass(frozen=True)
class HeldOut:
    """Test images as everything that is measured on them needs them; B of the split's images."""

    codes: CodeSplit
    """The code maps of the whole split."""
    indices: Sequence[int]
    """Which images are measured: all, or evenly spread over the split, which may be sorted by class."""
    pictured: Sequence[int]
    """Which images of the split are there to be looked at, P of those measured."""
    pictures: Tensor
    """(P, C, H, W) uint8: these images."""
    picture_labels: Tensor | None
    """(P,) int64: their classes, in turn as those of samples; None where they are not in turn, or unlabelled."""
    decoder_nats: Tensor
    """(B,) float64: -log p(image | its codes)."""
    label_nats: Tensor
    """(B,) float64: -log p(label), from the training labels; 0 where unlabelled."""
    reconstruction: Mapping[str, Tensor]
    """(B,) float64 each, of what the decoder makes of all codes: ``mse``, ``psnr``, and ``ssim`` where torchmetrics is
    installed (`vqgen.metrics`)."""
    data: ImageData
    """The run's images, of which these are some."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What was done to the pixels before they were measured."""
        return self.data.notes


def read_held_out(
    run: RunFolder,
    codec: HierarchicalVQVAE,
    store: CodeStore,
    console: Console,
    *,
    images: int | None = None,
    pictures: int = 64,
    source: str | None = None,
) -> HeldOut:
    """``images`` test images (None: all) of a run: the two terms of their likelihood that are not a prior's, and more.

    ``source`` is where the data is now, if it was moved. The processes of a launcher, each calling this alike, share
    the work, and all have the whole result.

    Raises:
        MismatchError: the data are not the ones the codes were made from.
    """
    data = run_images(run, store, console, source)
    test = store.split("test")
    indices = spread(np.arange(len(test)), images or len(test))
    pictured, picture_labels = classes_in_turn(indices, test.labels(), len(store.info.class_names), pictures)
    shown = data.splits["test"].__getitems__(pictured)["images"]
    device = next(codec.parameters()).device
    scale = codec.decoder_scale.cpu()
    measures = {"mse": mse, "psnr": psnr, **({"ssim": ssim} if has_torchmetrics() else {})}

    def measure_batch(span: Sequence[int]) -> Result:
        batch = data.splits["test"].__getitems__(span)["images"]
        codes = tuple(level.to(device) for level in test.__getitems__(span)["codes"])
        made = codec.decode(codes).cpu()
        errors = {name: measure(made, batch).double() for name, measure in measures.items()}
        return {"nats": discretized_gaussian_nats(batch, made, scale), **errors}

    found = measured_batches(indices, images_at_once(codec), measure_batch, "decoder's likelihood", console)
    name_unreadable(data.splits["test"])
    measured = found.pop("nats"), label_nats(store, indices)
    return HeldOut(test, indices, pictured, shown, picture_labels, *measured, found, data)


def measured_batches(
    indices: Sequence[int], size: int, measure: Callable[[Sequence[int]], Result], title: str, console: Console
) -> dict[str, Tensor]:
    """What ``measure`` gives for all ``indices``, ``size`` at a time, joined; shared by the processes of a launcher."""
    processes = join()
    batches = [indices[start : start + size] for start in range(0, len(indices), size)]
    parts = []
    with torch.no_grad(), processes.together(), console.progress(title, len(indices), "images") as progress:
        for batch, part in zip(batches, processes.in_order(batches, measure), strict=True):
            parts.append(part)
            progress.advance(len(batch))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def has_torchmetrics() -> bool:
    """Whether torchmetrics, of the extra ``metrics``, is installed; imports nothing."""
    return importlib.util.find_spec("torchmetrics") is not None


def classes_in_turn(
    indices: Sequence[int], labels: npt.NDArray[np.int64] | None, classes: int, count: int
) -> tuple[Sequence[int], Tensor | None]:
    """``count`` of ``indices``, their classes in turn from 0 as those of samples are, and these classes.

    ``labels`` are those of the whole split. Where it has none, or a class has too few images among ``indices``, the
    images are evenly spread instead, without classes.
    """
    among = np.asarray(indices)
    if labels is not None:
        of_class = [among[labels[among] == value].tolist() for value in range(min(classes, count))]
        if all(len(own) > (count - 1 - value) // classes for value, own in enumerate(of_class)):
            turns = [of_class[place % classes][place // classes] for place in range(count)]
            return turns, torch.arange(count) % classes
    return spread(among, count), None


def class_shares(store: CodeStore) -> Tensor:
    """(Y,) float64: share of each class among the training labels, 1/2 added to each count; empty where unlabelled."""
    labels = store.split("train").labels()
    if labels is None:
        return torch.zeros(0, dtype=torch.float64)
    counts = torch.from_numpy(np.bincount(labels, minlength=len(store.info.class_names))).double() + 0.5
    return counts / counts.sum()


def label_nats(store: CodeStore, indices: Sequence[int]) -> Tensor:
    """-log of the share of each test image's label among the training labels (`class_shares`): (B,) float64."""
    labels = store.split("test").labels()
    if labels is None:
        return torch.zeros(len(indices), dtype=torch.float64)
    return -class_shares(store).log()[torch.from_numpy(labels[np.asarray(indices)])]


def code_density(prior: Prior, held_out: HeldOut, level: int, console: Console) -> Density:
    """log p(codes | coarser codes, label) of each held-out image: (B,) float64 nats; of a bound, the lower bound.

    Shared by the processes of a launcher, as `read_held_out` is.
    """
    prior.eval()

    def measure_batch(places: Sequence[int]) -> Result:
        span = [held_out.indices[place] for place in places]
        ((codes, context, label),) = code_batches(held_out.codes, level, span, prior.device)
        noise = Noise(0, tuple(places), level)
        density = prior.log_prob(codes, context, label, noise=noise, samples=ESTIMATOR_SAMPLES)
        return {name: figure.cpu().double() for name, figure in density._asdict().items()}

    title = f"likelihood: {prior.name}, {prior.spec.target.name}"
    return Density(**measured_batches(range(len(held_out.indices)), BATCH, measure_batch, title, console))
