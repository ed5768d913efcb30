"""A codec alone: how near its reconstructions come to images it has not seen, and how its codes are used.

The errors are those of the decoder's output on the scale of [0, 1], means over images, from all levels and from the
coarsest ones. Distances between sets of images are those of the 8-bit pictures. docs/evaluate.md says how to read the
figures.
"""

from __future__ import annotations

import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import vqgen
from pipelines.code_pictures import code_map_grid, reconstruction_grid
from pipelines.codec_measures import (
    Measured,
    bit_figures,
    code_figures,
    decoder_bits,
    measure,
    reconstruction_figures,
    worst_images,
)
from pipelines.encode import fitted_to, name_unreadable
from pipelines.likelihood import measured_batches
from pipelines.processes import Result, join
from pipelines.quality.extractors import Extractor, check_extractor, open_extractor
from pipelines.quality.measures import MINIMUM_IMAGES
from pipelines.reconstruct import depth_captions, untrained_depths
from pipelines.report.codec_charts import use_chart
from pipelines.run_images import own_images
from pipelines.settings import run_settings
from vqgen.codec import HierarchicalVQVAE
from vqgen.config import DataSettings
from vqgen.console import Console
from vqgen.data import ImageData, load_data
from vqgen.errors import InputError, MismatchError
from vqgen.feature_distances import frechet_distance
from vqgen.files import require_writable, write_bytes, write_json
from vqgen.hub import fingerprint
from vqgen.image_split import ImageSplit, spread
from vqgen.images import save_png, to_float, to_uint8
from vqgen.metrics import CodeUsage
from vqgen.run_folder import RunFolder
from vqgen.splits import check_split

RECORD = "evaluate.json"
SHOWN = 8
"""Images in each picture."""


def evaluate(
    run: RunFolder,
    console: Console,
    *,
    source: str | None = None,
    split: str = "test",
    images: int | None = None,
    extractor: str | None = None,
    out: Path | None = None,
) -> dict[str, Any]:
    """Measure the codec of ``run``; writes evaluate.json and pictures to ``out`` (default: ``evaluate`` in the run).

    The processes of a launcher share the images; the first one writes, and the others return nothing.

    Args:
        source: other images, resized as the codec needs them; or where the run's own are now.
        images: how many of the split are measured, evenly spread over it; None: all.
        extractor: of the Frechet distance; None: ``classifier`` where the run is labelled, else ``codec``, and none
            where there are too few images.

    Returns:
        What evaluate.json holds, and the paths written.

    Raises:
        InputError: an unknown split or extractor, no codec yet, or too few images for an extractor that was named.
        MismatchError: without ``source``, the images are not those the codec was trained on.
    """
    with join().together():
        return _evaluate(run, console, source, split, images, extractor, out or run.evaluate)


def _evaluate(
    run: RunFolder,
    console: Console,
    source: str | None,
    split: str,
    images: int | None,
    extractor: str | None,
    folder: Path,
) -> dict[str, Any]:
    processes = join()
    check_split(split)
    check_extractor(extractor)
    if processes.main:
        require_writable(folder / RECORD)
    run.require_stage("codec", "train-codes --resume")
    codec = HierarchicalVQVAE.from_pretrained(run.codec).to(processes.device).eval()
    config = run_settings(run)
    data, own = open_images(run, codec, source, console)
    measured_split = data.splits[split]
    measured_split.set_epoch(None)
    indices = spread(np.arange(len(measured_split)), images or len(measured_split))
    processes.require_alike({"codec": fingerprint(run.codec), "images": [data.fingerprint, len(measured_split)]})
    notes = notes_on(codec, data, split, own, len(indices))
    reader, least = None, MINIMUM_IMAGES["frechet"]
    if len(indices) < least:
        missing = f"Too few images for the Frechet distance: {len(indices)}; at least {least} are needed."
        if extractor is not None:
            raise InputError(missing, "Give more images with -n, or leave --extractor out.")
        notes.append(f"{missing} It is left out.")
    else:
        reader = open_extractor(extractor, run, codec, console, source=source if own else None)
    for note in notes:
        console.say(note)
    measured = measure(codec, measured_split, indices, reader, console)
    name_unreadable(measured_split)
    frechet = frechet_figures(measured, data, split, reader, console)
    if not processes.main:
        return {}
    record = {
        "run": run.name,
        "split": split,
        "images": len(indices),
        "reconstruction": reconstruction_figures(measured),
        "decoder_bits_per_dim": decoder_bits(codec, measured),
        "frechet": frechet,
        "codes": code_figures(codec, measured.usage),
        "bits": bit_figures(codec, measured.usage),
        "worst": worst_images(measured, indices),
        "notes": notes,
        "provenance": {
            "vqgen": vqgen.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "command": shlex.join(["vqgen", *sys.argv[1:]]),
            "seed": config.seed,
            "codec_fingerprint": fingerprint(run.codec),
            "source": data.source,
            "own_images": own,
            "data_fingerprint": data.fingerprint,
            "images_available": len(measured_split),
            "pixel_variance": measured.variance,
            "extractor": None if reader is None else reader.name,
            "weights": None if reader is None else reader.fingerprint,
            "width": None if reader is None else reader.width,
        },
    }
    shown = spread(np.asarray(indices), SHOWN)
    return {**record, "files": write_evaluation(folder, record, codec, measured_split, shown, measured.usage)}


