"""Megatron-Core models as megakd uses them: process groups, GPT with its head left to the loss, teachers."""
