"""A few tokens times a dense matrix kept in bfloat16."""

from pallas_kernels.dense_matmul.op import dense_matmul as dense_matmul
