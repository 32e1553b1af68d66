"""Kernels for CPUs, compiled by numba, and the calls that take jitted code to them without copying an array.

Two names are for other packages:

- `pallas_kernels.cpu.ffi.HostFunction`: a Python function that jitted code calls on arrays where they lie.
- `pallas_kernels.cpu.mlp.expert_mlp`: whole experts on NumPy arrays, outside XLA.

The rest serves the `cpu.py` of each op. From the outside in: `ffi` (over `xla_c_api`) and `packed_arguments`
bring operands from jitted code; `mlp` and `packed_product` compute on the tokens that `token_blocks` groups
by expert; `threads` spreads chunks over threads; `inner_loop` decodes and multiplies, reading matrices as
`packed_view` lays them out and computing on the vectors of `simd`. `unpack_rows` and `dense_product` stand
beside `packed_product`.

Only `ffi` and `xla_c_api` can be imported without numba; `pallas_kernels.backend` checks for it.
"""
