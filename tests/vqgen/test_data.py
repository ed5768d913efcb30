from __future__ import annotations

import io
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

import vqgen.image_split
from vqgen import shapes
from vqgen.codes import ImageSpec
from vqgen.config import DataSettings
from vqgen.data import ImageData, load_data
from vqgen.errors import InputError
from vqgen.images import ORIENTATION
from vqgen.splits import Classes, canonical, carve, choose, in_path

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 8, 6, 3), dtype=np.uint8)
KINDS = ("cat", "dog")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def load(source: object, seed: int = 0, **settings: Any) -> ImageData:
    return load_data(DataSettings(source=str(source), **settings), seed)


def everything(data: ImageData, split: str) -> tuple[np.ndarray, list[int] | None]:
    batch = data.splits[split].__getitems__(range(len(data.splits[split])))
    return batch["images"].numpy(), batch["label"].tolist() if "label" in batch else None


def as_set(images: np.ndarray) -> set[bytes]:
    return {np.ascontiguousarray(image).tobytes() for image in images}


def stored(pixels: np.ndarray) -> set[bytes]:
    return as_set(pixels.transpose(0, 3, 1, 2))


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def write_folder(root: Path, pixels: np.ndarray = PIXELS, kinds: tuple[str, ...] = KINDS) -> Path:
    for index, picture in enumerate(pixels):
        folder = root / kinds[index % len(kinds)] if kinds else root
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{index:03}.png").write_bytes(png(picture))
    return root


def table(pixels: np.ndarray, label_column: str = "label", image_column: str = "image") -> datasets.Dataset:
    features = datasets.Features({image_column: datasets.Image(), label_column: datasets.ClassLabel(names=list(KINDS))})
    rows = {
        image_column: [{"bytes": png(picture), "path": None} for picture in pixels],
        label_column: [index % 2 for index in range(len(pixels))],
    }
    return datasets.Dataset.from_dict(rows, features=features)


# Splits without pictures


def test_split_names() -> None:
    assert [canonical(name) for name in ("Train", "val", "dev", "valid", "testing", "extra")] == [
        "train",
        "validation",
        "validation",
        "validation",
        "test",
        None,
    ]
    assert in_path(["data", "train-00000-of-00001"]) == "train"
    assert in_path(["test", "part0"]) == "test"
    assert in_path(["latest", "contest"]) is None


@pytest.mark.parametrize(
    ("count", "found", "sizes"),
    [
        (1000, ["train"], (900, 50, 50)),
        (1000, ["train", "test"], (950, 50, 0)),
        (1000, ["train", "validation"], (950, 0, 50)),
        (1000, ["train", "validation", "test"], (1000, 0, 0)),
        (200_000, ["train"], (190_000, 5000, 5000)),
        (3, ["train"], (1, 1, 1)),
        (2, ["train", "test"], (1, 1, 0)),
        (1, ["train", "validation", "test"], (1, 0, 0)),
    ],
)
def test_carving(count: int, found: list[str], sizes: tuple[int, int, int]) -> None:
    carved = carve(count, found, None, seed=3)
    assert tuple(len(carved.get(name, ())) for name in ("train", "validation", "test")) == sizes
    assert sorted(np.concatenate(list(carved.values())).tolist()) == list(range(count))
    again = carve(count, found, None, seed=3)
    assert all(np.array_equal(places, again[name]) for name, places in carved.items())
    assert all((np.diff(places) > 0).all() for places in carved.values())


def test_carving_is_seeded_and_needs_enough() -> None:
    assert not np.array_equal(carve(1000, ["train"], None, 0)["test"], carve(1000, ["train"], None, 1)["test"])
    for count, found in ((2, ["train"]), (1, ["train", "test"]), (0, ["train", "test", "validation"])):
        with pytest.raises(InputError, match="too few"):
            carve(count, found, None, 0)


def test_carving_keeps_the_proportions_of_the_classes() -> None:
    labels = np.repeat([0, 1, 2], [1400, 500, 100])
    carved = carve(2000, ["train"], labels, seed=0)
    for split in ("validation", "test"):
        counts = np.bincount(labels[carved[split]], minlength=3)
        assert (np.abs(counts - [70, 25, 5]) <= 1).all(), counts


