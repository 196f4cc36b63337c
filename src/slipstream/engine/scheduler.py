"""Who runs in the next step: continuous batching over pages and seats. Pure Python; counts tokens, never reads them."""

from __future__ import annotations

from bisect import insort
from collections import deque
from dataclasses import dataclass, field

from slipstream.engine.chain import Chain
from slipstream.kvcache.table import Copies, PageTable


@dataclass
class Chunk:
    """Known tokens ``start .. start + count`` of a chain. ``samplers`` draw a token from the last one's logits.

    forced: it is one token that attends as a decode step does. heirs: chains whose seat takes over the KV after it.
    """

    chain: Chain
    epoch: int
    start: int
    count: int
    forced: bool = False
    samplers: list[tuple[Chain, int]] = field(default_factory=list)
    heirs: list[Chain] = field(default_factory=list)

    @property
    def end(self) -> int:
        return self.start + self.count


@dataclass
class Plan:
    """One step. decodes: chains that run the token in their seat; lengths: their KV tokens with it; epochs: theirs.

    chunks: known tokens to run, the forced ones first. seated: chains whose seat is new. grown: chains whose pages
    changed. copies: pages to copy before any is written. num_pages: of the prompts in it, from their first token on.
    """

    decodes: list[Chain] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    epochs: list[int] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    seated: list[Chain] = field(default_factory=list)
    grown: list[Chain] = field(default_factory=list)
    copies: Copies = field(default_factory=list)
    num_pages: int = 0

    @property
    def is_decode(self) -> bool:
        """Whether every row is a decode step of one chain: known tokens too, where nobody else goes on from them."""
        return all(k.forced and len(k.samplers) <= 1 and not k.heirs and not k.chain.wants_scores for k in self.chunks)

    @property
    def num_prefill_tokens(self) -> int:
        return sum(chunk.count for chunk in self.chunks)

    def chains(self) -> list[Chain]:
        """Every chain that this step computes."""
        return self.decodes + [chunk.chain for chunk in self.chunks] + [c for k in self.chunks for c, _ in k.samplers]


