"""Names on the Hugging Face hub as data sources, answered from parquet files on this disk: no network is used."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import pytest
from PIL import Image

from vqgen.config import DataSettings
from vqgen.data import ImageData, load_data
from vqgen.errors import InputError

NAME = "painters/animals"
CLASSES = ("cat", "dog", "emu")
PIXELS = np.random.default_rng(0).integers(0, 256, (30, 8, 6, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def table(places: range, names: tuple[str, ...] = CLASSES) -> datasets.Dataset:
    """Pictures ``places`` of PIXELS; each one's label is the class whose place in CLASSES is the picture's, mod 3."""
    labels = datasets.ClassLabel(names=list(names))
    pictures = []
    for place in places:
        buffer = io.BytesIO()
        Image.fromarray(PIXELS[place]).save(buffer, format="PNG")
        pictures.append({"bytes": buffer.getvalue(), "path": None})
    return datasets.Dataset.from_dict(
        {"image": pictures, "label": [labels.str2int(CLASSES[place % 3]) for place in places]},
        features=datasets.Features({"image": datasets.Image(), "label": labels}),
    )


class Hub:
    """Stands in for the hub: keeps what is published as parquet files, and what was asked of it."""

    def __init__(self, root: Path, load: Callable[..., Any]) -> None:
        self.root, self.load = root, load
        self.asked: list[tuple[Any, ...]] = []

    def publish(self, subset: str | None = None, revision: str | None = None, **splits: datasets.Dataset) -> None:
        for split, rows in splits.items():
            path = self.root / str(subset) / str(revision) / f"{split}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            rows.to_parquet(path)

    def load_dataset(self, path: str, name: str | None = None, *, revision: str | None = None, **given: Any) -> Any:
        self.asked.append((path, name, revision))
        assert not given, f"options that nobody spoke of: {given}"
        files = sorted((self.root / str(name) / str(revision)).glob("*.parquet"))
        if path != NAME or not files:
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{path}' has no '{name}' at '{revision}'.")
        return datasets.DatasetDict(
            {file.stem: self.load("parquet", data_files={file.stem: str(file)}, split=file.stem) for file in files}
        )


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    found = Hub(tmp_path / "hub", datasets.load_dataset)
    monkeypatch.setattr(datasets, "load_dataset", found.load_dataset)
    monkeypatch.chdir(tmp_path)
    return found


def test_a_test_split_of_secret_labels_is_carved_from_train_instead(hub: Hub) -> None:
    secret = table(range(6)).remove_columns("label").add_column("label", [-1] * 6)  # type: ignore[call-arg]
    hub.publish(train=table(range(24)), test=secret.cast_column("label", datasets.ClassLabel(names=list(CLASSES))))
    data = load()
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 22, "validation": 1, "test": 1}
    assert any("test (1 images) carved from train" in note for note in data.notes)
    assert len(load(labels=False).splits["test"]) == 6


def load(seed: int = 0, **settings: Any) -> ImageData:
    return load_data(DataSettings(source=NAME, **settings), seed)


def places_of(data: ImageData, split: str) -> list[int]:
    """Which pictures of PIXELS a split holds, in its order, its labels checked on the way."""
    batch = data.splits[split].__getitems__(range(len(data.splits[split])))
    known = {picture.transpose(2, 0, 1).tobytes(): place for place, picture in enumerate(PIXELS)}
    places = [known[picture.tobytes()] for picture in batch["images"].numpy()]
    if "label" in batch:
        assert [data.class_names[label] for label in batch["label"].tolist()] == [CLASSES[p % 3] for p in places]
    return places


def test_pictures_labels_and_names_come_through(hub: Hub) -> None:
    hub.publish(train=table(range(20)), validation=table(range(20, 24)), test=table(range(24, 30)))
    data = load()
    assert hub.asked == [(NAME, None, None)]
    assert data.class_names == CLASSES
    assert places_of(data, "train") == list(range(20))
    assert places_of(data, "validation") == list(range(20, 24))
    assert places_of(data, "test") == list(range(24, 30))
    assert data.description == f"{NAME}: 20 train, 4 validation, 6 test; 3 classes; 3x8x6"
    assert data.notes == ()


def test_what_the_environment_allows_other_programs_is_not_allowed_here(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A set's own loading program, before datasets 4; a config of a stranger may name the set."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_TRUST_REMOTE_CODE", True, raising=False)
    allowed = []
    load_dataset = datasets.load_dataset

    def look(*given: Any, **more: Any) -> Any:
        allowed.append(datasets.config.HF_DATASETS_TRUST_REMOTE_CODE)
        return load_dataset(*given, **more)

    monkeypatch.setattr(datasets, "load_dataset", look)
    hub.publish(train=table(range(20)))
    load()
    assert allowed == [False]


def test_subset_and_revision_are_passed_on(hub: Hub) -> None:
    hub.publish("small", "v2", train=table(range(10)), validation=table(range(10, 12)), test=table(range(12, 14)))
    hub.publish(train=table(range(20)))
    data = load(subset="small", revision="v2")
    assert hub.asked == [(NAME, "small", "v2")]
    assert places_of(data, "train") == list(range(10))
    for settings in ({"subset": "small"}, {"revision": "v2"}, {"subset": "large", "revision": "v2"}):
        with pytest.raises(InputError, match=f"'{NAME}' .*cannot be loaded from the hub") as caught:
            load(**settings)
        assert len(str(caught.value).splitlines()) == 1
        assert "data.subset and data.revision" in str(caught.value)


@pytest.mark.parametrize("name", ["valid", "val", "dev", "validation"])
def test_validation_under_its_other_names(hub: Hub, name: str) -> None:
    hub.publish(**{"train": table(range(20)), name: table(range(20, 24)), "test": table(range(24, 30))})
    data = load()
    assert places_of(data, "train") == list(range(20))
    assert places_of(data, "validation") == list(range(20, 24))
    assert data.notes == ()


def test_missing_splits_are_carved_and_splits_of_other_names_left(hub: Hub) -> None:
    hub.publish(train=table(range(20)), unsupervised=table(range(20, 30)))
    data = load()
    found = [places_of(data, split) for split in ("train", "validation", "test")]
    assert [len(places) for places in found] == [18, 1, 1]
    assert sorted(place for places in found for place in places) == list(range(20))
    assert all("carved from train" in note for note in data.notes)
    assert len(data.notes) == 2


def test_a_lone_split_is_train_and_two_without_train_are_refused(hub: Hub) -> None:
    hub.publish(test=table(range(20)))
    data = load()
    assert sorted(place for split in data.splits for place in places_of(data, split)) == list(range(20))
    hub.publish(validation=table(range(20, 24)))
    with pytest.raises(InputError, match=f"'{NAME}' has no training split, only test, validation"):
        load()


def test_labels_mean_their_names_in_every_split(hub: Hub) -> None:
    """A split that numbers the classes otherwise keeps its labels by name; one without labels is refused."""
    hub.publish(train=table(range(20)), validation=table(range(20, 24), CLASSES[::-1]), test=table(range(24, 30)))
    assert places_of(load(), "validation") == list(range(20, 24))
    hub.publish(validation=table(range(20, 24)).rename_column("label", "species"))
    with pytest.raises(InputError, match="the validation split has none"):
        load()
    data = load(labels=False)
    assert data.class_names == ()
    assert data.splits["train"].labels() is None


def test_the_fingerprint_is_that_of_the_content(hub: Hub) -> None:
    splits = {"train": table(range(20)), "validation": table(range(20, 24)), "test": table(range(24, 30))}
    hub.publish(**splits)
    hub.publish("other", **splits)
    hub.publish("changed", **{**splits, "train": table(range(1, 20))})
    assert load().fingerprint == load(subset="other").fingerprint
    assert load().fingerprint != load(subset="changed").fingerprint


def test_the_hub_is_asked_for_the_revision_before_anything_is_fetched(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.publish(None, "v2", train=table(range(20)))
    asked = []

    def dataset_info(_: object, name: str, *, revision: str | None, timeout: float) -> None:
        asked.append((name, revision))
        assert timeout <= 10
        assert hub.asked == []

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    load(revision="v2")
    assert asked == [(NAME, "v2")]
    assert hub.asked == [(NAME, None, "v2")]


@pytest.mark.parametrize("offline", [True, False])
def test_without_a_network_it_fails_fast_and_clearly(
    offline: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the libraries themselves: told to stay offline, and where no name can be looked up."""
    looked_up = []

    def nowhere(host: str, *_: object, **__: object) -> None:
        looked_up.append(host)
        raise OSError(-2, "Name or service not known")

    monkeypatch.setattr("socket.getaddrinfo", nowhere)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    for proxy in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
        monkeypatch.delenv(proxy.lower(), raising=False)
    monkeypatch.chdir(tmp_path)
    expected = "cannot be loaded from the hub" if offline else "the hub cannot be reached"
    start = time.monotonic()
    with pytest.raises(InputError, match=f"'{NAME}' is no file or folder here, and {expected}") as caught:
        load()
    assert time.monotonic() - start < 3
    assert len(str(caught.value).splitlines()) == 1
    assert bool(looked_up) is not offline
