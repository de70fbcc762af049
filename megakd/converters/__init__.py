"""Other formats of models, to Megatron's and back."""
