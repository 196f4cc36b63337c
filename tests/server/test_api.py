"""The routes as their users know them: an unmodified ``openai`` client, lm_eval's and vLLM's requests, plain HTTP."""

import asyncio
import json
from dataclasses import fields

import openai
import pytest
from live_server import wait_until

from slipstream import tasks
from slipstream.atts.config import ATTS
from slipstream.server.scaled import OPTIONS, Scaled, Scaler


@pytest.fixture(scope="module")
def live(serving):
    with serving(scale=Scale()) as live:
        yield live


GREEDY = {"temperature": 0, "max_tokens": 12}


@pytest.fixture(scope="module")
def client(live):
    with openai.OpenAI(base_url=live.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def problem():
    return tasks.make("program", seed=3, steps=3).prompt


@pytest.fixture(autouse=True)
def leaves_nothing(live):
    yield
    live.at_rest()


def test_models(client, live):
    (card,) = client.models.list().data
    assert card.id == client.models.retrieve(card.id).id == "slipstream-draft" and card.max_model_len == 2048
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.models.retrieve("gpt-4")
    error = live.error("/v1/completions", 404, model="gpt-4", prompt="x")
    assert (error["code"], error["param"]) == ("model_not_found", "model")


def test_completion_of_text_and_ids_and_lists_of_either(client, live):
    ids = live.llm.encode("add sub max")
    first = client.completions.create(model="slipstream-draft", prompt="add sub max", **GREEDY)
    assert first.object == "text_completion" and first.choices[0].finish_reason in ("length", "stop")
    assert (
        first.usage.prompt_tokens == len(ids) and first.usage.total_tokens == len(ids) + first.usage.completion_tokens
    )
    text = first.choices[0].text
    for prompt in (ids, ["add sub max", "my"], [ids, live.llm.encode("my")]):
        found = client.completions.create(model="slipstream-draft", prompt=prompt, **GREEDY)
        assert found.choices[0].text == text
    assert [choice.index for choice in found.choices] == [0, 1]


def test_chat_streams_what_it_says_whole(client, live, problem):
    asked = {"model": "slipstream-draft", "messages": [{"role": "user", "content": problem}], "temperature": 0}
    whole = client.chat.completions.create(**asked)
    message = whole.choices[0].message
    assert message.reasoning == message.reasoning_content and len(message.reasoning) > 20
    assert "think>" not in message.reasoning + message.content
    parts, reasoning, usage, role = [], [], None, None
    for chunk in client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        if not chunk.choices:
            usage = chunk.usage
            continue
        assert chunk.id.startswith("chatcmpl-") and chunk.usage is None and usage is None
        delta = chunk.choices[0].delta
        role = role or delta.role
        parts.append(delta.content or "")
        reasoning.append(getattr(delta, "reasoning", ""))
        assert getattr(delta, "reasoning", "") == getattr(delta, "reasoning_content", "")
    assert ("".join(parts), "".join(reasoning), role) == (message.content, message.reasoning, "assistant")
    assert len(reasoning) > 10 and chunk.choices == []
    assert usage.completion_tokens == whole.usage.completion_tokens
    assert 0 < usage.completion_tokens_details.reasoning_tokens < usage.completion_tokens
    assert usage.completion_tokens_details == whole.usage.completion_tokens_details
    assert usage.prompt_tokens_details.cached_tokens > 0  # the second time


def test_content_parts_and_developers(live):
    parts = [{"type": "text", "text": "hello"}]
    asked = {"messages": [{"role": "developer", "content": "be"}, {"role": "user", "content": parts}], **GREEDY}
    plain = {"messages": [{"role": "system", "content": "be"}, {"role": "user", "content": "hello"}], **GREEDY}
    answers = [live.post("/v1/chat/completions", **body).json()["choices"][0]["message"] for body in (asked, plain)]
    assert answers[0] == answers[1]


def test_n_seed_stop_and_stream_agree(live):
    body = {"prompt": "add sub", "n": 3, "seed": 5, "temperature": 1.3, "max_tokens": 40, "stop": ["a", "1"]}
    whole = live.completions(**body)
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2]
    assert len({choice["text"] for choice in whole["choices"]}) > 1
    assert live.completions(**body)["choices"] == whole["choices"]
    texts, reasons = ["", "", ""], [None] * 3
    for event in live.events("/v1/completions", **body, stream_options={"include_usage": True})[:-1]:
        (choice,) = event["choices"]
        texts[choice["index"]] += choice["text"]
        reasons[choice["index"]] = (choice["finish_reason"], choice["stop_reason"])
    assert texts == [choice["text"] for choice in whole["choices"]]
    assert reasons == [(choice["finish_reason"], choice["stop_reason"]) for choice in whole["choices"]]
    for choice in whole["choices"]:
        assert choice["finish_reason"] == "length" or choice["stop_reason"] in ("a", "1", 2, None)
        assert "a" not in choice["text"] and "1" not in choice["text"]


