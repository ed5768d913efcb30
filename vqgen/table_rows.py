"""Rows of a `datasets.Dataset`: which columns hold pictures and classes, and how a cell becomes a picture."""

from __future__ import annotations

import hashlib
import io
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vqgen.config import DataSettings
from vqgen.errors import InputError, did_you_mean
from vqgen.images import check_shape, open_picture
from vqgen.rows import BROKEN, Picture, Rows

MOST_STORED = 2**30
"""Bytes of a picture's file."""

IMAGE_COLUMNS = ("image", "img", "images", "picture")
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target")


class TableRows(Rows):
    """A `datasets.Dataset`: pictures as encoded bytes, as paths, or as nested lists of numbers.

    Raises:
        InputError: no column of pictures is found, or a named column is not there or of no use.
    """

    def __init__(self, table: Any, settings: DataSettings) -> None:
        self._image_column = image_column(table.features, settings.image_column)
        self._label_column = None
        if settings.labels:
            self._label_column = label_column(table.features, settings.label_column, self._image_column)
        self._images = table.select_columns([self._image_column]).with_format("arrow")
        self._table = table
        if self._label_column is not None:
            self.class_names = names_of(table.features[self._label_column])

    def __len__(self) -> int:
        return len(self._images)

    def _cells(self, indices: Sequence[int]) -> list[Any]:
        try:
            cells: list[Any] = self._images[list(indices)].column(0).to_pylist()
        except BROKEN as error:  # numbers that Python has no value for, say
            return [error] * len(indices)
        return cells

    def read(self, indices: Sequence[int]) -> Iterator[Picture | Exception]:
        return (picture_of(cell) for cell in self._cells(indices))

    def labels(self) -> npt.NDArray[Any] | None:
        if self._label_column is None:
            return None
        column = self._table.select_columns([self._label_column]).with_format("arrow")[:].column(0)
        if column.null_count:
            raise InputError(
                f"Column '{self._label_column}' has no value in {column.null_count} of {len(column)} rows.",
                "Fill them, or set data.labels=false.",
            )
        values: npt.NDArray[Any] = column.to_numpy()
        return values.astype(np.str_ if values.dtype.kind == "O" else np.int64)

    def name(self, index: int) -> str:
        cell = self._cells([index])[0]
        path = cell.get("path") if isinstance(cell, dict) else cell if isinstance(cell, str) else None
        return f"{path} (image {index})" if path else f"image {index}"

    def digest(self, index: int) -> bytes:
        cell = self._cells([index])[0]
        try:
            stored = stored_bytes(cell)
        except OSError:
            stored = b""
        return hashlib.sha256(repr(cell).encode() if stored is None else stored).digest()


def image_column(features: Any, wanted: str | None) -> str:
    if wanted is not None:
        return _named(features, wanted, "data.image_column")
    for name in IMAGE_COLUMNS:
        if name in features:
            return name
    pictures = [name for name, feature in features.items() if type(feature).__name__ == "Image"]
    if len(pictures) == 1:
        return str(pictures[0])
    raise InputError(
        f"No column of images found; the columns are {', '.join(features)}.", "Name one with data.image_column."
    )


def label_column(features: Any, wanted: str | None, image_column: str) -> str | None:
    names = LABEL_COLUMNS if wanted is None else (_named(features, wanted, "data.label_column"),)
    for name in names:
        if name in features and name != image_column:
            kind = str(getattr(features[name], "dtype", ""))
            if kind.startswith(("int", "uint", "bool", "string", "large_string")):
                return name
    if wanted is not None:
        raise InputError(
            f"Column '{wanted}' ({features[wanted]}) does not hold classes.", "Labels are integers, names or text."
        )
    return None


def names_of(feature: Any) -> tuple[str, ...] | None:
    """The names of the classes of a column of labels; None where it has none.

    Raises:
        InputError: they are not text.
    """
    names = getattr(feature, "names", None)
    if names is None:
        return None
    if not all(isinstance(name, str) for name in names):
        raise InputError("The names of the classes are not all text.", "Mend them, or set data.labels=false.")
    return tuple(name.encode("utf-8", "replace").decode("utf-8") for name in names)


def _named(features: Any, wanted: str, key: str) -> str:
    if wanted not in features:
        raise InputError(
            f"{key}: there is no column '{wanted}'; the columns are {', '.join(features)}.",
            did_you_mean(wanted, features),
        )
    return wanted


def stored_bytes(cell: Any) -> bytes | None:
    """The encoded file in a cell, read from its path if the cell has only that; None where it holds numbers."""
    if isinstance(cell, dict):
        cell = cell.get("path") if cell.get("bytes") is None else cell["bytes"]
    if isinstance(cell, str):
        return _file_bytes(Path(cell))
    return cell if isinstance(cell, bytes) else None


def _file_bytes(path: Path) -> bytes:
    """A file that a table names: a device or a pipe has no end, and what is no picture may be of any size.

    Raises:
        OSError: it cannot be read, is no plain file, or is larger than any picture.
    """
    try:
        status = path.stat()
    except ValueError as error:
        raise OSError(f"'{path}' is the name of no file") from error
    if not stat.S_ISREG(status.st_mode) or status.st_size > MOST_STORED:
        raise OSError(f"'{path}' is no file of a picture")
    return path.read_bytes()


def picture_of(cell: Any) -> Picture | Exception:
    if isinstance(cell, Exception):
        return cell
    try:
        stored = stored_bytes(cell)
        if stored is None:
            pixels = np.asarray(cell)
            if pixels.dtype.kind not in "buif":
                raise ValueError("the cell holds no picture")
            check_shape(pixels)
            return pixels
        return open_picture(io.BytesIO(stored))
    except BROKEN as error:
        return error
