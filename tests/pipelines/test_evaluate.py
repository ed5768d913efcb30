"""The codec alone: figures equal direct computation, and what cannot be measured is said, not made up."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from pipelines import classify, cli
from pipelines.encode import encode_splits
from pipelines.evaluate import evaluate
from pipelines.quality.extractors import open_extractor
from pipelines.settings import merged_settings, save_settings
from pipelines.train_codes import calibrate
from vqgen.codec import HierarchicalVQVAE
from vqgen.config import DataSettings
from vqgen.console import Console
from vqgen.data import load_data
from vqgen.feature_distances import frechet_distance
from vqgen.files import finite
from vqgen.hub import fingerprint
from vqgen.images import to_float, to_uint8
from vqgen.losses import discretized_gaussian_nats
from vqgen.metrics import mse, psnr, ssim
from vqgen.run_folder import RunFolder

QUIET = Console(quiet=True)
PICTURES = {"reconstructions.png", "worst.png", "code_maps.png", "use.png"}
Fails = Callable[..., str]


def make_images(path: Path, count: int, channels: int = 3, size: int = 16) -> Path:
    """Soft random pictures in an .npy file: no splits of their own, no labels."""
    generator = np.random.default_rng(count)
    coarse = generator.integers(0, 256, (count, 4, 4, channels))
    noise = generator.integers(-20, 21, (count, size, size, channels))
    soft = coarse.repeat(size // 4, 1).repeat(size // 4, 2) + noise
    np.save(path, soft.clip(0, 255).astype(np.uint8))
    return path


def make_run(
    folder: Path,
    source: Path,
    strides: tuple[int, ...] = (8, 4),
    change: Callable[[HierarchicalVQVAE], None] | None = None,
) -> RunFolder:
    """A run of a codec whose network was never trained: what it makes of images is bad, but can be measured."""
    run = RunFolder(folder)
    codec_settings = {"strides": list(strides), "codebook_size": 16, "code_dim": 4, "width": 8, "residual_blocks": 0}
    codec_settings["training"] = {"steps": 1}
    values = {"data": {"source": str(source)}, "codec": codec_settings}
    config = merged_settings(values, (), source=None, seed=None, minutes=None, short_for=None, file="test")
    data = load_data(config.data, config.seed)
    run.create()
    save_settings(run, config)
    run.record_data({"description": data.description, "fingerprint": data.fingerprint, "notes": [], "values": None})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        codec = HierarchicalVQVAE(config.codec, data.image)
        codec(to_float(data.splits["train"].__getitems__(range(50))["images"]))  # codes among what the encoder gives
    codec.eval()
    if change is not None:
        change(codec)
    calibrate(codec, data.splits["validation"], 64, QUIET)
    codec.save_pretrained(run.codec)
    run.record_stage("codec", {"fingerprint": fingerprint(run.codec)})
    run.record_stage("codes", encode_splits(run.codes, codec, fingerprint(run.codec), data, QUIET, 64))
    return run


@pytest.fixture(scope="module")
def big_run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Two levels, 100 test images, unlabelled; not to be changed."""
    folder = tmp_path_factory.mktemp("big")
    return make_run(folder / "run", make_images(folder / "images.npy", 2000))


def test_images_of(run: RunFolder) -> Tensor:
    """The test images of a run, uint8."""
    source = re.search(r"source: (.*)", run.config.read_text())
    assert source
    split = load_data(DataSettings(source=source[1]), 0).splits["test"]
    images: Tensor = split.__getitems__(range(len(split)))["images"]
    return images


test_images_of.__test__ = False  # type: ignore[attr-defined]


def read(folder: Path) -> Any:
    return json.loads((folder / "evaluate.json").read_text(encoding="utf-8"))


