"""One split of a source as it is stored: pictures by index, labels without pictures.

`Rows` know nothing of sizes, channels or splits. A picture that cannot be read comes back as the exception that
says why; `vqgen.image_split` decides what to do about it.
"""

from __future__ import annotations

import errno
import hashlib
import os
import struct
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from vqgen import shapes
from vqgen.errors import InputError
from vqgen.images import Pixels, is_wide

Picture = Image.Image | Pixels

BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    LookupError,
    ArithmeticError,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
    Image.DecompressionBombError,
)
"""What reading a damaged or foreign file raises."""

_LOST = (errno.ESTALE, errno.ENODEV, errno.ENOTCONN, errno.EHOSTDOWN, errno.ENXIO)
"""What a disk or a share says that was taken away."""

_SAMPLE = 256
_BLOCK = 256


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind if it has none."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")


def vanished(error: BaseException) -> str | None:
    """The folder or file that was lost, where ``error`` says that not one picture is bad but its disk is gone.

    A disk that was taken away, a share that no longer answers, a folder that was moved or closed to this user.
    """
    if not isinstance(error, OSError) or error.errno is None:
        return None
    path = Path(os.fsdecode(error.filename)) if isinstance(error.filename, (str, bytes)) else None
    if error.errno in _LOST:
        return str(path or "The disk")
    if error.errno in (errno.ENOENT, errno.EACCES, errno.ENOTDIR) and path is not None:
        folder = path.parent
        if not folder.is_dir() or not os.access(folder, os.X_OK):
            return str(folder)
    return None


