"""Muon: the update is nearly the orthogonal factor of the momentum; what is no matrix of a block is Adam's."""

import pytest
import torch
from torch import nn

from training.model import Decoder, tiny_config
from training.muon import Muon, orthogonalise


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 64, 16), (1, 16, 64), (2, 96, 64)])
def test_orthogonalise(shape):
    generator = torch.Generator().manual_seed(0)
    update = torch.randn(shape, generator=generator) * torch.logspace(-2, 2, shape[0])[:, None, None]
    found = orthogonalise(update).float()
    u, _, vt = torch.linalg.svd(update, full_matrices=False)
    values = torch.linalg.svdvals(found)
    assert values.max() < 1.3
    assert (values > 0.6).float().mean() > 0.9, "all directions of some weight come out with about the same"
    wanted = u @ vt
    likeness = (found * wanted).sum((-2, -1)) / (found.norm(dim=(-2, -1)) * wanted.norm(dim=(-2, -1)))
    assert (likeness > 0.95).all()


def test_zero_gradient_is_no_update():
    assert orthogonalise(torch.zeros(1, 8, 8)).abs().max() == 0


def test_parameters_are_divided():
    model = Decoder(tiny_config(64))
    optimiser = Muon(model, 0.01)
    muon = {id(w) for group in optimiser.groups for w in group}
    adam = {id(w) for group in optimiser.adam.param_groups for w in group["params"]}
    assert not muon & adam and muon | adam == {id(w) for w in model.parameters()}
    assert id(model.model.embed_tokens.weight) in adam and id(model.model.layers[0].self_attn.q_proj.weight) in muon
    assert all(len({tuple(w.shape) for w in group}) == 1 for group in optimiser.groups)


def test_step_length_and_direction():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64, bias=False), nn.LayerNorm(64))
    optimiser = Muon(model, 0.1)
    weight, before = model[0].weight, model[0].weight.detach().clone()
    gradient = torch.randn(64, 16)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    weight.grad = gradient.clone()
    optimiser.step(0.5)
    moved = before - weight.detach()
    # lr * scale * sqrt(rows / columns) on every singular direction, and against the gradient
    assert torch.linalg.svdvals(moved).mean().item() == pytest.approx(0.1 * 0.5 * 2, rel=0.25)
    assert (moved * gradient).sum() > 0
    assert optimiser.adam.param_groups[0]["lr"] == pytest.approx(3e-3 * 0.5)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_it_learns():
    torch.manual_seed(0)
    model, target = nn.Linear(24, 24), 0.2 * torch.randn(24, 24)
    optimiser = Muon(model, 0.05)
    losses = []
    for i in range(120):
        x = torch.randn(64, 24)
        loss = (model(x) - x @ target.T).pow(2).mean()
        loss.backward()
        optimiser.step(1 - i / 120)
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]
