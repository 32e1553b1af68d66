"""Few tokens times a dense matrix that is kept in bfloat16."""

from pallas_kernels.dense_matmul.op import dense_matmul as dense_matmul
