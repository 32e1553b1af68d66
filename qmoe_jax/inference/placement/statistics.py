"""Counters of an expert store: lookups, reads and the time they took."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass
class ExpertStatistics:
    """Counters since the store was made, or since `reset`.

    Attributes:
        placement: where the experts are kept: "host" or "disk".
        resident_bytes: upper bound of the packed experts held in memory, in bytes.
        calls: layers run.
        lookups: experts requested, each counted once per layer and call.
        hits: lookups that found the expert in memory.
        reads: experts read from disk.
        bytes_read: bytes of these reads.
        evictions: experts dropped from memory to make room.
        io_wait_seconds: time blocked on reads with no other work to do.
        compute_seconds: time spent multiplying.
    """

    placement: str
    resident_bytes: int
    calls: int = 0
    lookups: int = 0
    hits: int = 0
    reads: int = 0
    bytes_read: int = 0
    evictions: int = 0
    io_wait_seconds: float = 0.0
    compute_seconds: float = 0.0

    @property
    def hit_rate(self) -> float:
        """Share of the lookups that found the expert in memory; 1 if there were none."""
        return self.hits / self.lookups if self.lookups else 1.0

    def reset(self) -> None:
        """Set all counters to zero; `placement` and `resident_bytes` stay."""
        self.__init__(self.placement, self.resident_bytes)  # type: ignore[misc]

    def to_json(self) -> dict[str, int | float | str]:
        """Return the counters and the hit rate as a dict of JSON values."""
        return {**dataclasses.asdict(self), "hit_rate": self.hit_rate}

    def __str__(self) -> str:
        """Return a one-line summary."""
        return (
            f"experts on {self.placement}: {self.hits:,} of {self.lookups:,} lookups hit memory "
            f"({self.hit_rate:.1%}), {self.bytes_read / 1e6:,.1f} MB in {self.reads:,} reads, "
            f"I/O wait {1e3 * self.io_wait_seconds:,.0f} ms, compute {1e3 * self.compute_seconds:,.0f} ms, "
            f"at most {self.resident_bytes / 1e6:,.1f} MB resident"
        )
