"""Time and memory of one training step of the quantiser, beside vector-quantize-pytorch's.

    python benchmarks/quantizer.py --json quantizer.json

A step quantises a (16, 64, 32, 32) float32 feature map (16,384 vectors of width 64), goes backward through the
output and the commitment loss, and moves the codebook by moving averages. One thread. The two take turns, and the
least time of each counts. Ours runs as it does by default, revival included. The peer is `VectorQuantize(dim=64,
codebook_size=K, decay=0.99, commitment_weight=0.25, kmeans_init=False, rotation_trick=False)`: without the
rotation trick, on by default there, both compute the same gradient, and the peer is the faster for it.

Memory is what the resident set's peak gains over its size before, in a process of its own for each measurement,
with the input in place and one small step done. It covers the first two steps, ours with its k-means, and counts
the output and the gradient of the input (4 MiB each). Linux only; elsewhere it is null.

This measures speed and memory only, not how good a codebook is.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SIZES = (512, 8192)
WIDTH = 64
SHAPE = (16, WIDTH, 32, 32)
PEER = {"decay": 0.99, "commitment_weight": 0.25, "kmeans_init": False, "rotation_trick": False}

Step = Callable[[Tensor], None]


def our_step(codebook_size: int) -> Step:
    from vqgen.quantizer import VectorQuantizer

    quantizer = VectorQuantizer(codebook_size, WIDTH)
    steps = iter(range(10**9))

    def step(z: Tensor) -> None:
        z.grad = None
        out = quantizer(z)
        (out.z.square().mean() + out.loss).backward()
        quantizer.update(next(steps))

    return step


def peer_step(codebook_size: int) -> Step:
    from vector_quantize_pytorch import VectorQuantize

    quantizer = VectorQuantize(dim=WIDTH, codebook_size=codebook_size, accept_image_fmap=True, **PEER)

    def step(z: Tensor) -> None:
        z.grad = None
        out, _, loss = quantizer(z)
        (out.square().mean() + loss.sum()).backward()

    return step


STEPS = {"ours": our_step, "peer": peer_step}


def times(codebook_size: int, repeats: int) -> dict[str, float]:
    """Least milliseconds of a step, over ``repeats`` in which the two take turns after one step to warm up."""
    steps = {name: make(codebook_size) for name, make in STEPS.items()}
    z = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).requires_grad_()
    least = dict.fromkeys(steps, float("inf"))
    for repeat in range(repeats + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step(z)
            if repeat:
                least[name] = min(least[name], 1000 * (time.perf_counter() - start))
    return least


def added_peak(name: str, codebook_size: int) -> float | None:
    """MiB that the peak of this process's resident set gains in two steps; None where the system does not tell."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not (status.exists() and reset.exists()):
        return None

    def resident(field: str) -> int:
        line = next(line for line in status.read_text().splitlines() if line.startswith(field))
        return int(line.split()[1])

    STEPS[name](8)(torch.randn(1, WIDTH, 4, 4, requires_grad=True))
    z = torch.randn(SHAPE).requires_grad_()
    step = STEPS[name](codebook_size)
    reset.write_text("5")  # the peak so far becomes the present size
    before = resident("VmRSS:")
    for _ in range(2):
        step(z)
    return (resident("VmHWM:") - before) / 1024


def added_peak_elsewhere(name: str, codebook_size: int) -> float | None:
    command = [sys.executable, __file__, "--peak-of", name, "--codebook-size", str(codebook_size)]
    answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    peak: float | None = json.loads(answer.splitlines()[-1])
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    parser.add_argument("--repeats", type=int, default=10, help="timed steps of each (default: 10)")
    parser.add_argument("--peak-of", choices=sorted(STEPS), help=argparse.SUPPRESS)
    parser.add_argument("--codebook-size", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peak_of:
        print(json.dumps(added_peak(options.peak_of, options.codebook_size)))
        return

    rows: list[dict[str, Any]] = []
    print(f"{'codes':>7} {'ms':>9} {'peer ms':>9} {'speedup':>8} {'MiB':>7} {'peer MiB':>9}")
    for size in SIZES:
        least = times(size, options.repeats)
        peaks = {name: added_peak_elsewhere(name, size) for name in STEPS}
        row = {
            "codebook_size": size,
            "milliseconds": round(least["ours"], 2),
            "peer_milliseconds": round(least["peer"], 2),
            "speedup": round(least["peer"] / least["ours"], 2),
            "peak_mib": None if peaks["ours"] is None else round(peaks["ours"], 1),
            "peer_peak_mib": None if peaks["peer"] is None else round(peaks["peer"], 1),
        }
        rows.append(row)
        shown = ["-" if row[key] is None else f"{row[key]:,.1f}" for key in list(row)[1:]]
        print("{:>7,} {:>9} {:>9} {:>8} {:>7} {:>9}".format(size, *shown))
    setting = {
        "vectors": SHAPE[0] * SHAPE[2] * SHAPE[3],
        "width": WIDTH,
        "dtype": "float32",
        "threads": torch.get_num_threads(),
        "repeats": options.repeats,
        "peer": {"package": "vector-quantize-pytorch", "version": version("vector-quantize-pytorch"), **PEER},
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
    print(
        f"{setting['vectors']:,} vectors of width {WIDTH}, float32, {setting['threads']} thread, torch "
        f"{torch.__version__}, vector-quantize-pytorch {setting['peer']['version']}; least of {options.repeats}."
    )
    if options.json:
        options.json.write_text(json.dumps({"rows": rows, "setting": setting}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
