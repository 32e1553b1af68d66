"""Packed experts times tokens: the one product, which decodes codewords while it multiplies."""

from pallas_kernels.matmul.op import packed_matmul as packed_matmul
