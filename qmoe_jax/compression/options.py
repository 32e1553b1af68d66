"""What a compression can be asked for."""

from __future__ import annotations

import dataclasses
from typing import Literal

from qmoe_jax.config import SwitchConfig
from qmoe_jax.parameters import STACKS
from qmoe_jax.quantization import Grid, ternary_grid, uniform_grid

PUBLISHED_SENTINEL_START = 32000
PUBLISHED_VOCABULARY = 32128


@dataclasses.dataclass(frozen=True)
class CompressionConfig:
    """How experts are quantized and coded; the defaults are upstream QMoE's, but for the code.

    Attributes:
      bits: "ternary", or 2, 3, 4 for uniform grids.
      method: "gptq", or "nearest" for rounding without calibration.
      damping: share of the Hessian's mean diagonal added to its diagonal.
      group_size: columns that share levels; None: the whole row.
      activation_order: quantize the columns of the largest activations first.
      true_sequential: calibrate an expert's second matrix on the outputs of its quantized first one.
      skip: leave that stack uncompressed.
      keep_sentinels: let sentinel tokens (and the decoder tokens that predict them) enter the Hessians.
      sentinel_start: the first sentinel id; None: 32,000 for the published models' vocabulary.
      token_cap: tokens that may calibrate an expert, in even shares.
      experts_per_group: experts that are in memory, quantized and written together.
      codebook: of ternary digits: "tunstall-<bits>", fitted to the model, or "upstream".
      level_dtype: what levels are rounded to in the artifact.
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

    def __post_init__(self) -> None:
        """Refuse what cannot be done, before any work."""
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
            if (value := getattr(self, name)) is not None and not value >= least:
                raise ValueError(f"{name}: expected at least {least}, found {value}")

    @property
    def grid(self) -> Grid:
        """The grid of `bits`."""
        return ternary_grid() if self.bits == "ternary" else uniform_grid(bits=self.bits)

    @property
    def compressed_stacks(self) -> tuple[str, ...]:
        """The stacks whose experts are quantized."""
        return tuple(stack for stack in STACKS if stack != self.skip)

    def first_sentinel(self, model: SwitchConfig) -> int:
        """The id from which on tokens are sentinels; beyond the vocabulary where they are kept.

        Raises:
          ValueError: it was not given, and the vocabulary is not the published models'.
        """
        if self.keep_sentinels:
            return model.vocab_size
        if self.sentinel_start is not None:
            return self.sentinel_start
        if model.vocab_size == PUBLISHED_VOCABULARY:
            return PUBLISHED_SENTINEL_START
        raise ValueError(
            f"sentinel_start: needed for a vocabulary of {model.vocab_size} (only that of the published models, "
            f"{PUBLISHED_VOCABULARY}, is known); pass the first sentinel id, or keep_sentinels=True"
        )
