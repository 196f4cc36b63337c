"""Where keys and values live: one store of pages for all layers, on a device or in (pinned) host memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from slipstream.kernels import ops


class KVPool:
    """Pages of keys and values.

    k, v: [L, P, Hk, S, D]; head-major inside a page, so that one head's block is one contiguous run. A slot is
    ``page * S + offset``. Page 0 is the null page: the table never hands it out, padding rows write there. Fresh pages
    hold zeros, so that whatever a kernel masks away is at least finite. value_dim: for a latent cache, whose values are
    the first so many columns of its keys: ``v`` [..., value_dim] is then a view of ``k``, and there is no second store.

    Raises ``ValueError`` for sizes that cannot hold a token and for ``pinned`` memory on a CUDA device.
    """

    def __init__(
        self,
        num_layers: int,
        num_pages: int,
        num_kv_heads: int,
        page_size: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        pinned: bool = False,
        value_dim: int | None = None,
    ) -> None:
        shape = (num_layers, num_pages, num_kv_heads, page_size, head_dim)
        if min(shape) < 1 or num_pages < 2:
            raise ValueError(f"a pool needs sizes >= 1 and a page beside the null page, got [L, P, Hk, S, D] = {shape}")
        self.device = torch.device(device)
        if pinned and self.device.type != "cpu":
            raise ValueError(f"only host memory can be pinned, not {self.device}: use device='cpu' or pinned=False")
        self.num_layers, self.num_pages, self.page_size = num_layers, num_pages, page_size
        self.k = _zeros(shape, dtype, self.device, pinned)
        self.v = _zeros(shape, dtype, self.device, pinned) if value_dim is None else self.k[..., :value_dim]
        self._stores = list(ops.stored(self.k, self.v))
        self._followers: list[Callable[[Sequence[tuple[int, int]]], object]] = []

    def attach(self, *stores: torch.Tensor) -> None:
        """From now on :meth:`copy_pages` copies the pages of these stores too. Each: [L, P, ...], on this device."""
        for store in stores:
            assert store.shape[:2] == self.k.shape[:2], f"{tuple(store.shape)} is not paged like {tuple(self.k.shape)}"
            self._stores.append(store)

    def follow(self, copy: Callable[[Sequence[tuple[int, int]]], object]) -> None:
        """From now on whoever holds these pages elsewhere is told of the same pairs by :meth:`copy_pages`."""
        self._followers.append(copy)

    @property
    def bytes(self) -> int:
        """Size of all keys and values in bytes."""
        return sum(x.numel() * x.element_size() for x in ops.stored(self.k, self.v))

    @property
    def num_tokens(self) -> int:
        """Tokens that fit beside the null page."""
        return (self.num_pages - 1) * self.page_size

    def copy_pages(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole pages of every layer, source to destination, attached stores included.

        All sources are read before anything is written.
        Ordered like any other work of the current stream; never blocks the host.
        """
        if not pairs:
            return
        index = torch.tensor(pairs, dtype=torch.int64, pin_memory=self.device.type == "cuda")
        src, dst = index.to(self.device, non_blocking=True).unbind(1)
        for store in self._stores:
            ops.copy_pages(store, src, dst)
        for copy in self._followers:
            copy(pairs)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, pinned: bool) -> torch.Tensor:
    if device.type != "cpu" or pinned:
        return torch.zeros(shape, dtype=dtype, device=device, pin_memory=pinned)
    # numpy takes zeroed memory from the system lazily: a large pool costs nothing until its pages are written.
    raw = np.zeros(int(np.prod(shape)) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(raw).view(dtype).view(shape)