@pytest.mark.parametrize("size", [0, 1, 7, 50, 100])
def test_choosing_is_balanced_at_every_size(size: int) -> None:
    labels = np.arange(100) % 5
    chosen = choose(size, 100, labels, 0, "limit train")
    assert len(chosen) == len(set(chosen.tolist())) == size
    assert np.ptp(np.bincount(labels[chosen], minlength=5)) <= 1 or size < 5


def test_classes_are_names_or_sorted_values() -> None:
    assert Classes.of(np.array([10, 2, 2]), None).names == ("2", "10")
    assert Classes.of(np.array(["b", "a"]), None).names == ("a", "b")
    classes = Classes.of(np.array([0]), ("cat", "dog"))
    assert classes.encode(np.array([1, 0]), ("cat", "dog"), "train").tolist() == [1, 0]
    assert classes.encode(np.array([1, 0]), ("dog", "cat"), "test").tolist() == [0, 1]
    with pytest.raises(InputError, match=r"test: image 1 has the label 'class number -1'"):
        classes.encode(np.array([1, -1]), ("cat", "dog"), "test")
    with pytest.raises(InputError, match="'bird'"):
        classes.encode(np.array(["bird"]), None, "test")


# Sources


def test_shapes() -> None:
    data = load("shapes", count=100)
    assert data.image == ImageSpec(3, 32, 32)
    assert data.class_names == shapes.CLASS_NAMES
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 100, "validation": 10, "test": 10}
    images, labels = everything(data, "test")
    assert np.array_equal(images, shapes.render(range(10), split="test"))
    assert labels == shapes.labels(range(10)).tolist()
    assert data.description == "shapes: 100 train, 10 validation, 10 test; 8 classes; 3x32x32"
    other = load("shapes", count=20, image_size=(12, 20), channels=1)
    assert other.splits["train"][0]["images"].shape == (1, 12, 20)


def test_class_folders(tmp_path: Path) -> None:
    data = load(write_folder(tmp_path / "pets"))
    assert data.class_names == KINDS
    assert data.image == ImageSpec(3, 8, 6)
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 36, "validation": 2, "test": 2}
    seen: set[bytes] = set()
    for name in data.splits:
        images, labels = everything(data, name)
        seen |= as_set(images)
        of = {picture.transpose(2, 0, 1).tobytes(): index % 2 for index, picture in enumerate(PIXELS)}
        assert labels == [of[image.tobytes()] for image in images]
        assert data.splits[name].labels().tolist() == labels  # type: ignore[union-attr]
    assert seen == stored(PIXELS)


def test_split_folders_and_a_flat_folder(tmp_path: Path) -> None:
    for split, part in (("train", slice(0, 20)), ("val", slice(20, 30)), ("test", slice(30, 40))):
        write_folder(tmp_path / "split" / split, PIXELS[part])
    data = load(tmp_path / "split")
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 20, "validation": 10, "test": 10}
    assert as_set(everything(data, "validation")[0]) == stored(PIXELS[20:30])
    assert data.class_names == KINDS

    flat = load(write_folder(tmp_path / "flat", kinds=()))
    assert flat.class_names == ()
    assert set(flat.splits["train"][0]) == {"images"}
    assert flat.splits["train"].labels() is None
    assert load(tmp_path / "split", labels=False).class_names == ()


def test_parquet_files_name_their_splits(tmp_path: Path) -> None:
    table(PIXELS[:15]).to_parquet(tmp_path / "train-00000-of-00002.parquet")
    table(PIXELS[15:30]).to_parquet(tmp_path / "train-00001-of-00002.parquet")
    table(PIXELS[30:]).to_parquet(tmp_path / "test-00000-of-00001.parquet")
    data = load(tmp_path)
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 28, "validation": 2, "test": 10}
    assert as_set(everything(data, "test")[0]) == stored(PIXELS[30:])
    assert data.class_names == KINDS
    assert data.notes == ("validation (2 images) carved from train",)
    single = load(tmp_path / "test-00000-of-00001.parquet")
    assert sum(len(split) for split in single.splits.values()) == 10


