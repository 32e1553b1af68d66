"""The file with the codebooks of an artifact, stored as data, so that reading needs no rule to make them.

One safetensors file with the lengths of each codebook's codewords (the smallest integers that hold them) and
their digits, two bits each; names and the other fields are in the metadata.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

import numpy as np

from qmoe_jax.artifact.bits import pack_bits, smallest_dtype, unpack_bits
from qmoe_jax.coding import Codebook
from qmoe_jax.files.errors import CheckpointError
from qmoe_jax.files.reading import parse_json
from qmoe_jax.files.safetensors import lazy_tensors, read_header, render_header
from qmoe_jax.files.store import File
from qmoe_jax.files.tensor import read_all

CODEBOOKS = "codebooks.safetensors"
DIGIT_BITS = 2


def render_codebooks(codebooks: Iterable[Codebook]) -> bytes:
    """Return the bytes of the file."""
    tensors: list[tuple[str, np.ndarray]] = []
    described = []
    for index, codebook in enumerate(sorted(codebooks, key=lambda codebook: codebook.name)):
        lengths = np.asarray(codebook.lengths)
        tensors.append((f"{index}.lengths", lengths.astype(smallest_dtype(lengths))))
        tensors.append((f"{index}.digits", pack_bits(np.asarray(codebook.digits), DIGIT_BITS)))
        static = {"max_length": codebook.max_length, "symbol_digits": codebook.symbol_digits}
        described.append({"name": codebook.name, **static})
    metadata = {"codebooks": json.dumps(described, sort_keys=True)}
    return b"".join([render_header(tensors, metadata), *(array.tobytes() for _, array in tensors)])


def read_codebooks(file: File) -> dict[str, Codebook]:
    """Read the codebooks of a file, by name.

    Raises:
        CheckpointError: the file is missing or damaged, or something in it is not a codebook.
    """
    header = read_header(file)
    arrays = {name: read_all(tensor) for name, tensor in lazy_tensors(file, header).items()}
    try:
        codebooks = {}
        for index, fields in enumerate(parse_json(header.metadata["codebooks"])):
            digits = unpack_bits(arrays[f"{index}.digits"], DIGIT_BITS, fields["max_length"])
            symbol_digits = np.array(fields["symbol_digits"], np.int32)
            stored = {"lengths": arrays[f"{index}.lengths"], "digits": digits, "symbol_digits": symbol_digits}
            codebooks[fields["name"]] = Codebook.from_arrays(fields["name"], stored)
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(
            "holds something that is not a codebook", path=file.path, found=repr(error)
        ) from error
    return codebooks
