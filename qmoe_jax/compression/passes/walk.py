"""A walk over a model, layer by layer, that compresses each layer on the outputs of those before it.

A stage of the walk is an attention pass over all tokens, up to the router of the next layer with experts, and
a pass over that layer's expert groups. Between the passes the hidden states lie on disk, expert-major
(`tokens/store.py`), which is also where an interrupted run goes on: it repeats a layer at most. Without these
files the walk begins anew, and finished groups are read from the artifact instead of being quantized.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from jax.sharding import Mesh

from qmoe_jax.artifact.groups import GroupKey
from qmoe_jax.artifact.selection import expert_ranges
from qmoe_jax.checkpoints.params import nest, parameter_dtype, to_device
from qmoe_jax.checkpoints.reader import Checkpoint
from qmoe_jax.compression.options import CompressionConfig
from qmoe_jax.compression.passes.attention import AttentionPass, RoutedSlab, SlabStates
from qmoe_jax.compression.passes.experts import ExpertPass, Job
from qmoe_jax.compression.passes.pipeline import Stage, Worker, ahead
from qmoe_jax.compression.passes.wave import replicate
from qmoe_jax.compression.planning.costs import Kind
from qmoe_jax.compression.planning.work import WorkTally
from qmoe_jax.compression.resume import GroupStore
from qmoe_jax.compression.scratch import Scratch
from qmoe_jax.compression.steps import Step, steps_of
from qmoe_jax.compression.tokens.group_part import GroupPart, part_name
from qmoe_jax.compression.tokens.routing import Routing, kept_tokens
from qmoe_jax.compression.tokens.slabs import Slab, TokenOrder
from qmoe_jax.compression.tokens.states import StatesOnDisk, routing_of
from qmoe_jax.compression.tokens.store import PartWriter, TokenStore, part_names
from qmoe_jax.config import SwitchConfig
from qmoe_jax.data import Examples
from qmoe_jax.distributed import Hosts
from qmoe_jax.files.errors import CheckpointError
from qmoe_jax.files.tensor import ChunkedTensor
from qmoe_jax.parameters import EMBEDDING, ExpertKernel, expert_matrices, is_expert

STAGES = ("weights", "tokens", "compute", "code", "store")
"""The stages that work at once, a thread each: reading weights and tokens, the devices, coding and writing
groups, and storing tokens."""


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
        stages: times of the stages that work at once, by name.
    """

    reader: Checkpoint
    groups: GroupStore
    examples: Examples
    config: CompressionConfig
    scratch: Scratch
    mesh: Mesh
    hosts: Hosts
    stages: Mapping[str, Stage] = dataclasses.field(
        default_factory=lambda: {name: Stage(name) for name in STAGES}
    )

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
            if not self.states.is_routed(step):
                tally.begin(step.name, "attention")
                self._attend(number, attention, tally)
                self.hosts.barrier(f"attention {number}")
                if number and self.hosts.first:
                    self.states.remove(self.steps[number - 1])
            if step.sparse is not None:
                tally.begin(step.name, "experts")
                self._run_experts(step, attention, tally)
                self.hosts.barrier(f"experts {number}")
                if self.hosts.first:
                    self.states.remove_routed_data(step)

    def shares_done(self) -> dict[tuple[str, Kind], float]:
        """Return the share of the work of each step and kind that an earlier run has done."""
        done = {(step.name, kind): 1.0 for step in self.steps[: self.begin] for kind in Kind}
        for step in self.steps[self.begin :]:
            if step.sparse is not None and (count := len(self._own_groups(step))):
                jobs = self._jobs(step)
                quantized = count - sum(job.quantizes for job in jobs)
                done |= {(step.name, kind): quantized / count for kind in (Kind.CALIBRATE, Kind.QUANTIZE)}
                done[step.name, Kind.FORWARD] = 1 - len(jobs) / count
        if self.states.is_routed(first := self.steps[self.begin]):
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

    @cached_property
    def states(self) -> StatesOnDisk:
        """The folders of hidden states."""
        rest = len(self.groups.selection.experts) < self.model.num_experts
        parts = [part_name(number) for number in range(len(self._ranges) + rest)]
        return StatesOnDisk(self.scratch.root, self.model.d_model, tuple(parts))

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
                if (stores := self.states.stores(self.steps, number)) is not None:
                    for store in stores:
                        store.verify()
                    return number
        except CheckpointError as error:
            remedy = "none needed: hidden states are computed again, from the first layer on"
            warnings.warn(str(error.with_remedy(remedy)), stacklevel=2)
        self.scratch.clear()
        return 0

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

    def _jobs(self, step: Step) -> list[Job]:
        """Return this host's groups of a step's layer, but for those that are done."""
        if step.sparse is None:
            return []
        done = set() if step.last else set(part_names(self.states.computed(step)))
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
        read, compute, store = (self.stages[name] for name in ("tokens", "compute", "store"))
        folder = self.states.routed(step)
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
        final = self.states.open_final() if side else None
        if first:
            embedding = self.reader.read_finite(EMBEDDING)
        else:
            earlier = self.steps[number - 1]
            store, routing = self.states.open_computed(earlier), routing_of(self.states.open_routed(earlier))
        for slab in slabs:
            if first:
                ids = np.concatenate([self.examples[example][side] for example in slab.examples])
                x = embedding[ids].astype(np.float32, copy=False)
            else:
                x = store.read_slab(slab.number, self._group_of[routing[0][slab.start : slab.stop]])
            yield SlabStates(slab, x, None if final is None else self._encoded(slab, final))

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
        routed, model = self.states.open_routed(step), self.model
        keep = kept_tokens(self.examples, step.stack, self.config, model)
        routing = Routing.select(
            self.orders[step.stack], *routing_of(routed), keep, model.num_experts, self.config.token_cap
        )
        scale = attention.params[f"layers_{step.sparse}"]["pre_mlp_layer_norm"]["scale"]
        computed = None if step.last else self.states.computed(step)
        experts = ExpertPass(attention, self.groups, routed, routing, computed, scale, self.stages, tally)
        experts.run(self._jobs(step))
        rest = len(self._ranges)
        if computed is not None and self.hosts.first and part_name(rest) in self.states.parts:
            part = GroupPart(computed, rest, routed)
            for slab in routed.slabs(rest):
                for piece in routed.pieces(rest, slab, experts.rows):
                    part.append(piece)  # tokens of experts that are not selected pass unchanged
            part.finish()
