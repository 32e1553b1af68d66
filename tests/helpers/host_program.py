"""One process of a run on several hosts, which compresses the tiny model, or dies on the way.

Its arguments: INDEX COUNT PORT CHECKPOINT SAMPLES OUTPUT SCRATCH OPTIONS DIES_AT.
"""

import json
import os
import sys
from pathlib import Path

import jax

INDEX, COUNT, PORT = map(int, sys.argv[1:4])
CHECKPOINT, SAMPLES, OUTPUT, SCRATCH = map(Path, sys.argv[4:8])
OPTIONS, DIES_AT = json.loads(sys.argv[8]), int(sys.argv[9])

jax.distributed.initialize(f"127.0.0.1:{PORT}", COUNT, INDEX, initialization_timeout=120)

import numpy as np  # noqa: E402 (jax.distributed comes before anything that computes)

import qmoe_jax as qj  # noqa: E402
from qmoe_jax.compression.resume import GroupStore  # noqa: E402
from qmoe_jax.compression.tokens import slabs  # noqa: E402

slabs.SLAB_BYTES, slabs.BATCH_TOKENS = 1 << 14, 128  # several slabs for each host


def dying(write):
    """Return `GroupStore.write` that ends the process, as a machine that fails, at its last call."""
    calls = []

    def wrapper(*arguments):
        calls.append(arguments)
        if len(calls) == DIES_AT:
            os._exit(9)
        return write(*arguments)

    return wrapper


if DIES_AT:
    GroupStore.write = dying(GroupStore.write)
tokens = json.loads(SAMPLES.read_text())
pairs = zip(tokens["encoder"][:16], tokens["decoder"][:16], strict=True)
examples = [(np.array(encoder, np.int32), np.array(decoder, np.int32)) for encoder, decoder in pairs]
qj.compress(CHECKPOINT, OUTPUT, examples, qj.CompressionConfig(**OPTIONS), scratch=SCRATCH)
