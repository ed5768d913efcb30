"""Launches that are not what they seem are refused before anything is done, and those that are, are not."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_simple_launcher_cmd_env

from pipelines import cli


@pytest.fixture(autouse=True)
def _without_a_launcher() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in (
            "WORLD_SIZE",
            "RANK",
            "MASTER_ADDR",
            "PMI_SIZE",
            *filter(re.compile("ACCELERATE_").match, os.environ),
        ):
            patch.delenv(name, raising=False)
        yield


def launched_by_accelerate(monkeypatch: pytest.MonkeyPatch, *options: str, precision: str = "no") -> None:
    """The environment that `accelerate launch` gives to a single process."""
    arguments = launch_command_parser().parse_args([*options, "--mixed_precision", precision, "--no_python", "vqgen"])
    checked, *_ = _validate_launch_command(arguments)
    for name, value in prepare_simple_launcher_cmd_env(checked)[1].items():
        monkeypatch.setenv(name, value)


def test_one_process_where_several_were_asked_for_is_refused(
    monkeypatch: pytest.MonkeyPatch, fails: Callable[..., str]
) -> None:
    launched_by_accelerate(monkeypatch, "--cpu", "--num_processes", "2")
    said = fails("train-codes", "--config", "shapes")
    assert "asked for several processes, and started one" in said
    assert "torchrun" in said


@pytest.mark.parametrize("options", [["--cpu"], ["--cpu", "--num_processes", "1"]])
def test_one_process_that_was_asked_for_works(monkeypatch: pytest.MonkeyPatch, options: list[str]) -> None:
    launched_by_accelerate(monkeypatch, *options)
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == "no"
    assert cli.call(["presets"]) == 0


def test_what_accelerate_is_told_and_vqgen_is_not_is_said(
    monkeypatch: pytest.MonkeyPatch, fails: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    launched_by_accelerate(monkeypatch, "--cpu", precision="bf16")
    said = fails("train-codes", "--config", "no-such-preset")
    assert "mixed_precision=bf16 changes nothing here: set training.mixed_precision" in said
    assert cli.call(["presets"]) == 0
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize(("key", "named"), [("DEEPSPEED", "DeepSpeed"), ("FSDP", "FSDP")])
def test_what_only_accelerate_could_do_is_refused(
    key: str, named: str, monkeypatch: pytest.MonkeyPatch, fails: Callable[..., str]
) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{key}", "true")
    assert named in fails("train-codes", "--config", "shapes")


def test_compiling_by_accelerate_is_refused(monkeypatch: pytest.MonkeyPatch, fails: Callable[..., str]) -> None:
    launched_by_accelerate(monkeypatch, "--cpu", "--dynamo_backend", "inductor")
    assert "--compile" in fails("train-codes", "--config", "shapes")


@pytest.mark.parametrize("name", ["PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"])
def test_processes_that_do_not_know_of_each_other_are_refused(
    name: str, monkeypatch: pytest.MonkeyPatch, fails: Callable[..., str]
) -> None:
    monkeypatch.setenv(name, "2")
    assert "do not find each other" in fails("presets")
    monkeypatch.setenv(name, "1")
    assert cli.call(["presets"]) == 0
    monkeypatch.setenv(name, "2")  # torchrun, started once a node by srun
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert cli.call(["presets"]) == 0


@pytest.mark.parametrize("count", ["many", "0", "-1", ""])
def test_a_number_of_processes_that_is_none_is_one_line(
    count: str, monkeypatch: pytest.MonkeyPatch, fails: Callable[..., str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", count)
    assert "is no number of processes" in fails("info")
