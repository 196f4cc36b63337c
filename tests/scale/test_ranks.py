"""Ranks together are one rank: the same weights in parts, the same logits, the same tokens with every method."""

import threading
from pathlib import Path

import pytest
import torch
from decoder_harness import PagedRun, random_reference, relative_error, save, small_config

from slipstream import LLM, SamplingParams
from slipstream.asyncspade.mlp import QueryMLP
from slipstream.kernels.reference_predict import MLPWeights
from slipstream.models import checkpoint
from slipstream.models.parallel import Ranks
from slipstream.models.weights import load_model
from slipstream.scale.group import Group
from slipstream.types import ModelSpec

CPU = torch.device("cpu")
TOLERANCE = 1e-4
QWEN = {
    "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": 101, "hidden_size": 64,
    "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4,
    "head_dim": 16, "max_position_embeddings": 256, "initializer_range": 0.15, "eos_token_id": 100,
}  # fmt: skip
LLAMA = QWEN | {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "attention_bias": True, "mlp_bias": True,
    "tie_word_embeddings": True, "num_key_value_heads": 2,
}  # fmt: skip
SPARSE = {"budget": 32, "sink": 2, "recent": 8, "min_context": 32}
LEVELS = {"channels": 8, "block": 16, "blocks": 3}
METHODS = [
    "full",
    {"method": "window", **SPARSE},
    {"method": "quest", **SPARSE, "budget": 64, "block": 16},
    {"method": "double_sparsity", **SPARSE, "channels": 8},
    {"method": "two_level", **SPARSE, **LEVELS},
    {"method": "tova", "budget": 32},
    {"method": "asynctls", **SPARSE, **LEVELS},
    {"method": "asynctls", **SPARSE, **LEVELS, "offload": True, "host_kv": "8MiB", "lane": "thread"},
    {"method": "asyncspade", **SPARSE, **LEVELS},
    {"method": "asyncspade", **SPARSE, **LEVELS, "predictor": "analog", "lane": "thread"},
]


class Part(Ranks):
    """A rank that nobody answers."""

    def __init__(self, index, count):
        self.index, self.count = index, count


def on_ranks(count, folder, work):
    """``work(group)`` on so many threads; their results in the order of the ranks."""
    results = [None] * count

    def run(index):
        results[index] = work(Group(index, count, folder, CPU, 20.0))

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(40)
    assert None not in results, "a rank failed or hangs"
    return results


@pytest.mark.parametrize("count", [2, 3, 4])
def test_sums_joins_and_least(tmp_path, count):
    def work(group):
        own = torch.arange(6, dtype=torch.bfloat16).view(2, 3) + 10 * group.index
        return group.join(own), group.sum(own.clone()), group.least(7 - group.index), group.share(10)

    results = on_ranks(count, tmp_path, work)
    alone = [torch.arange(6, dtype=torch.bfloat16).view(2, 3) + 10 * index for index in range(count)]
    for joined, summed, least, _ in results:
        assert torch.equal(joined, torch.cat(alone, dim=1))
        assert torch.equal(summed, sum(alone)) and least == 8 - count
    assert [i for *_, share in results for i in range(10)[share]] == list(range(10))


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "llama"])
def test_each_rank_reads_its_part_of_the_files_only(tmp_path, monkeypatch, model_type):
    bias = {"attention_bias": True, "mlp_bias": True} if model_type == "llama" else {}
    reference = random_reference(small_config(model_type, 4, 2, head_dim=16, **bias))
    directory, read = save(reference, tmp_path), []
    original = checkpoint.Checkpoint._read

    def counted(self, source, cut):
        piece = original(self, source, cut)
        read.append((source.name, piece.numel(), torch.Size(source.shape).numel()))
        return piece

    monkeypatch.setattr(checkpoint.Checkpoint, "_read", counted)
    parts = [load_model(directory, device="cpu", dtype="bfloat16", ranks=Part(i, 2))[0] for i in range(2)]
    assert {name for name, part, whole in read if part == whole and whole > 64} == set()
    assert sum(part for _, part, _ in read) < 1.05 * sum(whole for *_, whole in read) / 2
    whole, _ = load_model(directory, device="cpu", dtype="bfloat16")
    assert torch.equal(torch.cat([p.embedding for p in parts])[:101], whole.embedding)
    assert not parts[1].embedding[50:].any()  # 101 rows are 51 and 50
    for layer, *own in zip(whole.layers, *(p.layers for p in parts), strict=True):
        for name in ("output", "down"):
            assert torch.equal(torch.cat([getattr(o, name).weight for o in own], 1), getattr(layer, name).weight)
        gates = [o.gate_up.weight.chunk(2) for o in own]
        assert torch.equal(torch.cat([g[0] for g in gates] + [g[1] for g in gates]), layer.gate_up.weight)
        heads = [o.qkv.weight.split([32, 16, 16]) for o in own]
        assert torch.equal(torch.cat([h[i] for i in range(3) for h in heads]), layer.qkv.weight)
        if layer.down.bias is not None:
            assert torch.equal(own[0].down.bias, layer.down.bias) and not own[1].down.bias.any()


