"""The composition root: options to model, pool, backend and engine. Knows every room, contains no algorithm.

``Options`` is the one list of what can be set: ``LLM(...)`` takes these as keyword arguments, the command line
derives its flags from them, and every misspelled name is answered with the nearest valid one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from slipstream.asyncspade import placement
from slipstream.asyncspade.backend import AsyncSpadeBackend
from slipstream.asyncspade.config import AsyncSpade
from slipstream.asyncspade.foresight import ForesightBackend
from slipstream.asyncspade.mlp import QueryMLP
from slipstream.asyncspade.predictor import Predictor
from slipstream.asyncspade.two_devices import TwoDeviceBackend
from slipstream.asynctls.assembly import assemble, check_offload
from slipstream.asynctls.config import AsyncTLS, plan_offload
from slipstream.asynctls.offload import HostPool, Stage
from slipstream.attention import crossover
from slipstream.attention.backend import AttentionBackend
from slipstream.attention.calibration import Calibration, ModelIdentity, find_calibration
from slipstream.attention.dense import DenseBackend, Full
from slipstream.attention.expanded import ExpandedPrompts
from slipstream.attention.flashinfer import FlashInferBackend, flashinfer_supports
from slipstream.attention.flashinfer_latent import FlashInferLatentBackend, flashinfer_supports_latent
from slipstream.attention.sparse import SparseBackend
from slipstream.attention.tova import TovaBackend
from slipstream.engine.engine import Engine, EngineConfig
from slipstream.engine.runner import Runner
from slipstream.kvcache.index import KeyIndex
from slipstream.kvcache.plan import MemoryPlan, activation_bytes, device_bytes, parse_bytes, plan_memory
from slipstream.kvcache.pool import KVPool
from slipstream.models.checkpoint import locate
from slipstream.models.decoder import CausalLM
from slipstream.models.parallel import Ranks
from slipstream.models.weights import check_split, load_model
from slipstream.scale.lead import Lead
from slipstream.selection.double_sparsity import DoubleSparsity
from slipstream.selection.oracle import Oracle
from slipstream.selection.quest import Quest
from slipstream.selection.selector import Budgeted
from slipstream.selection.tova import Tova
from slipstream.selection.two_level import TwoLevel
from slipstream.selection.window import Window
from slipstream.split import start_ranks
from slipstream.text import Codec
from slipstream.types import ModelSpec, nearest, options, reject_unknown

ASSETS = Path(__file__).parent / "assets"
DEFAULT_MODEL = "slipstream-target"
Attention = Full | Budgeted | Tova
ATTENTION: dict[str, type[Attention]] = {
    "full": Full,
    "window": Window,
    "oracle": Oracle,
    "quest": Quest,
    "double_sparsity": DoubleSparsity,
    "tova": Tova,
    "two_level": TwoLevel,
    "asyncspade": AsyncSpade,
    "asynctls": AsyncTLS,
}
DENSE_KERNELS = ("auto", "flashinfer", "triton", "reference")


def _option(default: Any, text: str, flag: str | None = None) -> Any:
    return field(default=default, metadata={"help": text, "flags": [] if flag is None else [flag]})


@options
@dataclass(frozen=True)
class Options:
    """Everything that can be set when a model is loaded."""

    attention: str | dict[str, Any] | Attention = _option(
        "full",
        "'full', 'window', 'oracle', 'quest', 'double_sparsity', 'tova', 'two_level', 'asyncspade' or 'asynctls'; in "
        "Python also a dict with 'method' and options, or a config such as TwoLevel(budget=512)",
    )
    device: str | None = _option(None, "'cuda', 'cuda:1', 'cpu'; default: a GPU where there is one")
    dtype: str = _option("auto", "'auto' (the config's on a GPU, float32 on CPU), 'float32', 'bfloat16'")
    max_model_len: int | None = _option(None, "longest request in tokens; default: the model's")
    kv_memory: int | str | None = _option(None, "memory for keys and values, bytes or '16GiB'; default: what is free")
    load_format: str = _option("auto", "'auto' reads safetensors; 'dummy' makes random weights of the config")
    seed: int = _option(0, "seed of dummy weights and of requests that bring none")
    page_size: int = _option(64, "tokens in one KV page")
    max_num_seqs: int = _option(64, "most chains decoded together")
    max_batch_tokens: int = _option(2048, "most tokens in one step; longer prompts are prefilled in chunks")
    prefix_cache: bool = _option(True, "reuse the KV of prompts that begin alike")
    overlap: bool | None = _option(None, "launch a step before the tokens of the last are read; default: on a GPU")
    cuda_graphs: bool = _option(True, "capture decode steps as CUDA graphs")
    kernels: str = _option("auto", "dense attention by 'flashinfer' (where installed), 'triton', or 'reference' (CPU)")
    tensor_parallel_size: int = _option(
        1, "GPUs that share the model, each with its heads (on a CPU: processes)", "--tensor-parallel"
    )
    step_timeout: float = _option(300.0, "seconds after which a step of several GPUs counts as failed")

    def __post_init__(self) -> None:
        for name in ("max_model_len", "page_size", "max_num_seqs", "max_batch_tokens", "tensor_parallel_size"):
            value = getattr(self, name)
            if value is None and name == "max_model_len":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if self.kernels not in DENSE_KERNELS:
            raise ValueError(f"kernels {self.kernels!r} is unknown; {nearest(str(self.kernels), DENSE_KERNELS)}")
        if self.kv_memory is not None:
            parse_bytes(self.kv_memory)
        if not self.step_timeout > 0:
            raise ValueError(f"step_timeout must be a positive number of seconds, got {self.step_timeout!r}")


@dataclass
class Parts:
    """What :func:`build` made."""

    model: CausalLM
    spec: ModelSpec
    memory: MemoryPlan
    pool: KVPool
    backend: AttentionBackend
    engine: Engine
    codec: Codec | None
    name: str
    identity: ModelIdentity
    ranks: Ranks


def embedded_models() -> dict[str, Path]:
    """The models that ship with the package, by name."""
    return {path.parent.name: path.parent for path in sorted(ASSETS.glob("*/config.json"))}


def find_model(model: Any) -> Any:
    """An embedded model's name to its directory; anything else (path, hub id, config) as it is."""
    if isinstance(model, str):
        embedded = embedded_models()
        if model in embedded:
            return embedded[model]
        if "/" not in model and not Path(model).exists():
            raise ValueError(
                f"no embedded model and no directory {model!r}; {nearest(model, embedded)} "
                "(a hub id looks like 'Qwen/Qwen3-8B')"
            )
    return model


