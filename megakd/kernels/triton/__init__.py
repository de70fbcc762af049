"""The passes over rows and the small steps around them, in Triton."""
