"""Saving, loading and publishing of models: ``config.json`` beside ``model.safetensors``.

Strict where the hub library's own mixin is lax: unknown settings, missing or extra weights and wrong shapes
are errors, and the card is written anew on each save. Nothing here unpickles, and nothing that a file names
is imported: the class is the caller's, or comes from a registry of classes already loaded.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from vqgen.config import Settings
from vqgen.errors import InputError, MismatchError
from vqgen.files import replacing, settle, write_json, write_text
from vqgen.parsing import load_json
from vqgen.problems import build

FORMAT = 1
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
MOST_CONFIG = 2**22
"""Bytes of a config.json: room for some hundred thousand class names."""
SPARE = 2**24
"""Numbers in buffers that a model may hold beyond those of its weights: masks and others that are not saved."""
DTYPES = {"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"}
"""What a tensor of a model or a checkpoint may be."""
UNBUILT = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError),
    *(NotImplementedError, RecursionError, RuntimeError, TypeError, ValueError),
)
"""What torch and Python raise of sizes that nothing can be made of."""

M = TypeVar("M", bound="HubModel")


class HubModel(nn.Module):
    """A model made from settings (``config``) and from shapes (``spec``), and nothing else."""

    kind: ClassVar[str]
    """What it is in a run: ``codec`` or ``prior``."""
    name: ClassVar[str]
    """Its registered name, kept as ``type`` in config.json."""
    Config: ClassVar[type[Settings]]
    Spec: ClassVar[type[Any]]

    def __init__(self, config: Settings | Mapping[str, Any], spec: Any) -> None:
        super().__init__()
        self.config = config if isinstance(config, Settings) else build(self.Config, dict(config))
        self.spec = spec

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json, model.safetensors and a README card into ``folder``, each file atomically."""
        folder = Path(folder)
        saved = {
            "format": FORMAT,
            "kind": self.kind,
            "type": self.name,
            "config": self.config.model_dump(mode="json"),
            "spec": dataclasses.asdict(self.spec),
        }
        tensors = {key: value.detach().cpu().contiguous() for key, value in self.state_dict().items()}
        with replacing(folder / WEIGHTS) as path:
            save_file(tensors, path, metadata={"format": "pt"})
            settle(path)
        write_json(folder / CONFIG, saved)
        write_text(folder / "README.md", self.card())

    @classmethod
    def from_pretrained(cls: type[M], source: str | Path, revision: str | None = None) -> M:
        """A model saved with `save_pretrained`, on the CPU and in evaluation mode.

        ``source`` is a folder, or the name of a repository on the Hugging Face hub.

        Raises:
            InputError: no such folder, or a file in it is missing or damaged.
            MismatchError: the folder holds another kind of model, or weights of another shape.
        """
        folder = _fetch(source, revision)
        saved = _read_config(folder / CONFIG)
        if saved["kind"] != cls.kind:
            raise MismatchError(f"{folder} holds a {saved['kind']}, not a {cls.kind}.")
        kind = cls.class_for(saved["type"])
        config = build(kind.Config, saved["config"], f"{folder / CONFIG}: config")
        try:
            spec = TypeAdapter(kind.Spec).validate_python(saved["spec"])
        except ValidationError as error:
            raise InputError(f"{folder / CONFIG}: 'spec' is damaged ({error.error_count()} bad values).") from error
        model = _sized(kind, config, spec, folder)
        model.load_weights(folder / WEIGHTS)
        model.eval()
        return model  # type: ignore[return-value]

    @classmethod
    def class_for(cls, name: str) -> type[HubModel]:
        """The class that config.json's ``type`` means; a registry of several overrides this."""
        if name != cls.name:
            raise MismatchError(f"Expected a {cls.kind} of type '{cls.name}', found '{name}'.")
        return cls

    def load_weights(self, path: Path) -> None:
        """Copy the tensors of a safetensors file into this model, after checking every name and shape.

        Raises:
            InputError: the file is missing or damaged.
            MismatchError: names or shapes differ from this model's.
        """
        self.load_state_dict(read_tensors(path, _shapes(self)))

    def card(self) -> str:
        """The README of the saved folder, as the hub shows it."""
        return (
            "---\n"
            f"library_name: vqgen\npipeline_tag: unconditional-image-generation\ntags:\n- vqgen\n- {self.kind}\n"
            "---\n\n"
            f"# vqgen {self.kind}: {self.name}\n\n"
            f"```json\n{json.dumps(dataclasses.asdict(self.spec), indent=2)}\n```\n"
        )

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
        """Publish to the repository ``repo_id`` of the Hugging Face hub; returns its address."""
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            api.upload_folder(repo_id=repo_id, folder_path=folder)
        return str(address)


def read_tensors(path: Path, shapes: Mapping[str, tuple[int, ...]] | None = None) -> dict[str, Tensor]:
    """Tensors of a safetensors file; with ``shapes``, the names and shapes are checked before any is read.

    Raises:
        InputError: the file is missing or damaged.
        MismatchError: names or shapes are not those of ``shapes``.
    """
    if not path.is_file():
        raise InputError(f"{path} is missing.", "Train or copy the model again.")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in _compare(path, file, shapes)}
    except (SafetensorError, OSError, *UNBUILT) as error:
        raise InputError(f"{path} is damaged ({error}).", "Train or copy the model again.") from error


