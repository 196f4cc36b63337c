"""What AsyncTLS can be told, and what it takes of the device and of the host."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from slipstream.kernels.residency import MOST_SLOTS
from slipstream.kvcache.plan import available_host_bytes, parse_bytes
from slipstream.selection.selector import one_of, option
from slipstream.selection.two_level import TwoLevel
from slipstream.types import ModelSpec, options

CANDIDATES = ("previous", "predicted", "union", "current")
PREDICTORS = ("ridge", "analog", "last", "mean", "ema")
TRANSFERS = ("gather", "pooled")
LANES = ("auto", "inline", "thread", "stream")
_LEAST_SLOTS = 1.25
_HOST_SHARE = 0.5  # of the available host memory, where nobody says how much


@options
@dataclass(frozen=True)
class AsyncTLS(TwoLevel):
    """Two-level selection whose tokens come from blocks that are on the device already; the others are on their way.

    A step selects tokens inside the blocks of the step before (``previous``, the paper's), inside those and what of its
    own the chain has wanted lately (``union``: as many as ``slots`` x ``blocks``), inside those that AsyncSpade's
    predicted query chose (``predicted``), or waits for its own (``current``: :class:`TwoLevel`). A chain's first step
    waits, too. With ``offload`` the KV is on the host; the device holds the index, ``slots`` x ``blocks`` blocks for
    each chain, and the newest page of each chain. Who else runs decides how long a step takes, never what it selects.
    """

    candidates: str = option("union", "blocks that tokens come from: 'previous', 'predicted', 'union' or 'current'")
    offload: bool = option(False, "keep KV on the host; the device holds the index and what is about to be attended")
    gpu_kv: int | str | None = option(None, "device memory for all that, bytes or '16GiB'; default: kv_memory")
    host_kv: int | str | None = option(
        None, "host memory for KV (of each GPU that shares the model), bytes or '64GiB'; default: half of what is free"
    )
    host_file: str | None = option(None, "directory of a file that is the host memory instead, on a CPU")
    slots: float = option(2.0, "blocks on the device for each chain, as a multiple of blocks; at least 1.25")
    predictor: str = option("analog", "for candidates 'predicted': 'ridge', 'analog', 'last', 'mean' or 'ema'")
    window: int = option(64, "latest queries that a prediction sees, per layer and head")
    drift: float | None = option(None, "share of a head's blocks that may change in a step before it waits for them")
    margin: float | None = option(
        None, "how high among its blocks one that is missing may stand before a head waits: 0 to 1"
    )
    transfer: str = option("gather", "host to device by a 'gather' kernel, or 'pooled' copies (needs cuda_graphs off)")
    lane: str = option("auto", "where copies run: 'inline', 'thread' (CPU), 'stream' (GPU)")

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("candidates", self.candidates, CANDIDATES)
        one_of("predictor", self.predictor, PREDICTORS)
        one_of("transfer", self.transfer, TRANSFERS)
        one_of("lane", self.lane, LANES)
        if self.slots < _LEAST_SLOTS:
            raise ValueError(
                f"slots = {self.slots}: blocks for the next step come in while this one's are attended, so at least "
                f"{_LEAST_SLOTS} x blocks must fit on the device"
            )
        for name in ("drift", "margin"):
            value = getattr(self, name)
            if value is not None and not (type(value) in (int, float) and 0 <= value <= 1):
                raise ValueError(f"{name} must be a share between 0 and 1, got {value!r}")
        for name in ("gpu_kv", "host_kv", "host_file"):
            value = getattr(self, name)
            if value is None:
                continue
            if not self.offload:
                raise ValueError(f"{name} is for KV on the host: set offload=True, or use kv_memory")
            if name != "host_file":
                parse_bytes(value)
        if self.offload and self.dense_layers:
            raise ValueError("offload keeps no layer's KV on the device: set dense_layers=0, or offload=False")

    def num_slots(self, num_seats: int) -> int:
        """Slots of one layer and KV head."""
        return ceil(self.slots * self.blocks) * num_seats

    def seat_bytes(self, spec: ModelSpec) -> int:
        """Its set, when it wanted which block, and what is in its slots."""
        if self.candidates == "current" and not self.offload:
            return 0
        places = self.blocks + 1 + -(-spec.max_position // self.block) + 2 * self.num_slots(1)
        return 4 * spec.num_layers * spec.num_kv_heads * places

    def check_seats(self, num_seats: int) -> None:
        """``ValueError`` for more chains than the kernels that choose slots can see at once."""
        most = MOST_SLOTS // ceil(self.slots * self.blocks)
        if num_seats > most:
            raise ValueError(
                f"{num_seats} chains of {ceil(self.slots * self.blocks)} slots are more than {MOST_SLOTS}: set "
                f"max_num_seqs to at most {most}, or lower blocks"
            )


@dataclass(frozen=True)
class OffloadPlan:
    """What fits: pages of KV on the host, chains on the device.

    num_pages: the null page among them. stage_pages: of one layer, in which prompts are attended. device_bytes: index,
    slots, tails and stage. host_bytes: K and V of all pages.
    """

    num_pages: int
    num_seats: int
    stage_pages: int
    device_bytes: int
    host_bytes: int


def plan_offload(
    config: AsyncTLS,
    spec: ModelSpec,
    *,
    page_size: int,
    max_num_seqs: int,
    max_model_len: int,
    device_bytes: int,
    more_seat_bytes: int = 0,
    num_ranks: int = 1,
) -> OffloadPlan:
    """Share ``device_bytes`` and the host's memory out: as many chains as have a place on the device, and then pages.

    Every chain is priced with slots, tail, ``seat_bytes`` and more, and the index of ``max_model_len`` tokens.
    num_ranks: who take as much of the host each, and ask at the same time.
    Raises ``ValueError`` when not one chain fits, or when the host has not what was asked for.
    """
    page_bytes = page_size * spec.kv_bytes_per_token()
    longest = -(-max_model_len // page_size)
    slot_bytes = config.block * spec.kv_bytes_per_token()  # of one slot in every layer and head
    seat_bytes = config.num_slots(1) * slot_bytes + page_bytes + config.seat_bytes(spec) + more_seat_bytes
    entries = 4 * spec.num_layers * spec.num_kv_heads * page_size // config.block
    index_bytes = page_size * config.index.bytes_per_token(spec) + entries  # of one page
    stage_bytes = 2 * (longest + -(-max_num_seqs // page_size)) * page_bytes // spec.num_layers
    fixed = stage_bytes + page_bytes + config.seat_bytes(spec)  # the null seat has a tail and no slots
    one = fixed + seat_bytes + (longest + 1) * index_bytes
    if device_bytes < one:
        raise ValueError(
            f"one chain of {max_model_len} tokens needs {one:,} bytes on the device ({config.num_slots(1)} slots of "
            f"{config.block} tokens, index, stage), but only {device_bytes:,} are given: raise gpu_kv, or lower blocks "
            "or max_model_len"
        )
    host = _host_bytes(config, page_bytes, max_num_seqs * longest + 1, num_ranks)
    host_pages = host // page_bytes
    if host_pages < 2:
        raise ValueError(
            f"host_kv holds {host_pages} pages of {page_bytes:,} bytes, and needs the null page and one more: raise it"
        )
    num_seats = min(max_num_seqs, (device_bytes - fixed - index_bytes) // (seat_bytes + longest * index_bytes))
    room = device_bytes - fixed - num_seats * seat_bytes
    num_pages = min(host_pages, room // index_bytes)
    used = fixed + num_seats * seat_bytes + num_pages * index_bytes
    return OffloadPlan(num_pages, num_seats, longest, used, num_pages * page_bytes)


def _host_bytes(config: AsyncTLS, page_bytes: int, most_pages: int, num_ranks: int) -> int:
    """Bytes that the host is to give: no more than all chains can use."""
    useful = most_pages * page_bytes
    if config.host_file is not None:
        return useful if config.host_kv is None else min(useful, parse_bytes(config.host_kv))
    free = available_host_bytes() // num_ranks
    if config.host_kv is None:
        return min(useful, int(free * _HOST_SHARE))
    asked = parse_bytes(config.host_kv)
    if asked > free:
        raise ValueError(f"host_kv = {config.host_kv!r}, but the host has only {free:,} bytes available: lower host_kv")
    return min(useful, asked)
