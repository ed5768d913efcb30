"""Faults of one process of two: both end alike, nobody waits, and what was saved before is untouched."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, debug_launcher
from accelerate.utils import gather_object
from einops import rearrange
from torch import Tensor, nn

from vqgen import checkpoint
from vqgen.agreement import Processes
from vqgen.config import TrainingSettings
from vqgen.console import Console
from vqgen.errors import InputError, VqgenError
from vqgen.locks import locked
from vqgen.quantizer import VectorQuantizer
from vqgen.training import Task, fit, make_accelerator

ROOT = Path(__file__).parents[2]


class Numbers(torch.utils.data.Dataset[Any]):
    def __init__(self) -> None:
        self.values = torch.randn(48, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.values)

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        return {"x": self.values[indices]}


class Regression(Task):
    """A regression with dropout, whose memory holds so many numbers."""

    def __init__(self, room: int = 100) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.2), nn.Linear(8, 3)).double()
        self.room = room

    def forward(self, batch: dict[str, Tensor], player: str, progress: float, step: int) -> dict[str, Tensor]:
        if len(batch["x"]) > self.room:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return {"loss": ((self.model(batch["x"]) - batch["x"].flip(-1)) ** 2).mean()}

    def evaluate(self, batches: Iterable[dict[str, Tensor]], reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        losses = [((self.model(batch["x"]) - batch["x"].flip(-1)) ** 2).sum() for batch in batches]
        return {"loss": reduce(torch.stack(losses).sum()).item()}


def train(task: Task, folder: Path, resume: bool = False, **changes: Any) -> None:
    settings = TrainingSettings(**{"steps": 8, "batch_size": 6, "checkpoint_every": 2, **changes})
    accelerator = make_accelerator(settings, cpu=True)
    fit(
        task,
        Numbers(),
        Numbers(),
        settings,
        folder,
        seed=3,
        identity={},
        accelerator=accelerator,
        console=Console(),
        resume=resume,
    )


def outcome(work: Callable[[], None]) -> list[str]:
    """What each of the two processes says: its error, and whether it is another's; gathered on both."""
    try:
        work()
        said = "done"
    except VqgenError as error:
        said = f"{type(error).__name__}: {error}{' (elsewhere)' if error.said_elsewhere else ''}"
    return gather_object([said])  # type: ignore[no-any-return]


def _write(path: Path, found: list[str]) -> None:
    if os.environ["RANK"] == "0":
        path.write_text(json.dumps(found))


def _one_fails(path: Path) -> None:
    accelerator = Accelerator(cpu=True)

    def work(failing: int) -> None:
        with Processes.of(accelerator).together():
            if accelerator.process_index == failing:
                raise InputError("Bad.", "Mend it.")

    _write(path, [*outcome(lambda: work(0)), *outcome(lambda: work(1)), *outcome(lambda: work(2))])


def test_what_fails_on_one_process_fails_on_both(tmp_path: Path) -> None:
    debug_launcher(_one_fails, (tmp_path / "said",), num_processes=2)
    own, other = "InputError: Bad. Mend it.", "InputError: Bad. Mend it. (elsewhere)"
    assert json.loads((tmp_path / "said").read_text()) == [own, other, other, own, "done", "done"]


def _disk_full_and_resumed(folder: Path) -> None:
    train(Regression(), folder / "whole")
    real = checkpoint.save_file

    def full(tensors: dict[str, Tensor], path: Path) -> None:
        if "step-00000006" in str(path) and path.name == "task.safetensors":  # written by the first process alone
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path)

    checkpoint.save_file = full  # this process ends with the test
    said = outcome(lambda: train(Regression(), folder / "broken"))
    checkpoint.save_file = real
    train(Regression(), folder / "broken", resume=True)
    _write(folder / "said", said)


def test_a_full_disk_ends_both_processes_and_resumed_they_end_in_the_same_bits(tmp_path: Path) -> None:
    debug_launcher(_disk_full_and_resumed, (tmp_path,), num_processes=2)
    first, second = json.loads((tmp_path / "said").read_text())
    assert first.startswith("InputError: The disk is full: ")
    assert second == f"{first} (elsewhere)"
    names = ("task", "best", "optimizer-model", "random-0", "random-1")
    for name in names:
        one, other = (tmp_path / run / f"checkpoints/step-00000008/{name}.safetensors" for run in ("whole", "broken"))
        assert one.read_bytes() == other.read_bytes(), name


def _views(folder: Path) -> None:
    """The second process sees a run folder as it was a while ago."""
    main = Accelerator(cpu=True).is_main_process
    own = folder / ("new" if main else "old")
    train(Regression(), folder / "new")
    if main:
        train_on = folder / "new/checkpoints"
        (train_on / "latest").write_text("step-00000006\n")
        shutil.copytree(folder / "new", folder / "old")
        (folder / "old/checkpoints/latest").write_text("step-00000008\n")
    gather_object([0])
    train(Regression(), own, resume=True)
    again = state_of(folder / "new")["step"]
    if not main:
        shutil.rmtree(folder / "old/checkpoints")
    said = outcome(lambda: train(Regression(), own, resume=True))
    said += outcome(lambda: train(Regression(), own, resume=True, learning_rate=1e-3 if main else 2e-3))
    _write(folder / "said", [str(again), *said])


