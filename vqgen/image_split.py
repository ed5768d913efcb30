"""One split of pictures, ready for a loader: batches of uint8 (B, C, H, W) and labels.

A picture that cannot be read is replaced, for good, by the next readable one of the same class in its split, so that
lengths and `ImageSplit.labels` hold without reading every file first. Each is named to the user, and more than a
stated share of a split is an error (counted in each loader process for itself).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from vqgen.codes import ImageSpec
from vqgen.errors import InputError
from vqgen.images import ValueRange, to_array
from vqgen.rows import BROKEN, Picture, Rows, first_line, vanished
from vqgen.splits import Indices, stream

Batch = dict[str, Tensor]
Notify = Callable[[str], None]

CACHE_BYTES = 256 * 2**20
"""A split whose decoded pictures take no more than this is kept in memory as it is read."""

_NAMED = 5
_TOLD = 10


def silent(line: str) -> None:
    """A ``notify`` that tells nobody."""


@dataclass(frozen=True)
class Preparation:
    """How a stored picture becomes the codec's: its size and channels, and what its numbers mean."""

    image: ImageSpec
    values: ValueRange | None
    """What 16-bit and float numbers mean; None where training has none, and then a picture's own extremes decide."""

    def __call__(self, picture: Picture | Exception) -> npt.NDArray[np.uint8] | Exception:
        """uint8 (C, H, W), or what is wrong with the picture."""
        if isinstance(picture, Exception):
            return picture
        try:
            return to_array(picture, self.image.channels, (self.image.height, self.image.width), self.values)
        except BROKEN as error:
            return error


def spread(places: Indices, most: int) -> list[int]:
    """At most ``most`` of ``places``, evenly spaced, the first and the last among them."""
    chosen: list[int] = places[np.linspace(0, len(places) - 1, min(most, len(places))).astype(np.int64)].tolist()
    return chosen


