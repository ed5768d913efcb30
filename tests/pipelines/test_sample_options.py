"""The options of ``vqgen sample``: what they do, and that each bad one is a clear line before anything is written."""

from __future__ import annotations

import io
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from pipelines import cli
from pipelines.drawing import Drawer, draw_samples, image_labels
from pipelines.interpolation import great_arc
from pipelines.run_codes import open_codes
from pipelines.run_priors import load_priors
from pipelines.sample_request import SampleRequest
from priors import registry
from priors.base import LatentPrior
from vqgen.console import Console
from vqgen.run_folder import RunFolder

Fails = Callable[..., str]
Sampled = Callable[..., "tuple[dict[str, Any], dict[str, Tensor]]"]

LATENT = '''
import torch
from einops import rearrange

from priors.base import Prior
from priors.registry import register
from priors.sampling import PLAIN
from vqgen.config import Settings


class NoSettings(Settings):
    pass


@register
class Levels(Prior):
    """Its latent space is the map itself, from -1 for code 0 to 1 for the last one."""

    name = "levels"
    summary = "for tests"
    likelihood = "none"
    Config = NoSettings
    training_defaults = {"steps": 0}
    players = ()

    def __init__(self, config, spec):
        super().__init__(config, spec)
        self.register_buffer("place", torch.zeros(()))

    def forward(self, codes, context=(), label=None, **rest):
        return {"loss": self.place}

    def sample(self, noise, context=(), label=None, options=PLAIN, known=None, keep=None):
        z = noise.normal("latent", self.spec.target.positions)
        return self.decode_latent(z, noise, context, label, options)

    def encode_latent(self, codes, context, label):
        return rearrange(2 * codes / (self.spec.target.codebook_size - 1) - 1, "b h w -> b (h w)").float()

    def decode_latent(self, z, noise, context, label, options):
        last = self.spec.target.codebook_size - 1
        codes = ((z + 1) / 2 * last).round().clamp(0, last).long()
        return rearrange(codes, "b (h w) -> b h w", h=self.spec.target.height)
'''


class Brightness:
    """A classifier by the mean of the first pixels; the same picture is always read the same."""

    def probabilities(self, images: Tensor) -> Tensor:
        bright = images.double().mean((1, 2, 3))[:, None] / 255
        return (torch.arange(8) * bright).softmax(1)


