"""From what was typed to the settings of a run: presets, ``--data``, ``--set`` and ``--minutes``, all checked at once.

A new run starts from a preset or file; every later command starts from the run's own config.yaml and
merges what it is given over it, so that a resumed stage needs nothing repeated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from priors import registry
from vqgen.codes import level_names
from vqgen.config import Config, apply_sets, build, check, merge, raise_problems, read_layers, read_yaml
from vqgen.errors import InputError
from vqgen.files import write_text
from vqgen.run_folder import DEFAULT_PRESET, RunFolder
from vqgen.training_state import plain, refuse_differences

OWN_IMAGES_PRESET = "images"


def new_run_settings(
    config: str | None,
    data: str | None,
    sets: Sequence[str] = (),
    *,
    seed: int | None = None,
    minutes: float | None = None,
    short_for: str | None = None,
) -> Config:
    """Settings of a run about to be made.

    ``config`` is a preset name or a YAML file; without it the preset is ``shapes``, or ``images`` where
    ``data`` names a source. ``short_for`` is as in `merged_settings`, and ``minutes`` is its budget.

    Raises:
        ConfigError: with every problem at once.
        InputError: no such preset, or a malformed ``--set``.
    """
    name = config or (OWN_IMAGES_PRESET if data else DEFAULT_PRESET)
    values = read_layers(name)
    return merged_settings(values, sets, source=data, seed=seed, minutes=minutes, short_for=short_for, file=name)


def run_settings(
    run: RunFolder,
    sets: Sequence[str] = (),
    *,
    source: str | None = None,
    seed: int | None = None,
    minutes: float | None = None,
    short_for: str | None = None,
) -> Config:
    """Settings of an existing run: its config.yaml with what was given merged over it."""
    values = read_yaml(run.config)
    return merged_settings(
        values, sets, source=source, seed=seed, minutes=minutes, short_for=short_for, file=str(run.config)
    )


def prior_settings_of_run(
    run: RunFolder,
    name: str,
    levels: Sequence[str],
    sets: Sequence[str],
    *,
    seed: int | None,
    minutes: float | None,
) -> Config:
    """Settings for training the prior ``name``: the run's own, with what was given merged over them.

    With ``levels``, a bare ``training.X`` and ``minutes`` hold for those levels alone. What a prior is trained
    with is written back to the run's config.yaml, so that a resume needs nothing repeated.

    Raises:
        InputError: an unknown prior.
        ConfigError: bad settings, or settings of the data or the codec other than the run's.
    """
    registry.get(name)
    stored = run_settings(run)
    config = stored
    for group in [f"priors.{name}.levels.{level}" for level in levels] or [f"priors.{name}"]:
        values = config.model_dump(mode="json", exclude_none=True)
        config = merged_settings(
            values, sets, source=None, seed=None, minutes=minutes, short_for=group, file=str(run.config)
        )
    require_codec_settings(run, stored, config)
    if config != stored:
        save_settings(run, config)
    return config.model_copy(update={"seed": seed}) if seed is not None else config


def training_minutes(config: Config, minutes: float) -> Config:
    """``config`` with the budget of every model it trains set to ``minutes``."""
    names = {
        name for choice in config.run.priors for name in (choice.values() if isinstance(choice, dict) else [choice])
    }
    values = config.model_dump(mode="json", exclude_none=True)
    groups = ["codec", *(f"priors.{name}" for name in sorted(names))]
    return build(Config, apply_sets(values, [f"{group}.training.minutes={minutes}" for group in groups]))


def merged_settings(
    values: Mapping[str, Any],
    sets: Sequence[str],
    *,
    source: str | None,
    seed: int | None,
    minutes: float | None,
    short_for: str | None,
    file: str,
) -> Config:
    """``values`` with the options of a command merged over them, checked.

    ``short_for`` is the group that a bare ``training.X`` means, such as ``codec`` or ``priors.pixelcnn``;
    without it a bare ``training`` is an error.
    """
    merged = apply_sets(values, [_expand(assignment, short_for) for assignment in sets])
    if source is not None:
        merged = merge(merged, {"data": {"source": source}})
    if seed is not None:
        merged = merge(merged, {"seed": seed})
    if minutes is not None and short_for is not None:
        merged = apply_sets(merged, [f"{short_for}.training.minutes={minutes}"])
    config, problems = check(Config, merged)
    problems += _prior_problems(merged)
    if problems:
        raise_problems(problems, file)
    assert config is not None
    return config


def _expand(assignment: str, short_for: str | None) -> str:
    key = assignment.partition("=")[0].strip()
    if key != "training" and not key.startswith("training."):
        return assignment
    if short_for is None:
        raise InputError(
            f"--set {assignment}: which model's training is meant?",
            f"Write codec.{key}=... or priors.NAME.{key}=...",
        )
    return f"{short_for}.{assignment}"


def _prior_problems(values: Mapping[str, Any]) -> list[str]:
    sections = values.get("priors", {})
    codec = values.get("codec", {})
    strides = codec.get("strides", (8, 4)) if isinstance(codec, Mapping) else (8, 4)
    levels = level_names(len(strides)) if isinstance(strides, Sequence) and 1 <= len(strides) <= 3 else None
    problems = []
    for name, section in sections.items() if isinstance(sections, Mapping) else ():
        problems += registry.check_section(str(name), section, levels)
    wanted = values.get("run", {}).get("priors", ()) if isinstance(values.get("run", {}), Mapping) else ()
    for choice in wanted if isinstance(wanted, Sequence) and not isinstance(wanted, str) else ():
        mapping = choice if isinstance(choice, Mapping) else {None: choice}
        for level, name in mapping.items():
            problems += _choice_problems(level, str(name), levels)
    return problems


def _choice_problems(level: str | None, name: str, levels: Sequence[str] | None) -> list[str]:
    try:
        registry.get(name)
    except InputError as error:
        return [f"run.priors: {error}"]
    if level is not None and levels is not None and level not in levels:
        return [f"run.priors: there is no level '{level}'; the codec has {', '.join(levels)}."]
    return []


def save_settings(run: RunFolder, config: Config) -> None:
    """Write the resolved settings to the run's config.yaml."""
    values = config.model_dump(mode="json", exclude_none=True)
    write_text(run.config, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def parse_priors(text: str, levels: Sequence[str]) -> dict[str, str]:
    """``"transformer"`` or ``"top=pixelsnail,bottom=pixelcnn"`` as one prior per level.

    Raises:
        InputError: an unknown prior or level, or a level left out.
    """
    if "=" not in text:
        registry.get(text)
        return dict.fromkeys(levels, text)
    chosen = parse_per_level(text, levels, str, "--prior")
    for name in chosen.values():
        registry.get(name)
    return chosen


def parse_per_level(text: str, levels: Sequence[str], convert: Any, option: str) -> dict[str, Any]:
    """``"0.9"`` for every level, or ``"top=1.0,bottom=0.9"``, as a mapping of the levels named.

    Raises:
        InputError: a level the run does not have, or a value that ``convert`` refuses.
    """
    parts = text.split(",") if "=" in text else [f"{level}={text}" for level in levels]
    result: dict[str, Any] = {}
    for part in parts:
        level, _, value = part.strip().partition("=")
        if level not in levels:
            raise InputError(f"{option} {text}: there is no level '{level}'.", f"This run has {', '.join(levels)}.")
        try:
            result[level] = convert(value)
        except ValueError:
            raise InputError(f"{option} {text}: '{value}' is not a number.", f"For example {option} 0.9.") from None
    return result


def codec_identity(config: Config) -> dict[str, Any]:
    """The settings that a codec and its codes depend on."""
    values = config.model_dump(mode="json", include={"data", "codec", "seed"})
    values["codec"]["training"] = config.codec.training.identity()
    return values


def require_codec_settings(run: RunFolder, stored: Config, given: Config) -> None:
    """Refuse settings that differ from those the run's codec and codes were made with.

    Raises:
        ConfigError: listing what differs.
    """
    refuse_differences(plain(codec_identity(stored)), plain(codec_identity(given)), run.codec)
