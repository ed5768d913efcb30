"""Images to one small file: the codec makes codes of them, and a prior tells the entropy coder what to expect.

The loss is the codec's alone: `pipelines.decompress` gives back every code as it was. What is in the file and why it
can be read is `pipelines.compression`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipelines.compression.coder import Sender
from pipelines.compression.format import Content, Header, NamedPrior, level_shapes, pack, payload_bytes
from pipelines.compression.labels import Labelling, labelling
from pipelines.compression.models import Model, choose_priors, load_models, short_print, this_machine
from pipelines.compression.walk import Images, Walk, steady_arithmetic
from pipelines.diagnosis.codec_figures import MOST_PSNR
from pipelines.encode import fitted_to
from pipelines.settings import run_settings
from vqgen.checkpoint import preserved_random_state
from vqgen.codec import HierarchicalVQVAE
from vqgen.codes import ImageSpec
from vqgen.config import DataSettings
from vqgen.console import Console
from vqgen.data import ImageData, load_data
from vqgen.errors import InputError, did_you_mean
from vqgen.files import require_writable, write_bytes
from vqgen.images import to_float
from vqgen.metrics import psnr
from vqgen.run_folder import RunFolder
from vqgen.splits import SPLITS

ALL = "all"
"""The splits one after another."""


class Source(NamedTuple):
    """Images to be compressed: the first of the splits named."""

    data: ImageData
    splits: tuple[str, ...]
    total: int
    notes: tuple[str, ...] = ()
    """What was done to the images, a sentence each."""


class Written(NamedTuple):
    """A file's bytes, and what its parts cost: bits over all images."""

    content: bytes
    bits: dict[str, float]
    """``codes`` and ``labels`` at their own bits, and what came on top: ``integers`` by probabilities becoming whole
    numbers, ``checks`` the checksum of each image, ``coder`` the coder's own rounding, ``header`` the rest."""
    psnr: float | None
    """Mean over the images in dB, one that comes back as it was counted as `MOST_PSNR`; None without images."""


@preserved_random_state()
def compress(
    run: RunFolder,
    out: Path,
    console: Console,
    *,
    chosen: Mapping[str, str] | None = None,
    source: str | None = None,
    split: str = "test",
    images: int | None = None,
    labels: bool = True,
    batch_size: int = 64,
) -> dict[str, Any]:
    """Write the images of a split as one file at ``out``.

    Args:
        chosen: the prior of each level; None takes the best trained.
        source: a data source; None is the run's own.
        split: a split of it, or ``all``.
        images: how many, from the first on; None: all.
        labels: whether labels are used where the images have them (`pipelines.compression.labels`).
        batch_size: images that are coded at once, on both sides.

    Returns:
        Sizes, the bits that the priors themselves give the images, what came on top, and PSNR in dB.

    Raises:
        InputError: ``out`` exists, a source that cannot be used, or priors that cannot do this.
        MismatchError: a prior of another codec.
    """
    require_writable(out)
    if out.exists():
        raise InputError(f"{out} already exists.", "Name another file with --out, or remove that one.")
    run.require_stage("codec", "train-codes --resume")
    codec = HierarchicalVQVAE.from_pretrained(run.codec)
    priors = choose_priors(run, chosen or {}, [level.name for level in codec.levels])
    models = load_models(run, priors, codec)
    found = _source(run, codec, source, split, images, console)
    treatment = labelling([model.prior for model in models], found.data, labels)
    if treatment.notice:
        console.say(treatment.notice)
    start = time.perf_counter()
    with steady_arithmetic():
        written = write(codec, short_print(run.codec), models, found, treatment, batch_size, console)
    write_bytes(out, written.content)
    described = {
        "file": str(out),
        "source": found.data.source,
        "split": split,
        "priors": {m.prior.spec.target.name: {"name": m.prior.name, "fingerprint": m.fingerprint} for m in models},
        "labels": treatment.kind,
        "notes": [note for note in (*found.notes, treatment.notice) if note],
    }
    figures = sizes(written, found.total, codec.spec)
    return {**described, **figures, "seconds": round(time.perf_counter() - start, 2), "made_with": this_machine()}


