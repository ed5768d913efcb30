"""The rows of compare.json: one for each prior and level, flat, null where nothing was computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from math import isfinite, log, log2
from typing import Any

import torch
from torch import Tensor

from pipelines.likelihood import ESTIMATOR_SAMPLES, HeldOut
from pipelines.report.columns import BASELINES, is_trained
from pipelines.sample import Samples
from priors.base import Density, Prior
from vqgen.codec import HierarchicalVQVAE
from vqgen.codes import ImageSpec
from vqgen.metrics import bits_per_dim, bootstrap_standard_error
from vqgen.run_folder import RunFolder
from vqgen.training_log import read_metrics

LN2 = log(2)

QUALITY_KEYS = (
    *("samples", "frechet", "kid", "kid_standard_error", "precision", "recall", "density", "coverage"),
    *("cas", "cas_standard_error"),
)
"""The figures of sample quality, and the number of images behind them."""

COLUMNS = (
    *("bits_per_code", "likelihood", "estimator_samples", "estimator_standard_error", "effective_samples"),
    *("standard_error", "bits_per_image", "bits_per_dim"),
    *("bytes_per_image", "bits_per_pixel", "compression_ratio"),
    *("parameters", "train_seconds", "train_steps", "train_memory", "samples_per_second", "sample_memory"),
    *QUALITY_KEYS,
)
"""What a row holds besides its prior and its level."""


def rows_of(
    run: RunFolder,
    label: str,
    priors: Sequence[Prior],
    measured: Mapping[tuple[str, str], Density],
    held_out: HeldOut,
    codec: HierarchicalVQVAE,
) -> list[dict[str, Any]]:
    """A row for each level's prior, and one for all levels where every level has one.

    ``measured`` are the log-densities of the images, (B,) nats, by prior and level.
    """
    rows = []
    for prior in priors:
        level = prior.spec.target
        record = run.stage(run.prior_stage(prior.name, level.name)) or {}
        density = measured.get((prior.name, level.name))
        rows.append(
            empty_row(prior.name, level.name)
            | likelihood_columns(density, level.positions, prior.likelihood)
            | {
                "parameters": sum(p.numel() for p in prior.parameters()),
                "train_seconds": record.get("seconds", 0.0),
                "train_steps": record.get("steps", 0),
                "train_memory": record.get("peak_memory"),
            }
        )
    if len(priors) == len(codec.levels):
        parts = [measured.get((prior.name, prior.spec.target.name)) for prior in priors]
        known = [density for density in parts if density is not None]
        total = reduce(_joint, known) if len(known) == len(parts) else None
        positions = sum(level.positions for level in codec.levels)
        kinds = {prior.likelihood for prior in priors}
        kind = "none" if "none" in kinds else "bound" if "bound" in kinds else "exact"
        columns = likelihood_columns(total, positions, kind)
        peaks = [row["train_memory"] for row in rows]
        rows.append(
            empty_row(label, "all")
            | columns
            | {"bits_per_dim": None if total is None else image_bits_per_dim(-total.nats, held_out, codec)}
            | compression_columns(columns.get("bits_per_image"), codec.spec)
            | {key: sum(row[key] for row in rows) for key in ("parameters", "train_seconds", "train_steps")}
            | {"train_memory": max(peaks) if None not in peaks else None}  # the levels are trained one after another
        )
    return rows


def _joint(first: Density, second: Density) -> Density:
    """The density of two levels together; of two estimates, the fewer effective samples."""
    error = (first.standard_error.square() + second.standard_error.square()).sqrt()
    return Density(first.nats + second.nats, error, torch.minimum(first.ess, second.ess))


def image_bits_per_dim(nats: Tensor, held_out: HeldOut, codec: HierarchicalVQVAE) -> float:
    """An upper bound on the bits per value of the images: codes (``nats`` of each image), label and decoder."""
    whole = nats + held_out.label_nats + held_out.decoder_nats
    return bits_per_dim(float(whole.mean()), codec.spec.dims)


def compression_columns(bits: float | None, image: ImageSpec) -> dict[str, float | None]:
    """What ``bits`` for an image's codes are in bytes, per pixel, and against its raw size of 8 bits a value.

    Bits throughout: the ratio is the raw image's bits over those of its codes, never values over codes.
    """
    if bits is None:
        return dict.fromkeys(("bytes_per_image", "bits_per_pixel", "compression_ratio"))
    return {
        "bytes_per_image": bits / 8,
        "bits_per_pixel": bits / (image.height * image.width),
        "compression_ratio": 8 * image.dims / bits if bits > 0 else None,
    }


def code_size(codec: HierarchicalVQVAE) -> dict[str, float | None]:
    """What an image's codes take at log2 K bits each, as the block ``codes`` of compare.json says it."""
    bits = sum(level.positions * log2(level.codebook_size) for level in codec.levels)
    columns = compression_columns(bits, codec.spec)
    ratio = columns.pop("compression_ratio")
    return {"bits_per_image": bits, **columns, "ratio": ratio}


def reconstruction_figures(held_out: HeldOut) -> dict[str, Any]:
    """Means over the measured images, as the block ``reconstruction`` of compare.json says them; null if unknown."""
    means = {name: _finite(values.mean()) for name, values in held_out.reconstruction.items()}
    return {"mse": None, "psnr": None, "ssim": None} | means | {"images": len(held_out.indices)}


