"""Sampling: the priors coarse to fine, each given the codes above it and the label, then one decode.

Every draw is a function of the seed, the image's index and the level, so that image 17 is the same image at any
batch size, and a level drawn anew leaves the coarser ones as they were.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor

from pipelines.run_codes import open_codes, open_store
from pipelines.settings import parse_per_level, parse_priors
from priors import registry
from priors.base import Prior
from priors.sampling import Noise, SampleOptions
from vqgen.code_store import CodeStore
from vqgen.codec import HierarchicalVQVAE
from vqgen.codes import Codes, LevelSpec
from vqgen.console import Console
from vqgen.errors import InputError, MismatchError, did_you_mean
from vqgen.files import atomic_folder, write_json
from vqgen.hub import fingerprint
from vqgen.images import image_grid, save_png, to_pil, to_uint8
from vqgen.run_folder import RunFolder

GRID_COLUMNS = 8
MOST_CLASS_COLUMNS = 16


@dataclass(frozen=True)
class SampleRequest:
    """What to sample from a run."""

    priors: Mapping[str, str]
    """Prior of each level that is sampled, coarse to fine."""
    images: int = 64
    labels: tuple[int, ...] = ()
    """Classes to go through in turn; empty: every class in turn where the run is labelled."""
    options: Mapping[str, SampleOptions] | None = None
    """Options of the levels that do not use the defaults."""
    seed: int = 0
    batch_size: int = 64

    def default_name(self) -> str:
        """Name of the samples' folder: priors, seed, and whatever of labels and options is not the default."""
        parts = [_per_level(self.priors), f"{len(self.priors)}-levels", f"seed-{self.seed}"]
        if self.labels:
            parts.append("label-" + "-".join(map(str, self.labels)))
        for field in fields(SampleOptions):
            given = {level: getattr(options, field.name) for level, options in (self.options or {}).items()}
            changed = {level: value for level, value in given.items() if value != field.default}
            if changed:
                parts.append(f"{field.name.replace('_', '-')}-{_per_level(changed, len(self.priors))}")
        name = "-".join(parts)
        return name if len(name) <= 100 else f"{name[:91]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class Samples:
    """Sampled codes, their pictures, and what they took."""

    codes: Codes
    images: Tensor
    """(B, C, H, W) uint8."""
    labels: Tensor | None
    """(B,) int64."""
    seconds: Mapping[str, float]
    """Seconds spent in each level's prior, and in ``decode``."""


def _per_level(values: Mapping[str, Any], levels: int | None = None) -> str:
    """``"0.9"`` where all ``levels`` have it, else ``"top-0.9-bottom-0.5"``."""
    distinct = {str(value) for value in values.values()}
    if len(distinct) == 1 and len(values) == (levels or len(values)):
        return distinct.pop()
    return "-".join(f"{level}-{value}" for level, value in values.items())


def sample(run: RunFolder, request: SampleRequest, name: str, console: Console) -> dict[str, Any]:
    """Sample images from a run's priors into ``samples/<name>`` of the run; returns what sample.json holds.

    Raises:
        InputError: a prior that is not trained on a level, a bad label, or a name that is no plain name.
        MismatchError: a prior made for another codec.
    """
    run.samples(name)  # a name that cannot be one is refused before the work
    codec, store = open_codes(run)
    accelerator = Accelerator()
    priors = load_priors(run, request.priors, codec)
    samples = draw_samples(codec.to(accelerator.device), priors, store, request, console)
    return write_samples(run, name, samples, request, store, provenance(run, request))


def request_from_options(
    run: RunFolder,
    prior: str | None,
    levels: int | None,
    images: int,
    labels: Sequence[str],
    options: Mapping[str, str | None],
    seed: int,
    batch_size: int,
) -> SampleRequest:
    """A request as the command line gives it; texts may name a value per level.

    Raises:
        InputError: more levels than the run has, an unknown prior, level or class, or an option out of range.
    """
    store = open_store(run)
    known = [level.name for level in store.info.levels]
    if levels is not None and levels > len(known):
        raise InputError(
            f"--levels {levels}: this run has {len(known)} level{'s' if len(known) > 1 else ''} ({', '.join(known)})."
        )
    names = known[: levels or len(known)]
    chosen = best_priors(run, names) if prior is None else parse_priors(prior, known)
    missing = [name for name in names if name not in chosen]
    if missing:
        raise InputError(f"--prior {prior}: no prior for level '{missing[0]}'.", "Name one for every level sampled.")
    values: dict[str, dict[str, Any]] = {}
    for option, text in options.items():
        if text is not None:
            convert = int if option == "top_k" else float
            for level, value in parse_per_level(text, known, convert, f"--{option.replace('_', '-')}").items():
                values.setdefault(level, {})[option] = value
    return SampleRequest(
        priors={name: chosen[name] for name in names},
        images=images,
        labels=parse_labels(labels, store.info.class_names),
        options={level: SampleOptions(**given) for level, given in values.items() if level in names},
        seed=seed,
        batch_size=batch_size,
    )


