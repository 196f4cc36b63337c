"""Slipstream: decode long chains of thought fast, without losing answers."""

from slipstream.asyncspade.config import AsyncSpade
from slipstream.asynctls.config import AsyncTLS
from slipstream.attention.calibration import Calibration, calibrate
from slipstream.attention.dense import Full
from slipstream.atts.config import ATTS
from slipstream.llm import LLM, TextChunk
from slipstream.scaling import scale, scale_sync
from slipstream.selection.double_sparsity import DoubleSparsity
from slipstream.selection.oracle import Oracle
from slipstream.selection.quest import Quest
from slipstream.selection.tova import Tova
from slipstream.selection.two_level import TwoLevel
from slipstream.selection.window import Window
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
    "ATTS",
    "AsyncSpade",
    "AsyncTLS",
    "LLM",
    "Calibration",
    "Completion",
    "CompletionOutput",
    "DoubleSparsity",
    "Full",
    "Generator",
    "Logprob",
    "Oracle",
    "Quest",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "TextChunk",
    "Tova",
    "TwoLevel",
    "Window",
    "calibrate",
    "scale",
    "scale_sync",
]
