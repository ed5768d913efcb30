"""Stage two: train a prior on the code maps of one level, given the coarser ones and the label.

Teacher forcing throughout: the coarser maps are those of real images. What is learned is the density of the codes
alone; the codec is not touched and, but for its codebooks, not even read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import set_seed
from PIL import Image
from torch import Tensor

from priors import registry
from priors.base import Prior, PriorSpec
from priors.sampling import Noise
from vqgen.checkpoint import CheckpointStore
from vqgen.code_store import CodeSplit, CodeStore
from vqgen.codec import HierarchicalVQVAE
from vqgen.codes import Codes
from vqgen.config import Config
from vqgen.console import Console
from vqgen.errors import InputError, MismatchError
from vqgen.files import write_json
from vqgen.hub import fingerprint
from vqgen.images import image_grid, to_uint8
from vqgen.metrics import nats_to_bits
from vqgen.run_folder import RunFolder
from vqgen.training import Task, fit, make_accelerator

PREVIEW_IMAGES = 16
VALIDATION_SAMPLES = 16
"""Draws of a bound's estimator at each evaluation."""


class PriorTask(Task):
    """A prior of one level as the training loop sees it: batches of code maps."""

    def __init__(self, model: Prior, level: int, seed: int, preview: Callable[[Prior], Image.Image]) -> None:
        super().__init__()
        self.model: Prior = model
        self.players = model.players
        self.level = level
        self._seed = seed
        self._preview = preview

    def player_modules(self) -> dict[str, torch.nn.Module]:
        return self.model.player_modules()

    def forward(self, batch: Mapping[str, Any], player: str, progress: float, step: int) -> dict[str, Tensor]:
        codes, context, label = split_batch(batch, self.level)
        result: dict[str, Tensor] = self.model(codes, context, label, player=player, progress=progress, step=step)
        return result

    def evaluate(self, batches: Iterable[Mapping[str, Any]], reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Mean nats and bits per code over the maps given."""
        totals = torch.zeros(2, dtype=torch.float64)
        for number, batch in enumerate(batches):
            codes, context, label = split_batch(batch, self.level)
            noise = Noise(self._seed, tuple(range(number << 20, (number << 20) + len(codes))), self.level)
            density = self.model.log_prob(codes, context, label, noise=noise, samples=VALIDATION_SAMPLES)
            totals += torch.tensor([codes.numel(), -density.nats.double().sum().item()], dtype=torch.float64)
        count, nats = reduce(totals).tolist()
        return {"loss": nats / count, "bits_per_code": nats_to_bits(nats / count)}

    def preview(self) -> Image.Image | None:
        return self._preview(self.model)


def split_batch(batch: Mapping[str, Any], level: int) -> tuple[Tensor, Codes, Tensor | None]:
    """The codes of a level, the coarser codes, and the labels of a batch of the code store."""
    return batch["codes"][level], tuple(batch["codes"][:level]), batch.get("label")


def train_prior(
    run: RunFolder,
    config: Config,
    name: str,
    levels: Sequence[str] | None,
    console: Console,
    *,
    resume: bool = False,
    overwrite: bool = False,
    hint: str = "",
) -> dict[str, dict[str, Any]]:
    """Train the prior ``name`` on the given levels (default: all) of ``run``; returns the record of each level.

    Raises:
        InputError: an unknown prior or level, or a level already trained without ``resume`` or ``overwrite``.
        MismatchError: the codes are not of this codec.
    """
    registry.get(name)
    codec, store = open_codes(run)
    known = [level.name for level in store.info.levels]
    chosen = list(levels) if levels else known
    for level in chosen:
        if level not in known:
            raise InputError(f"There is no level '{level}'.", f"This run has {', '.join(known)}.")
    if overwrite:
        doomed = [run.prior_stage(name, level) for level in chosen]
        console.say(f"{run.path}: removing {', '.join(doomed)}.")
        run.remove_stages(doomed)
    taken = [level for level in chosen if run.stage(run.prior_stage(name, level))]
    if taken and not resume:
        raise InputError(
            f"{run.path} already holds a trained {name} for {', '.join(taken)}.",
            "Sample with `vqgen sample`, or redo it with --overwrite.",
        )
    begun = [
        level
        for level in chosen
        if level not in taken and CheckpointStore(run.prior(name, level) / "checkpoints", 1).latest()
    ]
    if begun and not resume:
        raise InputError(
            f"{run.path} holds a {name} for {', '.join(begun)} whose training was not finished.",
            "Go on with --resume, or start again with --overwrite.",
        )
    records = {}
    for level in known:
        if level in taken and level in chosen:
            console.say(f"{name}, {level}: already trained; nothing to do.")
            records[level] = run.stage(run.prior_stage(name, level)) or {}
        elif level in chosen:
            records[level] = train_level(run, config, name, known.index(level), codec, store, console, resume, hint)
    return records


def train_level(
    run: RunFolder,
    config: Config,
    name: str,
    level: int,
    codec: HierarchicalVQVAE,
    store: CodeStore,
    console: Console,
    resume: bool,
    hint: str,
) -> dict[str, Any]:
    """Train one prior on one level, save it in the run, and record it."""
    target = store.info.levels[level]
    section = config.priors.get(name, {})
    settings = registry.prior_settings(name, section, target.name)
    accelerator = make_accelerator(settings.training, players=len(registry.get(name).players))
    set_seed(config.seed)
    prior = registry.get(name)(settings.config, prior_spec(store, level))
    books = [quantizer.codebook.detach() for quantizer in codec.quantizers]
    prior.set_codebooks(books[level], books[:level])
    train, validation = store.split("train"), store.split("validation")
    prior.prepare(code_batches(train, level))
    folder = run.prior(name, target.name)
    parameters = sum(p.numel() for p in prior.parameters())
    console.say(f"{name}, {target.name}: {parameters:,} parameters; {len(train):,} code maps")
    record: dict[str, Any] = {"steps": 0, "seconds": 0.0, "parameters": parameters, "validation": {}}
    identity = {"prior": name, "config": settings.config.model_dump(mode="json"), "seed": config.seed}
    identity |= {"codes": store.fingerprint}
    if prior.players:
        task = PriorTask(prior, level, config.seed, lambda model: preview(codec, validation, model, level, config.seed))
        result = fit(
            task,
            train,
            validation,
            settings.training,
            folder,
            seed=config.seed,
            identity=identity,
            accelerator=accelerator,
            console=console,
            resume=resume,
            resume_hint=hint,
            description=f"{name}, {target.name}",
        )
        record |= {"steps": result.steps, "seconds": round(result.seconds, 2), "validation": result.best}
    prior.eval()
    prior.calibrate(code_batches(validation, level))
    if accelerator.is_main_process:
        prior.save_pretrained(folder)
        write_json(folder / "metrics.json", record["validation"])
        record |= {
            "fingerprint": fingerprint(folder),
            "settings": {**identity, "training": settings.training.model_dump(mode="json", exclude_none=True)},
        }
        run.record_stage(run.prior_stage(name, target.name), record)
    accelerator.wait_for_everyone()
    return record


def open_codes(run: RunFolder) -> tuple[HierarchicalVQVAE, CodeStore]:
    """The codec of a run and its codes.

    Raises:
        InputError: the run has no codec or no codes yet.
        MismatchError: the codes were made by another codec.
    """
    run.require_stage("codec", "vqgen train-codes")
    run.require_stage("codes", "vqgen train-codes --resume")
    codec = HierarchicalVQVAE.from_pretrained(run.codec)
    store = CodeStore.load(run.codes)
    if store.info.codec_fingerprint != fingerprint(run.codec):
        raise MismatchError(
            f"The codes in {run.codes} were made by another codec than the one in {run.codec}.",
            "Put back that codec, or redo the run with `vqgen train-codes --overwrite`.",
        )
    return codec, store


def prior_spec(store: CodeStore, level: int) -> PriorSpec:
    """The shapes a prior of ``level`` is made for."""
    info = store.info
    return PriorSpec(
        target=info.levels[level],
        context=info.levels[:level],
        classes=len(info.class_names) if store.labelled else 0,
        class_names=info.class_names if store.labelled else (),
        codec_fingerprint=info.codec_fingerprint,
    )


def code_batches(split: CodeSplit, level: int, size: int = 512) -> Iterator[tuple[Tensor, Codes, Tensor | None]]:
    """(codes, context, label) of a whole split in its order, as `Prior.prepare` takes them."""
    for start in range(0, len(split), size):
        yield split_batch(split.__getitems__(range(start, min(start + size, len(split)))), level)


def preview(codec: HierarchicalVQVAE, validation: CodeSplit, prior: Prior, level: int, seed: int) -> Image.Image:
    """Validation reconstructions above the same images with this level sampled (coarser levels real, finer absent)."""
    count = min(PREVIEW_IMAGES, len(validation))
    batch = validation.__getitems__(range(count))
    device = next(prior.parameters()).device
    codes, context, label = split_batch(batch, level)
    context = tuple(c.to(device) for c in context)
    label = None if label is None else label.to(device)
    sampled = prior.sample(Noise(seed, tuple(range(count)), level), context, label).cpu()
    context = tuple(c.cpu() for c in context)
    with torch.no_grad():
        rows = torch.cat([codec.decode((*context, codes)), codec.decode((*context, sampled))])
    return image_grid(to_uint8(rows), columns=count)
