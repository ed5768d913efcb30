"""The presets of published recipes: their figures, their models at full size, and the whole pipeline on a stand-in.

At full size a model is built on the ``meta`` device, which has shapes and no numbers. What is trained for a few steps
is the recipe on pictures of its size and kind; the largest are narrowed, since a step of theirs takes minutes here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines import cli
from priors import registry
from priors.base import PriorSpec
from vqgen import shapes
from vqgen.codec import HierarchicalVQVAE
from vqgen.codes import ImageSpec
from vqgen.config import Config, TrainingSettings
from vqgen.presets import preset_summary, read_layers
from vqgen.problems import build

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # by x-transformers, on import


class Recipe(NamedTuple):
    """What the models of a preset are at full size."""

    image: ImageSpec
    maps: tuple[tuple[int, int], ...]
    """Side of each map and its number of codes, coarse to fine."""
    codec: float
    """Parameters of the codec, in millions."""
    priors: Mapping[tuple[str, str], float]
    """Parameters of each prior and level, in millions."""
    classes: int = 0
    needs_data: bool = False


RECIPES = {
    "lartpc64": Recipe(ImageSpec(1, 64, 64), ((16, 256),), 0.024, {("pixelcnn", "top"): 13.3}, 3, True),
    "imagenet128": Recipe(ImageSpec(3, 128, 128), ((32, 512),), 4.4, {("pixelcnn", "top"): 134.0}, 1000),
    "imagenet256": Recipe(
        ImageSpec(3, 256, 256),
        ((32, 512), (64, 512)),
        1.7,
        {("pixelsnail", "top"): 604.0, ("pixelsnail", "bottom"): 320.0},
        1000,
    ),
    "ffhq1024": Recipe(
        ImageSpec(3, 1024, 1024),
        ((32, 512), (64, 512), (128, 512)),
        3.3,
        {("pixelsnail", "top"): 507.0, ("pixelsnail", "middle"): 292.0, ("pixelsnail", "bottom"): 182.0},
        0,
        True,
    ),
    "cifar10-roundtrip": Recipe(
        ImageSpec(3, 32, 32), ((8, 256),), 1.24, {("roundtrip", "top"): 7.3, ("pixelcnn", "top"): 3.7}, 10
    ),
    "mnist-pixelcnn": Recipe(ImageSpec(1, 28, 28), ((7, 8),), 0.155, {("pixelcnn", "top"): 0.36}, 10),
    "cifar10-pixelcnn": Recipe(ImageSpec(3, 32, 32), ((8, 8),), 0.66, {("pixelcnn", "top"): 0.36}, 10),
    "celeba64": Recipe(ImageSpec(3, 64, 64), ((16, 512),), 0.7, {("pixelcnn", "top"): 3.8}),
}

FIGURES: dict[str, dict[str, Any]] = {
    "lartpc64": {
        "codec.filters": [16, 32, 8],
        "codec.code_dim": 8,
        "codec.commitment": 1,
        "codec.training.batch_size": 512,
        "codec.training.epochs": 50,
        "codec.training.learning_rate": 3e-4,
        "priors.pixelcnn.blocks": 6,
        "priors.pixelcnn.width": 256,
        "priors.pixelcnn.training.batch_size": 512,
        "priors.pixelcnn.training.epochs": 50,
        "priors.pixelcnn.training.learning_rate": 1e-3,
    },
    "imagenet128": {"codec.commitment": 0.25, "codec.training.steps": 250_000},
    "imagenet256": {
        "codec.code_dim": 64,
        "codec.width": 128,
        "codec.residual_width": 64,
        "codec.training.steps": 2_207_444,
        "priors.pixelsnail.levels.top.attention": True,
        "priors.pixelsnail.levels.bottom.attention": False,
        "priors.pixelsnail.levels.top.training.steps": 1_600_000,
        "priors.pixelsnail.levels.bottom.training.steps": 754_000,
    },
    "ffhq1024": {"codec.strides": [32, 16, 8], "codec.training.steps": 304_741},
    "cifar10-roundtrip": {
        "codec.code_dim": 512,
        "codec.commitment": 0.25,
        "codec.training.batch_size": 128,
        "codec.training.learning_rate": 1e-3,
        "codec.training.epochs": 200,
        "priors.roundtrip.latent": 128,
        "priors.roundtrip.training.learning_rate": 2e-4,
        "priors.roundtrip.training.batch_size": 2048,
        "priors.roundtrip.training.epochs": 60,
        "priors.pixelcnn.training.epochs": 20,
    },
    **{
        name: {
            "codec.code_dim": dim,
            "codec.width": width,
            "codec.residual_blocks": 2,
            "codec.commitment": 0.25,
            "codec.training.batch_size": 100,
            "codec.training.steps": 20_000,
            "codec.training.learning_rate": 3e-4,
            "priors.pixelcnn.blocks": 12,
            "priors.pixelcnn.width": 32,
            "priors.pixelcnn.training.optimizer": "rmsprop",
            "priors.pixelcnn.training.learning_rate": 1e-3,
            "priors.pixelcnn.training.clip": 1.0,
            "priors.pixelcnn.training.steps": 30_000,
        }
        for name, dim, width in (("mnist-pixelcnn", 16, 64), ("cifar10-pixelcnn", 64, 128))
    },
    "celeba64": {
        "codec.width": 128,
        "codec.residual_width": 32,
        "codec.residual_blocks": 2,
        "codec.code_dim": 64,
        "codec.commitment": 1.25,
        "codec.training.batch_size": 256,
        "codec.training.learning_rate": 1e-3,
    },
}

NARROW = {
    "lartpc64": ("priors.pixelcnn.width=32",),
    "imagenet128": ("codec.width=16", "codec.residual_width=8", "priors.pixelcnn.width=16", "priors.pixelcnn.blocks=2"),
    "imagenet256": (
        *("codec.width=16", "codec.residual_width=8", "priors.pixelsnail.width=64"),
        *("priors.pixelsnail.blocks=1", "priors.pixelsnail.layers=1"),
        *(f"priors.pixelsnail.levels.{level}.residual_width=8" for level in ("top", "bottom")),
        *("priors.pixelsnail.levels.top.output_blocks=1", "priors.pixelsnail.levels.bottom.condition_blocks=1"),
    ),
    "ffhq1024": (
        *(
            "codec.width=8",
            "codec.residual_width=4",
            "priors.pixelsnail.width=64",
            "priors.pixelsnail.condition_blocks=1",
        ),
        *(f"priors.pixelsnail.levels.{level}.residual_width=8" for level in ("top", "middle", "bottom")),
        *(f"priors.pixelsnail.levels.{level}.layers=1" for level in ("top", "middle", "bottom")),
        "priors.pixelsnail.levels.top.blocks=1",
    ),
    "cifar10-roundtrip": ("priors.roundtrip.width=64", "priors.pixelcnn.width=32", "priors.pixelcnn.blocks=2"),
    "mnist-pixelcnn": (),
    "cifar10-pixelcnn": (),
    "celeba64": ("priors.pixelcnn.width=32", "priors.pixelcnn.blocks=2"),
}
"""Settings that make a few steps a matter of seconds; nothing of what makes the recipe is changed."""

SLOW = ("imagenet128", "imagenet256", "ffhq1024")


def settings_of(name: str) -> Config:
    values = read_layers(name)
    if RECIPES[name].needs_data:
        values["data"]["source"] = "somewhere/"
    return build(Config, values, name)


def parameters(model: torch.nn.Module) -> float:
    return sum(p.numel() for p in model.parameters()) / 1e6


@pytest.mark.parametrize("name", RECIPES)
def test_the_figures_are_the_recipe_s(name: str) -> None:
    values = read_layers(name)
    for key, expected in FIGURES[name].items():
        found: Any = values
        for part in key.split("."):
            found = found[part]
        assert found == expected, key
    config = settings_of(name)
    assert config.codec.level_dropout == 0
    assert config.codec.per_level("codebook_size") == tuple(size for _, size in RECIPES[name].maps)
    assert "VQ-VAE" in preset_summary(name) or "recipe" in preset_summary(name) or "report" in preset_summary(name)


@pytest.mark.parametrize("name", RECIPES)
def test_every_model_builds_at_full_size(name: str) -> None:
    config, recipe = settings_of(name), RECIPES[name]
    with torch.device("meta"):
        codec = HierarchicalVQVAE(config.codec.architecture, recipe.image)
    assert [(level.height, level.codebook_size) for level in codec.levels] == list(recipe.maps)
    assert parameters(codec) == pytest.approx(recipe.codec, rel=0.15)
    classes = tuple(map(str, range(recipe.classes)))
    built = {}
    for choice in config.run.priors:
        for place, level in enumerate(codec.levels):
            prior = choice if isinstance(choice, str) else choice[level.name]
            settings = registry.prior_settings(prior, config.priors[prior], level.name)
            spec = PriorSpec(level, codec.levels[:place], len(classes), classes)
            with torch.device("meta"):
                built[prior, level.name] = parameters(registry.get(prior)(settings.config, spec))
    assert built == pytest.approx(recipe.priors, rel=0.15)


@pytest.mark.parametrize("name", ["lartpc64", "mnist-pixelcnn", "cifar10-pixelcnn"])
def test_a_plain_recipe_has_none_of_our_defaults(name: str) -> None:
    """Constant rate, no warm-up, no averaged weights; ``null`` in a preset outlives the defaults of the prior."""
    training = registry.prior_settings("pixelcnn", read_layers(name)["priors"]["pixelcnn"], "top").training
    assert isinstance(training, TrainingSettings)
    assert (training.schedule, training.warmup, training.weight_ema) == ("constant", 0, None)
    assert training.clip == (None if name == "lartpc64" else 1.0)


@pytest.mark.parametrize("name", [*(name for name, recipe in RECIPES.items() if recipe.needs_data), "images"])
@pytest.mark.parametrize("command", ["run", "train-codes"])
def test_a_preset_without_images_asks_for_them(
    name: str, command: str, fails: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = fails(command, "--config", name)
    assert said.count("\n") == 1
    assert f"'{name}' has no images of its own" in said
    assert "--data" in said
    assert list(tmp_path.iterdir()) == []


def stand_in(name: str, folder: Path) -> Path:
    """Pictures of the recipe's size and channels: PNGs in class folders for the crops, else a numpy file."""
    image, classes = RECIPES[name].image, RECIPES[name].classes
    if name == "lartpc64":
        return tracks(folder / "crops")
    count = 12 if image.height > 256 else 30
    pictures = shapes.render(range(count), (image.height, image.width)).transpose(0, 2, 3, 1)
    if image.channels == 1:
        pictures = pictures[..., 0]
    if not classes:
        np.save(folder / "pictures.npy", pictures)
        return folder / "pictures.npy"
    np.savez(folder / "pictures.npz", images=pictures, labels=np.arange(count) % 3)
    return folder / "pictures.npz"


