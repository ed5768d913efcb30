"""Random kills: a few of those of benchmarks/kill.py, on one process and on two, and of a whole run and a sweep."""

from __future__ import annotations

import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "kill.py"


@pytest.fixture
def kill(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("kill", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "kill", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_at_random_and_resumed_is_bit_for_bit_the_whole(processes: int, tmp_path: Path) -> None:
    record = tmp_path / "kill.json"
    command = ["--kills", "4", "--steps", "60", "--processes", str(processes), "--seed", "5", "--json", str(record)]
    done = subprocess.run([sys.executable, str(BENCHMARK), *command], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(record.read_text())["kills"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["run", "sweep"])
def test_a_whole_run_and_a_sweep_that_are_killed_go_on_by_the_same_command(
    name: str, kill: ModuleType, tmp_path: Path
) -> None:
    settings = kill.SETTINGS.replace("STEPS", "30") + "run: {priors: [pixelcnn], samples: 4}\n"
    (tmp_path / "kill.yaml").write_text(settings)
    extra = {"run": (), "sweep": ("--grid", "codec.commitment=0.25,0.75")}[name]
    place = {"run": "--run", "sweep": "--out"}[name]
    stage = kill.Stage(name, (name, "--config", "kill.yaml", *extra), place, ())
    record, whole = kill.put_to_the_test(stage, None, tmp_path, 1, 3, random.Random(7))
    assert (record["kills"], record["different"]) == (3, [])
    assert list(whole.rglob("codec/model.safetensors"))


def test_a_difference_is_found(kill: ModuleType, tmp_path: Path) -> None:
    for run, line in (("one", '{"step": 1, "seconds": 2}'), ("other", '{"step": 1, "seconds": 3}')):
        (tmp_path / run / "codec/checkpoints/step-00000001").mkdir(parents=True)
        (tmp_path / run / "codec/checkpoints/step-00000001/task.safetensors").write_bytes(b"1")
        (tmp_path / run / "codec/metrics.jsonl").write_text(line + "\n")
    one, other = tmp_path / "one", tmp_path / "other"
    assert kill.differences(one, other) == []
    (other / "codec/checkpoints/step-00000001/task.safetensors").write_bytes(b"2")
    (other / "codec/metrics.jsonl").write_text('{"step": 2, "seconds": 2}\n')
    (other / "codec/model.safetensors").write_bytes(b"3")
    (other / ".codes.begun").mkdir()
    assert kill.differences(one, other) == [
        "codec/checkpoints/step-00000001/task.safetensors",
        "codec/metrics.jsonl",
        "codec/model.safetensors",
        ".codes.begun was left behind",
    ]
