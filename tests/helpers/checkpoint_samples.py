"""A tiny model, and checkpoints of it in every layout."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
from flax import serialization, traverse_util

from qmoe_jax.checkpoints.architecture import expected_shapes
from qmoe_jax.checkpoints.huggingface import names, write_huggingface
from qmoe_jax.checkpoints.huggingface.config import config_json
from qmoe_jax.checkpoints.reader import Checkpoint
from qmoe_jax.checkpoints.t5x import write_parameters
from qmoe_jax.config import SwitchConfig
from qmoe_jax.files.tensor import in_memory
from qmoe_jax.files.torch_writer import save_torch
from qmoe_jax.parameters import is_expert

DATA = Path(__file__).parent.parent / "golden"
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

Parameters = dict[str, np.ndarray]

# Two sparse patterns, an inner width (6) that is not d_model, an odd number of experts.
TINY = SwitchConfig(
    d_model=8,
    d_ff=12,
    d_kv=3,
    num_heads=2,
    num_encoder_layers=4,
    num_decoder_layers=2,
    num_experts=5,
    encoder_sparse_layers=(1, 3),
    decoder_sparse_layers=(0, 1),
    vocab_size=11,
    tied=False,
    relative_attention_buckets=4,
)
TINY_TIED = dataclasses.replace(TINY, tied=True)
TINY_GATED = dataclasses.replace(TINY, gated=True, activation="gelu")

EXPERTS = "encoder/layers_1/mlp/expert/wi/kernel"


def random_parameters(config: SwitchConfig = TINY, dtype: np.dtype = BFLOAT16) -> Parameters:
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in expected_shapes(config).items()}


def memory_checkpoint(config: SwitchConfig, parameters: Parameters) -> Checkpoint:
    tensors = {name: in_memory(array) for name, array in parameters.items()}
    return Checkpoint("memory", "memory", config, tensors, list_shards=list)


def nested(parameters: Parameters) -> dict:
    return traverse_util.unflatten_dict(parameters, sep="/")


def huggingface_arrays(config: SwitchConfig, parameters: Parameters) -> Parameters:
    """Under Hugging Face's names, as views: transposed, and experts within their stacked array."""
    stored = {}
    for name, array in parameters.items():
        if is_expert(name):
            stored |= {names.to_huggingface(name, e): array[e].T for e in range(len(array))}
        else:
            stored[names.to_huggingface(name)] = array if name == "token_embedder/embedding" else array.T
    return stored


def rewrite_json(file: Path, **members: object) -> None:
    """Change members of a JSON file; None removes one."""
    value = json.loads(file.read_text()) | members
    file.write_text(json.dumps({key: member for key, member in value.items() if member is not None}))


def _t5x(path: Path, config: SwitchConfig, parameters: Parameters) -> Path:
    return write_parameters(nested(parameters), path, step=7)


def _t5x_directory_of_steps(path: Path, config: SwitchConfig, parameters: Parameters) -> Path:
    write_parameters({"token_embedder": {"embedding": np.zeros((2, 3))}}, path, step=7)
    write_parameters(nested(parameters), path, step=20)
    return path


def _t5x_index(path: Path, config: SwitchConfig, parameters: Parameters) -> Path:
    return write_parameters(nested(parameters), path, step=7) / "checkpoint"


def _t5x_inlined(path: Path, config: SwitchConfig, parameters: Parameters) -> Path:
    state = {"step": np.int32(7), "param_states": {"token_embedder": {"embedding": {"v": np.zeros(3)}}}}
    tree = {"version": 3, "optimizer": {"target": nested(parameters), "state": state}}
    path.write_bytes(serialization.msgpack_serialize(tree))
    return path


def _flax(path: Path, config: SwitchConfig, parameters: Parameters) -> Path:
    momenta = {name: np.zeros_like(array) for name, array in parameters.items()}
    path.write_bytes(
        serialization.msgpack_serialize({"opt_state": {"mu": nested(momenta)}, "params": nested(parameters)})
    )
    return path


