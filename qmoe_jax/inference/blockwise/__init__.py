"""A model run one layer at a time over all tokens at once, so that no more of it than a layer is in memory."""
