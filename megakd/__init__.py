"""megakd distils a large Megatron-Core GPT teacher into a smaller student."""

__version__ = "0.1.0"
