from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

import vqgen.code_writer
from vqgen.code_store import CodeStore, CodeStoreInfo, CodeWriter
from vqgen.codes import Codes, ImageSpec, LevelSpec, level_names
from vqgen.errors import InputError

LEVELS = (LevelSpec("top", 2, 3, 16, 4), LevelSpec("bottom", 4, 6, 16, 4))
INFO = CodeStoreInfo(LEVELS, ("cat", "dog"), ImageSpec(3, 8, 12), "codec", "data")


def batch(count: int, levels: tuple[LevelSpec, ...] = LEVELS, seed: int = 0) -> Codes:
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randint(level.codebook_size, (count, level.height, level.width), generator=generator) for level in levels
    )


def write(
    folder: Path, info: CodeStoreInfo = INFO, sizes: tuple[int, ...] = (5, 3)
) -> tuple[Codes, torch.Tensor | None]:
    parts = [batch(size, info.levels, seed) for seed, size in enumerate(sizes)]
    labels = torch.arange(sum(sizes)) % len(info.class_names) if info.class_names else None
    with CodeWriter(folder, info) as writer:
        start = 0
        for size, part in zip(sizes, parts, strict=True):
            writer.add("train", part, None if labels is None else labels[start : start + size])
            start += size
        writer.add("test", parts[0], None if labels is None else labels[: sizes[0]])
    return tuple(torch.cat(maps) for maps in zip(*parts, strict=True)), labels


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("classes", [(), ("cat", "dog")])
def test_round_trip(tmp_path: Path, count: int, classes: tuple[str, ...]) -> None:
    levels = tuple(
        LevelSpec(name, 2 + i, 3, size, 4)
        for i, (name, size) in enumerate(zip(level_names(count), (2**15, 2**15 + 1, 1), strict=False))
    )
    codes, labels = write(tmp_path / "codes", replace(INFO, levels=levels, class_names=classes))
    store = CodeStore.load(tmp_path / "codes")
    assert store.info.levels == levels
    assert store.info.splits == {"train": 8, "test": 5}
    assert store.labelled == bool(classes)
    split = store.split("train")
    assert len(split) == 8
    indices = [7, 0, 0, 5, 3]
    read = split.__getitems__(indices)
    for maps, expected in zip(read["codes"], codes, strict=True):
        assert maps.dtype == torch.int64
        assert torch.equal(maps, expected[indices])
    assert set(read) == ({"codes", "label"} if classes else {"codes"})
    if labels is not None:
        assert torch.equal(read["label"], labels[indices])
        assert split.labels().tolist() == labels.tolist()  # type: ignore[union-attr]
    else:
        assert split.labels() is None
    assert torch.equal(split[3]["codes"][0], codes[0][3])
    assert [path.name for path in tmp_path.iterdir()] == ["codes"]


def test_many_chunks_read_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vqgen.code_writer, "_CHUNK_BYTES", 3 * 30 * 2)
    codes, _ = write(tmp_path / "codes", sizes=(4, 1, 1, 1, 6, 2))
    split = CodeStore.load(tmp_path / "codes").split("train")
    assert len(split._maps[0]._matrices) > 2
    order = torch.randperm(15, generator=torch.Generator().manual_seed(0)).tolist()
    for maps, expected in zip(split.__getitems__(order)["codes"], codes, strict=True):
        assert torch.equal(maps, expected[order])
    assert split.__getitems__([])["codes"][0].shape == (0, 2, 3)


def test_a_split_is_a_data_set_for_datasets(tmp_path: Path) -> None:
    codes, labels = write(tmp_path / "codes")
    table = datasets.load_from_disk(str(tmp_path / "codes" / "train"))
    assert table.features["label"].names == ["cat", "dog"]
    assert np.array_equal(np.array(table["top"][:]), codes[0].flatten(1).numpy())
    assert table["label"][:] == labels.tolist()  # type: ignore[union-attr]


def test_loaders_take_batches_and_processes(tmp_path: Path) -> None:
    codes, _ = write(tmp_path / "codes")
    split = CodeStore.load(tmp_path / "codes").split("train")
    sampler = BatchSampler(SequentialSampler(split), 3, drop_last=False)
    loader = DataLoader(split, batch_sampler=sampler, collate_fn=lambda batch: batch)
    assert torch.equal(torch.cat([read["codes"][1] for read in loader]), codes[1])
    again = pickle.loads(pickle.dumps(split))
    assert torch.equal(again[2]["codes"][1], codes[1][2])


def test_fingerprint_is_of_the_content_not_of_the_place_or_the_batches(tmp_path: Path) -> None:
    codes = batch(9)
    labels = torch.arange(9) % 2
    changed = (codes[0].clone(), codes[1])
    changed[0][8, 0, 0] ^= 1
    prints = []
    for name, maps, cuts in (("a", codes, [9]), ("b", codes, [2, 6, 9]), ("c", changed, [9])):
        with CodeWriter(tmp_path / name, INFO) as writer:
            for start, stop in zip([0, *cuts], cuts, strict=False):
                writer.add("train", tuple(level[start:stop] for level in maps), labels[start:stop])
        prints.append(CodeStore.load(tmp_path / name).fingerprint)
    assert prints[0] == prints[1] != prints[2]


def write_and_raise(folder: Path, error: BaseException) -> None:
    with CodeWriter(folder, INFO) as writer:
        writer.add("train", batch(4), torch.zeros(4, dtype=torch.int64))
        raise error


