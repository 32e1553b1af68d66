"""Reading of an artifact: as a checkpoint, as packed matrices, expert by expert."""

import pathlib
from collections.abc import Callable

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from qmoe_jax.artifact import ArtifactReader, Kind, dequantize, measure
from qmoe_jax.checkpoints.reader import Checkpoint
from qmoe_jax.coding import EncodedRows, decode
from qmoe_jax.files.errors import CheckpointError
from tests.helpers import artifact_samples as samples

WI, WO = (f"encoder/layers_1/mlp/expert/{matrix}/kernel" for matrix in ("wi", "wo"))
ArtifactOf = Callable[[Kind], pathlib.Path]
every_kind = pytest.mark.parametrize("kind", samples.KINDS.values(), ids=samples.KINDS)


def experts_of(kind: Kind) -> list:
    return [
        expert
        for start, stop in samples.GROUPS
        for expert in samples.random_experts(kind, "encoder", 1, start, stop)
    ]


@every_kind
def test_expert_kernels_are_dequantized_as_they_are_read(artifact_of: ArtifactOf, kind: Kind) -> None:
    reader = ArtifactReader.open(artifact_of(kind))
    for name, matrix in ((WI, "wi"), (WO, "wo")):
        expected = np.stack([dequantize(expert[matrix], samples.CODEBOOKS).T for expert in experts_of(kind)])
        assert reader.kind(name) == kind
        assert (reader.shape(name), reader.dtype(name)) == (expected.shape, np.float32)
        np.testing.assert_array_equal(reader.read(name), expected)
        np.testing.assert_array_equal(reader.read(name, slice(1, 4)), expected[1:4])
        assert reader.read(name, slice(4, 4)).shape == (0, *expected.shape[1:])


def test_an_artifact_reads_like_any_checkpoint(whole: pathlib.Path) -> None:
    reader = ArtifactReader.open(whole)
    assert isinstance(reader, Checkpoint)
    assert reader.format == "qmoe"
    assert reader.config == samples.CONFIG
    assert reader.names() == sorted(
        [
            f"{stack}/layers_{layer}/mlp/expert/{m}/kernel"
            for stack, layer in samples.LAYERS
            for m in ("wi", "wo")
        ]
        + ["token_embedder/embedding", "encoder/encoder_norm/scale", "decoder/decoder_norm/scale"]
    )
    embedding = samples.dense_tree()["token_embedder"]["embedding"]
    assert reader.dtype("token_embedder/embedding") == embedding.dtype
    np.testing.assert_array_equal(reader.read("token_embedder/embedding"), embedding)
    assert all(shard.problem is None for shard in reader.shards())
    for name in (WI, "token_embedder/embedding"):  # what is read belongs to the caller
        before = reader.read(name)
        reader.read(name)[:] = 0
        np.testing.assert_array_equal(reader.read(name), before)
    with pytest.raises(CheckpointError, match="no such parameter"):
        reader.read("encoder/layers_7/mlp/wi/kernel")


@pytest.mark.parametrize("name", ["ternary", "ternary, 16-bit codes"])
def test_packed_matrices_decode_to_the_dequantized_weights(artifact_of: ArtifactOf, name: str) -> None:
    kind = samples.KINDS[name]
    reader = ArtifactReader.open(artifact_of(kind))
    packed, codebook = reader.packed(WI, slice(1, 5)), reader.codebooks[kind.codebook]
    packed.validate()
    assert (packed.num_experts, packed.rows, packed.width) == (4, samples.CONFIG.d_ff, samples.CONFIG.d_model)
    for index, expected in enumerate(reader.read(WI, slice(1, 5))):
        offsets = np.asarray(packed.row_offsets[index])
        digits = np.asarray(
            decode(
                EncodedRows(np.asarray(packed.codes[index])[: offsets[-1]], offsets), codebook, packed.width
            )
        )
        table = np.pad(np.asarray(packed.levels[index], np.float32), ((0, 0), (1, 0)))
        weights = np.take_along_axis(table, digits.astype(np.intp), 1)
        np.testing.assert_array_equal(weights.T, expected)


@pytest.mark.parametrize("name", ["ternary, groups", "2 bits"])
def test_kernels_that_cannot_run_packed_are_refused(artifact_of: ArtifactOf, name: str) -> None:
    with pytest.raises(ValueError, match="expected ternary weights with levels per row"):
        ArtifactReader.open(artifact_of(samples.KINDS[name])).packed(WI)


