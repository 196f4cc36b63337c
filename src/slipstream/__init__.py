"""Slipstream: decode long chains of thought fast, without losing answers."""

from slipstream.attention.dense import Full
from slipstream.llm import LLM, TextChunk
from slipstream.types import (
    Completion,
    CompletionOutput,
    Generator,
    Logprob,
    RequestMetrics,
    RequestOutput,
    SamplingParams,
)

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "Completion",
    "CompletionOutput",
    "Full",
    "Generator",
    "Logprob",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "TextChunk",
]
