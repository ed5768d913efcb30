"""The run folder: where everything of a run lies, what made it, and how files get there whole.

::

    runs/cifar10/
      config.yaml   run.json             resolved settings; versions, commands, data, stages done
      codec/        codes/               the codec and its training; the code maps of every split
      priors/<name>/<level>/             one trained prior each
      samples/<name>/   compare/         what was made from them

A run can be moved or copied: nothing in it holds an absolute path. Files are written under a temporary name
and renamed, so that what is there is complete. What is inside the parts is known to those that write them.
"""

from __future__ import annotations

import errno
import importlib.metadata
import json
import os
import platform
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from vqgen.console import finite
from vqgen.errors import InputError, did_you_mean

FORMAT = 1
RUNS = Path("runs")
DEFAULT_PRESET = "shapes"
_RECORDED_PACKAGES = ("torch", "accelerate", "numpy", "datasets", "x-transformers", "safetensors")


class RunFolder:
    """Paths and records of one run; nothing is made on disk before `create`."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def record(self) -> Path:
        return self.path / "run.json"

    @property
    def codec(self) -> Path:
        return self.path / "codec"

    @property
    def codes(self) -> Path:
        return self.path / "codes"

    @property
    def priors(self) -> Path:
        return self.path / "priors"

    @property
    def compare(self) -> Path:
        return self.path / "compare"

    def prior(self, name: str, level: str) -> Path:
        """Folder of the prior ``name`` of one level."""
        return self.priors / plain_name(name, "prior") / plain_name(level, "level")

    def prior_stage(self, name: str, level: str) -> str:
        """Name of the stage that trains it, which is also its folder in the run."""
        return self.prior(name, level).relative_to(self.path).as_posix()

    def samples(self, name: str) -> Path:
        return self.path / "samples" / plain_name(name, "sample set")

    @property
    def exists(self) -> bool:
        """Whether a run was made here."""
        return self.record.is_file()

    def create(self) -> None:
        """Make the folder and its run.json, unless they are there.

        Raises:
            InputError: the path is a file, or a folder with other things in it.
        """
        if self.exists:
            return
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{self.path} is a file, not a folder.", "Give another --run.")
        if self.path.is_dir() and any(not entry.name.startswith(".") for entry in self.path.iterdir()):
            raise InputError(f"{self.path} is not empty and not a run (no run.json).", "Give another --run.")
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        empty = {"format": FORMAT, "created": _now(), "versions": versions(), "data": {}, "stages": {}, "commands": []}
        write_json(self.record, empty)

    def read(self) -> dict[str, Any]:
        """The contents of run.json.

        Raises:
            InputError: it is missing or damaged, or a newer vqgen wrote it.
        """
        saved = read_json(self.record)
        parts = {"data": dict, "stages": dict, "commands": list}
        if not isinstance(saved, dict) or not all(isinstance(saved.get(key), kind) for key, kind in parts.items()):
            raise InputError(f"{self.record} is not the record of a vqgen run.", "Restore it, or start a new run.")
        if saved.get("format") != FORMAT:
            raise InputError(
                f"{self.record} has format {saved.get('format')!r}; this vqgen reads {FORMAT}.", "Upgrade vqgen."
            )
        return saved

    def record_command(self, argv: Sequence[str]) -> None:
        """Note a command line, and the versions it ran with."""
        with self._edit() as saved:
            saved["commands"].append({"at": _now(), "argv": list(argv)})
            saved["versions"] = versions()

    def record_data(self, data: Mapping[str, Any]) -> None:
        """Note what the run's images are: fingerprint, description, notes."""
        with self._edit() as saved:
            saved["data"] = dict(data)

    def record_stage(self, name: str, record: Mapping[str, Any]) -> None:
        """Note that a stage (``codec``, ``codes``, ``priors/pixelcnn/top``) is done, and with what."""
        with self._edit() as saved:
            saved["stages"][name] = {**record, "at": _now(), "versions": versions()}

    def stage(self, name: str) -> dict[str, Any] | None:
        """What `record_stage` noted, or None where the stage is not done."""
        return self.stages().get(name)

    def stages(self) -> dict[str, dict[str, Any]]:
        """Every stage that is done, in the order in which they were."""
        return self.read()["stages"] if self.exists else {}

    def require_stage(self, name: str, command: str) -> dict[str, Any]:
        """What `record_stage` noted.

        Raises:
            InputError: the stage is not done; ``command`` does it.
        """
        record = self.stage(name)
        if record is None:
            raise InputError(f"{self.path} has no trained {name} yet.", f"Make it with `{command}`.")
        return record

    def remove_stages(self, names: Sequence[str]) -> None:
        """Remove the files of stages, done or only begun, and forget them."""
        with self._edit() as saved:
            for name in names:
                saved["stages"].pop(name, None)
        for name in names:
            shutil.rmtree(self.path / name, ignore_errors=True)

    def data_description(self) -> str:
        """One line on the run's images; empty before they were read."""
        return str(self.read()["data"].get("description", ""))

    @contextmanager
    def _edit(self) -> Iterator[dict[str, Any]]:
        with locked(self.path / ".lock", wait=True):
            saved = self.read()
            yield saved
            write_json(self.record, saved)


