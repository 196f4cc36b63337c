"""One name for each op: its Triton kernel where tensors are on a GPU, its definition everywhere else."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


@functools.cache
def _module(name: str) -> ModuleType:
    return importlib.import_module(f"slipstream.kernels.{name}")


def op(definition: Callable[P, R], twin: str, by: int = 0) -> Callable[P, R]:
    """``definition``, or the function of that name in ``slipstream.kernels.<twin>`` if argument ``by`` is on CUDA.

    The twin is imported by the first call that needs it: where there is no GPU, Triton need not be installed.
    """

    @functools.wraps(definition)
    def dispatched(*args: P.args, **kwargs: P.kwargs) -> R:
        if args[by].is_cuda:  # type: ignore[attr-defined]
            return getattr(_module(twin), definition.__name__)(*args, **kwargs)
        return definition(*args, **kwargs)

    return dispatched
