"""What a comparison writes: compare.json, Markdown, CSV, the report and its pictures, and what they rest on."""

from __future__ import annotations

import csv
import io
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

import torch

import vqgen
from pipelines.comparison_rows import COLUMNS, LN2, highlights
from pipelines.likelihood import HeldOut
from pipelines.report.figures import Sections
from pipelines.report.page import write_page
from pipelines.report.plots import bits_chart
from pipelines.report.tables import to_markdown
from vqgen.code_store import CodeStore
from vqgen.codec import HierarchicalVQVAE
from vqgen.files import finite, write_bytes, write_json, write_text
from vqgen.metrics import bits_per_dim
from vqgen.run_folder import RunFolder


def provenance(
    run: RunFolder, store: CodeStore, held_out: HeldOut, codec: HierarchicalVQVAE, seed: int
) -> dict[str, Any]:
    """What the figures rest on."""
    return {
        "vqgen": vqgen.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["vqgen", *sys.argv[1:]]),
        "seed": seed,
        "split": "test",
        "images": len(held_out.indices),
        "images_available": len(held_out.codes),
        "codec_fingerprint": store.info.codec_fingerprint,
        "data": run.data_description(),
        "data_fingerprint": store.info.data_fingerprint,
        "pixels": list(held_out.notes),
        "decoder_bits_per_dim": bits_per_dim(float(held_out.decoder_nats.mean()), codec.spec.dims),
        "label_bits_per_image": float(held_out.label_nats.mean()) / LN2,
    }


def to_csv(result: Mapping[str, Any]) -> str:
    """Rows and anchors as CSV with a heading: the numbers as compare.json has them, null as an empty cell."""
    text = io.StringIO()
    writer = csv.DictWriter(text, ["prior", "level", *COLUMNS], lineterminator="\n")
    writer.writeheader()
    writer.writerows(finite([*result["rows"], *result["anchors"]]))
    return text.getvalue()


def write_comparison(
    run: RunFolder, result: Mapping[str, Any], sections: Sections, curves: Sequence[Mapping[str, Any]]
) -> dict[str, str]:
    """Write compare.json, compare.md, compare.csv, report.html, bits.png and four_way.png.

    Returns the paths of what is to be looked at.
    """
    folder = run.compare
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "compare.json", result)
    notices = result["provenance"]["notices"]
    write_text(folder / "compare.md", to_markdown(result) + "".join(f"- notice: {notice}\n" for notice in notices))
    write_text(folder / "compare.csv", to_csv(result))
    write_bytes(folder / "bits.png", bits_chart(result["rows"], kind="png"))
    write_bytes(folder / "four_way.png", sections.four_way)
    write_page(folder / "report.html", result, sections, curves, [*highlights(result["rows"]), *notices])
    names = ("report.html", "compare.json", "compare.csv", "compare.md", "four_way.png")
    return {name: str(folder / name) for name in names}
