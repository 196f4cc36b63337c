"""Two GPUs over NCCL: captured steps of both ranks give one rank's tokens, and a lost rank frees the other."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from slipstream import LLM, SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
CONFIG = {
    "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "hidden_size": 256, "num_hidden_layers": 3,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "intermediate_size": 512, "vocab_size": 997,
    "max_position_embeddings": 4096, "tie_word_embeddings": False, "initializer_range": 0.1, "eos_token_id": 996,
}  # fmt: skip
LATENT = CONFIG | {
    "model_type": "glm4_moe_lite", "architectures": ["Glm4MoeLiteForCausalLM"], "num_key_value_heads": 8,
    "q_lora_rank": 96, "kv_lora_rank": 512, "qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "v_head_dim": 64,
    "n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 64,
    "first_k_dense_replace": 1, "initializer_range": 0.05,
}  # fmt: skip
SPARSE = {"budget": 256, "min_context": 256}
BLOCKS = {**SPARSE, "blocks": 8}
METHODS = {
    "full": "full",
    "asyncspade": {"method": "asyncspade", **BLOCKS},
    "two_level": {"method": "two_level", **BLOCKS},
    "offload": {"method": "asynctls", **BLOCKS, "offload": True, "host_kv": "256MiB"},
    "tova": {"method": "tova", "budget": 256},
    "ridge": {"method": "asyncspade", **BLOCKS, "predictor": "ridge"},
    "quest": {"method": "quest", **SPARSE},
}
OF_LATENTS = ("full", "asyncspade", "two_level", "offload", "tova")


def load(count, config=CONFIG, **options):
    return LLM(
        config, device="cuda", load_format="dummy", seed=3, max_model_len=2048, max_num_seqs=8, kv_memory="256MiB",
        tensor_parallel_size=count, **options,
    )  # fmt: skip


def answers(count, **options):
    prompts = [[(7 * i + 3 * j) % 990 for j in range(40 + 290 * i)] for i in range(5)]
    common = {"max_tokens": 40, "ignore_eos": True}
    params = [SamplingParams(temperature=0, logprobs=0, **common) for _ in prompts[:-1]]
    params.append(SamplingParams(temperature=0.8, seed=1, n=2, **common))
    with load(count, dtype="float32", kernels="triton", **options) as llm:
        outputs = llm.generate(prompts, params)
        assert llm.stats()["graph_replays"] > 30
        tokens = [chain.token_ids for output in outputs for chain in output.outputs]
        scores = [
            [next(iter(entry.values())).logprob for entry in output.outputs[0].logprobs] for output in outputs[:-1]
        ]
        return tokens, torch.tensor(scores), llm.stats()


@pytest.mark.parametrize(
    "config, name", [*((CONFIG, name) for name in METHODS), *((LATENT, name) for name in OF_LATENTS)],
    ids=[*METHODS, *(f"latent-{name}" for name in OF_LATENTS)],
)  # fmt: skip
def test_two_gpus_give_the_tokens_of_one(config, name):
    one, scores, alone = answers(1, config=config, attention=METHODS[name])
    two, split, both = answers(2, config=config, attention=METHODS[name])
    assert two == one
    # Labels have 4 bits: a last bit of a key may round one otherwise, and a token at a set's edge be in it or not.
    apart, is_smooth = (scores - split).abs(), name in ("full", "tova", "quest")
    assert apart.max() < (1e-4 if is_smooth else 0.1) and (apart < 1e-4).float().mean() > 0.9
    for name in ("graph_replays", "sparse_rows", "tova_evicted_tokens", "asyncspade_predictions"):
        assert both.get(name) == alone.get(name), name
    assert both.get("sparse_rows", 101) > 100 and both.get("tova_evicted_tokens", 101) > 100


@pytest.mark.parametrize("config", [CONFIG, LATENT], ids=["heads", "latent"])
def test_bfloat16_with_the_default_kernels_and_all_graphs_at_once(config):
    with load(2, config, dtype="bfloat16") as llm:
        llm.engine.warmup()
        replays = llm.stats()["graph_replays"]
        outputs = llm.generate([[1, 2, 3], [4, 5]], SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
        assert [len(output.outputs[0].token_ids) for output in outputs] == [20, 20]
        assert llm.stats()["graph_replays"] > replays


LOSE = """
import os, sys, time, torch
sys.path[:0] = [{here!r}, {sources!r}]
from test_gpus import load
from slipstream import SamplingParams
from slipstream.scale.company import RankLost

llm = load(2, step_timeout=20.0)
params = SamplingParams(temperature=0, max_tokens=1500, ignore_eos=True)
try:
    for seen, _ in enumerate(llm.stream([1, 2, 3], params)):
        if seen == 8:
            os.kill(llm._ranks.company._members[0].process.pid, {how})
            began = time.monotonic()
except RankLost as error:
    print(error, time.monotonic() - began)
llm.close()
torch.cuda.synchronize()  # nothing spins on this GPU
with load(1) as alone:
    alone.generate([[1, 2, 3]], SamplingParams(temperature=0, max_tokens=4))
print("free")
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_rank_frees_the_other(how):
    """In a process of its own: a device that stays busy would hold up every later test."""
    here = Path(__file__).parent
    script = LOSE.format(here=str(here), sources=str(here.parent.parent / "src"), how=int(how))
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=240, check=False)
    assert "exit code -9" in ended.stdout or "within 20 s" in ended.stdout, ended.stdout + ended.stderr
    assert ended.stdout.endswith("free\n") and ended.returncode == 0, ended.stdout + ended.stderr
