"""Token files in Megatron's format: what they hold, how they are written, read, and taken over from others."""
