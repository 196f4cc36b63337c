"""``LLM``: prompts in all their shapes, tokens equal to transformers', text, log-probabilities, streams, ends."""

import asyncio
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from slipstream import LLM, Full, SamplingParams, tasks
from slipstream.build import embedded_models
from slipstream.evaluation import prompt_ids
from slipstream.types import Generator

GREEDY = SamplingParams(temperature=0, max_tokens=None)
PROBLEMS = [("program", {"steps": 4}), ("needle_single", {"num_tokens": 256}), ("expression", {"operations": 4})]


def greedy(max_tokens, **more):
    return SamplingParams(temperature=0, max_tokens=max_tokens, **more)


def program(llm, seed=0, steps=4):
    return prompt_ids(llm, tasks.make("program", seed, steps=steps))


def chain(output):
    (only,) = output.outputs
    return only


# the models


def test_greedy_tokens_equal_transformers(target):
    reference = AutoModelForCausalLM.from_pretrained(embedded_models()["slipstream-target"], dtype=torch.float32)
    prompts = [prompt_ids(target, tasks.make(name, 1, **given)) for name, given in PROBLEMS]
    for prompt, output in zip(prompts, target.generate(prompts, GREEDY), strict=True):
        expected = reference.generate(torch.tensor([prompt]), max_new_tokens=400, do_sample=False)[0, len(prompt) :]
        assert chain(output).token_ids == expected.tolist() and len(expected) > 15
        assert (chain(output).finish_reason, chain(output).stop_reason) == ("stop", 2)


@pytest.mark.parametrize("name, given", [("needle_single", {"num_tokens": 1024}), ("program", {"steps": 20})])
def test_the_target_solves_problems(target, name, given):
    problems = [tasks.make(name, 100 + seed, **given) for seed in range(5)]
    outputs = target.generate([prompt_ids(target, p) for p in problems], GREEDY)
    right = [tasks.verify(p, chain(o).text) for p, o in zip(problems, outputs, strict=True)]
    assert sum(right) >= 4, f"{name}: {right}"


def test_the_draft_is_fluent(draft):
    outputs = draft.generate([program(draft, seed) for seed in range(3)], greedy(300))
    assert all(chain(o).finish_reason == "stop" and "</think>\n" in chain(o).text for o in outputs)


# prompts and parameters


def test_a_prompt_may_be_dense_only_up_to_a_point(draft):
    """The rest runs as decode steps, which full attention cannot tell apart."""
    ids = program(draft)
    expected, before = draft.generate(ids, greedy(20)), draft.stats()
    for dense in (1, len(ids) - 7, len(ids)):
        found = draft.generate({"prompt_token_ids": ids, "dense_tokens": dense}, greedy(20))
        assert chain(found[0]).token_ids == chain(expected[0]).token_ids
    assert draft.stats()["steps"] - before["steps"] > (len(ids) - 1) + 7 + 3 * 15
    for dense in (0, len(ids) + 1, 2.5):
        with pytest.raises(ValueError, match=rf"dense_tokens = {dense} .* 1\.\.{len(ids)}"):
            draft.generate({"prompt_token_ids": ids, "dense_tokens": dense}, greedy(20))


def test_prompts_of_every_kind_give_the_same(target):
    text = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    ids = target.encode(text)
    both = {"prompt": "what was written", "prompt_token_ids": ids}
    outputs = target.generate([text, ids, tuple(ids), {"prompt": text}, {"prompt_token_ids": ids}, both], greedy(12))
    assert len({tuple(chain(o).token_ids) for o in outputs}) == 1
    assert all(o.prompt_token_ids == ids for o in outputs)
    assert [o.prompt for o in outputs] == [text, None, None, text, None, "what was written"]
    for one in (text, ids, torch.tensor(ids).numpy(), {"prompt": text}):  # not in a list: one prompt
        (output,) = target.generate(one, greedy(12))
        assert chain(output).token_ids == chain(outputs[0]).token_ids
    (output,) = target.chat([{"role": "user", "content": "hello"}], greedy(12))
    assert output.prompt_token_ids == ids and chain(output).token_ids == chain(outputs[0]).token_ids
    assert len(target.chat([[{"role": "user", "content": word}] for word in ("hello", "no")], greedy(2))) == 2
    assert target.generate([], GREEDY) == []


def test_text_is_what_the_tokens_say(target):
    (output,) = target.generate(program(target), GREEDY)
    assert chain(output).text == target.codec.decode(chain(output).token_ids)
    assert "<think>\n" in chain(output).text and "<|im_end|>" not in chain(output).text
    assert output.metrics.ttft_s > 0 and output.metrics.num_generated == len(chain(output).token_ids)


