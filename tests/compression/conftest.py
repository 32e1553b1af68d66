"""The pipeline's tests share one tiny model and upstream's own samples of it."""

import json

import numpy as np
import pytest

import qmoe_jax as qj
from qmoe_jax.compression import experts

SENTINELS = 480


@pytest.fixture(scope="session")
def samples(data):
    """32 samples: upstream trained its Hessians on the first 16 and validated on the rest."""
    tokens = json.loads((data / "e2e_data.json").read_text())
    pairs = zip(tokens["encoder"], tokens["decoder"], strict=True)
    return [(np.array(encoder, np.int32), np.array(decoder, np.int32)) for encoder, decoder in pairs]


@pytest.fixture(scope="session")
def compressed(data, samples, tmp_path_factory):
    """Compress the tiny model once for each set of options; `gptq_calls` has the default's, (w, hessian, result)."""
    made, calls = {}, []
    real = experts.gptq

    def recorded(w, hessian, *arguments, **options):
        result = real(w, hessian, *arguments, **options)
        calls.append((np.asarray(w), np.asarray(hessian), result))
        return result

    def make(**options):
        key = tuple(sorted(options.items()))
        if key not in made:
            path = tmp_path_factory.mktemp("artifact") / "model"
            config = qj.CompressionConfig(sentinel_start=SENTINELS, **options)
            with pytest.MonkeyPatch.context() as patch:
                if not options:
                    patch.setattr(experts, "gptq", recorded)
                made[key] = path, qj.compress(data / "hf_tiny_a", path, samples[:16], config)
        return made[key]

    make.gptq_calls = calls

    return make
