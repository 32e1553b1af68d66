"""T5X checkpoints: legacy, Orbax and OCDBT."""
