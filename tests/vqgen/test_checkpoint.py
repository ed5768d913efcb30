from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from vqgen.checkpoint import (
    CheckpointStore,
    preserved_random_state,
    random_state,
    seed_random_state,
    set_random_state,
)
from vqgen.errors import InputError, MismatchError
from vqgen.optimizers import load_optimizer_tensors, optimizer_tensors


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def save(store: CheckpointStore, accelerator: Accelerator, step: int, **tensors: Tensor) -> Path:
    parts = {"task": tensors or {"weight": torch.full((3,), float(step))}, "best": {}}
    return store.save(step, {"step": step, "loss": 0.1 + 0.2, "bad": float("nan")}, parts, accelerator)


def refuse_warnings(text: str) -> None:
    raise AssertionError(text)


def test_what_is_saved_comes_back_exactly(tmp_path: Path, accelerator: Accelerator) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    shared = torch.randn(4, 2)
    tensors = {
        "shared": shared,
        "again": shared,
        "transposed": shared.t(),
        "half": torch.randn(2).to(torch.bfloat16),
        "double": torch.randn(2, dtype=torch.float64),
        "flag": torch.tensor(True),
        "none": torch.empty(0),
    }
    save(store, accelerator, 600, **tensors)
    loaded = store.load(refuse_warnings)
    assert loaded is not None
    assert (loaded.state["step"], loaded.state["loss"]) == (600, 0.1 + 0.2)
    for name, value in loaded.tensors("task").items():
        assert value.dtype == tensors[name].dtype
        assert torch.equal(value, tensors[name])
    assert loaded.tensors("best") == {}
    assert (tmp_path / "latest").read_text() == "step-00000600\n"


def test_only_safetensors_and_json_are_written(tmp_path: Path, accelerator: Accelerator) -> None:
    path = save(CheckpointStore(tmp_path, keep=1), accelerator, 1)
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}


def test_nothing_to_load(tmp_path: Path) -> None:
    assert CheckpointStore(tmp_path / "none", keep=1).load(refuse_warnings) is None


def test_the_newest_are_kept(tmp_path: Path, accelerator: Accelerator) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    for step in (5, 10, 900, 1000):
        save(store, accelerator, step)
    assert [path.name for path in store.paths()] == ["step-00001000", "step-00000900"]