def state_of(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "checkpoints/step-00000008/state.json").read_text())
    return found["state"]  # type: ignore[no-any-return]


def test_the_first_process_says_where_a_training_goes_on(tmp_path: Path) -> None:
    debug_launcher(_views, (tmp_path,), num_processes=2)
    step, first, second, third, fourth = json.loads((tmp_path / "said").read_text())
    assert step == "8"
    missing = f"InputError: {tmp_path}/old/checkpoints/step-00000008/state.json is missing or damaged."
    assert (first, second) == (f"{missing} (elsewhere)", missing)
    differing = "InputError: Process 1 of 2 reads other files than the first one: training."
    assert third.startswith(differing)
    assert fourth.startswith(differing)


class Asked(Regression):
    """A training that the system asks to stop after its fourth step, on the second process alone."""

    def after_step(self, player: str, step: int) -> dict[str, Tensor]:
        if step == 3 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return {}


def _clocks_and_requests(folder: Path) -> None:
    os.environ["RANK"] = str(Accelerator(cpu=True).process_index)
    real, pace = time.perf_counter, (1.0, 7.0)[int(os.environ["RANK"])]
    time.perf_counter = lambda: pace * real()
    task = Regression()
    train(task, folder / "minutes", steps=None, minutes=0.003, warmup=0.5, evaluate_every=1000, checkpoint_every=1000)
    weights = gather_object([[value.tolist() for value in task.state_dict().values()]])
    said = outcome(lambda: train(Asked(), folder / "asked", checkpoint_every=8))
    _write(folder / "said", [str(weights[0] == weights[1]), *said])


def test_processes_whose_clocks_differ_end_together_and_a_request_to_one_stops_both(tmp_path: Path) -> None:
    debug_launcher(_clocks_and_requests, (tmp_path,), num_processes=2)
    same, first, second = json.loads((tmp_path / "said").read_text())
    assert same == "True"
    assert first == second
    assert first.startswith("Interrupted: Training stopped at step 4; its state is saved.")


def _held(folder: Path) -> None:
    _write(folder / "said", outcome(lambda: train(Regression(), folder)))


def test_a_lock_held_by_another_command_stops_both(tmp_path: Path) -> None:
    with locked(tmp_path / "checkpoints/.lock"):
        debug_launcher(_held, (tmp_path,), num_processes=2)
        first, second = json.loads((tmp_path / "said").read_text())
    assert f"process {os.getpid()}" in first
    assert second == f"{first} (elsewhere)"


class Quantized(Regression):
    """The same with a codebook, which all processes make together from the first data, after memory may run out."""

    def __init__(self, room: int) -> None:
        super().__init__(room)
        self.quantizer = VectorQuantizer(4, 3).double()

    def forward(self, batch: dict[str, Tensor], player: str, progress: float, step: int) -> dict[str, Tensor]:
        loss = super().forward(batch, player, progress, step)["loss"]
        features = nn.functional.linear(batch["x"], self.model[0].weight[:3])
        return {"loss": loss + self.quantizer(rearrange(features, "b d -> b d 1 1")).loss}

    def after_step(self, player: str, step: int) -> dict[str, Tensor]:
        return self.quantizer.update(step)


def _uneven_memory(folder: Path) -> None:
    room = 6 if Accelerator(cpu=True).is_main_process else 2
    train(Quantized(room), folder, auto_batch=True)


def test_processes_take_the_parts_that_fit_into_the_smaller_memory(tmp_path: Path) -> None:
    debug_launcher(_uneven_memory, (tmp_path,), num_processes=2)
    state = json.loads((tmp_path / "checkpoints/step-00000008/state.json").read_text())["state"]
    assert state["parts"] == 4


DYING = """
import importlib.util, os, pathlib, signal, sys
spec = importlib.util.spec_from_file_location("agreement", {file!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)

class Dying(module.Regression):
    def after_step(self, player, step):
        if step == 5 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return {{}}

try:
    module.train(Dying(), pathlib.Path({folder!r}))
except module.VqgenError as error:
    pathlib.Path({folder!r}, "said").write_text(str(error))
    sys.exit(2)
"""


@pytest.mark.slow
def test_the_loss_of_a_process_is_one_line_on_the_other(tmp_path: Path) -> None:
    script = tmp_path / "dying.py"
    script.write_text(DYING.format(file=__file__, folder=str(tmp_path)))
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode
    assert (tmp_path / "checkpoints/latest").read_text().strip() == "step-00000004"
    if (tmp_path / "said").exists():  # else the launcher was faster to end it
        assert "Another process of this command has ended" in (tmp_path / "said").read_text()