@pytest.mark.parametrize("config", [QWEN, LLAMA], ids=["qwen3", "llama"])
def test_dummy_weights_are_the_same_however_many_ranks_hold_them(config):
    whole, _ = load_model(config, device="cpu", dtype="bfloat16", load_format="dummy", seed=5)
    parts = [
        load_model(config, device="cpu", dtype="bfloat16", load_format="dummy", seed=5, ranks=Part(i, 2))[0]
        for i in range(2)
    ]
    found = torch.cat([part.layers[1].down.weight for part in parts], dim=1)
    assert torch.equal(found, whole.layers[1].down.weight)
    assert torch.equal(torch.cat([part.head.weight for part in parts])[:101], whole.head.weight)


@pytest.mark.parametrize("model_type,heads", [("qwen2", 2), ("qwen3", 4), ("llama", 4)])
@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_those_of_one_rank(tmp_path, model_type, heads, tied):
    bias = {"attention_bias": True, "mlp_bias": True} if model_type == "llama" else {}
    reference = random_reference(small_config(model_type, 4, heads, head_dim=16, tie_word_embeddings=tied, **bias))
    directory = save(reference, tmp_path / "model")
    (tmp_path / "ranks").mkdir()
    steps = [{0: [5, 9, 100, 50, 51, 0], 1: [3]}, {1: [7, 8, 52], 0: [99]}, {0: [1], 1: [2]}]

    def logits(ranks):
        model, spec = load_model(directory, device="cpu", ranks=ranks)
        run = PagedRun(model, spec, 2)
        return [row for step in steps for row in run.step(step)]

    expected = logits(None)
    for found in on_ranks(2, tmp_path / "ranks", logits):
        for own, other in zip(found, expected, strict=True):
            assert own.is_contiguous() and relative_error(own, other) < TOLERANCE


def answers(model, **options):
    """Greedy, sampled, forked, scored and forced tokens, on pages so few that chains are preempted."""
    prompts = [[(7 * i + 3 * j) % 99 for j in range(20 + 20 * i)] for i in range(4)]
    common = {"max_tokens": 14, "ignore_eos": True}
    params = [
        SamplingParams(temperature=0, logprobs=0, **common),
        SamplingParams(temperature=0.7, top_p=0.9, seed=3, n=2, **common),
        SamplingParams(temperature=0, prompt_logprobs=0, **common),
        SamplingParams(temperature=0.9, min_p=0.05, top_k=30, seed=4, min_tokens=4, **common),
    ]
    given = [{"prompt_token_ids": ids} for ids in prompts]
    given[3]["dense_tokens"] = 76
    with LLM(
        model,
        device="cpu",
        page_size=16,
        max_num_seqs=4,
        max_batch_tokens=48,
        overlap=True,
        prefix_cache=True,
        **options,
    ) as llm:
        outputs = llm.generate(given, params)
        tokens = [chain.token_ids for output in outputs for chain in output.outputs]
        scores = [next(iter(entry.values())).logprob for entry in outputs[0].outputs[0].logprobs]
        scores += [next(iter(entry.values())).logprob for entry in outputs[2].prompt_logprobs if entry]
        llm.engine.table.check_integrity()
        return tokens, scores, llm.stats(), llm.identity


CASES_OF_BOTH = [(QWEN, method) for method in METHODS] + [(LLAMA, METHODS[0]), (LLAMA, METHODS[5]), (LLAMA, METHODS[8])]


@pytest.mark.parametrize("case", range(len(CASES_OF_BOTH)))
def test_tokens_are_those_of_one_rank(thread_ranks, case):
    config, attention = CASES_OF_BOTH[case]
    num_bytes = 13 * 2 * 2 * 16 * 16 * 4 * config["num_key_value_heads"] if attention == "full" else 4 << 20
    options = {"load_format": "dummy", "seed": 2, "attention": attention, "kv_memory": num_bytes}
    tokens, scores, alone, identity = answers(config, **options)
    options["kv_memory"] //= 2  # of each rank
    split, split_scores, both, split_identity = answers(config, tensor_parallel_size=2, **options)
    assert split == tokens
    assert max(abs(a - b) for a, b in zip(scores, split_scores, strict=True)) < TOLERANCE
    assert split_identity == identity
    for name in ("steps", "preemptions", "sparse_rows", "asyncspade_predictions", "tova_evicted_tokens"):
        assert both.get(name) == alone.get(name)
    assert both["preemptions"] > 0 if attention == "full" else both.get("sparse_rows", 17) > 16
    assert both.get("tova_evicted_tokens", 101) > 100
    assert both.get("asynctls_bytes_in", 1) > 0


