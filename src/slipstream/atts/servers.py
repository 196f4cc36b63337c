"""Models behind HTTP: vLLM, SGLang and whatever else answers OpenAI's ``/v1/completions``."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import httpx

from slipstream.atts.backends import Ask, BackendError, Turn, encode_middle, entropy_of, prompt_ids, vocabulary_of

OPEN_S = 60.0  # for a server to say what it serves


class Server:  # its subclasses add `extend` and `score`
    """What all servers share: requests with retries, the model's name, an optional tokenizer on our side.

    url: ``http://host:port``, with or without ``/v1``. model: its name there; None takes the only one. codec: a
    tokenizer (:class:`slipstream.text.Codec`); None asks the server for ids and text where it can.
    timeout_s: of one request. retries: after connection errors, time-outs and 5xx, never after 4xx; the pause doubles.
    client: an ``httpx.AsyncClient`` to use instead of an own one.
    """

    can_score = True

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        codec: Any = None,
        api_key: str | None = None,
        timeout_s: float = 600.0,
        retries: int = 4,
        backoff_s: float = 0.25,
        client: httpx.AsyncClient | None = None,
    ) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.name = model or ""
        self._codec, self._retries, self._backoff_s = codec, retries, backoff_s
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._client = client or httpx.AsyncClient(headers=headers, timeout=timeout_s, limits=httpx.Limits())
        self._counts = {"prefill_tokens": 0.0, "cached_tokens": 0.0}

    @property
    def vocabulary(self) -> Any:
        return vocabulary_of(self._codec) if self._codec is not None else (type(self).__name__, self.url, self.name)

    async def open(self) -> None:
        """Raises ``ValueError`` when nobody answers in ``OPEN_S``, or another model than the one meant."""
        try:
            listed = (await asyncio.wait_for(self._ask("GET", "/v1/models"), OPEN_S))["data"]
            models = [entry["id"] for entry in listed]
        except TimeoutError:
            raise ValueError(f"{self.url} does not answer within {OPEN_S:g} s") from None
        except (BackendError, KeyError, TypeError, httpx.InvalidURL) as error:
            raise ValueError(f"{self.url} does not answer like an OpenAI-compatible server: {error}") from error
        if self.name and self.name not in models:
            raise ValueError(f"{self.url} does not serve {self.name!r} but {', '.join(models) or 'nothing'}")
        if not self.name and len(models) != 1:
            raise ValueError(f"{self.url} serves {', '.join(models) or 'nothing'}: name the model that is meant")
        self.name = self.name or models[0]

    async def close(self) -> None:
        await self._client.aclose()

    def counters(self) -> dict[str, float]:
        return dict(self._counts)

    async def prompt(self, problem: Mapping[str, Any]) -> list[int]:
        if self._codec is None and "prompt_token_ids" not in problem:
            words = {"messages": problem["messages"]} if "messages" in problem else {"prompt": problem["prompt"]}
            return await self._tokenize(words, True)
        return prompt_ids(problem, self._codec, chat=True)

    async def encode(self, text: str) -> list[int]:
        if self._codec is not None:
            return encode_middle(self._codec, text)
        return await self._tokenize({"prompt": text}, False)

    async def decode(self, ids: Sequence[int]) -> str:
        if self._codec is not None:
            return str(self._codec.decode(ids))
        answer = await self._ask("POST", "/detokenize", {"model": self.name, "tokens": list(ids)})
        try:
            return str(answer["prompt"] if "prompt" in answer else answer["text"])  # vLLM's word, SGLang's word
        except (KeyError, TypeError) as error:
            raise _shape("/detokenize", error) from error

    async def _tokenize(self, words: dict[str, Any], special: bool) -> list[int]:
        body = {"model": self.name, "add_special_tokens": special, **words}
        answer = await self._ask("POST", "/tokenize", body)
        try:
            return list(answer["tokens"])
        except (KeyError, TypeError) as error:
            raise _shape("/tokenize", error) from error

    async def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """The JSON of an answer. Raises :class:`BackendError` when it is refused, or when the retries are used up."""
        for attempt in range(self._retries + 1):
            try:
                answer = await self._client.request(method, self.url + path, json=body)
                if answer.status_code < 500:
                    break
                failure = BackendError(f"http {answer.status_code}", f"{self.url}{path}: {answer.text[:200]}")
            except httpx.TimeoutException as error:
                failure = BackendError("timeout", f"{self.url}{path}: no answer in time ({type(error).__name__})")
            except httpx.TransportError as error:
                failure = BackendError("connection", f"{self.url}{path}: {error or type(error).__name__}")
            if attempt == self._retries:
                raise failure
            await asyncio.sleep(self._backoff_s * 2**attempt)
        if answer.status_code >= 400:
            raise BackendError("refused", f"{self.url}{path}: HTTP {answer.status_code} {answer.text[:200]}")
        try:
            return answer.json()
        except ValueError as error:
            raise BackendError("empty", f"{self.url}{path}: the answer is not JSON") from error

    def _count(self, prompt: int, cached: int) -> None:
        self._counts["prefill_tokens"] += prompt - cached
        self._counts["cached_tokens"] += cached


def _body(ask: Ask) -> dict[str, Any]:
    own = {"max_tokens": ask.max_tokens, "temperature": ask.temperature, "top_p": ask.top_p}
    return own | {"seed": (ask.seed + ask.ban_end) % 2**31}


def _shape(what: str, error: Exception) -> BackendError:
    return BackendError("empty", f"{what} without the promised fields ({type(error).__name__}: {error})")


class VLLMServer(Server):
    """vLLM: token ids in and out (``return_token_ids``, vLLM 0.10.2 or newer), ``prompt_logprobs`` to score.

    A request with ``prompt_logprobs`` does not use vLLM's prefix cache: scoring costs the whole prefix every time.
    ``prompt_logprobs_start`` is our own server's word (vLLM ignores it): there the prefix comes from the cache.
    """

    async def extend(self, ids: Sequence[int], ask: Ask) -> Turn:
        body = _body(ask) | {"prompt": list(ids), "return_token_ids": True, "min_tokens": int(ask.ban_end)}
        body |= {"logprobs": ask.tops} if ask.tops is not None else {}
        choice = await self._complete(body)
        try:
            written, finish = list(choice["token_ids"]), choice["finish_reason"]
        except (KeyError, TypeError) as error:
            raise _shape("a completion", error) from error
        return _completed(choice, written, finish, ask.tops)

    async def score(self, ids: Sequence[int], start: int) -> list[float]:
        body = _body(Ask(1)) | {"prompt": list(ids), "prompt_logprobs": 0, "prompt_logprobs_start": start}
        choice = await self._complete(body)
        try:
            entries = choice["prompt_logprobs"]
            if len(entries) != len(ids):
                raise BackendError("empty", f"{len(entries)} prompt_logprobs for a prompt of {len(ids)} tokens")
            pairs = zip(ids[start:], entries[start:], strict=True)
            return [float(entry[str(token)]["logprob"]) for token, entry in pairs]
        except (KeyError, TypeError) as error:
            raise _shape("prompt_logprobs", error) from error

    async def _complete(self, body: dict[str, Any]) -> Any:
        answer = await self._ask("POST", "/v1/completions", {"model": self.name, **body})
        try:
            usage = answer.get("usage") or {}
            cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
            self._count(usage.get("prompt_tokens", 0), cached)
            return answer["choices"][0]
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise _shape("a completion", error) from error


def _completed(choice: Mapping[str, Any], ids: list[int], finish: str, tops: int | None) -> Turn:
    """A turn of a ``/v1/completions`` choice. vLLM counts the end token among its ids; the text does not hold it."""
    table = choice.get("logprobs") or {}
    logprobs = table.get("token_logprobs") or []
    if finish == "stop" and ids:
        ids, logprobs = ids[:-1], logprobs[: len(ids) - 1]
    turn = Turn(ids, len(ids), "stop" if finish == "stop" else "length")
    if tops is not None:
        if len(logprobs) != len(ids):
            raise BackendError("empty", f"{len(logprobs)} log-probabilities for {len(ids)} tokens")
        _measure(turn, logprobs, [list(each.values()) for each in table.get("top_logprobs") or []][: len(ids)])
        turn.first_tops = dict((table.get("top_logprobs") or [{}])[0])
    return turn


def _measure(turn: Turn, logprobs: Sequence[float], tops: Sequence[Sequence[float]]) -> None:
    turn.logprob = float(sum(logprobs))
    turn.entropy = sum(map(entropy_of, tops)) / len(tops) if tops and len(tops[0]) > 1 else None


class SGLangServer(Server):
    """SGLang's ``/generate``: token ids in and out; scoring starts at the last token before the turn, and reuses the
    prefix cache for all that is before."""

    async def extend(self, ids: Sequence[int], ask: Ask) -> Turn:
        params = {"max_new_tokens": ask.max_tokens, "temperature": ask.temperature, "top_p": ask.top_p}
        params |= {"sampling_seed": ask.seed % 2**31, "min_new_tokens": int(ask.ban_end)}
        body: dict[str, Any] = {"input_ids": list(ids), "sampling_params": params}
        if ask.tops is not None:
            body |= {"return_logprob": True, "top_logprobs_num": ask.tops, "return_text_in_logprobs": True}
        answer = await self._generate(body)
        try:
            written, finish = list(answer["output_ids"]), answer["meta_info"]["finish_reason"]
            if finish["type"] == "stop" and written[-1:] == [finish.get("matched")]:
                written.pop()
            turn = Turn(written, len(written), "stop" if finish["type"] == "stop" else "length")
            if ask.tops is not None:
                own = answer["meta_info"]["output_token_logprobs"][: len(written)]
                _check_ids([token for _, token, *_ in own], written)
                likeliest = (answer["meta_info"].get("output_top_logprobs") or [])[: len(written)]
                _measure(turn, [value for value, *_ in own], [[value for value, *_ in each] for each in likeliest])
                turn.first_tops = {text: value for value, _, text in likeliest[0]} if likeliest else {}
            return turn
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise _shape("/generate", error) from error

    async def score(self, ids: Sequence[int], start: int) -> list[float]:
        params = {"max_new_tokens": 0, "temperature": 0.0}
        answer = await self._generate(
            {"input_ids": list(ids), "sampling_params": params, "return_logprob": True, "logprob_start_len": start - 1}
        )
        try:
            rows = answer["meta_info"]["input_token_logprobs"][1:]  # the first is the last token before the turn
            _check_ids([token for _, token, *_ in rows], ids[start:])
            return [float(value) for value, *_ in rows]
        except (KeyError, TypeError, ValueError) as error:
            raise _shape("input_token_logprobs", error) from error

    async def _generate(self, body: dict[str, Any]) -> Any:
        answer = await self._ask("POST", "/generate", body)
        meta = answer.get("meta_info") or {} if isinstance(answer, dict) else {}
        self._count(meta.get("prompt_tokens", 0), meta.get("cached_tokens", 0))
        return answer


def _check_ids(given: Sequence[int], wanted: Sequence[int]) -> None:
    if list(given) != list(wanted):
        raise BackendError("empty", f"log-probabilities of {len(given)} other tokens than the {len(wanted)} asked for")


class OpenAIServer(Server):
    """Any server with ``/v1/completions``. It knows text only, so its ids *are* text: the bytes of UTF-8.

    Scoring needs ``echo`` with ``logprobs``, which many servers refuse; :meth:`open` finds out (``can_score``).
    A token that begins before the turn and ends in it belongs to the turn.
    """

    vocabulary = "utf-8"  # type: ignore[assignment]

    async def open(self) -> None:
        await super().open()
        try:
            self.can_score = len(await self.score(list(b"One two three"), 3)) > 0
        except BackendError:
            self.can_score = False

    async def prompt(self, problem: Mapping[str, Any]) -> list[int]:
        if "prompt" not in problem:
            raise ValueError("an OpenAI-compatible server takes problems with a prompt in text")
        return list(problem["prompt"].encode())

    async def encode(self, text: str) -> list[int]:
        return list(text.encode())

    async def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode("utf-8", "replace")

    async def extend(self, ids: Sequence[int], ask: Ask) -> Turn:
        body = _body(ask) | {"prompt": await self.decode(ids)}
        body |= {"logprobs": min(5, max(1, ask.tops))} if ask.tops is not None else {}
        answer = await self._ask("POST", "/v1/completions", {"model": self.name, **body})
        try:
            choice = answer["choices"][0]
            text = str(choice["text"]).rstrip("\ufffd")  # half a character at the cut: the next turn writes it again
            table = choice.get("logprobs") or {}
            logprobs = [x for x in table.get("token_logprobs") or [] if x is not None]
            tokens = int((answer.get("usage") or {}).get("completion_tokens", len(logprobs) or len(text.split())))
            finish = "stop" if choice["finish_reason"] == "stop" else "length"
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise _shape("a completion", error) from error
        turn = Turn(list(text.encode()), tokens if text else 0, finish)
        if ask.tops is not None and text:
            if not logprobs:
                raise BackendError("empty", f"{self.url} gives no log-probabilities")
            turn.tokens = len(logprobs)
            _measure(turn, logprobs, [list(each.values()) for each in table.get("top_logprobs") or [] if each])
            turn.first_tops = dict((table.get("top_logprobs") or [{}])[0] or {})
        return turn

    async def score(self, ids: Sequence[int], start: int) -> list[float]:
        before, text = await self.decode(ids[:start]), await self.decode(ids)
        body = _body(Ask(1)) | {"prompt": text, "echo": True, "logprobs": 1}
        answer = await self._ask("POST", "/v1/completions", {"model": self.name, **body})
        try:
            table = answer["choices"][0]["logprobs"]
            offsets, values = table["text_offset"], table["token_logprobs"]
            ends = [*offsets[1:], len(text) + 1]
            rows = zip(offsets, ends, values, strict=True)
            found = [v for begin, end, v in rows if end > len(before) and begin < len(text)]
            if not found or any(v is None for v in found):
                raise BackendError("empty", f"{self.url} gives no log-probabilities of a prompt")
            return [float(v) for v in found]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise _shape("an echo", error) from error
