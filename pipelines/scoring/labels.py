"""What to do about the class of an image that is to be scored: sum over all, take what is given, or do without."""

from __future__ import annotations

from collections.abc import Sequence

from pipelines.likelihood import class_shares
from pipelines.scoring.bits import MOST_CLASSES, Labels, LabelUse
from priors.base import Prior
from priors.baselines import IndependentPrior
from vqgen.code_store import CodeStore
from vqgen.errors import InputError
from vqgen.run_folder import RunFolder


def choose_labels(run: RunFolder, store: CodeStore, priors: Sequence[Prior], use: LabelUse | None) -> Labels:
    """How labels enter the scores by ``priors``; ``use`` is what was asked for.

    Without a wish: an unlabelled run has none, up to `MOST_CLASSES` classes are summed over, and more are done
    without where every prior was trained with some labels hidden.

    Raises:
        InputError: what is asked for cannot be done, or none was and more than one thing could be.
    """
    classes = len(store.info.class_names)
    if not classes:
        if use in ("marginal", "given"):
            raise InputError(f"--label {use}: {run.path} was trained without labels.", "Leave --label out.")
        return Labels("none")
    blind = [prior for prior in priors if not works_without_label(prior)]
    if use is None:
        use = "marginal" if classes <= MOST_CLASSES else "none"
        if use == "none" and blind:
            raise InputError(
                f"{run.path} has {classes} classes, and without label dropout in training there is no likelihood "
                f"without a label: {_named(blind)}.",
                f"Choose --label marginal (a sum over all classes, {classes} passes of each prior for an image) or "
                "--label given (labels of the images themselves).",
            )
    if use == "none" and blind:
        again = f"train-prior --prior {blind[0].name} --level {blind[0].spec.target.name} --overwrite"
        command = run.command(f"{again} --set priors.{blind[0].name}.label_dropout=0.1")
        cure = f", or train it with `{command}`" if hasattr(blind[0].config, "label_dropout") else ""
        raise InputError(
            f"--label none: {_named(blind)}: trained without label dropout, so there is no likelihood without a label.",
            f"Choose --label marginal{cure}.",
        )
    return Labels(use, None if use == "none" else class_shares(store))


def works_without_label(prior: Prior) -> bool:
    """Whether a class-conditional prior knows the density without a label too: counted, or trained by hiding some."""
    return isinstance(prior, IndependentPrior) or float(getattr(prior, "label_dropout", 0.0)) > 0


def _named(priors: Sequence[Prior]) -> str:
    return " and ".join(dict.fromkeys(f"{prior.name} ({prior.spec.target.name})" for prior in priors))
