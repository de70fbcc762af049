"""The training loop: steps, optimizer, validation, metrics and checkpoints of one run."""