def test_arrow_files(tmp_path: Path) -> None:
    table(PIXELS).save_to_disk(tmp_path / "saved")
    arrow = next((tmp_path / "saved").glob("*.arrow"))
    shutil.copy(arrow, tmp_path / "pets.arrow")
    assert load(tmp_path / "pets.arrow").class_names == KINDS
    (tmp_path / "x").mkdir()
    shutil.copy(arrow, tmp_path / "x" / "val.arrow")
    shutil.copy(arrow, tmp_path / "x" / "test.arrow")
    with pytest.raises(InputError, match=r"none of train"):
        load(tmp_path / "x")


def test_saved_data_sets(tmp_path: Path) -> None:
    table(PIXELS).save_to_disk(tmp_path / "one")
    assert len(load(tmp_path / "one").splits["train"]) == 36
    parts = {"train": table(PIXELS[:30]), "dev": table(PIXELS[30:]), "unused": table(PIXELS[:1])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "several")
    data = load(tmp_path / "several")
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 28, "validation": 10, "test": 2}
    assert as_set(everything(data, "validation")[0]) == stored(PIXELS[30:])
    shutil.rmtree(tmp_path / "several" / "train")
    with pytest.raises(InputError, match="cannot be read"):
        load(tmp_path / "several")


@pytest.mark.parametrize("save", [lambda p, x, _: np.save(p, x), lambda p, x, y: np.savez(p, images=x, labels=y)])
def test_numpy_files(tmp_path: Path, save: Callable[..., None]) -> None:
    labels = np.array(["dog", "cat"] * 20)
    path = tmp_path / ("a.npy" if "_" in save.__code__.co_varnames else "a.npz")
    save(path, PIXELS, labels)
    data = load(path)
    assert data.image == ImageSpec(3, 8, 6)
    assert data.class_names == (() if path.suffix == ".npy" else KINDS)
    assert set.union(*(as_set(everything(data, name)[0]) for name in data.splits)) == stored(PIXELS)
    again = pickle.loads(pickle.dumps(data.splits["train"]))
    assert torch.equal(again[0]["images"], data.splits["train"][0]["images"])
    save(path, PIXELS[..., 0], labels)
    assert load(path).image == ImageSpec(1, 8, 6)


@pytest.mark.parametrize(
    ("images", "expected", "note"),
    [
        (np.arange(200).reshape(50, 2, 2).astype(np.uint16) * 20, 4095, "12-bit values from 0 to 4095"),
        (np.arange(200).reshape(50, 2, 2).astype(np.uint16) * 320, 65535, "16-bit values from 0 to 65535"),
        (np.arange(200).reshape(50, 2, 2), 255, "8-bit values from 0 to 255"),
        (np.arange(200).reshape(50, 2, 2) / 199, 1, "float values from 0 to 1"),
        (np.arange(200).reshape(50, 2, 2).astype(np.float16), 255, "float values from 0 to 255"),
    ],
)
def test_what_numbers_mean_is_decided_by_the_training_images(
    tmp_path: Path, images: np.ndarray, expected: int, note: str
) -> None:
    np.save(tmp_path / "a.npy", images)
    data = load(tmp_path / "a.npy", image_size=2)
    assert data.notes[0].startswith(note)
    seen = np.concatenate([everything(data, name)[0] for name in data.splits])
    scaled = np.rint(images.astype(np.float64) * 255 / expected)
    assert sorted(seen.reshape(-1).tolist()) == sorted(scaled.reshape(-1).tolist())


def test_signed_floats(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.linspace(-1, 1, 160, dtype=np.float32).reshape(40, 2, 2))
    data = load(tmp_path / "a.npy")
    assert data.notes[0].startswith("float values from -1 to 1")
    assert everything(data, "train")[0].min() <= 2


