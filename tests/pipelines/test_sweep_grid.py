"""What a grid means: values, cells, names, and everything that is refused before the first cell trains."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines import cli
from pipelines.settings import new_run_settings
from pipelines.sweep_grid import cell_name, make_plan, read_axes, short_keys, split_values, text_of
from vqgen.errors import ConfigError, InputError
from vqgen.problems import build
from vqgen.run_folder import plain_name

PAGE = Path(__file__).resolve().parents[2] / "docs" / "sweep.md"
HOSTILE = [
    "../../etc/passwd",
    "a/b\\c:d",
    "x" * 500,
    ".",
    "..",
    "",
    " ",
    "-",
    "-rf",
    "con\x00trol\n\x1b[31m",
    "$(reboot)",
    "*?[a]",
    "été",
    "名前",
    "=,=",
    "a+b",
    "NUL",
    True,
    None,
    [8],
    8,
    [8, 4],
    [8, [4]],
    ["8+4"],
    {"steps": 5},
    {},
    [],
    -1,
    1e300,
    2**70,
]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("0.25,0.75", ["0.25", "0.75"]),
        ("[0.25,1],0.5", ["[0.25,1]", "0.5"]),
        ("{a: 1, b: [2,3]},null", ["{a: 1, b: [2,3]}", "null"]),
        ("'a,b',\"c,d\"", ["'a,b'", '"c,d"']),
        ("['a]',2],3", ["['a]',2]", "3"]),
        ("bob's,ann's", ["bob's", "ann's"]),
        ("1", ["1"]),
        ("1,", ["1", ""]),
    ],
)
def test_values_are_split_at_commas_outside_brackets_and_quotes(text: str, parts: list[str]) -> None:
    assert split_values(text) == parts


@pytest.mark.parametrize("text", ["[1,2", "1]", "[1}", "{a: [1}", "'a,b", "]1["])
def test_brackets_that_do_not_close_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="do not close"):
        split_values(text)


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("codec.commitment", "expected KEY=VALUE"),
        ("=1,2", "expected KEY=VALUE"),
        ("codec..commitment=1", "expected KEY=VALUE"),
        ("codec.commitment=", "a value is empty"),
        ("codec.commitment=1,,2", "a value is empty"),
        ("codec.commitment=1,2,1.0", "the same value"),
        ("codec.commitment=0.001,1e-3", "the same value"),
        ("codec.commitment=&a [*a]", "not valid YAML"),
        ("codec.commitment=1: 2: 3", "not valid YAML"),
    ],
)
def test_a_malformed_grid_is_refused(typed: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        read_axes([typed])


def test_values_are_typed_as_set_types_them() -> None:
    for text in ("0.25", "[0.25, 1.0]", "1e-1"):
        plan = make_plan([f"codec.commitment={text}"], "shapes", None)
        by_set = new_run_settings("shapes", None, [f"codec.commitment={text}"])
        assert plan.cells[0].config == by_set


def test_cells_are_the_product_in_order_with_readable_names() -> None:
    plan = make_plan(["codec.commitment=0.25,1.0", "codec.codebook_size=128,[64,32]"], "shapes", None)
    assert [cell.name for cell in plan.cells] == [
        "commitment=0.25,codebook_size=128",
        "commitment=0.25,codebook_size=64+32",
        "commitment=1,codebook_size=128",
        "commitment=1,codebook_size=64+32",
    ]
    assert [cell.config.codec.commitment for cell in plan.cells] == [0.25, 0.25, 1.0, 1.0]
    assert plan.cells[3].config.codec.codebook_size == (64, 32)
    assert not plan.cells[0].priors


def test_names_are_unique_plain_and_do_not_depend_on_other_cells() -> None:
    texts = {text_of(value) for value in HOSTILE}
    values = [next(value for value in HOSTILE if text_of(value) == text) for text in texts]
    names = [cell_name({"data.source": value}, ["data.source"]) for value in values]
    assert len({name.lower() for name in names}) == len(names)
    for name in names:
        assert plain_name(name, "cell") == name
        assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._=,+-]*", name), name
        assert os.path.basename(name) == name
    long = {f"priors.x.{'k' * 60}{index}": "v" * 30 for index in range(4)}
    assert len(cell_name(long, list(long))) <= 100
    assert cell_name({"a.b": "Same"}, ["a.b"]) != cell_name({"a.b": "same"}, ["a.b"])


def test_short_keys_tell_keys_apart() -> None:
    keys = ["codec.training.steps", "priors.pixelcnn.training.steps", "seed", "priors.x.seed", "codec.width"]
    short = short_keys(keys)
    assert len(set(short.values())) == len(keys)
    assert short["codec.width"] == "width"
    assert short["codec.training.steps"] == "codec.training.steps"
    assert short["priors.x.seed"] == "x.seed"


def test_a_budget_in_the_grid_takes_the_place_of_minutes() -> None:
    plan = make_plan(["training.steps=5,6"], "shapes", None, minutes=2)
    assert [cell.config.codec.training.steps for cell in plan.cells] == [5, 6]
    assert plan.cells[0].config.codec.training.minutes is None
    assert [axis.key for axis in plan.axes] == ["codec.training.steps"]


def test_minutes_are_the_budget_of_each_model() -> None:
    plan = make_plan(["priors.pixelcnn.width=16,32"], "shapes", None, minutes=2)
    config = plan.cells[0].config
    assert config.codec.training.minutes == 2
    assert config.priors["pixelcnn"]["training"]["minutes"] == 2
    assert config.priors["pixelcnn"]["levels"]["bottom"]["training"]["minutes"] == 2


def test_priors_are_those_named_and_those_in_the_grid() -> None:
    plan = make_plan(["priors.pixelcnn.width=16,32"], "shapes", None, priors=["top=transformer"])
    assert plan.cells[0].priors == {"transformer": ("top",), "pixelcnn": ("top", "bottom")}
    assert plan.shared_codecs == 1
    mixed = make_plan(["priors.pixelcnn.width=16,32"], "shapes", None, priors=["bottom=pixelcnn"])
    assert mixed.cells[0].priors == {"pixelcnn": ("bottom",)}
    levels = make_plan(["codec.strides=[4],[8,4],[8,4,2]"], "cifar10", None, priors=["unigram"])
    assert [cell.priors["unigram"] for cell in levels.cells] == [
        ("top",),
        ("top", "bottom"),
        ("top", "middle", "bottom"),
    ]
    assert levels.shared_codecs == 3


def test_the_order_of_a_begun_grid_names_the_cells() -> None:
    there = make_plan(["codec.commitment=1,2", "codec.width=16,32"], "shapes", None)
    back = make_plan(
        ["codec.width=16,32", "codec.commitment=1,2"], "shapes", None, order=["codec.commitment", "codec.width"]
    )
    assert {cell.name for cell in there.cells} == {cell.name for cell in back.cells}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--grid", "codec.commitmnt=1,2"], "codec.commitmnt: unknown key. Did you mean 'commitment'?"),
        (["--grid", "codec.commitment=0.25,-1"], "the cell commitment=-1: codec.commitment"),
        (["--grid", "codec.commitment=often,2"], "codec.commitment: expected a number"),
        (["--grid", "codec.commitment=.inf,2"], "codec.commitment"),
        (["--grid", "codec.codebook_size=[16, 32, 64],8"], "one per level"),
        (["--grid", "priors.pixelcn.width=8,16"], "Did you mean 'pixelcnn'?"),
        (["--grid", "priors.pixelcnn.widht=8,16"], "Did you mean 'width'?"),
        (["--grid", "codec.width=8", "--grid", "codec.width=16"], "given twice"),
        (["--grid", "training.steps=8", "--grid", "codec.training.steps=16"], "given twice"),
        (["--grid", "codec.training={steps: 3},{steps: 4}", "--grid", "codec.training.clip=1"], "holds the other"),
        (["--grid", "codec.width=8,16", "--set", "codec.width=8"], "given otherwise too"),
        (["--grid", "training.steps=8,16", "--set", "training.steps=8"], "given otherwise too"),
        (["--grid", "seed=0,1", "--seed", "2"], "given otherwise too"),
        (["--grid", "run.samples=8,16"], "would train the same models"),
        (["--grid", "training.steps=1,2", "--prior", "pixelcnn"], "which model's training is meant?"),
        (["--grid", "codec.width=8,16", "--prior", "pixelcn"], "Unknown prior 'pixelcn'"),
        (
            ["--config", "cifar10", "--grid", "codec.strides=[4],[8,4]", "--prior", "bottom=pixelcnn"],
            "there is no level 'bottom'",
        ),
        (["--grid", "codec.width=8,16", "--config", "shape"], "Unknown preset 'shape'"),
        (["--grid", "codec.width=8,16", "--set", "codec.widht=8"], "codec.widht: unknown key"),
        (["--grid", "data.source=' ',shapes"], "has no images"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_made(
    arguments: list[str], said: str, fails: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    line = fails("sweep", *arguments)
    assert said in line
    assert len(line.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_without_a_grid_there_is_no_sweep(fails: Callable[..., str]) -> None:
    assert "Missing option '--grid'" in fails("sweep")


def test_the_settings_of_a_cell_are_those_of_the_base_and_its_values() -> None:
    base = new_run_settings("shapes", None, ["seed=3"])
    plan = make_plan(["codec.commitment=1,2"], "shapes", None, ["seed=3"])
    expected = base.model_dump(mode="json", exclude_none=True)
    expected["codec"]["commitment"] = 2.0
    assert plan.cells[1].config == build(type(base), expected)
    with pytest.raises(ConfigError, match="nothing: unknown key"):
        make_plan(["codec.nothing=1"], "shapes", None)


COMMANDS = [
    line
    for block in re.findall(r"^```\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith("vqgen sweep")
]


@pytest.mark.parametrize("line", COMMANDS)
def test_the_commands_of_the_page_are_plans(line: str) -> None:
    given = cli.cli.commands["sweep"].make_context("sweep", shlex.split(line, comments=True)[2:]).params
    options = {name: given[name] for name in ("priors", "seed", "minutes")}
    plan = make_plan(given["grid"], given["config"], given["data"], given["sets"], **options)
    assert len(plan.cells) >= 2


def test_the_page_has_commands() -> None:
    assert len(COMMANDS) >= 5
