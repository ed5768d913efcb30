"""The grid of a sweep: from ``--grid KEY=VALUE,VALUE,...`` to cells, each with a name and settings that are checked.

Values are typed as ``--set`` types them. A cell's name depends on its own values alone, so that a grid can grow and
its cells keep their names.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from pipelines.settings import merged_settings, new_run_settings, parse_priors, training_minutes
from priors import registry
from vqgen.codes import level_names
from vqgen.config import Config
from vqgen.errors import InputError
from vqgen.parsing import parse_yaml

LONGEST_VALUE = 40
LONGEST_NAME = 90
"""Characters of a cell's name, which is a folder's."""
EXAMPLE = "For example --grid codec.commitment=0.25,0.75 --grid codec.codebook_size=128,512."


@dataclass(frozen=True)
class Axis:
    """One key of the grid and its values, as typed and as YAML reads them."""

    key: str
    texts: tuple[str, ...]
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Cell:
    """One combination of the grid's values, and the settings that it makes."""

    name: str
    """Its folder in ``runs/``."""
    title: str
    """``"commitment=0.75, codebook_size=512"``."""
    values: Mapping[str, Any]
    """Value by key of the grid, plain JSON."""
    config: Config
    priors: Mapping[str, tuple[str, ...]]
    """Levels of each prior that is trained."""

    @property
    def codec_key(self) -> str:
        """All that decides its codec and codes: cells that agree in it can share them."""
        parts = {"seed", "data", "codec"}
        return json.dumps(self.config.model_dump(mode="json", include=parts), sort_keys=True)

    @property
    def images_key(self) -> str:
        """All that decides on which validation images its codec is measured."""
        images = self.config.codec.training.evaluate_images
        parts = {**self.config.model_dump(mode="json", include={"seed", "data"}), "evaluate_images": images}
        return json.dumps(parts, sort_keys=True)


@dataclass(frozen=True)
class Plan:
    """A sweep that was checked: what its cells have in common, and the cells, the last key fastest."""

    base: Config
    axes: tuple[Axis, ...]
    priors: tuple[str, ...]
    """``--prior`` as typed."""
    cells: tuple[Cell, ...]

    @property
    def grid(self) -> dict[str, list[Any]]:
        return {axis.key: list(axis.values) for axis in self.axes}

    @property
    def shared_codecs(self) -> int:
        """How many codecs there are for all cells."""
        return len({cell.codec_key for cell in self.cells})


def make_plan(
    grid: Sequence[str],
    config: str | None,
    data: str | None,
    sets: Sequence[str] = (),
    *,
    priors: Sequence[str] = (),
    seed: int | None = None,
    minutes: float | None = None,
    order: Sequence[str] = (),
) -> Plan:
    """The sweep that a command line means, every cell checked; nothing is read but the preset.

    ``priors`` are names, or mixes such as ``"top=pixelsnail,bottom=pixelcnn"``; priors whose settings are in the grid
    are trained too. ``minutes`` is the budget of each model. ``order`` are the same keys in the order of a grid that
    was begun, by which cells are named.

    Raises:
        InputError: a malformed grid, a key given twice, an unknown prior, or cells that would train the same.
        ConfigError: bad settings, of all cells or of the first one that has any.
    """
    axes = read_axes(grid)
    touched = [name for axis in axes for name in _priors_of(axis)]
    chosen = tuple(dict.fromkeys([*_names_in(priors), *touched]))
    for name in chosen:
        registry.get(name)
    axes = tuple(_expanded(axis, bool(chosen)) for axis in axes)
    _check_keys(axes, [*sets, *[f"seed={seed}"] * (seed is not None)], bool(chosen))
    base = new_run_settings(config, data, sets, seed=seed, short_for=None if chosen else "codec")
    if chosen:
        base = base.model_copy(update={"run": base.run.model_copy(update={"priors": chosen})})
    if minutes is not None:
        base = training_minutes(base, minutes)
    keys = [axis.key for axis in axes]
    short = short_keys(keys)
    order = order if set(order) == set(keys) else keys
    cells = []
    for places in product(*(range(len(axis.values)) for axis in axes)):
        values = {axis.key: axis.values[place] for axis, place in zip(axes, places, strict=True)}
        title = ", ".join(f"{short[key]}={text_of(values[key])}" for key in order)
        assignments = [f"{axis.key}={axis.texts[place]}" for axis, place in zip(axes, places, strict=True)]
        settings = _settings_of(base, assignments, f"the cell {title}")
        levels = level_names(len(settings.codec.strides))
        cells.append(Cell(cell_name(values, order), title, values, settings, _mix(priors, touched, levels)))
    _check_different(cells)
    return Plan(base, axes, tuple(priors), tuple(cells))


