"""Mixtures of experts: both ways of computing them are the sum of the chosen, and routing is transformers'."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_equal

from slipstream.kernels import experts, triton_experts, triton_few_rows


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def logits_of(tokens, count, device):
    """Few experts for many tokens, so that some get many rows and some get none."""
    return (draw(tokens, tokens, count) + torch.linspace(-4, 4, count)).to(device)


def case(tokens, count, hidden, inner, shared, dtype, device):
    """Tokens, of whom some agree on whom to choose, and weights."""
    x = draw(tokens, tokens, hidden) + torch.linspace(6, 0, tokens)[:, None] * draw(1, hidden)
    gate_up = draw(2, count, 2 * inner, hidden) * hidden**-0.5
    down = draw(3, count, hidden, inner) * inner**-0.5
    common = draw(4, 2 * shared * inner, hidden) * hidden**-0.5, draw(5, hidden, shared * inner) * inner**-0.5
    x, *matrices = (t.to(device, dtype) for t in (x, gate_up, down, *common))
    return x, experts.Weights(draw(6, count, hidden).to(device), None, *matrices)


def one_by_one(x, weights, chosen, parts):
    rows = []
    shared = weights.shared_gate_up, weights.shared_down
    for token in range(len(x)):
        total = 0.0
        routed = [(weights.gate_up[e], weights.down[e]) for e in chosen[token].tolist()]
        for (gate_up, down), part in zip([shared, *routed], [1.0, *parts[token]], strict=True):
            gate, up = (gate_up.float() @ x[token].float()).chunk(2)
            total = total + part * (down.float() @ (F.silu(gate) * up))
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", ["every", "grouped", "few"])
@pytest.mark.parametrize(
    "tokens, hidden, inner, shared",
    [(1, 32, 16, 1), (7, 32, 16, 2), (33, 32, 16, 1), (18, 144, 72, 2), (3, 256, 128, 1)],
)
def test_mixture(tokens, hidden, inner, shared, way, dtype, monkeypatch, device):
    if way == "grouped" and device.type == "cuda" and dtype != torch.bfloat16:
        pytest.skip("a GPU groups products in bfloat16 only")
    monkeypatch.setattr(experts, "_has_grouped", lambda x: way == "grouped")
    monkeypatch.setattr(experts, "_has_few_rows", lambda x: way == "few")
    x, weights = case(tokens, 8, hidden, inner, shared, dtype, device)
    rule = experts.Routing(3, 1, 1, False, 1.5)
    found = experts.mixture(x, weights, rule)
    assert found.dtype == dtype
    chosen, parts = experts.route(experts.score(x, weights.router), None, rule)
    assert tokens < 18 or chosen.flatten().bincount(minlength=8).max() > triton_few_rows.ROWS, "nothing loops"
    expected = one_by_one(x, weights, chosen, parts)
    error = (found.float() - expected).norm(dim=1) / expected.norm(dim=1)
    assert error.max() < (1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.gpu  # the interpreter multiplies with numpy, which sums as its library likes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_the_others(dtype, device):
    """A decode step of one chain and of many: the same bits, wherever a token's rows lie."""
    x, weights = case(21, 6, 80, 48, 1, dtype, device)
    rule = experts.Routing(2, 1, 1, True, 1.0)

    def few(x):
        rows = experts.assign(triton_experts.score(x, weights.router), None, rule)
        results, shared = triton_few_rows.products(x, rows, weights)
        return triton_experts.combine(results, rows.rows, rows.weights, shared)

    whole = few(x)
    for token in (0, 9, 20):
        assert torch.equal(few(x[token : token + 1])[0], whole[token])


@pytest.mark.gpu
def test_a_graph_serves_other_tokens(device):
    x, weights = case(8, 16, 64, 32, 1, torch.bfloat16, device)
    rule = experts.Routing(4, 1, 1, True, 1.8)
    experts.mixture(x, weights, rule)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = experts.mixture(x, weights, rule)
    x.neg_()
    graph.replay()
    assert torch.equal(found, experts.mixture(x, weights, rule))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens, count, hidden", [(1, 8, 32), (11, 6, 528)])
def test_scores(tokens, count, hidden, dtype, device):
    x, router = draw(1, tokens, hidden).to(device, dtype), draw(2, count, hidden).to(device)
    expected = x.double() @ router.double().T
    torch.testing.assert_close(triton_experts.score(x, router).double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize(
    "tokens, count, chosen, groups, top_groups",
    [(1, 8, 2, 1, 1), (5, 6, 3, 1, 1), (40, 64, 4, 1, 1), (9, 12, 3, 4, 2), (3, 32, 5, 8, 4)],
)
def test_rows_are_those_of_the_sort(tokens, count, chosen, groups, top_groups, normalised, corrected, device):
    """The kernel counts, the definition sorts; a token's experts may come in another order."""
    logits = logits_of(tokens, count, device)
    correction = torch.linspace(1, -1, count, device=device) if corrected else None
    rule = experts.Routing(chosen, groups, top_groups, normalised, 1.8)
    expected = experts.assign(logits.cpu(), None if correction is None else correction.cpu(), rule)
    found = experts.Rows(*(x.cpu() for x in triton_experts.assign(logits, correction, rule)))
    assert torch.equal(found.tokens, expected.tokens) and torch.equal(found.ends, expected.ends)
    assert torch.equal(found.busy, expected.busy)
    order = expected.rows.argsort(-1)
    assert torch.equal(found.rows, expected.rows.gather(1, order))
    torch.testing.assert_close(found.weights, expected.weights.gather(1, order))


@pytest.mark.parametrize("corrected", [False, True])
def test_ties_go_to_the_lowest(corrected, device):
    logits = torch.zeros(2, 8, device=device)
    logits[1, 5] = 1.0
    correction = torch.zeros(8, device=device) if corrected else None
    for groups, top_groups in ((1, 1), (4, 2)):
        rule = experts.Routing(3, groups, top_groups, True, 1.0)
        found = experts.Rows(*triton_experts.assign(logits, correction, rule))
        owners = torch.searchsorted(found.ends, found.rows, right=True)
        assert owners.tolist() == [[0, 1, 2], [0, 1, 5]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shared", [1, 2])
def test_combine(shared, dtype, device):
    rows = experts.assign(logits_of(9, 8, device), None, experts.Routing(3, 1, 1, True, 2.0))
    results, common = draw(1, 27, 40).to(device, dtype), draw(2, shared, 9, 40).to(device, dtype)
    host = experts.Rows(*(x.cpu() for x in rows))
    found = triton_experts.combine(results, rows.rows, rows.weights, common)
    assert_equal(found.cpu(), experts.combine(results.cpu(), host, common.cpu()), "norm")


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
