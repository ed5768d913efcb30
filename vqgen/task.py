"""What the training loop trains: the interface between a model and `vqgen.training`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from PIL import Image
from torch import Tensor, nn

from vqgen.compiling import Part
from vqgen.sampler import Batch


class Task(nn.Module):
    """What `fit` trains: an adapter between a model and the loop, so that DDP can wrap it whole.

    Subclasses set ``model`` and, where there are several, ``players``.
    """

    model: nn.Module
    """What is averaged and exported."""
    players: tuple[str, ...] = ("model",)
    """Who is trained, in the order of their turns within a step, each with an optimiser of its own."""
    settled: float = 0.0
    """Share of the training before which no weights are kept as the best, and patience does not count.

    An adversary that switches on later would else never have touched the weights that are kept: those before it
    have the least loss. At 1 the last weights are kept."""

    def player_modules(self) -> dict[str, nn.Module]:
        """For each player, the module that holds exactly its parameters."""
        return {"model": self.model}

    def compilable(self) -> Sequence[Part]:
        """What ``training.compile`` compiles; nothing by default."""
        return ()

    def plays(self, player: str, progress: float) -> bool:
        """Whether ``player`` takes its turn in a step at ``progress``; a turn that is left out costs nothing."""
        return True

    def forward(self, batch: Batch, player: str, progress: float, step: int) -> dict[str, Tensor]:
        """``loss`` of ``player`` on a batch, a scalar to be minimised, and further scalars to log."""
        raise NotImplementedError

    def after_step(self, player: str, step: int) -> dict[str, Tensor]:
        """What follows the optimiser step of ``player``, such as a codebook update; scalars to log."""
        return {}

    def evaluate(self, batches: Iterable[Batch], reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Scalars of the validation images; the best weights are those with the least ``loss``.

        Called on every process with its share of the images, without gradients, in evaluation mode, with a
        fixed seed, on the weights that would be exported. ``reduce`` sums a tensor over the processes; since
        these can have different numbers of batches, it is for sums and counts after the last batch.
        """
        raise NotImplementedError

    def preview(self) -> Image.Image | None:
        """A picture of what the model does by now; called like `evaluate`, on the first process alone."""
        return None
