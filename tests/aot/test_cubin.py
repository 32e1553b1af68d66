"""Backward branches of a disassembled kernel that count as loops."""

import pytest

from tests.aot import cubin

NOP = {"opcode": "NOP"}
EXIT = {"predicate": "@P0", "opcode": "EXIT"}


def branch(target: int, operands: str = "") -> dict[str, str]:
    return {"opcode": "BRA", "operands": f"{operands}{hex(target * cubin.INSTRUCTION_BYTES)}"}


@pytest.mark.parametrize("operands", ["", "P0,", "UR4,"])
def test_a_loop_ends_with_the_branch_that_leads_back(operands):
    assert list(cubin.find_loops([NOP] * 7 + [branch(3, operands), NOP])) == [5]


def test_nested_loops_count_separately():
    assert list(cubin.find_loops([NOP] * 4 + [branch(2), NOP, branch(1)])) == [3, 6]


def test_the_branch_to_itself_that_ends_a_kernel_is_not_a_loop():
    assert list(cubin.find_loops([NOP, EXIT, branch(2), NOP])) == []


def test_a_branch_back_across_an_exit_is_not_a_loop():
    assert list(cubin.find_loops([NOP] * 252 + [EXIT, branch(3)])) == []


def test_a_branch_ahead_is_not_a_loop():
    assert list(cubin.find_loops([branch(3), NOP, NOP, NOP])) == []
