"""What ranks of one host tell each other inside a step: sums and joins, by gloo between CPUs, NCCL between GPUs."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import AllgatherOptions

from slipstream.models.parallel import Ranks

START_S = 1800.0  # most that the ranks wait for each other while they load
LOOPBACK = "127.0.0.1"
# Multicast of the interconnect stays off: a program that dies in it can take the host's GPUs along. What torch does
# when NCCL is late (end the process) is done by `scale.company` instead, with a word about why.
ENVIRONMENT = {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
    "NCCL_SOCKET_IFNAME": "lo",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
}


class Links:
    """Process groups of one rank. They meet at a file in ``folder`` when they first have something to tell.

    meet: called before that; a meeting itself cannot be broken off, so all should be there.
    """

    def __init__(self, index: int, count: int, folder: Path, device: torch.device, timeout_s: float) -> None:
        self._place, self._folder, self._device, self._timeout_s = (index, count), folder, device, timeout_s
        self.meet: Callable[[], object] = lambda: None
        self._store: dist.Store | None = None
        self._hosts: Any = None
        self._devices: Any = None
        self._is_aborted = False

    @property
    def hosts(self) -> Any:
        """For numbers of the host."""
        if self._hosts is None:
            self._hosts = _gloo(self._meeting("hosts"), *self._place, 2 * self._timeout_s)
        return self._hosts

    @property
    def devices(self) -> Any:
        """For tensors of the devices."""
        if self._devices is None and self._device.type == "cpu":
            self._devices = _gloo(self._meeting("devices"), *self._place, 2 * self._timeout_s)
        elif self._devices is None:
            for name, value in ENVIRONMENT.items():
                os.environ.setdefault(name, value)
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timedelta(seconds=START_S)
            self._devices = dist.ProcessGroupNCCL(self._meeting("devices"), *self._place, options)
        return self._devices

    def _meeting(self, name: str) -> dist.Store:
        if self._store is None:
            self.meet()
            self._store = dist.FileStore(str(self._folder / "store"), self._place[1])
        return dist.PrefixStore(name, self._store)

    def abort(self) -> None:
        """Free the device from a collective that can never end. Once is enough."""
        if self._device.type == "cuda" and self._devices is not None and not self._is_aborted:
            self._is_aborted = True
            self._devices.abort()


class Group(Ranks):
    """One rank of several processes on one host. A lost rank raises ``RuntimeError``.

    device: of this rank. timeout_s: of a step. Rank 0 has the clock (``Company``); only after twice that time does
    what waits between CPUs give up on its own.
    """

    def __init__(self, index: int, count: int, folder: Path, device: torch.device, timeout_s: float) -> None:
        self.index, self.count, self.device = index, count, device
        self.links = Links(index, count, folder, device, timeout_s)
        self._sum, self._join = dist.AllreduceOptions(), AllgatherOptions()
        self._sum.asyncOp = self._join.asyncOp = False  # on the current stream, so that a graph captures it

    def place(self, device: torch.device) -> torch.device:
        return self.device

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        assert x.is_contiguous()
        _finish(self.links.devices.allreduce([x], self._sum))
        return x

    def join(self, x: torch.Tensor) -> torch.Tensor:
        rows, columns = x.shape
        out = x.new_empty((self.count * rows, columns))
        _finish(self.links.devices._allgather_base(out, x.contiguous(), self._join))
        return out.view(self.count, rows, columns).transpose(0, 1).reshape(rows, -1)

    def least(self, number: int) -> int:
        value, options = torch.tensor([number]), dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp(dist.ReduceOp.MIN)
        _finish(self.links.hosts.allreduce([value], options))
        return int(value)


def _gloo(store: dist.Store, index: int, count: int, timeout_s: float) -> Any:
    """Listens on the loopback interface only."""
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=LOOPBACK)]
    options._timeout = timedelta(seconds=timeout_s)
    return dist.ProcessGroupGloo(store, index, count, options)


def _finish(work: Any) -> None:
    if work is not None:  # a backend that is done, or has queued it on the stream
        work.wait()
