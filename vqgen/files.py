"""Files that get to disk whole or not at all.

They are written under a temporary name beside their own and renamed, so that what is there is complete, however
a process ends. Errors of the disk that a person can put right become one line.
"""

from __future__ import annotations

import errno
import glob
import json
import math
import os
import platform
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vqgen.errors import InputError, VqgenError
from vqgen.parsing import load_json

GONE = (errno.ENOENT, errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENOTCONN, errno.EHOSTDOWN)
"""Errors of a disk or a folder that was there and no longer is."""

_in_use: set[Path] = set()
"""Temporary names that this process writes to now; others that bear its number are of an earlier process.

In a container that was started anew, numbers begin anew, and so a process often has that of the one before it.
"""


def write_text(path: Path, text: str) -> None:
    """Write ``text`` (UTF-8) so that ``path`` is whole or unchanged; makes the folders above it.

    Raises:
        InputError: the disk is full, or the path cannot be written.
    """
    _clear_beside(path)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
        settle(temporary)


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content``, like `write_text`."""
    _clear_beside(path)
    with replacing(path) as temporary:
        temporary.write_bytes(content)
        settle(temporary)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON, like `write_text`; a number that is not finite becomes null."""
    write_text(path, json.dumps(finite(value), indent=2) + "\n")


def csv_text(text: str) -> str:
    """``text`` as a cell of a CSV file: an apostrophe stands before what a spreadsheet would run as a formula.

    Numbers keep their sign.
    """
    try:
        float(text)
    except ValueError:
        return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text
    return text


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        InputError: the file is missing, unreadable or damaged.
    """
    if not path.is_file():
        raise InputError(f"{path} is missing.")
    try:
        return load_json(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is damaged ({error}).", "Restore it, or make it again.") from error


def finite(value: Any) -> Any:
    """``value`` with every number that is not finite replaced by None: JSON has no such numbers."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def settle(path: Path) -> None:
    """Wait until what was written to a file is on the disk: what is then renamed is whole, even if the power fails."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path`` for a file that takes the place of ``path`` if the block ends without an error.

    Raises:
        InputError: the disk is full, or the path cannot be written.
    """
    with disk_errors(path), _temporary(path) as temporary:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside ``path``, which takes the place of ``path`` if the block ends without an error.

    Raises:
        InputError: the disk is full, or the folder cannot be written.
    """
    with disk_errors(path), _temporary(path) as temporary:
        _clear_beside(path)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            yield temporary
            replace_folder(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def replace_folder(source: Path, target: Path) -> None:
    """Rename ``source`` to ``target``; what was there is removed afterwards."""
    old = _beside(target, "old")
    try:
        if target.exists():
            target.rename(old)
        source.rename(target)
    except BaseException:  # a signal too
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Remove a folder, if it is there: the whole of it or, where the process is killed first, nothing.

    What is being removed has a name by which `clear_remains` goes on removing it.

    Raises:
        InputError: it cannot be renamed.
    """
    if path.is_symlink() or not path.is_dir():
        return
    with disk_errors(path), _temporary(path) as doomed:
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def clear_remains(folder: Path) -> None:
    """Put right, in ``folder`` and below, what processes left that were killed as they wrote.

    What had been moved aside for a replacement that never came is put back; what was half-written is removed. Only
    what this machine's ended processes left is touched.
    """
    for left in sorted(folder.rglob(".*-*.old")) + sorted(folder.rglob(".*-*.tmp")):
        _put_right(left)


def _clear_beside(path: Path) -> None:
    """`clear_remains` of ``path`` alone."""
    for kind in ("old", "tmp"):
        for left in path.parent.glob(f".{glob.escape(path.name)}.*-*.{kind}"):
            _put_right(left)


def _put_right(left: Path) -> None:
    parts = re.fullmatch(r"\.(?P<name>.+)\.(?P<host>[A-Za-z0-9_]*)-(?P<pid>[0-9]{1,9})\.(?P<kind>old|tmp)", left.name)
    if parts is None or parts["name"] in (".", "..") or parts["host"] != _host() or _works(int(parts["pid"]), left):
        return
    target = left.with_name(parts["name"])
    with suppress(OSError):  # what cannot be removed does no harm
        if parts["kind"] == "old" and not target.exists():
            left.rename(target)
        elif left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def _works(pid: int, left: Path) -> bool:
    """Whether a process of that number is at work on ``left``."""
    return left.absolute() in _in_use if pid == os.getpid() else is_alive(pid)


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path``, which is this process's as long as the block lasts."""
    temporary = _beside(path, "tmp")
    _in_use.add(temporary.absolute())
    try:
        yield temporary
    finally:
        _in_use.discard(temporary.absolute())


def _beside(path: Path, kind: str) -> Path:
    """A name of this process's own beside ``path``, hidden."""
    return path.with_name(f".{path.name}.{_host()}-{os.getpid()}.{kind}")


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9]+", "_", platform.node())[:32]


def is_alive(pid: int) -> bool:
    """Whether this machine has a process of that number; where that cannot be asked, it is taken to be so."""
    if os.name == "nt":  # there, asking would send it an interrupt
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True


def require_writable(path: Path) -> None:
    """Refuse a path that could not be written, before the work is done whose result it is to take.

    Raises:
        InputError: it lies below a file, its name is too long, or there is no permission.
    """
    with disk_errors(path):
        above = next((place for place in path.parents if place.exists()), Path())
        path.exists()  # a name that is too long is an error here
    if not above.is_dir():
        raise InputError(f"{path} cannot be written: {above} is a file.", "Choose another folder.")
    if not os.access(above, os.W_OK | os.X_OK):
        raise InputError(f"{path} cannot be written (no permission in {above}).", "Choose another folder.")


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the errors of a full disk and of forbidden paths into one line that names ``path``."""
    try:
        yield
    except VqgenError:
        raise
    except Exception as error:
        code = error.errno if isinstance(error, OSError) else None
        # safetensors reports errors of the disk as its own kind, with the system's number in the text.
        number = re.search(r"os error (\d+)", str(error))
        code = int(number[1]) if code is None and number else code
        if code in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(f"The disk is full: {path} was not written.", "Free some space and go on.") from error
        if code == errno.EFBIG:
            raise InputError(
                f"{path} was not written: it is larger than a file may be here.",
                "See the limits of this user (ulimit -f) and of the disk, or choose another folder.",
            ) from error
        if code in (errno.EACCES, errno.EPERM, errno.EROFS):
            named = getattr(error, "filename", None) or path
            raise InputError(f"{named} cannot be written (no permission).", "Choose another folder.") from error
        if code in (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG):
            raise InputError(f"{path} cannot be written ({error}).", "Choose another folder.") from error
        if code in GONE:
            raise InputError(
                f"{path} was not written ({error}).", "See whether the disk and the folder are still there, and go on."
            ) from error
        raise
