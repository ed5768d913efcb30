"""The three splits and their labels: what a source calls them, what is carved, which classes there are.

Nothing here decodes a picture. A source without a test or validation split has it carved from train, so that
there are always three; which pictures go where is a function of the seed and of the training labels alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.random import Generator, Philox, SeedSequence

from vqgen.errors import InputError, did_you_mean

Indices = npt.NDArray[np.int64]

SPLITS = ("train", "validation", "test")

CARVED_SHARE = 0.05
CARVED_MOST = 5000

_WORDS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}


def canonical(name: str) -> str | None:
    """Which of the three splits ``name`` means (``"val"``, ``"dev"``, ``"Training"``), or None."""
    return _WORDS.get(name.lower())


def check_split(name: str) -> None:
    """Refuse what is none of the three splits.

    Raises:
        InputError: naming them, and the nearest.
    """
    if name not in SPLITS:
        hint = f"{did_you_mean(name, SPLITS)} Known: {', '.join(SPLITS)}.".strip()
        raise InputError(f"There is no split '{name}'.", hint)


def in_path(parts: Iterable[str]) -> str | None:
    """Which split the parts of a relative path name, the last part first: ``data/train-00000.parquet`` is train."""
    for part in reversed(list(parts)):
        for word in re.split(r"[^a-zA-Z]+", part):
            if split := canonical(word):
                return split
    return None


def carve(count: int, found: Iterable[str], labels: Indices | None, seed: int) -> dict[str, Indices]:
    """Which of ``count`` training images belong to each split that the source does not have, and to train.

    A missing test split, then a missing validation split, takes 5 % of train (at least 1 and at most 5,000),
    in the proportions of ``labels`` (count,) where there are any. Positions are in ascending order.

    Raises:
        InputError: too few images for that.
    """
    missing = [split for split in ("test", "validation") if split not in found]
    if count <= len(missing):
        raise InputError(
            f"The training split has {count} images, too few to split {' and '.join(missing) or 'off'}.",
            f"Give at least {len(missing) + 1}, better some hundreds.",
        )
    size = int(np.clip(round(CARVED_SHARE * count), 1, CARVED_MOST))
    rest = np.arange(count, dtype=np.int64)
    carved = {}
    for split in missing:
        size = min(size, len(rest) - 1)
        taken = rest[choose(size, len(rest), None if labels is None else labels[rest], seed, f"carve {split}")]
        carved[split], rest = taken, np.setdiff1d(rest, taken, assume_unique=True)
    return {"train": rest, **carved}


def choose(size: int, count: int, labels: Indices | None, seed: int, purpose: str) -> Indices:
    """``size`` of ``count`` positions, ascending, drawn by ``seed``; each class of ``labels`` in its proportion."""
    generator = stream(seed, purpose)
    order = generator.permutation(count)
    if labels is not None:
        # Number the members of each class 0, 1, .. in drawn order: the one whose number is nearest the start of
        # its class comes first, so that every beginning of the sequence holds the classes in proportion.
        by_class = order[np.argsort(labels[order], kind="stable")]
        _, starts, sizes = np.unique(labels[by_class], return_index=True, return_counts=True)
        number = np.arange(count) - np.repeat(starts, sizes)
        rank = (number + generator.random(len(sizes)).repeat(sizes)) / np.repeat(sizes, sizes)
        order = by_class[np.argsort(rank, kind="stable")]
    return np.sort(order[:size]).astype(np.int64)


def stream(seed: int, purpose: str) -> Generator:
    """A generator of its own for each (seed, purpose)."""
    return Generator(Philox(SeedSequence([seed, *purpose.encode()])))


@dataclass(frozen=True)
class Classes:
    """The classes of the training split, in the order of their indices."""

    names: tuple[str, ...]

    @classmethod
    def of(cls, values: npt.NDArray[Any], names: tuple[str, ...] | None) -> Classes:
        """Classes of raw training labels: ``names`` where the source has them, else the distinct values, sorted."""
        if names is not None:
            return cls(names)
        return cls(tuple(str(value) for value in np.unique(values).tolist()))

    def encode(self, values: npt.NDArray[Any], names: tuple[str, ...] | None, where: str) -> Indices:
        """Raw labels of a split as indices into `names`.

        ``names`` are those of this split's own numbering, where it has one.

        Raises:
            InputError: a label that is none of the training classes.
        """
        distinct, inverse = np.unique(values, return_inverse=True)
        known: Mapping[str, int] = {name: index for index, name in enumerate(self.names)}
        numbers = []
        for value in distinct.tolist():
            name = str(value)
            if names is not None:
                name = names[value] if 0 <= value < len(names) else f"class number {value}"
            if name not in known:
                at = int(np.flatnonzero(values == value)[0])
                raise InputError(
                    f"{where}: image {at} has the label {name!r}, which is none of the {len(known)} training classes.",
                    "Mend the labels, or set data.labels=false.",
                )
            numbers.append(known[name])
        encoded: Indices = np.array(numbers, dtype=np.int64)[inverse.reshape(-1)]
        return encoded
