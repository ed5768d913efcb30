"""What the processes of a launcher all meet is said by one of them, whichever comes first."""

from __future__ import annotations

import socket

import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from pipelines import say_once as module
from pipelines.say_once import say_once


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(module, "PATIENCE", 0.1)
    monkeypatch.setattr(module, "PATIENCE_AT_FIRST", 0.1)
    return []


@pytest.fixture
def store(said: list[str], monkeypatch: pytest.MonkeyPatch) -> TCPStore:
    """A launcher's store."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    names = {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    return TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)


def say(said: list[str], text: str, **kinds: bool) -> None:
    say_once(text, lambda: said.append(text), **kinds)


def test_what_two_processes_meet_alike_is_said_by_the_first(
    said: list[str], store: TCPStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for text in ("No run.", "No run.", "No memory."):
        say(said, text)
    assert said == ["No run.", "No memory."]
    say(said, "Another's.", elsewhere=True)
    say(said, "Interrupted.", interrupted=True)
    assert said == ["No run.", "No memory."], "an interrupt after an error is the launcher's"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    say(said, "Interrupted.", interrupted=True)
    say(said, "Interrupted.", interrupted=True)
    say(said, "No run.")
    assert said[2:] == ["Interrupted.", "No run."], "anew, where the launcher starts its processes again"


@pytest.mark.parametrize("rank", ["0", "1"])
def test_without_a_store_every_process_says_what_it_has_met(
    said: list[str], rank: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(module.time, "sleep", waits.append)
    monkeypatch.setenv("RANK", rank)
    say(said, "No run.")
    say(said, "Another's.", elsewhere=True)
    assert said == ["No run."]
    assert bool(waits) == (rank == "1"), "the first one's launcher mostly ends the others before they speak"


def test_a_launcher_that_has_gone_silences_nobody(
    said: list[str], store: TCPStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASTER_PORT", "1")
    say(said, "No run.")
    assert said == ["No run."]


def test_one_process_says_it(said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    say(said, "No run.")
    say(said, "No run.")
    assert said == ["No run."] * 2
