"""Training before a comparison: the priors that are named and missing, each at the same budget in minutes.

A prior that is already trained is kept, whatever its budget was; where that was another one, the comparison is not at
equal budget, and says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.launcher import launched
from pipelines.settings import prior_settings_of_run, run_settings
from pipelines.train_prior import Job, train_priors
from priors import registry
from vqgen.config import BUDGETS
from vqgen.console import Console
from vqgen.errors import ConfigError, InputError
from vqgen.run_folder import RunFolder


@dataclass(frozen=True)
class TrainingRequest:
    """What is to be trained before a comparison, and how long."""

    minutes: float
    """Of each prior at each level."""
    sets: Sequence[str] = ()
    """``KEY=VALUE`` settings, a bare ``training.X`` for every prior that is trained."""
    hint: str = ""
    """How an interrupted user goes on."""


def training_request(train: bool, minutes: float | None, sets: Sequence[str], hint: str) -> TrainingRequest | None:
    """What ``--train``, ``--minutes`` and ``--set`` ask for together; None without ``--train``.

    Raises:
        InputError: ``--train`` without ``--minutes``, or one of the others without ``--train``.
    """
    if train and minutes is not None:
        return TrainingRequest(minutes, sets, hint)
    if train:
        raise InputError(
            "--train needs --minutes: an equal budget has to be named.", "For example --train --minutes 5."
        )
    if minutes is not None or sets:
        given = "--minutes" if minutes is not None else "--set"
        raise InputError(f"{given} without --train: nothing is trained.", "Add --train, or leave it out.")
    return None


def require_one_process() -> None:
    """Refuse training before a comparison where a launcher started several processes.

    Raises:
        InputError: it did.
    """
    if launched() > 1:
        raise InputError(
            "compare --train trains on one process.", "Train with `vqgen train-prior` on all of them, then compare."
        )


def training_jobs(run: RunFolder, mixes: Sequence[Mapping[str, str]], request: TrainingRequest) -> list[Job]:
    """What is to be trained so that ``run`` has every prior that ``mixes`` (level -> prior) name, trained ones too.

    Baselines are left out: they are complete without a training.

    Raises:
        InputError: an unknown prior, or a setting of a prior that is not named.
        ConfigError: bad settings.
    """
    levels_of = trained_names(mixes)
    _check_sets(request.sets, list(levels_of))
    return [
        Job(name, prior_settings_of_run(run, name, levels, request.sets, minutes=request.minutes, resume=True), levels)
        for name, levels in levels_of.items()
    ]


def train_missing(
    run: RunFolder, mixes: Sequence[Mapping[str, str]], request: TrainingRequest, console: Console
) -> list[str]:
    """Train what ``mixes`` (level -> prior) name and ``run`` lacks; a training that was begun goes on.

    Returns:
        A sentence where priors were kept that had another budget.

    Raises like `training_jobs`, and:
        ConfigError: a half-trained prior that was begun with other settings.
    """
    for job in training_jobs(run, mixes, request):
        try:
            train_priors(run, [job], console, resume=True, keep_finished=True, hint=request.hint)
        except ConfigError as error:
            alone = run.command(f"train-prior --prior {job.name} --overwrite --minutes {request.minutes:g}")
            raise ConfigError(error.message, f"To redo this prior alone: `{alone}`.") from error
    due = _text("minutes", request.minutes)
    kept = {place: budget for place, budget in budgets(run, mixes).items() if budget != due}
    if not kept:
        return []
    named = "; ".join(f"{place} ({budget})" for place, budget in kept.items())
    notice = f"Not at equal budget: trained before, under another budget than {due}, and kept: {named}."
    first = next(iter(kept)).partition(",")[0]
    anew = run.command(f"train-prior --prior {first} --overwrite --minutes {request.minutes:g}")
    console.warn(f"{notice} To train one anew: `{anew}`.")
    return [notice]


def trained_names(mixes: Sequence[Mapping[str, str]]) -> dict[str, tuple[str, ...]]:
    """Name -> levels of every prior of ``mixes`` that has something to train.

    Raises:
        InputError: an unknown prior.
    """
    found: dict[str, dict[str, None]] = {}
    for mix in mixes:
        for level, name in mix.items():
            if registry.get(name).players:
                found.setdefault(name, {})[level] = None
    return {name: tuple(levels) for name, levels in found.items()}


def own_list(run: RunFolder, levels: Sequence[str]) -> list[dict[str, str]]:
    """The priors that the run's own settings list (``run.priors``), one per level for each.

    Raises:
        InputError: it lists none.
    """
    choices = run_settings(run).run.priors
    if not choices:
        raise InputError(
            f"--train: the settings of {run.path} list no priors.",
            "Name some with --prior, such as --prior pixelcnn --prior transformer.",
        )
    return [dict.fromkeys(levels, choice) if isinstance(choice, str) else dict(choice) for choice in choices]


def budgets(run: RunFolder, mixes: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """``{"pixelcnn, top": "5 minutes"}`` for each trained prior of ``mixes``, from the run's record."""
    found = {}
    for name, levels in trained_names(mixes).items():
        for level in levels:
            record = run.stage(run.prior_stage(name, level))
            if record is not None:
                found[f"{name}, {level}"] = _budget((record.get("settings") or {}).get("training") or {})
    return found


def budget_provenance(run: RunFolder, mixes: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """The budget of each trained prior, and whether all had the same."""
    found = budgets(run, mixes)
    return {"equal": len(set(found.values())) <= 1, **found}


def _budget(training: Mapping[str, Any]) -> str:
    return next((_text(key, training[key]) for key in BUDGETS if training.get(key) is not None), "unknown")


def _text(unit: str, count: float) -> str:
    return f"{count:,g} {unit.removesuffix('s') if count == 1 else unit}"


def _check_sets(sets: Sequence[str], names: Sequence[str]) -> None:
    """Refuse a setting of a prior that is not compared: it would have no effect."""
    for assignment in sets:
        group, _, key = assignment.strip().partition(".")
        name = key.partition("=")[0].partition(".")[0].strip()
        if group == "priors" and name not in names:
            raise InputError(
                f"--set {assignment}: {name} is not among the priors that are trained.",
                f"These are {', '.join(names) or 'none'}.",
            )
