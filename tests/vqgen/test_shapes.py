from __future__ import annotations

import numpy as np
import pytest

from vqgen import shapes


def test_a_picture_depends_on_its_index_and_split_alone() -> None:
    many = shapes.render(range(40))
    assert many.shape == (40, 3, 32, 32)
    assert many.dtype == np.uint8
    assert np.array_equal(shapes.render([17, 3, 17]), many[[17, 3, 17]])
    assert not np.array_equal(shapes.render([3], split="test")[0], many[3])
    assert len(np.unique(many.reshape(40, -1), axis=0)) == 40


def test_batches_larger_than_a_chunk_are_seamless() -> None:
    indices = np.arange(500, 530)
    assert np.array_equal(shapes.render(range(530), (8, 8))[500:], shapes.render(indices, (8, 8)))


def test_the_global_random_state_is_left_alone() -> None:
    state = np.random.get_state()[1].copy()  # type: ignore[index, union-attr]
    shapes.render(range(4))
    assert np.array_equal(state, np.random.get_state()[1])  # type: ignore[index]


@pytest.mark.parametrize("size", [(16, 16), (20, 48), (64, 24), (3, 3), (1, 5)])
def test_any_size(size: tuple[int, int]) -> None:
    assert shapes.render(range(8), size).shape == (8, 3, *size)


def test_labels_take_turns() -> None:
    labels = shapes.labels(range(80))
    assert np.bincount(labels).tolist() == [10] * len(shapes.CLASS_NAMES)
    assert shapes.labels([9]).tolist() == [labels[9]]


def test_every_outline_is_whole_and_inside_the_picture() -> None:
    # Where a shape is drawn, the background is far: count the pixels that differ strongly from their border.
    images = shapes.render(range(64), (64, 64)).astype(int)
    border = np.concatenate([images[..., 0, :], images[..., -1, :], images[..., :, 0], images[..., :, -1]], axis=-1)
    assert np.abs(np.diff(border[..., :64], axis=-1)).max() <= 12, "a shape touches the border"
    edges = np.abs(np.diff(images, axis=-1)).max(axis=(1, 2, 3))
    assert (edges > 40).all(), "a shape is hardly visible"


def test_outlines_are_distances() -> None:
    # Anti-aliasing needs a gradient of about 1 near the outline.
    y, x = np.mgrid[-1.1:1.1:221j, -1.1:1.1:221j].astype(np.float32)
    for name, outline in zip(shapes.CLASS_NAMES, shapes._OUTLINES, strict=True):
        distance = outline(x[None], y[None])[0]
        slope = np.hypot(*np.gradient(distance, 0.01))
        near = np.abs(distance) < 0.02
        assert 0.9 < np.median(slope[near]) < 1.1, name
        assert distance.min() < -0.15, name
        border = np.concatenate([distance[0], distance[-1], distance[:, 0], distance[:, -1]])
        assert border.min() > 0, name


def test_a_linear_model_can_tell_the_shapes_apart_better_than_chance() -> None:
    size = (16, 16)
    train, test = shapes.render(range(1600), size), shapes.render(range(400), size, "test")

    def features(images: np.ndarray) -> np.ndarray:
        flat = np.fft.fft2(images.mean(axis=1) / 255)
        return np.log1p(np.abs(flat[:, :8])).reshape(len(images), -1)

    inputs, mean = features(train), features(train).mean(axis=0)
    targets = np.eye(8)[shapes.labels(range(1600))]
    weights = np.linalg.lstsq(np.c_[inputs - mean, np.ones(1600)], targets, rcond=None)[0]
    guesses = (np.c_[features(test) - mean, np.ones(400)] @ weights).argmax(axis=1)
    assert (guesses == shapes.labels(range(400))).mean() > 0.3


def test_an_unknown_split_is_an_error() -> None:
    with pytest.raises(KeyError):
        shapes.render([0], split="dev")
