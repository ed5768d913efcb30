"""The run folder: where everything of a run lies, and what made it.

::

    runs/cifar10/
      config.yaml   run.json             resolved settings; versions, commands, data, stages done
      codec/        codes/               the codec and its training; the code maps of every split
      priors/<name>/<level>/             one trained prior each
      samples/<name>/   compare/         what was made from them
      diagnose/                          where it fails, in words and pictures
      evaluate/                          the codec alone: errors, use of its codes, pictures
      scores/<name>/                     the likelihood of given images
      classifier/                        reads classes in pictures; made when first needed

A run can be moved or copied: of its own parts it knows only their places within it. Files are written under a temporary
name and renamed, so that what is there is complete. What is inside the parts is known to those that write them.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from vqgen.errors import InputError, did_you_mean
from vqgen.files import disk_errors, read_json, remove_folder, write_json
from vqgen.locks import locked
from vqgen.run_record import PART, record_problems

FORMAT = 1
RUNS = Path("runs")
DEFAULT_PRESET = "shapes"
_TRACKED = re.compile(r"(codec|priors/[^/]+/[^/]+)/wandb")
"""Folders that Weights & Biases keeps beside a training, with links to its own cache; we read none of that."""
_RECORDED_PACKAGES = ("torch", "accelerate", "numpy", "datasets", "x-transformers", "safetensors")


class RunFolder:
    """Paths and records of one run; nothing is made on disk before `create`."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._enclosed = False

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
    def classifier(self) -> Path:
        return self.path / "classifier"

    @property
    def compare(self) -> Path:
        return self.path / "compare"

    @property
    def diagnose(self) -> Path:
        return self.path / "diagnose"

    @property
    def evaluate(self) -> Path:
        return self.path / "evaluate"

    def prior(self, name: str, level: str) -> Path:
        """Folder of the prior ``name`` of one level."""
        return self.priors / plain_name(name, "prior") / plain_name(level, "level")

    def prior_stage(self, name: str, level: str) -> str:
        """Name of the stage that trains it, which is also its folder in the run."""
        return self.prior(name, level).relative_to(self.path).as_posix()

    def samples(self, name: str) -> Path:
        return self.path / "samples" / plain_name(name, "sample set")

    def scores(self, name: str) -> Path:
        return self.path / "scores" / plain_name(name, "set of scores")

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
        self.require_enclosed()
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        empty = {"format": FORMAT, "created": _now(), "versions": versions(), "data": {}, "stages": {}, "commands": []}
        with locked(self.path / ".lock", wait=True):
            if not self.exists:  # another command may have made it just now, and written to it
                write_json(self.record, empty)

    def read(self) -> dict[str, Any]:
        """The contents of run.json.

        Raises:
            InputError: it is missing or damaged, or a newer vqgen wrote it.
        """
        self.require_enclosed()
        saved = read_json(self.record)
        if isinstance(saved, dict) and saved.get("format", FORMAT) != FORMAT:
            raise InputError(
                f"{self.record} has format {saved.get('format')!r}; this vqgen reads {FORMAT}.", "Upgrade vqgen."
            )
        if problems := record_problems(saved):
            raise InputError(
                f"{self.record} is not the record of a vqgen run (bad or missing: {problems}).",
                "Restore it, or start a new run.",
            )
        record: dict[str, Any] = saved
        return record

    def require_enclosed(self) -> None:
        """Look through the folder, once: see `require_enclosed` below."""
        if not self._enclosed and self.path.is_dir():
            require_enclosed(self.path)
            self._enclosed = True

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

    def command(self, text: str) -> str:
        """``vqgen <text>`` on this run, as it is to be typed."""
        return f"vqgen {text} --run {shlex.quote(str(self.path))}"

    def require_stage(self, name: str, command: str) -> dict[str, Any]:
        """What `record_stage` noted.

        Raises:
            InputError: the stage is not done; ``command``, such as ``train-codes``, does it.
        """
        record = self.stage(name)
        if record is None:
            raise InputError(f"{self.path} has no {name} yet.", f"Make it with `{self.command(command)}`.")
        return record

    def remove_stages(self, names: Sequence[str]) -> None:
        """Remove the files of stages, done or only begun, in the order in which they are made, and forget them."""
        with self._edit() as saved:
            for name in names:
                saved["stages"].pop(name, None)
        # What was made last goes first, so that nothing ever outlives what it was made from.
        for name in reversed(names):
            remove_folder(self.path / name)

    def data_description(self) -> str:
        """One line on the run's images; empty before they were read."""
        return str(self.read()["data"].get("description", ""))

    def working(self, part: str, *, shared: bool = False) -> AbstractContextManager[None]:
        """A block in which no other command works on a part of the run (``codec``, ``priors/pixelcnn/top``).

        ``shared`` is for those that build on the part without changing it, of which there may be several at once.

        Raises:
            InputError: another process does, and which.
        """
        self.require_enclosed()
        lock = self.path / f".{part.replace('/', '-')}.lock"
        return locked(lock, shared=shared, what=str(self.path / part))

    @contextmanager
    def _edit(self) -> Iterator[dict[str, Any]]:
        self.require_enclosed()
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
        hint = did_you_mean(run, [str(other) for other in known]) or f"{first} --run {shlex.quote(run)}"
        raise InputError(f"{run} is not a run (it has no run.json)." if path.exists() else f"No run at '{run}'.", hint)
    if config is not None:
        path = run_for(None, config)
        if not (path / "run.json").is_file():
            raise InputError(f"No run at '{path}'.", f"{first} --config {shlex.quote(config)}")
        return path
    if not known:
        raise InputError(f"No run in '{RUNS}{os.sep}'.", f"{first} (or name a run with --run).")
    if len(known) > 1:
        raise InputError(
            f"Several runs in '{RUNS}{os.sep}': {', '.join(path.name for path in known)}.",
            f"Choose one, such as --run {shlex.quote(str(known[0]))}.",
        )
    return known[0]


def require_enclosed(folder: Path) -> None:
    """Nothing in ``folder``, which may be a stranger's, leads elsewhere or is anything but a file or a folder.

    Who follows a link that came with a run writes where its maker chose; who opens a pipe waits forever.

    Raises:
        InputError: naming what does not belong there.
    """
    root = os.path.realpath(folder)
    for above, names, files in os.walk(folder):
        for path in (os.path.join(above, name) for name in (*names, *files)):
            if os.path.islink(path):
                real = os.path.realpath(path)
                if os.path.commonpath([root, real]) != root or not os.path.exists(real):
                    raise InputError(
                        f"{path} is a link that leads out of the run, or nowhere.",
                        "Put what it leads to in its place, or make the whole run a link.",
                    )
            elif not (os.path.isdir(path) or os.path.isfile(path)) and os.path.lexists(path):
                raise InputError(f"{path} is neither a file nor a folder.", "Remove it.")
        names[:] = [name for name in names if not _TRACKED.fullmatch(Path(above, name).relative_to(folder).as_posix())]


def plain_name(name: str, what: str) -> str:
    """``name``, which is to become a part of a path.

    Raises:
        InputError: it is empty or too long, starts with a dot, or holds a separator or a control character.
    """
    if not re.fullmatch(PART, name):
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


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
