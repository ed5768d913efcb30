"""What `priors.check` holds a prior against: one small instance for each kind of data, and how to complain."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from priors.base import Prior, PriorSpec
from priors.sampling import Noise
from vqgen.codes import Codes, LevelSpec
from vqgen.config import Settings

BATCH = 4


class Case(NamedTuple):
    """A prior, and a batch of what it is a density of."""

    prior: Prior
    codes: Tensor
    context: Codes
    label: Tensor | None
    noise: Noise
    text: str

    def rows(self, rows: list[int]) -> tuple[Tensor, Codes, Tensor | None, Noise]:
        """Some maps of the batch only."""
        label = None if self.label is None else self.label[rows]
        noise = dataclasses.replace(self.noise, indices=tuple(self.noise.indices[row] for row in rows))
        return self.codes[rows], tuple(codes[rows] for codes in self.context), label, noise


def specs() -> list[PriorSpec]:
    """One to three levels, maps that are not square, with and without labels."""
    one = (LevelSpec("top", 3, 4, 5, 3),)
    two = (LevelSpec("top", 1, 3, 4, 2), LevelSpec("bottom", 2, 6, 7, 3))
    three = (LevelSpec("top", 1, 2, 3, 2), LevelSpec("middle", 2, 4, 4, 2), LevelSpec("bottom", 4, 8, 5, 2))
    return [_spec(levels, classes) for levels, classes in ((one, 0), (one, 3), (two, 0), (two, 3), (three, 2))]


def tiny_spec(classes: int) -> PriorSpec:
    """A density over 3^4 maps, few enough to add up."""
    return _spec((LevelSpec("top", 1, 1, 2, 2), LevelSpec("bottom", 2, 2, 3, 2)), classes)


def _spec(levels: tuple[LevelSpec, ...], classes: int) -> PriorSpec:
    names = tuple(f"class {i}" for i in range(classes))
    return PriorSpec(levels[-1], levels[:-1], classes, names, codec_fingerprint="check")


def make_case(cls: type[Prior], config: Settings | Mapping[str, Any], spec: PriorSpec) -> Case:
    """A prior made for ``spec``, prepared and shaken, in evaluation mode."""
    levels = len(spec.context) + 1
    text = f"{levels} level{'s' * (levels > 1)}, {spec.classes or 'no'} classes"
    torch.manual_seed(0)
    prior = cls(config, spec)
    generator = torch.Generator().manual_seed(1)
    batches = [_batch(spec, 8, generator) for _ in range(2)]
    books = [torch.randn(level.codebook_size, level.code_dim, generator=generator) for level in _levels(spec)]
    prior.set_codebooks(books[-1], books[:-1])
    prior.prepare(batches)
    with torch.no_grad():
        for parameter in prior.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    prior.eval()
    prior.calibrate(batches)
    codes, context, label = _batch(spec, BATCH, generator)
    noise = Noise(5, tuple(range(11, 11 + BATCH)), len(spec.context))
    return Case(prior.eval(), codes, context, label, noise, text)


def _levels(spec: PriorSpec) -> tuple[LevelSpec, ...]:
    return (*spec.context, spec.target)


def _batch(spec: PriorSpec, size: int, generator: torch.Generator) -> tuple[Tensor, Codes, Tensor | None]:
    maps = [
        torch.randint(level.codebook_size, (size, level.height, level.width), generator=generator)
        for level in _levels(spec)
    ]
    return maps[-1], tuple(maps[:-1]), torch.arange(size) % spec.classes if spec.classes else None


def near(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return bool(((a - b).abs() <= tolerance * b.abs().clamp(min=1.0)).all())


def demand(holds: bool, text: str, case: Case | None = None) -> None:
    if not holds:
        where = "" if case is None else f"{type(case.prior).__name__} ({case.text}): "
        raise AssertionError(f"{where}{text}.")
