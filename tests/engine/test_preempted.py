"""A chain of a sparse method that is preempted goes on as if nothing had happened: what it decoded is decoded again."""

import random

import pytest
import torch

from slipstream import LLM, SamplingParams
from slipstream.engine.request import Request

TINY = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "eos_token_id": 63,
}
BUDGET = {"budget": 24, "recent": 8, "min_context": 32}
LEVELS = {"block": 8, "blocks": 6, "channels": 8}
METHODS = {
    "window": {},
    "oracle": {},
    "quest": {"block": 8, "dense_layers": 0, "recent": 0},
    "double_sparsity": {"channels": 8, "dense_layers": 1},
    "two_level": LEVELS,
    "asyncspade": LEVELS,
    "asyncspade analog": LEVELS | {"predictor": "analog", "window": 16},
    "asyncspade ridge": {"predictor": "ridge", "window": 8, "scoring": "keys", "aggregate": "sum"},
    "asynctls previous": LEVELS | {"candidates": "previous"},
    "asynctls predicted": LEVELS | {"candidates": "predicted", "window": 16},
    "asynctls offload": LEVELS | {"candidates": "previous", "offload": True, "host_kv": "1MiB"},
}
LENGTHS = (20, 31, 60)  # on both sides of the gate
DEVICE = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def run(llm, *prompts, preempts=0.0):
    """(tokens, their log-probabilities) of prompts that run together; chains are preempted as a dice says."""
    dice, params = random.Random(1), SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=0)
    work = [Request(ids, params) for ids in prompts]
    for one in work:
        llm.engine.add(one)
    while llm.engine.has_work():
        llm.engine.step()
        running = [chain for chain in llm.engine.scheduler.running if len(chain.ids) > chain.num_prompt]
        if running and dice.random() < preempts:
            llm.engine.scheduler.preempt(dice.choice(running))
    assert all(one.error is None for one in work)
    return [(c.token_ids, [entry[t].logprob for t, entry in zip(c.token_ids, c.logprobs, strict=True)])
            for c in (one.completions[0] for one in work)]  # fmt: skip


@DEVICE
@pytest.mark.parametrize("method", METHODS)
def test_a_preempted_chain_draws_what_it_would_have_drawn(method, device):
    options = BUDGET | METHODS[method] | {"method": method.split()[0]}
    llm = LLM(TINY, load_format="dummy", device=device, dtype="float32", page_size=8, kv_memory="2MiB",
              max_num_seqs=4, max_batch_tokens=64, attention=options, overlap=True)  # fmt: skip
    made = torch.Generator().manual_seed(3)
    stem, *prompts = (torch.randint(63, (n,), generator=made).tolist() for n in (140, *LENGTHS))
    run(llm, stem)  # labels are of channels that the first 128 tokens choose
    alone = [run(llm, ids)[0] for ids in prompts]
    before = llm.stats()
    found = run(llm, *prompts, preempts=0.15)
    stats = llm.stats()
    assert stats["preemptions"] - before["preemptions"] > 3
    for (tokens, values), (expected, exactly) in zip(found, alone, strict=True):
        assert tokens == expected
        assert values == pytest.approx(exactly, abs=1e-3 if device == "cuda" else 5e-5)
    assert stats["sparse_rows"] > 2 * before["sparse_rows"] > 0  # together more than alone: some ran again
    if device == "cuda":
        assert stats["graph_replays"] - before["graph_replays"] > 24  # tokens that are known go through graphs too
    llm.close()
