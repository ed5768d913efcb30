"""Integer probabilities and the entropy coder: the two sides see the same whole numbers, and nothing else counts."""

from __future__ import annotations

import sys
from itertools import pairwise

import numpy as np
import pytest
import torch

from pipelines.compression.coder import TOTAL, OutOfStepError, Receiver, Sender, library, whole_numbers
from vqgen.errors import DivergedError, InputError


def extreme_logits(size: int) -> torch.Tensor:
    """Rows that try the rounding: equal, spread, one certain, all but one impossible, ties, very large numbers."""
    generator = torch.Generator().manual_seed(size)
    spread = torch.randn(6, size, generator=generator) * torch.tensor([0.01, 1.0, 5.0, 30.0, 1e3, 1e30])[:, None]
    rows = [torch.zeros(size), torch.full((size,), -1e4), torch.linspace(-1e6, 1e6, size)]
    certain = torch.zeros(size)
    certain[-1] = 1e5
    impossible = torch.full((size,), -torch.inf)
    impossible[size // 2] = 3.0
    tied = torch.full((size,), -50.0)
    tied[: (size + 1) // 2] = 50.0
    return torch.cat([spread, torch.stack([*rows, certain, impossible, tied])])


@pytest.mark.parametrize("size", [1, 2, 3, 7, 128, 512, 5000])
def test_probabilities_become_whole_numbers_that_sum_to_all_and_leave_no_code_out(size: int) -> None:
    probabilities = extreme_logits(size).double().softmax(-1).numpy()
    whole = whole_numbers(probabilities)
    assert whole.dtype == np.int64
    assert (whole.sum(1) == TOTAL).all()
    assert whole.min() >= 1
    # Each is within a unit of its share of what is to be shared out, the likeliest within K units.
    ideal = probabilities * (TOTAL - size) + 1
    error = np.abs(whole - ideal)
    error[np.arange(len(whole)), probabilities.argmax(1)] /= size
    assert error.max() <= 1.001


@pytest.mark.parametrize("size", [2, 3, 17, 512])
def test_the_library_codes_with_just_these_numbers(size: int) -> None:
    """Each code's interval, first and last point, as the range decoder itself sees it in its first step."""
    coding = library().stream
    family = coding.model.Categorical(perfect=False)
    for row in whole_numbers(extreme_logits(size).double().softmax(-1).numpy()):
        weights = (row - 1).astype(np.float32)[None]
        edges = np.concatenate([[0], row.cumsum()])
        for code, (start, stop) in enumerate(pairwise(edges.tolist())):
            for point in (start, stop - 1):
                state = point * (2**40 - 1)  # the decoder's first state: point in units of (2^64 - 1) >> 24
                words = np.array([state >> 32, state & 0xFFFFFFFF], dtype=np.uint32)
                assert coding.queue.RangeDecoder(words).decode(family, weights)[0] == code


def test_what_is_sent_is_received_and_costs_its_probability() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(4000, 40, generator=generator)
    codes = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    sender = Sender()
    for part, given in zip(logits.split(64), codes.split(64), strict=True):
        sender.codes(part, given)
    words = sender.words()
    receiver = Receiver(words)
    received = torch.cat([receiver.codes(part, None) for part in logits.split(64)])
    assert torch.equal(received, codes)
    assert receiver.ended
    ideal = -float(logits.double().log_softmax(-1).gather(1, codes[:, None]).sum()) / np.log(2)
    assert sender.prior_bits == pytest.approx(ideal, rel=1e-12)
    assert sender.integer_bits == pytest.approx(ideal, rel=1e-4)
    assert ideal < 32 * len(words) < 1.001 * ideal + 64


def test_unlikely_codes_and_codes_of_no_choice_survive() -> None:
    logits = extreme_logits(50)
    sender = Sender()
    worst = logits.argmin(-1)
    for given in (worst, torch.zeros(len(worst), dtype=torch.int64), torch.full_like(worst, 49)):
        sender.codes(logits, given)
    only = torch.zeros(len(worst), dtype=torch.int64)
    sender.codes(torch.zeros(len(worst), 1), only)  # a codebook of one code
    sender.equally_likely(1, 3, torch.zeros(3, dtype=torch.int64))
    sender.equally_likely(3, 4, torch.tensor([2, 0, 1, 2]))
    receiver = Receiver(sender.words())
    assert torch.equal(receiver.codes(logits, None), worst)
    assert int(receiver.codes(logits, None).max()) == 0
    assert int(receiver.codes(logits, None).min()) == 49
    assert torch.equal(receiver.codes(torch.zeros(len(worst), 1), None), only)
    assert receiver.equally_likely(1, 3, None).tolist() == [0, 0, 0]
    assert receiver.equally_likely(3, 4, None).tolist() == [2, 0, 1, 2]
    assert receiver.ended


def test_words_of_nothing_are_none() -> None:
    words = Sender().words()
    assert len(words) == 0
    assert Receiver(words).ended


def test_words_too_many_are_noticed() -> None:
    sender = Sender()
    sender.equally_likely(10, 3, torch.tensor([1, 2, 3]))
    receiver = Receiver(np.concatenate([sender.words(), np.array([5, 6, 7], dtype=np.uint32)]))
    receiver.equally_likely(10, 3, None)
    assert not receiver.ended


def test_words_that_fit_no_code_are_one_clear_error() -> None:
    receiver = Receiver(np.array([2**32 - 1] * 3, dtype=np.uint32))
    with pytest.raises(OutOfStepError):
        receiver.codes(torch.zeros(50, 9), None)


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_logits_that_are_no_numbers_are_refused(broken: float) -> None:
    logits = torch.zeros(2, 5)
    logits[1, 3] = broken
    with pytest.raises(DivergedError, match="finite"):
        Sender().codes(logits, torch.zeros(2, dtype=torch.int64))


def test_a_missing_library_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "constriction", None)
    with pytest.raises(InputError, match=r"constriction, which is not installed.*pip install 'vqgen\[compress\]'"):
        Sender()
