"""Streamed splits: the same pictures, labels and splits as without streaming; another order, resumable and shared."""

from __future__ import annotations

import io
import pickle
import shutil
import tarfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from vqgen import shards as shard_files
from vqgen import sources, streaming
from vqgen.config import DataSettings
from vqgen.data import ImageData, load_data
from vqgen.errors import InputError
from vqgen.sampler import EpochSampler, training_batches
from vqgen.shards import ParquetShard, Reader
from vqgen.streaming import LANES, ShardRows, open_shards, stream_order

CLASSES = ("cat", "dog", "emu")
IMAGES = 203


def png(number: int) -> bytes:
    """A picture of its own for each number."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


PNGS = [png(number) for number in range(IMAGES)]
SHARDS = ((0, 70), (70, 71), (71, 71), (71, 160), (160, IMAGES))
"""Of very different sizes, an empty one among them."""


def table(first: int, last: int) -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})
    pictures = [{"bytes": PNGS[number], "path": None} for number in range(first, last)]
    return datasets.Dataset.from_dict(
        {"image": pictures, "label": [number % 3 for number in range(first, last)]}, features=features
    )


def write_parquet(folder: Path, row_group_size: int = 16) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, (first, last) in enumerate(SHARDS):
        if first == last:
            continue  # `datasets` cannot read such a file
        rows = table(first, last).with_format("arrow")[:]
        pq.write_table(rows, folder / f"train-{number:05d}.parquet", row_group_size=row_group_size)
    return folder


def write_arrow(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for number, (first, last) in enumerate(SHARDS):
        rows = table(first, last).with_format("arrow")[:]
        opened = pa.ipc.new_stream if number % 2 else pa.ipc.new_file
        with opened(str(folder / f"train-{number:05d}.arrow"), rows.schema) as writer:
            writer.write_table(rows, max_chunksize=9)
    return folder


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def write_tar(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for number, (first, last) in enumerate(SHARDS):
        with tarfile.open(folder / f"train-{number:05d}.tar", "w") as archive:
            for place in range(first, last):
                add(archive, f"some/{place:06d}.json", b'{"of": "no use"}')
                add(archive, f"some/{place:06d}.cls", b"%d" % (place % 3))
                add(archive, f"some/{place:06d}.png", PNGS[place])
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_parquet(tmp_path_factory.mktemp("sets") / "parquet")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def load(folder: Path, **settings: Any) -> ImageData:
    return load_data(DataSettings(source=str(folder), **{"streaming": True, "buffer": 32, **settings}), seed=0)


def batches(data: ImageData, *, start: int = 0, rank: int = 0, processes: int = 1, size: int = 4, **more: Any) -> Any:
    train = data.splits["train"]
    sampler = EpochSampler(len(train), size, 7, rank, processes)
    return training_batches(train, sampler, start=start, **{"workers": 0, **more})


def per_epoch(data: ImageData, size: int, processes: int = 1) -> int:
    return len(data.splits["train"]) // (size * processes)


def keys(images: torch.Tensor) -> list[bytes]:
    return [image.numpy().tobytes() for image in images]


@pytest.mark.parametrize("write", [write_parquet, write_arrow, write_tar])
def test_splits_labels_and_pictures_are_those_without_streaming(tmp_path: Path, folder: Path, write: Any) -> None:
    whole, streamed = load(folder, streaming=False), load(write(tmp_path / "set"))
    if write is not write_tar:  # a tar has class numbers, not their names
        assert streamed.fingerprint == whole.fingerprint
        assert streamed.class_names == whole.class_names == CLASSES
    assert [*streamed.splits] == ["train", "validation", "test"]
    for name, split in streamed.splits.items():
        other = whole.splits[name]
        assert np.array_equal(split.labels(), other.labels())  # type: ignore[arg-type]
        for places in (range(len(split)), [*range(len(split) - 1, -1, -3)]):
            got, expected = split.__getitems__(places), other.__getitems__(places)
            assert torch.equal(got["images"], expected["images"])
            assert torch.equal(got["label"], expected["label"])


def test_any_size_of_row_groups_gives_the_same_pictures(tmp_path: Path) -> None:
    shown = {}
    for size in (1, 7, 1000):
        rows = open_shards(
            sorted(map(str, write_parquet(tmp_path / str(size), size).glob("*"))), "parquet", DataSettings(buffer=64)
        )
        shuffled = np.random.default_rng(0).permutation(IMAGES).tolist()
        shown[size] = [np.asarray(picture).tobytes() for picture in rows.read([*shuffled, *range(IMAGES), 5, 5])]
    assert shown[1] == shown[7] == shown[1000]


@pytest.mark.parametrize("processes", [1, 2, 3, 8, 11])
@pytest.mark.parametrize("block", [1, 4, 500])
def test_an_epoch_holds_each_picture_once(processes: int, block: int) -> None:
    places = np.sort(np.random.default_rng(3).choice(IMAGES, 150, replace=False))
    starts = np.array([first for first, last in SHARDS if first < last])
    order = stream_order(places, starts, block, seed=1, epoch=2, step=12, processes=processes)
    assert np.array_equal(np.sort(order), np.arange(150))


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    places, starts = np.arange(400), np.array([0, 100, 250])

    def order(seed: int, epoch: int) -> list[int]:
        return stream_order(places, starts, 8, seed, epoch, 16).tolist()

    assert order(1, 0) == order(1, 0)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_every_step_mixes_far_places_of_the_set() -> None:
    order = stream_order(np.arange(4000), np.array([0, 1000, 2500]), 16, 0, 0, 32)
    # 8 lanes of 500 images: a step has 4 images of each, from a block of 16 or, at its end, two.
    for step in order.reshape(-1, 32):
        assert 8 <= len(np.unique(step // 16)) <= 24
        assert step.max() - step.min() > 2000


def test_the_global_generators_are_not_touched() -> None:
    before = (torch.get_rng_state(), np.random.get_state(legacy=False)["state"]["pos"])
    stream_order(np.arange(100), np.array([0]), 4, 0, 0, 10)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == np.random.get_state(legacy=False)["state"]["pos"]


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_processes_share_every_epoch_and_take_the_steps_of_one(folder: Path, processes: int) -> None:
    joint = 16
    size = joint // processes
    one = batches(load(folder), size=joint)
    shares = [batches(load(folder), size=size, rank=rank, processes=processes) for rank in range(processes)]
    steps = per_epoch(load(folder), joint)
    for epoch in range(2):
        seen = []
        for _ in range(steps):
            own = [image for share in shares for image in keys(next(share)["images"])]
            assert own == keys(next(one)["images"])
            seen += own
        assert len(seen) == len(set(seen)) == steps * joint, f"epoch {epoch}"


def test_every_picture_of_an_epoch_comes_once_where_batches_divide_it(folder: Path) -> None:
    data = load(folder, limit=160)
    shares = [batches(data, size=8, rank=rank, processes=2) for rank in range(2)]
    seen = [image for share in shares for batch in islice(share, 10) for image in keys(batch["images"])]
    assert sorted(seen) == sorted(keys(data.splits["train"].__getitems__(range(160))["images"]))


@pytest.mark.parametrize("start", [1, 7, 45, 46, 100])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_resumed_training_goes_on_with_the_very_next_picture(folder: Path, start: int, processes: int) -> None:
    for rank in range(processes):
        whole = batches(load(folder, flip=True), rank=rank, processes=processes)
        resumed = batches(load(folder, flip=True), start=start, rank=rank, processes=processes)
        for expected, got in zip(islice(whole, start, start + 60), resumed, strict=False):
            assert torch.equal(expected["images"], got["images"])
            assert torch.equal(expected["label"], got["label"])


def test_epochs_differ_and_seeds_differ(folder: Path) -> None:
    data = load(folder)
    stream = batches(data)
    steps = per_epoch(data, 4)
    first, second = ([key for batch in islice(stream, steps) for key in keys(batch["images"])] for _ in range(2))
    assert first != second
    assert len(set(first) & set(second)) > len(first) - 8


def test_loader_processes_give_the_same_batches(folder: Path) -> None:
    alone, helped = batches(load(folder)), batches(load(folder), workers=2)
    for expected, got in zip(islice(alone, 50), helped, strict=False):
        assert torch.equal(expected["images"], got["images"])
    helped.close()


class Counted(ParquetShard):
    """Notes every row it hands out."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.given = 0

    def cells(self, start: int) -> Iterator[Any]:
        for cells in super().cells(start):
            self.given += len(cells)
            yield cells


