"""One chain as a client reads it: text, thinking apart from the answer, log-probabilities in the two OpenAI shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from slipstream.text import HALF_CHARACTER, Codec, StopText
from slipstream.types import Delta, Logprob

OPEN, CLOSE = "<think>", "</think>"
TokenText = Callable[[int], str]


class Thinking:
    """Splits growing text into reasoning and answer, without the tags and the white space around them.

    Law: however a text is cut into pieces, the joined parts are those of the whole text pushed at once. Text that does
    not begin with ``<think>`` is all answer, untouched, unless the prompt has opened the tag (``is_open``).
    """

    def __init__(self, is_open: bool = False) -> None:
        self._state = "thinking" if is_open else "start"
        self._pending = ""
        self._is_fresh = True  # nothing of this part was shown: white space at its beginning goes

    @property
    def is_inside(self) -> bool:
        return self._state == "thinking"

    def push(self, piece: str, is_last: bool = False) -> tuple[str, str]:
        """New text to what is certain by now of (reasoning, answer)."""
        self._pending += piece
        if self._state == "start":
            begun = self._pending.lstrip()
            if begun.startswith(OPEN):
                self._state, self._pending = "thinking", begun[len(OPEN) :]
            elif OPEN.startswith(begun) and not is_last:
                return "", ""
            else:
                self._state, self._is_fresh = "answer", False
        reasoning = self._think(is_last) if self._state == "thinking" else ""
        return reasoning, self._take(self._pending) if self._state == "answer" else ""

    def _think(self, is_last: bool) -> str:
        end = self._pending.find(CLOSE)
        if end >= 0:
            reasoning = self._pending[:end].rstrip()
            shown = reasoning.lstrip() if self._is_fresh else reasoning
            self._state, self._is_fresh, self._pending = "answer", True, self._pending[end + len(CLOSE) :]
            return shown
        return self._take(self._pending.rstrip() if is_last else _certain(self._pending))

    def _take(self, text: str) -> str:
        """Show ``text``, the beginning of what is pending."""
        self._pending = self._pending[len(text) :]
        if self._is_fresh:
            text = text.lstrip()
            self._is_fresh = not text
        return text


def _certain(text: str) -> str:
    """Without a tail that may be the beginning of ``</think>``, and without the white space that would go with it."""
    for size in range(min(len(CLOSE) - 1, len(text)), 0, -1):
        if CLOSE.startswith(text[-size:]):
            return text[:-size].rstrip()
    return text.rstrip()


class Reply:
    """A chain that grows. thinking: None where nothing is split off. codec: None for a model without a tokenizer."""

    def __init__(
        self,
        index: int,
        codec: Codec | None,
        stop: Sequence[str],
        thinking: Thinking | None = None,
        min_tokens: int = 0,
    ) -> None:
        self.index, self._thinking = index, thinking
        self._codec = codec
        self._text = StopText(codec, stop, min_tokens) if codec is not None else None
        self._close = codec.tokenizer.convert_tokens_to_ids(CLOSE) if codec is not None and thinking else None
        self.num_tokens = self.num_reasoning = 0
        self._offset = 0  # characters before the next token
        self._half: list[int] = []  # tokens of a character that is not complete
        self.last_s: float | None = None  # when its last token came

    def take(self, delta: Delta) -> tuple[str, str]:
        """What a delta adds to (reasoning, text)."""
        text, reasoning = "", ""
        if self._text is not None:
            text = self._text.push(delta.token_ids)
            text += self._text.finish() if delta.finish_reason else ""
        if self._close in delta.token_ids and not self.num_reasoning:
            self.num_reasoning = self.num_tokens + delta.token_ids.index(self._close) + 1
        self.num_tokens += len(delta.token_ids)
        if self._thinking is not None:
            reasoning, text = self._thinking.push(text, is_last=delta.finish_reason is not None)
            if delta.finish_reason and self._thinking.is_inside:
                self.num_reasoning = self.num_tokens
        return reasoning, text

    def place(self, token: int, text: str) -> int:
        """Where the next token begins in prompt and text; all tokens of one character begin where it does."""
        is_half = HALF_CHARACTER in text
        if self._half and not is_half:
            self._complete()
        begin = self._offset
        if is_half and self._codec is not None:
            self._half.append(token)
            if HALF_CHARACTER not in self._codec.decode(self._half):
                self._complete()
        else:
            self._offset += len(text)
        return begin

    def _complete(self) -> None:
        assert self._codec is not None
        self._offset += len(self._codec.decode(self._half))
        self._half = []


# -- log-probabilities


def _value(logprob: float) -> float:
    return max(logprob, -9999.0)  # JSON has no infinity


def completion_logprobs(
    tokens: Iterable[int], entries: Iterable[dict[int, Logprob] | None], name: TokenText, reply: Reply
) -> dict[str, Any]:
    """The shape of ``/v1/completions``; a token without an entry (the first of a prompt) has null."""
    table: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token, entry in zip(tokens, entries, strict=True):
        table["tokens"].append(name(token))
        table["text_offset"].append(reply.place(token, name(token)))
        table["token_logprobs"].append(None if entry is None else _value(entry[token].logprob))
        ranked = sorted((entry or {}).items(), key=lambda item: item[1].logprob)
        # two tokens may have one text (half characters): the better one stays, and the token itself in any case
        tops = {name(other): _value(found.logprob) for other, found in ranked}
        if entry is not None:
            tops[name(token)] = _value(entry[token].logprob)
        table["top_logprobs"].append(None if entry is None else tops)
    return table


def chat_logprobs(
    tokens: Sequence[int], entries: Sequence[dict[int, Logprob]], name: TokenText, most: int
) -> dict[str, Any]:
    """The shape of ``/v1/chat/completions``. ``bytes`` is null for a token that is half a character."""

    def one(token: int, found: Logprob) -> dict[str, Any]:
        text = name(token)
        known = None if HALF_CHARACTER in text else list(text.encode())
        return {"token": text, "logprob": _value(found.logprob), "bytes": known}

    content = []
    for token, entry in zip(tokens, entries, strict=True):
        ranked = sorted(entry.items(), key=lambda item: -item[1].logprob)[:most]
        content.append(one(token, entry[token]) | {"top_logprobs": [one(*item) for item in ranked]})
    return {"content": content, "refusal": None}


def prompt_logprobs(entries: Sequence[dict[int, Logprob] | None], name: TokenText) -> list[dict[str, Any] | None]:
    """vLLM's shape: for each prompt token null, or a dict of token id to log-probability, rank and text."""
    return [
        None
        if entry is None
        else {
            str(token): {"logprob": _value(found.logprob), "rank": found.rank, "decoded_token": name(token)}
            for token, found in entry.items()
        }
        for entry in entries
    ]
