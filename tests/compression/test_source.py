"""The digest of the experts: of their content, whatever the format, or of a sample of it."""

import dataclasses

import numpy as np
import pytest

from qmoe_jax.compression.source import experts_digest
from qmoe_jax.files.tensor import LazyTensor
from tests.helpers.checkpoint_samples import EXPERTS, TINY, memory_checkpoint, random_parameters


class Chunked(LazyTensor):
    """A tensor in chunks of two rows and three columns."""

    rows_per_chunk = 2

    def read_columns(self, rows):
        for start in range(0, self.shape[1], 3):
            yield self.read(rows)[:, start : start + 3]


def chunked(checkpoint):
    tensors = {
        name: Chunked(tensor.shape, tensor.dtype, tensor.read) if "/expert/" in name else tensor
        for name, tensor in checkpoint.tensors.items()
    }
    return dataclasses.replace(checkpoint, tensors=tensors)


def test_the_digest_does_not_depend_on_chunks():
    checkpoint = memory_checkpoint(TINY, random_parameters())
    assert experts_digest(chunked(checkpoint)) == experts_digest(checkpoint)


@pytest.mark.parametrize("expert", [0, 4])
@pytest.mark.parametrize("whole_bytes", [1 << 30, 1], ids=["whole", "sample"])
def test_a_changed_value_changes_the_digest(expert, whole_bytes):
    parameters = random_parameters()
    before = experts_digest(memory_checkpoint(TINY, parameters), whole_bytes=whole_bytes)
    assert experts_digest(memory_checkpoint(TINY, random_parameters()), whole_bytes=whole_bytes) == before
    parameters[EXPERTS][expert, 0, 0] += np.ones((), parameters[EXPERTS].dtype)
    assert experts_digest(memory_checkpoint(TINY, parameters), whole_bytes=whole_bytes) != before


def test_a_sample_of_chunks_reads_only_the_first_columns():
    checkpoint, read = chunked(memory_checkpoint(TINY, random_parameters())), []
    tensor = checkpoint.tensors[EXPERTS]

    def spy(rows):
        read.append(rows)
        return tensor.read(rows)

    spied = Chunked(tensor.shape, tensor.dtype, spy)
    experts_digest(
        dataclasses.replace(checkpoint, tensors={**checkpoint.tensors, EXPERTS: spied}), whole_bytes=1
    )
    assert read == [slice(0, 2)]
