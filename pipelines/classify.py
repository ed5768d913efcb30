"""The classifier of a run: trained on the run's labelled images when it is first needed, and kept in the run.

It reads real images, as the sources give them, not reconstructions; so a sample that it reads as its label looks like
the real images of that class. What it is, is `vqgen.classifier`; who asks it, `pipelines.rejection` and the
commands that judge samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional as F

from pipelines.processes import alone, join
from pipelines.run_codes import open_store
from pipelines.settings import run_settings
from vqgen.checkpoint import CheckpointStore, preserved_random_state, seed_random_state
from vqgen.classifier import ClassifierConfig, ClassifierSpec, ImageClassifier
from vqgen.config import TrainingSettings
from vqgen.console import Console
from vqgen.data import ImageData, load_data
from vqgen.errors import ConfigError, InputError, MismatchError, VqgenError
from vqgen.files import write_json
from vqgen.hub import fingerprint
from vqgen.images import to_float
from vqgen.run_folder import RunFolder
from vqgen.training import Task, fit

STAGE = "classifier"
STEPS, EPOCHS, BATCH = 3000, 40, 64
"""The budget: so many steps, and of few images no more than so many passes over them."""
EVALUATIONS = 10
"""Evaluations in the whole training; after ``PATIENCE`` of them without a better loss it ends."""
PATIENCE = 3
EVALUATED = 5000
"""Most validation images read at each."""


class ClassifierTask(Task):
    """A classifier as the training loop sees it: batches of 8-bit images and their labels."""

    def __init__(self, model: ImageClassifier) -> None:
        super().__init__()
        self.model: ImageClassifier = model

    def forward(self, batch: Mapping[str, Any], player: str, progress: float, step: int) -> dict[str, Tensor]:
        logits = self.model(to_float(batch["images"]))
        right = (logits.argmax(1) == batch["label"]).float().mean()
        return {"loss": F.cross_entropy(logits, batch["label"]), "accuracy": right}

    def evaluate(self, batches: Iterable[Mapping[str, Any]], reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Mean cross-entropy in nats, and the share of the images that are read as their label."""
        totals = torch.zeros(3, dtype=torch.float64)
        for batch in batches:
            logits, label = self.model(to_float(batch["images"])), batch["label"]
            right = (logits.argmax(1) == label).sum()
            totals += torch.tensor([len(label), F.cross_entropy(logits, label, reduction="sum"), right]).double()
        count, nats, right = reduce(totals.float().to(self.model.head.weight.device)).tolist()
        return {"loss": nats / count, "accuracy": right / count}


def run_classifier(run: RunFolder, console: Console, *, source: str | None = None) -> ImageClassifier:
    """The classifier of ``run``; trained now where it is not there yet, or only half trained.

    ``source`` is where the run's images are now, if they were moved; they are read for training alone. Of several
    processes, each calling this alike, the first one trains while the others wait: what it is does not depend on them.

    Raises:
        InputError: the run has no codes yet, its images have no labels, or they cannot be read.
        MismatchError: the classifier, or the images, are not of this run.
    """
    processes = join()
    with processes.main_first():
        made = not processes.main  # by the first one, just now: its record may not be seen from here yet
        return _open_classifier(run, console, source, made=made).to(processes.device)


def _open_classifier(run: RunFolder, console: Console, source: str | None, *, made: bool) -> ImageClassifier:
    info = open_store(run).info
    if not info.class_names:
        raise InputError(
            f"The images of {run.path} have no labels, so no classifier can be trained on them.",
            "Do without it, or start a run from labelled images.",
        )
    anew = f"Remove the folder {run.classifier}: the classifier is then made anew when it is next needed."
    if made or (run.stage(STAGE) and run.classifier.is_dir()):
        try:
            model = ImageClassifier.from_pretrained(run.classifier)
        except VqgenError as error:
            raise type(error)(error.message, anew) from error
        if model.spec.data_fingerprint != info.data_fingerprint:
            raise MismatchError(
                f"The classifier in {run.classifier} was trained on other images than those of {run.path}.", anew
            )
        return model
    config = run_settings(run, source=source)
    data = load_data(config.data, config.seed, notify=console.say)
    if data.fingerprint != info.data_fingerprint:
        raise MismatchError(
            f"The images of '{config.data.source}' are not those that {run.path} was made from.",
            f"Say where those are with --data, or redo the run with `{run.command('train-codes --overwrite')}`.",
        )
    console.say(f"{run.path} has no classifier yet; one is trained now, and kept in {run.classifier}.")
    try:
        with alone():
            model, record = train_classifier(data, run.classifier, config.seed, console)
    except ConfigError as error:  # half trained with other settings
        raise ConfigError(error.message, anew) from error
    run.record_stage(STAGE, record)
    return model


def train_classifier(
    data: ImageData, folder: Path, seed: int, console: Console
) -> tuple[ImageClassifier, dict[str, Any]]:
    """A classifier of the classes of ``data``, saved in ``folder``, and its record.

    A training that was interrupted in ``folder`` goes on. The weights kept are the best on the validation split.
    """
    accelerator = Accelerator()
    with preserved_random_state():
        seed_random_state(seed, 0)
        model = ImageClassifier(ClassifierConfig(), ClassifierSpec(data.image, data.class_names, data.fingerprint))
    train, validation = data.splits["train"], data.splits["validation"]
    parameters = sum(p.numel() for p in model.parameters())
    console.say(f"classifier: {parameters:,} parameters; {len(train):,} images of {len(data.class_names)} classes")
    result = fit(
        ClassifierTask(model),
        train,
        validation,
        training_settings(len(train)),
        folder,
        seed=seed,
        identity={"classifier": model.config.model_dump(mode="json"), "data": data.fingerprint},
        accelerator=accelerator,
        console=console,
        resume=CheckpointStore(folder / "checkpoints", 1).latest() is not None,
        resume_hint="The same command goes on from there.",
        description="classifier",
    )
    model.eval()
    model.save_pretrained(folder)
    write_json(folder / "metrics.json", result.best)
    read = min(len(validation), EVALUATED)
    console.say(f"classifier: {result.best['accuracy']:.1%} of {read:,} validation images read as their label")
    return model, {
        "steps": result.steps,
        "seconds": round(result.seconds, 2),
        "parameters": parameters,
        "validation": result.best,
        "fingerprint": fingerprint(folder),
    }


def training_settings(images: int) -> TrainingSettings:
    """The fixed recipe: one to two minutes on two cores for pictures up to 32x32, less where there are few."""
    steps = min(STEPS, EPOCHS * max(images // BATCH, 1))
    every = max(steps // EVALUATIONS, 1)
    return TrainingSettings(
        steps=steps,
        batch_size=BATCH,
        learning_rate=2e-3,
        weight_decay=0.02,
        schedule="cosine",
        warmup=0.05,
        clip=1.0,
        evaluate_every=every,
        evaluate_images=EVALUATED,
        checkpoint_every=every,
        log_every=max(every // 4, 1),
        preview_every=steps,
        patience=PATIENCE,
        keep=1,
    )
