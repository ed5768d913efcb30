"""Random SIGKILLs over a codec and a prior training: each run goes on, and ends in the bits of one that was not broken.

For each number of processes the codec (training and encoding) and a prior of two levels are trained once without a
break. Then each is trained again, and killed at random moments, three in four of them within the training, the others
anywhere from the start of the program; after each kill the same command is given with ``--resume``. When enough kills
have hit, it is left to finish. What is compared, byte for byte: the weights, the last checkpoint (weights, optimiser,
best weights, random states), the codes, and metrics.jsonl but for its seconds.

    python benchmarks/kill.py --kills 20 --processes 1 2 --json results/kill.json

Exits with 1 if a resumed command fails or anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = """
data: {source: shapes, image_size: 16, count: 300, flip: true}
codec:
  strides: [8, 4]
  codebook_size: 32
  code_dim: 8
  width: 16
  residual_blocks: 1
  residual_width: 8
  training: {steps: STEPS, batch_size: 16, evaluate_every: 40, checkpoint_every: 10, log_every: 5, weight_ema: 0.99}
priors:
  pixelcnn:
    width: 16
    blocks: 2
    training: {steps: STEPS, batch_size: 16, evaluate_every: 40, checkpoint_every: 10, log_every: 5, clip: 1.0}
"""
PATIENCE = 600.0
"""Seconds after which a command that has not ended counts as hung."""
INSIDE = 0.75
"""Share of the kills that wait for the training to begin."""


@dataclass(frozen=True)
class Stage:
    """A command that is killed."""

    name: str
    arguments: tuple[str, ...]
    place: str = "--run"
    """The option that names where its results go."""
    again: tuple[str, ...] = ("--resume",)
    """What is added to go on."""


CODEC = Stage("codec", ("train-codes", "--config", "kill.yaml"))
PRIOR = Stage("prior", ("train-prior", "--prior", "pixelcnn"))
COMPARED = (
    "model.safetensors",
    "config.json",
    "metrics.json",
    "metrics.jsonl",
    "codes/**/*",
    "checkpoints/step-*/*.safetensors",
)
"""Files of a run that must be the same."""


def notes(run: Path) -> dict[Path, str]:
    """What the lock files of a run's trainings say: something new when a training has begun."""
    return {path: path.read_text() for path in run.glob("**/checkpoints/.lock")}


def launch(stage: Stage, run: Path, processes: int, resume: bool) -> subprocess.Popen[bytes]:
    """Start the stage's command on ``run``; what it says goes to a file beside it."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m", "--"]
    # After "--", since the launcher would take --run for one of its own.
    command = [sys.executable, *(launcher if processes > 1 else ["-m"]), "vqgen"]
    command += [*stage.arguments, stage.place, str(run), *(stage.again if resume else ())]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    with run.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(command, cwd=run.parent, env=environment, stdout=log, stderr=log)


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL for a process and all that it has started."""
    try:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        family = []
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()
    psutil.wait_procs(family, timeout=30)


def finish(stage: Stage, run: Path, processes: int, resume: bool) -> tuple[float, float]:
    """Let the command end; seconds until its training began, and from then on.

    Raises:
        RuntimeError: it failed or did not end.
    """
    before, start = notes(run), time.monotonic()
    began: float | None = None
    process = launch(stage, run, processes, resume)
    while process.poll() is None:
        if began is None and notes(run) != before:
            began = time.monotonic()
        if time.monotonic() - start > PATIENCE:
            kill_all(process)
            raise RuntimeError(f"{stage.name} on {processes}: hung")
        time.sleep(0.01)
    if process.returncode:
        said = run.with_suffix(".log").read_text(errors="replace")[-3000:]
        raise RuntimeError(f"{stage.name} on {processes}: exit code {process.returncode}\n{said}")
    end = time.monotonic()
    return (began or end) - start, end - (began or end)