def parse_attention(attention: Any) -> Attention:
    """A method's name, a dict ``{"method": name, **options}``, or a config object, to a config object.

    ``ValueError`` for a method or a value that cannot be, ``TypeError`` for an option that the method does not have.
    """
    if isinstance(attention, Attention):
        return attention
    if isinstance(attention, str):
        attention = {"method": attention}
    if not isinstance(attention, Mapping) or not isinstance(attention.get("method"), str):
        raise ValueError(f"attention must be a name, a dict with 'method', or a config object, got {attention!r}")
    method = attention["method"]
    if method not in ATTENTION:
        raise ValueError(f"attention method {method!r} is unknown; {nearest(method, ATTENTION)}")
    given = {name: value for name, value in attention.items() if name != "method"}
    config = ATTENTION[method]
    names = [option.name for option in fields(config)]
    if given and not names:
        raise TypeError(f"attention method {method!r} has no option {next(iter(given))!r}: it has none")
    reject_unknown(f"attention method {method!r}", given, names)
    return config(**given)


def method_of(config: Attention) -> str:
    """The name of a config's method."""
    return next(name for name, kind in ATTENTION.items() if kind is type(config))


def choose_device(device: str | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device {device!r} is unknown; use 'cpu', 'cuda' or 'cuda:N'") from error
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"device {device!r} is not supported; use 'cpu', 'cuda' or 'cuda:N'")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {device!r} is not there: torch sees {torch.cuda.device_count()} GPUs")
    return chosen


def check_kernels(kernels: str, device: torch.device) -> None:
    """``ValueError`` for kernels that are not for this kind of device."""
    if device.type == "cpu" and kernels in ("flashinfer", "triton"):
        raise ValueError(f"kernels={kernels!r} needs an NVIDIA GPU; this engine runs on {device}")
    if device.type != "cpu" and kernels == "reference":
        raise ValueError("kernels='reference' looks at the host inside a step and is for device='cpu' only")


def dense_backend(kernels: str, pool: Any, spec: ModelSpec, device: torch.device) -> AttentionBackend:
    """FlashInfer where installed and fit for the shape, else our kernels."""
    if device.type == "cpu":
        return DenseBackend(pool, spec)
    kind = FlashInferBackend if spec.value_dim is None else FlashInferLatentBackend
    supports = flashinfer_supports if spec.value_dim is None else flashinfer_supports_latent
    reason = supports(spec) if find_spec("flashinfer") is not None else "FlashInfer is not installed"
    if kernels == "flashinfer" and reason:
        raise ValueError(f"kernels='flashinfer' cannot be used: {reason}")
    if kernels == "triton" or reason:
        return DenseBackend(pool, spec)
    return kind(pool, spec)


