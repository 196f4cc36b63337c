"""Host integers that travel to a device together, in one copy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


class Packet:
    """Collects integers and sends them as one int64 tensor; :meth:`add` says where each part will be."""

    def __init__(self) -> None:
        self._parts: list[np.ndarray] = []
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def add(self, values: Sequence[int] | np.ndarray) -> slice:
        """Append a part. Returns its place in the tensor of :meth:`send`."""
        part = np.asarray(values, dtype=np.int64).ravel()
        self._parts.append(part)
        place = slice(self._size, self._size + part.size)
        self._size += part.size
        return place

    def send(self, device: torch.device) -> torch.Tensor:
        """[size] int64 on the device. Never blocks the host: a CUDA device reads it from pinned memory, in time.

        The pinned memory comes from torch's caching host allocator, which does not use it again before it was read.
        """
        if device.type != "cuda":
            return torch.from_numpy(np.concatenate(self._parts) if self._parts else np.zeros(0, np.int64)).to(device)
        pinned = torch.empty(self._size, dtype=torch.int64, pin_memory=True)
        if self._parts:
            np.concatenate(self._parts, out=pinned.numpy())
        return pinned.to(device, non_blocking=True)
