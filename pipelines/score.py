"""Scoring: how likely given images are under a run, and which of two sets they come from.

Every score is higher for an image that is less like the training images. The bits of an image are those of its codes
under the priors and those of its pixels given its codes (the decoder's term), an upper bound on -log2 p(image); two
scores correct them for what makes likelihood mislead (docs/score.md). No image is used for anything but its score.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import PIL
import torch
from torch import Tensor

import vqgen
from pipelines.diagnosis.codec_figures import images_at_once as decoded_at_once
from pipelines.likelihood import ESTIMATOR_SAMPLES
from pipelines.processes import Result, join
from pipelines.report.columns import BASELINES
from pipelines.run_codes import open_codes
from pipelines.run_priors import best_priors, fit_baseline, load_priors
from pipelines.scoring.bits import LN2, CodeBits, Labels, LabelUse, code_bits, images_at_once
from pipelines.scoring.complexity import check_coder, complexity_bits
from pipelines.scoring.files import write_scores
from pipelines.scoring.images import ALL, ScoredSet, open_set
from pipelines.scoring.labels import choose_labels
from pipelines.scoring.tables import Scores, detections, maps_of, summary
from pipelines.settings import parse_priors
from priors.base import Prior
from vqgen.code_store import CodeStore
from vqgen.codec import HierarchicalVQVAE
from vqgen.console import Console
from vqgen.errors import InputError, VqgenError
from vqgen.files import read_json
from vqgen.hub import fingerprint
from vqgen.images import to_float
from vqgen.losses import discretized_gaussian_nats
from vqgen.metrics import mse
from vqgen.run_folder import RunFolder

LONGEST_NAME = 80
PLACE, MAP = "place", "map "
"""Names, beside the columns, of the places in the split and of the bits by position."""


@dataclass(frozen=True)
class ScoreRequest:
    """What is to be scored, and how."""

    data: str | None = None
    """The images: a data source; None: the run's own."""
    split: str | None = None
    """Of these images: train, validation, test or all; None: test, or all where the source has no test split."""
    against: str | None = None
    """A second source, of outliers."""
    images: int | None = None
    """Most images of each set; None: all."""
    prior: str | None = None
    """``NAME`` or ``LEVEL=NAME,...``; None: the best trained."""
    baseline: str = "unigram"
    """The same, of the prior that the ratio is taken to."""
    label: LabelUse | None = None
    """What is done about classes; None: see `pipelines.scoring.labels.choose_labels`."""
    maps: bool = False

    def default_name(self) -> str:
        """Name of the folder of the scores: the sources and whatever else is not the default."""
        parts = [_slug(self.data) if self.data else "own"]
        if self.split:
            parts.append(self.split)
        if self.against:
            parts.append(f"against-{_slug(self.against)}")
        for key, value, default in (("", self.prior, None), ("to-", self.baseline, "unigram")):
            if value != default:
                parts.append(key + re.sub(r"[^A-Za-z0-9._-]+", "-", str(value)))
        if self.label:
            parts.append(self.label)
        name = "-".join(parts)
        if len(name) <= LONGEST_NAME:
            return name
        return f"{name[: LONGEST_NAME - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _slug(source: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", Path(source.rstrip("/\\")).stem).strip("-.") or "images"


@dataclass(frozen=True)
class Scorer:
    """What turns images into scores."""

    codec: HierarchicalVQVAE
    priors: Sequence[Prior]
    baseline: Sequence[Prior]
    labels: Labels
    maps: bool


def score(run: RunFolder, request: ScoreRequest, name: str, console: Console) -> dict[str, Any]:
    """Score the images of ``request`` and write ``scores/<name>`` in the run; returns what scores.json holds.

    The processes of a launcher share the images; the first one writes, and the others return nothing.

    Raises:
        InputError: a prior that is not trained or has no likelihood, a source that cannot be used, labels that are
            needed and are not there, twice the same images, or a name that is no plain name.
        MismatchError: a prior made for another codec, or the run's images are others than they were.
    """
    with join().together():
        return _score(run, request, name, console)


