"""Vector quantisation: each vector of a feature map becomes the index of its nearest code.

Van den Oord et al. 2017, "Neural Discrete Representation Learning": eq. 1-2 (nearest code, straight-through
gradient), eq. 3 (loss), appendix A.1 (codebook by exponential moving averages). Initialisation by k-means and
the revival of unused codes are as in Lancucki et al. 2020, "Robust Training of Vector Quantized Bottleneck
Models", with the bookkeeping below.

Of the moving averages only the counts are stored: the sum of a code's vectors is, by definition, its count times
the code. So the two agree from the first step, through every revival, and a code only ever moves to a weighted
mean of where it is and of the vectors it was given: it cannot leave the range of the data.

Usage and perplexity are not computed here: over one batch they mislead (`vqgen.metrics.CodeUsage`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vqgen.collectives import join_processes, place, sum_over_processes
from vqgen.errors import InputError

EPSILON = 1e-5
"""Laplace smoothing: the pseudo-count that each code holds at its own place."""
KMEANS_STEPS = 10
KMEANS_POINTS = 2**14
"""Encoder outputs that k-means starts from (at least two for each code, whatever this says)."""
MIN_CANDIDATES = 1024
"""Encoder outputs kept per step as candidates for revival (at least one for each code)."""

# Distances held at once: on a CPU what stays in the caches, on a GPU what makes long products. 2**19 and blocks of 64
# were the fastest, or within noise of it, for 512 and 8,192 codes of width 64 on one core; 2**25 is not measured.
SLICE_CPU = 2**19
SLICE_GPU = 2**25
BLOCK = 64

Collective = Callable[[Tensor], Tensor]


class Quantized(NamedTuple):
    """A quantised feature map."""

    z: Tensor
    """(B, D, h, w) codebook vectors, in the dtype given; the gradient goes straight through to the input."""
    codes: Tensor
    """(B, h, w) int64 in [0, K)."""
    loss: Tensor
    """() beta * commitment, plus the codebook term where the codebook is learned by gradient."""


class VectorQuantizer(nn.Module):
    """A codebook of K vectors of width D.

    A training step is one or more training forwards (the micro-batches), the optimiser's step, then `update`,
    on every process alike. A training forward is one in training mode with gradients enabled; any other changes
    nothing here. Between steps the whole state is in the state dict.

    Args:
        codebook_size: K.
        code_dim: D.
        commitment: beta, the weight of the encoder's term of the loss.
        codebook: learned by moving averages (``ema``: a buffer) or by the optimiser (``gradient``: a parameter).
        decay: of the running counts, and of the moving averages, once training is under way (`decay_at`).
        revival: a code whose running count is below ``revival`` times the mean count is moved to an encoder
            output of the current batch; 0 is never.
        seed: of the first codebook and of every choice made later.

    Raises:
        InputError: an argument out of range.
    """

    codebook: Tensor
    """(K, D): buffer or parameter."""
    counts: Tensor
    """(K,) running mean of the vectors that each code receives in one step."""
    initialized: Tensor
    """() bool: whether the codebook comes from data."""

    def __init__(
        self,
        codebook_size: int,
        code_dim: int,
        *,
        commitment: float = 0.25,
        codebook: Literal["ema", "gradient"] = "ema",
        decay: float = 0.99,
        revival: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if codebook not in ("ema", "gradient"):
            raise InputError(f"codebook is '{codebook}'.", "It is learned by 'ema' or by 'gradient'.")
        if min(codebook_size, code_dim) < 1 or min(commitment, revival, seed) < 0 or not 0 <= decay < 1:
            raise InputError(
                f"Cannot make a codebook of {codebook_size} vectors of width {code_dim} with commitment {commitment}, "
                f"decay {decay}, revival {revival} and seed {seed}.",
                "The sizes are at least 1, decay lies in [0, 1), and nothing is negative.",
            )
        self.codebook_size, self.code_dim, self.by_gradient = codebook_size, code_dim, codebook == "gradient"
        self.commitment, self.decay, self.revival, self.seed = commitment, decay, revival, seed
        self._candidates = max(MIN_CANDIDATES, codebook_size)
        # Stands in until the first training batch; drawn apart from the global generator.
        first = torch.empty(codebook_size, code_dim)
        if not first.is_meta:  # there, only the shapes are wanted
            first.copy_(torch.from_numpy(_generator(seed).standard_normal(first.shape)) / code_dim**0.5)
        if self.by_gradient:
            self.codebook = nn.Parameter(first)
        else:
            self.register_buffer("codebook", first)
        self.register_buffer("counts", torch.zeros(codebook_size))
        self.register_buffer("initialized", torch.tensor(False))
        self._from_data = False  # what `initialized` says, known without asking the device
        # Not a buffer: DistributedDataParallel overwrites every rank's buffers with those of rank 0.
        self._pending: _Pending | None = None

    def forward(self, z: Tensor) -> Quantized:
        """Quantise ``z`` (B, D, h, w), any floating dtype; float32 or better is used inside.

        The first training forward initialises the codebook from the joint batch of all processes.

        Raises:
            InputError: ``z`` is not a feature map of D channels.
        """
        if z.ndim != 4 or z.shape[1] != self.code_dim:
            raise InputError(
                f"A feature map of shape {list(z.shape)} does not fit this codebook.",
                f"Expected (batch, {self.code_dim}, height, width).",
            )
        collect = self.training and torch.is_grad_enabled()
        b, _, h, w = z.shape
        with torch.autocast(z.device.type, enabled=False):
            dtype = torch.promote_types(torch.promote_types(z.dtype, self.codebook.dtype), torch.float32)
            wide = z.to(dtype)
            flat = rearrange(wide.detach(), "b d h w -> (b h w) d")
            if collect:
                self._initialise(flat)
            codes = self.nearest(flat)
            chosen = self.lookup(codes.view(b, h, w)).to(dtype).contiguous()
            loss = self.commitment * _mean_square(wide, chosen.detach())
            if self.by_gradient:
                loss = loss + _mean_square(chosen, wide.detach())
            if collect:
                self._collect(flat, codes)
            # z - z.detach() is exactly zero, so the result is the codebook's vector to the bit.
            out = (z - z.detach()) + chosen.detach().to(z.dtype)
        return Quantized(out, codes.view(b, h, w), loss)

    def lookup(self, codes: Tensor) -> Tensor:
        """Codebook vectors (B, D, h, w) of ``codes`` (B, h, w) int64 in [0, K)."""
        return rearrange(F.embedding(codes, self.codebook), "b h w d -> b d h w")

    def nearest(self, flat: Tensor) -> Tensor:
        """Nearest code (N,) int64 of each vector of ``flat`` (N, D); the lowest index among equals."""
        return nearest_codes(flat, self.codebook)

    @torch.no_grad()
    def update(
        self, step: int, reduce: Collective | None = None, gather: Collective | None = None
    ) -> dict[str, Tensor]:
        """End training step ``step``: move an ``ema`` codebook, then revive unused codes.

        Every process calls it once per step, after the optimiser. The collectives run whatever was collected,
        so that processes cannot wait for one another in vain; without a training forward since the last call,
        nothing changes.

        Args:
            step: its number; with the seed, it decides which vectors revived codes take.
            reduce: sums a tensor over the processes (default: those of torch.distributed).
            gather: joins the processes' tensors along the first axis, by rank (likewise).

        Returns:
            ``revived``: () how many codes were moved.
        """
        reduce, gather = reduce or sum_over_processes, gather or join_processes
        pending, self._pending = self._pending or self._nothing(self.codebook.device, self.codebook.dtype), None
        received = reduce(pending.counts).to(self.counts.dtype)
        if pending.first:
            # K-means saw the first micro-batch only; the counts are those of a whole step.
            self.counts.mul_(received.sum() / self.counts.sum())
        rate = (received.sum() > 0).to(self.counts.dtype) * (1 - self.decay_at(step))
        self.counts.add_(rate * (received - self.counts))
        if not self.by_gradient:
            # From count * code, decayed, plus the new sum, and the pseudo-count at the code's own place:
            # (decay n e + (1 - decay) s + eps e) / (decay n + (1 - decay) c + eps), as a move from e.
            weight = rate / (self.counts + EPSILON)
            sums = reduce(pending.sums).to(self.codebook.dtype)
            self.codebook.add_(weight[:, None] * (sums - received[:, None] * self.codebook))
        if self.revival == 0:
            return {"revived": torch.zeros((), device=self.counts.device)}
        candidates = pending.sample.joined(self._candidates, gather)
        # Candidates of the batch that k-means has just used would only repeat its codes.
        return {"revived": self._revive(candidates, step, allowed=not pending.first)}

    def decay_at(self, step: int) -> float:
        """Decay of the moving averages at training step ``step``: (1 + step) / (10 + step), up to ``decay``.

        The encoder moves fastest at first. A codebook that averages a hundred steps stays behind it, and most of its
        codes fall out of use before revival can notice.
        """
        return min(self.decay, (1 + step) / (10 + step))

    def _revive(self, candidates: _Sample, step: int, *, allowed: bool) -> Tensor:
        """Move unused codes, the least used first, to ``candidates``; as many as there are candidates.

        A revived code starts at the mean count, as if it had its share so far: if nothing ever comes to it, it
        is moved again after log(revival) / log(decay) steps (some 230 at the full decay), not at the next.
        """
        mean = self.counts.sum() / self.codebook_size
        shuffle = torch.from_numpy(_generator(self.seed, step).permutation(len(candidates.keys)))
        shuffle = shuffle.to(candidates.keys.device)
        order = torch.where(candidates.present, shuffle, len(shuffle)).argsort()[: self.codebook_size]
        rows = self.counts.argsort(stable=True)
        # Shapes do not depend on how many codes are revived: no answer of the device is waited for.
        moved = (self.counts[rows] < self.revival * mean) & candidates.present[order] & allowed
        vectors = candidates.vectors[order].to(self.codebook.dtype)
        self.codebook[rows] = torch.where(moved[:, None], vectors, self.codebook[rows])
        self.counts[rows] = torch.where(moved, mean, self.counts[rows])
        return moved.sum().to(torch.float32)

    @torch.no_grad()
    def _initialise(self, flat: Tensor) -> None:
        """K-means on the joint batch's vectors (N, D), once; its counts become the running counts."""
        self._from_data = self._from_data or bool(self.initialized)
        if self._from_data:
            return
        capacity = max(KMEANS_POINTS, 2 * self.codebook_size)
        sample = _Sample.of(flat, 0).trimmed(capacity).joined(capacity, join_processes)
        total = sum_over_processes(flat.new_tensor(len(flat)))
        if total == 0:
            return
        points = sample.vectors[sample.present]
        shuffle = torch.from_numpy(_generator(self.seed).permutation(len(points))).to(points.device)
        centres, counts = kmeans(points[shuffle], self.codebook_size)
        self.codebook.copy_(centres)
        self.counts.copy_(counts * (total / len(points)))
        self.initialized.fill_(True)
        self._from_data = True
        self._pending = self._nothing(flat.device, flat.dtype)
        self._pending.first = True

    @torch.no_grad()
    def _collect(self, flat: Tensor, codes: Tensor) -> None:
        """Add one micro-batch, vectors (N, D) and their codes (N,), to what `update` will apply."""
        if self._pending is None:
            self._pending = self._nothing(flat.device, flat.dtype)
        pending = self._pending
        pending.counts.index_add_(0, codes, torch.ones_like(codes, dtype=pending.counts.dtype))
        if not self.by_gradient:
            pending.sums.index_add_(0, codes, flat)
        if self.revival > 0:
            pending.sample = pending.sample.plus(_Sample.of(flat, pending.seen), self._candidates)
        pending.seen += len(flat)

    def _nothing(self, device: torch.device, dtype: torch.dtype) -> _Pending:
        sums = torch.zeros(0 if self.by_gradient else self.codebook_size, self.code_dim, device=device, dtype=dtype)
        return _Pending(sums.new_zeros(self.codebook_size), sums, _Sample.of(sums[:0], 0))

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._from_data, self._pending = False, None
        super()._load_from_state_dict(*args, **kwargs)


