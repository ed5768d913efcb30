"""Which score tells images that are unlike the training images, and which one is misled?

    python benchmarks/anomaly.py --data MNIST --cifar CIFAR10 --out results/anomaly --json results/anomaly.json

MNIST and CIFAR-10 are data sources, such as folders of parquet files. A codec and a prior (the preset ``mnist``, its
transformer) are trained on nine of the ten digits, unless OUT holds them already or --run names a run that was. The
test images of these digits are then told from CIFAR-10 in grey, from the built-in shapes in grey, from the digit that
was held out, and from dark images with up to five bright pixels, as a detector's noise may be.

With --colour-run, a run trained on CIFAR-10, the other direction too: its test images against MNIST and shapes in
colour. Simple images are where a raw likelihood is known to fail (Nalisnick et al. 2019).

The table has the AUROC of every score with its bootstrap standard error; 0.5 is guessing, and below it outliers look
more ordinary than the images that were trained on. Scores, histograms and maps of each set are in the runs' folders
``scores/``; charts of a pair are those of ``vqgen score --against``.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np
from numpy.random import Generator, Philox

from pipelines.score import ScoreRequest, score
from pipelines.scoring.tables import name_of, score_keys
from pipelines.settings import new_run_settings
from pipelines.train_codes import train_codes
from pipelines.train_prior import train_prior
from vqgen.console import Console
from vqgen.detection import Array, Detection, detection
from vqgen.files import atomic_folder, write_json
from vqgen.run_folder import RunFolder

PRIOR = "transformer"


def split_digits(source: str, held_out: int, out: Path) -> tuple[Path, Path]:
    """MNIST without a digit, and the test images of that digit without labels, as saved data sets in ``out``."""
    import datasets

    rest, alone = out / f"without-{held_out}", out / f"only-{held_out}"
    if not alone.is_dir():
        datasets.disable_progress_bars()
        found = datasets.load_dataset(source)
        kept = {}
        for split in ("train", "test"):
            is_held_out = np.array(found[split]["label"]) == held_out
            own = found[split].select(np.flatnonzero(~is_held_out))
            names = [name for name in own.features["label"].names if name != str(held_out)]
            digits = [str(digit) for digit in own["label"]]
            relabelled = own.remove_columns("label").add_column("label", [names.index(digit) for digit in digits])
            kept[split] = relabelled.cast_column("label", datasets.ClassLabel(names=names))
            others = found[split].select(np.flatnonzero(is_held_out)).remove_columns("label")
        with atomic_folder(rest) as temporary:
            datasets.DatasetDict(kept).save_to_disk(str(temporary))
        with atomic_folder(alone) as temporary:
            others.save_to_disk(str(temporary))
    return rest, alone


def bright_pixels(out: Path, count: int) -> Path:
    """Dark 28x28 images with 1 to 5 bright pixels each, as an .npy file in ``out``."""
    generator = Generator(Philox(0))
    images = np.zeros((count, 28 * 28), dtype=np.uint8)
    for image in images:
        image[generator.choice(28 * 28, generator.integers(1, 6), replace=False)] = 255
    out.mkdir(parents=True, exist_ok=True)
    path = out / "bright-pixels.npy"
    np.save(path, images.reshape(count, 28, 28))
    return path


def trained_run(source: Path, run: RunFolder, console: Console) -> RunFolder:
    """A run with codec and prior on ``source``; what is trained already is left as it is."""
    config = new_run_settings("mnist", str(source), [f"run.priors=[{PRIOR}]"])
    train_codes(run, config, console, resume=run.exists)
    train_prior(run, config, PRIOR, None, console, resume=True, keep_finished=True)
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="MNIST")
    parser.add_argument("--cifar", required=True, help="CIFAR-10")
    parser.add_argument("--out", default="results/anomaly", type=Path)
    parser.add_argument("--run", type=Path, help="a run trained on the other nine digits")
    parser.add_argument("--held-out", default=9, type=int, choices=range(10))
    parser.add_argument("--colour-run", type=Path, help="a run trained on CIFAR-10")
    parser.add_argument("--prior", help="its prior, and that of --run  [the best trained]")
    parser.add_argument("--images", default=1000, type=int, help="images of each set")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    console = Console()
    rest, alone = split_digits(arguments.data, arguments.held_out, arguments.out)
    grey = RunFolder(arguments.run) if arguments.run else trained_run(rest, RunFolder(arguments.out / "run"), console)
    outliers = {
        "CIFAR-10 in grey": (grey, arguments.cifar),
        "shapes in grey": (grey, "shapes"),
        f"digit {arguments.held_out}": (grey, str(alone)),
        "bright pixels": (grey, str(bright_pixels(arguments.out, arguments.images))),
    }
    if arguments.colour_run:
        colour = RunFolder(arguments.colour_run)
        outliers |= {"CIFAR-10: MNIST": (colour, arguments.data), "CIFAR-10: shapes": (colour, "shapes")}
    own: dict[Path, dict[str, Array]] = {}
    results: dict[str, dict[str, Detection]] = {}
    for name, (run, source) in outliers.items():
        if run.path not in own:
            own[run.path] = scores_of(run, None, arguments, console)
        others = scores_of(run, source, arguments, console)
        results[name] = {key: detection(own[run.path][key], others[key]) for key in score_keys(others)}
    print(f"{'AUROC':<22} " + " ".join(f"{name:>18}" for name in results))
    for key in next(iter(results.values())):
        print(f"{name_of(key):<22} " + " ".join(f"{_figure(found[key]):>18}" for found in results.values()))
    if arguments.json:
        written = {name: {key: row._asdict() for key, row in found.items()} for name, found in results.items()}
        write_json(arguments.json, {"images": arguments.images, "results": written})


def scores_of(run: RunFolder, source: str | None, arguments: argparse.Namespace, console: Console) -> dict[str, Array]:
    """Every column of the scores of a set of images, (N,) each; None is the run's own test images."""
    request = ScoreRequest(source, images=arguments.images, prior=arguments.prior, maps=True)
    record = score(run, request, request.default_name(), console)
    console.say(f"maps: {record['files']['maps.png']}")
    with open(record["files"]["scores.csv"], newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {key: np.array([float(row[key]) for row in rows]) for key in rows[0] if key not in ("index", "label")}


def _figure(found: Detection) -> str:
    return f"{found.auroc:.3f} ± {found.auroc_standard_error:.3f}"


if __name__ == "__main__":
    main()
