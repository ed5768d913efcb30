"""``--compile`` and mixed precision through the commands, for the codec, its adversary and every prior."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from pipelines import cli
from pipelines.codec_task import CodecTask, DiscriminatedCodecTask
from pipelines.settings import new_run_settings
from priors import registry
from priors.base import PriorSpec
from vqgen import compiling
from vqgen.codec import HierarchicalVQVAE
from vqgen.codes import ImageSpec, LevelSpec
from vqgen.compiling import compiled
from vqgen.config import CodecConfig, DiscriminatorSettings
from vqgen.errors import ConfigError

ARCHITECTURE = CodecConfig(
    strides=(8, 4, 2), codebook_size=16, code_dim=4, width=8, residual_blocks=1, residual_width=4, level_dropout=0.3
)
SMALL: dict[str, dict[str, Any]] = {
    "pixelcnn": {"width": 16, "blocks": 2},
    "pixelsnail": {"width": 16, "blocks": 1, "layers": 1, "heads": 2, "residual_width": 8},
    "transformer": {"dim": 32, "depth": 1, "heads": 2},
    "roundtrip": {},
}


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A backend that computes as PyTorch does, and the sizes of the graphs that it was handed."""
    sizes: list[int] = []

    def note(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        sizes.append(len(graph.graph.nodes))
        return graph.forward

    monkeypatch.setattr(compiling, "BACKEND", note)
    torch._dynamo.reset()
    yield sizes
    torch._dynamo.reset()


def gradients(loss: Tensor, module: torch.nn.Module) -> list[Tensor]:
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [value for value in found if value is not None]


def codec_task(adversary: bool) -> CodecTask:
    torch.manual_seed(0)
    codec = HierarchicalVQVAE(ARCHITECTURE, ImageSpec(3, 18, 16))
    images = torch.randint(0, 256, (4, 3, 18, 16), dtype=torch.uint8)
    if adversary:
        return DiscriminatedCodecTask(codec, images, DiscriminatorSettings(width=4, start=0.0))
    return CodecTask(codec, images)


@pytest.mark.parametrize("adversary", [False, True])
def test_a_compiled_codec_has_the_loss_and_gradients_of_the_plain_one(graphs: list[int], adversary: bool) -> None:
    batch = {"images": torch.randint(0, 256, (4, 3, 18, 16), dtype=torch.uint8)}
    results = []
    for parts in (False, True):
        task = codec_task(adversary).train()
        with compiled(task.compilable() if parts else (), pytest.fail):
            torch.manual_seed(1)
            loss = task(batch, "model", 0.5, 0)["loss"]
            results.append([loss.detach(), *gradients(loss, task.model)])
            task.after_step("model", 0)
            results[-1] += [quantizer.codebook for quantizer in task.model.quantizers]  # type: ignore[misc]
    assert len(graphs) == (3 if adversary else 4)  # no pass is broken in two
    for plain, other in zip(*results, strict=True):
        torch.testing.assert_close(plain, other)


@pytest.mark.parametrize("name", ["pixelcnn", "pixelsnail", "transformer"])
def test_a_compiled_prior_has_the_loss_and_gradients_of_the_plain_one(graphs: list[int], name: str) -> None:
    prior, given = prior_and_batch(name)
    prior.eval()  # so that nothing is dropped; below only the prior itself is in training mode
    expected = prior(*given)["loss"]
    wanted = gradients(expected, prior)
    prior.training = True
    with compiled(prior.compilable(), pytest.fail):
        found = prior(*given)["loss"]
        torch.testing.assert_close(found, expected)
        for plain, other in zip(wanted, gradients(found, prior), strict=True):
            torch.testing.assert_close(plain, other)
    assert max(graphs) > 20


def prior_and_batch(name: str) -> tuple[Any, tuple[Any, ...]]:
    torch.manual_seed(0)
    top, bottom = LevelSpec("top", 2, 2, 7, 4), LevelSpec("bottom", 4, 4, 9, 4)
    prior = registry.get(name)(SMALL[name], PriorSpec(bottom, (top,), 3))
    prior.set_codebooks(torch.randn(9, 4), (torch.randn(7, 4),))
    codes, context = torch.randint(9, (6, 4, 4)), (torch.randint(7, (6, 2, 2)),)
    label = torch.randint(3, (6,))
    prior.prepare(iter([(codes, context, label)]))
    return prior, (codes, context, label)


@pytest.mark.parametrize("name", sorted(SMALL))
def test_the_losses_of_priors_are_float32_under_bf16_and_near_those_of_float32(name: str) -> None:
    prior, given = prior_and_batch(name)
    prior.train()
    for player in prior.players:
        losses = []
        for enabled in (False, True):
            torch.manual_seed(3)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                result = prior(*given, player=player, progress=0.9, step=0)
            assert result["loss"].dtype == torch.float32
            module = prior.player_modules()[player]
            assert all(bool(value.isfinite().all()) for value in gradients(result["loss"], module))
            losses.append(result["loss"].item())
        assert losses[1] == pytest.approx(losses[0], rel=0.2, abs=0.1)


def test_the_option_reaches_every_training_and_no_file_knows_of_it(
    tmp_path: Path, tiny_config: Path, graphs: list[int]
) -> None:
    run = tmp_path / "run"
    assert cli.call(["train-codes", "--config", str(tiny_config), "--run", str(run), "--compile"]) == 0
    assert graphs
    assert yaml.safe_load((run / "config.yaml").read_text())["codec"]["training"]["compile"] is True
    assert not any("_orig_mod" in name for name in load_file(run / "codec/model.safetensors"))
    HierarchicalVQVAE.from_pretrained(run / "codec")
    graphs.clear()
    only = ["--prior", "pixelcnn", "--level", "top", "--run", str(run)]
    assert cli.call(["train-prior", *only, "--compile"]) == 0
    assert graphs
    graphs.clear()
    assert cli.call(["train-prior", *only, "--overwrite", "--compile", "--set", "training.compile=false"]) == 0
    assert not graphs


def test_without_a_compiler_it_says_so_and_trains(
    tmp_path: Path, tiny_config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(compiling, "BACKEND", refuse)
    weights = []
    for name, options in (("plain", []), ("compiled", ["--compile"])):
        run = tmp_path / name
        torch._dynamo.reset()
        assert cli.call(["train-codes", "--config", str(tiny_config), "--run", str(run), *options]) == 0
        weights.append(load_file(run / "codec/model.safetensors"))
    assert capsys.readouterr().err.count("torch.compile does not work here") == 1
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


def test_fp16_without_a_gpu_is_refused_and_nothing_is_made(
    tmp_path: Path, tiny_config: Path, fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    run = tmp_path / "run"
    said = fails(
        *("train-codes", "--config", str(tiny_config), "--run", str(run), "--set", "training.mixed_precision=fp16")
    )
    assert "mixed_precision=fp16 does not work here" in said
    assert "bf16" in said
    assert not run.exists()


def test_a_bare_no_is_the_word() -> None:
    config = new_run_settings("shapes", None, ["codec.training.mixed_precision=no"])
    assert config.codec.training.mixed_precision == "no"
    with pytest.raises(ConfigError, match="'no', 'bf16' or 'fp16', got True"):
        new_run_settings("shapes", None, ["codec.training.mixed_precision=yes"])


def test_bf16_goes_through_both_stages(tmp_path: Path, tiny_config: Path) -> None:
    run = tmp_path / "run"
    common = ["--run", str(run), "--set", "training.mixed_precision=bf16"]
    assert cli.call(["train-codes", "--config", str(tiny_config), *common]) == 0
    assert cli.call(["train-prior", "--prior", "transformer", *common]) == 0
    kinds = {value.dtype for path in run.rglob("model.safetensors") for value in load_file(path).values()}
    assert kinds <= {torch.float32, torch.bool, torch.int64}
    record = json.loads((run / "run.json").read_text())["stages"]
    assert record["codec"]["validation"]["loss"] > 0
