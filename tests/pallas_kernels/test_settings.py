"""Every backend of every op can be traced in a caller's program, whatever is set there: the same dtypes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import encode_rows, packed_matmul, packed_mlp, unpack
from qmoe_jax.coding import tunstall_codebook
from tests.helpers.jax_settings import STRICT, every_setting
from tests.helpers.packed_samples import sample

CODEBOOK = tunstall_codebook()
WI, WO = (sample(CODEBOOK, shape).packed for shape in ((3, 32, 16), (3, 16, 32)))
OPS = {
    "packed_matmul": lambda backend, x, expert: packed_matmul(WI, x, expert, backend=backend),
    "packed_mlp": lambda backend, x, expert: packed_mlp(WI, WO, x, expert, backend=backend),
    "gated packed_mlp": lambda backend, x, expert: packed_mlp((WI, WI), WO, x, expert, backend=backend),
    "unpack": lambda backend, x, expert: unpack(WI, backend=backend),
    "encode_rows": lambda backend, x, expert: encode_rows(
        np.zeros((2, 40), np.uint8), CODEBOOK.encode_table, backend=backend
    ),
}


@pytest.mark.parametrize("backend", ["reference", "cpu", "pallas_interpret"])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("tokens", [3, 40])
def test_settings_of_the_caller_change_no_dtype(op, backend, tokens):
    expert = jnp.zeros(tokens, jnp.int32)
    trace = lambda: jax.eval_shape(lambda x: OPS[op](backend, x, expert), jnp.ones((tokens, 16), jnp.float32))
    expected = trace()
    with jax.enable_x64(True):
        assert trace() == expected
    with every_setting(STRICT):
        assert trace() == expected
