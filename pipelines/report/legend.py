"""What the terms of a comparison mean, in sentences: its units, its baselines, what was measured on which images.

Only terms that stand in the tables of this comparison are explained. ``comparison`` is the content of compare.json.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pipelines.report.columns import QUALITY, Row, figure
from priors.registry import SOURCES


def legend(comparison: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Terms and what they mean, only those that stand in the table of this comparison."""
    rows, provenance = comparison["rows"], comparison.get("provenance") or {}
    notes = [
        ("held out", held_out(provenance)),
        (
            "bits/code",
            "what one code costs under the prior, in bits: the bits of all codes of the level over their number; "
            "on 'all', of every level together. Lower is better.",
        ),
        ("bits/image", "the bits of one image's codes, without the decoder's share."),
        (
            "uniform, unigram",
            "the scale: uniform gives each of K codes the same probability and costs log2 K bits, unigram knows "
            "only how often each code stands at each position (in each class, where there are labels). A prior that "
            "is no better than unigram has learned nothing of how codes go together.",
        ),
        *_source_notes(rows),
        ("best", "the best trained prior of a level in a column is marked; baselines are not ranked."),
    ]
    if any(row.get("standard_error") is not None for row in rows):
        notes.append(("±", "standard error, of bits/code that of the mean over the images."))
    if bounds := [row for row in rows if row.get("likelihood") == "bound"]:
        notes.append(
            (
                "≤",
                "an upper bound: the prior's likelihood cannot be computed exactly and the true figure is no higher. "
                "'draws' is the number of samples behind each estimate." + _estimates(bounds),
            )
        )
    if any(row.get("bits_per_dim") is not None for row in rows):
        notes.append(("bits/dim", _bits_per_dim(provenance)))
    notes.extend(_quality_notes(comparison))
    notes.append(
        (
            "training, samples/s",
            "time of the training steps, evaluations and checkpoints not counted, and images sampled per second.",
        )
    )
    if any(row.get("train_memory") is not None or row.get("sample_memory") is not None for row in rows):
        what = provenance.get("memory") or "the most that was in use at once"
        sampling = "of sampling, a prior's weights and what drawing takes beside them"
        notes.append(("memory", f"of training, {what}; {sampling}; in powers of 1000 bytes."))
    notes.extend(_compression_notes(comparison))
    return notes


def _quality_notes(comparison: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the figures of sample quality are, in which features they were taken, and what the anchors are."""
    rows, anchors = comparison["rows"], comparison.get("anchors") or []
    columns = [column for column in QUALITY if any(row.get(column.key) is not None for row in [*rows, *anchors])]
    if not columns:
        return []
    notes = [(column.title, f"{column.meaning}; {column.better}er is better.") for column in columns]
    made = (comparison.get("provenance") or {}).get("quality") or {}
    if made.get("extractor"):
        notes.insert(
            0,
            (
                "sample quality",
                f"samples are held against test images by features of the extractor '{made['extractor']}'. Figures "
                "of another extractor, of other weights or of other numbers of images cannot be compared with these.",
            ),
        )
    if anchors:
        notes.append(("anchors", _anchor_note(anchors)))
    return notes


_ANCHORS = {
    "training images": "as many real images, as good as samples can be",
    "reconstructions": "these images after the codec, as good as samples through this codec can be",
    "shuffled labels": "real images whose labels say nothing, which gives what chance gives",
}


def _anchor_note(anchors: Iterable[Row]) -> str:
    parts = [f"'{row['prior']}' are {_ANCHORS[row['prior']]}" for row in anchors if row["prior"] in _ANCHORS]
    return "; ".join(["figures that no prior made, by which the others can be read", *parts]) + "."


def _compression_notes(comparison: Mapping[str, Any]) -> list[tuple[str, str]]:
    codes = comparison.get("codes") or {}
    bits, ratio = figure(codes, "bits_per_image"), figure(codes, "ratio")
    if bits is None or ratio is None:
        return []
    return [
        (
            "ratio to raw",
            f"bits of the raw image, 8 for each of its values ({bits * ratio:,.0f} here), over bits of its codes. "
            "Codes at log2 K are codes stored as they are; under a prior they take its bits/image, which an entropy "
            "coder can come near. bits/pixel counts the codes of one image over its rows x columns.",
        ),
        ("PSNR, SSIM", "of reconstructions against the test images: what decoding these codes gives back."),
    ]


def _source_notes(rows: Iterable[Row]) -> list[tuple[str, str]]:
    if not {row["prior"] for row in rows} & {*SOURCES}:
        return []
    text = (
        "samples that no prior drew, and so without bits: neighbour are the codes of real images, each replaced by the "
        "nearest other vector of its codebook (of held-out images in the pictures, of training images in the figures, "
        "which are held against the former), random are codes drawn uniformly, which is how uniform samples."
    )
    return [(", ".join(SOURCES), text)]


def _estimates(bounds: Iterable[Row]) -> str:
    """How sure the estimates behind the bounds are, where that is known: a sentence for each row."""
    sentences = []
    for row in bounds:
        error, worth = (figure(row, key) for key in ("estimator_standard_error", "effective_samples"))
        if error is not None and worth is not None:
            sentences.append(
                f" {row['prior']}, {row['level']}: one image's estimate has a standard error of {error:.3f} bits/code, "
                f"its draws are worth {worth:.1f} independent ones."
            )
    return "".join(sentences)


def _bits_per_dim(provenance: Mapping[str, Any]) -> str:
    share, label = (figure(provenance, key) for key in ("decoder_bits_per_dim", "label_bits_per_image"))
    pixels = provenance.get("pixels") or ()
    pixels = [pixels] if isinstance(pixels, str) else [str(note) for note in pixels]
    return (
        f"(code bits + {'label bits + ' if label else ''}decoder bits) / dims, dims being the values of one image "
        "(channels x rows x columns). It is an upper bound, as it counts one way only of coding each image: the codes "
        "that the encoder picks."
        + (
            f" Code bits are given the image's label; naming the label costs {label:.3f} bits an image, "
            "which bits/dim counts and bits/code does not."
            if label
            else ""
        )
        + (f" The decoder's share is {share:.3f}, the same for every prior." if share is not None else "")
        + (f" The pixels are those that the codec sees: {'; '.join(pixels)}." if pixels else "")
    )


def held_out(provenance: Mapping[str, Any]) -> str:
    """One sentence: on which images the figures were measured, and whether these are held out."""
    split, images = provenance.get("split") or "test", figure(provenance, "images")
    available = figure(provenance, "images_available")
    part = f" of the {available:,.0f}" if images is not None and available is not None and available > images else ""
    what = f"{images:,.0f}{part} images of the {split} split" if images is not None else f"the {split} split"
    if split == "test":
        return f"Every figure is measured on {what}, which no training and no choice of settings has seen."
    if split == "validation":
        return (
            f"The figures are measured on {what}, by which checkpoints were chosen; they flatter the priors a little."
        )
    return f"The figures are measured on {what}, which is not held out; they say little about new images."
