"""Batches for training and evaluation: which images, in which order, on which process.

The order of an epoch is a pure function of (seed, epoch), so a training that stopped in the middle of one goes
on with the very next batch, whatever was drawn elsewhere. Data sets give whole batches (``__getitems__``).
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Generator, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from vqgen.errors import InputError, VqgenError

Batch = dict[str, Any]
"""What a data set's ``__getitems__`` gives: tensors, or tuples of tensors, by name."""


EpochOrder = Callable[[int, int, int, int], npt.NDArray[np.int64] | None]
"""From (seed, epoch, images of a step, processes) to a permutation of a data set's images, or None."""


class EpochSampler(Sampler[list[int]]):
    """Batches of indices of one epoch on one of ``processes`` processes, from ``offset`` on.

    Each step takes ``batch_size * processes`` images of a permutation seeded by (seed, epoch), and each process
    its part of them; what does not fill a last step is left out. Where there are fewer images than one step
    takes, the batch is smaller. `order` may give another permutation of each epoch.

    Raises:
        InputError: there are fewer images than processes.
    """

    def __init__(self, images: int, batch_size: int, seed: int, rank: int = 0, processes: int = 1) -> None:
        if images < processes:
            what = "is empty" if images == 0 else f"has {images} images for {processes} processes"
            raise InputError(f"The training split {what}.", "Give more images.")
        self.images = images
        self.batch_size = min(batch_size, images // processes)
        self.seed = seed
        self.rank = rank
        self.processes = processes
        self.epoch = 0
        self.offset = 0
        self.order: EpochOrder = lambda seed, epoch, step, processes: None

    def __len__(self) -> int:
        """Batches of a whole epoch on this process."""
        return self.images // (self.batch_size * self.processes)

    def __iter__(self) -> Iterator[list[int]]:
        order = self.order(self.seed, self.epoch, self.batch_size * self.processes, self.processes)
        # NumPy's seed sequence keeps all of a 64-bit seed; torch's CPU generator keeps 32 bits of it.
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, self.epoch])))
        order = generator.permutation(self.images) if order is None else order
        for batch in range(self.offset, len(self)):
            start = (batch * self.processes + self.rank) * self.batch_size
            yield order[start : start + self.batch_size].tolist()


def training_batches(
    dataset: Dataset[Any], sampler: EpochSampler, *, start: int, workers: int, pin_memory: bool = False
) -> Generator[Batch, None, None]:
    """Batches without end, from batch ``start`` of the whole training on.

    The data set's ``set_epoch(epoch)``, if it has one, is called before each epoch, and its
    ``epoch_order(seed, epoch, step, processes)`` for the order of the images in it, of which so many a ``step`` are
    taken; where that is None, any will do.
    """
    sampler.order = getattr(dataset, "epoch_order", sampler.order)
    generator = torch.Generator()
    loader = _loader(dataset, sampler, generator, workers, pin_memory)
    sampler.epoch, sampler.offset = divmod(start, len(sampler))
    while True:
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(sampler.epoch)
        generator.manual_seed(sampler.epoch)
        yield from map(_opened, loader)
        sampler.epoch, sampler.offset = sampler.epoch + 1, 0


def evaluation_batches(
    dataset: Dataset[Any],
    most: int,
    batch_size: int,
    *,
    rank: int = 0,
    processes: int = 1,
    workers: int = 0,
    pin_memory: bool = False,
) -> EvaluationBatches:
    """This process's part of at most ``most`` images, evenly spread over the data set, in a fixed order.

    Evenly spread, because a split may be sorted by class. Every image is read by exactly one process, so the
    numbers of batches of two processes can differ by one.
    """
    count = len(dataset)  # type: ignore[arg-type]
    read = min(most, count)
    indices = [index * count // read for index in range(rank, read, processes)]
    batches = [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]
    return EvaluationBatches(_loader(dataset, batches, torch.Generator(), workers, pin_memory))


class EvaluationBatches:
    """The same batches each time they are gone through; as many as their length says."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._loader = loader

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        return map(_opened, self._loader)


class _Refusal(NamedTuple):
    """An error for the user, on its way out of a process that loads data: torch would make a traceback of it."""

    kind: type[VqgenError]
    message: str
    hint: str


class _Careful(Dataset[Any]):
    """A data set in a process of its own, whose errors for the user come back as they are."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self._dataset = dataset

    def __getitems__(self, indices: list[int]) -> Any:
        try:
            return self._dataset.__getitems__(indices)  # type: ignore[attr-defined]
        except VqgenError as error:
            return _Refusal(type(error), error.message, error.hint)


def _opened(batch: Any) -> Batch:
    if isinstance(batch, _Refusal):
        raise batch.kind(batch.message, batch.hint)
    return batch  # type: ignore[no-any-return]


def _loader(
    dataset: Dataset[Any],
    batches: Sampler[list[int]] | list[list[int]],
    generator: torch.Generator,
    workers: int,
    pin_memory: bool,
) -> DataLoader[Any]:
    # A generator of its own: otherwise every new iterator would move the global one.
    return DataLoader(
        _Careful(dataset) if workers else dataset,
        batch_sampler=batches,
        collate_fn=_identity,
        num_workers=workers,
        worker_init_fn=_leave_interrupts,
        generator=generator,
        pin_memory=pin_memory,
    )


def _identity(batch: Any) -> Any:
    return batch


def _leave_interrupts(worker: int) -> None:
    # Ctrl-C reaches every process of the terminal; the training process decides what becomes of the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
