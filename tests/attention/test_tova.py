"""TovaBackend against lists: what each layer keeps, evicts and answers, in prompts, seats and both in one step."""

from __future__ import annotations

import pytest
import torch

from slipstream.attention.dense import DenseBackend
from slipstream.attention.tova import TovaBackend
from slipstream.kvcache.pool import KVPool
from slipstream.selection.tova import Tova
from slipstream.types import Batch, ModelSpec

SIZE, SEATS = 4, 5
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class Sets:
    """One chain by definition: per layer the list of (k, v) that is left, each [Hk, D] fp32."""

    def __init__(self, spec, budget, copy_of=None):
        self.spec, self.budget = spec, budget
        self.kept = [[] for _ in range(spec.num_layers)] if copy_of is None else [list(x) for x in copy_of.kept]

    def append(self, layer, k, v):
        self.kept[layer].append((k, v))

    def attend(self, layer, q):
        """q: [Hq, D] over all that is kept; [Hq, D] and mean weights [n]."""
        group = self.spec.num_heads // self.spec.num_kv_heads
        k = torch.stack([k for k, _ in self.kept[layer]]).repeat_interleave(group, 1)
        v = torch.stack([v for _, v in self.kept[layer]]).repeat_interleave(group, 1)
        weights = torch.einsum("hd,nhd->hn", q, k).mul(self.spec.scale).softmax(-1)
        return torch.einsum("hn,nhd->hd", weights, v), weights.mean(0)

    def evict(self, layer, weights):
        """So that the next token makes it ``budget`` tokens at most."""
        while len(self.kept[layer]) >= self.budget:
            worst = int(weights.argmin())
            del self.kept[layer][worst]
            weights = torch.cat((weights[:worst], weights[worst + 1 :]))


