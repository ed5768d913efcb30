"""Likelihood of held-out images: the codes under a prior, and the pixels given the codes.

Rate plus distortion: -log p(codes) - log p(image | codes) is an upper bound on -log p(image), since an image could
also come from other codes than its own (van den Oord et al. 2017, sec. 4.1). Where a prior is given the label y, its
rate is -log p(codes | y); adding -log p(y) makes the sum a bound for the image alone again, as p(x) >= p(y) p(x | y).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipelines.run_codes import BATCH, code_batches
from pipelines.settings import run_settings
from priors.base import Prior
from priors.sampling import Noise
from vqgen.code_store import CodeSplit, CodeStore
from vqgen.codec import HierarchicalVQVAE
from vqgen.console import Console
from vqgen.data import load_data
from vqgen.errors import MismatchError
from vqgen.image_split import spread
from vqgen.losses import discretized_gaussian_nats
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
    pictures: Tensor
    """(P, C, H, W) uint8: some of them, to be looked at."""
    decoder_nats: Tensor
    """(B,) float64: -log p(image | its codes)."""
    label_nats: Tensor
    """(B,) float64: -log p(label), from the training labels; 0 where unlabelled."""
    notes: tuple[str, ...]
    """What was done to the pixels before they were measured."""


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
    """``images`` test images (None: all) of a run, with the decoder's and the label's terms of their likelihood.

    ``source`` is where the data is now, if it was moved.

    Raises:
        MismatchError: the data are not the ones the codes were made from.
    """
    config = run_settings(run, source=source)
    data = load_data(config.data, config.seed, notify=console.say)
    test = store.split("test")
    if data.fingerprint != store.info.data_fingerprint or len(data.splits["test"]) != len(test):
        raise MismatchError(
            f"The images of '{config.data.source}' are not the ones the codes of {run.path} were made from.",
            f"Say where those are with --data, or redo the run with `{run.command('train-codes --overwrite')}`.",
        )
    indices = spread(np.arange(len(test)), images or len(test))
    shown = data.splits["test"].__getitems__(spread(np.asarray(indices), pictures))["images"]
    device = next(codec.parameters()).device
    scale = codec.decoder_scale.cpu()
    nats = []
    with torch.no_grad(), console.progress("decoder's likelihood", len(indices), "images") as progress:
        for start in range(0, len(indices), BATCH):
            span = indices[start : start + BATCH]
            batch = data.splits["test"].__getitems__(span)["images"]
            codes = tuple(level.to(device) for level in test.__getitems__(span)["codes"])
            nats.append(discretized_gaussian_nats(batch, codec.decode(codes).cpu(), scale))
            progress.advance(len(batch))
    return HeldOut(test, indices, shown, torch.cat(nats), label_nats(store, indices), data.notes)


def label_nats(store: CodeStore, indices: Sequence[int]) -> Tensor:
    """-log of the share of each test image's label among the training labels, 1/2 added to each count: (B,) float64."""
    classes = len(store.info.class_names)
    if not classes:
        return torch.zeros(len(indices), dtype=torch.float64)
    counts = torch.full((classes,), 0.5, dtype=torch.float64)
    for _, _, label in code_batches(store.split("train"), 0):
        assert label is not None
        counts += torch.bincount(label, minlength=classes)
    labels = torch.cat([label for _, _, label in code_batches(store.split("test"), 0, indices) if label is not None])
    return -(counts / counts.sum()).log()[labels]


def code_nats(prior: Prior, held_out: HeldOut, level: int, console: Console) -> Tensor:
    """-log p(codes | coarser codes, label) of each held-out image: (B,) float64 nats; of a bound, its upper bound."""
    count = len(held_out.indices)
    nats: list[Tensor] = []
    prior.eval()
    title = f"likelihood: {prior.name}, {prior.spec.target.name}"
    with torch.no_grad(), console.progress(title, count, "images") as progress:
        for codes, context, label in code_batches(held_out.codes, level, held_out.indices, prior.device):
            done = sum(map(len, nats))
            noise = Noise(0, tuple(range(done, done + len(codes))), level)
            density = prior.log_prob(codes, context, label, noise=noise, samples=ESTIMATOR_SAMPLES)
            nats.append(-density.nats.double().cpu())
            progress.advance(len(codes))
    return torch.cat(nats)
