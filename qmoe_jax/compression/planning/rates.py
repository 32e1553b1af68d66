"""The speeds of a machine: what a plan divides work by, and where progress begins to count from."""

from __future__ import annotations

import dataclasses
import os

import jax


@dataclasses.dataclass(frozen=True)
class Rates:
    """Speeds of one device and of the host that it is in.

    Attributes:
        name: of the machine.
        product: flop/s of matrix products at jax's default precision (TF32 on a GPU).
        hessian: flop/s of sums of x xᵀ, in full float32.
        cholesky: flop/s of a Cholesky factorization, n³/3 each.
        gptq: flop/s of GPTQ behind it, in² * out each.
        attention: flop/s of attention with its projections.
        encode: weights per second that become codewords.
        inflate: bytes per second of decoded chunks, on all cores of the host.
        read: bytes per second from the disk, in long runs.
        write: bytes per second to the disk, with checksums.
        shares_cores: true where the device is the host's own processor, so that reading and writing take
            turns with computing instead of running beside it.
        source: where the numbers are from.
    """

    name: str
    product: float
    hessian: float
    cholesky: float
    gptq: float
    attention: float
    encode: float
    inflate: float
    read: float
    write: float
    shares_cores: bool
    source: str


H100 = Rates(
    name="one H100 SXM, 26 cores, one NVMe disk",
    product=250e12,
    hessian=43e12,
    cholesky=7e12,
    gptq=21e12,
    attention=130e12,
    encode=2e9,
    inflate=26 * 260e6,
    read=6e9,
    write=3e9,
    shares_cores=False,
    source="stated, not measured: NVIDIA's data sheet (TFLOP/s: TF32 494 without sparsity, float32 67) times "
    "the share that large products reach (a half, two thirds); Cholesky and GPTQ a tenth and a third of "
    "float32; gzip at 260 MB/s per core, as measured on an AMD EPYC; the disk one NVMe of a data center",
)
"""One H100 with an eighth of the cores of an instance of 8 GPUs."""

PER_CORE = {
    "product": 100e9,
    "hessian": 120e9,
    "gptq": 75e9,
    "attention": 60e9,
    "encode": 400e6,
    "inflate": 260e6,
}
"""Speeds of one core of an AMD EPYC with AVX2, which depend on the number of cores."""

PRESETS = {"h100": H100}
"""Machines that a plan can be made for from afar."""


def nominal_rates() -> Rates:
    """Return rates that are right within a factor of a few, without measuring: progress begins with them."""
    if jax.default_backend() != "cpu":
        return H100
    cores = os.cpu_count() or 1
    return Rates(
        name=f"{cores} cores",
        **{name: rate * cores for name, rate in PER_CORE.items()},
        cholesky=70e9,  # on one thread, so that the bits do not depend on their number
        read=1.5e9,
        write=0.8e9,
        shares_cores=True,
        source="nominal",
    )
