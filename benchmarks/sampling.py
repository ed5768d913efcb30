"""How fast the autoregressive priors sample: with caches, without, and beside x-transformers' own cache.

    python benchmarks/sampling.py --json sampling.json

Untrained networks of about 4 million parameters, unconditional, 512 codes, one thread: what a code costs does not
depend on what the weights are. For each prior and size of map, milliseconds per image of

- cached: ``prior.sample``, that is its own stepper and the drawing of codes;
- uncached: the same with a whole parallel pass for each code. Every pass costs the same, so at large maps only a
  few evenly spaced codes are timed and scaled up; ``uncached_measured_steps`` says how many;
- peer: the transformer's network with the cache that x-transformers comes with, and the same drawing of codes.

Making the caches is in the time. The ways take turns within a repeat and the least time of each counts, since other
work on the machine can only add to it. Before timing, all ways must give the same logits on the first codes.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from priors.base import AutoregressivePrior, PriorSpec, ReplayStepper, Stepper
from priors.registry import get
from priors.sampling import Noise, draw
from priors.transformer import Transformer
from priors.transformer_step import LibraryStepper
from vqgen.codes import LevelSpec

PRIORS: dict[str, dict[str, Any]] = {
    "pixelcnn": {"width": 128, "blocks": 10},
    "transformer": {"dim": 256, "depth": 6},
}
CODEBOOK_SIZE = 512
CHECKED_STEPS = 16
UNCACHED_CODES = 2048
"""Codes of one image that the uncached way computes in one repeat: the number of passes is this over h * w."""


def walk(stepper: Stepper, uniforms: Tensor) -> None:
    """Draw the codes of a batch of maps, one after another, with uniforms (B, h * w)."""
    previous: Tensor | None = None
    for u in uniforms.unbind(1):
        previous = draw(stepper.step(previous), u)


def walk_some(stepper: ReplayStepper, uniforms: Tensor, positions: Sequence[int]) -> None:
    """The same for some positions only."""
    for position in positions:
        stepper.position = position
        draw(stepper.step(None), uniforms[:, position])


def check_agreement(steppers: dict[str, Stepper], batch_size: int, positions: int) -> None:
    """Walk all steppers along the same codes.

    Raises:
        AssertionError: they differ by more than rounding.
    """
    previous: Tensor | None = None
    for position in range(min(positions, CHECKED_STEPS)):
        logits = {way: stepper.step(previous) for way, stepper in steppers.items()}
        for way, values in logits.items():
            difference = (values - logits["uncached"]).abs().max().item()
            assert difference < 1e-3, f"{way} differs from uncached by {difference:.2g} at position {position}"
        previous = (torch.arange(batch_size) * 7 + position * 13) % CODEBOOK_SIZE


@torch.inference_mode()
def measure(name: str, size: int, batch_size: int, repeats: int) -> dict[str, Any]:
    """One row: milliseconds per image of each way of sampling size x size codes."""
    torch.manual_seed(0)
    spec = PriorSpec(LevelSpec("top", size, size, CODEBOOK_SIZE, 64))
    prior = get(name)(PRIORS[name], spec).eval()
    assert isinstance(prior, AutoregressivePrior)
    positions = spec.target.positions
    noise = Noise(seed=0, indices=tuple(range(batch_size)), level=0)
    uniforms = noise.uniform("codes", positions)
    passes = min(positions, max(2, UNCACHED_CODES // positions))
    some = [index * positions // passes for index in range(passes)]

    steppers: dict[str, Stepper] = {
        "uncached": ReplayStepper(prior, batch_size, (), None),
        "cached": prior.stepper(batch_size),
    }
    ways: dict[str, tuple[float, Callable[[], object]]] = {  # factor to a whole map, what to time
        "cached": (1.0, lambda: prior.sample(noise)),
        "uncached": (
            positions / passes,
            lambda: walk_some(ReplayStepper(prior, batch_size, (), None), uniforms, some),
        ),
    }
    if isinstance(prior, Transformer):
        transformer = prior

        def library() -> LibraryStepper:
            return LibraryStepper(transformer.net, CODEBOOK_SIZE, transformer.embeds((), None, batch_size))

        steppers["peer_cached"] = library()
        ways["peer_cached"] = (1.0, lambda: walk(library(), uniforms))
    check_agreement(steppers, batch_size, positions)

    best = dict.fromkeys(ways, float("inf"))
    for _ in range(repeats):
        for way, (factor, run) in ways.items():
            start = time.perf_counter()
            run()
            best[way] = min(best[way], (time.perf_counter() - start) * factor)
    per_image = {way: 1e3 * seconds / batch_size for way, seconds in best.items()}
    peer = per_image.get("peer_cached")
    return {
        "prior": name,
        "height": size,
        "width": size,
        "parameters": sum(parameter.numel() for parameter in prior.parameters()),
        "cached_ms_per_image": per_image["cached"],
        "uncached_ms_per_image": per_image["uncached"],
        "uncached_measured_steps": passes,
        "peer_cached_ms_per_image": peer,
        "speedup_over_uncached": per_image["uncached"] / per_image["cached"],
        "speedup_over_peer": None if peer is None else peer / per_image["cached"],
    }


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """The rows on stdout, one line each."""
    line = "{:<12} {:>7} {:>11} {:>10} {:>10} {:>10} {:>12} {:>8}"
    print("milliseconds per image")
    print(line.format("prior", "map", "parameters", "cached", "uncached", "(speedup)", "x-transf.", "(speedup)"))
    for row in rows:
        peer, gain = row["peer_cached_ms_per_image"], row["speedup_over_peer"]
        print(
            line.format(
                row["prior"],
                f"{row['height']}x{row['width']}",
                f"{row['parameters']:,}",
                f"{row['cached_ms_per_image']:.1f}",
                f"{row['uncached_ms_per_image']:.1f}",
                f"{row['speedup_over_uncached']:.1f}",
                "-" if peer is None else f"{peer:.1f}",
                "-" if gain is None else f"{gain:.2f}",
            )
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows and the setting here")
    parser.add_argument("--priors", nargs="+", choices=sorted(PRIORS), default=sorted(PRIORS))
    parser.add_argument(
        "--sizes", nargs="+", type=int, default=[8, 16, 32], help="sides of the maps (default: 8 16 32)"
    )
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in arguments.priors:
        for size in arguments.sizes:
            print(f"measuring {name} at {size}x{size}", file=sys.stderr, flush=True)
            rows.append(measure(name, size, arguments.batch_size, arguments.repeats))
    print_table(rows)
    if arguments.json:
        setting = {
            "batch_size": arguments.batch_size,
            "codebook_size": CODEBOOK_SIZE,
            "repeats": arguments.repeats,
            "threads": torch.get_num_threads(),
            "dtype": "float32",
            "device": "cpu",
            "processor": platform.processor() or platform.machine(),
            "python": platform.python_version(),
            "torch": version("torch"),
            "x_transformers": version("x-transformers"),
        }
        arguments.json.write_text(json.dumps({"setting": setting, "rows": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
