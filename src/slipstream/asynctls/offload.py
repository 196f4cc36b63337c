"""Where KV is when it is not on the device: host memory, the hot buffer that is attended, the stage of prompts."""

from __future__ import annotations

import math
import mmap
import tempfile
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from slipstream.kernels import ops, residency
from slipstream.kernels.residency import Store
from slipstream.kvcache.pool import KVPool
from slipstream.overlap import InlineLane, Lane, StreamLane, ThreadLane
from slipstream.types import ModelSpec


class HostMemory:
    """Exactly so many bytes of zeroed host memory, pinned for a CUDA device; or a file in ``folder``, on a CPU.

    Raises ``ValueError`` when the system refuses; then nothing stays allocated or pinned.
    """

    def __init__(self, num_bytes: int, device: torch.device, folder: str | None = None) -> None:
        self._unpin: Callable[[], Any] | None = None
        if folder is not None and device.type == "cuda":
            raise ValueError("a file cannot be pinned for a GPU: leave host_file out, or use device='cpu'")
        try:
            if folder is None:
                self._map = mmap.mmap(-1, num_bytes)
            else:
                with tempfile.TemporaryFile(dir=folder) as file:  # it lives as long as it is mapped
                    file.truncate(num_bytes)
                    self._map = mmap.mmap(file.fileno(), num_bytes)
        except OSError as error:
            where = "of the host" if folder is None else f"in {folder}"
            raise ValueError(f"{num_bytes:,} bytes {where} cannot be had ({error}): lower host_kv") from error
        self.bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        if device.type == "cuda":
            self.bytes.zero_()  # by all threads; the driver would make every page there by one
            code = _register(self.bytes)
            if code:
                raise ValueError(f"the driver refuses to pin {num_bytes:,} bytes of the host ({code}): lower host_kv")
            self._unpin = weakref.finalize(self, _unregister, self.bytes)

    def close(self) -> None:
        """Unpin, which else happens when this object goes; the memory itself goes with its last tensor."""
        if self._unpin is not None:
            self._unpin()


def _register(memory: Tensor) -> int:
    # Not torch's pinned allocator, which rounds up to a power of two.
    return int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0))  # type: ignore[attr-defined]


def _unregister(memory: Tensor) -> None:
    torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())  # type: ignore[attr-defined]


class HostPool(KVPool):
    """A pool whose keys and values are on the host; what is attached to it, the index, is on ``device``."""

    def __init__(
        self, spec: ModelSpec, num_pages: int, page_size: int, device: torch.device, folder: str | None = None
    ) -> None:
        shape = (spec.num_layers, num_pages, spec.num_kv_heads, page_size, spec.head_dim)
        size = math.prod(shape) * spec.dtype.itemsize
        self.device = device
        self.num_layers, self.num_pages, self.page_size = spec.num_layers, num_pages, page_size
        self._memory: list[HostMemory] = []
        try:
            for _ in range(2 if spec.value_dim is None else 1):
                self._memory.append(HostMemory(size, device, folder))
        except ValueError:
            self.close()
            raise
        self.k, *values = (memory.bytes.view(spec.dtype).view(shape) for memory in self._memory)
        self.v = values[0] if values else self.k[..., : spec.value_dim]
        self._stores = []

    def layer(self, layer: int) -> Store:
        return self.k[layer], self.v[layer]

    def copy_pages(self, pairs: Sequence[tuple[int, int]]) -> None:
        """As :meth:`KVPool.copy_pages`; keys and values go through the device, layer by layer."""
        if not pairs:
            return
        source, target = to_device([[a for a, _ in pairs], [b for _, b in pairs]], self.device)
        for store in self._stores:
            ops.copy_pages(store, source, target)
        between = empty_like(self.layer(0), len(pairs), self.device)
        places = torch.arange(len(pairs), device=self.device)
        for layer in range(self.num_layers):
            residency.copy_between(self.layer(layer), between, source, places)
            residency.copy_between(between, self.layer(layer), places, target)

    def close(self) -> None:
        """Unpin the host memory. Nothing on the device may still use it."""
        for memory in self._memory:
            memory.close()


def empty_like(store: Store, num: int, device: torch.device, pinned: bool = False) -> Store:
    """Room for ``num`` pages or blocks of such a store: where its values are columns of its keys, they are here too."""
    k, v = store
    parts = [
        torch.empty((num, *x.shape[1:]), dtype=x.dtype, device=device, pin_memory=pinned) for x in ops.stored(k, v)
    ]
    return parts[0], parts[1] if len(parts) > 1 else parts[0][..., : v.shape[-1]]