@pytest.fixture
def counted(folder: Path) -> tuple[ShardRows, list[Counted]]:
    opened = [Counted(str(path)) for path in sorted(folder.glob("*.parquet"))]
    return ShardRows(opened, DataSettings(buffer=64)), opened


def test_a_pass_in_order_reads_little_more_than_each_picture_once_and_holds_no_more_than_said(
    counted: tuple[ShardRows, list[Counted]],
) -> None:
    rows, opened = counted
    most = 0
    for order in (np.arange(IMAGES), rows.order(np.arange(IMAGES), 0, 0, 16, 1)):
        for shard in opened:
            shard.given = 0
        for index in order.tolist():
            assert not isinstance(next(rows.read([index])), Exception)
            most = max(most, rows._held)
        # A new reader begins at a row group (16 rows), and each of the 8 lanes and 4 shards takes one or two.
        assert sum(shard.given for shard in opened) <= IMAGES + 2 * (LANES + 4) * 64
    assert most <= 2 * LANES * rows.block


def test_resuming_reads_nothing_of_what_came_before(tmp_path: Path) -> None:
    rows = pa.concat_tables([table(0, IMAGES).with_format("arrow")[:]] * 20)
    pq.write_table(rows, tmp_path / "train.parquet", row_group_size=16)
    opened = Counted(str(tmp_path / "train.parquet"))
    source = ShardRows([opened], DataSettings(buffer=32))
    order = source.order(np.arange(len(source)), 0, 0, 16, 1)
    list(source.read(order[len(order) // 2 :][:16].tolist()))
    # 8 lanes, a block of 4 pictures each from two pages, every page from the beginning of its 16 rows.
    assert opened.given <= LANES * 2 * 2 * 16


@pytest.mark.parametrize("processes", [2, 4, 16])
def test_a_process_reads_little_more_than_its_share(tmp_path: Path, processes: int) -> None:
    rows = pa.concat_tables([table(0, IMAGES).with_format("arrow")[:]] * 20)
    pq.write_table(rows, tmp_path / "train.parquet", row_group_size=8)
    opened = Counted(str(tmp_path / "train.parquet"))
    source = ShardRows([opened], DataSettings(buffer=64))
    order = source.order(np.arange(len(source)), 0, 0, 4 * processes, processes)
    for step in range(len(source) // (4 * processes)):
        list(source.read(order[4 * processes * step :][:4].tolist()))
    lanes = max(LANES // processes, 1)
    assert len(source) // processes - 4 <= opened.given <= len(source) // processes + 4 * lanes * 64


def test_held_out_pictures_stay_in_memory_once_read(counted: tuple[ShardRows, list[Counted]]) -> None:
    rows, opened = counted
    held_out = rows.held_out()
    scattered = list(range(0, IMAGES, 20))
    first = [np.asarray(picture).tobytes() for picture in held_out.read(scattered)]
    given = sum(shard.given for shard in opened)
    assert [np.asarray(picture).tobytes() for picture in held_out.read(scattered)] == first
    assert sum(shard.given for shard in opened) == given


def test_rows_travel_to_another_process_without_what_they_hold(counted: tuple[ShardRows, list[Counted]]) -> None:
    rows, _ = counted
    expected = [np.asarray(picture).tobytes() for picture in rows.read([3, 150])]
    sent = pickle.dumps(rows)
    assert len(sent) < 20_000
    assert [np.asarray(picture).tobytes() for picture in pickle.loads(sent).read([3, 150])] == expected


def test_an_empty_shard_is_passed_over(tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "set")
    pq.write_table(table(0, 0).with_format("arrow")[:], source / "train-00002.parquet")
    data = load(source)
    assert sum(map(len, data.splits.values())) == IMAGES
    data.splits["train"].__getitems__(range(len(data.splits["train"])))


def test_own_splits_are_found_by_their_names(tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "set")
    pq.write_table(table(0, 20).with_format("arrow")[:], source / "test-00000.parquet")
    data = load(source)
    assert [len(data.splits[name]) for name in ("train", "validation", "test")] == [193, 10, 20]
    assert data.notes[-1] == "validation (10 images) carved from train"


def test_an_unreadable_picture_is_named_by_its_shard(tmp_path: Path) -> None:
    rows = table(0, IMAGES).to_dict()
    rows["image"][9] = {"bytes": b"no picture", "path": None}
    source = tmp_path / "set"
    source.mkdir()
    datasets.Dataset.from_dict(rows, features=table(0, 1).features).to_parquet(source / "train.parquet")
    told: list[str] = []
    data = load_data(DataSettings(source=str(source), streaming=True, buffer=16), seed=0, notify=told.append)
    for split in data.splits.values():
        split.__getitems__(range(len(split)))
    assert [line for line in told if "train.parquet[9]" in line]


def test_a_shard_that_vanishes_stops_with_its_name(tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "set")
    data = load(source)
    shutil.rmtree(source)
    with pytest.raises(InputError, match=r"train-\d+\.parquet' cannot be read from image \d+ on"):
        data.splits["train"].__getitems__(range(len(data.splits["train"])))


def test_a_shard_that_shrinks_stops_with_its_name(tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "set")
    data = load(source)
    pq.write_table(table(0, 5).with_format("arrow")[:], source / "train-00000.parquet")
    with pytest.raises(InputError, match="it has 5 rows, not 70 as before"):
        data.splits["train"].__getitems__(range(60))


def test_damaged_shards_are_one_line(tmp_path: Path) -> None:
    for name, kind in (("a.parquet", "parquet"), ("b.arrow", "arrow"), ("c.tar", "tar")):
        path = tmp_path / name
        path.write_bytes(b"damaged, all of it" * 100)
        with pytest.raises(InputError, match=rf"{name}' cannot be read") as raised:
            open_shards([str(path)], kind, DataSettings())
        assert "\n" not in raised.value.message


def test_a_truncated_tar_is_refused(tmp_path: Path) -> None:
    source = write_tar(tmp_path / "set")
    path = source / "train-00000.tar"
    path.write_bytes(path.read_bytes()[:40_000])
    with pytest.raises(InputError, match=r"train-00000\.tar' cannot be read"):
        load(source)


def test_samples_with_two_pictures_or_without_a_class_number_are_refused(tmp_path: Path) -> None:
    for name, files in (
        ("two.tar", {"1.png": PNGS[0], "1.jpg": PNGS[1]}),
        ("some.tar", {"1.png": PNGS[0], "1.cls": b"0", "2.png": PNGS[1]}),
        ("text.tar", {"1.png": PNGS[0], "1.cls": b"cat"}),
        ("large.tar", {"1.png": PNGS[0], "1.cls": b"9" * 30}),
    ):
        with tarfile.open(tmp_path / name, "w") as archive:
            for file, content in files.items():
                add(archive, file, content)
        with pytest.raises(InputError, match=r"several pictures|1 of 2 pictures have no class|cannot be read"):
            open_shards([str(tmp_path / name)], "tar", DataSettings())


def test_what_cannot_be_streamed_is_refused_with_the_reason(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((9, 4, 4), dtype=np.uint8))
    for source, reason in (("shapes", "are drawn"), (str(tmp_path / "a.npy"), "are one array")):
        with pytest.raises(InputError, match=reason):
            load_data(DataSettings(source=source, streaming=True), seed=0)


def test_shards_that_number_their_classes_otherwise_are_refused(tmp_path: Path) -> None:
    for number, names in enumerate((["cat", "dog"], ["dog", "cat"])):
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
        cells = [{"bytes": png, "path": None} for png in PNGS[:30]]
        rows = datasets.Dataset.from_dict({"image": cells, "label": ["cat", "dog"] * 15}, features=features)
        pq.write_table(rows.with_format("arrow")[:], tmp_path / f"train-{number:05d}.parquet")
    for streamed in (True, False):
        with pytest.raises(InputError, match=r"train-00001\.parquet' has other classes in column 'label'"):
            load(tmp_path, streaming=streamed)
    assert load(tmp_path, labels=False).class_names == ()


def test_tar_shards_need_no_setting(tmp_path: Path) -> None:
    source = write_tar(tmp_path / "tars")
    asked, plain = load(source), load(source, streaming=False)
    assert asked.fingerprint == plain.fingerprint
    for first, second in zip(islice(batches(asked), 20), batches(plain), strict=False):
        assert torch.equal(first["images"], second["images"])


def test_a_set_on_the_hub_is_read_from_its_own_place(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    system = fsspec.filesystem("memory")
    system.put(str(folder), "/animals", recursive=True)
    names = [f"memory://animals/{path.name}" for path in sorted(folder.glob("*.parquet"))]
    monkeypatch.setattr(sources, "hub_files", lambda name, settings: {"train": names})
    monkeypatch.setattr(shard_files, "open_remote", lambda url: system.open(url, "rb"))
    try:
        data = load_data(DataSettings(source="painters/animals", streaming=True, buffer=32), seed=0)
        local = load(folder)
        assert data.fingerprint == local.fingerprint
        for got, expected in zip(islice(batches(data), 60), batches(local), strict=False):
            assert torch.equal(got["images"], expected["images"])
    finally:
        system.rm("/animals", recursive=True)


def test_files_of_a_hub_set_are_found_without_fetching_them(folder: Path, tmp_path: Path) -> None:
    found = streaming.hub_files(str(folder), DataSettings())
    assert {split: [Path(file).name for file in files] for split, files in found.items()} == {
        "train": sorted(path.name for path in folder.glob("*.parquet"))
    }
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "train.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match=r"no parquet files to stream but files such as 'train\.csv'") as raised:
        streaming.hub_files(str(tmp_path / "other"), DataSettings())
    assert "refs/convert/parquet" in raised.value.hint


class Flaky(Counted):
    """Fails a number of times before it gives anything, as a network does."""

    remote = True

    def __init__(self, path: str, failures: int) -> None:
        super().__init__(path)
        self.remote = True
        self.failures = failures
        self.image_column = "image"

    def cells(self, start: int) -> Iterator[Any]:
        for cells in super().cells(start):
            if self.failures:
                self.failures -= 1
                raise RuntimeError("connection reset")
            yield cells

    def _source(self) -> Any:
        return self.path


def test_a_read_over_the_network_is_tried_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_files, "WAIT", 0.0)
    path = str(folder / "train-00000.parquet")
    cells = Reader(Flaky(path, 3), 10).take(10, 30)
    assert [cell["bytes"] for cell in cells] == PNGS[10:30]
    with pytest.raises(InputError, match=r"cannot be read from image 10 on \(connection reset\)"):
        Reader(Flaky(path, 99), 10).take(10, 30)
