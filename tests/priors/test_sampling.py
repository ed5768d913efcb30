"""Noise is a function of (seed, image, level, purpose, attempt), and draws follow the restricted distribution."""

from __future__ import annotations

import dataclasses
import math
import random

import numpy as np
import pytest
import torch

from priors.sampling import PLAIN, Noise, SampleOptions, draw, restrict
from vqgen.errors import InputError

LAST = math.nextafter(1.0, 0.0)  # the largest u below 1


def test_an_image_has_the_same_noise_in_any_batch() -> None:
    whole = Noise(3, tuple(range(20)), 0).uniform("codes", 12)
    alone = Noise(3, (17,), 0).uniform("codes", 12)
    mixed = Noise(3, (4, 17, 0), 0).uniform("codes", 12)
    assert torch.equal(whole[17], alone[0])
    assert torch.equal(whole[[4, 17, 0]], mixed)


def test_noise_is_uniform_float64_and_normal() -> None:
    noise = Noise(0, tuple(range(50)), 1)
    u, z = noise.uniform("codes", 20, 20), noise.normal("latent", 20, 20)
    assert u.shape == z.shape == (50, 20, 20)
    assert u.dtype == z.dtype == torch.float64
    assert float(u.min()) >= 0
    assert float(u.max()) < 1
    # 20,000 numbers: these bounds are seven standard errors wide
    assert abs(float(u.mean()) - 0.5) < 7 * math.sqrt(1 / 12 / u.numel())
    assert abs(float(z.mean())) < 7 / math.sqrt(z.numel())
    assert abs(float(z.std()) - 1) < 7 / math.sqrt(2 * z.numel())


@pytest.mark.parametrize(
    "change", [{"seed": 4}, {"indices": (8,)}, {"level": 1}, {"attempt": 1}, {"seed": 3 + 2**32}, {"seed": 3 + 2**40}]
)
def test_streams_are_never_shared(change: dict[str, object]) -> None:
    noise = Noise(3, (7,), 0)
    other = dataclasses.replace(noise, **change)
    assert not (noise.uniform("codes", 64) == other.uniform("codes", 64)).any()


def test_purposes_do_not_share_a_stream() -> None:
    noise = Noise(3, (7,), 0)
    drawn = [noise.uniform(purpose, 64) for purpose in ("codes", "latent", "proposal", "label")]
    for i, first in enumerate(drawn):
        for second in drawn[i + 1 :]:
            assert not (first == second).any()


def test_noise_stays_what_it_is() -> None:
    """Numbers written down once: seeds in papers and READMEs must mean the same images tomorrow."""
    key = np.random.SeedSequence([1, 2, 0, 0, 0])
    expected = np.random.Generator(np.random.Philox(key)).random(3)
    assert Noise(1, (2,), 0).uniform("codes", 3)[0].tolist() == expected.tolist()
    assert Noise(1, (2,), 0).uniform("codes", 1).item() == 0.9299601843145628


def test_noise_leaves_the_global_generators_alone() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    Noise(0, (0, 1), 0).uniform("codes", 5)
    Noise(0, (0, 1), 0).normal("proposal", 5)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    assert random.getstate() == before[2]


def test_no_images_no_noise() -> None:
    assert Noise(0, (), 0).uniform("codes", 5).shape == (0, 5)


@pytest.mark.parametrize("wrong", [(-1, (0,), 0), (0, (-1,), 0), (0, (0,), -1)])
def test_noise_needs_numbers_from_0(wrong: tuple[int, tuple[int, ...], int]) -> None:
    with pytest.raises(InputError, match="from 0 up"):
        Noise(*wrong)


def test_draw_follows_the_distribution() -> None:
    """On a grid of u the codes come out in exactly their shares, up to one grid cell each."""
    chances = torch.tensor([0.1, 0.0, 0.25, 0.4, 0.05, 0.2], dtype=torch.float64)
    u = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    codes = draw(chances.log().expand(len(u), -1), u)
    assert codes.dtype == torch.int64
    shares = codes.bincount(minlength=6) / len(u)
    assert torch.allclose(shares.double(), chances, atol=1.5e-4)
    assert (codes.diff() >= 0).all()


def test_draw_is_the_searchsorted_it_says_it_is() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(500, 40, generator=generator)
    u = torch.rand(500, generator=generator, dtype=torch.float64)
    cdf = logits.double().softmax(-1).cumsum(-1)
    slow = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True)[:, 0]
    assert torch.equal(draw(logits, u), slow)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("u", [0.0, 5e-324, 0.5, LAST, 1.0])
