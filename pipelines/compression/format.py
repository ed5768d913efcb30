"""The file of compressed images: a header that says what is needed to read it, the bits, and checksums.

::

    magic (4 bytes), format (1), length of the header (2), CRC-32 of the header (4)
    header     JSON, deflated with the preset dictionary `_WORDS`
    payload    32-bit words of the entropy coder
    checksum of all codes and labels (8), checksum of everything before it (8)

Numbers are little-endian; the checksums are BLAKE2b. Nothing in a header is trusted before both checksums of the file
hold, nothing is allocated by its counts, and nothing that it names is imported or made a path unchecked.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vqgen.codes import ImageSpec, LevelSpec, level_names
from vqgen.errors import InputError

MAGIC = b"\x93VQG"
FORMAT = 1
PRECISION: Literal[24] = 24
"""Probabilities are whole numbers of 2^-24, as the coder has them."""
PRINT = 32
"""Hexadecimal digits that are kept of a fingerprint: 128 bits."""
MOST_AT_ONCE = 1024
"""Largest batch: a stepper keeps caches for each of its images."""

_HEAD = struct.Struct("<4sBHI")
_DIGEST = 8
_MOST_JSON = 2**16
_WORDS = (
    b'{"codec":"","priors":[{"name":"uniform","fingerprint":""},{"name":"unigram","fingerprint":""},'
    b'{"name":"pixelcnn","fingerprint":""},{"name":"pixelsnail","fingerprint":""},'
    b'{"name":"transformer","fingerprint":""}],'
    b'"levels":[["top",4,4,128],["middle",8,8,512],["top",4,4,512],["bottom",8,8,512]],'
    b'"image":[1,28,28],"image":[3,32,32],"images":1000,"batch":64,"precision":24,"classes":0,"labels":"none",'
    b'"classes":10,"labels":"stored","made_with":"torch 2.9.1+cpu, x86_64 AVX512"}'
)
"""What headers have in common, so that a short file is not mostly header. A part of the format: never changed."""

MEND = "Copy it again, or make it anew with `vqgen compress`."

Whole = Annotated[int, Field(ge=1, le=2**31)]
Print = Annotated[str, Field(pattern=rf"^[0-9a-f]{{{PRINT}}}$")]
Words = npt.NDArray[np.uint32]


class NamedPrior(BaseModel):
    """The prior of one level."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    name: str = Field(max_length=100, pattern="^[a-z][a-z0-9_-]*$")
    """As `priors.registry` takes it: nothing that a terminal would obey."""
    fingerprint: Print


class Header(BaseModel):
    """What a file holds, and what it takes to read it."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    codec: Print
    """Fingerprint of the codec."""
    priors: tuple[NamedPrior, ...]
    """Of each level, coarse to fine."""
    levels: tuple[tuple[str, Whole, Whole, Whole], ...]
    """Name, rows, columns and codebook size of each level."""
    image: tuple[Annotated[int, Field(ge=1, le=4)], Whole, Whole]
    """Channels, height and width."""
    images: int = Field(ge=0, le=2**31)
    batch: int = Field(ge=1, le=MOST_AT_ONCE)
    """Images that the stepper walked at once, the last batch filled up."""
    precision: Literal[24] = PRECISION
    classes: int = Field(ge=0, le=2**24 - 1)
    """Number of classes of which one is stored for each image; 0 where the priors were given no label."""
    labels: Literal["stored", "none", "chosen"]
    """Whose these are: the images' own, nobody's, or those under which the codes took the fewest bits."""
    made_with: str = Field(max_length=200, pattern="^[ -~]*$")
    """The torch and the processor that wrote it; a note for people."""

    @model_validator(mode="after")
    def _whole(self) -> Header:
        if not 1 <= len(self.levels) <= 3 or len(self.priors) != len(self.levels):
            raise ValueError("one to three levels with a prior each")
        if tuple(level[0] for level in self.levels) != level_names(len(self.levels)):
            raise ValueError("levels are named top, middle, bottom")
        if (self.labels == "none") != (self.classes == 0):
            raise ValueError("labels without classes, or classes without labels")
        return self

    def fits(self, levels: tuple[LevelSpec, ...], image: ImageSpec) -> bool:
        """Whether these are the shapes of a codec."""
        return self.levels == level_shapes(levels) and self.image == (image.channels, image.height, image.width)


def level_shapes(levels: tuple[LevelSpec, ...]) -> tuple[tuple[str, int, int, int], ...]:
    """Levels as a header has them."""
    return tuple((level.name, level.height, level.width, level.codebook_size) for level in levels)


class Content(NamedTuple):
    """A file, taken apart."""

    header: Header
    words: Words
    """(W,) uint32, what the entropy coder wrote."""
    digest: bytes
    """Checksum of all codes and labels."""


def pack(content: Content) -> bytes:
    """The bytes of a file."""
    text = content.header.model_dump_json().encode()
    deflater = zlib.compressobj(9, zlib.DEFLATED, -15, zdict=_WORDS)
    header = deflater.compress(text) + deflater.flush()
    body = b"".join(
        [
            _HEAD.pack(MAGIC, FORMAT, len(header), zlib.crc32(header)),
            header,
            content.words.astype("<u4").tobytes(),
            content.digest,
        ]
    )
    return body + _checksum(body)


def payload_bytes(content: bytes) -> int:
    """How many of a file's bytes the entropy coder wrote."""
    _, _, length, _ = _HEAD.unpack_from(content)
    return len(content) - _HEAD.size - int(length) - 2 * _DIGEST