class ImageSplit(Dataset[Batch]):
    """The pictures of one split, and their labels where there are any.

    A batch is ``{"images": uint8 (B, C, H, W), "label": int64 (B,)}``, without ``label`` where unlabelled. With
    ``flip``, half of the pictures are mirrored; which ones is a function of (seed, epoch, index) alone.
    """

    def __init__(
        self,
        rows: Rows,
        places: Indices,
        labels: Indices | None,
        preparation: Preparation,
        *,
        name: str,
        flip_seed: int | None = None,
        unreadable: float = 0.0,
        notify: Notify = silent,
    ) -> None:
        self.name = name
        self._rows, self._places, self._labels = rows, places, labels
        self._prepare, self._notify = preparation, notify
        self._most_broken = unreadable * len(places)
        self._stand_ins: dict[int, int] = {}
        image = preparation.image
        shape = (len(places), image.channels, image.height, image.width)
        cached = len(places) * image.dims <= CACHE_BYTES and not (rows.streamed and name == "train")
        self._cache = torch.empty(shape, dtype=torch.uint8) if cached else None
        self._cached = np.zeros(len(places), dtype=bool)
        self._flip_seed = flip_seed
        self._flipped: npt.NDArray[np.bool_] | None = None
        self.set_epoch(0)

    def __len__(self) -> int:
        return len(self._places)

    @property
    def labelled(self) -> bool:
        return self._labels is not None

    @property
    def unreadable(self) -> int:
        """Pictures found unreadable so far, in this process."""
        return len(self._stand_ins)

    @property
    def unreadable_places(self) -> list[int]:
        """Where they are in the split."""
        return sorted(self._stand_ins)

    def labels(self) -> Indices | None:
        """Classes of the whole split, int64 (N,), without reading a picture; None where unlabelled."""
        return None if self._labels is None else self._labels.copy()

    def stored_sample(self, most: int) -> list[bytes]:
        """Hashes of what is stored for at most ``most`` pictures, evenly spaced, without decoding them."""
        rows = self._rows.held_out()
        return [rows.digest(place) for place in spread(self._places, most)]

    def set_epoch(self, epoch: int | None) -> None:
        """Draw anew which pictures are mirrored, or mirror none (None); does nothing to a split that is not flipped."""
        if self._flip_seed is not None:
            drawn = None if epoch is None else stream(self._flip_seed, f"flip {epoch}").random(len(self)) < 0.5
            self._flipped = drawn

    def epoch_order(self, seed: int, epoch: int, step: int, processes: int) -> Indices | None:
        """The order in which a streamed split is trained on (`Rows.order`); None where any will do."""
        return self._rows.order(self._places, seed, epoch, step, processes)

    def __getitem__(self, index: int) -> Batch:
        return {key: value[0] for key, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        chosen = np.asarray(indices, dtype=np.int64)
        if chosen.size and not (chosen.min() >= 0 and chosen.max() < len(self)):
            raise IndexError(f"index out of range for the {len(self)} images of '{self.name}'")
        images = self._images(chosen)
        if self._flipped is not None:
            mirrored = torch.from_numpy(self._flipped[chosen])
            images[mirrored] = images[mirrored].flip(-1)
        batch = {"images": images}
        if self._labels is not None:
            batch["label"] = torch.from_numpy(self._labels[chosen])
        return batch

    def __getstate__(self) -> dict[str, Any]:
        # Sent to a loader process: the memory stays here, and so does the console.
        return {**self.__dict__, "_cache": None, "_cached": np.zeros(len(self), dtype=bool), "_notify": silent}

    def _images(self, chosen: Indices) -> Tensor:
        """Pictures at positions ``chosen`` as a new uint8 (B, C, H, W), not mirrored."""
        missing = np.unique(chosen[~self._cached[chosen]])
        if self._cache is None or (len(missing) and get_worker_info() is not None):
            return self._decode(chosen)  # a loader process would fill a copy that nobody else sees
        if len(missing):
            decoded = self._decode(missing)
            self._cache[torch.from_numpy(missing)] = decoded
            self._cached[missing] = True
        return self._cache[torch.from_numpy(chosen)]

    def _decode(self, chosen: Indices) -> Tensor:
        image = self._prepare.image
        images = np.empty((len(chosen), image.channels, image.height, image.width), dtype=np.uint8)
        positions = [self._stand_ins.get(position, position) for position in chosen.tolist()]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on odd files; what it cannot read it raises
            pictures = self._rows.read(self._places[positions].tolist())
            for row, (position, picture) in enumerate(zip(positions, pictures, strict=True)):
                pixels = self._prepare(picture)
                images[row] = self._replace(position, pixels) if isinstance(pixels, Exception) else pixels
        return torch.from_numpy(images)

    def _read(self, position: int) -> npt.NDArray[np.uint8] | Exception:
        return self._prepare(next(self._rows.read([int(self._places[position])])))

    def _replace(self, broken: int, error: Exception) -> npt.NDArray[np.uint8]:
        """The picture that stands in for an unreadable one: the next readable of its class, from there on round."""
        same = np.arange(len(self)) if self._labels is None else np.flatnonzero(self._labels == self._labels[broken])
        after = np.roll(same, -int(np.searchsorted(same, broken, side="right")))
        waiting = [broken]
        self._record(broken, error)
        for position in after.tolist():
            if position in self._stand_ins:
                continue
            pixels = self._read(position)
            if not isinstance(pixels, Exception):
                self._stand_ins.update(dict.fromkeys(waiting, position))
                return pixels
            waiting.append(position)
            self._record(position, pixels)
        raise InputError(f"No image of the class of {self._name(broken)} in '{self.name}' can be read.")

    def _record(self, position: int, error: Exception) -> None:
        if position in self._stand_ins:
            return
        if gone := vanished(error):
            raise InputError(
                f"{gone} is no longer there, or can no longer be read, in the middle of the work on '{self.name}' "
                f"({first_line(error)}).",
                "Bring the images back, then go on.",
            ) from error
        self._stand_ins[position] = position
        broken = list(self._stand_ins)
        if len(broken) > self._most_broken:
            names = ", ".join(self._name(place) for place in broken[-_NAMED:])
            raise InputError(
                f"{len(broken)} of the {len(self)} images of '{self.name}' are unreadable: {names} "
                f"({first_line(error)}).",
                "Mend or remove them, or allow a larger share with data.unreadable.",
            ) from error
        if len(broken) <= _TOLD or len(broken) % 100 == 0:
            reason = first_line(error)
            self._notify(f"Unreadable image skipped ({len(broken)} so far): {self._name(position)} ({reason}).")

    def _name(self, position: int) -> str:
        return self._rows.name(int(self._places[position]))
