"""Eight devices: each takes expert groups and batches, and the bytes are those of one."""

import json

import numpy as np
import pytest

import qmoe_jax as qj
from qmoe_jax.compression.passes import experts
from qmoe_jax.compression.tokens import slabs
from tests.helpers.artifact_bytes import stored_bytes

pytestmark = pytest.mark.devices


@pytest.mark.parametrize("options", [{}, {"skip": "encoder", "method": "nearest", "bits": 2}], ids=str)
def test_eight_devices_give_the_bytes_of_one(data, tmp_path, monkeypatch, options):
    monkeypatch.setattr(slabs, "BATCH_TOKENS", 128)  # several batches of each shape
    used, place = set(), experts.place

    def placing(mesh, parts):
        array = place(mesh, parts)
        used.update(device.id for device in array.sharding.device_set)
        return array

    monkeypatch.setattr(experts, "place", placing)
    tokens = json.loads((data / "e2e_data.json").read_text())
    pairs = zip(tokens["encoder"][:16], tokens["decoder"][:16], strict=True)
    examples = [(np.array(encoder, np.int32), np.array(decoder, np.int32)) for encoder, decoder in pairs]
    config = qj.CompressionConfig(sentinel_start=480, experts_per_group=1, **options)
    for devices in (1, 8):
        qj.compress(data / "hf_tiny_a", tmp_path / str(devices), examples, config, devices=devices)
        assert used == set(range(devices))
    assert stored_bytes(tmp_path / "8") == stored_bytes(tmp_path / "1")
