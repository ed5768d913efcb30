"""Models in folders and on the hub: what is written, and that anything else is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from torch import nn

from vqgen.config import Settings
from vqgen.errors import ConfigError, InputError, MismatchError
from vqgen.hub import CONFIG, WEIGHTS, HubModel, fingerprint

FILES = {CONFIG, WEIGHTS, "README.md"}


class TinyConfig(Settings):
    width: int = 3
    scale: float = 0.5


@dataclass(frozen=True)
class TinySpec:
    channels: int
    names: tuple[str, ...]


class Tiny(HubModel):
    kind = "toy"
    name = "tiny"
    Config = TinyConfig
    Spec = TinySpec
    calibrated: torch.Tensor

    def __init__(self, config: Any, spec: TinySpec) -> None:
        super().__init__(config, spec)
        self.layer = nn.Linear(spec.channels, self.config.width)
        self.register_buffer("calibrated", torch.full((2,), float("nan"), dtype=torch.float64))


class OtherKind(Tiny):
    kind: ClassVar[str] = "codec"


class OtherType(Tiny):
    name: ClassVar[str] = "small"


@pytest.fixture
def model() -> Tiny:
    torch.manual_seed(0)
    model = Tiny({"width": 4}, TinySpec(2, ("a", "é")))
    model.calibrated.copy_(torch.tensor([0.1, 1e-9]))
    return model


@pytest.fixture
def folder(model: Tiny, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    saved = json.loads((folder / CONFIG).read_text())
    change(saved)
    (folder / CONFIG).write_text(json.dumps(saved))


def test_what_is_loaded_is_what_was_saved(model: Tiny, folder: Path) -> None:
    loaded = Tiny.from_pretrained(str(folder))
    assert {path.name for path in folder.iterdir()} == FILES
    assert (loaded.config, loaded.spec) == (model.config, model.spec)
    assert not loaded.training
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[key], value, rtol=0, atol=0)


def test_saving_replaces_all_files_and_decides_the_fingerprint(model: Tiny, folder: Path) -> None:
    first = fingerprint(folder)
    (folder / "README.md").write_text("stale")
    model.save_pretrained(folder)
    assert fingerprint(folder) == first
    assert "tiny" in (folder / "README.md").read_text()
    with torch.no_grad():
        model.layer.bias[0] += 1
    model.save_pretrained(folder)
    assert fingerprint(folder) != first
    (folder / WEIGHTS).unlink()
    with pytest.raises(InputError, match=r"model\.safetensors is missing"):
        fingerprint(folder)


def test_unknown_settings_are_refused(folder: Path) -> None:
    edit(folder, lambda saved: saved["config"].update(widht=3))
    with pytest.raises(ConfigError, match=r"config\.json: config\.widht: unknown key\. Did you mean 'width'"):
        Tiny.from_pretrained(folder)


def test_another_kind_or_type_is_refused(folder: Path) -> None:
    with pytest.raises(MismatchError, match="holds a toy, not a codec"):
        OtherKind.from_pretrained(folder)
    with pytest.raises(MismatchError, match="Expected a toy of type 'small', found 'tiny'"):
        OtherType.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda saved: saved.update(format=2), r"has format 2; this vqgen reads 1\. Upgrade vqgen"),
        (lambda saved: saved.pop("spec"), "is not the config.json of a vqgen model"),
        (lambda saved: saved.update(extra=1), "is not the config.json of a vqgen model"),
        (lambda saved: saved.update(spec={"channels": "two"}), "'spec' is damaged"),
        (lambda saved: saved.update(spec=None), "'spec' is damaged"),
    ],
)
def test_a_config_of_other_contents_is_refused(
    folder: Path, change: Callable[[dict[str, Any]], Any], match: str
) -> None:
    edit(folder, change)
    with pytest.raises(InputError, match=match):
        Tiny.from_pretrained(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"[1]", b"3"])
def test_a_damaged_config_is_one_line(folder: Path, content: bytes) -> None:
    (folder / CONFIG).write_bytes(content)
    with pytest.raises(InputError, match=r"config\.json is (damaged|not the config\.json of a vqgen model)") as caught:
        Tiny.from_pretrained(folder)
    assert "\n" not in str(caught.value)
    (folder / CONFIG).unlink()
    with pytest.raises(InputError, match=r"config\.json is missing"):
        Tiny.from_pretrained(folder)


@pytest.mark.parametrize("damage", [lambda content: b"", lambda content: content[:-3], lambda content: b"\xff" * 64])
def test_damaged_weights_are_one_line(folder: Path, damage: Callable[[bytes], bytes]) -> None:
    (folder / WEIGHTS).write_bytes(damage((folder / WEIGHTS).read_bytes()))
    with pytest.raises(InputError, match=r"model\.safetensors is damaged"):
        Tiny.from_pretrained(folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(InputError, match=r"model\.safetensors is missing"):
        Tiny.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda tensors: tensors.pop("layer.bias"), r"tensor 'layer\.bias' is missing"),
        (
            lambda tensors: tensors.update({"layer.bias": torch.zeros(5)}),
            r"'layer\.bias' has shape \[5\], expected \[4\]",
        ),
        (lambda tensors: tensors.update(more=torch.zeros(1)), r"tensor 'more' is not one of this model's"),
    ],
)
def test_weights_of_another_model_are_refused(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], Any], match: str
) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(MismatchError, match=rf"does not fit its config\.json: .*{match}"):
        Tiny.from_pretrained(folder)


@pytest.mark.parametrize("source", [Path("owner/name"), "./owner/name", "/nowhere", "~/model", "name", "a/b/c"])
def test_what_cannot_be_on_the_hub_is_a_missing_folder(source: str | Path) -> None:
    with pytest.raises(InputError, match=r"No model folder at .* Give a folder, or OWNER/NAME"):
        Tiny.from_pretrained(source)


def test_a_model_comes_from_the_hub(model: Tiny, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def snapshot_download(repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repo_id, revision, set(allow_patterns)))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    loaded = Tiny.from_pretrained("owner/name", revision="v1")
    assert asked == [("owner/name", "v1", {CONFIG, WEIGHTS})]
    assert torch.equal(loaded.layer.weight, model.layer.weight)


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(*_: Any, **__: Any) -> str:
        raise LocalEntryNotFoundError("no connection\nand more lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    match = r"'owner/name' is neither a folder nor a hub repository that can be reached \(no connection\)"
    with pytest.raises(InputError, match=match):
        Tiny.from_pretrained("owner/name")


def test_push_to_hub_uploads_the_three_files(model: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Api:
        def __init__(self, token: str | None = None) -> None:
            calls.append(token)

        def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> str:
            calls.append((repo_id, private, exist_ok))
            return f"https://huggingface.co/{repo_id}"

        def upload_folder(self, *, repo_id: str, folder_path: str) -> None:
            calls.append((repo_id, {path.name for path in Path(folder_path).iterdir()}))
            assert torch.equal(Tiny.from_pretrained(folder_path).layer.weight, model.layer.weight)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    address = model.push_to_hub("owner/name", private=True, token="secret")
    assert address == "https://huggingface.co/owner/name"
    assert calls == ["secret", ("owner/name", True, True), ("owner/name", FILES)]
