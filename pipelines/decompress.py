"""A file of `pipelines.compress` back to codes and pictures: every code as it was, or an error and nothing written."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from pipelines.compression.coder import OutOfStepError, Receiver
from pipelines.compression.format import MEND, Content, Header, read
from pipelines.compression.models import Model, check_can_code, load_models, short_print, this_machine
from pipelines.compression.walk import Images, Walk, WrongCodesError, steady_arithmetic
from priors.base import Prior
from vqgen.checkpoint import preserved_random_state
from vqgen.codec import HierarchicalVQVAE
from vqgen.console import Console
from vqgen.errors import InputError, MismatchError
from vqgen.files import atomic_folder, require_writable, write_json
from vqgen.images import save_png, to_pil, to_uint8
from vqgen.run_folder import RunFolder

DIGITS = 4
"""Least length of a picture's number."""


@preserved_random_state()
def decompress(file: Path, out: Path, run: RunFolder, console: Console) -> dict[str, Any]:
    """Write the images of ``file`` to the folder ``out``: 0000.png and so on, codes.safetensors and decompress.json.

    codes.safetensors has the codes of each level, (N, h, w) int64, and, where the images' own labels were stored,
    ``label`` (N,).

    Raises:
        InputError: no such file, a damaged one, or ``out`` is there already.
        MismatchError: the file was made with another codec or prior, or on a machine that rounds otherwise.
    """
    require_writable(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"{out} already exists.", "Name another folder with --out, or remove that one.")
    content = read(file)
    header = content.header
    codec, models = models_of(file, header, run)
    start = time.perf_counter()
    parts: list[Images] = []
    digits = max(DIGITS, len(str(max(header.images - 1, 0))))
    with steady_arithmetic(), atomic_folder(out) as folder:
        with console.progress("decompressing", header.images, "images") as progress:
            for images in restored(file, content, [model.prior for model in models], progress.advance):
                first = sum(len(part.codes[0]) for part in parts)
                for index, picture in enumerate(to_uint8(codec.decode(images.codes)), first):
                    save_png(folder / f"{index:0{digits}d}.png", to_pil(picture))
                parts.append(images)
        tensors = {
            level.name: torch.cat([part.codes[number] for part in parts])
            if parts
            else torch.zeros(0, level.height, level.width, dtype=torch.int64)
            for number, level in enumerate(codec.levels)
        }
        labels = [part.label for part in parts if part.label is not None]
        own_labels = header.labels == "stored" and bool(labels)
        if own_labels:
            tensors["label"] = torch.cat(labels)
        save_file(tensors, folder / "codes.safetensors")
        record = {
            "file": str(file),
            "images": header.images,
            "levels": [level.name for level in codec.levels],
            "priors": {level.name: prior.name for level, prior in zip(codec.levels, header.priors, strict=True)},
            "codec": header.codec,
            "labels": tensors["label"].tolist() if own_labels else None,
            "class_names": list(models[0].prior.spec.class_names),
            "made_with": header.made_with,
        }
        write_json(folder / "decompress.json", record)
    return {**record, "folder": str(out), "seconds": round(time.perf_counter() - start, 2)}


def models_of(file: Path, header: Header, run: RunFolder) -> tuple[HierarchicalVQVAE, list[Model]]:
    """The codec and the priors that a file was made with.

    Raises:
        MismatchError: those of ``run`` are others.
        InputError: the run lacks one, or the file's shapes are not its codec's.
    """
    run.require_stage("codec", "train-codes --resume")
    found = short_print(run.codec)
    if found != header.codec:
        raise MismatchError(
            f"{file} was made with another codec than that of {run.path}: expected {header.codec}, found {found}.",
            "Name the run it was made with, with --run.",
        )
    codec = HierarchicalVQVAE.from_pretrained(run.codec)
    if not header.fits(codec.levels, codec.spec):
        raise InputError(f"{file} is damaged: its shapes are not those of its codec.", MEND)
    chosen = {level.name: prior.name for level, prior in zip(codec.levels, header.priors, strict=True)}
    for level, name in chosen.items():
        check_can_code(name, level)
    models = load_models(run, chosen, codec)
    for model, named in zip(models, header.priors, strict=True):
        if model.fingerprint != named.fingerprint:
            raise MismatchError(
                f"{file} was made with another {named.name} of level '{model.prior.spec.target.name}' than that of "
                f"{run.path}: expected {named.fingerprint}, found {model.fingerprint}.",
                "Name the run it was made with, with --run, or put back that prior.",
            )
    if header.classes not in (0, models[0].prior.spec.classes):
        raise InputError(f"{file} is damaged: its classes are not those of its priors.", MEND)
    return codec, models


def restored(
    file: Path, content: Content, priors: Sequence[Prior], advance: Callable[[float], None]
) -> Iterator[Images]:
    """The images of a file batch by batch, under `steady_arithmetic`; the last is only given if all was right.

    Raises:
        MismatchError: probabilities are not those it was written with, though codec and priors are.
    """
    header = content.header
    receiver = Receiver(content.words)
    walk = Walk(priors, receiver, header.batch, header.classes)
    for start in range(0, header.images, header.batch):
        count = min(header.batch, header.images - start)
        try:
            images = walk.images(count, None, advance)
        except WrongCodesError as error:
            raise _rounding(file, header, start + error.row) from error
        except OutOfStepError as error:
            raise _rounding(file, header, start) from error
        if start + count == header.images:
            _check_end(file, content, receiver, walk)
        yield images
    if not header.images:
        _check_end(file, content, receiver, walk)


def _check_end(file: Path, content: Content, receiver: Receiver, walk: Walk) -> None:
    if walk.checks.digest != content.digest or not receiver.ended:
        raise _rounding(file, content.header, max(content.header.images - 1, 0))


def _rounding(file: Path, header: Header, image: int) -> MismatchError:
    near = ", or of one shortly before it," if image else ""
    return MismatchError(
        f"{file}: the codes of image {image}{near} are not those that were written; the file, "
        f"the codec and the priors are right, so this machine ({this_machine()}) rounds the probabilities otherwise "
        f"than the one that wrote it ({header.made_with}).",
        "Decompress it where it was made, or with the same vqgen, plug-ins and torch on such a processor, MKL and "
        "oneDNN set alike.",
    )
