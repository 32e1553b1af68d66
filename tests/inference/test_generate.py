"""Generation against Hugging Face's own, token for token, and sampling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qmoe_jax as qj
from qmoe_jax.inference.generate import written_lengths
from tests.helpers.choices import assert_same_generation


@pytest.fixture(scope="module")
def tied(data):
    return qj.load_model(data / "hf_tiny_a"), np.load(data / "hf_tiny_a" / "refs_transformers_5.23.0.npz")


@pytest.mark.parametrize("key", ["in0", "in1"])
def test_greedy_generation_equals_hugging_face(tied, key):
    (model, params), golden = tied
    expected = golden[f"{key}.generate16"][:, 1:]
    found = qj.generate(model, params, golden[f"{key}.input_ids"], max_new_tokens=16)
    found = np.asarray(found)[:, : expected.shape[1]]
    assert_same_generation(model, params, golden[f"{key}.input_ids"], found, expected)


def test_an_untied_model_generates_as_hugging_face(data):
    model, params = qj.load_model(data / "hf_tiny_fullsparse")
    golden = np.load(data / "hf_tiny_fullsparse" / "refs_transformers_5.23.0.npz")
    found = qj.generate(model, params, golden["in0.input_ids"], max_new_tokens=16)
    assert_same_generation(model, params, golden["in0.input_ids"], found, golden["in0.generate16"][:, 1:])


def test_rows_of_a_padded_batch_do_not_see_each_other(tied):
    (model, params), golden = tied
    rows = [golden[f"in{i}.input_ids"][0] for i in (0, 1)]
    length = max(map(len, rows))
    batch = np.stack([np.pad(row, (0, length - len(row))) for row in rows])
    together = np.asarray(qj.generate(model, params, batch, max_new_tokens=8))
    for i, row in enumerate(rows):
        alone = qj.generate(model, params, row[None], max_new_tokens=8)
        assert_same_generation(model, params, row[None], together[i : i + 1], alone)


def test_padding_follows_the_end_token(tied):
    (model, params), golden = tied
    forced = {**params, "decoder": {**params["decoder"], "decoder_norm": {"scale": jnp.zeros(64)}}}
    tokens = golden["in0.input_ids"]  # zero logits everywhere: token 0, which ends nothing
    assert (np.asarray(qj.generate(model, forced, tokens, max_new_tokens=4)) == 0).all()
    draws = np.asarray(
        qj.generate(model, forced, np.repeat(tokens, 64, 0), max_new_tokens=64, sampling=qj.Sampling(1.0))
    )  # all 512 tokens evenly
    assert (draws == 1).any(), "64 rows of 64 draws should meet the end token"
    for row in draws:
        ends = np.flatnonzero(row == 1)
        assert ends.size <= 1
        assert (row[ends[0] + 1 :] == 0).all() if ends.size else True


def test_written_tokens_are_counted_up_to_the_end_token():
    rows = np.array([[7, 0, 4, 3], [4, 3, 3, 3], [0, 3, 0, 7]])
    assert written_lengths(rows, eos_id=4).tolist() == [3, 1, 4]


@pytest.mark.parametrize(
    ("sampling", "allowed"),
    [
        (qj.Sampling(1.0), {0, 1, 2, 3}),
        (qj.Sampling(1.0, top_k=2), {2, 3}),
        (qj.Sampling(1.0, top_p=0.5), {3}),
        (qj.Sampling(1.0, top_p=0.9), {2, 3}),
        (qj.Sampling(0.0), {3}),
    ],
)
def test_sampling_draws_only_allowed_tokens(sampling, allowed):
    logits = jnp.log(jnp.tile(jnp.array([0.03, 0.05, 0.3, 0.62]), (400, 1)))
    drawn = np.asarray(sampling.choose(logits, jax.random.key(0)))
    assert set(drawn.tolist()) == allowed


@pytest.mark.parametrize("options", [{"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_sampling_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        qj.Sampling(**options)


def test_generating_zero_tokens_is_refused(tied):
    (model, params), golden = tied
    with pytest.raises(ValueError, match="max_new_tokens"):
        qj.generate(model, params, golden["in0.input_ids"], max_new_tokens=0)
