"""The parts of one training on one process: players, batches, averages, and what a checkpoint holds of them.

`vqgen.training.fit` says in which order things happen; here is how each of them is done.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Dataset

from vqgen.checkpoint import Checkpoint, preserved_random_state, seed_random_state, set_random_state
from vqgen.config import TrainingSettings
from vqgen.console import Progress
from vqgen.errors import InputError
from vqgen.hub import UNBUILT
from vqgen.images import save_png
from vqgen.micro_batches import batch_length, fitting_parts, parts_of
from vqgen.optimizers import (
    WeightAverage,
    learning_rate_at,
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
    player_settings,
)
from vqgen.sampler import Batch, EpochSampler, evaluation_batches, training_batches
from vqgen.task import Task
from vqgen.training_state import State, StepLosses, diverged


class Player(NamedTuple):
    """One of those who take turns within a step."""

    name: str
    settings: TrainingSettings
    parameters: list[nn.Parameter]
    optimizer: Optimizer
    prefix: str
    """Before the names of its scalars: empty where it plays alone."""


class Trainer:
    """A context in which ``task`` is ready for training; it leaves the task as unwrapped as it was.

    Raises:
        ConfigError: gradient accumulation with several players, or settings of an unknown player.
        InputError: a split is empty.
    """

    def __init__(
        self,
        task: Task,
        settings: TrainingSettings,
        accelerator: Accelerator,
        train: Dataset[Any],
        validation: Dataset[Any],
        seed: int,
    ) -> None:
        self.task = task
        self.settings = settings
        self.accelerator = accelerator
        self.train = train
        self.seed = seed
        processes, rank = accelerator.num_processes, accelerator.process_index
        on_gpu = accelerator.device.type == "cuda"
        self._images = len(train)  # type: ignore[arg-type]
        self._sampler = EpochSampler(self._images, settings.batch_size, seed, rank, processes)
        if len(validation) == 0:  # type: ignore[arg-type]
            raise InputError("The validation split is empty.", "Give more images.")
        self._validation_batches = partial(
            evaluation_batches,
            validation,
            settings.evaluate_images,
            rank=rank,
            processes=processes,
            workers=settings.workers,
            pin_memory=on_gpu,
        )
        self._validation = self._validation_batches(settings.batch_size)
        self.validation_images = min(settings.evaluate_images, len(validation))  # type: ignore[arg-type]
        self.images_per_step = self._sampler.batch_size * processes * settings.accumulate
        self.total_steps = _total_steps(task, settings, len(self._sampler))
        self._pin_memory = on_gpu
        self._best: dict[str, Tensor] | None = None
        self.parts = 1
        """Parts in which each batch goes through the model, so that it fits into memory."""

    def __enter__(self) -> Trainer:
        own = player_settings(self.settings, self.task.players)
        modules = self.task.player_modules()
        theirs = {name: [p for p in modules[name].parameters() if p.requires_grad] for name in self.task.players}
        played = {id(p) for parameters in theirs.values() for p in parameters}
        assert len(played) == sum(map(len, theirs.values())), "two players hold the same parameter"
        self._trainable = [p for p in self.task.parameters() if p.requires_grad]
        for parameter in self._trainable:
            parameter.requires_grad_(id(parameter) in played)
        self.task.train()
        with warnings.catch_warnings():
            # torch 2.13 has a new name for the option, which the oldest torch we run on does not know.
            warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
            self._wrapped: nn.Module = self.accelerator.prepare_model(self.task)
        self.players = []
        for name, parameters in theirs.items():
            prefix = f"{name}/" if len(theirs) > 1 else ""
            self.players.append(Player(name, own[name], parameters, make_optimizer(parameters, own[name]), prefix))
        decay = self.settings.weight_ema
        self.average = WeightAverage(self.task.model, decay) if decay else None
        return self

    def __exit__(self, *error: object) -> None:
        for parameter in self._trainable:
            parameter.requires_grad_(True)
            parameter.grad = None
        # Accelerate marks a model as prepared and patches its forward for mixed precision.
        for name in ("forward", "_original_forward", "_is_accelerate_prepared"):
            vars(self.task).pop(name, None)
        self.accelerator.free_memory()

    @property
    def identity(self) -> dict[str, Any]:
        """What a resumed training must have in common with this one, as far as it is known here."""
        return {
            "training": self.settings.identity(),
            "seed": self.seed,
            "training_images": self._images,
            "processes": self.accelerator.num_processes,
        }

    def progress(self, state: State) -> float:
        """Share of the budget that is used up, in [0, 1]."""
        if self.total_steps is not None:
            return min(state.step / self.total_steps, 1.0) if self.total_steps else 1.0
        return min(state.seconds / (60 * self.settings.minutes), 1.0)  # type: ignore[operator]

    def epochs(self, state: State) -> float:
        """Passes over the training split so far."""
        return state.step * self.settings.accumulate / len(self._sampler)

    def training_batches(self, step: int) -> Generator[Batch, None, None]:
        """The batches that follow ``step`` steps, on the CPU."""
        return training_batches(
            self.train,
            self._sampler,
            start=step * self.settings.accumulate,
            workers=self.settings.workers,
            pin_memory=self._pin_memory,
        )

    def step(self, batches: Iterator[Batch], progress: float, step: int) -> StepLosses:
        """Let every player take its turn on the next micro-batches."""
        whole = [self._to_device(next(batches)) for _ in range(self.settings.accumulate)]
        micro = [part for batch in whole for part in parts_of(batch, self.parts)]
        images = sum(map(batch_length, whole))
        # Used as it is: Accelerate's wrappers of backward and optimisers search for a package at each call (0.2 ms).
        scaler = self.accelerator.scaler
        rates: dict[str, float] = {}
        scalars: dict[str, Tensor] = {}
        for player in self.players:
            if not self.task.plays(player.name, progress):
                continue
            self._give_turn(player)
            rate = learning_rate_at(progress, player.settings)
            for group in player.optimizer.param_groups:
                group["lr"] = rate
            for number, batch in enumerate(micro, start=1):
                # Gradients of processes are averaged once, with those of the last micro-batch.
                with nullcontext() if number == len(micro) else self.accelerator.no_sync(self._wrapped):
                    outputs = self._wrapped(batch, player.name, progress, step)
                    times = images / batch_length(batch)
                    loss = outputs["loss"] / times
                    (scaler.scale(loss) if scaler else loss).backward()
                for name, value in outputs.items():
                    key = player.prefix + name
                    share = self._scalar(value) / times
                    scalars[key] = scalars[key] + share if key in scalars else share
            if scaler:
                scaler.unscale_(player.optimizer)
            if player.settings.clip is not None:
                nn.utils.clip_grad_norm_(player.parameters, player.settings.clip)
            if scaler:
                scaler.step(player.optimizer)
                scaler.update()
            else:
                player.optimizer.step()
            player.optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                for name, value in self.task.after_step(player.name, step).items():
                    scalars[player.prefix + name] = self._scalar(value)
            rates[f"{player.prefix}loss"] = rate
        if self.average is not None:
            self.average.update(step)
        values = torch.stack(list(scalars.values()))
        if self.accelerator.num_processes > 1:
            values = self.accelerator.reduce(values, "mean")
        return StepLosses(step, rates, list(scalars), values)

    def fit_into_memory(self, batch: Batch, progress: float, state: State) -> bool:
        """Find into how many parts each batch must go, at least as many as ``state`` says; whether any number does.

        For one player alone: several take turns on the same batch, which cannot go in parts. The random generators are
        where they were.
        """
        assert len(self.players) == 1, "several players take turns"
        name = self.players[0].name

        def loss(part: Batch) -> Tensor:
            return self.task(part, name, progress, state.step)["loss"]  # type: ignore[no-any-return]

        with preserved_random_state():
            no_sync = partial(self.accelerator.no_sync, self._wrapped)
            found = fitting_parts(self.task, loss, self._to_device(batch), self.accelerator, no_sync, state.parts)
        state.parts = found or state.parts
        self.go_in_parts(state.parts)
        return found is not None

    def go_in_parts(self, parts: int) -> None:
        """From now on, let each batch go through the model in so many parts, those of the evaluation too."""
        if parts != self.parts:
            self.parts = parts
            self._validation = self._validation_batches(max(self._sampler.batch_size // parts, 1))

    def evaluate(self, progress: Progress) -> dict[str, float]:
        """`Task.evaluate` on the validation images."""

        def batches() -> Iterator[Batch]:
            for batch in self._validation:
                yield self._to_device(batch)
                progress.advance(self.validation_images / max(len(self._validation), 1))

        with self._exporting():
            metrics = self.task.evaluate(batches(), self._sum)
        return {name: float(value) for name, value in metrics.items()}

    def preview(self, path: Path) -> None:
        """Save `Task.preview`, if there is one."""
        with self._exporting():
            image = self.task.preview()
        if image is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_png(path, image)

    def keep_best(self) -> None:
        """Remember the weights that would be exported now."""
        with self._exporting():
            self._best = {
                name: value.detach().to("cpu", copy=True) for name, value in self.task.model.state_dict().items()
            }

    def load_best(self) -> None:
        """Put the weights that `keep_best` remembered into the model, for good, and the task into evaluation mode."""
        assert self._best is not None
        self.task.model.load_state_dict(self._best)
        self.task.eval()

    def refuse_damage(self, state: State, last_good: Path | None) -> None:
        """Raise `DivergedError` where a weight is no longer finite: such a state is not worth keeping."""
        with torch.no_grad():
            sums = [p.double().abs().sum() if p.device.type != "mps" else p.abs().sum() for p in self._trainable]
            if sums and not math.isfinite(torch.stack([s.to(sums[0].device) for s in sums]).sum().item()):
                raise diverged(f"a weight is no longer a finite number after step {state.step:,}.", last_good)

    def snapshot(
        self, state: State, identity: Mapping[str, Any]
    ) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
        """All that `restore` needs: JSON, and tensors by part."""
        parts = {"task": self.task.state_dict(), "best": self._best or {}}
        for player in self.players:
            parts[f"optimizer-{player.name}"] = optimizer_tensors(player.optimizer)
        if self.average is not None:
            parts["average"] = self.average.values
        scaler = self.accelerator.scaler
        kept = {**vars(state), "identity": identity, "scaler": scaler.state_dict() if scaler else None}
        return kept, parts

    def restore(self, checkpoint: Checkpoint) -> State:
        """Go back to where `snapshot` was taken, the random generators included.

        Raises:
            InputError: what the checkpoint holds is whole, but not of a training like this one.
        """
        try:
            return self._restore(checkpoint)
        except UNBUILT as error:  # a pydantic error is a ValueError too
            line = " ".join(str(error).split())[:200]
            raise InputError(
                f"{checkpoint.path} does not fit this training ({line}).", "Start over with --overwrite."
            ) from error

    def _restore(self, checkpoint: Checkpoint) -> State:
        kept = dict(checkpoint.state)
        del kept["identity"]
        scaler = kept.pop("scaler")
        if scaler and self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(scaler)
        shapes = {name: tuple(value.shape) for name, value in self.task.state_dict().items()}
        self.task.load_state_dict(checkpoint.tensors("task", shapes))
        for player in self.players:
            load_optimizer_tensors(player.optimizer, checkpoint.tensors(f"optimizer-{player.name}"))
        if self.average is not None:
            self.average.load(checkpoint.tensors("average"))
        self._best = checkpoint.tensors("best") or None
        if self._best is not None:
            wanted = {name: value.shape for name, value in self.task.model.state_dict().items()}
            if {name: value.shape for name, value in self._best.items()} != wanted:
                raise ValueError("the best weights are of another model")
        set_random_state(checkpoint.tensors(f"random-{self.accelerator.process_index}"))
        return State.from_json(kept)

    @contextmanager
    def _exporting(self) -> Iterator[None]:
        """The task as it would be exported: averaged weights, evaluation mode, no gradients, a fixed seed."""
        modes = [(module, module.training) for module in self.task.modules()]
        averaged = self.average.applied() if self.average is not None else nullcontext()
        with preserved_random_state(), averaged, torch.no_grad():
            seed_random_state(self.seed, self.accelerator.process_index)
            self.task.eval()
            try:
                yield
            finally:
                for module, training in modes:
                    module.training = training

    def _give_turn(self, player: Player) -> None:
        if len(self.players) > 1:
            for other in self.players:
                for parameter in other.parameters:
                    parameter.requires_grad_(other is player)

    def _to_device(self, batch: Batch) -> Batch:
        return send_to_device(batch, self.accelerator.device, non_blocking=True)  # type: ignore[no-any-return]

    def _scalar(self, value: Tensor) -> Tensor:
        kind = torch.float32 if self.accelerator.device.type == "mps" else torch.float64
        return torch.as_tensor(value, device=self.accelerator.device).detach().to(kind)

    def _sum(self, value: Tensor) -> Tensor:
        return self.accelerator.reduce(value, "sum")  # type: ignore[no-any-return]


def _total_steps(task: Task, settings: TrainingSettings, batches_per_epoch: int) -> int | None:
    """The budget in steps; None where it is in minutes."""
    if not task.players:
        return 0
    if settings.epochs is not None:
        return math.ceil(settings.epochs * batches_per_epoch / settings.accumulate)
    return settings.steps
