"""What a code store says of itself: codes.json, and the columns that follow from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import TypeAdapter, ValidationError

from vqgen.codes import ImageSpec, LevelSpec, level_names
from vqgen.errors import InputError
from vqgen.parsing import load_json

FORMAT = 1
INFO = "codes.json"
TABLE = "data-00000-of-00001.arrow"
"""The name `datasets` gives the first of one file."""

LABEL = "label"

ENCODE_AGAIN = "Encode the data again: vqgen encode."


@dataclass(frozen=True)
class CodeStoreInfo:
    """What a code store holds, and what it was made from and by."""

    levels: tuple[LevelSpec, ...]
    """Coarse to fine."""
    class_names: tuple[str, ...]
    """Empty where unlabelled."""
    image: ImageSpec
    """The images the codec takes."""
    codec_fingerprint: str
    data_fingerprint: str
    splits: dict[str, int] = field(default_factory=dict)
    """Images in each split."""
    content: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each split's codes and labels."""


def column_dtype(level: LevelSpec) -> np.dtype[Any]:
    """The smallest integers that a level's codes are kept in."""
    return np.dtype(np.int16 if level.codebook_size <= 2**15 else np.int32)


def column_types(info: CodeStoreInfo) -> dict[str, Any]:
    """Arrow types of the columns of a split, by name and in order."""
    types = {level.name: pa.list_(pa.from_numpy_dtype(column_dtype(level)), level.positions) for level in info.levels}
    return {**types, LABEL: pa.int64()} if info.class_names else types


def read_info(path: Path) -> CodeStoreInfo:
    """The content of a codes.json.

    Raises:
        InputError: it is missing or damaged.
    """
    if not path.is_file():
        raise InputError(f"No codes at '{path.parent}': {INFO} is missing.", ENCODE_AGAIN)
    try:
        saved = load_json(path)
        if not isinstance(saved, dict) or "format" not in saved:
            raise ValueError("not the description of a code store")
        if saved.pop("format") != FORMAT:
            raise ValueError("of another format")
        info = TypeAdapter(CodeStoreInfo).validate_python(saved)
        if not info.splits or set(info.splits) != set(info.content) or any(count < 0 for count in info.splits.values()):
            raise ValueError("splits and content do not agree")
        if any(Path(name).name != name or name in ("", ".", "..") for name in info.splits):
            raise ValueError("a split is not named like a folder")
        if tuple(level.name for level in info.levels) != level_names(len(info.levels)):
            raise ValueError("levels are not named top, middle, bottom")
    except ValidationError as error:
        wrong = ", ".join(".".join(map(str, detail["loc"])) for detail in error.errors())
        raise InputError(f"'{path}' is damaged (bad or missing: {wrong}).", ENCODE_AGAIN) from error
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"'{path}' is damaged ({error}).", ENCODE_AGAIN) from error
    return info
