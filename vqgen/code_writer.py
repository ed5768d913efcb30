"""Writing of a code store: streamed to a temporary folder, renamed when complete. Reading is `vqgen.code_store`."""

from __future__ import annotations

import hashlib
import json
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from einops import rearrange
from torch import Tensor

from vqgen.code_info import FORMAT, INFO, LABEL, TABLE, CodeStoreInfo, column_dtype
from vqgen.codes import Codes
from vqgen.errors import InputError
from vqgen.files import atomic_folder

_CHUNK_BYTES = 16 * 2**20


class CodeWriter:
    """Writes a code store batch by batch, in little memory whatever its size.

    A context manager: the store appears at ``folder``, replacing an older one, when the block ends well; when it ends
    in an error, nothing is left and an older store is untouched. ``info`` comes without ``splits`` and ``content``.

    Raises:
        InputError: ``folder`` exists and is not a code store; or, at the end, nothing was added.
    """

    def __init__(self, folder: str | Path, info: CodeStoreInfo) -> None:
        self.folder = Path(folder)
        self.info = info
        self._files = ExitStack()
        self._open: dict[str, _SplitWriter] = {}

    def __enter__(self) -> CodeWriter:
        occupied = not self.folder.is_dir() or any(self.folder.iterdir()) if self.folder.exists() else False
        if occupied and not (self.folder / INFO).is_file():
            raise InputError(f"'{self.folder}' exists and is not a code store.", "Name another folder, or move it.")
        # Left in the opposite order: the splits' files are closed, codes.json is written, the folder is renamed.
        self._temporary = self._files.enter_context(atomic_folder(self.folder))
        self._files.push(self._finish)
        return self

    def add(self, split: str, codes: Codes, labels: Tensor | None = None) -> None:
        """Append a batch: ``codes`` (B, h, w) per level, coarse to fine, and ``labels`` (B,) iff there are classes.

        Raises:
            ValueError: shapes, code values or labels that do not fit the store's info.
        """
        columns = _checked(self.info, codes, labels)
        if split not in self._open:
            self._open[split] = self._files.enter_context(_SplitWriter(self._temporary / split, self.info))
        self._open[split].add(columns)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._files.__exit__(kind, error, _)

    def _finish(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            return
        if not self._open:
            raise InputError(f"No codes to write to '{self.folder}'.")
        info = replace(
            self.info,
            splits={name: writer.count for name, writer in self._open.items()},
            content={name: writer.digest() for name, writer in self._open.items()},
        )
        text = json.dumps({"format": FORMAT, **asdict(info)}, indent=2, ensure_ascii=False) + "\n"
        (self._temporary / INFO).write_text(text, encoding="utf-8")


class _SplitWriter:
    """One split's Arrow file; rows are gathered into chunks of about 16 MiB."""

    def __init__(self, folder: Path, info: CodeStoreInfo) -> None:
        import datasets

        self.count = 0
        self._folder, self._info = folder, info
        features = {
            level.name: datasets.Sequence(datasets.Value(column_dtype(level).name), length=level.positions)
            for level in info.levels
        }
        if info.class_names:
            features[LABEL] = datasets.ClassLabel(names=list(info.class_names))
        self._features = datasets.Features(features)
        self._digests = {name: hashlib.sha256() for name in features}
        self._pending: list[dict[str, npt.NDArray[Any]]] = []
        row_bytes = sum(level.positions * column_dtype(level).itemsize for level in info.levels)
        self._chunk_rows = max(1, _CHUNK_BYTES // row_bytes)

    def __enter__(self) -> _SplitWriter:
        self._folder.mkdir()
        self._file = (self._folder / TABLE).open("wb")
        self._writer = pa.ipc.new_stream(self._file, self._features.arrow_schema)
        return self

    def add(self, columns: dict[str, npt.NDArray[Any]]) -> None:
        for name, digest in self._digests.items():
            digest.update(columns[name].astype("<i8").tobytes())
        self._pending.append(columns)
        if sum(len(next(iter(waiting.values()))) for waiting in self._pending) >= self._chunk_rows:
            self._flush()

    def digest(self) -> str:
        """SHA-256 of the codes and labels added so far, whatever the batches they came in."""
        return hashlib.sha256(b"".join(digest.digest() for digest in self._digests.values())).hexdigest()

    def _flush(self) -> None:
        schema = self._features.arrow_schema
        joined = {name: np.concatenate([waiting[name] for waiting in self._pending]) for name in schema.names}
        self._pending = []
        arrays = []
        for name in schema.names:
            flat = pa.array(joined[name].reshape(-1))
            arrays.append(flat if name == LABEL else pa.FixedSizeListArray.from_arrays(flat, joined[name].shape[1]))
        batch = pa.RecordBatch.from_arrays(arrays, schema=schema)
        self._writer.write_batch(batch)
        self.count += len(batch)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        import datasets

        try:
            if kind is None and self._pending:
                self._flush()
            self._writer.close()
        finally:
            self._file.close()
        if kind is None:
            datasets.DatasetInfo(features=self._features).write_to_directory(str(self._folder))
            state: dict[str, Any] = {
                "_data_files": [{"filename": TABLE}],
                "_fingerprint": self.digest()[:16],
                "_format_columns": None,
                "_format_kwargs": {},
                "_format_type": None,
                "_output_all_columns": False,
                "_split": self._folder.name,
            }
            (self._folder / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")


def _checked(info: CodeStoreInfo, codes: Codes, labels: Tensor | None) -> dict[str, npt.NDArray[Any]]:
    """A batch as flat columns, after checking it against ``info``."""
    if len(codes) != len(info.levels):
        raise ValueError(f"expected the codes of {len(info.levels)} levels, got {len(codes)}")
    if (labels is None) != (not info.class_names):
        raise ValueError("labels are needed where there are class names, and only there")
    batch = len(codes[0])
    columns: dict[str, npt.NDArray[Any]] = {}
    for level, tensor in zip(info.levels, codes, strict=True):
        if tuple(tensor.shape) != (batch, level.height, level.width) or tensor.is_floating_point():
            raise ValueError(
                f"'{level.name}': expected integers ({batch}, {level.height}, {level.width}), "
                f"got {tensor.dtype} {tuple(tensor.shape)}"
            )
        _within(tensor, level.codebook_size, level.name)
        columns[level.name] = rearrange(tensor, "b h w -> b (h w)").cpu().numpy().astype(column_dtype(level))
    if labels is not None:
        if tuple(labels.shape) != (batch,):
            raise ValueError(f"expected {batch} labels, got shape {tuple(labels.shape)}")
        _within(labels, len(info.class_names), LABEL)
        columns[LABEL] = labels.cpu().numpy().astype(np.int64)
    return columns


def _within(values: Tensor, count: int, name: str) -> None:
    if values.numel() and not (int(values.min()) >= 0 and int(values.max()) < count):
        raise ValueError(f"'{name}': values {int(values.min())} to {int(values.max())} are not in [0, {count})")
