"""Every method by name on a tiny model with latent attention and experts: the same equalities as with GQA."""

from __future__ import annotations

import pytest
import torch

from slipstream import SamplingParams
from slipstream.attention.expanded import ExpandedPrompts

TINY_MLA = {
    "model_type": "glm4_moe_lite",
    "architectures": ["Glm4MoeLiteForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "q_lora_rank": None,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "rope_theta": 1000.0,
    "eos_token_id": 63,
}
PROMPTS = [[(7 * i + j) % 60 for i in range(n)] for j, n in enumerate((41, 3, 90, 64))]
GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, logprobs=1)
SMALL = {"sink": 2, "recent": 8, "min_context": 0}
BLOCKS = {"block": 4, "block_score": "minmax"}


def methods(budget: int) -> dict[str, dict]:
    return {
        "window": {"method": "window", "budget": budget, **SMALL},
        "oracle": {"method": "oracle", "budget": budget, **SMALL},
        "oracle peak": {"method": "oracle", "budget": budget, "aggregate": "peak", **SMALL},
        "quest": {"method": "quest", "budget": budget, "dense_layers": 0, **BLOCKS, **SMALL},
        "double_sparsity": {"method": "double_sparsity", "budget": budget, "dense_layers": 1, **SMALL},
        "two_level": {"method": "two_level", "budget": budget, "blocks": budget // 2, **BLOCKS, **SMALL},
        "two_level peak": {
            "method": "two_level", "budget": budget, "blocks": budget // 2, "aggregate": "peak", "channels": 12,
            "block": 8, "block_score": "minmax4x16", **SMALL,
        },
        "asynctls": tls(budget),
        "asynctls offload": tls(budget, offload=True, gpu_kv="16MiB", host_kv="16MiB", candidates="predicted"),
        "tova": {"method": "tova", "budget": budget},
        "asyncspade": spade("residual", budget),
        "asyncspade keys": spade("residual", budget, scoring="keys"),
        "asyncspade in time": spade("analog", budget),
    }  # fmt: skip


def tls(budget: int, **more) -> dict:
    return {"method": "asynctls", "budget": budget, "blocks": budget // 2, **BLOCKS, **SMALL, **more}


def spade(predictor: str, budget: int, **more) -> dict:
    own = {"predictor": predictor, "window": 8, "budget": budget, "blocks": budget // 2, **BLOCKS, **SMALL}
    return {"method": "asyncspade", **own, **more}


@pytest.fixture
def mla(tiny):
    return lambda **options: tiny(TINY_MLA, **({"page_size": 16, "max_num_seqs": 4} | options))


def answers(llm, params=GREEDY):
    return [chain for output in llm.generate(PROMPTS, params) for chain in output.outputs]


def assert_same(found, expected):
    assert [chain.token_ids for chain in found] == [chain.token_ids for chain in expected]
    for one, other in zip(found, expected, strict=True):
        ours, theirs = (
            [step[token].logprob for step, token in zip(c.logprobs, c.token_ids, strict=True)] for c in (one, other)
        )
        assert ours == pytest.approx(theirs, abs=2e-4)


@pytest.mark.parametrize("name", methods(256))
def test_a_budget_of_the_context_is_full_attention(mla, name):
    assert_same(answers(mla(attention=methods(256)[name])), answers(mla()))


@pytest.mark.parametrize("name", methods(32))
def test_a_small_budget_is_used(mla, name):
    llm = mla(attention=methods(32)[name])
    found = answers(llm)
    stats = llm.stats()
    if name == "tova":
        assert stats["tova_evicted_tokens"] > 0
    else:
        assert stats["sparse_rows"] > 100 and stats["density"] < 0.9
    assert len({tuple(chain.token_ids) for chain in found}) == len(PROMPTS)
    assert [c.token_ids for c in found] != [c.token_ids for c in answers(mla())], "nothing was left out"


@pytest.mark.parametrize("name", ["full", "two_level", "tova"])
def test_a_chain_does_not_depend_on_its_batch_or_its_pages(mla, name):
    """Alone, in a batch that is preempted, and from a cached prefix."""
    attention = methods(32).get(name, "full")
    if name == "two_level":  # online calibration depends on which prompt came first
        attention |= {"channels": 32}
    llm = mla(attention=attention)
    together = answers(llm)
    alone = [llm.generate([prompt], GREEDY)[0].outputs[0] for prompt in PROMPTS]
    assert_same(alone, together)
    if name == "full":  # elsewhere a preempted chain's tokens are computed anew densely
        tight = mla(attention=attention, kv_memory=13 * llm.memory.page_bytes)
        assert_same(answers(tight), together)
        assert tight.stats()["preemptions"] > 0


@pytest.mark.parametrize("name", ["full", "two_level", "tova"])
def test_expanded_prompts_give_what_absorbed_ones_do(mla, monkeypatch, name):
    """In chunks that mix with decode rows; every method hands its prompts on."""
    attention = methods(32).get(name, "full")
    options = {"max_batch_tokens": 40, "prefix_cache": False}
    expands, counts = ExpandedPrompts._pays, {True: 0, False: 0}

    def counted(self, batch):
        pays = expands(self, batch)
        counts[pays] += 1
        return pays

    monkeypatch.setattr(ExpandedPrompts, "_pays", counted)
    found = answers(mla(attention=attention, **options))
    assert min(counts.values()) > 0, "both forms are met"
    monkeypatch.setattr(ExpandedPrompts, "_pays", lambda self, batch: False)
    assert_same(found, answers(mla(attention=attention, **options)))


def without_mlps(llm):
    """The model, whose MLPs add nothing from now on."""
    for layer in llm.model.layers:
        layer.mlp = lambda x: torch.zeros_like(x)
    return llm


def test_what_is_foreseen_is_the_absorbed_query(mla):
    """Golden equality 3: where MLPs add nothing it is true, so the tokens are those of the synchronous method."""
    two_level = {**methods(32)["two_level"], "channels": 32}
    expected = answers(without_mlps(mla(attention=two_level)))
    llm = without_mlps(mla(attention=spade("residual", 32, channels=32, measure=1)))
    assert_same(answers(llm), expected)
    assert llm.stats()["asyncspade_overlap"] == 1.0 and llm.stats()["asyncspade_predictions"] > 200
    seen = mla(attention=spade("residual", 32, channels=32, measure=1))
    answers(seen)
    assert 0.3 < seen.stats()["asyncspade_overlap"] < 1


def test_an_oracle_in_time_is_the_synchronous_method(mla):
    """Golden equality 3, bit for bit."""
    expected = answers(mla(attention={**methods(32)["two_level"], "channels": 32}))
    found = answers(mla(attention=spade("oracle", 32, channels=32)))
    assert [(c.token_ids, c.logprobs) for c in found] == [(c.token_ids, c.logprobs) for c in expected]


@pytest.mark.parametrize("predictor", ["ridge", "residual"])
def test_any_lane_gives_the_tokens_of_the_inline_lane(mla, predictor):
    """Golden equality 4."""
    inline, thread = (answers(mla(attention=spade(predictor, 32, lane=lane))) for lane in ("inline", "thread"))
    assert [(c.token_ids, c.logprobs) for c in thread] == [(c.token_ids, c.logprobs) for c in inline]


def test_only_the_rotary_columns_of_a_window_are_turned(mla):
    """A prediction by "last" is the query before RoPE, turned to the next position: no other column changes."""
    llm = mla(attention=spade("last", 32))
    backend, seen = llm.engine.backend, []
    step = backend.predictor.step

    def watched(layer, q, seats, positions):
        seen.append((q, positions, step(layer, q, seats, positions)))
        return seen[-1][2]

    backend.predictor.step = watched
    llm.generate([PROMPTS[0]], GREEDY)
    assert seen
    q, positions, guess = seen[-1]
    assert torch.equal(guess[..., :24], q[..., :24])
    before, after = (_pairs(q, positions, llm), _pairs(guess, positions + 1, llm))
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-4)


def _pairs(q, positions, llm):
    """The rotary columns as complex numbers, turned back."""
    cos, sin = llm.model.cos_sin[positions].unsqueeze(1).chunk(2, -1)
    first, second = q[..., 24:].chunk(2, -1)
    return torch.complex(first, second) * torch.complex(cos, -sin)


def test_forks_share_a_latent_cache(mla):
    params = SamplingParams(n=3, temperature=1.0, seed=5, max_tokens=20, ignore_eos=True)
    llm = mla(attention=methods(256)["two_level"])
    assert [c.token_ids for c in answers(llm, params)] == [c.token_ids for c in answers(mla(), params)]


def test_the_memory_plan_counts_one_row_and_two_groups_of_labels(mla):
    llm = mla(attention={"method": "double_sparsity", "budget": 32, **SMALL})
    row, pages = 32 * 4, llm.pool.num_pages
    assert llm.pool.bytes == 3 * pages * 16 * row == pages * 16 * llm.spec.kv_bytes_per_token()
    assert llm.stats()["index_bytes"] == 3 * pages * 16 * (16 // 2 + 2 * 4)
    assert llm.memory.page_bytes == 16 * 3 * (row + 16 // 2 + 8)


def test_latent_and_rotary_channels_are_scaled_apart(mla):
    llm = mla(attention={"method": "double_sparsity", "budget": 32, "channels": 32, **SMALL})
    llm.generate([PROMPTS[0]], GREEDY)
    index, keys = llm.engine.backend.index, llm.pool.k[1, 1, 0]
    channels, labels, scales = index.labels(1)
    assert torch.equal(channels[0] >> 16, (torch.arange(32) >= 24).int())
    codes = torch.cat((labels[1, 0] & 15, labels[1, 0] >> 4), dim=-1).float()
    step, zero = scales[1, 0].float().unflatten(-1, (2, 2)).unbind(-1)
    for group, part in enumerate((slice(0, 24), slice(24, 32))):
        found = codes[:, part] * step[:, group : group + 1] + zero[:, group : group + 1]
        assert (found - keys[:, part]).abs().max() <= 0.51 * step[:, group].max() + 1e-3


ON_A_DEVICE = TINY_MLA | {
    "hidden_size": 256, "num_attention_heads": 20, "num_key_value_heads": 20, "q_lora_rank": 96, "kv_lora_rank": 512,
    "qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "v_head_dim": 64, "moe_intermediate_size": 64,
    "n_routed_experts": 8, "max_position_embeddings": 1024, "initializer_range": 0.05, "dtype": "bfloat16",
}  # fmt: skip
LARGER = {"dtype": "bfloat16", "kv_memory": "256MiB", "page_size": 64, "max_num_seqs": 4}


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["full", *methods(32)])
def test_captured_steps_give_the_tokens_of_eager_ones(tiny, name):
    """In bfloat16, with one launch for all experts: the same kernels, so the same bits."""
    attention = methods(32)[name] | ({"channels": 32} if "two_level" in name else {}) if name != "full" else "full"
    found = []
    for graphs in (True, False):
        llm = tiny(ON_A_DEVICE, attention=attention, cuda_graphs=graphs, kernels="triton", device="cuda", **LARGER)
        found.append([(chain.token_ids, chain.logprobs) for chain in answers(llm)])
        assert (llm.stats()["graph_replays"] > 20) == graphs
    assert found[0] == found[1]


@pytest.mark.gpu
def test_flashinfer_gives_the_scores_of_our_kernels(tiny):
    """Prompts, then captured steps, of 20 heads."""
    pytest.importorskip("flashinfer")
    ours, theirs = (tiny(ON_A_DEVICE, kernels=kernels, device="cuda", **LARGER) for kernels in ("triton", "flashinfer"))
    tokens = ours.generate([PROMPTS[2]], GREEDY)[0].outputs[0].token_ids
    first, second = (llm.score(PROMPTS[2], tokens) for llm in (ours, theirs))
    assert sum(abs(a - b) for a, b in zip(first, second, strict=True)) < 0.1 * len(tokens)
    before = theirs.stats()["graph_replays"]
    assert theirs.generate([PROMPTS[2]], GREEDY)[0].outputs[0].token_ids[:8] == tokens[:8]
    assert theirs.stats()["graph_replays"] > before
