"""Experts and batches spread over eight devices: the same logits, losses and tokens as one device."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qmoe_jax as qj
from benchmarks.random_artifact import random_dense
from pallas_kernels import PackedMatrix, packed_mlp
from pallas_kernels.matmul.epilogue import ACTIVATIONS
from qmoe_jax.artifact import ArtifactWriter, Ternary, pack_matrix
from qmoe_jax.cli.models import load
from qmoe_jax.coding import tunstall_codebook
from qmoe_jax.distributed import AXIS, mesh_of, split_rows
from qmoe_jax.evaluation.throughput import Generator
from qmoe_jax.inference.placement import ShardedExperts, read_sharded_experts
from qmoe_jax.inference.placement.sharded import with_empty_expert
from qmoe_jax.inference.placement.shares import spread
from qmoe_jax.models.exchange import ExpertRanges
from qmoe_jax.models.experts import grouped_mlp
from qmoe_jax.parameters import expert_shapes
from tests.helpers import artifact_samples
from tests.helpers import packed_samples as samples
from tests.helpers.artifact_samples import KINDS, random_digits, random_levels
from tests.helpers.choices import TOLERANCE, assert_same_generation
from tests.helpers.cli_runs import qmoe
from tests.helpers.jax_settings import STRICT, every_setting

eight_devices = pytest.mark.devices
DEVICES = 8
EMBED, MLP = 24, 40
NEW_TOKENS = 8


CONFIG = dataclasses.replace(artifact_samples.CONFIG, num_encoder_layers=1, encoder_sparse_layers=(0,),
                             num_experts=10, gated=True, activation="gelu")  # fmt: skip
"""One layer per stack, both sparse; its experts do not divide evenly."""


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """An artifact of random weights."""
    root, codebook = tmp_path_factory.mktemp("mesh") / "artifact", tunstall_codebook()
    kind, rng = Ternary(codebook.name), np.random.default_rng(0)

    def matrix(shape):
        digits, levels = random_digits(kind, shape, rng), 0.3 * random_levels(kind, shape, rng)
        return pack_matrix(kind, digits, levels, {codebook.name: codebook})

    with ArtifactWriter(root, config=CONFIG, options={}, source={}, codebooks=[codebook]) as artifact:
        for stack in ("encoder", "decoder"):
            shapes = [expert_shapes(CONFIG)] * CONFIG.num_experts
            experts = [{name: matrix(shape) for name, shape in each.items()} for each in shapes]
            artifact.write_group(stack, 0, 0, experts)
        artifact.write_dense(random_dense(CONFIG))
        artifact.finish({"random": True})
    return root


@pytest.fixture(scope="module")
def packed(path):
    """(model, parameters on one device, parameters on eight)."""
    model, params = qj.load_compressed(path)
    return model, params, qj.load_compressed(path, mesh=qj.device_mesh())[1]


def tokens_of(rows):
    rng = np.random.default_rng(1)
    draw = lambda length: rng.integers(2, CONFIG.vocab_size, (rows, length), np.int32)
    return draw(12), draw(6)


@eight_devices
def test_every_device_holds_its_share_of_the_experts_and_all_else(packed):
    _, params, spread_params = packed
    layer = spread_params["encoder"]["layers_0"]["mlp"]["expert"]["placed"]
    whole = params["encoder"]["layers_0"]["mlp"]["expert"]
    ranges = ExpertRanges(CONFIG.num_experts, DEVICES)
    for found, expected in ((layer.wi[1], whole["wi_1"]["kernel"]), (layer.wo, whole["wo"]["kernel"])):
        for part in ("codes", "row_offsets", "levels"):
            shards = getattr(found, part).addressable_shards
            assert [shard.device.id for shard in shards] == list(range(DEVICES))
            for device, shard in enumerate(shards):
                held, empty = np.split(np.asarray(shard.data), [ranges.held])
                np.testing.assert_array_equal(held, getattr(expected, part)[ranges.experts(device)])
                assert empty.shape[0] == 1
                assert not empty.any()
    embedding = spread_params["token_embedder"]["embedding"].addressable_shards
    assert {(shard.device.id, shard.data.shape) for shard in embedding} == {
        (device, params["token_embedder"]["embedding"].shape) for device in range(DEVICES)
    }


@eight_devices
def test_tokens_are_exchanged_and_nothing_is_gathered(packed):
    model, _, params = packed
    lowered = jax.jit(model.apply).lower({"params": params}, *split_rows(qj.device_mesh(), *tokens_of(8)))
    assert "all_to_all" in lowered.as_text()
    compiled = lowered.compile()
    assert "all-to-all" in compiled.as_text()
    assert "all-gather" not in compiled.as_text()
    assert compiled.output_shardings.spec[0] == AXIS


@eight_devices
@pytest.mark.parametrize("open_as", [qj.load_compressed, qj.load_model], ids=["packed", "dense"])
def test_logits_equal_those_of_one_device(path, open_as, relative):
    """In a program of the caller's own, whose rows do not divide evenly."""
    model, params = open_as(path)
    _, spread_params = open_as(path, mesh=qj.device_mesh())
    encoder, decoder = tokens_of(5)
    expected = jax.jit(model.apply)({"params": params}, encoder, decoder)
    found = jax.jit(model.apply)({"params": spread_params}, encoder, decoder)
    assert relative(found, expected) <= TOLERANCE


