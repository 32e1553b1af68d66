"""Memory and disk that a compression needs, term by term, and a refusal where they are not there.

Every term is a bound from shapes: none grows with the heat of an expert, and of memory only a few bytes per
token grow with the calibration text.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path

import jax
import numpy as np

from qmoe_jax.artifact.kinds import LEVEL_DTYPES
from qmoe_jax.checkpoints.architecture import expected_shapes
from qmoe_jax.checkpoints.reader import Checkpoint
from qmoe_jax.checkpoints.staging import BLOCKS_PER_MATRIX
from qmoe_jax.coding import tunstall_codebook
from qmoe_jax.coding.statistics import entropy_bits
from qmoe_jax.compression.options import CompressionConfig
from qmoe_jax.compression.planning.costs import SINGLE_EXPERTS, ExpertStorage, TokenCounts
from qmoe_jax.compression.tokens.chunks import CHUNKS_AHEAD, most_rows
from qmoe_jax.compression.tokens.slabs import ATTENTION_BYTES, SLAB_BYTES
from qmoe_jax.config import SwitchConfig
from qmoe_jax.files.errors import CheckpointError
from qmoe_jax.inference.blockwise.states import BATCH_TOKENS
from qmoe_jax.memory import usable_memory
from qmoe_jax.parameters import EMBEDDING, STACKS, expert_matrices, expert_shapes, is_expert

Terms = Mapping[str, int]
"""Bytes by what they are for."""

PROGRAM_BYTES = 800 << 20
"""Memory of Python, jax and compiled programs (0.8 GB)."""

SLABS_IN_MEMORY = 6
"""Slabs of hidden states at a time: in the making, ready, under way with its result, being written twice."""

GROUPS_AHEAD = 3
"""Expert groups per device in the host's memory: in the making, ready, and on their way to the device."""

BYTES_PER_TOKEN = 4 + 7 + 24
"""Memory per token: its id, its routing (expert, probability, calibrates), and sorting the tokens."""

CHUNK_BYTES = 1 << 26
"""Size of a decoded chunk, of which each core has one under way (64 MiB, as T5X writes them)."""

STATE_COPIES = 2
"""Copies of a stack's hidden states on the disk: an attention pass reads the old and writes the new."""

ASSUMED_ZEROS = 0.885
"""Share of zeros among the digits of a trained model: QMoE's for c-2048."""


