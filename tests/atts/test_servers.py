"""Contracts with servers: fakes that answer in each one's format, with log-probabilities that name their place."""

import asyncio
import json

import httpx
import pytest
from simulated import Model, problems

from slipstream.atts.backends import Ask, BackendError
from slipstream.atts.config import ATTS
from slipstream.atts.pipeline.run import Run
from slipstream.atts.servers import OpenAIServer, SGLangServer, VLLMServer

END = 9


def logprob(token, place):
    """Of a token at a place of the whole sequence: one wrong offset and every number is another."""
    return -(token + 100 * place) / 1000


class Fake:
    """Answers like a server. plan: status codes or exceptions for the next requests. seen: their bodies."""

    def __init__(self, plan=(), models=("m",)):
        self.plan, self.models, self.seen, self.paths = list(plan), models, [], []

    def __call__(self, request):
        self.paths.append(request.url.path)
        body = json.loads(request.content) if request.content else {}
        self.seen.append(body)
        step = self.plan.pop(0) if self.plan and request.url.path != "/v1/models" else None
        if isinstance(step, Exception):
            raise step
        if isinstance(step, int):
            return httpx.Response(step, text="no")
        if step is not None:
            return httpx.Response(200, json=step)
        name = request.url.path.strip("/").replace("/", "_")
        return httpx.Response(200, json=getattr(self, name)(body))

    def v1_models(self, body):
        return {"object": "list", "data": [{"id": name} for name in self.models]}

    def tokenize(self, body):
        words = body["prompt"] if "prompt" in body else body["messages"][0]["content"]
        ids = [1] * body["add_special_tokens"] + [10 + ord(c) for c in words]  # 1: begin of sequence
        return {"count": len(ids), "max_model_len": 100, "tokens": ids}

    def detokenize(self, body):
        return {"prompt": "".join(chr(i - 10) for i in body["tokens"] if i > 10)}


class FakeVLLM(Fake):
    written = (21, 22, END)

    def v1_completions(self, body):
        prompt, choice = body["prompt"], {"index": 0, "text": "..", "finish_reason": "stop", "stop_reason": None}
        ids = list(self.written)[: body["max_tokens"]]
        choice |= {"token_ids": ids, "logprobs": None, "prompt_logprobs": None}
        if ids != list(self.written):
            choice["finish_reason"] = "length"
        if body.get("logprobs") is not None:
            values = [logprob(t, len(prompt) + i) for i, t in enumerate(ids)]
            choice["logprobs"] = {
                "tokens": ["."] * len(ids), "token_logprobs": values, "text_offset": list(range(len(ids))),
                "top_logprobs": [{"a": -0.5, "b": -1.5} for _ in ids],
            }  # fmt: skip
        if body.get("prompt_logprobs") is not None:
            choice["prompt_logprobs"] = [None] + [
                {str(t): {"logprob": logprob(t, i), "rank": 2, "decoded_token": "."},
                 "3": {"logprob": -0.1, "rank": 1, "decoded_token": "x"}}
                for i, t in enumerate(prompt) if i
            ]  # fmt: skip
        usage = {"prompt_tokens": len(prompt), "completion_tokens": len(ids), "prompt_tokens_details": None}
        return {"id": "cmpl", "object": "text_completion", "model": body["model"], "choices": [choice], "usage": usage}


