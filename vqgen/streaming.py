"""Splits that are read from their shards as they are needed, whatever their size: the setting ``data.streaming``.

Nothing is copied to a cache first, and memory holds a buffer of stored pictures and some 60 bytes per picture of the
set. Splits, labels and fingerprint are those of the same files without streaming; only the order of training differs.

An epoch goes through the set in 8 lanes at once: the shards, in an order drawn anew, are laid end to end and cut into
lanes of equal length; a lane is shuffled within blocks of an eighth of the buffer; and the pictures of a step are
taken from the lanes in turn. So each picture comes once in an epoch, a step mixes 8 places of the set, and the order
is a pure function of (seed, epoch): a resumed training goes on with the very next picture without reading those
before it. Within a step the pictures stand lane by lane, and each process takes its part of the step, so that it
reads lanes of its own. The steps of 1, 2, 4 and 8 processes with the same joint batch are the same; more processes
have more lanes.
"""

from __future__ import annotations

import copy
import hashlib
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from vqgen.config import DataSettings
from vqgen.errors import InputError
from vqgen.rows import Picture, Rows, first_line
from vqgen.shards import ArrowShard, Cells, ParquetShard, Reader, Shard, TableShard, TarShard
from vqgen.splits import Indices, stream
from vqgen.table_rows import image_column, label_column, names_of, picture_of, stored_bytes

LANES = 8
KEPT_BYTES = 256 * 2**20
"""Stored pictures of a held-out split that stay in memory once read, as they are read again and again."""

_HELD_OUT_PAGE = 32
_THREADS = 16


