"""A model whose artifact lies in an object store: placements of its experts, and its tokenizer."""

import jax
import numpy as np
import pytest

import qmoe_jax as qj
from qmoe_jax.artifact import ArtifactReader
from qmoe_jax.files.errors import CheckpointError
from qmoe_jax.inference.placement import PlacedSource, read_host_experts
from qmoe_jax.inference.tokenizer import tokenizer_file
from tests.helpers import artifact_samples as samples
from tests.helpers.stores import copy_into, memory_store
from tests.helpers.tokenizers import random_texts, train_tokenizer


def test_experts_in_host_memory_are_those_of_a_local_artifact(artifact) -> None:
    readers = ArtifactReader.open(artifact[0]), ArtifactReader.open(copy_into(memory_store(), artifact[0]))
    local, there = (read_host_experts(PlacedSource.of(reader), "relu") for reader in readers)
    for layer in readers[0].layers:
        jax.tree.map(np.testing.assert_array_equal, local.matrices(layer), there.matrices(layer))


@pytest.mark.parametrize("chosen", ["asked for", "for want of memory"])
def test_experts_on_disk_refuse_a_url_by_name(artifact, monkeypatch: pytest.MonkeyPatch, chosen: str) -> None:
    reader = ArtifactReader.open(copy_into(memory_store(), artifact[0]))
    monkeypatch.setattr("qmoe_jax.inference.placement.choose.available_memory", lambda: 10_000)
    with pytest.raises(CheckpointError, match="experts cannot be read from a URL") as caught:
        qj.load_compressed(reader, experts="disk" if chosen == "asked for" else None)
    assert caught.value.path == "memory://model"
    assert "copy the artifact to a local disk" in str(caught.value)


def test_the_tokenizer_that_an_artifact_carries_is_read_from_there(tmp_path) -> None:
    content = train_tokenizer(tmp_path / "t.model", random_texts(200), 100).read_bytes()
    with samples.writer(store := memory_store()) as writer:
        writer.attach("tokenizer.model", content)
        for stack, layer in samples.LAYERS:
            for start, stop in samples.GROUPS:
                experts = samples.random_experts(samples.KINDS["ternary"], stack, layer, start, stop)
                writer.write_group(stack, layer, start, experts)
        writer.write_dense(samples.dense_tensors())
        writer.finish()
    reader = ArtifactReader.open(store)
    file = tokenizer_file(reader)
    assert file is not None
    assert file.read_bytes() == content
    store.delete("tokenizer.model")
    store.write("tokenizer.model", [b"another"])
    with pytest.raises(CheckpointError, match="is damaged") as caught:
        tokenizer_file(reader)
    assert caught.value.path == "memory://model/tokenizer.model"