class FakeSGLang(Fake):
    written = (21, 22, END)

    def detokenize(self, body):
        return {"text": super().detokenize(body)["prompt"]}

    def generate(self, body):
        ids, params = body["input_ids"], body["sampling_params"]
        out = list(self.written)[: params["max_new_tokens"]]
        finish = {"type": "stop", "matched": END} if out[-1:] == [END] else {"type": "length", "length": len(out)}
        meta = {"finish_reason": finish, "prompt_tokens": len(ids), "completion_tokens": len(out), "cached_tokens": 0}
        if body.get("return_logprob"):
            start = body.get("logprob_start_len", len(ids))
            meta["cached_tokens"] = max(0, start)
            given = ids[start:] if start >= 0 else []
            rows = [[logprob(t, start + i), t, None] for i, t in enumerate(given)]
            meta["input_token_logprobs"] = [[None, rows[0][1], None], *rows[1:]] if rows else []
            meta["output_token_logprobs"] = [[logprob(t, len(ids) + i), t, None] for i, t in enumerate(out)]
            if body.get("top_logprobs_num"):
                meta["output_top_logprobs"] = [[[-0.5, 21, "a"], [-1.5, 22, "b"]] for _ in out]
        return {"text": "..", "output_ids": out, "meta_info": meta}


class FakeOpenAI(Fake):
    """Tokens are runs of two characters, counted from the beginning of the prompt. echo_: does it answer to echo?"""

    text, echo_ = " so 42", True

    def v1_completions(self, body):
        prompt = body["prompt"]
        if body.get("echo"):
            if not self.echo_:
                return {"choices": [{"text": "", "logprobs": None, "finish_reason": "length"}]}
            whole = prompt + self.text[: body["max_tokens"]]
            pieces = [whole[i : i + 2] for i in range(0, len(whole), 2)]
            return {"choices": [{"text": whole, "finish_reason": "length", "logprobs": {
                "tokens": pieces, "text_offset": list(range(0, len(whole), 2)),
                "token_logprobs": [None] + [logprob(ord(p[0]), i) for i, p in enumerate(pieces) if i],
                "top_logprobs": None}}]}  # fmt: skip
        choice = {"text": self.text, "finish_reason": "stop", "logprobs": None}
        if body.get("logprobs"):
            choice["logprobs"] = {"tokens": [self.text[:3], self.text[3:]], "token_logprobs": [-0.25, -0.5],
                                  "text_offset": [len(prompt), len(prompt) + 3],
                                  "top_logprobs": [{"a": -0.5, "b": -1.5}, {"c": -0.1, "d": -2.5}]}  # fmt: skip
        return {"choices": [choice], "usage": {"completion_tokens": 2}}


SERVERS = {"vllm": (VLLMServer, FakeVLLM), "sglang": (SGLangServer, FakeSGLang), "openai": (OpenAIServer, FakeOpenAI)}
BY_ID = ("vllm", "sglang")


def make(kind, plan=(), models=("m",), **options):
    server, fake = SERVERS[kind]
    fake = fake(plan, models)
    client = httpx.AsyncClient(transport=httpx.MockTransport(fake))
    return server("http://host:1/v1", client=client, backoff_s=0.0, **options), fake


def do(work):
    return asyncio.run(work)


@pytest.mark.parametrize("kind", BY_ID)
@pytest.mark.parametrize("start", [1, 2, 5, 6])
def test_every_token_of_the_turn_is_scored_at_its_own_place(kind, start):
    server, fake = make(kind)
    ids = [31, 32, 33, 32, 33, 34, 31]  # the turn's tokens were there before
    assert do(server.score(ids, start)) == [logprob(t, start + i) for i, t in enumerate(ids[start:])]
    if kind == "sglang":
        assert (
            fake.seen[-1]["logprob_start_len"] == start - 1 and fake.seen[-1]["sampling_params"]["max_new_tokens"] == 0
        )
        assert server.counters() == {"prefill_tokens": 8 - start, "cached_tokens": start - 1}
    else:
        assert fake.seen[-1]["prompt"] == ids and fake.seen[-1]["prompt_logprobs"] == 0


