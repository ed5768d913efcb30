"""Which images make up a batch: by seed, epoch, place in the epoch and process."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
import torch
from torch import Tensor

from vqgen.errors import InputError
from vqgen.sampler import EpochSampler, evaluation_batches, training_batches


class Numbers(torch.utils.data.Dataset[Any]):
    def __init__(self, count: int) -> None:
        self.count = count
        self.epochs: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def __len__(self) -> int:
        return self.count

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        return {"index": torch.tensor(indices)}


def test_epoch_order_is_a_function_of_seed_and_epoch() -> None:
    sampler = EpochSampler(10, 3, seed=2**40 + 1)
    first = list(sampler)
    assert len(first) == len(sampler) == 3
    assert len({index for batch in first for index in batch}) == 9
    sampler.offset = 1
    assert list(sampler) == first[1:]
    sampler.epoch, sampler.offset = 1, 0
    assert list(sampler) != first
    assert list(EpochSampler(10, 3, seed=1)) != first


def test_processes_share_the_joint_batch() -> None:
    joint = list(EpochSampler(50, 8, seed=0))
    parts = [list(EpochSampler(50, 4, seed=0, rank=rank, processes=2)) for rank in range(2)]
    assert [one + other for one, other in zip(*parts, strict=True)] == joint


def test_fewer_images_than_a_batch_make_a_smaller_one() -> None:
    assert [len(batch) for batch in EpochSampler(5, 128, seed=0)] == [5]
    assert [len(batch) for batch in EpochSampler(5, 128, seed=0, rank=1, processes=2)] == [2]
    with pytest.raises(InputError, match="is empty"):
        EpochSampler(0, 4, seed=0)
    with pytest.raises(InputError, match="1 images for 2 processes"):
        EpochSampler(1, 4, seed=0, processes=2)


def test_every_validation_image_is_read_by_one_process() -> None:
    data = Numbers(11)
    parts = [evaluation_batches(data, 9, 2, rank=rank, processes=3) for rank in range(3)]
    read = torch.cat([batch["index"] for part in parts for batch in part])
    assert sorted(read.tolist()) == [index * 11 // 9 for index in range(9)]


def test_workers_give_the_same_batches() -> None:
    here = training_batches(Numbers(32), EpochSampler(32, 8, seed=0), start=2, workers=0)
    there = training_batches(Numbers(32), EpochSampler(32, 8, seed=0), start=2, workers=2)
    for _ in range(4):
        assert torch.equal(next(here)["index"], next(there)["index"])
    there.close()


def test_batches_go_on_where_a_training_stopped_and_announce_each_epoch() -> None:
    whole, later = Numbers(10), Numbers(10)
    stream = training_batches(whole, EpochSampler(10, 3, seed=0), start=0, workers=0)
    expected = [next(stream)["index"].tolist() for _ in range(9)]
    resumed = training_batches(later, EpochSampler(10, 3, seed=0), start=4, workers=0)
    assert [next(resumed)["index"].tolist() for _ in range(5)] == expected[4:]
    assert (whole.epochs, later.epochs) == ([0, 1, 2], [1, 2])


def test_batches_leave_the_global_generator() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    stream = training_batches(Numbers(10), EpochSampler(10, 3, seed=0), start=0, workers=0)
    for _ in range(7):
        next(stream)
    list(evaluation_batches(Numbers(10), 5, 2))
    assert torch.equal(torch.get_rng_state(), before)


class Signalled(Numbers):
    """A data set whose reader is told to end with every batch: a cluster tells all processes of a job."""

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        return super().__getitems__(indices)


def test_a_process_that_loads_data_leaves_signals_to_the_training() -> None:
    batches = training_batches(Signalled(6), EpochSampler(6, 2, seed=0), start=0, workers=1)
    assert sorted(index for _ in range(3) for index in next(batches)["index"].tolist()) == list(range(6))
    batches.close()
