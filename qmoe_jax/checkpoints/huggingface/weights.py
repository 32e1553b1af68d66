"""Weight files of a Hugging Face directory, one or many, safetensors or torch, as one table of tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

from qmoe_jax.files.errors import CheckpointError
from qmoe_jax.files.names import is_file_name, similar
from qmoe_jax.files.reading import read_json
from qmoe_jax.files.safetensors import open_safetensors
from qmoe_jax.files.tensor import Shard, Tensor
from qmoe_jax.files.torch_pickle import TorchTensor, open_torch

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""In the order of preference: a directory may hold the same weights several times."""


@dataclasses.dataclass(frozen=True)
class Weights:
    """Tensors by their names in the files, and the files."""

    tensors: Mapping[str, Tensor]
    files: tuple[Path, ...]

    def shards(self) -> list[Shard]:
        """Return the files as they are on disk now."""
        return [
            Shard(file.name, file.stat().st_size) if file.is_file() else Shard(file.name, None, "missing")
            for file in self.files
        ]


def find_weights(directory: Path) -> Path | None:
    """Return the file to begin with, an index or the only weight file; None if there is neither."""
    return next((directory / name for name in WEIGHT_FILES if (directory / name).is_file()), None)


def weights_named(directory: Path, file: str | None) -> Path | None:
    """Return the file to begin with where a checkpoint was named by `file`; None without weights.

    A shard stands for the index that lists it, and a file that holds no weights for its directory.
    """
    if file is None or file in WEIGHT_FILES or Path(file).suffix not in (".safetensors", ".bin"):
        return directory / file if file in WEIGHT_FILES else find_weights(directory)
    indexes = (directory / name for name in WEIGHT_FILES if name.endswith(".json"))
    listed = (index for index in indexes if index.is_file() and file in _weight_map(index).values())
    return next(listed, directory / file)


def unread(file: Path, weights: Weights) -> list[str]:
    """Return a note if other weight files lie beside those that are read."""
    patterns = ("model*.safetensors", "pytorch_model*.bin", *WEIGHT_FILES)
    there = {path.name for pattern in patterns for path in file.parent.glob(pattern)}
    others = sorted(there - {path.name for path in weights.files})
    more = f" and {len(others) - 3} more" if len(others) > 3 else ""
    return [f"{file.name} is read, not {', '.join(others[:3])}{more} beside it"] if others else []


def open_weights(file: Path) -> Weights:
    """Return the weights in `file` or, if that is an index, in its files. Reads only headers, once each.

    Raises:
        CheckpointError: a file that the index lists is missing, cut short or damaged, or lacks a tensor.
    """
    if file.suffix != ".json":
        return Weights(_opener(file)(file), (file,))
    by_file: dict[str, list[str]] = {}
    for key, name in _weight_map(file).items():
        by_file.setdefault(name, []).append(key)
    files = {name: file.parent / name for name in sorted(by_file)}
    if missing := [name for name in files if not files[name].is_file()]:
        raise CheckpointError(
            f"{len(missing)} of {len(files)} shards are missing",
            path=file.parent,
            key=by_file[missing[0]][0],
            expected=f"the files that {file.name} lists",
            found="; ".join(_absence(file.parent, name) for name in missing[:3]),
            remedy="download them again",
        )
    tensors: dict[str, Tensor] = {}
    for name, keys in by_file.items():
        stored = _opener(files[name])(files[name])
        if absent := sorted(set(keys) - stored.keys()):
            raise CheckpointError(
                "a shard lacks a tensor that the index lists",
                path=files[name],
                key=absent[0],
                found="nothing",
            )
        tensors |= {key: stored[key] for key in keys}
    return Weights(tensors, (file, *files.values()))


def _absence(directory: Path, name: str) -> str:
    other = similar(directory, name)
    if other == name:
        return f"no {name}: a link to nothing"
    return f"no {name}, but {other}" if other else f"no {name}"


def _weight_map(file: Path) -> dict[str, str]:
    index = read_json(file)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(
            "is not an index of weights", path=file, key="weight_map", expected="names to files"
        )
    if outside := [name for name in weight_map.values() if not is_file_name(name)]:
        raise CheckpointError(
            "the index points outside its directory",
            path=file,
            expected="names of files beside the index",
            found=outside[0],
        )
    # An early conversion script separated the parts of a name by "/" in the index and by "." in the files.
    return {key.replace("/", "."): name for key, name in weight_map.items()}


def _opener(file: Path) -> Callable[[Path], Mapping[str, Tensor]]:
    return open_safetensors if file.suffix == ".safetensors" else _open_state_dict


def _open_state_dict(file: Path) -> dict[str, Tensor]:
    saved = open_torch(file)
    if other := [key for key, value in saved.items() if not isinstance(value, TorchTensor)]:
        raise CheckpointError(
            "is not a tensor", path=file, key=other[0], found=type(saved[other[0]]).__name__
        )
    return saved