def load_priors(run: RunFolder, chosen: Mapping[str, str], codec: HierarchicalVQVAE) -> list[Prior]:
    """The trained priors of the levels of ``chosen``, checked against the codec; baselines included if trained."""
    print_of_codec = fingerprint(run.codec)
    priors = []
    for level, name in chosen.items():
        if not run.stage(run.prior_stage(name, level)):
            trained = sorted(trained_priors(run).get(level, {}))
            known = f"Trained for {level}: {', '.join(trained)}." if trained else f"None is trained for {level}."
            raise InputError(
                f"{run.path} has no trained {name} for level '{level}'.",
                f"{known} Train it with `{run.command(f'train-prior --prior {name} --level {level}')}`.",
            )
        registry.get(name)
        prior = Prior.from_pretrained(run.prior(name, level))
        if prior.spec.codec_fingerprint != print_of_codec:
            raise MismatchError(
                f"The {name} prior of level '{level}' was trained on codes of another codec.",
                f"Train it again with `{run.command(f'train-prior --prior {name} --level {level} --overwrite')}`.",
            )
        priors.append(prior)
    return priors


def trained_priors(run: RunFolder) -> dict[str, dict[str, dict[str, Any]]]:
    """Records of the trained priors of a run: level -> name -> record."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for stage, record in run.stages().items():
        parts = stage.split("/")
        if len(parts) == 3 and parts[0] == "priors":
            found.setdefault(parts[2], {})[parts[1]] = record
    return found


def best_priors(run: RunFolder, levels: Sequence[str]) -> dict[str, str]:
    """Per level, the trained prior with the fewest validation bits, exact ones before bounds.

    Raises:
        InputError: a level for which none is trained.
    """
    trained = trained_priors(run)
    chosen = {}
    for level in levels:
        if level not in trained:
            raise InputError(
                f"{run.path} has no trained prior for level '{level}'.",
                f"Train one with `{run.command(f'train-prior --prior transformer --level {level}')}`.",
            )
        chosen[level] = min(trained[level], key=lambda name: _rank(name, trained[level][name]))
    return chosen


def _rank(name: str, record: Mapping[str, Any]) -> tuple[int, float]:
    bits = record["validation"].get("bits_per_code")
    if name not in registry.names() or bits is None:  # its plug-in is not loaded, or nothing was measured
        return 2, 0.0
    return int(registry.get(name).likelihood != "exact"), bits


def parse_labels(texts: Sequence[str], class_names: Sequence[str]) -> tuple[int, ...]:
    """Class indices of labels given by name or by index, each text possibly several with commas.

    Raises:
        InputError: the run has no labels, or an unknown class (with the nearest).
    """
    chosen = []
    for text in (part.strip() for entry in texts for part in entry.split(",")):
        if not class_names:
            raise InputError(f"--label {text}: this run has no labels.", "Sample without --label.")
        if text in class_names:
            chosen.append(class_names.index(text))
        elif text.isdecimal() and int(text) < len(class_names):
            chosen.append(int(text))
        else:
            shown = ", ".join(class_names[:20]) + (", ..." if len(class_names) > 20 else "")
            hint = f"{did_you_mean(text, class_names)} Known: {shown} (or 0 to {len(class_names) - 1})."
            raise InputError(f"Unknown label '{text}'.", hint.strip())
    return tuple(chosen)


def image_labels(request: SampleRequest, class_count: int) -> Tensor | None:
    """(B,) int64 class of each image: the labels asked for in turn, or every class in turn; None if unlabelled."""
    if class_count == 0:
        return None
    cycle = torch.tensor(request.labels or range(class_count))
    return cycle[torch.arange(request.images) % len(cycle)]


def draw_samples(
    codec: HierarchicalVQVAE, priors: Sequence[Prior], store: CodeStore, request: SampleRequest, console: Console
) -> Samples:
    """Codes and pictures of ``request``; ``priors`` are those of the coarsest levels, in that order."""
    device = next(codec.parameters()).device
    labels = image_labels(request, len(store.info.class_names))
    seconds = {prior.spec.target.name: 0.0 for prior in priors} | {"decode": 0.0}
    maps: list[Codes] = []
    pictures = []
    for prior in priors:
        prior.to(device).eval()
    with torch.no_grad(), console.progress("sampling", request.images, "images") as progress:
        for indices in _batches(request.images, request.batch_size):
            label = None if labels is None else labels[list(indices)].to(device)
            codes: Codes = ()
            for level, prior in enumerate(priors):
                start = time.perf_counter()
                name = prior.spec.target.name
                options = (request.options or {}).get(name, SampleOptions())
                codes = (*codes, prior.sample(Noise(request.seed, indices, level), codes, label, options))
                seconds[name] += time.perf_counter() - start
            start = time.perf_counter()
            pictures.append(to_uint8(codec.decode(codes)).cpu())
            seconds["decode"] += time.perf_counter() - start
            maps.append(tuple(level_codes.cpu() for level_codes in codes))
            progress.advance(len(indices))
    joined = tuple(torch.cat(level) for level in zip(*maps, strict=True))
    return Samples(joined, torch.cat(pictures), labels, seconds)


def _batches(count: int, size: int) -> Iterator[tuple[int, ...]]:
    for start in range(0, count, size):
        yield tuple(range(start, min(start + size, count)))


def write_samples(
    run: RunFolder, name: str, samples: Samples, request: SampleRequest, store: CodeStore, about: Mapping[str, Any]
) -> dict[str, Any]:
    """Write grid, images, codes and sample.json to ``samples/<name>``, replacing what an earlier call left there."""
    folder = run.samples(name)
    total = sum(samples.seconds.values())
    record = {
        **about,
        "images": request.images,
        "seed": request.seed,
        "labels": None if samples.labels is None else samples.labels.tolist(),
        "class_names": list(store.info.class_names),
        "options": {level: asdict(options) for level, options in (request.options or {}).items()},
        "seconds": {key: round(value, 4) for key, value in samples.seconds.items()},
        "samples_per_second": round(request.images / total, 3) if total else None,
    }
    digits = len(str(request.images - 1))
    with atomic_folder(folder) as temporary:
        save_png(temporary / "grid.png", sample_grid(samples.images, samples.labels, store.info.class_names))
        (temporary / "images").mkdir()
        for index, image in enumerate(samples.images):
            save_png(temporary / "images" / f"{index:0{digits}d}.png", to_pil(image))
        levels: Sequence[LevelSpec] = store.info.levels
        tensors = {spec.name: codes.contiguous() for spec, codes in zip(levels, samples.codes, strict=False)}
        if samples.labels is not None:
            tensors["label"] = samples.labels
        save_file(tensors, temporary / "codes.safetensors")
        write_json(temporary / "sample.json", record)
    return {**record, "grid": str(folder / "grid.png"), "folder": str(folder)}


def sample_grid(images: Tensor, labels: Tensor | None, class_names: Sequence[str]) -> Any:
    """A grid of pictures; with few classes, one column a class under its name."""
    count = 0 if labels is None else len(set(labels.tolist()))
    if labels is None or not 1 < count <= MOST_CLASS_COLUMNS:
        return image_grid(images, columns=min(GRID_COLUMNS, len(images)))
    cycle = labels[:count].tolist()
    names = [class_names[label] for label in cycle] if len(set(cycle)) == count else []
    return image_grid(images, columns=count, column_names=names)


def provenance(run: RunFolder, request: SampleRequest) -> dict[str, Any]:
    """Which codec and priors the samples came from, by name and fingerprint."""
    return {
        "codec": fingerprint(run.codec),
        "priors": {
            level: {"name": name, "fingerprint": fingerprint(run.prior(name, level))}
            for level, name in request.priors.items()
        },
    }