def test_params_one_for_all_or_one_for_each(target):
    prompts = [program(target, 0), program(target, 1)]
    first, second = target.generate(prompts, [greedy(3), greedy(7)])
    assert [len(chain(first).token_ids), len(chain(second).token_ids)] == [3, 7]
    assert [len(chain(o).token_ids) for o in target.generate(prompts, greedy(5))] == [5, 5]
    assert len(chain(target.generate(prompts[0])[0]).token_ids) == 16  # vLLM's default
    with pytest.raises(ValueError, match="2 prompts but 1 sampling params"):
        target.generate(prompts, [GREEDY])


def test_seeds_decide_the_tokens_alone_and_in_a_batch(target):
    ids = target.encode("add sub max mul")
    hot = SamplingParams(temperature=1.5, max_tokens=24, seed=11, n=3, ignore_eos=True)
    (output,) = target.generate(ids, hot)
    chains = [c.token_ids for c in output.outputs]
    assert [c.index for c in output.outputs] == [0, 1, 2] and len({tuple(c) for c in chains}) == 3
    alone = [SamplingParams(temperature=1.5, max_tokens=24, seed=11 + i, ignore_eos=True) for i in range(3)]
    assert [chain(target.generate(ids, own)[0]).token_ids for own in alone] == chains
    crowd = [program(target, seed) for seed in range(4)]
    outputs = target.generate([*crowd, ids, ids, ids], [*[greedy(30)] * 4, *alone])
    assert [chain(o).token_ids for o in outputs[4:]] == chains
    fresh = SamplingParams(temperature=1.5, max_tokens=24, ignore_eos=True)
    again = target.generate([ids, ids], fresh)
    assert chain(again[0]).token_ids != chain(again[1]).token_ids


# ends


def test_stop_strings_across_token_borders(target):
    ids = program(target)
    (free,) = target.generate(ids, GREEDY)
    text, tokens = chain(free).text, chain(free).token_ids
    borders = {len(target.codec.decode(tokens[:i])) for i in range(len(tokens))}
    at = next(i for i in range(60, len(text)) if not borders & {i, i + 4} and len(borders & {i + 1, i + 2, i + 3}) > 1)
    stop = text[at : at + 4]
    first = text.find(stop)
    (cut,) = target.generate(ids, greedy(None, stop=("never there", stop)))
    assert chain(cut).text == text[:first]
    assert (chain(cut).finish_reason, chain(cut).stop_reason) == ("stop", stop)
    assert chain(cut).token_ids == tokens[: len(chain(cut).token_ids)]  # those of the stop string are kept
    assert target.codec.decode(chain(cut).token_ids).startswith(text[: first + 4])
    pieces = list(target.stream(ids, greedy(None, stop=stop)))
    assert "".join(p.text for p in pieces) == text[:first] and pieces[-1].stop_reason == stop
    two = SamplingParams(n=2, temperature=0, max_tokens=None, stop=stop)
    assert [c.text for c in target.generate(ids, two)[0].outputs] == [text[:first]] * 2


def test_stop_token_ids_ignore_eos_and_length(target):
    ids = program(target)
    (free,) = target.generate(ids, GREEDY)
    tokens = chain(free).token_ids
    stop = next(token for token in tokens[20:] if tokens.count(token) == 1)
    (cut,) = target.generate(ids, greedy(None, stop_token_ids=[stop]))
    assert chain(cut).token_ids == tokens[: tokens.index(stop) + 1]
    assert (chain(cut).finish_reason, chain(cut).stop_reason) == ("stop", stop)
    assert tokens[-1] == 2
    (longer,) = target.generate(ids, greedy(len(tokens) + 5, ignore_eos=True))
    assert chain(longer).token_ids[: len(tokens)] == tokens and len(chain(longer).token_ids) == len(tokens) + 5
    assert (chain(longer).finish_reason, chain(longer).stop_reason) == ("length", None)
    (short,) = target.generate(ids, greedy(4))
    assert chain(short).token_ids == tokens[:4] and chain(short).finish_reason == "length"


def test_no_chain_outgrows_max_model_len(tiny):
    llm = tiny(max_model_len=20)
    (output,) = llm.generate(list(range(15)), greedy(None, ignore_eos=True))
    assert len(chain(output).token_ids) == 5 and chain(output).finish_reason == "length"


# log-probabilities


