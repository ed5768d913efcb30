"""Presets and layers: what lies over what, and what is refused on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from priors.registry import check_section
from vqgen.config import Config
from vqgen.errors import ConfigError, InputError
from vqgen.presets import (
    DEFAULTS,
    apply_sets,
    merge,
    parse_set,
    preset_names,
    preset_summary,
    read_layers,
    read_yaml,
    write_yaml,
)
from vqgen.problems import check


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # by x-transformers, on import
@pytest.mark.parametrize("name", preset_names())
def test_every_shipped_preset_fits(name: str) -> None:
    values = read_layers(name)
    assert check(Config, values)[1] == []
    assert [line for prior, section in values["priors"].items() for line in check_section(prior, section)] == []
    assert len(preset_summary(name)) > 20


def test_the_shipped_presets() -> None:
    assert {"cifar10", "images", "mnist", "shapes"} <= set(preset_names())


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(InputError, match=r"Unknown preset 'cifar'\. Did you mean 'cifar10'\? Known: celeba64, "):
        read_layers("cifar")
    with pytest.raises(InputError, match=r"No config file at 'nowhere/x\.yaml'"):
        read_layers("nowhere/x.yaml")


def test_mappings_merge_and_the_rest_is_replaced() -> None:
    lower = {"codec": {"width": 1, "strides": [8, 4]}, "seed": 1}
    assert merge(lower, {"codec": {"strides": [2]}, "data": {"flip": True}}) == {
        "codec": {"width": 1, "strides": [2]},
        "seed": 1,
        "data": {"flip": True},
    }
    assert merge(lower, {"codec": None}) == {"codec": None, "seed": 1}
    assert lower == {"codec": {"width": 1, "strides": [8, 4]}, "seed": 1}


@pytest.mark.parametrize(
    ("upper", "expected"),
    [
        ({"minutes": 2}, {"minutes": 2, "batch_size": 4}),
        ({"steps": 7}, {"steps": 7, "batch_size": 4}),
        ({"minutes": None}, {"steps": 5, "batch_size": 4, "minutes": None}),
        ({"batch_size": 8}, {"steps": 5, "batch_size": 8}),
        ({"epochs": 1, "minutes": 2}, {"epochs": 1, "minutes": 2, "batch_size": 4}),
    ],
)
def test_a_budget_replaces_the_budget_below_it(upper: dict[str, Any], expected: dict[str, Any]) -> None:
    lower = {"codec": {"training": {"steps": 5, "batch_size": 4}}}
    assert merge(lower, {"codec": {"training": upper}}) == {"codec": {"training": expected}}


def test_a_file_lies_over_the_defaults() -> None:
    assert DEFAULTS["codec"]["training"] == {"steps": 10000}


def test_bases_lie_below_and_are_found_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "sets" / "lowest.yaml", "base: shapes\nseed: 1\ncodec: {width: 7, training: {epochs: 3}}")
    write(tmp_path / "sets" / "own" / "middle.yml", "base: ../lowest.yaml\nseed: 2")
    top = write(tmp_path / "top.yaml", "base: sets/own/middle.yml\ndata: {count: 99}")
    values = read_layers(top)
    assert (values["seed"], values["data"]["count"], values["codec"]["width"]) == (2, 99, 7)
    assert values["data"]["source"] == "shapes"
    assert values["codec"]["training"]["epochs"] == 3
    assert "steps" not in values["codec"]["training"]
    assert "base" not in values
    monkeypatch.chdir("sets")
    assert read_layers(top) == values


def test_a_chain_of_bases_ends(tmp_path: Path) -> None:
    one = write(tmp_path / "one.yaml", "base: ./sub/../two.yaml")
    write(tmp_path / "sub" / "x.yaml", "{}")
    write(tmp_path / "two.yaml", "base: one.yaml")
    with pytest.raises(InputError, match=r"one\.yaml: the chain of 'base' presets never ends"):
        read_layers(one)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("base: mnits", r"x\.yaml: base: Unknown preset 'mnits'\. Did you mean 'mnist'\?"),
        ("base: other.yaml", r"x\.yaml: base: No config file at '.*other\.yaml'"),
        ("base: 3", r"x\.yaml: base: expected the name of a preset or a YAML file, got 3"),
        ("a: [", r"x\.yaml: not valid YAML"),
        ("- a", r"x\.yaml: expected a mapping of settings"),
        ("3: 4", r"x\.yaml: expected a mapping of settings"),
        ("", r"x\.yaml: expected a mapping of settings"),
        ("d: 2020-13-40", r"x\.yaml: not valid YAML"),
    ],
)
def test_a_damaged_file_is_one_line(tmp_path: Path, text: str, match: str) -> None:
    path = write(tmp_path / "x.yaml", text)
    with pytest.raises((ConfigError, InputError), match=match) as caught:
        read_layers(path)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"x\.yaml: cannot be read"):
        read_yaml(tmp_path / "x.yaml")


def test_no_part_of_saved_settings_is_taken_for_the_whole(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    settings = {"seed": 12, "data": {"source": "größe"}, "run": {"priors": ["a"], "samples": 64}}
    write_yaml(path, settings)
    assert read_yaml(path) == settings
    whole = path.read_bytes()
    for length in range(len(whole) - 1):  # but for the last line break
        path.write_bytes(whole[:length])
        with pytest.raises(ConfigError, match=r"config\.yaml"):
            read_yaml(path)
    write_yaml(path, {})
    assert read_yaml(path) == {}


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("seed=3", {"seed": 3}),
        (" codec.width =64", {"codec": {"width": 64}}),
        ("codec.strides=[8, 4]", {"codec": {"strides": [8, 4]}}),
        ("data.source=a=b", {"data": {"source": "a=b"}}),
        ("data.subset=", {"data": {"subset": None}}),
        ("data.flip=true", {"data": {"flip": True}}),
        ("priors.x.levels.top={depth: 2}", {"priors": {"x": {"levels": {"top": {"depth": 2}}}}}),
    ],
)
def test_set_takes_a_key_and_yaml(assignment: str, expected: dict[str, Any]) -> None:
    assert parse_set(assignment) == expected


@pytest.mark.parametrize("assignment", ["seed", "=3", "codec..width=3", ".a=1", "a.=1", "a=[", "a={b: c: d}"])
def test_set_refuses_what_it_cannot_read(assignment: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_set(assignment)
    assert f"--set {assignment}: " in str(caught.value)


def test_sets_apply_in_order() -> None:
    below = {"codec": {"training": {"steps": 1}}}
    sets = ["codec.training.minutes=2", "codec.training.epochs=3", "codec.width=1", "codec.width=2"]
    assert apply_sets(below, sets) == {"codec": {"training": {"epochs": 3}, "width": 2}}
