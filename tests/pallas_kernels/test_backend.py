"""A named backend runs or says why not; without a name the platform's list is walked, and passing one over is said."""

import sys
import warnings

import jax.numpy as jnp
import packed_samples as samples
import pytest

import pallas_kernels as pk
from pallas_kernels import backend


@pytest.fixture
def operands():
    sample = samples.sample(samples.CODEBOOKS["tunstall-8"](), (1, 2, 9))
    return sample.packed, *samples.tokens(sample, 1)


@pytest.fixture
def without_numba(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.setattr(backend, "_said", set())


def test_a_cpu_takes_the_cpu_kernels():
    assert backend.choose("matvec") == "cpu"


def test_a_gpu_takes_the_pallas_kernels(monkeypatch):
    monkeypatch.setattr(backend, "platform", lambda: "gpu")
    assert backend.choose("matmul") == "pallas"
    assert "arrays are on gpu" in backend.refusal("matmul", "cpu")


def test_another_platform_takes_the_reference(monkeypatch):
    monkeypatch.setattr(backend, "platform", lambda: "tpu")
    assert backend.choose("mlp") == "reference"


@pytest.mark.parametrize(
    "name, reason",
    [("pallas", "for NVIDIA GPUs.*interpret=True"), ("cuda", "no backend of that name, only reference")],
)
def test_a_named_backend_never_falls_back(operands, name, reason):
    with pytest.raises(NotImplementedError, match=f"matvec: backend '{name}' cannot run: .*{reason}"):
        pk.packed_matvec(*operands, backend=name)


def test_interpret_needs_the_pallas_backend(operands):
    with pytest.raises(NotImplementedError, match="interpret=True needs backend='pallas'"):
        pk.packed_matvec(*operands, interpret=True)


def test_without_numba_the_reference_runs_and_that_is_said_once(without_numba):
    with pytest.warns(
        UserWarning, match="'cpu' kernels are not used, 'reference' instead: numba cannot be imported"
    ):
        assert backend.choose("matvec") == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backend.choose("matmul") == "reference"


def test_without_numba_the_cpu_backend_says_why(without_numba):
    with pytest.raises(NotImplementedError, match="numba cannot be imported"):
        backend.choose("matvec", "cpu")


@pytest.mark.parametrize("op", [pk.packed_matvec, pk.packed_matmul])
def test_operands_that_do_not_fit_are_refused(operands, op):
    packed, x, expert_index = operands
    with pytest.raises(ValueError, match=r"expected x of shape \[t, 9\], found \(1, 8\)"):
        op(packed, x[:, 1:], expert_index)
    with pytest.raises(ValueError, match="expected x in float32 or bfloat16, found float16"):
        op(packed, x.astype(jnp.float16), expert_index)


def test_an_activation_that_is_not_known_is_refused(operands):
    packed, x, expert_index = operands
    wo = samples.sample(samples.CODEBOOKS["tunstall-8"](), (1, 9, 2)).packed
    with pytest.raises(ValueError, match=r"expected an activation of .*found 'tanh'"):
        pk.packed_mlp(packed, wo, x, expert_index, None, "tanh")
    with pytest.raises(ValueError, match=r"expected wi for 1 experts of 9 rows, found \(1, 2\)"):
        pk.packed_mlp(packed, packed, x, expert_index)
