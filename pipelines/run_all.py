"""Every stage of a preset in order, skipping what is finished, ending in the report."""

from __future__ import annotations

import time
from typing import Any

from pipelines.compare import compare
from pipelines.reconstruct import reconstruct
from pipelines.sample import SampleRequest, best_priors, sample
from pipelines.train_codes import train_codes
from pipelines.train_prior import train_prior
from vqgen.code_store import CodeStore
from vqgen.config import Config
from vqgen.console import Console
from vqgen.run_folder import RunFolder


def run_all(run: RunFolder, config: Config, console: Console, *, hint: str = "") -> dict[str, Any]:
    """Train codec and priors, sample, reconstruct and compare; a stage that is finished is skipped.

    Returns:
        Seconds of each stage, the comparison, and where the report and the sample grid are.
    """
    seconds: dict[str, float] = {}

    def timed(stage: str, call: Any) -> Any:
        console.say(f"== {stage}")
        start = time.perf_counter()
        result = call()
        seconds[stage] = round(time.perf_counter() - start, 1)
        return result

    timed("codec and codes", lambda: train_codes(run, config, console, resume=True, hint=hint))
    levels = [level.name for level in CodeStore.load(run.codes).info.levels]
    mixes = [dict.fromkeys(levels, choice) if isinstance(choice, str) else choice for choice in config.run.priors]
    for mix in mixes:
        for level, name in mix.items():
            stage = f"{name}, {level}"
            if stage not in seconds:
                timed(
                    stage, lambda n=name, at=level: train_prior(run, config, n, [at], console, resume=True, hint=hint)
                )
    drawn = timed(
        "samples",
        lambda: sample(
            run,
            SampleRequest(best_priors(run, levels), images=config.run.samples, seed=config.seed),
            "best",
            console,
        ),
    )
    drawn_again = timed("reconstructions", lambda: reconstruct(run, None, "validation", 8, None, console))
    compared = timed("comparison", lambda: compare(run, mixes, console, samples=config.run.samples, seed=config.seed))
    return {
        "run": str(run.path),
        "seconds": seconds,
        "comparison": compared,
        "grid": drawn["grid"],
        "reconstructions": drawn_again["grid"],
        "report": compared["files"]["report.html"],
    }