def test_numpy_files_that_cannot_be_used(tmp_path: Path) -> None:
    def refused(match: str, name: str = "a.npz", **arrays: Any) -> None:
        np.savez(tmp_path / "a.npz", **arrays)
        with pytest.raises(InputError, match=match):
            load(tmp_path / name)

    refused("pickled Python objects", images=np.array([{}], dtype=object))
    refused("pickled Python objects", images=PIXELS, labels=np.array([None] * 40, dtype=object))
    refused("no array 'images', only x", x=PIXELS)
    refused("Move the channels last", images=PIXELS.transpose(0, 3, 1, 2))
    refused("expected", images=PIXELS[0, 0])
    refused("for each of the 40 images", images=PIXELS, labels=np.zeros(39, dtype=int))
    refused("for each of the 40 images", images=PIXELS, labels=np.zeros(40))
    refused("complex128", images=PIXELS.astype(complex))
    refused("not finite", images=np.full((40, 2, 2), np.nan))
    refused("none of", images=np.full((40, 2, 2), 1e6))
    refused(r"not in \[0, 65535\]", images=np.full((40, 2, 2), -5))
    np.save(tmp_path / "object.npy", np.array([{}], dtype=object))
    with pytest.raises(InputError, match="pickled Python objects"):
        load(tmp_path / "object.npy")
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 not really")
    (tmp_path / "bad.npy").write_bytes(b"\x93NUMPY\x01\x00")
    (tmp_path / "text.npz").write_text("hello")
    for name in ("bad.npz", "bad.npy", "text.npz"):
        with pytest.raises(InputError, match=r"cannot be read"):
            load(tmp_path / name)


def test_folder_names_are_taken_literally(tmp_path: Path) -> None:
    root = tmp_path / "run [1]*, 50%#x"
    write_folder(root / "pets")
    table(PIXELS).to_parquet(root / "train.parquet")
    assert len(load(root / "pets").splits["train"]) == len(load(root / "train.parquet").splits["train"]) == 36


# Columns and labels


def test_columns_are_found_or_named(tmp_path: Path) -> None:
    rows = table(PIXELS, "fine_label", "img").add_column("coarse", ["x", "y"] * 20).add_column("weight", [0.5] * 40)
    rows.to_parquet(tmp_path / "a.parquet")
    assert load(tmp_path / "a.parquet").class_names == KINDS
    assert load(tmp_path / "a.parquet", label_column="coarse").class_names == ("x", "y")
    assert load(tmp_path / "a.parquet", image_column="img").class_names == KINDS
    with pytest.raises(InputError, match=r"no column 'image'; the columns are img, fine_label, coarse, weight"):
        load(tmp_path / "a.parquet", image_column="image")
    with pytest.raises(InputError, match=r"no column 'coarce'.*Did you mean 'coarse'"):
        load(tmp_path / "a.parquet", label_column="coarce")
    with pytest.raises(InputError, match="does not hold classes"):
        load(tmp_path / "a.parquet", label_column="weight")
    table(PIXELS, image_column="photo").to_parquet(tmp_path / "b.parquet")
    assert load(tmp_path / "b.parquet").image == ImageSpec(3, 8, 6)
    pq.write_table(pa.table({"text": ["a"] * 5, "n": [1] * 5}), tmp_path / "c.parquet")
    with pytest.raises(InputError, match=r"No column of images found; the columns are text, n"):
        load(tmp_path / "c.parquet")


@pytest.mark.parametrize(
    ("values", "names"),
    [([3, 1] * 20, ("1", "3")), (["b", "a"] * 20, ("a", "b")), ([True, False] * 20, ("0", "1"))],
)
def test_plain_labels_and_plain_bytes(tmp_path: Path, values: list[object], names: tuple[str, ...]) -> None:
    pq.write_table(pa.table({"image": [png(p) for p in PIXELS], "label": values}), tmp_path / "a.parquet")
    data = load(tmp_path / "a.parquet")
    assert data.class_names == names
    of = {p.transpose(2, 0, 1).tobytes(): 1 - index % 2 for index, p in enumerate(PIXELS)}
    images, labels = everything(data, "train")
    assert labels == [of[image.tobytes()] for image in images]


