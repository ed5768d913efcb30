"""Functions of a model compiled for the length of a training, by torch.compile.

Nothing of it is seen from outside: no module is wrapped, so names in a checkpoint and in a saved model are the same
with and without. Compiled is only what runs with gradients in training mode; evaluation, previews and what is exported
go through the functions as they are written, so that their figures compare with those of any other training.

What cannot be compiled here (no compiler, a backend that does not know the device or the model) is said once, and
the training goes on with the functions as they are.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vqgen.checkpoint import preserved_random_state

BACKEND = "inductor"
SHAPES = 128
"""Most shapes that a method is compiled for; torch alone stops at 8, which `--auto-batch` may need for its trials."""


class Part(NamedTuple):
    """A method that `compiled` compiles: of tensors alone, without collectives, and without a trace in the module."""

    module: nn.Module
    method: str


class Compilation:
    """What became of the compiling of several functions."""

    def __init__(self, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self.failed = False
        """One failure is enough for all functions, since most are of the machine."""
        self.seconds = 0.0
        """Time that compiling took so far, within calls of the functions."""

    @contextmanager
    def timed(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - start

    def fail(self, error: Exception) -> None:
        if not self.failed:
            self.failed = True
            self._warn(f"torch.compile does not work here ({_reason(error)}): training goes on without it.")


@contextmanager
def compiled(parts: Sequence[Part], warn: Callable[[str], None]) -> Iterator[Compilation]:
    """``parts`` compiled inside, and as they were after it; ``warn`` hears, once, that they could not be.

    A process that falls back goes on with the same computation, so processes need not agree on it.
    """
    compilation = Compilation(warn)
    if not parts:
        yield compilation
        return
    from torch._dynamo import config  # seconds to import

    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    functions = [_Function(part.module, getattr(part.module, part.method), compilation) for part in parts]
    for part, function in zip(parts, functions, strict=True):
        # In the instance's dictionary, over the method of its class: modules, their names and state stay the same.
        vars(part.module)[part.method] = function
    try:
        with config.patch({limit: SHAPES}):
            yield compilation
    finally:
        for part in parts:
            vars(part.module).pop(part.method, None)
        torch.compiler.reset()  # or it would count against the limit of the next training in this process


class _Function:
    """One method, compiled in training and as it is otherwise."""

    def __init__(self, module: nn.Module, plain: Callable[..., Any], compilation: Compilation) -> None:
        self._module = module
        self._plain = plain
        # A shape of its own has code of its own: with shapes left open, what a step computes to the last bit would
        # depend on the shapes that came before, and a resumed training would part from an unbroken one.
        self._compiled: Callable[..., Any] = torch.compile(plain, backend=BACKEND, dynamic=False)
        self._compilation = compilation
        self._tried = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._compilation.failed or not (self._module.training and torch.is_grad_enabled()):
            return self._plain(*args, **kwargs)
        try:
            if not self._tried:
                self._try(*args, **kwargs)
                self._tried = True
            return self._compiled(*args, **kwargs)
        except Exception as error:
            # Whatever it is: if it is the caller's own fault, the plain function says so better.
            result = self._plain(*args, **kwargs)
            self._compilation.fail(error)
            return result

    def _try(self, *args: Any, **kwargs: Any) -> None:
        """Forward and backward once for nothing: code for the backward pass may be made only there, out of reach."""
        with self._compilation.timed(), preserved_random_state(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = self._compiled(*_cut_off(args), **_cut_off(kwargs))
            roots = [value.sum() for value in _tensors(made) if value.requires_grad]
            parameters = [parameter for parameter in self._module.parameters() if parameter.requires_grad]
            if roots and parameters:
                torch.autograd.grad(roots, parameters, allow_unused=True)


def _cut_off(value: Any) -> Any:
    """Arguments without the graph that led to them, which a trial must not use up; no leaves, as they were none."""
    if isinstance(value, Tensor):
        return value if value.grad_fn is None else value.detach().requires_grad_().clone()
    if isinstance(value, dict):
        return {key: _cut_off(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_cut_off(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Iterable) and not isinstance(value, (str, bytes)):
        for item in value:
            yield from _tensors(item)


def _reason(error: Exception) -> str:
    """The first line of what went wrong, without what torch.compile wraps around the error of a backend."""
    inner = getattr(error, "inner_exception", None)
    lines = [line.strip() for line in str(inner or error).splitlines() if line.strip()]
    return lines[0].rstrip(".:") if lines else type(inner or error).__name__
