"""The file: what is put in comes out, and nothing that was changed, cut or made up is believed."""

from __future__ import annotations

import json
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.compression import format as file_format
from pipelines.compression.format import Content, Header, NamedPrior, pack, payload_bytes, read, unpack
from vqgen.errors import InputError

PRINTS = ("0123456789abcdef" * 2, "f" * 32, "0" * 32)


def header(**changes: Any) -> Header:
    values: dict[str, Any] = {
        "codec": PRINTS[0],
        "priors": (
            NamedPrior(name="transformer", fingerprint=PRINTS[1]),
            NamedPrior(name="pixelcnn", fingerprint=PRINTS[2]),
        ),
        "levels": (("top", 4, 4, 128), ("bottom", 8, 8, 128)),
        "image": (1, 28, 28),
        "images": 100,
        "batch": 64,
        "classes": 10,
        "labels": "stored",
        "made_with": "torch 2.9.1, x86_64 AVX2",
    }
    return Header(**{**values, **changes})


def content(words: int = 500, **changes: Any) -> Content:
    payload = np.random.default_rng(0).integers(0, 2**32, words, dtype=np.uint32)
    return Content(header(**changes), payload, b"checksum")


def with_header(text: bytes, *, words: int = 500, deflated: bytes | None = None) -> bytes:
    """A file whose header is ``text`` and whose checksums hold, as only somebody who means harm would make it."""
    deflater = zlib.compressobj(9, zlib.DEFLATED, -15, zdict=file_format._WORDS)
    packed = deflater.compress(text) + deflater.flush() if deflated is None else deflated
    head = file_format._HEAD.pack(file_format.MAGIC, file_format.FORMAT, len(packed), zlib.crc32(packed))
    body = head + packed + bytes(4 * words) + b"checksum"
    return body + file_format._checksum(body)


@pytest.mark.parametrize("words", [0, 1, 500])
def test_what_is_packed_is_unpacked(words: int) -> None:
    made = content(words, images=0 if words == 0 else 4)
    packed = pack(made)
    found = unpack(packed, "it")
    assert found.header == made.header
    assert np.array_equal(found.words, made.words)
    assert found.words.dtype == np.uint32
    assert found.digest == b"checksum"
    assert payload_bytes(packed) == 4 * words


def test_a_header_is_short() -> None:
    assert len(pack(content(0, images=0))) < 150


def test_every_flipped_bit_is_noticed() -> None:
    packed = pack(content(40, images=5))
    for place in range(len(packed)):
        for bit in (0, 3, 7):
            damaged = bytearray(packed)
            damaged[place] ^= 1 << bit
            with pytest.raises(InputError, match=r"damaged|is not a file that vqgen compressed"):
                unpack(bytes(damaged), "it")


def test_every_cut_and_every_addition_is_noticed() -> None:
    packed = pack(content(40, images=5))
    for length in range(len(packed)):
        with pytest.raises(InputError, match="damaged"):
            unpack(packed[:length], "it")
    for more in (b"\0", b"\0" * 4, packed):
        with pytest.raises(InputError, match="damaged"):
            unpack(packed + more, "it")


def test_noise_is_noticed() -> None:
    generator = np.random.default_rng(7)
    packed = pack(content(40, images=5))
    for _ in range(300):
        start = int(generator.integers(0, 12))
        noise = packed[:start] + generator.bytes(int(generator.integers(0, 200)))
        with pytest.raises(InputError):
            unpack(noise, "it")


def test_a_newer_format_asks_for_a_newer_vqgen() -> None:
    packed = bytearray(pack(content(3, images=1))[:-8])
    packed[4] = 2
    with pytest.raises(InputError, match="format 2; this vqgen reads 1"):
        unpack(bytes(packed) + file_format._checksum(bytes(packed)), "it")


BASE = json.loads(header().model_dump_json())

