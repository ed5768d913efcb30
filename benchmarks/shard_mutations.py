"""Damage and malice for `benchmarks.fuzz`: shards of pictures that are streamed, and sweeps that are gone on with."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.hostile import BOMBS, NAMES, NUMBERS, TEXTS
from benchmarks.mutations import Case, mutate_bytes, mutate_file, mutate_value

PICTURES = 64
SWEEP = ["sweep", "--config", "tiny.yaml", "--grid", "codec.commitment=0.25", "--out", "sweep"]
"""The command that made the sweep of the base, and goes on with it."""
PROGRAM = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\nshowpage\n%%EOF\n"
"""A picture that Pillow has another program draw."""
PLACES = ("/dev/zero", "/dev/stdin", "/etc/passwd", "..", "a\x00b", "/", "http://127.0.0.1:9/x.png", *NAMES)
"""Where a picture is said to lie."""
TYPES: tuple[Any, ...] = (
    *(pa.null(), pa.int64(), pa.uint64(), pa.float64(), pa.string(), pa.large_binary(), pa.bool_(), pa.date64()),
    *(pa.timestamp("ns"), pa.map_(pa.string(), pa.int32()), pa.list_(pa.int8(), 0), pa.list_(pa.list_(pa.uint8()))),
    *(pa.struct([]), pa.struct([("x", pa.int32())]), pa.dictionary(pa.int8(), pa.string()), pa.decimal128(30, 3)),
)
_FEATURES = {
    "image": {"_type": "Image"},
    "label": {"_type": "ClassLabel", "names": ["cat", "dog"]},
    "note": {"_type": "Value", "dtype": "string"},
}


def picture(number: int) -> bytes:
    """A small PNG, of its own for each number."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def shards(random: Random, base: Path, case: Path) -> Case:
    """A folder of shards, and two commands that read it."""
    folder = case / "set"
    folder.mkdir()
    makers: dict[str, Callable[[Random, Path], str]] = {"parquet": _table, "arrow": _table, "tar": _tar}
    suffix = random.choice(sorted(makers))
    path = folder / f"train-0.{suffix}"
    what = makers[suffix](random, path)
    if random.random() < 0.4:
        content, how = mutate_bytes(random, path.read_bytes())
        path.write_bytes(content)
        what = f"{what}, {how}"
    shutil.copy(base / "tiny.yaml", case)
    shutil.copytree(base / "run", case / "run")
    streaming = ["--streaming"] if random.random() < 0.7 or suffix == "tar" else []
    encode = ["encode", *streaming, "--data", "./set", "--run", "run", "--out", "codes"]
    train = ["train-codes", *streaming, "--data", "./set", "--config", "tiny.yaml", "--run", "new"]
    settings = ["--set", "training.steps=0", "--set", "data.buffer=16", "--set", "data.unreadable=1"]
    return f"{suffix}: {what}", [random.choice((encode, [*train, *settings]))]


def _table(random: Random, path: Path) -> str:
    """Write a table of pictures that is odd in its cells, its types or what it says of its columns."""
    cells: list[Any] = [{"bytes": picture(number), "path": None} for number in range(PICTURES)]
    columns: dict[str, Any] = {"image": cells, "label": [number % 2 for number in range(PICTURES)]}
    features = json.loads(json.dumps(_FEATURES))
    how = random.choice(("nothing", "cells", "places", "labels", "type", "features", "said", "columns"))
    what = how
    if how == "cells":
        for place in random.sample(range(PICTURES), random.choice((1, PICTURES))):
            cells[place]["bytes"] = random.choice((PROGRAM, b"", mutate_bytes(random, picture(place))[0], *BOMBS[:6]))
    elif how == "places":
        named = random.choice(PLACES)
        for place in random.sample(range(PICTURES), random.choice((1, PICTURES))):
            cells[place] = {"bytes": None, "path": named}
        what = f"{how} {named[:40]!r}"
    elif how == "labels":
        columns["label"] = [random.choice((-1, 0, 2**63 - 1, -(2**63), None)) for _ in range(PICTURES)]
    elif how == "features":
        what = f"{how} {mutate_value(random, features)}"
    elif how == "columns":
        columns[random.choice((*NAMES, *TEXTS)).encode("utf-8", "replace").decode()] = columns.pop("label")
    table = pa.table(columns)
    if how == "type":
        kind, name = random.choice(TYPES), random.choice(("image", "label"))
        what = f"{name} of type {kind}"
        table = table.set_column(table.schema.get_field_index(name), name, _filled(kind))
    said = json.dumps({"info": {"features": features}}).encode("utf-8", "surrogatepass")
    said = random.choice(BOMBS) if how == "said" else said
    _write(table.replace_schema_metadata({b"huggingface": said} if how in ("features", "said") else None), path)
    return what


