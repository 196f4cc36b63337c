"""What is pure: fields, prompts, messages, the thinking split, frames, keys, log lines."""

import io
import json
import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from slipstream.server.config import Keys, ServerConfig
from slipstream.server.door import _key_of
from slipstream.server.errors import ApiError
from slipstream.server.logs import LogHandler, LogLines
from slipstream.server.reply import CLOSE, OPEN, Thinking
from slipstream.server.schemas import (
    NEUTRAL,
    WITHOUT_EFFECT,
    ChatRequest,
    CompletionRequest,
    parse_messages,
    parse_prompts,
)
from slipstream.server.streaming import sse
from slipstream.types import SamplingParams

LIMITS = ServerConfig()
TAGGED = st.lists(
    st.one_of(st.sampled_from([OPEN, CLOSE, "<", "</", "</think", "think>", " ", "\n", "é", "🎉"]), st.text(max_size=5))
).map("".join)


def split(pieces, is_open=False):
    thinking = Thinking(is_open)
    parts = [thinking.push(piece, is_last=i == len(pieces) - 1) for i, piece in enumerate(pieces)]
    return "".join(r for r, _ in parts), "".join(a for _, a in parts)


@given(TAGGED, st.booleans(), st.data())
@settings(max_examples=200, deadline=None)
def test_thinking_splits_the_same_however_it_is_cut(text, is_open, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert split(pieces, is_open) == split([text], is_open) == split(list(text) or [""], is_open)


@given(TAGGED, st.booleans())
@settings(max_examples=200, deadline=None)
def test_thinking_is_what_the_rule_says(text, is_open):
    begun = text.lstrip()
    if not is_open and not begun.startswith(OPEN):
        assert split([text]) == ("", text)
        return
    inside, _, after = (text if is_open else begun[len(OPEN) :]).partition(CLOSE)
    assert split([text], is_open) == (inside.strip(), after.lstrip())


def test_reasoning_is_shown_as_soon_as_it_is_certain():
    thinking = Thinking()
    shown = [thinking.push(piece) for piece in ("<thi", "nk>\n", "one", " two </", "b> </thi", "nk>\n\n", "42", " ok")]
    assert shown == [("", ""), ("", ""), ("one", ""), (" two", ""), (" </b>", ""), ("", ""), ("", "42"), ("", " ok")]


@given(st.recursive(st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
                    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8))  # fmt: skip
def test_frames_hold_any_text(value):
    frame = sse({"x": value})
    assert frame.startswith(b"data: ") and frame.endswith(b"\n\n") and frame.count(b"\n") == 2 and b"\r" not in frame
    assert json.loads(frame[6:]) == {"x": value}


def test_unknown_fields_are_refused_by_name():
    with pytest.raises(ApiError, match="max_tokns; did you mean 'max_tokens'") as caught:
        CompletionRequest.model_validate({"prompt": "x", "max_tokns": 3})
    assert caught.value.code == "unknown_parameter" and caught.value.param == "max_tokns"


@pytest.mark.parametrize("name", sorted(NEUTRAL.keys() - CompletionRequest.model_fields.keys()))
def test_fields_that_we_cannot_honour_pass_only_where_they_change_nothing(name):
    for value in (*NEUTRAL[name], None):
        CompletionRequest.model_validate({"prompt": "x", name: value})
    with pytest.raises(ApiError, match=f"{name} is not supported"):
        CompletionRequest.model_validate({"prompt": "x", name: ["something"]})


@pytest.mark.parametrize("field", [{"frequency_penalty": False}, {"use_beam_search": 0}, {"skip_special_tokens": 1}])
def test_a_number_is_no_truth_value(field):
    with pytest.raises(ApiError, match="is not supported"):
        CompletionRequest.model_validate({"prompt": "x", **field})


def test_fields_without_effect_and_nulls():
    body = ChatRequest.model_validate(
        {"messages": [], **dict.fromkeys(WITHOUT_EFFECT, "any"), **dict.fromkeys(("n", "stop", "seed", "top_p"))}
    )
    assert body.params(LIMITS) == SamplingParams(max_tokens=None)
    body = ChatRequest.model_validate({"messages": [], "max_completion_tokens": 7, "max_tokens": 9, "stop": "x"})
    assert body.params(LIMITS) == SamplingParams(max_tokens=7, stop=("x",))


@pytest.mark.parametrize(
    "field",
    [
        {"n": 129}, {"n": 0}, {"n": 1.5}, {"n": True}, {"n": "2"}, {"temperature": -1}, {"temperature": "hot"},
        {"temperature": float("nan")}, {"top_p": 0}, {"top_p": 2}, {"stop": list("abcde")}, {"stop": [""]},
        {"stop": "x" * 257}, {"stop": [1]}, {"logprobs": 21}, {"logprobs": -1}, {"prompt_logprobs": 21}, {"seed": -1},
        {"seed": 2**63}, {"seed": 10**400}, {"max_tokens": -1}, {"best_of": 3}, {"stream": 1}, {"stop_token_ids": [-1]},
        {"stream_options": {"include_usage": True}}, {"stream_options": {"include_usage": "yes"}}, {"min_p": 7},
        {"stream_options": {"include_usge": True}, "stream": True},
        {"prompt_logprobs_start": "x"}, {"model": 3}, {"top_k": -2},
    ],
    ids=str,
)  # fmt: skip
def test_bad_fields(field):
    with pytest.raises((ApiError, ValidationError)):
        CompletionRequest.model_validate({"prompt": "x", **field}).params(LIMITS)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)


