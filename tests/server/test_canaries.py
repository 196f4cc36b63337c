"""Greedy answers of streams that share the engine are those of the same prompts alone, whatever the method.

The cache is too small for all, so chains are preempted in the meantime, and the gate so low that every method is at
work; counters say that both happened.
"""

import concurrent.futures
import random
import sys
from pathlib import Path

import pytest

from slipstream import LLM

sys.path.append(str(Path(__file__).parent.parent / "asyncspade"))
from ranks import MODEL  # noqa: E402

BUDGET = {"budget": 24, "recent": 8, "min_context": 32}
LEVELS = BUDGET | {"block": 8, "blocks": 6, "channels": 8}
OFFLOAD = LEVELS | {"offload": True, "host_kv": 40 * 4096}
UNION = ("asynctls_turned", "asynctls_returned", "asynctls_hits")
MOVED = (*UNION, "asynctls_misses", "asynctls_bytes_in", "asynctls_bytes_out")
# Method, its options, and the counters that say it was at work.
CANARIES = {
    "full": ({}, ()),
    "window": (BUDGET, ()),
    "oracle": (BUDGET, ()),
    "quest": (BUDGET | {"block": 8, "dense_layers": 0, "recent": 0}, ()),
    "double_sparsity": (BUDGET | {"channels": 8, "dense_layers": 0}, ()),
    "tova": ({"budget": 24}, ("tova_evicted_tokens", "pages_left")),
    "two_level": (LEVELS, ()),
    "asyncspade": (LEVELS, ("asyncspade_predictions",)),
    "asyncspade in time": (LEVELS | {"predictor": "analog", "window": 16}, ("asyncspade_predictions",)),
    "asynctls": (LEVELS, UNION),
    "asynctls offload": (OFFLOAD, MOVED),
    "asynctls offload, few slots": (OFFLOAD | {"slots": 1.25, "budget": 40}, MOVED),
}
ANSWER = {"max_tokens": 40, "temperature": 0, "ignore_eos": True, "return_token_ids": True}


def small_cache(method, options):
    """An engine with 40 pages of 8 tokens, whatever the method keeps beside them."""
    settings = {"load_format": "dummy", "device": "cpu", "page_size": 8, "max_model_len": 256}
    settings["max_num_seqs"] = 3 if "slots" in options else 8  # few slots must be fewer than blocks
    settings["attention"] = {"method": method} | options
    if "offload" in options:
        return LLM(MODEL, **settings)
    plan = LLM(MODEL, **settings, kv_memory="4MiB").memory
    return LLM(MODEL, **settings, kv_memory=plan.fixed_bytes + 40 * plan.page_bytes)


def tokens(events):
    return [token for event in events for token in event["choices"][0]["token_ids"]]


@pytest.mark.parametrize("name", CANARIES)
def test_answers_under_load_are_those_of_a_lone_request(serving, name):
    options, counters = CANARIES[name]
    dice = random.Random(4)
    prompts = [[dice.randrange(63) for _ in range(length)] for length in (140, 20, 31, 90, 60, 120)]
    with serving(small_cache(name.split()[0], options)) as live:
        alone = [live.completions(prompt=ids, **ANSWER)["choices"][0]["token_ids"] for ids in prompts]
        before = live.llm.stats()
        with concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:
            found = list(pool.map(lambda ids: tokens(live.events("/v1/completions", prompt=ids, **ANSWER)), prompts))
        live.at_rest()
        after = live.llm.stats()
    assert found == alone and {len(ids) for ids in found} == {40}
    if name not in ("full", "tova"):
        counters = ("sparse_rows", *counters)
    if name != "tova":  # whose chains decode without pages
        counters = ("preemptions", *counters)
    assert [counter for counter in counters if not after[counter] > before[counter]] == []
