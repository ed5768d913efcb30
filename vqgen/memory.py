"""Peak memory of a piece of work, in bytes.

What is measured depends on the machine, and `meaning` says which it is:

- on a CUDA device, the most that torch had allocated there at once (``torch.cuda.max_memory_allocated``): weights,
  gradients and activations, without the context of CUDA itself;
- on Linux, the high-water mark of the resident memory of the whole process (``VmHWM``), which is set back as the work
  begins through ``/proc/self/clear_refs``; Python, the libraries and the data that is held are in it;
- elsewhere, and where that mark cannot be set back (some containers), the most that the process has ever had
  resident (``ru_maxrss``): no less than the work took, but perhaps of something before it;
- where even that is not told (Windows), None.

Of several processes each measures itself. Spans do not nest: an inner one would set the mark of the outer one back.

How far the memory rose above what was held as the work began (`Span.grown`) is known in the first two cases. So that
it does not depend on what ran before, memory that was freed but kept by the allocator is given back first (glibc).
"""

from __future__ import annotations

import ctypes
import gc
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")
RESET = "5"
"""Written to ``clear_refs``, sets VmHWM back to what is resident now (proc(5))."""


class Span:
    """A piece of work; ``peak`` is there when it has ended."""

    def __init__(self) -> None:
        self.peak: int | None = None
        """Bytes, or None where the system does not tell."""
        self.grown: int | None = None
        """Bytes above what was held at the beginning; None where the mark cannot be set back."""


@contextmanager
def peak_memory(device: torch.device | str = "cpu") -> Iterator[Span]:
    """Measures what the block takes at most: of ``device`` where that is CUDA, else of this process."""
    span, device = Span(), torch.device(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield span
        span.peak = torch.cuda.max_memory_allocated(device)
        span.grown = span.peak - before
        return
    _give_back()
    start = _mark() if _reset_mark() else None
    yield span
    span.peak = _ever() if start is None else _mark()
    if start is not None and span.peak is not None:
        span.grown = span.peak - start


def meaning(device: torch.device | str = "cpu") -> str:
    """What `peak_memory` measures here, in words."""
    if torch.device(device).type == "cuda":
        return "the most that was allocated on the GPU at once"
    if _reset_mark():
        return "the most memory the whole process had resident during the work"
    if _ever() is not None:
        return "the most memory the whole process had resident since it began"
    return "not measured on this system"


def _give_back() -> None:
    """Hand freed memory back to the system, where the C library can be asked to."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _reset_mark() -> bool:
    """Set the process's high-water mark back; whether that worked."""
    if _mark() is None:
        return False
    try:
        CLEAR.write_text(RESET, encoding="ascii")
    except OSError:
        return False
    return True


def _mark() -> int | None:
    """VmHWM of this process, or None where the system has no such thing."""
    try:
        found = re.search(r"^VmHWM:\s+(\d+) kB$", STATUS.read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def _ever() -> int | None:
    """``ru_maxrss`` of this process, which is in bytes on macOS and in KiB elsewhere; None where there is none."""
    try:
        import resource
    except ImportError:
        return None
    found = int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return found if sys.platform == "darwin" else found * 1024
