"""GPU kernels compiled ahead of time on a machine without a GPU."""
