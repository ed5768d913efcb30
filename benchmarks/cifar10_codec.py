"""The codec of the ``cifar10`` preset after 600 steps, and its speed beside a one-hot EMA quantiser.

Trains with the real loop, then measures test MSE on the [0, 1] pixel scale and the perplexity of both levels over
the first 2,000 test images. The speed is of whole training steps on the same batches, the two quantisers taking
turns, so that a noisy machine is noisy for both; the fastest of the repeats counts.

    python benchmarks/cifar10_codec.py --data PARQUET_FOLDER --run runs/cifar10 --json results/cifar10.json
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from pipelines.settings import new_run_settings
from pipelines.train_codes import train_codes
from vqgen.codec import HierarchicalVQVAE
from vqgen.config import Config
from vqgen.console import Console
from vqgen.data import load_data
from vqgen.images import to_float
from vqgen.metrics import CodeUsage, mse
from vqgen.quantizer import Quantized
from vqgen.run_folder import RunFolder

TEST_IMAGES = 2000


class OneHotQuantizer(nn.Module):
    """The usual EMA quantiser: all distances at once, a one-hot matrix, and sums by matrix products."""

    def __init__(self, codebook_size: int, code_dim: int, commitment: float, decay: float) -> None:
        super().__init__()
        self.commitment, self.decay = commitment, decay
        self.register_buffer("codebook", torch.randn(codebook_size, code_dim))
        self.register_buffer("counts", torch.zeros(codebook_size))
        self.register_buffer("sums", self.codebook.clone())

    def forward(self, z: Tensor) -> Quantized:
        flat = rearrange(z, "b d h w -> (b h w) d")
        distances = flat.square().sum(1, keepdim=True) - 2 * flat @ self.codebook.T + self.codebook.square().sum(1)
        codes = distances.argmin(1)
        one_hot = F.one_hot(codes, len(self.codebook)).to(flat.dtype)
        if self.training:
            with torch.no_grad():
                self.counts.mul_(self.decay).add_(one_hot.sum(0), alpha=1 - self.decay)
                self.sums.mul_(self.decay).add_(one_hot.T @ flat, alpha=1 - self.decay)
                total = self.counts.sum()
                smoothed = (self.counts + 1e-5) / (total + len(self.codebook) * 1e-5) * total
                self.codebook.copy_(self.sums / smoothed[:, None])
        found = rearrange(one_hot @ self.codebook, "(b h w) d -> b d h w", b=z.shape[0], h=z.shape[2])
        loss = self.commitment * F.mse_loss(z, found.detach())
        return Quantized(z + (found - z).detach(), codes.view(z.shape[0], *z.shape[2:]), loss)

    def update(self, step: int) -> dict[str, Tensor]:
        return {}


def seconds_of_steps(
    model: HierarchicalVQVAE, optimizer: torch.optim.Optimizer, batches: list[Tensor], first: int
) -> float:
    start = time.perf_counter()
    for step, batch in enumerate(batches, first):
        optimizer.zero_grad()
        model(batch).loss.backward()
        optimizer.step()
        model.update(step)
    return time.perf_counter() - start


def compare_speed(config: Config, batches: list[Tensor], model: HierarchicalVQVAE, repeats: int) -> dict[str, float]:
    """Images a second of training with our quantiser and with the one-hot one, in turns on the same batches."""
    other = HierarchicalVQVAE(config.codec.architecture, model.spec)
    for index, quantizer in enumerate(other.quantizers):
        assert isinstance(quantizer.codebook, Tensor)
        size, dim = quantizer.codebook.shape
        other.quantizers[index] = OneHotQuantizer(size, dim, config.codec.per_level("commitment")[index], 0.99)
    contestants = {"ours": model.train(), "one_hot": other.train()}
    optimizers = {name: torch.optim.Adam(net.parameters(), lr=3e-4) for name, net in contestants.items()}
    best = dict.fromkeys(contestants, float("inf"))
    for repeat in range(repeats + 1):
        for name, net in contestants.items():
            seconds = seconds_of_steps(net, optimizers[name], batches, repeat * len(batches))
            if repeat:  # the first round warms up, and initialises our codebook
                best[name] = min(best[name], seconds)
    images = sum(len(batch) for batch in batches)
    return {name: images / seconds for name, seconds in best.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="CIFAR-10 as a data source, such as a folder of parquet files")
    parser.add_argument("--run", default="runs/cifar10", type=Path)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1, help="threads of the speed comparison")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    run, console = RunFolder(arguments.run), Console()
    config = new_run_settings("cifar10", arguments.data, [f"codec.training.steps={arguments.steps}"])
    record = train_codes(run, config, console, resume=True)
    codec = HierarchicalVQVAE.from_pretrained(run.codec)
    data = load_data(config.data, config.seed)
    usage = [CodeUsage(level.codebook_size) for level in codec.levels]
    errors = []
    for start in range(0, TEST_IMAGES, 250):
        images = to_float(data.splits["test"].__getitems__(range(start, start + 250))["images"])
        codes = codec.encode(images)
        errors.append(mse(codec.decode(codes), images))
        for level, level_codes in zip(usage, codes, strict=True):
            level.add(level_codes)
    result = {
        "steps": record["steps"],
        "seconds": record["seconds"],
        "test_mse": float(torch.cat(errors).mean()),
        **{f"{spec.name}_perplexity": level.perplexity for spec, level in zip(codec.levels, usage, strict=True)},
    }
    torch.set_num_threads(arguments.threads)
    batch_size = config.codec.training.batch_size
    batches = [
        to_float(data.splits["train"].__getitems__(range(start, start + batch_size))["images"])
        for start in range(0, 5 * batch_size, batch_size)
    ]
    speed = compare_speed(config, batches, HierarchicalVQVAE(config.codec.architecture, data.image), arguments.repeats)
    result |= {f"{name}_images_per_second": rate for name, rate in speed.items()}
    result |= {"speedup": speed["ours"] / speed["one_hot"], "threads": arguments.threads}
    for key, value in result.items():
        print(f"{key:<28} {value:.5g}")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
