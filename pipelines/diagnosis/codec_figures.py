"""What the codec and its codebooks do on images that no training has read.

A sample can be no better than a reconstruction, and a prior can learn no more than the codes hold: these figures say
how much there is to sample at all. All errors are mean squared errors on the [0, 1] pixel scale.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from pipelines.run_codes import code_batches
from vqgen.code_store import CodeSplit, CodeStore
from vqgen.codec import HierarchicalVQVAE
from vqgen.codes import Codes
from vqgen.data import ImageData
from vqgen.image_split import ImageSplit
from vqgen.images import to_float
from vqgen.metrics import CodeUsage, mse, psnr

PIXELS_AT_ONCE = 2**22
"""Values of images that are decoded in one go."""
MOST_PSNR = 99.0
"""dB that count for a picture that comes back as it was, whose PSNR is infinite."""


@dataclass(frozen=True)
class CodebookFigures:
    """How the codes of one level are used by training images."""

    level: str
    images: int
    """Training images whose codes were counted."""
    size: int
    perplexity: float
    usage: float
    dead: int
    verdict: str
    """`vqgen.metrics.CodeUsage.verdict` of the counts."""
    counts: tuple[int, ...]
    """Uses of each code, most used first."""


@dataclass(frozen=True)
class CodecFigures:
    """What comes back of test images."""

    images: int
    mse: float
    psnr: float
    """dB, the mean over images."""
    train_mse: float
    """The same of as many training images."""
    mean_image_mse: float
    """Error of showing the mean training image for every image."""
    flat_mse: float
    """Error of showing each image's own mean colour."""
    sharpness: float | None
    """Squared differences of neighbouring pixels, reconstructions over originals; None where originals have none."""
    depths: Mapping[str, float]
    """Error of decoding the coarsest levels only, by the levels shown."""
    depths_trained: bool
    """Whether the codec was trained to do without its finer levels (``codec.level_dropout``)."""
    carried: Mapping[str, float] | None
    """Per level, the error of decoding with this level's codes of another image, as a share of that of another
    image's whole reconstruction: 0 where the decoder does not look at the level. None with fewer than two images."""

    @property
    def baseline(self) -> float:
        """The better of the two errors without a codec."""
        return min(self.mean_image_mse, self.flat_mse)

    @property
    def explained(self) -> float | None:
        """Share of the better baseline's error that the codec removes; None where there is nothing to remove."""
        return 1 - self.mse / self.baseline if self.baseline > 0 else None


def measure_codebook(store: CodeStore, level: int, indices: Sequence[int]) -> CodebookFigures:
    """Use of one level's codes over the training images at ``indices``."""
    spec = store.info.levels[level]
    usage = CodeUsage(spec.codebook_size)
    for codes, _, _ in code_batches(store.split("train"), level, indices):
        usage.add(codes)
    return CodebookFigures(
        level=spec.name,
        images=len(indices),
        size=spec.codebook_size,
        perplexity=usage.perplexity,
        usage=usage.usage,
        dead=usage.dead,
        verdict=usage.verdict(spec.name),
        counts=tuple(usage.counts.sort(descending=True).values.tolist()),
    )


@torch.no_grad()
def measure_codec(
    codec: HierarchicalVQVAE, store: CodeStore, data: ImageData, test: Sequence[int], train: Sequence[int]
) -> CodecFigures:
    """Reconstructions of the test images at ``test``, against baselines, level by level.

    ``train`` are the training images for the mean image and the training error.
    """
    names = [level.name for level in codec.levels]
    device = next(codec.parameters()).device
    total = torch.zeros(codec.spec.channels, codec.spec.height, codec.spec.width, dtype=torch.float64)
    train_error = 0.0
    for images, codes in pairs(data.splits["train"], store.split("train"), train, codec):
        total += (images.double().cpu() / 255).sum(0)
        train_error += float(mse(codec.decode(codes), to_float(images)).sum())
    mean_image = to_float((total / len(train) * 255).round().to(torch.uint8)[None]).to(device)

    sums: dict[str, float] = {}

    def add(name: str, values: Tensor) -> None:
        sums[name] = sums.get(name, 0.0) + float(values.double().sum())

    others = [*test[len(test) // 2 :], *test[: len(test) // 2]]  # half the split away: of another class where sorted
    images_of, codes_of = data.splits["test"], store.split("test")
    both = zip(pairs(images_of, codes_of, test, codec), pairs(images_of, codes_of, others, codec), strict=True)
    for (originals, codes), (_, other) in both:
        images = to_float(originals)
        made = codec.decode(codes)
        add("mse", mse(made, images))
        add("psnr", psnr(made, images).clamp(max=MOST_PSNR))
        add("mean", mse(mean_image.expand_as(images), images))
        add("flat", mse(images.mean((2, 3), keepdim=True).expand_as(images), images))
        add("edges", edges(images))
        add("made edges", edges(made))
        for depth in range(1, len(names)):
            add(f"depth {depth}", mse(codec.decode(codes[:depth]), images))
        if len(test) > 1:
            add("other", mse(codec.decode(other), images))
            for level in range(len(names)):
                mixed = (*codes[:level], other[level], *codes[level + 1 :])
                add(f"without {level}", mse(codec.decode(mixed), images))
    found = {name: value / len(test) for name, value in sums.items()}
    lost = found["other"] - found["mse"] if "other" in found else 0.0
    shown = [*(found[f"depth {depth}"] for depth in range(1, len(names))), found["mse"]]
    return CodecFigures(
        images=len(test),
        mse=found["mse"],
        psnr=found["psnr"],
        train_mse=train_error / len(train),
        mean_image_mse=found["mean"],
        flat_mse=found["flat"],
        sharpness=found["made edges"] / found["edges"] if found["edges"] > 0 else None,
        depths=dict(zip(accumulate(names, lambda some, name: f"{some}+{name}"), shown, strict=True)),
        depths_trained=codec.config.level_dropout > 0,
        carried={name: (found[f"without {i}"] - found["mse"]) / lost for i, name in enumerate(names)}
        if lost > 0
        else None,
    )


def edges(images: Tensor) -> Tensor:
    """(B,) mean squared differences of neighbouring pixels of images in [-1, 1]: what blur removes first."""
    down = (images[:, :, 1:] - images[:, :, :-1]).square().flatten(1).sum(1)
    right = (images[..., 1:] - images[..., :-1]).square().flatten(1).sum(1)
    return (down + right) / images[0].numel()


def images_at_once(codec: HierarchicalVQVAE) -> int:
    """Images that are encoded and decoded in one go."""
    return max(1, min(128, PIXELS_AT_ONCE // codec.spec.dims))


def pairs(
    images: ImageSplit, codes: CodeSplit, indices: Sequence[int], codec: HierarchicalVQVAE
) -> Iterator[tuple[Tensor, Codes]]:
    """Images (B, C, H, W) uint8, not mirrored, and their codes, on the codec's device."""
    device = next(codec.parameters()).device
    images.set_epoch(None)
    step = images_at_once(codec)
    for start in range(0, len(indices), step):
        span = indices[start : start + step]
        shown = images.__getitems__(span)["images"].to(device)
        yield shown, tuple(level.to(device) for level in codes.__getitems__(span)["codes"])
