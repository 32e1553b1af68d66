"""The cost of a compression from shapes: steps, flops, bytes, memory and time; before a run and as its progress."""
