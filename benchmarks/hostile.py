"""What somebody who means harm puts into a file: values, and whole files. For `benchmarks.fuzz` and the tests."""

from __future__ import annotations

import os
import pickle
from typing import Any

NAMES = ("..", ".", "", "../../beside/x", "/etc/passwd", "a/../../b", "~root", "CON", "a\x00b", "a" * 10_000)
TEXTS = (
    *("\x1b[2J\x1b[31mred", "\x9b31m", "\u202egnp.exe", "line\nerror: forged", "\ud800", "<script>alert(1)</script>"),
    *("$\\frac{", "%s%n{0}{x!r}", "=cmd|' /C calc'!A0", "os:system", "canary:Prior", "!!python/name:os.system"),
    *("NaN", "[bold]x[/bold]", "|", "transformer", "top", "shapes", "gpt2", "wandb"),
)
NUMBERS = (
    *(0, 1, -1, 2, 7, 255, 256, 65_537, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30),
    *(0.5, -0.0, 1e-320, 1e308, -1e308, float("nan"), float("inf"), float("-inf")),
)
OTHERS: tuple[Any, ...] = (None, True, False, [], {}, [[]], {"": {}}, [None] * 1000, {"a": [1, {"b": 2}]})


class Payload:
    """What an unpickler would run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch ../beside/unpickled",)


PICKLES = (pickle.dumps(Payload()), b"\x80\x02cos\nsystem\nX\x0b\x00\x00\x00touch owned\x85R.")
BOMBS = (
    b"[" * 200_000,
    b'{"a":' * 100_000,
    b"[" * 120 + b"]" * 120,
    b"9" * 100_000,
    b'{"a": ' + b"9" * 5000 + b"}",
    b'{"a": 1e99999}',
    b"",
    b" " * 2_000_000,
    b"\xff\xfe{\x00}\x00",
    b'"' + b"\\u0000" * 1000 + b'"',
    b"null",
    b"[]",
    b"{}",
    b"0",
    *PICKLES,
)
YAML_BOMBS = (
    b"a0: &a0 [x]\n" + b"".join(b"a%d: &a%d [%s]\n" % (i, i, b",".join([b"*a%d" % (i - 1)] * 9)) for i in range(1, 12)),
    b"a0: &a0 {k: v}\n"
    + b"".join(b"a%d: &a%d {<<: [*a%d, *a%d, *a%d]}\n" % ((i, i) + (i - 1,) * 3) for i in range(1, 30)),
    b"a0: &a0 {k: v}\n" + b"".join(b"a%d: &a%d {x: *a%d, y: *a%d}\n" % (i, i, i - 1, i - 1) for i in range(1, 40)),
    b"codec: &c {training: *c}\n",
    b"codec: &c\n  training: *c\n",
    b"priors: &p [*p]\n",
    b"codec: !!python/object/apply:os.system ['touch ../beside/owned']\n",
    b"codec: !!python/object/new:os.system ['touch ../beside/owned']\n",
    b"data: {count: 0x" + b"f" * 50_000 + b"}\n",
    b"seed: 1" + b":59" * 20_000 + b"\n",
    b"base: ../../../../../../etc/passwd.yaml\n",
    b"base: /dev/zero.yaml\n",
    b"base: shapes\nbase: shapes\n",
    b"? [a, b]\n: c\n",
    b"1: 2\n",
    b"data: {1: 2, null: 3, 2001-01-01: 4, .nan: 5, true: 6}\n",
    b"data: {source: !!binary aGVsbG8=}\n",
    b"codec: !!set {a, b}\n",
    b"codec: !!omap [a: b]\n",
    b"codec: !!timestamp x\n",
    b"codec: !!int ''\n",
    b"codec: !!float x\n",
    b"codec: !!bool 7\n",
    b"seed: 2001-99-99\n",
    b"{" * 5000,
    b"- " * 20_000,
    b"a: " + b"'" * 99_999,
    b"--- a\n--- b\n",
    b"%YAML 9.9\n---\na: 1\n",
    b'codec: {width: "\\e[31m"}\n"\\e[2J": 1\n',
    b'"\\e[2J": 1\n',
    b'data: {source: "a\\0b"}\n',
    b"data: {image_size: [1, 2, 3, 4, 5]}\n",
    b"codec: {strides: [2, 2, 2, 2]}\n",
)
