"""Between text and token ids: the tokenizer, text that grows with its tokens, and strings that stop a chain.

The engine knows token ids only; everything that reads or writes text is here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

HALF_CHARACTER = "\ufffd"  # what a decoder writes where a UTF-8 character is not complete yet


class Codec:
    """A tokenizer with the few calls that we need of it. ``transformers`` does the work."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    @classmethod
    def load(cls, path: str | Path) -> Codec | None:
        """The tokenizer of a model directory or hub id; None when a directory has none (it then serves token ids)."""
        folder = Path(path)
        files = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
        if folder.is_dir() and not any((folder / name).exists() for name in files):
            return None
        from transformers import AutoTokenizer

        return cls(AutoTokenizer.from_pretrained(str(path), trust_remote_code=False))

    def encode(self, text: str) -> list[int]:
        text.encode()  # refuses half a surrogate pair, of which a tokenizer would only say that it is no text
        return list(self.tokenizer.encode(text, add_special_tokens=True))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of whole output: special tokens (end of turn and the like) are left out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def token_text(self, token_id: int) -> str:
        """One token as text, special or not (for log-probability tables)."""
        return str(self.tokenizer.decode([token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def chat(
        self, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool = True, **kwargs: Any
    ) -> list[int]:
        """Token ids of a conversation by the model's own template (transformers renders it in Jinja's sandbox)."""
        if not getattr(self.tokenizer, "chat_template", None):
            raise ValueError("this model's tokenizer has no chat template; use generate() with a plain prompt")
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt, **kwargs
            )
        except TemplateError as error:
            raise ValueError(
                f"the chat template cannot take these messages ({error}); "
                "give a list of {'role': ..., 'content': ...}"
            ) from error
        text.encode()
        return list(self.tokenizer.encode(text, add_special_tokens=False))


class GrowingText:
    """Text that grows with its tokens and never shows half a character.

    Law: the pieces of :meth:`push` plus :meth:`flush`, joined, are ``codec.decode`` of all ids. Only the tokens since
    the last complete character are decoded again, with one settled stretch before them for context.
    """

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self._ids: list[int] = []
        self._context = 0  # start of the stretch decoded for context
        self._settled = 0  # ids before this have been handed out
        self.text = ""

    def push(self, ids: Sequence[int]) -> str:
        """Take new tokens; return the text that is certain by now."""
        self._ids += ids
        before = self._codec.decode(self._ids[self._context : self._settled])
        now = self._codec.decode(self._ids[self._context :])
        if now.endswith(HALF_CHARACTER) or len(now) < len(before):
            return ""
        self._context, self._settled = self._settled, len(self._ids)
        piece = now[len(before) :]
        self.text += piece
        return piece

    def flush(self) -> str:
        """What was held back, at the end of the chain: a broken character is then shown as it is."""
        before = self._codec.decode(self._ids[self._context : self._settled])
        piece = self._codec.decode(self._ids[self._context :])[len(before) :]
        self._context = self._settled = len(self._ids)
        self.text += piece
        return piece


class StopText:
    """Growing text of one chain that ends at the first stop string, wherever token borders fall.

    :meth:`push` returns text that can be shown: a tail that may be the beginning of a stop string is held back.
    ``stopped_by`` is the stop string once one was found; the text ends before it. min_tokens: what is complete with so
    many tokens is no stop string.
    """

    def __init__(self, codec: Codec, stop: Sequence[str], min_tokens: int = 0) -> None:
        self._growing = GrowingText(codec)
        self._unstoppable = min_tokens  # tokens that are still to come before a stop string counts
        self._from = 0  # characters of text in which none may end
        self._stop = tuple(stop)
        self._longest = max(map(len, self._stop), default=0)
        self._shown = 0
        self.stopped_by: str | None = None

    @property
    def text(self) -> str:
        """All text that has been shown."""
        return self._growing.text[: self._shown]

    def push(self, ids: Sequence[int]) -> str:
        if self.stopped_by is not None:
            return ""
        early, ids = ids[: self._unstoppable], ids[self._unstoppable :]
        if early:
            self._unstoppable -= len(early)
            self._growing.push(early)
            self._from = len(self._growing.text)
        self._growing.push(ids)
        return self._show(final=False)

    def finish(self) -> str:
        """The chain is over: release what was held back."""
        if self.stopped_by is not None:
            return ""
        self._growing.flush()
        return self._show(final=True)

    def _show(self, final: bool) -> str:
        text = self._growing.text
        first = max(0, self._shown - self._longest)
        hits = [(at, s) for s in self._stop if (at := text.find(s, max(first, self._from - len(s) + 1))) >= 0]
        end = len(text)
        if hits:
            end, self.stopped_by = min(hits)
        elif not final:
            end -= self._possible_start(text)
        piece = text[self._shown : end]
        self._shown = max(self._shown, end)
        return piece

    def _possible_start(self, text: str) -> int:
        """Length of the longest tail of the text that begins some stop string."""
        for size in range(min(self._longest - 1, len(text)), 0, -1):
            if any(s.startswith(text[-size:]) for s in self._stop):
                return size
        return 0
