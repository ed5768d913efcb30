"""RoundTrip on MNIST codes: bits against samples, by when the adversary starts, and the published losses.

One level of 8 x 8 codes (K = 128, D = 16) of digits padded to 32 x 32. The codec, the padded digits and a classifier of
code maps are made once in ``--run`` and kept; then each row trains a class-conditional prior for ``--minutes`` on one
thread, with the real loop, and measures

- bits per code of 1,000 test maps (an upper bound: Laplace proposal, 64 samples) and its standard error over the maps;
- agreement: the share of 1,000 samples that the classifier reads as the digit they were drawn for, at temperature 1
  and at 0, where each code is the likeliest given the latent;
- Frechet distance of the classifier's features between these samples and all test maps, and samples per second.

    python benchmarks/roundtrip.py --data PARQUET_FOLDER --run runs/roundtrip --json results/roundtrip.json

Real training maps and the class-conditional code frequencies (``unigram``) are rows too: the ends of the scale.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from pipelines.run_codes import code_batches, open_codes
from pipelines.settings import new_run_settings
from pipelines.train_codes import train_codes
from pipelines.train_prior import PriorTask, make_prior, preview
from priors.base import Prior
from priors.registry import PriorSettings, get, prior_settings
from priors.sampling import Noise, SampleOptions
from vqgen.code_store import CodeSplit, CodeStore
from vqgen.codec import HierarchicalVQVAE
from vqgen.console import Console
from vqgen.feature_distances import frechet_distance
from vqgen.files import atomic_folder, replacing, write_json
from vqgen.metrics import nats_to_bits
from vqgen.run_folder import RunFolder
from vqgen.training import fit, make_accelerator

MAPS = 1000
"""Test maps whose likelihood is measured, and samples of each kind."""
BITS_SAMPLES = 64
LEVEL = "top"
CODEC = (
    "data.image_size=32",
    "data.channels=1",
    "codec.strides=[4]",
    "codec.codebook_size=128",
    "codec.code_dim=16",
    "codec.width=64",
    "codec.residual_blocks=1",
    "codec.training.minutes=1.75",
    "codec.training.batch_size=64",
    "codec.training.learning_rate=0.001",
    "codec.training.schedule=cosine",
)
PUBLISHED = {
    "learning_rate": 2e-4,
    "betas": [0.5, 0.9],
    "schedule": "constant",
    "weight_ema": None,
    "players": {"critics": {"learning_rate": 2e-4}},
}
"""Optimiser settings of the published method."""
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "unigram": ("unigram", {}),
    "adv_start-0": ("roundtrip", {"adv_start": 0.0}),
    "adv_start-0.45": ("roundtrip", {"adv_start": 0.45}),
    "adv_start-1": ("roundtrip", {"adv_start": 1.0}),
    "plain": ("roundtrip", {"objective": "plain", "training": PUBLISHED}),
}


class CodeClassifier(nn.Module):
    """Code maps (B, 8, 8) int64 to (B, 10), by 128 features."""

    def __init__(self, codes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codes, 32)
        self.body = nn.Sequential(
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(64, 128, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.4),
            nn.Linear(128 * 16, 128),
            nn.ReLU(),
        )
        self.output = nn.Linear(128, 10)

    def features(self, codes: Tensor) -> Tensor:
        features: Tensor = self.body(rearrange(self.embedding(codes), "b h w c -> b c h w"))
        return features

    def forward(self, codes: Tensor) -> Tensor:
        logits: Tensor = self.output(self.features(codes))
        return logits


def pad_digits(source: str, folder: Path) -> None:
    """Save the digits of ``source`` with two dark pixels more on every side, unless that was done before."""
    import datasets

    if folder.exists():
        return

    def pad(row: dict[str, Any]) -> dict[str, Image.Image]:
        return {"image": ImageOps.expand(row["image"], 2)}

    with atomic_folder(folder) as made:
        datasets.load_dataset(source).map(pad, keep_in_memory=True).save_to_disk(made)


def all_maps(split: CodeSplit, indices: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
    """Codes (N, 8, 8) and labels (N,) of a split."""
    codes, _, labels = zip(*code_batches(split, 0, indices), strict=True)
    return torch.cat(codes), torch.cat(labels)


def code_classifier(store: CodeStore, path: Path, epochs: int = 4, batch_size: int = 128) -> CodeClassifier:
    """The classifier saved at ``path``, trained on the training maps if there is none yet."""
    torch.manual_seed(0)
    model = CodeClassifier(store.info.levels[0].codebook_size)
    if path.exists():
        model.load_state_dict(load_file(path))
        return model.eval()
    codes, labels = all_maps(store.split("train"))
    steps = epochs * (len(codes) // batch_size)
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    for _ in range(epochs):
        order = torch.randperm(len(codes))
        for rows in order[: len(codes) // batch_size * batch_size].view(-1, batch_size):
            loss = F.cross_entropy(model(codes[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    with replacing(path) as temporary:
        save_file(model.state_dict(), temporary)
    return model.eval()


def train(
    name: str,
    settings: PriorSettings,
    codec: HierarchicalVQVAE,
    store: CodeStore,
    folder: Path,
    console: Console,
    description: str,
) -> tuple[Prior, int, float]:
    """A trained and calibrated prior, the steps it took and their seconds."""
    shutil.rmtree(folder, ignore_errors=True)
    accelerator = make_accelerator(settings.training, len(get(name).players))
    prior = make_prior(name, settings, 0, codec, store, 0, accelerator)
    validation = store.split("validation")
    steps, seconds = 0, 0.0
    if prior.players:
        result = fit(
            PriorTask(prior, 0, 0, lambda model: preview(codec, validation, model, 0, 0)),
            store.split("train"),
            validation,
            settings.training,
            folder,
            seed=0,
            identity={},
            accelerator=accelerator,
            console=console,
            description=description,
        )
        steps, seconds = result.steps, result.seconds
    prior.eval()
    prior.calibrate(code_batches(validation, 0))
    prior.save_pretrained(folder)
    return prior, steps, seconds


@torch.no_grad()
def bits(prior: Prior, split: CodeSplit) -> tuple[float, float]:
    """Mean bits per code of the first test maps, and the standard error over maps."""
    nats = []
    for codes, _, label in code_batches(split, 0, range(MAPS)):
        done = sum(map(len, nats))
        noise = Noise(0, tuple(range(done, done + len(codes))), 0)
        nats.append(-prior.log_prob(codes, (), label, noise=noise, samples=BITS_SAMPLES).nats)
    per_code = torch.cat(nats) / split[0]["codes"][0].numel()
    return nats_to_bits(float(per_code.mean())), nats_to_bits(float(per_code.std()) / MAPS**0.5)


@torch.no_grad()
def judge(model: CodeClassifier, codes: Tensor, labels: Tensor, real: Tensor) -> tuple[float, float]:
    """Agreement, and Frechet distance from the features of real test maps."""
    features = model.features(codes)
    agreement = float((model.output(features).argmax(1) == labels).float().mean())
    return agreement, frechet_distance(features, real)


def measure(prior: Prior, model: CodeClassifier, store: CodeStore, real: Tensor) -> dict[str, Any]:
    """What a row says of a trained prior."""
    value, error = bits(prior, store.split("test"))
    labels = torch.arange(MAPS) % 10
    noise = Noise(1, tuple(range(MAPS)), 0)
    start = time.perf_counter()
    sampled = prior.sample(noise, (), labels)
    rate = MAPS / (time.perf_counter() - start)
    agreement, distance = judge(model, sampled, labels, real)
    likeliest = prior.sample(noise, (), labels, SampleOptions(temperature=0.0))
    agreement_0, distance_0 = judge(model, likeliest, labels, real)
    return {
        "bits_per_code": value,
        "standard_error": error,
        "likelihood": prior.likelihood,
        "agreement": agreement,
        "agreement_temperature_0": agreement_0,
        "frechet": distance,
        "frechet_temperature_0": distance_0,
        "samples_per_second": rate,
        "parameters": sum(parameter.numel() for parameter in prior.parameters()),
    }


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """The rows on stdout, one line each."""
    line = "{:<16} {:>8} {:>8} {:>15} {:>9} {:>9} {:>8} {:>8} {:>10}"
    print(line.format("row", "seconds", "steps", "bits/code", "agree", "agree T0", "FD", "FD T0", "samples/s"))
    for row in rows:
        figure = "-"
        if row["bits_per_code"] is not None:
            sign = {"exact": "", "bound": "<= "}[row["likelihood"]]
            figure = f"{sign}{row['bits_per_code']:.3f} ({row['standard_error']:.3f})"
        cold = [row["agreement_temperature_0"], row["frechet_temperature_0"], row["samples_per_second"]]
        agreement_0, distance_0, rate = ("-" if value is None else value for value in cold)
        print(
            line.format(
                row["row"],
                f"{row['seconds']:.0f}",
                row["steps"],
                figure,
                f"{row['agreement']:.3f}",
                agreement_0 if agreement_0 == "-" else f"{agreement_0:.3f}",
                f"{row['frechet']:.1f}",
                distance_0 if distance_0 == "-" else f"{distance_0:.1f}",
                rate if rate == "-" else f"{rate:.0f}",
            )
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="MNIST: a folder of parquet files, or its name on the hub")
    parser.add_argument("--run", default="runs/roundtrip", type=Path, help="where the codec is made, or is already")
    parser.add_argument("--minutes", type=float, default=4.0, help="training of each row (default: 4)")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows and the setting here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    run, console = RunFolder(arguments.run), Console()
    padded = run.path.with_name(f"{run.path.name}-digits")
    pad_digits(arguments.data, padded)
    config = new_run_settings("images", str(padded), CODEC)
    train_codes(run, config, console, resume=run.exists)
    codec, store = open_codes(run)
    model = code_classifier(store, run.path / "code-classifier.safetensors")

    test_codes, test_labels = all_maps(store.split("test"))
    with torch.no_grad():
        real = torch.cat([model.features(part) for part in test_codes.split(500)])
        accuracy = float((model.output(real).argmax(1) == test_labels).float().mean())
    print(f"code classifier: {accuracy:.1%} of {len(test_codes):,} real test maps")
    agreement, distance = judge(model, *all_maps(store.split("train"), range(MAPS)), real)
    none = dict.fromkeys(("bits_per_code", "agreement_temperature_0", "frechet_temperature_0", "samples_per_second"))
    rows = [{"row": "real maps", "seconds": 0.0, "steps": 0, "agreement": agreement, "frechet": distance, **none}]
    for name in arguments.rows:
        kind, section = ROWS[name]
        if kind == "roundtrip":
            budget = {"minutes": arguments.minutes, "preview_every": 10**6}
            section = {**section, "training": {**section.get("training", {}), **budget}}
        settings = prior_settings(kind, section, LEVEL)
        prior, steps, seconds = train(kind, settings, codec, store, run.path / "rows" / name, console, name)
        rows.append({"row": name, "seconds": seconds, "steps": steps, **measure(prior, model, store, real)})
        print_table(rows)
    if arguments.json:
        setting = {
            "minutes": arguments.minutes,
            "threads": torch.get_num_threads(),
            "test_maps": MAPS,
            "estimator_samples": BITS_SAMPLES,
            "classifier_accuracy": accuracy,
            "torch": torch.__version__,
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(arguments.json, {"setting": setting, "rows": rows})


if __name__ == "__main__":
    main()
