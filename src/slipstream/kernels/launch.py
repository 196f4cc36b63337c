"""What every Triton launch of this room needs to know of its device."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

PROGRAMMATIC_LAUNCH = True
"""Let a kernel of ours be scheduled while the one before it drains (programmatic dependent launch, sm_90 and later).

Every kernel waits for the one before it (``gdc_wait``) before it reads an activation or writes anything, so this moves
launch latency and loads of weights, never a result. Benchmarks switch it off to measure what it buys.
"""


@functools.cache
def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors of the device; a small number for the interpreter, so that tests split work too."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _supports_programmatic_launch(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def launch_options(x: Tensor, num_warps: int, num_stages: int = 2) -> dict[str, int | bool]:
    """Keyword arguments of a kernel launch on the device of ``x``, its ``PDL`` flag among them."""
    options: dict[str, int | bool] = {"num_warps": num_warps, "num_stages": num_stages, "PDL": False}
    if PROGRAMMATIC_LAUNCH and _supports_programmatic_launch(x.device):
        options.update(PDL=True, launch_pdl=True)
    return options


def block_size(n: int, smallest: int = 1) -> int:
    """The power of two that a Triton block over ``n`` elements needs, at least ``smallest``."""
    return max(smallest, 1 << max(0, n - 1).bit_length())
