"""Stage one: train the codec on images, then encode the data with it.

The loss is the codec's own (eq. 3 of van den Oord et al. 2017). This file reads the data, trains, calibrates the
decoder's likelihood on the validation split, saves, and hands over to `pipelines.encode`.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.codec_task import CodecTask, DiscriminatedCodecTask
from pipelines.encode import encode_splits
from pipelines.info import next_command
from pipelines.processes import Processes, join
from pipelines.settings import require_codec_settings, run_settings, save_settings
from vqgen.checkpoint import CheckpointStore, preserved_random_state, seed_random_state
from vqgen.codec import HierarchicalVQVAE
from vqgen.config import Config
from vqgen.console import Console
from vqgen.data import ImageData, ImageSplit, load_data
from vqgen.errors import InputError, MismatchError
from vqgen.files import clear_remains, write_json
from vqgen.hub import fingerprint
from vqgen.image_split import spread
from vqgen.images import to_float
from vqgen.losses import discretized_gaussian_nats, fit_scale
from vqgen.memory import peak_memory
from vqgen.metrics import bits_per_dim
from vqgen.run_folder import RunFolder
from vqgen.training import fit, make_accelerator

CALIBRATION_IMAGES = 2000
PREVIEW_IMAGES = 16


def train_codes(
    run: RunFolder, config: Config, console: Console, *, resume: bool = False, overwrite: bool = False, hint: str = ""
) -> dict[str, Any]:
    """Train the codec of ``run``, save it, and encode every split; returns the stage's record.

    ``hint`` tells an interrupted user how to go on.

    Raises:
        InputError: the run already holds a codec, trained or begun, and neither ``resume`` nor ``overwrite`` is given;
            or another process is training it, or a prior on its codes.
        ConfigError: ``resume`` with settings other than the run's.
        MismatchError: ``resume`` with images other than the run's.
    """
    with ExitStack() as stack:
        return _train_codes(stack, run, config, console, resume, overwrite, hint)


def _train_codes(
    stack: ExitStack, run: RunFolder, config: Config, console: Console, resume: bool, overwrite: bool, hint: str
) -> dict[str, Any]:
    processes = join()
    with processes.together():
        begun = CheckpointStore(run.codec / "checkpoints", 1).latest() is not None
        found = processes.decided([run.stage("codec"), begun, run.stage("codes") is not None])
    done, begun, encoded = (None, False, False) if overwrite else found
    if (done or begun) and not resume:
        raise InputError(
            f"{run.path} already holds a {'trained' if done else 'half-trained'} codec.",
            f"Go on with `{run.command(next_command(run))}`, name another run with --run, or redo everything with "
            "--overwrite.",
        )
    finished = bool(done and encoded)
    if done or begun:
        stored = run_settings(run)
        require_codec_settings(run, stored, config)
        if finished and config.data.source == stored.data.source:
            console.say(f"{run.path}: the codec is trained and the data encoded; nothing to do.")
            return _saved(run, config, stored, done, processes)
    with processes.together():
        data = load_data(config.data, config.seed, notify=console.say)
    if (done or begun) and run.read()["data"].get("fingerprint") != data.fingerprint:
        raise MismatchError(
            f"The images of '{config.data.source}' are not those that the codec in {run.path} was trained on.",
            "Say where those are with --data, or redo the codec with --overwrite.",
        )
    if finished:
        console.say(f"{run.path}: the same images as before, now at {config.data.source}; nothing else to do.")
        return _saved(run, config, None, done, processes)
    accelerator = make_accelerator(config.codec.training, len(config.codec.players))
    if done:
        _claim(run, processes, stack)
        codec = HierarchicalVQVAE.from_pretrained(run.codec).to(accelerator.device)
    else:
        with preserved_random_state():
            seed_random_state(config.seed, 0)
            codec = HierarchicalVQVAE(config.codec.architecture, data.image)
            task = make_task(codec, config, data)
        _claim(run, processes, stack)
        with processes.together():
            if processes.main:
                if overwrite:  # only now that nothing more can be refused
                    remove_all(run, console)
                save_settings(run, config)
                notes = {"notes": list(data.notes), "values": None if data.values is None else list(data.values)}
                run.record_data({"description": data.description, "fingerprint": data.fingerprint, **notes})
        console.say(describe(codec, data))
        validation = data.splits["validation"]
        with peak_memory(accelerator.device) as memory:
            result = fit(
                task,
                data.splits["train"],
                validation,
                config.codec.training,
                run.codec,
                seed=config.seed,
                identity=identity_of(config, data),
                accelerator=accelerator,
                console=console,
                resume=resume,
                resume_hint=hint,
                description="codec",
            )
        codec.to(accelerator.device).eval()
        with processes.together():
            figures = calibrate(codec, validation, config.codec.training.batch_size, console)
        done = {
            "steps": result.steps,
            "seconds": round(result.seconds, 2),
            "peak_memory": memory.peak,
            "parameters": sum(p.numel() for p in codec.parameters()),
            "validation": {**result.best, **figures},
        }
        with processes.together():
            if processes.main:
                codec.save_pretrained(run.codec)
                write_json(run.codec / "metrics.json", done["validation"])
                done["fingerprint"] = fingerprint(run.codec)
                run.record_stage("codec", done)
    usage = encode_splits(run.codes, codec, fingerprint(run.codec), data, console, config.codec.training.batch_size)
    with processes.together():
        if processes.main:
            run.record_stage("codes", usage)
            for spec in codec.levels:
                console.say(usage[spec.name]["verdict"])
    return done


def _claim(run: RunFolder, processes: Processes, stack: ExitStack) -> None:
    """Make the run where there is none, and keep other commands from its codec until ``stack`` closes."""
    with processes.together():
        if processes.main:
            run.create()
            stack.enter_context(run.working("codec"))
            clear_remains(run.path)


def _saved(
    run: RunFolder, config: Config, stored: Config | None, record: dict[str, Any] | None, processes: Processes
) -> dict[str, Any]:
    """``record``, after the run's settings were brought up to ``config`` (priors may have changed, or a place)."""
    with processes.together():
        if config != stored and processes.main:
            save_settings(run, config)
    return record or {}


