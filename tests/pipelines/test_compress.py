"""compress and decompress on the command line: exact codes back, sizes as the priors say, clear refusals."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from pipelines import cli, compress, decompress
from pipelines.compress import Source, sizes, write
from pipelines.compression.format import PRINT, pack, read
from pipelines.compression.labels import Labelling
from pipelines.compression.models import load_models, short_print
from pipelines.compression.walk import Images, steady_arithmetic
from pipelines.encode import fitted_to
from pipelines.settings import run_settings
from vqgen.codec import HierarchicalVQVAE
from vqgen.console import Console
from vqgen.data import ImageData, load_data
from vqgen.errors import InputError
from vqgen.images import to_float, to_uint8
from vqgen.run_folder import RunFolder

Fails = Callable[..., str]
Capture = pytest.CaptureFixture[str]


def made(capsys: Capture, *arguments: str) -> dict[str, Any]:
    """What a command says with --json."""
    capsys.readouterr()
    assert cli.call([*arguments, "--json"]) == 0, capsys.readouterr().err
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def data_of(run: RunFolder) -> tuple[HierarchicalVQVAE, ImageData]:
    codec = HierarchicalVQVAE.from_pretrained(run.codec)
    config = run_settings(run)
    return codec, load_data(fitted_to(codec, config.data), config.seed)


def relabel(run: Path, prior: str, level: str, dropout: float) -> None:
    """Note in a prior's config.json that it was trained with label dropout."""
    path = run / "priors" / prior / level / "config.json"
    saved = json.loads(path.read_text())
    saved["config"]["label_dropout"] = dropout
    path.write_text(json.dumps(saved))


@pytest.fixture
def small_file(finished_run: Path, tmp_path: Path, capsys: Capture) -> Path:
    """Five images of the finished run, compressed."""
    path = tmp_path / "five.vqgen"
    arguments = ["--prior", "top=transformer,bottom=pixelcnn", "-n", "5", "--out", str(path)]
    made(capsys, "compress", "--run", str(finished_run), *arguments)
    return path


@pytest.mark.parametrize("prior", ["pixelcnn", "top=transformer,bottom=pixelcnn", "unigram", "uniform"])
@pytest.mark.parametrize(("images", "batch"), [(1, 64), (6, 4)])
def test_every_code_and_label_comes_back(
    finished_run: Path, tmp_path: Path, capsys: Capture, prior: str, images: int, batch: int
) -> None:
    run = RunFolder(finished_run)
    file, out = tmp_path / "a file.vqgen", tmp_path / "deep" / "out"
    options = ["--prior", prior, "-n", str(images), "--batch-size", str(batch)]
    record = made(capsys, "compress", "--run", str(finished_run), *options, "--out", str(file))
    assert record["labels"] == "stored"
    assert record["bytes"] == file.stat().st_size
    assert 8 * record["bytes"] == pytest.approx(sum(record["bits"].values()))
    assert record["ratio"] == pytest.approx(record["raw_bytes"] / record["bytes"])
    assert record["bits_per_pixel"] == pytest.approx(8 * record["bytes"] / images / 256)
    back = made(capsys, "decompress", str(file), "--run", str(finished_run), "--out", str(out))
    codec, data = data_of(run)
    batch_of = data.splits["test"].__getitems__(range(images))
    codes = codec.encode(to_float(batch_of["images"]))
    found = load_file(out / "codes.safetensors")
    assert set(found) == {"top", "bottom", "label"}
    for level, own in zip(("top", "bottom"), codes, strict=True):
        assert torch.equal(found[level], own)
    assert torch.equal(found["label"], batch_of["label"])
    assert back["labels"] == batch_of["label"].tolist()
    assert back["class_names"] == list(data.class_names)
    assert sorted(path.name for path in out.glob("*.png")) == [f"{index:04d}.png" for index in range(images)]
    with torch.no_grad():
        pictures = to_uint8(codec.decode(codes))
    shown = np.asarray(Image.open(out / "0000.png"))
    assert np.abs(shown.astype(int) - pictures[0].permute(1, 2, 0).numpy().astype(int)).max() <= 1
    assert {path.name for path in tmp_path.iterdir()} == {"a file.vqgen", "deep"}
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