@pytest.fixture(scope="module")
def run(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run with a baseline, and a transformer at the top that can be guided."""
    copy = Path(shutil.copytree(finished_run, tmp_path_factory.mktemp("options") / "run"))
    assert cli.call(["train-prior", "--prior", "unigram", "--run", str(copy)]) == 0
    guided = ["--level", "top", "--overwrite", "--set", "priors.transformer.label_dropout=0.5"]
    assert cli.call(["train-prior", "--prior", "transformer", "--run", str(copy), *guided]) == 0
    return copy


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory: pytest.TempPathFactory, tiny_config: Path) -> Path:
    """A run of grey images without labels, with a baseline."""
    folder = tmp_path_factory.mktemp("unlabelled")
    np.save(folder / "grey.npy", np.random.default_rng(0).integers(0, 256, (60, 16, 16), dtype=np.uint8))
    arguments = ["--config", str(tiny_config), "--data", str(folder / "grey.npy"), "--run", str(folder / "run")]
    assert cli.call(["train-codes", *arguments, "--set", "training.steps=2"]) == 0
    assert cli.call(["train-prior", "--prior", "unigram", "--run", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture
def sampled(run: Path, capsys: pytest.CaptureFixture[str]) -> Sampled:
    """Call ``vqgen sample`` on the run; returns its record and the tensors it wrote."""

    def call(*arguments: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
        capsys.readouterr()
        assert cli.call(["sample", "--run", str(run), *arguments, "--json"]) == 0
        record = json.loads(capsys.readouterr().out)
        return record, load_file(Path(record["folder"]) / "codes.safetensors")

    return call


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with a picture, a truncated one, a text, and masks of several sizes."""
    Image.new("RGB", (16, 16), (90, 20, 200)).save(tmp_path / "photo.png")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    (tmp_path / "notes.txt").write_text("no picture")
    np.save(tmp_path / "array.npy", noise)
    Image.new("L", (16, 15)).save(tmp_path / "low.png")
    Image.new("L", (16, 16), 255).save(tmp_path / "white.png")
    Image.fromarray(np.full((16, 16), np.nan, np.float32)).save(tmp_path / "nan.tiff")
    (tmp_path / "folder").mkdir()
    return tmp_path


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--from test:1", ["--keep", "--interpolate"]),
        ("--keep top", ["--from"]),
        ("--from tset:1 --keep top", ["'tset'", "Did you mean 'test'?", "64 train", "6 test"]),
        ("--from test:6 --keep top", ["test has 6 images", "0 to 5"]),
        ("--from test:-1 --keep top", ["0 to 5"]),
        ("--from nowhere.png --keep top", ["nowhere.png", "SPLIT:INDEX", "6 test"]),
        ("--from test: --keep top", ["test:", "SPLIT:INDEX"]),
        ("--from {folder} --keep top", ["is a folder"]),
        ("--from {notes.txt} --keep top", ["notes.txt", "not a picture"]),
        ("--from {cut.png} --keep top", ["cut.png", "not a picture"]),
        ("--from {array.npy} --keep top", ["array.npy", "not a picture"]),
        ("--from test:1 --keep middle", ["no level 'middle'", "top, bottom"]),
        ("--from test:1 --keep left_half", ["left_half", "Did you mean 'left-half'?", "border", "picture file"]),
        ("--from test:1 --keep nowhere.png", ["nowhere.png", "neither a level"]),
        ("--from test:1 --keep bottom", ["nothing to draw"]),
        ("--from test:1 --keep top --levels 1", ["nothing to draw"]),
        ("--from test:1 --keep {low.png}", ["low.png", "16x15", "16x16"]),
        ("--from {whole.png} --label 1 --keep {low.png}", ["16x15", "16x16", "64x64, as the image given"]),
        ("--from test:1 --keep {notes.txt}", ["notes.txt", "not a picture"]),
        ("--from test:1 --keep {white.png}", ["keeps every code"]),
        ("--from test:1 --keep {nan.tiff}", ["--keep", "nan.tiff", "not finite", "8-bit PNG"]),
        ("--from {nan.tiff} --keep left-half", ["--from", "nan.tiff", "not finite", "8-bit PNG"]),
        (f"--from {'x' * 300} --keep left-half", ["no such file", "SPLIT:INDEX"]),
        (f"--from test:1 --keep {'x' * 300}", ["neither a level", "picture file"]),
        ("--from test:1 --interpolate", ["two --from", "got 1"]),
        ("--interpolate", ["two --from", "got 0"]),
        ("--from test:1 --from test:2 --interpolate --keep top", ["--interpolate and --keep"]),
        ("--from test:1 --from test:2 --interpolate --keep-best 2", ["--keep-best"]),
        ("--from test:1 --from test:2 --interpolate -n 1", ["-n 1"]),
        ("--from test:1 --from test:2 --interpolate --label 1 --label 2", ["one --label", "got 2"]),
        ("--from test:1 --from test:2 --interpolate --label 1,2,3", ["one --label", "got 3"]),
        ("--from test:1 --from test:2 --interpolate", ["pixelcnn", "'top'", "no latent space"]),
        ("--keep-best 0", ["--keep-best"]),
        ("--guidance 2", ["'top'", "pixelcnn", "label dropout", "label_dropout=0.1", "--level top"]),
        ("--guidance bottom=2 --prior transformer", ["'bottom'", "transformer", "label dropout"]),
        ("--guidance top=2 --prior unigram", ["'top'", "unigram", "no guidance"]),
        ("--guidance nan", ["guidance"]),
        ("--top-p 0", ["top_p", "above 0"]),
        ("--top-p bottom=1.01", ["top_p", "at most 1"]),
        ("--top-p nan", ["top_p"]),
        ("--top-k 1.5", ["--top-k", "not a whole number", "--top-k 50"]),
        ("--temperature top=1,top=2", ["'top' is named twice"]),
        ("--temperature inf", ["temperature"]),
        ("--temperature top=1,middle=1", ["middle", "top, bottom"]),
        ("--temperature bottom=0.5 --levels 1", ["'bottom' is not drawn", "top"]),
        ("--temperature top=0.5 --from test:1 --keep top", ["'top' is not drawn", "bottom"]),
        ("--prior top=pixelcnn,middle=pixelcnn", ["middle", "top, bottom"]),
        ("--prior top=pixelcnn,bottom=uniform", ["no trained uniform", "'bottom'", "pixelcnn, transformer, unigram"]),
        ("--prior top=pixelcnn", ["'bottom'"]),
        ("--prior top=pixelcnn,bottom=pixelcnn,top=transformer", ["'top' is named twice"]),
        ("--label 8", ["8", "0 to 7"]),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    arguments: str, said: list[str], fails: Fails, run: Path, files: Path
) -> None:
    before = contents(run)
    typed = [str(files / part[1:-1]) if part.startswith("{") else part for part in arguments.split()]
    prior = [] if "--prior" in typed or "--keep top" in arguments else ["--prior", "pixelcnn"]
    message = fails("sample", "--run", str(run), "-n", "2", *prior, *typed)
    for part in said:
        assert part in message
    assert contents(run) == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--label 1", ["no labels"]),
        ("--keep-best 2", ["no labels", "--keep-best 2"]),
        ("--guidance 2", ["no labels", "'top'"]),
    ],
)
def test_what_needs_labels_is_refused_without_them(
    arguments: str, said: list[str], fails: Fails, unlabelled: Path
) -> None:
    before = contents(unlabelled)
    message = fails("sample", "--run", str(unlabelled), *arguments.split())
    for part in said:
        assert part in message
    assert contents(unlabelled) == before


