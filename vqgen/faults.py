"""Faults of a machine, told from faults of the program: memory that ran out, helpers and neighbours that died.

Torch reports them as a `RuntimeError` whose text alone says what happened. Here they become one line with a remedy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from vqgen.errors import InputError, VqgenError

_OF_MEMORY = (
    *("out of memory", "DefaultCPUAllocator", "can't allocate memory", "std::bad_alloc", "bad allocation"),
    *("CUBLAS_STATUS_ALLOC_FAILED", "Cannot allocate memory"),
)
_OF_LOADERS = (
    "DataLoader worker",
    "unable to open shared memory object",
    "unable to mmap",
    "received 0 items of ancdata",
)
_OF_NEIGHBOURS = (
    *("gloo/transport", "Connection closed by peer", "Connection reset by peer", "Connection was likely closed"),
    *("remote process exited", "ncclRemoteError", "NCCL communicator was aborted"),
)


def is_of_memory(error: BaseException) -> bool:
    """Whether memory ran out. Of torch's own errors only a GPU's has a class."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, (RuntimeError, OSError)) and any(sign in str(error) for sign in _OF_MEMORY)


def is_of_loader(error: BaseException) -> bool:
    """Whether a process that loads data died."""
    return isinstance(error, (RuntimeError, OSError)) and any(sign in str(error) for sign in _OF_LOADERS)


def is_of_neighbour(error: BaseException) -> bool:
    """Whether another process of the same launcher was lost."""
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _OF_NEIGHBOURS)


def fault_of_machine(error: Exception, cure: str) -> InputError | None:
    """The line for a fault outside a training; None where the program is at fault. ``cure`` is for lack of memory."""
    if is_of_memory(error):
        return InputError(f"There is not enough memory ({_line(error)}).", cure)
    return _neighbour_lost() if is_of_neighbour(error) else None


@contextmanager
def explained(batch: Callable[[], str], cure: str, workers: int, go_on: str) -> Iterator[None]:
    """Turn faults of the machine within a training into one line; ``go_on`` says how to go on afterwards.

    ``batch`` says what a step was to take in, ``cure`` what makes it less; ``workers`` is how many processes load data.

    Raises:
        InputError: memory ran out, or a process that loads data, or another of the launcher, died.
    """
    try:
        yield
    except VqgenError:
        raise
    except (RuntimeError, MemoryError, OSError) as error:
        found = _explanation(error, batch, cure, workers, go_on)
        if found is None:
            raise
        raise found from error


def _explanation(error: Exception, batch: Callable[[], str], cure: str, workers: int, go_on: str) -> InputError | None:
    if is_of_loader(error):
        return InputError(
            f"A process that loads data ended unexpectedly ({_line(error)}).",
            f"Often memory ran out: lower training.workers (now {workers}); 0 loads in the training process. {go_on}",
        )
    if is_of_memory(error):
        return InputError(f"There is not enough memory for {batch()} ({_line(error)}).", f"{cure} {go_on}")
    return _neighbour_lost(go_on) if is_of_neighbour(error) else None


def _neighbour_lost(go_on: str = "What that one said is the reason.") -> InputError:
    return InputError("Another process of this command has ended, so this one cannot go on.", go_on)


def _line(error: Exception) -> str:
    """The first line of an error's text, no longer than is of use."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(" .")
    return line if len(line) <= 160 else f"{line[:157]}..."
