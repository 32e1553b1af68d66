"""The parts of a packed matrix must be those that its kind stores."""

import numpy as np
import pytest

from qmoe_jax.artifact.kinds import Kind
from qmoe_jax.artifact.layout import check_layout
from tests.helpers.artifact_samples import KINDS, random_matrix

SHAPE = (5, 20)
Layout = dict[str, tuple[np.dtype, tuple[int, ...]]]


def layout_of(kind: Kind, *, reordered: bool = False) -> Layout:
    matrix = random_matrix(kind, SHAPE, np.random.default_rng(0), reordered=reordered)
    return {name: (part.dtype, part.shape) for name, part in matrix.parts.items()}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_what_is_packed_has_its_layout(kind: Kind) -> None:
    check_layout(kind, SHAPE, layout_of(kind))
    if kind.group_size is not None:
        check_layout(kind, SHAPE, layout_of(kind, reordered=True))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("levels", None),
        ("codes", None),
        ("counts", (np.dtype(np.int32), (5,))),
        ("counts", (np.dtype(np.uint8), (4,))),
        ("levels", (np.dtype(np.float32), (5, 2))),
        ("levels", (np.dtype("bfloat16"), (5, 1, 2))),
        ("codes", (np.dtype(np.uint32), ())),
        ("scales", (np.dtype("bfloat16"), (5,))),
        ("column_group", (np.dtype(np.float32), (20,))),
    ],
)
def test_another_layout_is_refused(name: str, change: tuple | None) -> None:
    parts = {key: value for key, value in layout_of(KINDS["ternary"]).items() if key != name}
    with pytest.raises(ValueError, match="expected"):
        check_layout(KINDS["ternary"], SHAPE, parts | ({name: change} if change else {}))
