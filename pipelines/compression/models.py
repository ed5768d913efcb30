"""The priors that can drive an entropy coder, by name and fingerprint."""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from pipelines.compression.format import PRINT
from pipelines.run_codes import open_store
from pipelines.run_priors import best_priors, fit_baseline, load_priors, trained_priors
from priors import registry
from priors.autoregressive import AutoregressivePrior
from priors.base import Prior
from priors.baselines import IndependentPrior
from vqgen.codec import HierarchicalVQVAE
from vqgen.errors import InputError
from vqgen.hub import fingerprint
from vqgen.run_folder import RunFolder


@dataclass(frozen=True)
class Model:
    """A prior of one level, on the CPU, and what it is known by in a file."""

    prior: Prior
    fingerprint: str


def short_print(folder: Path) -> str:
    """The fingerprint of a model's folder, as files have it."""
    return fingerprint(folder)[:PRINT]


def can_code(name: str) -> bool:
    """Whether the prior ``name`` gives the probabilities of one code after another."""
    return issubclass(registry.get(name), (AutoregressivePrior, IndependentPrior))


def choose_priors(run: RunFolder, given: Mapping[str, str], levels: Sequence[str]) -> dict[str, str]:
    """The prior of each level: those given, or the best trained ones.

    Raises:
        InputError: a level without a prior, or a prior that cannot drive an entropy coder.
    """
    chosen = dict(given) or best_priors(run, levels)
    if missing := [level for level in levels if level not in chosen]:
        raise InputError(
            f"--prior names none for level '{missing[0]}', and an image needs all of {', '.join(levels)}.",
            f"Add {missing[0]}=NAME.",
        )
    for level in levels:
        check_can_code(chosen[level], level)
    return {level: chosen[level] for level in levels}


def check_can_code(name: str, level: str) -> None:
    """Refuse a prior that does not say, code by code, how likely each is.

    Raises:
        InputError: naming those that do.
    """
    if not can_code(name):
        able = ", ".join(other for other in registry.names() if can_code(other))
        raise InputError(
            f"The prior {name} of level '{level}' cannot drive an entropy coder, which needs the probability of each "
            "code given those before it.",
            f"Autoregressive priors and baselines can: {able}. Choose with --prior.",
        )


def load_models(run: RunFolder, chosen: Mapping[str, str], codec: HierarchicalVQVAE) -> list[Model]:
    """The priors of all levels on the CPU; a baseline that was not trained is counted now, on the training codes.

    Raises:
        InputError: one is not trained, or damaged.
        MismatchError: one was trained on codes of another codec.
    """
    trained = trained_priors(run)
    models = []
    for number, (level, name) in enumerate(chosen.items()):
        if issubclass(registry.get(name), IndependentPrior) and name not in trained.get(level, {}):
            models.append(_baseline(run, name, number))
        else:
            prior = load_priors(run, {level: name}, codec)[0]
            models.append(Model(prior, short_print(run.prior(name, level))))
    return models


def _baseline(run: RunFolder, name: str, level: int) -> Model:
    prior = fit_baseline(name, open_store(run), level)
    with tempfile.TemporaryDirectory() as folder:
        prior.save_pretrained(folder)
        return Model(prior, short_print(Path(folder)))


def this_machine() -> str:
    """The torch and the processor that decide how a network's sums are rounded."""
    capability = torch.backends.cpu.get_cpu_capability()
    return f"torch {torch.__version__}, {platform.machine()} {capability}"
