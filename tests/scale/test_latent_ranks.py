"""Models with a latent cache on several ranks: each attends with its own heads, and all select the same tokens."""

import pytest
import torch
from decoder_harness import PagedRun, relative_error, save
from latent_models import CASES, latent_config, latent_reference
from test_ranks import LEVELS, SPARSE, TOLERANCE, Part, answers, on_ranks

from slipstream import LLM, SamplingParams, build
from slipstream.models import checkpoint
from slipstream.models.weights import load_model

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4}
SPADE = {"method": "asyncspade", **SPARSE, **LEVELS}
TLS = {"method": "asynctls", **SPARSE, **LEVELS}
METHODS = [
    "full",
    {"method": "window", **SPARSE},
    {"method": "oracle", **SPARSE},
    {"method": "quest", **SPARSE, "budget": 64, "block": 16},
    {"method": "double_sparsity", **SPARSE, "channels": 8},
    {"method": "two_level", **SPARSE, **LEVELS},
    {"method": "tova", "budget": 32},
    SPADE,
    SPADE | {"predictor": "analog", "lane": "thread"},
    SPADE | {"predictor": "ridge", "confidence": 0.99, "repair": "select"},
    SPADE | {"predictor": "last", "confidence": 0.99, "repair": "dense"},
    TLS,
    TLS | {"candidates": "predicted"},
    TLS | {"offload": True, "gpu_kv": "8MiB"},
]


def glm(**fields):
    return latent_config("glm", **HEADS, max_position_embeddings=256, vocab_size=101, eos_token_id=100, **fields)


@pytest.fixture
def seen(monkeypatch):
    """The sets that each rank's backend attends to, by its first own head; and those ranks' specs."""
    made, found = build._build, {}

    def watched(*args, **options):
        parts = made(*args, **options)
        selector = getattr(parts.backend, "selector", None)
        if selector is None or parts.ranks.count == 1:
            return parts
        log, select = found.setdefault(parts.ranks.index, []), selector.select

        def kept(layer, query):
            selection = select(layer, query)
            rows = selection.rows if selection.rows is not None else slice(None)
            log.append((layer, query.clone(), selection.indices[rows].clone(), selection.counts[rows].clone()))
            return selection

        selector.select = kept
        return parts

    monkeypatch.setattr(build, "_build", watched)
    return found


def check_sets(found):
    """Both ranks have asked with the queries of all heads, and attended to the same tokens, to the last bit."""
    one, two = found[0], found[1]
    assert len(one) == len(two) > 20
    for own, other in zip(one, two, strict=True):
        assert own[0] == other[0] and own[1].shape[1] == 4
        assert all(torch.equal(a, b) for a, b in zip(own[1:], other[1:], strict=True))


@pytest.mark.parametrize("case", range(len(METHODS)))
def test_tokens_are_those_of_one_rank(thread_ranks, seen, case):
    attention = METHODS[case]
    options = {"load_format": "dummy", "seed": 2, "attention": attention, "kv_memory": "4MiB"}
    if attention == "full":  # few pages, so that chains are preempted; every rank has all latents
        options["kv_memory"] = 13 * 3 * 16 * 40 * 4
    tokens, scores, alone, identity = answers(glm(), **options)
    split, split_scores, both, split_identity = answers(glm(), tensor_parallel_size=2, **options)
    assert split == tokens
    assert max(abs(a - b) for a, b in zip(scores, split_scores, strict=True)) < TOLERANCE
    assert split_identity == identity
    method = attention if isinstance(attention, str) else attention["method"]
    for name in ("steps", "preemptions", "sparse_rows", "asyncspade_predictions", "asynctls_misses", "kv_pool_bytes"):
        assert both.get(name) == alone.get(name), name
    if method == "full":
        assert both["preemptions"] > 0
    elif method == "tova":
        assert both["tova_evicted_tokens"] == alone["tova_evicted_tokens"] > 100
    else:
        assert both["sparse_rows"] > 16
        check_sets(seen)
    if method == "asynctls" and "offload" in attention:
        assert both["asynctls_misses"] > 0 and both["asynctls_bytes_in"] > 0
    if "confidence" in attention:
        assert both["asyncspade_repaired"] == alone["asyncspade_repaired"] > 0


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_one_rank(tmp_path, name):
    directory = save(latent_reference(latent_config(name, **HEADS)), tmp_path / "model")
    (tmp_path / "ranks").mkdir()
    steps = [{0: [5, 9, 100, 50, 51, 0], 1: [3]}, {1: [7, 8, 52], 0: [99]}, {0: [1], 1: [2]}]

    def logits(ranks):
        model, spec = load_model(directory, device="cpu", ranks=ranks)
        run = PagedRun(model, spec, 2)
        attend = run.backend.attend
        run.backend.attend = lambda layer, q: attend(layer, spec.own(q))
        return [row for step in steps for row in run.step(step)]

    expected = logits(None)
    for found in on_ranks(2, tmp_path / "ranks", logits):
        for own, other in zip(found, expected, strict=True):
            assert own.is_contiguous() and relative_error(own, other) < TOLERANCE


