"""Batches in parts: the same gradients, and as few parts as fit into memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from vqgen.config import TrainingSettings
from vqgen.console import Console
from vqgen.errors import InputError
from vqgen.micro_batches import batch_length, fitting_parts, parts_of
from vqgen.training import FitResult, Task, fit

BATCH = 12
CPU_MESSAGE = (
    "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"
)


def test_parts_are_the_whole_in_order() -> None:
    batch = {"codes": (torch.arange(7), torch.arange(14).reshape(7, 2)), "label": torch.arange(7)}
    assert batch_length(batch) == 7
    for count in (1, 2, 3, 7, 9):
        parts = parts_of(batch, count)
        sizes = [batch_length(part) for part in parts]
        assert len(parts) == min(count, 7)
        assert max(sizes) - min(sizes) <= 1
        assert torch.equal(torch.cat([part["codes"][1] for part in parts]), batch["codes"][1])
        assert torch.equal(torch.cat([part["label"] for part in parts]), batch["label"])


class Numbers(torch.utils.data.Dataset[Any]):
    def __init__(self) -> None:
        self.values = torch.randn(40, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.values)

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        return {"x": self.values[indices]}


class Hungry(Task):
    """A regression that cannot take in more than ``room`` numbers at once, as its memory would say it."""

    def __init__(self, room: int, error: Callable[[], Exception] = lambda: RuntimeError(CPU_MESSAGE)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Linear(3, 3).double()
        self.model.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.room, self.error = room, error
        self.sizes: list[int] = []

    def forward(self, batch: dict[str, Tensor], player: str, progress: float, step: int) -> dict[str, Tensor]:
        self.sizes.append(len(batch["x"]))
        if len(batch["x"]) > self.room:
            raise self.error()
        self.model.get_buffer("seen").add_(len(batch["x"]))
        return {"loss": ((self.model(batch["x"]) - batch["x"].flip(-1)) ** 2).mean(), "size": batch["x"].mean()}

    def evaluate(self, batches: Iterable[dict[str, Tensor]], reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        losses = [((self.model(batch["x"]) - batch["x"].flip(-1)) ** 2).sum() for batch in batches]
        return {"loss": reduce(torch.stack(losses).sum()).item() / 120}


def train(task: Task, folder: Path, resume: bool = False, **changes: Any) -> FitResult:
    given = {"steps": 9, "batch_size": BATCH, "learning_rate": 0.05, "evaluate_every": 4, "log_every": 2}
    return fit(
        task,
        Numbers(),
        Numbers(),
        TrainingSettings(**{**given, "checkpoint_every": 4, **changes}),
        folder,
        seed=3,
        identity={},
        accelerator=Accelerator(cpu=True),
        console=Console(),
        resume=resume,
        resume_hint="Go on with: vqgen x --resume",
    )


def errors() -> list[Callable[[], Exception]]:
    return [lambda: RuntimeError(CPU_MESSAGE), lambda: torch.OutOfMemoryError("CUDA out of memory."), MemoryError]


@pytest.mark.parametrize("kind", range(3))
@pytest.mark.parametrize(("room", "parts"), [(12, 1), (11, 2), (6, 2), (5, 4), (1, 12)])
def test_as_few_parts_as_fit_and_the_same_training(
    room: int, parts: int, kind: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, hungry = Hungry(BATCH), Hungry(room, errors()[kind])
    train(whole, tmp_path / "whole")
    train(hungry, tmp_path / "parts", auto_batch=True)
    torch.testing.assert_close(dict(hungry.model.named_parameters()), dict(whole.model.named_parameters()))
    assert hungry.model.get_buffer("seen") == whole.model.get_buffer("seen") == 9 * BATCH
    state = json.loads((tmp_path / "parts/checkpoints/step-00000009/state.json").read_text())["state"]
    assert state["parts"] == parts
    said = capsys.readouterr().err
    assert ("does not fit into memory" in said) == (parts > 1)
    if parts == 4:
        assert "it goes through the model in 4 parts of 3. A step still takes in 12 images" in said
    for one, other in zip(*(_lines(tmp_path / name) for name in ("whole", "parts")), strict=True):
        assert one == pytest.approx(other, nan_ok=True)


def _lines(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("seconds", "split")} for line in lines]


def test_a_whole_batch_that_fits_is_trained_bit_for_bit_as_without(tmp_path: Path) -> None:
    plain, asked = Hungry(BATCH), Hungry(BATCH)
    train(plain, tmp_path / "plain")
    train(asked, tmp_path / "asked", auto_batch=True)
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, asked.model.state_dict()[name])


def test_the_number_of_parts_outlives_a_resume_whether_asked_again_or_not(tmp_path: Path) -> None:
    class Stopping(Hungry):
        def after_step(self, player: str, step: int) -> dict[str, Tensor]:
            if step == 6:
                raise KeyboardInterrupt
            return {}

    train(Hungry(5), tmp_path / "whole", auto_batch=True)
    for name, again in (("asked", True), ("silent", False)):
        with pytest.raises(KeyboardInterrupt):
            train(Stopping(5), tmp_path / name, auto_batch=True)
        task = Hungry(100)  # by now there is room for all
        train(task, tmp_path / name, resume=True, auto_batch=again)
        assert set(task.sizes[-3:]) == {3}
        state = [tmp_path / run / "checkpoints/step-00000009/task.safetensors" for run in ("whole", name)]
        assert state[0].read_bytes() == state[1].read_bytes()


@pytest.mark.parametrize("kind", range(3))
def test_without_it_the_message_says_what_to_lower(kind: int, tmp_path: Path) -> None:
    with pytest.raises(InputError) as stopped:
        train(Hungry(5, errors()[kind]), tmp_path)
    assert stopped.value.message.startswith("There is not enough memory for batches of 12 images (")
    assert stopped.value.hint == (
        "Add --auto-batch, which finds a batch that fits, lower training.batch_size (now 12) or make the model "
        "smaller. Go on with: vqgen x --resume"
    )


def test_where_not_even_one_image_fits(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not enough memory for a single image"):
        train(Hungry(0), tmp_path, auto_batch=True)


def test_several_players_are_told_that_it_does_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Two(Hungry):
        players = ("model", "other")

        def __init__(self) -> None:
            super().__init__(BATCH)
            self.other = nn.Linear(3, 1).double()

        def player_modules(self) -> dict[str, nn.Module]:
            return {"model": self.model, "other": self.other}

        def forward(self, batch: dict[str, Tensor], player: str, progress: float, step: int) -> dict[str, Tensor]:
            if player == "other":
                return {"loss": self.other(batch["x"]).square().mean()}
            return super().forward(batch, player, progress, step)

    train(Two(), tmp_path, auto_batch=True)
    assert "model and other take turns on the same batch, which cannot go in parts" in capsys.readouterr().err


def test_other_errors_are_not_taken_for_lack_of_memory(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="a bug"):
        train(Hungry(0, lambda: RuntimeError("a bug")), tmp_path, auto_batch=True)


def test_the_task_is_afterwards_as_it_was() -> None:
    task = Hungry(5)
    before = {name: value.clone() for name, value in task.state_dict().items()}

    def loss(part: dict[str, Tensor]) -> Tensor:
        return task(part, "model", 0.0, 0)["loss"]  # type: ignore[no-any-return]

    batch = Numbers().__getitems__(list(range(BATCH)))
    assert fitting_parts(task, loss, batch, Accelerator(cpu=True), nullcontext) == 4
    assert all(torch.equal(value, before[name]) for name, value in task.state_dict().items())
    assert all(parameter.grad is None for parameter in task.parameters())
