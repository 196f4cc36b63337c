"""What clients may ask, field by field. Wrong types, unknown fields and fields that we cannot honour are refused.

Three kinds of fields: served ones (declared below); ``NEUTRAL`` ones, which OpenAI or vLLM know and we do not, taken
only at the value that changes nothing; ``WITHOUT_EFFECT`` ones, which never change an answer and are taken as they are.
Everything else is refused by name, as OpenAI does. ``null`` means the default.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler, WithJsonSchema, model_validator
from pydantic_core import CoreSchema

from slipstream.server.config import ServerConfig
from slipstream.server.errors import ApiError, refusing
from slipstream.types import SamplingParams, nearest

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,), "presence_penalty": (0,), "repetition_penalty": (1,), "length_penalty": (1,),
    "logit_bias": ({},), "suffix": ("",), "use_beam_search": (False,), "priority": (0,),
    "skip_special_tokens": (True,), "spaces_between_special_tokens": (True,), "include_stop_str_in_output": (False,),
    "add_special_tokens": (True,), "return_tokens_as_token_ids": (False,), "bad_words": ([],), "tools": ([],),
    "functions": ([],), "tool_choice": ("none", "auto"), "function_call": ("none", "auto"), "documents": ([],),
    "response_format": ({"type": "text"},), "modalities": (["text"],), "include_reasoning": (True,),
    "continue_final_message": (False,), "echo": (False,), "chat_template": (), "reasoning_effort": (),
    "logits_processors": ([],), "truncate_prompt_tokens": (-1,), "allowed_token_ids": (), "guided_json": (),
    "structured_outputs": (), "audio": (), "web_search_options": (),
}  # fmt: skip
WITHOUT_EFFECT = {
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "parallel_tool_calls", "request_id",
}  # fmt: skip

# What the sampling parameters allow, for the document.
_BOUNDS: dict[str, dict[str, float]] = {
    "n": {"minimum": 1}, "temperature": {"minimum": 0}, "top_p": {"exclusiveMinimum": 0, "maximum": 1},
    "top_k": {"minimum": -1}, "min_p": {"minimum": 0, "maximum": 1}, "min_tokens": {"minimum": 0},
    "max_tokens": {"minimum": 0}, "max_completion_tokens": {"minimum": 1}, "seed": {"minimum": 0, "maximum": 2**63 - 1},
    "prompt_logprobs": {"minimum": 0, "maximum": 20}, "prompt_logprobs_start": {"minimum": 0},
    "top_logprobs": {"minimum": 0, "maximum": 20},
}  # fmt: skip
_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}}
_TEXT = {"type": "string", "minLength": 1}
_LISTS = [{"type": "array", "items": item, "minItems": 1} for item in (_TEXT, _IDS["items"], _IDS | {"minItems": 1})]
Prompts = Annotated[Any, WithJsonSchema({"anyOf": [_TEXT, *_LISTS]})]
Ids = Annotated[list[int], WithJsonSchema(_IDS)]
_PART_FIELDS = {"type": {"const": "text"}, "text": {"type": "string"}}
_PART = {"type": "object", "properties": _PART_FIELDS, "required": ["type", "text"]}
_CONTENT = {"anyOf": [{"type": "string"}, {"type": "array", "items": _PART}]}
_MESSAGE = {
    "type": "object",
    "properties": {"role": {"enum": ["system", "developer", "user", "assistant"]}, "content": _CONTENT},
    "anyOf": [
        {"required": ["role", "content"]},
        {"required": ["role"], "properties": {"role": {"const": "assistant"}}},
    ],
}
Messages = Annotated[Any, WithJsonSchema({"type": "array", "items": _MESSAGE, "minItems": 1})]


class Body(BaseModel):
    """Any request body."""

    model_config = ConfigDict(strict=True, extra="ignore")
    model: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _known(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        given = {name: value for name, value in given.items() if value is not None}
        for name in given.keys() - cls.model_fields.keys() - WITHOUT_EFFECT:
            if name not in NEUTRAL:
                hint = nearest(name, cls.model_fields)
                raise ApiError(
                    400, f"Unrecognized request argument supplied: {name}; {hint}", code="unknown_parameter", param=name
                )
            if (given[name], type(given[name]) is bool) not in [
                (value, type(value) is bool) for value in NEUTRAL[name]
            ]:
                raise ApiError(
                    400, f"{name} is not supported here: leave it out", code="unsupported_parameter", param=name
                )
        return given

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """The document has ``null`` where :meth:`_known` takes it, and the served fields only."""
        schema = handler.resolve_ref_schema(handler(core))
        own = {name: field | _BOUNDS.get(name, {}) for name, field in schema["properties"].items()}
        for name in own.keys() - set(schema.get("required", ())):
            own[name] = {"anyOf": [own[name], {"type": "null"}]}
        return schema | {"properties": own, "additionalProperties": False}


class StreamOptions(BaseModel):
    """continuous_usage_stats: vLLM's, ``usage`` in every chunk. include_obfuscation: OpenAI's, without effect."""

    model_config = ConfigDict(strict=True, extra="forbid")
    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False


class Asked(Body):
    """What completions and chats have in common; words and defaults are OpenAI's, then vLLM's.

    prompt_logprobs: alternatives for each prompt token. prompt_logprobs_start: first prompt index that they are wanted
    for; what lies before it comes from the prefix cache where it is there. cache_salt: only requests of equal salt
    share cached keys and values. return_token_ids: token ids beside the text.
    """

    n: int = 1
    best_of: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: str | list[str] = []
    stop_token_ids: Ids = []
    seed: int | None = None
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    prompt_logprobs: int | None = None
    prompt_logprobs_start: int = 0
    cache_salt: str | None = None
    return_token_ids: bool = False

    @property
    def top_logprobs_wanted(self) -> int | None:
        """Alternatives for each generated token; None: no log-probabilities."""
        raise NotImplementedError

    @property
    def prompt_field(self) -> str:
        return "messages" if isinstance(self, ChatRequest) else "prompt"

    @property
    def streaming(self) -> StreamOptions:
        return self.stream_options or StreamOptions()

    def params(self, limits: ServerConfig) -> SamplingParams:
        """The engine's words for it. Raises :class:`ApiError` for what exceeds a limit or makes no sense."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        self._at_most("n", self.n, limits.max_n)
        self._at_most("stop", len(stop), limits.max_stop)
        self._at_most("stop", max(map(len, stop), default=0), limits.max_stop_chars)
        for name, value in (("logprobs", self.top_logprobs_wanted), ("prompt_logprobs", self.prompt_logprobs)):
            self._at_most(name, value or 0, limits.max_logprobs)
        if self.best_of not in (None, self.n):
            raise ApiError(400, "best_of must equal n: all chains are returned", param="best_of")
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options is only allowed when stream is true", param="stream_options")
        with refusing():
            return SamplingParams(
                n=self.n, temperature=self.temperature, top_p=self.top_p, top_k=self.top_k, min_p=self.min_p,
                max_tokens=self.max_tokens or None, stop=tuple(stop), stop_token_ids=tuple(self.stop_token_ids),
                seed=self.seed, logprobs=self.top_logprobs_wanted, prompt_logprobs=self.prompt_logprobs,
                ignore_eos=self.ignore_eos, min_tokens=self.min_tokens,
            )  # fmt: skip

    @staticmethod
    def _at_most(name: str, value: int, limit: int) -> None:
        if value > limit:
            raise ApiError(400, f"{name} = {value} exceeds this server's limit of {limit}", param=name)


