"""A run's codec and codes, as every stage after encoding takes them up."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from priors.base import PriorSpec
from vqgen.code_info import ENCODE_AGAIN, INFO
from vqgen.code_store import CodeSplit, CodeStore
from vqgen.codec import HierarchicalVQVAE
from vqgen.codes import Codes
from vqgen.errors import InputError, MismatchError, VqgenError, did_you_mean
from vqgen.hub import fingerprint
from vqgen.run_folder import RunFolder

BATCH = 256
CPU = torch.device("cpu")

Batch = tuple[Tensor, Codes, Tensor | None]
"""Codes, context and label, as `Prior.prepare` takes them."""


def open_store(run: RunFolder) -> CodeStore:
    """The codes of a run, checked against its codec without loading it.

    Raises:
        InputError: the run has no codec or no codes yet.
        MismatchError: the codes were made by another codec.
    """
    run.require_stage("codec", "train-codes --resume")
    run.require_stage("codes", "train-codes --resume")
    store = CodeStore.load(run.codes)
    if store.info.codec_fingerprint != fingerprint(run.codec):
        HierarchicalVQVAE.from_pretrained(run.codec)  # a damaged codec is to be named as one
        raise MismatchError(
            f"The codes in {run.codes} were made by another codec than the one in {run.codec}.",
            f"Put back that codec, or redo the run with `{run.command('train-codes --overwrite')}`.",
        )
    return store


def open_codes(run: RunFolder) -> tuple[HierarchicalVQVAE, CodeStore]:
    """The codec of a run and its codes; raises like `open_store`."""
    store = open_store(run)
    codec = HierarchicalVQVAE.from_pretrained(run.codec)
    if (store.info.levels, store.info.image) != (codec.levels, codec.spec):
        raise InputError(f"The sizes in {run.codes / INFO} are not those of the codec in {run.codec}.", ENCODE_AGAIN)
    return codec, store


def prior_spec(store: CodeStore, level: int) -> PriorSpec:
    """The shapes a prior of ``level`` is made for."""
    info = store.info
    return PriorSpec(
        target=info.levels[level],
        context=info.levels[:level],
        classes=len(info.class_names),
        class_names=info.class_names,
        codec_fingerprint=info.codec_fingerprint,
    )


def split_batch(batch: Mapping[str, Any], level: int) -> tuple[Tensor, Codes, Tensor | None]:
    """The codes of a level, the coarser codes, and the labels of a batch of the code store."""
    return batch["codes"][level], tuple(batch["codes"][:level]), batch.get("label")


def code_batches(
    split: CodeSplit, level: int, indices: Sequence[int] | None = None, device: torch.device = CPU
) -> Iterator[Batch]:
    """The codes of a split, or of some of its images, in order."""
    chosen = range(len(split)) if indices is None else indices
    for start in range(0, len(chosen), BATCH):
        codes, context, label = split_batch(split.__getitems__(chosen[start : start + BATCH]), level)
        on_device = tuple(coarser.to(device) for coarser in context)
        yield codes.to(device), on_device, None if label is None else label.to(device)


@contextmanager
def as_far_as_read(batches: Iterable[Batch]) -> Iterator[Iterator[Batch]]:
    """``batches`` up to one that cannot be read, whose error is raised at the end of the block.

    For a block that ends in a sum over all processes, as `Prior.prepare` does: the one that fails must come so far.
    """
    failed: list[VqgenError] = []

    def read() -> Iterator[Batch]:
        try:
            yield from batches
        except VqgenError as error:
            failed.append(error)

    yield read()
    if failed:
        raise failed[0]


def check_levels(levels: Iterable[str], known: Sequence[str], option: str) -> None:
    """Refuse a level that the run does not have.

    Raises:
        InputError: naming the levels there are, and the nearest.
    """
    for level in levels:
        if level not in known:
            hint = f"{did_you_mean(level, known)} This run has {', '.join(known)}.".strip()
            raise InputError(f"{option}: there is no level '{level}'.", hint)