def stream_order(
    places: Indices, starts: Indices, block: int, seed: int, epoch: int, step: int, processes: int = 1
) -> Indices:
    """The order in which an epoch takes the images of a split: a permutation of the positions of ``places``.

    ``places`` (N,) are rows of the set, ascending; ``starts`` the first rows of its shards. A lane is shuffled within
    ``block`` images; ``step`` images are taken at a time, by all of ``processes`` together.
    """
    generator = stream(seed, f"stream {epoch}")
    bounds = [*np.searchsorted(places, starts).tolist(), len(places)]
    shards = [np.arange(bounds[shard], bounds[shard + 1]) for shard in generator.permutation(len(starts)).tolist()]
    laid = np.roll(np.concatenate(shards), -int(generator.integers(max(len(places), 1))))
    lanes = processes * -(-LANES // processes)
    order = np.empty(len(places), dtype=np.int64)
    start = 0
    for lane in range(lanes):
        length = len(range(lane, len(places), lanes))
        # Blocks of the lanes begin one after another, so that no step waits for all of them to be read.
        blocks = (np.arange(length) + lane * block // lanes) // block
        order[lane::lanes] = laid[start : start + length][np.argsort(blocks + generator.random(length))]
        start += length
    position = np.arange(len(places))
    return order[np.argsort(position // step * lanes + position % lanes, kind="stable")]


class ShardRows(Rows):
    """Rows of several shards, end to end.

    A picture is read with the page of pictures around it, of ``page`` rows at most, and forgotten when it was handed
    out, so that a pass in `order`, or from the first row to the last, reads each page once and holds at most
    16 pages. Any other order gives the same pictures, at the cost of reading pages more than once.

    `held_out` is for pictures here and there: it reads smaller pages, and keeps what it has handed out.

    Raises:
        InputError: there is no column of pictures, or shards have different columns.
    """

    streamed = True

    def __init__(self, shards: Sequence[Shard], settings: DataSettings) -> None:
        self._shards = [shard for shard in shards if len(shard)] or list(shards[:1])
        self._starts: Indices = np.cumsum([0, *map(len, self._shards)], dtype=np.int64)
        self._labelled = settings.labels
        self._page = max(settings.buffer // LANES, 1)
        self._keeps = False
        if isinstance(shards[0], TableShard):
            self.class_names = _choose_columns([s for s in self._shards if isinstance(s, TableShard)], settings)
        self._forget()

    def _forget(self) -> None:
        self._process = os.getpid()
        self._pages: OrderedDict[tuple[int, int], dict[int, Any]] = OrderedDict()
        self._held = 0
        self._readers: OrderedDict[int, Reader] = OrderedDict()
        self._kept: dict[int, Any] = {}
        self._kept_bytes = 0

    def __getstate__(self) -> dict[str, Any]:
        kept = ("_pages", "_readers", "_kept")
        return {name: value for name, value in self.__dict__.items() if name not in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def block(self) -> int:
        """Rows that a lane is shuffled within, and most rows of a page."""
        return self._page

    def held_out(self) -> ShardRows:
        apart = copy.copy(self)
        apart._page, apart._keeps = min(self._page, _HELD_OUT_PAGE), True
        apart._forget()
        return apart

    def order(self, places: Indices, seed: int, epoch: int, step: int, processes: int) -> Indices:
        return stream_order(places, self._starts[:-1], self._page, seed, epoch, step, processes)

    def read(self, indices: Sequence[int]) -> Iterator[Picture | Exception]:
        return (picture_of(self._cell(index)) for index in indices)

    def labels(self) -> npt.NDArray[Any] | None:
        if not self._labelled:
            return None
        with ThreadPoolExecutor(_THREADS if self._shards[0].remote else 1) as pool:
            found = list(pool.map(lambda shard: shard.labels(), self._shards))
        parts = [part for part in found if part is not None]
        if parts and len(parts) < len(found):
            without = next(shard for shard, part in zip(self._shards, found, strict=True) if part is None)
            raise InputError(f"'{without.path}' has no labels, but other shards have.", "Or set data.labels=false.")
        return np.concatenate(parts) if parts else None

    def name(self, index: int) -> str:
        shard, row = self._at(index)
        return f"{self._shards[shard].name}[{row}]"

    def digest(self, index: int) -> bytes:
        cell = self._cell(index)
        try:
            stored = stored_bytes(cell)
        except OSError:
            stored = b""
        return hashlib.sha256(repr(cell).encode() if stored is None else stored).digest()

    def _at(self, index: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return shard, index - int(self._starts[shard])

    def _cell(self, index: int) -> Any:
        if self._process != os.getpid():
            self._forget()  # in a loader process: open files are not to be shared with the one it was forked from
        if index in self._kept:
            return self._kept[index]
        shard, row = self._at(index)
        key = (shard, row // self._page)
        if row not in self._pages.get(key, ()):
            self._load(key)
        self._pages.move_to_end(key)
        cell = self._pages[key].pop(row)
        self._held -= 1
        if not self._pages[key]:
            del self._pages[key]
        if self._keeps:
            self._keep(index, cell)
        return cell

    def _keep(self, index: int, cell: Any) -> None:
        held = cell.get("bytes") if isinstance(cell, dict) else cell
        if isinstance(held, bytes) and self._kept_bytes + len(held) <= KEPT_BYTES:
            self._kept[index] = cell
            self._kept_bytes += len(held)

    def _load(self, key: tuple[int, int]) -> None:
        """Read a page; of others, those used longest ago go where there is no room."""
        shard, page = key
        start = page * self._page
        stop = min(start + self._page, len(self._shards[shard]))
        self._held -= len(self._pages.pop(key, ()))
        cells = self._take(shard, start, stop)
        self._pages[key] = dict(zip(range(start, stop), cells, strict=True))
        self._held += len(cells)
        while self._held > 2 * LANES * self._page and len(self._pages) > 1:
            self._held -= len(self._pages.popitem(last=False)[1])

    def _take(self, shard: int, start: int, stop: int) -> Cells:
        """Rows of a shard, by a reader on its way to them, or else by a new one."""
        origin = min(self._shards[shard].reached_from(start), start - self._page)
        near = {
            start - reader.row: number
            for number, reader in self._readers.items()
            if reader.shard is self._shards[shard] and origin <= reader.row <= start
        }
        number = near[min(near)] if near else max(self._readers, default=0) + 1
        reader = self._readers.pop(number, None) or Reader(self._shards[shard], start)
        cells = reader.take(start, stop)
        if reader.row < len(self._shards[shard]):
            self._readers[number] = reader
        while len(self._readers) > LANES:
            self._readers.popitem(last=False)
        return cells


def _choose_columns(shards: Sequence[TableShard], settings: DataSettings) -> tuple[str, ...] | None:
    """Say to all shards which columns to read; the names of the classes, where the first shard has them."""
    features = _features_of(shards[0])
    images = image_column(features, settings.image_column)
    labels = label_column(features, settings.label_column, images) if settings.labels else None
    names = None if labels is None else names_of(features[labels])
    for shard in shards:
        for column in (images, labels):
            if column is not None and column not in shard.schema.names:
                raise InputError(f"'{shard.path}' has no column '{column}', but '{shards[0].path}' has.")
        if names is not None and names_of(_features_of(shard)[labels]) not in (None, names):
            raise InputError(
                f"'{shard.path}' has other classes in column '{labels}' than '{shards[0].path}'.",
                "Write all shards with one list of classes, or set data.labels=false.",
            )
        shard.image_column, shard.label_column = images, labels
    return names


def _features_of(shard: TableShard) -> Any:
    """The shard's columns as `datasets` describes them.

    Raises:
        InputError: it cannot.
    """
    import datasets

    try:
        return datasets.Features.from_arrow_schema(shard.schema)
    except Exception as error:  # whatever comes of a description that anybody may have written
        raise InputError(
            f"'{shard.path}' cannot be read (of its columns it says: {first_line(error)}).", "Mend or remove it."
        ) from error


_KINDS: dict[str, Callable[[str], Shard]] = {"parquet": ParquetShard, "arrow": ArrowShard, "tar": TarShard}


def open_shards(paths: Sequence[str], kind: str, settings: DataSettings) -> ShardRows:
    """Rows of the ``parquet``, ``arrow`` or ``tar`` files at ``paths``, paths or URLs, in that order.

    Raises:
        InputError: a file is damaged or not there, or there is nothing in them that can be used.
    """
    with ThreadPoolExecutor(_THREADS if "://" in paths[0] else 1) as pool:
        shards = list(pool.map(_KINDS[kind], paths))
    return ShardRows(shards, settings)


def hub_files(name: str, settings: DataSettings) -> dict[str, list[str]]:
    """URLs of the parquet files of each split of a data set on the hub; only their names are fetched.

    Raises:
        InputError: it has no parquet files.
    """
    import datasets

    builder = datasets.load_dataset_builder(name, settings.subset, revision=settings.revision)
    found = {str(split): [str(file) for file in files] for split, files in (builder.config.data_files or {}).items()}
    other = [file for files in found.values() for file in files if not file.endswith(".parquet")]
    if other or not found:
        held = f" but files such as '{other[0].rpartition('/')[2]}'" if other else ""
        raise InputError(
            f"'{name}' on the hub has no parquet files to stream{held}.",
            "The hub keeps parquet copies of most sets: try data.revision=refs/convert/parquet. "
            "Or leave out data.streaming.",
        )
    return found