def _source(
    run: RunFolder, codec: HierarchicalVQVAE, source: str | None, split: str, images: int | None, console: Console
) -> Source:
    known = (*SPLITS, ALL)
    if split not in known:
        hint = f"{did_you_mean(split, known)} Known: {', '.join(known)}.".strip()
        raise InputError(f"There is no split '{split}'.", hint)
    config = run_settings(run)
    settings = config.data if source is None or source == config.data.source else DataSettings(source=source)
    names = SPLITS if split == ALL else (split,)
    data = load_data(fitted_to(codec, settings), config.seed, notify=console.say, splits=names)
    unread = [f"{name} (" for name in SPLITS if name not in names]
    notes = tuple(note for note in data.notes if not note.startswith(tuple(unread)))  # carved, but not read
    for note in notes:
        console.say(f"{data.source}: {note}.")
    total = sum(len(data.splits[name]) for name in names)
    return Source(data, names, total if images is None else min(images, total), notes)


def _batches(source: Source, size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Images uint8 (N, C, H, W) and labels of the source, none mirrored, ``size`` at a time; the last batch fewer."""
    splits = [source.data.splits[name] for name in source.splits]
    for own in splits:
        own.set_epoch(None)
    for start in range(0, source.total, size):
        stop = min(start + size, source.total)
        parts, first = [], 0
        for own in splits:
            places = range(max(start - first, 0), min(stop - first, len(own)))
            if places:
                parts.append(own.__getitems__(places))
            first += len(own)
        label = torch.cat([part["label"] for part in parts]) if "label" in parts[0] else None
        yield torch.cat([part["images"] for part in parts]), label


def write(
    codec: HierarchicalVQVAE,
    codec_print: str,
    models: list[Model],
    source: Source,
    treatment: Labelling,
    batch_size: int,
    console: Console,
) -> Written:
    """The file of ``source``, under `steady_arithmetic`; a source without images is a file without images."""
    priors = [model.prior for model in models]
    batch = max(min(batch_size, source.total), 1)
    classes = 0 if treatment.kind == "none" else priors[0].spec.classes
    sender = Sender()
    walk = Walk(priors, sender, batch, classes)
    quality = []
    with console.progress("compressing", source.total, "images") as progress:
        for images, given in _batches(source, batch):
            pixels = to_float(images)
            codes = codec.encode(pixels)
            quality.append(psnr(codec.decode(codes), pixels).clamp(max=MOST_PSNR))
            walk.images(len(images), Images(codes, treatment.labels(priors, codes, given)), progress.advance)
    header = Header(
        codec=codec_print,
        priors=tuple(NamedPrior(name=model.prior.name, fingerprint=model.fingerprint) for model in models),
        levels=level_shapes(codec.levels),
        image=(codec.spec.channels, codec.spec.height, codec.spec.width),
        images=source.total,
        batch=batch,
        classes=classes,
        labels=treatment.kind,
        made_with=this_machine(),
    )
    content = pack(Content(header, sender.words(), walk.checks.digest))
    labels = float(torch.tensor(max(classes, 1), dtype=torch.float64).log2()) * source.total
    payload = 8 * payload_bytes(content)
    bits = {
        "codes": sender.prior_bits,
        "labels": labels,
        "integers": sender.integer_bits - sender.prior_bits,
        "checks": float(source.total),
        "coder": payload - sender.integer_bits - labels - source.total,
        "header": 8.0 * len(content) - payload,
    }
    return Written(content, bits, float(torch.cat(quality).mean()) if quality else None)


def sizes(written: Written, images: int, image: ImageSpec) -> dict[str, Any]:
    """The figures of a file; those per image are None without images.

    ``prior_bits`` are what the priors and the labels come to in theory, ``overhead`` the share of them that the file
    is larger; ``ratio`` is to the 8-bit pixels.
    """
    size = len(written.content)
    theory = written.bits["codes"] + written.bits["labels"]
    each: dict[str, float | None] = dict.fromkeys(
        ("bytes_per_image", "bits_per_image", "bits_per_pixel", "prior_bits_per_image", "ratio", "overhead")
    )
    if images:
        bits = 8 * size / images
        each = {
            "bytes_per_image": bits / 8,
            "bits_per_image": bits,
            "bits_per_pixel": bits / (image.height * image.width),
            "prior_bits_per_image": theory / images,
            "ratio": 8 * image.dims / bits,
            "overhead": 8 * size / theory - 1 if theory else None,
        }
    return {
        "images": images,
        "bytes": size,
        "raw_bytes": image.dims * images,
        **each,
        "prior_bits": theory,
        "bits": written.bits,
        "psnr": written.psnr,
    }