def empty_row(prior: str, level: str) -> dict[str, Any]:
    """A row with every column of compare.json present and null."""
    return {"prior": prior, "level": level, **dict.fromkeys(COLUMNS)}


def source_row(source: str) -> dict[str, Any]:
    """The row of a source of samples that is no prior: it covers all levels and has no likelihood."""
    return empty_row(source, "all") | {"likelihood": "none"}


def likelihood_columns(density: Density | None, positions: int, kind: str) -> dict[str, Any]:
    """Bits per code and image of a density of (B,) images, and how sure they are.

    ``standard_error`` is that of the mean over the images, by bootstrap. Of a bound, ``estimator_standard_error`` is
    what one image's estimate errs by and ``effective_samples`` what its draws are worth, both means over the images.
    """
    if density is None:
        return {"likelihood": kind}
    bits = -density.nats / LN2
    columns = {
        "bits_per_code": float(bits.mean()) / positions,
        "bits_per_image": float(bits.mean()),
        "standard_error": bootstrap_standard_error(bits / positions),
        "likelihood": kind,
    }
    if kind == "bound":
        columns |= {
            "estimator_samples": ESTIMATOR_SAMPLES,
            "estimator_standard_error": _finite(density.standard_error.mean() / LN2 / positions),
            "effective_samples": _finite(density.ess.mean()),
        }
    return columns


def _finite(value: Tensor) -> float | None:
    return float(value) if isfinite(value) else None


def add_cost(
    rows: Sequence[dict[str, Any]], label: str, priors: Sequence[Prior], drawn: Samples, grown: int | None
) -> None:
    """Fill ``samples_per_second`` of each level's prior and of all levels with the decoder, and ``sample_memory``.

    ``grown`` are the bytes that drawing ``drawn`` took beside the priors' weights, which are added; all levels
    are drawn together, so that only ``all`` has it.
    """
    count = len(drawn.images)
    seconds = {(prior.name, prior.spec.target.name): drawn.seconds[prior.spec.target.name] for prior in priors}
    seconds[label, "all"] = sum(drawn.seconds.values())
    for row in rows:
        taken = seconds.get((row["prior"], row["level"]))
        if taken is not None and row["samples_per_second"] is None:
            row["samples_per_second"] = count / max(taken, 1e-9)
        if (row["prior"], row["level"]) == (label, "all"):
            row["sample_memory"] = None if grown is None else grown + sum(map(_weights, priors))


def _weights(prior: Prior) -> int:
    """Bytes of a prior's parameters and buffers."""
    return sum(held.numel() * held.element_size() for held in (*prior.parameters(), *prior.buffers()))


def unique_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without repeats: a prior that is in several mixes is one row per level."""
    seen: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        kept = seen.setdefault((row["prior"], row["level"]), row)
        if kept["samples_per_second"] is None:
            kept["samples_per_second"] = row["samples_per_second"]
    return list(seen.values())


def learning_curves(run: RunFolder, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Validation bits/code over steps and seconds of every trained prior in ``rows``, from its metrics.jsonl."""
    unigram = {row["level"]: row["bits_per_code"] for row in rows if row["prior"] == "unigram"}
    curves = []
    for row in rows:
        path = run.prior(row["prior"], row["level"]) / "metrics.jsonl" if row["level"] != "all" else None
        if path is None or row["prior"] in BASELINES or not path.is_file():
            continue
        lines = [line for line in read_metrics(path) if line["split"] == "validation" and "bits_per_code" in line]
        curves.append(
            {
                "prior": row["prior"],
                "level": row["level"],
                **{key: [line[key] for line in lines] for key in ("seconds", "bits_per_code")},
                "steps": [line["step"] for line in lines],
                "unigram": unigram.get(row["level"]),
            }
        )
    return curves


def highlights(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the table says, in sentences: the best prior per level, and any that is no better than unigram."""
    sentences = []
    by_level: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_level.setdefault(row["level"], []).append(row)
    for level, group in by_level.items():
        unigram = next(row["bits_per_code"] for row in group if row["prior"] == "unigram")
        trained = [row for row in group if is_trained(row["prior"]) and row["bits_per_code"] is not None]
        where = "over all levels" if level == "all" else f"at level {level}"
        for row in trained:
            if row["bits_per_code"] >= unigram:
                # A bound may be loose: it shows what the prior is at most, not that it has learned nothing.
                verdict = "is not shown to be" if row["likelihood"] == "bound" else "is no"
                sentences.append(
                    f"{row['prior']} {verdict} better than counting codes (unigram) {where}: "
                    f"{_bits(row)} against {unigram:.3f} bits/code."
                )
        if trained:
            best = min(trained, key=lambda row: row["bits_per_code"])
            sentences.append(f"Fewest bits {where}: {best['prior']}, {_bits(best)} bits/code (unigram {unigram:.3f}).")
    return sentences


def _bits(row: Mapping[str, Any]) -> str:
    return f"{'<= ' if row['likelihood'] == 'bound' else ''}{row['bits_per_code']:.3f}"
