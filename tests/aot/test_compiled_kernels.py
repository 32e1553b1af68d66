"""XLA compiles every kernel for an H100 and an A100 without either: no spills, within the budgets."""

import json

import pytest

from tests.aot import compiler

# Per thread. A multiprocessor has 65,536: enough for 28 warps that gather. The sums of tensor cores may take
# all the registers that a thread can have, which leaves room for 8 warps.
REGISTERS = {
    "packed_matmul_separate": 64,
    "unpack": 64,
    "packed_matmul_gather": 72,
    "packed_matmul_tensor_core": 255,
}
COMPRESSION_REGISTERS = 96
INSTRUCTIONS = {
    "packed_matmul_separate": 200,
    "unpack": 165,
    "packed_matmul_gather": 35,
}  # of a warp, per 1,000 weights and token
COUNTED = "sm_90/tunstall-8/c-2048/bfloat16"
SHARED_BYTES = 48 << 10  # what a block may use without requesting more

if reason := compiler.refusal():
    pytest.skip(reason, allow_module_level=True)


@pytest.fixture(scope="module")
def compiled():
    """Everything, compiled in one process that has the compiler's plugin on its path."""
    return json.loads(compiler.run_module("tests.aot.programs", COUNTED))


def test_every_op_has_its_kernels(compiled):
    for row in compiled["rows"]:
        assert len(row["kernels"]) == (2 if row["op"] == "mlp" else 1), row


def test_no_kernel_spills_registers(compiled):
    for row in compiled["rows"]:
        assert [kernel["stack_bytes"] for kernel in row["kernels"]] == [0] * len(row["kernels"]), row


def test_registers_stay_under_the_ceiling(compiled):
    for row in compiled["rows"]:
        for kernel in row["kernels"]:
            assert kernel["registers"] <= REGISTERS[kernel["name"].split("__")[0]], row


def test_shared_memory_stays_within_the_budget(compiled):
    for row in compiled["rows"]:
        assert max(kernel["shared_bytes"] for kernel in row["kernels"]) <= SHARED_BYTES, row


def test_instructions_per_weight_stay_under_the_ceiling(compiled):
    kernels = [
        kernel for row in compiled["rows"] for kernel in row["kernels"] if "per_1000_weights" in kernel
    ]
    assert {kernel["name"].split("__")[0] for kernel in kernels} == INSTRUCTIONS.keys()
    for kernel in kernels:
        assert 0 < kernel["per_1000_weights"] <= INSTRUCTIONS[kernel["name"].split("__")[0]], kernel


@pytest.mark.parametrize(
    ("op", "kernels"),
    [("quantize_block", {"quantize_block"}), ("encode_rows", {"encode_rows_count", "encode_rows_write"})],
)
def test_kernels_of_compression_spill_no_registers(compiled, op, kernels):
    found = {kernel["name"]: kernel for kernel in compiled["compression"][op]}  # XLA's own fusions among them
    assert kernels <= found.keys()
    for name in kernels:
        assert found[name]["stack_bytes"] == 0
        assert found[name]["registers"] <= COMPRESSION_REGISTERS


def test_a_kernel_that_spills_registers_is_detected(compiled):
    (kernel,) = compiled["spilling"]
    assert kernel["stack_bytes"] > 0
    assert kernel["registers"] == 255


def test_a_kernel_that_needs_too_much_shared_memory_is_detected(compiled):
    assert "Shared memory size limit exceeded" in compiled["overflowing"]


def test_the_whole_model_compiles_with_packed_experts(compiled):
    for part in ("encoder", "decoder_step"):
        kernels = compiled["model"][part]
        assert sum(kernel.startswith("packed_") for kernel in kernels) == 2, kernels


def test_jax_triton_is_compiled_or_the_reason_is_given(compiled):
    if compiled["jax_triton"] != "compiled":
        pytest.skip(compiled["jax_triton"])
    found = {(row["op"], row["gpu"]) for row in compiled["rows"] if row["backend"] == "jax_triton"}
    assert found == {("matmul", gpu) for gpu in compiler.GPUS}
