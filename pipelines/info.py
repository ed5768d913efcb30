"""What a run holds, read from its run.json alone."""

from __future__ import annotations

from typing import Any

from vqgen.run_folder import RunFolder


def info(run: RunFolder) -> dict[str, Any]:
    """The stages of a run with their figures; ``table`` has a line per stage, ready to print."""
    stages = run.stages()
    return {
        "run": str(run.path),
        "data": run.data_description(),
        "stages": stages,
        "table": [_line(name, record) for name, record in stages.items()],
    }


def _line(name: str, record: dict[str, Any]) -> list[str]:
    if name == "codes":
        counts = ", ".join(f"{count:,} {split}" for split, count in record.get("images", {}).items())
        return [name, "", "", counts]
    figures = record.get("validation", {})
    shown = [
        f"{key.replace('_', ' ')} {figures[key]:.4g}" for key in ("bits_per_code", "mse", "psnr") if key in figures
    ]
    return [name, f"{record.get('steps', 0):,}", f"{record.get('seconds', 0) / 60:.1f}", ", ".join(shown)]


def next_command(run: RunFolder) -> str:
    """The command that takes a run one stage further, without ``vqgen`` and ``--run``."""
    stages = run.stages()
    if "codec" not in stages or "codes" not in stages:
        return "train-codes --resume"
    if not any(stage.startswith("priors/") for stage in stages):
        return "train-prior --prior transformer"
    return "compare" if (run.path / "samples").is_dir() else "sample"
