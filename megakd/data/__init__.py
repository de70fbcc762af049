"""Data: tokenizers, documents, Megatron's .bin/.idx files, and the order in which training reads them."""