class Rows(ABC):
    """One split as stored."""

    class_names: tuple[str, ...] | None = None
    """The source's names of its integer labels, where it has them."""
    streamed = False
    """Whether no more than a buffer of pictures is to be in memory at once."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, indices: Sequence[int]) -> Iterator[Picture | Exception]:
        """The picture at each of ``indices``, or what went wrong with it; one at a time, as photos are large."""

    @abstractmethod
    def labels(self) -> npt.NDArray[Any] | None:
        """Raw labels of all rows, integers or text, without reading a picture; None if there are none."""

    @abstractmethod
    def digest(self, index: int) -> bytes:
        """Hash of what is stored at ``index``: the same wherever the data lie."""

    def name(self, index: int) -> str:
        """What to call a row in a message: its file, where it has one."""
        return f"image {index}"

    def held_out(self) -> Rows:
        """The same rows, for reading a few pictures here and there, perhaps again and again."""
        return self

    def order(
        self, places: npt.NDArray[np.int64], seed: int, epoch: int, step: int, processes: int
    ) -> npt.NDArray[np.int64] | None:
        """The order in which an epoch takes the rows ``places`` (N,), ``step`` at a time: a permutation of (N,).

        None where any will do.
        """
        return None

    def extremes(self, indices: npt.NDArray[np.int64]) -> tuple[float, float, bool] | None:
        """Lowest and highest number among the pictures at ``indices``, and whether they are floats.

        None where pictures are 8-bit. Looks at no more than 256 pictures, evenly spaced.
        """
        places = indices[np.linspace(0, len(indices) - 1, min(_SAMPLE, len(indices))).astype(np.int64)]
        low, high, floating = np.inf, -np.inf, False
        for start in range(0, len(places), 32):
            for picture in self.read(places[start : start + 32].tolist()):
                if not isinstance(picture, Exception) and is_wide(picture):
                    pixels = np.asarray(picture)
                    low, high = min(low, float(pixels.min())), max(high, float(pixels.max()))
                    floating = floating or not np.issubdtype(pixels.dtype, np.integer)
            if start == 0 and low == np.inf:
                return None
        return low, high, floating


class ShapeRows(Rows):
    """The built-in pictures of one split, at the size asked for."""

    class_names = shapes.CLASS_NAMES

    def __init__(self, split: str, count: int, size: tuple[int, int]) -> None:
        self._split, self._count, self._size = split, count, size

    def __len__(self) -> int:
        return self._count

    def read(self, indices: Sequence[int]) -> Iterator[Picture | Exception]:
        yield from shapes.render(indices, self._size, self._split).transpose(0, 2, 3, 1)

    def labels(self) -> npt.NDArray[Any]:
        return shapes.labels(np.arange(self._count))

    def digest(self, index: int) -> bytes:
        # What is drawn follows from these; the pixels may differ by a rounding between machines.
        return hashlib.sha256(f"shapes {shapes.VERSION} {self._split} {index}".encode()).digest()


class ArrayRows(Rows):
    """A numpy file: ``.npy`` of pictures, memory-mapped, or ``.npz`` of ``images`` and perhaps ``labels``.

    Raises:
        InputError: the file is damaged, holds pickled objects, or arrays that are not (N, H, W) or (N, H, W, C).
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            if path.suffix.lower() == ".npy":
                self._images, self._labels = np.load(path, mmap_mode="r", allow_pickle=False), None
            else:
                self._images, self._labels = _read_npz(path)
        except BROKEN as error:
            pickled = "pickle" in str(error) or "Python objects" in str(error)
            reason = "pickled Python objects are refused: loading them can run any program"
            raise InputError(
                f"'{path}' cannot be read as plain arrays ({reason if pickled else first_line(error)}).",
                "Save with numpy.savez(path, images=uint8_array, labels=integer_array).",
            ) from error
        self._check()

    def _check(self) -> None:
        shape = self._images.shape
        if self._images.ndim not in (3, 4) or (self._images.ndim == 4 and shape[3] not in (1, 2, 3, 4)) or 0 in shape:
            first = self._images.ndim == 4 and shape[1] in (1, 2, 3, 4)
            raise InputError(
                f"'{self._path}': images have shape {list(shape)}, expected (N, H, W) or (N, H, W, 1 to 4 channels).",
                "Move the channels last: images.transpose(0, 2, 3, 1)." if first else "",
            )
        if self._images.dtype.kind not in "buif":
            raise InputError(f"'{self._path}': images are of type {self._images.dtype}, expected integers or floats.")
        if self._labels is not None:
            if self._labels.shape not in ((shape[0],), (shape[0], 1)) or self._labels.dtype.kind not in "buiUS":
                raise InputError(
                    f"'{self._path}': labels are {self._labels.dtype} of shape {list(self._labels.shape)}, "
                    f"expected an integer or a text for each of the {shape[0]} images."
                )
            text = self._labels.dtype.kind in "US"
            self._labels = self._labels.reshape(-1).astype(np.str_ if text else np.int64)

    def __reduce__(self) -> tuple[Any, ...]:
        return ArrayRows, (self._path,)

    def __len__(self) -> int:
        return len(self._images)

    def read(self, indices: Sequence[int]) -> Iterator[Picture | Exception]:
        return (np.asarray(self._images[index]) for index in indices)

    def labels(self) -> npt.NDArray[Any] | None:
        return self._labels

    def name(self, index: int) -> str:
        return f"{self._path.name}[{index}]"

    def digest(self, index: int) -> bytes:
        pixels = np.ascontiguousarray(self._images[index])
        return hashlib.sha256(f"{pixels.dtype.str} {pixels.shape}".encode() + pixels.tobytes()).digest()

    def extremes(self, indices: npt.NDArray[np.int64]) -> tuple[float, float, bool] | None:
        """As the base class, but of every picture: in an array they cost little."""
        if not is_wide(self._images):
            return None
        low, high = np.inf, -np.inf
        for start in range(0, len(indices), _BLOCK):
            block = self._images[indices[start : start + _BLOCK]]
            low, high = np.minimum(low, block.min()), np.maximum(high, block.max())
        return float(low), float(high), self._images.dtype.kind == "f"


def _read_npz(path: Path) -> tuple[Pixels, npt.NDArray[Any] | None]:
    # Opened here, because numpy leaves a file open that it fails to read.
    with path.open("rb") as file:
        archive = np.load(file, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("not an .npz archive")
        with archive:
            if "images" not in archive.files:
                raise InputError(
                    f"'{path}' has no array 'images', only {', '.join(archive.files) or 'nothing'}.",
                    "Save with numpy.savez(path, images=.., labels=..).",
                )
            return archive["images"], archive["labels"] if "labels" in archive.files else None
