"""Images to code maps on disk, with a codec that is already trained."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from pipelines.settings import run_settings
from vqgen.code_store import CodeStoreInfo, CodeWriter
from vqgen.codec import HierarchicalVQVAE
from vqgen.codes import Codes
from vqgen.config import DataSettings
from vqgen.console import Console
from vqgen.data import ImageData, ImageSplit, load_data
from vqgen.errors import InputError
from vqgen.hub import fingerprint
from vqgen.images import to_float
from vqgen.metrics import CodeUsage
from vqgen.run_folder import RunFolder
from vqgen.splits import SPLITS


def encode(run: RunFolder, source: str, out: Path, console: Console, batch_size: int = 128) -> dict[str, Any]:
    """Encode the images of ``source`` with the codec of ``run`` into a code store at ``out``.

    Images are resized to the codec's size and converted to its channels. Splits that are missing are carved with the
    run's seed, so that of the run's own source they are the run's.

    Returns:
        Per level, perplexity, usage and a verdict over the training split, and ``images`` per split.

    Raises:
        InputError: the run has no codec yet, the source cannot be used, or ``out`` exists.
    """
    run.require_stage("codec", "train-codes --resume")
    if out.exists():
        raise InputError(f"{out} already exists.", "Name another folder with --out, or remove that one.")
    codec = HierarchicalVQVAE.from_pretrained(run.codec).to(Accelerator().device)
    config = run_settings(run)
    settings = config.data if source == config.data.source else DataSettings(source=source)
    data = load_data(fitted_to(codec, settings), config.seed, notify=console.say)
    return encode_splits(out, codec, fingerprint(run.codec), data, console, batch_size)


def fitted_to(codec: HierarchicalVQVAE, settings: DataSettings) -> DataSettings:
    """``settings`` for images as ``codec`` takes them."""
    image = codec.spec
    return settings.model_copy(update={"image_size": (image.height, image.width), "channels": image.channels})


def encode_splits(
    folder: Path, codec: HierarchicalVQVAE, codec_fingerprint: str, data: ImageData, console: Console, batch_size: int
) -> dict[str, Any]:
    """Encode every split of ``data``, no image mirrored, into a new code store at ``folder``.

    Returns:
        Figures of the training split per level, and ``images`` per split.
    """
    info = CodeStoreInfo(
        levels=codec.levels,
        class_names=data.class_names,
        image=data.image,
        codec_fingerprint=codec_fingerprint,
        data_fingerprint=data.fingerprint,
    )
    usage = [CodeUsage(level.codebook_size) for level in codec.levels]
    counts: dict[str, int] = {}
    with CodeWriter(folder, info) as writer:
        for name in SPLITS:
            split = data.splits[name]
            split.set_epoch(None)
            counts[name] = len(split)
            with console.progress(f"encoding {name}", len(split), "images") as progress:
                for codes, labels in encoded_batches(codec, split, batch_size):
                    writer.add(name, codes, labels)
                    progress.advance(len(codes[0]))
                    if name == "train":
                        for level, level_codes in zip(usage, codes, strict=True):
                            level.add(level_codes)
    figures: dict[str, Any] = {"images": counts}
    for spec, level in zip(codec.levels, usage, strict=True):
        figures[spec.name] = {
            "perplexity": round(level.perplexity, 2),
            "usage": round(level.usage, 4),
            "verdict": level.verdict(spec.name),
        }
    return figures


@torch.no_grad()
def encoded_batches(
    codec: HierarchicalVQVAE, split: ImageSplit, batch_size: int
) -> Iterator[tuple[Codes, Tensor | None]]:
    """Code maps (each (B, h, w) int64, on the CPU) and labels of a split, in its order."""
    device = next(codec.parameters()).device
    for start in range(0, len(split), batch_size):
        batch = split.__getitems__(range(start, min(start + batch_size, len(split))))
        codes = codec.encode(to_float(batch["images"]).to(device))
        yield tuple(level.cpu() for level in codes), batch.get("label")
