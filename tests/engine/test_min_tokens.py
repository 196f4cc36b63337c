"""``min_tokens``: no end token, stop token or stop string before so many tokens; the model's own numbers stay."""

from dataclasses import replace

import pytest
import torch
from test_capture import cuda_engine, serve
from toy_engine import EOS, prompt, request, run, tokens_of, toy_engine, truth

from slipstream.engine.request import MAX_BANNED, Request
from slipstream.types import SamplingParams

FREE = {"temperature": 2.5, "max_tokens": 40}
BOTH = pytest.mark.parametrize("overlap", [False, True])


def early(**more):
    """Seeds whose chains end early by themselves, with the tokens that they then have."""
    found = {seed: truth(prompt(seed, 9), SamplingParams(seed=seed, **FREE, **more)) for seed in range(60)}
    return {seed: ids for seed, ids in found.items() if len(ids) < 9}


@BOTH
@pytest.mark.parametrize("pages", [96, 14])
def test_chains_end_no_earlier_and_are_those_of_masked_logits(overlap, pages):
    """In one batch with chains that may end whenever they want; with few pages some are preempted on the way."""
    seeds = list(early())[:4]
    assert len(seeds) == 4
    engine = toy_engine(num_pages=pages, overlap=overlap, max_batch_tokens=11, max_num_seqs=6)
    work = [
        request(prompt(seed, 9), SamplingParams(seed=seed, min_tokens=least, n=1 + (least > 0), **FREE))
        for seed in seeds
        for least in (0, 9, 40)
    ]
    run(engine, *work)
    for one in work:
        least = one.params.min_tokens
        for index, ids in enumerate(tokens_of(one)):
            assert ids == truth(one.prompt_ids, one.params, index)
            assert len(ids) >= least and EOS not in ids[:least]
    assert (engine.stats()["preemptions"] > 0) == (pages == 14)
    assert any(c.finish_reason == "stop" for one in work if one.params.min_tokens == 9 for c in one.completions)


def test_stop_tokens_are_held_back_too_and_greedy_takes_the_next_best():
    free = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    ids = truth(prompt(1, 7), free)
    stops = tuple({ids[0], ids[2]})
    engine = toy_engine()
    first = request(prompt(1, 7), SamplingParams(temperature=0, max_tokens=12, stop_token_ids=stops))
    held = request(prompt(1, 7), SamplingParams(temperature=0, max_tokens=12, stop_token_ids=stops, min_tokens=6))
    run(engine, first, held)
    assert tokens_of(first)[0] == ids[:1]
    assert tokens_of(held)[0] == truth(held.prompt_ids, held.params) and not set(stops) & set(tokens_of(held)[0][:6])


@pytest.mark.parametrize("huge", [2**31, 2**32 + 1, 2**63, 10**40])
def test_more_than_any_integer_of_a_device(huge):
    """As many as that is all of the vocabulary, and longer than any chain."""
    engine, plain = toy_engine(), SamplingParams(seed=next(iter(early())), **FREE)
    held = replace(plain, top_k=huge, min_tokens=huge, max_tokens=None)
    free, long = request(prompt(plain.seed, 9), replace(plain, top_k=huge)), request(prompt(plain.seed, 9), held)
    run(engine, free, long)
    assert tokens_of(free)[0] == truth(free.prompt_ids, plain)
    assert len(tokens_of(long)[0]) == engine.limits.max_model_len - 9


def test_log_probabilities_stay_the_models_own():
    """The end token that may not be drawn keeps its probability and its rank among the alternatives."""
    compared = 0
    for seed, ids in early().items():
        free = request(prompt(seed, 9), SamplingParams(seed=seed, logprobs=20, **FREE))
        held = request(prompt(seed, 9), SamplingParams(seed=seed, logprobs=20, min_tokens=len(ids), **FREE))
        run(toy_engine(), free, held)
        last = len(ids) - 1
        assert tokens_of(held)[0][:last] == ids[:last] and tokens_of(held)[0][last] != EOS == ids[last]
        one, other = (request.completions[0].logprobs[last] for request in (free, held))
        compared += EOS in other  # it is among the likeliest, though it was not to be drawn
        assert EOS not in other or one[EOS] == other[EOS]
    assert compared > 1


def test_what_cannot_be_is_refused():
    for options, message in (
        ({"min_tokens": 17}, "0..max_tokens"), ({"min_tokens": -1}, "0..max_tokens"), ({"min_tokens": 1.5}, "integer"),
        ({"min_tokens": None}, "0..max_tokens"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            SamplingParams(**options)
    assert SamplingParams(max_tokens=None, min_tokens=10**6).min_tokens == 10**6
    many = SamplingParams(stop_token_ids=tuple(range(MAX_BANNED)), min_tokens=1)
    with pytest.raises(ValueError, match=f"at most {MAX_BANNED} end and stop tokens, but there are {MAX_BANNED + 1}"):
        toy_engine().add(Request([1], many))
    toy_engine().add(Request([1], SamplingParams(stop_token_ids=tuple(range(40)))))


def test_stop_strings_wait_too(target):
    """Text, in one piece and streamed: one that is complete within the first tokens is text like any other."""
    ids = target.encode("Reduce the leftmost innermost bracket until one number is left. Every result is taken mod 100."
                        "\n((11+22)+(33+44))", chat=True)  # fmt: skip
    free = target.generate({"prompt_token_ids": ids}, SamplingParams(temperature=0, max_tokens=60))[0].outputs[0]
    first = target.codec.encode(free.text)[:12]
    assert free.text.count(")=") >= 2
    for least, occurrence in ((0, 0), (len(first), 1)):
        params = SamplingParams(temperature=0, max_tokens=60, stop=(")=",), min_tokens=least)
        ended = target.generate({"prompt_token_ids": ids}, params)[0].outputs[0]
        cut = [i for i in range(len(free.text)) if free.text.startswith(")=", i)][occurrence]
        assert ended.text == free.text[:cut] and (ended.finish_reason, ended.stop_reason) == ("stop", ")=")
        pieces = list(target.stream({"prompt_token_ids": ids}, params))
        assert "".join(piece.text for piece in pieces) == ended.text


@pytest.mark.gpu
@pytest.mark.parametrize("overlap", [False, True])
def test_captured_steps_hold_back_what_eager_ones_do(overlap):
    def work():
        params = SamplingParams(temperature=0.8, max_tokens=30, stop_token_ids=(3, 5, 7, 11, 13, 17, 19))
        made = []
        for i in range(9):
            own = {**vars(params), "seed": i, "min_tokens": 10 * (i % 3)}
            made.append(Request(torch.arange(5 + i).tolist(), SamplingParams(**own)))
        return made

    expected = serve(cuda_engine(overlap=False, cuda_graphs=False), work())
    engine = cuda_engine(overlap=overlap)
    assert serve(engine, work()) == expected and engine.stats()["graph_replays"] > 10
    for i, ids in enumerate(expected):
        assert len(ids) >= 10 * (i % 3) and not {3, 5, 7, 11, 13, 17, 19} & set(ids[: 10 * (i % 3)])
