"""XLA's own compiler makes every kernel for an H100 and an A100, on a machine without one: no spills, within budget."""

import json
import pathlib
import subprocess
import sys

import deviceless
import gpu_compile
import pytest

# A thread's. A multiprocessor has 65,536: room for 28 warps that gather. Tensor cores' sums may take all that a thread
# can have, which leaves room for 8 warps.
REGISTERS = {
    "packed_matmul_separate": 64,
    "unpack": 64,
    "packed_matmul_gather": 72,
    "packed_matmul_tensor_core": 255,
}
COMPRESSION_REGISTERS = 96
SHARED_BYTES = 48 << 10  # a program's, without asking for more

if reason := deviceless.refusal():
    pytest.skip(reason, allow_module_level=True)


@pytest.fixture(scope="module")
def made():
    """Everything, compiled in one process that has the compiler's plugin on its path."""
    folders = [str(pathlib.Path(module.__file__).parent) for module in (gpu_compile, sys.modules[__name__])]
    environment = deviceless.environment()
    environment["PYTHONPATH"] += "".join(f":{folder}" for folder in folders)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.helpers.deviceless_programs"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_every_op_has_its_kernels(made):
    for row in made["rows"]:
        assert len(row["kernels"]) == (2 if row["op"] == "mlp" else 1), row


def test_nothing_spills(made):
    for row in made["rows"]:
        assert [kernel["stack_bytes"] for kernel in row["kernels"]] == [0] * len(row["kernels"]), row


def test_registers_stay_under_the_ceiling(made):
    for row in made["rows"]:
        for kernel in row["kernels"]:
            assert kernel["registers"] <= REGISTERS[kernel["name"].split("__")[0]], row


def test_shared_memory_stays_within_the_budget(made):
    for row in made["rows"]:
        assert max(kernel["shared_bytes"] for kernel in row["kernels"]) <= SHARED_BYTES, row


@pytest.mark.parametrize(
    ("op", "kernels"),
    [("quantize_block", {"quantize_block"}), ("encode_rows", {"encode_rows_count", "encode_rows_write"})],
)
def test_kernels_of_compression_spill_nothing(made, op, kernels):
    found = {kernel["name"]: kernel for kernel in made["compression"][op]}  # XLA's own fusions among them
    assert kernels <= found.keys()
    for name in kernels:
        assert found[name]["stack_bytes"] == 0
        assert found[name]["registers"] <= COMPRESSION_REGISTERS


def test_a_kernel_that_spills_would_be_seen(made):
    (kernel,) = made["spilling"]
    assert kernel["stack_bytes"] > 0
    assert kernel["registers"] == 255


def test_a_kernel_that_needs_too_much_shared_memory_would_be_seen(made):
    assert "Shared memory size limit exceeded" in made["overflowing"]


def test_the_whole_model_compiles_with_packed_experts(made):
    for part in ("encoder", "decoder_step"):
        kernels = made["model"][part]
        assert sum(kernel.startswith("packed_") for kernel in kernels) == 2, kernels


def test_jax_triton_is_compiled_or_says_why_not(made):
    if made["jax_triton"] != "compiled":
        pytest.skip(made["jax_triton"])
    found = {(row["op"], row["gpu"]) for row in made["rows"] if row["backend"] == "jax_triton"}
    assert found == {("matmul", gpu) for gpu in deviceless.GPUS}
