"""The cost of a compression: flops and bytes of each step's passes, from shapes alone.

A step has an attention pass and a pass over expert groups. In each, stages run at once: reading (weights and
hidden states), computing, coding, storing. The slowest stage decides where the device is not the host's own
processor; else their times add up.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Iterator, Mapping

from qmoe_jax.checkpoints.reader import Checkpoint
from qmoe_jax.compression.options import CompressionConfig
from qmoe_jax.compression.planning.rates import Rates
from qmoe_jax.compression.steps import Step, steps_of
from qmoe_jax.config import SwitchConfig
from qmoe_jax.data import Examples
from qmoe_jax.data.batching import round_up
from qmoe_jax.files.tensor import ChunkedTensor
from qmoe_jax.inference.blockwise.states import LENGTH_MULTIPLE
from qmoe_jax.parameters import ExpertKernel, expert_matrices, expert_shapes, input_matrices

GZIP_SHARE = 0.92
"""Bytes of a compressed chunk per decoded byte: gzip finds little in trained float32 weights."""


class Kind(enum.Enum):
    """A kind of work, and the unit that it is counted in."""

    ATTENTION = "tokens through attention, dense layers and router"
    CALIBRATE = "tokens added to Hessians"
    QUANTIZE = "experts quantized"
    FORWARD = "tokens through experts"
    COPY = "bytes of other parameters"


@dataclasses.dataclass(frozen=True)
class TokenCounts:
    """The size of calibration text.

    Attributes:
        samples: number of samples.
        encoder: tokens of all encoder texts.
        decoder: tokens of all decoder texts.
    """

    samples: int
    encoder: int
    decoder: int

    @classmethod
    def of(cls, examples: Examples) -> TokenCounts:
        """Count the tokens of examples."""
        return cls(len(examples), sum(len(e) for e, _ in examples), sum(len(d) for _, d in examples))

    @classmethod
    def of_text(cls, samples: int, tokens: float) -> TokenCounts:
        """Estimate the tokens of `samples` texts of about `tokens` each, after T5's span corruption.

        15 % of a text is noise in spans of 3, each replaced by a sentinel: .9 of it goes to the encoder, .2
        to the decoder.
        """
        return cls(samples, round(samples * 0.9 * tokens), round(samples * 0.2 * tokens))

    def scaled(self, factor: float) -> TokenCounts:
        """Return the size of a text that is longer by a factor."""
        return TokenCounts(*(round(factor * count) for count in dataclasses.astuple(self)))

    def in_stack(self, stack: str) -> int:
        """Return the tokens of a stack."""
        return self.encoder if stack == "encoder" else self.decoder

    def padded_length(self, stack: str) -> int:
        """Return the mean length of a stack's texts, padded."""
        return round_up(-(-self.in_stack(stack) // max(self.samples, 1)), LENGTH_MULTIPLE)


@dataclasses.dataclass(frozen=True)
class ExpertStorage:
    """The experts of a checkpoint as they are stored.

    Attributes:
        itemsize: bytes per weight once decoded.
        span: experts that one chunk holds parts of; more than 1: they are staged through scratch files.
        inflated: true where chunks are compressed.
        disk_share: bytes that are read from the disk per decoded byte.
        columns: columns (of the second axis) that a chunk spans; 0 where it holds single experts.
    """

    itemsize: int = 4
    span: int = 1
    inflated: bool = False
    disk_share: float = 1.0
    columns: int = 0

    @classmethod
    def of(cls, reader: Checkpoint) -> ExpertStorage:
        """Return the storage of the first expert kernel; all are alike."""
        config = reader.config
        stack = "encoder" if config.encoder_sparse_layers else "decoder"
        name = ExpertKernel(stack, config.sparse_layers(stack)[0], "wo").path
        tensor = reader.tensors[name]
        metadata = getattr(tensor, "metadata", {})
        inflated = metadata.get("compressor") is not None
        share = GZIP_SHARE if inflated else 1.0
        if not isinstance(tensor, ChunkedTensor) or tensor.rows_per_chunk == 1:
            return cls(tensor.dtype.itemsize, 1, inflated, share)
        columns = metadata.get("chunks", tensor.shape)[1]
        return cls(tensor.dtype.itemsize, tensor.rows_per_chunk, inflated, share, columns)


SINGLE_EXPERTS = ExpertStorage()
"""Experts in float32, one by one, not compressed."""


@dataclasses.dataclass(frozen=True)
class Amount:
    """Work of one kind.

    Attributes:
        units: as `Kind` says.
        flops: by the name of the rate in `Rates` that it goes at.
    """

    units: float
    flops: Mapping[str, float]

    def seconds(self, rates: Rates) -> float:
        """Return the time on one device."""
        return sum(flops / getattr(rates, rate) for rate, flops in self.flops.items())


@dataclasses.dataclass(frozen=True)
class PassCost:
    """The cost of one pass of a step, for all hosts and devices together.

    Attributes:
        step: the step.
        name: "attention" or "experts".
        work: what the devices do.
        inflated: bytes of compressed chunks, once decoded.
        read: bytes that are read from disks.
        written: bytes that are written.
        encoded: weights that are coded.
        lanes: what may be computed at once, at most: expert groups; None: without limit.
    """

    step: Step
    name: str
    work: Mapping[Kind, Amount]
    inflated: float = 0.0
    read: float = 0.0
    written: float = 0.0
    encoded: float = 0.0
    lanes: int | None = None

    def stages(self, rates: Rates, devices: int = 1, hosts: int = 1) -> dict[str, float]:
        """Return the seconds of each stage, with so many devices in each of so many hosts."""
        total = devices * hosts
        waves = 1 / total if self.lanes is None else math.ceil(self.lanes / total) / max(self.lanes, 1)
        return {
            "read": (self.inflated / rates.inflate + self.read / rates.read) / hosts,
            "compute": waves * sum(amount.seconds(rates) for amount in self.work.values()),
            "code": self.encoded / rates.encode / hosts,
            "store": self.written / rates.write / hosts,
        }

    def seconds(self, rates: Rates, devices: int = 1, hosts: int = 1) -> float:
        """Return the time of the pass."""
        stages = self.stages(rates, devices, hosts).values()
        return sum(stages) if rates.shares_cores else max(stages)


def pass_costs(
    model: SwitchConfig,
    config: CompressionConfig,
    tokens: TokenCounts,
    storage: ExpertStorage = SINGLE_EXPERTS,
) -> Iterator[PassCost]:
    """Yield the passes of a compression in their order."""
    begun = set()
    for step in steps_of(model, config):
        yield attention_pass(model, step, tokens, first=step.stack not in begun)
        begun.add(step.stack)
        if step.sparse is not None:
            yield expert_pass(model, config, step, tokens, storage)


def attention_pass(model: SwitchConfig, step: Step, tokens: TokenCounts, *, first: bool) -> PassCost:
    """Return the cost of a step's pass over all tokens of its stack."""
    count, width = tokens.in_stack(step.stack), model.num_heads * model.d_kv
    layers = [*step.dense, *([] if step.sparse is None else [step.sparse])]
    per_token = 8 * model.d_model * width + 4 * tokens.padded_length(step.stack) * width
    attention = float(len(layers) * count * per_token)
    read = 0.0 if first else 4.0 * model.d_model * count
    if step.stack == "decoder":
        cross = 4 * model.d_model * width + 4 * tokens.padded_length("encoder") * width
        keys = tokens.encoder * 4 * model.d_model * width
        attention += len(layers) * (count * cross + keys)
        read += 4.0 * model.d_model * tokens.encoder
    dense = len(step.dense) * expert_flops(model)
    router = 2 * model.d_model * model.num_experts if step.sparse is not None else 0
    flops = {
        "attention": attention + 10.0 * model.d_model * count,
        "product": float(count * (dense + router)),
    }
    work = {Kind.ATTENTION: Amount(count, flops)}
    return PassCost(step, "attention", work, read=read, written=4.0 * model.d_model * count)


def expert_pass(
    model: SwitchConfig,
    config: CompressionConfig,
    step: Step,
    tokens: TokenCounts,
    storage: ExpertStorage,
) -> PassCost:
    """Return the cost of a step's pass over its expert groups.

    Tokens are taken to be spread evenly over all experts of the model, and all of them to calibrate.
    """
    experts = config.selection(model).experts
    share = len(experts) / model.num_experts
    count, row = share * tokens.in_stack(step.stack), 4.0 * model.d_model
    weights = sum(math.prod(shape) for shape in expert_shapes(model).values())
    quantizes = step.stack in config.compressed_stacks
    calibrates = quantizes and config.method == "gptq"
    work, read = {}, 0.0
    if calibrates:
        passes = 2 if config.true_sequential else 1
        hidden = 2.0 * model.d_model * model.d_ff * len(input_matrices(model))
        squares = 2.0 * (model.d_model**2 + model.d_ff**2)
        flops = {"hessian": count * squares, "product": count * hidden}
        work[Kind.CALIBRATE] = Amount(passes * count, flops)
        read += passes * row * count
    if quantizes:
        work[Kind.QUANTIZE] = Amount(len(experts), quantization_flops(model, config, len(experts)))
    written = 0.0
    if not step.last:
        work[Kind.FORWARD] = Amount(count, {"product": count * float(expert_flops(model))})
        read, written = read + row * count, row * tokens.in_stack(step.stack)
    needed = float(storage.itemsize * weights * len(experts))
    blocks = -(-experts.stop // storage.span) - experts.start // storage.span
    decoded = needed if storage.span == 1 else float(storage.itemsize * weights * blocks * storage.span)
    if storage.span > 1:  # chunks of several experts are decoded whole; what is needed is staged on disk
        read, written = read + needed, written + needed
    read += decoded * storage.disk_share
    return PassCost(
        step, "experts", work, inflated=decoded if storage.inflated else 0.0, read=read, written=written,
        encoded=float(weights * len(experts)) if quantizes else 0.0,
        lanes=-(-len(experts) // config.experts_per_group),
    )  # fmt: skip


def expert_flops(model: SwitchConfig) -> int:
    """Return the flops of one token through one expert or dense feed-forward part."""
    return 2 * model.d_model * model.d_ff * len(expert_matrices(model))


def quantization_flops(model: SwitchConfig, config: CompressionConfig, experts: int) -> dict[str, float]:
    """Return the flops that quantize experts once their Hessians are there."""
    shapes = expert_shapes(model).values()
    if config.method == "nearest":
        return {"gptq": experts * 20.0 * sum(math.prod(shape) for shape in shapes)}
    return {
        "cholesky": experts * (model.d_model**3 + model.d_ff**3) / 3,
        "gptq": experts * float(sum(columns**2 * rows for rows, columns in shapes)),
    }
