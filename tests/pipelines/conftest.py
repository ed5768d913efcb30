"""A run small enough to train in seconds, made once per test process and copied where a test changes it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines import cli

TINY = """
data: {source: shapes, image_size: 16, count: 64}
codec:
  strides: [8, 4]
  codebook_size: 16
  code_dim: 8
  width: 16
  residual_blocks: 1
  residual_width: 8
  training: {steps: 6, batch_size: 16, evaluate_every: 3, checkpoint_every: 3, preview_every: 6, log_every: 1}
run: {priors: [pixelcnn, transformer], samples: 16}
priors:
  pixelcnn: {width: 16, blocks: 2, training: {steps: 4, batch_size: 16, evaluate_every: 2, checkpoint_every: 2}}
  transformer: {dim: 32, depth: 1, heads: 2, training: {steps: 4, batch_size: 16, evaluate_every: 2}}
"""


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A YAML file with settings that train in a second."""
    path = tmp_path_factory.mktemp("settings") / "tiny.yaml"
    path.write_text(TINY, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory, tiny_config: Path) -> Path:
    """A run with every stage done; not to be changed."""
    run = tmp_path_factory.mktemp("finished") / "tiny"
    assert cli.call(["run", "--config", str(tiny_config), "--run", str(run)]) == 0
    return run


@pytest.fixture
def run_copy(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run that a test may change."""
    return Path(shutil.copytree(finished_run, tmp_path / "copy"))


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command line that must fail with exit code 2 and a clear line; returns what stderr says."""

    def run(*arguments: str) -> str:
        capsys.readouterr()
        code = cli.call(list(arguments))
        captured = capsys.readouterr()
        assert code == 2, f"exit code {code}: {captured.err}"
        assert "Traceback" not in captured.err
        assert captured.out == ""
        return captured.err

    return run
