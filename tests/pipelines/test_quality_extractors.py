"""Images as features: what the networks of a run, and Inception, are asked, and how their answers are scaled."""

from __future__ import annotations

import hashlib
import io
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipelines import classify, cli
from pipelines.code_sources import decoded
from pipelines.quality import extractors, inception
from pipelines.quality.extractors import EXTRACTORS, Extractor, open_extractor
from pipelines.run_codes import open_codes
from vqgen.code_store import CodeStore
from vqgen.codec import HierarchicalVQVAE
from vqgen.console import Console
from vqgen.errors import InputError, VqgenError
from vqgen.hub import fingerprint
from vqgen.images import to_float
from vqgen.run_folder import RunFolder

CONSOLE = Console(quiet=True)


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory, tiny_config: Path) -> Path:
    """A run with a codec and codes, and no priors."""
    folder = tmp_path_factory.mktemp("encoded") / "run"
    assert cli.call(["train-codes", "--config", str(tiny_config), "--run", str(folder)]) == 0
    return folder


@pytest.fixture
def run(encoded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A copy of it that a test may change."""
    monkeypatch.setattr(classify, "EPOCHS", 2)
    return RunFolder(shutil.copytree(encoded, tmp_path / "run"))


@pytest.fixture
def codec(run: RunFolder) -> HierarchicalVQVAE:
    return open_codes(run)[0]


def pictures(count: int, channels: int = 3, side: int = 16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, side, side), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("name", ["classifier", "codec"])
def test_features_are_of_each_image_alone_and_always_the_same(
    name: str, run: RunFolder, codec: HierarchicalVQVAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.get_rng_state()
    extractor = open_extractor(name, run, codec, CONSOLE)
    images = pictures(7)
    found = extractor.features(images)
    assert (extractor.name, found.shape, found.dtype) == (name, (7, extractor.width), torch.float32)
    assert not found.requires_grad
    assert torch.equal(extractor.features(images), found)
    again = open_extractor(name, run, codec, CONSOLE)
    assert again.fingerprint == extractor.fingerprint == fingerprint({"codec": run.codec}.get(name, run.classifier))
    assert torch.equal(again.features(images), found)
    monkeypatch.setattr(extractors, "READ_AT_ONCE", 2)
    torch.testing.assert_close(extractor.features(images), found, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(extractor.features(images[3:4]), found[3:4], rtol=1e-4, atol=1e-4)
    assert extractor.features(images[:0]).shape == (0, extractor.width)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["classifier", "codec"])
def test_reconstructed_training_images_set_the_scale(name: str, run: RunFolder, codec: HierarchicalVQVAE) -> None:
    extractor = open_extractor(name, run, codec, CONSOLE)
    train = CodeStore.load(run.codes).split("train")
    features = extractor.features(decoded(codec, train.__getitems__(range(len(train)))["codes"])).double()
    assert features.mean(0).abs().max() < 1e-4
    assert float(features.var(0, unbiased=False).mean()) == pytest.approx(1, rel=1e-3)
    # One unit for all features of a map: what varies more in it still does.
    units = len(set(extractor.unit.tolist()))
    assert units == {"codec": 2, "classifier": 3}[name]


def test_the_features_of_the_codec_are_the_means_of_its_encoder_maps(run: RunFolder, codec: HierarchicalVQVAE) -> None:
    extractor = open_extractor("codec", run, codec, CONSOLE)
    images = pictures(3)
    with torch.no_grad():
        maps = codec.encoder_maps(to_float(images))
        own = [codec.encoders[1](to_float(images))]
        own.insert(0, codec.encoders[0](own[0]))
    assert all(torch.equal(first, second) for first, second in zip(maps, own, strict=True))
    expected = (torch.cat([level.mean((2, 3)) for level in own], dim=1) - extractor.zero) / extractor.unit
    torch.testing.assert_close(extractor.features(images), expected.float(), rtol=1e-4, atol=1e-4)


def test_the_features_of_the_classifier_are_the_means_of_its_residual_maps(
    run: RunFolder, codec: HierarchicalVQVAE
) -> None:
    extractor = open_extractor("classifier", run, codec, CONSOLE)
    model = classify.run_classifier(run, CONSOLE)
    width = model.config.width
    assert extractor.width == 7 * width
    images = to_float(pictures(3))
    with torch.no_grad():
        maps = model.residual_maps(images)
        last = nn.Sequential(*list(model.body)[-2:])(maps[-1])
        torch.testing.assert_close(last.flatten(1), model.features(images))
    assert [level.shape[1] for level in maps] == [width, 2 * width, 4 * width]
    assert maps[0].shape[-1] > maps[2].shape[-1]


def test_without_a_name_labels_decide(run: RunFolder, codec: HierarchicalVQVAE) -> None:
    assert open_extractor(None, run, codec, CONSOLE).name == "classifier"


def test_unlabelled_runs_and_unknown_names(
    tmp_path: Path, tiny_config: Path, run: RunFolder, codec: HierarchicalVQVAE
) -> None:
    folder = tmp_path / "unlabelled"
    arguments = ["train-codes", "--config", str(tiny_config), "--run", str(folder), "--set", "data.labels=false"]
    assert cli.call(arguments) == 0
    unlabelled = RunFolder(folder)
    other = open_codes(unlabelled)[0]
    assert open_extractor(None, unlabelled, other, CONSOLE).name == "codec"
    with pytest.raises(InputError, match="'classifier' needs labels") as caught:
        open_extractor("classifier", unlabelled, other, CONSOLE)
    assert "codec" in caught.value.hint
    assert not unlabelled.classifier.exists()
    with pytest.raises(InputError, match="no extractor 'inceptoin'") as caught:
        open_extractor("inceptoin", run, codec, CONSOLE)
    assert "Did you mean 'inception'?" in caught.value.hint
    assert all(name in caught.value.hint for name in EXTRACTORS)


class FakeInception(nn.Module):
    """The interface of torch-fidelity's network, on nine weights."""

    def __init__(self, name: str, features: list[str], feature_extractor_weights_path: str) -> None:
        super().__init__()
        assert features == ["2048"]
        self.mix = nn.Parameter(torch.load(feature_extractor_weights_path)["mix"])
        self.seen: list[Tensor] = []

    def forward(self, images: Tensor) -> tuple[Tensor]:
        assert images.dtype == torch.uint8
        assert images.shape[1] == 3
        self.seen.append(images)
        means = images.float().mean((2, 3)) @ self.mix
        return (means.repeat(1, 683)[:, :2048],)


@pytest.fixture
def fidelity(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> bytes:
    """torch-fidelity's module and an empty cache for its weights; the file that would be fetched."""
    module: Any = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = FakeInception
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache"))
    buffer = io.BytesIO()
    torch.save({"mix": torch.eye(3)}, buffer)
    content = buffer.getvalue()
    monkeypatch.setattr(inception, "STARTS", hashlib.sha256(content).hexdigest()[:8])
    return content


def open_inception_extractor(run: RunFolder, codec: HierarchicalVQVAE) -> Extractor:
    return open_extractor("inception", run, codec, CONSOLE)


def test_inception_is_fetched_once_and_takes_grey_and_transparent_images(
    fidelity: bytes, run: RunFolder, codec: HierarchicalVQVAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = []

    def fetch(address: str, path: str, hash_prefix: str, progress: bool) -> None:
        fetched.append((address, hash_prefix))
        Path(path).write_bytes(fidelity)

    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    extractor = open_inception_extractor(run, codec)
    assert (extractor.name, extractor.width) == ("inception", 2048)
    assert extractor.fingerprint == hashlib.sha256(fidelity).hexdigest()
    assert open_inception_extractor(run, codec).fingerprint == extractor.fingerprint
    assert fetched == [(inception.ADDRESS, inception.STARTS)]
    for channels in (1, 2, 3, 4):
        images = pictures(3, channels)
        colour = images[:, :3] if channels > 2 else images[:, :1].expand(-1, 3, -1, -1)
        means = colour.float().mean((2, 3))
        torch.testing.assert_close(extractor.features(images)[:, :3], means)  # as published: not scaled


def test_inception_that_cannot_be_had_is_one_clear_line(
    fidelity: bytes, run: RunFolder, codec: HierarchicalVQVAE, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def unreachable(*arguments: object, **options: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    with pytest.raises(InputError, match=r"cannot be fetched from https://.*no route to host") as caught:
        open_inception_extractor(run, codec)
    assert inception.NAME in caught.value.hint
    assert "'codec'" in caught.value.hint

    damaged = tmp_path / "cache" / "checkpoints" / inception.NAME
    damaged.write_bytes(fidelity + b"!")
    with pytest.raises(InputError, match="is damaged"):
        open_inception_extractor(run, codec)

    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(InputError, match="needs torch-fidelity, which is not installed") as caught:
        open_inception_extractor(run, codec)
    assert "pip install torch-fidelity" in caught.value.hint


def test_a_map_that_says_the_same_of_every_image_stays_finite(run: RunFolder, codec: HierarchicalVQVAE) -> None:
    with torch.no_grad():
        for parameter in codec.encoders[0].parameters():
            parameter.zero_()
    features = open_extractor("codec", run, codec, CONSOLE).features(pictures(4))
    assert features.isfinite().all()
    assert features.any()


def test_every_problem_has_a_hint(run: RunFolder, codec: HierarchicalVQVAE) -> None:
    with pytest.raises(VqgenError) as caught:
        open_extractor("", run, codec, CONSOLE)
    assert caught.value.hint.startswith("Known: classifier")