def test_logprobs(target):
    ids = program(target)
    (output,) = target.generate(ids, SamplingParams(temperature=6.0, seed=3, max_tokens=12, logprobs=3))
    tokens, entries = chain(output).token_ids, chain(output).logprobs
    assert len(entries) == len(tokens) == 12
    for token, entry in zip(tokens, entries, strict=True):
        assert token in entry and 3 <= len(entry) <= 4
        assert {1, 2, 3} <= {e.rank for e in entry.values()}
        assert all(e.decoded_token == target.codec.token_text(i) for i, e in entry.items())
        assert max(entry.values(), key=lambda e: e.logprob).rank == 1
    assert {len(entry) for entry in entries} == {3, 4}  # the token itself is among the best three, or beside them
    total = sum(entry[token].logprob for token, entry in zip(tokens, entries, strict=True))
    assert chain(output).cumulative_logprob == pytest.approx(total)
    assert target.score(ids, tokens) == pytest.approx([e[t].logprob for t, e in zip(tokens, entries, strict=True)])
    (bare,) = target.generate(ids, greedy(3, logprobs=0))
    assert [len(entry) for entry in chain(bare).logprobs] == [1, 1, 1]
    (none,) = target.generate(ids, greedy(3))
    assert chain(none).logprobs is None and chain(none).cumulative_logprob is None and none.prompt_logprobs is None


