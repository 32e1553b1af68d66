"""Loss and accuracy against upstream's figures and against their definition."""

import json

import jax
import numpy as np
import pytest

import qmoe_jax as qj
from qmoe_jax.evaluation.loss import score


@pytest.fixture(scope="module")
def held_out(data):
    tokens = json.loads((data / "e2e_data.json").read_text())
    pairs = list(zip(tokens["encoder"], tokens["decoder"], strict=True))[16:]
    return [(np.array(encoder, np.int32), np.array(decoder, np.int32)) for encoder, decoder in pairs]


@pytest.fixture(scope="module")
def tiny(data):
    return qj.load_model(data / "hf_tiny_a")


def test_losses_of_the_dense_model_match_upstream(data, tiny, held_out):
    run = json.loads((data / "e2e_tiny_a.json").read_text())["runs"]["base16"]
    result = qj.evaluate(*tiny, held_out)
    np.testing.assert_allclose(result.per_example, run["per_sample_val_loss"], atol=2e-4)
    assert result.loss == pytest.approx(run["val_loss_token_avg"], abs=1e-4)
    assert result.tokens == sum(length - 1 for length in run["decoder_lens"])
    assert result.perplexity == pytest.approx(np.exp(result.loss))


def test_evaluation_compiles_once_for_all_batches(tiny, held_out):
    score.clear_cache()
    qj.evaluate(*tiny, held_out, batch_size=3)
    assert score._cache_size() == 1


def test_batch_size_does_not_change_the_evaluation(tiny, held_out):
    one, many = (qj.evaluate(*tiny, held_out[:5], batch_size=size) for size in (1, 5))
    np.testing.assert_allclose(one.per_example, many.per_example, atol=2e-4)
    assert one.accuracy == many.accuracy


def test_accuracy_counts_the_most_likely_tokens(tiny, held_out):
    model, params = tiny
    encoder, decoder = held_out[0]
    logits = jax.jit(model.apply)({"params": params}, encoder[None], decoder[None])[0, :-1]
    expected = np.mean(np.argmax(logits, -1) == decoder[1:])
    assert qj.evaluate(model, params, held_out[:1]).accuracy == pytest.approx(float(expected))
    log_p = jax.nn.log_softmax(logits)[np.arange(len(decoder) - 1), decoder[1:]]
    assert qj.evaluate(model, params, held_out[:1]).loss == pytest.approx(-float(log_p.mean()), abs=1e-4)


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([], "no examples"),
        ([(np.array([5]), np.array([0]))], "example 0, decoder: expected at least 2 ids, found 1"),
        ([(np.array([512]), np.array([0, 1]))], "example 0, encoder: expected ids of 0 to 511"),
    ],
)
def test_examples_that_cannot_be_evaluated_are_refused(tiny, examples, message):
    with pytest.raises(ValueError, match=message):
        qj.evaluate(*tiny, examples)


def test_evaluation_reports_progress_in_examples(tiny, held_out):
    calls = []
    qj.evaluate(*tiny, held_out[:5], batch_size=3, progress=lambda *call: calls.append(call))
    assert calls == [(0, 5, ""), (3, 5, ""), (5, 5, "")]
