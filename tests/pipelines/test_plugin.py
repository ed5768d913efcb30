"""A third-party prior in one file outside the package: registers, trains, samples, compares."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pipelines import cli

README = Path(__file__).resolve().parents[2] / "README.md"


def readme_prior() -> str:
    """The whole prior that the README shows."""
    text = README.read_text(encoding="utf-8")
    return text.split("```python\n# my_prior.py")[1].split("```")[0]


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("plugin") / "my_prior.py"
    path.write_text(readme_prior(), encoding="utf-8")
    return str(path)


def test_the_readmes_prior_does_all_that_a_built_in_does(plugin: str, run_copy: Path) -> None:
    run = ["--run", str(run_copy), "--plugin", plugin]
    assert cli.call(["train-prior", "--prior", "bigram", "--set", "training.steps=5", *run]) == 0
    assert cli.call(["sample", "--prior", "bigram", "-n", "4", *run]) == 0
    assert cli.call(["sample", "--prior", "top=transformer,bottom=bigram", "-n", "4", *run]) == 0
    assert cli.call(["compare", "-n", "8", "--samples", "4", *run]) == 0
    rows = json.loads((run_copy / "compare/compare.json").read_text())["rows"]
    assert ("bigram", "all") in {(row["prior"], row["level"]) for row in rows}


def test_the_readmes_prior_passes_the_contract(plugin: str) -> None:
    from priors import registry
    from priors.check import check_prior

    registry.load_plugin(Path(plugin))
    check_prior(registry.get("bigram"))


def test_a_prior_that_is_not_there_names_the_cure(run_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored = json.loads((run_copy / "run.json").read_text())
    shutil.copytree(run_copy / "priors/pixelcnn", run_copy / "priors/absent")
    stored["stages"]["priors/absent/top"] = stored["stages"]["priors/pixelcnn/top"]
    stored["stages"]["priors/absent/bottom"] = stored["stages"]["priors/pixelcnn/bottom"]
    (run_copy / "run.json").write_text(json.dumps(stored))
    assert cli.call(["sample", "--prior", "absent", "--run", str(run_copy)]) == 2
    assert "--plugin" in capsys.readouterr().err


def test_a_plugin_that_fails_is_named(run_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("import nothing_of_that_name\n")
    assert cli.call(["priors", "--plugin", str(broken)]) == 2
    assert "broken.py" in capsys.readouterr().err
