"""Peak memory of training and of encoding from streamed shards: 200,000 images against 20,000.

    python benchmarks/streaming.py --json streaming.json

Makes parquet shards of 10,000 built-in pictures (32x32, PNG, row groups of 100) in a temporary folder, or takes those
it finds in ``--shards``; the small set is the first shards of the large one. Of each set, in a process of its own:

- train: one epoch of a very small codec, evaluations and checkpoints in it;
- whole: all of ``vqgen train-codes --streaming``: that, and encoding the whole set, codes written;
- and, as what streaming is measured against, the large set once more without it (``copied``), in which case `datasets`
  first copies the shards to its cache, whose size is shown.

Memory is the most that the process had resident, while it trained or ever (`vqgen.memory`); Python and torch are in it.
Exit code 1 where the large set takes over 10 % more than the small one. The time is that of one thread.

This measures memory; it says nothing of how fast a disk or a network is.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SHARD = 10_000
ROW_GROUP = 100
SIZE = 32
LIMIT = 1.10
SETTINGS = """
data: {image_size: 32}
codec:
  {strides: [8], codebook_size: 64, code_dim: 8, width: 8, residual_blocks: 0,
   training: {epochs: 1, batch_size: 128, evaluate_every: 500, checkpoint_every: 500, preview_every: 100000}}
"""


def make_shard(path: Path, first: int) -> None:
    """One parquet file of `SHARD` pictures, from picture ``first`` of the built-in set on."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    from vqgen import shapes

    names = datasets.ClassLabel(names=list(shapes.CLASS_NAMES))
    schema = datasets.Features({"image": datasets.Image(), "label": names}).arrow_schema
    temporary = path.with_suffix(".tmp")
    with pq.ParquetWriter(temporary, schema, compression="none", use_dictionary=False) as writer:
        for start in range(first, first + SHARD, ROW_GROUP):
            places = range(start, start + ROW_GROUP)
            cells = []
            for pixels in shapes.render(places, (SIZE, SIZE)).transpose(0, 2, 3, 1):
                buffer = io.BytesIO()
                Image.fromarray(pixels).save(buffer, format="PNG", compress_level=1)
                cells.append({"bytes": buffer.getvalue(), "path": None})
            columns = {"image": cells, "label": shapes.labels(places).tolist()}
            writer.write_table(pa.table(columns, schema=schema), row_group_size=ROW_GROUP)
    temporary.replace(path)


def make_sets(folder: Path, counts: list[int]) -> dict[int, Path]:
    """A folder of shards for each of ``counts``; smaller ones are links to the first shards of the largest."""
    folder.mkdir(parents=True, exist_ok=True)
    largest = folder / str(max(counts))
    largest.mkdir(exist_ok=True)
    for number in range(max(counts) // SHARD):
        path = largest / f"train-{number:05d}.parquet"
        if not path.exists():
            make_shard(path, number * SHARD)
    for count in counts:
        (folder / str(count)).mkdir(exist_ok=True)
        for number in range(count // SHARD):
            link = folder / str(count) / f"train-{number:05d}.parquet"
            if not link.exists():
                link.symlink_to(os.path.relpath(largest / link.name, link.parent))
    return {count: folder / str(count) for count in counts}


def measure(source: Path, work: Path, streaming: bool) -> dict[str, Any]:
    """Peak MiB of the training and of the whole stage, its seconds, and MiB that were copied."""
    import datasets
    import torch

    from pipelines.settings import new_run_settings
    from pipelines.train_codes import train_codes
    from vqgen.console import Console
    from vqgen.run_folder import RunFolder

    torch.set_num_threads(1)
    datasets.config.HF_DATASETS_CACHE = work / "cache"
    (work / "settings.yaml").write_text(SETTINGS, encoding="utf-8")
    sets = [f"data.streaming={str(streaming).lower()}"]
    config = new_run_settings(str(work / "settings.yaml"), str(source), sets)
    run, console = RunFolder(work / "run"), Console(quiet=True)
    started = time.perf_counter()
    record = train_codes(run, config, console)
    return {
        "images": sum((run.stage("codes") or {})["images"].values()),
        "train_mib": round(record["peak_memory"] / 2**20, 1),
        "whole_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10, 1),
        "seconds": round(time.perf_counter() - started, 1),
        "copied_mib": round(sum(f.stat().st_size for f in (work / "cache").rglob("*") if f.is_file()) / 2**20, 1),
    }


def measure_elsewhere(source: Path, kind: str) -> dict[str, Any]:
    """The same in a process of its own."""
    with tempfile.TemporaryDirectory() as work:
        command = [sys.executable, __file__, "--source", str(source), "--kind", kind, "--work", work]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    parser.add_argument("--images", nargs=2, type=int, default=[20_000, 200_000], metavar="N", help="sizes of the sets")
    parser.add_argument("--shards", type=Path, metavar="DIR", help="where the shards are made and kept")
    for hidden in ("--source", "--kind", "--work"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.source:
        print(json.dumps(measure(Path(arguments.source), Path(arguments.work), arguments.kind == "streamed")))
        return
    if any(count < SHARD or count % SHARD for count in arguments.images):
        parser.error(f"--images are multiples of {SHARD:,}")

    with tempfile.TemporaryDirectory() as temporary:
        sources = make_sets(arguments.shards or Path(temporary), arguments.images)
        small, large = sorted(sources)
        rows = []
        line = "{:>9} {:<9} {:>10} {:>10} {:>11} {:>8}"
        print(line.format("images", "read", "train MiB", "whole MiB", "copied MiB", "seconds"), flush=True)
        for count, kind in ((small, "streamed"), (large, "streamed"), (large, "copied")):
            row = {"set": count, "kind": kind, **measure_elsewhere(sources[count], kind)}
            rows.append(row)
            keys = ("train_mib", "whole_mib", "copied_mib", "seconds")
            print(line.format(f"{count:,}", kind, *(f"{row[key]:,}" for key in keys)), flush=True)
    ratios = {key: round(rows[1][key] / rows[0][key], 3) for key in ("train_mib", "whole_mib")}
    print(
        f"{large:,} images against {small:,}, streamed: {ratios['train_mib']} times the memory to train, "
        f"{ratios['whole_mib']} times in all"
    )
    if arguments.json:
        setting = {"shard": SHARD, "row_group": ROW_GROUP, "size": SIZE, "settings": SETTINGS, "threads": 1}
        setting |= {"python": platform.python_version(), "machine": platform.machine()}
        made = {"setting": setting, "rows": rows, "ratios": ratios}
        arguments.json.write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
    sys.exit(int(max(ratios.values()) > LIMIT))


if __name__ == "__main__":
    main()
