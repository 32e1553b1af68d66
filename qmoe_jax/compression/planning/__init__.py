"""The cost of a compression from shapes: steps, flops, bytes, memory and time, planned and as progress."""
