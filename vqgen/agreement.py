"""Processes of a launcher that work together: what they share out, and what fails on one fails on all.

Work is cut into items, such as batches, whose number, size and order do not depend on the number of processes: the last
bits of a matrix product depend on the size of a batch, so none is ever split. Of n processes, process r makes the items
r, r + n, r + 2n, ...; after each round every process has what all have made, in the order of the items, and the first
one writes it. Tensors travel as safetensors and all else as JSON: nothing is unpickled.

All exchanges are of one form, and the first thing each process says in one is whether it has failed. So a process that
cannot go on, whatever it was doing, takes part in one last exchange; the others, wherever they are, learn of the error
at their own next one and stop with the same error. Nobody waits for a process that has gone.

Files need not look alike from everywhere: a network's file system may show old ones for a while. What the files decide,
such as where a training goes on, is for the first process to say (`Processes.decided`).
"""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from safetensors.torch import load, save
from torch import Tensor, distributed

from vqgen.errors import ConfigError, DivergedError, InputError, Interrupted, MismatchError, VqgenError

LONGEST_WAIT = timedelta(hours=2)
"""How long one process waits for the others, such as while the first one trains a classifier."""

_REQUESTS = (signal.SIGINT, signal.SIGTERM)
_KINDS = {kind.__name__: kind for kind in (InputError, ConfigError, MismatchError, DivergedError, Interrupted)}

Item = TypeVar("Item")
E = TypeVar("E", bound=BaseException)
Result = Mapping[str, Tensor]


