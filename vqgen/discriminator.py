"""The codec's adversary: a PatchGAN discriminator, its loss, and how much of it the codec is given.

The network is that of Isola et al. 2017 (sec. 3.2.2, arXiv 1611.07004): fully convolutional, one verdict for each
of many overlapping patches. Group normalisation (Wu & He 2018, arXiv 1803.08494) takes the place of that paper's
batch normalisation, so that a verdict depends on one image alone. The losses are the hinge losses of Lim & Ye 2017
(arXiv 1705.02894), and the codec's share is weighed by gradient norms as in VQGAN (Esser et al. 2021, eq. 7, arXiv
2012.09841). There is no perceptual loss here, and no training loop: it is a player of `vqgen.training`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqgen.codes import ImageSpec
from vqgen.collectives import place, sum_over_processes
from vqgen.config import DiscriminatorSettings
from vqgen.errors import ConfigError

WIDEST = 8
"""Most channels, as a multiple of the first layer's."""
GROUPS = 8
"""Groups of the normalisation, where the channels can be so divided."""
MOST_WEIGHT = 1e4
"""Where the adaptive weight ends (Esser et al. 2021, in their published code)."""
SCALE = 2.0**12
"""Keeps the gradients at single pixels within the range of float16; a power of two, so no bit of the result changes."""


class PatchDiscriminator(nn.Module):
    """Images (B, C, H, W) in [-1, 1] to verdicts (B, 1, h, w), positive for real patches.

    Raises:
        ConfigError: the images are too small for so many halvings.
    """

    def __init__(self, settings: DiscriminatorSettings, spec: ImageSpec) -> None:
        super().__init__()
        least = 2**settings.layers
        if min(spec.height, spec.width) < least:
            raise ConfigError(
                f"codec.discriminator.layers: {settings.layers} halvings need images of at least {least}x{least} "
                f"pixels, got {spec.height}x{spec.width}.",
                "Use fewer layers, or larger images.",
            )
        widths = [settings.width * min(2**index, WIDEST) for index in range(settings.layers + 1)]
        layers: list[nn.Module] = []
        channels = spec.channels
        for index, width in enumerate(widths):
            kernel, stride = (4, 2) if index < settings.layers else (3, 1)
            layers.append(nn.Conv2d(channels, width, kernel, stride, padding=1, bias=index == 0))
            if index:  # the first layer sees colours and contrast as they are
                layers.append(nn.GroupNorm(math.gcd(GROUPS, width), width))
            layers.append(nn.LeakyReLU(0.2, inplace=True))
            channels = width
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels, 1, 3, padding=1))

    def forward(self, images: Tensor) -> Tensor:
        verdicts: Tensor = self.layers(images)
        return verdicts


def hinge_loss(real: Tensor, made: Tensor) -> Tensor:
    """() what the discriminator minimises, from its verdicts on real and on made images."""
    return (F.relu(1 - real.float()).mean() + F.relu(1 + made.float()).mean()) / 2


def adversarial_loss(made: Tensor) -> Tensor:
    """() what the maker minimises, from the discriminator's verdicts on its images."""
    return -made.float().mean()


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last: Tensor) -> Tensor:
    """() |grad of ``reconstruction``| / |grad of ``adversarial``| at the weight ``last``, at most 1e4.

    With it the two losses pull equally at the decoder's last layer (Esser et al. 2021, eq. 7). Both graphs are kept;
    the result has no gradient. The losses are multiplied by `SCALE` on their way back. Of several processes it is the
    weight of their joint batch, the same on all: each calls this alike.
    """
    losses = (reconstruction, adversarial)
    gradients = torch.stack([torch.autograd.grad(SCALE * loss, last, retain_graph=True)[0] for loss in losses])
    norms = sum_over_processes(gradients).flatten(1).norm(dim=1) / (SCALE * place()[1])
    weight: Tensor = norms[0] / (norms[1] + 1e-6)
    return weight.clamp(max=MOST_WEIGHT).detach()
