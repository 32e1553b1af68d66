"""The option that joins the processes of a command."""

import jax
import pytest

from qmoe_jax.cli.hosts import join_hosts


@pytest.fixture
def joined(monkeypatch):
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *arguments: calls.append(arguments))
    return calls


def test_a_process_alone_joins_nothing(joined):
    join_hosts(None)
    assert joined == []


def test_hosts_are_named_or_found(joined):
    join_hosts("auto")
    join_hosts("10.0.0.1:8476,4,3")
    assert joined == [(), ("10.0.0.1:8476", 4, 3)]


@pytest.mark.parametrize(
    "text", ["", "10.0.0.1,4,0", "10.0.0.1:1,4,4", "10.0.0.1:1,0,0", "a b:1,2,0", "autos"]
)
def test_other_texts_are_refused(joined, text):
    with pytest.raises(ValueError, match=r"--distributed: expected auto, or HOST:PORT,COUNT,INDEX .* found"):
        join_hosts(text)
    assert joined == []


def test_auto_without_a_cluster_says_what_to_do(monkeypatch):
    def initialize():
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(ValueError, match=r"found none \(coordinator.*name the first process"):
        join_hosts("auto")
