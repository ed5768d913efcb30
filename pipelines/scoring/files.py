"""What a scoring leaves in the run: scores.csv, scores.json, charts, and maps where they were asked for."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from safetensors.torch import save_file

from pipelines.scoring.charts import histograms, roc_chart
from pipelines.scoring.map_pictures import map_pictures
from pipelines.scoring.tables import Scores, detection_lines
from vqgen.codec import HierarchicalVQVAE
from vqgen.files import atomic_folder, csv_text, write_bytes, write_json, write_text
from vqgen.run_folder import RunFolder

SETS = ("scores", "against")
"""Names of the tables of the images and of the outliers."""


def write_scores(
    run: RunFolder, name: str, record: Mapping[str, Any], scored: Sequence[Scores], codec: HierarchicalVQVAE, maps: bool
) -> dict[str, Any]:
    """Write everything to ``scores/<name>``, replacing what an earlier call left there.

    maps.safetensors holds ``<level>`` (M, h, w) float32 bits for the rows of scores.csv, and ``against_<level>`` for
    those of against.csv.

    Returns:
        ``record``, with the paths written under ``files``.
    """
    folder = run.scores(name)
    with atomic_folder(folder) as temporary:
        written = []
        for table, scores in zip(SETS, scored, strict=False):
            write_text(temporary / f"{table}.csv", to_csv(scores))
            written.append(f"{table}.csv")
        write_bytes(temporary / "histograms.png", histograms(scored, record["detection"]))
        written.append("histograms.png")
        if record["detection"] is not None:
            write_json(temporary / "detection.json", record["detection"])
            write_text(temporary / "detection.md", to_markdown(record["detection"]))
            write_bytes(temporary / "roc.png", roc_chart(scored[0], scored[1], record["detection"]))
            written += ["detection.json", "detection.md", "roc.png"]
        if maps and any(scores.maps for scores in scored):
            tensors = {
                f"{'' if table == 'scores' else 'against_'}{level}": bits.float().contiguous()
                for table, scores in zip(SETS, scored, strict=False)
                for level, bits in scores.maps.items()
            }
            save_file(tensors, temporary / "maps.safetensors")
            write_bytes(temporary / "maps.png", map_pictures(scored, codec))
            written += ["maps.png", "maps.safetensors"]
        files = {file: str(folder / file) for file in [*written, "scores.json"]}
        result = {**record, "files": files}
        write_json(temporary / "scores.json", result)
    return result


def to_csv(scores: Scores) -> str:
    """A line for each image: its place in the split, its label if it has one, and every column."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["index", "label", *scores.columns])
    names = scores.images.names
    values = [column.tolist() for column in scores.columns.values()]
    for row, place in enumerate(scores.places):
        label = "" if names is None else csv_text(names[place])
        writer.writerow([place, label, *(f"{column[row]:.10g}" for column in values)])
    return text.getvalue()


def to_markdown(detection: Mapping[str, Any]) -> str:
    """The table of detection as Markdown."""
    head, lines = detection_lines(detection)
    rows = [head, [":--", *["--:"] * (len(head) - 1)], *lines]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return (
        f"{table}\n\nOutliers are the positives: {detection['outliers']:,} of them against {detection['inliers']:,} "
        f"other images. Errors are those of {detection['resamples']:,} bootstrap samples.\n"
    )
