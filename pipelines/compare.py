"""Comparing priors: the same frozen codes, the same held-out images, one unit.

Every figure is of the test split, which no training and no choice of settings has read. A prior's bits are exact where
it has a likelihood in closed form, and an upper bound (``<=``) where it estimates one; bits/dim adds the label's bits
and the decoder's term and is always an upper bound on the bits of the (resized, 8-bit) pixels.
"""

from __future__ import annotations

import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from math import log, sqrt
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

import vqgen
from pipelines.likelihood import ESTIMATOR_SAMPLES, HeldOut, code_nats, read_held_out
from pipelines.report.page import Figure, write_page
from pipelines.report.plots import bits_chart
from pipelines.report.tables import to_markdown
from pipelines.run_codes import code_batches, open_codes, prior_spec
from pipelines.sample import SampleRequest, Samples, draw_samples, load_priors, sample_grid, trained_priors
from priors import registry
from priors.base import Prior
from vqgen.code_store import CodeStore
from vqgen.codec import HierarchicalVQVAE
from vqgen.console import Console
from vqgen.errors import InputError
from vqgen.files import write_bytes, write_json, write_text
from vqgen.images import image_grid, to_png
from vqgen.metrics import bits_per_dim
from vqgen.run_folder import RunFolder
from vqgen.training_log import read_metrics

BASELINES = ("uniform", "unigram")
QUALITY = ("frechet", "kid", "precision", "recall", "density", "coverage", "cas")
LN2 = log(2)


def compare(
    run: RunFolder,
    chosen: Sequence[Mapping[str, str]],
    console: Console,
    *,
    images: int | None = None,
    samples: int = 64,
    seed: int = 0,
    source: str | None = None,
) -> dict[str, Any]:
    """Compare priors of ``run`` with each other and with the baselines; writes ``compare/`` in the run.

    Args:
        chosen: one prior per level for each row; empty: every prior that is trained.
        images: test images measured, evenly spread over the split; None: all.
        samples: images drawn from each row that covers every level.
        seed: of the samples.
        source: where the run's data is now, if it was moved.

    Returns:
        What compare.json holds (a flat row per prior and level, and ``all``), and the paths written.

    Raises:
        InputError: no prior is trained, or one of ``chosen`` is not.
    """
    codec, store = open_codes(run)
    device = Accelerator().device
    codec.to(device)
    levels = [level.name for level in store.info.levels]
    mixes = [{level: mix[level] for level in levels if level in mix} for mix in chosen or every_trained(run, levels)]
    mixes = [mix for mix in mixes if mix_name(mix) not in BASELINES]  # these are rows of their own
    trained = [load_priors(run, mix, codec) for mix in mixes]  # what cannot be loaded is refused before the work
    baselines = [[fit_baseline(name, store, level) for level in range(len(levels))] for name in BASELINES]
    held_out = read_held_out(run, codec, store, console, images=images, pictures=samples, source=source)
    figures = [Figure("Held-out images", "Images of the test split.", *_pictured(held_out.pictures))]
    rows: list[dict[str, Any]] = []
    measured: dict[tuple[str, str], Tensor] = {}
    for priors in [*baselines, *trained]:
        mix = {prior.spec.target.name: prior.name for prior in priors}
        label = mix_name(mix)
        for prior in priors:
            prior.to(device)
            key = (prior.name, prior.spec.target.name)
            if prior.likelihood != "none" and key not in measured:
                measured[key] = code_nats(prior, held_out, levels.index(key[1]), console)
        rows += rows_of(run, label, priors, measured, held_out, codec)
        if len(priors) == len(levels):
            request = SampleRequest(mix, images=samples, seed=seed)
            drawn = draw_samples(codec, priors, store, request, console)
            add_speed(rows, label, priors, drawn)
            figures.append(_figure(label, drawn, store))
    result: dict[str, Any] = {
        "run": run.name,
        "rows": unique_rows(rows),
        "anchors": [],
        "provenance": provenance(run, store, held_out, codec, seed),
    }
    return {**result, "files": write_comparison(run, result, figures, learning_curves(run, result["rows"]))}


