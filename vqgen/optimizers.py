"""Optimisers, learning rates and the running average of the weights.

A learning rate is a pure function of progress in [0, 1] and is set before each step; there is no scheduler
whose state could go astray.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from vqgen.config import TrainingSettings, player_problems
from vqgen.problems import raise_problems


def learning_rate_at(progress: float, settings: TrainingSettings) -> float:
    """Learning rate at ``progress`` in [0, 1] of the training.

    It rises linearly from 0 over the share ``warmup``, then stays (``constant``), or from ``decay_from`` on falls
    along a line or half a cosine to the share ``final_rate`` of itself.
    """
    progress = min(max(progress, 0.0), 1.0)
    if progress < settings.warmup:
        return settings.learning_rate * progress / settings.warmup
    start = max(settings.warmup, settings.decay_from)
    if settings.schedule == "constant" or progress < start:
        return settings.learning_rate
    fallen = (progress - start) / (1 - start)
    if settings.schedule == "cosine":
        fallen = (1 - math.cos(math.pi * fallen)) / 2
    return settings.learning_rate * (1 - (1 - settings.final_rate) * fallen)


def player_settings(settings: TrainingSettings, players: Sequence[str]) -> dict[str, TrainingSettings]:
    """The training settings of each player: those of the stage with the player's own over them.

    Raises:
        ConfigError: settings for a player that the model does not have, or accumulation with several players.
    """
    raise_problems(player_problems(settings.model_dump(), players))
    own = {name: settings.players[name].model_dump(exclude_none=True) for name in settings.players}
    return {name: settings.model_copy(update=own.get(name, {})) for name in players}


def make_optimizer(parameters: Sequence[nn.Parameter], settings: TrainingSettings) -> Optimizer:
    """Adam, AdamW where there is weight decay, or RMSprop with torch's own smoothing (0.99)."""
    rate, decay = settings.learning_rate, settings.weight_decay
    if settings.optimizer == "rmsprop":
        return torch.optim.RMSprop(parameters, lr=rate, weight_decay=decay)
    if decay:
        return torch.optim.AdamW(parameters, lr=rate, betas=settings.betas, weight_decay=decay)
    return torch.optim.Adam(parameters, lr=rate, betas=settings.betas)


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """State of an optimiser by ``<parameter>.<name>``; its settings are not in it, they come from the run's."""
    state: Mapping[int, Mapping[str, Tensor]] = optimizer.state_dict()["state"]
    return {f"{index}.{name}": value for index, values in state.items() for name, value in values.items()}


def load_optimizer_tensors(optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave.

    Raises:
        ValueError: that was of an optimiser of other parameters.
    """
    state: dict[int, dict[str, Tensor]] = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        if not 0 <= int(index) < len(parameters) or value.shape not in ((), parameters[int(index)].shape):
            raise ValueError(f"'{key}' of shape {list(value.shape)} is of another optimiser")
        state.setdefault(int(index), {})[name] = value
    if len({tuple(sorted(names)) for names in state.values()}) > 1:
        raise ValueError("the parameters have different states")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


class WeightAverage:
    """Running average of a model's parameters (Polyak averaging with exponential weights).

    The decay starts low, min(decay, (1 + t) / (10 + t)) at step t, so that the random start is soon forgotten.
    Buffers are not averaged: the model's own are used as they are.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._parameters = dict(model.named_parameters())
        self.values = {name: value.detach().clone() for name, value in self._parameters.items()}

    def decay_at(self, step: int) -> float:
        """Decay of the update after step number ``step``, counted from 0."""
        return min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the parameters as they are after step number ``step``, counted from 0."""
        weight = 1 - self.decay_at(step)
        for name, value in self.values.items():
            value.lerp_(self._parameters[name], weight)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        for name, value in self.values.items():
            value.copy_(tensors[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model with the averaged parameters, for the length of the block."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, parameter in self._parameters.items():
            parameter.data, self.values[name] = self.values[name], parameter.data
