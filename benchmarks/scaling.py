"""How much faster two processes are than one, stage by stage; and what a step of ImageNet-256 costs.

    OMP_NUM_THREADS=1 python benchmarks/scaling.py --processes 1 2 --json scaling.json
    python benchmarks/scaling.py --cost imagenet256 --json cost.json

The first measures every stage that processes share, on shapes of 32x32, one core a process: the images per second that
each command says at its end, which leave out the start of Python and the reading of the data. The global batch is the
same for any number of processes. All is done in ``--turns``, and the best of each counts. Beside it stands what the
machine itself gives: matrix products of processes that share nothing.

The second builds the codec and the priors of a preset and counts the floating-point operations of one training step
for one image, forward and backward, with torch's own counter (matrix products and convolutions; a multiplication and
an addition are two), and the bytes of float32 that the forward pass keeps for the backward pass. The priors are only
traced, so that they need no memory. ``--time N`` also takes whole steps of N images (forward, backward, Adam) of each
model on ``--device`` in ``--precision``, and says what rate that is, what share of the rate of one large matrix product
there, and how many hours of one such device the preset's own number of steps would take.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from pipelines.settings import new_run_settings
from priors import registry
from priors.base import Prior, PriorSpec
from vqgen.codec import HierarchicalVQVAE
from vqgen.codes import ImageSpec
from vqgen.config import TrainingSettings

ROOT = Path(__file__).resolve().parent.parent
BATCH, STEPS = 64, 60
"""Images a step in all processes together, and steps of each training."""
IMAGES = 2000
SETTINGS = """
data: {source: shapes, image_size: 32, count: %d}
codec:
  {strides: [8, 4], codebook_size: 256, code_dim: 32, width: 64, residual_blocks: 2, residual_width: 32,
   training: {steps: %d, batch_size: %d, evaluate_images: 1, preview_every: 100000}}
run: {priors: [transformer]}
priors:
  transformer: {dim: 128, depth: 4, training: {steps: %d, batch_size: %d, evaluate_images: 1, preview_every: 100000}}
"""


class Timing(NamedTuple):
    """How a step is timed; ``images`` of 0 is not at all."""

    images: int
    device: str
    dtype: str

    def precision(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.dtype == "bf16")

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def launched(processes: int, *arguments: str) -> dict[str, float]:
    """Images per second of what a command under torchrun says that it did."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run(
        [*launcher, "-m", "--", "vqgen", *arguments], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    said = re.findall(r"^(.+): [\d,]+ images in [\d:]+, ([\d,.]+) images/s", done.stderr, re.MULTILINE)
    return {name: float(rate.replace(",", "")) for name, rate in said}


def stages(folder: Path, processes: int, turn: int) -> dict[str, float]:
    """Images per second of every stage."""
    config = folder / f"{processes}.yaml"
    each = BATCH // processes
    config.write_text(SETTINGS % (IMAGES, STEPS, each, STEPS, each), encoding="utf-8")
    more = folder / "more.npz"
    if not more.exists():
        make_images(more, 10 * IMAGES)
    place = ["--run", str(folder / f"{processes}-{turn}")]
    out = str(folder / f"codes-{processes}-{turn}")
    commands = (
        ["train-codes", "--config", str(config)],
        ["train-prior", "--prior", "transformer"],
        ["sample", "--batch-size", "32", "--out", "timed", "-n", "1024"],
        ["score", "--split", "train", "--label", "given", "-n", str(IMAGES)],
        ["encode", "--data", str(more), "--out", out],
    )
    found: dict[str, float] = {}
    for command in commands:
        found |= launched(processes, *command, *place)
    return found


def products(processes: int) -> float:
    """Seconds in which ``processes``, each on a core of its own, do the same matrix products at once."""
    program = (
        "import time, torch; torch.set_num_threads(1); a = torch.rand(1024, 1024)\n"
        "for _ in range(20): a @ a\n"
        "start = time.perf_counter()\n"
        "for _ in range(200): a @ a\n"
        "print(time.perf_counter() - start)"
    )

    command = [sys.executable, "-c", program]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(processes)]
    return max(float(process.communicate()[0]) for process in started)


def shared(numbers: Sequence[int], turns: int) -> dict[str, dict[str, float]]:
    """Images per second of every stage, by number of processes; printed as well."""
    taken: dict[int, list[dict[str, float]]] = {number: [] for number in numbers}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(turns):
            for number in numbers:
                apart = {"matrix products, apart": number / products(number)}
                taken[number].append(apart | stages(Path(folder), number, turn))
    # The best of the turns: other work on the machine only ever takes away.
    best = {
        number: {name: max(turn.get(name, 0.0) for turn in rows) for name in rows[0]} for number, rows in taken.items()
    }
    found = {name: {str(number): best[number].get(name, 0.0) for number in numbers} for name in best[numbers[0]]}
    for name, row in found.items():
        paces = list(row.values())
        shown = "  ".join(f"{pace:8.2f}" for pace in paces)
        print(f"{name:<28} a second {shown}   x {paces[-1] / paces[0]:.2f}")
    return found


