"""Products and decoded weights against what upstream's CUDA kernels return for the same codewords."""

import ml_dtypes
import numpy as np
import pytest

import pallas_kernels as pk
from qmoe_jax.coding import EncodedRows, pack, upstream_codebook
from tests.helpers.kernel_contract import BACKENDS, IMPLEMENTATIONS

CASES = ("iid885_96x3072", "iid885_32x2080", "iid50_64x1024", "rowdensity_64x1536")


def bfloat16(bits: np.ndarray) -> np.ndarray:
    return bits.view(ml_dtypes.bfloat16)


def packed(codes, row_offsets, levels, width: int) -> pk.PackedMatrix:
    """One expert; upstream interleaves the levels."""
    streams = [EncodedRows(codes, row_offsets)]
    return pack(streams, bfloat16(levels).reshape(1, -1, 2), upstream_codebook(), width)


@pytest.mark.parametrize("backend", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES)
def test_products_match_upstreams(backend, case, data):
    with np.load(data / "pack_vectors.npz") as vectors, np.load(data / "matvec_vectors.npz") as products:
        digits, codes, offsets = (vectors[f"{case}.{name}"] for name in ("tern", "w_comp", "row_off"))
        levels, x, exact, rounded = (
            products[f"{case}.{name}"] for name in ("ter_minmax_bf16", "x_bf16", "y_f64", "y_bf16")
        )
    matrix = packed(codes, offsets, levels, digits.shape[1])
    x, expert = bfloat16(x)[None], np.zeros(1, np.int32)
    found = np.asarray(pk.packed_matmul(matrix, x.astype(np.float32), expert, backend=backend), np.float64)[0]
    table = np.pad(np.asarray(matrix.levels[0], np.float64), ((0, 0), (1, 0)))
    weights = np.take_along_axis(table, digits.astype(np.int64), 1)
    assert (np.abs(found - exact) <= 1e-6 * (np.abs(weights) @ np.abs(x[0].astype(np.float64)))).all()
    found = np.asarray(pk.packed_matmul(matrix, x, expert, backend=backend))[0]
    off = np.abs(found.astype(np.float64) - bfloat16(rounded).astype(np.float64))
    # A unit in the last place of a bfloat16, and what sums in another order differ by where much cancels.
    assert (off <= 2.0**-7 * np.abs(exact) + 1e-6 * (np.abs(weights) @ np.abs(x[0].astype(np.float64)))).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_linear_layer_matches_upstreams(backend, data):
    """Rows without zeros, minima or maxima too, whose zeros upstream codes as one of the levels."""
    with np.load(data / "sub1linear_make.npz") as layer:
        matrix = packed(layer["w_comp"], layer["row_off"], layer["ter_minmax_bf16"], layer["W"].shape[1])
        assert (np.asarray(pk.unpack(matrix, backend=backend)[0]) == layer["W_dequant"]).all()
        weights = layer["W_dequant"].astype(np.float32)
        x, wanted = bfloat16(layer["x_bf16"]), bfloat16(layer["y_bf16"])
    found = np.asarray(pk.packed_matmul(matrix, x, np.zeros(len(x), np.int32), backend=backend))
    found, wanted = found.astype(np.float32), wanted.astype(np.float32)
    off = np.abs(found - wanted)
    assert (off <= 2.0**-7 * np.abs(wanted) + 1e-6 * (np.abs(x.astype(np.float32)) @ np.abs(weights).T)).all()
