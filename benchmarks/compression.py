"""How small do images become as entropy-coded codes, and how small as JPEG and WebP of the same PSNR?

Compresses the first test images of a finished run with each prior, decompresses the file and compares every code with
the codec's own, and flips one byte of it, which must be refused. Beside it, JPEG and WebP (Pillow) at the quality whose
mean PSNR over the images is the codec's: as a file for each image, and as one sheet of all images, which spares them
the headers that a small picture mostly is. Where the PSNR lies between two qualities, so do the bytes.

    python benchmarks/compression.py --run runs/cifar10 -n 1000 --prior top=transformer,bottom=pixelsnail \\
        --json results/compression.json

One thread throughout. Without --prior, every trained prior that can drive the coder, and the baselines.
"""

from __future__ import annotations

import argparse
import io
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from pipelines.compress import compress
from pipelines.compression.models import can_code
from pipelines.compression.walk import steady_arithmetic
from pipelines.decompress import decompress
from pipelines.encode import fitted_to
from pipelines.run_priors import trained_priors
from pipelines.settings import parse_priors, run_settings
from vqgen.codec import HierarchicalVQVAE
from vqgen.codes import Codes
from vqgen.console import Console
from vqgen.data import load_data
from vqgen.errors import VqgenError
from vqgen.files import write_json
from vqgen.images import to_array, to_float, to_pil
from vqgen.metrics import psnr
from vqgen.run_folder import RunFolder

BATCH = 64
BLOCK = 16
"""Pictures of a sheet are padded to multiples of this, so that no block of a coder holds parts of two."""
QUALITIES = {"JPEG": range(1, 96), "WebP": range(101)}
OPTIONS: dict[str, dict[str, Any]] = {"JPEG": {"optimize": True}, "WebP": {"method": 6}}

Coded = tuple[int, Tensor]
"""Bytes of all files, and the pictures they hold, uint8 (B, C, H, W)."""


def coded(image: Image.Image, kind: str, quality: int, channels: int) -> tuple[int, Tensor]:
    """Bytes of a picture as a file, and the picture in it."""
    buffer = io.BytesIO()
    image.save(buffer, format=kind, quality=quality, **OPTIONS[kind])
    return buffer.tell(), torch.from_numpy(to_array(Image.open(buffer), channels))


def one_by_one(images: Tensor, kind: str, quality: int) -> Coded:
    """A file for each picture."""
    files = [coded(to_pil(image), kind, quality, images.shape[1]) for image in images]
    return sum(size for size, _ in files), torch.stack([picture for _, picture in files])


def as_sheet(images: Tensor, kind: str, quality: int) -> Coded:
    """One file of all pictures side by side, their edges repeated up to whole blocks."""
    count, channels, height, width = images.shape
    columns = math.ceil(math.sqrt(count))
    missing = columns * math.ceil(count / columns) - count
    right, below = -width % BLOCK, -height % BLOCK
    padded = F.pad(images.float(), (0, right, 0, below), mode="replicate").to(torch.uint8)
    padded = torch.cat([padded, padded[:1].expand(missing, -1, -1, -1)])
    sheet = rearrange(padded, "(r k) c h w -> c (r h) (k w)", k=columns)
    size, decoded = coded(to_pil(sheet), kind, quality, channels)
    cells = rearrange(decoded, "c (r h) (k w) -> (r k) c h w", h=height + below, w=width + right)
    return size, cells[:count, :, :height, :width]


def at_psnr(images: Tensor, kind: str, target: float, code: Callable[[Tensor, str, int], Coded]) -> dict[str, Any]:
    """Bytes per picture at a mean PSNR of ``target`` dB, between the two qualities that enclose it."""
    measured: dict[int, tuple[int, float]] = {}

    def at(quality: int) -> tuple[int, float]:
        if quality not in measured:
            size, pictures = code(images, kind, quality)
            measured[quality] = size, float(psnr(pictures, images).mean())
        return measured[quality]

    low, high = QUALITIES[kind][0], QUALITIES[kind][-1]
    if at(low)[1] >= target:
        return {"bytes": at(low)[0] / len(images), "psnr": at(low)[1], "quality": [low], "equal": False}
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if at(middle)[1] >= target else (middle, high)
    (small, below), (large, above) = at(low), at(high)
    share = min((target - below) / (above - below), 1.0)
    size = small + share * (large - small)
    return {"bytes": size / len(images), "psnr": target, "quality": [low, high], "equal": above >= target}


