"""The inference engine: continuous batching over a paged cache, prefix reuse, sampling."""
