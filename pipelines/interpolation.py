"""From one image to another through a prior's latent space.

The latent codes z of both images at the coarsest level are the ends of a great arc, and each frame is decoded from a
point of it. A great arc (spherical interpolation, Shoemake 1985) rather than a straight line: z is a draw of N(0, I),
which in many dimensions lies near a sphere, and the middle of a straight line would lie inside it, where the prior has
next to no mass. All frames are drawn with the same noise, so that what changes from one to the next is z alone. A
finer level goes the same way where its prior has a latent space, and is drawn given the coarser codes where it has not.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

from pipelines.drawing import Samples, in_batches, joined, samples_of, slowest
from pipelines.processes import Result, join
from pipelines.sample_request import SampleRequest
from priors.base import LatentPrior, Prior
from priors.sampling import Noise, SampleOptions
from vqgen.codec import HierarchicalVQVAE
from vqgen.codes import Codes
from vqgen.console import Console
from vqgen.images import to_uint8


def draw_frames(
    codec: HierarchicalVQVAE,
    priors: Sequence[Prior],
    request: SampleRequest,
    ends: Codes,
    labels: Tensor | None,
    console: Console,
) -> Samples | None:
    """``request.images`` frames from the first image to the second, both ends included; shared as by `draw_samples`.

    Args:
        priors: of every level that is made, coarse to fine.
        ends: codes (2, h, w) of the two images, one per level.
        labels: (2,) classes of the two images; each frame has that of the nearer one, the first in the middle.
    """
    device = next(codec.parameters()).device
    end_labels = None if labels is None else labels.to(device)
    shares = torch.linspace(0, 1, request.images)
    frame_labels = None if labels is None else labels[(shares > 0.5).long()]
    positions = sum(prior.spec.target.positions for prior in priors)
    seconds = {prior.spec.target.name: 0.0 for prior in priors} | {"decode": 0.0}
    latents = [prior if isinstance(prior, LatentPrior) else None for prior in priors]
    arcs: list[Tensor | None] = []
    frames = []
    processes = join()
    with torch.no_grad(), processes.together(), console.progress("interpolating", request.images, "images") as progress:
        for level, (prior, latent) in enumerate(zip(priors, latents, strict=True)):
            prior.to(device).eval()
            start = time.perf_counter()
            given = tuple(codes.to(device) for codes in ends[: level + 1])
            z = None if latent is None else latent.encode_latent(given[-1], given[:-1], end_labels)
            arcs.append(None if z is None else great_arc(z, shares))
            seconds[prior.spec.target.name] += time.perf_counter() - start

        def make(rows: list[int]) -> Result:
            label = None if frame_labels is None else frame_labels[rows].to(device)
            codes: Codes = ()
            for level, (prior, latent, arc) in enumerate(zip(priors, latents, arcs, strict=True)):
                start = time.perf_counter()
                name = prior.spec.target.name
                options = (request.options or {}).get(name, SampleOptions())
                noise = Noise(request.seed, (0,) * len(rows), level)
                if latent is None or arc is None:
                    codes = (*codes, prior.sample(noise, codes, label, options))
                else:
                    codes = (*codes, latent.decode_latent(arc[rows], noise, codes, label, options))
                seconds[name] += time.perf_counter() - start
                progress.advance(len(rows) * prior.spec.target.positions / positions)
            start = time.perf_counter()
            images = to_uint8(codec.decode(codes)).cpu()
            seconds["decode"] += time.perf_counter() - start
            own = None if frame_labels is None else frame_labels[rows]
            return Samples(tuple(maps.cpu() for maps in codes), images, own, {}).tensors()

        batches = list(map(list, in_batches(request.images, request.batch_size)))
        for result in processes.in_order(batches, make):
            if processes.main:
                frames.append(samples_of(result))
        seconds = slowest(processes, seconds)
    return joined(frames, seconds) if processes.main else None


def great_arc(ends: Tensor, shares: Tensor) -> Tensor:
    """Points (N, d) on the way from ``ends[0]`` to ``ends[1]``, (2, d), at ``shares`` (N,) in [0, 1] of it.

    sin((1 - t) a) / sin(a) times the first plus sin(t a) / sin(a) times the second, a the angle between them; a
    straight line where they point the same or opposite ways or one is 0. At 0 and 1 the ends themselves, exactly.
    """
    first, second = ends.cpu().double()  # some accelerators have no float64
    t = rearrange(shares.to(first), "n -> n 1")
    size = first.norm() * second.norm()
    angle = torch.arccos((torch.dot(first, second) / size.clamp(min=1e-30)).clamp(-1, 1))
    if size == 0 or angle.sin() < 1e-6:
        points = (1 - t) * first + t * second
    else:
        points = ((1 - t) * angle).sin() / angle.sin() * first + (t * angle).sin() / angle.sin() * second
    points = torch.where(t == 0, first, torch.where(t == 1, second, points))
    return points.to(ends)