def test_the_file_is_within_two_percent_of_the_priors_own_bits(run_copy: Path, tmp_path: Path, capsys: Capture) -> None:
    config = yaml.safe_load((run_copy / "config.yaml").read_text())
    config["data"]["count"] = 3000
    (run_copy / "config.yaml").write_text(yaml.safe_dump(config))
    options = ["--split", "train", "--prior", "pixelcnn", "--batch-size", "500", "--out", str(tmp_path / "file")]
    record = made(capsys, "compress", "--run", str(run_copy), *options)
    run = RunFolder(run_copy)
    codec, data = data_of(run)
    nats = 0.0
    with torch.no_grad():
        models = load_models(run, {"top": "pixelcnn", "bottom": "pixelcnn"}, codec)
        for start in range(0, 3000, 500):
            batch = data.splits["train"].__getitems__(range(start, start + 500))
            codes = codec.encode(to_float(batch["images"]))
            for level, model in enumerate(models):
                nats += float(model.prior.log_prob(codes[level], codes[:level], batch["label"]).nats.sum())
    theory = -nats / math.log(2) + 3000 * math.log2(len(data.class_names))
    assert record["prior_bits"] == pytest.approx(theory, rel=1e-4)
    assert theory < 8 * record["bytes"] < 1.02 * theory
    assert record["overhead"] == pytest.approx(8 * record["bytes"] / theory - 1, abs=1e-3)


def test_a_trained_prior_takes_fewer_bits_than_none(finished_run: Path, tmp_path: Path, capsys: Capture) -> None:
    bits = {}
    for prior in ("uniform", "unigram"):
        options = ["--prior", prior, "--split", "all", "--out", str(tmp_path / prior)]
        record = made(capsys, "compress", "--run", str(finished_run), *options)
        assert record["images"] == 76
        bits[prior] = record["bits"]["codes"]
    assert bits["uniform"] == pytest.approx(76 * 20 * 4)
    assert bits["unigram"] < bits["uniform"]


def test_splits_come_one_after_another(finished_run: Path, tmp_path: Path, capsys: Capture) -> None:
    _, data = data_of(RunFolder(finished_run))
    options = ["--prior", "unigram", "--split", "all", "-n", "73", "--batch-size", "32"]
    made(capsys, "compress", "--run", str(finished_run), *options, "--out", str(tmp_path / "file"))
    back = made(
        capsys, "decompress", str(tmp_path / "file"), "--run", str(finished_run), "--out", str(tmp_path / "out")
    )
    own = [label for name in ("train", "validation", "test") for label in data.splits[name].labels().tolist()]
    assert back["labels"] == own[:73]
    codes = load_file(tmp_path / "out" / "codes.safetensors")
    codec = HierarchicalVQVAE.from_pretrained(finished_run / "codec")
    last = data.splits["test"].__getitems__([0, 1])["images"]
    place = len(data.splits["train"]) + len(data.splits["validation"])
    assert place < 72
    assert torch.equal(codec.encode(to_float(last[:1]))[1][0], codes["bottom"][place])


def test_no_images_are_a_file_without_images(finished_run: Path, tmp_path: Path, capsys: Capture) -> None:
    run = RunFolder(finished_run)
    codec, data = data_of(run)
    models = load_models(run, {"top": "pixelcnn", "bottom": "unigram"}, codec)
    source = Source(data, ("test",), 0)
    with steady_arithmetic():
        written = write(codec, short_print(run.codec), models, source, Labelling("none"), 64, Console(quiet=True))
    figures = sizes(written, 0, codec.spec)
    assert figures["bytes"] == len(written.content) < 200
    assert figures["bytes_per_image"] is None
    assert figures["psnr"] is None
    file = tmp_path / "empty"
    file.write_bytes(written.content)
    back = made(capsys, "decompress", str(file), "--run", str(finished_run), "--out", str(tmp_path / "out"))
    assert back["images"] == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"codes.safetensors", "decompress.json"}
    assert load_file(tmp_path / "out" / "codes.safetensors")["top"].shape == (0, 2, 2)


