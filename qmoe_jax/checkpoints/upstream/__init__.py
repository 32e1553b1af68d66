"""Compressed directories of the original QMoE."""
