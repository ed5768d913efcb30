"""Work that was stopped goes on: what an encoding or a sampling has made is kept beside the folder that is to be.

``.<folder>.begun/`` holds ``about.json``, which says what the work is, and files of images in their order, such as
``train-000000000000-000000008192.1f3a5c7e.20fe11d2.safetensors``, written every half minute or every few thousand
images. When the work is done the folder is removed; what is about something else, or damaged, is not used: each file
bears a digest of its work, as two commands may be at work on one folder, and a checksum of its tensors. The first
process of a launcher writes and reads it alone.
"""

from __future__ import annotations

import hashlib
import json
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from vqgen.errors import InputError, MismatchError
from vqgen.files import clear_remains, disk_errors, read_json, replacing, settle, write_json
from vqgen.hub import read_tensors
from vqgen.training_state import plain

SHARD_SECONDS = 30.0
SHARD_IMAGES = 8192
SHARD_BYTES = 64 * 2**20
"""What was made is written after so long, or when it is so many images, or so much."""

ABOUT, NOTE = "about.json", "note.json"

Shapes = Callable[[int], dict[str, tuple[int, ...]]]
"""Shapes by name of the tensors of so many images."""


class Begun:
    """What is made of the folder ``target`` by a work that ``about``, plain JSON, describes in full."""

    def __init__(self, target: Path, about: Mapping[str, Any]) -> None:
        self.folder = target.with_name(f".{target.name}.begun")
        self._about = plain(about)
        self._mark = hashlib.sha256(json.dumps(self._about, sort_keys=True).encode()).hexdigest()[:8]
        self._counts: dict[str, int] = {}
        self._waiting: list[dict[str, Tensor]] = []
        self._series = ""
        self._written = time.monotonic()
        self._usable = not self.folder.is_symlink()  # who follows a link writes where another has chosen
        if self._usable and self.folder.exists() and self._read(ABOUT) != self._about:
            self.remove()

    def made(self, series: str, shapes: Shapes) -> Iterator[dict[str, Tensor]]:
        """The tensors of a series (``train``) from its first image on, file by file, as far as they are whole."""
        self._counts[series] = 0
        for path in sorted(self.folder.glob(f"{series}-*-*.{self._mark}.*.safetensors")) if self._usable else ():
            places, _, checksum, _ = path.name.split(".")
            first, last = (int(part) if part.isdecimal() else -1 for part in places.split("-")[-2:])
            if first != self._counts[series] or last <= first:
                continue
            try:
                tensors = read_tensors(path, shapes(last - first))
            except (InputError, MismatchError):
                continue
            if _checksum(tensors) != checksum:
                continue
            yield {name: value.long() if value.dtype == torch.int32 else value for name, value in tensors.items()}
            self._counts[series] = last  # unless whoever reads it found it of no use

    def note(self) -> dict[str, float]:
        """What was noted with the newest file."""
        found = self._read(NOTE)
        numbers = found.items() if isinstance(found, dict) else ()
        return {key: float(value) for key, value in numbers if isinstance(value, (int, float))}

    def add(self, series: str, tensors: Mapping[str, Tensor], note: Mapping[str, float] | None = None) -> None:
        """Take in what was made of the next images of a series; series come one after the other.

        Raises:
            InputError: the disk is full.
        """
        if not self._usable:
            return
        if series != self._series:
            self._series, self._waiting = series, []
        self._waiting.append({n: v.to(torch.int32) if v.dtype == torch.int64 else v for n, v in tensors.items()})
        images = sum(len(next(iter(made.values()))) for made in self._waiting)
        size = sum(value.nbytes for made in self._waiting for value in made.values())
        late = time.monotonic() - self._written >= SHARD_SECONDS
        if images >= SHARD_IMAGES or size >= SHARD_BYTES or late:
            self._write(series, images, note)

    def _write(self, series: str, images: int, note: Mapping[str, float] | None) -> None:
        if not (self.folder / ABOUT).is_file():
            write_json(self.folder / ABOUT, self._about)
        first = self._counts.get(series, 0)
        last = first + images
        joined = {name: torch.cat([made[name] for made in self._waiting]).contiguous() for name in self._waiting[0]}
        name = f"{series}-{first:012d}-{last:012d}.{self._mark}.{_checksum(joined)}.safetensors"
        with replacing(self.folder / name) as path:
            save_file(joined, path)
            settle(path)
        if note is not None:
            write_json(self.folder / NOTE, note)
        self._counts[series], self._waiting, self._written = last, [], time.monotonic()

    def _read(self, name: str) -> Any:
        try:
            return read_json(self.folder / name)
        except InputError:
            return None

    def remove(self) -> None:
        """Remove what is kept, and nothing else: the work is done, or another one was begun.

        Raises:
            InputError: the folder cannot be removed.
        """
        if not self._usable or not self.folder.is_dir():
            return
        with disk_errors(self.folder):
            for path in (*self.folder.glob("*-*-*.safetensors"), self.folder / ABOUT, self.folder / NOTE):
                path.unlink(missing_ok=True)
            clear_remains(self.folder)
            if not any(self.folder.iterdir()):
                self.folder.rmdir()


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    checksum = 0
    for name, tensor in sorted(tensors.items()):
        checksum = zlib.crc32(tensor.numpy().tobytes(), zlib.crc32(name.encode(), checksum))
    return f"{checksum:08x}"
