"""What does a stranger's config, run, sweep, compressed file or shard of pictures do? Opens thousands, and watches.

Every case is made from its number: one file of a small finished run, a config, a compressed file, a shard or a sweep is
damaged, or replaced by something that means harm; then commands are run on it in this process, each under a time limit
and a limit of memory. A case fails where

- a command ends in a traceback, or with another exit code than 0 and 2;
- it takes longer than the limit, asks for more memory than there is, or brings the process down;
- it writes outside the case's own folder, starts a program, opens a connection or unpickles an object
  (Python's audit events, and a look at the folders beside the case's);
- it prints what a terminal would obey.

    python benchmarks/fuzz.py --cases 2400 --json results/fuzz.json

prints a table of what was opened and how it ended; exit code 1 where a case fails. ``--only N`` repeats one case.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import resource
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import mutations, shard_mutations  # noqa: E402

SETTINGS = """
data: {source: shapes, image_size: 16, count: 64}
codec:
  strides: [8, 4]
  codebook_size: 16
  code_dim: 8
  width: 16
  residual_blocks: 1
  residual_width: 8
  training: {steps: 4, batch_size: 16, evaluate_every: 2, checkpoint_every: 2, preview_every: 4}
run: {priors: [pixelcnn, transformer], samples: 4}
priors:
  pixelcnn: {width: 16, blocks: 2, training: {steps: 4, batch_size: 16, evaluate_every: 2, checkpoint_every: 2}}
  transformer: {dim: 32, depth: 1, heads: 2, training: {steps: 4, batch_size: 16, evaluate_every: 2}}
