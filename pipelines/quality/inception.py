"""Inception v3 with the weights of published Frechet distances (Szegedy et al. 2016; Heusel et al. 2017).

The network is torch-fidelity's, which reproduces that of the first paper; the weights are a file of 91 MB that is
fetched once. The file holds tensors alone and is read as such.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import nn

from vqgen.console import Console
from vqgen.errors import InputError

ADDRESS = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
NAME = ADDRESS.rpartition("/")[2]
STARTS = "6726825d"
"""First digits of the file's SHA-256, which its publisher put into its name."""
WIDTH = 2048
"""Features of its last layer but one, averaged over the picture."""
ELSE = "Or take the extractor 'classifier' or 'codec', which need nothing."


def open_inception(console: Console) -> tuple[nn.Module, str]:
    """The network, uint8 (B, 3, H, W) of any size to a tuple with (B, 2048) float32, and the SHA-256 of its weights.

    Raises:
        InputError: torch-fidelity is not installed, or the weights cannot be had.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise InputError(
            "The extractor 'inception' needs torch-fidelity, which is not installed.",
            f"Install it with: pip install torch-fidelity. {ELSE}",
        ) from error
    path = weights_path(console)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if not digest.startswith(STARTS):
        raise InputError(f"{path} is damaged: its SHA-256 does not start with {STARTS}.", "Remove it, and try again.")
    network: nn.Module = FeatureExtractorInceptionV3(
        "inception-v3-compat", [str(WIDTH)], feature_extractor_weights_path=str(path)
    )
    return network.eval(), digest


def weights_path(console: Console) -> Path:
    """The file of the weights, in torch's own cache; fetched where it is not there.

    Raises:
        InputError: it is not there and cannot be fetched.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / NAME
    if path.is_file():
        return path
    console.say(f"The weights of Inception (91 MB) are fetched to {path}.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(ADDRESS, str(path), hash_prefix=STARTS, progress=False)
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"The weights of Inception cannot be fetched from {ADDRESS} ({reason}).",
            f"Fetch that file where there is a network and put it at {path}. {ELSE}",
        ) from error
    return path
