"""Settings: what is refused, and in which words."""

from __future__ import annotations

import math
from typing import Annotated, Any

import pytest
from pydantic import Field, ValidationError

from vqgen.config import Config, PlayerSettings, Settings, TrainingSettings, player_problems
from vqgen.errors import ConfigError
from vqgen.problems import build, check

ONE_PER_LEVEL = "expected a whole number of at least 1, or one per level"


def problems(**settings: Any) -> list[str]:
    """Lines for settings of a run whose codec has a budget, unless ``codec`` gives another."""
    codec = {"training": {"steps": 1}, **settings.pop("codec", {})}
    return check(Config, {"codec": codec, **settings})[1]


def test_the_defaults_are_a_whole_run() -> None:
    config = build(Config, {"codec": {"training": {"steps": 1}}})
    assert config.codec.per_level("codebook_size") == (512, 512)
    assert "training" not in config.codec.architecture.model_dump()
    assert build(Config, config.model_dump(mode="json")) == config


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        TrainingSettings(steps=1).steps = 2  # type: ignore[misc]


def test_all_problems_come_at_once_with_their_keys_and_the_nearest_name() -> None:
    found = problems(
        codec={"widht": 3, "strides": [8, 3], "training": {"steps": 1, "learning_rat": 1, "batch_size": 0}},
        data={"source": 3, "imagesize": 8},
        sed=1,
    )
    assert found == [
        "data.source: input should be a valid string, got 3",
        "data.imagesize: unknown key. Did you mean 'image_size'?",
        "codec.strides: must be powers of two from 2 up, got [8, 3]",
        "codec.training.batch_size: input should be greater than or equal to 1, got 0",
        "codec.training.learning_rat: unknown key. Did you mean 'learning_rate'?",
        "codec.widht: unknown key. Did you mean 'width'?",
        "sed: unknown key. Did you mean 'seed'?",
    ]
    with pytest.raises(ConfigError, match=r"^2 bad settings:\n  training\.a: .*\n  training\.b: "):
        build(Config, {"codec": {"training": {"steps": 1}}, "a": 1, "b": 2}, "training")
    with pytest.raises(ConfigError, match=r"^Bad setting: a: unknown key\. Known: seed, data, codec, priors, run\.$"):
        build(Config, {"codec": {"training": {"steps": 1}}, "a": 1})


def test_unknown_keys_of_a_player_name_its_settings() -> None:
    training = {"steps": 1, "players": {"model": {"learning_rat": 1}}}
    [problem] = problems(codec={"training": training})
    assert problem == "codec.training.players.model.learning_rat: unknown key. Did you mean 'learning_rate'?"


@pytest.mark.parametrize(
    "value", ["x", 0, -1, 2.5, [1, "x"], [1, 0], {"top": 3}, math.nan, math.inf, [1, math.nan], None]
)
@pytest.mark.parametrize("key", ["codebook_size", "code_dim"])
def test_a_number_or_one_per_level_is_one_line(key: str, value: Any) -> None:
    [problem] = problems(codec={key: value})
    assert problem.startswith(f"codec.{key}: {ONE_PER_LEVEL}")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("commitment", -0.1, "expected a number of at least 0, or one per level, got -0.1"),
        ("commitment", [0.1, math.nan], "expected a number of at least 0, or one per level, got [0.1, nan]"),
        ("commitment", [1, 2, 3], "must be one number or 2, one per level, got [1.0, 2.0, 3.0]"),
        ("codebook_size", [], "must be one number or 2, one per level, got []"),
        ("strides", 8, "expected a list of whole numbers, such as [8, 4], got 8"),
        ("strides", ["a", "b"], "expected a list of whole numbers, such as [8, 4], got ['a', 'b']"),
        ("strides", [], "must name 1 to 3 levels, got 0"),
        ("strides", [16, 8, 4, 2], "must name 1 to 3 levels, got 4"),
        ("strides", [4, 8], "must fall from coarse to fine, such as [8, 4], got [4, 8]"),
        ("strides", [1], "must be powers of two from 2 up, got [1]"),
        ("filters", [0, "x"], "expected a list of whole numbers of at least 1, got [0, 'x']"),
        ("filters", [8], "must be at least 2 numbers for a stride of 4, got [8]"),
        ("decay", math.nan, "input should be a finite number, got nan"),
        ("revival", math.inf, "input should be a finite number, got inf"),
    ],
)
def test_the_codec_refuses(key: str, value: Any, said: str) -> None:
    assert problems(codec={key: value}) == [f"codec.{key}: {said}"]