def test_usage_in_every_chunk(live):
    wanted = {"include_usage": True, "continuous_usage_stats": True, "include_obfuscation": False}
    body = {"prompt": "add sub", "max_tokens": 5, "ignore_eos": True, "return_token_ids": True}
    events = live.events("/v1/completions", **body, stream_options=wanted)
    tokens = [
        sum(len(c["token_ids"]) for event in events[: i + 1] for c in event["choices"]) for i in range(len(events))
    ]
    assert [event["usage"]["completion_tokens"] for event in events] == tokens and tokens[-1] == 5


def test_several_prompts_stream_into_one(live):
    body = {"prompt": ["add", "my", "h\u00e9 \U0001f389"], "n": 2, "seed": 1, "max_tokens": 9, "ignore_eos": True}
    whole = live.completions(**body)["choices"]
    events = live.events("/v1/completions", **body)
    for choice in whole:
        own = [event["choices"][0] for event in events if event["choices"][0]["index"] == choice["index"]]
        assert "".join(part["text"] for part in own) == choice["text"]
        assert [part["finish_reason"] for part in own if part["finish_reason"]] == ["length"]


def test_lm_eval_asks_for_likelihoods(live):
    """lm_eval's ``local-completions``: token ids, echo, logprobs 1, one token more than it needs."""
    llm = live.llm
    context, continuation = llm.encode("add sub max"), llm.encode(" min mul")
    body = {"prompt": [[*context, *continuation]], "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234}
    choice = live.completions(**body, echo=True)["choices"][0]
    table = choice["logprobs"]
    assert len(table["tokens"]) == len(table["token_logprobs"]) == len(context) + len(continuation) + 1
    assert table["token_logprobs"][0] is None and table["top_logprobs"][0] is None
    asked = table["token_logprobs"][len(context) : -1]
    own = llm.asynchronous().score(context, continuation)
    assert asked == pytest.approx(asyncio.run(own), abs=1e-4)
    assert choice["text"].startswith("add sub max min mul")
    for offset, token in zip(table["text_offset"], table["tokens"], strict=True):
        assert choice["text"][offset : offset + len(token)] == token
    only = live.completions(**body | {"max_tokens": 0}, echo=True)
    assert only["choices"][0]["logprobs"]["token_logprobs"] == table["token_logprobs"][:-1]
    assert only["usage"]["completion_tokens"] == 0 and only["choices"][0]["text"] == "add sub max min mul"


def test_vllm_bench_serve_asks_and_reads(live):
    """The body of its ``async_request_openai_completions`` (and of the chat one), read as it reads: line by line,
    comments skipped, text from the first choice, the number of tokens from the chunk without choices."""
    body = {
        "model": "slipstream-draft", "prompt": "add sub max", "temperature": 0.0, "repetition_penalty": 1.0,
        "max_tokens": 9, "logprobs": None, "stream": True, "stream_options": {"include_usage": True},
        "ignore_eos": True,
    }  # fmt: skip
    chat = {name: value for name, value in body.items() if name not in ("prompt", "max_tokens")}
    parts = [{"type": "text", "text": "add sub max"}]
    chat |= {"messages": [{"role": "user", "content": parts}], "max_completion_tokens": 9, "logprobs": None}
    for path, asked in (("/v1/completions", body), ("/v1/chat/completions", chat)):
        text, tokens = "", 0
        with live.http.stream("POST", path, json=asked, headers={"Authorization": "Bearer None"}) as reply:
            assert reply.status_code == 200
            for line in filter(None, reply.iter_lines()):
                if line.startswith(":") or (data := line.removeprefix("data: ")) == "[DONE]":
                    continue
                chunk = json.loads(data)
                if choices := chunk.get("choices"):
                    text += choices[0].get("text") or choices[0].get("delta", {}).get("content") or ""
                elif usage := chunk.get("usage"):
                    tokens = usage.get("completion_tokens")
        assert tokens == 9 and (text or "chat" in path)  # a chat that thinks shows no content yet


def test_prompt_logprobs_reuse_the_prefix_cache(live):
    """What ATTS does at every turn: score the new end of a long text; its beginning is not computed again."""
    ids = (live.llm.encode("add sub max min mul ") * 60)[:400]
    full = live.completions(prompt=ids, max_tokens=0, prompt_logprobs=1)["choices"][0]["prompt_logprobs"]
    assert len(full) == 400 and full[0] is None
    prefilled = live.llm.stats()["prefill_tokens"]
    again = live.completions(prompt=ids, max_tokens=0, prompt_logprobs=1, prompt_logprobs_start=390)
    table = again["choices"][0]["prompt_logprobs"]
    assert table[:390] == [None] * 390
    for mine, theirs in zip(table[390:], full[390:], strict=True):
        assert mine.keys() == theirs.keys()
        assert [v["logprob"] for v in mine.values()] == pytest.approx([v["logprob"] for v in theirs.values()], abs=1e-4)
    assert live.llm.stats()["prefill_tokens"] - prefilled <= 400 - 384 + live.llm.memory.page_size
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] >= 320
    assert str(ids[-1]) in table[-1] and table[-1][str(ids[-1])]["rank"] >= 1
    live.error("/v1/completions", 400, prompt=ids, prompt_logprobs=0, prompt_logprobs_start=400)


