"""From a plan to device work: bring the seats up to date, launch the step, leave its results on their way back."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from slipstream.attention.backend import AttentionBackend
from slipstream.engine.chain import NULL_SEAT
from slipstream.engine.decode import BUCKETS, DecodeStep, Model
from slipstream.engine.mixed import MixedStep
from slipstream.engine.packet import Packet
from slipstream.engine.results import LogprobRows, Pending
from slipstream.engine.scheduler import Plan
from slipstream.engine.seats import Seats
from slipstream.kernels import ops
from slipstream.kvcache.pool import KVPool
from slipstream.overlap import InlineLane, Lane, StreamLane

_MAX_LOGIT_ROWS = 256  # of prompt log-probabilities at a time: bounds the memory of [R, V]


class Runner:
    """Launches steps of one model over one pool.

    capture: record decode-only steps as CUDA graphs, one per bucket of ``BUCKETS`` and variant of the backend, sharing
    one memory pool.
    Nothing here waits for the device; only ``Pending.read`` does.
    """

    def __init__(
        self,
        model: Model,
        pool: KVPool,
        backend: AttentionBackend,
        *,
        max_num_seqs: int,
        max_model_len: int,
        capture: bool,
    ) -> None:
        self._model, self._backend, self._pool = model, backend, pool
        self._device = pool.device
        on_cuda = self._device.type == "cuda"
        if capture and not on_cuda:
            raise ValueError(f"steps can be captured on a CUDA device only, not on {self._device}: pass capture=False")
        with torch.inference_mode():
            columns = -(-max_model_len // pool.page_size)
            self.seats = Seats(max_num_seqs, columns, self._device)
            self._seat_rows = torch.zeros(max_num_seqs, dtype=torch.int64, device=self._device)
        self._buckets = [*(b for b in BUCKETS if b < max_num_seqs), max_num_seqs] if capture else None
        self._graph_pool: Any | None = torch.cuda.graph_pool_handle() if capture else None
        # Kernels keep the priority that they are captured with: a step's own go before what a lane runs beside it.
        self._capture_stream = torch.cuda.Stream(self._device, priority=-1) if capture else None
        self._steps: dict[int, DecodeStep] = {}
        self._decode_seats: list[int] = []  # what is in _seat_rows
        # Results travel on a lane of their own: the next step does not wait for them.
        self._back: Lane = StreamLane(self._device) if on_cuda else InlineLane()
        self.num_graph_replays = self.num_eager_steps = self.num_copied_pages = 0

    # -- steps

    @torch.inference_mode()
    def launch(self, plan: Plan) -> Pending:
        """Start a step. On a CUDA device it returns while the step runs."""
        with self._on_device():
            self._pool.copy_pages(plan.copies)
            self.num_copied_pages += len(plan.copies)
            if plan.is_decode:
                return self._launch_decode(plan)
            pending = self._launch_mixed(plan)
            self._backend.finish()
            return pending

    def _on_device(self) -> AbstractContextManager[Any]:
        """Streams, graphs and kernels go to the current device, which need not be ours, and is each thread's own."""
        return torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()

    def _launch_decode(self, plan: Plan) -> Pending:
        known = sorted(plan.chunks, key=lambda chunk: not chunk.samplers)  # what nobody draws from goes last
        chains, lengths = [*plan.decodes, *(k.chain for k in known)], [*plan.lengths, *(k.end for k in known)]
        rows = [chain.seat for chain in chains]
        variant = self._backend.variant(lengths)
        step = self._step(len(rows), variant)
        packet = Packet()
        update = self.seats.stage(plan, packet)
        changed = rows != self._decode_seats
        place = packet.add(rows + [NULL_SEAT] * (step.bucket - len(rows)) if changed else ())
        news = [(k.chain.seat, k.chain.ids[k.start], k.start) for k in known]
        columns = [packet.add(column) for column in zip(*news, strict=True)]
        if len(packet):
            data = packet.send(self._device)
            self.seats.apply(update, data)
            if columns:
                self.seats.store(*(data[column] for column in columns))
            if changed:
                step.seat_rows.copy_(data[place])
                self._decode_seats = rows
                step.refresh_sampling()
        step.batch.seated = [chain.seat for chain in plan.seated]  # their prompts could not begin yet
        step.run(variant, lengths, [chain.pages for chain in chains])
        if step.batch.graph_key is None:
            self.num_eager_steps += 1
        else:
            self.num_graph_replays += 1
        assert step.logits is not None
        samplers = [*zip(plan.decodes, plan.epochs, strict=True), *(s for k in known for s in k.samplers)]
        tokens = step.tokens[: len(samplers)].clone()  # the next step overwrites its own
        return self._pending(plan, samplers, tokens, step.logits)

    def _launch_mixed(self, plan: Plan) -> Pending:
        packet = Packet()
        update = self.seats.stage(plan, packet)
        step = MixedStep(plan, self._pool.page_size, packet)
        data = packet.send(self._device)
        self.seats.apply(update, data)
        step.land(data, self.seats, self._backend.variant)
        self._decode_seats = []  # who decodes next is another set, or has other parameters
        self._backend.plan(step.batch)
        hidden = self._model.forward(step.batch, self._backend)
        prompt = self._score(hidden, step) if step.scored else None
        self.num_eager_steps += 1
        if not step.samplers:
            return self._pending(plan, [], None, None, step, prompt)
        logits = self._model.logits(hidden.index_select(0, step.batch.logit_rows))
        tokens = self.seats.sampling.pick(step.sample_seats).sample(logits, step.sample_lengths)
        self.seats.store(step.sample_seats, tokens, step.sample_lengths)
        return self._pending(plan, step.samplers, tokens, logits, step, prompt)

    # -- results

    def _pending(
        self,
        plan: Plan,
        samplers: list[Any],
        tokens: torch.Tensor | None,
        logits: torch.Tensor | None,
        step: MixedStep | None = None,
        prompt: LogprobRows | None = None,
    ) -> Pending:
        results: dict[str, Any] = {}
        rows: list[tuple[int, int]] = []
        if tokens is not None and logits is not None:
            results["tokens"] = tokens
            for row, (chain, _) in enumerate(samplers):
                num_top = chain.request.params.logprobs
                if num_top is not None:
                    rows.append((row, num_top))
            if rows:
                index = self._to_device([row for row, _ in rows])
                results["sampled"] = _logprobs(logits[index], tokens[index], max(k for _, k in rows))
        if prompt is not None:
            results["prompt"] = prompt
        ticket = self._back.submit(_to_host, results)
        return Pending(plan, ticket, samplers, rows, step.scored if step is not None else [])

    def _score(self, hidden: torch.Tensor, step: MixedStep) -> LogprobRows:
        """Log-probabilities of prompt tokens, a bounded number of logit rows at a time."""
        num_top = max(scored.num_top for scored in step.scored)
        parts = []
        for start in range(0, step.score_rows.numel(), _MAX_LOGIT_ROWS):
            rows = step.score_rows[start : start + _MAX_LOGIT_ROWS]
            targets = step.score_targets[start : start + _MAX_LOGIT_ROWS]
            parts.append(_logprobs(self._model.logits(hidden.index_select(0, rows)), targets, num_top))
        return LogprobRows(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def _to_device(self, values: Sequence[int]) -> torch.Tensor:
        packet = Packet()
        place = packet.add(values)
        return packet.send(self._device)[place]

    # -- captured steps

    def _step(self, num_rows: int, variant: int) -> DecodeStep:
        bucket = num_rows if self._buckets is None else next(b for b in self._buckets if b >= num_rows)
        step = self._steps.get(bucket)
        if step is None:
            step = self._steps[bucket] = DecodeStep(
                bucket,
                self._model,
                self._backend,
                self.seats,
                self._pool.page_size,
                self._seat_rows[:bucket],
                self._graph_pool,
                self._capture_stream,
            )
        if step.needs_capture(variant):
            self._decode_seats = []
            step.capture(variant)
        return step

    @torch.inference_mode()
    def warmup(self) -> None:
        """Capture every bucket and variant now, the largest first so that the others fit in its memory."""
        with self._on_device():
            for bucket in reversed(self._buckets or []):
                for variant in self._backend.variants:
                    self._step(bucket, variant)


def _logprobs(logits: torch.Tensor, tokens: torch.Tensor, num_top: int) -> LogprobRows:
    return LogprobRows(tokens, *ops.token_logprobs(logits, tokens, min(num_top, logits.shape[-1])))


def _to_host(results: dict[str, Any]) -> dict[str, Any]:
    """Copies of the results in (pinned) host memory. The originals stay in the ticket until the copies are done."""
    host = {name: _fetch(value) for name, value in results.items()}
    host["on_device"] = results
    return host


def _fetch(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_fetch(item) for item in value)
    if not value.is_cuda:
        return value
    pinned = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
    return pinned.copy_(value, non_blocking=True)