def make_backend(
    config: Attention,
    dense: AttentionBackend,
    pool: KVPool,
    spec: ModelSpec,
    num_seats: int,
    calibration: Calibration,
    identity: ModelIdentity,
    network: CausalLM,
    ranks: Ranks,
    stage: Stage | None = None,
) -> AttentionBackend:
    """The method of ``config``, over ``dense`` where it is dense. A calibration without tokens is made on the way.

    network: whose RoPE table, and whose projections, predictions are made with. stage: where prompts are attended, if
    KV is on the host.
    """
    if isinstance(config, Tova):
        return TovaBackend(pool, spec, dense, config, num_seats, ranks.sum if spec.own_heads is None else None)
    if isinstance(config, Full):
        return dense
    parts, index, online = config.index, None, None
    if parts is not None:
        known = calibration.num_tokens > 0 and parts.num_channels > 0
        index = KeyIndex(pool, parts, calibration.channels(parts.num_channels) if known else None)
        online = calibration if parts.num_channels and not known else None
    at = crossover.gate(pool.device, spec, method_of(config), config.budget, config.min_context)
    if isinstance(config, AsyncSpade) and config.cache_rank is not None:
        return placement.reach_rank(config, pool, spec, dense, at, num_seats, calibration, network.cos_sin)
    if isinstance(config, AsyncSpade) and config.cache_device is not None:
        choose_device(config.cache_device)
        return TwoDeviceBackend(pool, spec, config, dense, at, num_seats, network.cos_sin, calibration)
    if isinstance(config, AsyncSpade) and config.predictor == "residual":
        return ForesightBackend(pool, spec, index, config, dense, at, network.foresight(), online)
    if isinstance(config, AsyncSpade):
        path, mlp = config.predictor_file, None
        if path is not None:
            mlp = QueryMLP.load(path, identity, config.rotate, pool.device)
            if spec.own_heads is None:
                mlp = mlp.part(ranks.share(spec.num_heads * ranks.count))
        predictor = Predictor(config, spec, num_seats, network.cos_sin, pool.device, mlp)
        return AsyncSpadeBackend(pool, spec, index, config, dense, at, num_seats, predictor, online)
    if isinstance(config, AsyncTLS):
        guess, queries = None, AsyncSpade(predictor=config.predictor, window=config.window)
        if config.candidates == "predicted":
            guess = Predictor(queries, spec, num_seats, network.cos_sin, pool.device)
        return assemble(config, pool, spec, index, dense, at, num_seats, stage=stage, online=online, predictor=guess)
    selector = config.selector(pool, spec, index)
    return SparseBackend(pool, spec, index, selector, dense, at, config.dense_layers, config.unread, online)


def waits_for_a_process(config: Attention) -> bool:
    """Whether steps must stay eager: a captured one cannot wait for another process."""
    return isinstance(config, AsyncSpade) and config.cache_rank is not None


def extra_bytes(config: Attention, spec: ModelSpec, num_seats: int) -> tuple[int, int]:
    """What a method keeps beside K and V: bytes for each token of the pool, and bytes whatever its size.

    Raises ``ValueError`` for a method that does not fit the model.
    """
    if isinstance(config, Tova):
        return 0, TovaBackend.seat_bytes(spec, config.budget, num_seats)
    if isinstance(config, Full):
        return 0, 0
    config.check_model(spec)
    seat = placement.seat_bytes(config, spec) if isinstance(config, AsyncSpade) else config.seat_bytes(spec)
    return (0 if config.index is None else config.index.bytes_per_token(spec)), seat * (num_seats + 1)


