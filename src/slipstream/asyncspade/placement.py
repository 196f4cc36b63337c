"""Where the cache rank is, and the backend that goes with it."""

from __future__ import annotations

from torch import Tensor

from slipstream.asyncspade.backend import AsyncSpadeBackend
from slipstream.asyncspade.channel import ChannelLost, Pace
from slipstream.asyncspade.config import AsyncSpade
from slipstream.asyncspade.hello import Hello
from slipstream.asyncspade.packed import PackedBackend
from slipstream.asyncspade.rank_link import RankLink, Refused
from slipstream.asyncspade.remote import RemoteBackend
from slipstream.asyncspade.two_devices import TwoDeviceBackend
from slipstream.attention.backend import AttentionBackend
from slipstream.attention.calibration import Calibration
from slipstream.kvcache.pool import KVPool
from slipstream.types import ModelSpec


def reach_rank(
    config: AsyncSpade,
    pool: KVPool,
    spec: ModelSpec,
    dense: AttentionBackend,
    gate: int,
    num_seats: int,
    calibration: Calibration,
    cos_sin: Tensor,
    pace: Pace | None = None,
) -> AttentionBackend:
    """The backend whose cache rank is a process at ``config.cache_rank``. ``ValueError`` if it cannot be had.

    gate: as in ``SparseBackend``; where the rank alone has the keys, a chain is sparse from its first step.
    pace: how slow a link to imitate, both ways.
    """
    assert config.cache_rank is not None
    _check(config, spec, calibration)
    gate = gate if config.transfer == "indices" else 0
    positions, rotated = cos_sin.shape
    hello = Hello(config, spec, calibration.identity, num_seats, pool.page_size, gate, positions, rotated, pace)
    num_channels = getattr(config.inner().index, "num_channels", 0)
    known = calibration.num_tokens > 0
    channels = calibration.channels(num_channels) if known and num_channels else None
    link = RankLink(
        config.cache_rank,
        hello,
        cos_sin,
        channels,
        timeout_s=config.rank_timeout,
        key_file=config.rank_key,
        pace=pace,
    )
    try:
        link.connect(config.rank_timeout)
    except ChannelLost as error:
        raise ValueError(f"{error}: start one with `slipstream cache-rank --listen {config.cache_rank}`") from error
    except Refused as error:
        raise ValueError(f"{link.name} refused: {error}") from error
    if config.transfer != "indices":
        return PackedBackend(pool, spec, config, link, dense, num_seats)
    online = calibration if num_channels and not known else None
    return RemoteBackend(pool, spec, config, link, dense, gate, num_seats, online)


def _check(config: AsyncSpade, spec: ModelSpec, calibration: Calibration) -> None:
    if config.transfer == "indices":
        return
    if spec.value_dim is not None:
        raise ValueError(f"transfer={config.transfer!r} is not for latent caches: set transfer='indices'")
    if config.scoring == "index" and calibration.num_tokens == 0:
        raise ValueError(
            f"transfer={config.transfer!r} needs calibrated labels: run `slipstream calibrate`, or set "
            "transfer='indices' or scoring='keys'"
        )


def seat_bytes(config: AsyncSpade, spec: ModelSpec) -> int:
    """Memory of one seat on the inference rank, wherever the cache rank is."""
    if config.cache_device is not None:
        return TwoDeviceBackend.seat_bytes(config, spec)
    if config.cache_rank is None:
        return AsyncSpadeBackend.seat_bytes(config, spec)
    kind = RemoteBackend if config.transfer == "indices" else PackedBackend
    return kind.seat_bytes(config, spec)