@pytest.mark.parametrize("name", ["glm", "v2, full query, groups"])
def test_each_rank_reads_its_part_of_the_files_only(tmp_path, monkeypatch, name):
    """What makes queries and latents is on every rank; outputs, MLPs, experts and vocabulary are shared out."""
    directory, read = save(latent_reference(latent_config(name, **HEADS)), tmp_path), []
    original = checkpoint.Checkpoint._read

    def counted(self, source, cut):
        piece = original(self, source, cut)
        read.append((source.name, piece.numel(), torch.Size(source.shape).numel()))
        return piece

    monkeypatch.setattr(checkpoint.Checkpoint, "_read", counted)
    parts = [load_model(directory, device="cpu", dtype="bfloat16", ranks=Part(i, 2)) for i in range(2)]
    for name, part, size in read:
        if any(word in name for word in ("o_proj", "up_proj", "gate_proj", "down_proj", "embed", "lm_head")):
            assert abs(part - size / 2) <= (32 if "embed" in name or "lm_head" in name else 0), name  # 101 rows
        else:
            assert part == size, name
    whole, spec = load_model(directory, device="cpu", dtype="bfloat16")
    assert spec.own_heads is None and [part[1].own_heads for part in parts] == [(0, 2), (2, 4)]
    layers = [model.layers[2] for model, _ in parts]
    mine, all_of = [layer.mlp for layer in layers], whole.layers[2].mlp
    for expert, (gate_up, down) in enumerate(all_of.each):
        assert torch.equal(torch.cat([mlp.each[expert][1].weight for mlp in mine], 1), down.weight)
        gates = [mlp.each[expert][0].weight.chunk(2) for mlp in mine]
        assert torch.equal(torch.cat([gate[i] for i in range(2) for gate in gates]), gate_up.weight)
    assert torch.equal(torch.cat([mlp.down.weight for mlp in mine], 1), all_of.down.weight)
    outputs = torch.cat([layer.output.weight for layer in layers], 1)
    assert torch.equal(outputs, whole.layers[2].output.weight)
    ups = torch.cat([layer.attention.value_up for layer in layers])
    assert torch.equal(ups, whole.layers[2].attention.value_up)


def test_what_does_not_divide_is_refused_by_name():
    for fields, word in (({}, "num_heads = 5"), (HEADS | {"moe_intermediate_size": 31}, "moe_intermediate_size = 31")):
        with pytest.raises(ValueError, match=f"does not divide the model's {word}"):
            load_model(latent_config("glm", **fields), device="cpu", load_format="dummy", ranks=Part(0, 2))


def test_embedded_model_on_two_processes():
    prompt = [(5 * i) % 1700 for i in range(200)]
    options = {
        "device": "cpu",
        "max_model_len": 512,
        "kv_memory": "64MiB",
        "attention": {"method": "tova", "budget": 96},
    }
    found = []
    for count in (1, 2):
        with LLM("slipstream-mla", tensor_parallel_size=count, **options) as llm:
            params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
            found.append(llm.generate([prompt, prompt[:50]], params)[0].outputs[0].token_ids)
            assert llm.stats()["tova_evicted_tokens"] > 100
    assert found[0] == found[1]
