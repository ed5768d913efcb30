"""The processes of a launcher, as the stages use them: all of them together, or the first one by itself."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import parse_flag_from_env

from vqgen.agreement import LONGEST_WAIT, Processes, Result
from vqgen.collectives import apart

__all__ = ["Processes", "Result", "alone", "join"]

_LAUNCHED = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    *("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"),
)
"""Variables by which Accelerate knows that a launcher started several processes."""


def join() -> Processes:
    """The processes of the launcher that started this one; this one alone where none did."""
    # Without a GPU, Accelerate joins the processes of a launcher only if it is told that the CPU is meant.
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return Processes.of(PartialState(cpu=cpu, timeout=LONGEST_WAIT))


@contextmanager
def alone() -> Iterator[None]:
    """In this block the process is by itself, whatever started it: what is trained here waits for no other."""
    launched = {name: os.environ.pop(name) for name in _LAUNCHED if name in os.environ}
    joined = dict(PartialState._shared_state)
    if launched:
        AcceleratorState._reset_state(reset_partial_state=True)
    try:
        with apart():
            yield
    finally:
        if launched:
            AcceleratorState._reset_state(reset_partial_state=True)
            PartialState._shared_state.update(joined)
            os.environ.update(launched)
