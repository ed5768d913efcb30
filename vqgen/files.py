"""Files that get to disk whole or not at all.

They are written under a temporary name beside their own and renamed, so that what is there is complete, however
a process ends. Errors of the disk that a person can put right become one line.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vqgen.errors import InputError


def write_text(path: Path, text: str) -> None:
    """Write ``text`` (UTF-8) so that ``path`` is whole or unchanged; makes the folders above it.

    Raises:
        InputError: the disk is full, or the path cannot be written.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content``, like `write_text`."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


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
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
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


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path`` for a file that takes the place of ``path`` if the block ends without an error.

    Raises:
        InputError: the disk is full, or the path cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk_errors(path):
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
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk_errors(path):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            yield temporary
            replace_folder(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def replace_folder(source: Path, target: Path) -> None:
    """Rename ``source`` to ``target``; what was there is removed afterwards."""
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    if target.exists():
        target.rename(old)
    try:
        source.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


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
    except Exception as error:
        code = error.errno if isinstance(error, OSError) else None
        # safetensors reports errors of the disk as its own kind, with the system's number in the text.
        number = re.search(r"os error (\d+)", str(error))
        code = int(number[1]) if code is None and number else code
        if code in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(f"The disk is full: {path} was not written.", "Free some space and go on.") from error
        if code in (errno.EACCES, errno.EPERM, errno.EROFS):
            named = getattr(error, "filename", None) or path
            raise InputError(f"{named} cannot be written (no permission).", "Choose another folder.") from error
        if code in (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG):
            raise InputError(f"{path} cannot be written ({error}).", "Choose another folder.") from error
        raise


@contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock file ``path``, which the system releases when the process ends, however it ends.

    Without ``wait``, a lock that another process holds is an `InputError`. Where the system or the file
    system has no such locks, nothing is held.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise InputError(
                f"Another process is working in {path.parent}.", "Wait for it to end, or give another --run."
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
        yield
