"""Imports point one way: vqgen <- priors <- pipelines."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = {"vqgen": {"vqgen"}, "priors": {"vqgen", "priors"}, "pipelines": {"vqgen", "priors", "pipelines"}}
ENTRY_POINT = ROOT / "vqgen" / "__main__.py"
FILES = sorted(path for package in ALLOWED for path in (ROOT / package).rglob("*.py") if path != ENTRY_POINT)


def imported_packages(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add((node.module or "").partition(".")[0])
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_from_its_own_layer_and_below(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    climbing = (imported_packages(path) & set(ALLOWED)) - ALLOWED[package]
    assert not climbing, f"{path} imports {climbing}"


def test_the_entry_point_is_the_only_upward_import() -> None:
    assert imported_packages(ENTRY_POINT) & set(ALLOWED) - {"vqgen"} == {"pipelines"}


LAYERS = (
    {"__init__", "errors", "files", "codes", "parsing", "problems", "config", "presets"},
    {
        *("blocks", "code_info", "console", "hub", "images", "interrupts", "losses", "memory", "metrics", "optimizers"),
        *("detection", "discriminator", "feature_distances", "quantizer", "sampler", "shapes", "splits"),
        *("agreement", "collectives", "faults", "locks", "micro_batches"),
    },
    {
        *("checkpoint", "classifier", "code_store", "code_writer", "codec", "compiling", "data", "image_split", "rows"),
        *("run_folder", "run_record", "sources", "task", "trainer", "training", "training_log", "training_state"),
        *("shards", "streaming", "table_rows"),
    },
)
"""Modules of vqgen, lowest layer first; ``__main__`` stands above all."""

LAYER_OF = {name: layer for layer, names in enumerate(LAYERS) for name in names}


def imported_modules(name: str) -> set[str]:
    """Modules of vqgen that vqgen's module ``name`` imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / "vqgen" / f"{name}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "vqgen":
            found |= {f"vqgen.{alias.name if alias.name in LAYER_OF else '__init__'}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return {module.removeprefix("vqgen.") for module in found if module.startswith("vqgen.")}


def test_every_module_of_vqgen_has_one_layer() -> None:
    assert {path.stem for path in (ROOT / "vqgen").glob("*.py")} - {"__main__"} == set(LAYER_OF)
    assert sum(map(len, LAYERS)) == len(LAYER_OF)


@pytest.mark.parametrize("name", sorted(LAYER_OF))
def test_a_module_of_vqgen_imports_only_from_its_own_layer_and_below(name: str) -> None:
    climbing = {module for module in imported_modules(name) if LAYER_OF[module] > LAYER_OF[name]}
    assert not climbing, f"vqgen/{name}.py imports {climbing}"


def test_modules_of_vqgen_import_in_no_circle() -> None:
    waiting = {name: imported_modules(name) for name in LAYER_OF}
    while free := {name for name, modules in waiting.items() if not modules & set(waiting)}:
        waiting = {name: modules for name, modules in waiting.items() if name not in free}
    assert not waiting, f"among these: {waiting}"
