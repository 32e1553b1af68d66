"""Every load and store of the encoder is checked against its array, on bytes of which most are no digits."""

import jax
import numpy as np
import pytest

from pallas_kernels.encode_rows.pallas import encode_rows as encode
from tests.helpers import packed_samples as samples
from tests.pallas_kernels.test_safety_bounds import checking, ran, strays, traced  # noqa: F401


@pytest.mark.parametrize("book", ["upstream", "tunstall-8"])
def test_no_byte_leads_out_of_an_array(book):
    table = samples.CODEBOOKS[book]().encode_table
    noise = np.random.default_rng(0).integers(0, 256, (2, 37, 19), dtype=np.uint8)
    traced.clear()
    codes, row_offsets = ran(jax.jit(lambda d: encode(d, table, interpret=True)), noise)
    assert traced == {"load", "store"}
    assert strays == []
    assert codes.max() < len(table.code)
    assert row_offsets[:, -1].min() > 37
