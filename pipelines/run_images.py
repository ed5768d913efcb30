"""The images of a run: those its codes were made from, and whether another source is the same ones."""

from __future__ import annotations

from pipelines.settings import run_settings
from vqgen.code_store import CodeStore
from vqgen.console import Console
from vqgen.data import ImageData, load_data
from vqgen.errors import MismatchError, VqgenError
from vqgen.run_folder import RunFolder


def run_images(run: RunFolder, store: CodeStore, console: Console, source: str | None = None) -> ImageData:
    """The images that the codes of a run were made from; ``source`` is where they are now, if they were moved.

    Raises:
        MismatchError: the data are other images.
    """
    config = run_settings(run, source=source)
    data = load_data(config.data, config.seed, notify=console.say)
    if data.fingerprint != store.info.data_fingerprint or len(data.splits["test"]) != store.info.splits["test"]:
        raise MismatchError(
            f"The images of '{config.data.source}' are not the ones the codes of {run.path} were made from.",
            f"Say where those are with --data, or redo the run with `{run.command('train-codes --overwrite')}`.",
        )
    return data


def own_images(run: RunFolder, source: str, console: Console) -> ImageData | None:
    """The images that a run was made from where ``source`` is them, moved or not; None where it is something else.

    None too where it cannot be opened as they were: what is wrong is said when it is opened as a source of its own.
    """
    config = run_settings(run, source=source)
    try:
        data = load_data(config.data, config.seed)
        test_images = len(data.splits["test"])
    except VqgenError:
        return None
    encoded = (run.stage("codes") or {}).get("images") or {}  # the fingerprint is of training and validation images
    if data.fingerprint != run.read()["data"].get("fingerprint") or test_images != encoded.get("test", test_images):
        return None
    return load_data(config.data, config.seed, notify=console.say)