def test_what_is_said_and_what_comes_next(finished_run: Path, tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "file.vqgen"
    assert cli.call(["compress", "--run", str(finished_run), "-n", "3", "--out", str(file)]) == 0
    said = capsys.readouterr().out
    for expected in ("labels", "checksum of each image", "3 images in", "bits/pixel", "PSNR", f"file: {file}"):
        assert expected in said
    command = next(line for line in said.splitlines() if line.startswith("next: vqgen decompress"))
    assert cli.call(command.removeprefix("next: vqgen ").split()) == 0
    said = capsys.readouterr().out
    assert "3 images, every code as it was written." in said
    assert "next: vqgen" in said
    assert (tmp_path / "file-images" / "0002.png").is_file()


def test_the_only_run_is_found(finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "tiny").symlink_to(finished_run)
    monkeypatch.chdir(tmp_path)
    assert cli.call(["compress", "-n", "2", "--out", "file"]) == 0
    assert cli.call(["decompress", "file", "--out", "out"]) == 0
    assert len(list((tmp_path / "out").glob("*.png"))) == 2


def test_images_of_another_size_without_labels_are_resized_with_a_notice(
    finished_run: Path, tmp_path: Path, capsys: Capture
) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for index in range(40):
        Image.fromarray(generator.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    options = ["--data", str(folder), "--split", "all", "-n", "9", "--out", str(tmp_path / "file")]
    assert cli.call(["compress", "--run", str(finished_run), "--prior", "pixelcnn", *options]) == 0
    said = capsys.readouterr().err
    assert "resized to 16x16" in said
    assert "have no labels: each takes the label under which it needs the fewest bits" in said
    back = made(
        capsys, "decompress", str(tmp_path / "file"), "--run", str(finished_run), "--out", str(tmp_path / "out")
    )
    assert back["images"] == 9
    assert back["labels"] is None  # they were chosen to save bits and say nothing of the images
    record = made(
        capsys,
        *("compress", "--run", str(finished_run), "--prior", "unigram", *options[:-1], str(tmp_path / "second")),
    )
    assert record["labels"] == "none"
    assert record["bits"]["labels"] == 0


def test_labels_are_matched_by_name(finished_run: Path, tmp_path: Path, capsys: Capture) -> None:
    _, data = data_of(RunFolder(finished_run))
    folder, other = tmp_path / "known", tmp_path / "unknown"
    names = list(data.class_names[-2:])
    generator = np.random.default_rng(1)
    for index in range(40):
        picture = Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8))
        for place, name in ((folder, names[index % 2]), (other, ("dog", names[0])[index % 2])):
            (place / name).mkdir(parents=True, exist_ok=True)
            picture.save(place / name / f"{index}.png")
    for source, kind in ((folder, "stored"), (other, "chosen")):
        file = tmp_path / f"{source.name}.vqgen"
        options = ["--data", str(source), "--split", "all", "--prior", "pixelcnn", "--out", str(file)]
        record = made(capsys, "compress", "--run", str(finished_run), *options)
        assert record["labels"] == kind
        back = made(
            capsys, "decompress", str(file), "--run", str(finished_run), "--out", str(tmp_path / f"{source.name}-out")
        )
        assert (back["labels"] is not None) == (kind == "stored")
        if kind == "stored":
            shown = [back["class_names"][label] for label in back["labels"]]
            assert sorted(shown) == sorted(names * 20)


def test_no_labels_where_the_prior_knows_images_without(run_copy: Path, tmp_path: Path, capsys: Capture) -> None:
    for level in ("top", "bottom"):
        relabel(run_copy, "pixelcnn", level, 0.1)
    options = ["--run", str(run_copy), "--prior", "pixelcnn", "--no-labels", "--out", str(tmp_path / "file")]
    record = made(capsys, "compress", *options)
    assert record["labels"] == "none"
    back = made(capsys, "decompress", str(tmp_path / "file"), "--run", str(run_copy), "--out", str(tmp_path / "out"))
    assert back["labels"] is None
    assert "label" not in load_file(tmp_path / "out" / "codes.safetensors")