def _filled(kind: Any) -> Any:
    """A column of a type, of its zero or of nothing."""
    zeros: tuple[Any, ...] = (0, "", b"", False, [], {}, 0.0)
    for value in zeros:
        try:
            return pa.array([value] * PICTURES, kind)
        except (pa.ArrowException, TypeError, ValueError):
            continue
    return pa.nulls(PICTURES, kind)


def _write(table: Any, path: Path) -> None:
    if path.suffix == ".parquet":
        try:
            pq.write_table(table, path, row_group_size=16)
            return
        except pa.ArrowException:  # a type that such files have not
            path.write_bytes(b"PAR1PAR1")
            return
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=16)


def _tar(random: Random, path: Path) -> str:
    """Write a WebDataset with a header, a name or a class that is odd."""
    place = random.randrange(PICTURES)
    how = random.choice(("nothing", "size", "type", "name", "class", "many", "picture", "no end"))
    blocks = []
    for number in range(PICTURES):
        name = random.choice((*NAMES, *TEXTS)) if how == "name" and number == place else f"{number:04d}"
        content = PROGRAM if how == "picture" and number == place else picture(number)
        blocks += [_header(f"{name}.png", len(content)), _padded(content)]
        text = random.choice((b"-7", b"9" * 30, b"\xff", b"", b"1.5")) if how == "class" else b"%d" % (number % 2)
        blocks += [_header(f"{name}.cls", len(text)), _padded(text)]
    what = how
    if how == "size":
        size = random.choice([value for value in NUMBERS if isinstance(value, int)] + [-512, -1024, 2**80])
        kind = random.choice((tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_SPARSE))
        blocks.insert(4 * place, _header("x.png", size, kind))
        what = f"size {size} of type {kind!r}"
    elif how == "type":
        kind = random.choice((b"1", b"2", b"3", b"4", b"5", b"6", b"7", b"x", b"g", b"L", b"K", b"S", b"\xff"))
        blocks.insert(4 * place, _header("x.png", 0, kind, link=random.choice(PLACES)[:90]))
        what = f"type {kind!r}"
    elif how == "many":
        kind = random.choice((tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.REGTYPE))
        blocks.insert(0, _header("x.png", 0, kind) * 5000)
        what = f"5000 of type {kind!r}"
    end = b"" if how == "no end" else bytes(2 * tarfile.BLOCKSIZE)
    path.write_bytes(b"".join(blocks) + end)
    return what


def _padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % tarfile.BLOCKSIZE)


def _header(name: str, size: int, kind: bytes = tarfile.REGTYPE, link: str = "") -> bytes:
    """A header of a file in a tar, its checksum right."""
    member = tarfile.TarInfo(name.encode("utf-8", "replace").decode()[:90])
    member.linkname = link
    block = bytearray(member.tobuf(tarfile.GNU_FORMAT, errors="replace")[: tarfile.BLOCKSIZE])
    block[124:136] = bytes([0x80 if size >= 0 else 0xFF]) + (size % 256**11).to_bytes(11, "big")
    block[156:157] = kind
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def sweep(random: Random, base: Path, case: Path) -> Case:
    """A sweep whose record, or a run of which, is damaged."""
    folder = Path(shutil.copytree(base / "sweep", case / "sweep"))
    shutil.copy(base / "tiny.yaml", case)
    record = folder / "sweep.json"
    how = random.choice(("values", "values", "any", "run", "link"))
    what = how
    if how == "values":
        value = json.loads(record.read_text(encoding="utf-8"))
        part = random.choice((value, value["cells"], value["images"], value["grid"]))
        what = mutate_value(random, part if part else value)
        record.write_bytes(json.dumps(value).encode("utf-8", "surrogatepass"))
    elif how == "any":
        what = mutate_file(random, record)
    elif how == "run":
        path = random.choice(sorted(folder.glob("runs/*/*.json")) + sorted(folder.glob("runs/*/*/*.json")))
        what = f"{path.relative_to(folder).as_posix()}: {mutate_file(random, path)}"
    else:
        name = random.choice(("runs", ".lock", "sweep.md", "curves.png", "sweep.json"))
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(case.parent / "beside" / random.choice(("victim.txt", "new", ".")))
        what = f"{name}: link"
    if how != "link" and random.random() < 0.3:
        what += ", a cell waiting"
        _forget(record)
    options = random.choice(([], ["--retry"], ["--json"]))
    return what, [[*SWEEP, *options]]


def _forget(record: Path) -> None:
    try:
        value = json.loads(record.read_text(encoding="utf-8"))
        value["cells"][0]["state"] = "waiting"
        record.write_text(json.dumps(value), encoding="utf-8")
    except (OSError, ValueError, LookupError, TypeError):
        return
