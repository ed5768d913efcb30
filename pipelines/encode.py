"""Images to code maps on disk, with a codec that is already trained.

The processes of a launcher share the batches; the first one writes the codes as they come, in the order of the images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipelines.begun import Begun
from pipelines.processes import Processes, join
from pipelines.settings import run_settings
from vqgen.code_info import LABEL
from vqgen.code_store import CodeStoreInfo, CodeWriter
from vqgen.codec import HierarchicalVQVAE
from vqgen.config import DataSettings
from vqgen.console import Console
from vqgen.data import ImageData, ImageSplit, load_data
from vqgen.errors import InputError
from vqgen.hub import fingerprint
from vqgen.images import to_float
from vqgen.metrics import CodeUsage
from vqgen.run_folder import RunFolder
from vqgen.splits import SPLITS


def encode(
    run: RunFolder, source: str, out: Path, console: Console, batch_size: int = 128, *, streaming: bool = False
) -> dict[str, Any]:
    """Encode the images of ``source`` with the codec of ``run`` into a code store at ``out``.

    Images are resized to the codec's size and converted to its channels. Splits that are missing are carved with the
    run's seed, so that of the run's own source they are the run's. With ``streaming``, they are read from their shards.

    Returns:
        Per level, perplexity, usage and a verdict over the training split, and ``images`` per split.

    Raises:
        InputError: the run has no codec yet, the source cannot be used, or ``out`` exists.
    """
    run.require_stage("codec", "train-codes --resume")
    processes = join()
    with processes.together():
        if processes.main and out.exists():
            Begun(out, {}).remove()  # killed after its last act, an encoding leaves this
            raise InputError(f"{out} already exists.", "Name another folder with --out, or remove that one.")
    with processes.together():
        codec = HierarchicalVQVAE.from_pretrained(run.codec).to(processes.device)
        config = run_settings(run)
        settings = config.data if source == config.data.source else DataSettings(source=source)
        if streaming:
            settings = settings.model_copy(update={"streaming": True})
        data = load_data(fitted_to(codec, settings), config.seed, notify=console.say)
        console.say(f"data: {data.description}")
        return encode_splits(out, codec, fingerprint(run.codec), data, console, batch_size)


def fitted_to(codec: HierarchicalVQVAE, settings: DataSettings) -> DataSettings:
    """``settings`` for images as ``codec`` takes them."""
    image = codec.spec
    return settings.model_copy(update={"image_size": (image.height, image.width), "channels": image.channels})


def encode_splits(
    folder: Path, codec: HierarchicalVQVAE, codec_fingerprint: str, data: ImageData, console: Console, batch_size: int
) -> dict[str, Any]:
    """Encode every split of ``data``, no image mirrored, into a new code store at ``folder``.

    An encoding of the same images in the same batches that was stopped goes on where it was. Every process calls this
    alike; ``batch_size`` is the number of images that each of them encodes at once.

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
    processes = join()
    processes.require_alike(asdict(info))
    with processes.together():
        begun = Begun(folder, {"info": asdict(info), "batch_size": batch_size}) if processes.main else None
    with processes.together(), CodeWriter(folder, info) if processes.main else nullcontext() as writer:

        def take(name: str, encoded: Mapping[str, Tensor]) -> None:
            codes = tuple(encoded[level.name] for level in codec.levels)
            if writer is not None:
                writer.add(name, codes, encoded.get(LABEL))
            if name == "train":
                for level, level_codes in zip(usage, codes, strict=True):
                    level.add(level_codes)

        for name in SPLITS:
            split = data.splits[name]
            split.set_epoch(None)
            counts[name] = len(split)
            first = _go_on(begun, info, split, processes, partial(take, name), console)
            starts = range(first, len(split), batch_size)
            batches = [range(start, min(start + batch_size, len(split))) for start in starts]
            share = first / max(len(split), 1)
            with console.progress(f"encoding {name}", len(split) - first, "images", share=share) as progress:
                for encoded in processes.in_order(batches, partial(encode_batch, codec, split)):
                    take(name, encoded)
                    if begun is not None:
                        begun.add(name, encoded)
                    progress.advance(len(encoded[codec.levels[0].name]))
            name_unreadable(split)
    if begun is not None:
        begun.remove()
    figures: dict[str, Any] = {"images": counts}
    for spec, level in zip(codec.levels, usage, strict=True):
        figures[spec.name] = {
            "perplexity": round(level.perplexity, 2),
            "usage": round(level.usage, 4),
            "verdict": level.verdict(spec.name),
        }
    return figures


def name_unreadable(split: ImageSplit) -> None:
    """Let the first process meet the unreadable pictures that another has met, as it names and counts them for all.

    Raises:
        InputError: they are too many, together.
    """
    processes = join()
    met = processes.exchange({"places": torch.tensor(split.unreadable_places, dtype=torch.int64)})
    with processes.together():
        others = {place for part in met[1:] for place in part["places"].tolist()} - set(split.unreadable_places)
        if processes.main and others:
            split.__getitems__(sorted(others))


def _go_on(
    begun: Begun | None,
    info: CodeStoreInfo,
    split: ImageSplit,
    processes: Processes,
    take: Callable[[Mapping[str, Tensor]], None],
    console: Console,
) -> int:
    """Hand on what the first process finds encoded of a split; the first image, on every process, that is not."""

    def shapes(images: int) -> dict[str, tuple[int, ...]]:
        known: dict[str, tuple[int, ...]] = {level.name: (images, level.height, level.width) for level in info.levels}
        return {**known, LABEL: (images,)} if info.class_names else known

    images = 0
    for encoded in begun.made(split.name, shapes) if begun is not None else ():
        count = len(next(iter(encoded.values())))
        if images + count > len(split) or any(value.dtype != torch.int64 for value in encoded.values()):
            break  # the run may be a stranger's
        try:
            take(encoded)
        except ValueError:  # no codes of this codec
            break
        images += count
    if images:
        console.say(f"encoding {split.name}: going on after {images:,} images.")
    return int(processes.exchange({"images": torch.tensor(images)})[0]["images"])


@torch.no_grad()
def encode_batch(codec: HierarchicalVQVAE, split: ImageSplit, indices: Sequence[int]) -> dict[str, Tensor]:
    """Code maps (B, h, w) int64 by level, and ``label`` (B,) where there are labels, of some images of a split."""
    batch = split.__getitems__(indices)
    codes = codec.encode(to_float(batch["images"]).to(next(codec.parameters()).device))
    labels = {LABEL: batch[LABEL]} if LABEL in batch else {}
    return {level.name: maps for level, maps in zip(codec.levels, codes, strict=True)} | labels
