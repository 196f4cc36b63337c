"""Mixtures of experts: both ways of computing them are the sum of the chosen, and routing is transformers'."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_equal

from slipstream.kernels import experts, triton_experts


def case(tokens, num_experts, hidden, inner, dtype, device):
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, hidden, generator=generator)
    gate_up = torch.randn(num_experts, 2 * inner, hidden, generator=generator) * hidden**-0.5
    down = torch.randn(num_experts, hidden, inner, generator=generator) * inner**-0.5
    # Few experts for many tokens, so that some get many rows and some get none.
    logits = torch.randn(tokens, num_experts, generator=generator) + torch.linspace(-4, 4, num_experts)
    shared = torch.randn(tokens, hidden, generator=generator)
    return [t.to(device, dtype) for t in (x, gate_up, down, shared)] + [logits.to(device)]


def one_by_one(x, gate_up, down, shared, chosen, weights):
    rows = []
    for token in range(len(x)):
        total = shared[token].float()
        for expert, weight in zip(chosen[token].tolist(), weights[token], strict=True):
            gate, up = (gate_up[expert].float() @ x[token].float()).chunk(2)
            total = total + weight * (down[expert].float() @ (F.silu(gate) * up))
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("tokens", [1, 7, 33])
def test_mixture(tokens, grouped, dtype, monkeypatch, device):
    if grouped and device.type == "cuda" and dtype != torch.bfloat16:
        pytest.skip("a GPU groups products in bfloat16 only")
    monkeypatch.setattr(experts, "_has_grouped", lambda x: grouped)
    x, gate_up, down, shared, logits = case(tokens, 8, 32, 16, dtype, device)
    rule = experts.Routing(3, 1, 1, False, 1.5)
    found = experts.mixture(x, logits, None, rule, gate_up, down, shared)
    assert found.dtype == dtype
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 5e-2}
    chosen, weights = experts.route(logits, None, rule)
    torch.testing.assert_close(found.float(), one_by_one(x, gate_up, down, shared, chosen, weights), **tolerance)


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("tokens, num_experts, chosen", [(1, 8, 2), (5, 6, 3), (40, 64, 4)])
def test_rows_are_those_of_the_sort(tokens, num_experts, chosen, normalised, corrected, device):
    """The kernel counts, the definition sorts; a token's experts may come in another order."""
    logits = case(tokens, num_experts, 8, 4, torch.float32, device)[-1]
    correction = torch.linspace(1, -1, num_experts, device=device) if corrected else None
    rule = experts.Routing(chosen, 1, 1, normalised, 1.8)
    expected = experts.assign(logits.cpu(), None if correction is None else correction.cpu(), rule)
    tokens_of, ends, rows, weights = triton_experts.assign(logits, correction, chosen, normalised, 1.8)
    assert torch.equal(tokens_of.cpu(), expected.tokens) and torch.equal(ends.cpu(), expected.ends)
    order = expected.rows.argsort(-1)
    assert torch.equal(rows.cpu(), expected.rows.gather(1, order))
    torch.testing.assert_close(weights.cpu(), expected.weights.gather(1, order))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_combine(dtype, device):
    logits = case(9, 8, 8, 4, dtype, device)[-1]
    rows = experts.assign(logits, None, experts.Routing(3, 1, 1, True, 2.0))
    generator = torch.Generator().manual_seed(1)
    results, shared = (torch.randn(n, 40, generator=generator).to(device, dtype) for n in (27, 9))
    host = experts.Rows(*(x.cpu() for x in rows))
    found = triton_experts.combine(results, rows.rows, rows.weights, shared)
    assert_equal(found.cpu(), experts.combine(results.cpu(), host, shared.cpu()), "norm")


@pytest.mark.parametrize("groups, top_groups", [(1, 1), (4, 2)])
@pytest.mark.parametrize("normalised", [False, True])
def test_sigmoid_routing_is_deepseek_v3s(groups, top_groups, normalised, device):
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    config = DeepseekV3Config(
        n_routed_experts=16, num_experts_per_tok=3, hidden_size=8, n_group=groups, topk_group=top_groups,
        norm_topk_prob=normalised, routed_scaling_factor=2.5,
    )  # fmt: skip
    router = DeepseekV3TopkRouter(config)
    generator = torch.Generator().manual_seed(0)
    router.weight.data.normal_(generator=generator)
    router.e_score_correction_bias.normal_(0, 0.3, generator=generator)
    x = torch.randn(20, 8, generator=generator)
    logits, weights, chosen = router(x)
    correction = router.e_score_correction_bias.to(device)
    rule = experts.Routing(3, groups, top_groups, normalised, 2.5)
    found, own = experts.route(logits.detach().to(device), correction, rule)
    assert found.sort(-1).values.tolist() == chosen.sort(-1).values.tolist()
    torch.testing.assert_close(own.cpu().sort(-1).values, weights.detach().sort(-1).values)


def test_softmax_routing_in_groups_takes_the_best_of_the_best_groups(device):
    logits = torch.tensor([[5.0, 0.0, 4.0, 4.5, 0.0, 0.0, 3.0, 2.0]], device=device)
    chosen, weights = experts.route(logits, None, experts.Routing(3, 4, 2, False, 2.0))
    assert sorted(chosen[0].tolist()) == [0, 2, 3]
    torch.testing.assert_close(weights[0], 2 * logits.softmax(-1)[0, chosen[0]])
