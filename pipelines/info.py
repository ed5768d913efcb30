"""What a run holds, read from its record; and what of it was only begun, from its checkpoints."""

from __future__ import annotations

from typing import Any

from vqgen.checkpoint import CheckpointStore
from vqgen.codes import MAX_LEVELS, level_names
from vqgen.run_folder import RunFolder

LEVELS = level_names(MAX_LEVELS)


def info(run: RunFolder) -> dict[str, Any]:
    """The stages of a run with their figures; ``table`` has a line per stage, ready to print."""
    stages = run.stages()
    return {
        "run": str(run.path),
        "data": run.data_description(),
        "stages": stages,
        "table": [_line(name, record) for name, record in stages.items()] + _begun(run),
    }


def _begun(run: RunFolder) -> list[list[str]]:
    """A line for each training that has a checkpoint and is not done, and for codes that are not there yet."""
    stages = run.stages()
    lines = []
    for folder in (run.codec, *sorted(run.path.glob("priors/*/*"))):
        name = folder.relative_to(run.path).as_posix()
        newest = CheckpointStore(folder / "checkpoints", keep=1).latest()
        if name not in stages and newest is not None:
            step = newest.name.rpartition("-")[2].lstrip("0") or "0"
            lines.append([name, f"at {step}", "", "not done: --resume goes on from its checkpoint"])
    if "codec" in stages and "codes" not in stages:
        lines.append(["codes", "", "", "not done: train-codes --resume goes on"])
    return lines


def _line(name: str, record: dict[str, Any]) -> list[str]:
    if name == "codes":
        counts = ", ".join(f"{count:,} {split}" for split, count in record.get("images", {}).items())
        return [name, "", "", counts]
    figures = record.get("validation", {})
    keys = ("bits_per_code", "mse", "psnr", "accuracy")
    shown = [f"{key.replace('_', ' ')} {figures[key]:.4g}" for key in keys if figures.get(key) is not None]
    return [name, f"{record.get('steps', 0):,}", f"{record.get('seconds', 0) / 60:.1f}", ", ".join(shown)]


def next_command(run: RunFolder) -> str:
    """The command that takes a run one stage further, without ``vqgen`` and ``--run``."""
    stages = run.stages()
    if "codec" not in stages or "codes" not in stages:
        return "train-codes --resume"
    trained = [stage.split("/") for stage in stages if stage.startswith("priors/")]
    missing = [level for level in LEVELS if level in stages["codes"] and level not in {level for *_, level in trained}]
    if not trained:
        return "train-prior --prior transformer"
    if missing:
        return f"train-prior --prior {trained[-1][1]} --level {missing[0]}"
    return "compare" if (run.path / "samples").is_dir() else "sample"
