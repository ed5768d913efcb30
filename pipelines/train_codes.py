"""Stage one: train the codec on images, then encode the data with it.

Equation 3 of van den Oord et al. 2017 is the codec's own loss; this file reads the data, trains, calibrates the
decoder's likelihood on the validation split, saves, and hands over to `pipelines.encode`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from accelerate.utils import set_seed
from PIL import Image
from torch import Tensor

from pipelines.encode import encode_splits
from pipelines.settings import codec_identity, require_codec_settings, run_settings, save_settings
from vqgen.checkpoint import CheckpointStore
from vqgen.codec import HierarchicalVQVAE
from vqgen.config import Config
from vqgen.console import Console
from vqgen.data import ImageData, ImageSplit, load_data
from vqgen.errors import InputError
from vqgen.files import write_json
from vqgen.hub import fingerprint
from vqgen.images import image_grid, to_float, to_uint8
from vqgen.losses import discretized_gaussian_nats, fit_scale
from vqgen.metrics import CodeUsage, bits_per_dim, mse
from vqgen.run_folder import RunFolder
from vqgen.training import Task, fit, make_accelerator

CALIBRATION_IMAGES = 2000
PREVIEW_IMAGES = 16
STAGE = "codec"


class CodecTask(Task):
    """The codec as the training loop sees it: batches of 8-bit images."""

    def __init__(self, model: HierarchicalVQVAE, preview_images: Tensor) -> None:
        super().__init__()
        self.model: HierarchicalVQVAE = model
        self.players = ("model",)
        self._preview_images = preview_images

    def forward(self, batch: Mapping[str, Any], player: str, progress: float, step: int) -> dict[str, Tensor]:
        result = self.model(to_float(batch["images"]))
        return {"loss": result.loss, **result.metrics}

    def after_step(self, player: str, step: int) -> dict[str, Tensor]:
        return self.model.update(step)

    def evaluate(self, batches: Iterable[Mapping[str, Any]], reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Means over the images given; perplexity and usage over all their codes, per level."""
        usage = [CodeUsage(level.codebook_size) for level in self.model.levels]
        totals = torch.zeros(3, dtype=torch.float64)
        for batch in batches:
            images = to_float(batch["images"])
            result = self.model(images)
            count = len(images)
            squared = mse(result.images.clamp(-1, 1), images).sum()
            totals += torch.tensor([count, count * result.loss.item(), squared.item()], dtype=torch.float64)
            for level, codes in zip(usage, result.codes, strict=True):
                level.add(codes)
        device = next(self.model.parameters()).device
        count, loss, squared = reduce(totals.float().to(device)).tolist()
        error = squared / count
        figures = {"loss": loss / count, "mse": error, "psnr": -10 * math.log10(max(error, 1e-12))}
        for spec, level in zip(self.model.levels, usage, strict=True):
            level.counts.copy_(reduce(level.counts.to(device)).to(level.counts.device))
            figures[f"{spec.name}_perplexity"] = level.perplexity
            figures[f"{spec.name}_usage"] = level.usage
        return figures

    def preview(self) -> Image.Image | None:
        """Validation images above their reconstructions."""
        device = next(self.model.parameters()).device
        images = self._preview_images.to(device)
        made = to_uint8(self.model.decode(self.model.encode(to_float(images))))
        return image_grid(torch.cat([images, made]).cpu(), columns=len(images))


