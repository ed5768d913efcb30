"""The conditioner's map is aligned with the target's grid and knows every coarser code and the label."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from priors.base import PriorSpec
from priors.conditioning import Conditioner
from vqgen.codes import LevelSpec
from vqgen.errors import InputError, MismatchError


def level(height: int, width: int, size: int = 7) -> LevelSpec:
    return LevelSpec(f"{height}x{width}", height, width, size, 3)


def codes_of(spec: LevelSpec, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(spec.positions)
    return torch.randint(spec.codebook_size, (batch, spec.height, spec.width), generator=generator)


def shaken(conditioner: Conditioner) -> Conditioner:
    """With weights moved, since residual blocks start as the identity."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in conditioner.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return conditioner


@pytest.mark.parametrize("classes", [0, 3])
@pytest.mark.parametrize("sizes", [[], [(2, 3)], [(8, 12)], [(3, 5)], [(1, 1), (4, 6)], [(2, 12)]])
def test_the_map_has_the_size_of_the_target(sizes: list[tuple[int, int]], classes: int) -> None:
    spec = PriorSpec(level(8, 12), tuple(level(*size) for size in sizes), classes)
    conditioner = Conditioner(spec, 6)
    label = torch.tensor([2, 0]) if classes else None
    features = conditioner(tuple(codes_of(c) for c in spec.context), label, 2)
    assert features.shape == (2, 6, 8, 12)
    assert features.isfinite().all()


def test_nothing_to_condition_on_is_zeros_without_weights() -> None:
    conditioner = Conditioner(PriorSpec(level(3, 4)), 5)
    assert not list(conditioner.parameters())
    assert not conditioner.state_dict()
    features = conditioner.double()((), None, 2)
    assert features.dtype == torch.float64
    assert features.shape == (2, 5, 3, 4)
    assert not features.any()


@pytest.mark.parametrize("size", [(4, 4), (2, 4), (2, 2)])
def test_a_coarse_code_moves_its_own_cell_most_and_the_far_side_not_at_all(size: tuple[int, int]) -> None:
    """Without coarse blocks only the 3x3 block after spreading reaches beyond the cell, by one position."""
    spec = PriorSpec(level(8, 8), (level(*size),))
    conditioner = shaken(Conditioner(spec, 5, blocks=0))
    codes = codes_of(spec.context[0], 1)
    changed = codes.clone()
    changed[0, 1, 1] = (changed[0, 1, 1] + 1) % 7
    moved = (conditioner((changed,), None, 1) - conditioner((codes,), None, 1)).abs().amax((0, 1)) > 1e-6
    rows, columns = 8 // size[0], 8 // size[1]
    cell = torch.zeros(8, 8, dtype=torch.bool)
    cell[rows : 2 * rows, columns : 2 * columns] = True
    around = torch.zeros(8, 8, dtype=torch.bool)
    around[rows - 1 : 2 * rows + 1, columns - 1 : 2 * columns + 1] = True
    assert moved[cell].all()
    assert not moved[~around].any()


def test_sizes_that_do_not_divide_take_the_nearest_cell() -> None:
    spec = PriorSpec(level(5, 7), (level(2, 3),))
    conditioner = Conditioner(spec, 4, blocks=0)  # unshaken: the blocks are the identity
    codes = codes_of(spec.context[0], 2)
    features = conditioner((codes,), None, 2)
    embedding = conditioner.levels[0].embedding
    for i in range(5):
        for j in range(7):
            expected = embedding(codes[:, i * 2 // 5, j * 3 // 7])
            assert torch.equal(features[:, :, i, j], expected)


def test_a_fine_position_knows_its_place_in_the_coarse_cell() -> None:
    spec = PriorSpec(level(6, 6), (level(2, 2),))
    conditioner = Conditioner(spec, 8)
    same = torch.zeros(1, 2, 2, dtype=torch.int64)
    cell = conditioner((same,), None, 1)[0, :, :3, :3].flatten(1).T
    assert (torch.cdist(cell, cell) + torch.eye(9) > 1e-3).all()


def test_every_level_counts() -> None:
    spec = PriorSpec(level(8, 8), (level(2, 2), level(4, 4)))
    conditioner = Conditioner(spec, 6)
    context = tuple(codes_of(c) for c in spec.context)
    base = conditioner(context, None, 2)
    for i in range(2):
        changed = tuple((c + (i == j)) % 7 for j, c in enumerate(context))
        assert not torch.allclose(conditioner(changed, None, 2), base)


def test_the_same_code_means_different_things_at_different_levels() -> None:
    spec = PriorSpec(level(4, 4), (level(4, 4), level(4, 4)))
    conditioner = Conditioner(spec, 6)
    a, b = codes_of(level(4, 4)), (codes_of(level(4, 4)) + 3) % 7
    assert not torch.allclose(conditioner((a, b), None, 2), conditioner((b, a), None, 2))


def test_no_label_is_a_label_of_its_own() -> None:
    conditioner = shaken(Conditioner(PriorSpec(level(3, 3), (), 4), 6))
    outputs = [conditioner((), torch.full((2,), label), 2)[0, :, 0, 0] for label in range(5)]
    assert torch.equal(conditioner((), None, 2)[0, :, 0, 0], outputs[4])
    assert (torch.cdist(torch.stack(outputs), torch.stack(outputs)) + torch.eye(5) > 1e-3).all()


def test_no_label_starts_as_the_mean_label() -> None:
    conditioner = Conditioner(PriorSpec(level(2, 2), (), 4), 6)
    every = conditioner((), torch.arange(4), 4)
    assert torch.allclose(conditioner((), None, 1)[0], every.mean(0), atol=1e-6)


def test_hidden_labels_train_their_own_row() -> None:
    conditioner = Conditioner(PriorSpec(level(2, 2), (), 4), 6)
    conditioner((), torch.tensor([4, 1]), 2)[0].sum().backward()
    assert conditioner.label is not None
    assert conditioner.label.weight.grad is not None
    assert conditioner.label.weight.grad[-1].abs().sum() > 0


def test_labels_and_codes_that_do_not_fit_are_refused() -> None:
    unlabelled = Conditioner(PriorSpec(level(4, 4), (level(2, 2),)), 6)
    with pytest.raises(InputError, match="without labels"):
        unlabelled((codes_of(level(2, 2)),), torch.tensor([0, 1]), 2)
    with pytest.raises(MismatchError, match=r"Expected 1 coarser code maps, got 0"):
        unlabelled((), None, 2)
    with pytest.raises(MismatchError, match=r"2 x 2, got 4 x 4"):
        unlabelled((codes_of(level(4, 4)),), None, 2)
