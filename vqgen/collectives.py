"""Sums and joins of tensors over the processes of a launcher; with one process, the tensor itself.

They are for work that every process does alike, such as a step of a training: each must reach each of them, in the same
order. What the processes share out among themselves goes through `vqgen.agreement`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, distributed

_apart = 0


@contextmanager
def apart() -> Iterator[None]:
    """In this block a process is by itself: nothing is summed or joined, and nobody is waited for."""
    global _apart
    _apart += 1
    try:
        yield
    finally:
        _apart -= 1


def distributed_now() -> bool:
    """Whether there are other processes, and this one is not `apart` from them."""
    return not _apart and distributed.is_available() and distributed.is_initialized()


def place() -> tuple[int, int]:
    """This process's number, and how many there are."""
    return (distributed.get_rank(), distributed.get_world_size()) if distributed_now() else (0, 1)


def sum_over_processes(tensor: Tensor) -> Tensor:
    """``tensor``, in place, as the sum of those of all processes."""
    if distributed_now():
        distributed.all_reduce(tensor)
    return tensor


def join_processes(tensor: Tensor) -> Tensor:
    """The tensors of all processes, of one shape, along the first axis, by rank."""
    if not distributed_now():
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)
