"""The one training loop, for the codec and for every prior.

What is trained is a `Task`; how, a `TrainingSettings`. Schedules are pure functions of progress in [0, 1],
which is the share of the steps or, with a budget in minutes, of the time spent in training steps: compiling,
evaluations, previews, checkpoints and pauses do not count, so that models are comparable at equal training time.

With ``steps`` or ``epochs``, a training that was stopped anywhere and resumed is bit for bit the one that was
not, on the CPU and on as many processes as before. The loop knows nothing of images, codes or models.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from torch.utils.data import Dataset

from vqgen.agreement import LONGEST_WAIT, Processes
from vqgen.checkpoint import Checkpoint, CheckpointStore, preserved_random_state, seed_random_state
from vqgen.compiling import compiled
from vqgen.config import TrainingSettings
from vqgen.console import Console, duration
from vqgen.errors import ConfigError, InputError, Interrupted
from vqgen.faults import explained
from vqgen.interrupts import StopSignals
from vqgen.locks import locked
from vqgen.micro_batches import batch_length
from vqgen.optimizers import learning_rate_at
from vqgen.sampler import Batch
from vqgen.task import Task
from vqgen.trainer import Trainer
from vqgen.training_log import MetricLog, means, require_tracker, start_tracker
from vqgen.training_state import LossReader, State, plain, refuse_differences

__all__ = ["Batch", "FitResult", "Task", "fit", "learning_rate_at", "make_accelerator"]


@dataclass(frozen=True)
class FitResult:
    """What `fit` did; the trained weights are in the task's model."""

    steps: int
    epochs: float
    seconds: float
    """Seconds of training steps, without compiling, evaluations, checkpoints and pauses."""
    best: dict[str, Any]
    """Validation scalars of the weights kept, and the ``step`` they are from."""
    finished: bool


def make_accelerator(settings: TrainingSettings, players: int = 1, *, cpu: bool = False) -> Accelerator:
    """The Accelerator for a training of so many players, on the CPU alone where ``cpu``.

    Raises:
        ConfigError: this machine cannot compute in that precision.
        InputError: the package of the tracker is not installed.
    """
    require_tracker(settings.tracker)
    # Buffers are kept the same on all processes by the modules that own them; DDP's own copying would
    # overwrite what a process has gathered since the last update of a codebook.
    ddp = DistributedDataParallelKwargs(find_unused_parameters=players > 1, broadcast_buffers=False)
    if AcceleratorState._shared_state:
        # Accelerate remembers the first precision asked for in a process; stages may differ in theirs.
        AcceleratorState._reset_state()
    # Without a GPU, Accelerate joins the processes of a launcher only if it is told that the CPU is meant:
    # otherwise each would train alone, and over the other's files.
    cpu = cpu or not torch.accelerator.is_available()
    if cpu and settings.mixed_precision == "fp16":
        # Accelerate itself takes it there for float32, and says nothing.
        raise ConfigError(
            "training.mixed_precision=fp16 does not work here (fp16 mixed precision requires a GPU).",
            "Use 'bf16', or 'no' for float32.",
        )
    try:
        handlers = [ddp, InitProcessGroupKwargs(timeout=LONGEST_WAIT)]
        return Accelerator(mixed_precision=settings.mixed_precision, cpu=cpu, kwargs_handlers=handlers)
    except ValueError as error:
        line = " ".join(str(error).split())
        raise ConfigError(
            f"training.mixed_precision={settings.mixed_precision} does not work here ({line}).",
            "Use 'no', which is float32.",
        ) from error


