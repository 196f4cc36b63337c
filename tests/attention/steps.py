"""Steps of a tiny cache for tests of attention backends: requests that grow, their pages, and what they must see."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from slipstream.attention.backend import AttentionBackend
from slipstream.kvcache.pool import KVPool
from slipstream.types import Batch, ModelSpec


def make_spec(num_q: int, num_kv: int, dim: int, dtype: torch.dtype, layers: int = 2) -> ModelSpec:
    return ModelSpec(
        architecture="tiny",
        num_layers=layers,
        hidden_size=num_q * dim,
        num_heads=num_q,
        num_kv_heads=num_kv,
        head_dim=dim,
        vocab_size=8,
        max_position=4096,
        dtype=dtype,
    )


class Requests:
    """Requests that grow step by step; keeps every key and value beside the paged copy, per layer.

    keys, values: [layer][request] lists of [n, Hk, D].
    """

    def __init__(self, pool: KVPool, spec: ModelSpec, num_requests: int, width: int, seed: int = 0) -> None:
        self.pool, self.spec = pool, spec
        self.generator = torch.Generator().manual_seed(seed)
        free = torch.randperm(pool.num_pages - 1, generator=self.generator) + 1
        self.pages = free[: num_requests * width].view(num_requests, width).tolist()
        self.lengths = [0] * num_requests
        empty = torch.empty((0, spec.num_kv_heads, spec.head_dim), dtype=spec.dtype, device=pool.device)
        self.keys = [[empty] * num_requests for _ in range(spec.num_layers)]
        self.values = [[empty[..., : spec.value_dim]] * num_requests for _ in range(spec.num_layers)]

    def grow(self, counts: Sequence[int], graph_key: tuple[int, int] | None = None) -> Batch:
        """A step with ``counts[b]`` new tokens of each request (0: the request is not in the step)."""
        size = self.pool.page_size
        members = [b for b, count in enumerate(counts) if count]
        positions = [torch.arange(self.lengths[b], self.lengths[b] + counts[b]) for b in members]
        slots = [
            torch.tensor(self.pages[b])[at // size] * size + at % size for b, at in zip(members, positions, strict=True)
        ]
        for b in members:
            self.lengths[b] += counts[b]
        starts = [0, *accumulate(counts[b] for b in members)]
        lengths = [self.lengths[b] for b in members]
        device = self.pool.device
        tokens = torch.zeros(starts[-1], dtype=torch.int64, device=device)
        return Batch(
            tokens=tokens,
            positions=torch.cat(positions).to(device),
            slots=torch.cat(slots).to(device),
            page_table=torch.tensor([self.pages[b] for b in members], dtype=torch.int32, device=device),
            lengths=torch.tensor(lengths, dtype=torch.int32, device=device),
            query_start=torch.tensor(starts, dtype=torch.int32, device=device),
            logit_rows=torch.tensor(starts[1:], device=device) - 1,
            seats=torch.tensor(members, device=device) + 1,
            lengths_host=lengths,
            query_start_host=starts,
            pages_host=[self.pages[b][: -(-self.lengths[b] // size)] for b in members],
            num_decodes=len(members) if all(counts[b] == 1 for b in members) else 0,
            graph_key=graph_key,
        )

    def random(self, rows: int, heads: int) -> Tensor:
        x = torch.randn(rows, heads, self.spec.head_dim, generator=self.generator)
        return x.to(self.pool.device, self.spec.dtype)

    def run(self, backend: AttentionBackend, counts: Sequence[int]) -> None:
        """One planned step through every layer; compares each row with softmax over all that it may see."""
        batch = self.grow(counts)
        backend.plan(batch)
        rows = batch.tokens.numel()
        for layer in range(self.spec.num_layers):
            k, v = self.random(rows, self.spec.num_kv_heads), self.random(rows, self.spec.num_kv_heads)
            q = self.random(rows, self.spec.num_heads)
            self.store(backend, layer, batch, counts, k, v)
            self.check(layer, batch, counts, q, backend.attend(layer, q))

    def store(
        self, backend: AttentionBackend, layer: int, batch: Batch, counts: Sequence[int], k: Tensor, v: Tensor
    ) -> None:
        k_pages, v_pages, slots = backend.view(layer)
        size = self.pool.page_size
        k_pages[slots // size, :, slots % size] = k
        v_pages[slots // size, :, slots % size] = v
        members = [b for b, count in enumerate(counts) if count]
        for i, b in enumerate(members):
            new = slice(batch.query_start_host[i], batch.query_start_host[i + 1])
            self.keys[layer][b] = torch.cat((self.keys[layer][b], k[new]))
            self.values[layer][b] = torch.cat((self.values[layer][b], v[new]))

    def check(self, layer: int, batch: Batch, counts: Sequence[int], q: Tensor, out: Tensor) -> None:
        assert out.shape == q.shape and out.dtype == q.dtype
        half = self.spec.dtype != torch.float32
        row = 0
        for b, count in enumerate(counts):
            for i in range(count):
                seen = self.lengths[b] - count + i + 1
                expected = _softmax_attention(
                    q[row], self.keys[layer][b][:seen], self.values[layer][b][:seen], self.spec.scale
                )
                tolerance = {"rtol": 1.6e-2, "atol": 1e-2} if half else {"rtol": 1e-5, "atol": 1e-5}
                torch.testing.assert_close(out[row].float(), expected, **tolerance)
                row += 1


def _softmax_attention(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """q: [Hq, D]; keys, values: [n, Hk, D] -> [Hq, D] fp32."""
    group = q.shape[0] // keys.shape[1]
    k, v = (x.float().repeat_interleave(group, dim=1).transpose(0, 1) for x in (keys, values))
    weights = torch.einsum("hd,hnd->hn", q.float(), k).mul(scale).softmax(-1)
    return torch.einsum("hn,hnd->hd", weights, v)
