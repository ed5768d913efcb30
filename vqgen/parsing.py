"""Reading of JSON and YAML that a stranger may have written: bounded before it is built, and plain values only.

A few lines of text can stand for more than any memory holds (a YAML list of nine aliases of a list of nine aliases of
...), or for a nesting or a number on which what works with it would break. Such a text is a `ValueError` here, whatever
it is for. Limits are far above anything that this project writes.

Also here: text as it may go to a terminal (`printable`).
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from itertools import accumulate
from pathlib import Path
from typing import Any

import yaml

MOST_JSON = 64 * 2**20
"""Bytes of a JSON file."""
MOST_YAML = 2**20
"""Bytes of a YAML file; its parser is slow."""
MOST_DEPTH = 100
"""Lists and mappings inside each other."""
MOST_NODES = 100_000
"""Values of a YAML text, an alias counted as all that it stands for."""
MOST_DIGITS = 400
"""Characters of a number: as many as the longest decimal form of any 64-bit float or integer, and to spare."""
MOST_INTEGER = 2**64
"""Whole numbers are below this, up and down."""

# Line breaks and tabs are left; escape sequences are not, nor marks that turn the direction of the text around.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


def printable(text: str) -> str:
    """``text`` with a replacement character for each that a terminal would obey rather than show."""
    return _CONTROL.sub("�", text)


def read_bounded(path: Path, most: int) -> str:
    """The text of a file of at most ``most`` bytes, UTF-8.

    Raises:
        ValueError: it is longer, not UTF-8, or no plain file: who opens a pipe waits for whoever writes to it.
        OSError: it cannot be read.
    """
    with open(path, "rb", opener=_without_waiting) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("it is no plain file")
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it is longer than {most:,} bytes")
    return content.decode("utf-8")


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def load_json(path: Path, *, most: int = MOST_JSON, nan: bool = False) -> Any:
    """The value in a JSON file.

    Args:
        nan: take ``NaN`` and ``Infinity``, which Python's own writer makes of such numbers.

    Raises:
        ValueError: it is not JSON, or beyond the limits above.
        OSError: it cannot be read.
    """
    return parse_json(read_bounded(path, most), nan=nan)


def parse_json(text: str, *, nan: bool = False) -> Any:
    """The value of a JSON text; raises `ValueError` as `load_json`."""

    def number(digits: str) -> float:
        value = float(_short(digits))
        if not (nan or math.isfinite(value)):
            raise ValueError(f"the number {digits[:20]} is not finite")
        return value

    try:
        value = json.loads(text, parse_int=_integer, parse_float=number, parse_constant=number)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    _check_depth(value)
    return value


def parse_yaml(text: str) -> Any:
    """The value of a YAML text: plain values only, never an object that a tag names.

    Raises:
        ValueError: it is not YAML, or beyond the limits above.
    """
    if len(text) > MOST_YAML:
        raise ValueError(f"it is longer than {MOST_YAML:,} characters")
    if _brackets(text) > 2 * MOST_DEPTH:  # over which the parser takes minutes before it gives up
        raise ValueError("it is nested too deeply")
    loader = None
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _expanded(node) > MOST_NODES:
            raise ValueError(f"it stands for more than {MOST_NODES:,} values")
        value = loader.construct_document(node)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (TypeError, AttributeError, LookupError, ArithmeticError) as error:  # of a tag that does not fit its value
        raise ValueError(f"a value that does not fit its tag ({error})") from error
    finally:
        if loader is not None:
            loader.dispose()
    _check_depth(value)
    return value


def _integer(digits: str) -> int:
    value = int(_short(digits))
    if abs(value) >= MOST_INTEGER:
        raise ValueError(f"the number {digits[:20]}... has {len(digits)} digits")
    return value


def _short(digits: str) -> str:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"the number {digits[:20]}... has {len(digits)} digits")
    return digits


def _brackets(text: str) -> int:
    """Most brackets open at once, quotes and comments not looked at."""
    opened = (1 if mark in "[{" else -1 for mark in re.findall(r"[\[\]{}]", text))
    return max(accumulate(opened), default=0)


def _expanded(root: yaml.Node) -> int:
    """How many values a tree of nodes has, an alias counted as all that it stands for.

    Raises:
        ValueError: a value contains itself, or lies too deep.
    """
    counts: dict[int, int] = {}
    above: set[int] = set()

    def count(node: yaml.Node, depth: int) -> int:
        if id(node) in above:
            raise ValueError("a value contains itself")
        if depth > MOST_DEPTH:
            raise ValueError("it is nested too deeply")
        if id(node) in counts:
            return counts[id(node)]
        above.add(id(node))
        parts = _parts(node)
        counts[id(node)] = 1 + sum(count(part, depth + 1) for part in parts)
        above.remove(id(node))
        return counts[id(node)]

    return count(root, 0)


def _parts(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _check_depth(value: Any) -> None:
    """Refuse what is nested too deeply or holds numbers beyond the limits, without descending into it by recursion."""
    layer, depth = [value], 0
    while layer:
        if depth > MOST_DEPTH:
            raise ValueError("it is nested too deeply")
        below: list[Any] = []
        for item in layer:
            if isinstance(item, dict):
                below.extend(item)
                below.extend(item.values())
            elif isinstance(item, (list, tuple, set)):
                below.extend(item)
            elif isinstance(item, int) and abs(item) >= MOST_INTEGER:
                raise ValueError("it holds a whole number of more than 64 bits")
        layer, depth = below, depth + 1
