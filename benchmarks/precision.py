"""float32 against bfloat16, float16 and compiled: what each learns, and how fast its steps are.

    python benchmarks/precision.py --config shapes --seeds 3 --json results/precision.json

Learned: for each seed and each contestant of ``--train``, a codec and a prior on the codes of that seed's float32
codec, with the real loop and equal numbers of steps. Their figures on test images are computed in float32 from the
exported weights: MSE on the [0, 1] pixel scale and perplexity per level, bits per code of the prior's level. A figure's
difference to float32 is that of the same seed, and stands with its standard error over the seeds; the spread of
float32 itself over the seeds is the noise that it is to be held against.

Fast: whole steps (forward, backward, Adam, codebook) of the contestants of ``--time`` on the same batches, in turns, so
that a noisy machine is noisy for all; the fastest of the rounds counts. The seconds that compiling takes at the start
are given apart.

``fp16`` needs a GPU. A contestant that torch.compile cannot serve here is said so, and timed as it runs.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import send_to_device
from torch import Tensor

from pipelines.run_codes import code_batches, open_codes
from pipelines.settings import new_run_settings
from pipelines.train_codes import make_task, train_codes
from pipelines.train_prior import PriorTask, make_prior
from priors import registry
from vqgen.checkpoint import CheckpointStore
from vqgen.codec import HierarchicalVQVAE
from vqgen.compiling import compiled
from vqgen.config import Config
from vqgen.console import Console
from vqgen.data import load_data
from vqgen.images import to_float
from vqgen.metrics import CodeUsage, mse, nats_to_bits
from vqgen.run_folder import RunFolder
from vqgen.task import Task
from vqgen.training import fit, make_accelerator

BATCH = 250
BATCHES = 4
"""Different batches that the steps go round."""


class Contestant(NamedTuple):
    precision: str
    compile: bool

    @property
    def settings(self) -> dict[str, Any]:
        return {"mixed_precision": self.precision, "compile": self.compile}


CONTESTANTS = {
    "fp32": Contestant("no", False),
    "bf16": Contestant("bf16", False),
    "fp16": Contestant("fp16", False),
    "compiled": Contestant("no", True),
    "bf16-compiled": Contestant("bf16", True),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def settings_of(arguments: argparse.Namespace, contestant: Contestant, seed: int) -> Config:
    sets = [f"codec.training.{key}={str(value).lower()}" for key, value in contestant.settings.items()]
    sets += [f"codec.training.steps={arguments.steps}", *arguments.sets]
    return new_run_settings(arguments.config, arguments.data, sets, seed=seed)


@torch.no_grad()
def codec_figures(codec: HierarchicalVQVAE, config: Config) -> dict[str, float]:
    """Test MSE, and the perplexity of each level over the same images."""
    split = load_data(config.data, config.seed).splits["test"]
    usage = [CodeUsage(level.codebook_size) for level in codec.levels]
    errors = []
    for start in range(0, len(split), BATCH):
        images = to_float(split.__getitems__(list(range(start, min(start + BATCH, len(split)))))["images"])
        codes = codec.encode(images)
        errors.append(mse(codec.decode(codes), images))
        for level, maps in zip(usage, codes, strict=True):
            level.add(maps)
    perplexity = {f"{spec.name}_perplexity": u.perplexity for spec, u in zip(codec.levels, usage, strict=True)}
    return {"test_mse": float(torch.cat(errors).mean()), **perplexity}


def prior_task(run: RunFolder, config: Config, name: str, training: dict[str, Any]) -> tuple[PriorTask, Any, Any]:
    """The finest level's prior as `train_prior` makes it, its training settings, and the codes."""
    codec, store = open_codes(run)
    level = len(store.info.levels) - 1
    settings = registry.prior_settings(name, config.priors.get(name, {}), store.info.levels[level].name)
    budget = {"steps": None, "minutes": None, "epochs": None, **training}
    chosen = type(settings.training)(**{**settings.training.model_dump(), **budget})
    accelerator = make_accelerator(chosen, len(registry.get(name).players))
    prior = make_prior(name, settings, config.seed, codec, store, level, accelerator)
    return PriorTask(prior, level, config.seed, lambda model: None), chosen, store  # type: ignore[arg-type, return-value]