@torch.no_grad()
def nearest_codes(flat: Tensor, codebook: Tensor) -> Tensor:
    """Index (N,) int64 of the row of ``codebook`` (K, D) nearest to each row of ``flat`` (N, D).

    Nearest is the least |e|^2 - 2 z.e, in float32 or, where either is float64, in float64; the lowest index
    among equals. At most `SLICE_CPU` (`SLICE_GPU`) distances exist at once, or one row of K.
    """
    dtype = torch.promote_types(torch.promote_types(flat.dtype, codebook.dtype), torch.float32)
    codebook = codebook.to(dtype)
    rows = max(1, (SLICE_CPU if flat.device.type == "cpu" else SLICE_GPU) // len(codebook))
    codes = torch.empty(len(flat), dtype=torch.int64, device=flat.device)
    with torch.autocast(flat.device.type, enabled=False):
        norms, transposed = codebook.square().sum(1), codebook.t()
        distances = torch.empty(min(rows, len(flat)), len(codebook), dtype=dtype, device=flat.device)
        for start in range(0, len(flat), rows):
            part = flat[start : start + rows].to(dtype)
            torch.addmm(norms, part, transposed, alpha=-2, out=distances[: len(part)])
            codes[start : start + rows] = _lowest(distances[: len(part)])
    return codes


def _lowest(distances: Tensor) -> Tensor:
    """``distances.argmin(1)`` of (N, K). On a CPU, first the lowest block: there amin is vectorised, argmin not."""
    if distances.device.type != "cpu" or distances.shape[1] % BLOCK:
        return distances.argmin(1)
    blocks = rearrange(distances, "n (k block) -> n k block", block=BLOCK)
    block = blocks.amin(2).argmin(1)
    return block * BLOCK + blocks[torch.arange(len(blocks)), block].argmin(1)


@torch.no_grad()
def kmeans(points: Tensor, size: int, steps: int = KMEANS_STEPS) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm from the first ``size`` of ``points`` (S, D), which the caller has shuffled.

    Returns centres (size, D) and their counts (size,). Centre times count is the sum of its points. A centre
    without points stays where it was; with fewer points than centres, points repeat as centres of count 0.
    """
    centres = points[torch.arange(size, device=points.device) % len(points)]
    counts = points.new_zeros(size)
    for _ in range(steps):
        codes = nearest_codes(points, centres)
        counts = torch.zeros_like(counts).index_add_(0, codes, torch.ones_like(codes, dtype=points.dtype))
        sums = torch.zeros_like(centres).index_add_(0, codes, points)
        centres = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centres)
    return centres, counts


_ABSENT = 2**62  # above every key, and exact in float64, through which padding values pass
_STRIDE = -7046029254386353131  # 2**64 over the golden ratio, odd, as a signed number


class _Sample(NamedTuple):
    """Some vectors of the joint batch of all micro-batches and processes, each with a key.

    A key is a function of the vector's place in the joint batch: Fibonacci hashing (Knuth, TAOCP 3, 6.4), whose
    keys for successive places spread evenly. To sample is to keep the smallest keys, so parts can be sampled one
    by one, and on each process alone, with the same result as the whole.
    """

    keys: Tensor  # (R,) int64
    vectors: Tensor  # (R, D)

    @classmethod
    def of(cls, flat: Tensor, seen: int) -> _Sample:
        """All vectors (N, D) of this process's micro-batch, the others' being of the same size.

        ``seen`` vectors came before on each process, and within a micro-batch lower ranks come first.
        """
        rank, ranks = place()
        first = seen * ranks + rank * len(flat)
        places = torch.arange(first + 1, first + len(flat) + 1, device=flat.device)
        return cls((places * _STRIDE) & (_ABSENT - 1), flat)

    @property
    def present(self) -> Tensor:
        """(R,) bool: False for the padding of `joined`."""
        return self.keys != _ABSENT

    def trimmed(self, capacity: int) -> _Sample:
        """The ``capacity`` smallest keys at most, in ascending order."""
        keys, order = self.keys.topk(min(capacity, len(self.keys)), largest=False)
        return _Sample(keys, self.vectors[order])

    def plus(self, other: _Sample, capacity: int) -> _Sample:
        both = zip(self, other.trimmed(capacity), strict=True)
        return _Sample(*(torch.cat(pair) for pair in both)).trimmed(capacity)

    def joined(self, capacity: int, gather: Collective) -> _Sample:
        """The sample of all processes: ``capacity`` keys, the missing ones padded."""
        missing = capacity - len(self.keys)
        keys = gather(F.pad(self.keys, (0, missing), value=_ABSENT))
        return _Sample(keys, gather(F.pad(self.vectors, (0, 0, 0, missing)))).trimmed(capacity)


@dataclass
class _Pending:
    """What the training forwards since the last `update` have collected on this process."""

    counts: Tensor  # (K,)
    sums: Tensor  # (K, D); (0, D) for a codebook by gradient
    sample: _Sample
    seen: int = 0  # vectors
    first: bool = False  # the codebook was initialised in this step


def _mean_square(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference over all elements; 0 of none, where the plain mean is not a number."""
    return F.mse_loss(a, b, reduction="sum") / max(a.numel(), 1)


def _generator(*seed: int) -> np.random.Generator:
    """Random numbers as a function of ``seed``; torch's own CPU generator keeps only 32 bits of one."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed)))
