"""An encoding or a sampling that is stopped goes on at the images that are not made yet, and ends in the same bytes."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines import cli
from pipelines.begun import Begun
from pipelines.drawing import Drawer
from vqgen.codec import HierarchicalVQVAE


def store(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def encode(run: Path, out: Path, **changes: str) -> list[str]:
    given = {"--data": "shapes", "--batch-size": "4", **changes}
    return ["encode", "--run", str(run), "--out", str(out), *(word for pair in given.items() for word in pair)]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
    """Shards of eight images; counts the images that are encoded, and stops the command at a batch."""
    monkeypatch.setattr("pipelines.begun.SHARD_IMAGES", 8)
    real = HierarchicalVQVAE.encode

    def start(stop: int) -> list[int]:
        sizes: list[int] = []

        def encoding(self: HierarchicalVQVAE, images: torch.Tensor) -> Any:
            sizes.append(len(images))
            if len(sizes) == stop:
                os.kill(os.getpid(), signal.SIGTERM)
            return real(self, images)

        monkeypatch.setattr(HierarchicalVQVAE, "encode", encoding)
        return sizes

    return start


def test_stopped_and_gone_on_with_is_the_whole(
    finished_run: Path, tmp_path: Path, counted: Callable[[int], list[int]], capsys: pytest.CaptureFixture[str]
) -> None:
    whole, out, begun = tmp_path / "whole", tmp_path / "out", tmp_path / ".out.begun"
    everything = counted(0)
    assert cli.call(encode(finished_run, whole)) == 0
    counted(8)
    assert cli.call(encode(finished_run, out)) == 130
    assert [path.name for path in sorted(begun.iterdir())][-1].startswith("train-000000000016-000000000024")
    assert not out.exists()
    rest = counted(0)
    capsys.readouterr()
    assert cli.call(encode(finished_run, out)) == 0
    assert sum(rest) == sum(everything) - 24
    assert "encoding train: going on after 24 images." in capsys.readouterr().err
    assert store(out) == store(whole)
    assert not begun.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


@pytest.mark.parametrize("how", ["damaged", "missing", "other batches", "other codec"])
def test_what_does_not_fit_is_encoded_anew(
    how: str, run_copy: Path, tmp_path: Path, counted: Callable[[int], list[int]]
) -> None:
    whole, out, begun = tmp_path / "whole", tmp_path / "out", tmp_path / ".out.begun"
    counted(8)
    assert cli.call(encode(run_copy, out)) == 130
    second = sorted(begun.glob("train-*"))[1]
    changes, left = {}, 8
    if how == "damaged":
        content = bytearray(second.read_bytes())
        content[-2] ^= 1
        second.write_bytes(content)
    elif how == "missing":
        second.unlink()
    elif how == "other batches":
        changes, left = {"--batch-size": "8"}, 0
    else:
        codec = HierarchicalVQVAE.from_pretrained(run_copy / "codec")
        with torch.no_grad():
            next(codec.parameters()).add_(0.01)
        codec.save_pretrained(run_copy / "codec")
        left = 0
    everything = counted(0)
    assert cli.call(encode(run_copy, whole, **changes)) == 0
    rest = counted(0)
    assert cli.call(encode(run_copy, out, **changes)) == 0
    assert sum(rest) == sum(everything) - left
    assert store(out) == store(whole)


def sample(run: Path, *more: str) -> list[str]:
    names = ["--prior", "pixelcnn", "-n", "20", "--batch-size", "4", "--out", "drawn"]
    return ["sample", *names, "--run", str(run), *more]


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Files of eight images; the sizes of all batches that are drawn, of which the fourth is stopped."""
    monkeypatch.setattr("pipelines.begun.SHARD_IMAGES", 8)
    real, sizes = Drawer.draw, []

    def drawing(self: Drawer, indices: tuple[int, ...], attempt: int, advance: Any) -> Any:
        sizes.append(len(indices))
        if len(sizes) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, indices, attempt, advance)

    monkeypatch.setattr(Drawer, "draw", drawing)
    return sizes