def train_codes(
    run: RunFolder, config: Config, console: Console, *, resume: bool = False, overwrite: bool = False, hint: str = ""
) -> dict[str, Any]:
    """Train the codec of ``run``, save it, and encode every split; returns the stage's record.

    Raises:
        InputError: the run already holds a codec and neither ``resume`` nor ``overwrite`` is given.
        ConfigError: ``resume`` with settings other than the run's.
    """
    if overwrite and run.exists:
        doomed = [*run.stages(), "samples", "compare", "reconstruct"]
        console.say(f"{run.path}: removing {', '.join(doomed)}.")
        run.remove_stages(list(dict.fromkeys(["codec", "codes", *doomed])))
    done = run.stage(STAGE)
    if done and not resume:
        raise InputError(
            f"{run.path} already holds a trained codec.",
            "Go on with `vqgen train-prior`, name another run with --run, or redo everything with --overwrite.",
        )
    if not done and not resume and CheckpointStore(run.codec / "checkpoints", 1).latest():
        raise InputError(
            f"{run.path} holds a codec whose training was not finished.",
            "Go on with --resume, or start again with --overwrite.",
        )
    if run.config.is_file() and resume:
        require_codec_settings(run, run_settings(run), config)
    if done and run.stage("codes"):
        console.say(f"{run.path}: the codec is trained and the data encoded; nothing to do.")
        return done
    data = load_data(config.data, config.seed, notify=console.say)
    settings = config.codec.training
    accelerator = make_accelerator(settings, players=1)
    set_seed(config.seed)
    codec = HierarchicalVQVAE(config.codec.architecture, data.image)
    if not done:
        if accelerator.is_main_process:
            run.create()
            save_settings(run, config)
            run.record_data({"description": data.description, "fingerprint": data.fingerprint})
        console.say(describe(codec, data))
        validation = data.splits["validation"]
        task = CodecTask(codec, first_images(validation, PREVIEW_IMAGES))
        result = fit(
            task,
            data.splits["train"],
            validation,
            settings,
            run.codec,
            seed=config.seed,
            identity=codec_identity(config),
            accelerator=accelerator,
            console=console,
            resume=resume,
            resume_hint=hint,
            description="codec",
        )
        codec.to(accelerator.device).eval()
        figures = calibrate(codec, validation, settings.batch_size, console)
        done = {
            "steps": result.steps,
            "seconds": round(result.seconds, 2),
            "parameters": sum(p.numel() for p in codec.parameters()),
            "validation": {**result.best, **figures},
        }
        if accelerator.is_main_process:
            codec.save_pretrained(run.codec)
            write_json(run.codec / "metrics.json", done["validation"])
            done["fingerprint"] = fingerprint(run.codec)
            run.record_stage(STAGE, done)
    else:
        codec = HierarchicalVQVAE.from_pretrained(run.codec).to(accelerator.device)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        usage = encode_splits(run.codes, codec, fingerprint(run.codec), data, console, settings.batch_size)
        run.record_stage("codes", usage)
        for spec in codec.levels:
            console.say(usage[spec.name]["verdict"])
    accelerator.wait_for_everyone()
    return done


def calibrate(codec: HierarchicalVQVAE, validation: ImageSplit, batch_size: int, console: Console) -> dict[str, float]:
    """Fit the decoder's scale on validation images; returns its bits/dim on the same images.

    The discretised Gaussian of `vqgen.losses`; at most 2,000 images are read.
    """
    device = next(codec.parameters()).device
    count = min(len(validation), CALIBRATION_IMAGES)
    pairs = []
    with torch.no_grad(), console.progress("decoder scale", count, "images") as progress:
        for start in range(0, count, batch_size):
            images = validation.__getitems__(range(start, min(start + batch_size, count)))["images"]
            means = codec.decode(codec.encode(to_float(images).to(device))).cpu()
            pairs.append((images, means))
            progress.advance(len(images))
    scale = fit_scale(pairs, codec.spec.channels)
    codec.decoder_scale.copy_(scale)
    nats = torch.cat([discretized_gaussian_nats(images, means, scale) for images, means in pairs])
    return {"decoder_bits_per_dim": bits_per_dim(float(nats.mean()), codec.spec.dims)}


def first_images(split: ImageSplit, count: int) -> Tensor:
    images: Tensor = split.__getitems__(range(min(count, len(split))))["images"]
    return images


def describe(codec: HierarchicalVQVAE, data: ImageData) -> str:
    """One line on the data and one on the codec, for the console."""
    maps = ", ".join(f"{s.name} {s.height}x{s.width} of {s.codebook_size}" for s in codec.levels)
    parameters = sum(p.numel() for p in codec.parameters())
    return f"data: {data.description}\ncodec: {parameters:,} parameters; codes {maps}"
