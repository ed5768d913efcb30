"""What two processes share they give as one would, stage by stage; and no process waits for one that has failed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import debug_launcher
from accelerate.state import AcceleratorState, PartialState
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from pipelines import cli, encode, run_priors
from pipelines.begun import Begun
from pipelines.processes import Processes, alone, join
from vqgen.code_store import CodeStore
from vqgen.collectives import sum_over_processes
from vqgen.errors import DivergedError, InputError, Interrupted, VqgenError
from vqgen.interrupts import terminable

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of forking, from Python 3.12 on

TWO = 2
ROOT = Path(__file__).resolve().parents[2]


def on_two(call: Callable[..., None], *arguments: Any) -> None:
    debug_launcher(_fresh, (call, *arguments), num_processes=TWO)


def _fresh(call: Callable[..., None], *arguments: Any) -> None:
    """``call`` in a process that has forgotten what its parent knew of processes."""
    AcceleratorState._reset_state(reset_partial_state=True)
    for name in ("RANK", "LOCAL_RANK"):  # which torchrun sets, and debug_launcher does not
        os.environ[name] = str(torch.distributed.get_rank())
    call(*arguments)


def caught(call: Callable[[], None]) -> VqgenError:
    with pytest.raises(VqgenError) as found:
        call()
    return found.value


# What is shared, and in which order.


def test_one_process_makes_everything() -> None:
    shared = join()
    assert (shared.count, shared.rank, shared.main) == (1, 0, True)
    with shared.together(), shared.main_first():
        made = [int(result["x"]) for result in shared.in_order(range(5), lambda item: {"x": torch.tensor(item)})]
    assert made == [0, 1, 2, 3, 4]


def _order(folder: Path) -> None:
    shared = join()
    assert shared.count == TWO
    own: list[int] = []

    def make(item: int) -> dict[str, Tensor]:
        own.append(item)
        shapes = {"empty": torch.zeros(0, 3), "scalar": torch.tensor(item), "bits": torch.tensor([item > 2])}
        kinds = {str(kind): torch.full((item, 2), item, dtype=kind) for kind in (torch.uint8, torch.float64)}
        return shapes | kinds | {"turned": torch.arange(6).view(2, 3).T + item}

    with shared.together():
        found = list(shared.in_order(range(5), make))
        assert list(shared.in_order([], make)) == []
    assert own == list(range(shared.rank, 5, TWO))
    for item, result in enumerate(found):
        assert result["empty"].shape == (0, 3)
        assert int(result["scalar"]) == item
        assert result["bits"].tolist() == [item > 2]
        assert result["torch.float64"].shape == (item, 2)
        assert result["torch.uint8"].dtype == torch.uint8
        assert torch.equal(result["turned"], torch.arange(6).view(2, 3).T + item)
        assert list(result) == ["empty", "scalar", "bits", "torch.uint8", "torch.float64", "turned"]
    assert len(found) == 5
    (folder / str(shared.rank)).touch()


def test_results_come_in_order_with_their_shapes_on_every_process(tmp_path: Path) -> None:
    on_two(_order, tmp_path)
    assert len(list(tmp_path.iterdir())) == TWO


def _failures() -> None:
    shared = join()

    def make_fails(item: int) -> dict[str, Tensor]:
        if item == 3:
            raise DivergedError("item 3", "no cure")
        return {"x": torch.zeros(item)}

    def in_a_share() -> None:
        with shared.together():
            list(shared.in_order(range(9), make_fails))

    error = caught(in_a_share)
    assert (type(error), error.message, error.hint) == (DivergedError, "item 3", "no cure")
    assert error.said_elsewhere is shared.main

    def where_it_is_written() -> None:
        with shared.together():
            for _ in shared.in_order(range(9), lambda item: {"x": torch.zeros(item)}):
                if shared.main:
                    raise InputError("The disk is full.")

    error = caught(where_it_is_written)
    assert error.message == "The disk is full."
    assert error.said_elsewhere is not shared.main

    def alike() -> None:
        with shared.together(), shared.together():
            raise InputError("The same everywhere.")

    assert caught(alike).said_elsewhere is not shared.main

    def by_the_first() -> None:
        with shared.together(), shared.main_first():
            if shared.main:
                raise InputError("No classifier.")
            raise AssertionError("the second process must not come so far")

    assert caught(by_the_first).message == "No classifier."

    def by_the_second() -> None:
        with shared.together(), shared.main_first():
            if not shared.main:
                raise InputError("No memory.")

    assert caught(by_the_second).message == "No memory."

    def by_a_bug() -> None:
        with shared.together():
            if not shared.main:
                raise ZeroDivisionError("of ours")

    if shared.main:
        error = caught(by_a_bug)
        assert error.message == "Process 1 of 2 has failed (ZeroDivisionError: of ours)."
    else:
        with pytest.raises(ZeroDivisionError):
            by_a_bug()

    def by_a_key() -> None:
        with shared.together():
            if shared.main:
                raise KeyboardInterrupt

    if shared.main:
        with pytest.raises(KeyboardInterrupt):
            by_a_key()
    else:
        assert isinstance(caught(by_a_key), Interrupted)
    # After all this the next exchange is in step.
    assert [int(found["x"]) for found in shared.exchange({"x": torch.tensor(shared.rank)})] == [0, 1]


def test_an_error_on_one_process_ends_all_with_the_same_error() -> None:
    on_two(_failures)


def _interrupted_between(number: signal.Signals) -> None:
    shared = join()
    gather = torch.distributed.all_gather

    def interrupting(parts: list[Tensor], own: Tensor) -> None:
        gather(parts, own)
        if shared.main and len(own) == 2:  # the heads; what is said comes after
            os.kill(os.getpid(), number)

    def work() -> None:
        with shared.together(), terminable():
            _consume(shared)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, "all_gather", interrupting)
        if shared.main:
            with pytest.raises(KeyboardInterrupt):
                work()
        else:
            assert isinstance(caught(work), Interrupted)
    assert len(shared.exchange({"x": torch.zeros(shared.rank)})) == TWO


def _interrupted() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    for number in (signal.SIGINT, signal.SIGTERM):
        _interrupted_between(number)


def test_an_interrupt_in_the_middle_of_an_exchange_leaves_all_in_step() -> None:
    on_two(_interrupted)


def _deciding() -> None:
    shared = join()
    with shared.together():
        assert shared.decided({"own": shared.rank}) == {"own": 0}
    shared.require_alike({"codec": "a", "images": (1, 2)})
    error = caught(lambda: shared.require_alike({"codec": "a", "images": shared.rank, str(shared.rank): 1}))
    assert error.message == "Process 1 of 2 reads other files than the first one: 0, 1, images."
    assert error.said_elsewhere is shared.main


def test_the_first_process_decides_and_others_that_see_other_files_stop() -> None:
    on_two(_deciding)
    alone_ = join()
    assert alone_.decided((1, 2)) == (1, 2)
    alone_.require_alike({"x": 1})


def _unreadable_codes(run: Path) -> None:
    real = run_priors.code_batches

    def damaged(*arguments: Any) -> Iterator[Any]:
        batches = real(*arguments)
        yield next(batches)
        if not join().main:
            raise InputError("A shard is damaged.")
        yield from batches

    store = CodeStore.load(run / "codes")
    run_priors.code_batches = damaged
    assert caught(lambda: run_priors.fit_baseline("unigram", store, 0)).message == "A shard is damaged."
    run_priors.code_batches = real
    assert int(run_priors.fit_baseline("unigram", store, 0).counts.sum()) > 0


def test_codes_that_one_process_cannot_read_leave_none_waiting_for_its_counts(finished_run: Path) -> None:
    on_two(_unreadable_codes, finished_run)


def _gone() -> None:
    shared = join()
    shared.exchange({})
    if not shared.main:
        os._exit(0)
    error = caught(lambda: _consume(shared))
    assert "Another process of the launcher has stopped." in str(error)


def _consume(shared: Processes) -> None:
    with shared.together():
        for _ in shared.in_order(range(8), lambda item: {"x": torch.zeros(item)}):
            pass


def test_a_process_that_is_gone_is_not_waited_for() -> None:
    on_two(_gone)


def _by_itself() -> None:
    shared = join()
    with shared.main_first():
        with alone():
            inside = join()
            assert (inside.count, inside.main) == (1, True)
            assert "RANK" not in os.environ
            with inside.together():
                pass
            assert sum_over_processes(torch.ones(())) == 1
        assert join().count == TWO
        assert os.environ["WORLD_SIZE"] == str(TWO)


def test_alone_is_one_process_for_a_while() -> None:
    on_two(_by_itself)
    with alone():
        assert join().count == 1


# The stages, from the command line.


def _stages(commands: Sequence[Sequence[str]]) -> None:
    real = Begun.__init__

    def by_the_first(self: Begun, *arguments: Any) -> None:
        assert join().main, "what was begun is read and removed by the first process alone"
        real(self, *arguments)

    Begun.__init__ = by_the_first  # type: ignore[method-assign]  # this process ends with the stages
    for command in commands:
        assert cli.call(list(command)) == 0, command
    assert PartialState().num_processes == TWO


@pytest.fixture(scope="module")
def once_and_shared(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run on which one process has done every stage, and one on which two have."""
    folder = tmp_path_factory.mktemp("shared")
    images = folder / "images"
    images.mkdir()
    generator = np.random.default_rng(5)
    for number in range(9):
        Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(images / f"{number}.png")
    (images / "5.png").write_bytes(b"not a picture")
    runs = folder / "once" / "run", folder / "shared" / "run"
    for run in runs:
        shutil.copytree(finished_run, run)
        shutil.rmtree(run / "compare")
    lists = []
    for run in runs:
        place = ["--run", str(run)]
        kept = ["--from", "test:0", "--from", "test:1", "--keep", "left-half"]
        own = ["--data", "shapes", "--out", str(run.parent / "codes"), "--batch-size", "7"]
        lists.append(
            [
                ["encode", *place, *own],
                ["sample", *place, "-n", "23", "--batch-size", "5", "--out", "many"],
                ["sample", *place, "-n", "3", "--out", "fewer-batches-than-processes"],
                ["sample", *place, "-n", "12", "--batch-size", "5", "--keep-best", "2", "--out", "best"],
                ["sample", *place, *kept, "-n", "8", "--batch-size", "3", "--out", "kept"],
                ["score", *place, "--maps", "--out", "own"],
                ["score", *place, "--data", str(images), "--out", "other"],
                ["evaluate", *place, "--split", "train", "-n", "48"],
                ["compare", *place, "--samples", "70", "--no-quality"],
            ]
        )
    with pytest.MonkeyPatch.context() as patch:
        # Small pieces, so that there are several for each process.
        patch.setattr("pipelines.likelihood.BATCH", 1)
        patch.setattr("pipelines.diagnosis.codec_figures.PIXELS_AT_ONCE", 16 * 16 * 3 * 5)
        patch.setattr("pipelines.scoring.bits._MOST_AT_ONCE", 2)
        for command in lists[0]:
            assert cli.call(command) == 0, command
        on_two(_stages, lists[1])
    return runs