def fit(
    task: Task,
    train: Dataset[Any],
    validation: Dataset[Any],
    settings: TrainingSettings,
    folder: Path,
    *,
    seed: int,
    identity: Mapping[str, Any],
    accelerator: Accelerator,
    console: Console,
    resume: bool = False,
    resume_hint: str = "",
    description: str = "Training",
) -> FitResult:
    """Train ``task`` within its budget and leave the best weights in ``task.model``, in evaluation mode.

    ``folder`` receives metrics.jsonl, checkpoints/ and previews/. ``identity`` is all that a resumed training
    must have in common with the one it goes on with: plain JSON, such as the architecture and the data's
    fingerprint; the training settings, the seed and the numbers of images and processes are added here.
    ``resume_hint`` tells an interrupted user how to go on. Every process of a distributed run calls this alike.
    The global random generators are seeded for the training and put back afterwards.

    Raises:
        ConfigError: gradient accumulation with several players, settings of an unknown player, or a resumed
            training with another identity.
        InputError: no images, a full disk, an unfinished training without ``resume``, only damaged checkpoints,
            another process at work in ``folder``, too little memory, or the loss of a process that takes part.
        DivergedError: a loss or a weight is no longer a finite number.
        Interrupted: SIGINT or SIGTERM; the state is saved.
    """
    processes = Processes.of(accelerator)
    main = processes.main
    console = console if main else Console(silent=True)
    store = CheckpointStore(folder / "checkpoints", settings.keep)
    with ExitStack() as stack:
        stack.enter_context(preserved_random_state())
        stack.enter_context(warnings.catch_warnings())
        # Of several processes: gradients of 1x1 convolutions have the strides of another layout, which costs nothing.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        with processes.together():
            if main:
                stack.enter_context(locked(store.folder / ".lock", what=str(folder)))
                store.sweep()
        if processes.decided(store.latest() is not None) and not resume:
            raise InputError(f"{folder} holds a training.", "Go on with --resume, or start over with --overwrite.")
        seed_random_state(seed, accelerator.process_index)
        trainer = Trainer(task, settings, accelerator, train, validation, seed)
        known = plain({**identity, **trainer.identity})
        processes.require_alike(known)
        stack.enter_context(trainer)
        parts = task.compilable() if settings.compile else ()
        if settings.compile and not parts:
            console.warn(f"{description}: there is nothing in it that is compiled; training goes on without.")
        if parts:
            console.say(f"{description}: the first step compiles, which takes seconds to minutes.")
        compilation = stack.enter_context(compiled(parts, console.warn))
        state = State()

        checkpoint = _newest(store, processes, console)
        if checkpoint is not None:
            refuse_differences(checkpoint.identity, known, folder)
            with processes.together():
                state = trainer.restore(checkpoint)
            if state.finished:
                with processes.together():
                    if main:
                        store.discard_after(checkpoint)
                return _finish(trainer, state)
            console.say(f"{description}: resuming at step {state.step:,}.")
        elif resume:
            console.say(f"{description}: no checkpoint in {store.folder}, starting at step 0.")
        console.say(_batch_line(description, trainer, processes.count))
        log = None
        with processes.together():
            if main:
                if checkpoint is not None:
                    store.discard_after(checkpoint)
                log = MetricLog(folder / "metrics.jsonl", start_tracker(settings.tracker, folder))
                stack.callback(log.close)
                log.cut(state.step)

        first = state.step
        loaded = trainer.training_batches(first)
        stack.callback(loaded.close)
        batches: Iterator[Batch] = loaded
        losses = LossReader(store.latest())
        stack.enter_context(_faults(trainer, resume_hint or "Go on with --resume."))
        trainer.go_in_parts(state.parts)
        if settings.auto_batch:
            batches = _fit_into_memory(trainer, state, batches, console)
        signals = stack.enter_context(StopSignals(notice=main))
        bar = stack.enter_context(console.progress(description, unit="images", share=trainer.progress(state)))
        # The loop runs once more than there are steps, so that what follows the last step is as after any other.
        while True:
            state.seconds, stop = _agree(accelerator, state.seconds, signals.received)
            progress = trainer.progress(state)
            done = progress >= 1

            if done or state.due(settings.evaluate_every, first):
                losses.read(state, to_the_end=True)
                with console.progress("Evaluating", trainer.validation_images, "images") as evaluated:
                    metrics = trainer.evaluate(evaluated)
                settled = progress >= task.settled
                console.say(_evaluation_line(trainer, state, metrics, settled))
                if state.judge(metrics, settled):
                    trainer.keep_best()
                if state.parted():
                    console.warn(
                        "The validation loss rises while the training loss falls: the model learns the training "
                        "split by heart. The best weights are kept; 'patience' would stop early."
                    )
                if log is not None:
                    log.write(state.step, trainer.epochs(state), "validation", state.seconds, metrics)
                done = done or (settings.patience is not None and state.since_best >= settings.patience)

            if done or state.due(settings.log_every, first):
                losses.read(state, to_the_end=True)
                if log is not None and state.train:
                    log.write(state.step, trainer.epochs(state), "train", state.seconds, means(state.train))
                state.train = {}

            if main and (done or state.due(settings.preview_every, first)):
                trainer.preview(folder / "previews" / f"step-{state.step:06d}.png")

            if done or stop or state.due(settings.checkpoint_every, first):
                losses.read(state, to_the_end=True)
                state.finished = done
                if done and state.best is None:
                    trainer.keep_best()
                trainer.refuse_damage(state, losses.last_good)
                losses.last_good = store.save(state.step, *trainer.snapshot(state, known), accelerator)

            # A request that came during the last evaluation is not lost: what follows the training must not start.
            if done and not stop:
                stop = _agree(accelerator, state.seconds, signals.received)[1]
            if stop:
                raise Interrupted(
                    f"{description} stopped at step {state.step:,}; its state is saved.",
                    resume_hint or "Go on with --resume.",
                )
            if done:
                return _finish(trainer, state)

            started = time.perf_counter() - compilation.seconds
            losses.add(trainer.step(batches, progress, state.step))
            losses.read(state)
            state.step += 1
            state.seconds += time.perf_counter() - compilation.seconds - started
            bar.advance(trainer.images_per_step, share=trainer.progress(state), note=losses.note)