def test_chat_logprobs_and_token_ids(client, live):
    asked = {"model": "slipstream-draft", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 5}
    found = client.chat.completions.create(
        **asked,
        temperature=0,
        logprobs=True,
        top_logprobs=3,
        extra_body={"return_token_ids": True, "prompt_logprobs": 0},
    )
    entries = found.choices[0].logprobs.content
    assert len(entries) == 5 == len(found.choices[0].token_ids)
    for entry, token in zip(entries, found.choices[0].token_ids, strict=True):
        assert entry.token == live.llm.codec.token_text(token) and len(entry.top_logprobs) == 3
        assert entry.logprob == max(top.logprob for top in entry.top_logprobs)
    assert found.prompt_token_ids == live.llm.encode("hello", chat=True)
    assert len(found.prompt_logprobs) == len(found.prompt_token_ids)
    events = live.events(
        "/v1/chat/completions", **asked, temperature=0, logprobs=True, return_token_ids=True, prompt_logprobs=0
    )
    assert sum((e["choices"][0].get("token_ids", []) for e in events), []) == found.choices[0].token_ids
    assert sum("prompt_logprobs" in e for e in events) == 1


def test_completion_stream_with_echo_and_ids(live):
    body = {"prompt": "add sub", "echo": True, "logprobs": 2, "return_token_ids": True, "prompt_logprobs": 1, **GREEDY}
    whole = live.completions(**body)["choices"][0]
    parts = [event["choices"][0] for event in live.events("/v1/completions", **body)]
    assert "".join(part["text"] for part in parts) == whole["text"]
    for name, column in whole["logprobs"].items():
        assert sum((part["logprobs"][name] for part in parts), []) == column
    assert sum((part["token_ids"] for part in parts), []) == whole["token_ids"]
    assert parts[0]["prompt_logprobs"] == whole["prompt_logprobs"]
    assert parts[0]["prompt_token_ids"] == live.llm.encode("add sub")


@pytest.mark.parametrize("as_ids", [False, True])
def test_offsets_are_places_in_the_text(live, as_ids):
    """Also where characters take several tokens, and with special tokens: evaluators cut by them."""
    text = "h\u00e9 add \u4e16\U0001f389 <|im_end|>my"
    prompt = live.llm.encode(text) if as_ids else text
    choice = live.completions(prompt=prompt, echo=True, logprobs=0, max_tokens=4, ignore_eos=True)["choices"][0]
    table, echoed = choice["logprobs"], choice["text"]
    assert echoed.startswith(text)
    for offset, token in zip(table["text_offset"], table["tokens"], strict=True):
        if "\ufffd" not in token:
            assert echoed[offset : offset + len(token)] == token
    begins = {echoed[at] for at, token in zip(table["text_offset"], table["tokens"], strict=True) if "\ufffd" in token}
    assert {"\u00e9", "\u4e16", "\U0001f389"} <= begins
    parts = [e["choices"][0]["logprobs"]["text_offset"] for e in live.events(
        "/v1/completions", prompt=prompt, echo=True, logprobs=0, max_tokens=4, ignore_eos=True, temperature=0
    )]  # fmt: skip
    assert sum(parts, [])[: len(table["tokens"]) - 4] == table["text_offset"][:-4]


