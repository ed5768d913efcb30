"""Checkpoints: all that a training needs to go on, as safetensors and JSON and nothing else.

::

    checkpoints/
      latest                     name of the newest checkpoint
      step-00000600/
        state.json               step, counters, settings, and size and checksum of every other file
        task.safetensors         parameters and buffers        average.safetensors   averaged parameters
        optimizer-<player>.safetensors                         best.safetensors      best weights so far
        random-<rank>.safetensors                              states of the random generators

A checkpoint is written under a temporary name and renamed when it is whole. Nothing here unpickles.
"""

from __future__ import annotations

import json
import random
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor

from vqgen.agreement import Processes
from vqgen.errors import InputError
from vqgen.files import disk_errors, replace_folder, write_text
from vqgen.hub import read_tensors
from vqgen.parsing import load_json

FORMAT = 1
STATE = "state.json"
LATEST = "latest"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk whose files are whole."""

    path: Path
    state: dict[str, Any]

    @property
    def identity(self) -> dict[str, Any]:
        """What the training it is of was begun with; empty where it does not say."""
        found = self.state.get("identity")
        return found if isinstance(found, dict) else {}

    def tensors(self, part: str, shapes: Mapping[str, tuple[int, ...]] | None = None) -> dict[str, Tensor]:
        """Tensors of ``<part>.safetensors``, on the CPU.

        Raises:
            MismatchError: names or shapes are not those of ``shapes``.
        """
        return read_tensors(self.path / f"{part}.safetensors", shapes)


class CheckpointStore:
    """The checkpoints of one training in ``folder``, of which the newest ``keep`` are kept."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def paths(self) -> list[Path]:
        """Checkpoint folders, newest first."""
        return sorted((path for path in self.folder.glob("step-*") if path.is_dir()), reverse=True)

    def latest(self) -> Path | None:
        """The checkpoint that ``latest`` names, or the newest where that file is missing; None without any."""
        paths = self.paths()
        pointer = self.folder / LATEST
        name = pointer.read_text(encoding="utf-8", errors="replace").strip() if pointer.is_file() else ""
        return next((path for path in paths if path.name == name), paths[0] if paths else None)

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        parts: Mapping[str, Mapping[str, Tensor]],
        accelerator: Accelerator,
    ) -> Path:
        """Write the checkpoint of ``step``; every process calls this, and the first one writes.

        Raises:
            InputError: the disk is full or cannot be written, on every process; the checkpoints before are untouched.
        """
        path = self.folder / f"step-{step:08d}"
        temporary = self.folder / f".{path.name}.tmp"
        processes = Processes.of(accelerator)
        with processes.together(), disk_errors(path):
            drawn = processes.exchange(random_state())
            if processes.main:
                everything = {**{f"random-{rank}": state for rank, state in enumerate(drawn)}, **parts}
                try:
                    self.sweep()
                    temporary.mkdir(parents=True)
                    for part, tensors in everything.items():
                        _write_tensors(temporary / f"{part}.safetensors", tensors)
                    _write_state(temporary, state)
                    replace_folder(temporary, path)
                    write_text(self.folder / LATEST, path.name + "\n")
                    self._prune()
                finally:
                    shutil.rmtree(temporary, ignore_errors=True)
        return path

    def load(self, warn: Callable[[str], None]) -> Checkpoint | None:
        """The newest checkpoint that is whole, or None where there are none; ``warn`` hears of damaged ones.

        Raises:
            InputError: there are checkpoints and all of them are damaged; the newest is named.
        """
        newest = self.latest()
        problems: list[str] = []
        for path in ([newest] if newest else []) + [path for path in self.paths() if path != newest]:
            try:
                checkpoint = Checkpoint(path, _verified_state(path))
            except InputError as error:
                problems.append(error.message)
                continue
            for problem in problems:
                warn(f"{problem} Going back to {path.name}.")
            return checkpoint
        if problems:
            raise InputError(problems[0], "No other checkpoint is whole: train again with --overwrite.")
        return None

    def open(self, name: str) -> Checkpoint:
        """The checkpoint of that name.

        Raises:
            InputError: it is missing or damaged.
        """
        return Checkpoint(self.folder / name, _verified_state(self.folder / name))

    def discard_after(self, checkpoint: Checkpoint) -> None:
        """Remove what is newer than ``checkpoint``, damaged or never become ``latest``, and what is too old."""
        for path in self.paths():
            if path.name > checkpoint.path.name:
                self._remove(path)
        write_text(self.folder / LATEST, checkpoint.path.name + "\n")
        self._prune()

    def _prune(self) -> None:
        for old in self.paths()[self.keep :]:
            self._remove(old)

    def _remove(self, path: Path) -> None:
        # Renamed first: of a removal that is cut short, `sweep` finds the rest, and nobody takes it for a checkpoint.
        doomed = self.folder / f".{path.name}.tmp"
        path.rename(doomed)
        shutil.rmtree(doomed)

    def sweep(self) -> None:
        """Remove what a process left that was killed while it wrote; put back what it had moved aside."""
        for old in self.folder.glob(".step-*.old"):
            whole = self.folder / old.name[1:].partition(".")[0]
            if not whole.exists():
                old.rename(whole)
        for pattern in (".step-*.tmp", ".step-*.old"):
            for path in self.folder.glob(pattern):
                shutil.rmtree(path, ignore_errors=True)