class Session:
    """A backend, chains by name, and steps of random queries, keys and values that are compared chain by chain."""

    def __init__(self, budget, shape=(6, 2, 16), dtype=torch.float32, device="cpu"):
        heads, kv_heads, dim = shape
        self.spec = ModelSpec("tiny", 3, 1, heads, kv_heads, dim, 8, 999, dtype)
        pool = KVPool(3, 20, kv_heads, SIZE, dim, dtype, device)
        pool.k.fill_(torch.nan)
        pool.v.fill_(torch.nan)
        self.pool = pool
        self.backend = TovaBackend(pool, self.spec, DenseBackend(pool, self.spec), Tova(budget=budget), SEATS)
        self.backend.k.fill_(torch.nan)  # what nobody wrote is not read
        self.backend.v.fill_(torch.nan)
        self.chains, self.lengths, self.pages, self.seats = {}, {}, {}, {}
        self.free = list(range(1, 20))
        self.generator = torch.Generator().manual_seed(0)

    def step(self, decodes=(), prompts=(), heirs=(), padding=0):
        """decodes: chains with one more token. prompts: (chain, tokens) into pages. heirs: (chain, heir, its seat)."""
        names = [*decodes, *(name for name, _ in prompts)]
        counts = [1] * len(decodes) + [count for _, count in prompts]
        rows = []
        for name, count in zip(names, counts, strict=True):
            before = self.lengths.setdefault(name, 0)
            self.lengths[name] += count
            rows += [(name, at) for at in range(before, before + count)]
            self.chains.setdefault(name, Sets(self.spec, self.backend.budget))
            if name not in decodes:
                held = self.pages.setdefault(name, [])
                while len(held) * SIZE < self.lengths[name]:
                    held.append(self.free.pop())
        batch = self.batch(names, counts, rows, len(decodes), heirs, padding)
        self.backend.plan(batch)
        for layer in range(self.spec.num_layers):
            self.layer(layer, batch, names, counts, rows, len(decodes))
        for name, heir, seat in heirs:
            self.chains[heir] = Sets(self.spec, self.backend.budget, copy_of=self.chains[name])
            self.lengths[heir], self.seats[heir] = self.lengths[name], seat

    def batch(self, names, counts, rows, num_decodes, heirs, padding):
        lengths = [self.lengths[name] for name in names] + [1] * padding
        held = [[] if b < num_decodes else self.pages[name] for b, name in enumerate(names)] + [[0]] * padding
        width = max(map(len, held))
        starts = torch.tensor([0, *counts, *[1] * padding]).cumsum(0).tolist()
        slots = [
            0 if b < num_decodes else held[b][at // SIZE] * SIZE + at % SIZE
            for b, name in enumerate(names)
            for at in range(lengths[b] - counts[b], lengths[b])
        ]
        device = self.pool.device
        return Batch(
            tokens=torch.zeros(starts[-1], dtype=torch.int64, device=device),
            positions=torch.tensor([at for _, at in rows] + [0] * padding, device=device),
            slots=torch.tensor(slots + [0] * padding, device=device),
            page_table=torch.tensor([p + [0] * (width - len(p)) for p in held], dtype=torch.int32, device=device),
            lengths=torch.tensor(lengths, dtype=torch.int32, device=device),
            query_start=torch.tensor(starts, dtype=torch.int32, device=device),
            logit_rows=torch.tensor(starts[1:], device=device) - 1,
            seats=torch.tensor([self.seats.get(name, SEATS) for name in names] + [0] * padding, device=device),
            lengths_host=lengths,
            query_start_host=starts,
            pages_host=held,
            num_decodes=num_decodes + padding,
            heirs=[(names.index(name), seat) for name, _, seat in heirs],
        )

    def random(self, rows, heads):
        x = torch.randn(rows, heads, self.spec.head_dim, generator=self.generator)
        return x.to(self.spec.dtype).to(self.pool.device)

    def layer(self, layer, batch, names, counts, rows, num_decodes):
        total = batch.tokens.numel()
        q = self.random(total, self.spec.num_heads)
        k, v = self.random(total, self.spec.num_kv_heads), self.random(total, self.spec.num_kv_heads)
        view = self.backend.view(layer)
        size = view.k.shape[2]
        view.k[view.slots // size, :, view.slots % size] = k
        view.v[view.slots // size, :, view.slots % size] = v
        out = self.backend.attend(layer, q)
        assert out.shape == q.shape and out.dtype == q.dtype
        tolerance = {"rtol": 1e-4, "atol": 1e-5} if self.spec.dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
        q, k, v, out = (x.float().cpu() for x in (q, k, v, out))
        for t, (name, _) in enumerate(rows):
            chain = self.chains[name]
            chain.append(layer, k[t], v[t])
            expected, weights = chain.attend(layer, q[t])
            torch.testing.assert_close(out[t], expected, **tolerance)
            if name in names[:num_decodes] or (t + 1 in batch.query_start_host and self.ends(name, batch, names)):
                chain.evict(layer, weights)

    def ends(self, name, batch, names):
        return names.index(name) in [b for b, _ in batch.heirs]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("budget", [1, 2, 7, 8, 30])
def test_what_is_attended_and_evicted_is_what_lists_say(budget, device):
    session = Session(budget, device=device)
    session.step(prompts=[("a", 9), ("b", 5)], heirs=[("a", "a1", 1), ("a", "a2", 3)])
    session.step(decodes=["a1", "a2"], prompts=[("b", 3)], heirs=[("b", "b1", 2)])
    session.step(decodes=["b1", "a1", "a2"], padding=2)
    session.step(decodes=["a1"], heirs=[("a1", "a3", 5)])  # a forced row ends a prompt that is in its seat
    session.step(decodes=["a3"], prompts=[("c", 2)], heirs=[("a3", "a4", 4)])
    for _ in range(12):
        session.step(decodes=["a4", "a1", "a3", "b1"], padding=1)
    evicted = sum(max(0, session.lengths[name] - budget) for name in ("a1", "a2", "b1"))
    assert session.backend.stats()["tova_evicted_tokens"] >= evicted
    assert (evicted > 0) == (budget < 20)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(1, 1, 16), (8, 1, 32), (5, 5, 16)])
def test_shapes(shape, device):
    session = Session(6, shape, device=device)
    session.step(prompts=[("a", 11), ("b", 4)], heirs=[("a", "a", 1), ("b", "b", 2)])
    for _ in range(6):
        session.step(decodes=["a", "b"])


@pytest.mark.parametrize("device", DEVICES)
def test_bfloat16(device):
    session = Session(64, dtype=torch.bfloat16, device=device)  # nothing is evicted: rounding does not decide
    session.step(prompts=[("a", 11)], heirs=[("a", "a", 1)])
    for _ in range(6):
        session.step(decodes=["a"])


def test_a_seat_is_filled_anew():
    session = Session(6)
    session.step(prompts=[("a", 11)], heirs=[("a", "a", 1)])
    for _ in range(4):
        session.step(decodes=["a"])
    session.step(prompts=[("b", 3)], heirs=[("b", "b", 1)])
    for _ in range(6):
        session.step(decodes=["b"])


def test_counts_and_bytes():
    session = Session(6)
    assert session.backend.stats()["tova_evicted_tokens"] == 0
    session.step(prompts=[("a", 11)], heirs=[("a", "a", 1)])
    assert session.backend.stats()["tova_evicted_tokens"] == 5
    session.step(decodes=["a"], padding=3)
    assert session.backend.stats()["tova_evicted_tokens"] == 6
    stores = (session.backend.k, session.backend.v, session.backend.victims)
    size = sum(x.numel() * x.element_size() for x in stores)
    assert session.backend.stats()["tova_seat_bytes"] == TovaBackend.seat_bytes(session.spec, 6, SEATS) == size


def test_plan_comes_first():
    with pytest.raises(AssertionError, match="plan"):
        Session(3).backend.view(0)
