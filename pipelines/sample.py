"""Sampling: images from a run's priors, from nothing or from what stays of given images.

This is the stage, read top to bottom; its parts are `pipelines.sample_request` (what was asked for),
`pipelines.run_priors`, `pipelines.sample_sources` and `pipelines.keeping` (what it starts from),
`pipelines.drawing` and `pipelines.interpolation` (the drawing), `pipelines.rejection` (choosing), and
`pipelines.sample_files` (what is written).
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from functools import cache, partial
from math import ceil
from typing import Any

import torch
from torch import Tensor

from pipelines.begun import Begun
from pipelines.classify import run_classifier
from pipelines.drawing import Known, Samples, draw_samples, image_labels
from pipelines.interpolation import draw_frames
from pipelines.keeping import keep_masks, kept_shares
from pipelines.processes import join
from pipelines.run_codes import open_codes
from pipelines.run_priors import best_priors, check_guidance, check_latent, load_priors, trained_priors
from pipelines.sample_files import (
    GRID_COLUMNS,
    MOST_CLASS_COLUMNS,
    provenance,
    sample_grid,
    start_from,
    write_samples,
)
from pipelines.sample_request import SampleRequest, parse_labels, request_from_options
from pipelines.sample_sources import Sources, read_sources, source_labels
from vqgen.codec import HierarchicalVQVAE
from vqgen.console import Console
from vqgen.hub import fingerprint
from vqgen.run_folder import RunFolder

__all__ = [
    "GRID_COLUMNS",
    "MOST_CLASS_COLUMNS",
    "SampleRequest",
    "Samples",
    "best_priors",
    "draw_samples",
    "image_labels",
    "load_priors",
    "parse_labels",
    "request_from_options",
    "sample",
    "sample_grid",
    "trained_priors",
    "write_samples",
]


def sample(
    run: RunFolder, request: SampleRequest, name: str, console: Console, *, data: str | None = None
) -> dict[str, Any]:
    """Sample images from a run's priors into ``samples/<name>`` of the run; returns what sample.json holds.

    ``data`` is where the run's images are now, if they were moved: a classifier may have to be trained on them. The
    processes of a launcher share the drawing; the first one writes, and the others return nothing.

    Raises:
        InputError: a prior that is not trained on a level or cannot do what is asked, a source image or a mask that
            cannot be used, or a name that is no plain name.
        MismatchError: a prior made for another codec.
    """
    with join().together():
        return _sample(run, request, name, console, data)


def _sample(run: RunFolder, request: SampleRequest, name: str, console: Console, data: str | None) -> dict[str, Any]:
    run.samples(name)  # a name that cannot be one is refused before the work
    codec, store = open_codes(run)
    priors = load_priors(run, request.priors, codec)
    check_guidance(run, priors, request.options or {})
    if request.interpolate:
        check_latent(run, priors[0])
    processes = join()
    batches = ceil(request.images / request.batch_size)
    if batches < processes.count:
        console.say(
            f"{batches} batch{'es' * (batches > 1)} for {processes.count} processes: some have nothing to do. "
            "A smaller `vqgen sample --batch-size` gives every one of them a part."
        )
    if processes.count > 1:
        processes.require_alike(provenance(run, request))
    codec.to(processes.device)
    sources = read_sources(request.sources, codec, store, console) if request.sources else None
    keep = kept_of(request, codec, sources, console)
    classifier = cache(partial(run_classifier, run, console, source=data))
    own_labels = None
    if sources is not None and store.labelled and not request.labels:
        own_labels = source_labels(sources, store.info.class_names, classifier, console)

    if sources is None:
        judge = classifier() if request.keep_best > 1 else None
        begun = begun_of(run, request, name, sources, keep, own_labels) if processes.main else None
        drawn = draw_samples(codec, priors, store, request, console, classifier=judge, begun=begun)
        if drawn is None or begun is None:
            return {}
        written = write_samples(run, name, drawn, request, store, provenance(run, request))
        begun.remove()
        return written
    if request.interpolate:
        labels = torch.tensor(request.labels).expand(2) if request.labels else own_labels
        drawn = draw_frames(codec, priors, request, sources.codes, labels, console)
    else:
        judge = classifier() if request.keep_best > 1 else None
        known = Known(sources.codes, keep)
        drawn = draw_samples(
            codec,
            priors,
            store,
            request,
            console,
            known=known,
            known_labels=own_labels,
            classifier=judge,
            begun=begun_of(run, request, name, sources, keep, own_labels) if processes.main else None,
        )
    if drawn is None:
        return {}
    start = start_from(codec, request, sources, keep, own_labels)
    written = write_samples(run, name, drawn, request, store, provenance(run, request), start)
    begun_of(run, request, name, sources, keep, own_labels).remove()
    return written


def begun_of(
    run: RunFolder,
    request: SampleRequest,
    name: str,
    sources: Sources | None,
    keep: tuple[Tensor, ...],
    labels: Tensor | None,
) -> Begun:
    """What was drawn of this very request before it was stopped: same priors, same source images, same classifier."""
    given = [*(sources.codes if sources is not None else ()), *keep, *([] if labels is None else [labels])]
    digest = hashlib.sha256(b"".join(value.contiguous().cpu().numpy().tobytes() for value in given)).hexdigest()
    judge = fingerprint(run.classifier) if request.keep_best > 1 else None
    about = {**provenance(run, request), "request": asdict(request), "from": digest, "classifier": judge}
    return Begun(run.samples(name), about)


def kept_of(
    request: SampleRequest, codec: HierarchicalVQVAE, sources: Sources | None, console: Console
) -> tuple[Tensor, ...]:
    """The masks of ``request.keep`` for each level that is made, said aloud; none without source images to keep."""
    if sources is None or request.keep is None:
        return ()
    keep = keep_masks(request.keep, codec, request.depth, sources.sizes)
    shares = kept_shares(keep, codec)
    console.say("kept: " + ", ".join(f"{level} {100 * share:.0f} %" for level, share in shares.items()))
    if request.keep != "nothing" and not any(shares.values()):
        console.warn(f"--keep {request.keep} covers no code's whole cell, so nothing of the image stays.")
    return keep
