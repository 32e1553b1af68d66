"""A slice of a model: some layers and some experts of each, for a rehearsal of a compression.

The layers that are not selected are not run at all, and tokens of experts that are not selected pass their
layer unchanged. So a slice costs its own share of the time, shows memory and pace, and is not a model: its
artifact can be inspected and verified, but not loaded.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping

from qmoe_jax.config import SwitchConfig
from qmoe_jax.parameters import STACKS

_LAYERS = re.compile(r"(?:(encoder|decoder):)?(\d+)(?:-(\d+))?")
_EXPERTS = re.compile(r"(\d+)(?:-(\d+))?")


@dataclasses.dataclass(frozen=True)
class Selection:
    """The layers and experts to compress.

    Attributes:
        layers: numbers of the layers to run, by stack.
        experts: the experts of each sparse layer to compress.
        whole: true where nothing is left out.
    """

    layers: Mapping[str, tuple[int, ...]]
    experts: range
    whole: bool

    @classmethod
    def of(cls, model: SwitchConfig, layers: str | None, experts: str | None) -> Selection:
        """Return what the options `layers` and `experts` select of a model; None selects all.

        Args:
            model: the architecture.
            layers: such as "0-3,7" (of both stacks) or "encoder:0-1,decoder:0".
            experts: such as "0-15".

        Raises:
            ValueError: an option cannot be read, or names what the model does not have.
        """
        counts = {stack: model.num_layers(stack) for stack in STACKS}
        chosen = {stack: tuple(range(count)) for stack, count in counts.items()}
        if layers is not None:
            numbers = _read_layers(layers, counts)
            chosen = {stack: tuple(sorted(numbers[stack])) for stack in STACKS}
        some = range(model.num_experts) if experts is None else _read_experts(experts, model.num_experts)
        return cls(chosen, some, layers is None and experts is None)


def _read_layers(text: str, counts: Mapping[str, int]) -> dict[str, set[int]]:
    """Return the numbers of the layers in a text, by stack."""
    numbers: dict[str, set[int]] = {stack: set() for stack in counts}
    for part in text.split(","):
        if (match := _LAYERS.fullmatch(part.strip())) is None:
            raise ValueError(f"layers: expected such as 0-3,7 or encoder:0-1,decoder:0, found {text!r}")
        stack, first, last = match[1], int(match[2]), int(match[3] or match[2])
        for name in (stack,) if stack else counts:
            if not first <= last < counts[name]:
                raise ValueError(
                    f"layers: expected numbers of {name} layers from 0 to {counts[name] - 1}, found {part!r}"
                )
            numbers[name] |= set(range(first, last + 1))
    return numbers


def _read_experts(text: str, count: int) -> range:
    """Return the range of experts in a text."""
    if (match := _EXPERTS.fullmatch(text.strip())) is None:
        raise ValueError(f"experts: expected such as 0-15, found {text!r}")
    first, last = int(match[1]), int(match[2] or match[1])
    if not first <= last < count:
        raise ValueError(f"experts: expected numbers from 0 to {count - 1}, found {text!r}")
    return range(first, last + 1)


def expert_ranges(experts: range, size: int) -> Iterator[range]:
    """Yield `experts` in ranges of `size`, the last one shorter where it does not divide."""
    for start in range(experts.start, experts.stop, size):
        yield range(start, min(start + size, experts.stop))