def tracks(folder: Path) -> Path:
    """Grey pictures that are nearly all zero, with a few bright lines, in a folder for each kind of particle."""
    generator = np.random.default_rng(0)
    for kind in ("electron", "muon", "proton"):
        (folder / kind).mkdir(parents=True)
        for number in range(12):
            pixels = np.zeros((64, 64), dtype=np.uint8)
            start, slope = generator.integers(10, 50), generator.uniform(-0.5, 0.5)
            columns = np.arange(generator.integers(15, 60))
            pixels[(start + slope * columns).astype(int).clip(0, 63), columns] = generator.integers(60, 255)
            Image.fromarray(pixels).save(folder / kind / f"{number}.png")
    return folder


def arguments(name: str) -> list[str]:
    """Settings for a few steps of a narrowed model."""
    few = ["codec.training.steps=3", "codec.training.batch_size=4", "codec.training.evaluate_images=2"]
    return [part for setting in (*few, *NARROW[name]) for part in ("--set", setting)]


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in SLOW])
def test_a_recipe_runs_from_pictures_to_the_report(name: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    sets = ["run.samples=4"]
    for prior in read_layers(name)["run"]["priors"]:
        group = f"priors.{prior}.training"
        sets += [f"{group}.steps=3", f"{group}.batch_size=4", f"{group}.evaluate_images=2"]
    few = [part for setting in sets for part in ("--set", setting)]
    data = ["--data", str(stand_in(name, tmp_path))]
    assert cli.call(["run", "--config", name, "--run", str(run), *data, *arguments(name), *few]) == 0
    rows = json.loads((run / "compare/compare.json").read_text())["rows"]
    for prior in read_layers(name)["run"]["priors"]:
        row = next(row for row in rows if row["prior"] == prior and row["level"] == "all")
        assert row["bits_per_code"] is not None
        assert row["likelihood"] == ("bound" if prior == "roundtrip" else "exact")
        assert (row["effective_samples"] is not None) == (prior == "roundtrip")
        assert row["train_steps"] == 3
    image = RECIPES[name].image
    with Image.open(run / "samples/best/images/0.png") as picture:
        assert picture.size == (image.width, image.height)
        assert picture.mode == ("L" if image.channels == 1 else "RGB")
    assert (run / "compare/four_way.png").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_a_large_recipe_trains_and_samples(name: str, tmp_path: Path) -> None:
    run, data = str(tmp_path / "run"), str(stand_in(name, tmp_path))
    assert cli.call(["train-codes", "--config", name, "--run", run, "--data", data, *arguments(name)]) == 0
    prior = read_layers(name)["run"]["priors"][0]
    few = ["training.steps=2", "training.batch_size=1", "training.evaluate_images=1"]
    sets = [part for setting in few for part in ("--set", setting)]
    assert cli.call(["train-prior", "--run", run, "--prior", prior, *sets]) == 0
    assert cli.call(["sample", "--run", run, "--levels", "1", "-n", "2", "--out", "few"]) == 0
    with Image.open(Path(run) / "samples/few/images/1.png") as picture:
        assert picture.size == (RECIPES[name].image.width, RECIPES[name].image.height)