def every_trained(run: RunFolder, levels: Sequence[str]) -> list[dict[str, str]]:
    """Each trained prior over the levels it is trained on.

    Raises:
        InputError: none is trained.
    """
    trained = trained_priors(run)
    names = sorted({name for level in levels for name in trained.get(level, {}) if name not in BASELINES})
    if not trained:
        raise InputError(
            f"{run.path} has no trained prior to compare.",
            f"Train one with `{run.command('train-prior --prior transformer')}`.",
        )
    return [{level: name for level in levels if name in trained.get(level, {})} for name in names]


def mix_name(mix: Mapping[str, str]) -> str:
    """``transformer`` for one prior on every level, ``top=a,bottom=b`` for a mix."""
    names = set(mix.values())
    return names.pop() if len(names) == 1 else ",".join(f"{level}={name}" for level, name in mix.items())


def fit_baseline(name: str, store: CodeStore, level: int) -> Prior:
    """A prior without training, counted on the training codes."""
    prior = registry.get(name)({}, prior_spec(store, level))
    prior.prepare(code_batches(store.split("train"), level))
    return prior.eval()


def rows_of(
    run: RunFolder,
    label: str,
    priors: Sequence[Prior],
    measured: Mapping[tuple[str, str], Tensor],
    held_out: HeldOut,
    codec: HierarchicalVQVAE,
) -> list[dict[str, Any]]:
    """A row for each level's prior, and one for all levels where every level has one.

    ``measured`` are the nats per image, (B,), by prior and level.
    """
    rows = []
    for prior in priors:
        level = prior.spec.target
        record = run.stage(run.prior_stage(prior.name, level.name)) or {}
        nats = measured.get((prior.name, level.name))
        rows.append(
            empty_row(prior.name, level.name)
            | likelihood_columns(nats, level.positions, prior.likelihood)
            | {
                "parameters": sum(p.numel() for p in prior.parameters()),
                "train_seconds": record.get("seconds", 0.0),
                "train_steps": record.get("steps", 0),
            }
        )
    if len(priors) == len(codec.levels):
        parts = [measured.get((prior.name, prior.spec.target.name)) for prior in priors]
        known = [nats for nats in parts if nats is not None]
        total = torch.stack(known).sum(0) if len(known) == len(parts) else None
        positions = sum(level.positions for level in codec.levels)
        kinds = {prior.likelihood for prior in priors}
        kind = "none" if "none" in kinds else "bound" if "bound" in kinds else "exact"
        rows.append(
            empty_row(label, "all")
            | likelihood_columns(total, positions, kind)
            | {"bits_per_dim": None if total is None else image_bits_per_dim(total, held_out, codec)}
            | {key: sum(row[key] for row in rows) for key in ("parameters", "train_seconds", "train_steps")}
        )
    return rows


def image_bits_per_dim(nats: Tensor, held_out: HeldOut, codec: HierarchicalVQVAE) -> float:
    """An upper bound on the bits per value of the images: codes, label and decoder together."""
    whole = nats + held_out.label_nats + held_out.decoder_nats
    return bits_per_dim(float(whole.mean()), codec.spec.dims)


def empty_row(prior: str, level: str) -> dict[str, Any]:
    """A row with every column of compare.json present and null."""
    columns = ["bits_per_code", "likelihood", "estimator_samples", "standard_error", "bits_per_image", "bits_per_dim"]
    columns += ["parameters", "train_seconds", "train_steps", "samples_per_second", *QUALITY]
    return {"prior": prior, "level": level, **dict.fromkeys(columns)}


def likelihood_columns(nats: Tensor | None, positions: int, kind: str) -> dict[str, Any]:
    """Bits per code and image with the standard error of bits per code over images; ``nats`` is (B,) per image."""
    if nats is None:
        return {"likelihood": kind}
    bits = nats / LN2
    error = float(bits.std() / positions / sqrt(len(bits))) if len(bits) > 1 else None
    return {
        "bits_per_code": float(bits.mean()) / positions,
        "bits_per_image": float(bits.mean()),
        "standard_error": error,
        "likelihood": kind,
        "estimator_samples": ESTIMATOR_SAMPLES if kind == "bound" else None,
    }


