"""One walk over a batch of images, code by code, for the sender and the receiver alike.

In turn: the labels, each level's codes, coarse to fine, and the bit of each image's checksum. The network always runs
at the batch of the header, the last one filled up with images of zeros, one position at a time: the same products of
the same shapes on both sides. The parallel pass, which is faster, would round otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from pipelines.compression.coder import Line
from pipelines.compression.format import Checks
from priors.autoregressive import AutoregressivePrior
from priors.base import Prior, evaluating
from priors.baselines import IndependentPrior
from priors.inputs import check_inputs
from priors.sampling import exact
from priors.scan import to_maps, to_sequence
from vqgen.codes import Codes

_TABLES = 16
"""Tables of a baseline that are held at once, one a class."""


class Images(NamedTuple):
    """The images of a batch, as codes."""

    codes: Codes
    """(N, h, w) int64 per level."""
    label: Tensor | None
    """(N,) int64; None where the priors are given none."""


class Walk:
    """Passes batch after batch along a line."""

    def __init__(self, priors: Sequence[Prior], line: Line, batch: int, classes: int) -> None:
        """
        Args:
            priors: of each level, coarse to fine, on the CPU.
            batch: images at once.
            classes: number of classes of which one is passed on for each image; 0 for none.
        """
        self.priors, self.line, self.batch, self.classes = priors, line, batch, classes
        self.checks = Checks()
        self.positions = sum(prior.spec.target.positions for prior in priors)
        self._tables = [lru_cache(_TABLES)(p.table) if isinstance(p, IndependentPrior) else None for p in priors]

    def images(self, count: int, given: Images | None, advance: Callable[[float], None]) -> Images:
        """The next ``count`` images, at most a batch: those given, at the sender; those read, at the receiver.

        ``advance`` is told how many images the work done is worth.

        Raises:
            OutOfStepError: at the receiver, what is read cannot have been written like this.
            WrongCodesError: at the receiver, the codes of an image do not fit its checksum.
        """
        label = None
        if self.classes:
            label = self.line.equally_likely(self.classes, count, None if given is None else given.label)
        codes: Codes = ()
        for level, prior in enumerate(self.priors):
            known = None if given is None else given.codes[level]
            codes = (*codes, self._level(level, prior, count, codes, label, known, advance))
        own = torch.tensor([self._check(row, codes, label) for row in range(count)], dtype=torch.int64)
        stored = self.line.equally_likely(2, count, own if given is not None else None)
        if (wrong := (own != stored).nonzero()).numel():
            raise WrongCodesError(int(wrong[0, 0]))
        return Images(codes, label)

    def _check(self, row: int, codes: Codes, label: Tensor | None) -> int:
        parts = [] if label is None else [label[row : row + 1].numpy()]
        return self.checks.add(*parts, *(level[row].numpy() for level in codes))

    def _level(
        self,
        level: int,
        prior: Prior,
        count: int,
        coarser: Codes,
        label: Tensor | None,
        known: Tensor | None,
        advance: Callable[[float], None],
    ) -> Tensor:
        """Codes (count, h, w) of one level."""
        if isinstance(prior, AutoregressivePrior):
            return self._stepped(prior, count, coarser, label, known, advance)
        height, width = prior.spec.target.height, prior.spec.target.width
        table = self._tables[level]
        assert table is not None
        maps = []
        for row in range(count):
            own = prior.spec.classes if label is None else int(label[row])
            maps.append(self.line.codes(table(own), None if known is None else known[row].flatten()))
            advance(height * width / self.positions)
        return torch.cat(maps).view(count, height, width) if maps else torch.zeros(0, height, width, dtype=torch.int64)

    def _stepped(
        self,
        prior: AutoregressivePrior,
        count: int,
        coarser: Codes,
        label: Tensor | None,
        known: Tensor | None,
        advance: Callable[[float], None],
    ) -> Tensor:
        """Codes (count, h, w) of a prior that goes code by code, in its scan order."""
        target = prior.spec.target
        filled = tuple(_filled(maps, self.batch) for maps in coarser)
        context, labels = check_inputs(prior, self.batch, filled, None if label is None else _filled(label, self.batch))
        sequence = None if known is None else to_sequence(known, prior.scan)
        codes = torch.zeros(self.batch, target.positions, dtype=torch.int64)
        with evaluating(prior):
            stepper = prior.stepper(self.batch, context, labels)
            previous: Tensor | None = None
            for position in range(target.positions):
                logits = exact(stepper.step(previous)[:count])
                given = None if sequence is None else sequence[:, position]
                codes[:count, position] = self.line.codes(logits, given)
                previous = codes[:, position].clone()
                advance(count / self.positions)
        return to_maps(codes[:count], target.height, target.width, prior.scan).contiguous()


class WrongCodesError(Exception):
    """The codes of an image do not fit its checksum; ``row`` is its place in the batch."""

    def __init__(self, row: int) -> None:
        super().__init__(row)
        self.row = row


def _filled(values: Tensor, size: int) -> Tensor:
    """``values`` (N, ...) followed by zeros, (size, ...)."""
    rest = values.new_zeros(size - len(values), *values.shape[1:])
    return torch.cat([values, rest])


@contextmanager
def steady_arithmetic() -> Iterator[None]:
    """One thread, whole float32 and no gradients inside, whatever was set before; all as it was after it."""
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            yield
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
