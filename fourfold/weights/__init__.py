"""A model in and out of files: safetensors only, written atomically."""
