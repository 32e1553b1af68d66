"""What a store of experts has done: how often it was asked, what it read, how long that took."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass
class ExpertStatistics:
    """Counted since the store was made, or since `reset`.

    Attributes:
      placement: where the experts live: "host" or "disk".
      resident_bytes: of packed experts that the store holds in memory at most.
      calls: layers run.
      uses: experts asked for, each once a layer and call.
      hits: of them, those that were in memory already.
      reads: those that were read.
      bytes_read: by these reads.
      evictions: experts given up for others.
      waited: seconds in which there was nothing to do but wait for reads.
      computed: seconds in which experts were multiplied.
    """

    placement: str
    resident_bytes: int
    calls: int = 0
    uses: int = 0
    hits: int = 0
    reads: int = 0
    bytes_read: int = 0
    evictions: int = 0
    waited: float = 0.0
    computed: float = 0.0

    @property
    def hit_rate(self) -> float:
        """Share of the uses that found the expert in memory; 1 where there was none."""
        return self.hits / self.uses if self.uses else 1.0

    def reset(self) -> None:
        """Counts from here on; `placement` and `resident_bytes` stay."""
        self.__init__(self.placement, self.resident_bytes)  # type: ignore[misc]

    def to_json(self) -> dict[str, int | float | str]:
        """As plain values, the hit rate among them."""
        return {**dataclasses.asdict(self), "hit_rate": self.hit_rate}

    def __str__(self) -> str:
        """One line for people."""
        return (
            f"experts on {self.placement}: {self.hits:,} of {self.uses:,} uses from memory ({self.hit_rate:.1%}), "
            f"{self.bytes_read / 1e6:,.1f} MB read in {self.reads:,} reads, {1e3 * self.waited:,.0f} ms waited for "
            f"them, {1e3 * self.computed:,.0f} ms computed; at most {self.resident_bytes / 1e6:,.1f} MB held"
        )
