"""Without a GPU the Triton kernels run in Triton's interpreter; with one, the very same tests run them compiled."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
sys.path.append(str(HERE))  # pytest's importlib mode leaves the folders of tests off the path

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

if DEVICE.type == "cpu":
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise pytest.UsageError("triton was imported before TRITON_INTERPRET=1 was set; set it in the environment")
    os.environ["TRITON_INTERPRET"] = "1"
    from triton_interpreter import repair

    repair()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On a GPU every test of this room is a GPU test; without one, those that need it are deselected."""
    ours = [item for item in items if HERE in item.path.parents]
    if DEVICE.type == "cuda":
        for item in ours:
            item.add_marker("gpu")
        return
    needs_gpu = [item for item in ours if item.get_closest_marker("gpu")]
    if needs_gpu:
        config.hook.pytest_deselected(items=needs_gpu)
        items[:] = [item for item in items if item not in needs_gpu]


@pytest.fixture
def device() -> torch.device:
    return DEVICE


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Every ``torch.empty`` is full of NaN, or of the largest integer: what a kernel forgets to write is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
