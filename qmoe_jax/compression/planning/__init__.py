"""The cost of a compression from shapes, before a run and as its progress: flops, bytes, memory and time."""
