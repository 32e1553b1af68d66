"""Tokens grouped by expert, so that they share the decoding: many tokens an expert."""

from pallas_kernels.matmul.op import packed_matmul as packed_matmul