def test_pictures_as_numbers_and_as_paths(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": PIXELS.tolist()}), tmp_path / "lists.parquet")
    assert as_set(everything(load(tmp_path / "lists.parquet"), "train")[0]) <= stored(PIXELS)
    write_folder(tmp_path / "flat", kinds=())
    paths = [str(path) for path in sorted((tmp_path / "flat").iterdir())]
    pq.write_table(pa.table({"image": paths}), tmp_path / "paths.parquet")
    assert as_set(everything(load(tmp_path / "paths.parquet"), "train")[0]) <= stored(PIXELS)


def test_missing_labels_are_an_error(tmp_path: Path) -> None:
    images = [png(p) for p in PIXELS]
    pq.write_table(pa.table({"image": images, "label": [None, *range(39)]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"no value in 1 of 40 rows"):
        load(tmp_path / "a.parquet")
    (tmp_path / "b").mkdir()
    pq.write_table(pa.table({"image": images, "label": [0, 1] * 20}), tmp_path / "b" / "train.parquet")
    pq.write_table(pa.table({"image": images}), tmp_path / "b" / "test.parquet")
    data = load(tmp_path / "b")
    with pytest.raises(InputError, match="test split has none"):
        data.splits["test"]
    assert len(load(tmp_path / "b", labels=False).splits["test"]) == 40


# Sizes, colours, broken pictures


def test_mixed_sizes_and_modes_become_one(tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    for index in range(20):
        mode = ("RGB", "L", "RGBA", "P", "CMYK", "1", "LA")[index % 7]
        size = (20, 20) if index % 2 else (50, 30)
        suffix = "jpg" if mode == "CMYK" else "png"
        Image.new("RGB", size, (200, 100, 50)).convert(mode).save(folder / f"{index:02}.{suffix}")
    Image.fromarray(np.full((20, 20), 40000, dtype=np.uint16)).save(folder / "20.png")
    data = load(folder, image_size=(16, 24), channels=3)
    for split in data.splits.values():
        assert split.__getitems__(range(len(split)))["images"].shape[1:] == (3, 16, 24)
    assert any(note.startswith("images are resized to 16x24, such as") for note in data.notes)
    natural = load(folder)
    assert (natural.image.height, natural.image.width) in ((30, 50), (20, 20))


def test_camera_rotation_decides_the_size(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 8
    for index in range(5):
        Image.fromarray(PIXELS[index]).save(tmp_path / f"{index}.png", exif=exif)
    data = load(tmp_path)
    assert data.image == ImageSpec(3, 6, 8)
    assert as_set(everything(data, "train")[0]) <= as_set(np.rot90(PIXELS[:5], 1, (1, 2)).transpose(0, 3, 1, 2))


def break_one(folder: Path, index: int = 0) -> Path:
    path = sorted(folder.rglob("*.png"))[index]
    path.write_bytes(path.read_bytes()[:60])
    return path


def find_broken(data: ImageData) -> list[str]:
    told = []
    for split in data.splits.values():
        split._notify = told.append
        split.__getitems__(range(len(split)))
    return told


def test_a_truncated_picture_is_replaced_by_its_neighbour_of_the_same_class(tmp_path: Path) -> None:
    whole = load(write_folder(tmp_path / "pets"))
    readable = {name: everything(whole, name) for name in whole.splits}
    path = break_one(tmp_path / "pets", 7)
    data = load(tmp_path / "pets", unreadable=0.1)
    told = find_broken(data)
    assert len(told) == 1
    assert path.name in told[0]
    assert sum(split.unreadable for split in data.splits.values()) == 1
    for name in data.splits:
        images, labels = everything(data, name)
        before, before_labels = readable[name]
        assert labels == before_labels
        for place in np.flatnonzero((images != before).any(axis=(1, 2, 3))):
            same = [i for i, label in enumerate(labels or []) if label == (labels or [])[place]]
            after = same[(same.index(place) + 1) % len(same)]
            assert np.array_equal(images[place], before[after])


def test_the_stand_in_does_not_depend_on_the_order_of_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "pets")
    for index in (3, 4, 5):
        break_one(tmp_path / "pets", index)
    monkeypatch.setattr(vqgen.image_split, "CACHE_BYTES", 0)
    forward = load(tmp_path / "pets", unreadable=0.5).splits["train"]
    backward = load(tmp_path / "pets", unreadable=0.5).splits["train"]
    order = list(range(len(forward)))
    images = torch.stack([forward[index]["images"] for index in order])
    reverse = torch.stack([backward[index]["images"] for index in order[::-1]]).flip(0)
    assert torch.equal(images, reverse)
    assert torch.equal(images, forward.__getitems__(order)["images"])
    assert forward.unreadable == backward.unreadable


def test_too_many_unreadable_pictures_are_an_error_that_names_them(tmp_path: Path) -> None:
    path = break_one(write_folder(tmp_path / "pets", kinds=()))
    with pytest.raises(InputError, match=path.name):
        find_broken(load(tmp_path / "pets"))
    for file in (tmp_path / "pets").iterdir():
        file.write_bytes(b"")
    with pytest.raises(InputError, match=r"None of 32 training images can be read"):
        load(tmp_path / "pets", unreadable=1)


def test_a_class_of_which_nothing_can_be_read(tmp_path: Path) -> None:
    write_folder(tmp_path / "pets")
    for file in (tmp_path / "pets" / "dog").iterdir():
        file.write_bytes(b"no picture")
    with pytest.raises(InputError, match="No image of the class of"):
        find_broken(load(tmp_path / "pets", unreadable=1))


# Folders and names that are not there


def test_sources_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(source: object, match: str, **settings: Any) -> None:
        with pytest.raises(InputError, match=match):
            load(source, **settings)

    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "is empty")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a")
    refused(tmp_path / "texts", r"No image in the folder .*such as 'a.txt'")
    refused(tmp_path / "texts" / "a.txt", "not a file that images can be read from")
    (tmp_path / "one.png").write_bytes(png(PIXELS[0]))
    refused(tmp_path / "one.png", "Give its folder")
    for missing in ("/no/such/folder", "./nothing", "~/nothing-here", "a/b/c", "missing.npz", "data\\pets"):
        refused(missing, "No file or folder at")
    refused("", "data.source is empty")
    refused("shpaes", r"cannot be loaded from the hub.*Did you mean 'shapes'")
    refused("nobody/nothing", "cannot be loaded from the hub")
    refused("shapes", "belong to a data set on the hub", subset="x")
    refused(tmp_path / "x.npz", "No file or folder")
    np.savez(tmp_path / "x.npz", images=PIXELS)
    refused(tmp_path / "x.npz", "no columns to name", label_column="y")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no parquet")
    refused(tmp_path / "bad.parquet", "cannot be read")
    np.savez(tmp_path / "two.npz", images=PIXELS[:2])
    refused(tmp_path / "two.npz", "too few")


def test_an_unreachable_hub_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    with pytest.raises(InputError, match=r"the hub cannot be reached \(Name or service not known\)"):
        load("nobody/nothing")


# Laziness, limits, flips, memory


def test_the_test_split_is_never_read_unless_asked_for(tmp_path: Path) -> None:
    table(PIXELS).to_parquet(tmp_path / "train.parquet")
    (tmp_path / "test.parquet").write_bytes(b"poison")
    data = load(tmp_path, limit=10)
    for name in ("train", "validation"):
        everything(data, name)
    with pytest.raises(InputError, match="cannot be read"):
        data.splits["test"]
    some = load_data(DataSettings(source=str(tmp_path)), 0, splits=("train", "validation"))
    assert list(some.splits) == ["train", "validation"]
    assert some.description.endswith("38 train, 2 validation; 2 classes; 3x8x6")
    with pytest.raises(KeyError):
        some.splits["test"]


def test_a_carved_test_split_is_never_decoded_unless_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "pets")
    test = load(tmp_path / "pets").splits["test"]
    for place in test._places.tolist():
        Path(test._rows.name(place).split(" (")[0]).write_bytes(b"poison")
    data = load(tmp_path / "pets", unreadable=0)
    for name in ("train", "validation"):
        everything(data, name)
    with pytest.raises(InputError, match="unreadable"):
        everything(data, "test")


def test_limit_is_a_balanced_seeded_choice(tmp_path: Path) -> None:
    write_folder(tmp_path / "pets")
    data = load(tmp_path / "pets", limit=8)
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 8, "validation": 2, "test": 2}
    assert np.bincount(data.splits["train"].labels()).tolist() == [4, 4]  # type: ignore[arg-type]
    full = as_set(everything(load(tmp_path / "pets"), "train")[0])
    assert as_set(everything(data, "train")[0]) < full
    assert np.array_equal(everything(data, "train")[0], everything(load(tmp_path / "pets", limit=8), "train")[0])


def test_flips_are_a_function_of_seed_epoch_and_index() -> None:
    plain = load("shapes", count=64).splits["train"].__getitems__(range(64))["images"]
    data = load("shapes", count=64, flip=True)
    train = data.splits["train"]
    flipped = []
    for epoch in (0, 1, 0):
        train.set_epoch(epoch)
        images = torch.stack([train[index]["images"] for index in reversed(range(64))]).flip(0)
        mirrored = (images != plain).flatten(1).any(dim=1)
        assert torch.equal(images[mirrored], plain[mirrored].flip(-1))
        assert 16 < mirrored.sum() < 48  # fails by chance for 1 seed in 30,000
        flipped.append(mirrored.tolist())
    assert flipped[0] == flipped[2] != flipped[1]
    other = load("shapes", seed=1, count=64, flip=True).splits["train"].__getitems__(range(64))["images"]
    assert (other != plain).flatten(1).any(dim=1).tolist() != flipped[0]
    validation = data.splits["validation"]
    validation.set_epoch(1)
    assert np.array_equal(everything(data, "validation")[0], shapes.render(range(6), split="validation"))


def test_memory_and_no_memory_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "pets")
    cached = load(tmp_path / "pets").splits["train"]
    monkeypatch.setattr(vqgen.image_split, "CACHE_BYTES", 0)
    fresh = load(tmp_path / "pets").splits["train"]
    assert fresh._cache is None
    for indices in ([3, 3, 1], list(range(36)), [0, 35], []):
        for _ in range(2):
            one, two = cached.__getitems__(indices), fresh.__getitems__(indices)
            assert torch.equal(one["images"], two["images"])
            one["images"].zero_()  # what a caller does to a batch stays with the caller
    for index in (-1, 36):
        with pytest.raises(IndexError):
            cached[index]