class Processes:
    """The processes of a launcher as one of them sees them; there may be only one."""

    def __init__(self, count: int, rank: int, device: torch.device) -> None:
        self.count = count
        self.rank = rank
        self.device = device

    @classmethod
    def of(cls, state: Accelerator | PartialState) -> Processes:
        return cls(state.num_processes, state.process_index, state.device)

    @property
    def main(self) -> bool:
        """Whether this is the first process, which writes."""
        return self.rank == 0

    def in_order(self, items: Sequence[Item], make: Callable[[Item], Result]) -> Iterator[Result]:
        """What ``make`` gives for each of ``items``, in their order, on every process.

        Each process calls ``make`` for its own share alone. Tensors come back on the CPU. All processes go through this
        to its end, within `together`.
        """
        for start in range(0, len(items), self.count):
            own = start + self.rank
            made = make(items[own]) if own < len(items) else {}
            yield from self.exchange(made)[: len(items) - start]

    def exchange(self, own: Result) -> list[Result]:
        """``own`` of every process, by rank, on the CPU.

        Raises:
            VqgenError: another process has failed; its error.
        """
        if self.count == 1:
            return [{name: value.cpu() for name, value in own.items()}]
        # safetensors gives names back in an order of its own.
        numbered = {f"{place:04d}{name}": value.detach() for place, (name, value) in enumerate(own.items())}
        parts = self._exchange(save({name: value.cpu().contiguous() for name, value in numbered.items()}))
        return [{name[4:]: value for name, value in sorted(load(part).items())} for part in parts]

    def decided(self, value: Any) -> Any:
        """The first process's ``value``, plain JSON, on every process; what the others give does not count.

        Raises:
            VqgenError: another process has failed; its error.
        """
        if self.count == 1:
            return value
        return json.loads(self._exchange(json.dumps(value).encode() if self.main else b"")[0])

    def require_alike(self, known: Mapping[str, Any]) -> None:
        """Go on only where all processes know the same, such as the fingerprints of what each has read; plain JSON.

        Raises:
            VqgenError: on all of them, where one has read other files than the first, or has failed.
        """
        if self.count == 1:
            return
        with self.together():
            own = json.loads(json.dumps(known))
            first = self.decided(own)
            differing = sorted(key for key in first.keys() | own.keys() if first.get(key) != own.get(key))
            if differing:
                names = ", ".join(differing)
                raise InputError(
                    f"Process {self.rank} of {self.count} reads other files than the first one: {names}.",
                    "All need the same run folder and the same images; a network's file system may take a minute to "
                    "show what was just written.",
                )

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block that all processes go through: it ends well on all of them, or with an error on all of them.

        It holds no collective other than those of this class, unless all reach it whatever fails.
        """
        try:
            yield
            self._wait()
        except BaseException as error:
            self._tell(error)
            raise

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """A block that the first process goes through before the others; if it fails there, so do the others."""
        if not self.main:
            self._wait()
        try:
            yield
        except BaseException as error:
            if self.main:
                self._tell(error)
            raise
        if self.main:
            self._wait()

    def _wait(self) -> None:
        if self.count > 1:
            self._exchange(b"")

    def _tell(self, error: BaseException) -> None:
        """Take part in the next exchange with ``error``, unless all know of it."""
        if self.count == 1 or getattr(error, "told", False):
            return
        said: dict[str, Any] = {"kind": "InputError", "hint": ""}
        if isinstance(error, VqgenError):
            said = {"kind": type(error).__name__, "message": error.message, "hint": error.hint}
        elif isinstance(error, KeyboardInterrupt):
            said |= {"kind": "Interrupted", "message": "Interrupted."}
        else:
            text = " ".join(f"{type(error).__name__}: {error}".split())
            said["message"] = f"Process {self.rank} of {self.count} has failed ({text})."
        own = json.dumps(said).encode()
        with suppress(VqgenError, KeyboardInterrupt):  # the others are gone, or the user says it twice
            earlier = self._round(own, failed=True)[: self.rank]
            # What all have met alike is said once, by the first of them.
            if isinstance(error, VqgenError) and (True, own) in earlier:
                error.said_elsewhere = True
        _mark(error)

    def _exchange(self, content: bytes) -> list[bytes]:
        """The contents of all processes, by rank; raises the error of the first that has failed."""
        found = self._round(content, failed=False)
        for failed, said in found:
            if failed:
                raise _as_error(said)
        return [other for _, other in found]

    def _round(self, content: bytes, *, failed: bool) -> list[tuple[bool, bytes]]:
        """Of every process, by rank: whether it has failed, and its content."""
        try:
            with _undisturbed():
                return self._both_halves(content, failed=failed)
        except RuntimeError as error:
            raise _mark(
                InputError("Another process of the launcher has stopped.", "What that one said is the reason.")
            ) from error

    def _both_halves(self, content: bytes, *, failed: bool) -> list[tuple[bool, bytes]]:
        own = torch.tensor([failed, len(content)], device=self.device)
        heads = [torch.empty_like(own) for _ in range(self.count)]
        distributed.all_gather(heads, own)
        sizes = [int(size) for _, size in heads]
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        if content:
            padded[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        padded = padded.to(self.device)
        parts = [torch.empty_like(padded) for _ in range(self.count)]
        if max(sizes):
            distributed.all_gather(parts, padded)
        contents = [part[:size].cpu().numpy().tobytes() for part, size in zip(parts, sizes, strict=True)]
        return [(bool(wrong), part) for (wrong, _), part in zip(heads, contents, strict=True)]


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM wait for the end of the block.

    Between the halves of an exchange they would leave this process out of step: its last word would meet the others'
    second half.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    # Handlers, not a mask: the system gives a signal to any thread that lets it in, and torch has many.
    before = {number: signal.signal(number, lambda number, _: came.append(number)) for number in _REQUESTS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        for request in came:
            signal.raise_signal(request)


def _as_error(said: bytes) -> VqgenError:
    """The error of another process, as that one tells it."""
    found = json.loads(said)
    error = _KINDS.get(found["kind"], InputError)(found["message"], found["hint"])
    error.said_elsewhere = True
    return _mark(error)


def _mark(error: E) -> E:
    """``error``, as one of which all processes know."""
    setattr(error, "told", True)  # noqa: B010
    return error