def own_codes(codec: HierarchicalVQVAE, images: Tensor) -> Codes:
    """What the codec makes of the pictures: (B, h, w) int64 per level."""
    with steady_arithmetic():
        parts = [codec.encode(to_float(batch)) for batch in images.split(BATCH)]
    return tuple(torch.cat(level) for level in zip(*parts, strict=True))


def flipped_byte_is_refused(file: Path, run: RunFolder, folder: Path) -> bool:
    """Whether a file with one bit of its middle byte changed is refused, and nothing written."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    damaged = folder / "damaged"
    damaged.write_bytes(content)
    try:
        decompress(damaged, folder / "nothing", run, Console(quiet=True))
    except VqgenError:
        return not (folder / "nothing").exists()
    return False


def measure(run: RunFolder, chosen: Mapping[str, str], codes: Codes, count: int) -> dict[str, Any]:
    """A file of ``count`` test images by one choice of priors, written and read."""
    console = Console()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        start = time.perf_counter()
        record = compress(run, folder / "file", console, chosen=chosen, images=count, batch_size=BATCH)
        middle = time.perf_counter()
        decompress(folder / "file", folder / "out", run, console)
        end = time.perf_counter()
        found = load_file(folder / "out" / "codes.safetensors")
        exact = all(torch.equal(found[level], own) for level, own in zip(chosen, codes, strict=True))
        detected = flipped_byte_is_refused(folder / "file", run, folder)
    return {
        "prior": ", ".join(f"{level} {prior}" for level, prior in chosen.items()),
        **{key: record[key] for key in ("bytes", "bytes_per_image", "bits_per_pixel", "ratio", "psnr", "labels")},
        **{key: record[key] for key in ("bits_per_image", "prior_bits_per_image", "overhead", "bits")},
        "exact": exact,
        "flip_detected": detected,
        "compress_seconds": middle - start,
        "decompress_seconds": end - middle,
    }


def choices(run: RunFolder, levels: Sequence[str], texts: Sequence[str]) -> list[dict[str, str]]:
    """The priors of each level of each row: as given, or each one that is trained on all levels, and the baselines."""
    if texts:
        parsed = [parse_priors(text, levels) for text in texts]
        return [{level: mix[level] for level in levels} for mix in parsed]
    trained = trained_priors(run)
    names = set.intersection(*(set(trained.get(level, {})) for level in levels)) | {"uniform", "unigram"}
    return [dict.fromkeys(levels, name) for name in sorted(names) if can_code(name)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, type=Path)
    parser.add_argument("-n", dest="count", type=int, default=1000)
    parser.add_argument("--prior", dest="priors", action="append", default=[])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    run = RunFolder(arguments.run)
    codec = HierarchicalVQVAE.from_pretrained(run.codec)
    config = run_settings(run)
    test = load_data(fitted_to(codec, config.data), config.seed, splits=("test",)).splits["test"]
    images = test.__getitems__(range(min(arguments.count, len(test))))["images"]
    codes = own_codes(codec, images)

    rows = []
    print("prior: bytes/image, bits/image (theory), overhead, exact, flip detected, seconds to write and read")
    for chosen in choices(run, [level.name for level in codec.levels], arguments.priors):
        row = measure(run, chosen, codes, len(images))
        rows.append(row)
        print(
            f"{row['prior']}: {row['bytes_per_image']:.2f}, {row['bits_per_image']:.2f} "
            f"({row['prior_bits_per_image']:.2f}), {row['overhead']:.2%}, {row['exact']}, {row['flip_detected']}, "
            f"{row['compress_seconds']:.1f}, {row['decompress_seconds']:.1f}"
        )

    others = []
    target = rows[0]["psnr"]
    print(f"at a mean PSNR of {target:.2f} dB: bytes/image")
    for kind in QUALITIES:
        for layout, code in (("a file each", one_by_one), ("one sheet", as_sheet)):
            found = {"format": kind, "layout": layout, **at_psnr(images, kind, target, code)}
            others.append(found)
            note = "" if found["equal"] else f" (its nearest PSNR: {found['psnr']:.2f} dB)"
            print(f"{kind}, {layout}: {found['bytes']:.2f}, quality {found['quality']}{note}")
    if arguments.json:
        pixels = images.shape[1:].numel()
        write_json(arguments.json, {"images": len(images), "raw_bytes": pixels, "rows": rows, "others": others})


if __name__ == "__main__":
    main()
