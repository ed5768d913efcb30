"""Training a prior of two levels, interrupted in either one: the command that is printed ends in the same bits."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipelines import cli

ROOT = Path(__file__).resolve().parents[2]
LEVELS = ("top", "bottom")
RUN = "runs/my run"
"""Relative, and with a space: what is printed must hold in the same folder, in a shell."""
PLUGIN = "my prior.py"
NARROW = """
from priors.pixelcnn import PixelCNN
from priors.registry import register


@register
class Narrow(PixelCNN):
    name = "narrow"
"""
STEPS, CHECKPOINT_EVERY = 300, 25
SETTINGS = {
    "training.steps": STEPS,
    "training.checkpoint_every": CHECKPOINT_EVERY,
    "training.evaluate_every": 50,
    "training.log_every": 10,
    "training.batch_size": 8,
    "priors.narrow.width": 8,
    "priors.narrow.blocks": 1,
}
COMMAND = ["vqgen", "train-prior", "--prior", "narrow", "--plugin", PLUGIN, "--run", RUN, "--seed", "3"] + [
    word for key, value in SETTINGS.items() for word in ("--set", f"{key}={value}")
]
PATIENCE = 120
"""Seconds for a process that takes five on an idle machine."""


def start(command: list[str], folder: Path) -> subprocess.Popen[str]:
    assert command[0] == "vqgen"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    said = process.communicate(timeout=PATIENCE)[1]
    return process.returncode, said


@pytest.fixture(scope="module")
def trained_codec(tmp_path_factory: pytest.TempPathFactory, tiny_config: Path) -> Path:
    """A folder with the plugin and a run that has a codec and codes, and nothing else."""
    folder = tmp_path_factory.mktemp("codec")
    (folder / PLUGIN).write_text(NARROW, encoding="utf-8")
    assert cli.call(["train-codes", "--config", str(tiny_config), "--run", str(folder / RUN)]) == 0
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, trained_codec: Path) -> Path:
    """The prior trained without an interrupt."""
    folder = Path(shutil.copytree(trained_codec, tmp_path_factory.mktemp("whole") / "here"))
    code, said = finish(start(COMMAND, folder))
    assert code == 0, said
    return folder


def metrics(folder: Path, level: str) -> list[dict[str, Any]]:
    lines = (folder / RUN / "priors/narrow" / level / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]


def results(folder: Path, level: str) -> dict[str, bytes]:
    place = folder / RUN / "priors/narrow" / level
    return {name: (place / name).read_bytes() for name in ("model.safetensors", "config.json", "metrics.json")}


@pytest.mark.parametrize("level", LEVELS)
def test_interrupted_and_resumed_as_printed_equals_uninterrupted(
    level: str, whole: Path, trained_codec: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(trained_codec, tmp_path / "here"))
    checkpoints = folder / RUN / "priors/narrow" / level / "checkpoints"
    process = start(COMMAND, folder)
    deadline = time.monotonic() + PATIENCE
    while not list(checkpoints.glob("step-*")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    code, said = finish(process)
    assert code == 130, said
    assert "Traceback" not in said
    places = [folder / RUN / "priors/narrow" / each / "model.safetensors" for each in LEVELS]
    assert [place.exists() for place in places] == [level == "bottom", False]
    reached = max(int(path.name.removeprefix("step-")) for path in checkpoints.glob("step-*"))
    assert CHECKPOINT_EVERY <= reached < STEPS

    printed = [line.partition("Go on with: ")[2] for line in said.splitlines() if "Go on with: " in line]
    assert len(printed) == 1, said
    code, said = finish(start(shlex.split(printed[0]), folder))
    assert code == 0, f"{printed[0]}\n{said}"
    for each in LEVELS:
        assert metrics(folder, each) == metrics(whole, each), each
        assert results(folder, each) == results(whole, each), each
    assert metrics(whole, level)[-1]["step"] == STEPS
