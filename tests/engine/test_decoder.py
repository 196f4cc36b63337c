"""The engine with a real (tiny, random) decoder on the CPU: one answer alone, batched, chunked, preempted, or late."""

import pytest
from tiny_decoder import all_logits, make_engine, params, prompts, serve, tiny_model

from slipstream.engine.request import Request
from slipstream.types import SamplingParams


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def alone(model):
    return [serve(make_engine(model), Request(ids, params(i)))[0] for i, ids in enumerate(prompts(6))]


def test_greedy_is_the_argmax_of_a_full_forward_pass(model, alone):
    for i in (0, 2, 4):
        ids = prompts(6)[i] + alone[i][0]
        logits = all_logits(model, ids[:-1])[len(prompts(6)[i]) - 1 :]
        assert logits.argmax(-1).tolist() == alone[i][0]
    assert len({token for chains in alone for token in chains[0]}) > 10  # the model is not stuck on one token


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("budget, num_pages", [(1, 64), (7, 64), (64, 64), (64, 11)])
def test_tokens_do_not_depend_on_the_batch(model, alone, overlap, budget, num_pages):
    engine = make_engine(model, num_pages, overlap=overlap, max_batch_tokens=budget, max_num_seqs=4)
    requests = [Request(ids, params(i)) for i, ids in enumerate(prompts(6))]
    assert serve(engine, *requests) == alone
    assert (engine.stats()["preemptions"] > 0) == (num_pages == 11)
    assert serve(engine, *[Request(ids, params(i)) for i, ids in enumerate(prompts(6))]) == alone
    assert engine.stats()["cached_tokens"] > 0


def test_chains_of_one_request_equal_single_requests(model):
    ids = prompts(3)[2]
    own = SamplingParams(n=4, temperature=1.0, seed=70, max_tokens=10, ignore_eos=True)
    (together,) = serve(make_engine(model), Request(ids, own))
    for i in range(4):
        single = SamplingParams(temperature=1.0, seed=70 + i, max_tokens=10, ignore_eos=True)
        assert serve(make_engine(model), Request(ids, single)) == [[together[i]]]


def test_score_and_prompt_logprobs_are_those_of_a_full_forward_pass(model):
    ids = prompts(6)[5]
    expected = all_logits(model, ids).log_softmax(-1)
    wanted = [expected[at - 1, ids[at]].item() for at in range(1, len(ids))]
    engine = make_engine(model, max_batch_tokens=16)
    for again in range(2):
        score = Request.to_score(ids[:20], ids[20:])
        serve(engine, score)
        assert score.scores == pytest.approx(wanted[19:], abs=1e-4)
        assert score.metrics.num_cached_tokens == (19 if again else 0)
    whole = Request(ids, SamplingParams(prompt_logprobs=1, logprobs=1, temperature=0, max_tokens=1))
    serve(engine, whole)
    found = [entry[token].logprob for entry, token in zip(whole.prompt_logprobs[1:], ids[1:], strict=True)]
    assert found == pytest.approx(wanted, abs=1e-4)
    (entry,) = whole.completions[0].logprobs
    assert entry[whole.completions[0].token_ids[0]].logprob == pytest.approx(expected[-1].max().item(), abs=1e-4)
