"""Where the work ahead of a step runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from slipstream.overlap import InlineLane, Lane, StreamLane, ThreadLane


def make_lane(kind: str, device: torch.device, priority: int = 0) -> Lane:
    """priority: of a stream; the step's own has -1, lower numbers go first. ``ValueError`` for a lane that the device
    does not have."""
    on_cuda = device.type == "cuda"
    if kind == "auto":
        kind = "stream" if on_cuda else "inline"
    if kind == "stream" and not on_cuda:
        raise ValueError(f"lane='stream' needs an NVIDIA GPU; this engine runs on {device}: use 'inline' or 'thread'")
    if kind == "thread" and on_cuda:
        raise ValueError("lane='thread' cannot be part of a captured step: use 'stream' on a GPU")
    if kind == "stream":
        return StreamLane(device, priority)
    return ThreadLane("asyncspade") if kind == "thread" else InlineLane()


def inferring(work: Callable[..., Any], *args: Any) -> Any:
    """``work`` without gradients, which is each thread's own setting."""
    with torch.inference_mode():
        return work(*args)