def killed(
    stage: Stage, run: Path, processes: int, resume: bool, times: tuple[float, float], draw: random.Random
) -> bool:
    """Start the command and kill it at a random moment; False where it ended before that.

    Raises:
        RuntimeError: it ended with an error of its own.
    """
    inside = draw.random() < INSIDE
    wait = draw.uniform(0, times[1] * 0.7) if inside else draw.uniform(0, times[0])
    before, due = notes(run), None if inside else time.monotonic() + wait
    process = launch(stage, run, processes, resume)
    while process.poll() is None:
        if due is None and notes(run) != before:
            due = time.monotonic() + wait
        if due is not None and time.monotonic() >= due:
            kill_all(process)
            return True
        time.sleep(0.002)
    if process.returncode:
        said = run.with_suffix(".log").read_text(errors="replace")[-3000:]
        raise RuntimeError(f"{stage.name} on {processes}, resumed: exit code {process.returncode}\n{said}")
    return False


def differences(whole: Path, broken: Path) -> list[str]:
    """Files that are not the same in both runs, or only in one of them, and what was left half-written."""
    names = {str(p.relative_to(run)) for run in (whole, broken) for rule in COMPARED for p in run.glob(f"**/{rule}")}
    found = [name for name in sorted(names) if not (whole / name).is_dir() and not _same(whole / name, broken / name)]
    left = [*broken.rglob(".*.tmp"), *broken.rglob(".*.old"), *broken.rglob(".*.begun")]
    return found + [f"{path.relative_to(broken)} was left behind" for path in left]


def _same(one: Path, other: Path) -> bool:
    if not (one.is_file() and other.is_file()):
        return False
    return _lines(one) == _lines(other) if one.suffix == ".jsonl" else one.read_bytes() == other.read_bytes()


def _lines(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def put_to_the_test(
    stage: Stage, base: Path | None, work: Path, processes: int, kills: int, draw: random.Random
) -> Any:
    """Train the stage unbroken, and with ``kills`` kills; ``base`` is the run it starts from.

    Returns:
        The record, and the unbroken run.
    """
    whole, broken = work / f"{stage.name}-{processes}-whole", work / f"{stage.name}-{processes}-broken"
    if base is not None:
        shutil.copytree(base, whole)
    times = finish(stage, whole, processes, resume=False)
    hits, trainings, unlike = 0, 0, []
    while hits < kills:
        shutil.rmtree(broken, ignore_errors=True)
        if base is not None:
            shutil.copytree(base, broken)
        trainings += 1
        ended, resume = False, False
        while hits < kills and not ended:
            ended = not killed(stage, broken, processes, resume, times, draw)
            hits += not ended
            resume = True
        if not ended:
            finish(stage, broken, processes, resume=True)
        unlike += differences(whole, broken)
    record = {"stage": stage.name, "processes": processes, "kills": hits, "trainings": trainings, "different": unlike}
    where = f"{stage.name}, {processes} process{'es' if processes > 1 else ''}"
    print(f"{where}: {hits} kills over {trainings} trainings; different: {', '.join(unlike) or 'nothing'}", flush=True)
    return record, whole


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--kills", type=int, default=20, help="in all; each stage at each number of processes has a share"
    )
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=300, help="of each training")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--work", type=Path, help="folder to work in and to leave everything in")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        (work / "kill.yaml").write_text(SETTINGS.replace("STEPS", str(options.steps)), encoding="utf-8")
        draw = random.Random(options.seed)
        shares = 2 * len(options.processes)
        counts = [options.kills // shares + (index < options.kills % shares) for index in range(shares)]
        records = []
        for index, processes in enumerate(options.processes):
            try:
                record, whole = put_to_the_test(CODEC, None, work, processes, counts[2 * index], draw)
                records.append(record)
                records.append(put_to_the_test(PRIOR, whole, work, processes, counts[2 * index + 1], draw)[0])
            except RuntimeError as error:
                print(error, file=sys.stderr)
                records.append({"processes": processes, "kills": 0, "different": [str(error)]})
    fine = not any(record["different"] for record in records)
    kills = sum(record["kills"] for record in records)
    print(f"{kills} kills: {'every run went on and ended in the same bits' if fine else 'FAILED'}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"kills": kills, "equal": fine, "parts": records}, indent=2) + "\n")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