def test_two_processes_encode_as_one(once_and_shared: tuple[Path, Path]) -> None:
    once, shared = (run.parent / "codes" for run in once_and_shared)
    names = {path.relative_to(once) for path in once.rglob("*") if path.is_file()}
    assert names == {path.relative_to(shared) for path in shared.rglob("*") if path.is_file()}
    for name in names:
        assert (once / name).read_bytes() == (shared / name).read_bytes(), name
    assert CodeStore.load(shared).info.splits["train"] > 7


@pytest.mark.parametrize("name", ["many", "fewer-batches-than-processes", "best", "kept"])
def test_two_processes_sample_as_one(once_and_shared: tuple[Path, Path], name: str) -> None:
    once, shared = (run / "samples" / name for run in once_and_shared)
    expected, found = load_file(once / "codes.safetensors"), load_file(shared / "codes.safetensors")
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        assert torch.equal(value, found[key]), key
    pictures = sorted(path.relative_to(once) for path in once.rglob("*.png"))
    assert pictures == sorted(path.relative_to(shared) for path in shared.rglob("*.png"))
    for picture in pictures:
        assert (once / picture).read_bytes() == (shared / picture).read_bytes(), picture
    timing = ("seconds", "samples_per_second", "priors", "codec")
    records = [json.loads((folder / "sample.json").read_text()) for folder in (once, shared)]
    assert {k: v for k, v in records[0].items() if k not in timing} == {
        k: v for k, v in records[1].items() if k not in timing
    }
    assert records[0]["seconds"].keys() == records[1]["seconds"].keys()


