"""A model writes: batched generation with a KV cache, and the file of what it wrote."""
