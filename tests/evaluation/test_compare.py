"""Comparison of two models: zeros where they are equal, else the figures of NumPy and `evaluate`."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import qmoe_jax as qj
from qmoe_jax.checkpoints.params import read_params
from qmoe_jax.data import batches
from qmoe_jax.files.tensor import in_memory
from qmoe_jax.parameters import is_expert

LOGITS = "decoder/logits_dense/kernel"
EMBEDDING = "token_embedder/embedding"


def draw_examples(vocabulary, count=6, seed=0):
    """Of 20 to 50 tokens, so that a step compiles for one shape."""
    drawn = np.random.default_rng(seed)
    row = lambda: drawn.integers(2, vocabulary, drawn.integers(20, 50)).astype(np.int32)
    return [(row(), np.append(np.int32(0), row())) for _ in range(count)]


def replace(reader, **arrays):
    """The checkpoint with other values of some tensors."""
    tensors = {name: in_memory(np.asarray(array)) for name, array in arrays.items()}
    return dataclasses.replace(reader, tensors={**reader.tensors, **tensors})


def relative_error(w, q):
    w, q = np.asarray(w, np.float64), np.asarray(q, np.float64)
    return np.linalg.norm(q - w) / np.linalg.norm(w)


@pytest.fixture(scope="module")
def tiny(data):
    return qj.open_checkpoint(data / "hf_tiny_a")


@pytest.fixture(scope="module")
def examples():
    return draw_examples(512)


@pytest.fixture(scope="module")
def perturbed(tiny):
    """The tiny model with noise in one tensor, and that tensor."""
    name = "decoder/layers_2/mlp/wi/kernel"
    kernel = tiny.read(name)
    noise = np.random.default_rng(1).standard_normal(kernel.shape).astype(np.float32)
    return replace(tiny, **{name: kernel + 0.3 * kernel.std() * noise}), name


@pytest.fixture(scope="module")
def models(tiny, perturbed):
    """The module, and the parameters of the tiny model and of the perturbed one."""
    model, params = qj.load_model(tiny.path)
    return model, params, read_params(perturbed[0])


@pytest.fixture(scope="module")
def comparison(tiny, perturbed, examples):
    return qj.compare(tiny, perturbed[0], examples)


@pytest.mark.parametrize("original", ["switch_base_tiny_f32", "switch_c_tiny_f32"], ids=["tied", "untied"])
def test_a_converted_copy_has_no_differences(data, tmp_path, original):
    reader = qj.open_checkpoint(data / "t5x" / original)
    copy = qj.convert(reader, tmp_path / "copy", "huggingface")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    samples, half = draw_examples(reader.config.vocab_size), reader.config.num_experts // 2
    # T5X's chunks span all experts: half of them at a time come through files
    result = qj.compare(data / "t5x" / original, copy, samples, experts_per_read=half, scratch=scratch)
    assert list(scratch.iterdir()) == []
    assert set(result.weight_errors) == set(reader.names())
    assert set(result.weight_errors.values()) == {0.0}
    assert [layer.cosine for layer in result.layers] == [1.0] * len(result.layers)
    assert {layer.router_agreement for layer in result.layers} <= {1.0, None}
    assert (result.next_token_agreement, result.kl_divergence) == (1.0, 0.0)
    assert result.original_loss == result.compressed_loss
    assert result.notes == ()


def test_compared_losses_are_those_of_evaluate(models, examples, comparison):
    model, *both = models
    original, compressed = (qj.evaluate(model, params, examples) for params in both)
    assert comparison.original_loss == pytest.approx(original.loss, abs=1e-5)
    assert comparison.compressed_loss == pytest.approx(compressed.loss, abs=1e-5)
    assert (comparison.tokens, comparison.examples) == (original.tokens, len(examples))


def test_compared_predictions_are_those_of_the_logits(models, examples, comparison):
    model, *both = models
    batch = next(batches(examples, len(examples), 0))
    real = np.arange(batch.decoder.shape[1]) < batch.lengths[:, None] - 1
    apply = jax.jit(model.apply)
    logits = (apply({"params": params}, batch.encoder, batch.decoder) for params in both)
    a, b = (np.asarray(x, np.float64)[real] for x in logits)
    log_a, log_b = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (a, b))
    divergence = (np.exp(log_a) * (log_a - log_b)).sum(-1).mean()
    assert comparison.kl_divergence == pytest.approx(divergence, rel=1e-3)
    assert comparison.next_token_agreement == pytest.approx(np.mean(a.argmax(-1) == b.argmax(-1)), abs=1e-9)


def test_only_layers_after_a_changed_tensor_differ(tiny, perturbed, comparison):
    changed = perturbed[1]
    errors = dict(comparison.weight_errors)
    expected = relative_error(tiny.read(changed), perturbed[0].read(changed))
    assert errors.pop(changed) == pytest.approx(expected, rel=1e-5)
    assert set(errors.values()) == {0.0}
    cosines = {(layer.stack, layer.layer): layer.cosine for layer in comparison.layers}
    after = {("decoder", 2), ("decoder", 3)}
    assert all(cosine == 1.0 for place, cosine in cosines.items() if place not in after)
    assert all(0.5 < cosines[place] < 0.9999 for place in after)
    agreements = {
        (layer.stack, layer.layer): layer.router_agreement
        for layer in comparison.layers
        if layer.router_agreement is not None
    }
    assert agreements.keys() == {(stack, layer) for stack in ("encoder", "decoder") for layer in (1, 3)}
    assert agreements.pop(("decoder", 3)) < 1.0
    assert set(agreements.values()) == {1.0}


def test_encoder_padding_does_not_change_a_comparison(tiny, perturbed, examples, comparison):
    padded = [(np.append(encoder, np.zeros(9, np.int32)), decoder) for encoder, decoder in examples]
    result = qj.compare(tiny, perturbed[0], padded)
    assert result.compressed_loss == pytest.approx(comparison.compressed_loss, abs=1e-5)
    assert result.kl_divergence == pytest.approx(comparison.kl_divergence, rel=1e-3)
    for found, expected in zip(result.layers, comparison.layers, strict=True):
        assert found.cosine == pytest.approx(expected.cosine, abs=1e-5)
        assert found.router_agreement == expected.router_agreement


def test_renumbered_experts_change_router_choices_but_not_the_model(tiny, examples):
    layer, order = "encoder/layers_1/mlp", np.roll(np.arange(8), 1)
    router = f"{layer}/router/router_weights/w/kernel"
    renumbered = replace(
        tiny,
        **{router: tiny.read(router)[:, order]},
        **{
            f"{layer}/expert/{matrix}/kernel": tiny.read(f"{layer}/expert/{matrix}/kernel")[order]
            for matrix in ("wi", "wo")
        },
    )
    result = qj.compare(tiny, renumbered, examples)
    assert next(found.router_agreement for found in result.layers if found.layer == 1) == 0.0
    assert min(found.cosine for found in result.layers) > 0.99999
    assert result.compressed_loss == pytest.approx(result.original_loss, abs=1e-5)


def test_weight_errors_of_an_artifact_are_those_of_its_decoded_weights(tiny, examples, tmp_path):
    config = qj.CompressionConfig(method="nearest", sentinel_start=480)
    qj.compress(tiny.path, tmp_path / "artifact", draw_examples(480, seed=2), config)
    result = qj.compare(tiny.path, tmp_path / "artifact", examples, experts_per_read=4)
    reader = qj.open_checkpoint(tmp_path / "artifact")
    for name, error in result.weight_errors.items():
        expected = relative_error(tiny.read(name), reader.read(name))
        assert error == pytest.approx(expected, rel=1e-5, abs=0)
        assert (error > 0.1) == is_expert(name)
    model, params = qj.load_model(tmp_path / "artifact")
    assert result.compressed_loss == pytest.approx(qj.evaluate(model, params, examples).loss, abs=1e-5)
    fields = json.loads(json.dumps(result.to_json()))
    assert fields["layers"][1] == dataclasses.asdict(result.layers[1])


def test_an_untied_output_projection_is_compared_with_the_embedding(tiny, data, examples, comparison):
    """Upstream's directories keep a tied model's head in bfloat16 beside an embedding in float32."""
    result = qj.compare(tiny, data / "upstream_ckpt_tiny_a", examples)
    assert result.weight_errors[EMBEDDING] == 0.0
    upstream = qj.open_checkpoint(data / "upstream_ckpt_tiny_a")
    scaled = tiny.read(EMBEDDING).T * tiny.config.d_model**-0.5
    assert result.weight_errors[LOGITS] == pytest.approx(
        relative_error(scaled, upstream.read(LOGITS)), rel=1e-5
    )
    assert any("head is tied" in note for note in result.notes)
    assert result.original_loss == pytest.approx(comparison.original_loss, abs=1e-5)


def test_differences_between_configurations_are_noted(tiny, examples):
    other = dataclasses.replace(tiny, config=dataclasses.replace(tiny.config, layer_norm_epsilon=1e-2))
    result = qj.compare(tiny, other, examples)
    assert result.notes == (
        "layer_norm_epsilon is 1e-06 in the original, 0.01 in the compressed: each is run as it is",
    )
    assert set(result.weight_errors.values()) == {0.0}
    assert result.kl_divergence > 0


def test_models_with_different_tensors_are_refused_by_name(tiny, data, examples):
    name = "encoder/layers_0/mlp/wi/kernel"
    tensors = {key: tensor for key, tensor in tiny.tensors.items() if key != name}
    lacking = dataclasses.replace(tiny, path="lacking", tensors=tensors)
    for pair in ((tiny, lacking), (lacking, tiny)):
        with pytest.raises(qj.CheckpointError, match=rf"lacking: .*missing(.|\n)*{name}"):
            qj.compare(*pair, examples)
    with pytest.raises(
        qj.CheckpointError, match=rf"key: {name}\n  expected: \(64, 128\)\n  found: \(64, 127\)"
    ):
        qj.compare(tiny, replace(tiny, **{name: tiny.read(name)[:, 1:]}), examples)
    with pytest.raises(ValueError, match="example 0, decoder: expected ids of 0 to 511, found 0 to 512"):
        qj.compare(tiny, tiny, [(np.array([3]), np.array([0, 512]))])


@dataclasses.dataclass(frozen=True)
class Counted:
    """A tensor that keeps a record of what is read of it."""

    tensor: object
    name: str
    reads: list

    @property
    def shape(self):
        return self.tensor.shape

    @property
    def dtype(self):
        return self.tensor.dtype

    def read(self, rows):
        self.reads.append((self.name, rows.start, rows.stop))
        return self.tensor.read(rows)


def test_a_comparison_reads_a_layer_at_a_time_and_ranges_of_experts(tiny, examples, tmp_path):
    reads = []
    counted = {name: Counted(tensor, name, reads) for name, tensor in tiny.tensors.items()}
    original = dataclasses.replace(tiny, tensors=counted)
    qj.compare(original, tiny, examples, experts_per_read=4, scratch=tmp_path)
    assert list(tmp_path.iterdir()) == []
    ranges = {name: [(a, b) for key, a, b in reads if key == name] for name in tiny.names()}
    for name, found in ranges.items():
        if is_expert(name):
            assert found == [(0, 4), (4, 8)]
        else:  # the head is read where it is used
            assert len(found) == (2 if name == EMBEDDING else 1), name
    layers = [name.split("/mlp/expert/")[0].split("/")[:2] for name, *_ in reads if "/layers_" in name]
    entered = [layer for i, layer in enumerate(layers) if i == 0 or layer != layers[i - 1]]
    assert entered == [[stack, f"layers_{i}"] for stack in ("encoder", "decoder") for i in range(4)]


def test_comparing_reports_progress_layer_by_layer(tiny, examples):
    calls = []
    qj.compare(tiny, tiny, examples, progress=lambda *call: calls.append(call))
    done, totals, labels = zip(*calls, strict=True)
    assert set(totals) == {4 * 8 + 4}  # experts of four sparse layers, four dense layers
    assert (done[0], done[-1]) == (0, 36)
    assert list(done) == sorted(done)
    assert list(dict.fromkeys(labels))[6] == "decoder layer 1"


def test_a_comparison_in_bfloat16_is_close_to_float32(tiny, examples, comparison):
    result = qj.compare(tiny, tiny, examples, dtype="bfloat16")
    assert (result.kl_divergence, result.next_token_agreement) == (0.0, 1.0)
    # a random model's routers turn rounding into other choices
    assert result.original_loss == pytest.approx(comparison.original_loss, abs=0.1)
    assert result.original_loss != comparison.original_loss