def damage_bytes(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def change_state(path: Path) -> None:
    path.write_text(path.read_text().replace('"step": 2', '"step": 3'))


@pytest.mark.parametrize("damage", [damage_bytes, cut_short, Path.unlink])
@pytest.mark.parametrize("name", ["task.safetensors", "best.safetensors", "random-0.safetensors", "state.json"])
def test_damage_is_named_and_the_one_before_is_taken(
    tmp_path: Path, accelerator: Accelerator, damage: Any, name: str
) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    save(store, accelerator, 1)
    damage(save(store, accelerator, 2) / name)
    warnings: list[str] = []
    loaded = store.load(warnings.append)
    assert loaded is not None
    assert loaded.state["step"] == 1
    assert len(warnings) == 1
    assert str(tmp_path / "step-00000002" / name) in warnings[0]
    assert "Going back to step-00000001" in warnings[0]
    store.discard_after(loaded)
    assert [path.name for path in store.paths()] == ["step-00000001"]


def test_a_changed_number_in_the_state_is_damage(tmp_path: Path, accelerator: Accelerator) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    path = save(store, accelerator, 2)
    change_state(path / "state.json")
    with pytest.raises(InputError, match=r"state\.json is damaged.*--overwrite"):
        store.load(refuse_warnings)


def test_a_state_of_nonsense_is_damage(tmp_path: Path, accelerator: Accelerator) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    path = save(store, accelerator, 2) / "state.json"
    for text in ("[]", "3", '{"checksum": 0}', "[" * 100_000, json.dumps({"checksum": 1, "state": 1, "files": 2})):
        path.write_text(text)
        with pytest.raises(InputError, match=r"state\.json is"):
            store.load(refuse_warnings)


def test_a_checkpoint_that_never_became_latest_is_left_behind(tmp_path: Path, accelerator: Accelerator) -> None:
    store = CheckpointStore(tmp_path, keep=3)
    for step in (1, 2):
        save(store, accelerator, step)
    (tmp_path / "latest").write_text("step-00000001\n")
    loaded = store.load(refuse_warnings)
    assert loaded is not None
    assert loaded.state["step"] == 1
    (tmp_path / "latest").write_text("../../etc\n")
    loaded = store.load(refuse_warnings)
    assert loaded is not None
    assert loaded.state["step"] == 2


def test_remains_of_a_killed_process_are_swept(tmp_path: Path, accelerator: Accelerator) -> None:
    (tmp_path / ".step-00000007.tmp").mkdir()
    store = CheckpointStore(tmp_path, keep=1)
    save(store, accelerator, 8)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000008"]


def test_a_checkpoint_that_was_moved_aside_for_its_replacement_is_put_back(
    tmp_path: Path, accelerator: Accelerator
) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    save(store, accelerator, 3).rename(tmp_path / ".step-00000003.node7-4242.old")
    store.sweep()
    loaded = store.load(refuse_warnings)
    assert loaded is not None
    assert loaded.state["step"] == 3
    shutil.copytree(loaded.path, tmp_path / ".step-00000003.node7-4242.old")
    store.sweep()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000003"]


def test_weights_of_another_model_are_refused(tmp_path: Path, accelerator: Accelerator) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    save(store, accelerator, 1)
    loaded = store.load(refuse_warnings)
    assert loaded is not None
    with pytest.raises(MismatchError, match=r"'weight' has shape \[3\], expected \[4\]"):
        loaded.tensors("task", {"weight": (4,)})


def draws() -> list[float]:
    drawn = [torch.rand(()).item(), torch.randn(()).item(), np.random.rand(), np.random.randn()]
    return [*drawn, random.random(), random.gauss(0, 1)]


def test_random_states_come_back(tmp_path: Path, accelerator: Accelerator) -> None:
    draws()  # leaves half of a pair of normal numbers in NumPy and in Python
    store = CheckpointStore(tmp_path, keep=1)
    save(store, accelerator, 1)
    expected = draws()
    loaded = store.load(refuse_warnings)
    assert loaded is not None
    set_random_state(loaded.tensors("random-0"))
    assert draws() == expected
    set_random_state(random_state())


def test_preserved_random_state() -> None:
    seed_random_state(4)
    expected = draws()
    seed_random_state(4)
    with preserved_random_state():
        assert draws() == expected
        seed_random_state(4, rank=1)
        assert draws() != expected
    assert draws() == expected


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop])
def test_optimisers_go_on_where_they_were(kind: type[torch.optim.Optimizer]) -> None:
    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    model = nn.Linear(3, 2)
    optimizer = kind(model.parameters(), lr=0.1)  # type: ignore[call-arg]
    assert optimizer_tensors(optimizer) == {}
    step(model, optimizer)
    twin = nn.Linear(3, 2)
    twin.load_state_dict(model.state_dict())
    other = kind(twin.parameters(), lr=0.1)  # type: ignore[call-arg]
    load_optimizer_tensors(other, {name: value.clone() for name, value in optimizer_tensors(optimizer).items()})
    for _ in range(2):
        step(model, optimizer)
        step(twin, other)
    assert torch.equal(model.weight, twin.weight)


def test_a_removal_that_is_cut_short_leaves_no_half_checkpoint(
    tmp_path: Path, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    first = save(store, accelerator, 1)

    def killed(path: Path, **_: Any) -> None:
        if (path / "state.json").exists():
            (path / "state.json").unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            save(store, accelerator, 2)
    assert not first.exists()
    assert [path.name for path in store.paths()] == ["step-00000002"]
    store.sweep()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000002"]


def test_going_on_removes_what_the_last_training_had_no_time_to(tmp_path: Path, accelerator: Accelerator) -> None:
    for step in (1, 2, 3):
        save(CheckpointStore(tmp_path, keep=3), accelerator, step)
    store = CheckpointStore(tmp_path, keep=1)
    checkpoint = store.load(refuse_warnings)
    assert checkpoint is not None
    store.discard_after(checkpoint)
    assert [path.name for path in store.paths()] == ["step-00000003"]
