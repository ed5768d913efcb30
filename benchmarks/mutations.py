"""Damage and malice for `benchmarks.fuzz`: what becomes of a config, a file of a run or a compressed file.

All of it is drawn from the generator given, so that a case can be made again. Where a checksum or a fingerprint would
stop a mutation at the door, half of the cases mend it, as somebody who means harm would.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import yaml

from benchmarks.hostile import BOMBS, NAMES, NUMBERS, OTHERS, PICKLES, TEXTS, YAML_BOMBS
from pipelines.compression import format as file_format
from vqgen import checkpoint
from vqgen.hub import fingerprint
from vqgen.presets import preset_names, presets_folder

Case = tuple[str, list[list[str]]]
"""What was done, in words, and the command lines to run."""


def prepare(kind: str, random: Random, base: Path, case: Path) -> Case:
    """Make one case in the folder ``case``."""
    makers: dict[str, Callable[[Random, Path, Path], Case]] = {
        "config": _config,
        "run file": _run_file,
        "compressed file": _compressed,
    }
    return makers[kind](random, base, case)


def _config(random: Random, base: Path, case: Path) -> Case:
    path = case / "mine.yaml"
    name = random.choice([*preset_names(), "tiny"])
    source = base / "tiny.yaml" if name == "tiny" else presets_folder() / f"{name}.yaml"
    how = random.choices(("values", "bytes", "bomb"), (6, 2, 2))[0]
    if how == "values":
        value = yaml.safe_load(source.read_text(encoding="utf-8"))
        what = "; ".join(mutate_value(random, value) for _ in range(random.randint(1, 4)))
        text = json.dumps(value)
        if random.random() < 0.7:
            with contextlib.suppress(RecursionError):  # what is nested too deeply for YAML's writer stays JSON
                text = yaml.dump(value, Dumper=yaml.SafeDumper, allow_unicode=True)
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
    elif how == "bytes":
        content, what = mutate_bytes(random, source.read_bytes())
        path.write_bytes(content)
    else:
        number = random.randrange(len(YAML_BOMBS) + len(BOMBS))
        what = f"bomb {number}"
        path.write_bytes((*YAML_BOMBS, *BOMBS)[number])
    command = ["train-codes", "--config", "mine.yaml", "--data", "./missing", "--run", "run"]
    return f"{name}: {what}", [command]


def _run_file(random: Random, base: Path, case: Path) -> Case:
    run = Path(shutil.copytree(base / "run", case / "run"))
    attack = random.choices(("file", "checkpoint", "place"), (6, 2.5, 1.5))[0]
    if attack == "checkpoint":
        return _checkpoint(random, run)
    if attack == "place":
        return _place(random, run), _commands(random, "")
    path = random.choice(_attacked(run))
    name = path.relative_to(run).as_posix()
    what = mutate_file(random, path)
    if random.random() < 0.6 and (run / "codec/config.json").is_file():
        what += ", fingerprints mended"
        _mend(run)
    return f"{name}: {what}", _commands(random, name)


def _attacked(run: Path) -> list[Path]:
    """Files worth an attack; those that most commands read, more than once."""
    found = [
        path
        for path in sorted(run.rglob("*"))
        if path.is_file()
        and path.suffix in (".json", ".jsonl", ".yaml", ".safetensors", ".arrow")
        and "checkpoints" not in path.parts
    ]
    often = [run / "run.json", run / "config.yaml", run / "codec/config.json", run / "codes/codes.json"]
    priors = [path for path in found if "priors" in path.parts and path.name in ("config.json", "model.safetensors")]
    return found + 6 * often + 2 * priors + 2 * [run / "codec/model.safetensors"]


def _commands(random: Random, name: str) -> list[list[str]]:
    light = [
        ["info"],
        ["info", "--json"],
        ["sample", "-n", "2", "--prior", "pixelcnn", "--out", "x"],
        ["sample", "-n", "1", "--out", "y"],
        ["sample", "-n", "1", "--label", "1", "--prior", "top=unigram,bottom=transformer", "--out", "z"],
        ["reconstruct", "-n", "2"],
        ["compress", "-n", "2", "--prior", "unigram", "--out", "new.vqgen"],
        ["train-prior", "--prior", "uniform"],
        ["train-prior", "--prior", "unigram", "--overwrite"],
        ["train-prior", "--prior", "pixelcnn", "--resume"],
        ["train-codes", "--resume"],
    ]
    heavy = [["compare"], ["diagnose"], ["evaluate"], ["score", "-n", "4"]]
    chosen = random.sample(light, 2)
    if name.startswith("priors/") or name.startswith("codec/"):
        prior = name.split("/")[1] if name.startswith("priors/") else "pixelcnn"
        chosen.append(["sample", "-n", "1", "--prior", prior, "--out", "w"])
    if name.endswith(("metrics.jsonl", "metrics.json")):
        chosen = [random.choice((["diagnose"], ["compare"]))]  # which read these
    elif random.random() < 0.06:
        chosen.append(random.choice(heavy))
    return [[*command, "--run", "run"] for command in chosen]


def _place(random: Random, run: Path) -> str:
    """Something in the run that is not what it should be: a link, a pipe, a folder for a file, nothing."""
    beside = run.parent.parent / "beside"
    targets = ["samples", "samples/x", "codec", "compare", "priors", "priors/pixelcnn", "run.json", "config.yaml"]
    targets += [".lock", "codes", "codec/metrics.jsonl", "codec/checkpoints", "codec/model.safetensors", "reconstruct"]
    path = run / random.choice(targets)
    how = random.choice(("link out", "link to a file", "link within", "pipe", "folder", "file", "nothing", "loop"))
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    if how == "link out":
        path.symlink_to(beside)
    elif how == "link to a file":
        path.symlink_to(beside / "victim.txt")
    elif how == "link within":
        path.symlink_to(run)
    elif how == "loop":
        path.symlink_to(path.name)
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "folder":
        path.mkdir()
    elif how == "file":
        path.write_bytes(b"x")
    return f"{path.relative_to(run).as_posix()}: {how}"


def _checkpoint(random: Random, run: Path) -> Case:
    """A checkpoint of a training that is to go on, its checksums mended."""
    stage = random.choice(("codec", "priors/pixelcnn/top", "priors/transformer/bottom"))
    record = json.loads((run / "run.json").read_text())
    del record["stages"][stage]
    (run / "run.json").write_text(json.dumps(record))
    folder = max((run / stage / "checkpoints").glob("step-*"))
    state = folder / "state.json"
    body = json.loads(state.read_text())
    del body["checksum"]
    if random.random() < 0.5:
        path = random.choice(sorted(folder.glob("*.safetensors")))
        content, what = mutate_tensors(random, path.read_bytes())
        path.write_bytes(content)
        what = f"{path.name}: {what}"
        body["files"][path.name] = [path.stat().st_size, checkpoint._file_checksum(path)]
    else:
        part = random.choice(("state", "state", "state", "files", "all"))
        what = f"state.json: {mutate_value(random, body if part == 'all' else body[part])}"
    text = json.dumps(body)
    state.write_text(json.dumps({**json.loads(text), "checksum": checkpoint._text_checksum(json.loads(text))}))
    command = ["train-codes"] if stage == "codec" else ["train-prior", "--prior", stage.split("/")[1]]
    return f"{stage} checkpoint, {what}", [[*command, "--resume", "--run", "run"]]


def _mend(run: Path) -> None:
    """Make codes, priors and the record name the codec as it now is, and the record the priors."""
    try:
        print_of_codec = fingerprint(run / "codec")
        codes = json.loads((run / "codes/codes.json").read_text())
        codes["codec_fingerprint"] = print_of_codec
        (run / "codes/codes.json").write_text(json.dumps(codes))
        for path in run.glob("priors/*/*/config.json"):
            saved = json.loads(path.read_text())
            saved["spec"]["codec_fingerprint"] = print_of_codec
            path.write_text(json.dumps(saved))
    except Exception:  # damaged beyond mending
        return


def _compressed(random: Random, base: Path, case: Path) -> Case:
    run = Path(shutil.copytree(base / "run", case / "run"))
    content = (base / random.choice(("file.vqgen", "short.vqgen"))).read_bytes()
    how = random.choices(("bytes", "header", "payload", "bomb"), (3, 4, 3, 1))[0]
    what = how
    if how == "bytes":
        content, what = mutate_bytes(random, content)
    else:
        _, _, length, _ = file_format._HEAD.unpack_from(content)
        start = file_format._HEAD.size
        header, rest = content[start : start + length], content[start + length : -file_format._DIGEST]
        if how == "payload":
            rest, what = mutate_bytes(random, rest)
        elif how == "header":
            value = json.loads(zlib.decompressobj(-15, zdict=file_format._WORDS).decompress(header))
            what = "; ".join(mutate_value(random, value) for _ in range(random.randint(1, 2)))
            header = _deflated(json.dumps(value).encode("utf-8", "surrogatepass"))
        else:
            header = _deflated(random.choice((b"0" * 2**25, *BOMBS)))
        if random.random() < 0.2:
            rest = rest[: -file_format._DIGEST] + bytes(4 * random.randrange(10_000)) + rest[-file_format._DIGEST :]
        head = file_format._HEAD.pack(
            file_format.MAGIC, file_format.FORMAT, min(len(header), 2**16 - 1), zlib.crc32(header)
        )
        body = head + header + rest
        content = body + file_format._checksum(body)
    (case / "it.vqgen").write_bytes(content)
    return what, [["decompress", "it.vqgen", "--out", "out", "--run", str(run.relative_to(case))]]


def _deflated(text: bytes) -> bytes:
    deflater = zlib.compressobj(9, zlib.DEFLATED, -15, zdict=file_format._WORDS)
    return deflater.compress(text) + deflater.flush()


def mutate_file(random: Random, path: Path) -> str:
    """Change a file as befits its kind; says how."""
    content = path.read_bytes()
    if path.suffix == ".safetensors" and random.random() < 0.8:
        content, what = mutate_tensors(random, content)
    elif path.suffix in (".json", ".yaml", ".jsonl") and random.random() < 0.7:
        lines = content.decode().splitlines() if path.suffix == ".jsonl" else [content.decode()]
        place = random.randrange(len(lines))
        value = yaml.safe_load(lines[place]) if path.suffix == ".yaml" else json.loads(lines[place])
        what = "; ".join(mutate_value(random, value) for _ in range(random.randint(1, 3)))
        lines[place] = json.dumps(value)
        content = "\n".join(lines).encode("utf-8", "surrogatepass")
    elif random.random() < 0.3:
        bombs = (*YAML_BOMBS, *BOMBS) if path.suffix == ".yaml" else BOMBS
        number = random.randrange(len(bombs))
        content, what = bombs[number], f"bomb {number}"
    else:
        content, what = mutate_bytes(random, content)
    path.write_bytes(content)
    return what


def mutate_bytes(random: Random, content: bytes) -> tuple[bytes, str]:
    """Flip, cut, double, insert or overwrite bytes."""
    how = random.choice(("flip", "cut", "double", "insert", "overwrite", "remove"))
    first = random.randrange(len(content) + 1)
    last = min(first + random.choice((1, 4, 16, 256)), len(content))
    part = content[first:last]
    if how == "flip":
        changed = bytearray(content)
        for _ in range(random.randint(1, 8)):
            changed[random.randrange(len(content))] ^= 1 << random.randrange(8)
        return bytes(changed), "flipped bits"
    middle = {
        "cut": b"",
        "double": part + part,
        "insert": random.randbytes(last - first) + part,
        "overwrite": random.choice((bytes(len(part)), b"\xff" * len(part), random.randbytes(len(part)))),
        "remove": b"",
    }[how]
    return content[:first] + middle + (b"" if how == "cut" else content[last:]), f"{how} at {first}"


def mutate_value(random: Random, root: Any) -> str:
    """Change one value somewhere in a tree of lists and mappings, in place; says which and how."""
    places: list[tuple[Any, Any, str]] = []
    waiting: list[tuple[Any, str]] = [(root, "")]
    while waiting:
        node, path = waiting.pop()
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, value in list(items):
            places.append((node, key, f"{path}.{key}"))
            waiting.append((value, f"{path}.{key}"))
    if not places:
        return "nothing to change"
    parent, key, path = random.choice(places)
    value = parent[key]
    how = random.choice(("text", "number", "other", "delete", "name", "swap", "scale", "deep", "many", "add"))
    if how == "text":
        parent[key] = random.choice((*NAMES, *TEXTS))
    elif how == "number" or (how == "scale" and not isinstance(value, (int, float))):
        parent[key] = random.choice(NUMBERS)
    elif how == "scale":
        parent[key] = random.choice((-value, value * 10, value * 1000, value * 10**6, value + 1, value - 1))
    elif how == "delete":
        del parent[key]
    elif how == "name" and isinstance(parent, dict):
        parent[random.choice((*NAMES, *TEXTS))] = parent.pop(key)
    elif how == "swap":
        parent[key] = copy.deepcopy(random.choice([other[name] for other, name, _ in places]))
    elif how == "deep":
        for _ in range(random.choice((2, 60, 200))):
            parent[key] = [parent[key]]
    elif how == "many":
        parent[key] = [copy.deepcopy(value)] * random.choice((2, 3, 5000))
    elif how == "add" and isinstance(parent, dict):
        parent[random.choice((*NAMES, *TEXTS))] = copy.deepcopy(value)
    else:
        parent[key] = copy.deepcopy(random.choice(OTHERS))
    return f"{path[:60]} {how}"


def mutate_tensors(random: Random, content: bytes) -> tuple[bytes, str]:
    """Change the header or the numbers of a safetensors file."""
    (length,) = struct.unpack_from("<Q", content)
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    how = random.choice(("header", "header", "numbers", "length", "pickle", "type", "shape", "more", "name"))
    named = [key for key in header if key != "__metadata__"]
    entry = header[random.choice(named)]
    if how == "header":
        what = mutate_value(random, header)
    elif how == "numbers":
        what = "numbers"
        size = random.choice((4, 64, 4096))
        fill = random.choice((b"\xff", b"\x00", b"\x7f", bytes([random.randrange(256)])))
        first = random.randrange(len(data))
        data = data[:first] + (fill * size)[: len(data) - first] + data[first + size :]
    elif how == "length":
        wrong = random.choice((0, 1, length + 1, 2**31, 2**63, 2**64 - 1))
        return struct.pack("<Q", wrong) + content[8:], f"header of {wrong} bytes"
    elif how == "pickle":
        return random.choice(PICKLES) + content[:100], "a pickle"
    elif how == "type":
        entry["dtype"] = random.choice(("F64", "I32", "U8", "BOOL", "F8_E4M3", "C64", "F4", "OBJECT", "U64"))
        what = f"type {entry['dtype']}"
    elif how == "shape":
        entry["shape"] = random.choice(
            ([2**40], [2**32, 2**32], [-1], [0], [], [1.5], [1] * 1000, entry["shape"][::-1])
        )
        what = "shape"
    elif how == "more":
        size = len(data)
        header["more"] = {"dtype": "U8", "shape": [16], "data_offsets": [size, size + 16]}
        data, what = data + bytes(16), "one more tensor"
    else:
        header[random.choice((*NAMES, *TEXTS))] = header.pop(named[0])
        what = "a name"
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + data, what


def digest(case: Path) -> str:
    """Checksum of all files of a case, to see that a number always makes the same case."""
    total = hashlib.sha256()
    for path in sorted(case.rglob("*")):
        if path.is_file() and not path.is_symlink():
            total.update(path.relative_to(case).as_posix().encode() + path.read_bytes())
    return total.hexdigest()