@pytest.mark.parametrize("kind", BY_ID)
def test_token_ids_go_in_and_come_out_without_the_end_token(kind):
    server, fake = make(kind)
    turn = do(server.extend([31, 32], Ask(5, 0.8, 0.9, seed=2**40 + 3, tops=2)))
    assert (turn.ids, turn.tokens, turn.finish) == ([21, 22], 2, "stop")
    assert turn.logprob == pytest.approx(logprob(21, 2) + logprob(22, 3))
    assert turn.first_tops == {"a": -0.5, "b": -1.5} and turn.entropy == pytest.approx(0.9395, abs=1e-3)
    sent = fake.seen[-1] if kind == "vllm" else fake.seen[-1]["sampling_params"]
    assert (sent["temperature"], sent["top_p"]) == (0.8, 0.9)
    assert do(server.extend([31], Ask(2))).finish == "length" and do(server.extend([31], Ask(2))).logprob is None
    do(server.extend([31], Ask(2, ban_end=True)))
    sent = fake.seen[-1] if kind == "vllm" else fake.seen[-1]["sampling_params"]
    assert sent.get("min_tokens", sent.get("min_new_tokens")) == 1


@pytest.mark.parametrize("kind", BY_ID)
def test_a_begin_of_sequence_token_comes_once_with_the_prompt(kind):
    server, _ = make(kind)
    assert do(server.prompt({"prompt": "ab"})) == [1, 107, 108]
    assert do(server.encode("ab")) == [107, 108]
    assert do(server.decode([1, 107, 108])) == "ab"
    assert do(server.prompt({"prompt_token_ids": [4, 5]})) == [4, 5]


def test_messages_go_through_the_servers_template():
    server, fake = make("vllm")
    assert do(server.prompt({"messages": [{"role": "user", "content": "a"}]})) == [1, 107]
    assert "messages" in fake.seen[-1]


def test_text_in_text_out_with_offsets_of_characters():
    server, fake = make("openai")
    ids = do(server.prompt({"prompt": "ab\u00e9d"}))  # 4 characters, 5 bytes
    turn = list(b"xyab")  # "ab" was there before
    found = do(server.score(ids + turn, len(ids)))
    assert found == [logprob(ord("x"), 2), logprob(ord("a"), 3)]
    assert fake.seen[-1]["prompt"] == "ab\u00e9dxyab"
    odd = do(server.score(ids + turn, len(ids) - 1))  # begins inside a token: that token belongs to the turn
    assert odd == [logprob(ord("\u00e9"), 1), *found]
    written = do(server.extend(ids, Ask(8, tops=2)))
    assert (bytes(written.ids), written.tokens, written.finish) == (b" so 42", 2, "stop")
    assert written.logprob == -0.75 and written.first_tops == {"a": -0.5, "b": -1.5}


def test_half_a_character_at_the_cut_is_left_for_the_next_turn():
    server, fake = make("openai")
    FakeOpenAI.text, kept = "so \ufffd", FakeOpenAI.text
    try:
        assert bytes(do(server.extend(list(b"a"), Ask(8))).ids) == b"so "
    finally:
        FakeOpenAI.text = kept


def test_a_server_without_prompt_logprobs_is_known_before_any_work():
    server, fake = make("openai")
    do(server.open())
    assert server.can_score and server.name == "m"
    server, fake = make("openai")
    fake.echo_ = False
    do(server.open())
    assert not server.can_score
    refusing, _ = make("openai", plan=[400])
    do(refusing.open())
    assert not refusing.can_score


@pytest.mark.parametrize("kind", SERVERS)
def test_unreachable_and_wrong_models_are_refused_on_opening(kind):
    wrong, _ = make(kind, model="other")
    with pytest.raises(ValueError, match="does not serve 'other' but m"):
        do(wrong.open())
    many, _ = make(kind, models=("a", "b"))
    with pytest.raises(ValueError, match="name the model"):
        do(many.open())
    with pytest.raises(ValueError, match="does not answer"):
        do(SERVERS[kind][0]("http://[::1").open())
    nobody = SERVERS[kind][0]("http://127.0.0.1:9", retries=1, backoff_s=0.0)
    with pytest.raises(ValueError, match="does not answer"):
        do(nobody.open())


