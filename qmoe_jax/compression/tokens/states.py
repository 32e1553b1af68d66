"""The hidden states between the passes of a walk: where they lie, whether they are whole, and their removal.

In front of a layer's experts lies what the attention pass wrote, a part per host, with the routing in its
index. Behind them is a part per expert group. The encoder's final states are kept for the decoder.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float32, UInt16

from qmoe_jax.compression.steps import Step
from qmoe_jax.compression.tokens.store import TokenStore, part_names, remove_store


@dataclasses.dataclass(frozen=True)
class StatesOnDisk:
    """The folders of hidden states.

    Attributes:
        root: the folder of all.
        features: of a state.
        parts: names of the parts behind the experts of a layer.
    """

    root: Path
    features: int
    parts: tuple[str, ...]

    @property
    def final(self) -> Path:
        """Folder of the encoder's final states."""
        return self.root / "encoder.final"

    def routed(self, step: Step) -> Path:
        """Return the folder of the states in front of a step's experts, or of the encoder's at its end."""
        return self.final if step.sparse is None else self.root / f"{step.folder}.routed"

    def computed(self, step: Step) -> Path:
        """Return the folder of the states behind a step's experts."""
        return self.root / f"{step.folder}.computed"

    def open_routed(self, step: Step) -> TokenStore:
        """Open the states in front of a step's experts. Raises `CheckpointError` as `TokenStore`."""
        folder = self.routed(step)
        return TokenStore(folder, host_parts(folder), self.features)

    def open_computed(self, step: Step, names: Sequence[str] | None = None) -> TokenStore:
        """Open the states behind a step's experts, or some parts of them. Raises as `open_routed`."""
        return TokenStore(self.computed(step), self.parts if names is None else names, self.features)

    def open_final(self) -> TokenStore:
        """Open the encoder's final states, grouped by the slab of the decoder that attends to them."""
        return TokenStore(self.final, host_parts(self.final), self.features)

    def is_routed(self, step: Step) -> bool:
        """Return whether the attention pass of a step is done, and its states are still there."""
        names = host_parts(self.routed(step))
        return bool(names) and all((self.routed(step) / name).exists() for name in names)

    def stores(self, steps: Sequence[Step], number: int) -> list[TokenStore] | None:
        """Return the states with which a walk can go on at a step; None where they are not there.

        Raises:
            CheckpointError: an index is damaged.
        """
        step, stores = steps[number], []
        if step.stack == "decoder":
            if not host_parts(self.final):
                return None
            stores.append(self.open_final())
        if self.is_routed(step):
            done = part_names(self.computed(step))
            return [*stores, self.open_routed(step), self.open_computed(step, done)]
        if not number or steps[number - 1].stack != step.stack:
            return stores or None
        earlier = steps[number - 1]
        if set(self.parts) <= set(part_names(self.computed(earlier))):
            return [*stores, self.open_computed(earlier)]
        return None

    def remove(self, step: Step) -> None:
        """Remove the states of a step, but for the encoder's final ones."""
        if step.sparse is not None:
            remove_store(self.computed(step))
            remove_store(self.routed(step))

    def remove_routed_data(self, step: Step) -> None:
        """Remove the states in front of the experts; the routing stays, by which those behind are found."""
        for name in host_parts(self.routed(step)):
            (self.routed(step) / name).unlink(missing_ok=True)


def host_parts(folder: Path) -> list[str]:
    """Return the parts that the hosts of one run wrote, in their order; none unless all of them did."""
    found: dict[int, set[int]] = {}
    for name in part_names(folder):
        if match := re.fullmatch(r"host-(\d+)-of-(\d+)", name):
            found.setdefault(int(match[2]), set()).add(int(match[1]))
    for count, indexes in sorted(found.items()):
        if indexes == set(range(count)):
            return [f"host-{index}-of-{count}" for index in range(count)]
    return []


def routing_of(store: TokenStore) -> tuple[UInt16[np.ndarray, "token"], Float32[np.ndarray, "token"]]:
    """Return the expert of every token, and its router probability."""
    parts = [store.arrays[name] for name in host_parts(store.folder)]
    expert, probability = (np.concatenate([p[key] for p in parts]) for key in ("expert", "probability"))
    return expert, probability
