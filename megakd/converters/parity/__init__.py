"""The parity gate: the same prompts through both models, layer by layer."""
