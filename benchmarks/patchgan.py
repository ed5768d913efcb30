"""What the discriminator buys and what it costs: the same codec trained with and without it.

Both trainings have the same settings, seed and number of steps, so that they also have the same rate; the seconds of
both are printed. Over the first test images it measures the reconstructions' MSE on the [0, 1] pixel scale, PSNR, the
perplexity of each level, the Frechet distance to the originals on the penultimate features of the run's own image
classifier (trained on the labelled training split), and how much of the originals' high-frequency energy they have:
that above half the Nyquist frequency, 1 for pictures as sharp as the originals.

    python benchmarks/patchgan.py --data PARQUET_FOLDER --run runs/patchgan --steps 2000 --json results/patchgan.json

Two runs are made, RUN/without and RUN/with, and RUN/patchgan.png: originals above the reconstructions of both. Run
again, it measures what is there.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipelines.classify import run_classifier
from pipelines.settings import new_run_settings
from pipelines.train_codes import train_codes
from vqgen.codec import HierarchicalVQVAE
from vqgen.console import Console
from vqgen.data import load_data
from vqgen.feature_distances import frechet_distance
from vqgen.images import image_grid, save_png, to_float, to_uint8
from vqgen.metrics import CodeUsage, mse, psnr
from vqgen.run_folder import RunFolder

BATCH = 250
SHOWN = 16


def high_frequency_energy(images: Tensor) -> float:
    """Energy above half the Nyquist frequency, of the grey versions of (B, C, H, W) images in [-1, 1]."""
    height, width = images.shape[-2:]
    rows, columns = torch.fft.fftfreq(height).abs()[:, None], torch.fft.rfftfreq(width)[None]
    spectrum = torch.fft.rfft2(images.double().mean(dim=1)).abs().square()
    return float((spectrum * (torch.maximum(rows, columns) > 0.25)).sum())


@torch.no_grad()
def reconstruct(codec: HierarchicalVQVAE, originals: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Reconstructions (B, C, H, W) uint8 of 8-bit images, and the perplexity of each level."""
    usage = [CodeUsage(level.codebook_size) for level in codec.levels]
    made = []
    for images in originals.split(BATCH):
        codes = codec.encode(to_float(images))
        made.append(to_uint8(codec.decode(codes)))
        for level, maps in zip(usage, codes, strict=True):
            level.add(maps)
    perplexity = {f"{spec.name}_perplexity": u.perplexity for spec, u in zip(codec.levels, usage, strict=True)}
    return torch.cat(made), perplexity


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="labelled images as a data source, such as a folder of parquet")
    parser.add_argument("--run", default="runs/patchgan", type=Path)
    parser.add_argument("--config", default="cifar10")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--images", type=int, default=5000, help="test images measured")
    parser.add_argument("--set", action="append", default=[], dest="sets", help="KEY=VALUE for both codecs")
    parser.add_argument("--adversary", action="append", default=[], help="KEY=VALUE below codec.discriminator")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    console = Console()
    both = [f"codec.training.steps={arguments.steps}", f"codec.training.batch_size={arguments.batch_size}"]
    own = ["codec.discriminator={}", *(f"codec.discriminator.{assignment}" for assignment in arguments.adversary)]
    contestants = {"without": [], "with": own}
    runs = {name: RunFolder(arguments.run / name) for name in contestants}
    results: dict[str, dict[str, Any]] = {}
    rows: list[Tensor] = []
    for name, sets in contestants.items():
        config = new_run_settings(arguments.config, arguments.data, [*both, *arguments.sets, *sets])
        record = train_codes(runs[name], config, console, resume=runs[name].exists)
        results[name] = {"steps": record["steps"], "seconds": record["seconds"]}
    classifier = run_classifier(runs["without"], console).eval()
    test = load_data(config.data, config.seed).splits["test"]
    originals = test.__getitems__(list(range(min(arguments.images, len(test)))))["images"]

    def features(images: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([classifier.features(to_float(part)) for part in images.split(BATCH)])

    real_features, real_energy = features(originals), high_frequency_energy(to_float(originals))
    for name, result in results.items():
        made, perplexity = reconstruct(HierarchicalVQVAE.from_pretrained(runs[name].codec), originals)
        rows.append(made[:SHOWN])
        result["mse"] = float(mse(made, originals).mean())
        result["psnr"] = float(psnr(made, originals).mean())
        result |= perplexity
        result["frechet"] = frechet_distance(features(made), real_features)
        result["high_frequency_energy"] = high_frequency_energy(to_float(made)) / real_energy
    print(f"{'':<24} " + " ".join(f"{name:>10}" for name in results))
    for key in results["without"]:
        print(f"{key:<24} " + " ".join(f"{result[key]:>10.5g}" for result in results.values()))
    picture = arguments.run / "patchgan.png"
    save_png(picture, image_grid(torch.cat([originals[:SHOWN], *rows]), len(rows[0]), row_names=["original", *results]))
    print(f"{picture}")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        features_of = "the penultimate layer of the run's own image classifier"
        written = {**results, "test_images": len(originals), "features": features_of, "settings": own}
        arguments.json.write_text(json.dumps(written, indent=2) + "\n")


if __name__ == "__main__":
    main()
