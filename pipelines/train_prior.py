"""Stage two: train a prior on the code maps of each level, given the coarser ones and the label.

Teacher forcing throughout: the coarser maps are those of real images. What is learned is the density of the codes
alone; the codec is not touched and, but for its codebooks, not even read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from pipelines.processes import Processes, join
from pipelines.run_codes import as_far_as_read, check_levels, code_batches, open_codes, prior_spec, split_batch
from priors import registry
from priors.base import Prior
from priors.registry import PriorSettings
from priors.sampling import Noise
from vqgen.checkpoint import CheckpointStore, preserved_random_state, seed_random_state
from vqgen.code_store import CodeSplit, CodeStore
from vqgen.codec import HierarchicalVQVAE
from vqgen.collectives import place
from vqgen.compiling import Part
from vqgen.config import Config
from vqgen.console import Console
from vqgen.errors import ConfigError, InputError
from vqgen.files import clear_remains, write_json
from vqgen.hub import fingerprint
from vqgen.images import image_grid, to_uint8
from vqgen.memory import peak_memory
from vqgen.metrics import nats_to_bits
from vqgen.parsing import load_json
from vqgen.run_folder import RunFolder
from vqgen.training import Task, fit, make_accelerator
from vqgen.training_state import plain, refuse_differences

PREVIEW_IMAGES = 16
VALIDATION_SAMPLES = 16
"""Draws of a bound's estimator at each evaluation."""