def test_the_extent_of_an_expert_has_all_of_its_bytes(whole: pathlib.Path) -> None:
    reader = ArtifactReader.open(whole)
    for expert in range(samples.CONFIG.num_experts):
        extent = reader.expert_extent("encoder", 1, expert)
        data = extent.path.read_bytes()[extent.offset : extent.offset + extent.nbytes]
        matrices = extent.parse(data)
        weights = dequantize(matrices["wo"], reader.codebooks).T
        np.testing.assert_array_equal(weights, reader.read(WO, slice(expert, expert + 1))[0])
    with pytest.raises(IndexError, match="no expert 5: the layer has 5"):
        reader.expert_extent("encoder", 1, 5)
    with pytest.raises(KeyError):
        reader.expert_extent("encoder", 0, 0)


def test_orbax_reads_the_dense_parameters(whole: pathlib.Path) -> None:
    with ocp.StandardCheckpointer() as checkpointer:
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), samples.dense_tree())
        found = checkpointer.restore((whole / "dense").absolute(), target)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), y), found, samples.dense_tree())


def test_an_uncompressed_layer_is_stored_with_the_dense_parameters(tmp_path: pathlib.Path) -> None:
    kind, rng = samples.KINDS["ternary"], np.random.default_rng(0)
    kernels = {
        matrix: {"kernel": rng.standard_normal((5, width, out), np.float32)}
        for matrix, (out, width) in samples.expert_shapes(samples.CONFIG).items()
    }
    tree = samples.dense_tree()
    tree["decoder"]["layers_0"] = {"mlp": {"expert": kernels}}
    with samples.writer(tmp_path, kind, skip="decoder") as artifact:
        for start, stop in samples.GROUPS:
            artifact.write_group("encoder", 1, start, samples.random_experts(kind, "encoder", 1, start, stop))
        artifact.write_dense(samples.tensors(tree))
        artifact.finish()
    reader = ArtifactReader.open(tmp_path)
    name = "decoder/layers_0/mlp/expert/wo/kernel"
    assert reader.kind(name) is None
    np.testing.assert_array_equal(reader.read(name, slice(2, 4)), kernels["wo"]["kernel"][2:4])
    sizes = measure(tmp_path)
    assert sizes.expert_parameters == 5 * 2 * 20 * 36
    assert sizes.other_parameters == 5 * 2 * 20 * 36 + 64 * 20 + 2 * 20


def test_a_missing_dense_file_is_an_error_that_names_the_parameter(tmp_path: pathlib.Path) -> None:
    samples.write_artifact(tmp_path)
    largest = max((tmp_path / "dense").rglob("d/*"), key=lambda file: file.stat().st_size)
    largest.unlink()
    with pytest.raises(CheckpointError, match="token_embedder/embedding"):
        ArtifactReader.open(tmp_path).read("token_embedder/embedding")


def test_damaged_codes_are_an_error_that_names_the_expert(tmp_path: pathlib.Path) -> None:
    samples.write_artifact(tmp_path)
    extent = ArtifactReader.open(tmp_path).expert_extent("encoder", 1, 3)
    broken = bytearray(extent.path.read_bytes())
    codes = slice(extent.offset + extent.nbytes - 60, extent.offset + extent.nbytes - 40)
    broken[codes] = b"\xff" * 20
    extent.path.write_bytes(broken)
    with pytest.raises(CheckpointError, match="expert 3, wo"):
        ArtifactReader.open(tmp_path).read(WO)


def test_sizes_count_every_byte_of_an_artifact(whole: pathlib.Path) -> None:
    sizes = measure(whole)
    files = {
        file.relative_to(whole).as_posix(): file.stat().st_size
        for file in whole.rglob("[!.]*")
        if file.is_file()
    }
    assert sizes.total_bytes == sum(files.values()) - files["report.json"]
    experts = sum(size for name, size in files.items() if name.startswith("experts/"))
    assert sizes.expert_bytes == experts + files["codebooks.safetensors"]
    assert sizes.expert_parts["levels"] == 2 * 5 * (20 + 36) * 2 * 2
    assert sizes.expert_parameters == samples.CONFIG.expert_parameters
    assert sizes.bits_per_expert_parameter == 8 * sizes.expert_bytes / samples.CONFIG.expert_parameters
    assert sizes.compression_ratio == pytest.approx(16 / sizes.bits_per_parameter)
