"""Code maps on disk: an Arrow data set per split, and codes.json that says what they are.

A split is a folder that `datasets.load_from_disk` opens too: one column of flat, fixed-length integer lists per level
(``top``, ``middle``, ``bottom``; int16, or int32 for codebooks above 32,768) and, where labelled, ``label``. Flat
lists are read as one memory-mapped matrix per chunk, so a batch costs about as much as indexing an array. A split is
opened when it is first looked up. codes.json names the codec and the data that the codes came from; comparing these
with a prior's is the caller's part.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from einops import rearrange
from torch.utils.data import Dataset

from vqgen.code_info import ENCODE_AGAIN, INFO, LABEL, TABLE, CodeStoreInfo, column_types, read_info
from vqgen.code_writer import CodeWriter
from vqgen.errors import InputError

__all__ = ["CodeSplit", "CodeStore", "CodeStoreInfo", "CodeWriter"]


_BLOCK = 4096


class CodeStore:
    """A folder of codes, opened with `CodeStore.load`."""

    def __init__(self, folder: Path, info: CodeStoreInfo) -> None:
        self.folder = folder
        self.info = info
        self._splits: dict[str, CodeSplit] = {}

    @classmethod
    def load(cls, folder: str | Path) -> CodeStore:
        """The code store at ``folder``; reads codes.json only.

        Raises:
            InputError: there is none, codes.json is damaged, or a split that it names is not there.
        """
        folder = Path(folder)
        info = read_info(folder / INFO)
        for split in info.splits:
            if not (folder / split / TABLE).is_file():
                raise InputError(f"The codes of '{split}' are missing from '{folder}'.", ENCODE_AGAIN)
        return cls(folder, info)

    @property
    def labelled(self) -> bool:
        return bool(self.info.class_names)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what the store says it holds, codes and labels included; the same wherever it lies."""
        return hashlib.sha256(json.dumps(asdict(self.info), sort_keys=True).encode()).hexdigest()

    def split(self, name: str) -> CodeSplit:
        """The codes of one split.

        Raises:
            InputError: the store has no such split, or its file does not fit codes.json.
        """
        if name not in self.info.splits:
            raise InputError(f"No split '{name}' in '{self.folder}', only {', '.join(self.info.splits)}.", ENCODE_AGAIN)
        if name not in self._splits:
            self._splits[name] = CodeSplit(self.folder, self.info, name)
        return self._splits[name]


