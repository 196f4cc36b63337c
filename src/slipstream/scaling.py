"""``scale``: problems through two models. What the names of models mean, and who starts and stops them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from slipstream.atts.backends import Backend, LocalBackend
from slipstream.atts.config import ATTS
from slipstream.atts.events import Event
from slipstream.atts.pipeline.run import Outcome, Run
from slipstream.atts.problems import read_problems
from slipstream.atts.report import Cost
from slipstream.llm import LLM

DRAFT, TARGET = "slipstream-draft", "slipstream-target"


def open_model(model: Any, tokenizer: str | None = None, **options: Any) -> Backend:
    """A backend from what a user calls a model.

    An ``LLM``, an embedded model's name or a directory runs in this process (``options`` are the ``LLM``'s);
    ``http://...`` is an OpenAI-compatible server, ``vllm+http://...`` and ``sglang+http://...`` are served by their own
    protocols; ``#name`` behind an address names the model there. tokenizer: directory of a tokenizer for a server.
    """
    if isinstance(model, LLM):
        return local(model)
    if not isinstance(model, str) or "://" not in model:
        return local(LLM(model, **options), owned=True) if isinstance(model, (str, Path)) else model
    from slipstream.atts.servers import OpenAIServer, SGLangServer, VLLMServer
    from slipstream.text import Codec

    address, _, name = model.partition("#")
    kind, plus, rest = address.partition("+")
    if plus and kind not in ("vllm", "sglang"):
        raise ValueError(f"{model}: an address begins with http://, vllm+http:// or sglang+http://")
    codec = Codec.load(tokenizer) if tokenizer else None
    if not plus:
        return OpenAIServer(address, name or None)
    return (VLLMServer if kind == "vllm" else SGLangServer)(rest, name or None, codec=codec)


def local(llm: LLM, owned: bool = False) -> LocalBackend:
    """An ``LLM`` as a backend. owned: its engine's thread is stopped when the run is over."""
    return LocalBackend(
        llm.asynchronous(), llm.codec, name=llm.name, max_length=llm.engine.limits.max_model_len,
        close=llm.close if owned else None,
    )  # fmt: skip


def cost_of(llm: LLM) -> Cost:
    """What :func:`slipstream.atts.report.intensity` has to know of a model."""
    spec = llm.spec
    attention = 2 * spec.hidden_size * spec.head_dim * (spec.num_heads + spec.num_kv_heads)
    layer = llm.model.layers[0]
    mlp = 3 * spec.hidden_size * layer.down.dense_weight().shape[-1]
    parameters = spec.num_layers * (attention + mlp) + spec.vocab_size * spec.hidden_size
    return Cost(parameters, parameters * spec.dtype.itemsize, spec.kv_bytes_per_token())


async def scale(
    problems: str | Path | Sequence[Mapping[str, Any]],
    *,
    draft: Any = DRAFT,
    target: Any = TARGET,
    config: ATTS | None = None,
    log: str | Path | None = None,
    resume: bool = False,
    on_event: Callable[[Event], None] | None = None,
    tokenizer: str | None = None,
    **options: Any,
) -> Outcome:
    """Scale problems at test time: the draft thinks, the target verifies (A1 / ATTS, arXiv 2509.15148).

    problems: a file (:func:`slipstream.atts.problems.read_problems`) or a list of dicts. draft, target: see
    :func:`open_model`; backends of your own are taken as they are. on_event: called with every event.
    Raises ``ValueError``, before any work, for what cannot be done.
    """
    config = config or ATTS()
    if isinstance(problems, (str, Path)):
        problems = read_problems(problems, config.seed)
    if options.get("kv_memory") is None and torch.cuda.is_available() and options.get("device") != "cpu":
        options["kv_memory"] = int(0.35 * torch.cuda.mem_get_info()[0])  # two models share the device
    first, second = open_model(draft, tokenizer, **options), open_model(target, tokenizer, **options)
    lengths = [length for side in (first, second) if (length := getattr(side, "max_length", None)) is not None]
    if config.chain_tokens is None and lengths:
        config = replace(config, chain_tokens=min(lengths))
    return await Run(problems, first, second, config, log=log, resume=resume, on_event=on_event).run()


def scale_sync(*args: Any, **kwargs: Any) -> Outcome:
    """:func:`scale` for code that is not asynchronous."""
    return asyncio.run(scale(*args, **kwargs))
