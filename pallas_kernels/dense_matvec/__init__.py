"""Few tokens times a dense matrix that is kept in bfloat16."""

from pallas_kernels.dense_matvec.op import dense_matvec as dense_matvec
