"""Settings: typed, frozen, and checked all at once.

A run's settings come in the groups ``data``, ``codec``, ``priors.<name>`` and ``run``. They are layered:
defaults, the chain of ``base`` presets, the preset or file, ``--set KEY=VALUE``. A budget (``steps``,
``epochs`` or ``minutes``) named in an upper layer replaces the budget of the layers below it.

What a prior's own settings are is not known here: ``priors.<name>`` stays a plain mapping, checked by
`priors.registry` against the class it names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from vqgen.errors import ConfigError, InputError, did_you_mean

BUDGETS = ("steps", "epochs", "minutes")

S = TypeVar("S", bound="Settings")


class Settings(BaseModel):
    """Base of every settings class: frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class PlayerSettings(Settings):
    """Optimiser settings of one player; what is left out comes from the stage's training settings."""

    optimizer: Literal["adam", "rmsprop"] | None = None
    learning_rate: float | None = Field(None, gt=0)
    betas: tuple[float, float] | None = None
    weight_decay: float | None = Field(None, ge=0)
    clip: float | None = Field(None, gt=0)


class TrainingSettings(Settings):
    """How one model is trained; the same for the codec and for every prior."""

    steps: int | None = Field(None, ge=0)
    """Budget in optimiser steps."""
    epochs: float | None = Field(None, gt=0)
    """Budget in passes over the training split."""
    minutes: float | None = Field(None, gt=0)
    """Budget in minutes of training (pauses not counted)."""
    batch_size: int = Field(128, ge=1)
    """Images per process and micro-batch."""
    accumulate: int = Field(1, ge=1)
    """Micro-batches per optimiser step."""
    optimizer: Literal["adam", "rmsprop"] = "adam"
    learning_rate: float = Field(3e-4, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay (AdamW) with ``adam``; an L2 penalty with ``rmsprop``."""
    clip: float | None = Field(None, gt=0)
    """Largest gradient norm; none by default."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the learning rate over progress, after the warm-up."""
    warmup: float = Field(0.0, ge=0, lt=1)
    """Share of the training over which the learning rate rises linearly from 0."""
    final_rate: float = Field(0.0, ge=0, le=1)
    """Share of the learning rate left at the end of ``linear`` and ``cosine``."""
    weight_ema: float | None = Field(None, gt=0, lt=1)
    """Decay of the running average of the weights, which is then what is evaluated and exported."""
    evaluate_every: int = Field(500, ge=1)
    """Steps between evaluations on the validation split."""
    evaluate_images: int = Field(2000, ge=1)
    """Most validation images read at each evaluation."""
    checkpoint_every: int = Field(500, ge=1)
    """Steps between checkpoints."""
    keep: int = Field(2, ge=1)
    """Checkpoints kept."""
    preview_every: int = Field(1000, ge=1)
    """Steps between preview grids."""
    log_every: int = Field(50, ge=1)
    """Steps between lines of metrics.jsonl."""
    patience: int | None = Field(None, ge=1)
    """Stop after this many evaluations without a better validation loss; never by default."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    workers: int = Field(0, ge=0)
    """Processes that load data; 0 loads in the training process."""
    tracker: Literal["none", "tensorboard", "wandb"] = "none"
    """Where metrics go besides metrics.jsonl."""
    players: dict[str, PlayerSettings] = {}
    """Optimiser settings per player, for models with more than one."""

    def identity(self) -> dict[str, Any]:
        """The settings that decide the numbers; the others may change when a training is resumed."""
        free = {"checkpoint_every", "keep", "preview_every", "workers", "tracker"}
        return self.model_dump(mode="json", exclude=free)

    @model_validator(mode="after")
    def _one_budget(self) -> TrainingSettings:
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"needs exactly one of steps, epochs and minutes, got {' and '.join(given) or 'none'}")
        return self


class DataSettings(Settings):
    """Where images come from and what they become before the codec sees them."""

    source: str = "shapes"
    """``shapes``, a folder of images, a parquet or arrow file or folder, a saved data set, ``.npy``, ``.npz``,
    or the name of a data set on the Hugging Face hub."""
    subset: str | None = None
    """Configuration name of a hub data set that has several."""
    revision: str | None = None
    """Revision of a hub data set."""
    image_size: int | tuple[int, int] | None = None
    """Size to resize to: a number for a square, or height and width; none keeps the size of the first image."""
    channels: Literal[1, 2, 3, 4] | None = None
    """Channels to convert to; none keeps those of the first image."""
    image_column: str | None = None
    label_column: str | None = None
    labels: bool = True
    """Use labels where the source has them."""
    limit: int | None = Field(None, ge=1)
    """Most images of each split."""
    flip: bool = False
    """Mirror half of the training images, drawn anew in each epoch."""
    count: int = Field(20000, ge=10)
    """Training images of the built-in ``shapes``; a tenth as many for validation and for test."""
    unreadable: float = Field(0.01, ge=0, le=1)
    """Share of unreadable images that is skipped with a notice before it is an error."""

    @field_validator("image_size")
    @classmethod
    def _positive_size(cls, value: int | tuple[int, int] | None) -> int | tuple[int, int] | None:
        sides = (value,) if isinstance(value, int) else value or ()
        if any(side < 1 for side in sides):
            raise ValueError("must be at least 1")
        return value


class CodecConfig(Settings):
    """Architecture of the codec (VQ-VAE-2, Razavi et al. 2019, sec. 3.1)."""

    strides: tuple[int, ...] = (8, 4)
    """Downsampling of each level, coarse to fine; powers of two, each a multiple of the next."""
    codebook_size: int | tuple[int, ...] = 512
    """K: one number, or one per level."""
    code_dim: int | tuple[int, ...] = 64
    """D: one number, or one per level."""
    commitment: float | tuple[float, ...] = 0.25
    """beta, the weight of the commitment loss: one number, or one per level."""
    width: int = Field(128, ge=2)
    """Channels of the encoders and the decoder."""
    residual_blocks: int = Field(2, ge=0)
    """Residual blocks at the end of each encoder and the start of each decoder."""
    residual_width: int = Field(32, ge=1)
    """Channels inside a residual block."""
    filters: tuple[int, ...] | None = None
    """Explicit channels of each convolution of the finest encoder (reversed in the decoder); replaces ``width``
    there. The first entries halve the map until the finest stride is reached, the others keep its size."""
    codebook: Literal["ema", "gradient"] = "ema"
    """How the codebook is learned."""
    decay: float = Field(0.99, ge=0, lt=1)
    """Decay of the running counts and sums of an ``ema`` codebook."""
    revival: float = Field(0.1, ge=0)
    """A code used less than this share of the mean use is moved onto a random encoder output; 0 turns it off."""
    level_dropout: float = Field(0.05, ge=0, lt=1)
    """Share of training images whose finer levels are hidden from the decoder, so that it can do without them."""
    reconstruction: Literal["mse", "l1"] = "mse"

    @model_validator(mode="after")
    def _levels_agree(self) -> CodecConfig:
        problems = []
        count = len(self.strides)
        if not 1 <= count <= 3:
            problems.append(f"strides must name 1, 2 or 3 levels, got {count}")
        if any(stride < 2 or stride & (stride - 1) for stride in self.strides):
            problems.append(f"strides must be powers of two from 2 up, got {list(self.strides)}")
        elif any(coarse <= fine for coarse, fine in zip(self.strides, self.strides[1:], strict=False)):
            problems.append(f"strides must fall from coarse to fine, such as [8, 4], got {list(self.strides)}")
        for name, least in (("codebook_size", 1), ("code_dim", 1), ("commitment", 0)):
            value = getattr(self, name)
            values = value if isinstance(value, tuple) else (value,)
            if len(values) not in (1, count):
                problems.append(f"{name} must be one number or {count}, one per level, got {len(values)}")
            if any(v < least for v in values):
                problems.append(f"{name} must be at least {least}, got {value}")
        if self.filters is not None and self.strides:
            halvings = self.strides[-1].bit_length() - 1
            if len(self.filters) < halvings or any(f < 1 for f in self.filters):
                problems.append(
                    f"filters must be at least {halvings} positive numbers for a stride of {self.strides[-1]}"
                )
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def per_level(self, name: Literal["codebook_size", "code_dim", "commitment"]) -> tuple[Any, ...]:
        """The setting ``name`` as one value per level, coarse to fine."""
        value = getattr(self, name)
        values = value if isinstance(value, tuple) else (value,)
        return values if len(values) == len(self.strides) else values * len(self.strides)


class CodecSection(CodecConfig):
    """The group ``codec``: the architecture and how it is trained."""

    training: TrainingSettings

    @property
    def architecture(self) -> CodecConfig:
        """The architecture alone, as it is kept with the weights."""
        return CodecConfig(**self.model_dump(exclude={"training"}))


class RunSection(Settings):
    """The group ``run``: what ``vqgen run`` does."""

    priors: tuple[str | dict[str, str], ...] = ("pixelcnn", "transformer")
    """Priors to train: a name for every level, or a mapping from level to name."""
    samples: int = Field(64, ge=1)
    """Images in the sample grid."""


class Config(Settings):
    """All settings of a run."""

    base: str | None = None
    """Preset that this one starts from."""
    seed: int = Field(0, ge=0, lt=2**63)
    data: DataSettings = DataSettings()
    codec: CodecSection
    priors: dict[str, dict[str, Any]] = {}
    run: RunSection = RunSection()


DEFAULTS: dict[str, Any] = {"codec": {"training": {"steps": 10000}}}


def presets_folder() -> Path:
    """Folder of the presets: ``vqgen/configs`` in an installed wheel, ``configs`` in a checkout."""
    inside = Path(__file__).parent / "configs"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "configs"


def preset_names() -> list[str]:
    return sorted(path.stem for path in presets_folder().glob("*.yaml"))


def preset_summary(name: str) -> str:
    """What a preset is, from the first comment line of its file."""
    first = (presets_folder() / f"{name}.yaml").read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip()


def read_layers(name: str) -> dict[str, Any]:
    """Settings of a preset name or YAML file, merged over its chain of bases and over the defaults.

    Raises:
        InputError: no such preset or file, or a chain of bases that never ends.
        ConfigError: the file is not a YAML mapping.
    """
    layers: list[dict[str, Any]] = []
    seen: list[Path] = []
    pending: str | None = name
    while pending is not None:
        path = _preset_path(pending)
        if path in seen:
            raise InputError(f"{path}: the chain of 'base' presets never ends.", "Remove one of the 'base' lines.")
        seen.append(path)
        layer = read_yaml(path)
        base = layer.get("base")
        if base is not None and not isinstance(base, str):
            raise ConfigError(f"{path}: base: expected the name of a preset, got {base!r}.")
        layers.append(layer)
        pending = base
    merged = DEFAULTS
    for layer in reversed(layers):
        merged = merge(merged, layer)
    return merged


def _preset_path(name: str) -> Path:
    if name.endswith((".yaml", ".yml")) or "/" in name:
        if not Path(name).is_file():
            raise InputError(f"No config file at '{name}'.", "Give a preset name or the path of a YAML file.")
        return Path(name)
    path = presets_folder() / f"{name}.yaml"
    if name not in preset_names():
        known = ", ".join(preset_names())
        raise InputError(f"Unknown preset '{name}'.", f"{did_you_mean(name, preset_names())} Known: {known}.".strip())
    return path


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file as a mapping.

    Raises:
        ConfigError: the file cannot be read, is not YAML, or is not a mapping with text keys.
    """
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}).") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        line = " ".join(str(error).split())
        raise ConfigError(f"{path}: not valid YAML ({line}).", "Mend the file.") from error
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ConfigError(f"{path}: expected a mapping of settings such as 'codec: {{width: 128}}'.")
    return value


