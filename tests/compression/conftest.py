"""The pipeline's tests share one tiny model and upstream's own samples of it."""

import json

import numpy as np
import pytest

import qmoe_jax as qj
from qmoe_jax.compression.passes import experts

SENTINELS = 480


@pytest.fixture(scope="session")
def samples(data):
    """32 samples: upstream trained its Hessians on the first 16 and validated on the rest."""
    tokens = json.loads((data / "e2e_data.json").read_text())
    pairs = zip(tokens["encoder"], tokens["decoder"], strict=True)
    return [(np.array(encoder, np.int32), np.array(decoder, np.int32)) for encoder, decoder in pairs]


@pytest.fixture(scope="session")
def compressed(data, samples, tmp_path_factory):
    """Compress the tiny model once per set of options; `gptq_calls`: (w, hessian, found) of the default."""
    made, calls = {}, []
    factor, quantize, hessians = experts.factor, experts.quantize, []

    def record_hessian(mesh, mine, *arguments, **options):
        hessians.append(np.array(mine.sums))
        return factor(mesh, mine, *arguments, **options)

    def record_result(mesh, stored, *arguments, **options):
        result = quantize(mesh, stored, *arguments, **options)
        calls.append((np.array(stored).swapaxes(1, 2), hessians[-1], result[0]))
        return result

    def make(**options):
        key = tuple(sorted(options.items()))
        if key not in made:
            path = tmp_path_factory.mktemp("artifact") / "model"
            config = qj.CompressionConfig(sentinel_start=SENTINELS, **options)
            with pytest.MonkeyPatch.context() as patch:
                if not options:
                    patch.setattr(experts, "factor", record_hessian)
                    patch.setattr(experts, "quantize", record_result)
                made[key] = path, qj.compress(data / "hf_tiny_a", path, samples[:16], config)
        return made[key]

    make.gptq_calls = calls

    return make
