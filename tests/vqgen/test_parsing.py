"""Text of a stranger: bounded before anything is made of it, and shown without being obeyed."""

from __future__ import annotations

import json
import math
import os
import time
import tracemalloc
from pathlib import Path

import pytest
import yaml

from benchmarks.hostile import BOMBS, YAML_BOMBS
from vqgen.errors import ConfigError, InputError
from vqgen.files import read_json
from vqgen.parsing import (
    MOST_DEPTH,
    MOST_JSON,
    MOST_YAML,
    load_json,
    parse_json,
    parse_yaml,
    printable,
    read_bounded,
)
from vqgen.presets import apply_sets, presets_folder, read_layers, read_yaml

MOST_BYTES = 64 * 2**20
MOST_SECONDS = 20.0
FINE = (b"base: shapes\nbase: shapes\n", b"data: {source: !!binary aGVsbG8=}\n", b'data: {source: "a\\0b"}\n')
HARMLESS = (b"null", b"[]", b"{}", b"0", b'"' + b"\\u0000" * 1000 + b'"')


@pytest.mark.parametrize(
    "text",
    [
        "[" * 200_000,
        '{"a":' * 100_000,
        "[" * (MOST_DEPTH + 2) + "]" * (MOST_DEPTH + 2),
        "9" * 100_000,
        str(2**64),
        str(-(2**64)),
        "1e99999",
        "-1e400",
        "NaN",
        "Infinity",
        "",
        "{",
        '{"a": 1} x',
    ],
)
def test_json_beyond_the_limits_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_json(text)


@pytest.mark.parametrize("value", [{"a": [1, -2.5, None, True, "é\u2028"]}, 2**64 - 1, [[[[]]]], "", 5e-324, 1.7e308])
def test_other_json_is_as_python_reads_it(value: object, tmp_path: Path) -> None:
    path = tmp_path / "it.json"
    path.write_text(json.dumps(value), encoding="utf-8")
    assert load_json(path) == read_json(path) == value


def test_numbers_that_are_none_only_where_they_are_asked_for() -> None:
    value = parse_json("[NaN, -Infinity, 1e999]", nan=True)
    assert math.isnan(value[0])
    assert value[1:] == [-math.inf, math.inf]


@pytest.mark.parametrize("content", BOMBS, ids=range(len(BOMBS)))
def test_a_bomb_for_a_json_file_is_one_line(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "it.json"
    path.write_bytes(content)
    start = time.perf_counter()
    if content in HARMLESS:
        assert read_json(path) == json.loads(content)
    else:
        with pytest.raises(InputError, match=r"it\.json is damaged \(.{1,300}\)\."):
            read_json(path)
    assert time.perf_counter() - start < MOST_SECONDS


@pytest.mark.parametrize("content", YAML_BOMBS, ids=range(len(YAML_BOMBS)))
def test_a_bomb_for_a_yaml_file_is_refused_in_time_and_in_little_memory(content: bytes, tmp_path: Path) -> None:
    from pipelines.settings import new_run_settings

    path = tmp_path / "it.yaml"
    path.write_bytes(content)
    new_run_settings("shapes", None, ())  # what is imported on the way is not counted
    tracemalloc.start()
    start = time.perf_counter()
    try:
        said = ""
        try:
            new_run_settings(str(path), "./missing", ())
        except (InputError, ConfigError) as error:
            said = str(error)
        assert content in FINE or said
        assert tracemalloc.get_traced_memory()[1] < MOST_BYTES
    finally:
        tracemalloc.stop()
    assert time.perf_counter() - start < MOST_SECONDS
    assert len(said) < 3000
    assert not list(tmp_path.parent.glob("**/owned"))


def test_aliases_and_merges_that_people_write_are_taken() -> None:
    text = "base: &b {steps: 3, rate: 1.0e-3}\ncodec: {training: {<<: *b, steps: 4}}\nagain: [*b, *b]\n"
    assert parse_yaml(text) == yaml.safe_load(text)
    assert parse_yaml("") is None


@pytest.mark.parametrize("path", sorted(presets_folder().glob("*.yaml")), ids=lambda path: path.stem)
def test_presets_are_read_as_yaml_reads_them(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert parse_yaml(text) == yaml.safe_load(text)
    assert read_layers(path.stem)


@pytest.mark.parametrize("size", [MOST_YAML + 1, 2 * MOST_YAML])
def test_a_long_config_is_refused_before_it_is_read(size: int, tmp_path: Path) -> None:
    path = tmp_path / "it.yaml"
    path.write_text("a" * size)
    with pytest.raises(ConfigError, match="longer than"):
        read_yaml(path)


@pytest.mark.parametrize("kind", ["device", "pipe"])
def test_what_is_no_plain_file_is_not_read(kind: str, tmp_path: Path) -> None:
    """A device may have no end, and who opens a pipe waits."""
    path = Path("/dev/zero")
    if kind == "pipe" and hasattr(os, "mkfifo"):
        path = tmp_path / "pipe"
        os.mkfifo(path)
    if not path.exists():
        pytest.skip("no such thing here")
    start = time.perf_counter()
    with pytest.raises(ValueError, match="no plain file"):
        read_bounded(path, 1000)
    assert time.perf_counter() - start < MOST_SECONDS
    assert MOST_JSON < 2**30


def test_a_value_of_set_is_bounded_too() -> None:
    with pytest.raises(InputError, match="not valid YAML"):
        apply_sets({}, ["codec.width=" + "[" * 5000])
    with pytest.raises(InputError, match="not valid YAML"):
        apply_sets({}, ["codec.width=&a [*a]"])


@pytest.mark.parametrize(
    "character",
    [*map(chr, range(0x09)), *map(chr, range(0x0B, 0x20)), *map(chr, range(0x7F, 0xA0)), *"\u202e\u2066\u2028\ud800"],
)
def test_what_a_terminal_would_obey_is_replaced(character: str) -> None:
    assert printable(f"a{character}b") == "a\N{REPLACEMENT CHARACTER}b"


def test_all_else_is_shown_as_it_is() -> None:
    for text in ("plain", "tab\tand\nline", "é 漢字 😀 ‰", "[bold]x[/bold] :smile:", "\\x1b[31m"):
        assert printable(text) == text
