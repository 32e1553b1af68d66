"""A model run layer by layer over all tokens at once, so that no more of it than one layer is in memory."""
