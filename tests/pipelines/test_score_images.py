"""Which images are scored, and as what: splits, sizes, channels, labels, values, and files that cannot be read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pipelines.run_codes import open_codes
from pipelines.scoring.complexity import check_coder, complexity_bits
from pipelines.scoring.images import ScoredSet, open_set
from vqgen.console import Console
from vqgen.errors import InputError
from vqgen.run_folder import RunFolder
from vqgen.shapes import CLASS_NAMES, render


@pytest.fixture
def opened(finished_run: Path) -> Callable[..., ScoredSet]:
    run = RunFolder(finished_run)
    codec, store = open_codes(run)

    def open_source(source: Path | str | None, split: str | None = None, **more: object) -> ScoredSet:
        name = None if source is None else str(source)
        return open_set(run, store, codec, name, split, Console(silent=True), **more)  # type: ignore[arg-type]

    return open_source


def pictures_of(found: ScoredSet) -> Tensor:
    return found.read(found.indices)[1]


def save(folder: Path, images: np.ndarray, suffix: str = ".png") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number}{suffix}")


def noise(count: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def test_without_a_source_it_is_the_runs_own_test_split(opened: Callable[..., ScoredSet]) -> None:
    found = opened(None)
    assert (found.split, found.own, found.total) == ("test", True, 6)
    assert torch.equal(pictures_of(found), torch.from_numpy(render(range(6), (16, 16), "test")))
    assert list(found.names) == list(CLASS_NAMES[:6])
    assert opened(None, "train").total == 64
    assert opened(None, "all").total == 64 + 6 + 6
    assert opened(None, images=3).indices == [0, 2, 5]


def test_parts_of_all_splits_are_read_in_order(opened: Callable[..., ScoredSet]) -> None:
    found = opened(None, "all")
    splits = [render(range(count), (16, 16), split) for split, count in (("train", 64), ("validation", 6), ("test", 6))]
    assert torch.equal(pictures_of(found), torch.from_numpy(np.concatenate(splits)))


def test_another_source_with_a_test_split_is_that_split(opened: Callable[..., ScoredSet], tmp_path: Path) -> None:
    save(tmp_path / "train", noise(5, 16, 16, 3, seed=1))
    save(tmp_path / "test", noise(3, 16, 16, 3, seed=2))
    found = opened(tmp_path)
    assert (found.split, found.own, found.total) == ("test", False, 3)
    assert torch.equal(pictures_of(found), torch.from_numpy(noise(3, 16, 16, 3, seed=2)).movedim(-1, 1))
    assert opened(tmp_path, "all").total == 8
    assert opened(tmp_path, "train").total == 5


@pytest.mark.parametrize("count", [1, 5])
def test_one_without_is_all_its_images_even_one(opened: Callable[..., ScoredSet], tmp_path: Path, count: int) -> None:
    np.savez(tmp_path / "few.npz", images=noise(count, 16, 16, 3))
    found = opened(tmp_path / "few.npz")
    assert (found.split, found.total, found.names) == ("all", count, None)


def test_a_split_that_is_not_there_is_named(opened: Callable[..., ScoredSet], tmp_path: Path) -> None:
    np.save(tmp_path / "few.npy", noise(4, 16, 16, 3))
    with pytest.raises(InputError, match=r"no validation split of its own, only train"):
        opened(tmp_path / "few.npy", "validation")
    with pytest.raises(InputError, match=r"Did you mean 'test'"):
        opened(None, "tset")


def test_moved_images_of_the_run_keep_its_splits(opened: Callable[..., ScoredSet]) -> None:
    """The run's own source by name: its test split, although the settings of the run are needed to know it."""
    found = opened("shapes")
    assert (found.own, found.total) == (True, 6)


def test_other_sizes_and_channels_are_brought_to_the_codecs_and_said(
    opened: Callable[..., ScoredSet], tmp_path: Path
) -> None:
    save(tmp_path / "grey", noise(3, 20, 30))
    found = opened(tmp_path / "grey")
    assert pictures_of(found).shape == (3, 3, 16, 16)
    assert found.notes == ("images of 30x20 pixels are resized to 16x16", "1 channels become 3")


