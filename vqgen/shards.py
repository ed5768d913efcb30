"""Files that hold many pictures each, read from any row on in little memory: parquet, arrow, and tar of a WebDataset.

A shard tells how many pictures it holds without reading one, and hands out cells (what is stored of a picture) from
a row on, a few at a time. Nothing is unpacked, copied or converted on disk. `vqgen.streaming` makes a split of them.
"""

from __future__ import annotations

import os
import tarfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from vqgen.errors import InputError
from vqgen.rows import BROKEN, first_line

Cells = list[Any]
"""Stored pictures: encoded bytes, ``{"bytes": .., "path": ..}``, or nested lists of numbers."""

ATTEMPTS = 5
"""Times that a read over the network is tried."""
WAIT = 2.0
"""Seconds before the second attempt; each further one waits twice as long."""

_BATCH = 64
_CLASS = ".cls"
_CLASS_BYTES = 32
_ROWS_PER_BYTE = 8
"""More rows than bytes there may be: of pictures that are alike, such as empty masks, a table stores one."""


class Shard(ABC):
    """One file of pictures."""

    remote = False
    """Whether reading may fail for a while and then work again."""

    def __init__(self, path: str) -> None:
        self.path = path

    @property
    def name(self) -> str:
        return PurePosixPath(self.path.replace("\\", "/")).name

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def cells(self, start: int) -> Iterator[Cells]:
        """The pictures from row ``start`` on, in lists of any length."""

    def reached_from(self, row: int) -> int:
        """The row at which reading has to begin to come to ``row``."""
        return row

    @abstractmethod
    def labels(self) -> npt.NDArray[Any] | None:
        """Raw labels of all rows; None if there are none."""


class Reader:
    """A place in a shard that moves on with what is taken.

    Raises:
        InputError: the file cannot be read there (any more).
    """

    def __init__(self, shard: Shard, start: int) -> None:
        self.shard, self.row = shard, start
        self._lists: Iterator[Cells] | None = None
        self._left: Cells = []

    def take(self, start: int, stop: int) -> Cells:
        """Rows [``start``, ``stop``); ``start`` is not before `row`."""
        taken: Cells = []
        for attempt in range(1, ATTEMPTS + 1):
            try:
                while self.row < stop:
                    if not self._left:
                        self._lists = self._lists or self.shard.cells(self.row)
                        self._left = next(self._lists)
                    skipped = min(max(start - self.row, 0), len(self._left))
                    count = min(stop - self.row, len(self._left))
                    taken += self._left[skipped:count]
                    self._left = self._left[count:]
                    self.row += count
                return taken
            except InputError:
                raise
            except Exception as error:
                self._lists = None  # the next attempt opens the file anew, at the first row not yet taken
                self._fail(error, attempt)
        raise AssertionError("the last attempt raises")

    def _fail(self, error: Exception, attempt: int) -> None:
        import pyarrow as pa

        if self.shard.remote and attempt < ATTEMPTS:
            time.sleep(WAIT * 2 ** (attempt - 1))
            return
        if not self.shard.remote and not isinstance(error, (pa.ArrowException, StopIteration, *BROKEN)):
            raise error
        ended = isinstance(error, StopIteration)
        reason = "it is shorter than it was" if ended else first_line(error)
        hint = "Check the network" if self.shard.remote else "Mend it or put it back"
        raise InputError(
            f"'{self.shard.path}' cannot be read from image {self.row} on ({reason}).",
            f"{hint}, then go on with --resume.",
        ) from error


class TableShard(Shard):
    """A file with a column of pictures and perhaps one of labels."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.image_column = ""
        self.label_column: str | None = None

    @property
    @abstractmethod
    def schema(self) -> Any:
        """The file's `pyarrow.Schema`."""

    @abstractmethod
    def column(self, name: str) -> Any:
        """A whole column as a `pyarrow.ChunkedArray`."""

    def labels(self) -> npt.NDArray[Any] | None:
        if self.label_column is None:
            return None
        column = self.column(self.label_column)
        if column.null_count:
            raise InputError(
                f"'{self.path}': column '{self.label_column}' has no value in {column.null_count} of "
                f"{len(column)} rows.",
                "Fill them, or set data.labels=false.",
            )
        values: npt.NDArray[Any] = column.to_numpy()
        return values.astype(np.str_ if values.dtype.kind == "O" else np.int64)


def _check_counts(counts: Sequence[int], size: int) -> None:
    """Refuse numbers of rows that a file of ``size`` bytes cannot hold, before memory is taken for them."""
    if min(counts, default=0) < 0 or sum(counts) > _ROWS_PER_BYTE * size:
        raise OSError(f"it is said to hold {sum(counts):,} rows in {size:,} bytes")


