"""Which blocks of which chains are in the hot buffer, for every layer and KV head; decided on the device.

A slot belongs to nobody: whatever is not wanted now may give way, what was wanted longest ago first. So a chain that
ends or is cancelled leaves nothing that must be given back: the slots of its blocks are the next to go, and until then
they serve whoever shares its pages. A page that is written anew is forgotten first, so a key never finds what its page
held before.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from slipstream.kernels import residency as kernels
from slipstream.kernels.residency import CLOCK, COUNTERS, History, Slots
from slipstream.types import Batch, ModelSpec

NEVER = 2.0  # no share of blocks is larger
_CLAIMS = ("prefetched", "urgent")


class Residency:
    """State and steps. num_slots: of each layer and head, more than ``most`` blocks for each of ``num_seats``.

    What is above ``most`` may be blocks of a union, or of the next step. Where it is not enough, blocks of the next
    step are not brought in ahead, and it waits for them. What a step attends always has its slots: a chain has no more
    candidates in full pages than its share, ``most`` of a set and share - ``most`` of a union (a dense one has
    ``most`` blocks), no step has more chains than seats, and what comes ahead is given slots after them.

    history: what each of the M seats, and the null seat, has wanted, with [L, ...] in front. tick: [1] int32, counts
    steps.
    """

    def __init__(
        self,
        spec: ModelSpec,
        *,
        num_pages: int,
        page_size: int,
        block: int,
        most: int,
        num_slots: int,
        num_seats: int,
        device: torch.device,
    ) -> None:
        self.most, self._share = most, num_slots // num_seats
        assert page_size % block == 0 and self._share > most
        self.block, self.per_page, self.num_slots = block, page_size // block, num_slots
        heads = (spec.num_layers, spec.num_kv_heads)

        def full(value: int, *shape: int) -> Tensor:
            return torch.full(shape, value, dtype=torch.int32, device=device)

        self.slots = Slots(
            full(-1, *heads, num_pages * self.per_page), full(-1, *heads, num_slots), full(0, *heads, num_slots)
        )
        seats = (heads[0], num_seats + 1, heads[1])
        self.history = History(full(-1, *seats, most), full(0, *seats), full(0, *seats, -(-spec.max_position // block)))
        # What a selection that no later step goes by is noted in.
        self._blank = History(full(-1, *seats[1:], most), full(0, *seats[1:]), self.history.wanted_at[0])
        self.tick = full(0, 1)
        sizes = (len(COUNTERS), len(_CLAIMS), CLOCK, CLOCK, 1)
        self._numbers = torch.zeros(sum(sizes), dtype=torch.int64, device=device)
        self.counters, self._claims, *clocks, joined = self._numbers.split(sizes)
        # A device's times: of loads ahead and of urgent ones, and of waiting for the lane.
        self.clocks = clocks if device.type == "cuda" else [None, None]
        self.joined = joined if device.type == "cuda" else None
        self._ignored = torch.zeros_like(self.counters)
        self._numbers_host = self._numbers
        if device.type == "cuda":  # who reads them must not wait for the device
            self._numbers_host = torch.zeros_like(self._numbers, device="cpu", pin_memory=True)

    @property
    def bytes(self) -> int:
        """Size of all state in bytes."""
        return sum(x.numel() * x.element_size() for x in (*self.slots, *self.history))

    def _layer(self, layer: int) -> Slots:
        return Slots(*(x[layer] for x in self.slots))

    # -- once per step

    def reset(self, seats: Sequence[int]) -> None:
        """Other chains have taken these seats: what the ones before wanted is void."""
        if seats:
            device = self.tick.device
            pinned = torch.tensor(seats, dtype=torch.int64, pin_memory=device.type == "cuda")
            rows = pinned.to(device, non_blocking=True)
            for state in self.history[1:]:
                state.index_fill_(1, rows, 0)

    def clear(self) -> None:
        """Nothing is resident."""
        for state, value in zip(self.slots, (-1, -1, 0), strict=True):
            state.fill_(value)

    def begin(self, batch: Batch) -> None:
        """A step begins: the pages that it writes to are forgotten. Looks at the device only."""
        self.tick += 1
        kernels.forget_pages(
            batch.page_table, batch.query_start, batch.lengths, batch.max_query, self.slots,
            self.block * self.per_page, self.per_page,
        )  # fmt: skip

    def finish(self) -> None:
        """A step ends: its counts are on their way to the host."""
        if self._numbers_host is not self._numbers:
            self._numbers_host.copy_(self._numbers, non_blocking=True)

    # -- once per layer

    def find(
        self, layer: int, blocks: Tensor, nexts: Tensor, batch: Batch, lengths: Tensor, mode: str,
        drift: float | None = None, scores: Tensor | None = None, margin: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """blocks, nexts: [B, Hk, M] -> (candidates, urgent keys, later keys): see :func:`kernels.find_blocks`."""
        return kernels.find_blocks(
            blocks, nexts, batch.page_table, batch.seats, lengths, self._layer(layer),
            History(*(x[layer] for x in self.history)), self.tick, self.counters, self.per_page, self.block, mode,
            NEVER if drift is None else drift, scores, NEVER if margin is None else margin, self._share,
        )  # fmt: skip

    def find_all(self, layer: int, batch: Batch, lengths: Tensor) -> Tensor:
        """Keys [B, Hk, M] of those blocks of the rows with a length, at most ``most`` of each, that are in no slot."""
        width = min(self.most, batch.page_table.shape[1] * self.per_page)
        blocks = torch.arange(width, dtype=torch.int32, device=lengths.device)
        there = blocks * self.block < lengths.view(-1, 1, 1)
        blocks = torch.where(there, blocks, -1).expand(-1, self.slots.used.shape[1], -1).contiguous()
        _, urgent, _ = kernels.find_blocks(
            blocks, blocks, batch.page_table, batch.seats, lengths, self._layer(layer), self._blank, self.tick,
            self._ignored, self.per_page, self.block, "current", NEVER,
        )  # fmt: skip
        return urgent

    def claim(self, layer: int, keys: Tensor, urgent: bool) -> tuple[Tensor, Tensor]:
        """Slots for ``keys`` [B, Hk, M]: (loads [Hk, n, 2] of key and slot, counts [Hk]). Urgent ones all get one."""
        counter = self._claims[int(urgent) : int(urgent) + 1]
        return kernels.claim_slots(keys, self._layer(layer), self.tick, counter)

    def rows(self, layer: int, batch: Batch, lengths: Tensor, first: int) -> Tensor:
        """Rows [B * Hk, N] of a store whose slots begin at row ``first``: see :func:`kernels.block_rows`."""
        return kernels.block_rows(
            batch.page_table, batch.seats, lengths, self.slots.slot_of[layer], self.num_slots, first, self.block,
            self.per_page,
        )  # fmt: skip

    # Where nothing moves, a claim is all there is to do: the mover of a selector without a hot buffer.

    def fetch(self, layer: int, keys: Tensor) -> None:
        self.claim(layer, keys, urgent=True)

    def prefetch(self, layer: int, keys: Tensor) -> None:
        self.claim(layer, keys, urgent=False)

    # -- numbers and invariants

    def stats(self) -> dict[str, float]:
        """Blocks of all layers and heads, on a GPU as of the last step that is over.

        turnover: mean share of a selection that the set of the step before did not have. returned: how many of these
        were candidates all the same, as their chain held them. Selections that waited for blocks: a chain's first,
        those that drifted, and those that found that candidates had lost their slots.
        """
        counts = dict(zip((*COUNTERS, *_CLAIMS), self._numbers_host.tolist(), strict=False))
        misses = counts["prefetched"] + counts["urgent"]
        named = {"blocks": counts["wanted"], "hits": counts["wanted"] - misses, "misses": misses}
        named |= {name: counts[name] for name in ("compared", "turned", "returned", *_CLAIMS)}
        for name, count in (("first", "first"), ("drift", "drifted"), ("lost", "lost")):
            named[f"{name}_selections"] = counts[count]
        named["turnover"] = counts["turned"] / counts["compared"] if counts["compared"] else 0.0
        return {f"asynctls_{name}": value for name, value in named.items()}

    def seconds(self) -> tuple[float, float]:
        """On a GPU, of decode steps: in which blocks were loaded, and in which a step waited for them or for its lane.

        To join a lane that is ready takes some microseconds.
        """
        *_, ahead, _, _, urgent, joined = self._numbers_host.tolist()
        return 1e-9 * (ahead + urgent), 1e-9 * (joined + urgent)

    def check_integrity(self) -> None:
        """Assert every invariant: for tests."""
        slot_of, key_of, used = (x.cpu() for x in self.slots)
        holds = key_of >= 0
        assert bool((slot_of < self.num_slots).all()) and bool((slot_of >= -1).all()), "a slot that is not there"
        layer, head, slot = holds.nonzero(as_tuple=True)
        back = slot_of[layer, head, key_of[holds].long()]
        assert bool((back == slot).all()), "a slot holds a key that is elsewhere"
        assert int((slot_of >= 0).sum()) == len(slot), "a key is in a slot that does not hold it"
        assert not slot_of[:, :, : self.per_page].ge(0).any(), "the null page is resident"
        assert bool((used[~holds] == 0).all()) and bool((used[holds] > 0).all()), "use of a slot that holds nothing"
        assert int(used.max()) <= int(self.tick), "a slot was used in the future"
        _, made_for, wanted_at = self.history
        assert bool((wanted_at.amax(-1) < made_for.clamp(min=1)).all()), "a seat's last chain is remembered"