def _score(run: RunFolder, request: ScoreRequest, name: str, console: Console) -> dict[str, Any]:
    run.scores(name)  # a name that cannot be one is refused before the work
    coder = check_coder()
    codec, store = open_codes(run)
    levels = [level.name for level in store.info.levels]
    chosen = best_priors(run, levels) if request.prior is None else parse_priors(request.prior, levels)
    if request.prior is None:
        console.say("priors: " + ", ".join(f"{level} {prior}" for level, prior in chosen.items()))
    priors = density_priors(run, chosen, codec, store, "--prior")
    baseline_chosen = parse_priors(request.baseline, levels)
    baseline = density_priors(run, baseline_chosen, codec, store, "--baseline")
    labels = choose_labels(run, store, [*priors, *baseline], request.label)
    device = join().device
    codec.to(device)
    for prior in (*priors, *baseline):
        prior.to(device).eval()
    scorer = Scorer(codec, priors, baseline, labels, request.maps)
    # Both sets are opened, and what is wrong with either is said, before the work begins.
    named = [(request.data, request.split), *([(request.against, None)] if request.against is not None else [])]
    with_labels = labels.use == "given"
    sets = [
        open_set(run, store, codec, source, split, console, images=request.images, labelled=with_labels)
        for source, split in named
    ]
    if len(sets) > 1:
        refuse_same(*sets)
    if join().count > 1:
        used = {"priors": described(run, chosen), "baseline": described(run, baseline_chosen)}
        read = [[images.source, list(images.indices)] for images in sets]
        join().require_alike({"codec": store.info.codec_fingerprint, **used, "images": read})
    if other := earlier_sources(run.scores(name), sets):
        console.warn(f"{run.scores(name)} holds scores of {other}; they are replaced. --out names another folder.")
    scored = [found for images in sets if (found := score_set(scorer, images, console)) is not None]
    if not scored:
        return {}
    without = [prior.spec.target.name for prior in priors if prior.spec.target.name not in scored[0].maps]
    if request.maps and without:
        console.say(f"--maps: no bits by position at {', '.join(without)} ({_names(chosen, without)}); left out.")
    record: dict[str, Any] = {
        "run": run.name,
        "priors": described(run, chosen),
        "baseline": described(run, baseline_chosen),
        "label": labels.use,
        "likelihood": "bound" if any(prior.likelihood == "bound" for prior in priors) else "exact",
        "sets": [summary(values) for values in scored],
        "detection": detections(*scored) if len(scored) > 1 else None,
        "provenance": provenance(run, store, labels, priors, coder),
    }
    return write_scores(run, name, record, scored, codec, request.maps)


def refuse_same(images: ScoredSet, outliers: ScoredSet) -> None:
    """Refuse outliers that are among the other images: every measure would be that of guessing, or near it.

    Raises:
        InputError: saying so.
    """
    paths = (images.source, outliers.source)
    same = (
        images.source == outliers.source
        or (images.own and outliers.own)
        or (all(map(os.path.exists, paths)) and os.path.samefile(*paths))
    )
    if same and (images.split == outliers.split or ALL in (images.split, outliers.split)):
        raise InputError(
            f"--against {outliers.source}: these are the images that it is to be told from.",
            "Name other images, or another --split of --data.",
        )


def earlier_sources(folder: Path, sets: Sequence[ScoredSet]) -> str:
    """What ``folder`` holds scores of, where that is not ``sets``: sources in other folders can have one name."""
    try:
        before = [found["source"] for found in read_json(folder / "scores.json")["sets"]]
    except (VqgenError, LookupError, TypeError):
        return ""
    return "" if before == [images.source for images in sets] else " and ".join(map(str, before))


def density_priors(
    run: RunFolder, chosen: Mapping[str, str], codec: HierarchicalVQVAE, store: CodeStore, option: str
) -> list[Prior]:
    """One prior with a likelihood for each level; baselines that are not trained are counted now.

    Raises:
        InputError: a level without a prior, one that is not trained, or one without a likelihood.
    """
    levels = [level.name for level in store.info.levels]
    missing = [level for level in levels if level not in chosen]
    if missing:
        raise InputError(
            f"{option}: no prior is named for {' and '.join(missing)}.",
            f"The likelihood of an image needs one for each level: {', '.join(levels)}.",
        )
    found = []
    for number, level in enumerate(levels):
        name = chosen[level]
        if name in BASELINES and not run.stage(run.prior_stage(name, level)):
            prior = fit_baseline(name, store, number)
        else:
            (prior,) = load_priors(run, {level: name}, codec)
        if prior.likelihood == "none":
            raise InputError(
                f"{option}: {name}, the prior of level '{level}', has no likelihood to score images by.",
                "Choose one that has: vqgen priors lists them.",
            )
        found.append(prior)
    return found


def _names(chosen: Mapping[str, str], levels: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(chosen[level] for level in levels))


