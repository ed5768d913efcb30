"""The versions of `make oldest` are the lower bounds of pyproject.toml, all of them and to the digit."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = ("metrics", "compress")
"""What the package itself imports besides its dependencies; tools of contributors are not held to a bound."""


def release(version: str) -> tuple[int, ...]:
    """``"2.6"`` and ``"2.6.0"`` are the same release."""
    numbers = [int(part) for part in version.split(".")]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def bounds(lines: str, mark: str) -> dict[str, tuple[int, ...]]:
    """``name<mark>version`` of each line or quoted entry, by normalised name."""
    found = re.findall(rf"^[ \"]*([A-Za-z][\w.-]*){re.escape(mark)}([\d.]+)\"?,?$", lines, re.MULTILINE)
    return {name.lower().replace("_", "-"): release(version) for name, version in found}


def test_the_oldest_versions_are_the_lower_bounds() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = re.search(r"^dependencies = \[\n(.*?)^\]", project, re.MULTILINE | re.DOTALL)
    assert block is not None
    extras = [re.search(rf"^{name} = \[(.*)\]$", project, re.MULTILINE) for name in EXTRAS]
    text = block[1] + "".join(f"{extra[1]}\n" for extra in extras if extra is not None)
    expected = bounds(text, ">=")
    assert len(expected) == len([line for line in text.splitlines() if line.strip()])
    assert bounds((ROOT / "constraints-oldest.txt").read_text(encoding="utf-8"), "==") == expected


def test_make_oldest_uses_them() -> None:
    target = (ROOT / "Makefile").read_text(encoding="utf-8").split("\noldest:")[1].split("\n\n")[0]
    assert "-c constraints-oldest.txt" in target
    assert f'".[{",".join(EXTRAS)}]"' in target