def random_state() -> dict[str, Tensor]:
    """States of the global random generators of torch, NumPy and Python, as tensors."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    assert name == "MT19937"
    version, words, gauss = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "numpy_position": torch.tensor([position, has_gauss]),
        "numpy_gauss": torch.tensor(cached, dtype=torch.float64),
        "python": torch.tensor([version, *words]),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_random_state(state: Mapping[str, Tensor]) -> None:
    """Put back what `random_state` gave; the state of a device that this machine lacks is left out."""
    torch.set_rng_state(state["torch"])
    position, has_gauss = state["numpy_position"].tolist()
    keys = state["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, position, has_gauss, state["numpy_gauss"].item()))
    version, *words = state["python"].tolist()
    gauss = state["python_gauss"].tolist()
    random.setstate((version, tuple(words), gauss[0] if gauss else None))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])


def seed_random_state(seed: int, rank: int = 0) -> None:
    """Seed the global generators from (seed, rank), so that two processes never draw the same."""
    first, second, third = np.random.SeedSequence([seed, rank]).generate_state(3, np.uint32).tolist()
    torch.manual_seed(first)
    np.random.seed(second)
    random.seed(third)


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """The global random generators are after the block what they were before it."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    seen: set[int] = set()
    written = {}
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        # safetensors refuses tensors that share memory, such as a module that is registered under two names.
        storage = value.untyped_storage().data_ptr()
        written[name] = value.clone() if storage in seen else value
        seen.add(storage)
    save_file(written, path)


def _write_state(folder: Path, state: Mapping[str, Any]) -> None:
    files = {path.name: [path.stat().st_size, _file_checksum(path)] for path in sorted(folder.iterdir())}
    body = {"format": FORMAT, "state": state, "files": files}
    # A logged scalar may be NaN, which Python's JSON writes and reads back; the loop must find it as it was.
    text = json.dumps({**body, "checksum": _text_checksum(body)}, indent=1)
    (folder / STATE).write_text(text, encoding="utf-8")


def _verified_state(folder: Path) -> dict[str, Any]:
    path = folder / STATE
    try:
        body = load_json(path, nan=True)
        checksum = body.pop("checksum")
        whole = checksum == _text_checksum(body)
        state, files = body["state"], {name: (size, of) for name, (size, of) in body["files"].items()}
        if any(Path(name).name != name for name in files):
            raise ValueError("a file of another folder")
        if not isinstance(state, dict):
            raise ValueError("no state of a training")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is missing or damaged.") from error
    if not whole:
        raise InputError(f"{path} is damaged.")
    if body["format"] != FORMAT:
        raise InputError(f"{path} has format {body['format']!r}; this vqgen reads {FORMAT}.")
    for name, (size, checksum) in files.items():
        file = folder / name
        if not file.is_file():
            raise InputError(f"{file} is missing.")
        if file.stat().st_size != size or _file_checksum(file) != checksum:
            raise InputError(f"{file} is damaged.")
    return state


def _text_checksum(value: Any) -> int:
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def _file_checksum(path: Path) -> int:
    # Against damage, not against forgery; a fast one, since a checkpoint is several times the model.
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            checksum = zlib.crc32(block, checksum)
    return checksum
