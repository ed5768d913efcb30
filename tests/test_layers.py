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
    assert imported_packages(ENTRY_POINT) & set(ALLOWED) == {"pipelines"}
