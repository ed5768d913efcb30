"""What the figures of a comparison need beyond its rows: bits by position, use of codes, nearest training images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipelines.diagnosis.neighbours import Distances, searchable
from pipelines.likelihood import HeldOut
from pipelines.run_codes import code_batches
from priors.autoregressive import AutoregressivePrior
from priors.base import Prior
from priors.baselines import IndependentPrior
from vqgen.code_store import CodeStore
from vqgen.codec import HierarchicalVQVAE
from vqgen.codes import Codes
from vqgen.console import Console
from vqgen.image_split import spread
from vqgen.metrics import CodeUsage

POSITION_IMAGES = 256
"""Test images whose bits are averaged at each position."""
SEARCHED_SAMPLES = 64
"""Samples of each prior whose nearest training images are looked for."""


@dataclass(frozen=True)
class Positions:
    """Bits of the code at each position."""

    maps: Mapping[str, Mapping[str, npt.NDArray[np.float64]]]
    """By level, then by prior: (h, w) mean bits over the images."""
    images: int
    none: tuple[str, ...]
    """Priors that give no likelihood of a single code."""


@dataclass(frozen=True)
class Neighbours:
    """Q maps of one source and their nearest training images."""

    codes: Codes
    """Of all levels, int64 (Q, h, w) each."""
    distance: Tensor
    """(Q,) float32, in the units of `pipelines.diagnosis.neighbours`."""
    place: Tensor
    """(Q,) int64 in the training split."""


@dataclass(frozen=True)
class Search:
    """The nearest training images of every source's maps."""

    groups: Mapping[str, Neighbours]
    searched: int
    available: int


def joint_bits(mixes: Mapping[str, Mapping[str, str]], bits: Mapping[tuple[str, str], Tensor]) -> dict[str, Tensor]:
    """Bits of each image over all levels, (B,) float64, of each mix whose every level's prior has bits."""
    found = {}
    for name, mix in mixes.items():
        parts = [bits.get((prior, level)) for level, prior in mix.items()]
        known = [part for part in parts if part is not None]
        if known and len(known) == len(parts):
            found[name] = torch.stack(known).sum(0)
    return found


def code_counts(store: CodeStore, held_out: HeldOut) -> dict[str, Tensor]:
    """By level: how often each code stands in the maps of the measured test images, (K,) int64."""
    counts = {}
    for number, level in enumerate(store.info.levels):
        usage = CodeUsage(level.codebook_size)
        for codes, _, _ in code_batches(held_out.codes, number, held_out.indices):
            usage.add(codes)
        counts[level.name] = usage.counts
    return counts


def position_bits(
    priors: Mapping[tuple[str, str], Prior], levels: Sequence[str], held_out: HeldOut, console: Console
) -> Positions:
    """Mean bits at each position, over some of the test images, under every prior that factorises over codes.

    Args:
        priors: by prior and level.
        levels: all levels, coarse to fine.
    """
    indices = spread(np.asarray(held_out.indices), POSITION_IMAGES)
    maps: dict[str, dict[str, npt.NDArray[np.float64]]] = {level: {} for level in levels}
    none = []
    with torch.no_grad(), console.progress("bits by position", len(priors), "priors") as progress:
        for (name, level), prior in priors.items():
            if not isinstance(prior, (AutoregressivePrior, IndependentPrior)):
                none.append(name)
                continue
            batches = code_batches(held_out.codes, levels.index(level), indices, prior.device)
            nats = torch.cat([prior.log_prob_map(*batch).cpu() for batch in batches])
            maps[level][name] = (-nats.double().mean(0) / log(2)).numpy()
            progress.advance(1)
    return Positions(maps, len(indices), tuple(dict.fromkeys(none)))


def nearest_training(
    codec: HierarchicalVQVAE, store: CodeStore, held_out: HeldOut, drawn: Mapping[str, Codes], console: Console
) -> Search:
    """The nearest training images of some held-out images, and of the codes that priors have ``drawn``, by name."""
    train = store.split("train")
    per_image = sum(level.positions for level in codec.levels)
    width = max(level.code_dim for level in codec.levels)
    indices = spread(np.arange(len(train)), searchable(per_image, width, len(train)))
    queries: dict[str, Codes] = {
        "test images": held_out.codes.__getitems__(held_out.pictured[:SEARCHED_SAMPLES])["codes"],
        **{name: tuple(maps[:SEARCHED_SAMPLES] for maps in codes) for name, codes in drawn.items()},
    }
    joined = tuple(torch.cat(level) for level in zip(*queries.values(), strict=True))
    distances = Distances([quantizer.codebook for quantizer in codec.quantizers], train, indices)
    with console.progress("nearest training images", len(indices), "images") as progress:
        found = distances.nearest(joined, progress.advance)[None]
    groups, start = {}, 0
    for name, codes in queries.items():
        span = slice(start, start + len(codes[0]))
        groups[name] = Neighbours(codes, found.distance[span], found.place[span])
        start = span.stop
    return Search(groups, len(indices), len(train))
