"""Peak memory: a piece of work is seen, what came before it is not, and a system that does not tell is no error."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from vqgen import memory

MIB = 2**20


def taken(size: int) -> int | None:
    with memory.peak_memory() as span:
        assert span.peak is None
        block = np.ones(size, dtype=np.uint8)
        del block
    return span.peak


def resettable() -> bool:
    return "during the work" in memory.meaning()


def test_more_work_takes_more() -> None:
    if not resettable():
        pytest.skip("this system does not set the high-water mark back")
    large, small = taken(160 * MIB), taken(MIB)
    assert large is not None
    assert small is not None
    assert 140 * MIB < large - small < 200 * MIB


def test_what_the_work_adds_does_not_depend_on_what_came_before() -> None:
    if not resettable():
        pytest.skip("this system does not set the high-water mark back")
    grown = []
    for before in (0, 200 * MIB):
        held = np.ones(before, dtype=np.uint8)
        with memory.peak_memory() as span:
            block = np.ones(100 * MIB, dtype=np.uint8)
            del block
        del held
        assert span.grown is not None
        grown.append(span.grown)
    assert grown == [pytest.approx(100 * MIB, rel=0.1)] * 2


@pytest.mark.parametrize("missing", ["STATUS", "CLEAR"])
def test_without_the_mark_the_whole_process_counts(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("resource")
    monkeypatch.setattr(memory, missing, tmp_path / "none" / "such")
    first, second = taken(64 * MIB), taken(MIB)
    assert first is not None
    assert second is not None
    assert second >= first > 64 * MIB
    assert "since it began" in memory.meaning()


def test_where_nothing_is_told_nothing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "STATUS", tmp_path / "none")
    monkeypatch.setitem(sys.modules, "resource", None)
    assert taken(MIB) is None
    assert memory.meaning() == "not measured on this system"


def test_a_gpu_counts_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr("torch.cuda.reset_peak_memory_stats", lambda device: told.append(str(device)))
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda device: 7 * MIB)
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda device: 5 * MIB)
    with memory.peak_memory("cuda:0") as span:
        pass
    assert (span.peak, span.grown) == (7 * MIB, 2 * MIB)
    assert told == ["cuda:0"]
    assert "GPU" in memory.meaning("cuda")
