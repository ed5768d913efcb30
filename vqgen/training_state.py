"""What a training keeps in mind from step to step: counters, the best evaluation, losses not yet read."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import TypeAdapter
from torch import Tensor

from vqgen.errors import ConfigError, DivergedError
from vqgen.training_log import add_scalars, means

PARTING = 4
"""Evaluations in a row over which the training and validation losses part before it is said."""


@dataclass
class State:
    """The part of a training's state that is plain JSON; a checkpoint holds all of it."""

    step: int = 0
    """Optimiser steps done."""
    seconds: float = 0.0
    """Seconds spent in training steps."""
    best: dict[str, Any] | None = None
    """Scalars of the evaluation with the least loss, and its ``step``."""
    last: dict[str, Any] | None = None
    """The same of the newest evaluation."""
    since_best: int = 0
    """Evaluations since the best one."""
    history: list[list[float]] = field(default_factory=list)
    """[training loss, validation loss] of the newest evaluations."""
    warned: bool = False
    """Whether it was said that the two part ways."""
    train: dict[str, list[float]] = field(default_factory=dict)
    """Sums of the training scalars since the last line of metrics.jsonl."""
    interval: dict[str, list[float]] = field(default_factory=dict)
    """Sums of the training losses since the last evaluation."""
    finished: bool = False
    parts: int = 1
    """Parts in which each batch goes through the model, so that it fits into memory."""

    @classmethod
    def from_json(cls, kept: Mapping[str, Any]) -> State:
        """What ``vars`` gave and a checkpoint kept.

        Raises:
            ValueError: that is no state of a training.
        """
        state = TypeAdapter(cls).validate_python(dict(kept))
        pairs = [*state.train.values(), *state.interval.values(), *state.history]
        if (
            not (0 <= state.step < 2**53 and 0 <= state.seconds < math.inf and state.since_best >= 0 < state.parts)
            or not (state.best is None or isinstance(state.best.get("loss"), (int, float)))
            or any(len(pair) != 2 for pair in pairs)
            or any(count < 1 for _, count in (*state.train.values(), *state.interval.values()))
        ):
            raise ValueError("the counters are no training's")
        return cls(**kept)  # as they are: the check above makes floats of whole numbers

    def due(self, every: int, first: int) -> bool:
        """Whether what happens ``every`` so many steps is to happen now; at step ``first`` it already has."""
        return self.step > first and self.step % every == 0

    def judge(self, metrics: Mapping[str, float], settled: bool = True) -> bool:
        """Take in an evaluation: whether it is the best so far; one before the training has ``settled`` is not."""
        train = means(self.interval)
        self.interval = {}
        self.last = {"step": self.step, **metrics}
        loss = metrics.get("loss")
        if loss is None:
            return False
        # The losses of players against each other say nothing of the fit.
        if len(train) == 1:
            self.history = [*self.history, [*train.values(), loss]][-PARTING:]
        if not settled:
            return False
        improved = math.isfinite(loss) and (self.best is None or loss < self.best["loss"])
        self.best = self.last if improved else self.best
        self.since_best = 0 if improved else self.since_best + 1
        return improved

    def parted(self) -> bool:
        """Whether the validation loss has risen and the training loss fallen at every recent evaluation: once."""
        pairs = list(zip(self.history, self.history[1:], strict=False))
        parting = len(self.history) == PARTING and all(b[0] < a[0] and b[1] > a[1] for a, b in pairs)
        if self.warned or not parting:
            return False
        self.warned = True
        return True


class StepLosses(NamedTuple):
    """The scalars of one step, still on the device."""

    step: int
    rates: dict[str, float]
    """Learning rate by the name of each loss."""
    names: Sequence[str]
    values: Tensor  # (len(names),)


class LossReader:
    """Reads the scalars of each step into the running means, and stops the training at a bad loss.

    On a GPU the newest step is left unread, so that the processor never waits for a step it has just begun; at
    an evaluation, a log line and a checkpoint all are read.
    """

    def __init__(self, last_good: Path | None) -> None:
        self.last_good = last_good
        """The newest checkpoint."""
        self.note = ""
        """The newest losses, in words."""
        self._unread: deque[tuple[StepLosses, torch.cuda.Event | None]] = deque()

    def add(self, losses: StepLosses) -> None:
        copied = None
        if losses.values.is_cuda:
            # A plain read would wait for all that is queued; this one waits for its own copy alone.
            losses = losses._replace(values=losses.values.to("cpu", non_blocking=True))
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record()
        self._unread.append((losses, copied))

    def read(self, state: State, *, to_the_end: bool = False) -> None:
        """Read what can be read without waiting, or all of it.

        Raises:
            DivergedError: a loss is not finite.
        """
        while self._unread and (to_the_end or len(self._unread) > 1 or self._unread[0][1] is None):
            (step, rates, names, values), copied = self._unread.popleft()
            if copied is not None:
                copied.synchronize()
            scalars = dict(zip(names, values.tolist(), strict=True))
            losses = {name: scalars[name] for name in rates}
            for name, loss in losses.items():
                if not math.isfinite(loss):
                    raise diverged(
                        f"{name} is {loss} at step {step:,} (learning rate {rates[name]:.3g}).", self.last_good
                    )
            self.note = ", ".join(f"{name} {loss:.4g}" for name, loss in losses.items())
            add_scalars(state.train, scalars)
            add_scalars(state.interval, losses)


def diverged(message: str, last_good: Path | None) -> DivergedError:
    """The error of a training whose numbers are no longer finite."""
    saved = f"The last good checkpoint is {last_good}. " if last_good else ""
    return DivergedError(
        f"The training diverged: {message}",
        f"{saved}Lower training.learning_rate, or set training.clip=1, and train again with --overwrite.",
    )


def plain(identity: Mapping[str, Any]) -> dict[str, Any]:
    """``identity`` as it comes back from a JSON file: tuples are lists, paths are text."""
    return json.loads(json.dumps(identity, default=str))  # type: ignore[no-any-return]


def refuse_differences(saved: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    """Raise a `ConfigError` that lists every setting in which two identities differ."""
    was, is_ = _flat(saved), _flat(now)
    lines = []
    for key in sorted(was.keys() | is_.keys()):
        if was.get(key) != is_.get(key):
            lines.append(f"\n  {key}: was {_shown(was, key)}, now {_shown(is_, key)}")
    if lines:
        launch = ""
        if was.get("processes") != is_.get("processes"):
            launch = f" (`torchrun --standalone --nproc-per-node {was.get('processes', 1)} -- $(which vqgen) ...`)"
        raise ConfigError(
            f"The training in {folder} was started with other settings:{''.join(lines)}",
            f"Resume with the same settings{launch}, or start over with --overwrite.",
        )


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            flat.update(_flat(item, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = item
    return flat


def _shown(values: Mapping[str, Any], key: str) -> str:
    return json.dumps(values[key]) if values.get(key) is not None else "not set"
