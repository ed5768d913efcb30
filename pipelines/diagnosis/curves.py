"""What the training curve of a codec or a prior says: had it finished, and did it go on past its best?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vqgen.parsing import load_json
from vqgen.training_log import read_metrics

LATE = 0.75
"""The last quarter of a training is what is looked at to tell whether it was still improving: long enough to hold
an evaluation or two, short enough to leave out the steep start."""

Points = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class CurveFigures:
    """One scalar of metrics.jsonl over the steps, less of it being better."""

    scalar: str
    train: Points
    validation: Points
    """(step, value) each, in the order of the steps."""
    kept: int | None = None
    """The step whose weights were kept, as the training recorded it."""

    @property
    def steps(self) -> int:
        """Steps trained, as far as they were logged."""
        return max((step for step, _ in (*self.train, *self.validation)), default=0)

    @property
    def best_step(self) -> int | None:
        """The weights that were kept; where that is not known, where validation was lowest.

        The two differ where nothing is kept until the training has settled (`vqgen.task.Task.settled`).
        """
        if self.kept is not None and self.kept in dict(self.validation):
            return self.kept
        return min(self.validation, key=lambda point: point[1])[0] if self.validation else None

    @property
    def late_drop(self) -> float | None:
        """How far validation fell over the last quarter, at its lowest there; None where it was measured too seldom.

        What it had fallen to before that, and lost again, does not count.
        """
        steps = [step for step, _ in self.validation]
        if len(steps) < 2 or steps[0] > LATE * steps[-1]:
            return None
        values = [value for _, value in self.validation]
        start = float(np.interp(LATE * steps[-1], steps, values))
        return start - min(start, *(value for step, value in self.validation if step > LATE * steps[-1]))

    @property
    def rise(self) -> float | None:
        """How far validation ended above where the weights were kept."""
        values, best = dict(self.validation), self.best_step
        return None if best is None else self.validation[-1][1] - values[best]


def read_curve(folder: Path, scalar: str) -> CurveFigures:
    """The curve of ``scalar`` in the metrics.jsonl of a stage's folder; empty where there is none."""
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if isinstance(line.get(scalar), (int, float))]
    points = {
        split: tuple((int(line["step"]), float(line[scalar])) for line in lines if line["split"] == split)
        for split in ("train", "validation")
    }
    return CurveFigures(scalar, points["train"], points["validation"], _kept(folder / "metrics.json"))


def _kept(path: Path) -> int | None:
    try:
        step = load_json(path)["step"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return step if isinstance(step, int) else None