UPSTREAM_EXCESS = 1.1
"""Bits of upstream's code per bit of entropy, about."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """The memory and disk that there are, in bytes; None where it is unknown or without limit.

    Attributes:
        memory: of the host, for this process.
        device: of each device.
        scratch: for the scratch folder, what already lies there included.
        artifact: for the artifact, what already lies there included.
        one_disk: whether both lie on the same file system.
    """

    memory: int | None = None
    device: int | None = None
    scratch: int | None = None
    artifact: int | None = None
    one_disk: bool = False

    @classmethod
    def here(cls, output: Path | None, scratch: Path | None) -> Limits:
        """Return the limits of this machine, for folders that may be missing; None: not on this machine."""
        device = jax.local_devices()[0]
        statistics = device.memory_stats() if device.platform != "cpu" else None
        disks = [os.stat(nearest_folder(folder)).st_dev for folder in (output, scratch) if folder is not None]
        return cls(
            usable_memory(),
            (statistics or {}).get("bytes_limit"),
            None if scratch is None else _room(scratch),
            None if output is None else _room(output),
            len(disks) == 2 and disks[0] == disks[1],
        )


@dataclasses.dataclass(frozen=True)
class Resources:
    """Memory and disk that a compression needs, and where they are not there.

    Attributes:
        model: the architecture.
        config: the options.
        tokens: size of the calibration text.
        storage: of the checkpoint's experts.
        devices: devices of each host.
        on_host: true where the devices are the host's own processor, whose memory they take.
    """

    model: SwitchConfig
    config: CompressionConfig
    tokens: TokenCounts
    storage: ExpertStorage = SINGLE_EXPERTS
    devices: int = 1
    on_host: bool = True

    @cached_property
    def memory(self) -> Terms:
        """Memory of each host."""
        model, states = self.model, self._states(max(STACKS, key=self.tokens.in_stack))
        row = 4 * model.d_model
        terms = {
            "program": PROGRAM_BYTES,
            "parameters outside the experts": self._layer_bytes + self._embedding_bytes,
            "slabs of hidden states": SLABS_IN_MEMORY * min(SLAB_BYTES, states),
            "chunks of tokens": (CHUNKS_AHEAD + 2) * self.devices * self._chunk * row,
            "expert groups ahead": GROUPS_AHEAD * self.devices * self._group * self._expert_bytes,
            "coding": 2 * self.devices * self._group * (self._expert_bytes // 4),
            "staging": self._staging_memory,
            "token ids and routing": BYTES_PER_TOKEN * (self.tokens.encoder + self.tokens.decoder),
        }
        if self.on_host:
            terms |= {f"device: {name}": self.devices * size for name, size in self.device.items()}
        return {name: size for name, size in terms.items() if size}

    @cached_property
    def device(self) -> Terms:
        """Memory of each device."""
        model, count = self.model, self._group
        calibrates = self.config.method == "gptq"
        width = model.num_heads * model.d_kv
        return {
            "weights of a group, twice": 2 * count * self._expert_bytes,
            "Hessians and factors": 4 * count * (model.d_model**2 + 3 * model.d_ff**2) if calibrates else 0,
            "GPTQ": 8 * count * model.d_model * model.d_ff,
            "activations": 8 * max(self._chunk * model.d_ff, min(BATCH_TOKENS, self._most) * 3 * width),
            "attention weights": 2 * min(ATTENTION_BYTES, 4 * model.num_heads * self._longest**2 * 16),
            "parameters of a layer": self._layer_bytes,
        }

    @cached_property
    def scratch(self) -> Terms:
        """Scratch files of all hosts together."""
        encoder, decoder = (STATE_COPIES * self._states(stack) for stack in STACKS)
        stacks = self.config.selection(self.model).layers
        runs_decoder = "decoder" in self.config.compressed_stacks and stacks["decoder"]
        if runs_decoder:
            decoder += self._states("encoder")
        states = max(encoder, decoder) if runs_decoder else encoder
        terms = {"hidden states": states}
        if self.storage.span > 1:
            named = min(self.storage.span, len(self._experts))
            weights = self.storage.itemsize * self._expert_bytes // 4
            terms["staged experts"] = BLOCKS_PER_MATRIX * named * weights
        return terms

    @cached_property
    def artifact(self) -> Terms:
        """Size of the artifact, with zeros as `ASSUMED_ZEROS`."""
        shapes = expert_shapes(self.model).values()
        config, experts, whole = self.config, len(self._experts), self.model.num_experts
        selected = config.selection(self.model).layers
        compressed = {
            stack: len(set(self.model.sparse_layers(stack)) & set(selected[stack]))
            for stack in config.compressed_stacks
        }
        count = experts * sum(compressed.values())
        groups = lambda columns: -(-columns // (config.group_size or columns))
        rows = sum(rows * (4 * groups(columns)) for rows, columns in shapes)
        level_bytes = LEVEL_DTYPES[config.level_dtype].itemsize // 2 * rows
        weights = sum(math.prod(shape) for shape in shapes)
        terms = {
            "codes": count * math.ceil(weights * bits_per_weight(config) / 8),
            "levels and counts": count * (level_bytes + 2 * sum(rows for rows, _ in shapes)),
            "levels in float32, until it is finished": count * 2 * rows,
            "other parameters": self._other_bytes,
        }
        skipped = [stack for stack in STACKS if stack not in config.compressed_stacks]
        layers = sum(len(self.model.sparse_layers(stack)) for stack in skipped)
        terms["skipped experts"] = layers * whole * self.storage.itemsize * self._expert_bytes // 4
        return {name: size for name, size in terms.items() if size}

    def problems(self, limits: Limits, *, output: object, scratch: object) -> Iterator[CheckpointError]:
        """Yield what does not fit, each with what to change.

        Args:
            limits: what there is.
            output: path of the artifact, for messages.
            scratch: path of the scratch folder, for messages.
        """
        if _exceeds(self.memory, limits.memory):
            yield _problem(
                "the compression takes more memory than there is", output, self.memory, limits.memory,
                self._smaller(lambda other: not _exceeds(other.memory, limits.memory)),
            )  # fmt: skip
        if not self.on_host and _exceeds(self.device, limits.device):
            yield _problem(
                "the compression takes more memory than a device has", output, self.device, limits.device,
                self._smaller(lambda other: not _exceeds(other.device, limits.device)),
            )  # fmt: skip
        on_scratch: Terms = self.scratch
        if limits.one_disk and limits.artifact is not None and limits.scratch is not None:
            on_scratch = {**self.scratch, "artifact": sum(self.artifact.values())}
        elif _exceeds(self.artifact, limits.artifact):
            remedy = "choose an output directory on a larger disk"
            yield _problem(
                "the artifact does not fit on the disk", output, self.artifact, limits.artifact, remedy
            )
        if _exceeds(on_scratch, limits.scratch):
            yield _problem(
                "the scratch files do not fit on the disk", scratch, on_scratch, limits.scratch,
                "choose a folder on a larger disk (--scratch, scratch=)" + self._fewer_samples(limits),
            )  # fmt: skip

    def _fewer_samples(self, limits: Limits) -> str:
        """Return the advice to calibrate on fewer samples, where that is enough."""
        fixed = self.scratch.get("staged experts", 0)
        if limits.one_disk:
            fixed += sum(self.artifact.values())
        share = ((limits.scratch or 0) - fixed) / max(self.scratch["hidden states"], 1)
        samples = int(0.95 * share * self.tokens.samples)
        return f", or calibrate on at most {samples:,} samples (--samples)" if samples > 0 else ""

    def _smaller(self, fits: Callable[[Resources], bool]) -> str:
        """Return the advice to quantize fewer experts together, or on fewer devices."""
        size = self.config.experts_per_group // 2
        while size:
            if fits(self._with(experts_per_group=size)):
                return (
                    f"quantize fewer experts together (--experts-per-group {size}, experts_per_group={size})"
                )
            size //= 2
        if self.devices > 1 and fits(self._with(devices=1, experts_per_group=1)):
            return "use fewer devices (--devices, devices=) and --experts-per-group 1"
        return "use a machine with more memory"

    def _with(self, *, experts_per_group: int, devices: int | None = None) -> Resources:
        config = dataclasses.replace(self.config, experts_per_group=experts_per_group)
        return dataclasses.replace(self, config=config, devices=devices or self.devices)

    @property
    def _experts(self) -> range:
        return self.config.selection(self.model).experts

    @property
    def _group(self) -> int:
        return min(self.config.experts_per_group, len(self._experts))

    @property
    def _expert_bytes(self) -> int:
        """Bytes of an expert in float32."""
        return 4 * sum(math.prod(shape) for shape in expert_shapes(self.model).values())

    @property
    def _most(self) -> int:
        return max(map(self.tokens.in_stack, STACKS))

    @property
    def _longest(self) -> int:
        return max(map(self.tokens.padded_length, STACKS))

    @property
    def _chunk(self) -> int:
        """Tokens of a chunk."""
        return min(most_rows(self.model), max(16, 1 << (self._most - 1).bit_length()))

    def _states(self, stack: str) -> int:
        return 4 * self.model.d_model * self.tokens.in_stack(stack)

    @cached_property
    def _shapes(self) -> dict[str, int]:
        """Numbers of values of the parameters outside of experts."""
        shapes = expected_shapes(self.model)
        return {name: math.prod(shape) for name, shape in shapes.items() if not is_expert(name)}

    @property
    def _other_bytes(self) -> int:
        return self.storage.itemsize * sum(self._shapes.values())

    @property
    def _embedding_bytes(self) -> int:
        return 4 * self._shapes[EMBEDDING]

    @property
    def _layer_bytes(self) -> int:
        """Bytes of the largest layer's parameters outside of experts, in float32."""
        sizes: dict[str, int] = {}
        for name, size in self._shapes.items():
            if "/layers_" in name:
                layer = "/".join(name.split("/")[:2])
                sizes[layer] = sizes.get(layer, 0) + 4 * size
        return max(sizes.values())

    @property
    def _staging_memory(self) -> int:
        """Bytes of a block's experts in as many columns as a chunk spans, and of chunks that make them."""
        if self.storage.span == 1:
            return 0
        shapes = expert_shapes(self.model)
        outputs = max(shapes[name][0] for name in expert_matrices(self.model))
        named = min(self.storage.span, len(self._experts))
        chunks = (os.cpu_count() or 1) * CHUNK_BYTES
        return self.storage.itemsize * named * self.storage.columns * outputs + chunks