HOSTILE: dict[str, Any] = {
    "a huge number of images": {"images": 2**31},
    "more images than the payload can hold": {"images": 16_001},
    "a number of images beyond all": {"images": 10**30},
    "fewer images than none": {"images": -1},
    "images that are a text": {"images": "100"},
    "images that are a fraction": {"images": 1.5},
    "images that are true": {"images": True},
    "a huge batch": {"batch": 2**31},
    "a batch of none": {"batch": 0},
    "another precision": {"precision": 23},
    "a huge level": {"levels": [["top", 2**40, 4, 128], ["bottom", 8, 8, 128]]},
    "an empty level": {"levels": [["top", 0, 4, 128], ["bottom", 8, 8, 128]]},
    "a level too few": {"levels": [["top", 4, 4, 128]]},
    "a level too many": {"levels": [["top", 4, 4, 128]] * 9, "priors": BASE["priors"][:1] * 9},
    "no level": {"levels": [], "priors": []},
    "levels by other names": {"levels": [["../top", 4, 4, 128], ["bottom", 8, 8, 128]]},
    "a print that is a path": {"codec": "../../../../../../../etc/passwd1"},
    "a print with a newline": {"codec": PRINTS[0] + "\n"},
    "a prior without a name": {"priors": [{"name": "", "fingerprint": PRINTS[1]}, BASE["priors"][1]]},
    "a prior whose name a terminal obeys": {
        "priors": [{"name": "a\x1b[2J", "fingerprint": PRINTS[1]}, BASE["priors"][1]]
    },
    "a prior that is a path": {"priors": [{"name": "../a", "fingerprint": PRINTS[1]}, BASE["priors"][1]]},
    "a note that a terminal obeys": {"made_with": "torch\x1b]0;mine\x07"},
    "a note of two lines": {"made_with": "torch\nError"},
    "a prior that is a list": {"priors": [[], BASE["priors"][1]]},
    "classes below none": {"classes": -3},
    "classes beyond the coder": {"classes": 2**24},
    "labels without classes": {"classes": 0},
    "classes without labels": {"labels": "none"},
    "labels of another kind": {"labels": "guessed"},
    "an image of nine channels": {"image": [9, 28, 28]},
    "a note that is a book": {"made_with": "x" * 5000},
    "a key that nobody knows": {"pickle": "gASVAAAA"},
}


@pytest.mark.parametrize("changes", HOSTILE.values(), ids=list(HOSTILE))
def test_a_made_up_header_is_refused(changes: dict[str, Any]) -> None:
    made = with_header(json.dumps({**BASE, **changes}).encode())
    with pytest.raises(InputError, match=r"^it is damaged: .*\. Copy it again") as error:
        unpack(made, "it")
    assert len(str(error.value)) < 500
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", [b"", b"[]", b"null", b"{", b"[" * 60_000, b"\xff\xfe", b"1", b'{"codec": NaN}'])
def test_a_header_that_is_no_header_is_refused(text: bytes) -> None:
    with pytest.raises(InputError, match="damaged"):
        unpack(with_header(text), "it")


def test_a_header_that_would_fill_the_memory_is_refused_before_it_does() -> None:
    deflater = zlib.compressobj(9, zlib.DEFLATED, -15, zdict=file_format._WORDS)
    bomb = b"".join(deflater.compress(bytes(2**20)) for _ in range(48)) + deflater.flush()
    assert len(bomb) < 2**16
    made = with_header(b"", deflated=bomb)
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match="damaged"):
            unpack(made, "it")
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_random_changes_of_a_header_are_never_anything_but_a_clear_error_or_a_header() -> None:
    generator = np.random.default_rng(11)
    text = header().model_dump_json().encode()
    for _ in range(400):
        changed = bytearray(text)
        for place in generator.integers(0, len(text), int(generator.integers(1, 6))):
            changed[place] = int(generator.integers(32, 127))
        try:
            unpack(with_header(bytes(changed)), "it")
        except InputError:
            continue


def test_files_that_are_not_there_or_something_else(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="There is no file"):
        read(tmp_path / "nothing")
    with pytest.raises(InputError, match="is a folder"):
        read(tmp_path)
    with pytest.raises(InputError, match=r"cannot be read .*too long"):
        read(tmp_path / ("x" * 300))
    other = tmp_path / "picture.png"
    other.write_bytes(b"\x89PNG" + bytes(100))
    with pytest.raises(InputError, match="not a file that vqgen compressed"):
        read(other)
    other.write_bytes(b"")
    with pytest.raises(InputError, match="not a file that vqgen compressed"):
        read(other)


def test_a_file_that_may_not_be_read_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "file").write_bytes(pack(content()))
    monkeypatch.setattr(Path, "open", forbidden)
    with pytest.raises(InputError, match=r"file cannot be read \(Permission denied\)"):
        read(tmp_path / "file")
