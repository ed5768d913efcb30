"""The wheel: it holds every package and data file, and works away from the checkout, whatever lies beside it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("vqgen", "priors", "pipelines")
DATA = (".yaml", ".html", ".css", ".js", ".svg", ".json", ".typed")
"""Files of a package, besides Python, that must be in the wheel."""
BUILT_FROM = (*PACKAGES, "configs", "pyproject.toml", "README.md", "LICENSE")
TINY = """
base: shapes
data: {image_size: 16, count: 64}
codec: {codebook_size: 16, code_dim: 8, width: 16, residual_width: 8, training: {steps: 4, batch_size: 16}}
priors:
  transformer: {dim: 32, depth: 1, heads: 2, training: {steps: 2, batch_size: 16}}
"""
DECOY = "raise SystemExit('imported the folder that lies beside')\n"


class Settings(NamedTuple):
    """What pyproject.toml says about packages."""

    packages: set[str]
    folders: dict[str, str]
    data: dict[str, list[str]]


def settings() -> Settings:
    """Read without a TOML library, which Python 3.10 has not: the three tables are simple."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")

    def table(name: str) -> str:
        return re.split(r"^\[", text.split(f"\n[{name}]\n")[1], maxsplit=1, flags=re.MULTILINE)[0]

    def strings(value: str) -> list[str]:
        return re.findall(r'"([^"]*)"', value)

    def entries(name: str) -> dict[str, str]:
        return {
            key.strip('" '): value
            for key, value in re.findall(r"^([\w.\"]+) *= *(\[.*?\]|\".*?\")", table(name), re.MULTILINE | re.DOTALL)
        }

    return Settings(
        packages=set(strings(entries("tool.setuptools")["packages"])),
        folders={key: strings(value)[0] for key, value in entries("tool.setuptools.package-dir").items()},
        data={key: strings(value) for key, value in entries("tool.setuptools.package-data").items()},
    )


def folder_of(package: str) -> Path:
    return ROOT / settings().folders.get(package, package.replace(".", "/"))


def packages_on_disk() -> set[str]:
    """Every folder of the three packages that holds Python, and the presets."""
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    return {".".join(path.parent.relative_to(ROOT).parts) for path in files} | {"vqgen.configs"}


def data_on_disk() -> set[Path]:
    folders = [*PACKAGES, "configs"]
    files = {path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in DATA}
    return {path for path in files if "__pycache__" not in path.parts}


def test_every_package_on_disk_is_in_the_wheel() -> None:
    assert settings().packages == packages_on_disk()
    for package in settings().packages - {"vqgen.configs"}:
        assert (folder_of(package) / "__init__.py").is_file(), f"{package} has no __init__.py"


def test_every_data_file_on_disk_is_in_the_wheel() -> None:
    listed = {
        path
        for package, patterns in settings().data.items()
        for pattern in patterns
        for path in folder_of(package).glob(pattern)
    }
    assert data_on_disk() - listed == set()
    assert {path.suffix for path in listed} >= {".yaml", ".html", ".typed"}


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command that sees nothing of the checkout: another folder, and a module path of its own."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PIP_NO_INPUT": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**inherited, **quiet, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the checkout, so that no build folder is left in it."""
    if find_spec("build") is None or find_spec("setuptools") is None:
        pytest.fail("building a wheel needs the packages 'build' and 'setuptools' (make install brings them)")
    source = tmp_path_factory.mktemp("source")
    for name in BUILT_FROM:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source)
    made = run(sys.executable, "-m", "build", "--wheel", "--no-isolation", cwd=source)
    assert made.returncode == 0, made.stdout + made.stderr
    (found,) = (source / "dist").glob("*.whl")
    return found


class Installed(NamedTuple):
    python: Path
    vqgen: Path
    folder: Path
    """An empty folder, but for decoys of two of the packages."""


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The wheel in an environment of its own, which borrows the other packages of this one."""
    root = tmp_path_factory.mktemp("installed")
    made = run(sys.executable, "-m", "venv", "--without-pip", root / "venv", cwd=root)
    assert made.returncode == 0, made.stderr
    programs = root / "venv" / ("Scripts" if os.name == "nt" else "bin")
    python = programs / Path(sys.executable).name
    made = run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=root)
    assert made.returncode == 0, made.stdout + made.stderr
    places = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=root).stdout.strip()
    # A path file adds the folder but reads none of the path files in it: an editable install of the checkout
    # in this environment stays out of sight.
    borrowed = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
    (Path(places) / "borrowed.pth").write_text("\n".join(borrowed), encoding="utf-8")
    folder = root / "elsewhere"
    for package in ("priors", "pipelines"):
        (folder / package).mkdir(parents=True)
        (folder / package / "__init__.py").write_text(DECOY, encoding="utf-8")
    (folder / "tiny.yaml").write_text(TINY, encoding="utf-8")
    return Installed(python, programs / "vqgen", folder)


@pytest.mark.slow
def test_the_wheel_holds_what_is_on_disk_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        (metadata,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith("/METADATA"))
    code = {path.relative_to(ROOT).as_posix() for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    data = {path.relative_to(ROOT).as_posix() for path in data_on_disk()}
    assert held == code | {re.sub(r"^configs/", "vqgen/configs/", name) for name in data}
    assert "Turn images into discrete codes" in metadata


@pytest.mark.slow
def test_its_modules_come_from_the_environment(installed: Installed) -> None:
    program = (
        "import json, sys, vqgen, pipelines.cli as cli; print(json.dumps([vqgen.__file__, cli.__file__, sys.path]))"
    )
    made = run(installed.python, "-I", "-c", program, cwd=installed.folder)
    assert made.returncode == 0, made.stderr
    *files, path = json.loads(made.stdout)
    assert all(Path(file).is_relative_to(installed.python.parents[1]) for file in files)
    assert ROOT not in [Path(place).resolve() for place in path]


@pytest.mark.slow
def test_the_command_lists_presets_beside_decoys(installed: Installed) -> None:
    made = run(installed.vqgen, "presets", "--json", cwd=installed.folder)
    assert made.returncode == 0, made.stderr
    names = {preset["name"] for preset in json.loads(made.stdout)}
    assert names == {path.stem for path in (ROOT / "configs").glob("*.yaml")}


@pytest.mark.slow
def test_every_stage_runs_beside_decoys(installed: Installed) -> None:
    for command in (
        ["train-codes", "--config", "tiny.yaml"],
        ["train-prior", "--prior", "transformer"],
        ["sample", "-n", "4"],
        ["compare", "-n", "4", "--samples", "4"],
    ):
        made = run(installed.vqgen, *command, cwd=installed.folder)
        assert made.returncode == 0, f"{command}\n{made.stderr}"
    for file in ("samples/transformer-2-levels-seed-0/grid.png", "compare/report.html", "compare/compare.json"):
        assert (installed.folder / "runs/tiny" / file).is_file(), file


@pytest.mark.slow
def test_as_a_module_beside_decoys_it_says_what_is_in_the_way(installed: Installed) -> None:
    made = run(installed.python, "-m", "vqgen", "presets", cwd=installed.folder)
    assert made.returncode == 2
    assert made.stdout == ""
    (line,) = made.stderr.splitlines()
    assert line.startswith("vqgen: its package 'priors' should be in ")
    assert str(installed.folder / "priors") in line
    assert "use the command 'vqgen'" in line


@pytest.mark.slow
def test_as_a_module_without_decoys_it_works(installed: Installed, tmp_path: Path) -> None:
    made = run(installed.python, "-m", "vqgen", "presets", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert "shapes" in made.stdout
