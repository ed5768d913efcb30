"""float32, bfloat16 and float16: what stays float32, and what a loss that is scaled too far does."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from vqgen.codec import HierarchicalVQVAE
from vqgen.codes import ImageSpec
from vqgen.config import CodecConfig, TrainingSettings
from vqgen.console import Console
from vqgen.discriminator import adaptive_weight
from vqgen.quantizer import VectorQuantizer
from vqgen.training import FitResult, Task, fit, make_accelerator

ARCHITECTURE = CodecConfig(
    strides=(8, 4), codebook_size=16, code_dim=4, width=16, residual_blocks=1, residual_width=8, level_dropout=0.1
)


class Pictures(torch.utils.data.Dataset[Any]):
    """48 smooth coloured pictures in [-1, 1]."""

    def __init__(self) -> None:
        small = torch.rand(48, 3, 4, 4, generator=torch.Generator().manual_seed(2))
        self.images = 2 * nn.functional.interpolate(small, 16, mode="bilinear") - 1

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        return {"images": self.images[indices]}


class Coding(Task):
    """A codec, and the dtypes that its parts saw."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.model: HierarchicalVQVAE = HierarchicalVQVAE(ARCHITECTURE, ImageSpec(3, 16, 16))
        self.seen: dict[str, set[torch.dtype]] = {"in training": set(), "in evaluation": set(), "losses": set()}

    def forward(self, batch: dict[str, Tensor], player: str, progress: float, step: int) -> dict[str, Tensor]:
        result = self.model(batch["images"])
        self.seen["in training"].add(result.images.dtype)
        self.seen["losses"] |= {value.dtype for value in (result.loss, *result.metrics.values())}
        return {"loss": result.loss, **result.metrics}

    def after_step(self, player: str, step: int) -> dict[str, Tensor]:
        return self.model.update(step)

    def evaluate(self, batches: Iterable[dict[str, Tensor]], reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        results = [self.model(batch["images"]) for batch in batches]
        self.seen["in evaluation"] |= {result.images.dtype for result in results}
        return {"loss": sum(float(result.loss) for result in results) / len(results)}


def train(task: Task, folder: Path, **changes: Any) -> FitResult:
    precision, given = changes.pop("precision", "no"), changes.pop("accelerator", None)
    chosen = TrainingSettings(
        **{"steps": 12, "batch_size": 16, "learning_rate": 2e-3, "weight_ema": 0.9, "evaluate_every": 6, **changes},
        mixed_precision=precision,
    )
    accelerator = given or make_accelerator(chosen, len(task.players), cpu=True)
    console = Console(silent=True)
    return fit(
        task, Pictures(), Pictures(), chosen, folder, seed=1, identity={}, accelerator=accelerator, console=console
    )


def test_bf16_is_the_networks_alone(tmp_path: Path) -> None:
    task = Coding()
    result = train(task, tmp_path, precision="bf16")
    assert task.seen["in training"] == {torch.bfloat16}
    assert task.seen["in evaluation"] == task.seen["losses"] == {torch.float32}
    (newest,) = (tmp_path / "checkpoints").glob("step-00000012")
    parts = {path.stem: load_file(path) for path in newest.glob("*.safetensors")}
    assert {"task", "best", "average", "optimizer-model"} <= set(parts)
    dtypes = {value.dtype for part in parts if "random" not in part for value in parts[part].values()}
    assert dtypes <= {torch.float32, torch.bool}
    # The figure kept is that of the exported weights in float32, whoever computes it.
    with torch.no_grad():
        loss = sum(float(task.model(batch).loss) for batch in Pictures().images.split(16)) / 3
    assert result.best["loss"] == pytest.approx(loss, rel=1e-6)


@pytest.mark.slow
def test_bf16_learns_what_float32_learns(tmp_path: Path) -> None:
    losses = []
    for precision in ("no", "bf16"):
        task = Coding()
        result = train(task, tmp_path / precision, precision=precision, steps=120, learning_rate=5e-3)
        losses.append(result.best["loss"])
    untrained = Coding().eval().model(Pictures().images).loss.item()
    assert losses[0] < 0.6 * untrained
    assert losses[1] == pytest.approx(losses[0], rel=0.25)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["ema", "gradient"])
def test_the_quantizer_is_an_island_of_float32(dtype: torch.dtype, kind: Any) -> None:
    """Some steps under autocast: codebook, counts, codes, losses and gradients of the same vectors in float32."""
    narrow, wide = (VectorQuantizer(32, 4, codebook=kind, revival=0.3) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    for step in range(4):
        z = torch.randn(6, 4, 5, 5, generator=generator).to(dtype)
        given, same = z.clone().requires_grad_(), z.float().requires_grad_()
        with torch.autocast("cpu", dtype=dtype):
            out = narrow(given)
        expected = wide(same)
        assert out.z.dtype == dtype
        assert torch.equal(out.codes, expected.codes)
        assert torch.equal(out.loss, expected.loss)
        assert torch.equal(out.z, expected.z.to(dtype))
        out.loss.backward()
        expected.loss.backward()
        assert given.grad is not None
        assert same.grad is not None
        assert torch.equal(given.grad, same.grad.to(dtype))
        with torch.autocast("cpu", dtype=dtype):
            narrow.update(step)
        wide.update(step)
    for name, value in narrow.state_dict().items():
        assert value.dtype in (torch.float32, torch.bool)
        assert torch.equal(value, wide.state_dict()[name]), name


def test_a_step_whose_scaled_gradients_overflow_is_left_out_and_the_next_is_not(tmp_path: Path) -> None:
    class Line(Task):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Linear(1, 1, bias=False)
            nn.init.constant_(self.model.weight, 1.0)
            self.weights: list[float] = []

        def forward(self, batch: dict[str, Tensor], player: str, progress: float, step: int) -> dict[str, Tensor]:
            self.weights.append(self.model.weight.item())
            # A gradient of 1, through float16, whose largest number is 65,504.
            return {"loss": self.model.weight.half().float().sum()}

        def evaluate(self, batches: Iterable[Any], reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
            return {"loss": self.model.weight.item()}

    task = Line()
    accelerator = make_accelerator(TrainingSettings(steps=1), cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**18)
    train(task, tmp_path, steps=5, learning_rate=0.1, clip=1.0, weight_ema=None, accelerator=accelerator)
    # 2**18, 2**17 and 2**16 are too much; from 2**15 on each step is one of Adam's.
    assert task.weights[:4] == [1.0] * 4
    assert task.weights[4] == pytest.approx(0.9, abs=1e-3)
    assert accelerator.scaler.get_scale() == 2.0**15


def test_the_adversarys_weight_survives_float16() -> None:
    """Over a million numbers, the gradient at each is below what float16 can hold unless it is scaled."""
    torch.manual_seed(0)
    last = torch.ones(3, 1, 1, requires_grad=True)
    inputs, images = torch.rand(2, 3, 400, 400), torch.randn(2, 3, 400, 400)
    weights = []
    for dtype in (torch.float32, torch.float16):
        made = (inputs * last).to(dtype).float()
        reconstruction = (0.05 * (made - images)).square().mean()
        adversarial = (0.3 * made).tanh().mean()
        weights.append(float(adaptive_weight(reconstruction, adversarial, last)))
    assert weights[0] > 0.01
    assert weights[1] == pytest.approx(weights[0], rel=0.02)