def make_task(codec: HierarchicalVQVAE, config: Config, data: ImageData) -> CodecTask:
    """What is trained: the codec alone, or against the discriminator of the settings.

    Raises:
        ConfigError: the images are too small for that discriminator.
    """
    images = some_images(data.splits["validation"], PREVIEW_IMAGES)
    adversary = config.codec.discriminator
    return DiscriminatedCodecTask(codec, images, adversary) if adversary else CodecTask(codec, images)


def identity_of(config: Config, data: ImageData) -> dict[str, Any]:
    """What a resumed training must have in common with the one it goes on with."""
    adversary = config.codec.discriminator
    return {
        "codec": config.codec.architecture.model_dump(mode="json"),
        "data": {"fingerprint": data.fingerprint, "flip": config.data.flip},
        **({"discriminator": adversary.model_dump(mode="json")} if adversary else {}),
    }


def remove_all(run: RunFolder, console: Console) -> None:
    """Remove the codec of a run and all that was made from it, after naming it."""
    made = ["priors", "classifier", "samples", "reconstruct", "compare", "diagnose", "evaluate", "scores"]
    parts = dict.fromkeys(["codec", "codes", *run.stages(), *made])
    if not run.exists:
        return
    present = [part for part in parts if (run.path / part).exists()]
    if present:
        console.say(f"{run.path}: removing {', '.join(present)}.")
    run.remove_stages(list(parts))


def calibrate(codec: HierarchicalVQVAE, validation: ImageSplit, batch_size: int, console: Console) -> dict[str, float]:
    """Fit the decoder's scale on validation images; returns its bits/dim on the same images.

    The discretised Gaussian of `vqgen.losses`; at most 2,000 images are read, evenly spread over the split.
    """
    device = next(codec.parameters()).device
    chosen = spread(np.arange(len(validation)), CALIBRATION_IMAGES)
    pairs = []
    with torch.no_grad(), console.progress("decoder scale", len(chosen), "images") as progress:
        for start in range(0, len(chosen), batch_size):
            images = validation.__getitems__(chosen[start : start + batch_size])["images"]
            means = codec.decode(codec.encode(to_float(images).to(device))).cpu()
            pairs.append((images, means))
            progress.advance(len(images))
    scale = fit_scale(pairs, codec.spec.channels)
    codec.decoder_scale.copy_(scale)
    nats = torch.cat([discretized_gaussian_nats(images, means, scale) for images, means in pairs])
    return {"decoder_bits_per_dim": bits_per_dim(float(nats.mean()), codec.spec.dims)}


def some_images(split: ImageSplit, count: int) -> Tensor:
    """At most ``count`` images of a split, evenly spread over it: (B, C, H, W) uint8."""
    images: Tensor = split.__getitems__(spread(np.arange(len(split)), count))["images"]
    return images


def describe(codec: HierarchicalVQVAE, data: ImageData) -> str:
    """One line on the data and one on the codec, for the console."""
    maps = ", ".join(f"{s.name} {s.height}x{s.width} of {s.codebook_size}" for s in codec.levels)
    parameters = sum(p.numel() for p in codec.parameters())
    return f"data: {data.description}\ncodec: {parameters:,} parameters; codes {maps}"
