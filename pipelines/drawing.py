"""Drawing images: the priors coarse to fine, each given the codes above it and the label, then one decode.

Every draw is a function of the seed, the image's index, the level and the attempt, so that image 17 is the same image
at any batch size, and a level drawn anew leaves the coarser ones as they were.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from einops import repeat
from torch import Tensor

from pipelines.begun import Begun
from pipelines.processes import Processes, Result, join
from pipelines.rejection import Reader, best_of, pick
from pipelines.sample_request import SampleRequest
from priors.base import Prior
from priors.sampling import Noise, SampleOptions
from vqgen.code_store import CodeStore
from vqgen.codec import HierarchicalVQVAE
from vqgen.codes import Codes, LevelSpec
from vqgen.console import Console
from vqgen.images import to_uint8

_KINDS = {"images": torch.uint8, "probability": torch.float64}
"""What tensors of samples hold; the others int64."""


@dataclass(frozen=True)
class Samples:
    """Sampled codes, their pictures, and what they took."""

    codes: Codes
    images: Tensor
    """(B, C, H, W) uint8."""
    labels: Tensor | None
    """(B,) int64."""
    seconds: Mapping[str, float]
    """Seconds spent in each level's prior, in ``decode``, and in ``classifier`` where one chose; all attempts."""
    attempt: Tensor | None = None
    """(B,) int64: which attempt was kept, where there were several."""
    probability: Tensor | None = None
    """(B,) float64: what the classifier gives each image's label, where it chose."""

    def tensors(self) -> dict[str, Tensor]:
        """All but the seconds, by name, as `samples_of` takes them."""
        codes = {f"codes.{level}": maps for level, maps in enumerate(self.codes)}
        rest = {"labels": self.labels, "attempt": self.attempt, "probability": self.probability}
        return codes | {"images": self.images} | {name: value for name, value in rest.items() if value is not None}


def samples_of(tensors: Result) -> Samples:
    """The samples of which `Samples.tensors` gave the tensors."""
    codes = tuple(tensors[f"codes.{level}"] for level in range(sum(name.startswith("codes.") for name in tensors)))
    rest = {name: tensors.get(name) for name in ("labels", "attempt", "probability")}
    return Samples(codes, tensors["images"], seconds={}, **rest)