@eight_devices
def test_losses_equal_those_of_one_device(packed):
    """Five examples are three rows short of the devices."""
    model, params, spread_params = packed
    examples = [(encoder, np.append(0, decoder)) for encoder, decoder in zip(*tokens_of(5), strict=True)]
    one, eight = (qj.evaluate(model, each, examples) for each in (params, spread_params))
    np.testing.assert_allclose(eight.per_example, one.per_example, atol=2e-4)
    assert (eight.tokens, eight.accuracy) == (one.tokens, one.accuracy)


@eight_devices
def test_generated_tokens_equal_those_of_one_device(packed):
    model, params, spread_params = packed
    encoder = tokens_of(5)[0]
    one, eight = (
        qj.generate(model, each, encoder, max_new_tokens=NEW_TOKENS) for each in (params, spread_params)
    )
    assert eight.shape == (5, NEW_TOKENS)
    assert_same_generation(model, params, encoder, eight, one)


@eight_devices
def test_sampled_tokens_do_not_depend_on_the_rows_that_fill_the_devices():
    logits = np.random.default_rng(1).standard_normal((8, 500), np.float32)
    draw = lambda rows: np.asarray(qj.Sampling(1.0).choose(logits[:rows], jax.random.key(0)))
    np.testing.assert_array_equal(draw(5), draw(8)[:5])


@eight_devices
def test_a_directory_of_upstream_is_spread(data):
    reader = qj.open_checkpoint(data / "upstream_ckpt_tiny_a")
    mesh, ranges = qj.device_mesh(3), ExpertRanges(reader.config.num_experts, 3)
    layers = dict(read_sharded_experts(reader, mesh, "float32", packed=True))
    assert len(layers) == 4
    expected = reader.packed("encoder/layers_1/mlp/expert/wo/kernel")
    for device, shard in enumerate(layers["encoder", 1].wo.codes.addressable_shards):
        np.testing.assert_array_equal(shard.data[:-1], expected.codes[ranges.experts(device)])


@eight_devices
def test_experts_that_do_not_run_packed_are_spread_dequantized(tmp_path):
    artifact_samples.write_artifact(tmp_path / "two-bit", KINDS["2 bits"])
    reader, ranges = qj.open_checkpoint(tmp_path / "two-bit"), ExpertRanges(5, DEVICES)
    layers = dict(read_sharded_experts(reader, qj.device_mesh(), "float32", packed=True))
    expected = reader.read("decoder/layers_0/mlp/expert/wo/kernel")
    for device, shard in enumerate(layers["decoder", 0].wo.addressable_shards):
        np.testing.assert_array_equal(shard.data, expected[ranges.experts(device)])


def layer_of(num_experts, *, gated, dense):
    """Return a layer's matrices and its output on one device, as a function of the tokens."""
    book, activation = samples.CODEBOOKS["tunstall-8"](), "gelu" if gated else "relu"
    shapes = [(num_experts, MLP, EMBED)] * (1 + gated) + [(num_experts, EMBED, MLP)]
    drawn = [samples.sample(book, shape, seed=seed) for seed, shape in enumerate(shapes)]
    if dense:
        *wi, wo = (jnp.asarray(each.weights.swapaxes(1, 2), jnp.float32) for each in drawn)
        run = lambda x, expert, scale: (
            grouped_mlp(x, expert, wi, wo, ACTIVATIONS[activation]) * scale[:, None]
        )
    else:
        *wi, wo = (each.packed for each in drawn)
        pair = tuple(wi) if gated else wi[0]
        run = functools.partial(packed_mlp, pair, wo, activation=activation)
    return tuple(wi), wo, activation, jax.jit(run)


