"""Hugging Face directories: safetensors or `.bin`, sharded or not."""
