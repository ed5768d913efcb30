"""Compiled methods: the same numbers and names as without, in training alone, and a notice where it cannot be done."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import debug_launcher
from safetensors.torch import load_file
from torch import Tensor, nn

from vqgen import compiling
from vqgen.compiling import Part, compiled
from vqgen.config import TrainingSettings
from vqgen.console import Console
from vqgen.errors import InputError
from vqgen.training import FitResult, Task, fit, make_accelerator


class Net(nn.Module):
    """A method to compile that refuses what it cannot read."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.refine(x)

    def refine(self, x: Tensor) -> Tensor:
        if x.shape[-1] != 3:
            raise InputError("Expected three numbers.")
        refined: Tensor = self.layers(x)
        return refined


class Vectors(torch.utils.data.Dataset[Any]):
    def __init__(self) -> None:
        self.values = torch.randn(24, 3, generator=torch.Generator().manual_seed(5))

    def __len__(self) -> int:
        return len(self.values)

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        return {"x": self.values[indices]}


class Copying(Task):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.model: Net = Net()

    def compilable(self) -> Sequence[Part]:
        return [Part(self.model, "refine")]

    def forward(self, batch: dict[str, Tensor], player: str, progress: float, step: int) -> dict[str, Tensor]:
        return {"loss": (self.model(batch["x"]) - batch["x"]).square().mean()}

    def evaluate(self, batches: Iterable[dict[str, Tensor]], reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        sums = torch.zeros(2, dtype=torch.float64)
        for batch in batches:
            sums += torch.stack([(self.model(batch["x"]) - batch["x"]).square().sum(), torch.tensor(len(batch["x"]))])
        total, count = reduce(sums).tolist()
        return {"loss": total / count}


class Counting:
    """A backend that notes how often it was asked, and computes as PyTorch does."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.graphs += 1
        return graph.forward


@pytest.fixture(autouse=True)
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterable[Counting]:
    """In place of the real one, which writes and compiles C++ for half a minute."""
    counting = Counting()
    monkeypatch.setattr(compiling, "BACKEND", counting)
    torch._dynamo.reset()
    yield counting
    torch._dynamo.reset()


def train(
    task: Task, folder: Path, console: Console | None = None, *, resume: bool = False, **changes: Any
) -> FitResult:
    chosen = TrainingSettings(
        **{"steps": 9, "batch_size": 4, "learning_rate": 0.01, "weight_ema": 0.9, "compile": True, **changes}
    )
    accelerator = make_accelerator(chosen, len(task.players), cpu=True)
    given: dict[str, Any] = {"seed": 0, "identity": {}, "accelerator": accelerator, "resume": resume}
    return fit(task, Vectors(), Vectors(), chosen, folder, console=console or Console(silent=True), **given)


class Heard(Console):
    def __init__(self) -> None:
        super().__init__(silent=True)
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def refuse(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    raise RuntimeError("no compiler was found:\nlook for one")


def refuse_backward(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    from torch._dynamo.backends.common import aot_autograd

    return aot_autograd(fw_compiler=lambda made, _: made.forward, bw_compiler=refuse)(graph, inputs)  # type: ignore[no-any-return]


def test_it_is_compiled_in_training_alone_and_nothing_is_left(backend: Counting) -> None:
    net, x = Net(), torch.randn(5, 3)
    names = list(net.state_dict())
    net.eval()
    expected = net(x)
    with compiled([Part(net, "refine")], pytest.fail):
        assert torch.equal(net(x), expected)
        with torch.no_grad():
            net.train()(x)
        assert backend.graphs == 0
        net(x)
        assert backend.graphs == 1
        assert list(net.state_dict()) == names
        assert torch.equal(net.eval()(x), expected)
    assert vars(net).keys() == vars(Net()).keys()
    net.train()(torch.randn(7, 3))
    assert backend.graphs == 1


def test_a_first_call_leaves_the_graph_before_it_whole() -> None:
    net, x = Net().train(), torch.randn(5, 3, requires_grad=True)
    with compiled([Part(net, "refine")], pytest.fail):
        net.refine(x.tanh() @ net.layers[0].weight.T[:, :3]).sum().backward()
    assert x.grad is not None


def test_a_first_call_draws_no_more_than_it_does_without() -> None:
    net, x = Net().train(), torch.randn(5, 3)
    torch.manual_seed(3)
    expected = net(x), torch.rand(2)
    torch.manual_seed(3)
    with compiled([Part(net, "refine")], pytest.fail):
        found = net(x), torch.rand(2)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_trained_with_it_is_trained_without_it(tmp_path: Path, backend: Counting) -> None:
    one, other = Copying(), Copying()
    train(one, tmp_path / "one")
    assert backend.graphs > 0
    train(other, tmp_path / "other", compile=False)
    torch.testing.assert_close(one.model.state_dict(), other.model.state_dict(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("broken", [refuse, refuse_backward])
def test_a_backend_that_fails_is_said_once_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: Any
) -> None:
    monkeypatch.setattr(compiling, "BACKEND", broken)
    one, other, console = Copying(), Copying(), Heard()
    train(one, tmp_path / "one", console)
    train(other, tmp_path / "other", compile=False)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    (notice,) = console.warnings
    assert "no compiler was found" in notice
    assert "goes on without" in notice
    assert "\n" not in notice


def test_a_task_that_names_nothing_says_so(tmp_path: Path) -> None:
    class Plain(Copying):
        def compilable(self) -> Sequence[Part]:
            return ()

    console = Heard()
    train(Plain(), tmp_path, console)
    assert len(console.warnings) == 1
    assert "nothing in it that is compiled" in console.warnings[0]


def test_what_the_caller_did_wrong_is_said_as_without() -> None:
    net = Net().train()
    with compiled([Part(net, "refine")], pytest.fail), pytest.raises(InputError, match="three numbers"):
        net(torch.randn(5, 4))
    assert "refine" not in vars(net)


def test_any_number_of_shapes_and_of_trainings_is_compiled(backend: Counting) -> None:
    """torch alone gives up after 8 of a method, in all trainings of a process together."""
    for width in range(2):
        net = Net()
        net.layers = nn.Sequential(nn.Linear(3, 4 + width), nn.Linear(4 + width, 3))
        with compiled([Part(net, "refine")], pytest.fail):
            for batch in range(2, 11):
                net(torch.randn(batch, 3)).sum().backward()
        assert backend.graphs == 9 * (width + 1)


def test_compiling_is_no_training_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, waited = time.perf_counter, 0.0

    def slow(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        nonlocal waited
        waited += 10_000
        return graph.forward

    monkeypatch.setattr(compiling, "BACKEND", slow)
    monkeypatch.setattr(time, "perf_counter", lambda: real() + waited)
    result = train(Copying(), tmp_path / "run")
    assert waited
    assert 0 < result.seconds < 5_000


@pytest.mark.parametrize("goes_on", [True, False])
def test_a_resumed_training_is_the_unbroken_one_and_its_files_know_nothing_of_it(tmp_path: Path, goes_on: bool) -> None:
    whole, first, second = Copying(), Copying(), Copying()
    train(whole, tmp_path / "whole")
    train(first, tmp_path / "two", checkpoint_every=4, keep=9)
    for name in ("step-00000009", "step-00000008"):
        for path in sorted((tmp_path / "two/checkpoints" / name).iterdir()):
            path.unlink()
        (tmp_path / "two/checkpoints" / name).rmdir()
    (tmp_path / "two/checkpoints/latest").write_text("step-00000004\n")
    train(second, tmp_path / "two", resume=True, checkpoint_every=4, compile=goes_on)
    torch.testing.assert_close(whole.model.state_dict(), second.model.state_dict(), rtol=0, atol=0 if goes_on else 1e-6)
    task = load_file(tmp_path / "two/checkpoints/step-00000009/task.safetensors")
    assert set(task) == set(Copying().state_dict())
    state = json.loads((tmp_path / "two/checkpoints/step-00000009/state.json").read_text())["state"]
    assert "compile" not in state["identity"]["training"]


def _on_two(folder: Path) -> None:
    compiling.BACKEND = "aot_eager"
    for name in ("compiled", "plain"):
        console = Heard()
        train(Copying(), folder / name, console, batch_size=2, compile=name == "compiled")
        assert console.warnings == []


def test_two_processes_compile_each_for_itself(tmp_path: Path) -> None:
    debug_launcher(_on_two, (tmp_path,), num_processes=2)
    ends = [
        json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1]) for name in ("compiled", "plain")
    ]
    assert ends[0]["loss"] == pytest.approx(ends[1]["loss"], rel=1e-5)


@pytest.mark.slow
def test_the_real_backend_resumes_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "BACKEND", "inductor")
    console = Heard()
    whole, second = Copying(), Copying()
    train(whole, tmp_path / "whole", console)
    train(Copying(), tmp_path / "two", console, checkpoint_every=5, keep=9)
    newest = tmp_path / "two/checkpoints/step-00000009"
    for path in newest.iterdir():
        path.unlink()
    newest.rmdir()
    (tmp_path / "two/checkpoints/latest").write_text("step-00000005\n")
    torch._dynamo.reset()
    train(second, tmp_path / "two", console, resume=True, checkpoint_every=5)
    assert console.warnings == []
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))