@pytest.mark.parametrize("workers", [0, 2])
def test_loaders(workers: int) -> None:
    train = load("shapes", count=40).splits["train"]
    sampler = BatchSampler(SequentialSampler(train), 16, drop_last=False)
    loader = DataLoader(train, batch_sampler=sampler, collate_fn=_same, num_workers=workers)
    for _ in range(2):
        batches = list(loader)
        assert [len(batch["label"]) for batch in batches] == [16, 16, 8]
        images = torch.cat([batch["images"] for batch in batches])
        assert np.array_equal(images.numpy(), shapes.render(range(40)))


def _same(batch: Any) -> Any:
    return batch


def test_fingerprint_follows_the_content_not_the_place(tmp_path: Path) -> None:
    write_folder(tmp_path / "here")
    shutil.copytree(tmp_path / "here", tmp_path / "over there")
    first = load(tmp_path / "here")
    assert load(tmp_path / "over there").fingerprint == first.fingerprint
    others = [
        load(tmp_path / "here", limit=20),
        load(tmp_path / "here", labels=False),
        load(tmp_path / "here", image_size=4),
        load(tmp_path / "here", seed=1),
        load("shapes", count=36),
    ]
    (tmp_path / "here" / "cat" / "000.png").write_bytes(png(255 - PIXELS[0]))
    changed = load(tmp_path / "here")
    assert len({first.fingerprint, changed.fingerprint, *(data.fingerprint for data in others)}) == 7
    some = load_data(DataSettings(source="shapes", count=36), 0, splits=("train", "validation"))
    assert some.fingerprint == others[-1].fingerprint


def test_the_global_random_state_is_left_alone(tmp_path: Path) -> None:
    write_folder(tmp_path / "pets")
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index, union-attr]
    everything(load(tmp_path / "pets", flip=True, limit=10), "train")
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])  # type: ignore[index]
