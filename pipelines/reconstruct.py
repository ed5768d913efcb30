"""Originals beside their reconstructions, level by level: what each level holds (VQ-VAE-2, figure 3)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from pipelines.encode import fitted_to
from pipelines.settings import run_settings
from pipelines.train_codes import some_images
from vqgen.codec import HierarchicalVQVAE
from vqgen.console import Console
from vqgen.data import load_data
from vqgen.errors import InputError, did_you_mean
from vqgen.files import write_json
from vqgen.images import image_grid, save_png, to_float, to_uint8
from vqgen.metrics import mse, psnr
from vqgen.run_folder import RunFolder
from vqgen.splits import SPLITS


def reconstruct(
    run: RunFolder, source: str | None, split: str, count: int, out: Path | None, console: Console
) -> dict[str, Any]:
    """Draw ``count`` images of a split beside what the coarsest levels, and all, make of them.

    Writes grid.png and reconstruct.json to ``out`` (default: ``reconstruct`` in the run). The figures are the
    mean squared error and PSNR in dB on the [0, 1] pixel scale over the images drawn.

    Raises:
        InputError: an unknown split, or the run has no codec yet.
    """
    if split not in SPLITS:
        hint = f"{did_you_mean(split, SPLITS)} Known: {', '.join(SPLITS)}.".strip()
        raise InputError(f"There is no split '{split}'.", hint)
    run.require_stage("codec", "train-codes --resume")
    codec = HierarchicalVQVAE.from_pretrained(run.codec).to(Accelerator().device)
    config = run_settings(run, source=source)
    data = load_data(fitted_to(codec, config.data), config.seed, notify=console.say)
    data.splits[split].set_epoch(None)
    originals = some_images(data.splits[split], count)
    targets = to_float(originals).to(next(codec.parameters()).device)
    names = [level.name for level in codec.levels]
    columns, captions, figures = [originals], ["original"], {}
    with torch.no_grad():
        codes = codec.encode(targets)
        for depth in range(1, len(names) + 1):
            made = codec.decode(codes[:depth])
            caption = "+".join(names[:depth]) if depth < len(names) or depth == 1 else "all levels"
            captions.append(caption)
            columns.append(to_uint8(made).cpu())
            figures["+".join(names[:depth])] = {
                "mse": float(mse(made, targets).mean()),
                "psnr": float(psnr(made, targets).mean()),
            }
    folder = out or run.path / "reconstruct"
    rows = torch.stack(columns, dim=1).flatten(0, 1)
    save_png(folder / "grid.png", image_grid(rows, columns=len(columns), column_names=captions))
    record: dict[str, Any] = {"split": split, "images": len(originals), "levels": figures}
    if codec.config.level_dropout == 0 and len(names) > 1:
        record["note"] = "Decoding from a part of the levels was not trained for (codec.level_dropout is 0)."
        console.say(record["note"])
    write_json(folder / "reconstruct.json", record)
    return {**record, "grid": str(folder / "grid.png")}
