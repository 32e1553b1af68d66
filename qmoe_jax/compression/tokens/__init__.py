"""The tokens of a calibration: their order, their routing, and their hidden states on disk, expert-major."""
