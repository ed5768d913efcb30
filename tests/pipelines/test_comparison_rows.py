"""The figures of a row: the bound against enumeration, errors by bootstrap, sizes in one convention."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipelines.comparison_rows import COLUMNS, code_size, compression_columns, rows_of
from pipelines.likelihood import HeldOut, code_density
from pipelines.report.columns import QUALITY
from priors import registry
from priors.base import PriorSpec
from vqgen.checkpoint import random_state
from vqgen.codec import HierarchicalVQVAE
from vqgen.codes import ImageSpec
from vqgen.config import CodecConfig
from vqgen.console import Console
from vqgen.images import to_float
from vqgen.losses import discretized_gaussian_nats
from vqgen.metrics import bootstrap_standard_error
from vqgen.run_folder import RunFolder

K = 5
SHARES = torch.tensor([0.3, 0.7], dtype=torch.float64)
"""Of the two classes."""


class OneCode:
    """A split of images of one pixel, each of one code and one class, as `vqgen.code_store.CodeSplit` gives them."""

    def __init__(self, codes: Tensor, labels: Tensor) -> None:
        self.codes, self.label = codes, labels

    def __len__(self) -> int:
        return len(self.codes)

    def __getitems__(self, indices: Any) -> dict[str, Any]:
        chosen = torch.as_tensor(list(indices))
        return {"codes": (self.codes[chosen],), "label": self.label[chosen]}


def gaussian_bin(value: int, mean: float, scale: float) -> float:
    """Mass of a Gaussian on the 8-bit ``value``, whose bin on [-1, 1] is 2/255 wide; the ends take the tails."""

    def below(edge: float) -> float:
        return 0.5 * math.erfc((mean - edge) / (scale * math.sqrt(2)))

    low = 0.0 if value == 0 else below((2 * value - 1) / 255 - 1)
    return (1.0 if value == 255 else below((2 * value + 1) / 255 - 1)) - low


def test_bits_per_dim_is_a_bound_that_enumeration_confirms(tmp_path: Path) -> None:
    """Every image of one pixel and every code of one place: p(x) = sum over y, z of p(y) p(z | y) p(x | z)."""
    torch.manual_seed(0)
    config = CodecConfig(strides=(2,), codebook_size=K, code_dim=3, width=8, residual_blocks=1, residual_width=8)
    codec = HierarchicalVQVAE(config, ImageSpec(1, 1, 1)).eval()
    codec.quantizers[0].codebook.copy_(torch.randn(K, 3))
    codec.decoder_scale.fill_(0.25)
    pixels = torch.arange(256, dtype=torch.uint8).reshape(256, 1, 1, 1)
    with torch.no_grad():
        codes = codec.encode(to_float(pixels))[0]
        means = codec.decode([torch.arange(K).reshape(K, 1, 1)]).flatten().tolist()
    labels = (torch.arange(256) % 3 == 0).long()
    prior = registry.get("unigram")({}, PriorSpec(codec.levels[0], (), 2, ("a", "b")))
    generator = torch.Generator().manual_seed(1)
    seen = torch.randint(K, (40, 1, 1), generator=generator)
    prior.prepare([(seen, (), torch.arange(40) % 2)])

    with torch.no_grad():
        made = codec.decode([codes])
    held_out = HeldOut(
        codes=OneCode(codes, labels),  # type: ignore[arg-type]
        indices=range(256),
        pictured=(),
        pictures=pixels[:0],
        picture_labels=None,
        decoder_nats=discretized_gaussian_nats(pixels, made, codec.decoder_scale),
        label_nats=-SHARES.log()[labels],
        reconstruction={},
        data=SimpleNamespace(notes=()),  # type: ignore[arg-type]
    )
    density = code_density(prior, held_out, 0, Console(silent=True))
    rows = rows_of(RunFolder(tmp_path), "unigram", [prior], {("unigram", "top"): density}, held_out, codec)
    bound = rows[-1]["bits_per_dim"]

    given = [prior.table(label)[0].exp().tolist() for label in range(2)]  # p(z | y)
    joint = np.array(
        [
            [[float(SHARES[y]) * given[y][z] * gaussian_bin(x, means[z], 0.25) for z in range(K)] for y in range(2)]
            for x in range(256)
        ]
    )
    assert joint.sum() == pytest.approx(1, abs=1e-9), "the model is a distribution over images"
    own = joint[np.arange(256), labels.numpy(), codes.flatten().numpy()]
    assert bound == pytest.approx(-np.log2(own).mean(), abs=1e-5)
    assert bound > -np.log2(joint.sum((1, 2))).mean(), "coding one way costs more than the image's own bits"
    assert (
        rows[-1]["bits_per_code"]
        == rows[-1]["bits_per_image"]
        == pytest.approx(-float(density.nats.mean()) / math.log(2))
    )


def test_bootstrap_finds_the_error_of_a_mean_and_touches_no_generator() -> None:
    values = torch.from_numpy(np.random.default_rng(0).gamma(2.0, size=3000))
    before = random_state()
    found = bootstrap_standard_error(values)
    after = random_state()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert found == pytest.approx(float(values.std()) / math.sqrt(3000), rel=0.1)
    assert found == bootstrap_standard_error(values)
    assert found != bootstrap_standard_error(values, seed=1)
    assert bootstrap_standard_error(values, resamples=50) != found


def test_bootstrap_of_few_values() -> None:
    assert bootstrap_standard_error(torch.tensor([])) is None
    assert bootstrap_standard_error(torch.tensor([3.0])) is None
    assert bootstrap_standard_error(torch.tensor([3.0, 3.0])) == 0
    assert bootstrap_standard_error(torch.tensor([0.0, 1.0])) == pytest.approx(0.5 / math.sqrt(2), rel=0.1)


def test_bootstrap_in_parts_is_as_good(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.from_numpy(np.random.default_rng(0).normal(size=500))
    monkeypatch.setattr("vqgen.metrics.BOOTSTRAP_VALUES", 700)  # one resample at a time
    assert bootstrap_standard_error(values) == pytest.approx(1 / math.sqrt(500), rel=0.1)


def test_sizes_are_bits_over_bits() -> None:
    image = ImageSpec(3, 32, 32)
    columns = compression_columns(1024.0, image)
    assert columns == {"bytes_per_image": 128, "bits_per_pixel": 1.0, "compression_ratio": 24.0}
    assert set(compression_columns(None, image).values()) == {None}
    assert compression_columns(0.0, image)["compression_ratio"] is None


def test_codes_at_log2_k() -> None:
    codec = HierarchicalVQVAE(
        CodecConfig(strides=(8, 4), codebook_size=(16, 64), code_dim=4, width=8, residual_width=8), ImageSpec(3, 16, 8)
    )
    bits = 2 * 1 * 4 + 4 * 2 * 6
    assert code_size(codec) == {
        "bits_per_image": bits,
        "bytes_per_image": bits / 8,
        "bits_per_pixel": bits / 128,
        "ratio": 3 * 128 * 8 / bits,
    }


def test_every_column_of_the_report_is_in_a_row() -> None:
    assert {column.key for column in QUALITY} <= set(COLUMNS)
    assert len(set(COLUMNS)) == len(COLUMNS)