def test_a_broken_picture_has_no_score_and_the_others_keep_their_place(
    opened: Callable[..., ScoredSet], tmp_path: Path
) -> None:
    images = noise(4, 16, 16, 3)
    save(tmp_path, images)
    (tmp_path / "1.png").write_bytes(b"not a picture")
    found = opened(tmp_path)
    batches = [found.read(found.indices[start : start + 2]) for start in (0, 2)]
    assert [places for places, _ in batches] == [[0], [2, 3]]
    assert torch.equal(batches[0][1][0], torch.from_numpy(images[0]).movedim(-1, 0))


def test_labels_of_the_source_become_those_of_the_run_by_name(opened: Callable[..., ScoredSet], tmp_path: Path) -> None:
    for name in ("ring", "circle"):
        save(tmp_path / name, noise(2, 16, 16, 3))
    found = opened(tmp_path, labelled=True)
    assert [CLASS_NAMES[value] for value in found.classes] == list(found.names)
    assert set(found.names) == {"ring", "circle"}


def test_labels_that_are_missing_or_others_are_refused_where_needed(
    opened: Callable[..., ScoredSet], tmp_path: Path
) -> None:
    for name in ("ring", "cat"):
        save(tmp_path / name, noise(2, 16, 16, 3))
    assert set(opened(tmp_path).names) == {"ring", "cat"}
    with pytest.raises(InputError, match=r"'cat'.*none of the 8 training classes.*--label marginal"):
        opened(tmp_path, labelled=True)
    np.save(tmp_path / "few.npy", noise(4, 16, 16, 3))
    with pytest.raises(InputError, match=r"have no labels.*--label marginal"):
        opened(tmp_path / "few.npy", labelled=True)


def test_numbers_mean_what_they_mean_in_the_run(run_copy: Path, tmp_path: Path) -> None:
    """A faint set of a 12-bit detector must not be stretched until it looks like the bright one of the training."""
    np.save(tmp_path / "faint.npy", np.full((2, 16, 16), 400, dtype=np.uint16))
    run = RunFolder(run_copy)
    codec, store = open_codes(run)
    record = json.loads(run.record.read_text())
    assert record["data"]["values"] is None

    def grey(values: list[float] | None) -> int:
        run.record.write_text(json.dumps({**record, "data": {**record["data"], "values": values}}))
        found = open_set(run, store, codec, str(tmp_path / "faint.npy"), None, Console(silent=True))
        return int(pictures_of(found)[0, 0, 0, 0])

    assert grey([0.0, 4095.0]) == round(400 * 255 / 4095)
    assert grey(None) == round(400 * 255 / 1023)  # by the smallest bit depth that holds it
    assert grey([0.0, 255.0]) == 255


def test_complexity_orders_pictures_by_what_is_in_them_and_is_the_same_each_time() -> None:
    flat = torch.full((1, 1, 32, 32), 9, dtype=torch.uint8)
    ramp = torch.arange(32, dtype=torch.uint8).expand(1, 1, 32, 32)
    busy = torch.from_numpy(noise(1, 1, 32, 32))
    bits = complexity_bits(torch.cat([flat, ramp, busy]))
    assert bits.dtype == torch.float64
    assert bits[0] < bits[1] < bits[2]
    assert 0.95 * 8 * 32 * 32 < bits[2] < 1.2 * 8 * 32 * 32  # noise cannot be made shorter
    assert torch.equal(bits, torch.cat([complexity_bits(images) for images in (flat, ramp, busy)]))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_complexity_loses_nothing_of_any_kind_of_picture(channels: int) -> None:
    """Pictures that differ in one value, under an alpha of 0 too, are not of one length by being taken for one."""
    import io

    from pipelines.scoring.complexity import OPTIONS
    from vqgen.images import to_array, to_pil

    image = torch.from_numpy(noise(1, channels, 8, 8))[0]
    if channels in (2, 4):
        image[-1] = 0
    buffer = io.BytesIO()
    to_pil(image).save(buffer, format="WEBP", **OPTIONS)
    with Image.open(io.BytesIO(buffer.getvalue())) as read:
        restored = np.asarray(read.convert("RGBA" if channels in (2, 4) else "RGB"))
    original = to_array(to_pil(image), 4 if channels in (2, 4) else 3)
    np.testing.assert_array_equal(restored.transpose(2, 0, 1), original)
    assert complexity_bits(image[None]).item() == 8 * len(buffer.getvalue())


def test_a_pillow_without_the_coder_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "libwebp" in check_coder()
    monkeypatch.setattr("pipelines.scoring.complexity.features.check", lambda name: False)
    with pytest.raises(InputError, match="WebP"):
        check_coder()
