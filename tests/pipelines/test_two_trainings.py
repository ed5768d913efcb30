"""A training of two processes is that of one with the joint batch: in float64 the weights, in float32 the losses."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import debug_launcher
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipelines import cli
from pipelines.codec_task import CodecTask, DiscriminatedCodecTask
from pipelines.settings import new_run_settings
from pipelines.train_prior import PriorTask
from priors.base import PriorSpec
from priors.pixelcnn import PixelCNN
from vqgen.codec import HierarchicalVQVAE
from vqgen.codes import ImageSpec, LevelSpec
from vqgen.config import CodecConfig, DiscriminatorSettings, TrainingSettings
from vqgen.console import Console
from vqgen.files import read_json
from vqgen.training import Task, fit, make_accelerator
from vqgen.training_log import read_metrics

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of forking, from Python 3.12 on

STEPS = 20
BATCH = 8
SPEC = ImageSpec(3, 16, 16)
TOP = LevelSpec("top", 2, 2, 9, 4)
BOTTOM = LevelSpec("bottom", 4, 4, 11, 4)


class Pictures(torch.utils.data.Dataset[Any]):
    """101 smooth 8-bit pictures, so that neither 8 nor 2 divides their number."""

    def __init__(self) -> None:
        small = torch.rand(101, 3, 4, 4, generator=torch.Generator().manual_seed(2))
        self.images = (255 * torch.nn.functional.interpolate(small, 16, mode="bilinear")).to(torch.uint8)

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        return {"images": self.images[indices]}


class CodeMaps(torch.utils.data.Dataset[Any]):
    """101 pairs of code maps with a label."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.codes = tuple(
            torch.randint(level.codebook_size, (101, level.height, level.width), generator=generator)
            for level in (TOP, BOTTOM)
        )
        self.labels = torch.randint(3, (101,), generator=generator)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> dict[str, Any]:
        return {"codes": tuple(level[indices] for level in self.codes), "label": self.labels[indices]}


def exact(images: Tensor) -> Tensor:
    """`to_float` in float64."""
    return images.double() / 127.5 - 1


def codec(codebook: str = "ema") -> HierarchicalVQVAE:
    torch.manual_seed(7)
    config = CodecConfig(
        strides=(8, 4), codebook_size=16, code_dim=4, width=8, residual_blocks=1, residual_width=4, level_dropout=0
    )
    config = CodecConfig.model_validate({**config.model_dump(), "codebook": codebook})
    return HierarchicalVQVAE(config, SPEC)


def codec_task(codebook: str) -> Task:
    return CodecTask(codec(codebook).double(), Pictures().images[:4])


def discriminated_task() -> Task:
    """The adversary switches on in the middle; its weight is that of the joint batch."""
    settings = DiscriminatorSettings(width=8, layers=2, start=0.3)
    return DiscriminatedCodecTask(codec(), Pictures().images[:4], settings).double()


def prior_task() -> Task:
    torch.manual_seed(7)
    model = PixelCNN({"width": 12, "blocks": 2, "dropout": 0.0}, PriorSpec(BOTTOM, (TOP,), 3)).double()
    return PriorTask(model, 1, 0, lambda model: None)  # type: ignore[arg-type, return-value]


TASKS = {"ema codebook": lambda: codec_task("ema"), "gradient codebook": lambda: codec_task("gradient")}
TASKS |= {"prior": prior_task, "discriminator": discriminated_task}


def train(name: str, folder: Path, processes: int, accumulate: int) -> None:
    """Train for `STEPS` steps of `BATCH` images in all, and save the state of every process."""
    task = TASKS[name]()
    data = CodeMaps() if name == "prior" else Pictures()
    settings = TrainingSettings(
        steps=STEPS,
        batch_size=BATCH // processes // accumulate,
        accumulate=accumulate,
        learning_rate=1e-3,
        evaluate_every=STEPS,
        checkpoint_every=STEPS,
        clip=1.0,
    )
    accelerator = make_accelerator(settings, len(task.players), cpu=True)
    assert accelerator.num_processes == processes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.codec_task.to_float", exact)
        fit(
            *(task, data, data, settings, folder),
            seed=5,
            identity={},
            accelerator=accelerator,
            console=Console(silent=True),
        )
    state = {key: value.clone() for key, value in task.state_dict().items()}
    assert all(value.dtype in (torch.float64, torch.int64, torch.bool) for value in state.values())
    save_file(state, folder.with_suffix(f".{accelerator.process_index}"))