class PriorTask(Task):
    """A prior of one level as the training loop sees it: batches of code maps."""

    def __init__(self, model: Prior, level: int, seed: int, preview: Callable[[Prior], Image.Image]) -> None:
        super().__init__()
        self.model: Prior = model
        self.players = model.players
        self.settled = model.settled
        self.level = level
        self._seed = seed
        self._preview = preview

    def player_modules(self) -> dict[str, torch.nn.Module]:
        return self.model.player_modules()

    def compilable(self) -> Sequence[Part]:
        return self.model.compilable()

    def forward(self, batch: Mapping[str, Any], player: str, progress: float, step: int) -> dict[str, Tensor]:
        codes, context, label = split_batch(batch, self.level)
        result: dict[str, Tensor] = self.model(codes, context, label, player=player, progress=progress, step=step)
        return result

    def evaluate(self, batches: Iterable[Mapping[str, Any]], reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Mean nats and bits per code; of a prior without a likelihood, the mean loss of its first player."""
        has_likelihood = self.model.likelihood != "none"
        totals = torch.zeros(2, dtype=torch.float64)
        seen = 0
        rank, processes = place()
        for batch in batches:
            codes, context, label = split_batch(batch, self.level)
            if has_likelihood:
                # Of an image's own place among those evaluated, whatever the batches and the processes.
                places = tuple(rank + processes * row for row in range(seen, seen + len(codes)))
                noise = Noise(self._seed, places, self.level)
                seen += len(codes)
                density = self.model.log_prob(codes, context, label, noise=noise, samples=VALIDATION_SAMPLES)
                nats = -density.nats.double().sum().item()
            else:
                nats = self.model(codes, context, label, player=self.players[0])["loss"].item() * codes.numel()
            totals += torch.tensor([codes.numel(), nats], dtype=torch.float64)
        count, nats = reduce(totals.float().to(self.model.device)).tolist()
        loss = nats / count
        return {"loss": loss, "bits_per_code": nats_to_bits(loss)} if has_likelihood else {"loss": loss}

    def preview(self) -> Image.Image | None:
        return self._preview(self.model)


class Job(NamedTuple):
    """A prior that is to be trained."""

    name: str
    config: Config
    """Settings of the run, with what was given for this prior over them."""
    levels: Sequence[str] = ()
    """Where; empty: on every level."""


def train_prior(
    run: RunFolder,
    config: Config,
    name: str,
    levels: Sequence[str] | None,
    console: Console,
    *,
    resume: bool = False,
    overwrite: bool = False,
    keep_finished: bool = False,
    hint: str = "",
) -> dict[str, dict[str, Any]]:
    """Train the prior ``name`` on the given levels (default: all) of ``run``; all else as in `train_priors`."""
    jobs = [Job(name, config, levels or ())]
    return train_priors(run, jobs, console, resume=resume, overwrite=overwrite, keep_finished=keep_finished, hint=hint)


def train_priors(
    run: RunFolder,
    jobs: Sequence[Job],
    console: Console,
    *,
    resume: bool = False,
    overwrite: bool = False,
    keep_finished: bool = False,
    hint: str = "",
) -> dict[str, dict[str, Any]]:
    """Train each prior of ``jobs`` on its own levels of ``run``, coarse to fine; returns the record of each level.

    What can be refused is refused before anything is removed or trained. No two jobs share a level. ``hint`` tells an
    interrupted user how to go on. ``keep_finished`` leaves a finished level as it is even where its settings were
    others, and says so.

    Raises:
        InputError: an unknown prior or level, or a level already trained without ``resume`` or ``overwrite``.
        ConfigError: a level already trained with other settings.
        MismatchError: the codes are not of this codec.
    """
    for job in jobs:
        registry.get(job.name)
    codec, store = open_codes(run)
    known = [level.name for level in store.info.levels]
    for job in jobs:
        check_levels(job.levels, known, "--level")
    chosen = {level: job for level in known for job in jobs if not job.levels or level in job.levels}
    settings = {
        level: registry.prior_settings(name, config.priors.get(name, {}), level)
        for level, (name, config, _) in chosen.items()
    }
    records: dict[str, dict[str, Any]] = {}
    processes = join()
    with processes.together():
        stages = {level: run.prior_stage(job.name, level) for level, job in chosen.items()}
        half = {level: CheckpointStore(run.path / stage / "checkpoints", 1).latest() for level, stage in stages.items()}
        own = {level: [run.stage(stage), half[level] is not None] for level, stage in stages.items()}
        found = processes.decided(own)
    for level, (name, config, _) in chosen.items():
        record, begun = found[level]
        if overwrite or not (record or begun):
            continue
        if not resume:
            state = "a trained" if record else "a half-trained"
            raise InputError(
                f"{run.path} already holds {state} {name} for level '{level}'.",
                "Go on with --resume, or redo it with --overwrite.",
            )
        if record:
            given = identity_of(name, settings[level], config.seed)
            console.say(f"{name}, {level}: already trained{_kept(record, given, run, keep_finished)}.")
            records[level] = record
    # A precision that this machine has not, a tracker, or damaged codes, are refused before anything is removed.
    for level, job in chosen.items():
        make_accelerator(settings[level].training, players=len(registry.get(job.name).players))
    with ExitStack() as stack:
        with processes.together():
            if processes.main:
                trained = [(job.name, level) for level, job in chosen.items() if level not in records]
                for split in ("train", "validation") if trained else ():
                    store.split(split).verify()
                _claim(run, trained, stack)
                for job in jobs if overwrite else ():
                    remove_prior(run, job.name, [level for level in chosen if chosen[level] is job], console)
        for level, (name, config, _) in chosen.items():
            if level not in records:
                records[level] = train_level(
                    run, name, known.index(level), settings[level], config.seed, codec, store, console, resume, hint
                )
    return records


def _claim(run: RunFolder, trained: Sequence[tuple[str, str]], stack: ExitStack) -> None:
    """Keep other commands from these priors (name, level) until ``stack`` closes, and from changing the codec."""
    if not trained:
        return
    stack.enter_context(run.working("codec", shared=True))
    for name, level in trained:
        stack.enter_context(run.working(run.prior_stage(name, level)))
    clear_remains(run.path)


def identity_of(name: str, settings: PriorSettings, seed: int) -> dict[str, Any]:
    """The settings that decide what a trained prior is."""
    config = settings.config.model_dump(mode="json")
    if config.get("scan") == "raster":  # as in trainings begun before there was such a setting
        del config["scan"]
    return {
        "prior": name,
        "config": config,
        "training": settings.training.identity(),
        "seed": seed,
    }


def _kept(record: Mapping[str, Any], given: Mapping[str, Any], run: RunFolder, keep: bool) -> str:
    try:
        refuse_differences(record["settings"], plain(given), run.path)
    except ConfigError:
        if not keep:
            raise
        return " with other settings, and kept"
    return "; nothing to do"


def remove_prior(run: RunFolder, name: str, levels: Sequence[str], console: Console) -> None:
    """Remove a prior of some levels, and samples, scores, comparison and diagnosis made with it, after naming them."""
    doomed = [run.prior_stage(name, level) for level in levels]
    for path in sorted([*run.path.glob("samples/*/sample.json"), *run.path.glob("scores/*/scores.json")]):
        try:
            used = load_json(path)["priors"]
            made_with_it = any(level in levels and prior["name"] == name for level, prior in used.items())
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            continue  # not a record of ours: not ours to remove
        doomed += [path.parent.relative_to(run.path).as_posix()] * made_with_it
    doomed += ["compare", "diagnose"]
    present = [part for part in doomed if (run.path / part).exists()]
    if present:
        console.say(f"{run.path}: removing {', '.join(present)}.")
    run.remove_stages(doomed)


def train_level(
    run: RunFolder,
    name: str,
    level: int,
    settings: PriorSettings,
    seed: int,
    codec: HierarchicalVQVAE,
    store: CodeStore,
    console: Console,
    resume: bool,
    hint: str,
) -> dict[str, Any]:
    """Train one prior on one level, save it in the run, and record it."""
    target = store.info.levels[level]
    accelerator = make_accelerator(settings.training, players=len(registry.get(name).players))
    prior = make_prior(name, settings, seed, codec, store, level, accelerator)
    train, validation = store.split("train"), store.split("validation")
    folder = run.prior(name, target.name)
    identity = identity_of(name, settings, seed)
    parameters = sum(p.numel() for p in prior.parameters())
    console.say(f"{name}, {target.name}: {parameters:,} parameters; {len(train):,} code maps")
    record: dict[str, Any] = {"steps": 0, "seconds": 0.0, "parameters": parameters, "validation": {}}
    processes = Processes.of(accelerator)
    with processes.together():
        if processes.main and not CheckpointStore(folder / "checkpoints", 1).latest():
            training = settings.training.model_dump(mode="json", exclude_none=True)
            begun = {**identity, "config": settings.config.model_dump(mode="json"), "training": training}
            write_json(folder / "settings.json", begun)
    if prior.players:
        with peak_memory(accelerator.device) as memory:
            result = fit(
                PriorTask(prior, level, seed, lambda model: preview(codec, validation, model, level, seed)),
                train,
                validation,
                settings.training,
                folder,
                seed=seed,
                identity={**identity, "codes": store.fingerprint},
                accelerator=accelerator,
                console=console,
                resume=resume,
                resume_hint=hint,
                description=f"{name}, {target.name}",
            )
        record |= {"steps": result.steps, "seconds": round(result.seconds, 2), "validation": result.best}
        record["peak_memory"] = memory.peak
    with processes.together():
        prior.eval()
        prior.calibrate(code_batches(validation, level, device=prior.device))
        if processes.main:
            prior.save_pretrained(folder)
            write_json(folder / "metrics.json", record["validation"])
            record |= {"fingerprint": fingerprint(folder), "settings": identity}
            run.record_stage(run.prior_stage(name, target.name), record)
    return record


def make_prior(
    name: str,
    settings: PriorSettings,
    seed: int,
    codec: HierarchicalVQVAE,
    store: CodeStore,
    level: int,
    accelerator: Accelerator,
) -> Prior:
    """A prior that is ready to be trained: initialised from the seed, given the codebooks, and prepared.

    Each process hands its share of the training codes to ``prepare``.
    """
    with preserved_random_state():
        seed_random_state(seed, 0)
        prior = registry.get(name)(settings.config, prior_spec(store, level))
    books = [quantizer.codebook.detach() for quantizer in codec.quantizers]
    prior.set_codebooks(books[level], books[:level])
    prior.to(accelerator.device)
    train = store.split("train")
    share = range(accelerator.process_index, len(train), accelerator.num_processes)
    batches = code_batches(train, level, share, prior.device)
    with Processes.of(accelerator).together(), as_far_as_read(batches) as read:
        prior.prepare(read)
    return prior


def preview(codec: HierarchicalVQVAE, validation: CodeSplit, prior: Prior, level: int, seed: int) -> Image.Image:
    """Validation reconstructions above the same images with this level sampled (coarser levels real, finer absent)."""
    count = min(PREVIEW_IMAGES, len(validation))
    codes, context, label = next(code_batches(validation, level, range(count), prior.device))
    sampled = prior.sample(Noise(seed, tuple(range(count)), level), context, label)
    rows = [codec.decode(tuple(c.cpu() for c in (*context, last))) for last in (codes, sampled)]
    return image_grid(to_uint8(torch.cat(rows)), columns=count)