@pytest.mark.parametrize("value", [[8], 8, [8, 16]])
def test_one_value_serves_every_level(value: Any) -> None:
    config = build(Config, {"codec": {"codebook_size": value, "training": {"steps": 1}}})
    assert config.codec.per_level("codebook_size") == ((8, 16) if value == [8, 16] else (8, 8))


@pytest.mark.parametrize("key", ["strides", "codebook_size", "code_dim", "commitment", "width", "decay"])
@pytest.mark.parametrize("many", [False, True])
def test_a_boolean_is_no_number(key: str, many: bool) -> None:
    value = [True, True] if many else True
    assert problems(codec={key: value}) == [f"codec.{key}: true and false are not numbers, got {value}"]


def test_a_boolean_stays_one_where_it_belongs() -> None:
    assert problems(data={"flip": True, "labels": False}) == []
    for key, value in (("image_size", True), ("image_size", [True, 8]), ("channels", True), ("limit", True)):
        assert problems(data={key: value}) == [f"data.{key}: true and false are not numbers, got {value}"]


@pytest.mark.parametrize("value", ["big", 0, [8], [8, 8, 8], [8, 0], math.nan])
def test_an_image_size_is_one_line(value: Any) -> None:
    [problem] = problems(data={"image_size": value})
    assert problem.startswith("data.image_size: expected a whole number of at least 1, or two: height and width, got ")


@pytest.mark.parametrize("key", ["epochs", "minutes", "learning_rate", "weight_decay", "clip", "steps"])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_numbers_of_a_training_are_finite(key: str, value: float) -> None:
    budget = {} if key in ("epochs", "minutes", "steps") else {"steps": 1}
    found = problems(codec={"training": {key: value, **budget}})
    assert found == [f"codec.training.{key}: input should be a finite number, got {value}"]


@pytest.mark.parametrize("betas", [[0.9, 1.0], [-0.1, 0.9], [1, 2], [0.9], 0.9, ["a", "b"], [0.9, math.nan]])
def test_betas_are_two_shares(betas: Any) -> None:
    [problem] = problems(codec={"training": {"steps": 1, "betas": betas}})
    assert problem.startswith("codec.training.betas: expected two numbers from 0 up to but below 1, such as ")
    assert TrainingSettings(steps=1, betas=(0.0, 0.5), players={"model": PlayerSettings(betas=(0.5, 0.0))}).steps == 1


@pytest.mark.parametrize(
    ("budget", "got"), [({}, "none"), ({"steps": 1, "minutes": 2}, "steps and minutes"), ({"steps": None}, "none")]
)
def test_a_training_has_one_budget(budget: dict[str, Any], got: str) -> None:
    assert problems(codec={"training": budget}) == [
        f"codec.training: needs exactly one of steps, epochs and minutes, got {got}"
    ]


def test_the_codec_has_one_player() -> None:
    players: dict[str, Any] = {"model": {"clip": 1}, "modle": {}, "critic": {}}
    assert problems(codec={"training": {"steps": 1, "players": players}}) == [
        "codec.training.players.modle: unknown player. Did you mean 'model'?",
        "codec.training.players.critic: unknown player. Known: model.",
    ]


def test_several_players_do_not_accumulate() -> None:
    assert player_problems({"accumulate": 2}, ("model",)) == []
    [problem] = player_problems({"accumulate": 2}, ("maps", "critic"), "priors.roundtrip.training")
    assert problem.startswith("priors.roundtrip.training.accumulate: must be 1 for a model with the players maps and")


def test_a_group_is_a_mapping() -> None:
    assert problems(data=3, priors={"pixelcnn": 3}, run={"priors": ["pixelcnn", 4, {"top": 3}]}) == [
        "data: expected a mapping, got 3",
        "priors.pixelcnn: expected a mapping, got 3",
        "run.priors.1: expected the name of a prior, or a mapping from level to name, got 4",
        "run.priors.2: expected the name of a prior, or a mapping from level to name",
    ]


class Inner(Settings):
    int: Annotated[float, Field(gt=0)] = 1
    """A key that is named like a type."""


class Outer(Settings):
    inner: Inner | None = None
    several: tuple[Inner, ...] = ()
    either: float | list[str] = 1
    flag: bool | int = False


def test_settings_of_others_get_one_line_per_key_too() -> None:
    values = {"inner": {"int": -1}, "several": [{}, {"itn": 1}], "either": {"x": 1}, "flag": True}
    assert check(Outer, values, "priors.other")[1] == [
        "priors.other.inner.int: input should be greater than 0, got -1",
        "priors.other.several.1.itn: unknown key. Did you mean 'int'?",
        "priors.other.either: input should be a valid number or input should be a valid list",
    ]
