"""Upstream's inputs and outputs, as `tests/golden/README.md` describes them."""

import dataclasses
import json
import pathlib
import re

import numpy as np

from qmoe_jax.quantization import Grid, ternary_grid, uniform_grid

DATA = pathlib.Path(__file__).parent.parent / "golden"

vectors = np.load(DATA / "gptq_vectors.npz")
meta = json.loads((DATA / "gptq_meta.json").read_text())


def grid_of(bits: str) -> Grid:
    return ternary_grid() if bits == "1.5" else uniform_grid(bits=int(bits))


def hessian(case: str) -> np.ndarray:
    tril = vectors[f"{case}.H.tril"]
    width = int((2 * tril.shape[1]) ** 0.5)
    full = np.zeros((len(tril), width, width), np.float32)
    rows, columns = np.tril_indices(width)
    full[:, rows, columns] = full[:, columns, rows] = tril
    return full


@dataclasses.dataclass(frozen=True)
class Run:
    """One call of upstream's `batch_gptq`."""

    key: str
    case: str
    bits: str
    damping: float
    group_size: int | None
    activation_order: bool
    bfloat16: bool

    @classmethod
    def parse(cls, key: str) -> "Run":
        case, bits, damping, group, order, bfloat16 = re.fullmatch(
            r"(\w)\.b([\d.]+)_pd([\d.]+)_gs(-?\d+)_ao(\d)(_bf16W)?", key
        ).groups()
        size = None if group == "-1" else int(group)
        return cls(key, case, bits, float(damping), size, order == "1", bfloat16 is not None)

    @property
    def values(self) -> np.ndarray:
        return vectors[f"{self.key}.Q"]


RUNS = [
    Run.parse(key.removesuffix(".Q")) for key in vectors.files if key.endswith(".Q") and "_rtn" not in key
]