def run_for(run: str | None, config: str | None, data: str | None = None) -> Path:
    """Where a command that may start a run puts it: ``--run``, or ``runs/`` and the name of the preset or the data."""
    if run is not None:
        return Path(run)
    if config is None and data is not None:
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(data).stem).strip("-.") or "images"
    else:
        name = Path(config or DEFAULT_PRESET).stem
    return RUNS / plain_name(name, "run")


def find_run(run: str | None, config: str | None = None) -> Path:
    """The run that a later command works on.

    ``--run`` wins; then the run of the preset that ``--config`` names; then the only run in ``runs/``.

    Raises:
        InputError: that is not a run, there is none, or there are several.
    """
    known = sorted(path.parent for path in RUNS.glob("*/run.json"))
    first = "Train one first: vqgen train-codes"
    if run is not None:
        path = Path(run)
        if (path / "run.json").is_file():
            return path
        hint = did_you_mean(run, [str(other) for other in known]) or f"{first} --run {run}"
        raise InputError(f"{run} is not a run (it has no run.json)." if path.exists() else f"No run at '{run}'.", hint)
    if config is not None:
        path = run_for(None, config)
        if not (path / "run.json").is_file():
            raise InputError(f"No run at '{path}'.", f"{first} --config {config}")
        return path
    if not known:
        raise InputError(f"No run in '{RUNS}{os.sep}'.", f"{first} (or name a run with --run).")
    if len(known) > 1:
        raise InputError(
            f"Several runs in '{RUNS}{os.sep}': {', '.join(path.name for path in known)}.",
            f"Choose one, such as --run {known[0]}.",
        )
    return known[0]


def plain_name(name: str, what: str) -> str:
    """``name``, which is to become a part of a path.

    Raises:
        InputError: it is empty or too long, starts with a dot, or holds a separator or a control character.
    """
    if not re.fullmatch(r"(?!\.)[^/\\:\x00-\x1f\x7f]{1,100}", name):
        raise InputError(
            f"{name!r} cannot be the name of a {what}.", "Use up to 100 letters, digits, '-' and '_', and no '/'."
        )
    return name


def versions() -> dict[str, str]:
    """Versions of vqgen, Python and the libraries that decide results; a missing one is left out."""
    from vqgen import __version__

    found = {"vqgen": __version__, "python": platform.python_version()}
    for package in _RECORDED_PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def write_text(path: Path, text: str) -> None:
    """Write ``text`` (UTF-8) so that ``path`` is whole or unchanged; makes the folders above it.

    Raises:
        InputError: the disk is full, or the path cannot be written.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content``, like `write_text`."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON, like `write_text`; a number that is not finite becomes null."""
    write_text(path, json.dumps(finite(value), indent=2) + "\n")


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        InputError: the file is missing, unreadable or damaged.
    """
    if not path.is_file():
        raise InputError(f"{path} is missing.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged ({error}).", "Restore it, or make it again.") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path`` for a file that takes the place of ``path`` if the block ends without an error.

    Raises:
        InputError: the disk is full, or the path cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside ``path``, which takes the place of ``path`` if the block ends without an error.

    Raises:
        InputError: the disk is full, or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk_errors(path):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            yield temporary
            replace_folder(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def replace_folder(source: Path, target: Path) -> None:
    """Rename ``source`` to ``target``; what was there is removed afterwards."""
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    if target.exists():
        target.rename(old)
    try:
        source.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the errors of a full disk and of forbidden paths into one line that names ``path``."""
    try:
        yield
    except Exception as error:
        code = error.errno if isinstance(error, OSError) else None
        # safetensors reports errors of the disk as its own kind, with the system's number in the text.
        number = re.search(r"os error (\d+)", str(error))
        code = int(number[1]) if code is None and number else code
        if code in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(f"The disk is full: {path} was not written.", "Free some space and go on.") from error
        if code in (errno.EACCES, errno.EPERM, errno.EROFS):
            named = getattr(error, "filename", None) or path
            raise InputError(f"{named} cannot be written (no permission).", "Choose another folder.") from error
        raise


@contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock file ``path``, which the system releases when the process ends, however it ends.

    Without ``wait``, a lock that another process holds is an `InputError`. Where the system or the file
    system has no such locks, nothing is held.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise InputError(
                f"Another process is working in {path.parent}.", "Wait for it to end, or give another --run."
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
        yield


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
