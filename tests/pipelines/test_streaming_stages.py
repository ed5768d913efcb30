"""Stages on streamed images: the same codes as without streaming; killed, shared, resumed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import debug_launcher
from PIL import Image
from safetensors.torch import load_file

from pipelines import cli
from pipelines.codec_task import CodecTask
from vqgen import shapes
from vqgen.code_store import CodeStore
from vqgen.codec import HierarchicalVQVAE
from vqgen.config import CodecConfig, DataSettings, TrainingSettings
from vqgen.console import Console
from vqgen.data import load_data
from vqgen.errors import Interrupted
from vqgen.images import to_float
from vqgen.training import fit, make_accelerator

CODEC = CodecConfig(
    strides=(4, 2), codebook_size=8, code_dim=4, width=8, residual_blocks=0, residual_width=4, level_dropout=0
)
STEPS = 14
MORE = ["--set", "data.buffer=32", "--set", f"training.steps={STEPS}", "--set", "training.checkpoint_every=4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """110 pictures of 16x16 in shards of 30, with names of classes."""
    made = tmp_path_factory.mktemp("shards")
    names = list(shapes.CLASS_NAMES)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    pixels = shapes.render(range(110), (16, 16)).transpose(0, 2, 3, 1)
    for number, start in enumerate(range(0, 110, 30)):
        part = range(start, min(start + 30, 110))
        pictures = [Image.fromarray(pixels[place]) for place in part]
        columns = {"image": pictures, "label": shapes.labels(part).tolist()}
        rows = datasets.Dataset.from_dict(columns, features=features).with_format("arrow")[:]
        pq.write_table(rows, made / f"train-{number:05d}.parquet", row_group_size=7)
    return made


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with mock.patch.object(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache")):
        yield


@pytest.fixture(scope="module")
def streamed(folder: Path, tmp_path_factory: pytest.TempPathFactory, tiny_config: Path) -> Path:
    run = tmp_path_factory.mktemp("streamed") / "run"
    given = ["--config", str(tiny_config), "--data", str(folder), "--run", str(run)]
    assert cli.call(["train-codes", *given, "--streaming", *MORE]) == 0
    return run


def content(store: Path) -> dict[str, Any]:
    info = CodeStore.load(store).info
    return {"splits": info.splits, "content": info.content, "data": info.data_fingerprint, "names": info.class_names}


def test_codes_are_those_without_streaming(streamed: Path, folder: Path, tmp_path: Path) -> None:
    given = ["encode", "--run", str(streamed), "--out"]
    elsewhere = tmp_path / "set"
    elsewhere.symlink_to(folder)  # of another name, so that it is not the run's own source, which is streamed
    assert cli.call([*given, str(tmp_path / "whole"), "--data", str(elsewhere)]) == 0
    assert cli.call([*given, str(tmp_path / "streamed"), "--data", str(elsewhere), "--streaming"]) == 0
    assert content(tmp_path / "whole") == content(tmp_path / "streamed") == content(streamed / "codes")


def test_what_follows_needs_no_more_than_the_run(streamed: Path, tmp_path: Path) -> None:
    assert cli.call(["evaluate", "--run", str(streamed), "-n", "4"]) == 0
    assert cli.call(["reconstruct", "--run", str(streamed), "-n", "2"]) == 0


def test_going_on_otherwise_is_refused(
    streamed: Path, tiny_config: Path, folder: Path, fails: Callable[..., str]
) -> None:
    given = ["train-codes", "--config", str(tiny_config), "--data", str(folder), "--run", str(streamed), "--resume"]
    assert "data.streaming: was true, now false\nResume with the same settings" in fails(*given, *MORE)
    assert "data.buffer: was 32, now 64" in fails(*given, "--streaming", *MORE, "--set", "data.buffer=64")


def test_streaming_of_what_cannot_be_streamed_is_one_line(fails: Callable[..., str], tmp_path: Path) -> None:
    said = fails("train-codes", "--config", "shapes", "--streaming", "--run", str(tmp_path / "run"))
    assert "there is nothing to stream" in said
    assert not (tmp_path / "run").exists()


class Stopping(CodecTask):
    """Is interrupted before it takes a certain step."""

    at: int | None = None

    def forward(self, batch: Any, player: str, progress: float, step: int) -> dict[str, torch.Tensor]:
        if step == self.at:
            raise Interrupted("stopped")
        return super().forward(batch, player, progress, step)


def train(folder: Path, out: Path, *, at: int | None = None, resume: bool = False, batch_size: int = 8) -> None:
    """14 steps in float64; checkpoints every 4, and an end at ``at`` that leaves only what was saved before."""
    data = load_data(DataSettings(source=str(folder), streaming=True, buffer=32, flip=True), seed=0)
    settings = TrainingSettings(
        steps=STEPS, batch_size=batch_size, checkpoint_every=4, evaluate_every=5, learning_rate=1e-3
    )
    torch.manual_seed(0)
    task = Stopping(HierarchicalVQVAE(CODEC, data.image), data.splits["validation"].__getitems__(range(2))["images"])
    task.double()
    task.at = at
    accelerator = make_accelerator(settings, cpu=True)
    arguments: dict[str, Any] = {"seed": 3, "identity": {}, "accelerator": accelerator, "console": Console()}
    with mock.patch("pipelines.codec_task.to_float", lambda images: to_float(images).double()):
        fit(task, data.splits["train"], data.splits["validation"], settings, out, resume=resume, **arguments)


def final(out: Path) -> dict[str, torch.Tensor]:
    saved = out / f"checkpoints/step-{STEPS:08d}"
    return {
        f"{path.stem}/{name}": value for path in saved.glob("*.safetensors") for name, value in load_file(path).items()
    }


def metric_lines(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def assert_same(one: Path, other: Path) -> None:
    first, second = final(one), final(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        # The decoder's scale is not a number before it is fitted.
        assert torch.equal(value.nan_to_num(-1.0), second[name].nan_to_num(-1.0)), name
    assert metric_lines(one) == metric_lines(other)


@pytest.fixture(scope="module")
def alone(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training by one process that nothing stopped."""
    out = tmp_path_factory.mktemp("alone")
    train(folder, out)
    return out


@pytest.mark.parametrize("at", [3, 6, 13])
def test_a_stopped_training_resumes_bit_for_bit(folder: Path, tmp_path: Path, alone: Path, at: int) -> None:
    with pytest.raises(Interrupted):
        train(folder, tmp_path / "broken", at=at)
    train(folder, tmp_path / "broken", resume=True)
    assert_same(alone, tmp_path / "broken")


def _on_two(folder: Path, out: Path) -> None:
    torch.set_num_threads(1)
    train(folder, out / "whole", batch_size=4)
    try:
        train(folder, out / "broken", at=6, batch_size=4)
    except Interrupted:
        train(folder, out / "broken", resume=True, batch_size=4)


def test_two_processes_resume_bit_for_bit_and_train_as_one(folder: Path, tmp_path: Path, alone: Path) -> None:
    debug_launcher(_on_two, (folder, tmp_path), num_processes=2)
    assert_same(tmp_path / "whole", tmp_path / "broken")
    together = final(tmp_path / "whole")
    for name, value in final(alone).items():
        if name.startswith("task/"):
            np.testing.assert_allclose(value, together[name], atol=1e-8, err_msg=name)