class Scheduler:
    """Chains wait, run, and are preempted; seats are numbered from 1 (seat 0 is the null seat of padding rows).

    Who came first goes first: to make room, the latest chain gives its pages back; later it starts again, with the
    tokens that it has.
    gate: tokens up to which decode steps attend as prompts do. What a preempted chain had generated behind them runs as
    decode steps again, so that it goes on as if nothing had happened. None: all of it is prefilled.
    token_budget: most tokens of a step, decodes counted first; prompts are cut to what is left, at least one token.
    kv_in_seats: a chain that decodes has its KV in its seat; its pages are given back when its prompt is done, what the
    cache knows of them stays in the cache. Preempted, it is prefilled into pages again.
    prefill_pages: most pages of all prompts of a step, from their first token on; one prompt may always run.
    names_heirs: say of each chunk whose seats go on from it, though the KV stays in pages.
    """

    def __init__(
        self,
        table: PageTable,
        *,
        max_num_seqs: int,
        token_budget: int,
        kv_in_seats: bool = False,
        names_heirs: bool = False,
        prefill_pages: int | None = None,
        gate: int | None = None,
    ) -> None:
        if max_num_seqs < 1 or token_budget < 1:
            raise ValueError(f"max_num_seqs and token_budget must be >= 1, got {max_num_seqs} and {token_budget}")
        self.table, self.max_num_seqs, self.token_budget = table, max_num_seqs, token_budget
        self.kv_in_seats, self.names_heirs = kv_in_seats, names_heirs or kv_in_seats
        self.prefill_pages, self.gate = prefill_pages, gate
        self.waiting: deque[Chain] = deque()
        self.running: list[Chain] = []
        self.num_preemptions = self.num_cached_tokens = self.num_pages_left = 0
        self._seats = list(range(max_num_seqs, 0, -1))
        self._step = 0
        self._blocked_at = -1  # available pages when the first in line last did not fit

    # -- in and out

    def add(self, chain: Chain) -> None:
        """Queue a chain with its siblings. Raises ``ValueError`` when it can never run."""
        capacity = (self.table.num_pages - 1) * self.table.page_size
        if chain.max_kv_tokens > capacity:
            raise ValueError(f"a chain needs the KV of {chain.max_kv_tokens} tokens, the whole cache holds {capacity}")
        if 1 + len(chain.siblings) > self.max_num_seqs:
            raise ValueError(f"{1 + len(chain.siblings)} chains need as many seats, but there are {self.max_num_seqs}")
        self.waiting.append(chain)

    def finish(self, chain: Chain) -> None:
        """Take a chain out, wherever it is; pages whose tokens are known stay in the prefix cache."""
        if chain in self.running:
            self.running.remove(chain)
        elif chain in self.waiting:
            self.waiting.remove(chain)
        self._give_back(chain)

    def leave_pages(self, chain: Chain) -> None:
        """A chain's KV is in its seat and its pages are in the cache: give them back."""
        assert chain.in_seat and chain.lease is not None
        used = self.table.num_used
        self.table.free(chain.lease)
        self.num_pages_left += used - self.table.num_used
        chain.lease = None
        self._blocked_at = -1

    def _give_back(self, chain: Chain) -> None:
        for sitting in (chain, *chain.siblings):
            if sitting.seat:
                self._seats.append(sitting.seat)
                sitting.seat = 0
        if chain.lease is not None:
            self.table.free(chain.lease)
        chain.retire()
        self._blocked_at = -1

    # -- one step

    def schedule(self) -> Plan | None:
        """The next step, or None when nothing can run: decodes first, then prompts begun, then who waits."""
        plan = Plan()
        self._step += 1
        preemptions = self.num_preemptions
        stalled = [c for c in self.running.copy() if c.can_decode and not self._decode(c, plan)]
        budget = max(1, self.token_budget - len(plan.decodes))
        for chain in [c for c in self.running if c.can_prefill]:
            if budget and chain.can_prefill:  # an earlier one may have taken its pages
                budget -= self._prefill(chain, budget, plan)
        held_up = stalled or preemptions < self.num_preemptions or any(map(self._is_behind, self.running))
        while self.waiting and budget and not held_up and self.can_admit(self.waiting[0]):
            if self._is_being_read(self.waiting[0]):
                break
            count = self._prefill(self._admit(plan), budget, plan)
            budget -= count
            if not count:  # no place for more prompts in this step
                break
        plan.lengths = [c.num_kv for c in plan.decodes]
        plan.chunks.sort(key=lambda chunk: not chunk.forced)
        plan.epochs = [c.epoch for c in plan.decodes]
        return plan if plan.decodes or plan.chunks else None

    def _is_behind(self, chain: Chain) -> bool:
        """Whether it could have run more tokens in this step."""
        return chain.can_prefill and not (chain.is_forced and chain.step == self._step)

    def _is_being_read(self, chain: Chain) -> bool:
        """Whether a running chain is yet to share the next page of a prompt that this one starts with: it soon will."""
        size = self.table.page_size
        for other in self.running:
            if other.lease is None or other.salt != chain.salt:
                continue
            end = (len(other.lease.nodes) + 1) * size  # with the first page that is not in the cache yet
            if end <= min(other.num_shared, chain.reuse_limit) and other.ids[:end] == chain.ids[:end]:
                return self.table.reuse
        return False

    def _decode(self, chain: Chain, plan: Plan) -> bool:
        if not self._grow(chain, 1, plan):
            return False
        chain.total += 1
        plan.decodes.append(chain)
        return True

    def _prefill(self, chain: Chain, budget: int, plan: Plan) -> int:
        """Run the next tokens of a prompt; returns how many. The last ones let the chain and its siblings sample."""
        start, forced = chain.num_kv, chain.is_forced
        count = min(budget, chain.chunk_end - start)
        pages = 0 if forced else self.table.pages_for(start + count)
        if self.prefill_pages is not None and plan.num_pages and plan.num_pages + pages > self.prefill_pages:
            return 0
        if not self._grow(chain, count, plan):
            return 0
        plan.num_pages += pages
        chunk = Chunk(chain, chain.epoch, start, count, forced)
        plan.chunks.append(chunk)
        samples = chain.samples and chunk.end == chain.total
        if self.names_heirs and (samples or (chain.is_forced and not forced)):
            self._name_heirs(chunk, [chain, *(chain.siblings if samples else ())])
        if samples:
            self._fork(chain, plan)
            for sampler in (chain, *chain.siblings):
                sampler.decoding = True
                sampler.total += 1
                chunk.samplers.append((sampler, sampler.epoch))
            chain.siblings = []
        return count

    def _name_heirs(self, chunk: Chunk, chains: list[Chain]) -> None:
        """From the next step on these chains decode in their seats, where their KV is if seats hold it."""
        is_there = chunk.forced  # a forced token ran as a decode step of its own seat
        chunk.heirs = [chain for chain in chains if not (is_there and chain is chunk.chain)]
        for heir in chunk.heirs:
            heir.in_seat = self.kv_in_seats

    def _fork(self, chain: Chain, plan: Plan) -> None:
        for sibling in chain.siblings:
            sibling.num_kv, sibling.step = chain.num_kv, self._step
            insort(self.running, sibling, key=_order)
            if not sibling.in_seat:
                assert chain.lease is not None
                sibling.lease = self.table.fork(chain.lease)
                plan.grown.append(sibling)

    # -- room

    def _grow(self, chain: Chain, count: int, plan: Plan) -> bool:
        """Slots for ``count`` more tokens, taken from later chains if need be. False: wait for earlier ones."""
        lease = chain.lease
        chain.step = self._step
        chain.num_kv += count
        if chain.in_seat:
            return True
        assert lease is not None
        if count > lease.room:
            while not self.table.can_append(lease, count):
                victim = self._latest_after(chain)
                if victim is None:
                    chain.step = -1
                    chain.num_kv -= count
                    return False
                self.preempt(victim)
            plan.copies += self.table.append(lease, count)
            plan.grown.append(chain)
        else:
            self.table.append(lease, count)
        return True

    def _latest_after(self, chain: Chain) -> Chain | None:
        """The latest chain behind this one that holds pages, is not part of this step and has tokens to draw."""
        for other in reversed(self.running):
            if other is chain:
                return None
            if other.step != self._step and not other.in_seat and (other.can_decode or other.can_prefill):
                return other
        return None

    def preempt(self, chain: Chain) -> None:
        """Take a running chain's pages and seat; it is the first of those that wait, and computes its tokens anew."""
        self.running.remove(chain)
        self._give_back(chain)
        if chain.num_dense is None and self.gate is not None:
            chain.num_dense = max(chain.num_prompt, self.gate)
        self.waiting.appendleft(chain)
        self.num_preemptions += 1

    def can_admit(self, chain: Chain) -> bool:
        """Seats for it and its siblings, pages for all its tokens, and for those of the others or one more for each."""
        available = self.table.num_available
        if len(self._seats) < 1 + len(chain.siblings) or (self.running and available == self._blocked_at):
            return False
        needed = self.table.num_new_pages(chain.ids, chain.reuse_limit, chain.salt)
        growth = sum(max(1, self.table.pages_for(c.total) - len(c.pages)) for c in self.running if not c.in_seat)
        fits = needed + growth <= available
        self._blocked_at = -1 if fits else available
        return fits

    def _admit(self, plan: Plan) -> Chain:
        chain = self.waiting.popleft()
        chain.lease = self.table.allocate(chain.ids, chain.reuse_limit, chain.salt)
        chain.num_kv = chain.lease.length
        self.num_cached_tokens += chain.num_kv
        if chain.num_cached < 0:
            chain.num_cached = chain.num_kv
        for sitting in (chain, *chain.siblings):
            sitting.seat = self._seats.pop()
            plan.seated.append(sitting)
        insort(self.running, chain, key=_order)
        plan.grown.append(chain)
        return chain


def _order(chain: Chain) -> tuple[int, int]:
    return chain.order