@pytest.mark.parametrize("model", ["slipstream-target", "slipstream-mla"])
def test_embedded_model_with_its_calibration(thread_ranks, model):
    """Its calibration file is of both KV heads, of which each rank takes its own, or of the one latent of all heads."""
    prompt = [(5 * i) % 1700 for i in range(400)]
    for attention in ({"method": "two_level", "budget": 128}, {"method": "asyncspade", "budget": 128}):
        found = []
        for count in (1, 2):
            with LLM(
                model, device="cpu", max_model_len=1024, kv_memory="32MiB",
                attention=attention | {"min_context": 128}, tensor_parallel_size=count,
            ) as llm:  # fmt: skip
                params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
                found.append(llm.generate([prompt, prompt[:50]], params))
                assert llm.stats()["sparse_rows"] >= 23
        one, two = ([o.outputs[0].token_ids for o in outputs] for outputs in found)
        assert one == two


def test_a_predictor_file_is_for_the_heads_of_all_ranks(thread_ranks, tmp_path):
    options = {"load_format": "dummy", "seed": 2, "kv_memory": "2MiB"}
    with LLM(QWEN, device="cpu", **options) as llm:
        identity = llm.identity
    shapes = (4, 16), (80, 12), (8, 12), (12, 16), (8, 16)
    generator = torch.Generator().manual_seed(1)
    parts = MLPWeights(*(torch.randn((2, *shape), generator=generator) * 0.3 for shape in shapes))
    QueryMLP(identity, True, parts).save(tmp_path / "p")
    attention = {"method": "asyncspade", **SPARSE, **LEVELS, "predictor": "mlp", "predictor_file": str(tmp_path / "p")}
    one, scores, alone, _ = answers(QWEN, attention=attention, **options)
    two, split, both, _ = answers(QWEN, attention=attention, tensor_parallel_size=2, **options)
    assert one == two and max(abs(a - b) for a, b in zip(scores, split, strict=True)) < TOLERANCE
    assert both["asyncspade_predictions"] == alone["asyncspade_predictions"] > 16


def test_what_cannot_be_split_is_refused_by_name(monkeypatch, thread_ranks):
    def refusal(model=QWEN, **options):
        with pytest.raises(ValueError) as caught:
            LLM(model, device="cpu", load_format="dummy", kv_memory="1MiB", **options)
        return str(caught.value)

    assert "does not divide the model's num_kv_heads = 4" in refusal(
        tensor_parallel_size=3, model=QWEN | {"num_attention_heads": 12}
    )
    assert "does not divide the model's intermediate_size = 97" in refusal(
        QWEN | {"intermediate_size": 97}, tensor_parallel_size=2
    )
    for attention, word in (
        ({"method": "asyncspade", "cache_rank": "127.0.0.1:1", "predictor": "last"}, "cache rank"),
    ):
        assert word in refusal(attention=attention, tensor_parallel_size=2)
    for bad in (0, -1, True, 1.5, "2"):
        assert "tensor_parallel_size must be a positive integer" in refusal(tensor_parallel_size=bad)
    assert "step_timeout must be a positive number" in refusal(step_timeout=0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    from slipstream.split import check_methods

    with pytest.raises(ValueError, match="needs as many GPUs from cuda:1 on, and torch sees 2 in all"):
        check_methods(2, None, torch.device("cuda:1"))


def test_a_calibration_needs_all_heads(thread_ranks):
    from slipstream import calibrate

    options = {"attention": {"method": "double_sparsity", **SPARSE, "channels": 8}, "tensor_parallel_size": 2}
    with LLM(QWEN, device="cpu", load_format="dummy", kv_memory="1MiB", **options) as llm:
        with pytest.raises(ValueError, match="calibrate with tensor_parallel_size=1"):
            calibrate(llm, [[1, 2, 3]])
    assert Path(llm.identity.name).name == "Qwen3ForCausalLM"


def test_ranks_share_the_host(monkeypatch):
    """Each plans at the same time as the others, before anybody has taken anything."""
    from slipstream.asynctls import config

    monkeypatch.setattr(config, "available_host_bytes", lambda: 64 << 20)
    spec = ModelSpec("x", 4, 64, 8, 8, 64, 100, 4096, torch.bfloat16)
    given = {"page_size": 64, "max_num_seqs": 8, "max_model_len": 4096, "device_bytes": 1 << 30}
    one, two = (config.plan_offload(config.AsyncTLS(offload=True), spec, num_ranks=n, **given) for n in (1, 2))
    assert one.host_bytes == 32 << 20 and two.host_bytes == 16 << 20
    with pytest.raises(ValueError, match="the host has only 33,554,432 bytes"):
        config.plan_offload(config.AsyncTLS(offload=True, host_kv="33MiB"), spec, num_ranks=2, **given)