@torch.no_grad()
def score_set(scorer: Scorer, images: ScoredSet, console: Console) -> Scores | None:
    """The scores of every image of a set, in its order; shared by the processes of a launcher.

    Every process calls this alike; all but the first are given None.
    """
    processes, codec = join(), scorer.codec
    kept: list[int] = []
    parts: list[Result] = []
    maps: list[CodeBits] = []
    step = min(images_at_once([*scorer.priors, *scorer.baseline], scorer.labels.passes), decoded_at_once(codec))
    batches = [images.indices[start : start + step] for start in range(0, len(images.indices), step)]

    def make(indices: Sequence[int]) -> Result:
        places, batch = images.read(indices)
        return score_batch(scorer, images, places, batch) if places else {}

    title = f"scoring {images.source}"
    with processes.together(), console.progress(title, len(images.indices), "images") as progress:
        for number, result in enumerate(processes.in_order(batches, make)):
            columns = dict(result)
            places = columns.pop(PLACE).tolist() if columns else []
            progress.advance(len(places))
            unread = [index for index in batches[number] if index not in places]
            if processes.main and number % processes.count and unread:
                images.read(unread)  # by another process before: now the one that speaks names them
            if not (processes.main and places):
                continue
            shown = [columns.pop(f"{MAP}{level.name}", None) for level in codec.levels]
            maps += [CodeBits((), tuple(shown))] if scorer.maps else []
            parts.append(columns)
            kept += places
    if not processes.main:
        return None
    if not kept:
        raise InputError(f"None of the images of '{images.source}' can be read.")
    columns = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    return Scores(images, kept, columns, maps_of(codec.levels, maps))


def score_batch(scorer: Scorer, images: ScoredSet, places: Sequence[int], batch: Tensor) -> dict[str, Tensor]:
    """Every score of the images (B, C, H, W) at ``places``, (B,) float64 each, `PLACE`, and the maps by level."""
    codec, priors = scorer.codec, scorer.priors
    device, scale = next(codec.parameters()).device, codec.decoder_scale.cpu()
    codes = tuple(level.cpu() for level in codec.encode(to_float(batch).to(device)))
    made = codec.decode(tuple(level.to(device) for level in codes)).cpu()
    given = None
    if scorer.labels.use == "given":
        assert images.classes is not None
        given = torch.from_numpy(images.classes[places])
    rate = code_bits(priors, codes, scorer.labels, given, places)
    base = code_bits(scorer.baseline, codes, scorer.labels, given, places)
    decoder = discretized_gaussian_nats(batch, made, scale) / LN2
    label = torch.zeros_like(decoder)
    if given is not None and scorer.labels.shares is not None:
        label = -scorer.labels.shares.log2()[given]
    total = rate.total + decoder + label
    complexity = complexity_bits(batch)
    columns = {f"{level.name}_bits": bits for level, bits in zip(codec.levels, rate.levels, strict=True)} | {
        "code_bits": rate.total,
        "decoder_bits": decoder,
        "label_bits": label,
        "total_bits": total,
        "bits_per_dim": total / codec.spec.dims,
        "complexity_bits": complexity,
        "complexity_corrected": total - complexity,
        "baseline_bits": base.total,
        "ratio": rate.total - base.total,
        "mse": mse(made, to_float(batch)).double(),
        PLACE: torch.tensor(places),
    }
    shown = zip(codec.levels, rate.maps, strict=True) if scorer.maps else ()
    return columns | {f"{MAP}{level.name}": bits for level, bits in shown if bits is not None}


def described(run: RunFolder, chosen: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Name and fingerprint of each level's prior; a baseline counted for the occasion has no fingerprint."""
    return {
        level: {
            "name": name,
            "fingerprint": fingerprint(run.prior(name, level)) if run.stage(run.prior_stage(name, level)) else None,
        }
        for level, name in chosen.items()
    }


def provenance(run: RunFolder, store: CodeStore, labels: Labels, priors: Sequence[Prior], coder: str) -> dict[str, Any]:
    """What the scores rest on."""
    bound = any(prior.likelihood == "bound" for prior in priors)
    return {
        "vqgen": vqgen.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "pillow": PIL.__version__,
        "complexity": coder,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["vqgen", *sys.argv[1:]]),
        "codec_fingerprint": store.info.codec_fingerprint,
        "data_fingerprint": store.info.data_fingerprint,
        "data": run.data_description(),
        "estimator_samples": ESTIMATOR_SAMPLES if bound else None,
        "class_shares": None if labels.shares is None else labels.shares.tolist(),
        "class_names": list(store.info.class_names),
    }