@torch.no_grad()
def test_every_figure_is_that_of_direct_computation(big_run: RunFolder, tmp_path: Path) -> None:
    found = evaluate(big_run, QUIET, out=tmp_path / "out")
    codec = HierarchicalVQVAE.from_pretrained(big_run.codec)
    images = test_images_of(big_run)
    assert found["images"] == len(images) == 100
    targets = to_float(images)
    codes = codec.encode(targets)
    variance = float((images.double() / 255).var(unbiased=False))
    for depth, name in enumerate(("top", "top+bottom"), start=1):
        made = codec.decode(codes[:depth])
        error = float(mse(made, targets).mean())
        expected = {"mse": error, "nmse": error / variance, "psnr": float(psnr(made, targets).mean())}
        expected["ssim"] = float(ssim(made, targets).mean())
        assert found["reconstruction"][name] == pytest.approx(expected, rel=1e-4)

    nats = discretized_gaussian_nats(images, made, codec.decoder_scale)
    assert found["decoder_bits_per_dim"] == pytest.approx(
        float(nats.mean()) / math.log(2) / images[0].numel(), rel=1e-5
    )

    entropies = {}
    for name, level in zip(("top", "bottom"), codes, strict=True):
        counts = Counter(level.flatten().tolist())
        shares = [count / level.numel() for count in counts.values()]
        entropies[name] = -sum(share * math.log2(share) for share in shares)
        figures = found["codes"][name]
        assert figures["entropy_bits"] == pytest.approx(entropies[name], rel=1e-9)
        assert figures["perplexity"] == pytest.approx(2 ** entropies[name], rel=1e-9)
        assert figures["dead"] == 16 - len(counts)
        assert len(counts) > 4
        assert figures["verdict"].startswith(f"{name}: ")
    bits = found["bits"]
    assert bits["raw_bits_per_image"] == 16 * 16 * 3 * 8
    assert bits["uniform"]["bits_per_image"] == 4 * (4 + 16)
    assert bits["uniform"] | {"bits_per_image": 80} == {
        "bits_per_image": 80, "bytes_per_image": 10, "bits_per_pixel": 80 / 256, "ratio": 6144 / 80,
    }  # fmt: skip
    assert bits["entropy"]["bits_per_image"] == pytest.approx(4 * entropies["top"] + 16 * entropies["bottom"])

    reader = open_extractor("codec", big_run, codec, QUIET)
    distance = frechet_distance(reader.features(images), reader.features(to_uint8(made)))
    assert found["frechet"]["reconstructions"] == pytest.approx(distance, rel=1e-3)
    assert found["frechet"]["extractor"] == "codec"
    assert 0 < found["frechet"]["training_images"] < found["frechet"]["reconstructions"]
    assert found["frechet"]["training_images_count"] == 100

    errors = mse(made, targets)
    assert [image["index"] for image in found["worst"]] == errors.sort(descending=True).indices[:8].tolist()
    assert found["worst"][0]["mse"] == pytest.approx(float(errors.max()), rel=1e-5)


def test_the_record_says_what_it_rests_on(big_run: RunFolder, tmp_path: Path) -> None:
    found = evaluate(big_run, QUIET, images=100, out=tmp_path)
    record = read(tmp_path)
    assert record == finite({key: value for key, value in found.items() if key != "files"})
    assert set(record) == {
        *("run", "split", "images", "reconstruction", "decoder_bits_per_dim", "frechet", "codes", "bits", "worst"),
        *("notes", "provenance"),
    }
    told = record["provenance"]
    assert told["codec_fingerprint"] == told["weights"] == fingerprint(big_run.codec)
    assert told["data_fingerprint"] == big_run.read()["data"]["fingerprint"]
    assert (told["seed"], told["extractor"], told["images_available"]) == (0, "codec", 100)
    assert told["own_images"] is True
    assert record["images"] == 100
    assert {path.name for path in tmp_path.iterdir()} == {"evaluate.json", *PICTURES}
    for name in PICTURES:
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 64


