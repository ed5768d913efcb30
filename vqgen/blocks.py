"""Convolutional parts of the codec: residual stacks, strided encoders, transposed decoders.

The shapes of VQ-VAE-2 (Razavi et al. 2019, sec. 3.1 and appendix): 4x4 convolutions of stride 2 down, their
transposes up, ReLU between, residual blocks of ReLU - 3x3 - ReLU - 1x1. There is no normalisation and no
attention here.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn


def halvings(stride: int) -> int:
    """How often a map is halved to be ``stride`` (a power of two) times smaller."""
    return stride.bit_length() - 1


def encoder_filters(width: int, stride: int) -> tuple[int, ...]:
    """Channels of an encoder's convolutions: half of ``width`` first, where the map is largest, then ``width``."""
    return (max(width // 2, 1), *[width] * halvings(stride))


def decoder_filters(width: int, stride: int) -> tuple[int, ...]:
    """Channels of a decoder's convolutions before its output: ``width``, and half of it where the map is largest."""
    doublings = halvings(stride)
    return (width,) if doublings == 1 else (*[width] * (doublings - 1), max(width // 2, 1))


class ResidualBlock(nn.Module):
    """``x + conv1x1(relu(conv3x3(relu(x))))``, (B, width, h, w) to the same."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        # The first ReLU must not work in place: the sum needs x as it came.
        self.layers = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(width, hidden, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, width, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        residual: Tensor = self.layers(x)
        return x + residual


def residual_stack(width: int, blocks: int, hidden: int) -> list[nn.Module]:
    """Residual blocks and the ReLU that ends them."""
    return [*[ResidualBlock(width, hidden) for _ in range(blocks)], nn.ReLU()]


class Encoder(nn.Sequential):
    """(B, channels, h, w) to (B, filters[-1], h/stride, w/stride); h and w are multiples of ``stride``.

    The first convolutions halve the map until ``stride`` is reached, the others keep its size.
    """

    def __init__(self, channels: int, filters: Sequence[int], stride: int, blocks: int, hidden: int) -> None:
        layers: list[nn.Module] = []
        for index, width in enumerate(filters):
            if index:
                layers.append(nn.ReLU(inplace=True))
            if index < halvings(stride):
                layers.append(nn.Conv2d(channels, width, 4, stride=2, padding=1))
            else:
                layers.append(nn.Conv2d(channels, width, 3, padding=1))
            channels = width
        super().__init__(*layers, *residual_stack(channels, blocks, hidden))


class Decoder(nn.Sequential):
    """(B, channels, h, w) to (B, out_channels, h*stride, w*stride): the mirror image of an encoder.

    ``filters`` are the channels before the output, in the order of the decoder. A 3x3 convolution leads to the
    first of them and to the residual blocks; of the steps that follow, the last ones double the map.
    """

    def __init__(
        self, channels: int, out_channels: int, filters: Sequence[int], stride: int, blocks: int, hidden: int
    ) -> None:
        widths = [*filters, out_channels]
        layers: list[nn.Module] = [
            nn.Conv2d(channels, widths[0], 3, padding=1),
            *residual_stack(widths[0], blocks, hidden),
        ]
        for index, (before, after) in enumerate(pairwise(widths)):
            if index:
                layers.append(nn.ReLU(inplace=True))
            if index < len(filters) - halvings(stride):
                layers.append(nn.Conv2d(before, after, 3, padding=1))
            else:
                layers.append(nn.ConvTranspose2d(before, after, 4, stride=2, padding=1))
        super().__init__(*layers)


class Upsampler(nn.Sequential):
    """(B, width, h, w) to (B, width, h*stride, w*stride) by transposed convolutions; nothing at stride 1."""

    def __init__(self, width: int, stride: int) -> None:
        layers: list[nn.Module] = []
        for index in range(halvings(stride)):
            if index:
                layers.append(nn.ReLU(inplace=True))
            layers.append(nn.ConvTranspose2d(width, width, 4, stride=2, padding=1))
        super().__init__(*layers)