def test_an_unlabelled_run_samples_from_an_image(unlabelled: Path, files: Path) -> None:
    photo = ["--from", str(files / "photo.png"), "--from", "val:0"]
    arguments = ["sample", "--run", str(unlabelled), *photo, "--keep", "left-half", "-n", "3", "--out", "from"]
    assert cli.call(arguments) == 0
    saved = json.loads((unlabelled / "samples/from/sample.json").read_text())
    assert saved["labels"] is None
    assert [source["label"] for source in saved["from"]] == [None, None]
    assert (unlabelled / "samples/from/grid.png").is_file()


def test_labels_are_balanced_and_the_same_at_any_batch_size() -> None:
    labels = image_labels(SampleRequest({}, images=20), 8)
    assert labels is not None
    assert set(torch.bincount(labels, minlength=8).tolist()) == {2, 3}
    labels = image_labels(SampleRequest({}, images=12, sources=("a", "b"), labels=(3, 1)), 8)
    assert labels is not None
    for source in range(2):
        assert torch.bincount(labels[source::2], minlength=4).tolist() == [0, 3, 0, 3]
    assert image_labels(SampleRequest({}, images=12), 0) is None


def test_guidance_of_one_level(sampled: Sampled) -> None:
    mix = ("--prior", "top=transformer,bottom=pixelcnn", "-n", "8", "--seed", "1")
    plain = sampled(*mix)[1]
    guided = sampled(*mix, "--guidance", "top=8")[1]
    assert not plain["top"].equal(guided["top"])
    assert sampled(*mix, "--guidance", "top=1,bottom=1")[1]["bottom"].equal(plain["bottom"])


def test_the_best_of_one_is_ordinary_sampling(sampled: Sampled) -> None:
    plain, codes = sampled("-n", "4", "--out", "plain")
    one, same = sampled("-n", "4", "--keep-best", "1", "--out", "one")
    assert all(codes[key].equal(same[key]) for key in codes)
    assert one["probabilities"] is None
    assert set(one["seconds"]) == set(plain["seconds"])


