"""Requests to tokens, step by step."""

from __future__ import annotations

import itertools
import random
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from slipstream.attention.backend import AttentionBackend
from slipstream.engine.chain import Chain
from slipstream.engine.decode import Model
from slipstream.engine.request import Event, Limits, Request
from slipstream.engine.results import Pending, Results
from slipstream.engine.runner import Runner
from slipstream.engine.scheduler import Plan, Scheduler
from slipstream.kvcache.pool import KVPool
from slipstream.kvcache.table import PageTable
from slipstream.types import Completion, Delta, FinishReason, Logprob, ModelSpec

# What torch raises when a device refuses work or memory. Anything else is a bug of ours and must not be survived.
_STEP_ERRORS = (RuntimeError, MemoryError)


@dataclass(frozen=True)
class EngineConfig:
    """How the engine runs.

    max_num_seqs: most chains at once (seats). max_model_len: most tokens of a chain; None is the model's own limit.
    max_batch_tokens: most tokens of a step; prompts are cut into chunks of what the decodes leave of it.
    overlap: launch a step before the tokens of the one before are read; None is True on CUDA. Same tokens either way.
    cuda_graphs: capture decode steps (on CUDA). prefix_cache: reuse the KV of equal prefixes.
    seed: where requests without a seed draw theirs.
    """

    max_num_seqs: int = 64
    max_model_len: int | None = None
    max_batch_tokens: int = 2048
    overlap: bool | None = None
    cuda_graphs: bool = True
    prefix_cache: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_model_len", "max_batch_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


