"""Shards and pictures of a stranger: no program is started, nothing waits or swells, and what is wrong is one line."""

from __future__ import annotations

import io
import json
import os
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import EpsImagePlugin, Image

from benchmarks.fuzz import limited
from benchmarks.hostile import BOMBS
from benchmarks.shard_mutations import PROGRAM, TYPES, _filled, _header, _padded, picture
from pipelines.pictures import read_picture
from vqgen import table_rows as stored_rows
from vqgen.config import DataSettings
from vqgen.data import ImageData, load_data
from vqgen.errors import InputError
from vqgen.images import image_grid, open_picture
from vqgen.shards import ArrowShard, Reader
from vqgen.streaming import open_shards
from vqgen.table_rows import picture_of

SECONDS = 20.0
COUNT = 40
PNGS = [picture(number) for number in range(COUNT)]
CELLS = [{"bytes": png, "path": None} for png in PNGS]
LABELS = [number % 2 for number in range(COUNT)]
END = bytes(2 * tarfile.BLOCKSIZE)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(table: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_stream(str(path), table.schema) as writer:
            writer.write_table(table)
    return path


def load(path: Path, *, streaming: bool = True) -> ImageData:
    settings = DataSettings(source=str(path), streaming=streaming, buffer=16)
    with limited(SECONDS):
        data = load_data(settings, seed=0)
        for split in data.splits.values():
            split.__getitems__(range(len(split)))
    return data


def refusal(path: Path, *, streaming: bool = True) -> str:
    with pytest.raises(InputError) as caught:
        load(path, streaming=streaming)
    return str(caught.value)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Programs that are started."""
    found: list[Any] = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *given, **more: found.append(given))
    monkeypatch.setattr(subprocess, "Popen", lambda *given, **more: found.append(given))
    return found


@pytest.mark.parametrize("name", ["x.png", "x.eps"])
def test_a_picture_that_is_a_program_is_not_run(name: str, started: list[Any], tmp_path: Path) -> None:
    assert isinstance(picture_of({"bytes": PROGRAM, "path": None}), OSError)
    (tmp_path / name).write_bytes(PROGRAM)
    with pytest.raises(InputError, match="no picture of a known format"):
        read_picture(tmp_path / name, "--from")
    assert isinstance(picture_of(str(tmp_path / name)), OSError)
    cells = [*CELLS[1:], {"bytes": PROGRAM, "path": None}]
    assert "unreadable" in refusal(write(pa.table({"image": cells}), tmp_path / "set" / "a.parquet"))
    assert not started


def test_other_pictures_are_read_as_ever() -> None:
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "TGA"):
        buffer = io.BytesIO()
        Image.new("RGB", (5, 4), "red").save(buffer, format=kind)
        buffer.seek(0)
        assert open_picture(buffer).size == (5, 4), kind


def test_whatever_a_decoder_raises_is_a_picture_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (AttributeError("x"), RecursionError("deep"), MemoryError(), AssertionError(), KeyError("k")):

        def fail(*given: Any, error: Exception = error, **more: Any) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(Image, "open", fail)
            assert isinstance(picture_of({"bytes": PNGS[0], "path": None}), OSError)


@pytest.mark.parametrize("place", ["/dev/zero", "/dev/stdin", "pipe", ".", "large", "a\x00b", "../" * 3000 + "x"])
@pytest.mark.parametrize("streaming", [True, False])
def test_a_table_that_names_what_is_no_file(
    place: str, streaming: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if place == "pipe":
        os.mkfifo(tmp_path / place)
    if place == "large":
        (tmp_path / place).write_bytes(PNGS[0])
        monkeypatch.setattr(stored_rows, "MOST_STORED", 10)
    named = str(tmp_path / place) if place in ("pipe", "large") else place
    odd = {"bytes": None, "path": named}
    for cells in ([odd] * COUNT, [odd if number % 2 else cell for number, cell in enumerate(CELLS)]):
        path = write(pa.table({"image": cells}), tmp_path / str(len(list(tmp_path.glob("*")))) / "a.parquet")
        message = refusal(path, streaming=streaming)
        assert "can be read" in message or "unreadable" in message


def said(features: Any) -> Any:
    content = features if isinstance(features, bytes) else json.dumps({"info": {"features": features}}).encode()
    return pa.table({"image": CELLS, "label": LABELS}).replace_schema_metadata({b"huggingface": content})


@pytest.mark.parametrize(
    "features",
    [
        {"image": {"_type": "Evil"}},
        {"image": "text"},
        {"image": {"_type": ["Image"]}},
        {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": [None, {}, [1]]}},
        {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["a", "a"]}},
        {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names_file": "/etc/passwd"}},
        {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "num_classes": 10**10}},
        [1, 2],
        b"[" * 100_000,
        b"null",
        b"\xff",
        *BOMBS[-3:],
    ],
    ids=range(14),
)
@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
@pytest.mark.parametrize("streaming", [True, False])
def test_what_a_file_says_of_its_columns(features: Any, suffix: str, streaming: bool, tmp_path: Path) -> None:
    path = write(said(features), tmp_path / "set" / f"a.{suffix}")
    message = refusal(path, streaming=streaming)
    assert len(message) < 1000
    assert "root:" not in message


@pytest.mark.parametrize("kind", TYPES, ids=str)
@pytest.mark.parametrize("name", ["image", "label"])
def test_columns_of_any_type(kind: Any, name: str, tmp_path: Path) -> None:
    columns: dict[str, Any] = {"image": CELLS, "label": LABELS}
    made = pa.table({**columns, name: _filled(kind).slice(0, COUNT)})
    path = write(made, tmp_path / "set" / "a.arrow")
    for streaming in (True, False):
        if name == "image":
            refusal(path, streaming=streaming)
        else:
            with pytest.MonkeyPatch.context() as patch, limited(SECONDS):
                patch.setattr("vqgen.data._survey", stop)
                with pytest.raises(InputError):
                    load(path, streaming=streaming)


def stop(*given: Any) -> None:
    raise InputError("The labels were read.")


def test_offsets_that_lead_out_of_the_file(tmp_path: Path) -> None:
    """Who follows them is ended by the system."""
    path = write(pa.table({"image": [b"seven77", b"seven77"]}), tmp_path / "set" / "a.arrow")
    right, wrong = (np.array(offsets, dtype=np.int32).tobytes() for offsets in ([0, 7, 14], [0, 2**30, 2**31 - 1]))
    content = path.read_bytes()
    assert content.count(right) == 1
    path.write_bytes(content.replace(right, wrong))
    shard = ArrowShard(str(path))
    shard.image_column = "image"
    for read in (lambda: Reader(shard, 0).take(0, 2), lambda: shard.column("image"), shard.check):
        with pytest.raises(InputError, match=r"a\.arrow' cannot be read"):
            read()
    refusal(path, streaming=False)


@pytest.mark.parametrize("kind", [pa.null(), pa.list_(pa.int8(), 0), pa.struct([])], ids=str)
def test_more_rows_than_bytes(kind: Any, tmp_path: Path) -> None:
    """A column of nothing has any number of rows in no bytes; places are made for each of them."""
    inside = [pa.array([], pa.int8())] if pa.types.is_fixed_size_list(kind) else []
    table = pa.table({"image": pa.Array.from_buffers(kind, 2**31 - 1, [None], children=inside)})
    path = write(table, tmp_path / "set" / "a.arrow")
    assert path.stat().st_size < 10_000
    assert "rows in" in refusal(path)


GOOD = b"".join(_header(f"{n:04d}.png", len(png)) + _padded(png) for n, png in enumerate(PNGS))
CLASSED = b"".join(
    _header(f"{n:04d}.png", len(png)) + _padded(png) + _header(f"{n:04d}.cls", 2) + _padded(b"%02d" % (n % 2))
    for n, png in enumerate(PNGS)
)


@pytest.mark.parametrize(
    "content",
    [
        GOOD + _header("x.png", -512) + _padded(b"x") + END,
        GOOD + _header("x.png", -1024) + END,
        GOOD + _header("x.png", 2**60) + END,
        GOOD + _header("x.png", 2**80) + END,
        GOOD + _header("x", 2**62, tarfile.XHDTYPE) + END,
        GOOD + _header("x", -512, tarfile.XHDTYPE) + END,
        GOOD + _header("x", 2**62, tarfile.GNUTYPE_LONGNAME) + END,
        _header("x", 0, tarfile.XHDTYPE) * 3000 + GOOD + END,
        (_header("x", 4, tarfile.GNUTYPE_LONGNAME) + _padded(b"abc\0")) * 3000 + GOOD + END,
        CLASSED.replace(b"01\0", b"\xff1\0") + END,
        CLASSED.replace(b"01\0", b"-\xb2\0") + END,
        GOOD,
        bytes(range(256)) * 8,
        b"",
    ],
    ids=range(14),
)
def test_headers_of_a_tar(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "set" / "a.tar"
    path.parent.mkdir()
    path.write_bytes(content)
    assert "a.tar" in refusal(path) or not content


def test_links_devices_and_names_in_a_tar_lead_nowhere(tmp_path: Path) -> None:
    kinds = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE)
    odd = b"".join(_header(f"x{n}.png", 0, kind, link="/etc/passwd") for n, kind in enumerate(kinds))
    up = _header("../../../../up.png", len(PNGS[0])) + _padded(PNGS[0])
    path = tmp_path / "set" / "a.tar"
    path.parent.mkdir()
    path.write_bytes(odd + up + GOOD + END)
    before = set(tmp_path.parent.rglob("*"))
    assert len(open_shards([str(path)], "tar", DataSettings(buffer=16))) == COUNT + 1
    load(path)
    assert set(tmp_path.parent.rglob("*")) == before


def test_a_long_name_does_not_make_a_large_picture() -> None:
    images = torch.zeros(4, 3, 16, 16, dtype=torch.uint8)
    grid = image_grid(images, columns=2, row_names=["r" * 10**6] * 2, column_names=["c" * 10**6] * 2)
    assert grid.width < 2000
