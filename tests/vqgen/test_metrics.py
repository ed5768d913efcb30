from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from vqgen.metrics import CodeUsage, bits_per_dim, mse, nats_to_bits, psnr


def test_usage_over_a_split_equals_a_brute_force_count() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(0, 40, (size, 3, 5), generator=generator) for size in (7, 7, 2)]
    usage = CodeUsage(50)
    for codes in batches:
        usage.add(codes)

    counted = Counter(int(code) for codes in batches for code in codes.flatten())
    total = sum(counted.values())
    entropy = -sum(n / total * math.log(n / total) for n in counted.values())
    assert usage.counts.tolist() == [counted[code] for code in range(50)]
    assert usage.perplexity == pytest.approx(math.exp(entropy), rel=1e-12)
    assert usage.dead == 50 - len(counted)
    assert usage.usage == pytest.approx(len(counted) / 50)


def test_perplexity_counts_equally_used_codes() -> None:
    usage = CodeUsage(8)
    assert usage.perplexity == 0
    assert usage.verdict("top") == "top: no codes counted."
    usage.add(torch.zeros(0, 2, 2, dtype=torch.int64))
    assert usage.perplexity == 0
    usage.add(torch.tensor([[1, 3], [5, 7]]))
    assert usage.perplexity == pytest.approx(4)
    assert usage.usage == 0.5


@pytest.mark.parametrize(
    ("size", "codes", "word"),
    [
        (64, torch.arange(64).repeat(10), "healthy"),
        (64, torch.arange(20).repeat(10), "fair"),
        (64, torch.arange(6).repeat(100), "poor"),
        (64, torch.full((500,), 3), "collapsed"),
        (2, torch.zeros(500, dtype=torch.int64), "collapsed"),
        (1, torch.zeros(500, dtype=torch.int64), "healthy"),
        (512, torch.arange(50), "healthy"),  # 50 codes cannot use more than 50 entries
    ],
)
def test_verdict_names_the_state_and_a_cure(size: int, codes: torch.Tensor, word: str) -> None:
    usage = CodeUsage(size)
    usage.add(codes)
    verdict = usage.verdict("bottom")
    assert verdict.startswith(f"bottom: {word}, perplexity {usage.perplexity:.1f} of {size}")
    assert (";" in verdict) == (word != "healthy")


def test_mse_and_psnr_are_on_the_scale_of_zero_to_one() -> None:
    black = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    grey = torch.full_like(black, 51)
    assert mse(black, grey).tolist() == pytest.approx([0.04, 0.04])
    assert psnr(black, grey).tolist() == pytest.approx([10 * math.log10(25)] * 2, rel=1e-5)
    # The same images as floats on [-1, 1], and one of each kind.
    assert mse(black / 127.5 - 1, grey / 127.5 - 1).tolist() == pytest.approx([0.04, 0.04], rel=1e-5)
    assert mse(black, grey / 127.5 - 1).tolist() == pytest.approx([0.04, 0.04], rel=1e-5)
    assert psnr(black, black).tolist() == [math.inf, math.inf]


def test_bits() -> None:
    assert nats_to_bits(math.log(8)) == pytest.approx(3)
    # 3,072 values, each one of 256 equally likely: 8 bits per value.
    assert bits_per_dim(3072 * math.log(256), 3072) == pytest.approx(8)