def test_no_global_generator_is_touched_and_nothing_is_trained(
    big_run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(classify, "fit", pytest.fail)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]
    first = evaluate(big_run, QUIET, out=tmp_path / "a")
    again = evaluate(big_run, QUIET, out=tmp_path / "b")
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (np.random.get_state()[1].tolist(), random.getstate())  # type: ignore[index]
    assert not big_run.classifier.exists()
    assert first["frechet"] == again["frechet"]
    for name in PICTURES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_codec_that_outputs_the_mean_has_a_normalised_error_of_one(tmp_path: Path) -> None:
    source = make_images(tmp_path / "images.npy", 300)
    grey = 0.0

    def flat(codec: HierarchicalVQVAE) -> None:
        last = codec.decoder[-1]
        assert isinstance(last, nn.ConvTranspose2d)
        assert last.bias is not None
        with torch.no_grad():
            last.weight.zero_()
            last.bias.fill_(grey)

    mean = float(test_images_of(make_run(tmp_path / "first", source)).double().mean())
    grey = mean / 127.5 - 1
    found = evaluate(make_run(tmp_path / "run", source, change=flat), QUIET)
    for figures in found["reconstruction"].values():
        assert figures["nmse"] == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize(("strides", "channels"), [((8,), 1), ((8, 4, 2), 4), ((4, 2), 2)])
def test_any_number_of_levels_and_channels(strides: tuple[int, ...], channels: int, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", make_images(tmp_path / "images.npy", 60, channels), strides)
    found = evaluate(run, QUIET)
    assert len(found["reconstruction"]) == len(found["codes"]) == len(strides)
    assert found["images"] == 3
    assert len(found["worst"]) == 3
    assert {Path(path).parent for path in found["files"].values()} == {run.evaluate}
    with Image.open(run.evaluate / "code_maps.png") as maps, Image.open(run.evaluate / "worst.png") as worst:
        assert maps.height > 3 * 64
        assert worst.width > (2 + len(strides)) * 64


def test_one_image_is_enough_for_all_but_the_frechet_distance(big_run: RunFolder, tmp_path: Path) -> None:
    found = evaluate(big_run, QUIET, images=1, out=tmp_path)
    assert found["frechet"] is None
    assert found["provenance"]["extractor"] is None
    assert any("Too few images for the Frechet distance: 1;" in note for note in found["notes"])
    assert found["reconstruction"]["top+bottom"]["mse"] > 0


def test_too_few_images_for_an_extractor_that_is_named(big_run: RunFolder, fails: Fails, tmp_path: Path) -> None:
    said = fails(
        "evaluate", "--run", str(big_run.path), "-n", "99", "--extractor", "codec", "--out", str(tmp_path / "out")
    )
    assert "Too few images for the Frechet distance: 99; at least 100 are needed." in said
    assert not (tmp_path / "out").exists()


def test_images_of_one_grey_have_no_normalised_error(tmp_path: Path) -> None:
    np.save(tmp_path / "grey.npy", np.full((60, 16, 16, 1), 77, dtype=np.uint8))
    run = make_run(tmp_path / "run", tmp_path / "grey.npy")
    evaluate(run, QUIET)
    assert read(run.evaluate)["reconstruction"]["top+bottom"]["nmse"] is None


def test_the_training_images_are_named_as_such(big_run: RunFolder, tmp_path: Path) -> None:
    found = evaluate(big_run, QUIET, split="train", images=100, out=tmp_path)
    assert any("trained on" in note and "--split test" in note for note in found["notes"])
    assert found["frechet"]["training_images"] is None
    assert found["frechet"]["reconstructions"] > 0
    other = evaluate(big_run, QUIET, split="validation", images=100, out=tmp_path)
    assert not any("trained on" in note for note in other["notes"])


def test_other_images_are_resized_with_notice(
    big_run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 24, 20), dtype=np.uint8)  # grey, not square
    np.save(tmp_path / "others.npy", pixels)
    command = ["evaluate", "--run", str(big_run.path), "--data", str(tmp_path / "others.npy"), "--out"]
    assert cli.call([*command, str(tmp_path / "out")]) == 0
    captured = capsys.readouterr()
    assert "images are resized to 16x16" in captured.err
    assert "images of 1 channel get 3" in captured.err
    record = read(tmp_path / "out")
    assert record["provenance"]["own_images"] is False
    assert record["provenance"]["source"].endswith("others.npy")
    assert any("other images than the codec was trained on" in note for note in record["notes"])
    assert f"evaluate: {tmp_path / 'out' / 'evaluate.json'}" in captured.out
    assert "next: vqgen train-prior" in captured.out
    assert "normalised mse" in captured.out


