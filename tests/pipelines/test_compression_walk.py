"""Codes along a line and back: random priors of every kind, one to three levels, with and without labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from pipelines.compression.coder import OutOfStepError, Receiver, Sender
from pipelines.compression.format import Checks
from pipelines.compression.labels import fewest_bits, knows_no_label
from pipelines.compression.walk import Images, Walk, WrongCodesError, steady_arithmetic
from priors import registry
from priors.base import Prior, PriorSpec
from priors.check_cases import make_case
from vqgen.codes import LevelSpec

LEVELS = {
    1: (LevelSpec("top", 3, 4, 5, 3),),
    2: (LevelSpec("top", 2, 2, 4, 2), LevelSpec("bottom", 4, 4, 7, 3)),
    3: (LevelSpec("top", 1, 2, 3, 2), LevelSpec("middle", 2, 4, 1, 2), LevelSpec("bottom", 4, 8, 6, 2)),
}
SMALL: dict[str, dict[str, Any]] = {
    "pixelcnn": {"width": 8, "blocks": 2},
    "pixelsnail": {"width": 8, "blocks": 1, "heads": 1},
    "transformer": {"dim": 16, "depth": 1, "heads": 2},
    "unigram": {},
    "uniform": {},
}


def random_priors(names: Sequence[str], levels: int, classes: int, **settings: Any) -> list[Prior]:
    """An untrained prior of each level with weights that are not those of the start."""
    made = []
    for number, (name, target) in enumerate(zip(names, LEVELS[levels], strict=True)):
        labels = tuple(f"class {i}" for i in range(classes))
        spec = PriorSpec(target, LEVELS[levels][:number], classes, labels, "codec")
        config = {**SMALL[name], **(settings if name not in ("unigram", "uniform") else {})}
        made.append(make_case(registry.get(name), config, spec).prior)
    return made


def random_images(levels: int, classes: int, count: int, seed: int = 3) -> Images:
    generator = torch.Generator().manual_seed(seed)
    codes = tuple(
        torch.randint(spec.codebook_size, (count, spec.height, spec.width), generator=generator)
        for spec in LEVELS[levels]
    )
    return Images(codes, torch.randint(classes, (count,), generator=generator) if classes else None)


def pieces(images: Images, batch: int) -> list[Images]:
    starts = range(0, len(images.codes[0]), batch)
    return [
        Images(
            tuple(level[start : start + batch] for level in images.codes),
            None if images.label is None else images.label[start : start + batch],
        )
        for start in starts
    ]


def sent(priors: list[Prior], images: Images, batch: int, classes: int) -> tuple[Sender, Walk]:
    sender = Sender()
    walk = Walk(priors, sender, batch, classes)
    with steady_arithmetic():
        for part in pieces(images, batch):
            walk.images(len(part.codes[0]), part, lambda share: None)
    return sender, walk


def received(priors: list[Prior], words: Any, count: int, batch: int, classes: int) -> tuple[list[Images], Walk]:
    receiver = Receiver(words)
    walk = Walk(priors, receiver, batch, classes)
    with steady_arithmetic():
        found = [walk.images(min(batch, count - start), None, lambda share: None) for start in range(0, count, batch)]
    assert receiver.ended
    return found, walk


def check_round_trip(priors: list[Prior], levels: int, classes: int, count: int, batch: int) -> Sender:
    images = random_images(levels, classes, count)
    sender, walk = sent(priors, images, batch, classes)
    found, other = received(priors, sender.words(), count, batch, classes)
    for level, codes in enumerate(images.codes):
        assert torch.equal(torch.cat([part.codes[level] for part in found]), codes)
    if images.label is not None:
        assert torch.equal(torch.cat([part.label for part in found if part.label is not None]), images.label)
    assert walk.checks.digest == other.checks.digest
    return sender


@pytest.mark.parametrize("name", sorted(SMALL))
@pytest.mark.parametrize(("levels", "classes"), [(1, 0), (1, 3), (2, 0), (2, 3), (3, 2)])
def test_every_prior_gives_back_what_it_took(name: str, levels: int, classes: int) -> None:
    priors = random_priors([name] * levels, levels, classes)
    sender = check_round_trip(priors, levels, classes, count=7, batch=3)
    images = random_images(levels, classes, 7)
    nats = sum(
        float(prior.log_prob(images.codes[i], images.codes[:i], images.label).nats.detach().sum())
        for i, prior in enumerate(priors)
    )
    assert sender.prior_bits == pytest.approx(-nats / np.log(2), rel=1e-5)


@pytest.mark.parametrize("scan", ["raster", "column", "snake"])
@pytest.mark.parametrize("name", ["pixelcnn", "pixelsnail", "transformer"])
def test_every_scan_order_gives_back_what_it_took(name: str, scan: str) -> None:
    check_round_trip(random_priors([name] * 2, 2, 2, scan=scan), 2, 2, count=4, batch=4)


@pytest.mark.parametrize(("count", "batch"), [(1, 1), (1, 8), (8, 8), (9, 8), (16, 5)])
def test_any_number_of_images_and_any_batch(count: int, batch: int) -> None:
    check_round_trip(random_priors(["transformer", "unigram"], 2, 3), 2, 3, count, batch)


def test_labels_need_not_be_passed_on_where_priors_do_without() -> None:
    priors = random_priors(["pixelcnn", "unigram"], 2, 3, label_dropout=0.5)
    codes = random_images(2, 0, 6)
    sender, _ = sent(priors, codes, 4, 0)
    found, _ = received(priors, sender.words(), 6, 4, 0)
    assert torch.equal(torch.cat([part.codes[1] for part in found]), codes.codes[1])
    assert found[0].label is None


def test_other_weights_are_noticed_and_never_give_other_codes() -> None:
    """What a platform that rounds otherwise looks like: the same words, slightly other probabilities."""
    images = random_images(2, 3, 40)
    sender, walk = sent(random_priors(["pixelcnn"] * 2, 2, 3), images, 8, 3)
    words = sender.words()
    noticed = 0
    for seed in range(20):
        priors = random_priors(["pixelcnn"] * 2, 2, 3)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in priors[seed % 2].parameters():
                parameter.add_(torch.randn_like(parameter), alpha=10.0 ** -(1 + seed % 4))
        try:
            found, other = received(priors, words, 40, 8, 3)
        except (WrongCodesError, OutOfStepError, AssertionError):
            noticed += 1
            continue
        same = torch.equal(torch.cat([part.codes[1] for part in found]), images.codes[1])
        assert same == (walk.checks.digest == other.checks.digest)
        assert same
    assert noticed >= 10


def test_the_image_whose_checksum_fails_is_named() -> None:
    priors = random_priors(["uniform"], 1, 0)
    images = random_images(1, 0, 30)
    sender, _ = sent(priors, images, 30, 0)
    receiver = Receiver(sender.words())
    walk = Walk(priors, receiver, 30, 0)
    original = walk.checks.add
    seen = []

    def add(*parts: Any) -> int:
        seen.append(len(seen))
        if len(seen) == 12:  # as if the twelfth image had another code
            parts = tuple(part + 1 for part in parts)
        return original(*parts)

    walk.checks.add = add  # type: ignore[method-assign]
    with pytest.raises(WrongCodesError) as error:
        walk.images(30, None, lambda share: None)
    assert 11 <= error.value.row < 29


def test_a_checksum_covers_every_image_before_it() -> None:
    maps = np.random.default_rng(0).integers(0, 9, (50, 4, 4))
    digests = []
    for changed in (None, 0, 20, 49):
        checks = Checks()
        bits = []
        for row, codes in enumerate(maps):
            bits.append(checks.add(codes + (row == changed)))
        digests.append((checks.digest, bits))
    assert len({digest for digest, _ in digests}) == 4
    assert digests[1][1] != digests[0][1]
    assert digests[2][1][:20] == digests[0][1][:20]
    assert digests[2][1][20:] != digests[0][1][20:]


def test_the_label_of_fewest_bits_is_that() -> None:
    priors = random_priors(["pixelcnn", "transformer"], 2, 3)
    codes = random_images(2, 0, 10).codes
    chosen = fewest_bits(priors, codes)

    def bits(label: torch.Tensor) -> torch.Tensor:
        return -sum(p.log_prob(codes[i], codes[:i], label).nats.detach() for i, p in enumerate(priors))  # type: ignore[misc]

    best = bits(chosen)
    for value in range(3):
        assert (best <= bits(torch.full((10,), value)) + 1e-9).all()


def test_which_priors_know_no_label() -> None:
    assert all(map(knows_no_label, random_priors(["pixelcnn", "unigram"], 2, 0)))
    assert [knows_no_label(p) for p in random_priors(["pixelcnn", "unigram"], 2, 3)] == [False, True]
    assert knows_no_label(random_priors(["pixelcnn"], 1, 3, label_dropout=0.1)[0])


def test_arithmetic_is_steady_inside_and_as_it_was_after() -> None:
    torch.set_num_threads(2)
    torch.set_float32_matmul_precision("medium")
    state = torch.get_rng_state()
    inside = []

    def work() -> None:
        with steady_arithmetic():
            inside.append((torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.is_grad_enabled()))
            raise ZeroDivisionError

    try:
        with pytest.raises(ZeroDivisionError):
            work()
        assert inside == [(1, "highest", False)]
        assert (torch.get_num_threads(), torch.get_float32_matmul_precision()) == (2, "medium")
        assert torch.is_grad_enabled()
    finally:
        torch.set_num_threads(1)
        torch.set_float32_matmul_precision("highest")
    priors = random_priors(["transformer"], 1, 0)
    torch.set_rng_state(state)
    sent(priors, random_images(1, 0, 3), 2, 0)
    assert torch.equal(torch.get_rng_state(), state)
