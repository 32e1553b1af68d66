"""A small model's artifact, made of random digits: for tests, and as a program for those that kill it.

python artifact_samples.py DIRECTORY [seconds to wait after each group]
"""

import pathlib
import sys
import time

import ml_dtypes
import numpy as np
from flax import traverse_util

from qmoe_jax.artifact import (
    ArtifactWriter,
    Expert,
    Kind,
    PackedExpertMatrix,
    Ternary,
    Uniform,
    num_groups,
    pack_matrix,
)
from qmoe_jax.artifact.report import RunReport
from qmoe_jax.coding import tunstall_codebook
from qmoe_jax.config import SwitchConfig
from qmoe_jax.files.tensor import Tensor, in_memory
from qmoe_jax.parameters import expert_shapes

CONFIG = SwitchConfig(
    d_model=20, d_ff=36, d_kv=4, num_heads=2, num_encoder_layers=2, num_decoder_layers=1, num_experts=5,
    encoder_sparse_layers=(1,), decoder_sparse_layers=(0,), vocab_size=64,
)  # fmt: skip
GROUPS = ((0, 2), (2, 4), (4, 5))
LAYERS = (("encoder", 1), ("decoder", 0))
BYTE_CODES = tunstall_codebook(p_zero=0.8, code_bits=6, max_length=16)
WORD_CODES = tunstall_codebook(p_zero=0.7, code_bits=9, max_length=16)
CODEBOOKS = {codebook.name: codebook for codebook in (BYTE_CODES, WORD_CODES)}

KINDS = {
    "ternary": Ternary(BYTE_CODES.name),
    "ternary, 16-bit codes": Ternary(WORD_CODES.name),
    "ternary, float32 levels": Ternary(BYTE_CODES.name, level_dtype="float32"),
    "ternary, groups": Ternary(BYTE_CODES.name, group_size=8),
    "2 bits": Uniform(2),
    "3 bits, groups": Uniform(3, group_size=16),
    "4 bits, groups, float32 levels": Uniform(4, group_size=7, level_dtype="float32"),
}


def random_digits(kind: Kind, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    if isinstance(kind, Ternary):
        return rng.choice(3, shape, p=[0.8, 0.1, 0.1]).astype(np.uint8)
    return rng.integers(0, 1 << kind.bits, shape, np.uint8)


def random_levels(kind: Kind, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Levels [out, group, 2] as the solver gives them: (minimum, maximum), or (scale, zero point)."""
    levels = rng.uniform(0.1, 1.0, (shape[0], num_groups(kind, shape[1]), 2)).astype(np.float32)
    if isinstance(kind, Ternary):
        return levels * np.array([-1, 1], np.float32)
    levels[..., 1] = rng.integers(0, 1 << kind.bits, levels.shape[:-1])
    return levels


def random_matrix(
    kind: Kind, shape: tuple[int, int], rng: np.random.Generator, *, reordered: bool = False
) -> PackedExpertMatrix:
    groups = num_groups(kind, shape[1])
    return pack_matrix(
        kind,
        random_digits(kind, shape, rng),
        random_levels(kind, shape, rng),
        CODEBOOKS,
        group_index=rng.integers(0, groups, shape[1]) if reordered else None,
    )


def random_experts(kind: Kind, stack: str, layer: int, start: int, stop: int) -> list[Expert]:
    rng = np.random.default_rng([len(stack), layer, start])
    shapes = expert_shapes(CONFIG)
    return [
        {name: random_matrix(kind, shape, rng) for name, shape in shapes.items()} for _ in range(start, stop)
    ]


def dense_tree() -> dict:
    rng = np.random.default_rng(0)
    embedding = rng.standard_normal((CONFIG.vocab_size, CONFIG.d_model), np.float32)
    scale = np.ones(CONFIG.d_model, np.float32)
    return {
        "token_embedder": {"embedding": embedding.astype(ml_dtypes.bfloat16)},
        "encoder": {"encoder_norm": {"scale": scale}},
        "decoder": {"decoder_norm": {"scale": 2 * scale}},
    }


def tensors(tree: dict) -> dict[str, Tensor]:
    arrays = traverse_util.flatten_dict(tree, sep="/")
    return {name: in_memory(array) for name, array in arrays.items()}


def dense_tensors() -> dict[str, Tensor]:
    return tensors(dense_tree())


def writer(
    root: pathlib.Path | str, kind: Kind = KINDS["ternary"], host: int = 0, **options: object
) -> ArtifactWriter:
    return ArtifactWriter(
        root,
        config=CONFIG,
        options={"damping": 0.1, **options},
        source={"checkpoint": "0f" * 32},
        codebooks=[CODEBOOKS[kind.codebook]] if isinstance(kind, Ternary) else [],
        host=host,
    )


def write_artifact(root: pathlib.Path | str, kind: Kind = KINDS["ternary"], wait: float = 0.0) -> None:
    """Writes a whole artifact, or what is missing of one."""
    with writer(root, kind) as artifact:
        artifact.attach("tokenizer.model", b"pieces")
        for stack, layer in LAYERS:
            for start, stop in GROUPS:
                if not artifact.has_group(stack, layer, start, stop):
                    artifact.write_group(stack, layer, start, random_experts(kind, stack, layer, start, stop))
                    time.sleep(wait)
        artifact.write_dense(dense_tensors())
        time.sleep(wait)
        artifact.finish({"loss": 4.25}, RunReport(seconds=time.time()))


if __name__ == "__main__":
    write_artifact(sys.argv[1], wait=float(sys.argv[2]) if len(sys.argv) > 2 else 0.0)