def test_images_that_were_moved_and_images_that_were_changed(tmp_path: Path, fails: Fails) -> None:
    source = make_images(tmp_path / "images.npy", 60)
    run = make_run(tmp_path / "run", source)
    here = evaluate(run, QUIET)
    moved = source.rename(tmp_path / "moved.npy")
    there = evaluate(run, QUIET, source=str(moved))
    assert there["provenance"]["own_images"] is True
    assert there["reconstruction"] == here["reconstruction"]
    before = (run.evaluate / "evaluate.json").read_bytes()
    make_images(source, 61)
    said = fails("evaluate", "--run", str(run.path))
    assert "are not the ones" in said
    assert "--data" in said
    assert (run.evaluate / "evaluate.json").read_bytes() == before


def test_without_calibration_the_decoder_has_no_bits(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", make_images(tmp_path / "images.npy", 60))
    codec = HierarchicalVQVAE.from_pretrained(run.codec)
    codec.decoder_scale.fill_(math.nan)
    shutil.rmtree(run.codec)
    codec.save_pretrained(run.codec)
    assert evaluate(run, QUIET)["decoder_bits_per_dim"] is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--split", "tset"], ["tset", "test"]),
        (["--extractor", "classifer"], ["classifer", "classifier"]),
        (["--data", "no/such/place.npy"], ["no/such/place.npy"]),
    ],
)
def test_what_is_not_there_is_named(
    arguments: list[str], said: list[str], big_run: RunFolder, fails: Fails, tmp_path: Path
) -> None:
    message = fails("evaluate", "--run", str(big_run.path), "--out", str(tmp_path / "out"), *arguments)
    assert all(part in message for part in said)
    assert not (tmp_path / "out").exists()


def test_what_can_be_refused_is_refused_before_anything_is_read(
    big_run: RunFolder, fails: Fails, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_work(*_: Any, **__: Any) -> Any:
        raise AssertionError("work was begun")

    monkeypatch.setattr("pipelines.evaluate.load_data", no_work)
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    for out in ("file", "file/new", "x" * 300):
        assert "cannot be written" in fails("evaluate", "--run", str(big_run.path), "--out", str(tmp_path / out))
    said = fails("evaluate", "--run", str(big_run.path), "-n", "3", "--extractor", "classifer")
    assert "Did you mean 'classifier'" in said
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_run_without_codec_says_how_to_make_one(tmp_path: Path, fails: Fails) -> None:
    run = RunFolder(tmp_path / "run")
    run.create()
    assert "vqgen train-codes --resume" in fails("evaluate", "--run", str(run.path))


def test_json_of_a_trained_run_and_what_redoing_the_codec_removes(
    run_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Labelled, with six test images: too few, so no classifier is trained for them."""
    capsys.readouterr()
    assert cli.call(["evaluate", "--run", str(run_copy), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["images"] == 6
    assert found["frechet"] is None
    assert not (run_copy / "classifier").exists()
    assert Path(found["files"]["evaluate.json"]).parent == run_copy / "evaluate"
    assert cli.call(["train-codes", "--run", str(run_copy), "--overwrite"]) == 0
    assert not (run_copy / "evaluate").exists()
