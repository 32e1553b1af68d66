"""Encode ternary digits as codewords."""

from pallas_kernels.encode_rows.op import encode_rows as encode_rows
from pallas_kernels.encode_rows.operands import EncodedRows as EncodedRows
from pallas_kernels.encode_rows.operands import EncodeTable as EncodeTable
