"""Packed matrices as dense ones."""

from pallas_kernels.unpack.op import unpack as unpack
