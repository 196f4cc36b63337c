"""TOVA (arXiv 2401.06104): evict for good the token that the last query minded least. Its store is in ``attention``."""

from __future__ import annotations

from dataclasses import dataclass

from slipstream.selection.selector import check_numbers, option
from slipstream.types import options


@options
@dataclass(frozen=True)
class Tova:
    """At most ``budget`` tokens of a chain stay, one set per layer; what is evicted never comes back."""

    budget: int = option(1024, "most tokens attended per KV head; sinks, recent and the newest are inside it")

    def __post_init__(self) -> None:
        check_numbers(self)