def tasks(accumulate: int) -> list[str]:
    return [name for name in TASKS if accumulate == 1 or name != "discriminator"]  # which cannot be accumulated


def _train_all(folder: Path, accumulate: int) -> None:
    for name in tasks(accumulate):
        AcceleratorState._reset_state(reset_partial_state=True)
        train(name, folder / name, 2, accumulate)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_are_one_with_the_joint_batch(tmp_path: Path, accumulate: int) -> None:
    """Of each micro-batch, where there are several: a codebook begins with the first."""
    (tmp_path / "two").mkdir()
    debug_launcher(_train_all, (tmp_path / "two", accumulate), num_processes=2)
    for name in tasks(accumulate):
        AcceleratorState._reset_state(reset_partial_state=True)
        (tmp_path / "one").mkdir(exist_ok=True)
        train(name, tmp_path / "one" / name, 1, accumulate)
        begun = copy.deepcopy(TASKS[name]().state_dict())
        one = load_file(tmp_path / "one" / f"{name}.0")
        first, second = (load_file(tmp_path / "two" / f"{name}.{rank}") for rank in range(2))
        moved = 0.0
        for key, value in one.items():
            torch.testing.assert_close(first[key], second[key], rtol=0, atol=0, equal_nan=True)
            torch.testing.assert_close(first[key], value, rtol=0, atol=1e-8, equal_nan=True)
            moved = max(moved, float((value.double() - begun[key].double()).abs().nan_to_num().max()))
        assert moved > 1e-3, "nothing was learned, so nothing was compared"
        once, both = (read_metrics(tmp_path / part / name / "metrics.jsonl") for part in ("one", "two"))
        for line, other in zip(once, both, strict=True):
            assert (line["step"], line["epoch"], line["split"]) == (other["step"], other["epoch"], other["split"])
            losses = [key for key in line if key.rpartition("/")[2] == "loss"]
            assert losses
            assert [line[key] for key in losses] == pytest.approx([other[key] for key in losses], abs=1e-6)


def _run(arguments: list[list[str]]) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    for name in ("RANK", "LOCAL_RANK"):  # which torchrun sets, and debug_launcher does not
        os.environ[name] = str(torch.distributed.get_rank())
    for command in arguments:
        assert cli.call(command) == 0


@pytest.mark.slow
def test_a_hundred_steps_in_float32_end_near(tmp_path: Path, tiny_config: Path) -> None:
    """The codebooks of both processes are the same; the validation loss is within 2 % of that of one process."""
    settings = ["--set", "codec.training.steps=100", "--set", "data.count=400"]
    losses = []
    for processes, batch in ((1, 16), (2, 8)):
        run = ["--run", str(tmp_path / str(processes))]
        command = ["train-codes", "--config", str(tiny_config), *run, *settings]
        command += ["--set", f"codec.training.batch_size={batch}"]
        if processes == 1:
            assert cli.call(command) == 0
        else:
            debug_launcher(_run, ([command],), num_processes=2)
        losses.append(read_json(tmp_path / str(processes) / "codec/metrics.json")["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_a_whole_run_of_two_processes(tmp_path: Path, tiny_config: Path) -> None:
    """Every stage ends, and what one process alone then makes of the codec's codes is what both made."""
    run = tmp_path / "run"
    begin = ["run", "--config", str(tiny_config), "--run", str(run)]
    debug_launcher(_run, ([begin, begin],), num_processes=2)  # the second time all is there already
    AcceleratorState._reset_state(reset_partial_state=True)
    assert {"report.html", "compare.json"} <= {path.name for path in (run / "compare").iterdir()}
    assert (run / "samples/best/grid.png").is_file()
    assert (run / "reconstruct/grid.png").is_file()
    assert cli.call(["encode", "--run", str(run), "--data", "shapes", "--out", str(tmp_path / "codes")]) == 0
    own, again = ((folder / "codes.json").read_text() for folder in (run / "codes", tmp_path / "codes"))
    assert own == again
    assert new_run_settings(str(tiny_config), None).codec.training.batch_size == 16
