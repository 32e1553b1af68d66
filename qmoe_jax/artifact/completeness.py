"""Checks that the parts of an artifact make up a whole model, before the manifest is written."""

from __future__ import annotations

from collections.abc import Mapping

from qmoe_jax.artifact.groups import EXPERTS, GroupFile, GroupKey
from qmoe_jax.artifact.kinds import Kind, Ternary
from qmoe_jax.artifact.manifest import Run
from qmoe_jax.files.errors import CheckpointError
from qmoe_jax.files.names import is_stray
from qmoe_jax.files.store import Store
from qmoe_jax.parameters import STACKS, ExpertKernel, expert_matrices, expert_shapes


def find_groups(store: Store) -> list[GroupKey]:
    """Return the expert groups that are there, whichever host wrote them, without strays (`is_stray`).

    Raises:
        CheckpointError: there is a file among them that is not an expert group.
    """
    keys = []
    for name in store.names(EXPERTS):
        if any(map(is_stray, name.split("/"))):
            continue
        key = GroupKey.from_path(name)
        if key is None:
            raise CheckpointError("is not an expert group", path=store.path(name), remedy="remove it")
        keys.append(key)
    return keys


def check_complete(
    store: Store, run: Run, files: Mapping[GroupKey, str], dense: Mapping[str, object]
) -> dict[str, Kind]:
    """Check that every expert is there exactly once, and return the packing of each compressed kernel.

    Of a slice only the experts that it selects must be there.

    Args:
        store: the artifact.
        run: architecture and codebooks.
        files: file of each group, relative to the artifact.
        dense: the dense parameters by name; the kernels of an uncompressed layer are among them.

    Raises:
        CheckpointError: an expert is missing or there twice, or groups of one layer are packed differently.
    """
    selection = run.selection
    by_layer: dict[tuple[str, int], list[GroupKey]] = {
        (stack, layer): []
        for stack in STACKS
        for layer in run.config.sparse_layers(stack)
        if layer in selection.layers[stack]
    }
    for key in sorted(files):
        if (key.stack, key.layer) not in by_layer:
            raise CheckpointError("is a group of a layer without experts", path=store.path(key.path))
        by_layer[key.stack, key.layer].append(key)
    kinds: dict[str, Kind] = {}
    for (stack, layer), groups in by_layer.items():
        names = {ExpertKernel(stack, layer, matrix).path for matrix in expert_matrices(run.config)}
        if not groups and names <= dense.keys():
            continue
        _check_experts(store, selection.experts, f"{stack}/layers_{layer}", groups)
        for key in groups:
            group = GroupFile.open(store, key, files[key])
            for matrix, kind in check_matrices(group.path, run, group.matrices).items():
                if kinds.setdefault(name := ExpertKernel(stack, layer, matrix).path, kind) != kind:
                    raise CheckpointError(
                        "is packed differently from its layer",
                        path=store.path(key.path),
                        expected=kinds[name],
                        found=kind,
                    )
    return kinds


def _check_experts(store: Store, experts: range, layer: str, groups: list[GroupKey]) -> None:
    """Check that the groups, sorted, hold each of `experts` once."""
    position = experts.start
    for key in groups:
        if key.start != position:
            raise CheckpointError(
                "experts are missing" if key.start > position else "experts are there twice",
                path=store.path(key.path),
                key=layer,
                expected=f"expert {position} first",
                found=f"experts {key.start} to {key.stop - 1}",
            )
        position = key.stop
    if position != experts.stop:
        raise CheckpointError(
            "experts are missing",
            path=store.root,
            key=layer,
            expected=f"experts {experts.start} to {experts.stop - 1}",
            found=f"none from {position} on",
        )


def check_matrices(
    path: object, run: Run, matrices: Mapping[str, tuple[Kind, tuple[int, int]]]
) -> dict[str, Kind]:
    """Check that the matrices of a group (kind and shape of each) fit the run, and return their kinds.

    Raises:
        CheckpointError: they are not the model's matrices, or need a codebook that the run does not have;
            names `path`.
    """
    found = {matrix: shape for matrix, (_, shape) in matrices.items()}
    if found != (expected := expert_shapes(run.config)):
        raise CheckpointError("holds matrices of other shapes", path=path, expected=expected, found=found)
    kinds = {matrix: kind for matrix, (kind, _) in matrices.items()}
    for kind in kinds.values():
        if isinstance(kind, Ternary) and kind.codebook not in run.codebooks:
            raise CheckpointError(
                "needs a codebook that the run lacks",
                path=path,
                expected=f"one of {sorted(run.codebooks)}",
                found=kind.codebook,
            )
    return kinds
