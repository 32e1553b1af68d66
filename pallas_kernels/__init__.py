"""Kernels that multiply by ternary matrices while they decode them: arrays in, arrays out."""
