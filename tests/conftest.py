"""What every test needs: no network, one thread, and no accelerator state left from the test before."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_plugin_outlives_its_test() -> Iterator[None]:
    from priors import registry

    before = dict(registry._registered)
    yield
    registry._registered.clear()
    registry._registered.update(before)
    for module in [name for name in sys.modules if name.startswith("vqgen_plugin_")]:
        del sys.modules[module]


@pytest.fixture(autouse=True)
def _fresh_accelerator_state() -> Iterator[None]:
    yield
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
