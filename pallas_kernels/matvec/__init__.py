"""One token, one row of packed weights at a time: few tokens an expert."""

from pallas_kernels.matvec.op import packed_matvec as packed_matvec