@torch.no_grad()
def prior_figures(task: PriorTask, store: Any) -> dict[str, float]:
    """Bits per code of the test images."""
    nats, count = 0.0, 0
    for codes, context, label in code_batches(store.split("test"), task.level, device=task.model.device):
        nats -= float(task.model.log_prob(codes, context, label).nats.sum())
        count += codes.numel()
    return {"bits_per_code": nats_to_bits(nats / count)}


def learned(arguments: argparse.Namespace, name: str, seed: int, console: Console) -> dict[str, float]:
    """Train a codec and a prior, and return what they are worth on test images."""
    contestant = CONTESTANTS[name]
    config = settings_of(arguments, contestant, seed)
    run = RunFolder(arguments.run / f"{name}-{seed}")
    train_codes(run, config, console, resume=run.exists)
    figures = codec_figures(HierarchicalVQVAE.from_pretrained(run.codec), config)
    codes = RunFolder(arguments.run / f"fp32-{seed}")  # the same for all contestants
    training = {**contestant.settings, "steps": arguments.prior_steps}
    task, chosen, store = prior_task(codes, config, arguments.prior, training)
    folder = run.path / "prior"
    fit(
        task,
        store.split("train"),
        store.split("validation"),
        chosen,
        folder,
        seed=seed,
        identity={},
        accelerator=make_accelerator(chosen, len(task.players)),
        console=console,
        resume=CheckpointStore(folder / "checkpoints", 1).latest() is not None,
        description=f"{arguments.prior}, {name}",
    )
    return {**figures, **prior_figures(task, store)}


