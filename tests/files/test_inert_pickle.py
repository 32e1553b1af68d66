"""Pickles as descriptions: plain values come back, and nothing is called, changed or allocated."""

import pickle
from typing import Any

import pytest

from qmoe_jax.files.inert_pickle import Global, load_inert
from tests.fuzz import canary

PLAIN = {
    "w": [1, -1, 2**31, -(2**70), 0.5, None, True, "é"],
    "t": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
}


def find_global(module: str, name: str) -> Global:
    return Global(f"{module}.{name}", (lambda *arguments: arguments) if name == "called" else None)


def load(program: bytes) -> Any:
    return load_inert(program, find_global, lambda identifier: ("reference", identifier))


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_plain_values_come_back(protocol: int) -> None:
    assert load(pickle.dumps(PLAIN, protocol)) == PLAIN


@pytest.mark.parametrize(
    ("program", "value"),
    [(b"\x80\x02ca\ncalled\nK\x07\x85R.", (7,)), (b"\x80\x02K\x07Q.", ("reference", 7))],
)
def test_calls_and_references_are_the_callers(program: bytes, value: object) -> None:
    assert load(program) == value


REFUSED = {
    "a call of what is only mentioned": b"\x80\x02ca\nmentioned\n)R.",
    "a call of a value": b"\x80\x02K\x01)R.",
    "an instance": b"\x80\x02(ia\ncalled\n.",
    "a new object": b"\x80\x02ca\ncalled\n)\x81.",
    "the state of a global": b"\x80\x02ca\ncalled\n}b.",
    "the state of a value": b"\x80\x02K\x01}b.",
    "an extension": b"\x80\x02\x82\x01.",
    "a text longer than the pickle": b"\x80\x02X\xff\xff\xff\x7f.",
    "bytes longer than the pickle": b"\x80\x04B\xff\xff\xff\x7f.",
    "a tuple as a key": b"\x80\x02})K\x01s.",
    "items of a number": b"\x80\x02K\x01(K\x01K\x02u.",
    "a key without its value": b"\x80\x02}(K\x01u.",
    "values below the mark": b"\x80\x02K\x01(\x85.",
    "a mark that is not there": b"\x80\x02t.",
    "a memo that is not there": b"\x80\x02h\x05.",
    "nothing": b"",
    "an empty stack": b"\x80\x02.",
}


@pytest.mark.parametrize("program", REFUSED.values(), ids=REFUSED)
def test_what_does_not_describe_is_refused(program: bytes) -> None:
    with pytest.raises((ValueError, IndexError, KeyError, TypeError)):
        load(program)


def test_a_pickle_that_calls_is_not_executed() -> None:
    canary.calls.clear()
    load(b"\x80\x02ctests.fuzz.canary\nsing\n.")
    assert canary.calls == []
    pickle.loads(b"\x80\x02ctests.fuzz.canary\nsing\n)R.")  # it would be
    assert canary.calls == ["sing"]
