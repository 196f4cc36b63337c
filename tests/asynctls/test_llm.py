"""AsyncTLS through the doors that users take: ``LLM`` and the command line."""

from __future__ import annotations

import json
import time

import pytest
import torch

from slipstream import LLM, AsyncTLS, SamplingParams
from slipstream.cli import app
from slipstream.engine.request import Request

MODEL = {
    "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": 64, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 2048, "initializer_range": 0.3, "eos_token_id": 63,
}  # fmt: skip
LATENT = MODEL | {
    "model_type": "glm4_moe_lite", "architectures": ["Glm4MoeLiteForCausalLM"], "num_attention_heads": 5,
    "num_key_value_heads": 5, "head_dim": 8, "q_lora_rank": None, "kv_lora_rank": 24, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8, "v_head_dim": 12, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}  # fmt: skip
WIDE = LATENT | {"num_attention_heads": 20, "num_key_value_heads": 20, "kv_lora_rank": 512, "qk_rope_head_dim": 64}
CONFIGS = {"heads": MODEL, "latent": LATENT, "wide": WIDE | {"head_dim": 64, "initializer_range": 0.1}}
MODELS = ("heads", "latent")
SMALL = {"budget": 24, "blocks": 5, "block": 8, "channels": 8, "sink": 2, "recent": 3, "min_context": 0}
OFFLOAD = {"offload": True, "gpu_kv": "40MiB", "host_kv": "40MiB"}
PROMPTS = [[(11 * i + b) % 60 for i in range(length)] for b, length in enumerate((700, 31, 64, 5))]
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=1)


def answers(llm):
    outputs = [chain.outputs[0] for chain in llm.generate(PROMPTS, GREEDY)]
    pairs = [(out.token_ids, zip(out.token_ids, out.logprobs, strict=True)) for out in outputs]
    return [(tokens, [entry[token].logprob for token, entry in pair]) for tokens, pair in pairs]


def load(device="cpu", graphs=True, model="heads", **attention):
    return LLM(
        CONFIGS[model], load_format="dummy", device=device, page_size=16, max_num_seqs=4, max_batch_tokens=100,
        cuda_graphs=graphs, kv_memory=None if attention.get("offload") else "8MiB",
        attention=AsyncTLS(**SMALL, **attention),
    )  # fmt: skip


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("candidates", ("predicted", "previous"))
def test_offload_by_its_options(candidates, model, tmp_path):
    """The long prompt is prefilled chunk by chunk: the device has a stage of one layer, and slots of 10 blocks."""
    near = load(candidates=candidates, model=model)
    far = load(candidates=candidates, model=model, **OFFLOAD, host_file=str(tmp_path))
    assert answers(near) == answers(far)
    backend = far.engine.backend
    held = backend.hot.bytes + (2 if model == "heads" else 1) * backend.stage.k._buffers.numel() * 4
    assert held < far.pool.bytes / 2 and far.memory.bytes >= held
    stats = far.stats()
    assert stats["asynctls_bytes_in"] > 0 and stats["asynctls_transfer_s"] > 0 and stats["sparse_steps"] > 20
    backend.residency.check_integrity()
    far.close()
    near.close()


@pytest.mark.parametrize("model", MODELS)
def test_preempted_chains_find_their_pages_on_the_host(model):
    llm = load(**OFFLOAD, model=model)
    engine, preempt = llm.engine, llm.engine.scheduler.preempt
    step, count = engine.step, []

    def interrupted():
        count.append(1)
        if len(count) in (15, 30) and engine.scheduler.running:
            preempt(engine.scheduler.running[0])
        return step()

    engine.step = interrupted
    assert [len(tokens) for tokens, _ in answers(llm)] == [24] * 4
    stats = llm.stats()
    assert stats["preemptions"] > 1 and stats["cached_tokens"] > 600  # the long prompt was not computed anew
    engine.backend.residency.check_integrity()
    engine.table.check_integrity()


def test_bench_offload(tmp_path, capsys):
    result = tmp_path / "offload.json"
    sizes = ("--context", 300, "--batch", 1, "--steps", 4, "--max-model-len", 512, "--max-num-seqs", 2)
    method = ("--attention", "asynctls", "--budget", 128, "--blocks", 4, "--offload", "--gpu-kv", "64MiB")
    arguments = ["bench", "offload", "-m", "slipstream-draft", "--device", "cpu", *sizes, *method, "--json", result]
    app([str(argument) for argument in arguments], standalone_mode=False)
    rows = json.loads(result.read_text())["points"]
    assert [(row["method"], row["batch"]) for row in rows] == [
        ("full", 1), ("two_level", 1), ("asynctls", 1), ("asynctls", 2)
    ]  # fmt: skip
    assert all(row["tpot_ms"] > 0 for row in rows) and rows[-1]["mib_in"] > 0


@pytest.mark.gpu
@pytest.mark.parametrize(
    "model, candidates",
    [*((m, c) for m in MODELS for c in ("previous", "predicted", "union", "current")), ("wide", "union")],
)
def test_offload_changes_nothing_on_a_gpu(model, candidates):
    """Captured steps, copies on a stream of their own, KV in pinned memory. wide: the rows of GLM-4.7-Flash."""
    near, far = (load("cuda", candidates=candidates, model=model, **more) for more in ({}, OFFLOAD))
    began = time.perf_counter()
    assert answers(far) == answers(near)
    torch.cuda.synchronize()
    elapsed, stats = time.perf_counter() - began, far.stats()
    assert stats["graph_replays"] > 0 and far.pool.k.device.type == "cpu"
    assert 0 < stats["asynctls_transfer_s"] < elapsed and 0 < stats["asynctls_exposed_s"] < elapsed
    far.engine.backend.residency.check_integrity()


@pytest.mark.gpu
@pytest.mark.parametrize("model", MODELS)
def test_pooled_copies_change_nothing_on_a_gpu(model):
    """Eager both: a captured step runs padding rows, and products of another height may end in another bit."""
    twins = [load("cuda", False, model, **OFFLOAD, transfer=transfer) for transfer in ("gather", "pooled")]
    assert answers(twins[0]) == answers(twins[1])


@pytest.mark.gpu
@pytest.mark.parametrize("model", MODELS)
def test_no_step_synchronises(model):
    """Golden equality 7: prompts, mixed steps and captured decodes are launched without waiting for the device."""
    llm = load("cuda", **OFFLOAD, model=model)
    answers(llm)  # everything is compiled, captured and calibrated
    engine = llm.engine
    ticket = type(engine.runner._back.submit(dict))
    read, patch = ticket.block, pytest.MonkeyPatch()

    def allowed(self):
        torch.cuda.set_sync_debug_mode("default")
        try:
            return read(self)
        finally:
            torch.cuda.set_sync_debug_mode("error")

    for prompt in PROMPTS:
        engine.add(Request(prompt[::-1], SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)))
    patch.setattr(ticket, "block", allowed)
    torch.cuda.set_sync_debug_mode("error")
    try:
        while engine.has_work():
            engine.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        patch.undo()
    assert llm.stats()["asynctls_prefetched"] > 0
