"""The images of one source that are to be scored, as the run's codec takes them.

Of the run's own images, wherever they lie now, a split is the run's: what was carved from training stays apart from
it. Of any other source it is the source's own test split, or all its images where it has none: nothing was trained
on them, so nothing needs to be carved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipelines.encode import fitted_to
from pipelines.run_images import own_images, run_images
from vqgen.code_store import CodeStore
from vqgen.codec import HierarchicalVQVAE
from vqgen.codes import ImageSpec
from vqgen.config import DataSettings
from vqgen.console import Console
from vqgen.data import ImageData
from vqgen.errors import InputError, did_you_mean
from vqgen.image_split import Preparation, spread
from vqgen.images import ValueRange, channels_of, size_of, value_range
from vqgen.rows import Picture, Rows, first_line
from vqgen.run_folder import RunFolder
from vqgen.sources import open_source
from vqgen.splits import SPLITS, Classes

ALL = "all"
"""The split that is every image of a source."""
_LOOKED_AT = 32
_NAMED = 10

Read = Callable[[Sequence[int]], tuple[list[int], Tensor]]


@dataclass(frozen=True)
class ScoredSet:
    """Images of one source, N of which are scored."""

    source: str
    split: str
    own: bool
    """Whether they are the run's own images."""
    total: int
    """Images of the split."""
    indices: Sequence[int]
    """Which of them are scored: all, or evenly spread."""
    names: Sequence[str] | None
    """What the source calls the class of each image of the split; None where it has no labels."""
    classes: npt.NDArray[np.int64] | None
    """The same as classes of the run; None where they are not needed, or there are none."""
    notes: tuple[str, ...]
    """What is done to the pixels."""
    read: Read
    """From places in the split to those that can be read, and their pictures, uint8 (B, C, H, W)."""


def open_set(
    run: RunFolder,
    store: CodeStore,
    codec: HierarchicalVQVAE,
    source: str | None,
    split: str | None,
    console: Console,
    *,
    images: int | None = None,
    labelled: bool = False,
) -> ScoredSet:
    """``images`` (None: all) of a source; without ``source`` of the run's own.

    Args:
        split: train, validation, test or all; None: test where there is one, else all.
        labelled: whether each image's class is needed as one of the run's.

    Raises:
        InputError: the source or the split cannot be used, or ``labelled`` and its labels are missing or others.
        MismatchError: without ``source``, the run's images are not those it was made from.
    """
    if split not in (None, ALL, *SPLITS):
        hint = f"{did_you_mean(split, (*SPLITS, ALL))} Known: {', '.join(SPLITS)}, {ALL}.".strip()
        raise InputError(f"--split: there is no split '{split}'.", hint)
    data = run_images(run, store, console) if source is None else own_images(run, source, console)
    if data is not None:
        found = _own_set(data, store, split or "test", images)
    else:
        assert source is not None
        found = _other_set(run, store, codec, source, split, images, labelled, console)
    if labelled and found.classes is None:
        raise InputError(
            f"--label given: the images of '{found.source}' have no labels.", "Score them with --label marginal."
        )
    for note in found.notes:
        console.say(f"{found.source}: {note}")
    return found


def _own_set(data: ImageData, store: CodeStore, split: str, images: int | None) -> ScoredSet:
    parts = [data.splits[name] for name in (SPLITS if split == ALL else (split,))]
    for part in parts:
        part.set_epoch(None)
    starts = np.cumsum([0, *map(len, parts)])
    total = int(starts[-1])
    labels = [part.labels() for part in parts]
    classes = np.concatenate([known for known in labels if known is not None]) if store.labelled else None

    def read(places: Sequence[int]) -> tuple[list[int], Tensor]:
        pictures = []
        for part, inside in zip(parts, _inside(places, starts), strict=True):
            if inside:
                pictures.append(part.__getitems__(inside)["images"])
        return list(places), torch.cat(pictures)

    names = None if classes is None else [store.info.class_names[value] for value in classes.tolist()]
    return ScoredSet(
        data.source, split, True, total, spread(np.arange(total), images or total), names, classes, data.notes, read
    )


def _other_set(
    run: RunFolder,
    store: CodeStore,
    codec: HierarchicalVQVAE,
    source: str,
    split: str | None,
    images: int | None,
    labelled: bool,
    console: Console,
) -> ScoredSet:
    settings = fitted_to(codec, DataSettings(source=source))
    openers = open_source(settings)
    name = split or ("test" if "test" in openers else ALL)
    if name != ALL and name not in openers:
        raise InputError(
            f"'{source}' has no {name} split of its own, only {', '.join(openers)}.",
            "Leave --split out to score its test images, or all where it has none.",
        )
    rows = [openers[part]() for part in (openers if name == ALL else (name,))]
    starts = np.cumsum([0, *map(len, rows)])
    total = int(starts[-1])
    if not total:
        raise InputError(f"There are no images in '{source}' to score.")
    indices = spread(np.arange(total), images or total)
    names, classes = _labels(rows, store, source, labelled)
    chosen = _inside(indices, starts)
    first = [picture for part, inside in zip(rows, chosen, strict=True) for picture in _some(part, inside)]
    values, notes = _values(run, rows, source)
    notes += _changes(first, codec.spec)
    reader = _Reader(rows, starts, Preparation(codec.spec, values), console)
    return ScoredSet(source, name, False, total, indices, names, classes, tuple(notes), reader)


