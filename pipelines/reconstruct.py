"""Originals beside their reconstructions, level by level: what each level holds (VQ-VAE-2, figure 3)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pipelines.settings import run_settings
from pipelines.train_codes import first_images
from vqgen.codec import HierarchicalVQVAE
from vqgen.console import Console
from vqgen.data import load_data
from vqgen.errors import InputError
from vqgen.files import write_json
from vqgen.images import image_grid, save_png, to_float, to_uint8
from vqgen.metrics import mse, psnr
from vqgen.run_folder import RunFolder

SPLITS = ("train", "validation", "test")


def reconstruct(
    run: RunFolder, source: str | None, split: str, count: int, out: Path | None, console: Console
) -> dict[str, Any]:
    """Draw the first ``count`` images of a split beside what the coarsest levels, and all, make of them.

    Writes grid.png and reconstruct.json to ``out`` (default: ``reconstruct`` in the run). The figures are the
    mean squared error and PSNR in dB on the [0, 1] pixel scale over the images drawn.

    Raises:
        InputError: an unknown split, or the run has no codec yet.
    """
    if split not in SPLITS:
        raise InputError(f"There is no split '{split}'.", f"Known: {', '.join(SPLITS)}.")
    run.require_stage("codec", "vqgen train-codes")
    codec = HierarchicalVQVAE.from_pretrained(run.codec)
    config = run_settings(run, source=source)
    image = codec.spec
    fitted = config.data.model_copy(
        update={"image_size": (image.height, image.width), "channels": image.channels, "flip": False}
    )
    originals = first_images(load_data(fitted, config.seed, notify=console.say).splits[split], count)
    targets = to_float(originals)
    names = [level.name for level in codec.levels]
    columns, captions, figures = [originals], ["original"], {}
    with torch.no_grad():
        codes = codec.encode(targets)
        for depth in range(1, len(names) + 1):
            made = codec.decode(codes[:depth])
            caption = "+".join(names[:depth]) if depth < len(names) or depth == 1 else "all levels"
            captions.append(caption)
            columns.append(to_uint8(made))
            figures["+".join(names[:depth])] = {
                "mse": float(mse(made, targets).mean()),
                "psnr": float(psnr(made, targets).mean()),
            }
    folder = out or run.path / "reconstruct"
    folder.mkdir(parents=True, exist_ok=True)
    rows = torch.stack(columns, dim=1).flatten(0, 1)
    save_png(folder / "grid.png", image_grid(rows, columns=len(columns), column_names=captions))
    record: dict[str, Any] = {"split": split, "images": len(originals), "levels": figures}
    if codec.config.level_dropout == 0 and len(names) > 1:
        record["note"] = "decoding from a subset of the levels was not trained for (level_dropout: 0)"
    write_json(folder / "reconstruct.json", record)
    return {**record, "grid": str(folder / "grid.png")}
