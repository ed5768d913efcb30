"""What fails on one process of a training fails on all: none is left waiting for one that has gone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object

from vqgen.errors import InputError, VqgenError


@contextmanager
def together(accelerator: Accelerator | PartialState) -> Iterator[None]:
    """Every process waits at the end of the block for the others, and raises if one of them did.

    The block itself holds no collective that only some would reach. A process that was well raises the error of the
    first that was not, marked as said elsewhere.

    Raises:
        VqgenError: its own, or that of another process.
    """
    own: VqgenError | None = None
    try:
        yield
    except VqgenError as error:
        own = error
    if accelerator.num_processes > 1:
        texts = gather_object([("", "", 0) if own is None else (own.message, own.hint, own.exit_code)])
        if own is None:
            own = _another(texts)
    if own is not None:
        raise own


def _another(texts: list[tuple[str, str, int]]) -> VqgenError | None:
    for message, hint, code in texts:
        if code:
            error = InputError(message, hint)
            error.exit_code = code
            error.said_elsewhere = True
            return error
    return None
