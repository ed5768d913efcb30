"""Names to priors: the built-in ones, those of installed packages, and single files.

Saved models, configs and runs hold a registered *name* and nothing else: no module or path that a file names is
ever imported. What is imported is what the person at the keyboard chose: a built-in by its name, an installed
package that declares the entry point ``vqgen.priors``, or a file given to ``--plugin`` (`load_plugin`).
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Iterable, Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from vqgen.codes import MAX_LEVELS, level_names
from vqgen.config import Settings, TrainingSettings, player_problems
from vqgen.errors import InputError, did_you_mean
from vqgen.presets import merge
from vqgen.problems import check, raise_problems

if TYPE_CHECKING:
    from priors.base import Prior

ENTRY_POINTS = "vqgen.priors"

BUILT_IN = {
    "pixelcnn": "priors.pixelcnn:PixelCNN",
    "pixelsnail": "priors.pixelsnail:PixelSNAIL",
    "roundtrip": "priors.roundtrip:RoundTrip",
    "transformer": "priors.transformer:Transformer",
    "unigram": "priors.baselines:Unigram",
    "uniform": "priors.baselines:Uniform",
}
"""Where the built-in priors are; imported when first used."""

SOURCES = ("neighbour", "random")
"""Names of what a comparison draws without a prior; no prior can have them."""

SECTIONS = ("training", "levels")
"""Keys of ``priors.<name>`` that are not settings of the prior's architecture."""

P = TypeVar("P", bound="type[Prior]")

_registered: dict[str, type[Prior]] = {}


class PriorSettings(NamedTuple):
    """What ``priors.<name>`` says for one level."""

    config: Settings
    training: TrainingSettings


def register(cls: P) -> P:
    """Class decorator that makes a `Prior` known under its ``name``.

    Registering the same class again (a notebook cell run twice) replaces it.

    Raises:
        InputError: the class is not a complete prior (every fault is listed), or the name is taken.
    """
    problems = faults(cls)
    if problems:
        raise InputError(f"{_where(cls)} cannot be registered as a prior: {'; '.join(problems)}.")
    known = _where(_registered[cls.name]) if cls.name in _registered else BUILT_IN.get(cls.name)
    if known not in (None, _where(cls)):
        raise InputError(f"{_where(cls)} is named '{cls.name}', which is the name of {known}.", "Give it another name.")
    _registered[cls.name] = cls
    return cls


def names() -> list[str]:
    """Every known name, sorted; imports nothing."""
    return sorted({*BUILT_IN, *_registered, *_installed()})


def get(name: str) -> type[Prior]:
    """The prior registered under ``name``, imported now if it was not yet.

    Raises:
        InputError: no prior of that name is known, or an installed package's prior cannot be imported.
    """
    if name not in _registered:
        if name in BUILT_IN:
            module, _, attribute = BUILT_IN[name].partition(":")
            register(getattr(importlib.import_module(module), attribute))
        elif name in _installed():
            _load_installed(_installed()[name])
        else:
            raise InputError(f"Unknown prior '{name}'.", _known(name))
    return _registered[name]


def load_plugin(path: str | Path) -> list[str]:
    """Run the Python file ``path``, which registers one or more priors; returns their names.

    A file that was loaded before is not run again.

    Raises:
        InputError: no such file, it raises an error, or it registers no prior.
    """
    file = Path(path).expanduser().resolve()
    if file.suffix != ".py" or not file.is_file():
        raise InputError(f"No Python file at '{path}'.", "--plugin takes the path of a .py file that defines a prior.")
    module_name = f"vqgen_plugin_{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}"
    if module_name not in sys.modules:
        _execute(file, module_name)
    found = sorted(name for name, cls in _registered.items() if cls.__module__ == module_name)
    if not found:
        del sys.modules[module_name]
        raise InputError(f"{file} registers no prior.", "Put @register from priors.registry above its class.")
    return found


def prior_settings(name: str, section: Mapping[str, Any], level: str) -> PriorSettings:
    """Settings of the prior ``name`` at ``level``: its defaults, ``section``, then ``section["levels"][level]``.

    ``section`` is the group ``priors.<name>``: architecture settings, ``training`` and ``levels``.

    Raises:
        InputError: the prior is unknown.
        ConfigError: every problem of the section at once.
    """
    raise_problems(check_section(name, section))
    merged = _layered(get(name), section, level)
    training = merged.pop("training")
    return PriorSettings(get(name).Config.model_validate(merged), TrainingSettings.model_validate(training))


def check_section(name: str, section: Any, levels: Iterable[str] | None = None) -> list[str]:
    """One line per problem of the group ``priors.<name>``, each led by its key; empty where all is well.

    ``levels`` are the names of the run's levels; without them any level name that a run can have is taken.
    """
    where = f"priors.{name}"
    if name not in names():
        return [f"{where}: unknown prior. {_known(name)}"]
    shape = _shape_problems(section, where)
    if shape:
        return shape
    prior = get(name)
    found = _check_layer(prior, _layered(prior, section, None), where)
    problems = [f"{where}{line}" for line in found]
    known = list(levels) if levels is not None else list(level_names(MAX_LEVELS))
    for level in section.get("levels") or {}:
        if level not in known:
            hint = did_you_mean(str(level), known) or f"Known: {', '.join(known)}."
            problems.append(f"{where}.levels.{level}: unknown level. {hint}")
            continue
        # What is wrong for every level was said above; said here is what is wrong at this one only.
        own = _check_layer(prior, _layered(prior, section, level), where)
        problems += [f"{where}.levels.{level}{line}" for line in own if line not in found]
    return problems