def test_an_error_leaves_nothing_new_and_the_old_store_as_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "codes"
    with pytest.raises(RuntimeError, match="crash"):
        write_and_raise(folder, RuntimeError("crash"))
    assert list(tmp_path.iterdir()) == []
    write(folder)
    before = CodeStore.load(folder).fingerprint
    with pytest.raises(KeyboardInterrupt):
        write_and_raise(folder, KeyboardInterrupt())
    assert CodeStore.load(folder).fingerprint == before
    with CodeWriter(folder, INFO) as writer:
        writer.add("validation", batch(4), torch.zeros(4, dtype=torch.int64))
    assert CodeStore.load(folder).info.splits == {"validation": 4}
    assert [path.name for path in tmp_path.iterdir()] == ["codes"]


def test_other_folders_are_not_replaced_and_empty_stores_not_written(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match="not a code store"), CodeWriter(tmp_path / "mine", INFO):
        pass
    with pytest.raises(InputError, match="not a code store"), CodeWriter(tmp_path / "mine" / "thesis.txt", INFO):
        pass
    with pytest.raises(InputError, match="No codes"), CodeWriter(tmp_path / "codes", INFO):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("codes", "labels", "message"),
    [
        (batch(2)[:1], torch.zeros(2, dtype=torch.int64), "2 levels"),
        (batch(2), None, "labels are needed"),
        (batch(2), torch.zeros(3, dtype=torch.int64), "2 labels"),
        (batch(2), torch.tensor([0, 2]), "label"),
        ((batch(2)[0], batch(3)[1]), torch.zeros(2, dtype=torch.int64), "bottom"),
        ((batch(2)[0].float(), batch(2)[1]), torch.zeros(2, dtype=torch.int64), "integers"),
        ((batch(2)[0] + 16, batch(2)[1]), torch.zeros(2, dtype=torch.int64), "not in"),
        ((batch(2)[0] - 16, batch(2)[1]), torch.zeros(2, dtype=torch.int64), "not in"),
    ],
)
def test_the_writer_checks_what_it_is_given(
    tmp_path: Path, codes: Codes, labels: torch.Tensor | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message), CodeWriter(tmp_path / "codes", INFO) as writer:
        writer.add("train", codes, labels)
    assert list(tmp_path.iterdir()) == []


def edit(folder: Path, **changes: object) -> None:
    path = folder / "codes.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_codes_and_labels_out_of_range_are_refused_when_read(tmp_path: Path) -> None:
    folder = tmp_path / "codes"
    write(folder)
    saved = json.loads((folder / "codes.json").read_text())
    saved["levels"][1]["codebook_size"] = 3
    edit(folder, levels=saved["levels"])
    with pytest.raises(InputError, match=r"'bottom' code \d+, but there are 3 codes"):
        CodeStore.load(folder).split("train").__getitems__(range(8))
    edit(folder, class_names=["cat"])
    with pytest.raises(InputError, match="label 1"):
        CodeStore.load(folder).split("train")


def test_damage_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "codes"
    with pytest.raises(InputError, match=r"No codes at .*codes"):
        CodeStore.load(folder)
    write(folder)
    good = (folder / "codes.json").read_text()
    for text in ("", "{", "[]", "null", '{"format": 1}', "[" * 100_000, good.replace('"height"', '"hight"'), "\udcff"):
        (folder / "codes.json").write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(InputError, match=r"codes\.json' is damaged"):
            CodeStore.load(folder)
    for changes in ({"format": 2}, {"splits": {"../x": 1}, "content": {"../x": ""}}, {"levels": []}, {"splits": {}}):
        (folder / "codes.json").write_text(good)
        edit(folder, **changes)
        with pytest.raises(InputError, match=r"codes\.json' is damaged"):
            CodeStore.load(folder)
    (folder / "codes.json").write_text(good)
    store = CodeStore.load(folder)
    with pytest.raises(InputError, match="No split 'validation'"):
        store.split("validation")
    edit(folder, class_names=[])
    with pytest.raises(InputError, match="has the columns"):
        CodeStore.load(folder).split("train")
    (folder / "codes.json").write_text(good)
    edit(folder, splits={"train": 9, "test": 5})
    with pytest.raises(InputError, match="8 rows"):
        CodeStore.load(folder).split("train")


def test_a_split_that_is_not_asked_for_is_not_read(tmp_path: Path) -> None:
    folder = tmp_path / "codes"
    write(folder)
    table = folder / "test" / "data-00000-of-00001.arrow"
    table.write_bytes(b"poison")
    store = CodeStore.load(folder)
    store.split("train")[0]
    with pytest.raises(InputError, match="damaged"):
        store.split("test")
    table.unlink()
    with pytest.raises(InputError, match="'test' are missing"):
        CodeStore.load(folder)


def test_a_truncated_file_and_empty_rows_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "codes"
    write(folder)
    table = folder / "train" / "data-00000-of-00001.arrow"
    whole = table.read_bytes()
    table.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="damaged"):
        CodeStore.load(folder).split("train")
    with pa.ipc.open_stream(pa.BufferReader(whole)) as reader:
        rows = reader.read_all()
    rows = rows.set_column(2, "label", pa.array([None] * 8, pa.int64()))
    with table.open("wb") as file, pa.ipc.new_stream(file, rows.schema) as writer:
        writer.write_table(rows)
    with pytest.raises(InputError, match="without a value"):
        CodeStore.load(folder).split("train")


def test_indices_outside_are_an_index_error(tmp_path: Path) -> None:
    write(tmp_path / "codes")
    split = CodeStore.load(tmp_path / "codes").split("train")
    for index in (-1, 8):
        with pytest.raises(IndexError):
            split[index]
