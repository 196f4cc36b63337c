"""Numbers for Prometheus and for the page. vLLM's names where the meaning is vLLM's, ``slipstream_`` otherwise."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from slipstream.server.logs import LogHandler
from slipstream.types import RequestMetrics

_FINE_S = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)
_COARSE_S = (*_FINE_S, 5, 7.5, 10, 20, 40, 80, 160, 320, 640)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 100_000)
# engine statistics that only grow; the others are gauges
_COUNTERS = (
    "steps", "prefill_tokens", "decode_tokens", "cached_tokens", "finished_requests", "preemptions", "copied_pages",
    "graph_replays", "eager_steps",
)  # fmt: skip


class Metrics:
    """One registry per server. stats: the engine's statistics, asked at every scrape. Labels: the model's name only,
    and the finish reason, route or status where the name says so."""

    def __init__(self, model: str, stats: Callable[[], dict[str, Any]]) -> None:
        self.registry = CollectorRegistry()
        self._model, self._stats = model, stats
        self.recent: dict[str, deque[float]] = {"ttft_ms": deque(maxlen=256), "tpot_ms": deque(maxlen=256)}
        self.http = Counter("slipstream_http_requests", "By status.", ["route", "status"], registry=self.registry)

        def one(kind: Any, name: str, text: str, *labels: str, **more: Any) -> Any:
            made = kind(f"vllm:{name}", text, ["model_name", *labels], registry=self.registry, **more)
            return made if labels else made.labels(model)

        self._prompt_tokens = one(Counter, "prompt_tokens", "Prompt tokens of requests that began to answer.")
        self._new_tokens = one(Counter, "generation_tokens", "Tokens generated.")
        self._ends = one(Counter, "request_success", "Chains by the reason of their end.", "finished_reason")
        seconds = {"buckets": _COARSE_S}
        self._ttft = one(Histogram, "time_to_first_token_seconds", "From arrival.", **seconds)
        self._itl = one(Histogram, "inter_token_latency_seconds", "Between tokens of streams.", buckets=_FINE_S)
        self._tpot = one(
            Histogram, "request_time_per_output_token_seconds", "Mean of each request after its first token.",
            buckets=_FINE_S,
        )  # fmt: skip
        self._e2e = one(Histogram, "e2e_request_latency_seconds", "From arrival to the last token.", **seconds)
        self._prompt_len = one(Histogram, "request_prompt_tokens", "Prompt tokens per request.", buckets=_TOKENS)
        self._new_len = one(Histogram, "request_generation_tokens", "Tokens per chain.", buckets=_TOKENS)
        self.registry.register(self)  # type: ignore[arg-type]

    # -- what the routes tell

    def gap(self, seconds: float) -> None:
        """The time between two tokens of one chain on a stream."""
        self._itl.observe(seconds)

    def began(self, num_prompt: int) -> None:
        self._prompt_tokens.inc(num_prompt)
        self._prompt_len.observe(num_prompt)

    def grew(self, num_tokens: int) -> None:
        self._new_tokens.inc(num_tokens)

    def chain_ended(self, reason: str, num_tokens: int) -> None:
        self._ends.labels(self._model, reason).inc()
        self._new_len.observe(num_tokens)

    def ended(self, times: RequestMetrics) -> None:
        if times.ttft_s is not None:
            self._ttft.observe(times.ttft_s)
            self.recent["ttft_ms"].append(1e3 * times.ttft_s)
        if times.tpot_s is not None:
            self._tpot.observe(times.tpot_s)
            self.recent["tpot_ms"].append(1e3 * times.tpot_s)
        if times.finished_s is not None:
            self._e2e.observe(times.finished_s - times.arrival_s)

    # -- what others read

    def text(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self.registry)

    def medians(self) -> dict[str, float | None]:
        """Of the last 256 requests."""
        return {name: statistics.median(values) if values else None for name, values in self.recent.items()}

    def collect(self) -> Iterator[Metric]:
        """The engine's statistics as they are now (called by the registry at every scrape)."""
        stats = self._stats()
        pages = stats["pages_used"] + stats["pages_cached"] + stats["pages_free"]
        named = {
            "vllm:num_requests_running": stats["running"],
            "vllm:num_requests_waiting": stats["waiting"],
            "vllm:kv_cache_usage_perc": stats["pages_used"] / max(1, pages),
            "vllm:num_preemptions_total": stats["preemptions"],
            "vllm:prefix_cache_hits_total": stats["cached_tokens"],
            "vllm:prefix_cache_queries_total": stats["cached_tokens"] + stats["prefill_tokens"],
        }
        for name, value in named.items():
            yield self._family(name, value, name.endswith("_total"))
        lost = CounterMetricFamily("slipstream_lost_log_lines", "That could not be written (a full disk, say).")
        lost.add_metric([], LogHandler.lost)
        yield lost
        for name, value in stats.items():
            if isinstance(value, (int, float)):
                yield self._family(f"slipstream_{name}", value, name in _COUNTERS)

    def _family(self, name: str, value: float, is_counter: bool) -> Metric:
        kind: Any = CounterMetricFamily if is_counter else GaugeMetricFamily
        family = kind(name, "From the engine.", labels=["model_name"])
        family.add_metric([self._model], float(value))
        return family