def read_axes(grid: Sequence[str]) -> tuple[Axis, ...]:
    """The keys and values of ``--grid``, in the order given.

    Raises:
        InputError: not of the form KEY=VALUE,VALUE,..., a value twice, or a key twice.
    """
    axes = []
    for typed in grid:
        key, equals, text = typed.partition("=")
        parts = [part.strip() for part in key.split(".")]
        if not equals or not all(parts):
            raise InputError(f"--grid {typed}: expected KEY=VALUE,VALUE,...", EXAMPLE)
        texts = [part.strip() for part in split_values(text, typed)]
        if not all(texts):
            raise InputError(f"--grid {typed}: a value is empty.", EXAMPLE)
        values = [_read(part, typed) for part in texts]
        seen: dict[str, str] = {}
        for value, part in zip(values, texts, strict=True):
            if text_of(value) in seen:
                raise InputError(f"--grid {typed}: {seen[text_of(value)]} and {part} are the same value.")
            seen[text_of(value)] = part
        axes.append(Axis(".".join(parts), tuple(texts), tuple(values)))
    return tuple(axes)


def split_values(text: str, typed: str = "") -> list[str]:
    """``text`` split at its commas, but not at those within brackets, braces or quotes.

    Raises:
        InputError: brackets or quotes that do not close; ``typed`` is what is named.
    """
    parts, opened, quote = [""], "", ""
    pairs = {"]": "[", "}": "{"}
    closed = True
    for mark in text:
        before = parts[-1].rstrip()[-1:]
        if quote:
            quote = "" if mark == quote else quote
        elif mark in "'\"" and before in ("", *"[{,:"):  # within a word it is an apostrophe
            quote = mark
        elif mark in "[{":
            opened += mark
        elif mark in pairs:
            closed = closed and opened.endswith(pairs[mark])
            opened = opened[:-1]
        if mark == "," and not opened and not quote:
            parts.append("")
        else:
            parts[-1] += mark
    if opened or quote or not closed:
        raise InputError(f"--grid {typed or text}: brackets or quotes that do not close.", EXAMPLE)
    return parts


def _read(text: str, typed: str) -> Any:
    try:
        value = parse_yaml(text)
        json.dumps(value, default=str)  # a mapping whose keys are no text
    except (ValueError, TypeError) as error:
        raise InputError(f"--grid {typed}: {text} is not valid YAML.") from error
    return json.loads(json.dumps(value, default=str))


def text_of(value: Any) -> str:
    """A value as people write it: 1.0 is 1, and 1e-3, which YAML takes for text, is the number 0.001."""
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            return value
        value = number if math.isfinite(number) else value
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        value = int(value)
    if isinstance(value, list):
        return f"[{', '.join(map(text_of, value))}]"
    return value if isinstance(value, str) else json.dumps(value)


def short_keys(keys: Sequence[str]) -> dict[str, str]:
    """Each key by as few of its last parts as tell it from the other ``keys``."""
    short = {}
    for key in keys:
        parts = key.split(".")
        tails = [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]
        alone = [tail for tail in tails if sum(f".{other}".endswith(f".{tail}") for other in keys) == 1]
        short[key] = alone[0] if alone else key
    return short


def cell_name(values: Mapping[str, Any], order: Sequence[str]) -> str:
    """A plain name for the folder of a cell, such as ``"commitment=0.25,codebook_size=128"``.

    What would not be plain in it (a path, a mapping, capital letters, which some file systems do not tell from small
    ones) is replaced and told apart by a hash.
    """
    short = short_keys(order)
    name = ",".join(f"{_plain_key(short[key])}={_plain_value(values[key])}" for key in order)
    if len(name) <= LONGEST_NAME:
        return name
    return f"{name[: LONGEST_NAME - 9].rstrip('-')}-{_digest(name)}"