@given(JSON)
@settings(max_examples=150, deadline=None)
def test_prompts_of_any_kind_parse_or_are_refused(value):
    try:
        prompts = parse_prompts(value, most=3)
    except ApiError as error:
        assert error.status_code == 400 and error.param == "prompt"
        return
    assert 1 <= len(prompts) <= 3
    for prompt in prompts:
        assert isinstance(prompt, str) or all(type(token) is int for token in prompt)


MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "developer", "tool", None])},
    optional={"content": JSON | st.just([{"type": "text", "text": "x"}]), "tool_calls": JSON, "name": JSON},
)


@given(JSON | st.lists(MESSAGE | JSON, max_size=3))
@settings(max_examples=150, deadline=None)
def test_messages_of_any_kind_parse_or_are_refused(value):
    try:
        messages = parse_messages(value)
    except ApiError as error:
        assert error.status_code == 400 and error.param.startswith("messages")
        return
    for message in messages:
        assert message["role"] in ("system", "user", "assistant") and all(isinstance(v, str) for v in message.values())


def test_prompts():
    assert parse_prompts("a", 1) == ["a"] and parse_prompts([1, 2], 1) == [[1, 2]] and parse_prompts([], 1) == [[]]
    assert parse_prompts(["a", [1]], 2) == ["a", [1]] and parse_prompts([[1], [2, 3]], 2) == [[1], [2, 3]]
    for bad in (None, 3, {}, [True], [1, "a"], ["a", 1], [[1.0]], ["a", "b", "c"], "\udfff", [[True]]):
        with pytest.raises(ApiError):
            parse_prompts(bad, 2)


def test_pictures_are_not_fetched():
    picture = {"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}
    with pytest.raises(ApiError, match="parts of type text"):
        parse_messages([{"role": "user", "content": [picture]}])


def test_keys(tmp_path):
    file = tmp_path / "keys"
    file.write_text("first-key\n\n second-key \n")
    keys = Keys(str(file))
    assert keys.accept("first-key") and keys.accept("second-key")
    assert not any(keys.accept(wrong) for wrong in ("", "first-ke", "first-key2", "\udcff"))
    file.write_text("\n")
    with pytest.raises(ValueError, match="holds no API key"):
        Keys(str(file))
    assert _key_of("Bearer  k ") == _key_of("bearer k") == _key_of("Basic dXNlcjpr") == "k"
    assert _key_of("Basic !!") == _key_of("Digest k") == _key_of("") == ""


@pytest.mark.parametrize("bad", [{"max_n": 0}, {"port": 70000}, {"keep_alive_s": 0.0}, {"drain_s": -1}], ids=str)
def test_bad_settings(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        ServerConfig(**bad)
    with pytest.raises(TypeError, match="did you mean 'max_queue'"):
        ServerConfig(max_queu=3)


@pytest.mark.parametrize("as_json", [False, True])
def test_no_client_writes_a_log_line_of_its_own(as_json):
    record = logging.LogRecord("x", logging.INFO, "f", 1, "request %s", ("a\nb",), None)
    record.facts = {"path": '/\n12:00:00 info forged "x"', "status": 200}
    line = LogLines(as_json).format(record)
    assert "\n" not in line and "status" in line
    if as_json:
        assert json.loads(line)["path"] == record.facts["path"]


def test_a_log_that_cannot_be_written_says_so_when_it_can_again(monkeypatch):
    class Disk(io.StringIO):
        full = True

        def flush(self):
            if self.full:
                self.truncate(0)
                raise OSError(28, "No space left on device")

    disk = Disk()
    monkeypatch.setattr(LogHandler, "unsaid", 0)
    handler, before = LogHandler(disk), LogHandler.lost
    handler.setFormatter(LogLines(True))
    for _ in range(3):
        handler.emit(logging.LogRecord("x", logging.INFO, "f", 1, "one", (), None))
    assert LogHandler.lost - before == 3
    disk.full = False
    handler.emit(logging.LogRecord("x", logging.INFO, "f", 1, "two", (), None))
    said = [json.loads(line)["message"] for line in disk.getvalue().strip("\0\n").splitlines()]
    assert said == ["3 log lines were lost", "two"]