class CodeSplit(Dataset[dict[str, Any]]):
    """The codes of one split, memory-mapped.

    A batch is ``{"codes": Codes, "label": int64 (B,)}``, without ``label`` where unlabelled.

    Raises:
        InputError: the file is damaged or does not fit ``info``; when a batch is read, a code or a label out of range.
    """

    def __init__(self, folder: Path, info: CodeStoreInfo, name: str) -> None:
        self.name = name
        self._folder, self._info = folder, info
        path = folder / name / TABLE
        try:
            table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
            table.validate(full=True)  # offsets and lengths in the file may be anybody's
        except (pa.ArrowException, OSError, MemoryError, ValueError) as error:
            raise InputError(f"'{path}' is damaged ({str(error).splitlines()[0]}).", ENCODE_AGAIN) from error
        found = {column.name: column.type for column in table.schema}
        expected = column_types(info)
        if found != expected:
            raise InputError(
                f"'{path}' has the columns {_columns_text(found)}; {INFO} says {_columns_text(expected)}.", ENCODE_AGAIN
            )
        if any(column.null_count or _holes(column) for column in table.columns):
            raise InputError(f"'{path}' has rows without a value.", ENCODE_AGAIN)
        if len(table) != info.splits[name]:
            raise InputError(f"'{path}' has {len(table)} rows, {INFO} says {info.splits[name]}.", ENCODE_AGAIN)
        self._maps = [_Rows(table.column(level.name), level.positions) for level in info.levels]
        self._labels = None
        if info.class_names:
            self._labels = table.column(LABEL).to_numpy().astype(np.int64)
            self._check(self._labels, len(info.class_names), "label", "classes")

    def __reduce__(self) -> tuple[Any, ...]:
        return CodeSplit, (self._folder, self._info, self.name)  # a loader process maps the file anew

    def __len__(self) -> int:
        return self._info.splits[self.name]

    def verify(self) -> None:
        """Read the whole split, block by block, and compare it with the checksum that was taken as it was written.

        Raises:
            InputError: a code or a label is another than was written.
        """
        parts = []
        for rows, _ in zip(self._maps, self._info.levels, strict=True):
            digest = hashlib.sha256()
            for start in range(0, len(self), _BLOCK):
                digest.update(rows.take(np.arange(start, min(start + _BLOCK, len(self)))).astype("<i8").tobytes())
            parts.append(digest.digest())
        if self._labels is not None:
            parts.append(hashlib.sha256(self._labels.astype("<i8").tobytes()).digest())
        if hashlib.sha256(b"".join(parts)).hexdigest() != self._info.content.get(self.name):
            raise InputError(
                f"The codes of '{self.name}' in '{self._folder}' are not those that were written: they are damaged.",
                ENCODE_AGAIN,
            )

    def labels(self) -> npt.NDArray[np.int64] | None:
        """Classes of the whole split, int64 (N,); None where unlabelled."""
        return None if self._labels is None else self._labels.copy()

    def __getitem__(self, index: int) -> dict[str, Any]:
        batch = self.__getitems__([index])
        item: dict[str, Any] = {"codes": tuple(codes[0] for codes in batch["codes"])}
        return item if self._labels is None else {**item, "label": batch["label"][0]}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Any]:
        chosen = np.asarray(indices, dtype=np.int64)
        if chosen.size and not (chosen.min() >= 0 and chosen.max() < len(self)):
            raise IndexError(f"index out of range for the {len(self)} code maps of '{self.name}'")
        codes = []
        for level, rows in zip(self._info.levels, self._maps, strict=True):
            flat = rows.take(chosen)
            self._check(flat, level.codebook_size, f"'{level.name}' code", "codes")
            codes.append(rearrange(torch.from_numpy(flat), "b (h w) -> b h w", h=level.height))
        batch: dict[str, Any] = {"codes": tuple(codes)}
        if self._labels is not None:
            batch["label"] = torch.from_numpy(self._labels[chosen])
        return batch

    def _check(self, values: npt.NDArray[np.int64], count: int, what: str, of: str) -> None:
        if values.size and not (values.min() >= 0 and values.max() < count):
            wrong = int(values.min()) if values.min() < 0 else int(values.max())
            raise InputError(
                f"'{self._folder / self.name}' holds the {what} {wrong}, but there are {count} {of} from 0 up.",
                ENCODE_AGAIN,
            )


class _Rows:
    """A column of fixed-length lists as matrices over the file's own memory, one per chunk."""

    def __init__(self, column: Any, width: int) -> None:
        chunks = [chunk for chunk in column.chunks if len(chunk)]
        self._matrices = [chunk.flatten().to_numpy(zero_copy_only=True).reshape(-1, width) for chunk in chunks]
        self._starts = np.cumsum([0, *(len(matrix) for matrix in self._matrices)])
        self._width = width

    def take(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Rows at ``indices`` (B,) as a new int64 (B, width)."""
        if len(self._matrices) == 1:
            rows: npt.NDArray[np.int64] = self._matrices[0][indices].astype(np.int64)
            return rows
        taken = np.empty((len(indices), self._width), dtype=np.int64)
        chunk_of = np.searchsorted(self._starts, indices, side="right") - 1
        for chunk in np.unique(chunk_of):
            here = chunk_of == chunk
            taken[here] = self._matrices[chunk][indices[here] - self._starts[chunk]]
        return taken


def _holes(column: Any) -> bool:
    return any(pa.types.is_fixed_size_list(chunk.type) and chunk.flatten().null_count for chunk in column.chunks)


def _columns_text(types: dict[str, Any]) -> str:
    return ", ".join(f"{name} {kind}" for name, kind in types.items())
