"""Ternary digits as codewords."""

from pallas_kernels.encode.op import encode_rows as encode_rows
from pallas_kernels.encode.operands import EncodedRows as EncodedRows
from pallas_kernels.encode.operands import EncodeTable as EncodeTable
