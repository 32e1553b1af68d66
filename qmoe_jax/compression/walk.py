"""A walk over a model, layer by layer, that compresses each layer on the outputs of those before it.

A stage of the walk is an attention pass over all tokens, up to the router of the next layer with experts, and
a pass over that layer's expert groups. Between the passes the hidden states lie on disk, expert-major
(`token_store.py`), which is also where an interrupted run goes on: it repeats a layer at most. Without these
files the walk begins anew, and finished groups are read from the artifact instead of being quantized.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from qmoe_jax.artifact.groups import GroupKey
from qmoe_jax.artifact.selection import expert_ranges
from qmoe_jax.checkpoints.params import nest, parameter_dtype, to_device
from qmoe_jax.checkpoints.reader import Checkpoint
from qmoe_jax.compression.attention import AttentionPass, RoutedSlab, SlabStates
from qmoe_jax.compression.costs import Kind
from qmoe_jax.compression.experts import ExpertPass, Job, part_name
from qmoe_jax.compression.options import CompressionConfig
from qmoe_jax.compression.pipeline import Stage, Worker, ahead
from qmoe_jax.compression.resume import GroupStore
from qmoe_jax.compression.scratch import Scratch
from qmoe_jax.compression.slabs import Slab, TokenOrder
from qmoe_jax.compression.steps import Step, steps_of
from qmoe_jax.compression.token_store import PartWriter, TokenStore, part_names, remove_store
from qmoe_jax.compression.tokens import Routing, kept_tokens
from qmoe_jax.compression.wave import replicate
from qmoe_jax.compression.work import WorkTally
from qmoe_jax.config import SwitchConfig
from qmoe_jax.data import Examples
from qmoe_jax.distributed import Hosts
from qmoe_jax.files.errors import CheckpointError
from qmoe_jax.files.tensor import ChunkedTensor
from qmoe_jax.parameters import EMBEDDING, ExpertKernel, expert_matrices, is_expert


@dataclasses.dataclass(frozen=True)
class Walk:
    """Every example through the stacks, compressing on the way.

    Attributes:
        reader: the checkpoint.
        groups: the experts, original and finished.
        examples: the calibration samples.
        config: the options.
        scratch: where hidden states lie.
        mesh: the devices of this process.
        hosts: the processes of the run.
        stages: times of the stages that work at once.
    """

    reader: Checkpoint
    groups: GroupStore
    examples: Examples
    config: CompressionConfig
    scratch: Scratch
    mesh: Mesh
    hosts: Hosts
    stages: Mapping[str, Stage]

    @property
    def model(self) -> SwitchConfig:
        """The architecture."""
        return self.reader.config

    @cached_property
    def steps(self) -> list[Step]:
        """The stages of the walk."""
        return steps_of(self.model, self.config)

    @cached_property
    def orders(self) -> dict[str, TokenOrder]:
        """The order of each stack's tokens."""
        encoder, decoder = ([len(example[side]) for example in self.examples] for side in (0, 1))
        heads, row_bytes = self.model.num_heads, 4 * self.model.d_model
        return {
            "encoder": TokenOrder.of(encoder, None, heads, row_bytes),
            "decoder": TokenOrder.of(decoder, encoder, heads, row_bytes),
        }

    def run(self, tally: WorkTally) -> None:
        """Run from where an earlier run stopped to the end."""
        for number in range(self.begin, len(self.steps)):
            step = self.steps[number]
            attention = self._attention(step)
            if not self._is_routed(step):
                tally.begin(step.name, "attention")
                self._attend(number, attention, tally)
                self.hosts.barrier(f"attention {number}")
                self._remove_states_before(number)
            if step.sparse is not None:
                tally.begin(step.name, "experts")
                self._run_experts(step, attention, tally)
                self.hosts.barrier(f"experts {number}")
                self._remove_routed_data(step)

    def shares_done(self) -> dict[tuple[str, Kind], float]:
        """Return the share of the work of each step and kind that an earlier run has done."""
        done = {(step.name, kind): 1.0 for step in self.steps[: self.begin] for kind in Kind}
        for step in self.steps[self.begin :]:
            if step.sparse is not None and (count := len(self._own_groups(step))):
                jobs = self._jobs(step)
                quantized = count - sum(job.quantizes for job in jobs)
                done |= {(step.name, kind): quantized / count for kind in (Kind.CALIBRATE, Kind.QUANTIZE)}
                done[step.name, Kind.FORWARD] = 1 - len(jobs) / count
        if self._is_routed(first := self.steps[self.begin]):
            done[first.name, Kind.ATTENTION] = 1.0
        return done

    def reads(self) -> list[tuple[str, range]]:
        """Return the original experts that this host will read, in order."""
        names = expert_matrices(self.model)
        return [
            (ExpertKernel(job.key.stack, job.key.layer, name).path, job.experts)
            for step in self.steps[self.begin :]
            for job in self._jobs(step)
            if not job.finished
            for name in names
        ]

    # Where to go on.

    @cached_property
    def begin(self) -> int:
        """The number of the step to go on with."""
        return self.scratch.agreed("resume", self._find_begin)

    def _find_begin(self) -> int:
        """Return the last step whose hidden states are there in every byte; 0, with none left, else."""
        intact = 0  # steps in front of which every group is finished
        while intact < len(self.steps) and all(map(self.groups.done, self._keys(self.steps[intact]))):
            intact += 1
        try:
            for number in reversed(range(min(intact + 1, len(self.steps)))):
                if (stores := self._stores(number)) is not None:
                    for store in stores:
                        store.verify()
                    return number
        except CheckpointError as error:
            remedy = "none needed: hidden states are computed again, from the first layer on"
            warnings.warn(str(error.with_remedy(remedy)), stacklevel=2)
        self.scratch.clear()
        return 0

    def _stores(self, number: int) -> list[TokenStore] | None:
        """Return the hidden states with which step `number` can go on; None where they are not there.

        Raises:
            CheckpointError: an index is damaged.
        """
        step, stores = self.steps[number], []
        if step.stack == "decoder":
            if not (names := _host_parts(self._final)):
                return None
            stores.append(TokenStore(self._final, names, self.model.d_model))
        if self._is_routed(step):
            done = part_names(self._computed(step))
            return [*stores, self._open_routed(step), self._open_computed(step, done)]
        if not number or self.steps[number - 1].stack != step.stack:
            return stores or None
        earlier = self.steps[number - 1]
        if set(self._parts()) <= set(part_names(self._computed(earlier))):
            return [*stores, self._open_computed(earlier)]
        return None

    def _is_routed(self, step: Step) -> bool:
        """Return whether the attention pass of a step is done, and its states are still there."""
        names = _host_parts(self._routed(step))
        return bool(names) and all((self._routed(step) / name).exists() for name in names)

    # Where things lie.

    def _routed(self, step: Step) -> Path:
        return self._final if step.sparse is None else self.scratch.root / f"{step.folder}.routed"

    def _computed(self, step: Step) -> Path:
        return self.scratch.root / f"{step.folder}.computed"

    @property
    def _final(self) -> Path:
        return self.scratch.root / "encoder.final"

    def _open_routed(self, step: Step) -> TokenStore:
        folder = self._routed(step)
        return TokenStore(folder, _host_parts(folder), self.model.d_model)

    def _open_computed(self, step: Step, names: Sequence[str] | None = None) -> TokenStore:
        return TokenStore(self._computed(step), self._parts() if names is None else names, self.model.d_model)

    def _remove_states_before(self, number: int) -> None:
        """Remove the hidden states that step `number` began with."""
        if self.hosts.first and number and self.steps[number - 1].sparse is not None:
            for folder in (self._computed, self._routed):
                remove_store(folder(self.steps[number - 1]))

    def _remove_routed_data(self, step: Step) -> None:
        """Remove the states in front of the experts; the routing stays, by which those behind are found."""
        if self.hosts.first:
            for name in _host_parts(self._routed(step)):
                (self._routed(step) / name).unlink(missing_ok=True)

    # The groups of a layer.

    def _keys(self, step: Step) -> list[GroupKey]:
        """Return the groups of a step's layer that are quantized."""
        if step.sparse is None or step.stack not in self.config.compressed_stacks:
            return []
        return list(self.groups.keys_of(step.stack, step.sparse))

    @cached_property
    def _ranges(self) -> list[range]:
        """The experts of each group of a layer."""
        return list(expert_ranges(self.groups.selection.experts, self.config.experts_per_group))

    @cached_property
    def _group_of(self) -> np.ndarray:
        """The group of each expert; the number of groups for experts that are not selected."""
        table = np.full(self.model.num_experts, len(self._ranges), np.int32)
        for number, experts in enumerate(self._ranges):
            table[experts.start : experts.stop] = number
        return table

    def _parts(self) -> list[str]:
        """Return the names of the parts that hold the states behind a layer's experts."""
        rest = len(self.groups.selection.experts) < self.model.num_experts
        return [part_name(number) for number in range(len(self._ranges) + rest)]

    def _jobs(self, step: Step) -> list[Job]:
        """Return this host's groups of a step's layer, but for those that are done."""
        if step.sparse is None:
            return []
        done = set() if step.last else set(part_names(self._computed(step)))
        compressed = step.stack in self.config.compressed_stacks
        jobs = []
        for number in self._own_groups(step):
            experts = self._ranges[number]
            key = GroupKey(step.stack, step.sparse, experts.start, experts.stop)
            finished = compressed and self.groups.finished_intact(key)
            if (finished or not compressed) and (step.last or part_name(number) in done):
                continue
            jobs.append(Job(number, key, finished, compressed and not finished))
        return jobs

    def _own_groups(self, step: Step) -> list[int]:
        """Return the numbers of the groups that this host takes: whole blocks of what chunks span."""
        assert step.sparse is not None
        names = [ExpertKernel(step.stack, step.sparse, name).path for name in expert_matrices(self.model)]
        tensors = [self.reader.tensors[name] for name in names]
        span = max([t.rows_per_chunk if isinstance(t, ChunkedTensor) else 1 for t in tensors])
        blocks: dict[int, list[int]] = {}
        for number, experts in enumerate(self._ranges):
            blocks.setdefault(experts.start // span, []).append(number)
        return [number for block in self.hosts.share(list(blocks.values())) for number in block]

    # The two passes of a step.

    def _attention(self, step: Step) -> AttentionPass:
        """Return the step's layers with their parameters on the devices."""
        layers = (*step.dense, *(() if step.sparse is None else (step.sparse,)))
        prefixes = [f"{step.stack}/relpos_bias/", *(f"{step.stack}/layers_{layer}/" for layer in layers)]
        if step.sparse is None:
            prefixes.append(f"{step.stack}/{step.stack}_norm/")
        names = [name for name in self.reader.names() if name.startswith(tuple(prefixes))]
        params: dict[str, Any] = {
            name.partition("/")[2]: self._param(name) for name in names if not is_expert(name)
        }
        contexts = self.orders["encoder"].lengths if step.stack == "decoder" else None
        return AttentionPass(
            self.model, step.stack, step.dense, step.sparse, nest(params), self.mesh,
            self.orders[step.stack], contexts, self.reader.path,
        )  # fmt: skip

    def _param(self, name: str) -> Any:
        """Read a parameter onto the devices, in float32."""
        dtype = parameter_dtype(name, np.float32)
        return replicate(self.mesh, to_device(self.reader.read_finite(name, dtype=dtype), dtype))

    def _attend(self, number: int, attention: AttentionPass, tally: WorkTally) -> None:
        """Run this host's slabs through a step's attention pass, and spill them by expert group."""
        step = self.steps[number]
        read, compute, store = (self.stages[name] for name in ("read", "compute", "store"))
        folder = self._routed(step)
        writer = PartWriter(folder, f"host-{self.hosts.index}-of-{self.hosts.count}")
        experts: list[np.ndarray] = []
        probabilities: list[np.ndarray] = []

        def keep(routed: RoutedSlab) -> None:
            if routed.expert is None or routed.probability is None:
                group = self._decoder_slab[np.repeat(routed.slab.examples, routed.slab.lengths)]
            else:
                experts.append(routed.expert)
                probabilities.append(routed.probability)
                group = self._group_of[routed.expert]
            writer.append_slab(routed.slab.number, routed.x, group)

        slabs = self.hosts.share(self.orders[step.stack].slabs)
        with (
            ahead(self._states(number, slabs), read, compute, depth=1) as states,
            Worker(store, compute, depth=1) as keeper,
        ):
            for state in states:
                with compute.working():
                    keeper.submit(keep, attention.run(state))
                    tally.advance(Kind.ATTENTION, len(state.x))
        joined = lambda arrays, dtype: np.concatenate([np.empty(0, dtype), *arrays])
        writer.finish(expert=joined(experts, np.uint16), probability=joined(probabilities, np.float32))

    def _states(self, number: int, slabs: Sequence[Slab]) -> Iterator[SlabStates]:
        """Yield the states that a step begins with."""
        step = self.steps[number]
        first = not number or self.steps[number - 1].stack != step.stack
        side = int(step.stack == "decoder")
        final = self._open_final() if side else None
        if first:
            embedding = self.reader.read_finite(EMBEDDING)
        else:
            earlier = self.steps[number - 1]
            store, routing = self._open_computed(earlier), self._routing_of(self._open_routed(earlier))
        for slab in slabs:
            if first:
                ids = np.concatenate([self.examples[example][side] for example in slab.examples])
                x = embedding[ids].astype(np.float32, copy=False)
            else:
                x = store.read_slab(slab.number, self._group_of[routing[0][slab.start : slab.stop]])
            yield SlabStates(slab, x, None if final is None else self._encoded(slab, final))

    def _routing_of(self, store: TokenStore) -> tuple[np.ndarray, np.ndarray]:
        """Return the expert of every token and its router probability."""
        parts = [store.arrays[name] for name in _host_parts(store.folder)]
        expert, probability = (np.concatenate([p[key] for p in parts]) for key in ("expert", "probability"))
        return expert, probability

    @cached_property
    def _decoder_slab(self) -> np.ndarray:
        """The slab of the decoder that each example is in."""
        number = np.empty(len(self.examples), np.int32)
        for slab in self.orders["decoder"].slabs:
            number[slab.examples] = slab.number
        return number

    @cached_property
    def _encoder_rank(self) -> np.ndarray:
        """The place of each example in the order of the encoder."""
        examples = np.concatenate([slab.examples for slab in self.orders["encoder"].slabs])
        rank = np.empty(len(examples), np.int64)
        rank[examples] = np.arange(len(examples))
        return rank

    def _open_final(self) -> TokenStore:
        """Return the encoder's final states, by the slab of the decoder that attends to them."""
        return TokenStore(self._final, _host_parts(self._final), self.model.d_model)

    def _encoded(self, slab: Slab, final: TokenStore) -> np.ndarray:
        """Return the encoder's states of a slab's examples, in the slab's order."""
        lengths, examples = self.orders["encoder"].lengths, slab.examples
        stored = examples[np.argsort(self._encoder_rank[examples])]
        pieces = [
            piece
            for each in final.slabs(slab.number)
            for piece in final.pieces(slab.number, each, final.segments[each, slab.number].rows)
        ]
        x, ends = np.concatenate(pieces), np.cumsum(lengths[stored])
        start = np.empty(len(lengths), np.int64)
        start[stored] = ends - lengths[stored]
        return np.concatenate([x[start[e] : start[e] + lengths[e]] for e in examples])

    def _run_experts(self, step: Step, attention: AttentionPass, tally: WorkTally) -> None:
        """Run this host's groups of a layer."""
        assert step.sparse is not None
        routed, model = self._open_routed(step), self.model
        keep = kept_tokens(self.examples, step.stack, self.config, model)
        routing = Routing.select(
            self.orders[step.stack], *self._routing_of(routed), keep, model.num_experts, self.config.token_cap
        )
        scale = attention.params[f"layers_{step.sparse}"]["pre_mlp_layer_norm"]["scale"]
        computed = None if step.last else self._computed(step)
        experts = ExpertPass(attention, self.groups, routed, routing, computed, scale, self.stages, tally)
        experts.run(self._jobs(step))
        rest = len(self._ranges)
        if computed is not None and self.hosts.first and part_name(rest) in self._parts():
            _copy_part(routed, computed, rest, experts.rows)


def _copy_part(routed: TokenStore, folder: Path, group: int, rows: int) -> None:
    """Copy the states of tokens whose experts are not selected: they pass the layer unchanged."""
    writer = PartWriter(folder, part_name(group))
    for slab in routed.slabs(group):
        for piece in routed.pieces(group, slab, rows):
            writer.append(slab, group, piece)
    writer.finish()


def _host_parts(folder: Path) -> list[str]:
    """Return the parts that the hosts of one run wrote, in their order; none unless all of them did."""
    found: dict[int, set[int]] = {}
    for name in part_names(folder):
        if match := re.fullmatch(r"host-(\d+)-of-(\d+)", name):
            found.setdefault(int(match[2]), set()).add(int(match[1]))
    for count, indexes in sorted(found.items()):
        if indexes == set(range(count)):
            return [f"host-{index}-of-{count}" for index in range(count)]
    return []
