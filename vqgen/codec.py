"""The codec: a hierarchical VQ-VAE (VQ-VAE-2, Razavi et al. 2019, sec. 3.1) of one, two or three levels.

Encoding goes fine to coarse and back: the finest encoder takes the image down to the finest stride, each coarser
one takes the features of the finer one further down. The coarsest level is quantised first; its codes, decoded to
the size of the next finer level, join that level's features before they are quantised, and so on. The decoder sees
all levels. The three-level model is the same recursion once more, not another architecture.

The loss is eq. 3 of van den Oord et al. 2017 with every term a mean over all elements, so that beta means one
thing at any size. What one level does with its vectors is `vqgen.quantizer`; likelihoods are `vqgen.losses`; the
training loop is `vqgen.training`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from vqgen.blocks import Decoder, Encoder, Upsampler, decoder_filters, encoder_filters
from vqgen.codes import MAX_SIDE, Codes, ImageSpec, LevelSpec, level_names
from vqgen.compiling import Part
from vqgen.config import CodecConfig, CodecSection
from vqgen.errors import InputError
from vqgen.hub import HubModel
from vqgen.losses import reconstruction_error
from vqgen.quantizer import Quantized, VectorQuantizer


class Reconstruction(NamedTuple):
    """What the codec makes of a batch of images."""

    images: Tensor
    """(B, C, H, W) float on the scale of [-1, 1], not clamped."""
    codes: Codes
    """Coarse to fine, each (B, h, w) int64."""
    loss: Tensor
    """(): reconstruction plus the losses of the quantizers."""
    metrics: dict[str, Tensor]
    """Scalars to log, detached."""


class HierarchicalVQVAE(HubModel):
    """Images (B, C, H, W) float in [-1, 1] to code maps, coarse to fine, and back.

    Images whose sides are no multiples of the coarsest stride are padded at the bottom and the right with their
    last row and column, and cropped back; the code maps have the padded size.
    """

    kind = "codec"
    name = "vqvae2"
    Config = CodecConfig
    Spec = ImageSpec
    config: CodecConfig
    spec: ImageSpec
    levels: tuple[LevelSpec, ...]
    """Sizes of the code maps, coarse to fine."""
    quantizers: Sequence[VectorQuantizer]
    """Coarse to fine (an nn.ModuleList)."""
    decoder_scale: Tensor
    """(C,) scales of the discretised Gaussian around the decoder's output (`vqgen.losses`); NaN until calibrated."""

    def __init__(self, config: CodecConfig | Mapping[str, Any], spec: ImageSpec) -> None:
        super().__init__(config.architecture if isinstance(config, CodecSection) else config, spec)
        if not (1 <= spec.channels <= 4 and 1 <= spec.height <= MAX_SIDE and 1 <= spec.width <= MAX_SIDE):
            raise InputError(
                f"The codec takes images of 1 to 4 channels and of 1x1 to {MAX_SIDE}x{MAX_SIDE} pixels, got {spec}."
            )
        config = self.config
        strides, dims = config.strides, config.per_level("code_dim")
        depth = len(strides)
        stack = (config.residual_blocks, config.residual_width)
        self.levels = _levels(config, spec)

        finest_filters = config.filters or encoder_filters(config.width, strides[-1])
        encoders: list[nn.Module] = [Encoder(spec.channels, finest_filters, strides[-1], *stack)]
        features = [finest_filters[-1]]  # channels that each encoder gives, coarse to fine
        for coarse, fine in reversed(list(pairwise(strides))):
            filters = encoder_filters(config.width, coarse // fine)
            encoders.insert(0, Encoder(features[0], filters, coarse // fine, *stack))
            features.insert(0, filters[-1])
        self.encoders = nn.ModuleList(encoders)
        self.projections = nn.ModuleList(
            nn.Conv2d(features[i] + (dims[i - 1] if i else 0), dims[i], kernel_size=1) for i in range(depth)
        )
        self.quantizers = nn.ModuleList(  # type: ignore[assignment]
            VectorQuantizer(
                size, dim, commitment=beta, codebook=config.codebook, decay=config.decay, revival=config.revival, seed=i
            )
            for i, (size, dim, beta) in enumerate(
                zip(config.per_level("codebook_size"), dims, config.per_level("commitment"), strict=True)
            )
        )
        self.conditioners = nn.ModuleList(
            Decoder(
                dims[i] + (dims[i - 1] if i else 0),
                dims[i],
                decoder_filters(config.width, strides[i] // strides[i + 1]),
                strides[i] // strides[i + 1],
                *stack,
            )
            for i in range(depth - 1)
        )
        self.upsamplers = nn.ModuleList(Upsampler(dims[i], strides[i] // strides[-1]) for i in range(depth))
        last_filters = config.filters[::-1] if config.filters else decoder_filters(config.width, strides[-1])
        self.decoder = Decoder(sum(dims), spec.channels, last_filters, strides[-1], *stack)
        # What the decoder is shown in place of a hidden level; the coarsest is never hidden.
        self.absent = nn.ParameterList(torch.zeros(dim) for dim in dims[1:] if config.level_dropout > 0)
        # float32, since a model with a float64 buffer cannot be moved to Apple's GPUs.
        self.register_buffer("decoder_scale", torch.full((spec.channels,), torch.nan, dtype=torch.float32))

    def forward(self, images: Tensor) -> Reconstruction:
        """Encode, quantise and decode (B, C, H, W) images in [-1, 1].

        In training, the share ``level_dropout`` of the images is decoded from a random number of their coarsest
        levels only (drawn from torch's global generator). Those images count in the loss, but not in the metrics.
        """
        quantized = self._quantize(images)
        shown = self._draw_levels_shown(images)
        reconstructed = self._render([self._hide(level.z, i, shown) for i, level in enumerate(quantized)])

        error = reconstruction_error(reconstructed, images, self.config.reconstruction)
        quantizer_loss = torch.stack([level.loss for level in quantized]).sum()
        whole = shown == len(quantized)
        whole = (whole | ~whole.any()).to(error.dtype)  # all images, where none is decoded from all levels
        whole = whole / whole.sum()
        metrics = {
            "reconstruction_loss": (error * whole).sum(),
            "mse": (reconstruction_error(reconstructed, images, "mse") * whole).sum() / 4,  # on the scale [0, 1]
            "quantizer_loss": quantizer_loss,
            **{f"{spec.name}_quantizer_loss": level.loss for spec, level in zip(self.levels, quantized, strict=True)},
        }
        return Reconstruction(
            reconstructed,
            tuple(level.codes for level in quantized),
            error.mean() + quantizer_loss,
            {key: value.detach() for key, value in metrics.items()},
        )

    @torch.no_grad()
    def encode(self, images: Tensor) -> Codes:
        """Code maps of (B, C, H, W) images in [-1, 1]; nothing in the model changes, even in training mode."""
        return tuple(level.codes for level in self._quantize(images))

    @torch.no_grad()
    def decode(self, codes: Sequence[Tensor]) -> Tensor:
        """Images (B, C, H, W) clamped to [-1, 1], from all levels or from the coarsest ones alone.

        Levels that are left out are shown to the decoder as absent: as a vector learned for that by
        ``level_dropout``, or, where it is 0, as the mean used code, which the decoder never met in training.

        Raises:
            InputError: too many levels or none, maps of another size, or codes outside the codebook.
        """
        self._check_codes(codes)
        maps = [quantizer.lookup(code) for quantizer, code in zip(self.quantizers, codes, strict=False)]
        for i in range(len(maps), len(self.levels)):
            vector = self._absent(i)
            maps.append(vector.expand(maps[0].shape[0], self.levels[i].height, self.levels[i].width, -1).movedim(-1, 1))
        return self._render(maps).clamp(-1, 1)

    def encoder_maps(self, images: Tensor) -> list[Tensor]:
        """What each level's encoder makes of (B, C, H, W) images in [-1, 1], coarse to fine: (B, width, h, w) each.

        That is before a level hears of the coarser ones, and before anything is quantised.
        """
        self._check_images(images)
        features = self._pad(images)
        per_level: list[Tensor] = []
        for encoder in reversed(self.encoders):
            features = encoder(features)
            per_level.insert(0, features)
        return per_level

    def update(self, step: int) -> dict[str, Tensor]:
        """Move the codebooks after an optimiser step; returns scalars to log, named by level."""
        logged = {}
        for level, quantizer in zip(self.levels, self.quantizers, strict=True):
            for key, value in quantizer.update(step).items():
                logged[f"{level.name}_{key}"] = value
        return logged

    def compilable(self, *, decoder: bool = True) -> list[Part]:
        """Its networks, for ``training.compile``; not the quantizers, which count, and talk to other processes.

        Without ``decoder`` where its gradient is taken more than once in a step, which compiled code cannot.
        """
        conditioners = [Part(conditioner, "forward") for conditioner in self.conditioners]
        return [Part(self, "encoder_maps"), *conditioners, *([Part(self, "_render")] if decoder else [])]

    def _quantize(self, images: Tensor) -> list[Quantized]:
        """Every level's vectors and codes, coarse to fine."""
        quantized: list[Quantized] = []
        coarser: list[Tensor] = []  # what the coarser levels tell this one, at this one's size; nothing at first
        for i, features in enumerate(self.encoder_maps(images)):
            z = self.projections[i](torch.cat([features, *coarser], dim=1))
            quantized.append(self.quantizers[i](z))
            if i < len(self.conditioners):
                coarser = [self.conditioners[i](torch.cat([quantized[i].z, *coarser], dim=1))]
        return quantized

    def _render(self, maps: Sequence[Tensor]) -> Tensor:
        """Images from every level's vectors (B, D, h, w), coarse to fine; cropped, not clamped."""
        shown = [upsample(z) for upsample, z in zip(self.upsamplers, maps, strict=True)]
        images: Tensor = self.decoder(torch.cat(shown, dim=1))
        return images[:, :, : self.spec.height, : self.spec.width]

    def _draw_levels_shown(self, images: Tensor) -> Tensor:
        """(B,) int64: of how many levels, the coarsest first, the decoder is shown each image."""
        size, depth, device = (images.shape[0],), len(self.levels), images.device
        shown = torch.full(size, depth, device=device)
        if self.training and depth > 1 and self.config.level_dropout > 0:
            dropped = torch.rand(size, device=device) < self.config.level_dropout
            shown = torch.where(dropped, torch.randint(1, depth, size, device=device), shown)
        return shown

    def _hide(self, z: Tensor, level: int, shown: Tensor) -> Tensor:
        """(B, D, h, w) with the absent vector in place of images of which fewer levels are shown."""
        if level == 0:
            return z
        vector = rearrange(self._absent(level), "d -> 1 d 1 1").to(z.dtype)
        return torch.where(rearrange(shown > level, "b -> b 1 1 1"), z, vector)

    def _absent(self, level: int) -> Tensor:
        """(D,): what stands for a level that is not shown."""
        if len(self.absent):
            learned: Tensor = self.absent[level - 1]
            return learned
        quantizer = self.quantizers[level]
        return quantizer.counts @ quantizer.codebook / quantizer.counts.sum().clamp(min=1e-12)

    def _pad(self, images: Tensor) -> Tensor:
        stride = self.config.strides[0]
        bottom, right = -self.spec.height % stride, -self.spec.width % stride
        return F.pad(images, (0, right, 0, bottom), mode="replicate") if bottom or right else images

    def _check_images(self, images: Tensor) -> None:
        expected = (self.spec.channels, self.spec.height, self.spec.width)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise InputError(f"Expected images of shape {['B', *expected]}, got {list(images.shape)}.")
        if not images.is_floating_point():
            raise InputError(
                f"Expected images as float in [-1, 1], got {images.dtype}.", "Convert them with vqgen.images.to_float."
            )

    def _check_codes(self, codes: Sequence[Tensor]) -> None:
        names = ", ".join(level.name for level in self.levels)
        if not 1 <= len(codes) <= len(self.levels):
            raise InputError(f"Got codes of {len(codes)} levels; this codec has {len(self.levels)}: {names}.")
        for level, code in zip(self.levels, codes, strict=False):
            expected = (codes[0].shape[0], level.height, level.width)
            if tuple(code.shape) != expected:
                raise InputError(f"Expected {level.name} codes of shape {list(expected)}, got {list(code.shape)}.")
            if code.numel() and not 0 <= int(code.min()) <= int(code.max()) < level.codebook_size:
                raise InputError(
                    f"The {level.name} codes must be in [0, {level.codebook_size}), "
                    f"got {int(code.min())} to {int(code.max())}."
                )


def _levels(config: CodecConfig, spec: ImageSpec) -> tuple[LevelSpec, ...]:
    coarsest = config.strides[0]
    height, width = (-(-side // coarsest) * coarsest for side in (spec.height, spec.width))
    return tuple(
        LevelSpec(name, height // stride, width // stride, size, dim)
        for name, stride, size, dim in zip(
            level_names(len(config.strides)),
            config.strides,
            config.per_level("codebook_size"),
            config.per_level("code_dim"),
            strict=True,
        )
    )
