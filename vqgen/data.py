"""Any source of pictures as batches: uint8 (B, C, H, W) of one size, in three splits.

A split opens when it is first looked up, so ``test`` stays unread until something asks for it. Where sources come
from is `vqgen.sources`; what becomes of pictures that cannot be read, `vqgen.image_split`.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from vqgen.codes import ImageSpec
from vqgen.config import DataSettings
from vqgen.errors import InputError
from vqgen.image_split import Batch, ImageSplit, Notify, Preparation, silent, spread
from vqgen.images import ValueRange, channels_of, size_of, value_range
from vqgen.rows import Rows, first_line
from vqgen.sources import open_source
from vqgen.splits import SPLITS, Classes, Indices, carve, choose

__all__ = ["Batch", "ImageData", "ImageSplit", "LazySplits", "load_data"]

_SURVEYED = 32


class LazySplits(Mapping[str, ImageSplit]):
    """Splits by name, each opened when it is first looked up."""

    def __init__(self, names: Sequence[str], open_split: Callable[[str], ImageSplit]) -> None:
        self._names, self._open = tuple(names), open_split
        self._opened: dict[str, ImageSplit] = {}

    def __getitem__(self, name: str) -> ImageSplit:
        if name not in self._names:
            raise KeyError(name)
        if name not in self._opened:
            self._opened[name] = self._open(name)
        return self._opened[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True)
class ImageData:
    """A data set: its splits, the images they hold, and what is to be said about them."""

    source: str
    splits: Mapping[str, ImageSplit]
    image: ImageSpec
    class_names: tuple[str, ...]
    """Names of the classes; empty where unlabelled."""
    fingerprint: str
    """SHA-256 of what training sees: stored pictures (a sample), labels, counts, classes and the image size. The
    same on every machine and under every path; nothing of the test split is in it."""
    notes: tuple[str, ...] = ()
    """What was done to the data, a sentence each."""
    values: ValueRange | None = None
    """The numbers that become 0 and 255, where the source has others than 8-bit ones."""

    @property
    def description(self) -> str:
        """One line for people; opens every split, to count it."""
        counts = ", ".join(f"{len(split):,} {name}" for name, split in self.splits.items())
        classes = f"; {len(self.class_names)} classes" if self.class_names else ""
        return f"{self.source}: {counts}{classes}; {self.image.channels}x{self.image.height}x{self.image.width}"


def load_data(
    settings: DataSettings,
    seed: int,
    notify: Notify = silent,
    splits: Sequence[str] = SPLITS,
) -> ImageData:
    """The data set of ``settings`` as the splits named.

    ``seed`` decides which images are carved off train, which are kept under ``data.limit`` and which are mirrored.
    ``notify`` is told of each unreadable image. Reads a few dozen images of train and validation, never of test.

    Raises:
        InputError: the source cannot be used, and why.
    """
    source = open_source(settings)
    rows = source["train"]()
    if len(rows) == 0:
        raise InputError(f"The training split of '{settings.source}' is empty.")
    raw = rows.labels() if settings.labels else None
    classes = None if raw is None else Classes.of(raw, rows.class_names)
    labels = None if raw is None or classes is None else classes.encode(raw, rows.class_names, "train")
    carved = carve(len(rows), source, labels, seed)
    preparation, notes = _survey(settings, rows.held_out(), carved["train"])
    notes += [
        f"{split} ({len(places):,} images) carved from train" for split, places in carved.items() if split != "train"
    ]

    def open_split(name: str) -> ImageSplit:
        own, places, own_labels = rows, carved.get(name), labels
        if places is None:
            own = source[name]()
            if len(own) == 0:
                raise InputError(f"The {name} split of '{settings.source}' is empty.", "Fill it, or remove it.")
            places, own_labels = np.arange(len(own), dtype=np.int64), None
            if classes is not None:
                own_labels = _labels_of(own, classes, name)
        if own_labels is not None:
            own_labels = own_labels[places]
        if settings.limit is not None and settings.limit < len(places):
            kept = choose(settings.limit, len(places), own_labels, seed, f"limit {name}")
            places, own_labels = places[kept], None if own_labels is None else own_labels[kept]
        return ImageSplit(
            own if name == "train" else own.held_out(),
            places,
            own_labels,
            preparation,
            name=name,
            flip_seed=seed if settings.flip and name == "train" else None,
            unreadable=settings.unreadable,
            notify=notify,
        )

    every = LazySplits(SPLITS, open_split)
    names = () if classes is None else classes.names
    return ImageData(
        source=settings.source,
        splits=LazySplits([name for name in SPLITS if name in splits], every.__getitem__),
        image=preparation.image,
        class_names=names,
        fingerprint=_fingerprint(preparation, names, [every["train"], every["validation"]]),
        notes=tuple(notes),
        values=preparation.values,
    )


def _labels_of(rows: Rows, classes: Classes, name: str) -> Indices:
    raw = rows.labels()
    if raw is None:
        raise InputError(
            f"The training split has labels, but the {name} split has none.", "Add them, or set data.labels=false."
        )
    return classes.encode(raw, rows.class_names, name)


def _survey(settings: DataSettings, rows: Rows, train: Indices) -> tuple[Preparation, list[str]]:
    """What the images are and become, decided on a few of the training images, and notes about it."""
    sample = spread(train, _SURVEYED)
    found: list[tuple[int, int, tuple[int, int]]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for place, picture in zip(sample, rows.read(sample), strict=True):
            if isinstance(picture, Exception):
                error = picture
            else:
                found.append((place, channels_of(picture), size_of(picture)))
        extremes = rows.extremes(train)
    if not found:
        raise InputError(
            f"None of {len(sample)} training images can be read, such as {rows.name(sample[-1])} "
            f"({first_line(error)}).",
            "Check data.source and data.image_column.",
        )
    _, channels, natural = found[0]
    size = settings.image_size or natural
    height, width = (size, size) if isinstance(size, int) else size
    notes = []
    values = None
    if extremes is not None:
        low, high, floating = extremes
        try:
            values = value_range(low, high, floating=floating)
        except ValueError as problem:
            raise InputError(
                f"The training images of '{settings.source}' cannot be shown: {problem}.",
                "Store 8- or 16-bit integers, or floats in [0, 1].",
            ) from problem
        kind = "float" if floating else f"{int(values.high).bit_length()}-bit"
        notes.append(f"{kind} values from {values.low:g} to {values.high:g} become 0 to 255")
    if other := next((one for one in found if one[2] != (height, width)), None):
        place, _, (had_height, had_width) = other
        notes.append(f"images are resized to {height}x{width}, such as {rows.name(place)} of {had_height}x{had_width}")
    wanted = settings.channels or channels
    if others := sorted({count for _, count, _ in found} - {wanted}):
        have = f"{' and '.join(map(str, others))} channel{'' if others == [1] else 's'}"
        notes.append(f"images of {have} get {wanted}")
    return Preparation(ImageSpec(wanted, height, width), values), notes


def _fingerprint(preparation: Preparation, names: tuple[str, ...], splits: Sequence[ImageSplit]) -> str:
    known = {"image": asdict(preparation.image), "values": preparation.values, "classes": list(names)}
    digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode())
    for split in splits:
        digest.update(f"{split.name} {len(split)}".encode())
        labels = split.labels()
        if labels is not None:
            digest.update(labels.astype("<i8").tobytes())
        for stored in split.stored_sample(_SURVEYED):
            digest.update(stored)
    return digest.hexdigest()