@pytest.mark.parametrize("more", [(), ("--from", "test:1", "--from", "test:3", "--keep", "left-half")])
def test_a_sampling_that_is_stopped_goes_on(
    more: tuple[str, ...], run_copy: Path, stopped: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    drawn, begun = run_copy / "samples/drawn", run_copy / "samples/.drawn.begun"
    assert cli.call(sample(run_copy, *more)) == 130
    assert [path.name[:32] for path in begun.glob("images-*")] == ["images-000000000000-000000000008"]
    assert not drawn.exists()
    capsys.readouterr()
    assert cli.call(sample(run_copy, *more)) == 0
    assert stopped[4:] == [4, 4, 4]
    assert "sampling: going on after 8 images." in capsys.readouterr().err
    assert not begun.exists()
    found = store(drawn)
    assert json.loads(found.pop("sample.json"))["seconds"]["decode"] > 0
    shutil.rmtree(drawn)
    assert cli.call(sample(run_copy, *more)) == 0
    whole = store(drawn)
    del whole["sample.json"]
    assert found == whole


def test_what_was_drawn_for_another_request_is_not_used(run_copy: Path, stopped: list[int]) -> None:
    assert cli.call(sample(run_copy)) == 130
    assert (run_copy / "samples/.drawn.begun").exists()
    assert cli.call(sample(run_copy, "--seed", "7")) == 0
    assert stopped[4:] == [4, 4, 4, 4, 4]
    assert not (run_copy / "samples/.drawn.begun").exists()


def test_of_two_commands_at_work_on_one_folder_neither_takes_what_the_other_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.begun.SHARD_IMAGES", 2)

    def made(begun: Begun) -> list[int]:
        parts = begun.made("images", lambda images: {"codes": (images,)})
        return [value for part in parts for value in part["codes"].tolist()]

    one, other = Begun(tmp_path / "x", {"seed": 1}), Begun(tmp_path / "x", {"seed": 2})
    one.add("images", {"codes": torch.tensor([10, 11])})
    other = Begun(tmp_path / "x", {"seed": 2})
    other.add("images", {"codes": torch.tensor([20, 21])})
    one.add("images", {"codes": torch.tensor([12, 13])})
    assert made(Begun(tmp_path / "x", {"seed": 2})) == [20, 21]
    assert made(Begun(tmp_path / "x", {"seed": 1})) == []
    assert not (tmp_path / ".x.begun").exists()


def test_what_was_made_in_other_steps_beside_a_damaged_part_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shapes(images: int) -> dict[str, tuple[int, ...]]:
        return {"codes": (images,)}

    monkeypatch.setattr("pipelines.begun.SHARD_IMAGES", 2)
    Begun(tmp_path / "x", {}).add("images", {"codes": torch.tensor([1, 2])})
    (path,) = tmp_path.glob(".x.begun/images-*")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    again = Begun(tmp_path / "x", {})
    assert list(again.made("images", shapes)) == []
    again.add("images", {"codes": torch.tensor([1, 2, 3])})
    (part,) = Begun(tmp_path / "x", {}).made("images", shapes)
    assert part["codes"].tolist() == [1, 2, 3]


def test_what_an_encoding_left_that_was_killed_after_its_last_act_is_removed(
    finished_run: Path, tmp_path: Path, counted: Callable[[int], list[int]], fails: Callable[..., str]
) -> None:
    out, begun = tmp_path / "out", tmp_path / ".out.begun"
    counted(8)
    assert cli.call(encode(finished_run, out)) == 130
    kept = Path(shutil.copytree(begun, tmp_path / "kept"))
    counted(0)
    assert cli.call(encode(finished_run, out)) == 0
    kept.rename(begun)
    assert "already exists" in fails(*encode(finished_run, out))
    assert not begun.exists()