class CompletionRequest(Asked):
    """``POST /v1/completions``. ``max_tokens`` 0 (with echo or prompt_logprobs) only scores the prompt."""

    prompt: Prompts
    max_tokens: int | None = 16
    echo: bool = False
    logprobs: int | None = None
    add_special_tokens: bool = True

    @property
    def top_logprobs_wanted(self) -> int | None:
        return self.logprobs


class ChatRequest(Asked):
    """``POST /v1/chat/completions``. ``scaling``: options of test-time scaling, where a draft is configured."""

    messages: Messages
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int = 0
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, str | int | float | bool] = {}
    scaling: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _newer_name(self) -> ChatRequest:
        self.max_tokens = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        if self.max_tokens == 0:
            raise ApiError(400, "max_tokens must be at least 1", param="max_tokens")
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs is only allowed when logprobs is true", param="top_logprobs")
        return self

    @property
    def top_logprobs_wanted(self) -> int | None:
        return self.top_logprobs if self.logprobs else None


class TokenizeRequest(Body):
    """``POST /tokenize``: of a prompt, or of messages through the chat template."""

    prompt: str | None = None
    messages: Messages = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, str | int | float | bool] = {}
    return_token_strs: bool = False


class DetokenizeRequest(Body):
    """``POST /detokenize``."""

    tokens: Ids


def parse_prompts(value: Any, most: int) -> list[str | list[int]]:
    """Text, token ids, or a list of either, to a list of prompts."""
    listed = value if isinstance(value, list) and value and isinstance(value[0], (str, list)) else [value]
    if len(listed) > most:
        raise ApiError(400, f"{len(listed)} prompts exceed this server's limit of {most}", param="prompt")
    for prompt in listed:
        if isinstance(prompt, str):
            check_text(prompt, "prompt")
        elif not isinstance(prompt, list) or not all(type(token) is int for token in prompt):
            raise ApiError(400, "prompt must be text, a list of token ids, or a list of either", param="prompt")
    return listed


def parse_messages(value: Any) -> list[dict[str, str]]:
    """Messages with plain text as content: parts of type text are joined, anything else is refused."""
    if not isinstance(value, list) or not value:
        raise ApiError(400, "messages must be a list of {'role': ..., 'content': ...}, not empty", param="messages")
    return [_parse_message(message, f"messages.{place}") for place, message in enumerate(value)]


def _parse_message(message: Any, where: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise ApiError(400, "a message must be an object with role and content", param=where)
    role, content = message.get("role"), message.get("content")
    if role not in ("system", "developer", "user", "assistant"):
        raise ApiError(400, f"role {role!r} is not one of system, developer, user, assistant", param=f"{where}.role")
    if message.get("tool_calls") or message.get("function_call"):
        raise ApiError(400, "tools are not supported", param=where)
    if content is None and role == "assistant":
        content = ""
    if isinstance(content, list):
        texts = [part["text"] for part in content if isinstance(part, dict) and _is_text(part)]
        content = "\n".join(texts) if len(texts) == len(content) else None
    if not isinstance(content, str):
        raise ApiError(400, "content must be text, or parts of type text", param=f"{where}.content")
    parsed = {"role": "system" if role == "developer" else role, "content": content}
    parsed |= {key: message[key] for key in ("name", "reasoning_content") if isinstance(message.get(key), str)}
    for text in parsed.values():
        check_text(text, where)
    return parsed


def _is_text(part: dict[str, Any]) -> bool:
    return part.get("type") == "text" and isinstance(part.get("text"), str)


def check_text(text: str, param: str) -> None:
    """Half a surrogate pair is legal in JSON, and no text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ApiError(400, f"not text: {error.reason} at character {error.start}", param=param) from None
