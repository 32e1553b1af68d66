"""A layer spread over eight H100s compiles without them: its own kernels between two exchanges."""

import json

import pytest

from tests.aot import compiler

if reason := compiler.refusal():
    pytest.skip(reason, allow_module_level=True)


@pytest.fixture(scope="module")
def compiled():
    return json.loads(compiler.run_module("tests.aot.spread_layer"))


@pytest.mark.parametrize("load", ["generation", "prompts"])
def test_tokens_are_exchanged_around_the_kernels(compiled, load):
    assert len(compiled[load]["kernels"]) == 1
    assert compiled[load]["exchanges"] == 4  # tokens, their experts and scales; and the outputs
    assert compiled[load]["gathers"] == 0


def test_a_device_holds_an_eighth_of_the_layer(compiled):
    eighth = compiled["generation"]["whole_bytes"] / 8
    assert compiled["generation"]["argument_bytes"] == pytest.approx(eighth, rel=0.05)


def test_a_step_of_generation_takes_one_turn(compiled):
    """Prompts take as many as the devices agree on, which the host waits for."""
    assert [compiled[load]["agreements"] for load in ("generation", "prompts")] == [0, 1]
