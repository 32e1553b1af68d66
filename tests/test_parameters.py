"""Parameter names are built and parsed in one place, and agree with the shapes of every published model."""

import pytest

from qmoe_jax import PRESETS
from qmoe_jax.checkpoints.architecture import expected_shapes
from qmoe_jax.parameters import (
    EMBEDDING,
    LOGITS,
    ExpertKernel,
    expert_kernels,
    expert_matrices,
    expert_shapes,
    input_matrices,
    is_expert,
    sparse_layers,
    split_matrices,
)

every_preset = pytest.mark.parametrize("config", PRESETS.values(), ids=PRESETS)


@every_preset
def test_expert_kernels_are_the_expert_parameters_of_the_model(config):
    shapes = expected_shapes(config)
    kernels = {kernel.path: kernel for kernel in expert_kernels(config)}
    assert kernels.keys() == set(filter(is_expert, shapes))
    for name, kernel in kernels.items():
        out, width = expert_shapes(config)[kernel.matrix]
        assert shapes[name] == (config.num_experts, width, out)
        assert ExpertKernel.parse(name) == kernel


@every_preset
def test_sparse_layers_are_read_off_the_names(config):
    for stack in ("encoder", "decoder"):
        assert sparse_layers(expected_shapes(config), stack) == config.sparse_layers(stack)


@every_preset
def test_embedding_and_logits_are_parameters(config):
    assert EMBEDDING in expected_shapes(config)
    assert (LOGITS in expected_shapes(config)) is not config.tied


def test_kernels_of_one_stack():
    config = PRESETS["switch-base-8"]
    assert {kernel.stack for kernel in expert_kernels(config, ["decoder"])} == {"decoder"}


@pytest.mark.parametrize(
    "name", ["encoder/layers_0/mlp/wi/kernel", "encoder/layers_0/mlp/expert/w/kernel", ""]
)
def test_a_name_that_is_not_an_expert_kernel_is_refused(name):
    with pytest.raises(ValueError, match=r"such as encoder/layers_0/mlp/expert/wi/kernel, found"):
        ExpertKernel.parse(name)


@pytest.mark.parametrize("name", ["switch-base-8", "switch-xxl-128"])
def test_input_matrices_come_before_the_output_matrix(name):
    config = PRESETS[name]
    wi, wo = split_matrices({matrix: matrix for matrix in reversed(expert_matrices(config))})
    assert (wi, wo) == (input_matrices(config), "wo")
