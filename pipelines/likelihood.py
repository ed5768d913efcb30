"""Likelihood of held-out images: the codes under a prior, and the pixels given the codes.

Rate plus distortion: -log p(codes) - log p(image | codes) is an upper bound on -log p(image), since an image could
also come from other codes than its own (van den Oord et al. 2017, sec. 4.1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipelines.settings import run_settings
from pipelines.train_prior import code_batches
from priors.base import Prior
from priors.sampling import Noise
from vqgen.code_store import CodeSplit, CodeStore
from vqgen.codec import HierarchicalVQVAE
from vqgen.console import Console
from vqgen.data import load_data
from vqgen.errors import MismatchError
from vqgen.losses import discretized_gaussian_nats
from vqgen.run_folder import RunFolder

ESTIMATOR_SAMPLES = 64
"""Draws of a bound's estimator; the count stands beside every bound."""
BATCH = 250


@dataclass(frozen=True)
class HeldOut:
    """Test images as everything that is measured on them needs them."""

    images: Tensor
    """(B, C, H, W) uint8: the first images of the test split."""
    decoder_nats: Tensor
    """(B,) float64: -log p(image | its codes)."""
    codes: CodeSplit
    """The code maps of the whole split."""
    notes: tuple[str, ...]
    """What was done to the pixels before they were measured."""


def read_held_out(
    run: RunFolder, codec: HierarchicalVQVAE, store: CodeStore, images: int | None, console: Console
) -> HeldOut:
    """The first ``images`` test images (None: all) of a run, with the decoder's term of their likelihood.

    Raises:
        MismatchError: the data are not the ones the codes were made from.
    """
    config = run_settings(run)
    data = load_data(config.data, config.seed, notify=console.say)
    test = store.split("test")
    if data.fingerprint != store.info.data_fingerprint or len(data.splits["test"]) != len(test):
        raise MismatchError(
            f"The images of '{config.data.source}' are not the ones the codes of {run.path} were made from.",
            "Put them back, or redo the run with `vqgen train-codes --overwrite`.",
        )
    count = len(test) if images is None else min(images, len(test))
    device = next(codec.parameters()).device
    scale = codec.decoder_scale.cpu()
    kept, nats = [], []
    with torch.no_grad(), console.progress("decoder's likelihood", count, "images") as progress:
        for start in range(0, count, BATCH):
            span = range(start, min(start + BATCH, count))
            batch = data.splits["test"].__getitems__(span)["images"]
            codes = tuple(level.to(device) for level in test.__getitems__(span)["codes"])
            nats.append(discretized_gaussian_nats(batch, codec.decode(codes).cpu(), scale))
            kept.append(batch)
            progress.advance(len(batch))
    return HeldOut(torch.cat(kept), torch.cat(nats), test, data.notes)


def code_nats(prior: Prior, held_out: HeldOut, level: int, console: Console) -> Tensor:
    """-log p(codes | coarser codes, label) of each held-out image: (B,) float64 nats; of a bound, its upper bound."""
    count = len(held_out.images)
    nats = []
    prior.eval()
    with (
        torch.no_grad(),
        console.progress(f"likelihood: {prior.name}, {prior.spec.target.name}", count, "images") as bar,
    ):
        for start, (codes, context, label) in zip(
            range(0, count, BATCH), code_batches(held_out.codes, level, BATCH), strict=False
        ):
            keep = min(BATCH, count - start)
            density = prior.log_prob(
                codes[:keep].to(prior.device),
                tuple(c[:keep].to(prior.device) for c in context),
                None if label is None else label[:keep].to(prior.device),
                noise=Noise(0, tuple(range(start, start + keep)), level),
                samples=ESTIMATOR_SAMPLES,
            )
            nats.append(-density.nats.double().cpu())
            bar.advance(keep)
    return torch.cat(nats)