class Engine:
    """Continuous batching over one model. Not thread-safe: all calls but :meth:`stats` come from one thread."""

    def __init__(
        self,
        model: Model,
        spec: ModelSpec,
        pool: KVPool,
        backend: AttentionBackend,
        config: EngineConfig | None = None,
        make_runner: Callable[..., Runner] = Runner,
    ) -> None:
        config = config or EngineConfig()
        on_cuda = pool.device.type == "cuda"
        max_model_len = min(config.max_model_len or spec.max_position, spec.max_position)
        self.config, self.spec, self.device = config, spec, pool.device
        self.overlap = on_cuda if config.overlap is None else config.overlap
        self.table = PageTable(pool.num_pages, pool.page_size, reuse=config.prefix_cache)
        self.scheduler = Scheduler(
            self.table,
            max_num_seqs=config.max_num_seqs,
            token_budget=config.max_batch_tokens,
            kv_in_seats=backend.holds_kv_in_seats,
            names_heirs=backend.uses_seats,
            prefill_pages=backend.prefill_pages,
            gate=backend.gate,
        )
        self.backend = backend
        self.runner = make_runner(
            model,
            pool,
            backend,
            max_num_seqs=config.max_num_seqs,
            max_model_len=max_model_len,
            capture=on_cuda and config.cuda_graphs,
        )
        self.limits = Limits(spec.vocab_size, max_model_len, pool.num_tokens, config.max_num_seqs, spec.eos_token_ids)
        self._random = random.Random(config.seed)
        self._arrivals = itertools.count()
        self._chains: dict[str, list[Chain]] = {}  # live ones, by request
        self._in_flight: Pending | None = None
        self._news: list[Event] = []
        self._counts: Counter[str] = Counter()
        self._host_s = self._wait_s = self._last_host_s = 0.0

    # -- requests

    def check(self, request: Request) -> None:
        """Raise ``ValueError`` for a request that cannot be served. Reads nothing that changes: any thread may ask."""
        self.limits.check(request)

    def add(self, request: Request) -> None:
        """Queue a request. Raises ``ValueError``, before any work, for one that cannot be served."""
        limit = self.limits.check(request)
        if request.params.stop and request.stop_check is None:
            raise ValueError(f"stop strings {request.params.stop} need text: give a stop_check, or use stop_token_ids")
        if request.request_id in self._chains:
            raise ValueError(f"request id {request.request_id!r} is in use: wait for its end or choose another")
        params, num_chains = request.params, request.params.n if request.generate else 1
        request.stop_ids = self.limits.stop_ids(params)
        seed = params.seed if params.seed is not None else self._random.getrandbits(62)
        arrival = next(self._arrivals)
        chains = [
            Chain(
                request,
                i,
                (arrival, i),
                list(request.prompt_ids),
                limit,
                seed + i,
                request.generate,
                salt=request.salt,
                num_dense=request.dense_tokens,
                num_fresh=self.backend.num_fresh,
            )
            for i in range(num_chains)
        ]
        leader, *leader.siblings = chains
        if request.logprobs_start is not None:
            request.prompt_logprobs = [None] if request.logprobs_start == 0 else []
            leader.wanted_from = max(1, request.logprobs_start)
        wants_logprobs = params.logprobs is not None
        request.completions = [
            Completion(i, logprobs=[] if wants_logprobs else None) for i in range(num_chains if request.generate else 0)
        ]
        self.scheduler.add(leader)
        self._chains[request.request_id] = chains

    def cancel(self, request_id: str) -> bool:
        """Stop a request now and free its pages; False when it is unknown or over. Its end is among the next events."""
        chains = self._chains.pop(request_id, None)
        if chains is None:
            return False
        request = chains[0].request
        for chain in chains:
            self.scheduler.finish(chain)
            if request.generate:
                self._news.append(Event(request, self._close(chain, "abort")))
        self._news.append(self._end(request))
        return True

    def has_work(self) -> bool:
        return bool(self._chains or self._in_flight or self._news)

    # -- steps

    def step(self) -> list[Event]:
        """Launch the next step, collect what is ready, and return the news."""
        began = time.perf_counter()
        plan = self.scheduler.schedule()
        launched = self._launch(plan) if plan else None
        ready, self._in_flight = (self._in_flight, launched) if self.overlap else (launched, None)
        if ready:
            self._collect(ready)
        self._clock(began)
        news, self._news = self._news, []
        return news

    def warmup(self) -> None:
        """Capture the CUDA graphs now instead of at first use."""
        self.runner.warmup()

    def cancel_all(self) -> None:
        """Cancel whatever waits or runs, and wait for the device to come to rest."""
        for request_id in list(self._chains):
            self.cancel(request_id)
        while self.has_work():
            self.step()

    def _launch(self, plan: Plan) -> Pending | None:
        try:
            return self.runner.launch(plan)
        except _STEP_ERRORS as error:
            self._fail(plan, error)
            return None

    def _collect(self, pending: Pending) -> None:
        waited = time.perf_counter()
        try:
            results = pending.read()
        except _STEP_ERRORS as error:
            self._fail(pending.plan, error)
            return
        finally:
            self._wait_s += time.perf_counter() - waited
        self._take_prompt(pending, results)
        logprobs = results.logprobs or itertools.repeat(None)
        for (chain, epoch), token, entry in zip(pending.samplers, results.tokens, logprobs, strict=False):
            if chain.epoch == epoch:
                self._take_token(chain, token, entry)

    def _take_prompt(self, pending: Pending, results: Results) -> None:
        """The chunks of a step are stored: share their pages, note scores, end what only wanted scores."""
        plan = pending.plan
        self._counts["steps"] += 1
        self._counts["decode_tokens"] += len(plan.decodes)
        self._counts["prefill_tokens"] += plan.num_prefill_tokens
        entries = iter(results.prompt)
        for scored in pending.scored:
            found = list(itertools.islice(entries, scored.num_rows))
            if scored.chain.epoch == scored.epoch:
                scored.chain.wanted_from = scored.start + scored.num_rows
                assert scored.chain.request.prompt_logprobs is not None
                scored.chain.request.prompt_logprobs += found
        for chunk in plan.chunks:
            chain = chunk.chain
            if chain.epoch != chunk.epoch:
                continue
            self._share(chain, chunk.end)
            if chunk.heirs and chain.in_seat and chain.lease is not None:
                self.scheduler.leave_pages(chain)
            if not chain.samples and chunk.end == chain.total:
                self._retire(chain)

    def _share(self, chain: Chain, num_tokens: int) -> None:
        """The KV of the first tokens is stored: others may use it, but for what ran as decode steps of a prompt."""
        if chain.lease is not None:
            is_cut = chain.num_dense is not None and chain.num_dense < chain.num_prompt
            dense = min(num_tokens, chain.num_dense or 0) if is_cut else num_tokens
            self.table.commit(chain.lease, chain.ids, dense)

    def _take_token(self, chain: Chain, token: int, logprobs: dict[int, Logprob] | None) -> None:
        """A chain's next token is known: store it, see whether the chain ends with it, and tell."""
        request, completion = chain.request, chain.request.completions[chain.index]
        self._share(chain, len(chain.ids))
        chain.ids.append(token)
        completion.token_ids.append(token)
        if completion.logprobs is not None and logprobs is not None:
            completion.logprobs.append(logprobs)
        metrics = request.metrics
        if metrics.first_token_s is None:
            metrics.first_token_s = time.perf_counter()
        metrics.num_generated = max(metrics.num_generated, len(completion.token_ids))
        reason, stop = self._ending(chain, completion, token)
        delta = Delta(chain.index, (token,), None if logprobs is None else (logprobs,), reason, stop)
        if reason is None:
            self._news.append(Event(request, delta))
            return
        completion.finish_reason, completion.stop_reason = reason, stop
        self._retire(chain, delta)

    def _ending(self, chain: Chain, completion: Completion, token: int) -> tuple[FinishReason | None, int | str | None]:
        request = chain.request
        if token in request.stop_ids:
            return "stop", token
        if request.stop_check is not None:
            stop = request.stop_check(chain.index, completion.token_ids)
            if stop:
                return "stop", stop if isinstance(stop, str) else None
        return ("length", None) if len(chain.ids) >= chain.limit else (None, None)

    # -- ends

    def _retire(self, chain: Chain, delta: Delta | None = None) -> None:
        """A chain is done; with the last one, so is its request."""
        request = chain.request
        self.scheduler.finish(chain)
        if chain.index == 0:
            request.metrics.num_cached_tokens = chain.num_cached
        chains = self._chains[request.request_id]
        chains.remove(chain)
        if chains:
            self._news.append(Event(request, delta))
            return
        del self._chains[request.request_id]
        self._news.append(self._end(request, delta))

    def _close(self, chain: Chain, reason: FinishReason) -> Delta:
        completion = chain.request.completions[chain.index]
        completion.finish_reason = reason
        return Delta(chain.index, (), finish_reason=reason)

    def _end(self, request: Request, delta: Delta | None = None) -> Event:
        request.metrics.finished_s = time.perf_counter()
        self._counts["requests"] += 1
        return Event(request, delta, finished=True)

    def _fail(self, plan: Plan, error: Exception) -> None:
        """A step died: so do the requests in it; the others go on."""
        traceback.clear_frames(error.__traceback__)  # its frames hold tensors of the size that was too much
        for request in _requests(plan.chains()):
            for chain in self._chains.pop(request.request_id, []):
                self.scheduler.finish(chain)
            request.error = error
            self._news.append(self._end(request))

    # -- numbers

    def _clock(self, began: float) -> None:
        elapsed = time.perf_counter() - began
        self._last_host_s = elapsed - self._wait_s
        self._host_s += self._last_host_s
        self._wait_s = 0.0

    def stats(self) -> dict[str, float]:
        """Counters since the start, and how things stand now; those of the attention method are among them.

        Host times are those outside waits for the device. pages_left: given back by chains that decode without pages.
        """
        counts, runner, scheduler, table = self._counts, self.runner, self.scheduler, self.table
        return {
            "steps": counts["steps"],
            "prefill_tokens": counts["prefill_tokens"],
            "decode_tokens": counts["decode_tokens"],
            "cached_tokens": scheduler.num_cached_tokens,
            "finished_requests": counts["requests"],
            "preemptions": scheduler.num_preemptions,
            "copied_pages": runner.num_copied_pages,
            "graph_replays": runner.num_graph_replays,
            "eager_steps": runner.num_eager_steps,
            "host_ms_mean": 1e3 * self._host_s / max(1, counts["steps"]),
            "host_ms_last": 1e3 * self._last_host_s,
            "pages_used": table.num_used,
            "pages_cached": table.num_cached,
            "pages_free": table.num_available - table.num_cached,
            "pages_left": scheduler.num_pages_left,
            "running": _num_chains(scheduler.running),
            "waiting": _num_chains(scheduler.waiting),
            **self.backend.stats(),
        }


def _num_chains(chains: Iterable[Chain]) -> int:
    """With those that begin when the prompt they share is prefilled. Other threads ask: of a copy, made at once."""
    return sum(1 + len(chain.siblings) for chain in list(chains))


def _requests(chains: Iterable[Chain]) -> list[Request]:
    """The requests of some chains, each once."""
    return list({chain.request.request_id: chain.request for chain in chains}.values())
