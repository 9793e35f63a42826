"""A model out of files and into them: safetensors and GGUF read, safetensors written, atomically; no pickle."""
