"""Options of a compression."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

from qmoe_jax.artifact.selection import Selection
from qmoe_jax.config import SwitchConfig
from qmoe_jax.data import Tokenizer
from qmoe_jax.parameters import STACKS
from qmoe_jax.quantization import Grid, ternary_grid, uniform_grid

PUBLISHED_SENTINEL_START = 32000
"""First sentinel id of the published models, whose vocabulary has `PUBLISHED_VOCABULARY` ids."""

PUBLISHED_VOCABULARY = 32128


@dataclasses.dataclass(frozen=True)
class CompressionConfig:
    """Options of a compression; the defaults are upstream QMoE's, except for the codebook.

    The command line makes its options from these fields, and its help from the entries below.

    Attributes:
        bits: ternary, whose digits are coded below 1 bit, or 2, 3 or 4 bits on a uniform grid.
        method: gptq, which compensates errors on calibration text, or nearest (round-to-nearest, RTN).
        damping: share of the mean of a Hessian's diagonal that is added to the diagonal.
        group_size: columns that share their levels; by default the whole row.
        activation_order: quantize the columns with the largest activations first.
        true_sequential: calibrate an expert's second matrix on the outputs of its quantized first one.
        skip: stack to leave uncompressed, encoder or decoder; by default neither.
        keep_sentinels: let sentinel tokens, and the decoder tokens that predict them, enter the Hessians.
        sentinel_start: lowest sentinel id; by default the tokenizer's (in Python: `with_sentinels`, or 32000
            for the vocabulary of the published models).
        token_cap: maximum number of tokens that calibrate an expert, as a multiple of the even share.
        experts_per_group: experts quantized and written together; each needs about 12 x d_ff² bytes of
            memory.
        codebook: code of ternary digits: tunstall-N (N-bit codewords, 2 to 16, fitted to the model) or
            upstream.
        level_dtype: dtype that levels are stored in.
        layers: rehearse on these layers alone, such as 0-3,7 or encoder:0-1,decoder:0; the artifact can be
            inspected and verified, but not loaded as a model.
        experts: rehearse on these experts of each layer alone, such as 0-15.
    """

    bits: Literal["ternary", 2, 3, 4] = "ternary"
    method: Literal["gptq", "nearest"] = "gptq"
    damping: float = 0.1
    group_size: int | None = None
    activation_order: bool = False
    true_sequential: bool = False
    skip: Literal["encoder", "decoder"] | None = None
    keep_sentinels: bool = False
    sentinel_start: int | None = None
    token_cap: float = 4.0
    experts_per_group: int = 16
    codebook: str = "tunstall-8"
    level_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    layers: str | None = None
    experts: str | None = None

    def __post_init__(self) -> None:
        """Check the values. Raises `ValueError` for one that is out of range."""
        choices = {
            "bits": ("ternary", 2, 3, 4),
            "method": ("gptq", "nearest"),
            "skip": (None, "encoder", "decoder"),
            "codebook": ("upstream", *(f"tunstall-{bits}" for bits in range(2, 17))),
            "level_dtype": ("bfloat16", "float32"),
        }
        for name, allowed in choices.items():
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"{name}: expected one of {allowed}, found {value!r}")
        for name, least in {"damping": 0, "group_size": 1, "token_cap": 0, "experts_per_group": 1}.items():
            if (value := getattr(self, name)) is not None and not least <= value < math.inf:
                raise ValueError(f"{name}: expected a finite number of at least {least}, found {value}")

    def to_json(self) -> dict[str, Any]:
        """Return the options as an artifact names them; `layers` and `experts` only where they select."""
        fields = dataclasses.asdict(self)
        return {
            name: value
            for name, value in fields.items()
            if value is not None or name not in ("layers", "experts")
        }

    @property
    def grid(self) -> Grid:
        """Grid of the digits."""
        return ternary_grid() if self.bits == "ternary" else uniform_grid(bits=self.bits)

    @property
    def compressed_stacks(self) -> tuple[str, ...]:
        """Stacks whose experts are quantized."""
        return tuple(stack for stack in STACKS if stack != self.skip)

    def selection(self, model: SwitchConfig) -> Selection:
        """Return the layers and experts to compress.

        Raises:
            ValueError: `layers` or `experts` cannot be read, or names what the model does not have, or no
                experts are left to compress.
        """
        selection = Selection.of(model, self.layers, self.experts)
        sparse = {stack: set(model.sparse_layers(stack)) for stack in self.compressed_stacks}
        if not any(sparse[stack].intersection(selection.layers[stack]) for stack in sparse):
            raise ValueError(
                f"layers: expected a layer with experts among {self.layers or 'all'}, found none in the "
                f"{' and '.join(self.compressed_stacks)}"
            )
        return selection

    def with_sentinels(self, tokenizer: Tokenizer) -> CompressionConfig:
        """Return the options with `sentinel_start` from the tokenizer.

        Raises:
            ValueError: another one is given, or the sentinels are not the highest ids of the tokenizer, so
                that no lowest id sets them apart.
        """
        start, count = tokenizer.sentinels.start, tokenizer.sentinels.count
        if self.keep_sentinels:
            return self
        if start + count != tokenizer.vocab_size:
            raise ValueError(
                f"{tokenizer.path}: expected sentinels with the highest ids of the tokenizer, "
                f"{tokenizer.vocab_size - count} to {tokenizer.vocab_size - 1}, found {start} to "
                f"{max(tokenizer.sentinels.ids)}; calibrate on sentinels too (keep_sentinels)"
            )
        if self.sentinel_start not in (None, start):
            raise ValueError(
                f"sentinel_start: expected {start}, the lowest sentinel of {tokenizer.path}, found "
                f"{self.sentinel_start}; leave the option out"
            )
        return dataclasses.replace(self, sentinel_start=start)

    def first_sentinel(self, model: SwitchConfig) -> int:
        """Return the first id that is a sentinel; one beyond the vocabulary where sentinels are kept.

        Raises:
            ValueError: it was not given, and the vocabulary is not that of the published models.
        """
        if self.keep_sentinels:
            return model.vocab_size
        if self.sentinel_start is not None:
            return self.sentinel_start
        if model.vocab_size == PUBLISHED_VOCABULARY:
            return PUBLISHED_SENTINEL_START
        raise ValueError(
            "sentinel_start: expected the first sentinel id, found None; it is known only for the published "
            f"models' vocabulary of {PUBLISHED_VOCABULARY}, not for one of {model.vocab_size}; take it from "
            "the tokenizer (with_sentinels), or set keep_sentinels=True"
        )