def _labels(
    rows: Sequence[Rows], store: CodeStore, source: str, labelled: bool
) -> tuple[list[str] | None, npt.NDArray[np.int64] | None]:
    """What a source calls the class of each image, and, where ``labelled``, that as a class of the run."""
    try:
        known = [values for part in rows if (values := part.labels()) is not None]
    except InputError:
        if labelled:
            raise
        return None, None  # half a set of labels is no reason against scores that need none
    if len(known) < len(rows):
        return None, None
    names = [_class_name(value, part) for part, values in zip(rows, known, strict=True) for value in values]
    if not labelled:
        return names, None
    own = Classes(store.info.class_names)
    pairs = zip(rows, known, strict=True)
    try:
        return names, np.concatenate([own.encode(values, part.class_names, source) for part, values in pairs])
    except InputError as error:
        raise InputError(error.message, "Score them with --label marginal, which needs no labels.") from error


class _Reader:
    """Pictures of a source that is not the run's own; one that cannot be read is named and left out."""

    def __init__(
        self, rows: Sequence[Rows], starts: npt.NDArray[np.int64], prepare: Preparation, console: Console
    ) -> None:
        self.rows, self.starts, self.prepare, self.console = rows, starts, prepare, console
        self.unread = 0

    def __call__(self, places: Sequence[int]) -> tuple[list[int], Tensor]:
        kept, pictures = [], []
        for part, start, inside in zip(self.rows, self.starts.tolist(), _inside(places, self.starts), strict=False):
            for place, picture in zip(inside, part.read(inside), strict=True):
                pixels = self.prepare(picture)
                if isinstance(pixels, Exception):
                    self._say(part.name(place), pixels)
                    continue
                kept.append(start + place)
                pictures.append(torch.from_numpy(pixels))
        image = self.prepare.image
        empty = torch.empty(0, image.channels, image.height, image.width, dtype=torch.uint8)
        return kept, torch.stack(pictures) if pictures else empty

    def _say(self, name: str, error: Exception) -> None:
        self.unread += 1
        if self.unread <= _NAMED:
            self.console.warn(f"{name} cannot be read and has no score ({first_line(error)}).")


def _inside(places: Sequence[int], starts: npt.NDArray[np.int64]) -> list[list[int]]:
    """For each part of a set, which of its own places are among ``places``, in order."""
    chosen = np.asarray(places, dtype=np.int64)
    spans = pairwise(starts.tolist())
    return [(chosen[(chosen >= low) & (chosen < high)] - low).tolist() for low, high in spans]


def _class_name(value: object, rows: Rows) -> str:
    if rows.class_names is not None and isinstance(value, (int, np.integer)) and 0 <= value < len(rows.class_names):
        return rows.class_names[int(value)]
    return str(value)


def _some(rows: Rows, places: Sequence[int]) -> list[Picture]:
    """A few of the pictures that can be read."""
    chosen = spread(np.asarray(places, dtype=np.int64), _LOOKED_AT) if places else []
    return [picture for picture in rows.read(chosen) if not isinstance(picture, Exception)]


def _values(run: RunFolder, rows: Sequence[Rows], source: str) -> tuple[ValueRange | None, list[str]]:
    """What the numbers of 16-bit and float images mean: what they mean in the run, where that is known."""
    found = [part.extremes(np.arange(len(part))) for part in rows]
    extremes = [one for one in found if one is not None]
    if not extremes:
        return None, []
    recorded = run.read()["data"].get("values")
    if recorded is not None:
        own = ValueRange(*recorded)
        clipped = any(low < own.low or high > own.high for low, high, _ in extremes)
        note = f"values from {own.low:g} to {own.high:g} become 0 to 255, as in the run"
        return own, [f"{note}; what lies outside is clipped" if clipped else note]
    low, high = min(one[0] for one in extremes), max(one[1] for one in extremes)
    try:
        values = value_range(low, high, floating=any(one[2] for one in extremes))
    except ValueError as problem:
        raise InputError(
            f"The images of '{source}' cannot be shown: {problem}.",
            "Store 8- or 16-bit integers, or floats in [0, 1].",
        ) from problem
    return values, [f"values from {values.low:g} to {values.high:g} become 0 to 255"]


def _changes(pictures: Sequence[Picture], image: ImageSpec) -> list[str]:
    """What is done to size and channels, by a look at a few pictures."""
    notes = []
    sizes = {size_of(picture) for picture in pictures} - {(image.height, image.width)}
    if sizes:
        height, width = sorted(sizes)[0]
        others = " and others" if len(sizes) > 1 else ""
        notes.append(f"images of {width}x{height} pixels{others} are resized to {image.width}x{image.height}")
    channels = {channels_of(picture) for picture in pictures} - {image.channels}
    if channels:
        notes.append(f"{' and '.join(map(str, sorted(channels)))} channels become {image.channels}")
    return notes
