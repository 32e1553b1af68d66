"""A model computes the same whatever its caller has set in jax, by our functions and in the caller's own."""

import jax
import numpy as np
import pytest

import qmoe_jax as qj
from tests.helpers.jax_settings import STRICT, every_setting

SAMPLED = qj.Sampling(temperature=1.0, top_k=5, top_p=0.9)
PLACEMENTS = ("device", "host")


def test_settings_of_the_caller_change_no_token_and_no_loss(artifact):
    path, examples = artifact
    encoder = np.stack([encoder for encoder, _ in examples])

    def run():
        model, params = qj.load_compressed(path, experts="host")
        tokens = qj.generate(model, params, encoder, max_new_tokens=4, sampling=SAMPLED)
        return np.asarray(tokens).tolist(), qj.evaluate(model, params, examples).per_example.tolist()

    expected = run()
    with every_setting():
        assert run() == expected


@pytest.mark.parametrize("experts", PLACEMENTS)
def test_a_callers_own_program_gives_the_same_logits(artifact, experts):
    path, examples = artifact
    encoder, decoder = (np.stack(part) for part in zip(*examples, strict=True))
    model, params = qj.load_compressed(path, experts=experts)
    run = jax.jit(lambda params, *tokens: model.apply({"params": params}, *tokens))
    expected = run(params, encoder, decoder)
    with every_setting(STRICT):
        found = run(params, encoder, decoder)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected)