def bits_per_weight(config: CompressionConfig, zeros: float = ASSUMED_ZEROS) -> float:
    """Return the bits of a weight's digit, where a share of `zeros` of independent digits is zero."""
    if config.bits != "ternary":
        return float(config.bits)
    if config.codebook == "upstream":
        frequencies = np.array([zeros, (1 - zeros) / 2, (1 - zeros) / 2])
        return UPSTREAM_EXCESS * entropy_bits(frequencies)
    codebook = tunstall_codebook(zeros, int(config.codebook.removeprefix("tunstall-")))
    lengths = np.asarray(codebook.lengths, np.int64)
    places = np.arange(codebook.digits.shape[1]) < lengths[:, None]
    each = np.where(codebook.digits == 0, zeros, (1 - zeros) / 2)
    probability = np.where(places, each, 1.0).prod(axis=1)
    return float(8 * codebook.code_dtype.itemsize / (probability * lengths).sum())


def require_resources(
    reader: Checkpoint,
    config: CompressionConfig,
    tokens: TokenCounts,
    *,
    output: Path | None,
    scratch: Path | None,
    devices: int = 1,
) -> None:
    """Check that memory and disk hold a compression; costs no more than a look at the folders.

    Raises:
        CheckpointError: they do not; says what to change.
    """
    on_host = jax.local_devices()[0].platform == "cpu"
    resources = Resources(reader.config, config, tokens, ExpertStorage.of(reader), devices, on_host)
    limits = Limits.here(output, scratch)
    for problem in resources.problems(limits, output=output, scratch=scratch):
        raise problem


def _exceeds(terms: Terms, limit: int | None) -> bool:
    return limit is not None and sum(terms.values()) > limit


def _problem(problem: str, path: object, terms: Terms, limit: int | None, remedy: str) -> CheckpointError:
    largest = sorted(terms.items(), key=lambda term: -term[1])[:4]
    named = ", ".join(f"{name} {size / 1e9:,.1f} GB" for name, size in largest)
    return CheckpointError(
        problem,
        path=path,
        expected=f"{sum(terms.values()) / 1e9:,.1f} GB ({named})",
        found=f"{(limit or 0) / 1e9:,.1f} GB",
        remedy=remedy,
    )


def nearest_folder(folder: Path) -> Path:
    """Return a folder, or the nearest one around it that exists."""
    return next(place for place in (folder, *folder.absolute().parents) if place.is_dir())


def _room(folder: Path) -> int | None:
    """Return the bytes that a folder may hold; None where the file system does not tell."""
    found = os.statvfs(nearest_folder(folder))
    if not found.f_blocks:
        return None
    held = (
        sum(entry.stat().st_size for entry in folder.rglob("*") if entry.is_file()) if folder.is_dir() else 0
    )
    return found.f_bavail * found.f_frsize + held