def merge(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """``upper`` over ``lower``, mapping by mapping; a budget in ``upper`` removes the budgets of ``lower``."""
    if any(upper.get(name) is not None for name in BUDGETS):
        lower = {key: value for key, value in lower.items() if key not in BUDGETS}
    result = dict(lower)
    for key, value in upper.items():
        below = result.get(key)
        both = isinstance(value, Mapping) and isinstance(below, Mapping)
        result[key] = merge(below, value) if both else value  # type: ignore[arg-type]
    return result


def parse_set(assignment: str) -> dict[str, Any]:
    """``"codec.width=64"`` as ``{"codec": {"width": 64}}``; the value is YAML.

    Raises:
        InputError: not of the form KEY=VALUE, or the value is not YAML.
    """
    key, equals, text = assignment.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise InputError(f"--set {assignment}: expected KEY=VALUE.", "For example --set codec.training.steps=600.")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise InputError(f"--set {assignment}: the value is not valid YAML.") from error
    for part in reversed(parts):
        value = {part: value}
    return value  # type: ignore[no-any-return]


def apply_sets(settings: Mapping[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """``settings`` with each ``KEY=VALUE`` of ``assignments`` merged over it, in order."""
    merged = dict(settings)
    for assignment in assignments:
        merged = merge(merged, parse_set(assignment))
    return merged


def check(kind: type[S], values: Any, where: str = "") -> tuple[S | None, list[str]]:
    """``values`` as ``kind``, or None and one line per problem, each led by ``where`` and the key's path."""
    try:
        return kind.model_validate(values), []
    except ValidationError as error:
        return None, [_problem(kind, dict(detail), where) for detail in error.errors(include_url=False)]


def build(kind: type[S], values: Any, where: str = "") -> S:
    """``values`` as ``kind``.

    Raises:
        ConfigError: with every problem at once.
    """
    settings, problems = check(kind, values, where)
    if settings is None:
        raise_problems(problems)
    return settings  # type: ignore[return-value]


def raise_problems(problems: Sequence[str], file: str = "") -> None:
    """Raise one `ConfigError` that lists ``problems``; does nothing where there are none."""
    if not problems:
        return
    of = f" in {file}" if file else ""
    if len(problems) == 1:
        raise ConfigError(f"Bad setting{of}: {problems[0]}")
    raise ConfigError(f"{len(problems)} bad settings{of}:" + "".join(f"\n  {line}" for line in problems))


def _problem(kind: type[BaseModel], detail: dict[str, Any], where: str) -> str:
    location = [str(part) for part in detail["loc"] if not _is_union_tag(str(part))]
    key = ".".join(([where] if where else []) + location) or "settings"
    if detail["type"] == "extra_forbidden":
        known = _fields_at(kind, location[:-1])
        return f"{key}: unknown key. {did_you_mean(location[-1], known) or 'Known: ' + ', '.join(known) + '.'}"
    message = detail["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    shown = detail.get("input")
    given = (
        f", got {shown!r}" if not isinstance(shown, dict) and detail["type"] not in ("missing", "value_error") else ""
    )
    return f"{key}: {message}{given}"


def _is_union_tag(part: str) -> bool:
    return part in ("int", "float", "str") or part.startswith(("tuple[", "dict[", "constrained"))


def _fields_at(kind: type[BaseModel], location: Sequence[str]) -> list[str]:
    here: Any = kind
    for part in location:
        field = here.model_fields.get(part) if isinstance(here, type) and issubclass(here, BaseModel) else None
        here = field.annotation if field else None
    return list(here.model_fields) if isinstance(here, type) and issubclass(here, BaseModel) else []
