"""A step's batch in parts that fit into memory, one after the other, with the gradients of the whole.

The images of a step, their order and the mean loss stay what they are; only sums are taken in another order, and what
a model draws at random within its loss falls otherwise on the images.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import pairwise
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from vqgen.collectives import apart
from vqgen.faults import is_of_memory
from vqgen.sampler import Batch

Loss = Callable[[Batch], Tensor]


def batch_length(batch: Mapping[str, Any]) -> int:
    """Images in a batch."""
    value = next(iter(batch.values()))
    return len(value[0] if isinstance(value, (tuple, list)) else value)


def parts_of(batch: Batch, count: int) -> list[Batch]:
    """``batch`` in at most ``count`` parts whose sizes differ by one at most, none of them empty."""
    length = batch_length(batch)
    count = min(count, length)
    if count <= 1:
        return [batch]
    edges = [length * index // count for index in range(count + 1)]
    return [_cut(batch, first, last) for first, last in pairwise(edges)]


def _cut(value: Any, first: int, last: int) -> Any:
    if isinstance(value, Mapping):
        return {key: _cut(item, first, last) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(_cut(item, first, last) for item in value)
    return value[first:last]


def fitting_parts(
    task: nn.Module,
    loss: Loss,
    batch: Batch,
    accelerator: Accelerator,
    no_sync: Callable[[], AbstractContextManager[Any]],
    least: int = 1,
) -> int | None:
    """Into how many parts a batch must go so that a step fits into memory: ``least``, or that doubled until it does.

    Each number is tried with passes forward and backward of the real batch, the memory of an optimiser's state set
    aside, on every process; all of them take the same number. The task is afterwards as it was, without gradients;
    the random generators are moved. ``no_sync`` is the context in which gradients stay on their process.

    Returns:
        The number of parts, or None where not even single images fit.
    """
    before = {name: value.clone() for name, value in task.state_dict().items()}
    length = batch_length(batch)
    parts = min(least, length)
    try:
        # Memory may run out on one process before it comes to where they meet, such as the making of a codebook from
        # its first data: so none waits for another within a try.
        with apart(), no_sync():
            while True:
                tried = parts_of(batch, parts)[-2:]
                fits = _fits(lambda tried=tried: _pass(task, loss, tried, accelerator.num_processes))  # type: ignore[misc]
                _give_back_memory(task, accelerator.device)
                if _all_agree(fits, accelerator):
                    return parts
                if parts == length:
                    return None
                parts = min(2 * parts, length)
    finally:
        _give_back_memory(task, accelerator.device)
        task.load_state_dict(before)


def _pass(task: nn.Module, loss: Loss, parts: Sequence[Batch], processes: int) -> None:
    """What a step keeps in memory: gradients beside activations, two moments a weight, and what is sent to others."""
    weights = [p for p in task.parameters() if p.requires_grad]
    aside = [torch.empty_like(weight) for weight in weights for _ in range(2 + (processes > 1))]
    for part in parts:
        loss(part).backward()  # type: ignore[no-untyped-call]
    del aside


def _fits(work: Callable[[], object]) -> bool:
    try:
        work()
    except (RuntimeError, MemoryError) as error:
        if not is_of_memory(error):
            raise
        return False
    return True


def _give_back_memory(task: nn.Module, device: torch.device) -> None:
    for parameter in task.parameters():
        parameter.grad = None
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _all_agree(fits: bool, accelerator: Accelerator) -> bool:
    if accelerator.num_processes == 1:
        return fits
    total: Tensor = accelerator.reduce(torch.tensor(float(fits), device=accelerator.device), "sum")
    return bool(total.item() == accelerator.num_processes)