def zeros(shape: tuple[int, ...], spec: ModelSpec, device: torch.device) -> Store:
    """Keys, and values beside them; in a latent cache those are the keys' first columns. shape: [..., D]."""
    k = torch.zeros(shape, dtype=spec.dtype, device=device)
    return k, torch.zeros_like(k) if spec.value_dim is None else k[..., : spec.value_dim]


class HotBuffer:
    """K and V, [L, X, block, D], that decode steps attend: rows of tails by seat, and from ``first`` on of slots.

    A layer's tails are [seats, Hk, S, D], the newest page of each seat, where the model stores decoded tokens; its
    slots are [Hk, num_slots] rows.
    """

    def __init__(
        self, spec: ModelSpec, page_size: int, block: int, num_slots: int, num_seats: int, device: torch.device
    ) -> None:
        self.first = (num_seats + 1) * spec.num_kv_heads * (page_size // block)
        self._tails = (num_seats + 1, spec.num_kv_heads, page_size)
        shape = (spec.num_layers, self.first + spec.num_kv_heads * num_slots, block, spec.head_dim)
        self.k, self.v = zeros(shape, spec, device)

    @property
    def bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in ops.stored(self.k, self.v))

    def layer(self, layer: int) -> Store:
        """[X, block, D] each."""
        return self.k[layer], self.v[layer]

    def tails(self, layer: int) -> Store:
        """[seats, Hk, S, D] each."""
        k, v = self.layer(layer)
        return k[: self.first].view(*self._tails, -1), v[: self.first].view(*self._tails, -1)


class _Alternating:
    """Two buffers for all layers: a layer's neighbours have the other one."""

    def __init__(self, buffers: Tensor) -> None:
        self._buffers, self.device, self.dtype = buffers, buffers.device, buffers.dtype

    def __getitem__(self, layer: int) -> Tensor:
        return self._buffers[layer % 2]


class Stage:
    """Pages of one layer and the next, where prompts are attended: a pool for a dense backend.

    num_pages: those of prompts; behind them there is room for one token of each of ``num_seats`` decode rows.
    """

    def __init__(self, spec: ModelSpec, num_pages: int, page_size: int, num_seats: int, device: torch.device) -> None:
        self.num_pages, self.page_size, self.device = num_pages, page_size, device
        shape = (2, num_pages + -(-num_seats // page_size), spec.num_kv_heads, page_size, spec.head_dim)
        self.k, self.v = (_Alternating(buffers) for buffers in zeros(shape, spec, device))

    def layer(self, layer: int) -> Store:
        return self.k[layer], self.v[layer]


def choose_lane(lane: str, device: torch.device) -> Lane:
    """``ValueError`` for a lane that this device does not have."""
    on_cuda = device.type == "cuda"
    if lane == "auto":
        lane = "stream" if on_cuda else "inline"
    if (lane == "thread" and on_cuda) or (lane == "stream" and not on_cuda):
        raise ValueError(f"lane={lane!r} is not for {device}: use 'stream' on a GPU, 'thread' or 'inline' on a CPU")
    if lane == "stream":
        return StreamLane(device)
    return ThreadLane("asynctls") if lane == "thread" else InlineLane()


def load_pooled(
    pages: Store, loads: Tensor, counts: Tensor, store: Store, num_slots: int, first: int, clock: Tensor | None = None
) -> None:
    """:func:`residency.load_blocks` by one copy: the host collects the blocks. Blocks the host until it knows them.

    clock: is not read; these loads have no time.
    """
    host_loads, host_counts = loads.cpu(), counts.cpu()
    num = int(host_counts.sum())
    if not num:
        return
    pool = empty_like(store, num, pages[0].device, loads.is_cuda)
    places = torch.zeros((len(counts), loads.shape[1], 2), dtype=torch.int32)
    at, rows = 0, []
    for head, count in enumerate(host_counts.tolist()):
        slots = torch.arange(at, at + count, dtype=torch.int32)
        places[head, :count] = torch.stack((host_loads[head, :count, 0], slots), dim=1)
        rows.append(first + head * num_slots + host_loads[head, :count, 1].long())
        at += count
    residency.load_blocks(pages, places, host_counts, pool, 0, 0)
    row = torch.cat(rows).to(loads.device)
    for part, target in zip(ops.stored(*pool), ops.stored(*store), strict=True):
        target.index_copy_(0, row, part.to(loads.device, non_blocking=True))


def to_device(lists: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, ...]:
    """Lists of integers as [n] int64 tensors, in one copy that never blocks the host."""
    flat = torch.tensor([x for values in lists for x in values], dtype=torch.int64, pin_memory=device.type == "cuda")
    return flat.to(device, non_blocking=True).split([len(values) for values in lists])
