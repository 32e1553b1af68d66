"""A named backend runs or raises with its reason; without a name, the platform's are tried in order."""

import sys
import types
import warnings

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels as pk
from pallas_kernels import availability, backend
from pallas_kernels.matmul.op import OP as MATMUL
from pallas_kernels.mlp.op import OP as MLP
from tests.helpers import packed_samples as samples
from tests.helpers.lowering import for_an_h100


@pytest.fixture
def operands():
    sample = samples.sample(samples.CODEBOOKS["tunstall-8"](), (1, 2, 9))
    return sample.packed, *samples.tokens(sample, 1)


@pytest.fixture
def without_numba(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.setattr(backend, "_warned", set())


def test_a_cpu_takes_the_cpu_kernels():
    assert backend.choose_backend(MATMUL) == "cpu"


def test_a_gpu_takes_the_pallas_kernels(monkeypatch):
    monkeypatch.setattr(backend, "platform", lambda: "gpu")
    assert backend.choose_backend(MATMUL) == "pallas"
    assert "the default platform is gpu" in backend.refusal(MATMUL, "cpu")


def on_a_gpu(monkeypatch, **versions):
    """A machine with a GPU, and these versions of jax, triton and jax-triton (None: not installed)."""
    monkeypatch.setattr(backend, "platform", lambda: "gpu")
    monkeypatch.setattr(backend, "_warned", set())
    for module in (backend, availability):
        monkeypatch.setattr(module, "version", lambda package: versions.get(package.replace("-", "_")))
    monkeypatch.setitem(sys.modules, "jax_triton", None)
    if versions.get("jax_triton"):
        monkeypatch.setitem(sys.modules, "jax_triton", types.ModuleType("jax_triton"))


TRIED_TOGETHER = {"jax": "0.11.2", "triton": "3.8.0", "jax_triton": "0.4.1"}


@pytest.fixture
def without_triton_under_pallas(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax.experimental.pallas.triton", None)
    monkeypatch.delattr("jax.experimental.pallas.triton", raising=False)


@pytest.mark.usefixtures("without_triton_under_pallas")
def test_a_gpu_takes_jax_triton_where_pallas_has_no_triton(monkeypatch):
    on_a_gpu(monkeypatch, **TRIED_TOGETHER)
    with pytest.warns(UserWarning, match="'pallas' kernels are not used.*has no Triton backend under Pallas"):
        assert backend.choose_backend(MATMUL) == "jax_triton"


@pytest.mark.usefixtures("without_triton_under_pallas")
def test_a_gpu_with_neither_takes_the_reference_and_warns_of_both_reasons(monkeypatch):
    on_a_gpu(monkeypatch, jax="0.13.0")
    with pytest.warns(UserWarning) as warnings_given:
        assert backend.choose_backend(MATMUL) == "reference"
    assert ["'pallas'" in str(w.message) for w in warnings_given] == [True, False]
    assert "triton and jax-triton not installed: pip install" in str(warnings_given[1].message)


@pytest.mark.parametrize(
    "versions, reason",
    [
        ({"jax": "0.11.2", "triton": "3.8.0"}, "jax-triton not installed: pip install"),
        ({**TRIED_TOGETHER, "triton": "3.6.0"}, r"jax-triton 0.4.1 requires triton>=3.7,<3.9, found 3.6.0"),
        (
            {**TRIED_TOGETHER, "jax": "0.12.0.1"},
            r"jax-triton 0.4.1 requires jax>=0.11,<0.12, found 0.12.0.1",
        ),
    ],
)
def test_jax_triton_names_the_versions_that_it_requires(monkeypatch, versions, reason):
    on_a_gpu(monkeypatch, **versions)
    with pytest.raises(NotImplementedError, match=f"backend 'jax_triton' cannot run: .*{reason}"):
        backend.choose_backend(MATMUL, "jax_triton")


def test_jax_triton_that_cannot_be_imported_says_why(monkeypatch):
    on_a_gpu(monkeypatch, **TRIED_TOGETHER)
    monkeypatch.setitem(sys.modules, "jax_triton", None)
    assert "jax-triton 0.4.1 cannot be imported" in backend.refusal(MATMUL, "jax_triton")


def test_a_program_for_an_absent_gpu_takes_the_kernels_for_it():
    with for_an_h100():
        assert backend.choose_backend(MATMUL) == "pallas"
    assert backend.choose_backend(MATMUL) == "cpu"


def test_another_platform_takes_the_reference(monkeypatch):
    monkeypatch.setattr(backend, "platform", lambda: "tpu")
    assert backend.choose_backend(MLP) == "reference"


@pytest.mark.parametrize(
    "name, reason",
    [
        ("pallas", "requires an NVIDIA GPU; the default platform is cpu"),
        ("jax_triton", "requires an NVIDIA GPU; the default platform is cpu"),
        ("cuda", "unknown backend; the backends are reference, pallas"),
    ],
)
def test_a_named_backend_never_falls_back(operands, name, reason):
    with pytest.raises(NotImplementedError, match=f"packed_matmul: backend '{name}' cannot run: .*{reason}"):
        pk.packed_matmul(*operands, backend=name)


def test_interpret_mode_is_never_the_default():
    assert all("pallas_interpret" not in order for order in backend.ORDER.values())
    assert backend.choose_backend(MATMUL, "pallas_interpret") == "pallas_interpret"


def test_a_function_in_place_of_a_name_is_the_implementation(operands):
    packed, x, expert_index = operands
    twos = lambda packed, x, expert_index: jnp.full((x.shape[0], packed.rows), 2, x.dtype)
    assert (pk.packed_matmul(packed, x, expert_index, backend=twos) == 2).all()


def test_without_numba_the_reference_runs_with_one_warning(without_numba):
    with pytest.warns(
        UserWarning, match="'cpu' kernels are not used, 'reference' is used instead: numba cannot be imported"
    ):
        assert backend.choose_backend(MATMUL) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backend.choose_backend(MATMUL) == "reference"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("raise ImportError('Numba needs NumPy')", "(ImportError: Numba needs NumPy)"),
        ("import _llvmlite_", "(ModuleNotFoundError: No module named '_llvmlite_')"),
        ("raise OSError('libllvm.so: wrong ELF class')", "(OSError: libllvm.so: wrong ELF class)"),
    ],
)  # fmt: skip
def test_a_broken_numba_says_by_what(monkeypatch, tmp_path, content, reason):
    (tmp_path / "numba.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "numba")
    assert backend.refusal(MATMUL, "cpu") == f"numba cannot be imported {reason}"


def test_a_numba_that_is_absent_is_named_so(monkeypatch, without_numba):
    monkeypatch.setattr(availability, "version", lambda package: None)
    with pytest.raises(
        NotImplementedError, match=r"numba cannot be imported: it is not installed .pip install numba"
    ):
        backend.choose_backend(MATMUL, "cpu")


@pytest.fixture
def machine(monkeypatch):
    """A machine with a GPU and jax's CUDA plug-in, whose jax nevertheless runs on the CPU."""
    monkeypatch.setattr(availability, "GPU_FILES", ("/dev/null",))
    monkeypatch.setattr(availability, "version", lambda package: "0.10.2")
    monkeypatch.setattr(availability, "_chosen_platforms", lambda: None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return monkeypatch


def without_a_gpu(machine):
    machine.setattr(availability, "GPU_FILES", ("/dev/no-such-gpu",))


def without_a_plugin(machine):
    machine.setattr(availability, "version", lambda package: None)


def told_to_use_the_cpu(machine):
    machine.setattr(availability, "_chosen_platforms", lambda: "cpu")


def with_a_hidden_gpu(machine):
    machine.setenv("CUDA_VISIBLE_DEVICES", "")


def with_a_plugin_that_fails(machine):
    machine.setattr("jax._src.xla_bridge._backend_errors", {"cuda": "no driver"})


@pytest.mark.parametrize(
    ("cause", "reason"),
    [
        (without_a_gpu, "no NVIDIA GPU is visible (no /dev/nvidia0)"),
        (without_a_plugin, "jax has no CUDA plug-in (pip install 'qmoe-jax[cuda]')"),
        (told_to_use_the_cpu, "jax is told to use cpu (JAX_PLATFORMS)"),
        (with_a_hidden_gpu, "CUDA_VISIBLE_DEVICES= hides every GPU"),
        (with_a_plugin_that_fails, "jax's CUDA plug-in did not start (no driver)"),
    ],
)
def test_the_reason_for_no_gpu_is_the_real_one(machine, cause, reason):
    cause(machine)
    assert (
        backend.refusal(MATMUL, "pallas") == f"requires an NVIDIA GPU; the default platform is cpu: {reason}"
    )


def test_a_platform_that_jax_cannot_start_is_named(machine):
    def fail():
        raise AssertionError  # as jax 0.10 does without a plug-in for JAX_PLATFORMS=cuda

    without_a_plugin(machine)
    machine.setattr(jax, "default_backend", fail)
    machine.setattr(availability, "_chosen_platforms", lambda: "cuda")
    with pytest.raises(NotImplementedError, match=r"cannot start the platform 'cuda' .*no CUDA plug-in"):
        backend.platform()


def test_operands_that_do_not_fit_are_refused(operands):
    packed, x, expert_index = operands
    with pytest.raises(ValueError, match=r"expected x of shape \[t, 9\], found \(1, 8\)"):
        pk.packed_matmul(packed, x[:, 1:], expert_index)
    with pytest.raises(ValueError, match="expected x in float32 or bfloat16, found float16"):
        pk.packed_matmul(packed, x.astype(jnp.float16), expert_index)


def test_an_activation_that_is_not_known_is_refused(operands):
    packed, x, expert_index = operands
    wo = samples.sample(samples.CODEBOOKS["tunstall-8"](), (1, 9, 2)).packed
    with pytest.raises(ValueError, match=r"expected an activation among .*found 'tanh'"):
        pk.packed_mlp(packed, wo, x, expert_index, None, "tanh")
    with pytest.raises(ValueError, match=r"expected wi for 1 experts of 9 rows, found \(1, 2\)"):
        pk.packed_mlp(packed, packed, x, expert_index)
