"""How complex a picture is: its length in a lossless coder (Serra et al. 2020, arXiv 1909.11480).

The coder is lossless WebP as Pillow writes it: of the coders that come with it the one that makes small pictures
shortest (a quarter to a third shorter than PNG). One picture always has the same length in one version of the
library, which is kept beside the scores; the same few bytes of every file that are not pixels make no difference.
"""

from __future__ import annotations

import io

import torch
from PIL import features
from torch import Tensor

from vqgen.errors import InputError
from vqgen.images import to_pil

OPTIONS = {"lossless": True, "exact": True, "method": 4, "quality": 80}
"""``exact`` keeps the colours of transparent pixels; in lossless coding ``quality`` is effort."""


def check_coder() -> str:
    """The coder and its version, for the record.

    Raises:
        InputError: this Pillow was built without it.
    """
    if not features.check("webp"):
        raise InputError(
            "Scores need lossless WebP, which this Pillow was built without.", "Install it with: pip install pillow"
        )
    return f"WebP lossless, libwebp {features.version('webp')}"


def complexity_bits(images: Tensor) -> Tensor:
    """(B,) float64 bits of uint8 images (B, C, H, W), each coded alone."""
    return torch.tensor([8 * _coded_bytes(image) for image in images], dtype=torch.float64)


def _coded_bytes(image: Tensor) -> int:
    buffer = io.BytesIO()
    to_pil(image).save(buffer, format="WEBP", **OPTIONS)
    return len(buffer.getvalue())
