"""Every stage of a preset in order, skipping what is finished, ending in the report."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from accelerate import PartialState

from pipelines.compare import compare
from pipelines.reconstruct import reconstruct
from pipelines.sample import SampleRequest, best_priors, sample
from pipelines.train_codes import train_codes
from pipelines.train_prior import train_prior
from vqgen.codes import level_names
from vqgen.config import Config
from vqgen.console import Console
from vqgen.run_folder import RunFolder


def run_all(
    run: RunFolder, config: Config, console: Console, *, overwrite: bool = False, hint: str = ""
) -> dict[str, Any]:
    """Train codec and priors, sample, reconstruct and compare; a stage that is finished is skipped.

    Under a launcher all processes train, and the first one does the rest; the others return nothing.

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
            train = partial(train_prior, run, config, name, [level], console)
            timed(f"{name}, {level}", partial(train, resume=True, keep_finished=True, hint=hint))
    if not PartialState().is_main_process:
        return {}
    request = SampleRequest(best_priors(run, levels), images=config.run.samples, seed=config.seed)
    drawn = timed("samples", partial(sample, run, request, "best", console))
    shown = timed("reconstructions", partial(reconstruct, run, None, "validation", 8, None, console))
    sized = partial(compare, samples=config.run.samples, seed=config.seed)
    compared = timed("comparison", partial(sized, run, mixes, console))
    return {
        "run": str(run.path),
        "seconds": seconds,
        "comparison": compared,
        "grid": drawn["grid"],
        "reconstructions": shown["grid"],
        "report": compared["files"]["report.html"],
    }