def test_what_compress_refuses(
    finished_run: Path, tmp_path: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    call = ["compress", "--run", str(finished_run), "--out", str(file)]
    said = fails(*call, "--prior", "top=roundtrip,bottom=pixelcnn")
    assert "roundtrip of level 'top' cannot drive an entropy coder" in said
    for able in ("pixelcnn", "pixelsnail", "transformer", "unigram", "uniform"):
        assert able in said
    assert "names none for level 'bottom'" in fails(*call, "--prior", "top=pixelcnn")
    assert "Did you mean 'pixelcnn'" in fails(*call, "--prior", "pixelcn")
    assert "no trained pixelsnail" in fails(*call, "--prior", "pixelsnail")
    assert "Did you mean 'test'" in fails(*call, "--split", "tset")
    assert "without label dropout" in " ".join(fails(*call, "--prior", "pixelcnn", "--no-labels").split())
    assert not list(tmp_path.iterdir())
    file.write_text("mine")
    assert "already exists" in fails(*call)
    assert file.read_text() == "mine"
    monkeypatch.setitem(sys.modules, "constriction", None)
    assert "pip install 'vqgen[compress]'" in fails(*call)
    assert "pip install 'vqgen[compress]'" in fails("decompress", str(file), "--out", str(tmp_path / "out"))


def test_a_place_that_cannot_be_written_is_refused_before_any_work(
    finished_run: Path, small_file: Path, tmp_path: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_work(*_: Any, **__: Any) -> Any:
        raise AssertionError("work was begun")

    monkeypatch.setattr(compress, "load_models", no_work)
    monkeypatch.setattr(decompress, "load_models", no_work)
    for call in (["compress"], ["decompress", str(small_file)]):
        for out in (small_file / "new", tmp_path / ("x" * 300)):
            said = fails(*call, "--run", str(finished_run), "--out", str(out))
            assert "cannot be written" in said
            assert len(said.splitlines()) == 1
    assert "too long" in fails("decompress", "x" * 300, "--run", str(finished_run), "--out", str(tmp_path / "out"))


def test_an_image_without_any_error_does_not_spoil_the_mean(
    finished_run: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compress, "psnr", lambda made, images: torch.full((len(images),), math.inf))
    call = ["compress", "--run", str(finished_run), "--prior", "uniform", "-n", "3", "--out", str(tmp_path / "file")]
    assert made(capsys, *call)["psnr"] == 99


def test_an_empty_source_is_refused(finished_run: Path, tmp_path: Path, fails: Fails) -> None:
    (tmp_path / "nothing").mkdir()
    call = ["compress", "--run", str(finished_run), "--data", str(tmp_path / "nothing"), "--out", str(tmp_path / "f")]
    assert "nothing" in fails(*call)
    assert not (tmp_path / "f").exists()


def test_a_folder_that_is_there_is_not_touched(
    finished_run: Path, small_file: Path, tmp_path: Path, fails: Fails, capsys: Capture
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    assert "already exists" in fails("decompress", str(small_file), "--run", str(finished_run), "--out", str(out))
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    (out / "mine.txt").unlink()
    made(capsys, "decompress", str(small_file), "--run", str(finished_run), "--out", str(out))
    assert (out / "0004.png").is_file()


def test_a_damaged_file_is_a_clear_line_and_leaves_nothing(
    finished_run: Path, small_file: Path, tmp_path: Path, fails: Fails
) -> None:
    """A sample of what `test_compression_format` tries whole, through the command line."""
    whole = small_file.read_bytes()
    generator = np.random.default_rng(5)
    damaged = []
    for place in generator.integers(0, len(whole), 12).tolist():
        changed = bytearray(whole)
        changed[place] ^= int(generator.integers(1, 256))
        damaged.append(bytes(changed))
    damaged += [whole[:length] for length in (0, 1, 7, 60, len(whole) - 1)]
    damaged += [whole + b"\0", whole + whole]
    for number, content in enumerate(damaged):
        file = tmp_path / f"damaged{number}"
        file.write_bytes(content)
        said = fails("decompress", str(file), "--run", str(finished_run), "--out", str(tmp_path / "out"))
        assert said.startswith("Error: ")
        assert "damaged" in said
        assert len(said.splitlines()) == 1
        assert not (tmp_path / "out").exists()
        assert not list(tmp_path.glob(".*"))


def test_a_file_of_another_run_says_what_was_expected_and_found(
    run_copy: Path, small_file: Path, tmp_path: Path, fails: Fails
) -> None:
    header = read(small_file).header
    call = ["decompress", str(small_file), "--run", str(run_copy), "--out", str(tmp_path / "out")]
    bottom = run_copy / "priors" / "pixelcnn" / "bottom" / "config.json"
    kept = bottom.read_text()
    bottom.write_text(kept + " ")  # other bytes, so another model
    said = fails(*call)
    assert f"expected {header.priors[1].fingerprint}, found " in said
    assert "pixelcnn of level 'bottom'" in said
    bottom.write_text(kept)
    record = json.loads((run_copy / "run.json").read_text())
    del record["stages"]["priors/transformer/top"]
    (run_copy / "run.json").write_text(json.dumps(record))
    assert "no trained transformer for level 'top'" in fails(*call)
    codec = run_copy / "codec" / "config.json"
    codec.write_text(codec.read_text() + " ")
    said = fails(*call)
    assert f"another codec than that of {run_copy}: expected {header.codec}, found " in said
    assert "found " + short_print(run_copy / "codec") in said
    assert not (tmp_path / "out").exists()


def test_a_header_of_other_priors_or_shapes_is_refused(
    finished_run: Path, small_file: Path, tmp_path: Path, fails: Fails
) -> None:
    content = read(small_file)
    named = content.header.priors
    prints = named[0].fingerprint
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"levels": (("top", 2, 2, 17), ("bottom", 4, 4, 16))}, "shapes are not those of its codec"),
        ({"image": (1, 16, 16)}, "shapes are not those of its codec"),
        ({"classes": 9}, "classes are not those of its priors"),
        ({"priors": (named[0].model_copy(update={"name": "roundtrip"}), named[1])}, "cannot drive an entropy coder"),
        ({"priors": (named[0].model_copy(update={"name": "../../etc"}), named[1])}, "missing in its header: priors"),
        ({"priors": (named[0].model_copy(update={"name": "os-system"}), named[1])}, "prior 'os-system'"),
        ({"priors": (named[1], named[1])}, f"expected {named[1].fingerprint}"),
        ({"codec": "0" * PRINT}, f"expected {'0' * PRINT}"),
    ]
    assert prints != named[1].fingerprint
    for number, (changes, expected) in enumerate(wrong):
        file = tmp_path / f"wrong{number}"
        file.write_bytes(pack(content._replace(header=content.header.model_copy(update=changes))))
        said = fails("decompress", str(file), "--run", str(finished_run), "--out", str(tmp_path / "out"))
        assert expected in said
        assert not (tmp_path / "out").exists()