def make_images(path: Path, count: int) -> None:
    """``count`` pictures of noise, 32x32."""
    import numpy as np

    np.savez(path, images=np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8))


def cost(preset: str, timing: Timing) -> dict[str, dict[str, Any]]:
    """Of the codec and of each prior of a preset: parameters, operations of a training step for one image, seconds."""
    config = new_run_settings(preset, None)
    size = config.data.image_size
    height, width = size if isinstance(size, tuple) else (size, size)
    spec = ImageSpec(config.data.channels or 3, height, width)
    # The codec's step depends on values (which codes are near), so this one is computed.
    codec = HierarchicalVQVAE(config.codec.architecture, spec)

    def codec_loss(model: HierarchicalVQVAE, count: int, device: str) -> torch.Tensor:
        return model(torch.rand(count, spec.channels, height, width, device=device) * 2 - 1).loss

    row = counted(codec, codec_loss)
    found = {"codec": row | measured(codec, row, codec_loss, timing, config.codec.training)}
    for name in dict.fromkeys(choice for choice in config.run.priors if isinstance(choice, str)):
        for number, level in enumerate(codec.levels):
            settings = registry.prior_settings(name, config.priors.get(name, {}), level.name)
            prior_spec = PriorSpec(level, codec.levels[:number], 1000)

            def loss(model: Prior, count: int, device: str, number: int = number) -> torch.Tensor:
                levels = codec.levels[: number + 1]
                maps = [torch.zeros(count, at.height, at.width, dtype=torch.int64, device=device) for at in levels]
                labels = torch.zeros(count, dtype=torch.int64, device=device)
                return model(maps[-1], tuple(maps[:-1]), labels, player=model.players[0])["loss"]

            with FakeTensorMode():
                row = counted(registry.get(name)(settings.config, prior_spec), loss)
            real = registry.get(name)(settings.config, prior_spec) if timing.images else None
            found[f"{name}, {level.name}"] = row | measured(real, row, loss, timing, settings.training)
    return found


def measured(
    model: Any, row: Mapping[str, Any], loss: Any, timing: Timing, training: TrainingSettings
) -> dict[str, Any]:
    """Seconds and rate of a step whose operations are counted in ``row``, and the hours of the whole training."""
    if not timing.images:
        return {}
    seconds = timed(model, loss, timing)
    images = (training.steps or 0) * training.batch_size * training.accumulate
    return {"seconds": seconds, "flops_per_second": row["flops"] / seconds, "hours": images * seconds / 3600}


def counted(model: Any, loss: Any) -> dict[str, Any]:
    """Parameters; operations of one training step for one image; bytes that its forward pass keeps for the backward."""
    model.train()
    own = {parameter.untyped_storage()._cdata for parameter in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        loss(model, 1, "cpu").backward()
    parameters = sum(p.numel() for p in model.parameters())
    return {"parameters": parameters, "flops": counter.get_total_flops(), "activations": sum(kept.values())}


def timed(model: Any, loss: Any, timing: Timing) -> float:
    """Seconds per image of one training step, the least of three."""
    model.to(timing.device).train()
    model.zero_grad()
    optimizer = torch.optim.Adam(model.parameters())
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        with timing.precision():
            total = loss(model, timing.images, timing.device)
        total.backward()
        optimizer.step()
        model.zero_grad()
        timing.wait()
        best = min(best, (time.perf_counter() - start) / timing.images)
    return best


def matrix_rate(timing: Timing, side: int = 4096) -> float:
    """Operations per second of a product of two large square matrices, the best of five."""
    left, right = torch.rand(2, side, side, device=timing.device)
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        with timing.precision():
            torch.matmul(left, right)
        timing.wait()
        best = max(best, 2 * side**3 / (time.perf_counter() - start))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--turns", type=int, default=3, help="times that every stage is taken; the least counts")
    parser.add_argument("--cost", metavar="PRESET", help="count the operations of a preset instead")
    parser.add_argument("--time", type=int, default=0, metavar="N", help="with --cost, also time a step of N images")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where --time computes")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="in what --time computes")
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    if options.cost:
        timing = Timing(options.time, options.device, options.precision)
        found: dict[str, Any] = cost(options.cost, timing)
        rate = matrix_rate(timing) if timing.images else 0.0
        for name, row in found.items():
            size = f"{row['parameters'] / 1e6:8.1f} M {row['flops'] / 1e9:10.1f} GFLOP"
            print(f"{name:<20} {size} {row['activations'] / 2**20:8.0f} MiB an image", end="")
            if timing.images:
                pace, hours = row["flops_per_second"], row["hours"]
                print(
                    f" {row['seconds']:9.3f} s, {pace / 1e9:8.1f} GFLOP/s, {pace / rate:4.0%}, {hours:,.0f} h", end=""
                )
            print()
        if timing.images:
            print(f"a product of two matrices of 4096x4096: {rate / 1e9:.1f} GFLOP/s")
            found["matrix product"] = {"flops_per_second": rate}
    else:
        found = dict(shared(options.processes, options.turns))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