def test_the_best_of_several(run: Path, sampled: Sampled, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.sample.run_classifier", lambda *args, **kwargs: Brightness())
    monkeypatch.setattr("pipelines.sample.fingerprint", lambda folder: "brightness")
    arguments = ("-n", "10", "--prior", "unigram", "--keep-best", "3")
    record, codes = sampled(*arguments)
    kept = torch.tensor(record["kept_attempts"])
    assert set(kept.tolist()) > {0}
    codec, store = open_codes(RunFolder(run))
    chosen = {"top": "unigram", "bottom": "unigram"}
    request = SampleRequest(chosen, images=10)
    labels = image_labels(request, 8)
    assert labels is not None
    drawer = Drawer(codec, load_priors(RunFolder(run), chosen, codec), request, labels, None)
    attempts = [drawer.draw(tuple(range(10)), attempt, lambda share: None) for attempt in range(3)]
    chances = torch.stack([Brightness().probabilities(one.images)[torch.arange(10), labels] for one in attempts])
    assert kept.equal(chances.argmax(0))
    assert record["probabilities"] == pytest.approx(chances.amax(0).tolist())
    for image, attempt in enumerate(kept.tolist()):
        for level, maps in zip(("top", "bottom"), attempts[attempt].codes, strict=True):
            assert codes[level][image].equal(maps[image])
    parts, same = sampled(*arguments, "--batch-size", "3", "--out", "parts")
    assert parts["kept_attempts"] == record["kept_attempts"]
    assert all(codes[key].equal(same[key]) for key in codes)
    assert store.labelled


def test_samples_per_second_count_every_attempt(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that ticks once a question, three attempts take three times the levels and decodes."""
    ticks = iter(range(10**6))
    monkeypatch.setattr("pipelines.drawing.time.perf_counter", lambda: float(next(ticks)))
    codec, store = open_codes(RunFolder(run))
    chosen = {"top": "unigram", "bottom": "unigram"}
    priors = load_priors(RunFolder(run), chosen, codec)
    console = Console(quiet=True)
    request = SampleRequest(chosen, images=4, keep_best=3)
    drawn = draw_samples(codec, priors, store, request, console, classifier=Brightness())
    assert dict(drawn.seconds) == {"top": 3, "bottom": 3, "decode": 3, "classifier": 1}


def test_a_classifier_is_made_and_kept_in_the_run(run_copy: Path) -> None:
    arguments = ["sample", "--run", str(run_copy), "-n", "4", "--keep-best", "2", "--out"]
    assert cli.call([*arguments, "one"]) == 0
    assert (run_copy / "classifier/model.safetensors").is_file()
    assert cli.call([*arguments, "two"]) == 0
    first, second = (json.loads((run_copy / f"samples/{name}/sample.json").read_text()) for name in ("one", "two"))
    assert first["probabilities"] == second["probabilities"]
    assert all(0 <= chance <= 1 for chance in first["probabilities"])


@pytest.fixture
def latent(run: Path, tmp_path: Path) -> list[str]:
    """Options that load a prior with a latent space, which is then trained at both levels of the run."""
    path = tmp_path / "latent.py"
    path.write_text(LATENT)
    plugin = ["--plugin", str(path)]
    done = RunFolder(run).stage("priors/levels/top") is not None
    assert done or cli.call(["train-prior", "--prior", "levels", *plugin, "--run", str(run)]) == 0
    return plugin


def test_interpolation_leads_from_one_image_to_the_other(run: Path, latent: list[str], sampled: Sampled) -> None:
    train = open_codes(RunFolder(run))[1].split("train").__getitems__(range(64))
    other = int((train["codes"][0] != train["codes"][0][:1]).sum((1, 2)).argmax())
    arguments = (*latent, "--from", "train:0", "--from", f"train:{other}", "--interpolate", "-n", "5")
    record, codes = sampled(*arguments, "--prior", "levels")
    labels = train["label"].tolist()
    assert record["labels"] == [labels[0]] * 3 + [labels[other]] * 2
    for level in ("top", "bottom"):
        ends, frames = codes[f"from_{level}"], codes[level]
        assert frames[0].equal(ends[0])
        assert frames[-1].equal(ends[1])
        assert not frames[2].equal(frames[0])
        assert not frames[2].equal(frames[-1])
    parts = sampled(*arguments, "--prior", "levels", "--batch-size", "2", "--out", "parts")[1]
    assert all(codes[key].equal(parts[key]) for key in codes)
    record, _ = sampled(*arguments, "--prior", "levels", "--label", "3")
    assert record["labels"] == [3] * 5


def test_a_finer_level_without_a_latent_space_is_drawn_with_the_same_noise(latent: list[str], sampled: Sampled) -> None:
    arguments = (*latent, "--from", "test:1", "--from", "test:2", "--interpolate", "-n", "4", "--label", "2")
    _, codes = sampled(*arguments, "--prior", "top=levels,bottom=unigram")
    assert (codes["bottom"] == codes["bottom"][:1]).all(), "unigram looks at noise and label alone"


def test_without_a_latent_space_the_priors_that_have_one_are_named(latent: list[str], fails: Fails, run: Path) -> None:
    ends = ["--from", "test:1", "--from", "test:2", "--interpolate", "--prior", "top=pixelcnn,bottom=levels"]
    message = fails("sample", "--run", str(run), *ends, *latent)
    assert "Trained for top: levels" in message
    able = [name for name in registry.names() if issubclass(registry.get(name), LatentPrior)]
    assert all(name in message for name in able)


def test_a_great_arc_keeps_its_distance() -> None:
    generator = torch.Generator().manual_seed(0)
    ends = torch.randn(2, 40, generator=generator)
    ends = ends / ends.norm(dim=1, keepdim=True) * 6
    shares = torch.linspace(0, 1, 9)
    points = great_arc(ends, shares)
    assert points[0].equal(ends[0])
    assert points[-1].equal(ends[1])
    assert torch.allclose(points.norm(dim=1), torch.full((9,), 6.0), atol=1e-5)
    steps = (points[1:] - points[:-1]).norm(dim=1)
    assert torch.allclose(steps, steps[:1].expand(8), atol=1e-5)
    unequal = great_arc(torch.tensor([[1.0, 0.0], [0.0, 3.0]]), torch.tensor([0.5]))
    assert torch.allclose(unequal, torch.tensor([[1.0, 3.0]]) * math.sin(math.pi / 4))


@pytest.mark.parametrize("second", [[2.0, 0.0], [-1.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
def test_a_great_arc_without_a_direction_is_a_line(second: list[float]) -> None:
    ends = torch.tensor([[1.0, 0.0], second])
    points = great_arc(ends, torch.tensor([0.0, 0.25, 1.0]))
    assert torch.allclose(points[1], 0.75 * ends[0] + 0.25 * ends[1])
    assert points[2].equal(ends[1])


def test_progress_moves_within_a_batch(run: Path) -> None:
    """A level is a step: of 4 and 16 positions the top is a fifth of the work."""
    now = iter(range(0, 10**6, 20))
    said = io.StringIO()
    console = Console(stderr=said, terminal=False, clock=lambda: float(next(now)))
    codec, store = open_codes(RunFolder(run))
    chosen = {"top": "unigram", "bottom": "unigram"}
    priors = load_priors(RunFolder(run), chosen, codec)
    draw_samples(codec, priors, store, SampleRequest(chosen, images=10, batch_size=10), console)
    lines = said.getvalue().splitlines()
    assert "sampling: 20 %, 2 images" in lines[0]
    assert "left" in lines[0]
    assert "sampling: 100 %, 10 images" in lines[1]
    assert "sampling: 10 images in" in lines[-1]
