"""A measurement of this machine gives every rate, and leaves no file."""

import dataclasses

import qmoe_jax as qj
from qmoe_jax.compression.planning import machine
from qmoe_jax.compression.planning.rates import PRESETS, Rates


def numbers(rates: Rates) -> dict[str, float]:
    fields = {field.name: getattr(rates, field.name) for field in dataclasses.fields(rates)}
    return {name: value for name, value in fields.items() if isinstance(value, float)}


def test_every_rate_of_this_machine_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "DISK_BYTES", 1 << 20)
    model = dataclasses.replace(qj.PRESETS["switch-base-8"], d_model=32, d_ff=64, d_kv=8, num_heads=2)
    found = machine.measure_rates(model, tmp_path)
    assert numbers(found).keys() == numbers(PRESETS["h100"]).keys()
    assert all(rate > 0 for rate in numbers(found).values())
    assert list(tmp_path.iterdir()) == []