def place_on_host(
    config: AsyncTLS, spec: ModelSpec, chosen: Options, device: torch.device, ranks: Ranks
) -> tuple[MemoryPlan, HostPool, Stage, int]:
    """Pages on the host, a stage on the device, and how many chains the device has room for: the same on all ranks."""
    check_offload(config, device, chosen.cuda_graphs)
    asked = config.gpu_kv if config.gpu_kv is not None else chosen.kv_memory
    free = device_bytes(device, activation_bytes(spec, chosen.max_batch_tokens))
    room = free if asked is None else parse_bytes(asked)
    if device.type == "cuda" and room > free:
        raise ValueError(f"gpu_kv = {asked!r}, but {device} has only {max(free, 0):,} bytes for it: lower gpu_kv")
    queries = AsyncSpade(predictor=config.predictor, window=config.window)
    plan = plan_offload(
        config, spec, page_size=chosen.page_size, max_num_seqs=chosen.max_num_seqs, max_model_len=spec.max_position,
        device_bytes=room,
        more_seat_bytes=Predictor.seat_bytes(queries, spec) if config.candidates == "predicted" else 0,
        num_ranks=ranks.count,
    )  # fmt: skip
    num_pages, num_seats = ranks.least(plan.num_pages), ranks.least(plan.num_seats)
    config.check_seats(num_seats)
    memory = MemoryPlan(num_pages, chosen.page_size, plan.host_bytes // plan.num_pages, plan.device_bytes)
    pool = HostPool(spec, num_pages, chosen.page_size, device, config.host_file)
    return memory, pool, Stage(spec, plan.stage_pages, chosen.page_size, num_seats, device), num_seats


def build(model: Any, chosen: Options, ranks: Ranks | None = None) -> Parts:
    """Everything that decoding needs, wired. A mistake raises ``ValueError`` before anything large is allocated.

    ranks: given to a rank that another one started; by default this is rank 0, which starts the others.
    """
    config = parse_attention(chosen.attention)
    device = choose_device(chosen.device)
    check_kernels(chosen.kernels, device)
    if isinstance(config, Budgeted):
        config.check_page_size(chosen.page_size)
    source = find_model(model)
    if ranks is not None or chosen.tensor_parallel_size == 1:
        ranks = ranks or Ranks()
        return _build(model, source, chosen, config, ranks.place(device), ranks)
    check_split(source, chosen.load_format, chosen.tensor_parallel_size)
    given = {option.name: getattr(chosen, option.name) for option in fields(chosen)}
    lead = start_ranks(model, given, method_of(config), config, device)
    try:
        with lead.loading():
            return _build(model, source, chosen, config, lead.place(device), lead)
    except BaseException:
        lead.close()
        raise


def _build(model: Any, source: Any, chosen: Options, config: Attention, device: torch.device, ranks: Ranks) -> Parts:
    if isinstance(source, (str, Path)):
        source = locate(source, with_weights=chosen.load_format == "auto")
    network, spec = load_model(
        source,
        device=device,
        dtype=chosen.dtype,
        load_format=chosen.load_format,
        max_model_len=chosen.max_model_len,
        seed=chosen.seed,
        ranks=ranks,
    )
    if isinstance(config, Budgeted):
        config = config.for_model(spec)
    name = str(model) if isinstance(model, (str, Path)) else spec.architecture
    ranks.least(0)  # all have loaded; from here on they wait for each other for a step's time at most
    splits_kv = spec.value_dim is None  # one latent is for the heads of all ranks
    whole_spec = replace(spec, num_kv_heads=spec.num_kv_heads * (ranks.count if splits_kv else 1))
    identity = ModelIdentity.of(name, whole_spec, network.digest())
    calibration = find_calibration(getattr(config, "calibration", None), source, identity, device)
    if splits_kv:
        calibration = calibration.part(ranks.share(identity.num_kv_heads))
    per_token, fixed = extra_bytes(config, spec, chosen.max_num_seqs)
    codec = Codec.load(source) if isinstance(source, Path) else None
    pool: KVPool
    num_seats, stage = chosen.max_num_seqs, None
    if isinstance(config, AsyncTLS) and config.offload:
        memory, pool, stage, num_seats = place_on_host(config, spec, chosen, device, ranks)
    else:
        memory = plan_memory(
            spec, page_size=chosen.page_size, kv_memory=chosen.kv_memory, device=device,
            reserve_bytes=activation_bytes(spec, chosen.max_batch_tokens), extra_bytes_per_token=per_token,
            fixed_bytes=fixed,
        )  # fmt: skip
        memory = replace(memory, num_pages=ranks.least(memory.num_pages))
        shape = (spec.num_layers, memory.num_pages, spec.num_kv_heads, memory.page_size, spec.head_dim)
        pool = KVPool(*shape, dtype=spec.dtype, device=device, value_dim=spec.value_dim)
    engine_config = EngineConfig(
        max_num_seqs=num_seats,
        max_batch_tokens=chosen.max_batch_tokens,
        overlap=device.type == "cuda" if chosen.overlap is None else chosen.overlap,
        cuda_graphs=chosen.cuda_graphs and not waits_for_a_process(config),
        prefix_cache=chosen.prefix_cache,
        seed=chosen.seed,
    )
    paged: Any = pool if stage is None else stage
    own = replace(spec, num_heads=spec.own_heads[1] - spec.own_heads[0]) if spec.own_heads else spec
    dense = dense_backend(chosen.kernels, paged, own, device)
    if network.config.latent is not None:
        dense = ExpandedPrompts(dense, paged, spec, network.config.latent.nope, network.config.latent.value)
        network.set_prompt_form(dense)
    backend = make_backend(config, dense, pool, spec, num_seats, calibration, identity, network, ranks, stage)
    make_runner = ranks.make_runner if isinstance(ranks, Lead) else Runner
    engine = Engine(network, spec, pool, backend, engine_config, make_runner)
    return Parts(network, spec, memory, pool, backend, engine, codec, name, identity, ranks)
