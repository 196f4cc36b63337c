"""Text from tokens: never half a character, stop strings across token borders, the joined pieces are the whole."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from slipstream.text import Codec, GrowingText, StopText


def byte_codec() -> Codec:
    """Every byte is a token: each non-ASCII character is cut in pieces."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return Codec(PreTrainedTokenizerFast(tokenizer_object=tokenizer))


CODEC = byte_codec()


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=30), st.integers(1, 5))
def test_pieces_join_to_the_whole_and_are_whole_characters(text, chunk):
    ids = CODEC.encode(text)
    growing = GrowingText(CODEC)
    pieces = [growing.push(ids[i : i + chunk]) for i in range(0, len(ids), chunk)]
    assert "".join(pieces) + growing.flush() == CODEC.decode(ids) == text
    assert all("\ufffd" not in p for p in pieces) or "\ufffd" in text


def test_broken_character_at_the_end_is_shown_by_flush_only():
    ids = CODEC.encode("a😀")[:-1]
    growing = GrowingText(CODEC)
    assert [growing.push([i]) for i in ids] == ["a", "", "", ""]
    assert growing.flush() == CODEC.decode(ids)[1:] != ""


@pytest.mark.parametrize("chunk", [1, 2, 3, 50])
def test_stop_string_across_token_borders(chunk):
    ids = CODEC.encode("one two thr three four")
    stop = StopText(CODEC, ("three", "zzz"))
    shown = "".join(stop.push(ids[i : i + chunk]) for i in range(0, len(ids), chunk)) + stop.finish()
    assert shown == stop.text == "one two thr "
    assert stop.stopped_by == "three"


def test_beginning_of_a_stop_string_is_held_back_then_released():
    stop = StopText(CODEC, ("END",))
    assert stop.push(CODEC.encode("xE")) == "x"
    assert stop.push(CODEC.encode("N")) == ""
    assert stop.push(CODEC.encode("x")) == "ENx"
    assert stop.push(CODEC.encode("EN")) == ""
    assert stop.finish() == "EN" and stop.stopped_by is None


def test_earliest_of_several_stop_strings_wins():
    stop = StopText(CODEC, ("bc", "abc"))
    assert stop.push(CODEC.encode("xxabc")) + stop.finish() == "xx"
    assert stop.stopped_by == "abc"


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="abé", max_size=25), st.lists(st.text(alphabet="abé", min_size=1, max_size=3), max_size=3))
def test_stop_text_equals_cutting_the_whole_text(text, stops):
    ids = CODEC.encode(text)
    stop = StopText(CODEC, stops)
    shown = "".join(stop.push([i]) for i in ids) + stop.finish()
    # what is cut is the hit that completes first; then the earliest start among those visible at that moment
    cut = None
    for n in range(len(text) + 1):
        hits = [text[:n].find(s) for s in stops if s in text[:n]]
        if hits:
            cut = min(hits)
            break
    assert shown == (text if cut is None else text[:cut])
