"""One step as integers: what rank 0's scheduler decided, for ranks that have a runner and no scheduler.

A rank needs of a chain only what its runner reads: seat, pages, sampling parameters, tokens of prompts. So requests,
text, stop strings, clocks and chance stay on rank 0, and the others cannot come to other conclusions than it did.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from slipstream.engine.chain import Chain
from slipstream.engine.request import Request
from slipstream.engine.sampling import PACKED_WIDTH, pack
from slipstream.engine.scheduler import Chunk, Plan
from slipstream.kvcache.table import Lease
from slipstream.types import SamplingParams


def write_plan(plan: Plan) -> list[int]:
    """Everything that a runner reads of a plan."""
    out = [*_counted([chain.seat for chain in plan.decodes]), *plan.lengths, len(plan.seated)]
    for chain in plan.seated:
        request = chain.request
        out += [chain.seat, chain.num_prompt, *pack(request.params, chain.seed, chain.num_prompt, request.stop_ids)]
    out.append(len(plan.grown))
    for chain in plan.grown:
        assert chain.lease is not None
        out += [chain.seat, *_counted(chain.lease.pages)]
    out += _counted([page for pair in plan.copies for page in pair])
    out.append(len(plan.chunks))
    for chunk in plan.chunks:
        out += _write_chunk(chunk)
    return out


def _write_chunk(chunk: Chunk) -> list[int]:
    chain = chunk.chain
    return [
        chain.seat, chunk.start, chunk.count, chunk.forced, chain.wanted_from,
        *_counted(chain.ids[chunk.start : chunk.end + 1]),  # one more: what the last row may be asked to score
        *_counted([sampler.seat for sampler, _ in chunk.samplers]),
        *_counted([heir.seat for heir in chunk.heirs]),
    ]  # fmt: skip


def _counted(values: Sequence[int]) -> list[int]:
    return [len(values), *values]


class Mirror:
    """The chains in rank 0's seats, as far as a runner reads them: of a chain whose KV is in its seat no pages."""

    def __init__(self) -> None:
        self._chains: dict[int, Chain] = {}

    def read_plan(self, numbers: Iterable[int]) -> Plan:
        """The plan that :func:`write_plan` wrote; every plan must be read, in order."""
        source = iter(numbers)
        seats = _list(source)
        plan = Plan(lengths=_take(source, len(seats)), epochs=[0] * len(seats))
        plan.seated = [self._seat(source) for _ in range(next(source))]
        for _ in range(next(source)):
            chain = self._chains[next(source)]
            chain.lease = Lease(pages=_list(source))
            plan.grown.append(chain)
        pages = _list(source)
        plan.copies = list(zip(pages[::2], pages[1::2], strict=True))
        plan.decodes = [self._chains[seat] for seat in seats]
        for chain, length in zip(plan.decodes, plan.lengths, strict=True):
            chain.num_kv = length
        plan.chunks = [self._read_chunk(source) for _ in range(next(source))]
        return plan

    def _seat(self, source: Iterator[int]) -> Chain:
        seat, num_prompt = next(source), next(source)
        row = _take(source, PACKED_WIDTH)
        temperature, top_p, min_p = np.array(row[:3], dtype=np.int64).view(np.float64).tolist()
        params = SamplingParams(
            temperature=temperature, top_p=top_p, min_p=min_p, top_k=row[3], max_tokens=None,
            min_tokens=row[5] - num_prompt,
        )  # fmt: skip
        request = Request([0], params, stop_ids=frozenset(token for token in row[6:] if token >= 0))
        chain = self._chains[seat] = Chain(request, 0, (0, 0), [0], 0, seed=row[4])
        chain.seat, chain.num_prompt = seat, num_prompt
        return chain

    def _read_chunk(self, source: Iterator[int]) -> Chunk:
        seat, start, count, forced, wanted_from = _take(source, 5)
        chain = self._chains[seat]
        chain.ids, chain.wanted_from = [0] * start + _list(source), wanted_from
        chunk = Chunk(chain, 0, start, count, bool(forced))
        for sampler in _list(source):
            self._chains[sampler].num_kv = chunk.end
            chunk.samplers.append((self._chains[sampler], 0))
        chunk.heirs = [self._chains[heir] for heir in _list(source)]
        return chunk


def _take(source: Iterator[int], count: int) -> list[int]:
    return [next(source) for _ in range(count)]


def _list(source: Iterator[int]) -> list[int]:
    return _take(source, next(source))
