"""Where the numbers of a training go: running means, metrics.jsonl, and a tracker for those who want one."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vqgen.errors import InputError
from vqgen.files import disk_errors, finite, write_text
from vqgen.parsing import parse_json, read_bounded

MOST_BYTES = 2**30
"""Of a metrics.jsonl that is read."""


def add_scalars(sums: dict[str, list[float]], scalars: Mapping[str, float]) -> None:
    """Add one step's scalars to ``sums``, which holds [sum, count] by name: plain JSON, as a checkpoint needs it."""
    for name, value in scalars.items():
        pair = sums.setdefault(name, [0.0, 0])
        pair[0] += value
        pair[1] += 1


def means(sums: Mapping[str, list[float]]) -> dict[str, float]:
    """Means of what `add_scalars` summed, in the order of the names."""
    return {name: total / count for name, (total, count) in sorted(sums.items())}


class MetricLog:
    """Lines of metrics.jsonl: ``{"step", "epoch", "split", "seconds", ...scalars}``.

    ``seconds`` are those of training so far. A scalar that is not a finite number is written as null.
    """

    def __init__(self, path: Path, tracker: Any = None) -> None:
        self.path = path
        self._tracker = tracker

    def cut(self, step: int) -> None:
        """Remove the lines after ``step``, and what a killed process left of a line."""
        if not self.path.exists():
            write_text(self.path, "")
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                if parse_json(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, LookupError, TypeError):
                continue
        write_text(self.path, "".join(kept))

    def write(self, step: int, epoch: float, split: str, seconds: float, scalars: Mapping[str, float]) -> None:
        """Append one line.

        Raises:
            InputError: the disk is full.
        """
        line = {"step": step, "epoch": round(epoch, 4), "split": split, "seconds": round(seconds, 3), **scalars}
        with disk_errors(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite(line)) + "\n")
        if self._tracker is not None:
            self._tracker.log({f"{split}/{name}": value for name, value in scalars.items()}, step=step)

    def close(self) -> None:
        if self._tracker is not None:
            self._tracker.finish()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, in their order; none where there is no such file.

    Raises:
        InputError: a line is damaged.
    """
    if not path.is_file():
        return []
    try:
        lines = [parse_json(line) for line in read_bounded(path, MOST_BYTES).splitlines()]
    except (ValueError, OSError) as error:
        raise InputError(f"{path} is damaged ({error}).", "Restore it, or remove it.") from error
    found = [line for line in lines if isinstance(line, dict) and {"step", "split", "seconds"} <= set(line)]
    for line in found:
        numbers = [value for key, value in line.items() if key not in ("step", "split") and value is not None]
        whole = type(line["step"]) is int and line["step"] >= 0 and type(line["split"]) is str
        if not whole or line["seconds"] is None or any(type(value) not in (int, float) for value in numbers):
            raise InputError(f"{path} is damaged (a line is no step's numbers).", "Restore it, or remove it.")
    return found


def require_tracker(name: str) -> None:
    """Refuse a tracker whose package is not installed.

    Raises:
        InputError: it is not.
    """
    if name != "none" and importlib.util.find_spec(name) is None:
        raise InputError(f"The tracker '{name}' is not installed.", "pip install 'vqgen[tracking]'")


def start_tracker(name: str, folder: Path) -> Any:
    """The Accelerate tracker ``name`` writing below ``folder``, or None for ``none``.

    Raises:
        InputError: its package is not installed.
    """
    if name == "none":
        return None
    require_tracker(name)
    from accelerate import tracking

    if name == "tensorboard":
        tracker: Any = tracking.TensorBoardTracker("tensorboard", logging_dir=str(folder))
    else:
        tracker = tracking.WandBTracker("vqgen", dir=str(folder))
    # Accelerate before 1.9 starts a tracker as it is made.
    if hasattr(tracker, "start"):
        tracker.start()
    return tracker
