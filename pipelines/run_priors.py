"""A run's trained priors: which there are, the best of each level, and loading them, and counting baselines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.processes import join
from pipelines.run_codes import CPU, as_far_as_read, code_batches, prior_spec
from priors import registry
from priors.base import LatentPrior, Prior
from priors.sampling import SampleOptions
from vqgen.code_store import CodeStore
from vqgen.codec import HierarchicalVQVAE
from vqgen.errors import InputError, MismatchError
from vqgen.hub import fingerprint
from vqgen.run_folder import RunFolder


def trained_priors(run: RunFolder) -> dict[str, dict[str, dict[str, Any]]]:
    """Records of the trained priors of a run: level -> name -> record."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for stage, record in run.stages().items():
        parts = stage.split("/")
        if len(parts) == 3 and parts[0] == "priors":
            found.setdefault(parts[2], {})[parts[1]] = record
    return found


def best_priors(run: RunFolder, levels: Sequence[str]) -> dict[str, str]:
    """Per level, the trained prior with the fewest validation bits, exact ones before bounds.

    Raises:
        InputError: a level for which none is trained.
    """
    trained = trained_priors(run)
    chosen = {}
    for level in levels:
        if level not in trained:
            raise InputError(
                f"{run.path} has no trained prior for level '{level}'.",
                f"Train one with `{run.command(f'train-prior --prior transformer --level {level}')}`.",
            )
        chosen[level] = min(trained[level], key=lambda name: _rank(name, trained[level][name]))
    return chosen


def _rank(name: str, record: Mapping[str, Any]) -> tuple[int, float]:
    bits = record["validation"].get("bits_per_code")
    if name not in registry.names() or bits is None:  # its plug-in is not loaded, or nothing was measured
        return 2, 0.0
    return int(registry.get(name).likelihood != "exact"), bits


def load_priors(run: RunFolder, chosen: Mapping[str, str], codec: HierarchicalVQVAE) -> list[Prior]:
    """The trained priors of the levels of ``chosen``, checked against the codec; baselines included if trained."""
    print_of_codec = fingerprint(run.codec)
    priors = []
    for level, name in chosen.items():
        if not run.stage(run.prior_stage(name, level)):
            trained = sorted(trained_priors(run).get(level, {}))
            known = f"Trained for {level}: {', '.join(trained)}." if trained else f"None is trained for {level}."
            raise InputError(
                f"{run.path} has no trained {name} for level '{level}'.",
                f"{known} Train it with `{run.command(f'train-prior --prior {name} --level {level}')}`.",
            )
        registry.get(name)
        prior = Prior.from_pretrained(run.prior(name, level))
        number = [own.name for own in codec.levels].index(level)
        if (prior.name, prior.spec.target, prior.spec.context) != (name, codec.levels[number], codec.levels[:number]):
            raise MismatchError(
                f"{run.prior(name, level)} holds no {name} prior of level '{level}' of this run's codec.",
                f"Train it again with `{run.command(f'train-prior --prior {name} --level {level} --overwrite')}`.",
            )
        if prior.spec.codec_fingerprint != print_of_codec:
            raise MismatchError(
                f"The {name} prior of level '{level}' was trained on codes of another codec.",
                f"Train it again with `{run.command(f'train-prior --prior {name} --level {level} --overwrite')}`.",
            )
        priors.append(prior)
    return priors


def fit_baseline(name: str, store: CodeStore, level: int) -> Prior:
    """A prior without training, counted on the training codes, on the CPU; several processes count a share each."""
    processes, train = join(), store.split("train")
    device = processes.device if processes.count > 1 else CPU  # counts are added up where the processes meet
    prior = registry.get(name)({}, prior_spec(store, level)).to(device)
    share = range(processes.rank, len(train), processes.count)
    with processes.together(), as_far_as_read(code_batches(train, level, share, device)) as batches:
        prior.prepare(batches)
    return prior.cpu().eval()


def check_guidance(run: RunFolder, priors: Sequence[Prior], options: Mapping[str, SampleOptions]) -> None:
    """Refuse guidance of a prior that cannot be guided.

    A prior that can be guided says with what ``label_dropout`` it was trained (`priors.autoregressive`).

    Raises:
        InputError: naming the prior and its level.
    """
    for prior in priors:
        level = prior.spec.target.name
        guidance = options.get(level, SampleOptions()).guidance
        if guidance == 1:
            continue
        typed = f"--guidance {guidance:g} at level '{level}'"
        if not prior.spec.classes:
            raise InputError(f"{typed}: this run has no labels to guide towards.", "Sample without --guidance.")
        dropout = getattr(prior, "label_dropout", None)
        if dropout is None:
            raise InputError(
                f"{typed}: its prior, {prior.name}, has no guidance.",
                "Name levels that have it, such as --guidance LEVEL=2, or choose another prior.",
            )
        if not float(dropout) > 0:
            again = f"train-prior --prior {prior.name} --level {level} --overwrite"
            command = run.command(f"{again} --set priors.{prior.name}.label_dropout=0.1")
            raise InputError(
                f"{typed}: its prior, {prior.name}, was trained without label dropout, so it knows nothing to guide "
                "away from.",
                f"Train it with `{command}`, or guide other levels alone.",
            )


def check_latent(run: RunFolder, prior: Prior) -> None:
    """Refuse to interpolate where ``prior``, that of the coarsest level, has no latent space.

    Raises:
        InputError: naming the priors that have one, and those of them that are trained.
    """
    if isinstance(prior, LatentPrior):
        return
    level = prior.spec.target.name
    able = [name for name in registry.names() if issubclass(registry.get(name), LatentPrior)]
    trained = [name for name in able if name in trained_priors(run).get(level, {})]
    if trained:
        hint = f"Trained for {level}: {', '.join(trained)}. Name it with --prior {level}={trained[0]},..."
    elif able:
        hint = f"Train one with `{run.command(f'train-prior --prior {able[0]} --level {level}')}`."
    else:
        hint = "Load one with --plugin FILE.py."
    raise InputError(
        f"--interpolate: the {prior.name} prior of level '{level}' has no latent space; "
        f"priors that have one: {', '.join(able) or 'none'}.",
        hint,
    )
