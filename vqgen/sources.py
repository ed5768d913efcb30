"""Where pictures come from: folders, parquet and arrow files, saved data sets, numpy files, the hub, `shapes`.

`open_source` looks at names only and returns a `Rows` opener per split, so a split that is not asked for is never
read. Rows hand out pictures as they are stored; `vqgen.data` decides what size and channels they get.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from vqgen import shapes
from vqgen.config import DataSettings
from vqgen.errors import InputError, did_you_mean
from vqgen.parsing import load_json
from vqgen.rows import ArrayRows, Rows, ShapeRows, first_line
from vqgen.shards import ArrowShard
from vqgen.splits import SPLITS, canonical, in_path
from vqgen.streaming import hub_files, open_shards
from vqgen.table_rows import TableRows

_TABLES = {".parquet": "parquet", ".arrow": "arrow"}
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_TAR = ".tar"
_KINDS = "'shapes', a folder of images, .parquet, .arrow, .tar, .npy, .npz, a saved data set, or OWNER/NAME on the hub"

Source = dict[str, Callable[[], Rows]]
"""An opener for each of the three splits that the source has; always for ``train``."""


def open_source(settings: DataSettings) -> Source:
    """The splits of ``settings.source``.

    Raises:
        InputError: there is no such source, or nothing in it that can be used.
    """
    name = settings.source
    path = Path(os.path.expanduser(name))  # unlike Path.expanduser, leaves an unknown ~user as it is
    is_hub = name != "shapes" and not path.exists()
    if not is_hub and (settings.subset is not None or settings.revision is not None):
        raise InputError(
            f"data.subset and data.revision belong to a data set on the hub, but the source is '{name}'.",
            "Leave them out.",
        )
    if name == "shapes":
        _refuse_streaming(settings, "are drawn, not stored")
        return _shapes(settings)
    if not name.strip():
        raise InputError("data.source is empty.", f"It takes {_KINDS}.")
    if path.is_dir():
        return _folder(path, settings)
    if path.is_file():
        return _file(path, settings)
    suffix = path.suffix.lower()
    if not _HUB_NAME.fullmatch(name) or suffix in (".npy", ".npz", _TAR, *_TABLES, ".png", ".jpg", ".jpeg", ".zip"):
        raise InputError(f"No file or folder at '{name}'.", f"data.source takes {_KINDS}.")
    return _hub(name, settings)


def _shapes(settings: DataSettings) -> Source:
    size = settings.image_size or shapes.SIZE
    height_width = (size, size) if isinstance(size, int) else size
    counts = {"train": settings.count, "validation": settings.count // 10, "test": settings.count // 10}
    return {split: partial(ShapeRows, split, counts[split], height_width) for split in SPLITS}


def _folder(path: Path, settings: DataSettings) -> Source:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        _refuse_streaming(settings, "are a saved data set, which is read from its place as it is")
        return _saved(path, settings)
    files = sorted(file for file in path.rglob("*") if file.is_file() and not _hidden(file.relative_to(path)))
    for suffix, builder in _TABLES.items():
        if tables := [file for file in files if file.suffix.lower() == suffix]:
            return _tables(path, tables, builder, settings)
    if tars := [file for file in files if file.suffix.lower() == _TAR]:
        return _tars(path, tars, settings)
    known = Image.registered_extensions()
    if any(file.suffix.lower() in known for file in files):
        _refuse_streaming(settings, "are files of their own, each read when it is needed")
        return _image_folder(path, settings)
    if not files:
        raise InputError(f"The folder '{path}' is empty.", "Put images in it, or class folders of images.")
    raise InputError(
        f"No image in the folder '{path}' ({len(files)} other files, such as '{files[0].name}').",
        f"data.source takes {_KINDS}.",
    )


def _hidden(path: Path) -> bool:
    return any(part.startswith((".", "__")) for part in path.parts)


def _file(path: Path, settings: DataSettings) -> Source:
    suffix = path.suffix.lower()
    if suffix in _TABLES:
        return _tables(path.parent, [path], _TABLES[suffix], settings)
    if suffix == _TAR:
        return _tars(path.parent, [path], settings)
    if suffix in (".npy", ".npz"):
        _refuse_streaming(settings, "are one array; an .npy is read from its place as it is")
        if settings.image_column or settings.label_column:
            raise InputError(f"'{path}' has no columns to name.", "In an .npz they are 'images' and 'labels'.")
        return {"train": partial(ArrayRows, path)}
    hint = "Give its folder." if suffix in Image.registered_extensions() else f"data.source takes {_KINDS}."
    raise InputError(f"'{path}' is not a file that images can be read from.", hint)


def _tables(root: Path, files: list[Path], builder: str, settings: DataSettings) -> Source:
    by_split = _by_split(root, files)
    if settings.streaming:
        return _shards(by_split, builder, settings)

    def read(split: str) -> Any:
        import datasets

        with _readable(f"The {builder} files of '{root}'"):
            for file in by_split[split] if builder == "arrow" else ():
                ArrowShard(file).check()
            if settings.labels and len(by_split[split]) > 1:
                open_shards(by_split[split], builder, settings)  # `datasets` takes the classes of the first for all
            names = [glob.escape(file) for file in by_split[split]]
            return datasets.load_dataset(builder, data_files={split: names}, split=split)

    return {split: partial(_rows, partial(read, split), settings) for split in by_split}


def _tars(root: Path, files: list[Path], settings: DataSettings) -> Source:
    """Streamed always: nothing else reads them, and most commands have no option for it."""
    if settings.image_column or settings.label_column:
        raise InputError(f"'{files[0]}' has no columns to name.", "Leave out data.image_column and data.label_column.")
    return _shards(_by_split(root, files), "tar", settings)


def _by_split(root: Path, files: list[Path]) -> dict[str, list[str]]:
    """Files by the split that their paths name; all others are train."""
    by_split: dict[str, list[str]] = {}
    for file in files:
        split = in_path([*file.relative_to(root).parent.parts, file.stem]) if len(files) > 1 else None
        by_split.setdefault(split or "train", []).append(str(file))
    if "train" not in by_split:
        if len(by_split) > 1:
            raise InputError(
                f"'{root}' has files of {' and '.join(by_split)} but none of train.",
                "Name the training files 'train-*'.",
            )
        by_split = {"train": next(iter(by_split.values()))}
    return by_split


def _shards(by_split: dict[str, list[str]], kind: str, settings: DataSettings) -> Source:
    return {split: partial(open_shards, files, kind, settings) for split, files in by_split.items()}


def _refuse_streaming(settings: DataSettings, what: str) -> None:
    if settings.streaming:
        raise InputError(
            f"The images of '{settings.source}' {what}: there is nothing to stream.",
            "Leave out --streaming (data.streaming). It is for parquet, arrow and WebDataset shards, here or on a hub.",
        )


def _image_folder(path: Path, settings: DataSettings) -> Source:
    import datasets

    with _readable(f"The folder '{path}'"):
        found = datasets.load_dataset("imagefolder", data_dir=glob.escape(str(path)))
    return _of_splits({name: partial(found.__getitem__, name) for name in found}, str(path), settings)


def _saved(path: Path, settings: DataSettings) -> Source:
    import datasets

    def read(folder: Path) -> Any:
        with _readable(f"The saved data set '{folder}'"):
            saved = datasets.load_from_disk(str(folder))
            saved.data.validate(full=True)  # offsets in the files may be anybody's
            return saved

    folders = {"train": path}
    if (path / "dataset_dict.json").is_file():
        with _readable(f"The saved data set '{path}'"):
            listed = load_json(path / "dataset_dict.json")["splits"]
            if any(Path(name).name != name for name in listed):
                raise ValueError("a split is not named like a folder")
            folders = {name: path / name for name in listed}
    return _of_splits({name: partial(read, folder) for name, folder in folders.items()}, str(path), settings)


def _hub(name: str, settings: DataSettings) -> Source:
    import datasets
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    # Before datasets 4, a set could have a program that loads it, and the environment could allow that once for all.
    datasets.config.HF_DATASETS_TRUST_REMOTE_CODE = False
    near = did_you_mean(name, ["shapes"])
    if not constants.HF_HUB_OFFLINE:
        # One quick question first: unreachable, the library below tries again for half a minute.
        try:
            HfApi().dataset_info(name, revision=settings.revision, timeout=10)
        except HfHubHTTPError as error:
            raise InputError(
                f"'{name}' is no file or folder here, and the hub has no such data set for you ({first_line(error)}).",
                near or f"data.source takes {_KINDS}.",
            ) from error
        except Exception as error:  # whatever the HTTP library of the day raises when there is no network
            raise InputError(
                f"'{name}' is no file or folder here, and the hub cannot be reached ({first_line(error)}).",
                f"{near} Check the path or the network; for a data set fetched before, set HF_HUB_OFFLINE=1.".strip(),
            ) from error
    try:
        if settings.streaming:
            return _streamed_hub(name, settings)
        found = datasets.load_dataset(name, settings.subset, revision=settings.revision)
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"'{name}' is no file or folder here, and cannot be loaded from the hub ({first_line(error)}).",
            near or "Check data.source, data.subset and data.revision.",
        ) from error
    shown = [split for split in found if not (canonical(split) == "test" and _secret(found[split], settings))]
    return _of_splits({split: partial(found.__getitem__, split) for split in shown}, name, settings)


def _streamed_hub(name: str, settings: DataSettings) -> Source:
    opened = _shards(hub_files(name, settings), "parquet", settings)
    secret = [split for split in opened if canonical(split) == "test" and _hidden_labels(opened[split]())]
    return _canonical({split: read for split, read in opened.items() if split not in secret}, name)


def _secret(table: Any, settings: DataSettings) -> bool:
    return _hidden_labels(TableRows(table, settings)) if settings.labels else False


def _hidden_labels(rows: Rows) -> bool:
    """Whether every label is -1, as on the hub in test splits whose labels are kept from the public (ImageNet's).

    Such a split is no use for what is conditioned on labels: the test images are carved from train.
    """
    labels = rows.labels()
    return labels is not None and len(labels) > 0 and bool((labels == -1).all())


def _of_splits(found: dict[str, Callable[[], Any]], where: str, settings: DataSettings) -> Source:
    return {split: partial(_rows, read, settings) for split, read in _canonical(found, where).items()}


def _canonical(found: dict[str, Callable[[], Any]], where: str) -> dict[str, Callable[[], Any]]:
    """Openers by canonical name; a lone split of any name is train."""
    if len(found) == 1:
        named = {"train": next(iter(found.values()))}
    else:
        named = {}
        for name, read in found.items():
            if split := canonical(name):
                named.setdefault(split, read)
    if "train" not in named:
        raise InputError(f"'{where}' has no training split, only {', '.join(found)}.", "Name one of them 'train'.")
    return named


def _rows(read: Callable[[], Any], settings: DataSettings) -> Rows:
    return TableRows(read(), settings)


@contextmanager
def _readable(what: str) -> Iterator[None]:
    """Turn what the data libraries raise on damaged files into one line; no progress bars for local files."""
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # of files that anybody may have written
        raise InputError(
            f"{what} cannot be read ({first_line(error.__cause__ or error)}).", "Mend or remove it."
        ) from error
    finally:
        if shown:
            datasets.enable_progress_bars()
