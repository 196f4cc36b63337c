"""Makes ``steps`` importable and leaves out what this machine has no device or library for."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
sys.path.append(str(HERE))  # pytest's importlib mode leaves the folders of tests off the path


def _can_run(item: pytest.Item) -> bool:
    if item.get_closest_marker("gpu") is None:
        return True
    return torch.cuda.is_available() and ("flashinfer" not in item.path.name or find_spec("flashinfer") is not None)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [item for item in items if HERE in item.path.parents and not _can_run(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