def _newest(store: CheckpointStore, processes: Processes, console: Console) -> Checkpoint | None:
    """The newest checkpoint that is whole as the first process sees it, read by every process; None without any."""
    checkpoint = None
    with processes.together():
        if processes.main:
            checkpoint = store.load(console.warn)
    name = processes.decided(checkpoint and checkpoint.path.name)
    with processes.together():
        if name and not processes.main:
            checkpoint = store.open(name)
    return checkpoint


def _fit_into_memory(trainer: Trainer, state: State, batches: Iterator[Batch], console: Console) -> Iterator[Batch]:
    """Let batches go in parts where they do not fit into memory, and say so; returns all of ``batches``."""
    players = trainer.task.players
    if len(players) != 1 or trainer.progress(state) >= 1:
        if len(players) > 1:
            console.warn(
                f"training.auto_batch: {' and '.join(players)} take turns on the same batch, which cannot go in parts; "
                "if memory runs out, lower training.batch_size."
            )
        return batches
    first = next(batches)
    size, before = batch_length(first), state.parts
    if not trainer.fit_into_memory(first, trainer.progress(state), state):
        raise InputError("There is not enough memory for a single image.", "Make the model smaller.")
    if state.parts > before:
        console.say(
            f"A batch of {size:,} does not fit into memory: it goes through the model in {state.parts} parts of "
            f"{math.ceil(size / state.parts):,}. A step still takes in {trainer.images_per_step:,} images."
        )
    return chain([first], batches)


def _faults(trainer: Trainer, go_on: str) -> AbstractContextManager[None]:
    """`explained` for a training."""
    settings = trainer.settings
    cure = f"lower training.batch_size (now {settings.batch_size}) or make the model smaller."
    if len(trainer.task.players) == 1 and not settings.auto_batch:
        cure = f"add --auto-batch, which finds a batch that fits, {cure}"
    cure = cure[0].upper() + cure[1:]

    def batch() -> str:
        return f"batches of {math.ceil(settings.batch_size / trainer.parts)} images"

    return explained(batch, cure, settings.workers, go_on)


def _batch_line(description: str, trainer: Trainer, processes: int) -> str:
    """``"codec: 512 images a step, 2 times 128 on each of 2 processes"``: ``batch_size`` is that of one process."""
    parts = trainer.settings.accumulate
    each = f"{parts} times " * (parts > 1) + f"{trainer.images_per_step // (processes * parts):,}"
    more = f", {each}" * (processes * parts > 1) + f" on each of {processes} processes" * (processes > 1)
    return f"{description}: {trainer.images_per_step:,} images a step{more}."


def _agree(accelerator: Accelerator, seconds: float, stop: bool) -> tuple[float, bool]:
    """The first process's seconds, and whether any process is to stop: every process goes by the same."""
    if accelerator.num_processes == 1:
        return seconds, stop
    own = torch.tensor([seconds * accelerator.is_main_process, stop], dtype=torch.float64, device=accelerator.device)
    total = accelerator.reduce(own, "sum").tolist()
    return total[0], total[1] > 0


def _evaluation_line(trainer: Trainer, state: State, metrics: Mapping[str, float], settled: bool) -> str:
    """``"step 500 of 10,000: train loss 0.0123, validation loss 0.0131 (best so far)"``."""
    if trainer.total_steps is None:
        budget = 60 * (trainer.settings.minutes or 0)
        where = f"step {state.step:,}, {duration(state.seconds)} of {duration(budget)}"
    else:
        where = f"step {state.step:,} of {trainer.total_steps:,}"
    parts = [f"train {name} {loss:.4g}" for name, loss in means(state.interval).items()]
    if "loss" in metrics:
        best = settled and (state.best is None or metrics["loss"] < state.best["loss"])
        parts.append(f"validation loss {metrics['loss']:.4g}" + (" (best so far)" if best else ""))
    return f"{where}: {', '.join(parts) or 'evaluated'}"


def _finish(trainer: Trainer, state: State) -> FitResult:
    trainer.load_best()
    kept = state.best or state.last or {}
    return FitResult(state.step, trainer.epochs(state), state.seconds, kept, finished=True)
