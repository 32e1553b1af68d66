"""File formats and durable files, without knowledge of models: one reader and one writer per format."""
