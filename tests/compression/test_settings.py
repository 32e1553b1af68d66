"""A compression gives the same bytes whatever its caller has set in jax."""

import jax

import qmoe_jax as qj
from tests.helpers.jax_settings import every_setting


def test_settings_of_the_caller_change_no_byte(data, samples, compressed, tmp_path):
    expected, _ = compressed()
    with every_setting(), jax.default_matmul_precision("bfloat16"):
        config = qj.CompressionConfig(sentinel_start=480)
        qj.compress(data / "hf_tiny_a", tmp_path / "out", samples[:16], config)
        assert jax.config.jax_enable_x64  # they are the caller's again
    written = {path.relative_to(expected): path.read_bytes() for path in expected.rglob("*.safetensors")}
    assert written == {name: (tmp_path / "out" / name).read_bytes() for name in written}
