"""Presets and layers: from YAML files and ``--set KEY=VALUE`` to one mapping of settings, which `vqgen.config` checks.

Lowest first: the defaults, the chain of ``base`` presets, the preset or file, ``--set``. A budget (``steps``,
``epochs`` or ``minutes``) named in an upper layer replaces the budget of the layers below it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from vqgen.config import BUDGETS
from vqgen.errors import ConfigError, InputError, did_you_mean
from vqgen.files import write_text
from vqgen.parsing import MOST_YAML, parse_yaml, read_bounded

DEFAULTS: dict[str, Any] = {"codec": {"training": {"steps": 10000}}}
_HEAD = "# Resolved settings. The file is whole where its last line is three dots.\n"
_END = "..."
"""How YAML ends a text: what is left of a file that was cut off would mostly be valid, and stand for other settings."""


def presets_folder() -> Path:
    """Folder of the presets: ``vqgen/configs`` in an installed wheel, ``configs`` in a checkout."""
    inside = Path(__file__).parent / "configs"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "configs"


def preset_names() -> list[str]:
    return sorted(path.stem for path in presets_folder().glob("*.yaml"))


def preset_summary(name: str) -> str:
    """What a preset is, from the first comment line of its file."""
    first = (presets_folder() / f"{name}.yaml").read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip()


def read_layers(name: str) -> dict[str, Any]:
    """Settings of a preset name or YAML file, merged over its chain of bases and over the defaults.

    ``base`` names a preset, or a YAML file relative to the file that names it. It is not in the result, which
    holds all that the bases say.

    Raises:
        InputError: no such preset or file, or a chain of bases that never ends.
        ConfigError: the file is not a YAML mapping.
    """
    layers: list[dict[str, Any]] = []
    seen: list[Path] = []
    pending: Path | None = _find(name)
    while pending is not None:
        path = pending
        if path.resolve() in seen:
            raise InputError(f"{path}: the chain of 'base' presets never ends.", "Remove one of the 'base' lines.")
        seen.append(path.resolve())
        layer = read_yaml(path)
        base = layer.pop("base", None)
        if base is not None and not isinstance(base, str):
            raise ConfigError(f"{path}: base: expected the name of a preset or a YAML file, got {base!r}.")
        layers.append(layer)
        pending = None if base is None else _find(base, path)
    merged = DEFAULTS
    for layer in reversed(layers):
        merged = merge(merged, layer)
    return merged


def _find(name: str, named_in: Path | None = None) -> Path:
    """File of the preset or path ``name``; a path is relative to the file that it is ``named_in``."""
    of = f"{named_in}: base: " if named_in else ""
    if name.endswith((".yaml", ".yml")) or "/" in name:
        path = named_in.parent / Path(name).expanduser() if named_in else Path(name)
        if not path.is_file():
            raise InputError(f"{of}No config file at '{path}'.", "Give a preset name or the path of a YAML file.")
        return path
    known = preset_names()
    if name not in known:
        raise InputError(
            f"{of}Unknown preset '{name}'.", f"{did_you_mean(name, known)} Known: {', '.join(known)}.".strip()
        )
    return presets_folder() / f"{name}.yaml"


def write_yaml(path: Path, settings: Mapping[str, Any]) -> None:
    """Write ``settings``, plain values, so that `read_yaml` notices when the file was cut off."""
    write_text(path, _HEAD + yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True, explicit_end=True))


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file as a mapping.

    Raises:
        ConfigError: the file cannot be read, is not YAML, is not a mapping with text keys, or is the first part of
            what `write_yaml` wrote.
    """
    try:
        text = read_bounded(path, MOST_YAML)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}).") from error
    try:
        value = parse_yaml(text)
    except ValueError as error:
        raise ConfigError(f"{path}: not valid YAML ({error}).", "Mend the file.") from error
    if text.startswith(_HEAD.rstrip()) and text.rstrip().rpartition("\n")[2] != _END:
        raise ConfigError(
            f"{path}: it was cut off: its last line, '{_END}', is missing.", "Bring back a copy, or mend it."
        )
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ConfigError(f"{path}: expected a mapping of settings such as 'codec: {{width: 128}}'.")
    return value


def merge(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """``upper`` over ``lower``, mapping by mapping; a budget in ``upper`` removes the budgets of ``lower``."""
    if any(upper.get(name) is not None for name in BUDGETS):
        lower = {key: value for key, value in lower.items() if key not in BUDGETS}
    result = dict(lower)
    for key, value in upper.items():
        below = result.get(key)
        both = isinstance(value, Mapping) and isinstance(below, Mapping)
        result[key] = merge(below, value) if both else value  # type: ignore[arg-type]
    return result


def parse_set(assignment: str) -> dict[str, Any]:
    """``"codec.width=64"`` as ``{"codec": {"width": 64}}``; the value is YAML.

    Raises:
        InputError: not of the form KEY=VALUE, or the value is not YAML.
    """
    key, equals, text = assignment.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise InputError(f"--set {assignment}: expected KEY=VALUE.", "For example --set codec.training.steps=600.")
    try:
        value = parse_yaml(text)
    except ValueError as error:
        raise InputError(f"--set {assignment}: the value is not valid YAML.") from error
    for part in reversed(parts):
        value = {part: value}
    return value  # type: ignore[no-any-return]


def apply_sets(settings: Mapping[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """``settings`` with each ``KEY=VALUE`` of ``assignments`` merged over it, in order."""
    merged = dict(settings)
    for assignment in assignments:
        merged = merge(merged, parse_set(assignment))
    return merged