class ParquetShard(TableShard):
    """A parquet file on this disk or, by a URL such as ``hf://``, elsewhere; read a row group at a time.

    Raises:
        InputError: it is damaged or not there.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.remote = "://" in path
        with _opened(path):
            source = self._source()
            with self._file(source) as file:
                groups = [file.metadata.row_group(place).num_rows for place in range(file.num_row_groups)]
                self._schema = file.schema_arrow
                _check_counts(groups, source.size if self.remote else os.stat(path).st_size)
        self._starts = np.cumsum([0, *groups])

    @property
    def schema(self) -> Any:
        return self._schema

    def __len__(self) -> int:
        return int(self._starts[-1])

    def reached_from(self, row: int) -> int:
        return int(self._starts[self._group(row)])

    def _group(self, row: int) -> int:
        return int(np.searchsorted(self._starts, row, side="right")) - 1

    def cells(self, start: int) -> Iterator[Cells]:
        with self._file(self._source()) as file:
            if file.metadata.num_rows != len(self):
                raise OSError(f"it has {file.metadata.num_rows} rows, not {len(self)} as before")
            for group in range(self._group(start), file.num_row_groups):
                row = int(self._starts[group])
                # One group at a time: the reader may hold all of those it is given.
                for batch in file.iter_batches(_BATCH, row_groups=[group], columns=[self.image_column]):
                    if row + len(batch) > start:
                        yield batch.column(0).slice(max(start - row, 0)).to_pylist()
                    row += len(batch)

    def column(self, name: str) -> Any:
        with _opened(self.path), self._file(self._source()) as file:
            return file.read(columns=[name]).column(0)

    def _source(self) -> Any:
        return open_remote(self.path) if self.remote else self.path

    def _file(self, source: Any) -> Any:
        import pyarrow.parquet as pq

        # Read through a small buffer: a row group may be as large as the file.
        return pq.ParquetFile(source, buffer_size=2**20, pre_buffer=self.remote)


class ArrowShard(TableShard):
    """An arrow file, memory-mapped, as a stream (as `datasets` writes it) or as a file.

    Raises:
        InputError: it is damaged or not there.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path)
        with _opened(path):
            table = self._table()
            _check_counts([len(table)], os.stat(path).st_size)
        self._schema, self._count = table.schema, len(table)

    @property
    def schema(self) -> Any:
        return self._schema

    def __len__(self) -> int:
        return self._count

    def cells(self, start: int) -> Iterator[Cells]:
        table = self._table().select([self.image_column])
        if len(table) != len(self):
            raise OSError(f"it has {len(table)} rows, not {len(self)} as before")
        for batch in table.slice(start).to_batches(max_chunksize=_BATCH):
            column = batch.column(0)
            column.validate(full=True)  # offsets in the file may be anybody's
            yield column.to_pylist()

    def column(self, name: str) -> Any:
        with _opened(self.path):
            column = self._table().column(name)
            column.validate(full=True)
            return column

    def check(self) -> None:
        """Look through the whole file for offsets that lead out of it; raises as the class."""
        with _opened(self.path):
            self._table().validate(full=True)

    def _table(self) -> Any:
        import pyarrow as pa

        try:
            return pa.ipc.open_stream(pa.memory_map(self.path)).read_all()
        except pa.ArrowInvalid:
            return pa.ipc.open_file(pa.memory_map(self.path)).read_all()


class TarShard(Shard):
    """A tar file of a WebDataset: files that share a name but for the suffix are one sample.

    A sample has one picture and, where labelled, a class number in a ``.cls`` file. Nothing is unpacked: places and
    sizes of the files are noted once, and a picture is read from its place.

    Raises:
        InputError: it is damaged or compressed, a sample has several pictures, or only some have a class.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path)
        pictures: dict[str, tuple[int, int]] = {}
        classes: dict[str, int] = {}
        known = Image.registered_extensions()
        with _opened(path), tarfile.open(path, "r:") as archive:
            for member in archive:
                archive.members = []  # type: ignore[attr-defined]  # else it would remember every one
                folder, _, name = member.name.rpartition("/")
                key, _, suffixes = name.partition(".")
                key, suffix = f"{folder}/{key}", f".{suffixes.rpartition('.')[2].lower()}"
                if member.size < 0:  # after which it would go round and round
                    raise tarfile.ReadError("a file of less than no bytes")
                if not member.isreg() or member.issparse() or not name or name.startswith("."):
                    continue
                if suffix in known:
                    if key in pictures:
                        raise InputError(
                            f"'{path}': the sample '{key.lstrip('/')}' has several pictures.", "Keep one of them."
                        )
                    pictures[key] = (member.offset_data, member.size)
                elif suffix == _CLASS and member.size <= _CLASS_BYTES:
                    file = archive.extractfile(member)
                    classes[key] = int(file.read()) if file else -1
            # After the last file stands a block of zeros; tarfile takes a cut-off file for a whole one.
            assert archive.fileobj is not None
            archive.fileobj.seek(archive.offset)
            if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("it has no end, as if it were cut off")
            if classes and (missing := pictures.keys() - classes.keys()):
                raise InputError(
                    f"'{path}': {len(missing)} of {len(pictures)} pictures have no class, such as "
                    f"'{min(missing).lstrip('/')}'.",
                    f"Give each a {_CLASS} file, or none.",
                )
            self._places = np.array(list(pictures.values()), dtype=np.int64).reshape(-1, 2)
            self._classes = np.array([classes[key] for key in pictures], dtype=np.int64) if classes else None

    def __len__(self) -> int:
        return len(self._places)

    def cells(self, start: int) -> Iterator[Cells]:
        with Path(self.path).open("rb") as file:
            for offset, size in self._places[start:].tolist():
                file.seek(offset)
                yield [file.read(size)]

    def labels(self) -> npt.NDArray[Any] | None:
        return self._classes


def open_remote(url: str) -> Any:
    """A file on the hub, of which only the parts that are read are fetched."""
    from huggingface_hub import HfFileSystem

    return HfFileSystem().open(url, "rb")


@contextmanager
def _opened(path: str) -> Iterator[None]:
    """What fails while a shard is opened, as one line that names it."""
    import pyarrow as pa

    remote = "://" in path
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        of_the_file = (pa.ArrowException, tarfile.TarError, RecursionError, MemoryError, *BROKEN)
        if not remote and not isinstance(error, of_the_file):
            raise
        hint = "Check the network." if remote else "Mend or remove it."
        raise InputError(f"'{path}' cannot be read ({first_line(error)}).", hint) from error
