"""Writes a T5X checkpoint of a published model's true shape, of which only a slice takes room on the disk.

    python -m benchmarks.true_shape runs/c2048-slice

Takes a few minutes on two cores for switch-c-2048 and 3.5 GB of disk: 15 + 15 layers of 2,048 experts in the
chunks that T5X cuts, float32, gzip. Layer 0 of the encoder and of the decoder hold 16 real experts; all other
chunks are missing, which zarr reads as zeros. The routers send nearly every token to the real experts.
Weights are normal with the variance that keeps the size of activations: every row of an expert then has about
a tenth of its weights beyond half of its extremes, as trained ones do. A folder that is complete is used
again.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import itertools
import json
import math
import os
import shutil
import zlib
from pathlib import Path

import numpy as np
import tensorstore as ts
from flax import traverse_util
from rich.progress import Progress

import qmoe_jax as qj
from qmoe_jax.checkpoints.architecture import expected_shapes
from qmoe_jax.checkpoints.t5x.reader import stored_name
from qmoe_jax.checkpoints.t5x.writer import chunk_shape
from qmoe_jax.data import Example
from qmoe_jax.files.msgpack import encode_tree
from qmoe_jax.parameters import EMBEDDING, STACKS, is_expert

SHARED_FEATURE = 8.0
"""Value of feature 0 in every row of the embedding: by it a router tells one expert from the others, whatever
the token."""

ENCODER_LENGTH, DECODER_LENGTH = 512, 128
"""Tokens of a sample."""

SHARPNESS = 4.0
"""Standard deviation of the logits of a router; large enough that router probabilities are not small."""

FAVOR = 12.0
"""Excess of the logits of real experts over those of the others, which are zero: 3 standard deviations."""

_SPECIFICATION = "slice.json"
_COMPRESSOR = {"id": "gzip", "level": 1}  # T5X's


@dataclasses.dataclass(frozen=True)
class Slice:
    """A model of which some layers and experts have weights.

    Attributes:
        model: the architecture.
        layers: layers that are real in each stack, from 0 on.
        experts: experts that are real in each sparse layer of these, from 0 on.
        experts_per_chunk: experts that a chunk spans; T5X's choice follows from the number of hosts that
            wrote the checkpoint, and is 256 for switch-c-2048.
        hot: share of the tokens that expert 0 gets; None for an even share.
        seed: of all weights.
    """

    model: qj.SwitchConfig
    layers: int = 1
    experts: int = 16
    experts_per_chunk: int = 256
    hot: float | None = None
    seed: int = 0

    @property
    def layer_option(self) -> str:
        """Value of `CompressionConfig.layers` that selects the real layers."""
        last = self.layers - 1
        return "0" if last == 0 else f"0-{last}"

    @property
    def expert_option(self) -> str:
        """Value of `CompressionConfig.experts` that selects the real experts."""
        return f"0-{self.experts - 1}"

    @property
    def is_whole(self) -> bool:
        """True if every layer and every expert of the model is real."""
        depth = max(self.model.num_layers(stack) for stack in STACKS)
        return self.layers >= depth and self.experts >= self.model.num_experts

    @property
    def expert_count(self) -> int:
        """Number of real experts in all layers."""
        sparse = [layer for stack in STACKS for layer in self.model.sparse_layers(stack)]
        return self.experts * sum(layer < self.layers for layer in sparse)

    def is_real(self, name: str) -> bool:
        """Return True if a parameter is written; of expert kernels, that of some experts."""
        stack, _, rest = name.partition("/")
        if name == EMBEDDING:
            return True
        if stack not in STACKS or not rest.startswith("layers_"):
            return rest != "logits_dense/kernel"
        return int(rest.split("/")[0].removeprefix("layers_")) < self.layers


def write(folder: Path, what: Slice) -> Path:
    """Write the checkpoint to `folder` unless it is there, and return the path to open.

    Memory: two chunks of at most 64 MiB per core, and the largest dense parameter.
    """
    specification = json.dumps(dataclasses.asdict(what), indent=1) + "\n"
    marker = folder / _SPECIFICATION
    if marker.exists() and marker.read_text() == specification:
        return folder / "checkpoint_1"
    if folder.exists():
        shutil.rmtree(folder / "checkpoint_1", ignore_errors=True)
        marker.unlink(missing_ok=True)
    checkpoint = folder / "checkpoint_1"
    checkpoint.mkdir(parents=True)
    shapes = expected_shapes(what.model)
    specs = {name: _spec(name, shape, what) for name, shape in shapes.items()}
    _write_index(checkpoint, specs)
    stores = {name: _create(checkpoint, name, spec) for name, spec in specs.items()}
    tasks = [
        task for name, store in stores.items() if what.is_real(name) for task in _tasks(name, store, what)
    ]
    with Progress() as progress, concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        bar = progress.add_task("chunks", total=len(tasks))
        for _ in pool.map(_Task.run, tasks):
            progress.advance(bar)
    marker.write_text(specification)
    return checkpoint


def examples(what: Slice, tokens: int) -> list[Example]:
    """Return samples of random ids with at least `tokens` encoder tokens in all."""
    rng = np.random.default_rng(what.seed + 1)
    last = min(what.model.vocab_size, 32000)
    start = [what.model.decoder_start_id]
    draw = lambda length: rng.integers(2, last, length, dtype=np.int32)
    return [
        Example(draw(ENCODER_LENGTH), np.concatenate([start, draw(DECODER_LENGTH - 1)]).astype(np.int32))
        for _ in range(-(-tokens // ENCODER_LENGTH))
    ]


def _spec(name: str, shape: tuple[int, ...], what: Slice) -> dict[str, object]:
    """Return the spec of an array as it stands in the msgpack, without its place."""
    written = (min(what.experts_per_chunk, shape[0]), *shape[1:]) if is_expert(name) else shape
    metadata = {
        "chunks": chunk_shape(written, 4),
        "compressor": _COMPRESSOR,
        "shape": list(shape),
    }
    return {"driver": "zarr", "dtype": "float32", "metadata": metadata}


def _write_index(checkpoint: Path, specs: dict[str, dict[str, object]]) -> None:
    """Write the msgpack that names the arrays, as T5X's `Checkpointer` does."""
    leaves = {
        name: {**spec, "kvstore": {"driver": "file", "path": f"{stored_name(name)}/"}}
        for name, spec in specs.items()
    }
    target = traverse_util.unflatten_dict(leaves, sep="/")
    optimizer = {"state": {"step": np.asarray(1, np.int32)}, "target": target}
    (checkpoint / "checkpoint").write_bytes(encode_tree({"version": 3, "optimizer": optimizer}))


