"""A stranger's model folder: refused before anything is made by its sizes, and nothing in it is run or imported."""

from __future__ import annotations

import json
import os
import pickle
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from torch import nn

from priors import registry
from priors.base import Prior, PriorSpec
from vqgen.codec import HierarchicalVQVAE
from vqgen.codes import ImageSpec, LevelSpec
from vqgen.config import CodecConfig, Settings
from vqgen.errors import VqgenError
from vqgen.hub import CONFIG, WEIGHTS, HubModel
from vqgen.memory import peak_memory

MOST_BYTES = 300 * 2**20
"""What a refusal may take; the models asked for would take thousands of times as much."""
MOST_SECONDS = 20.0

TOP = LevelSpec("top", 2, 2, 16, 8)
SPEC = PriorSpec(LevelSpec("bottom", 4, 4, 16, 8), (TOP,), 2, ("cat", "dog"), "0" * 64)
SMALL = {
    "pixelcnn": {"width": 16, "blocks": 2},
    "pixelsnail": {"width": 32},
    "transformer": {"dim": 32, "depth": 1, "heads": 2},
    "roundtrip": {},
    "unigram": {},
    "uniform": {},
}


class Payload:
    """What an unpickler would run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="module")
def codec_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "codec"
    config = CodecConfig(codebook_size=16, code_dim=8, width=16, residual_blocks=1, residual_width=8)
    with torch.random.fork_rng():
        HierarchicalVQVAE(config, ImageSpec(3, 16, 16)).save_pretrained(folder)
    return folder


@pytest.fixture
def codec(codec_folder: Path, tmp_path: Path) -> Path:
    copied = tmp_path / "codec"
    copied.mkdir()
    for name in (CONFIG, WEIGHTS):
        (copied / name).write_bytes((codec_folder / name).read_bytes())
    return copied


def edit(folder: Path, *keys: str, to: Any) -> None:
    saved = json.loads((folder / CONFIG).read_text())
    at = saved
    for key in keys[:-1]:
        at = at[key]
    at[keys[-1]] = to
    (folder / CONFIG).write_text(json.dumps(saved))


def refuse(load: Callable[[Path], object], folder: Path) -> str:
    """What is said of the folder, which must be refused soon and without much memory."""
    before = _resident()
    start = time.perf_counter()
    with peak_memory() as span, pytest.raises(VqgenError) as caught:
        load(folder)
    assert time.perf_counter() - start < MOST_SECONDS
    if span.peak is not None and before is not None:
        assert span.peak - before < MOST_BYTES
    return str(caught.value)


def _resident() -> int | None:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("config", "width"), 10**5),
        (("config", "width"), 10**9),
        (("config", "width"), 2**63),
        (("config", "codebook_size"), 2**30),
        (("config", "codebook_size"), [16, 10**12]),
        (("config", "code_dim"), 10**9),
        (("config", "residual_blocks"), 10**9),
        (("config", "residual_width"), 10**9),
        (("config", "filters"), [10**6, 10**6]),
        (("config", "filters"), [4] * 100_000),
        (("config", "strides"), [2**40, 2**39]),
        (("config", "strides"), [2**2000, 4]),
        (("spec", "height"), 10**9),
        (("spec", "height"), 10**30),
        (("spec", "width"), 0),
        (("spec", "width"), -5),
        (("spec", "channels"), 10**6),
        (("spec", "height"), 1.5),
        (("spec", "height"), None),
        (("spec", "height"), [16]),
        (("type",), "os:system"),
        (("type",), "../../vqvae2"),
        (("type",), ["vqvae2"]),
        (("kind",), {"codec": 1}),
        (("format",), 10**15),
        (("config",), []),
        (("spec",), "all"),
    ],
)
def test_settings_that_do_not_fit_the_weights(keys: tuple[str, ...], value: Any, codec: Path) -> None:
    edit(codec, *keys, to=value)
    modules = set(sys.modules)
    assert CONFIG in refuse(HierarchicalVQVAE.from_pretrained, codec) or keys[0] in ("type", "kind")
    assert not {name for name in set(sys.modules) - modules if name.startswith(("canary", "os:"))}


@pytest.mark.parametrize("name", sorted(SMALL))
def test_priors_whose_sizes_are_not_those_of_their_weights(name: str, tmp_path: Path) -> None:
    kind = registry.get(name)
    with torch.random.fork_rng():
        kind(kind.Config(**SMALL[name]), SPEC).save_pretrained(tmp_path)
    whole = (tmp_path / CONFIG).read_text()
    assert type(Prior.from_pretrained(tmp_path)) is kind
    counts = [key for key, value in json.loads(whole)["config"].items() if type(value) is int and key != "seed"]
    for key in counts:
        for size in (10**7, 2**62):
            edit(tmp_path, "config", key, to=size)
            try:
                refuse(Prior.from_pretrained, tmp_path)
            except pytest.fail.Exception:  # a number of no consequence for sizes
                assert type(Prior.from_pretrained(tmp_path)) is kind
            (tmp_path / CONFIG).write_text(whole)
    for key, size in [("height", 10**9), ("width", 2**14), ("codebook_size", 2**40), ("code_dim", 2**40)]:
        edit(tmp_path, "spec", "target", key, to=size)
        refuse(Prior.from_pretrained, tmp_path)
        (tmp_path / CONFIG).write_text(whole)
    edit(tmp_path, "spec", "classes", to=2**40)
    refuse(Prior.from_pretrained, tmp_path)


HEADERS: dict[str, Any] = {
    "a shape beyond all": {"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 16]}},
    "a shape that overflows": {"a": {"dtype": "F32", "shape": [2**32, 2**32], "data_offsets": [0, 16]}},
    "a negative shape": {"a": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}},
    "offsets beyond the file": {"a": {"dtype": "F32", "shape": [4], "data_offsets": [2**40, 2**40 + 16]}},
    "offsets that go back": {"a": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}},
    "tensors over each other": {
        "a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
        "b": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
    },
    "an unknown type": {"a": {"dtype": "OBJECT", "shape": [4], "data_offsets": [0, 16]}},
    "complex numbers": {"a": {"dtype": "C64", "shape": [2], "data_offsets": [0, 16]}},
    "no tensor": {},
    "a name like a path": {"../../a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}},
    "metadata that is no text": {"__metadata__": {"a": [1]}},
    "a list": [],
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS.keys())
def test_crafted_headers(header: Any, codec: Path) -> None:
    text = json.dumps(header).encode()
    (codec / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
    assert WEIGHTS in refuse(HierarchicalVQVAE.from_pretrained, codec)


@pytest.mark.parametrize("dtype", ["C64", "F8_E4M3", "U64", "F4"])
def test_weights_of_another_kind_of_number(dtype: str, codec: Path) -> None:
    content = (codec / WEIGHTS).read_bytes()
    length = struct.unpack_from("<Q", content)[0]
    header = json.loads(content[8 : 8 + length])
    sizes = {"C64": 8, "F8_E4M3": 1, "U64": 8, "F4": 0.5}
    offset = 0
    for key, entry in sorted(header.items()):
        if key == "__metadata__":
            continue
        entry["dtype"] = dtype
        numbers = 1
        for side in entry["shape"]:
            numbers *= side
        entry["data_offsets"] = [offset, offset + int(numbers * sizes[dtype])]
        offset = entry["data_offsets"][1]
    text = json.dumps(header).encode()
    (codec / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + bytes(offset))
    assert WEIGHTS in refuse(HierarchicalVQVAE.from_pretrained, codec)


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**63, 2**64 - 1])
def test_a_header_of_any_length(length: int, codec: Path) -> None:
    (codec / WEIGHTS).write_bytes(struct.pack("<Q", length) + b"{" * 1000)
    assert WEIGHTS in refuse(HierarchicalVQVAE.from_pretrained, codec)


def test_pickles_in_disguise_are_not_unpickled(codec: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    torch.save({"weights": Payload(made)}, tmp_path / "saved.pt")
    for content in (pickle.dumps(Payload(made)), (tmp_path / "saved.pt").read_bytes()):
        for name in (WEIGHTS, CONFIG):
            whole = (codec / name).read_bytes()
            (codec / name).write_bytes(content)
            assert name in refuse(HierarchicalVQVAE.from_pretrained, codec)
            (codec / name).write_bytes(whole)
    assert not made.exists()


def test_what_else_lies_in_a_hub_repository_is_not_fetched(codec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def fetch(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(codec)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    HierarchicalVQVAE.from_pretrained("somebody/codec")
    assert asked == {"name": "somebody/codec", "revision": None, "allow_patterns": [CONFIG, WEIGHTS]}


class StubbornConfig(Settings):
    width: int = 4


@dataclass(frozen=True)
class StubbornSpec:
    channels: int = 2


class Stubborn(HubModel):
    """Looks at a number while it is made, which cannot be done without memory."""

    kind = "toy"
    name = "stubborn"
    Config = StubbornConfig
    Spec = StubbornSpec

    def __init__(self, config: Any, spec: StubbornSpec) -> None:
        super().__init__(config, spec)
        self.scale = nn.Parameter(torch.ones(self.config.width))
        if float(self.scale.sum().item()) != self.config.width:
            raise ValueError("wrong")


def test_a_class_that_needs_memory_is_made_and_stopped_at_the_first_tensor_too_many(tmp_path: Path) -> None:
    Stubborn({"width": 5}, StubbornSpec()).save_pretrained(tmp_path)
    assert len(Stubborn.from_pretrained(tmp_path).scale) == 5
    edit(tmp_path, "config", "width", to=2**20)
    assert "does not fit" in refuse(Stubborn.from_pretrained, tmp_path)


def test_loading_leaves_no_hooks_and_draws_nothing(codec: Path) -> None:
    from torch.nn.modules import module

    before = torch.get_rng_state()
    HierarchicalVQVAE.from_pretrained(codec)
    edit(codec, "config", "width", to=10**6)
    refuse(HierarchicalVQVAE.from_pretrained, codec)
    assert torch.equal(torch.get_rng_state(), before)
    assert not module._global_parameter_registration_hooks
    assert not module._global_buffer_registration_hooks
    assert torch.get_default_device() == torch.device("cpu")