@pytest.mark.parametrize("name", ["own", "other"])
def test_two_processes_score_as_one(once_and_shared: tuple[Path, Path], name: str) -> None:
    once, shared = (run / "scores" / name for run in once_and_shared)
    assert (once / "scores.csv").read_text() == (shared / "scores.csv").read_text()
    assert {path.name for path in once.iterdir()} == {path.name for path in shared.iterdir()}
    first, second = (json.loads((folder / "scores.json").read_text())["sets"][0] for folder in (once, shared))
    assert first == second
    assert first["unreadable"] == (name == "other")
    for path in once.glob("*.npz"):
        with np.load(path) as expected, np.load(shared / path.name) as found:
            assert all(np.array_equal(expected[key], found[key]) for key in expected)


def test_two_processes_evaluate_as_one(once_and_shared: tuple[Path, Path]) -> None:
    once, shared = (json.loads((run / "evaluate/evaluate.json").read_text()) for run in once_and_shared)
    for key in ("reconstruction", "decoder_bits_per_dim", "codes", "bits", "worst", "frechet", "images"):
        assert once[key] == shared[key], key


def test_two_processes_compare_as_one(once_and_shared: tuple[Path, Path]) -> None:
    once, shared = (json.loads((run / "compare/compare.json").read_text()) for run in once_and_shared)
    assert len(once["rows"]) == len(shared["rows"])
    for first, second in zip(once["rows"], shared["rows"], strict=True):
        differing = {key: (value, second[key]) for key, value in first.items() if value != second[key]}
        assert set(differing) <= {"samples_per_second", "sample_memory"}, differing
    assert (once["reconstruction"], once["codes"]) == (shared["reconstruction"], shared["codes"])
    assert any(row["bits_per_dim"] for row in once["rows"])