def test_a_tokenizer_elsewhere_that_answers_otherwise_is_a_failure():
    for answer in ({}, [1]):
        server, _ = make("vllm", plan=[answer, answer])
        for call in (server.prompt(problems(1)[0]), server.decode([11])):
            with pytest.raises(BackendError, match="tokenize without the promised fields"):
                do(call)


def test_who_is_silent_is_not_waited_for(monkeypatch):
    async def answer(request):
        await asyncio.sleep(30)

    monkeypatch.setattr("slipstream.atts.servers.OPEN_S", 0.05)
    client = httpx.AsyncClient(transport=httpx.MockTransport(answer))
    with pytest.raises(ValueError, match=r"http://here does not answer within 0.05 s"):
        do(VLLMServer("http://here", client=client).open())


@pytest.mark.parametrize("target", [make("vllm", model="other")[0], VLLMServer("http://127.0.0.1:9", retries=0)])
def test_a_run_refuses_them_before_any_work(target, tmp_path):
    draft = Model("draft")
    with pytest.raises(ValueError, match="does not"):
        do(Run(problems(1), draft, target, ATTS(), log=tmp_path / "a.jsonl").run())
    assert draft.log == [("open",)] and draft.closed == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", SERVERS)
@pytest.mark.parametrize(
    "failure", [500, 503, httpx.ConnectError("refused"), httpx.ReadTimeout("slow"), httpx.ReadError("")]
)
def test_connection_errors_and_5xx_are_retried(kind, failure):
    server, fake = make(kind, plan=[failure, failure])
    server.name = "m"
    assert do(server.score(list(b"abcd"), 2))
    assert len(fake.seen) == 3


@pytest.mark.parametrize("kind", SERVERS)
@pytest.mark.parametrize("code", [400, 401, 404, 422, 429])
def test_4xx_is_never_retried(kind, code):
    server, fake = make(kind, plan=[code] * 9)
    with pytest.raises(BackendError, match=str(code)) as caught:
        do(server.score(list(b"abcd"), 2))
    assert caught.value.kind == "refused" and len(fake.seen) == 1


def test_retries_end_and_wait_longer_each_time(monkeypatch):
    slept = []

    async def sleep(seconds):
        slept.append(seconds)

    monkeypatch.setattr("slipstream.atts.servers.asyncio.sleep", sleep)
    server, fake = make("vllm", plan=[500] * 9, retries=3)
    server._backoff_s = 0.5
    with pytest.raises(BackendError) as caught:
        do(server.score([1, 2], 1))
    assert caught.value.kind == "http 500" and len(fake.seen) == 4 and slept == [0.5, 1.0, 2.0]


@pytest.mark.parametrize("kind", SERVERS)
@pytest.mark.parametrize(
    "answer",
    [{}, [], {"choices": []}, {"choices": [{"text": "a", "finish_reason": "length"}]}, {"meta_info": {}},
     {"choices": [{"prompt_logprobs": [None], "logprobs": {"text_offset": [], "token_logprobs": []}}]},
     {"meta_info": {"input_token_logprobs": [[None, 97, None], [-1.0, 5, None]]}},
     {"choices": [{"prompt_logprobs": [None, {}, {}, {}],
                   "logprobs": {"text_offset": [0, 2], "token_logprobs": [None, None]}}]}],
)  # fmt: skip
def test_missing_or_foreign_log_probabilities_are_a_failure_never_a_score(kind, answer):
    server, _ = make(kind, plan=[answer])
    with pytest.raises(BackendError) as caught:
        do(server.score(list(b"abcd"), 2))
    assert caught.value.kind == "empty"


def test_an_answer_that_is_not_json_is_a_failure():
    client = httpx.AsyncClient(transport=httpx.MockTransport(lambda request: httpx.Response(200, text="<html>")))
    with pytest.raises(BackendError, match="not JSON"):
        do(VLLMServer("http://host", client=client).score([1, 2], 1))
