"""Faults of a machine are told from faults of the program by what they say; signals end a command in order."""

from __future__ import annotations

import errno
import importlib
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from vqgen.errors import InputError
from vqgen.faults import explained, fault_of_machine
from vqgen.interrupts import StopSignals, terminable

CUDA = "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 139.00 GiB"


def explain(error: Exception) -> str:
    with pytest.raises(InputError) as stopped, explained(lambda: "batches of 8 images", "Lower it.", 3, "Go on."):
        raise error
    return str(stopped.value)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(CUDA),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("std::bad_alloc"),
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
)
def test_lack_of_memory(error: Exception) -> None:
    said = explain(error)
    assert said.startswith("There is not enough memory for batches of 8 images (")
    assert said.endswith(" Lower it. Go on.")
    fault = fault_of_machine(error, "Lower it.")
    assert fault is not None
    assert fault.hint == "Lower it."


def test_a_loader_that_died() -> None:
    said = explain(RuntimeError("DataLoader worker (pid 77) is killed by signal: Killed. "))
    assert said.startswith("A process that loads data ended unexpectedly (DataLoader worker (pid 77) is killed")
    assert "lower training.workers (now 3)" in said
    assert said.endswith("Go on.")


@pytest.mark.parametrize(
    "text",
    [
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:53186",
        "Application timeout caused pair closure: Connection reset by peer",
        "NCCL error: remote process exited or there was a network error",
    ],
)
def test_another_process_that_died(text: str) -> None:
    assert explain(RuntimeError(text)) == "Another process of this command has ended, so this one cannot go on. Go on."
    assert fault_of_machine(RuntimeError(text), "") is not None


@pytest.mark.parametrize("error", [RuntimeError("a bug"), ValueError("out of memory"), OSError(errno.EIO, "I/O error")])
def test_faults_of_the_program_stay_what_they_are(error: Exception) -> None:
    with pytest.raises(type(error)), explained(lambda: "x", "y", 0, "z"):
        raise error
    assert fault_of_machine(error, "") is None


def test_an_error_for_the_user_passes_even_if_it_speaks_of_memory() -> None:
    assert explain(InputError("out of memory", "x")) == "out of memory x"


def test_sigterm_is_as_ctrl_c_once() -> None:
    before = signal.getsignal(signal.SIGTERM)
    put_right = []

    def work() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # does not interrupt the putting right
            put_right.append(True)

    with pytest.raises(KeyboardInterrupt), terminable():
        work()
    assert put_right
    assert signal.getsignal(signal.SIGTERM) is before


def test_within_a_training_sigterm_is_a_request() -> None:
    with terminable():
        with StopSignals(notice=False) as signals:
            os.kill(os.getpid(), signal.SIGTERM)
            assert signals.received
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_import_is_not_interrupted_but_followed_by_the_interrupt(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"signalled_{number.name.lower()}"
    lines = ["import os, time", f"os.kill(os.getpid(), {int(number)})", "time.sleep(0.12)", "ended = True"]
    (tmp_path / f"{name}.py").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(tmp_path)
    before = [signal.signal(signal.SIGINT, signal.default_int_handler), signal.getsignal(signal.SIGALRM)]

    def work() -> None:
        with terminable():
            importlib.import_module(name)
            time.sleep(5)

    try:
        with pytest.raises(KeyboardInterrupt):
            work()
        assert sys.modules.pop(name).ended
        assert signal.getsignal(signal.SIGALRM) is before[1]
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before[0])
