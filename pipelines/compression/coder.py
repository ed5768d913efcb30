"""The entropy coder: codes to bits and back, given the logits of each (`constriction`'s range coder, Bamler 2022).

Both sides must have the very same probabilities, so they become whole numbers here, before the coder sees them: of
2^24, at least 1 each. `constriction` gives every code of a categorical model one unit, and of the other 2^24 - K as
many as the weights say; handed whole weights that sum to just that, its own arithmetic has nothing to round. Sums of
whole numbers below 2^24 are exact even in float32.

`Sender` and `Receiver` have the same methods, so that one walk over the positions serves both: what goes into one is
what comes out of the other.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipelines.compression.format import PRECISION, Words
from vqgen.errors import DivergedError, InputError

TOTAL = 2**PRECISION

Ints = npt.NDArray[np.int32]


class OutOfStepError(Exception):
    """What was read cannot have been written with these probabilities."""


class Line(Protocol):
    """One end of a stream of codes."""

    def codes(self, logits: Tensor, given: Tensor | None) -> Tensor:
        """Codes (N,) int64 of logits (N, K): those given, at the sender; those read, at the receiver."""
        ...

    def equally_likely(self, size: int, count: int, given: Tensor | None) -> Tensor:
        """``count`` numbers in [0, size), int64, each as likely as another; as `codes`."""
        ...


class Sender:
    """The writing end. Counts what the codes cost: bits as float64 sums over codes."""

    def __init__(self) -> None:
        self._coder = library().stream.queue.RangeEncoder()
        self._family = library().stream.model.Categorical(perfect=False)
        self.prior_bits = 0.0
        """-log2 p of the codes, p as the prior has it."""
        self.integer_bits = 0.0
        """The same with probabilities as whole numbers."""

    def codes(self, logits: Tensor, given: Tensor | None) -> Tensor:
        assert given is not None
        probabilities = _probabilities(logits)
        whole = whole_numbers(probabilities)
        rows, symbols = np.arange(len(whole)), given.numpy()
        nats = logits.double().log_softmax(-1).gather(1, given[:, None])
        self.prior_bits -= float(nats.sum()) / np.log(2)
        self.integer_bits += float((PRECISION - np.log2(whole[rows, symbols])).sum())
        if whole.shape[1] > 1:  # a level of one code has nothing to say
            self._coder.encode(symbols.astype(np.int32), self._family, _weights(whole))
        return given

    def equally_likely(self, size: int, count: int, given: Tensor | None) -> Tensor:
        assert given is not None
        if size > 1:
            self._coder.encode(given.numpy().astype(np.int32), library().stream.model.Uniform(size))
        return given

    def words(self) -> Words:
        """What was written so far, (W,) uint32."""
        words: Words = self._coder.get_compressed()
        return words


class Receiver:
    """The reading end.

    Its methods raise `OutOfStepError` where the words cannot have been written with the probabilities given.
    """

    def __init__(self, words: Words) -> None:
        self._coder = library().stream.queue.RangeDecoder(words)
        self._family = library().stream.model.Categorical(perfect=False)

    def codes(self, logits: Tensor, given: Tensor | None) -> Tensor:
        whole = whole_numbers(_probabilities(logits))
        if whole.shape[1] == 1:
            return torch.zeros(len(whole), dtype=torch.int64)
        return self._read(self._family, _weights(whole))

    def equally_likely(self, size: int, count: int, given: Tensor | None) -> Tensor:
        if size == 1:
            return torch.zeros(count, dtype=torch.int64)
        return self._read(library().stream.model.Uniform(size), count)

    def _read(self, model: Any, parameter: Any) -> Tensor:
        try:
            symbols: Ints = self._coder.decode(model, parameter)
        except AssertionError as error:  # how the library says that the words are not of this model
            raise OutOfStepError from error
        return torch.from_numpy(symbols.astype(np.int64))

    @property
    def ended(self) -> bool:
        """Whether every word was needed."""
        return bool(self._coder.maybe_exhausted())


def whole_numbers(probabilities: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Rows (N, K) that sum to 1 as whole numbers (N, K) that sum to 2^24, each at least 1.

    Each code gets one, and its share of the rest rounded down; what is then left over, fewer than K, goes to the
    likeliest (the first of them), where it changes least.
    """
    count, size = probabilities.shape
    whole: npt.NDArray[np.int64] = np.floor(probabilities * (TOTAL - size)).astype(np.int64) + 1
    whole[np.arange(count), probabilities.argmax(1)] += TOTAL - whole.sum(1)
    return whole


def _probabilities(logits: Tensor) -> npt.NDArray[np.float64]:
    """Softmax of logits (N, K) in float64.

    Raises:
        DivergedError: a logit is nan or inf, or a row has no code left.
    """
    if not logits.amax(-1).isfinite().all():
        raise DivergedError("The prior gives logits that are not finite numbers.", "Train it again.")
    probabilities: npt.NDArray[np.float64] = logits.double().softmax(-1).numpy()
    return probabilities


def _weights(whole: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """What the coder is to share out beyond the one unit that it gives each code."""
    weights: npt.NDArray[np.float32] = (whole - 1).astype(np.float32)
    return weights


def library() -> Any:
    """The package `constriction`.

    Raises:
        InputError: it is not installed.
    """
    try:
        import constriction
    except ImportError as error:
        raise InputError(
            "Compression needs constriction, which is not installed.",
            "Install it with: pip install 'vqgen[compress]'",
        ) from error
    return constriction