def test_bits_that_no_prior_of_this_machine_gives_are_a_line_of_their_own(
    finished_run: Path, small_file: Path, tmp_path: Path, fails: Fails
) -> None:
    """Files that are whole and of this run, and yet cannot be what was written: as where sums are rounded otherwise."""
    content = read(small_file)
    words = content.words
    changed = [
        content._replace(words=words ^ np.uint32(1 << 20)),
        content._replace(words=words[::-1].copy()),
        content._replace(words=words[:-2]),
        content._replace(words=np.concatenate([words, words])),
        content._replace(digest=bytes(8)),
        content._replace(header=content.header.model_copy(update={"images": 4})),
        content._replace(header=content.header.model_copy(update={"images": 6})),
    ]
    for number, wrong in enumerate(changed):
        file = tmp_path / f"wrong{number}"
        file.write_bytes(pack(wrong))
        said = fails("decompress", str(file), "--run", str(finished_run), "--out", str(tmp_path / "out"))
        assert "rounds the probabilities otherwise" in said
        assert content.header.made_with in said
        assert not (tmp_path / "out").exists()


def test_a_prior_whose_sums_differ_by_a_rounding_is_noticed(
    finished_run: Path, small_file: Path, tmp_path: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = decompress.load_models

    def shaken(*arguments: Any) -> Any:
        models = original(*arguments)
        with torch.no_grad():
            for parameter in models[0].prior.parameters():
                parameter.mul_(1.05)
        return models

    monkeypatch.setattr(decompress, "load_models", shaken)
    said = fails("decompress", str(small_file), "--run", str(finished_run), "--out", str(tmp_path / "out"))
    assert "rounds the probabilities otherwise" in said
    assert not (tmp_path / "out").exists()


def test_an_error_while_compressing_leaves_no_file(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any) -> Images:
        raise InputError("broken")

    monkeypatch.setattr(compress.Walk, "images", broken)
    assert cli.call(["compress", "--run", str(finished_run), "--out", str(tmp_path / "file")]) == 2
    assert not list(tmp_path.iterdir())


def test_the_same_images_are_the_same_file(finished_run: Path, tmp_path: Path, capsys: Capture) -> None:
    torch.manual_seed(4)
    state = torch.get_rng_state()
    for name in "ab":
        made(capsys, "compress", "--run", str(finished_run), "-n", "5", "--out", str(tmp_path / name))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert torch.equal(torch.get_rng_state(), state)