def steps_of(task: Task, batches: Sequence[Any], precision: str, device: torch.device) -> Iterator[None]:
    """Whole training steps, one each time it is asked for the next."""
    optimizer = torch.optim.Adam(task.model.parameters(), lr=3e-4)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    step = 0
    while True:
        dtype = DTYPES.get(precision)
        with nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype):
            loss = task(batches[step % len(batches)], task.players[0], 0.5, step)["loss"]
        scaler.scale(loss.float()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            task.after_step(task.players[0], step)
        if device.type == "cuda":
            torch.cuda.synchronize()
        step += 1
        yield


def timed(tasks: dict[str, Task], batches: Sequence[Any], rounds: int, steps: int, console: Console) -> dict[str, Any]:
    """Seconds of a step of each contestant, the least of the rounds, and of its first one, with what it compiles."""
    device = next(next(iter(tasks.values())).parameters()).device
    seconds: dict[str, float] = dict.fromkeys(tasks, float("inf"))
    first: dict[str, float] = {}
    with ExitStack() as stack:
        going = {}
        for name, task in tasks.items():
            if CONTESTANTS[name].compile:
                stack.enter_context(compiled(task.compilable(), console.warn))
            going[name] = steps_of(task.train(), batches, CONTESTANTS[name].precision, device)
            start = time.perf_counter()
            next(going[name])
            first[name] = time.perf_counter() - start
            next(going[name])
        for _ in range(rounds):
            for name, stepping in going.items():
                start = time.perf_counter()
                for _ in range(steps):
                    next(stepping)
                seconds[name] = min(seconds[name], (time.perf_counter() - start) / steps)
    base = seconds.get("fp32", next(iter(seconds.values())))
    return {
        name: {"step_seconds": seconds[name], "speed": base / seconds[name], "first_step_seconds": first[name]}
        for name in tasks
    }


def fast(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """The speed of codec and prior; the codes are those of the float32 codec of the first seed."""
    config = settings_of(arguments, CONTESTANTS["fp32"], 0)
    data = load_data(config.data, config.seed)
    size = config.codec.training.batch_size
    device = make_accelerator(config.codec.training).device

    def fetched(split: Any, batch_size: int) -> list[Any]:
        rows = [list(range(start, start + batch_size)) for start in range(0, BATCHES * batch_size, batch_size)]
        return [send_to_device(split.__getitems__(part), device) for part in rows]

    def codec_task() -> Task:
        torch.manual_seed(0)
        return make_task(HierarchicalVQVAE(config.codec.architecture, data.image).to(device), config, data)

    codecs = {name: codec_task() for name in arguments.time}
    result = {"codec": timed(codecs, fetched(data.splits["train"], size), arguments.rounds, 5, console)}
    run = RunFolder(arguments.run / "fp32-0")
    priors: dict[str, Task] = {}
    for name in arguments.time:
        priors[name], chosen, store = prior_task(run, config, arguments.prior, {"steps": 1})
    batches = fetched(store.split("train"), chosen.batch_size)
    result[arguments.prior] = timed(priors, batches, arguments.rounds, 5, console)
    return result


def summarised(figures: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, dict[str, float | None]]]:
    """Mean and spread over the seeds, and the difference to float32 of the same seed with its standard error."""
    table: dict[str, dict[str, dict[str, float | None]]] = {}
    for name, seeds in figures.items():
        table[name] = {}
        for key in seeds[0]:
            values = [own[key] for own in seeds]
            pairs = [own[key] - other[key] for own, other in zip(seeds, figures["fp32"], strict=True)]
            several = len(values) > 1
            table[name][key] = {
                "mean": statistics.mean(values),
                "spread": statistics.stdev(values) if several else None,
                "difference": statistics.mean(pairs),
                "standard_error": statistics.stdev(pairs) / len(pairs) ** 0.5 if several else None,
            }
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="shapes")
    parser.add_argument("--data", help="images, for a preset without images of its own")
    parser.add_argument("--set", action="append", default=[], dest="sets", help="KEY=VALUE for all")
    parser.add_argument("--run", default="runs/precision", type=Path)
    parser.add_argument("--steps", type=int, default=600, help="of each codec")
    parser.add_argument("--prior", default="pixelcnn")
    parser.add_argument("--prior-steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train", nargs="+", default=["fp32", "bf16"], choices=CONTESTANTS)
    parser.add_argument("--time", nargs="+", default=["fp32", "bf16", "compiled", "bf16-compiled"], choices=CONTESTANTS)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console = Console()
    trained = list(dict.fromkeys(["fp32", *arguments.train]))
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in trained}
    for seed in range(arguments.seeds):
        for name in trained:
            figures[name].append(learned(arguments, name, seed, console))
    table = summarised(figures)
    line = "{:<14} {:<20} {:>12} {:>12} {:>12} {:>12}"
    print(line.format("", "", "mean", "spread", "difference", "std. error"))
    for name, rows in table.items():
        for key, row in rows.items():
            print(line.format(name, key, *("-" if value is None else f"{value:.5g}" for value in row.values())))
    speed = fast(arguments, console)
    for model, rows in speed.items():
        for name, row in rows.items():
            text = f"{1000 * row['step_seconds']:.1f} ms a step, {row['speed']:.2f} times fp32"
            print(f"{model:<14} {name:<14} {text}; first step {row['first_step_seconds']:.1f} s")
    if arguments.json:
        device: Tensor | str = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
        machine = {"device": device, "threads": arguments.threads, "torch": torch.__version__}
        given = {key: value for key, value in vars(arguments).items() if not isinstance(value, Path)}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        written = {"learned": table, "seeds": figures, "speed": speed, "machine": machine, "arguments": given}
        arguments.json.write_text(json.dumps(written, indent=2) + "\n")


if __name__ == "__main__":
    main()
