"""From what was typed to the settings of a run: presets, ``--data``, ``--set`` and ``--minutes``, all checked at once.

A new run starts from a preset or file; every later command starts from the run's own config.yaml and merges what it
is given over it. What a prior was begun with is in its folder's settings.json.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from pipelines.run_codes import check_levels
from priors import registry
from vqgen.codes import level_names
from vqgen.config import Config
from vqgen.errors import InputError, did_you_mean
from vqgen.files import read_json
from vqgen.presets import apply_sets, merge, read_layers, read_yaml, write_yaml
from vqgen.problems import build, check, raise_problems
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
        InputError: no such preset, one without images of its own and no ``data``, or a malformed ``--set``.
    """
    name = config or (OWN_IMAGES_PRESET if data else DEFAULT_PRESET)
    values = read_layers(name)
    made = merged_settings(values, sets, source=data, seed=seed, minutes=minutes, short_for=short_for, file=name)
    if not made.data.source.strip():
        raise InputError(f"'{name}' has no images of its own.", "Name yours with --data, such as --data my-images/.")
    return made


def run_settings(run: RunFolder, *, source: str | None = None) -> Config:
    """Settings of an existing run, from its config.yaml; ``source`` is where its data is now, if it was moved.

    The groups of single priors are not checked here: the run may hold a prior whose plug-in is not loaded.
    """
    run.require_enclosed()
    config, problems = check(Config, read_yaml(run.config))
    raise_problems(problems, str(run.config))
    assert config is not None
    if source is None:
        return config
    return config.model_copy(update={"data": config.data.model_copy(update={"source": source})})


def changed_run_settings(
    run: RunFolder,
    sets: Sequence[str],
    *,
    source: str | None,
    seed: int | None,
    minutes: float | None,
    short_for: str | None,
) -> Config:
    """Settings of an existing run with the options of a command merged over them, all checked."""
    run.require_enclosed()
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
    seed: int | None = None,
    minutes: float | None = None,
    resume: bool = False,
) -> Config:
    """Settings for training the prior ``name`` on ``levels`` (none: all) of a run.

    What is given holds for just these levels, over the run's own settings; with ``resume``, over those that a level
    was begun with, so that a resume needs nothing repeated. Nothing is written.

    Raises:
        InputError: an unknown prior or level.
        ConfigError: bad settings, or settings of the data or the codec other than the run's.
    """
    registry.get(name)
    stored = run_settings(run)
    known = level_names(len(stored.codec.strides))
    check_levels(levels, known, "--level")
    group = f"priors.{name}"
    file = str(run.config)
    values = stored.model_dump(mode="json", exclude_none=True)
    # Checked first as typed, so that a problem is named by the key that was typed.
    merged = partial(merged_settings, source=None, file=file, only=name)
    typed = merged(values, sets, seed=seed, minutes=minutes, short_for=group)
    require_codec_settings(run, stored, typed.model_copy(update={"seed": stored.seed}))
    if seed is None and typed.seed != stored.seed:
        seed = typed.seed
    seed_given = seed is not None
    for level in levels or known:
        here = f"{group}.levels.{level}"
        begun = run.prior(name, level) / "settings.json"
        if resume and begun.is_file():
            saved = read_json(begun)
            if not isinstance(saved, dict) or not {"seed", "config", "training"} <= set(saved):
                raise InputError(f"{begun} is damaged.", "Redo the prior with --overwrite.")
            if seed not in (None, saved["seed"]) and not seed_given:
                raise InputError(
                    f"The levels of {name} were begun with different seeds.", "Resume them one by one with --level."
                )
            seed = saved["seed"] if seed is None else seed
            for key, value in {**saved["config"], "training": saved["training"]}.items():
                values = merge(values, _nested(f"{here}.{key}", value))
        own = [_for_level(assignment, group, here) for assignment in sets]
        if minutes is not None:
            own.append(f"{here}.training.minutes={minutes}")
        values = apply_sets(values, own)
    return merged(values, (), seed=seed, minutes=None, short_for=None)


def _for_level(assignment: str, group: str, here: str) -> str:
    """An assignment to the prior's group, or a bare one to its training, as one to the level's group ``here``."""
    key, _, value = assignment.partition("=")
    key = key.strip()
    if key == "training" or key.startswith("training."):
        return f"{here}.{key}={value}"
    if key == f"{group}.levels" or key.startswith(f"{group}.levels."):
        return assignment
    if key == group or key.startswith(f"{group}."):
        return f"{here}{key.removeprefix(group)}={value}"
    return assignment


def _nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value  # type: ignore[no-any-return]


def training_minutes(config: Config, minutes: float) -> Config:
    """``config`` with the budget of every model it trains set to ``minutes``."""
    return every_training(config, [f"training.minutes={minutes}"])


def every_training(config: Config, assignments: Sequence[str], sets: Sequence[str] = ()) -> Config:
    """``config`` with assignments such as ``training.minutes=3`` made for every model it trains.

    Those of ``sets`` that are for one model are made once more, so that they have the last word.
    """
    chosen = [choice.values() if isinstance(choice, dict) else [choice] for choice in config.run.priors]
    names = {name for group in chosen for name in group}
    values = config.model_dump(mode="json", exclude_none=True)
    groups = ["codec"]
    for name in sorted(names):
        levels = (values["priors"].get(name) or {}).get("levels") or {}
        groups += [f"priors.{name}", *(f"priors.{name}.levels.{level}" for level in levels)]
    own = [assignment for assignment in sets if assignment.strip().startswith(("codec", "priors"))]
    every = [f"{group}.{assignment}" for group in groups for assignment in assignments]
    return build(Config, apply_sets(values, [*every, *own]))