def open_images(
    run: RunFolder, codec: HierarchicalVQVAE, source: str | None, console: Console
) -> tuple[ImageData, bool]:
    """The images of ``source`` as the codec takes them, and whether they are those it was trained on.

    Raises:
        InputError: the source cannot be used.
        MismatchError: without ``source``, they are other images.
    """
    config = run_settings(run)
    if source is None:
        data = load_data(fitted_to(codec, config.data), config.seed, notify=console.say)
        if data.fingerprint != run.read()["data"].get("fingerprint"):
            raise MismatchError(
                f"The images of '{config.data.source}' are not the ones that {run.path} was made from.",
                "Say where those are with --data; or name other images with it, to measure the codec on them.",
            )
        return data, True
    own = own_images(run, source, console)
    if own is not None:
        return own, True
    other = DataSettings(source=source, labels=False)
    return load_data(fitted_to(codec, other), config.seed, notify=console.say), False


def notes_on(codec: HierarchicalVQVAE, data: ImageData, split: str, own: bool, count: int) -> list[str]:
    """What is to be known of the images before the figures are read, a sentence each."""
    notes = [f"{data.source}: {note}" for note in data.notes]
    if own and split == "train":
        notes.append("These are images that the codec was trained on: take --split test for images it has not seen.")
    if not own:
        notes.append(f"These are other images than the codec was trained on ({count:,} of '{data.source}').")
    return [*notes, untrained_depths(codec)] if untrained_depths(codec) else notes


def frechet_figures(
    measured: Measured, data: ImageData, split: str, reader: Extractor | None, console: Console
) -> dict[str, Any] | None:
    """The Frechet distance of the reconstructions from the images, and its anchor: that of as many training images.

    The anchor is null where the images are the training images themselves, or these are too few.
    """
    if reader is None or measured.features is None:
        return None
    of_images, of_made = measured.features
    train = data.splits["train"]
    count = min(len(train), len(of_images))
    anchor = None
    if split != "train" and count >= MINIMUM_IMAGES["frechet"]:
        train.set_epoch(None)

        def features(span: Sequence[int]) -> Result:
            return {"features": reader.features(train.__getitems__(span)["images"])}

        places = spread(np.arange(len(train)), count)
        found = measured_batches(places, 128, features, "training images, for comparison", console)
        held_against = of_images[spread(np.arange(len(of_images)), count)]
        anchor = frechet_distance(held_against, found["features"])
    return {
        "reconstructions": frechet_distance(of_images, of_made),
        "images": len(of_images),
        "training_images": anchor,
        "training_images_count": None if anchor is None else count,
        "extractor": reader.name,
    }


def write_evaluation(
    folder: Path,
    record: Mapping[str, Any],
    codec: HierarchicalVQVAE,
    split: ImageSplit,
    shown: Sequence[int],
    usage: Sequence[CodeUsage],
) -> dict[str, str]:
    """Write the pictures and evaluate.json; returns the paths."""
    images, codes, made = reconstructed(codec, split, shown)
    names = [f"{split.name}:{index}" for index in shown]
    save_png(folder / "reconstructions.png", reconstruction_grid(images, made, depth_captions(codec), names))
    save_png(folder / "code_maps.png", code_map_grid(codec, images, codes))
    worst = record["worst"]
    images, codes, made = reconstructed(codec, split, [image["index"] for image in worst])
    names = [f"{split.name}:{image['index']}, mse {image['mse']:.2g}" for image in worst]
    save_png(folder / "worst.png", reconstruction_grid(images, made, depth_captions(codec), names))
    counts = {spec.name: counted.counts for spec, counted in zip(codec.levels, usage, strict=True)}
    write_bytes(folder / "use.png", use_chart(counts, kind="png"))
    write_json(folder / RECORD, record)
    files = (RECORD, "reconstructions.png", "worst.png", "code_maps.png", "use.png")
    return {name: str(folder / name) for name in files}


@torch.no_grad()
def reconstructed(
    codec: HierarchicalVQVAE, split: ImageSplit, indices: Sequence[int]
) -> tuple[Tensor, tuple[Tensor, ...], list[Tensor]]:
    """Images (P, C, H, W) uint8, their codes, and what the coarsest levels up to all make of them, like the images."""
    images = split.__getitems__(indices)["images"]
    codes = codec.encode(to_float(images).to(next(codec.parameters()).device))
    made = [to_uint8(codec.decode(codes[:depth])).cpu() for depth in range(1, len(codec.levels) + 1)]
    return images, codes, made