def _layered(prior: type[Prior], section: Mapping[str, Any], level: str | None) -> dict[str, Any]:
    """Architecture settings and ``training``, merged; the level's own on top. An empty ``training:`` says nothing."""
    merged: dict[str, Any] = {"training": prior.training_defaults}
    layers = [{key: value for key, value in section.items() if key != "levels"}]
    if level is not None:
        layers.append((section.get("levels") or {}).get(level) or {})
    for layer in layers:
        merged = merge(merged, {key: value for key, value in layer.items() if (key, value) != ("training", None)})
    return merged


def _check_layer(prior: type[Prior], merged: Mapping[str, Any], where: str) -> list[str]:
    """Problems of one level's merged settings, without ``where`` before their keys."""
    architecture = {key: value for key, value in merged.items() if key != "training"}
    _, problems = check(prior.Config, architecture, where)
    problems += check(TrainingSettings, merged["training"], f"{where}.training")[1]
    problems += player_problems(merged["training"], prior.players, f"{where}.training")
    return [line.removeprefix(where) for line in problems]


def _shape_problems(section: Any, where: str) -> list[str]:
    """Places where a mapping is expected and something else is found."""
    if not isinstance(section, Mapping):
        return [f"{where}: expected a mapping of settings, got {section!r}"]
    levels = section.get("levels")
    nested = {f"{where}.training": section.get("training"), f"{where}.levels": levels}
    if isinstance(levels, Mapping):
        for level, settings in levels.items():
            nested[f"{where}.levels.{level}"] = settings
            if isinstance(settings, Mapping):
                nested[f"{where}.levels.{level}.training"] = settings.get("training")
    return [
        f"{key}: expected a mapping of settings, got {value!r}"
        for key, value in nested.items()
        if value is not None and not isinstance(value, Mapping)
    ]


def _installed() -> dict[str, EntryPoint]:
    """Entry points of installed packages by name; nothing is imported."""
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=ENTRY_POINTS):
        taken = BUILT_IN.get(point.name) or (found[point.name].value if point.name in found else None)
        if taken not in (None, point.value):
            raise InputError(
                f"The installed package of {point.value} names a prior '{point.name}', which is the name of {taken}.",
                "Uninstall one of them.",
            )
        if point.name not in BUILT_IN:
            found[point.name] = point
    return found


def _load_installed(point: EntryPoint) -> None:
    try:
        cls = point.load()
    except Exception as error:
        raise InputError(
            f"The installed prior '{point.name}' ({point.value}) cannot be imported: {type(error).__name__}: {error}."
        ) from error
    if getattr(cls, "name", None) != point.name:
        raise InputError(f"{point.value} is installed as the prior '{point.name}' but does not have that name.")
    register(cls)


def _execute(file: Path, module_name: str) -> None:
    """Import ``file`` as ``module_name``; where that fails, nothing of it stays."""
    spec = importlib.util.spec_from_file_location(module_name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = dict(_registered)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[module_name]
        _registered.clear()
        _registered.update(before)
        if isinstance(error, InputError):
            raise InputError(f"{file}: {error.message}", error.hint) from error
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
        line = f", line {lines[-1]}" if lines else ""
        raise InputError(f"{file}{line}: {type(error).__name__}: {error}", "Mend the plug-in.") from error


def faults(cls: Any) -> list[str]:
    """What is missing or wrong in the declaration of a prior, one line each."""
    from priors.autoregressive import AutoregressivePrior
    from priors.base import Prior

    if not (isinstance(cls, type) and issubclass(cls, Prior)):
        return ["it is not a subclass of priors.base.Prior"]
    found = []
    name = getattr(cls, "name", None)
    if not (isinstance(name, str) and re.fullmatch(r"[a-z][a-z0-9_-]*", name)):
        found.append(f"'name' must be small letters, digits, - and _, such as 'my-prior', got {name!r}")
    if name in SOURCES:
        found.append(f"'name' must be another one: a comparison has a source of samples '{name}'")
    likelihood = getattr(cls, "likelihood", None)
    if likelihood not in ("exact", "bound", "none"):
        found.append(f"'likelihood' must be 'exact', 'bound' or 'none', got {likelihood!r}")
    if not (isinstance(cls.summary, str) and cls.summary.strip() and "\n" not in cls.summary):
        found.append("'summary' must be one line of text")
    config = getattr(cls, "Config", None)
    if not (isinstance(config, type) and issubclass(config, Settings)):
        found.append("'Config' must be a subclass of vqgen.config.Settings")
    else:
        reserved = [key for key in SECTIONS if key in config.model_fields]
        found += [f"'Config.{key}' must have another name: priors.<name>.{key} has its own meaning" for key in reserved]
        required = [key for key, field in config.model_fields.items() if field.is_required()]
        found += [f"'Config.{key}' needs a default" for key in required]
    found += check(TrainingSettings, cls.training_defaults, "training_defaults")[1]
    if not (isinstance(cls.players, tuple) and all(isinstance(player, str) for player in cls.players)):
        found.append(f"'players' must be a tuple of names, got {cls.players!r}")
    if issubclass(cls, AutoregressivePrior):
        needed = ["logits"]
    else:
        needed = ["sample", *["forward"] * bool(cls.players), *["log_prob"] * (likelihood in ("exact", "bound"))]
    base = AutoregressivePrior if issubclass(cls, AutoregressivePrior) else Prior
    found += [f"'{method}' is missing" for method in needed if getattr(cls, method) is getattr(base, method)]
    try:
        inspect.signature(cls).bind(config, None)
    except TypeError:
        found.append("its constructor must take (config, spec)")
    return found


def _where(cls: Any) -> str:
    return f"{cls.__module__}:{cls.__qualname__}" if isinstance(cls, type) else repr(cls)


def _known(name: str) -> str:
    near = did_you_mean(name, names())
    return f"{near} Known: {', '.join(names())}. --plugin FILE.py adds one from a file.".strip()
