"""The discriminator's shapes and patches, and how its verdicts are weighed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from vqgen.codes import ImageSpec
from vqgen.config import CodecSection, DiscriminatorSettings
from vqgen.discriminator import PatchDiscriminator, adaptive_weight, adversarial_loss, hinge_loss
from vqgen.errors import ConfigError
from vqgen.problems import check


def made(channels: int = 3, height: int = 32, width: int = 32, **settings: Any) -> PatchDiscriminator:
    return PatchDiscriminator(DiscriminatorSettings(**{"width": 4, **settings}), ImageSpec(channels, height, width))


@pytest.mark.parametrize(
    ("size", "layers", "expected"), [((16, 16), 2, (4, 4)), ((17, 41), 2, (4, 10)), ((16, 24), 4, (1, 1))]
)
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_any_size_and_channels(channels: int, size: tuple[int, int], layers: int, expected: tuple[int, int]) -> None:
    verdicts = made(channels, *size, layers=layers)(torch.randn(2, channels, *size))
    assert verdicts.shape == (2, 1, *expected)


@pytest.mark.parametrize(("layers", "patch"), [(1, 12), (2, 26), (3, 54)])
def test_each_verdict_is_of_one_patch(layers: int, patch: int) -> None:
    image = torch.randn(1, 3, 96, 96, requires_grad=True)
    discriminator = made(3, 96, 96, layers=layers)
    for index, layer in enumerate(discriminator.layers):
        if isinstance(layer, nn.GroupNorm):  # what it adds is the contrast of the whole image
            discriminator.layers[index] = nn.Identity()
    verdicts = discriminator(image)
    middle = verdicts.shape[-1] // 2
    verdicts[0, 0, middle, middle].backward()
    assert image.grad is not None
    rows, columns = image.grad[0].abs().sum(0).nonzero(as_tuple=True)
    assert (rows.max() - rows.min() + 1, columns.max() - columns.min() + 1) == (patch, patch)


def test_a_verdict_depends_on_one_image_alone() -> None:
    discriminator = made().eval()
    images = torch.randn(4, 3, 32, 32)
    together = discriminator(images)
    alone = torch.cat([discriminator(image[None]) for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


def test_images_too_small_for_its_layers() -> None:
    with pytest.raises(ConfigError, match=r"discriminator\.layers: 5 halvings need .* 32x32 pixels, got 16x40"):
        made(3, 16, 40, layers=5)


def test_losses_by_hand() -> None:
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 1.0])
    assert hinge_loss(real, fake).item() == pytest.approx(((0 + 0.5 + 2) / 3 + (0 + 1 + 2) / 3) / 2)
    assert adversarial_loss(fake).item() == pytest.approx(2 / 3)


def test_the_adaptive_weight_makes_the_pulls_equal() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 3)
    x = torch.randn(8, 4)
    reconstruction, adversarial = (layer(x) - 1).square().mean(), 1e-3 * layer(x).sin().mean()
    weight = adaptive_weight(reconstruction, adversarial, layer.weight)
    pulls = [torch.autograd.grad(loss, layer.weight)[0].norm().item() for loss in (reconstruction, adversarial)]
    assert weight.item() * pulls[1] == pytest.approx(pulls[0], rel=0.02)
    assert not weight.requires_grad
    assert layer.weight.grad is None


def test_the_adaptive_weight_ends_where_the_verdict_says_nothing() -> None:
    layer = nn.Linear(4, 3)
    out = layer(torch.randn(8, 4))
    assert adaptive_weight(out.square().sum(), 0 * out.sum(), layer.weight).item() == 1e4


BUDGET = {"steps": 10}


def section(**values: Any) -> tuple[CodecSection | None, list[str]]:
    return check(CodecSection, {"training": BUDGET, **values}, "codec")


def test_players_of_the_settings() -> None:
    own = {**BUDGET, "players": {"discriminator": {"learning_rate": 1e-4}}}
    alone, _ = section()
    both, problems = section(discriminator={"weight": 0.1}, training=own)
    assert alone is not None
    assert alone.players == ("model",)
    assert both is not None, problems
    assert both.players == ("model", "discriminator")
    assert "discriminator" not in both.architecture.model_dump()
    assert section(training=own)[1] == ["codec.training.players.discriminator: unknown player. Known: model."]


def test_problems_of_the_settings_are_named_by_their_keys() -> None:
    _, problems = section(
        discriminator={"wieght": 1, "start": 1.0}, training={**BUDGET, "accumulate": 2, "players": {"x": {}}}
    )
    assert [line.partition(":")[0] for line in problems] == [
        "codec.discriminator.start",
        "codec.discriminator.wieght",
        "codec.training.players.x",
        "codec.training.accumulate",
    ]
    assert "Did you mean 'weight'" in problems[1]
    assert section(discriminator=True)[1] == ["codec.discriminator: expected a mapping, got True"]