@dataclass(frozen=True)
class Known:
    """Codes of S source images, and which of them stay; image i of the samples starts from source i modulo S."""

    codes: Codes
    """(S, h, w) int64 per level."""
    keep: tuple[Tensor, ...]
    """(h, w) bool per level."""

    def rows(self, level: int, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Codes and mask of a level for the images ``indices``, (B, h, w) each."""
        codes = self.codes[level][torch.tensor(indices) % len(self.codes[level])]
        return codes, repeat(self.keep[level], "h w -> b h w", b=len(indices))


class Drawer:
    """Draws images of one request, batch by batch, and counts the seconds each part takes."""

    def __init__(
        self,
        codec: HierarchicalVQVAE,
        priors: Sequence[Prior],
        request: SampleRequest,
        labels: Tensor | None,
        known: Known | None,
    ) -> None:
        """
        Args:
            priors: of the levels that are drawn, coarse to fine; all finer than those that are kept whole.
            labels: (N,) class of every image of the request.
            known: what stays of the source images; None draws everything.
        """
        self.device = next(codec.parameters()).device
        self.codec, self.request, self.labels, self.known = codec, request, labels, known
        self.priors = {prior.spec.target.name: prior.to(self.device).eval() for prior in priors}
        self.levels: Sequence[LevelSpec] = codec.levels[: request.whole + len(priors)]
        self.positions = sum(level.positions for level in self.levels if level.name in self.priors)
        self.seconds = dict.fromkeys(self.priors, 0.0) | {"decode": 0.0}

    def draw(self, indices: tuple[int, ...], attempt: int, advance: Callable[[float], None]) -> Samples:
        """The images ``indices``, each the ``attempt``-th of its candidates.

        ``advance`` is told, after each level, the share of a batch's work that it was.
        """
        label = None if self.labels is None else self.labels[list(indices)]
        codes: Codes = ()
        for index, level in enumerate(self.levels):
            noise = Noise(self.request.seed, indices, index, attempt)
            codes = (*codes, self._level(level, noise, codes, label))
            if level.name in self.priors:
                advance(level.positions / self.positions)
        start = time.perf_counter()
        images = to_uint8(self.codec.decode(codes)).cpu()
        self.seconds["decode"] += time.perf_counter() - start
        return Samples(tuple(maps.cpu() for maps in codes), images, label, {})

    def _level(self, level: LevelSpec, noise: Noise, coarser: Codes, label: Tensor | None) -> Tensor:
        """Codes (B, h, w) of one level; the prior is told of kept codes only where there are any."""
        known, keep = (None, None) if self.known is None else self.known.rows(noise.level, noise.indices)
        if level.name not in self.priors:
            assert known is not None
            return known.to(self.device)
        if keep is not None and not keep.any():
            known = keep = None
        start = time.perf_counter()
        options = (self.request.options or {}).get(level.name, SampleOptions())
        label = None if label is None else label.to(self.device)
        codes = self.priors[level.name].sample(noise, coarser, label, options, known, keep)
        self.seconds[level.name] += time.perf_counter() - start
        return codes


def draw_samples(
    codec: HierarchicalVQVAE,
    priors: Sequence[Prior],
    store: CodeStore,
    request: SampleRequest,
    console: Console,
    *,
    known: Known | None = None,
    known_labels: Tensor | None = None,
    classifier: Reader | None = None,
    title: str = "sampling",
    begun: Begun | None = None,
) -> Samples | None:
    """Codes and pictures of ``request``; the processes of a launcher share its batches, and the first one has them.

    Every process calls this alike; all but the first are given None.

    Args:
        priors: of the levels that are drawn, coarse to fine.
        known: what stays of the request's source images, if it has any.
        known_labels: (S,) class of each source image.
        classifier: chooses among the attempts, where ``request.keep_best`` is above 1.
        title: of the progress shown.
        begun: where the first process finds what was drawn of the same request before, and keeps what is drawn.
    """
    labels = image_labels(request, len(store.info.class_names), known_labels)
    drawer = Drawer(codec, priors, request, labels, known)
    if request.keep_best > 1:
        drawer.seconds["classifier"] = 0.0
    processes = join()
    batches = list(in_batches(request.images, request.batch_size))
    drawn = []
    if begun is not None and processes.main:
        drawn = _drawn_before(drawer, begun)
        noted = begun.note() if drawn else {}
        drawer.seconds = {part: own + noted.get(part, 0.0) for part, own in drawer.seconds.items()}
    first = int(processes.exchange({"images": torch.tensor(sum(len(made.images) for made in drawn))})[0]["images"])
    if first:
        console.say(f"{title}: going on after {first:,} images.")
    batches = [batch for batch in batches if batch[0] >= first]
    with torch.no_grad(), processes.together(), console.progress(title, request.images, "images") as progress:

        def make(indices: tuple[int, ...]) -> Result:
            # What is shown assumes that the other processes are as far with their batches of this round.
            round_size = request.batch_size * processes.count
            start = indices[0] // round_size * round_size
            each = min(round_size, request.images - start) / request.keep_best

            def advance(share: float) -> None:
                progress.advance(share * each)

            attempts = [drawer.draw(indices, attempt, advance) for attempt in range(request.keep_best)]
            kept = attempts[0] if classifier is None else _best(attempts, classifier, drawer.seconds)
            return kept.tensors()

        for result in processes.in_order(batches, make):
            if processes.main:
                drawn.append(samples_of(result))
                if begun is not None:
                    begun.add("images", result, drawer.seconds)
        seconds = slowest(processes, drawer.seconds)
    return joined(drawn, seconds) if processes.main else None


def _drawn_before(drawer: Drawer, begun: Begun) -> list[Samples]:
    """What was drawn before the work was stopped, as far as it can be of this drawing: the run may be a stranger's."""
    drawn: list[Samples] = []
    count = 0
    for made in begun.made("images", partial(_shapes, drawer)):
        first, count = count, count + len(made["images"])
        kinds = {name: value.dtype for name, value in made.items()}
        codes = [made[f"codes.{index}"] for index in range(len(drawer.levels))]
        if (
            count > drawer.request.images
            or kinds != {name: _KINDS.get(name, torch.int64) for name in kinds}
            or any(
                level.min() < 0 or level.max() >= spec.codebook_size
                for level, spec in zip(codes, drawer.levels, strict=True)
            )
            or not (drawer.labels is None or torch.equal(made["labels"], drawer.labels[first:count].cpu()))
        ):
            break
        drawn.append(samples_of(made))
    return drawn


def _out_of_range(codes: Tensor, level: LevelSpec) -> bool:
    return bool(codes.min() < 0 or codes.max() >= level.codebook_size)


def _shapes(drawer: Drawer, images: int) -> dict[str, tuple[int, ...]]:
    """Shapes of what is drawn of so many images, by name."""
    shapes: dict[str, tuple[int, ...]] = {
        f"codes.{index}": (images, level.height, level.width) for index, level in enumerate(drawer.levels)
    }
    image = drawer.codec.spec
    shapes["images"] = (images, image.channels, image.height, image.width)
    rest = ["labels"] if drawer.labels is not None else []
    rest += ["attempt", "probability"] if drawer.request.keep_best > 1 else []
    return shapes | dict.fromkeys(rest, (images,))


def slowest(processes: Processes, seconds: Mapping[str, float]) -> dict[str, float]:
    """Of each part, the seconds of the process that took longest."""
    parts = processes.exchange({"seconds": torch.tensor(list(seconds.values()), dtype=torch.float64)})
    most = torch.stack([part["seconds"] for part in parts]).amax(0)
    return dict(zip(seconds, most.tolist(), strict=True))


def _best(attempts: Sequence[Samples], classifier: Reader, seconds: dict[str, float]) -> Samples:
    """The images that the classifier reads most surely as their label."""
    start = time.perf_counter()
    kept = best_of(attempts, attempts[0].labels, classifier)
    codes = tuple(pick(level, kept.attempt) for level in zip(*(attempt.codes for attempt in attempts), strict=True))
    images = pick([attempt.images for attempt in attempts], kept.attempt)
    seconds["classifier"] += time.perf_counter() - start
    return Samples(codes, images, attempts[0].labels, {}, kept.attempt, kept.probability)


def joined(batches: Sequence[Samples], seconds: Mapping[str, float]) -> Samples:
    """Batches of samples as one, with the seconds they took together."""

    def cat(parts: Sequence[Tensor | None]) -> Tensor | None:
        given = [part for part in parts if part is not None]
        return torch.cat(given) if given else None

    return Samples(
        codes=tuple(torch.cat(level) for level in zip(*(batch.codes for batch in batches), strict=True)),
        images=torch.cat([batch.images for batch in batches]),
        labels=cat([batch.labels for batch in batches]),
        seconds=seconds,
        attempt=cat([batch.attempt for batch in batches]),
        probability=cat([batch.probability for batch in batches]),
    )


def image_labels(request: SampleRequest, class_count: int, known_labels: Tensor | None = None) -> Tensor | None:
    """(N,) int64 class of each image; None if unlabelled.

    The labels asked for in turn, for each source image; else those of the source images, (S,); else every class in
    turn.
    """
    if class_count == 0:
        return None
    images = torch.arange(request.images)
    if not request.labels and known_labels is not None:
        return known_labels[images % len(known_labels)]
    cycle = torch.tensor(request.labels or range(class_count))
    return cycle[images // max(len(request.sources), 1) % len(cycle)]


def in_batches(count: int, size: int) -> Iterator[tuple[int, ...]]:
    """The indices 0 to ``count`` in batches of ``size``."""
    for start in range(0, count, size):
        yield tuple(range(start, min(start + size, count)))
