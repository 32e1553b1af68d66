"""No stream reads or writes out of bounds, however corrupt: random codes, offsets and experts run to the end.

Interpret mode fills what a kernel does not write with NaN, and the compiled kernel runs here on arrays that
end where an unmapped page begins: a finite result that the backends agree on is evidence, not only the
absence of a crash.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels.cpu.packed_product import packed_product
from pallas_kernels.cpu.token_blocks import TokenBlocks
from tests.helpers import packed_samples as samples
from tests.helpers.kernel_contract import BACKENDS, IMPLEMENTATIONS
from tests.helpers.pages import at_the_end_of_a_page


def runs(book: str):
    """The four kinds of corruption on one shape, so that each backend compiles once."""
    sample = samples.sample(samples.CODEBOOKS[book](), (3, 5, 70))
    x, _ = samples.tokens(sample, 20)
    for seed in range(4):
        yield samples.corrupted(sample.packed, seed), x, jnp.asarray(np.arange(20) % 5 - 1, jnp.int32)


@pytest.mark.parametrize("book", ["tunstall-8", "tunstall-10"])
def test_products_of_corrupt_streams_agree(book):
    for packed, x, expert_index in runs(book):
        found = [
            np.asarray(pk.packed_matmul(packed, x, expert_index, backend=backend))
            for backend in IMPLEMENTATIONS.values()
        ]
        assert np.isfinite(found).all()
        if (np.diff(packed.row_offsets) >= 0).all():  # where rows overlap, what they hold is not defined
            for other in found[1:]:
                np.testing.assert_allclose(other, found[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("book", ["tunstall-8", "tunstall-10"])
def test_corrupt_streams_unpack_to_levels(book):
    for packed, _, _ in runs(book):
        for backend in BACKENDS:
            dense = np.asarray(pk.unpack(packed, backend=backend))
            levels = np.concatenate([np.zeros((3, 5, 1)), np.asarray(packed.levels, np.float32)], -1)
            assert (dense[..., None] == levels[:, :, None, :]).any(-1).all(), backend


def test_the_cpu_kernel_reads_nothing_behind_its_arrays():
    packed, _ = samples.sample(samples.CODEBOOKS["tunstall-8"](), (2, 4, 70))
    for seed in range(4):
        damaged = samples.corrupted(packed, seed)
        arrays = ("codes", "row_offsets", "levels")
        copies = {name: at_the_end_of_a_page(getattr(damaged, name)) for name in arrays}
        table = dataclasses.replace(packed.table, entries=at_the_end_of_a_page(packed.table.entries))
        damaged = dataclasses.replace(damaged, table=table, **copies)
        for tokens in (1, 5, 20, 50):
            blocks = TokenBlocks.by_expert(np.ones(tokens, np.int32))
            x = at_the_end_of_a_page(blocks.dispatch(np.ones((tokens, 70), np.float32)))
            assert np.isfinite(packed_product(damaged, blocks, x)).all()
