"""Settings: typed, frozen, and checked all at once.

A run's settings come in the groups ``data``, ``codec``, ``priors.<name>`` and ``run``; where their values come
from is `vqgen.presets`. What a prior's own settings are is not known here: ``priors.<name>`` stays a plain mapping,
checked by `priors.registry` against the class it names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from vqgen.codes import MAX_LEVELS
from vqgen.errors import did_you_mean
from vqgen.problems import plain_types

BUDGETS = ("steps", "epochs", "minutes")


class Settings(BaseModel):
    """Base of every settings class: frozen; unknown keys, infinite numbers and booleans for numbers are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_boolean_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        # To Python, true is the number 1.
        kinds = plain_types(cls.model_fields[info.field_name or ""].annotation)
        if bool not in kinds and kinds & {int, float} and _holds_boolean(value):
            raise PydanticCustomError("boolean", "true and false are not numbers")
        return value


def expects(what: str) -> WrapValidator:
    """For the type of a setting: whatever does not fit is one problem, which says that ``what`` was expected."""

    def validate(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise PydanticCustomError("expected", "expected {what}", {"what": what}) from None

    return WrapValidator(validate)


Whole = Annotated[int, Field(ge=1)]
"""A whole number of at least 1."""
WholePerLevel = Annotated[Whole | tuple[Whole, ...], expects("a whole number of at least 1, or one per level")]
WeightPerLevel = Annotated[
    Annotated[float, Field(ge=0)] | tuple[Annotated[float, Field(ge=0)], ...],
    expects("a number of at least 0, or one per level"),
]
_Beta = Annotated[float, Field(ge=0, lt=1)]
Betas = Annotated[tuple[_Beta, _Beta], expects("two numbers from 0 up to but below 1, such as [0.9, 0.999]")]
PriorChoice = Annotated[str | dict[str, str], expects("the name of a prior, or a mapping from level to name")]


class PlayerSettings(Settings):
    """Optimiser settings of one player; what is left out comes from the stage's training settings."""

    optimizer: Literal["adam", "rmsprop"] | None = None
    learning_rate: float | None = Field(None, gt=0)
    betas: Betas | None = None
    weight_decay: float | None = Field(None, ge=0)
    clip: float | None = Field(None, gt=0)


class TrainingSettings(Settings):
    """How one model is trained; the same for the codec and for every prior."""

    steps: int | None = Field(None, ge=0)
    """Budget in optimiser steps."""
    epochs: float | None = Field(None, gt=0)
    """Budget in passes over the training split."""
    minutes: float | None = Field(None, gt=0)
    """Budget in minutes of training steps; compiling, evaluations, checkpoints and pauses are not counted."""
    batch_size: int = Field(128, ge=1)
    """Images per process and micro-batch."""
    auto_batch: bool = False
    """Where a batch does not fit into memory, let it go through the model in parts, by halving; the step stays."""
    accumulate: int = Field(1, ge=1)
    """Micro-batches per optimiser step."""
    optimizer: Literal["adam", "rmsprop"] = "adam"
    learning_rate: float = Field(3e-4, gt=0)
    betas: Betas = (0.9, 0.999)
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay (AdamW) with ``adam``; an L2 penalty with ``rmsprop``."""
    clip: float | None = Field(None, gt=0)
    """Largest gradient norm; none by default."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the learning rate over progress, after the warm-up."""
    warmup: float = Field(0.0, ge=0, lt=1)
    """Share of the training over which the learning rate rises linearly from 0."""
    decay_from: float = Field(0.0, ge=0, lt=1)
    """Share of the training before which the learning rate does not fall; never before the end of the warm-up."""
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
    """What the networks compute in while they are trained; weights, codebooks, losses, averages and evaluations are
    float32 whatever it is. ``fp16`` needs a GPU, and scales the losses."""
    compile: bool = False
    """Compile what is trained (torch.compile): seconds to minutes at the start, which no budget counts, for steps that
    may be faster."""
    workers: int = Field(0, ge=0, le=1024)
    """Processes that load data; 0 loads in the training process."""
    tracker: Literal["none", "tensorboard", "wandb"] = "none"
    """Where metrics go besides metrics.jsonl."""
    players: dict[str, PlayerSettings] = {}
    """Optimiser settings per player, for models with more than one."""

    def identity(self) -> dict[str, Any]:
        """The settings that decide the numbers; the others may change when a training is resumed."""
        free = {"auto_batch", "checkpoint_every", "keep", "preview_every", "workers", "tracker", "compile"}
        if not self.decay_from:  # as in trainings begun before there was such a setting
            free.add("decay_from")
        return self.model_dump(mode="json", exclude=free)

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def _no_is_a_word(cls, value: Any) -> Any:
        return "no" if value is False else value  # which is how YAML reads a bare no

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
    or the name of a data set on the Hugging Face hub; empty in presets for images that the user names."""
    subset: str | None = None
    """Configuration name of a hub data set that has several."""
    revision: str | None = None
    """Revision of a hub data set."""
    image_size: Annotated[
        Whole | tuple[Whole, Whole] | None, expects("a whole number of at least 1, or two: height and width")
    ] = None
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
    streaming: bool = False
    """Read parquet or arrow shards as they are needed, here or on the hub, without a copy on this disk; WebDataset
    shards are read so in any case."""
    buffer: int = Field(2048, ge=8)
    """Pictures that are shuffled among each other where shards are streamed; up to twice as many are in memory."""
    unreadable: float = Field(0.01, ge=0, le=1)
    """Share of unreadable images that is skipped with a notice before it is an error."""


class CodecConfig(Settings):
    """Architecture of the codec (VQ-VAE-2, Razavi et al. 2019, sec. 3.1)."""

    strides: Annotated[tuple[int, ...], expects("a list of whole numbers, such as [8, 4]")] = (8, 4)
    """Downsampling of each level, coarse to fine; powers of two, each a multiple of the next."""
    codebook_size: WholePerLevel = 512
    """K: one number, or one per level."""
    code_dim: WholePerLevel = 64
    """D: one number, or one per level."""
    commitment: WeightPerLevel = 0.25
    """beta, the weight of the commitment loss: one number, or one per level."""
    width: int = Field(128, ge=2)
    """Channels of the encoders and the decoder."""
    residual_blocks: int = Field(2, ge=0)
    """Residual blocks at the end of each encoder and the start of each decoder."""
    residual_width: int = Field(32, ge=1)
    """Channels inside a residual block."""
    filters: Annotated[tuple[Whole, ...] | None, expects("a list of whole numbers of at least 1")] = None
    """Explicit channels of each convolution of the finest encoder (reversed in the decoder); replaces ``width``
    there. The first entries halve the map until the finest stride is reached, the others keep its size."""
    codebook: Literal["ema", "gradient"] = "ema"
    """How the codebook is learned."""
    decay: float = Field(0.99, ge=0, lt=1)
    """Decay of the running means that move an ``ema`` codebook and say which codes are in use, once it has risen."""
    revival: float = Field(0.1, ge=0)
    """A code used less than this share of the mean use is moved onto a random encoder output; 0 turns it off."""
    level_dropout: float = Field(0.05, ge=0, lt=1)
    """Share of training images whose finer levels are hidden from the decoder, so that it can do without them."""
    reconstruction: Literal["mse", "l1"] = "mse"

    @field_validator("strides")
    @classmethod
    def _levels_nest(cls, strides: tuple[int, ...]) -> tuple[int, ...]:
        if not 1 <= len(strides) <= MAX_LEVELS:
            raise ValueError(f"must name 1 to {MAX_LEVELS} levels, got {len(strides)}")
        if any(stride < 2 or stride & (stride - 1) for stride in strides):
            raise ValueError(f"must be powers of two from 2 up, got {list(strides)}")
        if any(coarse <= fine for coarse, fine in pairwise(strides)):
            raise ValueError(f"must fall from coarse to fine, such as [8, 4], got {list(strides)}")
        return strides

    @field_validator("codebook_size", "code_dim", "commitment")
    @classmethod
    def _one_per_level(cls, value: Any, info: ValidationInfo) -> Any:
        levels = len(info.data.get("strides", ()))  # empty where the strides themselves are wrong
        if levels and isinstance(value, tuple) and len(value) not in (1, levels):
            raise ValueError(f"must be one number or {levels}, one per level, got {list(value)}")
        return value

    @field_validator("filters")
    @classmethod
    def _filters_reach_the_stride(cls, value: tuple[int, ...] | None, info: ValidationInfo) -> tuple[int, ...] | None:
        finest = info.data.get("strides", (1,))[-1]
        halvings = finest.bit_length() - 1
        if value is not None and len(value) < halvings:
            raise ValueError(f"must be at least {halvings} numbers for a stride of {finest}, got {list(value)}")
        return value

    def per_level(self, name: Literal["codebook_size", "code_dim", "commitment"]) -> tuple[Any, ...]:
        """The setting ``name`` as one value per level, coarse to fine."""
        value = getattr(self, name)
        values = value if isinstance(value, tuple) else (value,)
        return values if len(values) == len(self.strides) else values * len(self.strides)


class DiscriminatorSettings(Settings):
    """The codec's adversary in training (`vqgen.discriminator`); it is no part of the codec that is saved."""

    weight: float = Field(0.1, gt=0)
    """Gradient norm of the adversary's loss at the decoder's last layer, as a share of the reconstruction's."""
    start: float = Field(0.3, ge=0, lt=1)
    """Share of the training before which there is no adversary."""
    width: int = Field(32, ge=1)
    """Channels of its first layer; each further one has twice as many, up to eight times."""
    layers: int = Field(2, ge=1)
    """Halvings of the image: it judges patches of 12, 26 or 54 pixels with 1, 2 or 3."""


class CodecSection(CodecConfig):
    """The group ``codec``: the architecture and how it is trained."""

    discriminator: DiscriminatorSettings | None = None
    """An adversary that judges reconstructions; none by default."""
    training: TrainingSettings

    @property
    def players(self) -> tuple[str, ...]:
        """Who is trained, in the order of their turns."""
        return ("model",) if self.discriminator is None else ("model", "discriminator")

    @field_validator("training")
    @classmethod
    def _fits_its_players(cls, training: TrainingSettings, info: ValidationInfo) -> TrainingSettings:
        without = info.data.get("discriminator", ...) is None  # it is not in the data where it is wrong itself
        known = ("model",) if without else ("model", "discriminator")
        details = [
            InitErrorDetails(type=PydanticCustomError("unknown_player", hint), loc=("players", name), input={})
            for name, hint in _unknown_players(training.players, known).items()
        ]
        if not without and training.accumulate > 1:
            one = PydanticCustomError("accumulate", "must be 1 with a discriminator; use a larger batch_size")
            details.append(InitErrorDetails(type=one, loc=("accumulate",), input=training.accumulate))
        if details:
            raise ValidationError.from_exception_data(cls.__name__, details)
        return training

    @property
    def architecture(self) -> CodecConfig:
        """The architecture alone, as it is kept with the weights."""
        return CodecConfig(**self.model_dump(exclude={"discriminator", "training"}))


class RunSection(Settings):
    """The group ``run``: what ``vqgen run`` does."""

    priors: tuple[PriorChoice, ...] = ("pixelcnn", "transformer")
    """Priors to train: a name for every level, or a mapping from level to name."""
    samples: int = Field(64, ge=1)
    """Images in the sample grid."""


class Config(Settings):
    """All settings of a run."""

    seed: int = Field(0, ge=0, lt=2**63)
    data: DataSettings = DataSettings()
    codec: CodecSection
    priors: dict[str, dict[str, Any]] = {}
    run: RunSection = RunSection()


def player_problems(training: Mapping[str, Any], players: Sequence[str], where: str = "training") -> list[str]:
    """What in the training settings ``training`` does not fit a model with ``players``, one line each."""
    own = training.get("players")
    unknown = _unknown_players(own, players) if isinstance(own, Mapping) else {}
    problems = [f"{where}.players.{name}: {hint}" for name, hint in unknown.items()]
    accumulate = training.get("accumulate", 1)
    if len(players) > 1 and isinstance(accumulate, int) and accumulate > 1:
        named = f"the players {' and '.join(players)}"
        cure = "use a larger batch_size"
        problems.append(f"{where}.accumulate: must be 1 for a model with {named}, got {accumulate}; {cure}")
    return problems


def _unknown_players(given: Mapping[str, Any], players: Sequence[str]) -> dict[str, str]:
    known = f"Known: {', '.join(players)}." if players else "This model has none."
    return {
        name: f"unknown player. {did_you_mean(str(name), players) or known}" for name in given if name not in players
    }


def _holds_boolean(value: Any) -> bool:
    return isinstance(value, bool) or (isinstance(value, (list, tuple)) and any(map(_holds_boolean, value)))
