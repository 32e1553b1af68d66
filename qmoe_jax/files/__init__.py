"""File formats and durable files, without knowledge of models: one codec, one reader and one writer of each."""
