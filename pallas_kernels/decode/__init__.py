"""Packed matrices as dense ones."""

from pallas_kernels.decode.op import unpack as unpack