# What goes wrong, and what stays with one process.


def _full_disk(run: Path, out: Path) -> None:
    def full(*_: object) -> None:
        raise InputError("The disk is full.")

    encode.CodeWriter.add = full  # type: ignore[assignment,method-assign]
    assert cli.call(["encode", "--run", str(run), "--data", "shapes", "--out", str(out)]) == 2
    # A refusal that all meet alike ends all of them, too.
    assert cli.call(["sample", "--run", str(run), "-n", "4", "--out", ".hidden"]) == 2


def test_an_error_of_the_one_that_writes_ends_both_and_leaves_nothing(finished_run: Path, tmp_path: Path) -> None:
    on_two(_full_disk, finished_run, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def _too_many_unreadable(command: list[str]) -> None:
    assert cli.call(command) == 2


def test_unreadable_images_are_counted_over_all_processes(
    finished_run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """One in a hundred may be: each of two processes meets one."""
    generator = np.random.default_rng(1)
    for split, count in (("train", 100), ("validation", 2), ("test", 2)):
        folder = tmp_path / "images" / split / "a"
        folder.mkdir(parents=True)
        for number in range(count):
            picture = Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8))
            picture.save(folder / f"{number:03d}.png")
    for number in (0, 7):  # of the first and of the second batch
        (tmp_path / f"images/train/a/{number:03d}.png").write_bytes(b"not a picture")
    command = ["encode", "--run", str(finished_run), "--data", str(tmp_path / "images"), "--batch-size", "7"]
    command += ["--out", str(tmp_path / "codes")]
    assert cli.call(command) == 2
    line = "2 of the 100 images of 'train' are unreadable"
    assert line in capfd.readouterr().err
    on_two(_too_many_unreadable, command)
    assert line in capfd.readouterr().err
    assert not (tmp_path / "codes").exists()


def test_what_stays_with_one_process_says_so(
    run_copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("RANK", "0")
    AcceleratorState._reset_state(reset_partial_state=True)
    assert cli.call(["reconstruct", "--run", str(run_copy), "-n", "2"]) == 0
    assert "vqgen reconstruct works in one process: the first of 2 does it." in capsys.readouterr().err
    assert cli.call(["info", "--run", str(run_copy)]) == 0
    assert "one process" not in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    assert cli.call(["reconstruct", "--run", str(run_copy), "-n", "2"]) == 0
    assert capsys.readouterr() == ("", "")
    assert set(cli.SHARED).isdisjoint(cli.FIRST_ALONE)
    assert {*cli.SHARED, *cli.FIRST_ALONE} <= set(cli.cli.commands)


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(TWO)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [*launcher, "-m", "--", "vqgen", *arguments]  # without --, torchrun takes --run for its own
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_under_torchrun(run_copy: Path) -> None:
    place = ["--run", str(run_copy)]
    sampling = ["sample", *place, "-n", "12", "--batch-size", "4", "--seed", "3"]
    done = torchrun(*sampling, "--out", "two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("grid: ") == 1, "the first process alone speaks"
    assert cli.call([*sampling, "--out", "one"]) == 0
    both = (load_file(run_copy / "samples" / name / "codes.safetensors") for name in ("one", "two"))
    for one, two in zip(*(tensors.values() for tensors in both), strict=True):
        assert torch.equal(one, two)
    commands = json.loads((run_copy / "run.json").read_text())["commands"]
    assert sum("two" in command["argv"] for command in commands) == 1, "noted once"

    # What all processes refuse, before they meet and after, is said once.
    for wrong, text in ((["--prior", "nonsense"], "nonsense"), (["--out", ".hidden"], "'.hidden' cannot be")):
        refused = torchrun("sample", *place, *wrong)
        assert refused.returncode != 0
        assert refused.stderr.count("exitcode  : 2 ") == TWO
        assert len([line for line in refused.stderr.splitlines() if line.startswith("Error:") and text in line]) == 1
    alone_ = torchrun("reconstruct", *place, "-n", "2")
    assert alone_.returncode == 0, alone_.stderr
    assert alone_.stderr.count("vqgen reconstruct works in one process: the first of 2 does it.") == 1
