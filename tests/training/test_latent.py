"""The latent model: what training writes is what transformers and our own loader compute, and its first steps learn."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from slipstream.models.weights import load_model
from training.export import export
from training.latent import GROWTH, Gate, LatentDecoder, Mixture, latent_config, tiny_latent_config
from training.model import rotary_table, token_losses
from training.muon import Muon

sys.path.append(str(Path(__file__).parent.parent / "models"))
from decoder_harness import PagedRun  # noqa: E402

VOCAB = 1728


def rounded(seed: int = 0) -> LatentDecoder:
    """Weights that are exact in bfloat16, and large enough that logits and experts differ; computing in float32."""
    model = LatentDecoder(tiny_latent_config(VOCAB), seed).eval()
    with torch.no_grad():
        model.model.norm.weight.fill_(0.5)
        for module in model.modules():
            if isinstance(module, Gate):
                module.e_score_correction_bias.normal_(0, 0.1)
                module.weight.mul_(20)
    return model.to(torch.bfloat16).float()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    directory, model = tmp_path_factory.mktemp("latent"), rounded()
    export(directory, model.state_dict(), model.config)
    return directory, model


def packed(documents: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    lengths = [len(d) for d in documents]
    positions = torch.cat([torch.arange(n) for n in lengths])
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    return torch.cat(documents), positions, starts, torch.tensor([len(lengths), 40])


def documents() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, VOCAB, (n,), generator=generator) for n in (40, 1, 23)]


@torch.no_grad()
def test_training_transformers_and_our_loader_agree(exported):
    directory, ours = exported
    tokens, positions, starts, sizes = packed(documents())
    table = rotary_table(ours.config, 64, torch.device("cpu"))[positions]
    found = ours.logits(ours.hidden(tokens, table, starts, sizes)).split([40, 1, 23])
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    model, spec = load_model(directory, device="cpu", dtype="float32")
    assert spec.architecture == "Glm4MoeLiteForCausalLM" and (spec.head_dim, spec.value_dim) == (48, 32)
    engine = PagedRun(model, spec, 3).step({b: d.tolist() for b, d in enumerate(documents())})
    for document, training, served in zip(documents(), found, engine, strict=True):
        wanted = theirs(document[None]).logits[0]
        assert wanted.std() > 0.05, "logits that are all alike would prove nothing"
        for logits in (training, served):
            assert (logits - wanted).abs().max() < 2e-5 * wanted.abs().max()


def test_the_correction_is_stored_in_float32(exported):
    directory, model = exported
    stored = load_file(directory / "model.safetensors")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert stored[name].dtype == torch.float32 and torch.equal(stored[name], model.state_dict()[name])
    assert {tensor.dtype for key, tensor in stored.items() if key != name} == {torch.bfloat16}


def test_the_model_is_as_large_as_promised():
    config = latent_config(VOCAB)
    assert sum(p.numel() for p in LatentDecoder(config).parameters()) == config.num_parameters() < 8e6


@torch.no_grad()
def test_half_of_the_first_heads_look_back():
    model = LatentDecoder(latent_config(VOCAB))
    block, tokens = model.model.layers[0], torch.randint(0, VOCAB, (100,))
    table = rotary_table(model.config, 100, torch.device("cpu"))
    q, k, _ = block.self_attn.qkv(block.input_layernorm(model.model.embed_tokens(tokens)), table)
    scores = (q.transpose(0, 1) @ k.transpose(0, 1).mT) / 8
    weights = scores.masked_fill(torch.ones(100, 100).triu(1).bool(), -torch.inf).softmax(-1)
    before = weights.diagonal(-1, 1, 2).mean(-1)
    assert (before[:4] > 0.6).all() and (before[4:] < 0.1).all()


@torch.no_grad()
def test_a_mixture_is_the_sum_of_its_chosen_experts():
    mixture = rounded().model.layers[1].mlp
    assert isinstance(mixture, Mixture)
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(3))
    for row, found in zip(x, mixture(x), strict=True):
        scores = (mixture.gate.weight @ row).sigmoid()
        chosen = (scores + mixture.gate.e_score_correction_bias).topk(2).indices
        weights = 2.0 * scores[chosen] / scores[chosen].sum()
        wanted = mixture.shared_experts(row)
        for expert, weight in zip(chosen.tolist(), weights, strict=True):
            wanted = wanted + weight * mixture.experts[expert](row)
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-4)


def test_first_steps_learn_and_loads_are_evened_out():
    model = LatentDecoder(tiny_latent_config(64))
    gate = model.model.layers[1].mlp.gate
    optimiser, table = Muon(model, 0.02), rotary_table(model.config, 32, torch.device("cpu"))
    assert id(gate.weight) in {id(w) for group in optimiser.adam.param_groups for w in group["params"]}
    generator, losses = torch.Generator().manual_seed(0), []
    for _ in range(12):
        first = torch.randint(0, 64, (8, 1), generator=generator)
        tokens, positions, starts, _ = packed(list((first + 5 * torch.arange(32)) % 64))  # counts in fives
        hidden = model.hidden(tokens, table[positions], starts, torch.tensor([8, 32]))
        loss = token_losses(hidden, model.model.embed_tokens.weight, tokens.roll(-1))[0].view(8, 32)[:, :31].mean()
        loss.backward()
        optimiser.step(1.0)
        load, before = gate.load.clone(), gate.e_score_correction_bias.clone()
        assert int(load.sum()) == 8 * 32 * 2
        model.balance()
        moved = gate.e_score_correction_bias - before
        assert torch.equal(moved.sign(), (load.mean() - load).sign()) and not gate.load.any()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@torch.no_grad()
def test_queries_and_keys_do_not_grow_beyond_a_bound():
    model = LatentDecoder(tiny_latent_config(VOCAB))
    attention = model.model.layers[1].self_attn
    model.balance()
    q, keys, shared = attention.heads()
    bound, own, values = GROWTH * q.norm(dim=(1, 2)).mean(), keys.clone(), attention.kv_b_proj.weight[16:48].clone()
    q[0].mul_(9)
    shared.mul_(9)
    model.balance()
    torch.testing.assert_close(q[0].norm(), bound)
    torch.testing.assert_close(shared.norm(), attention.bounds[2])
    assert torch.equal(keys, own) and torch.equal(attention.kv_b_proj.weight[16:48], values)