def _create(checkpoint: Path, name: str, spec: dict[str, object]) -> ts.TensorStore:
    """Create an array whose missing chunks are zeros."""
    kvstore = {"driver": "file", "path": f"{checkpoint.absolute()}/{stored_name(name)}/"}
    return ts.open({**spec, "kvstore": kvstore}, create=True, fill_value=0.0).result()


@dataclasses.dataclass(frozen=True)
class _Task:
    """One chunk of an expert kernel, or one dense parameter, to write.

    Attributes:
        store: the array.
        name: its name.
        what: the slice.
        place: the part to write.
    """

    store: ts.TensorStore
    name: str
    what: Slice
    place: tuple[slice, ...]

    def run(self) -> None:
        """Draw the values and write them."""
        shape = tuple(part.stop - part.start for part in self.place)
        values = self._expert_values(shape) if is_expert(self.name) else self._dense_values(shape)
        self.store[self.place].write(values).result()

    @property
    def _rng(self) -> np.random.Generator:
        starts = [part.start for part in self.place]
        return np.random.default_rng([self.what.seed, zlib.crc32(self.name.encode()), *starts])

    def _expert_values(self, shape: tuple[int, ...]) -> np.ndarray:
        """Return real experts, and zeros for those beyond them."""
        values = np.zeros(shape, np.float32)
        real = values[: max(0, self.what.experts - self.place[0].start)]
        self._rng.standard_normal(out=real, dtype=np.float32)
        real *= self.store.shape[1] ** -0.5
        return values

    def _dense_values(self, shape: tuple[int, ...]) -> np.ndarray:
        if self.name.endswith("/scale"):
            return np.ones(shape, np.float32)
        if "/router/" in self.name:
            return self._router(shape)
        values = self._rng.standard_normal(shape, np.float32)
        if self.name == EMBEDDING:
            values[:, 0] = SHARED_FEATURE
        if self.name.endswith("/kernel"):
            values *= shape[0] ** -0.5
        if self.name.endswith("/query/kernel"):
            values *= self.what.model.d_kv**-0.5  # T5's logits are not scaled
        # Attention neither reads nor writes the shared feature: it would move all tokens in one direction.
        if self.name.endswith(("/query/kernel", "/key/kernel", "/value/kernel")):
            values[0] = 0
        if self.name.endswith("/out/kernel"):
            values[:, 0] = 0
        return values

    def _router(self, shape: tuple[int, ...]) -> np.ndarray:
        """Return a router that sends tokens to the real experts, as evenly as `what.hot` says."""
        values = np.zeros(shape, np.float32)
        real = values[:, : self.what.experts]
        real[:] = self._rng.standard_normal(real.shape, np.float32) * SHARPNESS * shape[0] ** -0.5
        real[0] = FAVOR / SHARED_FEATURE
        if self.what.hot is not None:
            real[0, 0] += _advantage(self.what.experts, self.what.hot) / SHARED_FEATURE
        # A router reads normed states; the features but the first have variance 1 before.
        real *= math.sqrt(1 + SHARED_FEATURE**2 / shape[0])
        return values


def _advantage(experts: int, share: float) -> float:
    """Return what an expert's logit needs over the others' to be the largest for `share` of the tokens."""
    logits = SHARPNESS * np.random.default_rng(0).standard_normal((100_000, experts))
    return float(np.quantile(logits[:, 1:].max(1) - logits[:, 0], share))


def _tasks(name: str, store: ts.TensorStore, what: Slice) -> list[_Task]:
    """Return the parts to write: of an expert kernel the chunks that hold a real expert, else all."""
    if not is_expert(name):
        return [_Task(store, name, what, tuple(slice(0, size) for size in store.shape))]
    chunk = store.chunk_layout.read_chunk.shape
    ends = (min(what.experts, store.shape[0]), *store.shape[1:])
    starts = itertools.product(*(range(0, end, step) for end, step in zip(ends, chunk, strict=True)))
    return [
        _Task(
            store,
            name,
            what,
            tuple(
                slice(start, min(start + step, size))
                for start, step, size in zip(corner, chunk, store.shape, strict=True)
            ),
        )
        for corner in starts
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--preset", choices=sorted(qj.PRESETS), default="switch-c-2048")
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--experts-per-chunk", type=int, default=256)
    parser.add_argument("--hot", type=float, help="share of the tokens of expert 0")
    options = parser.parse_args()
    what = Slice(
        qj.PRESETS[options.preset],
        experts=options.experts,
        experts_per_chunk=options.experts_per_chunk,
        hot=options.hot,
    )
    print(write(options.folder, what))


if __name__ == "__main__":
    main()
