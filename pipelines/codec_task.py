"""The codec as the training loop sees it, alone or against a discriminator.

With a discriminator two players take turns on each batch: the codec, whose loss has the adversary's verdict added,
and the discriminator, which sees the same reconstructions, detached. The codec runs once per step, so that its
quantisers count each batch once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from vqgen.codec import HierarchicalVQVAE
from vqgen.compiling import Part
from vqgen.config import DiscriminatorSettings
from vqgen.discriminator import PatchDiscriminator, adaptive_weight, adversarial_loss, hinge_loss
from vqgen.images import image_grid, to_float, to_uint8
from vqgen.metrics import CodeUsage, mse, psnr
from vqgen.training import Task


class CodecTask(Task):
    """Batches of 8-bit images, and the figures of a codec on them."""

    def __init__(self, model: HierarchicalVQVAE, preview_images: Tensor) -> None:
        super().__init__()
        self.model: HierarchicalVQVAE = model
        self._preview_images = preview_images

    def forward(self, batch: Mapping[str, Any], player: str, progress: float, step: int) -> dict[str, Tensor]:
        result = self.model(to_float(batch["images"]))
        return {"loss": result.loss, **result.metrics}

    def compilable(self) -> Sequence[Part]:
        return self.model.compilable()

    def after_step(self, player: str, step: int) -> dict[str, Tensor]:
        return self.model.update(step)

    def evaluate(self, batches: Iterable[Mapping[str, Any]], reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Means over the images given; perplexity and usage over all their codes, per level."""
        usage = [CodeUsage(level.codebook_size) for level in self.model.levels]
        totals = torch.zeros(4, dtype=torch.float64)
        for batch in batches:
            images = to_float(batch["images"])
            result = self.model(images)
            shown = result.images.clamp(-1, 1)
            sums = [len(images), len(images) * result.loss, mse(shown, images).sum(), psnr(shown, images).sum()]
            totals += torch.tensor([float(value) for value in sums], dtype=torch.float64)
            for level, codes in zip(usage, result.codes, strict=True):
                level.add(codes)
        device = next(self.model.parameters()).device
        count, *sums = reduce(totals.float().to(device)).tolist()
        figures = {name: value / count for name, value in zip(("loss", "mse", "psnr"), sums, strict=True)}
        for spec, level in zip(self.model.levels, usage, strict=True):
            level.counts.copy_(reduce(level.counts.to(device)).to(level.counts.device))
            figures[f"{spec.name}_perplexity"] = level.perplexity
            figures[f"{spec.name}_usage"] = level.usage
        return figures

    def preview(self) -> Image.Image | None:
        """Validation images above their reconstructions."""
        images = self._preview_images.to(next(self.model.parameters()).device)
        made = to_uint8(self.model.decode(self.model.encode(to_float(images))))
        return image_grid(torch.cat([images, made]).cpu(), columns=len(images))


class DiscriminatedCodecTask(CodecTask):
    """The same with a discriminator, which takes its turn after the codec from ``settings.start`` on.

    The weights kept are the last ones: the validation loss knows nothing of the adversary, and is least just
    before it switches on.
    """

    players = ("model", "discriminator")
    settled = 1.0

    def __init__(self, model: HierarchicalVQVAE, preview_images: Tensor, settings: DiscriminatorSettings) -> None:
        super().__init__(model, preview_images)
        self.discriminator = PatchDiscriminator(settings, model.spec)
        self._settings = settings
        self._made: Tensor | None = None

    def player_modules(self) -> dict[str, nn.Module]:
        return {"model": self.model, "discriminator": self.discriminator}

    def plays(self, player: str, progress: float) -> bool:
        return player == "model" or progress >= self._settings.start

    def forward(self, batch: Mapping[str, Any], player: str, progress: float, step: int) -> dict[str, Tensor]:
        images = to_float(batch["images"])
        if player == "discriminator":
            return self._judge(images)
        result = self.model(images)
        scalars = {"loss": result.loss, **result.metrics}
        if not self.plays("discriminator", progress):
            return scalars
        self._made = result.images.detach()
        adversarial = adversarial_loss(self.discriminator(result.images))
        last = self.model.decoder[-1].weight
        assert isinstance(last, Tensor)
        weight = self._settings.weight * adaptive_weight(result.loss, adversarial, last)
        scalars["loss"] = result.loss + weight * adversarial
        return {**scalars, "adversarial_loss": adversarial.detach(), "adversarial_weight": weight}

    def compilable(self) -> Sequence[Part]:
        return self.model.compilable(decoder=False)

    def after_step(self, player: str, step: int) -> dict[str, Tensor]:
        return super().after_step(player, step) if player == "model" else {}

    def _judge(self, images: Tensor) -> dict[str, Tensor]:
        """The discriminator's turn, on what the codec made of ``images`` in its own turn."""
        assert self._made is not None, "the codec plays first"
        real, made = self.discriminator(torch.cat([images, self._made.to(images.dtype)])).chunk(2)
        self._made = None
        return {"loss": hinge_loss(real, made), "real": real.detach().mean(), "made": made.detach().mean()}
