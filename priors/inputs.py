"""Checks of what a prior is given, before any of it reaches the network, and the move to the prior's device.

An index out of range ends a process on an accelerator without saying what was wrong; here it is one line.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vqgen.codes import Codes
from vqgen.errors import InputError, MismatchError

if TYPE_CHECKING:
    from priors.base import Prior


def check_inputs(prior: Prior, batch_size: int, context: Codes, label: Tensor | None) -> tuple[Codes, Tensor | None]:
    """Coarser codes and labels on the prior's device, after checking that they fit its spec.

    Raises:
        MismatchError: the coarser codes are not those this prior was made for.
        InputError: labels for a prior without labels, too few of them, or one out of range.
    """
    expected = [(batch_size, level.height, level.width) for level in prior.spec.context]
    given = [tuple(codes.shape) for codes in context]
    if given != expected:
        raise MismatchError(f"Expected coarser codes of shapes {expected} for this prior, got {given}.")
    for level, codes in zip(prior.spec.context, context, strict=True):
        check_range(codes, level.codebook_size, f"{level.name} codes")
    if label is not None:
        classes = prior.spec.classes
        if not classes:
            raise InputError("This prior was trained without labels.", "Leave the label out.")
        if label.shape != (batch_size,):
            raise InputError(f"Expected {batch_size} labels, one per image, got shape {list(label.shape)}.")
        check_range(label, classes + 1, f"labels ({classes} itself means 'no label')")
        label = label.to(prior.device)
    return tuple(codes.to(prior.device) for codes in context), label


def check_codes(prior: Prior, codes: Tensor) -> Tensor:
    """Codes (B, h, w) of the target level on the prior's device, after checking shape and range.

    Raises:
        MismatchError: another shape or codes out of range.
    """
    target = prior.spec.target
    if tuple(codes.shape[1:]) != (target.height, target.width):
        raise MismatchError(
            f"Expected {target.name} codes of shape (B, {target.height}, {target.width}), got {tuple(codes.shape)}."
        )
    check_range(codes, target.codebook_size, f"{target.name} codes")
    return codes.to(prior.device)


def check_mask(
    prior: Prior, batch_size: int, known: Tensor | None, keep: Tensor | None
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Known codes and mask on the prior's device; known codes that are not kept may be anything.

    Raises:
        InputError: one without the other, of another shape than the code map, or kept codes out of range.
    """
    if known is None or keep is None:
        if known is not None or keep is not None:
            raise InputError("'known' codes and the 'keep' mask come together.", "Give both, or neither.")
        return None, None
    target = prior.spec.target
    shape = (batch_size, target.height, target.width)
    if known.shape != shape or keep.shape != shape:
        raise InputError(
            f"'known' and 'keep' must have shape {list(shape)}, got {list(known.shape)} and {list(keep.shape)}."
        )
    known, keep = known.to(prior.device), keep.to(prior.device, torch.bool)
    check_range(known[keep], target.codebook_size, "known codes")
    return known, keep


def check_range(values: Tensor, end: int, what: str) -> None:
    """Raise `InputError` where an element of ``values`` is not in [0, end)."""
    if values.numel() and (int(values.min()) < 0 or int(values.max()) >= end):
        raise InputError(f"Expected {what} from 0 to {end - 1}, got {int(values.min())} to {int(values.max())}.")