def test_a_code_of_probability_0_is_never_drawn(u: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 64, generator=generator).to(dtype)
    out = torch.rand(200, 64, generator=generator) < 0.7
    out[:, 0] = out[:, -1] = True  # the first and last codes, where u = 0 and u near 1 would land
    out[:, 30] = False
    codes = draw(logits.masked_fill(out, -math.inf), torch.full((200,), u, dtype=torch.float64))
    assert not out.gather(1, codes[:, None]).any()


@pytest.mark.parametrize("u", [0.0, 0.3, LAST])
@pytest.mark.parametrize(
    "options", [SampleOptions(top_k=3), SampleOptions(top_p=0.2), SampleOptions(0.5, top_k=5, top_p=0.4)]
)
def test_draw_stays_inside_the_restriction(u: float, options: SampleOptions) -> None:
    logits = torch.randn(300, 20, generator=torch.Generator().manual_seed(1))
    logits[:, 0] = logits[:, -1] = -9.0
    codes = draw(logits, torch.full((300,), u, dtype=torch.float64), options)
    assert restrict(logits, options).gather(1, codes[:, None]).isfinite().all()


def test_temperature_divides_logits_and_0_is_the_argmax() -> None:
    logits = torch.randn(50, 9, generator=torch.Generator().manual_seed(2))
    chances = restrict(logits, SampleOptions(temperature=2.0)).softmax(-1)
    assert torch.allclose(chances, (logits.double() / 2).softmax(-1))
    for u in (0.0, 0.5, LAST):
        codes = draw(logits, torch.full((50,), u, dtype=torch.float64), SampleOptions(temperature=0.0))
        assert torch.equal(codes, logits.argmax(-1))


@pytest.mark.parametrize("temperature", [1e-300, 5e-324])
def test_a_tiny_temperature_is_nearly_the_argmax(temperature: float) -> None:
    logits = torch.randn(50, 9, generator=torch.Generator().manual_seed(2))
    codes = draw(logits, torch.full((50,), 0.5, dtype=torch.float64), SampleOptions(temperature))
    assert torch.equal(codes, logits.argmax(-1))


@pytest.mark.parametrize(("k", "left"), [(1, [1]), (2, [1, 3]), (4, [0, 1, 2, 3]), (99, [0, 1, 2, 3, 4])])
def test_top_k_keeps_the_k_likeliest(k: int, left: list[int]) -> None:
    logits = torch.tensor([0.5, 3.0, 0.4, 2.0, -1.0])
    assert restrict(logits, SampleOptions(top_k=k)).isfinite().nonzero()[:, 0].tolist() == left


def test_top_k_keeps_ties() -> None:
    assert restrict(torch.tensor([1.0, 0.0, 0.0]), SampleOptions(top_k=2)).isfinite().all()


@pytest.mark.parametrize(("p", "count"), [(1e-9, 1), (0.4, 1), (0.49, 1), (0.51, 2), (0.79, 2), (0.81, 3), (1.0, 4)])
def test_top_p_keeps_the_smallest_set_with_that_mass(p: float, count: int) -> None:
    chances = torch.tensor([0.05, 0.5, 0.15, 0.3], dtype=torch.float64)
    left = restrict(chances.log(), SampleOptions(top_p=p)).isfinite()
    assert left.nonzero()[:, 0].tolist() == sorted(chances.argsort(descending=True)[:count].tolist())


def test_top_p_of_equal_codes_keeps_just_enough() -> None:
    assert int(restrict(torch.zeros(100), SampleOptions(top_p=0.295)).isfinite().sum()) == 30


def test_top_p_is_over_what_temperature_and_top_k_leave() -> None:
    logits = torch.tensor([0.5, 0.3, 0.2]).double().log()
    # of the two that top-k leaves the first has 0.625 of the mass
    assert int(restrict(logits, SampleOptions(top_k=2, top_p=0.62)).isfinite().sum()) == 1
    assert int(restrict(logits, SampleOptions(top_p=0.62)).isfinite().sum()) == 2


def test_restrict_without_options_changes_nothing() -> None:
    logits = torch.randn(4, 5, 6)
    assert torch.equal(restrict(logits, PLAIN), logits.double())


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": 0},
        {"top_k": 2.5},
        {"top_p": 0.0},
        {"top_p": 1.01},
        {"top_p": math.nan},
        {"guidance": math.nan},
    ],
)
def test_options_out_of_range_are_named(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        SampleOptions(**wrong)  # type: ignore[arg-type]


def test_all_bad_options_are_named_at_once() -> None:
    with pytest.raises(InputError, match=r"temperature.*top_k.*top_p"):
        SampleOptions(temperature=-1, top_k=0, top_p=2)