def spread_layer(wi, wo, activation, num_experts):
    mesh, ranges = qj.device_mesh(), ExpertRanges(num_experts, DEVICES)
    named = {f"wi_{i}": matrix for i, matrix in enumerate(wi)} | {"wo": wo}
    share = lambda matrix, part: (
        with_empty_expert(matrix[part]) if isinstance(matrix, PackedMatrix) else matrix[part]
    )
    parts = map(ranges.experts, range(DEVICES))
    held = spread(mesh, ({name: share(matrix, part) for name, matrix in named.items()} for part in parts))
    wo = held.pop("wo")
    return ShardedExperts(tuple(held.values()), wo, mesh, activation)


@eight_devices
@pytest.mark.parametrize(
    ("num_experts", "gated", "dense"), [(3, True, False), (10, False, False), (10, True, True)]
)
def test_a_layer_gives_the_outputs_of_one_device(num_experts, gated, dense, relative):
    """Under random routing, and with all tokens for one expert, which take several turns."""
    *matrices, run = layer_of(num_experts, gated=gated, dense=dense)
    layer, rng = spread_layer(*matrices, num_experts), np.random.default_rng(0)
    apply = jax.jit(lambda layer, *tokens: layer(*tokens, num_experts=num_experts))
    x, scale = rng.standard_normal((401, EMBED), np.float32), rng.random(401, np.float32)
    for expert in (rng.integers(0, num_experts, 401), np.full(401, num_experts - 1)):
        tokens = x, expert.astype(np.int32), scale
        assert relative(apply(layer, *tokens), run(*tokens)) <= 1e-6


@eight_devices
@pytest.mark.parametrize("dense", [False, True], ids=["packed", "dense"])
def test_settings_of_the_caller_change_no_output(dense):
    *matrices, _ = layer_of(10, gated=False, dense=dense)
    layer, rng = spread_layer(*matrices, 10), np.random.default_rng(0)
    apply = lambda layer, *tokens: layer(*tokens, num_experts=10)
    x, scale = rng.standard_normal((401, EMBED), np.float32), rng.random(401, np.float32)
    tokens = x, rng.integers(0, 10, 401, np.int32), scale
    expected = jax.jit(apply)(layer, *tokens)
    with every_setting(STRICT):
        np.testing.assert_array_equal(jax.jit(apply)(layer, *tokens), expected)


@eight_devices
def test_packed_experts_have_the_same_bits_where_all_tokens_go_in_one_turn():
    *matrices, run = layer_of(16, gated=True, dense=False)
    layer, rng = spread_layer(*matrices, 16), np.random.default_rng(0)
    x, scale = rng.standard_normal((800, EMBED), np.float32), rng.random(800, np.float32)
    tokens = x, (np.arange(800) * 7 % 16).astype(np.int32), scale
    found = jax.jit(lambda layer, *tokens: layer(*tokens, num_experts=16))(layer, *tokens)
    np.testing.assert_array_equal(found, run(*tokens))


@eight_devices
def test_throughput_counts_the_rows_that_were_asked_for(packed):
    model, _, params = packed
    prompts = tokens_of(5)[0]
    found = Generator(model, params, prompts.shape, NEW_TOKENS, qj.Sampling()).measure(prompts)
    assert found.reading.tokens == prompts.size
    assert 5 <= found.writing.tokens <= 5 * NEW_TOKENS


@eight_devices
@pytest.mark.parametrize(("asked", "devices"), [(8, 8), (3, 3), (1, None), (None, None)])
def test_the_commands_take_one_device_of_a_cpu_unless_asked_for_more(path, asked, devices):
    _, params = load(qj.open_checkpoint(path), None, None, None, asked)
    mesh = mesh_of(params)
    assert (None if mesh is None else mesh.size) == devices


@pytest.mark.parametrize("experts", ["host", "disk"])
def test_a_mesh_is_refused_for_experts_that_are_not_on_the_device(path, experts):
    with pytest.raises(ValueError, match=f"expected 'device' or None with a mesh, found '{experts}'"):
        qj.load_compressed(path, experts=experts, mesh=qj.device_mesh())
    run = qmoe("bench", path, "--devices", 2, "--experts", experts)
    assert run.exit_code == 2
    assert "does not apply to experts" in run.stderr


def test_a_mesh_of_other_axes_is_refused(path):
    mesh = jax.make_mesh((1, 1), ("data", "model"))
    with pytest.raises(ValueError, match=r"expected the axis 'expert'.*found \('data', 'model'\)"):
        qj.load_compressed(path, mesh=mesh)


def test_more_devices_than_there_are_are_refused(path):
    with pytest.raises(ValueError, match=r"expected 1 to \d+, as many as jax sees, found 1000"):
        qj.device_mesh(1000)
    run = qmoe("bench", path, "--devices", 1000)
    assert run.exit_code == 1
    assert "found 1000" in run.stderr
