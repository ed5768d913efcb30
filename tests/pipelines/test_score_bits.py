"""Bits of codes without a known class: a density that sums to 1, and shares that follow the chain rule."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
from einops import repeat
from torch import Tensor

from pipelines.scoring.bits import LN2, Labels, code_bits, has_map, images_at_once
from priors.autoregressive import AutoregressivePrior
from priors.base import Prior, PriorSpec
from priors.baselines import Unigram
from priors.pixelcnn import PixelCNN
from priors.roundtrip import RoundTrip
from priors.sampling import Noise
from priors.scan import to_sequence
from priors.transformer import Transformer
from vqgen.codes import Codes, LevelSpec
from vqgen.errors import DivergedError

CLASSES = 3
TOP = LevelSpec("top", 1, 2, 3, 4)
BOTTOM = LevelSpec("bottom", 2, 2, 2, 4)
SPECS = (PriorSpec(TOP, (), CLASSES), PriorSpec(BOTTOM, (TOP,), CLASSES))
SHARES = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
MARGINAL = Labels("marginal", SHARES)
SCANS = ("raster", "column", "snake")


def network(kind: type[AutoregressivePrior], level: int, scan: str = "raster") -> AutoregressivePrior:
    """With weights large enough that labels, coarser codes and order matter."""
    small: dict[str, Any] = {"width": 8, "blocks": 1} if kind is PixelCNN else {"dim": 16, "depth": 1, "heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(level)
        prior = kind({**small, "scan": scan, "label_dropout": 0.1}, SPECS[level])
        for parameter in prior.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
    return prior.eval()


def unigram(level: int) -> Prior:
    generator = torch.Generator().manual_seed(level)
    spec = SPECS[level]
    codes = torch.randint(spec.target.codebook_size, (40, spec.target.height, spec.target.width), generator=generator)
    context = (torch.zeros(40, TOP.height, TOP.width, dtype=torch.int64),) * level
    prior = Unigram({}, spec)
    prior.prepare([(codes, context, torch.arange(40) % CLASSES)])
    return prior.eval()


def every_code() -> Codes:
    """All 9 x 16 pairs of maps."""
    top = torch.tensor(list(product(range(3), repeat=2))).view(-1, 1, 2)
    bottom = torch.tensor(list(product(range(2), repeat=4))).view(-1, 2, 2)
    return repeat(top, "t h w -> (t b) h w", b=len(bottom)), repeat(bottom, "b h w -> (t b) h w", t=len(top))


MIXES = {
    "transformer": lambda scan: [network(Transformer, 0, scan), network(Transformer, 1, scan)],
    "pixelcnn": lambda scan: [network(PixelCNN, 0, scan), network(PixelCNN, 1, scan)],
    "mixed": lambda scan: [unigram(0), network(PixelCNN, 1, scan)],
    "unigram": lambda scan: [unigram(0), unigram(1)],
}


def bits_of(priors: list[Prior], labels: Labels = MARGINAL, codes: Codes | None = None, given: Tensor | None = None):  # type: ignore[no-untyped-def]
    codes = every_code() if codes is None else codes
    return code_bits(priors, codes, labels, given, range(len(codes[0])))


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("mix", MIXES)
def test_the_sum_over_classes_is_a_density(mix: str, scan: str) -> None:
    found = bits_of(MIXES[mix](scan))
    assert float((-LN2 * found.total).exp().sum()) == pytest.approx(1, abs=1e-5)
    top = (-LN2 * found.levels[0]).exp()[:: 2**4]  # one of the bottom maps to each top map
    assert float(top.sum()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("mix", MIXES)
def test_it_is_the_sum_of_each_class_alone(mix: str, scan: str) -> None:
    priors, (top, bottom) = MIXES[mix](scan), every_code()
    joint = []
    for value in range(CLASSES):
        label = torch.full((len(top),), value)
        joint.append(priors[0].log_prob(top, (), label).nats + priors[1].log_prob(bottom, (top,), label).nats)
    expected = -(torch.stack(joint).double() + SHARES.log()[:, None]).logsumexp(0) / LN2
    torch.testing.assert_close(bits_of(priors).total, expected.detach())


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("mix", MIXES)
def test_maps_are_conditionals_along_the_scan_and_add_up_to_their_level(mix: str, scan: str) -> None:
    """Against brute force: p of a prefix is the sum of the density over everything that can follow it."""
    priors = MIXES[mix](scan)
    found = bits_of(priors)
    density = (-LN2 * found.total).exp()
    order = [prior.scan if isinstance(prior, AutoregressivePrior) else "raster" for prior in priors]
    sequence = torch.cat([to_sequence(maps, scan) for maps, scan in zip(every_code(), order, strict=True)], dim=1)
    own = torch.cat([to_sequence(maps, scan) for maps, scan in zip(found.maps, order, strict=True)], dim=1)
    before = torch.ones(len(sequence), dtype=torch.float64)
    for place in range(sequence.shape[1]):
        same = (sequence[:, None, : place + 1] == sequence[None, :, : place + 1]).all(-1)
        prefix = same.double() @ density
        torch.testing.assert_close(own[:, place], -(prefix / before).log2(), atol=2e-5, rtol=1e-5)
        before = prefix
    for maps, bits in zip(found.maps, found.levels, strict=True):
        torch.testing.assert_close(maps.sum((1, 2)), bits, atol=1e-12, rtol=0)


def test_the_class_that_the_top_shows_is_known_to_the_bottom() -> None:
    """A top level that says the class exactly: the bottom is then paid as with the label given."""
    spec = (PriorSpec(LevelSpec("top", 1, 1, CLASSES, 4), (), CLASSES), PriorSpec(BOTTOM, (), CLASSES))
    labels = torch.arange(6000) % CLASSES
    top, bottom = Unigram({}, spec[0]), Unigram({}, spec[1])
    top.prepare([(labels.view(-1, 1, 1), (), labels)])
    bottom.prepare([((labels[:, None, None] == 1).long().expand(-1, 2, 2), (), labels)])

    class Alone(Unigram):
        """The bottom as it is, whatever the coarser codes."""

        def log_prob_map(self, codes: Tensor, context: Codes = (), label: Tensor | None = None) -> Tensor:
            return super().log_prob_map(codes, (), label)

    bottom.__class__ = Alone
    codes = (labels[:3].view(-1, 1, 1), (labels[:3, None, None] == 1).long().expand(-1, 2, 2))
    marginal = code_bits([top, bottom], codes, Labels("marginal", torch.full((3,), 1 / 3).double()), None, range(3))
    given = code_bits([top, bottom], codes, Labels("given"), labels[:3], range(3))
    assert marginal.levels[0].tolist() == pytest.approx([math.log2(3)] * 3, abs=0.01)
    torch.testing.assert_close(marginal.levels[1], given.levels[1], atol=0.01, rtol=0)


def test_given_and_none_are_what_the_priors_say() -> None:
    priors, (top, bottom) = MIXES["transformer"]("raster"), every_code()
    label = torch.arange(len(top)) % CLASSES
    for use, told in (("given", label), ("none", None)):
        found = bits_of(priors, Labels(use), given=label if use == "given" else None)  # type: ignore[arg-type]
        for level, (codes, context) in enumerate(((top, ()), (bottom, (top,)))):
            nats = priors[level].log_prob(codes, context, told).nats
            torch.testing.assert_close(found.levels[level], -nats.detach() / LN2)


def test_an_image_has_the_same_bits_alone_and_among_others() -> None:
    priors, codes = MIXES["mixed"]("snake"), every_code()
    whole = bits_of(priors)
    for place in (0, 17, 143):
        alone = bits_of(priors, codes=tuple(maps[place : place + 1] for maps in codes))
        assert float(alone.total) == pytest.approx(float(whole.total[place]), abs=1e-4)


def test_bounds_are_summed_over_classes_and_have_no_map() -> None:
    level = LevelSpec("top", 2, 2, 4, 3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        prior = RoundTrip({"latent": 4, "width": 8}, PriorSpec(level, (), CLASSES))
        prior.set_codebooks(torch.randn(4, 3))
    codes = torch.randint(4, (5, 2, 2), generator=torch.Generator().manual_seed(2))
    prior.prepare([(codes, (), torch.arange(5) % CLASSES)])
    prior.eval()
    found = code_bits([prior], (codes,), MARGINAL, None, range(5))
    noise = Noise(0, tuple(range(5)), 0)
    with torch.no_grad():
        by_class = [prior.log_prob(codes, (), torch.full((5,), value), noise=noise).nats for value in range(CLASSES)]
    expected = -(torch.stack(by_class).double() + SHARES.log()[:, None]).logsumexp(0) / LN2
    torch.testing.assert_close(found.total, expected)
    assert found.maps == (None,)
    assert not has_map(prior)


def test_a_log_probability_that_is_no_number_is_an_error_that_names_the_prior() -> None:
    priors = MIXES["pixelcnn"]("raster")
    next(priors[1].parameters()).data.fill_(math.nan)
    with pytest.raises(DivergedError, match=r"pixelcnn prior of level 'bottom'"):
        bits_of(priors)


def test_large_maps_are_scored_few_at_a_time() -> None:
    small = network(PixelCNN, 0)
    large = Unigram({}, PriorSpec(LevelSpec("bottom", 64, 64, 512, 4)))
    assert images_at_once([small]) == 256
    assert images_at_once([small, large]) * 64 * 64 * 512 * 4 <= 128 * 2**20
    few = Unigram({}, PriorSpec(LevelSpec("bottom", 64, 64, 4, 4), classes=1000))
    assert images_at_once([few]) == 256
    assert images_at_once([few], 1000) * 1000 * 64 * 64 * 8 <= 128 * 2**20


def test_nothing_global_is_drawn_from() -> None:
    before = torch.random.get_rng_state()
    bits_of(MIXES["pixelcnn"]("raster"))
    assert torch.equal(torch.random.get_rng_state(), before)
