"""What readers of a run.json take for granted, so that a stranger's is refused before anything is made of it."""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

PART = r"(?!\.)[^/\\:\x00-\x1f\x7f]{1,100}"
"""What a part of a path may be that a file of a run names."""
_STAGE = re.compile(r"codec|codes|classifier|priors/[a-z][a-z0-9_-]{0,99}/(top|middle|bottom)")
"""Stages are folders of the run that are removed with all that is in them; and they become words of a command."""

Scalar = int | float | None


class _Part(BaseModel):
    """Strict: a text is no number. What else a record holds is nobody's business here."""

    model_config = ConfigDict(strict=True, extra="ignore")


class _Stage(_Part):
    steps: int = 0
    seconds: int | float = 0.0
    parameters: int = 0
    peak_memory: int | None = None
    validation: dict[str, Scalar] = {}
    images: dict[str, int] = {}
    settings: dict[str, Any] = {}
    fingerprint: str = ""
    at: str = ""


class _Data(_Part):
    description: str = ""
    fingerprint: str = ""
    notes: list[str] = []
    values: list[int | float] | None = None


class _Record(_Part):
    data: _Data
    stages: dict[str, _Stage]
    commands: list[dict[str, Any]]

    @field_validator("stages")
    @classmethod
    def _named_like_folders(cls, stages: dict[str, _Stage]) -> dict[str, _Stage]:
        if strange := [name for name in stages if not _STAGE.fullmatch(name)]:
            raise ValueError(f"{strange[0]!r} is no stage")
        return stages


def record_problems(saved: Any) -> str:
    """What is bad or missing in the content of a run.json, by key; empty where it is one."""
    try:
        _Record.model_validate(saved)
    except ValidationError as error:
        wrong = sorted({".".join(map(str, detail["loc"][:3])) or "the whole" for detail in error.errors()})
        return ", ".join(wrong)[:200]
    return ""
