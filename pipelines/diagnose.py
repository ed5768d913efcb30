"""Where a run fails, in words and pictures: the codebooks, the codec, each level's prior, the samples.

Bad samples have few causes, and each leaves its trace: a collapsed codebook in the use of its codes, a blurry codec in
its reconstructions, a prior that has not learned in its bits against counting codes, one that memorised in its training
bits against held-out ones, one that ignores what it is given in its bits when it is given something else. This file
measures, `pipelines.diagnosis` judges, and `pipelines.report.diagnosis` writes the page.

Nothing is trained, and nothing but ``diagnose/`` of the run is written. Test images are read, so figures that are
tuned on these verdicts are no longer of unseen images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import numpy as np

from pipelines.diagnosis.codec_figures import CodecFigures, measure_codebook, measure_codec
from pipelines.diagnosis.codec_verdicts import codebook_verdict, codec_verdicts
from pipelines.diagnosis.commands import Commands
from pipelines.diagnosis.curves import CurveFigures, read_curve
from pipelines.diagnosis.neighbours import Distances, MemoryFigures, compare_memory, searchable
from pipelines.diagnosis.panels import (
    COLUMNS,
    ROWS,
    Panel,
    Shown,
    nearest_panel,
    prior_panels,
    real_panels,
    sample_panels,
)
from pipelines.diagnosis.prior_figures import PriorFigures, measure_prior, sampled_bits
from pipelines.diagnosis.prior_verdicts import Evidence, prior_verdicts
from pipelines.diagnosis.record import Diagnosis, as_record
from pipelines.diagnosis.sample_verdicts import sample_verdicts
from pipelines.processes import join
from pipelines.report.diagnosis import write_diagnosis_page
from pipelines.run_codes import check_levels, open_codes
from pipelines.run_images import run_images
from pipelines.run_priors import fit_baseline
from pipelines.sample import SampleRequest, Samples, best_priors, draw_samples, load_priors, trained_priors
from pipelines.settings import run_settings
from priors.autoregressive import AutoregressivePrior
from priors.base import Prior
from priors.baselines import IndependentPrior
from vqgen.code_store import CodeStore
from vqgen.codec import HierarchicalVQVAE
from vqgen.console import Console
from vqgen.data import ImageData
from vqgen.files import atomic_folder, write_bytes, write_json
from vqgen.image_split import spread
from vqgen.run_folder import RunFolder

IMAGES = 256
"""Test images read by default: enough to tell 1 % of the bits from noise, few enough for a minute on a laptop."""
BOUND_IMAGES = 64
"""Of these, the images on which a likelihood that is estimated by sampling is measured: each costs as much as many."""
SAMPLES = 64
"""Samples that are compared with training images."""
COUNTED = 50_000
"""Most training images whose codes are counted."""


@dataclass(frozen=True)
class Subject:
    """What is looked at."""

    run: RunFolder
    codec: HierarchicalVQVAE
    store: CodeStore
    data: ImageData
    priors: Mapping[str, Prior]
    """By level, coarse to fine; not every level need have one."""
    test: Sequence[int]
    train: Sequence[int]
    """Test and training images that are measured, evenly spread over their splits."""
    seed: int

    @property
    def names(self) -> list[str]:
        """Of the levels, coarse to fine."""
        return [level.name for level in self.codec.levels]

    @property
    def covered(self) -> list[str]:
        """The coarsest levels, down to the first without a prior: those that can be sampled."""
        return list(takewhile(self.priors.__contains__, self.names))


def diagnose(
    run: RunFolder,
    chosen: Mapping[str, str],
    console: Console,
    *,
    images: int = IMAGES,
    seed: int = 0,
    source: str | None = None,
    plugins: Sequence[str] = (),
) -> dict[str, Any]:
    """Diagnose ``run``; writes ``diagnose/`` in it.

    Args:
        chosen: the prior of each level that is named; other levels take their best trained one, or none.
        images: test images measured, evenly spread over the split, and as many training images.
        seed: of the samples.
        source: where the run's data is now, if it was moved.
        plugins: files of third-party priors, for the commands that are suggested.

    Returns:
        What diagnose.json holds, and the paths written.

    Raises:
        InputError: the run has no codec or codes yet, or a prior named is not trained.
        MismatchError: the images are not the run's.
    """
    codec, store = open_codes(run)
    names = [level.name for level in store.info.levels]
    check_levels(chosen, names, "--prior")
    trained = trained_priors(run)
    mix = {**best_priors(run, [name for name in names if name in trained and name not in chosen]), **chosen}
    mix = {name: mix[name] for name in names if name in mix}
    priors = dict(zip(mix, load_priors(run, mix, codec), strict=True))
    device = join().device
    for model in (codec, *priors.values()):
        model.to(device).eval()
    data = run_images(run, store, console, source)
    test, train = (spread(np.arange(len(store.split(name))), images) for name in ("test", "train"))
    at = Subject(run, codec, store, data, priors, test, train, seed)
    found = examine(at, Commands(run, run_settings(run, source=source), plugins, source), console)
    result = as_record(run, found, mix, store, seed)
    return {**result, "files": write_diagnosis(run, result, found)}


def examine(at: Subject, commands: Commands, console: Console) -> Diagnosis:
    """Measure and judge everything."""
    run, codec, store, config = at.run, at.codec, at.store, commands.config
    console.say(f"codebooks and codec: {len(at.test):,} test images")
    counted = spread(np.arange(len(store.split("train"))), COUNTED)
    codebooks = [measure_codebook(store, level, counted) for level in range(len(at.names))]
    of_codec = measure_codec(codec, store, at.data, at.test, at.train)
    codec_curve = read_curve(run.codec, "mse")
    findings = [codebook_verdict(figures, config, level) for level, figures in enumerate(codebooks)]
    findings += codec_verdicts(of_codec, codec_curve, config)

    shown = some_test_images(at)
    measured = measure_priors(at, console)
    panels = real_panels(codec, shown) + prior_panels(codec, at.priors, shown, at.seed)
    memory: list[MemoryFigures] = []
    if at.covered:
        drawn = draw_covered(at, console)
        measured = [with_sampled(at, figures, drawn) for figures in measured]
        panels += sample_panels(codec, at.priors, drawn.codes, drawn.labels, at.seed)
        console.say("nearest training images of the samples")
        memory, nearest = find_nearest(at, drawn)
        panels.append(nearest)

    curves = [read_curve(run.prior(figures.prior, figures.level), "bits_per_code") for figures in measured]
    for figures, curve in zip(measured, curves, strict=True):
        findings += prior_verdicts(evidence(at, figures, curve, of_codec))
    findings += sample_verdicts(memory, [prior.name for prior in at.priors.values()])
    complete = [commands.complete(finding) for finding in findings]
    notes = left_out(at.names, at.priors)
    return Diagnosis(of_codec, codec_curve, codebooks, measured, curves, memory, complete, panels, notes)


def some_test_images(at: Subject) -> Shown:
    """The images that the panels start from, evenly spread over those measured."""
    some = spread(np.asarray(at.test), COLUMNS * ROWS)
    batch = at.store.split("test").__getitems__(some)
    return Shown(at.data.splits["test"].__getitems__(some)["images"], batch["codes"], batch.get("label"))


def measure_priors(at: Subject, console: Console) -> list[PriorFigures]:
    """Bits of every prior there is, coarse to fine, without those of its samples."""
    splits = at.store.split("train"), at.store.split("test")
    measured = []
    for name, prior in at.priors.items():
        level = at.names.index(name)
        most = BOUND_IMAGES if prior.likelihood == "bound" else len(at.test)
        test, train = (spread(np.asarray(indices), most) for indices in (at.test, at.train))
        console.say(f"{prior.name}, {name}: what it pays for {len(test):,} test and training images")
        unigram = fit_baseline("unigram", at.store, level)
        assert isinstance(unigram, IndependentPrior)
        measured.append(measure_prior(prior, unigram, level, splits, test, train, at.seed))
    return measured


def draw_covered(at: Subject, console: Console) -> Samples:
    """Samples of the levels that have a prior, down to the first that has none."""
    request = SampleRequest({name: at.priors[name].name for name in at.covered}, images=SAMPLES, seed=at.seed)
    drawn = draw_samples(at.codec, [at.priors[name] for name in at.covered], at.store, request, console)
    assert drawn is not None  # this is the only process
    return drawn


def with_sampled(at: Subject, figures: PriorFigures, drawn: Samples) -> PriorFigures:
    """``figures`` with what the prior pays for its own samples, where that can be told."""
    prior, level = at.priors[figures.level], at.names.index(figures.level)
    if level >= len(at.covered) or not isinstance(prior, AutoregressivePrior):
        return figures
    return replace(figures, sampled=sampled_bits(prior, drawn.codes[level], drawn.codes[:level], drawn.labels))


def find_nearest(at: Subject, drawn: Samples) -> tuple[list[MemoryFigures], Panel]:
    """Distances of the samples to their nearest training images, and the panel of these."""
    train, levels = at.store.split("train"), at.codec.levels[: len(at.covered)]
    codes, width = sum(level.positions for level in levels), max(level.code_dim for level in levels)
    searched = spread(np.arange(len(train)), searchable(codes, width, len(train)))
    books = [quantizer.codebook for quantizer in at.codec.quantizers[: len(levels)]]
    held_out = at.store.split("test").__getitems__(at.test)["codes"][: len(levels)]
    figures, nearest = compare_memory(Distances(books, train, searched), drawn.codes, held_out, at.covered)
    return figures, nearest_panel(at.codec, nearest, len(levels), train, len(searched))


def evidence(at: Subject, figures: PriorFigures, curve: CurveFigures, codec: CodecFigures) -> Evidence:
    """What a prior is judged by: its figures, its curve, its settings, and what it is given."""
    record = at.run.stage(at.run.prior_stage(figures.prior, figures.level)) or {}
    settings = record.get("settings") or {}
    coarser = at.names[: at.names.index(figures.level)]
    carried = max((codec.carried[name] for name in coarser), default=None) if codec.carried else None
    tried = tuple(trained_priors(at.run).get(figures.level, ()))
    return Evidence(figures, curve, settings.get("config") or {}, settings.get("training") or {}, carried, tried)


def left_out(names: Sequence[str], priors: Mapping[str, Prior]) -> list[str]:
    """What cannot be looked at, and why, a sentence each."""
    notes = []
    for name in names:
        prior = priors.get(name)
        if prior is None:
            notes.append(f"No prior is trained for level {name}, so nothing is said of one.")
        elif not isinstance(prior, AutoregressivePrior):
            notes.append(
                f"The {prior.name} of level {name} makes a map at once, not code by code: one step from the truth, "
                "bits by position and the bits of its own samples are left out for it."
            )
    return notes


def write_diagnosis(run: RunFolder, result: Mapping[str, Any], found: Diagnosis) -> dict[str, str]:
    """Write diagnose.json, report.html and the panels, replacing an older diagnosis; returns the paths."""
    folder = run.diagnose
    with atomic_folder(folder) as temporary:
        write_json(temporary / "diagnose.json", result)
        for panel in found.panels:
            write_bytes(temporary / f"{panel.name}.png", panel.png)
        write_diagnosis_page(temporary / "report.html", result, {f"{p.name}.png": p.png for p in found.panels})
    return {name: str(folder / name) for name in ("report.html", "diagnose.json")}
