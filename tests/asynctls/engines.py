"""Twin engines over a tiny decoder: one with KV on the host, one without; and a random life for both."""

from __future__ import annotations

import random
import time

import torch
from tiny_decoder import CONFIG, tiny_model

from slipstream import AsyncTLS, SamplingParams
from slipstream.asynctls.assembly import assemble
from slipstream.asynctls.backend import OffloadBackend
from slipstream.asynctls.offload import HostPool, Stage
from slipstream.attention.calibration import Calibration, ModelIdentity
from slipstream.attention.dense import DenseBackend
from slipstream.attention.expanded import ExpandedPrompts
from slipstream.engine.engine import Engine, EngineConfig
from slipstream.engine.request import Request
from slipstream.kernels.ops import stored
from slipstream.kvcache.index import KeyIndex
from slipstream.kvcache.pool import KVPool
from slipstream.models.weights import load_model
from slipstream.overlap import ThreadLane

SMALL = {"budget": 11, "blocks": 4, "block": 4, "channels": 8, "sink": 2, "recent": 3, "min_context": 0}
PAGE, STAGE_PAGES = 8, 32
CPU = torch.device("cpu")
LATENT = CONFIG | {
    "model_type": "glm4_moe_lite", "architectures": ["Glm4MoeLiteForCausalLM"], "num_attention_heads": 5,
    "num_key_value_heads": 5, "head_dim": 8, "q_lora_rank": None, "kv_lora_rank": 24, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8, "v_head_dim": 12, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}  # fmt: skip


def latent_model():
    """(network, spec) of one cache row for five heads, whose prompts are attended in expanded form."""
    network, spec = load_model(LATENT, device="cpu", dtype="float32", load_format="dummy", seed=3)
    assert spec.num_kv_heads == 1 and spec.value_dim == 24
    return network, spec


class JitterLane(ThreadLane):
    """A thread that is late at random: order is kept, nothing else."""

    def __init__(self, seed=0):
        super().__init__("jitter")
        self._random = random.Random(seed)

    def submit(self, work, *args):
        return super().submit(self._late, work, *args)

    def _late(self, work, *args):
        time.sleep(self._random.choice([0, 0, 0, 1e-4, 1e-3]))
        return work(*args)


def make(
    offload,
    *,
    model=tiny_model,
    num_pages=48,
    seats=4,
    lane=None,
    step_tokens=24,
    gate=0,
    overlap=False,
    online=False,
    **more,
):
    network, spec = model()
    config = AsyncTLS(**{**SMALL, **more}, offload=offload)
    stage = Stage(spec, STAGE_PAGES, PAGE, seats, CPU) if offload else None
    shape = (spec.num_layers, num_pages, spec.num_kv_heads, PAGE, spec.head_dim)
    pool = HostPool(spec, num_pages, PAGE, CPU) if offload else KVPool(*shape, spec.dtype, value_dim=spec.value_dim)
    index = KeyIndex(pool, config.index)
    sums = Calibration(ModelIdentity.of("tiny", spec, ""), CPU) if online else None
    guess = Echo() if config.candidates == "predicted" else None
    dense, latent = DenseBackend(stage or pool, spec), network.config.latent
    if latent is not None:
        dense = ExpandedPrompts(dense, stage or pool, spec, latent.nope, latent.value)
        network.set_prompt_form(dense)
    backend = assemble(
        config, pool, spec, index, dense, gate, seats, stage=stage, online=sums, predictor=guess, lane=lane
    )
    backend.prefill_pages = STAGE_PAGES  # so that both schedule alike
    settings = EngineConfig(max_num_seqs=seats, max_batch_tokens=step_tokens, overlap=overlap)
    return Engine(network, spec, pool, backend, settings)


class Echo:
    """A predictor that looks at a query's mirror image: another query than the step's, and always the same."""

    def reset(self, seats):
        pass

    def advance(self, seats, positions):
        pass

    def step(self, layer, q, seats, positions):
        return q.flip(-1)


def check(engine):
    """Tables and residency are whole, and every slot holds what its page holds on the host, byte for byte."""
    engine.table.check_integrity()
    backend = engine.backend
    if not hasattr(backend.selector, "residency"):
        return
    residency = backend.selector.residency
    residency.check_integrity()
    if not isinstance(backend, OffloadBackend):
        return
    hot, pool = backend.hot, backend.pool
    for layer in range(pool.num_layers):
        for near, far in zip(stored(*hot.layer(layer)), stored(*pool.layer(layer)), strict=True):
            blocks = far.unflatten(2, (residency.per_page, residency.block)).transpose(1, 2).flatten(0, 1)
            for head, keys in enumerate(residency.slots.key_of[layer]):
                slots = (keys >= 0).nonzero().squeeze(1)
                rows = near[hot.first + head * residency.num_slots + slots]
                assert torch.equal(rows, blocks[keys[slots].long(), head]), "a slot is not what the host holds"


def random_request(rng, done):
    """A prompt that may share its beginning with others; to be generated, scored, or forced in part."""
    stem = [(7 * i + 3) % 61 for i in range(60)]
    ids = stem[: rng.randrange(1, 50)] + [rng.randrange(61)] * rng.randrange(3)
    if done and rng.random() < 0.2:
        one = rng.choice(done)
        ids = [*one.prompt_ids, *one.completions[0].token_ids] if one.generate and one.completions else ids
        ids = ids[:90]
    if rng.random() < 0.1 and len(ids) > 2:
        return Request.to_score(ids[: len(ids) // 2], ids[len(ids) // 2 :])
    params = SamplingParams(
        n=rng.choice([1, 1, 1, 2, 3]), temperature=rng.choice([0.0, 0.9]), seed=rng.randrange(99),
        max_tokens=rng.randrange(1, 40), ignore_eos=True,
    )  # fmt: skip
    return Request(ids, params, dense_tokens=rng.randrange(1, len(ids) + 1) if rng.random() < 0.2 else None)


def live(engines, num_requests, seed, every=7):
    """The same random life for all engines, step by step; returns what each request drew, by engine."""
    rng = random.Random(seed)
    states = [rng.getstate()] * len(engines)
    results = []
    for which, engine in enumerate(engines):
        rng.setstate(states[which])
        results.append(_live(engine, num_requests, rng, every))
    return results


def _live(engine, num_requests, rng, every):
    requests, steps = [], 0
    while len(requests) < num_requests or engine.has_work():
        if len(requests) < num_requests and rng.random() < 0.5:
            requests.append(random_request(rng, requests[-5:]))
            engine.add(requests[-1])
        if requests and rng.random() < 0.04:
            engine.cancel(rng.choice(requests[-6:]).request_id)
        running = engine.scheduler.running
        if running and rng.random() < 0.04:
            engine.scheduler.preempt(rng.choice(running))
        engine.step()
        steps += 1
        assert steps < 400 * num_requests + 400, "the engine does not come to an end"
        if steps % every == 0:
            check(engine)
    check(engine)
    assert engine.table.num_used == 0 and not engine.scheduler.running and not engine.scheduler.waiting
    assert all(request.error is None for request in requests)
    return [([c.token_ids for c in request.completions], request.prompt_logprobs) for request in requests]
