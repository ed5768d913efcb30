"""Originals beside their reconstructions, level by level: what each level holds (VQ-VAE-2, figure 3)."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from pipelines.encode import fitted_to
from pipelines.processes import join
from pipelines.settings import run_settings
from pipelines.train_codes import some_images
from vqgen.codec import HierarchicalVQVAE
from vqgen.console import Console
from vqgen.data import load_data
from vqgen.files import write_json
from vqgen.images import image_grid, save_png, to_float, to_uint8
from vqgen.metrics import mse, psnr
from vqgen.run_folder import RunFolder
from vqgen.splits import check_split


def reconstruct(
    run: RunFolder, source: str | None, split: str, count: int, out: Path | None, console: Console
) -> dict[str, Any]:
    """Draw ``count`` images of a split beside what the coarsest levels, and all, make of them.

    Writes grid.png and reconstruct.json to ``out`` (default: ``reconstruct`` in the run). The figures are the
    mean squared error and PSNR in dB on the [0, 1] pixel scale over the images drawn.

    Raises:
        InputError: an unknown split, or the run has no codec yet.
    """
    check_split(split)
    run.require_stage("codec", "train-codes --resume")
    codec = HierarchicalVQVAE.from_pretrained(run.codec).to(join().device)
    config = run_settings(run, source=source)
    data = load_data(fitted_to(codec, config.data), config.seed, notify=console.say)
    data.splits[split].set_epoch(None)
    originals = some_images(data.splits[split], count)
    targets = to_float(originals).to(next(codec.parameters()).device)
    columns, figures = [originals], {}
    with torch.no_grad():
        codes = codec.encode(targets)
        for depth, name in enumerate(depth_names(codec), start=1):
            made = codec.decode(codes[:depth])
            columns.append(to_uint8(made).cpu())
            figures[name] = {"mse": float(mse(made, targets).mean()), "psnr": float(psnr(made, targets).mean())}
    folder = out or run.path / "reconstruct"
    rows = torch.stack(columns, dim=1).flatten(0, 1)
    captions = ["original", *depth_captions(codec)]
    save_png(folder / "grid.png", image_grid(rows, columns=len(columns), column_names=captions))
    record: dict[str, Any] = {"split": split, "images": len(originals), "levels": figures}
    if untrained_depths(codec):
        record["note"] = untrained_depths(codec)
        console.say(record["note"])
    write_json(folder / "reconstruct.json", record)
    return {**record, "grid": str(folder / "grid.png")}


def depth_names(codec: HierarchicalVQVAE) -> list[str]:
    """What the codec can be decoded from, from the coarsest level alone to all: ``top``, ``top+bottom``."""
    return list(accumulate((level.name for level in codec.levels), lambda some, name: f"{some}+{name}"))


def depth_captions(codec: HierarchicalVQVAE) -> list[str]:
    """`depth_names` for people: the last of several is all levels."""
    names = depth_names(codec)
    return names if len(names) == 1 else [*names[:-1], "all levels"]


def untrained_depths(codec: HierarchicalVQVAE) -> str:
    """What is to be said where the decoder never met a part of the levels in training; else nothing."""
    if codec.config.level_dropout > 0 or len(codec.levels) == 1:
        return ""
    return "Decoding from a part of the levels was not trained for (codec.level_dropout is 0)."
