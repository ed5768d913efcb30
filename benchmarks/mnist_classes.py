"""Do class-conditional MNIST samples show the digit they were asked for?

Trains the ``mnist`` preset (codec, then each prior on both levels), a small classifier on the real training digits,
and reads 1,000 samples of each prior with it. A sample agrees when the classifier reads the label it was drawn for.

    python benchmarks/mnist_classes.py --data PARQUET_FOLDER --run runs/mnist --json results/mnist.json

Sampling, reading and the classifier are not part of the training time that is printed.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipelines.run_all import run_all
from pipelines.run_codes import open_codes
from pipelines.sample import SampleRequest, draw_samples, load_priors
from pipelines.settings import new_run_settings
from vqgen.console import Console
from vqgen.data import ImageSplit, load_data
from vqgen.images import to_float
from vqgen.run_folder import RunFolder

SAMPLES = 1000


class Classifier(nn.Sequential):
    """A small convolutional network: (B, 1, 28, 28) in [-1, 1] to (B, 10)."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 32, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(64 * 49, 128),
            nn.ReLU(),
            nn.Linear(128, 10),
        )


def train_classifier(train: ImageSplit, epochs: int = 3, batch_size: int = 128) -> Classifier:
    torch.manual_seed(0)
    model = Classifier()
    steps = epochs * (len(train) // batch_size)
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    for _ in range(epochs):
        order = torch.randperm(len(train)).tolist()
        for start in range(0, len(train) - batch_size + 1, batch_size):
            batch = train.__getitems__(order[start : start + batch_size])
            loss = F.cross_entropy(model(to_float(batch["images"])), batch["label"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def read(model: Classifier, images: Tensor) -> Tensor:
    """(B,) int64 digit that the classifier reads in uint8 images."""
    return torch.cat([model(to_float(part)).argmax(1) for part in images.split(500)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="MNIST as a data source, such as a folder of parquet files")
    parser.add_argument("--run", default="runs/mnist", type=Path)
    parser.add_argument("--set", dest="sets", action="append", default=[])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    run, console = RunFolder(arguments.run), Console()
    config = new_run_settings("mnist", arguments.data, arguments.sets)
    run_all(run, config, console)
    stages = run.stages()
    training = sum(record["seconds"] for record in stages.values() if "seconds" in record)
    print(f"training in all: {training / 60:.1f} minutes on {torch.get_num_threads()} threads")

    data = load_data(config.data, config.seed)
    classifier = train_classifier(data.splits["train"])
    test = data.splits["test"].__getitems__(range(len(data.splits["test"])))
    accuracy = float((read(classifier, test["images"]) == test["label"]).float().mean())
    print(f"classifier on real test digits: {accuracy:.2%}")

    codec, store = open_codes(run)
    rows = []
    names = sorted({stage.split("/")[1] for stage in stages if stage.startswith("priors/")})
    for name in names:
        chosen = {level.name: name for level in store.info.levels}
        request = SampleRequest(chosen, images=SAMPLES, seed=1, batch_size=100)
        start = time.perf_counter()
        samples = draw_samples(codec, load_priors(run, chosen, codec), store, request, console)
        seconds = time.perf_counter() - start
        assert samples.labels is not None
        agreement = float((read(classifier, samples.images) == samples.labels).float().mean())
        rows.append(
            {"prior": name, "agreement": agreement, "samples": SAMPLES, "samples_per_second": SAMPLES / seconds}
        )
        print(f"{name}: {agreement:.1%} of {SAMPLES} samples read as their label; {SAMPLES / seconds:.0f} a second")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        result = {"classifier_accuracy": accuracy, "training_seconds": training, "rows": rows}
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
