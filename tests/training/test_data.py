"""Training documents: packed without gaps, weighted where the completion is, of every family."""

import numpy as np
import pytest
import torch

from slipstream import tasks
from training import data
from training.model import Decoder, tiny_config, token_losses
from training.tokenizer import END_THINK, IM_END, IM_START, THINK
from training.train import measure, schedule

CAPACITY = 8192


@pytest.fixture(scope="module")
def packer():
    return data.Packer(3, CAPACITY)


@pytest.mark.parametrize("stage", data.STAGES, ids=lambda s: str(s.longest))
def test_pack(packer, tokenizer, stage):
    batch = packer.pack(stage)
    count, longest = batch["sizes"]
    starts = batch["starts"][: count + 1]
    assert starts[0] == 0 and starts[-1] == CAPACITY and (np.diff(starts) > 0).all()
    assert longest == np.diff(starts).max() and (batch["starts"][count + 1 :] == CAPACITY).all()
    assert (batch["targets"][:-1] == batch["tokens"][1:]).all()
    for a, b in list(zip(starts, starts[1:], strict=False))[
        :-2
    ]:  # the last document may be cut, the very end be filled up
        ids, weight = batch["tokens"][a:b].tolist(), batch["weights"][a:b]
        assert (batch["positions"][a:b] == np.arange(b - a)).all() and len(set(batch["family"][a:b])) == 1
        assert ids[0] == IM_START and ids[-1] == IM_END and ids.count(THINK) == ids.count(END_THINK) == 1
        opened = ids.index(THINK)
        assert (weight[: opened - 1] == 0).all(), "the prompt is not learnt"
        assert weight[opened - 1] > 0, "its last token predicts <think>"
        assert weight[-1] == 0, "the end token predicts nothing of the next document"
        assert data.FAMILIES[batch["family"][a]] in stage.shares
        assert tokenizer.decode(ids[opened:], skip_special_tokens=True).startswith("<think>\n")


def test_a_seed_is_a_pack():
    one, same, other = (data.Packer(seed, 2048).pack(data.STAGES[1]) for seed in (5, 5, 6))
    assert all((one[name] == same[name]).all() for name in one)
    assert (one["tokens"] != other["tokens"]).any()


def test_shares_are_kept():
    packer = data.Packer(0, 65536)
    packs = [packer.pack(data.STAGES[1]) for _ in range(3)]
    family = np.concatenate([batch["family"] for batch in packs])
    for name, share in data.MIX.items():
        assert (family == data.FAMILIES.index(name)).mean() == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize("family", data.FAMILIES)
def test_drawn_problems_are_right_and_fit(family):
    rng = np.random.default_rng(1)
    for tokens in (160, 512, 2048):
        for first_stage in (False, True):
            problem = data.draw(family, rng, tokens, first_stage)
            size = tasks.count_tokens(problem.prompt) + tasks.count_tokens(problem.completion)
            assert size < tokens + 400
            assert tasks.verify(problem, problem.completion) or problem.answer == "none"


def test_hard_tokens_weigh_more(packer, encoder):
    problem = tasks.make("program", 0, steps=3)
    ids = np.array(encoder.completion(problem.completion))
    weights = packer.weights.of("program", ids)
    operators = np.isin(ids, [encoder.id(f" {op} ") for op in ("add", "sub", "max", "mul")] + [encoder.id(" halt")])
    assert operators.sum() == 4 and (weights[operators] > 1).all() and (weights[~operators] == 1).all()
    ids = np.array(encoder.completion(tasks.make("needle_single", 0).completion))
    first = np.flatnonzero(ids == encoder.id(" is ")) + 1
    assert (
        len(first) == 2 and (packer.weights.of("needles", ids)[first] == packer.weights.of("needles", ids).max()).all()
    )


def test_workers_follow_the_stage_and_end():
    feed = data.Feed(1, 1024, 0, depth=2)
    try:
        assert int(feed.next()["stage"]) == 0
        feed.stage.value = 2
        assert int(feed.next()["stage"]) == 2
    finally:
        feed.close()
    assert not any(process.is_alive() for process in feed.processes)


def test_queries_start_out_like_their_keys():
    """The recipe's first trick: from the first step the same content attends to the same content."""
    config = tiny_config(128)
    attention = Decoder(config).model.layers[-1].self_attn
    k = attention.k_proj.weight.view(config.kv_heads, 1, -1)
    q = attention.q_proj.weight.view(config.kv_heads, -1, k.shape[-1])
    assert (torch.cosine_similarity(q, k, dim=-1) > 0.5).all()
    assert torch.cosine_similarity(q[0], k[1], dim=-1).abs().max() < 0.1


def test_model_seeds():
    one, same, other = (Decoder(tiny_config(128), seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_losses_and_measures():
    generator = torch.Generator().manual_seed(0)
    hidden, embedding = torch.randn(6, 8, generator=generator), torch.randn(11, 8, generator=generator)
    targets = (hidden @ embedding.T).argmax(-1)
    targets[0] = (targets[0] + 1) % 11
    losses, right = token_losses(hidden, embedding, targets)
    wanted = -(hidden @ embedding.T).log_softmax(-1)[torch.arange(6), targets]
    torch.testing.assert_close(losses, wanted)
    assert right.tolist() == [False] + [True] * 5
    weights = torch.tensor([1.0, 0.0, 1.0, 4.0, 8.0, 1.0])
    onehot = torch.nn.functional.one_hot(torch.tensor([0, 0, 0, 1, 1, 1]), 2).float()
    table = measure(losses, right, weights, onehot)
    assert table[1:3].tolist() == [[1, 3], [2, 3]] and table[4:].tolist() == [[0, 2], [0, 2]]
    torch.testing.assert_close(table[0], torch.stack([losses[[0, 2]].sum(), losses[3:].sum()]))


def test_schedule():
    assert schedule(0.0, 0) == 0.01 and schedule(0.1, 99) == schedule(0.49, 10_000) == 1.0
    assert schedule(0.75, 10_000) == pytest.approx(0.505) and schedule(1.0, 10_000) == pytest.approx(0.01)
    assert schedule(0.3, 10_000, 0.3) == 1.0 and schedule(0.65, 10_000, 0.3) == pytest.approx(0.505)