def test_tokenize_and_detokenize(live):
    text = "h\u00e9llo \u4e16 <think>\n<|im_end|>"
    found = live.post("/tokenize", prompt=text, return_token_strs=True).json()
    assert found["tokens"] == live.llm.encode(text) and found["count"] == len(found["tokens"])
    assert found["max_model_len"] == 2048 and "<|im_end|>" in found["token_strs"]
    assert live.post("/detokenize", tokens=found["tokens"]).json() == {"prompt": text}
    chat = live.post("/tokenize", messages=[{"role": "user", "content": "x"}]).json()["tokens"]
    assert chat == live.llm.encode("x", chat=True)
    live.error("/detokenize", 400, tokens=[10**30])
    live.error("/detokenize", 400, tokens=[-1])
    live.error("/tokenize", 400)


def test_salts_share_no_cache(live):
    ids = (live.llm.encode("min mul add ") * 40)[:200]
    cached = [
        live.completions(prompt=ids, cache_salt=salt, max_tokens=1)["usage"]["prompt_tokens_details"]["cached_tokens"]
        for salt in ("a", "a", "b")
    ]
    assert cached[0] == cached[2] == 0 and cached[1] > 0


def test_a_model_without_tokenizer_serves_ids(serving, tiny):
    with serving(tiny()) as bare:
        asked = {"messages": [{"role": "user", "content": "x"}], "scaling": {"samples": 4}}
        assert "--draft" in bare.error("/v1/chat/completions", 400, **asked)["message"]
        choice = bare.completions(prompt=[1, 2, 3], max_tokens=4, temperature=0, logprobs=1, return_token_ids=True)
        assert len(choice["choices"][0]["token_ids"]) >= 1 and choice["choices"][0]["text"] == ""
        assert choice["choices"][0]["logprobs"]["tokens"][0].startswith("token_id:")
        for path, body in (
            ("/v1/completions", {"prompt": "text"}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
            ("/tokenize", {"prompt": "x"}),
        ):
            assert "no tokenizer" in bare.error(path, 400, **body)["message"]


class Scale:
    """A scaling of nothing: what the server makes of one."""

    def chains(self, options):
        if options.get("samples") == 0:
            raise ValueError("samples must be at least 1")
        return options.get("samples", 1)

    async def __call__(self, messages, options, max_tokens):
        if options.get("samples") == 13:
            raise RuntimeError("the draft died of a secret")
        used = {"draft": {"prompt_tokens": 3, "completion_tokens": 40}, "target": {"prompt_tokens": 50}}
        return Scaled(messages[0]["content"].upper(), "because", {"rate": 0.2, "bound": 0.3, **options}, used)


def test_scaling_has_a_seam(client, live):
    path, asked = "/v1/chat/completions", {"messages": [{"role": "user", "content": "forty-two"}]}
    found = client.chat.completions.create(
        model="slipstream-draft", messages=asked["messages"], extra_body={"scaling": {"samples": 4}}
    )
    assert found.choices[0].message.content == "FORTY-TWO" and found.scaling["samples"] == 4
    assert found.usage.completion_tokens == 40 and found.usage.models["target"] == {"prompt_tokens": 50}
    events = live.events(path, **asked, scaling={})
    assert "".join(e["choices"][0]["delta"].get("content") or "" for e in events) == "FORTY-TWO"
    assert events[-1]["scaling"]["rate"] == 0.2
    assert live.http.get("/stats").json()["scaling"]["bound"] == 0.3
    assert "at least 1" in live.error(path, 400, **asked, scaling={"samples": 0})["message"]
    error = live.error(path, 500, **asked, scaling={"samples": 13})
    assert error["type"] == "server_error" and "secret" not in error["message"]
    assert "exceed the queue" in live.error(path, 400, **asked, scaling={"samples": 5000})["message"]
    for field in ({"n": 2}, {"stop": "x"}, {"logprobs": True}, {"cache_salt": "mine"}, {"min_tokens": 3}):
        error = live.error(path, 400, **asked, scaling={}, **field)
        assert error["param"] == next(iter(field)) and "together with scaling" in error["message"]


@pytest.fixture(scope="module")
def scaled(serving, draft_model, target_model):
    """The embedded pair: the draft thinks, the target verifies."""
    defaults = ATTS(alpha=0.4, answers="tagged", samples=3, turns=8, draft_tokens=60, target_tokens=60)
    with serving(target_model, scale=Scaler(draft_model, target_model, defaults, most_chains=8)) as live:
        yield live
        live.at_rest()
        wait_until(lambda: draft_model.stats()["pages_used"] == 0)
    draft_model.close()


def test_a_draft_and_a_target_answer_a_chat(scaled, draft_model):
    problem = tasks.make("program", seed=3, steps=3)
    asked = {"model": "slipstream-target", "messages": [{"role": "user", "content": problem.prompt}]}
    with openai.OpenAI(base_url=scaled.url + "/v1", api_key="none", max_retries=0, timeout=60) as client:
        found = client.chat.completions.create(**asked, seed=1, extra_body={"scaling": {"alpha": 0.5, "samples": 4}})
        again = client.chat.completions.create(**asked, seed=1, extra_body={"scaling": {"alpha": 0.5, "samples": 4}})
    choice, certificate = found.choices[0], found.scaling
    assert (
        choice.finish_reason == "stop" and choice.message.content == certificate["answer"] and choice.message.reasoning
    )
    assert certificate["tests"] > 0 and abs(certificate["rate"] - 0.5) <= certificate["bound"] and certificate["holds"]
    models = found.usage.models
    assert models["draft"]["completion_tokens"] > 0 and models["target"]["scored_tokens"] > 0
    assert found.usage.completion_tokens == sum(model["completion_tokens"] for model in models.values())
    assert again.choices[0].message.content == choice.message.content  # one seed, one answer
    (event,) = scaled.events("/v1/chat/completions", messages=asked["messages"], scaling={"alpha": 0, "samples": 1})
    assert event["usage"]["models"]["target"]["completion_tokens"] == 0 and event["scaling"]["tests"] == 0
    alone = {"messages": asked["messages"], "scaling": {"alpha": 1, "samples": 1}, "temperature": 0, "max_tokens": 256}
    (event,) = scaled.events("/v1/chat/completions", **alone)
    whole = scaled.chat(problem.prompt, temperature=0, max_tokens=256)["choices"][0]["message"]
    assert event["choices"][0]["delta"]["content"] == whole["content"]  # the target alone is the target


def test_scaling_refuses_what_it_cannot_do(scaled):
    assert set(OPTIONS) < {option.name for option in fields(ATTS)}
    path, asked = "/v1/chat/completions", {"messages": [{"role": "user", "content": "add"}]}
    for options, text in (
        ({"samples": 9}, "limit of 8"), ({"samples": "4"}, "must be a int"), ({"alpha": 2}, "alpha"),
        ({"alpah": 0.2}, "did you mean 'alpha'"), ({"window": 500}, "window"), ({"score": "guess"}, "guess"),
        ({"symbolic": True}, "symbolic"), ({"samples": True}, "samples"), ({"turns": None}, "turns"),
        ({"chain_tokens": 2}, "a chain may have 2"),
    ):  # fmt: skip
        error = scaled.error(path, 400, **asked, scaling=options)
        assert text in error["message"] and error["param"] == "scaling", (options, error)


def test_who_leaves_a_scaled_chat_cancels_all_of_its_chains(scaled, draft_model):
    body = {"messages": [{"role": "user", "content": "add"}], "scaling": {"samples": 8, "draft_tokens": 1500}}
    connection = scaled.raw(scaled.request_bytes("/v1/chat/completions", body))
    wait_until(lambda: draft_model.stats()["running"] > 0)
    assert scaled.service.gate.chains == 8
    connection.close()
    scaled.at_rest()
    wait_until(lambda: draft_model.stats()["running"] == 0 and draft_model.stats()["pages_used"] == 0)