def test_prompt_logprobs_equal_transformers_and_score(target):
    ids = program(target, seed=5)
    (output,) = target.generate(ids, greedy(1, prompt_logprobs=2))
    entries = output.prompt_logprobs
    assert len(entries) == len(ids) and entries[0] is None and all(len(e) in (2, 3) for e in entries[1:])
    assert entries[1][ids[1]].decoded_token == target.codec.token_text(ids[1])
    reference = AutoModelForCausalLM.from_pretrained(embedded_models()["slipstream-target"], dtype=torch.float32)
    with torch.no_grad():
        logits = reference(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    expected = logits[range(len(ids) - 1), ids[1:]].tolist()
    assert [e[t].logprob for t, e in zip(ids[1:], entries[1:], strict=True)] == pytest.approx(expected, abs=1e-3)
    assert target.score(ids[:1], ids[1:]) == pytest.approx(expected, abs=1e-3)


def test_score_reuses_the_prefix(target):
    prompt, continuation = program(target, seed=77, steps=12), target.encode("<think>\nL00 : halt")
    before = target.stats()["cached_tokens"]
    first = target.score(prompt, continuation)
    middle = target.stats()["cached_tokens"]
    second = target.score(prompt, continuation)
    assert second == pytest.approx(first, abs=1e-4) and len(first) == len(continuation)
    assert all(value <= 0 for value in first) and first[3] < -1  # the program has no line L00
    in_pages = (len(prompt) - 1) // 64 * 64
    assert target.stats()["cached_tokens"] - middle == in_pages > middle - before


# streams and loops


def test_pieces_of_a_stream_join_to_the_whole(target):
    ids = program(target)
    params = SamplingParams(n=2, temperature=6.0, seed=2, max_tokens=40)
    texts, tokens, ends = ["", ""], [[], []], [None, None]
    for chunk in target.stream(ids, params):
        assert ends[chunk.index] is None
        texts[chunk.index] += chunk.text
        tokens[chunk.index] += chunk.token_ids
        ends[chunk.index] = chunk.finish_reason
    (output,) = target.generate(ids, params)
    assert (
        texts[0] != texts[1]
        and texts == [c.text for c in output.outputs]
        and tokens == [c.token_ids for c in output.outputs]
    )
    assert ends == [c.finish_reason for c in output.outputs]


def test_leaving_a_stream_frees_its_pages(target):
    finished = target.stats()["finished_requests"]
    for count, chunk in enumerate(target.stream(program(target, steps=10), GREEDY)):
        assert chunk.finish_reason is None and target.stats()["pages_used"] > 0
        if count == 5:
            break
    del chunk
    assert target.stats()["pages_used"] == 0 and target.stats()["finished_requests"] == finished + 1
    with pytest.raises(KeyboardInterrupt):
        for _ in target.as_completed((i, program(target, i), GREEDY) for i in range(3)):
            raise KeyboardInterrupt
    assert target.stats()["pages_used"] == 0


def test_calls_may_be_nested(target):
    ids, other = program(target, 1), program(target, 2)
    (alone,) = target.generate(ids, greedy(12))
    (inner,) = target.generate(other, greedy(20))
    seen = []
    for chunk in target.stream(ids, greedy(12)):
        seen += chunk.token_ids
        if len(seen) == 3:
            assert chain(target.generate(other, greedy(20))[0]).token_ids == chain(inner).token_ids
            assert len(target.score(other, chain(inner).token_ids)) == 20
        if len(seen) == 6:
            nested = [token for piece in target.stream(other, greedy(20)) for token in piece.token_ids]
            assert nested == chain(inner).token_ids
    assert seen == chain(alone).token_ids


def test_as_completed_keeps_a_window_in_flight(tiny):
    llm, taken = tiny(max_num_seqs=2), []

    def source():
        for i in range(20):
            taken.append(i)
            yield i, [1 + i, 2, 3], greedy(1 + i % 3, ignore_eos=True)

    finished = {}
    for key, output in llm.as_completed(source()):
        finished[key] = len(chain(output).token_ids)
        assert len(taken) - len(finished) <= 4
    assert finished == {i: 1 + i % 3 for i in range(20)}


# asynchronous


def test_the_asynchronous_face(target):
    ids = program(target)
    (expected,) = target.generate(ids, greedy(20))
    tokens = chain(expected).token_ids

    async def main(face):
        assert isinstance(face, Generator)
        chains, scores, extended = await asyncio.gather(
            face.generate(ids, SamplingParams(n=2, temperature=0, max_tokens=20)),
            face.score(ids, tokens),
            face.extend([*ids, *tokens[:8]], greedy(12)),
        )
        assert [c.token_ids for c in chains] == [tokens, tokens] and extended.token_ids == tokens[8:]
        assert len(scores) == 20
        streamed = [t async for delta in face.stream(ids, greedy(20)) for t in delta.token_ids]
        assert streamed == tokens
        waiting = asyncio.create_task(face.generate(ids, greedy(None, ignore_eos=True), request_id="endless"))
        while not face.cancel("endless"):
            await asyncio.sleep(0.01)
        (stopped,) = await waiting
        assert stopped.finish_reason == "abort" and face.cancel("endless") is False
        stop = target.codec.decode(tokens[-3:])
        (text,) = await face.generate(ids, greedy(30, stop=stop))
        assert (text.finish_reason, text.stop_reason) == ("stop", stop)
        with pytest.raises(ValueError, match="outside the vocabulary"):
            await face.score(ids, [10**6])
        return scores

    with target:
        face = target.asynchronous()
        assert target.asynchronous() is face
        scores = asyncio.run(main(face))
        for call in (
            lambda: target.generate(ids, GREEDY),
            lambda: target.score(ids, tokens),
            lambda: next(iter(target.stream(ids, GREEDY))),
        ):
            with pytest.raises(RuntimeError, match="asynchronous face"):
                call()
    assert target.score(ids, tokens) == pytest.approx(scores, abs=1e-4)  # closed: ours again


def test_asynchronous_refuses_while_a_loop_is_open(target):
    stream = target.stream(program(target), GREEDY)
    next(stream)
    with pytest.raises(RuntimeError, match="finish or close it first"):
        target.asynchronous()
    stream.close()
    target.asynchronous().close()


# other models


def test_unknown_arguments_name_the_nearest():
    with pytest.raises(TypeError, match="LLM has no option 'max_modl_len'; did you mean 'max_model_len'"):
        LLM("slipstream-target", max_modl_len=4096)
    with pytest.raises(TypeError, match="SamplingParams has no option 'max_token'; did you mean 'max_tokens'"):
        SamplingParams(max_token=3)


def test_a_model_without_tokenizer_serves_token_ids(tmp_path, tiny):
    config = json.loads((embedded_models()["slipstream-draft"] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = embedded_models()["slipstream-draft"] / "model.safetensors"
    (tmp_path / "model.safetensors").write_bytes(weights.read_bytes())
    llm = LLM(str(tmp_path), device="cpu", max_model_len=512, kv_memory="16MiB")
    assert torch.equal(llm.model.embedding, load_file(weights)["model.embed_tokens.weight"].float())
    (output,) = llm.generate([5, 6, 7], greedy(4, logprobs=1, ignore_eos=True))
    assert len(chain(output).token_ids) == 4 and chain(output).text == "" and llm.name == str(tmp_path)
    assert all(e.decoded_token is None for entry in chain(output).logprobs for e in entry.values())
    assert [t for c in llm.stream([5, 6, 7], greedy(4, ignore_eos=True)) for t in c.token_ids] == chain(
        output
    ).token_ids
    for refused in (
        lambda: llm.generate("text"),
        lambda: llm.chat([{"role": "user", "content": "text"}]),
        lambda: llm.generate([5], SamplingParams(stop="text")),
        lambda: llm.stream("text"),
    ):
        with pytest.raises(ValueError, match="has no tokenizer: give prompts as token ids"):
            refused()


def test_dummy_weights_of_a_config(tiny):
    first, same, other = tiny(seed=1), tiny(seed=1), tiny(seed=2)
    tokens = [chain(llm.generate([1, 2, 3], greedy(20, ignore_eos=True))[0]).token_ids for llm in (first, same, other)]
    assert tokens[0] == tokens[1] != tokens[2] and first.name == "Qwen3ForCausalLM"
    assert first.fingerprint == same.fingerprint != other.fingerprint
    assert tiny(seed=1, attention=Full()).fingerprint == tiny(seed=1, attention={"method": "full"}).fingerprint
    assert tiny(dtype="bfloat16", seed=1).fingerprint != first.fingerprint
    stats = first.stats()
    assert stats["kv_pool_bytes"] == first.memory.bytes <= 2**20 and stats["decode_tokens"] == 19