def read(path: Path) -> Content:
    """A file, taken apart and checked: its checksums, and that its header makes sense.

    Raises:
        InputError: there is no such file, it cannot be read, it is not one of these, a newer vqgen wrote it, or it
            is damaged.
    """
    try:
        if not path.is_file():
            raise InputError(f"{path} is a folder." if path.is_dir() else f"There is no file '{path}'.", "Name a file.")
        with path.open("rb") as file:
            head = file.read(_HEAD.size)
            if head[: len(MAGIC)] != MAGIC:
                raise InputError(f"{path} is not a file that vqgen compressed.", "Make one with `vqgen compress`.")
            content = head + file.read()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}).", "Name a file that can be.") from error
    return unpack(content, str(path))


def unpack(content: bytes, name: str) -> Content:
    """The parts of a file's bytes; raises as `read`."""
    if len(content) < _HEAD.size + 2 * _DIGEST:
        raise _damaged(name, "it is cut short")
    magic, version, length, crc = _HEAD.unpack_from(content)
    if magic != MAGIC:
        raise InputError(f"{name} is not a file that vqgen compressed.", "Make one with `vqgen compress`.")
    if version > FORMAT and _checksum(content[:-_DIGEST]) == content[-_DIGEST:]:
        raise InputError(f"{name} has format {version}; this vqgen reads {FORMAT}.", "Upgrade vqgen.")
    header = content[_HEAD.size : _HEAD.size + length]
    if zlib.crc32(header) != crc:
        raise _damaged(name, "the checksum of its header does not hold")
    if _checksum(content[:-_DIGEST]) != content[-_DIGEST:]:
        raise _damaged(name, "its checksum does not hold: it is cut short, or bytes of it were changed or added")
    payload = content[_HEAD.size + length : -2 * _DIGEST]
    if version != FORMAT or len(content) < _HEAD.size + length + 2 * _DIGEST or len(payload) % 4:
        raise _damaged(name, "its parts do not fit together")
    known = _header(header, name)
    if known.images > 8 * len(payload):  # each image has at least the bit of its own checksum
        raise _damaged(name, f"{len(payload)} bytes cannot hold {known.images:,} images")
    words = np.frombuffer(payload, dtype="<u4").astype(np.uint32)
    return Content(known, words, content[-2 * _DIGEST : -_DIGEST])


def _header(deflated: bytes, name: str) -> Header:
    try:
        inflater = zlib.decompressobj(-15, zdict=_WORDS)
        text = inflater.decompress(deflated, _MOST_JSON)
        if not inflater.eof or inflater.unused_data:
            raise ValueError("of a strange length")
        return Header.model_validate_json(text)
    except ValidationError as error:
        wrong = sorted({".".join(map(str, detail["loc"][:1])) or "the whole" for detail in error.errors()})
        raise _damaged(name, f"bad or missing in its header: {', '.join(wrong)[:200]}") from error
    except (zlib.error, ValueError) as error:
        raise _damaged(name, f"its header is {error}") from error


def _damaged(name: str, why: str) -> InputError:
    return InputError(f"{name} is damaged: {why}.", MEND)


def _checksum(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_DIGEST).digest()


class Checks:
    """A running checksum of images: each one's covers all before it, so that no mistake stays hidden for long.

    One bit of it is stored for each image and all 64 of the last: more would cost more than the priors save on small
    images.
    """

    def __init__(self) -> None:
        self.digest = bytes(_DIGEST)

    def add(self, *parts: npt.NDArray[Any]) -> int:
        """Take up the label and codes of one image; returns its bit."""
        bits = b"".join(np.ascontiguousarray(part, dtype="<i4").tobytes() for part in parts)
        self.digest = hashlib.blake2b(self.digest + bits, digest_size=_DIGEST).digest()
        return self.digest[0] & 1
