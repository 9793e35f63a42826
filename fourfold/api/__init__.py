"""HTTP protocols over the engine."""