def _plain_key(key: str) -> str:
    return key if re.fullmatch(r"[a-z0-9_][a-z0-9._-]*", key) else f"key-{_digest(key)}"


def _plain_value(value: Any) -> str:
    items = value if isinstance(value, list) and len(value) > 1 else [value]
    texts = [text_of(item) for item in items]
    plain = "+".join(texts)
    if len(plain) <= LONGEST_VALUE and all(re.fullmatch(r"[a-z0-9._-]*[a-z0-9_-]", text) for text in texts):
        return plain
    kept = re.sub(r"[^A-Za-z0-9._]+", "-", text_of(value))[:LONGEST_VALUE].strip("-.")
    return f"{kept}-{_digest(text_of(value))}".lstrip("-")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:8]


def _expanded(axis: Axis, priors: bool) -> Axis:
    """``training.X`` is the codec's, as in ``train-codes``, where there are no priors that it could mean."""
    if axis.key != "training" and not axis.key.startswith("training."):
        return axis
    if priors:
        raise InputError(
            f"--grid {axis.key}: which model's training is meant?",
            f"Write codec.{axis.key}=... or priors.NAME.{axis.key}=...",
        )
    return Axis(f"codec.{axis.key}", axis.texts, axis.values)


def _check_keys(axes: Sequence[Axis], sets: Iterable[str], priors: bool) -> None:
    """Refuse a key that is given twice, or that holds another one."""
    keys = [axis.key for axis in axes]
    for place, key in enumerate(keys):
        for other in keys[:place]:
            if key == other:
                raise InputError(f"--grid {key}: the key is given twice.", "Name all of its values in one --grid.")
            if key.startswith(f"{other}.") or other.startswith(f"{key}."):
                raise InputError(f"--grid {key} and --grid {other}: one holds the other.", "Keep one of them.")
    for assignment in sets:
        key = assignment.partition("=")[0].strip()
        key = f"codec.{key}" if not priors and key.partition(".")[0] == "training" else key
        if key in keys:
            raise InputError(f"{key} is in --grid and given otherwise too.", "Keep one of them.")


def _names_in(priors: Iterable[str]) -> list[str]:
    """The priors named in ``--prior``."""
    return [part.partition("=")[2].strip() if "=" in part else part for text in priors for part in text.split(",")]


def _priors_of(axis: Axis) -> list[str]:
    """The priors whose settings the axis changes."""
    group, _, rest = axis.key.partition(".")
    if group != "priors":
        return []
    return [rest.partition(".")[0]] if rest else [str(name) for value in axis.values if value for name in value]


def _mix(priors: Sequence[str], touched: Sequence[str], levels: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Levels of each prior: those that ``--prior`` names, all levels for one that only the grid names."""
    wanted: dict[str, list[str]] = {}
    for text in priors:
        for level, name in parse_priors(text, levels).items():
            wanted.setdefault(name, []).append(level)
    for name in touched:
        wanted.setdefault(name, list(levels))
    return {name: tuple(level for level in levels if level in named) for name, named in wanted.items()}


def _settings_of(base: Config, assignments: Sequence[str], where: str) -> Config:
    values = base.model_dump(mode="json", exclude_none=True)
    made = merged_settings(values, assignments, source=None, seed=None, minutes=None, short_for=None, file=where)
    if not made.data.source.strip():
        raise InputError(f"{where} has no images.", "Name them in data.source.")
    return made


def _check_different(cells: Sequence[Cell]) -> None:
    """Refuse cells that would train the same models."""
    seen: dict[str, Cell] = {}
    for cell in cells:
        sections = cell.config.priors
        trained = {
            f"{name} {level}": [
                part.model_dump(mode="json") for part in registry.prior_settings(name, sections.get(name, {}), level)
            ]
            for name, levels in cell.priors.items()
            for level in levels
        }
        made = cell.codec_key + json.dumps(trained, sort_keys=True)
        if made in seen:
            raise InputError(
                f"The cells {seen[made].title} and {cell.title} would train the same models.",
                "Leave out keys and values of --grid that change nothing here.",
            )
        seen[made] = cell
