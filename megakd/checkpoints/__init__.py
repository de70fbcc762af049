"""Checkpoints: folders that say what they hold, published whole or not at all."""
