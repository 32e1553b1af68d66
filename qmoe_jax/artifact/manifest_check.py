"""Checks of what a manifest and a run say, after a checksum has shown that they are as they were written.

They hold for whatever this package writes, and stop what another program, or a hand, wrote instead.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, get_args

from qmoe_jax.artifact.kinds import Ternary
from qmoe_jax.config import Activation, SwitchConfig
from qmoe_jax.files.durable import FileRecord
from qmoe_jax.files.names import is_inside
from qmoe_jax.files.safetensors import DTYPES
from qmoe_jax.parameters import expert_kernels

if TYPE_CHECKING:
    from qmoe_jax.artifact.manifest import ArrayRecord, GroupRecord, Manifest, Run


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


_TYPES: Mapping[str, Callable[[Any], bool]] = {
    "int": lambda value: type(value) is int and 0 <= value < 2**31,
    "tuple[int, ...]": lambda value: type(value) is tuple and all(map(_is_count, value)),
    "bool": lambda value: type(value) is bool,
    "float": lambda value: type(value) in (int, float) and 0 <= value < math.inf,
    "Activation": lambda value: value in get_args(Activation),
}
_DTYPES = {dtype.name for dtype in DTYPES.values()}


def check_run(run: Run) -> None:
    """Raise `ValueError` naming the first field of a run that is of another type than is written."""
    for field in dataclasses.fields(SwitchConfig):
        value = getattr(run.config, field.name)
        _require(_TYPES[str(field.type)](value), f"config: {field.name}", field.type, value)
    for stack in ("encoder", "decoder"):
        layers, sparse = run.config.num_layers(stack), run.config.sparse_layers(stack)
        _require(
            all(layer < layers for layer in sparse),
            f"config: {stack}_sparse_layers",
            f"below {layers}",
            sparse,
        )
    for name in ("options", "source"):
        _require(isinstance(getattr(run, name), dict), name, "an object", getattr(run, name))
    _require_texts("codebooks", run.codebooks)


def check_manifest(manifest: Manifest) -> None:
    """Raise `ValueError` naming the first field of a manifest that cannot be, or contradicts another."""
    check_run(manifest.run)
    _require(isinstance(manifest.summary, dict), "summary", "an object", manifest.summary)
    kernels = {kernel.path for kernel in expert_kernels(manifest.run.config)}
    for name, kind in manifest.kinds.items():
        _require(name in kernels, "kinds", "names of expert kernels", name)
        if isinstance(kind, Ternary):
            _require(kind.codebook in manifest.run.codebooks, name, [*manifest.run.codebooks], kind.codebook)
    for name, record in manifest.dense.items():
        _check_array(name, record)
    for path, listed in manifest.files.items():
        _check_file(path, listed)
    _check_groups(manifest, kernels)


def _check_groups(manifest: Manifest, kernels: set[str]) -> None:
    """Check that the groups of each layer follow one another from its first expert to its last."""
    layer_of: Callable[[GroupRecord], tuple[str, int]] = lambda group: (group.key.stack, group.key.layer)
    experts = manifest.run.selection.experts
    layers = [(layer, list(groups)) for layer, groups in itertools.groupby(manifest.groups, key=layer_of)]
    _require(len(dict(layers)) == len(layers), "experts", "the groups of a layer together", "apart")
    for (stack, number), groups in layers:
        name = f"{stack}/layers_{number}"
        of_layer = {kernel for kernel in kernels if kernel.startswith(f"{name}/")}
        _require(bool(of_layer) and of_layer <= manifest.kinds.keys(), "experts", "a layer with kinds", name)
        bounds = [bound for group in groups for bound in (group.key.start, group.key.stop)]
        ends = [experts.start, *bounds, experts.stop]
        gapless = all(map(_is_count, bounds)) and ends[::2] == ends[1::2]
        filled = gapless and all(group.key.start < group.key.stop for group in groups)
        _require(filled, f"experts of {name}", f"{experts.start} to {experts.stop}", bounds)
        for group in groups:
            _check_file(group.path, group.record)


def _check_array(name: str, record: ArrayRecord) -> None:
    _require(all(map(_is_count, record.shape)), f"dense: {name}", "a shape", record.shape)
    _require(record.dtype in _DTYPES, f"dense: {name}", f"one of {sorted(_DTYPES)}", record.dtype)
    _require(isinstance(record.sha256, str), f"dense: {name}", "a checksum", record.sha256)


def _check_file(path: Any, record: FileRecord) -> None:
    _require(isinstance(path, str) and is_inside(path), "files", "a path inside the artifact", path)
    _require(_is_count(record.bytes) and isinstance(record.sha256, str), path, "size and checksum", record)


def _require_texts(name: str, value: Any) -> None:
    fits = isinstance(value, dict) and all(isinstance(text, str) for text in value.values())
    _require(fits, name, "texts by name", value)


def _require(fits: bool, name: str, expected: Any, found: Any) -> None:
    if not fits:
        raise ValueError(f"{name}: expected {expected}, found {found!r}")
