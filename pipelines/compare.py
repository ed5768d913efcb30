"""Comparing priors: the same frozen codes, the same held-out images, one unit.

Every figure is of the test split, which no training and no choice of settings has read. A prior's bits are exact where
it has a likelihood in closed form, and an upper bound (``<=``) where it estimates one; bits/dim adds the label's bits
and the decoder's term and is always an upper bound on the bits of the (resized, 8-bit) pixels.

This is the stage, read top to bottom; its parts are `pipelines.comparison_training` (what is trained first),
`pipelines.likelihood` and `pipelines.comparison_rows` (bits and cost), `pipelines.comparison_quality` (samples and
anchors), `pipelines.comparison_figures` (pictures) and `pipelines.comparison_files` (what is written).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pipelines.code_sources import decoded, neighbour_codes, random_codes
from pipelines.comparison_figures import Material, comparison_sections
from pipelines.comparison_files import provenance, write_comparison
from pipelines.comparison_quality import (
    SHOWN,
    QualityPlan,
    QualityRequest,
    fill_quality,
    labels_in_turn,
    measure_quality,
    plan_quality,
    quality_provenance,
    read_reference,
)
from pipelines.comparison_rows import (
    LN2,
    add_cost,
    code_size,
    learning_curves,
    reconstruction_figures,
    rows_of,
    source_row,
    unique_rows,
)
from pipelines.comparison_training import (
    TrainingRequest,
    budget_provenance,
    own_list,
    require_one_process,
    train_missing,
    training_jobs,
)
from pipelines.likelihood import HeldOut, code_density, read_held_out
from pipelines.processes import alone, join
from pipelines.quality.extractors import Extractor, open_extractor
from pipelines.report.columns import BASELINES
from pipelines.run_codes import open_codes
from pipelines.run_images import run_images
from pipelines.run_priors import fit_baseline, load_priors, trained_priors
from pipelines.sample import SampleRequest, Samples, draw_samples
from priors import registry
from priors.base import Density, Prior
from vqgen.code_store import CodeStore
from vqgen.codec import HierarchicalVQVAE
from vqgen.console import Console
from vqgen.errors import InputError
from vqgen.hub import fingerprint
from vqgen.memory import meaning, peak_memory
from vqgen.run_folder import RunFolder


def compare(
    run: RunFolder,
    chosen: Sequence[Mapping[str, str]],
    console: Console,
    *,
    images: int | None = None,
    quality: QualityRequest | None = None,
    training: TrainingRequest | None = None,
    seed: int = 0,
    source: str | None = None,
) -> dict[str, Any]:
    """Compare priors of ``run`` with each other and with the baselines; writes ``compare/`` in the run.

    The processes of a launcher share the bits and the samples; then the first one measures the samples and writes, and
    the others return nothing.

    Args:
        chosen: one prior per level for each row; empty: every prior that is trained.
        images: test images measured, evenly spread over the split; None: all.
        quality: what is measured of samples, and of how many; None: what the run allows.
        training: priors of ``chosen`` (empty: of the run's own list) that are missing are trained first.
        seed: of the samples, and of what is drawn to judge them.
        source: where the run's data is now, if it was moved.

    Returns:
        What compare.json holds (a flat row per prior and level, and ``all``), and the paths written.

    Raises:
        InputError: no prior is trained, one of ``chosen`` is not, or what is asked for of samples cannot be had.
        MismatchError: a prior was trained on other codes, or the images are not the run's.
    """
    if training is not None:
        require_one_process()
    processes = join()
    with processes.together():
        measured = _measure(run, chosen, console, images, quality, training, seed, source)
    if not processes.main:
        return {}
    with alone():
        return _conclude(run, measured, console, seed)


@dataclass(frozen=True)
class _Measured:
    """What the processes have found together."""

    codec: HierarchicalVQVAE
    store: CodeStore
    held_out: HeldOut
    plan: QualityPlan
    extractor: Extractor | None
    mixes: Mapping[str, Mapping[str, str]]
    """By name, those of trained priors."""
    full: Mapping[str, Mapping[str, str]]
    """By name, all that have a prior at every level."""
    priors: Mapping[tuple[str, str], Prior]
    densities: Mapping[tuple[str, str], Density]
    drawn: Mapping[str, Samples]
    """By name; none on any process but the first."""
    rows: Sequence[dict[str, Any]]
    notices: Sequence[str]


def _measure(
    run: RunFolder,
    chosen: Sequence[Mapping[str, str]],
    console: Console,
    images: int | None,
    quality: QualityRequest | None,
    training: TrainingRequest | None,
    seed: int,
    source: str | None,
) -> _Measured:
    """Train what is missing, then bits and samples of every row."""
    codec, store = open_codes(run)
    device = join().device
    codec.to(device)
    levels = [level.name for level in store.info.levels]
    plan = plan_quality(quality or QualityRequest(), run, store, images)
    notices = list(plan.notices)
    for notice in notices:
        console.warn(notice)
    asked = quality.extractor if quality else None
    extractor = None
    if training is not None:
        wanted = chosen or own_list(run, levels)
        # What cannot be had is refused before any training, the classifier's too.
        training_jobs(run, wanted, training)
        run_images(run, store, console, source)
        if plan.features:
            extractor = open_extractor(asked, run, codec, console, source=source)
        notices += train_missing(run, wanted, training, console)
        chosen = chosen or [*wanted, *every_trained(run, levels)]
    mixes = {mix_name(mix): mix for mix in _coarse_to_fine(chosen or every_trained(run, levels), levels)}
    mixes = {name: mix for name, mix in mixes.items() if name not in BASELINES}  # these are rows of their own
    trained = [load_priors(run, mix, codec) for mix in mixes.values()]  # and so are priors, before any other work
    if join().count > 1:
        places = {run.prior(name, level) for mix in mixes.values() for level, name in mix.items()}
        used = {str(place.relative_to(run.path)): fingerprint(place) for place in sorted(places)}
        join().require_alike({"codec": fingerprint(run.codec), "codes": store.fingerprint, "rows": mixes, **used})
    baselines = [[fit_baseline(name, store, level) for level in range(len(levels))] for name in BASELINES]
    if plan.features and extractor is None:
        extractor = open_extractor(asked, run, codec, console, source=source)
    shown = min(plan.samples, SHOWN)
    held_out = read_held_out(run, codec, store, console, images=images, pictures=shown, source=source)

    rows: list[dict[str, Any]] = []
    measured: dict[tuple[str, str], Density] = {}
    by_key: dict[tuple[str, str], Prior] = {}
    full: dict[str, Mapping[str, str]] = {}
    drawn: dict[str, Samples] = {}
    for priors in [*baselines, *trained]:
        mix = {prior.spec.target.name: prior.name for prior in priors}
        label = mix_name(mix)
        for prior in priors:
            key = (prior.name, prior.spec.target.name)
            by_key.setdefault(key, prior.to(device))
            if prior.likelihood != "none" and key not in measured:
                measured[key] = code_density(prior, held_out, levels.index(key[1]), console)
        rows += rows_of(run, label, priors, measured, held_out, codec)
        if len(priors) == len(levels):
            request = SampleRequest(mix, images=plan.samples, labels=labels_in_turn(store, plan.samples), seed=seed)
            with peak_memory(device) as memory:
                samples = draw_samples(codec, priors, store, request, console, title=f"sampling: {label}")
            full[label] = mix
            if samples is not None:
                drawn[label] = samples
                add_cost(rows, label, priors, samples, memory.grown)
    rows = unique_rows([*rows, *map(source_row, registry.SOURCES)])
    return _Measured(codec, store, held_out, plan, extractor, mixes, full, by_key, measured, drawn, rows, notices)


def _conclude(run: RunFolder, measured: _Measured, console: Console, seed: int) -> dict[str, Any]:
    """Quality of the samples, pictures and files, by one process."""
    codec, store, held_out, plan = measured.codec, measured.store, measured.held_out, measured.plan
    rows, drawn = measured.rows, measured.drawn
    reference, rests_on = None, None
    anchors: list[dict[str, Any]] = []
    if plan.measured:
        reference = read_reference(plan, measured.extractor, store, held_out, seed)
        found, anchors, steps = measure_quality(reference, codec, drawn, console)
        fill_quality(rows, found)
        rests_on = quality_provenance(reference, steps)
    material = Material(
        run=run,
        codec=codec,
        store=store,
        held_out=held_out,
        seed=seed,
        mixes=measured.full,
        priors=measured.priors,
        bits={key: -density.nats / LN2 for key, density in measured.densities.items()},
        drawn=drawn,
        sources=source_pictures(codec, store, held_out, min(plan.samples, SHOWN), seed),
        training=None if reference is None else reference.training,
    )
    result: dict[str, Any] = {
        "run": run.name,
        "rows": rows,
        "anchors": anchors,
        "reconstruction": reconstruction_figures(held_out),
        "codes": code_size(codec),
        "provenance": provenance(run, store, held_out, codec, seed)
        | {"quality": rests_on, "budget": budget_provenance(run, list(measured.mixes.values()))}
        | {"memory": meaning(next(codec.parameters()).device), "notices": list(measured.notices)},
    }
    sections = comparison_sections(material, rows, console)
    return {**result, "files": write_comparison(run, result, sections, learning_curves(run, rows))}


def _coarse_to_fine(mixes: Sequence[Mapping[str, str]], levels: Sequence[str]) -> list[dict[str, str]]:
    return [{level: mix[level] for level in levels if level in mix} for mix in mixes]


def every_trained(run: RunFolder, levels: Sequence[str]) -> list[dict[str, str]]:
    """Each trained prior over the levels it is trained on.

    Raises:
        InputError: none is trained.
    """
    trained = trained_priors(run)
    names = sorted({name for level in levels for name in trained.get(level, {}) if name not in BASELINES})
    if not trained:
        raise InputError(
            f"{run.path} has no trained prior to compare.",
            f"Train one with `{run.command('train-prior --prior transformer')}`.",
        )
    return [{level: name for level in levels if name in trained.get(level, {})} for name in names]


def mix_name(mix: Mapping[str, str]) -> str:
    """``transformer`` for one prior on every level, ``top=a,bottom=b`` for a mix."""
    names = set(mix.values())
    return names.pop() if len(names) == 1 else ",".join(f"{level}={name}" for level, name in mix.items())


def source_pictures(
    codec: HierarchicalVQVAE, store: CodeStore, held_out: HeldOut, count: int, seed: int
) -> dict[str, Tensor]:
    """Pictures of the sources that are no priors, uint8 (B, C, H, W): by name, in the order of ``registry.SOURCES``."""
    codes = held_out.codes.__getitems__(held_out.pictured)["codes"]
    found = {
        "neighbour": neighbour_codes(codec, codes),
        "random": random_codes(store.info.levels, seed, count),
    }
    return {source: decoded(codec, found[source]) for source in registry.SOURCES}
