"""Every stage of a preset in order, skipping what is finished, ending in the report."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from itertools import takewhile
from typing import Any

from pipelines.compare import compare
from pipelines.comparison_quality import QualityRequest
from pipelines.processes import join
from pipelines.reconstruct import reconstruct
from pipelines.sample import SampleRequest, best_priors, sample, trained_priors
from pipelines.train_codes import train_codes
from pipelines.train_prior import train_prior
from vqgen.codes import level_names
from vqgen.config import Config
from vqgen.console import Console, first_process
from vqgen.errors import ConfigError, DivergedError
from vqgen.run_folder import RunFolder

COMPARED = 500
"""Samples of each row that the comparison at the end measures: fewer than `vqgen compare` takes, which may be asked
for more, and for the classification accuracy score, at any time."""


def run_all(
    run: RunFolder, config: Config, console: Console, *, overwrite: bool = False, hint: str = ""
) -> dict[str, Any]:
    """Train codec and priors, sample, reconstruct and compare; a stage that is finished is skipped.

    The processes of a launcher share every stage but the reconstructions. The first one writes, and the others return
    nothing.

    Returns:
        Seconds of each stage, the comparison, and where the report and the sample grid are.
    """
    seconds: dict[str, float] = {}

    def timed(stage: str, call: Callable[[], Any]) -> Any:
        console.say(f"== {stage}")
        start = time.perf_counter()
        result = call()
        seconds[stage] = round(time.perf_counter() - start, 1)
        return result

    timed("codec and codes", partial(train_codes, run, config, console, resume=True, overwrite=overwrite, hint=hint))
    levels = level_names(len(config.codec.strides))
    mixes = [dict.fromkeys(levels, choice) if isinstance(choice, str) else choice for choice in config.run.priors]
    for level in levels:
        for name in dict.fromkeys(mix[level] for mix in mixes if level in mix):
            timed(f"{name}, {level}", partial(_train, run, config, name, level, console, hint))
    covered = list(takewhile(trained_priors(run).__contains__, levels))
    best = join().decided(best_priors(run, covered))
    request = SampleRequest(best, images=config.run.samples, seed=config.seed)
    drawn = timed("samples", partial(sample, run, request, "best", console)) if best else {"grid": None}
    source = config.data.source
    shown = {}
    with join().together():
        if first_process():
            shown = timed("reconstructions", partial(reconstruct, run, source, "validation", 8, None, console))
    quality = QualityRequest(samples=max(config.run.samples, COMPARED), cas=False)
    sized = partial(compare, quality=quality, seed=config.seed, source=source)
    compared = timed("comparison", partial(sized, run, mixes, console))
    if not compared:
        return {}
    return {
        "run": str(run.path),
        "seconds": seconds,
        "comparison": compared,
        "grid": drawn["grid"],
        "reconstructions": shown["grid"],
        "report": compared["files"]["report.html"],
    }


def _train(run: RunFolder, config: Config, name: str, level: str, console: Console, hint: str) -> None:
    try:
        train_prior(run, config, name, [level], console, resume=True, keep_finished=True, hint=hint)
    except (ConfigError, DivergedError) as error:
        alone = run.command(f"train-prior --prior {name} --level {level} --overwrite")
        raise type(error)(error.message, f"To redo this prior alone: `{alone}`.") from error
