"""What a codec makes of a set of images: errors of its reconstructions, use of its codes, features of both.

The figures are plain numbers for a record; `pipelines.evaluate` says which images they are of, and docs/evaluate.md how
to read them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipelines.diagnosis.codec_figures import MOST_PSNR, images_at_once
from pipelines.likelihood import measured_batches
from pipelines.processes import Result
from pipelines.quality.extractors import Extractor
from pipelines.reconstruct import depth_names
from vqgen.codec import HierarchicalVQVAE
from vqgen.console import Console
from vqgen.image_split import ImageSplit
from vqgen.images import to_float, to_uint8
from vqgen.losses import discretized_gaussian_nats
from vqgen.metrics import CodeUsage, PixelCounts, bits_per_dim, mse, nmse, psnr, ssim

WORST = 8
"""Images that are named as the worst."""


@dataclass(frozen=True)
class Measured:
    """What was found of N images, in their order."""

    errors: Mapping[str, Mapping[str, Tensor]]
    """By the levels decoded (`depth_names`), each image's ``mse``, ``psnr`` and ``ssim``, (N,) each."""
    decoder_nats: Tensor | None
    """(N,) float64: -log p(image | its codes); None where the decoder's scale was never fitted."""
    usage: Sequence[CodeUsage]
    """Of each level, coarse to fine."""
    variance: float
    """Of the pixels about their one mean."""
    features: tuple[Tensor, Tensor] | None
    """(N, F) of the images and of their reconstructions; None without an extractor."""


@torch.no_grad()
def measure(
    codec: HierarchicalVQVAE, split: ImageSplit, indices: Sequence[int], reader: Extractor | None, console: Console
) -> Measured:
    """Every figure of the images at ``indices``, read once; shared by the processes of a launcher."""
    device = next(codec.parameters()).device
    scale = codec.decoder_scale.cpu()
    depths = depth_names(codec)

    def measure_batch(span: Sequence[int]) -> Result:
        images = split.__getitems__(span)["images"]
        pixels = PixelCounts()
        pixels.add(images)
        targets = to_float(images).to(device)
        codes = codec.encode(targets)
        # What is counted goes as one row a batch: added up at the end, it is the same however it was shared.
        found = {"pixels": pixels.counts[None]}
        for level, own in zip(codec.levels, codes, strict=True):
            counted = CodeUsage(level.codebook_size)
            counted.add(own)
            found[f"codes {level.name}"] = counted.counts[None]
        for depth, name in enumerate(depths, start=1):
            made = codec.decode(codes[:depth])
            found[f"mse {name}"] = mse(made, targets)
            found[f"psnr {name}"] = psnr(made, targets).clamp(max=MOST_PSNR)
            found[f"ssim {name}"] = ssim(made, targets)
        if scale.isfinite().all():
            found["nats"] = discretized_gaussian_nats(images, made, scale)
        if reader is not None:
            found["features"] = reader.features(images)
            found["features made"] = reader.features(to_uint8(made).cpu())
        return found

    found = measured_batches(indices, images_at_once(codec), measure_batch, "reconstructions", console)
    usage = [CodeUsage(level.codebook_size) for level in codec.levels]
    for level, counted in zip(codec.levels, usage, strict=True):
        counted.counts = found[f"codes {level.name}"].sum(0)
    pixels = PixelCounts()
    pixels.counts = found["pixels"].sum(0)
    return Measured(
        {name: {key: found[f"{key} {name}"].double() for key in ("mse", "psnr", "ssim")} for name in depths},
        found.get("nats"),
        usage,
        pixels.variance,
        (found["features"], found["features made"]) if reader is not None else None,
    )


def reconstruction_figures(measured: Measured) -> dict[str, dict[str, float]]:
    """By the levels decoded: means over the images, and the error normalised by the variance of the pixels."""
    figures = {}
    for name, found in measured.errors.items():
        means = {key: float(values.mean()) for key, values in found.items()}
        figures[name] = {
            "mse": means["mse"],
            "nmse": nmse(means["mse"], measured.variance),
            "psnr": means["psnr"],
            "ssim": means["ssim"],
        }
    return figures


def decoder_bits(codec: HierarchicalVQVAE, measured: Measured) -> float | None:
    """Bits per value that the decoder leaves to be said once the codes are known."""
    nats = measured.decoder_nats
    return None if nats is None else bits_per_dim(float(nats.mean()), codec.spec.dims)


def code_figures(codec: HierarchicalVQVAE, usage: Sequence[CodeUsage]) -> dict[str, dict[str, Any]]:
    """By level: how its codes are used by the images measured."""
    return {
        spec.name: {
            "codebook_size": spec.codebook_size,
            "positions": spec.positions,
            "perplexity": counted.perplexity,
            "usage": counted.usage,
            "dead": counted.dead,
            "entropy_bits": counted.entropy_bits,
            "verdict": counted.verdict(spec.name),
        }
        for spec, counted in zip(codec.levels, usage, strict=True)
    }


def bit_figures(codec: HierarchicalVQVAE, usage: Sequence[CodeUsage]) -> dict[str, Any]:
    """What the codes of an image take: ``uniform`` at log2 K bits a code, ``entropy`` at the entropy of their use.

    ``ratio`` is that of the raw image's bits to these; null where the codes take none.
    """
    spec = codec.spec
    raw = 8 * spec.dims
    uniform = sum(level.positions * math.log2(level.codebook_size) for level in codec.levels)
    entropy = sum(level.positions * counted.entropy_bits for level, counted in zip(codec.levels, usage, strict=True))
    found: dict[str, Any] = {"raw_bits_per_image": raw}
    for name, bits in (("uniform", uniform), ("entropy", entropy)):
        found[name] = {
            "bits_per_image": bits,
            "bytes_per_image": bits / 8,
            "bits_per_pixel": bits / (spec.height * spec.width),
            "ratio": raw / bits if bits > 0 else None,
        }
    return found


def worst_images(measured: Measured, indices: Sequence[int]) -> list[dict[str, Any]]:
    """The images of the split that come back worst from all levels, the worst first."""
    errors = list(measured.errors.values())[-1]
    order = errors["mse"].sort(descending=True, stable=True).indices[:WORST].tolist()
    return [
        {"index": indices[place], **{key: float(values[place]) for key, values in errors.items()}} for place in order
    ]