def _sized(kind: type[M], config: Settings, spec: Any, folder: Path) -> M:
    """A model that is no larger than the weights that lie beside its config.json.

    It is made twice, first without memory for its tensors (torch's device ``meta``): settings of a stranger that ask
    for more than the file of weights holds are refused there, and so are weights of other names or shapes. A class
    that cannot be made so is made once, and stopped at the first tensor too many.

    Raises:
        InputError: the weights are missing or damaged, or the settings are for no model or a larger one.
        MismatchError: names or shapes of the weights are not those of the model.
    """
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise InputError(f"{weights} is missing.", "Train or copy the model again.")
    check_shapes(weights, None)
    room = weights.stat().st_size
    with torch.random.fork_rng(devices=[]):  # the first weights are drawn, only to be replaced
        try:
            with torch.device("meta"), _at_most(room, folder):
                planned = kind(config, spec)
        except UNBUILT:
            planned = None
        if planned is not None:
            check_shapes(weights, _shapes(planned))
        try:
            with _at_most(room, folder):
                return kind(config, spec)
        except UNBUILT as error:
            line = " ".join(str(error).split())[:200]
            raise InputError(f"{folder / CONFIG} describes no {kind.kind} that can be made ({line}).") from error


@contextmanager
def _at_most(room: int, folder: Path) -> Iterator[None]:
    """Refuse the parameters made in the block as soon as they are more numbers than ``room`` bytes can hold.

    Buffers likewise, but for `SPARE`, since not all of them are saved.
    """
    made = {"parameters": 0, "buffers": 0}

    def count(module: nn.Module, name: str, tensor: Tensor | None, *, kind: str, most: int) -> None:
        made[kind] += 0 if tensor is None else tensor.numel()
        if made[kind] > most:
            raise InputError(
                f"{folder / CONFIG} describes a model that does not fit into {WEIGHTS} beside it: {room:,} bytes for "
                f"{made[kind]:,} numbers and more.",
                "Copy both files again.",
            )

    hooks = [
        register_module_parameter_registration_hook(partial(count, kind="parameters", most=room)),
        register_module_buffer_registration_hook(partial(count, kind="buffers", most=room + SPARE)),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def check_shapes(path: Path, shapes: Mapping[str, tuple[int, ...]] | None) -> None:
    """Read the header of a safetensors file, and hold it against ``shapes``, if given; raises as `read_tensors`."""
    try:
        with safe_open(path, framework="pt") as file:
            _compare(path, file, shapes)
    except (SafetensorError, OSError, *UNBUILT) as error:
        raise InputError(f"{path} is damaged ({error}).", "Train or copy the model again.") from error


def _compare(path: Path, file: Any, shapes: Mapping[str, tuple[int, ...]] | None) -> list[str]:
    slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
    found = {key: tuple(part.get_shape()) for key, part in slices.items()}
    if shapes is not None and found != dict(shapes):
        raise MismatchError(f"{path} does not fit its config.json: {_first_difference(found, shapes)}.")
    kinds = {key: str(part.get_dtype()) for key, part in slices.items()}
    if strange := [key for key, kind in kinds.items() if kind not in DTYPES]:
        raise InputError(f"{path} is damaged (tensor '{strange[0]}' is of type {kinds[strange[0]]}).")
    return list(found)


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def fingerprint(folder: Path) -> str:
    """SHA-256 over config.json and model.safetensors: what a model is, wherever it lies."""
    digest = hashlib.sha256()
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise InputError(f"{folder / name} is missing.", "Train or copy the model again.")
        with (folder / name).open("rb") as file:
            digest.update(
                hashlib.file_digest(file, "sha256").digest() if hasattr(hashlib, "file_digest") else _sha(file)
            )
    return digest.hexdigest()


def _sha(file: Any) -> bytes:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.digest()


def _first_difference(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> str:
    for key in expected:
        if key not in found:
            return f"tensor '{key}' is missing"
        if found[key] != expected[key]:
            return f"tensor '{key}' has shape {list(found[key])}, expected {list(expected[key])}"
    return f"tensor '{next(key for key in found if key not in expected)}' is not one of this model's"


def _read_config(path: Path) -> dict[str, Any]:
    hint = "Train or copy the model again."
    if not path.is_file():
        raise InputError(f"{path} is missing.", hint)
    try:
        saved = load_json(path, most=MOST_CONFIG)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is damaged ({error}).", hint) from error
    whole = isinstance(saved, dict) and set(saved) == {"format", "kind", "type", "config", "spec"}
    if not whole or not (isinstance(saved["kind"], str) and isinstance(saved["type"], str)):
        raise InputError(f"{path} is not the config.json of a vqgen model.", hint)
    if saved["format"] != FORMAT:
        raise InputError(f"{path} has format {saved['format']!r}; this vqgen reads {FORMAT}.", "Upgrade vqgen.")
    config: dict[str, Any] = saved
    return config


def _fetch(source: str | Path, revision: str | None) -> Path:
    if Path(source).is_dir():
        return Path(source)
    text = str(source)
    if isinstance(source, Path) or text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise InputError(f"No model folder at '{source}'.", "Give a folder, or OWNER/NAME of a repository on the hub.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(text, revision=revision, allow_patterns=[CONFIG, WEIGHTS]))
    except Exception as error:  # the library's own, and whatever the HTTP library of the day raises
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"'{text}' is neither a folder nor a hub repository that can be reached ({line}).") from error