def _t5x_scanned(path: Path, config: SwitchConfig, parameters: Parameters) -> Path:
    """flaxformer's scan: blocks of a dense and a sparse layer, stacked on axis 1, a position bias in each."""
    stacked: Parameters = {}
    for stack, layers, block in (("encoder", 4, 2), ("decoder", 2, 1)):
        bias = parameters[f"{stack}/relpos_bias/rel_embedding"]
        for position in range(block):
            below = f"{stack}/{stack}/subblock_{position}"
            stacked[f"{below}/relpos_bias/rel_embedding"] = np.stack([bias] * (layers // block), axis=1)
            prefix = f"{stack}/layers_{position}/"
            for name in (name for name in parameters if name.startswith(prefix)):
                rest = name.removeprefix(prefix)
                each = [parameters[f"{stack}/layers_{i}/{rest}"] for i in range(position, layers, block)]
                stacked[f"{below}/{rest}"] = np.stack(each, axis=1)
    rest = {n: a for n, a in parameters.items() if "layers_" not in n and "relpos_bias" not in n}
    return write_parameters(nested(stacked | rest), path, step=7)


def _orbax(**options: bool) -> Callable[[Path, SwitchConfig, Parameters], Path]:
    def save(path: Path, config: SwitchConfig, parameters: Parameters) -> Path:
        tree = {"target": nested(parameters), "state": {"step": np.int32(7)}}
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)) as checkpointer:
            checkpointer.save(path / "checkpoint_7" / "state", tree)
        return path

    return save


def _orbax_placeholders(path: Path, config: SwitchConfig, parameters: Parameters) -> Path:
    """As Orbax was in 2023: a msgpack of placeholders, and no metadata file."""
    directory = write_parameters(nested(parameters), path, step=7)
    leaves = {name: f"PLACEHOLDER://target.{name.replace('/', '.')}" for name in parameters}
    tree = {"target": nested(leaves), "flax_mutables": None}  # type: ignore[arg-type]
    (directory / "checkpoint").write_bytes(serialization.msgpack_serialize(tree))
    return directory


def _safetensors(path: Path, config: SwitchConfig, parameters: Parameters) -> Path:
    return write_huggingface(memory_checkpoint(config, parameters), path)


def _safetensors_shards(path: Path, config: SwitchConfig, parameters: Parameters) -> Path:
    return write_huggingface(memory_checkpoint(config, parameters), path, shard_bytes=1000, memory=400)


def _torch(path: Path, config: SwitchConfig, parameters: Parameters) -> Path:
    path.mkdir()
    dtype = parameters["token_embedder/embedding"].dtype
    (path / "config.json").write_text(json.dumps(config_json(config, dtype)))
    save_torch(path / "pytorch_model.bin", huggingface_arrays(config, parameters))
    return path


def _torch_shards(path: Path, config: SwitchConfig, parameters: Parameters) -> Path:
    """As the large ones were converted: "/" in the index, the head filed under the decoder."""
    _torch(path, config, parameters)
    (path / "pytorch_model.bin").unlink()
    stored = huggingface_arrays(config, parameters)
    if not config.tied:
        stored[names.DECODER_HEAD] = stored.pop(names.HEAD)
    files = {key: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, key in enumerate(sorted(stored))}
    for file in set(files.values()):
        save_torch(path / file, {key: stored[key] for key in stored if files[key] == file})
    weight_map = {key.replace(".", "/"): file for key, file in files.items()}
    (path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path


LAYOUTS: dict[str, Callable[[Path, SwitchConfig, Parameters], Path]] = {
    "t5x": _t5x,
    "t5x, a directory of steps": _t5x_directory_of_steps,
    "t5x, its index file": _t5x_index,
    "t5x, all in the msgpack": _t5x_inlined,
    "t5x, scanned": _t5x_scanned,
    "flax msgpack": _flax,
    "orbax, a directory an array": _orbax(use_ocdbt=False),
    "orbax, ocdbt": _orbax(use_ocdbt=True),
    "orbax, ocdbt and zarr 3": _orbax(use_ocdbt=True, use_zarr3=True),
    "orbax, placeholders": _orbax_placeholders,
    "safetensors": _safetensors,
    "safetensors, shards": _safetensors_shards,
    "torch": _torch,
    "torch, shards": _torch_shards,
}
"""Functions that write a checkpoint of a model at a path, and return what to open."""

STRAYS = (
    ".DS_Store",
    "._model.safetensors",
    ".nfs000000000001",
    "Thumbs.db",
    ".checkpoint.swp",
    "#notes#",
    "a~",
)
"""Files that systems and editors leave in any directory."""


def add_strays(root: Path) -> None:
    """Leave stray files and directories at every depth of a directory."""
    for folder in [root, *(path for path in root.rglob("*") if path.is_dir())]:
        for name in STRAYS:
            (folder / name).write_bytes(b"stray")
        for name in (".ipynb_checkpoints", "lost+found"):
            (folder / name).mkdir(exist_ok=True)
            (folder / name / "model-checkpoint.safetensors").write_bytes(b"stray")