"""
SECONDS = 60.0
"""Most that a case may take; on an idle core nearly all take under one."""
MEMORY = 6 * 2**30
"""Address space that a case may take beyond what the process has when it begins, in bytes."""
KINDS = ("config", "run file", "compressed file", "shards", "sweep")
_HARMLESS = (os.devnull, f"/proc/{os.getpid()}/clear_refs")
"""The second sets back the mark of peak memory (`vqgen.memory`)."""
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_CHANGES = {
    *("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.symlink", "os.link", "os.truncate", "os.chmod"),
    "shutil.rmtree",  # which names what is inside by the folder it has open, not by a path
}
_FORBIDDEN = {
    *("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "pty.spawn"),
    *("socket.connect", "socket.getaddrinfo", "pickle.find_class"),
}


class Slow(BaseException):
    """A case has used up its time; no `Exception`, so that nothing takes it for an error of its own."""


class Watch:
    """Audit events of a case that no stranger's file may cause."""

    def __init__(self) -> None:
        self.allowed: tuple[str, ...] | None = None
        """Folders that may be written to; None where nobody is watching."""
        self.seen: list[str] = []
        sys.addaudithook(self._event)

    @contextlib.contextmanager
    def over(self, *allowed: Path) -> Iterator[list[str]]:
        self.seen, self.allowed = [], tuple(os.path.realpath(path) for path in allowed)
        try:
            yield self.seen
        finally:
            self.allowed = None

    def _event(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.allowed is None:
            return
        if event in _FORBIDDEN:
            self.seen.append(f"{event} {arguments!r:.100}")
        elif event == "open":
            path, mode, flags = arguments
            writes = any(letter in (mode or "") for letter in "wax+") or (flags or 0) & (os.O_WRONLY | os.O_RDWR)
            if writes and isinstance(path, (str, bytes)):
                self._check(event, path)
        elif event in _CHANGES:
            for path in arguments[:2]:
                if isinstance(path, (str, bytes, os.PathLike)):
                    self._check(event, path)

    def _check(self, event: str, path: str | bytes | os.PathLike[str]) -> None:
        assert self.allowed is not None
        real = os.path.realpath(os.fsdecode(path))
        inside = any(real == folder or real.startswith(folder + os.sep) for folder in self.allowed)
        if real not in _HARMLESS and not inside:
            self.seen.append(f"{event} {real}")


def make_base(folder: Path) -> None:
    """A finished run and a compressed file of it, from which all cases are made."""
    from pipelines import cli

    folder.mkdir(parents=True)
    (folder / "tiny.yaml").write_text(SETTINGS, encoding="utf-8")
    run = str(folder / "run")
    commands = [
        ["run", "--config", str(folder / "tiny.yaml"), "--run", run],
        ["train-prior", "--prior", "unigram", "--run", run],
        ["compress", "-n", "4", "--prior", "pixelcnn", "--out", str(folder / "file.vqgen"), "--run", run],
        ["compress", "-n", "4", "--prior", "unigram", "--out", str(folder / "short.vqgen"), "--run", run],
    ]
    for command in commands:
        with quiet():
            code = cli.call(command)
        if code:
            raise SystemExit(f"vqgen {' '.join(command)} ended with {code}")
    make_sweep(folder)
    for previews in folder.rglob("previews"):
        shutil.rmtree(previews)


def make_sweep(folder: Path) -> None:
    """A finished sweep of one cell, ``sweep/`` beside the ``tiny.yaml`` that is in ``folder``."""
    from pipelines import cli

    here = Path.cwd()
    os.chdir(folder)
    try:
        with quiet() as said:
            code = cli.call(shard_mutations.SWEEP)
    finally:
        os.chdir(here)
    if code:
        raise SystemExit(f"vqgen {' '.join(shard_mutations.SWEEP)} ended with {code}: {said.getvalue()[-500:]}")


@contextlib.contextmanager
def quiet() -> Iterator[io.StringIO]:
    """What is printed inside, on stdout and stderr together."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        yield said


def prepare(kind: str, random: Random, base: Path, case: Path) -> mutations.Case:
    """Make one case in the folder ``case``."""
    makers = {"shards": shard_mutations.shards, "sweep": shard_mutations.sweep}
    make = makers.get(kind)
    return make(random, base, case) if make else mutations.prepare(kind, random, base, case)


def run_case(number: int, base: Path, watch: Watch, seconds: float = SECONDS) -> dict[str, Any]:
    """Make case ``number``, run its commands, and say how it ended; ``problem`` is empty where it ended well."""
    from accelerate.state import AcceleratorState, GradientState

    random = Random(number)
    kind = KINDS[number % len(KINDS)]
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="vqgen-fuzz-") as name:
        sandbox = Path(name)
        beside, case = sandbox / "beside", sandbox / "case"
        beside.mkdir()
        (beside / "victim.txt").write_text("whole", encoding="utf-8")
        case.mkdir()
        what, commands = prepare(kind, random, base, case)
        if kind == "shards":
            import datasets

            datasets.config.HF_DATASETS_CACHE = case / "cache"
        problem, codes = "", []
        here = Path.cwd()
        os.chdir(case)
        try:
            for command in commands:
                with watch.over(case, Path(tempfile.gettempdir()) / "torchinductor") as seen, limited(seconds):
                    code, problem = ended(command)
                AcceleratorState._reset_state(reset_partial_state=True)
                GradientState._reset_state()
                codes.append(code)
                problem = problem or "; ".join(dict.fromkeys(seen))
                if problem:
                    problem = f"vqgen {' '.join(command)}: {problem}"
                    break
        finally:
            os.chdir(here)
        left = sorted(path.relative_to(sandbox).as_posix() for path in beside.rglob("*"))
        if not problem and (left != ["beside/victim.txt"] or (beside / "victim.txt").read_text() != "whole"):
            problem = f"wrote beside the case: {left}"
        if not problem and [path.name for path in sandbox.iterdir() if path.name not in ("beside", "case")]:
            problem = "wrote above the case"
    took = round(time.perf_counter() - start, 2)
    return {"case": number, "kind": kind, "what": what, "codes": codes, "seconds": took, "problem": problem}


def ended(command: Sequence[str]) -> tuple[int, str]:
    """Exit code of a command line, and what is wrong with how it ended."""
    from pipelines import cli

    with quiet() as said:
        try:
            code = cli.call(list(command))
        except Slow:
            return -1, f"slow:\n{_where()}"
        except (Exception, SystemExit):
            return -1, f"traceback:\n{_where()}"
    text = said.getvalue()
    if code not in (0, 2):
        return code, f"exit code {code}: {text[-300:]}"
    if "Traceback (most recent call last)" in text:
        return code, f"printed a traceback: {text[-1000:]}"
    if "not enough memory" in text:
        return code, f"asked for more memory than there is: {text[-1000:]}"
    if found := _OBEYED.search(text):
        return code, f"printed {found[0]!r}: {text[max(found.start() - 100, 0) : found.end() + 20]!r}"
    return code, ""


def _where() -> str:
    lines = traceback.format_exc().strip().splitlines()
    return "\n".join(lines if len(lines) < 30 else [*lines[:4], "  ...", *lines[-16:]])[-3000:]


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises `Slow` in the block when its time is up."""

    def stop(number: int, frame: Any) -> None:
        raise Slow

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def work(numbers: Sequence[int], base: Path, seconds: float) -> None:
    """The worker: cases one after another, a line of JSON on stdout for each."""
    out = sys.stdout
    import warnings

    import pipelines.compress
    import pipelines.run_all
    import pipelines.score  # noqa: F401
    from priors import registry

    for name in registry.names():
        registry.get(name)
    warnings.simplefilter("ignore")
    if MEMORY:
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    watch = Watch()
    for number in numbers:
        out.write(json.dumps(run_case(number, base, watch, seconds)) + "\n")
        out.flush()


def run_all(numbers: Sequence[int], base: Path, seconds: float, tell: Callable[[dict[str, Any]], None]) -> None:
    """Every case in a process of its own kind, begun again after one that brings it down or does not answer."""
    waiting = list(numbers)
    while waiting:
        command = [sys.executable, __file__, "--work", str(base), "--seconds", str(seconds)]
        with tempfile.TemporaryFile("w+") as errors:
            process = subprocess.Popen(
                [*command, "--numbers", ",".join(map(str, waiting))],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            )
            assert process.stdout is not None
            while waiting and (line := _next_line(process, 60 + 3 * seconds)):
                tell(json.loads(line))
                waiting.pop(0)
            process.kill()
            process.wait()
            if waiting:
                errors.seek(0)
                number = waiting.pop(0)
                problem = f"the process ended with {process.returncode} or hung: {errors.read()[-500:]}"
                tell(
                    {"case": number, "kind": KINDS[number % len(KINDS)], "what": "?", "codes": [], "seconds": 0}
                    | {"problem": problem}
                )


def _next_line(process: subprocess.Popen[str], seconds: float) -> str:
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        return process.stdout.readline() if selector.select(seconds) else ""


def report(results: Sequence[dict[str, Any]]) -> str:
    """A line for each kind: cases, refused, taken, failed, and the slowest."""
    lines = [f"{'what':<18}{'cases':>7}{'refused':>9}{'taken':>7}{'failed':>8}{'slowest, s':>12}"]
    for kind in KINDS:
        of = [result for result in results if result["kind"] == kind]
        failed = sum(bool(result["problem"]) for result in of)
        refused = sum(not result["problem"] and 2 in result["codes"] for result in of)
        slowest = max((result["seconds"] for result in of), default=0)
        taken = len(of) - failed - refused
        lines.append(f"{kind:<18}{len(of):>7}{refused:>9}{taken:>7}{failed:>8}{slowest:>12.1f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2400)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--only", type=int, help="repeat one case in this process, and print what it says")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="limit of a command")
    parser.add_argument("--base", type=Path, help="folder for the run that is mutated; kept, and used again")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--numbers", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work([int(number) for number in options.numbers.split(",")], options.work, options.seconds)
        return
    with contextlib.ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        base = (options.base or home / "base").resolve()
        if not base.is_dir():
            make_base(base)
        if options.only is not None:
            print(json.dumps(run_case(options.only, base, Watch(), options.seconds), indent=2).replace("\\n", "\n"))
            return
        results: list[dict[str, Any]] = []

        def tell(result: dict[str, Any]) -> None:
            results.append(result)
            if result["problem"]:
                print(f"case {result['case']} ({result['kind']}: {result['what']})\n  {result['problem']}", flush=True)

        start = time.perf_counter()
        run_all(range(options.first, options.first + options.cases), base, options.seconds, tell)
    print(report(results))
    failed = [result for result in results if result["problem"]]
    minutes = (time.perf_counter() - start) / 60
    print(f"{len(results):,} cases, {len(failed)} failed, {minutes:.1f} minutes")
    if options.json:
        codes = Counter(code for result in results for code in result["codes"])
        options.json.parent.mkdir(parents=True, exist_ok=True)
        summary = {"cases": len(results), "failed": failed, "minutes": round(minutes, 1), "exit_codes": dict(codes)}
        options.json.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
