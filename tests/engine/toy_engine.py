"""A model whose next token is a hash of all tokens before it, *read back from the KV pages*.

Whatever corrupts a page (a stale copy, a lost write, a page given to two chains) shows as another token. The backend
checks in every step that host facts and device facts agree.
"""

import torch

from slipstream.attention.backend import AttentionBackend, KVView
from slipstream.engine.engine import Engine, EngineConfig
from slipstream.engine.request import Request
from slipstream.kernels import ops
from slipstream.kvcache.pool import KVPool
from slipstream.types import ModelSpec, SamplingParams

VOCAB, EOS, MODULUS = 29, 28, 1_000_003
SPEC = ModelSpec("toy", 1, 1, 1, 1, 2, VOCAB, 96, torch.float32, eos_token_ids=(EOS,))


def next_hash(state, token, position):
    return (state * 31 + token * 7 + position * 13 + 5) % MODULUS


def hash_of(ids):
    state = 1
    for position, token in enumerate(ids):
        state = next_hash(state, token, position)
    return state


def logits_of(states):
    """[R] int64 -> [R, V] fp32, rows independent of each other."""
    columns = torch.arange(VOCAB)
    mixed = (states.unsqueeze(1) * (columns * columns + 3 * columns + 7) + columns * 104_729) % 1013
    logits = mixed.float() / 150
    logits[:, EOS] -= 2.0  # ends come now and then
    return logits


class ToyModel:
    """hidden states [T, 1]: the hash, exact in fp32. Raises when ``fail_on`` is among the tokens of a step."""

    def __init__(self, fail_on=None):
        self.fail_on = fail_on
        self.steps = []  # (tokens, requests) of each

    def forward(self, batch, backend):
        self.steps.append((len(batch.tokens), batch.num_requests))
        if self.fail_on is not None and self.fail_on in batch.tokens.tolist():
            raise RuntimeError("out of memory (as a test would have it)")
        k, v, slots = backend.view(0)
        size = k.shape[2]
        page, offset = slots // size, slots % size
        k[page, 0, offset, 0] = batch.tokens.float()
        k[page, 0, offset, 1] = batch.positions.float()
        v[page, 0, offset, 0] = batch.tokens.float() * 3
        hidden = torch.full((len(batch.tokens), 1), -1.0)
        starts = batch.query_start.tolist()
        for b, length in enumerate(batch.lengths.tolist()):
            pages = batch.page_table[b].long()
            stored = torch.cat([k[pages, 0].reshape(-1, 2), v[pages, 0].reshape(-1, 2)], dim=1)[:length].tolist()
            state, first = 1, length - (starts[b + 1] - starts[b])
            for position, (token, at, triple, _) in enumerate(stored):
                clean = at == position and triple == 3 * token
                state = next_hash(state, int(token) if clean else 999, position)
                if position >= first:
                    hidden[starts[b] + position - first] = state
        return hidden

    def logits(self, hidden):
        return logits_of(hidden[:, 0].long())


class ToyBackend(AttentionBackend):
    """Hands out the pool, and checks each batch against itself."""

    def __init__(self, pool):
        self.pool = pool

    def plan(self, batch):
        size = self.pool.page_size
        assert list(batch.lengths_host) == batch.lengths.tolist()
        assert list(batch.query_start_host) == batch.query_start.tolist()
        assert batch.max_query == 1 or not batch.is_decode
        written = []
        for b, (length, pages) in enumerate(zip(batch.lengths_host, batch.pages_host, strict=True)):
            if list(pages) == [0]:  # a padding row
                assert (length, batch.slots[b], batch.page_table[b].any()) == (1, 0, False)
                continue
            assert batch.page_table[b, : len(pages)].tolist() == list(pages) and 0 not in pages
            assert not batch.page_table[b, len(pages) :].any()
            assert len(pages) == -(-length // size)
            rows = slice(batch.query_start_host[b], batch.query_start_host[b + 1])
            positions = batch.positions[rows].tolist()
            assert positions == list(range(length - len(positions), length))
            slots = [pages[p // size] * size + p % size for p in positions]
            assert batch.slots[rows].tolist() == slots
            written += slots
        assert len(set(written)) == len(written), "two tokens of a step write one slot"
        self.batch = batch

    def view(self, layer):
        return KVView(self.pool.k[layer], self.pool.v[layer], self.batch.slots)

    def attend(self, layer, q):
        raise AssertionError("the toy model reads the pages itself")


def toy_engine(num_pages=64, page_size=4, fail_on=None, **config):
    pool = KVPool(1, num_pages, 1, page_size, 2, torch.float32)
    pool.k.fill_(float("nan"))  # whoever reads what nobody wrote will notice
    pool.v.fill_(float("nan"))
    engine = Engine(ToyModel(fail_on), SPEC, pool, ToyBackend(pool), EngineConfig(**config))
    engine.pool = pool
    return engine


def run(engine, *requests, check=True):
    """Serve requests to the end; returns them."""
    for request in requests:
        engine.add(request)
    while engine.has_work():
        engine.step()
        if check:
            engine.table.check_integrity()
    return requests


def tokens_of(request):
    return [completion.token_ids for completion in request.completions]


def truth(prompt, params, index=0, limit=96):
    """The tokens of one chain by a plain loop: no engine, no cache, no batch."""
    ids, column = list(prompt), lambda value, dtype: torch.tensor([value], dtype=dtype)
    most = min(limit, len(prompt) + (params.max_tokens or limit))
    stops = set(params.stop_token_ids) | (set() if params.ignore_eos else {EOS})
    while len(ids) < most:
        logits = logits_of(torch.tensor([hash_of(ids)]))
        if len(ids) - len(prompt) < params.min_tokens:
            logits[:, list(stops)] = -torch.inf
        token = ops.sample(
            logits,
            column(params.temperature, torch.float32),
            column(params.top_k, torch.int32),
            column(params.top_p, torch.float32),
            column(params.min_p, torch.float32),
            column((params.seed or 0) + index, torch.int64),
            column(len(ids), torch.int64),
        )
        ids.append(int(token))
        if ids[-1] in stops:
            break
    return ids[len(prompt) :]


def prompt(seed, length):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB - 1, (length,), generator=generator).tolist()


def greedy(max_tokens=8, **more):
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, **more)


def request(ids, params=None, **more):
    return Request(ids, params or greedy(), **more)