def add_speed(rows: list[dict[str, Any]], label: str, priors: Sequence[Prior], drawn: Samples) -> None:
    """Fill ``samples_per_second``: of each level's prior, and of all levels with the decoder."""
    count = len(drawn.images)
    seconds = {(prior.name, prior.spec.target.name): drawn.seconds[prior.spec.target.name] for prior in priors}
    seconds[label, "all"] = sum(drawn.seconds.values())
    for row in rows:
        taken = seconds.get((row["prior"], row["level"]))
        if taken is not None and row["samples_per_second"] is None:
            row["samples_per_second"] = count / max(taken, 1e-9)


def unique_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without repeats: a prior that is in several mixes is one row per level."""
    seen: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        kept = seen.setdefault((row["prior"], row["level"]), row)
        if kept["samples_per_second"] is None:
            kept["samples_per_second"] = row["samples_per_second"]
    return list(seen.values())


def _pictured(images: Tensor) -> tuple[bytes, str]:
    return to_png(image_grid(images, columns=min(8, len(images)))), f"A grid of {len(images)} held-out images."


def _figure(label: str, drawn: Samples, store: CodeStore) -> Figure:
    count = len(drawn.images)
    grid = to_png(sample_grid(drawn.images, drawn.labels, store.info.class_names))
    rate = count / sum(drawn.seconds.values())
    shown = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
    caption = f"{count} samples, not selected; {shown} a second."
    return Figure(label, caption, grid, f"A grid of {count} samples of {label}.")


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


def provenance(
    run: RunFolder, store: CodeStore, held_out: HeldOut, codec: HierarchicalVQVAE, seed: int
) -> dict[str, Any]:
    """What the figures rest on."""
    return {
        "vqgen": vqgen.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["vqgen", *sys.argv[1:]]),
        "seed": seed,
        "split": "test",
        "images": len(held_out.indices),
        "images_available": len(held_out.codes),
        "codec_fingerprint": store.info.codec_fingerprint,
        "data": run.data_description(),
        "data_fingerprint": store.info.data_fingerprint,
        "pixels": list(held_out.notes),
        "decoder_bits_per_dim": bits_per_dim(float(held_out.decoder_nats.mean()), codec.spec.dims),
        "label_bits_per_image": float(held_out.label_nats.mean()) / LN2,
    }


def write_comparison(
    run: RunFolder, result: Mapping[str, Any], figures: Sequence[Figure], curves: Sequence[Mapping[str, Any]]
) -> dict[str, str]:
    """Write compare.json, compare.md, report.html and the grids; returns their paths."""
    folder = run.compare
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "compare.json", result)
    write_text(folder / "compare.md", to_markdown(result))
    write_bytes(folder / "bits.png", bits_chart(result["rows"], kind="png"))
    write_page(folder / "report.html", result, figures, curves, highlights(result["rows"]))
    return {name: str(folder / f"{name}") for name in ("report.html", "compare.json", "compare.md")}


def highlights(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the table says, in sentences: the best prior per level, and any that is no better than unigram."""
    sentences = []
    by_level: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_level.setdefault(row["level"], []).append(row)
    for level, group in by_level.items():
        unigram = next(row["bits_per_code"] for row in group if row["prior"] == "unigram")
        trained = [row for row in group if row["prior"] not in BASELINES and row["bits_per_code"] is not None]
        where = "over all levels" if level == "all" else f"at level {level}"
        for row in trained:
            if row["bits_per_code"] >= unigram:
                sentences.append(
                    f"{row['prior']} is no better than counting codes (unigram) {where}: "
                    f"{row['bits_per_code']:.3f} against {unigram:.3f} bits/code."
                )
        if trained:
            best = min(trained, key=lambda row: row["bits_per_code"])
            sign = "<= " if best["likelihood"] == "bound" else ""
            sentences.append(
                f"Fewest bits {where}: {best['prior']}, {sign}{best['bits_per_code']:.3f} bits/code "
                f"(unigram {unigram:.3f})."
            )
    return sentences