def merged_settings(
    values: Mapping[str, Any],
    sets: Sequence[str],
    *,
    source: str | None,
    seed: int | None,
    minutes: float | None,
    short_for: str | None,
    file: str,
    only: str | None = None,
) -> Config:
    """``values`` with the options of a command merged over them, checked; of the priors, ``only`` this one if given.

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
    problems += _prior_problems(merged, only)
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


def _prior_problems(values: Mapping[str, Any], only: str | None) -> list[str]:
    sections = values.get("priors", {})
    codec = values.get("codec", {})
    strides = codec.get("strides", (8, 4)) if isinstance(codec, Mapping) else (8, 4)
    levels = level_names(len(strides)) if isinstance(strides, Sequence) and 1 <= len(strides) <= 3 else None
    problems = []
    for name, section in sections.items() if isinstance(sections, Mapping) else ():
        if only not in (None, name):
            continue  # the run may hold a prior whose plug-in is not loaded
        problems += registry.check_section(str(name), section, levels)
    if only is not None:
        return problems
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
        return [f"run.priors: there is no level '{level}'. {did_you_mean(level, levels)}".strip()]
    return []


def save_settings(run: RunFolder, config: Config) -> None:
    """Write the resolved settings to the run's config.yaml."""
    write_yaml(run.config, config.model_dump(mode="json", exclude_none=True))


def parse_priors(text: str, levels: Sequence[str]) -> dict[str, str]:
    """``"transformer"`` or ``"top=pixelsnail,bottom=pixelcnn"`` as one prior per level.

    Raises:
        InputError: an unknown prior or level.
    """
    if "=" not in text:
        registry.get(text)
        return dict.fromkeys(levels, text)
    chosen = parse_per_level(text, levels, str, "--prior")
    for name in chosen.values():
        registry.get(name)
    return chosen


def prior_mix(run: RunFolder, text: str, levels: Sequence[str], sets: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Which priors ``train-prior --prior`` trains, and on which levels: none where it is on all.

    ``text`` is a name, for ``levels``; or a mix such as ``"top=pixelsnail,bottom=pixelcnn"``, of which ``levels``
    (none: all it names) are trained. ``sets`` are looked through for settings of priors that are not in the mix.

    Raises:
        InputError: a setting of a prior that is not trained; in a mix, an unknown prior or level, a level named twice,
            or one of ``levels`` for which the mix has no prior.
    """
    if "=" not in text:
        _check_trained(sets, [text], text, f"It names {text}.")
        return {text: tuple(levels)}
    known = level_names(len(run_settings(run).codec.strides))
    chosen = parse_priors(text, known)
    check_levels(levels, known, "--level")
    named = "It names " + ", ".join(f"{name} for {level}" for level, name in chosen.items()) + "."
    for level in levels:
        if level not in chosen:
            raise InputError(f"--level {level}: --prior {text} has no prior for it.", named)
    _check_trained(sets, list(chosen.values()), text, named)
    trained = [level for level in known if level in (levels or chosen)]
    return {
        name: tuple(level for level in trained if chosen[level] == name)
        for name in dict.fromkeys(chosen[level] for level in trained)
    }


def _check_trained(sets: Sequence[str], names: Sequence[str], text: str, hint: str) -> None:
    """Refuse an assignment to the settings of a prior that ``--prior text``, which means ``names``, does not train."""
    for assignment in sets:
        group, _, key = assignment.strip().partition(".")
        name = key.partition("=")[0].partition(".")[0].strip()
        if group == "priors" and name not in names:
            raise InputError(f"--set {assignment}: {name} is not a prior of --prior {text}.", hint)


def parse_per_level(text: str, levels: Sequence[str], convert: Any, option: str) -> dict[str, Any]:
    """``"0.9"`` for every level, or ``"top=1.0,bottom=0.9"``, as a mapping of the levels named.

    Raises:
        InputError: a level the run does not have or that is named twice, or a value that ``convert`` refuses.
    """
    parts = text.split(",") if "=" in text else [f"{level}={text}" for level in levels]
    result: dict[str, Any] = {}
    for part in parts:
        level, _, value = part.strip().partition("=")
        check_levels([level], levels, f"{option} {text}")
        if level in result:
            raise InputError(f"{option} {text}: level '{level}' is named twice.", "Name each level once.")
        try:
            result[level] = convert(value)
        except ValueError:
            kind, example = ("whole number", "50") if convert is int else ("number", "0.9")
            raise InputError(
                f"{option} {text}: '{value}' is not a {kind}.", f"For example {option} {example}."
            ) from None
    return result


def require_codec_settings(run: RunFolder, stored: Config, given: Config) -> None:
    """Refuse settings that differ from those the run's codec and codes were made with.

    Where the data lies may differ; whether it is the same data is seen when it is read.

    Raises:
        ConfigError: listing what differs.
    """
    refuse_differences(plain(_codec_settings(stored)), plain(_codec_settings(given)), run.codec)


def _codec_settings(config: Config) -> dict[str, Any]:
    place = {"source", "subset", "revision", "image_column", "label_column", "unreadable"}
    return {
        "seed": config.seed,
        "data": config.data.model_dump(mode="json", exclude=place),
        "codec": {
            **config.codec.architecture.model_dump(mode="json"),
            "discriminator": config.codec.discriminator.model_dump(mode="json") if config.codec.discriminator else None,
            "training": config.codec.training.identity(),
        },
    }
